package enrol

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/wal"
)

const smallSQL = `CREATE TABLE a (id int PRIMARY KEY, v text); CREATE TABLE b (id serial PRIMARY KEY, a_id int REFERENCES a);
	INSERT INTO a SELECT i, repeat('x', 50) FROM generate_series(1, 2000) i; INSERT INTO b (a_id) SELECT i FROM generate_series(1, 500) i`

// untouched fails the test unless the target holds nothing of the source.
func untouched(t *testing.T, p *pair, what string) {
	t.Helper()
	got := rows(t, p.b, `SELECT (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = 'public'),
		(SELECT count(*) FROM pg_replication_origin_status WHERE remote_lsn > '0/0')`)
	if d := cmp.Diff([][]string{{"0", "0"}}, got); d != "" {
		t.Fatalf("%s: the target was changed (objects, progress): %s", what, d)
	}
}

// refused expects Receive to fail with a sentence that holds word, and a hint.
func refused(t *testing.T, cfg TargetConfig, r io.Reader, word string) {
	t.Helper()
	_, err := Receive(t.Context(), cfg, r, nil)
	if err == nil || !strings.Contains(err.Error(), word) {
		t.Fatalf("error %v, want one with %q", err, word)
	}
	var hinted interface{ HintText() string }
	if !errors.As(err, &hinted) || hinted.HintText() == "" {
		t.Errorf("%v has no hint", err)
	}
}

func TestAnyFailureInTheMiddleLeavesTheTargetEmptyAndJoiningAgainWorks(t *testing.T) {
	p := newPair(t, smallSQL)
	stream := p.stream(p.source())
	// Cut everywhere: around each frame, and in between.
	for i := range 25 {
		cut := len(stream) * i / 25
		_, err := Receive(t.Context(), p.setup(), bytes.NewReader(stream[:cut]), nil)
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut at %d of %d: %v", cut, len(stream), err)
		}
	}
	_, err := Receive(t.Context(), p.setup(), bytes.NewReader(stream[:len(stream)-1]), nil)
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("without the last byte: %v", err)
	}
	untouched(t, p, "cut")
	broken := errors.New("network is down")
	_, err = Receive(t.Context(), p.setup(), io.MultiReader(bytes.NewReader(stream[:len(stream)-100]), readerFunc(func([]byte) (int, error) { return 0, broken })), nil)
	if !errors.Is(err, broken) {
		t.Fatalf("reader's error: %v", err)
	}
	for _, at := range []int{len(stream) / 3, len(stream) - 3} {
		bad := bytes.Clone(stream)
		bad[at] ^= 1
		if _, err := Receive(t.Context(), p.setup(), bytes.NewReader(bad), nil); !errors.Is(err, errFormat) {
			t.Fatalf("damaged: %v", err)
		}
	}
	cfg := p.setup()
	cfg.Within = func(context.Context, *pgconn.PgConn, Result) error { return broken }
	if _, err := Receive(t.Context(), cfg, bytes.NewReader(stream), nil); !errors.Is(err, broken) {
		t.Fatalf("the caller's part failed: %v", err)
	}
	untouched(t, p, "damaged or failed")
	if res := p.receive(p.setup(), stream); res.Rows != 2500 {
		t.Errorf("%+v", res)
	}
	refused(t, p.setup(), bytes.NewReader(stream), "table public.a has rows already")
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestEndOfContextEndsASilentSource cancels while the source says nothing.
func TestEndOfContextEndsASilentSource(t *testing.T) {
	p := newPair(t, smallSQL)
	stream := p.stream(p.source())
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, err := Receive(ctx, p.setup(), r, nil)
		done <- err
	}()
	// The pipe takes a byte only when it is read: the reader is in the middle of the data now.
	if _, err := w.Write(stream[:len(stream)/2]); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if _, err := w.Write([]byte{0}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("the reader is open: %v", err)
	}
	// The server may need a moment to notice; a new attempt waits for it.
	if res := p.receive(p.setup(), stream); res.Rows != 2500 {
		t.Errorf("%+v", res)
	}
}

func TestWritersErrorEndsSend(t *testing.T) {
	p := newPair(t, smallSQL)
	full := errors.New("disk full")
	n := 0
	err := Send(t.Context(), p.source(), writerFunc(func(b []byte) (int, error) {
		if n += len(b); n > 60000 {
			return 0, full
		}
		return len(b), nil
	}))
	if !errors.Is(err, full) {
		t.Errorf("%v", err)
	}
	waitFor(t, p, "SELECT count(*) = 0 FROM pg_replication_slots")
	waitFor(t, p, "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'duri_enrol'")
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// waitFor polls a condition at the source.
func waitFor(t *testing.T, p *pair, sql string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for rows(t, p.a, sql)[0][0] != "t" {
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			t.Fatalf("%s did not become true", sql)
		}
	}
}

