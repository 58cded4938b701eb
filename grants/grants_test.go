package grants

import (
	"context"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
)

// weird is a name that breaks careless quoting, in SQL and in the script's own delimiters.
const weird = `we"ird $duri$ 'x' \ 한글`

// application is what a DBA may have before duri comes. Its objects belong to app_owner.
const application = `
REVOKE ALL ON DATABASE app FROM PUBLIC;
CREATE ROLE app_owner;
GRANT CREATE ON SCHEMA public TO app_owner;
CREATE SCHEMA "Sales Q1" AUTHORIZATION app_owner;
SET ROLE app_owner;
CREATE TABLE public.account (id int PRIMARY KEY, owner text NOT NULL DEFAULT current_user, v int);
ALTER TABLE public.account ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.account FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON public.account USING (owner = current_user);
CREATE TABLE "Sales Q1".item (id serial PRIMARY KEY, v int);
CREATE TABLE "Sales Q1".bill (id int PRIMARY KEY REFERENCES "Sales Q1".item (id));
RESET ROLE;
INSERT INTO public.account VALUES (1, 'somebody', 1);
INSERT INTO "Sales Q1".item (v) VALUES (1), (2);`

func start(t *testing.T, m pgtest.Major) *pgcluster.Cluster {
	t.Helper()
	c := pgtest.New(t, pgtest.WithMajor(m))
	pgtest.DB(t, c, "app")
	pgtest.Exec(t, c, "app", application)
	return c
}

