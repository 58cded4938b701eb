package verify

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/duri-io/duri/internal/pg"
)

// tablesSQL describes every published user table, one JSON document a row. $1: publication. It relies on search_path
// being pg_catalog, so that types outside are printed with their schema.
//
// Columns follow the publication's column list where there is one; without one, generated columns are compared as well,
// although they are not sent: each site computes them, and the results should be equal.
//
// "order" of a key column is what its sort order depends on beside its type, or null where it is not certain that
// equal names mean equal order. Collations that compare bytes are all called "bytes".
const tablesSQL = `
WITH db AS (
	SELECT datlocprovider::text AS provider, datcollate::text AS collate, pg_encoding_to_char(encoding) AS encoding,
		coalesce(to_jsonb(d)->>'datlocale', to_jsonb(d)->>'daticulocale') AS locale,
		to_jsonb(d)->>'daticurules' AS rules, pg_database_collation_actual_version(oid) AS version
	FROM pg_database d WHERE datname = current_database()
), co AS (
	SELECT c.oid, quote_ident(n.nspname) || '.' || quote_ident(c.collname) AS name,
		CASE WHEN x.provider = 'c' AND x.locale IN ('C', 'POSIX') OR x.provider = 'b' THEN 'bytes ' || db.encoding
		ELSE concat_ws(' ', x.provider, x.locale, x.version, x.rules, db.encoding) END AS id
	FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace CROSS JOIN db
	CROSS JOIN LATERAL (
		SELECT db.provider, CASE WHEN db.provider = 'c' THEN db.collate ELSE db.locale END AS locale, db.version, db.rules
		WHERE c.collprovider = 'd'
		UNION ALL
		SELECT c.collprovider::text, CASE WHEN c.collprovider = 'c' THEN c.collcollate::text
				ELSE coalesce(to_jsonb(c)->>'colllocale', to_jsonb(c)->>'colliculocale') END,
			pg_collation_actual_version(c.oid), to_jsonb(c)->>'collicurules'
		WHERE c.collprovider <> 'd'
	) x
), pub AS (
	SELECT DISTINCT ON (c.oid) n.nspname, c.oid, c.relname, c.relkind, c.reltuples, p.attnames, p.rowfilter,
		ARRAY(SELECT l.relid::oid FROM pg_partition_tree(c.oid) l WHERE l.isleaf
			UNION SELECT c.oid WHERE c.relkind = 'r') AS leaves,
		EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication q ON q.oid = r.prpubid
			WHERE q.pubname = p.pubname AND r.prrelid = c.oid AND r.prattrs IS NOT NULL) AS listed
	FROM pg_publication_tables p JOIN pg_namespace n ON n.nspname = p.schemaname
	JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
	WHERE p.pubname = $1 AND n.nspname <> 'duri' AND c.relkind IN ('r', 'p')
	ORDER BY c.oid
)
SELECT jsonb_build_object(
	'schema', pub.nspname, 'name', pub.relname, 'partitioned', pub.relkind = 'p', 'filter', coalesce(pub.rowfilter, ''),
	'hash_id', (SELECT encoding FROM db) || ' ' || hashtextextended('duri', 1) || ' ' || hash_record_extended(ROW(
		1::int2, 1::int4, 1::int8, true, 'duri'::text COLLATE "C", 'duri'::varchar COLLATE "C", 'duri'::bpchar COLLATE "C", '\x01'::bytea,
		'00000000-0000-0000-0000-000000000001'::uuid, '2026-01-01'::date, '2026-01-01'::timestamp, '2026-01-01'::timestamptz), 1),
	'computed', (SELECT jsonb_agg(a.attname) FROM pg_attribute a WHERE a.attrelid = pub.oid AND a.attnum > 0 AND a.attgenerated <> ''),
	'bytes', size.bytes, 'rows', size.rows,
	'leaves', (SELECT jsonb_agg(quote_ident(n.nspname) || '.' || quote_ident(c.relname) ORDER BY n.nspname, c.relname)
		FROM unnest(pub.leaves) l JOIN pg_class c ON c.oid = l JOIN pg_namespace n ON n.oid = c.relnamespace),
	'columns', (SELECT jsonb_agg(jsonb_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod)))
		FROM pg_attribute a WHERE a.attrelid = pub.oid AND a.attnum > 0 AND NOT a.attisdropped
			AND (a.attname = ANY (pub.attnames) OR a.attgenerated <> '' AND NOT pub.listed)),
	'key', key.columns)
FROM pub
CROSS JOIN LATERAL (
	SELECT sum(pg_table_size(c.oid))::int8 AS bytes,
		-- A table that was never analyzed has -1: assume small rows, which only makes more ranges of it.
		sum(CASE WHEN c.reltuples >= 0 THEN c.reltuples ELSE pg_relation_size(c.oid) / 40 END)::int8 AS rows
	FROM unnest(pub.leaves) l JOIN pg_class c ON c.oid = l
) size
LEFT JOIN LATERAL (
	SELECT i.* FROM pg_index i WHERE i.indrelid = pub.oid AND i.indisvalid AND (i.indisprimary OR i.indisreplident)
	ORDER BY i.indisprimary DESC LIMIT 1
) ix ON true
CROSS JOIN LATERAL (
	SELECT jsonb_agg(jsonb_build_object(
			'name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
			'equal', 'OPERATOR(' || quote_ident(opn.nspname) || '.' || o.oprname || ')',
			'op_schema', CASE WHEN std.n = 2 THEN opn.nspname ELSE '' END,
			'collate', coalesce(co.name, ''),
			'order', CASE
				WHEN NOT opc.opcdefault OR base.typtype IN ('c', 'p') THEN NULL
				WHEN base.typtype IN ('r', 'm') AND base.oid >= 16384 THEN NULL
				WHEN base.typelem >= 16384 THEN NULL
				WHEN base.typtype = 'e' THEN (SELECT string_agg(quote_ident(enumlabel), ',' ORDER BY enumsortorder)
					FROM pg_enum WHERE enumtypid = base.oid)
				ELSE coalesce(co.id, '') END
		) ORDER BY k.ord) AS columns
	FROM unnest(ix.indkey::int2[], ix.indclass::oid[]) WITH ORDINALITY AS k(attnum, opclass, ord)
	JOIN pg_attribute a ON a.attrelid = pub.oid AND a.attnum = k.attnum
	JOIN pg_opclass opc ON opc.oid = k.opclass
	JOIN pg_amop ao ON ao.amopfamily = opc.opcfamily AND ao.amopstrategy = 3
		AND ao.amoplefttype = opc.opcintype AND ao.amoprighttype = opc.opcintype
	JOIN pg_operator o ON o.oid = ao.amopopr
	JOIN pg_namespace opn ON opn.oid = o.oprnamespace
	CROSS JOIN LATERAL (
		SELECT count(*) AS n FROM pg_amop s JOIN pg_operator so ON so.oid = s.amopopr
		WHERE s.amopfamily = opc.opcfamily AND s.amoplefttype = opc.opcintype AND s.amoprighttype = opc.opcintype
			AND so.oprnamespace = o.oprnamespace AND (s.amopstrategy, so.oprname) IN ((2, '<='), (5, '>'))
	) std
	CROSS JOIN LATERAL (
		WITH RECURSIVE d AS (
			SELECT t.oid, t.typtype::text, t.typbasetype, t.typelem FROM pg_type t WHERE t.oid = a.atttypid
			UNION ALL
			SELECT b.oid, b.typtype::text, b.typbasetype, b.typelem FROM d JOIN pg_type b ON b.oid = d.typbasetype
		) SELECT oid, typtype, typelem FROM d WHERE typbasetype = 0
	) base
	LEFT JOIN co ON co.oid = a.attcollation
	WHERE k.ord <= ix.indnkeyatts
) key
ORDER BY pub.nspname COLLATE "C", pub.relname COLLATE "C"`

