package demo

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/term"
)

func TestThereAre243Governments(t *testing.T) {
	tiers, titles := map[string]int{}, map[string]bool{}
	for i, g := range governments() {
		if g.id != i+1 {
			t.Errorf("%s has number %d, want %d", g.title(), g.id, i+1)
		}
		tiers[g.tier()]++
		titles[g.title()] = true
	}
	if tiers["광역"] != 17 || tiers["기초"] != 226 || len(titles) != 243 {
		t.Errorf("%v governments with %d different names, want 17 광역 and 226 기초 with 243", tiers, len(titles))
	}
}

func TestCommitOutcome(t *testing.T) {
	pgError := func(severity, code string) error {
		return fmt.Errorf("commit: %w", &pgconn.PgError{Severity: severity, Code: code})
	}
	for _, c := range []struct {
		name string
		tag  string
		err  error
		want outcome
	}{
		{"answered", "COMMIT", nil, committed},
		{"in a failed transaction", "ROLLBACK", nil, rolledBack},
		{"deferred constraint", "", pgError("ERROR", "23503"), rolledBack},
		{"deadlock", "", pgError("ERROR", "40P01"), rolledBack},
		{"server shuts down", "", pgError("FATAL", "57P01"), unknown},
		{"server crashes", "", pgError("WARNING", "57P02"), unknown},
		{"connection reset", "", io.ErrUnexpectedEOF, unknown},
		{"timeout", "", os.ErrDeadlineExceeded, unknown},
		{"no answer at all", "", nil, unknown},
	} {
		if got := commitOutcome(c.tag, c.err); got != c.want {
			t.Errorf("%s: %c, want %c", c.name, got, c.want)
		}
	}
}

func TestUUIDsAreOfVersion7AndDiffer(t *testing.T) {
	form := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	const seed = 1
	rng, seen := rand.New(rand.NewPCG(seed, seed)), map[string]bool{}
	now := time.UnixMilli(0x0123456789ab)
	for range 1000 {
		u := newUUID(now, rng)
		if !form.MatchString(u) || !strings.HasPrefix(u, "01234567-89ab-") || seen[u] {
			t.Fatalf("seed %d: %q (seen before: %v)", seed, u, seen[u])
		}
		seen[u] = true
	}
}

// TestClientsWriteMostlyTheirHalf makes sure that sites meet on rows, but not all the time.
func TestClientsWriteMostlyTheirHalf(t *testing.T) {
	const seed, n = 3, 4000
	for home := range 2 {
		c := &client{home: home, rng: rand.New(rand.NewPCG(seed, 1)), places: governments()}
		foreign, fund := 0, 0
		for range n {
			tr := c.choose()
			if (tr.place.id-1)%2 != home {
				foreign++
			}
			if tr.fund > 0 {
				fund++
			}
			if tr.line < 1 || tr.line > len(budgetLines) || tr.fund > funds || tr.amount <= 0 {
				t.Fatalf("seed %d: payment out of range: %+v", seed, tr)
			}
		}
		for name, got := range map[string]int{"foreign": foreign, "fund": fund} {
			if got < n/20 || got > n/5 {
				t.Errorf("seed %d, home %d: %d of %d payments are %s, want about a tenth", seed, home, got, n, name)
			}
		}
	}
}

func TestVersionsBefore15AreRefused(t *testing.T) {
	for version, ok := range map[string]bool{"15.0": true, "15.20": true, "18": true, "19rc1": true, "14.9": false, "9.6.24": false, "": false, "devel": false} {
		err := checkVersion("/pg/bin", version)
		if (err == nil) != ok {
			t.Errorf("version %q: %v", version, err)
		}
	}
	var e *Error
	if err := checkVersion("/pg/bin", "14.9"); !errors.As(err, &e) || e.Hint == "" {
		t.Errorf("%v has no hint", err)
	}
}

