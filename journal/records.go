package journal

import (
	"bytes"
	"math"

	"github.com/duri-io/duri/wal"
)

// Flags of a transaction's core. Version 1 sets flagTruncate; the others are reserved with their meaning.
const (
	flagDDL      = 1 << 0
	flagTruncate = 1 << 1
	flagRewind   = 1 << 2
	flagGiveBack = 1 << 3
)

// txnRecord is a parsed txn record. core and seenRaw alias the frame.
type txnRecord struct {
	from     wal.LSN // coverage begins here, exclusive; it ends at endLSN
	received wal.Time
	seenRaw  []byte
	values   uint64 // number of column values in the changes: a hint for allocation, not to be trusted
	core     []byte // the chained part

	origin      wal.SiteID
	xid         uint32
	commitLSN   wal.LSN
	endLSN      wal.LSN
	commitTime  wal.Time
	versionTime wal.Time
	changes     uint64
	flags       uint64
	mark        wal.Mark
}

// parseTxn reads the body of a txn record.
func parseTxn(body []byte) (r txnRecord, err error) {
	f := fieldsOf("txn", body)
	for f.next() {
		switch f.tag {
		case 1:
			r.core = f.bytes()
		case 2:
			r.from = f.lsn()
		case 3:
			r.received = f.time()
		case 4:
			r.seenRaw = f.bytes()
		case 5:
			r.values = f.uint()
		default:
			f.unknown()
		}
	}
	if f.err != nil {
		return r, f.err
	}
	return r, r.parseCore()
}

// parseCore reads the chained part.
func (r *txnRecord) parseCore() error {
	f := fieldsOf("txn core", r.core)
	timed := false
	for f.next() {
		switch f.tag {
		case 1:
			r.origin = f.site()
		case 2:
			r.xid = f.uint32()
		case 3:
			r.commitLSN = f.lsn()
		case 4:
			r.endLSN = f.lsn()
		case 5:
			r.commitTime = f.time()
		case 6:
			r.versionTime, timed = f.time(), true
		case 7:
			r.changes = f.uint()
		case 8:
			f.bytes() // counts per relation: for listings, not for replication
		case 9:
			r.flags = f.uint()
		case 10:
			r.mark.LTXID = string(f.bytes())
		case 11:
			if level := f.uint(); level > math.MaxUint8 {
				return malformed("txn record with a mark of level %d", level)
			} else {
				r.mark.Level = wal.Level(level)
			}
		default:
			f.unknown()
		}
	}
	if !timed {
		r.versionTime = r.commitTime
	}
	if f.err == nil && r.endLSN == 0 {
		return malformed("txn record without an end position")
	}
	return f.err
}

// parseChanges reads the body of a changes record and returns its entries.
func parseChanges(body []byte) (entries []byte, err error) {
	f := fieldsOf("changes", body)
	for f.next() {
		switch f.tag {
		case 2:
			entries = f.bytes()
		default: // field 1, xid, is for interleaved transactions: critical, and not understood here
			f.unknown()
		}
	}
	if f.err == nil && len(entries) == 0 {
		return nil, malformed("changes record without entries")
	}
	return entries, f.err
}

// appendSchema appends a schema record.
func appendSchema(b []byte, r *wal.Relation) []byte {
	return appendFrame(b, TypeSchema, flagCritical, appendBytes(nil, 1, critical, r.AppendCanonical(nil)))
}

// parseSchema reads a schema record. The content must be in canonical form, so that the relation's ID is its hash.
func parseSchema(body []byte) (*wal.Relation, error) {
	f := fieldsOf("schema", body)
	var content []byte
	for f.next() {
		switch f.tag {
		case 1:
			content = f.bytes()
		default:
			f.unknown()
		}
	}
	if f.err != nil {
		return nil, f.err
	}
	rel, err := wal.ParseRelation(content)
	if err != nil {
		return nil, malformed("schema record: %v", err)
	}
	if !bytes.Equal(rel.AppendCanonical(nil), content) {
		return nil, malformed("schema record of %s is not in canonical form", rel.ID)
	}
	return rel, nil
}

// Position says that the coverage advanced from From to To without a transaction.
type Position struct {
	From, To wal.LSN
	Time     wal.Time // when the origin's agent learned it; informative only
	Seen     []wal.Seen
}

// appendPosition appends a position record.
func appendPosition(b []byte, p Position) []byte {
	body := appendUint(nil, 1, critical, uint64(p.From))
	body = appendUint(body, 2, critical, uint64(p.To))
	body = appendTimeNZ(body, 3, 0, p.Time)
	body = appendBytesNZ(body, 4, 0, appendSeen(nil, p.Seen))
	return appendFrame(b, TypePosition, flagCritical, body)
}

// parsePosition reads the body of a position record.
func parsePosition(body []byte) (p Position, err error) {
	f := fieldsOf("position", body)
	for f.next() {
		switch f.tag {
		case 1:
			p.From = f.lsn()
		case 2:
			p.To = f.lsn()
		case 3:
			p.Time = f.time()
		case 4:
			if p.Seen, err = parseSeen(f.bytes()); err != nil {
				return p, err
			}
		default:
			f.unknown()
		}
	}
	if f.err == nil && p.From >= p.To {
		return p, malformed("position record from %s to %s", p.From, p.To)
	}
	return p, f.err
}

// sealRecord states the running values at a position. Its values do not depend on where a file begins, so it travels
// to peers as it is.
type sealRecord struct {
	to          wal.LSN
	chain       Chain
	txns, bytes uint64
	time        wal.Time
}

// appendSeal appends a seal record for t.
func appendSeal(b []byte, t *tally, now wal.Time) []byte {
	body := appendUint(nil, 1, critical, uint64(t.to))
	body = appendBytes(body, 2, critical, t.chain[:])
	body = appendUintNZ(body, 3, critical, t.txns)
	body = appendUintNZ(body, 4, critical, t.bytes)
	body = appendTimeNZ(body, 5, 0, now)
	return appendFrame(b, TypeSeal, flagCritical, body)
}

// parseSeal reads the body of a seal record.
func parseSeal(body []byte) (s sealRecord, err error) {
	f := fieldsOf("seal", body)
	for f.next() {
		switch f.tag {
		case 1:
			s.to = f.lsn()
		case 2:
			s.chain = f.chain()
		case 3:
			s.txns = f.uint()
		case 4:
			s.bytes = f.uint()
		case 5:
			s.time = f.time()
		default: // 6 signature and 7 key id are reserved
			f.unknown()
		}
	}
	return s, f.err
}
