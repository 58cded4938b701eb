package demo

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

// run is a `duri demo` process.
type run struct {
	cmd    *exec.Cmd
	dir    string
	stdout bytes.Buffer
	exited chan struct{}

	mu     sync.Mutex // guards stderr
	stderr strings.Builder
}

// runMax bounds a demo in a test; the machine may be busy with other tests.
const runMax = 4 * time.Minute

// startDemo starts `duri demo` in a directory of its own. When the test ends, nothing of it is left.
func startDemo(t *testing.T, args ...string) *run {
	t.Helper()
	parent, err := os.MkdirTemp("", "duri-demo-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(parent, 0o711); err != nil { // the servers may run as another user
		t.Fatal(err)
	}
	r := &run{dir: filepath.Join(parent, "d"), exited: make(chan struct{})}
	ctx, cancel := context.WithTimeout(context.Background(), runMax)
	r.cmd = exec.CommandContext(ctx, program, append([]string{"demo", "--dir", r.dir}, args...)...)
	r.cmd.Cancel = func() error { return r.cmd.Process.Signal(syscall.SIGTERM) }
	r.cmd.WaitDelay = time.Minute
	r.cmd.Stdout = &r.stdout
	stderr, err := r.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(r.exited)
		r.read(stderr)
		_ = r.cmd.Wait() // the exit code is in ProcessState
	}()
	t.Cleanup(func() {
		_ = r.cmd.Process.Signal(syscall.SIGTERM)
		<-r.exited
		cancel()
		if t.Failed() {
			t.Logf("duri demo printed:\n%s\n%s", r.progress(), r.stdout.String())
		}
		if _, err := os.Stat(r.dir); err == nil {
			if err := Stop(context.Background(), r.dir); err != nil {
				t.Errorf("remove what the test left: %v", err)
			}
		}
		if err := os.RemoveAll(parent); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *run) read(stderr io.Reader) {
	s := bufio.NewScanner(stderr)
	for s.Scan() {
		r.mu.Lock()
		r.stderr.WriteString(s.Text() + "\n")
		r.mu.Unlock()
	}
}

func (r *run) progress() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stderr.String()
}

// wait waits for the end and gives the exit code.
func (r *run) wait() int {
	<-r.exited
	return r.cmd.ProcessState.ExitCode()
}

// waitFor waits until the demo has printed something.
func (r *run) waitFor(t *testing.T, text string) {
	t.Helper()
	waitFor(t, "the demo prints "+text, func() bool {
		select {
		case <-r.exited:
			if !strings.Contains(r.progress(), text) {
				t.Fatalf("the demo ended (%d) and has not printed %q:\n%s", r.wait(), text, r.progress())
			}
		default:
		}
		return strings.Contains(r.progress(), text)
	})
}

// processes lists the processes that have to do with the demo's directory, by their arguments, environment and current
// directory. The demo itself is among them while it runs.
func (r *run) processes(t *testing.T) []string {
	t.Helper()
	pids, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, p := range pids {
		args, _ := os.ReadFile(p + "/cmdline") // it may have ended
		env, _ := os.ReadFile(p + "/environ")
		cwd, _ := os.Readlink(p + "/cwd")
		if strings.Contains(string(args)+"\n"+string(env)+"\n"+cwd, r.dir) {
			found = append(found, p+" "+strings.ReplaceAll(string(args), "\x00", " "))
		}
	}
	return found
}

// wantNothingLeft checks that neither a process nor a file is left.
func (r *run) wantNothingLeft(t *testing.T) {
	t.Helper()
	if left := r.processes(t); len(left) > 0 {
		t.Errorf("left running:\n%s", strings.Join(left, "\n"))
	}
	if _, err := os.Lstat(r.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left %s: %v", r.dir, err)
	}
}

// report reads the one document that --json prints.
func (r *run) report(t *testing.T) Report {
	t.Helper()
	var rep Report
	d := json.NewDecoder(bytes.NewReader(r.stdout.Bytes()))
	d.DisallowUnknownFields()
	if err := d.Decode(&rep); err != nil {
		t.Fatalf("stdout is not a report: %v\n%s", err, r.stdout.String())
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		t.Errorf("stdout holds more than one document:\n%s", r.stdout.String())
	}
	return rep
}

