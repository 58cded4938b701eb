package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/quorum/etcdstore"
)

func newWitnessCmd(a *app) *cobra.Command {
	var replace bool
	cmd := &cobra.Command{
		Use:   "witness",
		Short: "Run the witness: a voter without user data",
		Example: `  duri witness -c witness/duri.yaml
  duri witness -c witness/duri.yaml --replace`,
		Long: "The witness is the third voter of two sites: when they lose each other, it lets exactly one of them go on. It keeps\n" +
			"only which sites may acknowledge, so another authority may host it. It runs until it is interrupted.\n\n" +
			"A witness that has lost its data directory is refused, as it must not vote as if it were the old one. With\n" +
			"--replace it is taken out of the voters first and added anew; a majority of the others must run.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.anyConfig()
			if err != nil {
				return err
			}
			if c.Witness == "" {
				return term.Usage(c.Path()+" is the configuration of site "+c.Site+", not of a witness", "duri init --witness HOST makes one; the agent of a site is itself a voter")
			}
			return runWitness(cmd.Context(), a, c, replace)
		},
	}
	cmd.Flags().BoolVar(&replace, "replace", false, "join anew after the data directory was lost")
	return cmd
}

func runWitness(ctx context.Context, a *app, c *config.Config, replace bool) error {
	log := newLogger(a.stderr, c.Log)
	voter, _ := etcdstore.MemberOf(c, log) // config has checked that there is one
	if replace {
		if err := replaceVoter(ctx, c, log); err != nil {
			return err
		}
		voter.Join = true
	}
	m, err := etcdstore.StartMember(ctx, voter)
	if etcdstore.IsLost(err) {
		return lostVoter{err}
	}
	if err != nil {
		return err
	}
	defer m.Close()
	select {
	case <-ctx.Done():
		return nil
	case <-m.Done():
		return m.Err()
	case <-m.Ready():
	}
	own, _ := c.Voter()
	fmt.Fprintf(a.stdout, "duri: witness %s of cluster %s serves at %s and %s\n", c.Witness, c.Cluster.Name, own.Peer, own.Client)
	log.Info("the witness serves", "cluster", c.Cluster.Name, "peer", own.Peer, "client", own.Client)
	select {
	case <-ctx.Done():
	case <-m.Done():
		return m.Err()
	}
	log.Info("the witness ends")
	return nil
}

// replaceVoter asks the others.
func replaceVoter(ctx context.Context, c *config.Config, log *slog.Logger) error {
	client, err := etcdstore.ClientOf(c, log)
	if err != nil {
		return err
	}
	own, _ := c.Voter()
	client.Endpoints = slices.DeleteFunc(client.Endpoints, func(e string) bool { return e == own.Client })
	return etcdstore.Replace(ctx, client, etcdstore.Voter(own))
}

// lostVoter adds what to do.
type lostVoter struct{ error }

// Unwrap gives the cause.
func (e lostVoter) Unwrap() error { return e.error }

// HintText is what the user can do.
func (lostVoter) HintText() string {
	return "if it is really lost: duri witness --replace; if data_dir only points elsewhere, correct it"
}
