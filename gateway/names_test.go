package gateway

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/pgwire"
)

// spellings are ways to write a name, by a rapid generator: the same name for PostgreSQL, another text.
func spellings(t *rapid.T, name string) string {
	if isPlain(name) && rapid.Bool().Draw(t, "bare") {
		var b strings.Builder
		for _, r := range name {
			if r >= 'a' && r <= 'z' && rapid.Bool().Draw(t, "upper") {
				r -= 'a' - 'A'
			}
			b.WriteRune(r)
		}
		return b.String()
	}
	if rapid.Bool().Draw(t, "quoted") {
		return `"` + strings.ReplaceAll(name, `"`, `""`) + `"`
	}
	escape := rapid.SampledFrom([]rune(`\!#_;`)).Draw(t, "escape")
	var b strings.Builder
	b.WriteString(rapid.SampledFrom([]string{"U&", "u&"}).Draw(t, "start") + `"`)
	for _, r := range name {
		form := rapid.IntRange(0, 3).Draw(t, "form")
		hi, lo := (r-0x10000)>>10+0xD800, (r-0x10000)&0x3FF+0xDC00
		switch {
		case form == 1 && r < 0x10000:
			fmt.Fprintf(&b, "%c%04x", escape, r)
		case form == 2:
			fmt.Fprintf(&b, "%c+%06X", escape, r)
		case form == 3 && r >= 0x10000:
			fmt.Fprintf(&b, "%c%04X%c%04x", escape, hi, escape, lo)
		case r == escape:
			fmt.Fprintf(&b, "%c%c", r, r)
		case r == '"':
			b.WriteString(`""`)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteString(`"`)
	if escape != '\\' || rapid.Bool().Draw(t, "said") {
		space := rapid.SampledFrom([]string{"", " ", "\n", " /* ' */ ", " -- \"\n"})
		b.WriteString(space.Draw(t, "space") + rapid.SampledFrom([]string{"UESCAPE", "uescape"}).Draw(t, "word") + space.Draw(t, "space") + "'" + string(escape) + "'")
	}
	return b.String()
}

// isPlain reports that a name may stand without quotes.
func isPlain(name string) bool {
	for i, r := range name {
		switch {
		case r >= 'a' && r <= 'z', r == '_', r >= 0x80:
		case i > 0 && (r >= '0' && r <= '9' || r == '$'):
		default:
			return false
		}
	}
	return name != "" && name != "u"
}

// nameChars are what names of tests are made of.
var nameChars = []rune("abcxyz_09$ .\\\"'&!+-ABCéü한글\U0001F418")

func drawName(t *rapid.T) string {
	n := rapid.SampledFrom([]int{1, 3, 8, 20, 62, 63, 64, 70}).Draw(t, "long")
	return "q" + string(rapid.SliceOfN(rapid.SampledFrom(nameChars), n, n).Draw(t, "name"))
}

// nameOf is the one name in a text, as the lexer reads it.
func nameOf(t *rapid.T, text string) string {
	l := lexer{src: []byte(text)}
	tok := l.next()
	got := string(l.word(tok))
	if end := l.next(); end.kind != tokEnd || tok.kind != tokName && tok.kind != tokWord {
		t.Fatalf("%s is not one name: %c up to %d, then %c", text, tok.kind, tok.end, end.kind)
	}
	return got
}

// TestNamesAreReadAsPostgreSQLReadsThem: however a name is spelt, with Unicode escapes or too long, it is the one that PostgreSQL sees.
func TestNamesAreReadAsPostgreSQLReadsThem(t *testing.T) {
	c := site(t, "")
	conn := open1(t, fmt.Sprintf("postgres://%s:%s@127.0.0.1:%d/shop", appUser, strings.ReplaceAll(appPassword, " ", "%20"), c.Port()))
	rapid.Check(t, func(rt *rapid.T) {
		text := spellings(rt, drawName(rt))
		rows, err := conn.Query(t.Context(), "SELECT 1 AS "+text)
		if err != nil {
			rt.Fatalf("%s: %v", text, err)
		}
		rows.Close()
		if err := rows.Err(); err != nil {
			rt.Fatalf("%s: %v", text, err)
		}
		if diff := cmp.Diff(rows.FieldDescriptions()[0].Name, nameOf(rt, text)); diff != "" {
			rt.Fatalf("%s:\n%s", text, diff)
		}
	})
}

// TestNoSpellingHidesWhatWrites: a text that names what writes is no read, however the name is spelt and wherever it stands.
func TestNoSpellingHidesWhatWrites(t *testing.T) {
	for _, name := range []string{"noting", "Noting", `a"b`, "말하기", strings.Repeat("long", 15) + "é"} {
		g := &Server{}
		g.taints.Store("shop", &tainted{version: 1, names: map[string]bool{name: true}})
		rapid.Check(t, func(t *rapid.T) {
			spelt := spellings(t, name)
			for _, sql := range []string{
				"SELECT a FROM " + spelt, "SELECT a FROM public." + spelt + " AS x", "TABLE " + spelt, "SELECT " + spelt + ".a FROM t, " + spelt,
				"SELECT 'x' FROM t JOIN " + spelt + " USING (a)", "WITH x AS (SELECT 1 FROM " + spelt + ") SELECT 1",
			} {
				if !g.mayWrite("shop", []byte(sql), false) {
					t.Fatalf("%s is taken for a read", sql)
				}
			}
		})
	}
}

// ignoreCounts compares texts but for how many statements they have, and what follows from does.
var ignoreCounts = cmp.Options{cmp.AllowUnexported(text{}), cmpopts.IgnoreFields(text{}, "wrote", "statements")}

// TestNoSpellingHidesAFunction: what is called is known by its name, however that is spelt; a quoted name is no keyword.
func TestNoSpellingHidesAFunction(t *testing.T) {
	for _, c := range []struct {
		call, after string // the name of the function, and what follows
		want        text
	}{
		{"audit", "(1)", text{probe: true, dirty: true, does: writes}},
		{"Count", "(1)", text{probe: true, dirty: true, does: writes}},
		{"setval", "('s', 1)", text{does: writes}},
		{"set_config", "('app.x', 'y', false)", text{probe: true, customs: []string{"app.x"}}},
		{"set_config", "($1, 'y', false)", text{probe: true, pin: "set_config with a name that cannot be seen"}},
		{"pg_advisory_lock", "(1)", text{probe: true}},
		{"dblink_connect", "('x')", text{pin: "a connection of dblink"}},
		{"lastval", "()", text{seq: true}},
		{"currval", "('s')", text{seq: true}},
	} {
		rapid.Check(t, func(t *rapid.T) {
			sql := "SELECT " + spellings(t, c.call) + c.after
			if diff := cmp.Diff(c.want, readText([]byte(sql), false), ignoreCounts); diff != "" {
				t.Fatalf("%s:\n%s", sql, diff)
			}
		})
	}
	// A keyword that no function can have the name of, unless it is quoted.
	for _, name := range slices.Sorted(maps.Keys(knownCalls)) {
		for _, sql := range []string{`SELECT "` + name + `"(1)`, `SELECT U&"` + name + `"(1)`, `SELECT a FROM t JOIN u ON "` + name + `" (1)`} {
			if got := readText([]byte(sql), false).does; got != writes {
				t.Errorf("%s: %d", sql, got)
			}
		}
	}
}

// TestNoSpellingHidesState: settings, statements and temporary objects are known by their names, however these are spelt.
func TestNoSpellingHidesState(t *testing.T) {
	for _, c := range []struct {
		before, name, after string
		want                text
	}{
		{"SET ", "app.x", " = 1", text{probe: true, customs: []string{"app.x"}}},
		{"SET SESSION ", "app", ".x TO 1", text{probe: true, customs: []string{"app.x"}}},
		{"SET ", "local", ".x = 1", text{probe: true, customs: []string{"local.x"}}},
		{"SET ", "session", ".x = 1", text{probe: true, customs: []string{"session.x"}}},
		{"SET ", "transaction", ".x = 1", text{probe: true, customs: []string{"transaction.x"}}},
		{"SET SESSION ", "constraints", ".x = 1", text{probe: true, customs: []string{"constraints.x"}}},
		{"SET LOCAL ", "app", ".x = 1", text{local: true}},
		{"DEALLOCATE ", "statement", "", text{probe: true, deallocate: "statement"}},
		{"DEALLOCATE PREPARE ", `o"n`, " ;", text{probe: true, deallocate: `o"n`}},
		{"CREATE TABLE ", "pg_temp", ".t (a int)", text{probe: true, does: batch}},
		{"SELECT 1 INTO ", "pg_temp", ".t", text{probe: true, does: writes}},
		{"LISTEN ", "channel", "", text{probe: true}},
	} {
		rapid.Check(t, func(t *rapid.T) {
			sql := c.before + spellings(t, c.name) + c.after
			if diff := cmp.Diff(c.want, readText([]byte(sql), false), ignoreCounts); diff != "" {
				t.Fatalf("%s:\n%s", sql, diff)
			}
		})
	}
}

// TestTheSearchPathHidesNoTemporaryTable: what is created is temporary where that schema is the first.
func TestTheSearchPathHidesNoTemporaryTable(t *testing.T) {
	_, addr := alternate(t, Config{})
	c := open1(t, dsn(addr, "default_query_exec_mode=simple_protocol"))
	for _, path := range []string{"pg_temp, public", `"$user", pg_temp`, `"pg_temp"`} {
		exec1(t, c, "SET search_path = "+path)
		exec1(t, c, "CREATE TABLE own (a int)")
		for range 4 {
			exec1(t, c, "INSERT INTO own VALUES (1)")
		}
		exec1(t, c, "DROP TABLE own; RESET search_path")
	}
	wantVisits(t, "afterwards", visits(t, c, "SELECT 1"), "a: 1", "b: 1")
}

// TestNoSpellingRoams: what is a matter of its site stays there, however it is spelt.
func TestNoSpellingRoams(t *testing.T) {
	known := &tainted{version: 1, local: map[string]bool{`lo"cal`: true}}
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.SampledFrom([]string{`lo"cal`, "pg_type", "nextval", "ctid", "pg_stat_activity"}).Draw(t, "what")
		sql := "SELECT a FROM t, " + spellings(t, name) + " WHERE true"
		if known.roams([]byte(sql), false) {
			t.Fatalf("%s roams", sql)
		}
	})
}

