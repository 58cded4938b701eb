package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/link/linkpb"
	"github.com/duri-io/duri/wal"
)

// fakeSink is a Sink that claims a position.
type fakeSink struct {
	inc     journal.Incarnation
	have    bool
	end     wal.LSN
	welcome func(journal.Header) error
	frames  func(data []byte, from, to wal.LSN) error
	ack     func() Ack
}

func (s *fakeSink) Position() (journal.Incarnation, bool, wal.LSN) { return s.inc, s.have, s.end }
func (s *fakeSink) Welcome(h journal.Header) error {
	if s.welcome == nil {
		return nil
	}
	return s.welcome(h)
}

func (s *fakeSink) Frames(data []byte, from, to wal.LSN) error {
	if s.frames == nil {
		return nil
	}
	return s.frames(data, from, to)
}

func (s *fakeSink) Ack() Ack {
	if s.ack == nil {
		return Ack{}
	}
	return s.ack()
}
func (s *fakeSink) Acks() <-chan struct{} { return nil }
func (s *fakeSink) Heartbeat(Heartbeat)   {}

func TestRefusalsArriveWithSentenceAndHint(t *testing.T) {
	other := header().Incarnation
	other.Timeline++
	cases := []struct {
		name   string
		server func(*ServerConfig)
		client func(*ClientConfig)
		before func(t *testing.T, w *world)
		sink   fakeSink
		kind   error
		retry  bool
		text   []string // in the sentence
		hint   string
	}{
		{
			name: "another cluster", client: func(c *ClientConfig) { c.ClusterID = "beef" },
			kind: ErrCluster, text: []string{"site seoul: ", "belongs to cluster c0ffee", `"beef"`}, hint: "cluster id",
		},
		{
			name: "newer protocol", client: func(c *ClientConfig) { c.Versions = Versions{2, 3} },
			kind: ErrVersion, text: []string{"speaks link protocol 1 to 1, the caller 2 to 3"}, hint: "releases",
		},
		{
			name: "older protocol", server: func(c *ServerConfig) { c.Versions = Versions{4, 5} },
			kind: ErrVersion, text: []string{"speaks link protocol 4 to 5, the caller 1 to 1"}, hint: "releases",
		},
		{
			name: "unknown database", server: func(c *ServerConfig) { c.Databases = func(string) (Database, bool) { return nil, false } },
			kind: ErrUnknownDatabase, retry: true, text: []string{`does not replicate database "shop"`}, hint: "configuration",
		},
		{
			name: "not ready", before: func(_ *testing.T, w *world) { w.db.notReady = errors.New("the slot is being created") },
			kind: ErrNotReady, retry: true, text: []string{"the slot is being created"},
		},
		{
			name: "journal is closed", before: func(t *testing.T, w *world) {
				if err := w.db.j.Close(); err != nil {
					t.Fatal(err)
				}
			},
			kind: ErrNotReady, retry: true, text: []string{"closed"},
		},
		{
			name: "another incarnation", sink: fakeSink{inc: other, have: true, end: 0x1000},
			kind: ErrIncarnation, text: []string{header().Incarnation.String(), other.String()}, hint: "re-join",
		},
		{
			name: "ahead", sink: fakeSink{inc: header().Incarnation, have: true, end: 0x999999},
			kind: ErrAhead, retry: true, text: []string{"ends at 0/", "the copy at 0/999999"}, hint: "wait",
		},
		{
			name: "wanted ahead", sink: fakeSink{end: 0x999999},
			kind: ErrAhead, retry: true, text: []string{"0/999999"}, hint: "wait",
		},
		{
			name: "pruned", sink: fakeSink{inc: header().Incarnation, have: true, end: 0x1000},
			before: func(t *testing.T, w *world) {
				newHistory(w.db.j, 1).fill(t, 2000)
				if err := w.db.j.Prune(w.db.j.End()); err != nil {
					t.Fatal(err)
				}
				if w.db.j.Start() == 0x1000 {
					t.Fatal("nothing was pruned")
				}
			},
			kind: ErrPruned, text: []string{"position 0/1000 is no longer kept"}, hint: "re-join",
		},
		{
			name: "the site itself", client: func(c *ClientConfig) { c.Site = "seoul" },
			kind: ErrSite, text: []string{"certificate of site seoul, which is this site"}, hint: "own certificate",
		},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, c.server)
			newHistory(w.db.j, 1).fill(t, 3)
			if c.before != nil {
				c.before(t, w)
			}
			cl := w.client(func(cc *ClientConfig) {
				if c.client != nil {
					c.client(cc)
				}
				_, cc.TLS = w.ca.tls(t, cc.Site)
			})
			err := follow(t, cl, &c.sink).wait(t)
			var e *Error
			if !errors.Is(err, c.kind) || !errors.As(err, &e) {
				t.Fatalf("got %v, want %v", err, c.kind)
			}
			for _, want := range c.text {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("sentence %q lacks %q", err, want)
				}
			}
			if !strings.Contains(e.HintText(), c.hint) || c.hint == "" && e.HintText() != "" {
				t.Errorf("hint %q, want %q in it", e.HintText(), c.hint)
			}
			if Retry(err) != c.retry {
				t.Errorf("Retry is %t, want %t", Retry(err), c.retry)
			}
			if errors.Is(err, ErrAhead) && (e.End != w.db.j.End() || e.Start != w.db.j.Start()) {
				t.Errorf("journal %s to %s, want %s to %s", e.Start, e.End, w.db.j.Start(), w.db.j.End())
			}
		})
	}
}

