package pgwire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// msg is a message as tests compare it.
type msg struct {
	Type byte
	Body []byte
}

// pieces is a stream that arrives in pieces.
type pieces struct {
	b    []byte
	size func() int
}

func (p *pieces) Read(dst []byte) (int, error) {
	if len(p.b) == 0 {
		return 0, io.EOF
	}
	n := copy(dst, p.b[:min(len(p.b), max(1, p.size()))])
	p.b = p.b[n:]
	return n, nil
}

// way is a way to consume a message.
type way int

const (
	byBody way = iota
	byForward
	byPeekThenForward
	byDiscard
	byNothing
	ways
)

// consume reads all messages of a stream; how says how each is consumed. Those that are passed over have no body.
func consume(src io.Reader, may Limits, how func() way) (got []msg, err error) {
	r := NewReader(src)
	defer r.Drop()
	for {
		typ, n, err := r.Next(may)
		if err != nil {
			return got, err
		}
		m := msg{Type: typ}
		switch how() {
		case byBody:
			b, err := r.Body(largeMax)
			if err != nil {
				return got, err
			}
			m.Body = bytes.Clone(b)
		case byForward, byPeekThenForward:
			if _, err := r.Peek(min(n, 7)); err != nil {
				return got, err
			}
			var out bytes.Buffer
			w := NewWriter(&out)
			if err := r.Forward(w); err != nil {
				_ = w.Flush()
				return got, err
			}
			if err := w.Flush(); err != nil {
				return got, err
			}
			m.Body = out.Bytes()[headerLen:]
			if h := AppendHeader(nil, typ, n); !bytes.Equal(h, out.Bytes()[:headerLen]) {
				return got, errors.New("the header was forwarded wrongly")
			}
		case byDiscard:
			if err := r.Discard(n / 2); err != nil {
				return got, err
			}
		}
		got = append(got, m)
	}
}

// TestAnySplitGivesTheSameMessages: whatever pieces a stream arrives in, and however messages are consumed.
func TestAnySplitGivesTheSameMessages(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var stream []byte
		var want []msg
		for range rapid.IntRange(0, 20).Draw(t, "messages") {
			typ := rapid.SampledFrom([]byte(backendAllowed)).Draw(t, "type")
			n := rapid.OneOf(rapid.IntRange(0, 40), rapid.SampledFrom([]int{
				BufferSize - 6, BufferSize - 5, BufferSize - 4, BufferSize, BufferSize + 1, 3*BufferSize + 17,
			})).Draw(t, "length")
			body := make([]byte, n)
			for i := range body {
				body[i] = byte(i * 7)
			}
			stream = AppendMessage(stream, typ, body)
			want = append(want, msg{typ, body})
		}
		size := rapid.OneOf(rapid.IntRange(1, 9), rapid.IntRange(1, 2*BufferSize))
		src := &pieces{stream, func() int { return size.Draw(t, "piece") }}
		how := rapid.IntRange(0, int(ways)-1)
		i := 0
		got, err := consume(src, FromServer, func() way {
			w := way(how.Draw(t, "way"))
			if w == byDiscard || w == byNothing {
				want[i].Body = nil
			}
			i++
			return w
		})
		if !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		for i := range got {
			if !bytes.Equal(got[i].Body, want[i].Body) || got[i].Type != want[i].Type {
				t.Fatalf("message %d: got %c with %d bytes, want %c with %d", i, got[i].Type, len(got[i].Body), want[i].Type, len(want[i].Body))
			}
		}
		if len(got) != len(want) {
			t.Fatalf("got %d messages, want %d", len(got), len(want))
		}
	})
}

