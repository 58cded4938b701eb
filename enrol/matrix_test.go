package enrol

import (
	"context"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
)

// matrixSQL is a database with every kind of type, column, table and object that should arrive.
const matrixSQL = `
	CREATE EXTENSION citext; CREATE EXTENSION hstore;
	CREATE ROLE shop_owner; CREATE ROLE reader;
	CREATE SCHEMA "Ünï" AUTHORIZATION shop_owner;
	CREATE TYPE mood AS ENUM ('sad', 'o''k', 'happy');
	CREATE DOMAIN posint AS int CHECK (VALUE > 0);
	CREATE TYPE pair AS (a int, b text);
	CREATE TYPE floatrange AS RANGE (subtype = float8);
	CREATE COLLATION plain (provider = libc, locale = 'C');
	CREATE TABLE types (
		id int PRIMARY KEY, bool bool, int2 int2, int8 int8, float4 float4, float8 float8, numeric numeric, money money,
		text text, varchar varchar(20), bpchar char(5), "char" "char", name name, bytea bytea,
		date date, time time, timetz timetz, timestamp timestamp, timestamptz timestamptz, interval interval,
		uuid uuid, json json, jsonb jsonb, jsonpath jsonpath, xml xml, inet inet, cidr cidr, macaddr macaddr, macaddr8 macaddr8,
		bit bit(4), varbit varbit, point point, line line, lseg lseg, box box, path path, polygon polygon, circle circle,
		tsvector tsvector, tsquery tsquery, int4range int4range, numrange numrange, tstzrange tstzrange, daterange daterange,
		int4multirange int4multirange, floatrange floatrange, mood mood, posint posint, pair pair, pairs pair[],
		ints int[], grid int[][], texts text[], moods mood[], citext citext, hstore hstore, oid oid, regclass regclass,
		pg_lsn pg_lsn, txid_snapshot txid_snapshot, xid8 xid8, collated text COLLATE plain,
		half int8 GENERATED ALWAYS AS (int8 / 2) STORED);
	INSERT INTO types (id) VALUES (0);
	INSERT INTO types VALUES (1, true, -32768, 9223372036854775807, 'NaN', 'Infinity', 'NaN', '-12.34',
		'', '', '', '', '', '', 'infinity', '24:00:00', '15:59:59+15:59', '-infinity', 'infinity', '-178000000 years',
		'00000000-0000-0000-0000-000000000000', '{"a" :  1}', '{}', '$', '', '::', '0.0.0.0/0', '08:00:2b:01:02:03', '08:00:2b:01:02:03:04:05',
		'0000', '', '(NaN,-0)', '{1,2,3}', '((0,0),(1,1))', '((1,1),(0,0))', '[(0,0),(1,1)]', '((0,0),(1,1),(2,0))', '<(0,0),1>',
		'', '', 'empty', '(,)', '[2026-01-01 00:00+00,)', '[,infinity]', '{}', '[1,NaN]', 'sad', 1, '(,)', '{"(1,\"a,b\")",NULL}',
		'{}', '{{1,2},{3,NULL}}', '{"",NULL,"NULL","a\"b\\c"}', '{"o''k"}', '', '', 0, 'types', '0/0', '1:1:', '0', '');
	INSERT INTO types VALUES (2, false, 32767, -4611686018427387904, '-0', '2.2250738585072014e-308', 1e-300::numeric, '92233720368547758.07',
		E'\\.\n\t\\N \r\b\f\v', '\N', 'a', '\', 'x', '\x00ff0a0d5c', '4713-01-01 BC', '00:00:00.000001', '00:00-15:59', '0001-01-01 BC', '294276-12-31 23:59:59.999999+00', '-1 mon +3 days -04:05:06.000001',
		'ffffffff-ffff-ffff-ffff-ffffffffffff', '[1, null]', '{"é": "\u00e9\\n"}', '$.a[*] ? (@ > 1)', '<a>&lt;</a>', '10.1.2.3/8', '::ffff/128', 'ff:ff:ff:ff:ff:ff', 'ff:ff:ff:ff:ff:ff:ff:ff',
		'1010', '1', '(1e300,1e-300)', '{1,0,0}', '((0,0),(0,0))', '((1,1),(1,1))', '((0,0),(1,1))', '((0,0))', '<(1,2),3>',
		'''a b'':1A c:2', '''a'' & !b <-> c', '[1,5)', '[1.50,2)', '(,2026-01-01 00:00+00]', '[2026-01-01,2026-02-01)', '{[1,3),[5,7)}', '(-Infinity,0)', 'o''k', 2147483647, '(1,"q""\\")', '{}',
		'[0:1]={1,2}', '{}', '{é,\\n}', '{}', 'CamelCase', '"k"=>"v", "n"=>NULL', 4294967295, 'pg_class', 'FFFFFFFF/FFFFFFFF', '10:20:10,14,15', '18446744073709551615', 'Z');
	INSERT INTO types (id, text, bytea, jsonb) SELECT 3, repeat('0123456789é', 100000), decode(repeat('00ff', 500000), 'hex'), jsonb_build_object('k', repeat('x', 1000000));
	INSERT INTO types (id, int8, text) SELECT i, i, md5(i::text) FROM generate_series(10, 3000) i;
	CREATE TABLE "Ünï"."Tab ""le""" ("Id x" int GENERATED ALWAYS AS IDENTITY (START 100 INCREMENT 7) PRIMARY KEY, "select" text, n serial);
	INSERT INTO "Ünï"."Tab ""le""" ("select") VALUES ('a'), (NULL), ('');
	ALTER TABLE "Ünï"."Tab ""le""" OWNER TO shop_owner;
	GRANT SELECT ON "Ünï"."Tab ""le""" TO reader;
	CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES types DEFERRABLE, mail citext UNIQUE, CHECK (id > 0));
	INSERT INTO child VALUES (1, 0, 'A@x'), (2, NULL, 'b@x');
	CREATE TABLE parted (id int, d date, v text, PRIMARY KEY (id, d)) PARTITION BY RANGE (d);
	CREATE TABLE parted_old PARTITION OF parted FOR VALUES FROM (MINVALUE) TO ('2026-01-01') PARTITION BY HASH (id);
	CREATE TABLE parted_old_0 PARTITION OF parted_old FOR VALUES WITH (MODULUS 2, REMAINDER 0);
	CREATE TABLE parted_old_1 PARTITION OF parted_old FOR VALUES WITH (MODULUS 2, REMAINDER 1);
	CREATE TABLE "Ünï".parted_new PARTITION OF parted FOR VALUES FROM ('2026-01-01') TO (MAXVALUE);
	INSERT INTO parted SELECT i, date '2025-06-01' + i, 'p' || i FROM generate_series(1, 500) i;
	CREATE TABLE base (id int PRIMARY KEY, v text);
	CREATE TABLE derived (extra text) INHERITS (base);
	INSERT INTO base VALUES (1, 'base'); INSERT INTO derived VALUES (2, 'derived', 'x');
	CREATE TABLE keyless (v text); INSERT INTO keyless VALUES ('twin'), ('twin');
	CREATE TABLE gone (a int, b int, c int); ALTER TABLE gone DROP COLUMN b; INSERT INTO gone VALUES (1, 3);
	CREATE TABLE nothing ();
	INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES;
	CREATE TABLE computed (one int GENERATED ALWAYS AS (1) STORED); INSERT INTO computed DEFAULT VALUES;
	CREATE UNLOGGED TABLE cache (id int); INSERT INTO cache VALUES (1);
	CREATE TABLE secret (id int PRIMARY KEY, who text); ALTER TABLE secret ENABLE ROW LEVEL SECURITY; ALTER TABLE secret FORCE ROW LEVEL SECURITY;
	CREATE POLICY none ON secret USING (false); INSERT INTO secret VALUES (1, 'x');
	CREATE SEQUENCE fresh START 500; CREATE SEQUENCE used; SELECT nextval('used') FROM generate_series(1, 41);
	CREATE FUNCTION noisy() RETURNS trigger LANGUAGE plpgsql AS $f$
BEGIN
\not a psql command
RAISE EXCEPTION 'a trigger fired'; END $f$;
	CREATE FUNCTION atomic(i int) RETURNS int BEGIN ATOMIC SELECT 1; SELECT i + 1; END;
	CREATE TABLE watched (id int PRIMARY KEY); INSERT INTO watched VALUES (1);
	CREATE INDEX lower_v ON base (lower(v)) WHERE id > 0;
	CREATE VIEW vee AS SELECT id, text FROM types;
	CREATE MATERIALIZED VIEW zz_first AS SELECT count(*) FROM types;
	CREATE MATERIALIZED VIEW second AS SELECT * FROM zz_first;
	CREATE MATERIALIZED VIEW empty_one AS SELECT 1 AS one WITH NO DATA;
	CREATE PUBLICATION theirs FOR TABLE base;
	COMMENT ON TABLE base IS E'line\n\\restrict x';`

