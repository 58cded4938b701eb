package demo

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var names = [2]string{"a", "b"}

// ledger makes records and two sites that agree with them: n acknowledged payments, one in doubt that is there, one in
// doubt that is not, and one rolled back.
func ledger(n int) ([]entry, [2]facts) {
	var records []entry
	sites := [2]facts{{audit: map[string]int{}}, {audit: map[string]int{}}}
	add := func(o outcome, there bool) {
		i := len(records) + 1
		e := entry{client: 1 + i%3, seq: int64(i), id: fmt.Sprintf("id-%d", i), site: names[i%2], amount: int64(1000 * i), outcome: o}
		records = append(records, e)
		for s := range sites {
			if there {
				sites[s].payments = append(sites[s].payments, payment{e.id, e.client, e.seq, e.amount})
				sites[s].audit[e.id] = 1
			}
		}
	}
	for range n {
		add(committed, true)
	}
	add(unknown, true)
	add(unknown, false)
	add(rolledBack, false)
	return records, sites
}

func TestVerdictOfALedgerThatIsRight(t *testing.T) {
	records, sites := ledger(10)
	got := judge(records, names, sites)
	sum := int64(1000 * (11 * 12 / 2)) // 1 to 11: the in-doubt one that is there counts
	want := verdict{
		acknowledged: 10, inDoubt: 2, inDoubtThere: 1, rolledBack: 1, sumClient: sum,
		sum: [2]int64{sum, sum}, payments: [2]int{11, 11},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(verdict{})); diff != "" {
		t.Errorf("verdict (-want +got):\n%s", diff)
	}
	if !got.ok() {
		t.Error("the verdict is not ok")
	}
}

// drop removes a payment's row, or its audit entry, from a site.
func drop(f *facts, i int, row, audit bool) {
	id := f.payments[i].id
	if row {
		f.payments = append(f.payments[:i:i], f.payments[i+1:]...)
	}
	if audit {
		delete(f.audit, id)
	}
}

// TestTamperedLedgerIsFound changes one thing in a ledger that is right; the verdict must say what.
func TestTamperedLedgerIsFound(t *testing.T) {
	const inDoubtThere = 10 // index of that payment
	for _, c := range []struct {
		name    string
		tamper  func(records []entry, s *[2]facts)
		want    string
		example string
	}{
		{"lost at both", func(_ []entry, s *[2]facts) { drop(&s[0], 4, true, true); drop(&s[1], 4, true, true) }, "lost 1", "absent at a"},
		{"lost at one", func(_ []entry, s *[2]facts) { drop(&s[1], 0, true, true) }, "lost 1", "absent at b"},
		{"lost audit entry", func(_ []entry, s *[2]facts) { drop(&s[0], 2, false, true) }, "lost 1", "audit entries 0"},
		{"doubled row", func(_ []entry, s *[2]facts) {
			p := s[0].payments[3]
			p.id = "another"
			s[0].payments, s[0].audit["another"] = append(s[0].payments, p), 1
		}, "doubled 1", "there 2 times"},
		{"doubled audit entry", func(_ []entry, s *[2]facts) { s[1].audit["id-3"] = 2 }, "doubled 1", "2 audit entries"},
		{"in doubt at one site", func(_ []entry, s *[2]facts) { drop(&s[1], inDoubtThere, true, true) }, "split 1", "not the same at both sites"},
		{"in doubt, half there", func(_ []entry, s *[2]facts) { drop(&s[1], inDoubtThere, false, true) }, "unexpected 1", "without its audit entry"},
		{"other amount", func(_ []entry, s *[2]facts) { s[0].payments[1].amount++ }, "unexpected 1", "instead of 2000"},
		{"nobody's payment", func(_ []entry, s *[2]facts) {
			for i := range s {
				s[i].payments, s[i].audit["x"] = append(s[i].payments, payment{"x", 9, 9, 9}), 1
			}
		}, "unexpected 1", "no client sent its COMMIT"},
		{"nobody's audit entry", func(_ []entry, s *[2]facts) { s[0].audit["x"] = 1 }, "unexpected 1", "not in the payments"},
		{"rolled back and there", func(r []entry, s *[2]facts) { r[5].outcome = rolledBack }, "unexpected 1", "rolled back and yet there"},
	} {
		t.Run(c.name, func(t *testing.T) {
			records, sites := ledger(10)
			sites[1].audit = maps.Clone(sites[1].audit)
			c.tamper(records, &sites)
			v := judge(records, names, sites)
			var got []string
			for _, n := range []struct {
				name string
				n    int
			}{{"lost", v.lost}, {"doubled", v.doubled}, {"unexpected", v.unexpected}, {"split", v.inDoubtSplit}} {
				if n.n > 0 {
					got = append(got, fmt.Sprintf("%s %d", n.name, n.n))
				}
			}
			if strings.Join(got, ", ") != c.want || v.ok() {
				t.Errorf("verdict %v (ok: %v), want %s", got, v.ok(), c.want)
			}
			if len(v.examples) == 0 || !strings.Contains(v.examples[0], c.example) {
				t.Errorf("examples %q do not say %q", v.examples, c.example)
			}
			r := Report{VerifyEqual: true, Tables: []TableCheck{{Name: "payment", Equal: true}}}
			r.take(v)
			r.conclude(true)
			if r.OK {
				t.Error("the report says that all is well")
			}
		})
	}
}

