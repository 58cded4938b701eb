package server

import (
	"maps"
	"math"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/parity"
	"github.com/duri-io/duri/wal"
)

// abcd are four sites.
var abcd = func() (all []*siteLink) {
	for _, name := range []string{"a", "b", "c", "d"} {
		all = append(all, &siteLink{target: gateway.Target{Site: name}})
	}
	return all
}()

func TestSessionsAreDrawnByWeight(t *testing.T) {
	for _, weights := range []map[string]int{{"a": 1, "b": 3}, {"a": 1}, {"a": 0, "b": 1}, {"a": 5, "b": 3, "c": 2}, {"a": 1, "b": 1}} {
		total, n, got, even := 0, 20_000, map[string]int{}, map[string]int{}
		for _, w := range weights {
			total += w
		}
		for key := range uint64(n) {
			got[drawn(abcd, weights, key)]++
			even[drawn(abcd, weights, 2*key)]++ // every other connection is a monitor's
		}
		for site, w := range weights {
			want := float64(n*w) / float64(total)
			for _, g := range []int{got[site], even[site]} {
				if math.Abs(float64(g)-want) > 0.03*float64(n) {
					t.Errorf("%v: %s has %d of %d sessions, want about %.0f", weights, site, g, n, want)
				}
			}
		}
	}
	if drawn(abcd, nil, 7) != "" || drawn(abcd, map[string]int{"a": 0}, 7) != "" {
		t.Error("drawn from nothing")
	}
	rapid.Check(t, func(t *rapid.T) {
		weights := rapid.MapOf(rapid.SampledFrom([]string{"a", "b", "c", "d"}), rapid.IntRange(0, 9)).Draw(t, "weights")
		key := rapid.Uint64().Draw(t, "key")
		site := drawn(abcd, weights, key)
		if site != drawn(abcd, maps.Clone(weights), key) {
			t.Fatal("another site for the same session")
		}
		sum := 0
		for _, w := range weights {
			sum += w
		}
		if (sum > 0) != (site != "") || site != "" && weights[site] == 0 {
			t.Fatalf("%q of %v", site, weights)
		}
	})
}

// reader is a site that serves reads of app: by its flags (see site), and how far it is behind others; "?" is not known.
func reader(name, flags, lags string, now time.Time) siteView {
	v := site(name, flags, 1)
	v.told = now
	d := link.DatabaseState{Database: "app"}
	for l := range strings.FieldsSeq(lags) {
		from, lag, _ := strings.Cut(l, ":")
		of, err := time.ParseDuration(lag)
		d.Lags = append(d.Lags, link.SiteLag{Site: from, Known: err == nil, Lag: of})
	}
	v.state.Databases = []link.DatabaseState{d}
	return v
}

