package journal

import (
	"encoding/binary"
	"hash/crc32"
	"math/bits"

	"github.com/duri-io/duri/wal"
)

// FormatVersion is the version of the format that this package writes (docs/reference/journal.md).
const FormatVersion = 1

// RecordType is the type of a frame. The numbers are part of the format and never change.
type RecordType uint8

// All record types of version 1, those that nobody writes yet included.
const (
	TypeHeader    RecordType = 1
	TypeTxn       RecordType = 2
	TypeChanges   RecordType = 3
	TypeSchema    RecordType = 4
	TypeDDL       RecordType = 5
	TypeContext   RecordType = 6
	TypePoint     RecordType = 7
	TypeRewind    RecordType = 8
	TypePosition  RecordType = 9
	TypeEpoch     RecordType = 10
	TypeGap       RecordType = 11
	TypeVoid      RecordType = 12
	TypeSeal      RecordType = 13
	TypeAnnex     RecordType = 14
	TypeApplied   RecordType = 15
	TypeException RecordType = 16
)

const (
	frameHead = 12            // bytes before the body
	maxBody   = 1<<30 + 1<<20 // one pgoutput message is below 1 GB (PostgreSQL's MaxAllocSize), so is one change

	flagCritical = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// frame is one record as it stands in a file. body and raw alias the buffer it was parsed from.
type frame struct {
	typ   RecordType
	flags uint8
	body  []byte
	raw   []byte
}

// frameLength reads the length of the whole frame from its first 12 bytes. It checks nothing but the length.
func frameLength(head []byte) (int, error) {
	n := binary.LittleEndian.Uint32(head)
	if n > maxBody {
		return 0, malformed("frame of %d bytes (limit %d)", n, maxBody)
	}
	return frameHead + int(n), nil
}

// isEnd reports whether head begins the preallocated, never written tail of a file.
func isEnd(head []byte) bool {
	for _, b := range head {
		if b != 0 {
			return false
		}
	}
	return true
}

// frameSum is the checksum of a frame: over its first 8 bytes and its body.
func frameSum(raw []byte) uint32 {
	return crc32.Update(crc32.Update(0, castagnoli, raw[:8]), castagnoli, raw[frameHead:])
}

// parseFrame takes the first frame off b and checks it. A FormatError means damaged bytes, an UpgradeError a sound
// frame that this version must not interpret.
func parseFrame(b []byte) (f frame, rest []byte, err error) {
	if len(b) < frameHead {
		return frame{}, nil, malformed("frame header cut off after %d bytes", len(b))
	}
	n, err := frameLength(b)
	if err != nil {
		return frame{}, nil, err
	}
	if n > len(b) {
		return frame{}, nil, malformed("frame of %d bytes cut off after %d", n, len(b))
	}
	raw := b[:n:n]
	if sum := frameSum(raw); sum != binary.LittleEndian.Uint32(raw[8:]) {
		return frame{}, nil, malformed("checksum %08x does not fit the frame (computed %08x)", binary.LittleEndian.Uint32(raw[8:]), sum)
	}
	f = frame{typ: RecordType(raw[4]), flags: raw[5], body: raw[frameHead:], raw: raw}
	if f.typ == 0 {
		return frame{}, nil, malformed("frame of type 0")
	}
	if f.flags&^flagCritical != 0 || raw[6] != 0 || raw[7] != 0 {
		return frame{}, nil, newer("frame of type %d with unknown flags %02x%02x%02x", f.typ, f.flags, raw[6], raw[7])
	}
	return f, b[n:], nil
}

// openFrame appends the header of a frame whose body has size bytes, yet to be appended; closeFrame completes it.
func openFrame(b []byte, typ RecordType, flags uint8, size int) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(size))
	return append(b, byte(typ), flags, 0, 0, 0, 0, 0, 0)
}

// closeFrame writes the checksum of the frame that begins at start and ends with b.
func closeFrame(b []byte, start int) {
	binary.LittleEndian.PutUint32(b[start+8:], frameSum(b[start:]))
}

// appendFrame appends a whole frame.
func appendFrame(b []byte, typ RecordType, flags uint8, body []byte) []byte {
	start := len(b)
	b = append(openFrame(b, typ, flags, len(body)), body...)
	closeFrame(b, start)
	return b
}

// Tagged fields: uvarint key = tag<<2 | critical<<1 | isBytes, then a uvarint, or a uvarint length and bytes. Tags
// rise within a record, so that a record has one spelling.

// critical is the default of the fields that version 1 writes and that no reader may overlook.
const critical = 2

func appendUint(b []byte, tag uint64, crit uint64, v uint64) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(b, tag<<2|crit), v)
}

// appendUintNZ leaves the field out when v is zero: absent means zero.
func appendUintNZ(b []byte, tag uint64, crit uint64, v uint64) []byte {
	if v == 0 {
		return b
	}
	return appendUint(b, tag, crit, v)
}

func appendBytes(b []byte, tag uint64, crit uint64, v []byte) []byte {
	b = binary.AppendUvarint(binary.AppendUvarint(b, tag<<2|crit|1), uint64(len(v)))
	return append(b, v...)
}

