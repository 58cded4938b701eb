package config

import (
	"cmp"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// Quorum is where the register is kept: voters that run inside the agents and the witness, or an etcd of somebody
// else. Neither: there is no register.
type Quorum struct {
	Members  []Voter  `yaml:"members" json:"members"`
	External []string `yaml:"external" json:"external"` // https URLs
	TLS      TLS      `yaml:"tls" json:"tls"`           // for External only; all empty: the cluster's own files
}

// Voter is one of the voters as all know it.
type Voter struct {
	Name   string `yaml:"name" json:"name"`     // of a site, or of the witness
	Peer   string `yaml:"peer" json:"peer"`     // host:port for the other voters
	Client string `yaml:"client" json:"client"` // host:port for the agents
}

// Level says whether commits may wait for other sites.
type Level string

// The levels.
const (
	Async Level = "async" // a commit is acknowledged when its own site has it
	Sync  Level = "sync"  // commits at synchronous_commit = on wait for receipts
)

// Partition is what sites do that lose each other.
type Partition string

// The policies, as durability.policy names them.
const (
	DurabilityFirst   Partition = "durability-first"   // one side goes on, as the register decides
	AvailabilityFirst Partition = "availability-first" // all go on
	PreferredSite     Partition = "preferred-site"     // the preferred site goes on
	ReadOnlyOnDoubt   Partition = "read-only-on-doubt" // nobody writes
)

// Partitions are all policies.
var Partitions = []Partition{DurabilityFirst, AvailabilityFirst, PreferredSite, ReadOnlyOnDoubt}

// Durability is what an acknowledged commit promises.
type Durability struct {
	Level     Level     `yaml:"level" json:"level"`
	Receipts  int       `yaml:"receipts" json:"receipts"` // other sites that hold a commit durably
	Policy    Partition `yaml:"policy" json:"policy"`
	Preferred string    `yaml:"preferred" json:"preferred"` // site of PreferredSite
	Detect    Duration  `yaml:"detect" json:"detect"`       // silence after which a peer is taken for dead
	Rearm     Duration  `yaml:"rearm" json:"rearm"`         // how long a link must be stable before its site is taken back
	// ReturningTail is what becomes of transactions that a site which was left out had committed and nobody acknowledged.
	ReturningTail Tail `yaml:"returning_tail" json:"returning_tail"`
}

// Tail is what becomes of such transactions.
type Tail string

// The ways to deal with a tail. Transactions without a mark may have been acknowledged, and are always merged.
const (
	Reverse Tail = "reverse" // they do not count, and are reversed at their own site
	Merge   Tail = "merge"   // they go to the other sites with their versions
)

// HasRegister reports whether the cluster keeps a register.
func (c *Config) HasRegister() bool { return len(c.Quorum.Members)+len(c.Quorum.External) > 0 }

// DurabilityOf is the level of a database: its own, or the cluster's.
func (c *Config) DurabilityOf(database string) Level {
	if db, ok := c.Database(database); ok && db.Durability != "" {
		return db.Durability
	}
	return c.Durability.Level
}

// Waits reports whether commits of a database may wait for other sites. Availability first waits for nobody.
func (c *Config) Waits(database string) bool {
	return c.DurabilityOf(database) == Sync && c.Durability.Policy != AvailabilityFirst
}

// WitnessName is the voter that is not a site; empty when there is none.
func (c *Config) WitnessName() string {
	for _, v := range c.Quorum.Members {
		if _, site := c.SiteByName(v.Name); !site {
			return v.Name
		}
	}
	return ""
}

// Name is that of the own site, or of the witness or gateway: the name in the certificate.
func (c *Config) Name() string { return cmp.Or(c.Gateway.Name, c.Site, c.Witness) }

// Voter is the voter that runs here, in the agent or as the witness; false when none does.
func (c *Config) Voter() (Voter, bool) {
	for _, v := range c.Quorum.Members {
		if v.Name == c.Name() {
			return v, true
		}
	}
	return Voter{}, false
}

// RegisterEndpoints are the addresses of the register's clients.
func (c *Config) RegisterEndpoints() []string {
	all := slices.Clone(c.Quorum.External)
	for _, v := range c.Quorum.Members {
		all = append(all, v.Client)
	}
	return all
}

func (d *decoder) validateQuorum(c *Config) {
	q := c.Quorum
	if len(q.Members) > 0 && len(q.External) > 0 {
		d.invalid("quorum.external", "quorum has both members and external", "keep one of them: the voters of the cluster, or an etcd that somebody else keeps")
	}
	if q.TLS != (TLS{}) && len(q.External) == 0 {
		d.invalid("quorum.tls", "quorum.tls is for external only", "members use the files of tls")
	}
	for key, file := range map[string]string{"ca": q.TLS.CA, "cert": q.TLS.Cert, "key": q.TLS.Key} {
		if q.TLS != (TLS{}) {
			d.missing("quorum.tls."+key, file == "", "give all three files, or none for those of tls")
		}
	}
	for i, e := range q.External {
		key := fmt.Sprintf("quorum.external[%d]", i)
		if u, err := url.Parse(e); err != nil || u.Scheme != "https" || u.Host == "" || u.Path != "" {
			d.invalid(key, fmt.Sprintf("%s %q is not https://host:port", key, e), "for example https://etcd.example:2379")
		}
	}
	if len(q.Members) == 0 {
		return
	}
	names, addresses := map[string]int{}, map[string]int{}
	var strangers []string
	for i, v := range q.Members {
		key := fmt.Sprintf("quorum.members[%d]", i)
		if !d.missing(key+".name", v.Name == "", "the name of a site, or of the witness") && !namePattern.MatchString(v.Name) {
			d.invalid(key+".name", fmt.Sprintf("%s.name %q is not a name", key, v.Name), nameHint)
		}
		unique(d, names, v.Name, key+".name")
		d.address(key+".peer", v.Peer, true)
		d.address(key+".client", v.Client, true)
		unique(d, addresses, v.Peer, key+".peer")
		unique(d, addresses, v.Client, key+".client")
		if _, site := c.SiteByName(v.Name); !site {
			strangers = append(strangers, v.Name)
		}
	}
	if len(strangers) > 1 {
		d.invalid("quorum.members", fmt.Sprintf("quorum.members has %d that are no sites: %s", len(strangers), strings.Join(strangers, ", ")), "one may be the witness; is a name misspelled?")
	}
	if n := len(q.Members); n < 3 || n%2 == 0 {
		d.invalid("quorum.members", fmt.Sprintf("quorum.members has %d, want an odd number from 3", n), "name three voters in three places: with two sites, the third is a witness")
	}
}

func (d *decoder) validateDurability(c *Config) {
	u := c.Durability
	d.choice("durability.level", string(u.Level), string(Async), string(Sync))
	d.choice("durability.policy", string(u.Policy), texts(Partitions)...)
	within(d, "durability.receipts", u.Receipts, 1, max(1, len(c.Sites)-1))
	within(d, "durability.detect", u.Detect, 500*Millisecond, 60*Second)
	if u.ReturningTail != Reverse && u.ReturningTail != Merge {
		d.invalid("durability.returning_tail", fmt.Sprintf("durability.returning_tail is %q", u.ReturningTail), "write reverse or merge")
	}
	within(d, "durability.rearm", u.Rearm, 100*Millisecond, 600*Second)
	waits := ""
	if u.Level == Sync {
		waits = "durability.level"
	}
	for i, db := range c.Databases {
		key := fmt.Sprintf("databases[%d].durability", i)
		if db.Durability != "" {
			d.choice(key, string(db.Durability), string(Async), string(Sync))
		}
		if db.Durability == Sync && waits == "" {
			waits = key
		}
	}
	if waits != "" && u.Policy != AvailabilityFirst && !c.HasRegister() && c.Witness == "" && !c.Alone() {
		d.invalid(waits, waits+" is sync, but there is no quorum", "name three voters under quorum, one of which may be a witness; or choose durability.policy availability-first, which waits for nobody")
	}
	_, site := c.SiteByName(u.Preferred)
	switch {
	case u.Policy == PreferredSite && u.Preferred == "":
		d.invalid("durability.preferred", "durability.preferred is missing", "name the site that goes on")
	case u.Policy != PreferredSite && u.Preferred != "":
		d.invalid("durability.preferred", "durability.preferred is for policy preferred-site only", "remove it, or set durability.policy")
	case u.Preferred != "" && !site:
		d.invalid("durability.preferred", fmt.Sprintf("durability.preferred %q is not in sites", u.Preferred), "name one of the sites")
	}
}

// validateWitness checks what a witness's file has in place of a site's.
func (d *decoder) validateWitness(c *Config) {
	if c.Site != "" {
		d.invalid("witness", "site and witness are both given", "keep one: an agent runs at a site, a witness keeps no user data")
		return
	}
	if _, site := c.SiteByName(c.Witness); site {
		d.invalid("witness", fmt.Sprintf("witness %q is one of the sites", c.Witness), "a site's agent is itself a voter: write site in place of witness")
		return
	}
	if _, voter := c.Voter(); !voter {
		d.invalid("witness", fmt.Sprintf("witness %q is not in quorum.members", c.Witness), "the same voters stand in the files of all sites and of the witness")
	}
}
