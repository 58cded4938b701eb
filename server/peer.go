package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
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
	"github.com/duri-io/duri/wal"
)

// peer is one other site, for one database: the copy of its journal, kept by following its link, and the worker that
// applies it here.
type peer struct {
	n      *node
	site   config.Site
	client *link.Client
	copy   *link.CopyWriter
	log    *slog.Logger
	worker atomic.Pointer[apply.Worker] // set when the database is open

	mu        sync.Mutex // guards the rest
	ack       link.Ack   // what the peer says of our journal
	ackAt     time.Time
	linkFault fault
	connected bool
	ages      []age
}

// acknowledged notes what the peer has of our journal.
func (p *peer) acknowledged(a link.Ack) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ack, p.ackAt = a, time.Now()
}

func (p *peer) acked() link.Ack {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ack
}

// seen is how far the peer's transactions that were applied here had seen this site.
func (p *peer) seen() wal.LSN {
	if w := p.worker.Load(); w != nil {
		return w.Status().Seen
	}
	return 0
}

func (p *peer) failed(what string, err error) {
	f := fault{Text: what + ": " + err.Error(), Hint: hintOf(err), At: time.Now()}
	p.mu.Lock()
	news := p.linkFault.Text != f.Text
	p.linkFault = f
	p.mu.Unlock()
	if news {
		p.log.Warn(f.Text, "hint", f.Hint)
	}
}

// run follows and applies until ctx ends.
func (p *peer) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.copy.Run(ctx) })
	g.Go(func() error { return p.followLoop(ctx) })
	g.Go(func() error { return p.applyLoop(ctx) })
	return g.Wait()
}

func (p *peer) followLoop(ctx context.Context) error {
	for {
		err := retry(ctx, p.failed, "follow "+p.site.Name, func() error {
			if p.n.over.Load() {
				return errBudget
			}
			return p.client.Follow(ctx, p.n.database.Name, p.copy)
		})
		if err != nil {
			return err
		}
	}
}

// newWorker wires the apply worker of this peer.
func (p *peer) newWorker(c *captured) *apply.Worker {
	n := p.n
	return apply.New(apply.Config{
		Site: n.self.ID, Origin: p.site.ID, OriginName: apply.OriginName(n.database.Name, p.site.Name),
		SiteOf: n.siteOf, DSN: n.cfg.Postgres.DSN, Database: n.database.Name,
		Open:    p.open,
		Local:   c.local,
		Barrier: func(ctx context.Context, lsn wal.LSN) error { return n.barrier(ctx, c, lsn) },
		Fetch: func(ctx context.Context, rel *wal.Relation, key []string, row wal.Tuple) (wal.Tuple, bool, error) {
			return p.client.FetchRow(ctx, n.database.Name, rel, key, row)
		},
		Clock:             n.clock.Now,
		BatchTransactions: n.cfg.Apply.BatchTransactions,
		BatchBytes:        int(n.cfg.Apply.BatchBytes.Bytes()),
		LockTimeout:       n.cfg.Apply.LockTimeout.Std(),
		Logger:            p.log,
	})
}

// open gives the worker a reader of the copy. Nothing applied yet means: from where the copy begins.
func (p *peer) open(from wal.LSN) (apply.Reader, error) {
	j := p.copy.Journal()
	if j == nil {
		return nil, errNoCopy
	}
	if from == 0 {
		from = j.Start()
	}
	return j.NewReader(from)
}

var errNoCopy = errors.New("nothing has been received from this site yet")

func (p *peer) applyLoop(ctx context.Context) error {
	for {
		err := retry(ctx, p.applyFailed, "apply "+p.site.Name, func() error {
			if p.copy.Journal() == nil {
				return errNoCopy
			}
			if err := p.checkIncarnation(ctx); err != nil {
				return err
			}
			err := p.worker.Load().Run(ctx)
			if err == nil {
				return ctx.Err()
			}
			return err
		})
		if err != nil {
			return err
		}
	}
}

func (p *peer) applyFailed(what string, err error) {
	if errors.Is(err, errNoCopy) {
		return
	}
	p.log.Warn(what, "error", err, "hint", hintOf(err))
}

// checkIncarnation makes sure that the progress kept in PostgreSQL belongs to the incarnation of the journal copy:
// positions of another incarnation are other positions, and resuming at one would skip transactions.
func (p *peer) checkIncarnation(ctx context.Context) error {
	key := "incarnation of " + p.site.Name
	now := p.copy.Journal().Header().Incarnation.String()
	return p.n.withSQL(ctx, func(c *pgconn.PgConn) error {
		was, ok, err := catalog.Meta(ctx, c, key)
		if err != nil {
			return err
		}
		if !ok {
			return catalog.SetMeta(ctx, c, key, now)
		}
		if was != now {
			return &hinted{
				fmt.Sprintf("site %s has another database now (%s) than the one that was applied here (%s)", p.site.Name, now, was),
				"re-join this site to the cluster; its progress does not fit the new one",
			}
		}
		return nil
	})
}

// retain prunes the copy: what is durable here is needed no more, after the time it is kept for convenience.
func (p *peer) retain(now time.Time, keep time.Duration) (bytes int64, err error) {
	j, w := p.copy.Journal(), p.worker.Load()
	if j == nil || w == nil {
		return 0, nil
	}
	p.ages = append(p.ages, age{now, j.End()})
	for len(p.ages) > 1 && now.Sub(p.ages[1].at) >= keep {
		p.ages = p.ages[1:]
	}
	if now.Sub(p.ages[0].at) >= keep {
		if err := j.Prune(min(w.Status().Durable, p.ages[0].end)); err != nil {
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
