package gateway

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

func cut(sql string, escapes bool) (got []string) {
	l := lexer{src: []byte(sql), escapes: escapes}
	for {
		t := l.next()
		if t.kind == tokEnd {
			return got
		}
		got = append(got, string(t.kind)+":"+sql[t.start:t.end])
	}
}

func TestTokens(t *testing.T) {
	for _, c := range []struct {
		sql     string
		escapes bool
		want    []string
	}{
		{"SELECT a.b", false, []string{"w:SELECT", "w:a", ".:.", "w:b"}},
		{"'it''s' x", false, []string{"s:'it''s'", "w:x"}},
		{`'a\' x`, false, []string{`s:'a\'`, "w:x"}},
		{`'a\' x'`, true, []string{`s:'a\' x'`}},
		{`E'a\' x' y`, false, []string{`s:E'a\' x'`, "w:y"}},
		{`e'\\' y`, false, []string{`s:e'\\'`, "w:y"}},
		{`U&'\0041' N'x'`, false, []string{"w:U", "&:&", `s:'\0041'`, "w:N", "s:'x'"}},
		{`"a""b;" c`, false, []string{`q:"a""b;"`, "w:c"}},
		{"$$ ; $a$ $$ x", false, []string{"s:$$ ; $a$ $$", "w:x"}},
		{"$a$ $b$ $$ $a$ x", false, []string{"s:$a$ $b$ $$ $a$", "w:x"}},
		{"$1 + $2", false, []string{"n:$1", "+:+", "n:$2"}},
		{"a$b$c d", false, []string{"w:a$b$c", "w:d"}},
		{"1.5e3 2", false, []string{"n:1.5e3", "n:2"}},
		{"a -- b ; 'c\nd", false, []string{"w:a", "w:d"}},
		{"a /* b /* c */ ' */ d", false, []string{"w:a", "w:d"}},
		{"a/**/b", false, []string{"w:a", "w:b"}},
		{"a /* b", false, []string{"w:a"}},
		{"a 'b", false, []string{"w:a", "s:'b"}},
		{"$x$ a", false, []string{"s:$x$ a"}},
		{"ü 한글", false, []string{"w:ü", "w:한글"}},
		{"a - b / c", false, []string{"w:a", "-:-", "w:b", "/:/", "w:c"}},
	} {
		if diff := cmp.Diff(c.want, cut(c.sql, c.escapes)); diff != "" {
			t.Errorf("%s:\n%s", c.sql, diff)
		}
	}
}

