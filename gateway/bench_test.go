package gateway

import (
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/sha256"
	"net"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/duri-io/duri/pgwire"
	"github.com/duri-io/duri/pgwire/scram"
)

// quickServer answers each statement with one row, but the gateway's longest question with none, and does no work. It trusts everybody.
func quickServer(b *testing.B) Target {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go answerQuickly(c)
		}
	}()
	return Target{Site: "quick", Network: "tcp", Address: l.Addr().String()}
}

func answerQuickly(c net.Conn) {
	defer c.Close()
	if _, err := pgwire.ReadStartup(c); err != nil {
		return
	}
	w := pgwire.NewWriter(c)
	hello := pgwire.AppendAuth(nil, pgwire.AuthOK, nil)
	hello = pgwire.AppendParameterStatus(hello, pgwire.Param{Name: "server_version", Value: "15.18"})
	hello = pgwire.AppendParameterStatus(hello, pgwire.Param{Name: "standard_conforming_strings", Value: "on"})
	hello = pgwire.AppendBackendKeyData(hello, 1, []byte("four"))
	ready := pgwire.AppendReadyForQuery(nil, pgwire.Idle)
	row := pgwire.AppendMessage(nil, pgwire.DataRow, []byte{0, 1, 0, 0, 0, 4, 0, 0, 0, 1})
	done := pgwire.AppendMessage(nil, pgwire.CommandComplete, []byte("SELECT 1\x00"))
	answers := map[byte][]byte{
		pgwire.Parse:    pgwire.AppendMessage(nil, pgwire.ParseComplete, nil),
		pgwire.Bind:     pgwire.AppendMessage(nil, pgwire.BindComplete, nil),
		pgwire.Close:    pgwire.AppendMessage(nil, pgwire.CloseComplete, nil),
		pgwire.Describe: pgwire.AppendMessage(nil, pgwire.NoData, nil),
		pgwire.Execute:  append(row, done...),
		pgwire.Sync:     ready,
		pgwire.Query:    append(append(append([]byte{}, row...), done...), ready...),
	}
	none := append(slices.Clone(done), ready...)
	_ = w.Write(hello)
	_ = w.Write(ready)
	if w.Flush() != nil {
		return
	}
	r := pgwire.NewReader(c)
	for {
		typ, _, err := r.Next(pgwire.FromClient)
		if err != nil {
			return
		}
		answer := answers[typ]
		if typ == pgwire.Query && r.Left() > len(taintSQL) {
			answer = none // nothing here writes without showing it
		}
		_ = w.Write(answer)
		if (typ == pgwire.Sync || typ == pgwire.Query || typ == pgwire.Flush) && w.Flush() != nil {
			return
		}
	}
}

type oneVerifier scram.Verifier

func (v *oneVerifier) Verifier(context.Context, string) (*scram.Verifier, error) {
	return (*scram.Verifier)(v), nil
}

// connected logs in at a gateway before a quickServer and gives the client's bare connection.
func connected(b *testing.B, c Config) net.Conn {
	b.Helper()
	return connector(b, c)()
}

func connector(b *testing.B, c Config) (connect func() net.Conn) {
	b.Helper()
	salted, err := pbkdf2.Key(sha256.New, appPassword, []byte("salt"), 1, sha256.Size)
	if err != nil {
		b.Fatal(err)
	}
	key := hmac256(salted, "Client Key")
	v := &oneVerifier{Salt: []byte("salt"), Iterations: 1, StoredKey: sha256.Sum256(key), ServerKey: scram.Key(hmac256(salted, "Server Key"))}
	c.ClientsMax, c.Verifiers, c.Router = 10_000, v, &routes{targets: []Target{quickServer(b)}}
	_, addr := serve(b, c)
	return func() net.Conn {
		conn, err := pgconn.Connect(b.Context(), dsn(addr, ""))
		if err != nil {
			b.Fatal(err)
		}
		h, err := conn.Hijack()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { h.Conn.Close() })
		return h.Conn
	}
}

// exchange sends a request until the benchmark ends and waits for ReadyForQuery each time.
func exchange(b *testing.B, c net.Conn, request []byte) {
	b.Helper()
	r := pgwire.NewReader(c)
	once := func() {
		if _, err := c.Write(request); err != nil {
			b.Fatal(err)
		}
		for {
			typ, _, err := r.Next(pgwire.FromServer)
			if err != nil || typ == pgwire.ErrorResponse {
				b.Fatal(string(typ), err)
			}
			if typ == pgwire.ReadyForQuery {
				return
			}
		}
	}
	for range 100 { // Buffers come into their pools.
		once()
	}
	b.ReportAllocs()
	before := cpu(b)
	for b.Loop() {
		once()
	}
	// Of client, gateway and server together; what is more than direct is the gateway's. It says more than the time on a
	// machine that does other things as well.
	b.ReportMetric(float64((cpu(b)-before).Nanoseconds())/1000/float64(b.N), "cpu-us/op")
}

