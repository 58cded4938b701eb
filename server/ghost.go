package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// A ghost is a transaction that its site committed and that does not count: its client was told that it was aborted, or it was
// never acknowledged and its site was left out before another one had it (docs/concepts/durability.md). From its beginning to
// its end:
//
//	the site that went on                                the site that was left out
//	its worker meets the transaction, which has a mark:
//	skips it, row in duri.ghost
//	does not take the site back                          asks: has this site ghosts?
//	                                                     makes its rows equal to the other's, as behind a gap (resync.go)
//	                                                     puts down up to where it has reversed them
//	asks: up to where? Done: takes the site back

// ReversedUpTo is up to where a site has reversed its own transactions that Site says not to count.
type ReversedUpTo struct {
	Site string  `json:"site"`
	LSN  wal.LSN `json:"lsn"`
}

// ghostEvery is how often both sides ask each other while a site is left out.
const ghostEvery = time.Second

// Ghosts is what a site tells of another one's.
type Ghosts struct {
	Site string  `json:"site"`
	Open int     `json:"open"` // not reversed there yet
	To   wal.LSN `json:"to"`   // the end of the last one
	// Commits are where their commit records begin; none when there are many.
	Commits []wal.LSN `json:"commits,omitempty"`
}

// unacknowledged judges a marked transaction of the peer on its way into the tables here: its site has been left out of the
// register, and the transaction lies beyond what the members had of it, and its COMMIT waits for another site, so that nobody was
// told of it. With more than two sites the others would have to judge alike, so that such transactions are merged.
func (p *peer) unacknowledged(ctx context.Context, t *wal.Txn) (bool, error) {
	k := p.n.keeper
	if k == nil || !p.n.waits() || p.n.cfg.Durability.ReturningTail != config.Reverse || len(p.n.peers) != 1 || !t.Mark.Level.Promises() {
		return false, nil
	}
	for {
		k.mu.Lock()
		known := !k.began.IsZero() && !k.doubt
		if known {
			// Judged and noted under the lock under which it is decided to take the site back.
			cut, ok := k.reg.Cut(p.n.database.Name, p.site.Name)
			out := ok && !k.reg.Has(p.site.Name) && k.reg.Has(k.a.self.Name) && t.EndLSN > cut
			if out {
				p.haunt(t)
			}
			k.mu.Unlock()
			return out, nil
		}
		k.mu.Unlock()
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(decideEvery):
		}
	}
}

// haunted notes a ghost of the peer.
func (p *peer) haunted(t *wal.Txn) {
	if k := p.n.keeper; k != nil {
		k.mu.Lock()
		defer k.mu.Unlock()
		p.haunt(t)
	}
}

// haunt notes a ghost of the peer, and tells of it once. The keeper's mu is held.
func (p *peer) haunt(t *wal.Txn) {
	if _, known := p.ghosts[t.CommitLSN]; !known {
		p.log.Warn("a transaction of a site that was left out does not count (duri.ghost), and is to be reversed there", "ltxid", fmt.Sprintf("%x", t.Mark.LTXID), "lsn", t.CommitLSN.String())
	}
	p.ghosts[t.CommitLSN] = t.EndLSN
}

