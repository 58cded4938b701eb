package server

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/alive"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/pgwire"
)

// entry is the way of gateways to this site's PostgreSQL: of the agent's own, and, by tunnels, of those elsewhere. It is shut
// until Open is called. A site that may not serve clients shuts it, and gateways go on with the others.
type entry struct {
	network, address string
	tls              *tls.Config // nil: PostgreSQL is not asked for TLS
	logins           *logins     // by certificate; nil: there are none
	log              *slog.Logger
	alive            *alive.Watcher
	changed          func() // it was opened or shut, or PostgreSQL refused a connection; must not block

	mu    sync.Mutex // guards the rest
	shut  string     // why; empty: it is open
	conns map[*entered]struct{}
	total int64
}

// Hosts that have vanished: how long nothing may come back from a server to which something was sent, and from a client. A client may
// be behind a mobile network.
const (
	silentServer = 3 * time.Second
	silentClient = 30 * time.Second
)

// entered is a connection to PostgreSQL, and what it is for.
type entered struct {
	conn net.Conn
	cut  func()
}

// newEntry makes the entry to a server, as the agent's own connections find it.
func newEntry(dsn, database string, changed func(), log *slog.Logger) (*entry, error) {
	c, err := pg.Config(dsn, database, nil)
	if err != nil {
		return nil, err
	}
	e := &entry{log: log, changed: changed, alive: alive.New(silentServer), shut: "the agent has just started", conns: map[*entered]struct{}{}}
	e.network, e.address = pgconn.NetworkAddress(c.Host, c.Port)
	if c.TLSConfig != nil && len(c.Fallbacks) == 0 { // sslmode demands it; "prefer" has a fallback without
		e.tls = c.TLSConfig
	}
	return e, nil
}

// Open lets gateways in.
func (e *entry) Open() { e.set("") }

// Shut refuses gateways, with the reason, and cuts their connections. When it returns, nothing that the server sends is handed
// on any more.
func (e *entry) Shut(why string) { e.set(why) }

func (e *entry) set(why string) {
	e.mu.Lock()
	was := e.shut
	e.shut = why
	n := len(e.conns)
	if why != "" {
		for c := range e.conns {
			c.cut()
			_ = c.conn.Close() // it may have ended by itself
		}
	}
	e.mu.Unlock()
	switch {
	case was == why:
		return
	case why == "":
		e.log.Info("clients are let in")
	case was == "":
		e.log.Warn("clients are shut out", "why", why, "connections", n)
	}
	e.changed()
}

// reason is why it is shut; empty: it is open.
func (e *entry) reason() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.shut
}

// Status says whether it is open, why not, how many connections there are, and how many there were.
func (e *entry) Status() (shut string, now int, total int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.shut, len(e.conns), e.total
}

// dial connects to PostgreSQL. cut ends what the connection is for, and is called, and the connection closed, when the entry is
// shut; release must be called in the end. With secure, it asks PostgreSQL for TLS as the agent's own connections do.
func (e *entry) dial(ctx context.Context, secure bool, cut func()) (conn net.Conn, release func(), err error) {
	if !secure || e.tls == nil {
		return e.open(ctx, cut, nil)
	}
	return e.open(ctx, cut, func(ctx context.Context, conn net.Conn) (net.Conn, error) { return e.secure(ctx, conn, e.tls) })
}

// open is dial with what makes the connection safe; nil: nothing does.
func (e *entry) open(ctx context.Context, cut func(), secure func(context.Context, net.Conn) (net.Conn, error)) (conn net.Conn, release func(), err error) {
	if why := e.reason(); why != "" {
		return nil, nil, shutError(why)
	}
	conn, err = new(net.Dialer).DialContext(ctx, e.network, e.address)
	if err != nil {
		if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) {
			e.changed()
		}
		return nil, nil, &hinted{"PostgreSQL cannot be reached: " + err.Error(), "see whether it runs"}
	}
	unwatch := e.alive.Watch(conn)
	if secure != nil {
		if conn, err = secure(ctx, conn); err != nil {
			unwatch()
			return nil, nil, err
		}
	}
	c := &entered{conn, cut}
	e.mu.Lock()
	why := e.shut
	if why == "" {
		e.conns[c] = struct{}{}
		e.total++
	}
	e.mu.Unlock()
	if why != "" {
		unwatch()
		_ = conn.Close()
		return nil, nil, shutError(why)
	}
	return conn, func() {
		unwatch()
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.conns, c)
	}, nil
}

func shutError(why string) error {
	return &hinted{"this site takes no clients: " + why, "connect to another site; `duri status` tells when this one is back"}
}

// secure asks PostgreSQL for TLS. After an error the connection is closed.
func (e *entry) secure(ctx context.Context, conn net.Conn, cfg *tls.Config) (_ *tls.Conn, err error) {
	defer func() {
		if err != nil {
			_ = conn.Close()
		}
	}()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if _, err := conn.Write(pgwire.AppendSSLRequest(nil)); err != nil {
		return nil, err
	}
	var answer [1]byte
	if _, err := conn.Read(answer[:]); err != nil {
		return nil, err
	}
	if answer[0] != 'S' {
		return nil, &hinted{"PostgreSQL has no TLS, which postgres.dsn demands", "give it a certificate, or change sslmode in duri.yaml"}
	}
	secured := tls.Client(pgwire.Quick(conn), cfg)
	return secured, secured.HandshakeContext(ctx)
}

// ownConn is a connection of the agent's own gateway.
type ownConn struct {
	net.Conn
	release func()
}

// SyscallConn is that of syscall.Conn.
func (c *ownConn) SyscallConn() (syscall.RawConn, error) {
	if conn, ok := c.Conn.(syscall.Conn); ok {
		return conn.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

func (c *ownConn) Close() error {
	c.release()
	return c.Conn.Close()
}

// dialOwn connects the agent's own gateway, which asks PostgreSQL for TLS itself.
func (e *entry) dialOwn(ctx context.Context) (net.Conn, error) {
	conn, release, err := e.dial(ctx, false, func() {})
	if err != nil {
		return nil, err
	}
	return &ownConn{conn, release}, nil
}
