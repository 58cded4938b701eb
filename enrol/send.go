package enrol

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/decode"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

const applicationName = "duri_enrol"

// SourceConfig says what Send reads.
type SourceConfig struct {
	DSN      string // run-time role; it needs what `duri grants` gives
	Database string
	Schemas  []string // empty: all user schemas
	BinDir   string   // of pg_dump; empty: PATH and where distributions install it
	// Slot names the temporary slot that gives the snapshot; empty: duri_enrol_ and the backend's PID. It lasts for
	// seconds, but needs a free one of max_replication_slots.
	Slot        string
	Publication string // empty: duri
}

// Send writes the database's content to w: the definitions of everything in the schemas, the rows of the published
// tables, and the sequences, all as of one position (Header.At) while writers go on.
//
// The first step waits for the transactions that are running. Until the end it holds a snapshot and ACCESS SHARE locks:
// writers do not notice, ALTER TABLE waits. Several Sends may run at once. When it fails for another reason than w it
// also tells the reader why. It blocks as w does; end w to end it early.
func Send(ctx context.Context, cfg SourceConfig, w io.Writer) error {
	s := &sender{cfg: cfg, out: newFrameWriter(w)}
	if s.cfg.Publication == "" {
		s.cfg.Publication = grants.Publication
	}
	err := s.run(ctx)
	if err != nil && s.out.failed == nil {
		x := failure{Text: err.Error()}
		var hinted interface{ HintText() string }
		if errors.As(err, &hinted) {
			x.Hint = hinted.HintText()
		}
		// What counts is err; a target that cannot be told sees the stream end early.
		_ = s.out.json(frameFailure, x)
		_ = s.out.flush()
	}
	return err
}

type sender struct {
	cfg    SourceConfig
	out    *frameWriter
	conn   *pgconn.PgConn // the transaction that copies
	header Header
	totals totals
}

// settings of the sessions here. What a DBA limits for clients must not end a long copy half-way.
func settings(extra map[string]string) map[string]string {
	all := map[string]string{
		"application_name":                    applicationName,
		"search_path":                         "pg_catalog",
		"row_security":                        "off", // an error, not fewer rows, where a policy would hide some
		"statement_timeout":                   "0",
		"idle_in_transaction_session_timeout": "0",
		"lock_timeout":                        "30s",
		"jit":                                 "off",
	}
	maps.Copy(all, extra)
	return all
}

func (s *sender) run(ctx context.Context) (err error) {
	if s.conn, err = pg.Connect(ctx, s.cfg.DSN, s.cfg.Database, settings(nil)); err != nil {
		return wrap("connect to the source", err)
	}
	defer closed(s.conn)
	server, err := pg.ServerVersion(ctx, s.conn)
	if err != nil {
		return wrap("read the source's version", err)
	}
	program, err := findDump(ctx, s.cfg.BinDir, server/10000)
	if err != nil {
		return err
	}
	pre, post, err := s.snapshot(ctx, program)
	if err != nil {
		return err
	}
	if err := s.out.json(frameHeader, s.header); err != nil {
		return err
	}
	if err := s.out.text(framePreData, pre); err != nil {
		return err
	}
	for i := range s.header.Tables {
		if err := s.table(ctx, i); err != nil {
			return err
		}
	}
	return s.finish(ctx, post)
}

// closed closes a connection and waits until pgconn's own clean-up after a broken COPY is over, which is bounded.
func closed(c *pgconn.PgConn) {
	pg.Close(c)
	<-c.CleanupDone()
}

