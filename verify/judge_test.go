package verify

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/wal"
)

// at is a row with a version; site 0: not known.
func at(seconds int, site wal.SiteID) *VersionedRow {
	return &VersionedRow{Row: Row{Key: Key{"1"}, Hash: "x", Copies: 1}, Time: wal.Time(seconds) * 1_000_000, Site: site}
}

func TestWhichSideIsRight(t *testing.T) {
	const a, b, c = 1, 2, 3
	known := func(seconds int, site wal.SiteID, since int) Deletion {
		d := Deletion{Since: wal.Time(since) * 1_000_000}
		if seconds > 0 {
			d.Version = wal.Version{Time: wal.Time(seconds) * 1_000_000, Site: site}
		}
		return d
	}
	for _, x := range []struct {
		name    string
		a, b    *VersionedRow
		from    int
		deleted Deletion
		want    int
		why     string
	}{
		{"the newer version", at(10, a), at(20, b), -1, Deletion{}, 1, "newer"},
		{"the newer version, the other way round", at(20, a), at(10, b), -1, Deletion{}, 0, "newer"},
		{"a tie goes to the greater site", at(10, a), at(10, b), -1, Deletion{}, 1, "newer"},
		{"the original, although the copy's stamp is later", at(10, a), at(11, a), -1, Deletion{}, 0, "written by a"},
		{"the original at b", at(99, b), at(10, b), -1, Deletion{}, 1, "written by b"},
		{"copies of each other", at(20, b), at(10, a), -1, Deletion{}, 0, "newer"},
		{"copies of a third site", at(10, c), at(20, c), -1, Deletion{}, undecided, "third site"},
		{"one copy of a third site", at(10, c), at(20, b), -1, Deletion{}, 1, "newer"},
		{"a frozen row is older", at(0, 0), at(1, b), -1, Deletion{}, 1, "not known"},
		{"a frozen row is older, the other way round", at(1, a), at(0, 0), -1, Deletion{}, 0, "not known"},
		{"two frozen rows", at(0, 0), at(0, 0), -1, Deletion{}, undecided, "neither"},
		{"two frozen rows, declared", at(0, 0), at(0, 0), 1, Deletion{}, 1, "declared"},
		{"declared against the version", at(20, a), at(10, b), 1, Deletion{}, 1, "declared"},
		{"declared absent", at(20, a), nil, 1, Deletion{}, 1, "declared"},
		{"a later delete is known", at(10, a), nil, -1, known(20, b, 5), 1, "deleted at"},
		{"a later delete is known, although older ones are not", nil, at(10, a), -1, known(20, b, 15), 0, "deleted at"},
		{"an earlier delete is known", nil, at(30, a), -1, known(20, b, 5), 1, "no later delete"},
		{"no delete is known", at(10, a), nil, -1, known(0, 0, 5), 0, "no later delete"},
		{"deletes are known only from later on", at(10, a), nil, -1, known(0, 0, 11), undecided, "older than the deletes"},
		{"a frozen row and none", at(0, 0), nil, -1, known(0, 0, 5), undecided, "not known"},
		{"gone at both", nil, nil, -1, known(0, 0, 5), undecided, "neither"},
	} {
		t.Run(x.name, func(t *testing.T) {
			e := evidence{rows: [2]*VersionedRow{x.a, x.b}, sites: [2]wal.SiteID{a, b}, from: x.from, deleted: x.deleted}
			got := judge(e, func(i int) string { return []string{"a", "b"}[i] })
			if got.right != x.want || !strings.Contains(got.why, x.why) {
				t.Errorf("%+v, want %d because of %q", got, x.want, x.why)
			}
		})
	}
}

func TestFixesAreGroupedByVersionInBoundedTransactions(t *testing.T) {
	var fixes []Fix
	for i := range 2*mendRows + 10 {
		fixes = append(fixes, Fix{Time: wal.Time(i % 2), Site: 1})
	}
	fixes = append(fixes, Fix{Time: 0, Site: 2})
	seen, most := map[int]bool{}, 0
	for _, g := range groups(fixes) {
		most = max(most, len(g.index))
		for _, i := range g.index {
			if seen[i] || g.version != (wal.Version{Time: fixes[i].Time, Site: fixes[i].Site}) {
				t.Errorf("fix %d stands in a group of %s, or twice", i, g.version)
			}
			seen[i] = true
		}
	}
	if len(seen) != len(fixes) || most > mendRows || most < mendRows/2 {
		t.Errorf("%d of %d fixes, %d in a group", len(seen), len(fixes), most)
	}
	huge := strings.Repeat("x", mendBytes)
	if got := groups([]Fix{{Image: []*string{&huge}}, {Image: []*string{&huge}}}); len(got) != 2 {
		t.Errorf("huge rows stand in %d groups", len(got))
	}
}

