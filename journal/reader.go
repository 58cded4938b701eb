package journal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/duri-io/duri/wal"
)

// Record is what a Reader returns: a transaction or an advance without one. Exactly one of Txn and Position is set.
type Record struct {
	// From and To are the coverage: after this record the reader has seen everything up to To.
	From, To wal.LSN
	Txn      *wal.Txn
	Position *Position
}

// Frames are consecutive records as they stand in the file, for AppendFrames of a copy.
type Frames struct {
	Data     []byte  // owned by the caller
	From, To wal.LSN // the coverage
	Txns     int
}

// Reader reads a journal from a position on and follows it across files. It verifies checksums, continuity and the
// chain at each seal. It sees what was flushed, durable or not. A Reader is for one goroutine; after an error it
// returns that error for ever.
type Reader struct {
	j    *Journal
	in   intake
	sc   scanner
	seg  *segment
	from wal.LSN // records that end at or below are skipped
	to   wal.LSN // up to here records were returned

	raw     [][]byte // frames of the group read last
	held    bool     // that group is still to be returned
	started bool     // something was returned
	schemas []byte   // the schema frames met before that
	trust   bool     // see TrustChain
	frames  bool     // NextFrames was called
	err     error
}

// NewReader returns a reader whose first record is the first one that ends beyond from. It fails with a PrunedError
// when from lies before Start. A from beyond End is allowed: the reader waits. The caller closes the reader, and does
// so before the journal is removed.
func (j *Journal) NewReader(from wal.LSN) (*Reader, error) {
	r := &Reader{j: j, from: from, to: from}
	if err := r.start(); err != nil {
		return nil, fmt.Errorf("read journal from %s: %w", from, err)
	}
	return r, nil
}

// TrustChain makes the reader leave the chain alone: checksums, structure and continuity are still verified. It is for
// readers on the hot path, because whoever appended has computed or verified the chain already, and Verify does it for
// files at rest. It must be called before the first read.
func (r *Reader) TrustChain() { r.trust, r.in.trust = true, true }

// start opens the segment and finds the place in it.
func (r *Reader) start() error {
	r.j.mu.Lock()
	i, err := r.j.segmentFor(r.from)
	if err == nil && r.j.closed {
		err = ErrClosed
	}
	if err != nil {
		r.j.mu.Unlock()
		return err
	}
	seg := r.j.segments[i]
	entry, jump := seg.entryFor(r.from)
	schemas := slices.Clone(seg.schemas[:entry.schemas])
	r.j.mu.Unlock()

	if err := r.open(seg); err != nil || !jump {
		return err
	}
	for _, s := range schemas {
		r.sc.seek(s.off)
		f, ok, err := r.sc.next()
		if err == nil && (!ok || f.typ != TypeSchema) {
			err = r.sc.damaged(malformed("no schema record where one was written"))
		}
		if err != nil {
			return errors.Join(err, r.Close())
		}
		if err := r.schema(f); err != nil {
			return errors.Join(r.sc.at(s.off, err, false), r.Close())
		}
	}
	r.sc.seek(entry.off)
	r.in.at, r.sc.after = entry.at, entry.at.to
	return nil
}

// schema takes a schema frame that stands before the place where the reader begins.
func (r *Reader) schema(f frame) error {
	_, err := r.in.add(f)
	r.schemas = append(r.schemas, f.raw...)
	return err
}

// segmentFor is the index of the segment that holds the first record beyond from. j.mu is held.
func (j *Journal) segmentFor(from wal.LSN) (int, error) {
	if start := j.segments[0].head.From; from < start {
		return 0, &PrunedError{From: from, Start: start}
	}
	i, found := slices.BinarySearchFunc(j.segments, from, func(s *segment, t wal.LSN) int {
		switch {
		case s.head.From < t:
			return -1
		case s.head.From > t:
			return 1
		}
		return 0
	})
	if found {
		return i, nil
	}
	return i - 1, nil
}

