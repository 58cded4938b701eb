// Package pair runs two sites on this machine for benchmarks, proofs and end-to-end tests: two PostgreSQL clusters and
// two agents as separate processes of the real binary, so that either can be killed at any moment. Everything is on
// loopback, in one directory, and gone after Close.
package pair

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
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
	// More are further databases; nothing of them is seeded.
	More     []string
	Names    [2]string // of the sites; default a, b
	Settings map[string]string
	// Clusters are running ones of the caller's, which Close leaves alone; nil: two are made, with Settings. One of them
	// may be nil: that site has a configuration only, and its agent is not started.
	Clusters []*pgcluster.Cluster
	// Relays puts a relay in front of each agent: Site.Relay is what the other site connects through.
	Relays bool
	// Held makes everything but does not start the agents; see StartAgents.
	Held bool
	// Seed fills site A's database before it joins; nil: it stays empty.
	Seed func(ctx context.Context, a *Site) error
	// Config changes a site's configuration file before its agent first starts; nil: as it is.
	Config func(site, text string) string
}

// Pair is two sites.
type Pair struct {
	Sites    []*Site // A, B
	Database string
	dir      string
	opts     Options
}

// Site is one of them.
type Site struct {
	Name       string
	Database   string
	Cluster    *pgcluster.Cluster
	ConfigFile string
	DataDir    string // of the agent
	Control    *server.Control
	Relay      *faultnet.Relay // nil without Options.Relays
	binary     string
	logFile    string

	mu    sync.Mutex // guards agent
	agent *exec.Cmd
	done  chan struct{}
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

// Start makes both clusters, enrols the databases with the one-time SQL and starts both agents. After an error nothing
// is left.
func Start(ctx context.Context, o Options) (_ *Pair, err error) {
	if o.Database == "" {
		o.Database = "app"
	}
	if o.Names == ([2]string{}) {
		o.Names = [2]string{"a", "b"}
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
			return nil, fmt.Errorf("seed site a: %w", err)
		}
	}
	if err := p.configure(); err != nil {
		return nil, err
	}
	for _, s := range p.Sites {
		if s.Cluster == nil {
			continue
		}
		for _, db := range p.databases() {
			if err := s.Cluster.Exec(ctx, db, grants.SQL(grants.Spec{})); err != nil {
				return nil, fmt.Errorf("grants at %s: %w", s.Name, err)
			}
		}
	}
	if o.Held {
		return p, nil
	}
	return p, p.StartAgents()
}

