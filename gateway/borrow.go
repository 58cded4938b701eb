package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// borrowing is what a session has in TransactionMode. The session's goroutine sends; see lending for who does what.
type borrowing struct {
	id      uint64
	changed sync.Cond // of mu: a question was answered, or the backend is gone

	// Guarded by mu.
	told       []pgwire.Param // reported parameters as the client knows them
	settings   []pgwire.Param // what it has set, as the server last said it
	customs    []string       // parameters with a dot that it named
	statements map[string]*statement
	pinSeen    string          // why it stays at its backend, as the server last said
	pinsTold   map[string]bool // and as its statements said
	probe      bool            // the server must be asked after this transaction
	unsettled  bool            // this transaction has changed settings
	writing    bool            // messages to the backend are under way
	lost       bool            // the client was told that its backend is lost
	comparing  *statement      // whose shape the server was asked for

	portal  *statement            // of the unnamed portal
	portals map[string]*statement // of others

	// Of the session's goroutine.
	waitsUntil time.Time // for a server, at the most
	scratch    []byte
	longs      int // prepared statements that were too long to be held
}

// pinned says why the session stays at its backend; empty: it need not.
func (s *session) pinned() string {
	if len(s.pinsTold) == 0 {
		return s.pinSeen
	}
	reasons := slices.Sorted(maps.Keys(s.pinsTold))
	if s.pinSeen != "" {
		reasons = append(reasons, s.pinSeen)
	}
	return strings.Join(reasons, ", ")
}

// Pins says how many sessions stay at their backend for which reasons, at this moment.
func (g *Server) Pins() map[string]int {
	g.mu.Lock()
	sessions := slices.Collect(maps.Values(g.sessions))
	g.mu.Unlock()
	pins := map[string]int{}
	for _, s := range sessions {
		s.mu.Lock()
		if why := s.pinned(); why != "" && s.b != nil {
			pins[why]++
		}
		s.mu.Unlock()
	}
	return pins
}

// runBorrowing serves the client with backends that it borrows.
func (s *session) runBorrowing(ctx context.Context) {
	var err error
	if s.statements == nil { // else it has begun in another process
		s.statements, s.pinsTold, s.portals = map[string]*statement{}, map[string]bool{}, map[string]*statement{}
		err = s.introduce(ctx)
	}
	if err == nil {
		stop := context.AfterFunc(ctx, func() { // This goroutine may wait for a server, or a server's for the client.
			s.ending.Store(true)
			_ = s.conn.SetWriteDeadline(time.Now().Add(helloMax))
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.b != nil {
				_ = s.b.conn.Close()
			}
		})
		defer stop()
		if err = s.sendAll(ctx); errors.Is(err, errMoved) {
			return // The connection is another process's.
		}
		s.finish() // what it has sent is carried out, whether or not it is there still
	}
	s.ending.Store(true)
	_ = s.conn.SetWriteDeadline(time.Now().Add(helloMax)) // A client that does not read holds nothing up any more.
	s.detach()
	if err != nil || s.g.ending.Load() || s.killed.Load() {
		s.refuse(err)
	}
}

// introduce tells the client what a server that is there now reports.
func (s *session) introduce(ctx context.Context) error {
	b, err := s.fetchFirst(ctx)
	if err != nil {
		return err
	}
	s.told = slices.Clone(b.initial)
	b.pool.put(b)
	return s.begin(s.told)
}

// fetch takes a backend of the server that the router names now.
func (s *session) fetch(ctx context.Context) (*backend, error) {
	target, err := s.route()
	if err != nil {
		return nil, err
	}
	return s.g.pool(target, &s.who).get(ctx, s, target)
}

// retryEvery is how often it is looked whether a server is there again.
const retryEvery = 25 * time.Millisecond

// fetchPatiently is fetch for a session that has begun: between two transactions nothing is lost when no server may be used just
// now, or when the one at hand does not have yet what the session has seen, so that the client waits, no longer than HoldMax.
func (s *session) fetchPatiently(ctx context.Context) (*backend, error) {
	deadline := time.Now().Add(s.g.lim().HoldMax)
	s.waitsUntil = deadline
	waited := func(*backend) {}
	for first := true; ; first = false {
		b, err := s.fetch(ctx)
		if err == nil {
			b, err = s.catchUp(ctx, b, deadline)
		}
		if err == nil || !absent(err) || s.ending.Load() || time.Now().After(deadline) {
			waited(b)
			return b, err
		}
		if first {
			waited = s.waits()
		}
		select {
		case <-ctx.Done():
			waited(nil)
			return nil, errShutdown
		case <-time.After(retryEvery):
		}
	}
}

