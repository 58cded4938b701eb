package pgcluster_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pgcluster"
)

// quick are settings for tests that do not ask for durability.
func quick() map[string]string {
	return map[string]string{"fsync": "off", "shared_buffers": "16MB"}
}

// testContext bounds a test's waits.
func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// create makes a cluster from the template that the test's end removes.
func create(t *testing.T, opts pgcluster.Options) *pgcluster.Cluster {
	t.Helper()
	opts.Template = templateDir(t)
	return createByInitdb(t, opts)
}

// createByInitdb is for tests whose subject is initdb.
func createByInitdb(t *testing.T, opts pgcluster.Options) *pgcluster.Cluster {
	t.Helper()
	if opts.Settings == nil {
		opts.Settings = quick()
	}
	c, err := pgcluster.Create(testContext(t), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, c.Destroy()) })
	return c
}

func start(t *testing.T, c *pgcluster.Cluster) {
	t.Helper()
	must(t, c.Start(testContext(t)))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

// query gives the first value of the first row.
func query(t *testing.T, c *pgcluster.Cluster, sql string) string {
	t.Helper()
	rows, err := c.QueryText(testContext(t), "postgres", sql)
	if err != nil || len(rows) == 0 || len(rows[0]) == 0 {
		t.Fatalf("%s: %v, %v", sql, rows, err)
	}
	return rows[0][0]
}

// processesIn lists all processes whose current directory is in dir: an independent view of what pgcluster left.
func processesIn(t *testing.T, dir string) []string {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, l := range links {
		if cwd, err := os.Readlink(l); err == nil && strings.HasPrefix(cwd, dir+"/") {
			found = append(found, l+" -> "+cwd)
		}
	}
	return found
}

// until waits for a condition.
func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	ctx := testContext(t)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func gone(dir string) bool {
	_, err := os.Lstat(dir)
	return errors.Is(err, fs.ErrNotExist)
}

// checkLifecycle is what must work for every user; TestOrdinaryUserRunsClusters runs it again as one.
func checkLifecycle(t *testing.T) {
	ctx := testContext(t)
	c := createByInitdb(t, pgcluster.Options{})
	if c.Running() || c.PID() != 0 {
		t.Error("a created cluster runs")
	}
	start(t, c)
	for setting, want := range map[string]string{
		"wal_level": "logical", "track_commit_timestamp": "on", "max_wal_senders": "20", "max_replication_slots": "20",
		"listen_addresses": "127.0.0.1", "port": strconv.Itoa(c.Port()), "server_encoding": "UTF8", "fsync": "off",
	} {
		if got := query(t, c, "SHOW "+setting); got != want {
			t.Errorf("%s = %s, want %s", setting, got, want)
		}
	}
	if !c.Running() || c.PID() == 0 {
		t.Error("a started cluster does not run")
	}
	if err := c.Start(ctx); !errors.Is(err, pgcluster.ErrRunning) {
		t.Errorf("second Start: %v, want ErrRunning", err)
	}
	must(t, c.Exec(ctx, "postgres", "CREATE TABLE kept (id int); INSERT INTO kept VALUES (1)"))
	for _, mode := range []string{"fast", "immediate", "smart"} {
		must(t, c.Stop(ctx, mode))
		if c.Running() {
			t.Errorf("runs after Stop(%s)", mode)
		}
		start(t, c)
	}
	pid := c.PID()
	must(t, c.Restart(ctx))
	if c.PID() == pid {
		t.Error("Restart left the old process")
	}
	if got := query(t, c, "SELECT count(*) FROM kept"); got != "1" {
		t.Errorf("%s rows after all that, want 1", got)
	}
	version, err := c.Version(ctx)
	if got := query(t, c, "SHOW server_version"); err != nil || !strings.HasPrefix(got, version) {
		t.Errorf("Version = %s, %v; the server says %s", version, err, got)
	}
	must(t, c.Destroy())
	if !gone(c.Dir()) {
		t.Errorf("%s is left after Destroy", c.Dir())
	}
}

func TestLifecycle(t *testing.T) { checkLifecycle(t) }

// TestOrdinaryUserRunsClusters runs the lifecycle as nobody when the tests run as root. For any other user
// TestLifecycle has shown it already.
func TestOrdinaryUserRunsClusters(t *testing.T) {
	if os.Geteuid() != 0 {
		checkLifecycle(t)
		return
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	uid, err1 := strconv.ParseUint(nobody.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(nobody.Gid, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	// go test builds into a directory that only its user can enter.
	dir := publicDir(t)
	bin, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "pgcluster.test")
	if err := os.WriteFile(exe, bin, 0o755); err != nil {
		t.Fatal(err)
	}
	tmp := filepath.Join(dir, "tmp")
	if err := errors.Join(os.Mkdir(tmp, 0o700), os.Chown(tmp, int(uid), int(gid))); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(testContext(t), exe, "-test.run=^TestOrdinaryUserRunsClusters$", "-test.v")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestOrdinaryUserRunsClusters") {
		t.Errorf("as nobody: %v\n%s", err, out)
	}
}

// publicDir makes a directory with a short path that every user may pass through.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "duri-pgc-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// load runs writers until the server is gone and counts the commits that were acknowledged.
type load struct {
	acked atomic.Int64
	wg    sync.WaitGroup
}

func startLoad(t *testing.T, c *pgcluster.Cluster, writers int) *load {
	t.Helper()
	l := &load{}
	for range writers {
		conn, err := pgconn.Connect(testContext(t), c.DSN("postgres", ""))
		if err != nil {
			t.Fatal(err)
		}
		l.wg.Go(func() {
			defer conn.Close(context.Background())
			for {
				if _, err := conn.Exec(context.Background(), "INSERT INTO acked DEFAULT VALUES").ReadAll(); err != nil {
					return
				}
				l.acked.Add(1)
			}
		})
	}
	return l
}

func TestStartFollowsKillUnderLoadAndKeepsWhatWasAcknowledged(t *testing.T) {
	c := create(t, pgcluster.Options{Settings: map[string]string{"fsync": "on", "shared_buffers": "16MB"}})
	start(t, c)
	ctx := testContext(t)
	must(t, c.Exec(ctx, "postgres", "CREATE TABLE acked (at timestamptz DEFAULT now())"))
	var total int64
	for round := range 5 {
		l := startLoad(t, c, 4)
		until(t, "the load commits", func() bool { return l.acked.Load() >= 50 })
		begin := time.Now()
		if err := c.Kill(); err != nil {
			t.Fatal(err)
		}
		if left := processesIn(t, c.Dir()); len(left) > 0 {
			t.Errorf("round %d: processes after Kill: %v", round, left)
		}
		killed := time.Since(begin)
		if err := c.Start(ctx); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		l.wg.Wait()
		total += l.acked.Load()
		t.Logf("round %d: %d commits, killed in %v, back after %v", round, l.acked.Load(), killed, time.Since(begin))
	}
	// Each round each writer may have one more commit whose acknowledgement was lost.
	got, err := strconv.ParseInt(query(t, c, "SELECT count(*) FROM acked"), 10, 64)
	if err != nil || got < total || got > total+20 {
		t.Errorf("%d rows, %v; want %d to %d", got, err, total, total+20)
	}
}

func TestStartWaitsForBackendsThatOutliveTheirPostmaster(t *testing.T) {
	c := create(t, pgcluster.Options{})
	start(t, c)
	conn, err := pgconn.Connect(testContext(t), c.DSN("postgres", ""))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	// A stopped backend cannot notice the death of its postmaster, so it outlives it as long as the test likes.
	backend, postmaster := int(conn.PID()), c.PID()
	must(t, syscall.Kill(backend, syscall.SIGSTOP))
	// As the kernel's out-of-memory killer would: the postmaster alone.
	must(t, syscall.Kill(postmaster, syscall.SIGKILL))
	until(t, "the death of the postmaster is noticed", func() bool { return c.PID() == 0 })

	ctx, cancel := context.WithTimeout(testContext(t), 300*time.Millisecond)
	defer cancel()
	err = c.Start(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), strconv.Itoa(backend)) {
		t.Errorf("Start beside a living backend: %v, want a wait that names process %d", err, backend)
	}
	must(t, syscall.Kill(backend, syscall.SIGCONT))
	start(t, c)
}

func TestKillReachesBackendsWithoutAPostmaster(t *testing.T) {
	c := create(t, pgcluster.Options{})
	start(t, c)
	conn, err := pgconn.Connect(testContext(t), c.DSN("postgres", ""))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	must(t, syscall.Kill(int(conn.PID()), syscall.SIGSTOP))
	must(t, syscall.Kill(c.PID(), syscall.SIGKILL))
	until(t, "the death of the postmaster is noticed", func() bool { return c.PID() == 0 })
	must(t, c.Kill())
	start(t, c)
}

func TestDestroyLeavesNothing(t *testing.T) {
	for _, how := range []string{"running", "stopped", "killed", "postmaster killed", "never started"} {
		t.Run(how, func(t *testing.T) {
			// posix puts shared memory into /dev/shm, which outlives a killed server.
			c := create(t, pgcluster.Options{Settings: map[string]string{"fsync": "off", "dynamic_shared_memory_type": "posix"}})
			if how != "never started" {
				start(t, c)
			}
			memory := sharedMemory(t, c)
			if (len(memory) >= 2) != (how != "never started") {
				t.Errorf("the server shares %v", memory)
			}
			switch how {
			case "stopped":
				must(t, c.Stop(testContext(t), "fast"))
			case "killed":
				must(t, c.Kill())
			case "postmaster killed":
				must(t, syscall.Kill(c.PID(), syscall.SIGKILL))
			}
			must(t, c.Destroy())
			if left := processesIn(t, c.Dir()); len(left) > 0 {
				t.Errorf("processes: %v", left)
			}
			if !gone(c.Dir()) {
				t.Errorf("directory %s", c.Dir())
			}
			if left := left(t, memory); len(left) > 0 {
				t.Errorf("shared memory: %v", left)
			}
			must(t, c.Destroy()) // Once more is not an error.
		})
	}
}

// TestDestroyFindsSharedMemoryThatNobodySaw kills a server from outside while two backends share memory that they made
// after its start.
func TestDestroyFindsSharedMemoryThatNobodySaw(t *testing.T) {
	c := create(t, pgcluster.Options{Settings: map[string]string{"fsync": "off", "dynamic_shared_memory_type": "posix"}})
	start(t, c)
	parallel := "force_parallel_mode"
	if major, _, _ := strings.Cut(query(t, c, "SHOW server_version"), "."); major >= "16" {
		parallel = "debug_parallel_query"
	}
	conn, err := pgconn.Connect(testContext(t), c.DSN("postgres", ""))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(testContext(t), "SET "+parallel+" = on").ReadAll(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = conn.Exec(context.Background(), "SELECT pg_sleep(60)").ReadAll() }) // Ends with the server.
	until(t, "a parallel worker runs", func() bool {
		return query(t, c, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'parallel worker'") != "0"
	})
	memory := sharedMemory(t, c)
	if len(memory) < 3 {
		t.Fatalf("the server shares %v, nothing that was made after its start: the test shows nothing", memory)
	}
	// The postmaster first, so that it cannot clean up after the others.
	pids := append([]int{c.PID()}, serverPIDs(t, c)...)
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGKILL) // It may have ended by itself after its postmaster.
	}
	wg.Wait()
	must(t, c.Destroy())
	if left := left(t, memory); len(left) > 0 {
		t.Errorf("shared memory: %v", left)
	}
}

