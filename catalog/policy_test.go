package catalog

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/policy"
)

// declarable has a table for each thing that a policy may meet.
const declarable = `
	CREATE DOMAIN won AS numeric CHECK (VALUE > -1000000);
	CREATE TABLE branch (id int PRIMARY KEY);
	CREATE TABLE account (id int PRIMARY KEY, branch int CONSTRAINT account_branch_fkey REFERENCES branch, no int UNIQUE, balance numeric(12,2),
		small smallint, big bigint, won won, ratio real, exact double precision, name text, twice numeric GENERATED ALWAYS AS (balance * 2) STORED,
		during int4range, EXCLUDE USING gist (during WITH &&), CONSTRAINT positive CHECK (balance >= 0));
	ALTER TABLE account REPLICA IDENTITY FULL;
	CREATE TABLE plain (id int PRIMARY KEY, n int, branch int, CONSTRAINT a_fk FOREIGN KEY (branch) REFERENCES branch);
	ALTER TABLE plain ADD CONSTRAINT "b.fk" FOREIGN KEY (n) REFERENCES branch NOT VALID;
	CREATE TABLE keyless (n int);
	ALTER TABLE keyless REPLICA IDENTITY FULL;
	CREATE SCHEMA "Odd.S";
	CREATE TABLE "Odd.S"."T""1" (id int PRIMARY KEY, "N 1" float8, n int);
	CREATE TABLE parted (id int, d date, n int, PRIMARY KEY (id, d)) PARTITION BY RANGE (d);
	CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM ('2026-01-01') TO ('2026-07-01') PARTITION BY LIST (d);
	CREATE TABLE parted_1a PARTITION OF parted_1 FOR VALUES IN ('2026-01-01');
	CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM ('2026-07-01') TO ('2027-01-01');
	ALTER TABLE parted_2 REPLICA IDENTITY FULL;
	CREATE VIEW shown AS SELECT * FROM plain`

// declare calls duri.set_policy and gives its answer, or its refusal as "message / hint".
func declare(t *testing.T, c *pgconn.PgConn, table, doc string) string {
	t.Helper()
	rows, err := pg.Query(t.Context(), c, "SELECT duri.set_policy($1::text::regclass, $2::jsonb)", table, doc)
	var pe *pgconn.PgError
	switch {
	case errors.As(err, &pe):
		return pe.Message + " / " + pe.Hint
	case err != nil:
		t.Fatal(err)
	}
	return rows[0][0]
}

func TestSetPolicyTakesWhatFits(t *testing.T) {
	c, conn := migrated(t)
	pgtest.Exec(t, c, "shop", declarable)
	for doc, want := range map[string]string{
		`{}`: `{"mode": "row", "delta": [], "foreign_keys": {}}`,
		`{"mode": "column", "delta": ["balance", "small", "big", "won"], "foreign_keys": {"account_branch_fkey": "remove_child"}}`: `{"mode": "column", "delta": ["balance", "small", "big", "won"], "foreign_keys": {"account_branch_fkey": "remove_child"}}`,
	} {
		got := declare(t, conn, "account", doc)
		if d := cmp.Diff(normal(t, want), normal(t, got)); d != "" {
			t.Error(d)
		}
	}
	declare(t, conn, "account", `{"delta": ["balance"]}`)
	declare(t, conn, "plain", `{"foreign_keys": {"b.fk": "resurrect_parent"}}`)
	declare(t, conn, `"Odd.S"."T""1"`, `{}`)
	pgtest.Exec(t, c, "shop", `ALTER TABLE parted_1a REPLICA IDENTITY FULL`)
	declare(t, conn, "parted", `{"mode": "column"}`)
	got, err := Policies(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	if a := got.Of("public", "account"); a.Mode != policy.ModeRow || !slices.Equal(a.Delta, []string{"balance"}) {
		t.Errorf("account: %+v", a)
	}
	for table, mode := range map[string]policy.Mode{"plain": policy.ModeRow, "parted": policy.ModeColumn, "parted_1": policy.ModeColumn, "parted_1a": policy.ModeColumn, "parted_2": policy.ModeColumn} {
		if got.Of("public", table).Mode != mode {
			t.Errorf("%s: %+v", table, got.Of("public", table))
		}
	}
	if got.Of("public", "plain").Orphans("b.fk") != policy.ResurrectParent {
		t.Errorf("plain: %+v", got.Of("public", "plain"))
	}
	cleared := func(table, want string) {
		t.Helper()
		rows, err := pg.Query(t.Context(), conn, "SELECT duri.clear_policy($1::text::regclass)", table)
		if err != nil || rows[0][0] != want {
			t.Errorf("clear %s: %v, %v", table, rows, err)
		}
	}
	cleared("plain", "t")
	cleared("plain", "f")
	pgtest.Exec(t, c, "shop", "DROP TABLE account")
	if got, err = Policies(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]policy.Name{{Schema: "Odd.S", Table: `T"1`}, {Schema: "public", Table: "parted"}}, got.Tables()); d != "" {
		t.Errorf("after clear and drop: %s", d)
	}
}

