// Command gateway measures what the agent's gateway costs beside PgBouncer and HAProxy: throughput, latency, processor time per
// transaction, and connections per second, in one run on one machine. Run it by
//
//	make bench ASK=gateway
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pgcluster"
)

func main() {
	var b bench
	flag.DurationVar(&b.time, "time", 5*time.Second, "length of a load")
	flag.IntVar(&b.runs, "runs", 3, "loads of each kind; medians count")
	flag.StringVar(&b.only, "only", "", "only loads whose name contains this, such as 'prepared UPDATE'")
	flag.BoolVar(&b.tls, "tls", false, "TLS from the client and to the server; HAProxy passes it through")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench gateway:", err)
		if hint := pgcluster.HintOf(err); hint != "" {
			fmt.Fprintln(os.Stderr, "hint:", hint)
		}
		os.Exit(1)
	}
}

const (
	database = "app"
	user     = "client"
	password = "secret"
	rows     = 100000
)

type bench struct {
	time time.Duration
	runs int
	only string
	tls  bool

	dir, pgbench string
	agent        func() int // the process of the server's site
	systems      []*system
}

// shape is a kind of load.
type shape struct {
	clients   int
	protocol  string // pgbench's -M
	reconnect bool   // a connection for each transaction
	writes    bool   // an UPDATE of one row, else a SELECT of one
}

func (s shape) String() string {
	what := s.protocol
	if s.writes {
		what += " UPDATE"
	}
	if s.reconnect {
		what = "connecting anew each time"
	}
	return fmt.Sprintf("%d clients, %s", s.clients, what)
}

func (b *bench) shapes() (all []shape) {
	for _, writes := range []bool{false, true} {
		for _, protocol := range []string{"simple", "prepared"} {
			for _, clients := range []int{1, 8, 32} {
				all = append(all, shape{clients: clients, protocol: protocol, writes: writes})
			}
		}
	}
	all = append(all, shape{clients: 8, protocol: "simple", reconnect: true})
	return slices.DeleteFunc(all, func(s shape) bool { return !strings.Contains(s.String(), b.only) })
}

func (b *bench) run(ctx context.Context) (err error) {
	if b.time < time.Second || b.runs < 1 {
		return errors.New("nothing to measure: -time is at least 1s, -runs at least 1")
	}
	if b.dir, err = os.MkdirTemp("", "duri-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if err := os.Chmod(b.dir, 0o755); err != nil { // PgBouncer is another user's
		return err
	}
	p, err := b.start(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	defer b.end()
	results := map[string]map[string][]sample{}
	for run := range b.runs {
		for _, sh := range b.shapes() {
			fmt.Printf("run %d of %d: %s\n", run+1, b.runs, sh)
			for _, s := range b.systems {
				if s.only != "" && s.only != sh.protocol || sh.writes && s.name == duriSession { // that one is at the other site
					continue
				}
				one, err := b.load(ctx, s, sh)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", s.name, sh, err)
				}
				fmt.Printf("  %-20s %8.0f tx/s  p50 %6.0f us  p99 %6.0f us  %6.1f us of CPU a transaction\n", s.name, one.tps, one.p50, one.p99, one.cpu)
				if results[sh.String()] == nil {
					results[sh.String()] = map[string][]sample{}
				}
				results[sh.String()][s.name] = append(results[sh.String()][s.name], one)
			}
		}
	}
	fmt.Print(b.report(results))
	return nil
}

// report is the tables, and which aims hold.
func (b *bench) report(results map[string]map[string][]sample) string {
	var out, aims strings.Builder
	for _, sh := range b.shapes() {
		fmt.Fprintf(&out, "\n### %s\n\n| way | tx/s | p50 us | p99 us | CPU us a transaction |\n| --- | --- | --- | --- | --- |\n", sh)
		m := map[string]sample{}
		for _, s := range b.systems {
			if all := results[sh.String()][s.name]; len(all) > 0 {
				one := median(all)
				if sh.writes && s.name == duriTransaction { // it decodes, too, and did so behind the others
					one.cpu -= m[direct].agent
				}
				m[s.name] = one
				fmt.Fprintf(&out, "| %s | %.0f | %.0f | %.0f | %.1f |\n", s.name, m[s.name].tps, m[s.name].p50, m[s.name].p99, m[s.name].cpu)
			}
		}
		b.judge(&aims, sh, m)
	}
	return out.String() + "\nAims, for " + duriTransaction + ":\n\n" + aims.String()
}

// judge says which aims hold.
func (b *bench) judge(out *strings.Builder, sh shape, m map[string]sample) {
	say := func(holds bool, format string, args ...any) {
		verdict := "**missed**"
		if holds {
			verdict = "holds"
		}
		fmt.Fprintf(out, "* %s, %s: %s\n", verdict, sh, fmt.Sprintf(format, args...))
	}
	duri, peer, haproxy := m[duriTransaction], m[pgbouncer], m[haproxyTCP]
	if peer.tps == 0 {
		peer = m[pgbouncerSession]
	}
	if peer.tps > 0 {
		least := 1.0
		if sh.reconnect {
			least = 0.8
		}
		if sh.clients > 1 {
			say(duri.tps >= least*peer.tps, "%.2f times PgBouncer's tx/s, at least %.1f", duri.tps/peer.tps, least)
		}
		if !sh.reconnect {
			most := 1.8
			if b.tls {
				most = 1.2
			}
			say(duri.cpu <= most*peer.cpu, "%.2f times PgBouncer's CPU a transaction, at most %.1f", duri.cpu/peer.cpu, most)
		}
	}
	if haproxy.tps > 0 && !sh.reconnect && !b.tls { // it does not take part in TLS
		say(duri.cpu <= haproxy.cpu, "%.2f times HAProxy's CPU a transaction, at most 1", duri.cpu/haproxy.cpu)
	}
	if sh.clients == 1 {
		say(duri.p50 <= m[direct].p50+60, "p50 %.0f us more than direct, at most 60", duri.p50-m[direct].p50)
	}
}

// median is that of each figure by itself.
func median(all []sample) sample {
	of := func(f func(sample) float64) float64 {
		var v []float64
		for _, s := range all {
			v = append(v, f(s))
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	return sample{
		tps: of(func(s sample) float64 { return s.tps }), p50: of(func(s sample) float64 { return s.p50 }),
		p99: of(func(s sample) float64 { return s.p99 }), cpu: of(func(s sample) float64 { return s.cpu }),
		agent: of(func(s sample) float64 { return s.agent }),
	}
}

// start makes two sites, the first with a gateway in session mode, the other one in transaction mode, and the peers before the
// second.
func (b *bench) start(ctx context.Context) (_ *pair.Pair, err error) {
	binary, err := pair.Build(ctx, b.dir)
	if err != nil {
		return nil, err
	}
	if len(b.shapes()) == 0 {
		return nil, fmt.Errorf("no load has %q in its name", b.only)
	}
	if err := b.prepare(); err != nil {
		return nil, err
	}
	return b.sites(ctx, binary)
}
