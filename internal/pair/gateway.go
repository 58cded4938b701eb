package pair

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/faultnet"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/server"
)

// Gateway is one that runs alone, a process of its own. Its home is the first site.
type Gateway struct {
	Address    string // at which clients connect
	ConfigFile string
	Relay      Relays // through which it connects to the sites' agents, with Options.Relays
	binary     string
	more       []string // arguments
	control    string   // its control socket; empty: that of its folder
	process    process
}

// Start starts it; it dies with this process.
func (g *Gateway) Start() error {
	if err := g.process.start(g.binary, append([]string{"gateway", "-c", g.ConfigFile}, g.more...)...); err != nil {
		return fmt.Errorf("start the gateway: %w", err)
	}
	return nil
}

// End waits until it has ended by itself, and gives its exit code.
func (g *Gateway) End(ctx context.Context) (code int, err error) {
	return g.process.end(ctx, "the gateway")
}

// Control is the way to its control socket.
func (g *Gateway) Control() *server.Control {
	if g.control != "" {
		return server.NewControlAt(g.control)
	}
	return server.NewControl(filepath.Join(filepath.Dir(g.ConfigFile), "data"))
}

// EditConfig changes its configuration file; it reads it when it starts.
func (g *Gateway) EditConfig(edit func(text string) string) error {
	return editFile(g.ConfigFile, edit)
}

// Signal sends it a signal; with SIGKILL or SIGTERM it waits until the process is gone.
func (g *Gateway) Signal(sig syscall.Signal) error { return g.process.signal(sig) }

// close ends it.
func (g *Gateway) close() error {
	if g == nil {
		return nil
	}
	return errors.Join(g.Signal(syscall.SIGKILL), g.Relay.close())
}

// Log returns the end of its log.
func (g *Gateway) Log() string { return g.process.log() }

// DSN is how a role of AddClient connects through it.
func (g *Gateway) DSN(database, role, password string) string {
	return fmt.Sprintf("postgres://%s:%s@%s/%s?sslmode=disable", role, password, g.Address, database)
}

// GatewayAt makes a further one, of the same file, whose home is another site. It is not started, and ends with the pair. Not for
// concurrent use.
func (p *Pair) GatewayAt(home string) (*Gateway, error) {
	address, err := p.freeAddress()
	if err != nil {
		return nil, err
	}
	control := filepath.Join(filepath.Dir(p.Gateway.ConfigFile), home+".sock")
	more := []string{"--home", home, "--listen", address, "--control", control}
	g := &Gateway{Address: address, ConfigFile: p.Gateway.ConfigFile, Relay: p.Gateway.Relay, binary: p.opts.Binary, more: more, control: control}
	g.process.logFile = filepath.Join(filepath.Dir(g.ConfigFile), "gateway-"+home+".log")
	p.gateways = append(p.gateways, g)
	return g, p.release()
}

// GatewayBeside makes one beside a site's agent, of the site's own file. It is not started, and ends with the pair. Not for concurrent
// use.
func (p *Pair) GatewayBeside(s *Site) (*Gateway, error) {
	address, err := p.freeAddress()
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(s.ConfigFile)
	g := &Gateway{
		Address: address, ConfigFile: s.ConfigFile, Relay: Relays{}, binary: p.opts.Binary, more: []string{"--listen", address},
		control: filepath.Join(dir, "data", "gateway.sock"),
	}
	g.process.logFile = filepath.Join(dir, "gateway.log")
	p.gateways = append(p.gateways, g)
	return g, p.release()
}

// Successor makes a further process for a gateway, which takes it over when it is started. It ends with the pair. Not for concurrent
// use.
func (p *Pair) Successor(g *Gateway, more ...string) *Gateway {
	next := &Gateway{Address: g.Address, ConfigFile: g.ConfigFile, Relay: g.Relay, binary: g.binary, more: append(slices.Clone(g.more), more...), control: g.control}
	if !slices.Contains(next.more, "--takeover") {
		next.more = append(next.more, "--takeover")
	}
	next.process.logFile = filepath.Join(filepath.Dir(g.ConfigFile), fmt.Sprintf("gateway-%d.log", len(p.gateways)+2))
	p.gateways = append(p.gateways, next)
	return next
}

// addDoors asks for doors at the sites.
func (p *Pair) addDoors(spec *config.InitSpec) error {
	if !p.opts.Sync && !p.opts.Gateway {
		return nil
	}
	for i, s := range p.Sites {
		var err error
		if s.Door, err = p.freeAddress(); err != nil {
			return err
		}
		spec.Sites[i].Clients = s.Door
	}
	if !p.opts.Gateway {
		return nil
	}
	address, err := p.freeAddress()
	p.Gateway = &Gateway{Address: address, Relay: Relays{}, binary: p.opts.Binary}
	return err
}

// withGateway sets gateway.mode.
func (p *Pair) withGateway(text string) string {
	if !p.opts.Gateway {
		return text
	}
	return strings.Replace(text, "\ngateway:\n", "\ngateway:\n  mode: transaction\n", 1)
}

// addGateway makes the files of the gateway that runs alone.
func (p *Pair) addGateway(spec config.InitSpec) error {
	if p.Gateway == nil {
		return nil
	}
	c, err := config.Load(p.Sites[0].ConfigFile)
	if err != nil {
		return err
	}
	c.Sites = slices.Clone(c.Sites)
	for i := range c.Sites {
		c.Sites[i].Address = spec.Sites[i].Address
		if !p.opts.Relays {
			continue
		}
		r, err := faultnet.New(spec.Sites[i].Address)
		if err != nil {
			return err
		}
		p.Gateway.Relay[c.Sites[i].Name] = r
		c.Sites[i].Address = r.Addr()
	}
	dir := filepath.Join(spec.Out, "gw")
	p.Gateway.ConfigFile, p.Gateway.process.logFile = filepath.Join(dir, config.FileName), filepath.Join(dir, "gateway.log")
	return config.AddGateway(c, config.GatewaySpec{
		Name: "gw", Home: p.Sites[0].Name, Listen: p.Gateway.Address, CA: filepath.Join(spec.Out, "ca"), Out: dir,
	})
}

// AddClient makes a role at all sites that logs in with a password and may do everything in the databases. Its verifier is the same
// everywhere, as gateways need it.
func (p *Pair) AddClient(ctx context.Context, role, password string) error {
	create := "CREATE ROLE " + pg.QuoteIdent(role) + " LOGIN PASSWORD "
	verifier := password
	for _, s := range p.Sites {
		for _, sql := range []string{create + pg.QuoteLiteral(verifier), "GRANT pg_read_all_data, pg_write_all_data TO " + pg.QuoteIdent(role)} {
			if err := s.Cluster.Exec(ctx, p.Database, sql); err != nil {
				return fmt.Errorf("make role %s at %s: %w", role, s.Name, err)
			}
		}
		rows, err := s.Cluster.QueryText(ctx, p.Database, "SELECT rolpassword FROM pg_authid WHERE rolname = "+pg.QuoteLiteral(role))
		if err != nil {
			return err
		}
		verifier = rows[0][0]
	}
	return nil
}
