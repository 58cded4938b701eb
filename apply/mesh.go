package apply

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/wal"
)

// Mesh is what the workers of one database at a site share: what is known of every site's recent transactions. Safe for
// concurrent use.
type Mesh struct {
	// Local is the history of this site's own transactions.
	Local *History
	// Parking knows the tables with parked rows.
	Parking *Parking
	// open returns a reader of a peer's journal behind a position.
	open func(site wal.SiteID, from wal.LSN) (Reader, error)
	// peers are the histories of the other sites. With two sites there are none: no third one can have seen less of a
	// peer than this site has.
	peers map[wal.SiteID]*History

	// commit is held from the last look at the tombstones until the commit, and while tombstones are added: a worker
	// whose delete finds no row has told of it before, and so either sees what another one created meanwhile or is seen
	// by it.
	commit sync.Mutex

	mu      sync.Mutex // guards the rest
	turned  wal.LSN    // see GiveBack
	applied map[wal.SiteID]wal.LSN
	merged  map[mergedID]map[string]past
	skipped map[grave]bool // keys of changes that could not be completed, as their origin has the row no more
	kept    map[grave]keptOut
}

// mergedID names an apply transaction: the site whose transactions it merged, where the first one was committed, and where
// the last one ends. What was set aside can be applied in a transaction that ends as another one does.
type mergedID struct {
	site     wal.SiteID
	from, to wal.LSN
}

// NewMesh joins the own history and, with three sites and more, those of the peers. open returns a reader of a peer's
// journal.
func NewMesh(local *History, open func(site wal.SiteID, from wal.LSN) (Reader, error), peers ...*History) *Mesh {
	m := &Mesh{
		Local: local, Parking: newParking(), open: open, peers: map[wal.SiteID]*History{}, applied: map[wal.SiteID]wal.LSN{},
		merged: map[mergedID]map[string]past{}, skipped: map[grave]bool{}, kept: map[grave]keptOut{},
	}
	for _, h := range peers {
		m.peers[h.site] = h
	}
	return m
}

// Prune forgets what every third site has seen of a peer.
func (m *Mesh) Prune(site wal.SiteID, seen wal.LSN, now wal.Time) {
	if h := m.peers[site]; h != nil {
		h.Prune(seen, now)
	}
}

// Position is how far a peer's history reaches.
func (m *Mesh) Position(site wal.SiteID) wal.LSN {
	if h := m.peers[site]; h != nil {
		return h.Position()
	}
	return 0
}

// publish tells of a peer's transaction before it is applied.
func (m *Mesh) publish(t *wal.Txn) error {
	h := m.peers[t.Origin]
	if h == nil {
		return nil
	}
	m.commit.Lock()
	defer m.commit.Unlock()
	if err := h.Add(t); err != nil {
		return fmt.Errorf("index transaction %s of site %d: %w", t.CommitLSN, t.Origin, err)
	}
	return nil
}

// GiveBack says that own transactions up to a position are given back to this database: until then, what the own history
// holds up to there is their past or their future, and stands in the rows or will.
func (m *Mesh) GiveBack(to wal.LSN) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.turned = max(m.turned, to)
}

// rival reports whether p competes with a change of origin: another site's does, and of the own ones those that this
// database made itself while earlier ones were given back to it.
func (m *Mesh) rival(p past, origin wal.SiteID) bool {
	if origin != m.Local.site || p.made.Site != origin {
		return true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return p.end > m.turned
}

// RestartAt notes from where on a site is applied: after a crash, or when an older state of the database was put back, that
// can be less than it was.
func (m *Mesh) RestartAt(site wal.SiteID, at wal.LSN) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.applied[site] = at
}

// Applied is how far a site has been applied here.
func (m *Mesh) Applied(site wal.SiteID) wal.LSN {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.applied[site]
}

// setApplied notes how far a site has been applied here.
func (m *Mesh) setApplied(site wal.SiteID, to wal.LSN) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.applied[site] = max(m.applied[site], to)
}

// isApplied reports whether a transaction is one of this site's own, or a peer's that has been applied here.
func (m *Mesh) isApplied(p past) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return p.made.Site == m.Local.site || p.end <= m.applied[p.made.Site]
}

// behind reports whether a transaction of a peer had seen something of a third site that is not applied here yet.
func (m *Mesh) behind(t *wal.Txn) bool {
	if len(m.peers) == 0 {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.ContainsFunc(t.Seen, func(s wal.Seen) bool {
		return m.peers[s.Site] != nil && s.Site != t.Origin && s.LSN > m.applied[s.Site]
	})
}

// tombstone finds the newest tombstone that covers a key and was not left by origin, whose changes are being applied:
// that has just what it left before them.
func (m *Mesh) tombstone(table, key string, origin wal.SiteID) (past, bool) {
	best, found := m.Local.tombstone(table, key)
	found = found && m.rival(best, origin)
	for site, h := range m.peers {
		if site == origin {
			continue
		}
		if s, ok := h.tombstone(table, key); ok && (!found || best.made.Less(s.made)) {
			best, found = s, true
		}
	}
	return best, found
}

// buried reports whether a peer's transactions that are known, applied or not, removed a key.
func (m *Mesh) buried(table, key string, origin wal.SiteID) bool {
	h := m.peers[origin]
	if h == nil {
		return false
	}
	_, ok := h.tombstone(table, key)
	return ok
}

// maxSkipped bounds what skip keeps.
const maxSkipped = 10_000

// skip notes that a change of a key was left out because what removed the row at its origin is on its way: until that is
// here, other changes may find no row, and that is no conflict.
func (m *Mesh) skip(table, key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.skipped) >= maxSkipped {
		clear(m.skipped)
	}
	m.skipped[grave{table, key}] = true
}

