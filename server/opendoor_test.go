package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pgtest"
)

// keyPair writes a certificate for 127.0.0.1 that trusts itself.
func keyPair(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(t.TempDir(), "cert.pem"), filepath.Join(t.TempDir(), "key.pem")
	if err := errors.Join(
		os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// TestGatewayModes: in each mode a client comes in with its password as long as the door is open, and what the agent reads
// verifiers with is what duri grants makes.
func TestGatewayModes(t *testing.T) {
	c := pgtest.New(t)
	pgtest.DB(t, c, "app")
	pgtest.Exec(t, c, "app", grants.SQL(grants.Spec{})+"CREATE ROLE client LOGIN PASSWORD 'secret'; GRANT duri TO client")
	cert, key := keyPair(t)
	for _, mode := range []config.GatewayMode{config.GatewayDoor, config.GatewaySession, config.GatewayTransaction} {
		t.Run(string(mode), func(t *testing.T) {
			cfg := &config.Config{
				Site: "a", Sites: []config.Site{{ID: 1, Name: "a"}}, Postgres: config.Postgres{DSN: c.DSN("", "duri")},
				Gateway: config.Gateway{Listen: "127.0.0.1:0", Mode: mode},
			}
			if mode != config.GatewayDoor {
				cfg.Gateway.Cert, cfg.Gateway.Key = cert, key
			}
			a := &Agent{cfg: cfg, self: cfg.Self(), log: slog.New(slog.DiscardHandler), nodes: []*node{{database: config.Database{Name: "app"}}}}
			l, err := a.openDoor()
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- a.door.Serve(ctx, l) }()
			watched := make(chan error, 1)
			go func() {
				if a.host != nil {
					watched <- a.host.run(ctx)
				}
				close(watched)
			}()
			defer func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
				if err := <-watched; err != nil && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			}()
			host, port, _ := strings.Cut(l.Addr().String(), ":")
			try := func(more string) error {
				conn, err := pgconn.Connect(ctx, fmt.Sprintf("host=%s port=%s dbname=app user=client password=secret %s", host, port, more))
				if err != nil {
					return err
				}
				defer conn.Close(ctx)
				_, err = conn.Exec(ctx, "SELECT 1").ReadAll()
				return err
			}
			if mode != config.GatewayDoor {
				pgtest.Exec(t, c, "app", "DROP FUNCTION IF EXISTS duri.verifier(name)")
				if err := try("sslmode=disable"); err == nil || !strings.Contains(err.Error(), "57P03") {
					t.Errorf("without duri grants --gateway: %v", err)
				}
				pgtest.Exec(t, c, "app", grants.SQL(grants.Spec{Gateway: true}))
				if err := try("sslmode=verify-full channel_binding=require sslrootcert=" + cert); err != nil {
					t.Error(err)
				}
				if err := try("sslmode=disable password=wrong"); err == nil || !strings.Contains(err.Error(), "28P01") {
					t.Errorf("wrong password: %v", err)
				}
				// The connection that verifiers are read by may break.
				pgtest.Exec(t, c, "app", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'duri'")
			}
			if err := try("sslmode=disable"); err != nil {
				t.Error(err)
			}
			a.door.Shut("a test says so")
			if err := try("sslmode=disable"); err == nil || !strings.Contains(err.Error(), "a test says so") {
				t.Errorf("shut: %v", err)
			}
			if shut, _, total := a.door.Status(); shut == "" || total == 0 {
				t.Errorf("%q, %d connections in all", shut, total)
			}
		})
	}
}
