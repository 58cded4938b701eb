// Package conflict decides, for one row, between the state a site holds and a change that arrives from another
// site. It is pure: values in, a Decision out. It imports only wal.
//
// The rule is the row register of replication.md section 2: state is live(row, v) or tombstone(v), and merging takes
// the greater version v = (commit time, site of origin). The order of arrival never matters. Whether a loser is a
// conflict or merely late is told by what the incoming transaction had seen (rule 16).
package conflict

import "github.com/duri-io/duri/wal"

// Kind names a conflict as PostgreSQL 18 and 19 do.
type Kind string

const (
	None                Kind = ""
	InsertExists        Kind = "insert_exists"
	UpdateOriginDiffers Kind = "update_origin_differs"
	UpdateMissing       Kind = "update_missing"
	UpdateDeleted       Kind = "update_deleted"
	DeleteOriginDiffers Kind = "delete_origin_differs"
	DeleteMissing       Kind = "delete_missing"
	// Of rows with different keys that collide on another constraint (rule 11).
	UpdateExists            Kind = "update_exists"
	MultipleUniqueConflicts Kind = "multiple_unique_conflicts"
)

// Existence is what a site holds for a key.
type Existence byte

const (
	Absent  Existence = iota // no row, and no tombstone is known
	Live                     // a row
	Deleted                  // no row, but a tombstone
)

// State is what a site holds for one key.
type State struct {
	Existence Existence
	// Version is that of the row or the tombstone. The zero version is older than any change: it stands for rows
	// whose commit timestamp is beyond the horizon (rule 5).
	Version wal.Version
	// Seen reports that the incoming transaction committed after this state had been applied at its origin: the
	// change is then a causal successor, not a rival.
	Seen bool
	// Saw reports the reverse: the transaction that made this state committed after the incoming change had been
	// applied at its origin. With three sites a change can arrive after its own successor (S11, S12).
	Saw bool
	// Behind reports that the incoming transaction had seen transactions of other sites that have not been applied here
	// yet. A row that is absent may then just not have arrived.
	Behind bool
}

// Code is how the applier's outcome differs from "as sent" (archive.md section 3); empty when it does not.
type Code string

const (
	AsSent     Code = ""
	Superseded Code = "superseded" // left alone: the state is newer, and had already seen this change
	Lost       Code = "lost"       // truly concurrent, and older
	Won        Code = "won"        // truly concurrent, and newer
	Parked     Code = "parked"     // kept out of sight, because a newer row has a value that must be unique (rule 11)
	Displaced  Code = "displaced"  // written, and the older row that has the value was parked
	Unparked   Code = "unparked"   // a parked row is visible again
	Merged     Code = "merged"     // older, and yet part of it stands: delta columns, column mode (rules 13 and 14)
	Filled     Code = "filled"     // written after completing unchanged TOAST values from elsewhere (rule 9)
)

// Decision is the outcome for one incoming change against one state.
type Decision struct {
	// Apply says that the incoming change wins: write its image, or remove the row for a delete.
	Apply bool
	// Kind is set when the two changes were truly concurrent, or when the row that an update or delete names is not
	// here at all: such an outcome is recorded with both images.
	Kind Kind
	Code Code
}

// Decide merges an incoming change of version v into state s.
//
//	state \ incoming   insert               update                  delete
//	absent             write                write (update_missing)  nothing to do (delete_missing)
//	live, v wins       write                write                   remove
//	live, v loses      keep                 keep                    keep
//	deleted, v wins    write                write                   keep the greater tombstone
//	deleted, v loses   keep deleted         keep deleted            keep deleted
//
// The same origin's later change always applies: versions of one row from one origin never decrease in that origin's
// order (rule 3), and changes of one transaction share theirs, so s.Version is not compared when its site is v's.
func Decide(op wal.Op, v wal.Version, s State) Decision {
	if s.Existence == Absent {
		return absent(op, s.Behind)
	}
	if s.Version.Site == v.Site {
		return Decision{Apply: true}
	}
	wins := s.Version.Less(v)
	if s.Seen && wins {
		return Decision{Apply: true} // the ordinary case of two sites taking turns
	}
	d := Decision{Apply: wins, Kind: kindOf(op, s.Existence)}
	switch {
	case s.Seen || s.Saw && !wins: // its own successor is here already; or a version whose true order the clock rule settled elsewhere
		d.Kind, d.Code = None, Superseded
	case wins:
		d.Code = Won
	default:
		d.Code = Lost
	}
	return d
}

func absent(op wal.Op, behind bool) Decision {
	switch {
	case behind:
		return Decision{Apply: true}
	case op == wal.Update:
		return Decision{Apply: true, Kind: UpdateMissing, Code: Won}
	case op == wal.Delete:
		return Decision{Apply: true, Kind: DeleteMissing}
	}
	return Decision{Apply: true}
}

func kindOf(op wal.Op, e Existence) Kind {
	switch {
	case op == wal.Delete && e == Deleted:
		return DeleteMissing
	case op == wal.Delete:
		return DeleteOriginDiffers
	case e == Deleted:
		return UpdateDeleted
	case op == wal.Insert:
		return InsertExists
	}
	return UpdateOriginDiffers
}
