package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/wal"
)

// A gap between two sites, from its beginning to its end (docs/concepts/durability.md):
//
//	origin                                               peer
//	b is away, and holds 95 % of the budget
//	declare: row in duri.gap, b is not taken back
//	the oldest file goes, what the history needs of it
//	stays in the past; again and again, at 65 %
//	                                                     is back: Follow says that its position is gone (resync.go)
//	                                                     row in duri.gap; what it writes from now on says that it has
//	                                                     seen the origin up to the gap, and no further
//	                                                     begins its copy anew behind the gap, and applies that
//	                                                     makes its rows equal to the origin's, until nothing differs
//	                                                     its writes say what they have seen again
//	hears of a write that has seen what is behind the
//	gap: the gap is closed, b may be taken back
//
// The origin needs its history of the gap for as long as the peer's writes have not seen it: an older write must not stand
// against a newer row, nor bring back a deleted one.

// detachAbove is how many percent of the budget a peer that is away may hold; what is left to it afterwards must be below the
// level at which it would be warned of. detachedAbove is the same once it cannot go on anyway.
const (
	detachAbove   = 95
	detachedAbove = 65
)

// awayAfter is how long a peer must not have been heard to be taken for away, where no register says so as well.
const awayAfter = 10 * time.Second

// detaching is what decides whether a peer's backlog is freed.
type detaching struct {
	policy    config.Full
	sites     int
	used, own int64 // of the budget, by all journals and by the own one
	budget    int64
	open      bool // a gap is declared and not repaired
	attached  bool // the peer follows behind it
	has       bool // it has what would be freed: only the history needs that, which remembers
	away      bool
	member    string // why the register forbids it; empty: it does not
	lacks     bool   // this site lacks something of the peer's: then its own writes must be kept
	past      int64  // bytes of the past
}

// detach tells whether the oldest of a peer's backlog is to be freed, and, where it would be time to, why not.
func detach(d detaching) (yes bool, why string) {
	if d.open && (!d.attached || d.has) {
		return d.used*100 >= detachedAbove*d.budget && d.past*2 < d.budget, ""
	}
	switch {
	case d.used*100 < detachAbove*d.budget, d.own*int64(d.sites) < d.budget:
		return false, ""
	case d.policy != config.FullDetach:
		return false, "journal.full: stop-writes frees nothing"
	case d.sites != 2:
		return false, fmt.Sprintf("with %d sites nothing is freed: this version re-synchronises two", d.sites)
	case !d.away:
		return false, "it is not away, or not for long enough"
	case d.lacks:
		return false, "this site itself lacks changes of it, so what was written here is kept"
	case d.member != "":
		return false, d.member
	}
	return d.past*2 < d.budget, ""
}

// pastDir is where the past is kept: what the history needs of the transactions that the own journal has let go of, as a
// journal of its own.
func (n *node) pastDir() string { return n.dir(n.self.Name + ".past") }

// openPast gives the past of a gap that is open; nil when nothing was let go of yet. Without such a gap it removes what is left
// of an older one.
func (n *node) openPast() (*journal.Journal, error) {
	if !n.lets() {
		if err := os.RemoveAll(n.pastDir()); err != nil {
			return nil, fmt.Errorf("remove the past of a gap that is closed: %w", err)
		}
		return nil, nil
	}
	j, err := openJournal(n.pastDir(), n.journalOptions())
	if err != nil {
		return nil, fmt.Errorf("open the past: %w", err)
	}
	return j, nil
}

// lets reports whether some peer lacks something of this site.
func (n *node) lets() bool {
	for _, p := range n.peers {
		if g := p.lacking.Load(); g != nil {
			return true
		}
	}
	return false
}

// recall fills the own history from the past and the journal. What neither holds any more is an error that holds the peers'
// changes, as they cannot be judged: forgotten.
func (n *node) recall(ctx context.Context, past, j *journal.Journal, h *apply.History, from wal.LSN) error {
	reaches := from
	if past != nil && past.Start() <= from {
		if err := rebuild(ctx, past, h, from); err != nil {
			return err
		}
		reaches = max(from, past.End())
	}
	if n.lets() && reaches < j.Start() {
		n.forgotten = &hinted{
			fmt.Sprintf("what this site did from %s to %s while %s was away is not known any more, so that older changes cannot be told from newer ones", reaches, j.Start(), n.peers[0].site.Name),
			"empty the other site and join it again (docs/guide/runbook.md)",
		}
		n.log.Error(n.forgotten.Error(), "database", n.database.Name)
	}
	return rebuild(ctx, j, h, from)
}