// open begins to read a segment. In the middle of a journal the header must carry on the running values.
func (r *Reader) open(seg *segment) error {
	file, err := r.j.o.FS.Open(seg.name, false)
	if errors.Is(err, fs.ErrNotExist) { // pruned since we looked
		return &PrunedError{From: r.to, Start: r.j.Start()}
	}
	if err != nil {
		return err
	}
	r.j.mu.Lock()
	limit := seg.limit
	r.j.mu.Unlock()
	sc := scanner{file: file, name: seg.name, limit: limit, after: seg.head.From}
	h, err := readHeader(&sc)
	if r.trust && h.From == r.in.at.to {
		r.in.at = h.tally() // the running values that were not computed
	}
	if err == nil && r.seg != nil {
		err = beginsAs(h, &r.in.at, seg.name)
	}
	if err != nil {
		return errors.Join(err, file.Close())
	}
	if r.seg == nil {
		r.in = newIntake(h)
		r.in.trust = r.trust
	} else if err := r.sc.file.Close(); err != nil {
		return errors.Join(err, file.Close())
	}
	r.seg, r.sc = seg, sc
	if !r.started {
		r.schemas = nil
	}
	return nil
}

// Close releases the reader's file. It must not run at the same time as another method: to end one that waits, cancel
// its context.
func (r *Reader) Close() error {
	if r.sc.file == nil {
		return nil
	}
	err := r.sc.file.Close()
	r.sc.file = nil
	if r.err == nil {
		r.err = ErrClosed
	}
	return err
}

// group reads the next group; ok is false when there is none at present.
func (r *Reader) group() (ok bool, err error) {
	if r.held {
		r.held = false
		return true, nil
	}
	if r.err != nil {
		return false, r.err
	}
	if ok, err = r.readGroup(); err != nil {
		r.err = fmt.Errorf("read journal after %s: %w", r.in.at.to, err)
	}
	return ok, r.err
}

func (r *Reader) readGroup() (bool, error) {
	r.raw = r.raw[:0]
	for {
		off := r.sc.offset()
		f, ok, err := r.sc.next()
		if err != nil {
			return false, err
		}
		if !ok {
			if more, err := r.more(); err != nil || !more {
				return false, err
			}
			continue
		}
		if f.typ == TypeSchema && !r.started {
			r.schemas = append(r.schemas, f.raw...)
		} else {
			r.raw = append(r.raw, f.raw)
		}
		done, err := r.in.add(f)
		if err == nil && done && !r.in.fresh {
			err = malformed("record ends at or below the one before")
		}
		if err != nil {
			return false, r.sc.at(off, err, false)
		}
		if done {
			r.sc.after = r.in.at.to
			return true, nil
		}
	}
}

// more finds out whether there is more to read: in this file, or in the next one, which it opens.
func (r *Reader) more() (bool, error) {
	r.j.mu.Lock()
	closed, limit := r.seg.closed, r.seg.limit
	r.j.mu.Unlock()
	off := r.sc.offset()
	if r.sc.short {
		return false, r.sc.damaged(malformed("the file is shorter than %d bytes", limit))
	}
	if r.sc.limit < limit && off >= r.sc.limit {
		r.sc.limit = limit
		return true, nil
	}
	if len(r.raw) > 0 {
		return false, r.sc.damaged(malformed("the file ends inside a transaction"))
	}
	if !closed {
		if off < limit {
			return false, r.sc.damaged(malformed("never written space below the end at offset %d", limit))
		}
		return false, nil
	}
	if err := endsAt(r.seg, &r.sc, nil, r.in.at.to); err != nil {
		return false, err
	}
	next, err := r.next()
	if err != nil {
		return false, err
	}
	if r.frames && next.head.Incarnation != r.seg.head.Incarnation {
		return false, ErrTurned
	}
	return true, r.open(next)
}

// next is the segment behind the present one.
func (r *Reader) next() (*segment, error) {
	r.j.mu.Lock()
	defer r.j.mu.Unlock()
	i, err := r.j.segmentFor(r.seg.to)
	if err != nil {
		return nil, err
	}
	return r.j.segments[i], nil
}