func TestWhoMayServeReads(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		name, flags, lags, database string
		members                     []string
		told                        time.Duration // ago
		want                        string
	}{
		{"all is well", "hsx", "a:0s", "app", nil, 0, ""},
		{"with a register", "hsx", "a:0s", "app", []string{"a", "b"}, 0, ""},
		{"a little behind", "hsx", "a:900ms", "app", nil, 0, ""},
		{"too far behind", "hsx", "a:1100ms", "app", nil, 0, "1.1s behind"},
		{"what it told has grown", "hsx", "a:900ms", "app", nil, 300 * time.Millisecond, "1.2s behind"},
		{"nothing was behind when it told, or news would have come", "hsx", "a:0s", "app", nil, 2 * time.Second, ""},
		{"behind another than the home", "hsx", "a:0s c:2s", "app", nil, 0, "2s behind"},
		{"behind one that is left out", "hsx", "a:0s c:2s", "app", []string{"a", "b"}, 0, ""},
		{"it is not known how far", "hsx", "a:?", "app", nil, 0, "not known"},
		{"of one that is left out it is not known", "hsx", "a:0s c:?", "app", []string{"a", "b"}, 0, ""},
		{"a database that is not replicated", "hsx", "a:0s", "other", nil, 0, "not known"},
		{"it is not heard", "sx", "a:0s", "app", nil, 0, "does not answer"},
		{"it refuses", "hx", "a:0s", "app", nil, 0, "a test"},
		{"it is drained", "hsdx", "a:0s", "app", nil, 0, "drained"},
		{"it has just come back", "hs", "a:0s", "app", nil, 0, "just come back"},
		{"it is left out", "hsx", "a:0s", "app", []string{"a"}, 0, "leaves it out"},
	} {
		v := reader("b", c.flags, c.lags, now.Add(-c.told))
		p := &picture{sites: []siteView{site("a", "hsx", 1), v}, members: c.members}
		if got := p.unfitForReads(&v, c.database, time.Second, now); (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// knowing are sites that know this picture, and have been compared.
func knowing(cfg config.Gateway, found []parity.Finding, views ...siteView) *sites {
	s := &sites{cfg: cfg, home: views[0].name, retire: func(string) {}}
	compared := map[string]bool{}
	for _, v := range views {
		s.links = append(s.links, &siteLink{target: gateway.Target{Site: v.name, Network: "duri", Address: v.name}})
		compared[v.name] = true
	}
	s.seen.Store(&picture{sites: views})
	s.like.found.Store(&found)
	s.like.compared.Store(&compared)
	return s
}

func TestReadsGoWhereTheyAreDrawn(t *testing.T) {
	now := time.Now()
	l := &gateway.Login{Database: "app", User: "web"}
	cfg := config.Gateway{
		Reads:  config.Reads{Weights: map[string]int{"b": 1}, LagMax: config.Second, WaitMax: 50 * config.Millisecond},
		Routes: []config.Route{{Role: "till", Site: "a", Reads: config.Reads{Weights: map[string]int{"a": 1}}}, {Role: "far", Site: "b"}},
	}
	differs := func(g parity.Grade, role string, sites ...string) []parity.Finding {
		return []parity.Finding{{Grade: g, Database: "app", Role: role, Sites: [2]string(sites), Line: "a line"}}
	}
	well := reader("b", "hsx", "a:10ms", now)
	for _, c := range []struct {
		name  string
		found []parity.Finding
		b     siteView
		user  string
		last  string
		want  bool
	}{
		{"all is well", nil, well, "web", "a", true},
		{"a new session", nil, well, "web", "", true},
		{"the home is the only weight", nil, well, "till", "a", false},
		{"the site is the home", nil, well, "far", "", false},
		{"the session is at the site", nil, well, "web", "b", false},
		{"the site lags", nil, reader("b", "hsx", "a:5s", now), "web", "a", false},
		{"a warning", differs(parity.Warning, "", "a", "b"), well, "web", "a", true},
		{"something differs", differs(parity.BlocksAll, "", "a", "b"), well, "web", "a", false},
		{"types differ, none of which it has met", differs(parity.BlocksTypes, "", "a", "b"), well, "web", "a", false},
		{"of another role", differs(parity.BlocksRole, "other", "a", "b"), well, "web", "a", true},
		{"of its role", differs(parity.BlocksRole, "web", "a", "b"), well, "web", "a", false},
		{"between other sites", differs(parity.BlocksAll, "", "a", "c"), well, "web", "a", true},
	} {
		s := knowing(cfg, c.found, site("a", "hsx", 1), c.b)
		l.User = c.user
		got, wait, ok := s.ReadAt(l, gateway.Wish{Last: c.last}, 1)
		if ok != c.want || ok && (got.Site != "b" || wait != 50*time.Millisecond) {
			t.Errorf("%s: %+v, %v, %t", c.name, got, wait, ok)
		}
	}
	s := knowing(cfg, nil, site("a", "hsx", 1), reader("b", "hsx", "a:2s", now))
	l.User = "web"
	if r := s.ReadSites(l); len(r) != 1 || r[0].Site != "b" || r[0].Weight != 1 || *r[0].LagS < 2 || !strings.Contains(r[0].Problem, "behind") {
		t.Errorf("%+v", r)
	}
	s.like.compared.Store(&map[string]bool{"a": true})
	if _, _, ok := s.ReadAt(l, gateway.Wish{}, 1); ok {
		t.Error("read at a site that was not compared yet")
	}
}

func TestWhoIsDelayed(t *testing.T) {
	cfg := config.Gateway{SlowDown: config.SlowDown{From: 64 * config.MiB, To: 128 * config.MiB, Most: 100 * config.Millisecond}}
	behindBy := func(name string, backlog config.Size) siteView {
		v := site(name, "hsx", 1)
		v.state.Databases = []link.DatabaseState{{Database: "app", Backlog: backlog.Bytes()}}
		return v
	}
	silent := behindBy("a", config.GiB)
	silent.heard = false
	for _, c := range []struct {
		name         string
		a, b         siteView
		database, at string
		last         string
		want         time.Duration
	}{
		{"nobody is behind", behindBy("a", 0), behindBy("b", 0), "app", "", "", 0},
		{"at home", behindBy("a", 96*config.MiB), behindBy("b", 0), "app", "", "", 50 * time.Millisecond},
		{"in a block there", behindBy("a", 96*config.MiB), behindBy("b", 0), "app", "a", "a", 50 * time.Millisecond},
		{"in a block elsewhere", behindBy("a", 96*config.MiB), behindBy("b", 0), "app", "b", "b", 0},
		{"the other site's backlog is not of its home", behindBy("a", 0), behindBy("b", config.GiB), "app", "", "a", 0},
		{"in another database", behindBy("a", config.GiB), behindBy("b", 0), "other", "", "", 0},
		{"the home is not heard", silent, behindBy("b", 0), "app", "", "", 0},
		{"no more than the most", behindBy("a", config.GiB), behindBy("b", 0), "app", "", "", 100 * time.Millisecond},
	} {
		s := knowing(cfg, nil, c.a, c.b)
		if got := s.Delay(&gateway.Login{Database: c.database}, gateway.Wish{Last: c.last}, c.at); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// TestLagOfAPeer follows what one site hears and applies of another.
func TestLagOfAPeer(t *testing.T) {
	begun := time.Now()
	var m lagMeter
	at := begun.Add
	note := func(after, heard time.Duration, end, applied wal.LSN) { m.note(at(after), at(heard), end, applied) }
	want := func(what string, after, lag time.Duration, known bool) {
		t.Helper()
		if got, ok := m.lag(at(after)); got != lag || ok != known {
			t.Errorf("%s: %v, %t; want %v, %t", what, got, ok, lag, known)
		}
	}
	s, ms := time.Second, time.Millisecond
	want("nothing was heard", 0, 0, false)
	m.note(begun, time.Time{}, 0, 0)
	want("still nothing", 0, 0, false)
	note(0, 0, 100, 50)
	want("what was there before is of unknown age", 0, 0, false)
	note(200*ms, 0, 200, 90)
	want("and not applied yet", 200*ms, 0, false)
	note(400*ms, 400*ms, 200, 100)
	want("it is, and what came then is not", 500*ms, 300*ms, true)
	note(600*ms, 400*ms, 200, 200)
	want("all is applied", 700*ms, 0, true)
	note(900*ms, 900*ms, 300, 200)
	note(1200*ms, 900*ms, 400, 200)
	want("the oldest counts", 1300*ms, 400*ms, true)
	note(1300*ms, 1300*ms, 400, 300)
	want("part of it is applied", 1400*ms, 200*ms, true)
	note(1500*ms, 1300*ms, 400, 400)
	want("silence of a moment", 1800*ms, 0, true)
	want("silence", 1300*ms+3*s, 3*s, true)
	note(5*s, 5*s, 500, 400)
	want("what was written in the silence is as old as that", 5100*ms, 3800*ms, true)
	note(5200*ms, 5*s, 500, 500)
	want("caught up", 5300*ms, 0, true)

	m = lagMeter{}
	note(0, 0, 100, 100)
	want("nothing was behind from the beginning", 0, 0, true)
}

// TestLagIsNeverToldTooSmall: whatever comes and is applied when, nothing that is not applied is older than the lag that is told, by
// what was heard; and without anything to apply there is none.
func TestLagIsNeverToldTooSmall(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var m lagMeter
		now := time.Now()
		type heard struct {
			end wal.LSN
			at  time.Time
		}
		var all []heard
		end, applied := wal.LSN(100), wal.LSN(100)
		m.note(now, now, end, applied)
		for range rapid.IntRange(1, 800).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(1, 400).Draw(t, "ms")) * time.Millisecond)
			if n := rapid.IntRange(0, 3).Draw(t, "more"); n > 0 {
				end += wal.LSN(n)
				all = append(all, heard{end, now})
			}
			applied += wal.LSN(rapid.Uint64Range(0, uint64(end-applied)).Draw(t, "applied"))
			m.note(now, now, end, applied)
			lag, known := m.lag(now)
			oldest := time.Duration(0)
			for _, h := range all {
				if h.end > applied {
					oldest = now.Sub(h.at)
					break
				}
			}
			if !known || lag < oldest || applied == end && lag != 0 {
				t.Fatalf("%v (%t), and what is not applied was heard of %v ago", lag, known, oldest)
			}
			if len(m.pending) > pendingMax {
				t.Fatalf("remembers %d", len(m.pending))
			}
		}
	})
}

