package gateway

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/duri-io/duri/pgwire"
)

// statement is a client's prepared statement. The client's name is known to the gateway only; on servers it has one that
// follows from its content, so that sessions share it. Each backend learns it when it is used there first.
type statement struct {
	name      string // at servers; empty for the unnamed one
	key       string // what makes it equal to another's
	sql, oids []byte // nil: too long to be held; the session stays at the backend that has it
	effects   text   // see session.effectsOf
	judged    uint64 // by which tainted.version
	shape     shape  // as the client knows it
	born      uint64 // the Server's clock when the client prepared it
}

// shape is what a server has said of a statement's parameters and of its result: a hash each, 0 for unknown. Clients read
// it once, so what runs under the statement's name must keep it: a server sees to that (plancache.c, fixed_result), and
// between servers the gateway does.
type shape struct{ parameters, columns uint64 }

// contradicts reports whether both are known and differ.
func (a shape) contradicts(b shape) bool {
	return a.parameters != 0 && b.parameters != 0 && a.parameters != b.parameters || a.columns != 0 && b.columns != 0 && a.columns != b.columns
}

// lacks reports whether b knows what a does not.
func (a shape) lacks(b shape) bool {
	return a.parameters == 0 && b.parameters != 0 || a.columns == 0 && b.columns != 0
}

// note takes a description of typ; what is known already stays. That there are no columns is no knowledge: a FETCH has some when
// its cursor is there.
func (a *shape) note(typ byte, body []byte) {
	switch {
	case typ == pgwire.ParameterDescription && a.parameters == 0:
		a.parameters = hash(hashStart, body)
	case typ == pgwire.RowDescription && a.columns == 0:
		a.columns = columnsHash(body)
	}
}

// hash is FNV-1a, which needs no state on the heap.
func hash(h uint64, b []byte) uint64 {
	for _, c := range b {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return max(h, 1)
}

const hashStart = 14695981039346656037

// columnsHash is over names and types in a RowDescription, without what differs between servers (OIDs of tables) or uses
// (formats). It is 0 if that is not one.
func columnsHash(body []byte) uint64 {
	if len(body) < 2 {
		return 0
	}
	h, rest := hash(hashStart, body[:2]), body[2:]
	for range binary.BigEndian.Uint16(body) {
		end := bytes.IndexByte(rest, 0)
		if end < 0 || len(rest) < end+1+18 {
			return 0
		}
		fields := rest[end+1:]                             // table, column, type, its size, modifier, format
		h = hash(hash(h, rest[:end+1]), fields[6:6+4+2+4]) // the middle three
		rest = fields[18:]
	}
	return h
}

// Names that are no client's: noStatement is never prepared, goneStatement is there to be dropped.
const (
	noStatement   = "duri_none"
	goneStatement = "duri_gone"
)

// missing is what a server says of a statement that does not exist, with the name by which the client calls it.
func missing(e *pgwire.Error, name string) []byte {
	own := *e
	own.Message = strings.ReplaceAll(e.Message, noStatement, name)
	if name == "" {
		own.Message = "unnamed prepared statement does not exist"
	}
	return pgwire.AppendError(nil, &own)
}

// newStatement makes a statement of a client. context is what its text is parsed under: constants in it are converted when
// it is parsed, so only sessions with the same settings can share it.
func newStatement(p pgwire.Statement, context string, effects text) *statement {
	h := sha256.New()
	fmt.Fprintf(h, "%d %d\n%s%s%s", len(p.SQL), len(p.OIDs), p.SQL, p.OIDs, context)
	st := &statement{key: hex.EncodeToString(h.Sum(nil)[:16]), sql: append([]byte{}, p.SQL...), oids: append([]byte{}, p.OIDs...), effects: effects}
	if len(p.Name) > 0 {
		st.name = "duri_" + st.key
	}
	return st
}

// known is what a backend has prepared.
type known struct {
	named   map[string]*preparation
	unnamed preparation
	clock   uint64
}

// preparation is a statement at a backend.
type preparation struct {
	key   string
	shape shape
	made  uint64 // the Server's clock when it was sent
	used  uint64 // the clock when it was used last
}

// statementsMax is how many statements a backend keeps; the one whose last use is longest ago is closed for a new one.
const statementsMax = 200

// find gives a statement's preparation, nil if there is none.
func (k *known) find(st *statement) *preparation {
	p := k.named[st.name]
	if st.name == "" {
		p = &k.unnamed
	}
	if p == nil || p.key != st.key {
		return nil
	}
	k.clock++
	p.used = k.clock
	return p
}

// fresh gives a statement's preparation if it is not older than the statement. What was prepared before may have been made for
// tables and types as they were then; the client has asked for it as they are.
func (k *known) fresh(st *statement) *preparation {
	if p := k.find(st); p != nil && p.made >= st.born {
		return p
	}
	return nil
}

// add notes a statement that is sent now. It gives the server's name of one that must be closed for it before, if any: of the
// same name, or the one whose last use is longest ago.
func (k *known) add(st *statement, now uint64) (gone string, p *preparation) {
	if st.name == "" {
		k.unnamed = preparation{key: st.key, made: now}
		return "", nil
	}
	if k.named == nil {
		k.named = map[string]*preparation{}
	}
	if p = k.named[st.name]; p != nil {
		gone = st.name
	} else if len(k.named) >= statementsMax {
		oldest := k.clock + 1
		for name, q := range k.named {
			if q.used < oldest {
				gone, p, oldest = name, q, q.used
			}
		}
		delete(k.named, gone)
	}
	k.clock++
	k.named[st.name] = &preparation{key: st.key, made: now, used: k.clock}
	return gone, p
}

func (k *known) drop(st *statement) {
	if st.name == "" {
		k.unnamed = preparation{}
	} else {
		delete(k.named, st.name)
	}
}

// restore notes that a statement was not closed.
func (k *known) restore(name string, p *preparation) {
	if k.named != nil { // else all were taken away meanwhile
		k.named[name] = p
	}
}
