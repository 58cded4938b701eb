package server

import (
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// peerOf is the process at the other end of a Unix-domain socket, and its user. The process is 0 when it is one of another
// world, as of another container.
func peerOf(c *net.UnixConn) (uid, pid int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, 0, err
	}
	var cred *syscall.Ucred
	var inner error
	if err := raw.Control(func(fd uintptr) {
		cred, inner = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil {
		return 0, 0, err
	}
	if inner != nil {
		return 0, 0, fmt.Errorf("ask who is at the other end: %w", inner)
	}
	return int(cred.Uid), int(cred.Pid), nil
}

// mortal is a process whose end is waited for.
type mortal struct{ fd int }

// mortalOf watches a process, until close is called.
func mortalOf(pid int) (*mortal, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("watch process %d: %w", pid, err)
	}
	return &mortal{fd}, nil
}

// dead reports whether it has ended: then nothing is open any more that was. It waits for no longer than a time.
func (m *mortal) dead(most time.Duration) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(m.fd), Events: unix.POLLIN}}, int(most.Milliseconds()))
	return err == nil && n == 1
}

func (m *mortal) close() { _ = unix.Close(m.fd) } // nothing is written to it
