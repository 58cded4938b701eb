package twoway

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
)

// The loads.
const (
	Upserts = "upserts" // 70 % upserts and 30 % deletes of few keys
	TPCB    = "tpcb"    // pgbench's own
)

// Loads lists them.
func Loads() []string { return []string{Upserts, TPCB} }

// Counts are what one site's clients did.
type Counts struct {
	Transactions int // committed
	Changes      int // rows that they inserted, updated or deleted
	Refused      int // deadlocks; tried again by the client, or given up by pgbench
}

// load is what clients do.
type load interface {
	// create makes the same tables with the same content each time.
	create(ctx context.Context, c *pgcluster.Cluster, database string) error
	tables() []table
	// size is how many keys there may be, 0 when it is not bounded.
	size() int
	// run runs the clients of both sites side by side.
	run(ctx context.Context, sites []Site, say func(string, ...any)) ([2]Counts, error)
	// check looks into one site for what must hold whatever replication does.
	check(ctx context.Context, s Site) ([]Wrong, error)
}

// table of a load. Its first column is the key, if it has one.
type table struct {
	name  string
	keyed bool
}

func newLoad(name string, o Options) (load, error) {
	switch name {
	case Upserts:
		return upserts{o}, nil
	case TPCB:
		return tpcb{o}, nil
	}
	return nil, fmt.Errorf("there is no load %q; there are %s", name, strings.Join(Loads(), ", "))
}

// every is the time between two transactions of one client, 0 without a rate.
func (o Options) every() time.Duration {
	if o.Rate <= 0 {
		return 0
	}
	return time.Duration(float64(o.Clients) / o.Rate * float64(time.Second))
}

// upserts is the load Upserts.
type upserts struct{ o Options }

// create fills in every key: on an empty table the clients' prepared statements, and those of every system, would keep
// plans that read it from end to end.
func (u upserts) create(ctx context.Context, c *pgcluster.Cluster, database string) error {
	if err := c.Exec(ctx, database, fmt.Sprintf(`CREATE TABLE kv (k int PRIMARY KEY, v text NOT NULL, n bigint NOT NULL);
		INSERT INTO kv SELECT k, 'seed', k FROM generate_series(1, %d) k; %s`, u.o.Keys, markTable)); err != nil {
		return err
	}
	return c.Exec(ctx, database, "ANALYZE")
}

func (upserts) tables() []table                              { return []table{{"kv", true}} }
func (u upserts) size() int                                  { return u.o.Keys }
func (upserts) check(context.Context, Site) ([]Wrong, error) { return nil, nil }

func (u upserts) run(ctx context.Context, sites []Site, say func(string, ...any)) (counts [2]Counts, err error) {
	var total [2]atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	end := time.Now().Add(u.o.Length)
	clients := make([][]Counts, len(sites))
	for i, s := range sites {
		clients[i] = make([]Counts, u.o.Clients)
		for j := range u.o.Clients {
			g.Go(func() (err error) {
				w := writer{rnd: rand.New(rand.NewPCG(u.o.Seed, uint64(i)<<32|uint64(j))), name: s.Name + strconv.Itoa(j), keys: u.o.Keys, every: u.o.every()}
				clients[i][j], err = w.run(ctx, s, end, &total[i])
				return err
			})
		}
	}
	g.Go(func() error {
		for tick := 5 * time.Second; time.Now().Add(tick).Before(end) && pause(ctx, tick); {
			say("%d + %d transactions, %.0f s to go", total[0].Load(), total[1].Load(), time.Until(end).Seconds())
		}
		return nil
	})
	err = g.Wait()
	for i := range clients {
		for _, c := range clients[i] {
			counts[i].Transactions += c.Transactions
			counts[i].Changes += c.Changes
			counts[i].Refused += c.Refused
		}
	}
	return counts, err
}

// writer is one client. What it does follows from its seed alone, how often from the server.
type writer struct {
	rnd  *rand.Rand
	name string
	keys int
	// every is the time between the beginnings of two transactions; 0: none.
	every time.Duration
}

// deletes is the share of deletes, in percent.
const deletes = 30

// op is one transaction: a delete when v is empty, else an upsert.
type op struct {
	k int
	v string
	n int64
}

func (w *writer) next() op {
	p := op{k: 1 + w.rnd.IntN(w.keys)}
	if w.rnd.IntN(100) >= deletes {
		p.n = w.rnd.Int64N(1 << 40)
		p.v = w.name + " " + strconv.FormatInt(p.n, 36)
	}
	return p
}

// run writes until end. A statement that is under way then is finished, so that no outcome is in doubt.
func (w *writer) run(ctx context.Context, s Site, end time.Time, total *atomic.Int64) (n Counts, err error) {
	conn, err := pg.Connect(ctx, s.Cluster.DSN(s.Database, ""), "", nil)
	if err != nil {
		return n, fmt.Errorf("client of site %s: %w", s.Name, err)
	}
	defer pg.Close(conn)
	for name, sql := range map[string]string{
		"put": "INSERT INTO kv VALUES ($1, $2, $3) ON CONFLICT (k) DO UPDATE SET v = EXCLUDED.v, n = EXCLUDED.n",
		"del": "DELETE FROM kv WHERE k = $1",
	} {
		if _, err := conn.Prepare(ctx, name, sql, nil); err != nil {
			return n, fmt.Errorf("client of site %s: %w", s.Name, err)
		}
	}
	for due := time.Now(); ctx.Err() == nil && time.Now().Before(end); due = due.Add(w.every) {
		if wait := time.Until(due); w.every > 0 && wait > 0 && !pause(ctx, wait) {
			break
		}
		switch rows, err := write(ctx, conn, w.next()); {
		case err == nil:
			n.Transactions++
			n.Changes += rows
			total.Add(1)
		case pg.SQLState(err) == "40P01": // the victim of a deadlock has changed nothing
			n.Refused++
		case ctx.Err() == nil:
			return n, fmt.Errorf("client of site %s: %w", s.Name, err)
		}
	}
	return n, nil
}

