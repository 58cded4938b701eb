// Package grants writes the SQL that a DBA runs once, as superuser, in each replicated database, so that the agent
// can work with a role that is no superuser (replication.md section 7).
//
// The script is plain SQL for PostgreSQL 15 and later, one transaction, and may be run again: it adds what is
// missing and takes nothing away. It sets no password. The package connects nowhere.
package grants

import (
	"slices"
	"strings"
	"text/template"
)

// Names of what the script makes in a database.
const (
	DefaultRole = "duri"
	Schema      = "duri" // duri's own tables
	Publication = "duri" // what the agent decodes
)

// Spec says for whom and for what.
type Spec struct {
	Role     string   // run-time role; empty: DefaultRole
	Database string   // the script refuses to run elsewhere; empty: whatever it is run in
	Schemas  []string // schemas to publish; empty: all user schemas
	Gateway  bool     // the agent authenticates clients (gateway.mode)
}

// SQL gives the script.
func SQL(s Spec) string {
	if s.Role == "" {
		s.Role = DefaultRole
	}
	var b strings.Builder
	if err := script.Execute(&b, page{Spec: s, Tag: tag(s)}); err != nil {
		panic(err) // the template and its data are ours: every test would see it
	}
	return b.String()
}

// page is what the template sees.
type page struct {
	Spec
	Tag string // delimiter of the DO blocks
}

// tag gives a dollar quote that no name of the spec can end.
func tag(s Spec) string {
	names := strings.Join(append(slices.Clone(s.Schemas), s.Role, s.Database), " ")
	t := "$duri$"
	for strings.Contains(names, t) {
		t = t[:len(t)-1] + "x$"
	}
	return t
}

// comment makes a name safe behind "--".
func comment(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
}

