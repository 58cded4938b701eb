package preflight

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
)

// facts are what was read of a database.
type facts struct {
	database string
	version  int // server_version_num
	encoding string
	standby  bool
	settings map[string]string // of pg_settings; one that the version does not have is missing

	slots       []string // replication slots of the server, temporary ones too
	senders     int      // walsenders of others than duri
	origins     []string // replication origins of the server
	prepared    []string // prepared transactions of this database
	subscribers []string // subscriptions of this database
	largeObject int      // number of large objects

	role        *role // nil: it does not exist
	schemaOwner string
	publication *publication // nil: it does not exist
	tables      []table
	triggers    []trigger
	policies    []declared
}

// declared is a policy and the table that it is meant for.
type declared struct {
	policy policy.Table
	table  policy.Facts
	file   bool // by duri.yaml
}

// role is the run-time role.
type role struct {
	super, login, replication, bypassRLS bool
	lacks                                []privilege
}

// privilege is something that the role may not do, and what gives it.
type privilege struct{ code, text, grant string }

// publication is the publication duri.
type publication struct {
	allTables, viaRoot bool
	lacks              []string // kinds of change that it does not publish
}

// table is a table of a replicated schema, or something that could be taken for one.
type table struct {
	schema, name string
	kind         byte // of pg_class: r, f, m
	unlogged     bool
	method       string // access method
	identity     byte   // relreplident
	published    bool
	filtered     bool   // by a row filter or a column list of the publication
	extension    string // that it belongs to
	rows         bool   // it has some; read only before a join by copy
	primary      bool   // it has a primary key
	deferrable   bool   // and that is deferrable
	keyIndex     bool   // it has a usable replica identity index (identity i)
	uncovered    []string
	key          []keyColumn
}

func (t table) String() string { return t.schema + "." + t.name }

// sql is the table in statements of hints.
func (t table) sql() string { return pg.QuoteName(t.schema, t.name) }

// keyColumn is a column of the key that apply finds rows by.
type keyColumn struct {
	name, typ     string
	base          uint32 // OID of the type, domains resolved
	typtype       string
	deterministic bool // its collation
}

// trigger is a trigger, or a rule, that fires in apply sessions as well.
type trigger struct {
	table   string // schema.table
	sql     string // the table, quoted
	name    string
	rule    bool
	enabled byte // A or R
}

// Versions of PostgreSQL that duri is made for, as server_version_num / 10000.
const (
	majorMin = 15
	majorMax = 18
)

const grantsHint = "run the SQL that `duri grants` prints as superuser in this database"

// evaluate turns facts into findings. It is pure.
func evaluate(f facts, spec Spec) []Finding {
	r := &report{alike: map[int]bool{}}
	if f.version/10000 < majorMin {
		r.error("server_version", "server", fmt.Sprintf("version %d is older than %d, the first that duri works with", f.version/10000, majorMin), "upgrade PostgreSQL")
		return r.sorted() // nothing else could be read
	}
	server(r, f)
	capacity(r, f, spec)
	privileges(r, f, spec)
	published(r, f)
	for _, t := range f.tables {
		checkTable(r, f, t, spec)
	}
	triggers(r, f)
	for _, d := range f.policies {
		checkPolicy(r, d, spec)
	}
	surroundings(r, f)
	return r.sorted()
}

