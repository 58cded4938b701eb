package apply

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/decode"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// waitMax bounds every wait of these tests.
const waitMax = 60 * time.Second

// feed is one origin's journal in memory, with a gate per receiver: it sees the records before its limit only.
type feed struct {
	mu     sync.Mutex
	recs   []journal.Record
	limits map[wal.SiteID]int // none: no limit
	read   map[wal.SiteID]int // how many records a receiver has read
	moved  chan struct{}
	end    wal.LSN
	txnEnd wal.LSN
}

func newFeed() *feed {
	return &feed{limits: map[wal.SiteID]int{}, read: map[wal.SiteID]int{}, moved: make(chan struct{})}
}

func (f *feed) signal() {
	close(f.moved)
	f.moved = make(chan struct{})
}

func (f *feed) add(r journal.Record) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.recs = append(f.recs, r)
	f.end = r.To
	if r.Txn != nil {
		f.txnEnd = r.To
	}
	f.signal()
}

// hold lets a receiver see nothing that is not there yet.
func (f *feed) hold(to wal.SiteID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.limits[to] = len(f.recs)
}

func (f *feed) release(to wal.SiteID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.limits, to)
	f.signal()
}

// step lets n more records through to a receiver; false when there are none.
func (f *feed) step(to wal.SiteID, n int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.limit(to) >= len(f.recs) {
		return false
	}
	f.limits[to] = min(f.limits[to]+n, len(f.recs))
	f.signal()
	return true
}

// stepTxn lets records up to the next transaction through to a receiver; false when there is none.
func (f *feed) stepTxn(to wal.SiteID) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := f.limit(to); i < len(f.recs); i++ {
		if f.recs[i].Txn != nil {
			f.limits[to] = i + 1
			f.signal()
			return true
		}
	}
	return false
}

// unread is how many records a receiver may see and has not read yet.
func (f *feed) unread(to wal.SiteID) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return min(f.limit(to), len(f.recs)) - f.read[to]
}

// limit is how many records a receiver may see. f.mu is held.
func (f *feed) limit(to wal.SiteID) int {
	if n, held := f.limits[to]; held {
		return n
	}
	return math.MaxInt
}

// shown is the end of the last transaction that a receiver may see.
func (f *feed) shown(to wal.SiteID) wal.LSN {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := min(f.limit(to), len(f.recs)); i > 0; i-- {
		if f.recs[i-1].Txn != nil {
			return f.recs[i-1].To
		}
	}
	return 0
}

func (f *feed) txns() []*wal.Txn {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []*wal.Txn
	for _, r := range f.recs {
		if r.Txn != nil {
			out = append(out, r.Txn)
		}
	}
	return out
}

// feedReader is the Reader of a feed.
type feedReader struct {
	f    *feed
	to   wal.SiteID
	next int
}

// reader opens a feed for a receiver.
func (f *feed) reader(to wal.SiteID) func(from wal.LSN) (Reader, error) {
	return func(from wal.LSN) (Reader, error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		i := 0
		for i < len(f.recs) && f.recs[i].To <= from {
			i++
		}
		return &feedReader{f, to, i}, nil
	}
}

func (r *feedReader) Close() error { return nil }

func (r *feedReader) Next(ctx context.Context) (journal.Record, error) {
	for {
		r.f.mu.Lock()
		if r.next < min(len(r.f.recs), r.f.limit(r.to)) {
			rec := r.f.recs[r.next]
			r.next++
			r.f.read[r.to] = max(r.f.read[r.to], r.next)
			r.f.mu.Unlock()
			return rec, nil
		}
		moved := r.f.moved
		r.f.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return journal.Record{}, ctx.Err()
		}
	}
}

// site is one database with its decode stream, local index and the worker that applies its peer.
type site struct {
	t       testing.TB
	id      wal.SiteID
	name    string
	db      string
	cluster *pgcluster.Cluster
	dsn     string
	feed    *feed
	local   *History
	mesh    *Mesh
	keys    *Keys
	peers   []*site        // by id
	workers []*Worker      // of the peers
	worker  *Worker        // with two sites: the only one
	peer    *site          // likewise
	sql     *pgconn.PgConn // of the test
	siteOf  func(string) (wal.SiteID, bool)

	// gate is held by a test to keep the local stream from being decoded.
	gate sync.Mutex
	// stamp may change a transaction's version, as after a clock step.
	stamp func(*wal.Txn)
	seen  []wal.Seen
	// plug lets a transaction without changes go into the feed, which otherwise is a position.
	plug atomic.Bool
	// foreign is the greatest commit time that was applied here.
	foreign wal.Time

	faults bool // errors of the worker and the stream are expected
	errMu  sync.Mutex
	errs   []error

	stopApply, stopDecode func()
}

