package apply

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// A scenario file is text: entries that begin in the first column, each with the indented lines that follow it. Lines
// that begin with # are comments; the first two say what the scenario is and how it ends. docs/concepts/scenarios.md
// explains the entries to those who read the files.

// scenario is one file of testdata/scenarios.
type scenario struct {
	file    string // name without the folder
	id      string // S02; several files may share it
	title   string
	outcome string
	sites   []int // of how many sites the runs are
	needs   string
	unit    time.Duration // of the times
	images  string        // columns that records show
	schema  []statement   // site empty: at all
	policy  []statement   // site is the table, sql the policy as JSON
	steps   []step
	checks  []check
	parked  []string
	records map[string][]string // by whose they are, see recordsOf
}

// statement is SQL and the site that it is for.
type statement struct{ site, sql string }

// step is what happens before the links heal.
type step struct {
	line  int
	verb  verb
	site  string // where, or from where
	to    string
	at    int    // time in units
	sql   string // of verbRun
	fails string // SQLSTATE that is expected
	check check  // of verbCheck
}

type verb string

const (
	verbSeed    verb = "seed"    // run SQL at A, time 0, and let all sites have it
	verbRun     verb = "run"     // one or more transactions at a site
	verbDeliver verb = "deliver" // let another site have all there is so far, and wait until it has applied it
	verbSend    verb = "send"    // likewise, without waiting
	verbClock   verb = "clock"   // a site's clock stands at a time
	verbHeld    verb = "held"    // a direction waits for its receiver's clock
	verbCheck   verb = "at"      // what a site shows now
)

// check is a query and its rows.
type check struct {
	line  int
	site  string // empty: all
	table string // empty: sql is a whole query
	sql   string // otherwise the columns
	rows  []string
	// eventually: it may take a moment more, as what was parked reappears after the change that lets it.
	eventually bool
}

// section is a line in the first column with the indented ones below.
type section struct {
	line int
	head string
	body []string
}

// text is the head's remainder and the body.
func (e section) text(rest string) string {
	return strings.TrimSpace(strings.Join(append([]string{rest}, e.body...), "\n"))
}

func loadScenarios(t *testing.T) []*scenario {
	t.Helper()
	files, err := filepath.Glob("testdata/scenarios/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	var all []*scenario
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		sc, err := parseScenario(filepath.Base(file), string(text))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, sc)
	}
	return all
}

var titleRE = regexp.MustCompile(`^# (S\d\d)  (\S.*)$`)

// parseScenario reads a file; errors name it and the line.
func parseScenario(file, text string) (*scenario, error) {
	sc := &scenario{file: file, sites: []int{2, 3}, unit: time.Second, images: "v", records: map[string][]string{}}
	lines := strings.Split(text, "\n")
	m := titleRE.FindStringSubmatch(lines[0])
	if m == nil {
		return nil, fmt.Errorf(`%s:1: a scenario begins with "# S00  title"`, file)
	}
	sc.id, sc.title = m[1], m[2]
	outcome, ok := strings.CutPrefix(slices.Concat(lines, []string{""})[1], "# Outcome: ")
	if !ok {
		return nil, fmt.Errorf(`%s:2: the second line is "# Outcome: how it ends"`, file)
	}
	sc.outcome = outcome
	entries, err := splitEntries(file, lines)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if err := sc.entry(e); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, e.line, err)
		}
	}
	return sc, sc.valid()
}

func splitEntries(file string, lines []string) (entries []section, err error) {
	for i, line := range lines {
		line = strings.TrimRight(line, " \t")
		switch {
		case line == "" || line[0] == '#':
		case line[0] != ' ' && line[0] != '\t':
			entries = append(entries, section{line: i + 1, head: line})
		case len(entries) == 0:
			return nil, fmt.Errorf("%s:%d: an indented line belongs to the one above, and there is none", file, i+1)
		default:
			e := &entries[len(entries)-1]
			e.body = append(e.body, strings.TrimSpace(line))
		}
	}
	return entries, nil
}

var (
	runRE     = regexp.MustCompile(`^([ABC])@(\d+)(?: fails ([0-9A-Z]{5}))?: *(.*)$`)
	deliverRE = regexp.MustCompile(`^(deliver|send) ([ABC]) to ([ABC])$`)
	clockRE   = regexp.MustCompile(`^clock ([ABC])@(\d+)$`)
	heldRE    = regexp.MustCompile(`^held ([ABC]) to ([ABC]) until (\d+)$`)
	atRE      = regexp.MustCompile(`^at ([ABC]) (.+)$`)
	outcomeRE = regexp.MustCompile(`^outcome (eventually )?(?:at ([ABC]) )?(.+)$`)
	tableRE   = regexp.MustCompile(`^(\w+): (.+)$`)
	policyRE  = regexp.MustCompile(`^policy (\w+) (\{.+\})$`)
	schemaRE  = regexp.MustCompile(`^schema(?: ([ABC]))?$`)
	ownerRE   = regexp.MustCompile(`^[ABC](?: \((?:[ABC], [ABC]|in turn)\))?(?: (?:merged|serial))?$`)
)

