package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

// Action is what a restoration does to the row.
type Action string

// The actions.
const (
	ActionNone   Action = "none" // the row is as the losing change wanted it
	ActionUpdate Action = "update"
	ActionInsert Action = "insert"
	ActionDelete Action = "delete" // the losing change was a delete
)

// Restoration is what bringing back a losing image does, or did.
type Restoration struct {
	ID      int64           `json:"id"`
	Schema  string          `json:"schema"`
	Table   string          `json:"table"`
	Key     json.RawMessage `json:"key"`
	Action  Action          `json:"action"`
	Columns []string        `json:"columns,omitempty"` // that are set
	Skipped []string        `json:"skipped,omitempty"` // that differ, but only PostgreSQL may set
	SQL     string          `json:"sql,omitempty"`     // the statement, without a final semicolon
	Forced  bool            `json:"forced"`            // a reason to refuse was overridden
	DryRun  bool            `json:"dry_run"`           // nothing was written
}

// RefusedError says why a losing image is not brought back.
type RefusedError struct {
	ID   int64  // of the record
	Text string // what is in the way
	Hint string // one sentence
}

// Error gives the sentence that is printed.
func (e *RefusedError) Error() string { return fmt.Sprintf("restore conflict %d: %s", e.ID, e.Text) }

// HintText is the advice that goes with the error.
func (e *RefusedError) HintText() string { return e.Hint }

// definition is what a restoration knows of the table as it is now.
type definition struct {
	partitioned bool
	columns     []columnDef
}

type columnDef struct {
	name, typ string // typ without length, as a cast accepts it
	generated bool
	always    bool   // GENERATED ALWAYS AS IDENTITY: only INSERT may set it
	large     bool   // its values may be out of line, so that a change may have come without them
	keyOp     string // equality of the key's index; empty: no column of the key
}

func (d *definition) find(name string) (columnDef, bool) {
	i := slices.IndexFunc(d.columns, func(c columnDef) bool { return c.name == name })
	if i < 0 {
		return columnDef{}, false
	}
	return d.columns[i], true
}

// names lists the columns in the table's order; none without a table.
func (d *definition) names() []string {
	if d == nil {
		return nil
	}
	var out []string
	for _, c := range d.columns {
		out = append(out, c.name)
	}
	return out
}

// restorer decides about one record: all that does not need the database. Its methods are pure.
type restorer struct {
	Conflict
	key, loser, winner Image
	deleted            bool // the loser is a delete
	force              bool
}

func (r *restorer) refuse(text, hint string) error { return &RefusedError{r.ID, text, hint} }

// byHand is the advice where no statement can be made from the record.
func (r *restorer) byHand() string {
	return fmt.Sprintf("write the row yourself: `duri conflict show %d -o json` has both images", r.ID)
}

// newRestorer refuses what the record alone rules out.
func newRestorer(c Conflict, force bool) (*restorer, error) {
	r := &restorer{Conflict: c, force: force}
	if c.Kind == "" {
		return nil, r.refuse(fmt.Sprintf("the record is an exception (%s) and no conflict, so nobody lost", c.Code), "restore records that `duri conflict list` shows")
	}
	doc, deleted, ok := c.Losing()
	if !ok {
		return nil, r.refuse("the record has no losing image: nothing gave way", "there is nothing to bring back")
	}
	r.deleted = deleted
	var errs [3]error
	r.key, errs[0] = parseImage(c.Key)
	r.loser, errs[1] = parseImage(doc)
	r.winner, errs[2] = parseImage(c.winning())
	if err := errors.Join(errs[:]...); err != nil {
		return nil, fmt.Errorf("restore conflict %d: %w", c.ID, err)
	}
	if len(r.key) == 0 {
		return nil, r.refuse("the table had no key, so the row cannot be found", r.byHand())
	}
	return r, nil
}

