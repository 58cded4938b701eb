package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/server"
)

// agent answers on a control socket as an agent does, with what the test wants, and notes what it was asked.
type agent struct {
	file   string // duri.yaml
	answer func(r *http.Request) (int, any)
	asked  []string // method, path and query; and the body of a POST
}

func newAgent(t *testing.T, answer func(*http.Request) (int, any)) *agent {
	t.Helper()
	dir, err := os.MkdirTemp("", "duri") // not of the test's name: a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	out := filepath.Join(dir, "c")
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"init", "--site", "seoul=h:1", "--site", "busan=h:2", "--database", "app", "--out", out}, &stdout, &stderr); code != 0 {
		t.Fatal(stderr.String())
	}
	a := &agent{file: filepath.Join(out, "seoul", "duri.yaml"), answer: answer}
	cfg, err := config.Load(a.file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", server.ControlSocket(cfg.DataDir))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: a, ReadHeaderTimeout: time.Second}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return a
}

func (a *agent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	asked := r.Method + " " + r.URL.Path
	if q := r.URL.Query(); len(q) > 0 {
		asked += "?" + q.Encode()
	}
	var body bytes.Buffer
	if _, err := body.ReadFrom(r.Body); err == nil && body.Len() > 0 {
		asked += " " + body.String()
	}
	a.asked = append(a.asked, asked) // one request after the other
	r.Body = http.NoBody
	code, v := a.answer(r)
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v)
}

// duri runs a command against the agent.
func (a *agent) duri(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(context.Background(), append(args, "-c", a.file), &out, &errs)
	return code, out.String(), errs.String()
}

var (
	second10 = time.Date(2026, 11, 25, 12, 0, 10, 0, time.UTC)
	lost     = catalog.Conflict{
		ID: 4711, At: second10, Kind: "update_origin_differs", Code: "won", Schema: "public", Table: "payment", Key: json.RawMessage(`{"id":"7"}`),
		Origin: 2, OriginLSN: 0x16B3748, OriginXID: 700, Change: 3, RemoteTime: second10.Add(-time.Second),
		RemoteRow: json.RawMessage(`{"id":"7","amount":"222"}`), LocalSite: 1, LocalTime: new(second10.Add(-2 * time.Second)),
		LocalRow: json.RawMessage(`{"id":"7","amount":"111"}`),
	}
)

func TestConflictListSendsItsFiltersAndPages(t *testing.T) {
	deleted := lost
	deleted.ID, deleted.Kind, deleted.Code, deleted.RemoteRow = 4710, "delete_origin_differs", "lost", nil
	missing := lost
	missing.ID, missing.Kind, missing.Code, missing.LocalRow, missing.LocalTime, missing.RemoteRow = 4709, "delete_missing", "", nil, nil, nil
	a := newAgent(t, func(*http.Request) (int, any) { return 200, []catalog.Conflict{lost, deleted, missing} })
	code, stdout, stderr := a.duri("conflict", "list", "--table", "public.payment", "--kind", "k", "--code", "lost", "--origin", "busan",
		"--key", "id=7", "--key", "8", "--since", "2026-11-25T21:00:00+09:00", "--until", "2026-11-26T00:00:00Z", "--before", "4712", "--limit", "3", "--exceptions", "--database", "app")
	want := "GET /v1/conflicts?before=4712&code=lost&database=app&exceptions=true&key=id%3D7&key=8&kind=k&limit=3&origin=busan" +
		"&since=2026-11-25T21%3A00%3A00%2B09%3A00&table=public.payment&until=2026-11-26T00%3A00%3A00Z"
	if d := cmp.Diff([]string{want}, a.asked); d != "" || code != 0 {
		t.Errorf("exit code %d %s\n%s", code, stderr, d)
	}
	table := `  ID  AT                    KIND                   TABLE           KEY         WINNER  LOSING ROW
4711  2026-11-25T12:00:10Z  update_origin_differs  public.payment  {"id":"7"}  remote  {"id":"7","amount":"111"}
4710  2026-11-25T12:00:10Z  delete_origin_differs  public.payment  {"id":"7"}  local   (delete)
4709  2026-11-25T12:00:10Z  delete_missing         public.payment  {"id":"7"}  -
`
	if d := cmp.Diff(table, stdout); d != "" {
		t.Error(d)
	}
	if stderr != "hint: older ones: the same with --before 4709\n" {
		t.Errorf("stderr %q", stderr)
	}
	if _, _, stderr = a.duri("conflict", "list", "--limit", "4"); stderr != "" {
		t.Errorf("the last page: %q", stderr)
	}
	if _, stdout, stderr = a.duri("conflict", "list", "--limit", "3", "-o", "json"); stderr != "" || !strings.HasPrefix(stdout, "[\n") {
		t.Errorf("json: %q %q", stdout, stderr)
	}
}

