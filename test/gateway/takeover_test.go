package gateway

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/server"
)

// localPort is by what a client is known to the system.
func localPort(c *pgx.Conn) string { return c.PgConn().Conn().LocalAddr().String() }

// kept are connections that last, of clients and of one that is quiet most of the time.
type kept struct {
	*trial
	ports     map[*client]string
	quiet     *pgx.Conn
	quietPort string
}

// keep notes the clients' connections, and makes the quiet one, whose session has settings and a prepared statement.
func (t *trial) keep(all []*client) *kept {
	t.Helper()
	k := &kept{trial: t, ports: map[*client]string{}, quiet: t.one()}
	for _, c := range all {
		k.ports[c] = localPort(c.conn)
	}
	k.quietPort = localPort(k.quiet)
	t.run(k.quiet, "SET work_mem = '7MB'; SET app.me = 'me'")
	if _, err := k.quiet.Prepare(t.Context(), "mine", "SELECT $1::int + 1"); err != nil {
		t.Fatal(err)
	}
	return k
}

// remembers checks that the quiet session is what it was.
func (k *kept) remembers() {
	k.Helper()
	var settings string
	var sum int
	if err := errors.Join(
		k.quiet.QueryRow(k.Context(), "SELECT current_setting('work_mem') || current_setting('app.me')").Scan(&settings),
		k.quiet.QueryRow(k.Context(), "mine", 41).Scan(&sum),
	); err != nil || settings != "7MBme" || sum != 42 {
		k.Errorf("%q, %d, %v", settings, sum, err)
	}
}

// connected checks that all have the connections that they had.
func (k *kept) connected() {
	k.Helper()
	for c, port := range k.ports {
		if now := localPort(c.conn); now != port {
			k.Errorf("client %d came from %s and comes from %s", c.n, port, now)
		}
	}
	if localPort(k.quiet) != k.quietPort {
		k.Error("the client that was quiet has another connection")
	}
}

// secured lets the gateway, which is started anew, offer TLS.
func (t *trial) secured() {
	t.Helper()
	err := errors.Join(t.p.Gateway.Signal(syscall.SIGTERM), t.p.Gateway.EditConfig(func(text string) string {
		return strings.Replace(text, "\ngateway:\n", "\ngateway:\n  cert: gateway.crt\n  key: gateway.key\n", 1)
	}))
	if err != nil {
		t.Fatal(err)
	}
	t.startGateway()
}

// report is what the gateway that has the control socket tells.
func (t *trial) report(g *pair.Gateway) (r server.GatewayReport) {
	t.Helper()
	t.within(time.Minute, func(ctx context.Context) (err error) {
		r, err = g.Control().StandaloneGateway(ctx)
		return err
	})
	return r
}

// succeeds starts a new process and waits until the old one has ended, with the exit code 0.
func (t *trial) succeeds(old *pair.Gateway, more ...string) *pair.Gateway {
	t.Helper()
	before := t.report(old).PID
	next := t.p.Successor(old, more...)
	if err := next.Start(); err != nil {
		t.Fatal(err)
	}
	t.ends(old, 0)
	if r := t.report(next); r.PID == before || r.Shut != "" {
		t.Errorf("after the takeover: %+v", r)
	}
	return next
}

func (t *trial) ends(g *pair.Gateway, want int) {
	t.Helper()
	t.within(time.Minute, func(ctx context.Context) error {
		code, err := g.End(ctx)
		if err == nil && code != want {
			err = fmt.Errorf("the gateway has ended with %d, not %d: %s", code, want, g.Log())
		}
		return err
	})
}

