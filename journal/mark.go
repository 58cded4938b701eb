package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"path/filepath"

	"github.com/duri-io/duri/wal"
)

// mark says what was durable: everything up to offset in the segment that begins at segment, and all segments before.
// Above it a damaged frame is the torn end of an interrupted write; below it, corruption (durability.md section 3).
type mark struct {
	seq     uint64
	segment wal.LSN
	offset  int64
	end     wal.LSN // the journal's end there
}

// The mark file holds two slots that are written in turn, so that a torn write leaves the other one.
const (
	markName  = "mark"
	markSlot  = 512
	markMagic = "DURIMARK"
	markSize  = 8 + 4*8 + 4
)

func (m mark) encode() []byte {
	b := append(make([]byte, 0, markSize), markMagic...)
	b = binary.LittleEndian.AppendUint64(b, m.seq)
	b = binary.LittleEndian.AppendUint64(b, uint64(m.segment))
	b = binary.LittleEndian.AppendUint64(b, uint64(m.offset))
	b = binary.LittleEndian.AppendUint64(b, uint64(m.end))
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func parseMark(b []byte) (m mark, ok bool) {
	if len(b) < markSize || !bytes.HasPrefix(b, []byte(markMagic)) {
		return mark{}, false
	}
	if crc32.Checksum(b[:markSize-4], castagnoli) != binary.LittleEndian.Uint32(b[markSize-4:]) {
		return mark{}, false
	}
	u := func(i int) uint64 { return binary.LittleEndian.Uint64(b[8+8*i:]) }
	return mark{seq: u(0), segment: wal.LSN(u(1)), offset: int64(u(2)), end: wal.LSN(u(3))}, true
}

// markFile is the open mark file with its last mark.
type markFile struct {
	file File
	last mark
}

// openMark opens or makes the mark file. found is false when it holds no readable mark.
func openMark(fsys FS, dir string) (m *markFile, found bool, err error) {
	name := filepath.Join(dir, markName)
	file, err := fsys.Open(name, true)
	if err != nil {
		return nil, false, fmt.Errorf("open mark: %w", err)
	}
	m = &markFile{file: file}
	if m.last, found, err = readMark(file); err != nil {
		file.Close()
		return nil, false, fmt.Errorf("read mark %s: %w", name, err)
	}
	return m, found, nil
}

// readMark returns the newer of the two slots.
func readMark(file io.ReaderAt) (best mark, found bool, err error) {
	var b [2 * markSlot]byte
	n, err := file.ReadAt(b[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return mark{}, false, err
	}
	for i := range 2 {
		lo, hi := min(n, i*markSlot), min(n, (i+1)*markSlot)
		if m, ok := parseMark(b[lo:hi]); ok && (!found || m.seq > best.seq) {
			best, found = m, true
		}
	}
	return best, found, nil
}

// loadMark reads the mark without opening it for writing.
func loadMark(fsys FS, dir string) (mark, bool, error) {
	file, err := fsys.Open(filepath.Join(dir, markName), false)
	if errors.Is(err, fs.ErrNotExist) {
		return mark{}, false, nil
	}
	if err != nil {
		return mark{}, false, err
	}
	defer file.Close()
	return readMark(file)
}

// write records what has become durable. It is not itself synced: after a loss of power an older mark is merely less
// strict.
func (m *markFile) write(next mark) error {
	next.seq = m.last.seq + 1
	if _, err := m.file.WriteAt(next.encode(), int64(next.seq%2)*markSlot); err != nil {
		return fmt.Errorf("write mark: %w", err)
	}
	m.last = next
	return nil
}
