package gateway

import (
	"encoding/binary"

	"github.com/duri-io/duri/pgwire"
)

// A writing statement outside a transaction does not commit before the gateway holds its result, and each transaction that may
// have written carries a mark in its WAL when it commits (duri.mark). When the answer to the commit is lost, there is one bit
// left to learn, and the mark is what to ask for (design: gateway, sections 5.1 and 8).

// await sends scratch, whose answer q takes, and waits for it. mu is held.
func (s *session) await(b *backend, q *question) error {
	b.atRest = false
	_ = b.w.Write(s.scratch)
	_ = b.w.Flush() // Its goroutine sees what is wrong with the connection.
	for !q.done && s.b == b {
		s.changed.Wait()
	}
	if s.b != b {
		return errStale
	}
	return nil
}

// until flushes, and waits until the server has answered all that it was sent (unanswered), or all that came before the segment at
// hand (unsettled), or waits itself for data of a COPY or for a Sync; false: it is lost.
func (s *session) until(b *backend, w want) bool {
	_ = b.w.Flush()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wants = w
	for s.b == b && !s.satisfied(b) {
		s.changed.Wait()
	}
	s.wants = nothing
	return s.b == b
}

// want is what the session's goroutine waits for.
type want byte

const (
	nothing want = iota
	unanswered
	unsettled
)

// satisfied reports that what the session's goroutine waits for is there. mu is held.
func (s *session) satisfied(b *backend) bool {
	return b.line.data || b.line.skips || s.wants == unanswered && b.line.empty() || s.wants == unsettled && s.flight.settled()
}

// tell wakes the session's goroutine when what it waits for is there: not with each answer on the way there. mu is held, by the
// backend's goroutine.
func (s *session) tell(b *backend) {
	if s.wants != nothing && s.satisfied(b) {
		s.changed.Broadcast()
	}
	s.carryOn(b)
}

// commitment is what is sent as soon as a mark is answered. When the client has nothing more to say meanwhile, the session's goroutine
// leaves that to the backend's, which need not wake it.
type commitment struct {
	id      []byte // of the mark; none: nothing was left
	e       expected
	message []byte
}

// carryOn does what was left to do once the mark is answered. mu is held.
func (s *session) carryOn(b *backend) {
	if s.due.id == nil || s.writing || s.b != b || !b.line.empty() && !b.line.data && !b.line.skips {
		return
	}
	due := s.due
	s.due = commitment{}
	s.commit(b, due)
	_ = b.w.Flush() // its goroutine sees what is wrong with the connection
	s.changed.Broadcast()
}

// commit sends what commits a transaction whose mark is answered, or ends it if that went wrong. mu is held.
func (s *session) commit(b *backend, c commitment) {
	s.marked(c.id)
	if c.message == nil {
		return
	}
	if b.line.skips && c.e.kind != 'S' { // No Sync of the client is to come.
		b.line.push(expected{kind: 'y'})
		_ = b.w.Write(syncMessage)
		c.e = expected{kind: 'z'} // The client has the error of the mark, and no use for the tag of a ROLLBACK.
	}
	s.pushed(b, c.e)
	_ = b.w.Write(c.message)
}

var syncMessage = pgwire.AppendHeader(nil, pgwire.Sync, 0)

// finish waits until what was left to the backend's goroutine is done, or the backend is lost.
func (s *session) finish() {
	if !s.left {
		return
	}
	s.endBurst()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.due.id != nil && s.b != nil {
		s.changed.Wait()
	}
	s.due, s.left = commitment{}, false
}

// standing gives the status in which the next statement will run, and waits for answers if it depends on them.
func (s *session) standing(b *backend) (status byte, err error) {
	s.mu.Lock()
	status, ok := s.flight.certain()
	s.mu.Unlock()
	if ok {
		return status, nil
	}
	if !s.until(b, unsettled) {
		return 0, s.goneOr()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flight.status, nil
}

// goneOr is what ends the handling of a message when there is no backend any more.
func (s *session) goneOr() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.loss != nil {
		return errLoss
	}
	return errGone
}

// appendBind appends the Bind of an unnamed portal to a statement of the gateway's own. Its parameters are in binary format.
func appendBind(dst []byte, statement string, params ...[]byte) []byte {
	n := 1 + len(statement) + 1 + 2 + 2 + 2 + 2
	for _, p := range params {
		n += 4 + len(p)
	}
	dst = pgwire.AppendHeader(dst, pgwire.Bind, n)
	dst = append(append(append(dst, 0), statement...), 0)
	dst = append(dst, 0, 1, 0, 1) // all of them are binary
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(params)))
	for _, p := range params {
		dst = append(binary.BigEndian.AppendUint32(dst, uint32(len(p))), p...)
	}
	return append(dst, 0, 0)
}

// appendExecute appends the Execute of the unnamed portal.
func appendExecute(dst []byte) []byte {
	return append(pgwire.AppendHeader(dst, pgwire.Execute, 5), 0, 0, 0, 0, 0)
}