func TestEverythingArrives(t *testing.T) {
	// A function body with a line that begins with a backslash does not compile, and must arrive all the same.
	p := newPair(t, "SET check_function_bodies = off;"+matrixSQL+"; CREATE TRIGGER noisy BEFORE INSERT ON watched FOR EACH ROW EXECUTE FUNCTION noisy()")
	do(t, p.b, "CREATE ROLE shop_owner; CREATE ROLE reader")
	res := p.receive(p.setup(), p.stream(p.source()))
	if len(res.Unrefreshed) != 0 {
		t.Errorf("not refreshed: %v", res.Unrefreshed)
	}
	compareContent(t, p)
	compareSchemas(t, p)
	if got := rows(t, p.b, "SELECT (SELECT count FROM zz_first), (SELECT count FROM second), (SELECT count(*) FROM cache)"); got[0][0] != "2995" || got[0][1] != "2995" || got[0][2] != "0" {
		t.Errorf("materialized views and unlogged table: %v", got)
	}
}

func do(t *testing.T, c *pgcluster.Cluster, sql string) {
	t.Helper()
	rows(t, c, sql)
}

// compareContent compares every table and sequence as text.
func compareContent(t *testing.T, p *pair) {
	t.Helper()
	tables := rows(t, p.a, `SELECT format('%I.%I', nspname, relname), relkind FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
		WHERE nspname NOT IN ('pg_catalog', 'information_schema', 'duri', 'pg_toast') AND relkind IN ('r', 'S') AND relpersistence = 'p'`)
	if len(tables) != 18 {
		t.Fatalf("%d tables and sequences to compare, the source has 18", len(tables))
	}
	for _, r := range tables {
		sql := "SELECT x::text FROM ONLY " + r[0] + " x ORDER BY 1"
		if r[1] == "S" {
			sql = "SELECT last_value, is_called FROM " + r[0]
		}
		want, got := rows(t, p.a, sql), rows(t, p.b, sql)
		if len(want) == 0 {
			t.Errorf("%s is empty at the source", r[0])
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %.2000s", r[0], d)
		}
	}
}