func (s *site) Commit(c *decode.Commit) error {
	s.gate.Lock()
	defer s.gate.Unlock()
	t := c.Txn
	if c.Origin == s.resetOrigin() {
		s.local.Advance(t.EndLSN)
		return nil
	}
	if c.Origin != "" && !IsClockOrigin(s.db, c.Origin) {
		from, ok := s.siteOf(c.Origin)
		if !ok {
			return fmt.Errorf("unexpected origin %q", c.Origin)
		}
		if !strings.HasSuffix(c.Origin, ":repair") {
			s.see(from, c.OriginLSN)
		}
		s.foreign = max(s.foreign, t.CommitTime)
		s.local.Advance(t.EndLSN)
		return nil
	}
	if len(t.Changes) == 0 && !s.plug.Load() {
		s.local.Advance(t.EndLSN)
		s.feed.add(journal.Record{To: t.EndLSN, Position: &journal.Position{To: t.EndLSN, Seen: s.seenList()}})
		return nil
	}
	if t.EndLSN <= s.feed.end {
		return nil // again after a restart of the stream
	}
	t.Origin, t.Seen, t.VersionTime = s.id, s.seenList(), t.CommitTime
	if s.stamp != nil {
		s.stamp(t)
	}
	if err := s.mesh.Parking.Purge(t, s.withSession); err != nil {
		return err
	}
	if err := s.local.Add(t); err != nil {
		return err
	}
	s.mesh.Parking.Touched(t)
	s.feed.add(journal.Record{To: t.EndLSN, Txn: t})
	return nil
}

// withSession lends a session of its own.
func (s *site) withSession(ctx context.Context, f func(*pgconn.PgConn) error) error {
	c, err := pg.Connect(ctx, s.dsn, s.db, nil)
	if err != nil {
		return err
	}
	defer pg.Close(c)
	return f(c)
}

func (s *site) see(from wal.SiteID, lsn wal.LSN) {
	for i := range s.seen {
		if s.seen[i].Site == from {
			s.seen[i].LSN = max(s.seen[i].LSN, lsn)
			return
		}
	}
	s.seen = append(s.seen, wal.Seen{Site: from, LSN: lsn})
	slices.SortFunc(s.seen, func(a, b wal.Seen) int { return int(a.Site) - int(b.Site) })
}

func (s *site) seenList() []wal.Seen { return slices.Clone(s.seen) }

func (s *site) Advance(to wal.LSN) error {
	s.gate.Lock()
	defer s.gate.Unlock()
	s.local.Advance(to)
	return nil
}

func (s *site) Idle() error { return nil }

func (s *site) failed(err error) {
	s.errMu.Lock()
	defer s.errMu.Unlock()
	s.errs = append(s.errs, err)
}

// exec runs SQL at the site as its superuser.
func (s *site) exec(sql string) {
	s.t.Helper()
	pgtest.Exec(s.t, s.cluster, s.db, sql)
}

// query gives rows as text, NULL as \N, over one connection that is made anew when it broke.
func (s *site) query(sql string) [][]string {
	s.t.Helper()
	if s.sql == nil || s.sql.IsClosed() {
		s.sql = s.connect()
	}
	results, err := s.sql.Exec(s.t.Context(), sql).ReadAll()
	if err != nil {
		s.t.Fatalf("site %s: %v: %s", s.name, err, sql)
	}
	var rows [][]string
	for _, values := range results[len(results)-1].Rows {
		row := make([]string, len(values))
		for i, v := range values {
			if row[i] = string(v); v == nil {
				row[i] = pgcluster.NullText
			}
		}
		rows = append(rows, row)
	}
	return rows
}

