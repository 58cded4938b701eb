package fkey

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
)

// Outcome is what became of an orphan.
type Outcome string

const (
	Gone        Outcome = "gone"        // it was none any more when its row was locked
	Recorded    Outcome = "recorded"    // it is in duri.orphan, and was an event the first time
	Removed     Outcome = "removed"     // the child was deleted
	Resurrected Outcome = "resurrected" // the parent was inserted again
)

// Kinds of duri.event.
const (
	eventOrphan      = "orphan"
	eventRemoved     = "orphan_removed"
	eventResurrected = "parent_resurrected"
)

// lockTimeout bounds how long a compensation waits for a client's lock; it is tried again later.
const lockTimeout = "2s"

// handle follows a policy for one orphan, in a transaction of its own. What cannot be done is recorded with the reason;
// an error is one that may be gone the next time: a connection, a lock.
func handle(ctx context.Context, conn *pgconn.PgConn, c *Constraint, o Orphan, p policy.Orphans) (Outcome, error) {
	var out Outcome
	var err error
	switch p {
	case policy.RemoveChild:
		out, err = inTransaction(ctx, conn, func() (Outcome, error) { return removeChild(ctx, conn, c, o) })
	case policy.ResurrectParent:
		out, err = inTransaction(ctx, conn, func() (Outcome, error) { return resurrect(ctx, conn, c, o) })
	default:
		return record(ctx, conn, c, o, p, "")
	}
	if reason, ok := lasting(err); ok {
		return record(ctx, conn, c, o, p, reason)
	}
	return out, err
}

// impossible is why a policy cannot be followed.
type impossible struct{ reason string }

func (e *impossible) Error() string { return e.reason }

// lasting tells errors that trying again does not mend, and says why in words for people.
func lasting(err error) (reason string, ok bool) {
	var im *impossible
	var pe *pgconn.PgError
	switch {
	case err == nil || pg.IsConnectionError(err):
		return "", false
	case errors.As(err, &im):
		return im.reason, true
	case errors.As(err, &pe):
		switch {
		case strings.HasPrefix(pe.Code, "40"), pe.Code == "55P03", strings.HasPrefix(pe.Code, "57"), strings.HasPrefix(pe.Code, "53"):
			return "", false // deadlock, lock timeout, cancelled, out of something
		}
		return pe.Message, true
	}
	return "", false
}

// inTransaction runs f in a transaction that does not wait long for locks, and rolls back when f fails.
func inTransaction(ctx context.Context, conn *pgconn.PgConn, f func() (Outcome, error)) (Outcome, error) {
	if _, err := pg.Rows(ctx, conn, "BEGIN; SET LOCAL lock_timeout = '"+lockTimeout+"'"); err != nil {
		return "", fmt.Errorf("begin: %w", err)
	}
	out, err := f()
	end := "COMMIT"
	if err != nil {
		end = "ROLLBACK"
		if conn.IsClosed() {
			return "", err
		}
	}
	_, eerr := pg.Rows(context.WithoutCancel(ctx), conn, end)
	return out, errors.Join(err, eerr)
}

// keyed is the condition that c is the row with the orphan's key.
func (c *Constraint) keyed(q *query, o Orphan) string {
	parts := make([]string, len(c.Key))
	for i, k := range c.Key {
		parts[i] = "c." + pg.QuoteIdent(k.Name) + " = " + q.param(o.Key[i]) + "::" + k.Type
	}
	return strings.Join(parts, " AND ")
}

// lock locks the child, so that no client gives it another parent meanwhile. Whether it is an orphan still is a question
// of the statement after it, which sees what was committed while this one waited.
func lock(ctx context.Context, conn *pgconn.PgConn, c *Constraint, o Orphan) error {
	q := &query{}
	q.addf("SELECT FROM %s WHERE %s FOR UPDATE OF c", c.childFrom(), c.keyed(q, o))
	_, err := q.rows(ctx, conn)
	if err != nil {
		return fmt.Errorf("lock an orphan by %s: %w", c, err)
	}
	return nil
}

