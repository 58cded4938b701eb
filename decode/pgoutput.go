package decode

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/duri-io/duri/wal"
)

// Commit is one committed transaction as pgoutput delivers it, in commit order.
type Commit struct {
	// Txn holds the transaction; its Changes are empty for a foreign one (see Origin) and for one that touched
	// nothing published. Origin, Seen, VersionTime and Received are the caller's to fill.
	Txn *wal.Txn
	// Origin is the replication origin the transaction was applied under ("" for a local one), OriginLSN the position
	// in that origin's log that it carried.
	Origin    string
	OriginLSN wal.LSN
	// Messages are the transactional logical messages with duri's prefix, in order.
	Messages []Message
}

// Message is a logical message written by pg_logical_emit_message.
type Message struct {
	LSN             wal.LSN
	Prefix, Content string
}

// parser turns pgoutput protocol 1 messages into Commits. It keeps the definitions that PostgreSQL sends once per
// session, so it must not outlive its connection. Not safe for concurrent use.
//
// Source: PostgreSQL manual, "Logical Replication Message Formats".
type parser struct {
	relations map[uint32]*wal.Relation
	types     map[uint32]string
	cur       *Commit
	usual     int // changes of the last transaction: a guess at those of the next
	arena     arena
	tuples    tupleArena
	own       func(origin string) bool // see Config.Own
	foreign   bool                     // cur was applied from elsewhere
}

func newParser(own func(origin string) bool) *parser {
	return &parser{relations: map[uint32]*wal.Relation{}, types: map[uint32]string{}, own: own}
}

// message consumes one pgoutput message. It returns a Commit when the message completes a transaction. data may be
// reused by the caller afterwards.
func (p *parser) message(data []byte) (*Commit, error) {
	if len(data) == 0 {
		return nil, fmt.Errorf("empty pgoutput message")
	}
	r := reader{b: data[1:]}
	kind := data[0]
	var done *Commit
	var err error
	switch kind {
	case 'B':
		p.begin(&r)
	case 'C':
		done, err = p.commit(&r)
	case 'O':
		err = p.origin(&r)
	case 'R':
		p.relation(&r)
	case 'Y':
		oid, ns, name := r.u32(), r.str(), r.str()
		p.types[oid] = ns + "." + name
	case 'I', 'U', 'D':
		err = p.row(kind, &r)
	case 'T':
		err = p.truncate(&r)
	case 'M':
		p.logical(&r)
	default:
		return nil, fmt.Errorf("unknown pgoutput message %q; this server speaks a newer protocol", kind)
	}
	if err != nil {
		return nil, err
	}
	if r.bad {
		return nil, fmt.Errorf("pgoutput message %q of %d bytes is cut short", kind, len(data))
	}
	return done, nil
}

func (p *parser) begin(r *reader) {
	final, ts, xid := r.u64(), r.u64(), r.u32()
	p.cur, p.foreign = &Commit{Txn: &wal.Txn{XID: xid, CommitLSN: wal.LSN(final), CommitTime: wal.Time(ts)}}, false
}

func (p *parser) commit(r *reader) (*Commit, error) {
	r.u8() // flags, unused
	commit, end, ts := r.u64(), r.u64(), r.u64()
	c := p.cur
	if c == nil || uint64(c.Txn.CommitLSN) != commit {
		return nil, fmt.Errorf("pgoutput commit at %s without its begin", wal.LSN(commit))
	}
	c.Txn.EndLSN, c.Txn.CommitTime = wal.LSN(end), wal.Time(ts)
	c.Txn.Mark = markOf(c.Messages)
	p.cur = nil
	p.usual = min(len(c.Txn.Changes), 64)
	return c, nil
}

func (p *parser) origin(r *reader) error {
	lsn, name := r.u64(), r.str()
	if p.cur == nil {
		return fmt.Errorf("pgoutput origin outside a transaction")
	}
	p.cur.OriginLSN, p.cur.Origin = wal.LSN(lsn), name
	p.foreign = p.own == nil || !p.own(name)
	return nil
}

func (p *parser) relation(r *reader) {
	rel := &wal.Relation{OID: r.u32(), Namespace: r.str(), Name: r.str(), Identity: wal.Identity(r.u8())}
	if rel.Namespace == "" { // pgoutput sends pg_catalog as the empty string
		rel.Namespace = "pg_catalog"
	}
	n := int(r.u16())
	for range n {
		flags := r.u8()
		c := wal.Column{Name: r.str(), TypeOID: r.u32(), TypeMod: int32(r.u32()), Key: flags&1 != 0}
		c.TypeName = p.types[c.TypeOID]
		rel.Columns = append(rel.Columns, c)
		if r.bad {
			return
		}
	}
	p.relations[rel.OID] = rel.Seal()
}

