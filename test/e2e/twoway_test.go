package e2e

import (
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/test/twoway"
)

// TestUpsertsAndDeletesAtBothSitesLeaveThemEqual is the short form of `make prove CASE=twoway`: on so few keys every
// delete meets upserts of the other site, and while the link is cut most keys are written at both.
func TestUpsertsAndDeletesAtBothSitesLeaveThemEqual(t *testing.T) {
	t.Parallel()
	s := random(t).Uint64N(1 << 32)
	r, err := twoway.Run(t.Context(), twoway.Options{
		Binary: binary, Clusters: []*pgcluster.Cluster{pgtest.New(t), pgtest.New(t)}, Length: 4 * time.Second, Clients: 2, Keys: 200,
		Cut: time.Second, Wait: time.Minute, Seed: s, Out: logWriter{t},
	}, twoway.Duri, twoway.Upserts)
	if err != nil {
		t.Fatalf("seed %d: %v", s, err)
	}
	// How soon they are equal depends on what else runs here; that is for the long form to judge.
	if err := twoway.Judge(r, time.Minute); err != nil {
		t.Errorf("seed %d: %v", s, err)
	}
	if r.Conflicts == 0 {
		t.Errorf("seed %d: %d + %d transactions on 200 keys met no conflict", s, r.Counts[0].Transactions, r.Counts[1].Transactions)
	}
}
