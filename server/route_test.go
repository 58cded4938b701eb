package server

import (
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/duri-io/duri/link"
)

// site makes a view by a few letters: h heard, s serves, d draining, x settled; then the epoch that it knows.
func site(name, flags string, epoch uint64) siteView {
	has := func(f string) bool { return strings.Contains(flags, f) }
	v := siteView{name: name, heard: has("h"), settled: has("x"), state: link.SiteState{Draining: has("d"), Epoch: epoch, Postgres: true}}
	if !has("s") {
		v.state.Refuses = "a test"
	}
	return v
}

func TestChoose(t *testing.T) {
	both := []string{"a", "b"}
	for _, c := range []struct {
		name       string
		sites      []siteView
		members    []string
		home, last string
		next       bool
		want       string
	}{
		{"home serves", []siteView{site("a", "hsx", 1), site("b", "hsx", 1)}, both, "b", "a", false, "b"},
		{"without a home where it is", []siteView{site("a", "hsx", 1), site("b", "hsx", 1)}, both, "", "b", false, "b"},
		{"without a home and a last one the first", []siteView{site("a", "hsx", 1), site("b", "hsx", 1)}, both, "", "", false, "a"},
		{"home is not heard", []siteView{site("a", "sx", 1), site("b", "hsx", 1)}, both, "a", "a", false, "b"},
		{"home refuses", []siteView{site("a", "h", 1), site("b", "hsx", 1)}, both, "a", "a", false, "b"},
		{"home is drained", []siteView{site("a", "hsd", 1), site("b", "hsx", 1)}, both, "a", "a", false, "b"},
		{"home is drained, and the other does not serve", []siteView{site("a", "hsd", 1), site("b", "h", 1)}, both, "a", "a", false, "a"},
		{"home is left out and does not know it", []siteView{site("a", "hsx", 1), site("b", "hsx", 2)}, []string{"b"}, "a", "a", false, "b"},
		{"home has just come back", []siteView{site("a", "hs", 3), site("b", "hsx", 3)}, both, "a", "b", false, "b"},
		{"home has just come back, for a new session", []siteView{site("a", "hs", 3), site("b", "hsx", 3)}, both, "a", "", false, "b"},
		{"home has just come back, and the session is there", []siteView{site("a", "hs", 3), site("b", "hsx", 3)}, both, "a", "a", false, "a"},
		{"home has been back for long enough", []siteView{site("a", "hsx", 3), site("b", "hsx", 3)}, both, "a", "b", false, "a"},
		{"nobody has been there for long", []siteView{site("b", "hs", 1), site("a", "hs", 1)}, both, "a", "", false, "a"},
		{"rather stays than jumps to a later epoch", []siteView{site("a", "h", 1), site("b", "hsx", 1), site("c", "hsx", 2)}, []string{"b", "c"}, "a", "b", false, "b"},
		{"of several the one with the latest epoch", []siteView{site("a", "h", 1), site("b", "hsx", 1), site("c", "hsx", 2)}, []string{"b", "c"}, "a", "a", false, "c"},
		{"an unknown home", []siteView{site("a", "hsx", 1), site("b", "hsx", 1)}, both, "z", "", false, "a"},
		{"nobody serves", []siteView{site("a", "h", 1), site("b", "sx", 1)}, both, "a", "b", false, ""},
		{"without a register", []siteView{site("a", "hsx", 0), site("b", "hsx", 0)}, nil, "b", "", false, "b"},
		{"the next one", []siteView{site("a", "hsx", 1), site("b", "hsx", 1)}, both, "a", "a", true, "b"},
		{"the next one, round about", []siteView{site("a", "hsx", 1), site("b", "hsx", 1)}, both, "a", "b", true, "a"},
		{"the next one passes over those that do not serve", []siteView{site("a", "hsx", 1), site("b", "h", 1), site("c", "hsx", 1)}, []string{"a", "b", "c"}, "", "a", true, "c"},
		{"there is no next one", []siteView{site("a", "hsx", 1), site("b", "h", 1)}, both, "", "a", true, "a"},
	} {
		p := &picture{sites: c.sites, members: c.members}
		got := ""
		if v := p.choose(asked{home: c.home, last: c.last, next: c.next}); v != nil {
			got = v.name
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// TestChooseNeverServesWhoMustNot: whatever the sites are like, a site that is not heard, refuses, is shut here, or is left out is not
// chosen; and one is chosen whenever there is one.
func TestChooseNeverServesWhoMustNot(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		names := []string{"a", "b", "c"}
		p := &picture{}
		if rapid.Bool().Draw(t, "register") {
			p.members = rapid.SliceOfDistinct(rapid.SampledFrom(names), rapid.ID).Draw(t, "members")
		}
		for _, n := range names {
			flags := ""
			for _, f := range []string{"h", "s", "d", "x"} {
				if rapid.Bool().Draw(t, n+f) {
					flags += f
				}
			}
			p.sites = append(p.sites, site(n, flags, rapid.Uint64Range(0, 3).Draw(t, n+" epoch")))
		}
		shut := rapid.SampledFrom(append(names, "")).Draw(t, "shut")
		a := asked{
			home: rapid.SampledFrom(append(names, "")).Draw(t, "home"), last: rapid.SampledFrom(append(names, "")).Draw(t, "last"),
			next: rapid.Bool().Draw(t, "next"), shut: func(site string) bool { return site == shut },
		}
		may := func(v *siteView) bool {
			return v.heard && v.state.Refuses == "" && v.name != shut && (p.members == nil || slices.Contains(p.members, v.name))
		}
		v := p.choose(a)
		if v == nil {
			for i := range p.sites {
				if may(&p.sites[i]) {
					t.Fatalf("nobody was chosen, and %s may serve", p.sites[i].name)
				}
			}
			return
		}
		if !may(v) {
			t.Fatalf("%s was chosen, which must not serve", v.name)
		}
		for i := range p.sites {
			if o := &p.sites[i]; v.state.Draining && may(o) && !o.state.Draining {
				t.Fatalf("%s was chosen, which is drained, and %s is not", v.name, o.name)
			}
		}
	})
}

// TestHomeIsGoneBackToWhenItHasSettled follows one site through its life.
func TestHomeIsGoneBackToWhenItHasSettled(t *testing.T) {
	begun := time.Now()
	v := siteView{name: "a", fresh: true, born: begun}
	members := []string{"a", "b"}
	at := func(after time.Duration, heard bool, change func(*link.SiteState)) {
		t.Helper()
		was := v.good(members)
		v.heard, v.state = heard, link.SiteState{Postgres: true, CaughtUp: true}
		if change != nil {
			change(&v.state)
		}
		v.look(was, members, begun.Add(after))
	}
	want := func(what string, settled bool, away uint64) {
		t.Helper()
		if v.settled != settled || v.away != away {
			t.Errorf("%s: settled %t, away %d; want %t, %d", what, v.settled, v.away, settled, away)
		}
	}
	behind := func(s *link.SiteState) { s.CaughtUp = false }
	drained := func(s *link.SiteState) { s.Draining = true }
	refuses := func(s *link.SiteState) { s.Refuses = "a test" }

	at(0, true, behind)
	want("a site that is there from the beginning", true, 0)
	at(time.Minute, false, nil)
	want("lost", false, 1)
	at(61*time.Second, true, nil)
	want("just back", false, 1)
	at(62*time.Second, true, nil)
	want("a second later", false, 1)
	at(64*time.Second, true, behind)
	want("long enough, but behind", false, 1)
	at(65*time.Second, true, nil)
	want("and caught up", true, 1)
	at(66*time.Second, true, behind)
	want("what it has got it keeps", true, 1)
	at(70*time.Second, true, refuses)
	want("refuses", false, 2)
	at(71*time.Second, true, nil)
	at(74*time.Second, true, nil)
	want("with a second loss within ten minutes it takes twice as long", false, 2)
	at(75*time.Second, true, nil)
	want("which has passed", true, 2)
	at(80*time.Second, true, drained)
	want("drained: no loss", false, 2)
	at(90*time.Second, true, nil)
	want("back from a drain: at once", true, 2)
	at(100*time.Second, true, drained)
	at(101*time.Second, false, nil)
	at(102*time.Second, true, nil)
	want("back from a drain in which it was lost", false, 2)

	v = siteView{name: "a", fresh: true, born: begun}
	at(time.Minute, false, nil)
	at(2*time.Minute, true, nil)
	want("first heard long after the beginning", false, 0)
}

func TestTheEpochOfConnections(t *testing.T) {
	v := &siteView{away: 4}
	if e := (&picture{}).epochOf(v); e != 5 {
		t.Errorf("without a register: %d", e)
	}
	if e := (&picture{epoch: 7}).epochOf(v); e != 7 {
		t.Errorf("with one: %d", e)
	}
}

// TestWhoCannotBeMovedLeaves: only where another site would take those who come back.
func TestWhoCannotBeMovedLeaves(t *testing.T) {
	for _, c := range []struct {
		a, b    string
		members []string
		want    bool
	}{
		{"hsd", "hs", nil, true},
		{"hsd", "", nil, false},                // the other is away
		{"hsd", "h", nil, false},               // it refuses
		{"hsd", "hsd", nil, false},             // both are drained
		{"hsd", "hs", []string{"a"}, false},    // the register leaves it out
		{"hs", "hs", nil, false},               // not drained
		{"sd", "hs", nil, false},               // not heard any more
		{"hd", "hs", []string{"a", "b"}, true}, // it may refuse clients besides
	} {
		a, b := site("a", c.a, 1), site("b", c.b, 1)
		a.state.Leave = true
		p := &picture{sites: []siteView{a, b}, members: c.members}
		if got := p.asksToLeave(&p.sites[0]); got != c.want {
			t.Errorf("%+v: %t", c, got)
		}
		if p.sites[0].state.Leave = false; p.asksToLeave(&p.sites[0]) {
			t.Errorf("%+v: before the time", c)
		}
		if got := p.drains("a"); got != (strings.Contains(c.a, "h") && strings.Contains(c.a, "d")) {
			t.Errorf("%+v: drains %t", c, got)
		}
	}
}
