package apply

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/wal"
)

const scenarioSchema = `
CREATE TABLE t (id int PRIMARY KEY, v text, n int DEFAULT 0, u int UNIQUE, big text);
ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
CREATE TABLE bag (id int, v text);
CREATE TABLE unrelated (id int);`

// scenario is a row of scenarios.md between two sites: seed is written at A and seen by both, then the links are cut,
// the steps run one after the other ("A: SQL"), and the links heal.
type scenario struct {
	name  string
	seed  string
	steps []string
	want  string   // rows of t and bag at both sites, without big unless it is wrong
	atA   []string // conflict records: kind code key incoming-v vs local-v
	atB   []string
	stamp func(a, b *site) // how versions are changed; nil: commit times
}

var seedRow = "INSERT INTO t VALUES (1, 'seed', 0, NULL, repeat('old ', 2000))"

var scenarios = []scenario{
	{
		name: "S01 insert against insert", steps: []string{"A: INSERT INTO t VALUES (1,'a')", "B: INSERT INTO t VALUES (1,'b')"},
		want: "t 1 b 0\n",
		atA:  []string{"insert_exists won 1 b vs a"}, atB: []string{"insert_exists lost 1 a vs b"},
	},
	{
		name: "S02 update against update", seed: seedRow, steps: []string{"A: UPDATE t SET v='a'", "B: UPDATE t SET v='b'"},
		want: "t 1 b 0 old\n",
		atA:  []string{"update_origin_differs won 1 b vs a"}, atB: []string{"update_origin_differs lost 1 a vs b"},
	},
	{
		name: "S03 different columns of one row, row mode", seed: seedRow, steps: []string{"A: UPDATE t SET v='a'", "B: UPDATE t SET n=5"},
		want: "t 1 seed 5 old\n",
		atA:  []string{"update_origin_differs won 1 seed vs a"}, atB: []string{"update_origin_differs lost 1 a vs seed"},
	},
	{
		name: "S04 the same microsecond, A first", seed: seedRow, steps: []string{"A: UPDATE t SET v='a'", "B: UPDATE t SET v='b'"},
		stamp: sameTime,
		want:  "t 1 b 0 old\n",
		atA:   []string{"update_origin_differs won 1 b vs a"}, atB: []string{"update_origin_differs lost 1 a vs b"},
	},
	{
		name: "S04 the same microsecond, B first", seed: seedRow, steps: []string{"B: UPDATE t SET v='b'", "A: UPDATE t SET v='a'"},
		stamp: sameTime,
		want:  "t 1 b 0 old\n",
		atA:   []string{"update_origin_differs won 1 b vs a"}, atB: []string{"update_origin_differs lost 1 a vs b"},
	},
	{
		name: "S05 between two changes of the other", seed: seedRow, steps: []string{"A: UPDATE t SET v='a1'", "B: UPDATE t SET v='b'", "A: UPDATE t SET v='a2'"},
		want: "t 1 a2 0 old\n",
		atA:  []string{"update_origin_differs lost 1 b vs a2"},
		atB:  []string{"update_origin_differs lost 1 a1 vs b", "update_origin_differs won 1 a2 vs b"},
	},
	{
		name: "S06 delete against delete", seed: seedRow, steps: []string{"A: DELETE FROM t", "B: DELETE FROM t"},
		atA: []string{"delete_missing won 1 - vs -"}, atB: []string{"delete_missing lost 1 - vs -"},
	},
	{
		name: "S07 update, then delete", seed: seedRow, steps: []string{"A: UPDATE t SET v='a'", "B: DELETE FROM t"},
		atA: []string{"delete_origin_differs won 1 - vs a"}, atB: []string{"update_deleted lost 1 a vs -"},
	},
	{
		name: "S08 delete, then update", seed: seedRow, steps: []string{"B: DELETE FROM t", "A: UPDATE t SET v='a'"},
		want: "t 1 a 0 old\n",
		atA:  []string{"delete_origin_differs lost 1 - vs a"}, atB: []string{"update_deleted won 1 a vs -"},
	},
	{
		name: "S09 delete and insert, then update", seed: seedRow, steps: []string{"B: DELETE FROM t", "B: INSERT INTO t VALUES (1,'new')", "A: UPDATE t SET v='a'"},
		want: "t 1 a 0 old\n",
		atA:  []string{"delete_origin_differs lost 1 - vs a", "insert_exists lost 1 new vs a"},
		atB:  []string{"update_origin_differs won 1 a vs new"},
	},
	{
		name: "S10 delete and insert, then delete", seed: seedRow, steps: []string{"A: DELETE FROM t", "A: INSERT INTO t VALUES (1,'re')", "B: DELETE FROM t"},
		atA: []string{"delete_origin_differs won 1 - vs re"},
		atB: []string{"delete_missing lost 1 - vs -", "update_deleted lost 1 re vs -"},
	},
	{
		name: "S15 the clock steps back", seed: seedRow, steps: []string{"A: UPDATE t SET v='a'", "B: UPDATE t SET v='b'", "A: UPDATE t SET v='a2'"},
		stamp: stepBack,
		want:  "t 1 a2 0 old\n",
		atA:   []string{"update_origin_differs lost 1 b vs a2"},
		atB:   []string{"update_origin_differs won 1 a vs b"},
	},
	{
		name: "S24 key change, then update", seed: seedRow, steps: []string{"A: UPDATE t SET id=100", "B: UPDATE t SET v='b'"},
		want: "t 1 b 0 old\nt 100 seed 0 old\n",
		atA:  []string{"update_deleted won 1 b vs -"}, atB: []string{" filled 100 seed vs -", "delete_origin_differs lost 1 - vs b"},
	},
	{
		name: "S24 update, then key change", seed: seedRow, steps: []string{"B: UPDATE t SET v='b'", "A: UPDATE t SET id=100"},
		want: "t 100 seed 0 old\n",
		atA:  []string{"update_deleted lost 1 b vs -"}, atB: []string{" filled 100 seed vs -", "delete_origin_differs won 1 - vs b"},
	},
	{
		name: "S25 two key changes meet", seed: "INSERT INTO t VALUES (4,'four',0,NULL,repeat('old ',2000)),(5,'five',0,NULL,repeat('old ',2000))",
		steps: []string{"A: UPDATE t SET id=6 WHERE id=5", "B: UPDATE t SET id=6 WHERE id=4"},
		want:  "t 6 four 0 old\n",
		atA:   []string{"insert_exists won 6 four vs five"}, atB: []string{"insert_exists lost 6 five vs four"},
	},
	{
		name: "S29 increments, last writer wins", seed: seedRow, steps: []string{"A: UPDATE t SET n=n+1", "B: UPDATE t SET n=n+1"},
		want: "t 1 seed 1 old\n",
		atA:  []string{"update_origin_differs won 1 seed vs seed"}, atB: []string{"update_origin_differs lost 1 seed vs seed"},
	},
	{
		name: "S30 an untouched TOAST value", seed: seedRow, steps: []string{"B: UPDATE t SET big=repeat('new ',2000)", "A: UPDATE t SET v='a'"},
		want: "t 1 a 0 old\n",
		atA:  []string{"update_origin_differs lost 1 seed vs a"}, atB: []string{"update_origin_differs won 1 a vs seed"},
	},
	{
		name: "S31 truncate", seed: seedRow, steps: []string{"B: INSERT INTO t VALUES (8,'eight')", "A: TRUNCATE t", "B: INSERT INTO t VALUES (9,'nine')"},
		want: "t 9 nine 0\n",
		atA:  []string{"update_deleted lost 8 eight vs -", "update_deleted won 9 nine vs -"},
		atB:  []string{"delete_origin_differs won 8 - vs eight"},
	},
	{
		name: "S31 truncate without a key", seed: "INSERT INTO bag VALUES (1,'seed')",
		steps: []string{"B: INSERT INTO bag VALUES (8,'eight')", "A: TRUNCATE bag", "B: INSERT INTO bag VALUES (9,'nine')"},
		want:  "bag 9 nine 0\n",
		atA:   []string{"update_deleted lost - eight vs -"},
		atB:   []string{"delete_origin_differs won - - vs eight"},
	},
	{
		name: "S36 half of a transaction loses", seed: seedRow + "; INSERT INTO t VALUES (2,'two')",
		steps: []string{"A: BEGIN; UPDATE t SET v='a' WHERE id=1; UPDATE t SET v='a' WHERE id=2; COMMIT", "B: UPDATE t SET v='b' WHERE id=2"},
		want:  "t 1 a 0 old\nt 2 b 0\n",
		atA:   []string{"update_origin_differs won 2 b vs a"}, atB: []string{"update_origin_differs lost 2 a vs b"},
	},
	{
		name: "a key that comes and goes", steps: []string{
			"A: INSERT INTO t VALUES (1,'a')", "B: INSERT INTO t VALUES (1,'b')", "A: UPDATE t SET id=2", "B: DELETE FROM t", "A: DELETE FROM t",
		},
		atA: []string{"delete_missing won 1 - vs -", "update_deleted lost 1 b vs -"},
		atB: []string{"delete_missing lost 1 - vs -", "update_deleted lost 1 a vs -"},
	},
}

