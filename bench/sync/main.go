// Command sync measures what a commit costs when it must be durable at a second site: with duri, with PostgreSQL's native
// logical replication and with a physical standby, each as the synchronous standby, beside one server alone. All of them
// run at the same time and are loaded in turn; a relay between the two sites of each makes the round trip. Run it by
// `make bench ASK=sync`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pgcluster"
)

func main() {
	b := bench{rtts: list{0, 5, 20}, clients: list{1, 8, 32}}
	flag.Var(&b.rtts, "rtt", "round trips between the sites in ms")
	flag.Var(&b.clients, "clients", "numbers of clients at each site that has some")
	flag.DurationVar(&b.time, "time", 5*time.Second, "what counts of a load, in whole seconds; one more comes before")
	flag.IntVar(&b.runs, "runs", 3, "loads of each kind")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench sync:", err)
		os.Exit(1)
	}
}

// list is a flag: whole numbers, separated by commas.
type list []int

// String is the flag's form.
func (l *list) String() string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint([]int(*l)), " ", ","), "[]")
}

// Set reads it.
func (l *list) Set(s string) error {
	*l = nil
	for item := range strings.SplitSeq(s, ",") {
		n, err := strconv.Atoi(item)
		if err != nil || n < 0 {
			return fmt.Errorf("%q is not a whole number", item)
		}
		*l = append(*l, n)
	}
	return nil
}

type bench struct {
	rtts, clients list
	time          time.Duration
	runs          int

	dir, script string
	binDir      string // PostgreSQL's programs, the same ones for all
	systems     []*system
	loads       int // how many there were
}

// cell is where a figure belongs; clients are those of each site that has some.
type cell struct {
	rtt, clients int
	system       string
}

func (b *bench) run(ctx context.Context) (err error) {
	if b.time < time.Second || b.runs < 1 || slices.Contains(b.clients, 0) {
		return errors.New("nothing to measure: -time is at least 1s, -runs and each of -clients at least 1")
	}
	var major int
	if b.binDir, major, err = pair.NewestPostgres(ctx); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "duri-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	defer func() { err = errors.Join(err, b.close()) }()
	if err := b.start(ctx); err != nil {
		return err
	}
	fmt.Printf("PostgreSQL %d, %d CPUs, fsync on everywhere, %s a load, %d runs\n", major, runtime.NumCPU(), b.time, b.runs)
	fmt.Printf("load: pgbench, INSERT of one row under a key that no other client uses; latencies from its log\n")
	results, fsyncs := map[cell][]sample{}, map[int]float64{}
	for _, rtt := range b.rtts {
		if fsyncs[rtt], err = b.measureRTT(ctx, rtt, results); err != nil {
			return err
		}
	}
	for _, rtt := range b.rtts {
		fmt.Print(report(rtt, b.clients, fsyncs[rtt], results))
	}
	return nil
}

// measureRTT loads every system with every number of clients and gives the time of an fsync.
func (b *bench) measureRTT(ctx context.Context, rtt int, results map[cell][]sample) (fsync float64, err error) {
	for _, s := range b.systems {
		s.delay(time.Duration(rtt) * time.Millisecond / 2)
	}
	if fsync, err = fsyncTime(b.dir); err != nil {
		return 0, err
	}
	fmt.Printf("round trip %d ms, fsync %.2f ms\n", rtt, fsync)
	for _, clients := range b.clients {
		for i := range b.runs {
			for _, s := range b.systems {
				m, err := b.load(ctx, s, clients)
				if err == nil {
					err = awaitEqual(ctx, s)
				}
				if err != nil {
					return 0, fmt.Errorf("%s, round trip %d ms, %d clients, run %d: %w", s.name, rtt, clients, i+1, err)
				}
				fmt.Printf("  %-16s %3d clients  p50 %7.2f ms  p99 %7.2f ms  %6.0f tx/s\n", s.name, clients, m.p50, m.p99, m.tps)
				c := cell{rtt, clients, s.name}
				results[c] = append(results[c], m)
			}
		}
	}
	return fsync, nil
}

// settings of all servers: durable, and without a checkpoint in the middle of a load.
func settings() map[string]string {
	return map[string]string{
		"fsync": "on", "synchronous_commit": "on", "max_wal_size": "4GB", "checkpoint_timeout": "1h", "wal_retrieve_retry_interval": "100ms",
	}
}

// poll asks until ok says yes; the error tells what was waited for.
func poll(ctx context.Context, what string, ok func(ctx context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, waitMax)
	defer cancel()
	for {
		done, err := ok(ctx)
		if done && err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w", what, errors.Join(ctx.Err(), err))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// waitMax bounds each wait: for joining, for a standby to be counted on, for a load to arrive.
const waitMax = 2 * time.Minute

// awaitEqual waits until the sites of a system hold the same rows.
func awaitEqual(ctx context.Context, s *system) error {
	return poll(ctx, "the sites are equal", func(ctx context.Context) (bool, error) {
		var first string
		for i, c := range s.sites {
			rows, err := c.QueryText(ctx, database, "SELECT count(*), sum(hashtextextended(p::text, 0)) FROM payment p")
			if err != nil {
				return false, err
			}
			if sum := strings.Join(rows[0], " "); i == 0 {
				first = sum
			} else if sum != first {
				return false, fmt.Errorf("rows and checksum: %s at the first site, %s at the second", first, sum)
			}
		}
		return true, nil
	})
}

// close ends what was started, the last one first.
func (b *bench) close() error {
	var errs []error
	for _, s := range slices.Backward(b.systems) {
		errs = append(errs, s.close())
	}
	return errors.Join(errs...)
}

// server makes and starts a server, which the system then owns.
func (b *bench) server(ctx context.Context, s *system, standbyOf string) (*pgcluster.Cluster, error) {
	c, err := pgcluster.Create(ctx, pgcluster.Options{BinDir: b.binDir, Settings: settings(), StandbyOf: standbyOf})
	if err != nil {
		return nil, err
	}
	s.closers = append(s.closers, c.Destroy)
	s.sites = append(s.sites, c)
	return c, c.Start(ctx)
}
