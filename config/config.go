// Package config reads duri.yaml, the configuration of one site's agent: strict parsing with file and line for every
// problem, defaults, DURI_... overrides from the environment, and validation. It also makes the files of a new
// cluster (InitCluster).
//
// It does not connect anywhere and does not check whether what it names exists: files and databases are the business
// of those who use them. It guarantees that a Config from Parse or Load is complete and valid, that its paths are
// resolved, and that all problems of a file are reported at once. A Config is not changed after it was read and may
// be shared between goroutines.
package config

import (
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// FileName is what the configuration is called where it is looked for.
const FileName = "duri.yaml"

// Config is a site's configuration. docs/reference/config.md describes each key.
type Config struct {
	Cluster      Cluster    `yaml:"cluster" json:"cluster"`
	Site         string     `yaml:"site" json:"site"`       // empty in the file of a witness
	Witness      string     `yaml:"witness" json:"witness"` // empty in the file of a site
	Sites        []Site     `yaml:"sites" json:"sites"`
	Bootstrap    Bootstrap  `yaml:"bootstrap" json:"bootstrap"`
	Listen       string     `yaml:"listen" json:"listen"`
	DataDir      string     `yaml:"data_dir" json:"data_dir"`
	Databases    []Database `yaml:"databases" json:"databases"`
	Quorum       Quorum     `yaml:"quorum" json:"quorum"`
	Durability   Durability `yaml:"durability" json:"durability"`
	Gateway      Gateway    `yaml:"gateway" json:"gateway"`
	Postgres     Postgres   `yaml:"postgres" json:"postgres"`
	TLS          TLS        `yaml:"tls" json:"tls"`
	Journal      Journal    `yaml:"journal" json:"journal"`
	Apply        Apply      `yaml:"apply" json:"apply"`
	Conflict     Conflict   `yaml:"conflict" json:"conflict"`
	Verify       Verify     `yaml:"verify" json:"verify"`
	MaxClockSkew Duration   `yaml:"max_clock_skew" json:"max_clock_skew"`
	Heartbeat    Duration   `yaml:"heartbeat" json:"heartbeat"`
	Log          Log        `yaml:"log" json:"log"`

	path    string
	origins map[string]Origin
}

// Cluster names the cluster. Certificates carry its ID.
type Cluster struct {
	ID   string `yaml:"id" json:"id"` // UUID, made once by duri init
	Name string `yaml:"name" json:"name"`
}

// Site is one site as all sites know it.
type Site struct {
	ID      wal.SiteID `yaml:"id" json:"id"` // 1..250, never reused (replication.md rule 2)
	Name    string     `yaml:"name" json:"name"`
	Address string     `yaml:"address" json:"address"` // host:port at which the other agents reach this one
}

// Bootstrap is how a site gets its first content.
type Bootstrap string

// The two ways to begin.
const (
	BootstrapSeed Bootstrap = "seed" // the databases' present content is the cluster's first content
	BootstrapCopy Bootstrap = "copy" // the databases start empty and copy from the seed site
)

// Database is a replicated database.
type Database struct {
	Name    string   `yaml:"name" json:"name"`
	Schemas []string `yaml:"schemas" json:"schemas"` // empty: all user schemas
	// Durability overrides durability.level; empty: it does not. See DurabilityOf.
	Durability Level `yaml:"durability" json:"durability"`
	// Tables declares how tables merge, by policy.Name's text; see Policies.
	Tables map[string]policy.Table `yaml:"tables" json:"tables"`
}

// Policies is what the file declares for the database's tables. It wins over what duri.set_policy declares
// (policy.Merge).
func (d Database) Policies() policy.Set {
	tables := map[policy.Name]policy.Table{}
	for text, t := range d.Tables {
		if n, err := policy.ParseName(text); err == nil { // validated when the file was read
			tables[n] = t
		}
	}
	return policy.NewSet(tables, nil)
}

// Postgres is how the agent reaches its own server. The connection strings have no database: DSNFor adds it.
type Postgres struct {
	DSN      string `yaml:"dsn" json:"dsn"`             // run-time role; may hold a password, see Redact
	SetupDSN string `yaml:"setup_dsn" json:"setup_dsn"` // superuser for enrolment; empty: enrolled by hand
	BinDir   string `yaml:"bin_dir" json:"bin_dir"`     // of pg_dump; empty: PATH, then the newest of the distribution
}

// DSNFor is the run-time connection string for a database.
func (p Postgres) DSNFor(database string) (string, error) { return WithDatabase(p.DSN, database) }

// SetupDSNFor is the superuser's connection string for a database, or "" when none is configured.
func (p Postgres) SetupDSNFor(database string) (string, error) {
	if p.SetupDSN == "" {
		return "", nil
	}
	return WithDatabase(p.SetupDSN, database)
}

// TLS names the PEM files of the mutual authentication between agents.
type TLS struct {
	CA   string `yaml:"ca" json:"ca"`
	Cert string `yaml:"cert" json:"cert"`
	Key  string `yaml:"key" json:"key"`
}

// Journal bounds the durable log.
type Journal struct {
	Keep    Duration `yaml:"keep" json:"keep"`       // keep at least this long after every site has applied it
	Budget  Size     `yaml:"budget" json:"budget"`   // of disk, for all journals of this site
	Segment Size     `yaml:"segment" json:"segment"` // size of one file
	Full    Full     `yaml:"full" json:"full"`       // what happens when a site that is away has used up Budget
}

// Full is what happens when a site that is away has used up the journal's budget.
type Full string

// The policies, as journal.full names them.
const (
	FullDetach     Full = "detach"      // its backlog is freed; it re-synchronises when it is back
	FullStopWrites Full = "stop-writes" // nothing is decoded any more: commits that wait for other sites wait
)

// Apply bounds one apply transaction and its patience.
type Apply struct {
	BatchTransactions int      `yaml:"batch_transactions" json:"batch_transactions"`
	BatchBytes        Size     `yaml:"batch_bytes" json:"batch_bytes"`
	LockTimeout       Duration `yaml:"lock_timeout" json:"lock_timeout"` // then apply gives way and tries again
}

// Conflict is about the records of conflicts (replication.md rule 16).
type Conflict struct {
	Keep Duration `yaml:"keep" json:"keep"`
}

// Verify is about the continuous comparison of the sites in the background.
type Verify struct {
	Enabled bool     `yaml:"enabled" json:"enabled"`
	Period  Duration `yaml:"period" json:"period"` // one pass over all rows is spread over it
	CPU     float64  `yaml:"cpu" json:"cpu"`       // share of a core that it may take of each site's server
}

// Log is about the agent's own log.
type Log struct {
	Level  string `yaml:"level" json:"level"`   // debug, info, warn, error
	Format string `yaml:"format" json:"format"` // text, json
}

// MaxSites is the number of sites that this version supports in a cluster; MaxSiteID the greatest site id.
const (
	MaxSites  = 8
	MaxSiteID = 250
)

// Path is the file that the configuration was read from.
func (c *Config) Path() string { return c.path }

// Self is the site that this agent is.
func (c *Config) Self() Site {
	s, _ := c.SiteByName(c.Site)
	return s
}

// Peers are the other sites, in the order of the file.
func (c *Config) Peers() []Site {
	return slices.DeleteFunc(slices.Clone(c.Sites), func(s Site) bool { return s.Name == c.Site })
}

// SiteByName finds a site of the cluster.
func (c *Config) SiteByName(name string) (Site, bool) {
	for _, s := range c.Sites {
		if s.Name == name {
			return s, true
		}
	}
	return Site{}, false
}

// SiteByID finds a site of the cluster.
func (c *Config) SiteByID(id wal.SiteID) (Site, bool) {
	for _, s := range c.Sites {
		if s.ID == id {
			return s, true
		}
	}
	return Site{}, false
}

// Database finds a replicated database.
func (c *Config) Database(name string) (Database, bool) {
	for _, d := range c.Databases {
		if d.Name == name {
			return d, true
		}
	}
	return Database{}, false
}

// Redacted is a copy without passwords, for printing.
func (c *Config) Redacted() *Config {
	r := *c
	r.Postgres.DSN = Redact(c.Postgres.DSN)
	r.Postgres.SetupDSN = Redact(c.Postgres.SetupDSN)
	return &r
}

// defaults is the configuration of an empty file. What has no default is required.
func defaults() *Config {
	return &Config{
		DataDir:      "data",
		Durability:   Durability{Level: Async, Receipts: 1, Policy: DurabilityFirst, Detect: 2 * Second, Rearm: 10 * Second, ReturningTail: Reverse},
		TLS:          TLS{CA: "ca.crt", Cert: "site.crt", Key: "site.key"},
		Journal:      Journal{Keep: Hour, Budget: 8 * GiB, Segment: 64 * MiB, Full: FullDetach},
		Apply:        Apply{BatchTransactions: 2000, BatchBytes: 8 * MiB, LockTimeout: 200 * Millisecond},
		Conflict:     Conflict{Keep: 720 * Hour},
		Verify:       Verify{Enabled: true, Period: 300 * Second, CPU: 0.02},
		MaxClockSkew: 500 * Millisecond, // replication.md rule 1
		Heartbeat:    Second,
		Gateway: Gateway{
			Mode: GatewayDoor, ClientsMax: 1000, PoolSize: 20, Hold: 15 * Second, Idle: 600 * Second, LoginRate: 1000,
			Reads: Reads{LagMax: Second, WaitMax: 50 * Millisecond}, SlowDown: SlowDown{To: 256 * MiB, Most: 200 * Millisecond},
		},
		Log: Log{Level: "info", Format: "text"},
	}
}

// defaultListen is the port of the own address on all interfaces: the address may be one that only the others can
// reach (NAT, load balancer).
func defaultListen(address string) string {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return ""
	}
	return net.JoinHostPort("", port)
}

