package alive

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ask reads what the kernel knows of a connection; open is false when it was closed.
func ask(raw syscall.RawConn) (r reading, open bool) {
	err := raw.Control(func(fd uintptr) {
		i, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return // it has ended, which its owner sees
		}
		r = reading{resent: int(i.Retransmits), probes: int(i.Probes), heard: time.Duration(i.Last_ack_recv) * time.Millisecond}
	})
	return r, err == nil
}

// hangUp ends a connection for who reads and writes it.
func hangUp(raw syscall.RawConn) {
	_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) }) // it may have ended
}