// loadGhosts reads the peer's ghosts that are not reversed, and up to where this site's own are.
func (p *peer) loadGhosts(ctx context.Context) error {
	k := p.n.keeper
	if k == nil {
		return nil
	}
	return p.n.withSQL(ctx, func(c *pgconn.PgConn) error {
		rows, err := pg.Query(ctx, c, "SELECT commit_lsn, end_lsn FROM duri.ghost WHERE origin = $1::int2 AND reversed IS NULL", fmt.Sprint(p.site.ID))
		if err != nil {
			return fmt.Errorf("read duri.ghost: %w", err)
		}
		reversed, _, err := catalog.Meta(ctx, c, p.reversedKey())
		if err != nil {
			return err
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		p.ghosts = map[wal.LSN]wal.LSN{}
		for _, r := range rows {
			at, err := wal.ParseLSN(r[0])
			if err != nil {
				return err
			}
			if p.ghosts[at], err = wal.ParseLSN(r[1]); err != nil {
				return err
			}
		}
		if reversed != "" {
			p.reversed, err = wal.ParseLSN(reversed)
		}
		return err
	})
}

// reversedKey is where it is put down up to where this site has reversed what the peer says not to count.
func (p *peer) reversedKey() string { return "ghosts reversed as of " + p.site.Name }

// toldGhosts is what this site's status tells of the peer's ghosts; k.mu is not held.
func (p *peer) toldGhosts() (g Ghosts, reversed wal.LSN) {
	k := p.n.keeper
	if k == nil {
		return g, 0
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	g = Ghosts{Site: p.site.Name, Open: len(p.ghosts)}
	for at, end := range p.ghosts {
		g.To = max(g.To, end)
		if len(p.ghosts) <= ghostsTold {
			g.Commits = append(g.Commits, at)
		}
	}
	slices.Sort(g.Commits)
	return g, p.reversed
}

// ghostLoop has the ghosts reversed: this site's own as the peer tells of them, and the peer's when it says so.
func (p *peer) ghostLoop(ctx context.Context, in *incoming) error {
	t := time.NewTicker(ghostEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		k := p.n.keeper
		k.mu.Lock()
		out, haunts := !k.began.IsZero() && !k.reg.Has(p.n.self.Name), len(p.ghosts) > 0
		k.mu.Unlock()
		if !out && !haunts {
			continue
		}
		_, d, err := p.statusThere(ctx)
		if err == nil && out {
			err = p.reverse(ctx, in, d)
		}
		if err == nil && haunts {
			err = p.laid(ctx, d)
		}
		if err != nil && ctx.Err() == nil {
			p.log.Debug("ghosts", "error", err)
		}
	}
}

// reverse lets this site's rows be made equal to the peer's, which says that some of this site's transactions do not count.
func (p *peer) reverse(ctx context.Context, in *incoming, d DatabaseStatus) error {
	for _, g := range d.Ghosts {
		_, done := p.toldGhosts()
		if g.Site != p.n.self.Name || g.Open == 0 || g.To <= done || p.missing.Load() != nil {
			continue
		}
		if !p.claimMissing() {
			return fmt.Errorf("%s lacks what this site wrote, so that nothing can be reversed here yet", p.site.Name)
		}
		at := in.worker.Status().Applied
		var declared catalog.Gap
		if err := writeDurably(p.n.ghostFile(), []byte(max(g.To, done).String())); err != nil {
			p.missing.Store(nil)
			return err
		}
		err := p.n.withSQL(ctx, func(c *pgconn.PgConn) (err error) {
			declared, err = catalog.DeclareGap(ctx, c, catalog.Gap{
				Origin: p.site.ID, Peer: p.n.self.ID, From: at, To: at, Reason: ghostsReason + g.To.String(),
			})
			return err
		})
		if err != nil {
			p.missing.Store(nil)
			return err
		}
		p.missing.Store(&declared)
		p.n.ready.Load().capture.bindSeen(p.site.ID, declared.From)
		text := fmt.Sprintf("%d transactions that this site committed while it was left out do not count; its rows are made equal to those of %s", g.Open, p.site.Name)
		p.log.Warn(text)
		p.n.event("ghosts", text)
	}
	return nil
}

// ghostsReason begins the reason of a gap that stands for ghosts; the end of the last of them follows.
const ghostsReason = "transactions of this site do not count, up to "

// ghostFile holds the end of the last own transaction that does not count, beside the journal that still has it: the database,
// where it has been reversed, may be set back.
func (n *node) ghostFile() string { return n.dir("ghosts.lsn") }

// noGhosts makes sure that no own transaction after a position is one that does not count. It would be given back as well, and
// the other site, which has taken it for reversed, would not tell.
func (n *node) noGhosts(after wal.LSN) error {
	b, err := os.ReadFile(n.ghostFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	to := wal.LSN(0)
	if err == nil {
		to, err = wal.ParseLSN(string(b))
	}
	if err != nil {
		return fmt.Errorf("read which transactions of this site do not count: %w", err)
	}
	if to <= after {
		return nil
	}
	return &hinted{
		fmt.Sprintf("of this site's transactions after %s, which the database lacks, some do not count, the last of them up to %s: they cannot be given back", after, to),
		"empty this site and join it again (docs/guide/runbook.md)",
	}
}

// reversedAll puts down that the ghosts that a repaired gap stood for are reversed.
func (p *peer) reversedAll(ctx context.Context, g catalog.Gap) error {
	var to string
	if _, err := fmt.Sscanf(g.Reason, ghostsReason+"%s", &to); err != nil || p.n.keeper == nil {
		return nil // it stood for something else
	}
	lsn, err := wal.ParseLSN(to)
	if err != nil {
		return err
	}
	if err := p.n.withSQL(ctx, func(c *pgconn.PgConn) error { return catalog.SetMeta(ctx, c, p.reversedKey(), to) }); err != nil {
		return err
	}
	p.n.keeper.mu.Lock()
	defer p.n.keeper.mu.Unlock()
	p.reversed = max(p.reversed, lsn)
	return nil
}

// laid notes the peer's ghosts that it has reversed, as it says.
func (p *peer) laid(ctx context.Context, d DatabaseStatus) error {
	to := wal.LSN(0)
	for _, r := range d.Reversed {
		if r.Site == p.n.self.Name {
			to = r.LSN
		}
	}
	if to == 0 {
		return nil
	}
	err := p.n.withSQL(ctx, func(c *pgconn.PgConn) error {
		_, err := pg.Query(ctx, c, "UPDATE duri.ghost SET reversed = now() WHERE origin = $1::int2 AND end_lsn <= $2::pg_lsn AND reversed IS NULL",
			strconv.Itoa(int(p.site.ID)), to.String())
		return err
	})
	if err != nil {
		return fmt.Errorf("note that ghosts are reversed: %w", err)
	}
	k := p.n.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	for at, end := range p.ghosts {
		if end <= to {
			delete(p.ghosts, at)
		}
	}
	return nil
}

// OutcomeRequest asks for the fate of another site's marked transaction.
type OutcomeRequest struct {
	Database string `json:"database"`
	Origin   string `json:"origin"` // the site that it was sent to
	LTXID    []byte `json:"ltxid"`
}

// OutcomeReport is the answer; it never changes.
type OutcomeReport struct {
	Committed bool `json:"committed"`
}

// outcome settles the fate of a marked transaction whose site was left out: everything that may have been acknowledged of it is
// here, as the freeze before the take-over has seen to, so that what is not here is decided against.
func (a *Agent) outcome(ctx context.Context, req OutcomeRequest) (out OutcomeReport, err error) {
	p, err := a.peerOf(req)
	if err != nil {
		return out, err
	}
	in := p.live.Load()
	if a.keeper == nil || in == nil || len(p.n.peers) != 1 {
		return out, &hinted{"the fate of a transaction cannot be told here", "it takes two sites, a register, and an open database"}
	}
	end := wal.LSN(0)
	if j, err := in.copy.Journal(); err == nil {
		end = j.End()
	}
	for in.worker.Status().Passed < end { // there it may be
		select {
		case <-ctx.Done():
			return out, fmt.Errorf("what site %s had sent is not applied yet: %w", p.site.Name, ctx.Err())
		case <-time.After(decideEvery / 5):
		}
	}
	if err := a.keeper.beginDeciding(p.site.Name); err != nil {
		return out, err
	}
	defer a.keeper.endDeciding()
	err = p.n.withSQL(ctx, func(conn *pgconn.PgConn) (err error) {
		out.Committed, err = p.n.outcomes.Decide(ctx, conn, string(req.LTXID), p.site.ID)
		return err
	})
	return out, err
}

// beginDeciding says why nothing may be decided on transactions of a site; else that site is not taken back before endDeciding,
// since what it commits as a member may be acknowledged.
func (k *keeper) beginDeciding(site string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.began.IsZero() || k.doubt:
		return &hinted{"the register is not known just now", "ask again"}
	case k.reg.Has(site):
		return &hinted{fmt.Sprintf("site %s is a member of the register: it knows itself", site), "ask there"}
	case !k.reg.Has(k.a.self.Name):
		return &hinted{"this site is left out of the register, and decides nothing", "ask at a member: " + strings.Join(k.reg.Members, ", ")}
	}
	k.deciding++
	return nil
}

func (k *keeper) endDeciding() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.deciding--
}

func (a *Agent) peerOf(req OutcomeRequest) (*peer, error) {
	for _, n := range a.nodes {
		for _, p := range n.peers {
			if n.database.Name == req.Database && p.site.Name == req.Origin {
				return p, nil
			}
		}
	}
	return nil, &hinted{fmt.Sprintf("there is no site %q with a database %q here", req.Origin, req.Database), "the sites and databases are those of duri.yaml"}
}

func (a *Agent) postOutcome(w http.ResponseWriter, r *http.Request) {
	var req OutcomeRequest
	err := json.NewDecoder(r.Body).Decode(&req)
	var out OutcomeReport
	if err == nil {
		out, err = a.outcome(r.Context(), req)
	}
	if err != nil {
		writeError(w, http.StatusConflict, err)
		return
	}
	writeJSON(w, http.StatusOK, out)
}