// hasSkipped reports whether a change of a key was left out.
func (m *Mesh) hasSkipped(table, key string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.skipped[grave{table, key}]
}

// keptOut is a row that was not left standing because of a peer's newer delete that is known and not applied yet. What
// that peer did before meets this row, not its absence.
type keptOut struct {
	grave
	row held
	by  past
}

// keepOut notes such rows.
func (m *Mesh) keepOut(rows []keptOut) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.kept)+len(rows) > maxSkipped {
		maps.DeleteFunc(m.kept, func(_ grave, k keptOut) bool { return k.by.end <= m.applied[k.by.made.Site] })
		if len(m.kept)+len(rows) > maxSkipped {
			clear(m.kept)
		}
	}
	for _, k := range rows {
		if old, ok := m.kept[k.grave]; !ok || old.row.Version.Less(k.row.Version) {
			m.kept[k.grave] = k
		}
	}
}

// keptOutBy gives what stands for a key whose row a known delete of origin keeps out.
func (m *Mesh) keptOutBy(origin wal.SiteID, table, key string) (held, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	k, ok := m.kept[grave{table, key}]
	return k.row, ok && k.by.made.Site == origin && k.by.end > m.applied[origin]
}

// truncated finds the newest TRUNCATE of a table that origin did not make.
func (m *Mesh) truncated(table string, origin wal.SiteID) (past, bool) {
	best, found := m.Local.truncated(table)
	found = found && m.rival(best, origin)
	for site, h := range m.peers {
		if site == origin {
			continue
		}
		if s, ok := h.truncated(table); ok && (!found || best.made.Less(s.made)) {
			best, found = s, true
		}
	}
	return best, found
}

// safeBefore returns a time such that every row not of t's origin with a commit time below it had been seen by t.
func (m *Mesh) safeBefore(t *wal.Txn) wal.Time {
	seen := t.SeenOf(m.Local.site)
	if t.Origin == m.Local.site { // given back
		seen = t.EndLSN
	}
	before := m.Local.safeBefore(seen)
	for site, h := range m.peers {
		if site != t.Origin {
			before = min(before, h.safeBefore(t.SeenOf(site)))
		}
	}
	return before
}

// maxMerged bounds the apply transactions whose keys are kept.
const maxMerged = 64

// keyer gives a change's table and the keys it touches, in normal form.
type keyer func(c *wal.Change) (table string, keys []string, err error)

// exact finds which of the transactions that an apply transaction merged wrote a row last: its rows all carry the last
// one's stamp (architecture.md decision 5). from is the first one's commit, to the last one's end. It reads the peer's
// journal.
func (m *Mesh) exact(ctx context.Context, site wal.SiteID, from, to wal.LSN, table, key string, keys keyer) (past, error) {
	id := mergedID{site, from, to}
	m.mu.Lock()
	found, ok := m.merged[id]
	m.mu.Unlock()
	if !ok {
		var err error
		if found, err = m.readMerged(ctx, site, from, to, keys); err != nil {
			return past{}, fmt.Errorf("look up the transactions %s to %s of site %d: %w", from, to, site, err)
		}
		m.mu.Lock()
		if len(m.merged) >= maxMerged {
			clear(m.merged)
		}
		m.merged[id] = found
		m.mu.Unlock()
	}
	p, ok := found[table+"\x00"+key]
	if !ok {
		return past{}, fmt.Errorf("none of the transactions %s to %s of site %d wrote a row of %s that carries their stamp", from, to, site, table)
	}
	return p, nil
}

// readMerged lists who wrote which key last in a stretch of a peer's journal.
func (m *Mesh) readMerged(ctx context.Context, site wal.SiteID, from, to wal.LSN, keys keyer) (_ map[string]past, err error) {
	r, err := m.open(site, from)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	found := map[string]past{}
	for {
		var rec journal.Record
		if rec, err = r.Next(ctx); err != nil {
			return nil, err
		}
		if rec.Txn != nil && rec.Txn.EndLSN > to {
			return nil, fmt.Errorf("the journal has no transaction that ends at %s", to)
		}
		if rec.Txn == nil {
			continue
		}
		p := pastOf(rec.Txn)
		for i := range rec.Txn.Changes {
			table, touched, err := keys(&rec.Txn.Changes[i])
			if err != nil {
				return nil, err
			}
			for _, k := range touched {
				found[table+"\x00"+k] = p
			}
		}
		if p.end == to {
			return found, nil
		}
	}
}
