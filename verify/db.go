package verify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// DBConfig says where a DB's PostgreSQL is.
type DBConfig struct {
	Name        string // the site's, for reports
	DSN         string // as the run-time role of `duri grants`
	Database    string // when the DSN does not say, or says another
	Publication string // empty: "duri"
	Connections int    // the most that are open at once; 0: 2
	// StatementTimeout bounds each statement, which is short unless the server is in trouble; 0: one minute.
	StatementTimeout time.Duration

	// What Versions and Mend need besides; without it they refuse. Site is the number of this site, SiteOf tells which
	// site a replication origin's name stands for, RepairOrigin is the name of the one under which Mend writes rows of a
	// site.
	Site         wal.SiteID
	SiteOf       func(origin string) (wal.SiteID, bool)
	RepairOrigin func(wal.SiteID) string
}

// DB is a Side over PostgreSQL. It connects when it is first used. Close it when nothing uses it any more.
type DB struct {
	cfg   DBConfig
	slots chan struct{} // one per connection in use
	holds holds

	mu   sync.Mutex // guards what follows
	idle []*pgconn.PgConn
	defs map[string]*definition // by Table.String; nil before the first look
}

var _ Mender = (*DB)(nil)

// NewDB gives a DB that is not connected yet.
func NewDB(cfg DBConfig) *DB {
	if cfg.Publication == "" {
		cfg.Publication = "duri"
	}
	if cfg.Connections <= 0 {
		cfg.Connections = 2
	}
	if cfg.StatementTimeout <= 0 {
		cfg.StatementTimeout = time.Minute
	}
	return &DB{cfg: cfg, slots: make(chan struct{}, cfg.Connections)}
}

// Name gives DBConfig.Name.
func (db *DB) Name() string { return db.cfg.Name }

// Close closes the idle connections.
func (db *DB) Close() {
	db.mu.Lock()
	idle := db.idle
	db.idle = nil
	db.mu.Unlock()
	for _, c := range idle {
		pg.Close(c)
	}
}

// settings of every session beside the wire settings.
func (db *DB) settings() map[string]string {
	return map[string]string{
		"application_name":              "duri verify",
		"search_path":                   "pg_catalog", // so that names mean the same at every site
		"default_transaction_read_only": "on",
		"row_security":                  "off", // an error instead of rows left out
		"lock_timeout":                  "10s", // somebody alters the table: do not queue behind him for long
		"statement_timeout":             fmt.Sprint(db.cfg.StatementTimeout.Milliseconds()),
		// One range is a small index scan, whatever the statistics say. Parallel plans would not keep its order.
		"jit":                             "off",
		"enable_seqscan":                  "off",
		"max_parallel_workers_per_gather": "0",
	}
}

// acquire gives a connection, which release takes back. fresh says that it was opened just now.
func (db *DB) acquire(ctx context.Context) (c *pgconn.PgConn, fresh bool, err error) {
	select {
	case db.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, false, context.Cause(ctx)
	}
	db.mu.Lock()
	if n := len(db.idle); n > 0 {
		c, db.idle = db.idle[n-1], db.idle[:n-1]
	}
	db.mu.Unlock()
	if c != nil {
		return c, false, nil
	}
	if c, err = pg.Connect(ctx, db.cfg.DSN, db.cfg.Database, db.settings()); err != nil {
		<-db.slots
		return nil, false, withHint(fmt.Errorf("connect to PostgreSQL of %s: %w", db.cfg.Name, err), pg.Hint(err))
	}
	return c, true, nil
}

// release gives a connection back, or closes it when it is broken.
func (db *DB) release(c *pgconn.PgConn) {
	if c.IsClosed() {
		pg.Close(c)
	} else {
		db.mu.Lock()
		db.idle = append(db.idle, c)
		db.mu.Unlock()
	}
	<-db.slots
}

// run executes one statement in autocommit. A connection that the server closed while it was idle is replaced once;
// the statements only read, so that repeating one is harmless.
// spent, which may be nil, is told what it has cost.
func (db *DB) run(ctx context.Context, sql string, params [][]byte, binary bool, spent *effort) (*pgconn.Result, error) {
	for {
		c, fresh, err := db.acquire(ctx)
		if err != nil {
			return nil, err
		}
		var formats []int16
		if binary {
			formats = []int16{1}
		}
		done := func() {}
		if spent != nil {
			done = spent.add(c)
		}
		res := c.ExecParams(ctx, sql, params, nil, nil, formats).Read()
		done()
		db.release(c)
		if res.Err == nil {
			return res, nil
		}
		if fresh || ctx.Err() != nil || !pg.IsConnectionError(res.Err) {
			return nil, res.Err
		}
	}
}

