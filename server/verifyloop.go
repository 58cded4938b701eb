package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/verify"
	"github.com/duri-io/duri/wal"
)

// side is this site's database as comparisons see it: its rows, and how far it is in each site's stream.
type side struct {
	*verify.DB
	n *node
}

var (
	_ verify.Mender  = side{}
	_ verify.Settler = side{}
	_ verify.Parker  = side{}
)

// newDB gives what compares and mends a node's database.
func newDB(n *node) *verify.DB {
	return verify.NewDB(verify.DBConfig{
		Name: n.self.Name, DSN: n.cfg.Postgres.DSN, Database: n.database.Name, Publication: Publication,
		Site: n.self.ID, SiteOf: n.siteOf,
		RepairOrigin: func(id wal.SiteID) string {
			s, _ := n.cfg.SiteByID(id)
			return apply.RepairOriginName(n.database.Name, s.Name)
		},
	})
}

// Mark is verify.Settler.Mark.
func (s side) Mark(ctx context.Context) ([]wal.Seen, error) {
	c := s.n.ready.Load()
	if c == nil {
		return nil, errNotReady
	}
	var end wal.LSN
	err := s.n.withSQL(ctx, func(conn *pgconn.PgConn) error {
		rows, err := pg.Rows(ctx, conn, "SELECT pg_catalog.pg_current_wal_insert_lsn()")
		if err == nil {
			end, err = wal.ParseLSN(rows[0][0])
		}
		return err
	})
	if err == nil {
		err = s.n.barrier(ctx, c, end)
	}
	if err != nil {
		return nil, fmt.Errorf("wait until %s has decoded what is committed there: %w", s.n.self.Name, err)
	}
	marks := []wal.Seen{{Site: s.n.self.ID, LSN: end}}
	for _, p := range s.n.peers {
		marks = append(marks, wal.Seen{Site: p.site.ID, LSN: p.applied()})
	}
	return marks, nil
}

// Parked is verify.Parker.Parked: of now.
func (s side) Parked(ctx context.Context) (int, error) {
	err := s.n.countParked(ctx)
	return s.n.status().Parked, err
}

// reachEvery is how often Reach looks at the workers, in memory.
const reachEvery = 20 * time.Millisecond

// Reach is verify.Settler.Reach.
func (s side) Reach(ctx context.Context, marks []wal.Seen) error {
	t := time.NewTicker(reachEvery)
	defer t.Stop()
	for _, p := range s.n.peers {
		want := wal.SeenOf(marks, p.site.ID)
		for p.applied() < want {
			select {
			case <-ctx.Done():
				return p.notReached(want, context.Cause(ctx))
			case <-t.C:
			}
		}
	}
	return nil
}

// notReached says why a mark was not reached.
func (p *peer) notReached(want wal.LSN, err error) error {
	text := fmt.Sprintf("%s has applied the changes of %s up to %s, not yet to %s: %v", p.n.self.Name, p.site.Name, p.applied(), want, err)
	if in := p.live.Load(); in != nil {
		if st := in.worker.Status(); st.LastError != "" {
			return &hinted{text + ": " + st.LastError, st.LastHint}
		}
	}
	return &hinted{text, "compare again when `duri status` shows no lag"}
}

// remote is a peer's database as comparisons see it.
func (p *peer) remote() *verify.Remote {
	return verify.NewRemote(p.site.Name, func(ctx context.Context, b []byte) ([]byte, error) {
		return p.client.Compare(ctx, p.n.database.Name, b)
	})
}

// settleMax bounds how long two sites may take to apply what the other had.
const settleMax = 30 * time.Second

// settle waits until this site and the peer have applied what the other showed when it was called.
func (p *peer) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleMax)
	defer cancel()
	return verify.Settle(ctx, side{p.n.db, p.n}, p.remote())
}

// newWatches gives the comparisons in the background that this site drives: those with the peers of a greater number, so
// that every pair is compared once.
func newWatches(n *node) []*verify.Watch {
	var all []*verify.Watch
	for _, p := range n.peers {
		if !n.cfg.Verify.Enabled || p.site.ID < n.self.ID {
			continue
		}
		all = append(all, verify.NewWatch(verify.WatchConfig{
			A: side{n.db, n}, B: p.remote(), Period: n.cfg.Verify.Period.Std(), CPU: n.cfg.Verify.CPU,
			Settle: p.settle, Calm: p.disturbed, News: func(f verify.Found) { n.found(p, f) },
		}))
	}
	return all
}

// watch runs a node's comparisons until ctx ends.
func (a *Agent) watch(ctx context.Context, n *node) error {
	defer n.db.Close() // the node's own end may have come before the last statement here
	g, ctx := errgroup.WithContext(ctx)
	for _, w := range a.watches[n] {
		g.Go(func() error { return w.Run(ctx) })
	}
	return g.Wait()
}

const (
	// calmLagS and calmBytes are how far a direction may be behind while the sites are compared.
	calmLagS  = 10
	calmBytes = 64 << 20
)

