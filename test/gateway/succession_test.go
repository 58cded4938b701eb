package gateway

import (
	"context"
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
)

func (t *trial) agentEnds(a *pair.Agent, want int) {
	t.Helper()
	t.within(time.Minute, func(ctx context.Context) error {
		code, err := a.End(ctx)
		if err == nil && code != want {
			err = fmt.Errorf("the agent has ended with %d, not %d: %s", code, want, a.Log())
		}
		return err
	})
}

// agentAnswers waits until the agent of the first site exchanges journals with the other one.
func (t *trial) agentAnswers() {
	t.Helper()
	t.within(time.Minute, func(ctx context.Context) error { return t.p.WaitReady(ctx) })
}

// TestAnAgentIsRestartedUnderItsClients: clients write without a pause through the agent's own gateway, and others through one beside it,
// while one agent after the other takes over: nobody sees it.
func TestAnAgentIsRestartedUnderItsClients(t *testing.T) {
	tr := start(t)
	beside := tr.clients(3)
	tr.address = tr.a.Door
	all := tr.clients(8)
	for i, c := range beside { // rows of their own
		c.n = 20 + i
		tr.run(c.conn, fmt.Sprintf("SET app.client = '%d'", c.n))
	}
	all = append(all, beside...)
	tr.waitAt("a", all)
	lasting := tr.keep(all)
	const rounds = 2
	held := false
	again, longest := tr.writeDuring(all, func(run *run) {
		for round := range rounds {
			pinned, busy := tr.one(), tr.one()
			tr.run(pinned, "LISTEN x")
			tr.run(busy, "BEGIN")
			tr.run(busy, fmt.Sprintf("INSERT INTO t VALUES (99, %d)", round+1))
			former, err := tr.a.TakeOverAgent()
			if err != nil {
				t.Fatal(err)
			}
			tr.askedToLeave(pinned, "the gateway is restarted", "LISTEN")
			for _, c := range all {
				c.at.Store(nil)
			}
			run.waitAt("a") // through the former agent, which waits for the transaction
			tr.run(busy, "COMMIT")
			if !held { // It does not end at once: the new one opens nothing before.
				tr.says(former, "and ends")
				if err := former.Signal(syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				if held = !former.Ended(); held {
					run.waitAt("b")
					if strings.Contains(tr.a.Log(), "agent starts") || tr.a.Agent().Ended() {
						t.Errorf("the new agent, while the former one is there still: %s", tr.a.Log())
					}
				}
				if err := former.Signal(syscall.SIGCONT); err != nil {
					t.Fatal(err)
				}
			}
			tr.agentEnds(former, 0)
			tr.agentAnswers()
			tr.waitMembers()
			for _, c := range all {
				c.at.Store(nil)
			}
			run.waitAt("a")
			lasting.remembers()
			tr.run(busy, "SELECT 1")
			fresh := tr.one()
			tr.cancels(fresh)
			_ = errors.Join(fresh.Close(t.Context()), busy.Close(t.Context()))
		}
	})
	if again != 0 || !held {
		t.Errorf("%d transactions were rolled back; the former agent was held: %t", again, held)
	}
	t.Logf("%d takeovers; the longest transaction took %v", rounds, longest)
	lasting.connected()
	tr.audit(all)
	rows, err := tr.a.Cluster.QueryText(t.Context(), "app", "SELECT count(*) FROM t WHERE client = 99")
	if err != nil || rows[0][0] != fmt.Sprint(rounds) {
		t.Errorf("%v of %d rows of transactions that were open, %v", rows, rounds, err)
	}
}

// TestAnAgentIsRestartedWithoutAnotherSite: nobody else serves meanwhile, so clients wait: those that are there, and those that come.
func TestAnAgentIsRestartedWithoutAnotherSite(t *testing.T) {
	tr := startWith(t, pair.Options{})
	if err := tr.b.SignalAgent(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	tr.address = tr.a.Door
	all := tr.clients(6)
	tr.waitAt("a", all)
	again, longest := tr.writeDuring(all, func(run *run) {
		var stop atomic.Bool
		came := make(chan int)
		go func() { // clients that connect one after the other
			n := 0
			defer func() { came <- n }()
			for ; !stop.Load(); n++ {
				c, err := tr.connect(t.Context())
				if err == nil {
					_, err = c.Exec(t.Context(), "SELECT 1")
					err = errors.Join(err, c.Close(t.Context()))
				}
				if err != nil {
					t.Errorf("a client that came: %v", err)
					return
				}
			}
		}()
		former, err := tr.a.TakeOverAgent()
		if err != nil {
			t.Fatal(err)
		}
		tr.agentEnds(former, 0)
		for _, c := range all {
			c.at.Store(nil)
		}
		run.waitAt("a")
		stop.Store(true)
		t.Logf("%d clients came meanwhile", <-came)
	})
	t.Logf("%d transactions were rolled back; the longest took %v", again, longest)
	if again != 0 {
		t.Errorf("%d transactions were rolled back", again)
	}
	if err := tr.b.StartAgent(); err != nil {
		t.Fatal(err)
	}
	tr.audit(all)
}

// TestAnAgentIsKilledInATakeover: while both are there, whoever is left goes on with the clients that it has; when both are gone, a start is
// one as ever. Clients of the one that was killed lose their connection; what they were told of is there.
func TestAnAgentIsKilledInATakeover(t *testing.T) {
	tr := start(t)
	tr.address = tr.a.Door
	var all []*client
	stays := func() *pgx.Conn {
		c := tr.one()
		tr.run(c, "BEGIN")
		tr.run(c, fmt.Sprintf("INSERT INTO t VALUES (98, %d)", len(all)))
		return c
	}
	// The new one is killed while the old one has a client left.
	w := tr.writers(&all)
	busy := stays()
	former, err := tr.a.TakeOverAgent()
	if err != nil {
		t.Fatal(err)
	}
	tr.says(tr.a, "clients are taken over")
	if err := tr.a.SignalAgent(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	tr.a.Resume(former)
	tr.run(tr.one(), "INSERT INTO t VALUES (98, 0)") // a new client
	tr.run(busy, "COMMIT")
	lost := w.end()
	// The old one is killed when it has one client left.
	w = tr.writers(&all)
	busy = stays()
	if former, err = tr.a.TakeOverAgent(); err != nil {
		t.Fatal(err)
	}
	tr.within(time.Minute, func(ctx context.Context) error {
		return tr.p.Wait(ctx, "no writer is left to the former agent", func(ctx context.Context) (bool, error) {
			r, err := tr.a.Control.Gateway(ctx)
			return err == nil && r.Clients == 1, err
		})
	})
	if err := former.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var e *pgconn.PgError
	if _, err := busy.Exec(t.Context(), "COMMIT"); err == nil || errors.As(err, &e) {
		t.Errorf("a client of the process that was killed: %v", err)
	}
	tr.agentAnswers()
	tr.waitMembers()
	w.goOn()
	if n := w.end(); n != 0 {
		t.Errorf("%d clients of the new process have lost their connection", n)
	}
	// The new one is killed when the old one ends.
	w = tr.writers(&all)
	if former, err = tr.a.TakeOverAgent(); err != nil {
		t.Fatal(err)
	}
	tr.says(tr.a, "the former agent may end")
	if err := tr.a.SignalAgent(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	tr.agentEnds(former, 0)
	lost += w.end()
	if err := tr.a.StartAgent(); err != nil { // as a service manager does
		t.Fatal(err)
	}
	tr.agentAnswers()
	tr.waitMembers()
	t.Logf("%d of %d clients lost their connection", lost, len(all))
	tr.run(tr.one(), "SELECT 1")
	tr.within(time.Minute, tr.p.WaitApplied)
	for _, s := range tr.p.Sites {
		for _, c := range all {
			rows, err := s.Cluster.QueryText(t.Context(), s.Database, fmt.Sprintf("SELECT count(*) FROM t WHERE client = %d AND seq <= %d", c.n, c.seq))
			if err != nil || rows[0][0] != fmt.Sprint(c.seq) {
				t.Errorf("site %s has %v of client %d, who was told of %d, %v", s.Name, rows, c.n, c.seq, err)
			}
		}
		rows, err := s.Cluster.QueryText(t.Context(), s.Database, "SELECT string_agg(seq::text, ' ' ORDER BY seq) FROM t WHERE client = 98")
		if err != nil || rows[0][0] != "0 4" {
			t.Errorf("site %s has %v, not 0 and 4: %v", s.Name, rows, err)
		}
	}
}

// writers write until their connection is lost; every other error but 40001 is one of the test.
type writers struct {
	t     *trial
	group []*client
	done  sync.WaitGroup
}

// writers begins with four, which it adds to all.
func (t *trial) writers(all *[]*client) *writers {
	t.Helper()
	w := &writers{t: t, group: t.clients(4)}
	for i, c := range w.group {
		c.n = len(*all) + i
		t.run(c.conn, fmt.Sprintf("SET app.client = '%d'", c.n))
	}
	*all = append(*all, w.group...)
	for _, c := range w.group {
		w.done.Go(func() {
			for {
				err := c.write(t.Context())
				var e *pgconn.PgError
				switch {
				case err == nil, errors.As(err, &e) && e.Code == "40001":
				case e != nil:
					t.Errorf("a client that was neither kept nor cut: %v", err)
					return
				default:
					return
				}
			}
		})
	}
	w.goOn()
	return w
}

// goOn waits until each that has its connection has written once more.
func (w *writers) goOn() {
	w.t.Helper()
	for _, c := range w.group {
		c.at.Store(nil)
	}
	w.t.within(time.Minute, func(ctx context.Context) error {
		return w.t.p.Wait(ctx, "all write", func(context.Context) (bool, error) {
			for _, c := range w.group {
				if c.at.Load() == nil {
					return false, fmt.Errorf("client %d does not", c.n)
				}
			}
			return true, nil
		})
	})
}

// end ends them, and tells how many had lost their connection.
func (w *writers) end() (lost int) {
	for _, c := range w.group {
		if c.conn.PgConn().Conn().Close() != nil { // pgx has closed it
			lost++
		}
	}
	w.done.Wait()
	return lost
}

// says waits until the log of an agent has something.
func (t *trial) says(s interface{ Log() string }, what string) {
	t.Helper()
	t.within(time.Minute, func(ctx context.Context) error {
		return t.p.Wait(ctx, "the log of the agent says: "+what, func(context.Context) (bool, error) { return strings.Contains(s.Log(), what), nil })
	})
}
