package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/link"
)

// noticeMax is how soon a cause must show, and how soon its end.
const noticeMax = 20 * time.Second

// refused runs the agent of a site that must not start, and checks exit code 1, one sentence that holds the texts, a
// hint, and that nothing was made.
func refused(t *testing.T, s *pair.Site, texts ...string) {
	t.Helper()
	r := duri(t, "agent", "-c", s.ConfigFile)
	if r.code != 1 {
		t.Errorf("exit code %d, want 1: %s", r.code, r.stderr)
	}
	for _, want := range append(texts, "duri: ", "\nhint: ") {
		if !strings.Contains(r.stderr, want) {
			t.Errorf("stderr has no %q: %s", want, r.stderr)
		}
	}
}

// untouched checks that no slot, no table of duri's and no journal is there.
func untouched(t *testing.T, s *pair.Site) {
	t.Helper()
	rows, err := s.Cluster.QueryText(t.Context(), "postgres", "SELECT slot_name FROM pg_replication_slots WHERE database = "+quote(s.Database))
	if err != nil || len(rows) != 0 {
		t.Errorf("slots of %s: %v, %v", s.Database, rows, err)
	}
	if files, err := filepath.Glob(filepath.Join(s.DataDir, "journal", "*", "*")); err != nil || len(files) != 0 {
		t.Errorf("journals: %v, %v", files, err)
	}
	if rows, err = s.Cluster.QueryText(t.Context(), "postgres", "SELECT count(*) FROM pg_database WHERE datname = "+quote(s.Database)); err != nil || rows[0][0] == "0" {
		return
	}
	if n := text(t, s, "SELECT count(*) FROM pg_class WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'duri')"); n != "0" {
		t.Errorf("schema duri holds %s relations", n)
	}
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

// TestAgentWaitsForEachCauseToGo has everything wrong at once: one after the other is named, nothing is made before the
// last one is gone, and then the agent goes on by itself.
func TestAgentWaitsForEachCauseToGo(t *testing.T) {
	t.Parallel()
	c := pgtest.New(t, pgtest.WithPassword("secret"), pgtest.WithSetting("wal_level", "replica"), pgtest.WithSetting("track_commit_timestamp", "off"))
	_, a := alone(t, c, "app", "a")
	password := func(p string) {
		if err := a.EditConfig(func(text string) string {
			return strings.Replace(text, "user=duri", "user=duri password="+p, 1)
		}); err != nil {
			t.Fatal(err)
		}
	}
	sql := func(statement string) {
		t.Helper()
		if err := c.Exec(t.Context(), "postgres", statement); err != nil {
			t.Fatal(err)
		}
	}
	sql("DROP DATABASE app")
	sql("ALTER ROLE duri PASSWORD 'right'")
	password("wrong")
	start(t, a)
	out := complains(t, a, noticeMax, "app at a", "password authentication failed", "check user and password of postgres.dsn")
	if strings.Contains(out, "password=") || strings.Contains(a.Log(), "password=wrong") {
		t.Errorf("the password is shown:\n%s", out)
	}
	ends(t, a)
	if err := a.EditConfig(func(text string) string { return strings.Replace(text, " password=wrong", "", 1) }); err != nil {
		t.Fatal(err)
	}
	password("right")
	untouched(t, a)
	start(t, a)
	complains(t, a, noticeMax, `database "app" does not exist`, "create the database, or correct databases: in duri.yaml")
	sql("CREATE DATABASE app")
	complains(t, a, noticeMax, "wal_level: it is replica and must be logical", "ALTER SYSTEM SET wal_level = logical")
	restart := func(setting, value string) {
		t.Helper()
		conf := filepath.Join(c.DataDir(), "duri.conf")
		f, err := os.OpenFile(conf, os.O_APPEND|os.O_WRONLY, 0)
		if err == nil {
			_, err = fmt.Fprintf(f, "\n%s = %s\n", setting, value)
		}
		if err == nil {
			err = f.Close()
		}
		if err == nil {
			err = c.Restart(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	restart("wal_level", "logical")
	complains(t, a, noticeMax, "track_commit_timestamp: it is off and must be on", "ALTER SYSTEM SET track_commit_timestamp = on")
	restart("track_commit_timestamp", "on")
	complains(t, a, noticeMax, "it may not", "hint: ")
	untouched(t, a)
	if err := c.Exec(t.Context(), "app", grants.SQL(grants.Spec{})); err != nil {
		t.Fatal(err)
	}
	ready(t, a, noticeMax)
}

// TestBadInputIsNamedAndLeavesNothing has cases of one site on one server, whose peer never comes.
func TestBadInputIsNamedAndLeavesNothing(t *testing.T) {
	t.Parallel()
	c := pgtest.New(t, pgtest.WithSetting("max_wal_senders", "60"), pgtest.WithSetting("max_replication_slots", "60"))
	for name, f := range map[string]func(t *testing.T, c *pgcluster.Cluster, db string){
		"unknown key":            unknownKey,
		"port in use":            portInUse,
		"second agent":           secondAgent,
		"long path":              longPath,
		"another cluster's file": anotherClusterFile,
		"wrong peers":            wrongPeers,
		"table":                  unreplicable,
		"not empty":              notEmpty,
		"another cluster's base": anotherClusterDatabase,
		"slot dropped":           slotDropped,
		"slot advanced":          slotAdvanced,
		"journal deleted":        journalDeleted,
		"journal damaged":        journalDamaged,
		"foreign origin":         foreignOrigin,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, c, "db_"+strings.ReplaceAll(strings.ReplaceAll(name, " ", "_"), "'", ""))
		})
	}
}

func unknownKey(t *testing.T, c *pgcluster.Cluster, db string) {
	_, a := alone(t, c, db, "a")
	line := 0
	if err := a.EditConfig(func(text string) string {
		line = strings.Count(text, "\n") + 2
		return text + "\njournal: {keeep: 1s}\n"
	}); err != nil {
		t.Fatal(err)
	}
	refused(t, a, fmt.Sprintf("%s:%d: ", a.ConfigFile, line), "keeep", "keep")
	untouched(t, a)
	r := duri(t, "config", "check", "-c", a.ConfigFile)
	if r.code != 3 || !strings.Contains(r.stderr, fmt.Sprintf("duri.yaml:%d: ", line)) {
		t.Errorf("config check: exit code %d: %s", r.code, r.stderr)
	}
}

func portInUse(t *testing.T, c *pgcluster.Cluster, db string) {
	p, a := alone(t, c, db, "a")
	l, err := net.Listen("tcp", loadConfig(t, p.Sites[0]).Listen)
	if err != nil {
		t.Fatal(err)
	}
	refused(t, a, "address already in use", "change listen in duri.yaml")
	untouched(t, a)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	start(t, a)
	ready(t, a, noticeMax)
}

func loadConfig(t *testing.T, s *pair.Site) *config.Config {
	t.Helper()
	cfg, err := config.Load(s.ConfigFile)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func secondAgent(t *testing.T, c *pgcluster.Cluster, db string) {
	_, a := alone(t, c, db, "a")
	start(t, a)
	ready(t, a, noticeMax)
	refused(t, a, "address already in use")
	was, free := "", freeAddress(t)
	if err := a.EditConfig(func(text string) string {
		was = text
		return strings.Replace(text, "listen: ", "listen: "+strconv.Quote(free)+" # ", 1)
	}); err != nil {
		t.Fatal(err)
	}
	refused(t, a, "an agent already runs on "+a.DataDir, "give this one another data_dir")
	if err := a.EditConfig(func(string) string { return was }); err != nil {
		t.Fatal(err)
	}
	ready(t, a, noticeMax) // the first one is not disturbed
	// One that was killed leaves its socket behind, which is no agent.
	if err := a.SignalAgent(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	start(t, a)
	ready(t, a, noticeMax)
}

func longPath(t *testing.T, c *pgcluster.Cluster, db string) {
	_, a := alone(t, c, db, "a")
	if err := a.EditConfig(func(text string) string { return text + "\ndata_dir: " + strings.Repeat("d", 100) + "\n" }); err != nil {
		t.Fatal(err)
	}
	refused(t, a, "and the system allows 107 for a socket", "choose a shorter data_dir")
	untouched(t, a)
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return l.Addr().String()
}

// anotherFolder makes the files of another cluster with the same sites and gives its folder.
func anotherFolder(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "other")
	r := duri(t, "init", "--site", "a=127.0.0.1:1", "--site", "b=127.0.0.1:2", "--database", "x", "--out", dir)
	if r.code != 0 {
		t.Fatalf("init: exit code %d: %s", r.code, r.stderr)
	}
	return dir
}

func anotherClusterFile(t *testing.T, c *pgcluster.Cluster, db string) {
	_, a := alone(t, c, db, "a")
	dir := anotherFolder(t)
	if err := a.EditConfig(func(text string) string {
		return text + fmt.Sprintf("\ntls: {ca: %[1]s/a/ca.crt, cert: %[1]s/a/site.crt, key: %[1]s/a/site.key}\n", dir)
	}); err != nil {
		t.Fatal(err)
	}
	refused(t, a, "is not the authority of cluster", "all sites use the ca.crt of the same duri init")
	untouched(t, a)
}

// wrongPeers puts at b's address a peer of another cluster, then one that speaks other versions of the protocol.
func wrongPeers(t *testing.T, c *pgcluster.Cluster, db string) {
	p, a := alone(t, c, db, "a")
	b := loadConfig(t, p.Sites[1])
	start(t, a)
	ready(t, a, noticeMax)
	complains(t, a, noticeMax, "b -> a", "cannot reach the agent at "+b.Listen, "see that the agent runs")
	dir := anotherFolder(t)
	other := loadConfig(t, &pair.Site{ConfigFile: filepath.Join(dir, "b", config.FileName)})
	func() {
		defer serve(t, b.Listen, link.ServerConfig{ClusterID: other.Cluster.ID}, pki.Files(other.TLS))()
		complains(t, a, noticeMax, "b -> a", "belongs to cluster "+other.Cluster.ID, "both sites need certificates of this cluster's authority")
	}()
	defer serve(t, b.Listen, link.ServerConfig{ClusterID: b.Cluster.ID, Versions: link.Versions{Min: 7, Max: 9}}, pki.Files(b.TLS))()
	complains(t, a, noticeMax, "b -> a", "speaks link protocol 7 to 9", "bring duri at both sites to")
	ready(t, a, noticeMax) // the site itself goes on
}

// serve runs a peer that has no database, and gives what ends it.
func serve(t *testing.T, address string, cfg link.ServerConfig, files pki.Files) (stop func()) {
	t.Helper()
	var err error
	if cfg.TLS, _, err = pki.TLS(files, cfg.ClusterID, "b"); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Site, cfg.Databases = "b", func(string) (link.Database, bool) { return nil, false }
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- link.NewServer(cfg).Serve(ctx, l) }()
	return func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serve links: %v", err)
		}
	}
}

