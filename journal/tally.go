package journal

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"slices"

	"github.com/duri-io/duri/wal"
)

// tally holds the running values at a position of the journal. All but to and seen are pure functions of the
// transactions up to there (archive.md J1); so two copies that were cut, chunked and fed differently agree.
type tally struct {
	to         wal.LSN
	chain      Chain
	txns       uint64 // number of transactions in the chain
	bytes      uint64 // number of canonical bytes in the chain
	maxVersion wal.Time
	seen       []wal.Seen // replaced, never modified
}

// continues checks that a record covering (from, to] extends a journal that ends at t.to: fresh is false when the
// record lies wholly at or below the end, err is a GapError when it begins beyond it (archive.md J2).
func (t *tally) continues(from, to wal.LSN) (fresh bool, err error) {
	if to <= t.to {
		return false, nil
	}
	if from > t.to {
		return false, &GapError{End: t.to, From: from}
	}
	return true, nil
}

// addTxn advances over a transaction whose canonical bytes have the given size and lead to chain.
func (t *tally) addTxn(end wal.LSN, chain Chain, size int, version wal.Time, seen []wal.Seen) {
	t.to, t.chain = end, chain
	t.txns++
	t.bytes += uint64(size)
	t.maxVersion = max(t.maxVersion, version)
	t.seen = mergeSeen(t.seen, seen)
}

// checkSeal compares a seal with the values here.
func (t *tally) checkSeal(s sealRecord) error {
	detail := ""
	switch {
	case s.txns != t.txns:
		detail = "number of transactions differs"
	case s.bytes != t.bytes:
		detail = "number of bytes differs"
	case s.chain != t.chain:
		detail = "contents differ"
	default:
		return nil
	}
	return &ChainError{At: s.to, Want: s.chain, Have: t.chain, Detail: detail}
}

// mergeSeen takes the greater position per site. It returns one of its arguments where it can.
func mergeSeen(old, upd []wal.Seen) []wal.Seen {
	if len(upd) == 0 || slices.Equal(old, upd) {
		return old
	}
	if len(old) == 0 {
		return slices.Clone(upd)
	}
	out := make([]wal.Seen, 0, len(old)+len(upd))
	for len(old) > 0 && len(upd) > 0 {
		switch a, b := old[0], upd[0]; {
		case a.Site < b.Site:
			out, old = append(out, a), old[1:]
		case a.Site > b.Site:
			out, upd = append(out, b), upd[1:]
		default:
			out = append(out, wal.Seen{Site: a.Site, LSN: max(a.LSN, b.LSN)})
			old, upd = old[1:], upd[1:]
		}
	}
	return append(append(out, old...), upd...)
}

// chainer computes chain values. Not for concurrent use.
type chainer struct {
	h   hash.Hash
	pre [40]byte
	out [sha256.Size]byte
}

func newChainer() chainer { return chainer{h: sha256.New()} }

// begin starts the link after prev for canonical bytes of the given size, which are to be written to c.h.
func (c *chainer) begin(prev Chain, size int) {
	copy(c.pre[:], prev[:])
	binary.LittleEndian.PutUint64(c.pre[32:], uint64(size))
	c.h.Reset()
	c.h.Write(c.pre[:])
}

// sum ends the link.
func (c *chainer) sum() (next Chain) {
	copy(next[:], c.h.Sum(c.out[:0]))
	return next
}

// link computes the value after a transaction given by its entries, in pieces, and its core.
func (c *chainer) link(prev Chain, entries [][]byte, core []byte) (next Chain, size int) {
	size = len(core)
	for _, e := range entries {
		size += len(e)
	}
	c.begin(prev, size)
	for _, e := range entries {
		c.h.Write(e)
	}
	c.h.Write(core)
	return c.sum(), size
}
