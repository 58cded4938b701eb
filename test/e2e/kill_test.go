package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/test/tpcb"
)

const ledgerSQL = `CREATE TABLE log (client int, n bigint);
	CREATE TABLE kv (id text PRIMARY KEY, client int, n bigint);
	CREATE TABLE hot (id int PRIMARY KEY, client int, n bigint);`

// writer is a client of one site that knows which of its transactions were acknowledged. What was in doubt when the
// connection broke it never sends again, so each number may be there once or, when not acknowledged, not at all.
type writer struct {
	id   int
	site *pair.Site
	rnd  *rand.Rand

	acked []int64
	tried int64
}

// run writes until ctx ends, over as many connections as it takes.
func (w *writer) run(ctx context.Context) {
	for ctx.Err() == nil {
		conn, err := pg.Connect(ctx, w.site.Cluster.DSN(w.site.Database, ""), "", map[string]string{"application_name": "client"})
		if err != nil {
			select {
			case <-ctx.Done():
			case <-time.After(20 * time.Millisecond):
			}
			continue
		}
		for err == nil && ctx.Err() == nil {
			err = w.write(conn)
		}
		pg.Close(conn)
	}
}

// write sends one transaction: a row without key, a row of its own, and a change of one of few rows that all clients
// of both sites write and delete. Its end is not bound to the load's, lest it be in doubt.
func (w *writer) write(conn *pgconn.PgConn) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	w.tried++
	hot := fmt.Sprintf("INSERT INTO hot VALUES (%[1]d, %[2]d, %[3]d) ON CONFLICT (id) DO UPDATE SET client = %[2]d, n = %[3]d", w.rnd.IntN(20), w.id, w.tried)
	if w.rnd.IntN(10) == 0 {
		hot = fmt.Sprintf("DELETE FROM hot WHERE id = %d", w.rnd.IntN(20))
	}
	_, err := pg.Rows(ctx, conn, fmt.Sprintf("BEGIN; INSERT INTO log VALUES (%[1]d, %[2]d); INSERT INTO kv VALUES ('%[1]d-%[2]d', %[1]d, %[2]d); %[3]s; COMMIT",
		w.id, w.tried, hot))
	if err == nil {
		w.acked = append(w.acked, w.tried)
	}
	return err
}

// load runs two clients at each site until stop is called, which waits for them.
func load(t *testing.T, p *pair.Pair, rnd *rand.Rand) (writers []*writer, stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range 4 {
		w := &writer{id: i, site: p.Sites[i%2], rnd: rand.New(rand.NewPCG(rnd.Uint64(), uint64(i)))}
		writers = append(writers, w)
		wg.Go(func() { w.run(ctx) })
	}
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return writers, stop
}

// exact checks both tables of both sites against what the clients know.
func exact(t *testing.T, p *pair.Pair, writers []*writer) {
	t.Helper()
	for _, s := range p.Sites {
		for _, table := range []string{"log", "kv"} {
			rows, err := s.Cluster.QueryText(t.Context(), s.Database, "SELECT client, n, count(*) FROM "+table+" GROUP BY 1, 2")
			if err != nil {
				t.Fatal(err)
			}
			there := map[string]string{}
			for _, r := range rows {
				there[r[0]+"-"+r[1]] = r[2]
				if r[2] != "1" {
					t.Errorf("site %s, %s: transaction %s of client %s is there %s times", s.Name, table, r[1], r[0], r[2])
				}
			}
			tried, acked := int64(0), 0
			for _, w := range writers {
				tried += w.tried
				for _, n := range w.acked {
					acked++
					if _, ok := there[fmt.Sprintf("%d-%d", w.id, n)]; !ok {
						t.Errorf("site %s, %s: acknowledged transaction %d of client %d is lost", s.Name, table, n, w.id)
					}
				}
			}
			if int64(len(there)) > tried {
				t.Errorf("site %s, %s: %d rows, only %d were sent", s.Name, table, len(there), tried)
			}
			t.Logf("site %s, %s: %d rows, %d acknowledged of %d sent", s.Name, table, len(there), acked, tried)
		}
	}
	for _, w := range writers {
		if len(w.acked) == 0 {
			t.Errorf("client %d got nothing acknowledged", w.id)
		}
	}
}