// rows is a query's result as lines.
func (s *site) rows(sql string) string {
	s.t.Helper()
	var b strings.Builder
	for _, r := range s.query(sql) {
		b.WriteString(strings.Join(r, "|") + "\n")
	}
	return b.String()
}

// connect opens a client session.
func (s *site) connect() *pgconn.PgConn {
	s.t.Helper()
	c, err := pg.Connect(s.t.Context(), s.cluster.DSN(s.db, ""), s.db, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { pg.Close(c) })
	return c
}

// run executes SQL in a client session.
func run(t testing.TB, c *pgconn.PgConn, sql string) [][]string {
	t.Helper()
	rows, err := pg.Rows(t.Context(), c, sql)
	if err != nil {
		t.Fatalf("%v: %s", err, sql)
	}
	return rows
}

// barrier is what the server does: a transactional message forces a commit record, whose decoding is awaited.
func (s *site) barrier(ctx context.Context, lsn wal.LSN) error {
	if s.local.Position() >= lsn {
		return nil
	}
	if err := s.cluster.Exec(ctx, s.db, "SELECT pg_logical_emit_message(true, 'duri.beat', '')"); err != nil {
		return err
	}
	return s.local.WaitFor(ctx, lsn)
}

// fetch reads the present row of this site for the peer (rule 9).
func (s *site) fetch(ctx context.Context, rel *wal.Relation, key []string, row wal.Tuple) (wal.Tuple, bool, error) {
	c, err := pg.Connect(ctx, s.dsn, s.db, map[string]string{"search_path": "pg_catalog", "lock_timeout": "200ms"})
	if err != nil {
		return nil, false, err
	}
	defer pg.Close(c)
	var sel, where []string
	var args [][]byte
	for i, col := range rel.Columns {
		sel = append(sel, pg.QuoteIdent(col.Name))
		if slices.Contains(key, col.Name) {
			args = append(args, row[i].Data)
			where = append(where, fmt.Sprintf("%s = $%d", pg.QuoteIdent(col.Name), len(args)))
		}
	}
	sql := "SELECT " + strings.Join(sel, ",") + " FROM ONLY " + pg.QuoteName(rel.Namespace, rel.Name) + " WHERE " + strings.Join(where, " AND ")
	res := c.ExecParams(ctx, sql, args, nil, nil, nil).Read()
	if res.Err != nil || len(res.Rows) == 0 {
		return nil, false, res.Err
	}
	out := make(wal.Tuple, len(rel.Columns))
	for i, v := range res.Rows[0] {
		out[i] = wal.Value{Kind: wal.Null}
		if v != nil {
			out[i] = wal.Value{Kind: wal.Text, Data: v}
		}
	}
	return out, true, nil
}

func (s *site) slot() string { return "duri_" + s.db }

// resetOrigin is the replication origin under which tests make tables empty without anybody's hearing of it.
func (s *site) resetOrigin() string { return "duri_" + s.db + ":reset" }

// loop runs f again and again until stop, which waits for its end.
func (s *site) loop(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				s.failed(err)
				_ = pause(ctx, 20*time.Millisecond)
			}
		}
	}()
	return func() { cancel(); <-done }
}

func (s *site) startDecode() {
	s.stopDecode = s.loop(func(ctx context.Context) error {
		conn, err := decode.Connect(ctx, s.dsn, s.db, "duri_decode")
		if err != nil {
			return err
		}
		st, err := decode.Open(ctx, conn, decode.Config{
			DSN: s.dsn, Database: s.db, Slot: s.slot(), Publication: "duri", Interval: 10 * time.Millisecond,
			Report: func() decode.Positions { return decode.Positions{} },
			Own:    func(origin string) bool { return IsClockOrigin(s.db, origin) },
		}, 0)
		if err != nil {
			return err
		}
		return st.Run(ctx, s)
	})
}

func (s *site) startApply() {
	var stops []func()
	for _, w := range s.workers {
		stops = append(stops, s.loop(w.Run))
	}
	s.stopApply = func() {
		for _, stop := range stops {
			stop()
		}
	}
}

// options of a rig.
type rigOptions struct {
	asRole   bool // the agent's role instead of a superuser
	clusters int  // 2: a PostgreSQL per site
	pgtest   []pgtest.Option
	config   func(*Config)
	policies policy.Set
}

