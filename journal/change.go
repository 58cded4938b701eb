package journal

import (
	"encoding/binary"
	"fmt"

	"github.com/duri-io/duri/wal"
)

// A change entry: uvarint length of the rest | op | form | 8 bytes relation id | tagged fields NEW and OLD, each the
// bytes of a tuple. form holds the kind of the old tuple in bits 0-1 and TRUNCATE's options in bits 2-3.
const (
	entryHead = 10 // op, form, relation id

	formOldKey   = 1
	formOldFull  = 2
	formOldMask  = 3
	formCascade  = 1 << 2
	formRestart  = 1 << 3
	formReserved = 0xF0

	keyNew = 1<<2 | critical | 1
	keyOld = 2<<2 | critical | 1

	// Value kinds that later versions may write (archive.md J5 and section 10).
	kindBinary = 'b'
	kindSealed = 's'
)

// hasNew and hasOld say which tuples a change carries.
func hasNew(op wal.Op) bool { return op == wal.Insert || op == wal.Update }

func hasOld(op wal.Op, kind wal.OldKind) bool {
	return kind != wal.OldNone && (op == wal.Update || op == wal.Delete)
}

// formOf encodes the old kind and the options; ok is false when the change contradicts itself.
func formOf(c *wal.Change) (form byte, ok bool) {
	switch c.OldKind {
	case wal.OldNone:
	case wal.OldKey:
		form = formOldKey
	case wal.OldFull:
		form = formOldFull
	default:
		return 0, false
	}
	switch c.Op {
	case wal.Update, wal.Delete:
		return form, c.Options == 0
	case wal.Insert:
		return 0, form == 0 && c.Options == 0
	case wal.Truncate:
		return c.Options << 2, form == 0 && c.Options <= wal.TruncateCascade|wal.TruncateRestartIdentity
	}
	return 0, false
}

// parseForm is the reverse of formOf.
func parseForm(op wal.Op, form byte) (old wal.OldKind, options uint8, err error) {
	if form&formReserved != 0 {
		return 0, 0, newer("change with unknown form %02x", form)
	}
	switch form & formOldMask {
	case formOldKey:
		old = wal.OldKey
	case formOldFull:
		old = wal.OldFull
	case formOldMask:
		return 0, 0, newer("change with unknown form %02x", form)
	}
	options = form >> 2
	switch op {
	case wal.Update, wal.Delete:
		if options != 0 {
			return 0, 0, malformed("%s with options of TRUNCATE", op)
		}
	case wal.Insert:
		if form != 0 {
			return 0, 0, malformed("INSERT with form %02x", form)
		}
	case wal.Truncate:
		if old != wal.OldNone {
			return 0, 0, malformed("TRUNCATE with an old tuple")
		}
	default:
		return 0, 0, newer("change of unknown kind %q", byte(op))
	}
	return old, options, nil
}

// tupleSize is the encoded size of a tuple; an error says why it cannot be encoded.
func tupleSize(t wal.Tuple, columns int) (int, error) {
	if len(t) != columns {
		return 0, fmt.Errorf("tuple has %d columns, the relation has %d", len(t), columns)
	}
	n := uvarintLen(uint64(len(t))) + len(t)
	for i := range t {
		switch t[i].Kind {
		case wal.Text:
			l := len(t[i].Data)
			n += uvarintLen(uint64(l)) + l
		case wal.Null, wal.Unchanged, wal.Omitted:
		default:
			return 0, fmt.Errorf("column %d has a value of unknown kind %q", i+1, byte(t[i].Kind))
		}
	}
	return n, nil
}

// appendTuple appends the tuple that tupleSize accepted.
func appendTuple(b []byte, t wal.Tuple) []byte {
	b = binary.AppendUvarint(b, uint64(len(t)))
	for i := range t {
		v := &t[i]
		b = append(b, byte(v.Kind))
		if v.Kind != wal.Text {
			continue
		}
		if l := len(v.Data); l < 0x80 {
			b = append(b, byte(l))
		} else {
			b = binary.AppendUvarint(b, uint64(l))
		}
		b = append(b, v.Data...)
	}
	return b
}

// parseTuple reads a tuple, appending its values to *vals unless vals is nil. The values alias b.
func parseTuple(b []byte, columns int, vals *[]wal.Value) error {
	n, k := uvarint(b)
	if k <= 0 || n != uint64(columns) {
		return malformed("tuple of %d columns for a relation of %d", n, columns)
	}
	b = b[k:]
	for range columns {
		if len(b) == 0 {
			return malformed("tuple is cut off")
		}
		v := wal.Value{Kind: wal.ValueKind(b[0])}
		b = b[1:]
		switch v.Kind {
		case wal.Null, wal.Unchanged, wal.Omitted:
		case wal.Text:
			l, k := uvarint(b)
			if k <= 0 || l > uint64(len(b)-k) {
				return malformed("value runs past its tuple")
			}
			end := k + int(l)
			v.Data, b = b[k:end:end], b[end:]
		case kindBinary, kindSealed:
			return newer("value of kind %q", byte(v.Kind))
		default:
			return malformed("value of unknown kind %q", byte(v.Kind))
		}
		if vals != nil {
			*vals = append(*vals, v)
		}
	}
	if len(b) != 0 {
		return malformed("%d bytes after a tuple", len(b))
	}
	return nil
}

