package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/pgwire/scram"
)

// door is the way of clients: a gateway.Door or gateway.Server.
type door interface {
	Open()
	Shut(why string)
	Status() (shut string, now int, total int64)
	Serve(ctx context.Context, l net.Listener) error
}

// openDoor listens for clients, if the agent is their way to PostgreSQL. Without a register the door is open from the
// beginning.
func (a *Agent) openDoor() (net.Listener, error) {
	if a.cfg.Gateway.Listen == "" {
		return nil, nil
	}
	d, err := a.newDoor()
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", a.cfg.Gateway.Listen)
	if err != nil {
		return nil, &hinted{fmt.Sprintf("listen for clients: %v", err), "another process uses this port; change gateway.listen in duri.yaml, or end it"}
	}
	a.door = d
	if a.keeper == nil {
		d.Open()
	} else {
		a.keeper.door = d
	}
	return ln, nil
}

// newDoor makes the way of clients to the site's own server, as gateway.mode says.
func (a *Agent) newDoor() (door, error) {
	c, err := pg.Config(a.cfg.Postgres.DSN, a.nodes[0].database.Name, nil)
	if err != nil {
		return nil, err
	}
	network, address := pgconn.NetworkAddress(c.Host, c.Port)
	if a.cfg.Gateway.Mode == config.GatewayDoor {
		return gateway.NewDoor(func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		}, a.log), nil
	}
	g := gateway.Config{
		Router: here{gateway.Target{Site: a.self.Name, Network: network, Address: address}},
		Log:    a.log,
	}
	if a.cfg.Gateway.Mode == config.GatewayTransaction {
		g.Mode = gateway.TransactionMode
	}
	if c.TLSConfig != nil && len(c.Fallbacks) == 0 { // sslmode demands it; "prefer" has a fallback without
		g.ServerTLS = c.TLSConfig
	}
	if a.cfg.Gateway.Cert != "" {
		cert, err := tls.LoadX509KeyPair(a.cfg.Gateway.Cert, a.cfg.Gateway.Key)
		if err != nil {
			return nil, &hinted{fmt.Sprintf("certificate for clients: %v", err), "check gateway.cert and gateway.key in duri.yaml"}
		}
		g.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	}
	v := &verifiers{config: c}
	g.Verifiers = v
	a.administer(&g, c.User)
	s, err := gateway.NewServer(g)
	if err != nil {
		return nil, err
	}
	return &served{s, v}, nil
}

// here routes everybody to the site's own server.
type here struct{ target gateway.Target }

func (h here) Route(*gateway.Login, gateway.Wish) (gateway.Target, error) { return h.target, nil }

// served is a gateway.Server with what it needs.
type served struct {
	*gateway.Server
	verifiers *verifiers
}

func (s *served) Serve(ctx context.Context, l net.Listener) error {
	defer s.verifiers.close()
	return s.Server.Serve(ctx, l)
}

// verifiers asks the function that duri grants makes. It keeps one connection, as a login asks for one row.
type verifiers struct {
	config *pgconn.Config

	mu   sync.Mutex // guards conn, and orders questions
	conn *pgconn.PgConn
}

// verifierTimeoutMax bounds one question.
const verifierTimeoutMax = 5 * time.Second

func (v *verifiers) Verifier(ctx context.Context, user string) (*scram.Verifier, error) {
	if len(user) > 63 {
		return nil, nil // PostgreSQL would cut it, and find somebody else.
	}
	ctx, cancel := context.WithTimeout(ctx, verifierTimeoutMax)
	defer cancel()
	v.mu.Lock()
	defer v.mu.Unlock()
	rows, err := v.ask(ctx, user)
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok && (pgErr.Code == "42883" || pgErr.Code == "42501") {
		return nil, &hinted{"read SCRAM verifiers: " + pgErr.Message, "run `duri grants --gateway` and its SQL as superuser once more"}
	}
	if err != nil {
		return nil, fmt.Errorf("read SCRAM verifiers: %w", err)
	}
	if len(rows) == 0 || len(rows[0]) == 0 || rows[0][0] == "" {
		return nil, nil
	}
	return scram.ParseVerifier(rows[0][0])
}

// ask tries once more when the connection had broken since the last question.
func (v *verifiers) ask(ctx context.Context, user string) (rows [][]string, err error) {
	for range 2 {
		fresh := v.conn == nil || v.conn.IsClosed()
		if fresh {
			if v.conn, err = pgconn.ConnectConfig(ctx, v.config); err != nil {
				return nil, err
			}
		}
		rows, err = pg.Query(ctx, v.conn, "SELECT duri.verifier($1)", user)
		if err == nil || fresh || !v.conn.IsClosed() {
			return rows, err
		}
	}
	return nil, err
}

func (v *verifiers) close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), verifierTimeoutMax)
		defer cancel()
		_ = v.conn.Close(ctx) // the server may have ended it already
	}
}
