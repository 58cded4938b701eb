package apply

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// column is a column of a local table.
type column struct {
	name      string
	typ       string // with modifier, as a cast accepts it
	arrayType string // type of an array parameter that carries many values; empty: send text and cast
	always    bool   // GENERATED ALWAYS AS IDENTITY: UPDATE may not set it
	norm      norm
	eqOp      string // equality of the key index, schema-qualified
}

// table is what apply knows of a local table.
type table struct {
	schema, name string
	full         string // schema.name
	columns      []column
	key          []int // columns of the replica identity index, else of the primary key; nil without either
	deletable    bool  // it has a replica identity: PostgreSQL admits UPDATE and DELETE though it is published
	deferrable   bool  // a constraint on the key's columns is deferrable: no ON CONFLICT
}

func (t *table) String() string { return t.full }

// target joins an origin's relation to the local table of the same name.
type target struct {
	*table
	rel  *wal.Relation
	cols []int       // relation column -> table column
	key  []keyColumn // in the table's key order; at indexes the relation's columns
	// isKey tells the relation's columns that are part of the key.
	isKey []bool

	blend *blend // nil: the greater version's whole row stands

	// Constraints besides the key, and the statement that finds rows that collide on one; read when first needed.
	uniques   []unique
	colliders string
}

// TableError says why changes of a table cannot be applied here.
type TableError struct {
	Table, Reason, Hint string
}

// Error gives the sentence that is printed.
func (e *TableError) Error() string {
	return fmt.Sprintf("cannot apply to table %s: %s", e.Table, e.Reason)
}

// HintText is the advice that goes with the error.
func (e *TableError) HintText() string { return e.Hint }

// bind joins rel to t, whose rows merge as p declares. Every column that arrives must exist here; columns that exist only here keep their defaults.
func bind(t *table, rel *wal.Relation, p policy.Table) (*target, error) {
	g := &target{table: t, rel: rel, blend: newBlend(p, rel), cols: make([]int, len(rel.Columns)), isKey: make([]bool, len(rel.Columns))}
	byName := make(map[string]int, len(t.columns))
	for i, c := range t.columns {
		byName[c.name] = i
	}
	at := make([]int, len(t.columns))
	for i := range at {
		at[i] = -1
	}
	for i, c := range rel.Columns {
		j, ok := byName[c.Name]
		if !ok {
			return nil, &TableError{t.String(), fmt.Sprintf("column %q does not exist at this site", c.Name), "make the tables' definitions equal at both sites"}
		}
		g.cols[i], at[j] = j, i
	}
	for _, k := range t.key {
		c := t.columns[k]
		if at[k] < 0 {
			return nil, &TableError{t.String(), fmt.Sprintf("key column %q is not sent by the origin", c.name), "make the tables' definitions equal at both sites"}
		}
		if c.norm == normUnsupported {
			return nil, &TableError{t.String(), fmt.Sprintf("key column %q has type %s, whose equality cannot be told from its text", c.name, c.typ), "use a key of another type or a deterministic collation"}
		}
		g.key = append(g.key, keyColumn{at[k], c.norm})
		g.isKey[at[k]] = true
	}
	return g, nil
}

