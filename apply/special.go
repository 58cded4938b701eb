package apply

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// keyless applies, one by one and in order, the updates and deletes of a table without a key. Rows are matched whole,
// and equal rows are interchangeable: the table is a bag, so "one of them" is exact.
func (x *execution) keyless(ctx context.Context, wv *wave, tw *tableWave) error {
	for _, i := range tw.inOrder {
		r := &wv.refs[i-1]
		if r.op == wal.Insert && len(x.appends1(tw, r)) == 0 {
			continue
		}
		c, ok := keylessCall(tw, r)
		if !ok {
			continue
		}
		res, err := x.s.run(ctx, []call{c})
		if err != nil {
			return err
		}
		if r.op == wal.Insert || res[0].CommandTag.RowsAffected() == 1 {
			continue
		}
		if err := x.keylessMissing(ctx, tw, r); err != nil {
			return err
		}
	}
	return nil
}

// appends returns the rows that are to be added to a table without a key, less those that a TRUNCATE here has removed:
// it is a tombstone for the rows of older transactions that had not seen it (rule 15).
func (x *execution) appends(wv *wave, tw *tableWave) []wal.Tuple {
	var rows []wal.Tuple
	for _, i := range tw.appends {
		rows = append(rows, x.appends1(tw, &wv.refs[i-1])...)
	}
	return rows
}

// appends1 is appends for one insert; a removed one is recorded.
func (x *execution) appends1(tw *tableWave, r *ref) []wal.Tuple {
	if s, removed := x.removed(tw, r); removed {
		h := held{State: conflict.State{Existence: conflict.Deleted, Version: s.version}, end: s.end}
		x.record(tw, nil, []outcome{{r, conflict.Decide(r.op, r.txn.Version(), h.toward(r, x.w.cfg.Site)), h}})
		return nil
	}
	return []wal.Tuple{r.row}
}

// removed reports whether a local TRUNCATE beats a change of a table without a key.
func (x *execution) removed(tw *tableWave, r *ref) (tombstone, bool) {
	s, ok := x.w.cfg.Local.truncated(tw.String())
	return s, ok && s.end > r.txn.SeenOf(x.w.cfg.Site) && r.txn.Version().Less(s.version)
}

// recheckBags is the capture barrier for tables without a key: a TRUNCATE that came before our rows may not have been
// decoded when they were added. None can come in between, as it would have to wait for us; and each gives the table a
// new file, so that the barrier is needed only when the file is not the one known.
func (x *execution) recheckBags(ctx context.Context) error {
	if len(x.bags) == 0 {
		return nil
	}
	var calls []call
	for _, tw := range x.bags {
		calls = append(calls, call{fileSQL, [][]byte{[]byte(pg.QuoteName(tw.schema, tw.name))}})
	}
	res, err := x.s.run(ctx, calls)
	if err != nil {
		return err
	}
	known := true
	for i, tw := range x.bags {
		known = known && x.s.files[tw.String()] == string(res[i].Rows[0][0])
	}
	if known {
		return nil
	}
	if err := x.barrier(ctx); err != nil {
		return err
	}
	for i, tw := range x.bags {
		x.s.files[tw.String()] = string(res[i].Rows[0][0])
	}
	return x.recheckRemoved()
}

const fileSQL = "SELECT coalesce(pg_catalog.pg_relation_filenode($1::text::regclass), 0)"

// errTruncated says that a TRUNCATE was decoded after rows were added that it removes; the batch is tried again.
var errTruncated = errors.New("a table was truncated while rows were added to it")

// recheckRemoved looks for rows that were added although a TRUNCATE removes them.
func (x *execution) recheckRemoved() error {
	recorded := map[*wal.Change]bool{}
	for _, r := range x.records {
		recorded[r.change] = true
	}
	for _, wv := range x.b.waves {
		for _, tw := range wv.tables {
			for _, i := range append(slices.Clip(tw.appends), tw.inOrder...) {
				r := &wv.refs[i-1]
				if _, removed := x.removed(tw, r); removed && r.op != wal.Delete && !recorded[r.change] {
					return errTruncated
				}
			}
		}
	}
	return nil
}

// keylessMissing handles an update or delete whose row is not here: the row of an update is written (rule 6).
func (x *execution) keylessMissing(ctx context.Context, tw *tableWave, r *ref) error {
	var h held
	s, removed := x.removed(tw, r)
	if removed {
		h = held{State: conflict.State{Existence: conflict.Deleted, Version: s.version}, end: s.end}
	}
	x.record(tw, nil, []outcome{{r, conflict.Decide(r.op, r.txn.Version(), h.toward(r, x.w.cfg.Site)), h}})
	if r.op == wal.Delete || removed {
		return nil
	}
	_, err := x.s.run(ctx, []call{appendCall(tw.target, []wal.Tuple{fill(r.row, r.change.Old)})})
	return err
}

// keylessCall is the statement of one change in a table without a key; ok is false when there is nothing to do.
func keylessCall(tw *tableWave, r *ref) (_ call, ok bool) {
	c := r.change
	if r.op == wal.Insert {
		return appendCall(tw.target, []wal.Tuple{c.New}), true
	}
	var set, match []int
	var params [][]byte
	for i, v := range c.New { // nil for a delete
		if v.Kind != wal.Unchanged && !tw.table.columns[tw.cols[i]].always {
			set = append(set, tw.cols[i])
			params = append(params, textParam(v))
		}
	}
	if r.op == wal.Update && len(set) == 0 {
		return call{}, false
	}
	for i, v := range c.Old {
		match = append(match, tw.cols[i])
		params = append(params, textParam(v))
	}
	return call{wholeRowSQL(tw.table, set, match), params}, true
}

