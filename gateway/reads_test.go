package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
)

// readsAt lets one site serve all reads, if any.
type readsAt struct{ at atomic.Pointer[Target] }

func (r *readsAt) ReadAt(*Login, Wish, uint64) (Target, time.Duration, bool) {
	if t := r.at.Load(); t != nil {
		return *t, 50 * time.Millisecond, true
	}
	return Target{}, 0, false
}

func (r *readsAt) ReadSites(*Login) []ReadSite {
	return []ReadSite{{Site: "b", Weight: 1, LagS: new(0.25)}}
}

// crossed is a knowing that says when one site has what another has.
type crossed struct {
	*knowing
	gate func(ctx context.Context, from, to string) error // nil: at once

	mu   sync.Mutex
	ways map[string]int
}

func (c *crossed) CatchUp(ctx context.Context, _, from, to string) error {
	c.mu.Lock()
	if c.ways == nil {
		c.ways = map[string]int{}
	}
	c.ways[from+to]++
	gate := c.gate
	c.mu.Unlock()
	if gate == nil {
		return nil
	}
	return gate(ctx, from, to)
}

func (c *crossed) hold(gate func(ctx context.Context, from, to string) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gate = gate
}

// two are a home a, and b, which serves reads, through a relay. Nothing is replicated between them: each has its name in table site.
type two struct {
	g     *Server
	addr  string
	a, b  *pgcluster.Cluster
	relay *cutter
	sites *crossed
	reads *readsAt
}

func newTwo(t testing.TB, more func(*Config)) *two {
	t.Helper()
	x := &two{a: markable(t), reads: &readsAt{}}
	x.b = site(t, pgtest.Query(t, x.a, "postgres", "SELECT rolpassword FROM pg_authid WHERE rolname = 'app'")[0][0], pgtest.WithSetting("wal_level", "logical"))
	pgtest.Exec(t, x.b, "shop", "CREATE TABLE ledger (client int, seq int, PRIMARY KEY (client, seq)); GRANT ALL ON ledger TO "+appUser)
	for name, c := range map[string]*pgcluster.Cluster{"a": x.a, "b": x.b} {
		pgtest.Exec(t, c, "shop", fmt.Sprintf(`CREATE TABLE site AS SELECT '%s' AS name; GRANT ALL ON site TO PUBLIC;
			CREATE UNLOGGED TABLE own AS SELECT '%[1]s' AS name; GRANT SELECT ON own TO PUBLIC; CREATE VIEW through AS SELECT name FROM own; GRANT SELECT ON through TO PUBLIC;
			CREATE MATERIALIZED VIEW kept AS SELECT name FROM site; GRANT SELECT ON kept TO PUBLIC;
			CREATE TABLE parts (n int) PARTITION BY RANGE (n); CREATE TABLE part PARTITION OF parts DEFAULT; GRANT SELECT ON parts TO PUBLIC;
			CREATE SEQUENCE s; GRANT ALL ON SEQUENCE s TO app; CREATE PUBLICATION duri FOR ALL TABLES`, name))
	}
	x.relay = newCutter(t, fmt.Sprintf("127.0.0.1:%d", x.b.Port()))
	x.reads.at.Store(&Target{Site: "b", Network: "tcp", Address: x.relay.l.Addr().String()})
	x.sites = &crossed{knowing: &knowing{c: x.a}}
	cfg := Config{Mode: TransactionMode, Sites: x.sites, Reads: x.reads}
	if more != nil {
		more(&cfg)
	}
	x.g, x.addr = serve(t, cfg, x.a)
	return x
}

const whichSite = "SELECT name FROM site"

// awaitReads reads until the other site serves it.
func awaitReads(t testing.TB, c *pgx.Conn) {
	t.Helper()
	until(t, "reads are served by b", func() bool { return value[string](t, c, whichSite) == "b" })
}

