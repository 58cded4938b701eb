package durability

import (
	"maps"
	"slices"

	"github.com/duri-io/duri/wal"
)

// Word is what a member of an unsettled register says, in the present epoch, of one database.
type Word struct {
	// Secured: what it acknowledged in former epochs has the receipts that this one asks for (Secured).
	Secured bool
	// Copies is, by site, how far its copy of that one's journal is durable.
	Copies map[string]wal.LSN
}

// Furthest gives, by site that is left out, the position up to which its transactions count: that of the member who has
// most of it. words must be of all members, each of the present epoch: what a member gave receipts for in a former one is
// not beyond its word. The furthest does not change any more in an epoch, though copies may go on growing.
func Furthest(out []string, words []Word) map[string]wal.LSN {
	counts := map[string]wal.LSN{}
	for _, site := range out {
		for _, w := range words {
			counts[site] = max(counts[site], w.Copies[site])
		}
	}
	return counts
}

// Exchanged reports whether all members, whose words are given, hold what counts of the sites that are left out, and have
// their own acknowledged transactions where the present members ask for them: then the register may be settled.
func Exchanged(counts map[string]wal.LSN, words []Word) bool {
	return !slices.ContainsFunc(words, func(w Word) bool {
		return !w.Secured || slices.ContainsFunc(slices.Collect(maps.Keys(counts)), func(site string) bool { return w.Copies[site] < counts[site] })
	})
}

// Secured reports whether this site's own stream up to a position has the receipts that the present epoch asks for.
func Secured(upTo wal.LSN, receipts []Receipt, s Standing, required int) bool {
	s.Arming = nil
	p, ok := Report(Progress{upTo, upTo, upTo}, receipts, s, required)
	return ok && p.Durable >= upTo
}

// Needs is how much of another site's journal one that returns must hold before a member takes it back: what the member
// has of it, up to the cut if one is on record, since what lies beyond was acknowledged to nobody.
func Needs(have, cut wal.LSN, isCut bool) wal.LSN {
	if isCut {
		return min(have, cut)
	}
	return have
}
