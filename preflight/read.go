package preflight

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
)

// read collects the facts.
func read(ctx context.Context, c *pgconn.PgConn, spec Spec) (facts, error) {
	var f facts
	var err error
	if f.version, err = pg.ServerVersion(ctx, c); err != nil || f.version/10000 < majorMin {
		return f, err
	}
	for _, step := range []struct {
		what string
		read func(context.Context, *pgconn.PgConn, Spec, *facts) error
	}{
		{"the server", readServer},
		{"the role", readRole},
		{"the publication", readPublication},
		{"the tables", readTables},
		{"the tables' keys", readKeys},
		{"the tables' rows", readRows},
		{"the triggers", readTriggers},
		{"the table policies", readPolicies},
	} {
		if err := step.read(ctx, c, spec, &f); err != nil {
			return f, fmt.Errorf("read %s: %w", step.what, err)
		}
	}
	return f, nil
}

func readServer(ctx context.Context, c *pgconn.PgConn, _ Spec, f *facts) error {
	rows, err := pg.Rows(ctx, c, `SELECT pg_catalog.current_database(), pg_catalog.current_setting('server_encoding'), pg_catalog.pg_is_in_recovery(),
		(SELECT count(*) FROM pg_catalog.pg_stat_replication WHERE coalesce(application_name, '') NOT LIKE 'duri%'),
		(SELECT count(*) FROM pg_catalog.pg_largeobject_metadata)`)
	if err != nil {
		return err
	}
	r := rows[0]
	f.database, f.encoding, f.standby = r[0], r[1], r[2] == "t"
	var err1, err2 error
	f.senders, err1 = strconv.Atoi(r[3])
	f.largeObject, err2 = strconv.Atoi(r[4])
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	settings, err := pg.Rows(ctx, c, `SELECT name, setting FROM pg_catalog.pg_settings WHERE name IN ('wal_level',
		'track_commit_timestamp', 'max_replication_slots', 'max_wal_senders', 'max_active_replication_origins',
		'idle_replication_slot_timeout', 'output_plugin_libraries')`)
	if err != nil {
		return err
	}
	f.settings = map[string]string{}
	for _, s := range settings {
		f.settings[s[0]] = s[1]
	}
	for sql, into := range map[string]*[]string{
		"SELECT slot_name FROM pg_catalog.pg_replication_slots ORDER BY 1":                                                                                &f.slots,
		"SELECT roname FROM pg_catalog.pg_replication_origin ORDER BY 1":                                                                                  &f.origins,
		"SELECT gid FROM pg_catalog.pg_prepared_xacts WHERE database = current_database() ORDER BY 1":                                                     &f.prepared,
		"SELECT subname FROM pg_catalog.pg_subscription JOIN pg_catalog.pg_database d ON d.oid = subdbid WHERE d.datname = current_database() ORDER BY 1": &f.subscribers,
	} {
		if *into, err = column(ctx, c, sql); err != nil {
			return err
		}
	}
	return nil
}

// column reads a query's first column.
func column(ctx context.Context, c *pgconn.PgConn, sql string) ([]string, error) {
	rows, err := pg.Rows(ctx, c, sql)
	var out []string
	for _, r := range rows {
		out = append(out, r[0])
	}
	return out, err
}

// originFunctions are the functions that the agent calls and that only a superuser may without a grant (section 7).
var originFunctions = []string{
	"pg_replication_origin_create", "pg_replication_origin_drop", "pg_replication_origin_oid",
	"pg_replication_origin_session_setup", "pg_replication_origin_session_reset", "pg_replication_origin_session_is_setup",
	"pg_replication_origin_session_progress", "pg_replication_origin_xact_setup", "pg_replication_origin_xact_reset",
	"pg_replication_origin_advance", "pg_replication_origin_progress", "pg_show_replication_origin_status",
	"pg_logical_emit_message",
}

