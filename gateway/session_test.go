package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/pgwire"
)

// modes are those in which everything here must work alike.
var modes = map[string]Mode{"session": SessionMode, "transaction": TransactionMode}

func inEachMode(t *testing.T, c *pgcluster.Cluster, f func(t *testing.T, g *Server, addr string)) {
	t.Helper()
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			g, addr := serve(t, Config{Mode: mode}, c)
			f(t, g, addr)
		})
	}
}

// until waits for a condition.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for !ok() {
		select {
		case <-again.C:
		case <-ctx.Done():
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func TestStatementsPass(t *testing.T) {
	c := site(t, "")
	inEachMode(t, c, func(t *testing.T, _ *Server, addr string) {
		conn := open1(t, dsn(addr, ""))
		exec1(t, conn, "DROP TABLE IF EXISTS t; CREATE TABLE t(id int PRIMARY KEY, v text)")
		exec1(t, conn, "INSERT INTO t SELECT i, repeat('x', i) FROM generate_series(1, 1000) i")
		for _, mode := range []pgx.QueryExecMode{
			pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
		} {
			for range 3 {
				if got := value[int64](t, conn, "SELECT sum(length(v)) FROM t WHERE id <= $1", mode, 100); got != 5050 {
					t.Errorf("%v: %d", mode, got)
				}
			}
		}
		_, err := conn.Exec(t.Context(), "SELECT 1/0")
		wantCode(t, "error", err, "22012", "")
		_, err = conn.Exec(t.Context(), "SELECT broken syntax FROM FROM")
		wantCode(t, "error in Parse", err, "42601", "")
		if value[int](t, conn, "SELECT 1") != 1 {
			t.Error("the session is not usable after errors")
		}

		// A batch is a pipeline; the second fails in its middle.
		b := &pgx.Batch{}
		for i := range 300 {
			b.Queue("SELECT v FROM t WHERE id = $1", i+1)
		}
		res := conn.SendBatch(t.Context(), b)
		for i := range 300 {
			var v string
			if err := res.QueryRow().Scan(&v); err != nil || len(v) != i+1 {
				t.Fatalf("%d: %q %v", i, v, err)
			}
		}
		if err := res.Close(); err != nil {
			t.Fatal(err)
		}
		b = &pgx.Batch{}
		b.Queue("INSERT INTO t VALUES (5000, 'a')")
		b.Queue("INSERT INTO t VALUES (1, 'twice')")
		b.Queue("INSERT INTO t VALUES (5001, 'never')")
		wantCode(t, "batch", conn.SendBatch(t.Context(), b).Close(), "23505", "")
		if n := value[int](t, conn, "SELECT count(*) FROM t WHERE id >= 5000"); n != 0 {
			t.Errorf("%d rows of a batch that failed", n)
		}

		// Explicit transactions with savepoints and a failure.
		tx, err := conn.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sub, err := tx.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, err = sub.Exec(t.Context(), "SELECT 1/0")
		wantCode(t, "in a savepoint", err, "22012", "")
		if err := sub.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), "INSERT INTO t VALUES (6000, 'kept')"); err != nil {
			t.Fatal(err)
		}
		if err := tx.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		if v := value[string](t, conn, "SELECT v FROM t WHERE id = 6000"); v != "kept" {
			t.Error(v)
		}
	})
}

