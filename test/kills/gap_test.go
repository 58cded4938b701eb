package kills

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/server"
)

const gapBudget = 8 << 20

// gapPair starts two sites with little room for journals.
func gapPair(t *testing.T, sync bool) *pair.Pair {
	t.Helper()
	p := pair.ForTest(t, pair.Options{
		Sync: sync, Rearm: 500 * time.Millisecond,
		Config: func(_, text string) string {
			return text + "\njournal:\n  keep: 1s\n  budget: 8MiB\n  segment: 1MiB\n"
		},
		Seed: func(ctx context.Context, a *pair.Site) error {
			return a.Cluster.Exec(ctx, a.Database, `CREATE TABLE t (id int PRIMARY KEY, n int, u int UNIQUE, v text);
				INSERT INTO t SELECT i, 0, i, 'seed' FROM generate_series(1, 2000) AS i;
				CREATE TABLE nokey (v text); ALTER TABLE nokey REPLICA IDENTITY FULL; INSERT INTO nokey SELECT 'x' || i % 5 FROM generate_series(1, 50) AS i;
				CREATE TABLE d (id int PRIMARY KEY, n int); ALTER TABLE d REPLICA IDENTITY FULL; INSERT INTO d VALUES (1, 0), (2, 0)`)
		},
	})
	if sync {
		settledPair(t, p)
		within(t, time.Minute, func(ctx context.Context) error { return p.HoldCommits(ctx) })
		unheeded(t, p, 0)
	}
	return p
}

// sql runs statements at a site, past its door, and fails when they are not acknowledged in time.
func sql(t *testing.T, s *pair.Site, text string) {
	t.Helper()
	within(t, 20*time.Second, func(ctx context.Context) error { return s.Cluster.Exec(ctx, s.Database, text) })
}

func value(t *testing.T, s *pair.Site, query string) string {
	t.Helper()
	rows, err := s.Cluster.QueryText(t.Context(), s.Database, query)
	if err != nil || len(rows) != 1 {
		t.Fatalf("site %s: %s: %v, %v", s.Name, query, rows, err)
	}
	return rows[0][0]
}

// eventually waits for what a site says of its database.
func eventually(t *testing.T, p *pair.Pair, s *pair.Site, what string, ok func(server.DatabaseStatus) bool) server.DatabaseStatus {
	t.Helper()
	var d server.DatabaseStatus
	within(t, 4*time.Minute, func(ctx context.Context) error {
		return p.Wait(ctx, what, func(ctx context.Context) (bool, error) {
			var err error
			ask, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			if d, err = s.Status(ask); err != nil {
				return false, err
			}
			return ok(d), fmt.Errorf("site %s: %+v, budget %+v, gaps %+v", s.Name, d.Problem, d.Budget, d.Gaps)
		})
	})
	return d
}

// journalBytes is the disk that a site's journals take.
func journalBytes(t *testing.T, s *pair.Site) (bytes int64) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(s.DataDir, "journal"), func(_ string, e os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) { // removed just now
			return nil
		}
		if err != nil || e.IsDir() {
			return err
		}
		if i, err := e.Info(); err == nil {
			bytes += i.Size()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return bytes
}

// TestAPeerThatWasAwayForTooLongResynchronises: b is away while a writes more than the budget; a goes on, within the budget, and
// b comes back by itself, although its agent is killed on the way, and a's was restarted before.
func TestAPeerThatWasAwayForTooLongResynchronises(t *testing.T) {
	for _, c := range []struct {
		name    string
		sync    bool
		restart bool
	}{{"sync, the origin's agent restarts", true, true}, {"async", false, false}} {
		t.Run(c.name, func(t *testing.T) { gap(t, gapPair(t, c.sync), c.sync, c.restart) })
	}
}

