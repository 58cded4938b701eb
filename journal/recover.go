package journal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/duri-io/duri/wal"
)

// Open opens the journal in dir and recovers it: the torn end of an interrupted write is cut off, damage below the
// mark is a CorruptionError. fs.ErrNotExist when there is no journal. It reads the whole last file and the headers of
// the others; Verify reads everything. The caller closes the journal.
func Open(dir string, o Options) (_ *Journal, err error) {
	o = o.withDefaults()
	froms, err := listSegments(o.FS, dir)
	if err == nil && len(froms) == 0 {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, fmt.Errorf("open journal in %s: %w", dir, err)
	}
	lock, err := o.FS.Lock(filepath.Join(dir, lockName))
	if err != nil {
		return nil, fmt.Errorf("open journal in %s: %w", dir, err)
	}
	j := newJournal(dir, o, lock)
	if err := j.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open journal in %s: %w", dir, err), j.release())
	}
	return j, nil
}

func (j *Journal) open() error {
	if err := removeTemporary(j.o.FS, j.dir); err != nil {
		return err
	}
	segments, err := loadSegments(j.o.FS, j.dir)
	if err != nil {
		return err
	}
	last := segments[len(segments)-1]
	mf, found, err := openMark(j.o.FS, j.dir)
	if err != nil {
		return err
	}
	j.mark = mf
	if !found {
		j.o.Logger.Warn("journal mark is missing or damaged: no torn end will be cut", "file", filepath.Join(j.dir, markName))
	}
	j.segments, j.seg, j.nextID = segments, last, uint64(len(segments))
	if last.file, err = j.o.FS.Open(last.name, false); err != nil {
		return err
	}
	// After a failed fsync the page cache may show data that never reached the device. What is dirty is written first,
	// then everything is read from the device (durability.md section 3: verify by reading).
	if err := errors.Join(last.file.Sync(), last.file.DropCache()); err != nil {
		return fmt.Errorf("prepare %s for recovery: %w", last.name, err)
	}
	low := lowest(mf.last, found, last)
	sc := &scanner{file: last.file, name: last.name, limit: last.size}
	tail, err := scanSegment(context.Background(), sc, low, func(rel *wal.Relation, raw []byte, at schemaAt) {
		j.catalog.learn(rel, raw).segID = last.id
		last.schemas = append(last.schemas, at)
	}, last.note)
	if err != nil {
		return err
	}
	j.in, j.unsealed = tail.in, tail.unsealed
	j.setCheck()
	return j.cutTail(tail)
}

// cutTail drops what follows the last whole group and makes the rest durable.
func (j *Journal) cutTail(t segmentEnd) error {
	seg := j.seg
	if t.torn != nil {
		j.o.Logger.Warn("journal: torn end cut off", "file", seg.name, "offset", t.good, "lsn", j.in.at.to.String(), "reason", t.torn.Error())
	}
	if err := seg.file.Truncate(t.good); err != nil {
		return fmt.Errorf("cut %s: %w", seg.name, err)
	}
	if err := seg.file.Allocate(max(j.o.SegmentBytes, t.good)); err != nil {
		// On a full disk what is there must still be readable.
		j.o.Logger.Warn("journal file could not be preallocated", "file", seg.name, "err", err)
	}
	if err := seg.file.Sync(); err != nil {
		return fmt.Errorf("fsync %s: %w", seg.name, err)
	}
	size, err := seg.file.Size()
	if err != nil {
		return err
	}
	seg.size, seg.off, seg.limit, seg.synced = size, t.good, t.good, t.good
	j.durable = j.in.at.to
	if err := j.writeMark(); err != nil {
		return err
	}
	return j.mark.file.Sync()
}

// loadSegments reads the headers of all segments and checks that none is missing between them.
func loadSegments(fsys FS, dir string) ([]*segment, error) {
	froms, err := listSegments(fsys, dir)
	if err != nil {
		return nil, err
	}
	var segments []*segment
	for i, from := range froms {
		seg, err := loadSegment(fsys, filepath.Join(dir, segmentName(from)), uint64(i+1))
		if err != nil {
			return nil, err
		}
		if i > 0 {
			prev := segments[i-1]
			if err := follows(prev, seg); err != nil {
				return nil, err
			}
			prev.closed, prev.to = true, from
		}
		segments = append(segments, seg)
	}
	return segments, nil
}