// keyColumn is a key column as tablesSQL describes it.
type keyColumn struct {
	Name     string  `json:"name"`
	Type     string  `json:"type"`
	Equal    string  `json:"equal"`     // the equality operator, as OPERATOR(schema.name)
	OpSchema string  `json:"op_schema"` // where the operators > and <= are; empty: they are called otherwise
	Collate  string  `json:"collate"`   // quoted name, or empty
	Order    *string `json:"order"`
}

// definition is a table as tablesSQL describes it.
type definition struct {
	Schema      string      `json:"schema"`
	Name        string      `json:"name"`
	Partitioned bool        `json:"partitioned"`
	Filter      string      `json:"filter"` // the publication's row filter as SQL
	HashID      string      `json:"hash_id"`
	Bytes       int64       `json:"bytes"`
	Rows        int64       `json:"rows"`
	Leaves      []string    `json:"leaves"` // quoted names of the tables that hold the rows
	Columns     []Column    `json:"columns"`
	Computed    []string    `json:"computed"` // generated columns, which nobody writes
	Key         []keyColumn `json:"key"`
}

// order gives Table.Order. Operators of several schemas cannot stand in one row comparison.
func (d *definition) order() string {
	var parts []string
	for _, k := range d.Key {
		if k.Order == nil || k.OpSchema == "" || k.OpSchema != d.Key[0].OpSchema {
			return ""
		}
		parts = append(parts, strconv.Quote(k.Type)+" "+strconv.Quote(*k.Order))
	}
	return strings.Join(parts, ", ")
}

