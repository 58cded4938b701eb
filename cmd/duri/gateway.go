package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/server"
)

func newGatewayCmd(a *app) *cobra.Command {
	var home, listen string
	cmd := &cobra.Command{
		Use:   "gateway",
		Short: "Run a gateway for clients, beside an application",
		Long: `Clients connect to it as to PostgreSQL, and keep their sessions while sites come and go: each transaction goes to a site that
may serve it, the home site first. It reaches the sites through their agents, needs no PostgreSQL of its own, and there may be
any number. It runs until it is interrupted; SIGHUP reads its limits again. The agent of a site has one within it (gateway.listen).

The file is one for a gateway (gateway.name), or a site's.`,
		Example: `  duri gateway -c web1/duri.yaml
  duri gateway -c web1/duri.yaml --home busan --listen 127.0.0.1:6432`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.anyConfig()
			if err != nil {
				return err
			}
			if listen != "" {
				cfg.Gateway.Listen = listen
			}
			tuneGC()
			g, err := server.NewGateway(cfg, home, readVersion().Version, newLogger(a.stderr, cfg.Log))
			if err != nil {
				return err
			}
			defer onHangup(g.ReloadLogged)()
			return g.Run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&home, "home", "", "`site` that sessions go to as long as it serves them (default: site of the file)")
	cmd.Flags().StringVar(&listen, "listen", "", "`host:port` for clients (default: gateway.listen)")
	cmd.AddCommand(newGatewayNewCmd(a))
	addGatewayShow(a, cmd)
	return cmd
}

func newGatewayNewCmd(a *app) *cobra.Command {
	var spec config.GatewaySpec
	cmd := &cobra.Command{
		Use:   "new NAME",
		Short: "Make the folder of a gateway: its certificate and duri.yaml",
		Long: `The folder goes as a whole to where the gateway is to run. It is made where the cluster's authority is (the folder ca that
duri init made), with the sites of a site's file. The certificate lets its holder reach the sites' PostgreSQL with the password
of a role, and read the verifiers of passwords; it is not that of a site.`,
		Example: `  duri gateway new web1 -c cluster/seoul/duri.yaml --ca cluster/ca --out cluster/web1
  duri gateway new web1 -c cluster/seoul/duri.yaml --ca cluster/ca --out cluster/web1 --home busan --listen :6432`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return term.Usage(cmd.CommandPath()+" takes one argument, the name of the gateway", "see: "+cmd.CommandPath()+" --help")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			cfg, err := a.anyConfig()
			if err != nil {
				return err
			}
			if spec.Name = args[0]; spec.Home == "" {
				spec.Home = cfg.Site
			}
			if err := config.AddGateway(cfg, spec); err != nil {
				return err
			}
			out := struct {
				Name string `json:"name"`
				Out  string `json:"out"`
			}{spec.Name, spec.Out}
			return a.print(out, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "%s: certificate and duri.yaml of gateway %s; run it with: duri gateway -c %s/%s\n", spec.Out, spec.Name, spec.Out, config.FileName)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&spec.Home, "home", "", "`site` that is nearest (default: site of the file)")
	cmd.Flags().StringVar(&spec.Listen, "listen", "127.0.0.1:6432", "`host:port` for clients")
	cmd.Flags().StringVar(&spec.CA, "ca", "ca", "`folder` of the cluster's authority")
	cmd.Flags().StringVar(&spec.Out, "out", "", "`folder` to make")
	return cmd
}