// tableSQL describes one table: a row per column, in order. $1 schema, $2 name.
const tableSQL = `
WITH rel AS (
	SELECT c.oid, c.relreplident FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
	WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r','p')
), ix AS (
	SELECT i.* FROM pg_catalog.pg_index i JOIN rel ON i.indrelid = rel.oid
	WHERE i.indisvalid AND (i.indisprimary OR i.indisreplident)
	ORDER BY i.indisreplident DESC LIMIT 1
), k AS (
	SELECT a.attnum, a.ord, o.oprname, opn.nspname FROM ix
	CROSS JOIN LATERAL unnest(ix.indkey::int2[], ix.indclass::oid[]) WITH ORDINALITY AS a(attnum, opclass, ord)
	JOIN pg_catalog.pg_opclass oc ON oc.oid = a.opclass
	JOIN pg_catalog.pg_amop ao ON ao.amopfamily = oc.opcfamily AND ao.amopstrategy = 3
		AND ao.amoplefttype = oc.opcintype AND ao.amoprighttype = oc.opcintype
	JOIN pg_catalog.pg_operator o ON o.oid = ao.amopopr
	JOIN pg_catalog.pg_namespace opn ON opn.oid = o.oprnamespace
	WHERE a.ord <= ix.indnkeyatts
)
SELECT att.attname,
	pg_catalog.format_type(att.atttypid, att.atttypmod),
	CASE WHEN t.typtype IN ('b','e') AND t.typelem = 0 AND t.typarray <> 0 AND t.oid NOT IN (1042, 18) AND t.typdelim = ','
		THEN pg_catalog.format_type(t.oid, -1) || '[]' ELSE '' END, -- with NULL for -1, bit would mean bit(1)
	att.attidentity = 'a',
	base.oid, base.typtype,
	coalesce(co.collisdeterministic, true),
	coalesce(k.ord, 0),
	CASE WHEN k.ord IS NULL THEN '' ELSE 'OPERATOR(' || pg_catalog.quote_ident(k.nspname) || '.' || k.oprname || ')' END,
	NOT EXISTS (SELECT FROM ix JOIN pg_catalog.pg_index j USING (indrelid)
		WHERE j.indisunique AND NOT j.indimmediate AND j.indnkeyatts = ix.indnkeyatts
		AND j.indkey::int2[] @> ix.indkey::int2[] AND ix.indkey::int2[] @> j.indkey::int2[]),
	rel.relreplident = 'f' OR EXISTS (SELECT FROM ix WHERE indimmediate AND CASE rel.relreplident WHEN 'd' THEN indisprimary WHEN 'i' THEN indisreplident END)
FROM rel JOIN pg_catalog.pg_attribute att ON att.attrelid = rel.oid AND att.attnum > 0 AND NOT att.attisdropped AND att.attgenerated = ''
JOIN pg_catalog.pg_type t ON t.oid = att.atttypid
CROSS JOIN LATERAL (
	WITH RECURSIVE d AS (
		SELECT t.oid, t.typtype::text, t.typbasetype
		UNION ALL SELECT b.oid, b.typtype::text, b.typbasetype FROM d JOIN pg_catalog.pg_type b ON b.oid = d.typbasetype
	) SELECT oid, typtype FROM d WHERE typbasetype = 0
) base
LEFT JOIN pg_catalog.pg_collation co ON co.oid = att.attcollation
LEFT JOIN k ON k.attnum = att.attnum
ORDER BY att.attnum`

// loadTable reads a local table's definition.
func loadTable(ctx context.Context, c *pgconn.PgConn, schema, name string) (*table, error) {
	rows, err := pg.Query(ctx, c, tableSQL, schema, name)
	if err != nil {
		return nil, fmt.Errorf("read definition of %s.%s: %w", schema, name, err)
	}
	t := &table{schema: schema, name: name, full: schema + "." + name}
	if len(rows) == 0 {
		return nil, &TableError{t.String(), "it does not exist at this site", "create it here with the same definition; apply then goes on by itself"}
	}
	keyAt := map[int]int{}
	for i, r := range rows {
		oid, err1 := strconv.ParseUint(r[4], 10, 32)
		ord, err2 := strconv.Atoi(r[7])
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("read definition of %s: %w", t, err)
		}
		t.columns = append(t.columns, column{
			name: r[0], typ: r[1], arrayType: r[2], always: r[3] == "t",
			norm: normOf(uint32(oid), r[5], r[6] == "t"), eqOp: r[8],
		})
		if ord > 0 {
			keyAt[ord] = i
		}
		t.deferrable, t.deletable = r[9] == "f", r[10] == "t"
	}
	for ord := 1; ord <= len(keyAt); ord++ {
		t.key = append(t.key, keyAt[ord])
	}
	return t, nil
}

// sqlBuilder writes the statements for one target. Parameters are one array per column used, then the conditions'.
type sqlBuilder struct {
	strings.Builder
	params int
}

func (b *sqlBuilder) param() string {
	b.params++
	return "$" + strconv.Itoa(b.params)
}

