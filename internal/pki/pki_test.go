package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

const (
	clusterX = "4f2c9a1e-7c1d-4b5e-9a55-0d7f6c1e2b3a"
	clusterY = "11111111-2222-4333-8444-555555555555"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newCA(t *testing.T, cluster string) *CA {
	t.Helper()
	ca, err := NewCA(cluster, "demo")
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// install writes the files of a site, as duri init does.
func install(t *testing.T, ca *CA, pair Pair) Files {
	t.Helper()
	dir := t.TempDir()
	f := Files{CA: filepath.Join(dir, "ca.crt"), Cert: filepath.Join(dir, "site.crt"), Key: filepath.Join(dir, "site.key")}
	if err := errors.Join(ca.WriteCert(f.CA), pair.Write(f.Cert, f.Key)); err != nil {
		t.Fatal(err)
	}
	return f
}

func issue(t *testing.T, ca *CA, site string) Pair {
	t.Helper()
	pair, err := ca.Issue(site, site+".example:7400", "10.1.0.5:7400")
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// site makes a site's TLS configurations.
func site(t *testing.T, ca *CA, name string) (server, client *tls.Config) {
	t.Helper()
	server, client, err := TLS(install(t, ca, issue(t, ca, name)), ca.ClusterID(), name)
	if err != nil {
		t.Fatal(err)
	}
	return server, client
}

// raw gives configurations without any checks of their own, to play a stranger.
func raw(pair Pair) *tls.Config {
	c := &tls.Config{InsecureSkipVerify: true, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12}
	if cert, err := tls.X509KeyPair(pair.CertPEM, pair.KeyPEM); err == nil {
		c.Certificates = []tls.Certificate{cert}
	}
	return c
}

// result is how a connection went at both ends.
type result struct {
	serverErr, clientErr     error
	serverState, clientState tls.ConnectionState
}

// loopback gives the two ends of a TCP connection. (In net.Pipe both ends can be stuck in sending an alert.)
func loopback(t *testing.T) (server, client net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return server, client
}

// connect does a handshake and sends a byte each way: in TLS 1.3 the client only learns by reading that it is refused.
func connect(t *testing.T, server, client *tls.Config) result {
	t.Helper()
	a, b := loopback(t)
	deadline := time.Now().Add(10 * time.Second)
	if err := errors.Join(a.SetDeadline(deadline), b.SetDeadline(deadline)); err != nil {
		t.Fatal(err)
	}
	s, c := tls.Server(a, server), tls.Client(b, client)
	var r result
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer a.Close()
		if r.serverErr = s.Handshake(); r.serverErr == nil {
			_, r.serverErr = s.Write([]byte("x"))
		}
		r.serverState = s.ConnectionState()
	}()
	if r.clientErr = c.Handshake(); r.clientErr == nil {
		_, r.clientErr = io.ReadFull(c, make([]byte, 1))
	}
	r.clientState = c.ConnectionState()
	_ = b.Close()
	<-done
	return r
}

func TestSitesOfAClusterKnowEachOther(t *testing.T) {
	ca := newCA(t, clusterX)
	server, _ := site(t, ca, "seoul")
	_, client := site(t, ca, "busan")
	r := connect(t, server, client)
	if r.serverErr != nil || r.clientErr != nil {
		t.Fatalf("server: %v, client: %v", r.serverErr, r.clientErr)
	}
	if got, err := PeerSite(r.serverState); got != "busan" || err != nil {
		t.Errorf("the server sees %q, %v", got, err)
	}
	if got, err := PeerSite(r.clientState); got != "seoul" || err != nil {
		t.Errorf("the client sees %q, %v", got, err)
	}
	if r.clientState.Version != tls.VersionTLS13 {
		t.Errorf("TLS version %x", r.clientState.Version)
	}
}

// custom signs a certificate that Issue would not make.
func custom(t *testing.T, ca *CA, change func(*x509.Certificate)) Pair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		URIs:        []*url.URL{{Scheme: "duri", Host: ca.clusterID, Path: "/site/busan"}},
		NotBefore:   time.Now().Add(-time.Hour),
		NotAfter:    time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	p, err := pair(der, key)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestStrangersAreRefusedWithTheReason plays each stranger against a server and against a client.
func TestStrangersAreRefusedWithTheReason(t *testing.T) {
	ca := newCA(t, clusterX)
	server, client := site(t, ca, "seoul")
	at := func(from, to time.Duration) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(from), time.Now().Add(to) }
	}
	ownCA, err := ca.Pair()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		pair Pair
		want string
	}{
		{"another cluster", issue(t, newCA(t, clusterY), "busan"), "certificate of peer busan belongs to cluster " + clusterY + ", this is cluster " + clusterX},
		{"another CA that claims this cluster", issue(t, newCA(t, clusterX), "busan"), "certificate of peer busan is signed by another CA"},
		{"expired", custom(t, ca, at(-2*time.Hour, -time.Hour)), "certificate of peer busan expired on "},
		{"not yet valid", custom(t, ca, at(time.Hour, 2*time.Hour)), "certificate of peer busan is not valid before "},
		{"no identity", custom(t, ca, func(c *x509.Certificate) { c.URIs, c.Subject.CommonName = nil, "busan" }), `certificate of peer "busan" does not name a duri cluster`},
		{"wrong path", custom(t, ca, func(c *x509.Certificate) { c.URIs[0].Path = "/site/a/b" }), "does not name a duri cluster"},
		{"the authority itself", ownCA, "is not that of a site"},
		{"no usage", custom(t, ca, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }), "certificate of peer busan cannot be verified: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			if r := connect(t, server, raw(c.pair)); r.serverErr == nil || !strings.Contains(r.serverErr.Error(), c.want) || r.clientErr == nil {
				t.Errorf("server: %v (want %q), client: %v", r.serverErr, c.want, r.clientErr)
			}
			if r := connect(t, raw(c.pair), client); r.clientErr == nil || !strings.Contains(r.clientErr.Error(), c.want) {
				t.Errorf("client: %v (want %q)", r.clientErr, c.want)
			}
		})
	}
}