// compareSchemas compares what pg_dump says of both databases.
func compareSchemas(t *testing.T, p *pair) {
	t.Helper()
	var text [2]string
	for i, c := range []*pgcluster.Cluster{p.a, p.b} {
		for _, section := range []string{"pre-data", "post-data"} {
			text[i] += dumped(t, c, section)
		}
	}
	if !strings.Contains(text[0], "CREATE MATERIALIZED VIEW") || !strings.Contains(text[0], "FOREIGN KEY") {
		t.Fatal("the dump lacks things")
	}
	if d := cmp.Diff(strings.Split(text[0], "\n"), strings.Split(text[1], "\n")); d != "" {
		t.Errorf("schemas: %.4000s", d)
	}
}

// dumped runs a section of pg_dump under a snapshot of its own.
func dumped(t *testing.T, c *pgcluster.Cluster, section string) string {
	t.Helper()
	conn := connect(t, c.DSN("shop", ""))
	snap, err := pg.Rows(t.Context(), conn, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_export_snapshot()")
	if err != nil {
		t.Fatal(err)
	}
	p, err := findDump(t.Context(), "", 15)
	if err != nil {
		t.Fatal(err)
	}
	d, err := newDump(p, conn, c.DSN("shop", ""), "shop", snap[0][0], nil)
	if err != nil {
		t.Fatal(err)
	}
	sql, err := d.section(t.Context(), section)
	if err != nil {
		t.Fatal(explain(err))
	}
	return sql
}

func TestOnlyChosenSchemasWithTheirExtensions(t *testing.T) {
	p := newPair(t, `CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext; CREATE SCHEMA "My ""s"; CREATE SCHEMA other;
		CREATE TABLE public.a (id int PRIMARY KEY, v ext.citext); CREATE TABLE "My ""s".b (id serial PRIMARY KEY); CREATE TABLE other.c (id int);
		INSERT INTO a VALUES (1, 'X'); INSERT INTO "My ""s".b DEFAULT VALUES; INSERT INTO other.c VALUES (1)`)
	do(t, p.b, "CREATE SCHEMA mine; CREATE TABLE mine.full (id int PRIMARY KEY); INSERT INTO mine.full VALUES (1)")
	source, target := p.source(), p.setup()
	source.Schemas = []string{"public", `My "s`}
	target.Schemas = source.Schemas
	if res := p.receive(target, p.stream(source)); res.Rows != 2 || res.Tables != 2 {
		t.Errorf("%+v", res)
	}
	got := rows(t, p.b, `SELECT to_regclass('other.c') IS NULL, (SELECT v OPERATOR(ext.=) 'x' FROM a), (SELECT last_value FROM "My ""s".b_id_seq),
		(SELECT string_agg(tablename, ' ' ORDER BY tablename) FROM pg_publication_tables WHERE pubname = 'duri')`)
	if d := cmp.Diff([][]string{{"t", "t", "1", "a b"}}, got); d != "" {
		t.Error(d)
	}
}

func TestUnknownSchemaIsNamed(t *testing.T) {
	p := newPair(t, "")
	cfg := p.source()
	cfg.Schemas = []string{"nowhere"}
	err := Send(context.WithoutCancel(t.Context()), cfg, discard{})
	if err == nil || !strings.Contains(err.Error(), "nowhere") || !strings.Contains(explain(err), "schemas:") {
		t.Errorf("%v", err)
	}
}

// discard is a writer that keeps nothing.
type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
