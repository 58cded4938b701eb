package config

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Gateway is the way of clients to PostgreSQL through the agent, or through a process of its own.
type Gateway struct {
	// Name is that of a gateway that runs alone, as in its certificate; empty in the file of a site's agent.
	Name   string      `yaml:"name" json:"name"`
	Listen string      `yaml:"listen" json:"listen"` // host:port; empty: clients do not come this way
	Mode   GatewayMode `yaml:"mode" json:"mode"`
	Cert   string      `yaml:"cert" json:"cert"` // PEM files for clients; empty: no TLS, and not with GatewayDoor
	Key    string      `yaml:"key" json:"key"`
	// ClientCA is a PEM file with the authorities of clients' certificates, with which these log in without a password; empty: none do.
	ClientCA string `yaml:"client_ca" json:"client_ca"`
	// LoginCA logs the roles of such clients in at this site's PostgreSQL.
	LoginCA LoginCA `yaml:"login_ca" json:"login_ca"`
	// Routes give sessions a home; the first that fits counts. None fits: the own site.
	Routes []Route `yaml:"routes" json:"routes"`
	// RehomeEvery sends every n-th transaction to the next site, for tests of applications; 0: none.
	RehomeEvery int `yaml:"rehome_every" json:"rehome_every"`
	// Reads lets other sites than a session's home serve its reads. For GatewayTransaction.
	Reads Reads `yaml:"reads" json:"reads"`
	// SlowDown delays transactions that write when other sites fall behind. For GatewayTransaction.
	SlowDown SlowDown `yaml:"slow_down" json:"slow_down"`

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

// LoginCA is the authority that signs short-lived certificates of roles for the agent's connections to PostgreSQL.
type LoginCA struct {
	Cert  string   `yaml:"cert" json:"cert"` // PEM files; empty: nobody is logged in by certificate here
	Key   string   `yaml:"key" json:"key"`
	Roles []string `yaml:"roles" json:"roles"` // that it is for; empty: all that pg_hba.conf lets in so
}

// On reports whether there is one.
func (l LoginCA) On() bool { return l.Cert != "" }

// Route gives the sessions that it fits a home site. What is empty fits all.
type Route struct {
	Database    string `yaml:"database" json:"database"`
	Role        string `yaml:"role" json:"role"`
	Application string `yaml:"application_name" json:"application_name"`
	Site        string `yaml:"site" json:"site"`
	// Reads are in the place of Gateway.Reads for these sessions; what is not given is as there.
	Reads Reads `yaml:"reads" json:"reads"`
}

// Reads is where reads go.
type Reads struct {
	// Weights are shares of the sessions, by site; empty: all read at their home.
	Weights map[string]int `yaml:"weights" json:"weights"`
	// LagMax is how far a site may be behind the others and still serve reads.
	LagMax Duration `yaml:"lag_max" json:"lag_max"`
	// WaitMax is how long a read may wait until a site has what its session has seen, before it goes home instead.
	WaitMax Duration `yaml:"wait_max" json:"wait_max"`
}

// SlowDown is how transactions that write are delayed: not at all below From, by Most from To on.
type SlowDown struct {
	From Size     `yaml:"from" json:"from"` // of a site's WAL that another one has not applied; 0: nobody is delayed
	To   Size     `yaml:"to" json:"to"`
	Most Duration `yaml:"most" json:"most"`
}

// On reports whether anybody is delayed.
func (s SlowDown) On() bool { return s.From > 0 }

// Delay is that of a transaction at a site of whose WAL another one has not applied so many bytes.
func (s SlowDown) Delay(backlog int64) time.Duration {
	switch {
	case !s.On() || backlog <= s.From.Bytes():
		return 0
	case backlog >= s.To.Bytes():
		return s.Most.Std()
	}
	return time.Duration(float64(s.Most) * (float64(backlog-s.From.Bytes()) / float64(s.To-s.From)))
}

// Home is the home that the routes give a session; empty: none fits.
func (g Gateway) Home(database, role, application string) string {
	if r := g.route(database, role, application); r != nil {
		return r.Site
	}
	return ""
}

// ReadsOf is where a session's reads go.
func (g Gateway) ReadsOf(database, role, application string) Reads {
	reads := g.Reads
	if r := g.route(database, role, application); r != nil {
		if len(r.Reads.Weights) > 0 {
			reads.Weights = r.Reads.Weights
		}
		reads.LagMax, reads.WaitMax = cmp.Or(r.Reads.LagMax, reads.LagMax), cmp.Or(r.Reads.WaitMax, reads.WaitMax)
	}
	return reads
}

// RoutesReads reports whether any session's reads may go to another site than its home.
func (g Gateway) RoutesReads() bool {
	return len(g.Reads.Weights) > 0 || slices.ContainsFunc(g.Routes, func(r Route) bool { return len(r.Reads.Weights) > 0 })
}

// route is the first that fits a session; nil: none does.
func (g Gateway) route(database, role, application string) *Route {
	fits := func(want, is string) bool { return want == "" || want == is }
	for i := range g.Routes {
		r := &g.Routes[i]
		if fits(r.Database, database) && fits(r.Role, role) && fits(r.Application, application) {
			return r
		}
	}
	return nil
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
		key = fmt.Sprintf("gateway.routes[%d].reads", i)
		d.validateWeights(key, r.Reads.Weights, c)
		if r.Reads.LagMax != 0 {
			within(d, key+".lag_max", r.Reads.LagMax, lagLeast, Hour)
		}
		within(d, key+".wait_max", r.Reads.WaitMax, 0, Second)
	}
	d.validateWeights("gateway.reads", g.Reads.Weights, c)
	within(d, "gateway.reads.lag_max", g.Reads.LagMax, lagLeast, Hour)
	within(d, "gateway.reads.wait_max", g.Reads.WaitMax, 0, Second)
	d.validateSlowDown(g.SlowDown)
	if g.Mode == GatewaySession {
		for key, set := range map[string]bool{"gateway.reads": g.RoutesReads(), "gateway.slow_down": g.SlowDown.On()} {
			if set {
				d.invalid(key, key+" is not for the mode session", "transactions are not told apart there; remove it, or set gateway.mode: transaction")
			}
		}
	}
	within(d, "gateway.rehome_every", g.RehomeEvery, 0, 1_000_000)
	within(d, "gateway.clients_max", g.ClientsMax, 1, 1_000_000)
	within(d, "gateway.pool_size", g.PoolSize, 1, 10_000)
	within(d, "gateway.hold", g.Hold, 10*Millisecond, Hour)
	within(d, "gateway.idle", g.Idle, Second, 24*Hour)
	within(d, "gateway.login_rate", g.LoginRate, 1, 1_000_000)
	for list, roles := range map[string][]string{"gateway.admins": g.Admins, "gateway.replay": g.Replay, "gateway.login_ca.roles": g.LoginCA.Roles} {
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
		for key, set := range map[string]bool{
			"gateway.routes": len(g.Routes) > 0, "gateway.rehome_every": g.RehomeEvery > 0, "gateway.name": g.Name != "",
			"gateway.reads": len(g.Reads.Weights) > 0, "gateway.slow_down": g.SlowDown.On(), "gateway.client_ca": g.ClientCA != "",
			"gateway.login_ca": g.LoginCA.On() || g.LoginCA.Key != "",
		} {
			if set {
				d.invalid(key, key+" is not for the mode door", "nothing is looked into there, and it leads to its own site only; remove it, or set gateway.mode")
			}
		}
		return
	}
	if (g.Cert == "") != (g.Key == "") {
		d.invalid("gateway.cert", "gateway.cert and gateway.key go together", "give both files, or none for connections without TLS")
	}
	d.validateClientCerts(c)
}

