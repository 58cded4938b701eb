package gateway

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/pgwire"
)

// authority signs certificates in tests.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// newAuthority makes one, signed by another; nil: by itself.
func newAuthority(t testing.TB, by *authority, change func(*x509.Certificate)) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, key: key}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority of " + t.Name()}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if change != nil {
		change(tmpl)
	}
	signer := by
	if by == nil {
		signer = &authority{cert: tmpl, key: key}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, signer.cert, key.Public(), signer.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// issue makes a client's certificate; of the Subject that change leaves, the common name is cn.
func (a *authority) issue(cn string, change func(*x509.Certificate)) tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: cn, Organization: []string{"Example"}}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if change != nil {
		change(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// subject gives a certificate a subject in DER.
func subject(names ...any) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		var rdn pkix.RDNSequence
		for _, n := range names {
			rdn = append(rdn, pkix.RelativeDistinguishedNameSET{{Type: oidCommonName, Value: n}})
		}
		der, err := asn1.Marshal(rdn)
		if err != nil {
			panic(err)
		}
		c.RawSubject = der
	}
}

func usage(all ...x509.ExtKeyUsage) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.ExtKeyUsage = all }
}

// TestWhoACertificateIs: the rule, in all that may be odd about a certificate or a name.
func TestWhoACertificateIs(t *testing.T) {
	a := newAuthority(t, nil, nil)
	other := newAuthority(t, nil, nil)
	between := newAuthority(t, a, func(c *x509.Certificate) { c.Subject.CommonName = "between" })
	old := newAuthority(t, a, func(c *x509.Certificate) { c.Subject.CommonName = "old"; c.NotAfter = time.Now().Add(-time.Minute) })
	noSigner := a.issue("app", nil) // no authority, yet it signs
	under := &authority{t, noSigner.Leaf, noSigner.PrivateKey.(*ecdsa.PrivateKey)}
	forServers := newAuthority(t, a, func(c *x509.Certificate) { c.Subject.CommonName = "servers"; usage(x509.ExtKeyUsageServerAuth)(c) })
	long, longer := strings.Repeat("x", 63), strings.Repeat("x", 64)
	for _, c := range []struct {
		name  string
		chain []*x509.Certificate
		user  string
		says  string // empty: it is the user's
	}{
		{"its own", chain(a.issue("app", nil)), "app", ""},
		{"no usage named", chain(a.issue("app", usage())), "app", ""},
		{"any usage", chain(a.issue("app", usage(x509.ExtKeyUsageAny))), "app", ""},
		{"quotes and blanks", chain(a.issue(`O'Brien "x"; --`, nil)), `O'Brien "x"; --`, ""},
		{"not of ASCII", chain(a.issue("역할", nil)), "역할", ""},
		{"63 bytes", chain(a.issue(long, nil)), long, ""},
		{"by one between", chain(between.issue("app", nil), between.cert), "app", ""},
		{"of the name with another part beside it", chain(a.issue("app", func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"postgres"} })), "app", ""},

		{"another's", chain(a.issue("app", nil)), "postgres", `is that of "app"`},
		{"case", chain(a.issue("App", nil)), "app", `is that of "App"`},
		{"blank behind", chain(a.issue("app ", nil)), "app", `is that of "app "`},
		{"a part of the name", chain(a.issue("app", nil)), "app1", `is that of "app"`},
		{"64 bytes", chain(a.issue(longer, nil)), longer, "64 bytes"},
		{"64 bytes for 63", chain(a.issue(longer, nil)), long, "is that of"},
		{"empty name", chain(a.issue("", subject(""))), "", "no common name"},
		{"no name", chain(a.issue("", nil)), "", "no common name"},
		{"no name for a user", chain(a.issue("", nil)), "Example", "no common name"},
		{"names in other places", chain(a.issue("", func(c *x509.Certificate) {
			c.DNSNames, c.EmailAddresses, c.Subject = []string{"app"}, []string{"app"}, pkix.Name{Organization: []string{"app"}, SerialNumber: "app"}
		})), "app", "no common name"},
		{"two names", chain(a.issue("", subject("app", "postgres"))), "app", "2 common names"},
		{"two names, the other way", chain(a.issue("", subject("postgres", "app"))), "app", "2 common names"},
		{"the same name twice", chain(a.issue("", subject("app", "app"))), "app", "2 common names"},
		{"a second name that is empty", chain(a.issue("", subject("app", ""))), "app", "2 common names"},
		{"zero byte", chain(a.issue("app\x00.example", nil)), "app", "zero byte"},
		{"zero byte, in both", chain(a.issue("app\x00x", nil)), "app\x00x", "zero byte"},

		{"of nobody", chain(other.issue("app", nil)), "app", "not signed by an authority that is trusted"},
		{"by one between that is not shown", chain(between.issue("app", nil)), "app", "not signed by an authority that is trusted"},
		{"by one between of nobody", chain(other.issue("app", nil), other.cert), "app", "not signed by an authority that is trusted"},
		{"by itself", chain(selfSigned(t, "app")), "app", "not signed by an authority that is trusted"},
		{"signed by a client", chain(under.issue("postgres", nil), noSigner.Leaf), "postgres", "the certificate"},
		{"expired", chain(a.issue("app", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })), "app", "expired on"},
		{"not yet valid", chain(a.issue("app", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })), "app", "not valid before"},
		{"by one between that has expired", chain(old.issue("app", nil), old.cert), "app", "has expired"},
		{"for servers", chain(a.issue("app", usage(x509.ExtKeyUsageServerAuth))), "app", "not for clients"},
		{"for code", chain(a.issue("app", usage(x509.ExtKeyUsageCodeSigning))), "app", "not for clients"},
		{"by one that signs for servers", chain(forServers.issue("app", nil), forServers.cert), "app", "not for clients"},
		{"critical extension that nobody knows", chain(a.issue("app", func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		})), "app", "cannot be verified"},
	} {
		err := mayBe(c.chain, a.pool(), c.user, time.Now())
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.says)
		}
	}
}

