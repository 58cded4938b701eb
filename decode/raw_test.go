package decode

import (
	"fmt"
	"strings"
	"testing"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/wal"
)

// TestWrittenTellsWhoWrotePublishedTables reads the WAL of a real server. Everything is written in one stretch, and then again
// in parts.
func TestWrittenTellsWhoWrotePublishedTables(t *testing.T) {
	for _, m := range pgtest.Majors(t) {
		t.Run(m.String(), func(t *testing.T) {
			c := pgtest.New(t, pgtest.WithMajor(m))
			ctx := t.Context()
			dsn := pgtest.DB(t, c, "app")
			pgtest.Exec(t, c, "app", `CREATE TABLE t (id int PRIMARY KEY, body text); CREATE TABLE other (id int, body text); CREATE TABLE bag (n int);
			INSERT INTO t SELECT n, 'seed' FROM generate_series(1, 100) n;
			CREATE PUBLICATION duri FOR TABLE t, bag; SELECT pg_replication_origin_create('duri_app_b')`)
			pgtest.DB(t, c, "elsewhere")
			pgtest.Exec(t, c, "elsewhere", "CREATE TABLE t (id int)")
			position := func() wal.LSN {
				conn, err := Connect(ctx, dsn, "app", "duri_test")
				if err != nil {
					t.Fatal(err)
				}
				defer pg.Close(conn)
				if _, err := pg.Rows(ctx, conn, "SELECT pg_logical_emit_message(true, 'x', '')"); err != nil {
					t.Fatal(err)
				}
				id, err := Observe(ctx, conn, "none")
				if err != nil {
					t.Fatal(err)
				}
				return id.Flush
			}
			for _, step := range []struct {
				name, database, sql string
				written             bool
			}{
				{"nothing", "app", "SELECT 1", false},
				{"a message", "app", "SELECT pg_logical_emit_message(false, 'duri.turn', repeat('x', 3000000))", false},
				{"another table", "app", "INSERT INTO other SELECT n, repeat('x', 3000) FROM generate_series(1, 3000) n; UPDATE other SET id = -id; DELETE FROM other", false},
				{"another database", "elsewhere", "INSERT INTO t VALUES (1)", false},
				{"under an origin", "app", "SELECT pg_replication_origin_session_setup('duri_app_b'); BEGIN; INSERT INTO t VALUES (1000, 'x'); UPDATE t SET body = 'b' WHERE id < 50; COMMIT", false},
				{"rolled back", "app", "BEGIN; UPDATE t SET body = 'r'; ROLLBACK", false},
				{"a part that was rolled back", "app", "BEGIN; SAVEPOINT s; UPDATE t SET body = 'r'; ROLLBACK TO s; INSERT INTO other VALUES (1); COMMIT", false},
				{"switched", "app", "SELECT pg_switch_wal()", false},
				{"vacuum", "app", "VACUUM (FREEZE, ANALYZE) t", false},
				{"insert", "app", "INSERT INTO t VALUES (2000, 'x')", true},
				{"update", "app", "UPDATE t SET body = 'u' WHERE id = 7", true},
				{"update of the key", "app", "UPDATE t SET id = -id WHERE id = 7", true},
				{"delete", "app", "DELETE FROM t WHERE id = 8", true},
				{"many at once", "app", "COPY t FROM PROGRAM 'seq 10000 10100 | sed ''s/$/\tc/'''", true},
				{"without a key", "app", "INSERT INTO bag VALUES (1)", true},
				{"in a part", "app", "BEGIN; SAVEPOINT s; INSERT INTO t VALUES (3000, 'x'); RELEASE s; COMMIT", true},
				{"large", "app", "INSERT INTO t SELECT 4000, string_agg(md5(n::text), '') FROM generate_series(1, 30000) n", true},
				{"truncate", "app", "TRUNCATE t", true},
				{"a table that is gone", "app", "CREATE TABLE gone (n int); INSERT INTO gone VALUES (1); DROP TABLE gone", true},
			} {
				from := position()
				pgtest.Exec(t, c, step.database, step.sql)
				to := position()
				for _, parts := range []int{1, 3} {
					conn, err := Connect(ctx, dsn, "app", "duri_test")
					if err != nil {
						t.Fatal(err)
					}
					w, err := NewWritten(ctx, conn, "duri", from)
					if err != nil {
						t.Fatal(err)
					}
					pg.Close(conn)
					for i := range parts {
						conn, err := Connect(ctx, dsn, "app", "duri_test")
						if err != nil {
							t.Fatal(err)
						}
						if err := w.Read(ctx, conn, 1, from+(to-from)*wal.LSN(i+1)/wal.LSN(parts)); err != nil {
							t.Fatalf("%s: %v", step.name, err)
						}
						pg.Close(conn)
					}
					if at, ok := w.Committed(); ok != step.written || ok && (at < from || at >= to) {
						t.Errorf("%s, in %d parts: written %t at %s in %s to %s, want %t", step.name, parts, ok, at, from, to, step.written)
					}
				}
			}
		})
	}
}

func TestParseRecordSurvivesAnything(t *testing.T) {
	for n := range 200 {
		b := []byte(strings.Repeat(fmt.Sprint(n%7), n))
		if n > 25 {
			b[24] = byte(n)
		}
		_, _ = parseRecord(b)
	}
	var s rawScan
	if err := s.feed(make([]byte, 9000), func(wal.LSN, []byte) error { return nil }); err == nil {
		t.Error("zeros pass for WAL")
	}
}
