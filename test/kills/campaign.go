// Package kills is the kill campaign: two sites or more and a witness, clients writing at all, and in each round one random
// fault, or two. A ledger outside the databases tells afterwards whether anything that was acknowledged is lost, or anything is
// there twice; whether the sites are equal; and for how long the surviving sites did not serve.
package kills

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/quorum"
)

// Options of a campaign. Binary is required.
type Options struct {
	Binary  string
	Sites   []string // names; default two
	Rounds  int
	Seed    uint64
	Faults  []string // kinds to choose from; empty: all that this process may make
	Twice   float64  // share of rounds in which a second fault comes while the first one is being repaired
	Clients int      // at each site; default 4
	// Receipts is durability.receipts: how many other sites a commit waits for; default 1.
	Receipts int
	Rearm    time.Duration
	// Gateway lets the clients go through gateways that run alone, one beside the clients of each site.
	Gateway bool
	// Reads, with Gateway, lets these send reads to all sites, and the clients read what they have written.
	Reads bool
	// Slow ends the campaign, with a picture of all processes at that moment, when a client waits for longer; 0: none does.
	Slow time.Duration
	Out  io.Writer
	Keep bool // keep everything on disk when a round fails
}

// Round is what one round showed.
type Round struct {
	N     int
	Kind  string // of its fault
	Fault string
	// Stall is the longest time that the site which went on did not acknowledge a transaction, from the fault on; 0 when
	// both went on.
	Stall     time.Duration
	Recovered time.Duration // from the end of the fault until all is as before
	// Waits are, with Options.Gateway, the longest time of each client from the fault on until a transaction was acknowledged.
	Waits      []time.Duration
	Again      int // with Options.Gateway: transactions that were rolled back with 40001
	Away       int // with Options.Reads: reads that went to another site than the home
	Violations []string
}

// Result of a campaign.
type Result struct {
	Seed                   uint64
	Rounds                 []Round
	Acked, Refused, Unsure int
	Codes                  map[string]int // with Options.Gateway: the errors that clients saw
	// With Options.Reads: reads of own rows, those of them and of all others that went to another site than the home, and transactions that
	// were delayed.
	Reads, Away, Slowed int
}

// Failed reports whether a round had a violation.
func (r *Result) Failed() bool {
	return slices.ContainsFunc(r.Rounds, func(one Round) bool { return len(one.Violations) > 0 })
}

// role is the clients'.
const role = "app"

// load is how long clients write before a fault, and after it has ended.
const load = 700 * time.Millisecond