// server checks settings.
func server(r *report, f facts) {
	if m := f.version / 10000; m > majorMax {
		r.warn("server_version", "server", fmt.Sprintf("version %d is newer than %d, the last that this duri was tested with", m, majorMax), "use a newer duri")
	}
	if f.standby {
		r.error("in_recovery", "server", "it is a standby, where nothing can be written", "let postgres.dsn point to the primary")
	}
	if v := f.settings["wal_level"]; v != "logical" {
		r.error("wal_level", "wal_level", "it is "+v+" and must be logical, or changes cannot be decoded", "ALTER SYSTEM SET wal_level = logical, then restart PostgreSQL")
	}
	if f.settings["track_commit_timestamp"] != "on" {
		r.error("track_commit_timestamp", "track_commit_timestamp", "it is off and must be on: conflicts are decided by commit timestamps", "ALTER SYSTEM SET track_commit_timestamp = on, then restart PostgreSQL")
	}
	if v, ok := f.settings["output_plugin_libraries"]; ok && !slices.Contains(words(v), "pgoutput") {
		r.error("output_plugin_libraries", "output_plugin_libraries", "it does not name pgoutput, by which changes are decoded", "ALTER SYSTEM SET output_plugin_libraries = pgoutput and reload")
	}
	if v, ok := f.settings["idle_replication_slot_timeout"]; ok && v != "0" {
		r.warn("idle_replication_slot_timeout", "idle_replication_slot_timeout", "an agent that is stopped for longer than this ("+v+" s) loses its slot and its site must join again", "ALTER SYSTEM SET idle_replication_slot_timeout = 0 and reload")
	}
	// Any other encoding would refuse, in the middle of the stream, the first character of another site that it does not
	// have; SQL_ASCII would store bytes that are no text at the other sites.
	if f.encoding != "UTF8" {
		r.error("encoding", "database "+f.database, "its encoding is "+f.encoding+" and must be UTF8, or a character of another site would stop replication", "dump it and restore it into a database made with ENCODING 'UTF8'")
	}
}

// words splits a list setting.
func words(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' || r == '"' })
}

// ours tells duri's own slots and origins by their names.
func ours(name string) bool { return strings.HasPrefix(name, "duri") }

// others lists names that are not duri's.
func others(names []string) []string {
	return slices.DeleteFunc(slices.Clone(names), ours)
}

// capacity checks limits against what duri and the others use at most. Per database: one slot and one walsender for
// decoding; one more of each while another site joins; one replication origin per other site.
func capacity(r *report, f facts, spec Spec) {
	need := func(setting string, own, other int, what string) {
		have, err := strconv.Atoi(f.settings[setting])
		if err == nil && have < own+other {
			r.error(setting, setting, fmt.Sprintf("it is %d and must be at least %d: %d for %s, %d in use by others", have, own+other, own, what, other),
				fmt.Sprintf("ALTER SYSTEM SET %s = %d, then restart PostgreSQL", setting, max(own+other, 10)))
		}
	}
	slots, origins := spec.Databases+1, spec.Databases*(spec.Sites-1)
	otherSlots, otherOrigins := len(others(f.slots)), len(others(f.origins))
	need("max_wal_senders", slots, f.senders, "decoding and for a site that joins")
	if _, ok := f.settings["max_active_replication_origins"]; ok { // 18
		need("max_active_replication_origins", origins, otherOrigins, "applying the other sites")
		origins, otherOrigins = 0, 0
	}
	if slots+otherSlots >= origins+otherOrigins {
		need("max_replication_slots", slots, otherSlots, "decoding and for a site that joins")
		return
	}
	need("max_replication_slots", origins, otherOrigins, "the replication origins of the other sites")
}

// privileges checks the run-time role.
func privileges(r *report, f facts, spec Spec) {
	object := "role " + spec.Role
	if f.role == nil {
		r.error("role", object, "it does not exist", grantsHint)
		return
	}
	id := pg.QuoteIdent(spec.Role)
	attribute := func(has bool, code, name, why string) {
		if !has && !f.role.super {
			r.error("privilege_"+code, object, "it lacks "+name+", needed to "+why, "ALTER ROLE "+id+" "+name)
		}
	}
	attribute(f.role.login, "login", "LOGIN", "connect")
	attribute(f.role.replication, "replication", "REPLICATION", "decode changes")
	attribute(f.role.bypassRLS, "bypassrls", "BYPASSRLS", "copy and apply all rows of tables with row-level security")
	if !f.role.login && f.role.super {
		r.error("privilege_login", object, "it lacks LOGIN, needed to connect", "ALTER ROLE "+id+" LOGIN")
	}
	for _, p := range f.role.lacks {
		r.error("privilege_"+p.code, object, p.text, p.grant)
	}
	if f.role.super {
		r.info("superuser", object, "it is a superuser, which duri does not need", "ALTER ROLE "+id+" NOSUPERUSER, after the SQL that `duri grants` prints")
	}
	switch {
	case f.schemaOwner == "":
		r.error("schema_duri", "schema duri", "it does not exist", grantsHint)
	case f.schemaOwner != spec.Role:
		r.error("schema_duri", "schema duri", "it belongs to "+f.schemaOwner+" and must belong to "+spec.Role, "ALTER SCHEMA duri OWNER TO "+id)
	}
}