// features are what some scenarios need, and whether it is built. A scenario that needs what is not built is read, but
// not run; when it is built, the scenario must say so no longer, or the test fails.
var features = map[string]bool{"parking": true, "fkey": false, "column": true, "delta": true}

func (sc *scenario) entry(e section) error {
	word, rest, _ := strings.Cut(e.head, " ")
	if m := runRE.FindStringSubmatch(e.head); m != nil {
		return sc.addStep(e, step{verb: verbRun, site: m[1], at: number(m[2]), fails: m[3], sql: e.text(m[4])})
	}
	if m := deliverRE.FindStringSubmatch(e.head); m != nil && m[2] != m[3] {
		return sc.addStep(e, step{verb: verb(m[1]), site: m[2], to: m[3]})
	}
	if m := clockRE.FindStringSubmatch(e.head); m != nil {
		return sc.addStep(e, step{verb: verbClock, site: m[1], at: number(m[2])})
	}
	if m := heldRE.FindStringSubmatch(e.head); m != nil {
		return sc.addStep(e, step{verb: verbHeld, site: m[1], to: m[2], at: number(m[3])})
	}
	if m := atRE.FindStringSubmatch(e.head); m != nil {
		return sc.addStep(e, step{verb: verbCheck, site: m[1], check: newCheck(e, m[1], m[2])})
	}
	if m := outcomeRE.FindStringSubmatch(e.head); m != nil {
		c := newCheck(e, m[2], m[3])
		c.eventually = m[1] != ""
		sc.checks = append(sc.checks, c)
		return nil
	}
	if m := schemaRE.FindStringSubmatch(e.head); m != nil {
		sc.schema = append(sc.schema, statement{m[1], e.text("")})
		return nil
	}
	if m := policyRE.FindStringSubmatch(e.head); m != nil {
		sc.policy = append(sc.policy, statement{m[1], m[2]})
		return nil
	}
	switch word {
	case "seed":
		return sc.addStep(e, step{verb: verbSeed, site: "A", sql: e.text(rest)})
	case "records":
		return sc.addRecords(e.body)
	case "parked":
		sc.parked = append(sc.parked, normalRows(e.body)...)
		return nil
	case "sites":
		sc.sites = []int{number(rest)}
	case "needs":
		sc.needs = rest
	case "images":
		sc.images = rest
	case "unit":
		unit, err := time.ParseDuration(rest)
		sc.unit = unit
		return err
	default:
		return fmt.Errorf("%q is no entry of a scenario", e.head)
	}
	if len(e.body) > 0 {
		return fmt.Errorf("%q has no lines of its own", word)
	}
	return nil
}

// number reads digits that a regular expression has let through; a missing one is -1.
func number(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		return -1
	}
	return n
}

func (sc *scenario) addStep(e section, s step) error {
	s.line = e.line
	if (s.verb == verbRun || s.verb == verbSeed) && s.sql == "" {
		return fmt.Errorf("%q has no statement", e.head)
	}
	if s.verb != verbRun && s.verb != verbSeed && s.verb != verbCheck && len(e.body) > 0 {
		return fmt.Errorf("%q has no lines of its own", e.head)
	}
	sc.steps = append(sc.steps, s)
	return nil
}

func newCheck(e section, site, query string) check {
	c := check{line: e.line, site: site, sql: query, rows: normalRows(e.body)}
	if m := tableRE.FindStringSubmatch(query); m != nil {
		c.table, c.sql = m[1], m[2]
	}
	return c
}

// normalRows spells rows as they are compared: one blank around each bar, sorted.
func normalRows(lines []string) []string {
	rows := []string{}
	for _, line := range lines {
		cells := strings.Split(line, "|")
		for i, c := range cells {
			cells[i] = strings.TrimSpace(c)
		}
		rows = append(rows, strings.Join(cells, " | "))
	}
	slices.Sort(rows)
	return rows
}

// addRecords reads conflict records; the first cell says whose they are.
func (sc *scenario) addRecords(lines []string) error {
	for _, line := range lines {
		owner, row, ok := strings.Cut(line, "|")
		owner = strings.TrimSpace(owner)
		switch {
		case !ok || !ownerRE.MatchString(owner):
			return fmt.Errorf(`records: %q does not begin with a site: "A |", "A serial |", "C (A, B) |" or "C (in turn) merged |"`, line)
		case strings.TrimSpace(row) == "none":
			sc.records[owner] = []string{}
		case strings.TrimSpace(row) == "any":
			sc.records[owner] = nil
		case strings.Count(row, "|") != 4:
			return fmt.Errorf("records: %q has not the cells site, kind, code, table and key, incoming, met", line)
		default:
			sc.records[owner] = normalRows(append(sc.records[owner], row))
		}
	}
	return nil
}