func TestPipelineOfManySyncs(t *testing.T) {
	c := site(t, "")
	inEachMode(t, c, func(t *testing.T, _ *Server, addr string) {
		conn := open1(t, dsn(addr, ""))
		p := conn.PgConn().StartPipeline(t.Context())
		const n = 50
		for i := range n {
			if i%10 == 7 {
				p.SendQueryParams("SELECT 1/0", nil, nil, nil, nil)
			}
			p.SendQueryParams("SELECT $1::int", [][]byte{fmt.Append(nil, i)}, nil, nil, nil)
			if err := p.Sync(); err != nil {
				t.Fatal(err)
			}
		}
		var values, failures, syncs int
		for syncs < n {
			r, err := p.GetResults()
			if err != nil {
				wantCode(t, "pipeline", err, "22012", "")
				failures++
				continue
			}
			switch r := r.(type) {
			case *pgconn.ResultReader:
				if res := r.Read(); res.Err == nil {
					values++
				}
			case *pgconn.PipelineSync:
				syncs++
			}
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if values != 45 || failures != 5 {
			t.Errorf("%d values, %d failures", values, failures)
		}
	})
}

func TestCopyAndLargeValues(t *testing.T) {
	c := site(t, "")
	inEachMode(t, c, func(t *testing.T, _ *Server, addr string) {
		conn := open1(t, dsn(addr, ""))
		exec1(t, conn, "DROP TABLE IF EXISTS c; CREATE TABLE c(id int CHECK (id >= 0), v text)")
		var in bytes.Buffer
		for i := range 50_000 {
			fmt.Fprintf(&in, "%d\t%s\n", i, "some text of the row")
		}
		want := bytes.Clone(in.Bytes())
		tag, err := conn.PgConn().CopyFrom(t.Context(), &in, "COPY c FROM STDIN")
		if err != nil || tag.RowsAffected() != 50_000 {
			t.Fatal(tag, err)
		}
		var out bytes.Buffer
		if _, err := conn.PgConn().CopyTo(t.Context(), &out, "COPY c TO STDOUT"); err != nil || !bytes.Equal(out.Bytes(), want) {
			t.Errorf("%d of %d bytes, %v", out.Len(), len(want), err)
		}
		// One that the server ends in its middle: what the client still sends is passed over.
		bad := io.MultiReader(strings.NewReader("-1\tx\n"), bytes.NewReader(bytes.Repeat([]byte("1\ty\n"), 200_000)))
		_, err = conn.PgConn().CopyFrom(t.Context(), bad, "COPY c FROM STDIN")
		wantCode(t, "bad row", err, "23514", "")
		// And one that the client ends.
		_, err = conn.PgConn().CopyFrom(t.Context(), io.MultiReader(strings.NewReader("1\tx\n"), failing{}), "COPY c FROM STDIN")
		if err == nil {
			t.Error("a COPY that failed at the client succeeded")
		}
		if n := value[int](t, conn, "SELECT count(*) FROM c"); n != 50_000 {
			t.Errorf("%d rows", n)
		}
		big := strings.Repeat("0123456789abcdef", 2<<20) // 32 MB
		if got := value[string](t, conn, "SELECT $1::text", big); got != big {
			t.Errorf("%d bytes came back of %d", len(got), len(big))
		}
		if got := value[int](t, conn, "SELECT length($1)", pgx.QueryExecModeSimpleProtocol, big); got != len(big) {
			t.Errorf("%d", got)
		}
	})
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("the client's disk is broken") }

func TestCancelReachesTheRightQuery(t *testing.T) {
	c := site(t, "")
	inEachMode(t, c, func(t *testing.T, g *Server, addr string) {
		one, other := open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
		var wg sync.WaitGroup
		slept := make(chan error, 1)
		wg.Go(func() {
			_, err := other.Exec(context.Background(), "SELECT pg_sleep(2)")
			slept <- err
		})
		failed := make(chan error, 1)
		wg.Go(func() {
			_, err := one.Exec(context.Background(), "SELECT pg_sleep(60)")
			failed <- err
		})
		until(t, "both sleep", func() bool {
			return pgtest.Query(t, c, "postgres", "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")[0][0] == "2"
		})
		// Nobody cancels with a key that was guessed.
		g.cancel(t.Context(), &pgwire.Startup{Kind: pgwire.StartupCancel, PID: one.PgConn().PID(), Secret: []byte("none")})
		if err := one.PgConn().CancelRequest(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantCode(t, "cancelled", <-failed, "57014", "")
		if err := <-slept; err != nil {
			t.Errorf("the other client was hit: %v", err)
		}
		wg.Wait()
		// A cancel that comes when nothing runs hits nothing.
		for range 20 {
			if err := one.PgConn().CancelRequest(t.Context()); err != nil {
				t.Fatal(err)
			}
			if value[int](t, one, "SELECT 1") != 1 {
				t.Fatal("no answer")
			}
		}
	})
}

func TestNotificationsArrive(t *testing.T) {
	c := site(t, "")
	inEachMode(t, c, func(t *testing.T, _ *Server, addr string) {
		one, other := open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
		exec1(t, one, "LISTEN news")
		for i := range 3 {
			exec1(t, other, fmt.Sprintf("NOTIFY news, 'item %d'", i))
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			n, err := one.WaitForNotification(ctx)
			cancel()
			if err != nil || n.Payload != fmt.Sprintf("item %d", i) {
				t.Fatalf("%+v, %v", n, err)
			}
		}
	})
}

func TestReplicationPasses(t *testing.T) {
	c := site(t, "")
	inEachMode(t, c, func(t *testing.T, _ *Server, addr string) {
		until(t, "the slot of a client that has left is gone", func() bool {
			return pgtest.Query(t, c, "postgres", "SELECT count(*) FROM pg_replication_slots")[0][0] == "0"
		})
		conn, err := pgconn.Connect(t.Context(), dsn(addr, "replication=database"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background())
		if _, err := conn.Exec(t.Context(), `CREATE_REPLICATION_SLOT s TEMPORARY LOGICAL test_decoding`).ReadAll(); err != nil {
			t.Fatal(err)
		}
		pgtest.Exec(t, c, "shop", "CREATE TABLE IF NOT EXISTS r(i int); INSERT INTO r VALUES (4711)")
		f := conn.Frontend()
		f.SendQuery(&pgproto3.Query{String: "START_REPLICATION SLOT s LOGICAL 0/0"})
		if err := f.Flush(); err != nil {
			t.Fatal(err)
		}
		for seen := false; !seen; {
			m, err := f.Receive()
			if err != nil {
				t.Fatal(err)
			}
			switch m := m.(type) {
			case *pgproto3.CopyData:
				seen = bytes.Contains(m.Data, []byte("4711"))
			case *pgproto3.ErrorResponse:
				t.Fatal(m.Message)
			}
		}
	})
}

// TestLossesAreTold: with the codes of the contract, and the server's own words where there are some.
func TestLossesAreTold(t *testing.T) {
	c := site(t, "")
	inEachMode(t, c, func(t *testing.T, _ *Server, addr string) {
		terminated := open1(t, dsn(addr, ""))
		exec1(t, terminated, "BEGIN")
		pid := value[int](t, terminated, "SELECT pg_backend_pid()")
		pgtest.Exec(t, c, "postgres", fmt.Sprintf("SELECT pg_terminate_backend(%d)", pid))
		_, err := terminated.Exec(t.Context(), "SELECT 1")
		wantCode(t, "terminated", err, "57P01", "terminating connection due to administrator command")

		violating, err := pgconn.Connect(t.Context(), dsn(addr, ""))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := violating.Conn().Write([]byte{'y', 0, 0, 0, 4}); err != nil {
			t.Fatal(err)
		}
		_, err = violating.Exec(t.Context(), "SELECT 1").ReadAll()
		wantCode(t, "violation", err, "08P01", "'y'")

		killed := open1(t, dsn(addr, ""))
		exec1(t, killed, "BEGIN")
		killBackend(t, value[int](t, killed, "SELECT pg_backend_pid()"))
		_, err = killed.Exec(t.Context(), "SELECT 1")
		wantCode(t, "killed", err, "08006", "site a")
		if err := c.Kill(); err != nil {
			t.Fatal(err)
		}
		_, err = pgx.Connect(t.Context(), dsn(addr, ""))
		wantCode(t, "verifiers cannot be read", err, "57P03", "")
		if err := c.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

// killBackend ends a process of a test's server without a word.
func killBackend(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

func TestShutdownIsTold(t *testing.T) {
	c := site(t, "")
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			var idle, busy *pgconn.PgConn
			failed := make(chan error, 1)
			t.Run("serving", func(t *testing.T) {
				_, addr := serve(t, Config{Mode: mode}, c)
				for _, p := range []**pgconn.PgConn{&idle, &busy} {
					var err error
					if *p, err = pgconn.Connect(t.Context(), dsn(addr, "")); err != nil {
						t.Fatal(err)
					}
				}
				go func() {
					_, err := busy.Exec(context.Background(), "SELECT pg_sleep(600)").ReadAll()
					failed <- err
				}()
				until(t, "it sleeps", func() bool {
					return pgtest.Query(t, c, "postgres", "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")[0][0] == "1"
				})
			}) // its Cleanup ends the gateway
			_, err := idle.Exec(t.Context(), "SELECT 1").ReadAll()
			wantCode(t, "idle", err, "57P01", "the gateway is shutting down")
			wantCode(t, "busy", <-failed, "57P01", "the gateway is shutting down")
			idle.Close(t.Context())
			busy.Close(t.Context())
			pgtest.Exec(t, c, "postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
		})
	}
}

// TestPrograms runs PostgreSQL's own clients.
func TestPrograms(t *testing.T) {
	c := site(t, "")
	inEachMode(t, c, func(t *testing.T, _ *Server, addr string) {
		conninfo := dsn(addr, "")
		if out, err := run(t, c, "pgbench", "", "-i", "-s", "1", "-q", conninfo); err != nil {
			t.Fatalf("%s %v", out, err)
		}
		for _, protocol := range []string{"simple", "extended", "prepared"} {
			out, err := run(t, c, "pgbench", "", "-n", "-M", protocol, "-c", "6", "-j", "2", "-t", "100", conninfo)
			if err != nil || !strings.Contains(out, "number of failed transactions: 0 ") || !strings.Contains(out, "processed: 600/600") {
				t.Errorf("%s: %s %v", protocol, out, err)
			}
		}
		if n := pgtest.Query(t, c, "shop", "SELECT count(*) FROM pgbench_history")[0][0]; n != "1800" {
			t.Errorf("%s transactions in the history", n)
		}
		script := `\set ON_ERROR_STOP on
			CREATE TEMP TABLE x(a int);
			\copy x FROM PROGRAM 'seq 1 100'
			SELECT sum(a) FROM x;
			SET work_mem = '7MB';
			SHOW work_mem;
			\d pgbench_accounts
			PREPARE p(int) AS SELECT $1 * 2;
			EXECUTE p(21);
			BEGIN; DECLARE cur CURSOR WITH HOLD FOR SELECT generate_series(1, 5); COMMIT; FETCH 2 FROM cur; FETCH ALL FROM cur;`
		direct, err := run(t, c, "psql", script, "-XAt", fmt.Sprintf("host=%s port=%d dbname=shop user=postgres", c.SocketDir(), c.Port()))
		if err != nil {
			t.Fatal(direct, err)
		}
		through, err := run(t, c, "psql", script, "-XAt", conninfo)
		if err != nil || through != direct {
			t.Errorf("direct:\n%s\nthrough the gateway:\n%s\n%v", direct, through, err)
		}
		dump, err := run(t, c, "pg_dump", "", "-t", "pgbench_branches", conninfo)
		if err != nil || !strings.Contains(dump, "PostgreSQL database dump complete") {
			t.Errorf("%s %v", dump, err)
		}
	})
}
