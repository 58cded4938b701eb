package decode

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/wal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var rewrite = flag.Bool("rewrite", false, "capture testdata/pgoutput.hex anew from PostgreSQL, and write pgoutput.txt")

const waitMax = 60 * time.Second

// captureSchema and captureSQL make the messages of testdata/pgoutput.hex: every kind that protocol 1 has.
const captureSchema = `
CREATE TYPE mood AS ENUM ('ok');
CREATE TABLE t (id int PRIMARY KEY, v text, big text, m mood, num numeric(10,2));
ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
CREATE TABLE f (a int, b text);
ALTER TABLE f REPLICA IDENTITY FULL;
CREATE TABLE bag (x int);
CREATE PUBLICATION duri FOR ALL TABLES;
SELECT pg_replication_origin_create('somewhere');`

var captureSQL = []string{
	"INSERT INTO t VALUES (1, 'one', repeat('x', 3000), 'ok', 1.5), (2, NULL, '', NULL, NULL)",
	"UPDATE t SET v = 'uno' WHERE id = 1",
	"UPDATE t SET id = 3 WHERE id = 1",
	"DELETE FROM t WHERE id = 2",
	"INSERT INTO f VALUES (1, 'x'), (NULL, NULL); UPDATE f SET b = 'y' WHERE a = 1; DELETE FROM f WHERE a IS NULL",
	"INSERT INTO bag VALUES (7)",
	"ALTER TABLE bag ADD y text DEFAULT 'd'; INSERT INTO bag VALUES (8)",
	"TRUNCATE t, f RESTART IDENTITY CASCADE; TRUNCATE bag",
	"SELECT pg_logical_emit_message(true, 'duri.ltxid', 'inside'); SELECT pg_logical_emit_message(true, 'other', 'not ours'); INSERT INTO bag VALUES (9)",
	"SELECT pg_logical_emit_message(true, 'duri', 'alone')",
	"SELECT pg_logical_emit_message(false, 'duri', 'without a transaction')",
	`SELECT pg_replication_origin_session_setup('somewhere'); SELECT pg_replication_origin_xact_setup('16/B374D848', '2026-11-25 20:50:56.000001+00');
	 INSERT INTO t VALUES (10); TRUNCATE f`,
}

// capture makes the messages with a real PostgreSQL.
func capture(t *testing.T) [][]byte {
	c := pgtest.New(t)
	pgtest.DB(t, c, "app")
	pgtest.Exec(t, c, "app", captureSchema)
	pgtest.Exec(t, c, "app", "SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
	for _, sql := range captureSQL {
		pgtest.Exec(t, c, "app", sql)
	}
	var out [][]byte
	for _, r := range pgtest.Query(t, c, "app", `SELECT encode(data, 'hex') FROM pg_logical_slot_peek_binary_changes('s', NULL, NULL,
		'proto_version', '1', 'publication_names', 'duri', 'messages', 'true')`) {
		b, err := hex.DecodeString(r[0])
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b)
	}
	return out
}

// captured reads testdata/pgoutput.hex: one message a line.
func captured(t testing.TB) [][]byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", "pgoutput.hex"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out [][]byte
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		b, err := hex.DecodeString(lines.Text())
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b)
	}
	return out
}

// render prints what a stream of messages means, without what differs from capture to capture.
func render(t testing.TB, messages [][]byte) string {
	t.Helper()
	var b strings.Builder
	p := newParser(nil)
	for _, m := range messages {
		c, err := p.message(m)
		if err != nil {
			t.Fatalf("message %q: %v", m, err)
		}
		if c == nil {
			continue
		}
		x := c.Txn
		fmt.Fprintf(&b, "transaction: xid %t, lsn %t, time %t", x.XID != 0, x.CommitLSN != 0 && x.CommitLSN < x.EndLSN, x.CommitTime != 0)
		if c.Origin != "" {
			fmt.Fprintf(&b, ", origin %s at %s, committed %s", c.Origin, c.OriginLSN, x.CommitTime)
		}
		b.WriteByte('\n')
		for _, m := range c.Messages {
			fmt.Fprintf(&b, "  message %s: %s\n", m.Prefix, m.Content)
		}
		for _, ch := range x.Changes {
			fmt.Fprintf(&b, "  %s %s %c", ch.Op, ch.Relation, ch.Relation.Identity)
			for _, col := range ch.Relation.Columns {
				fmt.Fprintf(&b, " %s:%t:%s:%d", col.Name, col.Key, col.TypeName, col.TypeMod)
			}
			fmt.Fprintf(&b, " options %d\n", ch.Options)
			if ch.OldKind != wal.OldNone {
				fmt.Fprintf(&b, "    old %c %s\n", ch.OldKind, tupleText(ch.Old))
			}
			if ch.New != nil {
				fmt.Fprintf(&b, "    new %s\n", tupleText(ch.New))
			}
		}
	}
	return b.String()
}