func (p *parser) row(kind byte, r *reader) error {
	oid := r.u32()
	if p.cur == nil {
		return fmt.Errorf("pgoutput row change outside a transaction")
	}
	if p.foreign {
		return nil // applied from elsewhere: never sent again (rule 20), so not even parsed
	}
	rel := p.relations[oid]
	if rel == nil {
		return fmt.Errorf("pgoutput change of relation %d whose definition was not sent", oid)
	}
	c := wal.Change{Op: wal.Op(kind), Relation: rel}
	tag := r.u8()
	if tag == 'K' || tag == 'O' {
		c.OldKind = wal.OldKind(tag)
		c.Old = p.tuple(r, rel, tag == 'K')
		if kind == 'U' {
			tag = r.u8()
		}
	}
	if kind != 'D' {
		if tag != 'N' {
			return fmt.Errorf("pgoutput %s without its new tuple", c.Op)
		}
		c.New = p.tuple(r, rel, false)
	} else if c.OldKind == wal.OldNone {
		return fmt.Errorf("pgoutput DELETE on %s without its key", rel)
	}
	if r.bad {
		return nil // message reports it
	}
	if p.cur.Txn.Changes == nil {
		p.cur.Txn.Changes = make([]wal.Change, 0, p.usual)
	}
	p.cur.Txn.Changes = append(p.cur.Txn.Changes, c)
	return nil
}

// tuple reads TupleData. In a key tuple PostgreSQL sends the columns outside the key as NULL; they become Omitted,
// because a key column is never NULL and the others are unknown.
func (p *parser) tuple(r *reader, rel *wal.Relation, key bool) wal.Tuple {
	n := int(r.u16())
	if n != len(rel.Columns) {
		r.bad = true
		return nil
	}
	t := p.tuples.take(n)
	for i := range n {
		kind := wal.ValueKind(r.u8())
		switch kind {
		case wal.Null, wal.Unchanged:
			if key && !rel.Columns[i].Key {
				kind = wal.Omitted
			}
			t[i] = wal.Value{Kind: kind}
		case wal.Text:
			t[i] = wal.Value{Kind: wal.Text, Data: p.arena.copy(r.bytes(int(r.u32())))}
		default:
			r.bad = true
			return nil
		}
	}
	return t
}

func (p *parser) truncate(r *reader) error {
	n, options := int(r.u32()), r.u8()
	if p.cur == nil {
		return fmt.Errorf("pgoutput truncate outside a transaction")
	}
	if p.foreign {
		return nil
	}
	for range n {
		oid := r.u32()
		if r.bad {
			return nil
		}
		rel := p.relations[oid]
		if rel == nil {
			return fmt.Errorf("pgoutput TRUNCATE of relation %d whose definition was not sent", oid)
		}
		p.cur.Txn.Changes = append(p.cur.Txn.Changes, wal.Change{Op: wal.Truncate, Relation: rel, Options: options})
	}
	return nil
}

func (p *parser) logical(r *reader) {
	transactional := r.u8()&1 != 0
	m := Message{LSN: wal.LSN(r.u64()), Prefix: r.str()}
	m.Content = string(r.bytes(int(r.u32())))
	if transactional && p.cur != nil && !p.foreign && isOurs(m.Prefix) {
		p.cur.Messages = append(p.cur.Messages, m)
	}
}

// markPrefix is that of the message that duri.mark writes: a byte for the level, then the LTXID.
const markPrefix = MessagePrefix + ".mark"

// Lengths of an LTXID in bytes; what has another one is no mark.
const ltxidMin, ltxidMax = 16, 64

// markOf is a transaction's mark: of several, the last, which is that of whoever sent the COMMIT. Any client may write
// messages.
func markOf(all []Message) (m wal.Mark) {
	for _, msg := range all {
		if n := len(msg.Content) - 1; msg.Prefix == markPrefix && n >= ltxidMin && n <= ltxidMax {
			m = wal.Mark{LTXID: msg.Content[1:], Level: wal.Level(msg.Content[0])}
		}
	}
	return m
}

// reader reads network-order primitives; after the first short read bad is set and every result is zero.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) bytes(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.b, r.bad = nil, true
		return nil
	}
	v := r.b[:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) u8() byte {
	if b := r.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if b := r.bytes(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.bytes(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if b := r.bytes(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *reader) str() string {
	i := bytes.IndexByte(r.b, 0)
	if i < 0 {
		r.b, r.bad = nil, true
		return ""
	}
	s := string(r.b[:i])
	r.b = r.b[i+1:]
	return s
}

// arena gives values room in few growing blocks instead of one allocation per value. Transactions share blocks: one
// that is kept for long keeps up to 64 kB of its neighbours.
type arena struct {
	free []byte
	last int
}

func (a *arena) copy(b []byte) []byte {
	if len(b) > len(a.free) {
		a.last = max(len(b), 1024, min(64<<10, 4*a.last))
		a.free = make([]byte, a.last)
	}
	n := copy(a.free, b)
	v := a.free[:n:n]
	a.free = a.free[n:]
	return v
}

// tupleArena does the same for the tuples themselves.
type tupleArena struct {
	free []wal.Value
	last int
}

func (a *tupleArena) take(n int) wal.Tuple {
	if n > len(a.free) {
		a.last = max(n, 32, min(4096, 4*a.last))
		a.free = make([]wal.Value, a.last)
	}
	t := a.free[:n:n]
	a.free = a.free[n:]
	return t
}
