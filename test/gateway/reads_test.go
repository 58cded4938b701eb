package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/duri-io/duri/server"
)

// startReading is start with a gateway whose clients have their home at a and read at b.
func startReading(t *testing.T, more string) *trial {
	t.Helper()
	tr := start(t)
	if err := tr.p.Gateway.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	err := tr.p.Gateway.EditConfig(func(text string) string {
		return strings.Replace(text, "\ngateway:\n", "\ngateway:\n"+more, 1)
	})
	if err != nil {
		t.Fatal(err)
	}
	tr.startGateway()
	return tr
}

// read reads what the client has written, and says where. It must see all of it, and no fewer rows in all than before.
func (c *reader) read(ctx context.Context) (site string, err error) {
	var mine, all, others int
	err = c.conn.QueryRow(ctx, "SELECT count(*) FILTER (WHERE client = $1), count(*), count(*) FILTER (WHERE client = 1000), current_setting('app.site') FROM t", c.n).Scan(&mine, &all, &others, &site)
	switch {
	case err != nil:
		return "", fmt.Errorf("client %d, a read after %d transactions: %w", c.n, c.seq, err)
	case mine != c.seq:
		return "", fmt.Errorf("client %d has written %d rows and sees %d at %s", c.n, c.seq, mine, site)
	case all < c.seen || others < c.others:
		return "", fmt.Errorf("client %d has seen %d rows, %d of b's own, at %s, and now %d, %d at %s", c.n, c.seen, c.others, c.where, all, others, site)
	}
	c.seen, c.others, c.where = all, others, site
	c.reads[site]++
	return site, nil
}

// reader is a client that also reads.
type reader struct {
	*client
	seen   int // rows
	others int // of them of clients at b
	where  string
	reads  map[string]int // by site
}

// readUntil reads until a site serves the reads.
func (c *reader) readUntil(ctx context.Context, site string) error {
	for {
		at, err := c.read(ctx)
		if err != nil || at == site {
			return err
		}
	}
}

func readers(all []*client) (out []*reader) {
	for _, c := range all {
		out = append(out, &reader{client: c, reads: map[string]int{}})
	}
	return out
}

// TestReadsAreServedElsewhere: sessions write at home and read at another site, where others write as well; they see at once what they
// have written, and never less than before, wherever they are.
func TestReadsAreServedElsewhere(t *testing.T) {
	tr := startReading(t, "  admins: [client]\n  reads: {weights: {b: 1}, lag_max: 500ms}\n")
	all := tr.clients(6)
	tr.waitAt("a", all)
	sessions := readers(all)

	// Others write at b, which is their home.
	var stop atomic.Bool
	var others sync.WaitGroup
	defer others.Wait()
	defer stop.Store(true)
	conn, err := pgx.Connect(t.Context(), fmt.Sprintf("postgres://client:secret@%s/app?sslmode=disable", tr.b.Door))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	others.Go(func() {
		for n := 0; !stop.Load(); n++ {
			if _, err := conn.Exec(context.Background(), "INSERT INTO t VALUES (1000, $1, 'b')", n); err != nil {
				t.Error(err)
				return
			}
		}
	})

	const rounds = 40
	begun := time.Now()
	tr.within(2*time.Minute, func(ctx context.Context) error {
		var wg sync.WaitGroup
		errs := make(chan error, len(sessions))
		for _, c := range sessions {
			wg.Go(func() {
				for round := range rounds {
					if err := c.write(ctx); err != nil {
						errs <- err
						return
					}
					if *c.at.Load() != "a" {
						errs <- fmt.Errorf("client %d wrote at %s", c.n, *c.at.Load())
						return
					}
					if _, err := c.read(ctx); err != nil { // at once
						errs <- err
						return
					}
					if round%4 == 0 { // a block is at home, and sees what was seen elsewhere
						err := pgx.BeginFunc(ctx, c.conn, func(tx pgx.Tx) error {
							var n int
							var site string
							err := tx.QueryRow(ctx, "SELECT count(*), current_setting('app.site') FROM t").Scan(&n, &site)
							if err == nil && (site != "a" || n < c.seen) {
								err = fmt.Errorf("client %d sees %d rows at %s in a block, and has seen %d", c.n, n, site, c.seen)
							}
							return err
						})
						if err != nil {
							errs <- err
							return
						}
					}
					if err := c.readUntil(ctx, "b"); err != nil {
						errs <- err
						return
					}
				}
			})
		}
		wg.Wait()
		close(errs)
		return errors.Join(slices.Collect(func(yield func(error) bool) {
			for err := range errs {
				yield(err)
			}
		})...)
	})
	sum := map[string]int{}
	for _, c := range sessions {
		for site, n := range c.reads {
			sum[site] += n
		}
	}
	t.Logf("%d rounds of %d sessions took %v; reads: %v", rounds, len(sessions), time.Since(begun).Round(time.Millisecond), sum)

	tr.showsReads()
	tr.lags(sessions[0])

	// Drained, b serves no reads; nobody notices.
	tr.within(time.Minute, func(ctx context.Context) error {
		if _, err := tr.b.Control.Drain(ctx, server.DrainRequest{Site: "b", Drain: true}); err != nil {
			return err
		}
		for _, c := range sessions {
			if err := c.readUntil(ctx, "a"); err != nil {
				return err
			}
		}
		_, err := tr.b.Control.Drain(ctx, server.DrainRequest{Site: "b"})
		return err
	})
	stop.Store(true)
	others.Wait()
	tr.audit(all)
}

