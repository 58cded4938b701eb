// Package e2e tests duri as its users meet it: the real program, agents as processes of the run-time role, real
// PostgreSQL servers, killed and disturbed from outside. What is asserted is what a user sees: tables, exit codes,
// sentences and hints, `duri status`.
//
// It does not look into the packages; each has its own tests. Nothing outlives a test: servers and agents end with it,
// however it ends.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/server"
)

// binary is the program under test, built once.
var binary string

var seed = flag.Uint64("seed", 0, "seed of the random tests; 0: a new one")

// parallel is how many tests run side by side: they mostly wait, for timeouts and for the disk.
const parallel = "4"

func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		if err := f.Value.Set(parallel); err != nil {
			panic(err)
		}
	}
	dir, err := os.MkdirTemp("", "duri-e2e-")
	if err == nil {
		binary, err = pair.Build(context.Background(), dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_ = os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// random gives the generator of a test and prints its seed.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	s := *seed
	if s == 0 {
		s = rand.Uint64N(1 << 32)
	}
	t.Logf("seed %d (repeat with -seed %d)", s, s)
	return rand.New(rand.NewPCG(s, 0))
}

// startMax bounds what a busy machine may take to start two sites.
const startMax = 90 * time.Second

// newPair starts two sites on clusters of the test, and waits until both stream unless o.Held is set.
func newPair(t *testing.T, o pair.Options, pgOptions ...pgtest.Option) *pair.Pair {
	t.Helper()
	if o.Clusters == nil {
		o.Clusters = []*pgcluster.Cluster{pgtest.New(t, pgOptions...), pgtest.New(t, pgOptions...)}
	}
	o.Binary = binary
	ctx, cancel := context.WithTimeout(t.Context(), startMax)
	defer cancel()
	p, err := pair.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, s := range p.Sites {
			if t.Failed() && s.Cluster != nil {
				t.Logf("log of agent %s:\n%s", s.Name, s.Log())
			}
		}
		if err := p.Close(); err != nil {
			t.Errorf("remove the sites: %v", err)
		}
	})
	if !o.Held && o.Clusters[0] != nil && o.Clusters[1] != nil {
		streams(t, p)
	}
	return p
}

// streams waits until both sites stream both ways.
func streams(t *testing.T, p *pair.Pair) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startMax)
	defer cancel()
	if err := p.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
}

// grantsMu lets one test at a time make roles, which all databases of a server share.
var grantsMu sync.Mutex

// alone makes a site whose peer is never there: a when the seed is asked for, else b. The agent is not started.
func alone(t *testing.T, c *pgcluster.Cluster, database, site string) (*pair.Pair, *pair.Site) {
	t.Helper()
	o := pair.Options{Database: database, Held: true, Clusters: []*pgcluster.Cluster{c, nil}}
	i := 0
	if site == "b" {
		o.Clusters, i = []*pgcluster.Cluster{nil, c}, 1
	}
	grantsMu.Lock()
	defer grantsMu.Unlock()
	p := newPair(t, o)
	return p, p.Sites[i]
}

// schema makes the same schema at both sites before they join; what a fills in besides is copied.
func schema(sql string) func(context.Context, *pair.Site) error {
	return func(ctx context.Context, a *pair.Site) error { return a.Cluster.Exec(ctx, a.Database, sql) }
}

func start(t *testing.T, s *pair.Site) {
	t.Helper()
	if err := s.StartAgent(); err != nil {
		t.Fatal(err)
	}
}

// do runs SQL at a site as superuser.
func do(t *testing.T, s *pair.Site, sql string) {
	t.Helper()
	if err := s.Cluster.Exec(t.Context(), s.Database, sql); err != nil {
		t.Fatalf("site %s: %v", s.Name, err)
	}
}

// text gives a query's only value at a site.
func text(t *testing.T, s *pair.Site, sql string) string {
	t.Helper()
	rows, err := s.Cluster.QueryText(t.Context(), s.Database, sql)
	if err != nil {
		t.Fatalf("site %s: %v", s.Name, err)
	}
	if len(rows) != 1 || len(rows[0]) != 1 {
		t.Fatalf("site %s: %s gives %v, want one value", s.Name, sql, rows)
	}
	return rows[0][0]
}

