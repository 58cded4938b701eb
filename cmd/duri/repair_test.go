package main

import (
	"bytes"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/server"
	"github.com/duri-io/duri/verify"
)

// aRepair is an agent's report: one row of each kind.
func aRepair(dry bool) server.RepairReport {
	text := func(s string) *string { return &s }
	at := time.Date(2026, 11, 25, 12, 0, 0, 123456000, time.UTC)
	first := verify.RepairedRow{
		Schema: "public", Table: "account", Kind: verify.Differs, Key: []string{"7"}, State: verify.RepairPlanned, Right: "seoul", Why: "newer version",
		Columns: []string{"balance", "note"}, A: map[string]*string{"id": text("7"), "balance": text("100"), "note": text("\x1b[31mred")},
		B: map[string]*string{"id": text("7"), "balance": text("90"), "note": nil}, VersionA: &verify.RepairVersion{At: at, Site: "seoul"}, CopiesA: 1, CopiesB: 1,
	}
	pair := verify.RepairReport{A: "seoul", B: "busan", DryRun: dry, Left: 2, Rows: []verify.RepairedRow{first, {
		Schema: "public", Table: "account", Kind: verify.MissingAtB, Key: []string{"8", "x"}, State: verify.RepairLeft, Reason: "the row is old", CopiesA: 1,
	}}, Problems: []verify.RepairProblem{{Table: "public.gone", Error: "it is published only at seoul", Hint: "make it"}}}
	if !dry {
		pair.Rows[0].State, pair.Done, pair.Left = verify.RepairDone, 1, 1
	}
	return server.RepairReport{DryRun: dry, Pairs: []verify.RepairReport{pair}}
}

func TestRepairTellsEachRow(t *testing.T) {
	var problem *server.Problem
	rep := aRepair(true)
	a := newAgent(t, func(*http.Request) (int, any) {
		return http.StatusOK, server.RepairLine{Report: &rep, Problem: problem}
	})
	ask := func(args ...string) (code int, stdout, stderr string) {
		var out, errs bytes.Buffer
		code = run(t.Context(), append(append([]string{"repair"}, args...), "-c", a.file), &out, &errs)
		return code, out.String(), errs.String()
	}
	code, out, errs := ask("--dry-run")
	want := strings.TrimPrefix(`
TABLE           KEY   DIFFERENCE        RIGHT  WHY            STATE
public.account  7     balance, note     seoul  newer version  planned
public.account  8, x  missing at busan  -      -              left: the row is old

public.account (7)
         seoul                              busan
version  2026-11-25T12:00:00.123456Z seoul  not known
balance  100                                90
note     \x1b[31mred                        NULL
public.gone: it is published only at seoul
  hint: make it
seoul = busan: 2 rows differ; nothing was written
`, "\n")
	if d := cmp.Diff(want, out); d != "" {
		t.Errorf("dry run (-want +got):\n%s", d)
	}
	if code != 3 || !strings.Contains(errs, "duri: 2 rows differ\nhint: write it with `duri repair --apply`") {
		t.Errorf("dry run: exit code %d, %s", code, errs)
	}
	rep = aRepair(false)
	if code, out, errs = ask("--apply"); code != 3 || !strings.Contains(out, "not equal, 1 rows differ, 1 rows were made equal") || !strings.Contains(errs, "--from SITE") {
		t.Errorf("repair: exit code %d\n%s%s", code, out, errs)
	}
	problem = &server.Problem{Error: "link broke", Hint: "wait"}
	if code, out, errs = ask("--apply"); code != 1 || !strings.Contains(out, "done") || !strings.Contains(errs, "duri: link broke\nhint: wait") {
		t.Errorf("a repair that ended early: exit code %d\n%s%s", code, out, errs)
	}
	problem, rep.Pairs[0].Rows, rep.Pairs[0].Left = nil, rep.Pairs[0].Rows[:1], 0
	if code, _, errs = ask("--apply"); code != 3 || !strings.Contains(errs, "1 tables cannot be repaired") {
		t.Errorf("a table that cannot be repaired: exit code %d, %s", code, errs)
	}
	rep.Pairs[0].Problems = nil
	if code, out, errs = ask("--apply", "--from", "busan", "--table", "public.*"); code != 0 || !strings.Contains(out, "seoul = busan: equal, 1 rows were made equal") {
		t.Errorf("repair: exit code %d\n%s%s", code, out, errs)
	}
	for _, args := range [][]string{{}, {"--dry-run", "--apply"}, {"--apply", "--from", "bussan"}, {"--apply", "x"}} {
		if code, out, errs := ask(args...); code != 2 || out != "" || !strings.Contains(errs, "hint: ") {
			t.Errorf("%v: exit code %d\n%s%s", args, code, out, errs)
		}
	}
}

func TestStatusTellsOfDifferences(t *testing.T) {
	st := server.ClusterStatus{Sites: []server.SiteStatus{{Site: "seoul", Databases: []server.DatabaseStatus{{
		Name: "app", State: "ready", Health: server.HealthOK,
		Verify: []verify.WatchStatus{{Peer: "busan", Found: []verify.Found{{Schema: "public", Table: "t", Rows: 1000, More: true, Key: []string{"1"}}, {Schema: "public", Table: "u", Rows: 1}}}},
	}}}}}
	a := newAgent(t, func(*http.Request) (int, any) { return http.StatusOK, st })
	var out, errs bytes.Buffer
	code := run(t.Context(), []string{"status", "-c", a.file}, &out, &errs)
	for _, want := range []string{"needs attention: more than 1001 rows differ between seoul and busan", "seoul = busan: table public.t: 1000 rows differ, the first with key (1)", "table public.u: a row differs", "hint: see what would be done with `duri repair --dry-run`"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
	if code != 3 {
		t.Errorf("exit code %d", code)
	}
	st.Sites[0].Databases[0].Verify[0].Found = nil
	if code := run(t.Context(), []string{"status", "-c", a.file}, &out, &errs); code != 0 {
		t.Errorf("without differences: exit code %d", code)
	}
}
