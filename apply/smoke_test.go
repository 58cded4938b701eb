package apply

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const bankSchema = `
CREATE TABLE accounts (aid int PRIMARY KEY, bid int, abalance int NOT NULL, filler char(84));
CREATE TABLE tellers (tid int PRIMARY KEY, bid int, tbalance int NOT NULL, filler char(84));
CREATE TABLE branches (bid int PRIMARY KEY, bbalance int NOT NULL, filler char(88));
CREATE TABLE history (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22));`

// TestBank runs the TPC-B transaction, the ordinary case: no conflicts, a table without a key among them.
func TestBank(t *testing.T) {
	a, b := newRig(t, bankSchema, rigOptions{asRole: true})
	a.exec(`INSERT INTO branches SELECT i, 0 FROM generate_series(1,2) i;
		INSERT INTO tellers SELECT i, 1, 0 FROM generate_series(1,20) i;
		INSERT INTO accounts SELECT i, 1, 0, '' FROM generate_series(1,1000) i`)
	c := a.connect()
	for i := range 300 {
		aid, tid, bid, delta := i*7919%1000+1, i%20+1, i%2+1, i%101-50
		run(t, c, fmt.Sprintf(`BEGIN; UPDATE accounts SET abalance = abalance + %[4]d WHERE aid = %[1]d;
			UPDATE tellers SET tbalance = tbalance + %[4]d WHERE tid = %[2]d;
			UPDATE branches SET bbalance = bbalance + %[4]d WHERE bid = %[3]d;
			INSERT INTO history (tid, bid, aid, delta, mtime) VALUES (%[2]d, %[3]d, %[1]d, %[4]d, CURRENT_TIMESTAMP); END`, aid, tid, bid, delta))
	}
	settle(a, b)
	same(t, a, b, dump("accounts", "tellers", "branches", "history"))
	if n := b.query("SELECT count(*) FROM history")[0][0]; n != "300" {
		t.Errorf("history has %s rows", n)
	}
	if got := b.rows("SELECT kind, code, table_name, key, remote_row, local_row FROM duri.conflict"); got != "" {
		t.Errorf("conflicts without a cause:\n%s", got)
	}
	eventually(t, "the local flush confirms what was applied", func() bool {
		return b.worker.Status().Durable == b.worker.Status().Applied
	})
	sums := b.query("SELECT sum(transactions), sum(changes), count(*) FROM duri.applied")[0]
	t.Logf("applied %s transactions, %s changes in %s", sums[0], sums[1], sums[2])
	if sums[0] != "303" && sums[0] != "301" { // exec runs its statements in one implicit transaction
		t.Errorf("duri.applied tells of %s transactions", sums[0])
	}
}

