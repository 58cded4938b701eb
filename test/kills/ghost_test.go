package kills

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/server"
)

// TestGhostsAreReversed is S42 with marks: a site dies with commits that no other site has. One was asked about, and its client
// was told that it was aborted; one was never asked about; one has no mark. When the site is back, the first never shows up and
// is reversed there, the second likewise, unless the configuration merges it, and the third is merged.
func TestGhostsAreReversed(t *testing.T) {
	for _, tail := range []string{"reverse", "merge"} {
		t.Run(tail, func(t *testing.T) { ghosts(t, tail) })
	}
}

// everyKind are tables that a ghost writes in every way, how it does, what the other site writes meanwhile, and what is there in the end.
const (
	everyKind = `CREATE TABLE u (id int PRIMARY KEY, name text UNIQUE);
		CREATE TABLE k (id int PRIMARY KEY, v text); INSERT INTO k VALUES (1, 'k'), (2, 'k');
		CREATE TABLE parent (id int PRIMARY KEY); INSERT INTO parent VALUES (1), (2);
		CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE); INSERT INTO child VALUES (11, 1), (21, 2);
		CREATE TABLE heap (a int, b text); ALTER TABLE heap REPLICA IDENTITY FULL; INSERT INTO heap VALUES (1, 'h'), (2, 'h'), (2, 'h'), (3, NULL);
		CREATE TABLE emptied (id int PRIMARY KEY); INSERT INTO emptied VALUES (1), (2);
		CREATE TABLE large (id int PRIMARY KEY, v text); INSERT INTO large SELECT n, md5(n::text) FROM generate_series(1, 20000) AS n`
	before  = "INSERT INTO u VALUES (3, 'y')" // at the other site, which has not sent it
	ghostly = `INSERT INTO u VALUES (1, 'x'), (4, 'y'); UPDATE k SET id = id + 100 WHERE id = 1; DELETE FROM parent WHERE id = 1;
		INSERT INTO heap VALUES (1, 'ghost'), (1, 'ghost'), (NULL, ''); DELETE FROM heap WHERE a = 2; UPDATE heap SET b = 'ghost' WHERE a = 3;
		TRUNCATE emptied; UPDATE large SET v = 'ghost' WHERE id = 4711`
	meanwhile = `INSERT INTO u VALUES (2, 'x'); INSERT INTO k VALUES (101, 'b'); INSERT INTO child VALUES (12, 1); INSERT INTO heap VALUES (3, NULL);
		INSERT INTO emptied VALUES (3)`
	inTheEnd = "(2,x),(3,y) | (1,k),(101,b),(2,k) | (1),(2) | (11,1),(12,1),(21,2) | (1,h),(2,h),(2,h),(3,),(3,) | (1),(2),(3)"
)

// everyRow shows the tables of everyKind, but large, which is equal to what it was.
func everyRow(t *testing.T, s *pair.Site) string {
	t.Helper()
	var all []string
	for _, table := range []string{"u", "k", "parent", "child", "heap", "emptied"} {
		rows, err := s.Cluster.QueryText(t.Context(), s.Database, fmt.Sprintf("SELECT coalesce(string_agg(x::text, ',' ORDER BY x::text COLLATE \"C\"), '') FROM %s AS x", table))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, rows[0][0])
	}
	rows, err := s.Cluster.QueryText(t.Context(), s.Database, "SELECT count(*) FROM large WHERE v = md5(id::text)")
	if err != nil || rows[0][0] != "20000" {
		t.Errorf("site %s: %v rows of large are as they were, %v", s.Name, rows, err)
	}
	return strings.Join(all, " | ")
}