func connect(t *testing.T, c *pgcluster.Cluster, role string, extra string) *pgconn.PgConn {
	t.Helper()
	conn, err := pgconn.Connect(t.Context(), c.DSN("app", role)+extra)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// exec runs SQL and gives the number of rows that the last statement touched.
func exec(t *testing.T, conn *pgconn.PgConn, sql string) int64 {
	t.Helper()
	results, err := conn.Exec(t.Context(), sql).ReadAll()
	if err != nil {
		t.Fatalf("%s\n%v", sql, err)
	}
	return results[len(results)-1].CommandTag.RowsAffected()
}

func onEachMajor(t *testing.T, test func(*testing.T, *pgcluster.Cluster)) {
	for _, m := range pgtest.Majors(t) {
		t.Run(m.String(), func(t *testing.T) { test(t, start(t, m)) })
	}
}

// TestRoleCanDoAllThatTheAgentDoes runs the script twice and then works as the role.
func TestRoleCanDoAllThatTheAgentDoes(t *testing.T) {
	onEachMajor(t, func(t *testing.T, c *pgcluster.Cluster) {
		for range 2 {
			pgtest.Exec(t, c, "app", SQL(Spec{Database: "app"}))
		}
		conn := connect(t, c, "duri", "")
		for _, step := range []struct {
			sql  string
			rows int64
		}{
			// Settings of an apply session.
			{"SET session_replication_role = replica; SET deadlock_timeout = '100ms'; SELECT 1", 1},
			// Rows of tables with forced row-level security, of another owner.
			{"INSERT INTO account VALUES (2, 'x', 1), (3, 'x', 1)", 2},
			{"UPDATE account SET v = 7", 3},
			{"DELETE FROM account WHERE id = 1", 1},
			{"SELECT FROM account", 2},
			// A child without its parent: foreign keys do not fire.
			{`INSERT INTO "Sales Q1".bill VALUES (99)`, 1},
			{`SELECT setval('"Sales Q1".item_id_seq', 100), nextval('"Sales Q1".item_id_seq')`, 1},
			{"TRUNCATE account; SELECT FROM account", 0},
			{"COPY (SELECT * FROM account) TO STDOUT", 0},
			// Origins and exact stamps.
			{"SELECT pg_replication_origin_create('duri_a')", 1},
			{"SELECT pg_replication_origin_oid('duri_a')", 1},
			{"SELECT pg_replication_origin_session_setup('duri_a'), pg_replication_origin_session_is_setup()", 1},
			{"BEGIN; SELECT pg_replication_origin_xact_setup('0/10', '2026-01-01 00:00:00.000001+00'); INSERT INTO account VALUES (5, 'x', 5); COMMIT", 0},
			{"SELECT FROM account, pg_xact_commit_timestamp_origin(xmin) WHERE id = 5 AND roident <> 0 AND timestamp = '2026-01-01 00:00:00.000001+00'", 1},
			{"BEGIN; SELECT pg_replication_origin_xact_setup('0/20', now()); SELECT pg_replication_origin_xact_reset(); ROLLBACK", 0},
			{"SELECT WHERE pg_replication_origin_session_progress(false) = '0/10'", 1},
			{"SELECT pg_replication_origin_session_reset()", 1},
			{"SELECT pg_replication_origin_advance('duri_a', '0/30')", 1},
			{"SELECT WHERE pg_replication_origin_progress('duri_a', false) = '0/30'", 1},
			{"SELECT FROM pg_show_replication_origin_status()", 1},
			{"SELECT pg_replication_origin_drop('duri_a')", 1},
			// Marks in the WAL.
			{"SELECT pg_logical_emit_message(false, 'duri', 'x'), pg_logical_emit_message(true, 'duri', '\\x00'::bytea)", 1},
			// Slots.
			{"SELECT pg_create_logical_replication_slot('duri_sql', 'pgoutput')", 1},
			{"SELECT pg_logical_slot_get_binary_changes('duri_sql', NULL, NULL, 'proto_version', '1', 'publication_names', 'duri')", 0},
			{"SELECT pg_drop_replication_slot('duri_sql')", 1},
			// Own tables, staging tables, copied schemas, and the view of others' sessions.
			{"CREATE TABLE duri.progress (id int); CREATE TEMP TABLE staging (id int); CREATE SCHEMA copied; DROP SCHEMA copied; SELECT 1", 1},
			{"SELECT FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query = '<insufficient privilege>'", 0},
		} {
			if got := exec(t, conn, step.sql); got != step.rows {
				t.Errorf("%s: %d rows, want %d", step.sql, got, step.rows)
			}
		}
		walsender := connect(t, c, "duri", " replication=database")
		exec(t, walsender, "CREATE_REPLICATION_SLOT duri_stream LOGICAL pgoutput (SNAPSHOT 'export')")
		exec(t, walsender, "DROP_REPLICATION_SLOT duri_stream")
	})
}

func published(t *testing.T, c *pgcluster.Cluster) string {
	t.Helper()
	rows := pgtest.Query(t, c, "app", "SELECT string_agg(schemaname || '.' || tablename, ',' ORDER BY schemaname, tablename) FROM pg_publication_tables WHERE pubname = 'duri'")
	return rows[0][0]
}

func TestPublicationFollowsTheSchemas(t *testing.T) {
	onEachMajor(t, func(t *testing.T, c *pgcluster.Cluster) {
		pgtest.Exec(t, c, "app", SQL(Spec{}))
		if got, want := published(t, c), "Sales Q1.bill,Sales Q1.item,public.account"; got != want {
			t.Errorf("published: %s, want %s", got, want)
		}
		// Tables made later are in it at once, schemas made later when the script runs again; duri's own never are.
		pgtest.Exec(t, c, "app", `CREATE TABLE duri.own (id int);
			SET ROLE app_owner; CREATE TABLE public.later (id int); RESET ROLE;
			CREATE SCHEMA late; CREATE TABLE late.t (id int)`)
		exec(t, connect(t, c, "duri", ""), "TRUNCATE public.later")
		pgtest.Exec(t, c, "app", SQL(Spec{}))
		if got, want := published(t, c), "Sales Q1.bill,Sales Q1.item,late.t,public.account,public.later"; got != want {
			t.Errorf("published: %s, want %s", got, want)
		}
		exec(t, connect(t, c, "duri", ""), "TRUNCATE late.t")
	})
}

func TestOnlyTheNamedSchemasArePublished(t *testing.T) {
	onEachMajor(t, func(t *testing.T, c *pgcluster.Cluster) {
		var warnings []string
		run := func(sql string) {
			cfg, err := pgconn.ParseConfig(c.DSN("app", ""))
			if err != nil {
				t.Fatal(err)
			}
			cfg.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) {
				if n.Severity == "WARNING" {
					warnings = append(warnings, n.Message)
				}
			}
			conn, err := pgconn.ConnectConfig(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close(context.Background())
			exec(t, conn, sql)
		}
		pgtest.Exec(t, c, "app", "CREATE SCHEMA "+pgx.Identifier{weird}.Sanitize()+" CREATE TABLE t (id int)")
		run(SQL(Spec{Role: weird, Schemas: []string{"Sales Q1", weird, "absent"}}))
		if got, want := published(t, c), "Sales Q1.bill,Sales Q1.item,"+weird+".t"; got != want {
			t.Errorf("published: %s, want %s", got, want)
		}
		if diff := cmp.Diff([]string{"schema absent does not exist in database app yet: run this script again when it does"}, warnings); diff != "" {
			t.Errorf("warnings (-want +got):\n%s", diff)
		}
		exec(t, connect(t, c, weird, ""), "INSERT INTO public.account VALUES (9); CREATE TABLE duri.x (id int)")
	})
}

// refusal runs the script as a role and gives the error's text.
func refusal(t *testing.T, c *pgcluster.Cluster, db, role string, s Spec) string {
	t.Helper()
	conn, err := pgconn.Connect(t.Context(), c.DSN(db, role))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	_, err = conn.Exec(t.Context(), SQL(s)).ReadAll()
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestScriptRefusesAndLeavesNothing(t *testing.T) {
	onEachMajor(t, func(t *testing.T, c *pgcluster.Cluster) {
		pgtest.Exec(t, c, "app", "CREATE ROLE plain LOGIN; GRANT CONNECT ON DATABASE app TO plain")
		expect := func(got, want string) {
			t.Helper()
			if !strings.Contains(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
		}
		expect(refusal(t, c, "postgres", "", Spec{Database: "app"}), "this script is for database app, this is database postgres")
		expect(refusal(t, c, "app", "plain", Spec{}), "run this script as a superuser, plain is none")
		pgtest.Exec(t, c, "app", "CREATE SCHEMA duri AUTHORIZATION app_owner")
		expect(refusal(t, c, "app", "", Spec{}), "schema duri exists already and belongs to app_owner")
		pgtest.Exec(t, c, "app", "DROP SCHEMA duri; CREATE PUBLICATION duri FOR ALL TABLES")
		expect(refusal(t, c, "app", "", Spec{}), "publication duri exists FOR ALL TABLES")
		if rows := pgtest.Query(t, c, "app", "SELECT FROM pg_roles WHERE rolname = 'duri'"); len(rows) != 0 {
			t.Error("a refused script has made the role")
		}
	})
}

func TestWrongSettingsAreAWarning(t *testing.T) {
	c := pgtest.New(t, pgtest.WithSetting("wal_level", "replica"), pgtest.WithSetting("track_commit_timestamp", "off"))
	var warnings []string
	cfg, err := pgconn.ParseConfig(c.DSN("postgres", ""))
	if err != nil {
		t.Fatal(err)
	}
	cfg.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { warnings = append(warnings, n.Message) }
	conn, err := pgconn.ConnectConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	exec(t, conn, SQL(Spec{}))
	all := strings.Join(warnings, "\n")
	for _, want := range []string{"wal_level is replica, duri needs logical", "track_commit_timestamp is off, duri needs it on"} {
		if !strings.Contains(all, want) {
			t.Errorf("no warning %q in:\n%s", want, all)
		}
	}
}

func TestScriptIsPlainSQLWithEachGrantExplained(t *testing.T) {
	sql := SQL(Spec{Role: "r\nx", Database: "d\nx", Schemas: []string{"s\nx"}})
	depth := 0 // inside of a DO block
	for i, line := range strings.Split(sql, "\n") {
		depth += strings.Count(line, "$duri$")
		if strings.HasPrefix(strings.TrimSpace(line), `\`) {
			t.Errorf("line %d is a psql command: %s", i+1, line)
		}
		if strings.HasPrefix(line, "--") && len(line) > 240 {
			t.Errorf("line %d is too long to read", i+1)
		}
	}
	if depth == 0 || depth%2 != 0 {
		t.Errorf("%d delimiters of DO blocks", depth)
	}
	for _, block := range strings.Split(sql, "\n\n")[2:] {
		if block != "COMMIT;\n" && !strings.HasPrefix(block, "--") && !strings.HasPrefix(block, "DO $duri$\nBEGIN\n  IF current_setting('server_version_num')") {
			t.Errorf("not explained:\n%s", block)
		}
	}
}

func TestDelimiterCannotBeEndedByAName(t *testing.T) {
	for _, name := range []string{"$duri$", "$duri$ $durix$", "x"} {
		s := Spec{Role: name}
		if got := tag(s); strings.Contains(name, got) {
			t.Errorf("delimiter %s for name %s", got, name)
		}
	}
	if got := literal(`a'b\`) + " " + identifier(`a"b`); got != `E'a''b\\' "a""b"` {
		t.Errorf("quoted: %s", got)
	}
}

// TestVerifiersAreForTheAgentOnly: what the gateway checks passwords against, it gets for roles that may log in, and
// nobody else gets it. Without the gateway the function is not made.
func TestVerifiersAreForTheAgentOnly(t *testing.T) {
	onEachMajor(t, func(t *testing.T, c *pgcluster.Cluster) {
		pgtest.Exec(t, c, "app", SQL(Spec{}))
		if n := pgtest.Query(t, c, "app", "SELECT count(*) FROM pg_proc WHERE proname = 'verifier'")[0][0]; n != "0" {
			t.Error("the function is there without having been asked for")
		}
		pgtest.Exec(t, c, "app", `CREATE ROLE good LOGIN PASSWORD 'x'; CREATE ROLE nologin PASSWORD 'x'; CREATE ROLE nopass LOGIN;
			CREATE ROLE past LOGIN PASSWORD 'x' VALID UNTIL '2020-01-01'; CREATE ROLE future LOGIN PASSWORD 'x' VALID UNTIL '2120-01-01';
			SET password_encryption = md5; CREATE ROLE old LOGIN PASSWORD 'x'`)
		// The owner of the schema cannot leave a function of its own there.
		agent := connect(t, c, "duri", "")
		exec(t, agent, "CREATE FUNCTION duri.verifier(name) RETURNS text LANGUAGE sql AS 'SELECT NULL'; SELECT 1")
		for range 2 {
			pgtest.Exec(t, c, "app", SQL(Spec{Gateway: true}))
		}
		for role, want := range map[string]bool{"good": true, "future": true, "nologin": false, "nopass": false, "past": false, "old": false, "nobody": false} {
			res := agent.ExecParams(t.Context(), "SELECT duri.verifier($1)", [][]byte{[]byte(role)}, nil, nil, nil).Read()
			if res.Err != nil {
				t.Fatal(res.Err)
			}
			if got := string(res.Rows[0][0]); strings.HasPrefix(got, "SCRAM-SHA-256$") != want {
				t.Errorf("%s: %q", role, got)
			}
		}
		pgtest.Exec(t, c, "app", "GRANT CONNECT ON DATABASE app TO good; GRANT USAGE ON SCHEMA duri TO good")
		other := connect(t, c, "good", "")
		if _, err := other.Exec(t.Context(), "SELECT duri.verifier('good')").ReadAll(); err == nil || !strings.Contains(err.Error(), "42501") {
			t.Errorf("another role may read verifiers: %v", err)
		}
	})
}
