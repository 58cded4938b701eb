package pair

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/server"
	"github.com/duri-io/duri/wal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// configured makes the files of sites that have no servers.
func configured(t *testing.T, o Options) *Pair {
	t.Helper()
	o.Clusters = make([]*pgcluster.Cluster, len(o.Names))
	p, err := Start(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(p.dir); !os.IsNotExist(err) {
			t.Errorf("the sites' folder is still there: %v", err)
		}
	})
	return p
}

// addresses reads from a site's file where it would connect to, by site, and where it listens (under its own name).
func addresses(t *testing.T, s *Site) map[string]string {
	t.Helper()
	b, err := os.ReadFile(s.ConfigFile)
	if err != nil {
		t.Fatal(err)
	}
	c, err := config.Parse(s.ConfigFile, b)
	if err != nil {
		t.Fatal(err)
	}
	at := map[string]string{}
	for _, site := range c.Sites {
		at[site.Name] = site.Address
	}
	if at[s.Name] != c.Listen {
		t.Errorf("site %s has the address %s and listens on %s", s.Name, at[s.Name], c.Listen)
	}
	return at
}

func TestEachDirectedPairOfThreeSitesHasItsOwnRelay(t *testing.T) {
	p := configured(t, Options{Names: []string{"a", "b", "c"}, Relays: true})
	seen := map[string]string{}
	for _, from := range p.Sites {
		at := addresses(t, from)
		for _, to := range p.Sites {
			link := p.Link(from.Name, to.Name)
			if from == to {
				if link != nil {
					t.Errorf("site %s reaches itself through a relay", to.Name)
				}
				continue
			}
			if link == nil || at[to.Name] != link.Addr() {
				t.Fatalf("site %s reaches %s at %s, not at the relay %v", from.Name, to.Name, at[to.Name], link)
			}
			name := from.Name + "->" + to.Name
			if other, ok := seen[link.Addr()]; ok {
				t.Errorf("%s and %s share a relay", name, other)
			}
			seen[link.Addr()] = name
		}
	}
	if len(seen) != 6 {
		t.Errorf("%d relays between three sites, want 6", len(seen))
	}
	if p.Link("a", "nowhere") != nil {
		t.Error("there is a link to a site that does not exist")
	}
}

func TestWithoutRelaysAllSitesKnowTheSameAddresses(t *testing.T) {
	p := configured(t, Options{Names: []string{"x", "y", "z", "w"}})
	want := addresses(t, p.Sites[0])
	for _, s := range p.Sites[1:] {
		if diff := cmp.Diff(want, addresses(t, s)); diff != "" {
			t.Errorf("site %s knows other addresses:\n%s", s.Name, diff)
		}
	}
}

func TestConfigIsChangedForEachSiteAfterItsAddresses(t *testing.T) {
	p := configured(t, Options{Names: []string{"a", "b"}, Relays: true, Config: func(site, text string) string {
		return text + "# of " + site + "\n"
	}})
	for _, s := range p.Sites {
		b, err := os.ReadFile(s.ConfigFile)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(string(b), "# of "+s.Name+"\n") {
			t.Errorf("site %s: its file was not changed", s.Name)
		}
	}
}

func TestOneSiteIsNoPair(t *testing.T) {
	for _, o := range []Options{
		{Names: []string{"a"}},
		{Names: []string{"a", "b"}, Clusters: make([]*pgcluster.Cluster, 3)},
	} {
		if p, err := Start(t.Context(), o); err == nil {
			t.Errorf("%v with %d clusters was started", o.Names, len(o.Clusters))
			_ = p.Close()
		}
	}
}

// link makes the status of a direction that works.
func link(from string, applied wal.LSN) server.LinkStatus {
	l := server.LinkStatus{From: from, Health: server.HealthOK}
	l.Received.End, l.Apply.Applied = applied, applied
	return l
}

func TestReadyMeansAllOtherSitesAreHeard(t *testing.T) {
	p := &Pair{Sites: []*Site{{Name: "a"}, {Name: "b"}, {Name: "c"}}}
	down := link("c", 5)
	down.Health = server.HealthDown
	for _, c := range []struct {
		name  string
		state string
		links []server.LinkStatus
		want  bool
	}{
		{"both", "ready", []server.LinkStatus{link("b", 5), link("c", 5)}, true},
		{"one is missing", "ready", []server.LinkStatus{link("b", 5)}, false},
		{"one is down", "ready", []server.LinkStatus{link("b", 5), down}, false},
		{"one has sent nothing", "ready", []server.LinkStatus{link("b", 5), link("c", 0)}, false},
		{"not joined", "copying", []server.LinkStatus{link("b", 5), link("c", 5)}, false},
	} {
		if got := p.streams(server.DatabaseStatus{State: c.state, Links: c.links}); got != c.want {
			t.Errorf("%s: ready is %v", c.name, got)
		}
	}
}

func TestAppliedMeansTheMarksOfAllOtherSites(t *testing.T) {
	marks := map[string]wal.LSN{"a": 10, "b": 20, "c": 30}
	for _, c := range []struct {
		name  string
		links []server.LinkStatus
		want  string
	}{
		{"all, the own mark does not count", []server.LinkStatus{link("b", 20), link("c", 31)}, ""},
		{"one is behind", []server.LinkStatus{link("b", 20), link("c", 29)}, "c"},
		{"one is not linked", []server.LinkStatus{link("c", 30)}, "b"},
	} {
		if got := lacks(c.links, "a", marks); got != c.want {
			t.Errorf("%s: lacks %q, want %q", c.name, got, c.want)
		}
	}
}

func TestPgbenchCountsAreRead(t *testing.T) {
	const out = "number of transactions actually processed: 1234\nnumber of failed transactions: 5 (0.004%)\n"
	if n, gaveUp := PgbenchCounts(out); n != 1234 || gaveUp != 5 {
		t.Errorf("%d committed and %d given up, want 1234 and 5", n, gaveUp)
	}
	if n, gaveUp := PgbenchCounts("creating tables..."); n != 0 || gaveUp != 0 {
		t.Errorf("%d committed and %d given up out of nothing", n, gaveUp)
	}
}

func TestTheMajorIsReadFromTheVersion(t *testing.T) {
	for version, want := range map[string]int{"15.18": 15, "19beta1": 19, "19rc1": 19, "20devel": 20, "": 0, "x": 0} {
		if got := majorOf(version); got != want {
			t.Errorf("%q: %d, want %d", version, got, want)
		}
	}
}