func unreplicable(t *testing.T, c *pgcluster.Cluster, db string) {
	_, a := alone(t, c, db, "a")
	do(t, a, `CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
		CREATE TABLE names (name text COLLATE ci PRIMARY KEY); CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY);
		CREATE TABLE loose (x int); CREATE TABLE nothing (id int PRIMARY KEY); ALTER TABLE nothing REPLICA IDENTITY NOTHING`)
	start(t, a)
	complains(t, a, noticeMax, "public.names.name: a key column whose equality cannot be told from its text", "deterministic collation")
	do(t, a, `ALTER TABLE names ALTER name TYPE text COLLATE "C"`)
	complains(t, a, noticeMax, "public.nothing: its replica identity is NOTHING", "REPLICA IDENTITY DEFAULT")
	untouched(t, a)
	do(t, a, "ALTER TABLE nothing REPLICA IDENTITY DEFAULT")
	ready(t, a, noticeMax)
	for _, want := range []string{"public.scratch: an UNLOGGED table", "public.loose: it has no primary key: only INSERT replicates"} {
		if !strings.Contains(a.Log(), want) {
			t.Errorf("the log has no warning %q:\n%s", want, a.Log())
		}
	}
}

func notEmpty(t *testing.T, c *pgcluster.Cluster, db string) {
	_, b := alone(t, c, db, "b")
	do(t, b, "CREATE TABLE full_one (id int PRIMARY KEY); INSERT INTO full_one VALUES (1)")
	start(t, b)
	complains(t, b, noticeMax, "public.full_one: it has rows, and a site joins empty", "TRUNCATE it, or make this site the seed")
	untouched(t, b)
	do(t, b, "TRUNCATE full_one")
	complains(t, b, noticeMax, "copy from a", "cannot reach the agent at")
	if n := text(t, b, "SELECT count(*) FROM duri.meta WHERE key = 'enrolled_at'"); n != "0" {
		t.Error("the site counts as joined without a copy")
	}
}

