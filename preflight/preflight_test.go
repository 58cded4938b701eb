package preflight

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/policy"
)

func connect(t *testing.T, c *pgcluster.Cluster, user string) *pgconn.PgConn {
	t.Helper()
	conn, err := pg.Connect(t.Context(), c.DSN("shop", user), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pg.Close(conn) })
	return conn
}

// lines runs the check and prints its findings as "severity code object".
func lines(t *testing.T, c *pgconn.PgConn, spec Spec) []string {
	t.Helper()
	findings, err := Run(t.Context(), c, spec)
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, f := range findings {
		out = append(out, fmt.Sprintf("%s %s %s", f.Severity, f.Code, strings.Join(f.Objects, ", ")))
	}
	slices.Sort(out)
	return out
}

// mixed is a database with one of everything that the check looks for.
const mixed = `
	CREATE EXTENSION citext;
	CREATE COLLATION nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
	CREATE TABLE good (id int PRIMARY KEY, v text);
	CREATE TABLE "Good ""q""" (a uuid, b text, PRIMARY KEY (a, b));
	CREATE TABLE parted (id int, d date, PRIMARY KEY (id, d)) PARTITION BY RANGE (d);
	CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
	CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY);
	CREATE TABLE keyless (v text);
	CREATE TABLE keyless_full (v text);
	ALTER TABLE keyless_full REPLICA IDENTITY FULL;
	CREATE TABLE nothing (id int PRIMARY KEY);
	ALTER TABLE nothing REPLICA IDENTITY NOTHING;
	CREATE TABLE other_index (id int PRIMARY KEY, u int NOT NULL UNIQUE);
	ALTER TABLE other_index REPLICA IDENTITY USING INDEX other_index_u_key;
	CREATE TABLE only_index (u int NOT NULL UNIQUE);
	ALTER TABLE only_index REPLICA IDENTITY USING INDEX only_index_u_key;
	CREATE TABLE gone_index (id int PRIMARY KEY, u int NOT NULL UNIQUE);
	ALTER TABLE gone_index REPLICA IDENTITY USING INDEX gone_index_u_key;
	ALTER TABLE gone_index DROP CONSTRAINT gone_index_u_key;
	CREATE TABLE late_key (id int PRIMARY KEY DEFERRABLE);
	CREATE DOMAIN code AS citext;
	CREATE TYPE mood AS ENUM ('sad', 'glad');
	CREATE TABLE keys_bad (a citext, b jsonb, c numrange, d int[], e text COLLATE nocase, f code,
		PRIMARY KEY (a, b, c, d, e, f));
	CREATE TABLE keys_good (a numeric, b char(3), c mood, d interval, e int4range, f timestamptz, g inet, h float8,
		PRIMARY KEY (a, b, c, d, e, f, g, h) INCLUDE (i), i jsonb);
	CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
	CREATE TABLE trig (id int PRIMARY KEY);
	CREATE TRIGGER usual BEFORE INSERT ON trig FOR EACH ROW EXECUTE FUNCTION f();
	CREATE TRIGGER allways BEFORE INSERT ON trig FOR EACH ROW EXECUTE FUNCTION f();
	ALTER TABLE trig ENABLE ALWAYS TRIGGER allways;
	CREATE TRIGGER replica BEFORE INSERT ON trig FOR EACH ROW EXECUTE FUNCTION f();
	ALTER TABLE trig ENABLE REPLICA TRIGGER replica;
	CREATE RULE r AS ON UPDATE TO trig DO ALSO NOTHING;
	ALTER TABLE trig ENABLE ALWAYS RULE r;
	CREATE MATERIALIZED VIEW mv AS SELECT 1 AS one;
	CREATE FOREIGN DATA WRAPPER fdw;
	CREATE SERVER srv FOREIGN DATA WRAPPER fdw;
	CREATE FOREIGN TABLE far (id int) SERVER srv;
	CREATE TABLE owned (id int PRIMARY KEY);
	ALTER EXTENSION citext ADD TABLE owned;
	SELECT lo_create(0);
	SELECT pg_replication_origin_create('bdr_x');
	CREATE SUBSCRIPTION sub CONNECTION 'dbname=nowhere' PUBLICATION p WITH (connect = false)`

