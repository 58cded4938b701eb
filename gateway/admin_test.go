package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// adminDSN is for the gateway's own database.
func adminDSN(addr string) string {
	return strings.Replace(dsn(addr, ""), "dbname=shop", "dbname=duri", 1)
}

// ask sends one Query and gives its rows, its columns and its tag.
func ask(t testing.TB, c *pgx.Conn, sql string) (rows [][]string, columns, tag string) {
	t.Helper()
	r := c.PgConn().Exec(t.Context(), sql)
	for r.NextResult() {
		rr := r.ResultReader()
		var names []string
		for _, f := range rr.FieldDescriptions() {
			names = append(names, fmt.Sprintf("%s:%d", f.Name, f.DataTypeOID))
		}
		columns = strings.Join(names, " ")
		for rr.NextRow() {
			row := []string{}
			for _, v := range rr.Values() {
				if v == nil {
					row = append(row, "NULL")
				} else {
					row = append(row, string(v))
				}
			}
			rows = append(rows, row)
		}
		ct, err := rr.Close()
		if err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
		tag = ct.String()
	}
	if err := r.Close(); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return rows, columns, tag
}

// cell finds a value of a table by the first column and the name of another.
func cell(t testing.TB, c *pgx.Conn, sql, first, name string) string {
	t.Helper()
	rows, columns, _ := ask(t, c, sql)
	i := slices.IndexFunc(strings.Fields(columns), func(s string) bool { return strings.HasPrefix(s, name+":") })
	for _, r := range rows {
		if r[0] == first && i >= 0 {
			return r[i]
		}
	}
	t.Fatalf("%s has no %s of %s: %q %q", sql, name, first, columns, rows)
	return ""
}

// asked are the columns of PgBouncer 1.18.0 with the OIDs of their types, as Debian's answers.
var asked = map[string]string{
	"SHOW VERSION": "version:25",
	"SHOW CLIENTS": sockets, "SHOW SERVERS": sockets, "SHOW SOCKETS": sockets + low, "SHOW ACTIVE_SOCKETS": sockets + low,
	"SHOW POOLS": "database:25 user:25 cl_active:23 cl_waiting:23 cl_active_cancel_req:23 cl_waiting_cancel_req:23 sv_active:23 sv_active_cancel:23 " +
		"sv_being_canceled:23 sv_idle:23 sv_used:23 sv_tested:23 sv_login:23 maxwait:23 maxwait_us:23 pool_mode:25",
	"SHOW STATS": "database:25 total_xact_count:1700 total_query_count:1700 total_received:1700 total_sent:1700 total_xact_time:1700 " +
		"total_query_time:1700 total_wait_time:1700 avg_xact_count:1700 avg_query_count:1700 avg_recv:1700 avg_sent:1700 avg_xact_time:1700 " +
		"avg_query_time:1700 avg_wait_time:1700",
	"SHOW STATS_TOTALS":   "database:25 xact_count:1700 query_count:1700 bytes_received:1700 bytes_sent:1700 xact_time:1700 query_time:1700 wait_time:1700",
	"SHOW STATS_AVERAGES": "database:25 xact_count:1700 query_count:1700 bytes_received:1700 bytes_sent:1700 xact_time:1700 query_time:1700 wait_time:1700",
	"SHOW TOTALS":         "name:25 value:1700",
	"SHOW LISTS":          "list:25 items:23",
	"SHOW USERS":          "name:25 pool_mode:25",
	"SHOW DATABASES": "name:25 host:25 port:23 database:25 force_user:25 pool_size:23 min_pool_size:23 reserve_pool:23 pool_mode:25 " +
		"max_connections:23 current_connections:23 paused:23 disabled:23",
	"SHOW CONFIG":    "key:25 value:25 default:25 changeable:25",
	"SHOW MEM":       "name:25 size:23 used:23 free:23 memtotal:23",
	"SHOW DNS_HOSTS": "hostname:25 ttl:20 addrs:25",
}

const (
	sockets = "type:25 user:25 database:25 state:25 addr:25 port:23 local_addr:25 local_port:23 connect_time:25 request_time:25 wait:23 wait_us:23 " +
		"close_needed:23 ptr:25 link:25 remote_pid:23 tls:25 application_name:25"
	low = " recv_pos:23 pkt_pos:23 pkt_remain:23 send_pos:23 send_remain:23 pkt_avail:23 send_avail:23"
)

