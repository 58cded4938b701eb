package decode

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/wal"
)

// TestRecognise goes through the table "slot identity" of durability.md section 3, and section 10.
func TestRecognise(t *testing.T) {
	want := Expected{SystemID: 7, Timeline: 2, Slot: "duri_app", Start: 40, End: 100, Made: 50, Seen: []wal.Seen{{Site: 2, LSN: 500}}}
	left := func(at wal.LSN) []Switch { return []Switch{{1, 20}, {2, at}} }
	for _, tc := range []struct {
		name   string
		change func(*Observed)
		action Action
		from   wal.LSN
		reason string
	}{
		{"as it was", func(*Observed) {}, Resume, 0, ""},
		{"confirmed exactly", func(o *Observed) { o.Confirmed = 100 }, Resume, 0, ""},
		{"nothing new", func(o *Observed) { o.Flush = 100 }, Resume, 0, ""},
		{"another cluster", func(o *Observed) { o.SystemID = 8 }, Refuse, 0, "another database cluster"},
		{"an older copy, by timeline", func(o *Observed) { o.Timeline = 1 }, Rejoin, 0, "older copy"},

		{"a fail-over that lost", func(o *Observed) { o.Timeline, o.History = 3, left(60) }, GiveBack, 60, ""},
		{"and had applied less", func(o *Observed) { o.Timeline, o.History, o.Restored[0].Applied = 3, left(60), 450 }, GiveBack, 60, ""},
		{"two fail-overs", func(o *Observed) { o.Timeline, o.History = 4, append(left(60), Switch{3, 90}) }, GiveBack, 60, ""},
		{"a fail-over exactly at the end", func(o *Observed) { o.Timeline, o.History, o.Exists = 3, left(100), false }, GiveBack, 100, ""},
		{"what it lost is kept no more", func(o *Observed) { o.Timeline, o.History = 3, left(39) }, Rejoin, 0, "kept from 0/28 on"},
		{"what it had applied is kept no more", func(o *Observed) { o.Timeline, o.History, o.Restored[0].Applied = 3, left(60), 399 }, Rejoin, 0, "site b"},
		{"a fail-over from another timeline", func(o *Observed) { o.Timeline, o.History = 3, []Switch{{1, 60}} }, Rejoin, 0, "does not come from"},
		{"more than it can have", func(o *Observed) {
			o.Timeline, o.History, o.Present, o.PresentKnown = 3, left(60), 70, true
		}, Rejoin, 0, "up to 0/46"},
		{"a fail-over ahead of the journal", func(o *Observed) { o.Timeline, o.History, o.Exists = 3, left(101), false }, Gap, 0, "cannot be decoded"},
		{"with a slot that is on the standby too", func(o *Observed) { o.Timeline, o.History = 3, left(101) }, Continue, 100, ""},
		{"with such a slot, lost", func(o *Observed) { o.Timeline, o.History, o.Lost = 3, left(101), true }, Gap, 0, "cannot be decoded"},

		{"an older copy, by position", func(o *Observed) { o.Flush, o.Present, o.PresentKnown = 99, 80, true }, GiveBack, 80, ""},
		{"an older copy whose WAL has gone on", func(o *Observed) { o.Restored[0].Applied, o.Present, o.PresentKnown = 499, 80, true }, GiveBack, 80, ""},
		{"an older copy of before the slot was made", func(o *Observed) { o.Confirmed, o.Present, o.PresentKnown = 49, 80, true }, GiveBack, 80, ""},
		{"an older copy without the slot", func(o *Observed) { o.Flush, o.Present, o.PresentKnown, o.Exists = 99, 80, true, false }, GiveBack, 80, ""},
		{"an older copy, too old", func(o *Observed) { o.Flush = 99 }, Rejoin, 0, "none of the transactions"},
		{"an older copy, and a copy that is kept no more", func(o *Observed) {
			o.Flush, o.Present, o.PresentKnown, o.Restored[0].Applied = 99, 80, true, 1
		}, Rejoin, 0, "site b"},

		{"dropped", func(o *Observed) { o.Exists, o.Confirmed = false, 0 }, Gap, 0, "does not exist"},
		{"lost", func(o *Observed) { o.Lost = true }, Gap, 0, "max_slot_wal_keep_size"},
		{"created anew", func(o *Observed) { o.Confirmed = 101 }, Gap, 0, "re-created or advanced"},
	} {
		got := Observed{
			Identity: Identity{SystemID: 7, Timeline: 2, Flush: 200, Exists: true, Confirmed: 90},
			Restored: []Restored{{Site: "b", ID: 2, Applied: 500, Kept: 400}},
		}
		tc.change(&got)
		v := Recognise(want, got)
		if v.Action != tc.action || v.From != tc.from {
			t.Errorf("%s: %+v, want %s from %s", tc.name, v, tc.action, tc.from)
		}
		stops := tc.action == Gap || tc.action == Rejoin || tc.action == Refuse
		if stops != (v.Err != nil) || stops && (!strings.Contains(v.Err.Error(), tc.reason) || v.Err.HintText() == "" || v.Err.From != 100) {
			t.Errorf("%s: %v, want a reason with %q", tc.name, v.Err, tc.reason)
		}
	}
}

