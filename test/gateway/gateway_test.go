// Package gateway proves that clients keep their connections through a gateway while sites come and go: whole programs, real
// servers.
package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/server"
)

func TestMain(m *testing.M) { pair.Main(m) }

const schema = `CREATE TABLE t (client int, seq int, site text, PRIMARY KEY (client, seq))`

// trial is two sites, and a gateway beside them whose home is the first one.
type trial struct {
	*testing.T
	p       *pair.Pair
	a, b    *pair.Site
	address string      // through which clients connect
	tls     *tls.Config // with which they do, in place of a password; nil: with that, without TLS
}

// start starts sites whose commits wait for each other, with a witness.
func start(t *testing.T) *trial {
	t.Helper()
	return startWith(t, pair.Options{Sync: true, Rearm: 500 * time.Millisecond})
}

func startWith(t *testing.T, o pair.Options) *trial {
	t.Helper()
	return startSet(t, o, nil)
}

// startSet is startWith for sites of which something is set before their agents start.
func startSet(t *testing.T, o pair.Options, set func(*trial)) *trial {
	t.Helper()
	o.Gateway, o.Held = true, set != nil
	o.Seed = func(ctx context.Context, a *pair.Site) error { return a.Cluster.Exec(ctx, a.Database, schema) }
	p := pair.ForTest(t, o)
	tr := &trial{T: t, p: p, a: p.Sites[0], b: p.Sites[1], address: p.Gateway.Address}
	if set != nil {
		set(tr)
		tr.within(time.Minute, func(ctx context.Context) error { return errors.Join(p.StartAgents(), p.WaitReady(ctx)) })
	}
	tr.within(time.Minute, func(ctx context.Context) error {
		for _, s := range p.Sites {
			if err := s.Cluster.Exec(ctx, s.Database, "ALTER DATABASE app SET app.site = "+"'"+s.Name+"'"); err != nil {
				return err
			}
		}
		return p.AddClient(ctx, "client", "secret")
	})
	if o.Sync {
		tr.within(time.Minute, p.HoldCommits)
		tr.waitMembers()
	}
	tr.startGateway()
	return tr
}

// startGateway starts it and waits until it serves.
func (t *trial) startGateway() {
	t.Helper()
	if err := t.p.Gateway.Start(); err != nil {
		t.Fatal(err)
	}
	t.within(time.Minute, func(ctx context.Context) error {
		return t.p.Wait(ctx, "the gateway serves", func(ctx context.Context) (bool, error) {
			c, err := t.connect(ctx)
			if err != nil {
				return false, err
			}
			return true, c.Close(ctx)
		})
	})
}

// within bounds a step.
func (t *trial) within(d time.Duration, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	if err := f(ctx); err != nil {
		t.Fatal(err)
	}
}

// connect connects through the gateway.
func (t *trial) connect(ctx context.Context) (*pgx.Conn, error) {
	if t.tls == nil {
		return pgx.Connect(ctx, fmt.Sprintf("postgres://client:secret@%s/app?sslmode=disable", t.address))
	}
	c, err := pgx.ParseConfig(fmt.Sprintf("postgres://client@%s/app?sslmode=disable", t.address))
	if err != nil {
		return nil, err
	}
	c.TLSConfig = t.tls
	return pgx.ConnectConfig(ctx, c)
}

// waitMembers waits until both sites acknowledge and serve.
func (t *trial) waitMembers() {
	t.Helper()
	t.within(2*time.Minute, func(ctx context.Context) error {
		return t.p.Wait(ctx, "both sites are members and serve", func(ctx context.Context) (bool, error) {
			for _, s := range t.p.Sites {
				d, err := s.Control.Register(ctx)
				if err != nil {
					return false, err
				}
				if len(d.Register.Members) != 2 || !d.Member || !d.Door.Open || len(d.Unheeded) > 0 {
					return false, fmt.Errorf("site %s: %s (%s)", s.Name, d.Guarantee, d.Door.Shut)
				}
			}
			return true, nil
		})
	})
}

