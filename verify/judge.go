package verify

import (
	"fmt"

	"github.com/duri-io/duri/wal"
)

// VersionedRow is a row with its version.
type VersionedRow struct {
	Row
	// Time and Site are the version that PostgreSQL shows: the commit time and the site that wrote the row. Site 0: not
	// known any more (the row is frozen, or came without an origin that duri knows).
	Time wal.Time   `json:"time"`
	Site wal.SiteID `json:"site"`
}

func (r *VersionedRow) version() wal.Version { return wal.Version{Time: r.Time, Site: r.Site} }

// Deletion is what the journals tell about the deletes of a row that one side lacks.
type Deletion struct {
	Version wal.Version // of the newest delete; zero: none is known
	// Since is the time from which on every delete is known, whichever site it was made at.
	Since wal.Time
}

// evidence is what is known of a row that differs.
type evidence struct {
	rows    [2]*VersionedRow // nil: absent
	sites   [2]wal.SiteID    // of the sides
	from    int              // the side that was declared to be right, -1: neither
	deleted Deletion         // counts when one row is absent
}

// verdict says which side's row is right.
type verdict struct {
	right int // index of the side; undecided
	why   string
}

// undecided is the verdict that needs a person: --from.
const undecided = -1

// judge decides which side has the right row.
//
//	declared (--from)                                         that side
//	both rows, both written by the same one of the two sites  that site: it knows best what it wrote, the other has a copy
//	both rows, written by different sites                     the greater version
//	both rows, one version not known any more                 the known one: it is younger than the horizon (rule 5)
//	both rows, written by the same third site                 undecided: repair at that site first
//	both rows, of unknown versions                            undecided
//	one row, a newer delete of it is known                    the side without it
//	one row, older than the deletes that are known            undecided
//	one row, no newer delete                                  the side with it
//
// The copy of a row carries the stamp of the transaction that it was applied in, which may be later than the row's own
// version (rule 4), so "same site" comes before "greater version".
func judge(e evidence, name func(int) string) verdict {
	if e.from >= 0 {
		return verdict{e.from, "declared"}
	}
	a, b := e.rows[0], e.rows[1]
	switch {
	case a == nil && b == nil:
		return verdict{undecided, "neither site has the row any more"}
	case a == nil:
		return judgeAbsent(1, b, e.deleted)
	case b == nil:
		return judgeAbsent(0, a, e.deleted)
	case a.Site == 0 && b.Site == 0:
		return verdict{undecided, "neither row's version is known any more"}
	case a.Site == 0:
		return verdict{1, "the other row is so old that its version is not known any more"}
	case b.Site == 0:
		return verdict{0, "the other row is so old that its version is not known any more"}
	}
	for i := range e.sites {
		if a.Site == e.sites[i] && b.Site == e.sites[i] {
			return verdict{i, fmt.Sprintf("both rows were written by %s, which has the original", name(i))}
		}
	}
	switch {
	case a.Site == b.Site:
		return verdict{undecided, "both rows are copies of a third site's: repair there first"}
	case a.version().Less(b.version()):
		return verdict{1, "newer version"}
	}
	return verdict{0, "newer version"}
}

// judgeAbsent decides about a row that only one side has.
func judgeAbsent(has int, row *VersionedRow, d Deletion) verdict {
	switch {
	case row.Site == 0:
		return verdict{undecided, "the row's version is not known any more, so it may be older than a delete"}
	case row.version().Less(d.Version):
		return verdict{1 - has, fmt.Sprintf("it was deleted at %s", d.Version.Time)}
	case row.Time < d.Since:
		return verdict{undecided, fmt.Sprintf("the row is older than the deletes that are known, which begin at %s", d.Since)}
	}
	return verdict{has, "no later delete of it is known"}
}
