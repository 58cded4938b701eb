package quorum

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// RuleError says which rule forbids a change of the register.
type RuleError struct {
	Msg  string
	Hint string
}

// Error is one sentence.
func (e *RuleError) Error() string { return e.Msg }

// HintText is what can be done instead.
func (e *RuleError) HintText() string { return e.Hint }

func forbidden(hint, format string, args ...any) error {
	return &RuleError{Msg: fmt.Sprintf(format, args...), Hint: hint}
}

// Hints that several rules share.
const (
	hintSettle = "wait until the members have exchanged what they acknowledged and the register is settled; a person may force"
	hintForce  = "more sites are gone than receipts were required, so acknowledged transactions may be lost: only a person may go on, by force"
)

// Note is who changes the register, why and when.
type Note struct {
	Reason string
	By     string // a site, or a person when forced
	At     time.Time
}

// Initial is the first value: all sites are members, and nothing has been acknowledged yet.
func Initial(sites []string, by string, at time.Time) Register {
	return Register{Epoch: 1, Members: names(sites), Settled: true, Reason: "first value", By: by, At: at}
}

// TakeOver leaves sites out: keep is what remains of the members. No more may go in one step than receipts are
// required, because then one of the sites that remain holds whatever the others acknowledged.
//
// The caller promises that each site of keep has frozen the others before it asks: it gives them no receipt beyond its
// noted position, counts none from them, and keeps to that, over restarts too, until it reads a greater epoch. (An
// epoch that has not changed proves nothing: a swap without answer may still arrive. Renew ends it.) When one site
// remains, the result is settled, as there is nothing to exchange, and cuts are the noted positions; otherwise they may
// be nil, as Settle sets them.
func TakeOver(old Register, keep []string, k int, cuts Cuts, n Note) (Register, error) {
	keep = names(keep)
	removed := minus(old.Members, keep)
	limit := Receipts(k, len(old.Members))
	switch {
	case len(keep) == 0:
		return Register{}, forbidden("name the sites that go on", "a take-over must keep at least one member")
	case len(minus(keep, old.Members)) > 0:
		return Register{}, forbidden("a site comes back by re-arming", "a take-over cannot add %s, which acknowledges nothing in epoch %d", list(minus(keep, old.Members)), old.Epoch)
	case len(removed) == 0:
		return Register{}, forbidden("to end proposals that are under way, renew the epoch", "a take-over must leave a member out")
	case !old.Settled:
		return Register{}, forbidden(hintSettle, "the change of epoch %d is not settled yet, so %s cannot be left out", old.Epoch, list(removed))
	case len(removed) > limit:
		return Register{}, forbidden(hintForce, "%s cannot be left out: of %d members with %s at most %d may go at once", list(removed), len(old.Members), plural(k, "receipt"), limit)
	}
	next := step(old, n)
	next.Members = keep
	next.Settled = len(keep) == 1
	var err error
	next.Cuts, err = addCuts(old.Cuts, cuts, removed)
	return next, err
}

// Leave is a site's own step out of the members: a planned stop, or a disk that no longer keeps its promises. The
// limits of TakeOver hold; note.By is the site.
//
// The caller promises that the site acknowledges nothing from now on, until it reads a greater epoch. With one site
// remaining, cuts are the ends of its journals, and that site holds them.
func Leave(old Register, site string, k int, cuts Cuts, n Note) (Register, error) {
	if !old.Has(site) {
		return Register{}, forbidden("nothing is to be done", "site %s is not a member in epoch %d", site, old.Epoch)
	}
	if n.By != site {
		return Register{}, forbidden("the others leave it out by a take-over", "site %s leaves by itself, not by %s", site, n.By)
	}
	return TakeOver(old, minus(old.Members, []string{site}), k, cuts, n)
}

// Settle says that the members hold all of each other's acknowledged transactions and the same of each excluded site's:
// up to its cut, the furthest position that a member had of it.
//
// The caller promises that every member has read old and only then said what it holds.
func Settle(old Register, cuts Cuts, n Note) (Register, error) {
	if old.Settled {
		return Register{}, forbidden("nothing is to be done", "epoch %d is settled already", old.Epoch)
	}
	next := step(old, n)
	next.Settled = true
	for db, positions := range cuts {
		for site, lsn := range positions {
			before, ok := old.Cut(db, site)
			switch {
			case old.Has(site):
				return Register{}, forbidden("cuts are for sites that are left out", "%s is a member, so it has no cut", site)
			case ok && lsn < before:
				return Register{}, forbidden("take the furthest position of all members", "the cut of %s in database %s cannot go back from %s to %s", site, db, before, lsn)
			}
			next.Cuts = next.Cuts.with(db, site, lsn)
		}
	}
	return next, nil
}

