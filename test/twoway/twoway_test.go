package twoway

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/duri-io/duri/internal/pgtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDifferencesAreFoundByKey(t *testing.T) {
	a := []string{"1\tx\t1", "2\tx\t2", "3\tx\t3", "4\tx\t4"}
	for _, c := range []struct {
		name string
		b    []string
		want []string
	}{
		{"equal", []string{"1\tx\t1", "2\tx\t2", "3\tx\t3", "4\tx\t4"}, nil},
		{"another value", []string{"1\tx\t1", "2\ty\t2", "3\tx\t3", "4\tx\t4"}, []string{"2"}},
		{"missing here and there", []string{"1\tx\t1", "10\tx\t2", "3\tx\t3", "4\tx\t4"}, []string{"10", "2"}},
		{"everything is missing", nil, []string{"1", "2", "3", "4"}},
		{"crossed", []string{"1\tx\t2", "2\tx\t1", "3\tx\t3", "4\tx\t4"}, []string{"1", "2"}},
	} {
		got, examples := different(a, c.b, true)
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s:\n%s", c.name, diff)
		}
		if len(examples) != len(got) {
			t.Errorf("%s: %d examples of %d keys", c.name, len(examples), len(got))
		}
	}
}

func TestRowsWithoutAKeyCountHowOftenTheyAreThere(t *testing.T) {
	got, _ := different([]string{"1\t5", "1\t5", "1\t6"}, []string{"1\t5", "1\t6", "1\t7"}, false)
	if diff := cmp.Diff([]string{"1\t5", "1\t7"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestTheClientsDoWhatTheSeedSays(t *testing.T) {
	const n, keys = 20_000, 50
	make1 := func(seed uint64) (ops []op) {
		w := writer{rnd: rand.New(rand.NewPCG(seed, 0)), name: "a0", keys: keys}
		for range n {
			ops = append(ops, w.next())
		}
		return ops
	}
	first := make1(7)
	if diff := cmp.Diff(first, make1(7), cmp.AllowUnexported(op{})); diff != "" {
		t.Errorf("the same seed gives something else:\n%s", diff)
	}
	if cmp.Equal(first, make1(8), cmp.AllowUnexported(op{})) {
		t.Error("another seed gives the same")
	}
	gone, seen := 0, map[int]bool{}
	for _, p := range first {
		if seen[p.k] = true; p.k < 1 || p.k > keys {
			t.Fatalf("key %d is not between 1 and %d", p.k, keys)
		}
		if p.v == "" {
			gone++
		}
	}
	if len(seen) != keys || gone < n*deletes/100*9/10 || gone > n*deletes/100*11/10 {
		t.Errorf("%d of %d keys, %d deletes in %d", len(seen), keys, gone, n)
	}
}

func TestTheJudgeAddsUpTheHistory(t *testing.T) {
	c := pgtest.New(t)
	pgtest.DB(t, c, database)
	site := Site{Name: "a", Cluster: c, Database: database}
	if err := (tpcb{Options{Scale: 1}}).create(t.Context(), c, database); err != nil {
		t.Fatal(err)
	}
	check := func(branches, tellers, accounts int) {
		t.Helper()
		got, err := tpcb{}.check(t.Context(), site)
		if err != nil {
			t.Fatal(err)
		}
		want := []Wrong{{"branches", branches, 1}, {"tellers", tellers, 10}, {"accounts", accounts, 100_000}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	check(0, 0, 0)
	pgtest.Exec(t, c, database, `UPDATE pgbench_branches SET bbalance = 7; UPDATE pgbench_tellers SET tbalance = 3 WHERE tid = 1;
		UPDATE pgbench_tellers SET tbalance = 4 WHERE tid = 2; UPDATE pgbench_accounts SET abalance = 3 WHERE aid = 9;
		INSERT INTO pgbench_history VALUES (1, 1, 9, 3, now()), (2, 1, 8, 4, now())`)
	check(0, 0, 1) // account 8 misses its 4
	pgtest.Exec(t, c, database, "UPDATE pgbench_branches SET bbalance = 6; UPDATE pgbench_tellers SET tbalance = 1 WHERE tid = 5")
	check(1, 1, 1)
}

func TestBothWaysOfDumpingGiveTheSameText(t *testing.T) {
	c := pgtest.New(t)
	pgtest.DB(t, c, database)
	site := Site{Name: "a", Cluster: c, Database: database}
	pgtest.Exec(t, c, database, `CREATE TABLE kv (k int, v text, n numeric); INSERT INTO kv VALUES (10, E'tab\there', 1.50), (9, '', NULL), (1, E'line\nend', 'NaN')`)
	byDump, err := dump(t.Context(), site, "kv")
	if err != nil {
		t.Fatal(err)
	}
	byCopy, err := copyOut(t.Context(), site, "kv")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{`1` + "\t" + `line\nend` + "\t" + `NaN`, `10` + "\t" + `tab\there` + "\t" + `1.50`, `9` + "\t\t" + `\N`}
	if diff := cmp.Diff(want, byDump); diff != "" {
		t.Errorf("pg_dump:\n%s", diff)
	}
	if diff := cmp.Diff(want, byCopy); diff != "" {
		t.Errorf("COPY:\n%s", diff)
	}
	if _, err := dump(t.Context(), site, "nothing"); err == nil {
		t.Error("a table that is not there was dumped")
	}
}

func TestResultsAreJudged(t *testing.T) {
	good := func() Result {
		return Result{
			System: Duri, Load: Upserts, Cut: 5 * time.Second, Last: true, Counts: [2]Counts{{Transactions: 10}, {Transactions: 10}}, Length: time.Second,
			Healed: time.Second, Verify: "equal", Differing: map[string]int{"kv": 0}, Of: 2000,
		}
	}
	if err := Judge(good(), 2*time.Second); err != nil {
		t.Errorf("a good result: %v", err)
	}
	busy := good()
	busy.Last, busy.Healed = false, 10*time.Second
	if err := Judge(busy, 2*time.Second); err != nil {
		t.Errorf("slow under load: %v", err)
	}
	for want, spoil := range map[string]func(*Result){
		"3 keys differ":         func(r *Result) { r.Differing["kv"] = 3 },
		"did not catch up":      func(r *Result) { r.Stalled = "not caught up within 1m40s" },
		"verify says":           func(r *Result) { r.Verify = "3 rows differ" },
		"promised are 2s":       func(r *Result) { r.Healed = 2001 * time.Millisecond },
		"site 2 committed none": func(r *Result) { r.Counts[1] = Counts{} },
	} {
		r := good()
		spoil(&r)
		if err := Judge(r, 2*time.Second); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q was expected, not %v", want, err)
		}
	}
}

func TestTheTableShowsWhatHappened(t *testing.T) {
	results := []Result{
		{
			System: Duri, Load: Upserts, Counts: [2]Counts{{Transactions: 2000, Changes: 1800}, {Transactions: 1000, Changes: 900}}, Length: time.Second,
			Ended: 500 * time.Millisecond, Of: 2000, Conflicts: 12,
		},
		{
			System: "native 18 (origin = none)", Load: Upserts, Cut: 5 * time.Second, Counts: [2]Counts{{Transactions: 3000}, {Transactions: 3000}}, Length: time.Second,
			Stalled: "x", Differing: map[string]int{"kv": 1792}, Of: 2000, Conflicts: -1, Errors: 720,
		},
		{System: Duri, Load: TPCB, Length: time.Second, Ended: time.Second, Differing: map[string]int{"pgbench_tellers": 2, "pgbench_branches": 1, "pgbench_accounts": 0}, Wrong: [2][]Wrong{{{"branches", 1, 1}}, {{"branches", 0, 1}, {"tellers", 2, 10}}}},
	}
	const upserts = `| system | link | tx/s A + B | changes/s replicated | keys that differ | caught up after healing | after the load | conflicts | errors |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| duri | undisturbed | 2000 + 1000 | 1800 | **0** |  | 0.50 s | 12 | 0 |
| native 18 (origin = none) | cut for 5s in the middle | 3000 + 3000 | stalled | 1792 of 2000 | never | never | not reported | 720 |
`
	if diff := cmp.Diff(upserts, Table(Upserts, results)); diff != "" {
		t.Error(diff)
	}
	if got := Table(TPCB, results); !strings.Contains(got, "| 1 branches, 2 tellers | 1/1 branches | 0/1 branches, 2/10 tellers |") {
		t.Error(got)
	}
}

func TestOnlyWhatThereIsIsRun(t *testing.T) {
	for _, c := range [][2]string{{Duri, "inserts"}, {"bucardo", Upserts}} {
		_, err := Run(t.Context(), Options{}, c[0], c[1])
		if err == nil || !strings.Contains(err.Error(), "there is no") {
			t.Errorf("%v: %v", c, err)
		}
	}
}

// fake is a System of two servers that nothing connects.
type fake struct {
	peer
	failures int64
}

func (f *fake) Name() string                             { return "fake" }
func (f *fake) Errors(context.Context) (int64, error)    { return f.failures, nil }
func (f *fake) Conflicts(context.Context) (int64, error) { return -1, nil }

func TestSitesThatDoNotReplicateAreCalledStalledAndDifferent(t *testing.T) {
	c := pgtest.New(t)
	f := &fake{}
	o := Options{Wait: 300 * time.Millisecond, Length: 100 * time.Millisecond, Clients: 1, Keys: 20, Seed: 3, Out: t.Output()}
	w, err := newLoad(Upserts, o)
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"a", "b"} {
		db := fmt.Sprintf("site%d", i)
		pgtest.DB(t, c, db)
		if err := w.create(t.Context(), c, db); err != nil {
			t.Fatal(err)
		}
		f.sites = append(f.sites, Site{Name: name, Cluster: c, Database: db})
	}
	r := &run{o: o, system: f, load: w}
	if r.res.Counts, err = w.run(t.Context(), f.sites, r.say); err != nil {
		t.Fatal(err)
	}
	if d, err := r.catchUp(t.Context(), time.Now()); err != nil || d != 0 || !strings.Contains(r.res.Stalled, "not caught up within 300ms") {
		t.Errorf("caught up in %s, %v, stalled: %q", d, err, r.res.Stalled)
	}
	if err := r.judge(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, n := range r.res.Counts {
		if n.Transactions == 0 || n.Changes == 0 || n.Changes > n.Transactions {
			t.Errorf("site %d: %+v", i, n)
		}
	}
	if n := r.res.Different(); n == 0 || n > o.Keys || len(r.res.Examples) == 0 {
		t.Errorf("%d of %d keys differ, for example %v", n, o.Keys, r.res.Examples)
	}
}

func TestARateIsSharedByTheClients(t *testing.T) {
	for _, c := range []struct {
		rate float64
		want time.Duration
	}{{0, 0}, {500, 8 * time.Millisecond}, {4, time.Second}} {
		if got := (Options{Clients: 4, Rate: c.rate}).every(); got != c.want {
			t.Errorf("rate %v: one transaction of a client every %s, want %s", c.rate, got, c.want)
		}
	}
}
