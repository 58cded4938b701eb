package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/pgwire"
)

// twins are two sites with the same roles, verifiers and tables. Which one answers is in the table site.
func twins(t testing.TB) []*pgcluster.Cluster {
	t.Helper()
	a := site(t, "")
	verifier := pgtest.Query(t, a, "postgres", "SELECT rolpassword FROM pg_authid WHERE rolname = 'app'")[0][0]
	b := site(t, verifier)
	for name, c := range map[string]*pgcluster.Cluster{"a": a, "b": b} {
		pgtest.Exec(t, c, "postgres", "CREATE ROLE clerk; GRANT clerk TO app")
		pgtest.Exec(t, c, "shop", fmt.Sprintf(`CREATE TABLE site AS SELECT '%s' AS name; GRANT SELECT ON site TO PUBLIC;
			CREATE TABLE secret(owner text, v text); INSERT INTO secret VALUES ('1', 'of 1'), ('2', 'of 2');
			ALTER TABLE secret ENABLE ROW LEVEL SECURITY;
			CREATE POLICY own ON secret USING (owner = current_setting('app.user_id', true)); GRANT SELECT ON secret TO app;
			CREATE SCHEMA other AUTHORIZATION app; CREATE TABLE other.here AS SELECT 'other' AS v; GRANT SELECT ON other.here TO app;
			CREATE FUNCTION sets(n text, v text) RETURNS text LANGUAGE sql AS 'SELECT set_config($1, $2, false)';
			CREATE SEQUENCE s; GRANT ALL ON SEQUENCE s TO app`, name))
	}
	return []*pgcluster.Cluster{a, b}
}

// alternate serves two sites so that each transaction goes to the other one than the one before, whoever's it is.
func alternate(t testing.TB, cfg Config) (g *Server, addr string) {
	t.Helper()
	cfg.Mode = TransactionMode
	return serve(t, cfg, twins(t)...)
}

// visits runs a query a few times and gives the sites that answered, with what they answered.
func visits(t testing.TB, c *pgx.Conn, expr string, args ...any) map[string]bool {
	t.Helper()
	seen := map[string]bool{}
	for range 6 {
		seen[value[string](t, c, "SELECT (SELECT name FROM site) || ': ' || ("+expr+")::text", args...)] = true
	}
	return seen
}

func wantVisits(t testing.TB, what string, got map[string]bool, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(got))); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// TestSettingsGoAlong: each transaction goes to another site, and the client does not see it.
func TestSettingsGoAlong(t *testing.T) {
	g, addr := alternate(t, Config{PoolMax: 2})
	c := open1(t, dsn(addr, "application_name=first"))
	neighbour := open1(t, dsn(addr, "application_name=first"))
	wantVisits(t, "alternating", visits(t, c, "1"), "a: 1", "b: 1")

	exec1(t, c, "SET work_mem = '7MB'")
	wantVisits(t, "SET", visits(t, c, "SELECT current_setting('work_mem')"), "a: 7MB", "b: 7MB")
	wantVisits(t, "neighbour", visits(t, neighbour, "SELECT current_setting('work_mem')"), "a: 4MB", "b: 4MB")

	exec1(t, c, "BEGIN")
	exec1(t, c, "SET work_mem = '9MB'")
	exec1(t, c, "SAVEPOINT s")
	exec1(t, c, "SET work_mem = '10MB'")
	exec1(t, c, "SET statement_timeout = '1h'")
	exec1(t, c, "ROLLBACK TO s")
	exec1(t, c, "COMMIT")
	wantVisits(t, "savepoint", visits(t, c, "SELECT current_setting('work_mem') || current_setting('statement_timeout')"), "a: 9MB0", "b: 9MB0")
	exec1(t, c, "BEGIN; SET work_mem = '11MB'; SET LOCAL search_path = other; ROLLBACK")
	wantVisits(t, "rollback", visits(t, c, "SELECT current_setting('work_mem')"), "a: 9MB", "b: 9MB")
	exec1(t, c, "RESET work_mem")
	wantVisits(t, "RESET", visits(t, c, "SELECT current_setting('work_mem')"), "a: 4MB", "b: 4MB")

	exec1(t, c, "SET search_path = other, public")
	wantVisits(t, "search_path", visits(t, c, "SELECT v FROM here"), "a: other", "b: other")
	exec1(t, c, "SET application_name = 'it''s \\ me'")
	if got := c.PgConn().ParameterStatus("application_name"); got != `it's \ me` {
		t.Errorf("the client was told %q", got)
	}
	wantVisits(t, "quotes", visits(t, c, "SELECT current_setting('application_name')"), `a: it's \ me`, `b: it's \ me`)
	if got := neighbour.PgConn().ParameterStatus("application_name"); got != "first" {
		t.Errorf("the neighbour was told %q", got)
	}
	exec1(t, c, "SET standard_conforming_strings = off; SET backslash_quote = on")
	exec1(t, c, `SET application_name = 'a\' SET x.y = b'`)
	wantVisits(t, "backslashes", visits(t, c, "SELECT current_setting('application_name')"), "a: a' SET x.y = b", "b: a' SET x.y = b")
	exec1(t, c, "RESET ALL")
	exec1(t, c, "SET ROLE clerk")
	wantVisits(t, "role", visits(t, c, "current_user"), "a: clerk", "b: clerk")
	wantVisits(t, "neighbour's role", visits(t, neighbour, "current_user"), "a: app", "b: app")
	exec1(t, c, "RESET ROLE")

	// By a function that nobody has read.
	if _, err := c.Exec(t.Context(), "SELECT sets($1, $2)", "work_mem", "12MB"); err != nil {
		t.Fatal(err)
	}
	wantVisits(t, "function", visits(t, c, "SELECT current_setting('work_mem')"), "a: 12MB", "b: 12MB")
	exec1(t, c, "DISCARD ALL")
	// pgx still believes in the statements it had prepared.
	wantVisits(t, "DISCARD ALL", visits(t, c, "SELECT current_setting('work_mem')", pgx.QueryExecModeExec), "a: 4MB", "b: 4MB")
	if pins := g.Pins(); len(pins) != 0 {
		t.Errorf("pins: %v", pins)
	}
}