// client writes one row a transaction over one connection, which it never opens again.
type client struct {
	t    *trial
	n    int
	conn *pgx.Conn
	seq  int
	at   atomic.Pointer[string] // site of the last transaction
}

func (t *trial) clients(n int) []*client {
	t.Helper()
	var all []*client
	t.within(time.Minute, func(ctx context.Context) error {
		for i := range n {
			conn, err := t.connect(ctx)
			if err != nil {
				return err
			}
			if _, err := conn.Exec(ctx, fmt.Sprintf("SET app.client = '%d'", i)); err != nil {
				return err
			}
			all = append(all, &client{t: t, n: i, conn: conn})
		}
		return nil
	})
	t.Cleanup(func() {
		for _, c := range all {
			_ = c.conn.Close(context.Background()) // it may have ended
		}
	})
	return all
}

// write makes one transaction.
func (c *client) write(ctx context.Context) error {
	var site, own string
	err := c.conn.QueryRow(ctx, "INSERT INTO t (client, seq, site) VALUES ($1, $2, current_setting('app.site')) RETURNING site, current_setting('app.client')", c.n, c.seq+1).Scan(&site, &own)
	if err != nil {
		return fmt.Errorf("client %d, transaction %d: %w", c.n, c.seq+1, err)
	}
	if own != fmt.Sprint(c.n) {
		return fmt.Errorf("client %d has the settings of %s", c.n, own)
	}
	c.seq++
	c.at.Store(&site)
	return nil
}

// writeBlock makes a transaction of several statements, unless there was an error before.
func (c *client) writeBlock(ctx context.Context, before error) error {
	if before != nil {
		return before
	}
	tx, err := c.conn.Begin(ctx)
	if err != nil {
		return err
	}
	for _, sql := range []string{
		fmt.Sprintf("INSERT INTO t VALUES (%d, %d, current_setting('app.site'))", c.n, c.seq+1),
		fmt.Sprintf("INSERT INTO t VALUES (%d, %d, current_setting('app.site'))", c.n, c.seq+2),
	} {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return errors.Join(err, tx.Rollback(ctx))
		}
	}
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	c.seq += 2
	return nil
}

// writeAt makes a transaction with each client, and says whether all were at a site.
func writeAt(ctx context.Context, site string, all []*client) (bool, error) {
	there := true
	for _, c := range all {
		if err := c.write(ctx); err != nil {
			return false, err
		}
		there = there && *c.at.Load() == site
	}
	if !there {
		return false, fmt.Errorf("not all are at %s", site)
	}
	return true, nil
}

// waitAt writes until all clients are at a site. An error of a transaction ends the test.
func (t *trial) waitAt(site string, all []*client) {
	t.Helper()
	t.within(time.Minute, func(ctx context.Context) error {
		var failed error
		err := t.p.Wait(ctx, "all clients are at "+site, func(ctx context.Context) (bool, error) {
			ok, err := writeAt(ctx, site, all)
			if err != nil && !strings.HasPrefix(err.Error(), "not all") {
				failed = err
				return true, nil
			}
			return ok, err
		})
		return errors.Join(failed, err)
	})
}

// audit compares what clients were told with what the sites hold.
func (t *trial) audit(all []*client) {
	t.Helper()
	t.within(time.Minute, t.p.WaitApplied)
	for _, s := range t.p.Sites {
		for _, c := range all {
			rows, err := s.Cluster.QueryText(t.Context(), s.Database, fmt.Sprintf("SELECT count(*), coalesce(max(seq), 0) FROM t WHERE client = %d", c.n))
			if err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprint(c.seq); rows[0][0] != want || rows[0][1] != want {
				t.Errorf("site %s has %v of client %d, who was told of %s", s.Name, rows[0], c.n, want)
			}
		}
	}
}