func readRole(ctx context.Context, c *pgconn.PgConn, spec Spec, f *facts) error {
	rows, err := pg.Query(ctx, c, "SELECT rolsuper, rolcanlogin, rolreplication, rolbypassrls FROM pg_catalog.pg_roles WHERE rolname = $1", spec.Role)
	if err != nil {
		return err
	}
	owner, err := column(ctx, c, "SELECT pg_catalog.pg_get_userbyid(nspowner) FROM pg_catalog.pg_namespace WHERE nspname = 'duri'")
	if err != nil {
		return err
	}
	f.schemaOwner = strings.Join(owner, "")
	if len(rows) == 0 {
		return nil
	}
	r := rows[0]
	f.role = &role{super: r[0] == "t", login: r[1] == "t", replication: r[2] == "t", bypassRLS: r[3] == "t"}
	f.role.lacks, err = lacking(ctx, c, spec.Role)
	return err
}

// lacking reads which privileges the role does not have.
func lacking(ctx context.Context, c *pgconn.PgConn, name string) ([]privilege, error) {
	id := pg.QuoteIdent(name)
	var checks []string
	var all []privilege
	add := func(p privilege, condition string) {
		all, checks = append(all, p), append(checks, condition)
	}
	role := pg.QuoteLiteral(name)
	add(privilege{"connect", "it may not connect to this database", "GRANT CONNECT ON DATABASE %s TO " + id},
		"pg_catalog.has_database_privilege("+role+", pg_catalog.current_database(), 'CONNECT')")
	for _, g := range [][2]string{{"pg_read_all_data", "read all tables"}, {"pg_write_all_data", "apply changes to all tables"}, {"pg_monitor", "see lag, slots and who blocks apply"}} {
		add(privilege{g[0], "it is no member of " + g[0] + ", needed to " + g[1], "GRANT " + g[0] + " TO " + id},
			fmt.Sprintf("pg_catalog.pg_has_role(%s, '%s', 'USAGE')", role, g[0]))
	}
	for _, p := range [][2]string{{"session_replication_role", "apply without firing triggers and foreign keys a second time"}, {"deadlock_timeout", "find out soon that a client and apply wait for each other"}} {
		add(privilege{p[0], "it may not SET " + p[0] + ", needed to " + p[1], "GRANT SET ON PARAMETER " + p[0] + " TO " + id},
			fmt.Sprintf("pg_catalog.has_parameter_privilege(%s, '%s', 'SET')", role, p[0]))
	}
	rows, err := pg.Rows(ctx, c, "SELECT pg_catalog.quote_ident(pg_catalog.current_database()), "+strings.Join(checks, ", "))
	if err != nil {
		return nil, err
	}
	var out []privilege
	for i, p := range all {
		if rows[0][i+1] != "t" {
			p.grant = strings.ReplaceAll(p.grant, "%s", rows[0][0])
			out = append(out, p)
		}
	}
	functions, err := pg.Rows(ctx, c, fmt.Sprintf(`SELECT p.proname, p.oid::regprocedure FROM pg_catalog.pg_proc p
		WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname IN ('%s')
			AND NOT pg_catalog.has_function_privilege(%s, p.oid, 'EXECUTE') ORDER BY 2`, strings.Join(originFunctions, "', '"), role))
	for _, r := range functions {
		out = append(out, privilege{r[0], "it may not call " + r[1], "GRANT EXECUTE ON FUNCTION " + r[1] + " TO " + id})
	}
	return out, err
}

func readPublication(ctx context.Context, c *pgconn.PgConn, _ Spec, f *facts) error {
	rows, err := pg.Rows(ctx, c, "SELECT puballtables, pubviaroot, pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_catalog.pg_publication WHERE pubname = 'duri'")
	if err != nil || len(rows) == 0 {
		return err
	}
	r := rows[0]
	p := &publication{allTables: r[0] == "t", viaRoot: r[1] == "t"}
	for i, what := range []string{"insert", "update", "delete", "truncate"} {
		if r[i+2] != "t" {
			p.lacks = append(p.lacks, what)
		}
	}
	f.publication = p
	return nil
}

