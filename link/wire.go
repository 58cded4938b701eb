package link

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"

	"github.com/duri-io/duri/link/linkpb"
)

// followProtocol is what the two ends of a Follow agree on in the TLS handshake (ALPN), at the same port as gRPC's h2. A
// commit waits for a frame on its way there and for the acknowledgement on its way back, so that each is one write, and one
// read by the goroutine that acts on it, without HTTP/2 and the goroutines of a gRPC connection in between.
const followProtocol = "duri-follow/1"

// wireBytes is the largest message of a Follow.
const wireBytes = 2 * chunkBytes

// lastWordMax is how long a refused peer may take to read why.
const lastWordMax = time.Second

// wire is a connection of a Follow: see link.proto. One goroutine may receive, any number send.
type wire struct {
	conn *tls.Conn
	r    *bufio.Reader
	in   []byte
	head [4]byte

	mu  sync.Mutex // held while a message is sent
	out []byte
}

func newWire(conn *tls.Conn) *wire {
	return &wire{conn: conn, r: bufio.NewReaderSize(conn, 64<<10)}
}

// send sends one message, which is not kept.
func (w *wire) send(m proto.Message) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	b, err := proto.MarshalOptions{}.MarshalAppend(append(w.out[:0], 0, 0, 0, 0), m)
	if err != nil {
		return err
	}
	if w.out = b; len(b)-4 > wireBytes {
		return fmt.Errorf("a message of %d bytes is larger than %d", len(b)-4, wireBytes)
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	_, err = w.conn.Write(b)
	return err
}

// recv receives one message into m.
func (w *wire) recv(m proto.Message) error {
	if _, err := io.ReadFull(w.r, w.head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(w.head[:])
	if n > wireBytes {
		return refuse(ErrProtocol, "bring duri at both sites to the same version", "a message of %d bytes is larger than %d", n, wireBytes)
	}
	w.in = slices.Grow(w.in[:0], int(n))[:n]
	if _, err := io.ReadFull(w.r, w.in); err != nil {
		return err
	}
	if err := proto.Unmarshal(w.in, m); err != nil {
		return refuse(ErrProtocol, "bring duri at both sites to the same version", "a message cannot be read: %v", err)
	}
	return nil
}

// refuse tells the peer why the stream ends, and closes it for sending: the receiving goroutine then reads until the peer
// has closed its side, or for lastWordMax, since closing what was not read would destroy the last word under way.
func (w *wire) refuse(err error) {
	_ = w.conn.SetDeadline(time.Now().Add(lastWordMax)) // a sender that hangs gives way
	if e, ok := errors.AsType[*Error](err); ok {
		_ = w.send(&linkpb.FollowReply{Message: &linkpb.FollowReply_Refusal{Refusal: e.refusal()}}) // the peer may be gone
	}
	_ = w.conn.CloseWrite()
}

// dialFollow connects to the peer for one Follow.
func (c *Client) dialFollow(ctx context.Context) (*wire, error) {
	ctx, cancel := context.WithTimeout(ctx, DefaultSilence)
	defer cancel()
	raw, err := dial(ctx, c.c.Address)
	if err != nil {
		return nil, unreachable(c.c.Peer, c.c.Address, err.Error())
	}
	config := onlyPeer(c.c.TLS, c.c.Peer)
	config.NextProtos = []string{followProtocol}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close() // the handshake's error is the one to tell
		return nil, unreachable(c.c.Peer, c.c.Address, err.Error())
	}
	if conn.ConnectionState().NegotiatedProtocol != followProtocol {
		_ = conn.Close()
		return nil, unreachable(c.c.Peer, c.c.Address, noProtocol)
	}
	return newWire(conn), nil
}

// noProtocol is how TLS says that the peer does not know the protocol.
const noProtocol = "no application protocol"

// unreachable judges why a connection could not be made, or was ended by the handshake of the other side.
func unreachable(peer, address, text string) *Error {
	e := &Error{Kind: ErrUnreachable, Peer: peer}
	switch {
	case strings.Contains(text, noProtocol):
		e.Kind, e.Sentence = ErrVersion, "does not know this request: "+text
		e.Hint = "bring duri at both sites to the same version"
	case strings.Contains(text, "certificate"), strings.Contains(text, "tls:"):
		e.Sentence = "cannot agree with the agent at " + address + ": " + text
		e.Hint = "both sites need certificates of this cluster's authority: see that each has its own folder from duri init"
	default:
		e.Sentence = "cannot reach the agent at " + address + ": " + text
		e.Hint = "see that the agent runs, and that the network lets this site reach its address"
	}
	return e
}

// broken gives an error of a Follow's connection its form; ctx is the caller's.
func (c *Client) broken(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	if text := err.Error(); strings.Contains(text, "tls: ") { // TLS 1.3 refuses a client's certificate after its handshake
		return unreachable(c.c.Peer, c.c.Address, text)
	}
	if errors.Is(err, io.EOF) {
		return &Error{Kind: ErrBroken, Peer: c.c.Peer, Sentence: "the peer ended the stream"}
	}
	return &Error{Kind: ErrBroken, Peer: c.c.Peer, Sentence: "link broke: " + err.Error()}
}

// divided is a server's TLS that keeps the connections of some protocols out of gRPC's hands.
type divided struct {
	credentials.TransportCredentials // for all but the handshake
	config                           *tls.Config
	own                              map[string]func(conn *tls.Conn) // by protocol, who takes them; they return at once
}

func newDivided(config *tls.Config, own map[string]func(conn *tls.Conn)) divided {
	config = config.Clone()
	config.NextProtos = append(slices.Sorted(maps.Keys(own)), "h2")
	return divided{credentials.NewTLS(config), config, own}
}

// ServerHandshake is that of TransportCredentials.
func (d divided) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn := tls.Server(raw, d.config)
	if err := conn.Handshake(); err != nil { // within gRPC's deadline on raw
		_ = raw.Close() // the handshake's error is the one to tell
		return nil, nil, err
	}
	state := conn.ConnectionState()
	if take := d.own[state.NegotiatedProtocol]; take != nil {
		take(conn)
		return nil, nil, credentials.ErrConnDispatched
	}
	if state.NegotiatedProtocol == "" {
		_ = conn.Close()
		return nil, nil, errors.New("the caller names no protocol")
	}
	return conn, credentials.TLSInfo{State: state, CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}, nil
}

// Clone is that of TransportCredentials.
func (d divided) Clone() credentials.TransportCredentials {
	return divided{d.TransportCredentials.Clone(), d.config, d.own}
}
