// Package cut is the cutter: between the gateway and the server stands a relay that counts the protocol's messages, and cuts at
// each of them in turn, in each way in which a connection may end; clients in front of the gateway do what a corpus of scripts
// says. A case is one script, one message and one kind of cut. What a client sees must be what PostgreSQL itself does (the
// oracle asks it), or an error of the gateway's contract; and a ledger shows that what was reported happened once, what was
// denied never, and the rest at most once. Nothing may be left behind at the server.
//
// It says nothing about a site that is lost with its data; that is what package kills and the form of the cutter with two
// sites are for.
package cut

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/duri-io/duri/internal/pgcluster"
)

// Options of a run.
type Options struct {
	// Cluster is a running, empty one; nil: one is made, and removed at the end.
	Cluster *pgcluster.Cluster
	Seed    uint64
	Cases   int    // how many cases to choose by the seed; 0: all
	Only    string // the name of a case to run, or of a script, instead of all
	Workers int    // default 4
	// Sites lets the gateway ask what became of transactions; without, each loss may end a session.
	Sites bool
	// Lie makes the answers of the sites wrong, and Double makes the relay repeat messages in the place of cuts: the run must
	// then fail.
	Lie    Lie
	Double bool
	Out    io.Writer
	Report int // how many violations are printed with everything that passed; default 3
}

// Case is one cut of one script.
type Case struct {
	Script  string
	Routing Routing
	Dir     Direction
	K       int // of the message, from 1
	Kind    Kind
}

// String is the name by which the case is run again.
func (c Case) String() string {
	return fmt.Sprintf("%s/%s/%s/%d/%s", c.Script, c.Routing, c.Dir, c.K, c.Kind)
}

// ParseCase reads what String gives.
func ParseCase(name string) (c Case, err error) {
	p := strings.Split(name, "/")
	if len(p) == 5 {
		c = Case{Script: p[0], Routing: Routing(p[1]), Kind: Kind(p[4])}
		if p[2] == ToClient.String() {
			c.Dir = ToClient
		}
		c.K, err = strconv.Atoi(p[3])
	}
	if len(p) != 5 || err != nil || p[2] != c.Dir.String() {
		return c, fmt.Errorf("%q is not the name of a case, such as write-simple/sticky/to-client/3/lost", name)
	}
	return c, nil
}

// Finding is a case that went wrong.
type Finding struct {
	Case   Case
	Wrong  []string
	Trace  []string
	Number string // of the client
}

// Result of a run.
type Result struct {
	Seed     uint64
	Cases    int
	Missed   int // cases whose message did not come: they went as uncut
	Took     time.Duration
	Table    map[string]map[string]int // script, outcome: cases
	Findings []Finding
}

// Failed reports whether something was wrong.
func (r *Result) Failed() bool { return len(r.Findings) > 0 }

// caseMax bounds one case, on a busy machine.
const caseMax = 30 * time.Second

// Run runs the cases. An error says that it could not go on.
func Run(ctx context.Context, o Options) (res *Result, err error) {
	if o.Workers == 0 {
		o.Workers = 4
	}
	if o.Out == nil {
		o.Out = io.Discard
	}
	if o.Report == 0 {
		o.Report = 3
	}
	if o.Cluster == nil {
		if o.Cluster, err = pgcluster.Create(ctx, pgcluster.Options{Settings: settings}); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, o.Cluster.Destroy()) }()
		if err := o.Cluster.Start(ctx); err != nil {
			return nil, err
		}
	}
	p, err := furnish(ctx, o.Cluster)
	if err != nil {
		return nil, err
	}
	r := &run{o: o, oracle: newOracle(p), scripts: map[string]*script{}, res: &Result{Seed: o.Seed, Table: map[string]map[string]int{}}}
	for _, s := range corpus() {
		r.scripts[s.name] = s
	}
	for i := range o.Workers {
		b, err := p.newBench(ctx, fmt.Sprintf("cutter-%d", i), o.Lie, o.Sites)
		if err != nil {
			return nil, errors.Join(err, r.close())
		}
		r.benches = append(r.benches, b)
	}
	began := time.Now()
	err = r.all(ctx)
	r.res.Took = time.Since(began)
	return r.res, errors.Join(err, r.close())
}

// run is a run under way.
type run struct {
	o       Options
	oracle  *oracle
	scripts map[string]*script
	benches []*bench

	mu  sync.Mutex // guards res
	res *Result
}

func (r *run) close() error {
	var errs []error
	for _, b := range r.benches {
		errs = append(errs, b.stop())
	}
	return errors.Join(errs...)
}

