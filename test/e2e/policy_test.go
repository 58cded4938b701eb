package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/server"
)

const policySQL = `
	CREATE TABLE counter (id int PRIMARY KEY, n int NOT NULL, note text);
	ALTER TABLE counter REPLICA IDENTITY FULL;
	INSERT INTO counter VALUES (1, 0), (2, 0);
	CREATE TABLE parent (id int PRIMARY KEY);
	INSERT INTO parent VALUES (1), (2), (3);
	CREATE TABLE child (id int PRIMARY KEY, parent int CONSTRAINT child_parent REFERENCES parent);
	CREATE TABLE letter (id int PRIMARY KEY, parent int CONSTRAINT letter_parent REFERENCES parent);
	CREATE TABLE tag (id int PRIMARY KEY, name text UNIQUE)`

// declaring is the configuration with the policies of these tests.
func declaring(_, text string) string {
	const name = `  - name: "app"`
	return strings.Replace(text, name, name+`
    tables:
      public.counter: {delta: [n]}
      public.child: {foreign_keys: {child_parent: remove_child}}`, 1)
}

// eventually waits until a query's only value at a site is as wanted.
func eventually(t *testing.T, s *pair.Site, sql, want string) {
	t.Helper()
	within(t, healMax, fmt.Sprintf("%s at %s gives %s", sql, s.Name, want), func(ctx context.Context) error {
		rows, err := s.Cluster.QueryText(ctx, s.Database, sql)
		if err == nil && (len(rows) != 1 || rows[0][0] != want) {
			err = fmt.Errorf("it gives %v", rows)
		}
		return err
	})
}

// apart runs SQL at each site while neither hears the other, and waits until both have applied the other's.
func apart(t *testing.T, p *pair.Pair, atA, atB string) {
	t.Helper()
	for _, s := range p.Sites {
		s.Relay.Cut()
	}
	do(t, p.Sites[0], atA)
	do(t, p.Sites[1], atB)
	for _, s := range p.Sites {
		s.Relay.Heal()
	}
	settled(t, p, 2*healMax)
}

// TestPoliciesOfTheConfiguration goes through what may be declared, with the link cut while both sites write.
func TestPoliciesOfTheConfiguration(t *testing.T) {
	t.Parallel()
	p := newPair(t, pair.Options{Seed: schema(policySQL), Relays: true, Config: declaring})
	a := p.Sites[0]

	t.Log("delta columns: both differences are added")
	const add = "UPDATE counter SET n = n + 1 WHERE id = 1"
	apart(t, p, add, add)
	for _, s := range p.Sites {
		if n := text(t, s, "SELECT n FROM counter WHERE id = 1"); n != "2" {
			t.Errorf("n is %s at %s", n, s.Name)
		}
	}

	t.Log("S26: a deletes the parents, b inserts children")
	apart(t, p, "DELETE FROM parent WHERE id = 1; DELETE FROM parent WHERE id = 2", "INSERT INTO child VALUES (1, 1), (2, 3); INSERT INTO letter VALUES (1, 2)")
	for _, s := range p.Sites {
		eventually(t, s, "SELECT string_agg(id::text, ',') FROM child", "2")
		eventually(t, s, "SELECT count(*) FROM duri.event WHERE kind = 'orphan' AND text LIKE '%letter%'", "1")
		eventually(t, s, "SELECT count(*) FROM letter", "1")
		within(t, healMax, "duri status tells of the orphan", func(ctx context.Context) error {
			r, err := run(ctx, "status", "-c", s.ConfigFile)
			if err == nil && !strings.Contains(r.stdout, "app at "+s.Name+": 1 row of public.letter without a parent in public.parent") {
				err = fmt.Errorf("exit code %d\n%s%s", r.code, r.stdout, r.stderr)
			}
			return err
		})
	}

	t.Log("S17: of two equal names the older row is parked, and comes back")
	do(t, a, "INSERT INTO tag VALUES (3, 'other')")
	settled(t, p, healMax)
	apart(t, p, "INSERT INTO tag VALUES (1, 'blue')", "INSERT INTO tag VALUES (2, 'blue')")
	for _, s := range p.Sites {
		eventually(t, s, "SELECT string_agg(id::text, ',') FROM tag WHERE name = 'blue'", "2")
		within(t, healMax, "the status counts the parked row", func(ctx context.Context) error {
			d, err := s.Status(ctx)
			if err == nil && d.Parked != 1 {
				err = fmt.Errorf("%+v", d)
			}
			return err
		})
	}
	if r := duri(t, "status", "-c", a.ConfigFile); !strings.Contains(r.stdout, "1 row of public.tag hidden") {
		t.Errorf("status does not tell of the parked row:\n%s", r.stdout)
	}
	do(t, a, "DELETE FROM tag WHERE id = 2")
	for _, s := range p.Sites {
		eventually(t, s, "SELECT string_agg(id::text, ',') FROM tag WHERE name = 'blue'", "1")
	}

	settled(t, p, healMax)
	equal(t, p)
}