// TestRecogniseGivesBackOnlyWhatIsKept: whatever is found, streaming goes on only in the database that the journal is of and
// with nothing missing, and a range to give back is whole in the journal, with all that it had seen still in the copies.
func TestRecogniseGivesBackOnlyWhatIsKept(t *testing.T) {
	lsn := func(t *rapid.T, name string) wal.LSN { return wal.LSN(rapid.Uint64Range(0, 12).Draw(t, name)) }
	rapid.Check(t, func(t *rapid.T) {
		want := Expected{SystemID: 1, Timeline: uint32(rapid.IntRange(1, 3).Draw(t, "timeline")), Start: lsn(t, "start"), Seen: []wal.Seen{{Site: 2, LSN: lsn(t, "seen")}}}
		want.End = want.Start + lsn(t, "length")
		got := Observed{
			Identity: Identity{
				SystemID: uint64(rapid.IntRange(1, 2).Draw(t, "system")), Timeline: uint32(rapid.IntRange(1, 4).Draw(t, "now")),
				Flush: lsn(t, "flush"), Exists: rapid.Bool().Draw(t, "slot"), Lost: rapid.Bool().Draw(t, "lost"), Confirmed: lsn(t, "confirmed"),
			},
			Present: lsn(t, "present"), PresentKnown: rapid.Bool().Draw(t, "known"),
			Restored: []Restored{{"b", 2, lsn(t, "applied"), lsn(t, "kept")}},
		}
		for tl := uint32(1); tl < got.Timeline; tl++ {
			if rapid.Bool().Draw(t, "has") {
				got.History = append(got.History, Switch{tl, lsn(t, "switch")})
			}
		}
		switch v := Recognise(want, got); v.Action {
		case Resume:
			if got.SystemID != 1 || got.Timeline != want.Timeline || got.Flush < want.End || !got.Exists || got.Lost || got.Confirmed > want.End || got.Restored[0].Applied < want.Seen[0].LSN {
				t.Fatalf("resumes: %+v", got)
			}
		case Continue:
			if got.SystemID != 1 || got.Timeline <= want.Timeline || !got.Exists || got.Lost || got.Confirmed > want.End {
				t.Fatalf("continues: %+v", got)
			}
		case GiveBack:
			if got.SystemID != 1 || v.From < want.Start || v.From > v.To || v.To != want.End || got.Restored[0].Applied < got.Restored[0].Kept {
				t.Fatalf("gives back %+v: %+v", v, got)
			}
		default:
			if v.Err == nil {
				t.Fatalf("%+v without a reason", v)
			}
		}
	})
}

func TestParseHistory(t *testing.T) {
	got, err := parseHistory("1\t0/3000148\tno recovery target specified\n\n# a comment\n2\t1/A0\tbefore 2000-01-01\n")
	if diff := cmp.Diff([]Switch{{1, 0x3000148}, {2, 0x1000000A0}}, got); err != nil || diff != "" {
		t.Error(err, diff)
	}
	for _, bad := range []string{"x\t0/1\n", "1\n", "1\tzero\n"} {
		if _, err := parseHistory(bad); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}
