package verify

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/internal/pgtest"
)

// TestOnlyChosenRowsAreCompared: of the differences exactly those of chosen rows are found, whatever the table, and however many.
func TestOnlyChosenRowsAreCompared(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := memPairOf(rapid.SampledFrom([]int{0, 7, 2500}).Draw(t, "rows"))
		key := rapid.Custom(func(t *rapid.T) string { return fmt.Sprintf("%07d", rapid.IntRange(0, 3000).Draw(t, "key")) })
		value := rapid.SampledFrom([]string{"", "v", "w", "x"})
		for _, side := range []*memTable{a, b} {
			for range rapid.IntRange(0, 30).Draw(t, "changes") {
				side.set(key.Draw(t, "k"), value.Draw(t, "v"))
			}
		}
		var chosen Chosen
		var want []string
		if rapid.Bool().Draw(t, "keyless") {
			for _, side := range []*memTable{a, b} {
				side.keyed, side.data = false, nil
				side.heap = rapid.SliceOfN(value, 0, 20).Draw(t, "heap")
			}
			for _, v := range rapid.SliceOfN(value, 0, 4).Draw(t, "chosen") {
				chosen.Rows = append(chosen.Rows, []*string{nil, &v})
			}
			for _, v := range slices.Compact(slices.Sorted(slices.Values([]string{"", "v", "w", "x"}))) {
				is := func(s string) bool { return s == v }
				if x, y := len(slices.DeleteFunc(slices.Clone(a.heap), func(s string) bool { return !is(s) })), len(slices.DeleteFunc(slices.Clone(b.heap), func(s string) bool { return !is(s) })); x != y &&
					slices.ContainsFunc(chosen.Rows, func(r []*string) bool { return *r[1] == v }) {
					want = append(want, fmt.Sprintf("%d/%d", x, y))
				}
			}
		} else {
			for k := range a.data {
				if b.data[k] != a.data[k] && rapid.Bool().Draw(t, "differing") {
					chosen.Keys = append(chosen.Keys, Key{k})
				}
			}
			for range rapid.IntRange(0, 1200).Draw(t, "more") {
				chosen.Keys = append(chosen.Keys, Key{key.Draw(t, "k")})
			}
			slices.SortFunc(chosen.Keys, func(x, y Key) int { return strings.Compare(x[0], y[0]) })
			chosen.Keys = slices.CompactFunc(chosen.Keys, func(x, y Key) bool { return x[0] == y[0] })
			for _, k := range chosen.Keys {
				x, inA := a.data[k[0]]
				y, inB := b.data[k[0]]
				if inA != inB || x != y {
					want = append(want, k[0])
				}
			}
		}
		rep, err := Run(context.Background(), newMem("a", a), throughRemote(newMem("b", b)), Options{
			Only: func(Table) Chosen { return chosen }, MaxDiffs: 20_000, Parallel: rapid.IntRange(1, 3).Draw(t, "parallel"), Rounds: 2,
		})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, d := range rep.Tables[0].Differences {
			if d.Key == nil {
				got = append(got, fmt.Sprintf("%d/%d", d.CopiesA, d.CopiesB))
			} else {
				got = append(got, d.Key[0])
			}
		}
		slices.Sort(got)
		slices.Sort(want)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
	})
}

// TestHashesOfGivenRows: PostgreSQL hashes values that it is given as it does the row in the table, of whatever types.
func TestHashesOfGivenRows(t *testing.T) {
	s := mendable(t, schemaAll)
	s.both(t, dataAll)
	pgtest.Exec(t, s.c, "a", `INSERT INTO heap VALUES (NULL, ''), (7, 'NULL'), (8, '{"a\\b",}'), (9, ' ')`)
	tables, err := s.a.Tables(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, table := range tables {
		table.Key = nil // each as if it had none
		for _, by := range []Digest{{AlgorithmFast, 1}, {AlgorithmMD5, 2}} {
			rows, err := s.a.Rows(t.Context(), table, Range{By: by, Parts: &Parts{Index: []int{0}}, ImageBytes: -1}, 100_000)
			if err != nil {
				t.Fatal(err)
			}
			var images [][]*string
			for _, r := range rows {
				images = append(images, r.Image)
			}
			got, err := s.a.hashes(t.Context(), table, by, images)
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != len(rows) {
				t.Fatalf("%s: %d hashes for %d rows", table, len(got), len(rows))
			}
			for i, r := range rows {
				n++
				if got[i] != r.Hash {
					t.Errorf("%s, %s: %s for %v, in the table it is %s", table, by.Algorithm, got[i], r.Image, r.Hash)
				}
			}
		}
	}
	if n < 100 {
		t.Errorf("only %d rows", n)
	}
}

// TestRepairOfChosenRows mends those and leaves the others.
func TestRepairOfChosenRows(t *testing.T) {
	s := mendable(t, "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE heap (a int, v text); ALTER TABLE heap REPLICA IDENTITY FULL")
	s.both(t, "INSERT INTO t SELECT i, 'v' FROM generate_series(1, 100) i; INSERT INTO heap SELECT i, 'v' FROM generate_series(1, 100) i")
	s.exec(t, "b", `UPDATE t SET v = 'ghost' WHERE id IN (1, 2); DELETE FROM t WHERE id = 3; INSERT INTO t VALUES (1000, 'ghost');
		INSERT INTO heap VALUES (1, 'ghost'), (1, 'ghost'), (2, 'other'); DELETE FROM heap WHERE a = 3`)
	text := func(v string) *string { return &v }
	rep := s.repair(t, s.b, RepairOptions{Apply: true, From: "a", Rounds: 2, Only: func(t Table) Chosen {
		switch t.Name {
		case "t":
			return Chosen{Keys: []Key{{"1"}, {"3"}, {"50"}, {"1000"}, {"4711"}}}
		case "heap":
			return Chosen{Rows: [][]*string{{text("1"), text("ghost")}, {text("3"), text("v")}, {text("7"), text("v")}}}
		}
		return Chosen{}
	}})
	if !rep.Equal() || rep.Done != 5 {
		t.Errorf("%v", told(rep))
	}
	wantDiffs(t, s.run(t, Options{}), "heap missing_at_a 0/1", "t differs 2 [v]")
}
