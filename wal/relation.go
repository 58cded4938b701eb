package wal

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// Identity is a table's replica identity, as pg_class.relreplident spells it.
type Identity byte

const (
	IdentityDefault Identity = 'd'
	IdentityNothing Identity = 'n'
	IdentityFull    Identity = 'f'
	IdentityIndex   Identity = 'i'
)

// Column is a column of a Relation as the origin sends it.
type Column struct {
	Name string
	// TypeOID is the origin's OID of the type: the same everywhere for built-in types only. TypeName ("schema.name")
	// is set for the others.
	TypeOID  uint32
	TypeName string
	TypeMod  int32
	// Key is pgoutput's flag: part of the replica identity. Under REPLICA IDENTITY FULL every column carries it, so
	// it does not tell the primary key.
	Key bool
}

// RelationID names the content of a Relation: the first 8 bytes of the SHA-256 of its canonical form. Changes refer
// to their relation by it, so that a journal's bytes do not depend on when PostgreSQL repeats its definitions.
type RelationID [8]byte

// String prints the ID in hexadecimal.
func (id RelationID) String() string { return hex.EncodeToString(id[:]) }

// Relation is one version of a table's definition at its origin. It is immutable once ID is set (see Seal).
type Relation struct {
	ID        RelationID
	OID       uint32
	Namespace string
	Name      string
	Identity  Identity
	Columns   []Column
}

// String prints schema.table.
func (r *Relation) String() string { return r.Namespace + "." + r.Name }

// Seal computes the ID from the rest and returns r.
func (r *Relation) Seal() *Relation {
	sum := sha256.Sum256(r.AppendCanonical(nil))
	copy(r.ID[:], sum[:])
	return r
}

// AppendCanonical appends the canonical bytes of the relation's content (without ID): the journal's schema record
// holds them. Integers are uvarints, strings are length-prefixed.
func (r *Relation) AppendCanonical(b []byte) []byte {
	str := func(s string) { b = append(binary.AppendUvarint(b, uint64(len(s))), s...) }
	b = binary.AppendUvarint(b, uint64(r.OID))
	str(r.Namespace)
	str(r.Name)
	b = append(b, byte(r.Identity))
	b = binary.AppendUvarint(b, uint64(len(r.Columns)))
	for _, c := range r.Columns {
		str(c.Name)
		b = binary.AppendUvarint(b, uint64(c.TypeOID))
		str(c.TypeName)
		b = binary.AppendVarint(b, int64(c.TypeMod))
		flags := byte(0)
		if c.Key {
			flags = 1
		}
		b = append(b, flags)
	}
	return b
}

// maxColumns is PostgreSQL's limit of columns in a table (MaxHeapAttributeNumber is 1600).
const maxColumns = 1664

// ParseRelation reads what AppendCanonical wrote and seals it. It never panics on bad input.
func ParseRelation(b []byte) (*Relation, error) {
	p := parser{b: b}
	r := &Relation{OID: uint32(p.uvarint()), Namespace: p.str(), Name: p.str(), Identity: Identity(p.byte())}
	n := p.uvarint()
	if n > maxColumns {
		return nil, fmt.Errorf("relation definition with %d columns", n)
	}
	for range n {
		c := Column{Name: p.str(), TypeOID: uint32(p.uvarint()), TypeName: p.str(), TypeMod: int32(p.varint())}
		c.Key = p.byte()&1 != 0
		r.Columns = append(r.Columns, c)
		if p.bad {
			break
		}
	}
	if p.bad || len(p.b) != 0 {
		return nil, fmt.Errorf("relation definition is damaged (%d bytes)", len(b))
	}
	return r.Seal(), nil
}

// parser reads the primitive forms; after the first error bad is set and every result is zero.
type parser struct {
	b   []byte
	bad bool
}

func (p *parser) fail() { p.b, p.bad = nil, true }

func (p *parser) uvarint() uint64 {
	v, n := binary.Uvarint(p.b)
	if n <= 0 {
		p.fail()
		return 0
	}
	p.b = p.b[n:]
	return v
}

func (p *parser) varint() int64 {
	v, n := binary.Varint(p.b)
	if n <= 0 {
		p.fail()
		return 0
	}
	p.b = p.b[n:]
	return v
}

func (p *parser) byte() byte {
	if len(p.b) == 0 {
		p.fail()
		return 0
	}
	v := p.b[0]
	p.b = p.b[1:]
	return v
}

func (p *parser) str() string {
	n := p.uvarint()
	if n > uint64(len(p.b)) {
		p.fail()
		return ""
	}
	s := string(p.b[:n])
	p.b = p.b[n:]
	return s
}
