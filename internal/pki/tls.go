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
// Which site a peer is, is not checked here: who dials busan compares PeerSite with "busan". Host names play no part.
func TLS(files Files, clusterID, site string) (server, client *tls.Config, err error) {
	v, cert, err := load(files, clusterID, site)
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

func load(files Files, clusterID, site string) (*verifier, tls.Certificate, error) {
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
	if err := v.own(cert, site); err != nil {
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

// own checks the site's own certificate.
func (v *verifier) own(cert *x509.Certificate, site string) error {
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if err := v.certificate(cert, usage, time.Now()); err != nil {
			return err
		}
	}
	if _, s, _ := identity(cert); s != site {
		return fmt.Errorf("is that of site %s, this is site %s", s, site)
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
		return nil
	}
}

// certificate decides. The cluster is compared first: "another cluster" explains more than "another authority". The
// name in a certificate that this authority did not sign is only a claim, good for nothing but the error's text.
func (v *verifier) certificate(cert *x509.Certificate, usage x509.ExtKeyUsage, now time.Time) error {
	id, site, err := identity(cert)
	if err != nil {
		return err
	}
	if id != v.clusterID {
		return fmt.Errorf("belongs to cluster %s, this is cluster %s", id, v.clusterID)
	}
	if site == "" {
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
	if _, site, err := identity(cert); err == nil && site != "" {
		return site
	}
	return fmt.Sprintf("%q", cert.Subject.CommonName)
}

// identity reads cluster and site from a certificate; site is empty for an authority.
func identity(cert *x509.Certificate) (clusterID, site string, err error) {
	for _, u := range cert.URIs {
		if u.Scheme != scheme {
			continue
		}
		if u.Path == "/ca" {
			return u.Host, "", nil
		}
		if s, ok := strings.CutPrefix(u.Path, "/site/"); ok && s != "" && !strings.Contains(s, "/") {
			return u.Host, s, nil
		}
	}
	return "", "", errors.New("does not name a duri cluster: it was not made by duri init")
}

// PeerSite is the site at the other end of a connection that a configuration from TLS has accepted.
func PeerSite(s tls.ConnectionState) (string, error) {
	if len(s.PeerCertificates) == 0 {
		return "", errors.New("peer shows no certificate")
	}
	_, site, err := identity(s.PeerCertificates[0])
	switch {
	case err != nil:
		return "", fmt.Errorf("certificate of peer %w", err)
	case site == "":
		return "", errors.New("certificate of peer is not that of a site")
	}
	return site, nil
}
