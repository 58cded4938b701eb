package trial

import (
	"context"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"

	"github.com/duri-io/duri/wal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEveryMutantMatchesTheSourceOnceAndIsStillGo(t *testing.T) {
	root, err := moduleRoot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range Mutants() {
		texts, err := m.apply(root)
		if err != nil {
			t.Error(err)
		}
		for file, text := range texts {
			if _, err := parser.ParseFile(token.NewFileSet(), file, text, 0); err != nil {
				t.Errorf("mutant %s: %v", m.Name, err)
			}
		}
	}
	if len(Mutants()) < 5 {
		t.Errorf("%d mutants are too few to trust the test", len(Mutants()))
	}
}

func TestMutantThatDoesNotMatchIsRefused(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "a.go"), []byte("x\nx\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, old := range []string{"x", "y"} {
		m := Mutant{Name: "m", Edits: []edit{{"a.go", old, "z"}}}
		if _, err := m.apply(root); err == nil {
			t.Errorf("a text that is there %d times was replaced", strings.Count("x\nx\n", old))
		}
	}
	if _, err := MutantNamed("no such rule"); err == nil || !strings.Contains(err.Error(), "tombstones") {
		t.Errorf("an unknown mutant gives %v, want the names of those there are", err)
	}
}

func TestOverlayNamesTheChangedFiles(t *testing.T) {
	root, dir := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "a.go"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := Mutant{Name: "m", Edits: []edit{{"a.go", "old", "new"}}}
	path, err := m.overlay(root, dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(root, "a.go"); !strings.Contains(string(b), want) {
		t.Errorf("overlay %s does not name %s", b, want)
	}
	if changed, err := os.ReadFile(filepath.Join(dir, "m-a.go")); err != nil || string(changed) != "new" {
		t.Errorf("the changed file holds %q (%v)", changed, err)
	}
}

var sizes = Sizes{Sites: 3, Ops: 10_000, Keys: 100, Sessions: 2, Faults: 40, Skew: 5 * time.Second}

func TestScriptFollowsFromTheSeed(t *testing.T) {
	a, b, c := NewScript(1, sizes), NewScript(1, sizes), NewScript(2, sizes)
	if d := cmp.Diff(a, b); d != "" {
		t.Errorf("one seed gives two scripts:\n%s", d)
	}
	if cmp.Equal(a.Faults, c.Faults) {
		t.Error("two seeds give the same faults")
	}
	if err := a.check(); err != nil {
		t.Error(err)
	}
	if !slices.IsSortedFunc(a.Faults, func(x, y Fault) int { return x.At - y.At }) {
		t.Error("the faults are not in order")
	}
	kinds := map[string]bool{}
	for _, f := range a.Faults {
		kinds[f.Kind] = true
		if f.Site == f.Peer || f.At <= 0 || f.At >= a.Ops || f.Value > 5000 || f.Value < -5000 || f.For > 6000 {
			t.Errorf("fault out of bounds: %+v", f)
		}
		if !strings.Contains(f.String(), f.Kind) {
			t.Errorf("%q does not name its kind", f)
		}
	}
	if len(kinds) < 6 {
		t.Errorf("40 faults are of %d kinds only", len(kinds))
	}
	if back, err := ParseScript([]byte(a.JSON())); err != nil || !cmp.Equal(a, back) {
		t.Errorf("a script does not survive JSON (%v): %s", err, cmp.Diff(a, back))
	}
}

func TestScriptWithoutSkewLeavesClocksAlone(t *testing.T) {
	z := sizes
	z.Skew = 0
	s := NewScript(1, z)
	if slices.ContainsFunc(s.Faults, func(f Fault) bool { return f.Kind == stepClock }) || !cmp.Equal(s.Clocks, []int{0, 0, 0}) {
		t.Errorf("clocks %v, faults %v", s.Clocks, s.Faults)
	}
}

func TestBadScriptsAreRefused(t *testing.T) {
	for name, spoil := range map[string]func(*Script){
		"one site":      func(s *Script) { s.Sites = 1 },
		"nine sites":    func(s *Script) { s.Sites = 9 },
		"no operations": func(s *Script) { s.Ops = 0 },
		"clocks":        func(s *Script) { s.Clocks = nil },
		"no atoms":      func(s *Script) { s.Atoms = nil },
		"odd atom":      func(s *Script) { s.Atoms = []string{"odd"} },
		"fault":         func(s *Script) { s.Faults = []Fault{{Site: 3}} },
	} {
		s := NewScript(1, sizes)
		spoil(&s)
		if err := s.check(); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if _, err := Run(t.Context(), Options{Script: s}); err == nil {
			t.Errorf("%s: run", name)
		}
	}
	if _, err := ParseScript([]byte("{")); err == nil {
		t.Error("half a script was read")
	}
}

func TestShrinkFindsTheOneFaultAndAtomThatMatter(t *testing.T) {
	s := NewScript(1, sizes)
	s.Faults[17].Kind = "the one"
	runs := 0
	short := Shrink(s, 200, func(c Script) bool {
		runs++
		return slices.Contains(c.Atoms, "key-change") && slices.ContainsFunc(c.Faults, func(f Fault) bool { return f.Kind == "the one" })
	})
	if len(short.Faults) != 1 || !cmp.Equal(short.Atoms, []string{"key-change"}) || short.Ops >= 2*minOps || !cmp.Equal(short.Clocks, make([]int, 3)) {
		t.Errorf("shrunk to %s", short.JSON())
	}
	if runs > 100 {
		t.Errorf("%d runs", runs)
	}
}

func TestShrinkKeepsItsBudget(t *testing.T) {
	runs := 0
	s := NewScript(1, sizes)
	if short := Shrink(s, 3, func(Script) bool { runs++; return false }); runs != 3 || !cmp.Equal(short, s) {
		t.Errorf("%d runs of 3, shrunk to %s", runs, short.JSON())
	}
}

func TestClockGoesByItsFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), OffsetFile)
	c, err := newClock(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []time.Duration{0, 3 * time.Second, -1500 * time.Millisecond} {
		if err := c.set(d); err != nil {
			t.Fatal(err)
		}
		if got := readOffset(file); got != d || c.get() != d {
			t.Errorf("set to %s: the agent reads %s, the clients %s", d, got, c.get())
		}
	}
	if got := readOffset(file + ".none"); got != 0 {
		t.Errorf("without a file the offset is %s", got)
	}
}

