package verify

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// diffOf computes what Run must find in two tables.
func diffOf(a, b *memTable) []string {
	want := []string{}
	for k, v := range a.data {
		switch w, ok := b.data[k]; {
		case !ok:
			want = append(want, "t missing_at_b "+k)
		case v != w:
			want = append(want, "t differs "+k+" [v]")
		}
	}
	for k := range b.data {
		if _, ok := a.data[k]; !ok {
			want = append(want, "t missing_at_a "+k)
		}
	}
	counts := func(heap []string) map[string]int {
		n := map[string]int{}
		for _, v := range heap {
			n[v]++
		}
		return n
	}
	inA, inB := counts(a.heap), counts(b.heap)
	all := maps.Clone(inA)
	maps.Copy(all, inB)
	for v := range all {
		switch x, y := inA[v], inB[v]; {
		case x > y:
			want = append(want, fmt.Sprintf("t missing_at_b %d/%d", x, y))
		case x < y:
			want = append(want, fmt.Sprintf("t missing_at_a %d/%d", x, y))
		}
	}
	slices.Sort(want)
	return want
}

// TestFindsExactlyTheDifferences is the property that the package exists for. rapid prints its seed when it fails.
func TestFindsExactlyTheDifferences(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := memPairOf(rapid.SampledFrom([]int{0, 1, 7, 100, 2500, 5000}).Draw(t, "rows"))
		b.order = rapid.SampledFrom([]string{"bytes", "other"}).Draw(t, "order")
		key := rapid.Custom(func(t *rapid.T) string { return fmt.Sprintf("%07d", rapid.IntRange(0, 7000).Draw(t, "key")) })
		value := rapid.SampledFrom([]string{"", "v", "w", "x"})
		for _, side := range []*memTable{a, b} {
			for range rapid.IntRange(0, 30).Draw(t, "changes") {
				side.set(key.Draw(t, "k"), value.Draw(t, "v"))
			}
		}
		if first := rapid.IntRange(0, 9).Draw(t, "emptied"); first == 0 {
			clear(a.data)
		}
		if rapid.Bool().Draw(t, "keyless") {
			for _, side := range []*memTable{a, b} {
				side.keyed, side.data = false, nil
				side.heap = rapid.SliceOfN(value, 0, 20).Draw(t, "heap")
			}
		}
		o := Options{
			RangeRows: len(a.data)/100 + rapid.SampledFrom([]int{7, 3000, 20000}).Draw(t, "range rows"), MaxDiffs: 20_000,
			Parallel: rapid.IntRange(1, 3).Draw(t, "parallel"), Rounds: rapid.IntRange(1, 3).Draw(t, "rounds"),
		}
		sideB := Side(newMem("b", b))
		if rapid.Bool().Draw(t, "remote") {
			sideB = throughRemote(sideB)
		}
		rep, err := Run(context.Background(), newMem("a", a), sideB, o)
		if err != nil {
			t.Fatal(err)
		}
		want := diffOf(a, b)
		if diff := cmp.Diff(want, show(rep)); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
		x := rep.Tables[0]
		if rep.Equal != (len(want) == 0) || x.DifferenceCount != len(want) || x.More || x.InFlight != 0 || x.RangesInFlight != 0 {
			t.Fatalf("%+v", x)
		}
		if x.RowsA != int64(len(a.data)+len(a.heap)) || x.RowsB != int64(len(b.data)+len(b.heap)) {
			t.Fatalf("rows %d, %d", x.RowsA, x.RowsB)
		}
	})
}

func TestRowsThatBecomeEqualAreInFlight(t *testing.T) {
	for _, order := range []string{"bytes", ""} {
		a, b := memPairOf(5000)
		a.order, b.order = order, order
		a.set("0000007", "new")
		a.set("0000100", "real")
		b.set("0004999", "")
		settled := 0
		rep := mustRun(t, newMem("a", a), newMem("b", b), Options{Settle: func(context.Context) error {
			settled++
			switch settled {
			case 1:
				b.set("0000007", "new")
			case 3:
				b.set("0004999", "v") // Too late to be in flight: by then two settlings had left it as it was.
			}
			return nil
		}})
		wantDiffs(t, rep, "t differs 0000100 [v]", "t missing_at_b 0004999")
		if x := rep.Tables[0]; x.InFlight != 1 || x.Unsettled != 0 || settled != 2 {
			t.Errorf("in flight %d, unsettled %d, settled %d", x.InFlight, x.Unsettled, settled)
		}
	}
}

