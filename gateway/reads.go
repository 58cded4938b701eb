package gateway

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// A transaction that is nothing but a read may run at another site than the session's home: it borrows a backend of that site, and
// what comes next goes home again. It does so only if nothing is waited for: a backend must be idle there, and what the session has
// seen must be known to be visible there (crossing.go). Else the read runs at home, as without all this.

// Reads says which site's server serves the reads of sessions, beside their home. Its methods are called often and at the same time,
// and must not block.
type Reads interface {
	// ReadAt gives the server for a read; false: the session's home serves it. key is the session's, and does not change. wait is
	// how long the read may wait until that server's site has what the session has seen.
	ReadAt(l *Login, w Wish, key uint64) (t Target, wait time.Duration, ok bool)
	// ReadSites tells people where reads go.
	ReadSites(l *Login) []ReadSite
}

// ReadSite is a site that serves reads.
type ReadSite struct {
	Site   string `json:"site"`
	Weight int    `json:"weight"`
	// LagS is how far it is behind the others, in seconds; nil: it is not known, or the site is the home.
	LagS    *float64 `json:"lag_s,omitempty"`
	Problem string   `json:"problem,omitempty"` // why it serves none just now
}

// roaming is what a session has for reads elsewhere.
type roaming struct {
	// Of the session's goroutine.
	stays    bool  // it was refused elsewhere
	vainlyAt int64 // when it last waited in vain to read elsewhere

	// Guarded by mu.
	roamer   *backend // that it uses for a read elsewhere, or has used last
	sentThen int64    // s.w.Sent when it got it
	seen     sighting
	homeAt   int64     // when its last transaction at home ended
	actedAt  int64     // and its last one that was more than a read
	reading  bool      // the transaction at home is a read that could run elsewhere
	way      *crossing // by which it last wished to read elsewhere
	wishedAt int64
	history  string // of the server there
	readSite string // of its last read elsewhere
}

// homely are words that make a text a matter of its own site: what is not the same at another one although all tables are, or what
// is an act. Names that begin with pg_ are as well: catalogs have other OIDs elsewhere, and sessions other processes. FOR is that of
// FOR SHARE.
var homely = words(`nextval currval lastval setval last_value is_called txid_current txid_current_if_assigned txid_current_snapshot
	obj_description col_description format_type information_schema regclass regtype regproc regprocedure regoper regoperator
	regnamespace regrole regconfig regdictionary regcollation ctid xmin xmax cmin cmax tableoid oid for set_config`)

// roams reports that a text that was found to read only may run at another site: it is SELECT, VALUES, TABLE or WITH, and names
// nothing that another site has otherwise.
func (t *tainted) roams(sql []byte, escapes bool) bool {
	if t.version == 0 || t.all || t.allLocal {
		return false
	}
	l := lexer{src: sql, escapes: escapes}
	first, some := true, false
	for tok := l.next(); tok.kind != tokEnd; tok = l.next() {
		if tok.kind == ';' {
			first = true
			continue
		}
		if tok.kind != tokWord && tok.kind != tokName {
			if first && tok.kind != '(' || tok.kind == tokHidden {
				return false
			}
			continue
		}
		if tok.kind == tokName && first {
			return false
		}
		w := l.word(tok)
		if first {
			switch string(w) {
			case "select", "values", "table", "with":
			default:
				return false
			}
			first, some = false, true
			continue
		}
		if homely[string(w)] || t.local[string(w)] || bytes.HasPrefix(w, []byte("pg_")) {
			return false
		}
	}
	return some
}

// localSQL gives names of relations, as taintSQL does, whose content is not the same at all sites: what publication duri does not have, and what
// depends on it.
const localSQL = `WITH RECURSIVE published AS MATERIALIZED (
 SELECT c.oid FROM pg_catalog.pg_publication_tables p JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
  JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename WHERE p.pubname = 'duri'
), bad AS (
 SELECT c.oid AS rel FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'm', 'f', 'S') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
  AND NOT EXISTS (SELECT FROM published p WHERE p.oid = c.oid)
  AND (c.relkind <> 'p' OR (SELECT coalesce(pg_catalog.bool_or(p.oid IS NULL), true) FROM pg_catalog.pg_partition_tree(c.oid) l
   LEFT JOIN published p ON p.oid = l.relid WHERE l.isleaf))
 UNION SELECT r.ev_class FROM bad b JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = b.rel
  AND d.classid = 'pg_catalog.pg_rewrite'::regclass JOIN pg_catalog.pg_rewrite r ON r.oid = d.objid
)
SELECT 'r', pg_catalog.encode(pg_catalog.convert_to(c.relname::text, 'UTF8'), 'hex') FROM bad b JOIN pg_catalog.pg_class c ON c.oid = b.rel`

