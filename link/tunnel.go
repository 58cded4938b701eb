package link

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/link/linkpb"
)

// sqlProtocol is what both ends of a tunnel agree on in the TLS handshake: a connection of a client to the answering site's
// PostgreSQL, which so is reachable by its agent only. What comes first is told in link.proto; then it is the bytes of both ends.
const sqlProtocol = "duri-sql/1"

// certProtocol is the same for a login by certificate: the caller says first which role's.
const certProtocol = "duri-sql-cert/1"

// errNoRole breaks off a tunnel of certProtocol.
var errNoRole = refuse(ErrProtocol, "bring duri at both sites to the same version", "the caller asks for a login by certificate of no role")

// tunnelRefusalMax is the longest refusal of a tunnel.
const tunnelRefusalMax = 64 << 10

// tunnelBytes is how much is copied at once: a TLS record.
const tunnelBytes = 16 << 10

var tunnelBuffers = sync.Pool{New: func() any { return new([tunnelBytes]byte) }}

// tunnel serves one tunnel. It returns at once.
func (s *Server) tunnel(conn *tls.Conn) {
	if !s.enterTunnel(conn) {
		_ = conn.NetConn().Close()
		return
	}
	s.wg.Go(func() {
		defer s.leaveTunnel(conn)
		hangUp := func() { _ = conn.NetConn().Close() } // without TLS's last word: it might have to wait
		defer hangUp()
		defer s.alive.Watch(conn.NetConn())()              // else what a gateway that has vanished has locked would stay so for long
		_ = conn.SetDeadline(time.Now().Add(handshakeMax)) // a connection that has ended shows at the first use
		server, release, err := s.openTunnel(conn, hangUp)
		if err != nil {
			refuseTunnel(conn, err)
			return
		}
		defer release()
		defer func() { _ = server.Close() }()
		if _, err := conn.Write(make([]byte, 4)); err != nil {
			return
		}
		_ = conn.SetDeadline(time.Time{})
		join(conn, server)
	})
}

func (s *Server) openTunnel(conn *tls.Conn, cut func()) (net.Conn, func(), error) {
	who, err := pki.Peer(conn.ConnectionState())
	if err != nil {
		return nil, nil, refuse(ErrSite, "", "%v", err)
	}
	if s.c.Gateways == nil {
		return nil, nil, errNoGateways
	}
	role := ""
	if conn.ConnectionState().NegotiatedProtocol == certProtocol {
		if role, err = readRole(conn); err != nil {
			return nil, nil, err
		}
	}
	ctx, cancel := context.WithTimeout(s.base, handshakeMax)
	defer cancel()
	return s.c.Gateways.Open(ctx, who.String(), role, cut)
}

// readRole reads what comes first with certProtocol. It is never empty: that would be a login without a certificate.
func readRole(conn net.Conn) (string, error) {
	var length [1]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return "", err
	}
	if length[0] == 0 {
		return "", errNoRole
	}
	b := make([]byte, length[0])
	_, err := io.ReadFull(conn, b)
	return string(b), err
}

// refuseTunnel says why, and waits until the other end has read it: closing what was not read would destroy it under way.
func refuseTunnel(conn *tls.Conn, err error) {
	_ = conn.SetDeadline(time.Now().Add(lastWordMax))
	b, merr := proto.Marshal(failure(ErrFailed, err).refusal())
	if merr != nil {
		return
	}
	_, _ = conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)) // the other end may be gone
	_ = conn.CloseWrite()
	_, _ = io.Copy(io.Discard, conn)
}

// enterTunnel notes a tunnel that is to be cut when Serve ends; false: it has ended.
func (s *Server) enterTunnel(conn *tls.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.base.Err() != nil {
		return false
	}
	s.tunnels[conn] = struct{}{}
	return true
}

func (s *Server) leaveTunnel(conn *tls.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tunnels, conn)
}

// stop lets everything end that was not begun by gRPC.
func (s *Server) stop() {
	close(s.stopping)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end()
	for conn := range s.tunnels {
		_ = conn.NetConn().Close()
	}
}

// join copies both ways until both have ended. The end of one way is passed on, and the other goes on; a connection that breaks
// ends both.
func join(a, b net.Conn) {
	var wg sync.WaitGroup
	wg.Go(func() { carry(a, b) })
	carry(b, a)
	wg.Wait()
}

func carry(to, from net.Conn) {
	buf := tunnelBuffers.Get().(*[tunnelBytes]byte)
	defer tunnelBuffers.Put(buf)
	for {
		n, err := from.Read(buf[:])
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				err = werr
			}
		}
		if err == nil {
			continue
		}
		if half, ok := to.(interface{ CloseWrite() error }); ok && errors.Is(err, io.EOF) && half.CloseWrite() == nil {
			return
		}
		for _, c := range []net.Conn{to, from} {
			if t, ok := c.(interface{ NetConn() net.Conn }); ok {
				c = t.NetConn() // see tunnel
			}
			_ = c.Close() // the other way ends with it
		}
		return
	}
}

// Dial connects to the peer's PostgreSQL. The connection is as safe as TLS makes it, up to the peer's agent.
func (c *Client) Dial(ctx context.Context) (net.Conn, error) { return c.dial(ctx, "") }

// DialAs is Dial for a login by certificate: the peer's agent uses one of the role towards PostgreSQL. An Error of the kind ErrLogin
// says that there are no such logins at the peer.
func (c *Client) DialAs(ctx context.Context, role string) (net.Conn, error) {
	if role == "" || len(role) > 255 {
		return nil, refuse(ErrLogin, "", "%q is not the name of a role", role)
	}
	return c.dial(ctx, role)
}

func (c *Client) dial(ctx context.Context, role string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeMax)
	defer cancel()
	// Not watched for silence, as the others: a session may be idle for long. Whether something comes back for what is sent is another
	// question.
	raw, err := (&net.Dialer{Timeout: DefaultSilence}).DialContext(ctx, "tcp", c.c.Address)
	if err != nil {
		return nil, unreachable(c.c.Peer, c.c.Address, err.Error())
	}
	c.alive.Watch(raw) // until it is closed
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	conn, err := c.dialTunnel(ctx, raw, role)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = raw.Close() // the first error is the one to tell
		return nil, err
	}
	return conn, nil
}

func (c *Client) dialTunnel(ctx context.Context, raw net.Conn, role string) (*tls.Conn, error) {
	config, protocol := onlyPeer(c.c.TLS, c.c.Peer), sqlProtocol
	if role != "" {
		protocol = certProtocol
	}
	config.NextProtos = []string{protocol}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, unreachable(c.c.Peer, c.c.Address, err.Error())
	}
	if conn.ConnectionState().NegotiatedProtocol != protocol {
		return nil, unreachable(c.c.Peer, c.c.Address, noProtocol)
	}
	if role != "" {
		if _, err := conn.Write(append([]byte{byte(len(role))}, role...)); err != nil {
			return nil, c.broken(ctx, err)
		}
	}
	var length [4]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return nil, c.broken(ctx, err)
	}
	n := binary.BigEndian.Uint32(length[:])
	if n == 0 {
		return conn, nil
	}
	if n > tunnelRefusalMax {
		return nil, c.broke("a refusal of %d bytes", n)
	}
	b, r := make([]byte, n), &linkpb.Refusal{}
	if _, err := io.ReadFull(conn, b); err != nil {
		return nil, c.broken(ctx, err)
	}
	if err := proto.Unmarshal(b, r); err != nil {
		return nil, c.broke("a refusal cannot be read: %v", err)
	}
	return nil, fromRefusal(r, c.c.Peer)
}
