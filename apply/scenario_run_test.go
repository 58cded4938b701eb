package apply

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// TestScenarios runs every file of testdata/scenarios: with two sites and with three, where transactions are merged and
// where they are not, in each order in which the sites' changes can arrive.
func TestScenarios(t *testing.T) {
	all := loadScenarios(t)
	for _, sc := range all {
		if features[sc.needs] {
			t.Errorf("%s: %s is built; take out the line %q, so that the scenario runs", sc.file, sc.needs, "needs "+sc.needs)
		}
	}
	for _, n := range []int{2, 3} {
		t.Run(fmt.Sprintf("%d sites", n), func(t *testing.T) {
			t.Parallel() // most of the time is waiting
			st := newStage(t, n, all)
			for _, mode := range []string{"merged", "serial"} {
				st.restart(mode)
				for _, sc := range all {
					for _, order := range sc.orders(n) {
						t.Run(sc.id+" "+sc.title+"/"+mode+"/"+order.String(), func(t *testing.T) { st.play(t, sc, order) })
					}
				}
			}
		})
	}
}

// order is the one in which the streams of sites are delivered to all others; none: one transaction at a time, in turn.
type order []string

func (o order) String() string {
	if len(o) == 0 {
		return "in turn"
	}
	return strings.Join(o, ", ")
}

// at is the order in which a site gets the streams of the others.
func (o order) at(site string) string {
	if len(o) == 0 {
		return "in turn"
	}
	return strings.Join(slices.DeleteFunc(slices.Clone(o), func(s string) bool { return s == site }), ", ")
}

// orders are the arrival orders of a scenario with n sites. A silent third site has nothing to deliver.
func (sc *scenario) orders(n int) []order {
	if !slices.Contains(sc.sites, n) || sc.needs != "" {
		return nil
	}
	if n == 3 && slices.Contains(sc.writers(), "C") {
		return []order{{"A", "B", "C"}, {"A", "C", "B"}, {"B", "A", "C"}, {"B", "C", "A"}, {"C", "A", "B"}, {"C", "B", "A"}, nil}
	}
	return []order{{"A", "B"}, {"B", "A"}, nil}
}

// stage is the sites that all scenarios are played on, one after the other.
type stage struct {
	sites  []*site
	byName map[string]*actor
	runs   int
	mode   string // merged or serial: how transactions are applied
	reset  string // SQL
}

// actor is a site with the sessions of the test.
type actor struct {
	*site
	client *pgconn.PgConn // its transactions commit at the times that the scenario says
	broom  *pgconn.PgConn // its transactions are not replicated
	clock  atomic.Int64   // a wal.Time that the site's clock stands at; 0: the real time
	mark   string         // id of the last record of earlier runs
}

// epoch is where the time of the first run begins, long ago, so that nothing is held by the clock rule. Each run begins
// runTime after the one before.
var epoch = time.Now().UTC().Truncate(time.Second).AddDate(0, 0, -60)

const runTime = 1000 * time.Second

func newStage(t *testing.T, n int, all []*scenario) *stage {
	t.Helper()
	schema, err := os.ReadFile("testdata/scenarios/schema.sql")
	if err != nil {
		t.Fatal(err)
	}
	st := &stage{byName: map[string]*actor{}}
	for i := range n {
		st.byName[string(rune('A'+i))] = &actor{}
	}
	sql := []string{string(schema)}
	for _, sc := range all {
		for _, s := range sc.schema {
			if s.site == "" {
				sql = append(sql, s.sql)
			}
		}
	}
	st.sites = newMeshRig(t, n, strings.Join(sql, ";\n"), rigOptions{
		asRole:   true,
		policies: policiesOf(t, all),
		pgtest:   []pgtest.Option{pgtest.WithSetting("max_prepared_transactions", "5"), pgtest.WithSetting("logical_decoding_work_mem", "64kB")},
		config: func(c *Config) {
			a := st.byName[string(rune('A'+c.Site-1))]
			c.Clock = func() wal.Time {
				if at := a.clock.Load(); at != 0 {
					return wal.Time(at)
				}
				return wal.TimeOf(time.Now())
			}
		},
	})
	for i, s := range st.sites {
		a := st.byName[string(rune('A'+i))]
		a.site = s
		a.setStage(t, all)
	}
	for _, s := range st.sites {
		s.startUnparker()
	}
	st.reset = st.sites[0].rows(resetSQL)
	return st
}

