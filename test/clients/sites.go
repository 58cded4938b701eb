// Package clients runs programs that know nothing of duri through its gateway, while every transaction goes to another
// site than the one before: PostgreSQL's own programs, drivers of other languages with what is built on them, and the
// drivers' own tests. Each runs twice, straight to PostgreSQL and through the gateway, and must say the same.
//
// For most of them both sites are one server: each transaction then runs in another backend of another pool, which is where
// the state of a session could get lost, while what one transaction has written the next one finds. The short form is this
// package's test, the long one `make prove CASE=clients`.
package clients

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/internal/pgcluster"
)

// The roles that programs log in as: an ordinary one, which owns its database, and a superuser for the drivers' own tests.
const (
	appRole  = "app"
	bossRole = "boss"
	password = "the clients' password"
)

// hba asks for SCRAM over TCP, as the gateway needs it.
const hba = "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\nhost replication all 127.0.0.1/32 scram-sha-256\n"

// Sites is two sites with a gateway before them.
type Sites struct {
	Servers []*pgcluster.Cluster // one that is both sites, or two
	Gateway *Gateway
}

// Start makes a server, or two that know nothing of each other, and a gateway. Close removes all.
func Start(ctx context.Context, two bool, clients int, withTLS bool) (_ *Sites, err error) {
	s := &Sites{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	verifier := password
	for range map[bool]int{false: 1, true: 2}[two] {
		c, err := server(ctx)
		if err != nil {
			return nil, err
		}
		s.Servers = append(s.Servers, c)
		// The second one gets the first one's verifier, as the sites of a cluster have them.
		sql := fmt.Sprintf(`CREATE ROLE %s LOGIN REPLICATION CREATEDB CREATEROLE PASSWORD %s`, appRole, literal(verifier))
		if err := c.Exec(ctx, "postgres", sql); err != nil {
			return nil, err
		}
		rows, err := c.QueryText(ctx, "postgres", "SELECT rolpassword FROM pg_authid WHERE rolname = '"+appRole+"'")
		if err != nil {
			return nil, err
		}
		verifier = rows[0][0]
		if err := c.Exec(ctx, "postgres", fmt.Sprintf(`CREATE ROLE %s SUPERUSER LOGIN REPLICATION PASSWORD %s`, bossRole, literal(verifier))); err != nil {
			return nil, err
		}
	}
	first := s.Servers[0]
	o := gatewayOptions{Admin: adminDSN(first, "postgres"), TLS: withTLS, Clients: clients}
	for _, c := range []*pgcluster.Cluster{first, s.Servers[len(s.Servers)-1]} {
		o.Servers = append(o.Servers, fmt.Sprintf("127.0.0.1:%d", c.Port()))
	}
	if s.Gateway, err = startGateway(o); err != nil {
		return nil, err
	}
	return s, nil
}

func literal(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

// quoted is a value in a connection string.
func quoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `\'`) + "'" }

// server makes a PostgreSQL that asks for passwords over TCP, and starts it.
func server(ctx context.Context) (_ *pgcluster.Cluster, err error) {
	c, err := pgcluster.Create(ctx, pgcluster.Options{Settings: map[string]string{
		"fsync": "off", "full_page_writes": "off", "jit": "off", "max_connections": "200", "max_prepared_transactions": "10",
		"max_wal_size": "4GB", "shared_buffers": "128MB", "dynamic_shared_memory_type": "mmap",
	}})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Destroy())
		}
	}()
	st, err := os.Stat(c.DataDir())
	if err != nil {
		return nil, err
	}
	owner := st.Sys().(*syscall.Stat_t)
	path := filepath.Join(c.DataDir(), "pg_hba.conf")
	if err := errors.Join(os.WriteFile(path, []byte(hba), 0o600), os.Chown(path, int(owner.Uid), int(owner.Gid))); err != nil {
		return nil, err
	}
	return c, c.Start(ctx)
}

// Close ends the gateway and the servers and removes what they had on disk.
func (s *Sites) Close() error {
	var err error
	if s.Gateway != nil {
		err = s.Gateway.Close()
	}
	for _, c := range s.Servers {
		err = errors.Join(err, c.Destroy())
	}
	return err
}

// Database makes an empty database, at each server.
func (s *Sites) Database(ctx context.Context, name string) error {
	for _, c := range s.Servers {
		// What is idle in the gateway's pools is ended with the old one.
		if err := c.Exec(ctx, "postgres", "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)"); err != nil {
			return err
		}
		if err := c.Exec(ctx, "postgres", "CREATE DATABASE "+name+" OWNER "+appRole); err != nil {
			return err
		}
		if err := c.Exec(ctx, name, "ALTER SCHEMA public OWNER TO "+appRole+"; CREATE SCHEMA duri"); err != nil {
			return err
		}
		if err := migrate(ctx, adminDSN(c, name)); err != nil {
			return err
		}
	}
	return nil
}

// adminDSN is how the gateway's process reaches a server as its superuser.
func adminDSN(c *pgcluster.Cluster, database string) string {
	return fmt.Sprintf("host=%s port=%d dbname=%s user=%s", c.SocketDir(), c.Port(), database, c.Superuser())
}

// migrate gives a database what the gateway marks transactions by, with the rest of duri's tables.
func migrate(ctx context.Context, dsn string) error {
	conn, err := pgconn.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }() // what it has done stands
	return catalog.Migrate(ctx, conn)
}
