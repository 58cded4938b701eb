package link

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/internal/pki"
)

// hosted is a site's Gateways with function fields; PostgreSQL is a listener of the test's.
type hosted struct {
	watch    func(ctx context.Context, tell func(SiteState) error) error
	fate     func(q FateQuestion) (FateAnswer, error)
	address  string
	refusal  error
	gateways chan string // who has opened tunnels
	staying  func(gateway string, sessions map[string]int) error

	mu   sync.Mutex
	cuts []func()
}

func (h *hosted) Watch(ctx context.Context, tell func(SiteState) error) error {
	return h.watch(ctx, tell)
}

func (h *hosted) Verifier(_ context.Context, role string) (string, error) {
	if role == "nobody" {
		return "", nil
	}
	return "SCRAM of " + role, nil
}
func (h *hosted) Fate(_ context.Context, q FateQuestion) (FateAnswer, error) { return h.fate(q) }
func (h *hosted) Facts(context.Context) ([]byte, error)                      { return []byte(`{}`), nil }

func (h *hosted) Staying(_ context.Context, gateway string, sessions map[string]int) error {
	return h.staying(gateway, sessions)
}

func (h *hosted) End(_ context.Context, q FateQuestion) error { return fmt.Errorf("pid %d", q.PID) }

func (h *hosted) Position(_ context.Context, database string) ([]SitePosition, error) {
	return []SitePosition{{database, 7}, {"busan", 8}}, nil
}

func (h *hosted) Reach(_ context.Context, database string, positions []SitePosition, gone string) error {
	return fmt.Errorf("%s %v %q", database, positions, gone)
}

func (h *hosted) Open(ctx context.Context, gateway, role string, cut func()) (net.Conn, func(), error) {
	if role != "" {
		gateway += " as " + role
	}
	if h.refusal != nil {
		return nil, nil, h.refusal
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", h.address)
	if err != nil {
		return nil, nil, err
	}
	h.mu.Lock()
	h.cuts = append(h.cuts, func() { cut(); _ = conn.Close() })
	h.mu.Unlock()
	h.gateways <- gateway
	return conn, func() {}, nil
}

// newHosted makes it with a PostgreSQL of which each connection is given to serve.
func newHosted(t *testing.T, serve func(net.Conn)) *hosted {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return &hosted{address: l.Addr().String(), gateways: make(chan string, 16)}
}

// gatewayTLS is the configuration of a gateway that runs alone.
func (a authority) gatewayTLS(t *testing.T, name string) *tls.Config {
	t.Helper()
	files := pki.Files{CA: filepath.Join(a.dir, "ca.crt"), Cert: filepath.Join(a.dir, name+".crt"), Key: filepath.Join(a.dir, name+".key")}
	pair, err := a.ca.IssueGateway(name)
	if err == nil {
		err = pair.Write(files.Cert, files.Key)
	}
	if err != nil {
		t.Fatal(err)
	}
	client, err := pki.GatewayTLS(files, a.ca.ClusterID(), name)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func (w *world) gateway(t *testing.T) *Client {
	t.Helper()
	return w.client(func(c *ClientConfig) { c.TLS, c.Site = w.ca.gatewayTLS(t, "web1"), "" })
}

// TestTunnelCarriesBytesAndTheirEnds: much goes both ways at once, unchanged, and the end of one way does not end the other.
func TestTunnelCarriesBytesAndTheirEnds(t *testing.T) {
	data := make([]byte, 3<<20)
	_, _ = rand.Read(data)
	h := newHosted(t, func(c net.Conn) {
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = c.Write(data) })
		got, err := io.ReadAll(c)
		wg.Wait()
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("the server got %d bytes, %v", len(got), err)
		}
		_, _ = c.Write([]byte("the end of your side came")) // and only then its own
	})
	w := newWorld(t, func(c *ServerConfig) { c.Gateways = h })
	for _, cl := range []*Client{w.gateway(t), w.client(nil)} {
		conn, err := cl.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, _ = conn.Write(data)
			_ = conn.(*tls.Conn).CloseWrite()
		}()
		got, err := io.ReadAll(conn)
		if err != nil || !bytes.Equal(got, append(bytes.Clone(data), "the end of your side came"...)) {
			t.Errorf("the client got %d bytes, %v", len(got), err)
		}
		_ = conn.Close()
	}
	if a, b := <-h.gateways, <-h.gateways; a != "gateway web1" || b != "site busan" {
		t.Errorf("%q, %q", a, b)
	}
}

