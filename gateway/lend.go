package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// lending is what a backend has in TransactionMode, where it works for one session after the other.
//
// Its goroutine reads what the server sends, for as long as the connection lives, and writes it to the client of its
// owner. A session's goroutine makes itself the owner (attach), and sends. When the server is ready, nothing is under way
// and nothing pins the session, whichever of the two goroutines sees it last gives the backend back (rest), under the
// session's mu. So only one goroutine at a time writes to a client or to a server:
//
//	to the client: the backend's goroutine while there is one attached, else the session's
//	to the server: the session's goroutine between borrow and the end of its burst (writing), else who holds the owner's mu
type lending struct {
	pool      *pool // nil in SessionMode
	owner     atomic.Pointer[session]
	asking    atomic.Pointer[question] // the gateway's own query under way
	dead      atomic.Bool
	idleSince time.Time // guarded by pool.mu

	paramsMu sync.Mutex // taken last; guards params
	params   []pgwire.Param

	// Guarded by the owner's mu; without an owner, of whoever has it from the pool.
	line       line
	known      known
	status     byte
	atRest     bool           // ready for query outside a transaction, and nothing was sent since
	cancelling int            // requests to cancel that are on their way
	settings   []pgwire.Param // that a session made
	dirty      bool           // something may be set that cannot be seen
	retired    bool           // must not be used by another session
	last       uint64         // session that used it last
	fatal      bool           // the server said why it ends the connection
	lastWord   string         // what it said, if the client was not told
	dropped    bool           // the session does not want it any more
	counts     Counts         // that its pool does not know yet
	received   uint64         // that was counted, of what its reader has received
	marking    marking
	started    string // backend_start of the server's process, as far as it was asked
	standbys   string // what synchronous_standby_names said then, if it makes commits wait for the site's agent

	// Of the backend's goroutine.
	part bool // what is left of the message at hand follows what the client has got of it
	own  bool // rows that come now are for the gateway
}

// question is a query of the gateway's own.
type question struct {
	setup bool // else a probe
	more  int  // ReadyForQuery that come before the last
	rows  [][]string
	err   *pgwire.Error // the latest
	done  bool          // guarded by the owner's mu
}

// ask makes what the server sends now the answer to a query of the gateway's own, which the caller sends. As a Query it
// takes the unnamed statement away.
func (b *backend) ask(q *question) {
	b.known.unnamed = preparation{}
	b.asking.Store(q)
}

// enter begins the backend's life in a pool.
func (b *backend) enter(p *pool) {
	b.pool, b.status = p, pgwire.Idle
	b.params = append([]pgwire.Param{}, b.initial...)
	b.received = b.r.Received()
	p.mu.Lock()
	p.all[b] = struct{}{}
	p.mu.Unlock()
	p.g.backends.Go(func() {
		b.leave(b.answer())
	})
}

// answer handles what the server sends until the connection ends.
func (b *backend) answer() error {
	for {
		typ, _, err := b.r.Next(pgwire.FromServer)
		if err != nil {
			return err
		}
		s, q := b.owner.Load(), b.asking.Load()
		b.part = true
		if s != nil && b.r.Left() <= pgwire.BufferSize && s.keeps() {
			// All of it, because half a message that the client has got cannot be taken back.
			b.part = false
			body, err := b.r.Peek(b.r.Left())
			if err != nil {
				return err
			}
			if s.replays && !b.own && q == nil && counts(typ) {
				s.flight.sum = hash(hash(cmp.Or(s.flight.sum, hashStart), []byte{typ}), body)
			}
		}
		switch {
		case typ == pgwire.ParameterStatus || typ == pgwire.NoticeResponse || typ == pgwire.NotificationResponse || typ == pgwire.ErrorResponse:
			err = b.report(s, q, typ)
		case s == nil:
			err = errors.New("the server sent an answer that nobody asked for")
		case q != nil:
			err = b.hear(s, q, typ)
		default:
			err = b.deliver(s, typ)
		}
		if err != nil {
			return err
		}
	}
}