// snapshot opens the copying transaction at an exported snapshot, fills the header, and dumps the schema under the same
// snapshot. Afterwards the replication connection is not needed any more: the transaction keeps the snapshot, and the
// source's agent keeps the changes after it.
func (s *sender) snapshot(ctx context.Context, p program) (pre, post string, err error) {
	// An exporting session counts as idle in a transaction, so a limit on that must not apply to it.
	repl, err := pg.Connect(ctx, s.cfg.DSN, s.cfg.Database, settings(map[string]string{"replication": "database"}))
	if err != nil {
		return "", "", wrap("open a replication connection to the source", err)
	}
	defer closed(repl)
	slot := s.cfg.Slot
	if slot == "" {
		slot = fmt.Sprintf("%s_%d", applicationName, s.conn.PID())
	}
	snap, err := decode.ExportSnapshot(ctx, repl, slot)
	if err != nil {
		return "", "", wrap("take a snapshot of the source", err)
	}
	if err := s.begin(ctx, snap); err != nil {
		return "", "", err
	}
	d, err := newDump(p, s.conn, s.cfg.DSN, s.cfg.Database, snap.Name, s.cfg.Schemas)
	if err != nil {
		return "", "", fmt.Errorf("prepare pg_dump: %w", err)
	}
	if pre, err = d.section(ctx, "pre-data"); err != nil {
		return "", "", err
	}
	if post, err = d.section(ctx, "post-data"); err != nil {
		return "", "", err
	}
	needed, err := s.extensionSchemas(ctx)
	return needed + pre, post, err
}

// applied reads how far each other site has been applied in the snapshot of c: what its apply transactions say.
func applied(ctx context.Context, c *pgconn.PgConn) (map[wal.SiteID]wal.LSN, error) {
	rows, err := pg.Rows(ctx, c, "SELECT pg_catalog.to_regclass('duri.applied') IS NOT NULL")
	if err != nil || rows[0][0] != "t" {
		return nil, err
	}
	if rows, err = pg.Rows(ctx, c, "SELECT origin, max(to_lsn) FROM duri.applied GROUP BY origin"); err != nil {
		return nil, err
	}
	out := map[wal.SiteID]wal.LSN{}
	for _, r := range rows {
		id, err1 := strconv.ParseUint(r[0], 10, 16)
		lsn, err2 := wal.ParseLSN(r[1])
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		out[wal.SiteID(id)] = lsn
	}
	return out, nil
}

// begin starts the copying transaction at the snapshot, lists what to send, and locks it against redefinition.
func (s *sender) begin(ctx context.Context, snap decode.Snapshot) error {
	// Every commit in the snapshot took its timestamp before this.
	sql := "SELECT (extract(epoch from pg_catalog.clock_timestamp()) * 1000000)::int8 - 946684800000000, pg_catalog.current_setting('server_encoding'), pg_catalog.current_database(), pg_catalog.current_setting('server_version_num')"
	now, err := pg.Rows(ctx, s.conn, sql)
	if err != nil {
		return wrap("read the source's clock", err)
	}
	micros, err1 := strconv.ParseInt(now[0][0], 10, 64)
	version, err2 := strconv.Atoi(now[0][3])
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("read the source's clock: %w", err)
	}
	h := &s.header
	h.At, h.Time, h.Encoding, h.Database, h.Server, h.Schemas = snap.At, wal.Time(micros), now[0][1], now[0][2], version, s.cfg.Schemas
	_, err = pg.Rows(ctx, s.conn, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT "+pg.QuoteLiteral(snap.Name))
	if err != nil {
		return wrap("copy from the snapshot", err)
	}
	if h.Applied, err = applied(ctx, s.conn); err != nil {
		return wrap("read the source's apply progress", err)
	}
	files, err := s.list(ctx)
	if err != nil {
		return err
	}
	return s.lock(ctx, files)
}

// inScope is a condition on a namespace alias n: a user schema, and one of those asked for.
func inScope(schemas []string) string {
	if len(schemas) == 0 {
		return "n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'duri')"
	}
	quoted := make([]string, len(schemas))
	for i, s := range schemas {
		quoted[i] = pg.QuoteLiteral(s)
	}
	return "n.nspname IN (" + strings.Join(quoted, ", ") + ")"
}

