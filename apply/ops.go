package apply

import (
	"slices"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/wal"
)

// left returns the entries whose delete found no quiet row: the statement returns the ordinals of those it removed.
func left(o op, r *pgconn.Result) []*entry {
	if len(r.Rows) == len(o.items) {
		return nil
	}
	done := make([]bool, len(o.items))
	for _, row := range r.Rows {
		if n, err := strconv.Atoi(string(row[0])); err == nil && n >= 1 && n <= len(done) {
			done[n-1] = true
		}
	}
	var out []*entry
	for i, it := range o.items {
		if !done[i] {
			out = append(out, it.e)
		}
	}
	return out
}

// slowOnes are the entries that fastOps left out.
func slowOnes(tw *tableWave) []*entry {
	var out []*entry
	for _, e := range tw.entries {
		if !e.buried && (e.slow || e.blended || tw.deferrable && e.kind == netInsert) {
			out = append(out, e)
		}
	}
	return out
}

// fastOps groups a table's net changes: deletes first (they may free unique values), then updates by the set of
// columns that arrived, then inserts.
func fastOps(tw *tableWave) []op {
	var del, ins []item
	var updates []op
	for _, e := range tw.entries {
		switch {
		case e.slow, e.blended, e.buried:
		case e.kind == netDelete:
			del = append(del, item{e: e})
		case e.kind == netInsert:
			ins = append(ins, item{e: e, row: e.row})
		default:
			updates = addUpdate(updates, tw, item{e: e, row: e.row})
		}
	}
	return assemble(tw, del, updates, ins, !tw.deferrable)
}

func assemble(tw *tableWave, del []item, updates []op, ins []item, insert bool) []op {
	var ops []op
	if len(del) > 0 {
		ops = append(ops, op{kind: netDelete, tw: tw, items: del})
	}
	ops = append(ops, updates...)
	if len(ins) > 0 && insert {
		ops = append(ops, op{kind: netInsert, tw: tw, items: ins, set: allColumns(tw)})
	}
	return ops
}

func allColumns(tw *tableWave) []int {
	set := make([]int, len(tw.rel.Columns))
	for i := range set {
		set[i] = i
	}
	return set
}

// addUpdate puts an update into the group of its column set.
func addUpdate(ops []op, tw *tableWave, it item) []op {
	tw.set = updateSet(tw.set[:0], tw, it)
	i := slices.IndexFunc(ops, func(o op) bool { return slices.Equal(o.set, tw.set) }) // there are few
	if i < 0 {
		i = len(ops)
		ops = append(ops, op{kind: netUpdate, tw: tw, set: slices.Clone(tw.set)})
	}
	ops[i].items = append(ops[i].items, it)
	return ops
}

// updateSet appends the relation columns an update sets: those that arrived, without the key unless its spelling changes.
func updateSet(set []int, tw *tableWave, it item) []int {
	spelled := true
	for i, k := range tw.key {
		was := it.e.keyv[i]
		if it.stored != nil {
			was = it.stored[k.at]
		}
		// Of a row that was not read the spelling is known only where a value has but one.
		known := it.stored != nil || k.norm == normExact
		spelled = spelled && known && string(was.Data) == string(it.row[k.at].Data)
	}
	for i, v := range it.row {
		if v.Kind == wal.Unchanged || v.Kind == wal.Omitted || tw.table.columns[tw.cols[i]].always {
			continue
		}
		if !tw.isKey[i] || !spelled {
			set = append(set, i)
		}
	}
	return set
}

// call builds the statement of an op.
func (o op) call(q quiet) call {
	tableCols := make([]int, len(o.set))
	for i, r := range o.set {
		tableCols[i] = o.tw.cols[r]
	}
	params := make([][]byte, 0, len(o.set)+len(o.tw.key)+3)
	for _, r := range o.set {
		params = append(params, o.array(func(it item) wal.Value { return it.row[r] }))
	}
	if o.kind == netInsert {
		return call{insertSQL(o.tw.table, tableCols), params}
	}
	for k := range o.tw.key {
		params = append(params, o.array(func(it item) wal.Value { return it.e.keyv[k] }))
	}
	params = append(params, q.origin, q.before, q.decoded)
	if o.kind == netDelete {
		return call{deleteSQL(o.tw.table), params}
	}
	return call{updateSQL(o.tw.table, tableCols), params}
}

func (o op) array(f func(item) wal.Value) []byte {
	b := make([]byte, 0, 16*len(o.items))
	b = append(b, '{')
	for i, it := range o.items {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendElement(b, f(it))
	}
	return append(b, '}')
}

// appendCall inserts rows into a table without a key.
func appendCall(g *target, rows []wal.Tuple) call {
	tw := &tableWave{target: g}
	o := op{kind: netInsert, tw: tw, set: allColumns(tw)}
	for _, row := range rows {
		o.items = append(o.items, item{row: row})
	}
	return o.call(quiet{})
}

// appendElement writes one element of an array literal (PostgreSQL manual, "Array Input and Output Syntax").
func appendElement(b []byte, v wal.Value) []byte {
	if v.Kind != wal.Text {
		return append(b, "NULL"...)
	}
	if plain(v.Data) {
		return append(b, v.Data...)
	}
	b = append(b, '"')
	for _, c := range v.Data {
		if c == '"' || c == '\\' {
			b = append(b, '\\')
		}
		b = append(b, c)
	}
	return append(b, '"')
}

// plain reports whether an element needs no quotes: digits, sign, point.
func plain(v []byte) bool {
	if len(v) == 0 {
		return false
	}
	for _, c := range v {
		if (c < '0' || c > '9') && c != '-' && c != '.' {
			return false
		}
	}
	return true
}
