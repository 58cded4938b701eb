// Command apply measures how fast a backlog of pgbench TPC-B transactions is drained: by duri (decode, journal, link,
// apply, both agents as processes) and by PostgreSQL's native logical replication, on the same two servers, in turn.
// Run it by `make bench ASK=apply`.
package main

import (
	"cmp"
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

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/wal"
)

func main() {
	var b bench
	flag.IntVar(&b.txns, "n", 100_000, "transactions to drain")
	flag.IntVar(&b.runs, "runs", 3, "drains of each kind")
	flag.IntVar(&b.scale, "scale", 10, "pgbench scale")
	flag.BoolVar(&b.verbose, "v", false, "print each server process's CPU seconds at the end of a drain")
	flag.StringVar(&b.fsync, "fsync", "off", "fsync of both servers")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench apply:", err)
		os.Exit(1)
	}
}

type bench struct {
	txns, runs, scale int
	fsync             string
	verbose           bool
	p                 *pair.Pair
	native            []*pgcluster.Cluster // servers of their own, so that neither decodes the other's WAL
	marks             int
}

// drain is one measurement.
type drain struct {
	wall                   time.Duration
	source, target, agents float64 // CPU seconds
}

// What is measured. The names of the databases are the first and the second.
const (
	native   = "native" // PostgreSQL's apply worker; the subscription was disabled while the load was written
	cold     = "app"    // duri; both agents were down
	returned = "back"   // duri; the target's agent was down and returns: the source's agent has decoded meanwhile
	duri     = cold
)

var kinds = []string{native, cold, returned}

// names are how the kinds are printed.
var names = map[string]string{native: "native", cold: "duri, both agents down", returned: "duri, target's agent down"}

// database is where a kind runs.
func database(kind string) string {
	if kind == native {
		return native
	}
	return duri
}

