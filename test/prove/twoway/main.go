// Command twoway runs the test of package twoway for duri, PostgreSQL's own logical replication and pglogical, and prints
// the tables of docs/reliability.md. Run it by `make prove CASE=twoway`; the options go into ARGS.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/test/twoway"
)

// proof is what the flags ask for.
type proof struct {
	o              twoway.Options
	systems, loads string
	cut, healMax   time.Duration
}

func main() {
	p := proof{o: twoway.Options{Out: os.Stdout}}
	flag.StringVar(&p.systems, "systems", strings.Join(twoway.Systems(), ","), "what to run, in this order")
	flag.StringVar(&p.loads, "loads", strings.Join(twoway.Loads(), ","), "loads to run")
	flag.DurationVar(&p.o.Length, "time", 20*time.Second, "length of each load")
	flag.BoolVar(&p.o.Delta, "delta", false, "declare the balances of tpcb as delta columns, for duri")
	flag.IntVar(&p.o.Clients, "clients", 4, "clients at each site")
	flag.IntVar(&p.o.Keys, "keys", 2000, "keys of the upserts and deletes")
	flag.IntVar(&p.o.Scale, "scale", 1, "pgbench scale")
	flag.DurationVar(&p.o.RoundTrip, "rtt", 20*time.Millisecond, "round trip between the sites")
	flag.Float64Var(&p.o.Rate, "rate", 0, "most transactions a second at each site; 0: what the clients can do")
	flag.DurationVar(&p.cut, "cut", 5*time.Second, "how long the link is cut, in a second run in the middle and in a third at the end of the load; 0: neither run")
	flag.BoolVar(&p.o.Reset, "reset", false, "the cut also ends the connections and refuses new ones")
	flag.DurationVar(&p.healMax, "heal-max", 2*time.Second, "duri must have caught up so soon after healing, without further load")
	flag.DurationVar(&p.o.Wait, "wait", 100*time.Second, "how long to wait for a system to catch up")
	flag.BoolVar(&p.o.Fsync, "fsync", false, "run the servers with fsync")
	flag.Uint64Var(&p.o.Seed, "seed", rand.Uint64N(1<<32), "seed of the clients")
	flag.StringVar(&p.o.Evidence, "evidence", "", "empty folder for the journals, should duri's sites differ")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := p.run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "prove twoway: FAILED (seed %d): %v\n", p.o.Seed, err)
		if hint := pgcluster.HintOf(err); hint != "" {
			fmt.Fprintf(os.Stderr, "hint: %s\n", hint)
		}
		os.Exit(1)
	}
}

func (p *proof) run(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "duri-prove-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if p.o.Binary, err = pair.Build(ctx, dir); err != nil {
		return err
	}
	if err := p.introduce(ctx); err != nil {
		return err
	}
	var results []twoway.Result
	var broken []error
	absent := map[string]bool{}
	for load := range strings.SplitSeq(p.loads, ",") {
		for system := range strings.SplitSeq(p.systems, ",") {
			some, err := p.all(ctx, load, system)
			if errors.Is(err, twoway.ErrNotInstalled) {
				absent[system] = true
			} else if err != nil {
				return err
			}
			results = append(results, some...)
		}
	}
	for _, r := range results {
		if r.System == twoway.Duri {
			broken = append(broken, twoway.Judge(r, p.healMax))
		}
	}
	p.print(results, absent)
	return errors.Join(broken...)
}

// all are the runs of one system under one load.
func (p *proof) all(ctx context.Context, load, system string) ([]twoway.Result, error) {
	var results []twoway.Result
	for _, o := range p.runs() {
		r, err := one(ctx, o, load, system)
		if err != nil {
			return results, err
		}
		results = append(results, r)
	}
	return results, nil
}

// runs are those of each system and load: undisturbed, with the link cut in the middle, and at the end.
func (p *proof) runs() []twoway.Options {
	all := []twoway.Options{p.o}
	if p.cut <= 0 {
		return all
	}
	for _, last := range []bool{false, true} {
		o := p.o
		o.Cut, o.Last = p.cut, last
		all = append(all, o)
	}
	return all
}

func one(ctx context.Context, o twoway.Options, load, system string) (twoway.Result, error) {
	if o.Evidence != "" {
		o.Evidence = filepath.Join(o.Evidence, fmt.Sprintf("%s-%s-%v", load, o.Cut, o.Last))
	}
	fmt.Printf("%s, %s, %s\n", system, load, twoway.Result{Cut: o.Cut, Last: o.Last}.Link())
	r, err := twoway.Run(ctx, o, system, load)
	if err != nil {
		fmt.Printf("  %v\n", err)
	}
	return r, err
}

func (p *proof) introduce(ctx context.Context) error {
	bin, err := pgcluster.FindBinDir("")
	if err != nil {
		return err
	}
	version, err := pgcluster.ProgramVersion(ctx, bin)
	if err != nil {
		return err
	}
	fmt.Printf("PostgreSQL %s, %d CPUs for everything; %d clients at each site for %s, round trip %s, fsync %v, seed %d\n",
		version, runtime.NumCPU(), p.o.Clients, p.o.Length, p.o.RoundTrip, p.o.Fsync, p.o.Seed)
	return nil
}

func (p *proof) print(results []twoway.Result, absent map[string]bool) {
	for load := range strings.SplitSeq(p.loads, ",") {
		fmt.Printf("\n%s\n\n%s", load, twoway.Table(load, results))
		for system := range strings.SplitSeq(p.systems, ",") {
			if absent[system] {
				fmt.Printf("| %s | not installed |\n", system)
			}
		}
	}
	for _, r := range results {
		if r.Stalled != "" {
			fmt.Printf("\n%s, %s, %s: stalled: %s\n", r.System, r.Load, r.Link(), r.Stalled)
		}
		if r.Verify != "" {
			fmt.Printf("\n%s, %s, %s: duri verify says %s\n", r.System, r.Load, r.Link(), r.Verify)
		}
	}
}
