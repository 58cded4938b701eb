// Package alive notices that the host at the other end of a TCP connection has vanished: power, cable or route are gone, so that
// nothing is told any more, not even an end.
//
// Two things are needed. An idle connection is probed by the kernel's keepalive. One with data under way is not, and the kernel sends
// these again for a quarter of an hour. TCP_USER_TIMEOUT would end that, but also a connection whose other end lives and only does not
// read for a while, such as a server that waits for a lock in the midst of a COPY (Linux, tcp_probe_timer; a test shows it). So the
// kernel is asked now and then what it has sent in vain, and only when nothing at all comes back is the connection ended.
package alive

import (
	"net"
	"sync"
	"syscall"
	"time"
)

// Watcher watches connections. Its methods are safe for concurrent use; the zero value is not usable.
type Watcher struct {
	silence time.Duration

	mu    sync.Mutex // guards the rest
	conns map[net.Conn]*watched
	end   chan struct{} // closed, run ends; nil: it does not run
}

// watched is a connection, and what was seen of it.
type watched struct {
	raw  syscall.RawConn
	seen suspicion
}

// New makes a watcher that ends connections on which nothing has come back for silence although something was sent, and lets the
// kernel end idle ones after twice that. On systems other than Linux it does only the latter.
func New(silence time.Duration) *Watcher {
	return &Watcher{silence: silence, conns: map[net.Conn]*watched{}}
}

// looks is how often it looks within the silence.
const looks = 12

// Watch watches a connection until it is closed or stop is called; one that is not TCP is left alone. When its other end has vanished,
// reading gives the end of the stream, and writing fails; its owner closes it.
func (w *Watcher) Watch(c net.Conn) (stop func()) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return func() {}
	}
	// A connection that has ended shows at the first use.
	_ = t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: w.silence, Interval: w.silence / 3, Count: 3})
	raw, err := t.SyscallConn()
	if err != nil {
		return func() {}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns[c] = &watched{raw: raw}
	if w.end == nil {
		w.end = make(chan struct{})
		go w.run(w.end)
	}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.conns, c)
		w.rest()
	}
}

// rest ends run if there is nothing to look at. mu is held.
func (w *Watcher) rest() {
	if len(w.conns) == 0 && w.end != nil {
		close(w.end)
		w.end = nil
	}
}

// run looks at all connections until there is none.
func (w *Watcher) run(end <-chan struct{}) {
	tick := time.NewTicker(w.silence / looks)
	defer tick.Stop()
	for {
		select {
		case <-end:
			return
		case <-tick.C:
			w.look(time.Now())
		}
	}
}

// look looks at each connection.
func (w *Watcher) look(now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c, x := range w.conns {
		r, open := ask(x.raw)
		switch {
		case !open:
			delete(w.conns, c)
		case x.seen.vanished(r, now, w.silence):
			delete(w.conns, c)
			hangUp(x.raw)
		}
	}
	w.rest()
}

// reading is what the kernel tells of a connection.
type reading struct {
	resent int           // how often data were sent again that nobody has acknowledged yet
	probes int           // of a window that is shut, that nobody has answered yet
	heard  time.Duration // since the latest acknowledgement of anything
}

// suspicion is since when a connection seems to be dead; zero: it does not.
type suspicion struct{ since time.Time }

// Loss of single packets is no sign: so many must have been in vain.
const (
	resentMin = 3
	probesMin = 2
)

// vanished takes a reading and decides. It is pure but for what it remembers.
func (s *suspicion) vanished(r reading, now time.Time, silence time.Duration) bool {
	switch {
	case r.resent == 0 && r.probes == 0:
		s.since = time.Time{}
		return false
	case s.since.IsZero(), r.heard < now.Sub(s.since): // something came since
		s.since = now
		return false
	}
	return now.Sub(s.since) >= silence && (r.resent >= resentMin || r.probes >= probesMin)
}
