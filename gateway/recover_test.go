package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/pgwire"
)

// knowing answers as the agent of a site does whose server lives.
type knowing struct {
	c *pgcluster.Cluster

	mu    sync.Mutex
	asked []Doubt
	say   *Fate // in the place of the truth
}

func (k *knowing) Fate(ctx context.Context, d Doubt) (Fate, error) {
	k.mu.Lock()
	k.asked = append(k.asked, d)
	say := k.say
	k.mu.Unlock()
	if say != nil {
		return *say, nil
	}
	k.End(ctx, d)
	for {
		rows, err := k.c.QueryText(ctx, "shop", fmt.Sprintf("SELECT pg_xact_status('%d')", d.XID))
		if err != nil {
			return Unknown, err
		}
		switch rows[0][0] {
		case "committed":
			return Committed, nil
		case "aborted":
			return Aborted, nil
		}
	}
}

func (k *knowing) End(ctx context.Context, d Doubt) {
	_ = k.c.Exec(ctx, "shop", fmt.Sprintf("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %d AND extract(epoch FROM backend_start) = '%s'", d.PID, d.Started)) // it may have ended
}

func (k *knowing) CatchUp(context.Context, string, string, string) error { return nil }

func (k *knowing) doubts() []Doubt {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append([]Doubt{}, k.asked...)
}

// markable gives a cluster duri.mark, and a table.
func markable(t testing.TB) *pgcluster.Cluster {
	t.Helper()
	c := site(t, "", pgtest.WithSetting("wal_level", "logical"))
	sql, err := os.ReadFile("../catalog/migrations/0009_outcome.sql")
	if err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, c, "shop", "CREATE SCHEMA duri")
	pgtest.Exec(t, c, "shop", string(sql))
	pgtest.Exec(t, c, "shop", "CREATE TABLE ledger (client int, seq int, PRIMARY KEY (client, seq)); GRANT ALL ON ledger TO "+appUser)
	return c
}

// cuttable is a gateway before a server, with a relay in between.
func cuttable(t testing.TB) (k *knowing, relay *cutter, addr string) {
	t.Helper()
	c := markable(t)
	relay = newCutter(t, fmt.Sprintf("127.0.0.1:%d", c.Port()))
	k = &knowing{c: c}
	r := &routes{targets: []Target{{Site: "a", Network: "tcp", Address: relay.l.Addr().String()}}}
	_, addr = serve(t, Config{Mode: TransactionMode, Router: r, Sites: k}, c)
	return k, relay, addr
}

func count(t testing.TB, c *pgcluster.Cluster, where string) string {
	t.Helper()
	rows, err := c.QueryText(t.Context(), "shop", "SELECT count(*) FROM ledger WHERE "+where)
	if err != nil {
		t.Fatal(err)
	}
	return rows[0][0]
}

func TestServerIsLostBetweenStatements(t *testing.T) {
	k, relay, addr := cuttable(t)
	for _, mode := range []string{"", "default_query_exec_mode=simple_protocol"} {
		c := open1(t, dsn(addr, mode))
		cut := relay.cut
		exec1(t, c, "SET application_name = 'kept'")
		cut()
		if got := value[string](t, c, "SELECT current_setting('application_name')"); got != "kept" {
			t.Errorf("%s: after a cut between transactions: %q", mode, got)
		}

		tx, err := c.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		cut()
		if _, err := tx.Exec(t.Context(), "INSERT INTO ledger VALUES (1, 1)"); err != nil {
			t.Errorf("%s: the first statement after BEGIN: %v", mode, err)
		}
		if err := tx.Commit(t.Context()); err != nil {
			t.Errorf("%s: %v", mode, err)
		}

		tx, err = c.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), "INSERT INTO ledger VALUES (1, 2)"); err != nil {
			t.Fatal(err)
		}
		cut()
		_, err = tx.Exec(t.Context(), "INSERT INTO ledger VALUES (1, 3)")
		wantCode(t, mode+": in a transaction", err, "40001", "site a")
		_, err = tx.Exec(t.Context(), "INSERT INTO ledger VALUES (1, 4)")
		wantCode(t, mode+": in the failed transaction", err, "25P02", "aborted")
		if err := tx.Rollback(t.Context()); err != nil {
			t.Errorf("%s: ROLLBACK: %v", mode, err)
		}

		tx, err = c.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), "INSERT INTO ledger VALUES (1, 5)"); err != nil {
			t.Fatal(err)
		}
		cut()
		wantCode(t, mode+": COMMIT", tx.Commit(t.Context()), "40001", "site a")
		exec1(t, c, "DELETE FROM ledger WHERE client = 1 AND seq = 1")
		if n := count(t, k.c, "true"); n != "0" {
			t.Errorf("%s: %s rows are left", mode, n)
		}
		if d := k.doubts(); len(d) != 0 {
			t.Errorf("%s: asked for %+v", mode, d)
		}
	}
}

