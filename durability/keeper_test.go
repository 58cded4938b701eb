package durability

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestDecide(t *testing.T) {
	well := func(name string) Peer { return Peer{Name: name, Silent: 100 * time.Millisecond, Stable: time.Minute} }
	with := func(p Peer, change func(p *Peer)) Peer { change(&p); return p }
	two := View{
		Self: "a", Known: true, Open: true, Members: []string{"a", "b"}, Settled: true, Required: 1, Policy: DurabilityFirst, Detect: 2 * time.Second,
		Peers: []Peer{well("b")}, Rearm: 10 * time.Second,
	}
	cases := []struct {
		name   string
		change func(v *View)
		kind   Kind
		sites  string
		why    string
	}{
		{"all is well", func(*View) {}, Nothing, "", ""},
		{"after a start", func(v *View) { v.Known = false }, Read, "", ""},
		{"silence is frozen first", func(v *View) { v.Peers[0].Silent = 3 * time.Second }, Freeze, "b", "silent"},
		{"not before the time", func(v *View) { v.Peers[0].Silent = 2 * time.Second }, Nothing, "", ""},
		{"then taken over", func(v *View) { v.Peers[0].Silent, v.Frozen = 3*time.Second, []string{"b"} }, TakeOver, "b", "silent"},
		{"refused at once", func(v *View) { v.Peers[0].Refused, v.Frozen = true, []string{"b"} }, TakeOver, "b", "refuses"},
		{"cut in the other direction", func(v *View) { v.Peers[0].Deaf = 3 * time.Second }, Freeze, "b", "has not heard"},
		{"heard again", func(v *View) { v.Frozen = []string{"b"} }, Thaw, "b", ""},
		{"a silent site that is no member", func(v *View) { v.Members, v.Peers[0].Silent = []string{"a"}, time.Hour }, Nothing, "", ""},
		{"not a member itself", func(v *View) { v.Members, v.Peers[0].Silent = []string{"b"}, time.Hour }, Nothing, "", ""},
		{"a person decides", func(v *View) { v.Policy, v.Frozen, v.Peers[0].Refused = ReadOnly, []string{"b"}, true }, Blocked, "b", "person"},
		{"the other site is the preferred", func(v *View) {
			v.Policy, v.Preferred, v.Frozen, v.Peers[0].Refused = PreferredSite, "b", []string{"b"}, true
		}, Blocked, "b", "person"},
		{"this site is the preferred", func(v *View) {
			v.Policy, v.Preferred, v.Frozen, v.Peers[0].Refused = PreferredSite, "a", []string{"b"}, true
		}, TakeOver, "b", ""},
		{"the preferred one is the lost one", func(v *View) { v.Preferred, v.Frozen, v.Peers[0].Refused = "b", []string{"b"}, true }, TakeOver, "b", ""},
		{"the own server has ended", func(v *View) { v.Server = Server{Refused: true, Down: time.Millisecond} }, Leave, "a", "has ended"},
		{"it has ended, and so has the other site", func(v *View) {
			v.Server, v.Peers[0].Refused = Server{Refused: true, Down: time.Millisecond}, true
		}, Blocked, "b", "no other member"},
		{"it restarts", func(v *View) { v.Server = Server{Restarting: true, Down: time.Second} }, Nothing, "", ""},
		{"it restarts for too long", func(v *View) { v.Server = Server{Restarting: true, Down: 3 * time.Second} }, Leave, "a", ""},
		{"it cannot fsync", func(v *View) { v.Server.Stalled = 3 * time.Second }, Leave, "a", "durable write"},
		{"it cannot receive", func(v *View) { v.Server.Unable = "the copy of b's journal failed" }, Leave, "a", "cannot do its part: the copy of b's journal failed"},
		{"its disk hangs", func(v *View) { v.Server.DiskStalled = 3 * time.Second }, Blocked, "b", "not even a promise"},
		{"its disk is slow", func(v *View) { v.Server.DiskStalled = time.Second }, Nothing, "", ""},
		{"alone, with a disk that hangs", func(v *View) { v.Members, v.Server.DiskStalled = []string{"a"}, time.Hour }, Nothing, "", ""},
		{"the other one has kept what does not count", func(v *View) { v.Peers[0].Ghosts, v.Frozen = 2, []string{"b"} }, TakeOver, "b", "2 transactions of b do not count, and have to be reversed there"},
		{"the other one says that it cannot", func(v *View) { v.Peers[0].Unfit, v.Frozen = "no disk", []string{"b"} }, TakeOver, "b", "b says of itself: no disk"},
		{"neither can", func(v *View) { v.Peers[0].Unfit, v.Server.Unable = "no disk", "none here" }, Blocked, "b", "no other member"},
		{"back, and it says that it cannot", func(v *View) {
			v.Members, v.Peers[0].CaughtUp, v.Peers[0].Unfit = []string{"a"}, true, "no disk"
		}, Nothing, "", ""},
		{"before its databases are open", func(v *View) { v.Open, v.Peers[0].Refused = false, true }, Nothing, "", ""},
		{"alone, it cannot leave", func(v *View) { v.Members, v.Server = []string{"a"}, Server{Refused: true, Down: time.Hour} }, Nothing, "", ""},
		{"back, and not caught up", func(v *View) { v.Members = []string{"a"} }, Nothing, "", ""},
		{"back and caught up", func(v *View) { v.Members, v.Peers[0].CaughtUp = []string{"a"}, true }, Arm, "b", ""},
		{"back a moment ago", func(v *View) {
			v.Members, v.Peers[0].CaughtUp, v.Peers[0].Stable = []string{"a"}, true, time.Second
		}, Nothing, "", ""},
		{"armed, not passed", func(v *View) { v.Members, v.Arming, v.Peers[0].CaughtUp = []string{"a"}, []string{"b"}, true }, Nothing, "", ""},
		{"armed and passed", func(v *View) {
			v.Members, v.Arming, v.Peers[0].CaughtUp, v.Peers[0].Passed = []string{"a"}, []string{"b"}, true, true
		}, Return, "b", ""},
		{"armed and gone again", func(v *View) {
			v.Members, v.Arming, v.Peers[0].CaughtUp, v.Peers[0].Refused = []string{"a"}, []string{"b"}, true, true
		}, Disarm, "b", ""},
		{"two of three gone", func(v *View) {
			v.Members = []string{"a", "b", "c"}
			v.Peers = []Peer{{Name: "b", Refused: true}, {Name: "c", Silent: time.Hour}}
			v.Frozen = []string{"b", "c"}
		}, Blocked, "b,c", "nowhere else"},
		{"one of three gone, the other preferred", func(v *View) {
			v.Members, v.Preferred = []string{"a", "b", "c"}, "c"
			v.Peers = []Peer{{Name: "b", Refused: true}, well("c")}
			v.Frozen = []string{"b"}
		}, Nothing, "", ""},
		{"and it does not ask", func(v *View) {
			v.Members, v.Preferred = []string{"a", "b", "c"}, "c"
			v.Peers = []Peer{{Name: "b", Refused: true}, with(well("c"), func(p *Peer) { p.Frozen = []string{"b"} })}
			v.Frozen, v.FrozenFor = []string{"b"}, time.Second
		}, TakeOver, "b", ""},
		{"one of three gone, and the other one hears it", func(v *View) {
			v.Members, v.Peers, v.Frozen = []string{"a", "b", "c"}, []Peer{{Name: "b", Refused: true}, well("c")}, []string{"b"}
		}, Await, "b", "c has not given up on it"},
		{"both have frozen it", func(v *View) {
			v.Members, v.Frozen = []string{"a", "b", "c"}, []string{"b"}
			v.Peers = []Peer{{Name: "b", Refused: true}, with(well("c"), func(p *Peer) { p.Frozen = []string{"b"} })}
		}, TakeOver, "b", "refuses"},
		{"of three, heard again: the other may have relied on it", func(v *View) {
			v.Members, v.Frozen, v.Peers = []string{"a", "b", "c"}, []string{"b"}, []Peer{well("b"), well("c")}
		}, Renew, "b", "heard again"},
		{"not settled", func(v *View) {
			v.Members, v.Settled, v.Peers = []string{"a", "c"}, false, []Peer{{Name: "b", Refused: true}, well("c")}
		}, Nothing, "", ""},
		{"exchanged", func(v *View) {
			v.Members, v.Settled, v.Exchanged, v.Peers = []string{"a", "c"}, false, true, []Peer{{Name: "b", Refused: true}, well("c")}
		}, Settle, "", "hold what"},
		{"not settled, and caught up", func(v *View) {
			v.Members, v.Settled = []string{"a", "c"}, false
			v.Peers = []Peer{with(well("b"), func(p *Peer) { p.CaughtUp = true }), well("c")}
		}, Nothing, "", ""},
		{"not settled, and unfit", func(v *View) {
			v.Members, v.Settled, v.Server, v.Peers = []string{"a", "c"}, false, Server{Refused: true, Down: time.Second}, []Peer{{Name: "b"}, well("c")}
		}, Blocked, "c", "cannot leave"},
		{"exchanged, but the other member is gone since", func(v *View) {
			v.Members, v.Settled, v.Exchanged, v.Peers = []string{"a", "c"}, false, true, []Peer{{Name: "b"}, {Name: "c", Refused: true}}
		}, Freeze, "c", ""},
		{"passed here, and the other member does not wait for it yet", func(v *View) {
			v.Members, v.Arming = []string{"a", "c"}, []string{"b"}
			v.Peers = []Peer{with(well("b"), func(p *Peer) { p.CaughtUp, p.Passed = true, true }), well("c")}
		}, Nothing, "", ""},
		{"passed at both", func(v *View) {
			v.Members, v.Arming = []string{"a", "c"}, []string{"b"}
			v.Peers = []Peer{with(well("b"), func(p *Peer) { p.CaughtUp, p.Passed = true, true }), with(well("c"), func(p *Peer) { p.Armed = []string{"b"} })}
		}, Return, "b", ""},
		{"armed by two, and gone again", func(v *View) {
			v.Members, v.Arming = []string{"a", "c"}, []string{"b"}
			v.Peers = []Peer{{Name: "b", Refused: true, CaughtUp: true}, well("c")}
		}, Renew, "b", ""},
		{"before the last one is settled", func(v *View) {
			v.Members, v.Settled = []string{"a", "b"}, false
			v.Peers[0].Refused, v.Frozen = true, []string{"b"}
		}, Blocked, "b", "settled"},
	}
	for _, c := range cases {
		v := two
		v.Peers = append([]Peer{}, two.Peers...)
		c.change(&v)
		got := Decide(v)
		if d := cmp.Diff(c.kind, got.Kind); d != "" || strings.Join(got.Sites, ",") != c.sites || !strings.Contains(got.Why, c.why) {
			t.Errorf("%s: %+v, want %s of %q because of %q", c.name, got, c.kind, c.sites, c.why)
		}
	}
}

