package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/duri-io/duri/pgwire"
)

// What a session in TransactionMode does with each message of its client.

// textMax is the longest SQL text that is held to be looked through, and the longest prepared statement that can be moved.
const textMax = 1 << 20

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
	escapes, odd, foreign := false, false, false
	for _, p := range s.told {
		switch p.Name {
		case "standard_conforming_strings":
			escapes = p.Value == "off"
		case "client_encoding":
			foreign = p.Value != "UTF8" && p.Value != "SQL_ASCII"
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
	if foreign && t.seems && namesBeyondASCII(sql, escapes) {
		t.does, t.seems = writes, false
	}
	if odd && bytes.IndexByte(sql, '\\') >= 0 {
		t.probe, t.dirty, t.deallocate = true, true, ""
		if escapes || bytes.Contains(sql, []byte("E'")) || bytes.Contains(sql, []byte("e'")) { // then one may hide where a string ends
			t.does, t.seems = tangled, false
		}
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