// TestRowSecurityHolds: settings that row security depends on belong to one client, however they were made.
func TestRowSecurityHolds(t *testing.T) {
	_, addr := alternate(t, Config{PoolMax: 1})
	one, two, none := open1(t, dsn(addr, "")), open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
	const rows = "SELECT coalesce(string_agg(v, ','), 'nothing') FROM secret"
	exec1(t, one, "SET app.user_id = '1'")
	exec1(t, two, "SELECT set_config('app.user_id', $1, false)", "2")
	for range 3 {
		wantVisits(t, "one", visits(t, one, rows), "a: of 1", "b: of 1")
		wantVisits(t, "two", visits(t, two, rows), "a: of 2", "b: of 2")
		wantVisits(t, "none", visits(t, none, rows), "a: nothing", "b: nothing")
	}
	// A parameter of which nobody sees the name does not reach others either. The client itself loses it when it moves.
	exec1(t, none, "SELECT sets('app.' || 'user_id', '1')")
	three := open1(t, dsn(addr, ""))
	wantVisits(t, "hidden", visits(t, three, rows), "a: nothing", "b: nothing")
	// A name that is a parameter keeps the client where it is.
	exec1(t, three, "SELECT set_config($1, $2, false)", "app.user_id", "2")
	if got := visits(t, three, rows); len(got) != 1 || !strings.HasSuffix(slices.Collect(maps.Keys(got))[0], "of 2") {
		t.Errorf("name in a parameter: %v", got)
	}
}

func TestPinsHoldAndGo(t *testing.T) {
	g, addr := alternate(t, Config{})
	for _, c := range []struct{ begin, why, end string }{
		{"CREATE TEMP TABLE x(a int)", "temporary objects", "DROP TABLE x"},
		{"SELECT 1 AS a INTO TEMP x", "temporary objects", "DISCARD ALL"},
		{"LISTEN news", "LISTEN", "UNLISTEN *"},
		{"SELECT pg_advisory_lock(1)", "session advisory locks", "SELECT pg_advisory_unlock_all()"},
		{"BEGIN; DECLARE cur CURSOR WITH HOLD FOR SELECT 1; COMMIT", "a cursor WITH HOLD", "CLOSE cur"},
		{"PREPARE p AS SELECT 1", "SQL PREPARE", "DEALLOCATE p"},
		{"BEGIN; CREATE TABLE pt(a int); PREPARE TRANSACTION 'x'", "PREPARE TRANSACTION", "COMMIT PREPARED 'x'"},
	} {
		conn := open1(t, dsn(addr, "default_query_exec_mode=simple_protocol"))
		exec1(t, conn, c.begin)
		if got := visits(t, conn, "1"); len(got) != 1 {
			t.Errorf("%s: went to %v", c.begin, got)
		}
		if pins := g.Pins(); pins[c.why] != 1 || len(pins) != 1 {
			t.Errorf("%s: pins %v", c.begin, pins)
		}
		exec1(t, conn, c.end)
		if got := visits(t, conn, "1"); len(got) != 2 {
			t.Errorf("after %s: went to %v", c.end, got)
		}
		conn.Close(t.Context())
	}
	// What is gone with its transaction pins nobody.
	conn := open1(t, dsn(addr, ""))
	for _, sql := range []string{
		"BEGIN; CREATE TEMP TABLE y(a int) ON COMMIT DROP; COMMIT", "BEGIN; CREATE TEMP TABLE y(a int); ROLLBACK", "SELECT pg_advisory_xact_lock(1)",
		"BEGIN; DECLARE c CURSOR FOR SELECT 1; COMMIT",
	} {
		exec1(t, conn, sql)
		if got := visits(t, conn, "1"); len(got) != 2 {
			t.Errorf("%s: went to %v", sql, got)
		}
	}
	// One that is lost is told with its reason.
	exec1(t, conn, "LISTEN news")
	pid := value[int](t, conn, "SELECT pg_backend_pid()")
	killBackend(t, pid)
	_, err := conn.Exec(t.Context(), "SELECT 1")
	wantCode(t, "lost", err, "08006", "LISTEN")
}

