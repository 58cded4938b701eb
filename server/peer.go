package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// peer is one other site, for one database: the copy of its journal, kept by following its link, and the worker that
// applies it here.
type peer struct {
	n      *node
	site   config.Site
	client *link.Client
	log    *slog.Logger
	live   atomic.Pointer[incoming] // set once the database is open
	gate   gate                     // of following

	lag     lagMeter    // of what is applied here
	permit  permit      // of applying
	running sync.Mutex  // held while the worker runs
	theirs  *policy.Set // what the peer said is declared there; nil: it was never asked. Guarded by the node's policyMu

	lacking  atomic.Pointer[catalog.Gap] // what it lacks of this site's; nil: nothing. See gap.go
	missing  atomic.Pointer[catalog.Gap] // what this site lacks of it, likewise. See resync.go
	mended   atomic.Pointer[catalog.Gap] // the last of these that was repaired
	applying gate                        // shut while its copy begins anew
	gapMu    sync.Mutex                  // held while missing begins, grows or ends; before anew
	anew     sync.Mutex                  // held by a run of the worker, and while its copy begins anew

	ghosts   map[wal.LSN]wal.LSN // its transactions that do not count and are not reversed there: commit and end. See ghost.go
	reversed wal.LSN             // up to where this site has reversed its own, as it says. Both guarded by the keeper's mu

	mu         sync.Mutex     // guards the rest
	refusedAt  time.Time      // when its address last refused connections; zero once it was heard again
	upSince    time.Time      // since when its journal is followed without a break
	held       fault          // why the permit is withdrawn, if it is
	unasked    bool           // theirs is nil
	ack        link.Ack       // what the peer says of our journal
	movedAt    time.Time      // when it last had applied more of it
	stated     link.Statement // what it says to all sites
	linkFault  fault
	gapFault   fault  // why a gap is not declared or closed
	kept       string // why its backlog is not freed, where it would be time to
	mending    mending
	applyFault fault     // why the worker does not run at all
	applySince time.Time // when its present run began
	ages       []age     // used by the maintenance loop alone
	via        string    // third site that was last relied on for its journal; used by followLoop alone
}

// incoming is the direction from the peer to here.
type incoming struct {
	copy   *link.CopyWriter
	worker *apply.Worker
}

// acknowledged notes what the peer has of our journal.
func (p *peer) acknowledged(a link.Ack) {
	p.mu.Lock()
	if a.Applied != p.ack.Applied {
		p.movedAt = time.Now()
	}
	p.ack = a
	p.mu.Unlock()
	if p.n.waits() {
		p.n.kickReport()
	}
}

func (p *peer) acked() link.Ack {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ack
}

// says is what the peer said last.
func (p *peer) says() link.Statement {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stated
}

// seen is how far the peer's transactions that were applied here had seen this site.
func (p *peer) seen() wal.LSN {
	if in := p.live.Load(); in != nil {
		return in.worker.Status().Seen
	}
	return 0
}

// applied is how far the peer's transactions have been applied here.
func (p *peer) applied() wal.LSN {
	if in := p.live.Load(); in != nil {
		return in.worker.Status().Applied
	}
	return 0
}

func (p *peer) failed(what string, err error) { p.note(&p.linkFault, what, err) }

// note keeps why something does not work, and logs it when it is news.
func (p *peer) note(in *fault, what string, err error) {
	f := newFault(what, err)
	p.mu.Lock()
	news := in.Text != f.Text
	*in = f
	p.mu.Unlock()
	if news {
		p.log.Warn(f.Text, "hint", f.Hint)
	}
}

// run follows and applies until ctx ends, then closes the copy.
func (p *peer) run(ctx context.Context) error {
	in := p.live.Load()
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.followLoop(gctx, in.copy) })
	g.Go(func() error { return p.applyLoop(gctx, in) })
	g.Go(func() error { return p.ackLoop(gctx, in) })
	g.Go(func() error { return p.askLoop(gctx) })
	g.Go(func() error { return p.mendLoop(gctx, in) })
	if p.n.keeper != nil {
		g.Go(func() error { return p.ghostLoop(gctx, in) })
	}
	return errors.Join(g.Wait(), in.copy.Close())
}

// ackLoop tells the origin how far its transactions are visible here, and measures how far that is behind.
func (p *peer) ackLoop(ctx context.Context, in *incoming) error {
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	last := wal.LSN(0)
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		p.measureLag(in)
		if now := in.worker.Status().Applied; now > last {
			last = now
			in.copy.SetApplied(now)
		}
	}
}

