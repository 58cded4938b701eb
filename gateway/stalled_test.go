package gateway

import (
	"net"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// stalled is a server that takes connections and never says anything, as one whose processes are stopped.
func stalled(t *testing.T) Target {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var conns []net.Conn
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		for _, c := range conns {
			c.Close()
		}
	})
	return Target{Site: "stalled", Network: "tcp", Address: l.Addr().String()}
}

// TestAServerThatSaysNothingIsGivenUp: in time to go on elsewhere, and never later than a session waits for anything.
func TestAServerThatSaysNothingIsGivenUp(t *testing.T) {
	const hold = 1500 * time.Millisecond
	c := site(t, "")
	silent, fine := stalled(t), target(c, "fine")
	r := &routes{targets: []Target{fine}}
	_, addr := serve(t, Config{Mode: TransactionMode, Router: r, Sites: &knowing{c: c}, HoldMax: hold}, c)
	conn := open1(t, dsn(addr, "default_query_exec_mode=simple_protocol"))
	r.set(silent, fine) // one after the other
	begun := time.Now()
	exec1(t, conn, "SELECT 1")
	exec1(t, conn, "SELECT 1")
	if took := time.Since(begun); took < hold/3 || took >= hold {
		t.Errorf("a session that has begun went on after %v", took)
	}
	r.set(silent)
	begun = time.Now()
	_, err := pgx.Connect(t.Context(), dsn(addr, ""))
	wantCode(t, "a new client", err, "57P03", "cannot be reached")
	if took := time.Since(begun); took < hold || took > 2*hold {
		t.Errorf("a new client was refused after %v", took)
	}
	begun = time.Now()
	_, err = conn.Exec(t.Context(), "SELECT 1")
	wantCode(t, "a session that has begun", err, "57P03", "cannot be reached")
	if took := time.Since(begun); took < hold || took > 2*hold {
		t.Errorf("a session that has begun ended after %v", took)
	}
}

// TestANewClientGetsAnotherServer: when the connection to the first one breaks.
func TestANewClientGetsAnotherServer(t *testing.T) {
	c := site(t, "")
	relay := newCutter(t, target(c, "").Address)
	relayed := Target{Site: "a", Network: "tcp", Address: relay.l.Addr().String()}
	r := &routes{targets: []Target{relayed}}
	g, addr := serve(t, Config{Mode: TransactionMode, Router: r, Sites: &knowing{c: c}}, c)
	for bytes := range int64(40) { // of the login that come through
		g.Retire("a")
		relay.after(bytes * 10)
		r.set(relayed, target(c, "b"))
		exec1(t, open1(t, dsn(addr, "")), "SELECT 1")
	}
}
