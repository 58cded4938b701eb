package config

import (
	"fmt"
	"maps"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

var (
	namePattern = regexp.MustCompile(`^[a-z][a-z0-9-]{0,30}$`)
	uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
)

const (
	nameHint = "a name begins with a letter a-z and has up to 31 of a-z, 0-9 and -"
	// maxIdentifierBytes is PostgreSQL's NAMEDATALEN - 1.
	maxIdentifierBytes = 63
)

// invalid notes a problem of a value, unless the value or one it is part of has one already.
func (d *decoder) invalid(key, msg, hint string) {
	for k := key; ; {
		if d.bad[k] {
			return
		}
		i := strings.LastIndexAny(k, ".[")
		if i < 0 {
			break
		}
		k = k[:i]
	}
	if d.bad[""] {
		return
	}
	d.bad[key] = true
	d.problems = append(d.problems, &Problem{At: d.position(key), Key: key, Msg: msg, Hint: hint})
}

// position is where the value stands, or else the group that it is missing in.
func (d *decoder) position(key string) Origin {
	for k := key; ; {
		if o, ok := d.origins[k]; ok && (o.Kind == FromFile || k == key) {
			return o
		}
		i := strings.LastIndexAny(k, ".[")
		if i < 0 {
			return Origin{Kind: FromFile, File: d.file}
		}
		k = k[:i]
	}
}

// missing notes that a required value is not there; it reports whether it is.
func (d *decoder) missing(key string, absent bool, hint string) bool {
	if absent {
		d.invalid(key, key+" is missing", hint)
	}
	return absent
}

// validate checks what a single value's type cannot.
func (d *decoder) validate(c *Config) {
	if !d.missing("cluster.id", c.Cluster.ID == "", "it is in the duri.yaml of the other sites; duri init makes it for a new cluster") &&
		!uuidPattern.MatchString(c.Cluster.ID) {
		d.invalid("cluster.id", fmt.Sprintf("cluster.id %q is not a UUID in lower case", c.Cluster.ID), "copy it from another site of the cluster")
	}
	if !d.missing("cluster.name", c.Cluster.Name == "", "any name, for example demo") && !namePattern.MatchString(c.Cluster.Name) {
		d.invalid("cluster.name", fmt.Sprintf("cluster.name %q is not a name", c.Cluster.Name), nameHint)
	}
	d.validateSites(c)
	d.validateFiles(c)
	switch {
	case c.Alone():
		d.validateAlone(c)
	case c.Witness != "":
		d.validateWitness(c)
	default:
		d.validateSelf(c)
		d.choice("bootstrap", string(c.Bootstrap), string(BootstrapSeed), string(BootstrapCopy))
		d.missing("databases", len(c.Databases) == 0, "name at least one database to replicate")
	}
	d.validateDatabases(c)
	d.validateQuorum(c)
	d.validateDurability(c)
	d.validateDSN("postgres.dsn", c.Postgres.DSN)
	d.validateDSN("postgres.setup_dsn", c.Postgres.SetupDSN)
	d.validateLimits(c)
	d.choice("log.level", c.Log.Level, "debug", "info", "warn", "error")
	d.choice("log.format", c.Log.Format, "text", "json")
}

func (d *decoder) choice(key, value string, allowed ...string) {
	list := strings.Join(allowed, ", ")
	if d.missing(key, value == "", "one of: "+list) || slices.Contains(allowed, value) {
		return
	}
	msg := fmt.Sprintf("%s %q is unknown", key, value)
	if near := term.Closest(value, allowed); near != "" {
		msg += fmt.Sprintf(" (did you mean %q?)", near)
	}
	d.invalid(key, msg, "one of: "+list)
}

func (d *decoder) validateSites(c *Config) {
	if d.missing("sites", len(c.Sites) == 0, "list all sites of the cluster, the own one included") {
		return
	}
	ids, names, addresses := map[wal.SiteID]int{}, map[string]int{}, map[string]int{}
	for i, s := range c.Sites {
		key := fmt.Sprintf("sites[%d]", i)
		if s.ID < 1 || s.ID > MaxSiteID {
			d.invalid(key+".id", fmt.Sprintf("%s.id is %d, want 1 to %d", key, s.ID, MaxSiteID), "every site has its own number, the same in the files of all sites, and never that of a former one")
		}
		if !d.missing(key+".name", s.Name == "", nameHint) && !namePattern.MatchString(s.Name) {
			d.invalid(key+".name", fmt.Sprintf("%s.name %q is not a name", key, s.Name), nameHint)
		}
		d.address(key+".address", s.Address, true)
		unique(d, ids, s.ID, key+".id")
		unique(d, names, s.Name, key+".name")
		unique(d, addresses, s.Address, key+".address")
	}
	// Last, so that it does not hide the problems of the entries.
	if n := len(c.Sites); n < 2 || n > MaxSites {
		d.invalid("sites", fmt.Sprintf("sites has %d, want 2 to %d", n, MaxSites), "list all sites of the cluster, the own one included")
	}
}

// unique notes when a value of a list appears a second time. Zero values are reported as missing elsewhere.
func unique[T comparable](d *decoder, seen map[T]int, v T, key string) {
	var zero T
	if v == zero {
		return
	}
	if _, dup := seen[v]; dup {
		d.invalid(key, fmt.Sprintf("%s: %v is given twice", key, v), fmt.Sprintf("the first is in line %d", seen[v]))
		return
	}
	seen[v] = d.position(key).Line
}

// address checks host:port; the host may be empty only in what we listen on.
func (d *decoder) address(key, value string, needHost bool) {
	if d.missing(key, value == "", "host:port, for example 10.1.0.5:7400") {
		return
	}
	host, port, err := net.SplitHostPort(value)
	n, perr := strconv.ParseUint(port, 10, 16)
	switch {
	case err != nil || perr != nil || n == 0:
		d.invalid(key, fmt.Sprintf("%s %q is not host:port", key, value), "for example 10.1.0.5:7400 or [fd00::5]:7400")
	case needHost && host == "":
		d.invalid(key, fmt.Sprintf("%s %q has no host", key, value), "the address is where the other sites reach this one")
	}
}

func (d *decoder) validateSelf(c *Config) {
	_, known := c.SiteByName(c.Site)
	if !d.missing("site", c.Site == "", "the name of the site that this agent is") && !known && len(c.Sites) > 0 {
		var names []string
		for _, s := range c.Sites {
			names = append(names, s.Name)
		}
		d.invalid("site", fmt.Sprintf("site %q is not in sites", c.Site), "one of: "+strings.Join(names, ", "))
	}
	if c.Listen != "" { // else it has no default, as the own address has a problem
		d.address("listen", c.Listen, false)
		d.validateGateway(c)
	}
}

func (d *decoder) validateFiles(c *Config) {
	d.missing("data_dir", c.DataDir == "", "remove the key for the default, data")
	d.missing("tls.ca", c.TLS.CA == "", "remove the key for the default, ca.crt")
	d.missing("tls.cert", c.TLS.Cert == "", "remove the key for the default, site.crt")
	d.missing("tls.key", c.TLS.Key == "", "remove the key for the default, site.key")
}

func (d *decoder) validateDatabases(c *Config) {
	names := map[string]int{}
	for i, db := range c.Databases {
		key := fmt.Sprintf("databases[%d]", i)
		d.identifier(key+".name", db.Name)
		if slices.Contains([]string{"template0", "template1"}, db.Name) {
			d.invalid(key+".name", fmt.Sprintf("%s.name: database %s cannot be replicated", key, db.Name), "name a database with user data")
		}
		unique(d, names, db.Name, key+".name")
		schemas := map[string]int{}
		for j, s := range db.Schemas {
			at := fmt.Sprintf("%s.schemas[%d]", key, j)
			d.identifier(at, s)
			if s == "duri" || s == "information_schema" || strings.HasPrefix(s, "pg_") {
				d.invalid(at, fmt.Sprintf("%s: schema %s cannot be replicated", at, s), "name schemas with user tables, or remove the key for all of them")
			}
			unique(d, schemas, s, at)
		}
		d.validateTables(key+".tables", db)
	}
}

// validateTables checks declarations as far as the file alone tells; the rest needs the database (package preflight).
func (d *decoder) validateTables(key string, db Database) {
	names := map[policy.Name]string{}
	for _, text := range slices.Sorted(maps.Keys(db.Tables)) {
		at, t := entry(key, text), db.Tables[text]
		n, err := policy.ParseName(text)
		switch first, dup := names[n]; {
		case err != nil:
			d.invalid(at, fmt.Sprintf("%s: %q is not the name of a table: %v", key, text, err), "for example public.account")
		case dup:
			d.invalid(at, fmt.Sprintf("%s: %s and %s name the same table", key, first, text), "remove one of them")
		case len(db.Schemas) > 0 && !slices.Contains(db.Schemas, n.Schema):
			d.invalid(at, fmt.Sprintf("%s: schema %s of %s is not replicated", key, n.Schema, text), "add it to schemas, or remove the table")
		}
		names[n] = text
		d.choice(at+".mode", string(t.Mode), texts(policy.Modes)...)
		columns := map[string]int{}
		for i, c := range t.Delta {
			column := fmt.Sprintf("%s.delta[%d]", at, i)
			d.identifier(column, c)
			unique(d, columns, c, column)
		}
		for _, fk := range slices.Sorted(maps.Keys(t.FK)) {
			constraint := entry(at+".foreign_keys", fk)
			d.identifier(constraint, fk)
			d.choice(constraint, string(t.FK[fk]), texts(policy.AllOrphans)...)
		}
	}
}

// texts converts values of a text type.
func texts[T ~string](values []T) []string {
	out := make([]string, len(values))
	for i, v := range values {
		out[i] = string(v)
	}
	return out
}

func (d *decoder) identifier(key, value string) {
	if d.missing(key, value == "", "") {
		return
	}
	if len(value) > maxIdentifierBytes || strings.ContainsRune(value, 0) {
		d.invalid(key, fmt.Sprintf("%s is not a PostgreSQL name", key), fmt.Sprintf("a name has up to %d bytes", maxIdentifierBytes))
	}
}

func (d *decoder) validateDSN(key, dsn string) {
	keys, err := DSNKeys(dsn)
	if err != nil {
		d.invalid(key, key+": "+err.Error(), "quote a value with spaces: password='a b'")
	}
	if keys["dbname"] != "" || keys["database"] != "" {
		d.invalid(key, key+" names a database", "remove dbname: the databases are listed under databases")
	}
}

func (d *decoder) validateLimits(c *Config) {
	within(d, "journal.keep", c.Journal.Keep, 0, 87600*Hour)
	d.choice("journal.full", string(c.Journal.Full), string(FullDetach), string(FullStopWrites))
	within(d, "journal.segment", c.Journal.Segment, MiB, GiB)
	// Four segments: one that is written, one that is read, and room to delete whole ones.
	within(d, "journal.budget", c.Journal.Budget, 4*min(max(c.Journal.Segment, MiB), GiB), 1024*1024*TiB)
	within(d, "apply.batch_transactions", c.Apply.BatchTransactions, 1, 1_000_000)
	within(d, "apply.batch_bytes", c.Apply.BatchBytes, 64*KiB, GiB)
	within(d, "apply.lock_timeout", c.Apply.LockTimeout, Millisecond, Hour)
	within(d, "conflict.keep", c.Conflict.Keep, Hour, 87600*Hour)
	within(d, "verify.period", c.Verify.Period, Second, 87600*Hour)
	within(d, "verify.cpu", c.Verify.CPU, 0.001, 1)
	within(d, "max_clock_skew", c.MaxClockSkew, Millisecond, Hour)
	within(d, "heartbeat", c.Heartbeat, 10*Millisecond, 60*Second)
}

func within[T int | float64 | Duration | Size](d *decoder, key string, v, low, high T) {
	if v < low || v > high {
		d.invalid(key, fmt.Sprintf("%s is %v, want %v to %v", key, v, low, high), "remove the key for the default")
	}
}