// disturbed tells why this pair should not be compared just now; empty: it may.
func (p *peer) disturbed() string {
	if p.lacking.Load() != nil || p.missing.Load() != nil {
		return "a gap between the two is not repaired yet"
	}
	return p.busy()
}

// busy tells what keeps the two sites from being compared, gap or not; empty: nothing.
func (p *peer) busy() string {
	c := p.n.ready.Load()
	if c == nil || p.n.status().State != stateReady {
		return "the database is not ready"
	}
	switch l := p.status(p.n.cfg.MaxClockSkew.Std()); {
	case !l.Connected:
		return "not connected to " + p.site.Name
	case l.Apply.LastError != "" || l.Health == HealthDown:
		return "changes of " + p.site.Name + " cannot be applied"
	case l.LagBytes > 0 && l.LagS > calmLagS:
		return "changes of " + p.site.Name + " are applied late"
	}
	if ack := p.acked(); ack.Applied+calmBytes < c.journal.End() {
		return "changes of this site are applied late at " + p.site.Name
	}
	return ""
}

// found makes known that a table differs, or does no more.
func (n *node) found(p *peer, f verify.Found) {
	text := fmt.Sprintf("%s at %s and %s", f, n.self.Name, p.site.Name)
	if f.Rows == 0 {
		n.log.Info(text, "database", n.database.Name)
		n.event("difference_gone", text)
		return
	}
	n.log.Error(text, "database", n.database.Name, "hint", foundHint)
	n.event("difference", text)
}

const foundHint = "see which with `duri repair --dry-run`"

// watchStatus is what the comparisons in the background say. It never waits.
func (a *Agent) watchStatus(n *node) []verify.WatchStatus {
	var all []verify.WatchStatus
	for _, w := range a.watches[n] {
		all = append(all, w.Status())
	}
	return all
}

// RepairRequest asks to make this site's database and its peers' equal.
type RepairRequest struct {
	Tables []string `json:"tables"`
	From   string   `json:"from"` // the site whose rows are right; empty: judge by version
	Apply  bool     `json:"apply"`
}

// RepairReport is what became of it: `duri repair` prints it.
type RepairReport struct {
	DryRun bool                  `json:"dry_run"`
	Pairs  []verify.RepairReport `json:"pairs"` // this site with each other one
}

// RepairLine is one line of the repair stream: progress, then the report, and a problem if it ended early.
type RepairLine struct {
	Progress *verify.Progress `json:"progress,omitempty"`
	Report   *RepairReport    `json:"report,omitempty"`
	Problem  *Problem         `json:"problem,omitempty"`
}

func (a *Agent) postRepair(w http.ResponseWriter, r *http.Request) {
	n, err := a.pick(r)
	var req RepairRequest
	if err == nil {
		err = json.NewDecoder(r.Body).Decode(&req)
	}
	if err != nil {
		writeError(w, http.StatusBadRequest, err)
		return
	}
	send := stream[RepairLine](w)
	rep, err := n.repair(r.Context(), req, func(p verify.Progress) { send(RepairLine{Progress: &p}) })
	for _, w := range a.watches[n] {
		w.Recheck()
	}
	line := RepairLine{Report: &rep}
	if err != nil {
		line.Problem = &Problem{err.Error(), hintOf(err)}
	}
	send(line)
}