func (b *bench) run(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "duri-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	binary, err := pair.Build(ctx, dir)
	if err != nil {
		return err
	}
	b.p, err = pair.Start(ctx, pair.Options{Binary: binary, Database: duri, Settings: b.settings(), Seed: func(ctx context.Context, a *pair.Site) error {
		return b.pgbench(ctx, a.Cluster, duri, "-i", "-q", "-s", strconv.Itoa(b.scale))
	}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.p.Close()) }()
	wait, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	if err := b.p.WaitReady(wait); err != nil {
		return err
	}
	defer func() {
		for _, c := range b.native {
			err = errors.Join(err, c.Destroy())
		}
	}()
	if err := b.prepareNative(ctx); err != nil {
		return err
	}
	version, err := b.p.Sites[0].Cluster.Version(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("PostgreSQL %s, %d CPUs, pgbench scale %d, %d transactions a drain, fsync %s\n", version, runtime.NumCPU(), b.scale, b.txns, b.fsync)
	// A drain that does not count: statistics, caches, and the restart point of slots that were only just made.
	for _, kind := range kinds {
		if _, err := b.drain(ctx, kind); err != nil {
			return fmt.Errorf("%s, warm-up: %w", kind, err)
		}
	}
	results := map[string][]drain{}
	for i := range b.runs {
		for _, kind := range kinds {
			d, err := b.drain(ctx, kind)
			if err != nil {
				return fmt.Errorf("%s, run %d: %w", kind, i+1, err)
			}
			fmt.Printf("  %-26s %6.2f s  %7.0f tx/s\n", names[kind], d.wall.Seconds(), float64(b.txns)/d.wall.Seconds())
			results[kind] = append(results[kind], d)
		}
	}
	return b.report(results)
}

func (b *bench) settings() map[string]string {
	return map[string]string{
		"fsync": b.fsync, "shared_buffers": "512MB", "max_wal_size": "4GB", "wal_retrieve_retry_interval": "100ms",
	}
}

func (b *bench) pgbench(ctx context.Context, c *pgcluster.Cluster, db string, args ...string) error {
	_, err := pair.Pgbench(ctx, c, db, args...)
	return err
}

// prepareNative makes the same database with a native subscription, copied and then disabled.
func (b *bench) prepareNative(ctx context.Context) error {
	for range 2 {
		c, err := pgcluster.Create(ctx, pgcluster.Options{BinDir: b.p.Sites[0].Cluster.BinDir(), Settings: b.settings()})
		if err != nil {
			return err
		}
		b.native = append(b.native, c)
		if err := c.Start(ctx); err != nil {
			return err
		}
		if err := c.Exec(ctx, "postgres", "CREATE DATABASE "+native); err != nil {
			return err
		}
	}
	src, dst := b.native[0], b.native[1]
	if err := b.pgbench(ctx, src, native, "-i", "-q", "-s", strconv.Itoa(b.scale)); err != nil {
		return err
	}
	if err := b.pgbench(ctx, dst, native, "-i", "-q", "-I", "dtp", "-s", strconv.Itoa(b.scale)); err != nil {
		return err
	}
	for _, c := range []*pgcluster.Cluster{src, dst} {
		if err := c.Exec(ctx, native, "CREATE TABLE mark (id int PRIMARY KEY)"); err != nil {
			return err
		}
	}
	if err := src.Exec(ctx, native, "CREATE PUBLICATION native FOR ALL TABLES"); err != nil {
		return err
	}
	conn := fmt.Sprintf("host=127.0.0.1 port=%d user=%s dbname=%s", src.Port(), src.Superuser(), native)
	if err := dst.Exec(ctx, native, "CREATE SUBSCRIPTION native CONNECTION '"+conn+"' PUBLICATION native"); err != nil {
		return err
	}
	if err := b.p.Wait(ctx, "the native subscription has copied", func(ctx context.Context) (bool, error) {
		rows, err := dst.QueryText(ctx, native, "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'")
		return err == nil && rows[0][0] == "0", err
	}); err != nil {
		return err
	}
	if err := dst.Exec(ctx, native, "ALTER SUBSCRIPTION native DISABLE"); err != nil {
		return err
	}
	// The marker table joins duri's databases at both sites the way a DBA would make it.
	for _, s := range b.p.Sites {
		if err := s.Cluster.Exec(ctx, duri, "CREATE TABLE IF NOT EXISTS mark (id int PRIMARY KEY)"); err != nil {
			return err
		}
	}
	return nil
}

// drain writes the backlog while nobody replicates and measures until its last row is visible at the target.
func (b *bench) drain(ctx context.Context, kind string) (drain, error) {
	var d drain
	c := b.clusters(kind)
	src, dst := c[0], c[1]
	if err := b.stopAgents(kind); err != nil {
		return d, err
	}
	if err := b.pgbench(ctx, src, database(kind), "-n", "-c", "4", "-t", strconv.Itoa(b.txns/4), "-M", "prepared"); err != nil {
		return d, err
	}
	b.marks++
	if err := src.Exec(ctx, database(kind), fmt.Sprintf("INSERT INTO mark VALUES (%d)", b.marks)); err != nil {
		return d, err
	}
	for _, c := range []*pgcluster.Cluster{src, dst} {
		if err := c.Exec(ctx, "postgres", "CHECKPOINT"); err != nil {
			return d, err
		}
	}
	if kind == returned {
		if err := b.awaitDecoded(ctx); err != nil {
			return d, err
		}
	}
	s0, t0, a0 := treeCPU(src.PID()), treeCPU(dst.PID()), 0.0
	start := time.Now()
	switch kind {
	case native:
		if err := dst.Exec(ctx, native, "ALTER SUBSCRIPTION native ENABLE"); err != nil {
			return d, err
		}
	case cold:
		if err := b.p.StartAgents(); err != nil {
			return d, err
		}
	case returned:
		a0 = treeCPU(b.p.Sites[0].AgentPID())
		if err := b.p.Sites[1].StartAgent(); err != nil {
			return d, err
		}
	}
	wait, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	if b.verbose && kind != native {
		go b.timeline(wait, start)
	}
	if err := awaitMark(wait, dst.DSN(database(kind), ""), b.marks); err != nil {
		return d, fmt.Errorf("wait for the last transaction: %w\nagent b: %s", err, b.p.Sites[1].Log())
	}
	d.wall = time.Since(start)
	if b.verbose {
		printCPU("source", src.PID())
		printCPU("target", dst.PID())
	}
	d.source, d.target = treeCPU(src.PID())-s0, treeCPU(dst.PID())-t0
	if kind != native {
		d.agents = -a0
		for _, s := range b.p.Sites {
			cpu := treeCPU(s.AgentPID())
			d.agents += cpu
			if b.verbose {
				fmt.Printf("    agent %s %5.2f s\n", s.Name, cpu)
			}
		}
	} else if err := dst.Exec(ctx, native, "ALTER SUBSCRIPTION native DISABLE"); err != nil {
		return d, err
	}
	return d, b.checkEqual(ctx, kind)
}

// awaitMark waits until a marker row is visible. One session asks, so that the question costs next to nothing.
func awaitMark(ctx context.Context, dsn string, mark int) error {
	c, err := pgconn.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	for {
		rows, err := pg.Rows(ctx, c, fmt.Sprintf("SELECT 1 FROM mark WHERE id = %d", mark))
		if err != nil || len(rows) > 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (b *bench) clusters(kind string) []*pgcluster.Cluster {
	if kind == native {
		return b.native
	}
	return []*pgcluster.Cluster{b.p.Sites[0].Cluster, b.p.Sites[1].Cluster}
}

// checkEqual compares the pgbench tables by content.
func (b *bench) checkEqual(ctx context.Context, kind string) error {
	for _, t := range []string{"pgbench_accounts", "pgbench_tellers", "pgbench_branches", "pgbench_history"} {
		sql := "SELECT md5(string_agg(r, ',' ORDER BY r)) FROM (SELECT md5(t::text) AS r FROM " + t + " t) x"
		var sums [2]string
		for i, c := range b.clusters(kind) {
			rows, err := c.QueryText(ctx, database(kind), sql)
			if err != nil {
				return err
			}
			sums[i] = rows[0][0]
		}
		if sums[0] != sums[1] {
			return fmt.Errorf("table %s differs between the sites after the drain", t)
		}
	}
	return nil
}

func (b *bench) report(results map[string][]drain) error {
	median := func(kind string, f func(drain) float64) float64 {
		ds := results[kind]
		v := make([]float64, len(ds))
		for i, d := range ds {
			v[i] = f(d)
		}
		slices.SortFunc(v, cmp.Compare)
		return v[len(v)/2]
	}
	fmt.Printf("\nmedians of %d runs, contents compared equal after each\n\n", b.runs)
	fmt.Println("| | drain s | tx/s | target CPU s | source CPU s | agents CPU s | total CPU s |")
	fmt.Println("| --- | --- | --- | --- | --- | --- | --- |")
	for _, kind := range kinds {
		wall := median(kind, func(d drain) float64 { return d.wall.Seconds() })
		t, s, a := median(kind, func(d drain) float64 { return d.target }), median(kind, func(d drain) float64 { return d.source }), median(kind, func(d drain) float64 { return d.agents })
		fmt.Printf("| %s | %.2f | %.0f | %.1f | %.1f | %.1f | %.1f |\n", names[kind], wall, float64(b.txns)/wall, t, s, a, t+s+a)
	}
	for _, kind := range kinds[1:] {
		var ratios []float64
		for i := range results[native] {
			ratios = append(ratios, results[native][i].wall.Seconds()/results[kind][i].wall.Seconds())
		}
		slices.Sort(ratios)
		fmt.Printf("\n%s, against native run by run: median %.2fx (%.2f .. %.2f)\n", names[kind], ratios[len(ratios)/2], ratios[0], ratios[len(ratios)-1])
	}
	return nil
}

// stopAgents ends the agents that a kind wants down, and sees that the others run.
func (b *bench) stopAgents(kind string) error {
	for _, s := range b.p.Sites {
		if err := s.SignalAgent(syscall.SIGTERM); err != nil {
			return err
		}
	}
	if kind == returned {
		return b.p.Sites[0].StartAgent()
	}
	return nil
}

// awaitDecoded waits until the source's agent has journalled everything.
func (b *bench) awaitDecoded(ctx context.Context) error {
	src := b.p.Sites[0]
	rows, err := src.Cluster.QueryText(ctx, duri, "SELECT pg_logical_emit_message(true, 'duri.mark', '')")
	if err != nil {
		return err
	}
	lsn, err := wal.ParseLSN(rows[0][0])
	if err != nil {
		return err
	}
	return b.p.Wait(ctx, "the source's agent has decoded the load", func(ctx context.Context) (bool, error) {
		d, err := src.Status(ctx)
		return err == nil && d.Local.Position > lsn, err
	})
}

// treeCPU is the CPU time, in seconds, of a process, its children and the children it has waited for.
func treeCPU(pid int) float64 {
	const ticks = 100 // USER_HZ on Linux
	total := 0.0
	var walk func(pid int)
	walk = func(pid int) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return
		}
		f := strings.Fields(string(b)[strings.LastIndexByte(string(b), ')')+1:])
		for _, i := range []int{11, 12, 13, 14} { // utime, stime, cutime, cstime
			n, _ := strconv.ParseFloat(f[i], 64)
			total += n / ticks
		}
		kids, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		for k := range strings.FieldsSeq(string(kids)) {
			if n, err := strconv.Atoi(k); err == nil {
				walk(n)
			}
		}
	}
	walk(pid)
	return total
}

// printCPU lists the live processes of a server with the CPU time each has used since it began.
func printCPU(name string, pid int) {
	kids, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	for k := range strings.FieldsSeq(string(kids)) {
		n, _ := strconv.Atoi(k)
		if cpu := treeCPU(n); cpu > 0.1 {
			cmd, _ := os.ReadFile("/proc/" + k + "/cmdline")
			fmt.Printf("    %s %6.2f s  %s\n", name, cpu, strings.TrimRight(string(cmd), "\x00 "))
		}
	}
}

// timeline prints how far each stage has come, every half second, until ctx ends.
func (b *bench) timeline(ctx context.Context, start time.Time) {
	for ctx.Err() == nil {
		time.Sleep(500 * time.Millisecond)
		a, err1 := b.p.Sites[0].Status(ctx)
		t, err2 := b.p.Sites[1].Status(ctx)
		if err1 != nil || err2 != nil || len(t.Links) == 0 {
			continue
		}
		l := t.Links[0]
		fmt.Printf("    %5.2f s: decoded %s (%d), received %s, applied %s (%d), target's own stream %s, retries %d %s\n", time.Since(start).Seconds(),
			a.Journal.End, a.Journal.Transactions, l.Received.End, l.Apply.Applied, l.Apply.Transactions, t.Local.Position, l.Apply.Retries, l.Apply.LastError)
	}
}