// sharedMemory lists what the cluster's processes share and what would outlive them: files in /dev/shm and identifiers
// of System V segments. Servers of other tests come and go at the same time, so the test asks for its own only.
func sharedMemory(t *testing.T, c *pgcluster.Cluster) []string {
	t.Helper()
	var found []string
	for _, pid := range serverPIDs(t, c) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid)) // The process may have ended.
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			switch {
			case len(f) < 6:
			case strings.HasPrefix(f[5], "/dev/shm/"):
				found = append(found, f[5])
			case strings.HasPrefix(f[5], "/SYSV"):
				found = append(found, f[4])
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// left keeps what still is there.
func left(t *testing.T, memory []string) []string {
	t.Helper()
	b, err := os.ReadFile("/proc/sysvipc/shm")
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(slices.Clone(memory), func(s string) bool {
		if strings.HasPrefix(s, "/") {
			return gone(s)
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 1 && f[1] == s { // key shmid ...
				return false
			}
		}
		return true
	})
}

// serverPIDs lists the cluster's processes.
func serverPIDs(t *testing.T, c *pgcluster.Cluster) []int {
	t.Helper()
	var pids []int
	for _, link := range processesIn(t, c.Dir()) {
		pid, err := strconv.Atoi(strings.Split(link, "/")[2])
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

func TestServerEndsWithItsProgram(t *testing.T) {
	dir := filepath.Join(publicDir(t), "pg")
	helper := startHelper(t, dir, false)
	if len(processesIn(t, dir)) == 0 {
		t.Fatal("the helper has no server")
	}
	must(t, helper.Process.Kill())
	_ = helper.Wait() // It says that the program was killed.
	until(t, "the server of a killed program is gone", func() bool { return len(processesIn(t, dir)) == 0 })
}

func TestDetachedServerOutlivesItsProgramAndCanBeTakenOver(t *testing.T) {
	dir := filepath.Join(publicDir(t), "pg")
	helper := startHelper(t, dir, true)
	must(t, helper.Process.Kill())
	_ = helper.Wait() // It says that the program was killed.
	ctx := testContext(t)
	c, err := pgcluster.Open(ctx, pgcluster.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, c.Destroy()) })
	if !c.Running() {
		t.Fatal("the detached server does not run")
	}
	if got := query(t, c, "SHOW port"); got != strconv.Itoa(c.Port()) {
		t.Errorf("Open found port %d, the server has %s", c.Port(), got)
	}
	must(t, c.Restart(ctx))
	must(t, c.Destroy())
	if left := processesIn(t, dir); len(left) > 0 || !gone(dir) {
		t.Errorf("left: %v, directory gone: %v", left, gone(dir))
	}
}

// startHelper runs the helper program of main_test.go until its server is ready.
func startHelper(t *testing.T, dir string, detach bool) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(testContext(t), "/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"="+dir)
	if detach {
		cmd.Env = append(cmd.Env, helperDetachEnv+"=1")
	}
	cmd.Stderr = os.Stderr
	if _, err := cmd.StdinPipe(); err != nil { // Kept open: the helper waits for its end.
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		// When the test failed, the server may still run.
		if c, err := pgcluster.Open(testContext(t), pgcluster.Options{Dir: dir}); err == nil {
			must(t, c.Destroy())
		}
	})
	if _, err := io.ReadFull(stdout, make([]byte, len("ready"))); err != nil {
		t.Fatalf("the helper did not start its server: %v", err)
	}
	return cmd
}

