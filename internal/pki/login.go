package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

const (
	// loginFor is how long a certificate of a LoginCA is good, and loginLeft how much of that there is left at least when it is
	// given away. PostgreSQL looks at it only when the connection is made.
	loginFor  = 10 * time.Minute
	loginLeft = 5 * time.Minute
	// loginBackdate lets PostgreSQL take it although its clock is slow.
	loginBackdate = 5 * time.Minute
	// loginsMax bounds how many are kept.
	loginsMax = 1024
	// roleMax is PostgreSQL's bound of names, in bytes: it cuts longer ones, and finds somebody else.
	roleMax = 63
)

// loginHint is what to do about the files of a LoginCA.
const loginHint = "make the two files with: duri gateway login-ca"

// LoginCA signs the short-lived certificates with which an agent logs roles in at its own PostgreSQL. It is no authority of the
// cluster: what it signs is good at a PostgreSQL whose ssl_ca_file has its certificate, and nowhere else. Its methods may be
// called at any time.
type LoginCA struct {
	file string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	now  func() time.Time

	mu     sync.Mutex // guards issued
	issued map[string]tls.Certificate
}

// NewLoginCA makes certificate and key of an authority for the logins at one site. It writes nothing.
func NewLoginCA(cluster, site string) (Pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Pair{}, fmt.Errorf("make the key of the authority for logins: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "duri logins at site " + site + " of cluster " + cluster},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(validFor),
		IsCA:                  true,
		MaxPathLenZero:        true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, // so that it can pose as no server
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return Pair{}, fmt.Errorf("make the certificate of the authority for logins: %w", err)
	}
	return pair(der, key)
}

// LoadLoginCA reads one from its two files. It refuses the cluster's own authority, whose key does not belong beside an agent.
func LoadLoginCA(certFile, keyFile string) (*LoginCA, error) {
	cert, err := readCert(certFile)
	if err != nil {
		return nil, withHint(err, loginHint)
	}
	if _, _, err := identity(cert); err == nil {
		return nil, &Error{Msg: certFile + " is of the cluster's own authority, which signs no logins: agents trust each other by it", Hint: loginHint}
	}
	key, err := readKey(keyFile)
	if err != nil {
		return nil, withHint(err, loginHint)
	}
	pub, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || !cert.IsCA || !pub.Equal(key.Public()) {
		return nil, &Error{Msg: fmt.Sprintf("%s and %s are not an authority's certificate and its key", certFile, keyFile), Hint: loginHint}
	}
	return &LoginCA{file: certFile, cert: cert, key: key, now: time.Now, issued: map[string]tls.Certificate{}}, nil
}

// withHint gives an error about a missing file the advice that fits; that on the mode of a key stays.
func withHint(err error, hint string) error {
	if e, ok := errors.AsType[*Error](err); ok && !strings.HasPrefix(e.Hint, "chmod") {
		return &Error{Msg: e.Msg, Err: e.Err, Hint: hint}
	}
	return err
}

// Certificate gives a certificate of a role, good as that of a client for the next minutes, and its key. Both are in memory only,
// and are the caller's to use, not to change.
func (ca *LoginCA) Certificate(role string) (tls.Certificate, error) {
	switch {
	case role == "" || len(role) > roleMax || strings.ContainsRune(role, 0):
		return tls.Certificate{}, &Error{Msg: fmt.Sprintf("%q is not the name of a role", role)}
	case !utf8.ValidString(role):
		return tls.Certificate{}, &Error{Msg: fmt.Sprintf("the role %q is not named in UTF-8, as the name in a certificate is", role), Hint: "let it log in with a password, or rename it"}
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	now := ca.now()
	if c, ok := ca.issued[role]; ok && now.Add(loginLeft).Before(c.Leaf.NotAfter) && now.After(c.Leaf.NotBefore) {
		return c, nil
	}
	c, err := ca.issue(role, now)
	if err != nil {
		return tls.Certificate{}, err
	}
	if len(ca.issued) >= loginsMax {
		clear(ca.issued) // It costs no more than signing them again.
	}
	ca.issued[role] = c
	return c, nil
}

func (ca *LoginCA) issue(role string, now time.Time) (tls.Certificate, error) {
	if now.After(ca.cert.NotAfter) || now.Before(ca.cert.NotBefore) {
		return tls.Certificate{}, &Error{
			Msg:  fmt.Sprintf("the authority for logins in %s is valid from %s to %s only", ca.file, date(ca.cert.NotBefore), date(ca.cert.NotAfter)),
			Hint: "see whether the clock is right, else make a new one with: duri gateway login-ca",
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make a key for the login of role %q: %w", role, err)
	}
	until := now.Add(loginFor)
	if until.After(ca.cert.NotAfter) {
		until = ca.cert.NotAfter
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: role},
		NotBefore:             now.Add(-loginBackdate),
		NotAfter:              until,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make a certificate for the login of role %q: %w", role, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("read the new certificate for the login of role %q: %w", role, err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

// Authorities reads the certificates of a PEM file that are trusted to sign others. Unlike x509.CertPool, it passes over none that
// cannot be read, and a file without any is an error.
func Authorities(file string) (*x509.CertPool, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, &Error{Msg: "cannot read certificates", Err: err, Hint: "see that the file is there, and that the agent's user may read it"}
	}
	pool, n := x509.NewCertPool(), 0
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, &Error{Msg: fmt.Sprintf("cannot read certificate %d of %s", n+1, file), Err: err}
		}
		if cert.Version >= 3 && !cert.IsCA { // Older ones do not say what they are.
			return nil, &Error{Msg: fmt.Sprintf("certificate %d of %s, of %q, is not that of an authority", n+1, file, cert.Subject), Hint: "name the file of the authority that signs clients' certificates"}
		}
		pool.AddCert(cert)
		n++
	}
	if n == 0 {
		return nil, &Error{Msg: file + " does not hold a certificate in PEM form", Hint: "name the file of the authority that signs clients' certificates"}
	}
	return pool, nil
}
