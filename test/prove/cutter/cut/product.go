package cut

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/pgwire/scram"
)

// inProduct are the scripts that the form with two sites runs: those that need no role, schema or setting of their own.
var inProduct = []string{
	"read-simple", "write-simple", "write-extended", "write-returning", "write-with", "write-function", "write-trigger", "write-deferred-fails",
	"multi-simple", "multi-begins", "block-simple", "block-extended", "block-rollback", "block-deferred-fails", "block-long", "savepoints",
	"prepared", "prepared-block", "pipeline-one-sync", "pipeline-five-syncs", "pipeline-block-syncs", "copy-in", "copy-in-block", "cursor",
	"settings", "settings-block", "pgx-cache", "pgx-block", "pgx-batch", "pgx-simple",
}

// product is the whole product: two sites whose commits wait for each other, a witness, and a gateway that runs alone. The relays
// stand between each agent and its PostgreSQL, which is the way of the gateway's connections as well.
type product struct {
	o      Options
	pair   *pair.Pair
	wire   *wire
	relays map[string]*relay // by site
	killed string            // the site that was, until it is back
	kills  chan error
}

// RunProduct runs cases in which the site that carries out the transaction is killed at the message. It takes seconds a case.
func RunProduct(ctx context.Context, o Options) (res *Result, err error) {
	dir, err := os.MkdirTemp("", "duri-cutter-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	binary, err := pair.Build(ctx, dir)
	if err != nil {
		return nil, err
	}
	p := &product{o: o, wire: newWire(silenceMax), relays: map[string]*relay{}, kills: make(chan error, 1)}
	p.wire.kill = p.kill
	defer func() {
		for _, r := range p.relays {
			err = errors.Join(err, r.close())
		}
	}()
	p.pair, err = pair.Start(ctx, pair.Options{
		Binary: binary, Database: database, Gateway: true, Sync: true, Rearm: 500 * time.Millisecond, Config: p.config,
		Settings: map[string]string{"max_connections": "100", "max_prepared_transactions": "10"},
		Seed: func(ctx context.Context, a *pair.Site) error {
			tables, _, _ := strings.Cut(schema, "CREATE TABLE small") // what comes behind is for scripts that are not run here
			return a.Cluster.Exec(ctx, a.Database, tables+"; ALTER TABLE ledger REPLICA IDENTITY FULL")
		},
	})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.pair.Close()) }()
	return p.run(ctx)
}

// config puts a relay between a site's agent and its PostgreSQL.
func (p *product) config(site, text string) string {
	port := regexp.MustCompile(`port=(\d+) user=duri`).FindStringSubmatch(text)
	if port == nil {
		return text
	}
	r, err := p.wire.relayTo(site, "127.0.0.1:"+port[1])
	if err != nil {
		return text // and no case will reach its message
	}
	p.relays[site] = r
	_, own, _ := strings.Cut(r.addr(), ":")
	return strings.Replace(text, port[0], "port="+own+" user=duri", 1)
}

// kill kills a site: PostgreSQL with all its processes, and the agent.
func (p *product) kill(site string) {
	p.killed = site
	for _, s := range p.pair.Sites {
		if s.Name == site {
			p.kills <- errors.Join(s.SignalAgent(syscall.SIGKILL), s.Cluster.Kill())
		}
	}
}

// settleMax bounds how long it may take until all is as before.
const settleMax = 2 * time.Minute

func (p *product) run(ctx context.Context) (*Result, error) {
	if err := p.prepare(ctx); err != nil {
		return nil, err
	}
	res := &Result{Seed: p.o.Seed, Table: map[string]map[string]int{}}
	r := &run{o: p.o, scripts: map[string]*script{}, res: res}
	r.o.Sites = true
	for _, s := range corpus() {
		if slices.Contains(inProduct, s.name) {
			r.scripts[s.name] = s
		}
	}
	began := time.Now()
	rng := rand.New(rand.NewPCG(p.o.Seed, 0))
	for n := range max(p.o.Cases, 1) {
		if err := ctx.Err(); err != nil {
			return res, err
		}
		if err := p.one(ctx, r, rng); err != nil {
			return res, fmt.Errorf("case %d of seed %d: %w", n+1, p.o.Seed, err)
		}
		res.Took = time.Since(began)
		if res.Failed() {
			break // what is left behind would be the next one's
		}
	}
	return res, nil
}

// prepare makes the clients' role, lets commits wait, and starts the gateway.
func (p *product) prepare(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleMax)
	defer cancel()
	if err := p.pair.WaitReady(ctx); err != nil {
		return err
	}
	for _, f := range []func(context.Context) error{
		func(ctx context.Context) error { return p.pair.AddClient(ctx, appUser, appPassword) },
		p.pair.HoldCommits, p.settled,
		func(context.Context) error { return p.pair.Gateway.Start() },
	} {
		if err := f(ctx); err != nil {
			return err
		}
	}
	return nil
}

// settled waits until both sites are members and let clients in.
func (p *product) settled(ctx context.Context) error {
	return p.pair.Wait(ctx, "both sites are members and serve", func(ctx context.Context) (bool, error) {
		for _, s := range p.pair.Sites {
			if s.AgentEnded() { // as a service manager does
				if err := s.StartAgent(); err != nil {
					return false, err
				}
			}
			ask, cancel := context.WithTimeout(ctx, time.Second)
			d, err := s.Control.Register(ask)
			cancel()
			if err != nil {
				return false, err
			}
			if len(d.Register.Members) != 2 || !d.Member || d.Door == nil || !d.Door.Open {
				return false, fmt.Errorf("site %s: %s", s.Name, d.Guarantee)
			}
		}
		return true, nil
	})
}

