package server

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/decode"
	"github.com/duri-io/duri/durability"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/wal"
)

// capture moves one database's decoded stream into the own journal and the local index. It is decode's Handler.
type capture struct {
	n     *node
	j     *journal.Journal
	local *apply.History
	mesh  *apply.Mesh
	step  func(t *wal.Txn) // told of a backward clock step

	seen    []wal.Seen
	bound   atomic.Pointer[bound] // see bindSeen
	maxTime wal.Time              // greatest version time so far
	foreign wal.Time              // greatest commit time applied here

	pending   wal.LSN // passed, but not yet in the journal as a position
	waited    bool    // somebody may wait for it
	positions time.Time

	behind  atomic.Bool            // decoding is catching up
	decoded atomic.Int64           // when the last transaction was, in nanoseconds
	stuck   atomic.Pointer[error]  // the journal did not take what came last, which comes again
	flush   chan struct{}          // something was appended
	dirty   chan struct{}          // something was flushed
	durable atomic.Uint64          // of the own journal
	report  atomic.Pointer[func()] // asks the running stream to report at once

	reportMu sync.Mutex       // held while a report is computed
	told     decode.Positions // the greatest so far
}

func newCapture(n *node, j *journal.Journal, mesh *apply.Mesh) *capture {
	st := j.State()
	c := &capture{
		n: n, j: j, local: mesh.Local, mesh: mesh, step: func(*wal.Txn) {},
		seen: st.Seen, maxTime: st.MaxVersionTime, flush: make(chan struct{}, 1), dirty: make(chan struct{}, 1),
	}
	c.durable.Store(uint64(j.Durable()))
	n.marks.note("", time.Now())
	return c
}

// Commit journals a local transaction; of one applied from elsewhere only its position counts (rule 20).
func (c *capture) Commit(m *decode.Commit) error {
	t := m.Txn
	c.unbind(t.EndLSN)
	c.decoded.Store(time.Now().UnixNano())
	if m.Origin != "" && !c.n.ownOrigin(m.Origin) {
		site, ok := c.n.siteOf(m.Origin)
		if !ok {
			return &originError{m.Origin}
		}
		if !c.n.repairOrigin(m.Origin) {
			c.see(site, m.OriginLSN)
		}
		c.foreign = max(c.foreign, t.CommitTime)
		return c.advance(t.EndLSN)
	}
	c.n.commits.note(t.XID)
	t.Changes = slices.DeleteFunc(t.Changes, func(ch wal.Change) bool { return ch.Relation.Namespace == "duri" })
	t.Origin, t.Seen, t.Received = c.n.self.ID, slices.Clone(c.seen), c.n.clock.Now()
	c.behind.Store(t.Received.Sub(t.CommitTime) > behindAfter)
	stepped := false
	if t.VersionTime, stepped = stamp(t.CommitTime, c.maxTime, c.foreign); stepped {
		c.step(t)
	}
	if err := c.mesh.Parking.Purge(t, c.n.sql.do); err != nil {
		return err
	}
	c.n.marks.note(t.Mark.LTXID, time.Now()) // before the index, by which it is waited for
	// The index first: should the journal fail, the transaction is delivered again and the index drops it.
	if err := c.local.Add(t); err != nil {
		return fmt.Errorf("index transaction %s: %w", t.CommitLSN, err)
	}
	c.mesh.Parking.Touched(t)
	if len(t.Changes) == 0 && t.Mark.LTXID == "" { // a heartbeat: the index learns how late it is
		return c.Advance(t.EndLSN) // or of a client, who changed nothing that is replicated
	}
	if err := c.appended(c.j.AppendTxn(t)); err != nil {
		return fmt.Errorf("journal transaction %s: %w", t.CommitLSN, err)
	}
	c.maxTime = max(c.maxTime, t.VersionTime) // only now: a transaction delivered again must get the same stamp
	c.pending, c.waited = 0, false
	return c.awaitLook()
}

// lookMax bounds how long is waited for a look at the budget: longer than one takes, as a rule.
const lookMax = 2 * time.Second

// awaitLook waits, when the own journal alone is beyond the budget, until that was looked at: then either there is room again, or
// decoding is paused. So a journal exceeds its budget by no more than a transaction, however fast is decoded.
func (c *capture) awaitLook() error {
	if c.j.DiskBytes() <= c.n.share() {
		return nil
	}
	if err := c.handOver(); err != nil { // nobody is to wait for what is here
		return err
	}
	t := time.NewTimer(lookMax)
	defer t.Stop()
	select {
	case <-c.n.looked.wait():
	case <-t.C:
	}
	return nil
}

