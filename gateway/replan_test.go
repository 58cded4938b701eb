package gateway

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/duri-io/duri/internal/pgtest"
)

// prepareRaw prepares a statement, and useRaw executes it.
func prepareRaw(t *testing.T, c *pgx.Conn, name, sql string) *pgconn.StatementDescription {
	t.Helper()
	d, err := c.PgConn().Prepare(t.Context(), name, sql, nil)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return d
}

func useRaw(t *testing.T, c *pgx.Conn, name string) *pgconn.Result {
	t.Helper()
	return c.PgConn().ExecPrepared(t.Context(), name, nil, nil, nil).Read()
}

// TestAStatementIsAsNewAsItsParse: when a table changes, who had prepared a statement before is told, as PostgreSQL does, and
// once is enough: drivers prepare anew once (asyncpg, PgJDBC). Who prepares the same text afterwards is not bothered, although
// servers have it from others.
func TestAStatementIsAsNewAsItsParse(t *testing.T) {
	sites := twins(t)
	_, addr := serve(t, Config{Mode: TransactionMode}, sites...)
	at := func(sql string) {
		for _, c := range sites {
			pgtest.Exec(t, c, "shop", sql)
		}
	}
	at("CREATE TABLE wide AS SELECT 1 AS a; GRANT SELECT ON wide TO app")
	const sql = "SELECT * FROM wide"
	first := open1(t, dsn(addr, ""))
	prepareRaw(t, first, "old", sql)
	for range 4 { // Both have it.
		if res := useRaw(t, first, "old"); res.Err != nil {
			t.Fatal(res.Err)
		}
	}
	at("ALTER TABLE wide ADD COLUMN b int DEFAULT 2")
	second := open1(t, dsn(addr, ""))
	for name, c := range map[string]*pgx.Conn{"another session": second, "the same session": first} {
		if d := prepareRaw(t, c, "new", sql); len(d.Fields) != 2 {
			t.Errorf("%s is told of %d columns", name, len(d.Fields))
		}
		for range 4 {
			if res := useRaw(t, c, "new"); res.Err != nil || len(res.Rows[0]) != 2 {
				t.Errorf("prepared anew, %s: %v, %q", name, res.Err, res.Rows)
			}
		}
	}
	for range 2 { // wherever that is
		wantCode(t, "old statement", useRaw(t, first, "old").Err, "0A000", "cached plan must not change result type")
	}

	// Types of parameters, which a server does not look at again.
	at("CREATE TYPE mood AS ENUM ('glad'); CREATE TABLE feels(m mood); GRANT ALL ON feels TO app")
	const insert = "INSERT INTO feels VALUES ($1)"
	for _, c := range []*pgx.Conn{first, second} {
		prepareRaw(t, c, "feel", insert)
		for range 4 {
			if res := c.PgConn().ExecPrepared(t.Context(), "feel", [][]byte{[]byte("glad")}, nil, nil).Read(); res.Err != nil {
				t.Error(res.Err)
			}
		}
		at("DROP TABLE feels; DROP TYPE mood; CREATE TYPE mood AS ENUM ('glad'); CREATE TABLE feels(m mood); GRANT ALL ON feels TO app")
	}
}

// TestAStatementWhoseResultIsKnownLater: FETCH has no columns until its cursor is there.
func TestAStatementWhoseResultIsKnownLater(t *testing.T) {
	_, addr := alternate(t, Config{})
	c := open1(t, dsn(addr, ""))
	for i := range 4 {
		name := fmt.Sprintf("f%d", i)
		prepareRaw(t, c, name, "FETCH ALL FROM cur")
		exec1(t, c, "BEGIN; DECLARE cur CURSOR FOR SELECT 1 AS a")
		if res := useRaw(t, c, name); res.Err != nil || len(res.Rows) != 1 {
			t.Error(res.Err, res.Rows)
		}
		exec1(t, c, "COMMIT")
	}
}

// TestWhatIsSentAfterAnError: a server passes over everything up to the next Sync, also what the client sends when it has seen
// the error already, and the session goes on.
func TestWhatIsSentAfterAnError(t *testing.T) {
	c := markable(t)
	for name, sites := range map[string]Sites{"ending with its server": nil, "outliving it": &knowing{c: c}} {
		t.Run(name, func(t *testing.T) {
			_, addr := serve(t, Config{Mode: TransactionMode, Sites: sites}, c)
			sendAfterErrors(t, addr)
		})
	}
}