// mark has the server mark the transaction, if it has written, as the last thing before it commits, and then commits it by a message
// whose answer is e; without one the caller does, and the mark is answered when mark returns. first is what comes before the mark.
func (s *session) mark(b *backend, first []byte, e expected, message []byte) error {
	s.mu.Lock()
	if b.line.skips { // It would pass over the mark as well. Nothing is committed.
		if message != nil {
			s.pushed(b, e)
		}
		s.mu.Unlock()
		_ = b.w.Write(append(first, message...))
		return nil
	}
	c := commitment{s.newLTXID(), e, message}
	s.flight.xid, s.flight.failed = 0, false
	b.line.push(expected{kind: 'b'})
	b.line.push(expected{kind: 'm'})
	s.sending(b)
	s.scratch = pgwire.AppendHeader(appendExecute(appendBind(first, markStatement, c.id, []byte(b.standbys))), pgwire.Flush, 0)
	if s.left = message != nil && s.rerun == nil && !s.r.Complete(); s.left {
		s.due = c // before the server can answer
	}
	s.mu.Unlock()
	_ = b.w.Write(s.scratch)
	if s.left {
		return nil
	}
	if !s.until(b, unanswered) {
		return s.goneOr()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.commit(b, c)
	return nil
}

// marked takes note of the answer to a mark. mu is held.
func (s *session) marked(id []byte) {
	seg := s.flight.open()
	seg.split = true
	if s.flight.failed {
		return // The server commits nothing.
	}
	seg.committing = true
	if s.flight.xid != 0 { // else there is nothing to commit
		seg.ltxid = id
	}
}

// commitSync sends the Sync of a segment that writes outside a transaction, once its results are there.
func (s *session) commitSync(b *backend, first []byte) error {
	return s.mark(b, first, expected{kind: 'S'}, syncMessage)
}

// commitQuery sends a Query of one writing statement outside a transaction as messages of the extended protocol, which let it
// commit apart from its result. The client sees no difference.
func (s *session) commitQuery(b *backend, sql []byte) error {
	s.mu.Lock()
	s.forgetUnnamed(b)
	s.flight.simple = true
	for _, kind := range []byte("pbuE") {
		b.line.push(expected{kind: kind})
	}
	m := pgwire.AppendParse(s.scratch[:0], "", sql, []byte{0, 0})
	m = appendExecute(pgwire.AppendTarget(appendBind(m, ""), pgwire.Describe, 'P', ""))
	s.mu.Unlock()
	return s.commitSync(b, m)
}

// commitWrapped sends a Query of several statements, or of one that the extended protocol would show in another way, outside a
// transaction: in a block of the gateway's own.
func (s *session) commitWrapped(b *backend, body []byte) error {
	s.mu.Lock()
	s.forgetUnnamed(b)
	s.flight.simple = true
	b.line.push(expected{kind: 'q'})
	b.line.push(expected{kind: 'w'})
	s.sending(b)
	s.flight.open().split = true
	s.scratch = pgwire.AppendHeader(pgwire.AppendQuery(s.scratch[:0], "BEGIN"), pgwire.Query, len(body))
	s.mu.Unlock()
	_ = b.w.Write(s.scratch)
	_ = b.w.Write(body)
	if !s.until(b, unanswered) {
		return s.goneOr()
	}
	s.mu.Lock()
	failed := b.status == pgwire.InFailed
	s.mu.Unlock()
	if failed {
		s.push(b, expected{kind: 'z'})
		_ = b.w.Write(rollbackMessage)
		return nil
	}
	return s.mark(b, nil, expected{kind: 'z'}, commitMessage)
}

var commitMessage, rollbackMessage = pgwire.AppendQuery(nil, "COMMIT"), pgwire.AppendQuery(nil, "ROLLBACK")

// forgetUnnamed: a Query takes the unnamed statement away. mu is held.
func (s *session) forgetUnnamed(b *backend) {
	delete(s.statements, "")
	b.known.unnamed = preparation{}
}

// splits reports that what the segment at hand has sent is to commit apart from its results.
func (s *session) splits(b *backend) (bool, error) {
	s.mu.Lock()
	does := s.flight.open().does
	able := b.marking == marks
	s.mu.Unlock()
	if does != writes && does != batch || !able {
		return false, nil
	}
	status, err := s.standing(b)
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.line.skips {
		s.flight.open().split = true // Nothing of it takes effect.
	}
	// In a COPY the server refuses it, in its own words, and behind an error it passes over it.
	return status == pgwire.Idle && err == nil && !b.line.data && !b.line.skips, err
}

// readyToCommit waits for the answers to all that comes before a COMMIT, and says whether the open transaction is to be marked: it may
// have written.
func (s *session) readyToCommit(b *backend) (marked bool, err error) {
	if !s.keeps() {
		return false, nil
	}
	s.mu.Lock()
	settled := s.flight.settled()
	s.mu.Unlock()
	if !settled && !s.until(b, unsettled) {
		return false, s.goneOr()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	wrote := s.flight.wrote()
	if b.line.skips || b.line.data || s.flight.status != pgwire.InBlock && !s.flight.open().began { // nothing is committed
		return false, nil
	}
	if !wrote || b.marking != marks {
		seg := s.flight.open()
		seg.committing, seg.unmarked = true, wrote
		return false, nil
	}
	return true, nil
}
