package journal

import (
	"errors"
	"fmt"

	"github.com/duri-io/duri/wal"
)

// Sentinels for the states that a caller tells apart with errors.Is. Where there is data, a struct type below carries
// it and unwraps to the sentinel.
var (
	// ErrGap: a record begins beyond the journal's end, so accepting it would leave a hole (archive.md J2).
	ErrGap = errors.New("journal: record begins beyond the end of the journal")
	// ErrChain: a seal's chain value differs from the one computed here: the two copies hold different transactions.
	ErrChain = errors.New("journal: chain value differs from the seal")
	// ErrPruned: the position asked for lies before the oldest segment that is still kept.
	ErrPruned = errors.New("journal: position is no longer kept")
	// ErrClosed: the journal or the reader was closed.
	ErrClosed = errors.New("journal: closed")
	// ErrFailed: an earlier write or fsync failed. The segment is abandoned: nothing becomes durable any more until the
	// journal is closed and opened again (durability.md section 3).
	ErrFailed = errors.New("journal: abandoned after a failed write")
	// ErrTurned: the journal goes on as another incarnation here, which a copy must learn of before it takes more.
	ErrTurned = errors.New("journal: goes on as another incarnation")
	// ErrInUse: another process, or another Journal of this one, has the directory open.
	ErrInUse = errors.New("journal: directory is in use")
)

// GapError says which range is missing. It is an ErrGap.
type GapError struct {
	End  wal.LSN // end of the journal
	From wal.LSN // where the refused record begins
}

// Error names the missing range and what to do.
func (e *GapError) Error() string {
	return fmt.Sprintf("journal ends at %s, the next record begins at %s: take the missing range from the origin or from a peer", e.End, e.From)
}

// Unwrap makes errors.Is(err, ErrGap) true.
func (e *GapError) Unwrap() error { return ErrGap }

// ChainError says where two copies of one origin's history were found to differ. It is an ErrChain.
type ChainError struct {
	At         wal.LSN
	Want, Have Chain  // of the seal; computed from the transactions here
	Detail     string // which of chain, count and size differs
}

// Error names the position and both values.
func (e *ChainError) Error() string {
	return fmt.Sprintf("seal at %s: %s: seal has chain %s, the transactions here give %s: hold this direction and compare the two copies", e.At, e.Detail, e.Want, e.Have)
}

// Unwrap makes errors.Is(err, ErrChain) true.
func (e *ChainError) Unwrap() error { return ErrChain }

// TurnError says why a copy does not go on as the incarnation that its origin offers.
type TurnError struct {
	Have, Offered Header
	Reason        string
}

// Error names both and the reason.
func (e *TurnError) Error() string {
	return fmt.Sprintf("the copy is of %s, the journal offered of %s: %s", e.Have, e.Offered, e.Reason)
}

// PrunedError says what is still kept. It is an ErrPruned.
type PrunedError struct {
	From  wal.LSN // what was asked for
	Start wal.LSN // where the journal begins now
}

// Error names both positions and what to do.
func (e *PrunedError) Error() string {
	return fmt.Sprintf("journal begins at %s, position %s is no longer kept: take it from a peer's copy, or re-join the site", e.Start, e.From)
}

// Unwrap makes errors.Is(err, ErrPruned) true.
func (e *PrunedError) Unwrap() error { return ErrPruned }

// CorruptionError is damage in a file of the journal, below the position that was made durable. It is never repaired
// silently: the range has to come from a peer.
type CorruptionError struct {
	File   string
	Offset int64   // of the damaged frame in the file
	From   wal.LSN // everything up to here was read well; the damage concerns what follows
	Reason string
	Hint   string

	torn  bool  // the frame itself is unreadable, as after an interrupted write; above the mark that is no corruption
	cause error // ErrChain for instance
}

// Error names file, offset, position, reason and hint.
func (e *CorruptionError) Error() string {
	s := fmt.Sprintf("journal file %s is damaged at offset %d (after %s): %s", e.File, e.Offset, e.From, e.Reason)
	if e.Hint != "" {
		s += ": " + e.Hint
	}
	return s
}

// Unwrap gives the cause, where it is one of the sentinels.
func (e *CorruptionError) Unwrap() error { return e.cause }

// hintPeer is the remedy for damage in general.
const hintPeer = "keep the file, and take the range from a peer's copy, or re-join (docs/guide/runbook.md)"

// UpgradeError is a record that this version must not skip and cannot read (archive.md J3).
type UpgradeError struct {
	File   string // empty when the bytes came over a link
	Offset int64
	What   string
}

// Error names the unknown thing and asks for an upgrade.
func (e *UpgradeError) Error() string {
	where := "journal record"
	if e.File != "" {
		where = fmt.Sprintf("journal file %s, offset %d", e.File, e.Offset)
	}
	return where + ": " + e.What + ": written by a newer version of duri, upgrade this one to read it"
}

// FormatError is a frame or record that breaks the format and did not come from a file of this journal: damaged in
// transit, or sent by a faulty peer.
type FormatError struct{ Reason string }

// Error gives the reason.
func (e *FormatError) Error() string { return "malformed journal data: " + e.Reason }

// malformed builds a FormatError.
func malformed(format string, args ...any) error { return &FormatError{fmt.Sprintf(format, args...)} }

// newer builds an UpgradeError whose place is filled in by whoever knows it.
func newer(format string, args ...any) error {
	return &UpgradeError{What: fmt.Sprintf(format, args...)}
}