// TestNamesThatCannotBeRead: PostgreSQL refuses them, or reads them in a way that is not followed here; so anything may be behind them.
func TestNamesThatCannotBeRead(t *testing.T) {
	g := &Server{}
	g.taints.Store("shop", &tainted{version: 1, names: map[string]bool{"noting": true}})
	for _, name := range []string{
		`U&"\00"`, `U&"\zzzz"`, `U&"\+110000"`, `U&"\d800"`, `U&"\d800x"`, `U&"\dc00"`, `U&"\0000"`, `U&"a\"`, `U&"a" UESCAPE`, `U&"a" UESCAPE 'ab'`, `U&"a" UESCAPE ''`,
		`U&"n!006fting" UESCAPE E'!'`, `U&"n!006fting" UESCAPE $$!$$`, "U&\"n!006fting\" UESCAPE ''\n'!'", `U&"a" UESCAPE '+'`, `U&"a" UESCAPE 'f'`, `U&"a`,
	} {
		for _, sql := range []string{"SELECT a FROM " + name, "SELECT " + name + "(1)", "SELECT 1 AS " + name} {
			if !g.mayWrite("shop", []byte(sql), false) {
				t.Errorf("%s is taken for a read", sql)
			}
			if got := readText([]byte(sql), false); !got.probe || !got.dirty || got.pin == "" || got.does < writes {
				t.Errorf("%s: %+v", sql, got)
			}
			if (&tainted{version: 1}).roams([]byte(sql), false) {
				t.Errorf("%s roams", sql)
			}
		}
	}
}

