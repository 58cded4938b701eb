// Package failover proves what happens when the PostgreSQL beside an agent is not the one it was (S48).
package failover

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pgcluster"
)

func TestMain(m *testing.M) { pair.Main(m) }

// schema has what is given back in different ways: rows with a key, a table without one, values out of line, a key that
// changes, a sum that merges.
const schema = `CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL, note text);
CREATE TABLE log (site text, n int);
ALTER TABLE log REPLICA IDENTITY FULL;
CREATE TABLE doc (id int PRIMARY KEY, body text, n int NOT NULL);
ALTER TABLE doc ALTER body SET STORAGE EXTERNAL;
CREATE TABLE account (id int PRIMARY KEY, balance numeric NOT NULL);
ALTER TABLE account REPLICA IDENTITY FULL;
INSERT INTO t SELECT n, 0, 'seed' FROM generate_series(1, 100) AS n;
INSERT INTO doc SELECT n, repeat('x', 9000) || n, 0 FROM generate_series(1, 10) AS n;
INSERT INTO account SELECT n, 1000 FROM generate_series(1, 10) AS n`

// trial is two sites of which the first one will be set back.
type trial struct {
	*testing.T
	p    *pair.Pair
	a, b *pair.Site
	sync bool
}

// within bounds a step.
func (t *trial) within(d time.Duration, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	if err := f(ctx); err != nil {
		t.Fatal(err)
	}
}

func (t *trial) exec(s *pair.Site, sql string) {
	t.Helper()
	t.within(time.Minute, func(ctx context.Context) error { return s.Cluster.Exec(ctx, s.Database, sql) })
}

func (t *trial) text(s *pair.Site, sql string) (out string) {
	t.Helper()
	t.within(time.Minute, func(ctx context.Context) error {
		rows, err := s.Cluster.QueryText(ctx, s.Database, sql)
		var b strings.Builder
		for _, r := range rows {
			b.WriteString(strings.Join(r, "|") + "\n")
		}
		out = b.String()
		return err
	})
	return out
}

// start starts the sites.
func start(t *testing.T, sync bool) *trial {
	t.Helper()
	p := pair.ForTest(t, pair.Options{
		Sync: sync, Rearm: map[bool]time.Duration{true: 500 * time.Millisecond}[sync],
		Seed: func(ctx context.Context, a *pair.Site) error { return a.Cluster.Exec(ctx, a.Database, schema) },
		Config: func(_, text string) string {
			return strings.Replace(text, "databases:\n  - name: app\n", "databases:\n  - name: app\n    tables:\n      public.account:\n        delta: [balance]\n", 1)
		},
	})
	tr := &trial{t, p, p.Sites[0], p.Sites[1], sync}
	if sync {
		tr.within(time.Minute, p.HoldCommits)
		tr.waitMembers()
	}
	return tr
}

// waitMembers waits until both sites acknowledge.
func (t *trial) waitMembers() {
	t.Helper()
	t.within(2*time.Minute, func(ctx context.Context) error {
		return t.p.Wait(ctx, "both sites are members and their doors are open", func(ctx context.Context) (bool, error) {
			for _, s := range t.p.Sites {
				d, err := s.Control.Register(ctx)
				if err != nil {
					return false, err
				}
				if len(d.Register.Members) != 2 || !d.Member || !d.Door.Open || len(d.Unheeded) > 0 {
					return false, fmt.Errorf("site %s: %s (%s)", s.Name, d.Guarantee, d.Door.Shut)
				}
			}
			return true, nil
		})
	})
}

