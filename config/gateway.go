package config

import (
	"fmt"
	"slices"
)

// Gateway is the way of clients to PostgreSQL through the agent, or through a process of its own.
type Gateway struct {
	// Name is that of a gateway that runs alone, as in its certificate; empty in the file of a site's agent.
	Name   string      `yaml:"name" json:"name"`
	Listen string      `yaml:"listen" json:"listen"` // host:port; empty: clients do not come this way
	Mode   GatewayMode `yaml:"mode" json:"mode"`
	Cert   string      `yaml:"cert" json:"cert"` // PEM files for clients; empty: no TLS, and not with GatewayDoor
	Key    string      `yaml:"key" json:"key"`
	// Routes give sessions a home; the first that fits counts. None fits: the own site.
	Routes []Route `yaml:"routes" json:"routes"`
	// RehomeEvery sends every n-th transaction to the next site, for tests of applications; 0: none.
	RehomeEvery int `yaml:"rehome_every" json:"rehome_every"`

	// These are not for GatewayDoor. They are read again by Agent.Reload.
	Admins     []string `yaml:"admins" json:"admins"` // roles that may use the database duri; empty: the agent's
	Replay     []string `yaml:"replay" json:"replay"` // roles whose open transactions are run again at another site
	ClientsMax int      `yaml:"clients_max" json:"clients_max"`
	PoolSize   int      `yaml:"pool_size" json:"pool_size"`
	Hold       Duration `yaml:"hold" json:"hold"` // how long a client may wait for a connection, or for a site that may serve
	Idle       Duration `yaml:"idle" json:"idle"` // how long a connection is kept that nobody uses
	Strict     bool     `yaml:"strict" json:"strict"`
	LoginRate  int      `yaml:"login_rate" json:"login_rate"` // per second and address
}

// Route gives the sessions that it fits a home site. What is empty fits all.
type Route struct {
	Database    string `yaml:"database" json:"database"`
	Role        string `yaml:"role" json:"role"`
	Application string `yaml:"application_name" json:"application_name"`
	Site        string `yaml:"site" json:"site"`
}

// Home is the home that the routes give a session; empty: none fits.
func (g Gateway) Home(database, role, application string) string {
	fits := func(want, is string) bool { return want == "" || want == is }
	for _, r := range g.Routes {
		if fits(r.Database, database) && fits(r.Role, role) && fits(r.Application, application) {
			return r.Site
		}
	}
	return ""
}

// GatewayMode is what the agent does with what passes.
type GatewayMode string

// The modes.
const (
	GatewayDoor        GatewayMode = "door"        // hands bytes on
	GatewaySession     GatewayMode = "session"     // authenticates clients; each has a connection to the server
	GatewayTransaction GatewayMode = "transaction" // authenticates clients; each transaction has one
)

// Authenticates reports whether gateways check clients' passwords, for which verifiers are read here: the agent's own, and those
// elsewhere that it takes connections of.
func (g Gateway) Authenticates() bool { return g.Mode != GatewayDoor }

func (d *decoder) validateGateway(c *Config) {
	g := c.Gateway
	if g.Listen != "" {
		d.address("gateway.listen", g.Listen, false)
	}
	d.choice("gateway.mode", string(g.Mode), string(GatewayDoor), string(GatewaySession), string(GatewayTransaction))
	for i, r := range g.Routes {
		key := fmt.Sprintf("gateway.routes[%d].site", i)
		if _, ok := c.SiteByName(r.Site); !d.missing(key, r.Site == "", "the name of a site") && !ok {
			d.invalid(key, fmt.Sprintf("%s %q is not in sites", key, r.Site), "name one of the sites")
		}
	}
	within(d, "gateway.rehome_every", g.RehomeEvery, 0, 1_000_000)
	within(d, "gateway.clients_max", g.ClientsMax, 1, 1_000_000)
	within(d, "gateway.pool_size", g.PoolSize, 1, 10_000)
	within(d, "gateway.hold", g.Hold, 10*Millisecond, Hour)
	within(d, "gateway.idle", g.Idle, Second, 24*Hour)
	within(d, "gateway.login_rate", g.LoginRate, 1, 1_000_000)
	for list, roles := range map[string][]string{"gateway.admins": g.Admins, "gateway.replay": g.Replay} {
		seen := map[string]int{}
		for i, role := range roles {
			key := fmt.Sprintf("%s[%d]", list, i)
			d.identifier(key, role)
			unique(d, seen, role, key)
		}
	}
	if g.Mode == GatewayDoor {
		if g.Cert != "" || g.Key != "" {
			d.invalid("gateway.cert", "gateway.cert and gateway.key are not for the mode door", "TLS is between client and PostgreSQL there; remove them, or set gateway.mode")
		}
		for key, set := range map[string]bool{"gateway.routes": len(g.Routes) > 0, "gateway.rehome_every": g.RehomeEvery > 0, "gateway.name": g.Name != ""} {
			if set {
				d.invalid(key, key+" is not for the mode door", "nothing is looked into there, and it leads to its own site only; remove it, or set gateway.mode")
			}
		}
		return
	}
	if (g.Cert == "") != (g.Key == "") {
		d.invalid("gateway.cert", "gateway.cert and gateway.key go together", "give both files, or none for connections without TLS")
	}
}

// validateAlone checks what the file of a gateway that runs alone has in place of a site's.
func (d *decoder) validateAlone(c *Config) {
	if !namePattern.MatchString(c.Gateway.Name) {
		d.invalid("gateway.name", fmt.Sprintf("gateway.name %q is not a name", c.Gateway.Name), nameHint)
	}
	if c.Witness != "" {
		d.invalid("gateway.name", "witness and gateway.name are both given", "a witness keeps a file of its own")
	}
	if _, known := c.SiteByName(c.Site); c.Site != "" && !known && len(c.Sites) > 0 {
		d.invalid("site", fmt.Sprintf("site %q is not in sites", c.Site), "name the site that is nearest, or none")
	}
	d.missing("gateway.listen", c.Gateway.Listen == "", "host:port for clients, for example 127.0.0.1:6432")
	d.validateGateway(c)
}

// Alone reports whether the file is that of a gateway that runs alone.
func (c *Config) Alone() bool { return c.Gateway.Name != "" }

// SiteNames are those of all sites, in the order of the file.
func (c *Config) SiteNames() (names []string) {
	for _, s := range c.Sites {
		names = append(names, s.Name)
	}
	return slices.Clip(names)
}
