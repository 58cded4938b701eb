package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// loss is what is known of a server that was lost while a session used it.
type loss struct {
	target Target
	pid    uint32
	since  string // the start of its backend
	cause  string
	sent   []expected // to it, and not answered; what is the gateway's own included
	broken bool       // the client has got a part of a message
	under  bool       // something was sent to it, and not answered
	pinned string     // why the session cannot go on without it
	ready  bool       // all was done, but what it has made of the session is not known
	roamed bool       // it served a read elsewhere
}

// recovery is what a session has to go on without a server. Guarded by mu, but for what the session's goroutine alone uses.
type recovery struct {
	flight flight
	loss   *loss  // to be seen to
	limbo  *limbo // answers in the place of a server
	parked bool   // the session's goroutine waits for the client
	poked  bool   // and was woken by a deadline
	wants  want   // what the session's goroutine waits for
	due    commitment
	// heldReady: the server is ready, which the client is told when the session's state is read.
	heldReady bool
	last      string   // site of the latest transaction
	home      string   // the site that the client has asked for
	types     []uint32 // user types that it has seen or named

	replays bool        // the role's transactions may be run again as a whole
	eager   atomic.Bool // answers are not held back: the client waits for them

	reruns int // of what is under way

	// Of the session's goroutine.
	salt, marks uint64         // of its marks
	left        bool           // something was left to the backend's goroutine (due)
	client      *pgwire.Reader // r while nothing is handled again
	rerun       *bytes.Reader  // what is handled again, behind r
}

// survivable reports that the loss of the session's backend b is for the session's goroutine to see to. A client that takes nothing
// any more has lost its own connection, and nothing runs again for it. mu is held.
func (s *session) survivable(b *backend) bool {
	return s.keeps() && s.w.Err() == nil && !b.fatal && (b.asking.Load() == nil || s.heldReady) && !s.ending.Load()
}

// errLoss makes the session's goroutine see to the loss of its server.
var errLoss = errors.New("the server was lost")

// park notes that the session's goroutine is about to wait for the client; false: there is something else to do.
func (s *session) park() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.parked = s.loss == nil; s.parked {
		e, _ := s.summoned()
		s.parked = e == noErrand
	}
	return s.parked
}

// unpark notes that it waits no more, and tells whether it was woken because of a loss.
func (s *session) unpark() (woken bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.parked = false
	if !s.poked {
		return false
	}
	s.poked = false
	_ = s.conn.SetReadDeadline(time.Time{})   // it may have ended
	if s.g.ending.Load() || s.killed.Load() { // The deadline that was to wake us may be the one that we have just taken away.
		_ = s.conn.SetReadDeadline(time.Unix(1, 0))
	}
	return true
}

// lostServer notes the loss of b, for the session's goroutine to see to. mu is held.
func (s *session) lostServer(b *backend, cause error) {
	why := cause.Error()
	if b.lastWord != "" {
		why = b.lastWord
	}
	s.loss = &loss{
		target: b.target, pid: b.pid, since: b.started, cause: why, sent: slices.Clone(b.line.sent[b.line.first:]), broken: inMessage(b), ready: s.heldReady, pinned: s.pinned(),
		roamed: b == s.roamer,
	}
	s.heldReady = false
	if s.parked && !s.poked {
		s.poked = true
		_ = s.conn.SetReadDeadline(time.Unix(1, 0)) // it may have ended
	}
}

// rename notes that a client's name stands for another statement from now on; nil: for none. mu is held.
func (s *session) rename(name string, st *statement) {
	if s.keeps() && name != "" {
		s.flight.names = append(s.flight.names, naming{len(s.flight.log), name, s.statements[name]})
	}
	s.call(name, st)
}

func (s *session) call(name string, st *statement) {
	if st == nil {
		delete(s.statements, name)
	} else {
		s.statements[name] = st
	}
}

// unname takes back what happened to names since a place in the log.
func (s *session) unname(at int) {
	f := &s.flight
	for len(f.names) > 0 && f.names[len(f.names)-1].at >= at {
		n := f.names[len(f.names)-1]
		s.call(n.name, n.was)
		f.names = f.names[:len(f.names)-1]
	}
}