// splitEntry takes the first entry off a run of entries.
func splitEntry(b []byte) (entry, rest []byte, err error) {
	l, k := uvarint(b)
	if k <= 0 || l > uint64(len(b)-k) || l < entryHead {
		return nil, nil, malformed("change entry is cut off")
	}
	end := k + int(l)
	return b[k:end:end], b[end:], nil
}

// relations finds relations by ID; the small table in front spares most look-ups the map. The zero value is ready.
type relations struct {
	byID  map[wal.RelationID]*wal.Relation
	front [64]*wal.Relation
}

func (r *relations) add(rel *wal.Relation) {
	if r.byID == nil {
		r.byID = map[wal.RelationID]*wal.Relation{}
	}
	if _, ok := r.byID[rel.ID]; !ok {
		r.byID[rel.ID] = rel
	}
}

func (r *relations) get(id wal.RelationID) *wal.Relation {
	slot := &r.front[id[0]%64]
	if *slot == nil || (*slot).ID != id {
		rel := r.byID[id]
		if rel == nil {
			return nil
		}
		*slot = rel
	}
	return *slot
}

// entryRelation is the relation ID of an entry that splitEntry returned.
func entryRelation(e []byte) wal.RelationID { return wal.RelationID(e[2:entryHead]) }

// parseEntry reads an entry. With vals nil it only checks; otherwise it appends the values and sets c, whose tuples
// are parts of *vals.
func parseEntry(e []byte, rels *relations, c *wal.Change, vals *[]wal.Value) error {
	op := wal.Op(e[0])
	old, options, err := parseForm(op, e[1])
	if err != nil {
		return err
	}
	rel := rels.get(entryRelation(e))
	if rel == nil {
		return malformed("change refers to relation %s, whose schema record is missing", entryRelation(e))
	}
	newTuple, oldTuple, err := entryTuples(e[entryHead:], op, old)
	if err != nil {
		return err
	}
	c.Op, c.Relation, c.OldKind, c.Options = op, rel, old, options
	if newTuple != nil {
		if c.New, err = readTuple(newTuple, rel, vals); err != nil {
			return err
		}
	}
	if oldTuple != nil {
		if c.Old, err = readTuple(oldTuple, rel, vals); err != nil {
			return err
		}
	}
	return nil
}

// readTuple parses a tuple into *vals and returns that part of it.
func readTuple(b []byte, rel *wal.Relation, vals *[]wal.Value) (wal.Tuple, error) {
	if vals == nil {
		return nil, parseTuple(b, len(rel.Columns), nil)
	}
	start := len(*vals)
	if err := parseTuple(b, len(rel.Columns), vals); err != nil {
		return nil, err
	}
	return wal.Tuple((*vals)[start:len(*vals):len(*vals)]), nil
}

// entryTuples reads the tagged fields of an entry, and sees to it that those the change needs, and no others, are there.
func entryTuples(b []byte, op wal.Op, old wal.OldKind) (newTuple, oldTuple []byte, err error) {
	// The two usual fields are read without the general machinery: this is the hot path.
	if len(b) > 0 && b[0] == keyNew {
		newTuple, b = entryField(b)
	}
	if len(b) > 0 && b[0] == keyOld {
		oldTuple, b = entryField(b)
	}
	if len(b) > 0 {
		if err := checkRest(b); err != nil {
			return nil, nil, err
		}
	}
	if (newTuple != nil) != hasNew(op) || (oldTuple != nil) != hasOld(op, old) {
		return nil, nil, malformed("%s with the wrong tuples", op)
	}
	return newTuple, oldTuple, nil
}

// entryField reads the bytes field at the start of b, whose key is one byte. On damage it returns nil and b.
func entryField(b []byte) (data, rest []byte) {
	l, k := uvarint(b[1:])
	if k <= 0 || l == 0 || l > uint64(len(b)-1-k) {
		return nil, b
	}
	end := 1 + k + int(l)
	return b[1+k : end : end], b[end:]
}

// checkRest handles fields of an entry that version 1 does not write.
func checkRest(b []byte) error {
	f := fieldsOf("change", b)
	for f.next() {
		if f.tag <= 2 {
			return malformed("change with a damaged tuple")
		}
		f.unknown()
	}
	return f.err
}
