package apply

import (
	"fmt"
	"slices"
	"strings"

	"github.com/duri-io/duri/wal"
)

// netKind is what a batch does to one key in the end.
type netKind byte

const (
	netInsert netKind = iota // the first change was an insert: the row is expected to be absent
	netUpdate                // the row is expected to be there
	netDelete
)

// ref points at one change of the batch that touches a key. A primary key change touches two keys: it deletes the old
// and inserts the new (rule 10).
type ref struct {
	txn    *wal.Txn
	change *wal.Change
	op     wal.Op    // Insert, Update or Delete, as seen by this key
	num    int32     // number of the change within its transaction
	row    wal.Tuple // the image this change gives the key; nil for Delete. May hold Unchanged
	old    wal.Tuple // the full old image when the origin sent one, else nil
	prev   int32     // index+1 of the key's previous ref, 0 for none
	// blind: the image lacks values, and the row that they stand in at the origin may carry a third site's change that is
	// not here yet
	blind bool
}

// follows reports that nothing from elsewhere was applied at the origin between two changes of a key, so that the first
// one's values are what the second one left alone.
func (r *ref) follows(earlier *ref) bool {
	return r.txn == earlier.txn || slices.Equal(r.txn.Seen, earlier.txn.Seen)
}

// entry is the net change of one key over a wave.
type entry struct {
	key  string    // normal form
	keyv wal.Tuple // key values, in the table's key order
	kind netKind
	// maybe: the row was inserted and deleted within the wave, so it need not be there
	maybe bool
	// slow: no fast statement may write the entry, because its image lacks values of a row under another key
	slow bool
	// blended: likewise, because concurrent changes merge
	blended bool
	buried  bool      // a tombstone beats all of it, see leaveBuried
	row     wal.Tuple // net image for insert and update
	last    int32     // index+1 into wave.refs of the key's last change
}

// moved is a primary key change whose new image lacks out-of-line values: PostgreSQL does not send what an UPDATE did
// not touch. They stand in the row under the old key, which nothing earlier in the wave has touched.
type moved struct {
	tw  *tableWave
	e   *entry    // of the new key
	ref int32     // index+1 into wave.refs of the insert
	old wal.Tuple // values of the old key, in the table's key order

	fetched bool // the origin was asked for the values
}

// tableWave is the part of a wave that concerns one table.
type tableWave struct {
	*target
	entries []*entry
	index   map[string]*entry
	set     []int   // scratch
	appends []int32 // refs of inserts into a table without key, in order
	placed  bool    // every entry has been placed, see place
	inOrder []int32 // refs of changes from the first update or delete in a table without key on, in order
}

// wave is a run of changes that can be merged: net changes per key, no TRUNCATE inside, bounded in size.
type wave struct {
	tables   []*tableWave // in order of first touch: applications lock in that order, so following it avoids deadlocks
	refs     []ref
	moved    []*moved
	truncate *wal.Change // set: the wave is just this
	txn      *wal.Txn    // of the truncate
	num      int32       // of the truncate within its transaction
}

// batch is a contiguous run of one origin's transactions that is applied in one transaction here.
type batch struct {
	txns             []*wal.Txn
	waves            []*wave
	changes          int
	behind           int // how often local decoding was too far behind
	minTime, maxTime wal.Time
	merged           bool         // false: one wave per change, in the original order
	careful          bool         // rows may collide, or be parked: see place
	filtered         bool         // changes of keys that wait were left out
	held             []heldChange // these
	again            []changeID   // not empty: the batch is these changes only, which had been set aside
}

func (b *batch) from() wal.LSN { return b.txns[0].CommitLSN }
func (b *batch) to() wal.LSN   { return b.txns[len(b.txns)-1].EndLSN }