// follows checks that next is the segment right behind prev.
func follows(prev, next *segment) error {
	switch {
	case !prev.head.sameHistory(next.head) && !next.head.Continues(prev.head):
		return &CorruptionError{File: next.name, From: next.head.From, Reason: fmt.Sprintf("it belongs to %s, the file before to %s", next.head, prev.head), Hint: "move the file that does not belong here away"}
	case next.head.Previous != prev.head.From:
		return &CorruptionError{File: next.name, From: prev.head.From, Reason: fmt.Sprintf("the file before it, %s, is missing", segmentName(next.head.Previous)), Hint: hintPeer}
	}
	return nil
}

func loadSegment(fsys FS, name string, id uint64) (*segment, error) {
	file, err := fsys.Open(name, false)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	size, err := file.Size()
	if err != nil {
		return nil, err
	}
	sc := &scanner{file: file, name: name, limit: size}
	h, err := readHeader(sc)
	if err != nil {
		return nil, err
	}
	return &segment{id: id, name: name, head: h, limit: size, size: size}, nil
}

// floor is what recovery knows of the last segment's durable part.
type floor struct {
	known   bool  // there is a readable mark
	offset  int64 // everything below was durable
	missing wal.LSN
}

// lowest translates the mark into the last segment's floor.
func lowest(m mark, found bool, last *segment) floor {
	switch {
	case !found:
		return floor{}
	case m.segment == last.head.From:
		return floor{known: true, offset: m.offset}
	case m.segment > last.head.From:
		return floor{known: true, missing: m.segment}
	}
	return floor{known: true}
}

// segmentEnd is where the readable part of a segment ends.
type segmentEnd struct {
	in       intake
	good     int64 // offset behind the last whole group
	torn     error // why reading ended there, unless it was the never written tail
	unsealed int
}

// scanSegment reads and verifies a segment up to its end, and decides whether a damaged end is torn (no error) or
// corruption. onSchema and onGroup may be nil.
func scanSegment(ctx context.Context, sc *scanner, low floor, onSchema func(*wal.Relation, []byte, schemaAt), onGroup func(int64, tally)) (segmentEnd, error) {
	if low.missing != 0 {
		return segmentEnd{}, &CorruptionError{
			File: filepath.Join(filepath.Dir(sc.name), segmentName(low.missing)), From: low.missing,
			Reason: "the file is missing, though it was made durable", Hint: hintPeer,
		}
	}
	h, err := readHeader(sc)
	if err != nil {
		return segmentEnd{}, err
	}
	e := segmentEnd{in: newIntake(h), good: sc.offset()}
	e.in.check = true
	sc.after = h.From
	bad := e.readGroups(ctx, sc, onSchema, onGroup)
	var c *CorruptionError
	switch {
	case bad != nil && (!errors.As(bad, &c) || !c.torn):
		return e, bad
	case bad == nil && e.good < sc.offset():
		bad = sc.damaged(malformed("the file ends inside a transaction"))
	}
	e.in.reset()
	if e.good < low.offset {
		if bad != nil {
			return e, bad
		}
		return e, sc.damaged(malformed("the file ends here, though it was durable up to offset %d", low.offset))
	}
	if bad != nil && !low.known {
		if errors.As(bad, &c) {
			c.Hint = "whether it was durable is unknown without the mark file: " + hintPeer
		}
		return e, bad
	}
	e.torn = bad
	return e, nil
}

