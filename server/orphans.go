package server

import (
	"context"
	"slices"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/fkey"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// newChecker makes what looks for rows that lost their parent (rule 12).
func newChecker(n *node) *fkey.Checker {
	return fkey.New(fkey.Config{
		Connect: func(ctx context.Context) (*pgconn.PgConn, error) {
			return pg.Connect(ctx, n.cfg.Postgres.DSN, n.database.Name, map[string]string{"application_name": "duri_fkey"})
		},
		Policies: func(context.Context) (policy.Set, error) { return *n.policies.Load(), nil },
		Schemas:  n.database.Schemas,
		Settler:  known{n},
		Elected:  func() bool { return n.elected() },
		Logger:   n.log.With("database", n.database.Name),
	})
}

// elected reports whether this site makes the compensations for all: it has the lowest number of the cluster.
func (n *node) elected() bool {
	return !slices.ContainsFunc(n.cfg.Sites, func(s config.Site) bool { return s.ID < n.self.ID })
}

// touched tells the checker what a worker has written.
func (n *node) touched(tables []string) {
	for _, t := range tables {
		n.checker.Touched(t)
	}
}

// known is what this site knows to be committed elsewhere.
type known struct{ n *node }

// Settled is fkey.Settler.Settled. What is known of a site is what its journal's copy holds, what its last heartbeat told,
// and what other sites' applied transactions had seen of it. None of it needs an answer from anybody.
func (k known) Settled(ctx context.Context) (bool, error) {
	if slices.ContainsFunc(k.n.peers, func(p *peer) bool { return p.missing.Load() != nil }) {
		return false, nil // the parent may be in the gap
	}
	if err := (side{k.n.db, k.n}).Reach(ctx, k.n.knownEnds()); err != nil {
		return false, nil // not in time
	}
	return true, nil
}

// knownEnds is up to where each peer is known to have committed.
func (n *node) knownEnds() []wal.Seen {
	ends := map[wal.SiteID]wal.LSN{}
	for _, p := range n.peers {
		in := p.live.Load()
		if in == nil {
			continue
		}
		beat, _ := in.copy.Heard()
		ends[p.site.ID] = max(ends[p.site.ID], beat.End)
		if j, err := in.copy.Journal(); err == nil { // else nothing was received yet
			ends[p.site.ID] = max(ends[p.site.ID], j.End())
		}
		for _, s := range in.worker.Status().SeenOthers {
			ends[s.Site] = max(ends[s.Site], s.LSN)
		}
	}
	var out []wal.Seen
	for _, p := range n.peers {
		out = append(out, wal.Seen{Site: p.site.ID, LSN: ends[p.site.ID]})
	}
	return out
}