// The ahead origin that decodes its tail again is followed without more ado.
func TestAheadHealsWhenTheOriginCatchesUp(t *testing.T) {
	w := newWorld(t, nil)
	h := newHistory(w.db.j, 2)
	var txns []*wal.Txn
	for range 20 {
		txns = append(txns, h.txn(2, 50))
	}
	add := func(list []*wal.Txn) {
		for _, x := range list {
			if err := w.db.j.AppendTxn(x); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.db.j.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	add(txns)
	cp, cl := openCopy(t, t.TempDir()), w.client(nil)
	f := follow(t, cl, cp)
	waitFor(t, "the copy to be complete", func() bool { return cp.Ack().Durable == w.db.j.End() })
	f.stop(t)
	waitFor(t, "the server to notice", func() bool { return len(w.server.Followers()) == 0 })

	w.db.j = newJournal(t, header(), journal.Options{}) // the tail is lost
	add(txns[:10])
	if err := follow(t, cl, cp).wait(t); !errors.Is(err, ErrAhead) {
		t.Fatalf("got %v, want the copy to be ahead", err)
	}
	add(txns[10:])
	f = follow(t, cl, cp)
	add([]*wal.Txn{h.txn(1, 10)})
	waitFor(t, "the copy to be complete", func() bool { return cp.Ack().Durable == w.db.j.End() })
	f.stop(t)
	expectEqual(t, w.db.j, cp)
}

func TestConnectionsOfStrangersFailWithTheReason(t *testing.T) {
	w := newWorld(t, nil)
	stranger, forger := newAuthority(t, "beef"), newAuthority(t, cluster)
	cases := []struct {
		name   string
		change func(*ClientConfig)
		text   string
	}{
		{"certificate of another cluster", func(c *ClientConfig) { _, c.TLS = stranger.tls(t, "busan") }, "belongs to cluster c0ffee, this is cluster beef"},
		{"another authority", func(c *ClientConfig) { _, c.TLS = forger.tls(t, "busan") }, "signed by another CA"},
		{"another site at the address", func(c *ClientConfig) { c.Peer = "daegu" }, "certificate is that of site seoul, not of daegu"},
		{
			// The client accepts the server, which does not accept the client.
			"refused by the server", func(c *ClientConfig) {
				_, mine := forger.tls(t, "busan")
				_, theirs := w.ca.tls(t, "busan")
				c.TLS = theirs.Clone()
				c.TLS.Certificates = mine.Certificates
			}, "tls: ",
		},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			err := follow(t, w.client(c.change), &fakeSink{}).wait(t)
			var e *Error
			if !errors.As(err, &e) || !errors.Is(err, ErrUnreachable) || !strings.Contains(e.Sentence, c.text) {
				t.Fatalf("got %v, want %q", err, c.text)
			}
			if !strings.Contains(e.HintText(), "duri init") {
				t.Errorf("hint %q", e.HintText())
			}
		})
	}
}