// report handles what a server may send at any time, and errors.
func (b *backend) report(s *session, q *question, typ byte) error {
	if s == nil {
		return b.reportIdle(typ)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case typ == pgwire.NoticeResponse && s.keeps() && s.flight.isCommitting() && errorOf(b.r).Routine == syncWait:
		b.lastWord = "The wait of its commit for another site was disturbed."
		return errUnproven
	case typ == pgwire.ParameterStatus:
		p, err := b.noteParam()
		if err != nil {
			return err
		}
		if q != nil || s.b != b {
			return nil // The client learns what differs in the end.
		}
		s.told = reported(s.told, p)
		if err := s.w.Write(pgwire.AppendParameterStatus(nil, p)); err != nil {
			return err
		}
	case typ == pgwire.ErrorResponse && q != nil:
		body, err := b.r.Body(textMax)
		if err != nil {
			return err
		}
		q.err, err = pgwire.ParseError(body)
		return err
	case typ == pgwire.NoticeResponse && q != nil:
		return nil
	case s.b != b:
		return nil // It was given back meanwhile.
	default:
		send := b.r.Forward
		if typ == pgwire.ErrorResponse {
			if send = b.failed(s); send == nil {
				return nil
			}
		} else if s.flight.hidden > 0 {
			return nil // The client has had it.
		}
		first := s.w.Total() == s.flight.base
		if err := send(s.w); err != nil {
			return err
		}
		if first && typ != pgwire.ErrorResponse {
			s.flight.base = s.w.Total() // It belongs to no answer.
		}
	}
	if b.atRest || !b.r.Complete() && (!s.holds() || s.w.Total() == s.flight.base) {
		return s.w.Flush()
	}
	return nil
}

// holds reports that answers are held back until all of a segment's are there, so that it can be run again.
func (s *session) holds() bool { return s.keeps() && !s.eager.Load() }

// syncWait is the routine in PostgreSQL (src/backend/replication/syncrep.c) that warns when a commit no longer waits to be durable
// elsewhere; it is reported as a success all the same.
const syncWait = "SyncRepWaitForLSN"

// errUnproven makes a commit one in doubt.
var errUnproven = errors.New("a commit is not known to be durable at another site")

// failed takes note of an error and gives what sends it to the client.
func (b *backend) failed(s *session) (send func(*pgwire.Writer) error) {
	e := errorOf(b.r)
	b.fatal = e.Severity == "FATAL" || e.Severity == "PANIC"
	if b.fatal && isLeaving(e.Code) && s.pinned() == "" {
		b.fatal = false
		if s.survivable(b) {
			b.lastWord = fmt.Sprintf("It said: %s (SQLSTATE %s).", e.Message, e.Code)
			return nil // It is about to go.
		}
		b.fatal = true
	}
	if s.flight.simple && s.flight.isCommitting() {
		// A server tells a Query's result only when it has committed.
		s.w.CutBack(s.flight.tag)
	}
	send = b.r.Forward
	if b.line.next().changed {
		send = func(w *pgwire.Writer) error { return w.Write(planChanged) }
	}
	if next := b.line.next(); next.missing && e.Code == codeMissing {
		send = func(w *pgwire.Writer) error { return w.Write(missing(e, next.name)) }
	}
	b.line.answer(pgwire.ErrorResponse, s.undo)
	b.own, s.flight.failed = false, true
	if s.flight.hidden > 0 { // It went well the last time.
		s.flight.strange = true
		_ = b.conn.Close() // and its goroutine ends
		send = nil
	}
	s.tell(b)
	return send
}

// isLeaving tells the last words of a server that ends its connections from those that concern a session.
func isLeaving(code string) bool {
	return code == codeShutdown || code == codeCrash || code == codeNoSite
}

// planChanged is what a server says of a statement whose result is not what it was; drivers prepare again.
var planChanged = pgwire.AppendError(nil, &pgwire.Error{
	Severity: "ERROR", Code: codeUnsupported, Message: "cached plan must not change result type",
	Detail: "The statement has other parameters or columns at the server that the session uses now.", Routine: "RevalidateCachedQuery",
})