// readGroups reads groups until the end or an error.
func (e *segmentEnd) readGroups(ctx context.Context, sc *scanner, onSchema func(*wal.Relation, []byte, schemaAt), onGroup func(int64, tally)) error {
	type found struct {
		rel *wal.Relation
		raw []byte
		at  schemaAt
	}
	var schemas []found
	for ctx.Err() == nil {
		off := sc.offset()
		f, ok, err := sc.next()
		if err != nil || !ok {
			return err
		}
		done, err := e.in.add(f)
		if err == nil && done && !e.in.fresh {
			err = malformed("record ends at or below the one before")
		}
		if err != nil {
			return sc.at(off, err, false)
		}
		if f.typ == TypeSchema && onSchema != nil {
			schemas = append(schemas, found{e.in.schema, f.raw, schemaAt{off, len(f.raw)}})
		}
		if !done {
			continue
		}
		switch e.in.kind {
		case TypeTxn:
			e.unsealed++
		case TypeSeal:
			e.unsealed = 0
		}
		for _, s := range schemas { // only now: those of a cut group are gone
			onSchema(s.rel, s.raw, s.at)
		}
		schemas = schemas[:0]
		e.good, sc.after = sc.offset(), e.in.at.to
		if onGroup != nil {
			onGroup(e.good, e.in.at)
		}
	}
	return ctx.Err()
}

// Verify reads every file of the journal in dir and checks checksums, structure, continuity and the chain. It takes no
// lock and changes nothing, so it may run beside an agent that appends. The torn end of an interrupted write is no
// error. Durable in the result is zero: a file does not tell.
func Verify(ctx context.Context, dir string, o Options) (State, error) {
	o = o.withDefaults()
	m, found, err := loadMark(o.FS, dir) // before the files: it may only be older than they are
	if err != nil {
		return State{}, fmt.Errorf("verify journal in %s: %w", dir, err)
	}
	segments, err := loadSegments(o.FS, dir)
	if err == nil && len(segments) == 0 {
		err = fs.ErrNotExist
	}
	if err != nil {
		return State{}, fmt.Errorf("verify journal in %s: %w", dir, err)
	}
	var at tally
	var disk int64
	verified := 0
	for _, seg := range segments {
		if verified > 0 {
			if err := beginsAs(seg.head, &at, seg.name); err != nil {
				return State{}, fmt.Errorf("verify journal in %s: %w", dir, err)
			}
		}
		low := lowest(m, found, seg)
		at, err = verifySegment(ctx, o.FS, seg, low)
		if errors.Is(err, fs.ErrNotExist) && verified == 0 && seg.closed {
			continue // pruned meanwhile
		}
		verified++
		if err != nil {
			return State{}, fmt.Errorf("verify journal in %s: %w", dir, err)
		}
		disk += seg.size
	}
	s := stateOf(&at)
	s.Start, s.DiskBytes, s.Segments = segments[len(segments)-verified].head.From, disk, verified
	return s, nil
}

// verifySegment reads one file and returns the running values at its end.
func verifySegment(ctx context.Context, fsys FS, seg *segment, low floor) (tally, error) {
	file, err := fsys.Open(seg.name, false)
	if err != nil {
		return tally{}, err
	}
	defer file.Close()
	sc := &scanner{file: file, name: seg.name, limit: seg.size}
	if seg.closed {
		low = floor{known: true}
	}
	e, err := scanSegment(ctx, sc, low, nil, nil)
	if err != nil {
		return tally{}, err
	}
	if seg.closed {
		if err := endsAt(seg, sc, e.torn, e.in.at.to); err != nil {
			return tally{}, err
		}
	}
	return e.in.at, nil
}

// endsAt checks the end of a closed file: the next one begins there.
func endsAt(seg *segment, sc *scanner, torn error, to wal.LSN) error {
	if torn != nil {
		return torn
	}
	if to != seg.to {
		return sc.damaged(malformed("the file ends at position %s, the next one begins at %s", to, seg.to))
	}
	return nil
}

// beginsAs checks that the header of a file carries on the running values at the end of the one before.
func beginsAs(h Header, at *tally, name string) error {
	t := h.tally()
	if t.to == at.to && t.chain == at.chain && t.txns == at.txns && t.bytes == at.bytes &&
		t.maxVersion == at.maxVersion && slices.Equal(t.seen, at.seen) {
		return nil
	}
	return &CorruptionError{File: name, From: at.to, Reason: "the header does not carry on where the file before ends", Hint: hintPeer}
}
