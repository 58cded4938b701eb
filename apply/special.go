package apply

import (
	"context"
	"fmt"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// keyless applies, one by one and in order, the updates and deletes of a table without a key. Rows are matched whole,
// and equal rows are interchangeable: the table is a bag, so "one of them" is exact.
func (x *execution) keyless(ctx context.Context, wv *wave, tw *tableWave) error {
	for _, i := range tw.inOrder {
		r := &wv.refs[i-1]
		c := keylessCall(tw, r)
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

// keylessMissing handles an update or delete whose row is not here: the row of an update is written (rule 6).
func (x *execution) keylessMissing(ctx context.Context, tw *tableWave, r *ref) error {
	out := *r
	out.row = r.change.New
	x.record(tw, nil, []outcome{{ref: &out, decision: conflict.Decide(r.op, r.txn.Version(), conflict.State{})}})
	if r.op == wal.Delete {
		return nil
	}
	row := fill(r.change.New, r.change.Old)
	one := &tableWave{target: tw.target, appends: []wal.Tuple{row}}
	_, err := x.s.run(ctx, []call{appendCall(one)})
	return err
}

func keylessCall(tw *tableWave, r *ref) call {
	c := r.change
	if r.op == wal.Insert {
		return appendCall(&tableWave{target: tw.target, appends: []wal.Tuple{c.New}})
	}
	var set, match []int
	var params [][]byte
	for i, v := range c.New { // nil for a delete
		if v.Kind != wal.Unchanged && !tw.table.columns[tw.cols[i]].always {
			set = append(set, tw.cols[i])
			params = append(params, textParam(v))
		}
	}
	for i, v := range c.Old {
		match = append(match, tw.cols[i])
		params = append(params, textParam(v))
	}
	return call{wholeRowSQL(tw.table, set, match), params}
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
	const f = "pg_catalog.pg_xact_commit_timestamp_origin(t.xmin)"
	// A local row of the same microsecond is older when this site's id is smaller (rule 2).
	older := "<"
	if x.w.cfg.Site < v.Site {
		older = "<="
	}
	name := pg.QuoteName(g.schema, g.name)
	b := &sqlBuilder{}
	fmt.Fprintf(b, "DELETE FROM ONLY %s AS t WHERE (%s).roident = 0 AND (%s).timestamp >= $1::timestamptz AND (%s).timestamp %s $2::timestamptz RETURNING t.xmin, (extract(epoch from (%s).timestamp) * 1000000)::int8 - 946684800000000", name, f, f, f, older, f)
	for _, c := range g.columns {
		fmt.Fprintf(b, ", t.%s", pg.QuoteIdent(c.name))
	}
	rest := fmt.Sprintf("DELETE FROM ONLY %s AS t WHERE coalesce((%s).roident, 1) <> 0 OR (%s).timestamp < $1::timestamptz", name, f, f)
	before := min(x.w.cfg.Local.safeBefore(wv.txn.SeenOf(x.w.cfg.Site)), v.Time)
	res, err := x.s.run(ctx, []call{
		{b.String(), [][]byte{[]byte(before.String()), []byte(v.Time.String())}},
		{rest, [][]byte{[]byte(before.String())}},
	})
	if err != nil {
		return err
	}
	for _, row := range res[0].Rows {
		if err := x.truncatedRow(tw, wv, row); err != nil {
			return err
		}
	}
	return nil
}

// truncatedRow records a local row that lost against a TRUNCATE it was concurrent with.
func (x *execution) truncatedRow(tw *tableWave, wv *wave, row [][]byte) error {
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
	if k, ok := x.w.cfg.Local.lookup(xid); ok && k.end <= wv.txn.SeenOf(x.w.cfg.Site) {
		return nil // the origin had seen it: an ordinary row that was truncated
	}
	change := &wal.Change{Op: wal.Truncate, Relation: tw.rel, Old: key}
	x.record(tw, nil, []outcome{{
		ref:      &ref{txn: wv.txn, change: change, op: wal.Truncate},
		decision: conflict.Decision{Apply: true, Kind: conflict.DeleteOriginDiffers, Code: conflict.Won},
		rival:    h,
	}})
	return nil
}
