package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/demo"
	"github.com/duri-io/duri/internal/term"
)

func newDemoCmd(a *app) *cobra.Command {
	var o demo.Options
	var asJSON bool
	var stop string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show two sites on this machine, one of them killed under load",
		Long: `Starts two PostgreSQL servers, two agents and two gateways on this machine and lets clients write a ledger at both sites,
partly on the same rows. Each client connects to a gateway, once. Then it kills one site with kill -9, brings it back, and compares
the sites row by row and with what the clients know to be acknowledged. It ends by itself in under two minutes and removes
everything; so does Ctrl-C. Exit code 0: nothing is lost, nothing doubled, the sites are equal, and no client saw an error other
than 40001, after which it makes its transaction again; 1: not so, or it could not be run.`,
		Example: `  duri demo
  duri demo --rpo0
  duri demo --rpo0 --kill postgres
  duri demo --keep --dir /tmp/two-sites
  duri demo --duration 20s --json
  duri demo --stop /tmp/two-sites`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// A closed terminal ends it as Ctrl-C does.
			ctx, release := signal.NotifyContext(cmd.Context(), syscall.SIGHUP)
			defer release()
			if cmd.Flags().Changed("stop") {
				return a.stopDemo(ctx, stop)
			}
			if asJSON {
				a.output = "json"
			}
			o.Out, o.NoColour = a.stderr, a.noColour
			return a.runDemo(ctx, o)
		},
	}
	f := cmd.Flags()
	f.DurationVar(&o.Duration, "duration", time.Minute, "how long the clients write, as a `time`")
	f.StringVar(&o.Dir, "dir", "", "`directory` to make for everything (default: a new one for temporary files)")
	f.StringVar(&o.BinDir, "pg-bin", "", "`directory` of PostgreSQL's programs (default: DURI_PG_BIN, PATH, then the newest installed)")
	f.IntVar(&o.PortBase, "port-base", 0, "first of six consecutive `ports` on 127.0.0.1, of twelve with --rpo0 (default: free ones)")
	f.IntVar(&o.Clients, "clients", 4, "`number` of clients per site")
	f.IntVar(&o.Rate, "rate", 200, "payments per second and site, as a `number`")
	f.Uint64Var(&o.Seed, "seed", 0, "`number` that decides what the clients write (default: a random one)")
	f.BoolVar(&o.RPO0, "rpo0", false, "commits wait until the other site has them on disk, and a witness decides who goes on")
	f.StringVar(&o.Kill, "kill", demo.KillSite, "`what` dies at the first site: "+strings.Join(demo.Kills(), ", "))
	f.BoolVar(&o.Keep, "keep", false, "leave servers, agents and gateways running and say how to connect")
	f.StringVar(&stop, "stop", "", "end what --keep left in this `directory`, and remove it")
	f.BoolVar(&asJSON, "json", false, "the same as -o json")
	mustComplete(cmd.RegisterFlagCompletionFunc("kill", cobra.FixedCompletions(demo.Kills(), cobra.ShellCompDirectiveNoFileComp)))
	mustComplete(cmd.MarkFlagDirname("dir"))
	mustComplete(cmd.MarkFlagDirname("pg-bin"))
	mustComplete(cmd.MarkFlagDirname("stop"))
	return cmd
}

func (a *app) runDemo(ctx context.Context, o demo.Options) error {
	rep, err := demo.Run(ctx, o)
	if err != nil {
		var left *demo.Error // it could not remove everything
		if ctx.Err() != nil && errors.Is(err, context.Canceled) && !errors.As(err, &left) {
			return &term.Error{Msg: "interrupted", Hint: "everything that the demo made is removed", Code: term.ExitInterrupted}
		}
		return err
	}
	if err := a.print(rep, func(w io.Writer) error { return rep.Print(w, a.style()) }); err != nil {
		return err
	}
	if !rep.OK {
		return &term.Error{Msg: "the demo found something wrong", Hint: "run it again with --keep and look at the agents' logs", Code: term.ExitFailed}
	}
	return nil
}

func (a *app) stopDemo(ctx context.Context, dir string) error {
	if err := demo.Stop(ctx, dir); err != nil {
		return err
	}
	return a.print(map[string]string{"removed": dir}, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "ended the demo in %s and removed it\n", dir)
		return err
	})
}
