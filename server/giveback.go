package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/decode"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/wal"
)

// When the database beside the agent is an earlier state of the one that the journal was written from, because a standby that
// was behind took over or an older data directory was put back, the journal is not behind it but ahead (docs/adr/0008):
//
//	identity differs --recognise--> take leave --> turn --> give back --> open
//	                     |             |            |          |
//	                     |             |            |          own transactions (Back, End], and between them the other sites'
//	                     |             |            |          ones, in the order in which they were committed here first
//	                     |             |            the journal goes on as another incarnation, which the copies follow
//	                     |             WAL beyond all positions that were ever given, and a new slot
//	                     or the direction stops, as it does when anything is missing
//
// Nothing of it is kept in memory alone: what is left to do follows from the journal's turns, from duri.applied, whose rows of
// this site are written with what is given back, and from duri.meta.

// metaGivenBack is the position up to which everything was given back to this database.
const metaGivenBack = "given_back"

// givingBack is what is being given back.
type givingBack struct {
	why string // for clients and operators

	mu     sync.Mutex             // guards the rest
	limits map[wal.SiteID]wal.LSN // how far the other sites may be applied
}

func (b *givingBack) limit(site wal.SiteID) wal.LSN {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.limits[site]
}

func (b *givingBack) allow(seen []wal.Seen) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range seen {
		b.limits[s.Site] = max(b.limits[s.Site], s.LSN)
	}
}

// behindJournal says why the database must not be used yet; empty when it is what it should be.
func (n *node) behindJournal() string {
	if b := n.back.Load(); b != nil {
		return b.why
	}
	return ""
}

// setBehind keeps clients out, and this site from acknowledging anything.
func (n *node) setBehind(why string) {
	n.back.Store(&givingBack{why: why, limits: map[wal.SiteID]wal.LSN{}})
	n.keeper.stir()
}

func (n *node) lacks(after wal.LSN) string {
	return fmt.Sprintf("database %s was set back: it is given back this site's transactions after %s", n.database.Name, after)
}

// loadBehind finds out at the start whether something is still to be given back.
func (n *node) loadBehind(ctx context.Context, j *journal.Journal) error {
	turns, err := n.pending(ctx, j)
	if err == nil && len(turns) > 0 {
		n.setBehind(n.lacks(turns[0].Back))
	}
	return err
}

// observe adds to what a server says of itself what is needed to compare it with the journal.
func (n *node) observe(ctx context.Context, c *captured, conn *pgconn.PgConn, id decode.Identity) (want decode.Expected, got decode.Observed, err error) {
	st, inc := c.journal.State(), c.journal.Current().Incarnation
	want = decode.Expected{SystemID: inc.SystemID, Timeline: inc.Timeline, Slot: inc.Slot, Start: st.Start, End: st.End, Seen: st.Seen}
	got.Identity = id
	if len(c.journal.Current().Turns) > 0 {
		want.Made = inc.CreatedLSN
	}
	pending, err := n.pending(ctx, c.journal)
	if err != nil {
		return want, got, err
	}
	if len(pending) > 0 {
		want.Seen = nil
	}
	applied, err := n.progress(ctx)
	if err != nil {
		return want, got, err
	}
	for _, p := range n.peers {
		r := decode.Restored{Site: p.site.Name, ID: p.site.ID, Applied: positionOf(applied, p.site.ID)}
		if j, err := p.live.Load().copy.Journal(); err == nil {
			if h := j.Header(); r.Applied > 0 || h.Txns > 0 {
				r.Kept = h.From
			}
		}
		got.Restored = append(got.Restored, r)
	}
	if !decode.NeedsPresent(want, got) {
		return want, got, nil
	}
	if id.Timeline > want.Timeline {
		got.History, err = decode.History(ctx, conn, id.Timeline)
		return want, got, err
	}
	got.Present, got.PresentKnown, err = n.present(ctx, c.journal, id.Flush)
	return want, got, err
}

// present finds the last journalled transaction that the database has: one with its number and its commit time. What was
// committed before it is there as well, and what was committed later is not.
func (n *node) present(ctx context.Context, j *journal.Journal, flush wal.LSN) (at wal.LSN, known bool, err error) {
	from := min(flush, j.End())
	for {
		h, err := j.HeaderAt(from)
		if err != nil {
			return 0, false, nil //nolint:nilerr // it is kept no more
		}
		if at, known, err = n.presentIn(ctx, j, h.From, from); err != nil || known {
			return at, known, err
		}
		if h.Txns == 0 {
			return h.From, true, nil // there was none before
		}
		if from = h.Previous; from == 0 {
			return 0, false, nil
		}
	}
}