// remember brings the past up to a position, before the journal lets go of what lies before it.
func (n *node) remember(ctx context.Context, c *captured, to wal.LSN) error {
	if c.past == nil {
		h, err := c.journal.HeaderAt(c.journal.Start())
		if err != nil {
			return err
		}
		if err := os.RemoveAll(n.pastDir()); err != nil {
			return err
		}
		if c.past, err = journal.Create(n.pastDir(), h, n.journalOptions()); err != nil {
			return err
		}
	}
	if c.past.End() >= to {
		return nil
	}
	r, err := c.journal.NewReader(c.past.End())
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	r.TrustChain()
	var last journal.Record
	for last.To < to {
		rec, ok, err := r.TryNext()
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("the journal ends at %s", last.To)
		}
		if last = rec; rec.Txn == nil || rec.To > to {
			continue
		}
		t, err := c.local.Trace(rec.Txn)
		if err == nil {
			err = c.past.AppendTxn(t)
		}
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if err := c.past.AppendPosition(to, nil, n.clock.Now()); err != nil {
		return err
	}
	return c.past.Sync()
}

// letGo frees the oldest file of the own journal although a peer needs it. Each step may be the last one before a crash: what is
// declared and not freed is no hole, and what is freed is declared and remembered.
func (n *node) letGo(ctx context.Context, c *captured, p *peer) error {
	from, to, ok := c.journal.Oldest()
	if !ok {
		return nil
	}
	if err := n.remember(ctx, c, to); err != nil {
		return fmt.Errorf("remember what the journal lets go of: %w", err)
	}
	known := p.lacking.Load()
	g := catalog.Gap{
		Origin: n.self.ID, Peer: p.site.ID, From: min(max(from, p.acked().Durable), to), To: to,
		Reason: fmt.Sprintf("%s used %d %% of journal.budget (%s)", p.standing(time.Now()), detachAbove, term.Size(n.share())),
	}
	err := n.withSQL(ctx, func(conn *pgconn.PgConn) (err error) {
		g, err = catalog.DeclareGap(ctx, conn, g)
		return err
	})
	if err != nil {
		return err
	}
	p.lacking.Store(&g)
	if known == nil || known.ID == 0 {
		text := fmt.Sprintf("gap: site %s lacks what this site wrote after %s, as that is freed (%s); it re-synchronises by itself when it is back", p.site.Name, g.From, g.Reason)
		n.log.Error(text, "database", n.database.Name)
		n.event("gap", text)
	}
	return c.journal.Prune(to)
}

// makeRoomFor is how long files are freed at a time: the budget is to be looked at meanwhile.
const makeRoomFor = 100 * time.Millisecond

// makeRoom frees what a peer that is away holds, as journal.full says. sizes are those of the journals, the own one's first.
func (n *node) makeRoom(ctx context.Context, now time.Time, c *captured, sizes []int64) {
	began := time.Now()
	for more := true; more && time.Since(began) < makeRoomFor; {
		more = n.makeRoomOnce(ctx, now, c, sizes)
		sizes[0] = c.ownBytes()
	}
}

// makeRoomOnce frees a file, if one is to be freed.
func (n *node) makeRoomOnce(ctx context.Context, now time.Time, c *captured, sizes []int64) (freed bool) {
	p := n.slowest(c)
	_, to, ok := c.journal.Oldest()
	if p == nil || !ok || to <= min(p.acked().Durable, p.seen()) {
		return false
	}
	total := int64(0)
	for _, s := range sizes {
		total += s
	}
	d := detaching{
		policy: n.cfg.Journal.Full, sites: len(n.cfg.Sites), used: total, own: sizes[0], budget: n.share(),
		lacks: p.missing.Load() != nil,
	}
	patience := awayAfter
	if n.keeper != nil {
		patience = link.DefaultSilence
	}
	d.away = p.awayFor(now, c) >= patience
	if c.past != nil {
		d.past = c.past.State().DiskBytes
	}
	if g := p.lacking.Load(); g != nil && g.ID != 0 {
		d.open, d.attached, d.has = true, p.acked().Durable >= g.To, p.acked().Durable >= to
	}
	if yes, _ := detach(d); yes && !d.open {
		d.member = n.keeper.release(p)
	}
	yes, why := detach(d)
	p.mu.Lock()
	p.kept = why
	p.mu.Unlock()
	if !yes {
		p.unrelease()
		return false
	}
	if err := n.letGo(ctx, c, p); err != nil {
		p.unrelease()
		if ctx.Err() == nil {
			p.note(&p.gapFault, "free the journal", err)
		}
		return false
	}
	return true
}

