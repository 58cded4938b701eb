package gateway

import (
	"crypto/rand"
	"encoding/binary"
	"strconv"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// A writing statement outside a transaction does not commit before the gateway holds its result, and each transaction that may
// have written carries a mark in its WAL when it commits (duri.mark). When the answer to the commit is lost, there is one bit
// left to learn, and the mark is what to ask for (design: gateway, sections 5.1 and 8).

// markStatement is one of the gateway's own that a backend has prepared: it marks a transaction that has written, and gives its id.
const (
	markStatement = "duri_mark"
	startedSQL    = "SELECT extract(epoch FROM backend_start) FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid()"
	markSQL       = "SELECT pg_catalog.pg_current_xact_id_if_assigned(), duri.mark($1)"
)

// marking is whether a backend can mark transactions.
type marking byte

const (
	untried marking = iota
	marks
	marksNot // the database has no function duri.mark: a lost answer to a commit stays open
)

// ltxidLen is the length of a mark: hour, incarnation of the gateway, session and random bits of it, transaction.
const ltxidLen = 4 + 8 + 8 + 8 + 8

// newLTXID names a transaction. The random bits keep clients from forging another's; nothing compares the hour with a clock: it
// is there for partitions by time.
func (s *session) newLTXID() []byte {
	id := make([]byte, 0, ltxidLen)
	id = binary.BigEndian.AppendUint32(id, uint32(time.Now().Unix()/3600))
	id = binary.BigEndian.AppendUint64(id, s.g.incarnation)
	id = binary.BigEndian.AppendUint64(id, s.id)
	if s.salt == 0 {
		var b [8]byte
		_, _ = rand.Read(b[:]) // It does not fail (crypto/rand).
		s.salt = binary.BigEndian.Uint64(b[:]) | 1
	}
	id = binary.BigEndian.AppendUint64(id, s.salt)
	s.marked++
	return binary.BigEndian.AppendUint64(id, s.marked)
}

// prepareMarks has a backend prepare what marking needs, once. mu is held.
func (s *session) prepareMarks(b *backend) error {
	if !s.keeps() || b.marking != untried {
		return nil
	}
	q := &question{setup: true}
	b.ask(q)
	m := pgwire.AppendParse(s.scratch[:0], markStatement, []byte(markSQL), []byte{0, 1, 0, 0, 0, 17}) // bytea
	m = pgwire.AppendHeader(m, pgwire.Sync, 0)                                                        // whether that went well or not
	m = pgwire.AppendParse(m, "", []byte(startedSQL), []byte{0, 0})
	s.scratch = pgwire.AppendHeader(appendExecute(appendBind(m, "", nil)), pgwire.Sync, 0)
	q.more = 1
	if err := s.await(b, q); err != nil {
		return err
	}
	b.marking = marks
	if len(q.rows) == 1 {
		b.started = q.rows[0][0]
	}
	if q.err != nil {
		b.marking = marksNot
		s.g.cfg.Log.Warn("transactions cannot be marked, so that a lost answer to COMMIT stays open", "site", b.target.name(), "database", s.who.Database, "error", q.err.Message)
	}
	return nil
}

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

// until flushes, and waits until the server has answered enough, or waits itself for data of a COPY or for a Sync; false: it is
// lost.
func (s *session) until(b *backend, enough func() bool) bool {
	_ = b.w.Flush()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wants = true
	for s.b == b && !enough() && !b.line.data && !b.line.skips {
		s.changed.Wait()
	}
	s.wants = false
	return s.b == b
}

// standing gives the status in which the next statement will run, and waits for answers if it depends on them.
func (s *session) standing(b *backend) (status byte, err error) {
	s.mu.Lock()
	status, ok := s.flight.certain()
	s.mu.Unlock()
	if ok {
		return status, nil
	}
	if !s.until(b, s.flight.settled) {
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

// appendBind appends the Bind of an unnamed portal to a statement of the gateway's own.
func appendBind(dst []byte, statement string, binary []byte) []byte {
	n := 1 + len(statement) + 1 + 2 + 2 + 2
	if binary != nil {
		n += 2 + 4 + len(binary)
	}
	dst = pgwire.AppendHeader(dst, pgwire.Bind, n)
	dst = append(append(append(dst, 0), statement...), 0)
	if binary == nil {
		return append(dst, 0, 0, 0, 0, 0, 0)
	}
	dst = append(dst, 0, 1, 0, 1, 0, 1)
	dst = append(dst, byte(len(binary)>>24), byte(len(binary)>>16), byte(len(binary)>>8), byte(len(binary)))
	return append(append(dst, binary...), 0, 0)
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
	s.scratch = pgwire.AppendHeader(appendExecute(appendBind(first, markStatement, id)), pgwire.Flush, 0)
	s.mu.Unlock()
	_ = b.w.Write(s.scratch)
	if !s.until(b, b.line.empty) {
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
	m = appendExecute(pgwire.AppendTarget(appendBind(m, "", nil), pgwire.Describe, 'P', ""))
	s.mu.Unlock()
	return s.commitSync(b, m)
}

// xidOf reads the answer to a mark.
func xidOf(row []byte) uint64 {
	columns, err := pgwire.ParseRow(row)
	if err != nil || len(columns) == 0 {
		return 0
	}
	xid, err := strconv.ParseUint(string(columns[0]), 10, 64)
	if err != nil {
		return 0 // null: there is none
	}
	return xid
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
	if !s.until(b, b.line.empty) {
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
	if !settled && !s.until(b, s.flight.settled) {
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