// resetSQL makes the statements that empty all tables and let sequences begin anew. A table without a key admits no
// DELETE, as it is published.
const resetSQL = `SELECT format(CASE WHEN EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND indisprimary) THEN 'DELETE FROM %s;' ELSE 'TRUNCATE %s;' END, c.oid::regclass)
FROM pg_class c WHERE relkind IN ('r', 'p') AND NOT relispartition AND relnamespace = 'public'::regnamespace
UNION ALL SELECT format('ALTER SEQUENCE %s RESTART;', oid::regclass) FROM pg_class WHERE relkind = 'S' AND relnamespace = 'public'::regnamespace`

// policiesOf are the policies that the files declare.
func policiesOf(t *testing.T, all []*scenario) policy.Set {
	t.Helper()
	tables := map[policy.Name]policy.Table{}
	for _, sc := range all {
		for _, s := range sc.policy {
			var p policy.Table
			if err := json.Unmarshal([]byte(s.sql), &p); err != nil {
				t.Fatalf("%s: policy of %s: %v", sc.file, s.site, err)
			}
			tables[policy.Name{Schema: "public", Table: s.site}] = p
		}
	}
	return policy.NewSet(tables, nil)
}

// setStage makes what one site has for itself, and its sessions.
func (a *actor) setStage(t *testing.T, all []*scenario) {
	t.Helper()
	for _, sc := range all {
		for _, s := range sc.schema {
			if strings.EqualFold(s.site, a.name) {
				a.exec(s.sql)
			}
		}
		for _, s := range sc.policy {
			// This also checks that the policy fits the table.
			a.exec(fmt.Sprintf("SELECT duri.set_policy(%s, %s)", pg.QuoteLiteral(s.site), pg.QuoteLiteral(s.sql)))
		}
	}
	a.client, a.broom, a.sql = a.connect(), a.connect(), a.connect()
	for c, origin := range map[*pgconn.PgConn]string{a.client: ClockOriginName(a.db, 1), a.broom: a.resetOrigin()} {
		run(t, c, fmt.Sprintf("SELECT pg_replication_origin_create(%[1]s); SELECT pg_replication_origin_session_setup(%[1]s)", pg.QuoteLiteral(origin)))
	}
	run(t, a.broom, "SET session_replication_role = replica")
	greatest := wal.Time(0)
	a.stamp = func(t *wal.Txn) {
		if t.VersionTime = greatest; len(t.Changes) > 0 {
			t.VersionTime = stamp(t.CommitTime, &greatest, a.foreign)
		}
	}
}

// stamp is rule 3, as the agent follows it: after the clock was set back, versions go on from the greatest one so far;
// and a change is newer than all that was applied before it.
func stamp(commit wal.Time, greatest *wal.Time, foreign wal.Time) wal.Time {
	t := max(commit, foreign+1)
	if commit < greatest.Add(-100*time.Millisecond) {
		t = max(*greatest, foreign) + 1
	}
	*greatest = max(*greatest, t)
	return t
}

// batches are how many transactions may be merged.
var batches = map[string]int{"merged": 2000, "serial": 1}

// restart lets the workers go on in another mode.
func (st *stage) restart(mode string) {
	st.mode = mode
	for _, s := range st.sites {
		s.stopApply()
		for _, w := range s.workers {
			w.cfg.BatchTransactions = batches[mode]
		}
		s.startApply()
		s.startUnparker()
	}
}

// actors are the sites in order.
func (st *stage) actors() (all []*actor) {
	for _, s := range st.sites {
		all = append(all, st.byName[strings.ToUpper(s.name)])
	}
	return all
}

// play is one run of a scenario.
type play struct {
	*stage
	t    *testing.T
	sc   *scenario
	base time.Time
}