func TestConflictCommandsRefuseWrongUsage(t *testing.T) {
	a := newAgent(t, func(*http.Request) (int, any) { return 500, server.Problem{Error: "asked in vain"} })
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"list", "--since", "yesterday"}, `"yesterday" is not a time`},
		{[]string{"stats", "--until", "-1h"}, `"-1h" is not a time`},
		{[]string{"list", "--before", "x"}, `"x" is not the number of a record`},
		{[]string{"list", "--limit", "0"}, "--limit 0 is less than 1"},
		{[]string{"list", "--origin", "busam"}, `site "busam" is none of the cluster's (did you mean "busan"?)`},
		{[]string{"show"}, "takes one argument, the number of a record"},
		{[]string{"show", "0"}, `"0" is not the number of a record`},
		{[]string{"show", "1", "2"}, "takes one argument"},
		{[]string{"restore", "it"}, `"it" is not the number of a record`},
		{[]string{"restore", "1"}, "asks first, but there is no terminal"},
		{[]string{"restor", "1"}, `did you mean "restore"?`},
	} {
		code, stdout, stderr := a.duri(append([]string{"conflict"}, c.args...)...)
		if code != term.ExitUsage || stdout != "" || !strings.Contains(stderr, c.says) {
			t.Errorf("%v: exit code %d, %q, %q", c.args, code, stdout, stderr)
		}
	}
	if len(a.asked) > 0 {
		t.Errorf("the agent was asked: %v", a.asked)
	}
}

func TestMomentsAreTimesOrDurationsBeforeNow(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	for s, want := range map[string]time.Time{"2026-11-25T12:00:00Z": now, "24h": now.AddDate(0, 0, -1), "7d": now.AddDate(0, 0, -7), "1h30m": now.Add(-90 * time.Minute)} {
		if got, err := moment(s, now); err != nil || !got.Equal(want) {
			t.Errorf("%s: %v %v", s, got, err)
		}
	}
}

func detail() server.ConflictDetail {
	return server.ConflictDetail{
		Conflict: lost, OriginName: "busan", LocalName: "seoul",
		Verdict: catalog.Verdict{Winner: catalog.Remote, Rule: catalog.RuleLater, Text: "busan's update won over seoul's row: it was committed 1 s later"},
		Columns: []catalog.ColumnPair{
			{Column: "id", Local: json.RawMessage(`"7"`), Remote: json.RawMessage(`"7"`)},
			{Column: "amount", Local: json.RawMessage(`"111"`), Remote: json.RawMessage(`"222"`), Differs: true},
			{Column: "note", Local: json.RawMessage(`null`), Remote: json.RawMessage(`""`), Differs: true},
			{Column: "body", Local: json.RawMessage(`"x"`)},
		},
	}
}

func TestConflictShowPutsImagesSideBySide(t *testing.T) {
	a := newAgent(t, func(*http.Request) (int, any) { return 200, detail() })
	code, stdout, stderr := a.duri("conflict", "show", "4711")
	want := `conflict 4711: update_origin_differs in public.payment {"id":"7"}, recorded 2026-11-25T12:00:10.000000Z
busan's update won over seoul's row: it was committed 1 s later

   COLUMN  LOCAL seoul  REMOTE busan, won
   id      7            7
*  amount  111          222
*  note    NULL         ''
   body    x            -

remote  busan  2026-11-25T12:00:09.000000Z  transaction 700 at 0/16B3748, change 3
local   seoul  2026-11-25T12:00:08.000000Z

to bring the losing row back: duri conflict restore 4711 --dry-run
`
	if d := cmp.Diff(want, stdout); d != "" || code != 0 {
		t.Errorf("exit code %d %s\n%s", code, stderr, d)
	}
	if d := cmp.Diff([]string{"GET /v1/conflicts/4711"}, a.asked); d != "" {
		t.Error(d)
	}
	_, stdout, _ = a.duri("conflict", "show", "4711", "-o", "json")
	var got server.ConflictDetail
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || got.ID != 4711 || len(got.Columns) != 4 || got.OriginName != "busan" {
		t.Errorf("%v: %s", err, stdout)
	}
}

