// Package pair runs two or more sites on this machine for benchmarks, proofs and end-to-end tests: a PostgreSQL cluster
// and an agent each, the agents as separate processes of the real binary, so that any can be killed at any moment.
// Everything is on loopback, in one directory, and gone after Close.
package pair

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/faultnet"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/server"
	"github.com/duri-io/duri/wal"
)

// Options of a Pair.
type Options struct {
	Binary   string // the duri program; see Build
	BinDir   string // PostgreSQL's programs; empty: found
	Database string // replicated database; default app
	// Sync makes a register with a witness, and lets clients in through the agents' doors. Commits wait for the other site
	// once HoldCommits was called. Rearm is durability.rearm.
	Sync bool
	// NoWitness makes voters of the first three sites in place of a witness.
	NoWitness bool
	Rearm     time.Duration
	// Gateway lets the agents be gateways (gateway.mode transaction), and makes the files of one that runs alone: see
	// Pair.Gateway and AddClient.
	Gateway bool
	// More are further databases; nothing of them is seeded.
	More     []string
	Names    []string // of the sites, two or more; default a, b
	Settings map[string]string
	// Clusters are running ones of the caller's, one a site, which Close leaves alone; nil: they are made, with Settings.
	// Some may be nil: such a site has a configuration only, and its agent is not started.
	Clusters []*pgcluster.Cluster
	// Relays puts a relay between each agent and each that connects to it; see Site.Relay and Pair.Link.
	Relays bool
	// DiskBytes gives each agent's data a file system of its own of that size, see Site.Disk; 0: it has none.
	DiskBytes int64
	// Held makes everything but does not start the agents; see StartAgents.
	Held bool
	// Seed fills the first site's database before it joins; nil: it stays empty.
	Seed func(ctx context.Context, a *Site) error
	// Config changes a site's configuration file before its agent first starts; nil: as it is.
	Config func(site, text string) string
}

// Pair is the sites.
type Pair struct {
	Witness  *Witness // with Options.Sync, unless there is to be none
	Gateway  *Gateway // with Options.Gateway; not started
	Sites    []*Site  // in the order of Options.Names; the first is the seed
	Database string
	dir      string
	opts     Options
	gateways []*Gateway     // of GatewayAt
	held     []net.Listener // see freeAddress
}

// Site is one of them.
type Site struct {
	Name       string
	Database   string
	Cluster    *pgcluster.Cluster
	ConfigFile string
	DataDir    string // of the agent
	Disk       *Disk  // it lies on, with Options.DiskBytes
	Control    *server.Control
	Relay      Relays // what the other sites connect through; nil without Options.Relays
	// Door is the address at which clients come in through the agent, with Options.Sync or Options.Gateway.
	Door   string
	binary string
	agent  *process
	former []*process // agents that were taken over, or were to be
}

// Build compiles the duri command into dir and returns its path. It must be called within the module.
func Build(ctx context.Context, dir string) (string, error) {
	out := filepath.Join(dir, "duri")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "github.com/duri-io/duri/cmd/duri")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build duri: %w: %s", err, b)
	}
	return out, nil
}