// query runs a statement about a table and makes the server's refusal a TableError.
func (db *DB) query(ctx context.Context, v *view, q *query, binary bool) (*pgconn.Result, error) {
	res, err := db.run(ctx, q.String(), q.params, binary, &v.spent)
	if err == nil {
		return res, nil
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	var pe *pgconn.PgError
	if errors.As(err, &pe) && !pg.IsConnectionError(err) {
		return nil, &TableError{db.cfg.Name, v.Schema + "." + v.Name, pe.Message, serverHint(pe)}
	}
	return nil, fmt.Errorf("read table %s.%s at %s: %w", v.Schema, v.Name, db.cfg.Name, err)
}

// serverHint advises about a refused statement.
func serverHint(pe *pgconn.PgError) string {
	switch {
	case pe.Code == "55P03":
		return "somebody holds an exclusive lock on the table: compare again when the schema change is done"
	case pe.Code == "57014":
		return "the server is overloaded, or rows are huge: compare again with smaller ranges"
	case strings.HasPrefix(pe.Code, "42") && pe.Code != "42501":
		return "the table was altered while it was compared: compare again"
	}
	return pg.Hint(pe)
}

// Tables lists the published tables.
func (db *DB) Tables(ctx context.Context) ([]Table, error) {
	defs, err := db.load(ctx)
	if err != nil {
		return nil, err
	}
	tables := make([]Table, len(defs))
	for i, d := range defs {
		tables[i] = d.table()
	}
	return tables, nil
}

// load reads the definitions and keeps them for the calls that follow.
func (db *DB) load(ctx context.Context) ([]*definition, error) {
	res, err := db.run(ctx, tablesSQL, [][]byte{[]byte(db.cfg.Publication)}, false, nil)
	if err != nil {
		return nil, withHint(fmt.Errorf("list tables at %s: %w", db.cfg.Name, err), pg.Hint(err))
	}
	var defs []*definition
	byName := map[string]*definition{}
	for _, row := range res.Rows {
		d := &definition{}
		if err := json.Unmarshal(row[0], d); err != nil {
			return nil, fmt.Errorf("list tables at %s: %w", db.cfg.Name, err)
		}
		slices.SortFunc(d.Columns, func(a, b Column) int { return strings.Compare(a.Name, b.Name) })
		defs = append(defs, d)
		byName[d.Schema+"."+d.Name] = d
	}
	if len(defs) == 0 {
		if err := db.checkPublication(ctx); err != nil {
			return nil, err
		}
	}
	db.mu.Lock()
	db.defs = byName
	db.mu.Unlock()
	return defs, nil
}

// checkPublication keeps two databases that were never set up from being called equal.
func (db *DB) checkPublication(ctx context.Context) error {
	res, err := db.run(ctx, publicationSQL, [][]byte{[]byte(db.cfg.Publication)}, false, nil)
	if err != nil {
		return fmt.Errorf("look for publication %s at %s: %w", db.cfg.Publication, db.cfg.Name, err)
	}
	if len(res.Rows) == 0 {
		return withHint(fmt.Errorf("list tables at %s: there is no publication %s", db.cfg.Name, db.cfg.Publication),
			"run the SQL that `duri grants` prints as superuser in this database")
	}
	return nil
}

// table converts a definition.
func (d *definition) table() Table {
	t := Table{Schema: d.Schema, Name: d.Name, Columns: d.Columns, Order: d.order(), HashID: d.HashID, Rows: d.Rows, Bytes: d.Bytes}
	for _, k := range d.Key {
		t.Key = append(t.Key, k.Name)
	}
	return t
}

// view checks what a caller, who may be another site, asks for. Only published tables are read, and nothing of the
// request but names that exist here becomes SQL.
func (db *DB) view(ctx context.Context, t Table) (*view, error) {
	db.mu.Lock()
	defs := db.defs
	db.mu.Unlock()
	if defs == nil {
		if _, err := db.load(ctx); err != nil {
			return nil, err
		}
		db.mu.Lock()
		defs = db.defs
		db.mu.Unlock()
	}
	refuse := func(format string, args ...any) error {
		return &TableError{db.cfg.Name, t.String(), fmt.Sprintf(format, args...), "make the tables' definitions equal at both sites, and compare again"}
	}
	d := defs[t.String()]
	if d == nil || d.Schema != t.Schema {
		return nil, refuse("it is not published here")
	}
	v := &view{definition: d, asked: t.Columns}
	for _, c := range t.Columns {
		if _, ok := columnByName(d.Columns, c.Name); !ok {
			return nil, refuse("column %q is not published here", c.Name)
		}
		v.columns = append(v.columns, "t."+pg.QuoteIdent(c.Name))
	}
	if len(t.Key) > 0 {
		if !slices.Equal(t.Key, d.table().Key) {
			return nil, refuse("its key is (%s), not (%s)", strings.Join(d.table().Key, ", "), strings.Join(t.Key, ", "))
		}
		v.key = d.Key
	}
	return v, nil
}

// checkRange refuses what would make wrong SQL.
func checkRange(v *view, r Range) error {
	for _, k := range append([]Key{r.After, r.UpTo}, r.Keys...) {
		if k != nil && (len(k) != len(v.key) || len(v.key) == 0) {
			return fmt.Errorf("key with %d values for a table with %d key columns", len(k), len(v.key))
		}
	}
	if ordered(r) && (len(v.key) == 0 || v.order() == "") {
		return errors.New("range in key order of a table without one")
	}
	if p := r.Parts; p != nil && (p.Bits < 0 || p.Bits > partBitsMax) {
		return fmt.Errorf("parts of %d bits", p.Bits)
	}
	return nil
}

// ordered reports that a range is a piece of the key order.
func ordered(r Range) bool { return r.Keys == nil && r.Parts == nil && r.Hashes == nil }

// prepare is view and checkRange.
func (db *DB) prepare(ctx context.Context, t Table, r Range) (*view, error) {
	v, err := db.view(ctx, t)
	if err != nil {
		return nil, err
	}
	if err := checkRange(v, r); err != nil {
		return nil, &TableError{db.cfg.Name, t.String(), err.Error(), ""}
	}
	return v, nil
}

// Bounds walks the key's index, a statement per key.
func (db *DB) Bounds(ctx context.Context, t Table, r Range, rows int) ([]Key, error) {
	v, err := db.prepare(ctx, t, r)
	if err != nil {
		return nil, err
	}
	if !ordered(r) || rows < 1 {
		return nil, &TableError{db.cfg.Name, t.String(), "bounds of a range without order", ""}
	}
	var keys []Key
	for {
		res, err := db.query(ctx, v, v.boundSQL(r, rows), false)
		if err != nil {
			return nil, err
		}
		if len(res.Rows) == 0 {
			return keys, nil
		}
		r.After = keyOf(res.Rows[0])
		keys = append(keys, r.After)
		if r.First {
			return keys, nil
		}
	}
}

func keyOf(values [][]byte) Key {
	k := make(Key, len(values))
	for i, v := range values {
		k[i] = string(v)
	}
	return k
}

// Hash computes a range's digest inside PostgreSQL; for Parts, from the rows' hashes in this process, which takes 16
// bytes a row.
func (db *DB) Hash(ctx context.Context, t Table, r Range, limit int) (Sum, error) {
	v, err := db.prepare(ctx, t, r)
	if err != nil {
		return Sum{}, err
	}
	sum, err := db.hash(ctx, v, r, limit)
	if sum.Seconds = v.spent.took.Seconds(); !v.spent.unknown {
		sum.CPU = v.spent.cpu.Seconds()
	}
	return sum, err
}

func (db *DB) hash(ctx context.Context, v *view, r Range, limit int) (Sum, error) {
	if r.Parts != nil {
		return db.hashParts(ctx, v, r)
	}
	if !ordered(r) {
		return Sum{}, &TableError{db.cfg.Name, v.Schema + "." + v.Name, "digest of a list of rows", ""}
	}
	q, err := v.hashRangeSQL(r, limit)
	if err != nil {
		return Sum{}, err
	}
	res, err := db.query(ctx, v, q, false)
	if err != nil {
		return Sum{}, err
	}
	var sum Sum
	if _, err := fmt.Sscan(string(res.Rows[0][0]), &sum.Rows); err != nil {
		return Sum{}, fmt.Errorf("read count of %s.%s: %w", v.Schema, v.Name, err)
	}
	if sum.Truncated = sum.Rows > int64(limit); !sum.Truncated {
		sum.Digest = string(res.Rows[0][1])
	}
	return sum, nil
}

// Rows reads keys and hashes of rows, and their images if the range says so.
func (db *DB) Rows(ctx context.Context, t Table, r Range, limit int) ([]Row, error) {
	v, err := db.prepare(ctx, t, r)
	if err != nil {
		return nil, err
	}
	if r.Parts != nil || r.Hashes != nil {
		rows, err := db.scanRows(ctx, v, r, limit)
		if err == nil && r.ImageBytes < 0 {
			err = db.portable(t, rows)
		}
		return rows, err
	}
	q, err := v.rowsSQL(r, limit)
	if err != nil {
		return nil, err
	}
	res, err := db.query(ctx, v, q, false)
	if err != nil {
		return nil, err
	}
	rows := make([]Row, len(res.Rows))
	for i, values := range res.Rows {
		rows[i] = v.row(values, r.ImageBytes)
	}
	return rows, nil
}

// portable refuses rows to be written elsewhere whose values would not survive the way, which is JSON.
func (db *DB) portable(t Table, rows []Row) error {
	for _, r := range rows {
		for _, v := range r.Image {
			if v != nil && !utf8.ValidString(*v) {
				return &TableError{
					db.cfg.Name, t.String(), "a value is not valid UTF-8, so rows cannot be written at another site",
					"repair the row by hand: the database's encoding is SQL_ASCII",
				}
			}
		}
	}
	return nil
}

// row converts what rowsSQL and chunkRowsSQL give.
func (v *view) row(values [][]byte, imageBytes int) Row {
	n := len(v.key)
	row := Row{Hash: string(values[n]), Copies: 1}
	if n > 0 {
		row.Key, row.Stamp = keyOf(values[:n]), string(values[n+1])
		n++
	}
	for _, value := range values[n+1:] {
		row.Image = append(row.Image, cutImage(value, imageBytes))
	}
	return row
}
