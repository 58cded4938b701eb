package gateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/pgwire"
)

// Clients that mean ill. None of them gets in without a password, and none disturbs another.

// raw connects without a login. What the test does not read within a minute fails.
func raw(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	return c.(*net.TCPConn)
}

// hijacked logs in and gives the bare connection.
func hijacked(t testing.TB, addr string) net.Conn {
	t.Helper()
	c, err := pgconn.Connect(t.Context(), dsn(addr, ""))
	if err != nil {
		t.Fatal(err)
	}
	h, err := c.Hijack()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Conn.Close() })
	_ = h.Conn.SetDeadline(time.Now().Add(time.Minute))
	return h.Conn
}

func startup(user string) []byte {
	return pgwire.AppendStartup(nil, []pgwire.Param{{Name: "user", Value: user}, {Name: "database", Value: "shop"}})
}

// rest reads until the other side closes.
func rest(c net.Conn) []byte {
	b, _ := io.ReadAll(c) // a reset is an end as well
	return b
}

// undisturbed is a session whose settings, and what else a backend could have from others, must stay as they are.
type undisturbed struct{ c *pgx.Conn }

func newUndisturbed(t testing.TB, addr string) undisturbed {
	t.Helper()
	c := open1(t, dsn(addr, "default_query_exec_mode=exec"))
	exec1(t, c, "SET app.user_id = 'mine'")
	return undisturbed{c}
}

func (u undisturbed) check(t testing.TB) {
	t.Helper()
	const sql = `SELECT current_setting('app.user_id') || ' ' || current_user || ' ' || current_setting('work_mem') || ' ' || coalesce(current_setting('app.evil', true), '')
		|| ' ' || (SELECT count(*) FROM pg_listening_channels()) || (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())
		|| (SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema()) || (SELECT count(*) FROM pg_cursors WHERE is_holdable)`
	if got := value[string](t, u.c, sql); got != "mine app 4MB  0000" {
		t.Errorf("the neighbour has %q", got)
	}
}