// showsReads looks at what the gateway says of all this.
func (t *trial) showsReads() {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), fmt.Sprintf("postgres://client:secret@%s/duri?sslmode=disable&default_query_exec_mode=simple_protocol", t.address))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	rows, err := conn.Query(t.Context(), "SHOW duri.routes")
	if err != nil {
		t.Fatal(err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowToMap)
	if err != nil || len(all) != 1 || all[0]["site"] != "a" || !strings.HasPrefix(fmt.Sprint(all[0]["reads"]), "b 1 (lag 0.") {
		t.Errorf("SHOW duri.routes: %v, %v", all, err)
	}
}

// lags keeps b from applying a row until reads are served at home, and lets it go on.
func (t *trial) lags(c *reader) {
	t.Helper()
	t.within(time.Minute, func(ctx context.Context) error {
		if err := c.readUntil(ctx, "b"); err != nil {
			return err
		}
		lock, err := pgconn.Connect(ctx, t.b.Cluster.DSN(t.b.Database, t.b.Cluster.Superuser()))
		if err != nil {
			return err
		}
		defer lock.Close(context.Background())
		if _, err := lock.Exec(ctx, fmt.Sprintf("BEGIN; UPDATE t SET site = site WHERE client = %d AND seq = 1", c.n)).ReadAll(); err != nil {
			return err
		}
		if _, err := c.conn.Exec(ctx, "UPDATE t SET site = 'changed' WHERE client = $1 AND seq = 1", c.n); err != nil {
			return err
		}
		before := maps.Clone(c.reads)
		if err := c.readUntil(ctx, "a"); err != nil {
			return err
		}
		// Not only what it has just written: it is behind.
		begun := time.Now()
		for time.Since(begun) < time.Second {
			if at, err := c.read(ctx); err != nil || at != "a" {
				return fmt.Errorf("a read at %s, which is behind: %w", at, err)
			}
		}
		t.Logf("reads while b could not apply: %d at a", c.reads["a"]-before["a"])
		if _, err := lock.Exec(ctx, "ROLLBACK").ReadAll(); err != nil {
			return err
		}
		return c.readUntil(ctx, "b")
	})
}

// TestReadsSurviveTheLossOfTheirSite: PostgreSQL where sessions read, its agent, or both are killed while they read without a pause.
// Nobody sees an error; they read at home, and again at the site when it is back.
func TestReadsSurviveTheLossOfTheirSite(t *testing.T) {
	tr := startReading(t, "  reads: {weights: {b: 1}}\n")
	all := tr.clients(4)
	tr.waitAt("a", all)
	sessions := readers(all)
	for _, c := range []struct {
		name            string
		postgres, agent bool
	}{{"PostgreSQL", true, false}, {"the agent", false, true}, {"the site", true, true}} {
		var stop atomic.Bool
		var at [4]atomic.Pointer[string]
		var longest atomic.Int64
		var wg sync.WaitGroup
		for i, s := range sessions {
			wg.Go(func() {
				for n := 1; !stop.Load(); n++ {
					begun := time.Now()
					site, err := s.read(t.Context())
					longest.Store(max(longest.Load(), int64(time.Since(begun))))
					if err == nil && n%500 == 0 {
						err = s.write(t.Context())
					}
					if err != nil {
						t.Error(err)
						return
					}
					at[i].Store(&site)
				}
			})
		}
		allAt := func(site string) {
			t.Helper()
			tr.within(time.Minute, func(ctx context.Context) error {
				return tr.p.Wait(ctx, "all read at "+site, func(context.Context) (bool, error) {
					if t.Failed() {
						return false, errors.New("a client has failed")
					}
					for i := range at {
						if s := at[i].Load(); s == nil || *s != site {
							return false, fmt.Errorf("client %d is elsewhere", i)
						}
					}
					return true, nil
				})
			})
		}
		allAt("b")
		var err error
		if c.agent {
			err = tr.b.SignalAgent(syscall.SIGKILL)
		}
		if c.postgres {
			err = errors.Join(err, tr.b.Cluster.Kill())
		}
		if err != nil {
			t.Fatal(err)
		}
		allAt("a")
		t.Logf("%s at b was killed: the longest read took %v", c.name, time.Duration(longest.Load()).Round(time.Millisecond))
		if c.postgres {
			tr.within(time.Minute, tr.b.Cluster.Start)
		}
		if c.agent {
			if err := tr.b.StartAgent(); err != nil {
				t.Fatal(err)
			}
		}
		tr.waitMembers()
		allAt("b")
		stop.Store(true)
		wg.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	tr.audit(all)
}

// shows asks the gateway's own database.
func (t *trial) shows(ctx context.Context, conn *pgx.Conn, what string) ([]map[string]any, error) {
	rows, err := conn.Query(ctx, "SHOW "+what)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToMap)
}

