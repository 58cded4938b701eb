package decode

import (
	"context"
	"fmt"
	"strconv"

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

// Expected is what the journal remembers of the slot.
type Expected struct {
	SystemID uint64
	Timeline uint32
	Slot     string
	End      wal.LSN // how far the journal reaches; nothing beyond it was ever reported
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

// CheckSlot compares the slot with the journal; nil means streaming may resume at the journal's end, duplicates
// being dropped by position. Source: the table "slot identity" of durability.md section 3.
func CheckSlot(want Expected, got Identity) error {
	gap := func(hint, reason string, args ...any) error {
		return &GapError{Slot: want.Slot, Reason: fmt.Sprintf(reason, args...), Hint: hint, From: want.End}
	}
	const rejoin = "re-join this site (docs/guide/runbook.md): it needs a new slot and journal, and its content from the other site"
	const resync = "changes made meanwhile are not in the journal: compare with `duri verify`, then re-join (docs/guide/runbook.md)"
	switch {
	case got.SystemID != want.SystemID:
		return gap(rejoin, "this is another database cluster (system identifier %d, the journal is of %d)", got.SystemID, want.SystemID)
	case got.Timeline < want.Timeline:
		return gap(rejoin, "the server is on timeline %d, the journal already on %d: an older copy of the data directory was put back", got.Timeline, want.Timeline)
	case got.Timeline > want.Timeline:
		return gap(resync, "the server moved from timeline %d to %d (a local fail-over or a restore)", want.Timeline, got.Timeline)
	case got.Flush < want.End:
		return gap(rejoin, "the server's WAL ends at %s, before the journal: an older copy of the data directory was put back", got.Flush)
	case !got.Exists:
		return gap(resync, "the slot does not exist any more")
	case got.Lost:
		return gap(resync, "the server removed WAL that the slot still needed (max_slot_wal_keep_size)")
	case got.Confirmed > want.End:
		return gap(resync, "its confirmed position %s is ahead of what was ever journalled: it was re-created or advanced by somebody", got.Confirmed)
	}
	return nil
}

// Observe reads what the server says of the slot. c is a replication connection to the slot's database.
func Observe(ctx context.Context, c *pgconn.PgConn, slot string) (Identity, error) {
	var id Identity
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