func chain(cert tls.Certificate, more ...*x509.Certificate) []*x509.Certificate {
	return append([]*x509.Certificate{cert.Leaf}, more...)
}

// selfSigned is a client's certificate that trusts itself.
func selfSigned(t *testing.T, cn string) tls.Certificate {
	a := newAuthority(t, nil, func(c *x509.Certificate) { c.Subject.CommonName = cn })
	return tls.Certificate{Certificate: [][]byte{a.cert.Raw}, PrivateKey: a.key, Leaf: a.cert}
}

// certTrial is a PostgreSQL that lets some roles in by certificate, a gateway before it, and the authority of its clients.
type certTrial struct {
	*testing.T
	c       *pgcluster.Cluster
	clients *authority
	g       *Server
	addr    string
}

// strange is a role whose name has to be quoted.
const strange = `O'Brien "the App"`

func startCertTrial(t *testing.T, mode Mode) *certTrial {
	t.Helper()
	_, certPEM, keyPEM, trusted := certificate(t)
	files := filepath.Join(t.TempDir(), "login-ca")
	pair, err := pki.NewLoginCA("demo", "a")
	if err := errors.Join(err, pair.Write(files+".crt", files+".key")); err != nil {
		t.Fatal(err)
	}
	logins, err := pki.LoadLoginCA(files+".crt", files+".key")
	if err != nil {
		t.Fatal(err)
	}
	c := pgtest.New(t, pgtest.Stopped(), pgtest.WithSetting("ssl", "on"), pgtest.WithSetting("ssl_ca_file", "login-ca.crt"))
	write(t, c, "server.crt", certPEM)
	write(t, c, "server.key", keyPEM)
	write(t, c, "login-ca.crt", pair.CertPEM)
	write(t, c, "pg_hba.conf", []byte("local all all trust\nhostssl all app,\"O'Brien \"\"the App\"\"\",App 127.0.0.1/32 cert\nhostssl replication app 127.0.0.1/32 cert\n"+
		"hostssl all all 127.0.0.1/32 scram-sha-256\n"))
	start(t, c, "")
	pgtest.Exec(t, c, "postgres", `CREATE ROLE "O'Brien ""the App""" LOGIN`)
	pgtest.Exec(t, c, "postgres", `CREATE ROLE clerk LOGIN PASSWORD 'the app''s password'`)
	pgtest.Exec(t, c, "postgres", `CREATE ROLE boss LOGIN PASSWORD 'the app''s password'`)
	tr := &certTrial{T: t, c: c, clients: newAuthority(t, nil, nil)}
	cert, _, _, _ := certificate(t)
	cfg := Config{
		Mode: mode, TLS: &tls.Config{Certificates: []tls.Certificate{cert}}, ServerTLS: &tls.Config{RootCAs: trusted}, ClientCAs: tr.clients.pool(), Admins: []string{"boss"},
	}
	cfg.DialAs = func(ctx context.Context, to Target, role string) (net.Conn, error) {
		if role == "nobody" {
			return nil, &LoginError{"not that role", "take another"}
		}
		minted, err := logins.Certificate(role)
		if err != nil {
			return nil, err
		}
		conn, err := new(net.Dialer).DialContext(ctx, to.Network, to.Address)
		if err != nil {
			return nil, err
		}
		if _, err := conn.Write(pgwire.AppendSSLRequest(nil)); err != nil {
			return nil, err
		}
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			return nil, err
		}
		s := tls.Client(conn, &tls.Config{RootCAs: trusted, ServerName: "127.0.0.1", Certificates: []tls.Certificate{minted}})
		return s, s.HandshakeContext(ctx)
	}
	tr.g, tr.addr = serve(t, cfg, c)
	return tr
}