// reportIdle handles what a server says while nobody uses the connection. An error is its last word.
func (b *backend) reportIdle(typ byte) error {
	if typ == pgwire.ErrorResponse {
		return errors.New("the server has raised an error while nobody used the connection")
	}
	if typ != pgwire.ParameterStatus {
		return nil
	}
	_, err := b.noteParam() // The next session that uses it learns it.
	return err
}

// noteParam takes the ParameterStatus at hand.
func (b *backend) noteParam() (pgwire.Param, error) {
	body, err := b.r.Body(textMax)
	if err != nil {
		return pgwire.Param{}, err
	}
	p, err := pgwire.ParseParameterStatus(body)
	if err == nil {
		b.paramsMu.Lock()
		defer b.paramsMu.Unlock()
		b.params = reported(b.params, p)
	}
	return p, err
}

// news gives the reported parameters that differ from what a client was told.
func (b *backend) news(told []pgwire.Param) []pgwire.Param {
	b.paramsMu.Lock()
	defer b.paramsMu.Unlock()
	return changed(told, b.params)
}

// hear gathers the answer to the gateway's own query.
func (b *backend) hear(s *session, q *question, typ byte) error {
	switch typ {
	case pgwire.DataRow:
		body, err := b.r.Body(textMax)
		if err != nil {
			return err
		}
		columns, err := pgwire.ParseRow(body)
		if err != nil {
			return err
		}
		row := make([]string, len(columns))
		for i, c := range columns {
			row[i] = string(c)
		}
		q.rows = append(q.rows, row)
	case pgwire.ReadyForQuery:
		if q.more > 0 {
			q.more--
			return nil
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		b.asking.Store(nil)
		q.done = true
		if q.setup {
			b.atRest = true
			if q.err == nil {
				// The client is told with the answer to what it sent.
				for _, p := range b.news(s.told) {
					s.told = reported(s.told, p)
					if err := s.w.Write(pgwire.AppendParameterStatus(nil, p)); err != nil {
						return err
					}
				}
			}
		} else {
			s.probed(b, q)
		}
		s.changed.Broadcast()
	}
	return nil
}

// counts reports that a message is a part of the answer to a statement, as a client sees it. What says that a message of the
// protocol was understood may be in another order when statements are known to the server.
func counts(typ byte) bool {
	switch typ {
	case pgwire.DataRow, pgwire.CommandComplete, pgwire.EmptyQueryResponse, pgwire.PortalSuspended, pgwire.ErrorResponse:
		return true
	}
	return false
}

// sameAsBefore compares the answer to a segment that was run again with what the client has got the first time. mu is held.
func (s *session) sameAsBefore() bool {
	f := &s.flight
	if i := len(f.sums) - f.hidden; s.replays && f.sums[i] != f.sum {
		return false
	}
	f.hidden--
	return true
}

// deliver hands an answer to the client. It flushes when no further one is there, unless answers are held back.
func (b *backend) deliver(s *session, typ byte) (err error) {
	switch typ {
	case pgwire.DataRow, pgwire.CopyData, pgwire.CopyDone, pgwire.FunctionCallResponse:
		if b.own {
			return b.ownRow(s)
		}
		if s.flight.hidden > 0 { // changed by the session's goroutine only while it has no backend
			return nil
		}
		err = b.r.Forward(s.w)
	case pgwire.ReadyForQuery:
		return b.ready(s)
	default:
		if typ == pgwire.CommandComplete {
			b.completed(s)
		}
		err = b.settle(s, typ)
	}
	if err == nil && !b.r.Complete() && !s.holds() {
		err = s.w.Flush()
	}
	return err
}

// settle hands on an answer that says what became of a message.
func (b *backend) settle(s *session, typ byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var v verdict
	switch typ {
	case pgwire.ParameterDescription, pgwire.RowDescription, pgwire.NoData:
		s.seeTypes(b, typ)
		v = b.describe(s, typ)
	case pgwire.CopyInResponse, pgwire.CopyBothResponse:
		s.eager.Store(true) // The client has to send something before there is more.
		fallthrough
	default:
		v = b.line.answer(typ, s.undo)
	}
	b.own = typ == pgwire.BindComplete && b.line.head() == 'm'
	s.tell(b)
	switch {
	case v == unexplained:
		return errUnexplained
	case v == swallow || s.flight.hidden > 0:
		return nil
	}
	if typ == pgwire.CommandComplete {
		s.flight.tag = s.w.Total()
	}
	// Under mu, because what is behind the last answer may be flushed by the session's goroutine (flushHeld).
	return b.r.Forward(s.w)
}

// ownRow takes the answer to a mark.
func (b *backend) ownRow(s *session) error {
	body, err := b.r.Body(textMax)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flight.xid = xidOf(body)
	return nil
}

// describe takes note of a description: the client knows it from now on, or it is for the gateway. s.mu is held.
func (b *backend) describe(s *session, typ byte) verdict {
	body, err := b.r.Peek(min(b.r.Left(), pgwire.BufferSize))
	whole := err == nil && len(body) == b.r.Left() // a longer one is not compared
	e := b.line.next()
	if e.st != nil && whole {
		if e.kind == 'T' || e.kind == 'O' {
			e.st.shape.note(typ, body)
		}
		if p := b.known.find(e.st); p != nil {
			p.shape.note(typ, body)
		}
	}
	v := b.line.answer(typ, s.undo)
	if e.kind == 'D' && typ != pgwire.ParameterDescription {
		s.compared(e.st)
	}
	return v
}

var errUnexplained = errors.New("the server sent an answer that does not fit what it was sent")

// completed looks for the end of statements that take the backend's prepared statements away.
func (b *backend) completed(s *session) {
	tag, err := b.r.Peek(16)
	if err != nil || len(tag) < 12 || tag[0] != 'D' {
		return
	}
	if t := string(tag); t == "DISCARD ALL\x00" || t == "DEALLOCATE ALL\x00" {
		s.mu.Lock()
		defer s.mu.Unlock()
		clear(s.statements)
		b.known = known{}
		b.marking = marksNot // its statement has gone as well
		// What the client has already sent behind it was prepared for the statements as they were.
		b.retired = true
	}
}

// ready hands on that the server is ready, and gives the backend back if that was all.
func (b *backend) ready(s *session) error {
	body, err := b.r.Body(1)
	if err != nil {
		return err
	}
	status, err := pgwire.ParseReadyForQuery(body)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v := b.line.answer(pgwire.ReadyForQuery, s.undo)
	if v == unexplained {
		return errUnexplained
	}
	b.status = status
	if v == swallow {
		s.tell(b)
		return nil
	}
	if s.flight.hidden == 0 {
		b.tally(s, status)
	}
	b.atRest = status == pgwire.Idle && b.line.empty()
	if s.keeps() && b.atRest && s.probe && !s.writing && s.flight.hidden == 0 {
		// Until it is known what the session has become, it is not told: it could not go on elsewhere.
		s.heldReady = true
		s.rest(b)
		return nil
	}
	if s.flight.hidden == 0 {
		s.reruns = 0
		if err := s.w.Write(readyFor(status)); err != nil {
			return err
		}
	} else if !s.sameAsBefore() {
		s.flight.strange = true
		_ = b.conn.Close() // and its goroutine ends
		return nil
	}
	s.answered(status)
	// Under mu, because afterwards the session's goroutine may make another backend the one that writes to the client.
	if b.atRest || !b.r.Complete() {
		if err := s.w.Flush(); err != nil {
			return err
		}
	}
	s.rest(b)
	return nil
}

var readyMessages = map[byte][]byte{
	pgwire.Idle: pgwire.AppendReadyForQuery(nil, pgwire.Idle), pgwire.InBlock: pgwire.AppendReadyForQuery(nil, pgwire.InBlock),
	pgwire.InFailed: pgwire.AppendReadyForQuery(nil, pgwire.InFailed),
}

func readyFor(status byte) []byte { return readyMessages[status] }

// leave ends the backend, and tells its owner.
func (b *backend) leave(cause error) {
	b.dead.Store(true)
	b.close()
	if s := b.owner.Load(); s != nil {
		s.lose(b, cause)
	}
	b.pool.gone(b)
}