// valid checks what spans entries.
func (sc *scenario) valid() error {
	if _, known := features[sc.needs]; sc.needs != "" && !known {
		return fmt.Errorf("%s: needs %q, which is none of %v", sc.file, sc.needs, slices.Sorted(maps.Keys(features)))
	}
	for _, n := range sc.sites {
		if n != 2 && n != 3 {
			return fmt.Errorf("%s: there are scenarios of 2 sites and of 3", sc.file)
		}
	}
	if len(sc.checks) == 0 {
		return fmt.Errorf("%s: no outcome", sc.file)
	}
	if slices.Contains(sc.sites, 2) {
		for _, s := range sc.steps {
			if s.site == "C" || s.to == "C" {
				return fmt.Errorf("%s:%d: site C is in runs of three sites only; say \"sites 3\"", sc.file, s.line)
			}
		}
	}
	return nil
}

// writers are the sites that change something, in order.
func (sc *scenario) writers() []string {
	w := map[string]bool{}
	for _, s := range sc.steps {
		if s.verb == verbRun {
			w[s.site] = true
		}
	}
	return slices.Sorted(maps.Keys(w))
}

// recordsOf gives what a site must have recorded when the other sites' streams came in an order ("A, B", or "in turn";
// one name or none with two sites) and were applied in a mode (merged or serial). What the file does not say of a silent
// third site follows from the others: it has, of A's whole stream and then B's, the view of A, which had its own changes
// before B's. alternatives are more than one when the file leaves open whose view that is; with
// anything, it leaves that open too.
func (sc *scenario) recordsOf(site, order, mode string) (alternatives [][]string, anything bool) {
	views := []string{site}
	if _, ok := sc.declared(site, order, mode); !ok && site == "C" && !slices.Contains(sc.writers(), site) {
		views = slices.DeleteFunc([]string{"A", "B"}, func(s string) bool { return strings.HasSuffix(order, s) })
		order = ""
	}
	for _, view := range views {
		r, ok := sc.declared(view, order, mode)
		if ok && r == nil {
			return nil, true
		}
		alternatives = append(alternatives, slices.Concat([]string{}, r))
	}
	return alternatives, false
}

// declared finds the records that fit best: for the order and the mode, for the order, for the mode, for all.
func (sc *scenario) declared(site, order, mode string) ([]string, bool) {
	for _, owner := range []string{site + " (" + order + ") " + mode, site + " (" + order + ")", site + " " + mode, site} {
		if r, ok := sc.records[owner]; ok {
			return r, true
		}
	}
	return nil, false
}

