package gateway

import (
	"encoding/hex"
	"maps"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// A SELECT may write without showing it: views, rules, row security and foreign tables may call what does, and so may what looks like
// a function of PostgreSQL's or like an attribute of a row. What of a database is like that is asked of its catalogs, and a text that names it is no read (design: gateway, section 5.2).

// tainted are the names in a database, of relations and what else can be named in a SELECT, by which it may write.
type tainted struct {
	asked time.Time
	names map[string]bool
	all   bool // anything may: an operator or a cast does
	// version is another one when an answer says something else than the one before; 0: nothing is known.
	version uint64

	// With Config.Reads: relations whose content is not the same at all sites; allLocal: they are not known.
	local    map[string]bool
	allLocal bool
}

// taintFor is how long an answer counts. What was created since then is not seen.
const taintFor = time.Minute

// taintSQL gives what may write without showing it, each with its kind and its name in UTF8 as hexadecimal digits, so that the encoding
// of who asks does not matter: relations and domains that depend on functions which may write, also by other relations (r); functions
// that may be called by naming an attribute of a row (a), and the others that may be called (f); operators and casts (*).
const taintSQL = `WITH RECURSIVE volatiles AS (
 SELECT oid FROM pg_catalog.pg_proc WHERE provolatile = 'v' AND (oid >= 16384
  OR proname IN ('setval', 'pg_logical_emit_message', 'lo_creat', 'lo_create', 'lo_import', 'lo_unlink', 'lo_put', 'lowrite', 'lo_from_bytea', 'lo_truncate'))
), writes AS (
 SELECT oid FROM volatiles
 UNION SELECT a.aggfnoid FROM volatiles v JOIN pg_catalog.pg_aggregate a
  ON v.oid IN (a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggserialfn, a.aggdeserialfn, a.aggmtransfn, a.aggminvtransfn, a.aggmfinalfn)
), above AS (
 SELECT d.refobjid AS rel, r.ev_class AS by FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_rewrite r ON r.oid = d.objid
  WHERE d.refclassid = 'pg_catalog.pg_class'::regclass AND d.classid = 'pg_catalog.pg_rewrite'::regclass
 UNION ALL SELECT inhrelid, inhparent FROM pg_catalog.pg_inherits
), bad AS (
 SELECT r.ev_class AS rel FROM writes w JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_proc'::regclass AND d.refobjid = w.oid
  AND d.classid = 'pg_catalog.pg_rewrite'::regclass JOIN pg_catalog.pg_rewrite r ON r.oid = d.objid
 UNION SELECT p.polrelid FROM writes w JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_proc'::regclass AND d.refobjid = w.oid
  AND d.classid = 'pg_catalog.pg_policy'::regclass JOIN pg_catalog.pg_policy p ON p.oid = d.objid
 UNION SELECT r.ev_class FROM pg_catalog.pg_rewrite r WHERE r.ev_type = '1' AND NOT r.is_instead
 UNION SELECT c.oid FROM pg_catalog.pg_class c WHERE c.relkind = 'f'
 UNION SELECT a.by FROM bad b JOIN above a ON a.rel = b.rel
), named(kind, name) AS (
 SELECT 'r', c.relname FROM bad b JOIN pg_catalog.pg_class c ON c.oid = b.rel
 UNION SELECT 'r', t.typname FROM writes w JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_proc'::regclass AND d.refobjid = w.oid
  AND d.classid = 'pg_catalog.pg_constraint'::regclass JOIN pg_catalog.pg_constraint c ON c.oid = d.objid JOIN pg_catalog.pg_type t ON t.oid = c.contypid
 UNION SELECT CASE WHEN p.pronargs > 0 AND p.pronargs - p.pronargdefaults - (p.provariadic <> 0)::int <= 1 AND a.typtype IN ('c', 'd', 'p') THEN 'a' ELSE 'f' END, p.proname
  FROM writes w JOIN pg_catalog.pg_proc p ON p.oid = w.oid LEFT JOIN pg_catalog.pg_type a ON a.oid = p.proargtypes[0]
  WHERE p.oid >= 16384 AND p.prokind <> 'p' AND p.prorettype NOT IN ('pg_catalog.trigger'::regtype, 'pg_catalog.event_trigger'::regtype)
 UNION SELECT '*', '' FROM writes w WHERE EXISTS (SELECT FROM pg_catalog.pg_operator o WHERE o.oprcode = w.oid)
  OR EXISTS (SELECT FROM pg_catalog.pg_cast t WHERE t.castfunc = w.oid)
)
SELECT kind, pg_catalog.encode(pg_catalog.convert_to(name::text, 'UTF8'), 'hex') FROM named`

// namedIn reads a row of an answer to taintSQL or localSQL; what is none says nothing.
func namedIn(row []string) (kind, name string, ok bool) {
	if len(row) != 2 {
		return "", "", false
	}
	b, err := hex.DecodeString(row[1])
	return row[0], string(b), err == nil
}

// taint notes a row of an answer to taintSQL. Functions that look like one that is called are recognised anyway (text.call), unless
// they have the name of one that is known to be harmless.
func (t *tainted) taint(row []string) {
	switch kind, name, ok := namedIn(row); {
	case !ok || kind == "*":
		t.all = true
	case kind != "f" || knownCalls[name] || clauses[name]:
		t.names[name] = true
	}
}

// keepHome notes a row of an answer to localSQL.
func (t *tainted) keepHome(row []string) {
	_, name, ok := namedIn(row)
	t.local[name] = true
	t.allLocal = t.allLocal || !ok
}

// askTaints asks for a database's tainted relations if that was not done of late. mu is held.
func (s *session) askTaints(b *backend) error {
	if !s.keeps() {
		return nil
	}
	now, old := time.Now(), s.g.taintsOf(s.who.Database)
	if old.version > 0 && now.Sub(old.asked) < taintFor {
		return nil
	}
	q := &question{setup: true}
	b.ask(q)
	s.scratch = pgwire.AppendQuery(s.scratch[:0], taintSQL)
	if err := s.await(b, q); err != nil {
		return err
	}
	t := &tainted{asked: now, names: map[string]bool{}, all: q.err != nil}
	for _, row := range q.rows {
		t.taint(row)
	}
	if s.g.cfg.Reads != nil {
		if err := s.askLocal(b, t); err != nil {
			return err
		}
	}
	if t.version = old.version; t.version == 0 || t.all != old.all || !maps.Equal(t.names, old.names) || t.allLocal != old.allLocal || !maps.Equal(t.local, old.local) {
		t.version++
	}
	s.g.taints.Store(s.who.Database, t)
	return nil
}

// unknownTaints is of a database of which nothing is known.
var unknownTaints = &tainted{}

func (g *Server) taintsOf(database string) *tainted {
	if v, ok := g.taints.Load(database); ok {
		return v.(*tainted)
	}
	return unknownTaints
}

// effectsOf is what a prepared statement does, by what is known of the database now: it may have been prepared when nothing was.
func (s *session) effectsOf(st *statement) text {
	if st.effects.seems && s.keeps() {
		if v := s.g.taintsOf(s.who.Database).version; v != st.judged || v == 0 {
			st.judged, st.effects.does = v, reads
			if s.g.mayWrite(s.who.Database, st.sql, st.effects.escapes) {
				st.effects.does = writes
			}
			st.effects.roams = s.g.cfg.Reads != nil && s.lookRoaming(st.sql, st.effects.escapes, &st.effects)
		}
	}
	return st.effects
}

// mayWrite reports that a text which looks like a read may write all the same. As long as nothing is known of the database, all
// that reads a table may.
func (g *Server) mayWrite(database string, sql []byte, escapes bool) bool {
	t := g.taintsOf(database)
	unsure := t.all || t.version == 0
	if !unsure && len(t.names) == 0 {
		return false
	}
	l := lexer{src: sql, escapes: escapes}
	for tok := l.next(); tok.kind != tokEnd; tok = l.next() {
		if tok.kind == tokHidden {
			return true
		}
		if tok.kind != tokWord && tok.kind != tokName {
			continue
		}
		w := l.word(tok)
		if t.names[string(w)] || unsure && (string(w) == "select" || string(w) == "table" || string(w) == "values") {
			return true
		}
	}
	return false
}
