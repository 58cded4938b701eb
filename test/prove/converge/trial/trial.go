// Package trial runs the randomized convergence test: real PostgreSQL servers with real agents as processes, random
// transactions at all sites on few keys, random faults, clocks that are wrong and step, all from one seed; and then an
// oracle that is independent of apply.
//
// The oracle knows what was committed from two sides: what the clients saw of their own transactions (the ledger), and
// the sites' own journals. Both must agree change by change. From them it computes what each table must hold at every
// site, which transaction each row must come from, and which conflicts must be on record, and compares.
//
// A run is described by a Script, which is a function of the seed; faults happen when so many row changes are committed.
// The timing of clients and agents is not controlled, so that a seed that failed once need not fail each time.
package trial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pgcluster"
)

// Options of a run.
type Options struct {
	Script Script
	// Binary is the agent's program; see Build.
	Binary string
	// Clusters are the caller's running ones, one a site; nil: they are made.
	Clusters []*pgcluster.Cluster
	// Wait is how long the sites may take to become equal after the load; default two minutes.
	Wait time.Duration
	// Stall ends a run in which nothing was committed for so long; default two minutes.
	Stall time.Duration
	// Aside lets apply set aside the changes of rows that clients keep locked, as it does by default. A site then says to
	// have seen less than it has, so that journals do not tell what was truly concurrent: rows are judged, records are
	// not. Without it apply waits for locks.
	Aside bool
	// Keep leaves everything on disk when the run fails; Result.Dir says where.
	Keep bool
	Out  io.Writer // progress and findings; nil: nowhere
}

// Settings are those of PostgreSQL servers that Options.Clusters may be made with: each client session has a replication
// origin of its own. A killed server loses nothing without fsync, as the operating system keeps what was written.
func Settings() map[string]string {
	return map[string]string{
		"max_replication_slots": "60", "max_connections": "120", "fsync": "off", "full_page_writes": "off", "shared_buffers": "64MB",
		"jit": "off", "max_wal_size": "1GB", "dynamic_shared_memory_type": "mmap", "deadlock_timeout": "300ms",
	}
}

// Result is what a run found.
type Result struct {
	Script      Script
	Changes     int            // row changes that were committed and acknowledged
	Commits     int            // transactions, all in the journals
	InDoubt     int            // of these, not acknowledged: the server was killed meanwhile
	Refused     int            // transactions that PostgreSQL refused (a deadlock, a key that was taken)
	Faults      map[string]int // by kind
	Load        time.Duration  // how long the load took
	CaughtUp    time.Duration  // from its end until the sites had applied everything
	Registers   int            // keys that were ever written
	Rows        int            // rows at each site in the end
	Concurrent  int            // changes that lost against a concurrent one, of which each site's records tell
	Overtaken   int            // of these, recorded as having won against what stood there just before
	Conflicts   int            // conflict records at all sites
	Differences []string       // what is wrong; empty: the run passed
	Unequal     int            // of these, rows that are not what the model says
	Dir         string         // where everything is, when it was kept
}

// Failed reports whether anything was wrong.
func (r *Result) Failed() bool { return len(r.Differences) > 0 }

// database is the replicated one.
const database = "app"

// startMax bounds the start and the joining of the sites on a busy machine.
const startMax = 3 * time.Minute

// run is a run under way.
type run struct {
	o       Options
	s       Script
	p       *pair.Pair
	clocks  []*clock // by site
	ledgers []*ledger
	load    *load
	res     *Result
}

// Run does what the script says and compares. An error says that the run could not be made or judged; what the oracle
// found is in the result.
func Run(ctx context.Context, o Options) (_ *Result, err error) {
	if o.Out == nil {
		o.Out = io.Discard
	}
	if o.Wait == 0 {
		o.Wait = 2 * time.Minute
	}
	if o.Stall == 0 {
		o.Stall = 2 * time.Minute
	}
	if err := o.Script.check(); err != nil {
		return nil, err
	}
	r := &run{o: o, s: o.Script, res: &Result{Script: o.Script, Faults: map[string]int{}}}
	if err := r.start(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.close(err != nil || r.res.Failed())) }()
	if err := r.drive(ctx); err != nil {
		return r.res, err
	}
	return r.res, r.judge(ctx)
}

// names are the sites'.
func names(n int) []string { return strings.Split("abcdefgh"[:n], "")[:n] }

func (r *run) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startMax)
	defer cancel()
	var err error
	r.p, err = pair.Start(ctx, pair.Options{
		Binary: r.o.Binary, Database: database, Names: names(r.s.Sites), Clusters: r.o.Clusters, Settings: Settings(), Relays: true, Held: true,
		Seed:   func(ctx context.Context, a *pair.Site) error { return a.Cluster.Exec(ctx, a.Database, schemaSQL()) },
		Config: func(_, text string) string { return siteConfig(text, r.o.Aside) },
	})
	if err != nil {
		return err
	}
	for _, s := range r.p.Sites {
		c, err := newClock(filepath.Join(filepath.Dir(s.ConfigFile), OffsetFile))
		if err != nil {
			return errors.Join(err, r.p.Close())
		}
		r.clocks, r.ledgers = append(r.clocks, c), append(r.ledgers, newLedger())
	}
	if err = r.p.StartAgents(); err == nil {
		err = r.p.WaitReady(ctx)
	}
	if err != nil {
		return errors.Join(err, r.p.Close())
	}
	return nil
}

// siteConfig keeps the journals for the oracle.
func siteConfig(text string, aside bool) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	lines = append(lines, "journal: {keep: 7d, budget: 200GiB}")
	if !aside {
		lines = append(lines, "apply: {lock_timeout: 5s}")
	}
	return strings.Join(lines, "\n") + "\n"
}

// close ends everything; with failed and Options.Keep the files stay.
func (r *run) close(failed bool) error {
	if !failed || !r.o.Keep || r.o.Clusters != nil {
		return r.p.Close()
	}
	r.res.Dir = filepath.Dir(filepath.Dir(filepath.Dir(r.p.Sites[0].ConfigFile)))
	var errs []error
	for _, s := range r.p.Sites {
		errs = append(errs, s.SignalAgent(killSignal), s.Cluster.Stop(context.Background(), "fast"))
	}
	fmt.Fprintf(r.o.Out, "kept: %s (per site: data directory of PostgreSQL; below cluster: configuration, journals, logs)\n", r.res.Dir)
	return errors.Join(errs...)
}

// Build compiles the agent into dir and returns its path; a mutant has rules broken on purpose. It must be called
// within the module.
func Build(ctx context.Context, dir string, m *Mutant) (string, error) {
	root, err := moduleRoot(ctx)
	if err != nil {
		return "", err
	}
	out := filepath.Join(dir, "agent")
	args := []string{"build", "-o", out}
	if m != nil {
		overlay, err := m.overlay(root, dir)
		if err != nil {
			return "", err
		}
		out = filepath.Join(dir, "agent-"+m.Name)
		args = []string{"build", "-overlay", overlay, "-o", out}
	}
	cmd := command(ctx, root, "go", append(args, "./test/prove/converge")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the agent: %w: %s", err, b)
	}
	return out, nil
}