func (r *run) all(ctx context.Context) error {
	if strings.Contains(r.o.Only, "/") {
		c, err := ParseCase(r.o.Only)
		if err != nil {
			return err
		}
		if r.scripts[c.Script] == nil {
			return fmt.Errorf("there is no script %q", c.Script)
		}
		return r.each(ctx, []Case{c}, r.one)
	}
	var whole []Case
	for _, name := range sorted(r.scripts) {
		if r.o.Only == "" || r.o.Only == name {
			for _, how := range []Routing{Sticky, Alternate} {
				whole = append(whole, Case{Script: name, Routing: how, Kind: None})
			}
		}
	}
	if len(whole) == 0 {
		return fmt.Errorf("there is no script %q; there are %s", r.o.Only, strings.Join(sorted(r.scripts), ", "))
	}
	var mu sync.Mutex
	var cases []Case
	err := r.each(ctx, whole, func(ctx context.Context, b *bench, c Case) error {
		counts, err := r.whole(ctx, b, c)
		mu.Lock()
		defer mu.Unlock()
		cases = append(cases, r.cuts(c, counts)...)
		return err
	})
	if err != nil {
		return err
	}
	slices.SortFunc(cases, func(a, b Case) int { return strings.Compare(a.String(), b.String()) })
	rng := rand.New(rand.NewPCG(r.o.Seed, 0))
	rng.Shuffle(len(cases), func(i, j int) { cases[i], cases[j] = cases[j], cases[i] })
	fmt.Fprintf(r.o.Out, "%d scripts, %d cases", len(whole)/2, len(cases))
	if r.o.Cases > 0 && r.o.Cases < len(cases) {
		cases = cases[:r.o.Cases]
		fmt.Fprintf(r.o.Out, ", of which %d are run", len(cases))
	}
	fmt.Fprintln(r.o.Out)
	return r.each(ctx, cases, r.one)
}

// cuts are the cases of a script.
func (r *run) cuts(c Case, counts [2]int) (cases []Case) {
	for dir, n := range counts {
		for _, k := range places(n, r.scripts[c.Script].most) {
			for _, kind := range kinds[dir] {
				if r.o.Double {
					kind = Double
				}
				cases = append(cases, Case{c.Script, c.Routing, Direction(dir), k, kind})
				if r.o.Double {
					break
				}
			}
		}
	}
	return cases
}

// places chooses at which of n messages to cut: all, or the first and the last ones and some between.
func places(n, most int) (ks []int) {
	for k := 1; k <= n; k++ {
		if most == 0 || n <= most || k <= most/2 || k > n-most/4 || k%(max(1, 4*n/most)) == 0 {
			ks = append(ks, k)
		}
	}
	return ks
}

// each runs cases on all benches.
func (r *run) each(ctx context.Context, cases []Case, f func(ctx context.Context, b *bench, c Case) error) error {
	next := make(chan Case)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, b := range r.benches {
		wg.Go(func() {
			for c := range next {
				one, done := context.WithTimeout(ctx, caseMax)
				if err := f(one, b, c); err != nil {
					cancel(fmt.Errorf("case %s: %w", c, err))
				}
				done()
			}
		})
	}
	for _, c := range cases {
		select {
		case next <- c:
		case <-ctx.Done():
		}
	}
	close(next)
	wg.Wait()
	return context.Cause(ctx)
}

// whole runs a script uncut, which must go as at PostgreSQL itself, and counts its messages.
func (r *run) whole(ctx context.Context, b *bench, c Case) (counts [2]int, err error) {
	// How many messages there are up to the first segment of the tail: then what the gateway does after the last transaction
	// is over as well.
	s := r.scripts[c.Script]
	b.router.next(c.Routing)
	b.wire.begin(plan{kind: None})
	number := b.p.number()
	if err := b.seed(ctx, number); err != nil {
		return counts, err
	}
	cl, err := connect(ctx, b.addr, b.p.keys, b.name)
	if err != nil {
		return counts, err
	}
	t := &transcript{}
	err = cl.run(t, append(slices.Clone(s.bursts), tail[0]), number)
	counts = b.wire.count()
	cl.close()
	b.wire.release()
	if err != nil {
		return counts, err
	}
	return counts, r.one(ctx, b, c)
}

