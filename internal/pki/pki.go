// Package pki is the cluster's own certificate authority and the mutual authentication between agents.
//
// An agent's identity is the URI duri://<cluster id>/site/<site> in its certificate, that of a gateway which runs alone
// duri://<cluster id>/gateway/<name>; host names are in it for other tools only. TLS gives configurations that accept exactly the certificates that this cluster's authority signed,
// and whose errors tell apart: another cluster, another authority, expired, not yet valid. The package does not
// distribute certificates and has no revocation: replace the authority to shut a lost key out.
//
// A LoginCA is another authority, one for each site: it signs the certificates with which an agent logs roles in at its own
// PostgreSQL, and counts for nothing between agents.
//
// It guarantees that no file is ever overwritten and that private keys are readable by their owner only.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Certificates of the authority and of the sites end together: a site's certificate that ended earlier would stop
// replication on a day that nobody expects.
const validFor = 10 * 365 * 24 * time.Hour

// backdate lets a site accept a new certificate although its clock is slow.
const backdate = 24 * time.Hour

// scheme is that of the URIs that name clusters and sites.
const scheme = "duri"

// Error is what went wrong with a file, and what to do.
type Error struct {
	Msg  string
	Hint string
	Err  error // the cause, may be nil
}

// Error prints the message and the cause.
func (e *Error) Error() string {
	if e.Err != nil {
		return e.Msg + ": " + e.Err.Error()
	}
	return e.Msg
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// HintText is what the user can do.
func (e *Error) HintText() string { return e.Hint }

// CA is a cluster's certificate authority with its private key.
type CA struct {
	clusterID string
	cert      *x509.Certificate
	key       *ecdsa.PrivateKey
}

// Pair is a certificate and its private key in PEM.
type Pair struct{ CertPEM, KeyPEM []byte }

// NewCA makes the authority of a new cluster. It writes nothing.
func NewCA(clusterID, clusterName string) (*CA, error) {
	if clusterID == "" || strings.ContainsAny(clusterID, "/?#@:% ") {
		return nil, fmt.Errorf("make a certificate authority: %q is not a cluster id", clusterID)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make the authority's key: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "duri cluster " + clusterName, Organization: []string{clusterID}},
		URIs:                  []*url.URL{{Scheme: scheme, Host: clusterID, Path: "/ca"}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(validFor),
		IsCA:                  true,
		MaxPathLenZero:        true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make the authority's certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read the authority's new certificate: %w", err)
	}
	return &CA{clusterID: clusterID, cert: cert, key: key}, nil
}

// LoadCA reads an authority from its two files and checks that they belong together.
func LoadCA(certFile, keyFile string) (*CA, error) {
	cert, err := readCert(certFile)
	if err != nil {
		return nil, err
	}
	key, err := readKey(keyFile)
	if err != nil {
		return nil, err
	}
	pub, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || !cert.IsCA || !pub.Equal(key.Public()) {
		return nil, &Error{Msg: fmt.Sprintf("%s and %s are not an authority's certificate and its key", certFile, keyFile), Hint: "take both from the ca folder that duri init made"}
	}
	id, _, err := identity(cert)
	if err != nil {
		return nil, &Error{Msg: fmt.Sprintf("%s is not the authority of a duri cluster", certFile), Err: err}
	}
	return &CA{clusterID: id, cert: cert, key: key}, nil
}

// ClusterID is the cluster that the authority is of.
func (ca *CA) ClusterID() string { return ca.clusterID }

// CertPEM is the authority's certificate: what every site needs.
func (ca *CA) CertPEM() []byte { return encode("CERTIFICATE", ca.cert.Raw) }

// Pair gives certificate and key for writing.
func (ca *CA) Pair() (Pair, error) { return pair(ca.cert.Raw, ca.key) }

// ClusterName is a host name that every certificate of the cluster holds and that stands for no host. It is for programs
// that know a peer by host names alone and cannot be given a check of their own, as the embedded etcd: they expect this
// name wherever they connect, and so accept the sites of this cluster at any address, and nobody else.
func ClusterName(clusterID string) string { return clusterID + "." + scheme }

// Issue makes a site's key and certificate, valid as server and client, until the authority itself ends. The hosts of
// addresses (host:port or host), localhost and ClusterName are in it as names.
func (ca *CA) Issue(site string, addresses ...string) (Pair, error) {
	names, ips := hosts(addresses)
	return ca.issue(ID{Site, site}, append(names, ClusterName(ca.clusterID)), ips)
}

// IssueGateway makes the key and certificate of a gateway that runs alone. Without ClusterName, the voters of the register do not
// take it.
func (ca *CA) IssueGateway(name string) (Pair, error) { return ca.issue(ID{Gateway, name}, nil, nil) }

func (ca *CA) issue(who ID, names []string, ips []net.IP) (Pair, error) {
	if who.Name == "" || strings.ContainsAny(who.Name, "/?#% ") {
		return Pair{}, fmt.Errorf("issue a certificate: %q is not the name of a %s", who.Name, who.Kind)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Pair{}, fmt.Errorf("make the key of %s: %w", who, err)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: who.Name, Organization: []string{ca.clusterID}},
		URIs:                  []*url.URL{{Scheme: scheme, Host: ca.clusterID, Path: "/" + string(who.Kind) + "/" + who.Name}},
		DNSNames:              names,
		IPAddresses:           ips,
		NotBefore:             time.Now().Add(-backdate),
		NotAfter:              ca.cert.NotAfter,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return Pair{}, fmt.Errorf("make the certificate of %s: %w", who, err)
	}
	return pair(der, key)
}

// hosts sorts the hosts of addresses into names and IP addresses; localhost is always among them.
func hosts(addresses []string) (names []string, ips []net.IP) {
	for _, a := range append(slices.Clone(addresses), "localhost", "127.0.0.1", "::1") {
		host, _, err := net.SplitHostPort(a)
		if err != nil {
			host = a
		}
		ip := net.ParseIP(host)
		switch {
		case host == "":
		case ip == nil && !slices.Contains(names, host):
			names = append(names, host)
		case ip != nil && !slices.ContainsFunc(ips, ip.Equal):
			ips = append(ips, ip)
		}
	}
	return names, ips
}

func pair(certDER []byte, key *ecdsa.PrivateKey) (Pair, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Pair{}, fmt.Errorf("encode a private key: %w", err)
	}
	return Pair{CertPEM: encode("CERTIFICATE", certDER), KeyPEM: encode("PRIVATE KEY", der)}, nil
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// Write writes certificate (mode 0644) and key (0600). It overwrites nothing; when one of the two cannot be written,
// neither is left.
func (p Pair) Write(certFile, keyFile string) error {
	if err := writeNew(keyFile, p.KeyPEM, 0o600); err != nil {
		return err
	}
	if err := writeNew(certFile, p.CertPEM, 0o644); err != nil {
		return errors.Join(err, os.Remove(keyFile))
	}
	return nil
}

// WriteCert writes the authority's certificate. It overwrites nothing.
func (ca *CA) WriteCert(file string) error { return writeNew(file, ca.CertPEM(), 0o644) }

// writeNew creates a file, complete and synced, or leaves nothing.
func writeNew(file string, b []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if errors.Is(err, fs.ErrExist) {
		return &Error{Msg: file + " exists already and is not overwritten", Hint: "a key that is in use cannot be made again: move it away first if you are sure"}
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(file), err)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", file, err), os.Remove(file))
	}
	return nil
}