func TestRowsThatClientsKeepWritingAreNoDifferences(t *testing.T) {
	a, b := memPairOf(3000)
	n := 0
	a.onRead = func() { n++; a.set("0000001", fmt.Sprint("v", n)) }
	b.set("0000002", "real")
	rep := mustRun(t, newMem("a", a), newMem("b", b), Options{Rounds: 4})
	wantDiffs(t, rep, "t differs 0000002 [v]")
	if x := rep.Tables[0]; x.InFlight != 1 || x.Unsettled != 1 {
		t.Errorf("in flight %d, unsettled %d", x.InFlight, x.Unsettled)
	}
}

func TestSuspectDecisions(t *testing.T) {
	o := func(a, b string) observation { return observation{cell{hash: a, copies: 1}, cell{hash: b, copies: 1}} }
	copies := func(a, b int64) observation {
		return observation{cell{hash: "h", copies: a}, cell{hash: "h", copies: b}}
	}
	stamped := func(xmin string) observation { return observation{b: cell{hash: "x", copies: 1, stamp: xmin}} }
	for name, c := range map[string]struct {
		first observation
		then  []observation
		done  bool // before the rounds were over
		real  bool
	}{
		"equal at once":                  {o("x", "y"), []observation{o("x", "x")}, true, false},
		"gone at both":                   {o("x", "y"), []observation{{}}, true, false},
		"stable":                         {o("x", "y"), []observation{o("x", "y"), o("x", "y")}, true, true},
		"stable in the only round":       {o("x", "y"), []observation{o("x", "y")}, false, true},
		"always changing":                {o("1", "0"), []observation{o("2", "1"), o("3", "2")}, false, false},
		"one side changing":              {o("1", "0"), []observation{o("2", "0"), o("3", "0")}, false, false},
		"changing, then stable once":     {o("1", "0"), []observation{o("2", "0"), o("2", "0")}, false, false},
		"changing, then stable":          {o("1", "0"), []observation{o("2", "0"), o("2", "0"), o("2", "0")}, true, true},
		"written again with its values":  {stamped("7"), []observation{stamped("8"), stamped("9")}, false, false},
		"not written again":              {stamped("7"), []observation{stamped("7"), stamped("7")}, true, true},
		"stable, then changing":          {o("1", "0"), []observation{o("1", "0"), o("2", "0")}, false, false},
		"stable, then equal":             {o("1", "0"), []observation{o("1", "0"), o("1", "1")}, true, false},
		"multiplicities":                 {copies(2, 1), []observation{copies(2, 1)}, false, true},
		"multiplicities that become one": {copies(2, 1), []observation{copies(2, 2)}, true, false},
	} {
		s := &suspect{last: c.first}
		for _, o := range c.then {
			s.see(o)
		}
		done := s.done
		if s.conclude(len(c.then)); done != c.done || s.real != c.real {
			t.Errorf("%s: done %v, real %v", name, done, s.real)
		}
	}
}

func TestListEndsAtMaxDiffsAndSaysSo(t *testing.T) {
	a, b := memPairOf(3 * suspectsMax)
	for k := range b.data {
		b.data[k] = "other"
	}
	rep := mustRun(t, newMem("a", a), newMem("b", b), Options{MaxDiffs: 5})
	x := rep.Tables[0]
	if rep.Equal || !x.More || len(x.Differences) != 5 || x.DifferenceCount < 5 || x.DifferenceCount == len(a.data) {
		t.Errorf("equal %v, more %v, listed %d of %d", rep.Equal, x.More, len(x.Differences), x.DifferenceCount)
	}
}

