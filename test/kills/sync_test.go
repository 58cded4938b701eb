package kills

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/quorum"
	"github.com/duri-io/duri/server"
)

// syncPair starts two sites and a witness with a table, whose commits wait for each other.
func syncPair(t *testing.T) *pair.Pair {
	t.Helper()
	return syncSites(t, pair.Options{})
}

// syncSites is syncPair with other options.
func syncSites(t *testing.T, o pair.Options) *pair.Pair {
	t.Helper()
	p := startPair(t, o)
	settledPair(t, p)
	unheeded(t, p, 1) // and the agents say that nothing waits yet
	within(t, time.Minute, func(ctx context.Context) error { return p.HoldCommits(ctx) })
	unheeded(t, p, 0)
	return p
}

// startPair starts two sites and a witness with a table, or what the options ask for.
func startPair(t *testing.T, o pair.Options) *pair.Pair {
	t.Helper()
	o.Relays, o.Sync, o.Rearm = true, true, 500*time.Millisecond
	more := o.Seed
	o.Seed = func(ctx context.Context, a *pair.Site) error {
		err := a.Cluster.Exec(ctx, a.Database, "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t SELECT n, 0 FROM generate_series(1, 10) AS n")
		if err == nil && more != nil {
			err = more(ctx, a)
		}
		return err
	}
	return pair.ForTest(t, o)
}

// unheeded waits until each agent says of so many databases that their commits do not wait.
func unheeded(t *testing.T, p *pair.Pair, databases int) {
	t.Helper()
	within(t, 20*time.Second, func(ctx context.Context) error {
		return p.Wait(ctx, "the agents know whether PostgreSQL counts on them", func(ctx context.Context) (bool, error) {
			for _, s := range p.Sites {
				d, err := s.Control.Register(ctx)
				if err != nil || len(d.Unheeded) != databases {
					return false, errors.Join(err, fmt.Errorf("site %s: %s", s.Name, d.Guarantee))
				}
			}
			return true, nil
		})
	})
}

func within(t *testing.T, d time.Duration, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	if err := f(ctx); err != nil {
		t.Fatal(err)
	}
}

func settledPair(t *testing.T, p *pair.Pair) {
	t.Helper()
	c := &campaign{p: p, o: Options{Rearm: 500 * time.Millisecond}}
	within(t, time.Minute, c.settled)
}

// write updates a row through a site's door, as one transaction. An error says that it was not acknowledged in time.
func write(t *testing.T, s *pair.Site, patience time.Duration) error {
	t.Helper()
	return run(t, s, patience, "UPDATE t SET n = n + 1 WHERE id = 1")
}

// run is write of some other statement.
func run(t *testing.T, s *pair.Site, patience time.Duration, sql string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := pgconn.Connect(ctx, fmt.Sprintf("postgres://postgres@%s/%s?sslmode=disable", s.Door, s.Database))
	if err != nil {
		return err
	}
	defer func() {
		closeCtx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = c.Close(closeCtx)
	}()
	_, err = c.Exec(ctx, sql).ReadAll()
	return err
}

