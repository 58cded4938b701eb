package gateway

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo is a server that sends back what comes.
func echo(t *testing.T) (dial func(context.Context) (net.Conn, error)) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
	}
}

func open(t *testing.T, dial func(context.Context) (net.Conn, error)) (d *Door, addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d = NewDoor(dial, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return d, l.Addr().String()
}

func connect(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestShuttingEndsWhoIsIn(t *testing.T) {
	d, addr := open(t, echo(t))
	d.Open()
	c := connect(t, addr)
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Fatalf("%q, %v", b, err)
	}
	if _, now, total := d.Status(); now != 1 || total != 1 {
		t.Errorf("%d connections of %d", now, total)
	}
	d.Shut("fenced")
	if n, err := c.Read(b); n != 0 || err == nil {
		t.Errorf("read %q, %v after the door was shut", b[:n], err)
	}
	d.Open()
	again := connect(t, addr)
	if _, err := again.Write([]byte("again")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(again, b); err != nil || string(b) != "again" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestRefusalIsAnError: a real client is told why, with and without asking for TLS first.
func TestRefusalIsAnError(t *testing.T) {
	d, addr := open(t, echo(t))
	d.Shut("site a is no member of the register")
	for _, mode := range []string{"disable", "require", "prefer"} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		_, err := pgconn.Connect(ctx, "postgres://duri@"+addr+"/app?sslmode="+mode)
		cancel()
		if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
			if pgErr.Code != "57P03" || !strings.Contains(pgErr.Message, "no member") || pgErr.Hint == "" {
				t.Errorf("sslmode %s: %+v", mode, pgErr)
			}
		} else if mode == "disable" || err == nil { // pgx takes any other answer than S or N to a request for TLS as a refusal
			t.Errorf("sslmode %s: %v", mode, err)
		}
	}
	c := connect(t, addr)
	if _, err := c.Write([]byte{0, 0, 0, 4, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("nonsense was answered: %d bytes, %v", n, err)
	}
}

func TestServerThatCannotBeReached(t *testing.T) {
	d, addr := open(t, func(context.Context) (net.Conn, error) { return nil, errors.New("no such server") })
	d.Open()
	_, err := pgconn.Connect(t.Context(), "postgres://duri@"+addr+"/app?sslmode=disable")
	if err == nil || !strings.Contains(err.Error(), "no such server") {
		t.Errorf("got %v", err)
	}
}