// TestWaitingRangesAreLookedIntoWhenAllBeforeThemWereInFlight: with more rows in flight than are followed at a time, the
// one real difference, at the end, is still found.
func TestWaitingRangesAreLookedIntoWhenAllBeforeThemWereInFlight(t *testing.T) {
	a, b := memPairOf(2 * suspectsMax)
	last := fmt.Sprintf("%07d", 2*suspectsMax-1)
	for k := range b.data {
		b.data[k] = "late"
	}
	rep := mustRun(t, newMem("a", a), newMem("b", b), Options{Parallel: 1, RangeRows: 1000, Settle: func(context.Context) error {
		b.mu.Lock()
		defer b.mu.Unlock()
		for k := range b.data {
			if k != last {
				b.data[k] = "v"
			}
		}
		return nil
	}})
	wantDiffs(t, rep, "t differs "+last+" [v]")
	if x := rep.Tables[0]; x.InFlight < suspectsMax || x.RangesInFlight == 0 {
		t.Errorf("in flight %d rows, %d ranges", x.InFlight, x.RangesInFlight)
	}
}

func TestErrorsOfATableStayWithIt(t *testing.T) {
	a, b := memPairOf(10)
	two := func(m *memTable) func() ([]Table, error) {
		return func() ([]Table, error) {
			all, _ := m.tables()
			bad := all[0]
			bad.Name = "bad"
			return append([]Table{bad}, all...), nil
		}
	}
	sa, sb := newMem("a", a), newMem("b", b)
	sa.tables, sb.tables = two(a), two(b)
	hash := sb.hash
	sb.hash = func(t Table, r Range, n int) (Sum, error) {
		if t.Name == "bad" {
			return Sum{}, &TableError{"b", t.String(), "it is gone", "look for it"}
		}
		return hash(t, r, n)
	}
	b.set("0000003", "x")
	for _, side := range []Side{sb, throughRemote(sb)} {
		rep := mustRun(t, sa, side, Options{})
		wantDiffs(t, rep, "cannot compare table m.bad at b: it is gone", "t differs 0000003 [v]")
		if rep.Tables[0].Hint != "look for it" {
			t.Errorf("hint %q", rep.Tables[0].Hint)
		}
	}
}

func TestOtherErrorsEndTheRunAndNothingIsCalledEqual(t *testing.T) {
	boom := withHint(errors.New("boom"), "duck")
	for name, breakIt := range map[string]func(*fakeSide, *Options){
		"tables": func(s *fakeSide, _ *Options) { s.tables = func() ([]Table, error) { return nil, boom } },
		"bounds": func(s *fakeSide, _ *Options) { s.bounds = func(Table, Range, int) ([]Key, error) { return nil, boom } },
		"hash":   func(s *fakeSide, _ *Options) { s.hash = func(Table, Range, int) (Sum, error) { return Sum{}, boom } },
		"rows":   func(s *fakeSide, _ *Options) { s.rows = func(Table, Range, int) ([]Row, error) { return nil, boom } },
		"settle": func(_ *fakeSide, o *Options) { o.Settle = func(context.Context) error { return boom } },
	} {
		for _, remote := range []bool{false, true} {
			a, b := memPairOf(10)
			b.set("0000003", "x")
			side := newMem("b", b)
			var o Options
			breakIt(side, &o)
			other := Side(side)
			if remote {
				other = throughRemote(side)
			}
			rep, err := Run(context.Background(), newMem("a", a), other, o)
			if err == nil || !strings.Contains(err.Error(), "boom") || hintOf(err) != "duck" || rep.Equal {
				t.Errorf("%s: equal %v, error %v, hint %q", name, rep.Equal, err, hintOf(err))
			}
			for _, x := range rep.Tables {
				if x.Equal {
					t.Errorf("%s: table is equal", name)
				}
			}
		}
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	a, b := memPairOf(10)
	ctx, cancel := context.WithCancelCause(context.Background())
	cause := errors.New("enough")
	a.onRead = func() { cancel(cause) }
	if rep, err := Run(ctx, newMem("a", a), newMem("b", b), Options{RangeRows: 1}); !errors.Is(err, cause) || rep.Equal {
		t.Errorf("equal %v, %v", rep.Equal, err)
	}
}

func TestProgressEndsComplete(t *testing.T) {
	a, b := memPairOf(1000)
	b.set("0000003", "x")
	var last Progress
	calls := 0
	mustRun(t, newMem("a", a), newMem("b", b), Options{RangeRows: 100, Progress: func(p Progress) {
		if p.Rows < last.Rows || p.TablesDone < last.TablesDone {
			t.Errorf("from %+v to %+v", last, p)
		}
		last, calls = p, calls+1
	}})
	if last.Rows != 1000 || last.RowsTotal != 1000 || last.TablesDone != 1 || last.Tables != 1 || last.Suspects != 1 || last.Round != 2 || calls < 10 {
		t.Errorf("%d calls, last %+v", calls, last)
	}
}

func TestBadOptionsAreRefused(t *testing.T) {
	a, b := memPairOf(1)
	for _, o := range []Options{{RangeRows: -1}, {RangeRows: requestRowsMax}, {Parallel: -1}, {Rounds: -1}, {MaxDiffs: -1}, {Tables: []string{"nix"}}} {
		if _, err := Run(context.Background(), newMem("a", a), newMem("b", b), o); err == nil {
			t.Errorf("%+v was taken", o)
		}
	}
}

func TestRunAllComparesWithTheFirst(t *testing.T) {
	a, b := memPairOf(10)
	c, _ := memPairOf(11)
	reps, err := RunAll(context.Background(), []Side{newMem("a", a), newMem("b", b), newMem("c", c)}, Options{})
	if err != nil || len(reps) != 2 || !reps[0].Equal || reps[1].Equal || reps[1].B != "c" {
		t.Errorf("%+v, %v", reps, err)
	}
}

func TestWildcard(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"public.t", "public.t", true},
		{"public.t", "public.tt", false},
		{"public.*", "public.t", true},
		{"*.t", "public.t", true},
		{"*", "", true},
		{"a*b*c", "axbyc", true},
		{"a*b*c", "axbycz", false},
		{"**", "x", true},
		{"", "x", false},
		{"p*", "q", false},
	} {
		if got := wildcard(c.pattern, c.s); got != c.want {
			t.Errorf("%q matches %q: %v", c.pattern, c.s, got)
		}
	}
}

