package e2e

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pair"
)

const (
	segmentBytes = 1 << 20
	budgetBytes  = 6 << 20
)

// small gives a site's journals little room.
func small(_, text string) string {
	return text + "\njournal:\n  keep: 1s\n  budget: 6MiB\n  segment: 1MiB\n  full: stop-writes\n"
}

// write puts about mb megabytes that do not compress into a site's journal, in transactions of about 100 kB.
func write(t *testing.T, s *pair.Site, first, mb int) {
	t.Helper()
	for i := range 10 * mb {
		do(t, s, fmt.Sprintf("INSERT INTO x SELECT %d + i, (SELECT string_agg(md5(random()::text || j || i), '') FROM generate_series(1, 31) j) FROM generate_series(1, 100) i", first+100*i))
	}
}

func TestJournalsArePrunedAndAnAbsentPeerIsHeldWithinTheBudget(t *testing.T) {
	t.Parallel()
	p := newPair(t, pair.Options{Seed: schema("CREATE TABLE x (id int PRIMARY KEY, v text)"), Config: small})
	a, b := p.Sites[0], p.Sites[1]
	began := ready(t, a, healMax).Journal.Start
	write(t, a, 0, 4)
	settled(t, p, 30*time.Second)
	pruned := func(ctx context.Context) error {
		own, err := a.Status(ctx)
		if err != nil {
			return err
		}
		other, err := b.Status(ctx)
		if err != nil {
			return err
		}
		j, c := own.Journal, other.Links[0].Received
		if j.Start <= began || c.Start <= began || j.Bytes > 2*segmentBytes+1<<16 || c.Bytes > 2*segmentBytes+1<<16 {
			return fmt.Errorf("the journal %+v and its copy %+v begin at %s still", j, c, began)
		}
		return nil
	}
	within(t, 20*time.Second, "the journal of a and its copy at b are pruned", pruned)
	for _, s := range p.Sites {
		ends(t, s)
		start(t, s)
	}
	streams(t, p)
	write(t, a, 100000, 1)
	settled(t, p, 30*time.Second)
	equal(t, p)

	t.Run("budget", func(t *testing.T) { budget(t, p) })
	t.Run("progress", func(t *testing.T) { progress(t, p) })
}

// budget keeps b away until a's journal has no room left.
func budget(t *testing.T, p *pair.Pair) {
	a, b := p.Sites[0], p.Sites[1]
	if err := b.SignalAgent(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	write(t, a, 200000, 20)
	out := complains(t, a, 20*time.Second, "app at a", "the journal's disk budget is used up", "bring the site that is behind back, or raise journal.budget")
	if !strings.Contains(out, "needs attention") {
		t.Errorf("status over budget:\n%s", out)
	}
	d, err := a.Status(t.Context())
	if err != nil || !d.OverBudget || d.Health != "down" {
		t.Errorf("status over budget: %+v, %v", d, err)
	}
	// What is decoded until the next look at the budget comes on top.
	if most := int64(2 * budgetBytes); d.Journal.Bytes > most {
		t.Errorf("the journal has %d bytes, want at most about %d", d.Journal.Bytes, most)
	}
	before := d.Journal.End
	write(t, a, 400000, 1)
	if d, err = a.Status(t.Context()); err != nil || d.Journal.End != before {
		t.Errorf("decoding went on over the budget: from %s to %s, %v", before, d.Journal.End, err)
	}
	start(t, b)
	healthy(t, a, 30*time.Second)
	settled(t, p, 30*time.Second)
	equal(t, p)
}

// progress puts b's progress back to before what its copy of a's journal still holds, in both ways that can happen.
func progress(t *testing.T, p *pair.Pair) {
	a, b := p.Sites[0], p.Sites[1]
	for _, c := range []struct{ name, sql string }{
		{"put back", "DELETE FROM duri.applied WHERE to_lsn > (SELECT min(to_lsn) FROM duri.applied); UPDATE duri.applied SET to_lsn = '0/1'"},
		{"dropped", "DELETE FROM duri.applied"},
	} {
		ends(t, b)
		do(t, b, "CREATE TABLE IF NOT EXISTS duri.saved AS SELECT * FROM duri.applied")
		do(t, b, c.sql)
		start(t, b)
		do(t, a, "INSERT INTO x VALUES ("+map[string]string{"put back": "-1", "dropped": "-2"}[c.name]+", '')")
		complains(t, b, 20*time.Second, "a -> b", "no longer kept", "then re-join this site")
		if n := text(t, b, "SELECT count(*) FROM x WHERE id < 0"); n != "0" {
			t.Errorf("progress %s: %s rows were applied behind a hole", c.name, n)
		}
	}
	ends(t, b)
	do(t, b, "DELETE FROM duri.applied; INSERT INTO duri.applied SELECT * FROM duri.saved; DROP TABLE duri.saved")
	start(t, b)
	healthy(t, b, 30*time.Second)
	settled(t, p, 30*time.Second)
	equal(t, p)
}
