package server

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/decode"
	"github.com/duri-io/duri/durability"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/wal"
)

// waits reports whether commits of this database wait for other sites.
func (n *node) waits() bool { return n.keeper != nil && n.cfg.Waits(n.database.Name) }

// applyPause leaves the machine to receipts where commits wait for them: what is applied a few milliseconds later is
// applied in fewer transactions.
func (n *node) applyPause() time.Duration {
	if n.waits() {
		return 10 * time.Millisecond
	}
	return 0
}

// receipts are what the other sites have acknowledged of this database's journal.
func (n *node) receipts() (all []durability.Receipt) {
	for _, p := range n.peers {
		a := p.acked()
		all = append(all, durability.Receipt{
			Site: p.site.Name, Epoch: a.Epoch, Progress: durability.Progress{Received: a.Received, Durable: a.Durable, Applied: a.Applied},
		})
	}
	return all
}

// kickReport lets the stream report what has become reportable. It does not block.
func (n *node) kickReport() {
	if c := n.ready.Load(); c != nil {
		c.capture.reportNow()
	}
}

// reported is what PostgreSQL was told, at the most, after every report that is under way.
func (n *node) reported() decode.Positions {
	c := n.ready.Load()
	if c == nil {
		return decode.Positions{}
	}
	c.capture.reportMu.Lock()
	defer c.capture.reportMu.Unlock()
	return c.capture.told
}

// unreceipted says what must not be seen by clients yet: commits that became visible without a receipt when the server
// ended while they waited (S42); empty when there is nothing.
func (n *node) unreceipted() string {
	if n.ready.Load() == nil {
		return "database " + n.database.Name + " is not open yet"
	}
	if why := n.behindJournal(); why != "" {
		return why
	}
	if !n.known.Load() {
		return "database " + n.database.Name + " is compared with its journal first"
	}
	if !n.waits() {
		return ""
	}
	if at, told := wal.LSN(n.recover.Load()), n.reported().Flush; told < at || at == 0 {
		return fmt.Sprintf("what database %s had committed before the last start is not durable at the other sites yet (%s of %s)", n.database.Name, told, at)
	}
	return ""
}

// noteRecovered notes what the server has flushed when its stream is opened: commits up to there may be visible without a
// receipt, if it has ended while they waited.
func (n *node) noteRecovered(ctx context.Context, conn *pgconn.PgConn) error {
	rows, err := pg.Rows(ctx, conn, "SELECT pg_catalog.pg_current_wal_flush_lsn()")
	if err != nil {
		return fmt.Errorf("read the flush position: %w", err)
	}
	lsn, err := wal.ParseLSN(rows[0][0])
	if err != nil {
		return err
	}
	n.recover.Store(uint64(lsn))
	return nil
}

// uncaptured reports that the database may have committed what the journal does not have: the server has ended, or what it had
// recovered when its stream was opened is not decoded yet. Another site that takes this one back before would hear of it when it
// may have decided long ago that it does not count.
func (n *node) uncaptured() bool {
	c, recovered := n.ready.Load(), wal.LSN(n.recover.Load())
	return c == nil || !n.known.Load() || recovered == 0 || c.journal.End() < recovered
}

// unable says why this site cannot decode this database, so that nothing is acknowledged, or cannot receive some other
// one's journal of it, on its own side. A stream of decoding that has ended may take a
// moment to begin again: only one that ended before overdue counts.
func (n *node) unable(overdue time.Time) string {
	if why := n.behindJournal(); why != "" {
		return why
	}
	if why := n.gate.reason(); why != nil {
		return fmt.Sprintf("database %s: %v", n.database.Name, why)
	}
	if c := n.ready.Load(); c != nil {
		if err := c.capture.stuck.Load(); err != nil {
			return fmt.Sprintf("database %s: %v", n.database.Name, *err)
		}
		if since := n.mute.Load(); since != nil && since.Before(overdue) {
			n.mu.Lock()
			why := n.fault.Text
			n.mu.Unlock()
			return fmt.Sprintf("database %s is not decoded since %s: %s", n.database.Name, since.Format(time.TimeOnly), why)
		}
	}
	for _, p := range n.peers {
		if why := p.gate.reason(); why != nil {
			return fmt.Sprintf("database %s from %s: %v", n.database.Name, p.site.Name, why)
		}
		in := p.live.Load()
		if in == nil {
			continue
		}
		if err := cmp.Or(in.copy.Err(), in.copy.Stuck()); err != nil {
			return fmt.Sprintf("database %s from %s: %v", n.database.Name, p.site.Name, err)
		}
	}
	return ""
}

// seenPeer is what a link tells of the peer.
type seenPeer struct {
	heard   time.Time
	deaf    time.Duration
	refused bool
	unfit   string
	stable  time.Duration
	lacks   wal.LSN // bytes of this site's WAL that it has not acknowledged
	tail    wal.LSN // bytes of its WAL that are not here, as it says
	// unjudged are bytes of its WAL whose transactions may turn out not to count.
	unjudged wal.LSN
	ack      link.Ack
	// uncaptured: it may have committed what its journal does not have.
	uncaptured bool
}

// nearlyAll is how much may be under way to a site that counts as caught up, in bytes of WAL; and how much both ways, once
// commits wait for it: it is not given up for less.
const (
	nearlyAll  = 1 << 20
	armedSlack = 16 << 20
)

// caughtUp reports whether the peer has nearly all of this site's journal, and this site all of its, which has all that the peer has
// committed.
func (s seenPeer) caughtUp(armed bool) bool {
	if s.uncaptured {
		return false
	}
	if armed {
		return max(s.lacks, s.tail) <= armedSlack
	}
	return s.lacks <= nearlyAll && s.tail == 0
}

// seenBy collects what this link tells of the peer.
func (p *peer) seenBy(now time.Time) (s seenPeer) {
	p.mu.Lock()
	s.ack, s.refused = p.ack, !p.refusedAt.IsZero()
	refusedAt, up := p.refusedAt, p.upSince
	p.mu.Unlock()
	s.lacks, s.tail = math.MaxUint64, math.MaxUint64
	in, c := p.live.Load(), p.n.ready.Load()
	if in == nil || c == nil {
		return s
	}
	beat, at := in.copy.Heard()
	s.heard, s.unfit, s.uncaptured = at, beat.Unfit, beat.Uncaptured
	if at.After(refusedAt) {
		s.refused = false
	}
	if now.Sub(at) < link.DefaultSilence {
		s.deaf = beat.Heard
		if up.IsZero() {
			up = at
			p.mu.Lock()
			p.upSince = at
			p.mu.Unlock()
		}
		s.stable = now.Sub(up)
	}
	s.lacks = behind(s.ack.Durable, c.journal.End())
	if j, err := in.copy.Journal(); err == nil && beat.End > 0 {
		s.tail = behind(j.Durable(), beat.End)
		s.unjudged = behind(in.worker.Status().Passed, beat.End)
	}
	return s
}

// behind is how many bytes are missing to to.
func behind(at, to wal.LSN) wal.LSN { return max(at, to) - at }

// probe looks whether the peer's process has ended, after a stream to it has: then its address refuses connections, or
// something in between takes them and ends them. Once may be a moment between two processes, so that it takes two.
func (p *peer) probe(ctx context.Context) {
	if p.n.keeper == nil {
		return
	}
	for range 2 {
		if !p.client.Gone(ctx) {
			return
		}
	}
	p.mu.Lock()
	p.refusedAt = time.Now()
	p.mu.Unlock()
	p.n.keeper.stir()
}