// texts are SQL with what must be known of it.
var texts = []struct {
	sql  string
	want text
}{
	{"", text{}},
	{";;", text{}},
	{"SELECT 1", text{}},
	{"BEGIN", text{}},
	{"COMMIT", text{}},
	{"(SELECT 1) UNION (SELECT 2)", text{}},
	{"INSERT INTO t (a, b) VALUES (1, lower($1)) RETURNING (a)", text{}},
	{"INSERT INTO s.t (a, b) VALUES (1, 2)", text{}},
	{"WITH x AS (SELECT 1) SELECT count(*) FROM x WHERE a IN (1, 2)", text{}},
	{"SELECT 'SET a.b = 1'", text{}},
	{"SELECT $$ LISTEN x $$ -- DISCARD ALL", text{}},
	{"SAVEPOINT a; ROLLBACK TO a; RELEASE a", text{}},
	{"SET LOCAL work_mem = '1MB'", text{local: true}},
	{"SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", text{local: true}},
	{"set constraints all deferred", text{local: true}},
	{"CREATE TABLE t (id int)", text{}},
	{"DROP TABLE x", text{unpin: true}},
	{"SET work_mem = '1MB'", text{probe: true}},
	{"SET SESSION work_mem = '1MB'", text{probe: true}},
	{"SET SESSION AUTHORIZATION bob", text{probe: true}},
	{"SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", text{probe: true}},
	{"SET ROLE bob", text{probe: true}},
	{"SET TIME ZONE 'UTC'", text{probe: true}},
	{"SET App.User_ID = '1'", text{probe: true, customs: []string{"app.user_id"}}},
	{`SET SESSION "app".x TO 1`, text{probe: true, customs: []string{"app.x"}}},
	{"SELECT 1; RESET ALL", text{probe: true}},
	{"DISCARD ALL", text{probe: true}},
	{"LISTEN a", text{probe: true}},
	{"UNLISTEN *", text{probe: true}},
	{"PREPARE p AS SELECT 1", text{probe: true}},
	{"PREPARE TRANSACTION 'x'", text{pin: "PREPARE TRANSACTION"}},
	{"COMMIT PREPARED 'x'", text{unprepared: true}},
	{"DECLARE c CURSOR WITH HOLD FOR SELECT 1", text{probe: true}},
	{"LOAD 'auto_explain'", text{pin: "LOAD"}},
	{"DO $$ begin end $$", text{probe: true, dirty: true}},
	{"DO LANGUAGE plpgsql $x$ BEGIN PERFORM set_config('app.a', '1', false); SET App.B = 1; END $x$", text{probe: true, dirty: true, customs: []string{"app.a", "app.b"}}},
	{"DO 'BEGIN PERFORM set_config(''app.a'', ''1'', false); END'; SELECT 'SET app.c = 1'", text{probe: true, dirty: true, customs: []string{"app.a"}}},
	{"DO $$ BEGIN PERFORM set_config(n, '1', false); END $$", text{probe: true, dirty: true, pin: "set_config with a name that cannot be seen"}},
	{"DO '", text{probe: true, dirty: true}},
	{"DO $$", text{probe: true, dirty: true}},
	{"DO E''", text{probe: true, dirty: true}},
	{`SET "app.User" = 1`, text{probe: true, customs: []string{"app.user"}}},
	{"CALL p()", text{probe: true, dirty: true}},
	{"EXPLAIN ANALYZE EXECUTE p", text{probe: true, dirty: true}},
	{"FROBNICATE", text{probe: true, dirty: true}},
	{"CREATE TEMP TABLE t AS SELECT 1", text{probe: true}},
	{"SELECT 1 INTO TEMPORARY t", text{probe: true}},
	{`SELECT * FROM "pg_temp".t`, text{probe: true}},
	{"SELECT f(1)", text{probe: true, dirty: true}},
	{"SELECT /* c */ f /* c */ (1)", text{probe: true, dirty: true}},
	{`SELECT "f"(1)`, text{probe: true, dirty: true}},
	{"SELECT s.count(1)", text{probe: true, dirty: true}},
	{"SELECT pg_catalog.count(1)", text{}},
	{"SELECT sum(a) FILTER (WHERE b) OVER (ORDER BY c) FROM t JOIN (SELECT 1) u ON (true)", text{}},
	{"INSERT INTO t VALUES (1) ON CONFLICT (a) DO NOTHING", text{}},
	{"SELECT over(1)", text{probe: true, dirty: true}},
	{"SELECT 1, filter(1)", text{probe: true, dirty: true}},
	{"SELECT join(1)", text{probe: true, dirty: true}},
	{"SELECT 1 WHERE conflict(1)", text{probe: true, dirty: true}},
	{"SELECT set_config('work_mem', '1MB', false)", text{probe: true}},
	{"SELECT set_config('App.x', $1, false)", text{probe: true, customs: []string{"app.x"}}},
	{"SELECT set_config('app.x', 'a,b', true), 1", text{local: true}},
	{"SELECT set_config('app.x', lower('true'), false)", text{probe: true, customs: []string{"app.x"}}},
	{"SELECT set_config('app.x', 'v', $1)", text{probe: true, customs: []string{"app.x"}}},
	{"SELECT set_config('app.x', 'v', not true)", text{probe: true, customs: []string{"app.x"}}},
	{"SELECT set_config($1, $2, false)", text{probe: true, pin: "set_config with a name that cannot be seen"}},
	{"SELECT set_config('app.' || $1, $2, false)", text{probe: true, pin: "set_config with a name that cannot be seen"}},
	{"SELECT set_config($1, $2, true)", text{local: true}},
	{"SELECT pg_advisory_lock(1)", text{probe: true}},
	{"SELECT pg_try_advisory_lock_shared(1)", text{probe: true}},
	{"SELECT pg_advisory_xact_lock(1)", text{}},
	{"SELECT lastval()", text{seq: true}},
	{"SELECT currval('s')", text{seq: true}},
	{"SELECT nextval('s')", text{}},
	{"SELECT dblink_connect('x')", text{pin: "a connection of dblink"}},
	{"DEALLOCATE p1", text{probe: true, deallocate: "p1"}},
	{` /* pdo */ DEALLOCATE PREPARE "P1" ;`, text{probe: true, deallocate: "P1"}},
	{"DEALLOCATE ALL", text{probe: true}},
	{`DEALLOCATE "prepare"`, text{probe: true, deallocate: "prepare"}},
	{`DEALLOCATE "all"`, text{probe: true, deallocate: "all"}},
	{`PREPARE "transaction" AS SELECT 1`, text{probe: true}},
	{"DEALLOCATE p1; SELECT 1", text{probe: true}},
	{"SELECT 1; DEALLOCATE p1", text{probe: true}},
}

