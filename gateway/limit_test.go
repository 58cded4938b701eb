package gateway

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"
)

func TestMeter(t *testing.T) {
	var m meter
	now := time.Unix(1000, 0)
	taken := func(key string, tries int) (n int) {
		for range tries {
			if m.take(key, 2, 5, now) {
				n++
			}
		}
		return n
	}
	for _, step := range []struct {
		after time.Duration
		key   string
		want  int
	}{
		{0, "a", 5}, {0, "a", 0}, {0, "b", 5}, {time.Second, "a", 2}, {250 * time.Millisecond, "a", 0}, {250 * time.Millisecond, "a", 1}, {time.Hour, "a", 5}, {-time.Hour, "a", 0},
	} {
		now = now.Add(step.after)
		if got := taken(step.key, 20); got != step.want {
			t.Errorf("%v later %s gets %d, want %d", step.after, step.key, got, step.want)
		}
	}
	for i := range 3 * knownMax {
		m.take(fmt.Sprint(i), 2, 5, now)
	}
	if len(m.seen) > knownMax {
		t.Errorf("%d keys are remembered", len(m.seen))
	}
}

func TestPlace(t *testing.T) {
	for addr, want := range map[string]string{
		"10.0.0.1:5": "10.0.0.1", "[::1]:5": "::/64", "[2001:db8:1:2:3::4%eth0]:5": "2001:db8:1:2::/64", "[::ffff:10.0.0.1]:5": "10.0.0.1",
	} {
		a, err := net.ResolveTCPAddr("tcp", addr)
		if err != nil {
			a = &net.TCPAddr{IP: net.ParseIP("2001:db8:1:2:3::4"), Port: 5, Zone: "eth0"}
		}
		if got := place(a); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
	if got := place(&net.UnixAddr{Name: "/run/x"}); got != "/run/x" {
		t.Error(got)
	}
}

func TestFloodsAreSummedUp(t *testing.T) {
	var out bytes.Buffer
	f := floods{log: slog.New(slog.NewTextHandler(&out, nil))}
	logged := func() int {
		n := strings.Count(out.String(), "\n")
		out.Reset()
		return n
	}
	for i := range 1000 {
		f.warn("one", "it happened", "i", i)
	}
	f.warn("two", "that too")
	if n := logged(); n != 2 {
		t.Errorf("%d lines", n)
	}
	now := time.Now()
	f.sum(now, now.Add(-quietFor))
	if n := logged(); n != 0 {
		t.Errorf("%d lines within a minute", n)
	}
	now = now.Add(quietFor + time.Second)
	f.sum(now, now.Add(-quietFor))
	if text := out.String(); !strings.Contains(text, "i=999 times=999") || logged() != 1 {
		t.Errorf("after a minute: %q", text)
	}
	now = now.Add(quietFor + time.Second)
	f.sum(now, now.Add(-quietFor))
	if len(f.kinds) != 0 || logged() != 0 {
		t.Error("what has stopped is not forgotten")
	}
	for i := range knownMax + 10 {
		f.warn(fmt.Sprint(i), "x")
	}
	logged()
	f.sum(now, now.Add(-quietFor))
	if text := out.String(); !strings.Contains(text, "times=10") || len(f.kinds) > knownMax {
		t.Errorf("too many kinds: %d, %q", len(f.kinds), text)
	}
}
