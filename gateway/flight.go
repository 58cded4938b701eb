package gateway

import (
	"slices"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// flight is what a session knows of its transactions under way, so that it can go on when their server is lost. It is kept only
// with Config.Sites, and guarded by the session's mu.
type flight struct {
	log      []byte // what the client has sent since the oldest of them began, as it came
	torn     bool   // some of it was too long to be kept
	segments []segment
	answered int   // of segments: the client has their ReadyForQuery
	seen     int   // with hidden: where in log the client's own wait begins
	hidden   int   // ReadyForQuery to come that the client has already had, from a server that was lost
	strange  bool  // another server has answered otherwise
	base     int64 // s.w's total where the answer to the first unanswered segment begins

	names []naming

	// For transactions that may be run again although the client has seen some of their answers.
	sum   uint64    // over what the client has got of the first unanswered segment; of the backend's goroutine
	sums  []uint64  // of segments that it got from a server that was lost; hidden of them are to come again
	began time.Time // the oldest segment

	status byte   // of the transaction before the first unanswered segment
	simple bool   // what is about to commit came as a Query
	tag    int64  // s.w's total before the latest CommandComplete
	xid    uint64 // of the transaction that is about to commit; 0: none
	failed bool   // there was an error since it was last set to false
}

// naming is a change of what a client calls its statements.
type naming struct {
	at   int // in log
	name string
	was  *statement // nil: none
}

// segment is what a client sends up to one ReadyForQuery.
type segment struct {
	start  int    // in log
	does   deed   // of its statements together
	some   bool   // it has one
	sent   bool   // to a server, at least in part
	ended  bool   // the client has sent the message that asks for ReadyForQuery
	closed bool   // and it was sent on
	fed    bool   // all data of a COPY are sent
	sum    uint64 // over its answer
	ltxid  []byte
	began  bool // one of its statements is BEGIN
	count  int  // of its statements
	wrote  bool // one of its statements may have written
	split  bool // nothing of it takes effect before committing is set
	// committing: its transaction was told to commit, and may have done so. unmarked: nobody can be asked whether it has.
	committing, unmarked bool
}

// Limits of what is kept: a longer message or transaction is not run again.
const (
	recordMax = pgwire.BufferSize
	flightMax = 256 << 10
)

// open gives the segment that is being sent.
func (f *flight) open() *segment {
	if n := len(f.segments); n > 0 && !f.segments[n-1].closed {
		return &f.segments[n-1]
	}
	if len(f.segments) == 0 {
		f.began = time.Now()
	}
	f.segments = append(f.segments, segment{start: len(f.log)})
	return &f.segments[len(f.segments)-1]
}

// record keeps a message; a nil body is one that is too long.
func (f *flight) record(typ byte, body []byte, long bool) {
	s := f.open()
	if s.ended { // it is not sent on, as its server was lost
		f.segments = append(f.segments, segment{start: len(f.log)})
		s = &f.segments[len(f.segments)-1]
	}
	if long || len(f.log)+len(body) > flightMax {
		f.torn = true
	}
	if !f.torn {
		f.log = append(pgwire.AppendHeader(f.log, typ, len(body)), body...)
	}
	s.ended = typ == pgwire.Query || typ == pgwire.Sync || typ == pgwire.FunctionCall
}

// note adds what a text does to the segment that is being sent.
func (f *flight) note(t text) {
	s, does := f.open(), t.does
	s.wrote, s.began = s.wrote || t.wrote || does >= writes, s.began || does == begins
	s.count += t.statements
	if t.statements == 0 && does >= writes { // it was too long to be read, or calls a function
		s.count++
	}
	if !s.some {
		s.does, s.some = does, true
		return
	}
	s.does = joined(s.does, does)
}

// joined is what two statements of one segment of the extended protocol do: they commit together at its end.
func joined(a, b deed) deed {
	inner := isInner(b)
	switch {
	case a == begins && inner:
		return begins // and leaves it open
	case b == reads:
		return a
	case a == reads, a == writes && b == writes:
		return b
	case a == writes && b == commits:
		return commits
	case inner && isInner(a):
		return max(a, b, batch)
	case a == begins && b == commits:
		return commits
	}
	return tangled
}

// outstanding are the segments that the client has no ReadyForQuery of.
func (f *flight) outstanding() []segment { return f.segments[min(f.answered, len(f.segments)):] }

// settled reports that all before the segment that is being sent was answered.
func (f *flight) settled() bool {
	n := len(f.segments)
	if n > 0 && !f.segments[n-1].closed {
		n--
	}
	return f.answered >= n
}

// wrote reports that the transactions under way may have written.
func (f *flight) wrote() bool {
	return slices.ContainsFunc(f.segments, func(s segment) bool { return s.wrote })
}

// isCommitting reports that a transaction was told to commit.
func (f *flight) isCommitting() bool {
	for _, s := range f.outstanding() {
		if s.committing {
			return true
		}
	}
	return false
}

// certain gives the status in which the next statement runs; ok is false when it depends on answers that are still to come.
func (f *flight) certain() (status byte, ok bool) {
	if f.settled() {
		return f.status, true
	}
	for _, s := range f.outstanding() {
		if s.closed && !isInner(s.does) {
			return 0, false
		}
	}
	return f.status, f.status != pgwire.Idle
}

// ready notes a ReadyForQuery for the client; total is s.w's, behind it.
func (f *flight) ready(status byte, total int64) {
	if f.answered < len(f.segments) {
		f.segments[f.answered].sum = f.sum
	}
	f.answered++
	f.status, f.base, f.sum = status, total, 0
	if status != pgwire.Idle {
		return
	}
	f.xid, f.simple = 0, false
	if f.answered >= len(f.segments) {
		f.forget()
		return
	}
	cut := f.segments[f.answered].start
	if !f.torn {
		f.log = slices.Delete(f.log, 0, cut)
	}
	f.segments = slices.Delete(f.segments, 0, f.answered)
	for i := range f.segments {
		f.segments[i].start -= cut
	}
	f.names = slices.DeleteFunc(f.names, func(n naming) bool { return n.at < cut })
	for i := range f.names {
		f.names[i].at -= cut
	}
	f.answered = 0
}

// forget begins anew: nothing is under way.
func (f *flight) forget() {
	if cap(f.log) > 1<<10 {
		f.log = nil // an idle session keeps little
	}
	f.log, f.segments, f.names = f.log[:0], f.segments[:0], f.names[:0]
	f.answered, f.torn = 0, false
}

// replayMax is how many statements a transaction may have that is run again as a whole, and replayFor how long it may have been
// open.
const (
	replayMax = 64
	replayFor = 5 * time.Second
)

// replayable reports that the open transaction is small enough to be run again as a whole.
func (f *flight) replayable(now time.Time) bool {
	return f.status == pgwire.InBlock && len(f.segments) <= replayMax && now.Sub(f.began) <= replayFor
}

// onlyBegun reports that the open transaction has run nothing yet.
func (f *flight) onlyBegun() bool {
	return f.status == pgwire.InBlock && f.answered == 1 && f.segments[0].does == begins && f.segments[0].count <= 1
}

// unanswered is what the client has sent and has no ReadyForQuery of.
func (f *flight) unanswered() []byte {
	if f.answered >= len(f.segments) {
		return nil
	}
	return f.log[f.segments[f.answered].start:]
}

// course is how a session goes on when its server is lost.
type course byte

const (
	again   course = iota // run what is under way at another server, from the beginning of the transaction
	fails                 // tell the client that its transaction is rolled back (40001)
	stays                 // the transaction had failed before, or is rolled back as the client wished
	asks                  // learn what became of the commit
	unknown               // tell the client that nobody knows (08007)
)

// decide says how to go on, from what is under way at the moment of the loss (design: gateway, section 5). delivered: the client
// has a part of the answer to the first unanswered segment. replay: the transaction may be run again although the client has
// seen some of its answers.
func (f *flight) decide(delivered, replay bool) course {
	under := f.outstanding()
	runAgain := fails
	if !f.torn && !delivered && !f.strange && (f.status == pgwire.Idle || f.onlyBegun() || replay) {
		runAgain = again
	}
	if len(under) == 0 {
		if f.status == pgwire.InFailed {
			return stays
		}
		return runAgain
	}
	status := f.status
	for i, s := range under {
		// What was sent may have been carried out, and not all of that can be done twice.
		if s.does == tangled && s.sent || status == pgwire.Idle && s.uncertain() && (i > 0 || !s.committing) {
			return unknown
		}
		switch s.does {
		case begins:
			status = pgwire.InBlock
		case commits, rollsBack:
			status = pgwire.Idle
		}
	}
	switch first := under[0]; {
	case first.committing:
		return asks
	case f.status == pgwire.InFailed, f.status == pgwire.InBlock && first.does == rollsBack:
		return stays
	}
	return runAgain
}

// uncertain reports that a segment outside a transaction may have committed without anybody to ask.
func (s *segment) uncertain() bool {
	switch s.does {
	case commits, rollsBack: // of an implicit transaction
		return s.wrote && !s.began && s.sent && !s.split
	case opaque: // it may commit on its own
		return s.sent
	case copies:
		return s.closed && s.fed && !s.split
	default:
		return s.does >= writes && s.closed && !s.split
	}
}