// restless writes some rows all the time until it is told to be quiet; then it tells how often.
func restless(t *testing.T, s *pair.Site) (quiet func() int) {
	ctx, cancel := context.WithCancel(t.Context())
	type result struct {
		writes int
		err    error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		for ctx.Err() == nil && r.err == nil {
			if r.err = s.Cluster.Exec(context.WithoutCancel(ctx), s.Database, "UPDATE t SET n = n + 1 WHERE id IN (1, 105); UPDATE d SET n = n + 1 WHERE id = 2"); r.err == nil {
				r.writes++
			}
		}
		done <- r
	}()
	return func() int {
		cancel()
		r := <-done
		if r.err != nil {
			t.Error(r.err)
		}
		return r.writes
	}
}

func gap(t *testing.T, p *pair.Pair, sync, restart bool) {
	a, b := p.Sites[0], p.Sites[1]
	if err := b.SignalAgent(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if sync {
		soloAmong(t, a)
	}
	// b's tail: committed there, and unsent. Of each kind one that a's later changes beat, and one that stands.
	sql(t, b, `SET synchronous_commit = local; UPDATE t SET n = -1, v = 'tail' WHERE id IN (5, 6, 7); INSERT INTO t VALUES (900001, -1, 900001, 'tail'), (900002, -1, 900002, 'tail');
		UPDATE d SET n = n + 100 WHERE id = 1; DELETE FROM t WHERE id IN (8, 9); INSERT INTO nokey VALUES ('tail')`)
	if err := b.Cluster.Stop(t.Context(), "immediate"); err != nil {
		t.Fatal(err)
	}
	sql(t, a, "UPDATE t SET n = 5, v = 'a' WHERE id IN (5, 9); DELETE FROM t WHERE id = 6; INSERT INTO t VALUES (900002, 2, 900002, 'a')")
	sql(t, a, "UPDATE d SET n = n + 1; DELETE FROM nokey WHERE v = 'x1'; INSERT INTO nokey VALUES ('x2')")
	most := int64(0)
	fill := func(first, mb int) {
		for i := range 4 * mb {
			id := 1000000 + 100*(first+i)
			sql(t, a, fmt.Sprintf(`INSERT INTO t SELECT %[1]d + i, 0, %[1]d + i, (SELECT string_agg(md5(random()::text || j || i), '') FROM generate_series(1, 310) j) FROM generate_series(1, 25) i;
				UPDATE t SET n = n + 1, v = 'w' WHERE id %% 97 = %[2]d AND id > 100 AND id <= 2000; DELETE FROM t WHERE id = %[1]d + 3 OR id = %[3]d`, id, i%97, 1000+first+i))
			most = max(most, journalBytes(t, a))
		}
	}
	fill(0, 9)
	d := eventually(t, p, a, "a declares a gap", func(d server.DatabaseStatus) bool { return len(d.Gaps) == 1 })
	if g := d.Gaps[0]; g.Origin != "a" || g.Peer != "b" || g.To <= g.From {
		t.Errorf("the gap: %+v", g)
	}
	if restart {
		if err := errors.Join(a.SignalAgent(syscall.SIGKILL), a.StartAgent()); err != nil {
			t.Fatal(err)
		}
	}
	sql(t, a, "UPDATE t SET u = -u WHERE id IN (11, 12); UPDATE t SET u = 23 - id WHERE id IN (11, 12); UPDATE t SET u = 7000020 WHERE id = 20")
	fill(200, 9)
	// What is decoded until the next look at the budget comes on top.
	if limit := int64(gapBudget + gapBudget/2); most > limit {
		t.Errorf("the journals took %d bytes, the budget is %d", most, gapBudget)
	}
	t.Logf("at most %d of %d bytes used", most, gapBudget)
	// It may be over its budget until the next look.
	if d := eventually(t, p, a, "a decodes, within its budget", func(d server.DatabaseStatus) bool { return d.Problem == nil && !d.OverBudget }); len(d.Gaps) != 1 {
		t.Errorf("a, alone: %+v", d)
	}

	quiet := restless(t, a)
	if err := errors.Join(b.Cluster.Start(t.Context()), b.StartAgent()); err != nil {
		t.Fatal(err)
	}
	eventually(t, p, b, "b re-synchronises", func(d server.DatabaseStatus) bool { return len(d.Gaps) == 1 && d.Gaps[0].Written > 0 })
	if err := errors.Join(b.SignalAgent(syscall.SIGKILL), b.StartAgent()); err != nil {
		t.Fatal(err)
	}
	// Behind the gap, a row that collides with one that b still has.
	sql(t, a, "INSERT INTO t VALUES (900010, 10, 20, 'a')")
	sql(t, a, "UPDATE t SET v = 'while b re-synchronises' WHERE id BETWEEN 100 AND 120; DELETE FROM t WHERE id = 130; UPDATE d SET n = n + 1 WHERE id = 2")
	for _, s := range p.Sites {
		eventually(t, p, s, "the gap is closed", func(d server.DatabaseStatus) bool { return len(d.Gaps) == 0 && d.State == "ready" })
	}
	if writes := quiet(); writes < 50 {
		t.Errorf("%d writes meanwhile", writes)
	}
	if sync {
		settledPair(t, p)
	}
	sql(t, b, "INSERT INTO t VALUES (900003, 3, 900003, 'b')")
	within(t, time.Minute, p.WaitApplied)
	for _, table := range []string{"t", "d", "nokey"} {
		read := "SELECT md5(string_agg(x::text, E'\\n' ORDER BY x::text)) || ' ' || count(*) FROM " + table + " AS x"
		if x, y := value(t, a, read), value(t, b, read); x != y {
			t.Errorf("table %s differs: %s at a, %s at b", table, x, y)
		}
	}
	for query, want := range map[string]string{
		"SELECT string_agg(id || ':' || n || ':' || v, ' ' ORDER BY id) FROM t WHERE id IN (5, 6, 7, 8, 9)":        "5:5:a 7:-1:tail 9:5:a",
		"SELECT string_agg(id || ':' || n || ':' || v, ' ' ORDER BY id) FROM t WHERE id > 900000 AND id < 1000000": "900001:-1:tail 900002:2:a 900003:3:b 900010:10:a",
		"SELECT count(*) || ' ' || count(*) FILTER (WHERE v = 'tail') FROM nokey":                                  "42 1",
		"SELECT string_agg(id || ':' || u, ' ' ORDER BY id) FROM t WHERE id IN (11, 12)":                           "11:12 12:11",
	} {
		for _, s := range p.Sites {
			if got := value(t, s, query); got != want {
				t.Errorf("site %s: %s: %s, want %s", s.Name, query, got, want)
			}
		}
	}
	for _, s := range p.Sites {
		if got := value(t, s, "SELECT count(*) FILTER (WHERE repaired_at IS NOT NULL) || ' of ' || count(*) FROM duri.gap"); got != "1 of 1" {
			t.Errorf("site %s: %s gaps are repaired", s.Name, got)
		}
		if got := value(t, s, "SELECT string_agg(kind, ' ' ORDER BY id) FROM duri.event WHERE kind LIKE 'gap%'"); got != "gap gap_repaired" {
			t.Errorf("site %s: events %s", s.Name, got)
		}
	}
	if got := value(t, b, "SELECT count(*) > 0 AND bool_and(done) FROM duri.gap_row WHERE table_name = 't' AND key = '[\"6\"]' AND before IS NOT NULL AND after IS NULL"); got != "t" {
		t.Errorf("the row that b removed is not on record: %s", value(t, b, "SELECT string_agg(g::text, E'\\n') FROM (SELECT * FROM duri.gap_row LIMIT 10) g"))
	}
	if _, err := os.Stat(filepath.Join(a.DataDir, "journal", "app", "a.past")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the past is kept: %v", err)
	}
	if strings.Contains(a.Log()+b.Log(), "DATA RACE") {
		t.Error("a data race")
	}
}