// TestNobodyGetsPastTheLogin: no order of messages makes the gateway take a client as authenticated, or open a connection for it.
func TestNobodyGetsPastTheLogin(t *testing.T) {
	c := site(t, "")
	r := &routes{targets: []Target{target(c, "a")}}
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			_, addr := serve(t, Config{Mode: mode, Router: r}, c)
			query := pgwire.AppendQuery(nil, "CREATE TABLE got_in(a int)")
			initial := pgwire.AppendSASLInitial(nil, "SCRAM-SHA-256", []byte("n,,n=,r=abcdefghijklmnop"))
			final := pgwire.AppendMessage(nil, pgwire.SASLResponse, []byte("c=biws,r=abcdefghijklmnop,p=AAAA"))
			ok := pgwire.AppendAuth(nil, pgwire.AuthOK, nil)
			cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
			for what, send := range map[string][]byte{
				"a query at once":               cat(startup(appUser), query),
				"a query instead of the proof":  cat(startup(appUser), initial, query),
				"a proof that is none":          cat(startup(appUser), initial, final, query),
				"proofs until one fits":         cat(startup(appUser), initial, final, final, final, query),
				"the proof first":               cat(startup(appUser), final, query),
				"an empty proof":                cat(startup(appUser), initial, pgwire.AppendMessage(nil, pgwire.SASLResponse, nil), query),
				"the start of it all over":      cat(startup(appUser), initial, initial, final, query),
				"another method":                cat(startup(appUser), pgwire.AppendSASLInitial(nil, "PLAIN", []byte("\x00app\x00"+appPassword)), query),
				"channel binding without TLS":   cat(startup(appUser), pgwire.AppendSASLInitial(nil, "SCRAM-SHA-256-PLUS", []byte("p=tls-server-end-point,,n=,r=abcdefghijklmnop")), query),
				"the server's word":             cat(startup(appUser), ok, query),
				"a second startup packet":       cat(startup("nobody"), startup(appUser), query),
				"a password in plain text":      cat(startup(appUser), pgwire.AppendMessage(nil, pgwire.SASLResponse, append([]byte(appPassword), 0)), query),
				"the superuser, who has none":   cat(startup("postgres"), initial, final, query),
				"nobody":                        cat(startup(""), query),
				"a reserved name":               cat(pgwire.AppendStartup(nil, []pgwire.Param{{Name: "user", Value: "nobody"}, {Name: "user", Value: appUser}}), query),
				"Terminate and on":              cat(startup(appUser), pgwire.AppendMessage(nil, pgwire.Terminate, nil), query),
				"a long SASL message":           cat(startup(appUser), pgwire.AppendMessage(nil, pgwire.SASLResponse, make([]byte, 1<<20))),
				"an announcement of 2 GB":       cat(startup(appUser), []byte{'p', 0x7f, 0xff, 0xff, 0xff}),
				"a negative length":             cat(startup(appUser), []byte{'p', 0xff, 0xff, 0xff, 0xff}),
				"a startup packet of 2 GB":      {0x7f, 0xff, 0xff, 0xff, 0, 3, 0, 0},
				"a startup packet that is HTTP": []byte("GET / HTTP/1.1\r\nHost: gateway\r\n\r\n"),
				"TLS where there is none":       {22, 3, 1, 0, 5, 1, 0, 0, 1, 0},
			} {
				conn := raw(t, addr)
				_, _ = conn.Write(send)
				_ = conn.CloseWrite()
				got := rest(conn)
				if bytes.Contains(got, ok) || bytes.Contains(got, []byte{'Z', 0, 0, 0, 5}) {
					t.Errorf("%s: %q", what, got)
				}
			}
		})
	}
	if r.calls != 0 {
		t.Errorf("%d times a server was asked for", r.calls)
	}
	if n := pgtest.Query(t, c, "shop", "SELECT count(*) FROM pg_class WHERE relname = 'got_in'")[0][0]; n != "0" {
		t.Error("a query was carried out")
	}
}