// followPause is the longest time between two attempts to reach a peer that may come back any moment.
const followPause = 300 * time.Millisecond

func (p *peer) followLoop(ctx context.Context, w *link.CopyWriter) error {
	for {
		err := retry(ctx, p.failed, "follow "+p.site.Name, followPause, func() error {
			ctx, leave, err := p.gate.enter(ctx)
			if err != nil {
				return err
			}
			defer leave()
			p.mu.Lock()
			p.upSince = time.Time{}
			p.mu.Unlock()
			err = p.client.Follow(ctx, p.n.database.Name, w)
			p.probe(ctx)
			p.relay(ctx, w)
			return p.goOnBehind(ctx, w, err)
		})
		if err != nil {
			return err
		}
	}
}

// relay takes what a third site says to have of the peer's journal beyond the copy here, now that the peer itself cannot
// be followed (S46, and a cut between two of three sites). It ends when that is here, so that the peer is tried again.
func (p *peer) relay(ctx context.Context, w *link.CopyWriter) {
	to := wal.LSN(0)
	if j, err := w.Journal(); err == nil {
		to = j.End()
	}
	var from *peer
	for _, q := range p.n.peers {
		if at := q.says().Copies[p.site.Name]; q != p && at > to {
			from, to = q, at
		}
	}
	if from == nil {
		return
	}
	err := from.client.FollowCopy(ctx, p.n.database.Name, p.site.Name, w.Relayed(p.site.ID, to))
	switch {
	case ctx.Err() != nil:
	case !errors.Is(err, link.ErrCaughtUp):
		p.log.Debug("take changes from a third site", "third", from.site.Name, "error", err)
	case p.via != from.site.Name:
		p.log.Info("changes were taken from a third site's copy", "third", from.site.Name, "lsn", to.String())
		p.via = from.site.Name
	}
}

// newWorker wires the apply worker of this peer.
func (p *peer) newWorker(c *captured, w *link.CopyWriter) *apply.Worker {
	n := p.n
	return apply.New(apply.Config{
		Site: n.self.ID, Origin: p.site.ID, OriginName: apply.OriginName(n.database.Name, p.site.Name),
		SiteOf: n.siteOf, DSN: n.cfg.Postgres.DSN, Database: n.database.Name,
		Check: func(ctx context.Context, conn *pgconn.PgConn) error { return n.fits(ctx, c.journal, conn) },
		Open: func(from wal.LSN) (apply.Reader, error) {
			r, err := readCopy(w, from)
			if err != nil {
				return nil, err
			}
			return &pacedReader{r: r, n: n, site: p.site.ID}, nil
		},
		Mesh:    c.mesh,
		Barrier: func(ctx context.Context, lsn wal.LSN) error { return n.barrier(ctx, c, lsn) },
		Fetch: func(ctx context.Context, rel *wal.Relation, key []string, row wal.Tuple) (wal.Tuple, bool, error) {
			return p.client.FetchRow(ctx, n.database.Name, rel, key, row)
		},
		Policy:            n.policyOf,
		Outcomes:          n.outcomes,
		Unacknowledged:    p.unacknowledged,
		Ghost:             p.haunted,
		Applied:           n.touched,
		Clock:             n.clock.Now,
		BatchTransactions: n.cfg.Apply.BatchTransactions,
		BatchBytes:        int(n.cfg.Apply.BatchBytes.Bytes()),
		Pause:             n.applyPause(),
		LockTimeout:       n.cfg.Apply.LockTimeout.Std(),
		Logger:            p.log,
	})
}

// readCopy gives the worker a reader of the copy. Nothing applied yet means: from where the copy begins, provided that
// no transaction lies before that.
func readCopy(w *link.CopyWriter, from wal.LSN) (*journal.Reader, error) {
	j, err := w.Journal()
	if err != nil {
		return nil, err
	}
	const hint = "what lies between would be missing: compare with `duri verify`, then re-join this site"
	if from == 0 {
		from = j.Start()
		h, err := j.HeaderAt(from)
		if err != nil {
			return nil, err
		}
		if h.Txns > 0 {
			return nil, &hinted{fmt.Sprintf("nothing of it is applied here, but the first %d transactions, up to %s, are no longer kept", h.Txns, from), hint}
		}
	}
	r, err := j.NewReader(from)
	if errors.Is(err, journal.ErrPruned) {
		return nil, &hinted{err.Error(), hint}
	}
	if err != nil {
		return nil, err
	}
	r.TrustChain() // it was verified when the records were received
	return r, nil
}