func TestTellsTheTargetWhyTheSourceCouldNotGoOn(t *testing.T) {
	p := newPair(t, smallSQL+"; CREATE VIEW v AS SELECT 1")
	do(t, p.a, "ALTER ROLE duri NOREPLICATION")
	var out bytes.Buffer
	err := Send(t.Context(), p.source(), &out)
	if pg.SQLState(err) != "42501" && pg.SQLState(err) != "28000" {
		t.Fatalf("%v", err)
	}
	refused(t, p.setup(), &out, "the source could not go on")
	do(t, p.a, "ALTER ROLE duri REPLICATION; DROP PUBLICATION duri")
	if err := Send(t.Context(), p.source(), &out); err == nil || !strings.Contains(explain(err), "duri grants") {
		t.Errorf("%v", err)
	}
	untouched(t, p, "source's failure")
}

func TestCopiesIntoTablesThatAreThereWithoutASuperuser(t *testing.T) {
	p := newPair(t, smallSQL+"; CREATE SEQUENCE s; SELECT setval('s', 77)")
	do(t, p.b, `CREATE TABLE b (a_id int, id serial PRIMARY KEY); CREATE TABLE a (id int PRIMARY KEY, v text); ALTER TABLE b ADD FOREIGN KEY (a_id) REFERENCES a; CREATE SEQUENCE s`)
	stream := p.stream(p.source())
	marked := false
	cfg := p.runtime()
	cfg.Within = func(ctx context.Context, c *pgconn.PgConn, r Result) error {
		marked = true
		_, err := pg.Query(ctx, c, "SELECT pg_catalog.pg_logical_emit_message(true, 'test', $1)", r.At.String())
		return err
	}
	var phases []string
	res, err := Receive(t.Context(), cfg, bytes.NewReader(stream), func(p Progress) {
		if len(phases) == 0 || phases[len(phases)-1] != p.Phase {
			phases = append(phases, p.Phase)
		}
		if p.Rows > 2500 || p.Tables > 2 || p.TablesAll > 2 {
			t.Errorf("progress %+v", p)
		}
	})
	if err != nil {
		t.Fatal(explain(err))
	}
	if res.SchemaMade || res.Rows != 2500 || res.Tables != 2 || !marked {
		t.Errorf("%+v, marked %t", res, marked)
	}
	if d := cmp.Diff([]string{"schema", "data", "indexes", "commit", "analyze"}, phases); d != "" {
		t.Error(d)
	}
	for _, sql := range []string{"SELECT * FROM a ORDER BY id", "SELECT id, a_id FROM b ORDER BY id", "SELECT last_value FROM b_id_seq", "SELECT last_value, is_called FROM s"} {
		if d := cmp.Diff(rows(t, p.a, sql), rows(t, p.b, sql)); d != "" {
			t.Errorf("%s: %s", sql, d)
		}
	}
}

func TestCreatesTheSchemaAsTheRunTimeRoleWhereItMay(t *testing.T) {
	p := newPair(t, "")
	do(t, p.a, "CREATE SCHEMA app AUTHORIZATION duri; CREATE TABLE app.t (id int PRIMARY KEY); ALTER TABLE app.t OWNER TO duri; INSERT INTO app.t VALUES (1); ALTER PUBLICATION duri ADD TABLES IN SCHEMA app")
	stream := p.stream(p.source())
	refused(t, p.runtime(), bytes.NewReader(stream), "publication duri does not cover table app.t")
	do(t, p.b, "CREATE SCHEMA app AUTHORIZATION duri; ALTER PUBLICATION duri ADD TABLES IN SCHEMA app")
	if res := p.receive(p.runtime(), stream); !res.SchemaMade || res.Rows != 1 {
		t.Errorf("%+v", res)
	}
}

func TestSuperuserPreparesATargetThatNobodyPrepared(t *testing.T) {
	p := newPair(t, "ALTER DATABASE shop SET standard_conforming_strings = off")
	do(t, p.a, `CREATE TABLE t (id int PRIMARY KEY, v text DEFAULT E'a\\b''c'); INSERT INTO t VALUES (1)`)
	do(t, p.b, "DROP PUBLICATION duri; DROP OWNED BY duri; DROP ROLE duri")
	p.receive(p.setup(), p.stream(p.source()))
	do(t, p.b, "INSERT INTO t (id) VALUES (2)")
	got := rows(t, p.b, "SELECT string_agg(v, ' ' ORDER BY id), (SELECT tablename FROM pg_publication_tables WHERE pubname = 'duri'), has_table_privilege('duri', 't', 'TRUNCATE') FROM t")
	if d := cmp.Diff([][]string{{`a\b'c a\b'c`, "t", "t"}}, got); d != "" {
		t.Error(d)
	}
}

