package journal

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/duri-io/duri/wal"
)

// TestChainIsAFunctionOfTheTransactionsOnly is J1: files, chunks, schema records, keepalives, received times and seen
// positions differ between the two copies, the chain does not.
func TestChainIsAFunctionOfTheTransactionsOnly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		txns := genTxns(t, 0x100, rapid.IntRange(1, 6).Draw(t, "n"))
		a := create(t, newMemFS(), Options{SegmentBytes: rapid.Int64Range(1, 5000).Draw(t, "segment a")})
		defer a.Close()
		appendAll(t, a, txns...)

		b := create(t, newMemFS(), Options{SegmentBytes: rapid.Int64Range(1, 5000).Draw(t, "segment b")})
		defer b.Close()
		for _, txn := range txns {
			if rapid.Bool().Draw(t, "keepalive") {
				must(t, b.AppendPosition(b.End()+1, genSeen(t), 7))
			}
			if rapid.Bool().Draw(t, "seal") {
				must(t, b.Sync())
			}
			again := *txn
			again.Received, again.Seen = txn.Received+5, genSeen(t)
			appendAll(t, b, &again)
		}
		c := create(t, newMemFS(), Options{SegmentBytes: rapid.Int64Range(1, 5000).Draw(t, "segment c")})
		defer c.Close()
		copyFrames(t, b, c, rapid.IntRange(1, 5000).Draw(t, "batch"))
		for _, other := range []*Journal{b, c} {
			x, y := a.State(), other.State()
			if x.Chain != y.Chain || x.Txns != y.Txns || x.Bytes != y.Bytes || x.MaxVersionTime != y.MaxVersionTime {
				t.Fatalf("chain %s, other copy %s", x.Chain, y.Chain)
			}
		}
	})
}

func TestChainDoesNotDependOnChunks(t *testing.T) {
	c := newChainer()
	data := []byte("some entries of changes")
	want, _ := c.link(Chain{1}, [][]byte{data}, []byte("core"))
	for i := range data {
		if have, _ := c.link(Chain{1}, [][]byte{data[:i], data[i:]}, []byte("core")); have != want {
			t.Fatalf("cut at %d", i)
		}
	}
	if have, _ := c.link(Chain{2}, [][]byte{data}, []byte("core")); have == want {
		t.Fatal("the value before does not count")
	}
}

func TestChainTellsEveryChainedFieldApart(t *testing.T) {
	chain := func(spoil func(*wal.Txn)) Chain {
		j := create(t, newMemFS(), Options{})
		defer j.Close()
		txn := simpleTxn(0)
		spoil(txn)
		appendAll(t, j, txn)
		return j.State().Chain
	}
	want := chain(func(*wal.Txn) {})
	for name, spoil := range map[string]func(*wal.Txn){
		"xid":          func(x *wal.Txn) { x.XID++ },
		"commit LSN":   func(x *wal.Txn) { x.CommitLSN-- },
		"end LSN":      func(x *wal.Txn) { x.EndLSN++ },
		"commit time":  func(x *wal.Txn) { x.CommitTime++ },
		"version time": func(x *wal.Txn) { x.VersionTime++ },
		"value":        func(x *wal.Txn) { x.Changes[0].New[0].Data = []byte("1") },
		"value kind":   func(x *wal.Txn) { x.Changes[0].New[2].Kind = wal.Unchanged },
		"old value":    func(x *wal.Txn) { x.Changes[1].Old[0].Data = []byte("8") },
		"order":        func(x *wal.Txn) { slices.Reverse(x.Changes) },
		"missing":      func(x *wal.Txn) { x.Changes = x.Changes[:2] },
	} {
		if chain(spoil) == want {
			t.Errorf("%s does not count", name)
		}
	}
	for name, spoil := range map[string]func(*wal.Txn){
		"received": func(x *wal.Txn) { x.Received++ },
		"seen":     func(x *wal.Txn) { x.Seen = nil },
	} {
		if chain(spoil) != want {
			t.Errorf("%s counts", name)
		}
	}
}

func TestCopyOfACopyHoldsTheSame(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		txns := genTxns(t, 0x100, rapid.IntRange(1, 8).Draw(t, "n"))
		o := func(label string) Options {
			return Options{SegmentBytes: rapid.Int64Range(1, 20000).Draw(t, label)}
		}
		a, b, c := create(t, newMemFS(), o("a")), create(t, newMemFS(), o("b")), create(t, newMemFS(), o("c"))
		defer a.Close()
		defer b.Close()
		defer c.Close()
		for i, txn := range txns {
			appendAll(t, a, txn)
			if i%3 == 0 {
				copyFrames(t, a, b, rapid.IntRange(1, 3000).Draw(t, "batch"))
			}
		}
		copyFrames(t, a, b, 1<<20)
		copyFrames(t, b, c, 1000)
		have, err := readAll(c, 0x100)
		if err == nil {
			must(t, c.Flush())
			have, err = readAll(c, 0x100)
		}
		must(t, err)
		if d := diffTxns(txns, have); d != "" {
			t.Fatal(d)
		}
	})
}