// OriginKind says where a value came from.
type OriginKind string

// Later kinds win over earlier ones.
const (
	FromDefault OriginKind = "default"
	FromFile    OriginKind = "file"
	FromEnv     OriginKind = "env"
)

// Origin is where a value came from.
type Origin struct {
	Kind OriginKind `json:"kind"`
	File string     `json:"file,omitempty"`
	Line int        `json:"line,omitempty"` // from 1; 0: unknown
	Env  string     `json:"env,omitempty"`  // name of the environment variable
}

// String prints "duri.yaml:12", "DURI_LOG_LEVEL" or "default".
func (o Origin) String() string {
	switch {
	case o.Kind == FromEnv:
		return o.Env
	case o.Kind == FromFile && o.Line > 0:
		return fmt.Sprintf("%s:%d", o.File, o.Line)
	case o.Kind == FromFile:
		return o.File
	}
	return string(FromDefault)
}

// Origin tells where the value at a key path ("log.level", "sites[1].address") came from.
func (c *Config) Origin(key string) Origin {
	if o, ok := c.origins[key]; ok {
		return o
	}
	return Origin{Kind: FromDefault}
}

// Value is one key of the configuration with its value and where it came from.
type Value struct {
	Key    string `json:"key"`
	Value  string `json:"value"`
	Origin Origin `json:"origin"`
}