// TestDrainMovesSessionsWithoutErrors: while clients write without a pause, a site is drained and comes back, again and again.
func TestDrainMovesSessionsWithoutErrors(t *testing.T) {
	tr := start(t)
	all := tr.clients(8)
	tr.waitAt("a", all)
	again, longest := tr.writeDuring(all, func(run *run) {
		for range 2 {
			// Through the other site's agent, as an operator may.
			tr.within(time.Minute, func(ctx context.Context) error {
				return drain(ctx, tr.b, server.DrainRequest{Site: "a", Drain: true})
			})
			run.waitAt("b")
			tr.within(time.Minute, func(ctx context.Context) error {
				return tr.p.Wait(ctx, "nothing is left of the gateways at a", func(ctx context.Context) (bool, error) {
					st, err := tr.a.Control.Status(ctx)
					if err != nil {
						return false, err
					}
					g := st.Sites[0].Gateway
					return g.Draining && g.Connections == 0, fmt.Errorf("%+v", *g)
				})
			})
			tr.within(time.Minute, func(ctx context.Context) error { return drain(ctx, tr.a, server.DrainRequest{Site: "a"}) })
			run.waitAt("a")
		}
	})
	if again != 0 {
		t.Errorf("%d transactions were rolled back", again)
	}
	t.Logf("the longest transaction took %v", longest)
	tr.audit(all)
}