// ignoreDeed compares texts but for what TestDeeds looks at.
var ignoreDeed = cmp.Options{cmp.AllowUnexported(text{}), cmpopts.IgnoreFields(text{}, "does", "wrote", "statements")}

func TestDeeds(t *testing.T) {
	for _, c := range []struct {
		sql  string
		want deed
	}{
		{"", reads},
		{"-- nothing", reads},
		{"SELECT 1", reads},
		{"SELECT 1;", reads},
		{"SELECT 1; SELECT 2", reads},
		{"(SELECT 1) UNION (SELECT 2)", reads},
		{"VALUES (1)", reads},
		{"WITH x AS (SELECT 1) SELECT count(*) FROM x", reads},
		{"SELECT nextval('s')", reads},
		{"SET a.b = 1", reads},
		{"SAVEPOINT a", reads},
		{"ROLLBACK TO a", reads},
		{"ROLLBACK WORK TO SAVEPOINT a", reads},
		{"BEGIN", begins},
		{"START TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ WRITE;", begins},
		{"COMMIT", commits},
		{"end transaction ; ", commits},
		{"COMMIT AND NO CHAIN", commits},
		{"COMMIT AND CHAIN", tangled},
		{"COMMIT PREPARED 'x'", tangled},
		{"ROLLBACK", rollsBack},
		{"ABORT WORK", rollsBack},
		{"ROLLBACK AND CHAIN", tangled},
		{"ROLLBACK PREPARED 'x'", tangled},
		{"INSERT INTO t (a) VALUES ($1)", writes},
		{"INSERT INTO t (a) VALUES ($1) RETURNING f(a)", writes},
		{"UPDATE t SET a = 1", writes},
		{"DELETE FROM t", writes},
		{"MERGE INTO t USING u ON true WHEN MATCHED THEN DO NOTHING", writes},
		{"TRUNCATE t", writes},
		{"WITH x AS (DELETE FROM t RETURNING a) SELECT * FROM x", writes},
		{"SELECT 1 INTO u", writes},
		{"SELECT a FROM t FOR UPDATE", writes},
		{"SELECT f(1)", writes},
		{"SELECT s.f(1)", writes},
		{"SELECT setval('s', 1)", writes},
		{"EXPLAIN ANALYZE UPDATE t SET a = 1", writes},
		{"INSERT INTO t VALUES (1); SELECT 1", batch},
		{"INSERT INTO t VALUES (1); INSERT INTO t VALUES (2)", batch},
		{"INSERT INTO t VALUES (1); VACUUM", opaque},
		{"CREATE TABLE t (a int)", batch},
		{"CREATE UNIQUE INDEX i ON t (a)", batch},
		{"CREATE INDEX CONCURRENTLY i ON t (a)", opaque},
		{"DROP INDEX CONCURRENTLY i", opaque},
		{"CREATE DATABASE d", opaque},
		{"ALTER SYSTEM SET a = 1", opaque},
		{"GRANT SELECT ON t TO r", batch},
		{"BEGIN; INSERT INTO t VALUES (1)", begins},
		{"INSERT INTO t VALUES (1); BEGIN", begins},
		{"COPY t FROM STDIN", copies},
		{"COPY t (a, b) FROM STDIN WHERE a > 1", copies},
		{"COPY (SELECT a FROM t) TO STDOUT", reads},
		{"COPY (DELETE FROM t RETURNING a) TO STDOUT", writes},
		{"COPY t", opaque},
		{"CALL p()", opaque},
		{"DO $$ begin end $$", opaque},
		{"VACUUM", opaque},
		{"SELECT 1; VACUUM", opaque},
		{"EXECUTE p", opaque},
		{"FROBNICATE", opaque},
		{"BEGIN; INSERT INTO t VALUES (1); COMMIT", tangled},
		{"SELECT 1; COMMIT", tangled},
		{"COMMIT; BEGIN", tangled},
		{"PREPARE TRANSACTION 'x'", tangled},
		{"PREPARE p AS SELECT 1", reads},
		{`PREPARE "transaction" AS SELECT 1`, reads},
	} {
		if got := readText([]byte(c.sql), false).does; got != c.want {
			t.Errorf("%s: %d, want %d", c.sql, got, c.want)
		}
	}
}

