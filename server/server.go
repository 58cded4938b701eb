// Package server composes a site's agent from configuration: for each database capture, journal, links and apply; the
// listener for other agents; the control socket for the command line. It is the one place that knows every package;
// `duri agent`, `duri demo` and the end-to-end tests all go through it. It holds no rules of its own.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/verify"
	"github.com/duri-io/duri/wal"
)

// Agent is a site's agent, composed but not running.
type Agent struct {
	cfg     *config.Config
	self    config.Site
	log     *slog.Logger
	nodes   []*node
	watches map[*node][]*verify.Watch // comparisons in the background that this site drives
	clients map[string]*link.Client
	serverT *tls.Config
	clientT *tls.Config
	started time.Time
	version string
	hooks   Hooks
	keeper  *keeper    // nil without a register
	door    servedDoor // nil: clients do not come through the agent
	host    *host      // nil: gateways elsewhere do not come through it
	role    string     // the agent's, at its server

	onClients *gateway.Listener // on which the agent's gateway serves, so that both can be taken over; nil: they cannot
	finish    func()            // ends the agent for one that takes it over
	former    *link.Client      // the agent that this one takes over; nil: there is none

	reloading reloading
}

// Hooks let tests reach in. The zero value changes nothing.
type Hooks struct {
	// Clock is added to the server's clock as the agent reads it. With it, transactions under apply.ClockOriginName count
	// as this site's own.
	Clock func() time.Duration
}

// New composes the agent. It reads the certificates and touches nothing else.
func New(cfg *config.Config, version string, log *slog.Logger) (*Agent, error) {
	return NewHooked(cfg, version, log, Hooks{})
}

// NewHooked is New for tests.
func NewHooked(cfg *config.Config, version string, log *slog.Logger, hooks Hooks) (*Agent, error) {
	server, client, err := pki.TLS(pki.Files{CA: cfg.TLS.CA, Cert: cfg.TLS.Cert, Key: cfg.TLS.Key}, cfg.Cluster.ID, cfg.Site)
	if err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, self: cfg.Self(), log: log, clients: map[string]*link.Client{}, watches: map[*node][]*verify.Watch{}, serverT: server, clientT: client, version: version, hooks: hooks}
	for _, s := range cfg.Peers() {
		c, err := link.NewClient(link.ClientConfig{
			Address: s.Address, Peer: s.Name, TLS: client, ClusterID: cfg.Cluster.ID, Site: cfg.Site,
			Now: now, Epoch: func() uint64 { return a.keeper.epoch() }, Statement: a.statement, Logger: log.With("peer", s.Name),
		})
		if err != nil {
			return nil, err
		}
		a.clients[s.Name] = c
	}
	for _, d := range cfg.Databases {
		n := a.newNode(d)
		a.nodes, a.watches[n] = append(a.nodes, n), newWatches(n)
	}
	return a, nil
}

func now() wal.Time { return wal.TimeOf(time.Now()) }

func (a *Agent) newNode(d config.Database) *node {
	n := &node{
		outcomes: apply.NewOutcomes(),
		cfg:      a.cfg, database: d, self: a.self, log: a.log, clock: &serverClock{}, hooks: a.hooks, state: stateStarting, told: map[string]bool{},
		turned: make(chan struct{}, 1),
	}
	n.newSessions()
	n.db = newDB(n)
	n.checker = newChecker(n)
	for _, s := range a.cfg.Peers() {
		log := a.log.With("database", d.Name, "peer", s.Name)
		n.peers = append(n.peers, &peer{
			n: n, site: s, client: a.clients[s.Name], log: log,
		})
	}
	return n
}

// Run works until ctx ends, or another process has taken the agent over. Nothing half-started remains when it returns. It may be called
// once.
func (a *Agent) Run(ctx context.Context) error {
	ctx, a.finish = context.WithCancel(ctx)
	defer a.finish()
	return a.run(ctx)
}

// run is Run, also when clients are served already.
func (a *Agent) run(ctx context.Context) error {
	a.started = time.Now()
	if err := os.MkdirAll(a.cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("create data_dir: %w", err)
	}
	ln, err := net.Listen("tcp", a.cfg.Listen)
	if err != nil {
		return &hinted{fmt.Sprintf("listen for other agents: %v", err), "another process uses this port; change listen in duri.yaml, or end it"}
	}
	control, err := a.listenControl()
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	closeRegister, err := a.openRegister(ctx)
	if err != nil {
		return errors.Join(err, ln.Close(), control.Close())
	}
	doorListener, err := a.openDoor()
	if err != nil {
		return errors.Join(err, ln.Close(), control.Close(), closeRegister())
	}
	a.log.Info("agent starts", "site", a.self.Name, "listen", ln.Addr().String(), "version", a.version, "pid", os.Getpid())
	g, ctx := errgroup.WithContext(ctx)
	offered := link.ServerConfig{
		TLS: a.serverT, ClusterID: a.cfg.Cluster.ID, Site: a.self.Name, Databases: a.offer,
		Status: a.statusJSON, Facts: a.factsJSON, Unfit: a.keeper.unfitness, Now: now, Logger: a.log,
	}
	if a.host != nil {
		offered.Gateways, offered.Drain = a.host, a.host.drain
		g.Go(func() error { return a.host.run(ctx) })
	}
	srv := link.NewServer(offered)
	g.Go(func() error { return srv.Serve(ctx, ln) })
	g.Go(func() error { return a.serveControl(ctx, control) })
	if doorListener != nil {
		g.Go(func() error { return a.door.Serve(ctx, doorListener) })
	}
	if a.keeper != nil {
		g.Go(func() error { return a.keeper.run(ctx) })
	}
	for _, n := range a.nodes {
		g.Go(func() error { return n.Run(ctx) })
		g.Go(func() error { return a.watch(ctx, n) })
	}
	if err = g.Wait(); errors.Is(err, context.Canceled) {
		err = nil
	}
	err = errors.Join(err, a.closeClients(), closeRegister())
	a.log.Info("agent ended", "site", a.self.Name)
	return err
}

func (a *Agent) closeClients() (err error) {
	for _, c := range a.clients {
		err = errors.Join(err, c.Close())
	}
	return err
}

func (a *Agent) node(database string) (*node, bool) {
	for _, n := range a.nodes {
		if n.database.Name == database {
			return n, true
		}
	}
	return nil, false
}

func (a *Agent) offer(database string) (link.Database, bool) {
	n, ok := a.node(database)
	if !ok {
		return nil, false
	}
	return offered{n}, true
}

// statement is what this site says of itself to the others for a database; nil: nothing yet.
func (a *Agent) statement(database string) *link.Statement {
	if n, ok := a.node(database); ok {
		return n.statement.Load()
	}
	return nil
}

// hintOf finds the advice in an error's chain.
func hintOf(err error) string {
	var h interface{ HintText() string }
	var damage *journal.CorruptionError
	switch {
	case errors.As(err, &h):
		return h.HintText()
	case errors.As(err, &damage):
		return damage.Hint
	}
	return pgHint(err)
}
