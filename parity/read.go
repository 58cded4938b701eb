package parity

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

// results are the settings of a server that change what statements give or may do.
var results = strings.Fields(`default_transaction_isolation default_transaction_read_only default_transaction_deferrable DateStyle IntervalStyle TimeZone
	timezone_abbreviations search_path lc_monetary lc_numeric lc_time bytea_output extra_float_digits xmlbinary xmloption standard_conforming_strings
	default_text_search_config backslash_quote array_nulls quote_all_identifiers transform_null_equals row_security
	session_replication_role integer_datetimes role`)

// Spec says what is to be read.
type Spec struct {
	Site string
	Role string // the agent's own, which is left out
}

// Read reads the facts of the database that c is connected to, as the run-time role or a superuser. The connection should have set no
// parameters (see Connect): what it has set hides what the server gives to others. Verifiers are read by the function
// that duri grants --gateway makes; without it, and without being a superuser, they are in Unread.
func Read(ctx context.Context, c *pgconn.PgConn, spec Spec) (Facts, error) {
	f := Facts{Site: spec.Site, Unread: map[string]string{}}
	version, err := pg.ServerVersion(ctx, c)
	if err != nil {
		return f, fmt.Errorf("read the server's version: %w", err)
	}
	f.Major = version / 10000
	for _, step := range []struct {
		what string
		read func(context.Context, *pgconn.PgConn, Spec, *Facts) error
	}{
		{"the database", readDatabase},
		{"collations", readCollations},
		{"extensions", readExtensions},
		{"settings", readSettings},
		{"roles", readRoles},
		{"verifiers", readVerifiers},
		{"types", readTypes},
	} {
		if err := step.read(ctx, c, spec, &f); err != nil {
			return f, fmt.Errorf("read %s: %w", step.what, err)
		}
	}
	return f, nil
}

// Connect opens a connection that sets no parameters, for Read.
func Connect(ctx context.Context, dsn, database string) (*pgconn.PgConn, error) {
	c, err := pg.Config(dsn, database, nil)
	if err != nil {
		return nil, err
	}
	c.RuntimeParams = map[string]string{"application_name": "duri parity"}
	return pgconn.ConnectConfig(ctx, c)
}

// localeColumns are where pg_database has the provider's locale.
func localeColumns(major int) string {
	switch {
	case major >= 17:
		return "datlocale"
	case major >= 15:
		return "daticulocale"
	}
	return "NULL::text"
}

func readDatabase(ctx context.Context, c *pgconn.PgConn, _ Spec, f *Facts) error {
	rows, err := pg.Rows(ctx, c, `SELECT datname, pg_catalog.pg_encoding_to_char(encoding), CASE datlocprovider WHEN 'c' THEN 'libc' WHEN 'i' THEN 'icu'
		WHEN 'b' THEN 'builtin' ELSE datlocprovider::text END, datcollate, datctype, coalesce(`+localeColumns(f.Major)+`, ''),
		EXISTS (SELECT FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = 'duri' AND p.proname = 'mark')
		FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()`)
	if err != nil {
		return err
	}
	r := rows[0]
	f.Database, f.Encoding, f.Provider, f.Collate, f.Ctype, f.Locale, f.Mark = r[0], r[1], r[2], r[3], r[4], r[5], r[6] == "t"
	return nil
}

func readCollations(ctx context.Context, c *pgconn.PgConn, _ Spec, f *Facts) error {
	rows, err := pg.Rows(ctx, c, `SELECT 'default', coalesce(pg_catalog.pg_database_collation_actual_version(oid), 'none') FROM pg_catalog.pg_database
		WHERE datname = pg_catalog.current_database()
		UNION ALL SELECT DISTINCT n.nspname || '.' || x.collname, coalesce(pg_catalog.pg_collation_actual_version(x.oid), 'none')
		FROM pg_catalog.pg_collation x JOIN pg_catalog.pg_namespace n ON n.oid = x.collnamespace
		WHERE x.collname <> 'default' AND EXISTS (SELECT FROM pg_catalog.pg_attribute a WHERE a.attcollation = x.oid AND a.attrelid >= 16384)`)
	f.Collations = pairs(rows)
	return err
}

// pairs makes a map of rows with two columns.
func pairs(rows [][]string) map[string]string {
	m := map[string]string{}
	for _, r := range rows {
		m[r[0]] = r[1]
	}
	return m
}

func readExtensions(ctx context.Context, c *pgconn.PgConn, _ Spec, f *Facts) error {
	rows, err := pg.Rows(ctx, c, "SELECT extname, extversion FROM pg_catalog.pg_extension")
	f.Extensions = pairs(rows)
	return err
}

