package gateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"

	"github.com/duri-io/duri/pgwire"
	"github.com/duri-io/duri/pgwire/scram"
)

// alpn is the name of the protocol in TLS (PostgreSQL manual, "SSL Session Encryption").
const alpn = "postgresql"

// tlsRecord is the first byte of a TLS handshake: a client of PostgreSQL 17 or later may begin with it directly.
const tlsRecord = 22

// prefixed is a connection of which the first bytes were read already.
type prefixed struct {
	net.Conn
	first []byte
}

func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.first) > 0 {
		n := copy(b, p.first)
		p.first = p.first[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// greet does what comes before a login: TLS if the client wants it, and its startup packet or request to cancel. The
// connection that it gives has no bytes behind. A client that does not speak the protocol gets no answer.
func (g *Server) greet(ctx context.Context, raw net.Conn) (net.Conn, *pgwire.Startup, error) {
	conn := raw
	var first [1]byte
	if _, err := io.ReadFull(raw, first[:]); err != nil {
		return nil, nil, err
	}
	src := io.MultiReader(bytes.NewReader(first[:]), raw)
	if first[0] == tlsRecord && g.cfg.TLS != nil {
		t, err := g.handshake(ctx, &prefixed{raw, first[:]})
		if err != nil {
			return nil, nil, err
		}
		if t.ConnectionState().NegotiatedProtocol != alpn {
			return nil, nil, errors.New("direct TLS without ALPN, which somebody in between could abuse")
		}
		conn, src = t, t
	}
	for asked := map[pgwire.StartupKind]bool{}; ; {
		start, err := pgwire.ReadStartup(src)
		if err != nil {
			return nil, nil, err
		}
		if start.Kind != pgwire.StartupSSL && start.Kind != pgwire.StartupGSS {
			return conn, start, nil
		}
		if asked[start.Kind] || conn != raw {
			return nil, nil, errors.New("encryption was asked for again")
		}
		asked[start.Kind] = true
		if start.Kind == pgwire.StartupGSS || g.cfg.TLS == nil {
			if _, err := raw.Write([]byte("N")); err != nil {
				return nil, nil, err
			}
			continue
		}
		if _, err := raw.Write([]byte("S")); err != nil {
			return nil, nil, err
		}
		// Nothing was read beyond the request, so what somebody in between sent after it becomes a part of the handshake,
		// which then fails (CVE-2021-23214).
		t, err := g.handshake(ctx, raw)
		if err != nil {
			return nil, nil, err
		}
		conn, src = t, t
	}
}

func (g *Server) handshake(ctx context.Context, c net.Conn) (*tls.Conn, error) {
	t := tls.Server(pgwire.Quick(c), g.cfg.TLS)
	return t, t.HandshakeContext(ctx)
}

// login authenticates the client. Its keys then log in at servers.
func (s *session) login(ctx context.Context, start *pgwire.Startup) error {
	if needed, options := start.Negotiate(); needed {
		if err := s.w.Write(pgwire.AppendNegotiate(nil, options)); err != nil {
			return err
		}
	}
	if err := s.identify(start); err != nil {
		return err
	}
	if err := s.g.admit(s.who.Database); err != nil {
		return err
	}
	if err := s.g.admitLogin(s); err != nil {
		return err
	}
	if admit := s.g.cfg.Admit; admit != nil {
		if err := admit(s.conn.RemoteAddr(), s.who.User); err != nil {
			return fatalError(codeRate, err.Error(), "", hintOf(err))
		}
	}
	if done, err := s.certified(); done || err != nil {
		s.replays = done && s.mayReplay()
		return err
	}
	verifier, err := s.g.cfg.Verifiers.Verifier(ctx, s.who.User)
	if err != nil {
		return fatalError(codeNoSite, "the password cannot be checked now: "+err.Error(), "", hintOf(err))
	}
	if verifier == nil {
		verifier = scram.Mock(s.g.mock, s.who.User)
	}
	return s.authenticate(verifier)
}

// homeParam is the startup parameter by which a client asks for a site.
const homeParam = "duri.home"

// identify reads who the client says it is.
func (s *session) identify(start *pgwire.Startup) error {
	s.who.User = start.Get("user")
	if s.who.User == "" {
		return fatalError(codeAuth, "no PostgreSQL user name specified in startup packet", "", "")
	}
	if s.who.Database = start.Get("database"); s.who.Database == "" {
		s.who.Database = s.who.User
	}
	if s.who.Database == adminAlias {
		s.who.Database = AdminDatabase
	}
	for _, p := range start.Params {
		if p.Name == homeParam {
			s.home = p.Value // for the gateway only
			continue
		}
		if !strings.HasPrefix(p.Name, "_pq_.") && p.Name != "database" && p.Name != "user" {
			s.who.Params = append(s.who.Params, p)
		}
	}
	// Once each, so that no server can take another for the one that was authenticated.
	s.who.Params = append(s.who.Params, pgwire.Param{Name: "user", Value: s.who.User}, pgwire.Param{Name: "database", Value: s.who.Database})
	s.who.key = loginKey(s.who.Params)
	return nil
}

// authenticate has the SCRAM conversation with the client. Whatever is wrong with the proof, the client learns the same.
func (s *session) authenticate(v *scram.Verifier) error {
	var binding []byte
	if _, ok := s.conn.(*tls.Conn); ok {
		binding = s.g.binding
	}
	conv := scram.NewServer(v, binding)
	if err := s.send(pgwire.AppendAuth(nil, pgwire.AuthSASL, pgwire.AppendMechanisms(nil, conv.Mechanisms()...))); err != nil {
		return err
	}
	body, err := s.saslMessage()
	if err != nil {
		return err
	}
	mechanism, data, err := pgwire.ParseSASLInitial(body)
	if err != nil {
		return err
	}
	reply, err := conv.First(mechanism, data)
	if err != nil {
		return fatalError(codeProtocol, err.Error(), "", "")
	}
	if err := s.send(pgwire.AppendAuth(nil, pgwire.AuthSASLContinue, reply)); err != nil {
		return err
	}
	if body, err = s.saslMessage(); err != nil {
		return err
	}
	reply, s.keys, err = conv.Final(body)
	if errors.Is(err, scram.ErrPassword) {
		s.g.wrongPassword(s)
		return fatalError(codePassword, fmt.Sprintf("password authentication failed for user %q", s.who.User), "", "")
	}
	if err != nil {
		return fatalError(codeProtocol, err.Error(), "", "")
	}
	s.replays = s.mayReplay()
	return s.w.Write(pgwire.AppendAuth(pgwire.AppendAuth(nil, pgwire.AuthSASLFinal, reply), pgwire.AuthOK, nil))
}

// mayReplay reports whether the session's open transactions may be run again elsewhere.
func (s *session) mayReplay() bool {
	return s.keeps() && slices.Contains(s.g.lim().Replay, s.who.User)
}

func (s *session) saslMessage() ([]byte, error) {
	if _, _, err := s.r.Next(pgwire.FromClientLogin); err != nil {
		return nil, err
	}
	return s.r.Body(pgwire.BufferSize)
}

// send writes at once.
func (s *session) send(b []byte) error {
	if err := s.w.Write(b); err != nil {
		return err
	}
	return s.w.Flush()
}
