package kills

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/quorum"
)

// inserts are rows that clients add to t at a site, one a transaction, and what became of them. It is for one goroutine
// until done was waited for.
type inserts struct {
	acked []int
	done  chan struct{}
}

// insert adds a row through a site's door; an error says that it was not acknowledged in time.
func insert(t *testing.T, s *pair.Site, id int) error {
	t.Helper()
	return run(t, s, 5*time.Second, fmt.Sprintf("INSERT INTO t VALUES (%d, 0)", id))
}

// writer inserts rows from first on until ctx ends.
func writer(ctx context.Context, t *testing.T, s *pair.Site, first int) *inserts {
	in := &inserts{done: make(chan struct{})}
	go func() {
		defer close(in.done)
		for id := first; ctx.Err() == nil; id++ {
			if insert(t, s, id) == nil {
				in.acked = append(in.acked, id)
			}
			sleep(ctx, 20*time.Millisecond)
		}
	}()
	return in
}

// awaitRegister waits until sites have read a register that fits, and let clients in.
func awaitRegister(t *testing.T, p *pair.Pair, what string, fits func(r quorum.Register) bool, sites ...*pair.Site) {
	t.Helper()
	within(t, time.Minute, func(ctx context.Context) error {
		return p.Wait(ctx, what, func(ctx context.Context) (bool, error) {
			for _, s := range sites {
				d, err := s.Control.Register(ctx)
				if err != nil || !d.Known || !fits(d.Register) || d.Door == nil || !d.Door.Open {
					return false, errors.Join(err, fmt.Errorf("site %s: %s; door %+v, awaits %q, blocked %q, problem %v", s.Name, d.Guarantee, d.Door, d.Awaits, d.Blocked, d.Problem))
				}
			}
			return true, nil
		})
	})
}

// members fits a settled register with just these.
func members(names ...string) func(quorum.Register) bool {
	return func(r quorum.Register) bool { return r.Settled && slices.Equal(r.Members, names) }
}

// copyOf is how much of a site's journal another one has.
func copyOf(t *testing.T, at *pair.Site, from string) (durable uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	d, err := at.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range d.Links {
		if l.From == from {
			return uint64(l.Received.Durable)
		}
	}
	t.Fatalf("site %s has no link from %s", at.Name, from)
	return 0
}

// text is the result of a query as one string.
func text(t *testing.T, s *pair.Site, sql string) string {
	t.Helper()
	rows, err := s.Cluster.QueryText(t.Context(), s.Database, sql)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(rows)
}

// expectRows compares all sites with the first one, and looks for what was acknowledged.
func expectRows(t *testing.T, p *pair.Pair, acked ...int) {
	t.Helper()
	within(t, time.Minute, p.WaitApplied)
	for _, s := range p.Sites {
		if a, b := rows(t, p.Sites[0]), rows(t, s); a != b {
			t.Errorf("sites %s and %s differ:\n%s\n%s", p.Sites[0].Name, s.Name, a, b)
		}
	}
	have, err := p.Sites[0].Cluster.QueryText(t.Context(), p.Database, "SELECT id FROM t")
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, r := range have {
		there[r[0]] = true
	}
	for _, id := range acked {
		if !there[fmt.Sprint(id)] {
			t.Errorf("row %d was acknowledged and is lost", id)
		}
	}
}

