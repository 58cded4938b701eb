package apply

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// A client's lock must not stall the stream (rule 19): a change whose row stays locked is set aside, in duri.held, by the
// transaction that carries the progress past it, and with it all later changes of the same key, in order. They are tried
// again and again; what waits for them (the applied position, what this site has seen) stays behind the oldest of them.

// asideAfter is how often the lock of a row is waited for, for lock_timeout each, before its change is set aside.
const asideAfter = 3

// heldEvery is the rest between two rounds of trying again what was set aside; heldWait is how long each try waits for a
// lock, because the stream waits with it.
const (
	heldEvery  = 250 * time.Millisecond
	heldWait   = "10ms"
	heldBudget = 50 * time.Millisecond // for all tries of one round
)

// changeID names a change in its origin's journal.
type changeID struct {
	lsn wal.LSN // of the commit
	num int32
}

// heldChange is a change that was set aside, and one of the keys it touches.
type heldChange struct {
	changeID
	table policy.Name
	key   string
}

func (h heldChange) at() string { return waitKey(h.table.Schema+"."+h.table.Table, h.key) }

// waitKey names a key of a table, as in aside.keys.
func waitKey(table, key string) string { return table + "\x00" + key }

// aside is what a worker has set aside. It belongs to the executing goroutine.
type aside struct {
	keys    map[string][]changeID // by table and key, in order; empty for a key that is about to be
	keysOf  map[changeID][]string // the keys of a change
	txns    map[wal.LSN]*wal.Txn  // of these changes
	waiting map[wal.LSN]int       // how many changes of a transaction wait
	tried   time.Time
}

func newAside() *aside {
	return &aside{keys: map[string][]changeID{}, keysOf: map[changeID][]string{}, txns: map[wal.LSN]*wal.Txn{}, waiting: map[wal.LSN]int{}}
}

// put notes that a change waits, for one of its keys.
func (a *aside) put(h heldChange) {
	a.keys[h.at()] = append(a.keys[h.at()], h.changeID)
	if len(a.keysOf[h.changeID]) == 0 {
		a.waiting[h.lsn]++
	}
	a.keysOf[h.changeID] = append(a.keysOf[h.changeID], h.at())
}

// has reports whether changes of a key wait.
func (a *aside) has(table, key string) bool {
	_, ok := a.keys[waitKey(table, key)]
	return ok
}

// touches reports whether a batch changes a key that waits.
func (a *aside) touches(b *batch) bool {
	if len(a.keys) == 0 {
		return false
	}
	for _, wv := range b.waves {
		for _, tw := range wv.tables {
			for key := range tw.index {
				if a.has(tw.String(), key) {
					return true
				}
			}
		}
	}
	return false
}

// blocks reports whether a batch truncates a table of which changes wait: those come first.
func (a *aside) blocks(b *batch) bool {
	for _, wv := range b.waves {
		if wv.truncate == nil {
			continue
		}
		for at := range a.keys {
			if table, _, _ := strings.Cut(at, "\x00"); table == wv.truncate.Relation.String() {
				return true
			}
		}
	}
	return false
}

// floor is the position before the oldest change that waits; false without any.
func (a *aside) floor() (lowest wal.LSN, ok bool) {
	for lsn := range a.waiting {
		if !ok || lsn < lowest {
			lowest, ok = lsn, true
		}
	}
	return lowest, ok
}

// add notes what a committed batch has set aside.
func (a *aside) add(b *batch) {
	for _, h := range b.held {
		a.put(h)
	}
	for _, t := range b.txns {
		if a.waiting[t.CommitLSN] > 0 {
			a.txns[t.CommitLSN] = t
		}
	}
}