// config is how pgx connects as a user; cert nil: without a certificate.
func (t *certTrial) config(user string, cert *tls.Certificate, more string) *pgx.ConnConfig {
	t.Helper()
	cfg, err := pgx.ParseConfig(dsn(t.addr, "sslmode=require password='' "+more))
	if err != nil {
		t.Fatal(err)
	}
	cfg.User = user
	if cert != nil {
		// Whatever authorities the gateway names, as libpq does.
		cfg.TLSConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return cfg
}

func (t *certTrial) connect(user string, cert *tls.Certificate, more string) (*pgx.Conn, error) {
	t.Helper()
	c, err := pgx.ConnectConfig(t.Context(), t.config(user, cert, more))
	if err == nil {
		t.Cleanup(func() { c.Close(context.Background()) })
	}
	return c, err
}

// files writes a certificate and its key for libpq.
func (t *certTrial) files(cert tls.Certificate) (certFile, keyFile string) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	base := filepath.Join(t.TempDir(), "client")
	err = errors.Join(
		os.WriteFile(base+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}), 0o600),
		os.WriteFile(base+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600),
	)
	if err != nil {
		t.Fatal(err)
	}
	return base + ".crt", base + ".key"
}

const whoSQL = `SELECT current_user || ' ' || session_user || ' ' || (SELECT client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid())`

// TestLoginByCertificate: real clients, a real server that asks for certificates, in both modes.
func TestLoginByCertificate(t *testing.T) {
	for _, mode := range []Mode{SessionMode, TransactionMode} {
		t.Run([]string{"session", "transaction"}[mode], func(t *testing.T) { testLoginByCertificate(startCertTrial(t, mode)) })
	}
}

