package kills

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pg"
)

// waiting is a client's commit that waits for the other site.
type waiting struct {
	answer chan error  // the statement's end
	warned chan string // what the server warned of
}

// waiters tells them apart.
var waiters atomic.Int64

// beginWait sends a statement through a site's door and returns when its commit waits.
func beginWait(t *testing.T, s *pair.Site, sql string) waiting {
	t.Helper()
	w := waiting{make(chan error, 1), make(chan string, 10)}
	name := fmt.Sprintf("waiting_%d", waiters.Add(1))
	cfg, err := pgconn.ParseConfig(fmt.Sprintf("postgres://postgres@%s/%s?sslmode=disable&application_name=%s", s.Door, s.Database, name))
	if err != nil {
		t.Fatal(err)
	}
	cfg.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) {
		if n.Severity == "WARNING" {
			w.warned <- n.Message + " " + n.Detail
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pg.Close(c) })
	go func() {
		_, err := c.Exec(context.WithoutCancel(ctx), sql).ReadAll()
		w.answer <- err
	}()
	within(t, 10*time.Second, func(ctx context.Context) error {
		for {
			n, err := s.Cluster.QueryText(ctx, s.Database, "SELECT pid FROM pg_stat_activity WHERE application_name = '"+name+"' AND wait_event = 'SyncRep'")
			if err != nil || len(n) == 1 {
				return err
			}
			sleep(ctx, 10*time.Millisecond)
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	})
	return w
}

// TestTailOfADeadSite is S42 and S47: a site dies with commits that no other site has, one that was never acknowledged and
// some that were at synchronous_commit = local. When it is back, nobody sees them before the other site has them; then all
// are at both sites, but for those that met something newer, which are on record.
func TestTailOfADeadSite(t *testing.T) {
	p := syncPair(t)
	a, b := p.Sites[0], p.Sites[1]
	cut := func() { p.Link("a", "b").Cut(); p.Link("b", "a").Cut() }
	heal := func() { p.Link("a", "b").Heal(); p.Link("b", "a").Heal() }
	exec := func(s *pair.Site, sql string) {
		t.Helper()
		if err := s.Cluster.Exec(t.Context(), s.Database, sql); err != nil {
			t.Fatal(err)
		}
	}
	cut()
	exec(a, "SET synchronous_commit = local; UPDATE t SET n = 100 + id WHERE id <= 8")
	w := beginWait(t, a, "UPDATE t SET n = 1000 WHERE id = 10")
	if err := errors.Join(a.SignalAgent(syscall.SIGKILL), a.Cluster.Kill()); err != nil {
		t.Fatal(err)
	}
	if err := <-w.answer; err == nil {
		t.Error("a commit without a receipt was acknowledged")
	}
	soloAmong(t, b)
	if err := write(t, b, 10*time.Second); err != nil { // of id 1
		t.Fatal(err)
	}
	exec(b, "UPDATE t SET n = 200 + id WHERE id IN (2, 3)")

	// Back, and still cut off: what it has beyond the others is there, and no client gets to see it.
	if err := errors.Join(a.Cluster.Start(t.Context()), a.StartAgent()); err != nil {
		t.Fatal(err)
	}
	if got := rows(t, a); !strings.Contains(got, "[10 1000]") {
		t.Errorf("the commit that waited is not there after recovery: %s", got)
	}
	within(t, time.Minute, func(ctx context.Context) error {
		return p.Wait(ctx, "the agent of a knows the register", func(ctx context.Context) (bool, error) {
			d, err := a.Control.Register(ctx)
			return err == nil && d.Known, err
		})
	})
	if err := write(t, a, 5*time.Second); err == nil || !strings.Contains(err.Error(), "takes no clients") {
		t.Errorf("the site that returned lets clients in: %v", err)
	}
	heal()
	settledPair(t, p)
	within(t, time.Minute, p.WaitApplied)
	want := "[[1 1] [2 202] [3 203] [4 104] [5 105] [6 106] [7 107] [8 108] [9 0] [10 1000]]"
	if x, y := rows(t, a), rows(t, b); x != want || y != want {
		t.Errorf("the sites have\n%s\n%s, want\n%s", x, y, want)
	}
	lost, err := b.Cluster.QueryText(t.Context(), b.Database, `SELECT key->>'id', remote_row->>'n', local_row->>'n' FROM duri.conflict
		WHERE code = 'lost' AND origin = 1 ORDER BY (key->>'id')::int`)
	if got := fmt.Sprint(lost); err != nil || got != "[[1 101 1] [2 102 202] [3 103 203]]" {
		t.Errorf("losers on record: %s, %v", got, err)
	}
}

