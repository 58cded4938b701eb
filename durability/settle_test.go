package durability

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/wal"
)

func TestExchanged(t *testing.T) {
	word := func(secured bool, x, y wal.LSN) Word {
		return Word{secured, map[string]wal.LSN{"x": x, "y": y}}
	}
	for _, c := range []struct {
		name   string
		out    []string
		words  []Word
		counts map[string]wal.LSN
		want   bool
	}{
		{"all have the same", []string{"x"}, []Word{word(true, 7, 0), word(true, 7, 0)}, map[string]wal.LSN{"x": 7}, true},
		{"one is behind", []string{"x"}, []Word{word(true, 7, 0), word(true, 6, 0)}, map[string]wal.LSN{"x": 7}, false},
		{"one has none of it", []string{"x"}, []Word{word(true, 7, 0), {true, nil}}, map[string]wal.LSN{"x": 7}, false},
		{"nobody has any", []string{"x"}, []Word{word(true, 0, 0), {true, nil}}, map[string]wal.LSN{"x": 0}, true},
		{"each is ahead with one of two", []string{"x", "y"}, []Word{word(true, 7, 3), word(true, 6, 4)}, map[string]wal.LSN{"x": 7, "y": 4}, false},
		{"what a member has of a member does not matter", []string{"x"}, []Word{word(true, 7, 1), word(true, 7, 2)}, map[string]wal.LSN{"x": 7}, true},
		{"one's own are not secured", []string{"x"}, []Word{word(true, 7, 0), word(false, 7, 0)}, map[string]wal.LSN{"x": 7}, false},
	} {
		counts := Furthest(c.out, c.words)
		if d := cmp.Diff(c.counts, counts); d != "" || Exchanged(counts, c.words) != c.want {
			t.Errorf("%s: %v, exchanged %t; want %v, %t", c.name, counts, !c.want, c.counts, c.want)
		}
	}
}

func TestNeeds(t *testing.T) {
	for _, c := range []struct {
		have, cut, want wal.LSN
		isCut           bool
	}{{7, 0, 7, false}, {7, 5, 5, true}, {5, 7, 5, true}} {
		if got := Needs(c.have, c.cut, c.isCut); got != c.want {
			t.Errorf("have %s, cut %s (%t): %s, want %s", c.have, c.cut, c.isCut, got, c.want)
		}
	}
}

// TestSettledIsHeldByEveryMember: whenever an epoch's register may be settled, every member holds all that a lost site had
// receipts for, and each member's own acknowledged transactions are at as many others as the members ask for; whatever is
// still on its way, and although members speak and are heard at different times.
func TestSettledIsHeldByEveryMember(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const lost = "x"
		members := []string{"a", "b", "c"}[:rapid.IntRange(2, 3).Draw(t, "members")]
		k := rapid.IntRange(1, 2).Draw(t, "receipts")
		lsn := rapid.Map(rapid.IntRange(0, 9), func(n int) wal.LSN { return wal.LSN(n) })
		has := map[string]map[string]wal.LSN{} // by member and origin: durable
		for _, m := range members {
			has[m] = map[string]wal.LSN{lost: lsn.Draw(t, "of the lost site")}
			for _, o := range members {
				has[m][o] = lsn.Draw(t, "of a member")
			}
		}
		acked := map[string]wal.LSN{lost: 0} // what may have been acknowledged before the epoch
		for _, m := range members {
			acked[lost] = max(acked[lost], has[m][lost])
			acked[m] = has[m][m]
			for _, o := range members {
				has[o][m] = min(has[o][m], has[m][m])
			}
		}
		standing := func(self string) Standing {
			return Standing{Epoch: 2, Member: true, Members: len(members), Others: without(members, []string{self})}
		}
		receipts := func(self string) (all []Receipt) {
			for _, o := range without(members, []string{self}) {
				all = append(all, Receipt{o, 2, Progress{has[o][self], has[o][self], has[o][self]}})
			}
			return all
		}
		said, counts := map[string]map[string]Word{}, map[string]map[string]wal.LSN{} // by who heard it
		for range 60 {
			m := rapid.SampledFrom(members).Draw(t, "who")
			switch rapid.IntRange(0, 2).Draw(t, "what") {
			case 0: // something arrives, from the lost site too, as far as any has it or beyond
				o := rapid.SampledFrom(append([]string{lost}, members...)).Draw(t, "of")
				most := has[o][o]
				if o == lost {
					most = 12
				}
				has[m][o] = max(has[m][o], min(most, has[m][o]+rapid.SampledFrom([]wal.LSN{1, 3}).Draw(t, "more")))
			case 1: // it speaks, and another one hears it
				to := rapid.SampledFrom(members).Draw(t, "to")
				if said[to] == nil {
					said[to] = map[string]Word{}
				}
				said[to][m] = Word{Secured(acked[m], receipts(m), standing(m), k), map[string]wal.LSN{lost: has[m][lost]}}
			case 2: // it looks whether the register may be settled
				if len(said[m]) < len(members) {
					continue
				}
				var words []Word
				for _, w := range said[m] {
					words = append(words, w)
				}
				if counts[m] == nil {
					counts[m] = Furthest([]string{lost}, words)
				}
				if !Exchanged(counts[m], words) {
					continue
				}
				for _, h := range members {
					if at := counts[m][lost]; at < acked[lost] || has[h][lost] < acked[lost] || has[h][lost] < at {
						t.Fatalf("settled at %s, and %s has %s of %s", at, h, has[h][lost], acked[lost])
					}
					holders := slices.DeleteFunc(without(members, []string{h}), func(o string) bool { return has[o][h] < acked[h] })
					if len(holders) < min(k, len(members)-1) {
						t.Fatalf("settled, and what %s acknowledged is only at %v", h, holders)
					}
				}
			}
		}
	})
}