func TestLoadEndsWhenEnoughIsCommitted(t *testing.T) {
	l := newLoad(10, 2)
	l.committed(0, 9)
	if l.over() {
		t.Error("over after 9 of 10")
	}
	l.committed(1, 5)
	l.committed(1, 5)
	if !l.over() || l.changes.Load() != 19 {
		t.Errorf("over: %v after %d", l.over(), l.changes.Load())
	}
	if l.early(0) {
		t.Error("a load without a rate is early")
	}
	if !l.early(1) {
		t.Error("19 changes at once are not early for one a second")
	}
}

func TestResultsOfATransactionBecomeEffects(t *testing.T) {
	b := &bundle{steps: []step{
		{"INSERT", written(tableInt, wal.Insert, true)},
		{"ROLLED BACK", nil},
		truncateOf(tableText),
	}}
	rows := func(cells ...string) [][]byte {
		var out [][]byte
		for _, c := range cells {
			out = append(out, []byte(c))
		}
		return out
	}
	results := []*pgconn.Result{
		{},
		{Rows: [][][]byte{rows("1", "1\x1fa"), rows("2", "2\x1fb")}},
		{Rows: [][][]byte{rows("3", "3\x1fc")}},
		{CommandTag: pgconn.NewCommandTag("TRUNCATE TABLE")},
		{Rows: [][][]byte{rows("77")}},
	}
	got, xid, err := b.effects(results)
	want := []effect{
		{table: tableInt, op: wal.Insert, upsert: true, key: "1", old: "1", image: "1\x1fa"},
		{table: tableInt, op: wal.Insert, upsert: true, key: "2", old: "2", image: "2\x1fb"},
		{table: tableText, op: wal.Truncate},
	}
	if err != nil || xid != 77 || !slices.Equal(got, want) {
		t.Errorf("xid %d, %v, %+v", xid, err, got)
	}
	if _, _, err := b.effects(results[:3]); err == nil {
		t.Error("missing results were accepted")
	}
	results[4] = &pgconn.Result{Rows: [][][]byte{{nil}}}
	if _, _, err := b.effects(results); err == nil {
		t.Error("changes without a transaction number were accepted")
	}
}

func TestEveryAtomDrawsStatements(t *testing.T) {
	r := &run{s: NewScript(3, sizes), load: newLoad(1, 3)}
	c := newClient(r, 0, 0)
	for range 500 {
		text := c.draw().text()
		if !strings.HasPrefix(text, "BEGIN") || !strings.HasSuffix(text, "::xid::text") {
			t.Fatalf("odd transaction: %s", text)
		}
	}
	for _, a := range allAtoms {
		if s := a.draw(c, 3); s.sql == "" && a.name != atomSavepoint {
			t.Errorf("%s draws nothing", a.name)
		}
	}
	r.s.Atoms = []string{atomSavepoint}
	if a := newClient(r, 0, 1).pick(); a.name != "upsert" {
		t.Errorf("without statements %s is drawn", a.name)
	}
}

func TestReachedEndsWithTheLoad(t *testing.T) {
	r := &run{load: newLoad(10, 2)}
	r.load.committed(0, 5)
	ctx, cancel := context.WithCancel(t.Context())
	if !r.reached(ctx, 5) {
		t.Error("5 of 5 are not enough")
	}
	cancel()
	if r.reached(ctx, 6) || r.reached(ctx, 5) {
		t.Error("a fault begins after the load")
	}
}

func TestReportTellsFailure(t *testing.T) {
	r := &Result{Script: NewScript(42, sizes), Changes: 7, Faults: map[string]int{killAgent: 2, cutLink: 1}}
	if out := r.Report(); !strings.Contains(out, "seed 42: PASSED") || !strings.Contains(out, "1 cut, 2 kill-agent") {
		t.Errorf("report: %s", out)
	}
	r.Differences = []string{"x"}
	if out := r.Report(); !strings.Contains(out, "FAILED with 1 difference") {
		t.Errorf("report: %s", out)
	}
	if n, head := strings.Count(r.Row(), "|"), strings.Count(TableHead, "|"); 2*n != head {
		t.Errorf("a row has %d bars, its head %d in two lines", n, head)
	}
}