// published checks the publication itself.
func published(r *report, f facts) {
	const object = "publication duri"
	p := f.publication
	if p == nil {
		r.error("publication", object, "it does not exist", grantsHint)
		return
	}
	if p.allTables {
		r.error("publication_all_tables", object, "it is FOR ALL TABLES, which includes duri's own and those of other tools", "DROP PUBLICATION duri, then "+grantsHint)
	}
	if p.viaRoot {
		r.error("publication_via_root", object, "publish_via_partition_root is on: changes would name the partitioned table, while versions belong to the partition's rows", "ALTER PUBLICATION duri SET (publish_via_partition_root = false)")
	}
	if len(p.lacks) > 0 {
		r.error("publication_publish", object, "it leaves out "+strings.Join(p.lacks, ", "), "ALTER PUBLICATION duri SET (publish = 'insert, update, delete, truncate')")
	}
}

// checkTable checks one table.
func checkTable(r *report, f facts, t table, spec Spec) {
	name := t.String()
	switch {
	case t.kind == 'm':
		r.info("materialized_view", name, "a materialized view: its definition is copied, its content is each site's own", "REFRESH it at each site")
		return
	case t.kind == 'f':
		r.warn("foreign_table", name, "a foreign table: its rows are elsewhere and are not replicated", "let each site have its own, or replace it by a table")
		return
	case t.unlogged:
		r.warn("unlogged_table", name, "an UNLOGGED table: its rows are not in the WAL and are not replicated", "ALTER TABLE "+t.sql()+" SET LOGGED, if they matter at other sites")
		return
	case t.extension != "":
		r.warn("extension_table", name, "it belongs to extension "+t.extension+": its present rows are not copied to a site that joins", "install the same version of the extension at every site")
	}
	if spec.Bootstrap == config.BootstrapCopy && !spec.Joined && t.rows && t.extension == "" {
		r.error("not_empty", name, "it has rows, and a site joins empty", "drop the table or TRUNCATE it, or make this site the seed")
	}
	if !t.published {
		if f.publication != nil {
			r.error("not_published", name, "publication duri does not cover it, so its changes would stay here", grantsHint)
		}
		return
	}
	if t.filtered {
		r.error("publication_filter", name, "publication duri has a row filter or a column list for it, so sites would differ", "ALTER PUBLICATION duri DROP TABLE "+t.sql()+", then "+grantsHint)
	}
	if t.method != "" && t.method != "heap" {
		r.error("access_method", name, "its access method is "+t.method+", whose rows have no commit timestamps that duri can read", "ALTER TABLE "+t.sql()+" SET ACCESS METHOD heap")
	}
	identity(r, t)
	for _, k := range t.key {
		if !keySupported(k) {
			r.error("key_type", name+"."+k.name, "a key column whose equality cannot be told from its text ("+k.why()+")", "use a key of another type or a deterministic collation")
		}
	}
}

