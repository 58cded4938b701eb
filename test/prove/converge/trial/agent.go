package trial

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/server"
)

const killSignal = syscall.SIGKILL

// Agent is `agent -c FILE`: the agent of a site whose clock is not the server's. The offset is in -offset-file, by
// default OffsetFile beside the configuration. It runs until ctx ends.
func Agent(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("agent", flag.ContinueOnError)
	path := f.String("c", "", "configuration file")
	offset := f.String("offset-file", "", "file with the clock's offset in microseconds")
	if err := f.Parse(args); err != nil {
		return err
	}
	cfg, err := config.Load(*path)
	if err != nil {
		return err
	}
	if *offset == "" {
		*offset = filepath.Join(filepath.Dir(*path), OffsetFile)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	a, err := server.NewHooked(cfg, "trial", log, server.Hooks{Clock: func() time.Duration { return readOffset(*offset) }})
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// moduleRoot is the folder of go.mod.
func moduleRoot(ctx context.Context) (string, error) {
	b, err := command(ctx, "", "go", "env", "GOMOD").Output()
	mod := strings.TrimSpace(string(b))
	if err == nil && (mod == "" || mod == os.DevNull) {
		err = errors.New("there is no go.mod here")
	}
	if err != nil {
		return "", fmt.Errorf("find duri's source: %w", err)
	}
	return filepath.Dir(mod), nil
}

func command(ctx context.Context, dir, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	return cmd
}
