package demo

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
)

// waitFor waits for a condition.
func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for !cond() {
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// ledgerDatabase makes the demo's database in a new cluster.
func ledgerDatabase(t *testing.T, site string) *pgcluster.Cluster {
	t.Helper()
	c := pgtest.New(t)
	pgtest.DB(t, c, database)
	pgtest.Exec(t, c, database, appSQL(site, [2]string{"secret", "secret"})+schemaSQL+seedSQL())
	return c
}

func dial(t *testing.T, c *pgcluster.Cluster) *pgconn.PgConn {
	t.Helper()
	conn, err := pg.Connect(t.Context(), c.DSN(database, ""), database, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pg.Close(conn) })
	return conn
}

func startTestLoad(t *testing.T, seed uint64, dir string, dsns [2]string) *load {
	t.Helper()
	t.Logf("seed %d", seed)
	l, err := startLoad(t.Context(), loadSpec{names: siteNames, dsns: dsns, clients: 2, rate: 500, dir: dir, seed: seed})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestSeedIsTheDatabaseOf243Governments(t *testing.T) {
	conn := dial(t, ledgerDatabase(t, siteNames[0]))
	rows, err := pg.Rows(t.Context(), conn, `SELECT (SELECT count(*) FROM finance.government), (SELECT count(*) FROM finance.budget),
		(SELECT count(*) FROM finance.settlement), (SELECT count(*) FROM finance.fund), (SELECT count(*) FROM finance.payment),
		(SELECT count(*) FROM finance.audit), (SELECT count(*) FROM finance.budget WHERE executed > appropriated)`)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(rows[0], " "), "243 2430 972 6 5000 5000 0"; got != want {
		t.Errorf("counts %s, want %s", got, want)
	}
	if n, err := budgetDrift(t.Context(), conn); err != nil || n != 0 {
		t.Errorf("%d budget lines are not the sum of their payments (%v)", n, err)
	}
}

// TestTamperedDatabaseIsFound lets both sites be one database, which is right by construction, and then changes it
// behind the clients' backs.
func TestTamperedDatabaseIsFound(t *testing.T) {
	c := ledgerDatabase(t, siteNames[0])
	dir := filepath.Join(t.TempDir(), "records")
	same := c.DSN(database, appRole)
	l := startTestLoad(t, 11, dir, [2]string{same, same})
	waitFor(t, "clients have paid", func() bool { return l.tally.acknowledged[0].Load() > 100 })
	if err := l.stop(); err != nil {
		t.Fatal(err)
	}
	conn := dial(t, c)
	look := func() verdict {
		t.Helper()
		records, err := readRecords(dir)
		if err != nil {
			t.Fatal(err)
		}
		f, err := readFacts(t.Context(), conn)
		if err != nil {
			t.Fatal(err)
		}
		return judge(records, siteNames, [2]facts{f, f})
	}
	before, err := compareTables(t.Context(), [2]*pgconn.PgConn{conn, conn})
	if err != nil {
		t.Fatal(err)
	}
	if v := look(); !v.ok() || v.acknowledged <= 100 || v.inDoubt != 0 {
		t.Fatalf("before: %+v", v)
	}
	for _, s := range []struct{ name, sql string }{
		{"a lost payment", "DELETE FROM finance.payment WHERE id = (SELECT id FROM finance.payment WHERE client = 1 LIMIT 1)"},
		{"a doubled audit entry", "INSERT INTO finance.audit SELECT * FROM finance.audit WHERE client = 2 LIMIT 1"},
		{"a doubled payment", "INSERT INTO finance.payment SELECT gen_random_uuid(), gov_id, line, amount, payee, site, client, seq FROM finance.payment WHERE client = 3 LIMIT 1"},
	} {
		pgtest.Exec(t, c, database, s.sql)
		v := look()
		t.Logf("after %s: %v", s.name, v.examples)
		if v.ok() {
			t.Errorf("%s was not found", s.name)
		}
	}
	if v := look(); v.lost != 1 || v.doubled != 2 || v.sum[0] == v.sumClient {
		t.Errorf("lost %d, doubled %d, sum %d of %d; want 1, 2 and another sum", v.lost, v.doubled, v.sum[0], v.sumClient)
	}
	after, err := compareTables(t.Context(), [2]*pgconn.PgConn{conn, conn})
	if err != nil {
		t.Fatal(err)
	}
	for i := range after {
		changed := after[i].SHA256[0] != before[i].SHA256[0]
		if want := after[i].Name == "payment" || after[i].Name == "audit"; changed != want {
			t.Errorf("the digest of %s changed: %v, want %v", after[i].Name, changed, want)
		}
	}
}

// TestALostConnectionIsAnErrorOfTheClient kills a server whose clients come to it directly: they know of no other, and count what
// they see. Nothing that was acknowledged is lost, and what was in doubt is not tried again.
func TestALostConnectionIsAnErrorOfTheClient(t *testing.T) {
	clusters := [2]*pgcluster.Cluster{ledgerDatabase(t, siteNames[0]), ledgerDatabase(t, siteNames[1])}
	var dsns [2]string
	for i, c := range clusters {
		dsns[i] = c.DSN(database, appRole)
	}
	dir := filepath.Join(t.TempDir(), "records")
	l := startTestLoad(t, 12, dir, dsns)
	waitFor(t, "all clients pay", func() bool { return l.tally.acknowledged[0].Load() > 50 && l.tally.acknowledged[1].Load() > 50 })
	if times, all := l.awayFrom(0); all || len(times) > 0 || l.tally.errors.Load() > 0 {
		t.Errorf("clients are away while all is well: %v, or saw errors: %v", times, l.tally.failures())
	}
	killed := time.Now()
	if err := clusters[0].Kill(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "A's clients have noticed", func() bool { return l.tally.errors.Load() >= 2 })
	if err := clusters[0].Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	back, paid := time.Now(), l.tally.acknowledged[0].Load()
	waitFor(t, "A's clients pay again", func() bool { return l.tally.acknowledged[0].Load() > paid+50 })
	if err := l.stop(); err != nil {
		t.Fatal(err)
	}
	stalls := l.stalls(killed, back)
	if len(stalls) != 4 || min(stalls[0], stalls[1]) < back.Sub(killed)/2 || len(l.tally.failures()) == 0 {
		t.Errorf("the longest waits are %v in an outage of %v; errors %v", stalls, back.Sub(killed), l.tally.failures())
	}
	records, err := readRecords(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range clusters {
		checkOwnPayments(t, records, siteNames[i], dial(t, c))
	}
}

// checkOwnPayments checks that a site holds exactly what it acknowledged, but for payments in doubt.
func checkOwnPayments(t *testing.T, records []entry, site string, conn *pgconn.PgConn) {
	t.Helper()
	f, err := readFacts(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, p := range f.payments {
		there[p.id] = true
	}
	acknowledged, inDoubt := 0, 0
	for _, e := range records {
		switch {
		case e.site != site:
		case e.outcome == committed && !there[e.id], e.outcome == rolledBack && there[e.id]:
			t.Errorf("%s at %s: %c, there: %v", e, site, e.outcome, there[e.id])
		case e.outcome == committed:
			acknowledged++
		case e.outcome == unknown && there[e.id]:
			inDoubt++
		}
	}
	if acknowledged == 0 || acknowledged+inDoubt != len(there) {
		t.Errorf("%s acknowledged %d payments (%d in doubt) and holds %d", site, acknowledged, inDoubt, len(there))
	}
}