// TestGarbageAfterTheLogin: whatever bytes come, the session at most ends, and its neighbour in the same pool notices nothing.
func TestGarbageAfterTheLogin(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	c := markable(t)
	_, addr := serve(t, Config{Mode: TransactionMode, PoolMax: 2, Sites: &knowing{c: c}, HoldMax: 10 * time.Second}, c)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(pgtest.Query(t, c, "postgres", "SELECT pid, state, wait_event, query FROM pg_stat_activity WHERE usename = 'app'"))
		}
	})
	neighbour := newUndisturbed(t, addr)
	good := [][]byte{
		pgwire.AppendQuery(nil, "SET app.user_id = 'evil'; SET app.evil = 'x'; SET work_mem = '7MB'"), pgwire.AppendQuery(nil, "BEGIN; SET LOCAL work_mem = '8MB'"),
		pgwire.AppendQuery(nil, "CREATE TEMP TABLE evil(a int); LISTEN evil; SELECT pg_advisory_lock(1)"), pgwire.AppendQuery(nil, "SELECT 1/0"),
		pgwire.AppendQuery(nil, "INSERT INTO ledger VALUES (1, 1); SELECT 1"), pgwire.AppendQuery(nil, "COPY ledger FROM STDIN"), pgwire.AppendQuery(nil, "COPY ledger TO STDOUT"),
		pgwire.AppendQuery(nil, "DECLARE evil CURSOR WITH HOLD FOR SELECT 1"), pgwire.AppendQuery(nil, "PREPARE evil AS SELECT 1"), pgwire.AppendQuery(nil, "SET ROLE pg_monitor"),
		pgwire.AppendParse(nil, "s", []byte("SELECT set_config('app.user_id', 'evil', false)"), []byte{0, 0}), appendBind(nil, "s"), appendBind(nil, ""), appendExecute(nil),
		pgwire.AppendParse(nil, "", []byte("INSERT INTO ledger VALUES (2, 2)"), []byte{0, 0}), pgwire.AppendTarget(nil, pgwire.Describe, 'S', "s"),
		pgwire.AppendTarget(nil, pgwire.Describe, 'P', ""), pgwire.AppendTarget(nil, pgwire.Close, 'S', "s"), pgwire.AppendHeader(nil, pgwire.Sync, 0), pgwire.AppendHeader(nil, pgwire.Sync, 0),
		pgwire.AppendHeader(nil, pgwire.Flush, 0), pgwire.AppendMessage(nil, pgwire.CopyData, []byte("1\t2\n")), pgwire.AppendMessage(nil, pgwire.CopyDone, nil),
		pgwire.AppendMessage(nil, pgwire.CopyFail, []byte("no\x00")), pgwire.AppendMessage(nil, pgwire.FunctionCall, make([]byte, 14)), pgwire.AppendQuery(nil, "ROLLBACK"),
	}
	const rounds = 120
	for round := range rounds {
		conn := hijacked(t, addr)
		var send []byte
		for range 1 + rnd.IntN(12) {
			m := bytes.Clone(good[rnd.IntN(len(good))])
			switch rnd.IntN(6) {
			case 0: // some byte of it is another
				m[rnd.IntN(len(m))] = byte(rnd.Uint32())
			case 1: // its length is another
				binary.BigEndian.PutUint32(m[1:], rnd.Uint32()>>rnd.IntN(32))
			case 2: // it is cut off
				m = m[:rnd.IntN(len(m))]
			}
			send = append(send, m...)
		}
		// A client that does not read its answers must not wait for its requests to be taken.
		read := make(chan struct{})
		go func() {
			defer close(read)
			_, _ = io.Copy(io.Discard, conn)
		}()
		_, _ = conn.Write(send)
		switch c := conn.(*net.TCPConn); rnd.IntN(3) {
		case 0:
			_ = c.SetLinger(0) // a reset
		case 1:
			_ = c.CloseWrite()
		}
		_ = conn.Close()
		<-read
		if round%10 == 0 {
			neighbour.check(t)
		}
	}
	neighbour.check(t)
	until(t, "the neighbour is alone", func() bool {
		return pgtest.Query(t, c, "shop", "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND state <> 'idle'")[0][0] == "0"
	})
}

// TestAnnouncedLengthsReserveNothing: what a client announces and does not send costs one buffer.
func TestAnnouncedLengthsReserveNothing(t *testing.T) {
	c := site(t, "")
	_, addr := serve(t, Config{Mode: TransactionMode}, c)
	before := memory()
	var all []net.Conn
	for _, typ := range []byte("QPBFdEDCS") {
		for range 4 {
			conn := hijacked(t, addr)
			_, _ = conn.Write([]byte{typ, 0x3f, 0xff, 0xff, 0xf0})
			_, _ = conn.Write([]byte("SELECT 1"))
			all = append(all, conn)
		}
	}
	if value[int](t, open1(t, dsn(addr, "")), "SELECT 1") != 1 {
		t.Error("no answer")
	}
	if used := memory() - before; used > 20<<20 {
		t.Errorf("%d clients that announced 1 GB cost %.0f bytes", len(all), used)
	}
}

