// Command cutter runs the cutter of package cut. Run it by
//
//	make prove CASE=cutter
//
// with further options in ARGS; -case runs one case or one script again, N chooses so many cases by the seed.
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

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/test/prove/cutter/cut"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	o := cut.Options{Out: os.Stdout}
	flag.Uint64Var(&o.Seed, "seed", rand.Uint64N(1<<32), "seed of the choice of cases, and of their order")
	flag.IntVar(&o.Cases, "n", 0, "how many cases to choose; 0: all")
	flag.StringVar(&o.Only, "case", "", "one case or one script to run, by name")
	flag.IntVar(&o.Workers, "workers", 4, "cases under way at once")
	flag.IntVar(&o.Report, "report", 3, "how many violations to print with all that passed")
	flag.BoolVar(&o.Sites, "ask", true, "let the gateway ask the sites what became of transactions; else each loss may end a session")
	flag.BoolVar(&o.Logins, "logins", false, "only cases that cut a login")
	flag.BoolVar(&o.Reads, "reads", false, "reads go to the other site")
	sites := flag.Int("sites", 1, "2: the whole product, whose site is killed at the message; takes seconds a case (-n, default 20)")
	flag.Parse()
	how := cut.Run
	if *sites == 2 {
		how = cut.RunProduct
		if o.Cases == 0 {
			o.Cases = 20
		}
	}
	if err := run(ctx, o, how); err != nil {
		fmt.Fprintln(os.Stderr, "prove cutter:", err)
		if hint := pgcluster.HintOf(err); hint != "" {
			fmt.Fprintln(os.Stderr, "hint:", hint)
		}
		os.Exit(1)
	}
}

// errViolated says that a case went wrong; how, is printed.
var errViolated = errors.New("the contract was broken")

func run(ctx context.Context, o cut.Options, how func(context.Context, cut.Options) (*cut.Result, error)) error {
	fmt.Printf("seed %d\n", o.Seed)
	res, err := how(ctx, o)
	if res != nil {
		fmt.Print("\n", res.Report())
	}
	if err == nil && res.Failed() {
		err = errViolated
	}
	return err
}