func TestNothingIsLostWhenASiteDiesAndComesBack(t *testing.T) {
	r := startDemo(t, "--duration", "20s", "--json")
	if code := r.wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	rep := r.report(t)
	t.Logf("seed %d: %d acknowledged, %d in doubt, %d conflicts, failover %d ms, catch-up %d ms, not yet at B %d, %.0f s",
		rep.Seed, rep.Acknowledged, rep.InDoubt, rep.Conflicts, rep.FailoverMS, rep.CatchupMS, rep.NotYetAtB, rep.Seconds)
	if !rep.OK || len(rep.Problems) > 0 || !rep.Converged || !rep.VerifyEqual || !rep.TablesEqual {
		t.Errorf("verdict %v, converged %v (verify %v, tables %v): %q", rep.OK, rep.Converged, rep.VerifyEqual, rep.TablesEqual, rep.Problems)
	}
	if rep.Acknowledged < 1000 || rep.Lost != 0 || rep.Doubled != 0 || rep.Unexpected != 0 || rep.InDoubtSplit != 0 {
		t.Errorf("acknowledged %d, lost %d, doubled %d, unexpected %d, in doubt and different %d",
			rep.Acknowledged, rep.Lost, rep.Doubled, rep.Unexpected, rep.InDoubtSplit)
	}
	if there := rep.Acknowledged + rep.InDoubtThere; rep.PaymentsA != there || rep.PaymentsB != there {
		t.Errorf("payments at A %d, at B %d, by the clients %d", rep.PaymentsA, rep.PaymentsB, there)
	}
	if rep.SumClient <= 0 || rep.SumA != rep.SumClient || rep.SumB != rep.SumClient {
		t.Errorf("sums: clients %d, A %d, B %d", rep.SumClient, rep.SumA, rep.SumB)
	}
	if rep.Conflicts == 0 || rep.Conflicts != rep.ConflictsA+rep.ConflictsB || len(rep.FirstConflicts) == 0 {
		t.Errorf("conflicts %d (A %d, B %d), %d listed: both sites write the same funds", rep.Conflicts, rep.ConflictsA, rep.ConflictsB, len(rep.FirstConflicts))
	}
	rep.checkClients(t)
	if rep.Killed != KillSite || len(rep.Tables) != 6 || len(rep.Phases) != 8 || rep.FailoverMS <= 0 || rep.CatchupMS <= 0 || !rep.BackAt.After(rep.KillAt.Add(4*time.Second)) {
		t.Errorf("%d tables, %d phases, failover %d ms, catch-up %d ms, killed %v, back %v",
			len(rep.Tables), len(rep.Phases), rep.FailoverMS, rep.CatchupMS, rep.KillAt, rep.BackAt)
	}
	r.wantNothingLeft(t)
}

func TestCtrlCRemovesEverything(t *testing.T) {
	for name, moment := range map[string]string{
		"while servers start": "servers start",
		"while A joins":       "A joins",
		"while A is down":     "all 2 clients of A write at B",
	} {
		t.Run(name, func(t *testing.T) {
			r := startDemo(t, "--duration", "12s", "--clients", "2")
			r.waitFor(t, moment)
			if err := r.cmd.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
			if code := r.wait(); code != 130 {
				t.Errorf("exit code %d, want 130", code)
			}
			if r.stdout.Len() > 0 || !strings.Contains(r.progress(), "interrupted") {
				t.Errorf("stdout %q", r.stdout.String())
			}
			r.wantNothingLeft(t)
		})
	}
}

func TestKilledDemoTakesItsProcessesAlong(t *testing.T) {
	r := startDemo(t, "--duration", "30s")
	r.waitFor(t, "write the ledger")
	if n := len(r.processes(t)); n < 4 {
		t.Fatalf("only %d processes are seen, so their end would prove nothing", n)
	}
	if err := r.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	r.wait()
	waitFor(t, "servers and agents end with the demo", func() bool { return len(r.processes(t)) == 0 })
	if err := Stop(t.Context(), r.dir); err != nil {
		t.Errorf("remove what the killed demo left: %v", err)
	}
	r.wantNothingLeft(t)
}

