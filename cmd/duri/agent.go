package main

import (
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/server"
)

func newAgentCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "agent",
		Short: "Run the agent of this site",
		Long: `The agent decodes the site's changes into a journal, exchanges journals with the other sites' agents and applies
theirs. It runs until it is interrupted; killed at any moment, it goes on where it stopped. SIGHUP reads the gateway's limits
again from its configuration.`,
		Example: `  duri agent -c seoul/duri.yaml
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
			defer onHangup(agent.ReloadLogged)()
			return agent.Run(cmd.Context())
		},
	}
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
