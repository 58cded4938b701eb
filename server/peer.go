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

	permit  permit      // of applying
	running sync.Mutex  // held while the worker runs
	theirs  *policy.Set // what the peer said is declared there; nil: it was never asked. Guarded by the node's policyMu

	mu         sync.Mutex // guards the rest
	refusedAt  time.Time  // when its address last refused connections; zero once it was heard again
	upSince    time.Time  // since when its journal is followed without a break
	held       fault      // why the permit is withdrawn, if it is
	unasked    bool       // theirs is nil
	ack        link.Ack   // what the peer says of our journal
	linkFault  fault
	applyFault fault     // why the worker does not run at all
	applySince time.Time // when its present run began
	ages       []age     // used by the maintenance loop alone
}

// incoming is the direction from the peer to here.
type incoming struct {
	copy   *link.CopyWriter
	worker *apply.Worker
}

// acknowledged notes what the peer has of our journal.
func (p *peer) acknowledged(a link.Ack) {
	p.mu.Lock()
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
	return errors.Join(g.Wait(), in.copy.Close())
}

// ackLoop tells the origin how far its transactions are visible here.
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
			return err
		})
		if err != nil {
			return err
		}
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
			if err := p.checkIncarnation(ctx, in.copy); err != nil {
				return err
			}
			started = true
			p.mu.Lock()
			p.applyFault, p.applySince = fault{}, time.Now()
			p.mu.Unlock()
			err := in.worker.Run(ctx)
			if err == nil {
				return ctx.Err()
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
		if err := j.Prune(min(done, p.ages[0].end)); err != nil {
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
