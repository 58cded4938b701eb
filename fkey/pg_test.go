package fkey

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/policy"
)

// prepared gives a database with tables and duri's own, and a session of the run-time role in it.
func prepared(t *testing.T, tables string) (*pgcluster.Cluster, *pgconn.PgConn) {
	t.Helper()
	c := pgtest.New(t, pgtest.WithSetting("wal_level", "logical"), pgtest.WithSetting("track_commit_timestamp", "on"))
	pgtest.DB(t, c, "shop")
	pgtest.Exec(t, c, "shop", tables)
	pgtest.Exec(t, c, "shop", grants.SQL(grants.Spec{}))
	conn := connect(t, c)
	if err := catalog.Migrate(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	return c, conn
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

// applied runs SQL as apply does: without foreign keys and triggers.
func applied(t *testing.T, c *pgcluster.Cluster, sql string) {
	t.Helper()
	pgtest.Exec(t, c, "shop", "SET session_replication_role = replica;"+sql)
}

func read(t *testing.T, conn *pgconn.PgConn) map[string]*Constraint {
	t.Helper()
	all, err := Constraints(t.Context(), conn, nil)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*Constraint{}
	for _, c := range all {
		out[c.Name] = c
	}
	return out
}

// shown prints orphans as "key->ref", sorted.
func shown(list []Orphan) []string {
	out := []string{}
	for _, o := range list {
		var ref []string
		for _, r := range o.Ref {
			if r == nil {
				ref = append(ref, "NULL")
				continue
			}
			ref = append(ref, *r)
		}
		out = append(out, strings.Join(o.Key, ",")+"->"+strings.Join(ref, ","))
	}
	slices.Sort(out)
	return out
}

// shapes has foreign keys of all kinds, with orphans in each.
const shapes = `
	CREATE TABLE p (id int PRIMARY KEY);
	CREATE TABLE c (id int PRIMARY KEY, pid int CONSTRAINT plain REFERENCES p);
	CREATE TABLE pp (a text, b numeric(6,2), PRIMARY KEY (a, b));
	CREATE TABLE cs (k1 uuid, k2 text, x text, y numeric(6,2), PRIMARY KEY (k1, k2), CONSTRAINT composite FOREIGN KEY (x, y) REFERENCES pp);
	CREATE TABLE cf (id bigint PRIMARY KEY, x text, y numeric(6,2), CONSTRAINT match_full FOREIGN KEY (x, y) REFERENCES pp MATCH FULL);
	CREATE TABLE tree (id int PRIMARY KEY, up int CONSTRAINT self REFERENCES tree);
	CREATE TABLE pr (id int, d date, PRIMARY KEY (id, d)) PARTITION BY RANGE (d);
	CREATE TABLE pr_1 PARTITION OF pr FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
	CREATE TABLE pr_2 PARTITION OF pr FOR VALUES FROM ('2027-01-01') TO ('2028-01-01');
	CREATE TABLE cr (id int PRIMARY KEY, pid int, d date, CONSTRAINT parted FOREIGN KEY (pid, d) REFERENCES pr) PARTITION BY RANGE (id);
	CREATE TABLE cr_1 PARTITION OF cr FOR VALUES FROM (0) TO (100);
	CREATE TABLE cr_2 PARTITION OF cr FOR VALUES FROM (100) TO (200);
	CREATE TABLE keyless (v text, pid bigint CONSTRAINT keyless REFERENCES p);
	CREATE TABLE named (n text COLLATE "C" PRIMARY KEY);
	CREATE TABLE "Named Child" ("Id %s" char(3) PRIMARY KEY, "n ""1""" varchar(20) COLLATE "POSIX", CONSTRAINT "odd 'name'" FOREIGN KEY ("n ""1""") REFERENCES named);
	CREATE TABLE later (id int PRIMARY KEY, pid int);
	INSERT INTO later VALUES (1, 99); ALTER TABLE later ADD CONSTRAINT not_valid FOREIGN KEY (pid) REFERENCES p NOT VALID;
	CREATE TABLE inh (id int PRIMARY KEY) INHERITS (p);
	CREATE UNLOGGED TABLE cu (id int PRIMARY KEY, pid int CONSTRAINT unlogged REFERENCES p)`

const shapesRows = `
	INSERT INTO p VALUES (1), (2);
	INSERT INTO inh VALUES (7);
	INSERT INTO c SELECT i, CASE WHEN i % 10 = 0 THEN 3 WHEN i % 10 = 1 THEN NULL ELSE 1 END FROM generate_series(1, 40) i;
	INSERT INTO c VALUES (50, 7);
	INSERT INTO pp VALUES ('it''s "a\b"', 1.50);
	INSERT INTO cs SELECT gen_random_uuid(), 'fine', 'it''s "a\b"', 1.5 FROM generate_series(1, 5);
	INSERT INTO cs VALUES ('00000000-0000-0000-0000-000000000001', 'q"\,{}', 'it''s "a\b"', 2), ('00000000-0000-0000-0000-000000000002', 'b', NULL, 2);
	INSERT INTO cf VALUES (1, 'it''s "a\b"', 1.5), (2, NULL, NULL), (3, NULL, 1.5), (4, 'x', 1);
	INSERT INTO tree VALUES (1, NULL), (2, 1), (3, 3), (4, 9);
	INSERT INTO pr VALUES (1, '2026-05-05'), (2, '2027-05-05');
	INSERT INTO cr VALUES (1, 1, '2026-05-05'), (2, 2, '2027-05-05'), (3, 2, '2026-05-05'), (101, 1, '2027-05-05'), (102, NULL, '2027-05-05');
	INSERT INTO keyless VALUES ('a', 1), ('b', 8), ('c', 8), ('d', NULL);
	INSERT INTO named VALUES ('x');
	INSERT INTO "Named Child" VALUES ('a', 'x'), ('b', 'X')`

func TestOrphansOfAllShapesAreFound(t *testing.T) {
	c, conn := prepared(t, shapes)
	applied(t, c, shapesRows)
	all := read(t, conn)
	want := map[string][]string{
		"plain":      {"10->3", "20->3", "30->3", "40->3", "50->7"},
		"composite":  {`00000000-0000-0000-0000-000000000001,q"\,{}->it's "a\b",2.00`},
		"match_full": {"3->NULL,1.50", "4->x,1.00"},
		"self":       {"4->9"},
		"parted":     {"101->1,2027-05-05", "3->2,2026-05-05"},
		"keyless":    {"8->8"},
		`odd 'name'`: {"b  ->X"},
		"unlogged":   {},
	}
	if len(all) != len(want) {
		t.Errorf("%d constraints, want %d", len(all), len(want))
	}
	for name, orphans := range want {
		k := all[name]
		if k == nil {
			t.Errorf("constraint %s was not read", name)
			continue
		}
		if k.Replicated != (name != "unlogged") {
			t.Errorf("%s: replicated %t", name, k.Replicated)
		}
		found, err := Orphans(t.Context(), conn, k, 100)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(orphans, shown(found)); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if some, err := Orphans(t.Context(), conn, k, 1); err != nil || len(some) != min(1, len(orphans)) {
			t.Errorf("%s: limit 1 gave %d, %v", name, len(some), err)
		}
		checkRestricted(t, conn, k, found)
		checkPages(t, conn, k, orphans)
	}
	if k := all["parted"]; len(k.ChildStores) != 3 || len(k.ParentStores) != 3 {
		t.Errorf("%+v", k)
	}
	one, err := Constraints(t.Context(), conn, []string{"other"})
	if err != nil || len(one) != 0 {
		t.Errorf("%v, %v", one, err)
	}
}

// checkRestricted looks again by the child's keys and by the parent's.
func checkRestricted(t *testing.T, conn *pgconn.PgConn, k *Constraint, found []Orphan) {
	t.Helper()
	var keys, parents [][]string
	for _, o := range found {
		keys = append(keys, o.Key)
		var p []string
		for _, r := range o.Ref {
			if r != nil {
				p = append(p, *r)
			}
		}
		if len(p) == len(k.Columns) && !slices.ContainsFunc(parents, func(q []string) bool { return slices.Equal(p, q) }) {
			parents = append(parents, p)
		}
	}
	again, err := OrphansAmong(t.Context(), conn, k, keys)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(shown(found), shown(again)); d != "" {
		t.Errorf("%s among its own: %s", k.Name, d)
	}
	under, err := OrphansUnder(t.Context(), conn, k, parents, 100)
	if err != nil {
		t.Fatal(err)
	}
	whole := slices.DeleteFunc(shown(found), func(s string) bool { return strings.Contains(s, "NULL") })
	if d := cmp.Diff(whole, shown(under)); d != "" {
		t.Errorf("%s under the missing parents: %s", k.Name, d)
	}
}

// checkPages reads the child in small pages.
func checkPages(t *testing.T, conn *pgconn.PgConn, k *Constraint, want []string) {
	t.Helper()
	for _, rows := range []int{1, 3, 1000} {
		var all []Orphan
		var after []string
		for n := 0; ; n++ {
			found, end, err := page(t.Context(), conn, k, after, rows)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, found...)
			if after = end; end == nil {
				break
			}
			if n > 200 {
				t.Fatalf("%s in pages of %d does not end", k.Name, rows)
			}
		}
		if k.Pageable || rows > len(want) {
			if d := cmp.Diff(want, shown(all)); d != "" {
				t.Errorf("%s in pages of %d: %s", k.Name, rows, d)
			}
		}
	}
}

func TestExistingRowsAreNoOrphansAmongOthers(t *testing.T) {
	c, conn := prepared(t, shapes)
	applied(t, c, shapesRows)
	k := read(t, conn)["plain"]
	got, err := OrphansAmong(t.Context(), conn, k, [][]string{{"2"}, {"10"}, {"777"}})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"10->3"}, shown(got)); d != "" {
		t.Error(d)
	}
	got, err = OrphansUnder(t.Context(), conn, k, [][]string{{"1"}, {"3"}}, 2)
	if err != nil || len(got) != 2 {
		t.Errorf("%v, %v", got, err)
	}
}