// cpu is what this process has used.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkIdleClient tells how many bytes a client costs that does nothing.
func BenchmarkIdleClient(b *testing.B) {
	for name, mode := range map[string]Mode{"session": SessionMode, "transaction": TransactionMode} {
		b.Run(name, func(b *testing.B) {
			connect := connector(b, Config{Mode: mode})
			for range 10 {
				connect()
			}
			before := memory()
			n := 0
			for b.Loop() {
				connect()
				n++
			}
			b.ReportMetric((memory()-before)/float64(n), "B/client")
		})
	}
}

func memory() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapInuse + m.StackInuse)
}

// BenchmarkLogin is a client that connects, has one statement answered, and leaves.
func BenchmarkLogin(b *testing.B) {
	for name, c := range map[string]Config{"transaction": {Mode: TransactionMode}, "sites": {Mode: TransactionMode, Sites: &knowing{}}} {
		b.Run(name, func(b *testing.B) {
			connect := connector(b, c)
			query, end := pgwire.AppendQuery(nil, "SELECT 1"), pgwire.AppendHeader(nil, pgwire.Terminate, 0)
			b.ReportAllocs()
			before := cpu(b)
			for b.Loop() {
				conn := connect()
				if _, err := conn.Write(query); err != nil {
					b.Fatal(err)
				}
				for r := pgwire.NewReader(conn); ; {
					if typ, _, err := r.Next(pgwire.FromServer); err != nil {
						b.Fatal(err)
					} else if typ == pgwire.ReadyForQuery {
						break
					}
				}
				if _, err := conn.Write(end); err != nil {
					b.Fatal(err)
				}
				if err := conn.Close(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64((cpu(b)-before).Nanoseconds())/1000/float64(b.N), "cpu-us/op") // of client and gateway together
		})
	}
}

// BenchmarkExchange is one statement from client to server and back over loopback: 4 messages forwarded for a simple one, 7
// for a prepared one. Client and server run in the same process and allocate nothing. "direct" is without a gateway.
func BenchmarkExchange(b *testing.B) {
	const reading, writing = "SELECT abalance FROM pgbench_accounts WHERE aid = $1", "UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = $1"
	simple := func(sql string) []byte { return pgwire.AppendQuery(nil, strings.ReplaceAll(sql, "$1", "4711")) }
	parse := func(sql string) []byte {
		return pgwire.AppendMessage(pgwire.AppendParse(nil, "p", []byte(sql), []byte{0, 0}), pgwire.Sync, nil)
	}
	var prepared []byte
	for _, m := range []pgproto3.FrontendMessage{&pgproto3.Bind{PreparedStatement: "p", Parameters: [][]byte{[]byte("4711")}}, &pgproto3.Execute{}, &pgproto3.Sync{}} {
		var err error
		if prepared, err = m.Encode(prepared); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("direct", func(b *testing.B) {
		c, err := net.Dial("tcp", quickServer(b).Address)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Close() })
		if _, err := c.Write(pgwire.AppendStartup(nil, nil)); err != nil {
			b.Fatal(err)
		}
		for r := pgwire.NewReader(c); ; {
			if typ, _, err := r.Next(pgwire.FromServer); err != nil {
				b.Fatal(err)
			} else if typ == pgwire.ReadyForQuery {
				break
			}
		}
		exchange(b, c, simple(reading))
	})
	for _, way := range []struct {
		name, sql string
		config    Config
	}{
		{"session", reading, Config{Mode: SessionMode}},
		{"transaction", reading, Config{Mode: TransactionMode}},
		{"sites", reading, Config{Mode: TransactionMode, Sites: &knowing{}}},
		{"sites-writing", writing, Config{Mode: TransactionMode, Sites: &knowing{}}},
	} {
		b.Run("simple/"+way.name, func(b *testing.B) { exchange(b, connected(b, way.config), simple(way.sql)) })
		b.Run("prepared/"+way.name, func(b *testing.B) {
			c := connected(b, way.config)
			if _, err := c.Write(parse(way.sql)); err != nil {
				b.Fatal(err)
			}
			for r := pgwire.NewReader(c); ; {
				if typ, _, err := r.Next(pgwire.FromServer); err != nil {
					b.Fatal(err)
				} else if typ == pgwire.ReadyForQuery {
					break
				}
			}
			exchange(b, c, prepared)
		})
	}
}

// TestForwardingDoesNotAllocate: in steady state, whatever the mode.
func TestForwardingDoesNotAllocate(t *testing.T) {
	res := testing.Benchmark(func(b *testing.B) {
		exchange(b, connected(b, Config{Mode: TransactionMode}), pgwire.AppendQuery(nil, "SELECT 1"))
	})
	if n := res.AllocsPerOp(); n > 0 && !raceEnabled {
		t.Errorf("%d allocations per statement (%v)", n, res)
	}
}

func hmac256(key []byte, message string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(message))
	return h.Sum(nil)
}
