package e2e

import (
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/test/prove/converge/trial"
)

// TestThreeSitesConvergeUnderFaults is the short form of `make prove CASE=converge`: random transactions at three sites
// whose clocks are wrong, with an agent killed, a link cut and whatever else the seed draws; and the oracle.
func TestThreeSitesConvergeUnderFaults(t *testing.T) {
	t.Parallel()
	s := random(t).Uint64N(1 << 32)
	script := trial.NewScript(s, trial.Sizes{Sites: 3, Ops: 2000, Keys: 80, Sessions: 2, Faults: 1, Rate: 400, Skew: 1500 * time.Millisecond})
	script.Faults = append([]trial.Fault{
		{At: 300, Kind: "kill-agent", Site: 1, For: 300},
		{At: 700, Kind: "cut", Site: 0, Peer: 2, For: 800},
	}, script.Faults...)
	var options []pgtest.Option
	for name, value := range trial.Settings() {
		options = append(options, pgtest.WithSetting(name, value))
	}
	agent, err := trial.Build(t.Context(), t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	o := trial.Options{Script: script, Binary: agent, Wait: time.Minute, Out: logWriter{t}}
	for range script.Sites {
		o.Clusters = append(o.Clusters, pgtest.New(t, options...))
	}
	r, err := trial.Run(t.Context(), o)
	if err != nil {
		t.Fatalf("seed %d: %v", s, err)
	}
	t.Logf("%s", r.Report())
	if r.Failed() {
		t.Errorf("seed %d: %d differences; the script: %s", s, len(r.Differences), script.JSON())
	}
	if r.Concurrent == 0 || r.Changes < script.Ops {
		t.Errorf("seed %d: %d changes, %d of them lost against a concurrent one: the sites hardly met", s, r.Changes, r.Concurrent)
	}
}
