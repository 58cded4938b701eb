// Command clients runs programs that know nothing of duri through its gateway, see package clients. Run it by
//
//	make prove CASE=clients
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/test/clients"
)

func main() {
	clients.ServeIfAsked()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	only := flag.String("only", "", "regular expression of what is run; default all")
	testdata := flag.String("testdata", "test/clients/testdata", "folder of the scripts")
	flag.Parse()
	if err := run(ctx, *only, *testdata); err != nil {
		fmt.Fprintln(os.Stderr, "prove clients:", err)
		if hint := pgcluster.HintOf(err); hint != "" {
			fmt.Fprintln(os.Stderr, "hint:", hint)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, only, testdata string) error {
	match, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	if testdata, err = filepath.Abs(testdata); err != nil {
		return err
	}
	failed := 0
	for _, c := range clients.Cases(testdata) {
		if !match.MatchString(c.Name) || ctx.Err() != nil {
			continue
		}
		said, err := c.Run(ctx)
		if err != nil {
			failed++
			fmt.Printf("FAILED  %s: %v\n", c.Name, err)
			continue
		}
		fmt.Printf("ok      %s: %s\n", c.Name, said)
	}
	if failed > 0 {
		return fmt.Errorf("%d failed", failed)
	}
	return errors.Join(ctx.Err())
}
