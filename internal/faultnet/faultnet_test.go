package faultnet

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echoServer answers every byte with itself until the test ends.
func echoServer(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().String()
}

func relay(t *testing.T, target string) *Relay {
	t.Helper()
	r, err := New(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func dial(t *testing.T, r *Relay) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", r.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func send(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

func expect(t *testing.T, c net.Conn, want string) {
	t.Helper()
	got := make([]byte, len(want))
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("got %q, %v; want %q", got, err, want)
	}
}

// expectEnd checks that a new connection is ended by the other side, at once or when it is read.
func expectEnd(t *testing.T, r *Relay) {
	t.Helper()
	c, err := net.Dial("tcp", r.Addr())
	if err != nil {
		return // the reset came before the connect returned
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("new connection: %v, want an end", err)
	}
}

// expectNothing checks that nothing arrives within a short time.
func expectNothing(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read %d, %v; want nothing to arrive", n, err)
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("timed out waiting for: " + what)
		}
	}
}

func TestPassesBytesAndEnds(t *testing.T) {
	r := relay(t, echoServer(t))
	c := dial(t, r)
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<17) // 2 MiB: more than the queue's buffers
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = c.Write(big)
		_ = c.CloseWrite()
	})
	got, err := io.ReadAll(c)
	wg.Wait()
	if err != nil || !bytes.Equal(got, big) {
		t.Fatalf("got %d bytes, %v; want %d unchanged", len(got), err, len(big))
	}
	waitFor(t, "the connection to be gone", func() bool { return r.Connections() == 0 })
	if r.Passed(ToTarget) != int64(len(big)) || r.Passed(ToClient) != int64(len(big)) {
		t.Errorf("passed %d and %d, want %d", r.Passed(ToTarget), r.Passed(ToClient), len(big))
	}
}

func TestCutHoldsAndHealDelivers(t *testing.T) {
	r := relay(t, echoServer(t))
	c := dial(t, r)
	send(t, c, "a")
	expect(t, c, "a")
	r.Cut()
	send(t, c, "b")
	expectNothing(t, c)
	late := dial(t, r)
	send(t, late, "x")
	expectNothing(t, late)
	r.Heal()
	expect(t, c, "b")
	expect(t, late, "x")
}

func TestCutHidesTheEndOfAConnection(t *testing.T) {
	r := relay(t, echoServer(t))
	c := dial(t, r)
	send(t, c, "a")
	expect(t, c, "a")
	r.Drop(ToTarget)
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	expectNothing(t, c) // the echo server would close
	r.Heal()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("after healing: %v, want the end", err)
	}
}

func TestDropStopsOneDirectionOnly(t *testing.T) {
	r := relay(t, echoServer(t))
	c := dial(t, r)
	send(t, c, "a")
	expect(t, c, "a")
	r.Drop(ToClient)
	send(t, c, "b")
	waitFor(t, "b at the target", func() bool { return r.Passed(ToTarget) == 2 })
	expectNothing(t, c)
	if n := r.Passed(ToClient); n != 1 {
		t.Errorf("%d bytes passed in the direction that is cut, want 1", n)
	}
	r.Heal()
	expect(t, c, "b")
}

func TestDelayHoldsEachByteForItsTime(t *testing.T) {
	r := relay(t, echoServer(t))
	c := dial(t, r)
	send(t, c, "a")
	expect(t, c, "a")
	r.Delay(30 * time.Millisecond)
	start := time.Now()
	send(t, c, "b")
	expect(t, c, "b")
	if d := time.Since(start); d < 60*time.Millisecond {
		t.Errorf("there and back took %s, want at least 60 ms", d)
	}
	r.Delay(time.Hour)
	send(t, c, "c")
	expectNothing(t, c)
	r.Delay(0) // a change of the delay holds for what is under way too
	expect(t, c, "c")
}

func TestResetAbortsAlsoWhatIsCut(t *testing.T) {
	r := relay(t, echoServer(t))
	c := dial(t, r)
	send(t, c, "a")
	expect(t, c, "a")
	r.Cut()
	send(t, c, "b")
	r.Reset()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the reset: %v, want the connection to be reset", err)
	}
	waitFor(t, "the connection to be gone", func() bool { return r.Connections() == 0 })
}

func TestRefuseEndsNewConnections(t *testing.T) {
	r := relay(t, echoServer(t))
	old := dial(t, r)
	send(t, old, "a")
	expect(t, old, "a")
	r.Refuse()
	expectEnd(t, r)
	send(t, old, "b")
	expect(t, old, "b")
	r.Heal()
	c := dial(t, r)
	send(t, c, "c")
	expect(t, c, "c")
}

func TestCloseEndsCutConnections(t *testing.T) {
	r, err := New(echoServer(t))
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, r)
	send(t, c, "a")
	expect(t, c, "a")
	r.Cut()
	send(t, c, "b")
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after Close: %v, want an end", err)
	}
}

func TestTargetThatIsGoneEndsTheClient(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := relay(t, l.Addr().String())
	l.Close()
	expectEnd(t, r)
}