// Run makes the rounds. An error says that it could not go on; what it has found is in the result, as far as it came.
func Run(ctx context.Context, o Options) (res *Result, err error) {
	if o.Clients == 0 {
		o.Clients = 4
	}
	if o.Rearm == 0 {
		o.Rearm = time.Second
	}
	if o.Out == nil {
		o.Out = io.Discard
	}
	res = &Result{Seed: o.Seed, Codes: map[string]int{}}
	var disk int64
	if o.Faults, err = permitted(o.Faults); err != nil {
		return res, err
	}
	if slices.ContainsFunc(o.Faults, needDisk) {
		disk = diskBytes
	}
	p, err := pair.Start(ctx, pair.Options{
		Binary: o.Binary, Names: o.Sites, Relays: true, Sync: true, Rearm: o.Rearm, DiskBytes: disk, Config: o.config, Gateway: o.Gateway,
		Seed: func(ctx context.Context, a *pair.Site) error { return a.Cluster.Exec(ctx, a.Database, schema) },
	})
	if err != nil {
		return res, err
	}
	c := &campaign{o: o, p: p, res: res, l: &ledger{}, rng: rand.New(rand.NewPCG(o.Seed, 0))}
	defer func() {
		if o.Keep && (err != nil || res.Failed()) {
			fmt.Fprintln(o.Out, "kept:", p.Dir())
			c.pictured.Do(c.picture)
			err = errors.Join(err, p.Leave())
			return
		}
		err = errors.Join(err, p.Close())
	}()
	if err := p.AddClient(ctx, role, secret); err != nil {
		return res, err
	}
	ready, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := p.WaitReady(ready); err != nil {
		return res, err
	}
	if err := c.settled(ready); err != nil {
		return res, err
	}
	if err := p.HoldCommits(ready); err != nil {
		return res, err
	}
	for _, s := range p.Sites {
		c.dsns = append(c.dsns, fmt.Sprintf("postgres://%s:%s@%s/%s?sslmode=disable", role, secret, s.Door, s.Database))
	}
	if o.Reads {
		if err := addReads(p); err != nil {
			return res, err
		}
	}
	if o.Gateway {
		if c.dsns, c.gateways, err = startGateways(ready, p); err != nil {
			return res, err
		}
	}
	if o.Slow > 0 {
		var end context.CancelCauseFunc
		ctx, end = context.WithCancelCause(ctx)
		defer end(nil)
		go c.watch(ctx, end)
	}
	for n := range o.Rounds {
		r, err := c.round(ctx, n+1)
		if why := context.Cause(ctx); why != nil {
			return res, fmt.Errorf("round %d, seed %d: %s: %w", n+1, o.Seed, r.Fault, why)
		}
		res.Rounds = append(res.Rounds, r)
		fmt.Fprintf(o.Out, "round %d: %s\n", n+1, r)
		if err != nil || len(r.Violations) > 0 {
			return res, err
		}
	}
	return res, nil
}

// watch ends the campaign when a client waits for longer than Options.Slow.
func (c *campaign) watch(ctx context.Context, end context.CancelCauseFunc) {
	for ctx.Err() == nil {
		sleep(ctx, 100*time.Millisecond)
		if a, ok := c.l.oldest(); ok && time.Since(a.begun) > c.o.Slow {
			end(fmt.Errorf("client %s of site %s waits for longer than %s", a.client, a.site, c.o.Slow))
			c.pictured.Do(c.picture)
			return
		}
	}
}

// picture keeps what the processes know when something has gone wrong: each agent's status, beside the data, and what it and the gateways
// are doing, in their logs. It ends them.
func (c *campaign) picture() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, g := range c.gateways {
		err := g.Signal(syscall.SIGQUIT)
		if err == nil {
			_, err = g.End(ctx)
		}
		if err != nil {
			fmt.Fprintf(c.o.Out, "gateway %s: %v\n", g.Address, err)
		}
	}
	for _, s := range c.p.Sites {
		doc, err := s.Control.Status(ctx)
		if err == nil {
			var b []byte
			if b, err = json.MarshalIndent(doc, "", "  "); err == nil {
				err = os.WriteFile(filepath.Join(c.p.Dir(), "status-"+s.Name+".json"), b, 0o600)
			}
		}
		if err == nil {
			err = s.SignalAgent(syscall.SIGQUIT)
		}
		if err == nil {
			_, err = s.AgentEnd(ctx)
		}
		if err != nil {
			fmt.Fprintf(c.o.Out, "site %s: %v\n", s.Name, err)
		}
	}
}

// permitted are the faults to choose from. Those that need a disk of its own take the rights to mount one; when they were
// asked for by name, their lack is an error.
func permitted(asked []string) ([]string, error) {
	kinds := asked
	if len(kinds) == 0 {
		kinds = Kinds()
	}
	if !slices.ContainsFunc(kinds, needDisk) {
		return kinds, nil
	}
	err := pair.DisksWork()
	if err != nil && len(asked) == 0 {
		return slices.DeleteFunc(kinds, needDisk), nil
	}
	return kinds, err
}

// diskBytes is what an agent's data has, if a disk may fill up or hang: a voter's log and the journals.
const diskBytes = 640 << 20