// TestVolatileFunctionsWithoutACall: PostgreSQL calls a function of a row also for an attribute that is none, and a function that has
// the name of one of its own if the types fit better.
func TestVolatileFunctionsWithoutACall(t *testing.T) {
	c := markable(t)
	const note = `LANGUAGE sql AS 'INSERT INTO ledger VALUES (7, (SELECT count(*) FROM ledger)) RETURNING 1'`
	pgtest.Exec(t, c, "shop", `CREATE TABLE plain (a int); INSERT INTO plain VALUES (1); CREATE TYPE pair AS (x int, y int); CREATE DOMAIN positive AS int;
		CREATE FUNCTION audit(plain) RETURNS int `+note+`; CREATE FUNCTION shown(plain, int DEFAULT 1) RETURNS int `+note+`;
		CREATE FUNCTION calm(plain) RETURNS int STABLE LANGUAGE sql AS 'SELECT 1'; CREATE FUNCTION never() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END';
		CREATE FUNCTION lower(plain) RETURNS int `+note+`; CREATE FUNCTION "array"(int) RETURNS int `+note+`; CREATE FUNCTION conflict(int) RETURNS int `+note+`;
		CREATE FUNCTION step(int, pair) RETURNS int `+note+`; CREATE AGGREGATE sum(pair) (SFUNC = step, STYPE = int, INITCOND = 0);
		CREATE VIEW summed AS SELECT sum(ROW(1, 2)::pair) AS s; CREATE VIEW "a""b" AS SELECT audit(plain) FROM plain;
		CREATE TABLE parted (a int) PARTITION BY LIST (a);
		GRANT ALL ON ALL TABLES IN SCHEMA public TO `+appUser)
	g, addr := serve(t, Config{Mode: TransactionMode, Sites: &knowing{c: c}}, c)
	conn := open1(t, dsn(addr, "default_query_exec_mode=simple_protocol"))
	exec1(t, conn, "SELECT 1")
	s := &session{g: g, who: Login{Database: "shop"}}
	before := count(t, c, "true")
	for sql, want := range map[string]deed{
		"SELECT plain.a FROM plain": reads, "SELECT plain.calm FROM plain": reads, "SELECT count(*) FROM plain": reads, "SELECT upper('x')": reads,
		"SELECT plain.audit FROM plain": writes, "SELECT p.shown FROM plain p": writes, "SELECT lower(plain) FROM plain": writes, `SELECT "array"(1)`: writes,
		"SELECT 1 FROM plain JOIN plain p ON conflict(1) = 1": writes, "SELECT sum(ROW(1, 2)::pair)": writes, "SELECT s FROM summed": writes, `SELECT * FROM "a""b"`: writes,
		`SELECT U&"\0061udit" FROM plain`: writes, `SELECT plain.U&"!0061udit" UESCAPE '!' FROM plain`: writes,
	} {
		if got := s.look([]byte(sql)).does; got != want {
			t.Errorf("%s: %d, want %d", sql, got, want)
		}
		if _, err := conn.Exec(t.Context(), sql); err != nil && !strings.Contains(sql, `SELECT U&`) {
			t.Errorf("%s: %v", sql, err)
		}
		now := count(t, c, "true")
		if wrote := now != before; wrote && want == reads {
			t.Errorf("%s: it writes", sql)
		}
		before = now
	}
}