// work writes at both sites, in turns and at once, partly the same rows.
func (t *trial) work(round int) {
	t.Helper()
	for i := range 10 {
		n := round*100 + i
		t.exec(t.a, fmt.Sprintf(`INSERT INTO t VALUES (%[1]d, %[1]d, 'a'); INSERT INTO log VALUES ('a', %[1]d)`, 1000+n))
		t.exec(t.b, fmt.Sprintf(`INSERT INTO t VALUES (%[1]d, %[1]d, 'b'); INSERT INTO log VALUES ('b', %[1]d)`, 100000+n))
		t.exec(t.a, fmt.Sprintf("UPDATE t SET n = n + 1, note = 'a%d' WHERE id <= 20", n))
		t.exec(t.b, fmt.Sprintf("UPDATE t SET n = n + 1, note = 'b%d' WHERE id BETWEEN 10 AND 30", n))
		t.exec(t.a, fmt.Sprintf("UPDATE doc SET n = %d WHERE id = %d", n, 1+i))
		t.exec(t.a, fmt.Sprintf("UPDATE account SET balance = balance - 1 WHERE id = %d", 1+i))
		t.exec(t.b, fmt.Sprintf("UPDATE account SET balance = balance + 10 WHERE id = %d", 1+i))
		t.exec(t.b, fmt.Sprintf("UPDATE doc SET body = repeat('y', 9000) || %d WHERE id = %d", n, 1+(i+1)%10))
	}
	t.exec(t.a, fmt.Sprintf("DELETE FROM t WHERE id = %d; UPDATE t SET id = id + 50000 WHERE id = %d", 50+round, 60+round))
	t.exec(t.b, fmt.Sprintf("DELETE FROM t WHERE id = %d", 1000+round*100)) // a row of a
	t.exec(t.a, fmt.Sprintf("DELETE FROM log WHERE site = 'a' AND n = %[1]d", 1001+round*100))
}

const contents = `SELECT 't', id::text, n::text, note FROM t UNION ALL SELECT 'log', site, n::text, '' FROM log
UNION ALL SELECT 'doc', id::text, n::text, body FROM doc UNION ALL SELECT 'account', id::text, balance::text, '' FROM account ORDER BY 1, 2, 3, 4`

// equal compares the sites row by row, and gives what they hold.
func (t *trial) equal() string {
	t.Helper()
	t.within(2*time.Minute, t.p.WaitApplied)
	a, b := t.text(t.a, contents), t.text(t.b, contents)
	if a != b {
		t.Errorf("the sites differ:\n%s", difference(a, b))
	}
	if twice := t.text(t.b, "SELECT site, n, count(*) FROM log GROUP BY 1, 2 HAVING count(*) > 1"); twice != "" {
		t.Errorf("twice in a table without a key: %s", twice)
	}
	return a
}

// difference lists the lines that only one text has.
func difference(a, b string) string {
	count := map[string]int{}
	for l := range strings.Lines(a) {
		count[l]++
	}
	for l := range strings.Lines(b) {
		count[l]--
	}
	var out strings.Builder
	for l, n := range count {
		if n != 0 {
			fmt.Fprintf(&out, "%+d %.120s\n", n, strings.TrimSpace(l))
		}
	}
	return out.String()
}

// versions are those of the rows that site a wrote last.
const versions = `SELECT id, (pg_xact_commit_timestamp_origin(xmin)).timestamp FROM t
WHERE id >= 1000 AND id < 100000 ORDER BY id`

// places tell whether a row was written again.
const places = "SELECT 't', id, xmin, ctid FROM t UNION ALL SELECT 'doc', id, xmin, ctid FROM doc UNION ALL SELECT 'account', id, xmin, ctid FROM account ORDER BY 1, 2"

// replace kills site a's server, and lets another one take its place, at the same address.
func (t *trial) replace(c *pgcluster.Cluster) {
	t.Helper()
	old := t.a.Cluster
	if err := old.Kill(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := old.Destroy(); err != nil {
			t.Error(err)
		}
	})
	t.a.Cluster = c
	t.within(time.Minute, c.Start)
	t.within(time.Minute, func(ctx context.Context) error { return c.Exec(ctx, "postgres", "SELECT pg_promote()") })
}

// standby makes a physical standby of site a as it is now; it will have a's address.
func (t *trial) standby() *pgcluster.Cluster {
	t.Helper()
	var c *pgcluster.Cluster
	t.within(time.Minute, func(ctx context.Context) (err error) {
		of := fmt.Sprintf("host=127.0.0.1 port=%d user=%s", t.a.Cluster.Port(), t.a.Cluster.Superuser())
		c, err = pgcluster.Create(ctx, pgcluster.Options{BinDir: t.a.Cluster.BinDir(), Dir: filepath.Join(t.p.Dir(), "a-standby"), Port: t.a.Cluster.Port(), StandbyOf: of})
		return err
	})
	return c
}