// config lets the journals begin new files often, which is when a full disk shows, and sets receipts.
func (o Options) config(_, text string) string {
	text = strings.Replace(text, "\ndurability:\n", fmt.Sprintf("\ndurability:\n  receipts: %d\n", max(o.Receipts, 1)), 1)
	return text + "\njournal:\n  segment: 1MiB\n  keep: 1m\n"
}

func (r Round) String() string {
	lines := []string{fmt.Sprintf("%s; without service %s, as before %s after it", r.Fault, r.Stall.Round(time.Millisecond), r.Recovered.Round(time.Millisecond))}
	if len(r.Waits) > 0 {
		lines[0] += fmt.Sprintf("; clients waited up to %s, %d transactions were rolled back", r.Waits[len(r.Waits)-1].Round(time.Millisecond), r.Again)
	}
	if r.Away != 0 {
		lines[0] += fmt.Sprintf(", %d reads went away from home", r.Away)
	}
	for _, v := range r.Violations {
		lines = append(lines, "  VIOLATION: "+v)
	}
	return strings.Join(lines, "\n")
}

type campaign struct {
	o   Options
	p   *pair.Pair
	res *Result
	l   *ledger
	rng *rand.Rand
	// dsns are how the clients of each site connect, and gateways what these lead to; none without Options.Gateway.
	dsns     []string
	gateways []*pair.Gateway

	pictured sync.Once
}

// settleMax bounds how long the sites may take until all is as it was before a fault.
const settleMax = 90 * time.Second

func (c *campaign) round(ctx context.Context, n int) (r Round, err error) {
	f := c.choose()
	r = Round{N: n, Kind: f.kind, Fault: f.String()}
	filler := ""
	if f.kind == diskFull {
		filler = strings.Repeat("x", 8<<10)
	}
	clientsCtx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	first := len(c.l.all())
	var clients []*client
	for at, s := range c.p.Sites {
		for i := range c.o.Clients {
			cl := &client{
				gateway: c.o.Gateway, dsn: c.dsns[at], reads: c.o.Reads, oks: map[int]bool{},
				site: s.Name, name: fmt.Sprintf("%d-%d", n, i), l: c.l, filler: filler, pause: time.Duration(1+c.rng.IntN(10)) * time.Millisecond,
			}
			clients = append(clients, cl)
			wg.Go(func() { cl.run(clientsCtx) })
		}
	}
	sleep(ctx, load+time.Duration(c.rng.IntN(300))*time.Millisecond)
	at := time.Now()
	if err := c.strike(ctx, n, f, &r); err != nil {
		return r, err
	}
	ended := time.Now()
	wait, cancel := context.WithTimeout(ctx, settleMax)
	defer cancel()
	if err := c.settled(wait); err != nil {
		return r, fmt.Errorf("round %d, seed %d: after %s: %w", n, c.o.Seed, f, err)
	}
	r.Recovered = time.Since(ended)
	sleep(ctx, load)
	stop()
	wg.Wait()
	r.Stall = stall(c.l.all()[first:], at)
	if c.o.Gateway {
		r.Waits = longestWaits(c.l.all()[first:], at)
		for _, cl := range clients {
			r.Again += cl.seen.again
			c.res.Reads += cl.look.n
			for code, n := range cl.seen.codes {
				c.res.Codes[code] += n
			}
		}
	}
	if err := c.p.WaitApplied(wait); err != nil {
		return r, fmt.Errorf("round %d, seed %d: after %s: %w", n, c.o.Seed, f, err)
	}
	var names []string
	var sites []content
	for _, s := range c.p.Sites {
		have, err := read(ctx, s)
		if err != nil {
			return r, err
		}
		names, sites = append(names, s.Name), append(sites, have)
	}
	all := c.l.all()
	c.res.Acked, c.res.Refused, c.res.Unsure = 0, 0, 0
	for _, a := range all {
		switch a.outcome {
		case acked:
			c.res.Acked++
		case refused:
			c.res.Refused++
		case unknown, open:
			c.res.Unsure++
		}
	}
	if c.o.Reads {
		before := c.res.Away
		if c.res.Away, c.res.Slowed, err = countReads(wait, c.gateways); err != nil {
			return r, err
		}
		r.Away = c.res.Away - before
	}
	r.Violations = append(judge(all, names, sites), unfit(clients, r.faults())...)
	if r.Kind == takeOver && r.Again > 0 {
		r.Violations = append(r.Violations, fmt.Sprintf("%d transactions were rolled back by a planned restart", r.Again))
	}
	return r, nil
}

