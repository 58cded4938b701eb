// Command kills runs the kill campaign of package kills. Run it by
//
//	make prove CASE=kills N=1000
//
// with further options in ARGS; -seed repeats a campaign's choices, -faults picks kinds.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/test/kills"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var o kills.Options
	var faults string
	var sites int
	flag.IntVar(&o.Rounds, "n", 20, "rounds")
	flag.Uint64Var(&o.Seed, "seed", rand.Uint64N(1<<32), "seed of what is random")
	flag.IntVar(&sites, "sites", 2, "sites, two to five")
	flag.IntVar(&o.Receipts, "receipts", 1, "durability.receipts: how many other sites a commit waits for")
	flag.IntVar(&o.Clients, "clients", 4, "clients at each site")
	flag.DurationVar(&o.Rearm, "rearm", time.Second, "durability.rearm: how long a link must be stable before a site is taken back")
	flag.StringVar(&faults, "faults", "", "kinds of faults to choose from, separated by commas; default all: "+strings.Join(kills.Kinds(), ", "))
	flag.Float64Var(&o.Twice, "twice", 0.1, "share of rounds in which a second fault comes while the first one is being repaired")
	flag.BoolVar(&o.Gateway, "gateway", false, "clients go through gateways that run alone, and keep their connections")
	flag.BoolVar(&o.Reads, "reads", false, "with -gateway: reads go to all sites, writers are delayed when one does not keep up, and clients read what they have written")
	flag.DurationVar(&o.Slow, "slow", 0, "end, and keep what all processes are doing, when a client waits for longer than this; 0: never")
	flag.BoolVar(&o.Keep, "keep", true, "keep everything on disk when a round fails")
	flag.Parse()
	if faults != "" {
		o.Faults = strings.Split(faults, ",")
	}
	if o.Reads && !o.Gateway {
		fmt.Fprintln(os.Stderr, "prove kills: -reads goes with -gateway")
		os.Exit(2)
	}
	o.Sites = []string{"a", "b", "c", "d", "e"}[:min(max(sites, 2), 5)]
	o.Out = os.Stdout
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "prove kills:", err)
		if hint := pgcluster.HintOf(err); hint != "" {
			fmt.Fprintln(os.Stderr, "hint:", hint)
		}
		os.Exit(1)
	}
}

// errViolated says that something was lost or is there twice; what, is printed.
var errViolated = errors.New("a promise was broken")

func run(ctx context.Context, o kills.Options) (err error) {
	if err := kills.CheckKinds(o.Faults); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "duri-prove-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if o.Binary, err = pair.Build(ctx, dir); err != nil {
		return err
	}
	fmt.Printf("seed %d: %d rounds, %d clients at each of %d sites\n", o.Seed, o.Rounds, o.Clients, len(o.Sites))
	res, err := kills.Run(ctx, o)
	fmt.Print("\n", res.Report())
	if err == nil && res.Failed() {
		err = errViolated
	}
	return err
}