// TestDeadSitesTailIsExchanged is S46: of what a acknowledged before it died, b has received more than c. c gets it from
// b, unchanged; only then may another site be left out, and nothing is lost when it is. The two come back one by one.
func TestDeadSitesTailIsExchanged(t *testing.T) {
	p := syncSites(t, pair.Options{Names: []string{"a", "b", "c"}})
	a, b, c := p.Sites[0], p.Sites[1], p.Sites[2]
	p.Link("a", "c").Cut()
	p.Link("c", "a").Cut()
	var acked []int
	for id := 100; id < 110; id++ {
		if err := insert(t, a, id); err != nil {
			t.Fatalf("with b's receipt: %v", err)
		}
		acked = append(acked, id)
	}
	if err := errors.Join(a.SignalAgent(syscall.SIGKILL), a.Cluster.Kill()); err != nil {
		t.Fatal(err)
	}
	if x, y := copyOf(t, b, "a"), copyOf(t, c, "a"); x <= y {
		t.Fatalf("b has %x of a's journal, c %x: the test does not show what it should", x, y)
	}
	writing, stop := context.WithCancel(t.Context())
	atB, atC := writer(writing, t, b, 10_000), writer(writing, t, c, 20_000)
	defer func() {
		stop()
		<-atB.done
		<-atC.done
	}()
	awaitRegister(t, p, "b and c are members and settled", members("b", "c"), b, c)
	cut, ok := register(t, b).Cut(p.Database, "a")
	if !ok || uint64(cut) > min(copyOf(t, b, "a"), copyOf(t, c, "a")) {
		t.Errorf("settled with cut %s (%t), b has %x of a's journal and c %x", cut, ok, copyOf(t, b, "a"), copyOf(t, c, "a"))
	}
	const versions = `SELECT (SELECT roname FROM pg_replication_origin WHERE roident = o.roident), o.timestamp
		FROM t, pg_xact_commit_timestamp_origin(xmin) AS o WHERE id = 109`
	within(t, 30*time.Second, func(ctx context.Context) error {
		return p.Wait(ctx, "c has applied what b has of a", func(context.Context) (bool, error) {
			return text(t, c, "SELECT count(*) FROM t WHERE id BETWEEN 100 AND 109") == "[[10]]", nil
		})
	})
	if x, y := text(t, b, versions), text(t, c, versions); x != y || !strings.Contains(x, "duri_app_a") {
		t.Errorf("a's row has the version %s at b and %s at c", x, y)
	}
	for i, s := range []*pair.Site{b, c} {
		if err := insert(t, s, 200+i); err != nil {
			t.Errorf("site %s, a member of two: %v", s.Name, err)
		}
		acked = append(acked, 200+i)
	}
	stop()
	<-atB.done
	<-atC.done
	if len(atB.acked) == 0 || len(atC.acked) == 0 {
		t.Errorf("acknowledged while the register changed: %d at b, %d at c", len(atB.acked), len(atC.acked))
	}
	acked = slices.Concat(acked, atB.acked, atC.acked)

	if err := errors.Join(c.SignalAgent(syscall.SIGKILL), c.Cluster.Kill()); err != nil {
		t.Fatal(err)
	}
	awaitRegister(t, p, "b is alone", members("b"), b)
	if err := insert(t, b, 300); err != nil {
		t.Errorf("b alone: %v", err)
	}
	acked = append(acked, 300)

	p.Link("a", "c").Heal()
	p.Link("c", "a").Heal()
	if err := errors.Join(a.Cluster.Start(t.Context()), a.StartAgent()); err != nil {
		t.Fatal(err)
	}
	awaitRegister(t, p, "a is back", members("a", "b"), a, b)
	for i, s := range []*pair.Site{a, b} {
		if err := insert(t, s, 400+i); err != nil {
			t.Errorf("site %s with a back: %v", s.Name, err)
		}
		acked = append(acked, 400+i)
	}
	if err := errors.Join(c.Cluster.Start(t.Context()), c.StartAgent()); err != nil {
		t.Fatal(err)
	}
	settledPair(t, p)
	for i, s := range p.Sites {
		if err := insert(t, s, 500+i); err != nil {
			t.Errorf("site %s afterwards: %v", s.Name, err)
		}
		acked = append(acked, 500+i)
	}
	expectRows(t, p, acked...)
}

// TestThirdSiteHandsOnWhatACutKeepsBack: a and c do not hear each other, and b hears both: nobody is left out, all go on,
// and each has what the others write.
func TestThirdSiteHandsOnWhatACutKeepsBack(t *testing.T) {
	p := syncSites(t, pair.Options{Names: []string{"a", "b", "c"}, NoWitness: true})
	a, c := p.Sites[0], p.Sites[2]
	p.Link("a", "c").Cut()
	p.Link("c", "a").Cut()
	var acked []int
	within(t, time.Minute, func(ctx context.Context) error {
		return p.Wait(ctx, "a and c have given up on each other", func(ctx context.Context) (bool, error) {
			for i, s := range p.Sites {
				id := 1000*(i+1) + len(acked)
				if err := insert(t, s, id); err != nil {
					t.Errorf("site %s: %v", s.Name, err)
				}
				acked = append(acked, id)
			}
			x, err := a.Control.Register(ctx)
			y, err2 := c.Control.Register(ctx)
			return err == nil && err2 == nil && len(x.Frozen) == 1 && len(y.Frozen) == 1, errors.Join(err, err2)
		})
	})
	if err := errors.Join(insert(t, a, 90), insert(t, c, 91)); err != nil {
		t.Error(err)
	}
	within(t, 30*time.Second, func(ctx context.Context) error {
		return p.Wait(ctx, "each has what the other wrote", func(context.Context) (bool, error) {
			x, y := text(t, a, "SELECT count(*) FROM t WHERE id IN (90, 91)"), text(t, c, "SELECT count(*) FROM t WHERE id IN (90, 91)")
			return x == "[[2]]" && y == "[[2]]", fmt.Errorf("a has %s, c %s", x, y)
		})
	})
	if r := register(t, p.Sites[1]); len(r.Members) != 3 {
		t.Errorf("a site was left out that a third one hears: %+v", r)
	}
	p.Link("a", "c").Heal()
	p.Link("c", "a").Heal()
	settledPair(t, p)
	expectRows(t, p, append(acked, 90, 91)...)
}
