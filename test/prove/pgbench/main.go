// Command pgbench runs the proof of package tpcb: pgbench TPC-B at both sites at once on the same keys, undisturbed
// and then with both agents killed five times. Run it by `make prove CASE=pgbench`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/test/tpcb"
)

func main() {
	o := tpcb.Options{Out: os.Stdout}
	flag.IntVar(&o.Seconds, "seconds", 60, "length of each load")
	flag.IntVar(&o.Clients, "clients", 4, "pgbench clients at each site")
	flag.IntVar(&o.Scale, "scale", 10, "pgbench scale")
	flag.BoolVar(&o.Fsync, "fsync", true, "run the servers with fsync")
	kills := flag.Int("kills", 5, "how often both agents are killed in the second load")
	flag.Uint64Var(&o.Seed, "seed", rand.Uint64N(1<<32), "seed of keys and kills")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o, *kills); err != nil {
		fmt.Fprintf(os.Stderr, "prove pgbench: FAILED (seed %d): %v\n", o.Seed, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o tpcb.Options, kills int) (err error) {
	dir, err := os.MkdirTemp("", "duri-prove-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if o.Binary, err = pair.Build(ctx, dir); err != nil {
		return err
	}
	for _, n := range []int{0, kills} {
		o.Kills = n
		r, err := tpcb.Run(ctx, o)
		if err != nil {
			return fmt.Errorf("with %d kills: %w", n, err)
		}
		fmt.Printf("PROVED: %d + %d transactions with %d kills of both agents: sites equal (%d rows compared in %s), history exact, %d conflict records, caught up %s after the load\n\n",
			r.Transactions[0], r.Transactions[1], n, r.Rows, r.Verify.Round(time.Millisecond), r.Conflicts, r.CaughtUp.Round(time.Millisecond))
	}
	return nil
}