var mixedFindings = []string{
	"error key_type public.keys_bad.a",
	"error key_type public.keys_bad.b",
	"error key_type public.keys_bad.c",
	"error key_type public.keys_bad.d",
	"error key_type public.keys_bad.e",
	"error key_type public.keys_bad.f",
	"error replica_identity public.gone_index",
	"error replica_identity public.nothing",
	"error replica_identity public.other_index",
	"error rule_always public.trig.r",
	"error trigger_always public.trig.allways",
	"error trigger_replica public.trig.replica",
	"info materialized_view public.mv",
	"info no_key public.keyless_full",
	"warning deferrable_key public.late_key",
	"warning extension_table public.owned",
	"warning foreign_table public.far",
	"warning large_objects database shop",
	"warning no_key public.keyless",
	"warning origin replication origin bdr_x",
	"warning prepared_transaction prepared transaction pending",
	"warning subscription subscription sub",
	"warning unlogged_table public.unlogged",
}

func TestFindsEverythingInAMixedDatabase(t *testing.T) {
	c := pgtest.New(t, pgtest.WithSetting("max_prepared_transactions", "2"))
	pgtest.DB(t, c, "shop")
	pgtest.Exec(t, c, "shop", mixed)
	pgtest.Exec(t, c, "shop", "BEGIN; INSERT INTO good VALUES (1); PREPARE TRANSACTION 'pending'")
	pgtest.Exec(t, c, "shop", grants.SQL(grants.Spec{}))
	for _, user := range []string{"", "duri"} {
		if d := cmp.Diff(mixedFindings, lines(t, connect(t, c, user), Spec{})); d != "" {
			t.Errorf("as %q: %s", user, d)
		}
	}
	pgtest.Exec(t, c, "shop", "ALTER SUBSCRIPTION sub SET (slot_name = NONE)")
	pgtest.Exec(t, c, "shop", "DROP SUBSCRIPTION sub")
}

func TestPreparedDatabaseHasNoFindings(t *testing.T) {
	c := pgtest.New(t)
	pgtest.DB(t, c, "shop")
	pgtest.Exec(t, c, "shop", `CREATE TABLE t (id int PRIMARY KEY); CREATE SCHEMA "S x"; CREATE TABLE "S x"."T" (id int PRIMARY KEY)`)
	pgtest.Exec(t, c, "shop", grants.SQL(grants.Spec{}))
	if got := lines(t, connect(t, c, "duri"), Spec{Bootstrap: config.BootstrapCopy}); len(got) != 0 {
		t.Error(got)
	}
	pgtest.Exec(t, c, "shop", `INSERT INTO "S x"."T" VALUES (1); CREATE SCHEMA late; CREATE TABLE late.l (id int PRIMARY KEY)`)
	want := []string{"error not_empty S x.T", "error not_published late.l"}
	if d := cmp.Diff(want, lines(t, connect(t, c, "duri"), Spec{Bootstrap: config.BootstrapCopy})); d != "" {
		t.Error(d)
	}
	if got := lines(t, connect(t, c, "duri"), Spec{Schemas: []string{"public"}}); len(got) != 0 {
		t.Error("other schemas are looked at:", got)
	}
}