// Kinds of rounds with a second fault.
const (
	twoFaults = "a second fault during the repair"
	twoAtOnce = "two sites at once"
)

// faults is how many struck in the round.
func (r *Round) faults() int {
	if r.Kind == twoFaults || r.Kind == twoAtOnce {
		return 2
	}
	return 1
}

// strike makes a fault, in some rounds followed by a second one; with three sites, that often strikes another one meanwhile.
func (c *campaign) strike(ctx context.Context, n int, f *fault, r *Round) error {
	if c.rng.Float64() >= c.o.Twice {
		return c.suffer(ctx, n, f)
	}
	second, gap := c.choose(), time.Duration(c.rng.IntN(1500))*time.Millisecond
	if len(c.p.Sites) > 2 && second.site != f.site && second.kind != f.kind {
		r.Kind, r.Fault = twoAtOnce, fmt.Sprintf("%s, and meanwhile %s", f, second)
		other := make(chan error, 1)
		go func() {
			sleep(ctx, gap)
			other <- c.suffer(ctx, n, second)
		}()
		return errors.Join(c.suffer(ctx, n, f), <-other)
	}
	r.Kind, r.Fault = twoFaults, fmt.Sprintf("%s, then %s", f, second)
	if err := c.suffer(ctx, n, f); err != nil {
		return err
	}
	sleep(ctx, gap)
	return c.suffer(ctx, n, second)
}

// suffer is a fault from its beginning to its end.
func (c *campaign) suffer(ctx context.Context, n int, f *fault) error {
	if err := f.begin(ctx, c.p); err != nil {
		return fmt.Errorf("round %d, seed %d: %s: %w", n, c.o.Seed, f, err)
	}
	sleep(ctx, f.length)
	if err := f.end(ctx, c.p); err != nil {
		return fmt.Errorf("round %d, seed %d: end %s: %w", n, c.o.Seed, f, err)
	}
	return nil
}

// settled waits until all sites are members, let clients in, and stream.
func (c *campaign) settled(ctx context.Context) error {
	begun := time.Now()
	err := c.p.Wait(ctx, "all sites serve as before", func(ctx context.Context) (bool, error) {
		if time.Since(begun) > c.o.patience() {
			c.rearm(ctx)
		}
		for _, s := range c.p.Sites {
			if s.AgentEnded() { // as a service manager does
				if err := s.RestartAgent(); err != nil {
					return false, err
				}
			}
		}
		for _, s := range c.p.Sites {
			ask, cancel := context.WithTimeout(ctx, time.Second)
			d, err := s.Control.Register(ask)
			cancel()
			if err != nil {
				return false, fmt.Errorf("site %s: %w", s.Name, err)
			}
			if d.Mode != quorum.Sync || !d.Known || !d.Member || len(d.Frozen) > 0 || d.Door == nil || !d.Door.Open {
				return false, fmt.Errorf("site %s: %s; door %+v, blocked %q, problem %v", s.Name, d.Guarantee, d.Door, d.Blocked, d.Problem)
			}
		}
		return true, nil
	})
	if err != nil {
		return err
	}
	return c.p.WaitReady(ctx)
}

// patience is how long a site is left to come back by itself: that takes the longer the more have been lost lately.
func (o Options) patience() time.Duration { return o.Rearm + 2*time.Second }

