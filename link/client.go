package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/duri-io/duri/internal/alive"
	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/link/linkpb"
	"github.com/duri-io/duri/wal"
)

// ClientConfig is what a Client needs. Address, Peer, TLS, ClusterID and Site are required.
type ClientConfig struct {
	Address   string      // host:port of the peer's agent
	Peer      string      // the site that must answer there
	TLS       *tls.Config // the client's one of pki.TLS
	ClusterID string
	Site      string // the own name

	Now   func() wal.Time // the site's clock; default the system's
	Epoch func() uint64   // of the cluster's register; default none
	// Statement is what this site says of itself for a database. Another pointer is news; nil: nothing. Default none.
	Statement func(database string) *Statement
	Logger    *slog.Logger // default none
	// Versions, Window, Silence and Heartbeat replace the constants of the package, for tests.
	Versions  Versions
	Window    int64
	Silence   time.Duration
	Heartbeat time.Duration
}

func (c ClientConfig) withDefaults() ClientConfig {
	c.Versions = c.Versions.withDefaults()
	if c.Now == nil {
		c.Now = systemNow
	}
	if c.Epoch == nil {
		c.Epoch = noEpoch
	}
	if c.Statement == nil {
		c.Statement = noStatement
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&c.Window, DefaultWindow)
	setDefault(&c.Silence, DefaultSilence)
	setDefault(&c.Heartbeat, DefaultHeartbeat)
	return c
}

// Client asks one peer. It connects at the first call and again when the connection broke. Its methods may be called
// from any number of goroutines; their errors are an Error, except that a done context gives its own error.
type Client struct {
	c    ClientConfig
	conn *grpc.ClientConn
	rpc  linkpb.LinkClient

	gateways linkpb.GatewaysClient

	closed context.Context // ends with Close; the client is its own parent
	close  context.CancelFunc
	alive  *alive.Watcher // of tunnels

	mu    sync.Mutex // guards clock
	clock estimator
}

// NewClient makes a client that is not connected yet. The caller closes it.
func NewClient(c ClientConfig) (*Client, error) {
	if c.TLS == nil || c.Address == "" || c.Peer == "" {
		return nil, errors.New("make a link client: address, peer and TLS configuration are required")
	}
	c = c.withDefaults()
	retry := backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}
	// The scheme passthrough leaves names to the dialer, which looks them up at each attempt.
	conn, err := grpc.NewClient("passthrough:///"+c.Address,
		grpc.WithTransportCredentials(credentials.NewTLS(onlyPeer(c.TLS, c.Peer))),
		grpc.WithContextDialer(dial),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry, MinConnectTimeout: DefaultSilence}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
		grpc.WithIdleTimeout(0),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(messageBytes), grpc.MaxCallSendMsgSize(messageBytes)),
	)
	if err != nil {
		return nil, fmt.Errorf("make a link client for site %s: %w", c.Peer, err)
	}
	closed, end := context.WithCancel(context.Background())
	return &Client{c: c, conn: conn, rpc: linkpb.NewLinkClient(conn), gateways: linkpb.NewGatewaysClient(conn), closed: closed, close: end, alive: alive.New(DefaultSilence)}, nil
}

// onlyPeer makes a TLS configuration accept one site.
func onlyPeer(base *tls.Config, site string) *tls.Config {
	c, verify := base.Clone(), base.VerifyConnection
	c.VerifyConnection = func(s tls.ConnectionState) error {
		if verify != nil {
			if err := verify(s); err != nil {
				return err
			}
		}
		got, err := pki.PeerSite(s)
		if err == nil && got != site {
			err = fmt.Errorf("certificate is that of site %s, not of %s", got, site)
		}
		return err
	}
	return c
}

// dial connects without a proxy.
func dial(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: DefaultSilence}
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return &watchedConn{c}, nil
}

// watchedConn gives a connection up when nothing came for DefaultSilence: the server sends heartbeats or probes more
// often. gRPC's own probes from the client's side cannot be more frequent than every 10 s, so that after a cut all
// calls would go on using the dead connection for that long.
type watchedConn struct{ net.Conn }

// Read is that of the connection, with a deadline of its own.
func (c *watchedConn) Read(b []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(DefaultSilence)); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

func noEpoch() uint64 { return 0 }

func noStatement(string) *Statement { return nil }

// goneMax bounds how long Gone waits.
const goneMax = 500 * time.Millisecond

// Gone reports that no agent runs at the peer's address just now: connections are refused, or end before a handshake. A
// peer that does not answer, or not in time, may be anything, and is not gone.
func (c *Client) Gone(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, goneMax)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.c.Address)
	if err != nil {
		return errors.Is(err, syscall.ECONNREFUSED)
	}
	defer func() { _ = conn.Close() }() // it was only a look
	err = tls.Client(conn, onlyPeer(c.c.TLS, c.c.Peer)).HandshakeContext(ctx)
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// Close ends the connections and all calls on them.
func (c *Client) Close() error {
	c.close()
	return c.conn.Close()
}

