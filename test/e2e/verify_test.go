package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/server"
	"github.com/duri-io/duri/verify"
)

// corrupt runs SQL at a site in a way that is not sent: under a replication origin that stands for another site.
func corrupt(t *testing.T, s *pair.Site, sql string) {
	t.Helper()
	do(t, s, fmt.Sprintf(`SELECT pg_replication_origin_create('%[1]s') WHERE pg_replication_origin_oid('%[1]s') IS NULL`, "duri_app_a:repair"))
	do(t, s, `SET session_replication_role = replica; SELECT pg_replication_origin_session_setup('duri_app_a:repair'); BEGIN; `+sql+
		`; COMMIT; SELECT pg_replication_origin_session_reset()`)
}

// stamps gives the commit times of the repaired rows. (Others that came in one batch carry its stamp.)
func stamps(t *testing.T, s *pair.Site) string {
	t.Helper()
	return text(t, s, "SELECT string_agg(id || ' ' || pg_xact_commit_timestamp(xmin), ', ' ORDER BY id) FROM stock WHERE id IN (7, 101, 102, 500)")
}

func TestCorruptedRowsAreFoundInTheBackgroundAndRepaired(t *testing.T) {
	t.Parallel()
	p := newPair(t, pair.Options{
		Seed:   schema("CREATE TABLE stock (id int PRIMARY KEY, item text, n int); INSERT INTO stock SELECT i, 'item ' || i, i FROM generate_series(1, 100) i; CREATE TABLE hot (id int PRIMARY KEY, v int); INSERT INTO hot SELECT i, 0 FROM generate_series(1, 20) i"),
		Config: func(_, text string) string { return text + "\nverify:\n  period: 2s\n  cpu: 0.5\n" },
	})
	a, b := p.Sites[0], p.Sites[1]
	for i := 101; i <= 110; i++ { // a transaction each, so that each has a version of its own
		do(t, a, fmt.Sprintf("INSERT INTO stock VALUES (%d, 'new', 0)", i))
	}
	settled(t, p, 30*time.Second)

	stop := busy(t, p)
	t.Log("rows in flight are not found")
	watched(t, a, "two passes", func(w verify.WatchStatus) bool { return w.Passes >= 2 })

	corrupt(t, b, "UPDATE stock SET n = 4711, item = NULL WHERE id = 101; DELETE FROM stock WHERE id = 102; INSERT INTO stock VALUES (500, 'extra', 1); DELETE FROM stock WHERE id = 7")
	out := complains(t, a, 30*time.Second, "rows differ between a and b", "table public.stock: 4 rows differ", "duri repair --dry-run")
	if strings.Contains(out, "hot") {
		t.Errorf("rows in flight are found:\n%s", out)
	}
	st := document[server.ClusterStatus](t, 3, "status", "-c", b.ConfigFile)
	driver := slices.IndexFunc(st.Sites, func(s server.SiteStatus) bool { return s.Site == "a" })
	if v := st.Sites[driver].Databases[0].Verify; len(v) != 1 || v[0].Peer != "b" || len(v[0].Found) != 1 || v[0].Found[0].Rows != 4 || v[0].Found[0].First.IsZero() {
		t.Errorf("status at b tells of a: %+v", v)
	}
	if n := text(t, a, "SELECT count(*) FROM duri.event WHERE kind = 'difference' AND text LIKE '%stock%a and b'"); n != "1" {
		t.Errorf("%s events", n)
	}
	repairs(t, p, stop)
}