// askLocal asks for them. mu is held.
func (s *session) askLocal(b *backend, t *tainted) error {
	q := &question{setup: true}
	b.ask(q)
	s.scratch = pgwire.AppendQuery(s.scratch[:0], localSQL)
	if err := s.await(b, q); err != nil {
		return err
	}
	t.allLocal, t.local = q.err != nil, map[string]bool{}
	for _, row := range q.rows {
		t.keepHome(row)
	}
	if q.err != nil {
		s.g.cfg.Log.Warn("reads stay at home: what is not replicated cannot be read", "site", b.target.name(), "database", s.who.Database, "error", q.err.Message)
	}
	return nil
}

// lookRoaming reports that a text of which t is known may run at another site.
func (s *session) lookRoaming(sql []byte, escapes bool, t *text) bool {
	if t.does != reads || t.probe || t.dirty || t.seq || t.local || t.pin != "" || s.g.lim().Strict {
		return false
	}
	return s.g.taintsOf(s.who.Database).roams(sql, escapes)
}

// wholeRead reports that what the client sends now begins a transaction that is nothing but reads which may run elsewhere: its first
// message, of a text that may, is at hand, and what follows it up to its Sync has come as well. name is that of a statement that the
// message prepares. What is handled again goes home.
func (s *session) wholeRead(typ byte, name []byte) bool {
	if s.rerun != nil || s.stays {
		return false
	}
	s.mu.Lock()
	first := !s.flight.open().sent
	s.mu.Unlock()
	if !first || typ == pgwire.Query {
		return first
	}
	var parsed [][]byte
	if typ == pgwire.Parse {
		parsed = append(parsed, name)
	}
	return s.readsUpToSync(s.r.Ahead(), parsed)
}

// readsUpToSync reports that messages which have come end with a Sync, and that none before it does more than read. parsed are
// statements that those before have prepared.
func (s *session) readsUpToSync(m []byte, parsed [][]byte) bool {
	for {
		typ, body, rest, ok := pgwire.Cut(m)
		if !ok {
			return false
		}
		switch typ {
		case pgwire.Sync:
			return true
		case pgwire.Parse:
			p, err := pgwire.ParseParse(body)
			if err != nil || !s.look(p.SQL).roams {
				return false
			}
			parsed = append(parsed, p.Name)
		case pgwire.Bind:
			_, name, _, ok := pgwire.ParseBind(body)
			if !ok || !slices.ContainsFunc(parsed, func(p []byte) bool { return bytes.Equal(p, name) }) && !s.isRoaming(string(name)) {
				return false
			}
		case pgwire.Describe, pgwire.Execute:
		default:
			return false
		}
		m = rest
	}
}

// isRoaming reports that a statement the client has prepared may run elsewhere.
func (s *session) isRoaming(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.statements[name]
	return st != nil && s.effectsOf(st).roams
}

// roam attaches a backend of the site that serves the session's reads; false: the read is the home's.
func (s *session) roam() bool {
	s.mu.Lock()
	w, seen := Wish{Home: s.home, Last: s.last, Types: s.types}, s.seen
	pinned := s.pinned() != "" || s.probe
	s.mu.Unlock()
	if pinned {
		return false
	}
	t, wait, ok := s.g.cfg.Reads.ReadAt(&s.who, w, s.id)
	if !ok || !s.mayCross(seen, t, wait) {
		return false
	}
	b := s.g.pool(t, &s.who).getIdle(s, t)
	if b == nil {
		return false
	}
	if apart(s.told, b.initial) != "" {
		b.pool.put(b)
		s.stays = true
		return false
	}
	s.mu.Lock()
	s.roamer, s.sentThen = b, s.w.Sent()
	s.mu.Unlock()
	err := s.attach(b, false)
	if err == nil {
		s.vainlyAt = 0
		return true
	}
	s.stays = !errors.Is(err, errStale)
	s.mu.Lock()
	s.roamer = nil
	s.mu.Unlock()
	return false
}