// Clock is the estimate of the peer's clock; false when this site has not followed the peer yet.
func (c *Client) Clock() (Clock, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.clock.best()
}

func (c *Client) clockSample(x exchange) {
	s, ok := x.sample()
	if !ok {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clock.add(s)
}

func (c *Client) hello() *linkpb.Hello {
	return &linkpb.Hello{MinVersion: c.c.Versions.Min, MaxVersion: c.c.Versions.Max, ClusterId: c.c.ClusterID}
}

// fail gives an error of a call its form; ctx is the caller's.
func (c *Client) fail(ctx context.Context, err error) error {
	return received(ctx, err, c.c.Peer, c.c.Address)
}

// broke is a breach of the protocol by the peer.
func (c *Client) broke(format string, args ...any) *Error {
	e := refuse(ErrProtocol, "bring duri at both sites to the same version", format, args...)
	e.Peer = c.c.Peer
	return e
}

// FetchRow asks for the row that key (column names of rel) and their values in row identify, as it is now at the peer;
// false when there is none.
func (c *Client) FetchRow(ctx context.Context, database string, rel *wal.Relation, key []string, row wal.Tuple) (wal.Tuple, bool, error) {
	r, err := c.rpc.FetchRow(ctx, &linkpb.FetchRowRequest{
		Hello: c.hello(), Database: database, Relation: rel.AppendCanonical(nil), Key: key, Row: tuple(row),
	})
	if err != nil {
		return nil, false, c.fail(ctx, err)
	}
	if !r.GetFound() {
		return nil, false, nil
	}
	found, err := parseTuple(r.GetRow(), rel)
	if err != nil {
		return nil, false, c.broke("answer to the request for a row of %s: %v", rel, err)
	}
	return found, true, nil
}

// Compare puts a question of the comparison of sites.
func (c *Client) Compare(ctx context.Context, database string, request []byte) ([]byte, error) {
	r, err := c.rpc.Compare(ctx, &linkpb.CompareRequest{Hello: c.hello(), Database: database, Request: request})
	if err != nil {
		return nil, c.fail(ctx, err)
	}
	return r.GetReply(), nil
}

// Status asks for the peer's status document.
func (c *Client) Status(ctx context.Context) ([]byte, error) {
	r, err := c.rpc.Status(ctx, &linkpb.StatusRequest{Hello: c.hello()})
	if err != nil {
		return nil, c.fail(ctx, err)
	}
	return r.GetStatus(), nil
}

// Copy reads the contents of a database. The reader ends with io.EOF only when the peer has sent everything; it is for
// one goroutine. The caller closes it.
func (c *Client) Copy(ctx context.Context, database string) (io.ReadCloser, error) {
	unpack, err := newUnpacker()
	if err != nil {
		return nil, err
	}
	inner, cancel := context.WithCancel(ctx)
	stream, err := c.rpc.Copy(inner, &linkpb.CopyRequest{Hello: c.hello(), Database: database})
	if err != nil {
		cancel()
		unpack.close()
		return nil, c.fail(ctx, err)
	}
	r := &contentReader{c: c, ctx: ctx, cancel: cancel, stream: stream, unpack: unpack}
	// The first message tells a refusal now rather than at the first Read.
	if err := r.fill(); err != nil && !errors.Is(err, io.EOF) {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// contentReader reads what contentWriter at the other end wrote.
type contentReader struct {
	c      *Client
	ctx    context.Context // the caller's, to tell its end from the connection's
	cancel context.CancelFunc
	stream grpc.ServerStreamingClient[linkpb.CopyReply]
	unpack *unpacker
	buf    []byte // decompressed into
	rest   []byte // of it, not yet read
	err    error  // sticky
}

// fill gets the next message.
func (r *contentReader) fill() error {
	if r.err != nil {
		return r.err
	}
	m, err := r.stream.Recv()
	switch {
	case errors.Is(err, io.EOF):
		r.err = io.EOF
	case err != nil:
		r.err = r.c.fail(r.ctx, err)
	default:
		if r.buf, err = r.unpack.unpack(r.buf[:0], m.GetData(), m.GetZstd()); err != nil {
			r.err = r.c.broke("contents of a database: %v", err)
		}
		r.rest = r.buf
	}
	return r.err
}

// Read is that of io.Reader.
func (r *contentReader) Read(b []byte) (int, error) {
	for len(r.rest) == 0 {
		if err := r.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(b, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// Close ends the call. It never fails.
func (r *contentReader) Close() error {
	r.cancel()
	if r.err == nil {
		r.err = io.ErrClosedPipe
	}
	r.rest = nil
	r.unpack.close()
	return nil
}