func anotherClusterDatabase(t *testing.T, c *pgcluster.Cluster, db string) {
	_, first := alone(t, c, db, "a")
	start(t, first)
	ready(t, first, noticeMax)
	ends(t, first)
	_, second := alone(t, c, db+"_2", "a") // another cluster, whose file is then led to the first one's database
	if err := second.EditConfig(func(text string) string { return strings.Replace(text, db+"_2", db, 1) }); err != nil {
		t.Fatal(err)
	}
	start(t, second)
	id := loadConfig(t, first).Cluster.ID
	complains(t, second, noticeMax, "database "+db+" belongs to cluster "+id, "check postgres.dsn and site in duri.yaml")
	ends(t, second)
	start(t, first)
	ready(t, first, noticeMax)
}

// journalled gives a site that has journalled rows, and has ended.
func journalled(t *testing.T, c *pgcluster.Cluster, db string) *pair.Site {
	t.Helper()
	_, a := alone(t, c, db, "a")
	do(t, a, "CREATE TABLE x (id int PRIMARY KEY, v text)")
	start(t, a)
	ready(t, a, noticeMax)
	for i := range 20 {
		do(t, a, fmt.Sprintf("INSERT INTO x VALUES (%d, repeat('row', 100))", i))
	}
	within(t, noticeMax, "the rows are journalled", func(ctx context.Context) error {
		d, err := a.Status(ctx)
		if err == nil && d.Journal.Transactions < 20 {
			err = fmt.Errorf("%+v", d.Journal)
		}
		return err
	})
	ends(t, a)
	return a
}