func TestPortInUseIsSaid(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	c := create(t, pgcluster.Options{Port: n})
	err = c.Start(testContext(t))
	if !errors.Is(err, pgcluster.ErrPortInUse) || !strings.Contains(err.Error(), port) || pgcluster.HintOf(err) == "" {
		t.Errorf("Start: %v (hint %q), want ErrPortInUse with the port and a hint", err, pgcluster.HintOf(err))
	}
	must(t, l.Close())
	start(t, c)
}

func TestStartThatFailsShowsTheLogAndLeavesNoProcess(t *testing.T) {
	c := create(t, pgcluster.Options{Settings: map[string]string{"shared_buffers": "nonsense"}})
	begin := time.Now()
	err := c.Start(testContext(t))
	if err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("Start: %v, want the server's own words on the setting", err)
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("the failure was noticed after %v", took)
	}
	if c.Running() || len(processesIn(t, c.Dir())) > 0 {
		t.Error("a process is left")
	}
}

func TestStartThatIsCancelledLeavesNoProcess(t *testing.T) {
	c := create(t, pgcluster.Options{})
	ctx, cancel := context.WithCancel(testContext(t))
	cancel()
	if err := c.Start(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Start: %v, want context.Canceled", err)
	}
	if c.Running() || len(processesIn(t, c.Dir())) > 0 {
		t.Error("a process is left")
	}
	start(t, c)
}

