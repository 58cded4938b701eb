//go:build !linux

package alive

import "syscall"

// ask knows nothing: there is keepalive only.
func ask(raw syscall.RawConn) (r reading, open bool) {
	return reading{}, raw.Control(func(uintptr) {}) == nil
}

func hangUp(syscall.RawConn) {}
