package journal

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/duri-io/duri/wal"
)

// readChunk is how much a scanner reads at once. A transaction that is read keeps at most its chunk in memory.
const readChunk = 256 << 10

// scanner reads the frames of one file. It never overwrites what it has handed out: frames stay valid.
type scanner struct {
	file  File
	name  string
	limit int64 // nothing at or beyond this offset is read
	end   int64 // file offset behind buf
	buf   []byte
	pos   int
	short bool    // the file ended before limit
	after wal.LSN // for errors: everything up to here was read well
}

// offset is the file offset of the next frame.
func (s *scanner) offset() int64 { return s.end - int64(len(s.buf)-s.pos) }

// seek continues at off.
func (s *scanner) seek(off int64) { s.buf, s.pos, s.end = nil, 0, off }

// next returns the next frame; ok is false at the limit and at the never written tail.
func (s *scanner) next() (f frame, ok bool, err error) {
	head, err := s.peek(frameHead)
	if err != nil || len(head) == 0 || isEnd(head) {
		return frame{}, false, err
	}
	if len(head) < frameHead {
		return frame{}, false, s.damaged(malformed("frame header cut off after %d bytes", len(head)))
	}
	n, err := frameLength(head)
	if err != nil {
		return frame{}, false, s.damaged(err)
	}
	if int64(n) > s.limit-s.offset() {
		return frame{}, false, s.damaged(malformed("frame of %d bytes runs past the end at offset %d", n, s.limit))
	}
	whole, err := s.peek(n)
	if err != nil {
		return frame{}, false, err
	}
	f, _, err = parseFrame(whole)
	if err != nil {
		return frame{}, false, s.damaged(err)
	}
	s.pos += n
	return f, true, nil
}

// peek returns the next n bytes without consuming them, fewer when the limit is nearer.
func (s *scanner) peek(n int) ([]byte, error) {
	have := len(s.buf) - s.pos
	if have >= n || s.end >= s.limit {
		return s.buf[s.pos : s.pos+min(n, have)], nil
	}
	if cap(s.buf)-s.pos < n {
		next := make([]byte, have, max(n, readChunk))
		copy(next, s.buf[s.pos:])
		s.buf, s.pos = next, 0
	}
	want := min(int64(cap(s.buf)-len(s.buf)), s.limit-s.end)
	room := s.buf[len(s.buf) : len(s.buf)+int(want)]
	got, err := s.file.ReadAt(room, s.end)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read journal file %s at %d: %w", s.name, s.end, err)
	}
	s.buf = s.buf[:len(s.buf)+got]
	s.end += int64(got)
	if int64(got) < want {
		s.limit, s.short = s.end, true
	}
	return s.buf[s.pos : s.pos+min(n, len(s.buf)-s.pos)], nil
}

// damaged places an error of the frame at the present offset.
func (s *scanner) damaged(err error) error { return s.at(s.offset(), err, true) }

// at turns an error about the bytes at an offset into one that names the file.
func (s *scanner) at(off int64, err error, torn bool) error {
	if up, ok := errors.AsType[*UpgradeError](err); ok {
		return &UpgradeError{File: s.name, Offset: off, What: up.What}
	}
	reason, cause := err.Error(), error(nil)
	if form, ok := errors.AsType[*FormatError](err); ok {
		reason = form.Reason
	}
	if errors.Is(err, ErrChain) {
		cause = err
	}
	return &CorruptionError{File: s.name, Offset: off, From: s.after, Reason: reason, Hint: hintPeer, torn: torn, cause: cause}
}

// intake takes frames in order and keeps the running values. A group is the frames up to and including a txn, position
// or seal record: it is accepted or dropped as a whole.
type intake struct {
	at    tally
	site  wal.SiteID
	rels  relations
	chain chainer
	check bool // walk the entries of every transaction
	trust bool // do not compute the chain: it was verified when the records were appended
	// visit, if set, is called for the relation of every change that check walks over.
	visit func(*wal.Relation)

	// The group that the last add completed, or the one under way.
	kind    RecordType    // 0 while under way
	fresh   bool          // it extends the journal; false: it lies wholly at or below the end
	schema  *wal.Relation // of the schema record added last
	txn     txnRecord
	seen    []wal.Seen
	pos     Position
	seal    sealRecord
	entries [][]byte
	size    int // of entries

	seenRaw []byte // the encoding of seenVal: most transactions repeat the one before
	seenVal []wal.Seen
}

func newIntake(h Header) intake {
	return intake{at: h.tally(), site: h.Site, chain: newChainer()}
}

// reset forgets a group under way.
func (in *intake) reset() { in.kind, in.entries, in.size = 0, in.entries[:0], 0 }