// waitGivenBack waits until site a says so of itself, for the n-th time.
func (t *trial) waitGivenBack(n int) {
	t.Helper()
	t.within(2*time.Minute, func(ctx context.Context) error {
		return t.p.Wait(ctx, "site a was given back what it lost", func(ctx context.Context) (bool, error) {
			rows, err := t.a.Cluster.QueryText(ctx, t.a.Database, "SELECT count(*) FROM duri.event WHERE kind = 'given_back'")
			return err == nil && rows[0][0] == fmt.Sprint(n), err
		})
	})
}

// TestStandbyThatIsBehindIsGivenBackWhatItLost is S48.
func TestStandbyThatIsBehindIsGivenBackWhatItLost(t *testing.T) {
	for _, sync := range []bool{false, true} {
		t.Run(fmt.Sprintf("sync=%t", sync), func(t *testing.T) { lostByFailover(start(t, sync), false) })
	}
}

// TestStandbyThatIsBehindWhenTheAgentWasAwayToo is S48, with an agent that did not see it happen.
func TestStandbyThatIsBehindWhenTheAgentWasAwayToo(t *testing.T) {
	lostByFailover(start(t, true), true)
}

func lostByFailover(t *trial, agentToo bool) {
	t.work(1)
	standby := t.standby()
	t.work(2)
	t.within(time.Minute, t.p.WaitApplied)
	was := t.text(t.a, versions)
	lost := t.equal()
	if agentToo {
		if err := t.a.SignalAgent(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	at := t.text(t.b, places)
	t.replace(standby)
	if agentToo {
		if err := t.a.StartAgent(); err != nil {
			t.Fatal(err)
		}
	}
	t.waitGivenBack(1)
	if d := difference(lost, t.text(t.a, contents)); d != "" {
		t.Errorf("not as it was:\n%s", d)
	}
	if d := difference(was, t.text(t.a, versions)); d != "" {
		t.Errorf("versions are not as they were:\n%s", d)
	}
	if d := difference(at, t.text(t.b, places)); d != "" {
		t.Errorf("site b has written rows again:\n%s", d)
	}
	if n := t.text(t.a, "SELECT count(*) FROM duri.conflict WHERE origin = 1"); n != "0\n" {
		t.Errorf("%s conflicts with what was given back", n)
	}
	if t.sync {
		t.waitMembers()
	}
	t.work(3)
	t.equal()
	if err := errors.Join(t.a.SignalAgent(syscall.SIGKILL), t.a.StartAgent()); err != nil { // all of it survives a restart
		t.Fatal(err)
	}
	t.within(time.Minute, t.p.WaitReady)
	if t.sync {
		t.waitMembers()
	}
	t.work(4)
	t.equal()
}

// TestOlderDataDirectoryIsGivenBackWhatItLacks: a copy of the data directory, taken while the server was stopped.
func TestOlderDataDirectoryIsGivenBackWhatItLacks(t *testing.T) {
	for _, sync := range []bool{false, true} {
		t.Run(fmt.Sprintf("sync=%t", sync), func(t *testing.T) { olderDirectory(start(t, sync)) })
	}
}

func olderDirectory(t *trial) {
	t.work(1)
	kept := filepath.Join(t.p.Dir(), "a-data-kept")
	t.within(time.Minute, func(ctx context.Context) error { return t.a.Cluster.Stop(ctx, "fast") })
	copyTree(t.T, t.a.Cluster.DataDir(), kept)
	t.within(time.Minute, t.a.Cluster.Start)
	t.within(time.Minute, t.p.WaitReady)
	if t.sync {
		t.waitMembers()
	}
	t.work(2)
	lost := t.equal() // first, as it waits until what b has deleted is gone at a
	was := t.text(t.a, versions)
	at := t.text(t.b, places)
	if err := t.a.Cluster.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(t.a.Cluster.DataDir()); err != nil {
		t.Fatal(err)
	}
	copyTree(t.T, kept, t.a.Cluster.DataDir())
	t.within(time.Minute, t.a.Cluster.Start)
	t.waitGivenBack(1)
	if d := difference(lost, t.text(t.a, contents)); d != "" {
		t.Errorf("not as it was:\n%s", d)
	}
	if d := difference(was, t.text(t.a, versions)); d != "" {
		t.Errorf("versions are not as they were:\n%s", d)
	}
	if d := difference(at, t.text(t.b, places)); d != "" {
		t.Errorf("site b has written rows again:\n%s", d)
	}
	if t.sync {
		t.waitMembers()
	}
	t.work(3)
	t.equal()
}

// copyTree copies a directory with its owners.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", from, to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// TestWritesBeforeThereIsASlotStopTheDirection: what clients write at the server that took over, past the agent, before the
// agent has made a slot, cannot be decoded. It is noticed, and nothing is given back.
func TestWritesBeforeThereIsASlotStopTheDirection(t *testing.T) {
	tr := start(t, false)
	tr.work(1)
	standby := tr.standby()
	tr.work(2)
	tr.within(time.Minute, tr.p.WaitApplied)
	if err := tr.a.SignalAgent(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	tr.replace(standby)
	tr.exec(tr.a, "UPDATE t SET note = 'past the door' WHERE id = 99")
	before := tr.text(tr.a, "SELECT count(*) FROM t WHERE note = 'a'")
	if err := tr.a.StartAgent(); err != nil {
		t.Fatal(err)
	}
	tr.within(time.Minute, func(ctx context.Context) error {
		return tr.p.Wait(ctx, "site a says what is wrong", func(ctx context.Context) (bool, error) {
			d, err := tr.a.Status(ctx)
			if err != nil || d.Problem == nil {
				return false, err
			}
			return strings.Contains(d.Problem.Text, "clients have written at"), errors.New(d.Problem.Text)
		})
	})
	if after := tr.text(tr.a, "SELECT count(*) FROM t WHERE note = 'a'"); after != before {
		t.Errorf("%s rows of a, there were %s: something was given back", after, before)
	}
}

// TestGiveBackIsInterrupted: the agent, and the server, end in the middle of it, each more than once.
func TestGiveBackIsInterrupted(t *testing.T) {
	tr := start(t, false)
	tr.work(1)
	standby := tr.standby()
	const many = 2000
	tr.exec(tr.a, fmt.Sprintf("DO $$ BEGIN FOR i IN 1..%d LOOP INSERT INTO log VALUES ('a', 500000 + i); UPDATE account SET balance = balance + 1 WHERE id = 1 + i %% 10; COMMIT; END LOOP; END $$", many))
	tr.work(2)
	lost := tr.equal()
	was := tr.text(tr.a, versions)
	tr.replace(standby)
	passed := func(n int) {
		t.Helper()
		tr.within(time.Minute, func(ctx context.Context) error {
			return tr.p.Wait(ctx, fmt.Sprintf("%d transactions are given back", n), func(ctx context.Context) (bool, error) {
				rows, err := tr.a.Cluster.QueryText(ctx, tr.a.Database, fmt.Sprintf("SELECT count(*) > %d FROM duri.applied WHERE origin = 1", n))
				return err == nil && rows[0][0] == "t", err
			})
		})
	}
	for i := range 4 {
		passed((i + 1) * many / 8)
		if i%2 == 0 {
			if err := errors.Join(tr.a.SignalAgent(syscall.SIGKILL), tr.a.StartAgent()); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := standby.Kill(); err != nil {
			t.Fatal(err)
		}
		tr.within(time.Minute, standby.Start)
	}
	if n := tr.text(tr.a, "SELECT count(*) FROM duri.event WHERE kind = 'given_back'"); n != "0\n" {
		t.Fatalf("it had ended before the interruptions did")
	}
	tr.waitGivenBack(1)
	if d := difference(lost, tr.text(tr.a, contents)); d != "" {
		t.Errorf("not as it was:\n%s", d)
	}
	if d := difference(was, tr.text(tr.a, versions)); d != "" {
		t.Errorf("versions are not as they were:\n%s", d)
	}
	tr.work(3)
	tr.equal()
}