func sendAfterErrors(t *testing.T, addr string) {
	t.Helper()
	c := open1(t, dsn(addr, ""))
	prepareRaw(t, c, "kept", "SELECT 7")
	h, err := c.PgConn().Hijack()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Conn.Close()
	f := pgproto3.NewFrontend(h.Conn, h.Conn)
	_ = h.Conn.SetDeadline(time.Now().Add(30 * time.Second))
	send := func(ms ...pgproto3.FrontendMessage) {
		for _, m := range ms {
			f.Send(m)
		}
		if err := f.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	until := func(what string, done func(pgproto3.BackendMessage) bool) {
		t.Helper()
		for {
			m, err := f.Receive()
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if e, ok := m.(*pgproto3.ErrorResponse); ok && e.Code != "22012" {
				t.Fatalf("%s: %+v", what, e)
			}
			if done(m) {
				return
			}
		}
	}
	isError := func(m pgproto3.BackendMessage) bool { _, ok := m.(*pgproto3.ErrorResponse); return ok }
	isReady := func(m pgproto3.BackendMessage) bool { _, ok := m.(*pgproto3.ReadyForQuery); return ok }
	row := ""
	isRow := func(m pgproto3.BackendMessage) bool {
		if r, ok := m.(*pgproto3.DataRow); ok {
			row = string(r.Values[0])
		}
		return isReady(m)
	}
	for i := range 8 {
		if i == 4 { // the same in a transaction that has written
			send(&pgproto3.Query{String: "BEGIN"})
			until("ready", isReady)
			send(&pgproto3.Query{String: "SAVEPOINT s"})
			until("ready", isReady)
		}
		if i >= 4 {
			send(&pgproto3.Query{String: "ROLLBACK TO s"})
			until("ready", isReady)
			send(&pgproto3.Query{String: fmt.Sprintf("INSERT INTO ledger VALUES (%d, 0)", i)})
			until("ready", isReady)
		}
		send(&pgproto3.Parse{Query: "SELECT 1/0"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Flush{})
		until("error", isError)
		send(&pgproto3.Parse{Query: "COMMIT"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Flush{})
		send(&pgproto3.Parse{Query: "DELETE FROM ledger"}, &pgproto3.Bind{}, &pgproto3.Execute{})
		name := fmt.Sprintf("lost%d", i)
		send(&pgproto3.Parse{Name: name, Query: "SELECT 2"}, &pgproto3.Describe{ObjectType: 'S', Name: name}, &pgproto3.Bind{PreparedStatement: name}, &pgproto3.Execute{}, &pgproto3.Flush{})
		// It knows the shape of this one, and would have it compared.
		send(&pgproto3.Close{ObjectType: 'S', Name: "kept"}, &pgproto3.Parse{Name: "kept", Query: "SELECT 8"}, &pgproto3.Bind{PreparedStatement: "kept"}, &pgproto3.Flush{})
		send(&pgproto3.Sync{})
		until("ready", isReady)
		if i >= 4 {
			send(&pgproto3.Query{String: "ROLLBACK TO s"})
			until("ready", isReady)
		}
		// Nothing of that was carried out.
		send(&pgproto3.Bind{PreparedStatement: "kept"}, &pgproto3.Execute{}, &pgproto3.Sync{})
		if until("kept", isRow); row != "7" {
			t.Errorf("the statement that was to be replaced gives %s", row)
		}
		send(&pgproto3.Parse{Name: name, Query: "SELECT 4"}, &pgproto3.Bind{PreparedStatement: name}, &pgproto3.Execute{}, &pgproto3.Sync{})
		if until("prepared", isRow); row != "4" {
			t.Errorf("a statement that was prepared in vain gives %s", row)
		}
	}
}

// TestStatementsThatWereNotClosedForOthers: when the server passes over the Close that makes room for a statement, it still
// has the one that was to go.
func TestStatementsThatWereNotClosedForOthers(t *testing.T) {
	c := site(t, "")
	_, addr := serve(t, Config{Mode: TransactionMode, PoolMax: 1}, c)
	conn := open1(t, dsn(addr, ""))
	fill := func(from, to int) {
		for i := from; i < to; i++ {
			name := fmt.Sprintf("s%d", i)
			prepareRaw(t, conn, name, fmt.Sprintf("SELECT %d", i))
		}
	}
	fill(0, statementsMax)
	// Everything in the pipeline after its first message is passed over.
	p := conn.PgConn().StartPipeline(t.Context())
	p.SendQueryParams("SELECT 1/0", nil, nil, nil, nil)
	for i := range 10 {
		p.SendPrepare(fmt.Sprintf("t%d", i), fmt.Sprintf("SELECT %d", 1000+i), nil)
	}
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err == nil {
		t.Error("no error")
	}
	for i := range 20 { // among them those that were to go
		if res := useRaw(t, conn, fmt.Sprintf("s%d", i)); res.Err != nil {
			t.Errorf("s%d: %v", i, res.Err)
		}
	}
}

// TestAMarkThatFails: the client gets its error, and nothing is committed.
func TestAMarkThatFails(t *testing.T) {
	c := markable(t)
	_, addr := serve(t, Config{Mode: TransactionMode, Sites: &knowing{c: c}}, c)
	// Where commits may wait for somebody else, the function marks; here they do not.
	for _, sql := range []string{
		"ALTER ROLE " + appUser + " SET synchronous_commit = local", "ALTER ROLE postgres SET synchronous_commit = local",
		"ALTER SYSTEM SET synchronous_standby_names = 'another'", "SELECT pg_reload_conf()",
	} {
		pgtest.Exec(t, c, "postgres", sql)
	}
	until(t, "the setting is there", func() bool {
		rows, err := c.QueryText(t.Context(), "shop", "SHOW synchronous_standby_names")
		return err == nil && rows[0][0] == "another"
	})
	pgtest.Exec(t, c, "shop", `CREATE OR REPLACE FUNCTION duri.mark(ltxid bytea) RETURNS void LANGUAGE plpgsql AS $$
		BEGIN IF pg_current_xact_id_if_assigned() IS NOT NULL THEN RAISE 'no mark' USING ERRCODE = '57014'; END IF; END $$`)
	conn := open1(t, dsn(addr, "default_query_exec_mode=simple_protocol"))
	for _, sql := range []string{
		"INSERT INTO ledger VALUES (1, 1)", "INSERT INTO ledger VALUES (1, 1); INSERT INTO ledger VALUES (1, 2)", "BEGIN; INSERT INTO ledger VALUES (1, 1); COMMIT",
	} {
		for range 2 {
			_, err := conn.Exec(t.Context(), sql)
			if strings.HasPrefix(sql, "BEGIN") && err == nil {
				pgtest.Exec(t, c, "shop", "DELETE FROM ledger") // a block of the client's own in one Query is not marked
				continue
			}
			wantCode(t, sql, err, "57014", "no mark")
		}
		if n := count(t, c, "true"); n != "0" {
			t.Errorf("%s: %s rows", sql, n)
		}
	}
	for range 2 {
		exec1(t, conn, "BEGIN")
		exec1(t, conn, "INSERT INTO ledger VALUES (1, 1)")
		_, err := conn.Exec(t.Context(), "COMMIT")
		wantCode(t, "COMMIT", err, "57014", "no mark")
		exec1(t, conn, "ROLLBACK")
	}
	if n := count(t, c, "true"); n != "0" {
		t.Errorf("%s rows", n)
	}
	if value[int](t, conn, "SELECT 1") != 1 {
		t.Error("no answer")
	}
}

// TestAStatementThatEndsItsServerIsNotRunForEver: one that looks harmless and takes its server down with it would take them all
// down, one after the other, and the client would never hear of it.
func TestAStatementThatEndsItsServerIsNotRunForEver(t *testing.T) {
	c := markable(t)
	pgtest.Exec(t, c, "postgres", "CREATE SEQUENCE runs; GRANT ALL ON SEQUENCE runs TO app; ALTER ROLE app SUPERUSER")
	pgtest.Exec(t, c, "shop", "CREATE SEQUENCE runs; GRANT ALL ON SEQUENCE runs TO app")
	_, addr := serve(t, Config{Mode: TransactionMode, Sites: &knowing{c: c}}, c)
	for _, mode := range []string{"simple_protocol", "exec"} {
		conn := open1(t, dsn(addr, "default_query_exec_mode="+mode))
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		_, err := conn.Exec(ctx, "SELECT nextval('runs'), pg_terminate_backend(pg_backend_pid()), pg_sleep(5)")
		wantCode(t, mode, err, "40001", "was lost")
		if n := pgtest.Query(t, c, "shop", "SELECT last_value FROM runs")[0][0]; n != fmt.Sprint(1+rerunsMax) {
			t.Errorf("%s: it ran %s times", mode, n)
		}
		pgtest.Exec(t, c, "shop", "ALTER SEQUENCE runs RESTART")
		if value[int](t, conn, "SELECT 1") != 1 {
			t.Error("no answer")
		}
	}
}
