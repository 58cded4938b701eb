package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/duri-io/duri/pgwire"
	"github.com/duri-io/duri/pgwire/scram"
)

// passed is what goes with a client's connection to another process: a session that is idle and keeps no backend is no more than
// this. It holds keys, so it is written to nothing but the socket between the two processes.
type passed struct {
	id             uint64 // of the session in the process that passes it
	database, user string
	params         []pgwire.Param // of the StartupMessage, as servers get it
	keys           scram.Keys
	pid            uint32
	secret         [4]byte
	told           []pgwire.Param
	settings       []pgwire.Param
	customs        []string
	statements     map[string]*statement
	home, last     string
	seen           string // the site of the latest transaction, wherever it was
	site           string
	types          []uint32
	since          time.Time
}

// HandOverFormat is the version of the encoding of sessions and of the conversation around it. Processes of different ones do not
// take over from each other.
const HandOverFormat = 2

// passedMax bounds the encoding of a session. One that has prepared more is asked to leave.
const passedMax = 16 << 20

// passed gives the session as it is. Its goroutine calls it between two transactions. mu is held.
func (s *session) passed() *passed {
	seen := s.last
	if s.g.cfg.Reads != nil {
		seen = s.seen.site
	}
	return &passed{
		id: s.id, database: s.who.Database, user: s.who.User, params: s.who.Params, keys: *s.keys, pid: s.pid, secret: s.secret,
		told: s.told, settings: s.settings, customs: s.customs, statements: s.statements, home: s.home, last: s.last, seen: seen, site: s.site, types: s.types,
		since: s.since,
	}
}

// adopt makes a new session what another one was.
func (s *session) adopt(p *passed) {
	s.who = Login{Database: p.database, User: p.user, Params: p.params}
	s.who.key = loginKey(p.params)
	s.keys, s.pid, s.secret = &p.keys, p.pid, p.secret
	s.told, s.settings, s.customs, s.statements = p.told, p.settings, p.customs, p.statements
	s.home, s.last, s.types, s.since = p.home, p.last, p.types, p.since
	s.site, s.told1st = p.site, p.site != ""
	now := s.g.tick() // All that it has seen, and done, was before.
	s.seen, s.homeAt, s.actedAt = sighting{p.seen, now}, now, now
	s.pinsTold, s.portals = map[string]bool{}, map[string]*statement{}
	s.replays = s.mayReplay()
}

// loginKey is params as one string.
func loginKey(params []pgwire.Param) (key string) {
	for _, p := range params {
		key += p.Name + "\x00" + p.Value + "\x00"
	}
	return key
}

// encode writes it: numbers as uvarint, whatever has a length after it.
func (p *passed) encode() []byte {
	var b packer
	b.number(p.id)
	b.text(p.database)
	b.text(p.user)
	b.params(p.params)
	b.bytes(p.keys.ClientKey[:])
	b.bytes(p.keys.ServerKey[:])
	b.bytes(p.keys.Salt)
	b.number(uint64(p.keys.Iterations))
	b.number(uint64(p.pid))
	b.bytes(p.secret[:])
	b.params(p.told)
	b.params(p.settings)
	b.texts(p.customs)
	b.number(uint64(len(p.statements)))
	for _, name := range slices.Sorted(maps.Keys(p.statements)) {
		b.text(name)
		b.statement(p.statements[name])
	}
	b.text(p.home)
	b.text(p.last)
	b.text(p.seen)
	b.text(p.site)
	b.number(uint64(len(p.types)))
	for _, oid := range p.types {
		b.number(uint64(oid))
	}
	b.number(uint64(p.since.UnixMicro()))
	return b.b
}

// errPassed is what is said of bytes that are no session; never what is in them.
var errPassed = errors.New("what came is no session")

// decodePassed reads what encode has written. What is taken of b is copied.
func decodePassed(b []byte) (*passed, error) {
	u := unpacker{b: b}
	p := &passed{id: u.number(), database: u.text(), user: u.text(), params: u.params()}
	u.fixed(p.keys.ClientKey[:])
	u.fixed(p.keys.ServerKey[:])
	p.keys.Salt = u.bytes()
	p.keys.Iterations = int(u.upTo(1<<31 - 1))
	p.pid = uint32(u.upTo(1<<31 - 1))
	u.fixed(p.secret[:])
	p.told, p.settings, p.customs = u.params(), u.params(), u.texts()
	p.statements = map[string]*statement{}
	for range u.count() {
		name := u.text()
		p.statements[name] = u.statement()
	}
	p.home, p.last, p.seen, p.site = u.text(), u.text(), u.text(), u.text()
	for range u.count() {
		p.types = append(p.types, uint32(u.upTo(1<<32-1)))
	}
	p.since = time.UnixMicro(int64(u.upTo(1<<62 - 1)))
	switch {
	case u.bad || len(u.b) > 0:
		return nil, errPassed
	case p.database == "" || p.user == "" || p.pid == 0 || p.keys.Iterations == 0 || len(p.keys.Salt) == 0 || len(p.types) > typesMax:
		return nil, errPassed
	}
	return p, nil
}

