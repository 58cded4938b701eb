package gateway

import (
	"bytes"
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
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/pgwire/scram"
)

// The role that clients log in as, at each site with the same verifier.
const (
	appUser     = "app"
	appPassword = "the app's password"
)

// site is a PostgreSQL that asks for SCRAM over TCP, with the database and role of tests.
func site(t testing.TB, verifier string, opts ...pgtest.Option) *pgcluster.Cluster {
	t.Helper()
	c := pgtest.New(t, append([]pgtest.Option{pgtest.Stopped(), pgtest.WithSetting("max_prepared_transactions", "5")}, opts...)...)
	write(t, c, "pg_hba.conf", []byte("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\nhost replication all 127.0.0.1/32 scram-sha-256\n"))
	start(t, c, verifier)
	return c
}

// write puts a file into a cluster's data directory.
func write(t testing.TB, c *pgcluster.Cluster, name string, content []byte) {
	t.Helper()
	st, err := os.Stat(c.DataDir())
	if err != nil {
		t.Fatal(err)
	}
	owner := st.Sys().(*syscall.Stat_t)
	path := filepath.Join(c.DataDir(), name)
	if err := errors.Join(os.WriteFile(path, content, 0o600), os.Chown(path, int(owner.Uid), int(owner.Gid))); err != nil {
		t.Fatal(err)
	}
}

func start(t testing.TB, c *pgcluster.Cluster, verifier string) {
	t.Helper()
	if err := c.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	if verifier == "" {
		verifier = appPassword
	}
	pgtest.Exec(t, c, "postgres", fmt.Sprintf(`CREATE ROLE %s LOGIN REPLICATION PASSWORD '%s'`, appUser, strings.ReplaceAll(verifier, "'", "''")))
	pgtest.Exec(t, c, "postgres", "CREATE DATABASE shop OWNER "+appUser)
	pgtest.Exec(t, c, "shop", "ALTER SCHEMA public OWNER TO "+appUser)
}

// verifiers reads pg_authid, as a SECURITY DEFINER function would.
type verifiers struct{ c *pgcluster.Cluster }

func (v verifiers) Verifier(ctx context.Context, user string) (*scram.Verifier, error) {
	rows, err := v.c.QueryText(ctx, "postgres", "SELECT rolpassword FROM pg_authid WHERE rolcanlogin AND rolname = '"+strings.ReplaceAll(user, "'", "''")+"'")
	if err != nil || len(rows) == 0 {
		return nil, err
	}
	return scram.ParseVerifier(rows[0][0])
}

// routes goes through its targets, one per call.
type routes struct {
	mu      sync.Mutex
	targets []Target
	calls   int
	err     error
}

// set lets the next call give the first of targets.
func (r *routes) set(targets ...Target) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.targets, r.calls = targets, -1
}

func (r *routes) Route(*Login, Wish) (Target, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls++
	if r.err != nil {
		return Target{}, r.err
	}
	return r.targets[r.calls%len(r.targets)], nil
}

// lead lets all go to one target from now on.
func (r *routes) lead(to Target) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.targets = []Target{to}
}

func target(c *pgcluster.Cluster, name string) Target {
	return Target{Site: name, Network: "tcp", Address: "127.0.0.1:" + strconv.Itoa(c.Port())}
}

// serve starts a Server in front of clusters and gives its address.
func serve(t testing.TB, cfg Config, clusters ...*pgcluster.Cluster) (g *Server, addr string) {
	t.Helper()
	if cfg.Router == nil {
		r := &routes{}
		for i, c := range clusters {
			r.targets = append(r.targets, target(c, string(rune('a'+i))))
		}
		cfg.Router = r
	}
	if cfg.Verifiers == nil {
		cfg.Verifiers = verifiers{clusters[0]}
	}
	cfg.Log = slog.New(slog.DiscardHandler)
	g, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	g.Open()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, n, _ := g.Status(); n != 0 {
			t.Errorf("%d connections of clients are left", n)
		}
	})
	return g, l.Addr().String()
}