// presentIn is present for the transactions of (from, to] and those around.
func (n *node) presentIn(ctx context.Context, j *journal.Journal, from, to wal.LSN) (at wal.LSN, known bool, err error) {
	r, err := j.NewReader(from)
	if err != nil {
		return 0, false, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	r.TrustChain()
	const some = 1000
	var txns []*wal.Txn
	look := func() error {
		last, ok, err := n.lastCommitted(ctx, txns)
		if ok {
			at, known = last, true
		}
		txns = txns[:0]
		return err
	}
	for {
		rec, ok, err := r.TryNext()
		if err != nil {
			return 0, false, err
		}
		if !ok || rec.To > to {
			err = look()
			return at, known, err
		}
		if rec.Txn != nil {
			txns = append(txns, &wal.Txn{XID: rec.Txn.XID, CommitTime: rec.Txn.CommitTime, EndLSN: rec.Txn.EndLSN})
		}
		if len(txns) == some {
			if err := look(); err != nil {
				return 0, false, err
			}
		}
	}
}

// lastCommitted is the end of the last of some transactions that the database has.
func (n *node) lastCommitted(ctx context.Context, txns []*wal.Txn) (last wal.LSN, ok bool, err error) {
	if len(txns) == 0 {
		return 0, false, nil
	}
	var list strings.Builder
	for i, t := range txns {
		fmt.Fprintf(&list, ",(%d,'%d'::xid,'%s'::timestamptz)", i, t.XID, t.CommitTime)
	}
	err = n.withSQL(ctx, func(c *pgconn.PgConn) error {
		rows, err := pg.Rows(ctx, c, "SELECT max(t.i) FROM (VALUES "+list.String()[1:]+") AS t(i, x, at) WHERE pg_catalog.pg_xact_commit_timestamp(t.x) = t.at")
		if err != nil || rows[0][0] == "" {
			return err
		}
		i, err := strconv.Atoi(rows[0][0])
		if err == nil {
			last, ok = txns[i].EndLSN, true
		}
		return err
	})
	if err != nil {
		err = fmt.Errorf("look for the last transaction of this site that the database has: %w", err)
	}
	return last, ok, err
}

// reconcile compares the server with the journal and, when it is an earlier state of the same database, lets the journal go
// on with it. It returns nil when streaming may begin at the journal's end.
func (n *node) reconcile(ctx context.Context, c *captured, conn *pgconn.PgConn) error {
	id, err := decode.Observe(ctx, conn, Slot(n.database.Name))
	if err != nil {
		return err
	}
	if err := c.capture.passSlot(); err != nil {
		return err
	}
	want, got, err := n.observe(ctx, c, conn, id)
	if err != nil {
		return err
	}
	v := decode.Recognise(want, got)
	n.stopped.Store(v.Err != nil)
	switch v.Action {
	case decode.Resume:
		if n.back.Load() != nil { // what is left to do, or nothing when the server that was is back
			wake(n.turned)
		}
	case decode.GiveBack, decode.Continue:
		if err := n.turn(ctx, c, conn, id, got.Restored, v); err != nil {
			return err
		}
	default:
		return v.Err
	}
	n.known.Store(true)
	n.fitted.Store(true)
	return nil
}

// turn lets the journal go on with a database that has this site's transactions up to v.From only. Until the journal has
// turned nothing is lost by an interruption: it begins again.
func (n *node) turn(ctx context.Context, c *captured, conn *pgconn.PgConn, id decode.Identity, restored []decode.Restored, v decode.Verdict) error {
	why := n.lacks(v.From)
	n.setBehind(why)
	if err := n.noGhosts(v.From); err != nil {
		return err
	}
	if err := n.haveAll(ctx, c); err != nil {
		return err
	}
	again := n.haltWorkers() // none may still be busy with the server that was
	defer again()
	at := id.Confirmed
	if v.Action == decode.GiveBack {
		var err error
		if at, err = n.newSlot(ctx, conn, id, v); err != nil {
			if _, ok := errors.AsType[*decode.GapError](err); ok {
				n.stopped.Store(true)
				n.back.Store(nil)
			}
			return err
		}
	}
	n.setState(stateBehind)
	n.log.Warn(why, "database", n.database.Name, "timeline", id.Timeline, "from", v.From.String(), "to", v.To.String())
	slot := Slot(n.database.Name)
	if err := c.local.SetBack(v.From, v.To); err != nil {
		return err
	}
	next := journal.Incarnation{SystemID: id.SystemID, Timeline: id.Timeline, Database: n.database.Name, Slot: slot, CreatedLSN: at}
	if err := c.journal.Turn(next, v.From); err != nil {
		return err
	}
	c.capture.restart()
	c.mesh.RestartAt(n.self.ID, 0)
	for _, r := range restored {
		c.mesh.RestartAt(r.ID, r.Applied)
	}
	if err := c.capture.passSlot(); err != nil {
		return err
	}
	n.event("turn", fmt.Sprintf("the journal goes on as %s; the database had this site's transactions up to %s, the journal up to %s", next, v.From, v.To))
	wake(n.turned)
	return nil
}

// haveAll makes sure that the own journal has all that the other sites have of it. In the process that has shipped it that is so.
// After a restart it may not be: what was shipped but not on this site's disk yet is lost with the machine, and could be decoded
// again only from the server that was.
func (n *node) haveAll(ctx context.Context, c *captured) error {
	if n.fitted.Load() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, askMax)
	defer cancel()
	for _, p := range n.peers {
		has, err := p.hasOfOurs(ctx)
		if err != nil {
			return &hinted{
				fmt.Sprintf("whether site %s has more of this site's transactions than the journal here is not known: %v", p.site.Name, err),
				"it goes on by itself when that site's agent answers",
			}
		}
		if end := c.journal.End(); has > end {
			return &hinted{
				fmt.Sprintf("site %s has this site's transactions up to %s, the journal here only up to %s, and the database was set back: they differ", p.site.Name, has, end),
				"bring the newest " + n.dir(n.self.Name) + " back, or re-join this site (docs/guide/runbook.md)",
			}
		}
	}
	return nil
}

