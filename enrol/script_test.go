package enrol

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestCleanRemovesOnlyPsqlCommandsAtTopLevel(t *testing.T) {
	const in = `--
\restrict abc'def
SET statement_timeout = 0;
SET transaction_timeout = 0;
SELECT pg_catalog.set_config('search_path', '', false);
CREATE SCHEMA "a b";
CREATE SCHEMA IF NOT EXISTS c;
CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $_$
\not psql
CREATE SCHEMA inside;
SET transaction_timeout = 1;
$x$
$_$;
CREATE FUNCTION g() RETURNS text LANGUAGE sql AS 'it''s
\not psql
$$';
/* comment /* nested
\not psql */
\not psql */
COMMENT ON TABLE "quo""te
\not psql" IS E'back\'slash
\\not psql';
CREATE VIEW v AS SELECT a$b, $1, e'\\', 'x\';
\connect other
GRANT ALL ON FUNCTION pg_catalog.pg_logical_emit_message(boolean, text, text) TO duri;
REVOKE ALL ON TABLE pg_catalog.pg_proc FROM PUBLIC;
GRANT ALL ON SCHEMA pg_catalog TO duri;
GRANT SELECT ON TABLE public."on SCHEMA pg_catalog.x" TO "duri";
ALTER DEFAULT PRIVILEGES FOR ROLE postgres IN SCHEMA public GRANT TRUNCATE ON TABLES  TO duri;
ALTER DEFAULT PRIVILEGES FOR ROLE postgres IN SCHEMA public GRANT TRUNCATE ON TABLES  TO app_duri;
CREATE VIEW naïve AS SELECT 'E' 'x\' AS "q$$";
\unrestrict abc
`
	const want = `--
SET statement_timeout = 0;
SELECT pg_catalog.set_config('search_path', '', false);
CREATE SCHEMA IF NOT EXISTS "a b";
CREATE SCHEMA IF NOT EXISTS c;
CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $_$
\not psql
CREATE SCHEMA inside;
SET transaction_timeout = 1;
$x$
$_$;
CREATE FUNCTION g() RETURNS text LANGUAGE sql AS 'it''s
\not psql
$$';
/* comment /* nested
\not psql */
\not psql */
COMMENT ON TABLE "quo""te
\not psql" IS E'back\'slash
\\not psql';
CREATE VIEW v AS SELECT a$b, $1, e'\\', 'x\';
GRANT SELECT ON TABLE public."on SCHEMA pg_catalog.x" TO "duri";
ALTER DEFAULT PRIVILEGES FOR ROLE postgres IN SCHEMA public GRANT TRUNCATE ON TABLES  TO app_duri;
CREATE VIEW naïve AS SELECT 'E' 'x\' AS "q$$";
`
	f := filter{known: func(p string) bool { return p != "transaction_timeout" }, role: "duri"}
	if d := cmp.Diff(want, f.clean(in)); d != "" {
		t.Error(d)
	}
	for _, sql := range []string{"SET transaction_timeout = 0;\n", "ALTER DEFAULT PRIVILEGES IN SCHEMA a GRANT ALL ON TABLES TO duri;\n"} {
		if got := (filter{}).clean(sql); got != sql {
			t.Errorf("%q became %q though nothing is known of the server", sql, got)
		}
	}
}

// TestCleanLeavesQuotedTextAlone wraps text in each kind of quotes and expects it back unchanged, and the line behind
// it removed.
func TestCleanLeavesQuotedTextAlone(t *testing.T) {
	pieces := []string{"\n", `\`, "'", `"`, "$", "$$", "$q$", "/*", "*/", "--", "E", "e'", "x", "1", "_", "é", "CREATE SCHEMA s;", "SET a = 1;", " "}
	rapid.Check(t, func(t *rapid.T) {
		text := strings.Join(rapid.SliceOf(rapid.SampledFrom(pieces)).Draw(t, "text"), "")
		forms := []string{
			"SELECT '" + strings.ReplaceAll(text, "'", "''") + "';\n",
			"SELECT E'" + strings.NewReplacer("'", "''", `\`, `\\`).Replace(text) + "';\n",
			`SELECT "` + strings.ReplaceAll(text, `"`, `""`) + "\";\n",
			"/* " + strings.NewReplacer("/*", "", "*/", "", "*", "", "/", "").Replace(text) + " */\n",
			"-- " + strings.ReplaceAll(text, "\n", "") + "\n",
		}
		if !strings.Contains(text+"$", "$never$") {
			forms = append(forms, "SELECT $never$"+text+"$never$;\n")
		}
		for _, sql := range forms {
			if got := (filter{known: func(string) bool { return false }}).clean(sql + "\\psql\nSELECT 1;\n"); got != sql+"SELECT 1;\n" {
				t.Fatalf("clean(%q) = %q", sql, got)
			}
		}
	})
}