func TestReadsRunElsewhere(t *testing.T) {
	x := newTwo(t, nil)
	for _, mode := range []string{"", "default_query_exec_mode=simple_protocol", "default_query_exec_mode=exec", "default_query_exec_mode=cache_describe"} {
		c := open1(t, dsn(x.addr, mode))
		awaitReads(t, c)
		at := func(want, what, sql string, args ...any) {
			t.Helper()
			awaitReads(t, c)
			if got := value[string](t, c, sql, args...); got != want {
				t.Errorf("%s: %s: at %s, want %s", mode, what, got, want)
			}
		}
		at("b", "a read again", whichSite)
		at("b", "a read with a parameter", whichSite+" WHERE name <> $1", "x")
		at("b", "WITH", "WITH x AS (SELECT name FROM site) SELECT name FROM x")
		at("a", "a write", "INSERT INTO ledger VALUES (1, (SELECT coalesce(max(seq), 0) + 1 FROM ledger)) RETURNING (SELECT name FROM site)")
		at("a", "FOR UPDATE", whichSite+" FOR SHARE")
		at("a", "nextval", "SELECT name FROM site WHERE nextval('s') > 0")
		at("a", "what is not published", "SELECT name FROM own")
		at("a", "a view of what is not published", "SELECT name FROM through")
		at("a", "a materialized view", "SELECT name FROM kept")
		at("b", "a partitioned table", "SELECT name FROM site WHERE NOT EXISTS (SELECT FROM parts)")
		at("a", "a system column", "SELECT name FROM site WHERE xmin IS NOT NULL")
		at("a", "a catalog", "SELECT name FROM site WHERE EXISTS (SELECT FROM pg_type)")

		awaitReads(t, c)
		tx, err := c.BeginTx(t.Context(), pgx.TxOptions{AccessMode: pgx.ReadOnly})
		if err != nil {
			t.Fatal(err)
		}
		var got string
		if err := tx.QueryRow(t.Context(), whichSite).Scan(&got); err != nil || got != "a" {
			t.Errorf("%s: in a block: %q, %v", mode, got, err)
		}
		if err := tx.Rollback(t.Context()); err != nil {
			t.Error(err)
		}
		awaitReads(t, c)
		exec1(t, c, "CREATE TEMP TABLE temporary (n int)")
		if got := value[string](t, c, whichSite); got != "a" {
			t.Errorf("%s: a session that keeps its connection reads at %s", mode, got)
		}
		exec1(t, c, "DROP TABLE temporary")
		exec1(t, c, "SET app.x = 'kept'")
		awaitReads(t, c)
		if got := value[string](t, c, "SELECT current_setting('app.x') || name FROM site"); got != "keptb" {
			t.Errorf("%s: settings elsewhere: %s", mode, got)
		}
	}
	r := x.g.Report()
	if len(r.Sessions) == 0 || r.Sessions[0].ReadSite != "b" || r.Sessions[0].Site != "a" {
		t.Errorf("%+v", r.Sessions)
	}
	var moves, away uint64
	for _, s := range r.Stats {
		moves += s.Moves
		away += s.ReadsAway
	}
	if moves != 0 || away == 0 {
		t.Errorf("%d moves, %d reads away", moves, away)
	}
	if r.Routes[0].ReadsText() != "b 1 (lag 0.250 s)" {
		t.Errorf("%+v", r.Routes)
	}
}

