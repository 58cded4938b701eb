package decode

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// Identity is a slot's identity together with what the server says now (durability.md section 3).
type Identity struct {
	SystemID  uint64
	Timeline  uint32
	Flush     wal.LSN // the server's present flush position
	Exists    bool
	Lost      bool // WAL that the slot needs is gone
	Active    bool
	Database  string
	Confirmed wal.LSN // the slot's confirmed_flush_lsn
}

// GapError says that the slot can no longer continue the journal. Continuing would lose changes silently, so the
// direction stops until a person or a re-synchronisation closes the gap.
type GapError struct {
	Slot   string
	Reason string
	Hint   string
	From   wal.LSN // changes from here on may be missing
}

// Error gives the sentence that is printed.
func (e *GapError) Error() string {
	return fmt.Sprintf("slot %s cannot continue the journal after %s: %s", e.Slot, e.From, e.Reason)
}

// HintText is the advice that goes with the error.
func (e *GapError) HintText() string { return e.Hint }

var errStandby = &standbyError{}

type standbyError struct{}

func (*standbyError) Error() string { return "the server is a standby, or still in recovery" }

// HintText is the advice that goes with the error.
func (*standbyError) HintText() string {
	return "it goes on by itself once the server is promoted; if that is not intended, correct postgres.dsn"
}

// Observe reads what the server says of the slot. c is a replication connection to the slot's database.
func Observe(ctx context.Context, c *pgconn.PgConn, slot string) (Identity, error) {
	var id Identity
	// A standby has a position, and for a moment of its promotion the timeline, of what it was.
	recovering, err := pg.Rows(ctx, c, "SELECT pg_catalog.pg_is_in_recovery()")
	if err != nil {
		return id, err
	}
	if recovering[0][0] == "t" {
		return id, errStandby
	}
	sys, err := pg.Rows(ctx, c, "IDENTIFY_SYSTEM")
	if err != nil {
		return id, err
	}
	if id.SystemID, err = strconv.ParseUint(sys[0][0], 10, 64); err != nil {
		return id, err
	}
	tl, err := strconv.ParseUint(sys[0][1], 10, 32)
	if err != nil {
		return id, err
	}
	id.Timeline, id.Database = uint32(tl), sys[0][3]
	if id.Flush, err = wal.ParseLSN(sys[0][2]); err != nil {
		return id, err
	}
	rows, err := pg.Rows(ctx, c, "SELECT database, active, coalesce(wal_status,'') = 'lost', confirmed_flush_lsn FROM pg_catalog.pg_replication_slots WHERE slot_name = "+pg.QuoteLiteral(slot))
	if err != nil || len(rows) == 0 {
		return id, err
	}
	r := rows[0]
	if r[0] != id.Database {
		return id, fmt.Errorf("slot %s belongs to database %s", slot, r[0])
	}
	id.Exists, id.Active, id.Lost = true, r[1] == "t", r[2] == "t"
	if r[3] != "" {
		id.Confirmed, err = wal.ParseLSN(r[3])
	}
	return id, err
}

// History reads the timelines that the server has left, oldest first. c is a replication connection.
func History(ctx context.Context, c *pgconn.PgConn, timeline uint32) ([]Switch, error) {
	if timeline <= 1 {
		return nil, nil
	}
	rows, err := pg.Rows(ctx, c, fmt.Sprintf("TIMELINE_HISTORY %d", timeline))
	if err != nil {
		return nil, fmt.Errorf("read the history of timeline %d: %w", timeline, err)
	}
	return parseHistory(rows[0][1])
}

// parseHistory reads a timeline history file: per line the timeline that was left, where, and why; comments begin with #.
func parseHistory(text string) (all []Switch, err error) {
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) < 2 {
			return nil, fmt.Errorf("timeline history: line %q", line)
		}
		id, err := strconv.ParseUint(f[0], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("timeline history: line %q", line)
		}
		at, err := wal.ParseLSN(f[1])
		if err != nil {
			return nil, fmt.Errorf("timeline history: line %q: %w", line, err)
		}
		all = append(all, Switch{uint32(id), at})
	}
	return all, nil
}

// CreateSlot makes the permanent slot and returns its consistent point: every transaction that commits after it will
// be streamed. c is a replication connection.
func CreateSlot(ctx context.Context, c *pgconn.PgConn, slot string) (wal.LSN, error) {
	rows, err := pg.Rows(ctx, c, "CREATE_REPLICATION_SLOT "+pg.QuoteIdent(slot)+" LOGICAL pgoutput NOEXPORT_SNAPSHOT")
	if err != nil {
		return 0, err
	}
	return wal.ParseLSN(rows[0][1])
}

// DropSlot removes a slot, which must be inactive.
func DropSlot(ctx context.Context, c *pgconn.PgConn, slot string) error {
	_, err := pg.Rows(ctx, c, "DROP_REPLICATION_SLOT "+pg.QuoteIdent(slot))
	return err
}

// Snapshot is a moment of a database: Name can be given to SET TRANSACTION SNAPSHOT while the connection that made it
// stays idle; every transaction whose commit record starts at or after At is not in it, every other one is.
type Snapshot struct {
	Name string
	At   wal.LSN
}

// ExportSnapshot makes a temporary slot to obtain a snapshot and the stream position that belongs to it as one
// (replication.md section 6). The slot goes with the connection, which the caller keeps open while it copies.
func ExportSnapshot(ctx context.Context, c *pgconn.PgConn, slot string) (Snapshot, error) {
	rows, err := pg.Rows(ctx, c, "CREATE_REPLICATION_SLOT "+pg.QuoteIdent(slot)+" TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT")
	if err != nil {
		return Snapshot{}, err
	}
	at, err := wal.ParseLSN(rows[0][1])
	return Snapshot{Name: rows[0][2], At: at}, err
}
