package main

import (
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/server"
)

func newAgentCmd(a *app) *cobra.Command {
	var takeover bool
	var drain time.Duration
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run the agent of this site",
		Long: `The agent decodes the site's changes into a journal, exchanges journals with the other sites' agents and applies
theirs. It runs until it is interrupted; killed at any moment, it goes on where it stopped. SIGHUP reads the gateway's limits
again from its configuration.

With --takeover it takes the place of the agent of the same data_dir that runs, if one does, without dropping the clients that come
through it (gateway.mode session or transaction): it gets the listening socket, and the connections of clients without TLS with their
sessions, each between two transactions. Others (TLS, LISTEN, temporary objects, mode session, ...) are asked to connect again (57P01)
outside a transaction. When none is left, or after --drain, the running agent ends, and this one opens data_dir; sessions go on at
other sites meanwhile, or wait for a moment.`,
		Example: `  duri agent -c seoul/duri.yaml
  duri agent -c seoul/duri.yaml --takeover --drain 5m
  DURI_LOG_LEVEL=debug duri agent -c seoul/duri.yaml`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			tuneGC()
			agent, err := server.New(cfg, readVersion().Version, newLogger(a.stderr, cfg.Log))
			if err != nil {
				return err
			}
			if drain <= 0 {
				return term.Usage("--drain is no time above 0", "write one like 60s or 5m")
			}
			defer onHangup(agent.ReloadLogged)()
			if takeover {
				return agent.TakeOver(cmd.Context(), drain)
			}
			return agent.Run(cmd.Context())
		},
	}
	cmd.Flags().BoolVar(&takeover, "takeover", false, "take over from the agent that runs, if one does")
	cmd.Flags().DurationVar(&drain, "drain", server.DefaultDrain, "`time` after which the running agent ends sessions that cannot be handed over")
	return cmd
}

// onHangup calls f with each SIGHUP until stop is called.
func onHangup(f func()) (stop func()) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	go func() {
		for range hup {
			f()
		}
	}()
	return func() {
		signal.Stop(hup)
		close(hup)
	}
}

// newLogger writes the agent's log as the configuration asks.
func newLogger(w io.Writer, c config.Log) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(c.Level)) // config has checked it
	o := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