func TestSetPolicyRefusesWhatIsMalformed(t *testing.T) {
	c, conn := migrated(t)
	pgtest.Exec(t, c, "shop", declarable)
	for _, doc := range []string{
		`[]`, `1`, `null`, `{"mod": "row"}`, `{"mode": "rows"}`, `{"mode": 1}`, `{"mode": null}`, `{"delta": "balance"}`, `{"delta": [1]}`,
		`{"delta": ["balance", "balance"]}`, `{"foreign_keys": ["account_branch_fkey"]}`, `{"foreign_keys": {"account_branch_fkey": "drop"}}`, `{"foreign_keys": {"account_branch_fkey": null}}`,
	} {
		if got := declare(t, conn, "account", doc); !strings.HasPrefix(got, "set the policy of public.account: ") || strings.HasSuffix(got, "/ ") {
			t.Errorf("%s: %s", doc, got)
		}
	}
	if got := declare(t, conn, "nowhere", `{}`); !strings.Contains(got, `relation "nowhere" does not exist`) {
		t.Error(got)
	}
	if _, err := pg.Rows(t.Context(), conn, "SELECT duri.set_policy('account', NULL)"); pg.SQLState(err) != "22023" {
		t.Error(err)
	}
	if _, err := pg.Rows(t.Context(), conn, "SELECT duri.set_policy(NULL, '{}')"); pg.SQLState(err) != "22004" {
		t.Error(err)
	}
	if got := pgtest.Query(t, c, "shop", "SELECT count(*) FROM duri.policy"); got[0][0] != "0" {
		t.Errorf("%s rows", got[0][0])
	}
	pgtest.Exec(t, c, "shop", `CREATE ROLE joe; GRANT USAGE ON SCHEMA duri TO joe`)
	other := connectAs(t, c.DSN("shop", "postgres"))
	if _, err := pg.Rows(t.Context(), other, "SET ROLE joe; SELECT duri.set_policy('public.account', '{}')"); pg.SQLState(err) != "42501" {
		t.Errorf("anybody may declare: %v", err)
	}
}

func connectAs(t *testing.T, dsn string) *pgconn.PgConn {
	t.Helper()
	conn, err := pg.Connect(t.Context(), dsn, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pg.Close(conn) })
	return conn
}