// TestSessionsSurviveTheEndOfTheirServer: between two transactions, clients do not notice that PostgreSQL at their site, or the
// whole site, is gone, and go back home when it is back.
func TestSessionsSurviveTheEndOfTheirServer(t *testing.T) {
	tr := start(t)
	all := tr.clients(4)
	tr.waitAt("a", all)
	restart := func() {
		tr.within(time.Minute, tr.a.Cluster.Start)
	}
	for _, c := range []struct {
		name       string
		kill, back func()
	}{
		{"PostgreSQL", func() {
			if err := tr.a.Cluster.Kill(); err != nil {
				t.Fatal(err)
			}
		}, restart},
		{"the site", func() {
			if err := errors.Join(tr.a.SignalAgent(syscall.SIGKILL), tr.a.Cluster.Kill()); err != nil {
				t.Fatal(err)
			}
		}, func() {
			restart()
			if err := tr.a.StartAgent(); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		c.kill()
		begun := time.Now()
		tr.within(time.Minute, func(ctx context.Context) error {
			_, err := writeAt(ctx, "b", all)
			return err
		})
		t.Logf("%s at a was killed: all clients wrote at b after %v", c.name, time.Since(begun).Round(time.Millisecond))
		// A login works while the gateway's home site is down.
		tr.within(time.Minute, func(ctx context.Context) error {
			conn, err := tr.connect(ctx)
			if err != nil {
				return err
			}
			return conn.Close(ctx)
		})
		c.back()
		tr.waitMembers()
		tr.waitAt("a", all)
	}
	tr.audit(all)
}

// TestNothingIsLostOrDoubledWhenAServerEnds: clients write without a pause while PostgreSQL at their site, or the whole site, is
// killed. All keep their connection, and what each was told is what both sites hold in the end.
func TestNothingIsLostOrDoubledWhenAServerEnds(t *testing.T) {
	tr := start(t)
	all := tr.clients(8)
	tr.waitAt("a", all)
	for _, whole := range []bool{false, true} {
		again, longest := tr.writeDuring(all, func(run *run) {
			if whole {
				if err := tr.a.SignalAgent(syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
			if err := tr.a.Cluster.Kill(); err != nil {
				t.Fatal(err)
			}
			run.waitAt("b")
			tr.within(time.Minute, tr.a.Cluster.Start)
			if whole {
				if err := tr.a.StartAgent(); err != nil {
					t.Fatal(err)
				}
			}
			tr.waitMembers()
		})
		t.Logf("the whole site: %t; %d transactions were rolled back with 40001, the longest took %v", whole, again, longest)
		tr.waitAt("a", all)
		tr.audit(all)
	}
}

// run is clients that write without a pause.
type run struct {
	t    *trial
	all  []*client
	stop atomic.Bool
}

// writeDuring lets clients write without a pause while do does something. Every second one has transactions of several statements.
// Only 40001 may be an error; it says how often it was, and how long a transaction took at the most.
func (t *trial) writeDuring(all []*client, do func(*run)) (again int64, longest time.Duration) {
	t.Helper()
	r := &run{t: t, all: all}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i, c := range all {
		wg.Go(func() {
			for !r.stop.Load() {
				begun := time.Now()
				err := c.write(t.Context())
				if i%2 == 1 {
					err = c.writeBlock(t.Context(), err)
				}
				var pgErr *pgconn.PgError
				retry := errors.As(err, &pgErr) && pgErr.Code == "40001"
				if err != nil && !retry {
					t.Error(err)
					return
				}
				mu.Lock()
				longest = max(longest, time.Since(begun).Round(time.Millisecond))
				if retry {
					again++
				}
				mu.Unlock()
			}
		})
	}
	defer wg.Wait()
	defer r.stop.Store(true)
	before := *all[0].at.Load()
	for _, c := range all {
		c.at.Store(nil)
	}
	r.waitAt(before)
	do(r)
	r.stop.Store(true)
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return again, longest
}

// waitAt waits until all clients have written at a site.
func (r *run) waitAt(site string) {
	r.t.Helper()
	r.t.within(time.Minute, func(ctx context.Context) error {
		return r.t.p.Wait(ctx, "all clients are at "+site, func(context.Context) (bool, error) {
			if r.t.Failed() {
				return false, errors.New("a client has failed")
			}
			for _, c := range r.all {
				if at := c.at.Load(); at == nil || *at != site {
					return false, fmt.Errorf("client %d is elsewhere", c.n)
				}
			}
			return true, nil
		})
	})
}

// TestGatewayIsCutOffFromASite: the gateway cannot reach its home site any more, which the sites do not notice. Clients go on at the
// other one, which asks the first what became of transactions that were being committed; and they go home in the end.
func TestGatewayIsCutOffFromASite(t *testing.T) {
	tr := startWith(t, pair.Options{Sync: true, Relays: true, Rearm: 500 * time.Millisecond})
	all := tr.clients(8)
	tr.waitAt("a", all)
	again, longest := tr.writeDuring(all, func(run *run) {
		tr.p.Gateway.Relay["a"].Cut()
		run.waitAt("b")
		d, err := tr.b.Control.Register(t.Context())
		if err != nil || len(d.Register.Members) != 2 {
			t.Errorf("%v, %v: the register does not concern a gateway", d.Register, err)
		}
		tr.p.Gateway.Relay["a"].Heal()
		run.waitAt("a")
	})
	t.Logf("%d transactions were rolled back with 40001, the longest took %v", again, longest)
	tr.audit(all)
}

// TestWithoutARegister: commits wait for nobody, and nobody but a site itself says what became of its transactions: its journal
// does, when its server was killed meanwhile.
func TestWithoutARegister(t *testing.T) {
	tr := startWith(t, pair.Options{})
	all := tr.clients(8)
	tr.waitAt("a", all)
	tr.within(time.Minute, func(ctx context.Context) error {
		return tr.p.Wait(ctx, "the agent has run for longer than anybody asks", func(ctx context.Context) (bool, error) {
			st, err := tr.a.Control.Status(ctx)
			return err == nil && st.Sites[0].UptimeS > 14, err
		})
	})
	again, longest := tr.writeDuring(all, func(run *run) {
		for range 3 {
			if err := tr.a.Cluster.Kill(); err != nil {
				t.Fatal(err)
			}
			tr.within(time.Minute, tr.a.Cluster.Start)
			for _, c := range all {
				c.at.Store(nil)
			}
			run.waitAt("a")
		}
	})
	t.Logf("%d transactions were rolled back with 40001, the longest took %v", again, longest)
	tr.audit(all)
}

// TestAgentsAreGateways: clients of a site's own agent keep their sessions while PostgreSQL beside it is gone.
func TestAgentsAreGateways(t *testing.T) {
	tr := start(t)
	tr.address = tr.a.Door
	all := tr.clients(4)
	tr.waitAt("a", all)
	again, longest := tr.writeDuring(all, func(run *run) {
		if err := tr.a.Cluster.Kill(); err != nil {
			t.Fatal(err)
		}
		run.waitAt("b")
		tr.within(time.Minute, tr.a.Cluster.Start)
		tr.waitMembers()
		run.waitAt("a")
		if _, err := tr.a.Control.Fence(t.Context(), server.FenceRequest{Fence: true, Reason: "a test"}); err != nil {
			t.Fatal(err)
		}
		run.waitAt("b")
		if _, err := tr.a.Control.Fence(t.Context(), server.FenceRequest{}); err != nil {
			t.Fatal(err)
		}
		run.waitAt("a")
	})
	t.Logf("%d transactions were rolled back with 40001, the longest took %v", again, longest)
	tr.audit(all)
}

// TestEachTransactionAtAnotherSite: sessions that move with every transaction keep their settings, and see what they have written.
func TestEachTransactionAtAnotherSite(t *testing.T) {
	tr := start(t)
	if err := tr.p.Gateway.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	err := tr.p.Gateway.EditConfig(func(text string) string {
		return strings.Replace(text, "\ngateway:\n", "\ngateway:\n  rehome_every: 1\n", 1)
	})
	if err != nil {
		t.Fatal(err)
	}
	tr.startGateway()
	all := tr.clients(4)
	begun := time.Now()
	tr.within(time.Minute, func(ctx context.Context) error {
		for range 25 {
			for _, c := range all {
				var last string
				if at := c.at.Load(); at != nil {
					last = *at
				}
				if err := c.write(ctx); err != nil {
					return err
				}
				if c.seq > 2 && *c.at.Load() != last { // after an odd number of transactions at the other
					t.Errorf("client %d wrote at %s and then at %s", c.n, last, *c.at.Load())
				}
				var n int
				if err := c.conn.QueryRow(ctx, "SELECT count(*) FROM t WHERE client = $1", c.n).Scan(&n); err != nil {
					return err
				}
				if n != c.seq {
					t.Errorf("client %d has written %d rows and sees %d at the other site", c.n, c.seq, n)
				}
			}
		}
		return nil
	})
	t.Logf("200 transactions, each at another site than the one before: %v", time.Since(begun).Round(time.Millisecond))
	tr.audit(all)
}

// TestFenceHoldsForTunnels: a site that is fenced serves nobody who comes through a gateway elsewhere, and what is under way there
// is cut.
func TestFenceHoldsForTunnels(t *testing.T) {
	tr := start(t)
	all := tr.clients(2)
	tr.waitAt("a", all)
	held := all[0].conn
	if _, err := held.Exec(t.Context(), "BEGIN; INSERT INTO t VALUES (99, 1)"); err != nil {
		t.Fatal(err)
	}
	for _, s := range tr.p.Sites {
		if _, err := s.Control.Fence(t.Context(), server.FenceRequest{Fence: true, Reason: "a test"}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := held.Exec(t.Context(), "COMMIT"); err == nil {
		t.Error("a transaction was committed at a site that is fenced")
	}
	_, err := tr.connect(t.Context())
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || pgErr.Code != "57P03" || !strings.Contains(pgErr.Message, "fenced: a test") {
		t.Errorf("a client comes in while all sites are fenced: %v", err)
	}
	for _, s := range tr.p.Sites {
		rows, err := s.Cluster.QueryText(t.Context(), "app", "SELECT count(*) FROM pg_stat_activity WHERE usename = 'client'")
		if err != nil {
			t.Fatal(err)
		}
		if rows[0][0] != "0" {
			t.Errorf("site %s is fenced and has %s sessions of clients", s.Name, rows[0][0])
		}
		if _, err := s.Control.Fence(t.Context(), server.FenceRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	tr.waitMembers()
	tr.waitAt("a", all[1:])
	rows, err := tr.a.Cluster.QueryText(t.Context(), "app", "SELECT count(*) FROM t WHERE client = 99")
	if err != nil || rows[0][0] != "0" {
		t.Errorf("%v rows of a transaction that was cut, %v", rows, err)
	}
	tr.audit(all[1:])
}