// scope is a condition on a namespace alias n: a user schema, not an extension's own, and one of those asked for.
func scope(schemas []string) string {
	if len(schemas) == 0 {
		return `n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'duri') AND NOT EXISTS (
			SELECT FROM pg_catalog.pg_depend e WHERE e.classid = 'pg_catalog.pg_namespace'::regclass AND e.objid = n.oid AND e.deptype = 'e')`
	}
	quoted := make([]string, len(schemas))
	for i, s := range schemas {
		quoted[i] = pg.QuoteLiteral(s)
	}
	return "n.nspname IN (" + strings.Join(quoted, ", ") + ")"
}

func readTables(ctx context.Context, c *pgconn.PgConn, spec Spec, f *facts) error {
	rows, err := pg.Rows(ctx, c, `WITH covered AS (
			SELECT c.oid FROM pg_catalog.pg_publication_tables p
			JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
			JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
			WHERE p.pubname = 'duri'
		)
		SELECT n.nspname, c.relname, c.relkind, c.relpersistence = 'u', coalesce(am.amname, ''), c.relreplident,
			c.oid IN (SELECT oid FROM covered)
				OR EXISTS (SELECT FROM pg_catalog.pg_partition_ancestors(c.oid) JOIN covered ON covered.oid = relid),
			EXISTS (SELECT FROM pg_catalog.pg_publication_rel pr JOIN pg_catalog.pg_publication p ON p.oid = pr.prpubid
				WHERE p.pubname = 'duri' AND pr.prrelid = c.oid AND (pr.prqual IS NOT NULL OR pr.prattrs IS NOT NULL)),
			coalesce((SELECT e.extname FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
				WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e' LIMIT 1), ''),
			pk.indexrelid IS NOT NULL, coalesce(NOT pk.indimmediate, false), ri.indexrelid IS NOT NULL,
			coalesce((SELECT pg_catalog.string_agg(a.attname, ', ' ORDER BY a.attnum) FROM pg_catalog.pg_attribute a
				WHERE a.attrelid = c.oid AND a.attnum = ANY ((pk.indkey::int2[])[0:pk.indnkeyatts - 1])
					AND a.attnum <> ALL ((ri.indkey::int2[])[0:ri.indnkeyatts - 1])), '')
		FROM pg_catalog.pg_class c
		JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		LEFT JOIN pg_catalog.pg_am am ON am.oid = c.relam
		LEFT JOIN pg_catalog.pg_index pk ON pk.indrelid = c.oid AND pk.indisprimary AND pk.indisvalid
		LEFT JOIN pg_catalog.pg_index ri ON ri.indrelid = c.oid AND ri.indisreplident AND ri.indisvalid
		WHERE c.relkind IN ('r', 'f', 'm') AND c.relpersistence <> 't' AND `+scope(spec.Schemas)+" ORDER BY 1, 2")
	for _, r := range rows {
		t := table{
			schema: r[0], name: r[1], kind: first(r[2]), unlogged: r[3] == "t", method: r[4], identity: first(r[5]),
			published: r[6] == "t", filtered: r[7] == "t", extension: r[8],
			primary: r[9] == "t", deferrable: r[10] == "t", keyIndex: r[11] == "t",
		}
		if r[12] != "" {
			t.uncovered = strings.Split(r[12], ", ")
		}
		f.tables = append(f.tables, t)
	}
	return err
}

func first(s string) byte {
	if s == "" {
		return 0
	}
	return s[0]
}

