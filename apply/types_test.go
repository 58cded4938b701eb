package apply

import (
	"fmt"
	"strings"
	"testing"

	"github.com/duri-io/duri/internal/pg"
)

// typed is a column type and values of it, as SQL expressions.
type typed struct {
	typ    string
	values []string
}

// lits quotes texts as SQL constants.
func lits(texts ...string) []string {
	var out []string
	for _, s := range texts {
		out = append(out, strings.TrimSpace(pg.QuoteLiteral(s)))
	}
	return out
}

const typesSchema = `
CREATE TYPE mood AS ENUM ('so so', 'it''s "fine"', 'NULL', '{a,b}');
CREATE TYPE pt AS (x int, "odd name" text, at timestamptz);
CREATE TYPE nested AS (p pt, all_p pt[], m mood);
CREATE DOMAIN posint AS int CHECK (VALUE > 0);
CREATE DOMAIN words AS text[] CHECK (array_length(VALUE, 1) < 10);
CREATE DOMAIN domdom AS posint;
CREATE DOMAIN ptdom AS pt;
CREATE TYPE floatrange AS RANGE (subtype = float8);
CREATE SCHEMA other; CREATE TYPE other."Weird Type" AS ENUM ('a', 'b');
`

// everyType is the matrix of S55.
var everyType = []typed{
	{"bool", lits("t", "f")},
	{"int2", lits("0", "-32768", "32767")},
	{"int4", lits("0", "-2147483648", "2147483647")},
	{"int8", lits("0", "-9223372036854775808", "9223372036854775807")},
	{"float4", lits("0", "-0", "NaN", "Infinity", "-Infinity", "1e-45", "3.4028235e38", "0.1", "1.17549435e-38")},
	{"float8", lits("0", "-0", "NaN", "Infinity", "-Infinity", "5e-324", "1.7976931348623157e308", "0.1", "0.30000000000000004")},
	{"numeric", append(lits("0", "0.0", "1.00", "-0.00", "NaN", "Infinity", "-Infinity", "1e-100", "123456789012345678901234567890.1234567890"), "repeat('9', 5000)::numeric / 7")},
	{"numeric(10,2)", lits("1.5", "99999999.99", "NaN")},
	{"money", lits("0", "-1234567.89", "92233720368547758.07")},
	{"text", append(lits("", " ", "NULL", "null", "{a}", `"`, `\`, `\\N`, "it's", "a,b", "tab\tcr\rnl\n", "é한글\U0001F600", "\x01\x7f"), "repeat('x''\"\\', 350000)")},
	{"varchar(5)", lits("", "ab   ", "한글한글한")},
	{"char(5)", lits("", "ab", "ab   ", `"\`)},
	{`"char"`, lits("", "a", `\`, `"`, ",")},
	{"name", lits("", "a b", `"`)},
	{"bytea", append(lits(`\x`, `\x00ff5c22`), "decode(repeat('00ff5c22', 262144), 'hex')")},
	{"date", lits("2026-11-25", "0044-03-15 BC", "infinity", "-infinity", "5874897-12-31")},
	{"time", lits("00:00", "23:59:59.999999", "24:00")},
	{"timetz", lits("12:00:00.5+05:30", "12:00-00:00:01")},
	{"timestamp", lits("2026-11-25 12:34:56.789012", "infinity", "-infinity", "4714-11-24 00:00:00 BC", "294276-12-31 23:59:59.999999")},
	{"timestamp(2)", lits("2026-11-25 12:34:56.789012")},
	{"timestamptz", lits("2026-11-25 12:34:56.789012+09", "infinity", "-infinity", "1883-11-18 12:03:58 America/New_York")},
	{"interval", lits("0", "1 year 2 mons -3 days 04:05:06.7", "-1 mon 3 days", "-00:00:00.000001", "100000000 hours", "3 days -04:05:06")},
	{"interval day to second(2)", lits("1 day 02:03:04.5678")},
	{"uuid", lits("00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff")},
	{"json", lits(`{"a": 1, "a": 2,  "b" : null}`, `"\ud83d\ude00"`, "  [1,2 , 3]", "1e400")},
	{"jsonb", lits(`{"b": 1.00, "a": [null, "x\ty", 1e3]}`, `"é"`, "null", "{}")},
	{"jsonpath", lits(`$.a[*] ? (@ > 1)`)},
	{"xml", lits("<a b=\"c\">d &amp; e</a>", "text only", "<a/><b/>", "")},
	{"tsvector", lits("'it''s':1A,2 'b':3", "", `'a\\b' c`)},
	{"tsquery", lits("'a' & !'b c' | d:AB*", "'it''s' <2> x")},
	{"inet", lits("10.0.0.1", "10.0.0.1/8", "::1", "2001:db8::/32")},
	{"cidr", lits("10.0.0.0/8", "2001:db8::/32", "0.0.0.0/0")},
	{"macaddr", lits("08:00:2b:01:02:03")},
	{"macaddr8", lits("08:00:2b:01:02:03:04:05")},
	{"bit", lits("0", "1")},
	{"bit(70)", lits(strings.Repeat("10", 35))},
	{"varbit", lits("", "101", strings.Repeat("110", 100))},
	{"point", lits("(1,2)", "(NaN,Infinity)", "(0.1,-0)")},
	{"line", lits("{1,2,3}")},
	{"lseg", lits("[(0,0),(1,1.5)]")},
	{"box", lits("((1,2),(3,4))")},
	{"path", lits("((0,0),(1,1))", "[(0,0),(1,1)]")},
	{"polygon", lits("((0,0),(1,0),(1,1))")},
	{"circle", lits("<(0,0),1.5>")},
	{"pg_lsn", lits("0/0", "FFFFFFFF/FFFFFFFF")},
	{"txid_snapshot", lits("10:20:10,14,15")},
	{"pg_snapshot", lits("10:20:10,14,15")},
	{"xid", lits("0", "4294967295")},
	{"xid8", lits("18446744073709551615")},
	{"cid", lits("7")},
	{"tid", lits("(1,2)", "(4294967295,65535)")},
	{"oid", lits("0", "4294967295")},
	{"regclass", lits("pg_class", "public.home", "0", "123456")},
	{"regtype", lits("int4", "public.mood", `other."Weird Type"`, "int4[]")},
	{"regproc", lits("now", "123456")},
	{"regprocedure", lits("abs(int4)")},
	{"regoper", lits("!!")},
	{"regoperator", lits("+(int4,int4)")},
	{"regrole", lits("pg_monitor")},
	{"regnamespace", lits("public", "other")},
	{"regconfig", lits("english")},
	{"regdictionary", lits("simple")},
	{"regcollation", lits(`"C"`)},
	{"int2vector", lits("1 2 3", "")},
	{"oidvector", lits("1 2 3", "")},
	{"mood", lits("so so", `it's "fine"`, "NULL", "{a,b}")},
	{`other."Weird Type"`, lits("a", "b")},
	{"pt", append(lits(`(1,"a,b ""q"" \\ (x)",infinity)`, "(,,)", `(1,"",)`), "ROW(1, NULL, now())::pt")},
	{"nested", []string{`ROW(ROW(1,'it''s',NULL)::pt, ARRAY[ROW(1,'{"x"}',now())::pt, NULL], 'NULL')::nested`}},
	{"posint", lits("1")},
	{"domdom", lits("2")},
	{"words", []string{`ARRAY['a', NULL, 'NULL', '', 'x"y\z,{}']`}},
	{"ptdom", lits("(3,x,)")},
	{"int4range", lits("[1,5)", "empty", "(,)", "[,5]")},
	{"int8range", lits("[1,5)")},
	{"numrange", lits("[1.0,1.50]", "(1,)")},
	{"tsrange", lits(`["2026-01-01 00:00",infinity]`)},
	{"tstzrange", lits(`["2026-01-01 00:00+09","2026-02-01")`)},
	{"daterange", lits("[2026-01-01,2026-02-01]")},
	{"floatrange", lits("[0.1,NaN]")},
	{"int4multirange", lits("{[1,3),[5,7)}", "{}")},
	{"tstzmultirange", lits(`{["2026-01-01 00:00+09","2026-02-01"),[2027-01-01,)}`)},
	{"int4[]", lits("{}", "{1,NULL,3}", "[2:3]={7,8}", "{{1,2},{3,4}}")},
	{"text[]", []string{`ARRAY['', 'NULL', NULL, 'a,b', '"', '\', E'\n', ' x ']`, `ARRAY[['a','b'],['c','d']]`}},
	{"numeric(6,2)[]", lits("{1.50,NaN}")},
	{"timestamptz[]", lits("{2026-11-25 12:34:56.789012+09,infinity}")},
	{"bytea[]", []string{`ARRAY['\x00ff'::bytea, '']`}},
	{"interval[]", lits("{1 day,-04:05:06}")},
	{"box[]", lits("{((1,2),(3,4));((5,6),(7,8))}")},
	{"pt[]", []string{`ARRAY[ROW(1,'a "b"',now())::pt, NULL]`}},
	{"mood[]", []string{`ARRAY['NULL','{a,b}',NULL]::mood[]`}},
	{"posint[]", lits("{1,2}")},
	{"json[]", []string{`ARRAY['{"a": "b,c"}'::json, NULL]`}},
	{"varchar(3)[]", lits(`{abc,NULL,"NULL"}`)},
	{"bit(3)[]", lits("{101,010}")},
	{"char(3)[]", lits(`{a,"b  "}`)},
	{"int4range[]", []string{`ARRAY['[1,3)'::int4range, 'empty']`}},
	{"tsvector[]", []string{`ARRAY['a b'::tsvector]`}},
	{"name[]", lits("{a,b}")},
	{`"char"[]`, lits("{a,b}")},
	{"refcursor", lits("c1")},
}

// TestTypesArriveByteForByte is S55: every built-in type, and what can be built of them, under odd settings of the
// writer's session; by insert, update, whole-row match and conflict.
func TestTypesArriveByteForByte(t *testing.T) {
	schema := typesSchema + "CREATE TABLE home (id int PRIMARY KEY);"
	var tables []string
	for i := range everyType {
		name := fmt.Sprintf("t%d", i)
		tables = append(tables, name)
		schema += fmt.Sprintf("CREATE TABLE %s (id int PRIMARY KEY, v %s, w %s); CREATE TABLE %sf (v %s); ALTER TABLE %sf REPLICA IDENTITY FULL;",
			name, everyType[i].typ, everyType[i].typ, name, everyType[i].typ, name)
	}
	a, b := newRig(t, schema, rigOptions{asRole: true})
	c := a.connect()
	run(t, c, `SET DateStyle = 'German'; SET IntervalStyle = 'sql_standard'; SET extra_float_digits = -10; SET bytea_output = 'escape';
		SET TimeZone = 'Asia/Seoul'; SET xmloption = 'content'; SET search_path = public, other`)
	check := func(what string) {
		t.Helper()
		for i, ty := range everyType {
			for _, from := range []string{tables[i], tables[i] + "f"} {
				// The output function's text, not that of a cast.
				sql := fmt.Sprintf("SELECT id, v, w FROM %s ORDER BY id", tables[i])
				if from != tables[i] {
					sql = fmt.Sprintf("SELECT md5(coalesce(x::text, 'NULL')) FROM %s x ORDER BY 1", from)
				}
				if x, y := a.rows(sql), b.rows(sql); x != y {
					t.Errorf("%s: %s differs:\nA:\n%s\nB:\n%s", what, ty.typ, clip(x), clip(y))
				}
			}
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	for i, ty := range everyType {
		var inserts strings.Builder
		for j, v := range append(ty.values, "NULL") {
			fmt.Fprintf(&inserts, "INSERT INTO %[1]s VALUES (%[2]d, (%[3]s)::%[4]s, NULL); INSERT INTO %[1]sf VALUES ((%[3]s)::%[4]s);", tables[i], j, v, ty.typ)
		}
		run(t, c, inserts.String())
	}
	settle(a, b)
	check("insert")
	for i := range everyType {
		run(t, c, fmt.Sprintf("UPDATE %s SET w = v", tables[i]))
		run(t, c, fmt.Sprintf("DELETE FROM %[1]sf WHERE ctid = (SELECT min(ctid) FROM %[1]sf); UPDATE %[1]sf SET v = NULL WHERE ctid = (SELECT max(ctid) FROM %[1]sf)", tables[i]))
	}
	settle(a, b)
	check("update")
	if got := b.rows(conflicts); got != "" {
		t.Errorf("conflicts without a cause:\n%s", clip(got))
	}
	// Conflicts read the rows at the other site: those images must be the same bytes too.
	a.feed.hold(b.id)
	b.feed.hold(a.id)
	d := b.connect()
	for i := range everyType {
		run(t, c, fmt.Sprintf("UPDATE %s SET v = w", tables[i]))
	}
	for i := range everyType {
		run(t, d, fmt.Sprintf("UPDATE %s SET w = NULL", tables[i]))
	}
	a.feed.release(b.id)
	b.feed.release(a.id)
	settle(a, b)
	check("conflict")
	n := b.query("SELECT count(*) FROM duri.conflict WHERE remote_row -> 'v' IS DISTINCT FROM local_row -> 'v'")[0][0]
	if n != "0" {
		t.Errorf("%s images of equal values differ in the conflict records:\n%s", n,
			clip(b.rows("SELECT remote_row, local_row FROM duri.conflict WHERE remote_row -> 'v' IS DISTINCT FROM local_row -> 'v'")))
	}
}
