package verify

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pgtest"
)

// watch samples the sessions of verify until stop is called, which gives how often one was seen in a transaction, and
// the transactions that did not begin with the statement that was running: they held a snapshot over several.
func (s *twoSites) watch(t testing.TB) (stop func() (seen int, held []string)) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	var seen int
	var held []string
	go func() {
		defer close(done)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			rows, err := s.c.QueryText(ctx, "postgres", `
				SELECT state, query_start - xact_start > '1 s', left(query, 60) FROM pg_stat_activity
				WHERE application_name = 'duri verify' AND xact_start IS NOT NULL`)
			if err != nil && ctx.Err() == nil {
				held = append(held, err.Error())
				return
			}
			seen += len(rows)
			for _, r := range rows {
				if r[1] == "t" || strings.HasPrefix(r[0], "idle in transaction") {
					held = append(held, strings.Join(r, " "))
				}
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	}()
	return func() (int, []string) { cancel(); <-done; return seen, held }
}

func TestThreeDifferencesIn200000RowsAreFoundByShortStatements(t *testing.T) {
	s := newSites(t, `CREATE TABLE big (id int PRIMARY KEY, v text); CREATE TABLE heap (id int, v text); ALTER TABLE heap REPLICA IDENTITY FULL`)
	for table, rows := range map[string]int{"big": 200_000, "heap": 50_000} {
		s.both(t, fmt.Sprintf("INSERT INTO %s SELECT g, md5(g::text) FROM generate_series(1, %d) g", table, rows))
		s.both(t, "ANALYZE "+table)
		s.exec(t, "a", fmt.Sprintf("UPDATE %s SET v = 'X' || v WHERE id = 7777; DELETE FROM %[1]s WHERE id = %d", table, rows))
		s.exec(t, "b", "DELETE FROM "+table+" WHERE id = 1")
	}
	stop := s.watch(t)
	rep := s.run(t, Options{})
	seen, held := stop()
	wantDiffs(t, rep, "big differs 7777 [v]", "big missing_at_a 200000", "big missing_at_b 1",
		"heap missing_at_b 1/0", "heap missing_at_b 1/0", "heap missing_at_a 0/1", "heap missing_at_a 0/1")
	if seen == 0 || len(held) > 0 {
		t.Errorf("seen at work %d times; held transactions: %q", seen, held)
	}
	t.Logf("%.0f rows/s, %d ranges", rep.RowsPerSecond, rep.Tables[0].Ranges)
	d := rep.Tables[0].Differences[1]
	if d.A["v"] == nil || d.B["v"] == nil || *d.A["v"] != "X"+*d.B["v"] || *d.A["id"] != "7777" {
		t.Errorf("images %v, %v", d.A, d.B)
	}
}

func TestKeysThatSortDifferentlyAreComparedByHash(t *testing.T) {
	s := newSites(t, "CREATE TABLE other (id int PRIMARY KEY)")
	s.exec(t, "a", `CREATE TABLE t (k text COLLATE "C" PRIMARY KEY, v int)`)
	s.exec(t, "b", `CREATE TABLE t (k text COLLATE "und-x-icu" PRIMARY KEY, v int)`)
	s.both(t, `INSERT INTO t SELECT CASE WHEN g % 2 = 0 THEN upper(md5(g::text)) ELSE md5(g::text) END, g FROM generate_series(1, 3000) g`)
	s.exec(t, "b", "UPDATE t SET v = 0 WHERE v IN (1, 2); DELETE FROM t WHERE v = 3")
	rep := s.run(t, Options{RangeRows: 100})
	x := rep.Tables[1]
	if x.Method != ByKeyHash || len(x.Notes) != 1 || !strings.Contains(x.Notes[0], "und") {
		t.Errorf("%s: %q", x.Method, x.Notes)
	}
	wantDiffs(t, rep, "t differs c4ca4238a0b923820dcc509a6f75849b [v]", "t differs C81E728D9D4C2F636F067F89CC14862C [v]",
		"t missing_at_b eccbc87e4b5ce2fe28308fd9f2a7baf3")
}