func TestStopIsBoundedByItsContextAndGoesOn(t *testing.T) {
	c := create(t, pgcluster.Options{})
	start(t, c)
	conn, err := pgconn.Connect(testContext(t), c.DSN("postgres", ""))
	if err != nil {
		t.Fatal(err)
	}
	// A smart shutdown waits for this client for ever.
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	if err := c.Stop(ctx, "smart"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stop: %v, want context.DeadlineExceeded", err)
	}
	must(t, conn.Close(testContext(t)))
	until(t, "the shutdown that was asked for ends", func() bool { return !c.Running() })
	if err := c.Stop(testContext(t), "sideways"); err == nil {
		t.Error("an unknown mode was taken")
	}
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	cancelled, cancel := context.WithCancel(testContext(t))
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		opts pgcluster.Options
		want string
	}{
		"a bad setting": {testContext(t), pgcluster.Options{Settings: map[string]string{"port": "1"}}, "Options.Port"},
		"cancelled":     {cancelled, pgcluster.Options{}, "canceled"},
		"no template":   {testContext(t), pgcluster.Options{Template: "/nonexistent"}, "/nonexistent"},
		"initdb fails":  {testContext(t), pgcluster.Options{Superuser: "pg_reserved"}, "pg_"},
	} {
		t.Run(name, func(t *testing.T) {
			parent := publicDir(t)
			c.opts.Dir = filepath.Join(parent, "pg")
			_, err := pgcluster.Create(c.ctx, c.opts)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Create: %v, want an error with %q", err, c.want)
			}
			if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}

func TestCreateKeepsItsHandsOffAForeignDirectory(t *testing.T) {
	dir := publicDir(t)
	file := filepath.Join(dir, "thesis.txt")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := pgcluster.Create(testContext(t), pgcluster.Options{Dir: dir})
	if err == nil || pgcluster.HintOf(err) == "" {
		t.Errorf("Create in a directory with files: %v (hint %q)", err, pgcluster.HintOf(err))
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

func TestDirectoryThatTheServerCannotUseIsNamed(t *testing.T) {
	long := filepath.Join(publicDir(t), strings.Repeat("x", 100))
	if _, err := pgcluster.Create(testContext(t), pgcluster.Options{Dir: long}); err == nil ||
		!strings.Contains(err.Error(), "socket") || !gone(long) {
		t.Errorf("Create in a path too long for a socket: %v", err)
	}
	if os.Geteuid() != 0 {
		return // The server runs as the user who makes the directory, who can reach it.
	}
	closed := publicDir(t)
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := pgcluster.Create(testContext(t), pgcluster.Options{Dir: filepath.Join(closed, "pg")})
	if err == nil || !strings.Contains(err.Error(), closed+" is not searchable") || pgcluster.HintOf(err) == "" {
		t.Errorf("Create below a closed directory: %v (hint %q)", err, pgcluster.HintOf(err))
	}
	if left, err := os.ReadDir(closed); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestPasswordIsAskedForOverTCP(t *testing.T) {
	c := createByInitdb(t, pgcluster.Options{Superuser: "boss", Password: `s'e cret\`})
	start(t, c)
	ctx := testContext(t)
	conn, err := pgconn.Connect(ctx, c.DSN("postgres", "boss"))
	if err != nil {
		t.Fatal(err)
	}
	must(t, conn.Close(ctx))
	without := fmt.Sprintf("host=127.0.0.1 port=%d dbname=postgres user=boss password=wrong sslmode=disable", c.Port())
	if conn, err := pgconn.Connect(ctx, without); err == nil {
		must(t, conn.Close(ctx))
		t.Error("a wrong password was taken")
	}
	if got := query(t, c, "SELECT current_user"); got != "boss" {
		t.Errorf("superuser %s", got)
	}
}

func TestQueriesTellNullFromEmptyAndReportErrors(t *testing.T) {
	c := create(t, pgcluster.Options{})
	start(t, c)
	ctx := testContext(t)
	rows, err := c.QueryText(ctx, "postgres", "SELECT 1; SELECT NULL, '' UNION ALL SELECT 'a', 'b'")
	if err != nil || len(rows) != 2 || rows[0][0] != pgcluster.NullText || rows[0][1] != "" || rows[1][1] != "b" {
		t.Errorf("rows %q, %v", rows, err)
	}
	if err := c.Exec(ctx, "postgres", "SELECT * FROM nowhere"); err == nil || !strings.Contains(err.Error(), "nowhere") {
		t.Errorf("Exec of a bad statement: %v", err)
	}
	if err := c.Exec(ctx, "nowhere", "SELECT 1"); err == nil {
		t.Error("Exec in a database that does not exist gave no error")
	}
	out, err := c.Psql(ctx, "postgres", "\\set x 42\nSELECT :x;")
	if err != nil || out != "42\n" {
		t.Errorf("Psql: %q, %v", out, err)
	}
	if _, err := c.Psql(ctx, "postgres", "SELECT 1/0;"); err == nil || !strings.Contains(err.Error(), "division by zero") {
		t.Errorf("Psql of a bad statement: %v", err)
	}
}

func TestCopiesOfATemplateAreClustersOfTheirOwn(t *testing.T) {
	var ids []string
	for range 2 {
		c := create(t, pgcluster.Options{})
		start(t, c)
		ids = append(ids, query(t, c, "SELECT system_identifier FROM pg_control_system()"))
		// WAL with the new identifier is written and read back.
		must(t, c.Exec(testContext(t), "postgres", "CREATE TABLE kept (id int); INSERT INTO kept VALUES (1)"))
		must(t, c.Kill())
		start(t, c)
		if got := query(t, c, "SELECT count(*) FROM kept"); got != "1" {
			t.Errorf("%s rows after a crash of a copy", got)
		}
	}
	if ids[0] == ids[1] {
		t.Errorf("two copies have the system identifier %s", ids[0])
	}
}

func TestStandbyFollowsItsPrimary(t *testing.T) {
	primary := create(t, pgcluster.Options{})
	start(t, primary)
	must(t, primary.Exec(testContext(t), "postgres", "CREATE TABLE t AS SELECT 1 AS n"))
	of := fmt.Sprintf("host=127.0.0.1 port=%d user=%s application_name=second", primary.Port(), primary.Superuser())
	standby := createByInitdb(t, pgcluster.Options{StandbyOf: of})
	start(t, standby)
	if got := query(t, standby, "SELECT pg_is_in_recovery()::text || (SELECT sum(n) FROM t)"); got != "true1" {
		t.Errorf("in recovery, and the sum: %q, want true1", got)
	}
	must(t, primary.Exec(testContext(t), "postgres", "ALTER SYSTEM SET synchronous_standby_names = 'second'"))
	must(t, primary.Exec(testContext(t), "postgres", "SELECT pg_reload_conf()"))
	until(t, "the primary counts on it", func() bool {
		return query(t, primary, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'") == "1"
	})
	must(t, primary.Exec(testContext(t), "postgres", "SET synchronous_commit = remote_apply; INSERT INTO t VALUES (2)"))
	if got := query(t, standby, "SELECT sum(n) FROM t"); got != "3" {
		t.Errorf("the standby's sum is %s, want 3", got)
	}
}

func TestStandbyTakesNoTemplateAndNoPassword(t *testing.T) {
	for _, o := range []pgcluster.Options{{StandbyOf: "host=x", Template: "x"}, {StandbyOf: "host=x", Password: "x"}} {
		if c, err := pgcluster.Create(testContext(t), o); err == nil {
			t.Errorf("%+v made a cluster", o)
			must(t, c.Destroy())
		}
	}
}
