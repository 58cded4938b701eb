package gateway

import (
	"bytes"
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
	scratch []byte
	longs   int // prepared statements that were too long to be held
}

// textMax is the longest SQL text that is held to be looked through, and the longest prepared statement that can be moved.
const textMax = 1 << 20

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
	b, err := s.fetch(ctx)
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
// now, so that the client waits for one, no longer than HoldMax.
func (s *session) fetchPatiently(ctx context.Context) (*backend, error) {
	deadline := time.Now().Add(s.g.lim().HoldMax)
	waited := func(*backend) {}
	for first := true; ; first = false {
		b, err := s.fetch(ctx)
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

// catchUp waits until the session sees at b's site what it has seen at the one before. It does not go on with less.
func (s *session) catchUp(ctx context.Context, b *backend) error {
	from, to := s.last, b.target.Site
	if s.g.cfg.Reads != nil {
		from = s.seen.site
	}
	if !s.keeps() || from == "" || from == to {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.g.lim().HoldMax)
	defer cancel()
	var err error
	if s.g.cfg.Reads != nil {
		err = s.g.crossing(s.who.Database, from, b.target).wait(ctx, s.g, s.seen.at)
	} else {
		err = s.g.cfg.Sites.CatchUp(ctx, s.who.Database, from, to)
	}
	if err == nil {
		return nil
	}
	b.pool.put(b)
	return fatalError(codeNoSite, fmt.Sprintf("site %s does not have yet what this session has seen at site %s", to, from), err.Error(), "connect again")
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

// sendAll hands on what the client sends, until it leaves; an error is for the client.
func (s *session) sendAll(ctx context.Context) error {
	for {
		typ, err := s.next()
		if err == nil && typ == pgwire.Terminate {
			s.endBurst() // What came before it is carried out.
			return nil
		}
		if err == nil {
			err = s.handle(ctx, typ)
		}
		if errors.Is(err, errLoss) {
			err = s.wake(ctx)
		}
		if errors.Is(err, errGone) {
			return nil
		}
		if errors.Is(err, errMoved) {
			return err
		}
		if err != nil {
			return s.readError(err)
		}
	}
}

// next waits for the client's next message, or for the loss of the server.
func (s *session) next() (typ byte, err error) {
	for s.rerun != nil {
		if !s.r.Complete() {
			s.endBurst()
		}
		if typ, _, err = s.r.Next(pgwire.FromClient); err == nil {
			return typ, nil
		}
		s.handledAgain() // They are at their end.
	}
	if s.r.Complete() {
		typ, _, err = s.r.Next(pgwire.FromClient)
		return typ, err
	}
	s.endBurst()
	if !s.park() {
		return 0, errLoss
	}
	typ, _, err = s.r.Next(pgwire.FromClient)
	if s.unpark() && err != nil {
		err = errLoss
	}
	return typ, err
}

// errGone means that the client knows, or has gone itself.
var errGone = errors.New("the session has ended")

// handle sends one message to the server. The connection to a server that breaks is the concern of the backend's
// goroutine, so errors of writing to it are not looked at here.
func (s *session) handle(ctx context.Context, typ byte) error {
	s.finish()
	if s.limbo != nil {
		return s.inLimbo(typ)
	}
	if err := s.record(typ); err != nil {
		return err
	}
	switch typ {
	case pgwire.Query:
		return s.query(ctx)
	case pgwire.Parse:
		return s.parse(ctx)
	case pgwire.Bind:
		return s.bind(ctx)
	case pgwire.Describe, pgwire.Close:
		return s.target(ctx, typ)
	case pgwire.CopyData, pgwire.CopyDone, pgwire.CopyFail:
		return s.copyIn(typ)
	}
	var t text
	if typ == pgwire.FunctionCall {
		t = text{probe: true, dirty: true, does: opaque}
	}
	b, err := s.borrow(ctx, t)
	if err != nil {
		return err
	}
	e := expected{kind: typ} // Execute, Sync, FunctionCall; Flush has no answer
	switch typ {
	case pgwire.Flush:
		if err := s.pass(b); err != nil {
			return err
		}
		s.flushHeld(b)
		return nil
	case pgwire.Execute:
		e.commits = s.executes(commits)
	case pgwire.Sync:
		if split, err := s.splits(b); err != nil {
			return err
		} else if split {
			return s.commitSync(b, s.scratch[:0])
		}
	}
	s.push(b, e)
	return s.pass(b)
}

// executes reports whether the Execute at hand runs a statement that does something.
func (s *session) executes(what deed) bool {
	if !s.keeps() {
		return false
	}
	body, err := s.r.Peek(min(s.r.Left(), 256))
	if err != nil {
		return false
	}
	portal, _, err := pgwire.ParseExecute(body)
	if err != nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.portal
	if len(portal) > 0 {
		st = s.portals[string(portal)]
	}
	return st != nil && s.effectsOf(st).does == what
}

// pass forwards the current message; what is wrong with the client's side of it shows.
func (s *session) pass(b *backend) error {
	_ = s.r.Forward(b.w) // The next read tells if it was the client's connection that broke.
	return nil
}

func (s *session) push(b *backend, e ...expected) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pushed(b, e...)
}

// pushed is push for those who hold mu.
func (s *session) pushed(b *backend, e ...expected) {
	for _, e := range e {
		b.line.push(e)
	}
	s.sending(b)
	if k := e[len(e)-1].kind; s.keeps() && (k == 'Q' || k == 'F' || k == 'S' || k == 'z') {
		s.flight.open().closed = true
	}
}

// sending notes that something of the client's is sent. mu is held.
func (s *session) sending(b *backend) {
	b.atRest = false
	if s.keeps() {
		s.flight.open().sent = true
	}
}

// query sends a Query.
func (s *session) query(ctx context.Context) error {
	body, err := s.r.Body(textMax)
	if errors.Is(err, pgwire.ErrTooLong) {
		b, err := s.borrow(ctx, text{probe: true, dirty: true, does: tangled}) // nothing is known of it
		if err != nil {
			return err
		}
		s.push(b, expected{kind: 'Q'})
		return s.pass(b)
	}
	if err != nil {
		return err
	}
	sql, err := pgwire.ParseQuery(body)
	if err != nil {
		return err
	}
	t := s.look(sql)
	t.roams = t.roams && s.wholeRead(pgwire.Query, nil)
	b, err := s.borrow(ctx, t)
	if err != nil {
		return err
	}
	s.mu.Lock()
	mixed := s.keeps() && s.flight.open().sent // behind messages without a Sync, whose error would let the server pass over it
	s.mu.Unlock()
	switch split, err := s.splits(b); {
	case err != nil:
		return err
	case mixed:
	case split && t.does == writes:
		return s.commitQuery(b, sql)
	case split:
		return s.commitWrapped(b, body)
	}
	e := expected{kind: 'Q', commits: t.does == commits}
	if t.does == commits {
		mark, err := s.readyToCommit(b)
		if err != nil {
			return err
		}
		if mark {
			s.mu.Lock()
			s.forgetUnnamed(b)
			s.mu.Unlock()
			return s.mark(b, s.scratch[:0], e, append(pgwire.AppendHeader(nil, pgwire.Query, len(body)), body...))
		}
	}
	var first []byte // what is sent in the place of the Query
	s.mu.Lock()
	if st := s.statements[t.deallocate]; t.deallocate != "" && st != nil {
		// It exists under this name here only. The server drops an empty one that it is given for the purpose.
		s.rename(t.deallocate, nil)
		first = pgwire.AppendTarget(s.scratch[:0], pgwire.Close, 'S', goneStatement) // perhaps left by one that failed
		first = pgwire.AppendParse(first, goneStatement, nil, []byte{0, 0})
		first = pgwire.AppendQuery(first, "DEALLOCATE "+goneStatement)
		b.line.push(expected{kind: 'c'})
		b.line.push(expected{kind: 'p'})
		s.scratch = first
	}
	s.forgetUnnamed(b)
	s.mu.Unlock()
	s.push(b, e)
	if first != nil {
		_ = b.w.Write(first)
		return nil
	}
	s.scratch = pgwire.AppendHeader(s.scratch[:0], pgwire.Query, len(body))
	_ = b.w.Write(s.scratch)
	_ = b.w.Write(body)
	return nil
}

// tooLong is what is known of a prepared statement that is too long to be held: it cannot be prepared elsewhere.
var tooLong = text{probe: true, dirty: true, does: opaque, pin: "a prepared statement of more than 1 MB"}

// look reads a text. Where characters may hold a byte that looks like a quote's or backslash's, nothing is known.
func (s *session) look(sql []byte) text {
	s.mu.Lock()
	escapes, odd := false, false
	for _, p := range s.told {
		switch p.Name {
		case "standard_conforming_strings":
			escapes = p.Value == "off"
		case "client_encoding":
			switch p.Value {
			case "SJIS", "BIG5", "GBK", "UHC", "GB18030", "JOHAB", "SHIFT_JIS_2004":
				odd = true
			}
		}
	}
	s.mu.Unlock()
	t := readText(sql, escapes)
	t.seems, t.escapes = t.does == reads, escapes
	if t.seems && s.keeps() && s.g.mayWrite(s.who.Database, sql, escapes) {
		t.does = writes
	}
	if odd && bytes.IndexByte(sql, '\\') >= 0 {
		t.probe, t.dirty, t.deallocate = true, true, ""
	}
	t.roams = s.g.cfg.Reads != nil && s.lookRoaming(sql, escapes, &t)
	return t
}

// parse sends a Parse, under the statement's name at servers. A server that has one of this name prepares it anew: tables may
// have changed.
func (s *session) parse(ctx context.Context) error {
	body, err := s.r.Body(textMax)
	if errors.Is(err, pgwire.ErrTooLong) {
		return s.parseLong(ctx)
	}
	if err != nil {
		return err
	}
	p, err := pgwire.ParseParse(body)
	if err != nil {
		return err
	}
	s.nameTypes(p.OIDs)
	t := s.look(p.SQL)
	// What it does, it does when it is executed.
	b, err := s.borrow(ctx, text{seq: t.seq, roams: t.roams && s.wholeRead(pgwire.Parse, p.Name)})
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.prepare(b, p, t)
	s.sending(b)
	s.mu.Unlock()
	_ = b.w.Write(s.scratch) // Not under mu, which answers need: the server may take no more before it is rid of them.
	return nil
}

// prepare makes the messages for a Parse.
func (s *session) prepare(b *backend, p pgwire.Statement, effects text) {
	s.scratch = s.scratch[:0]
	st, client := newStatement(p, s.context(), effects), string(p.Name)
	if old := s.statements[client]; old != nil && client != "" {
		// The server refuses to prepare it again, in its own words.
		if old.sql != nil && b.known.find(old) == nil {
			s.inject(b, old)
		}
		s.scratch = pgwire.AppendParse(s.scratch, old.name, p.SQL, p.OIDs)
		b.line.push(expected{kind: 'P'})
		return
	}
	s.rename(client, st)
	st.born = s.g.clock.Add(1)
	s.learn(b, st)
	s.scratch = pgwire.AppendParse(s.scratch, st.name, p.SQL, p.OIDs)
	b.line.push(expected{kind: 'P', st: st, name: client})
}

// parseLong sends a Parse that is too long to be held: the session stays where it is.
func (s *session) parseLong(ctx context.Context) error {
	start, err := s.r.Peek(pgwire.BufferSize)
	if err != nil {
		return err
	}
	end := bytes.IndexByte(start, 0)
	if end < 0 {
		return fatalError(codeUnsupported, "the name of a prepared statement is too long", "", "use a name of up to 63 bytes")
	}
	client := string(start[:end])
	b, err := s.borrow(ctx, tooLong)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.longs++
	// The unnamed one has a name at the server as well: queries of the gateway's own would take it away.
	st := &statement{name: fmt.Sprintf("duri_long_%d_%d", s.id, s.longs), effects: tooLong}
	s.scratch = s.scratch[:0]
	s.learn(b, st)
	s.rename(client, st)
	b.line.push(expected{kind: 'P', st: st, name: client})
	s.sending(b)
	s.scratch = pgwire.AppendHeader(s.scratch, pgwire.Parse, s.r.Left()-end+len(st.name))
	s.scratch = append(s.scratch, st.name...)
	s.mu.Unlock()
	_ = b.w.Write(s.scratch)
	if err := s.r.Discard(end); err != nil {
		return err
	}
	_ = s.r.ForwardRest(b.w)
	return nil
}

// context is what makes statements of the same text differ. In a transaction that has changed settings, nobody else's is
// the same.
func (s *session) context() string {
	if s.unsettled || s.probe {
		s.longs++
		return fmt.Sprintf("session %d of %x, %d", s.id, s.g.incarnation, s.longs) // also in another process that it is handed to
	}
	var c strings.Builder
	for _, p := range s.settings {
		c.WriteString(p.Name + "\x00" + p.Value + "\x00")
	}
	return c.String()
}

// learn notes that the backend is sent a statement, and closes another for it if it has one of the name, or many.
func (s *session) learn(b *backend, st *statement) {
	if gone, p := b.known.add(st, s.g.clock.Load()); p != nil {
		s.scratch = pgwire.AppendTarget(s.scratch, pgwire.Close, 'S', gone)
		b.line.push(expected{kind: 'c', name: gone, gone: p})
	}
}

// inject prepares a statement at the backend.
func (s *session) inject(b *backend, st *statement) {
	s.learn(b, st)
	s.scratch = pgwire.AppendParse(s.scratch, st.name, st.sql, st.oids)
	b.line.push(expected{kind: 'p', st: st})
	b.atRest = false
}

// ensure prepares a statement at the backend if it is not there. If the client knows the statement's shape, and that of the
// backend's is not known, it waits until it is; false means that they differ.
func (s *session) ensure(b *backend, st *statement) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := b.known.fresh(st)
	if st.sql == nil || p != nil && !p.shape.lacks(st.shape) {
		return p == nil || !p.shape.contradicts(st.shape)
	}
	s.scratch = s.scratch[:0]
	if p == nil {
		s.inject(b, st)
		p = b.known.find(st)
	}
	ask := p.shape.lacks(st.shape) && !b.line.skips // What is passed over is not answered.
	if ask {
		s.scratch = pgwire.AppendTarget(s.scratch, pgwire.Describe, 'S', st.name)
		s.scratch = pgwire.AppendHeader(s.scratch, pgwire.Flush, 0)
		b.line.push(expected{kind: 'D', st: st})
		b.atRest = false
		s.comparing = st
	}
	s.mu.Unlock()
	_ = b.w.Write(s.scratch)
	if ask {
		_ = b.w.Flush()
	}
	s.mu.Lock()
	for s.comparing != nil && s.b == b {
		s.changed.Wait()
	}
	s.comparing = nil
	// An error before it may have taken the statement away; then the server passes over what is sent now.
	p = b.known.find(st)
	return p == nil || !p.shape.contradicts(st.shape)
}

// compared wakes who waits for a statement's shape.
func (s *session) compared(st *statement) {
	if s.comparing == st {
		s.comparing = nil
		s.changed.Broadcast()
	}
}

// undo takes back what a message did that the server did not carry out.
func (s *session) undo(e expected) {
	switch e.kind {
	case 'P', 'p':
		if e.st != nil {
			s.b.known.drop(e.st)
		}
		if e.st != nil && e.kind != 'p' && s.statements[e.name] == e.st {
			delete(s.statements, e.name)
		}
	case 'c':
		if e.gone != nil {
			s.b.known.restore(e.name, e.gone)
		}
	case 'D':
		s.compared(e.st)
	case 'C':
		if e.st != nil && s.statements[e.name] == nil {
			s.statements[e.name] = e.st
		}
	}
}

// bind sends a Bind, with the statement's name at servers.
func (s *session) bind(ctx context.Context) error {
	const likely = 256
	start, err := s.r.Peek(likely)
	if err != nil {
		return err
	}
	portal, client, length, ok := pgwire.ParseBind(start)
	if !ok {
		if start, err = s.r.Peek(pgwire.BufferSize); err != nil {
			return err
		}
		if portal, client, length, ok = pgwire.ParseBind(start); !ok {
			return fatalError(codeUnsupported, "the names in a Bind are too long", "", "use names of up to 63 bytes")
		}
	}
	s.mu.Lock()
	st := s.statements[string(client)]
	s.mu.Unlock()
	var t text
	if st != nil {
		t = s.effectsOf(st)
		t.roams = t.roams && s.wholeRead(pgwire.Bind, nil)
	}
	b, err := s.borrow(ctx, t)
	if err != nil {
		return err
	}
	if t.does == commits {
		mark, err := s.readyToCommit(b)
		if mark {
			err = s.mark(b, s.scratch[:0], expected{}, nil)
		}
		if err != nil {
			return err
		}
	}
	e := expected{kind: 'B'}
	name := noStatement // The server says in its own words that it does not exist.
	switch {
	case st == nil:
		e.missing, e.name = true, string(client)
	case s.ensure(b, st):
		name = st.name
	default:
		e.changed = true
	}
	s.mu.Lock()
	if len(portal) == 0 {
		s.portal = st
	} else {
		s.portals[string(portal)] = st
	}
	s.scratch = pgwire.AppendHeader(s.scratch[:0], pgwire.Bind, s.r.Left()-len(client)+len(name))
	s.scratch = append(append(s.scratch, portal...), 0)
	s.scratch = append(append(s.scratch, name...), 0)
	b.line.push(e)
	s.sending(b)
	s.mu.Unlock()
	_ = b.w.Write(s.scratch)
	if err := s.r.Discard(length); err != nil {
		return err
	}
	_ = s.r.ForwardRest(b.w)
	return nil
}

// target sends a Describe or Close.
func (s *session) target(ctx context.Context, typ byte) error {
	body, err := s.r.Body(pgwire.BufferSize)
	if err != nil {
		return err
	}
	kind, client, err := pgwire.ParseTarget(body)
	if err != nil {
		return err
	}
	b, err := s.borrow(ctx, text{})
	if err != nil {
		return err
	}
	name := string(client)
	s.mu.Lock()
	st := s.statements[name]
	s.mu.Unlock()
	e := expected{kind: 'C'}
	switch {
	case kind == 'S' && typ == pgwire.Close:
		// At servers it stays, for others. To close one that is not there is no error.
		e = expected{kind: 'C', st: st, name: name}
		name = noStatement
	case kind == 'S':
		e = expected{kind: 'T', st: st, changed: st != nil, missing: st == nil, name: name}
		if name = noStatement; st != nil && s.ensure(b, st) {
			e.changed, name = false, st.name
		}
	case typ == pgwire.Describe:
		e = expected{kind: 'O', st: s.portals[name]}
		if name == "" {
			e.st = s.portal
		}
	}
	s.mu.Lock()
	if e.kind == 'C' && e.st != nil {
		s.rename(e.name, nil)
	}
	e.commits = e.kind != 'C' && e.st != nil && e.st.effects.does == commits
	b.line.push(e)
	s.sending(b)
	s.mu.Unlock()
	s.scratch = pgwire.AppendTarget(s.scratch[:0], typ, kind, name)
	_ = b.w.Write(s.scratch)
	return nil
}

// copyIn sends data of a COPY. Without a backend there is no COPY: it has failed while the client was sending.
func (s *session) copyIn(typ byte) error {
	s.mu.Lock()
	b := s.b
	if s.loss != nil {
		s.flight.torn = true // These data are not sent again: a client need not wait until it is asked for them.
		s.mu.Unlock()
		return errLoss
	}
	if b == nil || b.asking.Load() != nil {
		s.mu.Unlock()
		return nil
	}
	if s.keeps() && len(s.flight.segments) > 0 {
		s.flight.torn = true
		s.flight.segments[len(s.flight.segments)-1].fed = typ != pgwire.CopyData
	}
	s.writing = true
	kind := byte('x')
	if typ == pgwire.CopyData {
		kind = 'd'
	}
	b.line.push(expected{kind: kind})
	s.mu.Unlock()
	return s.pass(b)
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
			err = s.catchUp(ctx, b)
		}
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