// group is the keys that hang together with one, because a change touches several, and all their changes in order.
func (a *aside) group(start string) (keys []string, ids []changeID) {
	keys = []string{start}
	known, seen := map[string]bool{start: true}, map[changeID]bool{}
	for i := 0; i < len(keys); i++ {
		for _, id := range a.keys[keys[i]] {
			seen[id] = true
			for _, k := range a.keysOf[id] {
				if !known[k] {
					known[k], keys = true, append(keys, k)
				}
			}
		}
	}
	ids = slices.SortedFunc(maps.Keys(seen), func(a, b changeID) int {
		if a.lsn != b.lsn {
			return int(int64(a.lsn) - int64(b.lsn))
		}
		return int(a.num - b.num)
	})
	return keys, ids
}

// loadAside reads what earlier runs have set aside.
func (w *Worker) loadAside(ctx context.Context) error {
	w.aside = newAside()
	rows, err := pg.Query(ctx, w.session.conn, "SELECT lsn, change, table_schema, table_name, key_norm FROM duri.held WHERE origin = $1::int2 ORDER BY lsn, change", fmt.Sprint(w.cfg.Origin))
	if err != nil {
		return fmt.Errorf("read duri.held: %w", err)
	}
	for _, r := range rows {
		lsn, err1 := wal.ParseLSN(r[0])
		num, err2 := strconv.ParseInt(r[1], 10, 32)
		key, err3 := unhex([]byte(r[4]))
		if err := errors.Join(err1, err2, err3); err != nil {
			return fmt.Errorf("read duri.held: %w", err)
		}
		w.aside.put(heldChange{changeID{lsn, int32(num)}, policy.Name{Schema: r[2], Table: r[3]}, key})
		w.aside.txns[lsn] = nil
	}
	return w.readAside(ctx)
}

// readAside reads the transactions of what was set aside from the journal.
func (w *Worker) readAside(ctx context.Context) error {
	from, ok := w.aside.floor()
	if !ok {
		return nil
	}
	r, err := w.cfg.Open(from)
	if err != nil {
		return fmt.Errorf("read what was set aside from %s on: %w", from, err)
	}
	defer func() { _ = r.Close() }()
	for left := len(w.aside.txns); left > 0; {
		rec, err := r.Next(ctx)
		if err != nil {
			return fmt.Errorf("read what was set aside from %s on: %w", from, err)
		}
		if rec.Txn == nil {
			continue
		}
		if t, wanted := w.aside.txns[rec.Txn.CommitLSN]; wanted && t == nil {
			w.aside.txns[rec.Txn.CommitLSN] = rec.Txn
			left--
		}
	}
	return nil
}

// setAside finds the rows that keep a batch waiting and plans it anew without them; nil when there are none.
func (w *Worker) setAside(ctx context.Context, b *batch) (*batch, error) {
	locked, err := w.lockedKeys(ctx, b)
	if err != nil || len(locked) == 0 {
		return nil, err
	}
	if len(b.txns) == 1 && slices.ContainsFunc(b.waves, func(wv *wave) bool { return wv.truncate != nil }) {
		return nil, nil // its own TRUNCATE must not overtake what would wait
	}
	for _, k := range locked {
		if _, ok := w.aside.keys[k]; !ok {
			w.aside.keys[k] = nil
		}
	}
	return w.replan(b)
}

// replan plans a batch anew, without the keys that wait.
func (w *Worker) replan(b *batch) (*batch, error) {
	p := newPlanner(w.resolve, w.cfg.Mesh.behind, b.merged)
	p.waits, p.held = w.aside.has, map[string]bool{}
	for _, t := range b.txns {
		if err := p.addTxn(t); err != nil {
			return nil, &TransactionError{w.cfg.Origin, t.CommitLSN, t.XID, err}
		}
	}
	p.cut()
	p.batch.careful, p.batch.filtered = b.careful, true
	return p.batch, nil
}

// maxAbsent bounds how many keys without a row are set aside because one of them may be what a transaction waits for.
const maxAbsent = 1000

// lockedKeys finds the keys of a batch whose rows another session has locked; or, if it is no row that is locked, those
// of a single transaction that have no row yet and may wait for a client that is about to make one.
func (w *Worker) lockedKeys(ctx context.Context, b *batch) ([]string, error) {
	locked, absent, err := w.probeAll(ctx, b)
	if err == nil && len(locked) == 0 && len(b.txns) == 1 && len(absent) <= maxAbsent {
		return absent, nil
	}
	return locked, err
}

