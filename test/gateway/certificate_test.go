package gateway

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pair"
)

// clientAuthority signs clients' certificates; it is nothing that duri has made.
type clientAuthority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newClientAuthority(t *testing.T) (a clientAuthority) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a.key = key
	a.cert = a.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "the clients' authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil, key)
	return a
}

func (a clientAuthority) sign(t *testing.T, tmpl, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	tmpl.SerialNumber, tmpl.NotBefore, tmpl.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// client is the TLS of a client whose certificate is of a name.
func (a clientAuthority) client(t *testing.T, name string) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := a.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, a.cert, key)
	return &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}}}
}

// takeCertificates sets sites and gateways up for clients with certificates of an authority, as the program itself says. The role
// client gets in at PostgreSQL in no other way.
func (t *trial) takeCertificates(a clientAuthority) {
	t.Helper()
	clientCA := filepath.Join(t.TempDir(), "clients.crt")
	if err := os.WriteFile(clientCA, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "duri")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "github.com/duri-io/duri/cmd/duri").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, s := range t.p.Sites {
		dir := filepath.Dir(s.ConfigFile)
		if out, err := exec.CommandContext(t.Context(), program, "gateway", "login-ca", "-c", s.ConfigFile).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		st, err := os.Stat(s.Cluster.DataDir())
		if err != nil {
			t.Fatal(err)
		}
		owner := st.Sys().(*syscall.Stat_t)
		put := func(name string, content []byte) error {
			path := filepath.Join(s.Cluster.DataDir(), name)
			return errors.Join(os.WriteFile(path, content, 0o600), os.Chown(path, int(owner.Uid), int(owner.Gid)))
		}
		for from, to := range map[string]string{"site.crt": "server.crt", "site.key": "server.key", "login-ca.crt": "login-ca.crt"} {
			b, err := os.ReadFile(filepath.Join(dir, from))
			if err := errors.Join(err, put(to, b)); err != nil {
				t.Fatal(err)
			}
		}
		hba := "local all all trust\nhostssl all client 127.0.0.1/32 cert\nhost all client all reject\nhost all all 127.0.0.1/32 trust\nhost replication all 127.0.0.1/32 trust\n"
		t.within(time.Minute, func(ctx context.Context) error {
			errs := []error{put("pg_hba.conf", []byte(hba))}
			for _, sql := range []string{"ALTER SYSTEM SET ssl_ca_file = 'login-ca.crt'", "ALTER SYSTEM SET ssl = on", "SELECT pg_reload_conf()"} {
				errs = append(errs, s.Cluster.Exec(ctx, "postgres", sql))
			}
			return errors.Join(errs...)
		})
		err = s.EditConfig(func(text string) string {
			text = strings.Replace(text, "user=duri", "user=duri sslmode=require", 1)
			return strings.Replace(text, "\ngateway:\n", fmt.Sprintf("\ngateway:\n  cert: site.crt\n  key: site.key\n  client_ca: %q\n  login_ca: {cert: login-ca.crt, key: login-ca.key, roles: [client]}\n", clientCA), 1)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	err := t.p.Gateway.EditConfig(func(text string) string {
		return strings.Replace(text, "\ngateway:\n", fmt.Sprintf("\ngateway:\n  cert: gateway.crt\n  key: gateway.key\n  client_ca: %q\n", clientCA), 1)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.tls = a.client(t.T, "client")
}

// TestSessionsByCertificateSurviveTheirSite: clients that have logged in by certificate write without a pause while their whole site
// is killed, go on at the other one, and home again. An agent's own gateway takes such clients as well.
func TestSessionsByCertificateSurviveTheirSite(t *testing.T) {
	a := newClientAuthority(t)
	tr := startSet(t, pair.Options{Sync: true, Rearm: 500 * time.Millisecond}, func(tr *trial) { tr.takeCertificates(a) })
	all := tr.clients(4)
	tr.waitAt("a", all)
	alone := tr.address
	tr.address = tr.b.Door // whose home is b
	own := tr.clients(1)[0]
	if _, err := own.conn.Exec(t.Context(), "SET app.client = '4'"); err != nil {
		t.Fatal(err)
	}
	own.n = 4
	tr.waitAt("b", []*client{own})
	again, longest := tr.writeDuring(all, func(run *run) {
		if err := errors.Join(tr.a.SignalAgent(syscall.SIGKILL), tr.a.Cluster.Kill()); err != nil {
			t.Fatal(err)
		}
		run.waitAt("b")
		tr.within(time.Minute, tr.a.Cluster.Start)
		if err := tr.a.StartAgent(); err != nil {
			t.Fatal(err)
		}
		tr.waitMembers()
	})
	t.Logf("%d transactions were rolled back with 40001, the longest took %v", again, longest)
	tr.waitAt("a", all)
	tr.waitAt("b", []*client{own})
	tr.audit(append(all, own))
	for _, address := range []string{alone, tr.a.Door, tr.b.Door} {
		tr.address = address
		for name, want := range map[string]string{"duri": "28000", "client": ""} {
			tr.tls = a.client(t, name)
			conn, err := tr.connect(t.Context())
			var e *pgconn.PgError
			switch {
			case want == "" && err != nil, want != "" && (!errors.As(err, &e) || e.Code != want || !strings.Contains(e.Message, `is that of "duri"`)):
				t.Errorf("a certificate of %s at %s: %v", name, address, err)
			}
			if err == nil {
				_ = conn.Close(t.Context())
			}
		}
		// The password is right, and PostgreSQL does not let the role in with it.
		tr.tls = nil
		if _, err := tr.connect(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("with a password at %s: %v", address, err)
		}
	}
}