// TestPreparedStatementsGoAlong: clients prepare once, and use it at every site.
func TestPreparedStatementsGoAlong(t *testing.T) {
	_, addr := alternate(t, Config{PoolMax: 1})
	c := open1(t, dsn(addr, "default_query_exec_mode=cache_statement"))
	neighbour := open1(t, dsn(addr, ""))
	if _, err := c.Prepare(t.Context(), "p", "SELECT name || $1::int FROM site"); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for i := range 8 {
		var v string
		if err := c.QueryRow(t.Context(), "p", i%2).Scan(&v); err != nil {
			t.Fatal(err)
		}
		seen[v[:1]] = true
		// Others prepare the same and their own meanwhile.
		name := fmt.Sprintf("p%d", i)
		if _, err := neighbour.Prepare(t.Context(), name, "SELECT name || $1::int FROM site"); err != nil {
			t.Fatal(err)
		}
		if err := neighbour.QueryRow(t.Context(), name, 7).Scan(&v); err != nil || v[1:] != "7" {
			t.Fatal(v, err)
		}
	}
	if len(seen) != 2 {
		t.Errorf("answers came from %v", seen)
	}

	raw := c.PgConn()
	again := func() error {
		_, err := raw.Prepare(t.Context(), "p", "SELECT 1", nil)
		return err
	}
	wantCode(t, "prepared twice", again(), "42P05", "")
	for _, end := range []string{"DEALLOCATE p", `DEALLOCATE PREPARE "p";`} {
		res, err := raw.Exec(t.Context(), end).ReadAll()
		if err != nil || res[0].CommandTag.String() != "DEALLOCATE" {
			t.Errorf("%s: %v, %v", end, res, err)
		}
		wantCode(t, "after "+end, raw.ExecPrepared(t.Context(), "p", [][]byte{[]byte("1")}, nil, nil).Read().Err, "26000", `"p" does not exist`)
		if err := again(); err != nil {
			t.Fatal(err)
		}
	}
	if err := raw.Deallocate(t.Context(), "p"); err != nil { // by Close
		t.Fatal(err)
	}
	wantCode(t, "after Close", raw.ExecPrepared(t.Context(), "p", nil, nil, nil).Read().Err, "26000", `"p" does not exist`)
	wantCode(t, "unnamed", raw.ExecPrepared(t.Context(), "", nil, nil, nil).Read().Err, "26000", "unnamed prepared statement does not exist")
	// One that fails leaves nothing behind, with what was sent after it.
	for range 3 {
		_, err := raw.Prepare(t.Context(), "q", "SELECT FROM nowhere", nil)
		wantCode(t, "Parse that fails", err, "42P01", "")
	}
	if _, err := raw.Prepare(t.Context(), "q", "SELECT 5", nil); err != nil {
		t.Error(err)
	}
	// DEALLOCATE in a transaction that has failed is refused, and the next is not disturbed.
	exec1(t, c, "BEGIN")
	_, _ = c.Exec(t.Context(), "SELECT 1/0")
	_, err := raw.Exec(t.Context(), "DEALLOCATE q").ReadAll()
	wantCode(t, "failed transaction", err, "25P02", "")
	exec1(t, c, "ROLLBACK")
	for _, sql := range []string{"DEALLOCATE ALL", "DISCARD ALL"} {
		if _, err := raw.Prepare(t.Context(), "r", "SELECT 6", nil); err != nil {
			t.Fatal(err)
		}
		if _, err := raw.Exec(t.Context(), sql).ReadAll(); err != nil {
			t.Fatal(err)
		}
		wantCode(t, sql, raw.ExecPrepared(t.Context(), "r", nil, nil, nil).Read().Err, "26000", "")
		if _, err := raw.Prepare(t.Context(), "r", "SELECT 6", nil); err != nil {
			t.Errorf("after %s: %v", sql, err)
		}
		if err := raw.Deallocate(t.Context(), "r"); err != nil {
			t.Fatal(err)
		}
	}
	// More than a backend keeps.
	for range 2 {
		for i := range statementsMax + 30 {
			name := fmt.Sprintf("many%d", i)
			if _, err := neighbour.Prepare(t.Context(), name, fmt.Sprintf("SELECT %d", i)); err != nil {
				t.Fatal(err)
			}
			if res := neighbour.PgConn().ExecPrepared(t.Context(), name, nil, nil, nil).Read(); res.Err != nil {
				t.Fatal(res.Err)
			}
		}
	}
	// One that is too long to be held stays where it is.
	long := "SELECT name || length('" + strings.Repeat("x", textMax) + "') FROM site"
	for _, name := range []string{"long", ""} {
		third := open1(t, dsn(addr, ""))
		if _, err := third.PgConn().Prepare(t.Context(), name, long, nil); err != nil {
			t.Fatal(err)
		}
		seen = map[string]bool{}
		for range 4 {
			res := third.PgConn().ExecPrepared(t.Context(), name, nil, nil, nil).Read()
			if res.Err != nil {
				t.Fatal(res.Err)
			}
			seen[string(res.Rows[0][0])] = true
		}
		if len(seen) != 1 {
			t.Errorf("%q: %v", name, seen)
		}
		third.Close(t.Context()) // PoolMax is 1
	}
}