// fits refuses a table that is not the one of the record any more; nil: there is none.
func (r *restorer) fits(d *definition) error {
	table := r.Schema + "." + r.Table
	if d == nil {
		return r.refuse(fmt.Sprintf("table %s does not exist any more", table), r.byHand())
	}
	var key []string
	for _, c := range d.columns {
		if c.keyOp != "" {
			key = append(key, c.name)
		}
	}
	for name := range r.key {
		if !slices.Contains(key, name) || len(key) != len(r.key) {
			return r.refuse(fmt.Sprintf("the key of table %s is not the one of the record any more", table), r.byHand())
		}
	}
	var gone []string
	for name := range r.loser {
		if _, ok := d.find(name); !ok {
			gone = append(gone, name)
		}
	}
	if len(gone) > 0 {
		slices.Sort(gone)
		return r.refuse(fmt.Sprintf("table %s has no column %s any more, and the losing image has", table, strings.Join(gone, ", ")), r.byHand())
	}
	return nil
}

// plan decides what is to be done about the row as it is now; nil: there is none. fits comes first.
func (r *restorer) plan(d *definition, present Image) (Restoration, error) {
	out := Restoration{ID: r.ID, Schema: r.Schema, Table: r.Table, Key: r.Key, Action: ActionNone}
	switch {
	case r.deleted && present == nil:
		return out, nil
	case r.deleted:
		out.Action = ActionDelete
	case present == nil:
		out.Action = ActionInsert
	default:
		for _, c := range d.columns {
			v, sent := r.loser[c.name]
			if !sent || equal(v, present[c.name]) || c.generated {
				continue
			}
			if c.always {
				out.Skipped = append(out.Skipped, c.name)
				continue
			}
			out.Columns = append(out.Columns, c.name)
		}
		if len(out.Columns) == 0 {
			return out, nil
		}
		out.Action = ActionUpdate
	}
	if what := r.changed(d, present); what != "" {
		if !r.force {
			return out, r.refuse(what, "look at the row first; with --force the losing image takes its place all the same")
		}
		out.Forced = true
	}
	if out.Action == ActionInsert {
		if err := r.insert(d, &out); err != nil {
			return out, err
		}
	}
	out.SQL = r.sql(d, out)
	return out, nil
}