// Start makes the clusters, enrols the databases with the one-time SQL and starts the agents. After an error nothing is
// left.
func Start(ctx context.Context, o Options) (_ *Pair, err error) {
	if o.Database == "" {
		o.Database = "app"
	}
	if len(o.Names) == 0 {
		o.Names = []string{"a", "b"}
	}
	if len(o.Names) < 2 || o.Clusters != nil && len(o.Clusters) != len(o.Names) {
		return nil, fmt.Errorf("start sites: %d names and %d clusters; two or more of each belong together", len(o.Names), len(o.Clusters))
	}
	dir, err := os.MkdirTemp("", "duri-pair-")
	if err != nil {
		return nil, err
	}
	p := &Pair{Database: o.Database, dir: dir, opts: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	if err := os.Chmod(dir, 0o755); err != nil { // the server's user must pass through
		return nil, err
	}
	for i := range o.Names {
		if err := p.addSite(ctx, i); err != nil {
			return nil, err
		}
	}
	if o.Seed != nil {
		if err := o.Seed(ctx, p.Sites[0]); err != nil {
			return nil, fmt.Errorf("seed site %s: %w", p.Sites[0].Name, err)
		}
	}
	if err := p.configure(); err != nil {
		return nil, err
	}
	if err := p.grant(ctx); err != nil {
		return nil, err
	}
	if o.Held {
		return p, nil
	}
	return p, p.StartAgents()
}

// grant prepares the run-time role at each site.
func (p *Pair) grant(ctx context.Context) error {
	for _, s := range p.Sites {
		if s.Cluster == nil {
			continue
		}
		for _, db := range p.databases() {
			if err := s.Cluster.Exec(ctx, db, grants.SQL(grants.Spec{Gateway: p.opts.Gateway})); err != nil {
				return fmt.Errorf("grants at %s: %w", s.Name, err)
			}
		}
	}
	return nil
}

// StartAgents starts the agent of each site.
func (p *Pair) StartAgents() error {
	if p.Witness != nil {
		if err := p.Witness.Start(); err != nil {
			return err
		}
	}
	for _, s := range p.Sites {
		if s.Cluster == nil {
			continue
		}
		if err := s.StartAgent(); err != nil {
			return err
		}
	}
	return nil
}

func (p *Pair) databases() []string { return append([]string{p.Database}, p.opts.More...) }

func (p *Pair) addSite(ctx context.Context, i int) error {
	s := &Site{Name: p.opts.Names[i], Database: p.Database, binary: p.opts.Binary, agent: &process{}}
	if p.opts.Clusters != nil {
		s.Cluster = p.opts.Clusters[i]
		p.Sites = append(p.Sites, s)
		if s.Cluster == nil {
			return nil
		}
		return p.createDatabases(ctx, s)
	}
	c, err := pgcluster.Create(ctx, pgcluster.Options{BinDir: p.opts.BinDir, Dir: filepath.Join(p.dir, s.Name), Settings: p.opts.Settings})
	if err != nil {
		return err
	}
	s.Cluster = c
	p.Sites = append(p.Sites, s)
	if err := c.Start(ctx); err != nil {
		return err
	}
	return p.createDatabases(ctx, s)
}

func (p *Pair) createDatabases(ctx context.Context, s *Site) error {
	for _, db := range p.databases() {
		if err := s.Cluster.Exec(ctx, "postgres", "CREATE DATABASE "+pg.QuoteIdent(db)); err != nil {
			return err
		}
	}
	return nil
}

// configure makes the cluster's files, as `duri init` does.
func (p *Pair) configure() (err error) {
	defer func() { err = errors.Join(err, p.release()) }()
	spec := config.InitSpec{Name: "pair", Out: filepath.Join(p.dir, "cluster")}
	for _, db := range p.databases() {
		spec.Databases = append(spec.Databases, config.Database{Name: db})
	}
	for _, s := range p.Sites {
		addr, err := p.freeAddress()
		if err != nil {
			return err
		}
		site := config.InitSite{Name: s.Name, Address: addr, Listen: addr}
		if s.Cluster != nil {
			site.DSN = fmt.Sprintf("host=127.0.0.1 port=%d user=duri", s.Cluster.Port())
			site.SetupDSN = fmt.Sprintf("host=127.0.0.1 port=%d user=%s", s.Cluster.Port(), s.Cluster.Superuser())
		}
		spec.Sites = append(spec.Sites, site)
	}
	if err := p.addRegister(&spec); err != nil {
		return err
	}
	if err := p.addDoors(&spec); err != nil {
		return err
	}
	if err := config.InitCluster(spec); err != nil {
		return err
	}
	for i, s := range p.Sites {
		dir := filepath.Join(spec.Out, s.Name)
		s.ConfigFile, s.DataDir = filepath.Join(dir, config.FileName), filepath.Join(dir, "data")
		s.agent.logFile, s.Control = filepath.Join(dir, "agent.log"), server.NewControl(s.DataDir)
		if err := p.relays(s, spec.Sites[i].Address); err != nil {
			return err
		}
		if p.opts.DiskBytes > 0 {
			var err error
			if s.Disk, err = newDisk(s.DataDir, p.opts.DiskBytes); err != nil {
				return err
			}
		}
	}
	for i, s := range p.Sites {
		if err := s.EditConfig(func(text string) string { return p.siteConfig(i, spec.Sites, text) }); err != nil {
			return err
		}
	}
	return p.addGateway(spec)
}

// relays starts the relays in front of a site's agent.
func (p *Pair) relays(s *Site, address string) error {
	if !p.opts.Relays {
		return nil
	}
	s.Relay = Relays{}
	for _, from := range p.Sites {
		if from == s {
			continue
		}
		r, err := faultnet.New(address)
		if err != nil {
			return err
		}
		s.Relay[from.Name] = r
	}
	return nil
}

// siteConfig is the i-th site's configuration with the addresses of its relays in place of the other agents' own.
func (p *Pair) siteConfig(i int, sites []config.InitSite, text string) string {
	name := p.Sites[i].Name
	for j, peer := range p.Sites {
		if r := peer.Relay[name]; r != nil {
			text = strings.ReplaceAll(text, strconv.Quote(sites[j].Address), strconv.Quote(r.Addr()))
		}
	}
	text = p.withGateway(p.withRearm(text))
	if p.opts.Config != nil {
		text = p.opts.Config(name, text)
	}
	return text
}

// EditConfig changes the site's configuration file; the agent reads it when it starts.
func (s *Site) EditConfig(edit func(text string) string) error { return editFile(s.ConfigFile, edit) }

func editFile(path string, edit func(text string) string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return os.WriteFile(path, []byte(edit(string(b))), 0o600)
}

// freeAddress is one that nobody else has, and that nothing here gets until release: the kernel gives a port again as soon as
// it is free.
func (p *Pair) freeAddress() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	p.held = append(p.held, ln)
	return ln.Addr().String(), nil
}

