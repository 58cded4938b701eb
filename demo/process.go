package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is an agent, a witness or a gateway that this program started.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // how it ended; read only after done is closed
}

// agentSpec is what an agent is started with.
type agentSpec struct {
	program string // the duri binary
	command string // agent, witness or gateway
	config  string // its duri.yaml
	log     string // file that its messages are appended to
	binDir  string // of PostgreSQL's programs, for pg_dump
	detach  bool   // survive this program
}

// startAgent starts `duri agent`, or another command that runs on. Unless it is detached it ends with this program, even when that is killed.
func startAgent(s agentSpec) (*process, error) {
	log, err := os.OpenFile(s.log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start agent: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(s.program, s.command, "-c", s.config)
	cmd.Env = agentEnvironment(os.Environ(), s.binDir)
	cmd.Stdout, cmd.Stderr = log, log
	// A process group or session of its own: Ctrl-C at the terminal must reach the demo only.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: s.detach, Setpgid: !s.detach}
	if !s.detach {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the thread that forked ends, and Go ends threads as it likes: this one is kept
		// until the agent has ended, and never unlocked, so that it then ends too.
		runtime.LockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start agent: %w", err)
	}
	return p, nil
}

// agentEnvironment is the program's own without what would override the agent's duri.yaml, except for its log, or lead it
// to another server.
func agentEnvironment(env []string, binDir string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(kv string) bool {
		return strings.HasPrefix(kv, "PG") || strings.HasPrefix(kv, "DURI_") && !strings.HasPrefix(kv, "DURI_LOG_")
	})
	return append(env, "DURI_POSTGRES_BIN_DIR="+binDir)
}

// alive reports whether the process has not ended.
func (p *process) alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// kill sends SIGKILL and waits until the process is gone. A process that has ended is not an error.
func (p *process) kill() error {
	if p == nil {
		return nil
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill process %d: %w", p.cmd.Process.Pid, err)
	}
	<-p.done
	return nil
}

// procID names a process for good: a number alone may belong to another one later.
type procID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // ticks after boot, field 22 of /proc/PID/stat
	Boot  string `json:"boot"`  // kernel's id of this boot
}

// identify gives the procID of a running process.
func identify(pid int) (procID, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return procID{}, fmt.Errorf("look at process %d: %w", pid, err)
	}
	start, err := startTicks(string(stat))
	if err != nil {
		return procID{}, fmt.Errorf("look at process %d: %w", pid, err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return procID{}, fmt.Errorf("look at process %d: %w", pid, err)
	}
	return procID{pid, start, strings.TrimSpace(string(boot))}, nil
}

// startTicks reads field 22 of /proc/PID/stat. The second field is the program's name in parentheses and may hold
// anything.
func startTicks(stat string) (uint64, error) {
	const behindName = 22 - 3 // index of field 22 among those behind the name
	i := strings.LastIndexByte(stat, ')')
	f := strings.Fields(stat[i+1:])
	if i < 0 || len(f) <= behindName {
		return 0, errors.New("its stat file cannot be read")
	}
	if f[0] == "Z" {
		return 0, errors.New("it has ended")
	}
	return strconv.ParseUint(f[behindName], 10, 64)
}

// running reports whether this very process still runs.
func (id procID) running() bool {
	now, err := identify(id.PID)
	return err == nil && now == id
}

// end asks the process to end, kills it when it does not within grace, and waits until it is gone.
func (id procID) end(ctx context.Context, grace time.Duration) error {
	const poll = 20 * time.Millisecond
	signal, killAt := syscall.SIGTERM, time.Now().Add(grace)
	for sent := syscall.Signal(0); id.running(); {
		if time.Now().After(killAt) {
			signal = syscall.SIGKILL
		}
		if signal != sent {
			if err := syscall.Kill(id.PID, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("end process %d: %w", id.PID, err)
			}
			sent = signal
		}
		if err := pause(ctx, poll); err != nil {
			return fmt.Errorf("wait for process %d to end: %w", id.PID, err)
		}
	}
	return nil
}

// pause waits for d or until ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
