package server

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/link"
)

// mute is a site whose PostgreSQL hangs: it does not say up to where it has what. What is waited for there comes at once, unless it
// hangs as well.
type mute struct {
	link.Asked
	asked chan struct{}
	hangs bool
	gone  string
}

func (m *mute) Position(ctx context.Context, _ string) ([]link.SitePosition, error) {
	close(m.asked)
	<-ctx.Done()
	return nil, ctx.Err()
}

func (m *mute) Reach(ctx context.Context, _ string, _ []link.SitePosition, gone string) error {
	if m.gone = gone; m.hangs {
		<-ctx.Done()
	}
	return ctx.Err()
}

func (m *mute) Fate(ctx context.Context, _ link.FateQuestion) (link.FateAnswer, error) {
	if m.asked != nil {
		close(m.asked)
		<-ctx.Done()
		return link.FateAnswer{}, ctx.Err()
	}
	return link.FateAnswer{Site: "b", Outcome: link.OutcomeCommitted}, nil
}

// twoMute are two sites that serve, of which a does not say what it has.
func twoMute() (s *sites, a, b *mute) {
	s = &sites{log: slog.New(slog.DiscardHandler), retire: func(string) {}, leave: func(string, bool) {}}
	a, b = &mute{asked: make(chan struct{})}, &mute{}
	s.links = []*siteLink{{asked: a, target: gateway.Target{Site: "a"}}, {asked: b, target: gateway.Target{Site: "b"}}}
	s.seen.Store(&picture{sites: []siteView{{name: "a"}, {name: "b"}}})
	for _, l := range s.links {
		s.learn(l, true, link.SiteState{Postgres: true, Epoch: 1, Members: []string{"a", "b"}}, nil)
	}
	return s, a, b
}

// TestCatchUpDoesNotWaitForWhoIsLost: a session that goes on elsewhere asks the site before up to where it has seen, which may be
// lost in that very moment. What has been received of it then has to do, and no longer wait than for a site that was lost before.
func TestCatchUpDoesNotWaitForWhoIsLost(t *testing.T) {
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
				s, a, b := twoMute()
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

// TestCatchUpEndsWithTheSiteToGoTo: the site where a session is to go on is lost before what the session has seen is there.
func TestCatchUpEndsWithTheSiteToGoTo(t *testing.T) {
	for name, loss := range map[string]link.SiteState{
		"it is left out":     {Postgres: true, Epoch: 2, Members: []string{"a"}, Refuses: "left out"},
		"its server is down": {Epoch: 1, Members: []string{"a", "b"}, Refuses: "PostgreSQL here is down"},
	} {
		for _, heard := range []bool{true, false} { // of the site before
			synctest.Test(t, func(t *testing.T) {
				s, a, b := twoMute()
				b.hangs = true
				done := make(chan error, 1)
				go func() { done <- s.CatchUp(t.Context(), "app", "a", "b") }()
				<-a.asked
				if !heard {
					s.learn(s.links[0], false, link.SiteState{}, context.DeadlineExceeded)
				}
				synctest.Wait()
				s.learn(s.links[1], true, loss, nil)
				if err := <-done; !errors.Is(err, errLost) {
					t.Errorf("%s: %v", name, err)
				}
			})
		}
	}
}

// TestFateIsNotWaitedForWhereItCannotBeTold: a site whose PostgreSQL hangs is asked last, and for no longer than it looks well.
func TestFateIsNotWaitedForWhereItCannotBeTold(t *testing.T) {
	losses := map[string]link.SiteState{
		"it is left out":          {Postgres: true, Epoch: 2, Members: []string{"b"}, Refuses: "left out"},
		"its server does not run": {Epoch: 1, Members: []string{"a", "b"}, Refuses: "PostgreSQL here is down"},
	}
	for name, loss := range losses {
		for _, before := range []bool{true, false} { // it is asked
			synctest.Test(t, func(t *testing.T) {
				s, a, _ := twoMute()
				if before {
					s.learn(s.links[0], true, loss, nil)
				}
				begun := time.Now()
				done := make(chan gateway.Fate, 1)
				go func() {
					f, err := s.Fate(t.Context(), gateway.Doubt{Target: gateway.Target{Site: "a"}, XID: 1})
					if err != nil {
						t.Error(err)
					}
					done <- f
				}()
				if !before {
					<-a.asked
					s.learn(s.links[0], true, loss, nil)
				}
				if f := <-done; f != gateway.Committed || time.Since(begun) != 0 {
					t.Errorf("%s, before %t: %v after %s", name, before, f, time.Since(begun))
				}
			})
		}
	}
	s, _, _ := twoMute()
	if all := s.whoKnows("a"); len(all) != 2 || all[0].target.Site != "a" {
		t.Error("a site that serves is not asked first for what ran there")
	}
}