// unnest writes "unnest($1::t1[], ...) AS u(c0, ...)" for the given table columns, giving each the parameter's text.
func (b *sqlBuilder) unnest(t *table, cols []int, ordinality bool) {
	b.WriteString("unnest(")
	for i, c := range cols {
		if i > 0 {
			b.WriteString(", ")
		}
		typ := t.columns[c].arrayType
		if typ == "" {
			typ = "text[]"
		}
		b.WriteString(b.param() + "::" + typ)
	}
	b.WriteString(")")
	if ordinality {
		b.WriteString(" WITH ORDINALITY")
	}
	b.WriteString(" AS u(")
	for i := range cols {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString("c" + strconv.Itoa(i))
	}
	if ordinality {
		b.WriteString(", o")
	}
	b.WriteString(")")
}

// value is the i-th unnested value as the type of table column c.
func value(t *table, c, i int) string {
	u := "u.c" + strconv.Itoa(i)
	if t.columns[c].arrayType == "" {
		return u + "::" + t.columns[c].typ
	}
	return u
}

// keyMatch writes "t.k = u.cI AND ..." where the key columns are the unnested columns from first on.
func (b *sqlBuilder) keyMatch(t *table, first int) {
	for i, k := range t.key {
		if i > 0 {
			b.WriteString(" AND ")
		}
		c := t.columns[k]
		fmt.Fprintf(b, "t.%s %s %s", pg.QuoteIdent(c.name), c.eqOp, value(t, k, first+i))
	}
}

// quiet writes the condition under which a row may be written without looking at it: its last writer is the origin
// itself ($origin), or it is decoded (of an xid below $decoded) and older than everything that could be concurrent
// ($before), or unknown and thus older than the horizon (rule 5), or written by this very transaction (both read as NULL).
func (b *sqlBuilder) quiet() {
	const f = "pg_catalog.pg_xact_commit_timestamp_origin(t.xmin)"
	origin, before, decoded := b.param(), b.param(), b.param()
	fmt.Fprintf(b, ` AND ((%s).roident = %s::oid
	OR CASE WHEN pg_catalog.age(t.xmin) <= pg_catalog.age(%s::xid) THEN (%s).timestamp IS NULL ELSE coalesce((%s).timestamp < %s::timestamptz, true) END)`,
		f, origin, decoded, f, f, before)
}

// quiet are the parameters of that condition.
type quiet struct{ origin, before, decoded []byte }

// everyRow makes the condition true for every row: the row is locked and decided.
func everyRow(origin string) quiet { return quiet{[]byte(origin), []byte("infinity"), nil} }

// quietFor are those for changes of an origin (of this oid) that had seen every row with a lower commit time than before.
func (m *Mesh) quietFor(origin string, before wal.Time) quiet {
	xid, ok := m.Local.decodedBelow()
	if !ok {
		return quiet{[]byte(origin), []byte("-infinity"), nil}
	}
	return quiet{[]byte(origin), []byte(before.String()), fmt.Append(nil, xid)}
}

// updateSQL sets the columns set (table columns) of rows found by key. With an empty set the row keeps its values and
// only gets its new version. Parameters: set..., key..., those of quiet.
func updateSQL(t *table, set []int) string {
	b := &sqlBuilder{}
	fmt.Fprintf(b, "UPDATE ONLY %s AS t SET ", pg.QuoteName(t.schema, t.name))
	for i, c := range set {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(b, "%s = %s", pg.QuoteIdent(t.columns[c].name), value(t, c, i))
	}
	if len(set) == 0 {
		c := pg.QuoteIdent(t.settable().name)
		fmt.Fprintf(b, "%s = t.%s", c, c)
	}
	b.WriteString(" FROM ")
	b.unnest(t, append(append([]int{}, set...), t.key...), false)
	b.WriteString(" WHERE ")
	b.keyMatch(t, len(set))
	b.quiet()
	return b.String()
}

// settable is a column that UPDATE may set. Without any there cannot have been an update that left the key alone.
func (t *table) settable() column {
	for _, c := range t.columns {
		if !c.always {
			return c
		}
	}
	return t.columns[0]
}