// TestWhatFollowsAReadGoesHome: in one pipeline, with and without a Sync between.
func TestWhatFollowsAReadGoesHome(t *testing.T) {
	x := newTwo(t, nil)
	c := open1(t, dsn(x.addr, ""))
	const write = "INSERT INTO ledger SELECT 7, coalesce(max(seq), 0) + 1 FROM ledger RETURNING (SELECT name FROM site)"
	for _, sqls := range [][]string{{whichSite, write}, {write, whichSite}, {whichSite, whichSite}, {whichSite, "", write}, {write, "", whichSite}, {whichSite, "", whichSite, "", write, "", write, whichSite}} {
		awaitReads(t, c)
		p := c.PgConn().StartPipeline(t.Context())
		var want []string
		for i, sql := range sqls {
			if sql == "" {
				if err := p.Sync(); err != nil {
					t.Fatal(err)
				}
				continue
			}
			p.SendQueryParams(sql, nil, nil, nil, nil)
			switch {
			case slices.Contains(segmentOf(sqls, i), write):
				want = append(want, "a")
			case slices.Contains(sqls[:i], write):
				want = append(want, "") // at home until the write has crossed
			default:
				want = append(want, "b")
			}
		}
		if err := p.Sync(); err != nil {
			t.Fatal(err)
		}
		var got []string
		for {
			res, err := p.GetResults()
			if err != nil {
				t.Fatal(err)
			}
			if res == nil {
				break
			}
			if r, ok := res.(*pgconn.ResultReader); ok {
				one := r.Read()
				if one.Err != nil {
					t.Fatalf("%q: %v", sqls, one.Err)
				}
				got = append(got, string(one.Rows[0][0]))
			}
			if len(got) == len(want) {
				break
			}
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		for i := range want {
			if want[i] != "" && got[i] != want[i] {
				t.Errorf("%q: at %v, want %v", sqls, got, want)
				break
			}
		}
	}
	if n := pgtest.Query(t, x.b, "shop", "SELECT count(*) FROM ledger")[0][0]; n != "0" {
		t.Errorf("%s writes have gone to the site that is read at", n)
	}
}

// segmentOf are the statements that are in one transaction with the i-th.
func segmentOf(sqls []string, i int) []string {
	from, to := i, i
	for from > 0 && sqls[from-1] != "" {
		from--
	}
	for to < len(sqls) && sqls[to] != "" {
		to++
	}
	return sqls[from:to]
}

// TestASessionNeverSeesLess: after a write the home serves reads until the other site is known to have it, without a wait; after a read
// elsewhere, what goes home waits until the home has what could be seen there.
func TestASessionNeverSeesLess(t *testing.T) {
	x := newTwo(t, nil)
	c := open1(t, dsn(x.addr, ""))
	awaitReads(t, c)
	release := make(chan struct{})
	held := make(chan string, 100)
	x.sites.hold(func(ctx context.Context, from, to string) error {
		select {
		case held <- from + to:
		default:
		}
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	if got := value[string](t, c, whichSite); got != "b" { // which no call from before covers
		t.Fatal(got)
	}
	// Home again: it waits.
	done := make(chan error, 1)
	go func() {
		_, err := c.Exec(context.Background(), "INSERT INTO ledger VALUES (1, 1)")
		done <- err
	}()
	for way := range held {
		if way == "ba" {
			break
		}
	}
	if n := count(t, x.a, "true"); n != "0" {
		t.Error("a session went home before that had what it has seen elsewhere")
	}
	select {
	case err := <-done:
		t.Fatalf("it did not wait: %v", err)
	default:
	}
	close(release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	// After a write: the home reads, and nothing waits.
	x.sites.hold(func(ctx context.Context, _, _ string) error {
		<-ctx.Done()
		return ctx.Err()
	})
	exec1(t, c, "INSERT INTO ledger VALUES (1, 2)")
	for range 200 {
		if got := value[string](t, c, whichSite); got != "a" {
			t.Fatal("a read elsewhere, which does not have the write yet")
		}
	}
	x.sites.hold(nil)
	awaitReads(t, c)
	// Reads alone need no more than one way there.
	x.sites.mu.Lock()
	clear(x.sites.ways)
	x.sites.mu.Unlock()
	for range 100 {
		if got := value[string](t, c, whichSite); got != "b" {
			t.Error("nothing can have been missed, and it read at home")
		}
	}
	x.sites.mu.Lock()
	defer x.sites.mu.Unlock()
	if n := x.sites.ways["ab"]; n != 0 {
		t.Errorf("asked %d times for what cannot have been missed", n)
	}
}

// TestReadsElsewhereSurviveItsLoss: the connection breaks at each byte of answers, and the client sees what it would at home.
func TestReadsElsewhereSurviveItsLoss(t *testing.T) {
	x := newTwo(t, nil)
	for _, mode := range []string{"", "default_query_exec_mode=simple_protocol", "default_query_exec_mode=exec"} {
		c := open1(t, dsn(x.addr, mode))
		lost := 0
		for n := range 60 {
			awaitReads(t, c)
			x.relay.after(int64(n) * 3)
			if got := value[string](t, c, whichSite+" WHERE name <> $1", "x"); got == "a" {
				lost++
			}
			x.relay.after(-1)
		}
		if lost < 20 {
			t.Errorf("%s: only %d of 60 reads were run again", mode, lost)
		}
		t.Logf("%s: %d of 60 reads ran again at home", mode, lost)
		// A result of which the client has a part.
		awaitReads(t, c)
		x.relay.after(200_000)
		rows, err := c.Query(t.Context(), "SELECT name, generate_series(1, 100000) FROM site")
		if err == nil {
			for rows.Next() {
				err = rows.Err()
			}
			err = errors.Join(err, rows.Err())
			rows.Close()
		}
		x.relay.after(-1)
		wantCode(t, mode+": a part was handed on", err, "40001", "site b")
		if got := value[string](t, c, "SELECT 'lives'"); got != "lives" {
			t.Error(got)
		}
	}
	// Nobody is there any more.
	c := open1(t, dsn(x.addr, ""))
	awaitReads(t, c)
	x.relay.l.Close()
	x.relay.cut()
	for range 50 {
		if got := value[string](t, c, whichSite); got != "a" {
			t.Fatal(got)
		}
	}
	exec1(t, c, "INSERT INTO ledger VALUES (9, 9)")
}

// TestNoReadWaitsForAConnectionElsewhere: with one connection per pool, what is busy there is read at home.
func TestNoReadWaitsForAConnectionElsewhere(t *testing.T) {
	x := newTwo(t, func(c *Config) { c.PoolMax = 1 })
	one, other := open1(t, dsn(x.addr, "")), open1(t, dsn(x.addr, ""))
	awaitReads(t, one)
	rows, err := one.Query(t.Context(), "SELECT name, generate_series(1, 300000) FROM site") // more than buffers hold
	if err != nil {
		t.Fatal(err)
	}
	if !rows.Next() {
		t.Fatal(rows.Err())
	}
	if got := value[string](t, other, whichSite); got != "a" {
		t.Errorf("at %s", got)
	}
	rows.Close()
	awaitReads(t, other)
}

func TestTextsThatRoam(t *testing.T) {
	known := &tainted{version: 1, local: map[string]bool{"local": true, "Local": true}}
	for sql, want := range map[string]bool{
		"SELECT 1": true, "select a from t": true, "(SELECT 1) UNION (SELECT 2)": true, "VALUES (1)": true, "TABLE t": true, "SELECT 1; SELECT 2;": true,
		"WITH x AS (SELECT 1) SELECT * FROM x": true, `SELECT "a" FROM "t" WHERE b = 'pg_type'`: true, "SELECT region, version, regexp_replace(a, b, c) FROM t": true,
		"SELECT now(), random(), count(*) FROM t /* pg_type */ -- nextval": true,
		"": false, ";": false, "SHOW work_mem": false, "EXPLAIN SELECT 1": false, "COPY t TO STDOUT": false, "SET a = 1": false, "FETCH c": false, "NOTIFY x": false,
		"SELECT 1; SHOW work_mem": false, "BEGIN; SELECT 1": false,
		"SELECT nextval('s')": false, "SELECT NextVal('s')": false, `SELECT "nextval"('s')`: false, "SELECT last_value FROM s": false,
		"SELECT pg_notify('a', 'b')": false, "SELECT * FROM pg_stat_activity": false, `SELECT * FROM "pg_type"`: false, `SELECT * FROM U&"\0070g_type"`: false,
		"SELECT 't'::regclass": false, "SELECT ctid FROM t": false, "SELECT xmin, a FROM t": false, "SELECT a FROM t FOR SHARE": false, "SELECT txid_current()": false,
		"SELECT * FROM information_schema.tables": false, "SELECT a FROM local": false, `SELECT a FROM s."Local"`: false, "SELECT a FROM LOCAL": false, "TABLE local": false,
	} {
		if got := known.roams([]byte(sql), false); got != want {
			t.Errorf("%s: %t", sql, got)
		}
	}
	for what, u := range map[string]*tainted{"nothing is known": {}, "anything may write": {version: 1, all: true}, "what is local is not known": {version: 1, allLocal: true}} {
		if u.roams([]byte("SELECT 1"), false) {
			t.Errorf("%s, and a read roams", what)
		}
	}
}

// TestNothingHomelyRoams: wherever in a text a word stands that makes it a matter of its site.
func TestNothingHomelyRoams(t *testing.T) {
	known := &tainted{version: 1, local: map[string]bool{"local": true}}
	plain := []string{"select", "a", "from", "t", "(", ")", ",", "'pg_type'", "where", "1", "\"x\"", "/* c */", "\n", "and"}
	bad := append(slices.Collect(maps.Keys(homely)), "pg_class", "local", "\"pg_x\"")
	rapid.Check(t, func(t *rapid.T) {
		parts := rapid.SliceOfN(rapid.SampledFrom(plain), 0, 8).Draw(t, "parts")
		parts = append([]string{"SELECT 1"}, parts...)
		if !known.roams([]byte(strings.Join(parts, " ")), false) {
			t.Fatalf("%q does not roam", parts)
		}
		at := rapid.IntRange(1, len(parts)).Draw(t, "at")
		parts = slices.Insert(parts, at, rapid.SampledFrom(bad).Draw(t, "bad"))
		if known.roams([]byte(strings.Join(parts, " ")), false) {
			t.Fatalf("%q roams", parts)
		}
	})
}

// countingSites is two sites of which one follows the other: what is done at from is a number that grows, and becomes visible at to.
type countingSites struct {
	Sites
	done, visible atomic.Int64
	delay         func() time.Duration
	fails         func() bool
	calls         atomic.Int64
}

func (c *countingSites) CatchUp(ctx context.Context, _, _, _ string) error {
	c.calls.Add(1)
	n := c.done.Load()
	select {
	case <-time.After(c.delay()):
	case <-ctx.Done():
		return ctx.Err()
	}
	if c.fails() {
		return errors.New("a test")
	}
	c.visible.Store(max(n, c.visible.Load()))
	return nil
}

// TestCrossingSaysOnlyWhatIsVisible: whoever asks, and however calls go on, what a session is told to be visible is; who waits is told
// in the end; and nothing runs on when nobody asks.
func TestCrossingSaysOnlyWhatIsVisible(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		delays := rapid.SliceOfN(rapid.IntRange(1, 300), 1, 10).Draw(rt, "delays")
		fails := rapid.SliceOfN(rapid.Bool(), 1, 10).Draw(rt, "fails")
		fails = append(fails, false)
		pauses := rapid.SliceOfN(rapid.IntRange(0, 120), 1, 30).Draw(rt, "pauses")
		synctest.Test(t, func(t *testing.T) {
			var n atomic.Int64
			sites := &countingSites{
				delay: func() time.Duration { return time.Duration(delays[int(n.Load())%len(delays)]) * time.Millisecond },
				fails: func() bool { return fails[int(n.Add(1))%len(fails)] },
			}
			g, err := NewServer(Config{Mode: TransactionMode, Router: &routes{}, Verifiers: &oneVerifier{}, Sites: sites})
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for s := range 3 {
				wg.Go(func() {
					for i, p := range pauses {
						time.Sleep(time.Duration(p+s) * time.Millisecond)
						mine := sites.done.Add(1)
						at := g.tick()
						c := g.crossing("d", "a", Target{Site: "b"})
						if (i+s)%3 == 0 {
							if err := c.wait(t.Context(), g, at, nil); err != nil {
								t.Error(err)
							}
						} else if c.until.Load() <= at {
							c.soon(g)
							continue
						}
						if v := sites.visible.Load(); v < mine {
							t.Errorf("%d is said to be visible, and %d is", mine, v)
						}
					}
				})
			}
			wg.Wait()
			time.Sleep(time.Minute)
			calls := sites.calls.Load()
			time.Sleep(time.Minute)
			if sites.calls.Load() != calls {
				t.Error("it goes on although nobody asks")
			}
			g.endLife()
			g.backends.Wait()
		})
	})
}
