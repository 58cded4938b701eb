package gateway

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/duri-io/duri/pgwire"
	"github.com/duri-io/duri/pgwire/scram"
)

// A client may show a certificate in place of a password, as with the method cert of pg_hba.conf. It leaves no key, so the gateway
// lets somebody who is trusted with that (Config.DialAs) open its connections to servers.

// LoginError says why Config.DialAs does not log a role in by certificate. Clients are told, as 28000.
type LoginError struct{ Msg, Hint string }

// Error gives the sentence.
func (e *LoginError) Error() string { return e.Msg }

// HintText is the advice that goes with it.
func (e *LoginError) HintText() string { return e.Hint }

// askForCertificates lets clients show certificates. They are looked at in the login, where the client can be told in PostgreSQL's
// protocol what is wrong with them: the handshake proves only that it has the key.
func askForCertificates(cfg *tls.Config, authorities *x509.CertPool) {
	cfg.ClientAuth, cfg.ClientCAs = tls.RequestClientCert, authorities
	cfg.SessionTicketsDisabled = true // A resumed session would bring the certificate along without its key.
}

// certified logs the client in by its certificate; false without an error: it has shown none.
func (s *session) certified() (bool, error) {
	conn, ok := s.conn.(*tls.Conn)
	if !ok || s.g.cfg.ClientCAs == nil {
		return false, nil
	}
	shown := conn.ConnectionState().PeerCertificates
	if len(shown) == 0 {
		return false, nil
	}
	if err := mayBe(shown, s.g.cfg.ClientCAs, s.who.User, time.Now()); err != nil {
		return false, fatalError(codeAuth, fmt.Sprintf("certificate authentication failed for user %q: %v", s.who.User, err), "",
			"use a certificate of this user, or none (sslcertmode=disable, libpq 16) to log in with a password")
	}
	s.who.certify()
	return true, s.w.Write(pgwire.AppendAuth(nil, pgwire.AuthOK, nil))
}

// certify notes that the login is by certificate. Its backends are for such logins only: a server may let a role in by certificate
// that it does not let in with a password, and the other way round.
func (l *Login) certify() {
	l.certified, l.key = true, "\x00certificate\x00"+l.key
}

// ByCertificate reports whether the client has logged in by certificate, so that it needs no verifier at any site.
func (l *Login) ByCertificate() bool { return l.certified }

// mayBe reports, as an error without one, whether the chain that a client has shown, its own certificate first, is that of a user.
func mayBe(chain []*x509.Certificate, authorities *x509.CertPool, user string, now time.Time) error {
	if err := verify(chain, authorities, now); err != nil {
		return err
	}
	name, err := commonName(chain[0])
	switch {
	case err != nil:
		return err
	case name != user:
		return fmt.Errorf("the certificate is that of %q", name)
	case len(user) > pgwire.NameMax:
		return fmt.Errorf("the name has %d bytes, more than the %d of a role", len(user), pgwire.NameMax)
	}
	return nil
}

// verify checks what a certificate is worth now.
func verify(chain []*x509.Certificate, authorities *x509.CertPool, now time.Time) error {
	leaf := chain[0]
	switch {
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("the certificate is not valid before %s", leaf.NotBefore.UTC().Format(time.RFC3339))
	case now.After(leaf.NotAfter):
		return fmt.Errorf("the certificate expired on %s", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: authorities, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return errors.New("the certificate is not signed by an authority that is trusted here")
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return errors.New("the certificate is not for clients (extended key usage)")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return errors.New("a certificate of the authorities that have signed it has expired")
	case err != nil:
		return errors.New("the certificate cannot be verified: " + err.Error())
	}
	return nil
}

// oidCommonName is id-at-commonName (X.520).
var oidCommonName = asn1.ObjectIdentifier{2, 5, 4, 3}

// commonName is the one that the subject has. Of several, programs take different ones: PostgreSQL the first, others the last.
func commonName(cert *x509.Certificate) (string, error) {
	var names []string
	for _, a := range cert.Subject.Names {
		if a.Type.Equal(oidCommonName) {
			name, _ := a.Value.(string)
			names = append(names, name)
		}
	}
	switch {
	case len(names) == 0 || len(names) == 1 && names[0] == "":
		return "", errors.New("the certificate has no common name")
	case len(names) > 1:
		return "", fmt.Errorf("the certificate has %d common names", len(names))
	case strings.ContainsRune(names[0], 0):
		return "", errors.New("the certificate's common name contains a zero byte")
	}
	return names[0], nil
}

// reach opens a connection to a target for a login, and gives what a channel is bound to.
func (g *Server) reach(ctx context.Context, t Target, who *Login) (net.Conn, []byte, error) {
	if !who.certified {
		return g.connect(ctx, t)
	}
	if g.cfg.DialAs == nil {
		return nil, nil, &LoginError{Msg: "this gateway cannot log anybody in by certificate"}
	}
	conn, err := g.cfg.DialAs(ctx, t, who.User)
	return conn, nil, err
}

// noLogin is what a client is told of a LoginError.
func noLogin(t Target, who *Login, e *LoginError) error {
	return fatalError(codeAuth, fmt.Sprintf("no login by certificate for user %q at %s: %s", who.User, t.name(), e.Msg), "", e.Hint)
}

// accepted looks at a server's authentication message to a login by certificate, which needs no answer.
func (b *backend) accepted(who *Login, body []byte) error {
	kind, _, err := pgwire.ParseAuth(body)
	if err != nil || kind == pgwire.AuthOK {
		return err
	}
	return fatalError(codeAuth, fmt.Sprintf("the server of %s asks for more than the certificate with which user %q has logged in", b.target.name(), who.User),
		fmt.Sprintf("It wants a login of kind %d.", kind), "let the first line of pg_hba.conf that fits this user and the agent's address be a hostssl line with the method cert")
}

// copyKeys makes keys that outlive a session; none of a login by certificate.
func copyKeys(k *scram.Keys) *scram.Keys {
	if k == nil {
		return &scram.Keys{}
	}
	c := *k
	c.Salt = append([]byte{}, k.Salt...)
	return &c
}