// TestBothChecksAgree: what the database says of a policy (duri.check_policy) is what the agent says (policy.Check), word
// for word.
func TestBothChecksAgree(t *testing.T) {
	c, conn := migrated(t)
	pgtest.Exec(t, c, "shop", declarable)
	odd := policy.Name{Schema: "Odd.S", Table: `T"1`}
	public := func(table string) policy.Name { return policy.Name{Schema: "public", Table: table} }
	for _, x := range []struct {
		table policy.Name
		doc   string
		codes string
	}{
		{public("account"), `{"mode": "column", "delta": ["balance", "small", "big", "won"]}`, ""},
		{public("account"), `{"delta": ["nothing", "twice", "ratio", "exact", "name", "id", "no", "during"]}`, "policy_column policy_column policy_type policy_type policy_type policy_delta_key policy_delta_key policy_type"},
		{public("account"), `{"delta": ["ctid"], "foreign_keys": {"a": "report", "b": "remove_child"}}`, "policy_column policy_foreign_key policy_foreign_key"},
		{public("plain"), `{"delta": ["n"]}`, "policy_identity"},
		{public("plain"), `{"mode": "column", "foreign_keys": {"b.fk": "report", "c": "report"}}`, "policy_identity policy_foreign_key"},
		{public("plain"), `{"mode": "row", "delta": []}`, ""},
		{public("keyless"), `{"delta": ["n"]}`, "policy_key"},
		{public("branch"), `{"foreign_keys": {"account_branch_fkey": "report"}}`, "policy_foreign_key"},
		{odd, `{"delta": ["N 1", "n"]}`, "policy_type policy_identity"},
		{public("parted"), `{"mode": "column"}`, "policy_identity"},
		{public("parted"), `{"delta": ["d"]}`, "policy_type policy_identity"},
		{public("parted_2"), `{"mode": "column"}`, "policy_partition"},
		{public("parted_1a"), `{}`, "policy_partition"},
		{public("shown"), `{}`, "policy_table"},
	} {
		table, err := policy.Parse([]byte(x.doc))
		if err != nil {
			t.Fatal(err)
		}
		facts, err := TableFacts(t.Context(), conn, []policy.Name{x.table})
		if err != nil {
			t.Fatal(err)
		}
		rows, err := pg.Query(t.Context(), conn, "SELECT * FROM duri.check_policy($1::text::regclass, $2::jsonb)", x.table.SQL(), x.doc)
		if err != nil {
			t.Fatal(err)
		}
		ours := [][]string{}
		var codes []string
		for _, p := range policy.Check(table, facts[0]) {
			ours, codes = append(ours, []string{p.Code, p.Text, p.Hint}), append(codes, p.Code)
		}
		if got := strings.Join(codes, " "); got != x.codes {
			t.Errorf("%s %s: %s, want %s", x.table, x.doc, got, x.codes)
		}
		if d := cmp.Diff(ours, rows); d != "" {
			t.Errorf("%s %s (-Go +SQL):\n%s", x.table, x.doc, d)
		}
	}
	if facts, err := TableFacts(t.Context(), conn, []policy.Name{public("nowhere")}); err != nil || !facts[0].Missing {
		t.Errorf("%+v, %v", facts, err)
	}
	// The hint is the remedy.
	got := declare(t, conn, "parted", `{"mode": "column"}`)
	_, remedy, _ := strings.Cut(got, " / ")
	pgtest.Exec(t, c, "shop", remedy)
	if got := declare(t, conn, "parted", `{"mode": "column"}`); !strings.HasPrefix(got, "{") {
		t.Errorf("after %s: %s", remedy, got)
	}
}

func TestPoliciesThatNobodyCheckedAreAnError(t *testing.T) {
	c, conn := migrated(t)
	pgtest.Exec(t, c, "shop", `CREATE TABLE x (id int PRIMARY KEY); INSERT INTO duri.policy VALUES ('public', 'x', '{"mode": "cell"}')`)
	_, err := Policies(t.Context(), conn)
	var e *Error
	if !errors.As(err, &e) || e.HintText() == "" || !strings.Contains(err.Error(), "public.x") {
		t.Errorf("%v", err)
	}
}