func TestDifferingLinesAreColouredAsAWhole(t *testing.T) {
	tty, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatalf("this test needs a pseudo-terminal: %v", err)
	}
	t.Cleanup(func() { tty.Close() })
	t.Setenv("NO_COLOR", "")
	t.Setenv("TERM", "xterm")
	lines := strings.Split(sideBySide(detail(), term.StyleFor(tty, false)), "\n")
	if lines[1] != "   id      7            7" || lines[2] != "\x1b[33m*  amount  111          222\x1b[0m" {
		t.Errorf("%q", lines)
	}
}

func TestLongValuesAreCutAroundTheDifference(t *testing.T) {
	pair := func(local, remote string) catalog.ColumnPair {
		l, _ := json.Marshal(local)
		r, _ := json.Marshal(remote)
		return catalog.ColumnPair{Local: l, Remote: r, Differs: local != remote}
	}
	same := strings.Repeat("a", 100)
	for _, c := range []struct {
		pair          catalog.ColumnPair
		local, remote string
	}{
		{pair("short", "value"), "short", "value"},
		{pair(same, same), same[:cellMax-1] + "…", same[:cellMax-1] + "…"},
		{pair(same+"1", same+"2"), "…aaaaaaaaaa1", "…aaaaaaaaaa2"},
		{pair(same+"한", same), "…aaaaaaaaaa한", "…aaaaaaaaaa"},
		{pair("x"+same, "y"+same), "x" + same[:cellMax-2] + "…", "y" + same[:cellMax-2] + "…"},
		{pair("NULL", "-"), "'NULL'", "'-'"},
	} {
		if l, r := cells(c.pair); l != c.local || r != c.remote {
			t.Errorf("%s | %s: %q | %q", c.pair.Local, c.pair.Remote, l, r)
		}
	}
}

func TestConflictStatsHaveTotalsAndBars(t *testing.T) {
	first := second10.Add(-time.Hour)
	s := catalog.ConflictStats{Total: 1201, Counts: []catalog.ConflictCount{
		{Schema: "public", Table: "payment", Kind: "update_origin_differs", Code: "lost", Count: 1200, First: second10, Last: second10},
		{Schema: "public", Table: "t", Code: "filled", Count: 1, First: first, Last: first},
	}}
	a := newAgent(t, func(*http.Request) (int, any) { return 200, s })
	code, stdout, stderr := a.duri("conflict", "stats")
	want := `TABLE           KIND                   OUTCOME  COUNT  FIRST                 LAST
public.payment  update_origin_differs  lost     1,200  2026-11-25T12:00:10Z  2026-11-25T12:00:10Z
public.t        -                      filled       1  2026-11-25T11:00:10Z  2026-11-25T11:00:10Z
total                                           1,201  2026-11-25T11:00:10Z  2026-11-25T12:00:10Z
`
	if d := cmp.Diff(want, stdout); d != "" || code != 0 {
		t.Errorf("exit code %d %s\n%s", code, stderr, d)
	}
	var b bytes.Buffer
	if err := printConflictStats(&b, s, term.Style{}, true); err != nil || !strings.Contains(b.String(), "  "+strings.Repeat("█", barMax)+"\n") || !strings.Contains(b.String(), "  ▏\n") {
		t.Errorf("%v\n%s", err, b.String())
	}
	if code, stdout, _ := a.duri("conflict", "stats", "-o", "json"); code != 0 || !strings.Contains(stdout, `"total": 1201`) {
		t.Errorf("exit code %d %s", code, stdout)
	}
	for n, want := range map[int64]string{0: "", 1: "▎", 50: "██████████", 100: strings.Repeat("█", barMax), 53: "██████████▋"} {
		if got := bar(n, 100); got != want {
			t.Errorf("%d of 100: %s, want %s", n, got, want)
		}
	}
}

// restored is what the agent says of an update.
func restored(r *http.Request, dry bool) (int, any) {
	return 200, catalog.Restoration{
		ID: 4711, Schema: "public", Table: "payment", Key: json.RawMessage(`{"id":"7"}`), Action: catalog.ActionUpdate,
		Columns: []string{"amount"}, SQL: `UPDATE x`, DryRun: dry,
	}
}