// keys are those of the clients' role.
func (p *product) keys(ctx context.Context) (*scram.Keys, error) {
	rows, err := p.pair.Sites[0].Cluster.QueryText(ctx, "postgres", "SELECT rolpassword FROM pg_authid WHERE rolname = '"+appUser+"'")
	if err != nil {
		return nil, err
	}
	v, err := scram.ParseVerifier(rows[0][0])
	if err != nil {
		return nil, err
	}
	return keysOf(v.Salt, v.Iterations), nil
}

// stage gives what the oracle needs, at the first site: both are up.
func (p *product) stage(ctx context.Context, r *run) (*bench, error) {
	a := p.pair.Sites[0]
	keys, err := p.keys(ctx)
	if err != nil {
		return nil, err
	}
	if r.oracle == nil {
		where := &place{cluster: a.Cluster, keys: keys}
		where.clients.Store(1_000_000)
		r.oracle = newOracle(where)
	}
	b := &bench{p: r.oracle.p, name: "cutter-0000", wire: p.wire, stop: func() error { return nil }}
	b.admin, err = b.p.admin(ctx)
	return b, err
}

// one runs a script uncut, and then with a kill at one of its messages.
func (p *product) one(ctx context.Context, r *run, rng *rand.Rand) error {
	ctx, cancel := context.WithTimeout(ctx, 3*settleMax)
	defer cancel()
	b, err := p.stage(ctx, r)
	if err != nil {
		return err
	}
	names := sorted(r.scripts)
	c := Case{Script: names[rng.IntN(len(names))], Routing: Sticky, Place: AtServer, Dir: Direction(rng.IntN(2)), Kind: []Kind{KillBefore, KillAfter}[rng.IntN(2)]}
	s := r.scripts[c.Script]
	var base *expectation
	if s.app == nil {
		if base, err = r.oracle.expect(ctx, b, s, variant{}); err != nil {
			return err
		}
	}
	share := rng.Float64()
	if _, _, err := p.play(ctx, b, s, plan{kind: None}); err != nil {
		return err
	}
	c.K = 1 + int(share*float64(p.wire.count()[c.Dir]))
	number, o, err := p.play(ctx, b, s, plan{c.Dir, c.K, c.Kind})
	if err != nil {
		return fmt.Errorf("%s: %w", c, err)
	}
	struck, _ := p.wire.hit()
	trace := p.wire.history()
	p.wire.release()
	pg.Close(b.admin)
	if err := p.heal(ctx, struck); err != nil {
		return fmt.Errorf("after %s (client %s): %w", c, number, err)
	}
	if b, err = p.stage(ctx, r); err != nil { // the connection was perhaps to the site that was killed
		return err
	}
	defer pg.Close(b.admin)
	if o.ledger, err = b.ledger(ctx, number); err != nil {
		return err
	}
	v, err := r.judge(ctx, b, c, base, *o)
	if err != nil {
		return err
	}
	if there, err := p.ledgerAt(ctx, p.pair.Sites[1], number); err != nil {
		return err
	} else if want := fmt.Sprint(o.ledger); there != want {
		v.violate("the second site's ledger has %s, the first one's %s", there, want)
		v.outcome = other
	}
	r.record(c, struck, v, number, trace)
	fmt.Fprintf(p.o.Out, "%s: %s\n", c, v.outcome)
	return nil
}

// play runs a script through the gateway.
func (p *product) play(ctx context.Context, b *bench, s *script, how plan) (number string, o *seen, err error) {
	number = b.p.number()
	if err := b.seed(ctx, number); err != nil {
		return "", nil, err
	}
	ready, cancel := context.WithTimeout(ctx, settleMax)
	defer cancel()
	if err := p.pair.WaitApplied(ready); err != nil { // what the client is to find may be looked for at either site
		return "", nil, err
	}
	var c *client
	if err := p.pair.Wait(ready, "the gateway serves", func(ctx context.Context) (bool, error) {
		c, err = connect(ready, p.pair.Gateway.Address, b.p.keys, b.name)
		return err == nil, err
	}); err != nil {
		return "", nil, err
	}
	defer c.close()
	o = &seen{transcript: &transcript{}}
	p.wire.begin(how)
	if s.app != nil {
		o.deeds, err = s.app.use(ready, p.pair.Gateway.Address, b.name, number)
	} else {
		err = c.run(o.transcript, s.all(), number)
	}
	return number, o, err
}

// heal brings back the site that was killed, and waits until both have everything.
func (p *product) heal(ctx context.Context, struck bool) error {
	ctx, cancel := context.WithTimeout(ctx, settleMax)
	defer cancel()
	if struck {
		if err := <-p.kills; err != nil {
			return err
		}
		for _, s := range p.pair.Sites {
			if s.Name == p.killed {
				if err := errors.Join(s.Cluster.Start(ctx), s.StartAgent()); err != nil {
					return err
				}
			}
		}
	}
	if err := p.settled(ctx); err != nil {
		return err
	}
	if err := p.pair.WaitReady(ctx); err != nil {
		return err
	}
	return p.pair.WaitApplied(ctx)
}

// ledgerAt is what a site holds of a client.
func (p *product) ledgerAt(ctx context.Context, s *pair.Site, number string) (string, error) {
	rows, err := s.Cluster.QueryText(ctx, s.Database, "SELECT seq FROM ledger WHERE client = "+number+" ORDER BY seq")
	var all []string
	for _, r := range rows {
		all = append(all, r[0])
	}
	return "[" + strings.Join(all, " ") + "]", err
}