// deleteSQL removes rows found by key and returns the ordinals (from 1) of those it removed. Parameters: key..., those
// of quiet.
func deleteSQL(t *table) string {
	b := &sqlBuilder{}
	fmt.Fprintf(b, "DELETE FROM ONLY %s AS t USING ", pg.QuoteName(t.schema, t.name))
	b.unnest(t, t.key, true)
	b.WriteString(" WHERE ")
	b.keyMatch(t, 0)
	b.quiet()
	b.WriteString(" RETURNING u.o")
	return b.String()
}

// insertSQL inserts rows with the given table columns; with a key, rows whose key exists are left out and show in
// the row count. Parameters: cols...
func insertSQL(t *table, cols []int) string {
	b := &sqlBuilder{}
	fmt.Fprintf(b, "INSERT INTO %s (", pg.QuoteName(t.schema, t.name))
	for i, c := range cols {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(pg.QuoteIdent(t.columns[c].name))
	}
	b.WriteString(") OVERRIDING SYSTEM VALUE SELECT ")
	for i, c := range cols {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(value(t, c, i))
	}
	b.WriteString(" FROM ")
	b.unnest(t, cols, false)
	if len(t.key) > 0 && !t.deferrable {
		b.WriteString(" ON CONFLICT (")
		for i, k := range t.key {
			if i > 0 {
				b.WriteString(", ")
			}
			b.WriteString(pg.QuoteIdent(t.columns[k].name))
		}
		b.WriteString(") DO NOTHING")
	}
	return b.String()
}

// lockSQL locks the rows of given keys and reads them: ordinal (from 1), xmin, commit time in microseconds of wal.Time,
// replication origin, then every column's text. Parameters: key...
func lockSQL(t *table) string {
	b := &sqlBuilder{}
	// In the select list, not in FROM: when a row turns out to have been updated by the session that this statement had
	// to wait for, PostgreSQL computes the list again for the new row, but keeps a function's result in FROM.
	const f = "pg_catalog.pg_xact_commit_timestamp_origin(t.xmin)"
	fmt.Fprintf(b, "SELECT u.o, t.xmin, (extract(epoch from (%s).timestamp) * 1000000)::int8 - 946684800000000, (%s).roident", f, f)
	for _, c := range t.columns {
		fmt.Fprintf(b, ", t.%s", pg.QuoteIdent(c.name)) // not ::text, which is no output function for bool, inet, bpchar
	}
	b.WriteString(" FROM ")
	b.unnest(t, t.key, true)
	fmt.Fprintf(b, " JOIN ONLY %s AS t ON ", pg.QuoteName(t.schema, t.name))
	b.keyMatch(t, 0)
	b.WriteString(forUpdate)
	return b.String()
}

// forUpdate ends lockSQL.
const forUpdate = " FOR UPDATE OF t"

// wholeRowSQL matches one row of a keyless table by all columns sent (REPLICA IDENTITY FULL). As text, because json,
// xml, point and others have no equality. tail is what to do with it: "DELETE FROM ..." or "UPDATE ... SET ...".
// Parameters: for an update the new values first, then the old ones; NULL is passed as such.
func wholeRowSQL(t *table, set, match []int) string {
	b := &sqlBuilder{}
	name := pg.QuoteName(t.schema, t.name)
	if len(set) > 0 {
		fmt.Fprintf(b, "UPDATE ONLY %s AS t SET ", name)
		for i, c := range set {
			if i > 0 {
				b.WriteString(", ")
			}
			fmt.Fprintf(b, "%s = %s::text::%s", pg.QuoteIdent(t.columns[c].name), b.param(), t.columns[c].typ)
		}
	} else {
		fmt.Fprintf(b, "DELETE FROM ONLY %s AS t", name)
	}
	fmt.Fprintf(b, " WHERE t.ctid = (SELECT s.ctid FROM ONLY %s AS s WHERE ", name)
	for i, c := range match {
		if i > 0 {
			b.WriteString(" AND ")
		}
		fmt.Fprintf(b, "s.%s::text IS NOT DISTINCT FROM %s::text::%s::text", pg.QuoteIdent(t.columns[c].name), b.param(), t.columns[c].typ)
	}
	b.WriteString(" LIMIT 1 FOR UPDATE)")
	return b.String()
}
