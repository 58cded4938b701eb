package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/link"
)

// writePG puts a file into a cluster's data directory.
func writePG(t *testing.T, c *pgcluster.Cluster, name string, content []byte) {
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

// newLoginFiles makes an authority for logins and gives where its files are.
func newLoginFiles(t *testing.T) (c config.LoginCA, certPEM []byte) {
	t.Helper()
	pair, err := pki.NewLoginCA("demo", "a")
	base := filepath.Join(t.TempDir(), "login-ca")
	c = config.LoginCA{Cert: base + ".crt", Key: base + ".key"}
	if err := errors.Join(err, pair.Write(c.Cert, c.Key)); err != nil {
		t.Fatal(err)
	}
	return c, pair.CertPEM
}

// newCertCluster is a PostgreSQL with TLS that lets the role client in by certificates of the authority in certPEM.
func newCertCluster(t *testing.T, certPEM []byte) *pgcluster.Cluster {
	t.Helper()
	ca, err := pki.NewCA("00000000-0000-4000-8000-000000000000", "x")
	if err != nil {
		t.Fatal(err)
	}
	server, err := ca.Issue("a")
	if err != nil {
		t.Fatal(err)
	}
	c := pgtest.New(t, pgtest.Stopped(), pgtest.WithSetting("ssl", "on"), pgtest.WithSetting("ssl_ca_file", "login-ca.crt"))
	writePG(t, c, "server.crt", server.CertPEM)
	writePG(t, c, "server.key", server.KeyPEM)
	writePG(t, c, "login-ca.crt", certPEM)
	writePG(t, c, "pg_hba.conf", []byte("local all all trust\nhostssl all client,other 127.0.0.1/32 cert\nhostssl all all 127.0.0.1/32 trust\n"))
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, c, "postgres", "CREATE ROLE client LOGIN")
	pgtest.Exec(t, c, "postgres", "CREATE ROLE other LOGIN")
	return c
}

func tcpDSN(c *pgcluster.Cluster, more string) string {
	_, port, _ := strings.Cut(c.DSN("", c.Superuser()), "port=")
	port, _, _ = strings.Cut(port, " ")
	return "host=127.0.0.1 port=" + port + " user=" + c.Superuser() + " " + more
}

// through logs a role in over a connection that is there, and asks who it is.
func through(ctx context.Context, conn net.Conn, role string) (string, error) {
	cfg, err := pgconn.ParseConfig("host=127.0.0.1 dbname=postgres sslmode=disable user=" + role)
	if err != nil {
		return "", err
	}
	cfg.DialFunc = func(context.Context, string, string) (net.Conn, error) { return conn, nil }
	c, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		return "", err
	}
	defer pg.Close(c)
	rows, err := pg.Query(ctx, c, "SELECT current_user || (SELECT client_dn FROM pg_catalog.pg_stat_ssl WHERE pid = pg_catalog.pg_backend_pid())")
	if err != nil {
		return "", err
	}
	return rows[0][0], nil
}

// TestLoginsByCertificate: the agent logs roles in that are to be logged in so, and says why it does not others.
func TestLoginsByCertificate(t *testing.T) {
	files, certPEM := newLoginFiles(t)
	c := newCertCluster(t, certPEM)
	files.Roles = []string{"client"}
	newEntryWith := func(dsn string, l config.LoginCA) (*entry, error) {
		e, err := newEntry(dsn, "postgres", func() {}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		logins, err := newLogins(l)
		if err != nil {
			t.Fatal(err)
		}
		return e, e.setLogins(logins)
	}
	e, err := newEntryWith(tcpDSN(c, "sslmode=require"), files)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := e.dialAs(t.Context(), "client", func() {}); err == nil || errors.Is(err, link.ErrLogin) || !strings.Contains(err.Error(), "just started") {
		t.Errorf("while it is shut: %v", err)
	}
	e.Open()
	for range 3 {
		conn, release, err := e.dialAs(t.Context(), "client", func() {})
		if err != nil {
			t.Fatal(err)
		}
		if who, err := through(t.Context(), conn, "client"); err != nil || who != "client/CN=client" {
			t.Errorf("%q, %v", who, err)
		}
		release()
	}
	// The certificate is the role's, whatever name is asked for then.
	conn, release, err := e.dialAs(t.Context(), "client", func() {})
	if err != nil {
		t.Fatal(err)
	}
	if who, err := through(t.Context(), conn, "other"); err == nil || !strings.Contains(err.Error(), "certificate authentication failed") {
		t.Errorf("%q, %v", who, err)
	}
	release()
	_, _, err = e.dialAs(t.Context(), "other", func() {})
	if !errors.Is(err, link.ErrLogin) || !strings.Contains(err.Error(), "gateway.login_ca.roles") {
		t.Errorf("a role that is not listed: %v", err)
	}
	none, err := newEntryWith(tcpDSN(c, "sslmode=require"), config.LoginCA{})
	if err != nil {
		t.Fatal(err)
	}
	none.Open()
	if _, _, err := none.dialAs(t.Context(), "client", func() {}); !errors.Is(err, link.ErrLogin) || !strings.Contains(hintOf(err), "duri gateway login-ca") {
		t.Errorf("without an authority: %v", err)
	}
	for _, dsn := range []string{tcpDSN(c, "sslmode=prefer"), tcpDSN(c, "sslmode=disable"), c.DSN("", c.Superuser())} {
		if _, err := newEntryWith(dsn, files); err == nil || !strings.Contains(hintOf(err), "sslmode") {
			t.Errorf("without TLS to PostgreSQL: %v", err)
		}
	}
	// For the agent's own gateway, the error is one of a login.
	s := &sites{links: []*siteLink{{target: gateway.Target{Site: "a"}, dialAs: e.dialOwnAs, conns: map[*tunneled]struct{}{}}}}
	_, err = s.dialAs(t.Context(), gateway.Target{Site: "a"}, "other")
	if l, ok := errors.AsType[*gateway.LoginError](err); !ok || l.Hint == "" {
		t.Errorf("%v", err)
	}
}

// TestPostgresKnowsAnotherAuthority: that PostgreSQL does not take the agent's certificate is told in words, each time.
func TestPostgresKnowsAnotherAuthority(t *testing.T) {
	files, _ := newLoginFiles(t)
	_, other := newLoginFiles(t)
	c := newCertCluster(t, other)
	e, err := newEntry(tcpDSN(c, "sslmode=require"), "postgres", func() {}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	l, err := newLogins(files)
	if err := errors.Join(err, e.setLogins(l)); err != nil {
		t.Fatal(err)
	}
	e.Open()
	for range 20 {
		conn, release, err := e.dialAs(t.Context(), "client", func() {})
		if err != nil {
			t.Fatal(err)
		}
		_, err = through(t.Context(), conn, "client")
		pgErr, ok := errors.AsType[*pgconn.PgError](err)
		if !ok || pgErr.Code != "28000" || !strings.Contains(pgErr.Hint, "ssl_ca_file") {
			t.Fatalf("%v", err)
		}
		release()
	}
}