func readPEM(file, kind string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, &Error{Msg: "cannot read " + strings.ToLower(kind), Err: err, Hint: "duri init makes the files of each site; copy the site's folder as a whole"}
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != kind {
		return nil, &Error{Msg: fmt.Sprintf("%s does not hold a %s in PEM form", file, strings.ToLower(kind)), Hint: "duri init makes the files of each site; copy the site's folder as a whole"}
	}
	return block.Bytes, nil
}

func readCert(file string) (*x509.Certificate, error) {
	der, err := readPEM(file, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, &Error{Msg: "cannot read certificate " + file, Err: err}
	}
	return cert, nil
}

func readKey(file string) (*ecdsa.PrivateKey, error) {
	if err := checkKeyMode(file); err != nil {
		return nil, err
	}
	der, err := readPEM(file, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, &Error{Msg: "cannot read private key " + file, Err: err}
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, &Error{Msg: fmt.Sprintf("private key %s is a %T, want ECDSA", file, key), Hint: "use the files that duri init made"}
	}
	return ec, nil
}

// checkKeyMode refuses a key that others may read or its group may write: PostgreSQL's own rule for server keys
// allows a group that reads.
func checkKeyMode(file string) error {
	info, err := os.Stat(file)
	if err != nil {
		return &Error{Msg: "cannot read private key", Err: err, Hint: "duri init makes the files of each site; copy the site's folder as a whole"}
	}
	if mode := info.Mode().Perm(); mode&0o027 != 0 {
		return &Error{Msg: fmt.Sprintf("private key %s can be read by others (mode %04o)", file, mode), Hint: "chmod 600 " + file}
	}
	return nil
}
