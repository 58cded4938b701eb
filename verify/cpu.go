package verify

import (
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// cpuTime reads the CPU time that a connection's server process has used, where that is a process of this machine, as it
// is when the agent stands beside its server: from /proc, to the nanosecond. ok is false elsewhere. SQL does not tell it.
func cpuTime(c *pgconn.PgConn) (used time.Duration, ok bool) {
	if !local(c.Conn().RemoteAddr()) {
		return 0, false
	}
	dir := fmt.Sprintf("/proc/%d/", c.PID())
	// Behind a forwarded port, or in another container, the number is another process's or nobody's.
	if name, err := os.ReadFile(dir + "comm"); err != nil || !strings.HasPrefix(string(name), "postgres") {
		return 0, false
	}
	stat, err := os.ReadFile(dir + "schedstat")
	if err != nil {
		return 0, false
	}
	_, err = fmt.Sscan(string(stat), &used) // nanoseconds on a CPU, then others
	return used, err == nil
}

// local reports that an address is on this machine.
func local(a net.Addr) bool {
	switch a := a.(type) {
	case *net.UnixAddr:
		return true
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	}
	return false
}

// effort is what statements have cost their server.
type effort struct {
	took    time.Duration // as seen from here
	cpu     time.Duration
	unknown bool // cpu does not hold everything
}

// add measures one statement: call it before, and what it gives after.
func (e *effort) add(c *pgconn.PgConn) (done func()) {
	began := time.Now()
	before, ok := cpuTime(c)
	return func() {
		took := time.Since(began)
		e.took += took
		after, still := cpuTime(c)
		cpu := after - before
		if !ok || !still || cpu <= 0 || cpu > took { // a process works on one core: it was another one's time
			e.unknown = true
			return
		}
		e.cpu += cpu
	}
}
