package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/verify"
	"github.com/duri-io/duri/wal"
)

// Ghosts are reversed by making equal to the other site's what they have written, and what has been judged by it since (design:
// durability, section 6): however large the database is, a few rows are compared. Where that cannot be told with certainty, whole
// tables are.

// writtenRows are rows by table.
type writtenRows map[[2]string]*writtenTable

// writtenTable are rows of a table.
type writtenTable struct {
	changes []wal.Change
	keys    []map[string]*string // by column
	all     bool                 // which they are is not known
}

func (w writtenRows) of(schema, table string) *writtenTable {
	id := [2]string{schema, table}
	if w[id] == nil {
		w[id] = &writtenTable{}
	}
	return w[id]
}

// add adds what a transaction has written.
func (w writtenRows) add(t *wal.Txn) {
	for _, c := range t.Changes {
		x := w.of(c.Relation.Namespace, c.Relation.Name)
		x.changes = append(x.changes, c)
	}
}

// within reports whether all are in these tables: one that is not may have another name now.
func (w writtenRows) within(tables []verify.Table) bool {
	known := map[[2]string]bool{}
	for _, t := range tables {
		known[[2]string{t.Schema, t.Name}] = true
	}
	for id := range w {
		if !known[id] {
			return false
		}
	}
	return true
}

// choose gives the rows of a table in the form of its comparison.
func (w writtenRows) choose(t verify.Table) verify.Chosen {
	x := w[[2]string{t.Schema, t.Name}]
	switch {
	case x == nil:
		return verify.Chosen{}
	case x.all:
		return verify.Chosen{All: true}
	}
	var out verify.Chosen
	var ok bool
	if len(t.Key) == 0 {
		out.Rows, ok = x.images(t)
	} else {
		out.Keys, ok = x.keysOf(t)
	}
	if !ok {
		return verify.Chosen{All: true}
	}
	return out
}

// keysOf gives the keys, each once; false: not all are known.
func (x *writtenTable) keysOf(t verify.Table) (keys []verify.Key, ok bool) {
	seen := map[string]bool{}
	add := func(values []*string) bool {
		key := make(verify.Key, len(values))
		for i, v := range values {
			if v == nil {
				return false
			}
			key[i] = *v
		}
		if id := strings.Join(key, "\x00"); !seen[id] {
			seen[id] = true
			keys = append(keys, key)
		}
		return true
	}
	for _, c := range x.changes {
		at, ok := columnsOf(c.Relation, t.Key)
		if !ok || c.Op == wal.Truncate {
			return nil, false
		}
		if c.Op == wal.Update && c.OldKind == wal.OldNone && slices.ContainsFunc(at, func(i int) bool { return !c.Relation.Columns[i].Key }) {
			return nil, false // The replica identity is another one: the key may have changed.
		}
		for _, row := range []wal.Tuple{c.Old, c.New} {
			if row == nil {
				continue
			}
			if values, ok := valuesOf(row, at); !ok || !add(values) {
				return nil, false
			}
		}
	}
	for _, k := range x.keys {
		values := make([]*string, len(t.Key))
		for i, c := range t.Key {
			values[i] = k[c]
		}
		if !add(values) {
			return nil, false
		}
	}
	return keys, true
}

// images gives whole rows, of a table without key; false: not all are known.
func (x *writtenTable) images(t verify.Table) (rows [][]*string, ok bool) {
	names := make([]string, len(t.Columns))
	for i, c := range t.Columns {
		names[i] = c.Name
	}
	for _, c := range x.changes {
		at, ok := columnsOf(c.Relation, names)
		if !ok || c.Op == wal.Truncate || c.Op != wal.Insert && c.OldKind != wal.OldFull {
			return nil, false
		}
		for _, row := range []wal.Tuple{c.Old, c.New} {
			if row == nil {
				continue
			}
			values, ok := valuesOf(row, at)
			if !ok {
				return nil, false
			}
			rows = append(rows, values)
		}
	}
	return rows, len(x.keys) == 0
}

// columnsOf finds columns by their names.
func columnsOf(r *wal.Relation, names []string) (at []int, ok bool) {
	for _, name := range names {
		i := slices.IndexFunc(r.Columns, func(c wal.Column) bool { return c.Name == name })
		if i < 0 {
			return nil, false
		}
		at = append(at, i)
	}
	return at, true
}

// valuesOf gives values as texts; false: one was not sent.
func valuesOf(row wal.Tuple, at []int) (values []*string, ok bool) {
	values = make([]*string, len(at))
	for n, i := range at {
		switch row[i].Kind {
		case wal.Text:
			text := string(row[i].Data)
			values[n] = &text
		case wal.Null:
		case wal.Unchanged, wal.Omitted:
			return nil, false
		}
	}
	return values, true
}