// notOfExtension is a condition on a class alias c: an extension's tables come, with their content, with the extension.
const notOfExtension = "NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')"

// list fills the header's tables and materialized views, and gives each table's file in the snapshot, by OID.
func (s *sender) list(ctx context.Context) (files map[string]string, err error) {
	pub, err := pg.Query(ctx, s.conn, "SELECT pubviaroot FROM pg_catalog.pg_publication WHERE pubname = $1", s.cfg.Publication)
	if err != nil {
		return nil, wrap("read the publication", err)
	}
	const op = "copy the published tables"
	if len(pub) == 0 {
		return nil, &Error{Op: op, Text: fmt.Sprintf("publication %s does not exist at the source", s.cfg.Publication), Hint: pg.Hint(&pgconn.PgError{Code: "42501"})}
	}
	if pub[0][0] == "t" {
		return nil, &Error{Op: op, Text: fmt.Sprintf("publication %s has publish_via_partition_root", s.cfg.Publication), Hint: "ALTER PUBLICATION " + pg.QuoteIdent(s.cfg.Publication) + " SET (publish_via_partition_root = false)"}
	}
	rows, err := pg.Query(ctx, s.conn, `SELECT c.oid, n.nspname, c.relname, greatest(c.reltuples, 0)::int8, c.relfilenode,
			a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attgenerated <> ''
		FROM pg_catalog.pg_publication_tables p
		JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
		JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
		LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
		WHERE p.pubname = $1 AND c.relkind = 'r' AND `+inScope(s.cfg.Schemas)+" AND "+notOfExtension+`
		ORDER BY n.nspname, c.relname, a.attnum`, s.cfg.Publication)
	if err != nil {
		return nil, wrap("list the published tables", err)
	}
	files = map[string]string{}
	for _, r := range rows {
		if _, seen := files[r[0]]; !seen {
			n, err := strconv.ParseInt(r[3], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("list the published tables: %w", err)
			}
			s.header.Tables = append(s.header.Tables, Table{Name: Name{r[1], r[2]}, Rows: n})
			files[r[0]] = r[4]
		}
		if r[5] != "" {
			t := &s.header.Tables[len(s.header.Tables)-1]
			t.Columns = append(t.Columns, Column{r[5], r[6], r[7] == "t"})
		}
	}
	views, err := pg.Rows(ctx, s.conn, `SELECT n.nspname, c.relname FROM pg_catalog.pg_class c
		JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind = 'm' AND c.relispopulated AND `+inScope(s.cfg.Schemas)+" AND "+notOfExtension+" ORDER BY c.oid")
	for _, r := range views {
		s.header.MatViews = append(s.header.MatViews, Name{r[0], r[1]})
	}
	return files, wrap("list the materialized views", err)
}

// lockTables is how many tables one LOCK statement names.
const lockTables = 500

// lock takes ACCESS SHARE locks, so that no table is redefined under the copy. One that was rewritten or truncated
// between the snapshot and the lock would look empty in the snapshot (the manual's caveat on MVCC), which its file
// tells.
func (s *sender) lock(ctx context.Context, files map[string]string) error {
	for tables := s.header.Tables; len(tables) > 0; {
		n := min(len(tables), lockTables)
		names := make([]string, n)
		for i, t := range tables[:n] {
			names[i] = "ONLY " + t.sql()
		}
		if _, err := pg.Rows(ctx, s.conn, "LOCK TABLE "+strings.Join(names, ", ")+" IN ACCESS SHARE MODE"); err != nil {
			return wrap("lock the published tables for reading", err)
		}
		tables = tables[n:]
	}
	// pg_relation_filenode looks past the snapshot.
	rows, err := pg.Rows(ctx, s.conn, `SELECT c.oid, n.nspname, c.relname, pg_catalog.pg_relation_filenode(c.oid)
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind = 'r' AND pg_catalog.pg_relation_filenode(c.oid) IS DISTINCT FROM nullif(c.relfilenode, 0)`)
	if err != nil {
		return wrap("look at the tables' files", err)
	}
	for _, r := range rows {
		if files[r[0]] == r[3] || files[r[0]] == "" {
			continue
		}
		return &Error{Op: "copy the published tables", Text: fmt.Sprintf("%s.%s was rewritten or truncated while the snapshot was taken", r[1], r[2]), Hint: "join again"}
	}
	return nil
}

