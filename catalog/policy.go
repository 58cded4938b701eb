package catalog

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
)

// policiesSQL reads declarations of tables that exist: one whose table was dropped says nothing any more, and must not
// keep the sites from agreeing.
const policiesSQL = `SELECT p.table_schema, p.table_name, p.policy FROM duri.policy p
	JOIN pg_catalog.pg_namespace n ON n.nspname = p.table_schema
	JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.table_name AND c.relkind IN ('r', 'p')`

// rootsSQL leads from each partition of a user table to the topmost table.
const rootsSQL = `SELECT n.nspname, c.relname, rn.nspname, r.relname FROM pg_catalog.pg_class c
	JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
	JOIN pg_catalog.pg_class r ON r.oid = pg_catalog.pg_partition_root(c.oid)
	JOIN pg_catalog.pg_namespace rn ON rn.oid = r.relnamespace
	WHERE c.relispartition AND c.relkind IN ('r', 'p') AND n.nspname <> 'duri'`

// Policies reads what duri.set_policy declared, and which tables are partitions of which. What duri.yaml declares comes
// before it: see policy.Merge. The tables must have been migrated (Migrate).
func Policies(ctx context.Context, c *pgconn.PgConn) (policy.Set, error) {
	rows, err := pg.Rows(ctx, c, policiesSQL)
	if err != nil {
		return policy.Set{}, fmt.Errorf("read duri.policy: %w", err)
	}
	tables := map[policy.Name]policy.Table{}
	for _, r := range rows {
		n := policy.Name{Schema: r[0], Table: r[1]}
		if tables[n], err = policy.Parse([]byte(r[2])); err != nil {
			return policy.Set{}, &Error{
				"read duri.policy", fmt.Sprintf("the row of %s: %v", n, err),
				"write it with duri.set_policy, which checks it, or use the duri that wrote it",
			}
		}
	}
	roots, err := partitionRoots(ctx, c)
	if err != nil {
		return policy.Set{}, err
	}
	return policy.NewSet(tables, roots), nil
}

func partitionRoots(ctx context.Context, c *pgconn.PgConn) (map[policy.Name]policy.Name, error) {
	rows, err := pg.Rows(ctx, c, rootsSQL)
	if err != nil {
		return nil, fmt.Errorf("read partitions: %w", err)
	}
	roots := map[policy.Name]policy.Name{}
	for _, r := range rows {
		roots[policy.Name{Schema: r[0], Table: r[1]}] = policy.Name{Schema: r[2], Table: r[3]}
	}
	return roots, nil
}
