package main

import "github.com/spf13/cobra"

func newGatewayCmd(a *app) *cobra.Command {
	cmd := noun(&cobra.Command{
		Use:   "gateway",
		Short: "Look into the way of clients through the agent",
		Long: `With gateway.mode session or transaction the agent authenticates clients and keeps their sessions. More than is shown here, and
commands such as PAUSE, are in the gateway's own database: connect to database duri at gateway.listen.`,
		Example: `  duri gateway show pools
  duri gateway show sessions -o json`,
	})
	addGatewayShow(a, cmd)
	return cmd
}