func TestKeptDemoCanBeUsedAndStopped(t *testing.T) {
	r := startDemo(t, "--duration", "6s", "--keep", "--json")
	if code := r.wait(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	kept := r.report(t).Kept
	if kept == nil || len(kept.Connect) != 2 || len(kept.Status) != 2 || len(kept.Gateways) != 4 {
		t.Fatalf("kept: %+v", kept)
	}
	for i, line := range kept.Connect {
		if got := strings.TrimSpace(shell(t, line+" -Atc 'SELECT count(*) FROM finance.government'")); got != "243" {
			t.Errorf("site %d has %s governments", i, got)
		}
		if got := shell(t, kept.Status[i]); !strings.Contains(got, "2 sites, all writable") {
			t.Errorf("site %d: %s", i, got)
		}
	}
	for i, line := range kept.Gateways {
		sql, want := "SELECT count(*) FROM finance.government", "243"
		if i%2 == 1 {
			sql, want = "SHOW STATE", "active|yes"
		}
		if got := shell(t, line+" -Atc '"+sql+"'"); !strings.Contains(got, want) {
			t.Errorf("through a gateway, %s: %s, want %s", sql, got, want)
		}
	}
	kept.checkReplication(t, r.dir)
	shell(t, kept.Stop)
	r.wantNothingLeft(t)
}

// checkReplication writes a row at B and waits for it at A.
func (k *Kept) checkReplication(t *testing.T, dir string) {
	t.Helper()
	var conns [2]*pgconn.PgConn
	for i, name := range siteNames {
		socket, err := filepath.Glob(filepath.Join(dir, "pg-"+name, ".s.PGSQL.*[0-9]"))
		if err != nil || len(socket) != 1 {
			t.Fatalf("sockets of %s: %v, %v", name, socket, err)
		}
		port := socket[0][strings.LastIndexByte(socket[0], '.')+1:]
		dsn := fmt.Sprintf("host=%s port=%s user=postgres sslmode=disable", filepath.Dir(socket[0]), port)
		if conns[i], err = pg.Connect(t.Context(), dsn, database, nil); err != nil {
			t.Fatal(err)
		}
		defer pg.Close(conns[i])
	}
	if _, err := pg.Rows(t.Context(), conns[1], "UPDATE finance.fund SET notice = 'written after the demo' WHERE id = 1"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "A has what was written at B after the demo", func() bool {
		rows, err := pg.Rows(t.Context(), conns[0], "SELECT notice FROM finance.fund WHERE id = 1")
		return err == nil && rows[0][0] == "written after the demo"
	})
}

// shell runs a command line that the demo printed.
func shell(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

func TestPortInUseIsOneSentenceWithAHint(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	r := startDemo(t, "--port-base", port, "--json")
	if code := r.wait(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	lines := strings.Split(strings.TrimSpace(r.progress()), "\n")
	if len(lines) != 2 || lines[0] != "duri: port "+port+" is in use" || !strings.HasPrefix(lines[1], "hint: name another first port with --port-base") {
		t.Errorf("printed %q", lines)
	}
	if r.stdout.Len() > 0 {
		t.Errorf("stdout %q", r.stdout.String())
	}
	r.wantNothingLeft(t)
}

// checkClients checks that no client noticed anything, and that gateways saw to that.
func (r Report) checkClients(t *testing.T) {
	t.Helper()
	t.Logf("client errors %d, made again %d, unknown %d, stalls %d/%d/%d ms, answers lost %d, of them resolved %d, moves %d",
		r.ClientErrors, r.Retries, r.InDoubtUnknown, r.StallMSP50, r.StallMSP99, r.StallMSMax, r.GatewayInDoubt, r.InDoubtResolved, r.Rehomed)
	if r.ClientErrors != 0 || r.RPO0 && (r.InDoubtUnknown != 0 || r.InDoubt != 0 || r.InDoubtResolved != r.GatewayInDoubt) {
		t.Errorf("clients noticed: %d errors, %d in doubt", r.ClientErrors, r.InDoubt)
	}
	if r.StallMSP50 <= 0 || r.StallMSP99 < r.StallMSP50 || r.StallMSMax < r.StallMSP99 {
		t.Errorf("stalls: p50 %d, p99 %d, max %d ms", r.StallMSP50, r.StallMSP99, r.StallMSMax)
	}
	if r.Rehomed == 0 {
		t.Error("no transaction was at another site than the one before, so gateways have not done anything")
	}
}

// TestRPO0NoClientNotices: with a witness, all that A had acknowledged is at B when A, or its PostgreSQL alone, dies; clients keep
// their connections and see no error, and A's clients go home when the register has taken A back.
func TestRPO0NoClientNotices(t *testing.T) {
	for _, kill := range []string{KillSite, KillPostgres} {
		t.Run(kill, func(t *testing.T) {
			r := startDemo(t, "--rpo0", "--kill", kill, "--duration", "8s", "--json")
			if code := r.wait(); code != 0 {
				t.Fatalf("exit code %d", code)
			}
			rep := r.report(t)
			rep.checkClients(t)
			if !rep.OK || !rep.RPO0 || rep.Killed != kill || rep.NotYetAtB != 0 || rep.Acknowledged == 0 || rep.Lost != 0 {
				t.Errorf("%+v", rep)
			}
			for _, text := range []string{"RPO 0", "IS DOWN, no client noticed: 0 errors"} {
				if !strings.Contains(r.progress(), text) {
					t.Errorf("it does not say %q", text)
				}
			}
			r.wantNothingLeft(t)
		})
	}
}
