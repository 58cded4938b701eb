// Package fkey finds rows whose parent is gone (orphans) and handles them by the policy declared for their foreign key:
// report, remove the child, resurrect the parent (replication.md rule 12, S26, S27). Orphans arise although every site
// enforces its foreign keys, because apply does not fire them: a parent that one site deletes may get a child at another.
//
// An orphan may as well be a child whose parent is still on its way. Nothing is done about a row before it was seen
// twice, the second time after everything that was known at the first look has been applied (Settler). What is done, one
// site of the cluster does (Config.Elected), in ordinary transactions that replicate, with the child locked and looked at
// a third time. Which columns are compared and how is read from the catalog: composite keys, MATCH SIMPLE and FULL, self
// references and partitioned tables. Constraints that PostgreSQL does not insist on itself (NOT VALID, NOT ENFORCED) and
// those over periods are left alone.
//
// Checker ties it together. It reads in pages, in short statements, within a small share of one core.
package fkey

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
)

// Constraint is a foreign key constraint: of a table, or of a partitioned table as a whole.
type Constraint struct {
	Name   string      `json:"name"`
	Child  policy.Name `json:"child"`
	Parent policy.Name `json:"parent"`
	// Columns are the child's columns and what they refer to, in the constraint's order.
	Columns []Column `json:"columns"`
	// Key are the child's columns that name a row: its key, or without one the referencing columns, which then stand for
	// all rows with the same values.
	Key     []KeyColumn `json:"key"`
	Keyless bool        `json:"keyless"`
	Full    bool        `json:"full"` // MATCH FULL: all columns null, or none
	// Replicated says that both tables are. If only the child is, the parents at other sites are unknown here, and nothing
	// may be done about orphans.
	Replicated bool `json:"replicated"`

	ChildPartitioned  bool          `json:"child_partitioned"`
	ParentPartitioned bool          `json:"parent_partitioned"`
	ChildStores       []policy.Name `json:"child_stores"`  // the child and its partitions
	ParentStores      []policy.Name `json:"parent_stores"` // the parent and its partitions
	Pageable          bool          `json:"pageable"`      // the key's order can be asked for
}

// Column is a column of a foreign key.
type Column struct {
	Name       string `json:"name"`
	Type       string `json:"type"`
	Referenced string `json:"referenced"`
	// ReferencedType is the type of the parent's column.
	ReferencedType string `json:"referenced_type"`
	Equal          string `json:"equal"`   // operator, parent's column on the left, as OPERATOR(schema.name)
	Collate        string `json:"collate"` // of the parent's column, when the child's differs; else empty
}

// KeyColumn is a column that names a row of the child.
type KeyColumn struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

// String prints "constraint of child".
func (c *Constraint) String() string { return c.Name + " of " + c.Child.String() }

