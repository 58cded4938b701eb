package quorum

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/wal"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func cut(site string, lsn wal.LSN) Cuts { return Cuts{"app": {site: lsn}} }

func TestReceiptsAreAtMostTheOthers(t *testing.T) {
	for _, c := range []struct{ k, members, want int }{{1, 2, 1}, {1, 3, 1}, {2, 2, 1}, {2, 3, 2}, {1, 1, 0}, {3, 0, 0}, {0, 3, 0}} {
		if got := Receipts(c.k, c.members); got != c.want {
			t.Errorf("Receipts(%d, %d) = %d, want %d", c.k, c.members, got, c.want)
		}
	}
}

func TestModeComparesWithAllSites(t *testing.T) {
	r := Initial([]string{"b", "a", "c"}, "a", noon)
	for want, keep := range map[Mode][]string{Sync: {"a", "b", "c"}, Reduced: {"a", "c"}, Solo: {"b"}} {
		r.Members = keep
		if got := r.Mode([]string{"c", "b", "a"}); got != want {
			t.Errorf("members %v: %s, want %s", keep, got, want)
		}
	}
	if !r.Has(r.Members[0]) || r.Has("z") {
		t.Error("Has is wrong")
	}
}

// TestOneRoundOfTwoSites: a dies, b goes on, a comes back.
func TestOneRoundOfTwoSites(t *testing.T) {
	both := Initial([]string{"b", "a"}, "a", noon)
	solo, err := TakeOver(both, []string{"b"}, 1, cut("a", 7), Note{Reason: "agent a refused", By: "b", At: noon})
	if err != nil {
		t.Fatal(err)
	}
	want := Register{Epoch: 2, Members: []string{"b"}, Settled: true, Cuts: cut("a", 7), Reason: "agent a refused", By: "b", At: noon}
	if diff := cmp.Diff(want, solo); diff != "" {
		t.Errorf("solo (-want +got):\n%s", diff)
	}
	again, err := Rearm(solo, "a", Note{By: "b", At: noon})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Register{Epoch: 3, Members: []string{"a", "b"}, Settled: true, By: "b", At: noon}, again); diff != "" {
		t.Errorf("again (-want +got):\n%s", diff)
	}
	for _, step := range [][2]Register{{{}, both}, {both, solo}, {solo, again}} {
		if err := Check(step[0], step[1], 1); err != nil {
			t.Error(err)
		}
	}
	if lsn, ok := solo.Cut("app", "a"); lsn != 7 || !ok {
		t.Errorf("the cut of a is %s, %v", lsn, ok)
	}
}

