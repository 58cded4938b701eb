package catalog

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

//go:embed migrations/*.sql
var embedded embed.FS

// migration is one numbered step of the schema's history. Once released it never changes.
type migration struct {
	version  int
	name     string // file name without number and suffix
	checksum string // of the file, in hexadecimal
	sql      string
}

// applied is a row of duri.migration.
type applied struct {
	version        int
	name, checksum string
}

// lockKey is the advisory lock that keeps two agents from migrating one database at once: "duri" in ASCII.
const lockKey = "1685418601"

const historySQL = `CREATE TABLE IF NOT EXISTS duri.migration (
	version  int4 PRIMARY KEY,
	name     text NOT NULL,
	checksum text NOT NULL,
	at       timestamptz NOT NULL DEFAULT pg_catalog.now()
)`

// Migrate brings schema duri to this program's version: it runs, each in a transaction of its own, the migrations that
// the database has not had. It waits while another agent migrates (advisory lock), and may be called at every start.
//
// A database that has had a migration that this program does not know, or knows with another content, gives an *Error
// and is left alone. On any error the migrations before the failing one stay.
func Migrate(ctx context.Context, c *pgconn.PgConn) error {
	known, err := readMigrations(embedded, "migrations")
	if err != nil {
		return err
	}
	return migrate(ctx, c, known)
}

func migrate(ctx context.Context, c *pgconn.PgConn, known []migration) (err error) {
	if err := checkSchema(ctx, c); err != nil {
		return err
	}
	if _, err := pg.Rows(ctx, c, "SELECT pg_catalog.pg_advisory_lock("+lockKey+")"); err != nil {
		return fmt.Errorf("lock schema duri for migration: %w", err)
	}
	defer func() {
		// A closed connection has given the lock back already.
		if !c.IsClosed() {
			_, uerr := pg.Rows(context.WithoutCancel(ctx), c, "SELECT pg_catalog.pg_advisory_unlock("+lockKey+")")
			err = errors.Join(err, uerr)
		}
	}()
	had, err := history(ctx, c)
	if err != nil {
		return err
	}
	pending, err := plan(known, had)
	if err != nil {
		return err
	}
	for _, m := range pending {
		if err := run(ctx, c, m); err != nil {
			return err
		}
	}
	return nil
}

// checkSchema tells a database that was never prepared from one that was.
func checkSchema(ctx context.Context, c *pgconn.PgConn) error {
	rows, err := pg.Rows(ctx, c, `SELECT pg_catalog.pg_get_userbyid(nspowner), current_user,
		pg_catalog.has_schema_privilege(oid, 'CREATE') FROM pg_catalog.pg_namespace WHERE nspname = 'duri'`)
	const op, hint = "prepare duri's own tables", "run the SQL that `duri grants` prints as superuser in this database"
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", op, err)
	case len(rows) == 0:
		return &Error{op, "schema duri does not exist in this database", hint}
	case rows[0][2] != "t":
		return &Error{op, fmt.Sprintf("schema duri belongs to %s, and %s may not create tables in it", rows[0][0], rows[0][1]), hint}
	}
	return nil
}

// history reads which migrations the database has had, oldest first.
func history(ctx context.Context, c *pgconn.PgConn) ([]applied, error) {
	if err := quiet(ctx, c, historySQL); err != nil {
		return nil, fmt.Errorf("create duri.migration: %w", err)
	}
	rows, err := pg.Rows(ctx, c, "SELECT version, name, checksum FROM duri.migration ORDER BY version")
	if err != nil {
		return nil, fmt.Errorf("read duri.migration: %w", err)
	}
	had := make([]applied, len(rows))
	for i, r := range rows {
		n, err := strconv.Atoi(r[0])
		if err != nil {
			return nil, fmt.Errorf("read duri.migration: %w", err)
		}
		had[i] = applied{n, r[1], r[2]}
	}
	return had, nil
}

// quiet runs SQL in a transaction without the notices of IF NOT EXISTS.
func quiet(ctx context.Context, c *pgconn.PgConn, sql string) error {
	return transact(ctx, c, "SET LOCAL client_min_messages = warning;"+sql)
}

// transact runs SQL as one transaction, which is rolled back on an error.
func transact(ctx context.Context, c *pgconn.PgConn, sql string) error {
	_, err := pg.Rows(ctx, c, "BEGIN;"+sql+";COMMIT")
	if err != nil && !c.IsClosed() {
		_, rerr := pg.Rows(context.WithoutCancel(ctx), c, "ROLLBACK")
		err = errors.Join(err, rerr)
	}
	return err
}

// plan chooses the migrations to run. It is pure.
func plan(known []migration, had []applied) ([]migration, error) {
	const op = "prepare duri's own tables"
	for i, a := range had {
		if i >= len(known) {
			return nil, &Error{
				op, fmt.Sprintf("schema duri is at version %d (%s), this program knows versions up to %d", a.version, a.name, len(known)),
				"a newer duri has run here: start this site with that version or a later one",
			}
		}
		m := known[i]
		switch {
		case a.version != m.version:
			return nil, &Error{
				op, fmt.Sprintf("duri.migration lacks version %d and has %d (%s)", m.version, a.version, a.name),
				"somebody changed duri.migration: restore the schema from a backup, or drop schema duri and join again",
			}
		case a.checksum != m.checksum:
			return nil, &Error{
				op, fmt.Sprintf("version %d (%s) was made by other statements than this program's", a.version, a.name),
				"this duri is not a released version, or duri.migration was edited: use the duri that was here before",
			}
		}
	}
	return known[len(had):], nil
}

// run runs one migration and records it, in one transaction.
func run(ctx context.Context, c *pgconn.PgConn, m migration) error {
	err := quiet(ctx, c, fmt.Sprintf("SET LOCAL search_path = pg_catalog, pg_temp;%s\n;INSERT INTO duri.migration (version, name, checksum) VALUES (%d, %s, %s)",
		m.sql, m.version, pg.QuoteLiteral(m.name), pg.QuoteLiteral(m.checksum)))
	if err != nil {
		return fmt.Errorf("run migration %d (%s) of schema duri: %w", m.version, m.name, err)
	}
	return nil
}

// readMigrations reads NNNN_name.sql files; their numbers are 1, 2, 3 and so on.
func readMigrations(files fs.FS, dir string) ([]migration, error) {
	entries, err := fs.ReadDir(files, dir) // sorted by name
	if err != nil {
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	var out []migration
	for _, e := range entries {
		number, name, ok := strings.Cut(strings.TrimSuffix(e.Name(), ".sql"), "_")
		n, err := strconv.Atoi(number)
		if !ok || err != nil || n != len(out)+1 {
			return nil, fmt.Errorf("read migrations: %s should be number %d", e.Name(), len(out)+1)
		}
		sql, err := fs.ReadFile(files, dir+"/"+e.Name())
		if err != nil {
			return nil, fmt.Errorf("read migrations: %w", err)
		}
		sum := sha256.Sum256(sql)
		out = append(out, migration{n, name, hex.EncodeToString(sum[:]), string(sql)})
	}
	return out, nil
}