func TestLengthsAndTypesAreBounded(t *testing.T) {
	for _, c := range []struct {
		name string
		may  Limits
		typ  byte
		size uint32
		ok   bool
	}{
		{"shortest", FromClient, Sync, 4, true},
		{"no length", FromClient, Sync, 3, false},
		{"zero", FromServer, DataRow, 0, false},
		{"negative", FromServer, DataRow, 1 << 31, false},
		{"longest query", FromClient, Query, largeMax + 4, true},
		{"query too long", FromClient, Query, largeMax + 5, false},
		{"long describe", FromClient, Describe, smallMax + 5, false},
		{"unknown type", FromClient, 'y', 4, false},
		{"server's type from a client", FromClient, ReadyForQuery, 5, false},
		{"client's type from a server", FromServer, 'p', 5, false},
		{"longest SASL message", FromClientLogin, SASLResponse, saslMax + 4, true},
		{"SASL message too long", FromClientLogin, SASLResponse, saslMax + 5, false},
		{"query before login", FromClientLogin, Query, 10, false},
	} {
		b := binary.BigEndian.AppendUint32([]byte{c.typ}, c.size)
		typ, n, err := NewReader(bytes.NewReader(b)).Next(c.may)
		_, refused := errors.AsType[*ProtocolError](err)
		if refused == c.ok || (c.ok && (err != nil || typ != c.typ || n != int(c.size)-4)) {
			t.Errorf("%s: got %c %d, %v", c.name, typ, n, err)
		}
	}
}

func TestEndOfStream(t *testing.T) {
	whole := AppendQuery(nil, "select 1")
	for n := range len(whole) {
		r := NewReader(bytes.NewReader(whole[:n]))
		_, _, err := r.Next(FromClient)
		if err == nil {
			_, err = r.Body(100)
		}
		want := io.ErrUnexpectedEOF
		if n == 0 {
			want = io.EOF
		}
		if !errors.Is(err, want) || (n > 0 && errors.Is(err, io.EOF)) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
}

func TestBodyThatMayNotBeHeldCanBeForwarded(t *testing.T) {
	m := AppendQuery(nil, string(bytes.Repeat([]byte("x"), 5*BufferSize)))
	r := NewReader(bytes.NewReader(m))
	if _, _, err := r.Next(FromClient); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Body(5 * BufferSize); !errors.Is(err, ErrTooLong) {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := NewWriter(&out)
	if err := errors.Join(r.Forward(w), w.Flush()); err != nil || !bytes.Equal(out.Bytes(), m) {
		t.Errorf("%d bytes, %v", out.Len(), err)
	}
}

// endless is a message of any size that is nowhere held.
type endless struct {
	head []byte
	left int
}

func (e *endless) Read(p []byte) (int, error) {
	if n := copy(p, e.head); n > 0 {
		e.head = e.head[n:]
		return n, nil
	}
	if e.left == 0 {
		return 0, io.EOF
	}
	n := min(len(p), e.left)
	e.left -= n
	return n, nil
}

type counter int

func (c *counter) Write(p []byte) (int, error) { *c += counter(len(p)); return len(p), nil }

// TestGigabyteStreamsThrough: the largest message passes without being held.
func TestGigabyteStreamsThrough(t *testing.T) {
	r := NewReader(&endless{AppendHeader(nil, CopyData, largeMax), largeMax})
	var n counter
	w := NewWriter(&n)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, _, err := r.Next(FromClient); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Forward(w), w.Flush()); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if n != largeMax+headerLen {
		t.Errorf("%d bytes", n)
	}
	if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
		t.Errorf("%d bytes were allocated", got)
	}
}

