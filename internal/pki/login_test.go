package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// loginCA makes one and writes its files.
func loginCA(t *testing.T) (ca *LoginCA, certFile, keyFile string) {
	t.Helper()
	pair, err := NewLoginCA("demo", "seoul")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "login-ca.crt"), filepath.Join(dir, "login-ca.key")
	if err := pair.Write(certFile, keyFile); err != nil {
		t.Fatal(err)
	}
	if ca, err = LoadLoginCA(certFile, keyFile); err != nil {
		t.Fatal(err)
	}
	return ca, certFile, keyFile
}

// TestLoginsAreShortLivedAndForClientsOnly: a certificate names the role and nothing else, is good for minutes, and at no server.
func TestLoginsAreShortLivedAndForClientsOnly(t *testing.T) {
	ca, certFile, _ := loginCA(t)
	pool, err := Authorities(certFile)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	ca.now = func() time.Time { return now }
	for _, role := range []string{"app", "App Role", `o'brien"x`, "역할", strings.Repeat("x", 63)} {
		c, err := ca.Certificate(role)
		if err != nil {
			t.Fatalf("%q: %v", role, err)
		}
		leaf := c.Leaf
		if leaf.Subject.CommonName != role || len(leaf.Subject.Names) != 1 || len(leaf.URIs)+len(leaf.DNSNames) != 0 {
			t.Errorf("%q: subject %v", role, leaf.Subject)
		}
		if until := leaf.NotAfter.Sub(now); until > 10*time.Minute || until < 9*time.Minute {
			t.Errorf("%q is good for %v", role, until)
		}
		for usage, ok := range map[x509.ExtKeyUsage]bool{x509.ExtKeyUsageClientAuth: true, x509.ExtKeyUsageServerAuth: false} {
			_, err := leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{usage}})
			if (err == nil) != ok {
				t.Errorf("%q, usage %d: %v", role, usage, err)
			}
		}
		if leaf.IsCA {
			t.Errorf("%q may sign", role)
		}
	}
	first, _ := ca.Certificate("app")
	now = now.Add(4 * time.Minute)
	if again, _ := ca.Certificate("app"); again.Leaf != first.Leaf {
		t.Error("one that is good for more than five minutes was made again")
	}
	now = now.Add(2 * time.Minute)
	if again, _ := ca.Certificate("app"); again.Leaf == first.Leaf {
		t.Error("one that is good for less than five minutes was given away")
	}
	now = ca.cert.NotAfter.Add(-time.Minute)
	if c, err := ca.Certificate("app"); err != nil || c.Leaf.NotAfter.After(ca.cert.NotAfter) {
		t.Errorf("outlives its authority: %v, %v", c.Leaf, err)
	}
	now = ca.cert.NotAfter.Add(time.Minute)
	if _, err := ca.Certificate("app"); err == nil || !strings.Contains(err.Error(), "is valid from") {
		t.Errorf("after the authority's end: %v", err)
	}
}

func TestLoginsOfNobody(t *testing.T) {
	ca, _, _ := loginCA(t)
	for _, role := range []string{"", "a\x00b", strings.Repeat("x", 64), "\xff"} {
		if _, err := ca.Certificate(role); err == nil {
			t.Errorf("%q got a certificate", role)
		}
	}
	for n := range 3 * loginsMax {
		if _, err := ca.Certificate(strings.Repeat("r", n%60+1) + string(rune('a'+n%26))); err != nil {
			t.Fatal(err)
		}
	}
	if len(ca.issued) > loginsMax {
		t.Errorf("%d are kept", len(ca.issued))
	}
}

// TestLoginsAreNoPeers: what the authority for logins signs, and it itself, is nobody between agents, as site or as gateway.
func TestLoginsAreNoPeers(t *testing.T) {
	cluster := newCA(t, clusterX)
	server, _ := site(t, cluster, "seoul")
	ca, _, _ := loginCA(t)
	c, err := ca.Certificate("app")
	if err != nil {
		t.Fatal(err)
	}
	for name, cert := range map[string]tls.Certificate{
		"a login":       c,
		"the authority": {Certificate: [][]byte{ca.cert.Raw}, PrivateKey: ca.key},
	} {
		r := connect(t, server, &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
		if r.serverErr == nil || !strings.Contains(r.serverErr.Error(), "does not name a duri cluster") {
			t.Errorf("%s: %v", name, r.serverErr)
		}
	}
}

func TestLoginFilesThatDoNotFit(t *testing.T) {
	_, certFile, keyFile := loginCA(t)
	_, otherCert, otherKey := loginCA(t)
	cluster := newCA(t, clusterX)
	own, err := cluster.Pair()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	clusterCert, clusterKey := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	open := filepath.Join(dir, "open.key")
	b, err := os.ReadFile(keyFile)
	if err := errors.Join(err, own.Write(clusterCert, clusterKey), os.WriteFile(open, b, 0o644)); err != nil {
		t.Fatal(err)
	}
	site := install(t, cluster, issue(t, cluster, "seoul"))
	for _, c := range []struct{ cert, key, says, hint string }{
		{certFile, otherKey, "are not an authority's certificate and its key", "duri gateway login-ca"},
		{otherCert, keyFile, "are not an authority's certificate and its key", "duri gateway login-ca"},
		{clusterCert, clusterKey, "is of the cluster's own authority", "duri gateway login-ca"},
		{site.Cert, site.Key, "is of the cluster's own authority", "duri gateway login-ca"},
		{certFile, open, "can be read by others", "chmod 600"},
		{certFile, filepath.Join(dir, "none"), "cannot read private key", "duri gateway login-ca"},
		{filepath.Join(dir, "none"), keyFile, "cannot read certificate", "duri gateway login-ca"},
	} {
		_, err := LoadLoginCA(c.cert, c.key)
		if e, ok := errors.AsType[*Error](err); !ok || !strings.Contains(e.Error(), c.says) || !strings.Contains(e.Hint, c.hint) {
			t.Errorf("%s, %s: %v", filepath.Base(c.cert), filepath.Base(c.key), err)
		}
	}
}

func TestAuthorities(t *testing.T) {
	_, certFile, keyFile := loginCA(t)
	one, err := os.ReadFile(certFile)
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	cluster := newCA(t, clusterX)
	leaf := issue(t, cluster, "seoul").CertPEM
	file := filepath.Join(t.TempDir(), "clients.crt")
	for name, c := range map[string]struct {
		content []byte
		says    string // empty: it is taken
	}{
		"one":         {one, ""},
		"two":         {slices.Concat([]byte("# the clients' authorities\n"), one, cluster.CertPEM()), ""},
		"none":        {nil, "does not hold a certificate"},
		"a key":       {key, "does not hold a certificate"},
		"a leaf":      {slices.Concat(one, leaf), "certificate 2 of"},
		"damaged":     {slices.Concat(one, encode("CERTIFICATE", []byte("x"))), "cannot read certificate 2"},
		"other lines": {[]byte("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"), "does not hold a certificate"},
	} {
		if err := os.WriteFile(file, c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		pool, err := Authorities(file)
		switch {
		case c.says == "" && (err != nil || pool == nil):
			t.Errorf("%s: %v", name, err)
		case c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Authorities(file + "x"); err == nil {
		t.Error("a file that is not there was read")
	}
}
