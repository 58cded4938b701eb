// Command converge runs the randomized convergence test of package trial. Run it by
//
//	make prove CASE=converge OPS=1000000 SITES=3
//
// with further options in ARGS; -seed repeats a run, -script one that -shrink has found, -mutants shows that broken rules
// are noticed. Called as `agent -c FILE` it is the agent of one of the sites.
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
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/test/prove/converge/trial"
)

// proof is what the flags ask for.
type proof struct {
	aside           bool
	seed            uint64
	sizes           trial.Sizes
	script, mutate  string
	without         string
	mutants, shrink bool
	shrinkRuns      int
	wait            time.Duration
	dir             string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) > 1 && os.Args[1] == "agent" {
		exit(trial.Agent(ctx, os.Args[2:]))
	}
	p := &proof{}
	flag.Uint64Var(&p.seed, "seed", rand.Uint64N(1<<32), "seed of everything that is random")
	flag.IntVar(&p.sizes.Ops, "ops", 100_000, "row changes to commit")
	flag.IntVar(&p.sizes.Sites, "sites", 3, "sites, 2 to 4")
	flag.IntVar(&p.sizes.Keys, "keys", 400, "keys of each table with a key")
	flag.IntVar(&p.sizes.Sessions, "sessions", 4, "client sessions at each site")
	flag.IntVar(&p.sizes.Rate, "rate", 1500, "most row changes a second, so that sites also see each other's; 0: what the clients can do")
	flag.IntVar(&p.sizes.Faults, "faults", -1, "faults; -1: one for each 8000 row changes")
	flag.DurationVar(&p.sizes.Skew, "skew", 5*time.Second, "greatest offset of a site's clock, in both directions")
	flag.StringVar(&p.script, "script", "", "file with a script to run instead, as -shrink prints it")
	flag.StringVar(&p.without, "without", "", "kinds of statements to leave out, of "+strings.Join(trial.Atoms(), ","))
	flag.BoolVar(&p.shrink, "shrink", false, "when the run fails, look for a shorter script that does")
	flag.IntVar(&p.shrinkRuns, "shrink-runs", 24, "most runs for -shrink")
	flag.StringVar(&p.mutate, "mutate", "", "break this rule; the run must then fail")
	flag.BoolVar(&p.mutants, "mutants", false, "break each rule in turn, and print the table")
	flag.DurationVar(&p.wait, "wait", 3*time.Minute, "how long the sites may take to become equal after the load")
	flag.BoolVar(&p.aside, "aside", false, "let apply set aside what clients keep locked; rows are judged then, and conflict records are not")
	flag.Parse()
	if p.sizes.Faults < 0 {
		p.sizes.Faults = max(3, p.sizes.Ops/8000)
	}
	exit(p.run(ctx))
}

// errDiffer says that the oracle found something; what, is printed.
var errDiffer = errors.New("the sites did not do what they must")

func exit(err error) {
	if err == nil {
		os.Exit(0)
	}
	fmt.Fprintln(os.Stderr, "prove converge:", err)
	if hint := pgcluster.HintOf(err); hint != "" {
		fmt.Fprintln(os.Stderr, "hint:", hint)
	}
	os.Exit(1)
}

func (p *proof) run(ctx context.Context) (err error) {
	if p.dir, err = os.MkdirTemp("", "duri-prove-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(p.dir)) }()
	s, err := p.theScript()
	if err != nil {
		return err
	}
	switch {
	case p.mutants:
		return p.table(ctx, s)
	case p.mutate != "":
		m, err := trial.MutantNamed(p.mutate)
		if err != nil {
			return err
		}
		_, err = p.broken(ctx, s, m)
		return err
	}
	binary, err := trial.Build(ctx, p.dir, nil)
	if err != nil {
		return err
	}
	r, err := p.one(ctx, binary, s, true)
	if err != nil {
		return err
	}
	fmt.Print("\n", r.Report(), "\n", trial.TableHead, r.Row())
	if !r.Failed() {
		return nil
	}
	if p.shrink {
		p.shorter(ctx, binary, s)
	}
	return fmt.Errorf("seed %d: %w", s.Seed, errDiffer)
}

func (p *proof) theScript() (trial.Script, error) {
	if p.script == "" {
		s := trial.NewScript(p.seed, p.sizes)
		s.Atoms = slices.DeleteFunc(s.Atoms, func(a string) bool { return slices.Contains(strings.Split(p.without, ","), a) })
		return s, nil
	}
	b, err := os.ReadFile(filepath.Clean(p.script))
	if err != nil {
		return trial.Script{}, err
	}
	return trial.ParseScript(b)
}

func (p *proof) one(ctx context.Context, binary string, s trial.Script, keep bool) (*trial.Result, error) {
	fmt.Printf("seed %d: %d row changes on %d keys a table, %d sites, %d sessions each, %d faults, clocks %v ms\n", s.Seed, s.Ops, s.Keys, s.Sites, s.Sessions,
		len(s.Faults), s.Clocks)
	r, err := trial.Run(ctx, trial.Options{Script: s, Binary: binary, Wait: p.wait, Aside: p.aside, Keep: keep, Out: os.Stdout})
	if err != nil {
		return nil, fmt.Errorf("seed %d: %w", s.Seed, err)
	}
	return r, nil
}

// shorter prints the shortest script that still fails.
func (p *proof) shorter(ctx context.Context, binary string, s trial.Script) {
	const tries = 2 // a failure need not come each time
	short := trial.Shrink(s, p.shrinkRuns, func(c trial.Script) bool {
		for range tries {
			r, err := p.one(ctx, binary, c, false)
			if err == nil && r.Failed() {
				return true
			}
		}
		return false
	})
	fmt.Printf("\nthe shortest script that failed:\n%s\n", short.JSON())
	for _, f := range short.Faults {
		fmt.Println(" ", f)
	}
}

// broken runs a mutant, which must fail.
func (p *proof) broken(ctx context.Context, s trial.Script, m *trial.Mutant) (*trial.Result, error) {
	fmt.Printf("\nmutant %s: %s\n", m.Name, m.Rule)
	binary, err := trial.Build(ctx, p.dir, m)
	if err != nil {
		return nil, err
	}
	r, err := p.one(ctx, binary, s, false)
	if err != nil {
		return nil, err
	}
	fmt.Print(r.Report())
	if !r.Failed() {
		return r, fmt.Errorf("mutant %s was not noticed in %d row changes (seed %d)", m.Name, r.Changes, s.Seed)
	}
	return r, nil
}

// table runs every mutant and prints what the test said.
func (p *proof) table(ctx context.Context, s trial.Script) error {
	var errs []error
	var rows strings.Builder
	for _, m := range trial.Mutants() {
		r, err := p.broken(ctx, s, &m)
		errs = append(errs, err)
		if ctx.Err() != nil {
			return err
		}
		if r == nil {
			continue // it could not be run
		}
		fmt.Fprintf(&rows, "| `%s` | %s | %d | %d | %d |\n", m.Name, m.Rule, r.Changes, r.Unequal, len(r.Differences)-r.Unequal)
	}
	fmt.Print("\n| mutant | what is broken | row changes | rows that differ | other differences |\n|---|---|---|---|---|\n", rows.String())
	return errors.Join(errs...)
}
