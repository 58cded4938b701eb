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
	"sync/atomic"
	"time"

	"github.com/duri-io/duri/internal/pgcluster"
)

// Options of a run.
type Options struct {
	// Cluster is a running, empty one; nil: one is made, and removed at the end.
	Cluster *pgcluster.Cluster
	Seed    uint64
	Cases   int    // how many cases to choose by the seed; 0: all
	Only    string // the names of cases to run, separated by commas, or of a script, instead of all
	Logins  bool   // only cases that cut a login
	// Reads lets reads go to the other site, with Sites.
	Reads   bool
	Workers int // default 4
	// Sites lets the gateway ask what became of transactions; without, each loss may end a session.
	Sites bool
	// Lie makes the answers of the sites wrong, and Double makes the relay repeat messages in the place of cuts: the run must
	// then fail.
	Lie    Lie
	Double bool
	Out    io.Writer
	Until  func(Finding) bool // ends the run at a violation; nil: it goes on
	Report int                // how many violations are printed with everything that passed; default 3
}

// Place is which connection is cut.
type Place string

// The places.
const (
	AtServer Place = "server" // between gateway and server
	AtClient Place = "client" // between client and gateway
	// The same, at messages of logins.
	LoginAtServer Place = "server-login"
	LoginAtClient Place = "client-login"
	LoginByTLS    Place = "client-tls" // at records of TLS
)

// front reports that it is the connection of the client.
func (p Place) front() bool { return p == AtClient || p == LoginAtClient || p == LoginByTLS }

// login reports that it is cut at messages of logins.
func (p Place) login() bool { return p == LoginAtServer || p == LoginAtClient || p == LoginByTLS }

// Case is one cut of one script.
type Case struct {
	Script  string
	Routing Routing
	Place   Place
	Dir     Direction
	K       int // of the message, from 1
	Kind    Kind
}

// String is the name by which the case is run again.
func (c Case) String() string {
	return fmt.Sprintf("%s/%s/%s/%s/%d/%s", c.Script, c.Routing, c.Place, c.Dir, c.K, c.Kind)
}

// ParseCase reads what String gives.
func ParseCase(name string) (c Case, err error) {
	p := strings.Split(name, "/")
	if len(p) == 6 {
		c = Case{Script: p[0], Routing: Routing(p[1]), Place: Place(p[2]), Kind: Kind(p[5])}
		if p[3] == ToClient.String() {
			c.Dir = ToClient
		}
		c.K, err = strconv.Atoi(p[4])
	}
	if err != nil || c.String() != name {
		return c, fmt.Errorf("%q is not the name of a case, such as write-simple/sticky/server/to-client/3/lost", name)
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
	Of       int    // cases that there are
	Away     uint64 // reads at another site than the session's home
	Missed   int    // cases whose message did not come: they went as uncut
	Took     time.Duration
	Table    map[string]map[string]int // script, outcome: cases
	Findings []Finding
}

// Failed reports whether something was wrong.
func (r *Result) Failed() bool { return len(r.Findings) > 0 }

// caseMax bounds one case, and clientMax what its client waits for, on a busy machine.
const caseMax, clientMax = time.Minute, 10 * time.Second

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
	for range o.Workers {
		b, err := p.newBench(ctx, o)
		if err != nil {
			return nil, errors.Join(err, r.close())
		}
		r.benches = append(r.benches, b)
	}
	began := time.Now()
	err = r.all(ctx)
	r.res.Took = time.Since(began)
	for _, b := range r.benches {
		r.res.Away += b.away()
	}
	return r.res, errors.Join(err, r.close())
}

