package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pg"
)

// typed is a column type and SQL constants for it, separated by blanks in front and behind "§".
type typed struct{ typ, values string }

const typesSQL = `
CREATE SCHEMA other;
CREATE TYPE mood AS ENUM ('so so', 'it''s "fine"', 'NULL', '{a,b}');
CREATE TYPE other."Weird Type" AS ENUM ('a', 'b');
CREATE TYPE pt AS (x int, "odd name" text, at timestamptz);
CREATE TYPE nested AS (p pt, all_p pt[], m mood);
CREATE DOMAIN posint AS int CHECK (VALUE > 0);
CREATE DOMAIN words AS text[] CHECK (array_length(VALUE, 1) < 10);
CREATE DOMAIN ptdom AS pt;
CREATE TYPE floatrange AS RANGE (subtype = float8);
CREATE TABLE home (id int PRIMARY KEY);`

// matrix is S55: every built-in type and what can be built of them.
var matrix = []typed{
	{"bool", `'t' § 'f'`},
	{"int2", `-32768 § 32767`},
	{"int4", `-2147483648 § 2147483647`},
	{"int8", `-9223372036854775808 § 9223372036854775807`},
	{"float4", `'-0' § 'NaN' § 'Infinity' § '-Infinity' § '1e-45' § '3.4028235e38' § 0.1`},
	{"float8", `'-0' § 'NaN' § 'Infinity' § '-Infinity' § '5e-324' § 1.7976931348623157e308 § 0.30000000000000004`},
	{"numeric", `0.00 § 'NaN' § 'Infinity' § '-Infinity' § 1e-100 § 123456789012345678901234567890.1234567890 § repeat('9', 5000)::numeric / 7`},
	{"numeric(10,2)", `1.5 § 'NaN'`},
	{"money", `'-1234567.89' § '92233720368547758.07'`},
	{"text", `'' § ' ' § 'NULL' § '{a}' § '"' § E'\\\\N' § 'it''s' § E'tab\tcr\rnl\n' § 'é한글😀' § E'\x01\x7f' § repeat('x''"\', 350000)`},
	{"varchar(5)", `'' § 'ab   ' § '한글한글한'`},
	{"char(5)", `'' § 'ab' § '"\'`},
	{`"char"`, `'' § 'a' § '\' § ','`},
	{"name", `'' § 'a b'`},
	{"bytea", `'' § '\x00ff5c22' § decode(repeat('00ff5c22', 262144), 'hex')`},
	{"date", `'2026-11-25'::date § '0044-03-15 BC' § 'infinity' § '-infinity' § '5874897-12-31'`},
	{"time", `'00:00' § '23:59:59.999999' § '24:00'`},
	{"timetz", `'12:00:00.5+05:30' § '12:00-00:00:01'`},
	{"timestamp", `'2026-11-25 12:34:56.789012' § 'infinity' § '-infinity' § '294276-12-31 23:59:59.999999'`},
	{"timestamptz", `'2026-11-25 12:34:56.789012+09' § 'infinity' § '1883-11-18 12:03:58 America/New_York'`},
	{"timestamptz(0)", `'2026-11-25 12:34:56.789012+09'`},
	{"interval", `'0' § '1 year 2 mons' § '-1 mon' § '-00:00:00.000001' § '100000000 hours' § make_interval(1, 2, 0, -3, 4, 5, 6.7)`},
	{"uuid", `'ffffffff-ffff-ffff-ffff-ffffffffffff'`},
	{"json", `'{"a": 1, "a": 2,  "b" : null}' § '  [1,2 , 3]' § '1e400' § '"\ud83d\ude00"'`},
	{"jsonb", `'{"b": 1.00, "a": [null, "x\ty", 1e3]}' § 'null' § '{}'`},
	{"jsonpath", `'$.a[*] ? (@ > 1)'`},
	{"xml", `'<a b="c">d &amp; e</a>' § 'text only' § ''`},
	{"tsvector", `'''it''''s'':1A,2 ''b'':3' § ''`},
	{"tsquery", `'''a'' & !''b c'' | d:AB*'`},
	{"inet", `'10.0.0.1' § '10.0.0.1/8' § '2001:db8::/32'`},
	{"cidr", `'10.0.0.0/8' § '0.0.0.0/0'`},
	{"macaddr", `'08:00:2b:01:02:03'`},
	{"macaddr8", `'08:00:2b:01:02:03:04:05'`},
	{"bit(70)", `repeat('10', 35)::bit(70)`},
	{"varbit", `'' § B'101'`},
	{"point", `'(NaN,Infinity)' § '(0.1,-0)'`},
	{"line", `'{1,2,3}'`},
	{"lseg", `'[(0,0),(1,1.5)]'`},
	{"box", `'((1,2),(3,4))'`},
	{"path", `'((0,0),(1,1))' § '[(0,0),(1,1)]'`},
	{"polygon", `'((0,0),(1,0),(1,1))'`},
	{"circle", `'<(0,0),1.5>'`},
	{"pg_lsn", `'FFFFFFFF/FFFFFFFF'`},
	{"pg_snapshot", `'10:20:10,14,15'`},
	{"xid", `'4294967295'`},
	{"xid8", `'18446744073709551615'`},
	{"tid", `'(4294967295,65535)'`},
	{"oid", `4294967295`},
	{"regclass", `'pg_class' § 'public.home' § '123456'`},
	{"regtype", `'int4' § 'public.mood' § 'other."Weird Type"'`},
	{"regprocedure", `'abs(int4)'`},
	{"regrole", `'pg_monitor'`},
	{"regnamespace", `'other'`},
	{"int2vector", `'1 2 3'`},
	{"mood", `'so so' § 'it''s "fine"' § 'NULL' § '{a,b}'`},
	{`other."Weird Type"`, `'a'`},
	{"pt", `'(,,)' § '(1,"",)' § ROW(1, 'a,b "q" \ (x)', 'infinity')::pt`},
	{"nested", `ROW(ROW(1,'it''s',NULL)::pt, ARRAY[ROW(1,'{"x"}','2026-01-01')::pt, NULL], 'NULL')::nested`},
	{"posint", `1`},
	{"words", `ARRAY['a', NULL, 'NULL', '', 'x"y\z,{}']`},
	{"ptdom", `'(3,x,)'`},
	{"int4range", `'[1,5)' § 'empty' § '(,)'`},
	{"numrange", `'[1.0,1.50]'`},
	{"tstzrange", `'["2026-01-01 00:00+09","2026-02-01 00:00+00")'`},
	{"daterange", `'[2026-01-01,2026-02-01]'`},
	{"floatrange", `'[0.1,NaN]'`},
	{"int4multirange", `'{[1,3),[5,7)}' § '{}'`},
	{"int4[]", `'{}' § '{1,NULL,3}' § '[2:3]={7,8}' § '{{1,2},{3,4}}'`},
	{"text[]", `ARRAY['', 'NULL', NULL, 'a,b', '"', '\', E'\n', ' x '] § ARRAY[['a','b'],['c','d']]`},
	{"numeric(6,2)[]", `'{1.50,NaN}'`},
	{"timestamptz[]", `'{2026-11-25 12:34:56.789012+09,infinity}'`},
	{"bytea[]", `ARRAY['\x00ff'::bytea, '']`},
	{"box[]", `'{((1,2),(3,4));((5,6),(7,8))}'`},
	{"pt[]", `ARRAY[ROW(1,'a "b"','2026-01-01')::pt, NULL]`},
	{"mood[]", `ARRAY['NULL','{a,b}',NULL]::mood[]`},
	{"posint[]", `'{1,2}'`},
	{"json[]", `ARRAY['{"a": "b,c"}'::json, NULL]`},
	{"bit(3)[]", `'{101,010}'`},
	{"char(3)[]", `'{a,"b  "}'`},
	{"int4range[]", `ARRAY['[1,3)'::int4range, 'empty']`},
}