// TestShapes sends the shapes of change that the applier must tell apart, both with and without being batched with
// others: every step is one client statement or transaction at A, and after it both sites must be equal.
func TestShapes(t *testing.T) {
	const schema = `
CREATE TABLE t (id int PRIMARY KEY, v text, n int DEFAULT 0, u int UNIQUE, big text);
ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
CREATE TABLE bag (x int, y text);
CREATE TABLE fullbag (x int, y text, j json, b bool, c char(5));
ALTER TABLE fullbag REPLICA IDENTITY FULL;
CREATE TABLE fullkey (id int PRIMARY KEY, v text, big text);
ALTER TABLE fullkey REPLICA IDENTITY FULL;
ALTER TABLE fullkey ALTER big SET STORAGE EXTERNAL;
CREATE TABLE byindex (id int PRIMARY KEY, code text NOT NULL UNIQUE, v text);
ALTER TABLE byindex REPLICA IDENTITY USING INDEX byindex_code_key;
CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, u int UNIQUE DEFERRABLE, v text);
ALTER TABLE deferred ADD UNIQUE (id), ALTER id SET NOT NULL;
CREATE UNIQUE INDEX deferred_ri ON deferred (id);
ALTER TABLE deferred REPLICA IDENTITY USING INDEX deferred_ri;
CREATE TABLE ident (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, a int, b int GENERATED ALWAYS AS (a * 2) STORED, big text);
ALTER TABLE ident ALTER big SET STORAGE EXTERNAL;
CREATE TABLE onlykey (a int, b text, PRIMARY KEY (a, b));
CREATE TABLE part (id int, at date, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE part_2 PARTITION OF part FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
CREATE SCHEMA "Odd ""schema""";
CREATE TABLE "Odd ""schema"""."select" ("Key ""1""" int, "from" text, " " text, PRIMARY KEY ("from", "Key ""1"""));
CREATE TABLE num (k numeric PRIMARY KEY, v text);
CREATE TABLE texts (k text PRIMARY KEY, v text);
CREATE TABLE flt (k float8, i interval, c char(8), PRIMARY KEY (k, i, c));
CREATE TABLE reordered (v text, id int PRIMARY KEY, w int);
`
	a, b := newRig(t, schema, rigOptions{asRole: true})
	// The same columns in another order, and one more here.
	b.exec("DROP TABLE reordered; CREATE TABLE reordered (w int, extra text DEFAULT 'here', id int PRIMARY KEY, v text)")
	big := func(seed string) string { return fmt.Sprintf("repeat('%s', 4000)", seed) }
	steps := []string{
		"INSERT INTO t SELECT i, 'v' || i, i, i, " + big("ab") + " FROM generate_series(1,10) i",
		"UPDATE t SET v = 'w' WHERE id < 4",
		"UPDATE t SET n = n + 1; UPDATE t SET n = n + 1; UPDATE t SET v = NULL WHERE id = 5",
		"DELETE FROM t WHERE id = 10",
		"BEGIN; INSERT INTO t VALUES (11); UPDATE t SET v = 'x' WHERE id = 11; DELETE FROM t WHERE id = 11; COMMIT",
		"BEGIN; DELETE FROM t WHERE id = 9; INSERT INTO t VALUES (9, 'back', 9, 9, 'small'); COMMIT",
		"BEGIN; UPDATE t SET u = NULL WHERE id = 1; UPDATE t SET u = 1 WHERE id = 2; UPDATE t SET u = 2 WHERE id = 1; COMMIT",
		"UPDATE t SET id = 101 WHERE id = 1", // key change with an untouched TOAST value
		"UPDATE t SET id = 102, big = 'changed' WHERE id = 2",
		"BEGIN; UPDATE t SET id = 103 WHERE id = 3; UPDATE t SET id = 3 WHERE id = 4; UPDATE t SET id = 4 WHERE id = 103; COMMIT", // keys swap, big untouched
		"BEGIN; UPDATE t SET v = 'moved' WHERE id = 5; UPDATE t SET id = 105 WHERE id = 5; UPDATE t SET id = 106 WHERE id = 105; COMMIT",
		"BEGIN; UPDATE t SET id = 5 WHERE id = 106; DELETE FROM t WHERE id = 5; INSERT INTO t VALUES (5, 'five'); COMMIT",
		"BEGIN; DELETE FROM t WHERE id = 7; UPDATE t SET id = 7 WHERE id = 8; COMMIT", // a row takes the key of another
		"INSERT INTO bag VALUES (1,'a'),(1,'a'),(NULL,NULL),(2,'')",
		"INSERT INTO fullbag VALUES (1,'a','{\"a\": 1}',true,'x'),(1,'a','{\"a\": 1}',true,'x'),(1,'a','{\"a\": 1}',true,'x'),(2,NULL,NULL,NULL,NULL)",
		"DELETE FROM fullbag WHERE ctid = (SELECT min(ctid) FROM fullbag)",
		"UPDATE fullbag SET x = 9 WHERE ctid = (SELECT min(ctid) FROM fullbag WHERE x = 1)",
		"BEGIN; INSERT INTO fullbag VALUES (3,'c',NULL,false,'y'); UPDATE fullbag SET y = 'd' WHERE x = 3; INSERT INTO fullbag VALUES (3,'c',NULL,false,'y'); DELETE FROM fullbag WHERE y = 'd'; COMMIT",
		"UPDATE fullbag SET y = y", // nothing changes in it
		"INSERT INTO fullkey SELECT i, 'v', " + big("cd") + " FROM generate_series(1,5) i",
		"UPDATE fullkey SET v = 'w'",
		"UPDATE fullkey SET id = id + 100",
		"BEGIN; DELETE FROM fullkey WHERE id = 101; INSERT INTO fullkey VALUES (101, 'again', 'x'); COMMIT",
		"INSERT INTO byindex VALUES (1,'one','x'),(2,'two','y')",
		"UPDATE byindex SET v = 'z' WHERE id = 1; UPDATE byindex SET id = 3 WHERE id = 2; UPDATE byindex SET code = 'uno' WHERE id = 1",
		"DELETE FROM byindex WHERE code = 'two'",
		"INSERT INTO deferred SELECT i, i, 'v' FROM generate_series(1,4) i",
		"UPDATE deferred SET u = 5 - u", // swaps inside one statement
		"UPDATE deferred SET id = id + 10",
		"INSERT INTO ident (a, big) SELECT i, " + big("ef") + " FROM generate_series(1,3) i",
		"UPDATE ident SET a = a + 1 WHERE id = 1; DELETE FROM ident WHERE id = 2",
		"UPDATE ident SET id = DEFAULT WHERE id = 1",
		"UPDATE ident SET big = big, a = a",
		"INSERT INTO ident OVERRIDING SYSTEM VALUE VALUES (50, 1)",
		"INSERT INTO onlykey VALUES (1,'a'),(1,'b'),(2,'a')",
		"UPDATE onlykey SET a = a; UPDATE onlykey SET b = b || 'x' WHERE a = 1",
		"INSERT INTO part VALUES (1,'2026-01-05','jan'),(2,'2026-02-05','feb')",
		"UPDATE part SET v = 'x'; UPDATE part SET at = '2026-02-10' WHERE id = 1",
		"DELETE FROM part WHERE id = 2",
		`INSERT INTO "Odd ""schema"""."select" VALUES (1,'it''s','\'),(2,'"q"','{a,"b"}'),(3,E'tab\tnl\n','NULL'),(4,'','')`,
		`UPDATE "Odd ""schema"""."select" SET " " = " " || ',{}' ; DELETE FROM "Odd ""schema"""."select" WHERE "Key ""1""" = 2`,
		"INSERT INTO num VALUES (1.0,'a'),(2.00,'b'),(1e20,'c'),(-0.0,'d'),('NaN','e'),('Infinity','f')",
		"UPDATE num SET v = v || '!' ; UPDATE num SET k = 1.00 WHERE k = 1; DELETE FROM num WHERE k = 2.0; INSERT INTO num VALUES (2.000, 'new')",
		`INSERT INTO texts VALUES ('',''),(' ','b'),('a''b"c\d','q'),('{"x"}','r'),('NULL','s'),(E'\u00e9\U0001F600','t'),(E'line\nbreak\ttab','u'),('a,b','v')`,
		"UPDATE texts SET v = v || k; UPDATE texts SET k = k || '''' WHERE k = ' '; DELETE FROM texts WHERE k = 'NULL'",
		"INSERT INTO flt VALUES (0,'1 day','x'),('-0','2 days','x '),('NaN','1 mon','y')",
		"UPDATE flt SET k = '-0', i = '24 hours' WHERE k = 0 AND i = '1 day'; DELETE FROM flt WHERE i = '48 hours'",
		"INSERT INTO reordered VALUES ('v', 1, 2), ('w', 2, 3); UPDATE reordered SET w = 9 WHERE id = 1; DELETE FROM reordered WHERE id = 2",
		"BEGIN; INSERT INTO t VALUES (200); TRUNCATE t, bag; INSERT INTO t VALUES (201, 'after'); INSERT INTO bag VALUES (7); COMMIT",
		"TRUNCATE part; TRUNCATE fullbag; INSERT INTO fullbag VALUES (1)",
	}
	tables := []string{"t", "bag", "fullbag", "fullkey", "byindex", "deferred", "ident", "onlykey", "part", `"Odd ""schema"""."select"`, "num", "texts", "flt"}
	check := func(what string) {
		t.Helper()
		if x, y := a.rows(dump(tables...)), b.rows(dump(tables...)); x != y {
			t.Fatalf("after %s\nA and B differ:\n%s", what, clip(cmp.Diff(x, y)))
		}
		same(t, a, b, "SELECT id, v, w FROM reordered ORDER BY id")
		if got := b.rows("SELECT kind, code, table_name, key, remote_row, local_row FROM duri.conflict WHERE code <> 'filled'"); got != "" {
			t.Fatalf("after %s\nconflicts without a cause:\n%s", what, clip(got))
		}
	}
	for _, sql := range steps {
		a.exec(sql)
		settle(a, b)
		check(sql)
	}
	// Once more in one go, so that everything is merged.
	a.exec("TRUNCATE " + strings.Join(append(tables, "reordered"), ", ") + " RESTART IDENTITY")
	settle(a, b)
	check("truncating everything")
	a.feed.hold(b.id)
	for _, sql := range steps {
		a.exec(sql)
	}
	a.captured()
	a.feed.release(b.id)
	settle(a, b)
	check("everything in one batch")
	if n := b.worker.Status().Retries; n > 60 {
		t.Errorf("%d retries", n)
	}
}