// probeAll lists the keys of a batch whose rows are locked, and those that have no row.
func (w *Worker) probeAll(ctx context.Context, b *batch) (locked, absent []string, err error) {
	for _, wv := range b.waves {
		for _, tw := range wv.tables {
			if len(tw.entries) == 0 {
				continue
			}
			free, there, err := w.probe(ctx, tw)
			if err != nil {
				return nil, nil, err
			}
			for i, e := range tw.entries {
				at := waitKey(tw.String(), e.key)
				switch {
				case there[i] && !free[i]:
					locked = append(locked, at)
				case !there[i]:
					absent = append(absent, at)
				}
			}
		}
	}
	return locked, absent, nil
}

// probe tells which of a table's entries have a row, and which of those could be locked at once.
func (w *Worker) probe(ctx context.Context, tw *tableWave) (free, there map[int]bool, err error) {
	o := op{tw: tw}
	for _, e := range tw.entries {
		o.items = append(o.items, item{e: e})
	}
	var params [][]byte
	for k := range tw.key {
		params = append(params, o.array(func(it item) wal.Value { return it.e.keyv[k] }))
	}
	ordinals := func(sql string) (map[int]bool, error) {
		res, err := w.session.run(ctx, []call{{sql, params}})
		if err != nil {
			return nil, err
		}
		out := map[int]bool{}
		for _, row := range res[0].Rows {
			n, err := strconv.Atoi(string(row[0]))
			if err != nil {
				return nil, fmt.Errorf("probe rows of %s: unexpected ordinal %q", tw.table, row[0])
			}
			out[n-1] = true
		}
		return out, nil
	}
	lock := lockSQL(tw.table)
	if free, err = ordinals(lock + " SKIP LOCKED"); err != nil {
		return nil, nil, err
	}
	there, err = ordinals(strings.TrimSuffix(lock, forUpdate))
	return free, there, err
}

// tryAside tries what was set aside again, each group of keys in a transaction of its own.
func (w *Worker) tryAside(ctx context.Context) error {
	begun, done := time.Now(), map[string]bool{}
	for start := range w.aside.keys { // in no order, so that each has its turn
		if done[start] {
			continue
		}
		if time.Since(begun) > heldBudget {
			break
		}
		keys, ids := w.aside.group(start)
		for _, k := range keys {
			done[k] = true
		}
		if len(ids) == 0 { // was about to be set aside when something else failed
			delete(w.aside.keys, start)
			continue
		}
		err := w.tryGroup(ctx, ids)
		var behind *behindError
		switch {
		case err == nil:
			w.aside.drop(keys, ids)
		case !disturbed(err) && !errors.As(err, &behind):
			return err
		}
	}
	w.aside.tried = time.Now()
	w.reached(0, nil)
	return nil
}

// drainAside waits until nothing of the tables that a transaction truncates waits any more.
func (w *Worker) drainAside(ctx context.Context, b *batch) error {
	for {
		if err := w.tryAside(ctx); err != nil {
			return err
		}
		if !w.aside.blocks(b) {
			return nil
		}
		w.stuck(fmt.Errorf("transaction %s truncates a table of which changes wait for locks of this site's clients", b.from()),
			"end or commit the sessions that hold the locks; apply goes on by itself")
		if err := pause(ctx, heldEvery); err != nil {
			return err
		}
	}
}

// waitsForLocks lets the status look out for who holds them.
func (w *Worker) waitsForLocks() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting = true
}

// drop forgets a group that was applied.
func (a *aside) drop(keys []string, ids []changeID) {
	for _, k := range keys {
		delete(a.keys, k)
	}
	for _, id := range ids {
		delete(a.keysOf, id)
		if a.waiting[id.lsn]--; a.waiting[id.lsn] == 0 {
			delete(a.waiting, id.lsn)
			delete(a.txns, id.lsn)
		}
	}
}