// constraintsSQL describes each foreign key constraint of user schemas, one JSON document a row. Constraints that
// PostgreSQL made for the partitions of another one have a conparentid.
const constraintsSQL = `
WITH covered AS (
	SELECT c.oid FROM pg_catalog.pg_publication_tables p
	JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
	JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
	WHERE p.pubname = 'duri'
), k AS (
	SELECT con.*, pg_catalog.to_jsonb(con) AS doc FROM pg_catalog.pg_constraint con
	JOIN pg_catalog.pg_namespace n ON n.oid = con.connamespace
	WHERE con.contype = 'f' AND con.conparentid = 0 AND con.convalidated
		AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'duri')
)
SELECT pg_catalog.jsonb_build_object(
	'name', k.conname, 'full', k.confmatchtype = 'f',
	'child', pg_catalog.jsonb_build_object('schema', cn.nspname, 'table', c.relname), 'child_partitioned', c.relkind = 'p',
	'parent', pg_catalog.jsonb_build_object('schema', pn.nspname, 'table', p.relname), 'parent_partitioned', p.relkind = 'p',
	'replicated', NOT EXISTS (
		SELECT FROM (SELECT k.conrelid AS relid UNION SELECT k.confrelid) top
		CROSS JOIN LATERAL (SELECT l.relid FROM pg_catalog.pg_partition_tree(top.relid) l WHERE l.isleaf
			UNION SELECT top.relid FROM pg_catalog.pg_class x WHERE x.oid = top.relid AND x.relkind <> 'p') store
		WHERE store.relid::oid NOT IN (SELECT oid FROM covered) AND NOT EXISTS (
			SELECT FROM pg_catalog.pg_partition_ancestors(store.relid) a JOIN covered ON covered.oid = a.relid)),
	'child_stores', (SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('schema', n.nspname, 'table', m.relname))
		FROM (SELECT k.conrelid::oid AS oid UNION SELECT l.relid FROM pg_catalog.pg_partition_tree(k.conrelid) l) u
		JOIN pg_catalog.pg_class m ON m.oid = u.oid JOIN pg_catalog.pg_namespace n ON n.oid = m.relnamespace),
	'parent_stores', (SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('schema', n.nspname, 'table', m.relname))
		FROM (SELECT k.confrelid::oid AS oid UNION SELECT l.relid FROM pg_catalog.pg_partition_tree(k.confrelid) l) u
		JOIN pg_catalog.pg_class m ON m.oid = u.oid JOIN pg_catalog.pg_namespace n ON n.oid = m.relnamespace),
	'columns', (SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
			'name', ca.attname, 'type', pg_catalog.format_type(ca.atttypid, ca.atttypmod), 'referenced', pa.attname,
			'referenced_type', pg_catalog.format_type(pa.atttypid, pa.atttypmod),
			'equal', 'OPERATOR(' || pg_catalog.quote_ident(opn.nspname) || '.' || o.oprname || ')',
			'collate', CASE WHEN pa.attcollation <> 0 AND pa.attcollation <> ca.attcollation
				THEN (SELECT pg_catalog.quote_ident(x.nspname) || '.' || pg_catalog.quote_ident(co.collname)
					FROM pg_catalog.pg_collation co JOIN pg_catalog.pg_namespace x ON x.oid = co.collnamespace WHERE co.oid = pa.attcollation)
				ELSE '' END
		) ORDER BY u.ord)
		FROM unnest(k.conkey, k.confkey, k.conpfeqop) WITH ORDINALITY AS u(child, parent, op, ord)
		JOIN pg_catalog.pg_attribute ca ON ca.attrelid = k.conrelid AND ca.attnum = u.child
		JOIN pg_catalog.pg_attribute pa ON pa.attrelid = k.confrelid AND pa.attnum = u.parent
		JOIN pg_catalog.pg_operator o ON o.oid = u.op JOIN pg_catalog.pg_namespace opn ON opn.oid = o.oprnamespace),
	'keyless', ix.indexrelid IS NULL,
	'key', key.columns, 'pageable', coalesce(key.pageable, false) AND ix.indexrelid IS NOT NULL)
FROM k
JOIN pg_catalog.pg_class c ON c.oid = k.conrelid JOIN pg_catalog.pg_namespace cn ON cn.oid = c.relnamespace
JOIN pg_catalog.pg_class p ON p.oid = k.confrelid JOIN pg_catalog.pg_namespace pn ON pn.oid = p.relnamespace
LEFT JOIN LATERAL (
	SELECT i.* FROM pg_catalog.pg_index i WHERE i.indrelid = k.conrelid AND i.indisvalid AND (i.indisprimary OR i.indisreplident)
	ORDER BY i.indisprimary DESC LIMIT 1
) ix ON true
CROSS JOIN LATERAL (
	SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('name', a.attname, 'type', pg_catalog.format_type(a.atttypid, a.atttypmod)) ORDER BY u.ord) AS columns,
		pg_catalog.bool_and(base.oid < 16384 OR base.typtype = 'e') AS pageable
	FROM unnest(coalesce((ix.indkey::int2[])[0:ix.indnkeyatts - 1], k.conkey)) WITH ORDINALITY AS u(num, ord)
	JOIN pg_catalog.pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.num
	CROSS JOIN LATERAL (
		WITH RECURSIVE d AS (
			SELECT t.oid, t.typtype::text, t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid
			UNION ALL SELECT b.oid, b.typtype::text, b.typbasetype FROM d JOIN pg_catalog.pg_type b ON b.oid = d.typbasetype
		) SELECT d.oid, d.typtype FROM d WHERE d.typbasetype = 0
	) base
) key
WHERE coalesce((k.doc ->> 'conenforced')::bool, true) AND NOT coalesce((k.doc ->> 'conperiod')::bool, false)
ORDER BY cn.nspname COLLATE "C", c.relname COLLATE "C", k.conname COLLATE "C"`

// Constraints reads the foreign keys of a database that are checked, sorted by child and name. schemas are those of the
// child tables; empty: all user schemas.
func Constraints(ctx context.Context, conn *pgconn.PgConn, schemas []string) ([]*Constraint, error) {
	rows, err := pg.Rows(ctx, conn, constraintsSQL)
	if err != nil {
		return nil, fmt.Errorf("read foreign keys: %w", err)
	}
	var out []*Constraint
	for _, r := range rows {
		c := new(Constraint)
		if err := json.Unmarshal([]byte(r[0]), c); err != nil {
			return nil, fmt.Errorf("read foreign keys: %w", err)
		}
		if len(schemas) == 0 || slices.Contains(schemas, c.Child.Schema) {
			out = append(out, c)
		}
	}
	return out, nil
}
