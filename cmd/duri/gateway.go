package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/server"
)

func newGatewayCmd(a *app) *cobra.Command {
	var home, listen string
	var run server.GatewayRun
	cmd := &cobra.Command{
		Use:   "gateway",
		Short: "Run a gateway for clients, beside an application",
		Long: `Clients connect to it as to PostgreSQL, and keep their sessions while sites come and go: each transaction goes to a site that
may serve it, the home site first. It reaches the sites through their agents, needs no PostgreSQL of its own, and there may be
any number. It runs until it is interrupted; SIGHUP reads its limits again. The agent of a site has one within it (gateway.listen).

The file is one for a gateway (gateway.name), or a site's.

With --takeover it takes over from the gateway of the same file that runs, if one does: that one's listening socket, and its
clients' connections with their sessions as soon as each is between two transactions. Clients do not notice. Those that cannot be
handed over (TLS, LISTEN, temporary objects, mode session, ...) are served by the old process until they are between two
transactions, and then asked to connect again (57P01). It ends when none is left, or after --drain.`,
		Example: `  duri gateway -c web1/duri.yaml
  duri gateway -c web1/duri.yaml --takeover --drain 5m
  duri gateway -c web1/duri.yaml --home busan --listen 127.0.0.1:6432 --control busan.sock`,
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
			if run.Drain <= 0 {
				return term.Usage("--drain is no time above 0", "write one like 60s or 5m")
			}
			defer onHangup(g.ReloadLogged)()
			return g.Run(cmd.Context(), run)
		},
	}
	cmd.Flags().StringVar(&home, "home", "", "`site` that sessions go to as long as it serves them (default: site of the file)")
	cmd.Flags().StringVar(&listen, "listen", "", "`host:port` for clients (default: gateway.listen)")
	cmd.Flags().BoolVar(&run.Takeover, "takeover", false, "take over from the gateway that runs, if one does")
	cmd.Flags().DurationVar(&run.Drain, "drain", server.DefaultDrain, "`time` after which the old process ends sessions that cannot be handed over")
	cmd.PersistentFlags().StringVar(&run.Control, "control", "", "`path` of the control socket (default: control.sock in data_dir; gateway.sock with a site's file)")
	cmd.AddCommand(newGatewayNewCmd(a), newGatewayStatusCmd(a, &run.Control), newGatewayLoginCACmd(a))
	addGatewayShow(a, cmd, &run.Control)
	return cmd
}

// gatewayControl is the way to the gateway of a file: one that runs alone, or that of a site's agent.
func (a *app) gatewayControl(socket string) (*server.Control, error) {
	cfg, err := a.anyConfig()
	if err != nil {
		return nil, err
	}
	return server.NewGatewayControl(cfg, socket), nil
}

func newGatewayStatusCmd(a *app, socket *string) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show whether a gateway that runs alone takes clients, and how many it has",
		Example: `  duri gateway status -c web1/duri.yaml
  duri gateway status -c web1/duri.yaml -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.gatewayControl(*socket)
			if err != nil {
				return err
			}
			r, err := c.StandaloneGateway(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) error { return printGateway(w, r) })
		},
	}
}

func printGateway(w io.Writer, r server.GatewayReport) error {
	takes := "takes clients"
	if r.Shut != "" {
		takes = "takes no clients: " + r.Shut
	}
	text := fmt.Sprintf("gateway %s %s: process %d, version %s, mode %s, listens on %s, home %s, up for %s\n%d clients, %d logins\n",
		r.Name, takes, r.PID, r.Version, r.Mode, r.Listen, r.Home, term.Duration(time.Duration(r.UptimeS*float64(time.Second))), r.Clients, r.Logins)
	if p := r.Predecessor; p != nil {
		var whys []string
		for _, why := range slices.Sorted(maps.Keys(p.Why)) {
			whys = append(whys, fmt.Sprintf("%d: %s", p.Why[why], why))
		}
		text += fmt.Sprintf("it takes over from another process, which has %d clients left", p.Clients)
		if len(whys) > 0 {
			text += ": " + strings.Join(whys, "; ")
		}
		text += "\n"
	}
	_, err := io.WriteString(w, text)
	return err
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
