package main

import (
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/internal/term"
)

// gatewayViews are what duri gateway show can show: as a document, and as a table.
var gatewayViews = map[string]struct {
	part  func(gateway.Report) any
	table func(gateway.Report) *term.Table
}{
	"sessions": {func(r gateway.Report) any { return r.Sessions }, sessionsTable},
	"pools":    {func(r gateway.Report) any { return r.Pools }, poolsTable},
	"pins":     {func(r gateway.Report) any { return r.Pins }, pinsTable},
	"routes":   {func(r gateway.Report) any { return r.Routes }, routesTable},
	"stats":    {func(r gateway.Report) any { return r.Stats }, statsTable},
}

// addGatewayShow adds the subcommand show to duri gateway.
func addGatewayShow(a *app, parent *cobra.Command, socket *string) {
	names := slices.Sorted(maps.Keys(gatewayViews))
	parent.AddCommand(&cobra.Command{
		Use:   "show VIEW",
		Short: "Show sessions, pools, pins, routes or statistics of a gateway",
		Long: `It is that of the site's agent, or with the file of a gateway, or --control, one that runs alone. VIEW is one of:
  sessions   clients that have logged in: where their latest transaction ran, what they wait for, what keeps them there
  pools      clients and connections to servers, per database and user
  pins       why sessions keep their connection, and how many
  routes     where the next transaction of each user goes, or why nowhere; where reads go, and how long writers are delayed
  stats      what was counted since it started, per database, user and site`,
		Example: `  duri gateway show pools
  duri gateway show sessions -o json
  duri gateway show pins -c web1/duri.yaml`,
		ValidArgs: names,
		Args:      oneOf("view", names...),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.gatewayControl(*socket)
			if err != nil {
				return err
			}
			r, err := c.Gateway(cmd.Context())
			if err != nil {
				return err
			}
			view := gatewayViews[args[0]]
			return a.print(view.part(r), func(w io.Writer) error {
				t := view.table(r)
				if t.Len() == 0 {
					_, err := io.WriteString(w, "none\n")
					return err
				}
				return t.Write(w, a.style())
			})
		},
	})
}

// lasting prints a length of time, nothing for none.
func lasting(s float64) string {
	if s == 0 {
		return ""
	}
	return term.Duration(time.Duration(s * float64(time.Second)))
}

func sessionsTable(r gateway.Report) *term.Table {
	t := term.NewTable("PID", "USER", "DATABASE", "STATE", "SITE", "WAITING", "CLIENT", "LOGIN", "APPLICATION", "PINNED").Right(0)
	for _, s := range r.Sessions {
		t.Row(s.PID, s.User, s.Database, s.State, s.Site, lasting(s.WaitingS), s.Client, s.Login, s.Application, s.Pinned)
	}
	return t
}

func poolsTable(r gateway.Report) *term.Table {
	t := term.NewTable("DATABASE", "USER", "CLIENTS", "WAITING", "MAX WAIT", "SITE", "ACTIVE", "IDLE", "LOGIN").Right(2, 3, 6, 7, 8)
	for _, p := range r.Pools {
		servers := p.Servers
		if len(servers) == 0 {
			servers = []gateway.PoolServers{{}}
		}
		for i, s := range servers {
			if i == 0 {
				t.Row(p.Database, p.User, p.Clients, p.Waiting, lasting(p.MaxWaitS), s.Site, s.Active, s.Idle, s.Login)
			} else {
				t.Row("", "", "", "", "", s.Site, s.Active, s.Idle, s.Login)
			}
		}
	}
	return t
}

func pinsTable(r gateway.Report) *term.Table {
	t := term.NewTable("REASON", "SESSIONS").Right(1)
	for _, why := range slices.Sorted(maps.Keys(r.Pins)) {
		t.Row(why, r.Pins[why])
	}
	return t
}

func routesTable(r gateway.Report) *term.Table {
	t := term.NewTable("DATABASE", "USER", "SITE", "ADDRESS", "EPOCH", "READS AT", "DELAY", "PROBLEM").Right(4, 6)
	for _, x := range r.Routes {
		t.Row(x.Database, x.User, x.Site, x.Address, x.Epoch, x.ReadsText(), lasting(x.DelayS), strings.ReplaceAll(x.Problem, "\n", " "))
	}
	return t
}

func statsTable(r gateway.Report) *term.Table {
	t := term.NewTable("DATABASE", "USER", "SITE", "TRANSACTIONS", "QUERIES", "RECEIVED", "SENT", "MOVES", "READS AWAY", "IN TRANSACTIONS", "IN QUERIES", "WAITED").
		Right(3, 4, 5, 6, 7, 8, 9, 10, 11)
	for _, x := range r.Stats {
		t.Row(x.Database, x.User, x.Site, term.Count(int64(x.Transactions)), term.Count(int64(x.Queries)), term.Size(int64(x.Received)), term.Size(int64(x.Sent)),
			term.Count(int64(x.Moves)), term.Count(int64(x.ReadsAway)), lasting(x.TransactionS), lasting(x.QueryS), lasting(x.WaitS))
	}
	return t
}
