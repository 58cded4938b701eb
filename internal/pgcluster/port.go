package pgcluster

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// portLease reserves a TCP port among all programs that use this package, from choosing it until Destroy, that is also
// while the server is down. It is an abstract Unix-domain socket: the kernel gives each name to one holder per network
// namespace, which is the scope of a port, and takes it back when the holder dies.
type portLease struct {
	port   int
	holder net.Listener
}

// release gives the port back; it may be called more than once.
func (l *portLease) release() {
	if l != nil && l.holder != nil {
		_ = l.holder.Close() // A listener fails to close only when it is closed already.
	}
}

// leasePort reserves one port. It fails when another program holds the lease.
func leasePort(port int) (*portLease, error) {
	holder, err := net.Listen("unix", "@duri-pgcluster-port-"+strconv.Itoa(port))
	if err != nil {
		return nil, err
	}
	return &portLease{port: port, holder: holder}, nil
}

// Ports are chosen between these two, less the range of ephemeral ports.
const (
	portMin = 20000
	portMax = 65535
)

// leaseFreePort chooses and reserves a port that nobody listens on. It keeps out of the kernel's ephemeral range:
// there any outgoing connection may take the port of a server that is down for a moment.
func leaseFreePort() (*portLease, error) {
	lo, hi := portRange(ephemeralRange())
	const attempts = 200
	for range attempts {
		port := lo + rand.IntN(hi-lo+1)
		lease, err := leasePort(port)
		if err != nil {
			continue
		}
		if checkPortFree(port) == nil {
			return lease, nil
		}
		lease.release()
	}
	return nil, &Error{
		"choose a port", fmt.Errorf("%d random ports between %d and %d are all in use", attempts, lo, hi),
		"name a free port.",
	}
}

// ephemeralRange reads the kernel's range of ports for outgoing connections; its default when it cannot be read.
func ephemeralRange() (lo, hi int) {
	const defaultLo, defaultHi = 32768, 60999
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return defaultLo, defaultHi
	}
	f := strings.Fields(string(b))
	if len(f) != 2 {
		return defaultLo, defaultHi
	}
	lo, err1 := strconv.Atoi(f[0])
	hi, err2 := strconv.Atoi(f[1])
	if err1 != nil || err2 != nil || lo > hi {
		return defaultLo, defaultHi
	}
	return lo, hi
}

// portRange picks the larger part of [portMin, portMax] outside the ephemeral range [lo, hi]; all of it when too
// little remains.
func portRange(lo, hi int) (from, to int) {
	below, above := lo-portMin, portMax-hi
	const enough = 500
	switch {
	case below >= above && below >= enough:
		return portMin, min(lo-1, portMax)
	case above >= enough:
		return max(hi+1, portMin), portMax
	}
	return portMin, portMax
}

// checkPortFree tries to listen on the port. The error is ErrPortInUse when another program listens.
func checkPortFree(port int) error {
	l, err := net.Listen("tcp4", "127.0.0.1:"+strconv.Itoa(port))
	if err != nil {
		if errors.Is(err, syscall.EADDRINUSE) {
			return &Error{
				fmt.Sprintf("listen on 127.0.0.1:%d", port), ErrPortInUse,
				fmt.Sprintf("choose another port, or see who listens there: ss -ltnp 'sport = :%d'.", port),
			}
		}
		return fmt.Errorf("listen on 127.0.0.1:%d: %w", port, err)
	}
	return l.Close()
}
