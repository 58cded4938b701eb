package server

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// The service manager may open the socket for clients and keep it while the process is restarted: who connects meanwhile waits,
// instead of being refused (systemd.socket(5), sd_listen_fds(3)).

const (
	// firstInherited is the descriptor at which they begin (SD_LISTEN_FDS_START).
	firstInherited = 3
	// clientsSocket is the name of the one for clients, where there are several.
	clientsSocket = "clients"
)

// inheritedSocket gives the descriptor of the socket for clients, from the environment of a process; false: there is none.
func inheritedSocket(pid int, getenv func(string) string) (fd int, ok bool, err error) {
	if getenv("LISTEN_PID") != strconv.Itoa(pid) {
		return 0, false, nil // for another process
	}
	n, err := strconv.Atoi(getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > 1000 {
		return 0, false, fmt.Errorf("LISTEN_FDS is %q, which is no number of sockets", getenv("LISTEN_FDS"))
	}
	if n <= 1 {
		return firstInherited, n == 1, nil
	}
	names := strings.Split(getenv("LISTEN_FDNAMES"), ":")
	i := slices.Index(names, clientsSocket)
	if i < 0 || i >= n {
		return 0, false, &hinted{
			fmt.Sprintf("the service manager hands %d sockets over, and none is called %q", n, clientsSocket), "set FileDescriptorName=" + clientsSocket + " in its socket unit",
		}
	}
	return firstInherited + i, true, nil
}

// inheritedListener listens on it; nil: there is none. It must be that of gateway.listen, as far as its port tells.
func inheritedListener(address string) (net.Listener, error) {
	fd, ok, err := inheritedSocket(os.Getpid(), os.Getenv)
	if err != nil || !ok {
		return nil, err
	}
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} { // They are for this process, once.
		if err := os.Unsetenv(name); err != nil {
			return nil, err
		}
	}
	return listenerOn(fd, address)
}

// listenerOn takes a descriptor over.
func listenerOn(fd int, address string) (net.Listener, error) {
	syscall.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), clientsSocket)
	defer func() { _ = f.Close() }() // FileListener has its own
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("listen on the socket of the service manager: %w", err)
	}
	has, ok := ln.Addr().(*net.TCPAddr)
	_, port, err := net.SplitHostPort(address)
	if !ok || err != nil || port != strconv.Itoa(has.Port) {
		_ = ln.Close()
		return nil, &hinted{
			fmt.Sprintf("the socket of the service manager listens on %s, and gateway.listen is %s", ln.Addr(), address), "write the same port into both",
		}
	}
	return ln, nil
}
