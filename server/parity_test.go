package server

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/parity"
)

// TestSessionsWaitForTheComparison: a site that was not asked yet is not gone to; one that cannot be asked is, as it was when it
// last told; what differs is logged once, and once more when it is gone.
func TestSessionsWaitForTheComparison(t *testing.T) {
	log := &lines{}
	s := &sites{log: slog.New(slog.NewTextHandler(log, nil))}
	k := &s.like
	clerk := &gateway.Login{Database: "app", User: "clerk"}
	want := func(what, says, last, site string) {
		t.Helper()
		got := k.parts(clerk, gateway.Wish{Last: last}, site)
		if says == "" && got != "" || !strings.Contains(got, says) {
			t.Errorf("%s: from %q to %s: %q, want %q", what, last, site, got, says)
		}
	}
	facts := func(site, verifier string) []parity.Facts {
		return []parity.Facts{{Site: site, Database: "app", Roles: map[string]parity.Role{"clerk": {Verifier: verifier}, "till": {}}}}
	}
	at := time.Now()
	want("nothing known, new session", "", "", "a")
	want("nothing known", "not been compared", "a", "b")
	k.learn("a", at, facts("a", "x"), nil, s)
	want("b is not known", "not been compared", "a", "b")
	want("back home", "", "a", "a")
	k.learn("b", at, nil, errors.New("no answer"), s)
	want("b cannot be asked", "", "a", "b")
	for range 3 {
		k.learn("b", at, facts("b", "y"), nil, s)
	}
	want("other verifier", "SCRAM verifier of role clerk", "a", "b")
	want("other verifier, back", "SCRAM verifier of role clerk", "b", "a")
	if got := k.parts(&gateway.Login{Database: "app", User: "till"}, gateway.Wish{Last: "a"}, "b"); got != "" {
		t.Errorf("another role: %q", got)
	}
	k.learn("b", at, nil, errors.New("no answer"), s)
	want("b is as it was", "SCRAM verifier of role clerk", "a", "b")
	if !k.blocks() {
		t.Error("nothing blocks")
	}
	var out bytes.Buffer
	k.writeMetrics(&out)
	if !strings.Contains(out.String(), `duri_gateway_site_differences{database="app",grade="blocks_role",site="a",other="b"} 1`) {
		t.Errorf("%s", out.String())
	}
	k.learn("b", at, facts("b", "x"), nil, s)
	want("equal", "", "a", "b")
	if n := log.count("open sessions do not go on"); n != 1 {
		t.Errorf("logged %d times", n)
	}
	if log.count("is gone") != 1 || log.count("could not be compared") != 2 {
		t.Error("the log does not tell what is gone, or who did not answer")
	}
}

// TestDifferencesAreOfOneMoment: what was made at both sites after one of them was asked last keeps nobody from going on, not even
// when that site cannot be asked any more.
func TestDifferencesAreOfOneMoment(t *testing.T) {
	s := &sites{log: slog.New(slog.DiscardHandler)}
	k := &s.like
	facts := func(site string, roles ...string) []parity.Facts {
		f := parity.Facts{Site: site, Database: "app", Roles: map[string]parity.Role{}}
		for _, r := range roles {
			f.Roles[r] = parity.Role{}
		}
		return []parity.Facts{f}
	}
	start := time.Now()
	step := func(what, site string, after time.Duration, f []parity.Facts, err error, stale string, blocks bool) {
		t.Helper()
		got := k.learn(site, start.Add(after), f, err, s)
		if strings.Join(got, " ") != stale || k.blocks() != blocks {
			t.Errorf("%s: asks %q, blocks %v; want %q, %v", what, got, k.blocks(), stale, blocks)
		}
	}
	gone := errors.New("no answer")
	step("first", "a", 0, facts("a"), nil, "", false)
	step("first", "b", time.Second, facts("b"), nil, "", false)
	step("made at both at once, b is asked", "b", 1500*time.Millisecond, facts("b", "teller"), nil, "a", false)
	step("a has it too", "a", 1501*time.Millisecond, facts("a", "teller"), nil, "", false)
	step("gone at both, and another is made, b is asked", "b", 40*time.Second, facts("b", "clerk"), nil, "a", false)
	step("a has ended", "a", 41*time.Second, nil, gone, "a", false)
	step("a is back", "a", 60*time.Second, facts("a", "clerk"), nil, "", false)
	step("made at a", "a", 100*time.Second, facts("a", "clerk", "till"), nil, "b", false)
	step("b has it not", "b", 101*time.Second, facts("b", "clerk"), nil, "", true)
	step("nor has it after a while", "b", 106*time.Second, facts("b", "clerk"), nil, "", true)
	step("a has ended", "a", 107*time.Second, nil, gone, "", true)
	step("made at b", "b", 111*time.Second, facts("b", "clerk", "till"), nil, "", false)
}

// TestFirstComparisonIsTakenSeriously: as long as nothing else is known, what differs counts at once; a session would go on where it
// would notice before both were asked once more.
func TestFirstComparisonIsTakenSeriously(t *testing.T) {
	s := &sites{log: slog.New(slog.DiscardHandler)}
	k := &s.like
	facts := func(site string, verifier string) []parity.Facts {
		return []parity.Facts{{Site: site, Database: "app", Roles: map[string]parity.Role{"clerk": {Verifier: verifier}}}}
	}
	start := time.Now()
	k.learn("a", start, facts("a", "x"), nil, s)
	k.learn("c", start, nil, errors.New("no answer"), s)
	if stale := k.learn("b", start.Add(time.Second), facts("b", "y"), nil, s); !k.blocks() || strings.Join(stale, " ") != "a" {
		t.Errorf("the first comparison: blocks %t, asks %v again", k.blocks(), stale)
	}
	if k.learn("a", start.Add(2*time.Second), facts("a", "y"), nil, s); k.blocks() {
		t.Error("what was changed in between keeps sessions")
	}
	if k.learn("c", start.Add(3*time.Second), facts("c", "x"), nil, s); !k.blocks() {
		t.Error("a site that is heard for the first time is taken for equal")
	}
}

func TestChangedKeysAreToldApart(t *testing.T) {
	old := parsed(t, "gateway: {listen: \"127.0.0.1:1\", mode: transaction, pool_size: 1}\n")
	now := parsed(t, "gateway: {listen: \"127.0.0.1:2\", mode: transaction, pool_size: 2, admins: [a]}\n")
	taken, restart := changedKeys(old, now)
	if strings.Join(taken, "; ") != "gateway.admins:  -> a; gateway.pool_size: 1 -> 2" || strings.Join(restart, "; ") != "gateway.listen" {
		t.Errorf("%q, %q", taken, restart)
	}
}

func parsed(t *testing.T, more string) *config.Config {
	t.Helper()
	c, err := config.Parse("duri.yaml", []byte(`cluster: {id: 4f2c9a1e-7c1d-4b5e-9a55-0d7f6c1e2b3a, name: demo}
site: a
sites:
  - {id: 1, name: a, address: "127.0.0.1:7400"}
  - {id: 2, name: b, address: "127.0.0.1:7401"}
bootstrap: seed
databases: [{name: app}]
`+more))
	if err != nil {
		t.Fatal(err)
	}
	return c
}
