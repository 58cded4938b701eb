package clients

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Suite is the tests that a driver for Go brings along. What passes directly must pass through the gateway.
type Suite struct {
	Name, Module, Version string
	Packages              []string
	Setup                 string // SQL, as the superuser, in the database
	Env                   func(w way, database string) []string
	// Not are tests that may fail through the gateway, as package and test, with the reason. One that passes is an error, so
	// that the list stays true.
	Not map[string]string
}

// Suites are those that can be run.
var Suites = []Suite{
	{
		Name: "pgx", Module: "github.com/jackc/pgx/v5", Version: "v5.12.0", Packages: []string{".", "./pgconn", "./pgtype", "./pgxpool", "./stdlib"},
		Setup: "CREATE EXTENSION hstore; CREATE EXTENSION ltree; CREATE DOMAIN uint64 AS numeric(20, 0)",
		Env: func(w way, database string) []string {
			conn := fmt.Sprintf("host=%s port=%s user=%s password=%s dbname=%s sslmode=disable", w.host, w.port, bossRole, quoted(password), database)
			return []string{"PGX_TEST_DATABASE=" + conn, "PGX_TEST_TCP_CONN_STRING=" + conn}
		},
		Not: pgxNot,
	},
	{
		Name: "lib/pq", Module: "github.com/lib/pq", Version: "v1.10.9", Packages: []string{".", "./hstore"},
		Setup: "CREATE EXTENSION hstore",
		Env: func(w way, database string) []string {
			return []string{"PGHOST=" + w.host, "PGPORT=" + w.port, "PGUSER=" + bossRole, "PGPASSWORD=" + password, "PGDATABASE=" + database, "PGSSLMODE=disable", "PQGOSSLTESTS=0"}
		},
		Not: pqNot,
	},
}

// SuiteResult is how many tests of a suite passed in which way.
type SuiteResult struct {
	Direct, Through, Excluded int
	Problems                  []string
}

// RunSuite runs a suite both ways.
func (s *Sites) RunSuite(ctx context.Context, su Suite) (res SuiteResult, err error) {
	dir, err := os.MkdirTemp("", "duri-clients-")
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := copyModule(ctx, su, dir); err != nil {
		return res, err
	}
	database := "suite_" + strings.Map(func(r rune) rune {
		if r < 'a' || r > 'z' {
			return '_'
		}
		return r
	}, su.Name)
	var outcomes [2]map[string]outcome
	for i, w := range s.ways() {
		if err := s.Database(ctx, database); err != nil {
			return res, err
		}
		if err := s.Servers[0].Exec(ctx, database, su.Setup); err != nil {
			return res, err
		}
		if outcomes[i], err = goTest(ctx, su, dir, w, database); err != nil {
			return res, fmt.Errorf("%s, %s: %w", su.Name, w.name, err)
		}
	}
	res.judge(su, outcomes[0], outcomes[1])
	return res, nil
}

// outcome is what became of a test.
type outcome struct {
	action string // pass, fail or skip
	output string
}

func (r *SuiteResult) judge(su Suite, direct, through map[string]outcome) {
	for name, d := range direct {
		if d.action != "pass" {
			continue
		}
		r.Direct++
		t := through[name]
		if t.action == "pass" {
			r.Through++
			continue
		}
		if reason := excluded(su.Not, name); reason != "" {
			r.Excluded++
			continue
		}
		r.Problems = append(r.Problems, fmt.Sprintf("%s passes directly, through the gateway it is %q:\n%s", name, t.action, tail(t.output)))
	}
	for name := range su.Not {
		if through[name].action == "pass" {
			r.Problems = append(r.Problems, name+" is on the list of those that may fail, and passes")
		}
	}
	if r.Direct == 0 {
		r.Problems = append(r.Problems, "no test has passed directly")
	}
	slices.Sort(r.Problems)
}

// excluded gives the reason of a test, or of one that it is part of.
func excluded(not map[string]string, name string) string {
	for {
		if reason := not[name]; reason != "" {
			return reason
		}
		i := strings.LastIndexByte(name, '/')
		if i < 0 {
			return ""
		}
		name = name[:i]
	}
}

// copyModule copies a module out of Go's cache, where nothing can be written and its tests' own imports are not resolved.
func copyModule(ctx context.Context, su Suite, dir string) error {
	out, err := exec.CommandContext(ctx, "go", "mod", "download", "-json", su.Module+"@"+su.Version).Output()
	if err != nil {
		return fmt.Errorf("go mod download %s@%s: %w", su.Module, su.Version, err)
	}
	var m struct{ Dir string }
	if err := json.Unmarshal(out, &m); err != nil {
		return err
	}
	return filepath.WalkDir(m.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(m.Dir, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(dir, rel), 0o755)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, rel), b, 0o644) //nolint:gosec // published source
	})
}

// temporary is a folder of t.TempDir, which some tests have in their names.
var temporary = regexp.MustCompile(`/tmp/\w+/`)

// goTest runs the tests and gives what became of each, by package and name.
func goTest(ctx context.Context, su Suite, dir string, w way, database string) (map[string]outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Hour)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json", "-count=1", "-p=1", "-timeout=20m", "-mod=mod", "-buildvcs=false"}, su.Packages...)...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "PG") || strings.HasPrefix(kv, "GOFLAGS=") }),
		append(su.Env(w, database), "GOWORK=off", "TZ=UTC")...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	runErr := cmd.Run() // fails when a test does; what is not in the output is told below
	all := map[string]outcome{}
	said := map[string]*strings.Builder{}
	lines := bufio.NewScanner(&out)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e struct{ Action, Package, Test, Output string }
		if json.Unmarshal(lines.Bytes(), &e) != nil || e.Test == "" {
			continue
		}
		name := temporary.ReplaceAllString(strings.TrimPrefix(strings.TrimPrefix(e.Package, su.Module), "/")+"."+e.Test, "TMP")
		switch e.Action {
		case "output":
			if said[name] == nil {
				said[name] = &strings.Builder{}
			}
			said[name].WriteString(e.Output)
		case "pass", "fail", "skip":
			o := outcome{action: e.Action}
			if b := said[name]; b != nil {
				o.output = b.String()
			}
			all[name] = o
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no test ran: %w: %s", runErr, tail(errs.String()))
	}
	for name, b := range said { // one that hung, with all after it
		if _, ok := all[name]; !ok {
			all[name] = outcome{action: "unfinished", output: b.String()}
		}
	}
	return all, lines.Err()
}
