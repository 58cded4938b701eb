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
		x.wrote = true
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
		h := deleted(s)
		x.record(tw, nil, []outcome{{r, conflict.Decide(r.op, r.txn.Version(), h.toward(r)), h}})
		return nil
	}
	return []wal.Tuple{r.row}
}

// removed reports whether a TRUNCATE of another site beats a change of a table without a key.
func (x *execution) removed(tw *tableWave, r *ref) (past, bool) {
	s, ok := x.w.cfg.Mesh.truncated(tw.String(), x.w.cfg.Origin)
	return s, ok && s.end > r.txn.SeenOf(s.made.Site) && r.txn.Version().Less(s.made)
}

// deleted is the state of a key or table that p's tombstone covers.
func deleted(p past) held {
	return held{State: conflict.State{Existence: conflict.Deleted, Version: p.made}, end: p.end, seen: p.seen}
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
	if err := x.barrierNow(ctx); err != nil {
		return err
	}
	for i, tw := range x.bags {
		x.s.files[tw.String()] = string(res[i].Rows[0][0])
	}
	return nil
}

const fileSQL = "SELECT coalesce(pg_catalog.pg_relation_filenode($1::text::regclass), 0)"

// errTruncated says that a TRUNCATE was decoded after rows were added that it removes; the batch is tried again.
var errTruncated = errors.New("a table was truncated while rows were added to it")

