package catalog

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
)

// table is (id int primary key, v text, n int, g generated, a generated always as identity).
var table = &definition{columns: []columnDef{
	{name: "id", typ: "integer", keyOp: "="},
	{name: "v", typ: "text", large: true},
	{name: "n", typ: "integer"},
	{name: "g", typ: "integer", generated: true},
	{name: "a", typ: "bigint", always: true},
}}

func image(t *testing.T, s string) Image {
	t.Helper()
	i, err := parseImage(doc(s))
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// TestRestoreDecides: what is done about a row, given the record and the row as it is now.
func TestRestoreDecides(t *testing.T) {
	const local, remote = `{"id":"1","v":"here","n":"5"}`, `{"id":"1","v":"it's","n":null}`
	won := met("update_origin_differs", "won", remote, 1, 0, local)
	lost := met("update_origin_differs", "lost", remote, 1, 20*time.Second, local)
	partial := met("update_origin_differs", "lost", `{"id":"1","n":"8"}`, 1, 20*time.Second, local)
	againstDelete := met("update_deleted", "lost", remote, 1, 20*time.Second, "")
	lostDelete := met("delete_origin_differs", "lost", "", 1, 20*time.Second, local)
	beatenDelete := met("update_deleted", "won", remote, 1, 0, "")
	deletedHere := met("delete_origin_differs", "won", "", 1, 0, local)
	for _, c := range []struct {
		name    string
		record  Conflict
		present string
		force   bool
		action  Action
		sql     string // or what the refusal says
	}{
		{"the local row lost", won, remote, false, ActionUpdate, `UPDATE ONLY "public"."t" AS t SET "v" = 'here', "n" = '5' WHERE t."id" = '1'::integer`},
		{"the remote row lost", lost, local, false, ActionUpdate, `UPDATE ONLY "public"."t" AS t SET "v" = 'it''s', "n" = NULL WHERE t."id" = '1'::integer`},
		{"what is not in the image stays", partial, local, false, ActionUpdate, `UPDATE ONLY "public"."t" AS t SET "n" = '8' WHERE t."id" = '1'::integer`},
		{"restored already", won, local, false, ActionNone, ""},
		{"restored already, by a partial image", partial, `{"id":"1","v":"later","n":"8"}`, false, ActionNone, ""},
		{"changed since", won, `{"id":"1","v":"later","n":null}`, false, "", "the row was changed again since the conflict, in v"},
		{"changed since, forced", won, `{"id":"1","v":"later","n":"5"}`, true, ActionUpdate, `UPDATE ONLY "public"."t" AS t SET "v" = 'here' WHERE t."id" = '1'::integer`},
		{"deleted since", won, "", false, "", "the row was deleted since the conflict"},
		{"deleted since, forced", won, "", true, ActionInsert, `INSERT INTO "public"."t" ("id", "v", "n") VALUES ('1', 'here', '5')`},
		{"an update lost against a delete", againstDelete, "", false, ActionInsert, `INSERT INTO "public"."t" ("id", "v", "n") VALUES ('1', 'it''s', NULL)`},
		{"and the row was made again", againstDelete, local, false, "", "the row was made again since the conflict"},
		{"and the row was made again, forced", againstDelete, `{"id":"1","v":"it's","n":"3"}`, true, ActionUpdate, `UPDATE ONLY "public"."t" AS t SET "n" = NULL WHERE t."id" = '1'::integer`},
		{"a delete won over the local row", deletedHere, "", false, ActionInsert, `INSERT INTO "public"."t" ("id", "v", "n") VALUES ('1', 'here', '5')`},
		{"the delete lost", lostDelete, local, false, ActionDelete, `DELETE FROM ONLY "public"."t" AS t WHERE t."id" = '1'::integer`},
		{"the local delete lost", beatenDelete, remote, false, ActionDelete, `DELETE FROM ONLY "public"."t" AS t WHERE t."id" = '1'::integer`},
		{"the delete lost, and the row is gone", lostDelete, "", false, ActionNone, ""},
		{"the delete lost, and the row was changed since", lostDelete, remote, false, "", "the row was changed again since the conflict, in v, n"},
		{"a large value was not sent", met("update_deleted", "lost", `{"id":"1","n":"8"}`, 1, 20*time.Second, ""), "", false, "", "the row is gone, and the losing image is without a value of v"},
		{"a large value was not sent, forced", met("update_deleted", "lost", `{"id":"1","n":"8"}`, 1, 20*time.Second, ""), "", true, ActionInsert, `INSERT INTO "public"."t" ("id", "n") VALUES ('1', '8')`},
		{"generated columns are left out", met("update_origin_differs", "won", remote, 1, 0, `{"id":"1","v":"here","n":"5","g":"9"}`), `{"id":"1","v":"it's","n":null,"g":"10"}`, false, ActionUpdate, `UPDATE ONLY "public"."t" AS t SET "v" = 'here', "n" = '5' WHERE t."id" = '1'::integer`},
		{"identity columns are skipped by an update", met("update_origin_differs", "won", `{"id":"1","a":"2","n":"1"}`, 1, 0, `{"id":"1","a":"3","n":"2"}`), `{"id":"1","v":"z","a":"2","n":"1"}`, false, ActionUpdate, `UPDATE ONLY "public"."t" AS t SET "n" = '2' WHERE t."id" = '1'::integer`},
		{"identity columns are written by an insert", met("delete_origin_differs", "won", "", 1, 0, `{"id":"1","v":"here","n":"5","a":"3"}`), "", false, ActionInsert, `INSERT INTO "public"."t" ("id", "v", "n", "a") OVERRIDING SYSTEM VALUE VALUES ('1', 'here', '5', '3')`},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := newRestorer(c.record, c.force)
			if err == nil {
				err = r.fits(table)
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := r.plan(table, image(t, c.present))
			if c.action == "" {
				refused(t, err, c.sql)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.Action != c.action || got.SQL != c.sql || got.Forced != c.force || got.ID != 7 {
				t.Errorf("%+v, want %s by %s", got, c.action, c.sql)
			}
		})
	}
}

// refused checks a refusal: what it says, and that it has advice.
func refused(t *testing.T, err error, says string) {
	t.Helper()
	var e *RefusedError
	if !errors.As(err, &e) || !strings.Contains(e.Error(), "restore conflict ") || !strings.Contains(e.Error(), says) || e.HintText() == "" {
		t.Errorf("error %v, want a refusal that says %q", err, says)
	}
}

// TestRestoreRefusesWhatIsNoLongerThere: records that have no loser, and tables that are not the record's any more.
func TestRestoreRefusesWhatIsNoLongerThere(t *testing.T) {
	keyless := met("update_missing", "lost", row, 1, 0, "")
	keyless.Key = nil
	for _, c := range []struct {
		record Conflict
		says   string
	}{
		{met("", "superseded", row, 1, 0, row), "the record is an exception (superseded) and no conflict"},
		{met("update_missing", "won", row, 0, 0, ""), "no losing image"},
		{met("delete_missing", "", "", 0, 0, ""), "no losing image"},
		{met("update_origin_differs", "mixed", row, 1, 0, row), "no losing image"},
		{keyless, "the table had no key"},
	} {
		_, err := newRestorer(c.record, true)
		refused(t, err, c.says)
	}
	r, err := newRestorer(met("update_origin_differs", "won", row, 1, 0, `{"id":"1","v":"x","old":"1","older":null}`), true)
	if err != nil {
		t.Fatal(err)
	}
	refused(t, r.fits(nil), "table public.t does not exist any more")
	refused(t, r.fits(table), "table public.t has no column old, older any more")
	other := &definition{columns: []columnDef{{name: "id"}, {name: "v", keyOp: "="}}}
	refused(t, r.fits(other), "the key of table public.t is not the one of the record any more")
	two := &definition{columns: []columnDef{{name: "id", keyOp: "="}, {name: "v", keyOp: "="}}}
	refused(t, r.fits(two), "the key of table public.t is not the one of the record any more")
}

func TestConstantsHoldNothingThatSteersATerminal(t *testing.T) {
	for in, want := range map[string]string{
		"plain": "'plain'", "it's": "'it''s'", `a\b`: `E'a\\b'`, "": "''",
		"a\n\t'\\\x1b[1m\u202e\u2028한": `E'a\n\t''\\\u001b[1m\u202e\u2028한'`,
	} {
		if got := constant(&in); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
	if got := constant(nil); got != "NULL" {
		t.Errorf("NULL: %s", got)
	}
}

// kept is a row of the test's table as the applier would keep it: by the output functions, under the settings of rule
// 21 and search_path pg_catalog; nil for none.
func kept(t *testing.T, conn *pgconn.PgConn, sql string) Image {
	t.Helper()
	if _, err := pg.Rows(t.Context(), conn, "SET search_path = pg_catalog"); err != nil {
		t.Fatal(err)
	}
	res := conn.ExecParams(t.Context(), sql, nil, nil, nil, nil).Read()
	if res.Err != nil {
		t.Fatal(res.Err)
	}
	if _, err := pg.Rows(t.Context(), conn, "RESET search_path"); err != nil {
		t.Fatal(err)
	}
	if len(res.Rows) == 0 {
		return nil
	}
	out := Image{}
	for i, v := range res.Rows[0] {
		out[res.FieldDescriptions[i].Name] = nil
		if v != nil {
			s := string(v)
			out[res.FieldDescriptions[i].Name] = &s
		}
	}
	return out
}

// record adds a record and gives its number. remote and local are images, nil for a delete or an absent row.
func record(t *testing.T, conn *pgconn.PgConn, kind, code, table string, key, remote, local Image) int64 {
	t.Helper()
	text := func(i Image) []byte {
		if i == nil {
			return nil
		}
		b, err := json.Marshal(i)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	res := conn.ExecParams(t.Context(), `INSERT INTO duri.conflict (kind, code, table_schema, table_name, key, origin, origin_lsn, origin_xid,
		change, remote_time, remote_row, local_site, local_time, local_row)
		VALUES ($1, $2, 'public', $3, $4::jsonb, 2, '0/1', 700, 0, now(), $5::jsonb, 1, now(), $6::jsonb) RETURNING id`,
		[][]byte{[]byte(kind), []byte(code), []byte(table), text(key), text(remote), text(local)}, nil, nil, nil).Read()
	if res.Err != nil {
		t.Fatal(res.Err)
	}
	var id int64
	if _, err := fmt.Sscan(string(res.Rows[0][0]), &id); err != nil {
		t.Fatal(err)
	}
	return id
}

// values are columns of many types, each with a value whose text is easily damaged on the way.
var values = []struct{ typ, value string }{
	{"bool", "'t'"},
	{"int8", "'-9223372036854775808'"},
	{"float4", "'1e-45'"},
	{"float8", "'NaN'"},
	{"float8", "'-0'"},
	{"numeric", "'123456789012345678901234567890.10'"},
	{"numeric(10,2)", "'NaN'"},
	{"money", "'-1234567.89'"},
	{"text", "''"},
	{"text", "NULL"},
	{"text", "'NULL'"},
	{"text", `E'it''s "\\N" \t\r\n é한글\U0001F600 \x01\x7f\u202e'`},
	{"text", `repeat(E'x''"\\', 50000)`},
	{"varchar(5)", "'ab   '"},
	{"char(5)", "'ab'"},
	{`"char"`, "'a'"},
	{"bytea", `decode('00ff5c22270a', 'hex')`},
	{"bytea", "''"},
	{"date", "'0044-03-15 BC'"},
	{"timetz", "'12:00:00.5+05:30'"},
	{"timestamptz", "'2026-11-25 12:34:56.789012+09'"},
	{"timestamp", "'infinity'"},
	{"interval", "'1 year 2 mons -3 days 04:05:06.7'"},
	{"interval day to second(2)", "'1 day 02:03:04.56'"},
	{"json", `'{"a": 1, "a": 2,  "b" : null}'`},
	{"jsonb", `'{"b": 1.00, "a": [null, "x\ty"]}'`},
	{"xml", "'<a b=\"c\">d &amp; e</a>'"},
	{"inet", "'10.0.0.1/8'"},
	{"bit(10)", "'1010101010'"},
	{"varbit", "''"},
	{"bit(3)[]", "'{101,010}'"},
	{"point", "'(NaN,0.1)'"},
	{"path", "'[(0,0),(1,1)]'"},
	{"tsvector", `'''it''''s'':1A,2 ''b'':3'`},
	{"regclass", "'public.mood_log'"},
	{"int4[]", "'[2:3]={7,NULL}'"},
	{"text[]", `ARRAY['', 'NULL', NULL, 'a,b', '"', '\', E'\n', ' x ']`},
	{"bytea[]", `ARRAY['\x00ff'::bytea, '']`},
	{"json[]", `ARRAY['{"a": "b,c"}'::json, NULL]`},
	{"box[]", "'{((1,2),(3,4));((5,6),(7,8))}'"},
	{"mood", `'it''s "fine"'`},
	{"mood[]", `ARRAY['NULL', '{a,b}', NULL]::mood[]`},
	{"pt", `ROW(1, 'a,b "q" \ (x)', 'infinity')::pt`},
	{"pt[]", `ARRAY[ROW(1, '', NULL)::pt, NULL]`},
	{"words", `ARRAY['a', NULL, 'NULL', 'x"y\z,{}']::words`},
	{"tstzrange", `'["2026-01-01 00:00+09","2026-02-01")'`},
	{"int4multirange", "'{[1,3),[5,7)}'"},
	{"xid8", "'18446744073709551615'"},
}

const valueTypes = `CREATE TYPE mood AS ENUM ('it''s "fine"', 'NULL', '{a,b}'); CREATE TABLE mood_log (id int PRIMARY KEY);
	CREATE TYPE pt AS (x int, "odd name" text, at timestamptz); CREATE DOMAIN words AS text[] CHECK (array_length(VALUE, 1) < 10);`

// TestRestoredImagesAreByteEqual: an image of every kind of value comes back as it was, by update and by insert.
func TestRestoredImagesAreByteEqual(t *testing.T) {
	c, conn := migrated(t)
	var columns, list []string
	for i, v := range values {
		columns = append(columns, fmt.Sprintf(`"c%d ""é" %s`, i, v.typ))
		list = append(list, v.value)
	}
	pgtest.Exec(t, c, "shop", valueTypes+`CREATE TABLE "Wide" (id numeric(6,2), k char(3), `+strings.Join(columns, ", ")+`, PRIMARY KEY (id, k));
		SET xmloption = content; SET lc_monetary = 'C';
		INSERT INTO "Wide" VALUES (1.5, 'a', `+strings.Join(list, ", ")+`); INSERT INTO "Wide" VALUES (2, 'a'), (1.5, 'b')`)
	const read = `SELECT * FROM public."Wide" WHERE id = 1.5 AND k = 'a'`
	full := kept(t, conn, read)
	pgtest.Exec(t, c, "shop", `DELETE FROM "Wide" WHERE id = 1.5 AND k = 'a'; INSERT INTO "Wide" VALUES (1.5, 'a')`)
	empty := kept(t, conn, read)
	key := Image{"id": full["id"], "k": full["k"]}

	id := record(t, conn, "update_origin_differs", "won", "Wide", key, empty, full)
	got, err := RestoreConflict(t.Context(), conn, id, RestoreOptions{})
	if err != nil || got.Action != ActionUpdate || len(got.Columns) != len(values)-1 {
		t.Fatalf("%v, %+v", err, got)
	}
	if d := cmp.Diff(full, kept(t, conn, read)); d != "" {
		t.Errorf("updated: %s", d)
	}
	if got, err := RestoreConflict(t.Context(), conn, id, RestoreOptions{}); err != nil || got.Action != ActionNone {
		t.Errorf("again: %v, %+v", err, got)
	}
	pgtest.Exec(t, c, "shop", `DELETE FROM "Wide" WHERE id = 1.5 AND k = 'a'`)
	id = record(t, conn, "update_deleted", "lost", "Wide", key, full, nil)
	if got, err = RestoreConflict(t.Context(), conn, id, RestoreOptions{}); err != nil || got.Action != ActionInsert {
		t.Fatalf("%v, %+v", err, got)
	}
	if d := cmp.Diff(full, kept(t, conn, read)); d != "" {
		t.Errorf("inserted: %s", d)
	}
	if n := pgtest.Query(t, c, "shop", `SELECT count(*) FROM "Wide"`)[0][0]; n != "3" {
		t.Errorf("%s rows", n)
	}
	// What a dry run prints is the same statement, and psql can run it.
	pgtest.Exec(t, c, "shop", `DELETE FROM "Wide" WHERE id = 1.5 AND k = 'a'`)
	if got, err = RestoreConflict(t.Context(), conn, id, RestoreOptions{DryRun: true}); err != nil || !got.DryRun {
		t.Fatalf("%v, %+v", err, got)
	}
	if row := kept(t, conn, read); row != nil {
		t.Errorf("a dry run wrote %v", row)
	}
	if _, err := c.Psql(t.Context(), "shop", "SET xmloption = content; SET lc_monetary = 'C';\n"+got.SQL+";"); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(full, kept(t, conn, read)); d != "" {
		t.Errorf("by psql: %s", d)
	}
}

// account gives a table with a row, as two sites have written it: a record whose local image lost.
func account(t *testing.T, c *pgcluster.Cluster, conn *pgconn.PgConn) int64 {
	t.Helper()
	pgtest.Exec(t, c, "shop", `CREATE TABLE account (id int PRIMARY KEY, owner text, balance numeric CHECK (balance >= 0), twice numeric GENERATED ALWAYS AS (balance * 2) STORED);
		INSERT INTO account VALUES (7, 'at b', 222)`)
	return record(t, conn, "update_origin_differs", "won", "account", Image{"id": new("7")},
		Image{"id": new("7"), "owner": new("at b"), "balance": new("222")}, Image{"id": new("7"), "owner": new("at a"), "balance": new("111")})
}

// TestRestoreIsAnOrdinaryTransaction: it has no replication origin, triggers run with a client's search_path, and who
// did it is told.
func TestRestoreIsAnOrdinaryTransaction(t *testing.T) {
	c := pgtest.New(t, pgtest.WithSetting("track_commit_timestamp", "on"))
	conn := prepare(t, c)
	id := account(t, c, conn)
	pgtest.Exec(t, c, "shop", `CREATE TABLE audit (text text, role text, path text);
		CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			INSERT INTO audit VALUES (OLD.owner || ' -> ' || NEW.owner, current_setting('session_replication_role'), current_setting('search_path')); RETURN NEW; END $$;
		CREATE TRIGGER note BEFORE UPDATE ON account FOR EACH ROW EXECUTE FUNCTION note()`)
	if _, err := pg.Rows(t.Context(), conn, "SET session_replication_role = replica"); err != nil { // what a role may be set to
		t.Fatal(err)
	}
	got, err := RestoreConflict(t.Context(), conn, id, RestoreOptions{By: "kim"})
	if err != nil {
		t.Fatal(err)
	}
	want := Restoration{
		ID: id, Schema: "public", Table: "account", Key: got.Key, Action: ActionUpdate, Columns: []string{"owner", "balance"},
		SQL: `UPDATE ONLY "public"."account" AS t SET "owner" = 'at a', "balance" = '111' WHERE t."id" = '7'::integer`,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	rows := pgtest.Query(t, c, "shop", `SELECT owner, balance, twice, (pg_xact_commit_timestamp_origin(xmin)).roident FROM account`)
	if d := cmp.Diff([][]string{{"at a", "111", "222", "0"}}, rows); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([][]string{{"at b -> at a", "origin", "public"}}, pgtest.Query(t, c, "shop", "SELECT * FROM audit")); d != "" {
		t.Errorf("trigger: %s", d)
	}
	events := "SELECT kind, text, data ->> 'by', data ->> 'conflict', data ->> 'action' FROM duri.event"
	told := [][]string{{"conflict_restored", fmt.Sprintf("kim restored the losing image of conflict %d (update_origin_differs in public.account): update", id), "kim", fmt.Sprint(id), "update"}}
	if d := cmp.Diff(told, pgtest.Query(t, c, "shop", events)); d != "" {
		t.Error(d)
	}
	// Again: nothing is written, and nothing told.
	again, err := RestoreConflict(t.Context(), conn, id, RestoreOptions{By: "kim"})
	if err != nil || again.Action != ActionNone || again.SQL != "" {
		t.Errorf("again: %v, %+v", err, again)
	}
	if n := len(pgtest.Query(t, c, "shop", events)); n != 1 {
		t.Errorf("%d events", n)
	}
	idle(t, conn)
}

// prepare is migrated for a cluster with settings of its own.
func prepare(t *testing.T, c *pgcluster.Cluster) *pgconn.PgConn {
	t.Helper()
	pgtest.DB(t, c, "shop")
	pgtest.Exec(t, c, "shop", grants.SQL(grants.Spec{}))
	conn := connect(t, c)
	if err := Migrate(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	return conn
}

// idle checks that the connection is in no transaction.
func idle(t *testing.T, conn *pgconn.PgConn) {
	t.Helper()
	if s := conn.TxStatus(); s != 'I' {
		t.Errorf("the transaction is in state %c", s)
	}
}

func TestRestoreRefusesUnlessForced(t *testing.T) {
	c, conn := migrated(t)
	id := account(t, c, conn)
	restore := func(o RestoreOptions) (Restoration, error) {
		t.Helper()
		got, err := RestoreConflict(t.Context(), conn, id, o)
		idle(t, conn)
		return got, err
	}
	owner := func() string {
		t.Helper()
		return strings.Join(slices.Concat(pgtest.Query(t, c, "shop", "SELECT owner FROM account")...), " ")
	}
	pgtest.Exec(t, c, "shop", "UPDATE account SET owner = 'later'")
	for _, dry := range []bool{false, true} {
		_, err := restore(RestoreOptions{DryRun: dry})
		refused(t, err, "changed again since the conflict, in owner")
	}
	if got, err := restore(RestoreOptions{DryRun: true, Force: true}); err != nil || !got.Forced || !got.DryRun || owner() != "later" {
		t.Errorf("dry run: %v, %+v, %s", err, got, owner())
	}
	if got, err := restore(RestoreOptions{Force: true}); err != nil || !got.Forced || owner() != "at a" {
		t.Errorf("forced: %v, %+v, %s", err, got, owner())
	}
	t.Log("a delete that lost deletes")
	gone := record(t, conn, "delete_origin_differs", "lost", "account", Image{"id": new("7")}, nil, Image{"id": new("7"), "owner": new("at a")})
	if got, err := RestoreConflict(t.Context(), conn, gone, RestoreOptions{}); err != nil || got.Action != ActionDelete || owner() != "" {
		t.Errorf("delete: %v, %+v, %s", err, got, owner())
	}
	t.Log("what the server refuses leaves nothing behind")
	bad := record(t, conn, "update_deleted", "lost", "account", Image{"id": new("8")}, Image{"id": new("8"), "owner": new("x"), "balance": new("-1")}, nil)
	_, err := RestoreConflict(t.Context(), conn, bad, RestoreOptions{})
	var e *Error
	if !errors.As(err, &e) || !strings.Contains(err.Error(), "account_balance_check") || e.HintText() == "" {
		t.Errorf("a check: %v", err)
	}
	idle(t, conn)
	t.Log("a trigger that keeps the row")
	pgtest.Exec(t, c, "shop", `CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
		CREATE TRIGGER keep BEFORE INSERT ON account FOR EACH ROW EXECUTE FUNCTION keep()`)
	kept := record(t, conn, "update_deleted", "lost", "account", Image{"id": new("8")}, Image{"id": new("8"), "owner": new("x"), "balance": new("1")}, nil)
	_, err = RestoreConflict(t.Context(), conn, kept, RestoreOptions{})
	refused(t, err, "wrote 0 rows")
	t.Log("tables and columns that are gone")
	pgtest.Exec(t, c, "shop", "DROP TRIGGER keep ON account; ALTER TABLE account DROP COLUMN owner")
	_, err = restore(RestoreOptions{Force: true})
	refused(t, err, "has no column owner any more")
	pgtest.Exec(t, c, "shop", "DROP TABLE account")
	_, err = restore(RestoreOptions{Force: true})
	refused(t, err, "table public.account does not exist any more")
	var none *NoRecordError
	if _, err := RestoreConflict(t.Context(), conn, 4711, RestoreOptions{}); !errors.As(err, &none) || none.ID != 4711 || none.HintText() == "" {
		t.Errorf("no record: %v", err)
	}
	if n := pgtest.Query(t, c, "shop", "SELECT count(*) FROM duri.event")[0][0]; n != "2" {
		t.Errorf("%s events, want those of two restorations", n)
	}
}

// TestRestoreDoesNotWaitForeverForAClient: a held row gives an error that says so, and the session is clean.
func TestRestoreDoesNotWaitForeverForAClient(t *testing.T) {
	c, conn := migrated(t)
	id := account(t, c, conn)
	other := connect(t, c)
	if _, err := pg.Rows(t.Context(), other, "BEGIN; UPDATE account SET owner = 'held'"); err != nil {
		t.Fatal(err)
	}
	_, err := RestoreConflict(t.Context(), conn, id, RestoreOptions{})
	var e *Error
	if !errors.As(err, &e) || !strings.Contains(err.Error(), "a client holds the row") || e.HintText() == "" {
		t.Errorf("error %v", err)
	}
	idle(t, conn)
	if got, err := RestoreConflict(t.Context(), conn, id, RestoreOptions{DryRun: true}); err != nil || got.Action != ActionUpdate {
		t.Errorf("a dry run does not wait: %v, %+v", err, got)
	}
}

// TestRestoreFindsRowsByOddKeys: of a partitioned table and a partition, by a replica identity, and beside a child table.
func TestRestoreFindsRowsByOddKeys(t *testing.T) {
	c, conn := migrated(t)
	pgtest.Exec(t, c, "shop", `CREATE TABLE part (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (10);
		CREATE TABLE idx (id int PRIMARY KEY, "Code" varchar(4) NOT NULL UNIQUE, v text); ALTER TABLE idx REPLICA IDENTITY USING INDEX "idx_Code_key";
		CREATE TABLE base (id int PRIMARY KEY, v text); CREATE TABLE child () INHERITS (base);
		INSERT INTO part VALUES (1, 'won'); INSERT INTO idx VALUES (3, 'a b', 'won'); INSERT INTO base VALUES (1, 'won'); INSERT INTO child VALUES (1, 'child')`)
	for _, x := range []struct{ table, column, value string }{{"part", "id", "1"}, {"part_1", "id", "1"}, {"idx", "Code", "a b"}, {"base", "id", "1"}} {
		key := Image{x.column: &x.value}
		won, lost := maps.Clone(key), maps.Clone(key)
		won["v"], lost["v"] = new("won"), new("lost")
		id := record(t, conn, "insert_exists", "won", x.table, key, won, lost)
		if got, err := RestoreConflict(t.Context(), conn, id, RestoreOptions{}); err != nil || got.Action != ActionUpdate {
			t.Errorf("%s: %v, %+v", x.table, err, got)
		}
		if x.table == "part" { // the same row is restored once more, by its partition
			pgtest.Exec(t, c, "shop", "UPDATE part SET v = 'won'")
		}
	}
	got := pgtest.Query(t, c, "shop", "SELECT (SELECT v FROM part), (SELECT v FROM idx), (SELECT v FROM ONLY base), (SELECT v FROM child)")
	if d := cmp.Diff([][]string{{"lost", "lost", "lost", "child"}}, got); d != "" {
		t.Error(d)
	}
}
