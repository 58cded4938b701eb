package apply

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"strconv"
	"sync"
	"time"

	"github.com/duri-io/duri/wal"
)

// History is what a site knows, in memory, of one origin's recent transactions, those that some other site had not seen
// yet when it wrote what arrives from it: their exact versions, what they had seen, and the tombstones of their deletes.
//
// A site has one of its own transactions, fed by the local decode stream, so that local writers pay nothing for it; and,
// with three sites and more, one of each peer, fed by the worker that applies it, before it does. Both are rebuilt from
// journals at start: those keep all that any site still lacks, which is just what tombstones are needed for
// (docs/adr/0001).
//
// Safe for concurrent use.
type History struct {
	mu    sync.Mutex
	site  wal.SiteID
	own   bool
	pos   wal.LSN       // every transaction with EndLSN <= pos has been added
	moved chan struct{} // closed and replaced when pos moves

	// Of snapshots that apply took: settled is the greatest whose commits are all decoded, taken the next one.
	settled, taken snapshot

	byXID  map[uint32]past   // of the own site only
	byTime map[wal.Time]past // likewise, by raw commit time: a row that a subtransaction wrote carries that one's xid
	txns   []past            // by EndLSN
	minima []minimum         // suffix minima of row times, by EndLSN
	graves map[grave]past    // the transaction that deleted the row
	dead   []deadKey         // graves in order of EndLSN
	all    map[string]past   // by table: the last TRUNCATE

	// What changes did to the columns of rows of tables in column mode.
	touches map[grave][]touched
	touched []deadKey // touches in order of EndLSN

	columnMode func(*wal.Relation) bool
	keys       func(*wal.Relation) ([]namedKey, error)
	buf        []byte
}

// past is a transaction of the history.
type past struct {
	xid  uint32
	end  wal.LSN
	raw  wal.Time // WAL commit time
	made wal.Version
	seen []wal.Seen
}

func pastOf(t *wal.Txn) past { return past{t.XID, t.EndLSN, t.CommitTime, t.Version(), t.Seen} }

// snapshot is one of this server: every transaction with a lower xid than xmin, which counts on beyond 32 bits, had ended
// before the WAL position end.
type snapshot struct {
	xmin uint64
	end  wal.LSN
}

type minimum struct {
	end  wal.LSN
	time wal.Time // as rows show it: a local row its commit time, an applied one at least its version
}

type grave struct{ table, key string }

type deadKey struct {
	grave
	end wal.LSN
}

// namedKey is a key column by name, because a relation's columns may stand in another order than the local table's.
type namedKey struct {
	name string
	norm norm
}

// NewHistory makes an empty history of the site's own transactions. Everything up to pos had been seen by every peer or
// will be added.
func NewHistory(site wal.SiteID, pos wal.LSN, keys *Keys) *History {
	return &History{
		site: site, own: true, pos: pos, moved: make(chan struct{}), byXID: map[uint32]past{}, byTime: map[wal.Time]past{},
		graves: map[grave]past{}, all: map[string]past{}, touches: map[grave][]touched{}, columnMode: keys.columnMode, keys: keys.of,
	}
}

// NewPeerHistory makes an empty history of another site's transactions. Everything up to pos had been seen by every
// third site or will be added.
func NewPeerHistory(site wal.SiteID, pos wal.LSN, keys *Keys) *History {
	h := NewHistory(site, pos, keys)
	h.own = false
	return h
}

// Add records a transaction. Calls come in commit order. An error means that the key of a table with deletes could not
// be read; the transaction must be offered again then.
func (l *History) Add(t *wal.Txn) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if t.EndLSN <= l.pos {
		return nil
	}
	p := pastOf(t)
	for i := range t.Changes {
		c := &t.Changes[i]
		if err := l.bury(p, c); err != nil {
			return err
		}
		if l.columnMode(c.Relation) {
			if err := l.touch(p, c); err != nil {
				return err
			}
		}
	}
	l.txns = append(l.txns, p)
	stamp := t.VersionTime
	if l.own {
		l.byXID[t.XID], l.byTime[t.CommitTime] = p, p
		stamp = t.CommitTime
	}
	for len(l.minima) > 0 && l.minima[len(l.minima)-1].time >= stamp {
		l.minima = l.minima[:len(l.minima)-1]
	}
	l.minima = append(l.minima, minimum{t.EndLSN, stamp})
	l.advance(t.EndLSN)
	return nil
}