// TestAdminTables: what a tool asks PgBouncer is answered with the same columns, over both protocols, and with figures.
func TestAdminTables(t *testing.T) {
	g, addr := alternate(t, Config{Admins: []string{appUser}, Databases: []string{"shop", "other"}, Version: "1.2.3"})
	c := open1(t, dsn(addr, "application_name=till"))
	for range 10 {
		value[int](t, c, "SELECT 1")
	}
	exec1(t, c, "CREATE TEMP TABLE pins(a int)")
	until(t, "the server was asked what the session has", func() bool { return g.Pins()["temporary objects"] == 1 })
	a := open1(t, adminDSN(addr))
	for sql, want := range asked {
		if _, got, tag := ask(t, a, sql); got != want || tag != "SHOW" {
			t.Errorf("%s: tag %q, columns (-want +got):\n%s", sql, tag, cmp.Diff(strings.Fields(want), strings.Fields(got)))
		}
		if _, got, _ := ask(t, a, strings.ToLower(sql)+";"); got != want {
			t.Errorf("in lower case: %s", got)
		}
	}
	rows, columns, tag := ask(t, a, "SHOW HELP")
	if len(rows) > 0 || columns != "" || tag != "SHOW" {
		t.Errorf("SHOW HELP: %q %q %q", rows, columns, tag)
	}
	if got := cell(t, a, "SHOW STATS", "shop", "total_xact_count"); got != "11" && got != "12" { // pgx may ask something of its own
		t.Errorf("%s transactions were counted", got)
	}
	for column, want := range map[string]string{"cl_active": "1", "cl_waiting": "0", "sv_active": "1", "pool_mode": "transaction"} {
		if got := cell(t, a, "SHOW POOLS", "shop", column); got != want {
			t.Errorf("SHOW POOLS: %s is %s, want %s", column, got, want)
		}
	}
	if got := cell(t, a, "SHOW duri.pins", "temporary objects", "sessions"); got != "1" {
		t.Errorf("SHOW duri.pins: %s", got)
	}
	for _, want := range []string{"a", "b"} {
		if !slices.ContainsFunc(g.Tallies(), func(x Tally) bool {
			return x.Site == want && x.Transactions >= 5 && x.Sent > 0 && x.Received > 0 && x.QueryS > 0
		}) {
			t.Errorf("at %s: %+v", want, g.Tallies())
		}
	}
	moves := uint64(0)
	for _, x := range g.Tallies() {
		moves += x.Moves
	}
	if moves < 9 {
		t.Errorf("%d moves between sites were counted", moves)
	}
	for name, want := range map[string]uint64{"moves": moves, "logins": 1, "refused": 0, "in_doubt_committed": 0, "in_doubt_aborted": 0, "in_doubt_unknown": 0} {
		if got := cell(t, a, "SHOW duri.counters", name, "value"); got != strconv.FormatUint(want, 10) {
			t.Errorf("SHOW duri.counters: %s %s, want %d", got, name, want)
		}
	}
	rows, _, _ = ask(t, a, "SHOW CLIENTS")
	if len(rows) != 2 || rows[0][17] != "till" || rows[0][14] == "" || rows[1][2] != "duri" {
		t.Errorf("SHOW CLIENTS: %q", rows)
	}
	rows, _, _ = ask(t, a, "SHOW DATABASES")
	names := map[string]bool{}
	for _, r := range rows {
		names[r[0]] = true
	}
	if diff := cmp.Diff([]string{"duri", "other", "shop"}, slices.Sorted(maps.Keys(names))); diff != "" {
		t.Error(diff)
	}
	if rows, _, _ = ask(t, a, "SHOW VERSION"); rows[0][0] != "PgBouncer 1.18.0 (duri 1.2.3)" {
		t.Errorf("%q", rows)
	}
	if rows, _, _ = ask(t, a, "SHOW duri.routes"); len(rows) != 1 || rows[0][3] == "" {
		t.Errorf("SHOW duri.routes: %q", rows)
	}

	// Drivers use the extended protocol, and pgx binary formats.
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
	} {
		rs, err := a.Query(t.Context(), "SHOW TOTALS", mode)
		if err != nil {
			t.Fatal(err)
		}
		n := map[string]float64{}
		for rs.Next() {
			var name string
			var v float64
			if err := rs.Scan(&name, &v); err != nil {
				t.Fatal(err)
			}
			n[name] = v
		}
		if rs.Err() != nil || len(n) != 14 || n["total_xact_count"] < 11 || n["total_client_bytes"] < 100 {
			t.Errorf("%v: %v, %v", mode, n, rs.Err())
		}
		var used int
		if err := a.QueryRow(t.Context(), "SHOW MEM", mode).Scan(new(string), new(int), &used, new(int), new(int)); err != nil || used < 10 {
			t.Errorf("%v: %d, %v", mode, used, err)
		}
	}
	if tag, err := a.Exec(t.Context(), "PAUSE other", pgx.QueryExecModeExec); err != nil || tag.String() != "PAUSE" {
		t.Errorf("%v, %v", tag, err)
	}
	// Drivers open a transaction, and set what they like.
	tx, err := a.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "SET extra_float_digits = 3"); err != nil {
		t.Error(err)
	}
	if err := errors.Join(tx.Commit(t.Context()), a.Ping(t.Context())); err != nil {
		t.Error(err)
	}
}

