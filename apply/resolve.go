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

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/wal"
)

// maxResolve bounds how often a key may slip away (created by a client between our look and our write).
const maxResolve = 8

// errRestless says that clients kept changing the same keys; the batch is tried again.
var errRestless = errors.New("rows kept changing while they were resolved")

// resolve decides keys whose rows were not quiet: it locks the rows, judges, and writes.
func (x *execution) resolve(ctx context.Context, wv *wave, tw *tableWave, pending []*entry) error {
	pending, err := x.leaveLosers(ctx, wv, tw, pending)
	if err != nil {
		return err
	}
	for round := range maxResolve {
		if len(pending) == 0 {
			return nil
		}
		rows, err := x.lock(ctx, tw, pending)
		if err == nil && len(rows) < len(pending) {
			err = x.lockMissing(ctx, tw, pending, rows)
		}
		if err != nil {
			return err
		}
		pending, err = x.judgeAll(ctx, wv, tw, pending, rows, round > 0)
		if err != nil {
			return err
		}
	}
	return errRestless
}

// leaveLosers takes out the keys whose changes all lose against the row that is visible: versions only grow, so no lock is
// needed to know that, and clients are not kept from these rows.
func (x *execution) leaveLosers(ctx context.Context, wv *wave, tw *tableWave, pending []*entry) (rest []*entry, err error) {
	if len(pending) == 0 || tw.blend != nil {
		return pending, nil
	}
	rows, err := x.read(ctx, tw, pending, strings.TrimSuffix(lockSQL(tw.table), forUpdate))
	if err != nil {
		return nil, err
	}
	for i, e := range pending {
		h, ok := rows[i]
		if !ok || h.end == ownRow {
			rest = append(rest, e)
			continue
		}
		chain := wv.chain(e)
		if !chain[len(chain)-1].txn.Version().Less(h.Version) {
			rest = append(rest, e)
			continue
		}
		v, err := judge(chain, h, x.merging(ctx, tw, e.key))
		if err != nil {
			return nil, err
		}
		if v.changed {
			rest = append(rest, e)
			continue
		}
		x.record(tw, e, v.records)
	}
	return rest, nil
}

// leaveBuried takes out the keys of a wave whose changes all lose against a known tombstone: whatever stands under the
// key now, or comes to, is newer than they are.
func (x *execution) leaveBuried(ctx context.Context, wv *wave, tw *tableWave) error {
	for _, e := range tw.entries {
		e.buried = false
		if tw.blend != nil {
			continue
		}
		s, ok := x.w.cfg.Mesh.tombstone(tw.String(), e.key, x.w.cfg.Origin)
		if !ok || !wv.refs[e.last-1].txn.Version().Less(s.made) || !x.w.cfg.Mesh.isApplied(s) {
			continue // of a peer's delete that is on its way, the row that it will remove may stand here yet
		}
		v, err := judge(wv.chain(e), deleted(s), x.merging(ctx, tw, e.key))
		if err != nil {
			return err
		}
		if e.buried = !v.changed; e.buried {
			x.record(tw, e, v.records)
		}
	}
	return nil
}

// lockMissing looks once more for the rows that were not found, after the capture barrier and with every transaction
// visible that is decoded: only then is a missing row known to be absent, and its tombstone to be all there is. The
// first look may have waited for a transaction that deletes a row and inserts it again, of which it sees the delete
// only; or a commit may wait for its synchronous standby, in the WAL but not visible yet.
func (x *execution) lockMissing(ctx context.Context, tw *tableWave, pending []*entry, rows map[int]held) error {
	if err := x.barrier(ctx); err != nil {
		return err
	}
	var at []int
	var missing []*entry
	for i, e := range pending {
		if _, ok := rows[i]; !ok {
			at, missing = append(at, i), append(missing, e)
		}
	}
	found, err := x.lockVisible(ctx, tw, missing)
	for i, h := range found {
		rows[at[i]] = h
	}
	return err
}

// unfinishedSQL lists the transactions whose changes are not visible to the next statement.
const (
	clearSQL      = "SELECT pg_catalog.pg_stat_clear_snapshot()"
	unfinishedSQL = `SELECT backend_xid::text FROM pg_catalog.pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_catalog.pg_backend_pid()
UNION SELECT x::xid::text FROM pg_catalog.pg_snapshot_xip(pg_catalog.pg_current_snapshot()) AS x`
)

