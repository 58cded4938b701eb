package link

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/link/linkpb"
	"github.com/duri-io/duri/wal"
)

// hinted is an error with a hint, as the site's other packages return.
type hinted struct{}

func (hinted) Error() string    { return "the table is locked" }
func (hinted) HintText() string { return "try later" }

func testRelation() *wal.Relation {
	return (&wal.Relation{OID: 1, Namespace: "public", Name: "t", Identity: wal.IdentityDefault, Columns: []wal.Column{
		{Name: "id", TypeOID: 23, Key: true}, {Name: "a"}, {Name: "b"}, {Name: "c"},
	}}).Seal()
}

func TestRowsTravelUnchanged(t *testing.T) {
	w := newWorld(t, nil)
	rel := testRelation()
	asked := wal.Tuple{{Kind: wal.Text, Data: []byte("7")}, {Kind: wal.Unchanged}, {Kind: wal.Omitted}, {Kind: wal.Null}}
	answer := wal.Tuple{{Kind: wal.Text, Data: []byte("7")}, {Kind: wal.Text, Data: []byte{}}, {Kind: wal.Null}, {Kind: wal.Text, Data: bytes.Repeat([]byte("x"), 5<<20)}}
	var found bool
	var failure error
	w.db.fetchRow = func(_ context.Context, r *wal.Relation, key []string, row wal.Tuple) (wal.Tuple, bool, error) {
		if d := cmp.Diff(rel, r) + cmp.Diff([]string{"id"}, key) + cmp.Diff(asked, row); d != "" {
			t.Error(d)
		}
		if !found {
			return nil, false, failure
		}
		return answer, true, nil
	}
	cl := w.client(nil)
	fetch := func() (wal.Tuple, bool, error) {
		return cl.FetchRow(context.Background(), database, rel, []string{"id"}, asked)
	}
	if row, ok, err := fetch(); err != nil || ok || row != nil {
		t.Errorf("a row that does not exist: %v, %t, %v", row, ok, err)
	}
	failure = hinted{}
	var e *Error
	if _, _, err := fetch(); !errors.Is(err, ErrFailed) || !errors.As(err, &e) || e.Sentence != "the table is locked" || e.HintText() != "try later" {
		t.Errorf("got %v, want sentence and hint of the site's own error", err)
	}
	found = true
	row, ok, err := fetch()
	if err != nil || !ok || len(row) != 4 || row[1].Data == nil || !bytes.Equal(row[3].Data, answer[3].Data) {
		t.Errorf("%t, %v", ok, err)
	}
	row[3], answer[3] = wal.Value{}, wal.Value{}
	if d := cmp.Diff(answer, row); d != "" {
		t.Error(d)
	}
	answer = answer[:2]
	if _, _, err := fetch(); err == nil {
		t.Error("a row with too few columns was accepted")
	}
	if _, _, err := cl.FetchRow(context.Background(), database, rel, nil, asked); !errors.Is(err, ErrProtocol) {
		t.Errorf("without a key: %v", err)
	}
	if _, _, err := cl.FetchRow(context.Background(), database, rel, []string{"z"}, asked); !errors.Is(err, ErrProtocol) {
		t.Errorf("with a key that is no column: %v", err)
	}
	if _, _, err := cl.FetchRow(context.Background(), database, rel, []string{"id"}, asked[:3]); !errors.Is(err, ErrProtocol) {
		t.Errorf("with too few values: %v", err)
	}
}

func TestDamagedRowsAreRefused(t *testing.T) {
	rel := (&wal.Relation{Columns: []wal.Column{{Name: "id"}}}).Seal()
	for _, kind := range []uint32{0, 'x', 'b', 256 + 't', 1 << 31} {
		if row, err := parseTuple([]*linkpb.Value{{Kind: kind}}, rel); err == nil {
			t.Errorf("kind %d: %v", kind, row)
		}
	}
	if _, err := parseTuple([]*linkpb.Value{nil}, rel); err == nil {
		t.Error("a missing value was accepted")
	}
}

func TestCompareAndStatusAreOpaque(t *testing.T) {
	w := newWorld(t, func(c *ServerConfig) {
		c.Status = func(context.Context) ([]byte, error) { return []byte(`{"site":"seoul"}`), nil }
	})
	w.db.compare = func(_ context.Context, q []byte) ([]byte, error) {
		if len(q) == 0 {
			return nil, hinted{}
		}
		return append([]byte("re "), q...), nil
	}
	cl, ctx := w.client(nil), context.Background()
	big := bytes.Repeat([]byte("q"), 10<<20) // more than gRPC's own limit
	if got, err := cl.Compare(ctx, database, big); err != nil || len(got) != len(big)+3 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if _, err := cl.Compare(ctx, database, nil); !errors.Is(err, ErrFailed) || hintOf(err) != "try later" {
		t.Errorf("got %v", err)
	}
	if _, err := cl.Compare(ctx, "other", nil); !errors.Is(err, ErrUnknownDatabase) {
		t.Errorf("got %v", err)
	}
	if got, err := cl.Status(ctx); err != nil || string(got) != `{"site":"seoul"}` {
		t.Errorf("%s, %v", got, err)
	}
}