// TestServerIsLostAtEachByte: whatever the server has sent when it is lost, each write that was reported took effect once, and no
// other did.
func TestServerIsLostAtEachByte(t *testing.T) {
	k, relay, addr := cuttable(t)
	for _, mode := range []string{"", "default_query_exec_mode=simple_protocol", "default_query_exec_mode=exec"} {
		c := open1(t, dsn(addr, mode))
		exec1(t, c, "TRUNCATE ledger")
		reported, failed := 0, 0
		for seq := range 150 {
			relay.after(int64(seq%75) * 4)
			var back int
			sql, args := "INSERT INTO ledger VALUES (2, $1) RETURNING seq", []any{seq}
			var err error
			if seq%3 == 0 {
				err = pgx.BeginFunc(t.Context(), c, func(tx pgx.Tx) error { return tx.QueryRow(t.Context(), sql, args...).Scan(&back) })
			} else {
				err = c.QueryRow(t.Context(), sql, args...).Scan(&back)
			}
			relay.after(-1)
			n := count(t, k.c, fmt.Sprintf("seq = %d", seq))
			switch e, _ := errors.AsType[*pgconn.PgError](err); {
			case err == nil && back == seq && n == "1":
				reported++
			case e != nil && e.Code == "40001" && n == "0":
				failed++
			default:
				t.Fatalf("%s: write %d: %v, and %s rows", mode, seq, err, n)
			}
		}
		if reported < 100 {
			t.Errorf("%s: %d writes reported", mode, reported)
		}
		t.Logf("%s: %d reported, %d failed, %d doubts", mode, reported, failed, len(k.doubts()))
	}
}

func TestFateThatNobodyKnows(t *testing.T) {
	k, relay, addr := cuttable(t)
	say := Unknown
	k.say = &say
	lost := 0
	for seq := range 40 {
		c := open1(t, dsn(addr, "default_query_exec_mode=simple_protocol"))
		exec1(t, c, "SELECT 1")
		relay.after(int64(seq) * 4)
		_, err := c.Exec(t.Context(), fmt.Sprintf("INSERT INTO ledger VALUES (3, %d)", seq))
		relay.after(-1)
		if err != nil {
			lost++
			e := wantCode(t, "a commit in doubt", err, "08007", "nobody can say")
			if !strings.Contains(e.Detail, "LTXID") || e.Severity != "FATAL" {
				t.Errorf("%+v", e)
			}
		}
	}
	if lost == 0 || lost != len(k.doubts()) {
		t.Errorf("%d lost, asked for %d", lost, len(k.doubts()))
	}
}

// cutter is a relay that resets its connections when so many bytes have passed to the client.
type cutter struct {
	target string
	l      net.Listener

	mu    sync.Mutex
	left  int64 // negative: no limit
	conns map[net.Conn]net.Conn
}

func newCutter(t testing.TB, target string) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &cutter{target: target, l: l, left: -1, conns: map[net.Conn]net.Conn{}}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s, err := net.Dial("tcp", target)
			if err != nil {
				_ = c.Close()
				continue
			}
			r.mu.Lock()
			r.conns[c] = s
			r.mu.Unlock()
			wg.Go(func() { _, _ = io.Copy(s, c); r.reset(c) })
			wg.Go(func() { r.toClient(c, s) })
		}
	})
	t.Cleanup(func() { _ = l.Close(); r.cut(); wg.Wait() })
	return r
}