// catchUp waits until the session sees at b's site what it has seen at the one before. It does not go on with less: b is put back
// when that site is lost meanwhile, or at the deadline.
func (s *session) catchUp(ctx context.Context, b *backend, deadline time.Time) (*backend, error) {
	from, to := s.last, b.target.Site
	if s.g.cfg.Reads != nil {
		from = s.seen.site
	}
	if !s.keeps() || from == "" || from == to {
		return b, nil
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	var err error
	if s.g.cfg.Reads != nil {
		err = s.g.crossing(s.who.Database, from, b.target).wait(ctx, s.g, s.seen.at, func() bool {
			t, err := s.route()
			return err == nil && t.Site == to
		})
	} else {
		err = s.g.cfg.Sites.CatchUp(ctx, s.who.Database, from, to)
	}
	if err == nil {
		return b, nil
	}
	b.pool.put(b)
	return nil, fatalError(codeNoSite, fmt.Sprintf("site %s does not have yet what this session has seen at site %s", to, from), err.Error(), "connect again")
}

// absent reports that no server may be used now, or that the one at hand starts or ends: the next moment may be different.
func absent(err error) bool {
	if e, ok := errors.AsType[*serverError](err); ok {
		switch e.says.Code {
		case codeNoSite, codeShutdown, "57P02":
			return true
		}
		return false
	}
	e, ok := errors.AsType[*pgwire.Error](err)
	return ok && e.Code == codeNoSite
}

// borrow gives the session's backend, to send to until the end of the burst: the one it has, or one of the server that
// the router names now. What a text does to the session is noted.
func (s *session) borrow(ctx context.Context, t text) (*backend, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.b != nil && s.b.asking.Load() != nil {
		s.changed.Wait()
	}
	if err := s.holdPinned(ctx); err != nil {
		return nil, err
	}
	if s.roamer != nil {
		s.comeHome(t.roams)
	}
	if s.g.cfg.Pace != nil {
		s.slowDown(ctx, t)
	}
	for try := 0; s.b == nil; try++ {
		if s.loss != nil {
			return nil, errLoss
		}
		if s.lost || s.ending.Load() {
			return nil, errGone
		}
		s.roamer, s.reading = nil, t.roams
		s.mu.Unlock()
		if t.roams && try == 0 && s.roam() {
			s.mu.Lock()
			continue
		}
		b, err := s.fetchPatiently(ctx)
		if err == nil {
			err = s.attach(b, t.seq)
		}
		s.mu.Lock()
		if err != nil && (!errors.Is(err, errStale) || try >= attachTries) {
			return nil, err
		}
	}
	if !s.writing {
		s.start(s.b)
		s.writing = true
	}
	s.note(t)
	if s.keeps() {
		s.flight.note(t)
	}
	return s.b, nil
}

// keeps reports that the session keeps what it needs to go on without its server.
func (s *session) keeps() bool { return s.g.cfg.Sites != nil }

// attachTries is how many connections that died in the pool are tried before the client is told.
const attachTries = 5

// errStale means that a pooled connection cannot be used; the next may be good.
var errStale = fatalError(codeLost, "connections to the server were lost", "", "connect again")

// note remembers what a text does.
func (s *session) note(t text) {
	if s.g.lim().Strict {
		t.probe, t.dirty = true, true
	}
	s.probe = s.probe || t.probe || (t.unpin && s.pinned() != "")
	s.unsettled = s.unsettled || t.probe || t.local
	s.b.dirty = s.b.dirty || t.dirty
	if t.pin != "" {
		s.pinsTold[t.pin] = true
	}
	if t.unprepared {
		delete(s.pinsTold, "PREPARE TRANSACTION")
	}
	for _, name := range t.customs {
		if !slices.Contains(s.customs, name) {
			s.customs = append(s.customs, name)
		}
	}
}

// attach makes the session a backend's owner, and gives it the session's settings. If they do not read back equal the
// session ends.
func (s *session) attach(b *backend, seq bool) error {
	if seq {
		b.pool.setSeq()
	}
	if name := apart(s.told, b.initial); name != "" {
		b.pool.put(b)
		return fatalError(codeShutdown, fmt.Sprintf("the session cannot go on at the server of %s: its %s differs", b.target.name(), name), "", "connect again")
	}
	fresh := b.last == 0
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b = b
	b.owner.Store(s)
	if b.dead.Load() {
		s.b = nil
		return errStale
	}
	other := b.last != s.id
	b.last = s.id
	sequences := other && !fresh && b.pool.hasSeq()
	if err := s.prepareMarks(b); err != nil {
		return err
	}
	if err := s.askTaints(b); err != nil {
		return err
	}
	defer func() {
		if len(s.flight.outstanding()) <= 1 && s.flight.answered == 0 {
			s.flight.base = s.w.Total() // what the client was told until now belongs to no answer
		}
	}()
	differs := !slices.Equal(b.settings, s.settings) || len(b.news(s.told)) > 0
	if !differs && !sequences && (!b.dirty || !other) {
		return nil
	}
	q := &question{setup: true}
	b.ask(q)
	s.scratch = pgwire.AppendQuery(s.scratch[:0], setupSQL(s.settings, sequences))
	if err := s.await(b, q); err != nil {
		return err
	}
	wrong := notAsSet(s.settings, q.rows)
	if q.err == nil && wrong == "" {
		b.settings = slices.Clone(s.settings)
		b.dirty = false
		return nil
	}
	// Nobody uses it again.
	s.drop(b)
	if !fresh {
		return errStale // Perhaps because of what the other session had set.
	}
	why := "Parameter " + wrong + " has another value than the one that was set."
	if q.err != nil {
		why = q.err.Message
	}
	return fatalError(codeShutdown, fmt.Sprintf("the settings of the session cannot be established at the server of %s", b.target.name()), why,
		"give the role the same rights at all sites, and connect again")
}

// drop takes a backend away from the session for good.
func (s *session) drop(b *backend) {
	b.dropped = true
	_ = b.conn.Close()
	for s.b == b {
		s.changed.Wait()
	}
}

// endBurst sends what was gathered. Afterwards the backend's goroutine may give the backend back; if it has nothing more
// to say, it is done here.
func (s *session) endBurst() {
	if !s.writing { // only this goroutine sets it
		return
	}
	s.mu.Lock()
	b := s.b
	s.mu.Unlock()
	if b != nil {
		_ = b.w.Flush()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writing = false
	if s.b != nil {
		s.took(s.b)
		s.carryOn(s.b)
		s.rest(s.b)
	}
}

// rest gives the backend back if nothing is under way and nothing pins the session. If the transaction may have changed
// the session's state, the server is asked first.
func (s *session) rest(b *backend) {
	if !b.atRest || s.writing || s.b != b || b.asking.Load() != nil || s.ending.Load() {
		return
	}
	if s.probe {
		s.probe = false
		b.ask(&question{})
		_ = b.w.Write(pgwire.AppendQuery(nil, probeSQL(s.who.User, s.customs)))
		_ = b.w.Flush() // Its goroutine sees what is wrong with the connection.
		return
	}
	if s.pinned() != "" || b.cancelling > 0 {
		b.pool.mu.Lock()
		b.pool.gather(b)
		b.pool.mu.Unlock()
		s.beckon()
		return
	}
	s.unsettled = false
	s.portal = nil
	clear(s.portals)
	s.ran(b)
	s.b = nil
	b.owner.Store(nil)
	b.pool.put(b)
	s.beckon()
}

// probed takes the answer to a probe.
func (s *session) probed(b *backend, q *question) {
	if s.heldReady {
		s.heldReady = false
		_ = s.w.Write(readyFor(pgwire.Idle)) // the next read tells if the client has gone
		_ = s.w.Flush()
		s.reruns = 0
		s.answered(pgwire.Idle)
	}
	if q.err != nil {
		s.probe = true // after the next transaction
		s.pinSeen = "its state could not be read: " + q.err.Message
		return
	}
	f := readProbe(q.rows)
	s.settings, s.pinSeen = f.settings, f.pin
	b.settings = slices.Clone(f.settings)
	s.unsettled = false
	s.rest(b)
}

// lose ends the session because its backend is lost, unless it did not need it yet. It runs in the backend's goroutine.
func (s *session) lose(b *backend, cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.b != b {
		return
	}
	s.b, s.due = nil, commitment{}
	defer s.changed.Broadcast()
	if q := b.asking.Load(); b.dropped || s.ending.Load() || (q != nil && q.setup) {
		if s.keeps() && q != nil && q.setup && !b.dropped {
			s.g.endOrphan(s.doubt(&loss{target: b.target, pid: b.pid, since: b.started}))
		}
		return
	}
	if s.survivable(b) {
		s.lostServer(b, cause)
		return
	}
	s.lost = true
	if !b.fatal && !inMessage(b) {
		why := s.pinned()
		switch {
		case why != "":
		case b.atRest:
			why = "what its last transaction has set was not read yet"
		default:
			why = "a transaction is open"
		}
		_ = s.w.Write(report(lost(b.target, why, cause.Error())))
	}
	if s.keeps() {
		s.g.endOrphan(s.doubt(&loss{target: b.target, pid: b.pid, since: b.started}))
	}
	_ = s.w.Flush()
	_ = s.conn.Close()
}

// inMessage reports whether the client has got a part of a message. Answers to the gateway's own questions are not for it.
func inMessage(b *backend) bool { return b.part && b.r.Left() > 0 && b.asking.Load() == nil }

// detach parts the session from its backend at its end.
func (s *session) detach() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.b != nil {
		s.drop(s.b)
	}
}

// busyBorrowed gives the backend if a query of the client is under way, and keeps it from being lent to another until done
// was called.
func (s *session) busyBorrowed() (b *backend, done func()) {
	b = s.b
	if b.line.empty() || b.asking.Load() != nil || s.flight.isCommitting() {
		// A commit that waits for another site must not be disturbed: it would be reported without being durable there.
		return nil, nil
	}
	b.cancelling++
	return b, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		b.cancelling--
		s.rest(b)
	}
}