// unrelease takes release back when no gap was declared.
func (p *peer) unrelease() {
	if g := p.lacking.Load(); g != nil && g.ID == 0 {
		p.lacking.CompareAndSwap(g, nil)
	}
}

// release makes sure that a peer is no member and cannot become one from now on, so that what it lacks may be freed; it says
// why not. A gap without a number stands for the one that is about to be declared.
func (k *keeper) release(p *peer) (why string) {
	const both = "this site itself lacks changes of it, so what was written here is kept"
	if k == nil {
		if !p.claimLacking() {
			return both
		}
		return ""
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	_, arming := k.arming[p.site.Name]
	switch {
	case k.began.IsZero() || k.doubt:
		return "what the register says now is not known here"
	case !k.reg.Has(k.a.self.Name):
		return "this site is left out of the register, so that what it wrote may be nowhere else"
	case k.reg.Has(p.site.Name):
		return p.site.Name + " is a member in the register still"
	case arming:
		return p.site.Name + " is about to be a member again"
	case !p.claimLacking():
		return both
	}
	return ""
}

// awayFor is since when a peer has not been heard.
func (p *peer) awayFor(now time.Time, c *captured) time.Duration {
	at := c.opened
	if in := p.live.Load(); in != nil {
		if _, heard := in.copy.Heard(); heard.After(at) {
			at = heard
		}
	}
	return now.Sub(at)
}

// settleGaps closes the gaps whose peers have everything again: what they write has seen what lies behind the gap.
func (n *node) settleGaps(ctx context.Context, c *captured) {
	for _, p := range n.peers {
		g := p.lacking.Load()
		if g == nil || g.ID == 0 || p.seen() < g.To || p.acked().Durable < g.To {
			continue
		}
		err := n.withSQL(ctx, func(conn *pgconn.PgConn) error {
			_, err := catalog.GapRepaired(ctx, conn, g.ID, 0)
			return err
		})
		if err != nil {
			p.note(&p.gapFault, "close a gap", err)
			continue
		}
		p.lacking.Store(nil)
		p.mu.Lock()
		p.gapFault = fault{}
		p.mu.Unlock()
		text := fmt.Sprintf("gap closed: site %s has everything again that this site wrote from %s to %s", p.site.Name, g.From, g.To)
		n.log.Warn(text, "database", n.database.Name)
		n.event("gap_repaired", text)
	}
	if c.past != nil && !n.lets() {
		err := c.past.Close()
		c.past = nil
		if rerr := os.RemoveAll(n.pastDir()); err == nil {
			err = rerr
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			n.log.Warn("remove the past of a gap that is closed", "database", n.database.Name, "error", err)
		}
	}
}

// openGaps reads the gaps that are open.
func (n *node) openGaps(ctx context.Context) error {
	return n.withSQL(ctx, func(c *pgconn.PgConn) error {
		all, err := catalog.Gaps(ctx, c)
		if err != nil {
			return err
		}
		for _, p := range n.peers {
			p.lacking.Store(nil)
			p.missing.Store(nil)
			p.mended.Store(nil)
			for _, g := range all {
				switch {
				case g.Origin == n.self.ID && g.Peer == p.site.ID && !g.Repaired:
					p.lacking.Store(&g)
				case g.Origin == p.site.ID && g.Peer == n.self.ID && !g.Repaired:
					p.missing.Store(&g)
				case g.Origin == p.site.ID && g.Peer == n.self.ID:
					p.mended.Store(&g)
				}
			}
		}
		return nil
	})
}