// readKeys reads the columns of the index by which apply finds rows: the primary key, else the replica identity index.
func readKeys(ctx context.Context, c *pgconn.PgConn, spec Spec, f *facts) error {
	rows, err := pg.Rows(ctx, c, `SELECT n.nspname, c.relname, a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod),
			base.oid, base.typtype, coalesce(co.collisdeterministic, true)
		FROM pg_catalog.pg_class c
		JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		CROSS JOIN LATERAL (
			SELECT i.indexrelid, i.indkey::int2[] AS cols, i.indnkeyatts FROM pg_catalog.pg_index i
			WHERE i.indrelid = c.oid AND i.indisvalid AND (i.indisprimary OR i.indisreplident)
			ORDER BY i.indisprimary DESC LIMIT 1
		) ix
		CROSS JOIN LATERAL pg_catalog.generate_subscripts(ix.cols, 1) AS k
		JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = ix.cols[k]
		JOIN pg_catalog.pg_attribute ia ON ia.attrelid = ix.indexrelid AND ia.attnum = k + 1
		CROSS JOIN LATERAL (
			WITH RECURSIVE d AS (
				SELECT t.oid, t.typtype::text, t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid
				UNION ALL SELECT b.oid, b.typtype::text, b.typbasetype FROM d JOIN pg_catalog.pg_type b ON b.oid = d.typbasetype
			) SELECT oid, typtype FROM d WHERE typbasetype = 0
		) base
		LEFT JOIN pg_catalog.pg_collation co ON co.oid = ia.attcollation
		WHERE c.relkind = 'r' AND k < ix.indnkeyatts AND `+scope(spec.Schemas)+" ORDER BY 1, 2, k")
	if err != nil {
		return err
	}
	at := map[string]int{}
	for i, t := range f.tables {
		at[t.String()] = i
	}
	for _, r := range rows {
		oid, err := strconv.ParseUint(r[4], 10, 32)
		if err != nil {
			return err
		}
		if i, ok := at[r[0]+"."+r[1]]; ok {
			f.tables[i].key = append(f.tables[i].key, keyColumn{r[2], r[3], uint32(oid), r[5], r[6] == "t"})
		}
	}
	return nil
}

// readRows looks for rows where there must be none.
func readRows(ctx context.Context, c *pgconn.PgConn, spec Spec, f *facts) error {
	if spec.Bootstrap != config.BootstrapCopy || spec.Joined {
		return nil
	}
	for i := range f.tables {
		t := &f.tables[i]
		if t.kind != 'r' {
			continue
		}
		rows, err := pg.Rows(ctx, c, "SELECT EXISTS (SELECT FROM ONLY "+t.sql()+")")
		if pg.SQLState(err) == "42501" { // privileges are findings of their own
			continue
		}
		if err != nil {
			return err
		}
		t.rows = rows[0][0] == "t"
	}
	return nil
}

func readTriggers(ctx context.Context, c *pgconn.PgConn, spec Spec, f *facts) error {
	rows, err := pg.Rows(ctx, c, `SELECT n.nspname, c.relname, g.name, g.rule, g.enabled FROM (
			SELECT tgrelid AS rel, tgname AS name, false AS rule, tgenabled AS enabled FROM pg_catalog.pg_trigger
			UNION ALL
			SELECT ev_class, rulename, true, ev_enabled FROM pg_catalog.pg_rewrite WHERE ev_type <> '1'
		) g
		JOIN pg_catalog.pg_class c ON c.oid = g.rel
		JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE g.enabled IN ('A', 'R') AND c.relkind = 'r' AND `+scope(spec.Schemas)+" ORDER BY 1, 2, 3")
	for _, r := range rows {
		f.triggers = append(f.triggers, trigger{r[0] + "." + r[1], pg.QuoteName(r[0], r[1]), r[2], r[3] == "t", first(r[4])})
	}
	return err
}

// readPolicies reads the tables that a policy is declared for. Those of SQL exist only after the first start.
func readPolicies(ctx context.Context, c *pgconn.PgConn, spec Spec, f *facts) error {
	rows, err := pg.Rows(ctx, c, `SELECT r.oid IS NOT NULL AND pg_catalog.has_table_privilege(r.oid, 'SELECT')
		FROM (SELECT pg_catalog.to_regclass('duri.policy')::oid) AS r(oid)`)
	if err != nil {
		return err
	}
	var sql policy.Set
	if rows[0][0] == "t" {
		if sql, err = catalog.Policies(ctx, c); err != nil {
			return err
		}
	}
	effective, _ := policy.Merge(spec.Policies, sql)
	names := effective.Tables()
	if len(names) == 0 {
		return nil
	}
	tables, err := catalog.TableFacts(ctx, c, names)
	for _, t := range tables {
		f.policies = append(f.policies, declared{effective.Of(t.Name.Schema, t.Name.Table), t, spec.Policies.Declares(t.Name)})
	}
	return err
}
