package conflict

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/duri-io/duri/wal"
)

// at makes a version of the incoming site 1 or the other site 2.
func at(t wal.Time, site wal.SiteID) wal.Version { return wal.Version{Time: t, Site: site} }

func TestDecide(t *testing.T) {
	const site, other, third = 1, 2, 3
	v := at(20, site)
	live, deleted := Live, Deleted
	for _, tc := range []struct {
		name  string
		op    wal.Op
		state State
		want  Decision
	}{
		{"insert on nothing", wal.Insert, State{}, Decision{Apply: true}},
		{"update on nothing", wal.Update, State{}, Decision{true, UpdateMissing, Won}},
		{"delete on nothing", wal.Delete, State{}, Decision{true, DeleteMissing, AsSent}},

		{"insert on an older row", wal.Insert, State{Existence: live, Version: at(10, other), Seen: false}, Decision{true, InsertExists, Won}},
		{"insert on a newer row", wal.Insert, State{Existence: live, Version: at(30, other), Seen: false}, Decision{false, InsertExists, Lost}},
		{"update on an older row", wal.Update, State{Existence: live, Version: at(10, other), Seen: false}, Decision{true, UpdateOriginDiffers, Won}},
		{"update on a newer row", wal.Update, State{Existence: live, Version: at(30, other), Seen: false}, Decision{false, UpdateOriginDiffers, Lost}},
		{"delete on an older row", wal.Delete, State{Existence: live, Version: at(10, other), Seen: false}, Decision{true, DeleteOriginDiffers, Won}},
		{"delete on a newer row", wal.Delete, State{Existence: live, Version: at(30, other), Seen: false}, Decision{false, DeleteOriginDiffers, Lost}},

		{"insert on an older tombstone", wal.Insert, State{Existence: deleted, Version: at(10, other), Seen: false}, Decision{true, UpdateDeleted, Won}},
		{"insert on a newer tombstone", wal.Insert, State{Existence: deleted, Version: at(30, other), Seen: false}, Decision{false, UpdateDeleted, Lost}},
		{"update on an older tombstone", wal.Update, State{Existence: deleted, Version: at(10, other), Seen: false}, Decision{true, UpdateDeleted, Won}},
		{"update on a newer tombstone", wal.Update, State{Existence: deleted, Version: at(30, other), Seen: false}, Decision{false, UpdateDeleted, Lost}},
		{"delete on an older tombstone", wal.Delete, State{Existence: deleted, Version: at(10, other), Seen: false}, Decision{true, DeleteMissing, Won}},
		{"delete on a newer tombstone", wal.Delete, State{Existence: deleted, Version: at(30, other), Seen: false}, Decision{false, DeleteMissing, Lost}},

		{"the same microsecond, this site higher", wal.Update, State{Existence: live, Version: at(20, 0), Seen: false}, Decision{true, UpdateOriginDiffers, Won}},
		{"the same microsecond, that site higher", wal.Update, State{Existence: live, Version: at(20, other), Seen: false}, Decision{false, UpdateOriginDiffers, Lost}},

		{"the origin's own row", wal.Update, State{Existence: live, Version: at(10, site), Seen: false}, Decision{Apply: true}},
		{"the origin's own row, same transaction", wal.Delete, State{Existence: live, Version: at(20, site), Seen: false}, Decision{Apply: true}},
		{"the origin's own tombstone", wal.Insert, State{Existence: deleted, Version: at(20, site), Seen: false}, Decision{Apply: true}},
		{"the origin's own row under a batch's later stamp", wal.Update, State{Existence: live, Version: at(25, site), Seen: false}, Decision{Apply: true}},

		{"a row that the change has seen", wal.Update, State{Existence: live, Version: at(10, other), Seen: true}, Decision{Apply: true}},
		{"a row beyond the horizon that the change has seen", wal.Update, State{Existence: live, Version: wal.Version{}, Seen: true}, Decision{Apply: true}},
		{"a tombstone that the change has seen", wal.Insert, State{Existence: deleted, Version: at(10, third), Seen: true}, Decision{Apply: true}},
		{"its own successor is here", wal.Insert, State{Existence: live, Version: at(30, other), Saw: true}, Decision{false, None, Superseded}},
		{"its own successor was a delete", wal.Insert, State{Existence: deleted, Version: at(30, third), Saw: true}, Decision{false, None, Superseded}},
		{"an update before the row it updates", wal.Update, State{Behind: true}, Decision{Apply: true}},
		{"a delete before the row it deletes", wal.Delete, State{Behind: true}, Decision{Apply: true}},
		{"seen and yet newer", wal.Update, State{Existence: live, Version: at(30, other), Seen: true}, Decision{false, None, Superseded}},
	} {
		if got := Decide(tc.op, v, tc.state); got != tc.want {
			t.Errorf("%s: got %+v, want %+v", tc.name, got, tc.want)
		}
	}
}

