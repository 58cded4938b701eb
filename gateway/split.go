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

// tell wakes the session's goroutine when what it waits for is there: not with each answer on the way there. mu is held.
func (s *session) tell(b *backend) {
	if s.wants != nothing && s.satisfied(b) {
		s.changed.Broadcast()
	}
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

// mark has the server mark the transaction, if it has written, as the last thing before it commits, and waits for the answers to
// all that was sent; first is what comes before the mark. Behind it only the commit is sent.
func (s *session) mark(b *backend, first []byte) error {
	s.mu.Lock()
	if b.line.skips { // It would pass over the mark as well. Nothing is committed.
		s.mu.Unlock()
		_ = b.w.Write(first)
		return nil
	}
	id := s.newLTXID()
	s.flight.xid, s.flight.failed = 0, false
	b.line.push(expected{kind: 'b'})
	b.line.push(expected{kind: 'm'})
	s.sending(b)
	s.scratch = pgwire.AppendHeader(appendExecute(appendBind(first, markStatement, id, []byte(b.standbys))), pgwire.Flush, 0)
	s.mu.Unlock()
	_ = b.w.Write(s.scratch)
	if !s.until(b, unanswered) {
		return s.goneOr()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	seg := s.flight.open()
	seg.split = true
	if s.flight.failed {
		return nil // The server commits nothing.
	}
	seg.committing = true
	if s.flight.xid != 0 { // else there is nothing to commit
		seg.ltxid = id
	}
	return nil
}

// resume lets a server go on that passes over everything because a mark has failed, where no Sync of the client is to come.
func (s *session) resume(b *backend) (failed bool) {
	s.mu.Lock()
	failed = b.line.skips && s.flight.open().split
	if failed {
		b.line.push(expected{kind: 'y'})
		s.sending(b)
	}
	s.mu.Unlock()
	if failed {
		_ = b.w.Write(pgwire.AppendHeader(s.scratch[:0], pgwire.Sync, 0))
	}
	return failed
}

// commitSync sends the Sync of a segment that writes outside a transaction, once its results are there.
func (s *session) commitSync(b *backend, first []byte) error {
	if err := s.mark(b, first); err != nil {
		return err
	}
	s.push(b, expected{kind: 'S'})
	_ = b.w.Write(pgwire.AppendHeader(s.scratch[:0], pgwire.Sync, 0))
	return nil
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
	end := "ROLLBACK"
	if !failed {
		if err := s.mark(b, s.scratch[:0]); err != nil {
			return err
		}
		s.resume(b)
		end = "COMMIT" // which is a ROLLBACK if the mark has failed
	}
	s.push(b, expected{kind: 'z'})
	s.scratch = pgwire.AppendQuery(s.scratch[:0], end)
	_ = b.w.Write(s.scratch)
	return nil
}

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

// beforeCommit marks the open transaction before a COMMIT, if it may have written.
func (s *session) beforeCommit(b *backend) error {
	if !s.keeps() {
		return nil
	}
	s.mu.Lock()
	settled := s.flight.settled()
	s.mu.Unlock()
	if !settled && !s.until(b, unsettled) {
		return s.goneOr()
	}
	s.mu.Lock()
	wrote := s.flight.wrote()
	if b.line.skips || b.line.data || s.flight.status != pgwire.InBlock && !s.flight.open().began { // nothing is committed
		s.mu.Unlock()
		return nil
	}
	if !wrote || b.marking != marks {
		seg := s.flight.open()
		seg.committing, seg.unmarked = true, wrote
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	return s.mark(b, s.scratch[:0])
}
