package pgtest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"

	"github.com/duri-io/duri/internal/pgcluster"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder is a testing.TB that records failures, so that a test can see that a failing set-up fails the test.
type recorder struct {
	testing.TB
	failed   string
	cleanups []func()
}

// stop is what Fatalf panics with, in place of ending a goroutine.
type stop struct{}

func (r *recorder) Helper()                  {}
func (r *recorder) Logf(string, ...any)      {}
func (r *recorder) Context() context.Context { return context.Background() }
func (r *recorder) Failed() bool             { return r.failed != "" }
func (r *recorder) Cleanup(f func())         { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Errorf(f string, a ...any) {
	r.failed += fmt.Sprintf(f, a...)
}

func (r *recorder) Fatalf(f string, a ...any) {
	r.Errorf(f, a...)
	panic(stop{})
}

// run calls f with the recorder, then the cleanups, and gives what failed.
func (r *recorder) run(f func(testing.TB)) string {
	func() {
		defer func() {
			if v := recover(); v != nil && v != (stop{}) {
				panic(v)
			}
		}()
		f(r)
	}()
	for _, c := range slices.Backward(r.cleanups) {
		c()
	}
	return r.failed
}

func TestClustersAreQuickAndHaveTheirOwnIdentity(t *testing.T) {
	const identity = "SELECT system_identifier FROM pg_control_system()"
	a, b := New(t), New(t)
	idA, idB := Query(t, a, "postgres", identity)[0][0], Query(t, b, "postgres", identity)[0][0]
	if idA == idB {
		t.Errorf("both clusters have system identifier %s", idA)
	}
	if a.Port() == b.Port() {
		t.Errorf("both clusters have port %d", a.Port())
	}
	for setting, want := range map[string]string{"fsync": "off", "full_page_writes": "off", "wal_level": "logical"} {
		if got := Query(t, a, "postgres", "SHOW "+setting)[0][0]; got != want {
			t.Errorf("%s = %s, want %s", setting, got, want)
		}
	}
}

func TestClusterIsGoneAfterItsTest(t *testing.T) {
	var dir string
	failed := (&recorder{}).run(func(tb testing.TB) {
		c := New(tb)
		dir = filepath.Dir(c.Dir())
		if _, err := os.Stat(dir); err != nil {
			t.Error(err)
		}
	})
	if failed != "" {
		t.Errorf("the test failed: %s", failed)
	}
	if _, err := os.Lstat(dir); err == nil {
		t.Errorf("%s is left", dir)
	}
}

func TestOptions(t *testing.T) {
	c := New(t, WithFsync(), WithSetting("WORK_MEM", "5MB"), WithPassword("pw"))
	for setting, want := range map[string]string{"fsync": "on", "full_page_writes": "on", "work_mem": "5MB"} {
		if got := Query(t, c, "postgres", "SHOW "+setting)[0][0]; got != want {
			t.Errorf("%s = %s, want %s", setting, got, want)
		}
	}
	if !strings.HasPrefix(c.Dir(), os.TempDir()) {
		t.Errorf("a durable cluster is in %s", c.Dir())
	}
	if c := New(t, Stopped()); c.Running() {
		t.Error("a stopped cluster runs")
	}
}

func TestDBGivesAConnectionStringToANewDatabase(t *testing.T) {
	c := New(t)
	const name = `my "shop"`
	conn, err := pgconn.Connect(t.Context(), DB(t, c, name))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	res, err := conn.Exec(t.Context(), "SELECT current_database()").ReadAll()
	if err != nil || string(res[0].Rows[0][0]) != name {
		t.Errorf("database %s, %v; want %s", res[0].Rows[0][0], err, name)
	}
}

func TestSetUpThatCannotBeHadFailsTheTest(t *testing.T) {
	for name, f := range map[string]func(testing.TB){
		"no programs": func(tb testing.TB) { New(tb, WithMajor(Major{99, "/nonexistent"})) },
		"bad setting": func(tb testing.TB) { New(tb, WithSetting("shared_buffers", "nonsense")) },
	} {
		if failed := (&recorder{}).run(f); failed == "" {
			t.Errorf("%s: the test did not fail", name)
		}
	}
}

func TestEveryMajorRuns(t *testing.T) {
	for _, m := range Majors(t) {
		t.Run(m.String(), func(t *testing.T) {
			c := New(t, WithMajor(m))
			got := Query(t, c, "postgres", "SELECT current_setting('server_version_num')::int / 10000")[0][0]
			if want := fmt.Sprint(m.Number); got != want {
				t.Errorf("major %s, want %s", got, want)
			}
		})
	}
}

func TestANamedMajorThatIsMissingFailsTheTest(t *testing.T) {
	found, err := pgcluster.FindBinDir("")
	if err != nil {
		t.Fatal(err)
	}
	for _, env := range []string{"16=/nonexistent", "99=" + found, "nonsense"} {
		t.Setenv(EnvMajors, env)
		if failed := (&recorder{}).run(func(tb testing.TB) { Majors(tb) }); !strings.Contains(failed, EnvMajors) {
			t.Errorf("%s=%s: %q", EnvMajors, env, failed)
		}
	}
}

func TestParseMajors(t *testing.T) {
	for _, c := range []struct {
		in   string
		want []Major
		bad  bool
	}{
		{in: ""},
		{in: "16=/a/bin:17=/b/bin", want: []Major{{16, "/a/bin"}, {17, "/b/bin"}}},
		{in: " 16=/a/bin :", want: []Major{{16, "/a/bin"}}},
		{in: "16=/a:16=/b", bad: true},
		{in: "16", bad: true},
		{in: "x=/a", bad: true},
		{in: "-1=/a", bad: true},
		{in: "16=relative", bad: true},
	} {
		got, err := parseMajors(c.in)
		if (err != nil) != c.bad {
			t.Errorf("%q: %v", c.in, err)
		} else if diff := cmp.Diff(c.want, got); !c.bad && diff != "" {
			t.Errorf("%q (-want +got):\n%s", c.in, diff)
		}
	}
}

func TestMergePutsANamedMajorInThePlaceOfTheFoundOne(t *testing.T) {
	found := Major{15, "/found"}
	if diff := cmp.Diff([]Major{{14, "/a"}, found, {16, "/b"}}, merge(found, []Major{{16, "/b"}, {14, "/a"}})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]Major{{15, "/named"}}, merge(found, []Major{{15, "/named"}})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestParseMajor(t *testing.T) {
	for in, want := range map[string]int{"15.20": 15, "19rc1": 19, "18": 18, "devel": 0, "": 0} {
		got, err := parseMajor(in)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("parseMajor(%q) = %d, %v", in, got, err)
		}
	}
}

func TestSweepRemovesWhatKilledProcessesLeftAndNothingElse(t *testing.T) {
	tmp := t.TempDir()
	mkdir := func(name string, withLock bool) string {
		dir := filepath.Join(tmp, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if withLock {
			if err := os.WriteFile(filepath.Join(dir, scratchLock), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	dead, living := mkdir(scratchPrefix+"1", true), mkdir(scratchPrefix+"2", true)
	foreign, unlocked := mkdir("other", true), mkdir(scratchPrefix+"3", false)
	lock, err := lockFile(t.Context(), filepath.Join(living, scratchLock))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()

	sweep(tmp, time.Hour)
	for _, dir := range []string{dead, living, foreign, unlocked} {
		if _, err := os.Stat(dir); err != nil {
			t.Errorf("a directory younger than the age was removed: %v", err)
		}
	}
	sweep(tmp, 0)
	if _, err := os.Stat(dead); err == nil {
		t.Error("a dead process's directory was left")
	}
	for _, dir := range []string{living, foreign, unlocked} {
		if _, err := os.Stat(dir); err != nil {
			t.Errorf("%s was removed: %v", dir, err)
		}
	}
}

func TestLockFileWaitsNoLongerThanItsContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	held, err := lockFile(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if f, err := lockFile(ctx, path); err == nil {
		f.Close()
		t.Error("a lock was given twice")
	}
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := lockFile(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

func TestMemAvailable(t *testing.T) {
	for in, want := range map[string]uint64{
		"MemTotal: 100 kB\nMemAvailable:   2048 kB\n": 2 << 20,
		"MemTotal: 100 kB\n":                          0,
		"MemAvailable: many kB":                       0,
	} {
		if got := memAvailable(in); got != want {
			t.Errorf("memAvailable(%q) = %d, want %d", in, got, want)
		}
	}
}