// sameTime gives every change after the seed the version time of the first one.
func sameTime(a, b *site) {
	var first wal.Time
	stamp := func(t *wal.Txn) {
		if first == 0 {
			first = t.VersionTime
		}
		t.VersionTime = first
	}
	a.stamp, b.stamp = stamp, stamp
}

// stepBack lets A's clock be ahead once; what follows gets the greatest version so far and a microsecond (rule 3).
func stepBack(a, _ *site) {
	var greatest wal.Time
	a.stamp = func(t *wal.Txn) {
		if greatest == 0 {
			greatest = t.VersionTime.Add(300 * time.Millisecond)
		} else {
			greatest++
		}
		t.VersionTime = greatest
	}
}

// orders are the ways in which the links heal.
var orders = []struct {
	name string
	heal func(a, b *site)
}{
	{"A to B first", func(a, b *site) {
		a.feed.release(b.id)
		b.applied()
		b.feed.release(a.id)
	}},
	{"B to A first", func(a, b *site) {
		b.feed.release(a.id)
		a.applied()
		a.feed.release(b.id)
	}},
	{"one by one", func(a, b *site) {
		for a.feed.step(b.id, 1) || b.feed.step(a.id, 1) {
			a.caughtUp()
			b.caughtUp()
		}
		a.feed.release(b.id)
		b.feed.release(a.id)
	}},
}