func TestUnreachablePeer(t *testing.T) {
	w := newWorld(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	cl := w.client(func(c *ClientConfig) { c.Address = l.Addr().String() })
	_, err = cl.Status(context.Background())
	var e *Error
	if !errors.Is(err, ErrUnreachable) || !Retry(err) || !errors.As(err, &e) || !strings.Contains(e.HintText(), "agent runs") {
		t.Errorf("got %v, want an unreachable peer", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := cl.Status(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's error", err)
	}
}

func TestEveryKindTravels(t *testing.T) {
	for code := range linkpb.Code_name {
		if _, ok := kinds[linkpb.Code(code)]; ok == (code == 0) {
			t.Errorf("code %d: known %t", code, ok)
		}
	}
	for _, kind := range kinds {
		sent := &Error{Kind: kind, Sentence: "s", Hint: "h", Start: 1, End: 2}
		err := received(context.Background(), sent.GRPCStatus().Err(), "seoul", "x:1")
		var got *Error
		if !errors.As(err, &got) || !errors.Is(got.Kind, kind) || got.Sentence != "s" || got.Hint != "h" || got.Start != 1 || got.End != 2 || got.Peer != "seoul" {
			t.Errorf("%v became %+v", sent, err)
		}
	}
	if err := fromRefusal(&linkpb.Refusal{Code: 9999}, "seoul"); !errors.Is(err, ErrFailed) || err.Sentence == "" {
		t.Errorf("a code of the future became %+v", err)
	}
	hold := &HoldError{Dir: "d", At: 16, Advice: "a", Err: journal.ErrChain}
	if !errors.Is(hold, ErrHeld) || !errors.Is(hold, journal.ErrChain) || hold.HintText() != "a" || Retry(fmt.Errorf("x: %w", hold)) {
		t.Errorf("%v", hold)
	}
}

// raw is a stream to seoul spoken by hand.
func (w *world) raw(t *testing.T) *wire {
	t.Helper()
	_, client := w.ca.tls(t, "busan")
	client.NextProtos = []string{followProtocol}
	conn, err := tls.Dial("tcp", w.addr, client)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return newWire(conn)
}

func ackMessage(received, durable wal.LSN, taken uint64) *linkpb.FollowRequest {
	return &linkpb.FollowRequest{Message: &linkpb.FollowRequest_Ack{Ack: &linkpb.Ack{Received: uint64(received), Durable: uint64(durable), TakenBytes: taken}}}
}

func TestOriginEndsStreamsThatBreakTheProtocol(t *testing.T) {
	start := &linkpb.FollowRequest{Message: &linkpb.FollowRequest_Start{Start: &linkpb.Start{
		Hello: &linkpb.Hello{MinVersion: 1, MaxVersion: 1, ClusterId: cluster}, Database: database, WindowBytes: 1 << 20,
	}}}
	cases := map[string]struct {
		messages []*linkpb.FollowRequest
		kind     error
		text     string
	}{
		"no start":                    {[]*linkpb.FollowRequest{ackMessage(0, 0, 0)}, ErrProtocol, "first message"},
		"empty message":               {[]*linkpb.FollowRequest{{}}, ErrProtocol, "first message"},
		"nothing at all":              {nil, ErrSilent, "nothing came"},
		"silence after the start":     {[]*linkpb.FollowRequest{start}, ErrSilent, "nothing came"},
		"start twice":                 {[]*linkpb.FollowRequest{start, start}, ErrProtocol, "not an acknowledgement"},
		"received beyond the end":     {[]*linkpb.FollowRequest{start, ackMessage(1<<40, 0, 0)}, ErrProtocol, "acknowledges received"},
		"durable beyond received":     {[]*linkpb.FollowRequest{start, ackMessage(0x1000, 0x1001, 0)}, ErrProtocol, "acknowledges received"},
		"bytes that were never sent":  {[]*linkpb.FollowRequest{start, ackMessage(0x1000, 0x1000, 1<<50)}, ErrProtocol, "bytes of frames"},
		"more bytes than a count has": {[]*linkpb.FollowRequest{start, ackMessage(0x1000, 0x1000, 1<<63+1)}, ErrProtocol, "bytes of frames"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(c *ServerConfig) { c.Silence = 200 * time.Millisecond })
			newHistory(w.db.j, 1).fill(t, 3)
			s := w.raw(t)
			for _, m := range c.messages {
				if err := s.send(m); err != nil {
					t.Fatal(err)
				}
			}
			var err error
			for m := (&linkpb.FollowReply{}); err == nil; {
				if err = s.recv(m); m.GetRefusal() != nil {
					err = fromRefusal(m.GetRefusal(), "seoul")
				}
			}
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("stream ended with %v, want %q", err, c.text)
			}
			if a := w.db.last("busan"); a != (Ack{}) {
				t.Errorf("%+v was taken for an acknowledgement", a)
			}
		})
	}
}

