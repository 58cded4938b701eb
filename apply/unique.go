package apply

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

// unique is a constraint besides the key that lets two rows of a table collide: a unique index or an exclusion
// constraint.
type unique struct {
	name      string
	exprs     []string // columns or expressions, as PostgreSQL prints them
	ops       []string // how two values collide
	predicate string   // of a partial index; empty: none
	nulls     bool     // NULLs collide too (NULLS NOT DISTINCT)
}

// uniquesSQL describes the constraints of a table besides its key. $1 schema, $2 name.
const uniquesSQL = `
WITH ix AS (
	SELECT i.*, c.relname, con.conexclop,
		-- 15 and later
		coalesce((to_jsonb(i)->>'indnullsnotdistinct')::bool, false) AS nulls
	FROM pg_catalog.pg_index i
	JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
	LEFT JOIN pg_catalog.pg_constraint con ON con.conindid = i.indexrelid AND con.contype = 'x'
	WHERE i.indrelid = pg_catalog.to_regclass(pg_catalog.format('%I.%I', $1::text, $2::text))
		AND i.indislive AND (i.indisunique OR i.indisexclusion)
		AND NOT i.indisprimary AND NOT i.indisreplident
)
SELECT ix.relname, coalesce(pg_catalog.pg_get_expr(ix.indpred, ix.indrelid, false), ''), ix.nulls,
	pg_catalog.json_agg(pg_catalog.pg_get_indexdef(ix.indexrelid, k.n::int, false) ORDER BY k.n),
	pg_catalog.json_agg('OPERATOR(' || pg_catalog.quote_ident(opn.nspname) || '.' || o.oprname || ')' ORDER BY k.n)
FROM ix
CROSS JOIN LATERAL unnest(ix.indclass::oid[]) WITH ORDINALITY AS k(opclass, n)
JOIN pg_catalog.pg_opclass oc ON oc.oid = k.opclass
LEFT JOIN pg_catalog.pg_amop ao ON ix.conexclop IS NULL AND ao.amopfamily = oc.opcfamily AND ao.amopstrategy = 3
	AND ao.amoplefttype = oc.opcintype AND ao.amoprighttype = oc.opcintype
JOIN pg_catalog.pg_operator o ON o.oid = coalesce(ix.conexclop[k.n], ao.amopopr)
JOIN pg_catalog.pg_namespace opn ON opn.oid = o.oprnamespace
WHERE k.n <= ix.indnkeyatts
GROUP BY ix.indexrelid, ix.relname, ix.indpred, ix.indrelid, ix.nulls
ORDER BY ix.relname`

// loadUniques reads the constraints besides the key of a local table.
func loadUniques(ctx context.Context, c *pgconn.PgConn, schema, name string) ([]unique, error) {
	rows, err := pg.Query(ctx, c, uniquesSQL, schema, name)
	if err != nil {
		return nil, fmt.Errorf("read the unique constraints of %s.%s: %w", schema, name, err)
	}
	var out []unique
	for _, r := range rows {
		u := unique{name: r[0], predicate: r[1], nulls: r[2] == "t"}
		if err := json.Unmarshal([]byte(r[3]), &u.exprs); err != nil {
			return nil, fmt.Errorf("read the unique constraints of %s.%s: %w", schema, name, err)
		}
		if err := json.Unmarshal([]byte(r[4]), &u.ops); err != nil {
			return nil, fmt.Errorf("read the unique constraints of %s.%s: %w", schema, name, err)
		}
		out = append(out, u)
	}
	return out, nil
}

// imageSQL reads a row image, a JSON object of texts in parameter $1, as a row with the table's columns.
func imageSQL(t *table) string {
	var b strings.Builder
	b.WriteString("SELECT ")
	for i, c := range t.columns {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "(j.r->>%s)::%s AS %s", pg.QuoteLiteral(c.name), c.typ, pg.QuoteIdent(c.name))
	}
	b.WriteString(" FROM (SELECT $1::jsonb) AS j(r)")
	return b.String()
}

// collidersSQL lists the rows of t, other than the one with the image's own key, that collide with the image $1 on any
// of the constraints: the constraint's name, then the key's texts.
func collidersSQL(t *table, uniques []unique) string {
	var parts []string
	for _, u := range uniques {
		var exprs, on []string
		for i, e := range u.exprs {
			exprs = append(exprs, fmt.Sprintf("(%s) AS duri_e%d", e, i))
			match := fmt.Sprintf("t.duri_e%d %s n.duri_e%d", i, u.ops[i], i)
			if u.nulls {
				match = fmt.Sprintf("(%s OR t.duri_e%d IS NULL AND n.duri_e%d IS NULL)", match, i, i)
			}
			on = append(on, match)
		}
		where := ""
		if u.predicate != "" {
			where = " WHERE " + u.predicate
		}
		var keys, same []string
		for _, k := range t.key {
			c := t.columns[k]
			keys = append(keys, "t."+pg.QuoteIdent(c.name))
			same = append(same, fmt.Sprintf("t.%s %s n.%s", pg.QuoteIdent(c.name), c.eqOp, pg.QuoteIdent(c.name)))
		}
		parts = append(parts, fmt.Sprintf("SELECT %s, %s FROM (SELECT *, %s FROM ONLY %s%s) AS t JOIN (SELECT *, %s FROM (%s) AS n%s) AS n ON %s WHERE NOT (%s)",
			pg.QuoteLiteral(u.name), strings.Join(keys, ", "), strings.Join(exprs, ", "), pg.QuoteName(t.schema, t.name), where,
			strings.Join(exprs, ", "), imageSQL(t), where, strings.Join(on, " AND "), strings.Join(same, " AND ")))
	}
	return strings.Join(parts, "\nUNION ALL ")
}
