package server

import (
	"fmt"
	"net"
	"syscall"
)

// peerUID is the user whose process is at the other end of a Unix-domain socket.
func peerUID(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *syscall.Ucred
	var inner error
	if err := raw.Control(func(fd uintptr) {
		cred, inner = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if inner != nil {
		return 0, fmt.Errorf("ask who is at the other end: %w", inner)
	}
	return int(cred.Uid), nil
}
