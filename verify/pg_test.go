package verify

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
)

// twoSites is two databases of one cluster that stand for two sites.
type twoSites struct {
	c    *pgcluster.Cluster
	a, b *DB
}

// newSites makes the databases a and b with the same schema, as a DBA does: grants, then the agent's role.
func newSites(t testing.TB, schema string, opts ...pgtest.Option) *twoSites {
	t.Helper()
	s := &twoSites{c: pgtest.New(t, opts...)}
	s.a, s.b = s.site(t, "a", schema), s.site(t, "b", schema)
	return s
}

func (s *twoSites) site(t testing.TB, name, schema string) *DB {
	t.Helper()
	pgtest.DB(t, s.c, name)
	s.exec(t, name, schema)
	s.exec(t, name, grants.SQL(grants.Spec{}))
	db := NewDB(DBConfig{Name: name, DSN: s.c.DSN(name, grants.DefaultRole)})
	t.Cleanup(db.Close)
	return db
}

func (s *twoSites) exec(t testing.TB, db, sql string) { t.Helper(); pgtest.Exec(t, s.c, db, sql) }

// both runs SQL at both sites.
func (s *twoSites) both(t testing.TB, sql string) {
	t.Helper()
	s.exec(t, "a", sql)
	s.exec(t, "b", sql)
}

// run compares and fails the test on an error of Run.
func (s *twoSites) run(t testing.TB, o Options) Report {
	t.Helper()
	rep, err := Run(t.Context(), s.a, s.b, o)
	if err != nil {
		t.Fatalf("%v (%s)", err, hintOf(err))
	}
	return rep
}

// show prints the differences shortly: table, kind, key, columns, copies.
func show(rep Report) []string {
	out := []string{}
	for _, t := range rep.Tables {
		if t.Error != "" {
			out = append(out, t.Error)
		}
		for _, d := range t.Differences {
			line := fmt.Sprintf("%s %s %s", t.Table, d.Kind, strings.Join(d.Key, ","))
			if len(d.Columns) > 0 {
				line += " [" + strings.Join(d.Columns, ",") + "]"
			}
			if t.Method == ByRowHash {
				line += fmt.Sprintf("%d/%d", d.CopiesA, d.CopiesB)
			}
			out = append(out, line)
		}
	}
	slices.Sort(out) // Rows without key are in order of their hashes, which the seed decides.
	return out
}

func wantDiffs(t testing.TB, rep Report, want ...string) {
	t.Helper()
	want = append([]string{}, want...)
	slices.Sort(want)
	if diff := cmp.Diff(want, show(rep)); diff != "" {
		t.Errorf("differences with seed %d (-want +got):\n%s", rep.Seed, diff)
	}
	if rep.Equal != (len(want) == 0) {
		t.Errorf("equal %v with %d differences", rep.Equal, len(want))
	}
}

// schemaAll has a table of every kind that needs its own care.
const schemaAll = `
CREATE TABLE plain (id int8 PRIMARY KEY, v text, n numeric, d timestamptz);
CREATE TABLE "Quoted ""Table" ("Key, 1" text COLLATE "C", "k'2" int, "select" bytea, PRIMARY KEY ("Key, 1", "k'2"));
CREATE TABLE texts (k text PRIMARY KEY, v int);
CREATE TABLE odd (id uuid PRIMARY KEY, j json, x xml, p point, b jsonb, a text[], f float8, i interval);
CREATE TABLE heap (a int, b text);
ALTER TABLE heap REPLICA IDENTITY FULL;
CREATE TABLE gen (id int PRIMARY KEY, v int, g int GENERATED ALWAYS AS (v * 2) STORED);
CREATE TABLE parts (id int, region text, v text, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
CREATE TABLE parts_eu PARTITION OF parts FOR VALUES IN ('eu');
CREATE TABLE parts_rest PARTITION OF parts DEFAULT;
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE DOMAIN code AS varchar(8) COLLATE "C";
CREATE TABLE typed (m mood, c code, b bpchar(3), PRIMARY KEY (m, c, b));
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (extra int, PRIMARY KEY (id)) INHERITS (parent);
CREATE TABLE empty ();
`