// release lets the agents have their addresses.
func (p *Pair) release() (err error) {
	for _, ln := range p.held {
		err = errors.Join(err, ln.Close())
	}
	p.held = nil
	return err
}

// StartAgent starts the site's agent; it dies with this process.
func (s *Site) StartAgent() error {
	if err := s.agent.start(s.binary, "agent", "-c", s.ConfigFile); err != nil {
		return fmt.Errorf("start agent %s: %w", s.Name, err)
	}
	return nil
}

// Agent is one of several processes of a site's agent. What makes one of them the site's is not for concurrent use.
type Agent struct {
	name    string
	process *process
}

// Agent is the process of the site's agent.
func (s *Site) Agent() *Agent { return &Agent{s.Name, s.agent} }

// TakeOverAgent starts a further agent, with --takeover, which is the site's agent from now on, and gives the former one, which ends
// by itself. It dies with this process.
func (s *Site) TakeOverAgent(more ...string) (former *Agent, err error) {
	former = s.Agent()
	s.former = append(s.former, s.agent)
	s.agent = &process{logFile: filepath.Join(filepath.Dir(s.ConfigFile), fmt.Sprintf("agent-%d.log", len(s.former)+1))}
	if err := s.agent.start(s.binary, append([]string{"agent", "-c", s.ConfigFile, "--takeover"}, more...)...); err != nil {
		return former, fmt.Errorf("start a further agent %s: %w", s.Name, err)
	}
	return former, nil
}

// RestartAgent starts the site's agent, which has ended, as a service manager does; but when that was to take over from a former one, which
// has not ended, then that is the agent.
func (s *Site) RestartAgent() error {
	for _, f := range s.former {
		if !f.ended() {
			s.Resume(&Agent{s.Name, f})
			return nil
		}
	}
	return s.StartAgent()
}

// Resume makes a process the site's agent again that TakeOverAgent has put another one in the place of.
func (s *Site) Resume(a *Agent) {
	s.former = append(slices.DeleteFunc(s.former, func(p *process) bool { return p == a.process }), s.agent)
	s.agent = a.process
}

// Signal sends it a signal; with SIGKILL or SIGTERM it waits until the process is gone.
func (a *Agent) Signal(sig syscall.Signal) error { return a.process.signal(sig) }

// End waits until it has ended and gives its exit code, -1 when a signal ended it.
func (a *Agent) End(ctx context.Context) (code int, err error) {
	return a.process.end(ctx, "agent "+a.name)
}

// Ended reports whether it has ended since it was started.
func (a *Agent) Ended() bool { return a.process.ended() }

// Log returns the end of its log.
func (a *Agent) Log() string { return a.process.log() }

// HoldDoor gives the agent, when it is started the next time, a socket for its clients, as a service manager does.
func (s *Site) HoldDoor(socket *os.File) { s.agent.socket = socket }

// SignalAgent sends a signal to the agent; with SIGKILL or SIGTERM it waits until the process is gone.
func (s *Site) SignalAgent(sig syscall.Signal) error { return s.agent.signal(sig) }

// AgentEnd waits until the agent has ended and gives its exit code, -1 when a signal ended it.
func (s *Site) AgentEnd(ctx context.Context) (code int, err error) {
	return s.agent.end(ctx, "agent "+s.Name)
}

// AgentEnded reports whether the agent has ended since it was started.
func (s *Site) AgentEnded() bool { return s.agent.ended() }

// AgentPID is the agent's process id, for measuring its CPU time.
func (s *Site) AgentPID() int { return s.agent.pid() }

// Log returns the end of the agent's log.
func (s *Site) Log() string { return s.agent.log() }

// Status is what the site's agent says of the (first) database.
func (s *Site) Status(ctx context.Context) (server.DatabaseStatus, error) {
	all, err := s.StatusAll(ctx)
	if err != nil {
		return server.DatabaseStatus{}, err
	}
	return all[0], nil
}

// StatusAll is what the site's agent says of its databases, in the order of the configuration.
func (s *Site) StatusAll(ctx context.Context) ([]server.DatabaseStatus, error) {
	st, err := s.Control.Status(ctx)
	if err != nil {
		return nil, err
	}
	for _, site := range st.Sites {
		if site.Site == s.Name && len(site.Databases) > 0 {
			return site.Databases, nil
		}
	}
	return nil, errors.New("the agent does not report its databases")
}

