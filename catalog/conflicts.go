package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// Conflict is one record of duri.conflict: a change of another site that met a concurrent one, or could not simply be
// applied, with both images (replication.md rule 16).
type Conflict struct {
	ID     int64           `json:"id"`
	At     time.Time       `json:"at"`   // when this site recorded it
	Kind   string          `json:"kind"` // PostgreSQL's word; empty for an exception
	Code   string          `json:"code"` // what became of the incoming change: won, lost, superseded, filled, ...
	Schema string          `json:"schema"`
	Table  string          `json:"table"`
	Key    json.RawMessage `json:"key,omitempty"` // column -> value

	Origin     wal.SiteID      `json:"origin"` // site of the incoming change
	OriginLSN  wal.LSN         `json:"origin_lsn"`
	OriginXID  int64           `json:"origin_xid"`
	Change     int             `json:"change"` // number of the change in its transaction, from 0
	RemoteTime time.Time       `json:"remote_time"`
	RemoteRow  json.RawMessage `json:"remote_row,omitempty"` // the incoming image; empty for a delete

	LocalSite wal.SiteID      `json:"local_site,omitempty"` // site of the change that it met; 0: unknown
	LocalTime *time.Time      `json:"local_time,omitempty"`
	LocalRow  json.RawMessage `json:"local_row,omitempty"`
}

// ConflictFilter chooses records of duri.conflict. The zero value chooses the newest 100 conflicts.
type ConflictFilter struct {
	Table      string    // "schema.table" or "table"; empty: all
	Kind       string    // conflict kind, such as update_origin_differs; empty: all
	Since      time.Time // records made at or after this; zero: all
	Limit      int       // at most so many; 0: 100
	Exceptions bool      // also records that are no conflicts (superseded, filled)
}

// conflictLimit is what an unset limit means.
const conflictLimit = 100

// where gives the condition and its parameters. It is pure.
func (f ConflictFilter) where() (string, []string) {
	conditions, args := []string{"true"}, []string(nil)
	add := func(condition, arg string) {
		args = append(args, arg)
		conditions = append(conditions, strings.ReplaceAll(condition, "$", "$"+strconv.Itoa(len(args))))
	}
	if f.Table != "" {
		add("(table_schema || '.' || table_name = $::text OR table_name = $::text)", f.Table)
	}
	switch {
	case f.Kind != "":
		add("kind = $::text", f.Kind)
	case !f.Exceptions:
		conditions = append(conditions, "kind <> ''")
	}
	if !f.Since.IsZero() {
		add("at >= $::timestamptz", f.Since.UTC().Format(time.RFC3339Nano))
	}
	return strings.Join(conditions, " AND "), args
}

// rfc3339 writes a timestamptz so that time.Parse reads it, in a session whose TimeZone is UTC or not.
func rfc3339(column string) string {
	return "pg_catalog.to_char(" + column + ` AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')`
}

// Conflicts lists records of duri.conflict, newest first.
func Conflicts(ctx context.Context, c *pgconn.PgConn, f ConflictFilter) ([]Conflict, error) {
	where, args := f.where()
	limit := f.Limit
	if limit <= 0 {
		limit = conflictLimit
	}
	sql := fmt.Sprintf(`SELECT id, %s, kind, code, table_schema, table_name, key, origin, origin_lsn, origin_xid, change,
			%s, remote_row, coalesce(local_site, 0), %s, local_row
		FROM duri.conflict WHERE %s ORDER BY at DESC, id DESC LIMIT %d`,
		rfc3339("at"), rfc3339("remote_time"), rfc3339("local_time"), where, limit)
	rows, err := pg.Query(ctx, c, sql, args...)
	if err != nil {
		return nil, fmt.Errorf("list conflicts: %w", err)
	}
	out := make([]Conflict, len(rows))
	for i, r := range rows {
		if out[i], err = parseConflict(r); err != nil {
			return nil, fmt.Errorf("list conflicts: record %s: %w", r[0], err)
		}
	}
	return out, nil
}

// parseConflict reads one row of the query in Conflicts.
func parseConflict(r []string) (Conflict, error) {
	var errs []error
	integer := func(s string) int64 {
		n, err := strconv.ParseInt(s, 10, 64)
		errs = append(errs, err)
		return n
	}
	instant := func(s string) time.Time {
		t, err := time.Parse(time.RFC3339Nano, s)
		errs = append(errs, err)
		return t
	}
	doc := func(s string) json.RawMessage {
		if s == "" {
			return nil
		}
		return json.RawMessage(s)
	}
	lsn, err := wal.ParseLSN(r[8])
	errs = append(errs, err)
	c := Conflict{
		ID: integer(r[0]), At: instant(r[1]), Kind: r[2], Code: r[3], Schema: r[4], Table: r[5], Key: doc(r[6]),
		Origin: wal.SiteID(integer(r[7])), OriginLSN: lsn, OriginXID: integer(r[9]), Change: int(integer(r[10])),
		RemoteTime: instant(r[11]), RemoteRow: doc(r[12]), LocalSite: wal.SiteID(integer(r[13])), LocalRow: doc(r[15]),
	}
	if r[14] != "" {
		t := instant(r[14])
		c.LocalTime = &t
	}
	return c, errors.Join(errs...)
}