// appended notes whether the journal takes what comes; a full disk shows here.
func (c *capture) appended(err error) error {
	switch was := c.stuck.Load(); {
	case err != nil:
		c.stuck.Store(&err)
		c.n.keeper.stir()
	case was != nil:
		c.stuck.Store(nil)
	}
	return err
}

// originError: a transaction of a replication origin that is no site of the cluster.
type originError struct{ name string }

func (e *originError) Error() string {
	return fmt.Sprintf("a transaction was written here under replication origin %q, which is no site of this cluster", e.name)
}

// HintText is the advice that goes with the error.
func (e *originError) HintText() string {
	return "another replication tool feeds this database; end its subscription, because its rows would not reach the other sites"
}

// clockStep is the regress of commit times beyond which the clock has stepped back (rule 3).
const clockStep = 100 * time.Millisecond

// stamp gives the version time of a commit (rule 3): its commit time, or, after a backward step of the clock and until
// it has caught up, the greatest time so far plus a microsecond. It also always exceeds foreign, the greatest commit
// time that was applied here before it: the transaction may have overwritten that row, and must then win against it
// everywhere, even when the clock was set back by less than counts as a step.
func stamp(commit, greatest, foreign wal.Time) (t wal.Time, stepped bool) {
	if commit < greatest.Add(-clockStep) {
		return max(greatest, foreign) + 1, true
	}
	return max(commit, greatest, foreign+1), false
}

// busy reports whether transactions are decoded one soon after the other.
func (c *capture) busy() bool {
	return time.Now().UnixNano()-c.decoded.Load() < 2*int64(barrierPatience)
}

// bound keeps what this site's transactions say they have seen of a site from going beyond most, while rows here are not what
// that site's are: something of it is missing. From the position resume on, in this site's own WAL, they have seen it up to seen;
// resume 0: not yet.
type bound struct {
	site               wal.SiteID
	most, resume, seen wal.LSN
}

// bindSeen begins that.
func (c *capture) bindSeen(site wal.SiteID, most wal.LSN) {
	c.bound.Store(&bound{site: site, most: most})
}

// bindOpen goes on with what the gaps in duri.gap ask for.
func (c *capture) bindOpen() {
	for _, p := range c.n.peers {
		if g := p.missing.Load(); g != nil {
			c.bindSeen(p.site.ID, g.From)
		} else if g := p.mended.Load(); g != nil && wal.SeenOf(c.seen, p.site.ID) < g.Seen {
			c.bound.Store(&bound{p.site.ID, g.From, g.Resume, g.Seen})
		}
	}
}

// freeSeen ends it: what is committed here beyond resume has seen the site up to seen.
func (c *capture) freeSeen(site wal.SiteID, resume, seen wal.LSN) {
	most := wal.LSN(0)
	if b := c.bound.Load(); b != nil {
		most = b.most
	}
	c.bound.Store(&bound{site, most, resume, seen})
}

// unbind is told how far the stream is.
func (c *capture) unbind(at wal.LSN) {
	if b := c.bound.Load(); b != nil && b.resume != 0 && at > b.resume && c.bound.CompareAndSwap(b, nil) {
		c.see(b.site, b.seen)
	}
}

func (c *capture) see(site wal.SiteID, lsn wal.LSN) {
	if b := c.bound.Load(); b != nil && b.site == site {
		lsn = min(lsn, b.most)
	}
	i, ok := slices.BinarySearchFunc(c.seen, site, func(s wal.Seen, id wal.SiteID) int { return int(s.Site) - int(id) })
	switch {
	case !ok:
		c.seen = slices.Insert(c.seen, i, wal.Seen{Site: site, LSN: lsn})
	case lsn > c.seen[i].LSN:
		c.seen[i].LSN = lsn
	}
}

// Advance notes a position that nothing lies before. Commits that are not replicated, of this database or of another one of
// the server, wait for it as well.
func (c *capture) Advance(to wal.LSN) error {
	c.waited = c.n.waits()
	return c.advance(to)
}

func (c *capture) advance(to wal.LSN) error {
	c.unbind(to)
	c.pending = max(c.pending, to)
	c.local.Advance(to)
	return nil
}

// positionEvery bounds how often coverage without transactions is journalled.
const positionEvery = 200 * time.Millisecond

// Idle wakes the flusher, and now and then writes down how far the stream has been read.
func (c *capture) Idle() error {
	if c.pending > c.j.End() && (c.waited || time.Since(c.positions) >= positionEvery) {
		if err := c.appended(c.j.AppendPosition(c.pending, slices.Clone(c.seen), c.n.clock.Now())); err != nil {
			return fmt.Errorf("journal position %s: %w", c.pending, err)
		}
		c.positions, c.pending, c.waited = time.Now(), 0, false
	}
	if c.n.waits() { // commits wait for it; what comes during the write goes with the next
		return c.handOver()
	}
	wake(c.flush)
	return nil
}