func testLoginByCertificate(t *certTrial) {
	app, odd := t.clients.issue(appUser, nil), t.clients.issue(strange, nil)
	for user, cert := range map[string]*tls.Certificate{appUser: &app, strange: &odd} {
		conn, err := t.connect(user, cert, "")
		if err != nil {
			t.Fatal(err)
		}
		if got, want := value[string](t, conn, whoSQL), user+" "+user+" /CN="+strings.ReplaceAll(user, `"`, `\"`); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	host, port, _ := strings.Cut(t.addr, ":")
	certFile, keyFile := t.files(app)
	psql := func(more string) (string, error) {
		return run(t, t.c, "psql", "", "-wXAtc", whoSQL, fmt.Sprintf("host=%s port=%s dbname=shop user=app sslmode=require %s", host, port, more))
	}
	if out, err := psql("sslcert=" + certFile + " sslkey=" + keyFile); err != nil || out != "app app /CN=app\n" {
		t.Errorf("psql: %s %v", out, err)
	}
	// The server lets the role in by certificate only. Who knows its password gets no connection that was opened so.
	out, err := psql("password='" + strings.ReplaceAll(appPassword, "'", `\'`) + "'")
	if err == nil || !strings.Contains(out, "connection requires a valid client certificate") {
		t.Errorf("with a password: %s %v", out, err)
	}
	// A role that the server asks for a password gets in with one, and not by certificate.
	clerk := t.clients.issue("clerk", nil)
	conn, err := t.connect("clerk", nil, "password='the app\\'s password'")
	if err != nil || value[string](t, conn, "SELECT current_user") != "clerk" {
		t.Errorf("with a password: %v", err)
	}
	_, err = t.connect("clerk", &clerk, "password='the app\\'s password'")
	if e := wantCode(t, "a password is asked for", err, "28000", "asks for more than the certificate"); !strings.Contains(e.Hint, "pg_hba.conf") {
		t.Errorf("hint %q", e.Hint)
	}
	nobody := t.clients.issue("nobody", nil)
	_, err = t.connect("nobody", &nobody, "")
	if e := wantCode(t, "not to be logged in so", err, "28000", "not that role"); e.Hint != "take another" {
		t.Errorf("hint %q", e.Hint)
	}
	upper := t.clients.issue("App", nil)
	_, err = t.connect("App", &upper, "")
	wantCode(t, "no such role", err, "28000", `"App" does not exist`)
	t.refusals(app)
	t.others(app)
}

// refusals are certificates that are no good. None of them may get in as it would without one, with the password.
func (t *certTrial) refusals(app tls.Certificate) {
	before := t.g.Report().Refused["28000"]
	other := newAuthority(t, nil, nil)
	bad := map[string]tls.Certificate{
		"not signed by an authority": other.issue(appUser, nil),
		"expired on":                 t.clients.issue(appUser, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }),
		`is that of "clerk"`:         t.clients.issue("clerk", nil),
		"not for clients":            t.clients.issue(appUser, usage(x509.ExtKeyUsageServerAuth)),
		"2 common names":             t.clients.issue("", subject("clerk", appUser)),
	}
	host, port, _ := strings.Cut(t.addr, ":")
	for says, cert := range bad {
		_, err := t.connect(appUser, &cert, "password='the app\\'s password'")
		e := wantCode(t, says, err, "28000", says)
		if !strings.HasPrefix(e.Message, `certificate authentication failed for user "app": `) || e.Severity != "FATAL" {
			t.Errorf("%s: %v", says, e)
		}
		certFile, keyFile := t.files(cert)
		out, err := run(t, t.c, "psql", "", "-wXAtc", "SELECT 1", fmt.Sprintf("host=%s port=%s dbname=shop user=app sslmode=require sslcert=%s sslkey=%s", host, port, certFile, keyFile))
		if err == nil || !strings.Contains(out, says) {
			t.Errorf("psql, %s: %s %v", says, out, err)
		}
	}
	if n := t.g.Report().Refused["28000"] - before; n != uint64(2*len(bad)) {
		t.Errorf("%d refusals were counted, of %d", n, 2*len(bad))
	}
	// A certificate without its key proves nothing.
	stolen := app
	stolen.PrivateKey = t.clients.issue(appUser, nil).PrivateKey
	if _, err := t.connect(appUser, &stolen, ""); err == nil {
		t.Error("a certificate was taken whose key the client does not have")
	}
}