// TestNothingIsTakenOverAgainstTheRules: whatever is seen, a take-over leaves out only members, never this site, no more
// than receipts are required, all of them frozen before, and only of a settled register.
func TestNothingIsTakenOverAgainstTheRules(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		sites := []string{"a", "b", "c", "d"}
		duration := rapid.Map(rapid.IntRange(0, 60), func(n int) time.Duration { return time.Duration(n) * 100 * time.Millisecond })
		some := rapid.Map(rapid.SliceOfNDistinct(rapid.SampledFrom(sites), 0, 4, rapid.ID), func(s []string) []string { slices.Sort(s); return s })
		v := View{
			Self: "a", Known: rapid.Bool().Draw(t, "known"), Open: rapid.Bool().Draw(t, "open"), Members: some.Draw(t, "members"), Settled: rapid.Bool().Draw(t, "settled"), Exchanged: rapid.Bool().Draw(t, "exchanged"),
			Required: rapid.IntRange(1, 2).Draw(t, "required"), Policy: rapid.SampledFrom([]Policy{DurabilityFirst, PreferredSite, ReadOnly}).Draw(t, "policy"),
			Preferred: rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "preferred"), Detect: 2 * time.Second,
			Server: Server{Down: duration.Draw(t, "down"), Refused: rapid.Bool().Draw(t, "refused"), Restarting: rapid.Bool().Draw(t, "restarting"), Stalled: duration.Draw(t, "stalled"), DiskStalled: duration.Draw(t, "disk stalled")},
			Frozen: some.Draw(t, "frozen"), FrozenFor: duration.Draw(t, "frozen for"), Arming: some.Draw(t, "arming"), Rearm: duration.Draw(t, "rearm"),
		}
		for _, s := range sites[1:] {
			v.Peers = append(v.Peers, Peer{
				s, duration.Draw(t, "silent"), duration.Draw(t, "deaf"), rapid.SampledFrom([]string{"", "no disk"}).Draw(t, "unfit"), rapid.Bool().Draw(t, "refuses"), rapid.Bool().Draw(t, "caught up"),
				duration.Draw(t, "stable"), rapid.Bool().Draw(t, "passed"), some.Draw(t, "has frozen"), some.Draw(t, "has armed"), rapid.IntRange(0, 1).Draw(t, "ghosts"),
			})
		}
		a := Decide(v)
		member := slices.Contains(v.Members, "a")
		if a.Kind != Nothing && a.Kind != Read && !member {
			t.Fatalf("%+v by a site that is no member", a)
		}
		switch a.Kind {
		case TakeOver:
			for _, s := range a.Sites {
				if s == "a" || !slices.Contains(v.Members, s) || !slices.Contains(v.Frozen, s) {
					t.Fatalf("%+v: %s is this site, no member, or not frozen", a, s)
				}
			}
			if !v.Known || !v.Open || !v.Settled || len(a.Sites) > min(v.Required, len(v.Members)-1) || v.Policy == ReadOnly {
				t.Fatalf("%+v is against the rules", a)
			}
			for _, p := range v.Peers {
				if slices.Contains(v.Members, p.Name) && !slices.Contains(a.Sites, p.Name) && len(without(a.Sites, p.Frozen)) > 0 {
					t.Fatalf("%+v: %s stays, and has frozen only %v", a, p.Name, p.Frozen)
				}
			}
		case Thaw:
			if len(v.Members) > 2 {
				t.Fatalf("%+v: a member may have relied on it", a)
			}
		case Disarm:
			if len(v.Members) > 1 {
				t.Fatalf("%+v: a member may have relied on it", a)
			}
		case Settle:
			if v.Settled || !v.Exchanged {
				t.Fatalf("%+v: settled already, or not exchanged", a)
			}
		case Leave:
			if len(v.Members) < 2 || !v.Settled {
				t.Fatalf("%+v leaves nobody, or an unsettled register", a)
			}
		case Return:
			if slices.Contains(v.Members, a.Sites[0]) || !slices.Contains(v.Arming, a.Sites[0]) {
				t.Fatalf("%+v: it is a member, or was not armed", a)
			}
			for _, p := range v.Peers {
				switch {
				case slices.Contains(v.Members, p.Name) && !slices.Contains(p.Armed, a.Sites[0]):
					t.Fatalf("%+v: member %s does not wait for it", a, p.Name)
				case p.Name == a.Sites[0] && (!p.Passed || !p.CaughtUp):
					t.Fatalf("%+v: it lacks something", a)
				}
			}
			if !v.Settled {
				t.Fatalf("%+v of a register that is not settled", a)
			}
		}
	})
}

func without(all, some []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(some, s) })
}