// time is the moment that a scenario calls n.
func (p *play) time(n int) time.Time { return p.base.Add(time.Duration(n) * p.sc.unit) }

func (st *stage) play(t *testing.T, sc *scenario, o order) {
	p := &play{st, t, sc, epoch.Add(time.Duration(st.runs) * runTime)}
	st.runs++
	t.Cleanup(p.end)
	p.begin(o)
	for _, s := range sc.steps {
		p.step(s)
	}
	for _, a := range p.actors() {
		a.clock.Store(0)
		p.flush(a)
	}
	p.deliver(o)
	for _, a := range p.actors() {
		p.judge(a, o)
	}
	p.compare()
}

// begin makes the tables empty and cuts the links.
func (p *play) begin(o order) {
	for _, a := range p.actors() {
		a.t = p.t
		if err := a.problem(); err != nil {
			p.t.Fatalf("site %s has a problem since an earlier run: %v", a.name, err)
		}
		p.exec(a.broom, "DELETE FROM duri.parked") // first, as the rows of a table would come back to it
		p.exec(a.broom, p.reset)
		a.forget()
		a.mark = a.query("SELECT coalesce(max(id), 0) FROM duri.conflict")[0][0]
		p.cut(a)
		if p.merges(o) { // see heal
			a.plug.Store(true)
			p.flush(a)
			a.plug.Store(false)
		}
	}
}

// merges reports whether a run is about transactions that are applied as one.
func (p *play) merges(o order) bool { return p.mode == "merged" && len(o) > 0 }

// forget drops the tombstones of earlier runs, which every site has seen.
func (a *actor) forget() {
	later := wal.TimeOf(time.Now().Add(time.Hour))
	a.local.Prune(math.MaxInt64, later)
	for _, p := range a.peers {
		a.mesh.Prune(p.id, math.MaxInt64, later)
	}
}

func (p *play) cut(a *actor) {
	for _, to := range a.peers {
		a.feed.hold(to.id)
	}
}

// end leaves the links open for whatever failed.
func (p *play) end() {
	for _, a := range p.actors() {
		a.clock.Store(0)
		for _, to := range a.peers {
			a.feed.release(to.id)
		}
	}
}

// exec runs SQL in one of the sessions.
func (p *play) exec(c *pgconn.PgConn, sql string) {
	p.t.Helper()
	if _, err := c.Exec(p.t.Context(), sql).ReadAll(); err != nil {
		p.t.Fatalf("%v: %s", err, sql)
	}
}

// flush waits until all that was committed at a site is in its feed.
func (p *play) flush(a *actor) {
	p.t.Helper()
	lsn, err := wal.ParseLSN(a.query("SELECT pg_logical_emit_message(true, 'duri.beat', '')")[0][0])
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(p.t.Context(), waitMax)
	defer cancel()
	if err := a.local.WaitFor(ctx, lsn); err != nil {
		p.t.Fatalf("site %s: wait for decoding: %v; %v", a.name, err, a.problem())
	}
}

func (p *play) step(s step) {
	p.t.Helper()
	a := p.byName[s.site]
	switch s.verb {
	case verbSeed:
		p.run(a, s)
		for _, to := range a.peers {
			p.letThrough(a, to)
			p.arrive(a, to)
		}
	case verbRun:
		p.run(a, s)
	case verbSend, verbDeliver:
		to := p.byName[s.to]
		p.letThrough(a, to.site)
		if s.verb == verbDeliver {
			p.arrive(a, to.site)
		}
	case verbClock:
		a.clock.Store(int64(wal.TimeOf(p.time(s.at))))
	case verbHeld:
		to := p.byName[s.to]
		w := to.workers[slices.Index(to.peers, a.site)]
		eventually(p.t, fmt.Sprintf("line %d: %s holds what %s sent", s.line, s.to, s.site), func() bool {
			return w.Status().HeldUntil.Equal(p.time(s.at))
		})
	case verbCheck:
		p.check(a, s.check)
	}
}