// answered notes that the client has got ReadyForQuery. mu is held.
func (s *session) answered(status byte) {
	if !s.keeps() {
		return
	}
	s.flight.ready(status, s.w.Total())
	if len(s.flight.outstanding()) == 0 {
		s.eager.Store(false)
	}
	if s.b != nil {
		s.tell(s.b)
	}
}

// flushHeld gives the client what was held back: it waits for it.
func (s *session) flushHeld(b *backend) {
	_ = b.w.Flush()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.eager.Store(true)
	if s.b == b && b.line.empty() {
		_ = s.w.Flush() // the next read tells if the client has gone
	}
}

// recover goes on after the loss of a server; an error ends the session.
func (s *session) recover(ctx context.Context) error {
	s.mu.Lock()
	l := s.loss
	s.loss, s.writing = nil, false
	f := &s.flight
	delivered := s.w.Sent() > f.base
	replay := s.replays && f.replayable(time.Now())
	how := f.decide(delivered, replay)
	f.strange = false
	s.sawUntilLoss(l.target.Site, l.roamed)
	d := s.doubt(l)
	l.under = len(f.outstanding()) > 0
	unmarked := how == asks && f.outstanding()[0].unmarked
	block := f.status != pgwire.Idle || f.hidden > 0
	s.mu.Unlock()
	s.g.cfg.Log.Info("a server was lost in a transaction", "site", l.target.name(), "cause", l.cause, "course", how.String())
	if l.broken && delivered {
		_ = s.w.Flush()
		return errGone // Inside a message nothing can be told.
	}
	if unmarked {
		how = unknown
	}
	if l.ready && how != again && how != fails {
		if s.w.Write(readyFor(pgwire.Idle)) != nil {
			return errGone
		}
		return errSettings(l)
	}
	if how == asks {
		return s.resolve(ctx, l, d)
	}
	if l.pinned != "" || block || l.under {
		s.g.endOrphan(d)
	}
	if l.pinned != "" && how != unknown {
		return lost(l.target, l.pinned, l.cause)
	}
	if how == again && (block || l.under) && !s.mayRunAgain() {
		how = fails
	}
	switch how {
	case again:
		return s.runAgain()
	case fails:
		return s.enterLimbo(errRolledBack(l.target, l.cause), block)
	case stays:
		return s.enterLimbo(nil, true)
	default:
		return errUnknown(l.target, d.LTXID, l.cause)
	}
}

func (c course) String() string {
	return [...]string{"run again", "rolled back", "had failed", "ask", "unknown"}[c]
}

// doubt is the transaction under way, for those who may know what became of it. mu is held.
func (s *session) doubt(l *loss) Doubt {
	d := Doubt{Target: l.target, Database: s.who.Database, PID: l.pid, Started: l.since, XID: s.flight.xid, At: time.Now()}
	if under := s.flight.outstanding(); len(under) > 0 {
		d.LTXID = under[0].ltxid
	}
	return d
}

// orphanMax bounds how long the end of a backend without a client is waited for.
const orphanMax = time.Second

// endOrphan has the backend of a lost connection ended, if its server lives: it does not see by itself that its client is gone, and
// has a transaction or a lock. What runs again elsewhere does not wait for that.
func (g *Server) endOrphan(d Doubt) {
	g.backends.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), orphanMax)
		defer cancel()
		g.cfg.Sites.End(ctx, d)
	})
}