// wanted reports whether the group read last concerns the caller: a seal does once what it seals was returned.
func (r *Reader) wanted() bool {
	if r.in.kind == TypeSeal {
		return r.started
	}
	return r.in.at.to > r.from
}

// NextFrames returns whole records of at most maxBytes together, or a single larger one. It waits until there is at
// least one. The first frames are preceded by the schema records that later ones refer to. It ends with ErrTurned where the
// journal goes on as another incarnation.
func (r *Reader) NextFrames(ctx context.Context, maxBytes int) (Frames, error) {
	for {
		fr, err := r.tryFrames(maxBytes)
		if err != nil || len(fr.Data) > 0 {
			return fr, err
		}
		if err := r.wait(ctx); err != nil {
			return Frames{}, err
		}
	}
}

func (r *Reader) tryFrames(maxBytes int) (Frames, error) {
	r.frames = true
	fr := Frames{From: r.to, To: r.to}
	for {
		ok, err := r.group()
		if err != nil && len(fr.Data) == 0 {
			return Frames{}, err // otherwise it comes with the next call
		}
		if err != nil || !ok {
			return fr, nil
		}
		if !r.wanted() {
			continue
		}
		size := len(r.schemas)
		for _, raw := range r.raw {
			size += len(raw)
		}
		if len(fr.Data) > 0 && len(fr.Data)+size > maxBytes {
			r.held = true
			return fr, nil
		}
		if fr.Data == nil { // as much as there is to read, so that it need not grow
			fr.Data = make([]byte, 0, max(size, int(min(int64(maxBytes), r.sc.limit-r.sc.offset()+int64(size)))))
		}
		fr.Data = append(fr.Data, r.schemas...)
		for _, raw := range r.raw {
			fr.Data = append(fr.Data, raw...)
		}
		if r.in.kind == TypeTxn {
			fr.Txns++
		}
		r.delivered()
		fr.To = r.to
	}
}

// delivered notes that the group read last was returned.
func (r *Reader) delivered() {
	r.started, r.schemas = true, nil
	r.to = max(r.to, r.in.at.to)
}

// Next returns the next record and waits until there is one. The transaction's values alias the reader's buffer, which
// is never overwritten: it may be kept. Seen slices may be shared between transactions and must not be modified.
func (r *Reader) Next(ctx context.Context) (Record, error) {
	for {
		rec, ok, err := r.TryNext()
		if err != nil || ok {
			return rec, err
		}
		if err := r.wait(ctx); err != nil {
			return Record{}, err
		}
	}
}

// TryNext is Next without waiting: ok is false when there is no record at present.
func (r *Reader) TryNext() (rec Record, ok bool, err error) {
	for {
		if ok, err = r.group(); err != nil || !ok {
			return Record{}, false, err
		}
		if !r.wanted() || r.in.kind == TypeSeal {
			continue
		}
		if rec, err = r.record(); err != nil {
			r.err = fmt.Errorf("read journal: %w", r.sc.damaged(err))
			return Record{}, false, r.err
		}
		r.delivered()
		return rec, true, nil
	}
}

func (r *Reader) record() (Record, error) {
	rec := Record{From: r.to, To: r.in.at.to}
	if r.in.kind == TypePosition {
		p := r.in.pos
		rec.Position = &p
		return rec, nil
	}
	txn, err := r.in.decode()
	rec.Txn = txn
	return rec, err
}

// wait returns when there may be more to read.
func (r *Reader) wait(ctx context.Context) error {
	j := r.j
	j.mu.Lock()
	if r.seg.closed || r.seg.limit > r.sc.limit {
		j.mu.Unlock()
		return nil
	}
	if j.closed {
		j.mu.Unlock()
		return ErrClosed
	}
	ch := j.notify
	j.waiting = true
	j.mu.Unlock()
	select {
	case <-ch:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
