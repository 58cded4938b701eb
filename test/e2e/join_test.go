package e2e

import (
	"context"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pgtest"
)

// TestAJoinThatIsKilledBeginsAgainAndMissesNothing kills agents and servers while b copies what a's clients keep
// writing.
func TestAJoinThatIsKilledBeginsAgainAndMissesNothing(t *testing.T) {
	t.Parallel()
	rnd := random(t)
	p := newPair(t, pair.Options{Held: true, Seed: schema(ledgerSQL + `CREATE TABLE bulk (id int PRIMARY KEY, v text);
		INSERT INTO bulk SELECT i, repeat(md5(i::text), 10) FROM generate_series(1, 40000) i`)}, pgtest.WithFsync())
	a, b := p.Sites[0], p.Sites[1]
	// b has no tables before it joins, so its clients wait.
	writers, stop := load(t, p, rnd)
	start(t, a)
	start(t, b)
	joined := 0
	for _, c := range []struct {
		name string
		kill func() error
	}{
		{"agent b", func() error { return b.SignalAgent(syscall.SIGKILL) }},
		{"PostgreSQL b", b.Cluster.Kill},
		{"agent a", func() error { return a.SignalAgent(syscall.SIGKILL) }},
		{"agent b again", func() error { return b.SignalAgent(syscall.SIGKILL) }},
	} {
		pause(t.Context(), time.Duration(100+rnd.IntN(600))*time.Millisecond)
		if d, err := b.Status(t.Context()); err == nil && d.State == "ready" {
			joined++
		}
		t.Logf("kill %s", c.name)
		if err := c.kill(); err != nil {
			t.Fatal(err)
		}
		if !b.Cluster.Running() {
			if err := b.Cluster.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			continue
		}
		s := a
		if c.name != "agent a" {
			s = b
		}
		start(t, s)
	}
	t.Logf("b had joined before %d of 4 kills", joined)
	streams(t, p)
	within(t, noticeMax, "b's clients write", func(ctx context.Context) error {
		rows, err := b.Cluster.QueryText(ctx, b.Database, "SELECT count(*) FROM kv WHERE client IN (1, 3)")
		if err == nil && len(rows[0][0]) < 2 {
			err = fmt.Errorf("%s rows", rows[0][0])
		}
		return err
	})
	stop()
	settled(t, p, startMax)
	equal(t, p)
	exact(t, p, writers)
}

// TestAJoinThatIsKilledBehindItsCopyGoesOnFromThere has the moment between the commit of the copy and the mark that the
// site has joined, which a kill seldom hits: a is kept from hearing of b, and the mark is taken away.
func TestAJoinThatIsKilledBehindItsCopyGoesOnFromThere(t *testing.T) {
	t.Parallel()
	p := newPair(t, pair.Options{Held: true, Relays: true, Seed: schema("CREATE TABLE x (id int PRIMARY KEY); INSERT INTO x SELECT generate_series(1, 100)")})
	a, b := p.Sites[0], p.Sites[1]
	b.Relay.Refuse()
	start(t, a)
	start(t, b)
	ready(t, b, startMax)
	ends(t, b)
	do(t, b, "DELETE FROM duri.meta WHERE key = 'enrolled_at'")
	do(t, b, "INSERT INTO x VALUES (1000)") // a client need not wait for the agent
	do(t, a, "INSERT INTO x VALUES (2000)")
	start(t, b)
	ready(t, b, noticeMax)
	b.Relay.Heal()
	streams(t, p)
	settled(t, p, noticeMax)
	equal(t, p)
	if n := text(t, a, "SELECT count(*) FROM x"); n != "102" {
		t.Errorf("%s rows at a, want 102", n)
	}
}
