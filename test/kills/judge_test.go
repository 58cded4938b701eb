package kills

import (
	"strings"
	"testing"
)

func TestJudge(t *testing.T) {
	at := func(o outcome) attempt { return attempt{site: "a", client: "1", seq: 1, outcome: o} }
	there := content{map[string]bool{"a/1/1": true}, map[string]int{"a/1/1": 1}, "x"}
	absent := content{map[string]bool{}, map[string]int{}, ""}
	twice := content{map[string]bool{"a/1/1": true}, map[string]int{"a/1/1": 2}, "x"}
	half := content{map[string]bool{"a/1/1": true}, map[string]int{}, "x"}
	for _, c := range []struct {
		name  string
		told  outcome
		sites []content
		want  string
	}{
		{"acknowledged and there", acked, []content{there, there}, ""},
		{"acknowledged and lost", acked, []content{absent, absent}, "is lost"},
		{"acknowledged and lost at one site", acked, []content{there, absent}, "is lost"},
		{"not known, and there", unknown, []content{there, there}, ""},
		{"not known, and absent", unknown, []content{absent, absent}, ""},
		{"not known, and only here", unknown, []content{there, absent}, "differs"},
		{"refused and there", refused, []content{there, there}, "was refused"},
		{"twice", acked, []content{twice, twice}, "2 times"},
		{"half", acked, []content{half, half}, "half"},
	} {
		got := strings.Join(judge([]attempt{at(c.told)}, []string{"a", "b"}, c.sites), "\n")
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	if got := judge(nil, []string{"a"}, []content{there}); len(got) != 1 || !strings.Contains(got[0], "never written") {
		t.Errorf("a row from nowhere: %q", got)
	}
}