const dataAll = `
INSERT INTO plain SELECT g, 'v' || g, g * 1.5, '2026-01-01'::timestamptz + g * interval '1 s' FROM generate_series(1, 5000) g;
INSERT INTO plain VALUES (6001, NULL, NULL, NULL), (6002, '', 'NaN', 'infinity');
INSERT INTO "Quoted ""Table" SELECT 'k"''\{},' || g / 10, g % 10, decode(md5(g::text), 'hex') FROM generate_series(1, 300) g;
INSERT INTO texts SELECT CASE g % 4 WHEN 0 THEN upper(md5(g::text)) WHEN 1 THEN md5(g::text) WHEN 2 THEN '둘' || g ELSE 'é ' || g END, g FROM generate_series(1, 3000) g;
INSERT INTO odd SELECT md5(g::text)::uuid, json_build_object('b', g), '<a/>', point(g, 1), '{"a":1}', ARRAY['x', NULL, ''], g / 3.0::float8, interval '1 day' * g FROM generate_series(1, 100) g;
INSERT INTO heap SELECT g % 50, NULL FROM generate_series(1, 500) g;
INSERT INTO gen SELECT g, g FROM generate_series(1, 10) g;
INSERT INTO parts SELECT g, CASE WHEN g % 2 = 0 THEN 'eu' ELSE 'kr' END, 'x' FROM generate_series(1, 50) g;
INSERT INTO typed SELECT m::mood, 'C' || g, 'b' FROM unnest('{sad,ok,happy}'::text[]) m, generate_series(1, 40) g;
INSERT INTO parent VALUES (1), (2);
INSERT INTO child VALUES (1, 1), (3, 3);
INSERT INTO empty DEFAULT VALUES;
INSERT INTO empty DEFAULT VALUES;
`

func TestEqualSitesAreEqualWhateverTheTables(t *testing.T) {
	for _, m := range pgtest.Majors(t) {
		t.Run(m.String(), func(t *testing.T) { testEqualSites(t, pgtest.WithMajor(m)) })
	}
}

func testEqualSites(t *testing.T, major pgtest.Option) {
	s := newSites(t, schemaAll, major)
	s.both(t, dataAll)
	for _, o := range []Options{{}, {RangeRows: 7}} {
		rep := s.run(t, o)
		wantDiffs(t, rep)
		rows := map[string]int64{}
		for _, x := range rep.Tables {
			if rows[x.Table] = x.RowsA; x.RowsA != x.RowsB || !x.Equal || len(x.Notes) > 0 {
				t.Errorf("%+v", x)
			}
		}
		want := map[string]int64{
			"plain": 5002, `Quoted "Table`: 300, "texts": 3000, "odd": 100, "heap": 500, "gen": 10,
			"parts_eu": 25, "parts_rest": 25, "typed": 120, "parent": 2, "child": 2, "empty": 2,
		}
		if diff := cmp.Diff(want, rows); diff != "" {
			t.Errorf("rows (-want +got):\n%s", diff)
		}
	}
}

func TestEveryDifferenceIsNamed(t *testing.T) {
	s := newSites(t, schemaAll)
	s.both(t, dataAll)
	s.exec(t, "a", `
UPDATE plain SET v = NULL WHERE id = 6002;
DELETE FROM plain WHERE id = 17;
UPDATE odd SET p = point(0, 1), j = '{"b": 1}' WHERE id = md5('1')::uuid;
INSERT INTO heap VALUES (7, NULL), (8, NULL), (8, NULL);
INSERT INTO empty DEFAULT VALUES;
UPDATE parent SET id = 9 WHERE id = 3;`)
	s.exec(t, "b", `
DELETE FROM plain WHERE id = 4711;
UPDATE "Quoted ""Table" SET "select" = NULL WHERE ("Key, 1", "k'2") = ('k"''\{},3', 3);
UPDATE texts SET v = -1 WHERE k = '둘2';
DELETE FROM heap WHERE ctid = (SELECT min(ctid) FROM heap WHERE a = 8);
INSERT INTO heap VALUES (NULL, 'x');
UPDATE gen SET v = 0 WHERE id = 5;
UPDATE parts SET v = 'y' WHERE (region, id) = ('kr', 1);
DELETE FROM typed WHERE (m, c) = ('happy', 'C7');`)
	for _, o := range []Options{{}, {RangeRows: 7}} {
		rep := s.run(t, o)
		wantDiffs(t, rep,
			`Quoted "Table differs k"'\{},3,3 [select]`,
			"child missing_at_b 9", "child missing_at_a 3",
			"empty missing_at_b 3/2",
			"gen differs 5 [g,v]",
			"heap missing_at_b 11/10", "heap missing_at_b 12/9", "heap missing_at_a 0/1",
			"odd differs c4ca4238-a0b9-2382-0dcc-509a6f75849b [j,p]",
			"parts_rest differs kr,1 [v]",
			"plain missing_at_a 17", "plain missing_at_b 4711", "plain differs 6002 [v]",
			"texts differs 둘2 [v]",
			"typed missing_at_b happy,C7,b  ",
		)
	}
}

// lockTable holds an exclusive lock on a table of site a until unlock is called.
func lockTable(t testing.TB, s *twoSites, table string) (unlock func()) {
	t.Helper()
	conn, err := pgconn.Connect(t.Context(), s.c.DSN("a", s.c.Superuser()))
	if err != nil {
		t.Fatal(err)
	}
	unlock = sync.OnceFunc(func() { _ = conn.Close(context.Background()) })
	t.Cleanup(unlock)
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE "+table).ReadAll(); err != nil {
		t.Fatal(err)
	}
	return unlock
}
