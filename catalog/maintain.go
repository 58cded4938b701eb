package catalog

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

// partitionPrefix begins the name of a day's partition of duri.conflict; the day follows as 20261125.
const (
	partitionPrefix = "conflict_"
	dayLayout       = "20060102"
)

// pruneRows is how many rows one statement deletes: a long one would hold a snapshot and with it every dead row of the
// database (apply slows down at once on hot rows).
const pruneRows = 10000

// Maintain bounds duri's own tables: duri.conflict gets its partitions for the (UTC) days of now and of tomorrow, loses
// those that ended more than keep before now, and duri.applied loses rows that old, except the newest of each origin.
// Call it about hourly; when a day's partition is late, its rows go to duri.conflict_default and are moved when it is
// made. Nothing waits for a lock longer than a second; when that is too short the error has SQLSTATE 55P03, and the
// next call makes up for it.
func Maintain(ctx context.Context, c *pgconn.PgConn, keep time.Duration, now time.Time) error {
	have, err := partitions(ctx, c)
	if err != nil {
		return err
	}
	add, drop := planPartitions(have, keep, now)
	for _, day := range add {
		if err := addPartition(ctx, c, day); err != nil {
			return fmt.Errorf("make partition %s%s of duri.conflict: %w", partitionPrefix, day.Format(dayLayout), err)
		}
	}
	for _, name := range drop {
		if err := bounded(ctx, c, "DROP TABLE duri."+pg.QuoteIdent(name)); err != nil {
			return fmt.Errorf("drop partition %s of duri.conflict: %w", name, err)
		}
	}
	before := "'" + now.Add(-keep).UTC().Format(time.RFC3339Nano) + "'::timestamptz"
	if err := prune(ctx, c, "duri.conflict_default", "at < "+before); err != nil {
		return err
	}
	// What was decided against stays: its transaction may still turn up.
	if err := prune(ctx, c, "duri.outcome", "status = 'committed' AND at < '"+now.Add(-outcomeKeep).UTC().Format(time.RFC3339Nano)+"'::timestamptz"); err != nil {
		return err
	}
	return prune(ctx, c, "duri.applied", "at < "+before+` AND EXISTS (
		SELECT FROM duri.applied newer WHERE newer.origin = t.origin AND newer.to_lsn > t.to_lsn)`)
}

// outcomeKeep is how long the fate of a marked transaction that took effect can be asked for.
const outcomeKeep = 24 * time.Hour

// partitions lists the day partitions of duri.conflict.
func partitions(ctx context.Context, c *pgconn.PgConn) ([]string, error) {
	rows, err := pg.Rows(ctx, c, `SELECT relname FROM pg_catalog.pg_inherits JOIN pg_catalog.pg_class ON oid = inhrelid
		WHERE inhparent = 'duri.conflict'::regclass`)
	if err != nil {
		return nil, fmt.Errorf("list the partitions of duri.conflict: %w", err)
	}
	var names []string
	for _, r := range rows {
		names = append(names, r[0])
	}
	return names, nil
}

// planPartitions decides which days to add and which partitions to drop. Names that are not a day are left alone. It
// is pure.
func planPartitions(have []string, keep time.Duration, now time.Time) (add []time.Time, drop []string) {
	y, m, d := now.UTC().Date()
	today := time.Date(y, m, d, 0, 0, 0, 0, time.UTC)
	for _, day := range []time.Time{today, today.AddDate(0, 0, 1)} {
		if !slices.Contains(have, partitionPrefix+day.Format(dayLayout)) {
			add = append(add, day)
		}
	}
	for _, name := range slices.Sorted(slices.Values(have)) {
		text, ok := strings.CutPrefix(name, partitionPrefix)
		day, err := time.Parse(dayLayout, text)
		if ok && err == nil && !day.AddDate(0, 0, 1).After(now.Add(-keep)) {
			drop = append(drop, name)
		}
	}
	return add, drop
}

// addPartition makes a day's partition and moves rows of that day out of the default partition, which PostgreSQL would
// otherwise refuse. Making the table first and attaching it then takes a lighter lock on duri.conflict than CREATE ...
// PARTITION OF: apply goes on writing other days.
func addPartition(ctx context.Context, c *pgconn.PgConn, day time.Time) error {
	name := "duri." + pg.QuoteIdent(partitionPrefix+day.Format(dayLayout))
	from, to := "'"+day.Format(time.RFC3339)+"'", "'"+day.AddDate(0, 0, 1).Format(time.RFC3339)+"'"
	return bounded(ctx, c, fmt.Sprintf(`LOCK TABLE duri.conflict_default IN ACCESS EXCLUSIVE MODE;
		CREATE TABLE %[1]s (LIKE duri.conflict);
		WITH moved AS (DELETE FROM duri.conflict_default WHERE at >= %[2]s AND at < %[3]s RETURNING *)
		INSERT INTO %[1]s SELECT * FROM moved;
		ALTER TABLE duri.conflict ATTACH PARTITION %[1]s FOR VALUES FROM (%[2]s) TO (%[3]s)`, name, from, to))
}

// bounded runs SQL in a transaction that does not wait long for locks.
func bounded(ctx context.Context, c *pgconn.PgConn, sql string) error {
	return transact(ctx, c, "SET LOCAL lock_timeout = '1s';"+sql)
}

// prune deletes rows of a table, named t in the condition, in small transactions.
func prune(ctx context.Context, c *pgconn.PgConn, table, condition string) error {
	sql := fmt.Sprintf(`WITH old AS (SELECT ctid FROM %[1]s t WHERE %[2]s LIMIT %[3]d)
		DELETE FROM %[1]s t USING old WHERE t.ctid = old.ctid`, table, condition, pruneRows)
	for {
		res := c.ExecParams(ctx, sql, nil, nil, nil, nil).Read()
		if res.Err != nil {
			return fmt.Errorf("remove old rows of %s: %w", table, res.Err)
		}
		if res.CommandTag.RowsAffected() < pruneRows {
			return nil
		}
	}
}