// Values lists all keys in the order of the documentation, passwords redacted.
func (c *Config) Values() []Value {
	var all []Value
	for _, l := range leaves(c.Redacted()) {
		all = append(all, Value{Key: l.key, Value: l.text(), Origin: c.Origin(l.key)})
	}
	return all
}

// Problem is one thing that is wrong, where, and what to do about it. Key is the path of the key it is about, if any.
type Problem struct {
	At   Origin `json:"at"`
	Key  string `json:"key,omitempty"`
	Msg  string `json:"message"`
	Hint string `json:"hint,omitempty"`

	cause error
}

// Error prints "duri.yaml:12: unknown key ...".
func (p *Problem) Error() string {
	if p.At.Kind == "" {
		return p.Msg
	}
	return p.At.String() + ": " + p.Msg
}

// Unwrap gives the cause, if the problem is one of the file system.
func (p *Problem) Unwrap() error { return p.cause }

// HintText is what the user can do.
func (p *Problem) HintText() string { return p.Hint }

// Error holds all problems of a configuration, in the order of the file.
type Error struct {
	Problems []*Problem `json:"problems"`
}

// Error prints one problem per line.
func (e *Error) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = p.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap gives the problems.
func (e *Error) Unwrap() []error {
	errs := make([]error, len(e.Problems))
	for i, p := range e.Problems {
		errs[i] = p
	}
	return errs
}