// identity checks that updates and deletes can name their row at another site.
func identity(r *report, t table) {
	name := t.String()
	full := "ALTER TABLE " + t.sql() + " REPLICA IDENTITY FULL"
	switch {
	case t.identity == 'n':
		r.error("replica_identity", name, "its replica identity is NOTHING, so PostgreSQL refuses UPDATE and DELETE as soon as it is published", "ALTER TABLE "+t.sql()+" REPLICA IDENTITY DEFAULT")
	case t.identity == 'f' && !t.primary:
		r.info("no_key", name, "it has no primary key: rows are matched whole (REPLICA IDENTITY FULL), and equal rows are taken for one another", "add a primary key, if there is one")
	case t.identity == 'f':
	case t.identity == 'i' && !t.keyIndex:
		r.error("replica_identity", name, "its replica identity index is gone, so PostgreSQL refuses UPDATE and DELETE", "ALTER TABLE "+t.sql()+" REPLICA IDENTITY DEFAULT")
	case t.identity == 'i' && len(t.uncovered) > 0:
		r.error("replica_identity", name, "its replica identity index lacks column "+strings.Join(t.uncovered, ", ")+" of the primary key, by which rows are found", "ALTER TABLE "+t.sql()+" REPLICA IDENTITY DEFAULT")
	case t.identity == 'i':
	case !t.primary:
		r.warn("no_key", name, "it has no primary key: only INSERT replicates, and PostgreSQL refuses UPDATE and DELETE on it", "add a primary key, or "+full)
	case t.deferrable:
		r.warn("deferrable_key", name, "its primary key is DEFERRABLE, which PostgreSQL does not take as replica identity: it refuses UPDATE and DELETE", "make the key NOT DEFERRABLE, or "+full)
	}
}

// triggers checks rule 22. An ordinary trigger fires where the client writes, and nowhere else.
func triggers(r *report, f facts) {
	covered := map[string]bool{}
	for _, t := range f.tables {
		covered[t.String()] = t.published
	}
	for _, g := range f.triggers {
		if !covered[g.table] {
			continue
		}
		kind, mode := "trigger", map[byte]string{'A': "ALWAYS", 'R': "REPLICA"}[g.enabled]
		if g.rule {
			kind = "rule"
		}
		r.error(kind+"_"+strings.ToLower(mode), g.table+"."+g.name, "a "+kind+" that is ENABLE "+mode+" runs for applied changes too, and what it writes would not reach the other sites",
			fmt.Sprintf("ALTER TABLE %s ENABLE %s %s", g.sql, strings.ToUpper(kind), pg.QuoteIdent(g.name)))
	}
}

// checkPolicy checks a declaration against its table. A table that does not exist is no error: at a site that joins by
// copying none does yet, and without a table there is nothing to decide.
func checkPolicy(r *report, d declared, spec Spec) {
	name := d.table.Name.String()
	if d.table.Missing && spec.Bootstrap == config.BootstrapCopy && !spec.Joined {
		return
	}
	where := "duri.set_policy declares a policy for it, but "
	if d.file {
		where = "duri.yaml declares a policy for it, but "
	}
	for _, p := range policy.Check(d.policy, d.table) {
		if p.Code == policy.CodeTable {
			r.warn(p.Code, name, where+p.Text, p.Hint)
			continue
		}
		r.error(p.Code, name, where+p.Text, p.Hint)
	}
	for _, p := range policy.Warnings(d.policy, d.table) {
		r.warn(p.Code, name, p.Text, p.Hint)
	}
}

// surroundings checks what else lives in the database.
func surroundings(r *report, f facts) {
	database := "database " + f.database
	if f.largeObject > 0 {
		r.warn("large_objects", database, fmt.Sprintf("it holds %d large objects, which PostgreSQL does not decode: they are not replicated", f.largeObject), "keep them in bytea columns")
	}
	for _, s := range f.subscribers {
		r.warn("subscription", "subscription "+s, "its changes carry another origin and are not sent on to duri's other sites", "drop it, or feed every site by a subscription of its own")
	}
	for _, o := range others(f.origins) {
		if strings.HasPrefix(o, "pg_") && len(f.subscribers) > 0 {
			continue // a subscription's own
		}
		r.warn("origin", "replication origin "+o, "what is written under it is not sent on to duri's other sites", "pg_replication_origin_drop it, if nothing uses it any more")
	}
	for _, p := range f.prepared {
		r.warn("prepared_transaction", "prepared transaction "+p, "the first snapshot and a new slot wait until it ends", "COMMIT PREPARED or ROLLBACK PREPARED it")
	}
}
