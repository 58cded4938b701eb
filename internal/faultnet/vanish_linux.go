package faultnet

import (
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Vanish lets all that comes to a TCP connection disappear before TCP sees it, also acknowledgements: each end finds that the other's
// host has vanished. Appear is the opposite.
func Vanish(c net.Conn) error {
	drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}} // takes 0 bytes of each packet
	return control(c, func(fd int) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop[0]})
	})
}

// Appear ends what Vanish has begun.
func Appear(c net.Conn) error {
	return control(c, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0) })
}

func control(c net.Conn, f func(fd int) error) error {
	s, ok := c.(syscall.Conn)
	if !ok {
		return fmt.Errorf("a connection of type %T has no socket", c)
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// settledMax bounds how long Vanish waits.
const settledMax = 2 * time.Second

// Vanish is that of all connections which pass now: both the client and the target find that the host at the other end has vanished. It
// waits until what the relay has sent is acknowledged: else it would be sent again, and heard.
func (r *Relay) Vanish() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var err error
	for p := range r.pairs {
		for _, c := range p.ends {
			err = errors.Join(err, settle(c), Vanish(c))
		}
	}
	return err
}

func settle(c net.Conn) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(settledMax); ; <-tick.C {
		unacked := uint32(0)
		err := control(c, func(fd int) error {
			i, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
			if err == nil {
				unacked = i.Unacked
			}
			return err
		})
		switch {
		case err != nil || unacked == 0:
			return err
		case time.Now().After(deadline):
			return fmt.Errorf("%d segments were not acknowledged within %v", unacked, settledMax)
		}
	}
}