// TestStatementsAreParsedUnderOnesOwnSettings: constants are converted when a statement is parsed, so only sessions with the
// same settings share one.
func TestStatementsAreParsedUnderOnesOwnSettings(t *testing.T) {
	c := site(t, "")
	_, addr := serve(t, Config{Mode: TransactionMode, PoolMax: 1}, c)
	const sql = "SELECT ('02/01/2020'::date)::text || (SELECT count(*) FROM pg_class WHERE false)"
	one, two := open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
	exec1(t, one, "SET DateStyle = 'ISO, DMY'")
	exec1(t, two, "SET DateStyle = 'ISO, MDY'")
	for i, c := range []struct {
		conn *pgx.Conn
		want string
	}{{one, "2020-01-020"}, {two, "2020-02-010"}, {one, "2020-01-020"}, {two, "2020-02-010"}} {
		if got := value[string](t, c.conn, sql); got != c.want {
			t.Errorf("%d: %s, want %s", i, got, c.want)
		}
	}
	three := open1(t, dsn(addr, ""))
	exec1(t, three, "BEGIN; SET LOCAL DateStyle = 'ISO, DMY'")
	if got := value[string](t, three, sql); got != "2020-01-020" {
		t.Error("SET LOCAL:", got)
	}
	exec1(t, three, "COMMIT")
	four := open1(t, dsn(addr, ""))
	if got := value[string](t, four, sql); got != "2020-02-010" {
		t.Error("after another's SET LOCAL:", got)
	}
}

// TestSequencesOfOthersAreNotSeen: lastval of another client would be a wrong value, so there is none.
func TestSequencesOfOthersAreNotSeen(t *testing.T) {
	c := site(t, "")
	pgtest.Exec(t, c, "shop", "CREATE SEQUENCE s; GRANT ALL ON SEQUENCE s TO app")
	_, addr := serve(t, Config{Mode: TransactionMode, PoolMax: 1}, c)
	one, two := open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeSimpleProtocol, pgx.QueryExecModeExec, pgx.QueryExecModeCacheStatement} {
		exec1(t, one, "SELECT nextval('s')", mode)
		_, err := two.Exec(t.Context(), "SELECT lastval()", mode)
		wantCode(t, mode.String(), err, "55000", "")
		exec1(t, one, "BEGIN", mode)
		exec1(t, one, "SELECT nextval('s')", mode)
		exec1(t, one, "SELECT lastval()", mode)
		exec1(t, one, "COMMIT", mode)
	}
}

