package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/link"
)

// Gateway is one that runs alone, beside an application: it reaches each site through that one's agent, and needs no PostgreSQL of
// its own. There may be any number.
type Gateway struct {
	cfg     *config.Config
	log     *slog.Logger
	clients map[string]*link.Client
	sites   *sites
	server  *gateway.Server
	version string

	reloading reloading
}

// NewGateway composes it, from the file of a gateway or of a site, whose certificate it has then. home replaces the file's site;
// empty: it does not. version is the program's.
func NewGateway(cfg *config.Config, home, version string, log *slog.Logger) (*Gateway, error) {
	if cfg.Gateway.Mode == config.GatewayDoor || cfg.Gateway.Listen == "" {
		return nil, &hinted{"a gateway needs gateway.listen, and gateway.mode session or transaction", "write them into " + cfg.Path()}
	}
	if home == "" {
		home = cfg.Site
	} else if _, ok := cfg.SiteByName(home); !ok {
		return nil, &hinted{fmt.Sprintf("there is no site %q", home), "name one of the sites in " + cfg.Path()}
	}
	files := pki.Files(cfg.TLS)
	client, err := pki.GatewayTLS(files, cfg.Cluster.ID, cfg.Gateway.Name)
	if !cfg.Alone() {
		_, client, err = pki.TLS(files, cfg.Cluster.ID, cfg.Site)
	}
	if err != nil {
		return nil, err
	}
	g := &Gateway{cfg: cfg, log: log, version: version, clients: map[string]*link.Client{}}
	for _, s := range cfg.Sites {
		g.clients[s.Name], err = link.NewClient(link.ClientConfig{
			Address: s.Address, Peer: s.Name, TLS: client, ClusterID: cfg.Cluster.ID, Site: cfg.Name(), Now: now, Logger: log.With("peer", s.Name),
		})
		if err != nil {
			return nil, errors.Join(err, g.close())
		}
	}
	g.sites = newSites(cfg, home, nil, g.clients, log)
	if g.server, err = newGateway(cfg, g.sites, log, func(c *gateway.Config) { c.Version, c.Reload = version, g.Reload }); err != nil {
		return nil, errors.Join(err, g.close())
	}
	return g, nil
}

func (g *Gateway) close() error {
	var errs []error
	for _, c := range g.clients {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// Run takes clients until ctx ends, or another process has taken the gateway over. It may be called once.
func (g *Gateway) Run(ctx context.Context, run GatewayRun) error {
	s, t, err := g.open(ctx, run)
	if err != nil {
		return errors.Join(err, g.close())
	}
	running, end := context.WithCancel(ctx)
	defer end()
	var broken error // why it cannot take over
	var handedOn atomic.Bool
	taken := func() {
		handedOn.Store(true)
		end()
	}
	var wg sync.WaitGroup
	ready := func() {}
	if t != nil {
		t.Prepare(g.server)
		ready = func() {
			wg.Go(func() {
				if broken = t.Run(running, g.server); broken != nil {
					end()
				}
			})
		}
	}
	g.log.Info("gateway starts", "name", g.cfg.Gateway.Name, "listen", s.clients.Addr().String(), "home", g.sites.home, "control", s.path, "takeover", t != nil)
	var cerr error
	wg.Go(func() {
		if cerr = g.serveControl(running, s, taken); cerr != nil {
			end()
		}
	})
	err = serveGateway(running, g.server, g.sites, s.clients, ready)
	end()
	wg.Wait()
	err = errors.Join(err, cerr, broken, s.close(), g.close())
	if !handedOn.Load() && (t == nil || t.Alone()) { // else it is another process's
		_ = os.Remove(s.path)
	}
	g.log.Info("gateway ended", "handed_on", handedOn.Load())
	return err
}
