// Package wal is the vocabulary of replicated change: positions, times, versions, relations, changes and
// transactions. Every other package speaks it. It does no I/O and imports only the standard library.
//
// Values travel as PostgreSQL's text output under fixed settings (replication.md rule 21), so a value is the same
// bytes at every site.
package wal

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// LSN is a byte position in one PostgreSQL instance's write-ahead log. Zero is PostgreSQL's InvalidXLogRecPtr.
type LSN uint64

// String prints the LSN as PostgreSQL does: two hexadecimal halves, "16/B374D848".
func (l LSN) String() string { return fmt.Sprintf("%X/%X", uint32(l>>32), uint32(l)) }

// MarshalText makes an LSN text in JSON.
func (l LSN) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads the form that String prints.
func (l *LSN) UnmarshalText(b []byte) error {
	v, err := ParseLSN(string(b))
	if err == nil {
		*l = v
	}
	return err
}

// ParseLSN reads PostgreSQL's text form of an LSN.
func ParseLSN(s string) (LSN, error) {
	hi, lo, ok := strings.Cut(s, "/")
	if ok {
		h, err1 := strconv.ParseUint(hi, 16, 32)
		l, err2 := strconv.ParseUint(lo, 16, 32)
		if err1 == nil && err2 == nil {
			return LSN(h<<32 | l), nil
		}
	}
	return 0, fmt.Errorf("%q is not an LSN (want the form 16/B374D848)", s)
}

// Time is a PostgreSQL timestamptz: microseconds since 2000-01-01 00:00 UTC. It keeps PostgreSQL's exact resolution,
// which the comparison of versions depends on. Zero means unknown.
type Time int64

// epoch is 2000-01-01 UTC in Unix microseconds.
const epoch = 946684800 * 1e6

// TimeOf converts a Go time, cutting it to the microsecond.
func TimeOf(t time.Time) Time { return Time(t.UnixMicro() - epoch) }

// Std converts to a Go time in UTC.
func (t Time) Std() time.Time { return time.UnixMicro(int64(t) + epoch).UTC() }

// String prints RFC 3339 with microseconds; PostgreSQL reads it back to the same value.
func (t Time) String() string { return t.Std().Format("2006-01-02T15:04:05.000000Z07:00") }

// Add moves the time by d, at microsecond resolution.
func (t Time) Add(d time.Duration) Time { return t + Time(d.Microseconds()) }

// Sub is the duration from o to t.
func (t Time) Sub(o Time) time.Duration { return time.Duration(t-o) * time.Microsecond }

// SiteID numbers a site of the cluster, from 1. It is fixed for the life of the cluster, and breaks ties between
// equal commit times (replication.md rule 2).
type SiteID uint16

// Version is the version of a row: when, and at which site, its last change was committed. Versions are totally
// ordered; the greater one wins (replication.md section 2). The zero Version is older than every other.
type Version struct {
	Time Time   `json:"time"`
	Site SiteID `json:"site"`
}

// Compare orders versions by time, then by site.
func (v Version) Compare(o Version) int {
	return cmp.Or(cmp.Compare(v.Time, o.Time), cmp.Compare(v.Site, o.Site))
}

// Less reports whether v is older than o.
func (v Version) Less(o Version) bool { return v.Compare(o) < 0 }

// String prints "2026-11-25T20:50:56.000001Z@2".
func (v Version) String() string { return fmt.Sprintf("%s@%d", v.Time, v.Site) }

// ValueKind says what a Value holds. The bytes are those of the journal format, and of pgoutput where it has one.
type ValueKind byte

const (
	Null      ValueKind = 'n' // SQL NULL
	Unchanged ValueKind = 'u' // an out-of-line (TOAST) value that the change did not touch and PostgreSQL did not send
	Text      ValueKind = 't' // Data is the text output of the value
	Omitted   ValueKind = 'o' // the column is not part of this tuple (for example, not a key column of an old key)
)

// Value is one column of a tuple. Data is set only for Text, and must not be modified: it may alias a read buffer.
type Value struct {
	Kind ValueKind
	Data []byte
}