func (p *peer) applyLoop(ctx context.Context, in *incoming) error {
	select {
	case <-in.copy.Created():
	case <-ctx.Done():
		return ctx.Err()
	}
	// The worker tells of its own faults by its status, and they are only logged here.
	var own fault
	started := false
	failed := func(what string, err error) {
		if started {
			p.note(&own, what, err)
			return
		}
		p.note(&p.applyFault, what, err)
	}
	attempt := func(ctx context.Context) error {
		return retry(ctx, failed, "apply "+p.site.Name, longestPause, func() error {
			started = false
			ctx, leave, err := p.applying.enter(ctx)
			if err != nil {
				return err
			}
			defer leave()
			p.anew.Lock()
			defer p.anew.Unlock()
			if p.n.forgotten != nil {
				return p.n.forgotten
			}
			if err := p.checkIncarnation(ctx, in.copy); err != nil {
				return err
			}
			started = true
			p.mu.Lock()
			p.applyFault, p.applySince = fault{}, time.Now()
			p.mu.Unlock()
			err = in.worker.Run(ctx)
			if err == nil {
				return context.Cause(ctx)
			}
			return err
		})
	}
	for {
		if err := p.whilePermitted(ctx, attempt); err != nil {
			return err
		}
	}
}

// whilePermitted runs f, which runs until it is ended, while changes may be applied. It returns nil when they may not any
// more.
func (p *peer) whilePermitted(ctx context.Context, f func(context.Context) error) error {
	permitted, leave, err := p.permit.wait(ctx)
	if err != nil {
		return err
	}
	defer leave()
	p.running.Lock()
	defer p.running.Unlock()
	if permitted.Err() == nil { // not withdrawn meanwhile
		err = f(permitted)
	}
	if permitted.Err() != nil {
		return ctx.Err()
	}
	return err
}

// checkIncarnation makes sure that the progress kept in PostgreSQL belongs to the incarnation of the journal copy:
// positions of another incarnation are other positions, and resuming at one would skip transactions.
func (p *peer) checkIncarnation(ctx context.Context, w *link.CopyWriter) error {
	j, err := w.Journal()
	if err != nil {
		return err
	}
	h := j.Current()
	key, now := "incarnation of "+p.site.Name, h.Incarnation.String()
	return p.n.withSQL(ctx, func(c *pgconn.PgConn) error {
		was, ok, err := catalog.Meta(ctx, c, key)
		if err != nil || was == now {
			return err
		}
		// After a fail-over there the positions go on, and so does the progress.
		before := slices.ContainsFunc(h.Turns, func(t journal.Turn) bool { return t.String() == was })
		if !ok || before {
			return catalog.SetMeta(ctx, c, key, now)
		}
		return &hinted{
			fmt.Sprintf("site %s has another database now (%s) than the one that was applied here (%s)", p.site.Name, now, was),
			"re-join this site to the cluster; its progress does not fit the new one",
		}
	})
}

// retain prunes the copy: what is durable here, and has been seen by the third sites, is needed no more after the time it
// is kept for convenience. done is the less of both. Of the progress that counts which PostgreSQL keeps, and from which
// apply begins after a restart; the worker's own idea may be further, as it counts stretches without a transaction too.
func (p *peer) retain(now time.Time, keep time.Duration, done wal.LSN) (bytes int64, err error) {
	in := p.live.Load()
	j, err := in.copy.Journal()
	if err != nil {
		return 0, nil // none yet
	}
	p.ages = append(p.ages, age{now, j.End()})
	for len(p.ages) > 1 && now.Sub(p.ages[1].at) >= keep {
		p.ages = p.ages[1:]
	}
	if now.Sub(p.ages[0].at) >= keep {
		if err := j.Prune(min(done, p.ages[0].end)); err != nil && !errors.Is(err, journal.ErrClosed) { // it begins anew just now
			return 0, fmt.Errorf("prune the copy of %s's journal: %w", p.site.Name, err)
		}
	}
	return j.State().DiskBytes, nil
}

// openJournal opens a journal directory, or returns nil when there is none.
func openJournal(dir string, o journal.Options) (*journal.Journal, error) {
	j, err := journal.Open(dir, o)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return j, err
}
