package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/duri-io/duri/wal"
)

// changesLimit is the size at which a changes record is cut; a single larger change gets a record of its own.
const changesLimit = 256 << 10

// relationState is what the appender knows of a relation.
type relationState struct {
	rel   *wal.Relation
	frame []byte // its schema record as it came: fields of a later version travel on
	segID uint64 // the segment that holds this record; 0 is none
	mark  uint64 // the last transaction that counted it
	count uint64 // changes of that transaction
}

// catalog finds relation states by ID. The zero value is ready.
type catalog struct {
	byID  map[wal.RelationID]*relationState
	front [64]*relationState
}

// get returns the state of a relation that add has seen, else nil.
func (c *catalog) get(id wal.RelationID) *relationState {
	slot := &c.front[id[0]%64]
	if *slot == nil || (*slot).rel.ID != id {
		s := c.byID[id]
		if s == nil {
			return nil
		}
		*slot = s
	}
	return *slot
}

// learn makes a relation known by its schema record, which it copies. A record that says more about a known relation
// replaces the one before, and is to be written again.
func (c *catalog) learn(rel *wal.Relation, frame []byte) *relationState {
	s := c.byID[rel.ID]
	if s == nil {
		if c.byID == nil {
			c.byID = map[wal.RelationID]*relationState{}
		}
		s = &relationState{rel: rel}
		c.byID[rel.ID] = s
	}
	if !bytes.Equal(s.frame, frame) {
		s.frame, s.segID = bytes.Clone(frame), 0
	}
	return s
}

// entrySize holds the sizes of one change's encoding.
type entrySize struct{ body, newTuple, oldTuple int } // body is the entry without its length prefix

func (s entrySize) total() int { return uvarintLen(uint64(s.body)) + s.body }

// encoder turns transactions into records. It measures a whole transaction before anything is written, so that a
// transaction that cannot be encoded leaves no trace, and so that bytes are copied once.
type encoder struct {
	rels   *catalog
	serial uint64

	// of the transaction measured last
	sizes  []entrySize
	used   []*relationState // its relations, in order of first appearance
	size   int              // of all entries
	values int
	core   []byte
	body   []byte // scratch
	counts []byte // scratch
}

// measure checks t and computes all sizes and its core.
func (e *encoder) measure(t *wal.Txn, site wal.SiteID) error {
	if err := checkTxn(t, site); err != nil {
		return err
	}
	e.serial++
	e.sizes, e.used, e.size, e.values = e.sizes[:0], e.used[:0], 0, 0
	flags := uint64(0)
	for i := range t.Changes {
		c := &t.Changes[i]
		s, err := e.measureChange(c)
		if err != nil {
			return fmt.Errorf("change %d: %w", i+1, err)
		}
		if c.Op == wal.Truncate {
			flags |= flagTruncate
		}
		e.sizes = append(e.sizes, s)
		e.size += s.total()
	}
	e.buildCore(t, flags)
	return nil
}

// checkTxn checks what does not concern the changes.
func checkTxn(t *wal.Txn, site wal.SiteID) error {
	if t.Origin != site {
		return fmt.Errorf("transaction of site %d in the journal of site %d", t.Origin, site)
	}
	if t.Mark.LTXID == "" && t.Mark.Level != 0 {
		return fmt.Errorf("a mark of level %d without an LTXID", t.Mark.Level)
	}
	if t.CommitLSN > t.EndLSN {
		return fmt.Errorf("commit position %s is beyond its end %s", t.CommitLSN, t.EndLSN)
	}
	return checkSeen(t.Seen)
}

// checkSeen checks the order that wal.Txn promises.
func checkSeen(seen []wal.Seen) error {
	for i := 1; i < len(seen); i++ {
		if seen[i].Site <= seen[i-1].Site {
			return errors.New("seen positions are not sorted by site")
		}
	}
	return nil
}

func (e *encoder) measureChange(c *wal.Change) (s entrySize, err error) {
	if _, ok := formOf(c); !ok {
		return s, fmt.Errorf("%s with old kind %q and options %d is no valid change", c.Op, byte(c.OldKind), c.Options)
	}
	st, err := e.state(c.Relation)
	if err != nil {
		return s, err
	}
	if st.mark != e.serial {
		st.mark, st.count = e.serial, 0
		e.used = append(e.used, st)
	}
	st.count++
	columns := len(st.rel.Columns)
	s.body = entryHead
	if hasNew(c.Op) {
		if s.newTuple, err = tupleSize(c.New, columns); err != nil {
			return s, fmt.Errorf("new %w", err)
		}
		s.body += 1 + uvarintLen(uint64(s.newTuple)) + s.newTuple
		e.values += columns
	} else if c.New != nil {
		return s, fmt.Errorf("%s with a new tuple", c.Op)
	}
	if hasOld(c.Op, c.OldKind) {
		if s.oldTuple, err = tupleSize(c.Old, columns); err != nil {
			return s, fmt.Errorf("old %w", err)
		}
		s.body += 1 + uvarintLen(uint64(s.oldTuple)) + s.oldTuple
		e.values += columns
	} else if c.Old != nil {
		return s, fmt.Errorf("%s with an old tuple but no old kind", c.Op)
	}
	if s.body > maxBody-frameHead {
		return s, fmt.Errorf("change of %d bytes (limit %d)", s.body, maxBody-frameHead)
	}
	return s, nil
}