// TestGatewayIsRestartedUnderItsClients: clients write without a pause, one gateway after the other takes over, and nobody sees it:
// the same connections, settings, prepared statements, keys to cancel. Who cannot go along is asked to leave when idle.
func TestGatewayIsRestartedUnderItsClients(t *testing.T) {
	tr := startWith(t, pair.Options{})
	tr.secured()
	all := tr.clients(10)
	tr.waitAt("a", all)
	lasting := tr.keep(all)
	g := tr.p.Gateway
	const rounds = 3
	again, longest := tr.writeDuring(all, func(run *run) {
		for round := range rounds {
			pinned, busy := tr.one(), tr.one()
			tr.run(pinned, "LISTEN x")
			tr.run(busy, "BEGIN")
			tr.run(busy, fmt.Sprintf("INSERT INTO t VALUES (99, %d)", round+1))
			encrypted, err := pgx.Connect(t.Context(), fmt.Sprintf("postgres://client:secret@%s/app?sslmode=require", tr.address))
			if err != nil {
				t.Fatal(err)
			}
			next := tr.p.Successor(g)
			if err := next.Start(); err != nil {
				t.Fatal(err)
			}
			tr.askedToLeave(pinned, "the gateway is restarted", "LISTEN")
			tr.askedToLeave(encrypted, "the gateway is restarted", "TLS")
			tr.within(time.Minute, func(ctx context.Context) error {
				return tr.p.Wait(ctx, "one client is left to the old process", func(ctx context.Context) (bool, error) {
					r, err := next.Control().StandaloneGateway(ctx)
					return r.Predecessor != nil && r.Predecessor.Clients == 1 && r.Clients >= len(all), errors.Join(err, fmt.Errorf("%+v", r.Predecessor))
				})
			})
			// A third process waits for its turn.
			third := tr.p.Successor(g)
			if err := third.Start(); err != nil {
				t.Fatal(err)
			}
			tr.ends(third, 5)
			if !strings.Contains(third.Log(), "under way") {
				t.Errorf("the third process: %s", third.Log())
			}
			for _, c := range all {
				c.at.Store(nil)
			}
			run.waitAt("a")
			lasting.remembers()
			tr.run(busy, "COMMIT")
			tr.ends(g, 0)
			tr.run(busy, "SELECT 1")
			// New clients come in, and a request to cancel finds them and those that were handed over.
			fresh := tr.one()
			for _, conn := range []*pgx.Conn{fresh, lasting.quiet} {
				tr.cancels(conn)
			}
			for _, conn := range []*pgx.Conn{fresh, busy} {
				_ = conn.Close(t.Context())
			}
			g = next
		}
	})
	if again != 0 {
		t.Errorf("%d transactions were rolled back", again)
	}
	t.Logf("%d takeovers; the longest transaction took %v", rounds, longest)
	lasting.connected()
	rows, err := tr.a.Cluster.QueryText(t.Context(), "app", "SELECT count(*) FROM t WHERE client = 99")
	if err != nil || rows[0][0] != fmt.Sprint(rounds) {
		t.Errorf("%v of %d rows of transactions that were open, %v", rows, rounds, err)
	}
	tr.audit(all)
	// The last process is a gateway as the first one was: it ends, and its socket with it.
	if err := g.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(g.ConfigFile), "data", "control.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the control socket is left: %v", err)
	}
	// With nobody there, --takeover is a start.
	if err := tr.p.Successor(g).Start(); err != nil {
		t.Fatal(err)
	}
	tr.within(time.Minute, func(ctx context.Context) error {
		return tr.p.Wait(ctx, "the gateway serves", func(ctx context.Context) (bool, error) {
			c, err := tr.connect(ctx)
			if err != nil {
				return false, err
			}
			return true, c.Close(ctx)
		})
	})
}

// cancels checks that a client can cancel its query.
func (t *trial) cancels(c *pgx.Conn) {
	t.Helper()
	name := fmt.Sprintf("cancel %d", rand.Uint32())
	done := make(chan error, 1)
	go func() {
		_, err := c.Exec(t.Context(), "SELECT pg_sleep(60) /* "+name+" */")
		done <- err
	}()
	t.within(time.Minute, func(ctx context.Context) error {
		return t.p.Wait(ctx, "the query runs", func(ctx context.Context) (bool, error) {
			rows, err := t.a.Cluster.QueryText(ctx, "app", "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%/* "+name+" */'")
			return err == nil && rows[0][0] == "1", err
		})
	})
	if err := c.PgConn().CancelRequest(t.Context()); err != nil {
		t.Fatal(err)
	}
	var e *pgconn.PgError
	if err := <-done; !errors.As(err, &e) || e.Code != "57014" {
		t.Errorf("a query that was cancelled: %v", err)
	}
}

