// Package enrol brings a database's content to a site that starts empty, while the source goes on taking writes
// (replication.md section 6). Send runs beside the source and writes a stream, Receive runs beside the target and
// reads it; how the stream travels is the caller's affair.
//
// Guarantees: the stream holds exactly what the transactions before position At had committed, so a target that then
// applies the source's journal from At on misses nothing and sees nothing twice. Receive is one transaction, which
// carries the source's replication origin and records At as its progress: all of it happens or none. The target's own
// slot skips it, because it has an origin.
//
// Not its concern: roles and passwords (create them first), large objects, contents of UNLOGGED tables, and the stride
// of sequences. DESIGN.md holds the format of the stream and what was rejected.
package enrol

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// Header opens a stream: what is going to be sent.
type Header struct {
	At       wal.LSN  `json:"at"`       // transactions whose commit record starts before At are in, no other is
	Time     wal.Time `json:"time"`     // the source's clock when the snapshot was taken: no row in it is younger
	Database string   `json:"database"` // at the source
	Server   int      `json:"server"`   // server_version_num of the source
	Encoding string   `json:"encoding"` // server_encoding of the source; the stream itself is UTF-8
	Schemas  []string `json:"schemas"`  // what was asked for; empty: all user schemas
	Tables   []Table  `json:"tables"`
	// MatViews are the populated materialized views, in an order that suits most refreshes.
	MatViews []Name `json:"matviews,omitempty"`
	// Applied is how far the source had applied each other site. Those changes are in the content, and no others.
	Applied map[wal.SiteID]wal.LSN `json:"applied,omitempty"`
}

// Name is a schema-qualified name.
type Name struct {
	Schema string `json:"schema"`
	Name   string `json:"name"`
}

// String prints schema.name.
func (n Name) String() string { return n.Schema + "." + n.Name }

// sql quotes the name.
func (n Name) sql() string { return pg.QuoteName(n.Schema, n.Name) }

// Table is a published table: an ordinary one or a leaf of a partitioned one.
type Table struct {
	Name
	Columns []Column `json:"columns"`
	Rows    int64    `json:"rows"` // the planner's estimate
}

// Column is a column of a table. Generated ones are computed by the target and not sent.
type Column struct {
	Name      string `json:"name"`
	Type      string `json:"type"` // schema-qualified where it is not a built-in one
	Generated bool   `json:"generated,omitempty"`
}

// copied lists the columns that COPY carries, quoted; empty when the table has none.
func (t Table) copied() string {
	var names []string
	for _, c := range t.Columns {
		if !c.Generated {
			names = append(names, pg.QuoteIdent(c.Name))
		}
	}
	return strings.Join(names, ", ")
}

// tableEnd closes a table in the stream.
type tableEnd struct {
	Rows  int64  `json:"rows"`
	Bytes int64  `json:"bytes"`
	CRC   uint32 `json:"crc"` // CRC-32C of the table's data
}

// sequence is the state of a sequence. Sequences are not transactional: it is at least as far as the content needs.
type sequence struct {
	Name
	Last   int64 `json:"last"`
	Called bool  `json:"called"`
}

// totals close the stream.
type totals struct {
	Tables int   `json:"tables"`
	Rows   int64 `json:"rows"`
	Bytes  int64 `json:"bytes"`
}

// Result says what Receive committed.
type Result struct {
	At     wal.LSN  `json:"at"`   // apply the source's journal from here on
	Time   wal.Time `json:"time"` // the version time that the copied rows carry
	Rows   int64    `json:"rows"`
	Bytes  int64    `json:"bytes"`
	Tables int      `json:"tables"`
	// SchemaMade is false when the tables existed already, empty, and only data was copied.
	SchemaMade bool `json:"schema_made"`
	// Unrefreshed are materialized views that stay empty because their query failed or they are not ours to refresh.
	Unrefreshed []string `json:"unrefreshed,omitempty"`
	// Applied is Header.Applied.
	Applied map[wal.SiteID]wal.LSN `json:"applied,omitempty"`
}

// Progress is told while Receive works, at most about five times a second and at each change of phase.
type Progress struct {
	Phase     string        `json:"phase"` // schema, data, indexes, commit, analyze
	Table     string        `json:"table,omitempty"`
	Tables    int           `json:"tables"` // finished
	TablesAll int           `json:"tables_all"`
	Rows      int64         `json:"rows"`
	RowsAll   int64         `json:"rows_all"` // the source planner's estimate
	Bytes     int64         `json:"bytes"`
	Elapsed   time.Duration `json:"-"`
}

// Error says what part of an enrolment could not be done, and what the user can do.
type Error struct {
	Op   string // what was attempted
	Text string // what is wrong; may be empty when Err says it
	Hint string // one sentence
	Err  error  // the cause, or nil
}

// Error gives the sentence that is printed.
func (e *Error) Error() string {
	parts := []string{e.Op}
	if e.Text != "" {
		parts = append(parts, e.Text)
	}
	if e.Err != nil {
		parts = append(parts, e.Err.Error())
	}
	return strings.Join(parts, ": ")
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// HintText is the advice that goes with the error.
func (e *Error) HintText() string {
	var hinted interface{ HintText() string }
	if e.Hint == "" && errors.As(e.Err, &hinted) {
		return hinted.HintText()
	}
	return e.Hint
}

// wrap adds what was attempted, and the hint for a server error, unless err has one already.
func wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	var hinted interface{ HintText() string }
	if errors.As(err, &hinted) {
		return fmt.Errorf("%s: %w", op, err)
	}
	return &Error{Op: op, Err: err, Hint: hint(err)}
}

// hint is the advice for a server error during an enrolment. It is pure.
func hint(err error) string {
	switch pg.SQLState(err) {
	case "42704": // undefined object: nearly always a role
		return "create the roles of the source here first: pg_dumpall --roles-only"
	case "42501":
		return "set postgres.setup_dsn to a superuser for the time of the enrolment, or create the tables here as their owners and join again: then only data are copied"
	case "42P06", "42P07", "42710", "42723":
		return "this database holds a part of the source's schema: drop it (or create all of it, empty) and join again"
	case "0A000", "58P01":
		return "install the same extensions' packages as at the source"
	case "53400":
		return "raise max_replication_slots at the source"
	case "53100":
		return "free disk space at the target"
	case "55P03":
		return "end the sessions that hold locks on the replicated tables and join again"
	case "23503", "23505", "23514", "23P01":
		return "the source's own content breaks this constraint: correct it there and join again"
	}
	return pg.Hint(err)
}

// near quotes the line of sql that a server error points at. It is pure.
func near(sql string, err error) string {
	var pe *pgconn.PgError
	if !errors.As(err, &pe) || pe.Position <= 0 {
		return ""
	}
	runes := []rune(sql)
	at := int(pe.Position) - 1
	if at >= len(runes) {
		return ""
	}
	start, end := at, at
	for start > 0 && runes[start-1] != '\n' {
		start--
	}
	for end < len(runes) && runes[end] != '\n' {
		end++
	}
	const most = 200
	return strings.TrimSpace(string(runes[start:min(end, start+most)]))
}