func TestTablesAreDescribed(t *testing.T) {
	c, conn := migrated(t)
	pgtest.Exec(t, c, "shop", declarable+`;
		CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY);
		CREATE TABLE late (id int PRIMARY KEY DEFERRABLE);
		CREATE SCHEMA hidden; CREATE TABLE hidden.t (id int);
		CREATE FOREIGN DATA WRAPPER fdw; CREATE SERVER srv FOREIGN DATA WRAPPER fdw; CREATE FOREIGN TABLE far (id int) SERVER srv;
		INSERT INTO parted VALUES (1, '2026-01-01', 1), (2, '2026-08-01', 1); INSERT INTO plain SELECT generate_series(1, 5); ANALYZE`)
	pgtest.Exec(t, c, "shop", grants.SQL(grants.Spec{Schemas: []string{"public", "Odd.S"}}))
	declare(t, conn, "account", `{"delta": ["balance"], "foreign_keys": {"account_branch_fkey": "remove_child"}}`)
	declare(t, conn, "plain", `{"foreign_keys": {"a_fk": "remove_child"}}`)
	pgtest.Exec(t, c, "shop", `INSERT INTO duri.orphan VALUES ('public', 'plain', 'a_fk', '{"id": "1"}', '{}', 'report', ''), ('public', 'plain', 'a_fk', '{"id": "2"}', '{}', 'report', '')`)
	now := pgtest.Query(t, c, "shop", "SELECT now()")[0][0]
	for _, x := range []string{"parted_1a", "parted_2", "plain"} {
		pgtest.Exec(t, c, "shop", fmt.Sprintf(`INSERT INTO duri.conflict (at, kind, code, table_schema, table_name, origin, origin_lsn, origin_xid, change, remote_time)
			SELECT '%s'::timestamptz - x, k, 'lost', 'public', '%s', 2, '0/1', 1, 0, now() FROM (VALUES (interval '1 h', 'update_missing'), ('25 h', 'update_missing'), ('1 h', '')) v(x, k)`, now, x))
	}
	file := policy.NewSet(map[policy.Name]policy.Table{{Schema: "public", Table: "plain"}: {FK: map[string]policy.Orphans{"b.fk": policy.RemoveChild}}}, nil)
	all, err := Tables(t.Context(), conn, []string{"public", "Odd.S"}, file)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, x := range all {
		text := fmt.Sprintf("%s|%t %s|%s %v|%s|%s %v %s %t|rows %d conflicts %d", x.FullName(), x.Replicated, x.Why, x.KeySource, x.Key, x.Identity, x.Mode, x.Delta, x.PolicySource, x.Overridden, x.Rows, x.Conflicts)
		for _, k := range x.ForeignKeys {
			text += fmt.Sprintf("|%s %v->%s%v %s %s %t %d", k.Name, k.Columns, k.References, k.Referenced, k.Match, k.Orphans, k.Checked, k.Open)
		}
		for _, u := range x.Uniques {
			text += fmt.Sprintf("|%s %s %s %t", u.Name, u.Kind, u.Definition, u.Parkable)
		}
		for _, n := range x.Notes {
			text += "|note " + n.Text
			if n.Hint == "" {
				t.Errorf("%s: note without a hint: %s", x.FullName(), n.Text)
			}
		}
		got = append(got, text)
	}
	want := []string{
		`"Odd.S"."T""1"|true |primary key [id]|default|row [] default false|rows 0 conflicts 0`,
		`hidden.t|false its schema is not among those of duri.yaml|none []|default|row [] default false|rows 0 conflicts 0|note its schema is not among those of duri.yaml`,
		`public.account|true |primary key [id]|full|row [balance] sql false|rows 0 conflicts 0|account_branch_fkey [branch]->public.branch[id] simple remove_child true 0` +
			`|account_during_excl exclusion EXCLUDE USING gist (during WITH &&) true|account_no_key unique UNIQUE (no) true` +
			`|note delta column "balance" is bounded by CHECK constraint "positive", which the sum of several sites' changes can break: apply then stops`,
		`public.branch|true |primary key [id]|default|row [] default false|rows 0 conflicts 0`,
		`public.far|false a foreign table: its rows are elsewhere|none []|nothing|row [] default false|rows 0 conflicts 0`,
		`public.keyless|true |none []|full|row [] default false|rows 0 conflicts 0|note without a key rows are matched whole, and concurrent updates of one row leave two`,
		`public.late|true |primary key [id]|default|row [] default false|rows 0 conflicts 0|note its key is DEFERRABLE, which PostgreSQL does not take as replica identity`,
		`public.parted|true |primary key [id d]|mixed|row [] default false|rows 2 conflicts 2`,
		`public.parted_1|true |primary key [id d]|default|row [] default false|rows 1 conflicts 1`,
		`public.parted_1a|true |primary key [id d]|default|row [] default false|rows 1 conflicts 1`,
		`public.parted_2|true |primary key [id d]|full|row [] default false|rows 1 conflicts 1`,
		`public.plain|true |primary key [id]|default|row [] duri.yaml true|rows 5 conflicts 1|a_fk [branch]->public.branch[id] simple report true 2|b.fk [n]->public.branch[id] simple remove_child false 0`,
		`public.scratch|false unlogged: its rows are not in the WAL|primary key [id]|default|row [] default false|rows 0 conflicts 0|note unlogged: its rows are not in the WAL`,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if b, err := json.Marshal(all[0]); err != nil || strings.Contains(string(b), "null") {
		t.Errorf("a list is null in JSON: %s, %v", b, err)
	}
}