// oddSession makes a client's session write every text form unlike the usual one.
const oddSession = `SET DateStyle = 'German'; SET IntervalStyle = 'sql_standard'; SET extra_float_digits = -10;
	SET bytea_output = 'escape'; SET TimeZone = 'Asia/Seoul'; SET xmloption = 'content'; `

// typesInsert inserts a row for each value, and one of NULL, with ids from first on.
func typesInsert(first int) string {
	var b strings.Builder
	for i, ty := range matrix {
		for j, v := range append(strings.Split(ty.values, "§"), "NULL") {
			fmt.Fprintf(&b, "INSERT INTO t%d VALUES (%d, (%s)::%s, NULL);\n", i, first+j, strings.TrimSpace(v), ty.typ)
		}
	}
	return b.String()
}

// typesChange updates, by key, and deletes rows of each table; the TOASTed value of v stays as it is in most.
func typesChange(first int) string {
	var b strings.Builder
	for i := range matrix {
		fmt.Fprintf(&b, "UPDATE t%[1]d SET w = v WHERE id >= %[2]d; UPDATE t%[1]d SET v = NULL, id = -id WHERE id = %[2]d; DELETE FROM t%[1]d WHERE id = %[3]d;\n", i, first, first+1)
	}
	return b.String()
}

func TestEveryTypeArrivesByteForByteBothWays(t *testing.T) {
	t.Parallel()
	sql := typesSQL
	for i, ty := range matrix {
		sql += fmt.Sprintf("CREATE TABLE t%d (id int PRIMARY KEY, v %s, w %s);\n", i, ty.typ, ty.typ)
	}
	p := newPair(t, pair.Options{Seed: func(ctx context.Context, a *pair.Site) error {
		if err := a.Cluster.Exec(ctx, a.Database, sql); err != nil {
			return err
		}
		return a.Cluster.Exec(ctx, a.Database, oddSession+typesInsert(1))
	}})
	if who := text(t, p.Sites[1], "SELECT string_agg(DISTINCT usename, ' ') FROM pg_stat_activity WHERE application_name LIKE 'duri%' AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = usename)"); who != "duri" {
		t.Errorf("the agent runs as %q, want duri, no superuser", who)
	}
	equal(t, p)
	for i, s := range p.Sites { // a's clients, then b's
		first := 100 * (i + 1)
		do(t, s, oddSession+typesInsert(first))
		settled(t, p, time.Minute)
		equal(t, p)
		do(t, s, oddSession+typesChange(first))
		settled(t, p, time.Minute)
		do(t, p.Sites[1-i], oddSession+typesChange(first+2)) // the other site's rows too
		settled(t, p, time.Minute)
		equal(t, p)
	}
	if n := text(t, p.Sites[1], "SELECT count(*) FROM t9 WHERE length(v) > 1000000"); n != "3" {
		t.Errorf("%s values of more than 1 MB are at b, want 3", n)
	}
	if n := text(t, p.Sites[0], "SELECT count(*) FROM duri.conflict"); n != "0" {
		t.Errorf("%s conflict records without a conflict", n)
	}
	// An equal comparison of nothing proves nothing: the texts are those that this session writes itself.
	conn, err := pg.Connect(t.Context(), p.Sites[1].Cluster.DSN(p.Database, ""), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(conn)
	rows, err := pg.Rows(t.Context(), conn, "SELECT (SELECT w FROM t19 WHERE id = -200), (SELECT w FROM t4 WHERE id = 206)")
	if err != nil {
		t.Fatal(err)
	}
	if rows[0][0] != "2026-11-25 03:34:56.789012+00" || rows[0][1] != "0.1" {
		t.Errorf("values at b: %q", rows[0])
	}
}