func events(t *testing.T, c *pgcluster.Cluster) []string {
	t.Helper()
	out := []string{}
	for _, r := range pgtest.Query(t, c, "shop", "SELECT kind || ': ' || text FROM duri.event ORDER BY id") {
		out = append(out, r[0])
	}
	return out
}

func rows(t *testing.T, c *pgcluster.Cluster, sql string) string {
	t.Helper()
	var out []string
	for _, r := range pgtest.Query(t, c, "shop", sql) {
		out = append(out, strings.Join(r, ","))
	}
	return strings.Join(out, " ")
}

// do follows a policy for the only orphan of a constraint.
func do(t *testing.T, conn *pgconn.PgConn, k *Constraint, p policy.Orphans) (Outcome, error) {
	t.Helper()
	found, err := Orphans(t.Context(), conn, k, 10)
	if err != nil || len(found) == 0 {
		t.Fatalf("orphans %v, %v", found, err)
	}
	return handle(t.Context(), conn, k, found[0], p)
}

func must(t *testing.T, want, got Outcome, err error) {
	t.Helper()
	if err != nil || got != want {
		t.Fatalf("%s, %v; want %s", got, err, want)
	}
}

func TestAnOrphanIsReportedOnceAndForgottenWhenItIsNone(t *testing.T) {
	c, conn := prepared(t, `CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE c (id int PRIMARY KEY, pid int CONSTRAINT fk REFERENCES p)`)
	applied(t, c, "INSERT INTO c VALUES (1, 5)")
	k := read(t, conn)["fk"]
	for range 3 {
		out, err := do(t, conn, k, policy.Report)
		must(t, Recorded, out, err)
	}
	want := []string{`orphan: row {"id":"1"} of public.c has lost its parent {"id":"5"} in public.p (constraint fk)`}
	if d := cmp.Diff(want, events(t, c)); d != "" {
		t.Error(d)
	}
	got, err := known(t.Context(), conn, k)
	if err != nil || !got[`{"id":"1"}`] || len(got) != 1 {
		t.Errorf("known %v, %v", got, err)
	}
	if got := rows(t, c, "SELECT key ->> 'id', parent ->> 'id', policy, reason FROM duri.orphan"); got != "1,5,report," {
		t.Error(got)
	}
	pgtest.Exec(t, c, "shop", "INSERT INTO p VALUES (5)")
	if got, err := known(t.Context(), conn, k); err != nil || len(got) != 0 {
		t.Errorf("known %v, %v", got, err)
	}
	if got := rows(t, c, "SELECT count(*) FROM duri.orphan"); got != "0" {
		t.Error(got)
	}
	// Lost once more, it is news again.
	applied(t, c, "DELETE FROM p")
	out, err := do(t, conn, k, policy.Report)
	must(t, Recorded, out, err)
	if n := len(events(t, c)); n != 2 {
		t.Errorf("%d events", n)
	}
	pgtest.Exec(t, c, "shop", "ALTER TABLE c DROP CONSTRAINT fk")
	if err := forgetOthers(t.Context(), conn, nil); err != nil {
		t.Fatal(err)
	}
	if got := rows(t, c, "SELECT count(*) FROM duri.orphan"); got != "0" {
		t.Error(got)
	}
}

