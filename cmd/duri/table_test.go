package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/policy"
)

// someTables is an agent's answer.
var someTables = []catalog.Table{
	{
		Schema: "public", Name: "account", Replicated: true, Key: []string{"id"}, KeySource: "primary key", Identity: "full", Mode: policy.ModeRow,
		Delta: []string{"balance"}, PolicySource: "duri.yaml", Overridden: true, Rows: 1200, Conflicts: 3,
		ForeignKeys: []catalog.ForeignKey{
			{Name: "account_branch_fkey", Columns: []string{"branch"}, References: "public.branch", Referenced: []string{"id"}, Match: "simple", Orphans: policy.RemoveChild, Checked: true, Open: 2},
			{Name: "account_owner_fkey", Columns: []string{"a", "b"}, References: "public.owner", Referenced: []string{"x", "y"}, Match: "full", Orphans: policy.Report},
		},
		Uniques: []catalog.Unique{{Name: "account_no_key", Kind: "unique", Definition: "UNIQUE (no)", Parkable: true}},
		Notes:   []catalog.Note{{Text: "delta column \"balance\" is bounded", Hint: "drop the constraint"}},
	},
	{
		Schema: "public", Name: "log", Replicated: true, Key: []string{}, KeySource: "none", Identity: "full", Mode: policy.ModeRow, PolicySource: "default",
		Uniques: []catalog.Unique{{Name: "log_x", Kind: "exclusion", Definition: "EXCLUDE ...", Why: "the table has no key to know its rows by"}},
	},
	{Schema: "hidden", Name: "log", Why: "its schema is not among those of duri.yaml", KeySource: "none", Identity: "default", Mode: policy.ModeRow, PolicySource: "default"},
	{Schema: "public", Name: "log_1", PartitionOf: "public.log", Replicated: true, KeySource: "none", Identity: "full", Mode: policy.ModeRow, PolicySource: "default"},
}

func tablesAgent(t *testing.T) *agent {
	t.Helper()
	return newAgent(t, func(r *http.Request) (int, any) {
		if r.URL.Path != "/v1/tables" {
			t.Errorf("asked for %s", r.URL)
		}
		return http.StatusOK, someTables
	})
}

func TestTablesAreListed(t *testing.T) {
	a := tablesAgent(t)
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"list": {[]string{"table", "list"}, strings.TrimPrefix(`
TABLE           REPLICATED                                      KEY   IDENTITY  MODE  DELTA    FOREIGN KEYS                                                  UNIQUE          ROWS  CONFLICTS 24H
public.account  yes                                             id    full      row   balance  account_branch_fkey (remove_child) 2 orphans, account_owner…  account_no_key  1200              3
public.log      yes                                             none  full      row                                                                          log_x (stops)      0              0
hidden.log      no: its schema is not among those of duri.yaml  none  default   row                                                                                             0              0
`, "\n")},
		"show": {[]string{"table", "show", "account"}, strings.TrimPrefix(`
public.account
  replicated        yes
  key               id (primary key)
  replica identity  full
  mode              row
  delta columns     balance
  declared by       duri.yaml; what duri.set_policy declares does not count
  rows              about 1200
  conflicts         3 in the last 24 hours at this site

  FOREIGN KEY          COLUMNS  REFERENCES           MATCH   ORPHANS                                   OPEN
  account_branch_fkey  branch   public.branch (id)   simple  remove_child                                 2
  account_owner_fkey   a, b     public.owner (x, y)  full    not checked: the constraint is not valid     0

  UNIQUE          DEFINITION   ON COLLISION
  account_no_key  UNIQUE (no)  the lesser version is parked

note: delta column "balance" is bounded
hint: drop the constraint
`, "\n")},
	} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), append(c.args, "-c", a.file), &stdout, &stderr); code != 0 {
			t.Errorf("%s: exit code %d: %s", name, code, stderr.String())
		}
		if d := cmp.Diff(c.want, stdout.String()); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

func TestTablesAsJSON(t *testing.T) {
	a := tablesAgent(t)
	document := func(v any, args ...string) {
		t.Helper()
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), append(args, "-c", a.file, "-o", "json"), &stdout, &stderr); code != 0 {
			t.Fatalf("exit code %d: %s", code, stderr.String())
		}
		if err := json.Unmarshal(stdout.Bytes(), v); err != nil {
			t.Fatal(err)
		}
	}
	var list []catalog.Table
	if document(&list, "table", "list", "--database", "app"); len(list) != 3 || list[0].ForeignKeys[0].Open != 2 {
		t.Errorf("%+v", list)
	}
	if document(&list, "table", "list", "--partitions"); len(list) != 4 {
		t.Errorf("%d tables with partitions", len(list))
	}
	var one catalog.Table
	if document(&one, "table", "show", "hidden.log"); one.Schema != "hidden" || one.Why == "" {
		t.Errorf("%+v", one)
	}
	if d := cmp.Diff([]string{"GET /v1/tables?database=app", "GET /v1/tables", "GET /v1/tables"}, a.asked); d != "" {
		t.Error(d)
	}
}

func TestATableIsNamedWithoutDoubt(t *testing.T) {
	a := tablesAgent(t)
	for name, want := range map[string][2]string{
		"log":           {"there are several: public.log, hidden.log", "hint: name one of them"},
		"acount":        {`there is no such table (did you mean "account"?)`, "hint: see: duri table list"},
		"public.acount": {`there is no such table (did you mean "public.account"?)`, "hint: see: duri table list"},
		"zzzzzzzz":      {"there is no such table", "hint: see: duri table list"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), []string{"table", "show", name, "-c", a.file}, &stdout, &stderr)
		if code != 1 || stderr.String() != "duri: show table "+name+": "+want[0]+"\n"+want[1]+"\n" || stdout.Len() > 0 {
			t.Errorf("%s: exit code %d\n%s", name, code, stderr.String())
		}
	}
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"table", "show", "-c", a.file}, &stdout, &stderr); code != 2 || !strings.Contains(stderr.String(), "takes one argument") {
		t.Errorf("exit code %d: %s", code, stderr.String())
	}
}

func TestConfigCheckTellsWhatIsDeclaredTwice(t *testing.T) {
	a := tablesAgent(t)
	check := func(args ...string) string {
		t.Helper()
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), append([]string{"config", "check", "-c", a.file}, args...), &stdout, &stderr); code != 0 {
			t.Fatalf("exit code %d: %s", code, stderr.String())
		}
		return stdout.String()
	}
	if got := check(); strings.Contains(got, "note:") || len(a.asked) != 0 {
		t.Errorf("nothing is declared, but %s (asked %v)", got, a.asked)
	}
	text, err := os.ReadFile(a.file)
	if err != nil {
		t.Fatal(err)
	}
	const db = `  - name: "app"`
	if !strings.Contains(string(text), db) {
		t.Fatalf("no %q in %s", db, text)
	}
	declared := strings.Replace(string(text), db, db+"\n    tables:\n      public.account: {delta: [balance]}\n      public.log: {}", 1)
	if err := os.WriteFile(a.file, []byte(declared), 0o600); err != nil {
		t.Fatal(err)
	}
	const note = "database app: duri.set_policy declares public.account too; duri.yaml wins"
	if got := check(); !strings.HasSuffix(got, "\nnote: "+note+"\n") {
		t.Errorf("%s", got)
	}
	var doc checkResult
	if err := json.Unmarshal([]byte(check("-o", "json")), &doc); err != nil || !doc.OK {
		t.Fatalf("%+v, %v", doc, err)
	}
	if d := cmp.Diff([]string{note}, doc.Notes); d != "" {
		t.Error(d)
	}
}
