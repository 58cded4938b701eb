package pgcluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// child is a postmaster that this program started. A goroutine of its own waits for it and closes done.
type child struct {
	pid  int
	done chan struct{}
	err  error // how it ended; read only after done is closed
}

// alive reports whether the postmaster has not ended.
func (ch *child) alive() bool {
	select {
	case <-ch.done:
		return false
	default:
		return true
	}
}

// Start starts the server and returns when it answers a query. When the server ends before, the error holds the last
// lines of its log. It fails with ErrRunning when the server runs already and with ErrPortInUse when another program
// has the port. After Kill, or after a crash, it first waits for the old server's processes.
func (c *Cluster) Start(ctx context.Context) error {
	c.opMu.Lock()
	defer c.opMu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, startTimeoutMax)
	defer cancel()
	if err := c.start(ctx); err != nil {
		return fmt.Errorf("start PostgreSQL in %s: %w", c.dir, err)
	}
	return nil
}

func (c *Cluster) start(ctx context.Context) error {
	if pid := c.PID(); pid != 0 {
		return fmt.Errorf("%w (process %d)", ErrRunning, pid)
	}
	if _, err := os.Stat(c.DataDir()); err != nil {
		return err
	}
	if err := c.clearRemains(ctx); err != nil {
		return err
	}
	if err := checkPortFree(c.port); err != nil {
		return err
	}
	logFile, err := os.OpenFile(c.LogPath(), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	logStart, err := logFile.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	ch, err := c.spawn(logFile)
	if err != nil {
		return err
	}
	if err := c.awaitReady(ctx, ch); err != nil {
		if ch.alive() { // It did not answer in time: a server that failed to start is not left behind.
			err = errors.Join(err, c.kill(ch.pid))
		}
		return fmt.Errorf("%w\n%s", err, c.logTail(logStart))
	}
	c.noteSegments(ch.pid)
	return nil
}

// clearRemains makes way for a new postmaster: it waits for backends that outlive a killed one by some milliseconds,
// because PostgreSQL refuses to start while they use the shared memory, and removes the dead one's postmaster.pid,
// because PostgreSQL refuses to start when that number belongs to another process of the same user by now.
func (c *Cluster) clearRemains(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, killTimeoutMax)
	defer cancel()
	if err := waitGone(ctx, c.DataDir(), func(int) {}); err != nil {
		return err
	}
	err := os.Remove(filepath.Join(c.DataDir(), "postmaster.pid"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// spawn starts the postmaster and the goroutine that waits for it.
func (c *Cluster) spawn(logFile *os.File) (*child, error) {
	cmd := exec.Command(filepath.Join(c.opts.BinDir, "postgres"), "-D", c.DataDir())
	cmd.Dir = c.dir
	cmd.Env = environment()
	cmd.Stdout, cmd.Stderr = logFile, logFile
	// A process group or session of its own: Ctrl-C at the terminal must reach duri only, which then stops its servers
	// in order.
	attr := &syscall.SysProcAttr{Credential: c.as.credential()}
	if c.opts.Detach {
		attr.Setsid = true
	} else {
		attr.Setpgid = true
		attr.Pdeathsig = syscall.SIGQUIT // The postmaster's word for an immediate shutdown, which ends the backends too.
	}
	cmd.SysProcAttr = attr

	ch := &child{done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the *thread* that forked ends, and Go ends threads as it likes. So this
		// goroutine keeps its thread until the server has ended; it never unlocks it, so the thread then ends too.
		runtime.LockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		ch.pid = cmd.Process.Pid
		started <- nil
		ch.err = cmd.Wait()
		close(ch.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.child = ch
	return ch, nil
}

// awaitReady waits until the server answers a query, and fails at once when it ends.
func (c *Cluster) awaitReady(ctx context.Context, ch *child) error {
	const attemptTimeout = 5 * time.Second
	for {
		attempt, cancel := context.WithTimeout(ctx, attemptTimeout)
		err := c.Exec(attempt, "postgres", "SELECT 1")
		cancel()
		if err == nil {
			return nil
		}
		if ch.alive() {
			_ = pause(ctx, 2*pollInterval) // The loop looks at ctx below.
		}
		if !ch.alive() {
			if ch.err == nil {
				return errors.New("the server ended before it answered")
			}
			return fmt.Errorf("the server ended before it answered: %w", ch.err)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("the server does not answer: %w; last attempt: %w", context.Cause(ctx), err)
		}
	}
}

// logTail gives the last lines that the server logged since an offset in bytes.
func (c *Cluster) logTail(since int64) string {
	const lines = 10
	b, err := os.ReadFile(c.LogPath())
	if err != nil {
		return fmt.Sprintf("(log not readable: %v)", err)
	}
	if since < int64(len(b)) {
		b = b[since:]
	}
	return tail(string(b), lines)
}

// PID is the process ID of the postmaster, 0 when the server does not run.
func (c *Cluster) PID() int {
	c.mu.Lock()
	ch := c.child
	c.mu.Unlock()
	if ch != nil && ch.alive() {
		return ch.pid
	}
	return c.foreignPID()
}

// foreignPID finds a postmaster that another program started on this data directory (see Open): the one that
// postmaster.pid names, if that number still belongs to a server of this directory.
func (c *Cluster) foreignPID() int {
	b, err := os.ReadFile(filepath.Join(c.DataDir(), "postmaster.pid"))
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(b), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(first))
	if err != nil || pid <= 0 || !isServerProcess(pid, c.DataDir()) {
		return 0
	}
	return pid
}

// Running reports whether the server runs. A server that recovers from a backend's crash counts as running.
func (c *Cluster) Running() bool { return c.PID() != 0 }

// stopSignals are the postmaster's signals for pg_ctl's shutdown modes.
var stopSignals = map[string]syscall.Signal{
	"smart":     syscall.SIGTERM,
	"fast":      syscall.SIGINT,
	"immediate": syscall.SIGQUIT,
}

// Stop shuts the server down and waits until all its processes are gone. The mode is "smart" (wait for the clients to
// leave), "fast" (roll back, write a checkpoint, and send WAL senders' clients the rest) or "immediate" (no checkpoint;
// the next Start recovers). A server that does not run is not an error. When ctx ends first the shutdown goes on.
func (c *Cluster) Stop(ctx context.Context, mode string) error {
	signal, ok := stopSignals[mode]
	if !ok {
		return fmt.Errorf("stop PostgreSQL: mode %q is not smart, fast or immediate", mode)
	}
	ctx, cancel := context.WithTimeout(ctx, stopTimeoutMax)
	defer cancel()
	if pid := c.PID(); pid != 0 {
		if err := syscall.Kill(pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("stop PostgreSQL in %s: signal process %d: %w", c.dir, pid, err)
		}
	}
	if err := c.awaitEnd(ctx); err != nil {
		return fmt.Errorf("stop PostgreSQL in %s (%s): %w", c.dir, mode, err)
	}
	return nil
}

// Restart is a fast Stop and a Start.
func (c *Cluster) Restart(ctx context.Context) error {
	if err := c.Stop(ctx, "fast"); err != nil {
		return err
	}
	return c.Start(ctx)
}

// Kill sends SIGKILL to the postmaster and to all its children, as if the machine had lost power but for the files that
// the operating system still writes, and returns when all are gone: Start may follow at once. A server that does not
// run is not an error.
func (c *Cluster) Kill() error {
	if err := c.kill(c.PID()); err != nil {
		return fmt.Errorf("kill PostgreSQL in %s: %w", c.dir, err)
	}
	return nil
}

func (c *Cluster) kill(postmaster int) error {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeoutMax)
	defer cancel()
	// Shared memory can be seen only while somebody maps it; parallel workers may have made some since the start.
	for _, pid := range serverProcesses(c.DataDir()) {
		c.noteSegments(pid)
	}
	if err := killAll(ctx, c.DataDir(), postmaster); err != nil {
		return err
	}
	return c.awaitEnd(ctx)
}

// awaitEnd waits until the postmaster is reaped and no process of the server is left.
func (c *Cluster) awaitEnd(ctx context.Context) error {
	c.mu.Lock()
	ch := c.child
	c.mu.Unlock()
	if ch != nil {
		select {
		case <-ch.done:
		case <-ctx.Done():
			return fmt.Errorf("wait for process %d to end: %w", ch.pid, context.Cause(ctx))
		}
	}
	return waitGone(ctx, c.DataDir(), func(int) {})
}

// noteSegments remembers the shared memory of a process for Destroy.
func (c *Cluster) noteSegments(pid int) {
	found := segmentsOf(pid)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range found {
		if !slices.Contains(c.segments, s) {
			c.segments = append(c.segments, s)
		}
	}
}

// Destroy ends the server at once, without a checkpoint, and removes the directory, the shared memory and the
// reservation of the port. It goes on after a failure and reports each; what it could not remove can be tried again by
// another Destroy. The Cluster must not be used afterwards.
func (c *Cluster) Destroy() error {
	c.opMu.Lock()
	defer c.opMu.Unlock()
	// With a server still in it, the directory would come back while it is being removed.
	if err := c.Kill(); err != nil {
		return fmt.Errorf("destroy the PostgreSQL cluster in %s: %w", c.dir, err)
	}
	var errs []error
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range append(dynamicSegments(c.segments), c.segments...) {
		errs = append(errs, s.remove())
	}
	c.lease.release()
	errs = append(errs, os.RemoveAll(c.dir))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("destroy the PostgreSQL cluster in %s: %w", c.dir, err)
	}
	c.segments = nil
	return nil
}