func TestRefusesAndChangesNothing(t *testing.T) {
	p := newPair(t, "CREATE ROLE owner; CREATE TYPE mood AS ENUM ('sad');"+smallSQL+"; ALTER TABLE a OWNER TO owner; CREATE TABLE last (id int CHECK (id > 0)); INSERT INTO last VALUES (1)")
	stream := p.stream(p.source())
	for _, c := range []struct {
		name, sql, word string
		cfg             TargetConfig
	}{
		{"other rows", "CREATE TABLE z (i int); INSERT INTO z VALUES (1)", "table public.z has rows", p.setup()},
		{"rows in a partition", "CREATE TABLE z (i int) PARTITION BY LIST (i); CREATE TABLE z1 PARTITION OF z DEFAULT; INSERT INTO z VALUES (1)", "table public.z1 has rows", p.setup()},
		{"a part", "CREATE TABLE a (id int PRIMARY KEY, v text)", "table public.a exists and table public.b does not", p.setup()},
		{"other type", "CREATE TABLE a (id int, v text); CREATE TABLE b (id int, a_id bigint); CREATE TABLE last (id int)", "column a_id is bigint, not integer", p.setup()},
		{"a type in the way", "CREATE TYPE mood AS ENUM ()", "already exists", p.setup()},
		{"no such role", "", `role "owner" does not exist`, p.setup()},
		{"may not", "", "permission denied", p.runtime()},
		{"server's refusal at the last table", "CREATE TABLE a (id int, v text); CREATE TABLE b (id int, a_id int); CREATE TABLE last (id int CHECK (id > 1)); CREATE SEQUENCE b_id_seq", "last_id_check", p.runtime()},
	} {
		do(t, p.b, "CREATE SCHEMA IF NOT EXISTS public; GRANT USAGE ON SCHEMA public TO PUBLIC;"+c.sql)
		const state = `SELECT relname, (SELECT count(*) FROM pg_attribute WHERE attrelid = c.oid),
			CASE WHEN relkind = 'r' THEN (xpath('/row/n/text()', query_to_xml('SELECT count(*) AS n FROM ' || c.oid::regclass, false, true, '')))[1]::text END
			FROM pg_class c WHERE relnamespace = 'public'::regnamespace ORDER BY 1`
		before := rows(t, p.b, state)
		t.Run(c.name, func(t *testing.T) { refused(t, c.cfg, bytes.NewReader(stream), c.word) })
		if d := cmp.Diff(before, rows(t, p.b, state)); d != "" {
			t.Errorf("%s: the target changed: %s", c.name, d)
		}
		do(t, p.b, "DROP SCHEMA public CASCADE")
	}
	untouched(t, p, "at the end")
}