// repair makes this site and each peer equal, one after the other. From another site than these two, that site's pair
// comes first; the others then follow this site, which has the right rows by then.
func (n *node) repair(ctx context.Context, req RepairRequest, progress func(verify.Progress)) (RepairReport, error) {
	rep := RepairReport{DryRun: !req.Apply, Pairs: []verify.RepairReport{}}
	if n.ready.Load() == nil {
		return rep, errNotReady
	}
	if _, known := n.cfg.SiteByName(req.From); req.From != "" && !known {
		return rep, &hinted{fmt.Sprintf("site %q is not in duri.yaml", req.From), "name one of the cluster's sites with --from"}
	}
	peers := slices.Clone(n.peers)
	slices.SortStableFunc(peers, func(x, y *peer) int {
		return boolInt(y.site.Name == req.From) - boolInt(x.site.Name == req.From)
	})
	for _, p := range peers {
		from := req.From
		if from != "" && from != p.site.Name {
			from = n.self.Name
		}
		one, err := verify.Repair(ctx, side{n.db, n}, p.remote(), verify.RepairOptions{
			Tables: req.Tables, Apply: req.Apply, From: from, Settle: p.settle, Deleted: n.deletions,
			Sites: [2]wal.SiteID{n.self.ID, p.site.ID}, SiteName: n.siteName, Progress: progress,
		})
		rep.Pairs = append(rep.Pairs, one)
		n.repaired(one)
		if err != nil {
			return rep, fmt.Errorf("repair %s and %s: %w", n.self.Name, p.site.Name, err)
		}
	}
	return rep, nil
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// repaired records what a repair has written.
func (n *node) repaired(r verify.RepairReport) {
	if r.Done == 0 {
		return
	}
	text := fmt.Sprintf("%d rows were made equal at %s and %s by duri repair, %d still differ", r.Done, r.A, r.B, r.Left)
	n.log.Info(text, "database", n.database.Name)
	n.event("repair", text)
}

// deletions looks for deletes of rows in the journals that this site has: its own, and the copies of the others'.
func (n *node) deletions(ctx context.Context, t verify.Table, keys []verify.Key) ([]verify.Deletion, error) {
	c := n.ready.Load()
	if c == nil {
		return nil, errNotReady
	}
	journals := []*journal.Journal{c.journal}
	for _, p := range n.peers {
		j, err := p.live.Load().copy.Journal()
		if err != nil {
			return nil, fmt.Errorf("read the copy of %s's journal: %w", p.site.Name, err)
		}
		journals = append(journals, j)
	}
	search := newGraveSearch(t, keys)
	for _, j := range journals {
		if err := search.read(ctx, j); err != nil {
			return nil, err
		}
	}
	return search.found, nil
}

// graveSearch collects the newest delete of each of some rows.
type graveSearch struct {
	table verify.Table
	at    map[string]int // key -> index into found
	found []verify.Deletion
}

func newGraveSearch(t verify.Table, keys []verify.Key) *graveSearch {
	s := &graveSearch{table: t, at: map[string]int{}, found: make([]verify.Deletion, len(keys))}
	for i, k := range keys {
		s.at[keyText(k)] = i
	}
	return s
}

// keyText makes a key comparable; its values contain no NUL.
func keyText(k []string) string {
	b, _ := json.Marshal(k) // a list of texts always has a form
	return string(b)
}

// read searches what is kept of a journal. What was before had a version of at most the greatest one by then.
func (s *graveSearch) read(ctx context.Context, j *journal.Journal) error {
	r, err := j.NewReader(j.Start())
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	r.TrustChain() // nothing is written by it
	h, err := j.HeaderAt(j.Start())
	if err != nil {
		return err
	}
	for i := range s.found {
		s.found[i].Since = max(s.found[i].Since, h.MaxVersionTime+1)
	}
	for ctx.Err() == nil {
		rec, ok, err := r.TryNext()
		if err != nil || !ok {
			return err
		}
		if rec.Txn != nil {
			s.add(rec.Txn)
		}
	}
	return context.Cause(ctx)
}

// add takes a transaction's deletes: of a row, by a change of its key (rule 10), by TRUNCATE (rule 15).
func (s *graveSearch) add(t *wal.Txn) {
	for i := range t.Changes {
		c := &t.Changes[i]
		switch {
		case c.Relation.Namespace != s.table.Schema || c.Relation.Name != s.table.Name:
		case c.Op == wal.Truncate:
			for n := range s.found {
				s.bury(n, t.Version())
			}
		case c.Op == wal.Delete, c.Op == wal.Update && c.OldKind != wal.OldNone:
			old, ok := s.key(c.Relation, c.Old)
			n, wanted := s.at[old]
			if now, _ := s.key(c.Relation, c.New); ok && wanted && (c.Op == wal.Delete || now != old) {
				s.bury(n, t.Version())
			}
		}
	}
}

func (s *graveSearch) bury(n int, v wal.Version) {
	if s.found[n].Version.Less(v) {
		s.found[n].Version = v
	}
}

// key gives the key of a tuple, unless it lacks a column of it.
func (s *graveSearch) key(rel *wal.Relation, row wal.Tuple) (string, bool) {
	values := make([]string, len(s.table.Key))
	for i, name := range s.table.Key {
		at := slices.IndexFunc(rel.Columns, func(c wal.Column) bool { return c.Name == name })
		if at < 0 || at >= len(row) || row[at].Kind != wal.Text {
			return "", false
		}
		values[i] = string(row[at].Data)
	}
	return keyText(values), true
}

// Repair makes the sites equal, or tells what that takes, and reports progress on the way. The report counts with an
// error too, and tells what was done until then. An empty database name means the only one.
func (c *Control) Repair(ctx context.Context, database string, req RepairRequest, progress func(verify.Progress)) (RepairReport, error) {
	rep := RepairReport{DryRun: !req.Apply}
	res, err := c.do(ctx, http.MethodPost, "/v1/repair", databaseQuery(database), req)
	if err != nil {
		return rep, err
	}
	defer func() { _ = res.Body.Close() }()
	err = readLines(res.Body, "the repair", func(l RepairLine) (last bool, err error) {
		if l.Progress != nil {
			progress(*l.Progress)
		}
		if l.Report == nil {
			return false, nil
		}
		rep = *l.Report
		if l.Problem != nil {
			err = &remoteError{*l.Problem, exitCode(http.StatusOK)}
		}
		return true, err
	})
	return rep, err
}