// insert chooses the columns of a row that is to be made again.
func (r *restorer) insert(d *definition, out *Restoration) error {
	var missing []string
	for _, c := range d.columns {
		_, sent := r.loser[c.name]
		switch {
		case c.generated:
		case sent:
			out.Columns = append(out.Columns, c.name)
		case c.large:
			missing = append(missing, c.name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	if !r.force {
		return r.refuse("the row is gone, and the losing image is without a value of "+strings.Join(missing, ", "),
			"with --force the row is made with the default there; a large value that the change had left alone was not sent, or the column is new")
	}
	out.Forced = true
	return nil
}

// changed says how the row is not the winner's any more, or nothing. Columns that the winner's image does not have
// cannot tell.
func (r *restorer) changed(d *definition, present Image) string {
	switch {
	case r.winner == nil && present == nil:
		return ""
	case r.winner == nil:
		return "the row was made again since the conflict"
	case present == nil:
		return "the row was deleted since the conflict"
	}
	var differ []string
	for _, c := range d.columns {
		if v, ok := r.winner[c.name]; ok && !c.generated && !equal(v, present[c.name]) {
			differ = append(differ, c.name)
		}
	}
	if len(differ) == 0 {
		return ""
	}
	return "the row was changed again since the conflict, in " + strings.Join(differ, ", ")
}

// sql writes the statement. Values are constants without a type, so that each becomes what its column is, and too long
// ones are refused and not cut.
func (r *restorer) sql(d *definition, p Restoration) string {
	table := pg.QuoteName(r.Schema, r.Table)
	if p.Action == ActionInsert {
		names, values, overriding := make([]string, len(p.Columns)), make([]string, len(p.Columns)), ""
		for i, name := range p.Columns {
			names[i], values[i] = pg.QuoteIdent(name), constant(r.loser[name])
			if c, _ := d.find(name); c.always {
				overriding = "OVERRIDING SYSTEM VALUE "
			}
		}
		return fmt.Sprintf("INSERT INTO %s (%s) %sVALUES (%s)", table, strings.Join(names, ", "), overriding, strings.Join(values, ", "))
	}
	if p.Action == ActionDelete {
		return "DELETE FROM " + d.only() + table + " AS t WHERE " + r.where(d)
	}
	set := make([]string, len(p.Columns))
	for i, name := range p.Columns {
		set[i] = pg.QuoteIdent(name) + " = " + constant(r.loser[name])
	}
	return "UPDATE " + d.only() + table + " AS t SET " + strings.Join(set, ", ") + " WHERE " + r.where(d)
}

// only keeps rows of inheriting tables out; a partitioned table has no rows but those.
func (d *definition) only() string {
	if d.partitioned {
		return ""
	}
	return "ONLY "
}

// where finds the row t by its key, with the operators of the key's index.
func (r *restorer) where(d *definition) string {
	var all []string
	for _, c := range d.columns {
		if c.keyOp != "" {
			all = append(all, fmt.Sprintf("t.%s %s %s::%s", pg.QuoteIdent(c.name), c.keyOp, constant(r.key[c.name]), c.typ))
		}
	}
	return strings.Join(all, " AND ")
}

// selectSQL reads the row, all columns in the table's order: not as ::text, which is no output function for all types.
func (r *restorer) selectSQL(d *definition) string {
	columns := make([]string, len(d.columns))
	for i, c := range d.columns {
		columns[i] = "t." + pg.QuoteIdent(c.name)
	}
	return "SELECT " + strings.Join(columns, ", ") + " FROM " + d.only() + pg.QuoteName(r.Schema, r.Table) + " AS t WHERE " + r.where(d)
}

// constant writes a value as an SQL constant. Characters that would steer a terminal are escaped, so that the SQL of a
// dry run can be shown and run as it is.
func constant(v *string) string {
	if v == nil {
		return "NULL"
	}
	if strings.IndexFunc(*v, steers) < 0 {
		return strings.TrimPrefix(pg.QuoteLiteral(*v), " ")
	}
	var b strings.Builder
	b.WriteString("E'")
	for _, c := range *v {
		switch {
		case c == '\'' || c == '\\':
			b.WriteRune(c)
			b.WriteRune(c)
		case c == '\n':
			b.WriteString(`\n`)
		case c == '\t':
			b.WriteString(`\t`)
		case steers(c):
			fmt.Fprintf(&b, `\u%04x`, c)
		default:
			b.WriteRune(c)
		}
	}
	return b.String() + "'"
}

// steers tells controls, line separators, and the marks that reorder text: all are below U+FFFF.
func steers(c rune) bool {
	return unicode.IsControl(c) || c == '\u2028' || c == '\u2029' || unicode.Is(unicode.Bidi_Control, c)
}

// definitionSQL describes a table, one row per column in order. $1 schema, $2 name. It relies on search_path being
// pg_catalog, so that types outside are printed with their schema. A type is printed with the modifier -1 and not
// NULL, or bit would mean bit(1).
const definitionSQL = `
WITH rel AS (
	SELECT c.oid, c.relkind FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
	WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')
), ix AS (
	SELECT i.* FROM pg_catalog.pg_index i JOIN rel ON i.indrelid = rel.oid
	WHERE i.indisvalid AND (i.indisprimary OR i.indisreplident)
	ORDER BY i.indisreplident DESC LIMIT 1
), k AS (
	SELECT a.attnum, 'OPERATOR(' || pg_catalog.quote_ident(n.nspname) || '.' || o.oprname || ')' AS op FROM ix
	CROSS JOIN LATERAL unnest(ix.indkey::int2[], ix.indclass::oid[]) WITH ORDINALITY AS a(attnum, opclass, ord)
	JOIN pg_catalog.pg_opclass oc ON oc.oid = a.opclass
	JOIN pg_catalog.pg_amop ao ON ao.amopfamily = oc.opcfamily AND ao.amopstrategy = 3
		AND ao.amoplefttype = oc.opcintype AND ao.amoprighttype = oc.opcintype
	JOIN pg_catalog.pg_operator o ON o.oid = ao.amopopr
	JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace
	WHERE a.ord <= ix.indnkeyatts
)
SELECT att.attname, pg_catalog.format_type(att.atttypid, -1), att.attgenerated <> '', att.attidentity = 'a',
	att.attlen = -1, coalesce(k.op, ''), rel.relkind
FROM rel JOIN pg_catalog.pg_attribute att ON att.attrelid = rel.oid AND att.attnum > 0 AND NOT att.attisdropped
LEFT JOIN k ON k.attnum = att.attnum
ORDER BY att.attnum`

// readDefinition describes a table; nil when there is none.
func readDefinition(ctx context.Context, c *pgconn.PgConn, schema, table string) (*definition, error) {
	rows, err := pg.Query(ctx, c, definitionSQL, schema, table)
	if err != nil {
		return nil, fmt.Errorf("read the definition of %s.%s: %w", schema, table, err)
	}
	if len(rows) == 0 {
		return nil, nil
	}
	d := &definition{partitioned: rows[0][6] == "p"}
	for _, r := range rows {
		op := strings.Replace(r[5], "OPERATOR(pg_catalog.=)", "=", 1) // pg_catalog is searched first anyway
		d.columns = append(d.columns, columnDef{name: r[0], typ: r[1], generated: r[2] == "t", always: r[3] == "t", large: r[4] == "t", keyOp: op})
	}
	return d, nil
}

// TableColumns lists a table's columns in their order; none when it does not exist.
func TableColumns(ctx context.Context, c *pgconn.PgConn, schema, table string) ([]string, error) {
	d, err := readDefinition(ctx, c, schema, table)
	return d.names(), err
}

// RestoreOptions say how a losing image is brought back.
type RestoreOptions struct {
	DryRun bool   // only say what would be done
	Force  bool   // also over what came after the conflict, or with an incomplete image
	By     string // who asks, for duri.event
}

const (
	// beginSQL: values are read as apply reads them, and written as any client writes.
	beginSQL = `BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL lock_timeout = '2s'; SET LOCAL session_replication_role = origin`
	// clientPathSQL gives triggers the search_path of a client: what the role and the database are set to, without the
	// schema of the role's own name, which is duri's.
	clientPathSQL = `SET LOCAL search_path TO DEFAULT;
SELECT pg_catalog.set_config('search_path', coalesce((SELECT string_agg(quote_ident(s), ', ')
	FROM unnest(current_schemas(false)) AS s WHERE s <> 'duri'), ''), true)`
)

// rollbackMax bounds how long a transaction that is given up may take to end.
const rollbackMax = 5 * time.Second

// RestoreConflict brings the losing image of a record back as a new change of this site: an ordinary transaction
// without a replication origin, in which triggers and foreign keys run, and which wins at every site by being the
// newest (the clock rule, replication.md rule 1). It leaves a row in duri.event. Restoring again does nothing.
//
// What must not be overwritten unseen gives a *RefusedError, a record that is not there a *NoRecordError. The
// connection must not be in a transaction; it is not when the call returns.
func RestoreConflict(ctx context.Context, c *pgconn.PgConn, id int64, o RestoreOptions) (Restoration, error) {
	record, err := ConflictByID(ctx, c, id)
	if err != nil {
		return Restoration{}, err
	}
	r, err := newRestorer(record, o.Force)
	if err != nil {
		return Restoration{}, err
	}
	out, err := r.transact(ctx, c, o)
	if err != nil {
		return Restoration{}, r.explain(err)
	}
	return out, nil
}

// transact runs the transaction, and rolls it back when nothing is to be written.
func (r *restorer) transact(ctx context.Context, c *pgconn.PgConn, o RestoreOptions) (out Restoration, err error) {
	done := false
	defer func() {
		if !done && !c.IsClosed() {
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackMax)
			defer cancel()
			_, rerr := pg.Rows(end, c, "ROLLBACK")
			err = errors.Join(err, rerr)
		}
	}()
	if _, err := pg.Rows(ctx, c, beginSQL); err != nil {
		return out, err
	}
	d, err := readDefinition(ctx, c, r.Schema, r.Table)
	if err == nil {
		err = r.fits(d)
	}
	if err != nil {
		return out, err
	}
	present, err := r.read(ctx, c, d, !o.DryRun)
	if err != nil {
		return out, err
	}
	out, err = r.plan(d, present)
	out.DryRun = o.DryRun
	if err != nil || o.DryRun || out.Action == ActionNone {
		return out, err
	}
	if err := r.write(ctx, c, out, o.By); err != nil {
		return out, err
	}
	_, err = pg.Rows(ctx, c, "COMMIT")
	done = err == nil
	return out, err
}

// read gives the row as it is now, locked if asked; nil: there is none.
func (r *restorer) read(ctx context.Context, c *pgconn.PgConn, d *definition, lock bool) (Image, error) {
	sql := r.selectSQL(d)
	if lock {
		sql += " FOR UPDATE"
	}
	res := c.ExecParams(ctx, sql, nil, nil, nil, nil).Read()
	if res.Err != nil {
		return nil, res.Err
	}
	if len(res.Rows) == 0 {
		return nil, nil
	}
	if len(res.Rows) > 1 {
		return nil, r.refuse("several rows have this key", r.byHand())
	}
	row := make(Image, len(d.columns))
	for i, v := range res.Rows[0] {
		row[d.columns[i].name] = nil
		if v != nil {
			s := string(v)
			row[d.columns[i].name] = &s
		}
	}
	return row, nil
}

// write changes the row, and says so in duri.event.
func (r *restorer) write(ctx context.Context, c *pgconn.PgConn, p Restoration, by string) error {
	if _, err := pg.Rows(ctx, c, clientPathSQL); err != nil {
		return err
	}
	res := c.ExecParams(ctx, p.SQL, nil, nil, nil, nil).Read()
	if res.Err != nil {
		return res.Err
	}
	if n := res.CommandTag.RowsAffected(); n != 1 {
		return r.refuse(fmt.Sprintf("the %s wrote %d rows and not one, because of a trigger or a rule of the table", p.Action, n), r.byHand())
	}
	if by == "" {
		by = "somebody"
	}
	return Event(ctx, c, "conflict_restored",
		fmt.Sprintf("%s restored the losing image of conflict %d (%s in %s.%s): %s", by, r.ID, r.Kind, r.Schema, r.Table, p.Action),
		map[string]any{"conflict": r.ID, "by": by, "schema": r.Schema, "table": r.Table, "key": r.Key, "action": p.Action, "columns": p.Columns, "forced": p.Forced})
}

// explain gives an error of the server its sentence and advice.
func (r *restorer) explain(err error) error {
	op := fmt.Sprintf("restore conflict %d in %s.%s", r.ID, r.Schema, r.Table)
	var refused *RefusedError
	state := pg.SQLState(err)
	switch {
	case errors.As(err, &refused):
		return refused
	case state == "55P03":
		return &Error{op, "a client holds the row or the table", "try again when its transaction has ended; the runbook has SQL that finds it"}
	case strings.HasPrefix(state, "23"):
		return &Error{op, err.Error(), "the losing image does not fit the data or the definition of now: change what is in the way first, or write the row yourself"}
	case pg.IsConnectionError(err):
		return &Error{op, err.Error(), "whether it was written is not known: run it again, as restoring twice changes nothing"}
	}
	return fmt.Errorf("%s: %w", op, err)
}