func removeChild(ctx context.Context, conn *pgconn.PgConn, c *Constraint, o Orphan) (Outcome, error) {
	if err := lock(ctx, conn, c, o); err != nil {
		return "", err
	}
	q := &query{}
	q.addf("DELETE FROM %s WHERE %s AND %s", c.childFrom(), c.keyed(q, o), c.orphaned())
	res := conn.ExecParams(ctx, q.String(), q.params, nil, nil, nil).Read()
	if res.Err != nil {
		return "", fmt.Errorf("remove an orphan by %s: %w", c, res.Err)
	}
	if res.CommandTag.RowsAffected() == 0 {
		return Gone, nil
	}
	text := fmt.Sprintf("row %s of %s was removed: its parent %s in %s is gone (constraint %s)", c.keyJSON(o), c.Child, c.parentJSON(o), c.Parent, c.Name)
	return Removed, told(ctx, conn, c, o, eventRemoved, text)
}

// told makes the event of a compensation, and forgets what was recorded of the orphan before.
func told(ctx context.Context, conn *pgconn.PgConn, c *Constraint, o Orphan, kind, text string) error {
	if err := forget(ctx, conn, c, c.keyJSON(o)); err != nil {
		return err
	}
	return catalog.Event(ctx, conn, kind, text, c.details(o))
}

// details are an event's data.
func (c *Constraint) details(o Orphan) map[string]any {
	return map[string]any{
		"constraint": c.Name, "schema": c.Child.Schema, "table": c.Child.Table,
		"key": json.RawMessage(c.keyJSON(o)), "parent_schema": c.Parent.Schema, "parent_table": c.Parent.Table, "parent": json.RawMessage(c.parentJSON(o)),
	}
}

// record keeps an orphan in duri.orphan; the first time it is an event as well.
func record(ctx context.Context, conn *pgconn.PgConn, c *Constraint, o Orphan, p policy.Orphans, reason string) (Outcome, error) {
	return inTransaction(ctx, conn, func() (Outcome, error) {
		// xmax tells an inserted row from one that was there.
		rows, err := pg.Query(ctx, conn, `INSERT INTO duri.orphan AS o (table_schema, table_name, constraint_name, key, parent, policy, reason)
			VALUES ($1, $2, $3, $4::jsonb, $5::jsonb, $6, $7)
			ON CONFLICT (table_schema, table_name, constraint_name, key)
			DO UPDATE SET parent = excluded.parent, policy = excluded.policy, reason = excluded.reason RETURNING o.xmax = 0`,
			c.Child.Schema, c.Child.Table, c.Name, c.keyJSON(o), c.parentJSON(o), string(p), reason)
		if err != nil {
			return "", fmt.Errorf("record an orphan by %s: %w", c, err)
		}
		if rows[0][0] != "t" {
			return Recorded, nil
		}
		text := fmt.Sprintf("row %s of %s has lost its parent %s in %s (constraint %s)", c.keyJSON(o), c.Child, c.parentJSON(o), c.Parent, c.Name)
		if reason != "" {
			text += fmt.Sprintf("; policy %s could not be followed: %s", p, reason)
		}
		return Recorded, catalog.Event(ctx, conn, eventOrphan, text, c.details(o))
	})
}

// forget drops what is recorded of an orphan.
func forget(ctx context.Context, conn *pgconn.PgConn, c *Constraint, key string) error {
	_, err := pg.Query(ctx, conn, `DELETE FROM duri.orphan WHERE table_schema = $1 AND table_name = $2 AND constraint_name = $3 AND key = $4::jsonb`,
		c.Child.Schema, c.Child.Table, c.Name, key)
	if err != nil {
		return fmt.Errorf("forget an orphan by %s: %w", c, err)
	}
	return nil
}