// StartAgents starts both agents.
func (p *Pair) StartAgents() error {
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
	s := &Site{Name: p.opts.Names[i], Database: p.Database, binary: p.opts.Binary}
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
func (p *Pair) configure() error {
	spec := config.InitSpec{Name: "pair", Out: filepath.Join(p.dir, "cluster")}
	for _, db := range p.databases() {
		spec.Databases = append(spec.Databases, config.Database{Name: db})
	}
	for _, s := range p.Sites {
		addr, err := freeAddress()
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
	if err := config.InitCluster(spec); err != nil {
		return err
	}
	if p.opts.Relays {
		for i, s := range p.Sites {
			var err error
			if s.Relay, err = faultnet.New(spec.Sites[i].Address); err != nil {
				return err
			}
		}
	}
	for i, s := range p.Sites {
		dir := filepath.Join(spec.Out, s.Name)
		s.ConfigFile, s.DataDir = filepath.Join(dir, config.FileName), filepath.Join(dir, "data")
		s.logFile, s.Control = filepath.Join(dir, "agent.log"), server.NewControl(s.DataDir)
		err := s.EditConfig(func(text string) string {
			if peer := p.Sites[1-i]; peer.Relay != nil {
				text = strings.ReplaceAll(text, spec.Sites[1-i].Address, peer.Relay.Addr())
			}
			if p.opts.Config != nil {
				text = p.opts.Config(s.Name, text)
			}
			return text
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// EditConfig changes the site's configuration file; the agent reads it when it starts.
func (s *Site) EditConfig(edit func(text string) string) error {
	b, err := os.ReadFile(s.ConfigFile)
	if err != nil {
		return err
	}
	return os.WriteFile(s.ConfigFile, []byte(edit(string(b))), 0o600)
}

func freeAddress() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return ln.Addr().String(), ln.Close()
}

// StartAgent starts the site's agent; it dies with this process.
func (s *Site) StartAgent() error {
	log, err := os.OpenFile(s.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(s.binary, "agent", "-c", s.ConfigFile)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	done := make(chan struct{})
	go func() {
		runtime.LockOSThread() // Pdeathsig follows the thread that forked
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in its log
		}
		close(done)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start agent %s: %w", s.Name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.agent, s.done = cmd, done
	return nil
}

// SignalAgent sends a signal to the agent; with SIGKILL or SIGTERM it waits until the process is gone.
func (s *Site) SignalAgent(sig syscall.Signal) error {
	s.mu.Lock()
	cmd, done := s.agent, s.done
	s.mu.Unlock()
	if cmd == nil {
		return nil
	}
	err := cmd.Process.Signal(sig)
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	if sig == syscall.SIGKILL || sig == syscall.SIGTERM {
		<-done
	}
	return err
}

// AgentEnd waits until the agent has ended and gives its exit code, -1 when a signal ended it.
func (s *Site) AgentEnd(ctx context.Context) (code int, err error) {
	s.mu.Lock()
	cmd, done := s.agent, s.done
	s.mu.Unlock()
	if cmd == nil {
		return 0, errors.New("the agent was not started")
	}
	select {
	case <-done:
		return cmd.ProcessState.ExitCode(), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for the end of agent %s: %w", s.Name, ctx.Err())
	}
}

// AgentPID is the agent's process id, for measuring its CPU time.
func (s *Site) AgentPID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.agent.Process.Pid
}

// Log returns the end of the agent's log.
func (s *Site) Log() string {
	b, err := os.ReadFile(s.logFile)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-30):], "\n")
}

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
			return fmt.Errorf("wait until %s: %w (last: %w)\nagent a: %s\nagent b: %s", what, ctx.Err(), last, p.Sites[0].Log(), p.Sites[1].Log())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// WaitReady waits until both sites stream both ways in all databases.
func (p *Pair) WaitReady(ctx context.Context) error {
	return p.Wait(ctx, "both sites stream", func(ctx context.Context) (bool, error) {
		for _, s := range p.Sites {
			all, err := s.StatusAll(ctx)
			if err != nil {
				return false, err
			}
			for _, d := range all {
				if d.State != "ready" || len(d.Links) != 1 || d.Links[0].Health != server.HealthOK || d.Links[0].Received.End == 0 {
					return false, fmt.Errorf("site %s: %+v", s.Name, d)
				}
			}
		}
		return true, nil
	})
}

// WaitApplied waits until each site has applied all that the other had committed when it was called.
func (p *Pair) WaitApplied(ctx context.Context) error {
	for i, db := range p.databases() {
		if err := p.waitApplied(ctx, i, db); err != nil {
			return err
		}
	}
	return nil
}

func (p *Pair) waitApplied(ctx context.Context, n int, database string) error {
	marks := make([]wal.LSN, len(p.Sites))
	for i, s := range p.Sites {
		rows, err := s.Cluster.QueryText(ctx, database, "SELECT pg_logical_emit_message(true, 'duri.mark', '')")
		if err == nil {
			marks[i], err = wal.ParseLSN(rows[0][0])
		}
		if err != nil {
			return err
		}
	}
	return p.Wait(ctx, "both sites have applied everything", func(ctx context.Context) (bool, error) {
		for i, mark := range marks {
			all, err := p.Sites[1-i].StatusAll(ctx)
			if err != nil {
				return false, err
			}
			if d := all[n]; len(d.Links) != 1 || d.Links[0].Apply.Applied < mark {
				return false, fmt.Errorf("site %s has not applied %s yet: %+v", p.Sites[1-i].Name, mark, d.Links)
			}
		}
		return true, nil
	})
}

// Close ends both agents and removes everything but the caller's own clusters.
func (p *Pair) Close() error {
	var errs []error
	for _, s := range p.Sites {
		errs = append(errs, s.SignalAgent(syscall.SIGKILL))
		if s.Relay != nil {
			errs = append(errs, s.Relay.Close())
		}
		if p.opts.Clusters == nil {
			errs = append(errs, s.Cluster.Destroy())
		}
	}
	return errors.Join(append(errs, os.RemoveAll(p.dir))...)
}