func register(t *testing.T, s *pair.Site) quorum.Register {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	d, err := s.Control.Register(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return d.Register
}

// TestHundredClientsDoNotDeadlockBetweenSites is S44: commits wait for receipts while their rows are locked, at both sites
// and on the same rows, and what comes from the other site needs these rows.
func TestHundredClientsDoNotDeadlockBetweenSites(t *testing.T) {
	p := syncPair(t)
	before := register(t, p.Sites[0]).Epoch // not 1 where a site took long to join
	script := filepath.Join(t.TempDir(), "update.sql")
	if err := os.WriteFile(script, []byte("\\set id random(1, 10)\nUPDATE t SET n = n + 1 WHERE id = :id;\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	type result struct {
		out string
		err error
	}
	done := make(chan result, 2)
	for _, s := range p.Sites {
		go func() {
			out, err := pair.Pgbench(t.Context(), s.Cluster, s.Database, "-n", "-c", "50", "-j", "2", "-T", "5", "-f", script)
			done <- result{out, err}
		}()
	}
	for range p.Sites {
		r := <-done
		if r.err != nil {
			t.Fatal(r.err)
		}
		if committed, gaveUp := pair.PgbenchCounts(r.out); committed < 50 || gaveUp > 0 {
			t.Errorf("%d committed, %d given up:\n%s", committed, gaveUp, r.out)
		}
	}
	within(t, time.Minute, p.WaitApplied)
	if e := register(t, p.Sites[0]).Epoch; e != before {
		t.Errorf("the register has changed under load: epoch %d, %d before", e, before)
	}
	a, b := rows(t, p.Sites[0]), rows(t, p.Sites[1])
	if a != b {
		t.Errorf("the sites differ:\n%s\n%s", a, b)
	}
}

func rows(t *testing.T, s *pair.Site) string {
	t.Helper()
	all, err := s.Cluster.QueryText(t.Context(), s.Database, "SELECT id, n FROM t ORDER BY id")
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(all)
}

// TestExactlyOneSiteGoesOn is S45: with the link cut, one site goes on and the other refuses, until it is healed.
func TestExactlyOneSiteGoesOn(t *testing.T) {
	p := syncPair(t)
	there, back := p.Link("a", "b"), p.Link("b", "a")
	there.Cut()
	back.Cut()
	soloAmong(t, p.Sites...)
	goesOn := 0
	for _, s := range p.Sites {
		err := write(t, s, 5*time.Second)
		switch member := register(t, s).Has(s.Name); {
		case err == nil && member:
			goesOn++
		case err == nil:
			t.Errorf("site %s is left out, and acknowledged a commit", s.Name)
		case member:
			t.Errorf("site %s is a member alone, and did not acknowledge: %v", s.Name, err)
		case !strings.Contains(err.Error(), "takes no clients"):
			t.Errorf("site %s is left out, and says %v", s.Name, err)
		}
	}
	if goesOn != 1 {
		t.Errorf("%d sites go on", goesOn)
	}
	there.Heal()
	back.Heal()
	settledPair(t, p)
	for _, s := range p.Sites {
		if err := write(t, s, 5*time.Second); err != nil {
			t.Errorf("site %s afterwards: %v", s.Name, err)
		}
	}
}

// soloAmong waits until each of the sites knows of one member.
func soloAmong(t *testing.T, sites ...*pair.Site) {
	t.Helper()
	within(t, 30*time.Second, func(ctx context.Context) error {
		for {
			alone := true
			for _, s := range sites {
				alone = alone && len(register(t, s).Members) == 1
			}
			if alone {
				return nil
			}
			sleep(ctx, 20*time.Millisecond)
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	})
}

// TestNobodyGoesOnWithoutTheRegister: with the witness and the other site gone, a site stops acknowledging; with the
// witness back it goes on.
func TestNobodyGoesOnWithoutTheRegister(t *testing.T) {
	p := syncPair(t)
	a, b := p.Sites[0], p.Sites[1]
	if err := errors.Join(p.Witness.Signal(syscall.SIGKILL), b.SignalAgent(syscall.SIGKILL)); err != nil {
		t.Fatal(err)
	}
	if err := write(t, a, 4*time.Second); err == nil {
		t.Error("a commit was acknowledged without the other site and without a register")
	}
	if err := p.Witness.Start(); err != nil {
		t.Fatal(err)
	}
	soloAmong(t, a)
	if err := write(t, a, 10*time.Second); err != nil {
		t.Errorf("with the witness back: %v", err)
	}
	if err := b.StartAgent(); err != nil {
		t.Fatal(err)
	}
	settledPair(t, p)
	within(t, time.Minute, p.WaitApplied)
	if x, y := rows(t, a), rows(t, b); x != y {
		t.Errorf("the sites differ:\n%s\n%s", x, y)
	}
}

// TestFencedSiteTellsWhy: a person shuts the door and opens it again.
func TestFencedSiteTellsWhy(t *testing.T) {
	p := syncPair(t)
	a := p.Sites[0]
	fence := func(on bool, reason string) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if _, err := a.Control.Fence(ctx, server.FenceRequest{Fence: on, Reason: reason}); err != nil {
			t.Fatal(err)
		}
	}
	fence(true, "storage is being replaced")
	if err := write(t, a, 5*time.Second); err == nil || !strings.Contains(err.Error(), "storage is being replaced") {
		t.Errorf("fenced: %v", err)
	}
	if err := write(t, p.Sites[1], 5*time.Second); err != nil {
		t.Errorf("the other site: %v", err)
	}
	fence(false, "")
	if err := write(t, a, 5*time.Second); err != nil {
		t.Errorf("let in again: %v", err)
	}
}