// TestStatementsAreCounted: what a text does as a whole does not tell whether something in it writes.
func TestStatementsAreCounted(t *testing.T) {
	for sql, want := range map[string]text{
		"":                                {},
		"BEGIN":                           {statements: 1},
		"BEGIN;":                          {statements: 1},
		"BEGIN; SELECT 1":                 {statements: 2},
		"BEGIN; INSERT INTO t VALUES (1)": {statements: 2, wrote: true},
		"INSERT INTO t VALUES (1); BEGIN": {statements: 2, wrote: true},
		"BEGIN; INSERT INTO t VALUES (1); COMMIT": {statements: 3, wrote: true},
		"; ; SELECT f()": {statements: 1, wrote: true},
	} {
		got := readText([]byte(sql), false)
		if got.statements != want.statements || got.wrote != want.wrote {
			t.Errorf("%q: %d statements, wrote %v; want %d, %v", sql, got.statements, got.wrote, want.statements, want.wrote)
		}
	}
}

func TestTexts(t *testing.T) {
	for _, c := range texts {
		if diff := cmp.Diff(c.want, readText([]byte(c.sql), false), ignoreDeed); diff != "" {
			t.Errorf("%s:\n%s", c.sql, diff)
		}
	}
}

// TestSpaceAndCaseDoNotMatter: what is known of a text stays the same when space and comments are put between its tokens.
func TestSpaceAndCaseDoNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := rapid.SampledFrom(texts).Draw(t, "text")
		space := rapid.SampledFrom([]string{" ", "\n", "/* ' */", "/* /* $$ */ ; */", "-- x ( ' \n", "\t"})
		var b strings.Builder
		l := lexer{src: []byte(c.sql)}
		for {
			tok := l.next()
			if tok.kind == tokEnd {
				break
			}
			if tok.kind != '&' {
				b.WriteString(space.Draw(t, "space"))
			}
			w := c.sql[tok.start:tok.end]
			if tok.kind == tokWord && rapid.Bool().Draw(t, "upper") {
				w = strings.ToUpper(w)
			}
			b.WriteString(w)
		}
		if diff := cmp.Diff(c.want, readText([]byte(b.String()), false), ignoreDeed); diff != "" {
			t.Fatalf("%s:\n%s", b.String(), diff)
		}
	})
}

// TestNothingIsHiddenBehindOthers: a text keeps its effects whatever harmless statements surround it.
func TestNothingIsHiddenBehindOthers(t *testing.T) {
	for _, c := range texts {
		got := readText([]byte("SELECT 'a''b', $x$;$x$, \"q\"\"\" FROM t; "+c.sql+"\n; SELECT 1"), false)
		got.deallocate, c.want.deallocate = "", ""
		if diff := cmp.Diff(c.want, got, ignoreDeed); diff != "" {
			t.Errorf("%s:\n%s", c.sql, diff)
		}
	}
}

// FuzzText: no text makes it panic or go round for ever, and its tokens cover the text in order.
func FuzzText(f *testing.F) {
	for _, c := range texts {
		f.Add(c.sql, false)
	}
	f.Add(`'\`, true)
	f.Add("$", false)
	f.Fuzz(func(t *testing.T, sql string, escapes bool) {
		readText([]byte(sql), escapes)
		l := lexer{src: []byte(sql), escapes: escapes}
		for at := 0; ; {
			tok := l.next()
			if tok.start < at || tok.end < tok.start || tok.end > len(sql) || (tok.kind != tokEnd && tok.end == tok.start) {
				t.Fatalf("token %+v after %d", tok, at)
			}
			if tok.kind == tokEnd {
				return
			}
			at = tok.end
		}
	})
}

func BenchmarkText(b *testing.B) {
	sql := []byte("UPDATE pgbench_accounts SET abalance = abalance + $1 WHERE aid = $2")
	b.ReportAllocs()
	for b.Loop() {
		readText(sql, false)
	}
}