// hasOfOurs asks the peer how far its copy of this site's journal reaches.
func (p *peer) hasOfOurs(ctx context.Context) (wal.LSN, error) {
	doc, err := p.client.Status(ctx)
	if err != nil {
		return 0, err
	}
	var st SiteStatus
	if err := json.Unmarshal(doc, &st); err != nil {
		return 0, fmt.Errorf("read its status: %w", err)
	}
	for _, d := range st.Databases {
		if d.Name != p.n.database.Name || d.State == stateStarting || d.State == stateWaiting {
			continue
		}
		for _, l := range d.Links {
			if l.From == p.n.self.Name {
				return l.Received.End, nil
			}
		}
	}
	return 0, fmt.Errorf("its database %s is not open", p.n.database.Name)
}

// newSlot makes a slot beyond the positions of the journal, on a server that was set back: no position that this site has ever
// given may be given again. What was written since the server was set back is in no slot, so it must be nothing.
func (n *node) newSlot(ctx context.Context, conn *pgconn.PgConn, id decode.Identity, v decode.Verdict) (at wal.LSN, err error) {
	slot := Slot(n.database.Name)
	written, err := decode.NewWritten(ctx, conn, Publication, v.From)
	if err != nil {
		return 0, err
	}
	for to := wal.LSN(0); to <= v.To; { // in steps, as the server removes WAL that it needs no more
		if to, err = n.fill(ctx, v.To); err != nil {
			return 0, fmt.Errorf("pass the positions up to %s: %w", v.To, err)
		}
		if err := n.unwritten(ctx, written, id, v, to); err != nil {
			return 0, err
		}
	}
	if id.Exists {
		if err := decode.DropSlot(ctx, conn, slot); err != nil {
			return 0, fmt.Errorf("drop the slot of the earlier state: %w", err)
		}
	}
	if at, err = decode.CreateSlot(ctx, conn, slot); err != nil {
		return 0, fmt.Errorf("create slot %s: %w", slot, err)
	}
	if err := n.emit(ctx, "turn"); err != nil { // flushes what the slot begins at
		return 0, err
	}
	return at, n.unwritten(ctx, written, id, v, at)
}