// tables names the tables that the batch writes, each once. What it truncates may cascade to others, which the record of
// the truncation has as changes of their own.
func (b *batch) tables() (names []string) {
	add := func(name string) {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, wv := range b.waves {
		for _, tw := range wv.tables {
			add(tw.String())
		}
		if wv.truncate != nil {
			add(wv.truncate.Relation.String())
		}
	}
	return names
}

// resolver finds the local target of an origin's relation.
type resolver func(*wal.Relation) (*target, error)

// waveChanges bounds a wave, and with it the size of one statement's parameters.
const waveChanges = 50_000

// planner merges transactions into a batch as they come. It is pure but for the resolver.
type planner struct {
	batch   *batch
	bytes   int
	resolve resolver
	behind  func(*wal.Txn) bool          // see Mesh.behind
	waits   func(table, key string) bool // changes of these keys are left out, nil: of none
	held    map[string]bool              // keys of the changes that were left out so far
	only    map[changeID]bool            // nil: all
	wave    *wave
	byName  map[string]*tableWave         // of the present wave, by local table
	targets map[wal.RelationID]*tableWave // of the present wave, by origin definition
	buf     []byte
	num     int32 // of the change that is being added
}

// newPlanner starts an empty batch. With merged false every change stands in a wave of its own, in the original
// order: slower, and right where set order and row order differ (unique swaps).
func newPlanner(resolve resolver, behind func(*wal.Txn) bool, merged bool) *planner {
	return &planner{batch: &batch{merged: merged}, resolve: resolve, behind: behind}
}

// planTxns plans given transactions.
func planTxns(txns []*wal.Txn, resolve resolver, behind func(*wal.Txn) bool, merged bool) (*planner, error) {
	p := newPlanner(resolve, behind, merged)
	for _, t := range txns {
		if err := p.addTxn(t); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// full reports whether the batch has reached a limit.
func (p *planner) full(c Config) bool {
	return len(p.batch.txns) >= c.BatchTransactions || p.bytes >= c.BatchBytes
}

// addTxn adds a transaction. After an error the planner must not be used, except to read the transactions before.
func (p *planner) addTxn(t *wal.Txn) error {
	b := p.batch
	for i := range t.Changes {
		p.num = int32(i)
		if p.only != nil && !p.only[changeID{t.CommitLSN, p.num}] {
			continue
		}
		if err := p.add(t, &t.Changes[i]); err != nil {
			return err
		}
		for _, v := range t.Changes[i].New {
			p.bytes += len(v.Data)
		}
	}
	if len(b.txns) == 0 {
		b.minTime, b.maxTime = t.VersionTime, t.VersionTime
	}
	b.minTime, b.maxTime = min(b.minTime, t.VersionTime), max(b.maxTime, t.VersionTime)
	b.txns = append(b.txns, t)
	b.changes += len(t.Changes)
	return nil
}

// cut closes the present wave.
func (p *planner) cut() {
	if p.wave == nil {
		return
	}
	for _, t := range p.wave.tables {
		slices.SortFunc(t.entries, func(a, b *entry) int { return strings.Compare(a.key, b.key) })
	}
	p.batch.waves = append(p.batch.waves, p.wave)
	p.wave = nil
}

func (p *planner) add(t *wal.Txn, c *wal.Change) error {
	if c.Op == wal.Truncate {
		p.cut()
		p.batch.waves = append(p.batch.waves, &wave{truncate: c, txn: t, num: p.num})
		return nil
	}
	if p.wave != nil && (!p.batch.merged || len(p.wave.refs) >= waveChanges) {
		p.cut()
	}
	tw, err := p.table(c.Relation)
	if err != nil {
		return err
	}
	if len(tw.table.key) == 0 {
		return p.addKeyless(tw, t, c)
	}
	if err := checkFull(tw.target, c); err != nil {
		return err
	}
	if p.waits != nil && p.hold(tw, t, c) {
		return nil
	}
	return p.addKeyed(tw, t, c)
}

// hold leaves a change out when changes of a key that it touches wait; then all of its keys do.
func (p *planner) hold(tw *tableWave, t *wal.Txn, c *wal.Change) bool {
	var keys []string
	waits := false
	for _, tuple := range []wal.Tuple{c.Old, c.New} {
		if tuple == nil {
			continue
		}
		if k, ok := keyOf(nil, tw.key, tuple); ok && !slices.Contains(keys, string(k)) {
			keys = append(keys, string(k))
		}
	}
	for _, k := range keys {
		waits = waits || p.waits(tw.String(), k) || p.held[waitKey(tw.String(), k)]
	}
	if waits {
		for _, k := range keys {
			p.held[waitKey(tw.String(), k)] = true
			p.batch.held = append(p.batch.held, heldChange{changeID{t.CommitLSN, p.num}, tw.id(), k})
		}
	}
	return waits
}

// table returns the wave's part for the relation, opening wave and part as needed. A second definition of the same
// table in one wave (the schema changed) begins a new wave, because the two have other columns.
func (p *planner) table(rel *wal.Relation) (*tableWave, error) {
	if p.wave == nil {
		p.open()
	}
	if tw := p.targets[rel.ID]; tw != nil {
		return tw, nil
	}
	g, err := p.resolve(rel)
	if err != nil {
		return nil, err
	}
	if p.byName[g.String()] != nil {
		p.cut()
		p.open()
	}
	tw := &tableWave{target: g, index: map[string]*entry{}}
	p.wave.tables = append(p.wave.tables, tw)
	p.byName[g.String()], p.targets[rel.ID] = tw, tw
	return tw, nil
}

func (p *planner) open() {
	p.wave = &wave{}
	p.byName, p.targets = map[string]*tableWave{}, map[wal.RelationID]*tableWave{}
}

func (p *planner) addKeyless(tw *tableWave, t *wal.Txn, c *wal.Change) error {
	if c.Op == wal.Insert {
		// An insert after an update or delete in the same wave may be what they must not see: keep the order.
		if len(tw.inOrder) == 0 {
			p.wave.refs = append(p.wave.refs, ref{txn: t, change: c, num: p.num, op: c.Op, row: c.New})
			tw.appends = append(tw.appends, int32(len(p.wave.refs)))
			return nil
		}
	} else if c.OldKind != wal.OldFull {
		return &TableError{tw.String(), "UPDATE or DELETE in a table without a primary key", "give it a primary key or ALTER TABLE ... REPLICA IDENTITY FULL at the origin"}
	}
	p.wave.refs = append(p.wave.refs, ref{txn: t, change: c, num: p.num, op: c.Op, row: c.New})
	tw.inOrder = append(tw.inOrder, int32(len(p.wave.refs)))
	return nil
}

func (p *planner) addKeyed(tw *tableWave, t *wal.Txn, c *wal.Change) error {
	var full wal.Tuple
	if c.OldKind == wal.OldFull {
		full = c.Old
	}
	switch c.Op {
	case wal.Insert:
		return p.touch(tw, ref{txn: t, change: c, num: p.num, op: wal.Insert, row: c.New}, c.New)
	case wal.Delete:
		return p.touch(tw, ref{txn: t, change: c, num: p.num, op: wal.Delete, old: full}, c.Old)
	}
	row := c.New
	if full != nil {
		row = fill(row, full) // FULL brings the untouched out-of-line values along (rule 9)
	}
	if c.OldKind != wal.OldNone && !p.sameKey(tw, c.Old, row) {
		return p.move(tw, t, c, row, full)
	}
	return p.touch(tw, ref{txn: t, change: c, num: p.num, op: wal.Update, row: row, old: full}, row)
}

// move plans a primary key change: delete of the old key, insert of the new one (rule 10).
func (p *planner) move(tw *tableWave, t *wal.Txn, c *wal.Change, row, full wal.Tuple) error {
	if !row.Complete() {
		old, err := p.find(tw, c.Old)
		if err != nil {
			return err
		}
		if old != nil && (&ref{txn: t}).follows(&p.wave.refs[old.last-1]) {
			row = fill(row, old.row)
		}
		if old != nil && !row.Complete() { // the row must be as the changes so far leave it
			p.cut()
			if tw, err = p.table(c.Relation); err != nil {
				return err
			}
		}
	}
	if err := p.touch(tw, ref{txn: t, change: c, num: p.num, op: wal.Delete, old: full}, c.Old); err != nil {
		return err
	}
	if err := p.touch(tw, ref{txn: t, change: c, num: p.num, op: wal.Insert, row: row}, row); err != nil {
		return err
	}
	if row.Complete() {
		return nil
	}
	e, err := p.find(tw, row)
	if err != nil {
		return err
	}
	old := make(wal.Tuple, len(tw.key))
	for i, k := range tw.key {
		old[i] = c.Old[k.at]
	}
	p.wave.moved = append(p.wave.moved, &moved{tw: tw, e: e, ref: int32(len(p.wave.refs)), old: old})
	return nil
}

// find returns the entry of a tuple's key, nil when the wave has none yet.
func (p *planner) find(tw *tableWave, keyTuple wal.Tuple) (*entry, error) {
	var ok bool
	if p.buf, ok = keyOf(p.buf[:0], tw.key, keyTuple); !ok {
		return nil, noKey(tw, wal.Update)
	}
	return tw.index[string(p.buf)], nil
}

// keysOf gives the keys that a change touches in a local table, in normal form; for a table without a key, where only a
// TRUNCATE asks, the whole row that it writes.
func (w *Worker) keysOf(c *wal.Change) (table string, keys []string, err error) {
	g, err := w.resolve(c.Relation)
	if err != nil {
		return "", nil, err
	}
	if len(g.key) == 0 {
		if c.New != nil {
			keys = append(keys, wholeRow(c.New))
		}
		return g.String(), keys, nil
	}
	for _, t := range []wal.Tuple{c.Old, c.New} {
		if t == nil {
			continue
		}
		if k, ok := keyOf(nil, g.key, t); ok {
			keys = append(keys, string(k))
		}
	}
	return g.String(), keys, nil
}

func noKey(tw *tableWave, op wal.Op) error {
	return &TableError{tw.String(), fmt.Sprintf("%s arrives without its key", op), "its replica identity at the origin must include the primary key"}
}

// sameKey reports whether two tuples have the same key values. It compares texts: a key that changes in spelling only
// (1.0 to 1.00) is then deleted and inserted under one normal form, which nets to an update.
func (p *planner) sameKey(tw *tableWave, a, b wal.Tuple) bool {
	for _, k := range tw.key {
		if string(a[k.at].Data) != string(b[k.at].Data) {
			return false
		}
	}
	return true
}

// touch folds one change into the net change of its key.
func (p *planner) touch(tw *tableWave, r ref, keyTuple wal.Tuple) error {
	var ok bool
	if p.buf, ok = keyOf(p.buf[:0], tw.key, keyTuple); !ok {
		return noKey(tw, r.op)
	}
	e := tw.index[string(p.buf)]
	fresh := e == nil
	if fresh {
		e = &entry{key: string(p.buf), keyv: make(wal.Tuple, len(tw.key))}
		for i, k := range tw.key {
			e.keyv[i] = keyTuple[k.at]
		}
		tw.index[e.key] = e
		tw.entries = append(tw.entries, e)
	}
	r.prev = e.last
	if r.op != wal.Delete && !r.row.Complete() && p.behind(r.txn) {
		r.blind = true
	}
	e.blended = tw.blend != nil
	p.wave.refs = append(p.wave.refs, r)
	e.last = int32(len(p.wave.refs))
	if fresh {
		fold(e, r, nil)
	} else {
		fold(e, r, &p.wave.refs[r.prev-1])
	}
	return nil
}

// fold is the table of net changes (peers.md section 5): insert+update -> insert, update+update -> last,
// delete+insert -> update by the full image, insert+delete -> delete of a row that need not be there. last is the key's
// change before r, nil for the first.
func fold(e *entry, r ref, last *ref) {
	fresh := last == nil
	switch r.op {
	case wal.Insert:
		switch {
		case fresh:
			e.kind = netInsert
		case e.kind == netDelete && !e.maybe:
			e.kind = netUpdate
		case e.kind == netDelete:
			e.kind, e.maybe = netInsert, false
		}
		e.row, e.slow = r.row, !r.row.Complete()
	case wal.Update:
		if fresh || e.kind == netDelete {
			e.kind = netUpdate
			e.row, e.slow = r.row, r.blind
			return
		}
		if !r.follows(last) { // what the origin's row was before it does not follow from e
			e.row, e.slow = r.row, !r.row.Complete()
			return
		}
		e.row = fill(r.row, e.row)
		e.slow = e.slow && !e.row.Complete() || r.blind
	case wal.Delete:
		e.maybe = e.kind == netInsert && !fresh
		e.kind, e.row, e.slow = netDelete, nil, false
	}
}

// refold computes an entry's net change anew, after images of its chain were completed.
func (w *wave) refold(e *entry) {
	e.kind, e.maybe, e.slow, e.row = netInsert, false, false, nil
	var last *ref
	for _, r := range w.chain(e) {
		fold(e, *r, last)
		last = r
	}
}

// fill returns row with its Unchanged columns taken from base, where base has them.
func fill(row, base wal.Tuple) wal.Tuple {
	for i := range row {
		if row[i].Kind != wal.Unchanged || i >= len(base) || base[i].Kind == wal.Omitted {
			continue
		}
		out := slices.Clone(row)
		for j := i; j < len(out); j++ {
			if out[j].Kind == wal.Unchanged && j < len(base) && base[j].Kind != wal.Omitted {
				out[j] = base[j]
			}
		}
		return out
	}
	return row
}

// first returns an entry's first ref.
func (w *wave) first(e *entry) *ref {
	r := &w.refs[e.last-1]
	for r.prev != 0 {
		r = &w.refs[r.prev-1]
	}
	return r
}

// chain returns the refs of an entry in order.
func (w *wave) chain(e *entry) []*ref {
	var out []*ref
	for i := e.last; i != 0; i = w.refs[i-1].prev {
		out = append(out, &w.refs[i-1])
	}
	slices.Reverse(out)
	return out
}
