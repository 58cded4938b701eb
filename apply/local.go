package apply

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/duri-io/duri/wal"
)

// Local is what a site knows, in memory, of its own recent transactions: which of them a peer has not seen yet, their
// exact versions, and the tombstones of their deletes. It is fed by the local decode stream, so local writers pay
// nothing for it, and rebuilt from the own journal at start: the journal keeps all that any peer still lacks, which
// is just what tombstones are needed for (docs/adr/0001).
//
// Safe for concurrent use.
type Local struct {
	mu     sync.Mutex
	site   wal.SiteID
	pos    wal.LSN       // every local transaction with EndLSN <= pos has been added
	moved  chan struct{} // closed and replaced when pos moves
	maxRaw wal.Time      // greatest raw commit time decoded so far
	last   wal.Time      // raw commit time decoded last: after a clock step, the clock is there and not at maxRaw

	byXID  map[uint32]localTxn
	txns   []localTxn // by EndLSN; txns[:dropped] are already pruned
	minima []minimum  // suffix minima of raw commit times, by EndLSN
	graves map[grave]tombstone
	dead   []deadKey // graves in order of EndLSN
	all    map[string]tombstone

	keys func(*wal.Relation) ([]namedKey, error)
	buf  []byte
}

type localTxn struct {
	xid  uint32
	end  wal.LSN
	raw  wal.Time // WAL commit time
	time wal.Time // version time
}

type minimum struct {
	end wal.LSN
	raw wal.Time
}

type grave struct{ table, key string }

type tombstone struct {
	version wal.Version
	end     wal.LSN
}

type deadKey struct {
	grave
	end wal.LSN
}

// namedKey is a key column by name, because a relation's columns may stand in another order than the local table's.
type namedKey struct {
	name string
	norm norm
}

// NewLocal makes an empty index of site's own transactions. Everything up to pos, whose greatest commit time is
// newest, had been seen by every peer or will be added.
func NewLocal(site wal.SiteID, pos wal.LSN, newest wal.Time, keys *Keys) *Local {
	return &Local{
		site: site, pos: pos, maxRaw: newest, last: newest, moved: make(chan struct{}), byXID: map[uint32]localTxn{},
		graves: map[grave]tombstone{}, all: map[string]tombstone{}, keys: keys.of,
	}
}

// Add records a local transaction. Calls come in commit order. An error means that the key of a table with deletes
// could not be read; nothing was added then, and the transaction must be offered again.
func (l *Local) Add(t *wal.Txn) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if t.EndLSN <= l.pos {
		return nil
	}
	for i := range t.Changes {
		if err := l.bury(t, &t.Changes[i]); err != nil {
			return err
		}
	}
	lt := localTxn{t.XID, t.EndLSN, t.CommitTime, t.VersionTime}
	l.txns = append(l.txns, lt)
	l.byXID[t.XID] = lt
	l.maxRaw, l.last = max(l.maxRaw, t.CommitTime), t.CommitTime
	for len(l.minima) > 0 && l.minima[len(l.minima)-1].raw >= t.CommitTime {
		l.minima = l.minima[:len(l.minima)-1]
	}
	l.minima = append(l.minima, minimum{t.EndLSN, t.CommitTime})
	l.advance(t.EndLSN)
	return nil
}

// bury notes the tombstones that a change leaves: a delete, the old key of a key change (rule 10), a TRUNCATE.
func (l *Local) bury(t *wal.Txn, c *wal.Change) error {
	stone := tombstone{t.Version(), t.EndLSN}
	switch {
	case c.Op == wal.Truncate:
		l.all[c.Relation.String()] = stone
		return nil
	case c.Op == wal.Insert, c.OldKind == wal.OldNone:
		return nil
	}
	names, err := l.keys(c.Relation)
	if err != nil || len(names) == 0 {
		return err
	}
	oldKey, ok := relationKey(l.buf[:0], names, c.Relation, c.Old)
	l.buf = oldKey
	if !ok {
		return fmt.Errorf("%s on %s arrives without its primary key", c.Op, c.Relation)
	}
	k := string(oldKey)
	if c.Op == wal.Update {
		if newKey, ok := relationKey(nil, names, c.Relation, c.New); ok && string(newKey) == k {
			return nil
		}
	}
	g := grave{c.Relation.String(), k}
	l.graves[g] = stone
	l.dead = append(l.dead, deadKey{g, t.EndLSN})
	return nil
}

