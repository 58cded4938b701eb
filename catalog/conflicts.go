package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
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

// ConflictFilter chooses records of duri.conflict. The zero value chooses the newest 100 conflicts. All conditions must
// hold.
type ConflictFilter struct {
	Table      string      // "schema.table" or "table"; empty: all
	Kind       string      // conflict kind, such as update_origin_differs; empty: all
	Code       string      // what became of the incoming change, such as lost; empty: all
	Origin     wal.SiteID  // site of the incoming change; 0: all
	Keys       []KeyFilter // the row's key
	Since      time.Time   // records made at or after this; zero: all
	Until      time.Time   // records made before this; zero: all
	Before     int64       // only what stands behind the record of this number in a list, for paging; 0: all
	Limit      int         // at most so many; 0: 100. Conflicts alone heeds it
	Exceptions bool        // also records that are no conflicts (superseded, filled); implied by Code
}

// KeyFilter asks for rows by one column of their key.
type KeyFilter struct {
	Column string // empty: any column of the key
	Value  string // its text, as the record has it
}

// conflictLimit is what an unset limit means.
const conflictLimit = 100

// where gives the condition and its parameters. It is pure.
func (f ConflictFilter) where() (string, []string) {
	conditions, args := []string{"true"}, []string(nil)
	add := func(condition string, values ...string) { // $? is the value, $?? the second one
		for i := range slices.Backward(values) {
			condition = strings.ReplaceAll(condition, "$"+strings.Repeat("?", i+1), "$"+strconv.Itoa(len(args)+i+1))
		}
		args = append(args, values...)
		conditions = append(conditions, condition)
	}
	if f.Table != "" {
		add("(table_schema || '.' || table_name = $?::text OR table_name = $?::text)", f.Table)
	}
	switch {
	case f.Kind != "":
		add("kind = $?::text", f.Kind)
	case !f.Exceptions && f.Code == "":
		add("kind <> ''")
	}
	if f.Code != "" {
		add("code = $?::text", f.Code)
	}
	if f.Origin != 0 {
		add("origin = $?::int2", strconv.Itoa(int(f.Origin)))
	}
	for _, k := range f.Keys {
		if k.Column == "" {
			add("EXISTS (SELECT FROM pg_catalog.jsonb_each_text(key) AS k(c, v) WHERE k.v = $?::text)", k.Value)
		} else {
			add("key ->> $?::text = $??::text", k.Column, k.Value)
		}
	}
	if !f.Since.IsZero() {
		add("at >= $?::timestamptz", f.Since.UTC().Format(time.RFC3339Nano))
	}
	if !f.Until.IsZero() {
		add("at < $?::timestamptz", f.Until.UTC().Format(time.RFC3339Nano))
	}
	if f.Before != 0 {
		add("(at, id) < (SELECT b.at, b.id FROM duri.conflict b WHERE b.id = $?::int8)", strconv.FormatInt(f.Before, 10))
	}
	return strings.Join(conditions, " AND "), args
}

// rfc3339 writes a timestamptz so that time.Parse reads it, in a session whose TimeZone is UTC or not.
func rfc3339(column string) string {
	return "pg_catalog.to_char(" + column + ` AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')`
}

// NoRecordError says that a record of duri.conflict is not there.
type NoRecordError struct{ ID int64 }

// Error gives the sentence that is printed.
func (e *NoRecordError) Error() string {
	return fmt.Sprintf("look for conflict %d: this site has no such record", e.ID)
}

// HintText is the advice that goes with the error.
func (e *NoRecordError) HintText() string {
	return "`duri conflict list` shows those that are kept; each site has records and numbers of its own, and conflict.keep bounds their age"
}

// conflictColumns is what parseConflict reads.
var conflictColumns = fmt.Sprintf(`id, %s, kind, code, table_schema, table_name, key, origin, origin_lsn, origin_xid, change,
	%s, remote_row, coalesce(local_site, 0), %s, local_row`, rfc3339("at"), rfc3339("remote_time"), rfc3339("local_time"))

