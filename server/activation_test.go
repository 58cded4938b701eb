package server

import (
	"net"
	"strings"
	"syscall"
	"testing"
)

func TestInheritedSocket(t *testing.T) {
	for _, c := range []struct {
		pid, n, names string
		fd            int
		ok            bool
		err           string
	}{
		{"", "", "", 0, false, ""},
		{"8", "1", "", 0, false, ""}, // of another process
		{"7", "1", "", 3, true, ""},
		{"7", "1", "whatever", 3, true, ""},
		{"7", "0", "", 0, false, ""},
		{"7", "3", "metrics:clients:x", 4, true, ""},
		{"7", "2", "a:b", 0, false, "FileDescriptorName"},
		{"7", "2", "a:b:clients", 0, false, "FileDescriptorName"},
		{"7", "", "", 0, false, "LISTEN_FDS"},
		{"7", "-1", "", 0, false, "LISTEN_FDS"},
	} {
		env := map[string]string{"LISTEN_PID": c.pid, "LISTEN_FDS": c.n, "LISTEN_FDNAMES": c.names}
		fd, ok, err := inheritedSocket(7, func(name string) string { return env[name] })
		switch {
		case (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error()+hintOf(err), c.err):
			t.Errorf("%+v: %v", c, err)
		case ok != c.ok || ok && fd != c.fd:
			t.Errorf("%+v: %d %t", c, fd, ok)
		}
	}
}

func TestAnInheritedSocketIsThatOfTheConfiguration(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dup := func() int {
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		fd, err := syscall.Dup(int(f.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	got, err := listenerOn(dup(), ":"+port)
	if err != nil || got.Addr().String() != l.Addr().String() {
		t.Fatal(err)
	}
	_ = got.Close()
	if _, err := listenerOn(dup(), "127.0.0.1:1"); err == nil || !strings.Contains(err.Error(), "gateway.listen is 127.0.0.1:1") {
		t.Errorf("another port: %v", err)
	}
}