// query is a statement with its text parameters. A nil parameter is NULL.
type query struct {
	strings.Builder
	params [][]byte
}

func (q *query) printf(format string, args ...any) { fmt.Fprintf(q, format, args...) }

// param adds a parameter and gives its placeholder.
func (q *query) param(v string) string {
	q.params = append(q.params, []byte(v))
	return "$" + strconv.Itoa(len(q.params))
}

// view is what one call compares: a definition narrowed to the columns and key that were asked for.
type view struct {
	*definition
	spent   effort   // of the call's statements
	asked   []Column // as the caller names them
	columns []string // quoted, with alias
	key     []keyColumn
}

// from names the table. ONLY keeps inheritance children out, which are published by themselves; a partitioned table
// has no rows of its own.
func (v *view) from() string {
	name := pg.QuoteName(v.Schema, v.Name) + " AS t"
	if v.Partitioned {
		return name
	}
	return "ONLY " + name
}

// where begins the condition with the publication's row filter.
func (v *view) where() string {
	if v.Filter == "" {
		return "true"
	}
	return "(" + v.Filter + ")"
}

// keyList is the key's columns, comma separated.
func (v *view) keyList() string {
	list := make([]string, len(v.key))
	for i, k := range v.key {
		list[i] = "t." + pg.QuoteIdent(k.Name)
	}
	return strings.Join(list, ", ")
}

// hashSQL is an expression of type int8: the hash of the columns' text. ROW(...)::text is unambiguous: it quotes, and
// tells NULL from the empty text; and it takes types without equality operator.
//
// Measured with 6 columns on one core: counting the rows' text 1.25 million rows/s, hashtextextended 1.15, md5 0.59,
// sha256 0.61. So the hash is 64 bits of hashtextextended: of a row that differs, the hash is equal with a probability
// of 2^-64 = 5e-20, in one run only as the seed changes; even a table with a billion wrong rows is found wrong in all
// of them but with 5e-11. The hashes go in key order into SHA-256 and are not added up or XORed, where differences could
// cancel. (Neither hash stops somebody who makes collisions on purpose; whoever can write the database need not.)
//
// MD5 serves where the servers' own functions do not agree: other encodings, byte orders, or a future major.
func hashSQL(by Digest, columns string) (string, error) {
	text := "ROW(" + columns + ")::text"
	switch by.Algorithm {
	case AlgorithmFast, AlgorithmRecord:
		return fmt.Sprintf("hashtextextended(%s, %d)", text, by.Seed), nil
	case AlgorithmMD5:
		return fmt.Sprintf("('x' || left(md5(convert_to(%s || '%d', 'UTF8')), 16))::bit(64)::int8", text, by.Seed), nil
	}
	return "", fmt.Errorf("hash algorithm %q is not known", by.Algorithm)
}

// recordSQL is the cheap hash of AlgorithmRecord: PostgreSQL's hash of the record, without its text. It is 2.4 times as
// fast as hashSQL, as most of that is printing (docs/performance.md).
//
// Two values of a type in plainType have equal hashes exactly if they have equal texts (but for chance). All others are
// hashed by their text: 1.0 and 1.00 are equal numerics with one hash, an enum's hash is that of its OID, which each
// server chooses, and json has no hash at all. Texts are hashed by their bytes, whatever their collation calls equal.
func (v *view) recordSQL(by Digest) string {
	list := make([]string, len(v.columns))
	for i, c := range v.asked {
		switch plainType(c.Type) {
		case plainText:
			list[i] = v.columns[i] + ` COLLATE "C"`
		case plainValue:
			list[i] = v.columns[i]
		case plainCast:
			list[i] = v.columns[i] + `::text COLLATE "C"`
		default:
			list[i] = "ROW(" + v.columns[i] + `)::text COLLATE "C"`
		}
	}
	return fmt.Sprintf("hash_record_extended(ROW(%s), %d)", strings.Join(list, ", "), by.Seed)
}