// Trace is what a history keeps of a transaction, as a transaction: added in its place, it leaves the same history. It shares
// what it keeps with t.
func (l *History) Trace(t *wal.Txn) (*wal.Txn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := *t
	out.Changes = nil
	for i := range t.Changes {
		c := &t.Changes[i]
		kept := c.Op == wal.Truncate || l.columnMode(c.Relation)
		if !kept && c.Op != wal.Insert && c.OldKind != wal.OldNone {
			names, err := l.keys(c.Relation)
			if err != nil {
				return nil, err
			}
			kept = len(names) > 0 && (c.Op == wal.Delete || !sameRelationKey(names, c))
		}
		if kept {
			out.Changes = append(out.Changes, *c)
		}
	}
	return &out, nil
}

// sameRelationKey reports whether an update leaves its row under the same key.
func sameRelationKey(names []namedKey, c *wal.Change) bool {
	was, ok := relationKey(nil, names, c.Relation, c.Old)
	is, okNew := relationKey(nil, names, c.Relation, c.New)
	return ok && okNew && string(was) == string(is)
}

// bury notes the tombstones that a change leaves: a delete, the old key of a key change (rule 10), a TRUNCATE.
func (l *History) bury(p past, c *wal.Change) error {
	switch {
	case c.Op == wal.Truncate:
		l.all[c.Relation.String()] = p
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
	l.graves[g] = p
	l.dead = append(l.dead, deadKey{g, p.end})
	return nil
}

// touch notes which columns of a row of a table in column mode a change has written.
func (l *History) touch(p past, c *wal.Change) error {
	names, err := l.keys(c.Relation)
	if err != nil || len(names) == 0 {
		return err
	}
	for _, t := range []wal.Tuple{c.Old, c.New} {
		if t == nil {
			continue
		}
		key, ok := relationKey(l.buf[:0], names, c.Relation, t)
		l.buf = key
		if !ok {
			continue
		}
		g := grave{c.Relation.String(), string(key)}
		l.touches[g] = append(l.touches[g], touched{p, changedColumns(c)})
		l.touched = append(l.touched, deadKey{g, p.end})
	}
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

// Disown notes that the database lost the transactions of (from, to]: the numbers that they had there are others' now. What
// they did stands here, and they are given back.
func (l *History) Disown(from, to wal.LSN) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.txns {
		t := &l.txns[i]
		if t.end <= from || t.end > to || t.xid == 0 {
			continue
		}
		if l.byXID[t.xid].end == t.end {
			delete(l.byXID, t.xid)
		}
		t.xid = 0
	}
}

// SetBack is Disown for a database that was just found to have lost them: reading goes on behind to, and nothing is known any
// more of what is decoded. It fails when a transaction was added that the journal, which ends at to, does not have.
func (l *History) SetBack(from, to wal.LSN) error {
	l.Disown(from, to)
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.txns); n > 0 && l.txns[n-1].end > to {
		return fmt.Errorf("transaction that ends at %s was not journalled, and is lost: restart the agent", l.txns[n-1].end)
	}
	l.pos = to
	l.settled, l.taken = snapshot{}, snapshot{}
	return nil
}

// Rename notes that the transaction that ends at end was given back by the one with the number xid.
func (l *History) Rename(xid uint32, end wal.LSN) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := sort.Search(len(l.txns), func(i int) bool { return l.txns[i].end >= end })
	if i == len(l.txns) || l.txns[i].end != end {
		return // every peer has seen it
	}
	l.txns[i].xid = xid
	l.byXID[xid] = l.txns[i]
}

// Advance says that every transaction with EndLSN <= to has been added.
func (l *History) Advance(to wal.LSN) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.advance(to)
}