// TestSettingsThatCannotBeHadEndTheSession: rather than to let it run with others.
func TestSettingsThatCannotBeHadEndTheSession(t *testing.T) {
	sites := twins(t)
	_, addr := serve(t, Config{Mode: TransactionMode}, sites...)
	pgtest.Exec(t, sites[1], "postgres", "REVOKE clerk FROM app")
	for range 4 { // Not all begin at the same site.
		c, err := pgx.Connect(t.Context(), dsn(addr, "default_query_exec_mode=simple_protocol"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Exec(t.Context(), "SET ROLE clerk")
		for i := 0; i < 3 && err == nil; i++ {
			_, err = c.Exec(t.Context(), "SELECT 1")
		}
		if e, ok := err.(*pgconn.PgError); ok && e.Code == "42501" { //nolint:errorlint // what pgx gives
			c.Close(t.Context())
			continue // SET ROLE itself went to the site where it is not allowed
		}
		e := wantCode(t, "role not granted", err, "57P01", "cannot be established")
		if !strings.Contains(e.Detail, "clerk") || e.Hint == "" {
			t.Errorf("%+v", e)
		}
		return
	}
	t.Error("SET ROLE never went to the site where it is allowed")
}

func TestServersThatDifferAreRefused(t *testing.T) {
	told := []pgwire.Param{{Name: "server_version", Value: "15.18 (Debian)"}, {Name: "server_encoding", Value: "UTF8"}, {Name: "TimeZone", Value: "UTC"}}
	for _, c := range []struct{ name, value, want string }{
		{"server_version", "15.3", ""},
		{"server_version", "16.3", "server_version"},
		{"server_encoding", "LATIN1", "server_encoding"},
		{"TimeZone", "Asia/Seoul", ""},
	} {
		now := reported(slices.Clone(told), pgwire.Param{Name: c.name, Value: c.value})
		if got := apart(told, now); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

// TestPoolIsBounded: who waits is served when one is free, and told when none gets free.
func TestPoolIsBounded(t *testing.T) {
	c := site(t, "")
	g, addr := serve(t, Config{Mode: TransactionMode, PoolMax: 2, HoldMax: 300 * time.Millisecond}, c)
	conns := make([]*pgx.Conn, 12)
	for i := range conns {
		conns[i] = open1(t, dsn(addr, ""))
	}
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() {
			for range 20 {
				if _, err := c.Exec(context.Background(), "SELECT 1"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := pgtest.Query(t, c, "postgres", "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'")[0][0]; n != "2" {
		t.Errorf("%s connections", n)
	}
	exec1(t, conns[0], "BEGIN")
	exec1(t, conns[1], "BEGIN")
	_, err := conns[2].Exec(t.Context(), "SELECT 1")
	wantCode(t, "all in use", err, "53300", "All 2 are in use")
	exec1(t, conns[0], "COMMIT")
	exec1(t, conns[3], "SELECT 1")
	// A client that leaves in its transaction takes its backend with it; the place is free again.
	conns[1].Close(t.Context())
	exec1(t, conns[4], "BEGIN")
	exec1(t, conns[3], "BEGIN")
	exec1(t, conns[3], "COMMIT")
	exec1(t, conns[4], "COMMIT")
	// Those that nobody uses are closed in time.
	until(t, "idle connections are closed", func() bool {
		g.tidy(time.Now().Add(time.Hour)) // A client has its answer a moment before its connection is idle.
		return pgtest.Query(t, c, "postgres", "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'")[0][0] == "0"
	})
	exec1(t, conns[3], "SELECT 1")
}

// TestOldEpochsAreNotUsed: connections of an older epoch are closed, wherever they are.
func TestOldEpochsAreNotUsed(t *testing.T) {
	c := site(t, "")
	r := &routes{targets: []Target{target(c, "a")}}
	_, addr := serve(t, Config{Mode: TransactionMode, Router: r, HoldMax: 200 * time.Millisecond}, c)
	one, two := open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
	held := value[int](t, one, "SELECT pg_backend_pid()")
	if again := value[int](t, two, "SELECT pg_backend_pid()"); again != held {
		t.Errorf("pid %d, then %d: the backend is not shared", held, again)
	}
	exec1(t, two, "BEGIN")
	idle := value[int](t, one, "SELECT pg_backend_pid()")
	r.mu.Lock()
	r.targets[0].Epoch = 7
	r.mu.Unlock()
	if now := value[int](t, one, "SELECT pg_backend_pid()"); now == idle || now == held {
		t.Error("a connection of an older epoch was used")
	}
	if value[int](t, two, "SELECT pg_backend_pid()") != held {
		t.Error("an open transaction moved")
	}
	exec1(t, two, "COMMIT")
	until(t, "the old one is closed", func() bool {
		return pgtest.Query(t, c, "postgres", fmt.Sprintf("SELECT count(*) FROM pg_stat_activity WHERE pid = %d", held))[0][0] == "0"
	})
	r.mu.Lock()
	r.err = hinted{"no site may accept now", "wait"}
	r.mu.Unlock()
	_, err := one.Exec(t.Context(), "SELECT 1")
	if e := wantCode(t, "no site", err, "57P03", "no site may accept"); e.Hint != "wait" {
		t.Errorf("%+v", e)
	}
}

type hinted struct{ says, hint string }

func (h hinted) Error() string    { return h.says }
func (h hinted) HintText() string { return h.hint }

// TestProgramsWhileEachTransactionMoves runs clients while the site changes with every transaction.
func TestProgramsWhileEachTransactionMoves(t *testing.T) {
	sites := twins(t)
	for _, c := range sites {
		if out, err := run(t, c, "pgbench", "", "-i", "-s", "1", "-q", fmt.Sprintf("host=%s port=%d dbname=shop user=app", c.SocketDir(), c.Port())); err != nil {
			t.Fatalf("%s %v", out, err)
		}
	}
	_, addr := serve(t, Config{Mode: TransactionMode, PoolMax: 4}, sites...)
	for _, protocol := range []string{"simple", "extended", "prepared"} {
		out, err := run(t, sites[0], "pgbench", "", "-n", "-M", protocol, "-c", "6", "-j", "2", "-t", "50", dsn(addr, ""))
		if err != nil || !strings.Contains(out, "number of failed transactions: 0 ") || !strings.Contains(out, "processed: 300/300") {
			t.Errorf("%s: %s %v", protocol, out, err)
		}
	}
	a := pgtest.Query(t, sites[0], "shop", "SELECT count(*) FROM pgbench_history")[0][0]
	b := pgtest.Query(t, sites[1], "shop", "SELECT count(*) FROM pgbench_history")[0][0]
	if a == "0" || b == "0" {
		t.Errorf("%s transactions at one site, %s at the other", a, b)
	}
	var sum int
	for _, n := range []string{a, b} {
		var k int
		if _, err := fmt.Sscan(n, &k); err != nil {
			t.Fatal(err)
		}
		sum += k
	}
	if sum != 900 {
		t.Errorf("%d transactions at both sites", sum)
	}
	out, err := run(t, sites[0], "psql", "SET work_mem='6MB';\nSHOW work_mem;\nSELECT name FROM site;\nSHOW work_mem;\nSELECT name FROM site;\nBEGIN;\nSELECT 1/0;\nSELECT 1;\nROLLBACK;\nSHOW work_mem;\n", "-XAt", dsn(addr, ""))
	if err != nil || strings.Count(out, "6MB") != 3 || !strings.Contains(out, "division by zero") || !strings.Contains(out, "current transaction is aborted") {
		t.Errorf("%s %v", out, err)
	}
}

// TestShapesAreKept: what a client once learned of a statement's columns holds at every server, or it is told as PostgreSQL
// tells it; it is never given other columns.
func TestShapesAreKept(t *testing.T) {
	sites := twins(t)
	for i, c := range sites {
		columns := "1 AS n, 'x'::text AS v"
		if i == 1 {
			columns = "'x'::text AS v, 1 AS n"
		}
		pgtest.Exec(t, c, "shop", "CREATE TABLE odd AS SELECT "+columns+"; GRANT SELECT ON odd TO app; CREATE TABLE grows AS SELECT 1 AS n; ALTER TABLE grows OWNER TO app")
	}
	_, addr := serve(t, Config{Mode: TransactionMode, PoolMax: 1}, sites...)
	for _, name := range []string{"p", ""} {
		c := open1(t, dsn(addr, "")).PgConn()
		d, err := c.Prepare(t.Context(), name, "SELECT * FROM odd", nil)
		if err != nil {
			t.Fatal(err)
		}
		var good, refused int
		for range 6 {
			res := c.ExecPrepared(t.Context(), name, nil, nil, nil).Read()
			if res.Err == nil {
				good++
				if want := map[bool]string{true: "1", false: "x"}[d.Fields[0].Name == "n"]; string(res.Rows[0][0]) != want {
					t.Errorf("%q: column %s is %s", name, d.Fields[0].Name, res.Rows[0][0])
				}
				continue
			}
			refused++
			wantCode(t, "other columns", res.Err, "0A000", "cached plan must not change result type")
		}
		if good != 3 || refused != 3 {
			t.Errorf("%q: %d good, %d refused", name, good, refused)
		}
	}

	// A table that changes under a statement: the error that drivers know, and then a new statement works.
	c := open1(t, dsn(addr, ""))
	raw := c.PgConn()
	prepare := func() {
		t.Helper()
		if _, err := raw.Prepare(t.Context(), "g", "SELECT * FROM grows", nil); err != nil {
			t.Fatal(err)
		}
	}
	exec := func() error { return raw.ExecPrepared(t.Context(), "g", nil, nil, nil).Read().Err }
	prepare()
	for range 2 {
		if err := exec(); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		exec1(t, c, "ALTER TABLE grows ADD COLUMN m int", pgx.QueryExecModeSimpleProtocol)
	}
	for range 2 {
		wantCode(t, "changed table", exec(), "0A000", "cached plan must not change result type")
	}
	if err := raw.Deallocate(t.Context(), "g"); err != nil {
		t.Fatal(err)
	}
	prepare()
	for range 4 {
		if err := exec(); err != nil {
			t.Error(err)
		}
	}
}

// TestWhatWasReadBackIsCompared: all of it, and a failure names the parameter but not its value.
func TestWhatWasReadBackIsCompared(t *testing.T) {
	settings := []pgwire.Param{{Name: "role", Value: "clerk"}, {Name: "app.user_id", Value: "7"}}
	for _, c := range []struct {
		rows [][]string
		want string
	}{
		{[][]string{{"x"}, {"x"}, {"clerk", "7"}}, ""},
		{[][]string{{"clerk", "8"}}, "app.user_id"},
		{[][]string{{"none", "7"}}, "role"},
		{[][]string{{"clerk", "7"}, {"clerk"}}, "role"},
		{nil, "role"},
	} {
		if got := notAsSet(settings, c.rows); got != c.want {
			t.Errorf("%v: %q, want %q", c.rows, got, c.want)
		}
	}
	if got := notAsSet(nil, nil); got != "" {
		t.Error(got)
	}
}

// TestIdleConnectionsThatAreLostAreNotMissed: a session without a backend does not need that one.
func TestIdleConnectionsThatAreLostAreNotMissed(t *testing.T) {
	c := site(t, "")
	g, addr := serve(t, Config{Mode: TransactionMode}, c)
	conn := open1(t, dsn(addr, ""))
	exec1(t, conn, "SET work_mem = '6MB'")
	pooled := func() (idle, open int) {
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, p := range g.pools {
			p.mu.Lock()
			idle, open = idle+len(p.idle), open+p.open
			p.mu.Unlock()
		}
		return idle, open
	}
	until(t, "the gateway has read what was set", func() bool { idle, _ := pooled(); return idle == 1 })
	pgtest.Exec(t, c, "postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
	until(t, "the gateway has seen it", func() bool { _, open := pooled(); return open == 0 })
	if got := value[string](t, conn, "SHOW work_mem"); got != "6MB" {
		t.Error(got)
	}
}

// TestServerThatComesBackIsWaitedFor: between transactions a client does not notice that its server was killed and started
// again, but for the time that it took; a transaction that was open is lost with it.
func TestServerThatComesBackIsWaitedFor(t *testing.T) {
	c := site(t, "")
	_, addr := serve(t, Config{Mode: TransactionMode}, c)
	conn, open := open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
	exec1(t, conn, "SET work_mem = '6MB'")
	if _, err := conn.Exec(t.Context(), "SELECT 1"); err != nil {
		t.Fatal(err)
	}
	exec1(t, open, "BEGIN")
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 1)
	go func() {
		var v string
		if err := conn.QueryRow(t.Context(), "SHOW work_mem").Scan(&v); err != nil {
			v = err.Error()
		}
		got <- v
	}()
	_, err := open.Exec(t.Context(), "SELECT 1")
	var told *pgconn.PgError
	if !errors.As(err, &told) || told.Code != "08006" && told.Code != "57P01" { // the gateway's word, or the server's last one
		t.Errorf("an open transaction: %v", err)
	}
	select {
	case v := <-got:
		t.Errorf("without a server: %s", v)
	default:
	}
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if v := <-got; v != "6MB" {
		t.Errorf("after its return: %s", v)
	}
}

// TestStatementsBeforeTerminateAreCarriedOut: a client may send its last statement and leave without waiting.
func TestStatementsBeforeTerminateAreCarriedOut(t *testing.T) {
	c := site(t, "")
	inEachMode(t, c, func(t *testing.T, _ *Server, addr string) {
		conn, err := pgconn.Connect(t.Context(), dsn(addr, ""))
		if err != nil {
			t.Fatal(err)
		}
		h, err := conn.Hijack()
		if err != nil {
			t.Fatal(err)
		}
		defer h.Conn.Close()
		last := pgwire.AppendQuery(nil, "DROP TABLE IF EXISTS late; CREATE TABLE late AS SELECT 1 AS a FROM pg_sleep(0.2)")
		if _, err := h.Conn.Write(pgwire.AppendMessage(last, pgwire.Terminate, nil)); err != nil {
			t.Fatal(err)
		}
		until(t, "it is done", func() bool {
			return pgtest.Query(t, c, "shop", "SELECT count(*) FROM pg_class WHERE relname = 'late'")[0][0] == "1"
		})
		pgtest.Exec(t, c, "shop", "DROP TABLE late")
	})
}

// TestStrictSeesWhatTriggersDo: what a trigger sets stays with its session, and does not reach another.
func TestStrictSeesWhatTriggersDo(t *testing.T) {
	sites := twins(t)
	for _, c := range sites {
		pgtest.Exec(t, c, "shop", `CREATE TABLE traps(a int); GRANT ALL ON traps TO app;
			CREATE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS $$
			BEGIN PERFORM set_config('app.user_id', '1', false), set_config('work_mem', '13MB', false); RETURN NULL; END $$;
			CREATE TRIGGER trap AFTER INSERT ON traps EXECUTE FUNCTION trap()`)
	}
	_, addr := serve(t, Config{Mode: TransactionMode, PoolMax: 1, Strict: true}, sites...)
	one, two := open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
	exec1(t, one, "INSERT INTO traps VALUES (1)")
	wantVisits(t, "two", visits(t, two, "SELECT count(*) || current_setting('work_mem') FROM secret"), "a: 04MB", "b: 04MB")
	wantVisits(t, "one", visits(t, one, "SELECT current_setting('work_mem')"), "a: 13MB", "b: 13MB")
}

// TestManyClientsAtOnce: clients that do all sorts of things at once, at two sites in turn and with few connections, get
// each its own answers, whatever the others do or break off.
func TestManyClientsAtOnce(t *testing.T) {
	sites := twins(t)
	_, addr := serve(t, Config{Mode: TransactionMode, PoolMax: 3, HoldMax: time.Minute}, sites...)
	for _, c := range sites {
		pgtest.Exec(t, c, "shop", "CREATE TABLE bin(who int, v text); GRANT ALL ON bin TO app")
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for who := range 10 {
		wg.Go(func() {
			c := &restless{who: who, rnd: rand.New(rand.NewPCG(seed, uint64(who))), dsn: dsn(addr, "")}
			for range 60 {
				if err := c.step(ctx); err != nil {
					t.Errorf("client %d: %v", who, err)
					return
				}
			}
			if c.conn != nil {
				_ = c.conn.Close(ctx)
			}
		})
	}
	wg.Wait()
}

// restless is a client that knows what it must be answered.
type restless struct {
	who     int
	rnd     *rand.Rand
	dsn     string
	conn    *pgx.Conn
	setting string
	n       int
}

func (c *restless) step(ctx context.Context) (err error) {
	if c.conn == nil {
		c.setting = ""
		if c.conn, err = pgx.Connect(ctx, c.dsn); err != nil {
			return fmt.Errorf("connect: %w", err)
		}
	}
	c.n++
	token := fmt.Sprintf("%d/%d", c.who, c.n)
	ask := func(sql string, args ...any) error {
		var got string
		if err := c.conn.QueryRow(ctx, sql, args...).Scan(&got); err != nil {
			return fmt.Errorf("%s: %w", sql, err)
		}
		if got != token {
			return fmt.Errorf("%s: got %q, want %q", sql, got, token)
		}
		return nil
	}
	switch c.rnd.IntN(9) {
	case 0:
		return ask("SELECT '"+token+"'", pgx.QueryExecModeSimpleProtocol)
	case 1:
		return ask(fmt.Sprintf("SELECT $1::text /* %d */", c.rnd.IntN(5)), token)
	case 2:
		return ask("SELECT $1::text", pgx.QueryExecModeDescribeExec, token)
	case 3: // what it has set, it has
		c.setting = token
		if _, err := c.conn.Exec(ctx, "SET app.user_id = '"+token+"'"); err != nil {
			return err
		}
		return ask("SELECT current_setting('app.user_id')")
	case 4: // and still has, or never had
		token = c.setting
		return ask("SELECT coalesce(current_setting('app.user_id', true), '')")
	case 5:
		b := &pgx.Batch{}
		for range 20 {
			b.Queue("SELECT $1::text", token)
		}
		if c.rnd.IntN(2) == 0 {
			b.Queue("SELECT 1/0")
		}
		res := c.conn.SendBatch(ctx, b)
		for range 20 {
			var got string
			if err := res.QueryRow().Scan(&got); err != nil || got != token {
				return fmt.Errorf("batch: %q, %w", got, err)
			}
		}
		_ = res.Close()
		return ask("SELECT $1::text", token)
	case 6: // an error, and a transaction that notices
		tx, err := c.conn.Begin(ctx)
		if err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "INSERT INTO bin VALUES ($1, $2)", c.who, token); err != nil {
			return err
		}
		_, _ = tx.Exec(ctx, "SELECT 1/0")
		if err := tx.Commit(ctx); err == nil {
			return errors.New("a transaction that had failed was committed")
		}
		return ask("SELECT $1::text", token)
	case 7: // a cancelled query
		done := make(chan error, 1)
		go func() {
			_, err := c.conn.Exec(ctx, "SELECT pg_sleep(0.05)")
			done <- err
		}()
		if err := c.conn.PgConn().CancelRequest(ctx); err != nil {
			return err
		}
		var pgErr *pgconn.PgError
		if err := <-done; err != nil && (!errors.As(err, &pgErr) || pgErr.Code != "57014") {
			return err
		}
		return ask("SELECT $1::text", token)
	default: // leaves without a word, in the middle of things
		h, err := c.conn.PgConn().Hijack()
		if err != nil {
			return err
		}
		m := pgwire.AppendQuery(nil, "BEGIN; INSERT INTO bin VALUES (1, 'x'); SELECT * FROM generate_series(1, 1000)")
		_, _ = h.Conn.Write(m[:len(m)-c.rnd.IntN(len(m))])
		_ = h.Conn.Close()
		c.conn = nil
		return nil
	}
}
