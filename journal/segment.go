package journal

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/duri-io/duri/wal"
)

const (
	segmentExt = ".j"
	tempExt    = ".tmp"
	lockName   = "lock"

	indexEvery = 1 << 20 // bytes of a segment between two entries of its index
)

// segmentName is the file name of the segment whose coverage begins at from: 16 hexadecimal digits, so that a listing
// is in the order of positions.
func segmentName(from wal.LSN) string { return fmt.Sprintf("%016x%s", uint64(from), segmentExt) }

// parseSegmentName is the reverse of segmentName.
func parseSegmentName(name string) (wal.LSN, bool) {
	hex, ok := strings.CutSuffix(name, segmentExt)
	if !ok || len(hex) != 16 || hex != strings.ToLower(hex) {
		return 0, false
	}
	v, err := strconv.ParseUint(hex, 16, 64)
	return wal.LSN(v), err == nil
}

// listSegments returns the start positions of the segments in dir, in order.
func listSegments(fsys FS, dir string) ([]wal.LSN, error) {
	names, err := fsys.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var froms []wal.LSN
	for _, n := range names {
		if from, ok := parseSegmentName(n); ok {
			froms = append(froms, from)
		}
	}
	slices.Sort(froms)
	return froms, nil
}

// segment is one file of the journal. Journal.mu guards its fields; readers have their own open file.
type segment struct {
	id   uint64 // unique within this Journal, never 0
	name string
	head Header
	to   wal.LSN // where the next file begins; set once closed
	// closed means that a later segment exists and nothing is appended here any more.
	closed bool
	limit  int64 // readers may read up to here: flushed, and the end of a group
	size   int64 // of the file on disk, preallocation included

	// of the last segment only
	file   File
	off    int64 // written to the file; limit <= off
	synced int64 // durable

	index   []indexEntry // of what was appended or scanned since the journal was opened
	schemas []schemaAt
}

// indexEntry is a place in the segment where a reader may begin.
type indexEntry struct {
	off     int64
	schemas int // how many of the segment's schemas stand before it
	at      tally
}

// schemaAt locates a schema frame in the segment.
type schemaAt struct {
	off  int64
	size int
}

// note adds an index entry when the last one is far enough behind.
func (s *segment) note(off int64, at tally) {
	last := int64(0)
	if n := len(s.index); n > 0 {
		last = s.index[n-1].off
	}
	if off-last >= indexEvery {
		s.index = append(s.index, indexEntry{off: off, schemas: len(s.schemas), at: at})
	}
}

// entryFor is the last indexed place from which a reader of records beyond from sees all of them.
func (s *segment) entryFor(from wal.LSN) (indexEntry, bool) {
	i, _ := slices.BinarySearchFunc(s.index, from, func(e indexEntry, t wal.LSN) int {
		if e.at.to <= t {
			return -1
		}
		return 1
	})
	for ; i > 0; i-- {
		if e := s.index[i-1]; e.off <= s.limit { // what is not flushed yet cannot be read
			return e, true
		}
	}
	return indexEntry{}, false
}

// halfCreatedError says that a new file may or may not be there after a crash. Nothing may be appended to the one
// before any more: either way the journal is whole then.
type halfCreatedError struct{ err error }

func (e *halfCreatedError) Error() string { return e.err.Error() }
func (e *halfCreatedError) Unwrap() error { return e.err }

// createSegment makes the file of a segment with its header. Under its final name a segment always has a durable
// header: so a torn header cannot occur, and a damaged one is corruption.
func createSegment(fsys FS, dir string, h Header, id uint64, allocate int64) (_ *segment, err error) {
	name := filepath.Join(dir, segmentName(h.From))
	file, err := fsys.Open(name+tempExt, true)
	if err != nil {
		return nil, fmt.Errorf("create journal file: %w", err)
	}
	defer func() {
		if err != nil {
			file.Close()
			err = fmt.Errorf("create journal file %s: %w", name, err)
			if rm := fsys.Remove(name + tempExt); rm != nil && !errors.Is(rm, fs.ErrNotExist) {
				err = errors.Join(err, rm)
			}
		}
	}()
	raw := h.Marshal()
	if err := file.Truncate(0); err != nil {
		return nil, err
	}
	if err := file.Allocate(max(allocate, int64(len(raw)))); err != nil {
		return nil, fmt.Errorf("reserve %d bytes: %w", allocate, err)
	}
	if _, err := file.WriteAt(raw, 0); err != nil {
		return nil, err
	}
	if err := file.Sync(); err != nil {
		return nil, err
	}
	size, err := file.Size()
	if err != nil {
		return nil, err
	}
	if err := fsys.Rename(name+tempExt, name); err != nil {
		return nil, err
	}
	if err := fsys.SyncDir(dir); err != nil {
		return nil, &halfCreatedError{err}
	}
	n := int64(len(raw))
	return &segment{id: id, name: name, head: h, file: file, limit: n, off: n, synced: n, size: size}, nil
}

// readHeader reads the header frame at the start of a file of the given size. scanner is left behind it.
func readHeader(sc *scanner) (Header, error) {
	f, ok, err := sc.next()
	if err == nil && !ok {
		err = sc.damaged(malformed("no header"))
	}
	if err != nil {
		return Header{}, err
	}
	h, err := parseHeader(f)
	if err != nil {
		return Header{}, sc.at(0, err, false)
	}
	if name := filepath.Base(sc.name); name != segmentName(h.From) {
		return Header{}, sc.at(0, malformed("header begins at %s, which is not what the file name says", h.From), false)
	}
	return h, nil
}
