package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/faultnet"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/pgwire"
)

// newTestHost is the host of a site without a register and without replication, whose connection to PostgreSQL counts as old.
func newTestHost(t *testing.T, c *pgcluster.Cluster) *host {
	t.Helper()
	cfg := &config.Config{
		Site: "a", Sites: []config.Site{{ID: 1, Name: "a"}}, DataDir: t.TempDir(),
		Postgres: config.Postgres{DSN: c.DSN("", "duri")}, Gateway: config.Gateway{Mode: config.GatewayTransaction},
	}
	a := &Agent{cfg: cfg, self: cfg.Self(), log: slog.New(slog.DiscardHandler), nodes: []*node{{cfg: cfg, database: config.Database{Name: "app"}}}}
	h, err := newHost(a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		h.end()
		h.fates.close()
		h.verifiers.close()
	})
	if err := h.fates.ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.fates.since = time.Now().Add(-time.Hour)
	return h
}

// open begins a transaction of a client that has written, and gives the question for its fate.
func open(t *testing.T, c *pgcluster.Cluster) (*pgconn.PgConn, link.FateQuestion) {
	t.Helper()
	conn, err := pgconn.Connect(t.Context(), c.DSN("app", "client"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pg.Close(conn) })
	if _, err := conn.Exec(t.Context(), "BEGIN; INSERT INTO t VALUES (1)").ReadAll(); err != nil {
		t.Fatal(err)
	}
	rows, err := pg.Rows(t.Context(), conn, "SELECT pg_current_xact_id(), pg_backend_pid()")
	if err != nil {
		t.Fatal(err)
	}
	xid, _ := strconv.ParseUint(rows[0][0], 10, 64)
	pid, _ := strconv.ParseUint(rows[0][1], 10, 32)
	return conn, link.FateQuestion{Database: "app", Site: "a", XID: xid, PID: uint32(pid), LTXID: []byte("0123456789abcdef")}
}

func newFateCluster(t *testing.T) *pgcluster.Cluster {
	t.Helper()
	c := pgtest.New(t, pgtest.WithSetting("wal_writer_delay", "10s"))
	pgtest.DB(t, c, "app")
	pgtest.Exec(t, c, "app", grants.SQL(grants.Spec{})+"CREATE TABLE t (n int); CREATE ROLE client LOGIN; GRANT ALL ON t TO client; GRANT pg_signal_backend TO duri")
	return c
}

// TestOwnFate: what a site's server says of its transactions, whatever state they are in.
func TestOwnFate(t *testing.T) {
	c := newFateCluster(t)
	h := newTestHost(t, c)
	ask := func(what string, q link.FateQuestion, want link.Outcome) {
		t.Helper()
		a, err := h.Fate(t.Context(), q)
		if err != nil || a.Outcome != want || a.Site != "a" || !strings.Contains(a.Server, "/00000001") {
			t.Errorf("%s: %+v, %v; want %d", what, a, err, want)
		}
	}
	conn, q := open(t, c)
	if _, err := conn.Exec(t.Context(), "COMMIT").ReadAll(); err != nil {
		t.Fatal(err)
	}
	ask("committed", q, link.OutcomeCommitted)

	conn, q = open(t, c)
	if _, err := conn.Exec(t.Context(), "ROLLBACK").ReadAll(); err != nil {
		t.Fatal(err)
	}
	ask("rolled back", q, link.OutcomeAborted)

	conn, q = open(t, c)
	ask("it still runs: its backend is ended", q, link.OutcomeAborted)
	if _, err := conn.Exec(t.Context(), "COMMIT").ReadAll(); err == nil {
		t.Error("it has committed all the same")
	}

	conn, q = open(t, c)
	other := q
	other.PID = 1
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if a := h.ownFate(ctx, other); a.Outcome != link.OutcomeUnknown {
		t.Errorf("it runs in another backend than was said: %+v", a)
	}
	if _, err := conn.Exec(t.Context(), "COMMIT").ReadAll(); err != nil {
		t.Fatal(err)
	}

	// A COMMIT that waits for a site which is not there has committed.
	commitsWait(t, c)
	conn, q = open(t, c)
	done := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), "COMMIT").ReadAll()
		done <- err
	}()
	await(t, "the commit waits", func() bool {
		return pgtest.Query(t, c, "app", fmt.Sprintf("SELECT count(*) FROM pg_stat_activity WHERE pid = %d AND wait_event = 'SyncRep'", q.PID))[0][0] == "1"
	})
	ask("it waits for another site", q, link.OutcomeCommitted)
	if err := <-done; err == nil {
		t.Error("the client was told that it is committed as promised")
	}
	// That it is elsewhere as well is not proven by that.
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := h.prove(short, h.a.nodes[0]); err == nil {
		t.Error("it was proven to be at another site")
	}
	proof := make(chan error, 1)
	go func() { proof <- proveOnce(t.Context(), c.DSN("", "duri"), "app") }()
	await(t, "a wait is broken off", func() bool {
		pgtest.Query(t, c, "app", "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'duri_proof' AND wait_event = 'SyncRep'")
		return len(proof) > 0
	})
	if err := <-proof; err == nil || !strings.Contains(err.Error(), "canceling wait") {
		t.Errorf("a wait that was broken off: %v", err)
	}
	pgtest.Exec(t, c, "postgres", "ALTER SYSTEM RESET synchronous_standby_names")
	pgtest.Exec(t, c, "postgres", "SELECT pg_reload_conf()")
	await(t, "commits are acknowledged", func() bool { return proveOnce(t.Context(), c.DSN("", "duri"), "app") == nil })
}