// TestSlowLogins: who does not log in within LoginMax is out, however slowly it sends; who has logged in may take its time.
func TestSlowLogins(t *testing.T) {
	c := site(t, "")
	cert, _, _, _ := certificate(t)
	_, addr := serve(t, Config{Mode: TransactionMode, LoginMax: 700 * time.Millisecond, TLS: &tls.Config{Certificates: []tls.Certificate{cert}}}, c)
	patient := hijacked(t, addr)
	tlsHello := append([]byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3}, make([]byte, 505)...)
	var wg sync.WaitGroup
	for name, message := range map[string][]byte{
		"nothing": nil, "startup": startup(appUser), "TLS": tlsHello,
		"request for TLS": append(pgwire.AppendSSLRequest(nil), tlsHello...), "SASL": append(startup(appUser), 'p', 0, 0, 4, 0),
	} {
		wg.Go(func() {
			conn := raw(t, addr)
			begin := time.Now()
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				rest(conn)
			}()
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for i := 0; ; i++ {
				select {
				case <-ended:
					if d := time.Since(begin); d < 600*time.Millisecond || d > 20*time.Second {
						t.Errorf("%s: it ended after %v", name, d)
					}
					return
				case <-tick.C:
					if i < len(message) {
						_, _ = conn.Write(message[i : i+1])
					}
				}
			}
		})
	}
	wg.Wait()
	for _, b := range pgwire.AppendQuery(nil, "SELECT 42") { // each byte alone
		if _, err := patient.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
		runtime.Gosched()
	}
	r := pgwire.NewReader(patient)
	for {
		typ, _, err := r.Next(pgwire.FromServer)
		if err != nil {
			t.Fatal(err)
		}
		if typ == pgwire.ReadyForQuery {
			break
		}
	}
}

// TestWrongPasswordsAtSpeed: they are refused, all of them, and others log in meanwhile.
func TestWrongPasswordsAtSpeed(t *testing.T) {
	c := site(t, "")
	g, addr := serve(t, Config{Mode: TransactionMode}, c)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 25 {
				conn, err := pgconn.Connect(context.Background(), dsn(addr, fmt.Sprintf("password=wrong%d user=app%d", i, i%2)))
				if e, ok := errors.AsType[*pgconn.PgError](err); !ok || e.Code != "28P01" && e.Code != "53400" {
					t.Errorf("%v", err)
				}
				if err == nil {
					conn.Close(context.Background())
				}
			}
		})
	}
	for range 5 {
		conn, err := pgconn.Connect(t.Context(), dsn(addr, ""))
		if err != nil {
			t.Fatal("the right password:", err)
		}
		conn.Close(context.Background())
	}
	wg.Wait()
	until(t, "all connections are gone", func() bool { _, n, _ := g.Status(); return n == 0 })
}

// TestOthersQueriesCannotBeCancelled: the process id alone is not enough, however often it is tried.
func TestOthersQueriesCannotBeCancelled(t *testing.T) {
	c := site(t, "")
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			_, addr := serve(t, Config{Mode: mode}, c)
			conn := open1(t, dsn(addr, ""))
			pid := conn.PgConn().PID()
			done := make(chan error, 1)
			go func() {
				_, err := conn.Exec(context.Background(), "SELECT pg_sleep(2), 'victim'")
				done <- err
			}()
			until(t, "it runs", func() bool {
				return pgtest.Query(t, c, "postgres", "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%victim%' AND wait_event = 'PgSleep'")[0][0] == "1"
			})
			for i := range 300 {
				secret := make([]byte, []int{4, 4, 0, 3, 32}[i%5])
				binary.BigEndian.PutUint32(append(secret, 0, 0, 0, 0), uint32(i))
				attack := raw(t, addr)
				_, _ = attack.Write(pgwire.AppendCancel(nil, pid, secret))
				if got := rest(attack); len(got) > 0 {
					t.Errorf("a request to cancel was answered: %q", got)
				}
				attack.Close()
			}
			if err := <-done; err != nil {
				t.Error("it was cancelled:", err)
			}
		})
	}
}