// TestAdminHasPgBouncersName: tools exist that know no other.
func TestAdminHasPgBouncersName(t *testing.T) {
	_, addr := alternate(t, Config{Admins: []string{appUser}})
	a := open1(t, strings.Replace(dsn(addr, ""), "dbname=shop", "dbname=pgbouncer", 1))
	if rows, _, _ := ask(t, a, "SHOW CLIENTS"); len(rows) != 1 || rows[0][2] != "duri" {
		t.Errorf("%q", rows)
	}
}

func TestAdminRefuses(t *testing.T) {
	_, addr := alternate(t, Config{Admins: []string{appUser}})
	a := open1(t, adminDSN(addr))
	for sql, want := range map[string][2]string{
		"SELECT 1":           {"42601", "SHOW HELP"},
		"SHOW NOTHING":       {"42601", "SHOW HELP"},
		"PAUSE a b":          {"42601", "SHOW HELP"},
		"PAUSE nowhere":      {"3D000", "nowhere"},
		"PAUSE duri":         {"0A000", "own"},
		"KILL":               {"42601", "database is required"},
		"RESUME":             {"55000", "not paused"},
		"SHUTDOWN":           {"0A000", "SIGTERM"},
		"SET pool_mode = x":  {"0A000", "duri.yaml"},
		"RELOAD":             {"0A000", "configuration"},
		"SHOW POOLS; SHOW X": {"42601", "SHOW X"},
	} {
		for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeSimpleProtocol, pgx.QueryExecModeExec} {
			if mode == pgx.QueryExecModeExec && strings.Contains(sql, ";") {
				continue
			}
			_, err := a.Exec(t.Context(), sql, mode)
			wantCode(t, sql, err, want[0], want[1])
		}
	}
	if _, err := a.Exec(t.Context(), "SHOW POOLS WHERE database = $1", pgx.QueryExecModeExec, "x"); err == nil {
		t.Error("a parameter was taken")
	}
	if got, _, _ := ask(t, a, "SHOW STATE"); len(got) != 3 {
		t.Errorf("the session does not go on: %q", got)
	}
	_, addr = alternate(t, Config{})
	_, err := pgx.Connect(t.Context(), adminDSN(addr))
	wantCode(t, "no admin", err, "42501", "gateway.admins")
	_, err = pgx.Connect(t.Context(), strings.Replace(adminDSN(addr), "password='", "password='not ", 1))
	wantCode(t, "no password", err, "28P01", "")
}