// await waits for a condition.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("timed out: " + what)
		}
	}
}

// TestNumbersThatAreGivenAgainTellNothing: a server that is killed forgets numbers of transactions that it had given, and gives them
// again. What was told to commit before that is not taken for what has its number then.
func TestNumbersThatAreGivenAgainTellNothing(t *testing.T) {
	c := newFateCluster(t)
	h := newTestHost(t, c)
	pgtest.Exec(t, c, "postgres", "CHECKPOINT")
	_, q := open(t, c) // what it writes is not flushed
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if a := h.ownFate(t.Context(), q); a.Outcome == link.OutcomeCommitted {
		t.Errorf("after a crash: %+v", a)
	}
	again := false
	for range 50 {
		conn, other := open(t, c)
		if _, err := conn.Exec(t.Context(), "COMMIT").ReadAll(); err != nil {
			t.Fatal(err)
		}
		again = again || other.XID == q.XID
		if a := h.ownFate(t.Context(), q); a.Outcome == link.OutcomeCommitted {
			t.Fatalf("another transaction has its number: %+v", a)
		}
		h.a.nodes[0].known.Store(true) // as when it was compared with the journal
	}
	if !again {
		t.Error("the number was not given again, so that nothing was tested")
	}
}

// TestEnd: it ends the backend that has the transaction, and no other.
func TestEnd(t *testing.T) {
	c := newFateCluster(t)
	h := newTestHost(t, c)
	conn, q := open(t, c)
	wrong, elsewhere := q, q
	wrong.XID++
	elsewhere.Site = "b"
	unwritten := q
	unwritten.XID = 0
	if h.End(t.Context(), elsewhere) == nil {
		t.Error("a transaction of another site")
	}
	for _, q := range []link.FateQuestion{wrong, unwritten} {
		if err := h.End(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := conn.Exec(t.Context(), "SELECT 1").ReadAll(); err != nil {
		t.Fatalf("it was ended for another one: %v", err)
	}
	if err := h.End(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	await(t, "the backend has ended", func() bool {
		_, err := conn.Exec(t.Context(), "SELECT 1").ReadAll()
		return err != nil
	})
	reader, err := pgconn.Connect(t.Context(), c.DSN("app", "client"))
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(reader)
	q = link.FateQuestion{Database: "app", Site: "a", PID: reader.PID()}
	if err := h.End(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	if _, err := reader.Exec(t.Context(), "BEGIN; SELECT * FROM t").ReadAll(); err != nil {
		t.Fatalf("a session without a transaction was ended: %v", err)
	}
	if err := h.End(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	await(t, "the reader has ended", func() bool {
		_, err := reader.Exec(t.Context(), "SELECT 1").ReadAll()
		return err != nil
	})
}

// TestStateFollowsTheServer: gateways learn at once that PostgreSQL has ended, that it is back, and what people ask for.
func TestStateFollowsTheServer(t *testing.T) {
	c := newFateCluster(t)
	h := newTestHost(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	states := make(chan link.SiteState, 1000)
	done := make(chan error, 2)
	go func() { done <- h.run(ctx) }()
	go func() { done <- h.Watch(ctx, func(st link.SiteState) error { states <- st; return nil }) }()
	defer func() {
		cancel()
		<-done
		<-done
	}()
	next := func(what string, ok func(link.SiteState) bool) (took time.Duration) {
		t.Helper()
		begun, deadline := time.Now(), time.After(30*time.Second)
		for {
			select {
			case st := <-states:
				if ok(st) {
					return time.Since(begun)
				}
			case <-deadline:
				t.Fatal("timed out: " + what)
			}
		}
	}
	next("shut, and PostgreSQL answers", func(st link.SiteState) bool { return st.Refuses == "the agent has just started" && st.Postgres })
	h.entry.Open()
	next("open", func(st link.SiteState) bool { return st.Refuses == "" && st.Server != "" })
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	took := next("PostgreSQL was killed", func(st link.SiteState) bool { return !st.Postgres && st.Refuses != "" })
	t.Logf("told %v after the server was gone", took.Round(time.Millisecond))
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	next("PostgreSQL is back", func(st link.SiteState) bool { return st.Postgres && st.Refuses == "" })
	// The gateway that follows does not tell who stays, which is not waited for for long.
	order := link.DrainOrder{Drain: true, Ask: true, After: 300 * time.Millisecond}
	left, err := h.drain(t.Context(), order)
	if err != nil || left.All || !left.Asks {
		t.Fatal(left, err)
	}
	next("drained", func(st link.SiteState) bool { return st.Draining && !st.Leave })
	next("who cannot be moved is to leave", func(st link.SiteState) bool { return st.Draining && st.Leave })
	if again, err := readDrain(h.drainFile()); again != order || err != nil {
		t.Errorf("after a restart of the agent: %+v, %v", again, err)
	}
	for gateway, sessions := range map[string]map[string]int{"one": {"LISTEN": 2}, "two": {"LISTEN": 1, "temporary objects": 1}} {
		if err := h.Staying(t.Context(), gateway, sessions); err != nil {
			t.Fatal(err)
		}
	}
	want := link.DrainState{Staying: map[string]int{"LISTEN": 3, "temporary objects": 1}, All: true, Asks: true}
	if left, err = h.drain(t.Context(), order); err != nil || !cmp.Equal(left, want) {
		t.Errorf("%+v, %v", left, err)
	}
	if left, err = h.drain(t.Context(), link.DrainOrder{Drain: true}); err != nil || left.Asks {
		t.Errorf("nobody is asked any more: %+v, %v", left, err)
	}
	next("nobody is asked any more", func(st link.SiteState) bool { return st.Draining && !st.Leave })
	h.entry.Shut("a test")
	next("shut", func(st link.SiteState) bool { return st.Refuses == "a test" })
	if _, err := h.drain(t.Context(), link.DrainOrder{}); err != nil {
		t.Fatal(err)
	}
	next("drained no more", func(st link.SiteState) bool { return !st.Draining })
	if again, err := readDrain(h.drainFile()); again.Drain || err != nil {
		t.Errorf("after a restart of the agent: %+v, %v", again, err)
	}
}

// TestEntryCutsWhatIsUnderWay: whatever moment it is shut at, nothing that came in before is left, and what comes then is refused.
func TestEntryCutsWhatIsUnderWay(t *testing.T) {
	c := pgtest.New(t)
	e, err := newEntry(c.DSN("", c.Superuser()), "postgres", func() {}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := e.dial(t.Context(), true, func() {}); err == nil || !strings.Contains(err.Error(), "just started") {
		t.Errorf("before it is opened: %v", err)
	}
	for range 20 {
		e.Open()
		type opened struct {
			cut bool
			err error
		}
		results := make(chan opened)
		for range 4 {
			go func() {
				cut := make(chan struct{})
				conn, release, err := e.dial(context.Background(), true, func() { close(cut) })
				if err != nil {
					results <- opened{err: err}
					return
				}
				_, err = conn.Read(make([]byte, 1)) // the server says nothing before it is asked
				<-cut
				_ = conn.Close()
				release()
				results <- opened{cut: true, err: err}
			}()
		}
		e.Shut("a test")
		for range 4 {
			switch r := <-results; {
			case r.cut && r.err == nil:
				t.Error("bytes came through")
			case !r.cut && !strings.Contains(r.err.Error(), "a test"):
				t.Errorf("refused: %v", r.err)
			}
		}
		if _, n, _ := e.Status(); n != 0 {
			t.Fatalf("%d connections are left", n)
		}
	}
}

// TestEntryNoticesAHostThatVanishes: of PostgreSQL, while it is asked for something.
func TestEntryNoticesAHostThatVanishes(t *testing.T) {
	c := pgtest.New(t)
	e, err := newEntry(c.DSN("", c.Superuser()), "postgres", func() {}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	e.network, e.address = "tcp", fmt.Sprintf("127.0.0.1:%d", c.Port())
	e.Open()
	conn, release, err := e.dial(t.Context(), false, func() {})
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	defer conn.Close()
	if err := faultnet.Vanish(conn); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if _, err := conn.Write(pgwire.AppendSSLRequest(nil)); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(begun.Add(time.Minute))
	if n, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("%d bytes, %v", n, err)
	}
	t.Logf("noticed after %v", time.Since(begun))
}

// TestFlightsBeginAfterTheyAreAskedFor: many share an answer, but never one whose question was put before they came.
func TestFlightsBeginAfterTheyAreAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights
		begun := make(chan struct{})
		goOn := make(chan struct{})
		count := 0
		ask := func(context.Context) (any, error) {
			count++
			n := count
			begun <- struct{}{}
			<-goOn
			return n, nil
		}
		got := make(chan any, 8)
		one := func() {
			v, err := f.do(t.Context(), context.Background(), "x", ask)
			if err != nil {
				t.Error(err)
			}
			got <- v
		}
		go one()
		<-begun
		for range 5 {
			go one()
		}
		synctest.Wait() // They have come.
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := f.do(ctx, context.Background(), "x", ask); err == nil {
			t.Error("a caller that has gone gets an answer")
		}
		goOn <- struct{}{}
		if v := <-got; v != 1 {
			t.Errorf("the first got %v", v)
		}
		<-begun
		go one()
		synctest.Wait() // It comes when the second question is under way already.
		goOn <- struct{}{}
		for range 5 {
			if v := <-got; v != 2 {
				t.Errorf("a later one got %v", v)
			}
		}
		<-begun
		goOn <- struct{}{}
		if v := <-got; v != 3 {
			t.Errorf("the last one got %v", v)
		}
	})
}

func TestDrainFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "drained")
	if o, err := readDrain(path); o.Drain || err != nil {
		t.Errorf("no file: %+v, %v", o, err)
	}
	for text, want := range map[string]link.DrainOrder{
		"": {}, "drained\n": {Drain: true}, "drained never\n": {Drain: true}, "drained 30s\n": {Drain: true, Ask: true, After: 30 * time.Second},
		"drained 0s\n": {Drain: true, Ask: true},
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		o, err := readDrain(path)
		if o != want || err != nil {
			t.Errorf("%q: %+v, %v", text, o, err)
		}
		if again := drainText(want); text != "drained\n" && again != text {
			t.Errorf("%+v is written as %q, and was %q", want, again, text)
		}
	}
	if err := os.WriteFile(path, []byte("drained soon"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readDrain(path); err == nil || hintOf(err) == "" {
		t.Errorf("a file with a problem: %v", err)
	}
}

func TestDrainRequests(t *testing.T) {
	for _, bad := range []float64{-1, math.NaN(), math.Inf(1), 1e12} {
		if _, err := (DrainRequest{Drain: true, LeaveAfterS: &bad}).order(); err == nil {
			t.Errorf("%v s was taken", bad)
		}
	}
	half := 0.5
	if o, err := (DrainRequest{Drain: true, LeaveAfterS: &half}).order(); err != nil || o != (link.DrainOrder{Drain: true, Ask: true, After: 500 * time.Millisecond}) {
		t.Errorf("%+v, %v", o, err)
	}
	if o, err := (DrainRequest{LeaveAfterS: &half}).order(); err != nil || o != (link.DrainOrder{}) {
		t.Errorf("undrain: %+v, %v", o, err)
	}
}

// commitsWait makes commits wait for a site that is not there.
func commitsWait(t *testing.T, c *pgcluster.Cluster) {
	t.Helper()
	pgtest.Exec(t, c, "postgres", "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
	pgtest.Exec(t, c, "postgres", "SELECT pg_reload_conf()")
	await(t, "commits wait", func() bool {
		short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		return proveOnce(short, c.DSN("", "duri"), "app") != nil
	})
}

// TestWhatIsCommittedButNotVisibleIsWaitedFor: at a site that is asked for what it has committed itself, a commit may still wait for a
// receipt that the site which asks has given.
func TestWhatIsCommittedButNotVisibleIsWaitedFor(t *testing.T) {
	c := newFateCluster(t)
	h := newTestHost(t, c)
	n := h.a.nodes[0]
	n.newSessions()
	t.Cleanup(n.sql.close)
	reach := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		return h.Reach(ctx, "app", []link.SitePosition{{Site: "a", LSN: 1}}, "")
	}
	conn, q := open(t, c) // has written, and does not commit
	n.commits.note(uint32(q.XID))
	if err := reach(); err != nil {
		t.Errorf("an open transaction was waited for: %v", err)
	}
	commitsWait(t, c)
	done := make(chan error, 1)
	go func() { done <- conn.Exec(context.Background(), "COMMIT").Close() }()
	await(t, "the commit waits", func() bool {
		return pgtest.Query(t, c, "app", fmt.Sprintf("SELECT count(*) FROM pg_stat_activity WHERE pid = %d AND wait_event = 'SyncRep'", q.PID))[0][0] == "1"
	})
	if err := reach(); err == nil {
		t.Error("a commit that is not visible was not waited for")
	}
	n.commits.xids = [8192]uint32{} // as if it had not been decoded, so that nobody can have seen it
	if err := reach(); err != nil {
		t.Error(err)
	}
	pgtest.Query(t, c, "app", fmt.Sprintf("SELECT pg_cancel_backend(%d)", q.PID))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	n.commits.note(uint32(q.XID))
	if err := reach(); err != nil {
		t.Error(err)
	}
}