// packer writes.
type packer struct{ b []byte }

func (b *packer) number(n uint64) { b.b = binary.AppendUvarint(b.b, n) }
func (b *packer) bytes(v []byte)  { b.number(uint64(len(v))); b.b = append(b.b, v...) }
func (b *packer) text(v string)   { b.number(uint64(len(v))); b.b = append(b.b, v...) }

func (b *packer) texts(all []string) {
	b.number(uint64(len(all)))
	for _, v := range all {
		b.text(v)
	}
}

func (b *packer) params(all []pgwire.Param) {
	b.number(uint64(len(all)))
	for _, p := range all {
		b.text(p.Name)
		b.text(p.Value)
	}
}

func (b *packer) statement(st *statement) {
	b.text(st.name)
	b.text(st.key)
	b.bytes(st.sql)
	b.bytes(st.oids)
	b.number(st.shape.parameters)
	b.number(st.shape.columns)
	e := &st.effects
	var flags uint64
	for i, on := range []bool{e.probe, e.dirty, e.unpin, e.seq, e.local, e.unprepared, e.wrote, e.seems, e.escapes} {
		if on {
			flags |= 1 << i
		}
	}
	b.number(flags)
	b.text(e.pin)
	b.texts(e.customs)
	b.text(e.deallocate)
	b.number(uint64(e.does))
	b.number(uint64(e.statements))
}

// unpacker reads. After the first thing that is wrong, all is empty.
type unpacker struct {
	b   []byte
	bad bool
}

func (u *unpacker) fail() {
	u.b, u.bad = nil, true
}

func (u *unpacker) number() uint64 {
	n, size := binary.Uvarint(u.b)
	if size <= 0 {
		u.fail()
		return 0
	}
	u.b = u.b[size:]
	return n
}

func (u *unpacker) upTo(most uint64) uint64 {
	n := u.number()
	if n > most {
		u.fail()
		return 0
	}
	return n
}

// count is a number of things of at least one byte each, so that it can reserve no more than came.
func (u *unpacker) count() int { return int(u.upTo(uint64(len(u.b)))) }

func (u *unpacker) raw() []byte {
	n := u.number()
	if n > uint64(len(u.b)) {
		u.fail()
		return nil
	}
	v := u.b[:n]
	u.b = u.b[n:]
	return v
}

func (u *unpacker) text() string  { return string(u.raw()) }
func (u *unpacker) bytes() []byte { return append([]byte{}, u.raw()...) }

// fixed reads bytes of a known length.
func (u *unpacker) fixed(to []byte) {
	v := u.raw()
	if len(v) != len(to) {
		u.fail()
		return
	}
	copy(to, v)
}

func (u *unpacker) texts() (all []string) {
	for range u.count() {
		all = append(all, u.text())
	}
	return all
}

func (u *unpacker) params() (all []pgwire.Param) {
	for range u.count() {
		all = append(all, pgwire.Param{Name: u.text(), Value: u.text()})
	}
	return all
}

func (u *unpacker) statement() *statement {
	st := &statement{name: u.text(), key: u.text(), sql: u.bytes(), oids: u.bytes(), shape: shape{u.number(), u.number()}}
	e := &st.effects
	flags := u.upTo(1<<9 - 1)
	for i, on := range []*bool{&e.probe, &e.dirty, &e.unpin, &e.seq, &e.local, &e.unprepared, &e.wrote, &e.seems, &e.escapes} {
		*on = flags&(1<<i) != 0
	}
	e.pin, e.customs, e.deallocate = u.text(), u.texts(), u.text()
	e.does = deed(u.upTo(uint64(tangled)))
	e.statements = int(u.upTo(textMax))
	return st
}

// registerAs gives a session the key by which its client knows it already.
func (g *Server) registerAs(s *session) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.sessions[s.pid] != nil {
		return fmt.Errorf("there is a session of pid %d already", s.pid)
	}
	g.sessions[s.pid] = s
	return nil
}