func TestConflictRestoreSaysWhatItDid(t *testing.T) {
	dry := true
	a := newAgent(t, func(r *http.Request) (int, any) { return restored(r, dry) })
	if code, stdout, stderr := a.duri("conflict", "restore", "4711", "--dry-run"); code != 0 || stdout != "UPDATE x;\n" {
		t.Errorf("exit code %d, %q %q", code, stdout, stderr)
	}
	dry = false
	t.Setenv("SUDO_USER", "kim")
	if code, stdout, stderr := a.duri("conflict", "restore", "4711", "--yes", "--force"); code != 0 || stdout != "updated: public.payment {\"id\":\"7\"} (amount)\n" {
		t.Errorf("exit code %d, %q %q", code, stdout, stderr)
	}
	if len(a.asked) != 2 || !strings.HasPrefix(a.asked[0], `POST /v1/conflicts/4711/restore {"dry_run":true,"force":false,"by":"`) ||
		!strings.HasPrefix(a.asked[1], `POST /v1/conflicts/4711/restore {"dry_run":false,"force":true,"by":"kim (as `) {
		t.Errorf("%q", a.asked)
	}
	a.answer = func(*http.Request) (int, any) {
		return http.StatusConflict, server.Problem{Error: "restore conflict 4711: the row was changed again", Hint: "look at it"}
	}
	if code, _, stderr := a.duri("conflict", "restore", "4711", "--yes"); code != term.ExitRefused || stderr != "duri: restore conflict 4711: the row was changed again\nhint: look at it\n" {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	var b bytes.Buffer
	if err := printRestoration(&b, catalog.Restoration{ID: 7, Action: catalog.ActionNone, Schema: "s", Table: "t", Key: json.RawMessage(`{}`), Skipped: []string{"a"}}); err != nil ||
		b.String() != "nothing to do: the row already is as the losing change of conflict 7 had it: s.t {}\nleft alone, as only PostgreSQL sets them: a\n" {
		t.Errorf("%v %q", err, b.String())
	}
}

// TestRestoreAsksOnATerminal: the SQL is shown, and only the site's name lets it happen.
func TestRestoreAsksOnATerminal(t *testing.T) {
	for answer, want := range map[string]int{"seoul\n": term.ExitOK, "yes\n": term.ExitFailed, "\n": term.ExitFailed} {
		dry := true
		a := newAgent(t, func(r *http.Request) (int, any) { defer func() { dry = false }(); return restored(r, dry) })
		keyboard, tty := terminal(t)
		if _, err := keyboard.WriteString(answer); err != nil {
			t.Fatal(err)
		}
		var stdout, stderr bytes.Buffer
		root := newRootCmd(&app{stdout: &stdout, stderr: &stderr})
		root.SetIn(tty)
		root.SetArgs([]string{"conflict", "restore", "4711", "-c", a.file})
		err := root.Execute()
		if got := term.ExitCode(err); got != want || !strings.HasPrefix(stderr.String(), "UPDATE x;\nType the name of this site (seoul)") {
			t.Errorf("%q: %v, %q", answer, err, stderr.String())
		}
		if done := len(a.asked) == 2 && strings.Contains(a.asked[1], `"dry_run":false`); done != (want == term.ExitOK) || strings.HasPrefix(stdout.String(), "updated: ") != done {
			t.Errorf("%q: asked %q, stdout %q", answer, a.asked, stdout.String())
		}
	}
}

// terminal opens a pseudo-terminal: what is written to keyboard is typed at tty.
func terminal(t *testing.T) (keyboard, tty *os.File) {
	t.Helper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatalf("this test needs a pseudo-terminal: %v", err)
	}
	t.Cleanup(func() { keyboard.Close() })
	fd := int(keyboard.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Fatalf("this test needs a pseudo-terminal: %v", err)
	}
	t.Cleanup(func() { tty.Close() })
	return keyboard, tty
}

// TestConflictJSONIsDocumented: docs/reference/json.md tells of each field.
func TestConflictJSONIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/reference/json.md")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, typ := range []reflect.Type{
		reflect.TypeFor[catalog.Conflict](), reflect.TypeFor[server.ConflictDetail](), reflect.TypeFor[catalog.Verdict](), reflect.TypeFor[catalog.ColumnPair](),
		reflect.TypeFor[catalog.ConflictStats](), reflect.TypeFor[catalog.ConflictCount](), reflect.TypeFor[catalog.Restoration](),
	} {
		for field := range typ.Fields() {
			if name, _, _ := strings.Cut(field.Tag.Get("json"), ","); name != "" && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	if len(names) < 30 {
		t.Errorf("only %d fields were found", len(names))
	}
	for _, name := range names {
		if !strings.Contains(string(page), "`"+name+"`") && !strings.Contains(string(page), "`"+name+"[]`") {
			t.Errorf("docs/reference/json.md does not tell of field %q", name)
		}
	}
}