// newRig makes two sites A (1) and B (2) with the schema, streaming both ways.
func newRig(t testing.TB, schema string, o rigOptions) (a, b *site) {
	t.Helper()
	clusters := []*pgcluster.Cluster{pgtest.New(t, o.pgtest...)}
	clusters = append(clusters, clusters[0])
	if o.clusters == 2 {
		clusters[1] = pgtest.New(t, o.pgtest...)
	}
	sites := newMeshOn(t, schema, o, clusters)
	return sites[0], sites[1]
}

// newMeshRig makes n sites A, B, C, ... in one PostgreSQL, each streaming to all others.
func newMeshRig(t testing.TB, n int, schema string, o rigOptions) []*site {
	t.Helper()
	return newMeshOn(t, schema, o, slices.Repeat([]*pgcluster.Cluster{pgtest.New(t, o.pgtest...)}, n))
}

func newMeshOn(t testing.TB, schema string, o rigOptions, clusters []*pgcluster.Cluster) []*site {
	t.Helper()
	var sites []*site
	for i, c := range clusters {
		name := string(rune('a' + i))
		sites = append(sites, &site{t: t, id: wal.SiteID(i + 1), name: name, db: name, cluster: c, feed: newFeed()})
	}
	for _, s := range sites {
		for _, p := range sites {
			if p != s {
				s.peers = append(s.peers, p)
			}
		}
		s.peer = s.peers[0]
	}
	for _, s := range sites {
		s.setUp(schema, o)
	}
	for _, s := range sites {
		s.startDecode()
		s.startApply()
	}
	t.Cleanup(func() {
		for _, s := range sites {
			s.tearDown()
		}
	})
	return sites
}

func (s *site) setUp(schema string, o rigOptions) {
	t := s.t
	t.Helper()
	pgtest.DB(t, s.cluster, s.db)
	s.exec(schema)
	s.exec(grants.SQL(grants.Spec{}))
	role := ""
	if o.asRole {
		role = "duri"
	}
	s.dsn = s.cluster.DSN(s.db, role)
	ctx := t.Context()
	c, err := pg.Connect(ctx, s.cluster.DSN(s.db, "duri"), s.db, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := catalog.Migrate(ctx, c); err != nil {
		t.Fatal(err)
	}
	pg.Close(c)
	r, err := decode.Connect(ctx, s.dsn, s.db, "setup")
	if err != nil {
		t.Fatal(err)
	}
	at, err := decode.CreateSlot(ctx, r, s.slot())
	if err != nil {
		t.Fatal(err)
	}
	pg.Close(r)
	s.siteOf = func(name string) (wal.SiteID, bool) {
		for _, p := range s.peers {
			if name == OriginName(s.db, p.name) || name == RepairOriginName(s.db, p.name) {
				return p.id, true
			}
		}
		return s.id, IsClockOrigin(s.db, name) || name == RepairOriginName(s.db, s.name)
	}
	s.keys = NewKeys(s.dsn, s.db)
	s.keys.SetPolicies(o.policies)
	s.local = NewHistory(s.id, at, s.keys)
	s.mesh = s.newMesh()
	for _, p := range s.peers {
		cfg := Config{
			Site: s.id, Origin: p.id, OriginName: OriginName(s.db, p.name), SiteOf: s.siteOf, DSN: s.dsn, Database: s.db,
			Open: p.feed.reader(s.id), Mesh: s.mesh, Barrier: s.barrier, Fetch: p.fetch,
			Clock: func() wal.Time { return wal.TimeOf(time.Now()) }, Policy: o.policies.Of,
		}
		if o.config != nil {
			o.config(&cfg)
		}
		s.workers = append(s.workers, New(cfg))
	}
	s.worker = s.workers[0]
}

// newMesh makes what the workers share; peers' histories are needed with three sites only.
func (s *site) newMesh() *Mesh {
	var peers []*History
	feeds := map[wal.SiteID]*feed{}
	for _, p := range s.peers {
		feeds[p.id] = p.feed
		if len(s.peers) > 1 {
			peers = append(peers, NewPeerHistory(p.id, 0, s.keys))
		}
	}
	return NewMesh(s.local, func(site wal.SiteID, from wal.LSN) (Reader, error) { return feeds[site].reader(s.id)(from) }, peers...)
}

func (s *site) tearDown() {
	s.stopApply()
	s.stopDecode()
	s.keys.Close()
	if !s.faults {
		for _, err := range s.errs {
			s.t.Errorf("site %s: %v", s.name, err)
		}
	}
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitMax)
	defer cancel()
	for !cond() {
		if pause(ctx, 2*time.Millisecond) != nil {
			t.Fatalf("timed out: %s", what)
		}
	}
}