// TestScenarios runs the scenarios in each arrival order.
func TestScenarios(t *testing.T) {
	a, b := newRig(t, scenarioSchema, rigOptions{asRole: true})
	for _, sc := range scenarios {
		for _, order := range orders {
			t.Run(sc.name+", "+order.name, func(t *testing.T) { sc.run(t, a, b, order.heal) })
		}
	}
}

func (sc scenario) run(t *testing.T, a, b *site, heal func(a, b *site)) {
	a.t, b.t = t, t
	a.sql, b.sql = nil, nil
	a.exec("TRUNCATE t, bag")
	settle(a, b)
	if sc.seed != "" {
		a.exec(sc.seed)
		settle(a, b)
		// The other site says that it has seen the seed.
		b.exec("INSERT INTO t VALUES (-1); DELETE FROM t WHERE id = -1")
		settle(a, b)
	}
	a.exec("DELETE FROM duri.conflict")
	b.exec("DELETE FROM duri.conflict")
	a.feed.hold(b.id)
	b.feed.hold(a.id)
	if sc.stamp != nil {
		sc.stamp(a, b)
	}
	for _, step := range sc.steps {
		s := map[string]*site{"A": a, "B": b}[step[:1]]
		s.exec(step[3:])
		s.captured()
	}
	a.stamp, b.stamp = nil, nil
	heal(a, b)
	settle(a, b)
	const rows = `SELECT concat_ws(' ', 't', id, v, n, left(big, 3)) FROM t UNION ALL SELECT concat_ws(' ', 'bag', id, v, 0) FROM bag ORDER BY 1`
	for _, s := range []*site{a, b} {
		if got := s.rows(rows); got != sc.want {
			t.Errorf("site %s holds\n%swant\n%s", s.name, got, sc.want)
		}
	}
	sc.compareRecords(t, a, sc.atA)
	sc.compareRecords(t, b, sc.atB)
	same(t, a, b, "SELECT md5(t::text) FROM t ORDER BY 1")
}

func (sc scenario) compareRecords(t *testing.T, s *site, want []string) {
	t.Helper()
	const sql = `SELECT concat_ws(' ', kind, code, coalesce(key ->> 'id', '-'), coalesce(remote_row ->> 'v', '-'), 'vs', coalesce(local_row ->> 'v', '-'))
		FROM duri.conflict ORDER BY 1`
	var got []string
	for _, r := range s.query(sql) {
		got = append(got, r[0])
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("records at %s (-want +got):\n%s", s.name, d)
	}
}

// TestRecordsHoldBothImages checks the columns of one conflict record.
func TestRecordsHoldBothImages(t *testing.T) {
	a, b := newRig(t, scenarioSchema, rigOptions{asRole: true})
	a.exec("INSERT INTO t VALUES (1, 'seed', 1, NULL, NULL)")
	settle(a, b)
	a.feed.hold(b.id)
	b.feed.hold(a.id)
	a.exec("BEGIN; INSERT INTO bag VALUES (1); UPDATE t SET v = 'say \"hi\" \\ <tab>\t'; COMMIT")
	b.exec("UPDATE t SET v = '', n = NULL")
	a.captured()
	b.captured()
	a.feed.release(b.id)
	b.feed.release(a.id)
	settle(a, b)
	ours := a.feed.txns()[1]
	theirs := b.feed.txns()[0]
	want := fmt.Sprintf(`update_origin_differs|lost|public|t|{"id": "1"}|1|%s|%d|1|t|{"n": "1", "u": null, "v": "say \"hi\" \\ <tab>\t", "id": "1", "big": null}|2|t|{"n": null, "u": null, "v": "", "id": "1", "big": null}`+"\n",
		ours.CommitLSN, ours.XID)
	got := b.rows(fmt.Sprintf(`SELECT kind, code, table_schema, table_name, key, origin, origin_lsn, origin_xid, change, remote_time = '%s', remote_row, local_site, local_time = '%s', local_row FROM duri.conflict`,
		ours.VersionTime, theirs.VersionTime))
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if n := b.worker.Status().Conflicts; n != 1 {
		t.Errorf("status tells of %d conflicts", n)
	}
}