// TestAClientThatDoesNotReadHoldsUpNobody: what it has asked for waits at the server, not in the gateway.
func TestAClientThatDoesNotReadHoldsUpNobody(t *testing.T) {
	c := markable(t)
	for name, sites := range map[string]Sites{"ending with its server": nil, "outliving it": &knowing{c: c}} {
		t.Run(name, func(t *testing.T) {
			_, addr := serve(t, Config{Mode: TransactionMode, PoolMax: 3, Sites: sites}, c)
			before := memory()
			for _, m := range [][]byte{
				pgwire.AppendQuery(nil, "SELECT repeat('x', 1000) FROM generate_series(1, 1000000)"),
				// And one that never stops asking.
				bytes.Repeat(pgwire.AppendQuery(nil, "SELECT repeat('y', 100000)"), 2000),
			} {
				conn := hijacked(t, addr)
				go func() { _, _ = conn.Write(m) }()
			}
			until(t, "both wait", func() bool {
				return pgtest.Query(t, c, "postgres", "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ClientWrite'")[0][0] == "2"
			})
			other := open1(t, dsn(addr, ""))
			for i := range 100 {
				if got := value[int](t, other, "SELECT $1::int", i); got != i {
					t.Fatal(got)
				}
			}
			if used := memory() - before; used > 30<<20 {
				t.Errorf("it costs %.0f bytes", used)
			}
		})
	}
}

// TestStrangersKeepNobodyOut: thousands that connect and say nothing are limited, clients log in meanwhile, and in the end
// nothing is left of them.
func TestStrangersKeepNobodyOut(t *testing.T) {
	c := site(t, "")
	const most = 100
	g, addr := serve(t, Config{Mode: TransactionMode, ClientsMax: most}, c)
	client := open1(t, dsn(addr, ""))
	memoryBefore, goroutines := memory(), runtime.NumGoroutine()
	var strangers []net.Conn
	for i := range 2000 {
		s, err := net.Dial("tcp", addr) // not by raw, whose cleanup would keep it in memory
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if i%2 == 0 {
			_, _ = s.Write(startup(appUser)) // and then nothing
		}
		strangers = append(strangers, s)
		if i%500 == 250 {
			if value[int](t, open1(t, dsn(addr, "")), "SELECT 1") != 1 || value[int](t, client, "SELECT 1") != 1 {
				t.Error("no answer")
			}
		}
	}
	until(t, "the oldest are gone", func() bool { _, n, _ := g.Status(); return n <= most+10 })
	for i := range strangers {
		strangers[i].Close()
	}
	until(t, "all are gone", func() bool { _, n, _ := g.Status(); return n == 5 }) // the clients
	until(t, "their goroutines as well", func() bool { return runtime.NumGoroutine() <= goroutines+20 })
	used := memory() - memoryBefore
	if used > 12<<20 { // a buffer and a stack of each would be 40 MB
		t.Errorf("%.0f bytes are left of them", used)
	}
	t.Logf("%.0f bytes are left of %d strangers, this test's own included", used, len(strangers))
}

// TestHalfOpenConnections: clients that vanish in the middle leave nothing behind, at the server neither.
func TestHalfOpenConnections(t *testing.T) {
	c := markable(t)
	g, addr := serve(t, Config{Mode: TransactionMode, PoolMax: 2, Sites: &knowing{c: c}}, c)
	neighbour := newUndisturbed(t, addr)
	insert := pgwire.AppendQuery(nil, "BEGIN; INSERT INTO ledger VALUES (9, 9); SET app.evil = 'x'; SELECT pg_advisory_lock(7)")
	for i := range 40 {
		conn := hijacked(t, addr).(*net.TCPConn)
		_, _ = conn.Write(insert)
		r := pgwire.NewReader(conn)
		for typ := byte(0); typ != pgwire.ReadyForQuery; {
			var err error
			if typ, _, err = r.Next(pgwire.FromServer); err != nil {
				t.Fatal(err)
			}
		}
		m := pgwire.AppendQuery(nil, "COMMIT")
		_, _ = conn.Write(m[:rand.IntN(len(m))]) // not the whole of it
		_ = conn.SetLinger(i % 2 * -1)           // a reset, or not
		conn.Close()
		neighbour.check(t)
	}
	until(t, "the server has ended them", func() bool { _, n, _ := g.Status(); return n == 1 && count(t, c, "true") == "0" })
	until(t, "their locks are free", func() bool {
		return pgtest.Query(t, c, "shop", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")[0][0] == "0"
	})
}
