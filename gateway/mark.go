package gateway

import (
	"crypto/rand"
	"encoding/binary"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// markSQL is the gateway's own statement that marks a transaction that has written, and gives its id. It is what duri.mark does
// (catalog/migrations/0009_outcome.sql), at a twentieth of its cost: the level that it writes down is that of the session where $2
// is what synchronous_standby_names says, and 'local' where that names nobody, which prepareMarks has looked at before. Elsewhere the
// function looks who is synchronous. Operators are named in full, as a session may put its own schemas first.
const (
	markStatement = "duri_mark"
	markSQL       = `SELECT x, CASE WHEN x IS NOT NULL AND names OPERATOR(pg_catalog.=) $2 THEN pg_catalog.pg_logical_emit_message(true, 'duri.mark',
	pg_catalog.byteacat(pg_catalog.set_byte(pg_catalog.decode('00', 'hex'), 0, coalesce(pg_catalog.array_position(
		ARRAY['off', 'local', 'remote_write', 'on', 'remote_apply'],
		CASE WHEN level OPERATOR(pg_catalog.<>) 'off' AND names OPERATOR(pg_catalog.=) '' THEN 'local' ELSE level END), 0)), $1)) END,
CASE WHEN x IS NOT NULL AND names OPERATOR(pg_catalog.<>) $2 THEN duri.mark($1) END
FROM (SELECT pg_catalog.pg_current_xact_id_if_assigned(), pg_catalog.current_setting('synchronous_standby_names'),
	pg_catalog.current_setting('synchronous_commit')) AS s(x, names, level)`
	aboutSQL = `SELECT extract(epoch FROM backend_start), pg_catalog.current_setting('synchronous_standby_names')
FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid()`
)

// waitsFor reports whether synchronous_standby_names makes every commit wait for a standby of a name (its grammar:
// src/backend/replication/syncrep_gram.y). One of several that may stand in for it is not enough.
func waitsFor(setting, standby string) bool {
	count, list := 1, strings.TrimSpace(setting)
	if open := strings.IndexByte(list, '('); open >= 0 && strings.HasSuffix(list, ")") {
		words := strings.Fields(strings.ToUpper(list[:open]))
		if len(words) == 2 && (words[0] == "FIRST" || words[0] == "ANY") {
			words = words[1:]
		}
		n, err := strconv.Atoi(strings.Join(words, " "))
		if err != nil {
			return false
		}
		count, list = n, list[open+1:len(list)-1]
	}
	names := strings.Split(list, ",")
	for i, name := range names {
		name = strings.TrimSpace(name)
		if len(name) > 1 && name[0] == '"' && name[len(name)-1] == '"' {
			name = name[1 : len(name)-1]
		}
		if names[i] = strings.ToLower(name); strings.ContainsAny(name, `"*() `) || name == "" {
			return false // '*' is anybody, and a name that needs quoting is none of duri's
		}
	}
	slices.Sort(names)
	return standby != "" && count == len(slices.Compact(names)) && slices.Contains(names, strings.ToLower(standby))
}

// marking is whether a backend can mark transactions.
type marking byte

const (
	untried marking = iota
	marks
	marksNot // the database has no function duri.mark: a lost answer to a commit stays open
)

// ltxidLen is the length of a mark: hour, incarnation of the gateway, session and random bits of it, transaction.
const ltxidLen = 4 + 8 + 8 + 8 + 8

// newLTXID names a transaction. The random bits keep clients from forging another's; nothing compares the hour with a clock: it
// is there for partitions by time.
func (s *session) newLTXID() []byte {
	id := make([]byte, 0, ltxidLen)
	id = binary.BigEndian.AppendUint32(id, uint32(time.Now().Unix()/3600))
	id = binary.BigEndian.AppendUint64(id, s.g.incarnation)
	id = binary.BigEndian.AppendUint64(id, s.id)
	if s.salt == 0 {
		var b [8]byte
		_, _ = rand.Read(b[:]) // It does not fail (crypto/rand).
		s.salt = binary.BigEndian.Uint64(b[:]) | 1
	}
	id = binary.BigEndian.AppendUint64(id, s.salt)
	s.marks++
	return binary.BigEndian.AppendUint64(id, s.marks)
}

// prepareMarks has a backend prepare what marking needs, once. mu is held.
func (s *session) prepareMarks(b *backend) error {
	if !s.keeps() || b.marking != untried {
		return nil
	}
	q := &question{setup: true}
	b.ask(q)
	m := pgwire.AppendParse(s.scratch[:0], markStatement, []byte(markSQL), []byte{0, 2, 0, 0, 0, 17, 0, 0, 0, 25}) // bytea, text
	m = pgwire.AppendHeader(m, pgwire.Sync, 0)                                                                     // whether that went well or not
	m = pgwire.AppendParse(m, "", []byte(aboutSQL), []byte{0, 0})
	s.scratch = pgwire.AppendHeader(appendExecute(appendBind(m, "")), pgwire.Sync, 0)
	q.more = 1
	if err := s.await(b, q); err != nil {
		return err
	}
	b.marking = marks
	if len(q.rows) == 1 && len(q.rows[0]) == 2 {
		b.started, b.standbys = q.rows[0][0], ""
		if names := q.rows[0][1]; s.g.cfg.Standby != nil && waitsFor(names, s.g.cfg.Standby(s.who.Database)) {
			b.standbys = names
		}
	}
	if q.err != nil {
		b.marking = marksNot
		s.g.cfg.Log.Warn("transactions cannot be marked, so that a lost answer to COMMIT stays open", "site", b.target.name(), "database", s.who.Database, "error", q.err.Message)
	}
	return nil
}

// xidOf reads the answer to a mark.
func xidOf(row []byte) uint64 {
	columns, err := pgwire.ParseRow(row)
	if err != nil || len(columns) == 0 {
		return 0
	}
	xid, err := strconv.ParseUint(string(columns[0]), 10, 64)
	if err != nil {
		return 0 // null: there is none
	}
	return xid
}