// TestPsqlAsksTheGateway: the program that most people use, and what it makes of a notice.
func TestPsqlAsksTheGateway(t *testing.T) {
	clusters := twins(t)
	_, addr := serve(t, Config{Mode: TransactionMode, Admins: []string{appUser}}, clusters...)
	conn := strings.ReplaceAll(adminDSN(addr), "'", `'`)
	out, err := run(t, clusters[0], "psql", "", "-X", "-d", conn, "-c", "SHOW POOLS", "-c", "SHOW HELP", "-c", "SHOW duri.sessions")
	if err != nil || !strings.Contains(out, "cl_active") || !strings.Contains(out, "Console usage") || !strings.Contains(out, "psql") {
		t.Errorf("%v\n%s", err, out)
	}
	out, err = run(t, clusters[0], "psql", "SHOW STATE;\nshow lists;\n\\q\n", "-X", "-A", "-t", "-d", conn)
	if err != nil || !strings.Contains(out, "active|yes") || !strings.Contains(out, "used_servers|0") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestPauseHolds: PAUSE waits for transactions and lets nothing begin; RESUME lets all go on without an error.
func TestPauseHolds(t *testing.T) {
	g, addr := alternate(t, Config{Admins: []string{appUser}, PoolMax: 3, HoldMax: 30 * time.Second})
	a := open1(t, adminDSN(addr))
	open, idle, pinned := open1(t, dsn(addr, "")), open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
	exec1(t, open, "BEGIN")
	value[int](t, open, "SELECT 1")
	exec1(t, pinned, "CREATE TEMP TABLE x(a int)")
	paused := make(chan error, 1)
	go func() {
		_, err := a.Exec(context.Background(), "PAUSE shop", pgx.QueryExecModeSimpleProtocol)
		paused <- err
	}()
	until(t, "shop is paused", func() bool { p, _ := g.isPaused("shop"); return p })
	value[int](t, open, "SELECT 2") // A transaction goes on.
	held := make(chan error, 3)
	for _, c := range []*pgx.Conn{idle, pinned} {
		go func() {
			_, err := c.Exec(context.Background(), "SELECT 1", pgx.QueryExecModeSimpleProtocol)
			held <- err
		}()
	}
	go func() {
		c, err := pgx.Connect(context.Background(), dsn(addr, ""))
		if err == nil {
			err = c.Close(context.Background())
		}
		held <- err
	}()
	until(t, "three wait", func() bool { return waiting(g) == 3 })
	select {
	case err := <-paused:
		t.Fatalf("PAUSE did not wait for a transaction: %v", err)
	case err := <-held:
		t.Fatalf("a client was not held: %v", err)
	default:
	}
	exec1(t, open, "COMMIT")
	if err := <-paused; err != nil {
		t.Fatal(err)
	}
	b := open1(t, adminDSN(addr))
	if got := cell(t, b, "SHOW DATABASES", "shop", "paused"); got != "1" {
		t.Errorf("paused is %s", got)
	}
	if got := cell(t, b, "SHOW DATABASES", "shop", "current_connections"); got != "1" { // the pinned one's
		t.Errorf("%s connections are left", got)
	}
	if got := cell(t, b, "SHOW POOLS", "shop", "cl_waiting"); got != "3" {
		t.Errorf("%s clients wait", got)
	}
	select {
	case err := <-held:
		t.Fatalf("a client was not held: %v", err)
	default:
	}
	ask(t, b, "RESUME shop")
	for range 3 {
		if err := <-held; err != nil {
			t.Error(err)
		}
	}
	value[int](t, pinned, "SELECT count(*) FROM x")

	// All of them, also those that nobody has named.
	ask(t, b, "PAUSE")
	if got := cell(t, b, "SHOW STATE", "paused", "value"); got != "yes" {
		t.Errorf("paused: %s", got)
	}
	go func() { _, err := idle.Exec(context.Background(), "SELECT 1"); held <- err }()
	until(t, "one waits", func() bool { return waiting(g) == 1 })
	ask(t, b, "RESUME")
	if err := <-held; err != nil {
		t.Error(err)
	}
}

func waiting(g *Server) (n int) {
	for _, s := range g.Sessions() {
		if s.State == "waiting" {
			n++
		}
	}
	return n
}

// TestPauseIsTakenBack: who interrupts PAUSE wants clients to go on; who waits too long is told why.
func TestPauseIsTakenBack(t *testing.T) {
	g, addr := alternate(t, Config{Admins: []string{appUser}, HoldMax: 300 * time.Millisecond})
	a, open, late := open1(t, adminDSN(addr)), open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
	exec1(t, open, "BEGIN")
	paused := make(chan error, 1)
	go func() {
		_, err := a.Exec(context.Background(), "PAUSE shop", pgx.QueryExecModeSimpleProtocol)
		paused <- err
	}()
	until(t, "shop is paused", func() bool { p, _ := g.isPaused("shop"); return p })
	_, err := late.Exec(t.Context(), "SELECT 1", pgx.QueryExecModeSimpleProtocol)
	wantCode(t, "held too long", err, "57P03", "paused")
	if err := a.PgConn().CancelRequest(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "cancelled", <-paused, "57014", "clients go on")
	if got := cell(t, a, "SHOW DATABASES", "shop", "paused"); got != "0" {
		t.Errorf("paused is %s", got)
	}
	value[int](t, open1(t, dsn(addr, "")), "SELECT 1")
}

func TestPauseInSessionMode(t *testing.T) {
	c := site(t, "")
	g, addr := serve(t, Config{Admins: []string{appUser}}, c)
	a, one := open1(t, adminDSN(addr)), open1(t, dsn(addr, "application_name=one"))
	paused := make(chan error, 1)
	go func() {
		_, err := a.Exec(context.Background(), "PAUSE", pgx.QueryExecModeSimpleProtocol)
		paused <- err
	}()
	until(t, "it is paused", func() bool { p, _ := g.isPaused("shop"); return p })
	value[int](t, one, "SELECT 1")
	come := make(chan error, 1)
	go func() {
		c, err := pgconn.Connect(context.Background(), dsn(addr, ""))
		if err == nil {
			err = c.Close(context.Background())
		}
		come <- err
	}()
	until(t, "one waits", func() bool { return waiting(g) == 1 })
	select {
	case err := <-paused:
		t.Fatalf("PAUSE did not wait for the client to leave: %v", err)
	default:
	}
	if err := one.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-paused; err != nil {
		t.Fatal(err)
	}
	ask(t, a, "RESUME")
	if err := <-come; err != nil {
		t.Error(err)
	}
	if x := g.Tallies(); len(x) != 1 || x[0].Transactions < 1 || x[0].Sent == 0 || x[0].Received == 0 {
		t.Errorf("%+v", x)
	}
}

func TestKillReconnectDisable(t *testing.T) {
	g, addr := alternate(t, Config{Admins: []string{appUser}})
	a := open1(t, adminDSN(addr))
	idle, open := open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
	exec1(t, open, "BEGIN")
	busy := make(chan error, 1)
	sleeper := open1(t, dsn(addr, "application_name=sleeper"))
	go func() { _, err := sleeper.Exec(context.Background(), "SELECT pg_sleep(60)"); busy <- err }()
	until(t, "two transactions are open", func() bool {
		n := 0
		for _, k := range g.serverSockets() {
			if k.active && k.link != "" {
				n++
			}
		}
		return n == 2
	})

	pids := func() map[string]bool {
		rows, _, _ := ask(t, a, "SHOW SERVERS")
		all := map[string]bool{}
		for _, r := range rows {
			all[r[15]] = true
		}
		return all
	}
	before := pids()
	ask(t, a, "RECONNECT shop")
	value[int](t, idle, "SELECT 1")
	rows, _, _ := ask(t, a, "SHOW SERVERS")
	old := 0
	for _, r := range rows {
		if r[12] == "1" {
			old++
			if !before[r[15]] {
				t.Errorf("a new connection is to be closed: %q", r)
			}
		}
	}
	if old != 2 {
		t.Errorf("%d connections are to be closed, want those of the two open transactions: %q", old, rows)
	}
	closed := make(chan error, 1)
	w := open1(t, adminDSN(addr))
	go func() {
		_, err := w.Exec(context.Background(), "WAIT_CLOSE shop", pgx.QueryExecModeSimpleProtocol)
		closed <- err
	}()

	ask(t, a, "KILL shop")
	wantCode(t, "killed in a query", <-busy, "57P01", "KILL")
	_, err := open.Exec(t.Context(), "SELECT 1")
	if err == nil {
		t.Error("a session lives after KILL")
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	until(t, "no connections are left", func() bool { return len(g.serverSockets()) == 0 })
	ask(t, a, "RESUME shop")
	value[int](t, open1(t, dsn(addr, "")), "SELECT 1")

	ask(t, a, "DISABLE shop")
	_, err = pgx.Connect(t.Context(), dsn(addr, ""))
	wantCode(t, "disabled", err, "57P03", "disabled")
	ask(t, a, "ENABLE shop")
	value[int](t, open1(t, dsn(addr, "")), "SELECT 1")
}
