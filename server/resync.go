package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/verify"
	"github.com/duri-io/duri/wal"
)

// mending is what a peer's gap looks like from here while this site's rows are made equal to the peer's.
type mending struct {
	progress verify.Progress
	waits    string // why nothing is compared just now
	problem  fault  // why it does not come to an end
	// refused are rows that PostgreSQL did not take as they shall be, in passes in a row that mended nothing.
	refused map[string]int
}

// GapStatus is a hole between two sites that is open: what Origin wrote from From to To, Peer never received.
type GapStatus struct {
	Origin   string    `json:"origin"`
	Peer     string    `json:"peer"`
	From     wal.LSN   `json:"from"`
	To       wal.LSN   `json:"to"`
	Reason   string    `json:"reason"`
	Declared time.Time `json:"declared_at"`
	// The rest is known at the peer.
	Passes   int              `json:"passes,omitempty"`  // comparisons of all tables that ended
	Written  int64            `json:"written,omitempty"` // rows that were made equal
	Removed  int64            `json:"removed,omitempty"` // rows that the origin has no more
	Progress *verify.Progress `json:"progress,omitempty"`
	Waits    string           `json:"waits,omitempty"` // why nothing is compared just now
	Problem  *fault           `json:"problem,omitempty"`
}

// Sentence tells of the gap at the site that reports it.
func (g GapStatus) Sentence(site string) string {
	if site == g.Origin {
		return fmt.Sprintf("gap since %s: %s lacks what %s wrote from %s to %s (%s)", g.Declared.Local().Format("2006-01-02 15:04:05"), g.Peer, g.Origin, g.From, g.To, g.Reason)
	}
	text := "re-synchronising from " + g.Origin
	switch {
	case g.Waits != "":
		text += ", waiting: " + g.Waits
	case g.Progress != nil && g.Progress.Table != "":
		text += fmt.Sprintf(": table %s, %d of %d rows compared", g.Progress.Table, g.Progress.Rows, g.Progress.RowsTotal)
	}
	return text + fmt.Sprintf("; %d rows written and %d removed so far, %d passes done", g.Written, g.Removed, g.Passes)
}

// gaps are the holes that are open, as this site knows them.
func (n *node) gaps() (all []GapStatus) {
	for _, p := range n.peers {
		if g := p.lacking.Load(); g != nil && g.ID != 0 {
			s := GapStatus{Origin: n.self.Name, Peer: p.site.Name, From: g.From, To: g.To, Reason: g.Reason, Declared: g.Declared.UTC()}
			p.mu.Lock()
			if f := p.gapFault; f.Text != "" {
				s.Problem = &f
			}
			p.mu.Unlock()
			all = append(all, s)
		}
		if g := p.missing.Load(); g != nil && g.ID != 0 {
			s := GapStatus{
				Origin: p.site.Name, Peer: n.self.Name, From: g.From, To: g.To, Reason: g.Reason, Declared: g.Declared.UTC(),
				Passes: g.Passes, Written: g.Written, Removed: g.Removed,
			}
			p.mu.Lock()
			progress := p.mending.progress
			s.Progress, s.Waits = &progress, p.mending.waits
			if f := p.mending.problem; f.Text != "" {
				s.Problem = &f
			}
			p.mu.Unlock()
			all = append(all, s)
		}
	}
	return all
}

// errAnew is why the worker rests for a moment.
var errAnew = errors.New("the copy of the journal begins anew behind a gap")

// claimMissing makes this site the one that lacks something; false when the peer lacks something of this site, too.
func (p *peer) claimMissing() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lacking.Load() != nil {
		return false
	}
	p.missing.CompareAndSwap(nil, &catalog.Gap{})
	return true
}

// claimLacking is the other way round.
func (p *peer) claimLacking() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.missing.Load() != nil {
		return false
	}
	p.lacking.CompareAndSwap(nil, &catalog.Gap{})
	return true
}