func appendBytesNZ(b []byte, tag uint64, crit uint64, v []byte) []byte {
	if len(v) == 0 {
		return b
	}
	return appendBytes(b, tag, crit, v)
}

func appendTimeNZ(b []byte, tag uint64, crit uint64, t wal.Time) []byte {
	return appendUintNZ(b, tag, crit, zigzag(int64(t)))
}

func zigzag(v int64) uint64   { return uint64(v)<<1 ^ uint64(v>>63) }
func unzigzag(u uint64) int64 { return int64(u>>1) ^ -int64(u&1) }

// uvarintLen is the number of bytes that binary.AppendUvarint uses for v.
func uvarintLen(v uint64) int { return (bits.Len64(v|1) + 6) / 7 }

// uvarint is binary.Uvarint with the one-byte case inlined; n <= 0 means damaged.
func uvarint(b []byte) (v uint64, n int) {
	if len(b) > 0 && b[0] < 0x80 {
		return uint64(b[0]), 1
	}
	return binary.Uvarint(b)
}

// fields walks the tagged fields of a record. After next returned true, tag is set and exactly one of uint, bytes and
// unknown is to be called; err holds the first error, and next returns false from then on.
type fields struct {
	what string // record name for errors
	b    []byte
	tag  uint64
	err  error

	seen    bool
	crit    bool
	isBytes bool
	u       uint64
	data    []byte
}

func fieldsOf(what string, b []byte) fields { return fields{what: what, b: b} }

// next reads the next field.
func (f *fields) next() bool {
	if f.err != nil || len(f.b) == 0 {
		return false
	}
	key, n := uvarint(f.b)
	if n <= 0 {
		return f.fail("damaged field key")
	}
	f.b = f.b[n:]
	tag := key >> 2
	if tag == 0 || (f.seen && tag <= f.tag) {
		return f.fail("fields are not in the order of their tags")
	}
	f.seen, f.tag, f.crit, f.isBytes = true, tag, key&2 != 0, key&1 != 0
	if f.u, n = uvarint(f.b); n <= 0 {
		return f.fail("damaged field value")
	}
	f.b = f.b[n:]
	if !f.isBytes {
		return true
	}
	if f.u > uint64(len(f.b)) {
		return f.fail("field runs past the record")
	}
	f.data, f.b = f.b[:f.u:f.u], f.b[f.u:]
	return true
}

func (f *fields) fail(reason string) bool {
	if f.err == nil {
		f.err = malformed("%s record: field %d: %s", f.what, f.tag, reason)
	}
	return false
}

// uint is the number in the present field.
func (f *fields) uint() uint64 {
	if f.isBytes {
		f.fail("bytes where a number belongs")
		return 0
	}
	return f.u
}

// uint32 is a number that must fit 32 bits.
func (f *fields) uint32() uint32 {
	v := f.uint()
	if v > 1<<32-1 {
		f.fail("number too large")
	}
	return uint32(v)
}

// site is a site number.
func (f *fields) site() wal.SiteID {
	v := f.uint()
	if v > 1<<16-1 {
		f.fail("site number too large")
	}
	return wal.SiteID(v)
}

func (f *fields) lsn() wal.LSN   { return wal.LSN(f.uint()) }
func (f *fields) time() wal.Time { return wal.Time(unzigzag(f.uint())) }

// bytes are the bytes in the present field; they alias the record.
func (f *fields) bytes() []byte {
	if !f.isBytes {
		f.fail("number where bytes belong")
		return nil
	}
	return f.data
}

// chain is a chain value.
func (f *fields) chain() (c Chain) {
	b := f.bytes()
	if len(b) != len(c) {
		f.fail("chain value of the wrong length")
		return c
	}
	copy(c[:], b)
	return c
}

// unknown handles a tag that the caller does not know: skipped unless critical (archive.md J3).
func (f *fields) unknown() {
	if f.crit && f.err == nil {
		f.err = newer("%s record with unknown critical field %d", f.what, f.tag)
	}
}

// appendSeen appends the value of a SEEN field: pairs of uvarints, site and LSN.
func appendSeen(b []byte, seen []wal.Seen) []byte {
	for _, s := range seen {
		b = binary.AppendUvarint(binary.AppendUvarint(b, uint64(s.Site)), uint64(s.LSN))
	}
	return b
}

// parseSeen reads a SEEN value; sites must rise.
func parseSeen(b []byte) ([]wal.Seen, error) {
	var seen []wal.Seen
	for len(b) > 0 {
		site, n := uvarint(b)
		if n <= 0 || site > 1<<16-1 || (len(seen) > 0 && wal.SiteID(site) <= seen[len(seen)-1].Site) {
			return nil, malformed("list of seen positions is damaged")
		}
		lsn, m := uvarint(b[n:])
		if m <= 0 {
			return nil, malformed("list of seen positions is damaged")
		}
		seen = append(seen, wal.Seen{Site: wal.SiteID(site), LSN: wal.LSN(lsn)})
		b = b[n+m:]
	}
	return seen, nil
}