// recheckRemoved looks for rows that were added although a TRUNCATE removes them.
func (x *execution) recheckRemoved() error {
	if !slices.ContainsFunc(x.bags, func(tw *tableWave) bool {
		_, ok := x.w.cfg.Mesh.truncated(tw.String(), x.w.cfg.Origin)
		return ok
	}) {
		return nil
	}
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
	h := held{behind: x.w.cfg.Mesh.behind(r.txn)}
	s, removed := x.removed(tw, r)
	if removed {
		h = deleted(s)
	}
	if d := conflict.Decide(r.op, r.txn.Version(), h.toward(r)); d.Kind != conflict.None || d.Code != conflict.AsSent {
		x.record(tw, nil, []outcome{{r, d, h}})
	}
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

// truncate applies TRUNCATE as a tombstone for every row older than it (rule 15): rows that are newer stay. Rows of other
// sites that the origin had not seen are losers, so their images are recorded.
func (x *execution) truncate(ctx context.Context, wv *wave) error {
	x.wrote = true
	g, err := x.w.resolve(wv.truncate.Relation)
	if err != nil {
		return err
	}
	tw := &tableWave{target: g}
	// First wait for whoever writes here: rows of transactions that are committed but not visible yet, because they wait
	// for a synchronous standby, are older than the TRUNCATE too. Not prepared: it is rare, and each is another text.
	q := x.w.cfg.Mesh.quietFor(x.origin, min(x.w.cfg.Mesh.safeBefore(wv.txn), wv.txn.VersionTime))
	res, err := x.s.conn.Exec(ctx, suspectsSQL(g.table, q)).ReadAll()
	if err != nil {
		return err
	}
	x.fresh = false
	if _, err := x.runAt(ctx, nil); err != nil { // what the suspects are told apart by must be decoded up to here
		return err
	}
	kept, err := x.survivors(ctx, tw, wv, res[len(res)-1].Rows)
	if err != nil {
		return err
	}
	v := wv.txn.Version()
	if _, err := pg.Query(ctx, x.s.conn, purgeSQL, g.schema, g.name, v.Time.String(), fmt.Sprint(v.Site)); err != nil {
		return err
	}
	if _, err = x.s.conn.Exec(ctx, truncateSQL(g.table, places(kept))).ReadAll(); err != nil || g.deletable {
		return err
	}
	return x.putBack(ctx, tw, kept)
}

// survivor is a row that a TRUNCATE leaves: where it stands, and its version.
type survivor struct {
	place string
	held  held
}

func places(kept []survivor) (out []string) {
	for _, s := range kept {
		out = append(out, s.place)
	}
	return out
}

// putBack inserts the rows that a real TRUNCATE had to remove with the others. They carry the origin's stamp then, so
// that their versions are kept beside: those of one version get a subtransaction, whose id tells them.
func (x *execution) putBack(ctx context.Context, tw *tableWave, kept []survivor) error {
	names := make([]string, len(tw.columns))
	for i, c := range tw.columns {
		names[i] = pg.QuoteIdent(c.name)
	}
	plain := strings.Join(names, ", ")
	for len(kept) > 0 {
		first := kept[0].held
		var same, rest []survivor
		for _, s := range kept {
			if s.held.Version == first.Version {
				same = append(same, s)
			} else {
				rest = append(rest, s)
			}
		}
		kept = rest
		res, err := x.s.conn.Exec(ctx, fmt.Sprintf("SAVEPOINT duri_kept; INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT %s FROM pg_temp.duri_kept WHERE duri_place = ANY (%s) RETURNING xmin; RELEASE duri_kept",
			pg.QuoteName(tw.schema, tw.name), plain, plain, tids(places(same)))).ReadAll()
		if err != nil {
			return err
		}
		if err := x.keepVersion(ctx, tw, string(res[1].Rows[0][0]), first); err != nil {
			return err
		}
	}
	return nil
}

// tids is a literal of places in a table.
func tids(places []string) string {
	return pg.QuoteLiteral(`{"`+strings.Join(places, `","`)+`"}`) + "::tid[]"
}

// suspectsSQL locks a table and lists, as survivors reads them, the rows that a TRUNCATE need not have seen: those that
// are not quiet.
func suspectsSQL(t *table, q quiet) string {
	const f = "pg_catalog.pg_xact_commit_timestamp_origin(t.xmin)"
	mode := "SHARE ROW EXCLUSIVE"
	if !t.deletable {
		mode = "ACCESS EXCLUSIVE"
	}
	names := make([]string, len(t.columns))
	for i, c := range t.columns {
		names[i] = "t." + pg.QuoteIdent(c.name)
	}
	name := pg.QuoteName(t.schema, t.name)
	return fmt.Sprintf(`LOCK TABLE ONLY %s IN %s MODE;
SELECT t.ctid, t.xmin, (extract(epoch from (%s).timestamp) * 1000000)::int8 - 946684800000000, (%s).roident, %s
FROM ONLY %s AS t WHERE (%s).roident <> %s AND ((%s).timestamp >= %s OR pg_catalog.age(t.xmin) <= pg_catalog.age(%s))
	OR t.xmin::text IN (SELECT convert_from(key_norm, 'UTF8') FROM duri.version WHERE %t AND table_schema = %s AND table_name = %s)`,
		name, mode, f, f, strings.Join(names, ", "), name, f, literal(q.origin, "oid"), f, literal(q.before, "timestamptz"), literal(q.decoded, "xid"),
		!t.deletable, pg.QuoteLiteral(t.schema), pg.QuoteLiteral(t.name))
}

// literal writes a parameter into SQL.
func literal(param []byte, typ string) string {
	if param == nil {
		return "NULL::" + typ
	}
	return pg.QuoteLiteral(string(param)) + "::" + typ
}

// survivors decides which of the suspects are newer than the TRUNCATE, by their place in the table, and records those
// that lose against it.
func (x *execution) survivors(ctx context.Context, tw *tableWave, wv *wave, rows [][][]byte) ([]survivor, error) {
	held := map[int]held{}
	keys := make([]wal.Tuple, len(rows))
	for i, row := range rows {
		h, err := x.heldRow(ctx, tw, row)
		if err != nil {
			return nil, err
		}
		held[i], keys[i] = h, h.image
	}
	err := x.attributeThird(ctx, tw, held, func(i int) string {
		if len(tw.key) == 0 {
			return wholeRow(keys[i])
		}
		k, _ := keyOf(nil, tw.key, keys[i])
		return string(k)
	})
	if err == nil && !tw.deletable {
		err = x.versions(ctx, tw, held, func(i int) string { return string(rows[i][1]) })
	}
	if err != nil {
		return nil, err
	}
	var kept []survivor
	for i, row := range rows {
		h := held[i]
		r := &ref{txn: wv.txn, num: wv.num, change: &wal.Change{Op: wal.Truncate, Relation: tw.rel, Old: h.image}, op: wal.Truncate}
		switch s := h.toward(r); {
		case s.Seen: // an ordinary row that was truncated
		case r.txn.Version().Less(h.Version):
			kept = append(kept, survivor{string(row[0]), h})
		default:
			x.record(tw, nil, []outcome{{
				ref:      r,
				decision: conflict.Decision{Apply: true, Kind: conflict.DeleteOriginDiffers, Code: conflict.Won},
				rival:    h,
			}})
		}
	}
	return kept, nil
}

// truncateSQL removes all rows but those at the given places.
func truncateSQL(t *table, kept []string) string {
	name := pg.QuoteName(t.schema, t.name)
	switch {
	case len(kept) == 0 && t.deletable:
		return "DELETE FROM ONLY " + name
	case len(kept) == 0:
		return "TRUNCATE TABLE ONLY " + name
	case t.deletable:
		return "DELETE FROM ONLY " + name + " AS t WHERE t.ctid <> ALL (" + tids(kept) + ")"
	}
	// PostgreSQL refuses a DELETE without a replica identity in a published table. So a real TRUNCATE it is, and the
	// rows that are newer are put back (putBack).
	return strings.Join([]string{
		"DROP TABLE IF EXISTS pg_temp.duri_kept",
		fmt.Sprintf("CREATE TEMPORARY TABLE duri_kept ON COMMIT DROP AS SELECT t.ctid AS duri_place, t.* FROM ONLY %s AS t WHERE t.ctid = ANY (%s)", name, tids(kept)),
		"TRUNCATE TABLE ONLY " + name,
	}, ";")
}
