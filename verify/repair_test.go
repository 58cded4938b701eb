package verify

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/wal"
)

// mendable makes the databases of twoSites the sites 1 and 2, whose rows can be mended.
func mendable(t testing.TB, schema string, opts ...pgtest.Option) *twoSites {
	t.Helper()
	s := newSites(t, schema, opts...)
	for i, db := range []*DB{s.a, s.b} {
		db.cfg.Site = wal.SiteID(i + 1)
		db.cfg.RepairOrigin = func(site wal.SiteID) string { return fmt.Sprintf("repair_%s_%d", db.cfg.Name, site) }
		db.cfg.SiteOf = func(origin string) (wal.SiteID, bool) {
			for site := wal.SiteID(1); site <= 2; site++ {
				if origin == db.cfg.RepairOrigin(site) || origin == fmt.Sprintf("apply_%s_%d", db.cfg.Name, site) {
					return site, true
				}
			}
			return 0, false
		}
	}
	return s
}

// as runs SQL at a site as if it were applied from a site, at a commit time of so many seconds after 2026 began.
func (s *twoSites) as(t testing.TB, db string, site, seconds int, sql string) {
	t.Helper()
	origin := fmt.Sprintf("apply_%s_%d", db, site)
	s.exec(t, db, fmt.Sprintf(`SELECT pg_replication_origin_create('%[1]s') WHERE pg_replication_origin_oid('%[1]s') IS NULL`, origin))
	s.exec(t, db, fmt.Sprintf(`SET session_replication_role = replica; SELECT pg_replication_origin_session_setup('%s');
		BEGIN; %s; SELECT pg_replication_origin_xact_setup('0/1', timestamptz '2026-01-01 00:00Z' + interval '%d s'); COMMIT; SELECT pg_replication_origin_session_reset()`, origin, sql, seconds))
}

// seconds is the wal.Time that as gives.
func seconds(n int) wal.Time { return wal.TimeOf(time.Date(2026, 1, 1, 0, 0, n, 0, time.UTC)) }

func (s *twoSites) repair(t testing.TB, b Mender, o RepairOptions) RepairReport {
	t.Helper()
	o.Sites = [2]wal.SiteID{1, 2}
	o.SiteName = func(id wal.SiteID) string { return map[wal.SiteID]string{1: "a", 2: "b"}[id] }
	rep, err := Repair(t.Context(), s.a, b, o)
	if err != nil {
		t.Fatalf("%v (%s)", err, hintOf(err))
	}
	return rep
}

// told prints what a repair did, shortly.
func told(rep RepairReport) []string {
	out := []string{}
	for _, r := range rep.Rows {
		line := fmt.Sprintf("%s %s %s %s", r.Table, r.Kind, strings.Join(r.Key, ","), r.State)
		if r.Right != "" {
			line += " right " + r.Right
		}
		out = append(out, line)
	}
	slices.Sort(out)
	return out
}