// rearm asks each site to take the others back, as a person would.
func (c *campaign) rearm(ctx context.Context) {
	for _, s := range c.p.Sites {
		for _, other := range c.p.Sites {
			if other == s {
				continue
			}
			ask, cancel := context.WithTimeout(ctx, time.Second)
			_, _ = s.Control.Rearm(ask, other.Name) // refused unless it is due
			cancel()
		}
	}
}

// stall is for how long the best of the sites did not acknowledge anything from the fault on: the longest gap in which no
// site did.
func stall(attempts []attempt, at time.Time) time.Duration {
	var ends []time.Time
	for _, a := range attempts {
		if a.outcome == acked {
			ends = append(ends, a.ended)
		}
	}
	slices.SortFunc(ends, time.Time.Compare)
	longest, last := time.Duration(0), at
	for _, e := range ends {
		if e.Before(at) {
			continue
		}
		longest, last = max(longest, e.Sub(last)), e
	}
	return longest
}

// Report is the result as lines and a table.
func (r *Result) Report() string {
	byFault := map[string][]time.Duration{}
	var kinds []string
	violations := 0
	for _, one := range r.Rounds {
		if byFault[one.Kind] == nil {
			kinds = append(kinds, one.Kind)
		}
		byFault[one.Kind] = append(byFault[one.Kind], one.Stall)
		violations += len(one.Violations)
	}
	slices.Sort(kinds)
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %d rounds, %d violations; %d transactions acknowledged, %d refused, %d without an answer\n\n", r.Seed, len(r.Rounds), violations, r.Acked, r.Refused, r.Unsure)
	b.WriteString("| fault | rounds | without service p50 | p99 | max |\n|---|---|---|---|---|\n")
	for _, k := range kinds {
		d := byFault[k]
		slices.Sort(d)
		at := func(q float64) time.Duration { return d[min(len(d)-1, int(q*float64(len(d))))].Round(time.Millisecond) }
		fmt.Fprintf(&b, "| %s | %d | %s | %s | %s |\n", k, len(d), at(0.5), at(0.99), d[len(d)-1].Round(time.Millisecond))
	}
	b.WriteString(r.reportGateways(kinds))
	if r.Reads > 0 {
		fmt.Fprintf(&b, "\n%d reads of what the client had written before, %d reads away from home, %d transactions delayed\n", r.Reads, r.Away, r.Slowed)
	}
	return b.String()
}

// reportGateways is what clients of gateways have had of each kind of fault.
func (r *Result) reportGateways(kinds []string) string {
	waits, again := map[string][]time.Duration{}, map[string]int{}
	for _, one := range r.Rounds {
		waits[one.Kind] = append(waits[one.Kind], one.Waits...)
		again[one.Kind] += one.Again
	}
	var b strings.Builder
	for _, k := range kinds {
		d := waits[k]
		if len(d) == 0 {
			continue
		}
		if b.Len() == 0 {
			fmt.Fprintf(&b, "\nErrors that clients of gateways saw, by SQLSTATE: %v\n\n", r.Codes)
			b.WriteString("| fault | clients | waited p50 | p99 | max | goal | longer than that | rolled back (40001) |\n|---|---|---|---|---|---|---|---|\n")
		}
		slices.Sort(d)
		at := func(q float64) time.Duration { return d[min(len(d)-1, int(q*float64(len(d))))].Round(time.Millisecond) }
		most, over := goal(k), 0
		for _, one := range d {
			if most > 0 && one > most {
				over++
			}
		}
		aim, beyond := "-", "-"
		if most > 0 {
			aim, beyond = most.String(), fmt.Sprint(over)
		}
		fmt.Fprintf(&b, "| %s | %d | %s | %s | %s | %s | %s | %d |\n", k, len(d), at(0.5), at(0.99), d[len(d)-1].Round(time.Millisecond), aim, beyond, again[k])
	}
	return b.String()
}
