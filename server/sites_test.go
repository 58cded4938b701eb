package server

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/link"
)

// mute is a site whose PostgreSQL hangs: it does not say up to where it has what. What is waited for there comes at once.
type mute struct {
	link.Asked
	asked chan struct{}
	gone  string
}

func (m *mute) Position(ctx context.Context, _ string) ([]link.SitePosition, error) {
	close(m.asked)
	<-ctx.Done()
	return nil, ctx.Err()
}

func (m *mute) Reach(_ context.Context, _ string, _ []link.SitePosition, gone string) error {
	m.gone = gone
	return nil
}

// TestCatchUpDoesNotWaitForWhoIsLost: a session that goes on elsewhere asks the site before up to where it has seen, which may be
// lost in that very moment. What has been received of it then has to do, and no longer wait than for a site that was lost before.
func TestCatchUpDoesNotWaitForWhoIsLost(t *testing.T) {
	fine := link.SiteState{Postgres: true, Epoch: 1, Members: []string{"a", "b"}}
	for _, c := range []struct {
		name  string
		lost  func(s *sites, a *siteLink)
		after time.Duration
	}{
		{"it is left out", func(s *sites, a *siteLink) {
			s.learn(a, true, link.SiteState{Postgres: true, Epoch: 2, Members: []string{"b"}, Refuses: "left out"}, nil)
		}, 0},
		{"its agent is silent", func(s *sites, a *siteLink) { s.learn(a, false, link.SiteState{}, context.DeadlineExceeded) }, 0},
		{"its PostgreSQL does not answer", func(s *sites, a *siteLink) {
			s.learn(a, true, link.SiteState{Epoch: 1, Members: []string{"a", "b"}, Refuses: "PostgreSQL here is down"}, nil)
		}, positionMax},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &sites{log: slog.New(slog.DiscardHandler), retire: func(string) {}, leave: func(string, bool) {}}
				a, b := &mute{asked: make(chan struct{})}, &mute{}
				s.links = []*siteLink{{asked: a, target: gateway.Target{Site: "a"}}, {asked: b, target: gateway.Target{Site: "b"}}}
				s.seen.Store(&picture{sites: []siteView{{name: "a"}, {name: "b"}}})
				s.learn(s.links[0], true, fine, nil)
				s.learn(s.links[1], true, fine, nil)
				done := make(chan error, 1)
				go func() { done <- s.CatchUp(t.Context(), "app", "a", "b") }()
				<-a.asked
				time.Sleep(300 * time.Millisecond) // of the bubble's clock
				lost := time.Now()
				c.lost(s, s.links[0])
				select {
				case err := <-done:
					if took := time.Since(lost); err != nil || b.gone != "a" || took != c.after {
						t.Errorf("after %s (want %s): %v, all of %q is here", took, c.after, err, b.gone)
					}
				case <-time.After(time.Minute):
					t.Error("it still waits after a minute")
				}
			})
		})
	}
}