func (r *cutter) toClient(c, s net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		n, err := s.Read(buf)
		r.mu.Lock()
		over := r.left >= 0 && int64(n) > r.left
		switch {
		case over:
			n, r.left = int(r.left), -1
		case r.left >= 0:
			r.left -= int64(n)
		}
		r.mu.Unlock()
		_, _ = c.Write(buf[:n])
		if over {
			r.cut()
		}
		if over || err != nil {
			r.reset(c)
			return
		}
	}
}

func (r *cutter) reset(c net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.conns[c]; s != nil {
		_ = c.Close()
		_ = s.Close()
		delete(r.conns, c)
	}
}

// cut ends all connections.
func (r *cutter) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c, s := range r.conns {
		_ = c.Close()
		_ = s.Close()
	}
	clear(r.conns)
}

// after cuts when so many more bytes have passed; negative: never.
func (r *cutter) after(bytes int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.left = bytes
}

func TestCourses(t *testing.T) {
	const idle, block, failed = pgwire.Idle, pgwire.InBlock, pgwire.InFailed
	begun := segment{does: begins, began: true, sent: true, closed: true}
	write := segment{does: writes, wrote: true, sent: true}
	sent := func(d deed) segment { return segment{does: d, sent: true, closed: true, wrote: d >= writes} }
	for name, c := range map[string]struct {
		f                 flight
		delivered, replay bool
		want              course
	}{
		"nothing is under way":                    {f: flight{status: idle}, want: again},
		"a read":                                  {f: flight{status: idle, segments: []segment{sent(reads)}}, want: again},
		"a read of which the client has a part":   {f: flight{status: idle, segments: []segment{sent(reads)}}, delivered: true, want: fails},
		"a read that was too long":                {f: flight{status: idle, torn: true, segments: []segment{sent(reads)}}, want: fails},
		"a write whose Sync was not sent":         {f: flight{status: idle, segments: []segment{write}}, want: again},
		"a write that was split":                  {f: flight{status: idle, segments: []segment{{does: writes, sent: true, split: true, committing: true}}}, want: asks},
		"a write that was split and has failed":   {f: flight{status: idle, segments: []segment{{does: writes, sent: true, split: true, closed: true}}}, want: again},
		"a write that was not split":              {f: flight{status: idle, segments: []segment{sent(writes)}}, want: unknown},
		"a write behind a read":                   {f: flight{status: idle, segments: []segment{sent(reads), sent(writes)}}, want: unknown},
		"a write behind a read, not sent":         {f: flight{status: idle, segments: []segment{sent(reads), {does: opaque}}}, want: again},
		"a procedure":                             {f: flight{status: idle, segments: []segment{{does: opaque, sent: true}}}, want: unknown},
		"a procedure that was not sent":           {f: flight{status: idle, segments: []segment{{does: opaque}}}, want: again},
		"a transaction in one text":               {f: flight{status: idle, segments: []segment{sent(tangled)}}, want: unknown},
		"COPY, not all data sent":                 {f: flight{status: idle, torn: true, segments: []segment{sent(copies)}}, want: fails},
		"COPY, all data sent":                     {f: flight{status: idle, torn: true, segments: []segment{{does: copies, sent: true, closed: true, fed: true}}}, want: unknown},
		"BEGIN and no more":                       {f: flight{status: block, answered: 1, segments: []segment{begun}}, want: again},
		"BEGIN under way":                         {f: flight{status: idle, segments: []segment{begun}}, want: again},
		"a write behind BEGIN":                    {f: flight{status: block, answered: 1, segments: []segment{begun, sent(writes)}}, want: again},
		"BEGIN and a write pipelined":             {f: flight{status: idle, segments: []segment{begun, sent(writes)}}, want: again},
		"an open transaction":                     {f: flight{status: block, answered: 2, segments: []segment{begun, sent(reads)}}, want: fails},
		"an open transaction, replayed":           {f: flight{status: block, answered: 2, segments: []segment{begun, sent(reads)}}, replay: true, want: again},
		"a statement in an open transaction":      {f: flight{status: block, answered: 2, segments: []segment{begun, sent(reads), sent(opaque)}}, want: fails},
		"COMMIT":                                  {f: flight{status: block, answered: 2, segments: []segment{begun, sent(writes), {does: commits, sent: true, committing: true}}}, want: asks},
		"COMMIT that was not sent":                {f: flight{status: block, answered: 2, segments: []segment{begun, sent(writes), {does: commits}}}, want: fails},
		"ROLLBACK":                                {f: flight{status: block, answered: 2, segments: []segment{begun, sent(writes), sent(rollsBack)}}, want: stays},
		"a failed transaction":                    {f: flight{status: failed, answered: 2, segments: []segment{begun, sent(writes)}}, want: stays},
		"a statement in a failed transaction":     {f: flight{status: failed, answered: 2, segments: []segment{begun, sent(writes), sent(reads)}}, want: stays},
		"COMMIT in a text with more":              {f: flight{status: block, answered: 2, segments: []segment{begun, sent(writes), sent(tangled)}}, want: unknown},
		"COMMIT of an implicit transaction":       {f: flight{status: idle, segments: []segment{{does: commits, wrote: true, sent: true}}}, want: unknown},
		"another server has answered otherwise":   {f: flight{status: idle, strange: true, segments: []segment{begun}}, want: fails},
		"a write behind the end of a transaction": {f: flight{status: block, answered: 1, segments: []segment{begun, sent(rollsBack), sent(writes)}}, want: unknown},
	} {
		if got := c.f.decide(c.delivered, c.replay); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// TestOpenTransactionsAreRunAgain: with Replay a client does not notice that its transaction has begun anew, unless it would come
// out otherwise.
func TestOpenTransactionsAreRunAgain(t *testing.T) {
	c := markable(t)
	relay := newCutter(t, fmt.Sprintf("127.0.0.1:%d", c.Port()))
	k := &knowing{c: c}
	r := &routes{targets: []Target{{Site: "a", Network: "tcp", Address: relay.l.Addr().String()}}}
	_, addr := serve(t, Config{Mode: TransactionMode, Router: r, Sites: k, Replay: []string{appUser}}, c)
	for i, mode := range []string{"", "default_query_exec_mode=simple_protocol"} {
		conn := open1(t, dsn(addr, mode))
		err := pgx.BeginFunc(t.Context(), conn, func(tx pgx.Tx) error {
			for seq := range 20 {
				var back int
				if err := tx.QueryRow(t.Context(), "INSERT INTO ledger VALUES ($1, $2) RETURNING seq", i, seq).Scan(&back); err != nil || back != seq {
					return fmt.Errorf("%d, want %d: %w", back, seq, err)
				}
				switch seq % 7 {
				case 3:
					relay.cut()
				case 5:
					relay.after(int64(seq))
				}
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", mode, err)
		}
		if n := count(t, c, fmt.Sprintf("client = %d", i)); n != "20" {
			t.Errorf("%s: %s rows", mode, n)
		}
		relay.after(-1)

		tx, err := conn.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var at time.Time
		if err := tx.QueryRow(t.Context(), "SELECT clock_timestamp()").Scan(&at); err != nil {
			t.Fatal(err)
		}
		relay.cut()
		_, err = tx.Exec(t.Context(), "INSERT INTO ledger VALUES (99, 1)")
		wantCode(t, mode+": what the client has seen would be another time", err, "40001", "site a")
		if err := tx.Rollback(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// TestReadsThatWrite: what writes behind a view, by row security, an operator or a foreign table is no read.
func TestReadsThatWrite(t *testing.T) {
	c := markable(t)
	pgtest.Exec(t, c, "shop", `CREATE TABLE plain (a int);
		CREATE FUNCTION note() RETURNS int LANGUAGE sql VOLATILE AS 'INSERT INTO ledger VALUES (7, (SELECT count(*) FROM ledger)) RETURNING 1';
		CREATE VIEW noting AS SELECT note() AS a; CREATE VIEW outer_one AS SELECT a FROM noting; CREATE VIEW harmless AS SELECT a, now() FROM plain;
		CREATE TABLE guarded (a int); ALTER TABLE guarded ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON guarded USING (note() = 1);
		GRANT ALL ON ALL TABLES IN SCHEMA public TO `+appUser)
	g, addr := serve(t, Config{Mode: TransactionMode, Sites: &knowing{c: c}}, c)
	if !g.mayWrite("shop", []byte("SELECT a FROM plain"), false) {
		t.Error("nothing is known of the database yet")
	}
	prepared := func(sql string) (*session, *statement) {
		s := &session{g: g, who: Login{Database: "shop"}}
		return s, newStatement(pgwire.Statement{SQL: []byte(sql)}, "", s.look([]byte(sql)))
	}
	early, plain := prepared("SELECT a FROM plain")
	if early.effectsOf(plain).does != writes {
		t.Error("a statement that was prepared when nothing was known is taken for a read")
	}
	conn := open1(t, dsn(addr, ""))
	exec1(t, conn, "SELECT 1")
	if early.effectsOf(plain).does != reads {
		t.Error("a statement that was prepared when nothing was known stays a writing one")
	}
	known := g.taintsOf("shop")
	g.taints.Store("shop", &tainted{version: known.version + 1, names: map[string]bool{"plain": true}})
	if early.effectsOf(plain).does != writes {
		t.Error("a prepared read stays one when what it reads has become a view that writes")
	}
	g.taints.Store("shop", known)
	for sql, want := range map[string]bool{
		"SELECT a FROM plain": false, "SELECT a FROM harmless": false, "SELECT 1": false, "SHOW work_mem": false,
		"SELECT a FROM noting": true, `SELECT a FROM public."noting"`: true, "TABLE outer_one": true, "SELECT count(*) FROM guarded": true,
	} {
		if got := g.mayWrite("shop", []byte(sql), false); got != want {
			t.Errorf("%s: %t", sql, got)
		}
	}
}

// commitsWait makes commits wait for a site that is not there: they do when one does.
func commitsWait(t testing.TB, c *pgcluster.Cluster) {
	t.Helper()
	pgtest.Exec(t, c, "postgres", "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
	pgtest.Exec(t, c, "postgres", "SELECT pg_reload_conf()")
	until(t, "commits wait", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		return c.Exec(ctx, "postgres", "SELECT pg_logical_emit_message(true, 'test', '')") != nil
	})
}

// TestCommitWhoseWaitWasDisturbed: PostgreSQL reports such a commit with a warning only; here it is in doubt.
func TestCommitWhoseWaitWasDisturbed(t *testing.T) {
	c := markable(t)
	k := &knowing{c: c}
	_, addr := serve(t, Config{Mode: TransactionMode, Sites: k}, c)
	conn := open1(t, dsn(addr, ""))
	exec1(t, conn, "SELECT 1")
	commitsWait(t, c)
	for i, say := range []Fate{Committed, Unknown} {
		k.mu.Lock()
		k.say = &say
		k.mu.Unlock()
		done := make(chan error, 1)
		go func() {
			_, err := conn.Exec(context.Background(), "INSERT INTO ledger VALUES (8, $1)", i)
			done <- err
		}()
		until(t, "its wait is cancelled", func() bool {
			rows, err := c.QueryText(t.Context(), "postgres", "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND usename = '"+appUser+"'")
			if err != nil {
				t.Fatal(err)
			}
			return len(rows) > 0
		})
		err := <-done
		switch say {
		case Committed:
			if err != nil {
				t.Error(err)
			}
		default:
			wantCode(t, "nobody can tell", err, "08007", "nobody can say")
		}
		if n := len(k.doubts()); n != i+1 {
			t.Errorf("asked %d times", n)
		}
	}
}