// faker is a server whose Follow is a function.
type faker struct {
	linkpb.UnimplementedLinkServer
}

// fakeSeoul starts a faker with seoul's certificate and returns a client of it.
func fakeSeoul(t *testing.T, change func(*ClientConfig), f func(*wire)) *Client {
	t.Helper()
	ca := newAuthority(t, cluster)
	server, _ := ca.tls(t, "seoul")
	_, client := ca.tls(t, "busan")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	g := grpc.NewServer(grpc.Creds(newDivided(server, map[string]func(*tls.Conn){followProtocol: func(conn *tls.Conn) {
		wg.Go(func() {
			defer conn.Close()
			f(newWire(conn))
		})
	}})), grpc.WaitForHandlers(true))
	linkpb.RegisterLinkServer(g, faker{})
	ended := make(chan error, 1)
	go func() { ended <- g.Serve(l) }()
	c := ClientConfig{Address: l.Addr().String(), Peer: "seoul", TLS: client, ClusterID: cluster, Site: "busan", Silence: 300 * time.Millisecond}
	if change != nil {
		change(&c)
	}
	cl, err := NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cl.Close()
		g.Stop()
		<-ended
		wg.Wait()
	})
	return cl
}

func TestReceiverEndsStreamsThatBreakTheProtocol(t *testing.T) {
	h := header()
	welcome := &linkpb.FollowReply{Message: &linkpb.FollowReply_Welcome{Welcome: &linkpb.Welcome{Version: 1, Header: h.Marshal(), Start: 0x1000}}}
	changed := func(f func(*linkpb.Welcome)) *linkpb.FollowReply {
		x := &linkpb.Welcome{Version: 1, Header: h.Marshal(), Start: 0x1000}
		f(x)
		return &linkpb.FollowReply{Message: &linkpb.FollowReply_Welcome{Welcome: x}}
	}
	frames := func(f *linkpb.Frames) *linkpb.FollowReply {
		return &linkpb.FollowReply{Message: &linkpb.FollowReply_Frames{Frames: f}}
	}
	bomb, _ := mustPacker(t).pack(make([]byte, 8*chunkBytes))
	cases := map[string]struct {
		replies []*linkpb.FollowReply
		kind    error
		text    string
	}{
		"no welcome":        {[]*linkpb.FollowReply{frames(&linkpb.Frames{})}, ErrProtocol, "begin with a welcome"},
		"nothing":           {nil, ErrSilent, "silent"},
		"only a welcome":    {[]*linkpb.FollowReply{welcome}, ErrSilent, "silent"},
		"welcome twice":     {[]*linkpb.FollowReply{welcome, welcome}, ErrProtocol, "does not belong here"},
		"damaged header":    {[]*linkpb.FollowReply{changed(func(w *linkpb.Welcome) { w.Header[20] ^= 1 })}, ErrProtocol, "header of the journal"},
		"unoffered version": {[]*linkpb.FollowReply{changed(func(w *linkpb.Welcome) { w.Version = 2 })}, ErrProtocol, "version 2"},
		"another start":     {[]*linkpb.FollowReply{changed(func(w *linkpb.Welcome) { w.Start++ })}, ErrProtocol, "was not asked for"},
		"a hole":            {[]*linkpb.FollowReply{welcome, frames(&linkpb.Frames{From: 0x1001, To: 0x1002})}, ErrProtocol, "where those after 0/1000 belong"},
		"backwards":         {[]*linkpb.FollowReply{welcome, frames(&linkpb.Frames{From: 0x1000, To: 0xfff})}, ErrProtocol, "belong"},
		"not zstd":          {[]*linkpb.FollowReply{welcome, frames(&linkpb.Frames{Data: []byte("xyz"), Zstd: true, From: 0x1000, To: 0x1001})}, ErrProtocol, "decompress"},
		"a bomb":            {[]*linkpb.FollowReply{welcome, frames(&linkpb.Frames{Data: bomb, Zstd: true, From: 0x1000, To: 0x1001})}, ErrProtocol, "decompress"},
		"more than the window": {[]*linkpb.FollowReply{
			welcome,
			frames(&linkpb.Frames{Data: make([]byte, 50<<10), From: 0x1000, To: 0x1001}),
			frames(&linkpb.Frames{Data: make([]byte, 50<<10), From: 0x1001, To: 0x1002}),
			frames(&linkpb.Frames{Data: make([]byte, 50<<10), From: 0x1002, To: 0x1003}),
		}, ErrProtocol, "under way"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			stuck := make(chan struct{}) // the sink is busy until the receiver has given the stream up
			cl := fakeSeoul(t, func(c *ClientConfig) { c.Window = 100 << 10 }, func(s *wire) {
				defer close(stuck)
				for _, r := range c.replies {
					if err := s.send(r); err != nil {
						return
					}
				}
				_, _ = io.Copy(io.Discard, s.conn)
			})
			f := follow(t, cl, &fakeSink{frames: func([]byte, wal.LSN, wal.LSN) error { <-stuck; return nil }})
			if err := f.wait(t); !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("Follow ended with %v, want %q", err, c.text)
			}
		})
	}
}

func TestPeerThatEndsTheStreamWithoutAReason(t *testing.T) {
	cl := fakeSeoul(t, nil, func(*wire) {})
	if err := follow(t, cl, &fakeSink{}).wait(t); !errors.Is(err, ErrBroken) || !Retry(err) {
		t.Errorf("got %v", err)
	}
	// The fake knows no other request: an older peer.
	if _, err := cl.Status(context.Background()); !errors.Is(err, ErrVersion) {
		t.Errorf("got %v, want that the peer does not know the request", err)
	}
}

func TestErrorsOfTheSinkEndFollow(t *testing.T) {
	w := newWorld(t, nil)
	newHistory(w.db.j, 1).fill(t, 3)
	boom := errors.New("boom")
	for name, sink := range map[string]*fakeSink{
		"welcome": {welcome: func(journal.Header) error { return boom }},
		"frames":  {frames: func([]byte, wal.LSN, wal.LSN) error { return boom }},
	} {
		if err := follow(t, w.client(nil), sink).wait(t); !errors.Is(err, boom) {
			t.Errorf("%s: got %v, want the sink's own error", name, err)
		}
	}
}
