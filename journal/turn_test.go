package journal

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/wal"
)

// nextIncarnation is the one after testHeader's, after a fail-over.
func nextIncarnation() Incarnation {
	i := testHeader().Incarnation
	i.Timeline, i.CreatedLSN = 2, 0x9000
	return i
}

// TestTurnGoesOnAsAnotherIncarnation: chain, counts and positions run through, over a reopening too, and a reader of
// transactions does not notice.
func TestTurnGoesOnAsAnotherIncarnation(t *testing.T) {
	fsys := newMemFS()
	j := create(t, fsys, Options{})
	appendAll(t, j, simpleTxn(0), simpleTxn(1))
	must(t, j.Turn(nextIncarnation(), 0x140))
	ended := simpleTxn(1).EndLSN
	if j.Durable() != ended {
		t.Errorf("durable up to %s, want %s", j.Durable(), ended)
	}
	appendAll(t, j, simpleTxn(2))
	must(t, j.Close())

	j = open(t, fsys, Options{})
	want := []Turn{{Incarnation: testHeader().Incarnation, Back: 0x140, End: ended}}
	if got := j.Current(); got.Incarnation != nextIncarnation() || cmp.Diff(want, got.Turns) != "" || got.From != ended {
		t.Errorf("goes on as %s with %+v", got, got.Turns)
	}
	if got := j.Header(); got.Incarnation != testHeader().Incarnation || got.Turns != nil {
		t.Errorf("the oldest file is of %s", got)
	}
	all, err := readAll(j, 0x100)
	must(t, err)
	if len(all) != 3 {
		t.Errorf("%d transactions are read, want 3", len(all))
	}
	must(t, j.Close())
	plain := create(t, newMemFS(), Options{})
	defer plain.Close()
	appendAll(t, plain, simpleTxn(0), simpleTxn(1), simpleTxn(2))
	st, err := Verify(t.Context(), "dir", small(Options{}, fsys))
	must(t, err)
	if st.Chain != plain.State().Chain || st.Txns != 3 {
		t.Errorf("chain %s over %d transactions, want %s over 3", st.Chain, st.Txns, plain.State().Chain)
	}
}

// TestTurnAtOnceAgain: a turn where nothing was appended since the file began.
func TestTurnAtOnceAgain(t *testing.T) {
	j := create(t, newMemFS(), Options{})
	defer j.Close()
	for n := range uint32(3) {
		next := nextIncarnation()
		next.Timeline += n
		must(t, j.Turn(next, j.End()))
	}
	turns := j.Current().Turns
	if len(turns) != 3 || turns[0].End >= turns[1].End || turns[1].End >= turns[2].End || turns[2].Timeline != 3 {
		t.Errorf("%+v", turns)
	}
}

// follow copies everything, turns included.
func follow(t failer, from, to *Journal, maxBytes int) {
	t.Helper()
	for to.End() < from.End() || to.Current().Incarnation != from.Current().Incarnation {
		if h, err := from.HeaderAt(to.End()); err != nil || h.Incarnation != to.Current().Incarnation {
			must(t, err)
			must(t, to.Follow(h))
			continue
		}
		r, err := from.NewReader(to.End())
		must(t, err)
		for to.End() < from.End() {
			f, err := r.NextFrames(context.Background(), maxBytes)
			if errors.Is(err, ErrTurned) {
				break
			}
			must(t, err)
			must(t, to.AppendFrames(f.Data))
		}
		must(t, r.Close())
	}
}

// TestCopyFollowsTurns: a copy, fed in any portions, turns where its origin did, and holds the same.
func TestCopyFollowsTurns(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := Options{SegmentBytes: rapid.Int64Range(1, 5000).Draw(t, "segment")}
		a, b := create(t, newMemFS(), o), create(t, newMemFS(), Options{SegmentBytes: rapid.Int64Range(1, 5000).Draw(t, "segment of the copy")})
		defer a.Close()
		defer b.Close()
		for n := range uint32(rapid.IntRange(1, 4).Draw(t, "turns")) {
			for _, txn := range genTxns(t, a.End(), rapid.IntRange(0, 4).Draw(t, "n")) {
				appendAll(t, a, txn)
			}
			next := nextIncarnation()
			next.Timeline += n
			must(t, a.Turn(next, a.Start()))
			must(t, a.Flush())
			if rapid.Bool().Draw(t, "copy now") {
				follow(t, a, b, rapid.IntRange(1, 5000).Draw(t, "portion"))
			}
		}
		follow(t, a, b, rapid.IntRange(1, 5000).Draw(t, "portion"))
		x, y := a.State(), b.State()
		if x.Chain != y.Chain || x.Txns != y.Txns || x.End != y.End || cmp.Diff(a.Current().Turns, b.Current().Turns) != "" {
			t.Fatalf("the copy differs: %+v, %+v", x, y)
		}
	})
}

// TestFollowRefusesWhatDoesNotContinueTheCopy: one that has more, less or other transactions than the origin had when it
// turned, or was at another incarnation, stays what it is.
func TestFollowRefusesWhatDoesNotContinueTheCopy(t *testing.T) {
	for name, c := range map[string]struct {
		txns   []*wal.Txn
		spoil  func(*Header)
		reason string
	}{
		"it has less":         {[]*wal.Txn{simpleTxn(0)}, nil, "this copy ends at"},
		"it has more":         {[]*wal.Txn{simpleTxn(0), simpleTxn(1), simpleTxn(2)}, nil, "this copy ends at"},
		"it has others":       {[]*wal.Txn{simpleTxn(1)}, nil, "other transactions"},
		"another incarnation": {[]*wal.Txn{simpleTxn(0), simpleTxn(1)}, func(h *Header) { h.Turns[0].Timeline = 9 }, "does not continue"},
		"another past":        {[]*wal.Txn{simpleTxn(0), simpleTxn(1)}, func(h *Header) { h.Turns = append([]Turn{{}}, h.Turns...) }, "does not continue"},
		"another site":        {[]*wal.Txn{simpleTxn(0), simpleTxn(1)}, func(h *Header) { h.Site = 2 }, "does not continue"},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := create(t, newMemFS(), Options{}), create(t, newMemFS(), Options{})
			defer a.Close()
			defer b.Close()
			appendAll(t, a, simpleTxn(0), simpleTxn(1))
			must(t, a.Turn(nextIncarnation(), 0x140))
			appendAll(t, b, c.txns...)
			h := a.Current()
			if c.spoil != nil {
				c.spoil(&h)
			}
			var refused *TurnError
			if err := b.Follow(h); !errors.As(err, &refused) || !strings.Contains(refused.Reason, c.reason) {
				t.Errorf("%v, want a refusal because %s", err, c.reason)
			}
			if b.Current().Incarnation != testHeader().Incarnation {
				t.Error("the copy turned")
			}
			appendAll(t, b, simpleTxn(9)) // and is still good
		})
	}
}
