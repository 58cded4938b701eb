//go:build !linux

package server

import (
	"errors"
	"net"
	"time"
)

var errLinux = errors.New("a gateway, or an agent, is taken over on Linux only")

// peerOf is the process at the other end of a Unix-domain socket, and its user.
func peerOf(*net.UnixConn) (uid, pid int, err error) { return 0, 0, errLinux }

// mortal is a process whose end is waited for.
type mortal struct{}

func mortalOf(int) (*mortal, error) { return nil, errLinux }

func (*mortal) dead(time.Duration) bool { return true }

func (*mortal) close() {}