const (
	// ghostsTold is how many ghosts a site names to the one that reverses them.
	ghostsTold = 1000
	// judgedMax bounds the keys of rows that were judged since. With more, everything is compared.
	judgedMax = 100_000
	// judgedBefore is how much earlier than a transaction's commit another one may have begun that met it.
	judgedBefore = 10 * time.Minute
)

// ghostRows are the rows that a gap is about which stands for ghosts; nil: it is about everything, or nobody can tell.
func (p *peer) ghostRows(ctx context.Context, g catalog.Gap) (writtenRows, error) {
	if !strings.HasPrefix(g.Reason, ghostsReason) {
		return nil, nil
	}
	_, d, err := p.statusThere(ctx)
	if err != nil {
		return nil, err
	}
	for _, one := range d.Ghosts {
		if one.Site != p.n.self.Name || one.Open == 0 || len(one.Commits) != one.Open {
			continue
		}
		rows, first, err := ownTransactions(p.n.ready.Load().journal, one.Commits, one.To, p.site.ID)
		if err == nil && rows != nil {
			err = p.n.withSQL(ctx, func(c *pgconn.PgConn) error { return rows.addJudged(ctx, c, first, g) })
		}
		if err != nil || rows == nil {
			return nil, err
		}
		tables, err := p.n.db.Tables(ctx)
		if err != nil || !rows.within(tables) {
			return nil, err
		}
		return rows, nil
	}
	return nil, nil
}

// moment is when the first of some transactions of this site was committed: by the server's clock, and by how far the other site's
// were applied here by then, which no clock that is set back can change.
type moment struct {
	at   wal.Time
	seen wal.LSN
}

// ownTransactions reads what transactions of this site have written, by where their commit records begin, and when the first of them was
// committed, as seen by another site. to is the end of the last one. nil: not all are in the journal.
func ownTransactions(j *journal.Journal, commits []wal.LSN, to wal.LSN, other wal.SiteID) (rows writtenRows, first moment, err error) {
	wanted := map[wal.LSN]bool{}
	for _, at := range commits {
		wanted[at] = true
	}
	h, err := j.HeaderAt(slices.Min(commits))
	if err != nil {
		return nil, first, nil //nolint:nilerr // it is kept no more
	}
	r, err := j.NewReader(h.From)
	if err != nil {
		return nil, first, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	r.TrustChain()
	rows = writtenRows{}
	for len(wanted) > 0 {
		rec, ok, err := r.TryNext()
		if err != nil {
			return nil, first, err
		}
		if !ok || rec.From >= to {
			return nil, first, nil
		}
		if t := rec.Txn; t != nil && wanted[t.CommitLSN] {
			if seen := t.SeenOf(other); len(wanted) == len(commits) {
				first = moment{t.CommitTime, seen}
			} else {
				first = moment{min(first.at, t.CommitTime), min(first.seen, seen)}
			}
			delete(wanted, t.CommitLSN)
			rows.add(t)
		}
	}
	return rows, first, nil
}

// judgedSQL are the rows that did not simply apply since a moment, or are hidden, or were before this gap was worked on
// (catalog.UnparkForGap).
const judgedSQL = `SELECT DISTINCT table_schema, table_name, coalesce(key::text, '') FROM (
	SELECT table_schema, table_name, key FROM duri.conflict WHERE at >= $1::timestamptz OR origin = $2::int2 AND origin_lsn >= $3::pg_lsn
	UNION ALL SELECT table_schema, table_name, key FROM duri.parked
	UNION ALL SELECT table_schema, table_name, key FROM duri.gap_row WHERE gap = $4::int8 AND jsonb_typeof(key) = 'object') AS x LIMIT $5::int8`

// addJudged adds the rows that were judged since a moment: what was, met a ghost perhaps, under another key than the ghost's if
// a unique value or a foreign key was in its way. g is the gap, towards the site whose changes were judged.
func (w writtenRows) addJudged(ctx context.Context, c *pgconn.PgConn, since moment, g catalog.Gap) error {
	found, err := pg.Query(ctx, c, judgedSQL, since.at.Add(-judgedBefore).String(), fmt.Sprint(g.Origin), since.seen.String(), fmt.Sprint(g.ID), fmt.Sprint(judgedMax+1))
	if err != nil {
		return fmt.Errorf("read which rows were judged: %w", err)
	}
	for _, r := range found {
		x := w.of(r[0], r[1])
		var key map[string]*string
		if r[2] == "" {
			x.all = true
		} else if err := json.Unmarshal([]byte(r[2]), &key); err != nil {
			return fmt.Errorf("read the key of a row that was judged: %w", err)
		}
		if x.keys = append(x.keys, key); len(found) > judgedMax {
			x.all = true
		}
	}
	return nil
}