// TestRulesForbid: each case breaks one rule and says which.
func TestRulesForbid(t *testing.T) {
	all := Initial([]string{"a", "b", "c"}, "a", noon)
	two, err := TakeOver(all, []string{"b", "c"}, 1, nil, Note{By: "b"})
	if err != nil || two.Settled {
		t.Fatalf("%+v, %v", two, err)
	}
	settled, err := Settle(two, cut("a", 9), Note{By: "b"})
	if err != nil {
		t.Fatal(err)
	}
	solo := Register{Epoch: 5, Members: []string{"a"}, Settled: true}
	n := Note{By: "b", Reason: "x"}
	for _, c := range []struct {
		name string
		call func() (Register, error)
		want string
	}{
		{"nobody kept", func() (Register, error) { return TakeOver(all, nil, 1, nil, n) }, "must keep at least one"},
		{"nobody removed", func() (Register, error) { return TakeOver(all, all.Members, 1, nil, n) }, "must leave a member out"},
		{"stranger", func() (Register, error) { return TakeOver(settled, []string{"a", "b"}, 1, nil, n) }, "cannot add site a"},
		{"two at once", func() (Register, error) { return TakeOver(all, []string{"a"}, 1, nil, n) }, "of 3 members with 1 receipt at most 1 may go"},
		{"not settled", func() (Register, error) { return TakeOver(two, []string{"b"}, 1, nil, n) }, "not settled yet"},
		{"sole member", func() (Register, error) { return TakeOver(solo, []string{"b"}, 1, nil, n) }, "cannot add site b"},
		{"cut of a member", func() (Register, error) { return TakeOver(all, []string{"a", "b"}, 1, cut("b", 1), n) }, "the cut of b in database app cannot change"},
		{"old cut", func() (Register, error) { return TakeOver(settled, []string{"b"}, 1, cut("a", 10), n) }, "the cut of a in database app cannot change"},
		{"leave: no member", func() (Register, error) { return Leave(solo, "b", 1, nil, n) }, "site b is not a member"},
		{"leave: by another", func() (Register, error) { return Leave(all, "a", 1, nil, n) }, "leaves by itself"},
		{"leave: the last", func() (Register, error) { return Leave(solo, "a", 1, nil, Note{By: "a"}) }, "must keep at least one"},
		{"settle twice", func() (Register, error) { return Settle(settled, nil, n) }, "is settled already"},
		{"settle: member's cut", func() (Register, error) { return Settle(two, cut("b", 1), n) }, "b is a member"},
		{"re-arm: unsettled", func() (Register, error) { return Rearm(two, "a", n) }, "not settled yet"},
		{"re-arm: member", func() (Register, error) { return Rearm(all, "a", n) }, "a member already"},
		{"re-arm: nobody", func() (Register, error) { return Rearm(all, "", n) }, "no site is named"},
		{"force: nobody", func() (Register, error) { return Force(all, nil, nil, n) }, "must keep at least one"},
		{"force: no name", func() (Register, error) { return Force(solo, []string{"b"}, nil, Note{By: " ", Reason: "x"}) }, "needs the name"},
		{"force: no reason", func() (Register, error) { return Force(solo, []string{"b"}, nil, Note{By: "kim"}) }, "and a reason"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := c.call()
			rule, ok := errors.AsType[*RuleError](err)
			if !ok || !strings.Contains(err.Error(), c.want) || rule.HintText() == "" || strings.HasSuffix(err.Error(), ".") {
				t.Errorf("got %v, want %q with a hint", err, c.want)
			}
		})
	}
}

func TestACutDoesNotGoBack(t *testing.T) {
	r := Register{Epoch: 3, Members: []string{"b", "c"}, Cuts: cut("a", 9)}
	if _, err := Settle(r, cut("a", 8), Note{By: "b"}); err == nil {
		t.Error("a smaller cut was taken")
	}
	next, err := Settle(r, cut("a", 10), Note{By: "b"})
	if lsn, _ := next.Cut("app", "a"); err != nil || lsn != 10 || r.Cuts["app"]["a"] != 9 {
		t.Errorf("the cut is %s, %v; the former value %v", lsn, err, r.Cuts)
	}
}

// TestAPersonMayForce past a dead sole member, and past an unsettled value; the rule reads that from the value.
func TestAPersonMayForce(t *testing.T) {
	solo := Register{Epoch: 5, Members: []string{"a"}, Settled: true, Cuts: cut("b", 3)}
	n := Note{Reason: "site a burnt down", By: "kim", At: noon}
	next, err := Force(solo, []string{"b"}, cut("a", 4), n)
	if err != nil {
		t.Fatal(err)
	}
	want := Register{Epoch: 6, Members: []string{"b"}, Settled: true, Cuts: cut("a", 4), Forced: true, Reason: n.Reason, By: n.By, At: noon}
	if diff := cmp.Diff(want, next); diff != "" {
		t.Errorf("forced (-want +got):\n%s", diff)
	}
	if err := Check(solo, next, 1); err != nil {
		t.Error(err)
	}
	after, err := Renew(next, Note{By: "b"})
	if err != nil || after.Forced || Check(next, after, 1) != nil {
		t.Errorf("after it: %+v, %v", after, err)
	}
}