// TestOtherEncodingsAreComparedInUTF8: the key's order differs, so does PostgreSQL's own hash of its bytes.
func TestOtherEncodingsAreComparedInUTF8(t *testing.T) {
	s := newSites(t, "CREATE TABLE t (k text PRIMARY KEY, v text)")
	s.exec(t, "postgres", "CREATE DATABASE latin ENCODING LATIN1 LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
	for _, sql := range []string{"CREATE TABLE t (k text PRIMARY KEY, v text)", grants.SQL(grants.Spec{})} {
		s.exec(t, "latin", sql)
	}
	b := NewDB(DBConfig{Name: "latin", DSN: s.c.DSN("latin", grants.DefaultRole)})
	t.Cleanup(b.Close)
	for _, db := range []string{"a", "latin"} {
		s.exec(t, db, `INSERT INTO t SELECT U&'\00E9' || g, U&'\00FC' FROM generate_series(1, 200) g`)
	}
	s.exec(t, "latin", "UPDATE t SET v = 'u' WHERE k LIKE '%_77'")
	rep, err := Run(t.Context(), s.a, b, Options{})
	if err != nil {
		t.Fatal(err)
	}
	wantDiffs(t, rep, "t differs é177 [v]", "t differs é77 [v]")
	if len(rep.Tables[0].Notes) == 0 {
		t.Error("nothing is said about the encodings")
	}
}

func TestDefinitionsThatDifferAreReported(t *testing.T) {
	s := newSites(t, "")
	s.exec(t, "a", `
CREATE TABLE t (id int PRIMARY KEY, gone int, x int, y text, only_a int);
ALTER TABLE t DROP COLUMN gone;
CREATE TABLE k (id int PRIMARY KEY, v int);
CREATE TABLE lonely (id int);
INSERT INTO t VALUES (1, 1, 'one', 5), (2, 2, 'two', 5);
INSERT INTO k VALUES (1, 1), (2, 2)`)
	s.exec(t, "b", `
CREATE TABLE t (y text, id int PRIMARY KEY, x bigint);
CREATE TABLE k (id int, v int);
INSERT INTO t VALUES ('one', 1, 1), ('zwei', 2, 2);
INSERT INTO k VALUES (1, 1), (1, 1), (2, 2)`)
	s.both(t, grants.SQL(grants.Spec{}))
	rep := s.run(t, Options{})
	wantDiffs(t, rep, "k missing_at_a 1/2", "t differs 2 [y]")
	if diff := cmp.Diff([]string{"public.lonely"}, rep.OnlyA); diff != "" || rep.OnlyB != nil {
		t.Errorf("only at a (-want +got):\n%s\nonly at b: %q", diff, rep.OnlyB)
	}
	want := []ColumnDifference{{"only_a", "integer", ""}, {"x", "integer", "bigint"}}
	if diff := cmp.Diff(want, rep.Tables[1].Columns); diff != "" {
		t.Errorf("columns (-want +got):\n%s", diff)
	}
	s.exec(t, "b", "UPDATE t SET y = 'two' WHERE id = 2")
	rep = s.run(t, Options{Tables: []string{"public.t"}})
	if wantDiffs := show(rep); len(wantDiffs) > 0 || rep.Equal || rep.Tables[0].Equal {
		t.Errorf("columns differ, equal %v, %q", rep.Equal, wantDiffs)
	}
}

func TestPublicationsFiltersAndListsAreKept(t *testing.T) {
	s := newSites(t, `
CREATE TABLE f (id int PRIMARY KEY, rh int, secret text);
CREATE TABLE root (id int, v text) PARTITION BY RANGE (id);
CREATE TABLE root_1 PARTITION OF root FOR VALUES FROM (0) TO (100);
CREATE TABLE root_2 PARTITION OF root DEFAULT;
CREATE TABLE keyed (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
CREATE TABLE keyed_1 PARTITION OF keyed FOR VALUES FROM (0) TO (100);
CREATE TABLE keyed_2 PARTITION OF keyed DEFAULT;
CREATE PUBLICATION portion FOR TABLE f (id, rh) WHERE (id > 10), root, keyed WITH (publish_via_partition_root, publish = 'insert')`)
	s.both(t, `
INSERT INTO root SELECT g, 'x' FROM generate_series(1, 200) g; INSERT INTO keyed SELECT * FROM root;
INSERT INTO f SELECT g, g, 'same' FROM generate_series(1, 20) g`)
	s.exec(t, "a", "UPDATE f SET secret = 'a'; UPDATE f SET rh = 0 WHERE id IN (10, 11); INSERT INTO root VALUES (7, 'y'); UPDATE keyed SET v = 'y' WHERE id = 150")
	var sides []Side
	for _, name := range []string{"a", "b"} {
		db := NewDB(DBConfig{Name: name, DSN: s.c.DSN(name, grants.DefaultRole), Publication: "portion", Connections: 1})
		t.Cleanup(db.Close)
		sides = append(sides, throughRemote(db))
	}
	rep, err := Run(t.Context(), sides[0], sides[1], Options{RangeRows: 3, Parallel: 4})
	if err != nil {
		t.Fatal(err)
	}
	wantDiffs(t, rep, "f differs 11 [rh]", "keyed differs 150 [v]", "root missing_at_b 1/0")
}

func TestPeersReachNothingButPublishedTables(t *testing.T) {
	s := newSites(t, "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'x')")
	r := throughRemote(s.a)
	good := Table{Schema: "public", Name: "t", Columns: []Column{{"id", "integer"}}, Key: []string{"id"}}
	by := Digest{Algorithm: AlgorithmFast}
	for name, c := range map[string]struct {
		t Table
		r Range
	}{
		"a catalog":       {Table{Schema: "pg_catalog", Name: "pg_authid", Columns: []Column{{"rolpassword", "text"}}}, Range{By: by, Parts: &Parts{}}},
		"SQL in a table":  {Table{Schema: "public", Name: `t" AS t; --`}, Range{By: by, Parts: &Parts{}}},
		"SQL in a column": {Table{Schema: "public", Name: "t", Columns: []Column{{`id", version(), "v`, ""}}}, Range{By: by, Parts: &Parts{}}},
		"SQL in a key":    {Table{Schema: "public", Name: "t", Key: []string{"id) --"}}, Range{By: by}},
		"SQL in a hash":   {good, Range{By: Digest{Algorithm: "version()"}}},
		"short key":       {good, Range{By: by, After: Key{"1", "2"}}},
		"empty key":       {good, Range{By: by, Keys: []Key{{}}}},
		"no number":       {good, Range{By: by, After: Key{"1; SELECT"}}},
		"many bits":       {good, Range{By: by, Parts: &Parts{Bits: 63}}},
		"order of none":   {Table{Schema: "public", Name: "t"}, Range{By: by}},
	} {
		if rows, err := r.Rows(t.Context(), c.t, c.r, 10); err == nil {
			t.Errorf("%s: %+v", name, rows)
		}
	}
	rows, err := r.Rows(t.Context(), good, Range{By: by, ImageBytes: -1}, 10)
	if err != nil || len(rows) != 1 || len(rows[0].Image) != 1 || rows[0].Key[0] != "1" {
		t.Errorf("%+v, %v", rows, err)
	}
}

func TestLostConnectionsAreReplacedAndLostTablesReported(t *testing.T) {
	s := newSites(t, "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)")
	wantDiffs(t, s.run(t, Options{}))
	killed := pgtest.Query(t, s.c, "postgres", "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE application_name = 'duri verify'")
	if killed[0][0] == "0" {
		t.Fatal("there was no connection to lose")
	}
	wantDiffs(t, s.run(t, Options{}))

	tables, err := s.a.Tables(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.exec(t, "a", "DROP TABLE t")
	_, err = s.a.Hash(t.Context(), tables[0], Range{By: Digest{Algorithm: AlgorithmFast}}, 10)
	var te *TableError
	if !errors.As(err, &te) || te.Hint == "" || te.Side != "a" {
		t.Errorf("%v", err)
	}
}

func TestDatabasesThatWereNeverSetUpAreNotEqual(t *testing.T) {
	s := newSites(t, "")
	var sides []Side
	for _, name := range []string{"postgres", "template1"} {
		db := NewDB(DBConfig{Name: name, DSN: s.c.DSN(name, grants.DefaultRole)})
		t.Cleanup(db.Close)
		sides = append(sides, db)
	}
	if rep, err := Run(t.Context(), sides[0], sides[1], Options{}); err == nil || rep.Equal || !strings.Contains(hintOf(err), "grants") {
		t.Errorf("equal %v, %v, hint %q", rep.Equal, err, hintOf(err))
	}
	wantDiffs(t, s.run(t, Options{})) // Set up, and empty.
}

func TestASiteThatCannotBeReachedEndsTheRun(t *testing.T) {
	s := newSites(t, "")
	away := NewDB(DBConfig{Name: "away", DSN: "host=127.0.0.1 port=1 user=x dbname=x sslmode=disable connect_timeout=2"})
	t.Cleanup(away.Close)
	if _, err := Run(t.Context(), s.a, away, Options{}); err == nil || hintOf(err) == "" || !strings.Contains(err.Error(), "away") {
		t.Errorf("%v, hint %q", err, hintOf(err))
	}
}

func TestLockedTableIsReportedAfterTheLockTimeout(t *testing.T) {
	s := newSites(t, "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)")
	db := NewDB(DBConfig{Name: "a", DSN: s.c.DSN("a", grants.DefaultRole), StatementTimeout: 3 * time.Second})
	t.Cleanup(db.Close)
	if _, err := db.Tables(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn := lockTable(t, s, "t")
	_, err := db.Bounds(t.Context(), Table{Schema: "public", Name: "t", Key: []string{"id"}}, Range{}, 10)
	var te *TableError
	if !errors.As(err, &te) || te.Hint == "" {
		t.Errorf("%v", err)
	}
	conn()
	if _, err := db.Bounds(t.Context(), Table{Schema: "public", Name: "t", Key: []string{"id"}}, Range{}, 10); err != nil {
		t.Errorf("after the lock: %v", err)
	}
}

// TestAgainstWritersThatNeverPause compares while a client writes the same at both sites, one after the other. The
// first write is at one site only until the rows are settled, so that there are rows in flight for certain; then it
// goes on as fast as it can. The one real difference is found, and no other is invented.
func TestAgainstWritersThatNeverPause(t *testing.T) {
	s := newSites(t, "CREATE TABLE t (id int PRIMARY KEY, v bigint)")
	s.both(t, "INSERT INTO t SELECT g, 0 FROM generate_series(1, 3000) g; ANALYZE t")
	s.exec(t, "b", "UPDATE t SET v = -1 WHERE id = 2999")
	const update = "UPDATE t SET v = %d WHERE id %% 100 = 1"
	s.exec(t, "a", fmt.Sprintf(update, 1))

	ctx, cancel := context.WithCancel(t.Context())
	done, written := make(chan error, 1), make(chan int)
	write := func() {
		for i := 1; ctx.Err() == nil; i++ {
			for _, db := range []string{"a", "b"} {
				if err := s.c.Exec(ctx, db, fmt.Sprintf(update, i)); err != nil && ctx.Err() == nil {
					done <- err
					return
				}
			}
			select {
			case written <- i:
			default:
			}
		}
		done <- nil
	}
	start := sync.OnceFunc(func() { go write() })
	rep := s.run(t, Options{Settle: func(ctx context.Context) error {
		start()
		for range 2 { // Whatever was committed before is at both sites after a whole turn.
			select {
			case <-written:
			case err := <-done:
				done <- err
				return fmt.Errorf("the writer ended: %w", err)
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	}})
	cancel()
	start() // There is a writer to wait for in any case.
	if err := <-done; err != nil {
		t.Error(err)
	}
	wantDiffs(t, rep, "t differs 2999 [v]")
	if x := rep.Tables[0]; x.InFlight != 30 {
		t.Errorf("in flight %d rows (%d unsettled), %d ranges", x.InFlight, x.Unsettled, x.RangesInFlight)
	}
}

func TestDigestsTellWhatTheyCost(t *testing.T) {
	s := newSites(t, "CREATE TABLE t (id int PRIMARY KEY, v text)")
	s.exec(t, "a", "INSERT INTO t SELECT g, md5(g::text) FROM generate_series(1, 100000) g")
	tables, err := s.a.Tables(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sum, err := s.a.Hash(t.Context(), tables[0], Range{By: Digest{AlgorithmRecord, 1}}, 200_000)
	if err != nil || sum.Rows != 100_000 || sum.Seconds <= 0 || sum.CPU > sum.Seconds {
		t.Fatalf("%+v, %v", sum, err)
	}
	// The server is on this machine, so its process is in /proc wherever there is one.
	if _, err := os.Stat("/proc/self/schedstat"); err == nil && sum.CPU < 0.001 {
		t.Errorf("100,000 rows were hashed in %.6f s of CPU time", sum.CPU)
	}
}