func TestAChildIsRemovedInAnOrdinaryTransaction(t *testing.T) {
	c, conn := prepared(t, `CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE c (id int PRIMARY KEY, pid int CONSTRAINT fk REFERENCES p);
		CREATE TABLE g (id int PRIMARY KEY, cid int REFERENCES c ON DELETE CASCADE)`)
	applied(t, c, "INSERT INTO p VALUES (1); INSERT INTO c VALUES (1, 1), (2, 5); INSERT INTO g VALUES (1, 2), (2, 1)")
	pgtest.Exec(t, c, "shop", "SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
	out, err := do(t, conn, read(t, conn)["fk"], policy.RemoveChild)
	must(t, Removed, out, err)
	if got := rows(t, c, "SELECT id FROM c") + "|" + rows(t, c, "SELECT id FROM g"); got != "1|2" {
		t.Errorf("left: %s", got)
	}
	want := []string{`orphan_removed: row {"id":"2"} of public.c was removed: its parent {"id":"5"} in public.p is gone (constraint fk)`}
	if d := cmp.Diff(want, events(t, c)); d != "" {
		t.Error(d)
	}
	// It is decoded as a change of this site: two deletes, and no origin.
	kinds := rows(t, c, `SELECT chr(get_byte(data, 0)) FROM pg_logical_slot_peek_binary_changes('s', NULL, NULL, 'proto_version', '1', 'publication_names', 'duri')`)
	if strings.Count(kinds, "D") != 2 || strings.Contains(kinds, "O") {
		t.Errorf("decoded: %s", kinds)
	}
}

func TestACompensationLooksAgainWithTheChildLocked(t *testing.T) {
	c, conn := prepared(t, `CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE c (id int PRIMARY KEY, pid int CONSTRAINT fk REFERENCES p)`)
	applied(t, c, "INSERT INTO p VALUES (1); INSERT INTO c VALUES (1, 5), (2, 6), (3, 7)")
	k := read(t, conn)["fk"]
	found, err := Orphans(t.Context(), conn, k, 10)
	if err != nil || len(found) != 3 {
		t.Fatalf("%v, %v", found, err)
	}
	// A client gives each what it lacks, and holds the rows while the compensation begins.
	client := connect(t, c)
	if _, err := pg.Rows(t.Context(), client, "BEGIN; UPDATE c SET pid = 1 WHERE id = 1; UPDATE c SET pid = NULL WHERE id = 2; DELETE FROM c WHERE id = 3; INSERT INTO p VALUES (6)"); err != nil {
		t.Fatal(err)
	}
	type result struct {
		out Outcome
		err error
	}
	done := make(chan result, 1)
	go func() {
		out, err := handle(t.Context(), conn, k, found[0], policy.RemoveChild)
		done <- result{out, err}
	}()
	waitFor(t, "the compensation waits for the row", func() bool {
		return rows(t, c, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'") == "1"
	})
	if _, err := pg.Rows(t.Context(), client, "COMMIT"); err != nil {
		t.Fatal(err)
	}
	r := <-done
	must(t, Gone, r.out, r.err)
	for _, o := range found[1:] {
		for _, p := range []policy.Orphans{policy.RemoveChild, policy.ResurrectParent} {
			out, err := handle(t.Context(), conn, k, o, p)
			must(t, Gone, out, err)
		}
	}
	if got := rows(t, c, "SELECT id, coalesce(pid, 0) FROM c ORDER BY 1") + "|" + rows(t, c, "SELECT id FROM p ORDER BY 1"); got != "1,1 2,0|1 6" {
		t.Error(got)
	}
}

// waitFor waits for a condition, looking every few milliseconds.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
		<-tick.C
	}
}

