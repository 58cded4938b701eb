package gateway

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// Pace says how long transactions that write are delayed before they begin, because other sites fall behind. Its methods are called
// often and at the same time, and must not block.
type Pace interface {
	// Delay is that of a session's transaction at the site at; empty: the one that it would go to.
	Delay(l *Login, w Wish, at string) time.Duration
	// Backlog is how many bytes of a site's WAL other ones have not applied.
	Backlog(site, database string) int64
}

// paces counts delays.
type paces struct {
	delayed atomic.Uint64 // transactions
	total   atomic.Int64  // nanoseconds
}

// slowDown delays a transaction that is about to write for the first time. No lock on a row is held then: what has come before in a
// transaction block has only read. mu is held, and let go meanwhile.
func (s *session) slowDown(ctx context.Context, t text) {
	if t.does < writes && !t.wrote || s.rerun != nil || !s.flight.firstWrite() {
		return
	}
	at, w, b := "", Wish{Home: s.home, Last: s.last, Types: s.types}, s.b
	if b != nil {
		at = b.target.Site
	}
	s.mu.Unlock()
	defer s.mu.Lock()
	d := s.g.cfg.Pace.Delay(&s.who, w, at)
	if d <= 0 {
		return
	}
	if b != nil {
		_ = b.w.Flush() // What came before does not wait.
	}
	waited := s.waits()
	defer waited(nil)
	s.g.paces.delayed.Add(1)
	s.g.paces.total.Add(int64(d))
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// firstWrite reports that the transaction of the segment at hand has not written yet, before its next statement is noted.
func (f *flight) firstWrite() bool {
	seg := f.open()
	block, wrote := f.status != pgwire.Idle, false
	for _, s := range f.segments[:min(f.answered, len(f.segments))] {
		wrote = wrote || s.wrote
	}
	under := f.outstanding()
	for _, s := range under[:max(0, len(under)-1)] { // without seg
		switch s.does {
		case begins:
			block, wrote = true, block && wrote || s.wrote
		case commits, rollsBack:
			block = false
		default:
			wrote = wrote || s.wrote
		}
	}
	return !seg.wrote && (!block || !wrote)
}
