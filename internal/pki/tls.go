package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Files names a site's PEM files.
type Files struct{ CA, Cert, Key string }

// TLS gives the configurations with which a site's agent serves and dials the other agents: TLS 1.3, both sides
// authenticated. It finds files that do not belong together, or not to this cluster and site, at once.
//
// Which site a peer is, is not checked here: who dials busan compares PeerSite with "busan". Host names play no part. Who is
// dialled is a site; who dials may be a gateway as well, which PeerSite refuses and Peer does not.
func TLS(files Files, clusterID, site string) (server, client *tls.Config, err error) {
	return configs(files, clusterID, ID{Site, site})
}

// GatewayTLS is the configuration with which a gateway that runs alone dials agents.
func GatewayTLS(files Files, clusterID, name string) (client *tls.Config, err error) {
	_, client, err = configs(files, clusterID, ID{Gateway, name})
	return client, err
}

func configs(files Files, clusterID string, self ID) (server, client *tls.Config, err error) {
	v, cert, err := load(files, clusterID, self)
	if err != nil {
		return nil, nil, err
	}
	base := tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		// The standard verification knows host names and says "unknown authority" for everything else. VerifyConnection
		// replaces it wholly, on both ends and also on resumption.
		InsecureSkipVerify:     true,
		ClientAuth:             tls.RequireAnyClientCert,
		SessionTicketsDisabled: true,
	}
	server, client = base.Clone(), base.Clone()
	server.VerifyConnection = v.connection(x509.ExtKeyUsageClientAuth)
	client.VerifyConnection = v.connection(x509.ExtKeyUsageServerAuth)
	return server, client, nil
}

// NotAfter tells when a certificate file ends.
func NotAfter(certFile string) (time.Time, error) {
	cert, err := readCert(certFile)
	if err != nil {
		return time.Time{}, err
	}
	return cert.NotAfter, nil
}

func load(files Files, clusterID string, self ID) (*verifier, tls.Certificate, error) {
	var none tls.Certificate
	ca, err := readCert(files.CA)
	if err != nil {
		return nil, none, err
	}
	cert, err := readCert(files.Cert)
	if err != nil {
		return nil, none, err
	}
	key, err := readKey(files.Key)
	if err != nil {
		return nil, none, err
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, none, &Error{Msg: fmt.Sprintf("certificate %s and private key %s do not belong together", files.Cert, files.Key), Hint: "copy the site's folder that duri init made as a whole"}
	}
	if id, _, err := identity(ca); err != nil || id != clusterID || !ca.IsCA {
		return nil, none, &Error{Msg: fmt.Sprintf("%s is not the authority of cluster %s", files.CA, clusterID), Err: err, Hint: "all sites use the ca.crt of the same duri init"}
	}
	v := newVerifier(ca, clusterID)
	if err := v.own(cert, self); err != nil {
		return nil, none, &Error{Msg: "certificate " + files.Cert, Err: err, Hint: "copy the site's folder that duri init made as a whole, and see that the clock is right"}
	}
	return v, tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}, nil
}

// verifier decides whether a certificate is one of this cluster's sites.
type verifier struct {
	roots     *x509.CertPool
	clusterID string
}

func newVerifier(ca *x509.Certificate, clusterID string) *verifier {
	v := &verifier{roots: x509.NewCertPool(), clusterID: clusterID}
	v.roots.AddCert(ca)
	return v
}

// own checks the own certificate.
func (v *verifier) own(cert *x509.Certificate, self ID) error {
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if err := v.certificate(cert, usage, time.Now()); err != nil {
			return err
		}
	}
	if _, got, _ := identity(cert); got != self {
		return fmt.Errorf("is that of %s, this is %s", got, self)
	}
	return nil
}

