package fkey

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

// Orphan is a row of a constraint's child that refers to a parent that is not there.
type Orphan struct {
	Key []string  // values of Constraint.Key, as PostgreSQL prints them
	Ref []*string // values of Constraint.Columns; nil is NULL, which only breaks MATCH FULL
}

// query builds a statement with text parameters, of which nil is NULL.
type query struct {
	strings.Builder
	params [][]byte
}

func (q *query) addf(format string, args ...any) { fmt.Fprintf(q, format, args...) }

// param adds a value and gives its place.
func (q *query) param(v string) string {
	q.params = append(q.params, []byte(v))
	return "$" + strconv.Itoa(len(q.params))
}

// rows runs the statement; NULL is a nil value.
func (q *query) rows(ctx context.Context, conn *pgconn.PgConn) ([][][]byte, error) {
	res := conn.ExecParams(ctx, q.String(), q.params, nil, nil, nil).Read()
	return res.Rows, res.Err
}

// only is ONLY for tables whose rows are all in themselves: as PostgreSQL's own check has it, children by inheritance do
// not count, partitions do.
func only(partitioned bool) string {
	if partitioned {
		return ""
	}
	return "ONLY "
}

func (c *Constraint) childFrom() string { return only(c.ChildPartitioned) + c.Child.SQL() + " AS c" }

func (c *Constraint) parentFrom() string { return only(c.ParentPartitioned) + c.Parent.SQL() + " AS p" }

// selected lists the child's key and referencing columns.
func (c *Constraint) selected() string {
	var out []string
	for _, k := range c.Key {
		out = append(out, "c."+pg.QuoteIdent(k.Name))
	}
	for _, col := range c.Columns {
		out = append(out, "c."+pg.QuoteIdent(col.Name))
	}
	return strings.Join(out, ", ")
}

// orphaned is the condition that a row of c is an orphan. With MATCH SIMPLE a row with any null refers to nothing; with
// MATCH FULL one with some nulls is as wrong as one without a parent, and no parent equals it. A parent that is parked
// (replication.md rule 11) exists and comes back: its children are no orphans.
func (c *Constraint) orphaned() string {
	refers := make([]string, len(c.Columns))
	equal, parked := make([]string, len(c.Columns)), make([]string, len(c.Columns))
	for i, col := range c.Columns {
		child := "c." + pg.QuoteIdent(col.Name)
		refers[i] = child + " IS NOT NULL"
		if col.Collate != "" {
			child += " COLLATE " + col.Collate
		}
		equal[i] = "p." + pg.QuoteIdent(col.Referenced) + " " + col.Equal + " " + child
		// Rows of other tables must not be read as this one's, whatever is evaluated first.
		parked[i] = "CASE WHEN " + c.parkedHere() + " THEN (k.row ->> " + pg.QuoteLiteral(col.Referenced) + ")::" + col.ReferencedType + " END " + col.Equal + " " + child
	}
	word := " AND "
	if c.Full && !c.Keyless {
		word = " OR "
	}
	return "(" + strings.Join(refers, word) + ") AND NOT EXISTS (SELECT FROM " + c.parentFrom() + " WHERE " + strings.Join(equal, " AND ") + ")" +
		" AND NOT EXISTS (SELECT FROM duri.parked AS k WHERE " + strings.Join(parked, " AND ") + ")"
}

// parkedHere is the condition that a row of duri.parked is one of the parent or of its partitions.
func (c *Constraint) parkedHere() string {
	names := make([]string, len(c.ParentStores))
	for i, n := range c.ParentStores {
		names[i] = "(" + pg.QuoteLiteral(n.Schema) + ", " + pg.QuoteLiteral(n.Table) + ")"
	}
	return "(k.table_schema, k.table_name) IN (" + strings.Join(names, ", ") + ")"
}

// distinct is for children without a key, whose rows with equal references are one orphan.
func (c *Constraint) distinct() string {
	if c.Keyless {
		return "DISTINCT "
	}
	return ""
}

// Orphans lists orphans, at most limit, by one pass over the child. On a large table this takes long; Checker reads in
// pages instead.
func Orphans(ctx context.Context, conn *pgconn.PgConn, c *Constraint, limit int) ([]Orphan, error) {
	q := &query{}
	q.addf("SELECT %s%s FROM %s WHERE %s LIMIT %d", c.distinct(), c.selected(), c.childFrom(), c.orphaned(), limit)
	return c.read(ctx, conn, q)
}

// OrphansAmong lists those of the given rows, by their keys (values of c.Key), that are orphans now. It uses the index of
// the child's key and that of the parent's.
func OrphansAmong(ctx context.Context, conn *pgconn.PgConn, c *Constraint, keys [][]string) ([]Orphan, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	types := make([]string, len(c.Key))
	match := make([]string, len(c.Key))
	for i, k := range c.Key {
		types[i] = k.Type
		match[i] = fmt.Sprintf("c.%s = u.c%d::%s", pg.QuoteIdent(k.Name), i, k.Type)
	}
	q := &query{}
	q.addf("SELECT %s%s FROM %s JOIN %s ON %s WHERE %s", c.distinct(), c.selected(), q.unnest(keys, len(types)), c.childFrom(),
		strings.Join(match, " AND "), c.orphaned())
	return c.read(ctx, conn, q)
}

