package catalog

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// prepared gives a database after the grants, and how to connect to it as the run-time role.
func prepared(t *testing.T) (*pgcluster.Cluster, func() *pgconn.PgConn) {
	t.Helper()
	c := pgtest.New(t)
	pgtest.DB(t, c, "shop")
	pgtest.Exec(t, c, "shop", grants.SQL(grants.Spec{}))
	return c, func() *pgconn.PgConn { return connect(t, c) }
}

func connect(t *testing.T, c *pgcluster.Cluster) *pgconn.PgConn {
	t.Helper()
	conn, err := pg.Connect(t.Context(), c.DSN("shop", "duri"), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pg.Close(conn) })
	return conn
}

func migrated(t *testing.T) (*pgcluster.Cluster, *pgconn.PgConn) {
	t.Helper()
	c, open := prepared(t)
	conn := open()
	if err := Migrate(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	return c, conn
}

func TestMigratesOnceAndAgainWithoutASuperuser(t *testing.T) {
	c, conn := migrated(t)
	if err := Migrate(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	got := pgtest.Query(t, c, "shop", "SELECT version, name FROM duri.migration ORDER BY 1")
	if got[0][0] != "1" || got[0][1] != "start" {
		t.Errorf("%v", got)
	}
	locks := pgtest.Query(t, c, "shop", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
	if locks[0][0] != "0" {
		t.Errorf("%s advisory locks are left", locks[0][0])
	}
}

func TestAgentsThatMigrateAtOnceDoItOnce(t *testing.T) {
	c, open := prepared(t)
	var g errgroup.Group
	for range 4 {
		conn := open()
		g.Go(func() error { return Migrate(t.Context(), conn) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := pgtest.Query(t, c, "shop", "SELECT count(*) FROM duri.migration WHERE version = 1"); got[0][0] != "1" {
		t.Errorf("%v", got)
	}
}

func TestMigrateRefusesChangedNewerAndUnpreparedDatabases(t *testing.T) {
	c, conn := migrated(t)
	refused := func(what, word string) {
		t.Helper()
		err := Migrate(t.Context(), conn)
		var e *Error
		if !errors.As(err, &e) || e.HintText() == "" || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", what, err)
		}
	}
	pgtest.Exec(t, c, "shop", "INSERT INTO duri.migration VALUES (900, 'future', 'x')")
	refused("newer", "900")
	pgtest.Exec(t, c, "shop", "DELETE FROM duri.migration WHERE version = 900; UPDATE duri.migration SET checksum = 'x' WHERE version = 1")
	refused("changed", "other statements")
	pgtest.Exec(t, c, "shop", "ALTER SCHEMA duri OWNER TO postgres")
	refused("foreign schema", "postgres")
	pgtest.Exec(t, c, "shop", "DROP SCHEMA duri CASCADE")
	refused("no schema", "does not exist")
}

func TestFailingMigrationLeavesThePreviousOne(t *testing.T) {
	c, open := prepared(t)
	conn := open()
	steps := []migration{
		{1, "one", "a", "CREATE TABLE duri.one (i int) -- no semicolon, and a comment"},
		{2, "two", "b", "CREATE TABLE duri.two (i int); SELECT 1 / 0"},
	}
	if err := migrate(t.Context(), conn, steps); pg.SQLState(err) != "22012" || !strings.Contains(err.Error(), "migration 2 (two)") {
		t.Fatalf("error %v", err)
	}
	got := pgtest.Query(t, c, "shop", "SELECT to_regclass('duri.one') IS NOT NULL, to_regclass('duri.two') IS NULL, (SELECT max(version) FROM duri.migration)")
	if !slices.Equal(got[0], []string{"t", "t", "1"}) {
		t.Errorf("%v", got)
	}
	steps[1].sql = "CREATE TABLE duri.two (i int)"
	if err := migrate(t.Context(), conn, steps); err != nil {
		t.Errorf("after the repair: %v", err)
	}
}

// insertConflict adds a record made at a given time.
func insertConflict(t *testing.T, c *pgcluster.Cluster, at time.Time, kind, table string) {
	t.Helper()
	pgtest.Exec(t, c, "shop", fmt.Sprintf(`INSERT INTO duri.conflict (at, kind, code, table_schema, table_name, key, origin, origin_lsn,
		origin_xid, change, remote_time, remote_row, local_site, local_time, local_row)
		VALUES ('%s', '%s', 'lost', 'public', '%s', '{"id": "1"}', 2, '0/16B3748', 700, 3, '2026-11-25 12:00:00.000001+00',
		'{"id": "1", "v": "x"}', 1, '2026-11-25 12:00:01+00', NULL)`, at.Format(time.RFC3339Nano), kind, table))
}

func partitionCounts(t *testing.T, c *pgcluster.Cluster) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, r := range pgtest.Query(t, c, "shop", "SELECT tableoid::regclass, count(*) FROM duri.conflict GROUP BY 1") {
		out[r[0]] = r[1]
	}
	return out
}

func TestMaintainMovesRowsOutOfTheDefaultPartition(t *testing.T) {
	c, conn := migrated(t)
	now := time.Date(2026, 11, 25, 20, 0, 0, 0, time.UTC)
	const keep = 72 * time.Hour
	for _, at := range []time.Time{now, now.Add(-20 * time.Hour), now.Add(-48 * time.Hour), now.Add(-100 * time.Hour), now.Add(3 * time.Hour), now.Add(20 * time.Hour)} {
		insertConflict(t, c, at, "update_missing", "t")
	}
	if err := Maintain(t.Context(), conn, keep, now); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"duri.conflict_20261125": "3", "duri.conflict_20261126": "1", "duri.conflict_default": "1"}
	if d := cmp.Diff(want, partitionCounts(t, c)); d != "" {
		t.Errorf("after the first: %s", d)
	}
	insertConflict(t, c, now.Add(time.Hour), "update_missing", "t") // the identity column still counts
	if err := Maintain(t.Context(), conn, keep, now.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if got := partitionCounts(t, c)["duri.conflict_20261125"]; got != "4" {
		t.Errorf("%s rows today", got)
	}
	// Four days later, everything of the 25th and the old row in the default partition are gone.
	if err := Maintain(t.Context(), conn, keep, now.Add(4*24*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string]string{"duri.conflict_20261126": "1"}, partitionCounts(t, c)); d != "" {
		t.Errorf("later: %s", d)
	}
}

func TestMaintainKeepsTheNewestProgressOfEachOrigin(t *testing.T) {
	c, conn := migrated(t)
	now := time.Now()
	// Origin 1: 25,000 old rows (more than one deletion takes) and a young one; origin 2: only old ones.
	pgtest.Exec(t, c, "shop", fmt.Sprintf(`INSERT INTO duri.applied
		SELECT i::text::xid8, CASE WHEN i > 25000 THEN 2 ELSE 1 END, '0/0', '0/0'::pg_lsn + i, now(), now(), 1, 1, 0, '0/0',
			timestamptz '%[1]s' - interval '10 days' FROM generate_series(1, 25010) i;
		INSERT INTO duri.applied VALUES ('30000', 1, '0/0', '0/FFFFFF', now(), now(), 1, 1, 0, '0/0', '%[1]s')`, now.Format(time.RFC3339Nano)))
	if err := Maintain(t.Context(), conn, 24*time.Hour, now); err != nil {
		t.Fatal(err)
	}
	got := pgtest.Query(t, c, "shop", "SELECT xid, origin FROM duri.applied ORDER BY 2")
	if d := cmp.Diff([][]string{{"30000", "1"}, {"25010", "2"}}, got); d != "" {
		t.Error(d)
	}
}

func TestMaintainDoesNotWaitForLongLocks(t *testing.T) {
	c, conn := migrated(t)
	other := connect(t, c)
	now := time.Date(2026, 11, 25, 20, 0, 0, 0, time.UTC)
	if _, err := pg.Rows(t.Context(), other, "BEGIN; SELECT count(*) FROM duri.conflict"); err != nil {
		t.Fatal(err)
	}
	if err := Maintain(t.Context(), conn, time.Hour, now); pg.SQLState(err) != "55P03" {
		t.Fatalf("error %v", err)
	}
	if _, err := pg.Rows(t.Context(), other, "COMMIT"); err != nil {
		t.Fatal(err)
	}
	if err := Maintain(t.Context(), conn, time.Hour, now); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestConflictsAreListedNewestFirst(t *testing.T) {
	c, conn := migrated(t)
	base := time.Date(2026, 11, 25, 12, 0, 0, 123456000, time.UTC)
	insertConflict(t, c, base, "update_missing", "a")
	insertConflict(t, c, base.Add(time.Second), "insert_exists", "b")
	insertConflict(t, c, base.Add(2*time.Second), "", "b")
	insertConflict(t, c, base.Add(2*time.Second), "insert_exists", "b")
	ids := func(f ConflictFilter) string {
		t.Helper()
		got, err := Conflicts(t.Context(), conn, f)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, x := range got {
			out = append(out, fmt.Sprint(x.ID))
		}
		return strings.Join(out, " ")
	}
	for _, c := range []struct {
		filter ConflictFilter
		want   string
	}{
		{ConflictFilter{}, "4 2 1"},
		{ConflictFilter{Exceptions: true}, "4 3 2 1"},
		{ConflictFilter{Limit: 1}, "4"},
		{ConflictFilter{Table: "a"}, "1"},
		{ConflictFilter{Table: "public.b"}, "4 2"},
		{ConflictFilter{Table: "other.b"}, ""},
		{ConflictFilter{Kind: "update_missing"}, "1"},
		{ConflictFilter{Since: base.Add(time.Microsecond)}, "4 2"},
		{ConflictFilter{Since: base}, "4 2 1"},
		{ConflictFilter{Until: base.Add(time.Second)}, "1"},
		{ConflictFilter{Since: base.Add(time.Second), Until: base.Add(2 * time.Second)}, "2"},
		{ConflictFilter{Code: "lost"}, "4 3 2 1"},
		{ConflictFilter{Code: "won"}, ""},
		{ConflictFilter{Origin: 2}, "4 2 1"},
		{ConflictFilter{Origin: 1}, ""},
		{ConflictFilter{Keys: []KeyFilter{{"id", "1"}}}, "4 2 1"},
		{ConflictFilter{Keys: []KeyFilter{{"", "1"}}}, "4 2 1"},
		{ConflictFilter{Keys: []KeyFilter{{"", "1"}, {"id", "2"}}}, ""},
		{ConflictFilter{Keys: []KeyFilter{{"", "id"}}}, ""},
		{ConflictFilter{Keys: []KeyFilter{{"$?", "1"}}}, ""},
		{ConflictFilter{Limit: 2, Before: 4}, "2 1"},
		{ConflictFilter{Limit: 1, Before: 4}, "2"},
		{ConflictFilter{Before: 4, Exceptions: true}, "3 2 1"},
		{ConflictFilter{Before: 1}, ""},
	} {
		if got := ids(c.filter); got != c.want {
			t.Errorf("%+v: %q, want %q", c.filter, got, c.want)
		}
	}
	var none *NoRecordError
	if _, err := Conflicts(t.Context(), conn, ConflictFilter{Before: 9}); !errors.As(err, &none) || none.HintText() == "" {
		t.Errorf("a page behind a record that is not there: %v", err)
	}
	one, err := Conflicts(t.Context(), conn, ConflictFilter{Table: "a"})
	if err != nil {
		t.Fatal(err)
	}
	doc, err := json.Marshal(one[0])
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"id":1,"at":"2026-11-25T12:00:00.123456Z","kind":"update_missing","code":"lost","schema":"public","table":"a",` +
		`"key":{"id":"1"},"origin":2,"origin_lsn":"0/16B3748","origin_xid":700,"change":3,` +
		`"remote_time":"2026-11-25T12:00:00.000001Z","remote_row":{"v":"x","id":"1"},"local_site":1,"local_time":"2026-11-25T12:00:01Z"}`
	if d := cmp.Diff(normal(t, want), normal(t, string(doc))); d != "" {
		t.Error(d)
	}
}

func TestConflictsAreCountedByTableKindAndOutcome(t *testing.T) {
	c, conn := migrated(t)
	base := time.Date(2026, 11, 25, 12, 0, 0, 123456000, time.UTC)
	for i, kind := range []string{"insert_exists", "update_missing", "insert_exists", "", "insert_exists"} {
		insertConflict(t, c, base.Add(time.Duration(i)*time.Second), kind, "b")
	}
	insertConflict(t, c, base, "insert_exists", "a")
	got, err := CountConflicts(t.Context(), conn, ConflictFilter{Since: base, Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	want := ConflictStats{Since: &base, Total: 5, Counts: []ConflictCount{
		{"public", "b", "insert_exists", "lost", 3, base, base.Add(4 * time.Second)},
		{"public", "a", "insert_exists", "lost", 1, base, base},
		{"public", "b", "update_missing", "lost", 1, base.Add(time.Second), base.Add(time.Second)},
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	got, err = CountConflicts(t.Context(), conn, ConflictFilter{Until: base, Exceptions: true})
	if d := cmp.Diff(ConflictStats{Until: &base, Counts: []ConflictCount{}}, got); d != "" || err != nil {
		t.Errorf("nothing to count: %v %s", err, d)
	}
}

// normal decodes JSON, so that the order of an object's members does not count.
func normal(t *testing.T, doc string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(doc), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestMetaAndEvents(t *testing.T) {
	c, conn := migrated(t)
	ctx := t.Context()
	if _, ok, err := Meta(ctx, conn, "site"); ok || err != nil {
		t.Errorf("ok %t, error %v", ok, err)
	}
	for _, v := range []string{"1", "it's 'two'", ""} {
		if err := SetMeta(ctx, conn, "site", v); err != nil {
			t.Fatal(err)
		}
		if got, ok, err := Meta(ctx, conn, "site"); got != v || !ok || err != nil {
			t.Errorf("%q %t %v, want %q", got, ok, err, v)
		}
	}
	if err := Event(ctx, conn, "enrolled", "it's done", map[string]int{"rows": 3}); err != nil {
		t.Fatal(err)
	}
	if err := Event(ctx, conn, "held", "clock", nil); err != nil {
		t.Fatal(err)
	}
	if err := Event(ctx, conn, "bad", "x", func() {}); err == nil {
		t.Error("data that is no JSON was accepted")
	}
	got := pgtest.Query(t, c, "shop", "SELECT kind, text, data FROM duri.event ORDER BY id")
	want := [][]string{{"enrolled", "it's done", `{"rows": 3}`}, {"held", "clock", pgcluster.NullText}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
