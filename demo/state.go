package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/duri-io/duri/internal/pgcluster"
)

// stateName is the file in the demo's directory that Stop goes by.
const stateName = "demo.json"

// stateFormat tells the file from any other of that name.
const stateFormat = "duri demo 1"

// state is what Stop needs to know.
type state struct {
	Format   string   `json:"format"`
	Demo     procID   `json:"demo"`     // the demo itself; it may have ended
	Agents   []procID `json:"agents"`   // started so far
	Clusters []string `json:"clusters"` // directories of pgcluster
	BinDir   string   `json:"bin_dir"`
	Kept     bool     `json:"kept"` // the demo is done with it and left it running
}

// save writes the state so that a reader sees the old or the new one.
func (s state) save(dir string) error {
	s.Format = stateFormat
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, stateName+".tmp")
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("note the demo's processes: %w", err)
	}
	if err := os.Rename(tmp, filepath.Join(dir, stateName)); err != nil {
		return fmt.Errorf("note the demo's processes: %w", err)
	}
	return nil
}

func loadState(dir string) (state, error) {
	var s state
	refuse := func(err error) error {
		return &Error{
			Msg: dir + " is not the directory of a demo", Err: err,
			Hint: "name the directory that the demo printed",
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, stateName))
	if err != nil {
		return s, refuse(err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, refuse(err)
	}
	if s.Format != stateFormat {
		return s, refuse(fmt.Errorf("%s is of another kind", stateName))
	}
	return s, nil
}

// Bounds of Stop.
const (
	agentGrace = 5 * time.Second // between SIGTERM and SIGKILL
	stopMax    = time.Minute
)

// Stop ends the servers and agents that a demo with Options.Keep left running in dir, or what a killed demo left, and
// removes dir. It ends no other process: agents are known by number and start time, servers by their data directory. A
// demo that still runs is refused.
func Stop(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, stopMax)
	defer cancel()
	abs, err := filepath.Abs(dir)
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return &Error{Msg: "there is no directory " + dir, Hint: "name the directory that the demo printed"}
	}
	if err != nil {
		return fmt.Errorf("stop the demo in %s: %w", dir, err)
	}
	s, err := loadState(abs)
	if err != nil {
		return err
	}
	if !s.Kept && s.Demo.running() {
		return &Error{
			Msg:  fmt.Sprintf("the demo in %s still runs (process %d)", dir, s.Demo.PID),
			Hint: "press Ctrl-C there, or: kill " + fmt.Sprint(s.Demo.PID),
		}
	}
	if err := s.end(ctx, abs); err != nil {
		return fmt.Errorf("stop the demo in %s: %w", dir, withHint(err))
	}
	if err := os.RemoveAll(abs); err != nil {
		return fmt.Errorf("stop the demo in %s: %w", dir, err)
	}
	return nil
}

// end ends agents first: they would only log that their servers are gone.
func (s state) end(ctx context.Context, dir string) error {
	var errs []error
	for _, a := range s.Agents {
		errs = append(errs, a.end(ctx, agentGrace))
	}
	for _, c := range s.Clusters {
		if filepath.Dir(c) != dir { // somebody has edited the file: what it names is not ours
			errs = append(errs, fmt.Errorf("%s is not in the demo's directory", c))
			continue
		}
		cluster, err := pgcluster.Open(ctx, pgcluster.Options{Dir: c, BinDir: s.BinDir, Detach: true})
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = cluster.Destroy()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