// known reads what is recorded for a constraint, as documents of keyJSON, and drops what is no orphan any more.
func known(ctx context.Context, conn *pgconn.PgConn, c *Constraint) (map[string]bool, error) {
	rows, err := pg.Query(ctx, conn, "SELECT key FROM duri.orphan WHERE table_schema = $1 AND table_name = $2 AND constraint_name = $3", c.Child.Schema, c.Child.Table, c.Name)
	if err != nil {
		return nil, fmt.Errorf("read recorded orphans of %s: %w", c, err)
	}
	var keys [][]string
	for _, r := range rows {
		if k := c.keyOf(r[0]); k != nil {
			keys = append(keys, k)
		}
	}
	still, err := OrphansAmong(ctx, conn, c, keys)
	if err != nil {
		return nil, err
	}
	out := map[string]bool{}
	for _, o := range still {
		out[c.keyJSON(o)] = true
	}
	for _, r := range rows {
		if k := c.keyOf(r[0]); k != nil && out[c.keyJSON(Orphan{Key: k})] {
			continue
		}
		if err := forget(ctx, conn, c, r[0]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// forgetOthers drops what is recorded for constraints that are not checked any more.
func forgetOthers(ctx context.Context, conn *pgconn.PgConn, all []*Constraint) error {
	var schemas, tables, names []string
	for _, c := range all {
		schemas, tables, names = append(schemas, c.Child.Schema), append(tables, c.Child.Table), append(names, c.Name)
	}
	_, err := pg.Query(ctx, conn, `DELETE FROM duri.orphan o WHERE NOT EXISTS (
		SELECT FROM unnest($1::text[], $2::text[], $3::text[]) AS u(s, t, n)
		WHERE u.s = o.table_schema AND u.t = o.table_name AND u.n = o.constraint_name)`, textArray(schemas), textArray(tables), textArray(names))
	if err != nil {
		return fmt.Errorf("forget orphans of former constraints: %w", err)
	}
	return nil
}

// resurrect inserts the parent again: as its newest known image has it, else with no more than what the child refers to.
func resurrect(ctx context.Context, conn *pgconn.PgConn, c *Constraint, o Orphan) (Outcome, error) {
	if err := lock(ctx, conn, c, o); err != nil {
		return "", err
	}
	still, err := OrphansAmong(ctx, conn, c, [][]string{o.Key})
	if err != nil {
		return "", err
	}
	if len(still) == 0 {
		return Gone, nil
	}
	o = still[0]
	columns, err := parentColumns(ctx, conn, c)
	if err != nil {
		return "", err
	}
	images, err := parentImages(ctx, conn, c, o)
	if err != nil {
		return "", err
	}
	row, reason := compose(c, columns, o, images)
	if reason != "" {
		return "", &impossible{reason}
	}
	if err := insertParent(ctx, conn, c, columns, row); err != nil {
		return "", err
	}
	text := fmt.Sprintf("row %s of %s was inserted again%s: row %s of %s refers to it (constraint %s)", c.parentJSON(o), c.Parent, fromImage(images), c.keyJSON(o), c.Child, c.Name)
	return Resurrected, told(ctx, conn, c, o, eventResurrected, text)
}

func fromImage(images []image) string {
	if len(images) > 0 {
		return " from the newest image in duri.conflict"
	}
	return " with defaults, as no image of it is known"
}

// parentColumn is a column of the parent.
type parentColumn struct {
	name, typ string
	generated bool
	required  bool // NOT NULL without a default
}

func parentColumns(ctx context.Context, conn *pgconn.PgConn, c *Constraint) ([]parentColumn, error) {
	rows, err := pg.Query(ctx, conn, `SELECT a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attgenerated <> '',
			(a.attnotnull OR t.typnotnull) AND NOT a.atthasdef AND a.attidentity = '' AND t.typdefault IS NULL
		FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
		WHERE a.attrelid = $1::regclass AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum`, c.Parent.SQL())
	if err != nil {
		return nil, fmt.Errorf("read the columns of %s: %w", c.Parent, err)
	}
	out := make([]parentColumn, len(rows))
	for i, r := range rows {
		out[i] = parentColumn{r[0], r[1], r[2] == "t", r[3] == "t"}
	}
	return out, nil
}

// image is a row as duri.conflict keeps it: column to text or null. A large value that PostgreSQL did not send is not in
// it.
type image map[string]*string

// imagesMax bounds how far back large values are looked for that newer images leave out.
const imagesMax = 20

// parentImages reads the images of an orphan's parent, the newest first.
func parentImages(ctx context.Context, conn *pgconn.PgConn, c *Constraint, o Orphan) ([]image, error) {
	q := &query{}
	q.addf(`SELECT i.img FROM duri.conflict k
		CROSS JOIN LATERAL (VALUES (k.remote_time, k.remote_row), (k.local_time, k.local_row)) AS i(at, img)
		WHERE k.table_schema || '.' || k.table_name = ANY (%s::text[]) AND i.img IS NOT NULL`, q.param(textArray(c.parentStores())))
	for i, col := range c.Columns {
		if o.Ref[i] == nil {
			return nil, nil
		}
		q.addf(" AND i.img ->> %s = %s", q.param(col.Referenced)+"::text", q.param(*o.Ref[i])+"::text")
	}
	q.addf(" ORDER BY i.at DESC NULLS LAST, k.id DESC LIMIT %d", imagesMax)
	rows, err := q.rows(ctx, conn)
	if err != nil {
		return nil, fmt.Errorf("look for images of %s: %w", c.Parent, err)
	}
	out := make([]image, len(rows))
	for i, r := range rows {
		if err := json.Unmarshal(r[0], &out[i]); err != nil {
			return nil, fmt.Errorf("read an image of %s: %w", c.Parent, err)
		}
	}
	return out, nil
}

// parentStores are the names under which the parent's changes are recorded.
func (c *Constraint) parentStores() []string {
	out := make([]string, len(c.ParentStores))
	for i, n := range c.ParentStores {
		out[i] = n.Schema + "." + n.Table
	}
	return out
}

// compose decides what the parent's row is to hold. A column that the newest image leaves out comes from the one before,
// and so on; a column that none has gets its default. reason tells why there cannot be such a row. It is pure.
func compose(c *Constraint, columns []parentColumn, o Orphan, images []image) (row image, reason string) {
	row = image{}
	for _, img := range images {
		for name, v := range img {
			if _, ok := row[name]; !ok {
				row[name] = v
			}
		}
	}
	for i, col := range c.Columns {
		if o.Ref[i] == nil {
			return nil, "the row refers to its parent by only a part of the key (MATCH FULL)"
		}
		row[col.Referenced] = o.Ref[i]
	}
	var lacking []string
	for _, col := range columns {
		switch v, ok := row[col.name]; {
		case col.generated:
			delete(row, col.name)
		case col.required && (!ok || v == nil):
			lacking = append(lacking, col.name)
		}
	}
	if len(lacking) > 0 {
		return nil, fmt.Sprintf("no image of the parent is known with its column %s, which has no default", strings.Join(lacking, ", "))
	}
	for name := range row {
		if !slices.ContainsFunc(columns, func(col parentColumn) bool { return col.name == name }) {
			delete(row, name) // dropped since
		}
	}
	return row, ""
}

// insertParent inserts a row. Foreign keys, triggers and constraints of the parent apply as for a client.
func insertParent(ctx context.Context, conn *pgconn.PgConn, c *Constraint, columns []parentColumn, row image) error {
	doc, err := json.Marshal(row)
	if err != nil {
		return err
	}
	var names, values []string
	for _, col := range columns {
		if _, ok := row[col.name]; ok {
			names = append(names, pg.QuoteIdent(col.name))
			values = append(values, fmt.Sprintf("(d.doc ->> %s)::%s", pg.QuoteLiteral(col.name), col.typ))
		}
	}
	_, err = pg.Query(ctx, conn, fmt.Sprintf("INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT %s FROM (SELECT $1::jsonb AS doc) d",
		c.Parent.SQL(), strings.Join(names, ", "), strings.Join(values, ", ")), string(doc))
	if err != nil {
		return fmt.Errorf("insert the parent of an orphan by %s: %w", c, err)
	}
	return nil
}