// goOnBehind takes up the peer's journal behind a gap, when what comes next in this site's copy is no longer kept there and the
// peer says that it has declared that a gap. Every other error stays what it is. Each step may be repeated.
func (p *peer) goOnBehind(ctx context.Context, w *link.CopyWriter, cause error) error {
	refused, ok := errors.AsType[*link.Error](cause)
	if !ok || !errors.Is(cause, link.ErrPruned) || refused.Start == 0 || len(p.n.peers) != 1 {
		return cause
	}
	switch declared, err := p.declaredThere(ctx); {
	case err != nil:
		return err
	case !declared:
		return cause
	}
	p.gapMu.Lock()
	defer p.gapMu.Unlock()
	if !p.claimMissing() {
		return &hinted{
			fmt.Sprintf("%v; and %s lacks what this site wrote: both went on alone for so long that neither can be made equal to the other", cause, p.site.Name),
			"decide whose rows stay, and join the other site again (docs/guide/runbook.md)",
		}
	}
	defer func() { // nothing was declared after all
		if g := p.missing.Load(); g != nil && g.ID == 0 {
			p.missing.Store(nil)
		}
	}()
	known := p.missing.Load()
	_, _, end := w.Position()
	var g catalog.Gap
	err := p.n.withSQL(ctx, func(c *pgconn.PgConn) (err error) {
		g, err = catalog.DeclareGap(ctx, c, catalog.Gap{
			Origin: p.site.ID, Peer: p.n.self.ID, From: end, To: refused.Start,
			Reason: fmt.Sprintf("this site was away for so long that %s has freed it", p.site.Name),
		})
		return err
	})
	if err != nil {
		return err
	}
	p.missing.Store(&g)
	p.n.ready.Load().capture.bindSeen(p.site.ID, g.From)
	if known.ID == 0 {
		text := fmt.Sprintf("gap: this site lacks what %s wrote from %s to %s (%s); it re-synchronises now", p.site.Name, g.From, g.To, g.Reason)
		p.log.Error(text)
		p.n.event("gap", text)
	}
	p.applying.set(errAnew)
	defer p.applying.set(nil)
	p.anew.Lock()
	defer p.anew.Unlock()
	if err := p.n.withSQL(ctx, func(c *pgconn.PgConn) error { return catalog.BeginAnew(ctx, c, g) }); err != nil {
		return err
	}
	return w.BeginAnew(g.To)
}

// declaredThere asks the peer whether it has declared a gap for this site: only then it does not take this site back before the
// gap is repaired.
func (p *peer) declaredThere(ctx context.Context) (bool, error) {
	_, d, err := p.statusThere(ctx)
	if err != nil {
		return false, err
	}
	for _, g := range d.Gaps {
		if g.Origin == p.site.Name && g.Peer == p.n.self.Name {
			return true, nil
		}
	}
	return false, nil
}

// statusThere asks the peer's agent about this database, and when it answered.
func (p *peer) statusThere(ctx context.Context) (at time.Time, d DatabaseStatus, err error) {
	ctx, cancel := context.WithTimeout(ctx, askMax)
	defer cancel()
	b, err := p.client.Status(ctx)
	if err != nil {
		return at, d, err
	}
	var s SiteStatus
	if err := json.Unmarshal(b, &s); err != nil {
		return at, d, fmt.Errorf("read the status of %s: %w", p.site.Name, err)
	}
	for _, d := range s.Databases {
		if d.Name == p.n.database.Name {
			return s.At, d, nil
		}
	}
	return at, d, fmt.Errorf("site %s does not tell of database %s", p.site.Name, p.n.database.Name)
}

// openCopy opens the copy of the peer's journal. Behind a gap it goes on with what an interrupted goOnBehind had begun.
func (p *peer) openCopy(ctx context.Context, c link.CopyConfig, applied []wal.Seen) (*link.CopyWriter, error) {
	g := p.missing.Load()
	if g == nil {
		return link.OpenCopy(c)
	}
	if positionOf(applied, p.site.ID) < g.To {
		err := p.n.withSQL(ctx, func(conn *pgconn.PgConn) error { return catalog.BeginAnew(ctx, conn, *g) })
		if err != nil {
			return nil, err
		}
	}
	c.From = g.To
	w, err := link.OpenCopy(c)
	if err != nil {
		return nil, err
	}
	if _, have, end := w.Position(); have && end < g.To {
		if err := w.BeginAnew(g.To); err != nil {
			return nil, errors.Join(err, w.Close())
		}
	}
	return w, nil
}

// mendEvery is how long is rested between two passes, and before trying again.
const mendEvery = time.Second

// mendLoop makes this site's rows equal to the peer's while something is missing.
func (p *peer) mendLoop(ctx context.Context, in *incoming) error {
	t := time.NewTicker(mendEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		g := p.missing.Load()
		if g == nil || g.ID == 0 {
			continue
		}
		if err := p.mend(ctx, in, *g); err != nil && ctx.Err() == nil {
			p.mendFault("re-synchronise from "+p.site.Name, err)
		}
	}
}

func (p *peer) mendFault(what string, err error) {
	f := newFault(what, err)
	p.mu.Lock()
	news := p.mending.problem.Text != f.Text
	p.mending.problem = f
	p.mu.Unlock()
	if news {
		p.log.Warn(f.Text, "hint", f.Hint)
	}
}