func (w *Worker) tryGroup(ctx context.Context, ids []changeID) error {
	p := newPlanner(w.resolve, w.cfg.Mesh.behind, false)
	p.only = map[changeID]bool{}
	var lsns []wal.LSN
	for _, id := range ids {
		p.only[id] = true
		if !slices.Contains(lsns, id.lsn) {
			lsns = append(lsns, id.lsn)
		}
	}
	for _, lsn := range lsns {
		if err := p.addTxn(w.aside.txns[lsn]); err != nil {
			return &TransactionError{w.cfg.Origin, lsn, w.aside.txns[lsn].XID, err}
		}
	}
	p.cut()
	if locked, _, err := w.probeAll(ctx, p.batch); err != nil || len(locked) > 0 { // not to fill the server's log
		return errors.Join(err, errLocked)
	}
	// As for every batch: a key may have been parked meanwhile.
	p.batch.careful = w.cfg.Mesh.Parking.touches(p.batch)
	p.batch.again, p.batch.filtered, p.batch.changes = ids, true, len(ids)
	err := w.applyOnce(ctx, p.batch)
	if collided(err) && !p.batch.careful {
		p.batch.careful = true
		err = w.applyOnce(ctx, p.batch)
	}
	return err
}

// errLocked says that a client still has a row locked.
var errLocked = errors.New("a row is still locked")

// heldParams are the columns of what a batch sets aside, one array each.
func heldParams(origin wal.SiteID, held []heldChange) [][]byte {
	cols := make([][]byte, 5)
	for i := range cols {
		cols[i] = []byte{'{'}
	}
	for i, h := range held {
		for j, v := range []string{h.lsn.String(), fmt.Sprint(h.num), h.table.Schema, h.table.Table, string(bytea(h.key))} {
			if i > 0 {
				cols[j] = append(cols[j], ',')
			}
			cols[j] = appendElement(cols[j], wal.Value{Kind: wal.Text, Data: []byte(v)})
		}
	}
	out := [][]byte{fmt.Append(nil, origin)}
	for _, c := range cols {
		out = append(out, append(c, '}'))
	}
	return out
}

const (
	holdSQL = `INSERT INTO duri.held (origin, lsn, change, table_schema, table_name, key_norm)
		SELECT $1::int2, u.* FROM unnest($2::pg_lsn[], $3::int4[], $4::text[], $5::text[], $6::bytea[]) AS u`
	releaseSQL = `DELETE FROM duri.held h USING unnest($2::pg_lsn[], $3::int4[]) AS u(lsn, change)
		WHERE h.origin = $1::int2 AND h.lsn = u.lsn AND h.change = u.change`
)

// releaseParams name the changes of a group.
func releaseParams(origin wal.SiteID, ids []changeID) [][]byte {
	var held []heldChange
	for _, id := range ids {
		held = append(held, heldChange{changeID: id})
	}
	return heldParams(origin, held)[:3]
}

// blockersSQL names the sessions that keep session $1 waiting.
const blockersSQL = `SELECT pid, coalesce(usename, ''), application_name, coalesce(client_addr::text, 'local'), state,
	coalesce(extract(epoch from now() - xact_start)::int8::text, '')
FROM pg_catalog.pg_stat_activity WHERE pid = ANY (pg_catalog.pg_blocking_pids($1::int4)) ORDER BY xact_start LIMIT 3`

// findBlocker names who keeps the apply session waiting, if it waits just now.
func (w *Worker) findBlocker(ctx context.Context, pid uint32) error {
	w.auxMu.Lock()
	rows, err := pg.Query(ctx, w.aux, blockersSQL, fmt.Sprint(pid))
	w.auxMu.Unlock()
	if err != nil {
		return fmt.Errorf("find who holds locks: %w", err)
	}
	if len(rows) == 0 {
		return nil
	}
	var names []string
	for _, r := range rows {
		names = append(names, fmt.Sprintf("pid %s (%s, %s, %s, %s for %s s)", r[0], r[1], r[2], r[3], r[4], r[5]))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status.Blocker = strings.Join(names, "; ")
	return nil
}