// change is one change of a key in a site's stream.
type change struct {
	op wal.Op
	v  wal.Version
}

// merge applies a change to a register as the applier does.
func merge(s State, c change) State {
	if d := Decide(c.op, c.v, s); !d.Apply {
		return s
	}
	next := State{Existence: Live, Version: c.v}
	if c.op == wal.Delete {
		next.Existence = Deleted
	}
	return next
}

// streams draws what up to three sites did to one key: versions of a site never decrease (rule 3).
func streams(t *rapid.T) [][]change {
	all := make([][]change, rapid.IntRange(2, 3).Draw(t, "sites"))
	for i := range all {
		now := wal.Time(0)
		for range rapid.IntRange(0, 5).Draw(t, "changes") {
			now += wal.Time(rapid.IntRange(1, 4).Draw(t, "pause"))
			op := rapid.SampledFrom([]wal.Op{wal.Insert, wal.Update, wal.Delete}).Draw(t, "op")
			all[i] = append(all[i], change{op, at(now, wal.SiteID(i+1))})
		}
	}
	return all
}

// interleave draws an arrival order that keeps each site's own.
func interleave(t *rapid.T, all [][]change, label string) (out []change) {
	rest := append([][]change{}, all...)
	for {
		var open []int
		for i := range rest {
			if len(rest[i]) > 0 {
				open = append(open, i)
			}
		}
		if len(open) == 0 {
			return out
		}
		i := rapid.SampledFrom(open).Draw(t, label)
		out, rest[i] = append(out, rest[i][0]), rest[i][1:]
	}
}

// TestRegisterDoesNotDependOnArrivalOrder: whatever order the sites' changes arrive in, the register ends as the change
// of the greatest version left it.
func TestRegisterDoesNotDependOnArrivalOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := streams(t)
		var greatest change
		for _, changes := range all {
			for _, c := range changes {
				if greatest.v.Less(c.v) {
					greatest = c
				}
			}
		}
		want := State{}
		if greatest.op != 0 {
			want = merge(State{}, greatest)
		}
		for _, label := range []string{"order", "other order"} {
			var s State
			for _, c := range interleave(t, all, label) {
				s = merge(s, c)
			}
			if s != want {
				t.Fatalf("register %+v, want %+v", s, want)
			}
		}
	})
}

// TestLosersAreTold: an outcome that is not as sent always has a code, and a truly concurrent one a kind, so that rule
// 16 finds something to record.
func TestLosersAreTold(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		op := rapid.SampledFrom([]wal.Op{wal.Insert, wal.Update, wal.Delete}).Draw(t, "op")
		v := at(wal.Time(rapid.IntRange(0, 5).Draw(t, "v")), wal.SiteID(rapid.IntRange(1, 3).Draw(t, "site")))
		s := State{
			Existence: rapid.SampledFrom([]Existence{Live, Deleted}).Draw(t, "existence"),
			Version:   at(wal.Time(rapid.IntRange(0, 5).Draw(t, "sv")), wal.SiteID(rapid.IntRange(1, 3).Draw(t, "ssite"))),
			Seen:      rapid.Bool().Draw(t, "seen"),
		}
		d := Decide(op, v, s)
		switch {
		case !d.Apply && d.Code != Lost && d.Code != Superseded:
			t.Fatalf("%+v on %+v is dropped without a trace: %+v", v, s, d)
		case !s.Seen && s.Version.Site != v.Site && d.Kind == None:
			t.Fatalf("%+v on %+v is concurrent, but no conflict: %+v", v, s, d)
		case s.Seen && d.Kind != None:
			t.Fatalf("%+v has seen %+v, and yet a conflict: %+v", v, s, d)
		case d.Apply && s.Version.Site != v.Site && v.Less(s.Version):
			t.Fatalf("older %+v wins over %+v", v, s)
		}
	})
}
