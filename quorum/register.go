// Package quorum decides which sites may acknowledge commits that wait for other sites: the register, the rules by
// which it changes, and the store that keeps it. It is pure: values in, values out; package quorum/etcdstore keeps the
// value. docs/adr/0006 says why there is one.
//
// It guarantees, with what its callers promise (see TakeOver and Rearm), that a commit which was acknowledged with the
// receipts of its time is held by every later member set. It does not watch sites, does not give receipts, and does not
// know time: Register.At is for people.
package quorum

import (
	"maps"
	"slices"
	"time"

	"github.com/duri-io/duri/wal"
)

// Register is the one value that all sites share. Its epoch rises by one with every change and stands on every receipt
// and decision. A value is never changed: the functions of this package make the next one.
type Register struct {
	Epoch   uint64   `json:"epoch"`   // from 1
	Members []string `json:"members"` // names of the sites that acknowledge, sorted
	// Settled: the members hold all of each other's acknowledged transactions, so that another take-over is safe.
	Settled bool `json:"settled"`
	Cuts    Cuts `json:"cuts,omitempty"`
	// Forced: a person passed over the rules; what the left-out sites had acknowledged may be lost.
	Forced bool `json:"forced,omitempty"`

	Reason string    `json:"reason,omitempty"`
	By     string    `json:"by"` // a site, or the person who forced
	At     time.Time `json:"at"`
}

// Cuts says, by database and excluded site, up to which position the site's own transactions count. What it has
// beyond is its tail.
type Cuts map[string]map[string]wal.LSN

// Mode is what a register means for a commit.
type Mode string

// The modes.
const (
	Sync    Mode = "SYNC"    // all sites are members
	Solo    Mode = "SOLO"    // one site acknowledges alone
	Reduced Mode = "REDUCED" // several, but not all
)

// Receipts is how many other members must hold a commit durably when k are configured: k_eff.
func Receipts(k, members int) int { return max(0, min(k, members-1)) }

// Has reports whether a site is a member.
func (r Register) Has(site string) bool { return slices.Contains(r.Members, site) }

// Mode compares the members with all sites of the cluster.
func (r Register) Mode(sites []string) Mode {
	switch {
	case slices.Equal(r.Members, names(sites)):
		return Sync
	case len(r.Members) == 1:
		return Solo
	}
	return Reduced
}

// Cut is the position up to which an excluded site's transactions count; false when none is on record, as for a member.
func (r Register) Cut(database, site string) (wal.LSN, bool) {
	lsn, ok := r.Cuts[database][site]
	return lsn, ok
}

// Equal compares all fields; times as instants.
func (r Register) Equal(o Register) bool {
	return r.Epoch == o.Epoch && slices.Equal(r.Members, o.Members) && r.Settled == o.Settled && r.Cuts.equal(o.Cuts) &&
		r.Forced == o.Forced && r.Reason == o.Reason && r.By == o.By && r.At.Equal(o.At)
}

// Clone shares nothing with r.
func (r Register) Clone() Register {
	r.Members = slices.Clone(r.Members)
	r.Cuts = r.Cuts.without(nil)
	return r
}

func (c Cuts) equal(o Cuts) bool {
	return maps.EqualFunc(c.without(nil), o.without(nil), maps.Equal[map[string]wal.LSN, map[string]wal.LSN])
}

// without is a copy that lacks some sites, and databases for which nothing is left; nil when that is all.
func (c Cuts) without(sites []string) Cuts {
	var left Cuts
	for db, cuts := range c {
		for site, lsn := range cuts {
			if !slices.Contains(sites, site) {
				left = left.with(db, site, lsn)
			}
		}
	}
	return left
}

// with sets one cut in place; c may be nil.
func (c Cuts) with(database, site string, lsn wal.LSN) Cuts {
	if c == nil {
		c = Cuts{}
	}
	if c[database] == nil {
		c[database] = map[string]wal.LSN{}
	}
	c[database][site] = lsn
	return c
}

// names sorts and removes repetitions.
func names(sites []string) []string {
	return slices.Compact(slices.Sorted(slices.Values(sites)))
}

// minus gives the names of a that are not in b.
func minus(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
}