// TestDifferentPoliciesHoldADirection declares by SQL at one site, then at the other.
func TestDifferentPoliciesHoldADirection(t *testing.T) {
	t.Parallel()
	p := newPair(t, pair.Options{Seed: schema(policySQL)})
	a, b := p.Sites[0], p.Sites[1]
	const declare = `SELECT duri.set_policy('counter', '{"delta": ["n"]}')`
	do(t, a, declare)
	complains(t, a, healMax, "b -> a: ", "table public.counter has another policy at b (default) than at a (mode row, delta n)")
	complains(t, b, healMax, "a -> b: ", "table public.counter has another policy at a (mode row, delta n) than at b (default)")
	do(t, a, "UPDATE counter SET n = n + 1 WHERE id = 1")
	do(t, b, "UPDATE counter SET n = n + 1 WHERE id = 1")
	within(t, healMax, "b has received the change", func(ctx context.Context) error {
		d, err := b.Status(ctx)
		if l := d.Links[0]; err == nil && (l.Received.End < l.Origin || l.LagBytes == 0) {
			err = fmt.Errorf("%+v", l)
		}
		return err
	})
	if n := text(t, b, "SELECT n FROM counter WHERE id = 1"); n != "1" {
		t.Errorf("b has applied a held change: n is %s", n)
	}
	do(t, b, declare)
	for _, s := range p.Sites {
		eventually(t, s, "SELECT n FROM counter WHERE id = 1", "2")
		healthy(t, s, healMax)
		eventually(t, s, "SELECT count(*) FROM duri.event WHERE kind = 'policy'", "1")
	}
	equal(t, p)
}

// TestAClientsLockStallsItsRowOnly is S40.
func TestAClientsLockStallsItsRowOnly(t *testing.T) {
	t.Parallel()
	p := newPair(t, pair.Options{Seed: schema(policySQL)})
	a, b := p.Sites[0], p.Sites[1]
	conn, err := pg.Connect(t.Context(), b.Cluster.DSN(b.Database, ""), "", map[string]string{"application_name": "hoarder"})
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(conn)
	if _, err := pg.Rows(t.Context(), conn, "BEGIN; SELECT FROM counter WHERE id = 1 FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	do(t, a, "UPDATE counter SET n = 7 WHERE id = 1")
	for i := range 20 {
		do(t, a, fmt.Sprintf("UPDATE counter SET n = %d WHERE id = 2", i+1))
	}
	eventually(t, b, "SELECT n FROM counter WHERE id = 2", "20")
	within(t, healMax, "duri status names who holds the row", func(ctx context.Context) error {
		r, err := run(ctx, "status", "-o", "json", "-c", b.ConfigFile)
		if err != nil {
			return err
		}
		var s server.ClusterStatus
		if err := json.Unmarshal([]byte(r.stdout), &s); err != nil {
			return err
		}
		l := s.Sites[0].Databases[0].Links[0]
		if r.code != 3 || l.Apply.Held != 1 || !strings.Contains(l.Apply.Blocker, "hoarder") || l.Health != server.HealthDegraded {
			return fmt.Errorf("exit code %d: %+v", r.code, l)
		}
		return nil
	})
	complains(t, b, healMax, "a -> b: the changes of 1 row wait for locks", "hoarder")
	if n := text(t, b, "SELECT n FROM counter WHERE id = 1"); n != "0" {
		t.Errorf("the held row was written: n is %s", n)
	}
	if _, err := pg.Rows(t.Context(), conn, "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	eventually(t, b, "SELECT n FROM counter WHERE id = 1", "7")
	settled(t, p, healMax)
	for _, s := range p.Sites {
		healthy(t, s, healMax)
	}
	equal(t, p)
}