func ghosts(t *testing.T, tail string) {
	p := startPair(t, pair.Options{Config: func(_, text string) string {
		return strings.Replace(text, "\ndurability:\n", "\ndurability:\n  detect: 6s\n  returning_tail: "+tail+"\n", 1)
	}, Seed: func(ctx context.Context, a *pair.Site) error { return a.Cluster.Exec(ctx, a.Database, everyKind) }})
	settledPair(t, p)
	unheeded(t, p, 1)
	within(t, time.Minute, func(ctx context.Context) error { return p.HoldCommits(ctx) })
	unheeded(t, p, 0)
	a, b := p.Sites[0], p.Sites[1]
	p.Link("a", "b").Cut()
	p.Link("b", "a").Cut()
	id := func(n int) string { return fmt.Sprintf("%016d", n) }
	marked := func(n int, sql string) string {
		return fmt.Sprintf("BEGIN; %s; SELECT duri.mark('%s'); COMMIT", sql, id(n))
	}
	older := beginWait(t, b, before)
	waits := []waiting{
		beginWait(t, a, marked(1, "UPDATE t SET n = 111 WHERE id = 1; DELETE FROM t WHERE id = 9; INSERT INTO t VALUES (11, 1); "+ghostly)),
		beginWait(t, a, marked(2, "UPDATE t SET n = 222 WHERE id = 2; INSERT INTO t VALUES (12, 2)")),
		beginWait(t, a, "UPDATE t SET n = 333 WHERE id = 3"),
	}
	if err := errors.Join(a.SignalAgent(syscall.SIGKILL), a.Cluster.Kill()); err != nil {
		t.Fatal(err)
	}
	for _, w := range waits {
		if err := <-w.answer; err == nil {
			t.Error("a commit without a receipt was acknowledged")
		}
	}
	soloAmong(t, b)
	if err := <-older.answer; err != nil {
		t.Error(err)
	}
	ask := func(s *pair.Site, n int) (server.OutcomeReport, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		return s.Control.Outcome(ctx, server.OutcomeRequest{Database: a.Database, Origin: "a", LTXID: []byte(id(n))})
	}
	for range 2 {
		if out, err := ask(b, 1); err != nil || out.Committed {
			t.Fatalf("the fate of what nobody else has: %+v, %v", out, err)
		}
	}
	if err := b.Cluster.Exec(t.Context(), b.Database, "UPDATE t SET n = n + 7 WHERE id IN (2, 4); "+meanwhile); err != nil {
		t.Fatal(err)
	}
	p.Link("a", "b").Heal()
	p.Link("b", "a").Heal()
	if err := errors.Join(a.Cluster.Start(t.Context()), a.StartAgent()); err != nil {
		t.Fatal(err)
	}
	settledPair(t, p)
	within(t, time.Minute, p.WaitApplied)
	want := "[[1 0] [2 7] [3 333] [4 7] [5 0] [6 0] [7 0] [8 0] [9 0] [10 0]]"
	ghosts := []string{id(1), id(2)}
	if tail == "merge" {
		want = "[[1 0] [2 7] [3 333] [4 7] [5 0] [6 0] [7 0] [8 0] [9 0] [10 0] [12 2]]"
		ghosts = ghosts[:1]
	}
	if x, y := rows(t, a), rows(t, b); x != want || y != want {
		t.Errorf("the sites have\n%s\n%s, want\n%s", x, y, want)
	}
	if x, y := everyRow(t, a), everyRow(t, b); x != inTheEnd || y != inTheEnd {
		t.Errorf("the sites have\n%s\n%s, want\n%s", x, y, inTheEnd)
	}
	if log := a.Log(); !strings.Contains(log, "everything=false") || strings.Contains(log, "everything=true") {
		t.Error("more was compared than what the ghosts have written")
	}
	have, err := b.Cluster.QueryText(t.Context(), b.Database, "SELECT convert_from(ltxid, 'UTF8') FROM duri.ghost WHERE reversed IS NOT NULL ORDER BY 1")
	if got, want := fmt.Sprint(have), "["+"["+strings.Join(ghosts, "] [")+"]"+"]"; err != nil || got != want {
		t.Errorf("reversed ghosts on record: %s, %v, want %s", got, err, want)
	}
	reversed, err := a.Cluster.QueryText(t.Context(), a.Database, "SELECT before->>'id', before->>'n', after->>'n' FROM duri.gap_row WHERE table_name = 't' AND (before->>'n' IN ('111', '1') OR before IS NULL) ORDER BY 1")
	if got, want := fmt.Sprint(reversed), `[[1 111 0] [11 1 \N] [\N \N 0]]`; err != nil || got != want {
		t.Errorf("what was reversed: %s, %v, want %s", got, err, want)
	}
	if _, err := ask(b, 3); err == nil || !strings.Contains(err.Error(), "is a member") {
		t.Errorf("a question when the site is a member again: %v", err)
	}
}

// TestGhostThatWasNotDecoded: a server ends with a commit that nobody has decoded, while its agent lives and is in touch all the time.
// The client was told that it was aborted. The site is not taken back before all that its server has recovered is in its journal, and
// the commit is reversed.
func TestGhostThatWasNotDecoded(t *testing.T) {
	p := startPair(t, pair.Options{Config: func(_, text string) string {
		return strings.Replace(text, "\ndurability:\n", "\ndurability:\n  detect: 6s\n", 1)
	}})
	settledPair(t, p)
	within(t, time.Minute, func(ctx context.Context) error { return p.HoldCommits(ctx) })
	unheeded(t, p, 0)
	a, b := p.Sites[0], p.Sites[1]
	walsender, err := a.Cluster.QueryText(t.Context(), a.Database, "SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'duri_app'")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(walsender[0][0])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil { // ends with the server
		t.Fatal(err)
	}
	// To decode it takes longer than to take the site back, because of what it carries beside its rows.
	const id = "the mark of a client"
	w := beginWait(t, a, `BEGIN; INSERT INTO t SELECT n, 1 FROM generate_series(1000, 3000) AS n;
		SELECT count(pg_logical_emit_message(true, 'bulk', repeat('x', 1000000))) FROM generate_series(1, 200);
		SELECT duri.mark('`+id+"'); COMMIT")
	if err := a.Cluster.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-w.answer; err == nil {
		t.Error("a commit without a receipt was acknowledged")
	}
	soloAmong(t, b)
	within(t, 20*time.Second, func(ctx context.Context) error {
		out, err := b.Control.Outcome(ctx, server.OutcomeRequest{Database: a.Database, Origin: "a", LTXID: []byte(id)})
		if err == nil && out.Committed {
			t.Error("what nobody else has counts as committed")
		}
		return err
	})
	within(t, time.Minute, a.Cluster.Start)
	settledPair(t, p)
	within(t, time.Minute, p.WaitApplied)
	for _, s := range p.Sites {
		if n, err := s.Cluster.QueryText(t.Context(), s.Database, "SELECT count(*) FROM t"); err != nil || n[0][0] != "10" {
			t.Errorf("site %s has %v rows, %v, want 10", s.Name, n, err)
		}
	}
}
