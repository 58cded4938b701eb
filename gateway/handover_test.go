package gateway

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/pgwire"
)

// relayed is a gateway in this process that can be handed over to another one.
type relayed struct {
	g    *Server
	l    *Listener
	stop context.CancelFunc
	done chan error
}

func serveOn(t *testing.T, cfg Config, l *Listener, prepare func(*Server)) *relayed {
	t.Helper()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	g, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	prepare(g)
	g.Open()
	ctx, cancel := context.WithCancel(context.Background())
	r := &relayed{g, l, cancel, make(chan error, 1)}
	go func() { r.done <- g.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-r.done; err != nil {
			t.Error(err)
		}
	})
	return r
}

func listenable(t *testing.T) *Listener {
	t.Helper()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := NewListener(tcp)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// unixPair is a connected pair of sockets.
func unixPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	dir, err := os.MkdirTemp("", "duri")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Close()
		_ = s.Close()
	})
	return c.(*net.UnixConn), s.(*net.UnixConn)
}

// handOn hands a gateway over to a new one, which it gives; ended tells how the old one's part has ended.
func (r *relayed) handOn(t *testing.T, cfg Config, drain time.Duration) (next *relayed, ended chan error) {
	t.Helper()
	a, b := unixPair(t)
	ended = make(chan error, 1)
	go func() {
		err := r.g.HandOver(t.Context(), a, HandOver{Listeners: []*Listener{r.l}, Drain: drain})
		if err == nil {
			r.stop()
		}
		ended <- err
	}()
	tk, err := TakeOver(b)
	if err != nil {
		t.Fatal(err)
	}
	next = serveOn(t, cfg, tk.Listeners[0], tk.Prepare)
	ran := make(chan error, 1)
	go func() { ran <- tk.Run(t.Context(), next.g) }()
	t.Cleanup(func() {
		if err := <-ran; err != nil {
			t.Errorf("the new process: %v", err)
		}
	})
	return next, ended
}

func clustered(c ...*pgcluster.Cluster) Config {
	r := &routes{}
	for i, c := range c {
		r.targets = append(r.targets, target(c, string(rune('a'+i))))
	}
	return Config{Mode: TransactionMode, Router: r, Verifiers: verifiers{c[0]}}
}

// said is a log that may be written to at any time.
type said struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *said) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// tells reports whether a key is in the log, in any form in which it may have got there.
func (s *said) tells(key []byte) bool {
	text := s.text()
	for _, form := range []string{string(key), hex.EncodeToString(key), base64.StdEncoding.EncodeToString(key), strings.Trim(fmt.Sprintf("%d", key), "[]"), fmt.Sprintf("%q", key)} {
		if strings.Contains(text, form) {
			return true
		}
	}
	return false
}

// writer writes numbered rows over one connection without a pause, and notes the first error.
type writer struct {
	conn *pgx.Conn
	n    int
	seq  int
	port string
	err  error
}

func (w *writer) run(ctx context.Context, stop *atomic.Bool) {
	for !stop.Load() && w.err == nil {
		var own string
		switch w.seq % 3 {
		case 0:
			w.err = w.conn.QueryRow(ctx, "INSERT INTO ledger VALUES ($1, $2) RETURNING current_setting('app.client')", w.n, w.seq+1).Scan(&own)
		case 1:
			_, w.err = w.conn.Exec(ctx, fmt.Sprintf("INSERT INTO ledger VALUES (%d, %d)", w.n, w.seq+1), pgx.QueryExecModeSimpleProtocol)
		default:
			w.err = pgx.BeginFunc(ctx, w.conn, func(tx pgx.Tx) error {
				_, err := tx.Exec(ctx, "INSERT INTO ledger VALUES ($1, $2)", w.n, w.seq+1)
				return errors.Join(err, tx.QueryRow(ctx, "SELECT current_setting('app.client')").Scan(&own))
			})
		}
		if w.err == nil && own != "" && own != fmt.Sprint(w.n) {
			w.err = fmt.Errorf("client %d has the settings of %s", w.n, own)
		}
		if w.err == nil {
			w.seq++
		}
	}
}