// TestOldServerIsRefusedBeforeAnythingIsMade runs against programs that say they are version 14.
func TestOldServerIsRefusedBeforeAnythingIsMade(t *testing.T) {
	bin, dir := t.TempDir(), filepath.Join(t.TempDir(), "demo")
	for _, p := range []string{"postgres", "initdb", "pg_ctl"} {
		if err := os.WriteFile(filepath.Join(bin, p), []byte("#!/bin/sh\necho 'postgres (PostgreSQL) 14.12'\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	_, err := Run(t.Context(), Options{BinDir: bin, Dir: dir})
	wantError(t, err, "14.12", "--pg-bin")
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory was made: %v", err)
	}
}

func TestBadSurroundingsAreNamed(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	busy := l.Addr().(*net.TCPAddr).Port
	exists := t.TempDir()
	for _, c := range []struct {
		name       string
		o          Options
		text, hint string
	}{
		{"port in use", Options{PortBase: busy}, fmt.Sprintf("port %d is in use", busy), "--port-base"},
		{"one of the block in use", Options{PortBase: busy - 3}, "is in use", "--port-base"},
		{"port out of range", Options{PortBase: 65534}, "65534", "65530"},
		{"no PostgreSQL there", Options{BinDir: exists}, "does not hold postgres", "directory"},
		{"directory exists", Options{Dir: exists}, "exists already", "--stop"},
		{"no parent", Options{Dir: filepath.Join(exists, "x", "y")}, "no such file", "parent"},
		{"too short", Options{Duration: time.Second}, "too short", "5s"},
		{"too many clients", Options{Clients: 100}, "100 clients", "20"},
		{"nothing that can be killed", Options{Kill: "kernel"}, "\"kernel\" cannot", "site, postgres, agent"},
		{"too fast", Options{Rate: 1e6}, "1000000", "5000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Run(t.Context(), c.o)
			wantError(t, err, c.text, c.hint)
		})
	}
	if entries, err := os.ReadDir(exists); err != nil || len(entries) > 0 {
		t.Errorf("something was made: %v, %v", entries, err)
	}
	wantError(t, enoughDisk("/x", 1<<30-1), "1023 MiB", "--dir")
	if err := enoughDisk("/x", 1<<30); err != nil {
		t.Error(err)
	}
}

// wantError checks an error's text and its hint.
func wantError(t *testing.T, err error, text, hint string) {
	t.Helper()
	var h interface{ HintText() string }
	if err == nil || !strings.Contains(err.Error(), text) || !errors.As(err, &h) || !strings.Contains(h.HintText(), hint) {
		var out bytes.Buffer
		if err != nil {
			term.PrintError(&out, err, term.Style{})
		}
		t.Errorf("error %q, want %q with a hint that names %q", out.String(), text, hint)
	}
}

func TestStartTicksReadsAnyName(t *testing.T) {
	tail := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21"
	for _, name := range []string{"duri", "a b", "x) S 1 2 3", "(("} {
		if got, err := startTicks("42 (" + name + ")" + tail); err != nil || got != 4711 {
			t.Errorf("name %q: %d, %v", name, got, err)
		}
	}
	for _, bad := range []string{"", "42", "42 (x) S 1", "42 (x) Z" + tail[2:]} {
		if _, err := startTicks(bad); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

// TestOnlyTheVeryProcessIsEnded: a number that belongs to another process by now is left alone.
func TestOnlyTheVeryProcessIsEnded(t *testing.T) {
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		err := <-ended
		t.Logf("the process: %v", err)
	})
	id, err := identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range []procID{{id.PID, id.Start - 1, id.Boot}, {id.PID, id.Start, "another boot"}} {
		if err := other.end(t.Context(), 0); err != nil {
			t.Error(err)
		}
		if !id.running() {
			t.Fatal("another process was ended")
		}
	}
	if err := id.end(t.Context(), time.Minute); err != nil {
		t.Error(err)
	}
	if id.running() {
		t.Error("the process still runs")
	}
	err = <-ended
	ended <- err
	if err == nil {
		t.Error("the process ended by itself")
	}
}

func TestStopRefusesWhatIsNoDemo(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "precious")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wantError(t, Stop(t.Context(), dir), "not the directory of a demo", "printed")
	if err := os.WriteFile(filepath.Join(dir, stateName), []byte(`{"format":"else"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	wantError(t, Stop(t.Context(), dir), "of another kind", "printed")
	wantError(t, Stop(t.Context(), filepath.Join(dir, "none")), "no directory", "printed")
	self, err := identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := (state{Demo: self}).save(dir); err != nil {
		t.Fatal(err)
	}
	wantError(t, Stop(t.Context(), dir), "still runs", "Ctrl-C")
	elsewhere := state{Kept: true, Clusters: []string{"/elsewhere/pg"}}
	if err := elsewhere.save(dir); err != nil {
		t.Fatal(err)
	}
	if err := Stop(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "not in the demo's directory") {
		t.Errorf("a foreign cluster was taken: %v", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

func TestAgentsDoNotInheritOverrides(t *testing.T) {
	got := agentEnvironment([]string{"PATH=/bin", "PGHOST=x", "DURI_SITE=x", "DURI_LOG_LEVEL=debug", "PGPASSWORD=x"}, "/pg/bin")
	want := "PATH=/bin DURI_LOG_LEVEL=debug DURI_POSTGRES_BIN_DIR=/pg/bin"
	if strings.Join(got, " ") != want {
		t.Errorf("environment %q, want %q", got, want)
	}
}

func TestPanelLinesUpWithKoreanNames(t *testing.T) {
	g := glance{
		phase: "A is down", names: [2]string{"A (서울)", "B (busan)"}, up: [2]bool{false, true}, linked: [2]bool{false, true}, acknowledged: [2]int64{1234, 99},
		rate: [2]float64{0, 401.6}, behind: [2]int64{0, 5}, lag: [2]float64{0, 0.25}, conflicts: [2]int64{0, 7}, latest: "경기도 수원시 · x",
		gateways: [2]gatewayGlance{{name: "gw-서울", up: true, at: [2]int{1, 3}, elsewhere: 1, waiting: 2}, {name: "gw-busan"}},
		clients:  clientGlance{dead: "A (서울)", retries: 3, killed: true, stall: 310 * time.Millisecond, now: 2 * time.Second},
	}
	lines := g.panel()
	want := []string{
		"",
		"  A IS DOWN",
		"             PAYMENTS/S  ACKNOWLEDGED     LAG  CONFLICTS",
		"  A (서울)         down         1,234       -          -",
		"  B (busan)         402            99  0.25 s          7",
		"",
		"            SESSIONS  AT A  AT B  WAITING",
		"  gw-서울          5     1     3        2",
		"  gw-busan      down     -     -        -",
		"  A (서울) IS DOWN, no client noticed: 0 errors, 3 made again, longest wait 310 ms, waiting now: 2 s",
		"  경기도 수원시 · x",
	}
	if got := strings.Join(lines, "\n"); got != strings.Join(want, "\n") {
		t.Errorf("panel:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
	}
	g.up[0] = true
	if got := g.line(); !strings.Contains(got, "A (서울) 0/s, lag no link | B (busan) 402/s, lag 0.25 s") {
		t.Errorf("line: %s", got)
	}
	g.clients = clientGlance{errors: 2, killed: true}
	if got := g.line(); !strings.Contains(got, "| CLIENTS NOTICED: 2 errors, 0 made again, longest wait 0 s") {
		t.Errorf("line: %s", got)
	}
	g.clients = clientGlance{}
	if got := g.line(); !strings.HasSuffix(got, "| client errors 0, 0 made again") {
		t.Errorf("line: %s", got)
	}
	if got, want := clip("경기도 수원시", 5), "경기"; got != want {
		t.Errorf("clip gives %q, want %q", got, want)
	}
}

func TestScreenWithoutTerminalPrintsLines(t *testing.T) {
	var out bytes.Buffer
	s := newScreen(&out, false)
	s.say("hello %d", 1)
	s.show([]string{"panel"}, "line")
	s.clear()
	if got, want := out.String(), "00:00  hello 1\n00:00  line\n"; got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
}

func TestScreenRedrawsThePanelOnATerminal(t *testing.T) {
	var out bytes.Buffer
	s := newScreen(&out, true)
	s.tty = true
	s.show([]string{"one", "two"}, "")
	s.show([]string{"three"}, "")
	s.say("stays")
	s.clear()
	if got, want := out.String(), "one\ntwo\n\x1b[2A\r\x1b[Jthree\n\x1b[1A\r\x1b[J00:00  stays\n"; got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
}

func TestShellCommandIsReadBackByAShell(t *testing.T) {
	words := []string{"printf", "%s|", "plain", "two words", "it's", "", "$HOME", "서울", "a=b"}
	out, err := exec.Command("sh", "-c", shellCommand(words...)).Output()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(out), strings.Join(words[2:], "|")+"|"; got != want {
		t.Errorf("the shell read %q, want %q", got, want)
	}
}

func TestReportPrintsVerdictAndJSONNames(t *testing.T) {
	r := Report{
		OK: true, Acknowledged: 12345, Converged: true, VerifyEqual: true, TablesEqual: true, ConflictKinds: map[string]int{"update_origin_differs": 3},
		FirstConflicts: []ConflictLine{{Site: "seoul", Kind: "update_origin_differs", Table: "finance.fund", Key: `{"id":"1"}`, Winner: "busan"}},
	}
	var out bytes.Buffer
	if err := r.Print(&out, term.Style{}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"PASSED", "12,345", "update_origin_differs 3", "finance.fund", "sum at A"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the report does not hold %q:\n%s", want, out.String())
		}
	}
	r.OK, r.Problems = false, []string{"something"}
	out.Reset()
	if err := r.Print(&out, term.Style{}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "FAILED") || !strings.Contains(out.String(), "something") || strings.Contains(out.String(), "PASSED") {
		t.Errorf("a failed report:\n%s", out.String())
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(b, &fields); err != nil {
		t.Fatal(err)
	}
	for name := range strings.FieldsSeq("acknowledged lost doubled conflicts converged kill_at back_at tables_equal in_doubt payments_a payments_b " +
		"sum_client sum_a sum_b failover_ms catchup_ms seed phases client_errors retries stall_ms_p50 stall_ms_p99 stall_ms_max gateway_in_doubt " +
		"in_doubt_resolved in_doubt_unknown rehomed killed") {
		if _, ok := fields[name]; !ok {
			t.Errorf("the document has no %s", name)
		}
	}
}

func TestStallIsTheLongestWaitThatTroubleTouched(t *testing.T) {
	t0 := time.Unix(1000, 0)
	at := func(ms int) time.Time { return t0.Add(time.Duration(ms) * time.Millisecond) }
	for _, c := range []struct {
		name  string
		waits []wait
		want  time.Duration
	}{
		{"none", nil, 0},
		{"before and behind", []wait{{at(-900), at(-1)}, {at(1000), at(5000)}}, 0},
		{"begun before it", []wait{{at(-200), at(300)}, {at(310), at(400)}}, 500 * time.Millisecond},
		{"goes on behind it", []wait{{at(10), at(20)}, {at(900), at(1900)}}, time.Second},
		{"within", []wait{{at(10), at(20)}, {at(100), at(180)}, {at(200), at(201)}}, 80 * time.Millisecond},
	} {
		if got := stallOf(c.waits, t0, at(1000)); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestAWaitEndsWithItsAnswerOnly(t *testing.T) {
	var w waits
	w.begin()
	first := w.since
	w.begin() // asked again
	if w.since != first {
		t.Error("asking again began another wait")
	}
	if all := w.all(first.Add(time.Second)); len(all) != 1 || all[0] != (wait{first, first.Add(time.Second)}) {
		t.Errorf("waits for now: %v", all)
	}
	w.end()
	if all := w.all(first.Add(time.Hour)); len(all) != 1 || all[0].from != first || all[0].to.Equal(first.Add(time.Hour)) {
		t.Errorf("waits in the end: %v", all)
	}
}

func TestPercentileIsOfTheNearestRank(t *testing.T) {
	values := []time.Duration{40, 10, 30, 20}
	for share, want := range map[float64]time.Duration{0.5: 20, 0.51: 30, 0.99: 40, 1: 40, 0.01: 10} {
		if got := percentile(values, share); got != want {
			t.Errorf("%v: %d, want %d", share, got, want)
		}
	}
	if percentile(nil, 0.5) != 0 || values[0] != 40 {
		t.Errorf("of nothing: %d; the values became %v", percentile(nil, 0.5), values)
	}
}

func TestConcludeNamesWhatClientsNoticed(t *testing.T) {
	good := Report{VerifyEqual: true, Acknowledged: 1, Tables: []TableCheck{{Name: "t", Equal: true}}}
	for name, c := range map[string]struct {
		change func(*Report)
		want   string
	}{
		"nothing":                        {func(*Report) {}, ""},
		"transactions made again":        {func(r *Report) { r.Retries = 3 }, ""},
		"an error":                       {func(r *Report) { r.ClientErrors = 1 }, "clients noticed: 1 errors"},
		"unknown, with a register":       {func(r *Report) { r.RPO0, r.InDoubtUnknown = true, 2 }, "2 COMMITs were answered"},
		"unknown, which nobody can tell": {func(r *Report) { r.InDoubtUnknown = 2 }, ""},
	} {
		r := good
		c.change(&r)
		r.conclude(true)
		if got := strings.Join(r.Problems, "\n"); r.OK != (c.want == "") || !strings.Contains(got, c.want) || (c.want == "") != (got == "") {
			t.Errorf("%s: ok %v, %q, want %q", name, r.OK, got, c.want)
		}
	}
}