func TestStatusThatIsNotThere(t *testing.T) {
	if _, err := newWorld(t, nil).client(nil).Status(context.Background()); !errors.Is(err, ErrNotReady) {
		t.Errorf("got %v", err)
	}
}

func TestCopyStreamsEverythingOrFails(t *testing.T) {
	w := newWorld(t, nil)
	text, random := bytes.Repeat([]byte("the same line again and again\n"), 100_000), make([]byte, 1<<20)
	rand.Read(random)
	want := append(append([]byte{}, text...), random...)
	var failure error
	w.db.copy = func(_ context.Context, wr io.Writer) error {
		for rest := want; len(rest) > 0; { // in odd pieces
			n := min(len(rest), 70_001)
			if _, err := wr.Write(rest[:n]); err != nil {
				return err
			}
			rest = rest[n:]
		}
		return failure
	}
	cl := w.client(nil)
	r, err := cl.Copy(context.Background(), database)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if n := w.relay.Passed(1); n > int64(len(random)+len(text)/10) {
		t.Errorf("%d bytes on the wire", n)
	}

	failure = hinted{}
	if r, err = cl.Copy(context.Background(), database); err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err = io.ReadAll(r); !errors.Is(err, ErrFailed) || hintOf(err) != "try later" {
		t.Errorf("a copy that failed at the end read with %v, want its error", err)
	}
	if _, again := r.Read(make([]byte, 1)); !errors.Is(again, err) {
		t.Errorf("then %v, want the same error", again)
	}
	if _, err := cl.Copy(context.Background(), "other"); !errors.Is(err, ErrUnknownDatabase) {
		t.Errorf("got %v, want a refusal before the first Read", err)
	}
}

func TestEmptyCopy(t *testing.T) {
	w := newWorld(t, nil)
	w.db.copy = func(context.Context, io.Writer) error { return nil }
	r, err := w.client(nil).Copy(context.Background(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if b, err := io.ReadAll(r); err != nil || len(b) != 0 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

func TestCopyEndsAtBothEndsHoweverItEnds(t *testing.T) {
	w := newWorld(t, nil)
	ended := make(chan error, 1)
	w.db.copy = func(ctx context.Context, wr io.Writer) error {
		for {
			if _, err := wr.Write(make([]byte, copyBytes)); err != nil {
				ended <- err
				return err
			}
		}
	}
	finish := func(what string) {
		t.Helper()
		select {
		case err := <-ended:
			if err == nil {
				t.Errorf("%s: the writer ended without an error", what)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: the writer goes on", what)
		}
	}
	start := func(ctx context.Context) io.ReadCloser {
		t.Helper()
		r, err := w.client(nil).Copy(ctx, database)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		if _, err := io.ReadFull(r, make([]byte, 3*copyBytes)); err != nil {
			t.Fatal(err)
		}
		return r
	}
	start(context.Background()).Close()
	finish("reader closed")

	ctx, cancel := context.WithCancel(context.Background())
	r := start(ctx)
	cancel()
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, context.Canceled) {
		t.Errorf("after cancel: %v", err)
	}
	finish("reader cancelled")

	r = start(context.Background())
	w.relay.Reset()
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, ErrBroken) {
		t.Errorf("after a reset: %v", err)
	}
	finish("connection reset")

	r = start(context.Background())
	go w.stop()
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, ErrStopping) {
		t.Errorf("server stops: %v", err)
	}
	finish("server stopped")
}

func TestGoneIsWhoseAddressTakesNobody(t *testing.T) {
	w := newWorld(t, nil)
	if w.client(nil).Gone(t.Context()) {
		t.Error("a peer that answers counts as gone")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := w.client(func(c *ClientConfig) { c.Address = l.Addr().String() })
	go func() { // as a relay whose target refuses
		c, err := l.Accept()
		if err == nil {
			c.Close()
		}
	}()
	if !nobody.Gone(t.Context()) {
		t.Error("a connection that ends before the handshake")
	}
	silent := make(chan struct{})
	go func() {
		defer close(silent)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(io.Discard, c)
	}()
	if nobody.Gone(t.Context()) {
		t.Error("a peer that takes connections and says nothing counts as gone")
	}
	<-silent
	l.Close()
	if !nobody.Gone(t.Context()) {
		t.Error("an address that refuses")
	}
}