// letThrough opens the gate for what is there.
func (p *play) letThrough(from *actor, to *site) {
	from.feed.mu.Lock()
	defer from.feed.mu.Unlock()
	from.feed.limits[to.id] = len(from.feed.recs)
	from.feed.signal()
}

// arrive waits until a site has applied what the gate lets through.
func (p *play) arrive(from *actor, to *site) {
	p.t.Helper()
	to.appliedTo(to.workers[slices.Index(to.peers, from.site)], from.feed.shown(to.id))
}

// run commits at the time that the step says.
func (p *play) run(a *actor, s step) {
	p.t.Helper()
	p.exec(a.client, fmt.Sprintf("SELECT pg_replication_origin_xact_setup('0/1', '%s')", p.time(s.at).Format(time.RFC3339Nano)))
	_, err := a.client.Exec(p.t.Context(), s.sql).ReadAll()
	if state := pg.SQLState(err); state != s.fails || (err != nil && state == "") {
		p.t.Fatalf("%s:%d: error %v, want %q", p.sc.file, s.line, err, s.fails)
	}
	if err != nil {
		p.exec(a.client, "ROLLBACK")
	}
	p.flush(a)
}

// deliver heals the links.
func (p *play) deliver(o order) {
	p.t.Helper()
	for _, name := range o {
		p.heal(p.byName[name], p.merges(o))
	}
	for more := true; more; {
		more = false
		for _, a := range p.actors() {
			for _, to := range a.peers {
				if a.feed.stepTxn(to.id) {
					more = true
					p.arrive(a, to)
				}
			}
		}
	}
	for _, a := range p.actors() { // what was sent before, and held
		a.caughtUp()
	}
}

// heal delivers what a site has to all others. Apply never waits to fill a batch: it takes the first transaction at once,
// and merges those that come while it is busy. To have all merged, the first one is empty, and its progress must wait
// until the others have been read.
func (p *play) heal(from *actor, merge bool) {
	p.t.Helper()
	for _, to := range from.peers {
		client := p.byName[strings.ToUpper(to.name)].client
		if merge {
			p.exec(client, "BEGIN; LOCK TABLE duri.applied IN SHARE MODE")
		}
		p.letThrough(from, to)
		if merge {
			eventually(p.t, "all is read", func() bool { return from.feed.unread(to.id) == 0 })
			p.exec(client, "COMMIT")
		}
		p.arrive(from, to)
	}
}

// siteNameSQL names the site of a replication origin, or of a site's number.
const (
	siteOfOriginSQL = `upper(coalesce(substring(%s from '_([a-z])(?::repair)?$'), current_database()))`
	siteOfNumberSQL = `chr(64 + %s)`
)

// ticks is a time as the scenario counts it.
func (p *play) ticks(expr string) string {
	return fmt.Sprintf("trim_scale((extract(epoch FROM %s) - extract(epoch FROM '%s'::timestamptz)) / %v)", expr, p.base.Format(time.RFC3339Nano), p.sc.unit.Seconds())
}

// check compares what a site shows.
func (p *play) check(a *actor, c check) {
	p.t.Helper()
	sql := c.sql
	if c.table != "" {
		sql = fmt.Sprintf(`SELECT %s FROM %s AS x CROSS JOIN LATERAL (SELECT %s || '@' || %s AS version
			FROM pg_xact_commit_timestamp_origin(x.xmin) AS c LEFT JOIN pg_replication_origin o ON o.roident = c.roident) AS version`,
			c.sql, c.table, fmt.Sprintf(siteOfOriginSQL, "o.roname"), p.ticks("c.timestamp"))
	}
	exact := func(site string) bool { return c.table == "" || p.mode == "serial" || strings.EqualFold(site, a.name) }
	want := withoutTimes(c.rows, exact)
	got := withoutTimes(a.cells(sql), exact)
	ctx, cancel := context.WithTimeout(p.t.Context(), waitMax/3)
	defer cancel()
	for c.eventually && !slices.Equal(want, got) && pause(ctx, 5*time.Millisecond) == nil {
		got = withoutTimes(a.cells(sql), exact)
	}
	if d := cmp.Diff(want, got); d != "" {
		p.t.Errorf("%s:%d: site %s shows (-want +got):\n%s", p.sc.file, c.line, strings.ToUpper(a.name), d)
	}
}

