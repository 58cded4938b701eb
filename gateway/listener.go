package gateway

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Listener is a listening socket that can be handed to another process: while that one accepts, this one pauses. Methods may be
// called at any time.
type Listener struct {
	socket listening

	mu     sync.Mutex // guards the rest
	paused bool
	closed bool
	turned chan struct{} // closed when one of the others changes
	came   []net.Conn    // connections that did not come by accept
}

// listening is what TCP and Unix-domain listeners have in common.
type listening interface {
	net.Listener
	syscall.Conn
	SetDeadline(t time.Time) error
}

// NewListener wraps a listener for TCP or of a Unix-domain socket, whose file then stays when it is closed.
func NewListener(l net.Listener) (*Listener, error) {
	socket, ok := l.(listening)
	if !ok {
		return nil, fmt.Errorf("a listener of type %T cannot be handed over", l)
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	return &Listener{socket: socket, turned: make(chan struct{})}, nil
}

// listenerOf makes one of a descriptor that came from another process; it takes it over. It is paused.
func listenerOf(fd int) (*Listener, error) {
	f := os.NewFile(uintptr(fd), "listener")
	defer func() { _ = f.Close() }() // FileListener has its own
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	out, err := NewListener(l)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	out.paused = true
	return out, nil
}

// turn tells of a change. mu is held.
func (l *Listener) turn() {
	close(l.turned)
	l.turned = make(chan struct{})
	if !l.closed {
		_ = l.socket.SetDeadline(time.Unix(1, 0)) // wakes Accept; it may be closed
	}
}

// Pause lets Accept wait, and connections with it, until Resume.
func (l *Listener) Pause() { l.set(true) }

// Resume ends it.
func (l *Listener) Resume() { l.set(false) }

func (l *Listener) set(paused bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.paused = paused
	l.turn()
}

// push lets Accept give a connection that came another way; false: it is closed.
func (l *Listener) push(c net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.came = append(l.came, c)
	l.turn()
	return true
}

// Accept is that of net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		l.mu.Lock()
		closed, paused, turned := l.closed, l.paused, l.turned
		if !closed && len(l.came) > 0 {
			c := l.came[0]
			l.came = l.came[1:]
			l.mu.Unlock()
			return c, nil
		}
		if !closed && !paused {
			_ = l.socket.SetDeadline(time.Time{}) // under mu: whoever turns afterwards sets it again
		}
		l.mu.Unlock()
		if closed {
			return nil, net.ErrClosed
		}
		if paused {
			<-turned
			continue
		}
		if c, err := l.socket.Accept(); err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return c, err
		}
	}
}

// Close closes the socket in this process. In another one that has it, it stays open.
func (l *Listener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	for _, c := range l.came {
		_ = c.Close()
	}
	l.came = nil
	l.turn()
	return l.socket.Close()
}

// Addr is that of net.Listener.
func (l *Listener) Addr() net.Addr { return l.socket.Addr() }

// withFD calls f with the descriptor of a connection or listener, which stays open until f returns.
func withFD(c syscall.Conn, f func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}