// TestClientsAreHandedOver: clients that write without a pause go on in another gateway, and another one, over the connections
// that they have; who cannot is asked to leave.
func TestClientsAreHandedOver(t *testing.T) {
	c := site(t, "")
	pgtest.Exec(t, c, "shop", "CREATE TABLE ledger(client int, seq int, PRIMARY KEY (client, seq)); GRANT ALL ON ledger TO app")
	cfg, log := clustered(c), &said{}
	cfg.Log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	r := serveOn(t, cfg, listenable(t), func(*Server) {})
	addr := r.l.Addr().String()
	var all []*writer
	for n := range 12 {
		w := &writer{conn: open1(t, dsn(addr, "application_name=w")), n: n}
		w.port = w.conn.PgConn().Conn().LocalAddr().String()
		exec1(t, w.conn, fmt.Sprintf("SET app.client = '%d'", n))
		all = append(all, w)
	}
	idle := open1(t, dsn(addr, ""))
	exec1(t, idle, "SET work_mem = '7MB'; SET search_path = pg_catalog, public")
	if _, err := idle.Prepare(t.Context(), "mine", "SELECT $1::int + 1"); err != nil {
		t.Fatal(err)
	}
	secret, pid := idle.PgConn().SecretKey(), idle.PgConn().PID()
	var stop atomic.Bool
	var wg sync.WaitGroup
	for _, w := range all {
		wg.Go(func() { w.run(t.Context(), &stop) })
	}
	for range 4 {
		pinned, long := open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
		exec1(t, pinned, "LISTEN x")
		exec1(t, long, "BEGIN")
		next, ended := r.handOn(t, cfg, time.Minute)
		wantCode(t, "LISTEN", lastWords(t, pinned), "57P01", "the gateway is restarted")
		until(t, "all but one are handed over", func() bool { n, _ := r.g.here(); return n == 1 })
		// It is the new one's, whose pools are its own.
		if got := value[string](t, idle, "SELECT current_setting('work_mem') || ' ' || current_setting('search_path')"); got != "7MB pg_catalog, public" {
			t.Errorf("settings: %s", got)
		}
		if got := value[int](t, idle, "mine", 41); got != 42 {
			t.Errorf("a prepared statement: %d", got)
		}
		if p := next.g.Report().Predecessor; p == nil {
			t.Error("there is no predecessor")
		}
		// A request to cancel finds a query at either.
		for _, conn := range []*pgx.Conn{idle, long} {
			canceled := make(chan error, 1)
			go func() {
				_, err := conn.Exec(t.Context(), "SELECT pg_sleep(60)")
				canceled <- err
			}()
			until(t, "it runs", func() bool {
				return pgtest.Query(t, c, "shop", "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)' AND state = 'active'")[0][0] == "1"
			})
			if err := conn.PgConn().CancelRequest(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantCode(t, "cancelled", <-canceled, "57014", "")
		}
		exec1(t, long, "ROLLBACK") // and then it goes along
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		goesOn(t, "one that was in a transaction", long)
		fresh := open1(t, dsn(addr, ""))
		goesOn(t, "a new client", fresh)
		until(t, "the predecessor is gone", func() bool { return next.g.Report().Predecessor == nil })
		for _, conn := range []*pgx.Conn{long, fresh} {
			_ = conn.Close(t.Context())
		}
		r = next
	}
	stop.Store(true)
	wg.Wait()
	for _, w := range all {
		if w.err != nil {
			t.Errorf("client %d after %d rows: %v", w.n, w.seq, w.err)
		}
		if p := w.conn.PgConn().Conn().LocalAddr().String(); p != w.port {
			t.Errorf("client %d was at %s and is at %s", w.n, w.port, p)
		}
		if got := pgtest.Query(t, c, "shop", fmt.Sprintf("SELECT count(*), coalesce(max(seq), 0) FROM ledger WHERE client = %d", w.n))[0]; got[0] != fmt.Sprint(w.seq) || got[1] != got[0] {
			t.Errorf("client %d was told of %d rows, and there are %v", w.n, w.seq, got)
		}
	}
	for _, s := range r.g.sessionsNow() {
		for what, key := range map[string][]byte{"ClientKey": s.keys.ClientKey[:], "ServerKey": s.keys.ServerKey[:], "secret": s.secret[:]} {
			if log.tells(key) {
				t.Errorf("the log has a %s", what)
			}
		}
	}
	if !strings.Contains(log.text(), "clients were taken over") {
		t.Error("the log does not tell of the takeovers")
	}
	if idle.PgConn().PID() != pid || string(idle.PgConn().SecretKey()) != string(secret) {
		t.Error("the keys by which a client cancels have changed")
	}
}

// TestATakeoverThatBreaks: whatever is the last thing that the new process did, the old one goes on with all that it has, and takes
// clients again.
func TestATakeoverThatBreaks(t *testing.T) {
	c := site(t, "")
	r := serveOn(t, clustered(c), listenable(t), func(*Server) {})
	addr := r.l.Addr().String()
	conn := open1(t, dsn(addr, ""))
	other := open1(t, dsn(addr, ""))
	for name, do := range map[string]func(t *testing.T, ch *channel){
		"nothing": func(*testing.T, *channel) {},
		"it has the listeners": func(t *testing.T, ch *channel) {
			_, _, fds, err := ch.receive()
			closeAll(fds)
			if err != nil || len(fds) != 2 {
				t.Errorf("%v %v", fds, err)
			}
		},
		"it is ready": func(t *testing.T, ch *channel) { greeted(t, ch) },
		"it was told to go": func(t *testing.T, ch *channel) {
			greeted(t, ch)
			next(t, ch, msgGo)
		},
		"it has a client": func(t *testing.T, ch *channel) {
			greeted(t, ch)
			next(t, ch, msgGo)
			next(t, ch, msgClient)
		},
		"nonsense": func(t *testing.T, ch *channel) {
			greeted(t, ch)
			if err := ch.send('?', []byte("nonsense")); err != nil {
				t.Error(err)
			}
			for {
				if _, _, fds, err := ch.receive(); err != nil {
					return
				} else {
					closeAll(fds)
				}
			}
		},
		"an answer that nobody waits for": func(t *testing.T, ch *channel) {
			greeted(t, ch)
			if err := ch.sendNumber(msgAdopted, 1<<60); err != nil {
				t.Error(err)
			}
			for {
				if _, _, fds, err := ch.receive(); err != nil {
					return
				} else {
					closeAll(fds)
				}
			}
		},
	} {
		a, b := unixPair(t)
		ended := make(chan error, 1)
		go func() {
			ended <- r.g.HandOver(t.Context(), a, HandOver{Listeners: []*Listener{r.l}, Drain: time.Minute, Ready: 20 * time.Second})
		}()
		do(t, &channel{c: b})
		_ = b.Close()
		if err := <-ended; err == nil {
			t.Errorf("%s: the takeover is said to be done", name)
		}
		goesOn(t, name+": a client that was there", conn)
		goesOn(t, name+": another", other)
		fresh := open1(t, dsn(addr, ""))
		goesOn(t, name+": a new one", fresh)
		_ = fresh.Close(t.Context())
	}
	until(t, "those that have left are gone", func() bool { n, _ := r.g.here(); return n == 2 })
	// What cannot be taken for another reason stays, and is asked to leave in the end.
	a, b := unixPair(t)
	ended := make(chan error, 1)
	go func() {
		ended <- r.g.HandOver(t.Context(), a, HandOver{Listeners: []*Listener{r.l}, Drain: time.Minute})
	}()
	ch := &channel{c: b}
	greeted(t, ch)
	next(t, ch, msgGo)
	for range 2 {
		p, err := decodePassed(next(t, ch, msgClient))
		if err != nil {
			t.Fatal(err)
		}
		if err := ch.sendNumber(msgRefused, p.id, []byte("a test")...); err != nil {
			t.Fatal(err)
		}
	}
	for _, conn := range []*pgx.Conn{conn, other} {
		wantCode(t, "refused", lastWords(t, conn), "57P01", "the new process cannot take it: a test")
	}
	next(t, ch, msgDone)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// greeted is what a new process does first.
func greeted(t *testing.T, ch *channel) {
	t.Helper()
	next(t, ch, msgWelcome)
	if err := ch.send(msgReady, nil); err != nil {
		t.Fatal(err)
	}
}

// next is the body of the next message of a kind; others than progress are wrong.
func next(t *testing.T, ch *channel, kind byte) []byte {
	t.Helper()
	for {
		k, body, fds, err := ch.receive()
		closeAll(fds)
		if err != nil {
			t.Fatal(err)
		}
		if k == kind {
			return body
		}
		if k != msgProgress {
			t.Fatalf("a message of kind %q, where %q was due", k, kind)
		}
	}
}

// TestAClientIsNotServedBeforeItIsGivenAway: the new process does nothing with a connection as long as the old one may keep it.
func TestAClientIsNotServedBeforeItIsGivenAway(t *testing.T) {
	c := site(t, "")
	cfg := clustered(c)
	r := serveOn(t, cfg, listenable(t), func(*Server) {})
	conn := open1(t, dsn(r.l.Addr().String(), ""))
	// An old process that never says that the client is the new one's.
	a, b := unixPair(t)
	old := &channel{c: a}
	pipe, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	defer pipe.Close()
	l := listenable(t)
	defer l.Close()
	err = withFD(l.socket, func(fd int) error {
		return withFD(pipe, func(life int) error { return old.send(msgWelcome, []byte(`{"next_pid": 7}`), fd, life) })
	})
	if err != nil {
		t.Fatal(err)
	}
	tk, err := TakeOver(b)
	if err != nil {
		t.Fatal(err)
	}
	n := serveOn(t, cfg, tk.Listeners[0], tk.Prepare)
	ran := make(chan error, 1)
	go func() { ran <- tk.Run(t.Context(), n.g) }()
	next(t, old, msgReady)
	if err := old.send(msgGo, nil); err != nil {
		t.Fatal(err)
	}
	var s *session
	until(t, "the client is idle", func() bool {
		for _, s = range r.g.sessionsNow() {
			s.mu.Lock()
			idle := s.parked && s.b == nil
			s.mu.Unlock()
			if idle {
				return true
			}
		}
		return false
	})
	p := s.passed()
	if err := withFD(s.conn.(*net.TCPConn), func(fd int) error { return old.send(msgClient, p.encode(), fd) }); err != nil {
		t.Fatal(err)
	}
	id, _, err := number(next(t, old, msgAdopted))
	if err != nil || id != p.id {
		t.Fatal(id, err)
	}
	if clients, _ := n.g.here(); clients != 1 {
		t.Errorf("%d clients", clients)
	}
	for range 20 {
		goesOn(t, "at the old one", conn)
	}
	// It breaks off without having given the client away, and lives on.
	_ = a.Close()
	if err := <-ran; !errors.Is(err, errTakenBack) {
		t.Errorf("the new process: %v", err)
	}
	until(t, "the new one has no client", func() bool { clients, _ := n.g.here(); return clients == 0 })
	for range 20 {
		goesOn(t, "at the old one", conn)
	}
	if tk.Alone() {
		t.Error("the new process takes itself for the only one")
	}
}

// TestTheOldProcessEndsEarly: what it has given away goes on.
func TestTheOldProcessEndsEarly(t *testing.T) {
	c := site(t, "")
	cfg := clustered(c)
	a, b := unixPair(t)
	old := &channel{c: a}
	pipe, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	l := listenable(t)
	err = withFD(l.socket, func(fd int) error {
		return withFD(pipe, func(life int) error { return old.send(msgWelcome, []byte(`{}`), fd, life) })
	})
	if err != nil {
		t.Fatal(err)
	}
	_, _ = pipe.Close(), l.Close()
	tk, err := TakeOver(b)
	if err != nil {
		t.Fatal(err)
	}
	n := serveOn(t, cfg, tk.Listeners[0], tk.Prepare)
	ran := make(chan error, 1)
	go func() { ran <- tk.Run(t.Context(), n.g) }()
	next(t, old, msgReady)
	if err := old.send(msgGo, nil); err != nil {
		t.Fatal(err)
	}
	conn := open1(t, dsn(n.l.Addr().String(), ""))
	_, _ = a.Close(), w.Close()
	if err := <-ran; err != nil || !tk.Alone() {
		t.Errorf("%v, alone: %t", err, tk.Alone())
	}
	goesOn(t, "at the new one", conn)
}

func TestMessagesOfTheHandOver(t *testing.T) {
	a, b := unixPair(t)
	one, two := &channel{c: a}, &channel{c: b}
	pipe, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	big := make([]byte, 3<<20)
	big[len(big)-1] = 7
	go func() {
		for range 50 {
			_ = one.send('a', nil)
			_ = withFD(w, func(fd int) error { return one.send('b', big, fd, fd) })
			_ = one.send('c', []byte("x"))
		}
		_ = one.c.Close()
	}()
	for i := range 50 {
		for _, want := range []struct {
			kind      byte
			size, fds int
		}{{'a', 0, 0}, {'b', len(big), 2}, {'c', 1, 0}} {
			kind, body, fds, err := two.receive()
			closeAll(fds)
			if err != nil || kind != want.kind || len(body) != want.size || len(fds) != want.fds {
				t.Fatalf("%d: kind %q, %d bytes, %d descriptors, %v; want %+v", i, kind, len(body), len(fds), err, want)
			}
		}
	}
	if _, _, _, err := two.receive(); err == nil {
		t.Error("something came after the end")
	}
	_ = w.Close()
	if _, err := pipe.Read(make([]byte, 1)); err == nil {
		t.Error("a descriptor was not closed")
	}
	c, d := unixPair(t)
	if _, err := c.Write([]byte{0xff, 0xff, 0xff, 0xff, 'C'}); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := (&channel{c: d}).receive(); err == nil {
		t.Error("a message that is too long was taken")
	}
}

// TestSessionModeIsNotHandedOver: the listener is; clients are asked to leave when they are outside a transaction, and those who do not
// leave one are ended with the process.
func TestSessionModeIsNotHandedOver(t *testing.T) {
	c := site(t, "")
	cfg := clustered(c)
	cfg.Mode = SessionMode
	r := serveOn(t, cfg, listenable(t), func(*Server) {})
	addr := r.l.Addr().String()
	idle, busy, stuck := open1(t, dsn(addr, "")), open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
	exec1(t, busy, "BEGIN")
	exec1(t, stuck, "BEGIN")
	_, ended := r.handOn(t, cfg, 500*time.Millisecond)
	wantCode(t, "idle", lastWords(t, idle), "57P01", "session mode")
	exec1(t, busy, "COMMIT")
	wantCode(t, "busy", lastWords(t, busy), "57P01", "session mode")
	wantCode(t, "stuck", lastWords(t, stuck), "57P01", "the gateway is shutting down")
	if err := <-ended; err != nil {
		t.Error(err)
	}
	goesOn(t, "a new client", open1(t, dsn(addr, "")))
}

// TestNoByteIsLostInAHandOver: each client has sent another part of its two next messages when the gateway is taken over, and sends
// the rest afterwards.
func TestNoByteIsLostInAHandOver(t *testing.T) {
	c := site(t, "")
	cfg := clustered(c)
	cfg.PoolMax = 5
	r := serveOn(t, cfg, listenable(t), func(*Server) {})
	addr := r.l.Addr().String()
	query := func(n int) []byte { return pgwire.AppendQuery(nil, fmt.Sprintf("SELECT 'of %d'", n)) }
	whole := len(query(10)) * 2
	type half struct {
		front *pgproto3.Frontend
		conn  net.Conn
		rest  []byte
	}
	var all []half
	for n := range whole + 1 {
		pc, err := pgconn.Connect(t.Context(), dsn(addr, ""))
		if err != nil {
			t.Fatal(err)
		}
		h, err := pc.Hijack()
		if err != nil {
			t.Fatal(err)
		}
		defer h.Conn.Close()
		if err := h.Conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		m := append(query(n+10), query(n+10)...)[:whole]
		if _, err := h.Conn.Write(m[:n]); err != nil {
			t.Fatal(err)
		}
		all = append(all, half{pgproto3.NewFrontend(h.Conn, h.Conn), h.Conn, m[n:]})
	}
	next, ended := r.handOn(t, cfg, time.Minute)
	until(t, "clients that have sent no part of a message are handed over", func() bool {
		left, _ := r.g.here()
		moved, _ := next.g.here()
		return left <= whole-2 && moved >= 3 // nothing, the first whole message, both
	})
	if left, _ := r.g.here(); left < whole/2 {
		t.Errorf("%d clients are left: those that have sent a part were handed over", left)
	}
	for _, h := range all {
		if _, err := h.conn.Write(h.rest); err != nil {
			t.Fatal(err)
		}
	}
	for n, h := range all {
		want := fmt.Sprintf("of %d", n+10)
		for ready := 0; ready < 2; {
			m, err := h.front.Receive()
			if err != nil {
				t.Fatalf("client %d: %v", n, err)
			}
			switch m := m.(type) {
			case *pgproto3.DataRow:
				if string(m.Values[0]) != want {
					t.Errorf("client %d got %q, not %q", n, m.Values[0], want)
				}
			case *pgproto3.ReadyForQuery:
				ready++
			case *pgproto3.ErrorResponse:
				t.Fatalf("client %d: %s", n, m.Message)
			}
		}
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if moved, _ := next.g.here(); moved != len(all) {
		t.Errorf("%d of %d clients are at the new process", moved, len(all))
	}
}

// TestPauseDuringAHandOver: who waits at the old process because of PAUSE goes on with RESUME at the new one, which orders come to; and who
// is still at the old one is held by a PAUSE there.
func TestPauseDuringAHandOver(t *testing.T) {
	c := site(t, "")
	cfg := clustered(c)
	cfg.HoldMax = time.Minute
	old := serveOn(t, cfg, listenable(t), func(*Server) {})
	addr := old.l.Addr().String()
	waits, inside := open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
	exec1(t, waits, "SELECT 1")
	exec1(t, inside, "BEGIN")
	old.g.setPaused("shop", true)
	answered := make(chan error, 1)
	ask := func() {
		_, err := waits.Exec(t.Context(), "SELECT 1")
		answered <- err
	}
	held := func(g *Server) func() bool {
		return func() bool {
			return slices.ContainsFunc(g.sessionsNow(), func(s *session) bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				return !s.waitingAt.IsZero()
			})
		}
	}
	go ask()
	until(t, "the client is held", held(old.g))
	next, ended := old.handOn(t, cfg, time.Minute)
	until(t, "the new process knows of the pause", func() bool { paused, _ := next.g.isPaused("shop"); return paused })
	until(t, "orders reach the old process", func() bool { return old.g.handing.Load() != nil })
	next.g.setPaused("shop", false)
	select {
	case err := <-answered:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the client still waits at the old process after RESUME at the new one")
	}
	next.g.setPaused(everyDatabase, true)
	until(t, "the old process is paused", func() bool { paused, _ := old.g.isPaused("shop"); return paused })
	exec1(t, inside, "COMMIT")
	go ask()
	until(t, "the client is held at the new process", held(next.g))
	next.g.setPaused(everyDatabase, false)
	if err := <-answered; err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	exec1(t, inside, "SELECT 1")
}