// TestTheNewProcessIsKilled: at any moment of a takeover. The old one goes on with all clients that it has not given away, takes new
// ones, and can be taken over the next time. Those that the new one had lose their connection, and nothing else.
func TestTheNewProcessIsKilled(t *testing.T) {
	tr := startWith(t, pair.Options{})
	g := tr.p.Gateway
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 1))
	t.Logf("seed %d", seed)
	stays := tr.one() // in a transaction, so that it is never given away
	tr.run(stays, "BEGIN")
	n, rows, kept, lost := 0, 0, 0, 0
	for round := range 6 {
		var all []*pgx.Conn
		for range 20 {
			all = append(all, tr.one())
		}
		next := tr.p.Successor(g)
		if err := next.Start(); err != nil {
			t.Fatal(err)
		}
		if round%3 > 0 { // else at once
			left := 1 + rnd.IntN(21) // one stays with the old process in any case
			tr.within(time.Minute, func(ctx context.Context) error {
				return tr.p.Wait(ctx, fmt.Sprintf("no more than %d clients are left to the old process", left), func(ctx context.Context) (bool, error) {
					r, err := next.Control().StandaloneGateway(ctx)
					return r.Predecessor != nil && r.Predecessor.Clients <= left, err
				})
			})
		}
		if err := next.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for _, c := range all {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			n++
			_, err := c.Exec(ctx, "INSERT INTO t VALUES (1, $1)", n)
			late := ctx.Err()
			cancel()
			var e *pgconn.PgError
			switch {
			case err == nil:
				rows++
				kept++
			case errors.As(err, &e), late != nil:
				t.Errorf("round %d: a client that was neither kept nor cut: %v", round, err)
			default:
				lost++ // its connection was the new process's
			}
			_ = c.Close(t.Context())
		}
		fresh := tr.one()
		n++
		rows++
		tr.run(fresh, fmt.Sprintf("INSERT INTO t VALUES (1, %d)", n))
		_ = fresh.Close(t.Context())
		tr.run(stays, "SELECT 1")
	}
	t.Logf("%d clients were kept, %d had been given away", kept, lost)
	tr.run(stays, "COMMIT")
	got, err := tr.a.Cluster.QueryText(t.Context(), "app", "SELECT count(*) FROM t WHERE client = 1")
	if err != nil || got[0][0] != fmt.Sprint(rows) {
		t.Errorf("%v rows, %v; clients were told of %d", got, err, rows)
	}
	port := localPort(stays)
	tr.succeeds(g)
	tr.run(stays, "SELECT 1")
	if localPort(stays) != port {
		t.Error("the client has another connection")
	}
}

// TestTheOldProcessIsKilled: what it had given away goes on, what it had left loses its connection, and the new one is a gateway that
// can be taken over itself.
func TestTheOldProcessIsKilled(t *testing.T) {
	tr := startWith(t, pair.Options{})
	all := tr.clients(8)
	tr.waitAt("a", all)
	stays := tr.one()
	tr.run(stays, "BEGIN")
	g := tr.p.Gateway
	next := tr.p.Successor(g)
	again, _ := tr.writeDuring(all, func(run *run) {
		if err := next.Start(); err != nil {
			t.Fatal(err)
		}
		tr.within(time.Minute, func(ctx context.Context) error {
			return tr.p.Wait(ctx, "all clients but one are handed over", func(ctx context.Context) (bool, error) {
				r, err := next.Control().StandaloneGateway(ctx)
				return r.Predecessor != nil && r.Predecessor.Clients == 1 && r.Clients == len(all), err
			})
		})
		if err := g.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		var e *pgconn.PgError
		if _, err := stays.Exec(t.Context(), "COMMIT"); err == nil || errors.As(err, &e) {
			t.Errorf("a client of the process that was killed: %v", err)
		}
		tr.within(time.Minute, func(ctx context.Context) error {
			return tr.p.Wait(ctx, "the new process is alone", func(ctx context.Context) (bool, error) {
				r, err := next.Control().StandaloneGateway(ctx)
				return err == nil && r.Predecessor == nil, err
			})
		})
		for _, c := range all {
			c.at.Store(nil)
		}
		run.waitAt("a")
		next = tr.succeeds(next)
	})
	if again != 0 {
		t.Errorf("%d transactions were rolled back", again)
	}
	tr.run(tr.one(), "SELECT 1")
	tr.audit(all)
}