// plain says how AlgorithmRecord hashes a column.
type plain byte

const (
	asText     plain = iota // by its text in a record: a cast to text is no output function for all types
	plainCast               // by its text, which a cast gives as well, a little faster
	plainValue              // by the type's own hash function
	plainText               // by its bytes
)

// plainType classifies a type by the name that format_type gives. Both sites are told the same name.
func plainType(name string) plain {
	base, _, _ := strings.Cut(name, "(") // without modifier
	switch strings.TrimSpace(base) {
	case "smallint", "integer", "bigint", "boolean", "uuid", "date", "bytea",
		"timestamp without time zone", "timestamp with time zone":
		return plainValue
	case "text", "character varying":
		return plainText
	case "numeric", "double precision", "real", "jsonb":
		return plainCast
	case "timestamp": // with a modifier: timestamp(3) with time zone
		return plainValue
	}
	return asText
}

// rowHash hashes all columns.
func (v *view) rowHash(by Digest) (string, error) {
	if by.Algorithm == AlgorithmRecord && len(v.columns) > 0 {
		return v.recordSQL(by), nil
	}
	return hashSQL(by, strings.Join(v.columns, ", "))
}

// keyHash hashes the key, or the row where there is none.
func (v *view) keyHash(by Digest) (string, error) {
	if len(v.key) == 0 {
		return v.rowHash(by)
	}
	return hashSQL(by, v.keyList())
}

// compare writes a row comparison of the key with a key value, by the key's own operators and collations.
func (v *view) compare(q *query, op string, key Key) {
	values := make([]string, len(v.key))
	for i, k := range v.key {
		values[i] = k.cast(q.param(key[i]))
	}
	q.printf(" AND (%s) OPERATOR(%s.%s) (%s)", v.keyList(), pg.QuoteIdent(v.key[0].OpSchema), op, strings.Join(values, ", "))
}

// cast gives an expression the column's type and collation.
func (k keyColumn) cast(expr string) string {
	expr += "::" + k.Type
	if k.Collate != "" {
		// Explicit, as a domain's collation would conflict with the column's.
		expr = "(" + expr + " COLLATE " + k.Collate + ")"
	}
	return expr
}

// within writes the conditions of After and UpTo.
func (v *view) within(q *query, r Range) {
	if r.After != nil {
		v.compare(q, ">", r.After)
	}
	if r.UpTo != nil {
		v.compare(q, "<=", r.UpTo)
	}
}

// boundSQL finds the key of the rows-th row of r.
func (v *view) boundSQL(r Range, rows int) *query {
	q := &query{}
	q.printf("SELECT %s FROM %s WHERE %s", v.keyList(), v.from(), v.where())
	v.within(q, r)
	q.printf(" ORDER BY %s OFFSET %d LIMIT 1", v.keyList(), rows-1)
	return q
}

// hashRangeSQL gives count and digest of at most limit+1 rows in key order. The rows come ordered from the subquery, by
// the index, which is cheaper than ORDER BY inside the aggregate; nothing reorders them on the way to it, as parallel
// plans are off in these sessions.
func (v *view) hashRangeSQL(r Range, limit int) (*query, error) {
	h, err := v.rowHash(r.By)
	if err != nil {
		return nil, err
	}
	q := &query{}
	if r.By.Algorithm == AlgorithmRecord {
		// Any order gives this sum. A row's hash includes its key and the seed of the pass, so that two differences cancel
		// by chance only, 2^-64, and not again in the next pass.
		q.printf("SELECT count(*), coalesce(sum(h), 0)::text FROM (SELECT %s AS h FROM %s WHERE %s", h, v.from(), v.where())
	} else {
		q.printf("SELECT count(*), left(encode(sha256(coalesce(string_agg(h, ''), '')), 'hex'), 32)"+
			" FROM (SELECT int8send(%s) AS h FROM %s WHERE %s", h, v.from(), v.where())
	}
	v.within(q, r)
	q.printf(" ORDER BY %s LIMIT %d) s", v.keyList(), limit+1)
	return q, nil
}