// mend compares all tables once and writes the peer's rows where this site's differ. Whatever either has written itself by then
// has been applied at the other and judged there, before a row counts as different (verify.Settle): so the peer's row is right,
// and a row that it lacks was deleted. When nothing differs, the gap is repaired.
func (p *peer) mend(ctx context.Context, in *incoming, g catalog.Gap) error {
	why := p.busy()
	if applied := in.worker.Status().Applied; why == "" && applied < g.To {
		why = fmt.Sprintf("what %s wrote behind the gap is not here yet", p.site.Name)
	}
	p.mu.Lock()
	news := p.mending.waits != why
	p.mending.waits = why
	refused := p.mending.refused
	p.mu.Unlock()
	if why != "" {
		if news {
			p.log.Info("re-synchronising waits", "from", p.site.Name, "why", why)
		}
		return nil
	}
	if err := p.n.withSQL(ctx, func(c *pgconn.PgConn) error { return catalog.UnparkForGap(ctx, c, g.ID) }); err != nil {
		return err
	}
	rows, err := p.ghostRows(ctx, g)
	if err != nil {
		return err
	}
	o := verify.RepairOptions{
		Apply: true, From: p.site.Name, Settle: p.settle, Sites: [2]wal.SiteID{p.n.self.ID, p.site.ID}, SiteName: p.n.siteName,
		Progress: func(x verify.Progress) {
			p.mu.Lock()
			p.mending.progress = x
			p.mu.Unlock()
		},
	}
	if rows != nil {
		o.Only, o.Rounds = rows.choose, 2 // what is still written then is held still
	}
	begun := time.Now()
	here := &keptSide{side: side{p.n.db, p.n}, gap: g.ID, refused: refused, count: p.countMended}
	rep, err := verify.Repair(ctx, here, p.remote(), o)
	if err != nil {
		return err
	}
	if err := p.n.withSQL(ctx, func(c *pgconn.PgConn) error { return catalog.GapPassed(ctx, c, g.ID) }); err != nil {
		return err
	}
	p.countMended(func(g *catalog.Gap) { g.Passes++ })
	p.log.Info("re-synchronising", "from", p.site.Name, "took", time.Since(begun).Round(time.Millisecond).String(), "everything", rows == nil, "made_equal", rep.Done, "left", rep.Left, "unsettled", rep.Unsettled, "problems", len(rep.Problems))
	p.mu.Lock()
	p.mending.refused = refusedBy(rep, refused)
	p.mu.Unlock()
	if err := unequal(rep); err != nil {
		return err
	}
	p.mu.Lock()
	p.mending.problem = fault{}
	p.mu.Unlock()
	if len(rep.Rows) > 0 { // the next pass is to find none
		return nil
	}
	return p.mendedAll(ctx, in, g)
}

// refusedBy counts for each row in how many passes in a row it was refused while nothing else could be mended.
func refusedBy(rep verify.RepairReport, before map[string]int) map[string]int {
	if rep.Done > 0 {
		return nil
	}
	out := map[string]int{}
	for _, x := range rep.Rows {
		if x.Refused() && len(x.Key) > 0 {
			k := rowText(x.Schema, x.Table, x.Key)
			out[k] = before[k] + 1
		}
	}
	return out
}

func rowText(schema, table string, key []string) string {
	return keyText(append([]string{schema, table}, key...))
}

// unequal says what a pass cannot mend, if so.
func unequal(rep verify.RepairReport) error {
	for _, x := range rep.Problems {
		if !x.More {
			return &hinted{fmt.Sprintf("table %s: %s", x.Table, x.Error), x.Hint}
		}
	}
	if rep.Left > 0 && rep.Done == 0 {
		for _, x := range rep.Rows {
			if x.State == verify.RepairLeft {
				text := fmt.Sprintf("%d rows cannot be written just now, the first with key (%s) in %s.%s: %s", rep.Left, strings.Join(x.Key, ", "), x.Schema, x.Table, x.Reason)
				if strings.Contains(x.Reason, "replica identity") {
					return &hinted{text, fmt.Sprintf("here, and at the other sites as well: ALTER TABLE %s.%s REPLICA IDENTITY FULL; it goes on by itself then", pg.QuoteIdent(x.Schema), pg.QuoteIdent(x.Table))}
				}
				return errors.New(text)
			}
		}
	}
	if len(rep.Rows) == 0 && rep.Unsettled > 0 {
		return fmt.Errorf("%d rows are written so often that they cannot be compared", rep.Unsettled)
	}
	return nil
}