// validateClientCerts checks what logins by certificate need.
func (d *decoder) validateClientCerts(c *Config) {
	const make1 = "make both files with: duri gateway login-ca"
	g := c.Gateway
	switch {
	case g.LoginCA.On() != (g.LoginCA.Key != ""):
		d.invalid("gateway.login_ca", "gateway.login_ca.cert and gateway.login_ca.key go together", make1)
	case !g.LoginCA.On() && len(g.LoginCA.Roles) > 0:
		d.invalid("gateway.login_ca", "gateway.login_ca.roles is given without gateway.login_ca.cert", make1)
	case g.LoginCA.On() && c.Alone():
		d.invalid("gateway.login_ca", "gateway.login_ca is not for a gateway that runs alone", "remove it here: the agents log in at their PostgreSQL, each by its own")
	}
	switch {
	case g.ClientCA == "":
	case g.Cert == "":
		d.invalid("gateway.client_ca", "gateway.client_ca is given without gateway.cert", "clients show certificates in TLS only: give gateway.cert and gateway.key")
	case !c.Alone() && !g.LoginCA.On():
		d.invalid("gateway.client_ca", "gateway.client_ca is given without gateway.login_ca", "nothing would log these clients in at this site's PostgreSQL; "+make1)
	}
}

// lagLeast is the least lag that can be told from none: states of sites are told in steps of about that.
const lagLeast = 100 * Millisecond

// weightMax keeps sums of weights small.
const weightMax = 1000

// validateWeights checks what share of reads sites have.
func (d *decoder) validateWeights(key string, weights map[string]int, c *Config) {
	sum := 0
	for _, site := range slices.Sorted(maps.Keys(weights)) {
		at := entry(key+".weights", site)
		if _, ok := c.SiteByName(site); !ok {
			d.invalid(at, fmt.Sprintf("%s.weights: %q is not in sites", key, site), "name sites: "+strings.Join(c.SiteNames(), ", "))
		}
		within(d, at, weights[site], 0, weightMax)
		sum += weights[site]
	}
	if len(weights) > 0 && sum == 0 {
		d.invalid(key+".weights", key+".weights gives no site any reads", "give one of them 1, or remove the key: then reads stay at the home of their session")
	}
}

// validateSlowDown checks the ramp.
func (d *decoder) validateSlowDown(s SlowDown) {
	if !s.On() {
		return
	}
	within(d, "gateway.slow_down.from", s.From, MiB, TiB)
	if s.To <= s.From {
		d.invalid("gateway.slow_down.to", fmt.Sprintf("gateway.slow_down.to is %s, want more than gateway.slow_down.from, which is %s", s.To, s.From), "the delay grows between the two; a good beginning is four times as much")
	}
	within(d, "gateway.slow_down.to", s.To, MiB, TiB)
	within(d, "gateway.slow_down.most", s.Most, Millisecond, 10*Second)
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