// selected is what a query of rows gives: with a key its columns; the hash in hexadecimal; with a key the stamp; then the
// images.
func (v *view) selected(r Range) (string, error) {
	h, err := v.rowHash(r.By)
	if err != nil {
		return "", err
	}
	list := "lpad(to_hex(" + h + "), 16, '0')"
	if len(v.key) > 0 {
		list = v.keyList() + ", " + list + ", t.xmin"
	}
	if r.ImageBytes != 0 {
		list = strings.Join(append([]string{list}, v.columns...), ", ")
	}
	return list, nil
}

// rowsSQL gives the rows of a range in key order, or those of given keys.
func (v *view) rowsSQL(r Range, limit int) (*query, error) {
	list, err := v.selected(r)
	if err != nil {
		return nil, err
	}
	q := &query{}
	q.printf("SELECT %s FROM %s WHERE %s", list, v.from(), v.where())
	if r.Keys == nil {
		v.within(q, r)
		q.printf(" ORDER BY %s", v.keyList())
	} else {
		v.among(q, r.Keys)
	}
	q.printf(" LIMIT %d", limit)
	return q, nil
}

// among writes the condition that the key is one of keys.
func (v *view) among(q *query, keys []Key) {
	arrays, aliases, equal := make([]string, len(v.key)), make([]string, len(v.key)), make([]string, len(v.key))
	for i, k := range v.key {
		values := make([]string, len(keys))
		for j, key := range keys {
			values[j] = key[i]
		}
		arrays[i] = q.param(arrayLiteral(values)) + "::text[]"
		aliases[i] = "c" + strconv.Itoa(i)
		equal[i] = fmt.Sprintf("t.%s %s %s", pg.QuoteIdent(k.Name), k.Equal, k.cast("u."+aliases[i]))
	}
	q.printf(" AND EXISTS (SELECT FROM unnest(%s) AS u(%s) WHERE %s)",
		strings.Join(arrays, ", "), strings.Join(aliases, ", "), strings.Join(equal, " AND "))
}

// arrayLiteral writes a text[] (PostgreSQL manual, "Array Input and Output Syntax").
func arrayLiteral(values []string) string {
	quoted := make([]string, len(values))
	for i, v := range values {
		quoted[i] = arrayElement(v)
	}
	return "{" + strings.Join(quoted, ",") + "}"
}

// arrayElement writes an element of an array that is not NULL.
func arrayElement(v string) string { return `"` + inArray.Replace(v) + `"` }

var inArray = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

// intArray writes an int8[].
func intArray[T int | int64](values []T) string {
	text := make([]string, len(values))
	for i, v := range values {
		text[i] = strconv.FormatInt(int64(v), 10)
	}
	return "{" + strings.Join(text, ",") + "}"
}

// chunk is a piece of one table's heap: blocks from (inclusive) to (exclusive). The last one has no end, as the table
// may have grown.
type chunk struct {
	leaf     string // quoted name
	from, to int64
	last     bool
}

// chunkSource writes the rows of a chunk that are in parts as the relation s: kh, rh, then keys k0... and images i0...
// when they are wanted. A TID range scan reads just these blocks. OFFSET 0 keeps the planner from writing the hash
// expressions into every place where their names stand.
func (v *view) chunkSource(q *query, r Range, c chunk, withRows bool) error {
	rh, err := v.rowHash(r.By)
	if err != nil {
		return err
	}
	list := []string{rh + " AS rh"}
	if len(v.key) > 0 {
		kh, err := v.keyHash(r.By)
		if err != nil {
			return err
		}
		list = append(list, kh+" AS kh", "t.xmin AS stamp")
	}
	if withRows {
		for i, k := range v.key {
			list = append(list, fmt.Sprintf("t.%s AS k%d", pg.QuoteIdent(k.Name), i))
		}
		for i, column := range v.images(r) {
			list = append(list, fmt.Sprintf("%s AS i%d", column, i))
		}
	}
	q.printf(" FROM (SELECT %s FROM ONLY %s AS t WHERE %s AND t.ctid >= '(%d,0)'", strings.Join(list, ", "), c.leaf, v.where(), c.from)
	if !c.last {
		q.printf(" AND t.ctid < '(%d,0)'", c.to)
	}
	q.printf(" OFFSET 0) s WHERE ")
	v.chosen(q, r)
	return nil
}

