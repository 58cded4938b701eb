package config

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestTheFirstRouteThatFitsIsTheHome(t *testing.T) {
	g := Gateway{Routes: []Route{
		{Database: "app", Role: "batch", Site: "busan"},
		{Application: "report", Site: "jeju"},
		{Database: "app", Site: "seoul"},
	}}
	for _, c := range []struct{ database, role, application, want string }{
		{"app", "batch", "report", "busan"},
		{"app", "web", "report", "jeju"},
		{"other", "batch", "report", "jeju"},
		{"app", "web", "", "seoul"},
		{"other", "batch", "", ""},
	} {
		if got := g.Home(c.database, c.role, c.application); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

// alone is the file of a gateway that runs alone.
const alone = `cluster: {id: 4f2c9a1e-7c1d-4b5e-9a55-0d7f6c1e2b3a, name: demo}
sites:
  - {id: 1, name: seoul, address: "10.1.0.5:7400"}
  - {id: 2, name: busan, address: "10.2.0.5:7400"}
gateway:
  name: web1
  listen: 127.0.0.1:6432
`

func TestGatewayProblems(t *testing.T) {
	c := mustParse(t, alone)
	if !c.Alone() || c.Name() != "web1" || c.Site != "" || c.Gateway.Mode != GatewayTransaction {
		t.Errorf("%+v", c.Gateway)
	}
	site := minimal + "gateway:\n"
	for _, c := range []struct{ name, text, want string }{
		{"alone, by the door", alone + "  mode: door\n", `gateway.name is not for the mode door`},
		{"alone, without an address", strings.Replace(alone, "  listen: 127.0.0.1:6432\n", "", 1), "gateway.listen is missing"},
		{"alone, with a bad name", strings.Replace(alone, "web1", "Web", 1), `gateway.name "Web" is not a name`},
		{"alone, and a witness", "witness: w\n" + alone, "witness and gateway.name are both given"},
		{"alone, at an unknown site", "site: paris\n" + alone, `site "paris" is not in sites`},
		{"a route without a site", site + "  mode: session\n  routes:\n    - {role: web}\n", "gateway.routes[0].site is missing"},
		{"a route to an unknown site", site + "  mode: session\n  routes:\n    - {role: web, site: paris}\n", `gateway.routes[0].site "paris" is not in sites`},
		{"routes at a door", site + "  routes:\n    - {role: web, site: busan}\n", "gateway.routes is not for the mode door"},
		{"re-homing at a door", site + "  rehome_every: 1\n", "gateway.rehome_every is not for the mode door"},
		{"reads at an unknown site", site + "  mode: transaction\n  reads: {weights: {seoul: 1, paris: 1}}\n", `gateway.reads.weights: "paris" is not in sites`},
		{"reads of a route at an unknown site", site + "  mode: transaction\n  routes:\n    - {role: web, site: busan, reads: {weights: {paris: 1}}}\n", `gateway.routes[0].reads.weights: "paris" is not in sites`},
		{"reads nowhere", site + "  mode: transaction\n  reads: {weights: {seoul: 0}}\n", "gateway.reads.weights gives no site any reads"},
		{"a negative weight", site + "  mode: transaction\n  reads: {weights: {seoul: -1, busan: 2}}\n", `gateway.reads.weights["seoul"] is -1, want 0 to 1000`},
		{"too little lag", site + "  mode: transaction\n  reads: {weights: {seoul: 1}, lag_max: 1ms}\n", "gateway.reads.lag_max is 1ms, want 100ms to 1h"},
		{"reads that wait for long", site + "  mode: transaction\n  reads: {weights: {seoul: 1}, wait_max: 10s}\n", "gateway.reads.wait_max is 10s, want 0s to 1s"},
		{"reads in the mode session", site + "  mode: session\n  reads: {weights: {seoul: 1}}\n", "gateway.reads is not for the mode session"},
		{"reads of a route in the mode session", site + "  mode: session\n  routes:\n    - {site: busan, reads: {weights: {seoul: 1}}}\n", "gateway.reads is not for the mode session"},
		{"reads at a door", site + "  reads: {weights: {seoul: 1}}\n", "gateway.reads is not for the mode door"},
		{"slow-down in the mode session", site + "  mode: session\n  slow_down: {from: 64MiB}\n", "gateway.slow_down is not for the mode session"},
		{"slow-down that does not grow", site + "  mode: transaction\n  slow_down: {from: 64MiB, to: 64MiB}\n", "gateway.slow_down.to is 64MiB, want more than gateway.slow_down.from, which is 64MiB"},
		{"slow-down from nothing", site + "  mode: transaction\n  slow_down: {from: 1kB}\n", "gateway.slow_down.from is 1KiB, want 1MiB to 1TiB"},
		{"slow-down for ever", site + "  mode: transaction\n  slow_down: {from: 64MiB, most: 1h}\n", "gateway.slow_down.most is 1h, want 1ms to 10s"},
		{"re-homing backwards", site + "  mode: session\n  rehome_every: -1\n", "gateway.rehome_every is -1"},
	} {
		if _, err := Parse("duri.yaml", []byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestReadsOfARouteAreInThePlaceOfThoseOfAll(t *testing.T) {
	c := mustParse(t, minimal+`gateway:
  mode: transaction
  reads: {weights: {seoul: 1, busan: 3}, lag_max: 2s}
  routes:
    - {role: report, site: seoul, reads: {weights: {busan: 1}}}
    - {role: till, site: seoul, reads: {weights: {seoul: 1}, lag_max: 500ms, wait_max: 10ms}}
    - {role: web, site: seoul}
`)
	for role, want := range map[string]Reads{
		"report": {map[string]int{"busan": 1}, 2 * Second, 50 * Millisecond},
		"till":   {map[string]int{"seoul": 1}, 500 * Millisecond, 10 * Millisecond},
		"web":    {map[string]int{"seoul": 1, "busan": 3}, 2 * Second, 50 * Millisecond},
		"other":  {map[string]int{"seoul": 1, "busan": 3}, 2 * Second, 50 * Millisecond},
	} {
		if diff := cmp.Diff(want, c.Gateway.ReadsOf("app", role, "")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", role, diff)
		}
	}
	if !c.Gateway.RoutesReads() || mustParse(t, minimal).Gateway.RoutesReads() {
		t.Error("reads are routed when weights are given, and only then")
	}
}

func TestTheDelayOfWritersGrowsBetweenTwoBounds(t *testing.T) {
	s := SlowDown{From: 64 * MiB, To: 256 * MiB, Most: 200 * Millisecond}
	for _, c := range []struct {
		backlog Size
		want    time.Duration
	}{
		{0, 0}, {64 * MiB, 0}, {160 * MiB, 100 * time.Millisecond}, {256 * MiB, 200 * time.Millisecond}, {TiB, 200 * time.Millisecond}, {-1, 0},
	} {
		if got := s.Delay(c.backlog.Bytes()); got != c.want {
			t.Errorf("%s: %v, want %v", c.backlog, got, c.want)
		}
		if got := (SlowDown{To: s.To, Most: s.Most}).Delay(c.backlog.Bytes()); got != 0 {
			t.Errorf("%s, switched off: %v", c.backlog, got)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		s := SlowDown{From: Size(rapid.Int64Range(1, 1<<40).Draw(t, "from")), Most: Duration(rapid.Int64Range(1, 1e10).Draw(t, "most"))}
		s.To = s.From + Size(rapid.Int64Range(1, 1<<40).Draw(t, "more"))
		a, b := rapid.Int64Range(0, 1<<42).Draw(t, "a"), rapid.Int64Range(0, 1<<42).Draw(t, "b")
		x, y := s.Delay(min(a, b)), s.Delay(max(a, b))
		if x < 0 || x > y || y > s.Most.Std() {
			t.Fatalf("%v and %v: it must grow with the backlog, and not beyond %v", x, y, s.Most)
		}
	})
}