func TestCertificateForOneEndIsNotTakenAtTheOther(t *testing.T) {
	ca := newCA(t, clusterX)
	server, client := site(t, ca, "seoul")
	clientOnly := raw(custom(t, ca, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }))
	if r := connect(t, server, clientOnly); r.serverErr != nil || r.clientErr != nil {
		t.Errorf("as client: %v, %v", r.serverErr, r.clientErr)
	}
	if r := connect(t, clientOnly, client); r.clientErr == nil {
		t.Error("a client certificate was taken from a server")
	}
}

func TestClientWithoutCertificateAndOldTLSAreRefused(t *testing.T) {
	ca := newCA(t, clusterX)
	server, _ := site(t, ca, "seoul")
	if r := connect(t, server, raw(Pair{})); r.serverErr == nil {
		t.Error("a client without certificate was accepted")
	}
	old := raw(issue(t, ca, "busan"))
	old.MaxVersion = tls.VersionTLS12
	if r := connect(t, server, old); r.serverErr == nil || !strings.Contains(r.serverErr.Error(), "version") {
		t.Errorf("TLS 1.2: %v", r.serverErr)
	}
}

func TestExpiredAuthorityIsNamed(t *testing.T) {
	ca := newCA(t, clusterX)
	template := *ca.cert
	template.NotBefore, template.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, ca.key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	old, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	expired := &CA{clusterID: clusterX, cert: old, key: ca.key}
	files := install(t, expired, custom(t, expired, func(*x509.Certificate) {}))
	if _, _, err := TLS(files, clusterX, "busan"); err == nil || !strings.Contains(err.Error(), "the cluster's CA has expired") {
		t.Errorf("got %v", err)
	}
}