// fill writes some WAL, as long as the server is not beyond a position, and tells how far it is flushed then.
func (n *node) fill(ctx context.Context, to wal.LSN) (at wal.LSN, err error) {
	const piece, most = 1 << 20, 64
	err = n.withSQL(ctx, func(c *pgconn.PgConn) error {
		rows, err := pg.Rows(ctx, c, "SELECT pg_catalog.pg_current_wal_insert_lsn()")
		if err != nil {
			return err
		}
		if at, err = wal.ParseLSN(rows[0][0]); err != nil {
			return err
		}
		if at <= to {
			size := min(uint64(to-at)+1, piece)
			count := min((uint64(to-at)+size)/size, most)
			_, err = pg.Rows(ctx, c, fmt.Sprintf("SELECT count(pg_catalog.pg_logical_emit_message(false, 'duri.turn', pg_catalog.repeat('x', %d))) FROM pg_catalog.generate_series(1, %d)", size, count))
		}
		return err
	})
	if err == nil {
		err = n.emit(ctx, "turn") // flushes it
	}
	if err != nil {
		return 0, err
	}
	err = n.withSQL(ctx, func(c *pgconn.PgConn) error {
		rows, err := pg.Rows(ctx, c, "SELECT pg_catalog.pg_current_wal_flush_lsn()")
		if err == nil {
			at, err = wal.ParseLSN(rows[0][0])
		}
		return err
	})
	return at, err
}

// unwritten makes sure that no client has changed a replicated table up to a position.
func (n *node) unwritten(ctx context.Context, written *decode.Written, id decode.Identity, v decode.Verdict, to wal.LSN) error {
	slot := Slot(n.database.Name)
	gap := func(why string) error {
		return &decode.GapError{
			Slot: slot, From: v.From, Reason: fmt.Sprintf("the server was set back to %s, and %s", v.From, why),
			Hint: "let clients in through gateway.listen only. What they wrote is not in the journal: compare with `duri verify`, then re-join this site (docs/guide/runbook.md)",
		}
	}
	conn, err := decode.Connect(ctx, n.cfg.Postgres.DSN, n.database.Name, slot+"_wal")
	if err != nil {
		return err
	}
	defer pg.Close(conn)
	if err := written.Read(ctx, conn, id.Timeline, to); err != nil {
		if ctx.Err() != nil || pg.IsConnectionError(err) {
			return err
		}
		return gap(fmt.Sprintf("whether clients have written before it had a slot again cannot be told: %v", err))
	}
	if at, ok := written.Committed(); ok {
		return gap(fmt.Sprintf("clients have written at %s, before it had a slot again", at))
	}
	return nil
}

// fits refuses a server that is not the one that the journal is of now: it is looked at first (reconcile).
func (n *node) fits(ctx context.Context, j *journal.Journal, c *pgconn.PgConn) error {
	if n.stopped.Load() {
		return nil
	}
	st, timeline := j.State(), j.Current().Timeline
	rows, err := pg.Rows(ctx, c, "SELECT pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8), pg_catalog.pg_current_wal_flush_lsn()")
	if err != nil {
		return fmt.Errorf("look whether the database is that of the journal: %w", err)
	}
	flush, err := wal.ParseLSN(rows[0][1])
	if err != nil {
		return err
	}
	fit := rows[0][0] == fmt.Sprintf("%08X", timeline) && flush >= st.End
	for _, s := range st.Seen {
		rows, err := pg.Query(ctx, c, "SELECT coalesce(max(to_lsn), '0/0') >= $2::pg_lsn FROM duri.applied WHERE origin = $1::int2", fmt.Sprint(s.Site), s.LSN.String())
		if err != nil {
			return err
		}
		fit = fit && (rows[0][0] == "t" || n.back.Load() != nil)
	}
	if !fit {
		return &hinted{"the database is not the one that the journal was written from, and is compared with it first", "see with `duri status` what becomes of it"}
	}
	return nil
}

// pending lists the turns whose ranges are not given back yet.
func (n *node) pending(ctx context.Context, j *journal.Journal) (turns []journal.Turn, err error) {
	all := j.Current().Turns
	if len(all) == 0 {
		return nil, nil
	}
	err = n.withSQL(ctx, func(c *pgconn.PgConn) error {
		done := wal.LSN(0)
		text, ok, err := catalog.Meta(ctx, c, metaGivenBack)
		if err == nil && ok {
			done, err = wal.ParseLSN(text)
		}
		turns = nil
		for i, t := range all {
			if t.End <= done {
				continue
			}
			if i > 0 { // what the turn before gives back
				t.Back = max(t.Back, all[i-1].End)
			}
			turns = append(turns, t)
		}
		return err
	})
	return turns, err
}