// handOver gives what was appended to the readers, that is to the link, and then to syncLoop.
func (c *capture) handOver() error {
	if err := c.j.Flush(); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	wake(c.dirty)
	return nil
}

// restart forgets positions of a server that has lost them. The stream is not running.
func (c *capture) restart() { c.pending, c.waited = 0, false }

// passSlot notes that nothing lies before the beginning of the slot that the journal has turned to.
func (c *capture) passSlot() error {
	at := c.j.Current().CreatedLSN
	if at <= c.j.End() {
		return nil
	}
	if err := c.j.AppendPosition(at, slices.Clone(c.seen), c.n.clock.Now()); err != nil {
		return fmt.Errorf("journal position %s: %w", at, err)
	}
	c.local.Advance(at)
	return c.handOver()
}

func wake(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// A hand-over to the journal's readers costs some 200 microseconds of CPU at both sites (write, link, fsyncs, receipts),
// so the least time between two of them decides what replication costs under load. A lone transaction goes at once.
const (
	flushEvery   = time.Millisecond      // keeping up
	flushCatchUp = 10 * time.Millisecond // behind: nobody waits for a single transaction
	behindAfter  = 100 * time.Millisecond
)

// flushLoop hands over from time to time. Where commits wait, Idle does so itself.
func (c *capture) flushLoop(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.flush:
		}
		if err := c.handOver(); err != nil {
			return err
		}
		pause := flushEvery
		if c.behind.Load() {
			pause = flushCatchUp
		}
		time.Sleep(pause)
	}
}

// syncLoop fsyncs the journal whenever something was flushed, one group at a time, and lets the new position be
// reported. It runs beside flushLoop, so that shipping does not wait for the own fsync.
func (c *capture) syncLoop(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.dirty:
		}
		if err := c.j.Sync(); err != nil {
			return fmt.Errorf("fsync journal: %w", err)
		}
		if d := uint64(c.j.Durable()); d > c.durable.Load() {
			c.durable.Store(d)
			c.reportNow()
		}
	}
}

func (c *capture) setReport(f func()) { c.report.Store(&f) }

// reportNow asks the running stream to report.
func (c *capture) reportNow() {
	if f := c.report.Load(); f != nil {
		(*f)()
	}
}

// Positions are what PostgreSQL is told; they never go back. PostgreSQL forgets WAL up to the flush position and releases
// the commits that wait for it, so only what the own journal holds durably may be reported, and, where commits wait for
// other sites, what those hold.
func (c *capture) Positions() decode.Positions {
	c.reportMu.Lock()
	defer c.reportMu.Unlock()
	d := wal.LSN(c.durable.Load())
	now := durability.Progress{Received: d, Durable: d, Applied: d}
	if c.n.waits() {
		var ok bool
		now, ok = durability.Report(durability.Progress{Received: c.j.End(), Durable: d}, c.n.receipts(), c.n.keeper.standing(), c.n.cfg.Durability.Receipts)
		if !ok {
			return c.told
		}
	}
	c.told.Write, c.told.Flush, c.told.Apply = max(c.told.Write, now.Received), max(c.told.Flush, now.Durable), max(c.told.Apply, now.Applied)
	return c.told
}

// rebuild fills a history from its journal, from the lowest position that some other site has not seen.
func rebuild(ctx context.Context, j *journal.Journal, h *apply.History, from wal.LSN) error {
	r, err := j.NewReader(max(from, j.Start()))
	if err != nil {
		return err
	}
	r.TrustChain()
	defer func() { _ = r.Close() }()
	for {
		rec, ok, err := r.TryNext()
		if err != nil || !ok {
			h.Advance(j.End())
			return err
		}
		if rec.Txn != nil {
			if err := h.Add(rec.Txn); err != nil {
				return err
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// serverClock follows the clock of the local PostgreSQL server, which gives the commit times (rule 1). It errs to the
// early side by at most the round trip of a query.
type serverClock struct {
	mu     sync.Mutex
	offset time.Duration
	known  bool
}

func (c *serverClock) set(server wal.Time, received time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.offset, c.known = server.Sub(wal.TimeOf(received)), true
}

// Now is the server's time. Before the first measurement it is long ago, so that nothing is applied.
func (c *serverClock) Now() wal.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.known {
		return 0
	}
	return wal.TimeOf(time.Now()).Add(c.offset)
}

var errNotReady = &hinted{"this site's database is not ready yet", "wait, or see with `duri status` there what it waits for"}
