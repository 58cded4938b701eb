package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/faultnet"
	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/server"
)

// healMax is how soon a direction must work again after the network does: 3 s of silence, at most 2 s between two
// attempts, and a busy machine.
const healMax = 15 * time.Second

// direction waits until the link to s from the other site is up, or not.
func direction(t *testing.T, s *pair.Site, up bool) {
	t.Helper()
	within(t, healMax, fmt.Sprintf("the link to %s is up: %v", s.Name, up), func(ctx context.Context) error {
		d, err := s.Status(ctx)
		if err != nil {
			return err
		}
		if l := d.Links[0]; l.Connected != up || up && l.Health != server.HealthOK || !up && (l.Health != server.HealthDown || l.Problem == nil) {
			return fmt.Errorf("%+v, problem %+v", l, l.Problem)
		}
		return nil
	})
}

func TestTroubleOfTheNetworkHealsByItself(t *testing.T) {
	t.Parallel()
	rnd := random(t)
	p := newPair(t, pair.Options{Seed: schema(ledgerSQL), Relays: true})
	a, b := p.Sites[0], p.Sites[1]
	writers, stop := load(t, p, rnd)

	t.Log("cut")
	for _, s := range p.Sites {
		s.Relay.Cut()
	}
	direction(t, a, false)
	direction(t, b, false)
	if r := duri(t, "status", "-c", a.ConfigFile); r.code != 3 || !strings.Contains(r.stdout, "site b does not answer") || !strings.Contains(r.stdout, "disconnected") {
		t.Errorf("status during a cut: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if r := duri(t, "verify", "-c", a.ConfigFile); r.code == 0 || r.stderr == "" {
		t.Errorf("verify during a cut: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	before := text(t, b, "SELECT count(*) FROM kv WHERE client IN (0, 2)")
	pause(t.Context(), 300*time.Millisecond)
	if n := text(t, b, "SELECT count(*) FROM kv WHERE client IN (0, 2)"); n != before {
		t.Errorf("%s rows of a at b, then %s, through a cut", before, n)
	}
	for _, s := range p.Sites {
		s.Relay.Heal()
	}
	direction(t, a, true)
	direction(t, b, true)

	for _, c := range []struct {
		name string
		way  faultnet.Direction
	}{{"what b says to a is lost", faultnet.ToClient}, {"what a says to b is lost", faultnet.ToTarget}} {
		t.Log(c.name)
		b.Relay.Drop(c.way)
		direction(t, a, false) // a follows b through b's relay
		direction(t, b, true)
		b.Relay.Heal()
		direction(t, a, true)
	}

	t.Log("reset")
	for range 5 {
		a.Relay.Reset()
		b.Relay.Reset()
		pause(t.Context(), 100*time.Millisecond)
	}
	t.Log("refuse")
	a.Relay.Refuse()
	a.Relay.Reset()
	direction(t, b, false)
	a.Relay.Heal()
	direction(t, b, true)

	t.Log("20 ms of delay")
	for _, s := range p.Sites {
		s.Relay.Delay(20 * time.Millisecond)
	}
	pause(t.Context(), time.Second)
	stop()
	settled(t, p, 30*time.Second)
	equal(t, p)
	exact(t, p, writers)
	for _, s := range p.Sites {
		healthy(t, s, healMax)
	}
	t.Log("end while cut off")
	a.Relay.Cut()
	b.Relay.Cut()
	endsWithin(t, a, 4*time.Second) // it gives b 3 s to take its last word (package link)
	direction(t, b, false)
	ends(t, b)
}

// TestIdleSitesAreWellAgainAfterARestartOfPostgreSQL has no load: nothing but the restart itself may clear what the
// outage left in the status.
func TestIdleSitesAreWellAgainAfterARestartOfPostgreSQL(t *testing.T) {
	t.Parallel()
	p := newPair(t, pair.Options{Seed: schema("CREATE TABLE x (id int PRIMARY KEY)")})
	b := p.Sites[1]
	if err := b.Cluster.Stop(t.Context(), "immediate"); err != nil {
		t.Fatal(err)
	}
	complains(t, b, healMax, "app at b", "connect")
	if err := b.Cluster.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	healthy(t, b, 30*time.Second)
	healthy(t, p.Sites[0], healMax)
}

// TestIdleSitesAreWellAgainAfterApplyFailed ends the session in which apply asks whether a commit is flushed. Everything
// is applied by then, so there is nothing by which apply could show that it works again.
func TestIdleSitesAreWellAgainAfterApplyFailed(t *testing.T) {
	t.Parallel()
	p := newPair(t, pair.Options{Seed: schema("CREATE TABLE x (id serial PRIMARY KEY)")})
	a, b := p.Sites[0], p.Sites[1]
	within(t, noticeMax, "apply fails", func(ctx context.Context) error {
		do(t, a, "INSERT INTO x DEFAULT VALUES")
		do(t, b, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'duri_apply_aux'")
		d, err := b.Status(ctx)
		if err == nil && d.Links[0].Apply.LastError == "" {
			err = errors.New("it goes on")
		}
		return err
	})
	settled(t, p, noticeMax)
	healthy(t, b, 40*time.Second)
	equal(t, p)
}

func TestTwoDatabasesWithOddNamesAndSitesThatBeginAlike(t *testing.T) {
	t.Parallel()
	first, second := `My-App "1" é`, "my_app"
	p := newPair(t, pair.Options{
		Database: first, More: []string{second}, Names: []string{"a", "ab"}, Seed: schema(`CREATE TABLE "T x" (id int PRIMARY KEY, v text); INSERT INTO "T x" VALUES (0, 'seed')`),
	})
	for i, s := range p.Sites {
		do(t, s, fmt.Sprintf(`INSERT INTO "T x" VALUES (%d, 'first')`, i+1))
		// Schema changes are not replicated: the second database gets its table at both sites.
		if err := s.Cluster.Exec(t.Context(), second, `CREATE TABLE y (id int PRIMARY KEY)`); err != nil {
			t.Fatal(err)
		}
	}
	for i, s := range p.Sites {
		if err := s.Cluster.Exec(t.Context(), second, fmt.Sprintf(`INSERT INTO y SELECT generate_series(%[1]d, %[1]d + 99)`, 100*i)); err != nil {
			t.Fatal(err)
		}
	}
	settled(t, p, 30*time.Second)
	for _, s := range p.Sites {
		if n := text(t, s, `SELECT string_agg(id || v, ' ' ORDER BY id) FROM "T x"`); n != "0seed 1first 2first" {
			t.Errorf("site %s: %s", s.Name, n)
		}
		rows, err := s.Cluster.QueryText(t.Context(), second, "SELECT count(*) FROM y")
		if err != nil || rows[0][0] != "200" {
			t.Errorf("site %s: %v rows in the second database, %v", s.Name, rows, err)
		}
		r := duri(t, "verify", "-c", s.ConfigFile)
		if r.code != 1 || !strings.Contains(r.stderr, "several databases") || !strings.Contains(r.stderr, "hint: name one with --database") {
			t.Errorf("verify without a database: exit code %d: %s", r.code, r.stderr)
		}
		for _, db := range []string{first, second} {
			if r := duri(t, "verify", "-c", s.ConfigFile, "--database", db); r.code != 0 {
				t.Errorf("verify %s: exit code %d\n%s%s", db, r.code, r.stdout, r.stderr)
			}
		}
		healthy(t, s, healMax)
	}
	if n := text(t, p.Sites[0], "SELECT count(DISTINCT slot_name) FROM pg_replication_slots WHERE slot_name LIKE 'duri%'"); n != "2" {
		t.Errorf("%s slots for two databases", n)
	}
}

// largeMax is how long a transaction of 300,000 rows may take here. Each restart has it decoded once more, as long as the
// slot's restart position lies before it, and other tests need the machine too.
const largeMax = 3 * time.Minute

// memoryMaxKB bounds what an agent may hold of a transaction of 300,000 rows, 30 MB of them.
const memoryMaxKB = 600 << 10

func TestAgentsEndCleanlyAndStayBoundedUnderALargeTransaction(t *testing.T) {
	t.Parallel()
	p := newPair(t, pair.Options{Seed: schema("CREATE TABLE big (id int PRIMARY KEY, v text)")}, pgtest.WithSetting("max_wal_size", "1GB"))
	do(t, p.Sites[0], "INSERT INTO big SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, 300000) i")
	settled(t, p, largeMax)
	for _, s := range p.Sites {
		kb := peakKB(t, s.AgentPID())
		t.Logf("agent %s: %d MB resident at the most while a transaction of 300000 rows passed", s.Name, kb>>10)
		if kb > memoryMaxKB {
			t.Errorf("agent %s took %d kB, want at most %d", s.Name, kb, memoryMaxKB)
		}
	}
	if n := text(t, p.Sites[1], "SELECT count(*) FROM big"); n != "300000" {
		t.Errorf("%s rows at b", n)
	}
	for _, s := range p.Sites {
		ends(t, s)
		start(t, s)
	}
	streams(t, p)
	do(t, p.Sites[1], "UPDATE big SET v = 'b' WHERE id < 100")
	settled(t, p, largeMax)
	equal(t, p)
	for _, s := range p.Sites { // under load, and with the peer gone
		ends(t, s)
	}
}

// ends sends SIGTERM and asserts a clean end, with exit code 0 and within 2 s.
func ends(t *testing.T, s *pair.Site) {
	t.Helper()
	endsWithin(t, s, 2*time.Second)
}

func endsWithin(t *testing.T, s *pair.Site, most time.Duration) {
	t.Helper()
	begin := time.Now()
	if err := s.SignalAgent(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	took := time.Since(begin)
	code, err := s.AgentEnd(t.Context())
	t.Logf("agent %s ended %s after SIGTERM", s.Name, took.Round(time.Millisecond))
	if code != 0 || took > most {
		err = errors.Join(err, fmt.Errorf("agent %s ended %s after SIGTERM with exit code %d, want 0 within %s:\n%s", s.Name, took, code, most, s.Log()))
	}
	if err != nil {
		t.Error(err)
	}
}