// images is the columns whose values r wants.
func (v *view) images(r Range) []string {
	if r.ImageBytes == 0 {
		return nil
	}
	return v.columns
}

// partBy is the hash that decides about a row's part.
func (v *view) partBy() string {
	if len(v.key) > 0 {
		return "kh"
	}
	return "rh"
}

// chosen writes the condition of Parts or Hashes.
func (v *view) chosen(q *query, r Range) {
	switch {
	case r.Hashes != nil:
		q.printf("rh = ANY (%s::int8[])", q.param(intArray(hashInts(r.Hashes))))
	case r.Parts != nil && r.Parts.Bits > 0:
		q.printf("((%s >> %d) & %d) = ANY (%s::int8[])", v.partBy(), 64-r.Parts.Bits, 1<<r.Parts.Bits-1,
			q.param(intArray(r.Parts.Index)))
	default:
		q.WriteString("true")
	}
}

// hashInts reads hashes as rowsSQL writes them. What is no hash matches no row.
func hashInts(hashes []string) []int64 {
	var out []int64
	for _, h := range hashes {
		if n, err := strconv.ParseUint(h, 16, 64); err == nil {
			out = append(out, int64(n))
		}
	}
	return out
}

// chunkHashSQL gives one binary value: 16 bytes a row, the hashes of key and row.
func (v *view) chunkHashSQL(r Range, c chunk) (*query, error) {
	q := &query{}
	q.printf("SELECT coalesce(string_agg(int8send(%s) || int8send(rh), ''), '')", v.partBy())
	return q, v.chunkSource(q, r, c, false)
}

// chunkRowsSQL gives the rows of a chunk: key, hash, images, as rowsSQL does, in no order. Without a key it gives one of
// each kind of equal rows, whose number it does not tell.
func (v *view) chunkRowsSQL(r Range, c chunk, limit int) (*query, error) {
	var list []string
	for i := range v.key {
		list = append(list, fmt.Sprintf("k%d", i))
	}
	list = append(list, "lpad(to_hex(rh), 16, '0')")
	if len(v.key) > 0 {
		list = append(list, "stamp")
	}
	for i := range v.images(r) {
		list = append(list, fmt.Sprintf("i%d", i))
	}
	q := &query{}
	q.WriteString("SELECT ")
	if len(v.key) == 0 {
		q.WriteString("DISTINCT ON (rh) ")
	}
	q.WriteString(strings.Join(list, ", "))
	if err := v.chunkSource(q, r, c, true); err != nil {
		return nil, err
	}
	q.printf(" LIMIT %d", limit)
	return q, nil
}

// leafSizeSQL gives a table's blocks, and its bytes with TOAST. $1: its quoted name.
const leafSizeSQL = `
SELECT pg_relation_size(c) / current_setting('block_size')::int8, pg_table_size(c), current_setting('block_size')
FROM (SELECT $1::regclass) AS r(c)`

// publicationSQL gives a row if the publication $1 exists.
const publicationSQL = "SELECT true FROM pg_publication WHERE pubname = $1"

// chunksOf cuts a table into chunks of about chunkBytes.
func chunksOf(leaf string, blocks, bytes, blockBytes int64) []chunk {
	const chunkBytes = 2 << 20 // some 25,000 small rows, 50 ms
	step := max(1, chunkBytes/max(1, blockBytes))
	if bytes > 0 {
		// Out-of-line values are read as well.
		step = max(1, min(step, int64(float64(blocks)*chunkBytes/float64(bytes))))
	}
	var out []chunk
	for from := int64(0); from == 0 || from < blocks; from += step {
		out = append(out, chunk{leaf: leaf, from: from, to: from + step})
	}
	out[len(out)-1].last = true
	return out
}

// chunkCopiesSQL counts the rows of a chunk by hash, for tables without key.
func (v *view) chunkCopiesSQL(r Range, c chunk) (*query, error) {
	q := &query{}
	q.WriteString("SELECT lpad(to_hex(rh), 16, '0'), count(*)")
	if err := v.chunkSource(q, r, c, false); err != nil {
		return nil, err
	}
	q.WriteString(" GROUP BY rh")
	return q, nil
}