const slotOf = "(SELECT slot_name FROM pg_replication_slots WHERE database = current_database())"

func slotDropped(t *testing.T, c *pgcluster.Cluster, db string) {
	a := journalled(t, c, db)
	dropSlot(t, a)
	do(t, a, "INSERT INTO x VALUES (100, 'nobody decodes this')")
	start(t, a)
	complains(t, a, noticeMax, "cannot continue the journal after", "the slot does not exist any more", "compare with `duri verify`", "re-join")
	if n := text(t, a, "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"); n != "0" {
		t.Error("the slot was made again silently: what came before it is missing in the journal")
	}
}

func slotAdvanced(t *testing.T, c *pgcluster.Cluster, db string) {
	a := journalled(t, c, db)
	do(t, a, "INSERT INTO x VALUES (100, 'skipped')")
	do(t, a, "SELECT pg_replication_slot_advance("+slotOf+", pg_current_wal_lsn())")
	start(t, a)
	complains(t, a, noticeMax, "cannot continue the journal after", "is ahead of what was ever journalled", "compare with `duri verify`")
	do(t, a, "INSERT INTO x VALUES (101, 'not decoded')")
	if d, err := a.Status(t.Context()); err != nil || d.Journal.Transactions != 20 {
		t.Errorf("the journal went on behind the gap: %+v, %v", d.Journal, err)
	}
}