// fault is something that happens to the system; it ends with everything running again.
type fault struct {
	name string
	do   func(ctx context.Context, down func()) error
}

func faults(p *pair.Pair) []fault {
	var all []fault
	for _, s := range p.Sites {
		agent := fault{"kill agent " + s.Name, func(_ context.Context, down func()) error {
			if err := s.SignalAgent(syscall.SIGKILL); err != nil {
				return err
			}
			down()
			return s.StartAgent()
		}}
		server := fault{"kill PostgreSQL " + s.Name, func(ctx context.Context, down func()) error {
			if err := s.Cluster.Kill(); err != nil {
				return err
			}
			down()
			return s.Cluster.Start(ctx)
		}}
		all = append(all, agent, server, fault{"kill site " + s.Name, func(ctx context.Context, down func()) error {
			return server.do(ctx, func() { // the agent dies while its server is down, and may come back before it
				if err := s.SignalAgent(syscall.SIGKILL); err == nil {
					down()
				}
				_ = s.StartAgent() // its absence would be seen at the end
			})
		}})
	}
	return append(all, fault{"stop agent a for 2 s", func(ctx context.Context, _ func()) error {
		if err := p.Sites[0].SignalAgent(syscall.SIGSTOP); err != nil {
			return err
		}
		pause(ctx, 2*time.Second)
		return p.Sites[0].SignalAgent(syscall.SIGCONT)
	}})
}

// pause lets time pass in which the load goes on.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func TestKillsAtAnyMomentLoseNothingAndDoubleNothing(t *testing.T) {
	t.Parallel()
	rnd := random(t)
	p := newPair(t, pair.Options{Seed: schema(ledgerSQL)}, pgtest.WithFsync())
	writers, stop := load(t, p, rnd)
	up := func(most int) { pause(t.Context(), time.Duration(100+rnd.IntN(most))*time.Millisecond) }
	all := faults(p)
	for _, i := range rnd.Perm(len(all)) {
		up(1000)
		t.Log(all[i].name)
		if err := all[i].do(t.Context(), func() { up(500) }); err != nil {
			t.Fatalf("%s: %v", all[i].name, err)
		}
	}
	// And two at once, as often as not while one of them has not come back to itself.
	var g errgroup.Group
	for _, i := range rnd.Perm(4)[:2] {
		f, d := all[[]int{0, 1, 3, 4}[i]], time.Duration(rnd.IntN(300))*time.Millisecond
		t.Log("at the same time:", f.name)
		g.Go(func() error { return f.do(t.Context(), func() { pause(t.Context(), d) }) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	up(500)
	stop()
	settled(t, p, time.Minute)
	equal(t, p)
	exact(t, p, writers)
	for _, s := range p.Sites {
		healthy(t, s, 30*time.Second)
	}
}

func TestPgbenchAtBothSitesWithAgentsKilled(t *testing.T) {
	t.Parallel()
	s := random(t).Uint64N(1 << 32)
	r, err := tpcb.Run(t.Context(), tpcb.Options{
		Binary: binary, Seconds: 6, Clients: 2, Scale: 1, Kills: 2, Seed: s, Fsync: true, Out: logWriter{t},
	})
	if err != nil {
		t.Fatalf("pgbench seed %d: %v", s, err)
	}
	t.Logf("%d + %d transactions, %d conflicts, caught up in %s, %d rows compared in %s", r.Transactions[0], r.Transactions[1],
		r.Conflicts, r.CaughtUp, r.Rows, r.Verify)
	if r.Rows == 0 {
		t.Error("nothing was compared")
	}
}

// logWriter writes to the test's log.
type logWriter struct{ t *testing.T }

func (w logWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s", b)
	return len(b), nil
}

// peakKB reads the greatest resident memory that a process has had, in kB.
func peakKB(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	var kb int
	for line := range strings.Lines(string(b)) {
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kb); err == nil {
			return kb
		}
	}
	t.Fatalf("no VmHWM in the status of process %d", pid)
	return 0
}