func TestMatchTableDecidesTheMethod(t *testing.T) {
	base := Table{Schema: "s", Name: "t", Columns: []Column{{"a", "int"}, {"b", "text"}}, Key: []string{"a"}, Order: "int", HashID: "h"}
	for name, c := range map[string]struct {
		change    func(*Table)
		method    Method
		algorithm string
		notes     int
		columns   []ColumnDifference
	}{
		"same":          {func(*Table) {}, ByKeyOrder, AlgorithmFast, 0, nil},
		"other order":   {func(t *Table) { t.Order = "text" }, ByKeyHash, AlgorithmFast, 1, nil},
		"no order":      {func(t *Table) { t.Order = "" }, ByKeyHash, AlgorithmFast, 1, nil},
		"no key":        {func(t *Table) { t.Key = nil }, ByRowHash, AlgorithmFast, 1, nil},
		"other key":     {func(t *Table) { t.Key = []string{"b"} }, ByRowHash, AlgorithmFast, 1, nil},
		"other hash":    {func(t *Table) { t.HashID = "x" }, ByKeyOrder, AlgorithmMD5, 1, nil},
		"other type":    {func(t *Table) { t.Columns = []Column{{"a", "int"}, {"b", "date"}} }, ByKeyOrder, AlgorithmFast, 0, []ColumnDifference{{"b", "text", "date"}}},
		"column gone":   {func(t *Table) { t.Columns = t.Columns[:1] }, ByKeyOrder, AlgorithmFast, 0, []ColumnDifference{{"b", "text", ""}}},
		"column gained": {func(t *Table) { t.Columns = append(slices.Clone(t.Columns), Column{"c", "int"}) }, ByKeyOrder, AlgorithmFast, 0, []ColumnDifference{{"c", "", "int"}}},
	} {
		other := base
		c.change(&other)
		m := matchTable(base, other, 1)
		if m.method != c.method || m.by.Algorithm != c.algorithm || len(m.known.Notes) != c.notes {
			t.Errorf("%s: %s by %s, notes %q", name, m.method, m.by.Algorithm, m.known.Notes)
		}
		if diff := cmp.Diff(c.columns, m.known.Columns); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestPartGroupsCoverEveryPartOnce(t *testing.T) {
	for _, rows := range []int64{0, 1, 1000, groupRows, 5 * groupRows, 1 << 33} {
		groups := partGroups(rows)
		next := 0
		for _, g := range groups {
			for _, i := range g.Index {
				if i != next {
					t.Fatalf("%d rows: part %d follows %d", rows, i, next-1)
				}
				next++
			}
		}
		if next != 1<<groups[0].Bits || int64(len(groups)) > rows/groupRows+1 {
			t.Errorf("%d rows: %d parts in %d groups", rows, next, len(groups))
		}
	}
}

func TestChunksCoverTheTableOnce(t *testing.T) {
	for _, c := range []struct{ blocks, bytes int64 }{{0, 0}, {1, 8192}, {5000, 5000 * 8192}, {100, 1 << 33}, {1024, 8 << 20}} {
		next := int64(0)
		chunks := chunksOf("t", c.blocks, c.bytes, 8192)
		for i, x := range chunks {
			if x.from != next || x.to <= x.from || x.last != (i == len(chunks)-1) {
				t.Fatalf("%+v: chunk %d is %+v", c, i, x)
			}
			next = x.to
		}
		if next < c.blocks {
			t.Errorf("%+v ends at %d", c, next)
		}
	}
}

func TestRangesAreSmallerWhereRowsAreWide(t *testing.T) {
	for _, c := range []struct {
		rows, bytes int64
		want        int
	}{{0, 0, 20000}, {1000, 100_000, 20000}, {1000, 1000 << 20, 32}, {10, 10 << 30, 1}} {
		if got := rangeRows(match{a: Table{Rows: c.rows, Bytes: c.bytes}}, 20000); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

func TestKeysSurviveJSON(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		raw := rapid.SliceOf(rapid.SliceOf(rapid.ByteRange(1, 255))).Draw(t, "key")
		k := make(Key, len(raw))
		for i, v := range raw {
			k[i] = string(v)
		}
		b, err := k.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		var back Key
		if err := back.UnmarshalJSON(b); err != nil || !slices.Equal(k, back) {
			t.Fatalf("%q became %q: %v", k, back, err)
		}
	})
}

func TestServeAnswersNonsenseWithAnError(t *testing.T) {
	a, _ := memPairOf(1)
	for _, req := range []string{"", "{", "[]", `{"op":"hash"}`, `{"op":"drop","table":{},"range":{},"n":1}`, `{"op":"rows","table":{},"range":{},"n":99999999}`} {
		s := NewRemote("a", func(ctx context.Context, _ []byte) ([]byte, error) { return Serve(ctx, newMem("a", a), []byte(req)) })
		if _, err := s.Hash(context.Background(), Table{}, Range{}, 1); err == nil || !strings.Contains(err.Error(), "comparison request") {
			t.Errorf("%q: %v", req, err)
		}
	}
}

func FuzzServe(f *testing.F) {
	f.Add([]byte(`{"op":"bounds","table":{"schema":"m","name":"t"},"range":{"by":{"seed":"1"},"after":["\u0000zz"]},"n":1}`))
	f.Fuzz(func(t *testing.T, req []byte) {
		none := &fakeSide{
			tables: func() ([]Table, error) { return nil, nil },
			bounds: func(Table, Range, int) ([]Key, error) { return nil, nil },
			hash:   func(Table, Range, int) (Sum, error) { return Sum{}, nil },
			rows:   func(Table, Range, int) ([]Row, error) { return nil, nil },
		}
		if _, err := Serve(context.Background(), none, req); err != nil {
			t.Fatal(err)
		}
	})
}

func TestCutImagesStillDiffer(t *testing.T) {
	long := strings.Repeat("둘", 10)
	for _, c := range []struct {
		value string
		most  int
		want  string
	}{{"abc", 3, "abc"}, {"abcd", -1, "abcd"}, {long, 4, "둘... (30 bytes, sha256 "}} {
		got := cutImage([]byte(c.value), c.most)
		if !strings.HasPrefix(*got, c.want) {
			t.Errorf("%q", *got)
		}
	}
	if cutImage(nil, 1) != nil || *cutImage([]byte(long+"a"), 4) == *cutImage([]byte(long+"b"), 4) {
		t.Error("values that differ look the same")
	}
}