// add takes a frame; done means that it completed a group. On an error the running values are those before the group.
func (in *intake) add(f frame) (done bool, err error) {
	if in.kind != 0 {
		in.reset()
	}
	switch f.typ {
	case TypeSchema:
		rel, err := parseSchema(f.body)
		if err != nil {
			return false, err
		}
		in.rels.add(rel)
		in.schema = rel
		return false, nil
	case TypeChanges:
		entries, err := parseChanges(f.body)
		in.entries = append(in.entries, entries)
		in.size += len(entries)
		return false, err
	case TypeTxn:
		err = in.addTxn(f.body)
	case TypePosition:
		err = in.addPosition(f.body)
	case TypeSeal:
		err = in.addSeal(f.body)
	case TypeHeader:
		return false, malformed("header in the middle of the records")
	default:
		if f.flags&flagCritical != 0 {
			return false, newer("record of unknown critical type %d", f.typ)
		}
		return false, nil
	}
	if err != nil {
		in.reset()
		return false, err
	}
	in.kind = f.typ
	return true, nil
}

func (in *intake) addTxn(body []byte) (err error) {
	if in.txn, err = parseTxn(body); err != nil {
		return err
	}
	if in.txn.origin != in.site {
		return malformed("transaction of site %d in the journal of site %d", in.txn.origin, in.site)
	}
	if in.fresh, err = in.at.continues(in.txn.from, in.txn.endLSN); err != nil || !in.fresh {
		return err
	}
	if in.seen, err = in.parseSeen(in.txn.seenRaw); err != nil {
		return err
	}
	if in.check {
		if err := in.checkEntries(); err != nil {
			return err
		}
	}
	if in.trust {
		in.at.to, in.at.seen = in.txn.endLSN, mergeSeen(in.at.seen, in.seen)
		return nil
	}
	chain, size := in.chain.link(in.at.chain, in.entries, in.txn.core)
	in.at.addTxn(in.txn.endLSN, chain, size, in.txn.versionTime, in.seen)
	return nil
}

// parseSeen reads a SEEN value, once for a run of equal ones.
func (in *intake) parseSeen(raw []byte) ([]wal.Seen, error) {
	if bytes.Equal(raw, in.seenRaw) {
		return in.seenVal, nil
	}
	seen, err := parseSeen(raw)
	if err != nil {
		return nil, err
	}
	in.seenRaw, in.seenVal = append(in.seenRaw[:0], raw...), seen
	return seen, nil
}

func (in *intake) checkEntries() error {
	n := uint64(0)
	var c wal.Change
	for _, run := range in.entries {
		for len(run) > 0 {
			entry, rest, err := splitEntry(run)
			if err != nil {
				return err
			}
			if err := parseEntry(entry, &in.rels, &c, nil); err != nil {
				return fmt.Errorf("change %d: %w", n+1, err)
			}
			if in.visit != nil {
				in.visit(c.Relation)
			}
			run = rest
			n++
		}
	}
	if n != in.txn.changes {
		return malformed("transaction with %d changes holds %d", in.txn.changes, n)
	}
	return nil
}

func (in *intake) addPosition(body []byte) (err error) {
	if len(in.entries) > 0 {
		return malformed("position record inside a transaction")
	}
	if in.pos, err = parsePosition(body); err != nil {
		return err
	}
	if in.fresh, err = in.at.continues(in.pos.From, in.pos.To); err != nil || !in.fresh {
		return err
	}
	in.at.to = in.pos.To
	in.at.seen = mergeSeen(in.at.seen, in.pos.Seen)
	return nil
}

func (in *intake) addSeal(body []byte) (err error) {
	if len(in.entries) > 0 {
		return malformed("seal record inside a transaction")
	}
	if in.seal, err = parseSeal(body); err != nil {
		return err
	}
	if in.seal.to > in.at.to {
		return &GapError{End: in.at.to, From: in.seal.to}
	}
	if in.fresh = in.seal.to == in.at.to; !in.fresh {
		return nil
	}
	if in.trust {
		return nil
	}
	return in.at.checkSeal(in.seal)
}

// decode builds the transaction of the group just completed. Its values alias the frames.
func (in *intake) decode() (*wal.Txn, error) {
	r := &in.txn
	t := &wal.Txn{
		Origin: r.origin, XID: r.xid, CommitLSN: r.commitLSN, EndLSN: r.endLSN,
		CommitTime: r.commitTime, VersionTime: r.versionTime, Received: r.received, Seen: in.seen, Mark: r.mark,
	}
	if r.changes > uint64(in.size/(entryHead+1)) {
		return nil, malformed("transaction with %d changes in %d bytes", r.changes, in.size)
	}
	if r.changes > 0 {
		t.Changes = make([]wal.Change, r.changes)
	}
	vals := make([]wal.Value, 0, min(r.values, uint64(in.size)))
	n := 0
	for _, run := range in.entries {
		for len(run) > 0 {
			entry, rest, err := splitEntry(run)
			if err != nil {
				return nil, err
			}
			if n == len(t.Changes) {
				return nil, malformed("transaction with %d changes holds more", n)
			}
			if err := parseEntry(entry, &in.rels, &t.Changes[n], &vals); err != nil {
				return nil, fmt.Errorf("change %d: %w", n+1, err)
			}
			run = rest
			n++
		}
	}
	if n != len(t.Changes) {
		return nil, malformed("transaction with %d changes holds %d", len(t.Changes), n)
	}
	return t, nil
}