// resolve learns what became of a commit whose answer was lost.
func (s *session) resolve(ctx context.Context, l *loss, d Doubt) error {
	if len(d.LTXID) == 0 { // It was asked for its id, and had none.
		s.g.endOrphan(d)
		return s.committed(l, d)
	}
	asking, cancel := context.WithTimeout(ctx, s.g.lim().HoldMax)
	defer cancel()
	fate, err := s.g.cfg.Sites.Fate(asking, d)
	why := l.cause
	if err != nil {
		fate, why = Unknown, fmt.Sprintf("%s: %v", l.cause, err)
	}
	s.g.cfg.Log.Info("the fate of a transaction was asked for", "site", l.target.name(), "ltxid", fmt.Sprintf("%x", d.LTXID), "fate", int(fate), "error", err)
	switch fate {
	case Committed:
		return s.committed(l, d)
	case Aborted:
		s.mu.Lock()
		status, delivered := s.flight.status, s.w.Sent() > s.flight.base
		torn := s.flight.torn
		replay := s.replays && s.flight.replayable(time.Now())
		s.mu.Unlock()
		if l.pinned != "" {
			return lost(l.target, l.pinned, why+" Its transaction was rolled back.")
		}
		if (status == pgwire.Idle || replay) && !delivered && !torn && s.mayRunAgain() {
			return s.runAgain()
		}
		return s.enterLimbo(errRolledBack(l.target, why), false)
	}
	return errUnknown(d.Target, d.LTXID, why)
}

// committed gives the client the rest of its answer. The server's part of it, which waits in w, stands.
func (s *session) committed(l *loss, d Doubt) error {
	rest, ok := settle(l.sent)
	if !ok {
		return errUnknown(d.Target, d.LTXID, "It was committed, and what it has returned is lost. "+l.cause)
	}
	if err := s.w.Write(rest); err != nil {
		return errGone
	}
	s.mu.Lock()
	s.flight.ready(pgwire.Idle, s.w.Total())
	s.last = l.target.Site
	s.sawUntilLoss(s.last, false) // once more: it may have become visible only now
	changed := s.probe
	s.unsettled, s.portal = false, nil
	clear(s.portals)
	left := slices.Clone(s.flight.unanswered())
	s.unname(0)
	s.flight.forget()
	s.mu.Unlock()
	if changed {
		return errSettings(l)
	}
	if l.pinned != "" {
		return lost(l.target, l.pinned, l.cause+" Its transaction was committed.")
	}
	s.handleAgain(left)
	return s.flushed()
}

// errSettings ends a session whose transaction was committed.
func errSettings(l *loss) error {
	return fatalError(codeShutdown, "the session cannot go on elsewhere: its transaction was committed, but what it has set is not known",
		"The server of "+l.target.name()+" was lost. "+l.cause, "connect again")
}

func (s *session) flushed() error {
	if s.w.Flush() != nil {
		return errGone
	}
	return nil
}

// rerunsMax is how often the same is run again. What takes its server down with it must not take all of them down.
const rerunsMax = 2

// mayRunAgain counts.
func (s *session) mayRunAgain() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reruns++
	return s.reruns <= rerunsMax
}

// runAgain lets all that the client has sent since its transaction began be handled again. The client does not see the answers
// that it has had.
func (s *session) runAgain() error {
	s.mu.Lock()
	f := &s.flight
	if !s.w.CutBack(f.base) {
		s.mu.Unlock()
		return errGone
	}
	left := slices.Clone(f.log)
	s.unname(0)
	if f.answered >= f.hidden { // else it is what was to come again the last time
		f.sums = f.sums[:0]
		for _, seg := range f.segments[:f.answered] {
			f.sums = append(f.sums, seg.sum)
		}
		f.hidden, f.seen = f.answered, len(f.log)-len(f.unanswered())
	}
	f.forget()
	f.status, f.xid = pgwire.Idle, 0
	f.base = s.w.Total()
	s.forgetTransaction()
	s.mu.Unlock()
	s.handleAgain(left)
	return nil
}

// forgetTransaction forgets what a transaction has done to the session: its server is lost, so that it has done nothing. mu is held.
func (s *session) forgetTransaction() {
	s.probe, s.unsettled, s.portal = false, false, nil
	clear(s.portals)
}

