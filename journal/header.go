package journal

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"

	"github.com/duri-io/duri/wal"
)

// Chain is a value of the hash chain over an origin's transactions: h' = SHA-256(h, length, canonical bytes). Two
// copies with the same chain value at the same position hold the same transactions up to there. Zero is the start.
type Chain [32]byte

// String prints the value in hexadecimal.
func (c Chain) String() string { return hex.EncodeToString(c[:]) }

// Incarnation is a slot's identity (durability.md section 3). Positions mean something within one incarnation only: a
// fail-over or a re-created slot begins a new one, so that an LSN used again is another position. It is comparable.
type Incarnation struct {
	SystemID   uint64
	Timeline   uint32
	Database   string
	Slot       string
	CreatedLSN wal.LSN
}

// String prints "system/timeline/database/slot@lsn", for logs and errors.
func (i Incarnation) String() string {
	return fmt.Sprintf("%d/%d/%s/%s@%s", i.SystemID, i.Timeline, i.Database, i.Slot, i.CreatedLSN)
}

// Turn says how a journal went on as another incarnation: the one named here ended at End, and the database that the next
// one is of had this origin's transactions up to Back only. Those of (Back, End] are given back to it (docs/adr/0008).
// Positions never begin again: those of the next incarnation lie beyond End.
type Turn struct {
	Incarnation
	Back, End wal.LSN
}

// Header says whose history a file holds and from where, with the running values at that point. Each file begins with
// one. The link sends one to a new peer, which creates its copy from it.
type Header struct {
	Cluster  string
	Site     wal.SiteID
	SiteName string
	Incarnation
	ServerVersion int    // PostgreSQL's server_version_num
	Encoding      string // of the database
	// Settings are those that shape the text of values (replication.md rule 21).
	Settings map[string]string

	// From is where the file's coverage begins, exclusive.
	From wal.LSN
	// Previous is From of the file before, zero in a journal's first file. It lets a missing file be noticed without
	// reading the others.
	Previous wal.LSN
	// Running values at From: the chain, how many transactions and canonical bytes it covers, the greatest version
	// time and the positions of other origins seen so far.
	Chain          Chain
	Txns, Bytes    uint64
	MaxVersionTime wal.Time
	Seen           []wal.Seen
	// Turns are the incarnations before this one, oldest first.
	Turns []Turn
}

// String names the history: cluster, site and incarnation.
func (h Header) String() string {
	return fmt.Sprintf("%s/%s(%d)/%s from %s", h.Cluster, h.SiteName, h.Site, h.Incarnation, h.From)
}

// clone returns a copy that shares nothing with h.
func (h Header) clone() Header {
	h.Settings = maps.Clone(h.Settings)
	h.Seen = slices.Clone(h.Seen)
	h.Turns = slices.Clone(h.Turns)
	return h
}

// sameHistory reports whether two files belong to one journal.
func (h Header) sameHistory(o Header) bool {
	return h.Cluster == o.Cluster && h.Site == o.Site && h.Incarnation == o.Incarnation
}

// Continues reports whether o's incarnation is the one before h's, and ended where h begins.
func (h Header) Continues(o Header) bool {
	n := len(h.Turns)
	return n > 0 && h.Cluster == o.Cluster && h.Site == o.Site && h.Turns[n-1].Incarnation == o.Incarnation && h.Turns[n-1].End == h.From &&
		slices.Equal(h.Turns[:n-1], o.Turns)
}

// tally gives the running values of the header.
func (h Header) tally() tally {
	return tally{to: h.From, chain: h.Chain, txns: h.Txns, bytes: h.Bytes, maxVersion: h.MaxVersionTime, seen: h.Seen}
}

// Marshal returns the header as one frame.
func (h Header) Marshal() []byte {
	var b []byte
	b = appendUint(b, 1, critical, FormatVersion)
	b = appendBytesNZ(b, 2, critical, []byte(h.Cluster))
	b = appendUintNZ(b, 3, critical, uint64(h.Site))
	b = appendBytesNZ(b, 4, 0, []byte(h.SiteName))
	b = appendUintNZ(b, 5, critical, h.SystemID)
	b = appendUintNZ(b, 6, critical, uint64(h.Timeline))
	b = appendBytesNZ(b, 7, critical, []byte(h.Database))
	b = appendBytesNZ(b, 8, critical, []byte(h.Slot))
	b = appendUintNZ(b, 9, critical, uint64(h.CreatedLSN))
	b = appendUint(b, 10, critical, uint64(h.From))
	b = appendBytes(b, 11, critical, h.Chain[:])
	b = appendUintNZ(b, 12, critical, h.Txns)
	b = appendUintNZ(b, 13, critical, h.Bytes)
	b = appendTimeNZ(b, 14, critical, h.MaxVersionTime)
	b = appendBytesNZ(b, 15, 0, appendSeen(nil, h.Seen))
	b = appendUintNZ(b, 16, 0, uint64(max(h.ServerVersion, 0)))
	b = appendBytesNZ(b, 17, 0, []byte(h.Encoding))
	b = appendBytesNZ(b, 18, 0, marshalSettings(h.Settings))
	b = appendUintNZ(b, 19, critical, uint64(h.Previous))
	b = appendBytesNZ(b, 20, critical, marshalTurns(h.Turns))
	return appendFrame(nil, TypeHeader, flagCritical, b)
}