// tcpPair is two ends of a TCP connection.
func tcpPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// TestWaitHoldsNoBuffer: on a TCP connection, and deadlines and the end of the stream are seen there too.
func TestWaitHoldsNoBuffer(t *testing.T) {
	a, b := tcpPair(t)
	r := NewReader(b)
	if _, err := a.Write(AppendQuery(nil, "select 1")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Next(FromClient); err != nil {
		t.Fatal(err)
	}
	if body, err := r.Body(100); err != nil || string(body) != "select 1\x00" {
		t.Fatalf("%q, %v", body, err)
	}
	if err := b.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	_, _, err := r.Next(FromClient)
	if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() {
		t.Fatal(err)
	}
	if r.buf != nil {
		t.Error("a buffer is held while nothing comes")
	}
	if err := b.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Write(AppendMessage(nil, Sync, nil)); err != nil {
		t.Fatal(err)
	}
	if typ, _, err := r.Next(FromClient); err != nil || typ != Sync {
		t.Fatalf("%c, %v", typ, err)
	}
	a.Close()
	if _, _, err := r.Next(FromClient); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

func TestCompleteTellsWholeMessages(t *testing.T) {
	stream := append(AppendMessage(nil, Sync, nil), AppendQuery(nil, "select 1")...)
	for n := headerLen; n <= len(stream); n++ {
		r := NewReader(&pieces{bytes.Clone(stream[:n]), func() int { return n }})
		if _, _, err := r.Next(FromClient); err != nil {
			t.Fatal(err)
		}
		if got := r.Complete(); got != (n == len(stream)) {
			t.Errorf("with %d of %d bytes: %v", n, len(stream), got)
		}
		r.Drop()
	}
}

// FuzzReader: nothing that comes makes it panic or read what is not there, and pieces of one byte give the same.
func FuzzReader(f *testing.F) {
	f.Add(AppendQuery(AppendMessage(nil, Sync, nil), "select 1"), byte(0))
	f.Add(binary.BigEndian.AppendUint32([]byte{'Q'}, 1<<31), byte(1))
	f.Add(append(binary.BigEndian.AppendUint32([]byte{'d'}, 1<<20), "x"...), byte(2))
	f.Fuzz(func(t *testing.T, b []byte, how byte) {
		w := func() way { return way(how) % ways }
		got1, err1 := consume(&pieces{bytes.Clone(b), func() int { return 1 }}, FromClient, w)
		got2, err2 := consume(&pieces{bytes.Clone(b), func() int { return len(b) }}, FromClient, w)
		if diff := cmp.Diff(got1, got2); diff != "" || (err1 == nil) != (err2 == nil) || err1.Error() != err2.Error() {
			t.Errorf("%v, %v\n%s", err1, err2, diff)
		}
	})
}

// FuzzParsers: nothing that comes makes them panic, and what they took gives the same bytes again.
func FuzzParsers(f *testing.F) {
	f.Add(AppendParse(nil, "s", []byte("select $1"), []byte{0, 1, 0, 0, 0, 23})[headerLen:])
	f.Add(AppendTarget(nil, Close, 'S', "s")[headerLen:])
	f.Add(AppendError(nil, &Error{Severity: "FATAL", Code: "57P01", Message: "m", Hint: "h"})[headerLen:])
	f.Add(AppendStartup(nil, []Param{{"user", "u"}})[8:])
	f.Add(AppendMessage(nil, DataRow, []byte{0, 2, 0, 0, 0, 1, 'x', 255, 255, 255, 255})[headerLen:])
	f.Add(AppendSASLInitial(nil, "SCRAM-SHA-256", []byte("n,,n=,r=x"))[headerLen:])
	f.Fuzz(func(t *testing.T, b []byte) {
		again := func(name string, m []byte) {
			if !bytes.Equal(m[headerLen:], b) {
				t.Errorf("%s: %q became %q", name, b, m[headerLen:])
			}
		}
		if st, err := ParseParse(b); err == nil {
			again("Parse", AppendParse(nil, string(st.Name), st.SQL, st.OIDs))
		}
		if kind, name, err := ParseTarget(b); err == nil {
			again("Close", AppendTarget(nil, Close, kind, string(name)))
		}
		if sql, err := ParseQuery(b); err == nil {
			again("Query", AppendQuery(nil, string(sql)))
		}
		if p, err := ParseParameterStatus(b); err == nil {
			again("ParameterStatus", AppendParameterStatus(nil, p))
		}
		if pid, secret, err := ParseBackendKeyData(b); err == nil {
			again("BackendKeyData", AppendBackendKeyData(nil, pid, secret))
		}
		if kind, data, err := ParseAuth(b); err == nil {
			again("Authentication", AppendAuth(nil, kind, data))
		}
		if mech, data, err := ParseSASLInitial(b); err == nil {
			again("SASLInitialResponse", AppendSASLInitial(nil, mech, data))
		}
		if status, err := ParseReadyForQuery(b); err == nil {
			again("ReadyForQuery", AppendReadyForQuery(nil, status))
		}
		if portal, statement, n, ok := ParseBind(b); ok && (n > len(b) || len(portal)+len(statement)+2 != n) {
			t.Errorf("Bind: names of %d bytes in %d", n, len(b))
		}
		_, _ = ParseError(b)
		_, _ = ParseRow(b)
		_, _ = ParseMechanisms(b)
		_, _, _ = ParseExecute(b)
		_, _ = ReadStartup(bytes.NewReader(b))
		_, _ = parseStartup(Version30, b)
		_, _ = parseStartup(cancelCode, b)
	})
}

// BenchmarkForward forwards rows as a gateway does: header by header, one write call per buffer.
func BenchmarkForward(b *testing.B) {
	row := AppendMessage(nil, DataRow, bytes.Repeat([]byte("x"), 120))
	src := &loop{b: bytes.Repeat(row, 100)}
	r, w := NewReader(src), NewWriter(io.Discard)
	b.SetBytes(int64(len(row)))
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := r.Next(FromServer); err != nil {
			b.Fatal(err)
		}
		if err := r.Forward(w); err != nil {
			b.Fatal(err)
		}
	}
}

// loop is a stream that begins again.
type loop struct {
	b  []byte
	at int
}

func (l *loop) Read(p []byte) (int, error) {
	n := copy(p, l.b[l.at:])
	l.at = (l.at + n) % len(l.b)
	return n, nil
}

func TestWhatWasNotSentCanBeTakenBack(t *testing.T) {
	var dst bytes.Buffer
	w := NewWriter(&dst)
	write := func(s string) {
		if err := w.Write([]byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	write("kept ")
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	write("and kept")
	mark := w.Total()
	write(", not kept")
	if !w.CutBack(mark) {
		t.Error("nothing of it was sent")
	}
	if w.CutBack(2) {
		t.Error("that was sent")
	}
	write(".")
	if err := w.Flush(); err != nil || dst.String() != "kept and kept." || w.Total() != int64(dst.Len()) || w.Sent() != w.Total() {
		t.Errorf("%q, %v, total %d, sent %d", dst.String(), err, w.Total(), w.Sent())
	}
	write(strings.Repeat("x", BufferSize+1))
	if w.CutBack(int64(dst.Len()) - 1) {
		t.Error("a full buffer was sent")
	}
}

// TestWhatIsAhead: what is buffered behind the message at hand, however much of that was consumed, and the messages in it.
func TestWhatIsAhead(t *testing.T) {
	stream := AppendQuery(nil, "SELECT 1")
	first := len(stream)
	stream = AppendHeader(AppendQuery(stream, "SELECT 22"), Sync, 0)
	whole := len(stream)
	stream = append(stream, AppendQuery(nil, "SELECT 333")[:9]...)
	r := NewReader(bytes.NewReader(stream))
	if r.Ahead() != nil {
		t.Error("nothing was read yet")
	}
	if _, _, err := r.Next(FromClient); err != nil {
		t.Fatal(err)
	}
	for _, consume := range []int{0, 3, 1 << 10} {
		if err := r.Discard(consume); err != nil {
			t.Fatal(err)
		}
		if got := r.Ahead(); !bytes.Equal(got, stream[first:]) {
			t.Errorf("%q", got)
		}
	}
	rest := r.Ahead()
	var types, bodies []string
	for {
		typ, body, more, ok := Cut(rest)
		if !ok {
			break
		}
		types, bodies, rest = append(types, string(typ)), append(bodies, string(body)), more
	}
	if len(types) != 2 || types[0] != "Q" || bodies[0] != "SELECT 22\x00" || types[1] != "S" || bodies[1] != "" || !bytes.Equal(rest, stream[whole:]) {
		t.Errorf("%q %q %q", types, bodies, rest)
	}
	for _, m := range [][]byte{nil, {'Q'}, {'Q', 0, 0, 0, 3}, {'Q', 0, 0, 0, 0}, {'Q', 255, 255, 255, 255, 0}, {'Q', 0, 0, 0, 5}} {
		if _, _, _, ok := Cut(m); ok {
			t.Errorf("%v was taken for a message", m)
		}
	}
	// A message that is larger than the buffer has nothing ahead until it is consumed.
	long := append(AppendQuery(nil, strings.Repeat("x", 2*BufferSize)), AppendHeader(nil, Sync, 0)...)
	r = NewReader(bytes.NewReader(long))
	if _, _, err := r.Next(FromClient); err != nil || r.Ahead() != nil {
		t.Errorf("%v, %d bytes", err, len(r.Ahead()))
	}
}