// textParam is a text parameter: nil for NULL, and never nil for an empty string.
func textParam(v wal.Value) []byte {
	if v.Kind != wal.Text {
		return nil
	}
	return append([]byte{}, v.Data...)
}

// truncate applies TRUNCATE as a tombstone for every row older than it (rule 15): rows that are newer stay. Local rows
// that the origin had not seen are losers, so their images are recorded.
func (x *execution) truncate(ctx context.Context, wv *wave) error {
	v := wal.Version{Time: wv.txn.VersionTime, Site: wv.txn.Origin}
	g, err := x.w.resolve(wv.truncate.Relation)
	if err != nil {
		return err
	}
	tw := &tableWave{target: g}
	// A local row of the same microsecond is older when this site's id is smaller (rule 2).
	older := "<"
	if x.w.cfg.Site < v.Site {
		older = "<="
	}
	before := min(x.w.cfg.Local.safeBefore(wv.txn.SeenOf(x.w.cfg.Site)), v.Time)
	// Not prepared: it is rare, and each is another text.
	res, err := x.s.conn.Exec(ctx, truncateSQL(g.table, before, v.Time, older)).ReadAll()
	if err != nil {
		return err
	}
	x.fresh = false
	for _, row := range res[truncatedRows].Rows {
		if err := x.truncatedRow(ctx, tw, wv, row); err != nil {
			return err
		}
	}
	return nil
}

// truncatedRows is the statement of truncateSQL that returns rows.
const truncatedRows = 1

// truncateSQL are the statements that remove the rows older than a TRUNCATE of time at. Local rows from before on are
// looked at closely: one statement returns those that go, as truncatedRow reads them. First they wait for
// whoever writes here: rows of transactions that are committed but not visible yet, because they wait for a synchronous
// standby, are older than the TRUNCATE too.
func truncateSQL(t *table, before, at wal.Time, older string) string {
	const f = "pg_catalog.pg_xact_commit_timestamp_origin(t.xmin)"
	name := pg.QuoteName(t.schema, t.name)
	from, to := pg.QuoteLiteral(before.String())+"::timestamptz", pg.QuoteLiteral(at.String())+"::timestamptz"
	local := fmt.Sprintf("(%s).roident = 0 AND (%s).timestamp", f, f)
	losing := fmt.Sprintf("%s >= %s AND (%s).timestamp %s %s", local, from, f, older, to)
	names := make([]string, len(t.columns))
	for i, c := range t.columns {
		names[i] = pg.QuoteIdent(c.name)
	}
	plain := strings.Join(names, ", ")
	columns := fmt.Sprintf("t.xmin, (extract(epoch from (%s).timestamp) * 1000000)::int8 - 946684800000000, t.%s", f, strings.Join(names, ", t."))
	if t.deletable {
		return strings.Join([]string{
			"LOCK TABLE ONLY " + name + " IN SHARE ROW EXCLUSIVE MODE",
			fmt.Sprintf("DELETE FROM ONLY %s AS t WHERE %s RETURNING %s", name, losing, columns),
			fmt.Sprintf("DELETE FROM ONLY %s AS t WHERE coalesce((%s).roident, 1) <> 0 OR (%s).timestamp < %s", name, f, f, from),
		}, ";")
	}
	// PostgreSQL refuses a DELETE without a replica identity in a published table. So a real TRUNCATE it is, and the
	// rows that are newer are put back.
	return strings.Join([]string{
		"LOCK TABLE ONLY " + name + " IN ACCESS EXCLUSIVE MODE",
		fmt.Sprintf("SELECT %s FROM ONLY %s AS t WHERE %s", columns, name, losing),
		"DROP TABLE IF EXISTS pg_temp.duri_kept",
		fmt.Sprintf("CREATE TEMPORARY TABLE duri_kept ON COMMIT DROP AS SELECT %s FROM ONLY %s AS t WHERE %s >= %s AND NOT (%s)", plain, name, local, from, losing),
		"TRUNCATE TABLE ONLY " + name,
		fmt.Sprintf("INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT %s FROM pg_temp.duri_kept", name, plain, plain),
	}, ";")
}

// truncatedRow records a local row that lost against a TRUNCATE it was concurrent with.
func (x *execution) truncatedRow(ctx context.Context, tw *tableWave, wv *wave, row [][]byte) error {
	h := held{State: conflict.State{Existence: conflict.Live, Version: wal.Version{Site: x.w.cfg.Site}}}
	var micros int64
	var xid uint32
	if _, err := fmt.Sscan(string(row[0])+" "+string(row[1]), &xid, &micros); err != nil {
		return fmt.Errorf("truncate %s: %w", tw.table, err)
	}
	h.Version.Time = wal.Time(micros)
	h.image = make(wal.Tuple, len(tw.rel.Columns))
	key := make(wal.Tuple, len(tw.rel.Columns))
	for i, c := range tw.cols {
		h.image[i] = wal.Value{Kind: wal.Null}
		if v := row[2+c]; v != nil {
			h.image[i] = wal.Value{Kind: wal.Text, Data: v}
		}
		key[i] = h.image[i]
	}
	r := &ref{txn: wv.txn, num: wv.num, change: &wal.Change{Op: wal.Truncate, Relation: tw.rel, Old: key}, op: wal.Truncate}
	if err := x.attribute(ctx, &h, 0, xid); err != nil {
		return err
	}
	if h.toward(r, x.w.cfg.Site).Seen {
		return nil // the origin had seen it: an ordinary row that was truncated
	}
	x.record(tw, nil, []outcome{{
		ref:      r,
		decision: conflict.Decision{Apply: true, Kind: conflict.DeleteOriginDiffers, Code: conflict.Won},
		rival:    h,
	}})
	return nil
}
