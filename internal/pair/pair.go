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
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/server"
	"github.com/duri-io/duri/wal"
)

// Options of a Pair.
type Options struct {
	Binary   string // the duri program; see Build
	BinDir   string // PostgreSQL's programs; empty: found
	Database string // replicated database; default app
	Settings map[string]string
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
	Control    *server.Control
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
	for _, name := range []string{"a", "b"} {
		if err := p.addSite(ctx, name); err != nil {
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
		if err := s.Cluster.Exec(ctx, p.Database, grants.SQL(grants.Spec{})); err != nil {
			return nil, fmt.Errorf("grants at %s: %w", s.Name, err)
		}
		if err := s.StartAgent(); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *Pair) addSite(ctx context.Context, name string) error {
	c, err := pgcluster.Create(ctx, pgcluster.Options{BinDir: p.opts.BinDir, Dir: filepath.Join(p.dir, name), Settings: p.opts.Settings})
	if err != nil {
		return err
	}
	s := &Site{Name: name, Database: p.Database, Cluster: c, binary: p.opts.Binary}
	p.Sites = append(p.Sites, s)
	if err := c.Start(ctx); err != nil {
		return err
	}
	return c.Exec(ctx, "postgres", "CREATE DATABASE "+p.Database)
}

// configure makes the cluster's files, as `duri init` does.
func (p *Pair) configure() error {
	spec := config.InitSpec{Name: "pair", Databases: []config.Database{{Name: p.Database}}, Out: filepath.Join(p.dir, "cluster")}
	for _, s := range p.Sites {
		addr, err := freeAddress()
		if err != nil {
			return err
		}
		spec.Sites = append(spec.Sites, config.InitSite{
			Name: s.Name, Address: addr, Listen: addr,
			DSN:      fmt.Sprintf("host=127.0.0.1 port=%d user=duri", s.Cluster.Port()),
			SetupDSN: fmt.Sprintf("host=127.0.0.1 port=%d user=%s", s.Cluster.Port(), s.Cluster.Superuser()),
		})
	}
	if err := config.InitCluster(spec); err != nil {
		return err
	}
	for _, s := range p.Sites {
		dir := filepath.Join(spec.Out, s.Name)
		s.ConfigFile = filepath.Join(dir, config.FileName)
		s.logFile = filepath.Join(dir, "agent.log")
		s.Control = server.NewControl(filepath.Join(dir, "data"))
		if p.opts.Config == nil {
			continue
		}
		b, err := os.ReadFile(s.ConfigFile)
		if err != nil {
			return err
		}
		if err := os.WriteFile(s.ConfigFile, []byte(p.opts.Config(s.Name, string(b))), 0o600); err != nil {
			return err
		}
	}
	return nil
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

// Status is what the site's agent says of itself.
func (s *Site) Status(ctx context.Context) (server.DatabaseStatus, error) {
	st, err := s.Control.Status(ctx)
	if err != nil {
		return server.DatabaseStatus{}, err
	}
	for _, site := range st.Sites {
		if site.Site == s.Name && len(site.Databases) > 0 {
			return site.Databases[0], nil
		}
	}
	return server.DatabaseStatus{}, errors.New("the agent does not report its database")
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
			return fmt.Errorf("wait until %s: %w (last: %v)\nagent a: %s\nagent b: %s", what, ctx.Err(), last, p.Sites[0].Log(), p.Sites[1].Log())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// WaitReady waits until both sites stream both ways.
func (p *Pair) WaitReady(ctx context.Context) error {
	return p.Wait(ctx, "both sites stream", func(ctx context.Context) (bool, error) {
		for _, s := range p.Sites {
			d, err := s.Status(ctx)
			if err != nil {
				return false, err
			}
			if d.State != "ready" || len(d.Links) != 1 || d.Links[0].Health != server.HealthOK || d.Links[0].Received.End == 0 {
				return false, fmt.Errorf("site %s: %+v", s.Name, d)
			}
		}
		return true, nil
	})
}

// WaitApplied waits until each site has applied all that the other had committed when it was called.
func (p *Pair) WaitApplied(ctx context.Context) error {
	marks := make([]wal.LSN, len(p.Sites))
	for i, s := range p.Sites {
		rows, err := s.Cluster.QueryText(ctx, p.Database, "SELECT pg_logical_emit_message(true, 'duri.mark', '')")
		if err == nil {
			marks[i], err = wal.ParseLSN(rows[0][0])
		}
		if err != nil {
			return err
		}
	}
	return p.Wait(ctx, "both sites have applied everything", func(ctx context.Context) (bool, error) {
		for i, mark := range marks {
			d, err := p.Sites[1-i].Status(ctx)
			if err != nil {
				return false, err
			}
			if len(d.Links) != 1 || d.Links[0].Apply.Applied < mark {
				return false, fmt.Errorf("site %s has not applied %s yet: %+v", p.Sites[1-i].Name, mark, d.Links)
			}
		}
		return true, nil
	})
}

// Close ends both agents and removes everything.
func (p *Pair) Close() error {
	var errs []error
	for _, s := range p.Sites {
		errs = append(errs, s.SignalAgent(syscall.SIGKILL))
		errs = append(errs, s.Cluster.Destroy())
	}
	return errors.Join(append(errs, os.RemoveAll(p.dir))...)
}
