package gateway

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// A session that goes from one site to another must not see less than it has seen. Sites.CatchUp waits until that is so; one call of
// it does for all sessions whose latest transaction there had ended before it began. So sessions remember when that was, and the
// gateway up to when each pair of sites has been crossed; comparing the two costs nothing, and no lock.

// sighting is where a session's latest transaction was, and when it ended. As a session never goes anywhere without catching up,
// it is all that matters of what it has seen.
type sighting struct {
	site string // empty: it has seen nothing yet
	at   int64  // tick
}

// tick is the time since the Server began, in nanoseconds, by the monotonic clock.
func (g *Server) tick() int64 { return int64(time.Since(g.began)) }

// crossingKey is a way of sessions from one site to another. A server that was put in the place of another one has to catch up anew.
type crossingKey struct{ database, from, to, history string }

// crossing is what is known of such a way.
type crossing struct {
	key     crossingKey
	until   atomic.Int64 // what had ended at from before this tick is visible at to; 0: nothing is known
	running atomic.Bool
	again   atomic.Bool // somebody asks who came after the present call began
	waiting atomic.Int64

	hurry chan struct{} // one value: somebody waits

	mu   sync.Mutex    // guards news
	news chan struct{} // closed when a call has ended
}

const (
	// crossEvery is the least time between the starts of two calls that nobody waits for: each writes a message into the WAL.
	crossEvery = 50 * time.Millisecond
	// crossTry bounds one call: a site that does not answer is soon known to be away, and then another question is the right one.
	crossTry = 2 * time.Second
	// crossAgain is the pause after one that has failed.
	crossAgain = 20 * time.Millisecond
)

// crossing finds the way to a target.
func (g *Server) crossing(database, from string, to Target) *crossing {
	key := crossingKey{database, from, to.Site, to.History}
	if c, ok := g.crossings.Load(key); ok {
		return c.(*crossing)
	}
	c, _ := g.crossings.LoadOrStore(key, &crossing{key: key, hurry: make(chan struct{}, 1), news: make(chan struct{})})
	return c.(*crossing)
}

// soon has it found out that what has ended until now is visible at the other site.
func (c *crossing) soon(g *Server) {
	if !c.again.Load() {
		c.again.Store(true)
	}
	if !c.running.Load() && c.running.CompareAndSwap(false, true) {
		g.backends.Go(func() { c.run(g) })
	}
}

// wait waits until what had ended at a tick is visible at the other site, or a call has failed and leads says that this way is the
// right one no more; nil: it stays so.
func (c *crossing) wait(ctx context.Context, g *Server, at int64, leads func() bool) error {
	c.waiting.Add(1)
	defer c.waiting.Add(-1)
	for {
		c.mu.Lock()
		news := c.news
		c.mu.Unlock()
		if c.until.Load() > at {
			return nil
		}
		c.soon(g)
		select {
		case c.hurry <- struct{}{}:
		default:
		}
		select {
		case <-news:
			if leads != nil && c.until.Load() <= at && !leads() {
				return errors.New("the site is not the one to go to any more")
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// run crosses as long as somebody asks.
func (c *crossing) run(g *Server) {
	for {
		c.again.Store(false) // Who has asked before this is answered by the call that begins now.
		began := time.Now()
		ctx, cancel := context.WithTimeout(g.life, crossTry)
		err := g.cfg.Sites.CatchUp(ctx, c.key.database, c.key.from, c.key.to)
		cancel()
		if err == nil {
			c.until.Store(int64(began.Sub(g.began)))
		}
		c.mu.Lock()
		close(c.news)
		c.news = make(chan struct{})
		c.mu.Unlock()
		if err != nil {
			g.cfg.Log.Debug("what was seen at a site is not visible at another yet", "from", c.key.from, "to", c.key.to, "error", err)
		}
		if g.life.Err() != nil || !c.goOn() {
			return
		}
		c.pause(g, began, err)
	}
}

// goOn reports that somebody asks who has not been answered.
func (c *crossing) goOn() bool {
	if c.again.Load() || c.waiting.Load() > 0 {
		return true
	}
	c.running.Store(false)
	return c.again.Load() && c.running.CompareAndSwap(false, true) // Who has asked in between has relied on this.
}

// pause waits until it is time for another call.
func (c *crossing) pause(g *Server, began time.Time, err error) {
	d, hurry := crossEvery-time.Since(began), c.hurry
	if err != nil {
		d, hurry = crossAgain, nil
	}
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-hurry:
	case <-g.life.Done():
	}
}