func TestScenarioFilesAreRead(t *testing.T) {
	sc, err := parseScenario("S99.txt", `# S99  A title
# Outcome: it ends.
# Prose.
sites 3
unit 10ms
images v, n
schema
  CREATE TABLE x (id int);
  CREATE TABLE y (id int)
schema B
  ALTER TABLE x ADD z int
policy x {"mode": "column"}
seed  INSERT INTO x VALUES (1)

A@10: BEGIN;
  DELETE FROM x;
  COMMIT
deliver A to C
C@20 fails 23505: INSERT INTO x VALUES (1)
clock B@5
send A to B
held A to B until 10
at B x: id, v
  2 |  two
  1|one
outcome x: id, left(v, 3), version
outcome eventually at C SELECT count(*) FROM x
  0
parked
  x 1 | a | A@10
records
  A       | update_deleted | lost | x 1 | B@1: b | A@2: -
  C (A, B)| none
`)
	if err != nil {
		t.Fatal(err)
	}
	want := &scenario{
		file: "S99.txt", id: "S99", title: "A title", outcome: "it ends.", sites: []int{3}, unit: 10 * time.Millisecond, images: "v, n",
		schema: []statement{{"", "CREATE TABLE x (id int);\nCREATE TABLE y (id int)"}, {"B", "ALTER TABLE x ADD z int"}},
		policy: []statement{{"x", `{"mode": "column"}`}},
		steps: []step{
			{line: 13, verb: verbSeed, site: "A", sql: "INSERT INTO x VALUES (1)"},
			{line: 15, verb: verbRun, site: "A", at: 10, sql: "BEGIN;\nDELETE FROM x;\nCOMMIT"},
			{line: 18, verb: verbDeliver, site: "A", to: "C"},
			{line: 19, verb: verbRun, site: "C", at: 20, fails: "23505", sql: "INSERT INTO x VALUES (1)"},
			{line: 20, verb: verbClock, site: "B", at: 5},
			{line: 21, verb: verbSend, site: "A", to: "B"},
			{line: 22, verb: verbHeld, site: "A", to: "B", at: 10},
			{line: 23, verb: verbCheck, site: "B", check: check{line: 23, site: "B", table: "x", sql: "id, v", rows: []string{"1 | one", "2 | two"}}},
		},
		checks: []check{
			{line: 26, table: "x", sql: "id, left(v, 3), version", rows: []string{}},
			{line: 27, site: "C", sql: "SELECT count(*) FROM x", rows: []string{"0"}, eventually: true},
		},
		parked:  []string{"x 1 | a | A@10"},
		records: map[string][]string{"A": {"update_deleted | lost | x 1 | B@1: b | A@2: -"}, "C (A, B)": {}},
	}
	all := cmp.AllowUnexported(scenario{}, statement{}, step{}, check{})
	if d := cmp.Diff(want, sc, all, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

func TestScenarioErrorsNameFileAndLine(t *testing.T) {
	const head = "# S01  title\n# Outcome: so\n"
	const end = "\noutcome t: id\n"
	for _, tc := range []struct{ text, want string }{
		{"", "f:1: "},
		{"# S1 title", "f:1: "},
		{"# S01  title\nseed x", "f:2: "},
		{head + "  indented", "f:3: an indented line"},
		{head + "D@10: SELECT 1" + end, `f:3: "D@10: SELECT 1" is no entry`},
		{head + "\nA@10:" + end, `f:4: "A@10:" has no statement`},
		{head + "deliver A to A" + end, "f:3: "},
		{head + "deliver A to B\n  x" + end, "f:3: "},
		{head + "sites 4" + end, "f: there are scenarios of 2 sites"},
		{head + "sites x" + end, "f: there are scenarios of 2 sites"},
		{head + "unit fast" + end, "f:3: "},
		{head + "needs luck" + end, "f: needs"},
		{head + "needs fkey\n  x" + end, "f:3: "},
		{head + "records\n  D | none" + end, "f:3: records: "},
		{head + "records\n  A | lost" + end, "f:3: records: "},
		{head + "A@1: SELECT 1\nC@10: SELECT 1" + end, "f:4: site C"},
		{head + "A@1: SELECT 1\n", "f: no outcome"},
	} {
		_, err := parseScenario("f", tc.text)
		if err == nil || !strings.HasPrefix(err.Error(), tc.want) {
			t.Errorf("%q: error %v, want %s...", tc.text, err, tc.want)
		}
	}
}

// TestScenarioFilesAreNamedByTheirNumbers also sees to it that no table is made by two files, as all share a database.
func TestScenarioFilesAreNamedByTheirNumbers(t *testing.T) {
	create := regexp.MustCompile(`(?i)CREATE (?:TABLE|TYPE|FUNCTION) (\w+)`)
	made := map[string]string{}
	for _, sc := range loadScenarios(t) {
		if !strings.HasPrefix(sc.file, sc.id+"_") {
			t.Errorf("%s holds %s", sc.file, sc.id)
		}
		for _, st := range sc.schema {
			for _, m := range create.FindAllStringSubmatch(st.sql, -1) {
				if made[m[1]] == "" {
					made[m[1]] = sc.file
				}
				if other := made[m[1]]; other != sc.file {
					t.Errorf("%s and %s both make %s", other, sc.file, m[1])
				}
			}
		}
	}
}

var rewrite = flag.Bool("rewrite", false, "write the table of docs/concepts/scenarios.md anew")

// TestScenarioPageListsEveryFile compares the table in the docs with the heads of the files.
func TestScenarioPageListsEveryFile(t *testing.T) {
	const page, begin, end = "../docs/concepts/scenarios.md", "| | scenario | outcome |\n|---|---|---|\n", "\n\n"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), begin)
	got, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no table that begins with %q", page, begin)
	}
	want := strings.TrimSuffix(scenarioTable(loadScenarios(t)), "\n")
	if *rewrite {
		if err := os.WriteFile(page, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if d := cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n")); d != "" {
		t.Errorf("%s (-want +got); go test ./apply -run Page -rewrite writes it:\n%s", page, d)
	}
}

func scenarioTable(all []*scenario) string {
	var b strings.Builder
	for _, sc := range all {
		outcome := sc.outcome
		if sc.needs != "" {
			outcome += " *Not played here: needs " + sc.needs + ".*"
		}
		fmt.Fprintf(&b, "| [%s](../../apply/testdata/scenarios/%s) | %s | %s |\n", sc.id, sc.file, sc.title, outcome)
	}
	return b.String()
}
