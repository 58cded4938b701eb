// Package pg opens PostgreSQL connections the way duri needs them: every session fixes the settings that values'
// text forms depend on (replication.md rule 21), so the same value is the same bytes at every site and in every
// session. It knows nothing of replication.
package pg

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// WireSettings are the settings of rule 21. The journal's header records them.
func WireSettings() map[string]string {
	return map[string]string{
		"DateStyle":          "ISO, YMD",
		"IntervalStyle":      "postgres",
		"extra_float_digits": "3",
		"bytea_output":       "hex",
		"client_encoding":    "UTF8",
		"TimeZone":           "UTC",
		"lc_monetary":        "C",
		"xmloption":          "content",
	}
}

// Config parses dsn (keyword or URL form; libpq's environment, service file and pgpass apply), names the database
// when it is not empty, and adds the wire settings, then extra. Neither is part of the DSN, so that no DSN can
// disturb fidelity.
func Config(dsn, database string, extra map[string]string) (*pgconn.Config, error) {
	c, err := pgconn.ParseConfig(dsn)
	if err != nil {
		return nil, err
	}
	if database != "" {
		c.Database = database
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 5 * time.Second
	}
	maps.Copy(c.RuntimeParams, WireSettings())
	maps.Copy(c.RuntimeParams, extra)
	return c, nil
}

// Connect opens one connection. The caller closes it.
func Connect(ctx context.Context, dsn, database string, extra map[string]string) (*pgconn.PgConn, error) {
	c, err := Config(dsn, database, extra)
	if err != nil {
		return nil, err
	}
	return pgconn.ConnectConfig(ctx, c)
}

// Rows runs SQL without parameters and returns the text of the last result's rows; NULL is the empty string.
func Rows(ctx context.Context, c *pgconn.PgConn, sql string) ([][]string, error) {
	results, err := c.Exec(ctx, sql).ReadAll()
	if err != nil {
		return nil, err
	}
	if len(results) == 0 {
		return nil, nil
	}
	return texts(results[len(results)-1]), nil
}

// Query runs SQL with text parameters ($1...) and returns the rows as text; NULL is the empty string.
func Query(ctx context.Context, c *pgconn.PgConn, sql string, args ...string) ([][]string, error) {
	params := make([][]byte, len(args))
	for i, a := range args {
		params[i] = []byte(a)
	}
	res := c.ExecParams(ctx, sql, params, nil, nil, nil).Read()
	if res.Err != nil {
		return nil, res.Err
	}
	return texts(res), nil
}

func texts(r *pgconn.Result) [][]string {
	out := make([][]string, len(r.Rows))
	for i, row := range r.Rows {
		out[i] = make([]string, len(row))
		for j, v := range row {
			out[i][j] = string(v)
		}
	}
	return out
}

// Close ends a connection politely within a second.
func Close(c *pgconn.PgConn) {
	if c == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = c.Close(ctx) // nothing can be done about a connection that does not close
}

// SQLState returns the SQLSTATE of a server error in err's chain, or "".
func SQLState(err error) string {
	if pe, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pe.Code
	}
	return ""
}

// IsConnectionError reports that err speaks of the connection or the server's life, not of the statement: such an
// error is retried and never blamed on a transaction (rule 17).
func IsConnectionError(err error) bool {
	if err == nil {
		return false
	}
	switch code := SQLState(err); {
	case strings.HasPrefix(code, "08"), strings.HasPrefix(code, "57P"), code == "53300":
		return true
	case code != "":
		return false
	}
	var ne net.Error
	var ce *pgconn.ConnectError
	return errors.As(err, &ce) || errors.As(err, &ne) || pgconn.Timeout(err) || errors.Is(err, net.ErrClosed) ||
		strings.Contains(err.Error(), "conn closed") || strings.Contains(err.Error(), "unexpected EOF") ||
		strings.Contains(err.Error(), "conn busy")
}

// Hint returns the one-sentence advice for a server or connection error, or "".
func Hint(err error) string {
	switch SQLState(err) {
	case "28P01", "28000":
		return "check user and password of postgres.dsn (file, PGPASSWORD or ~/.pgpass) and pg_hba.conf"
	case "3D000":
		return "create the database, or correct databases: in duri.yaml"
	case "42501":
		return "run the SQL that `duri grants` prints as superuser in this database"
	case "53300":
		return "raise max_connections, or close clients"
	case "":
		if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
			return "check that PostgreSQL runs and that host and port of postgres.dsn are right"
		}
	}
	return ""
}

// QuoteIdent quotes an SQL identifier.
func QuoteIdent(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }

// QuoteName quotes schema.table.
func QuoteName(schema, name string) string { return QuoteIdent(schema) + "." + QuoteIdent(name) }

// QuoteLiteral quotes an SQL string constant.
func QuoteLiteral(s string) string {
	q := "'" + strings.ReplaceAll(s, "'", "''") + "'"
	if strings.Contains(s, `\`) {
		return " E" + strings.ReplaceAll(q, `\`, `\\`)
	}
	return q
}

// ServerVersion returns server_version_num, for example 150018.
func ServerVersion(ctx context.Context, c *pgconn.PgConn) (int, error) {
	rows, err := Rows(ctx, c, "SHOW server_version_num")
	if err != nil {
		return 0, err
	}
	var n int
	_, err = fmt.Sscan(rows[0][0], &n)
	return n, err
}