// literal quotes an SQL string. The E form is needed for backslashes only when standard_conforming_strings is off,
// and right in both cases.
func literal(s string) string {
	s = strings.ReplaceAll(s, "\x00", "")
	q := "'" + strings.ReplaceAll(s, "'", "''") + "'"
	if strings.Contains(s, `\`) {
		return "E" + strings.ReplaceAll(q, `\`, `\\`)
	}
	return q
}

// identifier quotes an SQL name.
func identifier(s string) string {
	return `"` + strings.ReplaceAll(strings.ReplaceAll(s, "\x00", ""), `"`, `""`) + `"`
}

var script = template.Must(template.New("grants").Funcs(template.FuncMap{
	"lit": literal, "id": identifier, "comment": comment,
	"literals": func(all []string) string {
		quoted := make([]string, len(all))
		for i, s := range all {
			quoted[i] = literal(s)
		}
		return strings.Join(quoted, ", ")
	},
}).Parse(`-- What duri's agent needs in a replicated database, for PostgreSQL 15 and later.
-- Run it as superuser in {{if .Database}}database {{comment .Database}}{{else}}EACH replicated database{{end}}, at every site:  psql -d {{if .Database}}{{comment .Database}}{{else}}DATABASE{{end}} -f grants.sql
-- It is one transaction, can be run again (after a schema was added, for example), and takes nothing away.

BEGIN;

DO {{.Tag}}
BEGIN
  IF current_setting('server_version_num')::int < 150000 THEN
    RAISE EXCEPTION 'duri needs PostgreSQL 15 or later, this server is %', current_setting('server_version');
  END IF;
{{- if .Database}}
  IF current_database() <> {{lit .Database}} THEN
    RAISE EXCEPTION 'this script is for database %, this is database %', {{lit .Database}}, current_database();
  END IF;
{{- end}}
  IF NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
    RAISE EXCEPTION 'run this script as a superuser, % is none', current_user;
  END IF;
END
{{.Tag}};

-- The role that the agent runs as. It is no superuser. REPLICATION: make and read its logical slot. BYPASSRLS: copy
-- and apply all rows of tables with row-level security. It has no password yet: set one with \password in psql, or
-- let pg_hba.conf admit it by certificate or peer.
DO {{.Tag}}
BEGIN
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {{lit .Role}}) THEN
    CREATE ROLE {{id .Role}};
  END IF;
END
{{.Tag}};
ALTER ROLE {{id .Role}} LOGIN INHERIT REPLICATION BYPASSRLS;

-- This database. CONNECT: work in it. CREATE: make schemas that are copied from another site. TEMP: staging tables
-- of large batches.
DO {{.Tag}}
BEGIN
  EXECUTE format('GRANT CONNECT, CREATE, TEMPORARY ON DATABASE %I TO %I', current_database(), {{lit .Role}});
END
{{.Tag}};

-- pg_monitor: see lag, slots, and who blocks apply. pg_read_all_data: copy and compare tables.
-- pg_write_all_data: apply the other sites' changes (INSERT, UPDATE, DELETE). pg_signal_backend: at a site that the
-- register has left out, end sessions whose COMMIT waits for the other sites, as they keep their rows locked.
GRANT pg_monitor, pg_read_all_data, pg_write_all_data, pg_signal_backend TO {{id .Role}};

-- Replication origins: give an applied row the origin and the commit time it had at its own site, and remember how far
-- each other site has been applied, in the same transaction as the rows. pg_logical_emit_message: heartbeats and marks
-- in the WAL. (By name, as the arguments differ between PostgreSQL versions.)
DO {{.Tag}}
DECLARE
  f regprocedure;
BEGIN
  FOR f IN
    SELECT oid::regprocedure FROM pg_catalog.pg_proc
    WHERE pronamespace = 'pg_catalog'::regnamespace
      AND proname IN (
        'pg_replication_origin_create', 'pg_replication_origin_drop', 'pg_replication_origin_oid',
        'pg_replication_origin_session_setup', 'pg_replication_origin_session_reset',
        'pg_replication_origin_session_is_setup', 'pg_replication_origin_session_progress',
        'pg_replication_origin_xact_setup', 'pg_replication_origin_xact_reset',
        'pg_replication_origin_advance', 'pg_replication_origin_progress',
        'pg_show_replication_origin_status', 'pg_logical_emit_message')
    ORDER BY 1
  LOOP
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', f, {{lit .Role}});
  END LOOP;
END
{{.Tag}};

-- session_replication_role: apply without firing triggers and foreign keys a second time.
-- deadlock_timeout: find out sooner that a client and apply wait for each other.
GRANT SET ON PARAMETER session_replication_role, deadlock_timeout TO {{id .Role}};

-- duri's own tables: progress, conflicts, tombstones.
DO {{.Tag}}
DECLARE
  owner name := (SELECT pg_catalog.pg_get_userbyid(nspowner) FROM pg_catalog.pg_namespace WHERE nspname = 'duri');
BEGIN
  IF owner <> {{lit .Role}} THEN
    RAISE EXCEPTION 'schema duri exists already and belongs to %: duri needs this name for itself', owner;
  END IF;
END
{{.Tag}};
CREATE SCHEMA IF NOT EXISTS duri AUTHORIZATION {{id .Role}};
{{- if .Gateway}}

-- The agent is the way of clients and authenticates them (gateway.mode session or transaction): this function gives it
-- the SCRAM verifier of a role that may log in now. No password follows from a verifier but by guessing, and the agent
-- logs in at the server with what the client proves. Nobody else may call it.
DROP FUNCTION IF EXISTS duri.verifier(name); -- made anew, so that nobody else owns it
CREATE FUNCTION duri.verifier(wanted name) RETURNS text
LANGUAGE sql STABLE STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS {{.Tag}}
  SELECT rolpassword FROM pg_catalog.pg_authid
  WHERE rolname = wanted AND rolcanlogin AND (rolvaliduntil IS NULL OR rolvaliduntil > pg_catalog.now())
    AND rolpassword LIKE 'SCRAM-SHA-256$%'
{{.Tag}};
REVOKE ALL ON FUNCTION duri.verifier(name) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION duri.verifier(name) TO {{id .Role}};
{{- end}}

-- What is replicated: the tables, present and future, of {{if .Schemas}}the schemas named here{{else}}all user schemas (not those of extensions){{end}}. Making a
-- publication for whole schemas takes a superuser; that is why it is done here and not by the agent.
-- TRUNCATE is in none of the predefined roles: it is granted for the tables that exist, and for those that their
-- owners will make.
DO {{.Tag}}
DECLARE
  wanted name;
  owner name;
BEGIN
  IF EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = 'duri' AND puballtables) THEN
    RAISE EXCEPTION 'publication duri exists FOR ALL TABLES, which includes duri''s own: drop it and run this script again';
  END IF;
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = 'duri') THEN
    CREATE PUBLICATION duri;
  END IF;
{{- if .Schemas}}
  FOREACH wanted IN ARRAY ARRAY[{{literals .Schemas}}]::name[]
  LOOP
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = wanted) THEN
      RAISE WARNING 'schema % does not exist in database % yet: run this script again when it does', wanted, current_database();
      CONTINUE;
    END IF;
{{- else}}
  FOR wanted IN
    SELECT nspname FROM pg_catalog.pg_namespace n
    WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'duri')
      AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_depend
        WHERE classid = 'pg_catalog.pg_namespace'::regclass AND objid = n.oid AND deptype = 'e')
    ORDER BY nspname
  LOOP
{{- end}}
    IF NOT EXISTS (
      SELECT FROM pg_catalog.pg_publication_namespace
      JOIN pg_catalog.pg_publication p ON p.oid = pnpubid
      JOIN pg_catalog.pg_namespace n ON n.oid = pnnspid
      WHERE pubname = 'duri' AND nspname = wanted)
    THEN
      EXECUTE format('ALTER PUBLICATION duri ADD TABLES IN SCHEMA %I', wanted);
    END IF;
    EXECUTE format('GRANT TRUNCATE ON ALL TABLES IN SCHEMA %I TO %I', wanted, {{lit .Role}});
    FOR owner IN
      SELECT pg_catalog.pg_get_userbyid(relowner)
      FROM pg_catalog.pg_class JOIN pg_catalog.pg_namespace n ON n.oid = relnamespace
      WHERE nspname = wanted AND relkind IN ('r', 'p')
      UNION SELECT pg_catalog.pg_get_userbyid(nspowner) FROM pg_catalog.pg_namespace
      WHERE nspname = wanted AND nspowner <> 'pg_database_owner'::regrole
      UNION SELECT pg_catalog.pg_get_userbyid(datdba) FROM pg_catalog.pg_database WHERE datname = current_database()
    LOOP
      EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE %I IN SCHEMA %I GRANT TRUNCATE ON TABLES TO %I', owner, wanted, {{lit .Role}});
    END LOOP;
  END LOOP;
END
{{.Tag}};

-- Settings of the server that duri needs and that only take effect with a restart.
DO {{.Tag}}
BEGIN
  IF current_setting('wal_level') <> 'logical' THEN
    RAISE WARNING 'wal_level is %, duri needs logical: ALTER SYSTEM SET wal_level = logical, then restart', current_setting('wal_level');
  END IF;
  IF current_setting('track_commit_timestamp') <> 'on' THEN
    RAISE WARNING 'track_commit_timestamp is off, duri needs it on: ALTER SYSTEM SET track_commit_timestamp = on, then restart';
  END IF;
END
{{.Tag}};

COMMIT;
`))
