package alive

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/internal/faultnet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ends are both ends of a connection.
func ends(t *testing.T) (here, there *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// untilEnd reads until the end, for so long.
func untilEnd(c net.Conn, most time.Duration) (time.Duration, error) {
	begun := time.Now()
	_ = c.SetReadDeadline(begun.Add(most))
	_, err := io.Copy(io.Discard, c)
	return time.Since(begun), err
}

const silence = time.Second

func TestWhatIsSentToNobodyEndsTheConnection(t *testing.T) {
	for name, bytes := range map[string]int{"a request": 10, "more than the socket takes": 64 << 20} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := New(silence)
			here, there := ends(t)
			defer w.Watch(here)()
			must(t, faultnet.Vanish(there))
			wrote := make(chan error, 1)
			go func() {
				_, err := here.Write(make([]byte, bytes))
				wrote <- err
			}()
			took, err := untilEnd(here, time.Minute)
			if err != nil || took < silence || took > 4*silence {
				t.Errorf("after %v: %v", took, err)
			}
			if err := <-wrote; (err != nil) != (bytes > 10) {
				t.Errorf("writing: %v", err)
			}
			t.Logf("noticed after %v", took)
		})
	}
}

func TestAnIdleConnectionToNobodyEnds(t *testing.T) {
	w := New(silence)
	here, there := ends(t)
	defer w.Watch(here)()
	must(t, faultnet.Vanish(there))
	took, err := untilEnd(here, time.Minute)
	if err != nil && !errors.Is(err, syscall.ETIMEDOUT) || took < silence || took > 10*silence {
		t.Errorf("after %v: %v", took, err)
	}
	t.Logf("noticed after %v", took)
}

// TestWhoDoesNotReadIsAlive: and would be dead for TCP_USER_TIMEOUT.
func TestWhoDoesNotReadIsAlive(t *testing.T) {
	w := New(silence)
	here, there := ends(t)
	other, _ := ends(t)
	defer w.Watch(here)()
	raw, err := other.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(silence.Milliseconds()))
	}))
	must(t, err)
	full := func(c *net.TCPConn) error {
		_ = c.SetWriteDeadline(time.Now().Add(6 * silence))
		_, err := c.Write(make([]byte, 64<<20))
		return err
	}
	timed := make(chan error, 1)
	go func() { timed <- full(other) }()
	if err := full(here); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("watched: %v", err)
	}
	if err := <-timed; !errors.Is(err, syscall.ETIMEDOUT) {
		t.Errorf("TCP_USER_TIMEOUT: %v", err)
	}
	_ = here.SetWriteDeadline(time.Time{})
	wrote := make(chan error, 1)
	go func() {
		_, err := here.Write([]byte("the end"))
		wrote <- errors.Join(err, here.CloseWrite())
	}()
	if _, err := untilEnd(there, time.Minute); err != nil {
		t.Errorf("reading at last: %v", err)
	}
	if err := <-wrote; err != nil {
		t.Errorf("writing at last: %v", err)
	}
}

func TestAShortSilenceEndsNothing(t *testing.T) {
	const long = 3 * time.Second
	w := New(long)
	here, there := ends(t)
	defer w.Watch(here)()
	must(t, faultnet.Vanish(there))
	if _, err := here.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if took, err := untilEnd(here, long/2); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("after %v: %v", took, err)
	}
	must(t, faultnet.Appear(there))
	if took, err := untilEnd(here, long); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after %v: %v", took, err)
	}
	var one [1]byte
	if _, err := io.ReadFull(there, one[:]); err != nil || one[0] != 'x' {
		t.Errorf("%v, %v", one, err)
	}
}

// TestWatchingEnds: with the last connection, however it goes.
func TestWatchingEnds(t *testing.T) {
	w := New(silence)
	runs := func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.end != nil
	}
	a, b := ends(t)
	stop := w.Watch(a)
	stop()
	stop()
	if runs() {
		t.Error("nothing is watched, and it looks")
	}
	w.Watch(a)
	w.Watch(b)
	a.Close()
	w.look(time.Now())
	if !runs() {
		t.Error("something is watched, and it does not look")
	}
	b.Close()
	w.look(time.Now())
	if runs() {
		t.Error("what is watched was closed, and it looks")
	}
	p, q := net.Pipe()
	defer p.Close()
	defer q.Close()
	w.Watch(p)()
	if runs() {
		t.Error("a pipe is watched")
	}
}

// TestVanished: as long as something is heard within the silence, a connection lives, whatever is resent; one that hears nothing while
// things are sent in vain ends, not before the silence is over and not long after.
func TestVanished(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const quiet = 3 * time.Second
		now := time.Unix(1e9, 0)
		var s suspicion
		heardAt, vainSince := now, time.Time{}
		for range rapid.IntRange(1, 60).Draw(t, "looks") {
			now = now.Add(time.Duration(rapid.IntRange(100, 400).Draw(t, "ms")) * time.Millisecond)
			if rapid.IntRange(0, 9).Draw(t, "hears") == 0 {
				heardAt = now.Add(-time.Duration(rapid.IntRange(0, 100).Draw(t, "ago")) * time.Millisecond)
			}
			r := reading{heard: now.Sub(heardAt), resent: rapid.IntRange(0, 6).Draw(t, "resent"), probes: rapid.IntRange(0, 3).Draw(t, "probes")}
			vain := r.resent > 0 || r.probes > 0
			if !vain {
				vainSince = time.Time{}
			} else if vainSince.IsZero() {
				vainSince = now
			}
			got := s.vanished(r, now, quiet)
			if got && (!vain || r.heard < quiet || now.Sub(vainSince) < quiet || r.resent < resentMin && r.probes < probesMin) {
				t.Fatalf("%+v ends it, in vain for %v", r, now.Sub(vainSince))
			}
			if from := now.Sub(vainSince); !got && vain && r.resent >= resentMin && from > quiet+400*time.Millisecond && r.heard > quiet+800*time.Millisecond {
				t.Fatalf("%+v does not end it, in vain for %v", r, from)
			}
			if got {
				return
			}
		}
	})
}