// TestWaitThatIsDisturbed is S43: a commit whose wait is cancelled is told so, one whose session is terminated gets no
// answer; both are durable at both sites as soon as that is possible.
func TestWaitThatIsDisturbed(t *testing.T) {
	p := syncPair(t)
	a, b := p.Sites[0], p.Sites[1]
	for i, c := range []struct {
		call   string
		answer func(err error, w waiting) string // empty: as it should be
	}{
		{"pg_cancel_backend", func(err error, w waiting) string {
			if err != nil {
				return fmt.Sprintf("it failed with %v", err)
			}
			if len(w.warned) == 0 || !strings.Contains(<-w.warned, "might not have been replicated") {
				return "it was told a plain success"
			}
			return ""
		}},
		{"pg_terminate_backend", func(err error, _ waiting) string {
			if err == nil {
				return "it was told a success"
			}
			return ""
		}},
	} {
		p.Link("a", "b").Cut()
		p.Link("b", "a").Cut()
		w := beginWait(t, a, fmt.Sprintf("UPDATE t SET n = 500 WHERE id = %d", i+1))
		if err := a.Cluster.Exec(t.Context(), a.Database, "SELECT "+c.call+"(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"); err != nil {
			t.Fatal(err)
		}
		if wrong := c.answer(<-w.answer, w); wrong != "" {
			t.Errorf("%s: %s", c.call, wrong)
		}
		p.Link("a", "b").Heal()
		p.Link("b", "a").Heal()
		settledPair(t, p)
		within(t, time.Minute, p.WaitApplied)
		if x, y := rows(t, a), rows(t, b); x != y || !strings.Contains(x, fmt.Sprintf("[%d 500]", i+1)) {
			t.Errorf("%s: the sites have\n%s\n%s", c.call, x, y)
		}
	}
}

// TestBothSitesGoOn: with availability-first both acknowledge while they do not hear each other, and what is superseded
// afterwards is on record.
func TestBothSitesGoOn(t *testing.T) {
	p := startPair(t, pair.Options{Config: func(_, text string) string {
		return strings.Replace(text, "\ndurability:\n", "\ndurability:\n  policy: availability-first\n", 1)
	}})
	within(t, time.Minute, func(ctx context.Context) error { return p.HoldCommits(ctx) })
	a, b := p.Sites[0], p.Sites[1]
	p.Link("a", "b").Cut()
	p.Link("b", "a").Cut()
	for begun, n := time.Now(), 0; time.Since(begun) < 4*time.Second; n++ { // twice the time after which silence is a loss
		for _, s := range p.Sites {
			if err := write(t, s, 2*time.Second); err != nil {
				t.Fatalf("site %s after %s: %v", s.Name, time.Since(begun), err)
			}
		}
	}
	p.Link("a", "b").Heal()
	p.Link("b", "a").Heal()
	within(t, time.Minute, p.WaitReady)
	within(t, time.Minute, p.WaitApplied)
	x, y := rows(t, a), rows(t, b)
	if x != y {
		t.Errorf("the sites differ:\n%s\n%s", x, y)
	}
	superseded := 0
	for _, s := range p.Sites {
		lost, err := s.Cluster.QueryText(t.Context(), s.Database, "SELECT local_row->>'n', remote_row->>'n' FROM duri.conflict WHERE key->>'id' = '1'")
		if err != nil {
			t.Fatal(err)
		}
		superseded += len(lost)
	}
	if superseded == 0 {
		t.Error("both sites have written the same row, and nothing is on record")
	}
}