// repairs makes the corrupted rows equal, some by rule and one by declaration.
func repairs(t *testing.T, p *pair.Pair, stop func()) {
	a, b := p.Sites[0], p.Sites[1]
	dry := document[server.RepairReport](t, 3, "repair", "--dry-run", "-c", a.ConfigFile)
	want := []string{"101 planned a", "102 planned a", "500 planned b", "7 left "}
	if got := outcomes(dry); !slices.Equal(got, want) || !dry.DryRun {
		t.Fatalf("dry run: %v, want %v", got, want)
	}
	r := duri(t, "repair", "--dry-run", "-c", b.ConfigFile, "--table", "public.stock")
	for _, want := range []string{"planned", "4711", "new", "NULL", "nothing was written", "original"} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("the dry run at b does not tell %q:\n%s%s", want, r.stdout, r.stderr)
		}
	}
	if r.code != 3 || !strings.Contains(r.stderr, "hint: ") {
		t.Errorf("dry run at b: exit code %d, %s", r.code, r.stderr)
	}
	if n := text(t, b, "SELECT n FROM stock WHERE id = 101"); n != "4711" {
		t.Fatalf("a dry run has written: %s", n)
	}

	done := document[server.RepairReport](t, 3, "repair", "--apply", "-c", b.ConfigFile)
	want = []string{"101 done a", "102 done a", "500 done b", "7 left "}
	if got := outcomes(done); !slices.Equal(got, want) {
		t.Fatalf("repair: %v, want %v", got, want)
	}
	done = document[server.RepairReport](t, 0, "repair", "--apply", "--from", "a", "-c", a.ConfigFile)
	if got := outcomes(done); !slices.Equal(got, []string{"7 done a"}) {
		t.Errorf("repair --from a: %v", got)
	}
	healthy(t, a, 30*time.Second)
	if n := text(t, a, "SELECT count(*) FROM duri.event WHERE kind IN ('difference_gone', 'repair')"); n != "2" && n != "3" {
		t.Errorf("%s events tell of the repair", n)
	}
	stop()
	settled(t, p, 30*time.Second)
	equal(t, p)
	if x, y := stamps(t, a), stamps(t, b); x != y {
		t.Errorf("versions differ:\na: %s\nb: %s", x, y)
	}
	for _, s := range p.Sites {
		if n := text(t, s, "SELECT count(*) FROM stock"); n != "111" {
			t.Errorf("site %s: %s rows", s.Name, n)
		}
		if text(t, s, "SELECT count(*) FROM duri.conflict WHERE kind <> '' AND table_name = 'stock'") != "0" {
			t.Errorf("site %s: repaired rows were replicated", s.Name)
		}
	}
	do(t, b, "UPDATE stock SET n = n + 1 WHERE id IN (101, 102, 500, 7)")
	settled(t, p, 30*time.Second)
	equal(t, p)
}

// outcomes prints what became of each row, in order.
func outcomes(rep server.RepairReport) []string {
	var out []string
	for _, p := range rep.Pairs {
		for _, r := range p.Rows {
			out = append(out, fmt.Sprintf("%s %s %s", strings.Join(r.Key, ","), r.State, r.Right))
		}
	}
	slices.Sort(out)
	return out
}

// watched waits until the comparison in the background at a site is as wanted, and has found nothing.
func watched(t *testing.T, s *pair.Site, what string, good func(verify.WatchStatus) bool) {
	t.Helper()
	within(t, 60*time.Second, what, func(ctx context.Context) error {
		st, err := s.Status(ctx)
		if err != nil {
			return err
		}
		if len(st.Verify) != 1 || len(st.Verify[0].Found) > 0 || !good(st.Verify[0]) {
			return fmt.Errorf("%+v", st.Verify)
		}
		return nil
	})
}

// busy has clients write at both sites, into the same few rows, until stop.
func busy(t *testing.T, p *pair.Pair) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	rng := random(t)
	for _, s := range p.Sites {
		first := rng.IntN(1000)
		all.Go(func() {
			for i := first; ctx.Err() == nil; i++ {
				err := s.Cluster.Exec(ctx, s.Database, fmt.Sprintf("UPDATE hot SET v = v + 1 WHERE id = %d; DELETE FROM hot WHERE id = %d; INSERT INTO hot VALUES (%d, 1) ON CONFLICT DO NOTHING", i%17+1, 18+i%3, 18+i%5))
				if err != nil && ctx.Err() == nil && !strings.Contains(err.Error(), "deadlock") {
					t.Errorf("client at %s: %v", s.Name, err)
					return
				}
			}
		})
	}
	stop = sync.OnceFunc(func() { cancel(); all.Wait() })
	t.Cleanup(stop)
	return stop
}