// giveBackLoop gives back what is pending, at the start and after each turn.
func (n *node) giveBackLoop(ctx context.Context, c *captured) error {
	for {
		err := retry(ctx, n.failed, "give back to database "+n.database.Name, longestPause, func() error { return n.giveBack(ctx, c) })
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-n.turned:
		}
	}
}

func (n *node) giveBack(ctx context.Context, c *captured) error {
	if len(c.journal.Current().Turns) == 0 && n.back.Load() == nil {
		return nil
	}
	if err := n.withSQL(ctx, func(conn *pgconn.PgConn) error { return n.fits(ctx, c.journal, conn) }); err != nil {
		return err
	}
	turns, err := n.pending(ctx, c.journal)
	if err != nil {
		return err
	}
	if len(turns) > 0 && n.back.Load() == nil {
		n.setBehind(n.lacks(turns[0].Back))
	}
	b := n.back.Load()
	if b == nil {
		return nil
	}
	begun, given := time.Now(), int64(0)
	for _, t := range turns {
		count, err := n.giveBackTurn(ctx, c, b, t)
		if given += count; err != nil {
			return err
		}
	}
	if len(turns) > 0 {
		last := turns[len(turns)-1]
		if err := n.catchUp(ctx, c, b, last); err != nil {
			return err
		}
		err := n.withSQL(ctx, func(conn *pgconn.PgConn) error {
			return catalog.SetMeta(ctx, conn, metaGivenBack, last.End.String())
		})
		if err != nil {
			return err
		}
		text := fmt.Sprintf("%d transactions up to %s were given back", given, last.End)
		n.log.Warn(text, "database", n.database.Name, "took", time.Since(begun).Round(time.Millisecond).String())
		n.event("given_back", text)
	}
	n.back.CompareAndSwap(b, nil) // unless it was set back again meanwhile
	n.mu.Lock()
	n.fault = fault{}
	n.mu.Unlock()
	n.setState(stateReady)
	n.keeper.stir()
	return nil
}

// giveBackTurn gives back the own transactions of a turn's range.
func (n *node) giveBackTurn(ctx context.Context, c *captured, b *givingBack, t journal.Turn) (given int64, err error) {
	c.mesh.GiveBack(t.End)
	w := apply.New(apply.Config{
		Site: n.self.ID, Origin: n.self.ID, OriginName: apply.RepairOriginName(n.database.Name, n.self.Name),
		SiteOf: n.siteOf, DSN: n.cfg.Postgres.DSN, Database: n.database.Name,
		Check: func(ctx context.Context, conn *pgconn.PgConn) error { return n.fits(ctx, c.journal, conn) },
		Open: func(from wal.LSN) (apply.Reader, error) {
			r, err := c.journal.NewReader(max(from, t.Back))
			if err != nil {
				return nil, fmt.Errorf("what is to be given back is kept no more: %w", err)
			}
			r.TrustChain()
			return &ownReader{r: r, b: b, mesh: c.mesh, self: n.self.ID, end: t.End}, nil
		},
		Mesh:    c.mesh,
		Barrier: func(ctx context.Context, lsn wal.LSN) error { return n.barrier(ctx, c, lsn) },
		Policy:  n.policyOf, Applied: n.touched, Clock: n.clock.Now, LockTimeout: n.cfg.Apply.LockTimeout.Std(), Logger: n.log,
	})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := w.Run(gctx); err != nil {
			return err
		}
		return gctx.Err()
	})
	g.Go(func() error {
		defer cancel()
		return until(gctx, func() bool { st := w.Status(); return min(st.Applied, st.Durable) >= t.End })
	})
	err = g.Wait()
	st := w.Status()
	if min(st.Applied, st.Durable) >= t.End {
		err = nil
	}
	return st.Transactions, err
}

