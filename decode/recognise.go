package decode

import (
	"fmt"
	"slices"

	"github.com/duri-io/duri/wal"
)

// Switch is a line of a server's timeline history: it left Timeline at At for the next one.
type Switch struct {
	Timeline uint32
	At       wal.LSN
}

// Expected is what the own journal remembers of the database that it was written from.
type Expected struct {
	SystemID uint64
	Timeline uint32
	Slot     string
	Start    wal.LSN    // the journal is kept from here on
	End      wal.LSN    // how far it reaches; nothing beyond it was ever reported
	Seen     []wal.Seen // of other sites, applied in the database when the journal ended; nil while it is given back
	Made     wal.LSN    // the slot was made here and never confirmed less; zero: not known
}

// Restored is what the database says of one other site's transactions, and what this site's copy of them has.
type Restored struct {
	Site    string
	ID      wal.SiteID
	Applied wal.LSN // the database has its transactions up to here
	Kept    wal.LSN // the copy is kept from here on
}

// Observed is the database as it is found.
type Observed struct {
	Identity
	History []Switch // the timelines that the server has left, oldest first
	// Present is the end of the last journalled transaction that the database has; PresentKnown is false when that was not
	// looked for, or cannot be told any more.
	Present      wal.LSN
	PresentKnown bool
	Restored     []Restored
}

// Action is what becomes of a database that is compared with its journal (durability.md section 3).
type Action string

const (
	// Resume: streaming goes on at the journal's end, duplicates are dropped by position.
	Resume Action = "resume"
	// Continue: likewise, but it is another incarnation, which lost nothing.
	Continue Action = "continue"
	// GiveBack: the database lacks transactions that the journal has: they are given back to it (section 10).
	GiveBack Action = "give back"
	// Gap: changes may be missing in the journal. The direction stops.
	Gap Action = "gap"
	// Rejoin: the database cannot be brought forward from what is kept. The direction stops.
	Rejoin Action = "re-join"
	// Refuse: it is another database.
	Refuse Action = "refuse"
)

// Verdict is the action with what belongs to it.
type Verdict struct {
	Action Action
	// From and To are the range to give back, exclusive and inclusive: the database has what the journal has up to From.
	From, To wal.LSN
	// Err says why the direction stops; nil for Resume, Continue and GiveBack.
	Err *GapError
}

const (
	hintRejoin = "re-join this site (docs/guide/runbook.md): it needs a new slot and journal, and its content from the other site"
	hintResync = "changes made meanwhile are not in the journal: compare with `duri verify`, then re-join (docs/guide/runbook.md)"
)

// NeedsPresent reports whether Recognise can use Present: the server's identity fits, but it is behind the journal.
func NeedsPresent(want Expected, got Observed) bool {
	return got.SystemID == want.SystemID && got.Timeline >= want.Timeline && (got.Timeline > want.Timeline || behind(want, got))
}

// behind reports that a database on the journal's own timeline is an older copy: its WAL ends before the journal does, or it
// lacks what other sites' transactions it had applied then, or has a slot of before.
func behind(want Expected, got Observed) bool {
	return got.Flush < want.End || got.Exists && got.Confirmed < want.Made || slices.ContainsFunc(got.Restored, func(r Restored) bool {
		return r.Applied < wal.SeenOf(want.Seen, r.ID)
	})
}

// Recognise compares a database with its journal. It is pure. Source: the table "slot identity" of durability.md section 3.
func Recognise(want Expected, got Observed) Verdict {
	stop := func(a Action, hint, reason string, args ...any) Verdict {
		return Verdict{Action: a, Err: &GapError{Slot: want.Slot, Reason: fmt.Sprintf(reason, args...), Hint: hint, From: want.End}}
	}
	switch {
	case got.SystemID != want.SystemID:
		return stop(Refuse, hintRejoin, "this is another database cluster (system identifier %d, the journal is of %d)", got.SystemID, want.SystemID)
	case got.Timeline < want.Timeline:
		return stop(Rejoin, hintRejoin, "the server is on timeline %d, the journal already on %d: an older copy of the data directory was put back", got.Timeline, want.Timeline)
	case got.Timeline > want.Timeline:
		return failedOver(want, got, stop)
	case behind(want, got):
		const older = "an older copy of the data directory was put back (its WAL ends at %s)"
		if !got.PresentKnown {
			return stop(Rejoin, hintRejoin, older+", and none of the transactions that the journal keeps is in it", got.Flush)
		}
		return giveBack(want, got, got.Present, stop)
	case !got.Exists:
		return stop(Gap, hintResync, "the slot does not exist any more")
	case got.Lost:
		return stop(Gap, hintResync, "the server removed WAL that the slot still needed (max_slot_wal_keep_size)")
	case got.Confirmed > want.End:
		return stop(Gap, hintResync, "its confirmed position %s is ahead of what was ever journalled: it was re-created or advanced by somebody", got.Confirmed)
	}
	return Verdict{Action: Resume}
}

type stopper func(a Action, hint, reason string, args ...any) Verdict

// failedOver judges a server on a higher timeline: a standby that was promoted, or a restore that ended at some point.
func failedOver(want Expected, got Observed, stop stopper) Verdict {
	i := slices.IndexFunc(got.History, func(s Switch) bool { return s.Timeline == want.Timeline })
	if i < 0 {
		return stop(Rejoin, hintRejoin, "the server is on timeline %d, which does not come from timeline %d of the journal", got.Timeline, want.Timeline)
	}
	at := got.History[i].At
	switch {
	case at < want.End && got.PresentKnown && got.Present > at:
		return stop(Rejoin, hintRejoin, "the server left timeline %d at %s, but has transactions of it up to %s", want.Timeline, at, got.Present)
	case at < want.End:
		return giveBack(want, got, at, stop)
	case got.Exists && !got.Lost && got.Confirmed <= want.End: // a slot that is kept on standbys too
		return Verdict{Action: Continue, From: want.End, To: want.End}
	case at == want.End:
		return giveBack(want, got, at, stop)
	}
	return stop(Gap, hintResync, "the server moved from timeline %d to %d at %s (a local fail-over or a restore), and what was committed there after %s cannot be decoded any more",
		want.Timeline, got.Timeline, at, want.End)
}

// giveBack judges whether what is kept brings the database forward from a position of the journal.
func giveBack(want Expected, got Observed, from wal.LSN, stop stopper) Verdict {
	if from < want.Start {
		return stop(Rejoin, hintRejoin, "the database has this site's transactions up to %s, but the journal is kept from %s on only (journal.keep)", from, want.Start)
	}
	for _, r := range got.Restored {
		if r.Applied < r.Kept {
			return stop(Rejoin, hintRejoin, "the database has the transactions of site %s up to %s, but the copy of its journal is kept from %s on only (journal.keep)", r.Site, r.Applied, r.Kept)
		}
	}
	return Verdict{Action: GiveBack, From: min(from, want.End), To: want.End}
}