// one runs a case and judges it.
func (r *run) one(ctx context.Context, b *bench, c Case) error {
	s := r.scripts[c.Script]
	base, err := r.oracle.expect(ctx, b, s, variant{})
	if err != nil {
		return err
	}
	b.router.next(c.Routing)
	number := b.p.number()
	if err := b.seed(ctx, number); err != nil {
		return err
	}
	cl, err := connect(ctx, b.addr, b.p.keys, b.name)
	if err != nil {
		return err
	}
	o := seen{transcript: &transcript{}}
	b.wire.begin(plan{c.Dir, c.K, c.Kind})
	err = cl.run(o.transcript, s.all(), number)
	struck, pids := b.wire.hit()
	var wrong []string
	if err == nil && r.o.Sites { // before the relay lets go: the gateway must have seen to it
		wrong, err = b.behind(ctx, pids, false)
	}
	cl.close()
	b.wire.release()
	if err == nil {
		var more []string
		more, err = b.behind(ctx, pids, true)
		wrong = append(wrong, more...)
	}
	if err == nil {
		o.ledger, err = b.ledger(ctx, number)
	}
	if err == nil {
		_, err = b.forget(ctx, number)
	}
	if err != nil {
		return err
	}
	v, err := r.judge(ctx, b, s, base, o)
	if err != nil {
		return err
	}
	if v.wrong = append(v.wrong, wrong...); len(v.wrong) > 0 {
		v.outcome = other
	}
	r.record(c, struck, v, number, b.wire.history())
	return nil
}

// behind is what is left at the server.
func (b *bench) behind(ctx context.Context, pids []uint32, gone bool) ([]string, error) {
	left, err := b.left(ctx, pids, gone)
	if err != nil || left == "" {
		return nil, err
	}
	return []string{"left at the server (process, state, statement): " + left}, nil
}

// judge asks the oracle for what fits best.
func (r *run) judge(ctx context.Context, b *bench, s *script, base *expectation, o seen) (best verdict, err error) {
	c := contract{sites: r.o.Sites}
	fails := o.failures(base)
	if len(fails) == 0 {
		return judge(c, s, base, base, o), nil
	}
	for i, keep := range []bool{false, true} {
		exp, err := r.oracle.expect(ctx, b, s, variant{fails, keep})
		if err != nil {
			return best, err
		}
		v := judge(c, s, base, exp, o)
		if i == 0 || len(v.wrong) < len(best.wrong) {
			best = v
		}
	}
	return best, nil
}

// record counts a case, and keeps what is needed to understand one that went wrong.
func (r *run) record(c Case, struck bool, v verdict, number string, trace []event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.res.Cases++
	if !struck && c.Kind != None {
		r.res.Missed++
	}
	if r.res.Table[c.Script] == nil {
		r.res.Table[c.Script] = map[string]int{}
	}
	r.res.Table[c.Script][v.outcome]++
	if len(v.wrong) == 0 {
		return
	}
	f := Finding{Case: c, Wrong: v.wrong, Number: number}
	for _, e := range trace {
		f.Trace = append(f.Trace, e.String())
	}
	r.res.Findings = append(r.res.Findings, f)
	if len(r.res.Findings) <= r.o.Report {
		fmt.Fprint(r.o.Out, f.String(r.o.Sites))
	}
}

// String is the finding with all that passed, and how to see it again.
func (f Finding) String(sites bool) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\nVIOLATION: %s (client %s)\n", f.Case, f.Number)
	for _, w := range f.Wrong {
		fmt.Fprintf(&b, "    %s\n", w)
	}
	for _, t := range f.Trace {
		fmt.Fprintf(&b, "  %s\n", t)
	}
	more := ""
	if !sites {
		more = " -ask=false"
	}
	fmt.Fprintf(&b, "again: make prove CASE=cutter ARGS='-case %s%s'\n", f.Case, more)
	return b.String()
}

// Report is the result as a table.
func (r *Result) Report() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %d cases in %s, %d violations; in %d cases the message did not come\n\n", r.Seed, r.Cases, r.Took.Round(time.Second), len(r.Findings), r.Missed)
	fmt.Fprintf(&b, "| script | cases | %s |\n|---%s|\n", strings.Join(outcomes, " | "), strings.Repeat("|---", len(outcomes)+1))
	sums := map[string]int{}
	for _, name := range append(sorted(r.Table), "all") {
		row := r.Table[name]
		if name == "all" {
			row = sums
		}
		cases := 0
		cells := ""
		for _, o := range outcomes {
			cases += row[o]
			cells += fmt.Sprintf(" %d |", row[o])
			if name != "all" {
				sums[o] += row[o]
			}
		}
		fmt.Fprintf(&b, "| %s | %d |%s\n", name, cases, cells)
	}
	return b.String()
}