func (l *History) advance(to wal.LSN) {
	if to > l.pos {
		l.pos = to
		close(l.moved)
		l.moved = make(chan struct{})
	}
}

// Position is how far the stream has been read.
func (l *History) Position() wal.LSN {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pos
}

// WaitFor blocks until the stream has passed lsn, or ctx ends.
func (l *History) WaitFor(ctx context.Context, lsn wal.LSN) error {
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
func (l *History) Prune(seen wal.LSN, now wal.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for n < len(l.txns) && l.txns[n].end <= seen && l.txns[n].raw < now.Add(-keepSeen) {
		t := l.txns[n]
		if l.byXID[t.xid].end == t.end {
			delete(l.byXID, t.xid)
		}
		if l.byTime[t.raw].end == t.end {
			delete(l.byTime, t.raw)
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
	n = 0
	for n < len(l.touched) && l.touched[n].end <= seen {
		g := l.touched[n].grave
		l.touches[g] = slices.DeleteFunc(l.touches[g], func(t touched) bool { return t.end <= seen })
		if len(l.touches[g]) == 0 {
			delete(l.touches, g)
		}
		n++
	}
	l.touched = l.touched[n:]
	for name, s := range l.all {
		if s.end <= seen {
			delete(l.all, name)
		}
	}
}

// lookup finds the transaction that wrote a row of this site by its xmin. ok is false for one that every peer saw long
// ago, and for one that has not been decoded yet.
func (l *History) lookup(xid uint32) (past, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t, ok := l.byXID[xid]
	return t, ok
}

// writer is lookup for a row, which may carry the number of a subtransaction: then its commit time tells.
func (l *History) writer(xid uint32, at wal.Time) (past, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t, ok := l.byXID[xid]
	if !ok {
		t, ok = l.byTime[at]
	}
	return t, ok
}

// tombstone finds the newest tombstone that covers a key.
func (l *History) tombstone(table, key string) (past, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.graves[grave{table, key}]
	if a, okAll := l.all[table]; okAll && (!ok || s.made.Less(a.made)) {
		s, ok = a, true
	}
	return s, ok
}

// truncated finds the newest local TRUNCATE of a table.
func (l *History) truncated(table string) (past, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.all[table]
	return s, ok
}

// safeBefore returns a time such that every row of this origin with a commit time below it had been seen by an incoming
// transaction that carries seen, if the row's transaction has been added. A peer's are added before they are applied; for
// the own ones, decodedBelow tells.
func (l *History) safeBefore(seen wal.LSN) wal.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := sort.Search(len(l.minima), func(i int) bool { return l.minima[i].end > seen })
	if i < len(l.minima) {
		return l.minima[i].time
	}
	return math.MaxInt64
}

// takeSnapshot notes a snapshot of this server, a row of snapshotSQL.
func (l *History) takeSnapshot(row [][]byte) error {
	xmin, err1 := strconv.ParseUint(string(row[0]), 10, 64)
	end, err2 := wal.ParseLSN(string(row[1]))
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("read a snapshot: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.settle()
	if l.taken == (snapshot{}) {
		l.taken = snapshot{xmin, end}
	}
	return nil
}

// settle moves on to a snapshot whose commits are all decoded by now.
func (l *History) settle() {
	if l.taken != (snapshot{}) && l.taken.end <= l.pos {
		if l.taken.xmin > l.settled.xmin {
			l.settled = l.taken
		}
		l.taken = snapshot{}
	}
}

// decodedBelow is an xid below which every transaction of this server that has committed is decoded; ok is false as long
// as none is known. Commit times cannot tell: they go back in WAL order when a backend is slow between taking its time and
// writing its commit, and when the clock is set back (rule 3).
func (l *History) decodedBelow() (xid uint32, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.settle()
	return uint32(l.settled.xmin), l.settled != (snapshot{})
}

// Stats are counts for status.
type Stats struct {
	Position     wal.LSN `json:"position"`
	Transactions int     `json:"transactions"`
	Tombstones   int     `json:"tombstones"`
}

// Stats returns the index's size.
func (l *History) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{l.pos, len(l.txns), len(l.graves) + len(l.all)}
}