func TestALockedChildIsTriedLater(t *testing.T) {
	c, conn := prepared(t, `CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE c (id int PRIMARY KEY, pid int CONSTRAINT fk REFERENCES p)`)
	applied(t, c, "INSERT INTO c VALUES (1, 5)")
	client := connect(t, c)
	if _, err := pg.Rows(t.Context(), client, "BEGIN; SELECT FROM c FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	k := read(t, conn)["fk"]
	if out, err := do(t, conn, k, policy.RemoveChild); pg.SQLState(err) != "55P03" {
		t.Errorf("%s, %v", out, err)
	}
	if _, err := pg.Rows(t.Context(), client, "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	out, err := do(t, conn, k, policy.RemoveChild) // the session is usable
	must(t, Removed, out, err)
}

// conflicted records an image of a parent, as apply does.
func conflicted(t *testing.T, c *pgcluster.Cluster, table, remoteTime, remote, localTime, local string) {
	t.Helper()
	pgtest.Exec(t, c, "shop", fmt.Sprintf(`INSERT INTO duri.conflict (kind, code, table_schema, table_name, origin, origin_lsn, origin_xid, change, remote_time, remote_row, local_time, local_row)
		VALUES ('update_missing', 'lost', 'public', '%s', 2, '0/1', 1, 0, '2026-11-25 %s+00', %s, '2026-11-25 %s+00', %s)`, table, remoteTime, remote, localTime, local))
}

func TestTheParentComesBackFromItsNewestImage(t *testing.T) {
	c, conn := prepared(t, `CREATE TABLE p (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, name text NOT NULL, big text, twice int GENERATED ALWAYS AS (id * 2) STORED, born date DEFAULT '2000-01-01');
		CREATE TABLE c (id int PRIMARY KEY, pid bigint CONSTRAINT fk REFERENCES p)`)
	applied(t, c, "INSERT INTO c VALUES (1, 5), (2, 5)")
	conflicted(t, c, "p", "10:00", `'{"id": "5", "name": "old", "big": "value", "gone": "x", "born": null}'`, "09:00", `'{"id": "5", "name": "older", "big": "other"}'`)
	conflicted(t, c, "p", "12:00", "NULL", "11:00", `'{"id": "5", "name": "new", "twice": "3"}'`)
	conflicted(t, c, "p", "13:00", `'{"id": "6", "name": "another"}'`, "13:00", "NULL")
	conflicted(t, c, "c", "14:00", `'{"id": "5", "name": "no parent"}'`, "14:00", "NULL")
	k := read(t, conn)["fk"]
	out, err := do(t, conn, k, policy.ResurrectParent)
	must(t, Resurrected, out, err)
	if got := rows(t, c, "SELECT id, name, big, twice, coalesce(born::text, 'null') FROM p"); got != "5,new,value,10,null" {
		t.Error(got)
	}
	if e := events(t, c); len(e) != 1 || !strings.HasPrefix(e[0], `parent_resurrected: row {"id":"5"} of public.p was inserted again from the newest image`) {
		t.Errorf("%v", e)
	}
	if left, err := Orphans(t.Context(), conn, k, 10); err != nil || len(left) != 0 {
		t.Errorf("%v, %v", left, err)
	}
}

func TestWithoutAnImageTheParentNeedsDefaults(t *testing.T) {
	c, conn := prepared(t, `CREATE TABLE p (a int, b text, note text, at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (a, b));
		CREATE TABLE c (id int PRIMARY KEY, x int, y text, CONSTRAINT fk FOREIGN KEY (x, y) REFERENCES p);
		CREATE TABLE strict (id int PRIMARY KEY, name text NOT NULL, code int NOT NULL);
		CREATE TABLE cs (id int PRIMARY KEY, pid int CONSTRAINT strict_fk REFERENCES strict);
		CREATE TABLE cf (id int PRIMARY KEY, x int, y text, CONSTRAINT full_fk FOREIGN KEY (x, y) REFERENCES p MATCH FULL);
		CREATE TABLE mid (id int PRIMARY KEY CONSTRAINT mid_fk REFERENCES strict);
		CREATE TABLE leaf (id int PRIMARY KEY, mid int CONSTRAINT leaf_fk REFERENCES mid)`)
	applied(t, c, `INSERT INTO c VALUES (1, 5, 'it''s "q"'); INSERT INTO cs VALUES (1, 5); INSERT INTO cf VALUES (1, 5, NULL); INSERT INTO leaf VALUES (1, 9)`)
	all := read(t, conn)
	out, err := do(t, conn, all["fk"], policy.ResurrectParent)
	must(t, Resurrected, out, err)
	if got := rows(t, c, "SELECT a, b, note IS NULL, at IS NOT NULL FROM p"); got != `5,it's "q",t,t` {
		t.Error(got)
	}
	for name, reason := range map[string]string{
		"strict_fk": "no image of the parent is known with its column name, code, which has no default",
		"full_fk":   "the row refers to its parent by only a part of the key (MATCH FULL)",
		"leaf_fk":   `insert or update on table "mid" violates foreign key constraint "mid_fk"`,
	} {
		out, err := do(t, conn, all[name], policy.ResurrectParent)
		must(t, Recorded, out, err)
		if got := rows(t, c, "SELECT reason FROM duri.orphan WHERE constraint_name = '"+name+"'"); got != reason {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got := rows(t, c, "SELECT count(*) FROM strict") + rows(t, c, "SELECT count(*) FROM mid"); got != "00" {
		t.Error(got)
	}
	if e := strings.Join(events(t, c), "\n"); strings.Count(e, "policy resurrect_parent could not be followed: ") != 3 {
		t.Error(e)
	}
}

func TestPartitionedAndKeylessTablesAreCompensated(t *testing.T) {
	c, conn := prepared(t, shapes)
	applied(t, c, shapesRows)
	all := read(t, conn)
	conflicted(t, c, "pr_1", "10:00", `'{"id": "2", "d": "2026-05-05"}'`, "10:00", "NULL")
	for range 2 {
		out, err := do(t, conn, all["parted"], policy.ResurrectParent)
		must(t, Resurrected, out, err)
	}
	if got := rows(t, c, "SELECT tableoid::regclass, id FROM pr ORDER BY 1, 2"); got != "pr_1,1 pr_1,2 pr_2,1 pr_2,2" {
		t.Error(got)
	}
	out, err := do(t, conn, all["self"], policy.RemoveChild)
	must(t, Removed, out, err)
	// The publication lets nobody delete from a table without a replica identity: that is the reason recorded.
	out, err = do(t, conn, all["keyless"], policy.RemoveChild)
	must(t, Recorded, out, err)
	if got := rows(t, c, "SELECT reason FROM duri.orphan"); !strings.Contains(got, "does not have a replica identity") {
		t.Error(got)
	}
	pgtest.Exec(t, c, "shop", "ALTER TABLE keyless REPLICA IDENTITY FULL")
	out, err = do(t, conn, all["keyless"], policy.RemoveChild)
	must(t, Removed, out, err)
	if got := rows(t, c, "SELECT v FROM keyless ORDER BY 1") + rows(t, c, "SELECT count(*) FROM duri.orphan"); got != "a d0" {
		t.Error(got)
	}
}

// TestChildrenOfAParkedParentAreNoOrphans has parents of other types parked beside, which must not be read as these ones.
func TestChildrenOfAParkedParentAreNoOrphans(t *testing.T) {
	c, conn := prepared(t, `CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE c (id int PRIMARY KEY, pid bigint CONSTRAINT c_fk REFERENCES p);
		CREATE TABLE pr (id int, d date, PRIMARY KEY (id, d)) PARTITION BY RANGE (d);
		CREATE TABLE pr_1 PARTITION OF pr FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
		CREATE TABLE cr (id int PRIMARY KEY, pid int, d date, CONSTRAINT cr_fk FOREIGN KEY (pid, d) REFERENCES pr)`)
	const park = `INSERT INTO duri.parked (table_schema, table_name, key_norm, key, site, time, end_lsn, row, "constraint", rival)
		VALUES ('public', '%s', '\x%x', '%[3]s', 1, now(), '0/0', '%[3]s', 'u', '')`
	for i, row := range [][2]string{{"pr_1", `{"id": "1", "d": "2026-05-01"}`}, {"p", `{"id": "2"}`}, {"words", `{"id": "no number"}`}} {
		pgtest.Exec(t, c, "shop", fmt.Sprintf(park, row[0], []byte{byte(i)}, row[1]))
	}
	applied(t, c, `INSERT INTO c VALUES (1, 1), (2, 2), (3, NULL); INSERT INTO cr VALUES (1, 1, '2026-05-01'), (2, 1, '2026-05-02')`)
	for name, want := range map[string][]string{"c_fk": {"1->1"}, "cr_fk": {"2->1,2026-05-02"}} {
		k := read(t, conn)[name]
		found, err := Orphans(t.Context(), conn, k, 10)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, shown(found)); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		out, err := handle(t.Context(), conn, k, Orphan{Key: []string{map[string]string{"c_fk": "2", "cr_fk": "1"}[name]}, Ref: make([]*string, len(k.Columns))}, policy.RemoveChild)
		must(t, Gone, out, err)
	}
	pgtest.Exec(t, c, "shop", "DELETE FROM duri.parked WHERE table_name = 'p'")
	found, err := Orphans(t.Context(), conn, read(t, conn)["c_fk"], 10)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"1->1", "2->2"}, shown(found)); d != "" {
		t.Errorf("the parent is gone: %s", d)
	}
}

// TestCheckerFollowsPoliciesInPostgreSQL runs it all, over a restart of the server.
func TestCheckerFollowsPoliciesInPostgreSQL(t *testing.T) {
	c, _ := prepared(t, `CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE a (id int PRIMARY KEY, pid int CONSTRAINT a_fk REFERENCES p);
		CREATE TABLE b (id int PRIMARY KEY, pid int CONSTRAINT b_fk REFERENCES p); CREATE TABLE r (id int PRIMARY KEY, pid int CONSTRAINT r_fk REFERENCES p)`)
	for table, p := range map[string]string{"a": "remove_child", "b": "resurrect_parent"} {
		pgtest.Exec(t, c, "shop", fmt.Sprintf(`SELECT duri.set_policy('%[1]s', '{"foreign_keys": {"%[1]s_fk": "%[2]s"}}')`, table, p))
	}
	applied(t, c, "INSERT INTO a VALUES (1, 1)")
	k := New(Config{
		Connect: func(ctx context.Context) (*pgconn.PgConn, error) {
			return pg.Connect(ctx, c.DSN("shop", "duri"), "", nil)
		},
		Policies: func(ctx context.Context) (policy.Set, error) {
			conn, err := pg.Connect(ctx, c.DSN("shop", "duri"), "", nil)
			if err != nil {
				return policy.Set{}, err
			}
			defer pg.Close(conn)
			return catalog.Policies(ctx, conn)
		},
		Settler: settlerFunc(func(context.Context) (bool, error) { return true, nil }),
		Elected: func() bool { return true },
		Delay:   10 * time.Millisecond,
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()
	defer func() {
		cancel()
		<-done
	}()
	waitFor(t, "the first round removes the orphan", func() bool { return rows(t, c, "SELECT count(*) FROM a") == "0" })
	waitFor(t, "the first round ends", func() bool { return !k.Status().CheckedAt.IsZero() })
	applied(t, c, "INSERT INTO b VALUES (1, 2); INSERT INTO r VALUES (1, 3)")
	k.Touched("public.b")
	k.Touched("public.r")
	waitFor(t, "the parent is back", func() bool { return rows(t, c, "SELECT id FROM p") == "2" })
	waitFor(t, "the orphan is reported", func() bool { return k.Status().Orphans == 1 })
	want := []ConstraintStatus{{"r_fk", "public.r", "public.p", policy.Report, 1, 0}}
	if d := cmp.Diff(want, k.Status().Constraints); d != "" {
		t.Error(d)
	}
	if err := c.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	applied(t, c, "INSERT INTO r VALUES (2, 4)")
	k.Touched("public.r")
	waitFor(t, "the next orphan is reported after a restart", func() bool { return k.Status().Orphans == 2 && k.Status().LastError == "" })
	if n := strings.Count(strings.Join(events(t, c), "\n"), "orphan: "); n != 2 {
		t.Errorf("%d reports", n)
	}
}