// Rearm makes one site a member again and drops its cuts.
//
// The caller promises that the site holds what the members and the excluded sites acknowledged, that what it had beyond
// its cut is reversed, and that each member acknowledges only what the site holds too, over restarts, until it reads a
// greater epoch.
func Rearm(old Register, site string, n Note) (Register, error) {
	switch {
	case site == "":
		return Register{}, forbidden("name the site", "no site is named to become a member again")
	case old.Has(site):
		return Register{}, forbidden("nothing is to be done", "site %s is a member already", site)
	case !old.Settled:
		return Register{}, forbidden(hintSettle, "the change of epoch %d is not settled yet, so site %s cannot come back", old.Epoch, site)
	}
	next := step(old, n)
	next.Members = names(append(next.Members, site))
	next.Cuts = old.Cuts.without([]string{site})
	return next, nil
}

// Renew changes nothing but the epoch. A proposal that is still under way somewhere can then no longer succeed: a site
// that has frozen others, or that waits for a site to re-arm, and does not know what became of its swap gives its
// promise back in this way. Reading the unchanged value is not enough.
func Renew(old Register, n Note) (Register, error) { return step(old, n), nil }

// Force is a person's decision: any sites become the members, past the rules on how many may go and when. What the
// others alone have acknowledged is lost; n says who and why.
func Force(old Register, keep []string, cuts Cuts, n Note) (Register, error) {
	keep = names(keep)
	switch {
	case len(keep) == 0 || keep[0] == "":
		return Register{}, forbidden("name the sites that go on", "a forced take-over must keep at least one site")
	case strings.TrimSpace(n.By) == "" || strings.TrimSpace(n.Reason) == "":
		return Register{}, forbidden("both stay on record", "a forced take-over needs the name of who decides, and a reason")
	}
	next := step(old, n)
	next.Forced = true
	next.Members = keep
	next.Settled = len(keep) == 1
	var err error
	next.Cuts, err = addCuts(old.Cuts.without(keep), cuts, minus(old.Members, keep))
	return next, err
}

// step is the next epoch, equal to old otherwise, and shares nothing with it.
func step(old Register, n Note) Register {
	next := old.Clone()
	next.Epoch++
	next.Forced = false
	next.Reason, next.By, next.At = n.Reason, n.By, n.At
	return next
}

// addCuts adds the cuts of sites that are left out now. Those of sites that were left out before stand.
func addCuts(old, more Cuts, removed []string) (Cuts, error) {
	cuts := old.without(nil)
	for db, positions := range more {
		for site, lsn := range positions {
			if before, ok := old[db][site]; ok && before == lsn {
				continue
			}
			if !slices.Contains(removed, site) {
				return nil, forbidden("cuts are for the sites that are left out now", "the cut of %s in database %s cannot change in this step", site, db)
			}
			cuts = cuts.with(db, site, lsn)
		}
	}
	return cuts, nil
}

// Check tells whether next may follow old, as every reader must before it acts on next. old is the zero value when
// nothing was written yet. A step over several epochs (a reader that missed values) cannot be judged: start anew.
func Check(old, next Register, k int) error {
	if err := shape(next); err != nil {
		return err
	}
	if next.Epoch != old.Epoch+1 {
		return forbidden("read the register again", "epoch %d does not follow epoch %d", next.Epoch, old.Epoch)
	}
	n := Note{Reason: next.Reason, By: next.By, At: next.At}
	var want Register
	var err error
	added, removed := minus(next.Members, old.Members), minus(old.Members, next.Members)
	switch {
	case old.Epoch == 0:
		want = Initial(next.Members, n.By, n.At)
		want.Reason = n.Reason
	case next.Forced:
		want, err = Force(old, next.Members, next.Cuts, n)
	case len(added) == 1 && len(removed) == 0:
		want, err = Rearm(old, added[0], n)
	case len(added) > 0:
		err = forbidden("one site at a time, and none left out in the same step", "%s cannot become members in one step from %s", list(added), list(old.Members))
	case len(removed) > 0:
		want, err = TakeOver(old, next.Members, k, next.Cuts, n)
	case !old.Settled && next.Settled:
		want, err = Settle(old, next.Cuts, n)
	default:
		want, err = Renew(old, n)
	}
	if err != nil {
		return err
	}
	if !want.Equal(next) {
		return forbidden("was it written by another version or by hand?", "epoch %d is not what follows from epoch %d by any rule", next.Epoch, old.Epoch)
	}
	return nil
}

// shape is what holds for every value.
func shape(r Register) error {
	const hint = "was it written by another version or by hand?"
	switch {
	case r.Epoch == 0:
		return forbidden(hint, "a register has an epoch of at least 1")
	case len(r.Members) == 0 || slices.Contains(r.Members, ""):
		return forbidden(hint, "the register of epoch %d has no members", r.Epoch)
	case !slices.Equal(r.Members, names(r.Members)):
		return forbidden(hint, "the members of epoch %d are not in order", r.Epoch)
	}
	return nil
}

func list(sites []string) string {
	if len(sites) == 1 {
		return "site " + sites[0]
	}
	return "sites " + strings.Join(sites, ", ")
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