// state finds the relation of a change. A relation is checked against its ID once, when it is met for the first time.
func (e *encoder) state(rel *wal.Relation) (*relationState, error) {
	if rel == nil {
		return nil, errors.New("no relation")
	}
	if st := e.rels.get(rel.ID); st != nil {
		return st, nil
	}
	// ParseRelation checks more than the ID: what it refuses here, no reader could read either.
	again, err := wal.ParseRelation(rel.AppendCanonical(nil))
	if err != nil {
		return nil, fmt.Errorf("relation %s: %w", rel, err)
	}
	if again.ID != rel.ID {
		return nil, fmt.Errorf("relation %s has ID %s, its content gives %s: call Seal before use", rel, rel.ID, again.ID)
	}
	return e.rels.learn(again, appendSchema(nil, again)), nil
}

// buildCore builds the chained part of the txn record. Every byte of it is a function of the WAL and of the version
// before (archive.md J1).
func (e *encoder) buildCore(t *wal.Txn, flags uint64) {
	counts := e.counts[:0]
	for _, st := range e.used {
		counts = binary.AppendUvarint(append(counts, st.rel.ID[:]...), st.count)
	}
	b := e.core[:0]
	b = appendUintNZ(b, 1, critical, uint64(t.Origin))
	b = appendUintNZ(b, 2, critical, uint64(t.XID))
	b = appendUintNZ(b, 3, critical, uint64(t.CommitLSN))
	b = appendUintNZ(b, 4, critical, uint64(t.EndLSN))
	b = appendTimeNZ(b, 5, critical, t.CommitTime)
	if t.VersionTime != t.CommitTime {
		b = appendUint(b, 6, critical, zigzag(int64(t.VersionTime)))
	}
	b = appendUintNZ(b, 7, critical, uint64(len(t.Changes)))
	b = appendBytesNZ(b, 8, 0, counts)
	b = appendUintNZ(b, 9, critical, flags)
	b = appendBytesNZ(b, 10, critical, []byte(t.Mark.LTXID))
	b = appendUintNZ(b, 11, critical, uint64(t.Mark.Level))
	e.core, e.counts = b, counts
}

// appendTxn appends the txn record of the transaction measured last.
func (e *encoder) appendTxn(b []byte, t *wal.Txn, from wal.LSN) []byte {
	body := appendBytes(e.body[:0], 1, critical, e.core)
	body = appendUintNZ(body, 2, critical, uint64(from))
	body = appendTimeNZ(body, 3, 0, t.Received)
	if len(t.Seen) > 0 {
		e.counts = appendSeen(e.counts[:0], t.Seen)
		body = appendBytes(body, 4, 0, e.counts)
	}
	body = appendUintNZ(body, 5, 0, uint64(e.values))
	e.body = body
	return appendFrame(b, TypeTxn, flagCritical, body)
}

// run is how many changes from index i go into one changes record, and the size of their entries.
func (e *encoder) run(i int) (n, size int) {
	for ; i+n < len(e.sizes); n++ {
		s := e.sizes[i+n].total()
		if n > 0 && size+s > changesLimit {
			break
		}
		size += s
	}
	return n, size
}

// appendChanges appends a changes record of n changes from index i whose entries take size bytes, and returns the
// entries as part of b.
func (e *encoder) appendChanges(b []byte, t *wal.Txn, i, n, size int) (out, entries []byte) {
	start := len(b)
	b = openFrame(b, TypeChanges, flagCritical, 1+uvarintLen(uint64(size))+size)
	b = binary.AppendUvarint(append(b, 2<<2|critical|1), uint64(size))
	first := len(b)
	for k := i; k < i+n; k++ {
		b = appendEntry(b, &t.Changes[k], e.sizes[k])
	}
	closeFrame(b, start)
	return b, b[first:]
}

// appendEntry appends a change entry of known size.
func appendEntry(b []byte, c *wal.Change, s entrySize) []byte {
	form, _ := formOf(c)
	b = binary.AppendUvarint(b, uint64(s.body))
	b = append(b, byte(c.Op), form)
	b = append(b, c.Relation.ID[:]...)
	if hasNew(c.Op) {
		b = binary.AppendUvarint(append(b, keyNew), uint64(s.newTuple))
		b = appendTuple(b, c.New)
	}
	if hasOld(c.Op, c.OldKind) {
		b = binary.AppendUvarint(append(b, keyOld), uint64(s.oldTuple))
		b = appendTuple(b, c.Old)
	}
	return b
}