// meddle does random things, n in all, at random sites while their clients write: a direction is held, let go or moved on by
// some records, or one of the others.
func meddle(ctx context.Context, rng *rand.Rand, sites []*site, n int, others ...func(*site)) {
	for range n {
		s := sites[rng.IntN(len(sites))]
		to := s.peers[rng.IntN(len(s.peers))]
		switch k := rng.IntN(3 + len(others)); k {
		case 0:
			s.feed.hold(to.id)
		case 1:
			s.feed.release(to.id)
		case 2:
			s.feed.step(to.id, 1+rng.IntN(10))
		default:
			others[k-3](s)
		}
		_ = pause(ctx, time.Duration(rng.IntN(60))*time.Millisecond)
	}
}

// releaseAll lets everything through to everyone.
func releaseAll(sites []*site) {
	for _, s := range sites {
		for _, to := range s.peers {
			s.feed.release(to.id)
		}
	}
}

// captured waits until everything committed at the site is in its feed.
func (s *site) captured() {
	s.t.Helper()
	lsn, err := wal.ParseLSN(s.query("SELECT pg_current_wal_insert_lsn()")[0][0])
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), waitMax)
	defer cancel()
	if err := s.barrier(ctx, lsn); err != nil {
		s.t.Fatalf("site %s: wait for capture: %v; %v", s.name, err, s.problem())
	}
	s.gate.Lock() // What the history has already may be on its way into the feed.
	defer s.gate.Unlock()
}

func (s *site) problem() error {
	s.errMu.Lock()
	defer s.errMu.Unlock()
	return errors.Join(s.errs...)
}

// applied waits until everything that the peer captured has been applied here.
func (s *site) applied() {
	s.t.Helper()
	for i, p := range s.peers {
		p.feed.mu.Lock()
		end := p.feed.txnEnd
		p.feed.mu.Unlock()
		s.appliedTo(s.workers[i], end)
	}
}

// caughtUp waits until everything that the gate lets through has been applied here.
func (s *site) caughtUp() {
	s.t.Helper()
	for i, p := range s.peers {
		s.appliedTo(s.workers[i], p.feed.shown(s.id))
	}
}

func (s *site) appliedTo(w *Worker, end wal.LSN) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitMax)
	defer cancel()
	for w.Status().Applied < end {
		if pause(ctx, 2*time.Millisecond) != nil || (!s.faults && s.problem() != nil) {
			s.t.Fatalf("site %s: applied %s of %s: %+v: %v", s.name, w.Status().Applied, end, w.Status(), s.problem())
		}
	}
}

// settle waits until both sites have everything.
func settle(sites ...*site) {
	sites[0].t.Helper()
	for _, s := range sites {
		s.captured()
	}
	for _, s := range sites {
		s.applied()
	}
}

// same checks that queries give the same at both sites and returns the last result.
func same(t testing.TB, a, b *site, sqls ...string) string {
	t.Helper()
	var out string
	for _, sql := range sqls {
		x, y := a.rows(sql), b.rows(sql)
		if x != y {
			t.Errorf("%s differs:\nA:\n%s\nB:\n%s", sql, clip(x), clip(y))
		}
		out = x
	}
	return out
}

// dump is a query for all rows of tables.
func dump(tables ...string) string {
	var parts []string
	for _, table := range tables {
		parts = append(parts, "SELECT "+pg.QuoteLiteral(table)+", x::text FROM "+table+" x")
	}
	return strings.Join(parts, " UNION ALL ") + " ORDER BY 1, 2"
}

// conflicts is a query for what the applier recorded.
const conflicts = `SELECT kind, code, table_name, key, origin, remote_row, local_site, local_row FROM duri.conflict ORDER BY id`

func clip(s string) string {
	if len(s) > 4000 {
		return s[:4000] + "..."
	}
	return s
}