// Conflicts lists records of duri.conflict, newest first.
func Conflicts(ctx context.Context, c *pgconn.PgConn, f ConflictFilter) ([]Conflict, error) {
	where, args := f.where()
	limit := f.Limit
	if limit <= 0 {
		limit = conflictLimit
	}
	out, err := readConflicts(ctx, c, fmt.Sprintf("WHERE %s ORDER BY id DESC LIMIT %d", where, limit), args...)
	if err == nil && len(out) == 0 && f.Before != 0 {
		// The end of the list, or a page behind a record whose time is over: the two must not look alike.
		_, err = ConflictByID(ctx, c, f.Before)
	}
	return out, err
}

// ConflictByID reads one record of duri.conflict. The error is a *NoRecordError when it is not there.
func ConflictByID(ctx context.Context, c *pgconn.PgConn, id int64) (Conflict, error) {
	list, err := readConflicts(ctx, c, "WHERE id = $1::int8", strconv.FormatInt(id, 10))
	if err != nil {
		return Conflict{}, err
	}
	if len(list) == 0 {
		return Conflict{}, &NoRecordError{id}
	}
	return list[0], nil
}

func readConflicts(ctx context.Context, c *pgconn.PgConn, tail string, args ...string) ([]Conflict, error) {
	rows, err := pg.Query(ctx, c, "SELECT "+conflictColumns+" FROM duri.conflict "+tail, args...)
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

// ConflictStats counts records.
type ConflictStats struct {
	Since  *time.Time      `json:"since,omitempty"` // the period that was asked for; nil: without that end
	Until  *time.Time      `json:"until,omitempty"`
	Total  int64           `json:"total"`
	Counts []ConflictCount `json:"counts"` // the greatest first
}

// ConflictCount is how many records of one table have one kind and outcome.
type ConflictCount struct {
	Schema string    `json:"schema"`
	Table  string    `json:"table"`
	Kind   string    `json:"kind"` // empty for exceptions
	Code   string    `json:"code"`
	Count  int64     `json:"count"`
	First  time.Time `json:"first"` // when this site recorded the first and the last of them
	Last   time.Time `json:"last"`
}

// CountConflicts counts records of duri.conflict by table, kind and code; the filter's Limit does not matter.
func CountConflicts(ctx context.Context, c *pgconn.PgConn, f ConflictFilter) (ConflictStats, error) {
	where, args := f.where()
	sql := fmt.Sprintf(`SELECT table_schema, table_name, kind, code, count(*), %s, %s FROM duri.conflict WHERE %s
		GROUP BY 1, 2, 3, 4 ORDER BY count(*) DESC, 1, 2, 3, 4`, rfc3339("min(at)"), rfc3339("max(at)"), where)
	rows, err := pg.Query(ctx, c, sql, args...)
	if err != nil {
		return ConflictStats{}, fmt.Errorf("count conflicts: %w", err)
	}
	out := ConflictStats{Since: given(f.Since), Until: given(f.Until), Counts: make([]ConflictCount, len(rows))}
	for i, r := range rows {
		n := ConflictCount{Schema: r[0], Table: r[1], Kind: r[2], Code: r[3]}
		var errs [3]error
		n.Count, errs[0] = strconv.ParseInt(r[4], 10, 64)
		n.First, errs[1] = time.Parse(time.RFC3339Nano, r[5])
		n.Last, errs[2] = time.Parse(time.RFC3339Nano, r[6])
		if err := errors.Join(errs[:]...); err != nil {
			return ConflictStats{}, fmt.Errorf("count conflicts: %w", err)
		}
		out.Counts[i] = n
		out.Total += n.Count
	}
	return out, nil
}

// given is nil for the zero time.
func given(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// parseConflict reads one row of conflictColumns.
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