func TestFilesThatDoNotMatchAreFoundAtLoadTime(t *testing.T) {
	ca := newCA(t, clusterX)
	other := newCA(t, clusterX)
	foreign := newCA(t, clusterY)
	a, b := issue(t, ca, "seoul"), issue(t, ca, "seoul")
	expired := custom(t, ca, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	garbage := Pair{CertPEM: []byte("x"), KeyPEM: a.KeyPEM}
	for _, c := range []struct {
		name  string
		files Files
		site  string
		want  string
	}{
		{"key of another certificate", install(t, ca, Pair{a.CertPEM, b.KeyPEM}), "seoul", "do not belong together"},
		{"another site's folder", install(t, ca, issue(t, ca, "busan")), "seoul", "is that of site busan, this is site seoul"},
		{"another CA's certificate", install(t, other, a), "seoul", "is signed by another CA"},
		{"another cluster's folder", install(t, foreign, issue(t, foreign, "seoul")), "seoul", "is not the authority of cluster " + clusterX},
		{"another cluster's certificate", install(t, ca, issue(t, foreign, "seoul")), "seoul", "belongs to cluster " + clusterY},
		{"expired", install(t, ca, expired), "busan", "expired on"},
		{"garbage", install(t, ca, garbage), "seoul", "does not hold a certificate in PEM form"},
		{"key as certificate", install(t, ca, Pair{a.KeyPEM, a.KeyPEM}), "seoul", "does not hold a certificate in PEM form"},
		{"damaged certificate", install(t, ca, Pair{encode("CERTIFICATE", []byte("x")), a.KeyPEM}), "seoul", "cannot read certificate"},
		{"damaged key", install(t, ca, Pair{a.CertPEM, encode("PRIVATE KEY", []byte("x"))}), "seoul", "cannot read private key"},
		{"no files", Files{CA: "/nonexistent/ca.crt"}, "seoul", "cannot read certificate"},
	} {
		t.Run(c.name, func(t *testing.T) {
			server, client, err := TLS(c.files, clusterX, c.site)
			if err == nil || !strings.Contains(err.Error(), c.want) || server != nil || client != nil {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestKeyThatOthersCanReadIsRefused(t *testing.T) {
	ca := newCA(t, clusterX)
	files := install(t, ca, issue(t, ca, "seoul"))
	for mode, ok := range map[os.FileMode]bool{0o600: true, 0o640: true, 0o400: true, 0o644: false, 0o660: false, 0o604: false} {
		if err := os.Chmod(files.Key, mode); err != nil {
			t.Fatal(err)
		}
		_, _, err := TLS(files, clusterX, "seoul")
		if (err == nil) != ok {
			t.Errorf("mode %04o: %v", mode, err)
		}
		var e *Error
		if !ok && (!errors.As(err, &e) || e.HintText() != "chmod 600 "+files.Key) {
			t.Errorf("mode %04o: no hint in %v", mode, err)
		}
	}
}

func TestNothingIsOverwritten(t *testing.T) {
	ca := newCA(t, clusterX)
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "c"), filepath.Join(dir, "k")
	if err := os.WriteFile(cert, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := issue(t, ca, "seoul").Write(cert, key)
	var e *Error
	if !errors.As(err, &e) || !strings.Contains(e.Msg, "is not overwritten") || e.HintText() == "" {
		t.Errorf("got %v", err)
	}
	if b, _ := os.ReadFile(cert); string(b) != "precious" {
		t.Errorf("the file now holds %q", b)
	}
	if _, err := os.Stat(key); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half of the pair is left: %v", err)
	}
	if err := ca.WriteCert(cert); err == nil {
		t.Error("the authority's certificate overwrote a file")
	}
}

func TestAuthorityReadsBackAndIssues(t *testing.T) {
	ca := newCA(t, clusterX)
	own, err := ca.Pair()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	if err := own.Write(cert, key); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(key); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v", info.Mode(), err)
	}
	again, err := LoadCA(cert, key)
	if err != nil || again.ClusterID() != clusterX {
		t.Fatalf("read back: %+v, %v", again, err)
	}
	// A site that joins later works with those that were there.
	server, _ := site(t, ca, "seoul")
	_, client := site(t, again, "jeju")
	if r := connect(t, server, client); r.serverErr != nil || r.clientErr != nil {
		t.Errorf("server: %v, client: %v", r.serverErr, r.clientErr)
	}
	siteFiles := install(t, ca, issue(t, ca, "seoul"))
	if _, err := LoadCA(siteFiles.Cert, siteFiles.Key); err == nil {
		t.Error("a site's certificate was read as an authority")
	}
	if _, err := LoadCA(cert, siteFiles.Key); err == nil {
		t.Error("another key was read as the authority's")
	}
}

func TestCertificateNamesTheHostsOfTheSite(t *testing.T) {
	ca := newCA(t, clusterX)
	files := install(t, ca, issue(t, ca, "seoul"))
	cert, err := readCert(files.Cert)
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"seoul.example", "10.1.0.5", "localhost", "127.0.0.1", "::1"} {
		if err := cert.VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
	if end, err := NotAfter(files.Cert); err != nil || !end.Equal(ca.cert.NotAfter) || time.Until(end) < 9*365*24*time.Hour {
		t.Errorf("it ends %v, %v; the authority %v", end, err, ca.cert.NotAfter)
	}
}

func TestBadNamesAreRefused(t *testing.T) {
	for _, id := range []string{"", "a/b", "x y", "a@b"} {
		if _, err := NewCA(id, "demo"); err == nil {
			t.Errorf("cluster id %q was taken", id)
		}
	}
	ca := newCA(t, clusterX)
	for _, name := range []string{"", "a/b", "x?y"} {
		if _, err := ca.Issue(name); err == nil {
			t.Errorf("site %q was taken", name)
		}
	}
}

func TestPeerSiteOfNobodyIsAnError(t *testing.T) {
	ca := newCA(t, clusterX)
	for _, certs := range [][]*x509.Certificate{nil, {ca.cert}, {{}}} {
		if got, err := PeerSite(tls.ConnectionState{PeerCertificates: certs}); err == nil {
			t.Errorf("got %q", got)
		}
	}
}

// TestGatewaysAreNoSites: a gateway's certificate is accepted where somebody dials, is told apart from a site's, and is refused where
// somebody is dialled; each file fits its own kind and name only.
func TestGatewaysAreNoSites(t *testing.T) {
	ca := newCA(t, clusterX)
	pair, err := ca.IssueGateway("web1")
	if err != nil {
		t.Fatal(err)
	}
	files := install(t, ca, pair)
	client, err := GatewayTLS(files, clusterX, "web1")
	if err != nil {
		t.Fatal(err)
	}
	server, siteClient := site(t, ca, "busan")
	r := connect(t, server, client)
	if r.serverErr != nil || r.clientErr != nil {
		t.Fatalf("a gateway dials a site: %v, %v", r.serverErr, r.clientErr)
	}
	if who, err := Peer(r.serverState); who != (ID{Gateway, "web1"}) || err != nil {
		t.Errorf("%v, %v", who, err)
	}
	if _, err := PeerSite(r.serverState); err == nil || !strings.Contains(err.Error(), "is that of gateway web1, not of a site") {
		t.Errorf("it was taken for a site: %v", err)
	}
	if who, err := Peer(r.clientState); who != (ID{Site, "busan"}) || err != nil {
		t.Errorf("%v, %v", who, err)
	}
	if r := connect(t, raw(pair), siteClient); r.clientErr == nil || !strings.Contains(r.clientErr.Error(), "is that of gateway web1, not of a site") {
		t.Errorf("a gateway is dialled in the place of a site: %v", r.clientErr)
	}
	for name, load := range map[string]func() error{
		"another name": func() error { _, err := GatewayTLS(files, clusterX, "web2"); return err },
		"as a site":    func() error { _, _, err := TLS(files, clusterX, "web1"); return err },
		"a site's": func() error {
			_, err := GatewayTLS(install(t, ca, issue(t, ca, "web1")), clusterX, "web1")
			return err
		},
	} {
		if err := load(); err == nil || !strings.Contains(err.Error(), "is that of") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Whose name is not in it, the voters of the register refuse.
	if slices.Contains(r.serverState.PeerCertificates[0].DNSNames, ClusterName(clusterX)) {
		t.Error("it has the cluster's name")
	}
}
