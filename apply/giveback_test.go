package apply

import (
	"testing"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/wal"
)

// ownPast are own transactions that end at 100, 200, ..., numbered 1, 2, ...
func ownPast(t *testing.T, l *History, ends ...wal.LSN) {
	t.Helper()
	for _, end := range ends {
		n := uint32(end / 100)
		if err := l.Add(&wal.Txn{Origin: 1, XID: n, EndLSN: end, CommitTime: wal.Time(n), VersionTime: wal.Time(n)}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNumbersThatWereLostAreOthers: after the database was set back, a transaction number beyond that says nothing of the one
// that had it; the one that gives it back does.
func TestNumbersThatWereLostAreOthers(t *testing.T) {
	l := NewHistory(1, 0, NewKeys("", ""))
	ownPast(t, l, 100, 200, 300)
	l.Advance(450)
	if err := l.takeSnapshot([][]byte{[]byte("9"), []byte("0/64")}); err != nil {
		t.Fatal(err)
	}
	if err := l.SetBack(100, 300); err != nil {
		t.Fatal(err)
	}
	if l.Position() != 300 {
		t.Errorf("reading goes on at %s, want 0/12C", l.Position())
	}
	if _, ok := l.decodedBelow(); ok {
		t.Error("what is decoded of the numbers that were lost counts")
	}
	if p, ok := l.lookup(1); !ok || p.end != 100 {
		t.Errorf("what was not lost is not known: %+v", p)
	}
	for _, xid := range []uint32{2, 3} {
		if p, ok := l.lookup(xid); ok {
			t.Errorf("number %d still names %+v", xid, p)
		}
	}
	l.Rename(3, 200) // a number that another one had
	if p, ok := l.lookup(3); !ok || p.end != 200 || p.made != (wal.Version{Time: 2, Site: 1}) {
		t.Errorf("given back as %+v", p)
	}
	l.Rename(7, 999) // of one that every site has seen
	if _, ok := l.lookup(7); ok {
		t.Error("a transaction that is not known has a number")
	}
	if p, ok := l.writer(55, 3); !ok || p.end != 300 {
		t.Errorf("what is not given back yet is not found by its time: %+v", p)
	}
	l.Prune(300, wal.Time(1<<50))
	if _, ok := l.lookup(3); ok {
		t.Error("the number outlives its transaction")
	}
}

func TestSetBackRefusesWhatIsNotInTheJournal(t *testing.T) {
	l := NewHistory(1, 0, NewKeys("", ""))
	ownPast(t, l, 100, 200)
	if err := l.SetBack(50, 150); err == nil {
		t.Error("a transaction beyond the journal's end was taken")
	}
}

// TestGivenBackMeetsOnlyWhatCameAfterTheTurn: own transactions of the range are the past or the future of one that is given
// back, and no rivals; those that the database made itself meanwhile are, and are newer.
func TestGivenBackMeetsOnlyWhatCameAfterTheTurn(t *testing.T) {
	m := NewMesh(NewHistory(1, 0, NewKeys("", "")), nil)
	m.GiveBack(300)
	own := func(end wal.LSN) past { return past{end: end, made: wal.Version{Time: wal.Time(end), Site: 1}} }
	for _, c := range []struct {
		p      past
		origin wal.SiteID
		rival  bool
	}{
		{own(200), 1, false},
		{own(300), 1, false},
		{own(301), 1, true},
		{own(200), 2, true},
		{past{end: 200, made: wal.Version{Site: 2}}, 1, true},
	} {
		if got := m.rival(c.p, c.origin); got != c.rival {
			t.Errorf("%+v for site %d: %t", c.p, c.origin, got)
		}
	}
	r := &ref{op: wal.Update, txn: &wal.Txn{Origin: 1, EndLSN: 200, VersionTime: 200}}
	live := func(end wal.LSN) held {
		return held{State: conflict.State{Existence: conflict.Live, Version: wal.Version{Time: wal.Time(end), Site: 1}}, end: end}
	}
	for _, c := range []struct {
		end   wal.LSN
		apply bool
	}{{100, true}, {0, true}, {ownRow, true}, {400, false}} {
		h := live(c.end)
		d := conflict.Decide(wal.Update, r.txn.Version(), h.toward(r))
		if d.Apply != c.apply || d.Kind != conflict.None {
			t.Errorf("over a row of the transaction that ends at %s: %+v", c.end, d)
		}
	}
}