// TestTheNewProcessHangs: the old one gives it up, and goes on with the clients that it has. When it wakes, it ends.
func TestTheNewProcessHangs(t *testing.T) {
	tr := startWith(t, pair.Options{})
	g, idle, stays := tr.p.Gateway, tr.one(), tr.one()
	tr.run(stays, "BEGIN")
	next := tr.p.Successor(g)
	if err := next.Start(); err != nil {
		t.Fatal(err)
	}
	tr.within(time.Minute, func(ctx context.Context) error {
		return tr.p.Wait(ctx, "a client is handed over", func(ctx context.Context) (bool, error) {
			r, err := next.Control().StandaloneGateway(ctx)
			return r.Predecessor != nil && r.Clients == 1, err
		})
	})
	if err := next.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	tr.run(stays, "COMMIT") // and now it is to be handed over
	begun := time.Now()
	tr.run(stays, "SELECT 1")
	fresh := tr.one()
	t.Logf("a new client was served after %v", time.Since(begun).Round(time.Millisecond))
	tr.run(fresh, "SELECT 1")
	if r := tr.report(g); r.Clients != 2 {
		t.Errorf("the old process has %d clients", r.Clients)
	}
	if err := next.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	tr.ends(next, 1)
	if !strings.Contains(next.Log(), "has taken the gateway back") {
		t.Errorf("the new process: %s", next.Log())
	}
	tr.askedToLeave(idle, "the gateway is shutting down", "")
	tr.run(stays, "SELECT 1")
	tr.run(tr.one(), "SELECT 1")
	tr.succeeds(g)
	tr.run(stays, "SELECT 1")
	tr.run(fresh, "SELECT 1")
}

