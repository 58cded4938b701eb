// Package pgtest gives tests real PostgreSQL clusters (style.md section 5): started, with settings that make them
// quick, and gone when the test ends. A PostgreSQL that cannot be had fails the test; nothing is skipped.
//
//	c := pgtest.New(t)
//	dsn := pgtest.DB(t, c, "shop")
//
// It does not set up replication, publications or roles. Each New costs about 0.2 s, because one result
// of initdb is kept in the user's cache directory (duri/pgtest) and copied; delete it at will. Each cluster has a
// system identifier of its own. Everything else is below os.TempDir and removed by t.Cleanup; the directories that a
// killed test process leaves behind are removed by a later one (its servers end with it, see pgcluster).
package pgtest

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pgcluster"
)

// quick are settings that save time where losing data to a power failure does not matter. kill -9 loses nothing even
// so: the operating system keeps what was written.
var quick = map[string]string{
	"fsync":                      "off",
	"full_page_writes":           "off",
	"shared_buffers":             "32MB",
	"max_wal_size":               "256MB", // The files may be in memory, see scratch.go.
	"jit":                        "off",
	"max_parallel_workers":       "2",
	"dynamic_shared_memory_type": "mmap", // Below the data directory, so that nothing outlives it even in a crash.
}

// config is what the options set.
type config struct {
	binDir   string
	password string
	settings map[string]string
	stopped  bool
}

// Option changes what New makes.
type Option func(*config)

// WithFsync makes the server as durable as in production, for tests whose subject is durability.
func WithFsync() Option {
	return func(c *config) { c.settings["fsync"], c.settings["full_page_writes"] = "on", "on" }
}

// WithSetting sets a parameter of postgresql.conf.
func WithSetting(name, value string) Option {
	return func(c *config) { c.settings[strings.ToLower(name)] = value }
}

// WithPassword makes TCP ask for SCRAM passwords; it is the superuser's. It costs an initdb, about a second.
func WithPassword(password string) Option { return func(c *config) { c.password = password } }

// WithMajor uses the programs of one of Majors.
func WithMajor(m Major) Option { return func(c *config) { c.binDir = m.BinDir } }

// Stopped leaves the cluster stopped.
func Stopped() Option { return func(c *config) { c.stopped = true } }

// setupTimeoutMax bounds New and DB on a machine that is busy with other tests.
const setupTimeoutMax = 2 * time.Minute

// New makes a cluster and starts it, and removes it when the test ends. It logs how long that took; when the test
// fails, it logs the last lines of the server's log.
func New(t testing.TB, opts ...Option) *pgcluster.Cluster {
	t.Helper()
	cfg := config{settings: maps.Clone(quick)}
	for _, o := range opts {
		o(&cfg)
	}
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeoutMax)
	defer cancel()
	begin := time.Now()
	scratch, err := newScratch(cfg.settings["fsync"] == "on")
	if err != nil {
		fatal(t, err)
	}
	t.Cleanup(func() {
		if err := scratch.remove(); err != nil {
			t.Errorf("pgtest: %v", err)
		}
	})
	c, err := create(ctx, scratch.clusterDir(), cfg)
	if err != nil {
		fatal(t, err)
	}
	t.Cleanup(func() { // Runs before the removal above.
		if t.Failed() {
			t.Logf("pgtest: last lines of the log of the cluster on port %d:\n%s", c.Port(), logTail(c.LogPath()))
		}
		if err := c.Destroy(); err != nil {
			t.Errorf("pgtest: %v", err)
		}
	})
	created := time.Since(begin)
	if !cfg.stopped {
		if err := c.Start(ctx); err != nil {
			fatal(t, err)
		}
	}
	version, err := c.Version(ctx)
	if err != nil {
		fatal(t, err)
	}
	total := time.Since(begin)
	t.Logf("pgtest: PostgreSQL %s on port %d in %v (create %v, start %v)", version, c.Port(),
		total.Round(time.Millisecond), created.Round(time.Millisecond), (total - created).Round(time.Millisecond))
	return c
}

// create makes the cluster in dir, from the template unless it has a password.
func create(ctx context.Context, dir string, cfg config) (*pgcluster.Cluster, error) {
	binDir, err := pgcluster.FindBinDir(cfg.binDir)
	if err != nil {
		return nil, err
	}
	opts := pgcluster.Options{BinDir: binDir, Dir: dir, Password: cfg.password, Settings: cfg.settings}
	if cfg.password == "" {
		if opts.Template, err = template(ctx, binDir); err != nil {
			return nil, err
		}
	}
	return pgcluster.Create(ctx, opts)
}

// DB creates a database, which lives as long as the cluster, and gives the superuser's connection string to it over
// TCP.
func DB(t testing.TB, c *pgcluster.Cluster, name string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeoutMax)
	defer cancel()
	if err := c.Exec(ctx, "postgres", "CREATE DATABASE "+quoteIdent(name)); err != nil {
		fatal(t, err)
	}
	return c.DSN(name, c.Superuser())
}

// Exec runs SQL as the superuser and fails the test when that fails; see pgcluster.Cluster.Exec.
func Exec(t testing.TB, c *pgcluster.Cluster, db, sql string) {
	t.Helper()
	if err := c.Exec(t.Context(), db, sql); err != nil {
		fatal(t, err)
	}
}

// Query gives the rows of a query as text and fails the test when that fails; see pgcluster.Cluster.QueryText.
func Query(t testing.TB, c *pgcluster.Cluster, db, sql string) [][]string {
	t.Helper()
	rows, err := c.QueryText(t.Context(), db, sql)
	if err != nil {
		fatal(t, err)
	}
	return rows
}

// fatal ends the test with an error and its hint.
func fatal(t testing.TB, err error) {
	t.Helper()
	if hint := pgcluster.HintOf(err); hint != "" {
		t.Fatalf("pgtest: %v\nhint: %s", err, hint)
	}
	t.Fatalf("pgtest: %v", err)
}

// quoteIdent quotes an SQL identifier.
func quoteIdent(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// logTail reads the end of a server's log.
func logTail(path string) string {
	const most = 8 << 10
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Sprintf("(%s: %v)", filepath.Base(path), err)
	}
	return string(b[max(0, len(b)-most):])
}