func readSettings(ctx context.Context, c *pgconn.PgConn, spec Spec, f *Facts) error {
	// What the agent's connection has set for itself hides what the server would give to others.
	rows, err := pg.Rows(ctx, c, `SELECT name, setting FROM pg_catalog.pg_settings
		WHERE source NOT IN ('session', 'client', 'user', 'database user', 'database', 'global')`)
	if err != nil {
		return err
	}
	f.Settings = map[string]string{}
	for name, value := range pairs(rows) {
		if slices.Contains(results, name) || slices.Contains(bounds, name) {
			f.Settings[name] = value
		}
	}
	rows, err = pg.Rows(ctx, c, `SELECT s.setdatabase = 0, coalesce(r.rolname, ''), c FROM pg_catalog.pg_db_role_setting s
		LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole CROSS JOIN unnest(s.setconfig) c
		WHERE s.setdatabase IN (0, (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))
		ORDER BY s.setdatabase <> 0`) // those of the role in this database win over those of the role
	if err != nil {
		return err
	}
	f.Defaults, f.RoleDefaults = map[string]string{}, map[string]map[string]string{}
	for _, r := range rows {
		name, value, ok := strings.Cut(r[2], "=")
		switch {
		case !ok || r[1] == spec.Role && spec.Role != "":
		case r[1] == "":
			f.Defaults[name] = value
		default:
			if f.RoleDefaults[r[1]] == nil {
				f.RoleDefaults[r[1]] = map[string]string{}
			}
			f.RoleDefaults[r[1]][name] = value
		}
	}
	return nil
}

func readRoles(ctx context.Context, c *pgconn.PgConn, spec Spec, f *Facts) error {
	rows, err := pg.Query(ctx, c, `SELECT rolname, pg_catalog.concat_ws(' ', CASE WHEN rolsuper THEN 'superuser' END, CASE WHEN NOT rolinherit THEN 'noinherit' END,
		CASE WHEN rolcreaterole THEN 'createrole' END, CASE WHEN rolcreatedb THEN 'createdb' END, CASE WHEN rolreplication THEN 'replication' END,
		CASE WHEN rolbypassrls THEN 'bypassrls' END),
		(WITH RECURSIVE up(oid) AS (SELECT roleid FROM pg_catalog.pg_auth_members WHERE member = r.oid
			UNION SELECT m.roleid FROM pg_catalog.pg_auth_members m JOIN up ON m.member = up.oid)
		 SELECT coalesce(pg_catalog.string_agg(g.rolname, E'\n' ORDER BY g.rolname COLLATE "C"), '') FROM up JOIN pg_catalog.pg_roles g USING (oid))
		FROM pg_catalog.pg_roles r WHERE rolcanlogin AND rolname <> $1`, spec.Role)
	f.Roles = map[string]Role{}
	for _, r := range rows {
		role := Role{Attributes: strings.Fields(r[1]), Member: []string{}}
		if r[2] != "" {
			role.Member = strings.Split(r[2], "\n")
		}
		f.Roles[r[0]] = role
	}
	return err
}

func readVerifiers(ctx context.Context, c *pgconn.PgConn, spec Spec, f *Facts) error {
	rows, err := pg.Query(ctx, c, `SELECT rolname, coalesce(rolpassword, '') FROM pg_catalog.pg_authid WHERE rolcanlogin AND rolname <> $1
		AND rolpassword LIKE 'SCRAM-SHA-256$%' AND (rolvaliduntil IS NULL OR rolvaliduntil > pg_catalog.now())`, spec.Role)
	if denied(err) {
		rows, err = pg.Query(ctx, c, "SELECT rolname, coalesce(duri.verifier(rolname), '') FROM pg_catalog.pg_roles WHERE rolcanlogin AND rolname <> $1", spec.Role)
		if denied(err) {
			f.Unread["verifiers"] = "run `duri grants --gateway` and its SQL as superuser"
			return nil
		}
	}
	if err != nil {
		return err
	}
	for _, r := range rows {
		if role, ok := f.Roles[r[0]]; ok && r[1] != "" {
			sum := sha256.Sum256([]byte(r[1]))
			role.Verifier = hex.EncodeToString(sum[:])
			f.Roles[r[0]] = role
		}
	}
	return nil
}

// denied reports that the role lacks a right, or the function or its schema is not there.
func denied(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && slices.Contains([]string{"42501", "42883", "3F000"}, e.Code)
}

// readTypes leaves out the types of tables and their arrays: they appear in results only where a whole row is asked for.
func readTypes(ctx context.Context, c *pgconn.PgConn, _ Spec, f *Facts) error {
	rows, err := pg.Rows(ctx, c, `SELECT n.nspname || '.' || t.typname, t.oid FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
		LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem AND t.typcategory = 'A'
		LEFT JOIN pg_catalog.pg_class c ON c.oid = coalesce(nullif(t.typrelid, 0), nullif(e.typrelid, 0))
		WHERE t.oid >= 16384 AND n.nspname NOT LIKE 'pg\_temp\_%' AND n.nspname NOT LIKE 'pg\_toast%' AND n.nspname <> 'duri'
		AND (c.oid IS NULL OR c.relkind = 'c')`)
	f.Types = map[string]uint32{}
	for _, r := range rows {
		oid, perr := strconv.ParseUint(r[1], 10, 32)
		if perr != nil {
			return perr
		}
		f.Types[r[0]] = uint32(oid)
	}
	return err
}
