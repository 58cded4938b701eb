package durability

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/duri-io/duri/wal"
)

func TestReport(t *testing.T) {
	own := Progress{30, 20, 0}
	at := func(site string, epoch uint64, r, d, a wal.LSN) Receipt {
		return Receipt{site, epoch, Progress{r, d, a}}
	}
	two := Standing{Epoch: 3, Member: true, Others: []string{"b"}, Members: 2}
	three := Standing{Epoch: 3, Member: true, Others: []string{"b", "c"}, Members: 3}
	solo := Standing{Epoch: 3, Member: true, Members: 1}
	frozen := Standing{Epoch: 3, Member: true, Members: 2}
	arming := Standing{Epoch: 3, Member: true, Members: 1, Arming: []string{"b"}}
	cases := []struct {
		name     string
		receipts []Receipt
		standing Standing
		required int
		want     Progress
		ok       bool
	}{
		{"the other site's receipt", []Receipt{at("b", 3, 25, 15, 5)}, two, 1, Progress{25, 15, 5}, true},
		{"the own fsync is behind", []Receipt{at("b", 3, 30, 30, 30)}, two, 1, Progress{30, 20, 20}, true},
		{"none yet", nil, two, 1, Progress{}, false},
		{"of another epoch", []Receipt{at("b", 2, 25, 15, 5)}, two, 1, Progress{}, false},
		{"of a site that is no member", []Receipt{at("c", 3, 25, 15, 5)}, two, 1, Progress{}, false},
		{"frozen", []Receipt{at("b", 3, 25, 15, 5)}, frozen, 1, Progress{}, false},
		{"no member", []Receipt{at("b", 3, 25, 15, 5)}, Standing{Epoch: 3, Others: []string{"b"}, Members: 1}, 1, Progress{}, false},
		{"the faster of two", []Receipt{at("b", 3, 25, 5, 5), at("c", 3, 10, 10, 10)}, three, 1, Progress{25, 10, 10}, true},
		{"both of two", []Receipt{at("b", 3, 25, 5, 5), at("c", 3, 10, 10, 10)}, three, 2, Progress{10, 5, 5}, true},
		{"alone on record", nil, solo, 1, Progress{30, 20, 20}, true},
		{"alone, and waiting for who returns", []Receipt{at("b", 3, 25, 15, 5)}, arming, 1, Progress{25, 15, 5}, true},
		{"who returns has not answered", nil, arming, 1, Progress{}, false},
		{"none is required", []Receipt{at("b", 3, 1, 1, 1)}, two, 0, Progress{30, 20, 20}, true},
	}
	for _, c := range cases {
		if got, ok := Report(own, c.receipts, c.standing, c.required); got != c.want || ok != c.ok {
			t.Errorf("%s: %+v, %t; want %+v, %t", c.name, got, ok, c.want, c.ok)
		}
	}
}

// TestReportedIsHeld: what is reported as flushed is fsynced here and at as many other members as required.
func TestReportedIsHeld(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		lsn := rapid.Map(rapid.IntRange(0, 20), func(n int) wal.LSN { return wal.LSN(n) })
		progress := func(what string) Progress {
			p := []wal.LSN{lsn.Draw(t, what), lsn.Draw(t, what), lsn.Draw(t, what)}
			slices.Sort(p)
			return Progress{p[2], p[1], p[0]}
		}
		names := []string{"b", "c", "d", "e"}
		s := Standing{Epoch: 2, Member: true, Members: 1}
		var receipts []Receipt
		for _, n := range names {
			switch rapid.IntRange(0, 3).Draw(t, "standing") {
			case 0, 1:
				s.Others, s.Members = append(s.Others, n), s.Members+1
			case 2:
				s.Members++ // frozen
			}
			if rapid.Bool().Draw(t, "answered") {
				receipts = append(receipts, Receipt{n, rapid.Uint64Range(1, 2).Draw(t, "epoch"), progress(n)})
			}
		}
		own, required := progress("own"), rapid.IntRange(0, 3).Draw(t, "required")
		got, ok := Report(own, receipts, s, required)
		if !ok {
			return
		}
		if got.Durable > own.Durable || got.Applied > got.Durable || got.Received > own.Received {
			t.Fatalf("%+v is beyond the own %+v", got, own)
		}
		holders := 0
		for _, r := range receipts {
			if r.Epoch == s.Epoch && slices.Contains(s.Others, r.Site) && r.Durable >= got.Durable {
				holders++
			}
		}
		if holders < min(required, s.Members-1) {
			t.Fatalf("%d sites hold %s, %d are required of %d members", holders, got.Durable, required, s.Members)
		}
	})
}