// TestNamesInOtherEncodings: names of the database are kept in UTF8, so that one in another encoding is not known.
func TestNamesInOtherEncodings(t *testing.T) {
	c := markable(t)
	pgtest.Exec(t, c, "shop", `CREATE FUNCTION note() RETURNS int LANGUAGE sql AS 'INSERT INTO ledger VALUES (7, (SELECT count(*) FROM ledger)) RETURNING 1';
		CREATE VIEW "prüfung" AS SELECT note() AS a; CREATE TABLE plain (a int); GRANT ALL ON ALL TABLES IN SCHEMA public TO `+appUser)
	for _, first := range []string{"LATIN1", "UTF8"} { // who asks what of the database writes
		g, addr := serve(t, Config{Mode: TransactionMode, Sites: &knowing{c: c}}, c)
		exec1(t, open1(t, dsn(addr, "default_query_exec_mode=simple_protocol client_encoding="+first)), "SELECT 1")
		if !g.taintsOf("shop").names["prüfung"] {
			t.Errorf("asked in %s: %v", first, g.taintsOf("shop").names)
		}
		for _, c := range []struct {
			encoding, sql string
			want          deed
		}{
			{"UTF8", "SELECT a FROM prüfung", writes},
			{"UTF8", "SELECT a AS ü FROM plain", reads},
			{"SJIS", "SELECT E'\x95\\', 1; DELETE FROM plain --'", tangled},
			{"SJIS", "SELECT '\x95\\', 1", reads},
			{"GBK", "SELECT a FROM plain WHERE 'a' = e'\\'", tangled},
			{"LATIN1", "SELECT a FROM pr\xfcfung", writes},
			{"LATIN1", "SELECT a FROM plain WHERE 'pr\xfcfung' <> ''", reads},
			{"LATIN1", `SELECT a FROM U&"pr\00fcfung"`, writes},
		} {
			s := &session{g: g, who: Login{Database: "shop"}}
			s.told = append(s.told, pgwire.Param{Name: "client_encoding", Value: c.encoding})
			st := newStatement(pgwire.Statement{SQL: []byte(c.sql)}, "", s.look([]byte(c.sql)))
			if got := s.effectsOf(st).does; got != c.want {
				t.Errorf("%s in %s: %d, want %d", c.sql, c.encoding, got, c.want)
			}
		}
	}
}

// FuzzName: whatever stands there, a name with Unicode escapes ends where PostgreSQL ends it, and is one that can be or is said not to be
// readable.
func FuzzName(f *testing.F) {
	for _, s := range []string{`U&"a"`, `u&"\0061" UESCAPE '!' x`, `U&"a" UESCAPE`, `U&"\d83d\dc18"`, `U&"`, `U&"a""b"(`, `U&"\+01F418" /* */ uescape '\'`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, sql string) {
		l := lexer{src: []byte(sql)}
		for tok := l.next(); tok.kind != tokEnd; tok = l.next() {
			w := l.word(tok)
			if len(w) > 63 {
				t.Fatalf("%q is longer than names are", w)
			}
			if tok.kind == tokHidden && (w != nil || !strings.HasPrefix(strings.ToLower(sql[tok.start:tok.end]), `u&"`)) {
				t.Fatalf("%q is hidden", sql[tok.start:tok.end])
			}
			if utf8.ValidString(sql) && !utf8.Valid(w) {
				t.Fatalf("%q is cut within a character", w)
			}
		}
	})
}
