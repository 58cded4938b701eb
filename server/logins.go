package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/pgwire"
)

// A client that has logged in at a gateway by certificate leaves no key with which it could be logged in at PostgreSQL. So the
// agent beside PostgreSQL does that with a certificate of its own making, good for minutes, by an authority that PostgreSQL trusts
// for that alone.

// logins are those of the own PostgreSQL.
type logins struct {
	ca    *pki.LoginCA
	roles []string // empty: all
}

// newLogins reads the authority; nil: there is none.
func newLogins(c config.LoginCA) (*logins, error) {
	if !c.On() {
		return nil, nil
	}
	ca, err := pki.LoadLoginCA(c.Cert, c.Key)
	if err != nil {
		return nil, err
	}
	return &logins{ca, c.Roles}, nil
}

// loginsText says which roles are logged in by certificate; empty: none.
func loginsText(c config.LoginCA) string {
	switch {
	case !c.On():
		return ""
	case len(c.Roles) == 0:
		return "for all roles"
	}
	return "for " + strings.Join(slices.Sorted(slices.Values(c.Roles)), ", ")
}

// setLogins lets roles be logged in by certificate.
func (e *entry) setLogins(l *logins) error {
	if l != nil && e.tls == nil {
		return &hinted{
			"gateway.login_ca is given, and postgres.dsn does not demand TLS, in which alone a certificate can be shown",
			"write sslmode=verify-full, or require, and host=... with a name or an IP address into postgres.dsn",
		}
	}
	e.logins = l
	return nil
}

// dialAs is dial with a certificate of a role. An error of the kind link.ErrLogin says that there are no such logins.
func (e *entry) dialAs(ctx context.Context, role string, cut func()) (net.Conn, func(), error) {
	if why := e.reason(); why != "" {
		return nil, nil, shutError(why)
	}
	cert, err := e.logins.certificate(role)
	if err != nil {
		return nil, nil, err
	}
	return e.open(ctx, cut, func(ctx context.Context, conn net.Conn) (net.Conn, error) {
		cfg := e.tls.Clone()
		cfg.Certificates = nil
		// Whatever authorities PostgreSQL names: that it does not know ours is to be seen.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
		secured, err := e.secure(ctx, conn, cfg)
		if err != nil {
			return nil, err
		}
		return &certified{Conn: secured, role: role}, nil
	})
}

// certificate makes one for a role, if that is to be logged in so.
func (l *logins) certificate(role string) (tls.Certificate, error) {
	switch {
	case l == nil:
		return tls.Certificate{}, &link.Error{
			Kind: link.ErrLogin, Sentence: "this site logs nobody in by certificate: gateway.login_ca is not set in its duri.yaml",
			Hint: "make the authority for that with: duri gateway login-ca",
		}
	case len(l.roles) > 0 && !slices.Contains(l.roles, role):
		return tls.Certificate{}, &link.Error{
			Kind: link.ErrLogin, Sentence: fmt.Sprintf("role %q is not among gateway.login_ca.roles in the site's duri.yaml", role),
			Hint: "log in with a password, or add the role there",
		}
	}
	cert, err := l.ca.Certificate(role)
	if err != nil {
		return tls.Certificate{}, &link.Error{Kind: link.ErrLogin, Sentence: err.Error(), Hint: hintOf(err)}
	}
	return cert, nil
}

// dialOwnAs is dialOwn with a certificate of a role.
func (e *entry) dialOwnAs(ctx context.Context, role string) (net.Conn, error) {
	conn, release, err := e.dialAs(ctx, role, func() {})
	if err != nil {
		return nil, err
	}
	return &ownConn{conn, release}, nil
}

// dialAs is gateway.Config.DialAs.
func (s *sites) dialAs(ctx context.Context, t gateway.Target, role string) (net.Conn, error) {
	conn, err := s.open(ctx, t, func(ctx context.Context, l *siteLink) (net.Conn, error) { return l.dialAs(ctx, role) })
	if errors.Is(err, link.ErrLogin) {
		e := &gateway.LoginError{Msg: err.Error(), Hint: hintOf(err)}
		if l, ok := errors.AsType[*link.Error](err); ok {
			e.Msg = l.Sentence
		}
		return nil, e
	}
	return conn, err
}

// certified is a connection to PostgreSQL with a certificate. PostgreSQL refuses that after the client's side of the handshake has
// ended (TLS 1.3), so that it is seen only in what is read first. It is told then as PostgreSQL tells errors, which also arrives at
// the other end of a tunnel. One goroutine may read and one may write at a time.
type certified struct {
	*tls.Conn
	role  string
	heard atomic.Bool // PostgreSQL has said something
	last  []byte      // what is told in the place of that
}

// Read is that of net.Conn.
func (c *certified) Read(b []byte) (int, error) {
	if len(c.last) > 0 {
		n := copy(b, c.last)
		c.last = c.last[n:]
		return n, nil
	}
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.heard.Store(true)
	}
	if err == nil || len(b) == 0 || c.heard.Swap(true) {
		return n, err
	}
	c.last = pgwire.AppendError(nil, refusedLogin(c.role, err))
	return c.Read(b)
}

// Write is that of net.Conn. That PostgreSQL takes nothing, as it has ended the connection, is for Read to tell, which knows why.
func (c *certified) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil && !c.heard.Load() {
		return len(b), nil
	}
	return n, err
}

// refusedLogin is what is said of a connection that ended before PostgreSQL said anything.
func refusedLogin(role string, err error) *pgwire.Error {
	const hint = "put the certificate of gateway.login_ca into the file that PostgreSQL's ssl_ca_file names, and reload PostgreSQL"
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" { // an alert (crypto/tls)
		return &pgwire.Error{
			Severity: "FATAL", Code: "28000", Message: fmt.Sprintf("PostgreSQL does not take the agent's certificate for the login of role %q", role),
			Detail: err.Error(), Hint: hint,
		}
	}
	return &pgwire.Error{
		Severity: "FATAL", Code: "57P03", Message: fmt.Sprintf("PostgreSQL ended the connection on which role %q was to be logged in by certificate", role),
		Detail: err.Error(), Hint: "see whether it runs; if this goes on, " + hint,
	}
}