func TestBacklogOfAPeer(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	for _, c := range []struct {
		name         string
		applied      wal.LSN
		moved, heard time.Duration
		lacks        bool
		leftOut      bool
		want         int64
	}{
		{"it is behind", 100, time.Second, time.Second, false, false, 900},
		{"it has all", 1000, time.Second, time.Second, false, false, 0},
		{"it has more than is known here", 1100, time.Second, time.Second, false, false, 0},
		{"it makes no progress", 100, 11 * time.Second, time.Second, false, false, 0},
		{"it is not connected", 100, time.Second, 4 * time.Second, false, false, 0},
		{"nothing is known yet", 0, time.Second, time.Second, false, false, 0},
		{"it re-synchronises", 100, time.Second, time.Second, true, false, 0},
		{"the register leaves it out", 100, time.Second, time.Second, false, true, 0},
	} {
		p := &peer{n: &node{}, site: config.Site{Name: "b"}, ack: link.Ack{Applied: c.applied}, movedAt: ago(c.moved)}
		if c.lacks {
			p.lacking.Store(&catalog.Gap{})
		}
		if c.leftOut {
			p.n.keeper = &keeper{began: now}
			p.n.keeper.reg.Members = []string{"a"}
		}
		if got := p.backlog(now, 1000, ago(c.heard)); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
	p := &peer{n: &node{}, site: config.Site{Name: "b"}}
	p.acknowledged(link.Ack{Received: 5, Durable: 5})
	if !p.movedAt.IsZero() {
		t.Error("what is only received is no progress of apply")
	}
	if p.acknowledged(link.Ack{Received: 5, Durable: 5, Applied: 1}); time.Since(p.movedAt) > time.Minute {
		t.Error("progress was not noticed")
	}
}

// TestStatesAreToldWhenTheyDiffer: not for each millisecond and byte.
func TestStatesAreToldWhenTheyDiffer(t *testing.T) {
	state := func(lag time.Duration, known bool, backlog config.Size) []link.DatabaseState {
		return []link.DatabaseState{{Database: "app", Lags: []link.SiteLag{{Site: "b", Known: known, Lag: lag}}, Backlog: backlog.Bytes()}}
	}
	ms := time.Millisecond
	for i, c := range []struct {
		a, b []link.DatabaseState
		want bool
	}{
		{state(0, true, 0), state(49*ms, true, config.MiB-1), true},
		{state(0, true, 0), state(50*ms, true, 0), false},
		{state(60*ms, true, 0), state(90*ms, true, 0), true},
		{state(200*ms, true, 0), state(390*ms, true, 0), true},
		{state(200*ms, true, 0), state(400*ms, true, 0), false},
		{state(0, true, 0), state(0, false, 0), false},
		{state(0, true, 70*config.MiB), state(0, true, 120*config.MiB), true},
		{state(0, true, 70*config.MiB), state(0, true, 140*config.MiB), false},
		{state(0, true, 0), nil, false},
	} {
		if got := sameState(link.SiteState{Databases: c.a}, link.SiteState{Databases: c.b}); got != c.want {
			t.Errorf("%d: %t", i, got)
		}
	}
}
