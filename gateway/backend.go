package gateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/duri-io/duri/pgwire"
	"github.com/duri-io/duri/pgwire/scram"
)

// backend is a connection to a server, logged in.
type backend struct {
	target Target
	conn   net.Conn
	r      *pgwire.Reader
	w      *pgwire.Writer

	pid     uint32         // of the server's process
	secret  []byte         // with which it is cancelled
	initial []pgwire.Param // what it reported at login
	opened  time.Time

	lending
}

// dial opens a connection to a target and logs in with a client's keys, or by certificate.
func (g *Server) dial(ctx context.Context, t Target, who *Login, keys *scram.Keys) (*backend, error) {
	unreachable := func(err error) error {
		return fatalError(codeNoSite, fmt.Sprintf("the server of %s cannot be reached", t.name()), err.Error(), "try again, or connect to another site")
	}
	conn, binding, err := g.reach(ctx, t, who)
	if e, ok := errors.AsType[*LoginError](err); ok {
		return nil, noLogin(t, who, e)
	}
	if err != nil {
		return nil, unreachable(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	b := &backend{target: t, conn: conn, r: pgwire.NewReader(conn), w: pgwire.NewWriter(conn), opened: time.Now()}
	err = b.login(who, keys, binding)
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		b.close()
		var theirs *serverError
		var ours *pgwire.Error
		var other *scram.VerifierError
		switch {
		case errors.As(err, &theirs), errors.As(err, &ours):
			return nil, err
		case errors.As(err, &other):
			return nil, fatalError(codePassword, fmt.Sprintf("no login for user %q at %s: %v", who.User, t.name(), err), "", hintOf(err))
		}
		return nil, unreachable(err)
	}
	return b, nil
}

// connect opens a connection, with TLS if configured, and gives what a channel is bound to.
func (g *Server) connect(ctx context.Context, t Target) (net.Conn, []byte, error) {
	dial := g.cfg.Dial
	if dial == nil {
		dial = func(ctx context.Context, t Target) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, t.Network, t.Address)
		}
	}
	conn, err := dial(ctx, t)
	if _, secured := conn.(Secured); err != nil || secured || g.cfg.ServerTLS == nil {
		return conn, nil, err
	}
	secured, err := g.secure(ctx, t, conn)
	if err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	return secured, scram.EndPoint(secured.ConnectionState().PeerCertificates[0]), nil
}

// secure asks a server for TLS.
func (g *Server) secure(ctx context.Context, t Target, conn net.Conn) (*tls.Conn, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if _, err := conn.Write(pgwire.AppendSSLRequest(nil)); err != nil {
		return nil, err
	}
	var answer [1]byte
	if _, err := conn.Read(answer[:]); err != nil {
		return nil, err
	}
	if answer[0] != 'S' {
		return nil, errors.New("the server has no TLS, which is configured for it")
	}
	cfg := g.cfg.ServerTLS.Clone()
	if cfg.ServerName == "" {
		host, _, err := net.SplitHostPort(t.Address)
		if err != nil {
			return nil, err
		}
		cfg.ServerName = host
	}
	cfg.NextProtos = []string{alpn}
	secured := tls.Client(pgwire.Quick(conn), cfg)
	return secured, secured.HandshakeContext(ctx)
}

// login sends the startup packet and answers until the server is ready.
func (b *backend) login(who *Login, keys *scram.Keys, binding []byte) error {
	if _, err := b.conn.Write(pgwire.AppendStartup(nil, who.Params)); err != nil {
		return err
	}
	client := scram.NewClient(keys, binding)
	for {
		typ, _, err := b.r.Next(pgwire.FromServer)
		if err != nil {
			return err
		}
		body, err := b.r.Body(loginBodyMax)
		if err != nil {
			return err
		}
		switch typ {
		case pgwire.Authentication:
			if who.certified {
				err = b.accepted(who, body)
			} else {
				err = b.prove(client, body)
			}
		case pgwire.ParameterStatus:
			var p pgwire.Param
			p, err = pgwire.ParseParameterStatus(body)
			b.initial = append(b.initial, p)
		case pgwire.BackendKeyData:
			b.pid, b.secret, err = pgwire.ParseBackendKeyData(body)
			b.secret = bytes.Clone(b.secret)
		case pgwire.ErrorResponse:
			var e *pgwire.Error
			if e, err = pgwire.ParseError(body); err == nil {
				err = &serverError{pgwire.AppendMessage(nil, typ, body), e}
			}
		case pgwire.NoticeResponse: // such as that the collation version has changed; nobody asked
		case pgwire.ReadyForQuery:
			return nil
		default:
			err = &pgwire.ProtocolError{What: fmt.Sprintf("a message of type %q during login", typ)}
		}
		if err != nil {
			return err
		}
	}
}

// loginBodyMax bounds messages during login; a server's error may be long.
const loginBodyMax = 64 << 10

// prove answers an authentication message.
func (b *backend) prove(client *scram.Client, body []byte) error {
	kind, data, err := pgwire.ParseAuth(body)
	if err != nil {
		return err
	}
	var reply []byte
	switch kind {
	case pgwire.AuthOK:
		return nil
	case pgwire.AuthSASL:
		var offered []string
		if offered, err = pgwire.ParseMechanisms(data); err != nil {
			return err
		}
		var mechanism string
		var first []byte
		if mechanism, first, err = client.First(offered); err == nil {
			reply = pgwire.AppendSASLInitial(nil, mechanism, first)
		}
	case pgwire.AuthSASLContinue:
		var final []byte
		if final, err = client.Final(data); err == nil {
			reply = pgwire.AppendMessage(nil, pgwire.SASLResponse, final)
		}
	case pgwire.AuthSASLFinal:
		return client.Verify(data)
	default:
		return fatalError(codeAuth, fmt.Sprintf("the server of %s wants a login of kind %d, which the gateway cannot give", b.target.name(), kind), "",
			"let pg_hba.conf ask the gateway's connections for scram-sha-256")
	}
	if err != nil {
		return err
	}
	_, err = b.conn.Write(reply)
	return err
}

func (b *backend) close() {
	_ = b.conn.Close()
	b.r.Drop()
}

// cancel hands a client's request to cancel on to the server that works for it now.
func (g *Server) cancel(ctx context.Context, start *pgwire.Startup) {
	select {
	case g.cancels <- struct{}{}:
		defer func() { <-g.cancels }()
	default:
		return // a storm of requests must not starve queries
	}
	s := g.session(start.PID)
	if s == nil {
		g.cancelElsewhere(start)
		return
	}
	if !s.knows(start.Secret) {
		return
	}
	if stop := s.command.Load(); stop != nil {
		(*stop)()
		return
	}
	b, done := s.busy()
	if b == nil {
		return
	}
	defer done()
	if err := g.sendCancel(ctx, b); err != nil {
		g.cfg.Log.Warn("a request to cancel did not reach the server", "site", b.target.Site, "error", err)
	}
}

// sendCancel returns when the server has closed the connection, which it does after it has signalled the process.
func (g *Server) sendCancel(ctx context.Context, b *backend) error {
	conn, _, err := g.connect(ctx, b.target)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if _, err := conn.Write(pgwire.AppendCancel(nil, b.pid, b.secret)); err != nil {
		return err
	}
	_, _ = conn.Read(make([]byte, 1)) // the end of the stream
	return nil
}