// run is a run under way.
type run struct {
	o       Options
	oracle  *oracle
	scripts map[string]*script
	benches []*bench

	enough atomic.Bool // no further case begins

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
		var cases []Case
		for name := range strings.SplitSeq(r.o.Only, ",") {
			c, err := ParseCase(name)
			if err != nil {
				return err
			}
			if r.scripts[c.Script] == nil {
				return fmt.Errorf("there is no script %q", c.Script)
			}
			cases = append(cases, c)
		}
		return r.each(ctx, cases, r.one)
	}
	var whole []Case
	for _, name := range sorted(r.scripts) {
		if (r.o.Only == "" || r.o.Only == name) && (!r.o.Logins || slices.Contains(inLogins, name)) {
			for _, how := range []Routing{Sticky, Alternate} {
				whole = append(whole, Case{Script: name, Routing: how, Place: AtServer, Kind: None})
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
		var more []Case
		if err == nil {
			more, err = r.logins(ctx, b, c)
		}
		mu.Lock()
		defer mu.Unlock()
		if !r.o.Logins {
			more = append(more, r.cuts(c, counts)...)
		}
		cases = append(cases, more...)
		return err
	})
	if err != nil {
		return err
	}
	slices.SortFunc(cases, func(a, b Case) int { return strings.Compare(a.String(), b.String()) })
	rng := rand.New(rand.NewPCG(r.o.Seed, 0))
	rng.Shuffle(len(cases), func(i, j int) { cases[i], cases[j] = cases[j], cases[i] })
	r.res.Of = len(cases)
	fmt.Fprintf(r.o.Out, "%d scripts, %d cases", len(whole)/2, len(cases))
	if r.o.Cases > 0 && r.o.Cases < len(cases) {
		cases = cases[:r.o.Cases]
		fmt.Fprintf(r.o.Out, ", of which %d are run", len(cases))
	}
	fmt.Fprintln(r.o.Out)
	return r.each(ctx, cases, r.one)
}

// cuts are the cases of a script.
func (r *run) cuts(c Case, counts map[Place][2]int) (cases []Case) {
	most := r.scripts[c.Script].most
	for place, both := range counts {
		for dir, n := range both {
			ways := kinds[dir]
			switch {
			case place == AtClient && (r.o.Double || c.Routing != Alternate):
				continue
			case r.o.Double:
				ways = []Kind{Double}
			case place == AtClient:
				ways = clientKinds[dir]
			}
			for _, k := range places(n, most) {
				for _, kind := range ways {
					cases = append(cases, Case{c.Script, c.Routing, place, Direction(dir), k, kind})
				}
			}
		}
	}
	return cases
}