// cells are the rows of a query as the files spell them.
func (a *actor) cells(sql string) []string {
	a.t.Helper()
	var lines []string
	for _, r := range a.query(sql) {
		for i, v := range r {
			if v == pgcluster.NullText {
				r[i] = "null"
			}
		}
		lines = append(lines, strings.Join(r, " | "))
	}
	return normalRows(lines)
}

// withoutTimes leaves only the site of the version that ends a row where the time is not exact: rows of merged
// transactions carry a later time.
func withoutTimes(rows []string, exact func(site string) bool) []string {
	out := []string{}
	for _, r := range rows {
		if i := strings.LastIndex(r, "@"); i > strings.LastIndex(r, "|") && !exact(r[i-1:i]) {
			r = r[:i]
		}
		out = append(out, r)
	}
	return out
}

// judge compares a site with the outcome.
func (p *play) judge(a *actor, o order) {
	p.t.Helper()
	name := strings.ToUpper(a.name)
	for _, c := range p.sc.checks {
		if c.site == "" || c.site == name {
			p.check(a, c)
		}
	}
	parked := a.cells(fmt.Sprintf(`SELECT concat_ws(' | ', table_name || ' ' || (SELECT string_agg(value, ',') FROM jsonb_each_text(key)), coalesce(row ->> 'v', 'null'),
		%s || '@' || %s) FROM duri.parked`, fmt.Sprintf(siteOfNumberSQL, "site"), p.ticks("time")))
	if d := cmp.Diff(p.sc.parked, parked, cmpopts.EquateEmpty()); d != "" {
		p.t.Errorf("%s: parked at site %s (-want +got):\n%s", p.sc.file, name, d)
	}
	got := a.cells(p.recordsSQL() + " WHERE id > " + a.mark)
	expected, anything := p.sc.recordsOf(name, o.at(name), p.mode)
	if anything || slices.ContainsFunc(expected, func(want []string) bool { return slices.Equal(want, got) }) {
		return
	}
	p.t.Errorf("%s: records of site %s, after %s (-want +got):\n%s", p.sc.file, name, o.at(name), cmp.Diff(expected[0], got))
}

// recordsSQL spells conflict records as the files do.
func (p *play) recordsSQL() string {
	image := func(column string) string {
		var parts []string
		for name := range strings.SplitSeq(p.sc.images, ", ") {
			parts = append(parts, fmt.Sprintf("coalesce(%s ->> %s, 'null')", column, pg.QuoteLiteral(name)))
		}
		return fmt.Sprintf("CASE WHEN %s IS NULL THEN '-' ELSE concat_ws(', ', %s) END", column, strings.Join(parts, ", "))
	}
	side := func(site, at, row string) string {
		return fmt.Sprintf("coalesce(%s || '@' || %s || ': ', '') || %s", fmt.Sprintf(siteOfNumberSQL, site), p.ticks(at), image(row))
	}
	return fmt.Sprintf(`SELECT concat_ws(' | ', coalesce(nullif(kind, ''), '-'), coalesce(nullif(code, ''), '-'),
		table_name || coalesce(' ' || (SELECT string_agg(value, ',') FROM jsonb_each_text(key)), ''), %s, %s) FROM duri.conflict`,
		side("origin", "remote_time", "remote_row"), side("local_site", "local_time", "local_row"))
}

// compare is the judge that knows nothing of the scenario: all rows of its tables, whole, are the same at all sites.
func (p *play) compare() {
	p.t.Helper()
	for _, c := range p.sc.checks {
		if c.table == "" {
			continue
		}
		sql := fmt.Sprintf("SELECT md5(x::text), left(x::text, 60) FROM %s AS x ORDER BY 1", c.table)
		for _, s := range p.sites[1:] {
			same(p.t, p.sites[0], s, sql)
		}
	}
}