// framesOf returns each record of j, with the schemas it needs, as frames of its own.
func framesOf(t *testing.T, j *Journal, from wal.LSN) (out []Frames) {
	t.Helper()
	must(t, j.Flush())
	r, err := j.NewReader(from)
	must(t, err)
	defer r.Close()
	for at := from; at < j.End(); {
		f, err := r.NextFrames(context.Background(), 1)
		must(t, err)
		out, at = append(out, f), f.To
	}
	return out
}

func TestGapIsRefusedAndRepetitionDropped(t *testing.T) {
	j := create(t, newMemFS(), Options{})
	defer j.Close()
	for i := range 4 {
		appendAll(t, j, simpleTxn(i))
	}
	frames := framesOf(t, j, 0x100)
	if len(frames) != 4 || frames[2].Txns != 1 || frames[2].From != simpleTxn(1).EndLSN || frames[2].To != simpleTxn(2).EndLSN {
		t.Fatalf("frames %v", frames)
	}
	to := create(t, newMemFS(), Options{})
	defer to.Close()
	must(t, to.AppendFrames(frames[0].Data))
	before := to.State()
	var gap *GapError
	err := to.AppendFrames(frames[2].Data)
	if !errors.As(err, &gap) || !errors.Is(err, ErrGap) || gap.End != simpleTxn(0).EndLSN || gap.From != simpleTxn(1).EndLSN {
		t.Fatalf("gap: %v", err)
	}
	if to.State().Chain != before.Chain || to.End() != before.End {
		t.Fatal("a refused record left a trace")
	}
	must(t, to.AppendFrames(frames[1].Data))
	size := to.pos()
	must(t, to.AppendFrames(frames[1].Data))
	must(t, to.AppendFrames(frames[0].Data))
	if to.pos() != size {
		t.Fatal("a repeated record was appended again")
	}
	must(t, to.AppendFrames(frames[2].Data))
	must(t, to.AppendFrames(frames[3].Data))
	if to.State().Chain != j.State().Chain {
		t.Fatal("chains differ")
	}
	if err := to.AppendFrames(appendPosition(nil, Position{From: 0x900, To: 0x950})); !errors.Is(err, ErrGap) {
		t.Fatalf("position beyond the end: %v", err)
	}
	must(t, to.AppendFrames(appendPosition(nil, Position{From: 0x100, To: 0x950}))) // overlaps from below
	if to.End() != 0x950 {
		t.Fatalf("end %s", to.End())
	}
}

func TestSealTellsDifferentHistoriesApart(t *testing.T) {
	j, other := create(t, newMemFS(), Options{}), create(t, newMemFS(), Options{})
	defer j.Close()
	defer other.Close()
	appendAll(t, j, simpleTxn(0))
	altered := simpleTxn(0)
	altered.Changes[0].New[1].Data = []byte("99.99")
	appendAll(t, other, altered)
	j.appendSeal()
	must(t, j.Flush())
	seal := appendSeal(nil, &j.in.at, 0)
	var chain *ChainError
	if err := other.AppendFrames(seal); !errors.As(err, &chain) || !errors.Is(err, ErrChain) || chain.At != simpleTxn(0).EndLSN {
		t.Fatalf("seal of another history: %v", err)
	}
	if err := other.AppendFrames(appendSeal(nil, &tally{to: 0x900}, 0)); !errors.Is(err, ErrGap) {
		t.Fatalf("seal beyond the end: %v", err)
	}
	must(t, other.AppendFrames(appendSeal(nil, &tally{to: 0x100}, 0))) // below the end: repeated, dropped
	copyTo := create(t, newMemFS(), Options{})
	defer copyTo.Close()
	copyFrames(t, j, copyTo, 1000)
	must(t, copyTo.AppendFrames(seal))
}