// connection is the VerifyConnection of a tls.Config.
func (v *verifier) connection(usage x509.ExtKeyUsage) func(tls.ConnectionState) error {
	return func(s tls.ConnectionState) error {
		if len(s.PeerCertificates) == 0 {
			return errors.New("peer shows no certificate")
		}
		cert := s.PeerCertificates[0]
		if err := v.certificate(cert, usage, time.Now()); err != nil {
			return fmt.Errorf("certificate of peer %s %w", describe(cert), err)
		}
		if _, who, _ := identity(cert); who.Kind != Site && usage == x509.ExtKeyUsageServerAuth {
			return fmt.Errorf("certificate of peer is that of %s, not of a site", who)
		}
		return nil
	}
}

// certificate decides. The cluster is compared first: "another cluster" explains more than "another authority". The
// name in a certificate that this authority did not sign is only a claim, good for nothing but the error's text.
func (v *verifier) certificate(cert *x509.Certificate, usage x509.ExtKeyUsage, now time.Time) error {
	id, who, err := identity(cert)
	if err != nil {
		return err
	}
	if id != v.clusterID {
		return fmt.Errorf("belongs to cluster %s, this is cluster %s", id, v.clusterID)
	}
	if who.Kind != Site && who.Kind != Gateway {
		return errors.New("is not that of a site")
	}
	if now.Before(cert.NotBefore) {
		return fmt.Errorf("is not valid before %s: is a clock wrong?", date(cert.NotBefore))
	}
	if now.After(cert.NotAfter) {
		return fmt.Errorf("expired on %s", date(cert.NotAfter))
	}
	_, err = cert.Verify(x509.VerifyOptions{Roots: v.roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}})
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return errors.New("is signed by another CA, although it names this cluster")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		// The leaf is within its time, so it is the authority.
		return errors.New("cannot be verified: the cluster's CA has expired or is not yet valid")
	case err != nil:
		return fmt.Errorf("cannot be verified: %w", err)
	}
	return nil
}

func date(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// describe names a peer by what its certificate claims.
func describe(cert *x509.Certificate) string {
	if _, who, err := identity(cert); err == nil && who.Name != "" {
		return who.Name
	}
	return fmt.Sprintf("%q", cert.Subject.CommonName)
}

// Kind is what a certificate is for.
type Kind string

// The kinds, as certificates spell them.
const (
	Site    Kind = "site"
	Gateway Kind = "gateway" // one that runs alone: it may use sites, and is none

	authority Kind = "ca"
)

// ID is who holds a certificate.
type ID struct {
	Kind Kind
	Name string
}

// String prints "site seoul".
func (id ID) String() string { return string(id.Kind) + " " + id.Name }

// identity reads cluster and holder from a certificate; an authority has no name.
func identity(cert *x509.Certificate) (clusterID string, who ID, err error) {
	for _, u := range cert.URIs {
		if u.Scheme != scheme {
			continue
		}
		if u.Path == "/ca" {
			return u.Host, ID{Kind: authority}, nil
		}
		for _, kind := range []Kind{Site, Gateway} {
			if s, ok := strings.CutPrefix(u.Path, "/"+string(kind)+"/"); ok && s != "" && !strings.Contains(s, "/") {
				return u.Host, ID{kind, s}, nil
			}
		}
	}
	return "", ID{}, errors.New("does not name a duri cluster: it was not made by duri init")
}

// Peer is who is at the other end of a connection that a configuration of this package has accepted.
func Peer(s tls.ConnectionState) (ID, error) {
	if len(s.PeerCertificates) == 0 {
		return ID{}, errors.New("peer shows no certificate")
	}
	_, who, err := identity(s.PeerCertificates[0])
	if err != nil {
		return ID{}, fmt.Errorf("certificate of peer %w", err)
	}
	return who, nil
}

// PeerSite is the site at the other end of such a connection.
func PeerSite(s tls.ConnectionState) (string, error) {
	who, err := Peer(s)
	switch {
	case err != nil:
		return "", err
	case who.Kind == Gateway:
		return "", fmt.Errorf("certificate of peer is that of %s, not of a site", who)
	case who.Kind != Site:
		return "", errors.New("certificate of peer is not that of a site")
	}
	return who.Name, nil
}