// errInvisible says that a local transaction is in the WAL but not visible for longer than locks are waited for.
var errInvisible = errors.New("a committed transaction of this site waits for its synchronous standby")

// lockVisible is lock at a moment at which no transaction that is decoded is still invisible; that is waited for.
func (x *execution) lockVisible(ctx context.Context, tw *tableWave, pending []*entry) (map[int]held, error) {
	deadline := time.Now().Add(x.w.cfg.LockTimeout)
	for {
		res, err := x.runAt(ctx, []call{{clearSQL, nil}, {unfinishedSQL, nil}, readCall(tw, pending, lockSQL(tw.table))})
		if err != nil {
			return nil, err
		}
		waiting := slices.ContainsFunc(res[1].Rows, func(row [][]byte) bool {
			xid, err := strconv.ParseUint(string(row[0]), 10, 32)
			_, decoded := x.w.cfg.Mesh.Local.lookup(uint32(xid))
			return err == nil && decoded
		})
		if !waiting {
			return x.readRows(ctx, tw, pending, res[2])
		}
		if time.Now().After(deadline) {
			return nil, errInvisible
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// judgeAll judges each pending key and writes the results; it returns the inserts that met a row after all. again is
// false for the entries that the wave's fast statements left.
func (x *execution) judgeAll(ctx context.Context, wv *wave, tw *tableWave, pending []*entry, rows map[int]held, again bool) ([]*entry, error) {
	if again {
		judged := map[*entry]bool{}
		for i, e := range pending {
			judged[e] = rows[i].end != ownRow
		}
		x.drop(judged)
	}
	var del, ins []item
	var upd []op
	var versions []call
	for i, e := range pending {
		h, ok := rows[i]
		if ok && h.end == ownRow && (again || !e.slow && !e.blended) {
			// Our own insert, or another fast statement of this wave, wrote it already; or an earlier wave.
			if again || e.kind == netInsert {
				x.created = append(x.created, created{tw, wv, e})
			}
			if again || e.kind != netInsert || !x.touched(wv, tw, e.key) {
				continue
			}
		}
		if !ok {
			h = x.grave(tw, e, wv)
		}
		v, err := judge(wv.chain(e), h, x.merging(ctx, tw, e.key))
		if err != nil {
			return nil, err
		}
		x.record(tw, e, v.records)
		if !ok && !v.changed {
			x.keepOut(tw, e.key, wv.chain(e))
		}
		if v.changed && v.live && tw.blend != nil && v.state.Version.Site != x.w.cfg.Origin {
			versions = append(versions, versionCall(tw, e.key, v.state))
		}
		switch {
		case !v.changed, !v.live && !ok:
		case !v.live:
			del = append(del, item{e: e})
		case ok:
			upd = addUpdate(upd, tw, item{e, v.row, h.image})
		default:
			ins = append(ins, item{e: e, row: v.row})
		}
	}
	if len(versions) > 0 {
		if _, err := x.s.run(ctx, versions); err != nil {
			return nil, err
		}
	}
	return x.write(ctx, wv, assemble(tw, del, upd, ins, true))
}

// touched reports whether an earlier wave of the batch changed the key: a row of our own may then be what that left.
func (x *execution) touched(wv *wave, tw *tableWave, key string) bool {
	for _, earlier := range x.b.waves {
		if earlier == wv {
			return false
		}
		for _, t := range earlier.tables {
			if t.String() == tw.String() && t.index[key] != nil {
				return true
			}
		}
	}
	return false
}

// write runs decided operations. Rows that exist are locked, so only an insert can still meet a surprise.
func (x *execution) write(ctx context.Context, wv *wave, ops []op) ([]*entry, error) {
	if len(ops) == 0 {
		return nil, nil
	}
	calls := make([]call, len(ops))
	for i, o := range ops {
		calls[i] = o.call(everyRow(x.origin))
	}
	res, err := x.runAt(ctx, calls)
	if err != nil {
		return nil, err
	}
	x.wrote = true
	var again []*entry
	for i, o := range ops {
		n := res[i].CommandTag.RowsAffected()
		switch {
		case n == int64(len(o.items)):
			if o.kind == netInsert {
				x.noteCreated(wv, o)
			}
		case o.kind == netInsert:
			for _, it := range o.items {
				again = append(again, it.e)
			}
		default:
			return nil, fmt.Errorf("table %s: %d of %d locked rows could be written", o.tw.table, n, len(o.items))
		}
	}
	return again, nil
}

// drop takes back the records of keys that are judged again.
func (x *execution) drop(entries map[*entry]bool) {
	x.records = slices.DeleteFunc(x.records, func(r record) bool { return entries[r.entry] })
}

func (x *execution) record(tw *tableWave, e *entry, outs []outcome) {
	for _, o := range outs {
		r := newRecord(tw.target, o)
		r.entry = e
		x.records = append(x.records, r)
	}
}

// lock locks and reads the rows of the pending keys, by their position in pending.
func (x *execution) lock(ctx context.Context, tw *tableWave, pending []*entry) (map[int]held, error) {
	return x.read(ctx, tw, pending, lockSQL(tw.table))
}

// read is lock with another statement: lockSQL with or without its lock.
func (x *execution) read(ctx context.Context, tw *tableWave, pending []*entry, sql string) (map[int]held, error) {
	res, err := x.runAt(ctx, []call{readCall(tw, pending, sql)})
	if err != nil {
		return nil, err
	}
	return x.readRows(ctx, tw, pending, res[0])
}

func readCall(tw *tableWave, pending []*entry, sql string) call {
	o := op{tw: tw}
	for _, e := range pending {
		o.items = append(o.items, item{e: e})
	}
	var params [][]byte
	for k := range tw.key {
		params = append(params, o.array(func(it item) wal.Value { return it.e.keyv[k] }))
	}
	return call{sql, params}
}

// readRows reads what readCall has found, by position in pending.
func (x *execution) readRows(ctx context.Context, tw *tableWave, pending []*entry, res *pgconn.Result) (map[int]held, error) {
	x.fresh = false
	out := make(map[int]held, len(res.Rows))
	for _, row := range res.Rows {
		n, err := strconv.Atoi(string(row[0]))
		if err != nil || n < 1 || n > len(pending) {
			return nil, fmt.Errorf("lock rows of %s: unexpected ordinal %q", tw.table, row[0])
		}
		if out[n-1], err = x.heldRow(ctx, tw, row); err != nil {
			return nil, err
		}
	}
	key := func(i int) string { return pending[i].key }
	if err := x.attributeThird(ctx, tw, out, key); err != nil {
		return nil, err
	}
	return out, x.attributeBlended(ctx, tw, out, key)
}

// heldRow reads one row of lockSQL.
func (x *execution) heldRow(ctx context.Context, tw *tableWave, row [][]byte) (held, error) {
	h := held{State: conflict.State{Existence: conflict.Live}}
	switch {
	case string(row[1]) == x.xid:
		h.end = ownRow
		h.Version.Site = x.w.cfg.Origin
	case row[2] == nil:
		h.Seen = true // beyond the horizon: older than anything concurrent (rule 5)
	default:
		micros, err1 := strconv.ParseInt(string(row[2]), 10, 64)
		roident, err2 := strconv.ParseUint(string(row[3]), 10, 32)
		xmin, err3 := strconv.ParseUint(string(row[1]), 10, 32)
		if err := errors.Join(err1, err2, err3); err != nil {
			return h, fmt.Errorf("lock rows of %s: %w", tw.table, err)
		}
		h.Version.Time, h.xmin = wal.Time(micros), uint32(xmin)
		if err := x.attribute(ctx, &h, uint32(roident), uint32(xmin)); err != nil {
			return h, err
		}
	}
	h.image = make(wal.Tuple, len(tw.rel.Columns))
	for i, c := range tw.cols {
		if v := row[4+c]; v != nil {
			h.image[i] = wal.Value{Kind: wal.Text, Data: v}
		} else {
			h.image[i] = wal.Value{Kind: wal.Null}
		}
	}
	return h, nil
}

// attribute finds out whose a row's version is, and for a local one its exact version and position.
func (x *execution) attribute(ctx context.Context, h *held, roident, xmin uint32) error {
	if roident != 0 {
		site, ok := x.w.siteOf(roident)
		if !ok { // made since this worker began, by that of another site
			if err := x.w.loadOrigins(ctx); err != nil {
				return err
			}
			site, ok = x.w.siteOf(roident)
		}
		if !ok {
			return fmt.Errorf("a row was written under replication origin %d, which is no site of this cluster", roident)
		}
		h.Version.Site = site
		h.third = site != x.w.cfg.Origin && site != x.w.cfg.Site
		if site != x.w.cfg.Site {
			return nil
		}
	}
	h.Version.Site = x.w.cfg.Site
	k, ok := x.w.cfg.Mesh.Local.writer(xmin, h.Version.Time)
	if !ok && !x.fresh {
		// Either seen long ago, or committed so lately that it is not decoded yet: reading on tells which.
		if err := x.barrier(ctx); err != nil {
			return err
		}
		x.fresh = true
		k, ok = x.w.cfg.Mesh.Local.writer(xmin, h.Version.Time)
	}
	if !ok {
		h.Seen = true
		return nil
	}
	h.Version, h.end, h.seen = k.made, k.end, k.seen
	return nil
}

// appliedBySQL finds the apply transactions that wrote rows, by their xmin: $1 is an array of 32-bit transaction ids,
// none of them beyond the snapshot.
const appliedBySQL = `SELECT a.xid::xid, a.from_lsn, a.to_lsn, a.transactions = 0 FROM pg_catalog.unnest($1::int8[]) AS x(id)
CROSS JOIN (SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::int8) AS s(xmax)
JOIN duri.applied a ON a.xid = ((((s.xmax - x.id) >> 32 << 32) + x.id)::text::xid8)`

// attributeThird finds the exact versions of rows that third sites wrote: they carry the stamp of the last transaction
// that was merged with theirs (architecture.md decision 5). A row whose apply transaction is not on record any more had
// been seen by every site when the record was dropped.
func (x *execution) attributeThird(ctx context.Context, tw *tableWave, rows map[int]held, key func(int) string) error {
	ids := []byte{'{'}
	for _, h := range rows {
		if h.third {
			if len(ids) > 1 {
				ids = append(ids, ',')
			}
			ids = strconv.AppendUint(ids, uint64(h.xmin), 10)
		}
	}
	if len(ids) == 1 {
		return nil
	}
	res, err := x.s.run(ctx, []call{{appliedBySQL, [][]byte{append(ids, '}')}}})
	if err != nil {
		return err
	}
	type run struct {
		from, to wal.LSN
		copied   bool // no transactions, but the content that this site began with
	}
	found := map[uint32]run{}
	for _, row := range res[0].Rows {
		xid, err1 := strconv.ParseUint(string(row[0]), 10, 32)
		from, err2 := wal.ParseLSN(string(row[1]))
		to, err3 := wal.ParseLSN(string(row[2]))
		if err := errors.Join(err1, err2, err3); err != nil {
			return fmt.Errorf("read duri.applied: %w", err)
		}
		found[uint32(xid)] = run{from, to, string(row[3]) == "t"}
	}
	first := x.b.txns[0] // what it had seen, all of the batch had
	for i, h := range rows {
		if !h.third {
			continue
		}
		span, ok := found[h.xmin]
		if !ok || span.to <= first.SeenOf(h.Version.Site) {
			h.Seen, h.end = true, 0
			rows[i] = h
			continue
		}
		if span.copied {
			if x.b.minTime <= h.Version.Time {
				return &TableError{
					tw.String(), fmt.Sprintf("a change of site %d was on its way while this site's content was copied from site %d, and which is newer is not known here", x.w.cfg.Origin, h.Version.Site),
					"re-join this site while the other sites' changes arrive promptly",
				}
			}
			h.end = span.to
			rows[i] = h
			continue
		}
		p, err := x.w.cfg.Mesh.exact(ctx, h.Version.Site, span.from, span.to, tw.String(), key(i), x.w.keysOf)
		if err != nil {
			return err
		}
		h.Version, h.end, h.seen = p.made, p.end, p.seen
		rows[i] = h
	}
	return nil
}

// tombstone is what stands for a key that has no row, or had none before this batch: the newest tombstone, or the newer
// row that the origin's own later delete keeps out.
func (x *execution) tombstone(tw *tableWave, key string) (held, bool) {
	s, ok := x.w.cfg.Mesh.tombstone(tw.String(), key, x.w.cfg.Origin)
	if kept, is := x.w.cfg.Mesh.keptOutBy(x.w.cfg.Origin, tw.String(), key); is && (!ok || s.made.Less(kept.Version)) {
		return kept, true
	}
	return deleted(s), ok
}

// keepOut notes the row that a key's changes would have left, if what they lost against is a delete that is not applied
// here yet.
func (x *execution) keepOut(tw *tableWave, key string, chain []*ref) {
	s, ok := x.w.cfg.Mesh.tombstone(tw.String(), key, x.w.cfg.Origin)
	if !ok || x.w.cfg.Mesh.isApplied(s) {
		return
	}
	row, t := image(chain), chain[len(chain)-1].txn
	if row == nil || !row.Complete() {
		return
	}
	h := held{State: conflict.State{Existence: conflict.Live, Version: t.Version()}, image: row, end: t.EndLSN, seen: t.Seen}
	x.kept = append(x.kept, keptOut{grave{tw.String(), key}, h, s})
}

// grave is the state of a key that has no row.
func (x *execution) grave(tw *tableWave, e *entry, wv *wave) held {
	if h, ok := x.tombstone(tw, e.key); ok {
		return h
	}
	// What is absent may also not have been written because of a delete that the origin itself made later: that is known
	// before it is applied.
	m := x.w.cfg.Mesh
	return held{behind: m.behind(wv.first(e).txn) || m.buried(tw.String(), e.key, x.w.cfg.Origin) || m.hasSkipped(tw.String(), e.key)}
}

// barrierNow is barrier for what was committed when it is called.
func (x *execution) barrierNow(ctx context.Context) error {
	if _, err := x.runAt(ctx, nil); err != nil {
		return err
	}
	return x.barrier(ctx)
}

// barrier waits until the local stream has passed everything that was committed when rows were last locked or created
// (rule 8). It holds row locks meanwhile, but needs none, so it cannot deadlock.
func (x *execution) barrier(ctx context.Context) error {
	lsn := x.at
	// Each try writes WAL of its own that decoding has to pass as well: a large batch needs more patience each time.
	wait, cancel := context.WithTimeout(ctx, x.w.cfg.BarrierTimeout<<min(x.b.behind, 6))
	defer cancel()
	err := x.w.cfg.Barrier(wait, lsn)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return &behindError{lsn}
	}
	if err != nil {
		return fmt.Errorf("wait for local decoding to pass %s: %w", lsn, err)
	}
	return nil
}

// behindError says that local decoding is too far behind to wait for it with rows locked. The batch is given up,
// decoding is waited for without locks, and the batch tried again.
type behindError struct{ lsn wal.LSN }

func (e *behindError) Error() string {
	return fmt.Sprintf("this site's own decoding has not reached %s yet", e.lsn)
}

// recheck is the capture barrier: keys that were created are looked up among the tombstones again, now that the rows
// are in place and every delete that came before them is decoded. All that the batch did to a key is judged against its
// tombstone, what later waves did too.
func (x *execution) recheck(ctx context.Context) error {
	done := map[grave]bool{}
	var order []*tableWave
	dead := map[string][]item{}
	live := map[string][]op{}
	for _, c := range x.created {
		g := grave{c.tw.String(), c.e.key}
		h, ok := x.tombstone(c.tw, c.e.key)
		if !ok || done[g] {
			continue
		}
		done[g] = true
		chain, entries := x.since(c)
		v, err := judge(chain, h, x.merging(ctx, c.tw, c.e.key))
		if err != nil {
			return err
		}
		x.drop(entries)
		x.record(c.tw, c.e, v.records)
		if len(dead[g.table])+len(live[g.table]) == 0 {
			order = append(order, c.tw)
		}
		if !v.changed {
			x.keepOut(c.tw, c.e.key, chain)
		}
		if v.live && v.changed { // as it is, but for values that came from elsewhere
			live[g.table] = addUpdate(live[g.table], c.tw, item{e: c.e, row: v.row})
		} else { // a later wave may have removed the row already
			dead[g.table] = append(dead[g.table], item{e: c.e})
		}
	}
	var calls []call
	for _, tw := range order {
		for _, o := range assemble(tw, dead[tw.String()], live[tw.String()], nil, false) {
			calls = append(calls, o.call(everyRow(x.origin)))
		}
	}
	if len(calls) == 0 {
		return nil
	}
	_, err := x.s.run(ctx, calls)
	return err
}

// since returns the changes of a created key from the wave that created it on.
func (x *execution) since(c created) (chain []*ref, entries map[*entry]bool) {
	entries = map[*entry]bool{}
	for _, wv := range x.b.waves[max(0, slices.Index(x.b.waves, c.wv)):] {
		for _, tw := range wv.tables {
			if tw.String() != c.tw.String() {
				continue
			}
			if e := tw.index[c.e.key]; e != nil {
				chain = append(chain, wv.chain(e)...)
				entries[e] = true
			}
		}
	}
	return chain, entries
}

// complete fills the images of rows that changed their key with the values that PostgreSQL did not send, from the row
// under the old key as long as it is still there, undisputed, and as the origin had it then; else from the origin
// (rule 9).
func (x *execution) complete(ctx context.Context, wv *wave) error {
	for _, tw := range wv.tables {
		var all []*moved
		var old []*entry
		for _, m := range wv.moved {
			if m.tw == tw && !wv.refs[m.ref-1].row.Complete() { // a batch that is tried again has it
				all, old = append(all, m), append(old, &entry{keyv: m.old, key: tw.normal(m.old)})
			}
		}
		if len(all) == 0 {
			continue
		}
		rows, err := x.lock(ctx, tw, old)
		if err != nil {
			return err
		}
		for i, m := range all {
			h, ok := rows[i]
			exact := ok && !x.w.ahead(wv.refs[m.ref-1].txn, tw, old[i].key)
			if err := x.completeOne(ctx, wv, m, h, ok, exact); err != nil {
				return err
			}
		}
	}
	for _, m := range wv.moved {
		if m.fetched {
			d := conflict.Decision{Apply: true, Code: conflict.Filled}
			x.record(m.tw, m.e, []outcome{{ref: &wv.refs[m.ref-1], decision: d}})
		}
	}
	return nil
}

// completeOne completes a moved row; h is what stands under its old key, if found, and exact says that it holds the
// values that the origin had there.
func (x *execution) completeOne(ctx context.Context, wv *wave, m *moved, h held, found, exact bool) error {
	r := &wv.refs[m.ref-1]
	row := h.image
	usable := found && !r.blind && undisputed(r, h)
	if !usable || !exact {
		fetched, there, err := x.fetch(ctx, m.tw)(r)
		switch {
		case err != nil:
			return err
		case there:
			row, m.fetched = fetched, true
		case !usable:
			return nil // gone at the origin, and what removed it is on its way
		}
	}
	r.row, r.blind = fill(r.row, row), false
	wv.refold(m.e)
	return nil
}

// merging is what judging a key of a table takes.
func (x *execution) merging(ctx context.Context, tw *tableWave, key string) merging {
	return merging{
		fetch: x.fetch(ctx, tw), blend: tw.blend,
		touched: func(r *ref) map[string]bool {
			return x.w.cfg.Mesh.touchedSince(tw.rel, tw.String(), key, r.txn.Version(), x.w.cfg.Origin)
		},
	}
}

// fetch completes rows by asking the origin.
func (x *execution) fetch(ctx context.Context, tw *tableWave) fetcher {
	return func(r *ref) (wal.Tuple, bool, error) {
		if x.w.cfg.Fetch == nil {
			return nil, false, errors.New("an unchanged out-of-line value is needed from the origin, which cannot be asked")
		}
		row, ok, err := x.w.cfg.Fetch(ctx, tw.rel, keyNames(tw.target), r.row)
		if err != nil {
			return nil, false, fmt.Errorf("fetch a row of %s from its origin: %w", tw.table, err)
		}
		if key, whole := keyOf(nil, tw.key, r.row); whole && ok {
			x.w.filled[tw.String()+"\x00"+string(key)] = x.w.cfg.Clock()
		} else if whole {
			x.w.cfg.Mesh.skip(tw.String(), string(key))
		}
		return row, ok, nil
	}
}

// filledFor is by how much an origin's clock may differ from this site's before values that were fetched from it pass
// for those of the transaction that is being applied. The clock rule holds back what comes from further ahead.
const filledFor = 2 * time.Second

// ahead reports whether the row under a key may hold values that its origin gave it after t: what was fetched to complete
// an earlier change is as of that moment, and is right only when the changes up to then have been applied. What was
// fetched before this run is not known any more.
func (w *Worker) ahead(t *wal.Txn, tw *tableWave, key string) bool {
	at, filled := w.filled[tw.String()+"\x00"+key]
	return t.VersionTime <= w.began.Add(filledFor) || filled && t.VersionTime <= at.Add(filledFor)
}

// forgetFilled drops what no longer matters to transactions from t on.
func (w *Worker) forgetFilled(t wal.Time) {
	maps.DeleteFunc(w.filled, func(_ string, at wal.Time) bool { return at.Add(2*filledFor) < t })
}

func keyNames(g *target) []string {
	var out []string
	for _, k := range g.key {
		out = append(out, g.rel.Columns[k.at].Name)
	}
	return out
}