// relationKey builds the normal form of a key from a tuple of rel.
func relationKey(b []byte, names []namedKey, rel *wal.Relation, t wal.Tuple) ([]byte, bool) {
	for _, n := range names {
		i := slices.IndexFunc(rel.Columns, func(c wal.Column) bool { return c.Name == n.name })
		if i < 0 || t[i].Kind != wal.Text {
			return b, false
		}
		b = appendKey(b, n.norm, t[i].Data)
	}
	return b, true
}

// Advance says that every local transaction with EndLSN <= to has been added.
func (l *Local) Advance(to wal.LSN) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.advance(to)
}

func (l *Local) advance(to wal.LSN) {
	if to > l.pos {
		l.pos = to
		close(l.moved)
		l.moved = make(chan struct{})
	}
}

// Position is how far the local stream has been read.
func (l *Local) Position() wal.LSN {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pos
}

// WaitFor blocks until the stream has passed lsn, or ctx ends.
func (l *Local) WaitFor(ctx context.Context, lsn wal.LSN) error {
	for {
		l.mu.Lock()
		pos, moved := l.pos, l.moved
		l.mu.Unlock()
		if pos >= lsn {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// keepSeen is for how long a transaction stays known after every peer has seen it, so that a row written by it is
// still told from one whose transaction has not been decoded yet.
const keepSeen = 10 * time.Second

// Prune forgets what every peer has seen: seen is the lowest position that the peers' applied transactions carried.
func (l *Local) Prune(seen wal.LSN, now wal.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for n < len(l.txns) && l.txns[n].end <= seen && l.txns[n].raw < now.Add(-keepSeen) {
		t := l.txns[n]
		if l.byXID[t.xid] == t {
			delete(l.byXID, t.xid)
		}
		n++
	}
	l.txns = l.txns[n:]
	n = 0
	for n < len(l.minima) && l.minima[n].end <= seen {
		n++
	}
	l.minima = l.minima[n:]
	n = 0
	for n < len(l.dead) && l.dead[n].end <= seen {
		d := l.dead[n]
		if s, ok := l.graves[d.grave]; ok && s.end <= seen {
			delete(l.graves, d.grave)
		}
		n++
	}
	l.dead = l.dead[n:]
	for name, s := range l.all {
		if s.end <= seen {
			delete(l.all, name)
		}
	}
}

// known is what Lookup tells of a local transaction.
type known struct {
	version wal.Version
	end     wal.LSN
}

// lookup finds the transaction that wrote a row by its xmin. ok is false for one that every peer saw long ago, and for
// one that has not been decoded yet.
func (l *Local) lookup(xid uint32) (known, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t, ok := l.byXID[xid]
	return known{wal.Version{Time: t.time, Site: l.site}, t.end}, ok
}

// tombstone finds the newest local tombstone that covers a key.
func (l *Local) tombstone(table, key string) (tombstone, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.graves[grave{table, key}]
	if a, okAll := l.all[table]; okAll && (!ok || s.version.Less(a.version)) {
		s, ok = a, true
	}
	return s, ok
}

// truncated finds the newest local TRUNCATE of a table.
func (l *Local) truncated(table string) (tombstone, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.all[table]
	return s, ok
}

// regress is how far commit times may go back in LSN order without a clock step (rule 3).
const regress = 100 * time.Millisecond

// safeBefore returns a time such that every local transaction with a raw commit time below it had been seen by an
// incoming transaction that carries seen. Local transactions not decoded yet are covered by the greatest commit time
// decoded, less what commit times may regress; and after a step of the clock by the commit time decoded last.
func (l *Local) safeBefore(seen wal.LSN) wal.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := min(l.maxRaw, l.last).Add(-regress)
	i := sort.Search(len(l.minima), func(i int) bool { return l.minima[i].end > seen })
	if i < len(l.minima) {
		t = min(t, l.minima[i].raw)
	}
	return t
}

// Stats are counts for status.
type Stats struct {
	Position     wal.LSN `json:"position"`
	Transactions int     `json:"transactions"`
	Tombstones   int     `json:"tombstones"`
}

// Stats returns the index's size.
func (l *Local) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{l.pos, len(l.txns), len(l.graves) + len(l.all)}
}