func journalDeleted(t *testing.T, c *pgcluster.Cluster, db string) {
	a := journalled(t, c, db)
	dirs, err := filepath.Glob(filepath.Join(a.DataDir, "journal", "*", "a"))
	if err != nil || len(dirs) != 1 {
		t.Fatalf("journals: %v, %v", dirs, err)
	}
	away := dirs[0] + ".away"
	if err := os.Rename(dirs[0], away); err != nil {
		t.Fatal(err)
	}
	start(t, a)
	complains(t, a, noticeMax, "the journal directory "+dirs[0]+" is gone", "put the directory back, or re-join this site")
	if _, err := os.Stat(dirs[0]); err == nil {
		t.Error("a new journal was begun silently")
	}
	if err := os.Rename(away, dirs[0]); err != nil {
		t.Fatal(err)
	}
	ready(t, a, noticeMax)
}

func journalDamaged(t *testing.T, c *pgcluster.Cluster, db string) {
	a := journalled(t, c, db)
	files, err := filepath.Glob(filepath.Join(a.DataDir, "journal", "*", "a", "*"))
	if err != nil {
		t.Fatal(err)
	}
	flipped := ""
	flip := func() {
		for _, name := range files {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if at := strings.Index(string(b), "rowrowrow"); at > 0 {
				b[at+50] ^= 1
				if err := os.WriteFile(name, b, 0o600); err != nil {
					t.Fatal(err)
				}
				flipped = name
			}
		}
	}
	flip()
	if flipped == "" {
		t.Fatalf("no file holds the rows: %v", files)
	}
	start(t, a)
	complains(t, a, noticeMax, flipped, "offset")
	ends(t, a)
	flip()
	start(t, a)
	ready(t, a, noticeMax)
}

func foreignOrigin(t *testing.T, c *pgcluster.Cluster, db string) {
	a := journalled(t, c, db)
	start(t, a)
	ready(t, a, noticeMax)
	do(t, a, "SELECT pg_replication_origin_create('theirs_"+db+"'); SELECT pg_replication_origin_session_setup('theirs_"+db+"'); INSERT INTO x VALUES (200, 'theirs')")
	complains(t, a, noticeMax, "theirs_"+db, "which is no site of this cluster", "another replication tool")
}

// dropSlot drops the slot of a site whose agent has ended: PostgreSQL notices that a moment later.
func dropSlot(t *testing.T, s *pair.Site) {
	t.Helper()
	within(t, noticeMax, "the slot is dropped", func(ctx context.Context) error {
		return s.Cluster.Exec(ctx, s.Database, "SELECT pg_drop_replication_slot("+slotOf+")")
	})
}

func TestAPeerThatWasMadeAnewIsNotTakenForTheOldOne(t *testing.T) {
	t.Parallel()
	p := newPair(t, pair.Options{Seed: schema("CREATE TABLE x (id int PRIMARY KEY); INSERT INTO x SELECT generate_series(1, 100)")})
	a, b := p.Sites[0], p.Sites[1]
	for i, s := range p.Sites {
		do(t, s, "INSERT INTO x VALUES (100"+strconv.Itoa(i)+")")
	}
	settled(t, p, noticeMax)
	ends(t, b)
	dropSlot(t, b)
	for _, sql := range []string{"DROP DATABASE app", "CREATE DATABASE app"} {
		if err := b.Cluster.Exec(t.Context(), "postgres", sql); err != nil {
			t.Fatal(err)
		}
	}
	do(t, b, grants.SQL(grants.Spec{}))
	if err := os.RemoveAll(b.DataDir); err != nil {
		t.Fatal(err)
	}
	do(t, a, "INSERT INTO x VALUES (2000)")
	start(t, b)
	ready(t, b, startMax)
	complains(t, a, noticeMax, "b -> a", "incarnation", "re-join")
	// What b had before is copied again, whatever the server remembers of the progress of the earlier database.
	within(t, noticeMax, "b has a's rows", func(ctx context.Context) error {
		rows, err := b.Cluster.QueryText(ctx, b.Database, "SELECT count(*) FROM x")
		if err == nil && rows[0][0] != "103" {
			err = fmt.Errorf("%v rows", rows)
		}
		return err
	})
}