func dsn(addr, more string) string {
	host, port, _ := strings.Cut(addr, ":")
	return fmt.Sprintf("host=%s port=%s dbname=shop user=%s password='%s' sslmode=disable %s", host, port, appUser, strings.ReplaceAll(appPassword, "'", `\'`), more)
}

func open1(t testing.TB, dsn string) *pgx.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(context.Background()) })
	return c
}

func exec1(t testing.TB, c *pgx.Conn, sql string, args ...any) {
	t.Helper()
	if _, err := c.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func value[T any](t testing.TB, c *pgx.Conn, sql string, args ...any) (v T) {
	t.Helper()
	if err := c.QueryRow(t.Context(), sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// wantCode compares the SQLSTATE of an error.
func wantCode(t testing.TB, what string, err error, code, says string) *pgconn.PgError {
	t.Helper()
	e, ok := errors.AsType[*pgconn.PgError](err)
	if !ok || e.Code != code || !strings.Contains(e.Message+e.Detail+e.Hint, says) {
		t.Errorf("%s: want SQLSTATE %s with %q, got %v", what, code, says, err)
		return &pgconn.PgError{}
	}
	return e
}

// run runs a client program of PostgreSQL.
func run(t testing.TB, c *pgcluster.Cluster, program, input string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(c.BinDir(), program), args...)
	cmd.Stdin = strings.NewReader(input)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PGPASSFILE="+filepath.Join(t.TempDir(), "none"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// certificate makes one for 127.0.0.1 that trusts itself.
func certificate(t testing.TB) (cert tls.Certificate, certPEM, keyPEM []byte, pool *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "127.0.0.1"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	if cert, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		t.Fatal(err)
	}
	pool = x509.NewCertPool()
	pool.AppendCertsFromPEM(certPEM)
	return cert, certPEM, keyPEM, pool
}

// secureSite is a site that lets nobody in without TLS and channel binding is possible with.
func secureSite(t testing.TB, verifier string) (*pgcluster.Cluster, *x509.CertPool) {
	t.Helper()
	_, certPEM, keyPEM, pool := certificate(t)
	c := pgtest.New(t, pgtest.Stopped(), pgtest.WithSetting("ssl", "on"))
	write(t, c, "server.crt", certPEM)
	write(t, c, "server.key", keyPEM)
	write(t, c, "pg_hba.conf", []byte("local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n"))
	start(t, c, verifier)
	return c, pool
}

func TestLogin(t *testing.T) {
	c := site(t, "")
	refused := errors.New("")
	var admitted atomic.Int64
	_, addr := serve(t, Config{ClientsMax: 3, Admit: func(_ net.Addr, user string) error {
		if user == "flood" {
			return refused
		}
		admitted.Add(1)
		return nil
	}}, c)
	conn := open1(t, dsn(addr, "application_name=door options='-c work_mem=5MB'"))
	if got := value[string](t, conn, "SELECT current_user || ' ' || current_database() || ' ' || current_setting('application_name') || ' ' || current_setting('work_mem')"); got != "app shop door 5MB" {
		t.Error(got)
	}
	if conn.PgConn().ParameterStatus("server_version") == "" || conn.PgConn().ParameterStatus("client_encoding") != "UTF8" {
		t.Error("parameters were not reported")
	}
	try := func(more string) error {
		conn, err := pgx.Connect(t.Context(), dsn(addr, more))
		if err == nil {
			conn.Close(t.Context())
		}
		return err
	}
	wantCode(t, "wrong password", try("password=wrong"), "28P01", `for user "app"`)
	wantCode(t, "no such user", try("user=nobody"), "28P01", `for user "nobody"`)
	wantCode(t, "no such database", try("dbname=nowhere"), "3D000", `database "nowhere" does not exist`)
	wantCode(t, "rate", try("user=flood"), "53400", "")
	if err := try("max_protocol_version=3.2"); err != nil {
		t.Error("protocol 3.2:", err)
	}
	for range 2 {
		open1(t, dsn(addr, ""))
	}
	wantCode(t, "too many", try(""), "53300", "as many clients")
	if n := admitted.Load(); n != 7 {
		t.Errorf("%d logins were admitted", n)
	}
}

// TestPasswordsAreRefusedAlike: who does not exist cannot be told from who does.
func TestPasswordsAreRefusedAlike(t *testing.T) {
	c := site(t, "")
	_, addr := serve(t, Config{}, c)
	said := map[string]string{}
	for _, user := range []string{appUser, "nobody", "nobody"} {
		_, err := pgx.Connect(t.Context(), dsn(addr, "password=wrong user="+user))
		said[user] = strings.ReplaceAll(wantCode(t, user, err, "28P01", "").Message, user, "X")
	}
	if said[appUser] != said["nobody"] {
		t.Errorf("%q", said)
	}
}

// TestVerifierOfAnotherSite: keys log in only where the verifier is the same, and the error says what to do.
func TestVerifierOfAnotherSite(t *testing.T) {
	a, b := site(t, ""), site(t, "")
	_, addr := serve(t, Config{Router: &routes{targets: []Target{target(b, "b")}}}, a)
	_, err := pgx.Connect(t.Context(), dsn(addr, ""))
	e := wantCode(t, "other verifier", err, "28P01", "another SCRAM verifier")
	if !strings.Contains(e.Hint, "pg_authid") {
		t.Errorf("hint: %q", e.Hint)
	}
	// Same salt and count, but another password: the server itself refuses the proof.
	v, err := verifiers{a}.Verifier(t.Context(), appUser)
	if err != nil {
		t.Fatal(err)
	}
	v.StoredKey[0]++
	pgtest.Exec(t, b, "postgres", fmt.Sprintf("ALTER ROLE app PASSWORD '%s'", v))
	_, err = pgx.Connect(t.Context(), dsn(addr, ""))
	wantCode(t, "wrong keys", err, "28P01", "password authentication failed")
}

// TestChannelsAreBound: SCRAM-SHA-256-PLUS on both legs, each with its own certificate.
func TestChannelsAreBound(t *testing.T) {
	c, trusted := secureSite(t, "")
	cert, certPEM, _, _ := certificate(t)
	_, addr := serve(t, Config{TLS: &tls.Config{Certificates: []tls.Certificate{cert}}, ServerTLS: &tls.Config{RootCAs: trusted}}, c)
	host, port, _ := strings.Cut(addr, ":")
	file := filepath.Join(t.TempDir(), "gateway.crt")
	if err := os.WriteFile(file, certPEM, 0o600); err != nil {
		t.Fatal(err)
	}
	psql := func(more string) (string, error) {
		return run(t, c, "psql", "", "-XAtc", "SELECT 'in as ' || current_user || ', TLS ' || (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid())",
			fmt.Sprintf("host=%s port=%s dbname=shop user=app sslrootcert=%s %s", host, port, file, more))
	}
	good := "password='" + strings.ReplaceAll(appPassword, "'", `\'`) + "' "
	for _, mode := range []string{"sslmode=verify-full channel_binding=require", "sslmode=require channel_binding=disable", "sslmode=disable"} {
		if out, err := psql(good + mode); err != nil || out != "in as app, TLS true\n" {
			t.Errorf("%s: %s %v", mode, out, err)
		}
	}
	if out, err := psql("password=wrong sslmode=verify-full channel_binding=require"); err == nil || !strings.Contains(out, "password authentication failed") {
		t.Errorf("%s %v", out, err)
	}
	conn := open1(t, fmt.Sprintf("host=%s port=%s dbname=shop user=app %s sslmode=verify-full sslrootcert=%s channel_binding=require", host, port, good, file))
	if value[int](t, conn, "SELECT 1") != 1 {
		t.Error("no answer")
	}

	// Direct TLS, as libpq 17 can begin: with ALPN only.
	for _, c := range []struct {
		protos []string
		ok     bool
	}{{[]string{"postgresql"}, true}, {nil, false}} {
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(certPEM)
		direct, err := tls.Dial("tcp", addr, &tls.Config{RootCAs: pool, NextProtos: c.protos, ServerName: host})
		if err != nil {
			t.Fatal(err)
		}
		defer direct.Close()
		_, _ = direct.Write(append([]byte{0, 0, 0, 18, 0, 3, 0, 0}, "user\x00app\x00\x00"...))
		b := make([]byte, 1)
		n, err := direct.Read(b)
		if ok := n == 1 && b[0] == 'R'; ok != c.ok {
			t.Errorf("ALPN %q: read %q, %v", c.protos, b[:n], err)
		}
	}
	// What somebody in between puts behind the request for TLS is not taken as the client's.
	raw, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	inject := append([]byte{0, 0, 0, 8, 4, 210, 22, 47}, 0, 0, 0, 18, 0, 3, 0, 0)
	_, _ = raw.Write(append(inject, "user\x00app\x00\x00"...))
	var got bytes.Buffer
	_ = raw.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, _ = got.ReadFrom(raw)
	if bytes.Contains(got.Bytes(), []byte("SCRAM")) {
		t.Errorf("plain text behind the request for TLS was answered: %q", got.Bytes())
	}
}

// TestShutEndsSessions: as at the door, nobody is served while it is shut, and those that were in are out.
func TestShutEndsSessions(t *testing.T) {
	c := site(t, "")
	for _, mode := range []Mode{SessionMode, TransactionMode} {
		g, addr := serve(t, Config{Mode: mode}, c)
		idle, busy := open1(t, dsn(addr, "")), open1(t, dsn(addr, ""))
		exec1(t, busy, "BEGIN; CREATE TABLE never(a int)")
		if shut, now, total := g.Status(); shut != "" || now != 2 || total != 2 {
			t.Errorf("%q, %d connections of %d", shut, now, total)
		}
		g.Shut("it is no member of the register")
		for _, conn := range []*pgx.Conn{idle, busy} {
			if _, err := conn.Exec(t.Context(), "COMMIT"); err == nil {
				t.Error("a statement was carried out")
			}
		}
		_, err := pgx.Connect(t.Context(), dsn(addr, ""))
		if e := wantCode(t, "shut", err, "57P03", "no member of the register"); e.Hint == "" {
			t.Error("no hint")
		}
		until(t, "the open transaction is gone", func() bool {
			return pgtest.Query(t, c, "shop", "SELECT count(*) FROM pg_locks WHERE relation = 'pg_class'::regclass AND mode = 'RowExclusiveLock'")[0][0] == "0"
		})
		if got := pgtest.Query(t, c, "shop", "SELECT count(*) FROM pg_class WHERE relname = 'never'")[0][0]; got != "0" {
			t.Error("a transaction was committed")
		}
		g.Open()
		if value[int](t, open1(t, dsn(addr, "")), "SELECT 1") != 1 {
			t.Error("no answer after it was opened")
		}
	}
}

func TestServerWithoutTLSThatIsToHaveIt(t *testing.T) {
	c := site(t, "")
	_, addr := serve(t, Config{ServerTLS: &tls.Config{}}, c)
	_, err := pgx.Connect(t.Context(), dsn(addr, ""))
	wantCode(t, "no TLS", err, "57P03", "has no TLS")
}

// TestClientsAreWatched: each connection from its first byte to its end, so that one whose client's host has vanished can be ended.
func TestClientsAreWatched(t *testing.T) {
	c := site(t, "")
	var mu sync.Mutex
	now, ever := map[net.Conn]bool{}, 0
	_, addr := serve(t, Config{Mode: TransactionMode, Watch: func(client net.Conn) func() {
		mu.Lock()
		defer mu.Unlock()
		now[client] = true
		ever++
		return func() {
			mu.Lock()
			defer mu.Unlock()
			delete(now, client)
		}
	}}, c)
	watched := func() (int, int) {
		mu.Lock()
		defer mu.Unlock()
		return len(now), ever
	}
	conn := open1(t, dsn(addr, ""))
	exec1(t, conn, "SELECT 1")
	if n, all := watched(); n != 1 || all != 1 {
		t.Errorf("%d of %d are watched", n, all)
	}
	if err := conn.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, "nobody is watched", func() bool { n, _ := watched(); return n == 0 })
}