// mayCross reports that what the session has seen is visible at a site where it is to read. It waits for that only if the session has
// done nothing but read for a while, and has not waited in vain of late: else it is likely to go home soon, or to wait each time.
func (s *session) mayCross(seen sighting, t Target, wait time.Duration) bool {
	if seen.site == "" || seen.site == t.Site {
		return true
	}
	now, c := s.g.tick(), s.g.crossing(s.who.Database, seen.site, t)
	s.mu.Lock()
	s.way, s.wishedAt = c, now
	settled := now-s.actedAt >= int64(waitAfter)
	s.mu.Unlock()
	switch {
	case c.until.Load() > seen.at:
		return true
	case wait <= 0 || !settled || s.vainlyAt != 0 && now-s.vainlyAt < int64(waitAgain):
		return false
	}
	ctx, cancel := context.WithTimeout(s.g.life, wait)
	defer cancel()
	if c.wait(ctx, s.g, seen.at, nil) != nil {
		s.vainlyAt = now
		return false
	}
	return true
}

const (
	// waitAfter is for how long a session must have done nothing but read before a read of it waits to run elsewhere.
	waitAfter = 100 * time.Millisecond
	// waitAgain is the pause after one has waited in vain.
	waitAgain = time.Second
)

// comeHome waits until a read elsewhere is over, if something else follows it without a pause. mu is held.
func (s *session) comeHome(roams bool) {
	b := s.b
	if b == nil || b != s.roamer || s.flight.open().sent || roams {
		return
	}
	s.mu.Unlock()
	_ = b.w.Flush()
	s.mu.Lock()
	s.writing = false
	if s.b == b {
		s.took(b)
		s.rest(b)
	}
	s.wants = unanswered
	for s.b == b {
		s.changed.Wait()
	}
	s.wants = nothing
}

// ran notes that a transaction has ended at b, which is about to be given back. mu is held.
func (s *session) ran(b *backend) {
	roamed := b == s.roamer
	if !roamed {
		s.last = b.target.Site
	}
	if s.g.cfg.Reads == nil {
		return
	}
	now := s.g.tick()
	s.seen = sighting{b.target.Site, now}
	switch {
	case !roamed:
		s.homeAt, s.history = now, b.target.History
		if !s.reading {
			s.actedAt = now
		}
		if s.way != nil && s.way.key.from == s.last && now-s.wishedAt < int64(soonHome) {
			s.way.soon(s.g) // It may be about to read.
		}
		return
	case s.last != "" && now-s.homeAt < int64(soonHome):
		// It may be about to go home, and should not have to wait there.
		s.g.crossing(s.who.Database, b.target.Site, Target{Site: s.last, History: s.history}).soon(s.g)
	}
	s.readSite = b.target.Site
}

// soonHome is how long after a transaction at home another one is expected.
const soonHome = 2 * time.Second

// sawUntilLoss notes what a session can have seen at a server that is lost. mu is held.
func (s *session) sawUntilLoss(site string, roamed bool) {
	if s.g.cfg.Reads == nil || roamed && s.w.Sent() <= s.sentThen {
		return // of a read of which the client has nothing
	}
	s.seen = sighting{site, s.g.tick()}
}

// getIdle lends a backend if one is idle. If none is, one is opened for those that come later, unless there are enough.
func (p *pool) getIdle(s *session, t Target) *backend {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.epoch = max(p.epoch, t.Epoch)
	p.expire(time.Time{})
	if p.paused || len(p.waiting) > 0 {
		return nil
	}
	if b := p.pick(s.id); b != nil {
		return b
	}
	if p.open >= p.g.lim().PoolMax || p.warming >= warmingMax || time.Now().Before(p.coldUntil) || p.g.ending.Load() {
		return nil
	}
	p.open++
	p.warming++
	who, keys := s.who, copyKeys(s.keys) // The session may have ended before it is open.
	p.g.backends.Go(func() {
		defer keys.Zero()
		ctx, cancel := context.WithTimeout(p.g.life, warmMax)
		defer cancel()
		b, err := p.g.dial(ctx, t, &who, keys)
		p.mu.Lock()
		p.warming--
		if err != nil {
			p.coldUntil = time.Now().Add(warmAgain)
		}
		p.mu.Unlock()
		if err != nil {
			p.release()
			p.g.cfg.Log.Debug("a connection for reads was not opened", "site", t.name(), "error", err)
			return
		}
		b.enter(p)
		p.put(b)
	})
	return nil
}

const (
	// warmingMax is how many connections for reads a pool opens at once, warmMax how long that may take, and warmAgain the pause
	// after one that was not opened.
	warmingMax = 2
	warmMax    = 5 * time.Second
	warmAgain  = time.Second
)