// write does one transaction and gives the number of rows that it changed.
func write(ctx context.Context, conn *pgconn.PgConn, p op) (int, error) {
	name, args := "del", [][]byte{strconv.AppendInt(nil, int64(p.k), 10)}
	if p.v != "" {
		name, args = "put", append(args, []byte(p.v), strconv.AppendInt(nil, p.n, 10))
	}
	tag, err := conn.ExecPrepared(ctx, name, args, nil, nil).Close()
	return int(tag.RowsAffected()), err
}

// tpcb is the load TPCB.
type tpcb struct{ o Options }

func (t tpcb) create(ctx context.Context, c *pgcluster.Cluster, database string) error {
	if _, err := pair.Pgbench(ctx, c, database, "-i", "-q", "-s", strconv.Itoa(t.o.Scale)); err != nil {
		return err
	}
	if t.o.Delta {
		if err := c.Exec(ctx, database, fullIdentity); err != nil {
			return err
		}
	}
	return c.Exec(ctx, database, markTable)
}

// fullIdentity is what delta columns need.
const fullIdentity = `ALTER TABLE pgbench_branches REPLICA IDENTITY FULL; ALTER TABLE pgbench_tellers REPLICA IDENTITY FULL;
ALTER TABLE pgbench_accounts REPLICA IDENTITY FULL`

// deltas declares the balances in duri.yaml.
func deltas(text string) string {
	const name, tables = "  - name: \"" + database + "\"", `
    tables:
      public.pgbench_branches: {delta: [bbalance]}
      public.pgbench_tellers: {delta: [tbalance]}
      public.pgbench_accounts: {delta: [abalance]}`
	return strings.Replace(text, name, name+tables, 1)
}

func (tpcb) tables() []table {
	return []table{{"pgbench_branches", true}, {"pgbench_tellers", true}, {"pgbench_accounts", true}, {"pgbench_history", false}}
}

func (tpcb) size() int { return 0 } // the history grows

func (t tpcb) run(ctx context.Context, sites []Site, say func(string, ...any)) (counts [2]Counts, err error) {
	g, ctx := errgroup.WithContext(ctx)
	for i, s := range sites {
		g.Go(func() error {
			args := []string{
				"-n", "-c", strconv.Itoa(t.o.Clients), "-j", "1", "-M", "prepared", "-T", strconv.Itoa(int(t.o.Length.Round(time.Second).Seconds())),
				"--max-tries=1000", "--random-seed=" + strconv.FormatUint(t.o.Seed+uint64(i), 10),
			}
			if t.o.Rate > 0 {
				args = append(args, "-R", strconv.FormatFloat(t.o.Rate, 'f', -1, 64))
			}
			out, err := pair.Pgbench(ctx, s.Cluster, s.Database, args...)
			if err != nil {
				return fmt.Errorf("site %s: %w", s.Name, err)
			}
			counts[i].Transactions, counts[i].Refused = pair.PgbenchCounts(out)
			counts[i].Changes = 4 * counts[i].Transactions // three updates and a row of history
			say("site %s: %d transactions", s.Name, counts[i].Transactions)
			return nil
		})
	}
	return counts, g.Wait()
}

// Wrong is how many balances of a table are not the sum of their history.
type Wrong struct {
	Table string
	Wrong int
	Of    int
}

// balances are the columns that pgbench keeps as the sum of pgbench_history.delta: table, balance, key.
var balances = [][3]string{{"branches", "bbalance", "bid"}, {"tellers", "tbalance", "tid"}, {"accounts", "abalance", "aid"}}

// check compares each balance with the site's own history.
func (tpcb) check(ctx context.Context, s Site) ([]Wrong, error) {
	var all []Wrong
	for _, b := range balances {
		rows, err := s.Cluster.QueryText(ctx, s.Database, fmt.Sprintf(`SELECT count(*) FILTER (WHERE %[2]s <> coalesce(total, 0)), count(*)
			FROM pgbench_%[1]s LEFT JOIN (SELECT %[3]s, sum(delta) AS total FROM pgbench_history GROUP BY 1) h USING (%[3]s)`, b[0], b[1], b[2]))
		if err != nil {
			return nil, fmt.Errorf("add up the history at site %s: %w", s.Name, err)
		}
		w := Wrong{Table: b[0]}
		for i, n := range []*int{&w.Wrong, &w.Of} {
			if *n, err = strconv.Atoi(rows[0][i]); err != nil {
				return nil, fmt.Errorf("add up the history at site %s: %w", s.Name, err)
			}
		}
		all = append(all, w)
	}
	return slices.Clip(all), nil
}