func TestDamagedFramesAreRefused(t *testing.T) {
	j := create(t, newMemFS(), Options{})
	defer j.Close()
	appendAll(t, j, simpleTxn(0), simpleTxn(1))
	good := framesOf(t, j, 0x100)[0].Data
	to := create(t, newMemFS(), Options{})
	defer to.Close()
	for i := range good {
		bad := slices.Clone(good)
		bad[i] ^= 0x40
		var form *FormatError
		if err := to.AppendFrames(bad); !errors.As(err, &form) {
			t.Fatalf("byte %d: %v", i, err)
		}
		if i > 0 {
			if err := to.AppendFrames(good[:i]); err == nil && to.End() != 0x100 {
				t.Fatalf("cut at %d: accepted", i)
			}
		}
	}
	if s := to.State(); s.Txns != 0 || s.End != 0x100 {
		t.Fatalf("state %+v", s)
	}
	must(t, to.AppendFrames(good))
	if err := to.AppendFrames(testHeader().Marshal()); err == nil {
		t.Fatal("a header among the records was accepted")
	}
}

// TestCopyStartsInTheMiddle: a new copy made from HeaderAt needs nothing older.
func TestCopyStartsInTheMiddle(t *testing.T) {
	j := create(t, newMemFS(), Options{SegmentBytes: 900})
	defer j.Close()
	for i := range 20 {
		appendAll(t, j, simpleTxn(i))
	}
	must(t, j.Flush())
	from := simpleTxn(12).EndLSN + 30
	h, err := j.HeaderAt(from)
	must(t, err)
	if h.From > from || h.From == 0x100 {
		t.Fatalf("header from %s", h.From)
	}
	h, err = ParseHeader(h.Marshal())
	must(t, err)
	to, err := Create("dir", h, small(Options{}, newMemFS()))
	must(t, err)
	defer to.Close()
	copyFrames(t, j, to, 2000)
	must(t, to.Flush())
	if to.State().Chain != j.State().Chain || to.State().Txns != 20 {
		t.Fatal("running values differ")
	}
	have, err := readAll(to, from)
	must(t, err)
	if len(have) != 7 || have[0].XID != 713 {
		t.Fatalf("%d transactions, first %d", len(have), have[0].XID)
	}
}

func TestFramesKeepToTheSizeAskedFor(t *testing.T) {
	j := create(t, newMemFS(), Options{SegmentBytes: 5000})
	defer j.Close()
	for i := range 50 {
		appendAll(t, j, simpleTxn(i))
	}
	must(t, j.Flush())
	for _, limit := range []int{1, 400, 1000, 1 << 20} {
		r, err := j.NewReader(0x100)
		must(t, err)
		txns, at := 0, wal.LSN(0x100)
		for at < j.End() {
			f, err := r.NextFrames(context.Background(), limit)
			must(t, err)
			if f.From != at || (len(f.Data) > limit && f.Txns > 1) {
				t.Fatalf("limit %d: %d bytes with %d transactions from %s", limit, len(f.Data), f.Txns, f.From)
			}
			txns, at = txns+f.Txns, f.To
		}
		if txns != 50 {
			t.Fatalf("limit %d: %d transactions", limit, txns)
		}
		must(t, r.Close())
	}
}

// TestSchemaFieldsOfALaterVersionTravel: this version does not know the field, but its copy must keep it, in each file.
func TestSchemaFieldsOfALaterVersionTravel(t *testing.T) {
	j := create(t, newMemFS(), Options{})
	defer j.Close()
	for i := range 12 {
		appendAll(t, j, simpleTxn(i))
	}
	later := bytes.Repeat([]byte("later"), 3)
	fsys := newMemFS()
	to := create(t, fsys, Options{SegmentBytes: 1200})
	for _, fr := range framesOf(t, j, 0x100) {
		var out []byte
		for b := fr.Data; len(b) > 0; {
			f, rest, err := parseFrame(b)
			must(t, err)
			raw := f.raw
			if f.typ == TypeSchema {
				raw = appendFrame(nil, f.typ, f.flags, appendBytes(slices.Clone(f.body), 2, 0, later))
			}
			out, b = append(out, raw...), rest
		}
		must(t, to.AppendFrames(out))
		if to.End() == simpleTxn(5).EndLSN { // what recovery learns counts, too
			must(t, to.Close())
			to = open(t, fsys, Options{SegmentBytes: 1200})
		}
	}
	must(t, to.Close())
	files := 0
	for name, f := range fsys.names {
		if _, ok := parseSegmentName(filepath.Base(name)); !ok {
			continue
		}
		files++
		if schemas := bytes.Count(f.data, []byte("account")); schemas != 1 || bytes.Count(f.data, later) != 2 {
			t.Errorf("%s: the later field is in %d of 2 records", name, bytes.Count(f.data, later))
		}
	}
	if files < 3 {
		t.Fatalf("%d files", files)
	}
	if to.in.at.chain != j.State().Chain {
		t.Fatal("chains differ")
	}
}
