package pair

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/server"
)

// Witness is the third voter of the register, a process of its own.
type Witness struct {
	binary, configFile string
	process            process
}

// Start starts it; it dies with this process.
func (w *Witness) Start() error {
	if err := w.process.start(w.binary, "witness", "-c", w.configFile); err != nil {
		return fmt.Errorf("start the witness: %w", err)
	}
	return nil
}

// Signal sends it a signal; with SIGKILL or SIGTERM it waits until the process is gone.
func (w *Witness) Signal(sig syscall.Signal) error { return w.process.signal(sig) }

// Log returns the end of its log.
func (w *Witness) Log() string { return w.process.log() }

// addRegister asks for voters on free ports, a witness among them, and doors.
func (p *Pair) addRegister(spec *config.InitSpec) error {
	if !p.opts.Sync {
		return nil
	}
	voters := p.opts.Names[:min(3, len(p.opts.Names))]
	if !p.opts.NoWitness {
		spec.Witness, voters = "127.0.0.1", append(slices.Clone(voters[:2]), config.WitnessFolder)
	}
	for _, name := range voters {
		v := config.Voter{Name: name}
		for _, to := range []*string{&v.Peer, &v.Client} {
			var err error
			if *to, err = p.freeAddress(); err != nil {
				return err
			}
		}
		spec.Voters = append(spec.Voters, v)
	}
	if p.opts.NoWitness {
		return nil
	}
	dir := filepath.Join(spec.Out, config.WitnessFolder)
	p.Witness = &Witness{binary: p.opts.Binary, configFile: filepath.Join(dir, config.FileName)}
	p.Witness.process.logFile = filepath.Join(dir, "witness.log")
	return nil
}

// withRearm sets durability.rearm.
func (p *Pair) withRearm(text string) string {
	if p.opts.Rearm == 0 {
		return text
	}
	return strings.Replace(text, "\ndurability:\n", fmt.Sprintf("\ndurability:\n  rearm: %s\n", p.opts.Rearm), 1)
}

// HoldCommits lets commits of all sites' clients wait for their agents, as a DBA sets it up: every database's agent is
// named, and must have what it reports as flushed.
func (p *Pair) HoldCommits(ctx context.Context) error {
	var names []string
	for _, db := range p.databases() {
		names = append(names, server.Slot(db))
	}
	value := fmt.Sprintf("%d (%s)", len(names), strings.Join(names, ", "))
	for _, s := range p.Sites {
		for _, sql := range []string{"ALTER SYSTEM SET synchronous_standby_names = " + pg.QuoteLiteral(value), "SELECT pg_reload_conf()"} {
			if err := s.Cluster.Exec(ctx, "postgres", sql); err != nil {
				return fmt.Errorf("hold commits at %s: %w", s.Name, err)
			}
		}
	}
	return p.Wait(ctx, "the servers know their synchronous standbys", func(ctx context.Context) (bool, error) {
		for _, s := range p.Sites {
			rows, err := s.Cluster.QueryText(ctx, "postgres", "SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')")
			if err != nil || rows[0][0] != fmt.Sprint(len(names)) {
				return false, errors.Join(err, fmt.Errorf("site %s: %v", s.Name, rows))
			}
		}
		return true, nil
	})
}

// Dir is where everything is kept.
func (p *Pair) Dir() string { return p.dir }

// Leave ends all processes and leaves everything on disk.
func (p *Pair) Leave() error {
	var errs []error
	if p.Witness != nil {
		errs = append(errs, p.Witness.Signal(syscall.SIGKILL))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	errs = append(errs, p.Gateway.close())
	for _, s := range p.Sites {
		if s.Disk != nil {
			_ = s.Disk.Thaw() // see Close
		}
		errs = append(errs, s.SignalAgent(syscall.SIGKILL), s.Relay.close(), s.Disk.close()) // the disk's image stays
		if p.opts.Clusters == nil {
			errs = append(errs, s.Cluster.Stop(ctx, "fast"))
		}
	}
	return errors.Join(errs...)
}