func tupleText(t wal.Tuple) string {
	var out []string
	for _, v := range t {
		s := fmt.Sprintf("%c", v.Kind)
		if v.Kind == wal.Text {
			s = fmt.Sprintf("%.20q", v.Data)
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

// TestParsesWhatPostgreSQLSends parses captured messages of every kind.
func TestParsesWhatPostgreSQLSends(t *testing.T) {
	golden := filepath.Join("testdata", "pgoutput.txt")
	if *rewrite {
		var b bytes.Buffer
		messages := capture(t)
		for _, m := range messages {
			fmt.Fprintf(&b, "%x\n", m)
		}
		if err := os.WriteFile(filepath.Join("testdata", "pgoutput.hex"), b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, []byte(render(t, messages)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), render(t, captured(t))); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// TestPostgreSQLSendsWhatIsCaptured: the captured messages are what the server at hand sends.
func TestPostgreSQLSendsWhatIsCaptured(t *testing.T) {
	want, err := os.ReadFile(filepath.Join("testdata", "pgoutput.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), render(t, capture(t))); d != "" {
		t.Errorf("-captured +this server:\n%s", d)
	}
}

// TestValuesDoNotAliasTheBuffer: the caller may reuse a message's bytes.
func TestValuesDoNotAliasTheBuffer(t *testing.T) {
	want := render(t, captured(t))
	p := newParser(nil)
	var commits []*Commit
	for _, m := range captured(t) {
		buf := bytes.Clone(m)
		c, err := p.message(buf)
		if err != nil {
			t.Fatal(err)
		}
		for i := range buf {
			buf[i] = 0xff
		}
		if c != nil {
			commits = append(commits, c)
		}
	}
	var values int
	for _, c := range commits {
		for _, ch := range c.Txn.Changes {
			for _, v := range append(slices.Clip(ch.Old), ch.New...) {
				values++
				if bytes.IndexByte(v.Data, 0xff) >= 0 {
					t.Fatalf("a value of %s shows the overwritten buffer", ch.Relation)
				}
			}
		}
	}
	if values == 0 || want == "" {
		t.Fatal("nothing was looked at")
	}
}

// TestMarkOfATransaction: of several marks the last counts, which is that of whoever sent the COMMIT, and what does not look
// like one is none.
func TestMarkOfATransaction(t *testing.T) {
	id := func(b byte) string { return strings.Repeat(string(b), 16) }
	for _, c := range []struct {
		name     string
		messages []Message
		want     wal.Mark
	}{
		{"none", nil, wal.Mark{}},
		{"one", []Message{{Prefix: markPrefix, Content: "\x04" + id('a')}}, wal.Mark{LTXID: id('a'), Level: wal.CommitOn}},
		{"a client's before the gateway's", []Message{
			{Prefix: markPrefix, Content: "\x02" + id('a')}, {Prefix: markPrefix, Content: "\x05" + id('b')},
		}, wal.Mark{LTXID: id('b'), Level: wal.CommitRemoteApply}},
		{"another message", []Message{{Prefix: "duri.seen", Content: "\x04" + id('a')}}, wal.Mark{}},
		{"too short, too long, empty", []Message{
			{Prefix: markPrefix, Content: "\x04short"}, {Prefix: markPrefix, Content: strings.Repeat("x", 66)}, {Prefix: markPrefix},
		}, wal.Mark{}},
	} {
		if got := markOf(c.messages); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

// TestRejectsDamagedMessages: a message that is cut short is an error, never a wrong change.
func TestRejectsDamagedMessages(t *testing.T) {
	all := captured(t)
	for i, m := range all {
		for n := range m {
			p := newParser(nil)
			for _, before := range all[:i] {
				if _, err := p.message(before); err != nil {
					t.Fatal(err)
				}
			}
			foreign := p.cur != nil && p.cur.Origin != "" && strings.ContainsRune("IUDT", rune(m[0]))
			if _, err := p.message(m[:n]); err == nil && !foreign { // rows applied from elsewhere are not even read
				t.Fatalf("message %d (%q): %d of %d bytes are accepted", i, m[:1], n, len(m))
			}
		}
	}
	for _, tc := range []struct{ name, message string }{
		{"unknown kind", "S"},
		{"row outside a transaction", "I\x00\x00\x00\x01N\x00\x00"},
		{"truncate outside a transaction", "T\x00\x00\x00\x00\x00"},
		{"origin outside a transaction", "O\x00\x00\x00\x00\x00\x00\x00\x00x\x00"},
		{"commit without begin", "C\x00" + strings.Repeat("\x00", 24)},
	} {
		if _, err := newParser(nil).message([]byte(tc.message)); err == nil {
			t.Errorf("%s is accepted", tc.name)
		}
	}
}

// TestRejectsRowsOfUnknownRelations: without its definition a row cannot be read.
func TestRejectsRowsOfUnknownRelations(t *testing.T) {
	for _, m := range []string{"I\x00\x00\x00\x09N\x00\x00", "T\x00\x00\x00\x01\x00\x00\x00\x00\x09"} {
		p := newParser(nil)
		if _, err := p.message(append([]byte("B"), make([]byte, 20)...)); err != nil {
			t.Fatal(err)
		}
		if _, err := p.message([]byte(m)); err == nil || !strings.Contains(err.Error(), "definition was not sent") {
			t.Errorf("%q: %v", m, err)
		}
	}
}

// FuzzMessages feeds the parser a stream: messages behind their lengths (two bytes each). It must not panic, and what
// it delivers must be whole.
func FuzzMessages(f *testing.F) {
	var all []byte
	for _, m := range captured(f) {
		if len(m) < 400 { // keep the corpus small
			all = append(binary.BigEndian.AppendUint16(all, uint16(len(m))), m...)
			f.Add(append(binary.BigEndian.AppendUint16(nil, uint16(len(m))), m...))
		}
	}
	f.Add(all)
	f.Fuzz(func(t *testing.T, b []byte) {
		p := newParser(nil)
		for len(b) >= 2 {
			n := min(int(binary.BigEndian.Uint16(b)), len(b)-2)
			c, err := p.message(b[2 : 2+n])
			b = b[2+n:]
			if err != nil {
				return
			}
			if c == nil {
				continue
			}
			for _, ch := range c.Txn.Changes {
				checkChange(t, ch)
			}
		}
	})
}

func checkChange(t *testing.T, ch wal.Change) {
	for _, tuple := range []wal.Tuple{ch.Old, ch.New} {
		if tuple != nil && len(tuple) != len(ch.Relation.Columns) {
			t.Fatalf("%s has %d values for %d columns", ch.Op, len(tuple), len(ch.Relation.Columns))
		}
	}
	if (ch.OldKind != wal.OldNone) != (ch.Old != nil) && len(ch.Relation.Columns) > 0 {
		t.Fatalf("%s says old kind %d and has %d values", ch.Op, ch.OldKind, len(ch.Old))
	}
	if (ch.Op == wal.Insert || ch.Op == wal.Update) && ch.New == nil && len(ch.Relation.Columns) > 0 {
		t.Fatalf("%s without a row", ch.Op)
	}
	for _, v := range ch.New {
		if v.Kind == wal.Omitted {
			t.Fatalf("%s omits a column of the new row", ch.Op)
		}
	}
}

// recorder is a Handler that may block.
type recorder struct {
	block   chan struct{} // nil: it does not
	blocked chan struct{}
	commits chan *Commit
	fail    error
}

func (r *recorder) Commit(c *Commit) error {
	if r.fail != nil {
		return r.fail
	}
	if r.block != nil {
		close(r.blocked)
		<-r.block
		r.block = nil
	}
	r.commits <- c
	return nil
}
func (r *recorder) Advance(wal.LSN) error { return nil }
func (r *recorder) Idle() error           { return nil }

// stream opens a stream of a new database.
func stream(t *testing.T, c *pgcluster.Cluster) (*Stream, *pgconn.PgConn) {
	t.Helper()
	dsn := pgtest.DB(t, c, "app")
	pgtest.Exec(t, c, "app", "CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION duri FOR TABLE t")
	conn, err := Connect(t.Context(), dsn, "app", "duri_test")
	if err != nil {
		t.Fatal(err)
	}
	at, err := CreateSlot(t.Context(), conn, "duri_app")
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), conn, Config{
		DSN: dsn, Database: "app", Slot: "duri_app", Publication: "duri", Interval: 20 * time.Millisecond, Name: "duri_test",
		Report: func() Positions { return Positions{at, at, at} },
	}, at)
	if err != nil {
		t.Fatal(err)
	}
	return s, conn
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(waitMax); !cond(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("timed out: %s", what)
		}
	}
}

// TestReportsWhileTheHandlerBlocks: a handler that waits for its disk must not look like a dead standby.
func TestReportsWhileTheHandlerBlocks(t *testing.T) {
	c := pgtest.New(t, pgtest.WithSetting("wal_sender_timeout", "400ms"))
	s, _ := stream(t, c)
	h := &recorder{block: make(chan struct{}), blocked: make(chan struct{}), commits: make(chan *Commit, 10)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, h) }()
	pgtest.Exec(t, c, "app", "INSERT INTO t VALUES (1)")
	<-h.blocked
	// Two timeouts later the walsender is still there, and has heard of us.
	begun := pgtest.Query(t, c, "app", "SELECT now()")[0][0]
	eventually(t, "two timeouts pass", func() bool {
		rows := pgtest.Query(t, c, "app", "SELECT reply_time > "+pg.QuoteLiteral(begun)+"::timestamptz + interval '1 s' FROM pg_stat_replication WHERE application_name = 'duri_test'")
		if len(rows) != 1 {
			t.Fatal("the walsender is gone")
		}
		return rows[0][0] == "t"
	})
	close(h.block)
	if got := <-h.commits; len(got.Txn.Changes) != 1 {
		t.Errorf("got %+v", got.Txn)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// TestRunEndsWithTheHandlersError.
func TestRunEndsWithTheHandlersError(t *testing.T) {
	c := pgtest.New(t)
	s, _ := stream(t, c)
	pgtest.Exec(t, c, "app", "INSERT INTO t VALUES (1)")
	full := errors.New("disk full")
	if err := s.Run(t.Context(), &recorder{fail: full}); !errors.Is(err, full) {
		t.Errorf("Run: %v", err)
	}
}

// TestRunEndsWhenTheServerDies.
func TestRunEndsWhenTheServerDies(t *testing.T) {
	c := pgtest.New(t)
	s, _ := stream(t, c)
	done := make(chan error, 1)
	go func() { done <- s.Run(t.Context(), &recorder{commits: make(chan *Commit, 10)}) }()
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("Run ended without an error")
	}
}

// TestSlotLifeCycle: create, observe, be refused to continue what is gone, drop.
func TestSlotLifeCycle(t *testing.T) {
	c := pgtest.New(t)
	dsn := pgtest.DB(t, c, "app")
	ctx := t.Context()
	conn, err := Connect(ctx, dsn, "app", "duri_test")
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(conn)
	const slot = `odd_slot`
	before, err := Observe(ctx, conn, slot)
	if err != nil || before.Exists || before.SystemID == 0 || before.Timeline != 1 || before.Flush == 0 || before.Database != "app" {
		t.Fatalf("before: %+v, %v", before, err)
	}
	at, err := CreateSlot(ctx, conn, slot)
	if err != nil {
		t.Fatal(err)
	}
	id, err := Observe(ctx, conn, slot)
	if err != nil || !id.Exists || id.Active || id.Lost || id.Confirmed != at {
		t.Fatalf("after: %+v, %v; created at %s", id, err, at)
	}
	if v := Recognise(Expected{SystemID: id.SystemID, Timeline: id.Timeline, Slot: slot, End: at}, Observed{Identity: id}); v.Action != Resume {
		t.Error(v.Err)
	}
	other, err := Connect(ctx, c.DSN("postgres", ""), "postgres", "duri_test")
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(other)
	if _, err := Observe(ctx, other, slot); err == nil || !strings.Contains(err.Error(), "belongs to database app") {
		t.Errorf("from another database: %v", err)
	}
	if err := DropSlot(ctx, conn, slot); err != nil {
		t.Error(err)
	}
	if id, err = Observe(ctx, conn, slot); err != nil || id.Exists {
		t.Errorf("after the drop: %+v, %v", id, err)
	}
}

// TestSnapshotMatchesItsPosition: what commits after the exported snapshot's position is not in it.
func TestSnapshotMatchesItsPosition(t *testing.T) {
	c := pgtest.New(t)
	dsn := pgtest.DB(t, c, "app")
	pgtest.Exec(t, c, "app", "CREATE TABLE t (id int); INSERT INTO t VALUES (1)")
	ctx := t.Context()
	conn, err := Connect(ctx, dsn, "app", "duri_test")
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(conn)
	snap, err := ExportSnapshot(ctx, conn, "tmp")
	if err != nil || snap.At == 0 {
		t.Fatalf("%+v, %v", snap, err)
	}
	pgtest.Exec(t, c, "app", "INSERT INTO t VALUES (2)")
	rows := pgtest.Query(t, c, "app", "BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT "+pg.QuoteLiteral(snap.Name)+"; SELECT count(*) FROM t")
	if rows[0][0] != "1" {
		t.Errorf("the snapshot holds %s rows", rows[0][0])
	}
}

func BenchmarkParse(b *testing.B) {
	all := captured(b)
	b.ReportAllocs()
	for b.Loop() {
		p := newParser(nil)
		for _, m := range all {
			if _, err := p.message(m); err != nil {
				b.Fatal(err)
			}
		}
	}
}