// OrphansUnder lists the orphans that refer to the given parents (values of the referencing columns, in the order of
// c.Columns), at most limit. It is cheap where an index begins with the referencing columns, and a pass over the child
// otherwise.
func OrphansUnder(ctx context.Context, conn *pgconn.PgConn, c *Constraint, parents [][]string, limit int) ([]Orphan, error) {
	if len(parents) == 0 {
		return nil, nil
	}
	match := make([]string, len(c.Columns))
	for i, col := range c.Columns {
		match[i] = fmt.Sprintf("c.%s = u.c%d::%s", pg.QuoteIdent(col.Name), i, col.Type)
	}
	q := &query{}
	q.addf("SELECT %s%s FROM %s JOIN %s ON %s WHERE %s LIMIT %d", c.distinct(), c.selected(), q.unnest(parents, len(match)), c.childFrom(),
		strings.Join(match, " AND "), c.orphaned(), limit)
	return c.read(ctx, conn, q)
}

// unnest writes the values, row by row, as a table u(c0, c1, ...) of texts.
func (q *query) unnest(rows [][]string, width int) string {
	places, names := make([]string, width), make([]string, width)
	for i := range width {
		column := make([]string, len(rows))
		for j, r := range rows {
			column[j] = r[i]
		}
		places[i] = q.param(textArray(column)) + "::text[]"
		names[i] = "c" + strconv.Itoa(i)
	}
	return "unnest(" + strings.Join(places, ", ") + ") AS u(" + strings.Join(names, ", ") + ")"
}

// textArray is the text form of a text[].
func textArray(values []string) string {
	var b strings.Builder
	b.WriteByte('{')
	for i, v := range values {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteByte('"')
		b.WriteString(arrayEscapes.Replace(v))
		b.WriteByte('"')
	}
	b.WriteByte('}')
	return b.String()
}

var arrayEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

// read runs a query that selects c.selected().
func (c *Constraint) read(ctx context.Context, conn *pgconn.PgConn, q *query) ([]Orphan, error) {
	rows, err := q.rows(ctx, conn)
	if err != nil {
		return nil, fmt.Errorf("look for orphans by %s: %w", c, err)
	}
	var out []Orphan
	for _, r := range rows {
		o := Orphan{Key: make([]string, len(c.Key)), Ref: make([]*string, len(c.Columns))}
		for i := range c.Key {
			o.Key[i] = string(r[i])
		}
		for i := range c.Columns {
			if v := r[len(c.Key)+i]; v != nil {
				s := string(v)
				o.Ref[i] = &s
			}
		}
		out = append(out, o)
	}
	return out, nil
}

// page lists the orphans among the next rows of the child behind a key, in the key's order; nil begins at the start. end
// is the last key looked at, nil when there are no more. A child that cannot be read by its key is one page.
func page(ctx context.Context, conn *pgconn.PgConn, c *Constraint, after []string, rows int) (found []Orphan, end []string, err error) {
	if !c.Pageable {
		found, err = Orphans(ctx, conn, c, rows)
		return found, nil, err
	}
	columns := make([]string, len(c.Key))
	for i, k := range c.Key {
		columns[i] = "c." + pg.QuoteIdent(k.Name)
	}
	list := strings.Join(columns, ", ")
	last := &query{}
	last.addf("SELECT %s FROM %s%s ORDER BY %s OFFSET %d LIMIT 1", list, c.childFrom(), c.between(last, list, after, nil), list, rows-1)
	bound, err := last.rows(ctx, conn)
	if err != nil {
		return nil, nil, fmt.Errorf("look for orphans by %s: %w", c, err)
	}
	if len(bound) > 0 {
		for _, v := range bound[0] {
			end = append(end, string(v))
		}
	}
	q := &query{}
	q.addf("SELECT %s FROM %s%s", c.selected(), c.childFrom(), c.between(q, list, after, end))
	if after == nil && end == nil {
		q.addf(" WHERE ")
	} else {
		q.addf(" AND ")
	}
	q.addf("%s", c.orphaned())
	found, err = c.read(ctx, conn, q)
	return found, end, err
}

// between is the condition that the key lies behind after and not behind end; either may be nil.
func (c *Constraint) between(q *query, list string, after, end []string) string {
	var parts []string
	add := func(op string, key []string) {
		if key == nil {
			return
		}
		values := make([]string, len(key))
		for i, v := range key {
			values[i] = q.param(v) + "::" + c.Key[i].Type
		}
		parts = append(parts, "("+list+") "+op+" ("+strings.Join(values, ", ")+")")
	}
	add(">", after)
	add("<=", end)
	if len(parts) == 0 {
		return ""
	}
	return " WHERE " + strings.Join(parts, " AND ")
}

// keyJSON is an orphan's key as duri.orphan keeps it: column to text.
func (c *Constraint) keyJSON(o Orphan) string {
	m := map[string]string{}
	for i, k := range c.Key {
		m[k.Name] = o.Key[i]
	}
	b, _ := json.Marshal(m) // maps of strings always marshal
	return string(b)
}

// parentJSON is what an orphan refers to: the parent's column to text or null.
func (c *Constraint) parentJSON(o Orphan) string {
	m := map[string]*string{}
	for i, col := range c.Columns {
		m[col.Referenced] = o.Ref[i]
	}
	b, _ := json.Marshal(m)
	return string(b)
}

// keyOf reads keyJSON back; nil when the child's key has other columns now.
func (c *Constraint) keyOf(doc string) []string {
	var m map[string]string
	if json.Unmarshal([]byte(doc), &m) != nil || len(m) != len(c.Key) {
		return nil
	}
	out := make([]string, len(c.Key))
	for i, k := range c.Key {
		v, ok := m[k.Name]
		if !ok {
			return nil
		}
		out[i] = v
	}
	return out
}