// rewrite changes the header of a stream.
func rewrite(t *testing.T, stream []byte, change func(*Header)) []byte {
	t.Helper()
	in, err := newFrameReader(bytes.NewReader(stream))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	out := newFrameWriter(&b)
	for {
		kind, doc, err := in.next()
		if errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if kind == frameHeader {
			var h Header
			if err := json.Unmarshal(doc, &h); err != nil {
				t.Fatal(err)
			}
			change(&h)
			if doc, err = json.Marshal(h); err != nil {
				t.Fatal(err)
			}
		}
		if err := out.frame(kind, doc); err != nil {
			t.Fatal(err)
		}
	}
	if err := out.flush(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestClockOfTheSourceAhead(t *testing.T) {
	p := newPair(t, smallSQL)
	stream := p.stream(p.source())
	far := rewrite(t, stream, func(h *Header) { h.Time = wal.TimeOf(time.Now().Add(2 * time.Minute)) })
	refused(t, p.setup(), bytes.NewReader(far), "ahead of this server's")
	// A little: the commit waits, so that a local write right after it has a greater version (rule 1).
	near := rewrite(t, stream, func(h *Header) { h.Time = wal.TimeOf(time.Now().Add(1500 * time.Millisecond)) })
	res := p.receive(p.setup(), near)
	if now := wal.TimeOf(time.Now()); now <= res.Time {
		t.Errorf("committed at %s, before the version %s", now, res.Time)
	}
	got := rows(t, p.b, "SELECT (pg_xact_commit_timestamp_origin(xmin)).timestamp = '"+res.Time.String()+"' FROM a LIMIT 1")
	if got[0][0] != "t" {
		t.Errorf("the rows' version is not %s", res.Time)
	}
}

func TestProgressOfAFormerLifeIsForgotten(t *testing.T) {
	p := newPair(t, smallSQL)
	stream := p.stream(p.source())
	do(t, p.b, "SELECT pg_replication_origin_create('"+origin+"'); SELECT pg_replication_origin_advance('"+origin+"', 'FFFF/0')")
	res := p.receive(p.setup(), stream)
	got := rows(t, p.b, "SELECT pg_replication_origin_progress('"+origin+"', true)")
	if got[0][0] != res.At.String() {
		t.Errorf("progress %s, want %s", got[0][0], res.At)
	}
}

func TestEmptyDatabaseLeavesItsProgress(t *testing.T) {
	p := newPair(t, "")
	res := p.receive(p.setup(), p.stream(p.source()))
	got := rows(t, p.b, "SELECT pg_replication_origin_progress('"+origin+"', true)")
	if got[0][0] != res.At.String() || res.At == 0 {
		t.Errorf("progress %s, want %s", got[0][0], res.At)
	}
}

func TestTargetsOwnStreamSkipsTheContent(t *testing.T) {
	p := newPair(t, smallSQL)
	stream := p.stream(p.source())
	do(t, p.b, "SELECT pg_create_logical_replication_slot('own', 'test_decoding')")
	p.receive(p.setup(), stream)
	do(t, p.b, "INSERT INTO a VALUES (5000, 'local')")
	got := rows(t, p.b, "SELECT data FROM pg_logical_slot_get_changes('own', NULL, NULL, 'only-local', '1') WHERE data LIKE 'table%'")
	if d := cmp.Diff([][]string{{"table public.a: INSERT: id[integer]:5000 v[text]:'local'"}}, got); d != "" {
		t.Errorf("own stream: %.1000s", d)
	}
}

func TestTableRewrittenAfterTheSnapshotIsNoticed(t *testing.T) {
	p := newPair(t, smallSQL)
	s := &sender{cfg: p.source(), out: newFrameWriter(discard{})}
	s.cfg.Publication = "duri"
	s.conn = connect(t, p.a.DSN("shop", "duri"))
	if _, err := pg.Rows(t.Context(), s.conn, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1"); err != nil {
		t.Fatal(err)
	}
	do(t, p.a, "TRUNCATE b")
	files, err := s.list(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.lock(t.Context(), files); err == nil || !strings.Contains(err.Error(), "public.b was rewritten or truncated") {
		t.Errorf("%v", err)
	}
}

func TestPasswordNeverGoesIntoArguments(t *testing.T) {
	const password = "s3cr3t' \\pw"
	c := pgtest.New(t, pgtest.WithPassword(password))
	pgtest.DB(t, c, "shop")
	pgtest.Exec(t, c, "shop", smallSQL+"; CREATE PUBLICATION duri FOR TABLES IN SCHEMA public")
	// A pg_dump that notes its arguments and then does its work.
	real, err := findDump(t.Context(), "", 15)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\nif [ \"$1\" != --version ]; then tr '\\0' '\\n' < /proc/$$/cmdline >> %s/args; fi\nexec %s \"$@\"\n", dir, real.path)
	if err := os.WriteFile(filepath.Join(dir, "pg_dump"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := Send(t.Context(), SourceConfig{DSN: c.DSN("shop", ""), Database: "shop", BinDir: dir}, &out); err != nil {
		t.Fatal(explain(err))
	}
	args, err := os.ReadFile(filepath.Join(dir, "args"))
	if err != nil || !bytes.Contains(args, []byte("--schema-only")) || bytes.Contains(args, []byte("s3cr3t")) {
		t.Errorf("arguments %q, %v", args, err)
	}
}

func TestDumpThatIsTooOldOrMissingIsNamed(t *testing.T) {
	p := newPair(t, "")
	cfg := p.source()
	cfg.BinDir = t.TempDir()
	check := func(word string) {
		t.Helper()
		err := Send(t.Context(), cfg, discard{})
		if err == nil || !strings.Contains(err.Error(), word) || !strings.Contains(explain(err), "bin_dir") {
			t.Errorf("%v", err)
		}
	}
	check("no such file")
	if err := os.WriteFile(filepath.Join(cfg.BinDir, "pg_dump"), []byte("#!/bin/sh\necho 'pg_dump (PostgreSQL) 14.2'\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	check("version 14")
}