// others are what else a client may want.
func (t *certTrial) others(app tls.Certificate) {
	// A request to cancel finds its query, without a certificate, as its secret is what counts.
	conn, err := t.connect(appUser, &app, "")
	if err != nil {
		t.Fatal(err)
	}
	slept := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), "SELECT pg_sleep(60)")
		slept <- err
	}()
	until(t, "it sleeps", func() bool {
		return pgtest.Query(t, t.c, "postgres", "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")[0][0] == "1"
	})
	if err := conn.PgConn().CancelRequest(t.Context()); err != nil {
		t.Error(err)
	}
	wantCode(t, "cancel", <-slept, "57014", "")
	// A replication connection has the same rule, at the gateway and at the server.
	repl, err := pgconn.ConnectConfig(t.Context(), &t.config(appUser, &app, "replication=database").Config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repl.Exec(t.Context(), "IDENTIFY_SYSTEM").ReadAll(); err != nil {
		t.Error(err)
	}
	_ = repl.Close(t.Context())
	// The gateway's own database: for its administrators, who may also come by certificate.
	boss, clerk := t.clients.issue("boss", nil), t.clients.issue("clerk", nil)
	_, err = t.connect("clerk", &clerk, "dbname=duri")
	wantCode(t, "not an administrator", err, "42501", "")
	_, err = t.connect("boss", &clerk, "dbname=duri")
	wantCode(t, "an administrator's name", err, "28000", `is that of "clerk"`)
	cfg := t.config("boss", &boss, "dbname=duri")
	cfg.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	admin, err := pgx.ConnectConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(t.Context())
	there := map[string]bool{}
	for _, s := range t.g.Sessions() { // those that were refused may still be on their way out
		there[s.User+" "+s.Login] = true
	}
	if !there["app certificate"] || !there["boss certificate"] || !there["clerk password"] {
		t.Errorf("logins %v", there)
	}
	// TLS sessions are not resumed: a certificate is shown with its key each time.
	resuming := t.config(appUser, &app, "")
	resuming.TLSConfig.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	for range 2 {
		c, err := pgx.ConnectConfig(t.Context(), resuming)
		if err != nil {
			t.Fatal(err)
		}
		if tc, ok := c.PgConn().Conn().(*tls.Conn); !ok || tc.ConnectionState().DidResume {
			t.Error("a TLS session was resumed")
		}
		c.Close(t.Context())
	}
}

// TestCertificatesAreLimitedAsOtherLogins: by how many logins an address may have.
func TestCertificatesAreLimitedAsOtherLogins(t *testing.T) {
	tr := startCertTrial(t, TransactionMode)
	l := tr.g.Limits()
	l.LoginRate = 1
	tr.g.SetLimits(l)
	bad := newAuthority(t, nil, nil).issue(appUser, nil)
	codes := map[string]int{}
	for range burstS + 5 {
		_, err := tr.connect(appUser, &bad, "")
		e, ok := errors.AsType[*pgconn.PgError](err)
		if !ok {
			t.Fatal(err)
		}
		codes[e.Code]++
	}
	if codes["28000"] < burstS || codes["53400"] == 0 {
		t.Errorf("%v", codes)
	}
}

func TestLoginsByCertificateNeedTheirMeans(t *testing.T) {
	a := newAuthority(t, nil, nil)
	cert, _, _, _ := certificate(t)
	dial := func(context.Context, Target, string) (net.Conn, error) { return nil, errors.New("no") }
	for _, cfg := range []Config{
		{ClientCAs: a.pool(), DialAs: dial},
		{ClientCAs: a.pool(), TLS: &tls.Config{Certificates: []tls.Certificate{cert}}},
	} {
		cfg.Router, cfg.Verifiers = &routes{}, verifiers{}
		if _, err := NewServer(cfg); err == nil || !strings.Contains(err.Error(), "need TLS and DialAs") {
			t.Error(err)
		}
	}
}