// catchUp lets the other sites' transactions be applied that the journal says have been applied here when it turned last.
func (n *node) catchUp(ctx context.Context, c *captured, b *givingBack, last journal.Turn) error {
	h, err := c.journal.HeaderAt(last.End)
	if err != nil {
		return err
	}
	b.allow(h.Seen)
	return until(ctx, func() bool { return reached(c.mesh, h.Seen) })
}

// reached reports whether the other sites have been applied up to given positions.
func reached(m *apply.Mesh, seen []wal.Seen) bool {
	for _, s := range seen {
		if m.Applied(s.Site) < s.LSN {
			return false
		}
	}
	return true
}

// until waits for a condition that nothing tells of.
func until(ctx context.Context, ok func() bool) error {
	t := time.NewTicker(time.Millisecond)
	defer t.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
	return nil
}

// ownReader reads the own transactions that are given back, up to end, each when the other sites have been applied just as far
// as when it was committed first: so each finds the rows as it found them then.
type ownReader struct {
	r    *journal.Reader
	b    *givingBack
	mesh *apply.Mesh
	self wal.SiteID
	end  wal.LSN

	last wal.LSN // delivered
	seen []wal.Seen
}

// Next is that of apply.Reader.
func (o *ownReader) Next(ctx context.Context) (journal.Record, error) {
	if o.last >= o.end {
		<-ctx.Done()
		return journal.Record{}, ctx.Err()
	}
	rec, err := o.r.Next(ctx)
	if err != nil || rec.Txn == nil {
		o.last = max(o.last, rec.To)
		return rec, err
	}
	if !slices.Equal(o.seen, rec.Txn.Seen) {
		before := o.last
		if err := until(ctx, func() bool { return o.mesh.Applied(o.self) >= before }); err != nil {
			return rec, err
		}
		o.b.allow(rec.Txn.Seen)
		if err := until(ctx, func() bool { return reached(o.mesh, rec.Txn.Seen) }); err != nil {
			return rec, err
		}
		o.seen = rec.Txn.Seen
	}
	o.last = rec.To
	return rec, nil
}

// Close is that of apply.Reader.
func (o *ownReader) Close() error { return o.r.Close() }

// pacedReader keeps another site's transactions back while own ones are given back that were committed before they were
// applied here.
type pacedReader struct {
	r       *journal.Reader
	n       *node
	site    wal.SiteID
	waiting *journal.Record
}

func (p *pacedReader) may(rec *journal.Record) bool {
	b := p.n.back.Load()
	return b == nil || rec.To <= b.limit(p.site)
}

// Next is that of apply.Reader.
func (p *pacedReader) Next(ctx context.Context) (journal.Record, error) {
	if p.waiting == nil {
		rec, err := p.r.Next(ctx)
		if err != nil {
			return rec, err
		}
		p.waiting = &rec
	}
	if err := until(ctx, func() bool { return p.may(p.waiting) }); err != nil {
		return journal.Record{}, err
	}
	rec := *p.waiting
	p.waiting = nil
	return rec, nil
}

// TryNext is Next without waiting.
func (p *pacedReader) TryNext() (journal.Record, bool, error) {
	if p.waiting == nil {
		rec, ok, err := p.r.TryNext()
		if err != nil || !ok {
			return rec, false, err
		}
		p.waiting = &rec
	}
	if !p.may(p.waiting) {
		return journal.Record{}, false, nil
	}
	rec := *p.waiting
	p.waiting = nil
	return rec, true, nil
}

// Close is that of apply.Reader.
func (p *pacedReader) Close() error { return p.r.Close() }

// renamed tells a history by what transactions the own ones were given back.
func (n *node) renamed(ctx context.Context, j *journal.Journal, local *apply.History) error {
	turns := j.Current().Turns
	if len(turns) == 0 {
		return nil
	}
	for _, t := range turns {
		local.Disown(t.Back, t.End)
	}
	return n.withSQL(ctx, func(c *pgconn.PgConn) error {
		rows, err := pg.Query(ctx, c, "SELECT xid::xid, to_lsn FROM duri.applied WHERE origin = $1::int2", fmt.Sprint(n.self.ID))
		if err != nil {
			return err
		}
		for _, r := range rows {
			xid, err := strconv.ParseUint(r[0], 10, 32)
			if err != nil {
				return err
			}
			end, err := wal.ParseLSN(r[1])
			if err != nil {
				return err
			}
			local.Rename(uint32(xid), end)
		}
		return nil
	})
}
