package gateway

import (
	"context"
	"time"
)

// How long a session waits for a connection to a server that is opened for it, so that it does not hang at one that says nothing.

// freshMax is for how long a new client's session tries again when the connection to its first server has broken.
const freshMax = time.Second

// fetchFirst is fetch for a session that begins: that a connection broke is no reason to refuse a client, as the next one may go
// elsewhere.
func (s *session) fetchFirst(ctx context.Context) (*backend, error) {
	begun := time.Now()
	s.waitsUntil = begun.Add(s.g.lim().HoldMax)
	for {
		b, err := s.fetch(ctx)
		if err == nil || !absent(err) || s.ending.Load() || time.Since(begun) >= freshMax {
			return b, err
		}
		if _, rerr := s.route(); rerr != nil { // there is no server
			return nil, rerr
		}
		select {
		case <-ctx.Done():
			return nil, errShutdown
		case <-time.After(retryEvery):
		}
	}
}

// dialMax is how long the session that opens a connection waits for it. One that has begun leaves time to go elsewhere.
func (p *pool) dialMax(s *session) time.Duration {
	most := p.g.lim().HoldMax
	s.mu.Lock()
	if len(s.told) > 0 {
		most /= 3
	}
	s.mu.Unlock()
	if !s.waitsUntil.IsZero() {
		most = min(most, max(time.Until(s.waitsUntil), dialMin))
	}
	return min(most, p.g.cfg.LoginMax)
}

// dialMin is how long it is waited for at least.
const dialMin = 100 * time.Millisecond
