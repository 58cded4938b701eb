// Package faultnet is a TCP relay that breaks: tests and proofs put it between two agents and cut, delay or reset the
// connections.
//
// A cut is that of a network, not of a process: nothing passes, also no end of a connection, and what was sent
// meanwhile arrives after healing, as TCP's retransmissions would bring it. New connections are accepted by the relay
// during a cut, since it cannot make the kernel ignore them, but nothing comes through. Reset and Refuse are what the
// death of a process looks like.
//
// It does not lose, repeat or reorder bytes within a connection: TCP would hide that.
package faultnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Direction is one of the two ways through a relay.
type Direction int

const (
	ToTarget Direction = iota
	ToClient
)

const (
	pieceBytes = 64 << 10
	// queued is how many pieces a direction holds; beyond that the sender feels the cut as a full buffer.
	queued = 64
)

// Relay passes connections on to a target. Its methods may be called at any time.
type Relay struct {
	target   string
	listener net.Listener
	ctx      context.Context // ends with Close; the relay is its own parent
	cancel   context.CancelFunc
	wg       sync.WaitGroup

	mu      sync.Mutex // guards the rest
	cut     [2]bool
	delay   time.Duration
	refuse  bool
	changed chan struct{} // closed and replaced when one of the above changes
	pairs   map[*pair]struct{}
	passed  [2]int64
}

// pair is a connection from a client and the one to the target.
type pair struct {
	ends [2]*net.TCPConn // indexed by the direction that reads from it: client, target
	once sync.Once
	gone chan struct{} // closed by abort
}

// New starts a relay to target (host:port) on a free port of the loopback interface. The caller closes it.
func New(target string) (*Relay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start a relay to %s: %w", target, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &Relay{target: target, listener: l, ctx: ctx, cancel: cancel, changed: make(chan struct{}), pairs: map[*pair]struct{}{}}
	r.wg.Go(r.accept)
	return r, nil
}

// Addr is where clients connect to.
func (r *Relay) Addr() string { return r.listener.Addr().String() }

// set changes the state and lets everything that waits look again.
func (r *Relay) set(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
	close(r.changed)
	r.changed = make(chan struct{})
}

// Cut stops both directions.
func (r *Relay) Cut() { r.set(func() { r.cut = [2]bool{true, true} }) }

// Drop stops one direction: the other goes on.
func (r *Relay) Drop(d Direction) { r.set(func() { r.cut[d&1] = true }) }

// Heal ends Cut, Drop and Refuse.
func (r *Relay) Heal() { r.set(func() { r.cut, r.refuse = [2]bool{}, false }) }

// Delay makes every byte take d longer in each direction, from now on; 0 ends it.
func (r *Relay) Delay(d time.Duration) { r.set(func() { r.delay = d }) }

// Refuse makes new connections end at once, as when nobody listens at the target, until Heal.
func (r *Relay) Refuse() { r.set(func() { r.refuse = true }) }

// Reset aborts all connections, at both ends, also while they are cut. New ones are not affected.
func (r *Relay) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p := range r.pairs {
		p.abort()
	}
}

// Passed is how many bytes have come out of the relay in a direction.
func (r *Relay) Passed(d Direction) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.passed[d&1]
}

// Connections is the number of open connections.
func (r *Relay) Connections() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.pairs)
}

// Close ends everything and waits for it.
func (r *Relay) Close() error {
	r.cancel()
	err := r.listener.Close()
	r.Reset()
	r.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// abort closes both ends with a reset.
func (p *pair) abort() { p.end(resetConn) }

// end closes both ends, in the way that the first caller asks for.
func (p *pair) end(closeConn func(*net.TCPConn)) {
	p.once.Do(func() {
		close(p.gone)
		for _, c := range p.ends {
			closeConn(c)
		}
	})
}

// resetConn closes with RST; should the option fail, the end is a normal one.
func resetConn(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

func (r *Relay) accept() {
	for {
		c, err := r.listener.Accept()
		if err != nil {
			return
		}
		r.wg.Go(func() { r.serve(c.(*net.TCPConn)) })
	}
}

// serve relays one connection until both directions have ended.
func (r *Relay) serve(client *net.TCPConn) {
	p := r.connect(client)
	if p == nil {
		resetConn(client)
		return
	}
	defer func() {
		r.mu.Lock()
		delete(r.pairs, p)
		r.mu.Unlock()
	}()
	// Both directions have ended by then; a reset would take away what is still in the socket's buffer.
	defer p.end(func(c *net.TCPConn) { _ = c.Close() })
	var wg sync.WaitGroup
	for _, d := range []Direction{ToTarget, ToClient} {
		pieces := make(chan piece, queued)
		done := make(chan struct{})
		wg.Go(func() { r.read(p, d, pieces, done) })
		wg.Go(func() { r.write(p, d, pieces, done) })
	}
	wg.Wait()
}

// connect makes the pair; nil when it must not, when the target cannot be reached, or when the relay is closing.
func (r *Relay) connect(client *net.TCPConn) *pair {
	r.mu.Lock()
	refuse := r.refuse
	r.mu.Unlock()
	if refuse {
		return nil
	}
	c, err := (&net.Dialer{}).DialContext(r.ctx, "tcp", r.target)
	if err != nil {
		return nil
	}
	p := &pair{ends: [2]*net.TCPConn{client, c.(*net.TCPConn)}, gone: make(chan struct{})}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ctx.Err() != nil {
		_ = c.Close()
		return nil
	}
	r.pairs[p] = struct{}{}
	return p
}

// piece is what was read, or the end of a direction.
type piece struct {
	at   time.Time
	data []byte
	end  bool
	err  bool // the end is not a normal one
}

// read takes what comes. Ends pass through the queue too: a cut network does not tell them.
func (r *Relay) read(p *pair, d Direction, out chan<- piece, done <-chan struct{}) {
	for {
		b := make([]byte, pieceBytes)
		n, err := p.ends[d].Read(b)
		next := piece{at: time.Now(), data: b[:n], end: err != nil, err: err != nil && !errors.Is(err, io.EOF)}
		select {
		case out <- next:
		case <-done:
			return
		}
		if err != nil {
			return
		}
	}
}

// write hands on what was read, when the state of the network allows it.
func (r *Relay) write(p *pair, d Direction, in <-chan piece, done chan<- struct{}) {
	defer close(done)
	to := p.ends[1-d]
	for {
		var next piece
		select {
		case next = <-in:
		case <-p.gone:
			return
		}
		if !r.passable(p, d, next.at) {
			return
		}
		if len(next.data) > 0 {
			if _, err := to.Write(next.data); err != nil {
				p.abort()
				return
			}
			r.mu.Lock()
			r.passed[d] += int64(len(next.data))
			r.mu.Unlock()
		}
		if next.err {
			p.abort()
			return
		}
		if next.end {
			_ = to.CloseWrite() // fails when the other direction ended with an abort already
			return
		}
	}
}

// passable waits until what was read at the given time may go on; false when the pair has ended.
func (r *Relay) passable(p *pair, d Direction, at time.Time) bool {
	for {
		r.mu.Lock()
		cut, wait, ch := r.cut[d], time.Until(at.Add(r.delay)), r.changed
		r.mu.Unlock()
		if !cut && wait <= 0 {
			return true
		}
		var due <-chan time.Time
		if !cut {
			timer := time.NewTimer(wait)
			defer timer.Stop()
			due = timer.C
		}
		select {
		case <-ch:
		case <-due:
		case <-p.gone:
			return false
		}
	}
}