// TestAnAgentIsRestartedBehindItsSocket: which the service manager holds. Who connects while it is away is not refused, but waits.
func TestAnAgentIsRestartedBehindItsSocket(t *testing.T) {
	tr := startWith(t, pair.Options{})
	tr.address = tr.a.Door
	if err := tr.a.SignalAgent(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", tr.a.Door)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	socket, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	tr.a.HoldDoor(socket)
	for range 3 {
		came := make(chan error, 1)
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			conn, err := tr.connect(ctx)
			if err == nil {
				_, err = conn.Exec(ctx, "SELECT 1")
				err = errors.Join(err, conn.Close(ctx))
			}
			came <- err
		}()
		if err := tr.a.StartAgent(); err != nil {
			t.Fatal(err)
		}
		if err := <-came; err != nil {
			t.Errorf("a client that came while the agent was away: %v", err)
		}
		if err := tr.a.SignalAgent(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAllOfASiteIsReplacedUnderItsClients: they come through a gateway beside the agent. The site is drained, its agent restarted, and
// then the gateway is taken over: nobody sees any of it.
func TestAllOfASiteIsReplacedUnderItsClients(t *testing.T) {
	tr := startWith(t, pair.Options{})
	g, err := tr.p.GatewayBeside(tr.a)
	if err == nil {
		err = g.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	tr.address = g.Address
	tr.within(time.Minute, func(ctx context.Context) error {
		return tr.p.Wait(ctx, "the gateway serves", func(ctx context.Context) (bool, error) {
			c, err := tr.connect(ctx)
			if err != nil {
				return false, err
			}
			return true, c.Close(ctx)
		})
	})
	all := tr.clients(6)
	tr.waitAt("a", all)
	ports := map[*client]string{}
	for _, c := range all {
		ports[c] = localPort(c.conn)
	}
	again, longest := tr.writeDuring(all, func(run *run) {
		tr.within(time.Minute, func(ctx context.Context) error { return drain(ctx, tr.a, server.DrainRequest{Site: "a", Drain: true}) })
		run.waitAt("b")
		tr.within(time.Minute, func(ctx context.Context) error {
			return tr.p.Wait(ctx, "nothing is left of the gateways at a", func(ctx context.Context) (bool, error) {
				st, err := tr.a.Control.Status(ctx)
				return err == nil && st.Sites[0].Gateway.Connections == 0, err
			})
		})
		if err := errors.Join(tr.a.SignalAgent(syscall.SIGTERM), tr.a.StartAgent()); err != nil {
			t.Fatal(err)
		}
		tr.within(time.Minute, func(ctx context.Context) error {
			return tr.p.Wait(ctx, "the agent takes clients again", func(ctx context.Context) (bool, error) {
				err := drain(ctx, tr.a, server.DrainRequest{Site: "a"})
				return err == nil, err
			})
		})
		run.waitAt("a")
		g = tr.succeeds(g)
		for _, c := range all {
			c.at.Store(nil)
		}
		run.waitAt("a")
	})
	if again != 0 {
		t.Errorf("%d transactions were rolled back", again)
	}
	t.Logf("the longest transaction took %v", longest)
	for _, c := range all {
		if localPort(c.conn) != ports[c] {
			t.Errorf("client %d has another connection", c.n)
		}
	}
	tr.audit(all)
}

// TestPgbenchDoesNotSeeATakeover: as it is, in each of its protocols, with one connection per client for all of the run.
func TestPgbenchDoesNotSeeATakeover(t *testing.T) {
	program, err := pair.FindPgbench()
	if err != nil {
		t.Fatal(err)
	}
	tr := startWith(t, pair.Options{})
	script := filepath.Join(t.TempDir(), "script.sql")
	text := "BEGIN;\nINSERT INTO t VALUES (:client_id, (SELECT coalesce(max(seq), 0) + 1 FROM t WHERE client = :client_id));\nSELECT count(*) FROM t WHERE client = :client_id;\nCOMMIT;\n" +
		"INSERT INTO t VALUES (:client_id + 100, (SELECT coalesce(max(seq), 0) + 1 FROM t WHERE client = :client_id + 100));\n"
	if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	g, total := tr.p.Gateway, 0
	for _, mode := range []string{"simple", "extended", "prepared"} {
		host, port, _ := net.SplitHostPort(tr.address)
		cmd := exec.CommandContext(t.Context(), program, "-n", "-M", mode, "-c", "8", "-j", "2", "-T", "4", "-f", script, "-h", host, "-p", port, "-U", "client", "app")
		cmd.Env = append(os.Environ(), "PGPASSWORD=secret", "PGSSLMODE=disable")
		type result struct {
			out []byte
			err error
		}
		done := make(chan result, 1)
		go func() {
			out, err := cmd.CombinedOutput()
			done <- result{out, err}
		}()
		var r *result
		takeovers := 0
		for r == nil {
			tr.within(time.Minute, func(ctx context.Context) error {
				return tr.p.Wait(ctx, "pgbench is at the gateway", func(ctx context.Context) (bool, error) {
					select {
					case ended := <-done:
						r = &ended
						return true, nil
					default:
					}
					rep, err := g.Control().StandaloneGateway(ctx)
					return len(rep.Sessions) == 8, err
				})
			})
			if r == nil {
				g = tr.succeeds(g)
				takeovers++
			}
		}
		committed, failed := pair.PgbenchCounts(string(r.out))
		if r.err != nil || failed != 0 || committed == 0 || takeovers < 2 {
			t.Errorf("%s: %v, %d committed, %d failed, %d takeovers\n%s", mode, r.err, committed, failed, takeovers, r.out)
		}
		t.Logf("%s: %d transactions, %d takeovers", mode, committed, takeovers)
		total += committed
	}
	rows, err := tr.a.Cluster.QueryText(t.Context(), "app", "SELECT count(*) FILTER (WHERE client < 100), count(*) FILTER (WHERE client >= 100) FROM t")
	if want := fmt.Sprint(total); err != nil || rows[0][0] != want || rows[0][1] != want {
		t.Errorf("%v rows, %v; pgbench was told of %s of each kind", rows, err, want)
	}
}