// versions reads the version of each row of a table with the key id.
func versions(t testing.TB, db *DB, table string, keys ...Key) map[string]wal.Version {
	t.Helper()
	tables, err := db.Tables(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(tables, func(x Table) bool { return x.Name == table })
	rows, err := db.Versions(t.Context(), tables[i], Range{By: Digest{AlgorithmFast, 1}, Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]wal.Version{}
	for _, r := range rows {
		out[r.Key.id()] = r.version()
	}
	return out
}

// asked is a Deleted that knows some deletes, and all since a time.
func asked(since wal.Time, known map[string]wal.Version) func(context.Context, Table, []Key) ([]Deletion, error) {
	return func(_ context.Context, _ Table, keys []Key) ([]Deletion, error) {
		out := make([]Deletion, len(keys))
		for i, k := range keys {
			out[i] = Deletion{known[k.id()], since}
		}
		return out, nil
	}
}

func TestRepairMakesRowsEqualWithTheirVersions(t *testing.T) {
	for _, m := range pgtest.Majors(t) {
		t.Run(m.String(), func(t *testing.T) { testRepair(t, pgtest.WithMajor(m)) })
	}
}

func testRepair(t *testing.T, major pgtest.Option) {
	s := mendable(t, `CREATE TABLE t (id int PRIMARY KEY, v text, n numeric, g int GENERATED ALWAYS AS (id * 2) STORED, big text);
		CREATE TABLE fired (id int); CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO fired VALUES (new.id); RETURN new; END';
		CREATE TRIGGER tr BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION f()`, major)
	// Site 1 wrote rows 1..9 at second 10, site 2 wrote 11..19 at second 20; each has applied the other's, a merged batch
	// of b's with a later stamp.
	s.as(t, "a", 1, 10, "INSERT INTO t (id, v, n, big) SELECT i, 'v' || i, 1.50, repeat(md5(i::text), 2000) FROM generate_series(1, 9) i")
	s.as(t, "b", 1, 12, "INSERT INTO t (id, v, n, big) SELECT i, 'v' || i, 1.50, repeat(md5(i::text), 2000) FROM generate_series(1, 9) i")
	for _, db := range []string{"a", "b"} {
		s.as(t, db, 2, 20, "INSERT INTO t SELECT i, 'v' || i, NULL FROM generate_series(11, 19) i")
	}
	s.as(t, "b", 1, 500, "UPDATE t SET v = 'corrupt', n = 9, big = NULL WHERE id = 1") // a copy: a has the original
	s.as(t, "b", 1, 500, "DELETE FROM t WHERE id = 2")                                 // nothing knows of a delete
	s.as(t, "b", 1, 501, "INSERT INTO t VALUES (30, 'extra')")                         // deleted later by site 1
	s.as(t, "b", 1, 3, "INSERT INTO t VALUES (31, 'old extra')")                       // older than what is known
	s.as(t, "a", 2, 600, "UPDATE t SET n = 1.0 WHERE id = 11")                         // b has the original
	s.as(t, "a", 1, 30, "UPDATE t SET v = 'newer' WHERE id = 12")                      // which b never got
	s.as(t, "a", 1, 40, `INSERT INTO t VALUES (32, 'q''"\{}')`)                        // likewise

	known := asked(seconds(5), map[string]wal.Version{"30": {Time: seconds(502), Site: 1}})
	for _, remote := range []bool{false, true} {
		b := Mender(s.b)
		if remote {
			b = NewRemote("b", func(ctx context.Context, req []byte) ([]byte, error) { return Serve(ctx, s.b, req) })
		}
		dry := s.repair(t, b, RepairOptions{Deleted: known})
		want := []string{
			"t differs 1 planned right a", "t differs 11 planned right b", "t differs 12 planned right a", "t missing_at_a 30 planned right a",
			"t missing_at_a 31 left", "t missing_at_b 2 planned right a", "t missing_at_b 32 planned right a",
		}
		if diff := cmp.Diff(want, told(dry)); diff != "" {
			t.Fatalf("dry run through remote=%t (-want +got):\n%s", remote, diff)
		}
		if !dry.DryRun || dry.Done != 0 || dry.Left != 7 || dry.Equal() || !strings.Contains(dry.Hint(), "--apply") {
			t.Errorf("%+v", dry)
		}
		i := slices.IndexFunc(dry.Rows, func(r RepairedRow) bool { return r.Key[0] == "1" })
		if r := dry.Rows[i]; !slices.Equal(r.Columns, []string{"big", "n", "v"}) || *r.A["v"] != "v1" || *r.B["v"] != "corrupt" || r.B["big"] != nil ||
			r.VersionA.Site != "a" || !r.VersionA.At.Equal(seconds(10).Std()) || !strings.Contains(r.Why, "original") {
			t.Errorf("%+v", r)
		}
	}

	done := s.repair(t, NewRemote("b", func(ctx context.Context, req []byte) ([]byte, error) { return Serve(ctx, s.b, req) }), RepairOptions{Deleted: known, Apply: true})
	if done.Done != 6 || done.Left != 1 || !strings.Contains(done.Hint(), "--from SITE") {
		t.Errorf("%v, hint %q", told(done), done.Hint())
	}
	wantDiffs(t, s.run(t, Options{}), "t missing_at_a 31")
	keys := []Key{{"1"}, {"2"}, {"11"}, {"12"}, {"32"}}
	at := map[string]wal.Version{
		"1": {Time: seconds(10), Site: 1}, "2": {Time: seconds(10), Site: 1}, "11": {Time: seconds(20), Site: 2},
		"12": {Time: seconds(30), Site: 1}, "32": {Time: seconds(40), Site: 1},
	}
	for _, db := range []*DB{s.a, s.b} {
		if diff := cmp.Diff(at, versions(t, db, "t", keys...)); diff != "" {
			t.Errorf("versions at %s (-want +got):\n%s", db.Name(), diff)
		}
	}
	last := s.repair(t, s.b, RepairOptions{Apply: true, From: "b"})
	if last.Done != 1 || !last.Equal() || last.Rows[0].Right != "b" {
		t.Errorf("%v", told(last))
	}
	wantDiffs(t, s.run(t, Options{}))
	if got := versions(t, s.a, "t", Key{"31"})["31"]; got != (wal.Version{Time: seconds(3), Site: 1}) {
		t.Errorf("the declared row has version %s", got)
	}
	for _, db := range []string{"a", "b"} {
		if n := pgtest.Query(t, s.c, db, "SELECT count(*) FROM fired")[0][0]; n != "0" {
			t.Errorf("%s: %s triggers fired", db, n)
		}
	}
	if _, err := Repair(t.Context(), s.a, s.b, RepairOptions{From: "c"}); err == nil || hintOf(err) == "" {
		t.Errorf("an unknown site: %v", err)
	}
}

func TestRepairOfTablesOfEveryKind(t *testing.T) {
	s := mendable(t, schemaAll)
	s.both(t, dataAll)
	s.exec(t, "a", `DELETE FROM odd WHERE id = md5('5')::uuid; UPDATE parts SET v = 'z' WHERE id = 3; INSERT INTO heap VALUES (7, NULL), (7, NULL), (1000, 'only a'); INSERT INTO empty DEFAULT VALUES`)
	s.exec(t, "b", `UPDATE odd SET x = '<b/>', a = NULL, i = '1 mon' WHERE id = md5('1')::uuid; DELETE FROM typed WHERE c = 'C7';
		UPDATE "Quoted ""Table" SET "select" = NULL WHERE "k'2" = 3; DELETE FROM heap WHERE a = 8; INSERT INTO heap VALUES (NULL, 'only b');
		UPDATE gen SET v = 0 WHERE id = 5; UPDATE child SET extra = NULL`)
	rep := s.repair(t, s.b, RepairOptions{Apply: true})
	if rep.Equal() || !slices.ContainsFunc(rep.Rows, func(r RepairedRow) bool {
		return r.Table == "heap" && r.State == RepairLeft && strings.Contains(r.Reason, "no version")
	}) {
		t.Errorf("%v", told(rep))
	}
	rep = s.repair(t, s.b, RepairOptions{Apply: true, From: "a"})
	if !rep.Equal() {
		t.Errorf("%+v", rep)
	}
	wantDiffs(t, s.run(t, Options{}))
	if n := pgtest.Query(t, s.c, "b", "SELECT count(*) FROM heap WHERE a = 7")[0][0]; n != "12" {
		t.Errorf("%s copies of the row at b, want 12", n)
	}
}

func TestRepairLeavesWhatItMustNotTouch(t *testing.T) {
	s := mendable(t, `CREATE TABLE t (id int PRIMARY KEY, v text, u int UNIQUE, w int CHECK (w < 100)); CREATE TABLE wide (id int PRIMARY KEY, x int); CREATE TABLE lone (id int PRIMARY KEY)`)
	s.both(t, "INSERT INTO t SELECT i, 'v', i, 1 FROM generate_series(1, 9) i; INSERT INTO wide VALUES (1, 1)")
	s.exec(t, "a", "ALTER TABLE wide ADD more int; UPDATE wide SET x = 2; DROP TABLE lone")
	s.exec(t, "b", "DELETE FROM t WHERE id IN (1, 2); INSERT INTO t VALUES (20, 'takes the value', 1, 1); UPDATE t SET v = 'b' WHERE id = 3; UPDATE t SET v = 'b' WHERE id = 4")
	unlock := s.hold(t, "b", "SELECT FROM t WHERE id = 3 FOR UPDATE")
	changed := sync.OnceFunc(func() { s.exec(t, "b", "UPDATE t SET v = 'client' WHERE id = 4") })
	b := changing{s.b, changed}
	rep := s.repair(t, b, RepairOptions{Apply: true, From: "a", Tables: []string{"t", "wide", "lone"}})
	want := []string{
		"t differs 3 left right a", "t differs 4 left right a", "t missing_at_a 20 done right a", "t missing_at_b 1 done right a", "t missing_at_b 2 done right a",
	}
	got := told(rep)
	// The colliding row goes when the extra one is removed: depends on which is written first.
	for i := range got {
		if strings.HasPrefix(got[i], "t missing_at_b 1 left") {
			got[i] = want[3]
		}
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	reasons := map[string]string{"3": "a client holds", "4": whyChanged}
	for _, r := range rep.Rows {
		if want := reasons[r.Key[0]]; want != "" && !strings.Contains(r.Reason, want) {
			t.Errorf("row %s is left because %q, want %q", r.Key[0], r.Reason, want)
		}
	}
	if v := pgtest.Query(t, s.c, "b", "SELECT v FROM t WHERE id = 4")[0][0]; v != "client" {
		t.Errorf("the client's row was overwritten with %q", v)
	}
	var problems []string
	for _, p := range rep.Problems {
		problems = append(problems, p.Table+": "+p.Error)
		if p.Hint == "" {
			t.Errorf("%+v has no hint", p)
		}
	}
	if len(problems) != 2 || !strings.Contains(problems[0], "public.lone") || !strings.Contains(problems[1], "column more") {
		t.Errorf("problems: %q", problems)
	}
	unlock()
	s.repair(t, s.b, RepairOptions{Apply: true, From: "a", Tables: []string{"t"}})
	if again := s.repair(t, s.b, RepairOptions{Apply: true, From: "a", Tables: []string{"t"}}); !again.Equal() || len(again.Rows) != 0 {
		t.Errorf("%v", told(again))
	}
}

// changing is a Mender whose rows a client changes just before they are mended.
type changing struct {
	*DB
	change func()
}

func (c changing) Mend(ctx context.Context, t Table, by Digest, fixes []Fix) ([]Outcome, error) {
	c.change()
	return c.DB.Mend(ctx, t, by, fixes)
}

// hold keeps a transaction open that has run sql, until unlock.
func (s *twoSites) hold(t testing.TB, db, sql string) (unlock func()) {
	t.Helper()
	conn := session(t, s, db)
	if _, err := conn.Exec(t.Context(), "BEGIN; "+sql).ReadAll(); err != nil {
		t.Fatal(err)
	}
	return sync.OnceFunc(func() { _ = conn.Close(context.Background()) })
}

func TestTwoRepairsAtOnceDoNotMix(t *testing.T) {
	s := mendable(t, "CREATE TABLE t (id int PRIMARY KEY, v text)")
	s.both(t, "INSERT INTO t VALUES (1, 'v')")
	s.exec(t, "b", "UPDATE t SET v = 'x'")
	conn := session(t, s, "b")
	if _, err := conn.Exec(t.Context(), "SELECT pg_replication_origin_create('repair_b_1'); SELECT pg_replication_origin_session_setup('repair_b_1')").ReadAll(); err != nil {
		t.Fatal(err)
	}
	rep, err := Repair(t.Context(), s.a, s.b, RepairOptions{Apply: true, From: "a", Sites: [2]wal.SiteID{1, 2}})
	if err == nil || !strings.Contains(hintOf(err), "another `duri repair` runs") || len(rep.Rows) != 1 || rep.Rows[0].State != RepairLeft {
		t.Errorf("%v (%s), %+v", err, hintOf(err), rep)
	}
}

// TestWatchOnRealServers: every type is equal to itself by the cheap hash, corrupted rows are found while clients write
// and the server is killed in between, mended ones are not found any more, and no row in flight ever is.
func TestWatchOnRealServers(t *testing.T) {
	for _, m := range pgtest.Majors(t) {
		t.Run(m.String(), func(t *testing.T) { testWatchOnRealServers(t, pgtest.WithMajor(m)) })
	}
}

func testWatchOnRealServers(t *testing.T, major pgtest.Option) {
	s := mendable(t, schemaAll+"CREATE TABLE busy (id int PRIMARY KEY, v int);", major)
	s.both(t, dataAll+"INSERT INTO busy SELECT i, 0 FROM generate_series(1, 2000) i;")
	w := startWriter(t, s)
	var mu sync.Mutex
	var news []string
	watch := NewWatch(WatchConfig{
		A: s.a, B: NewRemote("b", func(ctx context.Context, req []byte) ([]byte, error) { return Serve(ctx, s.b, req) }),
		Period: 300 * time.Millisecond, CPU: 1, Settle: w.settle,
		News: func(f Found) { mu.Lock(); defer mu.Unlock(); news = append(news, f.String()) },
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- watch.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })

	until(t, "three passes without a finding", func() error {
		if st := watch.Status(); st.Passes < 3 || len(st.Found) > 0 || st.Problem != "" {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	// Values that are equal for some hash functions, but are not the same.
	s.exec(t, "b", `UPDATE plain SET n = 1.50 WHERE id = 1; UPDATE typed SET m = 'ok' WHERE (m, c) = ('sad', 'C3') AND b = 'none'; DELETE FROM texts WHERE v = 8;
		UPDATE odd SET i = '24 h' WHERE id = md5('1')::uuid; INSERT INTO heap VALUES (3, NULL)`)
	until(t, "the corrupted rows are found", func() error {
		got := fmt.Sprint(found(watch))
		if got != "[public.heap 1 public.odd 1 public.plain 1 public.texts 1]" {
			return fmt.Errorf("%s; %+v", got, watch.Status())
		}
		return nil
	})
	w.stop()
	if err := s.c.Kill(); err != nil {
		t.Fatal(err)
	}
	until(t, "the watch tells of the dead server", func() error {
		if watch.Status().Problem == "" {
			return errors.New("no problem")
		}
		return nil
	})
	if err := s.c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	w = startWriter(t, s)
	s.repair(t, s.b, RepairOptions{Apply: true, From: "a", Settle: w.settle})
	watch.Recheck()
	until(t, "nothing is found after the repair", func() error {
		if st := watch.Status(); len(st.Found) > 0 || st.Problem != "" {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	mu.Lock()
	defer mu.Unlock()
	for _, n := range news {
		if strings.Contains(n, "busy") {
			t.Errorf("false alarm: %s", n)
		}
	}
	if len(news) != 8 {
		t.Errorf("news: %q", news)
	}
}

// until waits for a condition of real servers; check says what is missing.
func until(t *testing.T, what string, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for err := check(); err != nil; err = check() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("not within a minute: %s: %v", what, err)
		}
	}
}

// writer is a client at a whose changes of busy arrive at b a moment later.
type writer struct {
	t    testing.TB
	quit func()

	mu            sync.Mutex // guards the rest
	moved         *sync.Cond
	begun, landed int
}

// startWriter starts a writer; it ends with the test.
func startWriter(t testing.TB, s *twoSites) *writer {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed of the writer: %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	w := &writer{t: t}
	w.moved = sync.NewCond(&w.mu)
	a, b := session(t, s, "a"), session(t, s, "b")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	w.quit = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(w.quit)
	go func() {
		defer close(done)
		for i := 1; ctx.Err() == nil; i++ {
			id, n := rng.IntN(50)+1, rng.IntN(3)
			sql := fmt.Sprintf("UPDATE busy SET v = %d WHERE id = %d", i, id)
			switch n {
			case 1:
				sql = fmt.Sprintf("INSERT INTO busy VALUES (%d, %d) ON CONFLICT (id) DO NOTHING", id+5000, i)
			case 2:
				sql = fmt.Sprintf("DELETE FROM busy WHERE id = %d", rng.IntN(50)+5001)
			}
			w.mu.Lock()
			w.begun++
			w.mu.Unlock()
			_, err1 := a.Exec(context.Background(), sql).ReadAll()
			_, err2 := b.Exec(context.Background(), sql).ReadAll()
			if err := errors.Join(err1, err2); err != nil {
				t.Error(err)
				return
			}
			w.mu.Lock()
			w.landed++
			w.moved.Broadcast()
			w.mu.Unlock()
		}
	}()
	return w
}

func (w *writer) stop() { w.quit() }

// settle waits until what was begun has landed.
func (w *writer) settle(context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for want := w.begun; w.landed < want; {
		w.moved.Wait()
	}
	return nil
}

// session opens a superuser's session, which ends with the test.
func session(t testing.TB, s *twoSites, db string) *pgconn.PgConn {
	t.Helper()
	conn, err := pgconn.Connect(t.Context(), s.c.DSN(db, s.c.Superuser()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}