// enterLimbo answers what the client has sent without an answer, and what it sends until its transaction is over.
func (s *session) enterLimbo(owed *pgwire.Error, block bool) error {
	s.mu.Lock()
	f := &s.flight
	if s.w.Sent() <= f.base {
		s.w.CutBack(f.base)
	}
	if f.hidden > 0 {
		// What the client has had the answers of is not answered again.
		f.log = append(f.log, s.stopHandlingAgain()...)
		f.segments, f.answered = []segment{{start: f.seen}}, 0
	}
	under := f.outstanding()
	if f.torn && len(under) > 1 {
		s.mu.Unlock()
		return errRolledBackForGood(owed)
	}
	s.limbo = newLimbo(owed, block, s.statements)
	at := len(f.log)
	var left []byte
	if len(under) > 0 {
		at = min(at, under[0].start)
		if left = slices.Clone(f.log[at:]); f.torn {
			// What was sent is not there any more, but only how it ends matters.
			s.limbo.skip, left = true, nil
			if under[0].ended {
				left = pgwire.AppendHeader(nil, pgwire.Sync, 0)
				s.limbo.block = block && under[0].does != commits && under[0].does != rollsBack
			}
			if s.w.Write(s.limbo.refuse()) != nil {
				s.mu.Unlock()
				return errGone
			}
		}
	}
	s.unname(at)
	s.forgetTransaction()
	f.forget()
	f.xid, f.hidden = 0, 0
	s.mu.Unlock()
	s.handleAgain(left)
	return s.flushed()
}

// errRolledBackForGood ends a session that has sent more than can be answered one by one.
func errRolledBackForGood(owed *pgwire.Error) error {
	e := &pgwire.Error{Code: codeInFailed, Message: "the server was lost"}
	if owed != nil {
		e = owed
	}
	return fatalError(codeLost, e.Message, e.Detail, "connect again")
}

// handleAgain puts messages before those that the client sends now.
func (s *session) handleAgain(messages []byte) {
	messages = append(messages, s.stopHandlingAgain()...) // what is left of the last time
	s.rerun = bytes.NewReader(messages)
	s.r = pgwire.NewReader(s.rerun)
	if len(messages) == 0 {
		s.handledAgain()
	}
}

// stopHandlingAgain gives what is to be handled again and was not yet.
func (s *session) stopHandlingAgain() []byte {
	if s.rerun == nil {
		return nil
	}
	rest := make([]byte, s.rerun.Len()+s.r.Buffered()-s.r.Left())
	_, _ = s.rerun.ReadAt(rest, s.rerun.Size()-int64(len(rest))) // memory
	s.handledAgain()
	return rest
}

// handledAgain goes back to what the client sends.
func (s *session) handledAgain() {
	s.r.Drop()
	s.r, s.rerun = s.client, nil
}

// record keeps the message at hand, so that it can be handled again.
func (s *session) record(typ byte) error {
	if !s.keeps() || typ == pgwire.Terminate || typ == pgwire.CopyData || typ == pgwire.CopyDone || typ == pgwire.CopyFail {
		return nil
	}
	var body []byte
	long := s.r.Left() > recordMax
	if !long {
		var err error
		if body, err = s.r.Peek(s.r.Left()); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flight.record(typ, body, long)
	return nil
}

// inLimbo answers a message in the place of a server.
func (s *session) inLimbo(typ byte) error {
	body, err := s.r.Body(textMax)
	if err != nil && !errors.Is(err, pgwire.ErrTooLong) {
		return err
	}
	does := opaque
	switch typ {
	case pgwire.Query:
		if sql, err := pgwire.ParseQuery(body); err == nil && body != nil {
			does = s.look(sql).does
		}
	case pgwire.Parse:
		if p, err := pgwire.ParseParse(body); err == nil && body != nil {
			does = s.look(p.SQL).does
		}
	}
	out, over := s.limbo.answer(typ, body, does)
	if err := s.w.Write(out); err != nil {
		return errGone
	}
	s.mu.Lock()
	s.flight.status = pgwire.InFailed
	if over {
		s.limbo = nil
		s.flight.status = pgwire.Idle
	}
	s.flight.base = s.w.Total()
	s.mu.Unlock()
	if typ == pgwire.Query || typ == pgwire.Sync || typ == pgwire.Flush || typ == pgwire.FunctionCall {
		return s.flushed()
	}
	return nil
}
