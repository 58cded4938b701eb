package apply

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// outcomesRig is two sites with a table each of which settles marked transactions.
func outcomesRig(t *testing.T, unacknowledged func(context.Context, *wal.Txn) (bool, error)) (a, b *site, of map[wal.SiteID]*Outcomes) {
	t.Helper()
	of = map[wal.SiteID]*Outcomes{}
	a, b = newRig(t, "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE bag (v text); CREATE ROLE app LOGIN; GRANT ALL ON t, bag TO app", rigOptions{
		asRole: true, clusters: 2,
		config: func(c *Config) {
			of[c.Site] = NewOutcomes()
			c.Outcomes, c.Unacknowledged = of[c.Site], unacknowledged
		},
	})
	return a, b, of
}

// ltxid is the n-th.
func ltxid(n int) string { return fmt.Sprintf("%016d", n) }

// marked is one transaction with a mark.
func marked(n int, sql string) string {
	return fmt.Sprintf("BEGIN; %s; SELECT duri.mark('%s'); COMMIT", sql, ltxid(n))
}

// decide asks at s for the fate of a transaction of its peer.
func decide(t *testing.T, s *site, o *Outcomes, n int) bool {
	t.Helper()
	c, err := pg.Connect(t.Context(), s.dsn, s.db, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(c)
	committed, err := o.Decide(t.Context(), c, ltxid(n), s.peer.id)
	if err != nil {
		t.Fatal(err)
	}
	return committed
}

func TestFateOfMarkedTransactions(t *testing.T) {
	a, b, of := outcomesRig(t, func(_ context.Context, txn *wal.Txn) (bool, error) { return txn.Mark.LTXID == ltxid(5), nil })
	app, err := pg.Connect(t.Context(), a.cluster.DSN(a.db, "app"), a.db, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pg.Close(app) })
	run(t, app, marked(1, "INSERT INTO t VALUES (1, 'taken')"))
	run(t, app, marked(0, "SELECT * FROM t")) // changes nothing, so that nothing is to be settled
	settle(a, b)
	if !decide(t, b, of[b.id], 1) {
		t.Error("a transaction that was applied counts as aborted")
	}
	for range 2 {
		if decide(t, b, of[b.id], 2) {
			t.Error("a transaction that nobody has counts as committed")
		}
	}
	run(t, app, "INSERT INTO t VALUES (20, 'before')")
	run(t, app, marked(2, "INSERT INTO t VALUES (2, 'ghost'); INSERT INTO bag VALUES ('ghost')"))
	run(t, app, marked(3, "INSERT INTO t VALUES (3, 'after')"))
	run(t, app, marked(5, "UPDATE t SET v = 'never acknowledged' WHERE id = 1"))
	// The forged mark of a client, with the gateway's behind it.
	run(t, app, fmt.Sprintf("BEGIN; INSERT INTO t VALUES (4, 'forged'); SELECT duri.mark('%s'); SELECT duri.mark('%s'); COMMIT", ltxid(2), ltxid(4)))
	settle(a, b)
	if got, want := b.rows("SELECT id, v FROM t ORDER BY id"), "1|taken\n3|after\n4|forged\n20|before"; strings.TrimSpace(got) != want {
		t.Errorf("b has\n%s\nwant\n%s", got, want)
	}
	if got := b.rows("SELECT * FROM bag"); got != "" {
		t.Errorf("b has of the ghost: %s", got)
	}
	if got, want := strings.TrimSpace(b.rows("SELECT convert_from(ltxid, 'UTF8'), status FROM duri.outcome ORDER BY 1")), strings.Join([]string{
		ltxid(1) + "|committed", ltxid(2) + "|aborted", ltxid(3) + "|committed", ltxid(4) + "|committed", ltxid(5) + "|aborted",
	}, "\n"); got != want {
		t.Errorf("outcomes:\n%s\nwant\n%s", got, want)
	}
	if got, want := strings.TrimSpace(b.rows("SELECT origin, convert_from(ltxid, 'UTF8'), reason FROM duri.ghost ORDER BY commit_lsn")), strings.Join([]string{
		"1|" + ltxid(2) + "|" + ghostAborted, "1|" + ltxid(5) + "|" + ghostTail,
	}, "\n"); got != want {
		t.Errorf("ghosts:\n%s\nwant\n%s", got, want)
	}
	// Another life of the agent knows as much.
	if again := NewOutcomes(); decide(t, b, again, 2) || !decide(t, b, again, 3) {
		t.Error("decisions are not remembered")
	}
}

// TestFateIsSettledOnce: whatever the order in which transactions arrive and are asked about, each has taken effect if and
// only if it was said to.
func TestFateIsSettledOnce(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	a, b, of := outcomesRig(t, nil)
	const n = 300
	order := rng.Perm(n)
	said := make([]bool, n)
	var wg sync.WaitGroup
	wg.Go(func() {
		c := a.connect()
		for i := range n {
			run(t, c, marked(i, fmt.Sprintf("INSERT INTO t VALUES (%d, 'x')", i)))
		}
	})
	wg.Go(func() {
		c, err := pg.Connect(t.Context(), b.dsn, b.db, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer pg.Close(c)
		for _, i := range order {
			if said[i], err = of[b.id].Decide(t.Context(), c, ltxid(i), a.id); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	settle(a, b)
	have := map[string]bool{}
	for _, r := range b.query("SELECT id FROM t") {
		have[r[0]] = true
	}
	committed := 0
	for i, said := range said {
		if said != have[fmt.Sprint(i)] {
			t.Errorf("transaction %d: said to be committed %t, there %t", i, said, have[fmt.Sprint(i)])
		}
		if said {
			committed++
		}
	}
	t.Logf("%d of %d committed", committed, n)
	if g := b.query("SELECT count(*) FROM duri.ghost")[0][0]; g != fmt.Sprint(n-committed) {
		t.Errorf("%s ghosts are on record, want %d", g, n-committed)
	}
}

// TestNothingIsDecidedOfWhatMayBeInAGap: what never came to a site may have been committed all the same.
func TestNothingIsDecidedOfWhatMayBeInAGap(t *testing.T) {
	a, b, of := outcomesRig(t, nil)
	a.exec("INSERT INTO t VALUES (1, 'x')")
	settle(a, b)
	c, err := pg.Connect(t.Context(), b.dsn, b.db, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(c)
	run(t, c, fmt.Sprintf("INSERT INTO duri.outcome (ltxid, status, origin) VALUES ('%s', 'committed', %d)", ltxid(1), a.id))
	run(t, c, fmt.Sprintf("INSERT INTO duri.gap (origin, peer, from_lsn, to_lsn, reason) VALUES (%d, %d, '0/1', '0/2', 'tested')", a.id, b.id))
	for _, state := range []string{"NULL", "now()"} {
		run(t, c, "UPDATE duri.gap SET repaired_at = "+state)
		if _, err := of[b.id].Decide(t.Context(), c, ltxid(2), a.id); err == nil || !strings.Contains(err.Error(), "only it knows") {
			t.Errorf("repaired at %s: %v", state, err)
		}
		if !decide(t, b, of[b.id], 1) {
			t.Errorf("repaired at %s: what is known counts as aborted", state)
		}
	}
	run(t, c, "UPDATE duri.gap SET from_lsn = to_lsn") // of ghosts
	if decide(t, b, of[b.id], 3) {
		t.Error("a transaction that nobody has counts as committed")
	}
	run(t, c, "UPDATE duri.gap SET from_lsn = '0/1', repaired_at = now() - interval '2 days'")
	if decide(t, b, of[b.id], 2) {
		t.Error("a transaction that nobody has counts as committed")
	}
}