func TestReportFailsForEachReason(t *testing.T) {
	good := func() Report {
		records, sites := ledger(3)
		r := Report{VerifyEqual: true, Tables: []TableCheck{{Name: "payment", Rows: [2]int64{4, 4}, Equal: true}}}
		r.take(judge(records, names, sites))
		return r
	}
	r := good()
	r.conclude(true)
	if !r.OK || !r.Converged || !r.TablesEqual || len(r.Problems) > 0 {
		t.Fatalf("a good report is not ok: %v", r.Problems)
	}
	for name, spoil := range map[string]func(r *Report) (settled bool){
		"not settled":      func(*Report) bool { return false },
		"verify differs":   func(r *Report) bool { r.VerifyEqual = false; return true },
		"a table differs":  func(r *Report) bool { r.Tables[0].Equal = false; return true },
		"nothing compared": func(r *Report) bool { r.Tables = nil; return true },
		"nothing done":     func(r *Report) bool { r.Acknowledged = 0; return true },
		"sum at A":         func(r *Report) bool { r.SumA++; return true },
		"sum at B":         func(r *Report) bool { r.SumB--; return true },
	} {
		r := good()
		r.conclude(spoil(&r))
		if r.OK || len(r.Problems) != 1 {
			t.Errorf("%s: ok %v, problems %q", name, r.OK, r.Problems)
		}
	}
}

func TestMergeDigestsFindsEveryDifference(t *testing.T) {
	got := mergeDigests([2]map[string]digest{
		{"same": {2, "x"}, "hash": {2, "x"}, "rows": {2, "x"}, "only_a": {1, "x"}},
		{"same": {2, "x"}, "hash": {2, "y"}, "rows": {3, "x"}, "only_b": {0, "x"}},
	})
	want := []TableCheck{
		{Name: "hash", Rows: [2]int64{2, 2}, SHA256: []string{"x", "y"}},
		{Name: "only_a", Rows: [2]int64{1, -1}, SHA256: []string{"x", ""}},
		{Name: "only_b", Rows: [2]int64{-1, 0}, SHA256: []string{"", "x"}},
		{Name: "rows", Rows: [2]int64{2, 3}, SHA256: []string{"x", "x"}},
		{Name: "same", Rows: [2]int64{2, 2}, Equal: true, SHA256: []string{"x"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tables (-want +got):\n%s", diff)
	}
}