// ParseHeader reads what Marshal wrote: exactly one header frame. It never panics on bad input.
func ParseHeader(b []byte) (Header, error) {
	f, rest, err := parseFrame(b)
	if err != nil {
		return Header{}, err
	}
	if len(rest) != 0 {
		return Header{}, malformed("%d bytes after the header", len(rest))
	}
	return parseHeader(f)
}

// parseHeader reads a header record.
func parseHeader(fr frame) (h Header, err error) {
	if fr.typ != TypeHeader {
		return Header{}, malformed("record of type %d where the header belongs", fr.typ)
	}
	f := fieldsOf("header", fr.body)
	version := uint64(0)
	for f.next() {
		switch f.tag {
		case 1:
			if version = f.uint(); version > FormatVersion {
				return Header{}, newer("format version %d (this duri reads up to %d)", version, FormatVersion)
			}
		case 2:
			h.Cluster = string(f.bytes())
		case 3:
			h.Site = f.site()
		case 4:
			h.SiteName = string(f.bytes())
		case 5:
			h.SystemID = f.uint()
		case 6:
			h.Timeline = f.uint32()
		case 7:
			h.Database = string(f.bytes())
		case 8:
			h.Slot = string(f.bytes())
		case 9:
			h.CreatedLSN = f.lsn()
		case 10:
			h.From = f.lsn()
		case 11:
			h.Chain = f.chain()
		case 12:
			h.Txns = f.uint()
		case 13:
			h.Bytes = f.uint()
		case 14:
			h.MaxVersionTime = f.time()
		case 15:
			if h.Seen, err = parseSeen(f.bytes()); err != nil {
				return Header{}, err
			}
		case 16:
			h.ServerVersion = int(f.uint32())
		case 17:
			h.Encoding = string(f.bytes())
		case 18:
			if h.Settings, err = parseSettings(f.bytes()); err != nil {
				return Header{}, err
			}
		case 19:
			h.Previous = f.lsn()
		case 20:
			if h.Turns, err = parseTurns(f.bytes()); err != nil {
				return Header{}, err
			}
		default:
			f.unknown()
		}
	}
	if f.err == nil && version == 0 {
		return Header{}, malformed("header without a format version")
	}
	if f.err != nil {
		return Header{}, f.err
	}
	return h, nil
}

// marshalTurns writes each turn as fields, length-prefixed.
func marshalTurns(turns []Turn) (b []byte) {
	for _, t := range turns {
		var f []byte
		f = appendUintNZ(f, 1, critical, t.SystemID)
		f = appendUintNZ(f, 2, critical, uint64(t.Timeline))
		f = appendBytesNZ(f, 3, critical, []byte(t.Database))
		f = appendBytesNZ(f, 4, critical, []byte(t.Slot))
		f = appendUintNZ(f, 5, critical, uint64(t.CreatedLSN))
		f = appendUintNZ(f, 6, critical, uint64(t.Back))
		f = appendUintNZ(f, 7, critical, uint64(t.End))
		b = append(binary.AppendUvarint(b, uint64(len(f))), f...)
	}
	return b
}

// parseTurns reads what marshalTurns wrote.
func parseTurns(b []byte) (turns []Turn, err error) {
	for len(b) > 0 {
		l, n := uvarint(b)
		if n <= 0 || l > uint64(len(b)-n) {
			return nil, malformed("turns in the header are damaged")
		}
		f := fieldsOf("turn", b[n:n+int(l)])
		b = b[n+int(l):]
		var t Turn
		for f.next() {
			switch f.tag {
			case 1:
				t.SystemID = f.uint()
			case 2:
				t.Timeline = f.uint32()
			case 3:
				t.Database = string(f.bytes())
			case 4:
				t.Slot = string(f.bytes())
			case 5:
				t.CreatedLSN = f.lsn()
			case 6:
				t.Back = f.lsn()
			case 7:
				t.End = f.lsn()
			default:
				f.unknown()
			}
		}
		if f.err != nil {
			return nil, f.err
		}
		turns = append(turns, t)
	}
	return turns, nil
}

// marshalSettings writes names and values, length-prefixed, in the order of the names.
func marshalSettings(m map[string]string) []byte {
	var b []byte
	for _, k := range slices.Sorted(maps.Keys(m)) {
		for _, s := range []string{k, m[k]} {
			b = append(binary.AppendUvarint(b, uint64(len(s))), s...)
		}
	}
	return b
}

// parseSettings reads what marshalSettings wrote; nil when there are none.
func parseSettings(b []byte) (map[string]string, error) {
	var m map[string]string
	next := func() (string, bool) {
		l, n := uvarint(b)
		if n <= 0 || l > uint64(len(b)-n) {
			return "", false
		}
		s := string(b[n : n+int(l)])
		b = b[n+int(l):]
		return s, true
	}
	for len(b) > 0 {
		k, ok1 := next()
		v, ok2 := next()
		if !ok1 || !ok2 {
			return nil, malformed("settings in the header are damaged")
		}
		if m == nil {
			m = map[string]string{}
		}
		m[k] = v
	}
	return m, nil
}