// TestTunnelIsCut: by the site, by the end of either connection, and by the end of the agent.
func TestTunnelIsCut(t *testing.T) {
	ended := make(chan struct{}, 16)
	h := newHosted(t, func(c net.Conn) {
		_, _ = io.Copy(c, c)
		ended <- struct{}{}
	})
	w := newWorld(t, func(c *ServerConfig) { c.Gateways = h })
	cl := w.gateway(t)
	open := func() net.Conn {
		t.Helper()
		conn, err := cl.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	broken := func(conn net.Conn) {
		t.Helper()
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if n, err := conn.Read(make([]byte, 1)); n > 0 || err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
	conn := open()
	h.cuts[0]()
	broken(conn)
	<-ended
	conn = open()
	_ = conn.(*tls.Conn).NetConn().Close()
	<-ended
	conn = open()
	w.relay.Reset()
	broken(conn)
	<-ended
	conn = open()
	w.stop()
	broken(conn)
	<-ended
}

// TestTunnelEndsWithAHost: when the host at the other end has vanished, the gateway and the site notice, each by itself, whether it was
// sending something or not: else what a transaction has locked would stay so.
func TestTunnelEndsWithAHost(t *testing.T) {
	ended, say := make(chan time.Time, 1), make(chan bool)
	h := newHosted(t, func(c net.Conn) {
		if <-say {
			_, _ = c.Write([]byte("x"))
		}
		_, _ = io.Copy(io.Discard, c)
		ended <- time.Now()
	})
	w := newWorld(t, func(c *ServerConfig) { c.Gateways = h })
	cl := w.gateway(t)
	for _, speaks := range []bool{true, false} {
		conn, err := cl.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := w.relay.Vanish(); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		say <- speaks
		if speaks {
			if _, err := conn.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		_ = conn.SetReadDeadline(begun.Add(time.Minute))
		if n, err := conn.Read(make([]byte, 1)); n > 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("at the gateway: %d bytes, %v", n, err)
		}
		gateway := time.Since(begun)
		select {
		case at := <-ended:
			t.Logf("sending: %t; noticed at the gateway after %v, at the site after %v", speaks, gateway, at.Sub(begun))
		case <-time.After(time.Minute):
			t.Fatal("the server's connection does not end")
		}
	}
}

// TestTunnelIsRefusedWithReason: what the site says arrives as an Error.
func TestTunnelIsRefusedWithReason(t *testing.T) {
	h := &hosted{refusal: hinted{}}
	w := newWorld(t, func(c *ServerConfig) { c.Gateways = h })
	var e *Error
	if _, err := w.gateway(t).Dial(t.Context()); !errors.As(err, &e) || e.Sentence != "the table is locked" || e.Hint != "try later" || e.Peer != "seoul" {
		t.Errorf("%v", err)
	}
	none := newWorld(t, nil)
	if _, err := none.client(nil).Dial(t.Context()); !errors.As(err, &e) || !strings.Contains(e.Hint, "gateway.mode") {
		t.Errorf("no gateways: %v", err)
	}
	if _, err := none.client(nil).Verifier(t.Context(), "r"); !errors.As(err, &e) || !strings.Contains(e.Hint, "gateway.mode") {
		t.Errorf("no gateways: %v", err)
	}
	stranger := newAuthority(t, "another")
	cl := w.client(func(c *ClientConfig) { c.TLS = stranger.gatewayTLS(t, "web1") })
	if _, err := cl.Dial(t.Context()); !errors.Is(err, ErrUnreachable) {
		t.Errorf("a gateway of another cluster: %v", err)
	}
}

// TestLoginsByCertificateNameTheirRole: it arrives as it is, and never empty, which would be a login without one.
func TestLoginsByCertificateNameTheirRole(t *testing.T) {
	h := newHosted(t, func(c net.Conn) { _, _ = io.Copy(c, c) })
	w := newWorld(t, func(c *ServerConfig) { c.Gateways = h })
	cl := w.gateway(t)
	for _, role := range []string{"app", `Ö"1 x`, strings.Repeat("x", 255)} {
		conn, err := cl.DialAs(t.Context(), role)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 5)
		if _, err := conn.Write([]byte("hello")); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
			t.Errorf("%q, %v: what follows the role belongs to PostgreSQL", got, err)
		}
		_ = conn.Close()
		if got := <-h.gateways; got != "gateway web1 as "+role {
			t.Errorf("%q", got)
		}
	}
	for _, role := range []string{"", strings.Repeat("x", 256)} {
		if _, err := cl.DialAs(t.Context(), role); !errors.Is(err, ErrLogin) {
			t.Errorf("role of %d bytes: %v", len(role), err)
		}
	}
	config := onlyPeer(w.ca.gatewayTLS(t, "web2"), "seoul")
	config.NextProtos = []string{certProtocol}
	raw, err := tls.Dial("tcp", w.relay.Addr(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if _, err := raw.Write([]byte{0}); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(raw); err != nil || !bytes.Contains(b, []byte("of no role")) || len(h.gateways) != 0 {
		t.Errorf("%q, %v, %d tunnels", b, err, len(h.gateways))
	}
	h.refusal = &Error{Kind: ErrLogin, Sentence: "not that one", Hint: "another"}
	var e *Error
	if _, err := cl.DialAs(t.Context(), "app"); !errors.Is(err, ErrLogin) || !errors.As(err, &e) || e.Hint != "another" || e.Peer != "seoul" {
		t.Errorf("%v", err)
	}
}

// TestLoginsByCertificateAtAnOlderAgent: which does not know of them, and must not take one for a login without.
func TestLoginsByCertificateAtAnOlderAgent(t *testing.T) {
	w := newWorld(t, nil)
	server, _ := w.ca.tls(t, "seoul")
	server.NextProtos = []string{sqlProtocol, "h2"}
	l, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			err = c.(*tls.Conn).Handshake()
			_ = c.Close()
		}
		done <- err
	}()
	cl := w.client(func(c *ClientConfig) { c.Address = l.Addr().String() })
	var e *Error
	if _, err := cl.DialAs(t.Context(), "app"); !errors.Is(err, ErrVersion) || !errors.As(err, &e) || !strings.Contains(e.Hint, "same version") {
		t.Errorf("%v", err)
	}
	if err := <-done; err == nil {
		t.Error("the older agent agreed")
	}
	_ = l.Close()
}