func TestNamesEachMissingPrivilege(t *testing.T) {
	c := pgtest.New(t)
	pgtest.DB(t, c, "shop")
	if d := cmp.Diff([]string{"error publication publication duri", "error role role duri"}, lines(t, connect(t, c, ""), Spec{})); d != "" {
		t.Error(d)
	}
	pgtest.Exec(t, c, "shop", "CREATE ROLE duri LOGIN; REVOKE CONNECT ON DATABASE shop FROM public; CREATE SCHEMA duri; CREATE PUBLICATION duri")
	findings, err := Run(t.Context(), connect(t, c, ""), Spec{})
	if err != nil {
		t.Fatal(err)
	}
	var grant []string
	for _, f := range findings {
		if f.Code == "schema_duri" || strings.HasPrefix(f.Code, "privilege_") {
			grant = append(grant, f.Hint)
		}
	}
	// Attributes, connect, roles, parameters, functions (pg_logical_emit_message is anybody's), schema.
	const want = 2 + 1 + 3 + 2 + 12 + 1
	if len(grant) != want {
		t.Errorf("%d hints, want %d:\n%s", len(grant), want, strings.Join(grant, "\n"))
	}
	// The hints are the remedy.
	pgtest.Exec(t, c, "shop", strings.Join(grant, ";\n"))
	if got := lines(t, connect(t, c, "duri"), Spec{}); len(got) != 0 {
		t.Error(got)
	}
}

func TestFindsWrongSettingsAndPublication(t *testing.T) {
	c := pgtest.New(t, pgtest.WithSetting("wal_level", "replica"), pgtest.WithSetting("track_commit_timestamp", "off"),
		pgtest.WithSetting("max_replication_slots", "1"), pgtest.WithSetting("max_wal_senders", "1"))
	pgtest.DB(t, c, "shop")
	pgtest.Exec(t, c, "shop", grants.SQL(grants.Spec{}))
	pgtest.Exec(t, c, "shop", `DROP PUBLICATION duri; CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE u (id int PRIMARY KEY);
		CREATE PUBLICATION duri FOR TABLE t (id), u WHERE (id > 0) WITH (publish = 'insert, update', publish_via_partition_root = true)`)
	want := []string{
		"error max_replication_slots max_replication_slots", "error max_wal_senders max_wal_senders",
		"error publication_filter public.t, public.u",
		"error publication_publish publication duri", "error publication_via_root publication duri",
		"error track_commit_timestamp track_commit_timestamp", "error wal_level wal_level",
	}
	if d := cmp.Diff(want, lines(t, connect(t, c, ""), Spec{})); d != "" {
		t.Error(d)
	}
}

func TestFindsPoliciesThatDoNotFit(t *testing.T) {
	c := pgtest.New(t, pgtest.WithSetting("wal_level", "logical"), pgtest.WithSetting("track_commit_timestamp", "on"))
	pgtest.DB(t, c, "shop")
	pgtest.Exec(t, c, "shop", `CREATE TABLE a (id int PRIMARY KEY, n int, f float8); CREATE TABLE b (id int PRIMARY KEY, n int); ALTER TABLE b REPLICA IDENTITY FULL;`)
	pgtest.Exec(t, c, "shop", grants.SQL(grants.Spec{}))
	spec := Spec{Policies: policy.NewSet(map[policy.Name]policy.Table{
		{Schema: "public", Table: "a"}: {Delta: []string{"f"}}, {Schema: "public", Table: "c"}: {},
	}, nil)}
	conn := connect(t, c, "duri")
	want := []string{"error policy_identity public.a", "error policy_type public.a", "warning policy_table public.c"}
	if d := cmp.Diff(want, lines(t, conn, spec)); d != "" {
		t.Errorf("of duri.yaml: %s", d)
	}
	if err := catalog.Migrate(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, c, "shop", `SELECT duri.set_policy('a', '{}'), duri.set_policy('b', '{"delta": ["n"]}'); ALTER TABLE b REPLICA IDENTITY DEFAULT`)
	want = []string{"error policy_identity public.a", "error policy_identity public.b", "error policy_type public.a", "warning policy_table public.c"}
	if d := cmp.Diff(want, lines(t, conn, spec)); d != "" {
		t.Errorf("of SQL too: %s", d)
	}
}