// within waits until check finds nothing wrong.
func within(t *testing.T, d time.Duration, what string, check func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	var last error
	for {
		err := check(ctx)
		if err == nil {
			return
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			t.Fatalf("not within %s: %s: %v", d, what, last)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// settled waits until both sites have applied each other's transactions.
func settled(t *testing.T, p *pair.Pair, d time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	if err := p.WaitApplied(ctx); err != nil {
		t.Fatal(err)
	}
}

// result is how a run of the program ended.
type result struct {
	code           int
	stdout, stderr string
}

// duri runs the program.
func duri(t *testing.T, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r, err := run(ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func run(ctx context.Context, args ...string) (result, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() >= 0 {
		err = nil
	}
	r := result{stdout: stdout.String(), stderr: stderr.String()}
	if err != nil {
		return r, fmt.Errorf("run duri %s: %w\n%s", strings.Join(args, " "), err, r.stderr)
	}
	r.code = cmd.ProcessState.ExitCode()
	return r, nil
}

// equal asks duri verify, and besides compares all tables by a reader of its own.
func equal(t *testing.T, p *pair.Pair) {
	t.Helper()
	r := duri(t, "verify", "-c", p.Sites[0].ConfigFile)
	if r.code != 0 {
		t.Errorf("duri verify: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	a, b := content(t, p.Sites[0]), content(t, p.Sites[1])
	if len(a) == 0 {
		t.Error("there are no tables to compare")
	}
	for name, want := range a {
		if got, ok := b[name]; !ok || got != want {
			t.Errorf("%s differs:\na: %s\nb: %s", name, clip(want), clip(got))
		}
	}
	if len(a) != len(b) {
		t.Errorf("%d tables at a, %d at b", len(a), len(b))
	}
}

// content reads each table of the users as COPY writes it, in the order of the rows' texts.
func content(t *testing.T, s *pair.Site) map[string]string {
	t.Helper()
	conn, err := pg.Connect(t.Context(), s.Cluster.DSN(s.Database, ""), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(conn)
	names, err := pg.Rows(t.Context(), conn, `SELECT format('%I.%I', nspname, relname) FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
		WHERE relkind = 'r' AND relpersistence = 'p' AND nspname NOT IN ('pg_catalog', 'information_schema', 'duri')`)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, n := range names {
		var b bytes.Buffer
		if _, err := conn.CopyTo(t.Context(), &b, fmt.Sprintf(`COPY (SELECT x::text FROM ONLY %s x ORDER BY x::text COLLATE "C") TO STDOUT`, n[0])); err != nil {
			t.Fatalf("site %s: read %s: %v", s.Name, n[0], err)
		}
		all[n[0]] = b.String()
	}
	return all
}

func clip(s string) string {
	const most = 400
	if len(s) > most {
		return fmt.Sprintf("%s... (%d bytes)", s[:most], len(s))
	}
	return s
}

// healthy waits until duri status at the site says that all is well.
func healthy(t *testing.T, s *pair.Site, d time.Duration) {
	t.Helper()
	within(t, d, "duri status at "+s.Name+" is well", func(ctx context.Context) error {
		r, err := run(ctx, "status", "-c", s.ConfigFile)
		if err == nil && r.code != 0 {
			err = fmt.Errorf("exit code %d\n%s%s", r.code, r.stdout, r.stderr)
		}
		return err
	})
}

// complains waits until duri status at the site shows a problem that holds the texts, with a hint, and gives what it
// printed.
func complains(t *testing.T, s *pair.Site, d time.Duration, texts ...string) string {
	t.Helper()
	var out string
	within(t, d, "duri status at "+s.Name+" tells of "+strings.Join(texts, ", "), func(ctx context.Context) error {
		r, err := run(ctx, "status", "-c", s.ConfigFile)
		if err != nil {
			return err
		}
		out = r.stdout
		if r.code != 3 {
			return fmt.Errorf("exit code %d\n%s%s", r.code, r.stdout, r.stderr)
		}
		for _, want := range append(texts, "hint: ") {
			if !strings.Contains(out, want) {
				return fmt.Errorf("%q is missing in\n%s", want, out)
			}
		}
		return nil
	})
	return out
}

// ready waits until the agent of a site has its database open; its peer need not be there.
func ready(t *testing.T, s *pair.Site, d time.Duration) server.DatabaseStatus {
	t.Helper()
	var db server.DatabaseStatus
	within(t, d, "the database at "+s.Name+" is ready", func(ctx context.Context) (err error) {
		if db, err = s.Status(ctx); err == nil && (db.State != "ready" || db.Problem != nil) {
			err = fmt.Errorf("%s: %+v\n%s", db.State, db.Problem, s.Log())
		}
		return err
	})
	return db
}