// places chooses at which of n messages to cut: all, or the first and the last ones and some between.
func places(n, most int) (ks []int) {
	for k := 1; k <= n; k++ {
		if most == 0 || n <= most || k <= most/2 || k > n-most/4 || k%max(1, 4*n/most) == 0 {
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
	for i := range r.benches {
		wg.Go(func() {
			for c := range next {
				if r.enough.Load() {
					continue
				}
				one, done := context.WithTimeout(ctx, caseMax)
				err := f(one, r.benches[i], c)
				done()
				if err == nil && r.benches[i].spoilt {
					err = r.replace(ctx, i)
				}
				if err != nil {
					cancel(fmt.Errorf("case %s: %w", c, err))
				}
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

// replace gives a worker new things in the place of those on which something is left behind.
func (r *run) replace(ctx context.Context, i int) error {
	old := r.benches[i]
	b, err := old.p.newBench(ctx, r.o)
	if err == nil {
		r.benches[i] = b
		r.mu.Lock()
		r.res.Away += old.away()
		r.mu.Unlock()
		if err := old.stop(); err != nil {
			fmt.Fprintln(r.o.Out, "after a violation:", err)
		}
	}
	return err
}

// whole runs a script uncut, which must go as at PostgreSQL itself, and counts its messages.
func (r *run) whole(ctx context.Context, b *bench, c Case) (counts map[Place][2]int, err error) {
	// How many messages there are up to the first segment of the tail: then what the gateway does after the last transaction
	// is over as well.
	s := r.scripts[c.Script]
	number, err := b.begin(ctx, c)
	if err != nil {
		return nil, err
	}
	if s.app != nil {
		if _, err = s.app.use(ctx, b.front.addr(), b.name, number); err != nil {
			return nil, err
		}
	} else {
		cl, err := connect(ctx, b.front.addr(), b.p.keys, b.name)
		if err != nil {
			return nil, err
		}
		err = cl.run(&transcript{}, append(slices.Clone(s.bursts), tail[0]), number)
		cl.close()
		if err != nil {
			return nil, err
		}
	}
	counts = map[Place][2]int{AtServer: b.wire.count(), AtClient: b.front.wire.count()}
	b.release()
	if left, err := b.sessions(ctx); err != nil || left != nil {
		return nil, errors.Join(err, fmt.Errorf("uncut: %s", left))
	}
	return counts, r.one(ctx, b, c)
}

// begin makes a bench ready for a case; it gives the number of the client.
func (b *bench) begin(ctx context.Context, c Case) (number string, err error) {
	none, cut := b.wire, b.front.wire
	if !c.Place.front() {
		none, cut = cut, none
	}
	b.router.next(c.Routing)
	b.front.refuse.Store(false)
	none.begin(plan{kind: None})
	if p := (plan{c.Dir, c.K, c.Kind}); c.Place.login() {
		cut.beginLogin(p, c.Place == LoginByTLS)
	} else {
		cut.begin(p)
	}
	number = b.p.number()
	return number, b.seed(ctx, number)
}

func (b *bench) release() {
	b.front.wire.release()
	b.wire.release()
}

// one runs a case and judges it.
func (r *run) one(ctx context.Context, b *bench, c Case) error {
	if c.Place.login() {
		return r.oneLogin(ctx, b, c)
	}
	s := r.scripts[c.Script]
	var base *expectation
	var err error
	if s.app == nil {
		if base, err = r.oracle.expect(ctx, b, s, variant{}); err != nil {
			return err
		}
	}
	number, err := b.begin(ctx, c)
	if err != nil {
		return err
	}
	var by *bystander
	if c.Place == AtClient {
		if by, err = b.newBystander(ctx); err != nil {
			return err
		}
		defer by.c.close()
	}
	clientCtx, done := context.WithTimeout(ctx, clientMax)
	defer done()
	o, addr := seen{transcript: &transcript{}}, b.addr
	if c.Place == AtClient {
		addr = b.front.addr()
	}
	hangUp := func() {}
	if s.app != nil {
		o.deeds, err = s.app.use(clientCtx, addr, b.name, number)
	} else {
		var cl *client
		if cl, err = connect(clientCtx, addr, b.p.keys, b.name); err != nil {
			return err
		}
		hangUp = cl.close
		err = cl.run(o.transcript, s.all(), number)
	}
	struck, pids := b.wire.hit()
	if c.Place == AtClient {
		struck, _ = b.front.wire.hit()
	}
	var wrong []string
	look := func(f func() ([]string, error)) {
		if err == nil {
			var more []string
			more, err = f()
			wrong = append(wrong, more...)
		}
	}
	if by != nil {
		look(func() ([]string, error) { return by.works(ctx, b) })
	} else if r.o.Sites { // before the relay lets go: the gateway must have seen to it
		look(func() ([]string, error) { return b.behind(ctx, pids, false) })
	}
	hangUp()
	b.release()
	look(func() ([]string, error) { return b.sessions(ctx) }) // and the next case does not count what they send
	look(func() ([]string, error) { return b.behind(ctx, pids, true) })
	look(func() ([]string, error) { o.ledger, err = b.ledger(ctx, number); return nil, err })
	look(func() ([]string, error) { _, err = b.forget(ctx, number); return nil, err })
	if err != nil {
		return err
	}
	v, err := r.judge(ctx, b, c, base, o)
	if err != nil {
		return err
	}
	if v.wrong = append(v.wrong, wrong...); len(v.wrong) > 0 {
		v.outcome, b.spoilt = other, true
	}
	trace := append(b.wire.history(), b.front.wire.history()...)
	slices.SortStableFunc(trace, func(a, b event) int { return a.at.Compare(b.at) })
	r.record(c, struck, v, number, trace)
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
func (r *run) judge(ctx context.Context, b *bench, which Case, base *expectation, o seen) (best verdict, err error) {
	s, c := r.scripts[which.Script], contract{sites: r.o.Sites}
	switch {
	case s.app != nil && which.Place == AtClient:
		return judgeGoneApp(s, o), nil
	case s.app != nil:
		return judgeApp(c, s, o.deeds, o.ledger), nil
	case which.Place == AtClient:
		return judgeGone(s, base, o), nil
	}
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
	if r.o.Until != nil && r.o.Until(f) {
		r.enough.Store(true)
	}
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
	fmt.Fprintf(&b, "seed %d: %d cases in %s, %d violations; in %d cases the message did not come", r.Seed, r.Cases, r.Took.Round(time.Second), len(r.Findings), r.Missed)
	if r.Away > 0 {
		fmt.Fprintf(&b, "; %d reads away from home", r.Away)
	}
	b.WriteString("\n\n")
	fmt.Fprintf(&b, "| script | cases | %s |\n|---%s|\n", strings.Join(outcomes, " | "), strings.Repeat("|---", len(outcomes)+1))
	sums := map[string]int{}
	for _, name := range append(sorted(r.Table), "all") {
		row := r.Table[name]
		if name == "all" {
			row = sums
		}
		cases := 0
		var cells strings.Builder
		for _, o := range outcomes {
			cases += row[o]
			fmt.Fprintf(&cells, " %d |", row[o])
			if name != "all" {
				sums[o] += row[o]
			}
		}
		fmt.Fprintf(&b, "| %s | %d |%s\n", name, cases, cells.String())
	}
	return b.String()
}