// TestCheckTakesExactlyWhatTheRulesMake: what a constructor gives passes, and no longer when any field is altered.
func TestCheckTakesExactlyWhatTheRulesMake(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		sites := []string{"a", "b", "c", "d", "e"}[:rapid.IntRange(2, 5).Draw(t, "sites")]
		k := rapid.IntRange(1, 2).Draw(t, "k")
		old := Initial(sites, "a", noon)
		if err := Check(Register{}, old, k); err != nil {
			t.Fatal(err)
		}
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			x := rapid.SampledFrom(sites).Draw(t, "site")
			lsn := wal.LSN(rapid.IntRange(1, 9).Draw(t, "lsn"))
			n := Note{By: x, Reason: "r", At: noon}
			before := old.Clone()
			var next Register
			var err error
			switch rapid.IntRange(0, 5).Draw(t, "kind") {
			case 0:
				next, err = TakeOver(old, minus(old.Members, []string{x}), k, cut(x, lsn), n)
			case 1:
				next, err = Leave(old, x, k, nil, n)
			case 2:
				next, err = Settle(old, cut(x, lsn), n)
			case 3:
				next, err = Rearm(old, x, n)
			case 4:
				next, err = Renew(old, n)
			case 5:
				next, err = Force(old, []string{x}, nil, n)
			}
			if !old.Equal(before) {
				t.Fatalf("the former value was changed: %+v", old)
			}
			if err != nil {
				continue
			}
			if err := Check(old, next, k); err != nil {
				t.Fatalf("%+v -> %+v: %v", old, next, err)
			}
			for what, change := range map[string]func(*Register){
				"epoch":    func(r *Register) { r.Epoch++ },
				"no name":  func(r *Register) { r.Members = append(r.Members, "") },
				"disorder": func(r *Register) { r.Members = append(r.Members, "A") },
				"settled":  func(r *Register) { r.Settled = !r.Settled || !old.Settled },
				"cut":      func(r *Register) { r.Cuts = r.Cuts.with("other", r.Members[0], 1) },
			} {
				bad := next.Clone()
				change(&bad)
				if !bad.Equal(next) && Check(old, bad, k) == nil && !legal(old, bad) {
					t.Fatalf("%s: %+v -> %+v was taken", what, old, bad)
				}
			}
			old = next
		}
	})
}

// legal: an altered value that is another legal step. Settled turned on makes a settle of a renewal.
func legal(old, next Register) bool {
	return !old.Settled && next.Settled && len(minus(old.Members, next.Members)) == 0 && len(next.Members) == len(old.Members)
}

func TestCheckRefusesWhatNoRuleMakes(t *testing.T) {
	all := Initial([]string{"a", "b", "c"}, "a", noon)
	for name, next := range map[string]Register{
		"two back at once":    {Epoch: 2, Members: []string{"a", "b", "c", "d", "e"}, Settled: true},
		"exchange of members": {Epoch: 2, Members: []string{"a", "b", "d"}, Settled: true},
		"too many gone":       {Epoch: 2, Members: []string{"a"}, Settled: true},
		"settled too early":   {Epoch: 2, Members: []string{"a", "b"}, Settled: true},
		"no members":          {Epoch: 2, Settled: true},
		"same epoch":          all,
		"zero":                {},
	} {
		if err := Check(all, next, 1); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	first := all
	first.Settled = false
	if Check(Register{}, first, 1) == nil {
		t.Error("an unsettled first value was taken")
	}
}

func TestJSONRoundTrip(t *testing.T) {
	r := Register{Epoch: 4, Members: []string{"b"}, Settled: true, Cuts: cut("a", 0x16B374D848), Reason: "silence", By: "b", At: noon}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"epoch":4,"members":["b"],"settled":true,"cuts":{"app":{"a":"16/B374D848"}},"reason":"silence","by":"b","at":"2026-03-01T12:00:00Z"}`
	if string(b) != want {
		t.Errorf("JSON is\n%s\nwant\n%s", b, want)
	}
	var back Register
	if err := json.Unmarshal(b, &back); err != nil || !back.Equal(r) {
		t.Errorf("read back: %+v, %v", back, err)
	}
	if clone := r.Clone(); !clone.Equal(r) {
		t.Errorf("clone: %+v", clone)
	} else if clone.Cuts["app"]["a"] = 1; clone.Equal(r) {
		t.Error("the clone shares its cuts")
	}
}