// Wait polls until ok says yes or ctx ends; then the error tells what was last seen.
func (p *Pair) Wait(ctx context.Context, what string, ok func(ctx context.Context) (bool, error)) error {
	var last error
	for {
		done, err := ok(ctx)
		if done {
			return nil
		}
		if err != nil && ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w (last: %w)%s", what, ctx.Err(), last, p.logs())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// logs are the ends of the agents' logs, for an error message.
func (p *Pair) logs() string {
	var b strings.Builder
	for _, s := range p.Sites {
		if s.Cluster != nil {
			for _, f := range s.former {
				fmt.Fprintf(&b, "\nformer agent %s: %s", s.Name, f.log())
			}
			fmt.Fprintf(&b, "\nagent %s: %s", s.Name, s.Log())
		}
	}
	if p.Gateway != nil {
		fmt.Fprintf(&b, "\ngateway: %s", p.Gateway.Log())
	}
	for _, g := range p.gateways {
		fmt.Fprintf(&b, "\ngateway %s: %s", g.Address, g.Log())
	}
	return b.String()
}

// WaitReady waits until every site streams from every other one, in all databases.
func (p *Pair) WaitReady(ctx context.Context) error {
	return p.Wait(ctx, "all sites stream", func(ctx context.Context) (bool, error) {
		for _, s := range p.Sites {
			all, err := s.StatusAll(ctx)
			if err != nil {
				return false, err
			}
			for _, d := range all {
				if !p.streams(d) {
					return false, fmt.Errorf("site %s: %+v", s.Name, d)
				}
			}
		}
		return true, nil
	})
}

// streams reports whether a database is joined and hears all other sites.
func (p *Pair) streams(d server.DatabaseStatus) bool {
	return d.State == "ready" && len(d.Links) == len(p.Sites)-1 && !slices.ContainsFunc(d.Links, func(l server.LinkStatus) bool {
		return l.Health != server.HealthOK || l.Received.End == 0
	})
}

// WaitApplied waits until each site has applied all that the others had committed when it was called.
func (p *Pair) WaitApplied(ctx context.Context) error {
	for i, db := range p.databases() {
		if err := p.waitApplied(ctx, i, db); err != nil {
			return err
		}
	}
	return nil
}

func (p *Pair) waitApplied(ctx context.Context, n int, database string) error {
	marks := map[string]wal.LSN{} // by site
	for _, s := range p.Sites {
		rows, err := s.Cluster.QueryText(ctx, database, "SELECT pg_logical_emit_message(true, 'duri.mark', '')")
		if err == nil {
			marks[s.Name], err = wal.ParseLSN(rows[0][0])
		}
		if err != nil {
			return err
		}
	}
	return p.Wait(ctx, "all sites have applied everything", func(ctx context.Context) (bool, error) {
		for _, s := range p.Sites {
			all, err := s.StatusAll(ctx)
			if err != nil {
				return false, err
			}
			if behind := lacks(all[n].Links, s.Name, marks); behind != "" {
				return false, fmt.Errorf("site %s has not applied %s of %s yet: %+v", s.Name, marks[behind], behind, all[n].Links)
			}
		}
		return true, nil
	})
}

// lacks names a site whose mark is not applied at the site that has the links; empty when there is none.
func lacks(links []server.LinkStatus, self string, marks map[string]wal.LSN) string {
	applied := map[string]wal.LSN{}
	for _, l := range links {
		applied[l.From] = l.Apply.Applied
	}
	for from, mark := range marks {
		if from != self && applied[from] < mark {
			return from
		}
	}
	return ""
}

// Close ends the agents and removes everything but the caller's own clusters.
func (p *Pair) Close() error {
	var errs []error
	if p.Witness != nil {
		errs = append(errs, p.Witness.Signal(syscall.SIGKILL))
	}
	errs = append(errs, p.Gateway.close())
	for _, g := range p.gateways {
		errs = append(errs, g.Signal(syscall.SIGKILL))
	}
	for _, s := range p.Sites {
		if s.Disk != nil {
			_ = s.Disk.Thaw() // it fails when nothing hangs; a process that hangs would not end
		}
		for _, f := range s.former {
			errs = append(errs, f.signal(syscall.SIGKILL))
		}
		errs = append(errs, s.SignalAgent(syscall.SIGKILL))
		errs = append(errs, s.Relay.close(), s.Disk.close())
		if p.opts.Clusters == nil {
			errs = append(errs, s.Cluster.Destroy())
		}
	}
	return errors.Join(append(errs, os.RemoveAll(p.dir))...)
}