// extensionSchemas makes the schemas that extensions live in when only chosen schemas are dumped.
func (s *sender) extensionSchemas(ctx context.Context) (string, error) {
	if len(s.cfg.Schemas) == 0 {
		return "", nil
	}
	rows, err := pg.Rows(ctx, s.conn, `SELECT DISTINCT n.nspname FROM pg_catalog.pg_extension e
		JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
		WHERE e.oid >= 16384 AND n.nspname !~ '^pg_' AND NOT EXISTS (
			SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_namespace'::regclass AND d.objid = n.oid AND d.deptype = 'e')`)
	if err != nil {
		return "", wrap("list the extensions' schemas", err)
	}
	var b strings.Builder
	for _, r := range rows {
		fmt.Fprintf(&b, "CREATE SCHEMA IF NOT EXISTS %s;\n", pg.QuoteIdent(r[0]))
	}
	return b.String(), nil
}

// table sends one table.
func (s *sender) table(ctx context.Context, index int) error {
	t := s.header.Tables[index]
	if err := s.out.json(frameTable, index); err != nil {
		return err
	}
	w := &tableWriter{f: s.out}
	sql := fmt.Sprintf("COPY (SELECT %s FROM ONLY %s) TO STDOUT", t.copied(), t.sql())
	tag, err := s.conn.CopyTo(ctx, w, sql)
	if err == nil {
		err = w.flush()
	}
	if s.out.failed != nil {
		return fmt.Errorf("send table %s: %w", t, s.out.failed)
	}
	if err != nil {
		return wrap("copy table "+t.String(), err)
	}
	if tag.RowsAffected() != w.sum.Rows {
		return fmt.Errorf("copy table %s: the server says %d rows and sent %d", t, tag.RowsAffected(), w.sum.Rows)
	}
	s.totals.Tables++
	s.totals.Rows += w.sum.Rows
	s.totals.Bytes += w.sum.Bytes
	return s.out.json(frameTableEnd, w.sum)
}

// finish sends what comes after the data.
func (s *sender) finish(ctx context.Context, post string) error {
	seqs, err := s.sequences(ctx)
	if err != nil {
		return err
	}
	if err := s.out.json(frameSequences, seqs); err != nil {
		return err
	}
	if err := s.out.text(framePostData, post); err != nil {
		return err
	}
	if err := s.out.json(frameEnd, s.totals); err != nil {
		return err
	}
	return s.out.flush()
}

// sequences reads the sequences' present states, which are not older than the snapshot's.
func (s *sender) sequences(ctx context.Context) ([]sequence, error) {
	names, err := pg.Rows(ctx, s.conn, `SELECT n.nspname, c.relname FROM pg_catalog.pg_class c
		JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND `+inScope(s.cfg.Schemas)+" AND "+notOfExtension+" ORDER BY 1, 2")
	if err != nil {
		return nil, wrap("list the sequences", err)
	}
	out := []sequence{}
	for _, r := range names {
		q := sequence{Name: Name{r[0], r[1]}}
		state, err := pg.Rows(ctx, s.conn, "SELECT last_value, is_called FROM "+q.sql())
		if err == nil {
			q.Last, err = strconv.ParseInt(state[0][0], 10, 64)
		}
		if err != nil {
			return nil, wrap("read sequence "+q.String(), err)
		}
		q.Called = state[0][1] == "t"
		out = append(out, q)
	}
	return out, nil
}