// TestGatewaysMayDoNoMore: with the certificate of a gateway, nothing of what sites ask each other is answered.
func TestGatewaysMayDoNoMore(t *testing.T) {
	w := newWorld(t, func(c *ServerConfig) {
		c.Gateways = &hosted{}
		c.Drain = func(context.Context, DrainOrder) (DrainState, error) { return DrainState{}, nil }
	})
	cl, cp := w.gateway(t), openCopy(t, t.TempDir())
	defer cp.Close()
	_, cerr := cl.Copy(t.Context(), database)
	_, _, rerr := cl.FetchRow(t.Context(), database, testRelation(), []string{"id"}, nil)
	_, qerr := cl.Compare(t.Context(), database, nil)
	_, serr := cl.Status(t.Context())
	_, derr := cl.Drain(t.Context(), DrainOrder{Drain: true})
	for what, err := range map[string]error{
		"copy": cerr, "row": rerr, "compare": qerr, "status": serr, "drain": derr, "follow": cl.Follow(t.Context(), database, cp),
	} {
		if !errors.Is(err, ErrSite) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestQuestionsOfGatewaysTravel: what is asked and answered arrives unchanged, for sites and gateways, the own site included.
func TestQuestionsOfGatewaysTravel(t *testing.T) {
	want := FateQuestion{Database: "app", Site: "a", Server: "7/1", Epoch: 3, PID: 4, XID: 1 << 40, LTXID: []byte{1, 2}, Age: 1500 * time.Millisecond, Forwarded: true}
	answer := FateAnswer{Site: "a", Outcome: OutcomeAborted, Why: "so", Server: "7/1", HasRegister: true, Member: true, MemberSince: 2, Waits: true, Proven: true}
	h := &hosted{fate: func(q FateQuestion) (FateAnswer, error) {
		if d := cmp.Diff(want, q); d != "" {
			t.Error(d)
		}
		return answer, nil
	}}
	w := newWorld(t, func(c *ServerConfig) { c.Gateways = h })
	_, own := w.ca.tls(t, "seoul")
	for _, cl := range []*Client{w.gateway(t), w.client(nil), w.client(func(c *ClientConfig) { c.TLS = own })} {
		got, err := cl.Fate(t.Context(), want)
		if d := cmp.Diff(answer, got); d != "" || err != nil {
			t.Error(d, err)
		}
		if v, err := cl.Verifier(t.Context(), "kim"); v != "SCRAM of kim" || err != nil {
			t.Errorf("%q, %v", v, err)
		}
		if v, err := cl.Verifier(t.Context(), "nobody"); v != "" || err != nil {
			t.Errorf("%q, %v", v, err)
		}
		if err := cl.End(t.Context(), FateQuestion{PID: 9}); err == nil || !strings.Contains(err.Error(), "pid 9") {
			t.Errorf("%v", err)
		}
		positions, err := cl.Position(t.Context(), "app")
		if d := cmp.Diff([]SitePosition{{"app", 7}, {"busan", 8}}, positions); d != "" || err != nil {
			t.Error(d, err)
		}
		if err := cl.Reach(t.Context(), "app", positions, "x"); err == nil || !strings.Contains(err.Error(), `app [{app 0/7} {busan 0/8}] "x"`) {
			t.Errorf("%v", err)
		}
	}
}

// TestStatesArePushed: each state arrives, the end of the site's own does, and silence ends the watch.
func TestStatesArePushed(t *testing.T) {
	states, left := make(chan SiteState), make(chan struct{}, 2)
	h := &hosted{watch: func(ctx context.Context, tell func(SiteState) error) error {
		defer func() { left <- struct{}{} }()
		for {
			select {
			case st := <-states:
				if err := tell(st); err != nil {
					return err
				}
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}}
	w := newWorld(t, func(c *ServerConfig) { c.Gateways = h })
	cl := w.gateway(t)
	got := make(chan SiteState)
	watch := func() chan error {
		done := make(chan error, 1)
		go func() {
			done <- cl.Watch(t.Context(), func(st SiteState) error {
				got <- st
				return nil
			})
		}()
		return done
	}
	all := SiteState{Epoch: 3, Members: []string{"a", "b"}, Refuses: "no", Draining: true, Leave: true, Postgres: true, CaughtUp: true, Server: "7/1", Databases: []DatabaseState{
		{Database: "app", Lags: []SiteLag{{Site: "b", Known: true, Lag: 1500 * time.Millisecond}, {Site: "c"}}, Backlog: 7 << 30}, {Database: "other"},
	}}
	done := watch()
	for _, st := range []SiteState{all, {}, {Epoch: 4}} {
		states <- st
		if d := cmp.Diff(st, <-got); d != "" {
			t.Error(d)
		}
	}
	begun := time.Now()
	if err := <-done; !errors.Is(err, ErrSilent) {
		t.Errorf("silence: %v", err)
	}
	if took := time.Since(begun); took < StateSilence*9/10 || took > 2*StateSilence {
		t.Errorf("silence was noticed after %v", took)
	}
	<-left
	done = watch()
	states <- all
	<-got
	w.stop()
	if err := <-done; err == nil || errors.Is(err, ErrSilent) {
		t.Errorf("the agent stops: %v", err)
	}
}

// TestDrainTravels: the order, what is left, and what gateways tell of it.
func TestDrainTravels(t *testing.T) {
	order := DrainOrder{Drain: true, Ask: true, After: 90 * time.Second}
	left := DrainState{Connections: 3, Staying: map[string]int{"LISTEN": 2, "temporary objects": 1}, All: true, Asks: true, In: 1500 * time.Millisecond}
	told := 0
	h := &hosted{staying: func(gateway string, sessions map[string]int) error {
		told++
		if gateway != "web1 17" || !cmp.Equal(sessions, left.Staying) {
			t.Errorf("%s: %v", gateway, sessions)
		}
		return nil
	}}
	w := newWorld(t, func(c *ServerConfig) {
		c.Gateways = h
		c.Drain = func(_ context.Context, o DrainOrder) (DrainState, error) {
			if !o.Drain {
				return DrainState{}, errors.New("no")
			}
			if o != order {
				t.Errorf("%+v", o)
			}
			return left, nil
		}
	})
	got, err := w.client(nil).Drain(t.Context(), order)
	if d := cmp.Diff(left, got); d != "" || err != nil {
		t.Error(d, err)
	}
	if _, err := w.client(nil).Drain(t.Context(), DrainOrder{}); err == nil || !strings.Contains(err.Error(), "no") {
		t.Errorf("an error of the site: %v", err)
	}
	for _, cl := range []*Client{w.gateway(t), w.client(nil)} {
		if err := cl.Staying(t.Context(), "web1 17", left.Staying); err != nil {
			t.Error(err)
		}
	}
	if told != 2 {
		t.Errorf("told %d times", told)
	}
}