// mendedAll ends the gap after a pass that found no difference.
func (p *peer) mendedAll(ctx context.Context, in *incoming, g catalog.Gap) error {
	if err := p.noneParked(ctx); err != nil {
		return err
	}
	p.gapMu.Lock()
	defer p.gapMu.Unlock()
	if now := p.missing.Load(); now == nil || now.ID != g.ID || now.To != g.To {
		return nil // it has grown meanwhile
	}
	applied := in.worker.Status().Applied
	if applied < g.To {
		return fmt.Errorf("what %s wrote is applied up to %s, the gap reaches to %s", p.site.Name, applied, g.To)
	}
	var done catalog.Gap
	err := p.n.withSQL(ctx, func(c *pgconn.PgConn) (err error) {
		done, err = catalog.GapRepaired(ctx, c, g.ID, applied)
		return err
	})
	if err != nil {
		return err
	}
	p.n.ready.Load().capture.freeSeen(p.site.ID, done.Resume, done.Seen)
	if err := p.reversedAll(ctx, g); err != nil {
		return err
	}
	p.mended.Store(&done)
	p.missing.Store(nil)
	p.mu.Lock()
	p.mending = mending{}
	p.mu.Unlock()
	text := fmt.Sprintf("gap repaired: this site is equal to %s again, after %d passes; %d rows were written and %d removed (duri.gap_row has them)",
		p.site.Name, done.Passes, done.Written, done.Removed)
	p.log.Warn(text)
	p.n.event("gap_repaired", text)
	return p.n.emit(ctx, "gap") // so that the peer hears of it soon
}

// noneParked makes sure that no row is hidden at either site: such a row is not compared.
func (p *peer) noneParked(ctx context.Context) error {
	there, err := p.remote().Parked(ctx)
	if err != nil {
		return err
	}
	here, err := side{p.n.db, p.n}.Parked(ctx)
	if err != nil {
		return err
	}
	if there+here > 0 {
		return &hinted{
			fmt.Sprintf("all rows that are visible are equal, but %d here and %d at %s are hidden because of a unique value, and these are not compared", here, there, p.site.Name),
			"they are in duri.parked: give the rows that hide them other values, or delete them; it goes on by itself then",
		}
	}
	return nil
}

// countMended changes the counts of the gap that this site repairs.
func (p *peer) countMended(change func(*catalog.Gap)) {
	if g := p.missing.Load(); g != nil {
		next := *g
		change(&next)
		p.missing.CompareAndSwap(g, &next)
	}
}

// keptSide is this site's side of a repair, which writes down each row before it writes over it. It is for one Repair.
type keptSide struct {
	side
	gap     int64
	refused map[string]int // see refusedBy
	count   func(func(*catalog.Gap))

	columns []verify.Column
	before  map[string][]*string // by key, as last read
}

var _ verify.Mender = (*keptSide)(nil)

// Versions is verify.Mender.Versions. It keeps what it reads: Mend comes next.
func (s *keptSide) Versions(ctx context.Context, t verify.Table, r verify.Range) ([]verify.VersionedRow, error) {
	rows, err := s.side.Versions(ctx, t, r)
	s.columns, s.before = t.Columns, map[string][]*string{}
	for _, row := range rows {
		s.before[keyText(row.Key)] = row.Image
	}
	return rows, err
}

// Mend is verify.Mender.Mend.
func (s *keptSide) Mend(ctx context.Context, t verify.Table, by verify.Digest, fixes []verify.Fix) ([]verify.Outcome, error) {
	rows := make([]catalog.GapRow, len(fixes))
	for i := range fixes {
		f := &fixes[i]
		if f.Hash != "" && s.refused[rowText(t.Schema, t.Name, f.Key)] >= 2 { // unique values have moved between rows: each waits for the other
			f.Image = nil
		}
		rows[i] = catalog.GapRow{Key: f.Key, After: byColumn(t.Columns, f.Image), Copies: f.Copies, Want: f.Want}
		if len(f.Key) > 0 {
			rows[i].Before = byColumn(s.columns, s.before[keyText(f.Key)])
		}
	}
	var ids []int64
	err := s.n.withSQL(ctx, func(c *pgconn.PgConn) (err error) {
		ids, err = catalog.NoteGapRows(ctx, c, s.gap, t.Schema, t.Name, rows)
		return err
	})
	if err != nil {
		return nil, err
	}
	out, err := s.side.Mend(ctx, t, by, fixes)
	var done []int64
	var written, removed int64
	for i, o := range out {
		if !o.Done {
			continue
		}
		done = append(done, ids[i])
		if fixes[i].Image == nil || fixes[i].Want < fixes[i].Copies {
			removed++
		} else {
			written++
		}
	}
	if len(done) > 0 {
		derr := s.n.withSQL(ctx, func(c *pgconn.PgConn) error { return catalog.GapRowsDone(ctx, c, s.gap, done) })
		err = errors.Join(err, derr)
		s.count(func(g *catalog.Gap) { g.Written, g.Removed = g.Written+written, g.Removed+removed })
	}
	return out, err
}

// byColumn names the values of an image; nil for no row. Bytes that are no text are shown as such.
func byColumn(columns []verify.Column, image []*string) map[string]*string {
	if len(image) != len(columns) {
		return nil
	}
	out := map[string]*string{}
	for i, c := range columns {
		if out[c.Name] = image[i]; image[i] != nil {
			text := strings.ToValidUTF8(*image[i], "\ufffd")
			out[c.Name] = &text
		}
	}
	return out
}