func TestMarksAreTheFurtherOfBoth(t *testing.T) {
	got := mergeMarks([]wal.Seen{{Site: 1, LSN: 10}, {Site: 3, LSN: 5}}, []wal.Seen{{Site: 2, LSN: 7}, {Site: 3, LSN: 9}, {Site: 1, LSN: 4}})
	if d := cmp.Diff([]wal.Seen{{Site: 1, LSN: 10}, {Site: 3, LSN: 9}, {Site: 2, LSN: 7}}, got); d != "" {
		t.Error(d)
	}
}

func TestPacerKeepsPeriodAndShare(t *testing.T) {
	start := time.Date(2026, 11, 25, 0, 0, 0, 0, time.UTC)
	for _, x := range []struct {
		name string
		took time.Duration // for a range of 1,000 rows
		want time.Duration // for 100 of them
	}{
		{"the period decides", time.Millisecond, passTime(100 * time.Second)},
		{"the share decides", 100 * time.Millisecond, 1000 * time.Second},
	} {
		t.Run(x.name, func(t *testing.T) {
			p, now := newPacer(100_000, 100*time.Second, 0.01, start), start
			for range 100 {
				now = now.Add(p.wait(now))
				p.compared(now, 1000)
				p.worked(now, 1000, x.took)
			}
			now = now.Add(p.wait(now))
			if got := now.Sub(start); got < x.want-time.Millisecond || got > x.want+time.Millisecond {
				t.Errorf("a pass takes %s, want %s", got, x.want)
			}
		})
	}
	t.Run("a busy machine is not taken for costly rows", func(t *testing.T) {
		p, now := newPacer(100_000, 100*time.Second, 0.01, start), start
		for i := range 100 {
			now = now.Add(p.wait(now))
			p.compared(now, 1000)
			p.worked(now, 1000, time.Millisecond*[]time.Duration{20, 5, 1, 9}[i%4])
		}
		now = now.Add(p.wait(now))
		if got := now.Sub(start); got < 80*time.Second || got > 160*time.Second { // 100 s by what rows cost, 875 s by what it took
			t.Errorf("a pass takes %s", got)
		}
	})
	t.Run("what was missed is caught up within bounds", func(t *testing.T) {
		p, now := newPacer(100_000, 100*time.Second, 0.5, start), start.Add(time.Hour)
		burst := 0
		for ; p.wait(now) == 0; burst++ {
			p.compared(now, 1000)
			p.worked(now, 1000, time.Millisecond)
		}
		want := int(paceSlack.Seconds()*100/passTime(100*time.Second).Seconds()) + 1
		if burst < want-1 || burst > want+1 {
			t.Errorf("%d ranges at once after an hour, want %d", burst, want)
		}
	})
}

func TestWorkIsTheBusierServers(t *testing.T) {
	for _, x := range []struct {
		name string
		sums [2]Sum
		rows int64
		took time.Duration
	}{
		{"both know their CPU time", [2]Sum{{Rows: 10, Seconds: 9, CPU: 1}, {Rows: 20, Seconds: 5, CPU: 2}}, 0, 2 * time.Second},
		{"one does not", [2]Sum{{Rows: 10, Seconds: 9, CPU: 1}, {Rows: 20, Seconds: 5}}, 20, 9 * time.Second},
		{"none does", [2]Sum{{Rows: 30, Seconds: 1}, {Rows: 20, Seconds: 5}}, 30, 5 * time.Second},
	} {
		if rows, took := workOf(x.sums); rows != x.rows || took != x.took {
			t.Errorf("%s: %d rows, %s, want %d, %s", x.name, rows, took, x.rows, x.took)
		}
	}
}
