package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/internal/alive"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pki"
)

// door is the way of clients to this site's PostgreSQL: the keeper shuts it when they must stay out.
type door interface {
	Open()
	Shut(why string)
	Status() (shut string, now int, total int64)
}

// servedDoor is one with a listener.
type servedDoor interface {
	door
	Serve(ctx context.Context, l net.Listener) error
}

// openDoor listens for clients, if the agent is their way to PostgreSQL, and lets gateways in, if they may come. Without a
// register the door is open from the beginning.
func (a *Agent) openDoor() (net.Listener, error) {
	if a.door == nil { // else it serves already
		if err := a.newDoor(); err != nil {
			return nil, err
		}
	}
	ln, err := a.listenDoor()
	if err != nil {
		return nil, err
	}
	var d door
	switch {
	case a.door != nil && a.cfg.Gateway.Listen != "":
		d = a.door
	case a.host != nil:
		d = a.host.entry
	default:
		return nil, nil
	}
	if a.keeper == nil {
		d.Open()
	} else {
		a.keeper.door = d
	}
	if a.host != nil && a.host.former != nil {
		a.host.former.advance(begun)
	}
	return ln, nil
}

// listenDoor listens for clients; nil: nobody does, or somebody does already.
func (a *Agent) listenDoor() (net.Listener, error) {
	if a.cfg.Gateway.Listen == "" || a.onClients != nil {
		return nil, nil
	}
	ln, err := listenForClients(a.cfg.Gateway.Listen)
	if err != nil || a.host == nil {
		return ln, err
	}
	if a.onClients, err = gateway.NewListener(ln); err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return a.onClients, nil
}

func listenForClients(address string) (net.Listener, error) {
	if ln, err := inheritedListener(address); ln != nil || err != nil {
		return ln, err
	}
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return nil, &hinted{fmt.Sprintf("listen for clients: %v", err), "another process uses this port; change gateway.listen in duri.yaml, or end it"}
	}
	return ln, nil
}

// newDoor makes the way of clients, as gateway.mode says.
func (a *Agent) newDoor() (err error) {
	if a.cfg.Gateway.Mode == config.GatewayDoor {
		c, err := pg.Config(a.cfg.Postgres.DSN, a.nodes[0].database.Name, nil)
		if err != nil {
			return err
		}
		network, address := pgconn.NetworkAddress(c.Host, c.Port)
		servers := alive.New(silentServer)
		a.door = gateway.NewDoor(func(ctx context.Context) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, address)
			if err == nil {
				servers.Watch(conn) // until it is closed
			}
			return conn, err
		}, a.log)
		return nil
	}
	if a.host, err = newHost(a); err != nil || a.cfg.Gateway.Listen == "" {
		return err
	}
	if a.former != nil {
		a.host.former = newFormer(a.host, a.former)
	}
	s := newSites(a.cfg, a.self.Name, a.host, a.clients, a.log)
	g, err := newGateway(a.cfg, s, a.log, a.administer)
	if err != nil {
		return err
	}
	a.door, a.role = &served{g, s, a.host}, a.host.verifiers.config.User
	return nil
}

// newGateway makes the server for clients.
func newGateway(cfg *config.Config, s *sites, log *slog.Logger, more func(*gateway.Config)) (*gateway.Server, error) {
	c := cfg.Gateway
	g := gateway.Config{
		Router: s, Verifiers: s, Sites: s, Standby: Slot, Dial: s.dial, DialAs: s.dialAs, Watch: alive.New(silentClient).Watch, Log: log,
	}
	if c.Mode == config.GatewayTransaction {
		g.Mode = gateway.TransactionMode
		if c.RoutesReads() {
			g.Reads = s
		}
		if c.SlowDown.On() {
			g.Pace = s
		}
	}
	if s.own != nil {
		g.ServerTLS = s.own.entry.tls
	}
	if c.Cert != "" {
		cert, err := tls.LoadX509KeyPair(c.Cert, c.Key)
		if err != nil {
			return nil, &hinted{fmt.Sprintf("certificate for clients: %v", err), "check gateway.cert and gateway.key in duri.yaml"}
		}
		g.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	}
	if c.ClientCA != "" {
		var err error
		if g.ClientCAs, err = pki.Authorities(c.ClientCA); err != nil {
			return nil, fmt.Errorf("gateway.client_ca: %w", err)
		}
	}
	role := ""
	if s.own != nil {
		role = s.own.verifiers.config.User
	}
	setLimits(&g, cfg, role)
	if more != nil {
		more(&g)
	}
	server, err := gateway.NewServer(g)
	if err == nil {
		s.retire, s.leave, s.stay = server.Retire, server.AskToLeave, server.Staying
	}
	return server, err
}

// served is the agent's own gateway. It takes clients as long as some site serves them; what is opened and shut is the way to this
// site's server.
type served struct {
	*gateway.Server
	sites *sites
	host  *host
}

func (s *served) Open()           { s.host.entry.Open() }
func (s *served) Shut(why string) { s.host.entry.Shut(why) }

// Status tells of this site's server whether it is open, and of the gateway how many clients there are.
func (s *served) Status() (shut string, now int, total int64) {
	_, now, total = s.Server.Status()
	return s.host.entry.reason(), now, total
}

func (s *served) Serve(ctx context.Context, l net.Listener) error {
	return serveGateway(ctx, s.Server, s.sites, l, func() {})
}

// serveGateway takes clients until ctx ends. ready is called when it begins to.
func serveGateway(ctx context.Context, g *gateway.Server, s *sites, l net.Listener, ready func()) error {
	watching, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { s.run(watching) })
	defer wg.Wait()
	defer stop()
	s.awaitFirst(ctx)
	g.Open()
	ready()
	return g.Serve(ctx, l)
}