// TestWritersAreDelayedWhileAPeerFallsBehind: b does not apply what is written at a; clients that write there are delayed, until it is
// plain that this does not help.
func TestWritersAreDelayedWhileAPeerFallsBehind(t *testing.T) {
	tr := startReading(t, "  admins: [client]\n  slow_down: {from: 1MiB, to: 2MiB, most: 30ms}\n")
	all := tr.clients(1)
	tr.waitAt("a", all)
	c := all[0]
	admin, err := pgx.Connect(t.Context(), fmt.Sprintf("postgres://client:secret@%s/duri?sslmode=disable&default_query_exec_mode=simple_protocol", tr.address))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(context.Background())
	route := func(ctx context.Context) (backlog int64, delayMS float64, err error) {
		rows, err := tr.shows(ctx, admin, "duri.routes")
		if err != nil || len(rows) != 1 {
			return 0, 0, fmt.Errorf("%v: %w", rows, err)
		}
		delay := rows[0]["delay_ms"].(pgtype.Numeric)
		f, err := delay.Float64Value()
		return rows[0]["backlog_bytes"].(int64), f.Float64, err
	}
	slowed := func(ctx context.Context) (n int64, err error) {
		rows, err := tr.shows(ctx, admin, "duri.counters")
		for _, r := range rows {
			if r["name"] == "slowed" {
				n = r["value"].(int64)
			}
		}
		return n, err
	}
	if n, err := slowed(t.Context()); err != nil || n != 0 {
		t.Fatalf("%d transactions were delayed before there was a reason, %v", n, err)
	}
	lock, err := pgconn.Connect(t.Context(), tr.b.Cluster.DSN(tr.b.Database, tr.b.Cluster.Superuser()))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close(context.Background())
	tr.within(time.Minute, func(ctx context.Context) error {
		if err := tr.p.WaitApplied(ctx); err != nil {
			return err
		}
		if _, err := lock.Exec(ctx, fmt.Sprintf("BEGIN; UPDATE t SET site = site WHERE client = %d AND seq = 1", c.n)).ReadAll(); err != nil {
			return err
		}
		if _, err := c.conn.Exec(ctx, "UPDATE t SET site = 'changed' WHERE client = $1 AND seq = 1", c.n); err != nil {
			return err
		}
		for n := 0; ; n++ {
			if _, err := c.conn.Exec(ctx, "INSERT INTO t SELECT 50, $1, string_agg(md5(n::text), '') FROM generate_series(1, 10000) AS n", n); err != nil {
				return err
			}
			if backlog, delay, err := route(ctx); err != nil || delay == 30 {
				t.Logf("after %d writes the backlog is %d bytes", n+1, backlog)
				return err
			}
		}
	})
	tr.within(time.Minute, func(ctx context.Context) error {
		before, err := slowed(ctx)
		if err != nil {
			return err
		}
		for range 20 {
			if _, err := c.conn.Exec(ctx, "SELECT count(*) FROM t"); err != nil {
				return err
			}
		}
		if n, err := slowed(ctx); err != nil || n != before {
			return fmt.Errorf("%d reads were delayed: %w", n-before, err)
		}
		begun := time.Now()
		if err := c.write(ctx); err != nil {
			return err
		}
		if took := time.Since(begun); took < 30*time.Millisecond {
			t.Errorf("a write took %v", took)
		}
		if n, err := slowed(ctx); err != nil || n != before+1 {
			return fmt.Errorf("%d delays of one write: %w", n-before, err)
		}
		return nil
	})
	// b goes on to receive, and applies what is not locked, but does not get further: nobody is delayed for ever.
	tr.within(time.Minute, func(ctx context.Context) error {
		return tr.p.Wait(ctx, "nobody is delayed any more", func(ctx context.Context) (bool, error) {
			if err := c.write(ctx); err != nil {
				return false, err
			}
			_, delay, err := route(ctx)
			return delay == 0, err
		})
	})
	if _, err := lock.Exec(t.Context(), "ROLLBACK").ReadAll(); err != nil {
		t.Fatal(err)
	}
	tr.audit(all)
}