// Tuple is a row image, one Value per column of its Relation, in the same order.
type Tuple []Value

// Complete reports whether no column is Unchanged or Omitted.
func (t Tuple) Complete() bool {
	for _, v := range t {
		if v.Kind == Unchanged || v.Kind == Omitted {
			return false
		}
	}
	return true
}

// Op is the kind of a change.
type Op byte

const (
	Insert   Op = 'I'
	Update   Op = 'U'
	Delete   Op = 'D'
	Truncate Op = 'T' // of the one relation the Change names; a TRUNCATE of several is several changes
)

// String gives PostgreSQL's word.
func (o Op) String() string {
	switch o {
	case Insert:
		return "INSERT"
	case Update:
		return "UPDATE"
	case Delete:
		return "DELETE"
	case Truncate:
		return "TRUNCATE"
	}
	return fmt.Sprintf("Op(%d)", byte(o))
}

// OldKind says what the old tuple of a change holds.
type OldKind byte

const (
	OldNone OldKind = 0   // no old tuple: the key did not change (update), or there is none (insert)
	OldKey  OldKind = 'K' // the replica identity columns; all others are Omitted
	OldFull OldKind = 'O' // the whole row (REPLICA IDENTITY FULL)
)

// Truncate options, as pgoutput sends them.
const (
	TruncateCascade         = 1
	TruncateRestartIdentity = 2
)

// Change is one row change (or one relation's truncation) of a transaction.
type Change struct {
	Op       Op
	Relation *Relation
	OldKind  OldKind
	Options  uint8 // Truncate only: TruncateCascade, TruncateRestartIdentity
	Old      Tuple // nil when OldKind is OldNone
	New      Tuple // nil for Delete and Truncate
}

// Seen is a position up to which one other origin's transactions had been applied at the origin of a transaction
// before that transaction committed. It tells true concurrency from mere lateness (replication.md rule 16).
type Seen struct {
	Site SiteID `json:"site"`
	LSN  LSN    `json:"lsn"`
}

// Txn is one committed transaction of one origin in one database.
type Txn struct {
	Origin SiteID
	XID    uint32
	// CommitLSN is the start of the commit record, EndLSN the position just behind it. A stream that is complete up
	// to p holds every transaction with EndLSN <= p.
	CommitLSN, EndLSN LSN
	// CommitTime is the WAL's commit timestamp. VersionTime is the time that versions carry: the same, except after
	// a backward clock step (replication.md rule 3).
	CommitTime, VersionTime Time
	Changes                 []Change
	// Seen is sorted by site, at most one entry per site, and never decreases along one origin's stream.
	Seen []Seen
	// Received is when the origin's agent decoded the transaction. It is informative only.
	Received Time
	// Mark is the transaction's own, if it carries one.
	Mark Mark
}

// Mark names a transaction so that its fate can be asked for at another site when its COMMIT was not answered.
type Mark struct {
	LTXID string // bytes; empty: there is no mark
	Level Level
}

// Level is what a COMMIT waited for: synchronous_commit.
type Level uint8

// The levels, in the order in which they promise more. Zero is one that this program does not know.
const (
	CommitOff Level = iota + 1
	CommitLocal
	CommitRemoteWrite
	CommitOn
	CommitRemoteApply
)

// Promises reports whether a COMMIT at the level is acknowledged only when another site has it durably.
func (l Level) Promises() bool { return l == CommitOn || l == CommitRemoteApply }

// Version is the version that the transaction gives to the rows it changes.
func (t *Txn) Version() Version { return Version{t.VersionTime, t.Origin} }

// SeenOf returns the position of site that this transaction had seen, or zero.
func (t *Txn) SeenOf(site SiteID) LSN { return SeenOf(t.Seen, site) }

// SeenOf finds a site's position; zero when there is none.
func SeenOf(seen []Seen, site SiteID) LSN {
	for _, s := range seen {
		if s.Site == site {
			return s.LSN
		}
	}
	return 0
}
