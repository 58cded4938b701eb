package gateway

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// poolKey is what backends of a pool have in common. Startup parameters belong to it, so that RESET leads to the same
// values whoever opened the connection.
type poolKey struct{ network, address, login string }

// pool keeps the backends of one server, database, user and set of startup parameters that no session uses.
type pool struct {
	g     *Server
	key   poolKey
	tally tallyKey
	used  time.Time // guarded by Server.mu

	mu      sync.Mutex // guards the rest; nothing is locked and nobody waited for under it
	idle    []*backend // the one used last is the last
	open    int        // idle, in use, and being opened
	epoch   uint64     // the highest seen; older backends are not used again
	waiting []chan *backend
	seq     bool // some session reads what it left in sequences

	warming   int       // backends that are being opened for reads to come
	coldUntil time.Time // none is before

	all    map[*backend]struct{} // idle and in use
	paused bool                  // nobody is served
	renew  time.Time             // backends that were opened before are not used again
	counts Counts                // of transactions that have ended
}

// pool gives the pool of a target and login.
func (g *Server) pool(t Target, who *Login) *pool {
	key := poolKey{t.Network, t.Address, who.key}
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.pools[key]
	if p == nil {
		p = &pool{g: g, key: key, tally: tallyKey{who.Database, who.User, t.Site}, all: map[*backend]struct{}{}}
		p.paused = g.pausedNow(who.Database)
		g.pools[key] = p
	}
	p.used = time.Now()
	return p
}

// get lends a backend: the one that the session used last if it is there, another, or a new one. When there are as many
// as may be it waits for one, no longer than HoldMax.
func (p *pool) get(ctx context.Context, s *session, t Target) (*backend, error) {
	p.mu.Lock()
	p.epoch = max(p.epoch, t.Epoch)
	p.expire(time.Time{})
	if !p.paused {
		if b := p.pick(s.id); b != nil {
			p.mu.Unlock()
			return b, nil
		}
	}
	turn := make(chan *backend, 1)
	if !p.paused && p.open < p.g.lim().PoolMax {
		p.open++
		turn <- nil
	} else {
		p.waiting = append(p.waiting, turn)
	}
	p.mu.Unlock()
	waited := s.waits()
	b, err := p.wait(ctx, s, t, turn)
	waited(b)
	return b, err
}

// wait waits for its turn, and opens a backend if that is what it gets.
func (p *pool) wait(ctx context.Context, s *session, t Target, turn chan *backend) (*backend, error) {
	timeout := time.NewTimer(p.g.lim().HoldMax)
	defer timeout.Stop()
	select {
	case b := <-turn:
		if b != nil {
			return b, nil
		}
		return p.dial(ctx, s, t) // a place became free
	case <-ctx.Done():
		p.leave(turn)
		return nil, errShutdown
	case <-timeout.C:
		p.leave(turn)
		lim := p.g.lim()
		if p.isPaused() {
			return nil, errPaused(p.tally.database, lim.HoldMax)
		}
		return nil, fatalError(codeTooMany, fmt.Sprintf("no connection to the server of %s became free within %v", t.name(), lim.HoldMax),
			fmt.Sprintf("All %d are in use.", lim.PoolMax), "end transactions sooner, or raise the limit of connections per pool")
	}
}

// pick takes a backend out of the idle ones.
func (p *pool) pick(id uint64) *backend {
	if len(p.idle) == 0 {
		return nil
	}
	i := len(p.idle) - 1
	for j, b := range p.idle {
		if b.last == id {
			i = j
		}
	}
	b := p.idle[i]
	p.idle = slices.Delete(p.idle, i, i+1)
	return b
}

// leave gives up waiting; what arrived meanwhile goes to the next.
func (p *pool) leave(turn chan *backend) {
	p.mu.Lock()
	if i := slices.Index(p.waiting, turn); i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	if b := <-turn; b != nil {
		p.put(b)
	} else {
		p.release()
	}
}

func (p *pool) dial(ctx context.Context, s *session, t Target) (*backend, error) {
	ctx, cancel := context.WithTimeout(ctx, p.dialMax(s))
	defer cancel()
	b, err := p.g.dial(ctx, t, &s.who, s.keys)
	if err != nil {
		p.release()
		return nil, err
	}
	b.enter(p)
	return b, nil
}

// put takes a backend back.
func (p *pool) put(b *backend) {
	p.mu.Lock()
	p.gather(b)
	b.idleSince = time.Now()
	switch {
	case b.dead.Load(): // Its goroutine has taken it away, or is about to.
	case p.stale(b) || b.retired || p.paused || p.open > p.g.lim().PoolMax || p.g.ending.Load():
		_ = b.conn.Close() // and its goroutine takes it away
	case len(p.waiting) > 0:
		p.waiting[0] <- b
		p.waiting = p.waiting[1:]
	default:
		p.idle = append(p.idle, b)
	}
	p.mu.Unlock()
}

// gone takes a backend away for good. It is called once for each.
func (p *pool) gone(b *backend) {
	p.mu.Lock()
	if i := slices.Index(p.idle, b); i >= 0 {
		p.idle = slices.Delete(p.idle, i, i+1)
	}
	delete(p.all, b)
	p.gather(b)
	p.mu.Unlock()
	p.release()
}

// release makes a place free.
func (p *pool) release() {
	p.mu.Lock()
	p.open--
	p.wake()
	p.mu.Unlock()
}

// wake lets those that wait open connections, as far as there may be more. p.mu is held.
func (p *pool) wake() {
	for !p.paused && len(p.waiting) > 0 && p.open < p.g.lim().PoolMax {
		p.open++
		p.waiting[0] <- nil
		p.waiting = p.waiting[1:]
	}
}

// stale reports that a backend is not to be used any more. p.mu is held.
func (p *pool) stale(b *backend) bool { return b.target.Epoch < p.epoch || b.opened.Before(p.renew) }

// expire closes idle backends of older epochs, and those that are idle since before a time.
func (p *pool) expire(before time.Time) {
	p.idle = slices.DeleteFunc(p.idle, func(b *backend) bool {
		old := p.stale(b) || b.idleSince.Before(before)
		if old {
			_ = b.conn.Close() // and its goroutine takes it away
		}
		return old
	})
}

// tidy closes what was idle for long, and forgets pools that nobody uses.
func (g *Server) tidy(before time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for key, p := range g.pools {
		p.mu.Lock()
		p.expire(before)
		if p.open == 0 && len(p.waiting) == 0 && p.used.Before(before) {
			g.keep(p)
			delete(g.pools, key)
		}
		p.mu.Unlock()
	}
}

// allPools gives the pools that there are now.
func (g *Server) allPools() []*pool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Collect(maps.Values(g.pools))
}

// setSeq notes that some session reads what it left in sequences. From then on nobody may see another's.
func (p *pool) setSeq() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seq = true
}

func (p *pool) hasSeq() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seq
}
