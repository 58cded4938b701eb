package pgcluster

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestNewestMajorIsChosenByNumberNotByText(t *testing.T) {
	got, _ := newest([]string{"/usr/lib/postgresql/9/bin", "/usr/pgsql-17/bin", "/usr/lib/postgresql/15/bin", "/x/tools/bin"})
	if want := "/usr/pgsql-17/bin"; got != want {
		t.Errorf("newest = %s, want %s", got, want)
	}
	if got, ok := newest(nil); ok {
		t.Errorf("newest of none = %s", got)
	}
}

// fakeBin makes a directory with the named programs.
func fakeBin(t *testing.T, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, n := range names {
		if err := os.WriteFile(filepath.Join(dir, n), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFindBinDirPrefersExplicitThenEnvironmentThenPath(t *testing.T) {
	explicit, env, onPath := fakeBin(t, programs...), fakeBin(t, programs...), fakeBin(t, programs...)
	links := t.TempDir()
	if err := os.Symlink(filepath.Join(onPath, "postgres"), filepath.Join(links, "postgres")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", links)
	for _, step := range []struct{ explicit, env, want string }{
		{explicit, env, explicit},
		{"", env, env},
		{"", "", onPath},
	} {
		t.Setenv(EnvBinDir, step.env)
		got, err := FindBinDir(step.explicit)
		if err != nil || got != step.want {
			t.Errorf("FindBinDir(%q) with %s=%q = %q, %v; want %q", step.explicit, EnvBinDir, step.env, got, err, step.want)
		}
	}
}

func TestFindBinDirRefusesANamedDirectoryThatLacksPrograms(t *testing.T) {
	partial := fakeBin(t, "postgres", "pg_ctl")
	t.Setenv(EnvBinDir, partial)
	for _, explicit := range []string{partial, ""} {
		_, err := FindBinDir(explicit)
		if err == nil || !strings.Contains(err.Error(), "initdb") || HintOf(err) == "" {
			t.Errorf("FindBinDir(%q): %v (hint %q), want an error that names initdb, with a hint", explicit, err, HintOf(err))
		}
	}
}

func TestFindBinDirHintsAtTheInstallation(t *testing.T) {
	old := installed
	installed = []string{filepath.Join(t.TempDir(), "*", "bin")}
	t.Cleanup(func() { installed = old })
	t.Setenv(EnvBinDir, "")
	t.Setenv("PATH", t.TempDir())
	if _, err := FindBinDir(""); !strings.Contains(HintOf(err), "apt-get install postgresql") {
		t.Errorf("err %v, hint %q", err, HintOf(err))
	}
}

func TestRootRunsServersAsAnotherUser(t *testing.T) {
	lookup := func(known ...string) func(string) (*user.User, error) {
		return func(name string) (*user.User, error) {
			if slices.Contains(known, name) {
				return &user.User{Username: name, Uid: "101", Gid: "104"}, nil
			}
			return nil, errors.New("unknown")
		}
	}
	for _, c := range []struct {
		euid  int
		known []string
		want  string
		fails bool
	}{
		{euid: 1000, known: []string{"postgres"}, want: ""},
		{euid: 0, known: []string{"nobody", "postgres"}, want: "postgres"},
		{euid: 0, known: []string{"nobody"}, want: "nobody"},
		{euid: 0, fails: true},
	} {
		got, err := chooseUser(c.euid, lookup(c.known...))
		if got.name != c.want || (err != nil) != c.fails || got.change != (c.want != "") {
			t.Errorf("euid %d, users %v: %+v, %v; want %q", c.euid, c.known, got, err, c.want)
		}
	}
}

func TestCanSearchReadsTheClassThatApplies(t *testing.T) {
	u := runAs{uid: 101, gid: 104}
	for _, c := range []struct {
		mode     os.FileMode
		uid, gid uint32
		want     bool
	}{
		{0o755, 0, 0, true},
		{0o700, 0, 0, false},
		{0o700, 101, 0, true},
		{0o077, 101, 104, false}, // The owner's bits apply to the owner alone, even when others have more.
		{0o710, 0, 104, true},
		{0o701, 0, 104, false},
	} {
		if got := u.canSearch(c.mode, c.uid, c.gid); got != c.want {
			t.Errorf("canSearch(%o, uid %d, gid %d) = %v", c.mode, c.uid, c.gid, got)
		}
	}
}

func TestPortRangeKeepsOutOfTheEphemeralRange(t *testing.T) {
	for _, c := range []struct{ lo, hi, from, to int }{
		{32768, 60999, 20000, 32767},
		{15000, 45000, 45001, 65535},
		{1024, 65535, 20000, 65535}, // Nothing is left; take what there is.
		{1024, 5000, 20000, 65535},
	} {
		if from, to := portRange(c.lo, c.hi); from != c.from || to != c.to {
			t.Errorf("portRange(%d, %d) = %d, %d; want %d, %d", c.lo, c.hi, from, to, c.from, c.to)
		}
	}
}

func TestALeasedPortIsNotGivenTwice(t *testing.T) {
	a, err := leaseFreePort()
	if err != nil {
		t.Fatal(err)
	}
	defer a.release()
	if b, err := leasePort(a.port); err == nil {
		b.release()
		t.Fatalf("port %d was leased twice", a.port)
	}
	a.release()
	b, err := leasePort(a.port)
	if err != nil {
		t.Fatalf("port %d cannot be leased after its release: %v", a.port, err)
	}
	b.release()
}

func TestSettingsOverrideDefaultsAndAreQuoted(t *testing.T) {
	conf, err := renderConf(map[string]string{"FSYNC": "off", "duri.note": `it's a \ test`}, 5433, "/tmp/x")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"fsync = 'off'", `duri.note = 'it''s a \\ test'`, "port = '5433'", "unix_socket_directories = '/tmp/x'",
		"wal_level = 'logical'", "track_commit_timestamp = 'on'", "max_wal_senders = '20'", "max_replication_slots = '20'",
	} {
		if strings.Count(conf, line+"\n") != 1 {
			t.Errorf("line %q is there %d times in:\n%s", line, strings.Count(conf, line+"\n"), conf)
		}
	}
	if strings.Contains(conf, "'on'\nfsync") || strings.Count(conf, "fsync") != 1 {
		t.Errorf("fsync is set twice:\n%s", conf)
	}
}

func TestBadSettingsAreRefused(t *testing.T) {
	for name, value := range map[string]string{
		"port": "1", "Unix_Socket_Directories": "/tmp", "a b": "1", "": "1", "x'": "1", "work_mem": "1\nfsync = off",
	} {
		if _, err := renderConf(map[string]string{name: value}, 1, "/"); err == nil {
			t.Errorf("setting %q = %q was taken", name, value)
		}
	}
}

func TestDSNQuote(t *testing.T) {
	for in, want := range map[string]string{"shop": "shop", "": "''", "a b": "'a b'", `it's\`: `'it\'s\\'`, "a=b": "'a=b'"} {
		if got := dsnQuote(in); got != want {
			t.Errorf("dsnQuote(%q) = %s, want %s", in, got, want)
		}
	}
}

func TestSegmentsAreReadFromTheMaps(t *testing.T) {
	const maps = `55d0-55d1 r-xp 00000000 fe:00 396 /usr/lib/postgresql/15/bin/postgres
7f8b-7f8c rw-s 00000000 00:19 1054 /dev/shm/PostgreSQL.2784551566
7f8b-7f8c rw-s 00000000 00:01 2070 /dev/zero (deleted)
7f8d-7f8e rw-s 00000000 00:01 5 /SYSV0000f3a1 (deleted)
7f8d-7f8e rw-s 00001000 00:01 5 /SYSV0000f3a1 (deleted)
7ffc-7ffd rw-p 00000000 00:00 0 [stack]
7ffc-7ffd rw-p 00000000 00:00 0
`
	want := []segment{{path: "/dev/shm/PostgreSQL.2784551566", inode: 1054, shmID: -1}, {shmID: 5}}
	if diff := cmp.Diff(want, parseSegments(maps), cmp.AllowUnexported(segment{})); diff != "" {
		t.Errorf("segments (-want +got):\n%s", diff)
	}
}

func TestDynamicSegmentsAreFoundInTheControlSegment(t *testing.T) {
	control := binary.NativeEndian.AppendUint32(nil, 0x9a503d32)
	for _, word := range []uint32{2, 64, 105996020, 2, 7, 0, 3222585736} {
		control = binary.NativeEndian.AppendUint32(control, word)
	}
	paths := []string{
		"/dev/shm/PostgreSQL.3222585736", "/dev/shm/PostgreSQL.617063030", "/dev/shm/PostgreSQL.105996020",
		"/dev/shm/PostgreSQL.x", "/dev/shm/PostgreSQL.99999999999",
	}
	want := []string{"/dev/shm/PostgreSQL.3222585736", "/dev/shm/PostgreSQL.105996020"}
	if diff := cmp.Diff(want, listedIn(control, paths)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	control[0]++
	if got := listedIn(control, paths); got != nil {
		t.Errorf("found %v in a segment that is not a control segment", got)
	}
	if got := listedIn(nil, paths); got != nil {
		t.Errorf("found %v in no bytes", got)
	}
}

func TestControlFileIsPatchedWhereverItsChecksumIs(t *testing.T) {
	for _, size := range []int{288, 296, 304} {
		b := make([]byte, 8192)
		for i := range size {
			b[i] = byte(i * 7)
		}
		binary.NativeEndian.PutUint32(b[size:], crc32.Checksum(b[:size], castagnoli))
		before := binary.NativeEndian.Uint64(b)
		old, err := patchControl(b, 42)
		if err != nil || old != before {
			t.Fatalf("size %d: old = %d, %v; want %d", size, old, err, before)
		}
		if got := binary.NativeEndian.Uint64(b); got != 42 {
			t.Errorf("size %d: identifier %d, want 42", size, got)
		}
		if crc32.Checksum(b[:size], castagnoli) != binary.NativeEndian.Uint32(b[size:]) {
			t.Errorf("size %d: the checksum is wrong", size)
		}
	}
}

func TestADamagedControlFileIsRefused(t *testing.T) {
	for _, n := range []int{0, 3, 130, 8192} {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i*31 + 1)
		}
		if _, err := patchControl(b, 1); err == nil {
			t.Errorf("%d bytes without a checksum were patched", n)
		}
	}
}

func TestSystemIDHoldsTheTime(t *testing.T) {
	now := time.Unix(1764104400, 0)
	if id := newSystemID(now, 0xFFFFFFFF_00000007); id != 1764104400<<32|7 {
		t.Errorf("id = %x", id)
	}
}

func TestParseVersion(t *testing.T) {
	for in, want := range map[string]string{
		"postgres (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)\n": "15.20",
		"postgres (PostgreSQL) 19rc1\n":                          "19rc1",
		"postgres 15":                                            "",
		"postgres (PostgreSQL) ":                                 "",
	} {
		got, err := parseVersion(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("parseVersion(%q) = %q, %v", in, got, err)
		}
	}
}

func TestTailGivesTheLastLines(t *testing.T) {
	if got := tail("a\n\nb\n \nc\n", 2); got != "b\nc" {
		t.Errorf("tail = %q", got)
	}
}
