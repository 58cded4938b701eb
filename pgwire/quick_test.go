package pgwire

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// TestQuickIsAConnection: more than the socket takes at once, both ways; deadlines; the end of the stream; a connection that is closed.
func TestQuickIsAConnection(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	there, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	here, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	q := Quick(here)
	if q == here {
		t.Fatal("a TCP connection is not made quick")
	}
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	echoed := make(chan error, 1)
	go func() {
		_, err := io.CopyN(there, there, int64(len(sent)))
		echoed <- err
	}()
	wrote := make(chan error, 1)
	go func() {
		n, err := q.Write(sent)
		if n != len(sent) && err == nil {
			err = io.ErrShortWrite
		}
		wrote <- err
	}()
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(q, got); err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%v; equal: %t", err, bytes.Equal(got, sent))
	}
	if err := errors.Join(<-wrote, <-echoed); err != nil {
		t.Fatal(err)
	}
	if err := q.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := q.Read(got); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nothing there until the deadline: %d, %v", n, err)
	}
	if err := q.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	there.Close()
	if n, err := q.Read(got); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %d, %v", n, err)
	}
	q.Close()
	if _, err := q.Write(sent); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	pipe, other := net.Pipe()
	defer other.Close()
	if Quick(pipe) != pipe {
		t.Error("a pipe is made quick")
	}
	pipe.Close()
}
