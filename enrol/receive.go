package enrol

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// TargetConfig says where Receive writes.
type TargetConfig struct {
	DSN string // run-time role
	// SetupDSN is a superuser's connection string. When it is set all of Receive runs on it, because owners, extensions
	// and the publication need a superuser. Without it the schema's objects must be such that the run-time role may
	// create them, or the tables must be there already.
	SetupDSN string
	Database string
	Origin   string   // replication origin that stands for the source, see apply.OriginName
	Role     string   // run-time role, for the grants; empty: duri
	Schemas  []string // to publish; empty: all user schemas
	// SynchronousCommit of the one transaction: on (default), local, or remote_apply. With on it waits for the servers in
	// synchronous_standby_names: when that names this site's own agent, the agent must be streaming, or choose local.
	SynchronousCommit string
	// Within runs in the transaction, just before it commits: what it writes is there exactly if the content is. The
	// session's search_path is pg_catalog, and its session_replication_role replica.
	Within func(ctx context.Context, c *pgconn.PgConn, r Result) error
}

// Receive reads what Send writes and commits it as one transaction, with the source's replication origin: the rows carry
// Header.Time as their version, and the origin's progress is Header.At.
//
// A target that has rows in a user table of the schemas, or only a part of the tables, is refused, and nothing happens
// to it. If it has none of the tables their definitions are created; if it has all, with the same columns and empty,
// only rows are copied. On any error everything is rolled back (also when the agent or the server dies), and joining
// again works. The error of a connection that broke during COMMIT does not tell whether it happened: Within's mark
// does.
//
// progress may be nil; it is called from another goroutine, but never twice at once, and must not block. Receive blocks
// as r does: when r is an io.Closer it is closed once ctx has ended, so that a silent source cannot hold it. When it
// returns an error because the connection to PostgreSQL broke, r may still be read from until the caller closes it.
func Receive(ctx context.Context, cfg TargetConfig, r io.Reader, progress func(Progress)) (Result, error) {
	if c, ok := r.(io.Closer); ok {
		stop := context.AfterFunc(ctx, func() { _ = c.Close() }) // the read that it ends gives the error
		defer stop()
	}
	if progress == nil {
		progress = func(Progress) {}
	}
	t := &target{cfg: cfg, report: progress, begun: time.Now()}
	err := t.run(ctx, r)
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("enrol: %w", context.Cause(ctx))
	}
	if err != nil {
		return Result{}, err
	}
	return t.result, nil
}

type target struct {
	cfg      TargetConfig
	in       *frameReader
	conn     *pgconn.PgConn
	header   Header
	known    map[string]bool // parameters that the server knows
	result   Result
	progress Progress
	report   func(Progress)
	begun    time.Time
	told     time.Time
}

// run does everything. Before begin nothing is written but the origin's name.
func (t *target) run(ctx context.Context, r io.Reader) (err error) {
	if t.in, err = newFrameReader(r); err != nil {
		return err
	}
	if err := t.in.expect(frameHeader, &t.header); err != nil {
		return err
	}
	if err := t.connect(ctx); err != nil {
		return err
	}
	defer closed(t.conn)
	if err := t.check(ctx); err != nil {
		return err
	}
	if err := t.takeOrigin(ctx); err != nil {
		return err
	}
	if err := t.transaction(ctx); err != nil {
		t.rollback(ctx)
		return err
	}
	t.tell("analyze", true)
	t.analyze(ctx)
	return nil
}

// rollback ends the transaction before Receive returns, so that joining again at once finds the origin free.
func (t *target) rollback(ctx context.Context) {
	if !t.conn.IsClosed() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		// Closing the connection does the same, a little later.
		_, _ = pg.Rows(ctx, t.conn, "ROLLBACK; SELECT pg_catalog.pg_replication_origin_session_reset()")
	}
}

func (t *target) connect(ctx context.Context) (err error) {
	dsn := t.cfg.DSN
	if t.cfg.SetupDSN != "" {
		dsn = t.cfg.SetupDSN
	}
	commit := t.cfg.SynchronousCommit
	if commit == "" {
		commit = "on"
	}
	t.conn, err = pg.Connect(ctx, dsn, t.cfg.Database, settings(map[string]string{
		"session_replication_role": "replica", // no triggers, no event triggers, no foreign key checks per row
		"synchronous_commit":       commit,
	}))
	return wrap("connect to the target", err)
}

// clockSkewMax is how far the source's clock may be ahead. A little is waited for.
const clockSkewMax = time.Minute

// check looks at the server before anything is changed.
func (t *target) check(ctx context.Context) error {
	rows, err := pg.Rows(ctx, t.conn, "SELECT pg_catalog.current_setting('server_encoding'), pg_catalog.pg_is_in_recovery()")
	if err != nil {
		return wrap("look at the target", err)
	}
	const op = "enrol into database"
	if enc := rows[0][0]; enc != "UTF8" && enc != t.header.Encoding {
		return &Error{Op: op, Text: fmt.Sprintf("its encoding is %s, the source's is %s", enc, t.header.Encoding), Hint: "create the database with ENCODING 'UTF8'"}
	}
	if rows[0][1] == "t" {
		return &Error{Op: op, Text: "the server is a standby", Hint: "let postgres.dsn point to the primary"}
	}
	ahead, err := t.ahead(ctx)
	if err != nil {
		return err
	}
	if ahead > clockSkewMax {
		return &Error{Op: op, Text: fmt.Sprintf("the source's clock is %s ahead of this server's", ahead.Round(time.Second)), Hint: "set the clocks (NTP) and join again"}
	}
	settings, err := pg.Rows(ctx, t.conn, "SELECT name FROM pg_catalog.pg_settings")
	if err != nil {
		return wrap("look at the target", err)
	}
	t.known = map[string]bool{}
	for _, r := range settings {
		t.known[r[0]] = true
	}
	return nil
}

// ahead is by how much the snapshot's time lies ahead of the target server's clock.
func (t *target) ahead(ctx context.Context) (time.Duration, error) {
	rows, err := pg.Rows(ctx, t.conn, "SELECT (extract(epoch from pg_catalog.clock_timestamp()) * 1000000)::int8 - 946684800000000")
	if err != nil {
		return 0, wrap("read the target's clock", err)
	}
	now, err := strconv.ParseInt(rows[0][0], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read the target's clock: %w", err)
	}
	return t.header.Time.Sub(wal.Time(now)), nil
}

// originWaitMax is how long the backend of an attempt that was cut off may keep the origin.
const originWaitMax = 15 * time.Second

// takeOrigin makes the origin, new if it has progress from a former life: progress never goes back, and apply would
// start too late. The session has it then.
func (t *target) takeOrigin(ctx context.Context) error {
	name := pg.QuoteLiteral(t.cfg.Origin)
	renew := fmt.Sprintf(`SELECT pg_catalog.pg_replication_origin_drop(%[1]s)
		WHERE pg_catalog.pg_replication_origin_oid(%[1]s) IS NOT NULL
			AND pg_catalog.pg_replication_origin_progress(%[1]s, true) > '0/0'`, name)
	create := fmt.Sprintf(`SELECT pg_catalog.pg_replication_origin_create(%[1]s)
		WHERE pg_catalog.pg_replication_origin_oid(%[1]s) IS NULL`, name)
	setup := fmt.Sprintf("SELECT pg_catalog.pg_replication_origin_session_setup(%s)", name)
	deadline := time.Now().Add(originWaitMax)
	for {
		err := t.empty(ctx) // before an origin is thrown away
		for _, sql := range []string{renew, create, setup} {
			if err == nil {
				_, err = pg.Rows(ctx, t.conn, sql)
			}
		}
		switch {
		case err == nil:
			return nil
		case pg.SQLState(err) != "55006":
			return wrap("take replication origin "+t.cfg.Origin, err)
		case time.Now().After(deadline):
			return &Error{Op: "take replication origin " + t.cfg.Origin, Err: err, Hint: "stop the other agent of this site"}
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// userTables lists the tables of the schemas that hold rows of their own.
func (t *target) userTables(ctx context.Context) ([]Name, error) {
	rows, err := pg.Rows(ctx, t.conn, `SELECT n.nspname, c.relname FROM pg_catalog.pg_class c
		JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND `+inScope(t.header.Schemas)+" AND "+notOfExtension+" ORDER BY 1, 2")
	if err != nil {
		return nil, wrap("list the target's tables", err)
	}
	out := make([]Name, len(rows))
	for i, r := range rows {
		out[i] = Name{r[0], r[1]}
	}
	return out, nil
}

// empty refuses a target that has rows.
func (t *target) empty(ctx context.Context) error {
	names, err := t.userTables(ctx)
	if err != nil {
		return err
	}
	for _, n := range names {
		rows, err := pg.Rows(ctx, t.conn, "SELECT EXISTS (SELECT FROM ONLY "+n.sql()+")")
		if err != nil {
			return wrap("look into table "+n.String(), err)
		}
		if rows[0][0] == "t" {
			return &Error{Op: "enrol into database", Text: fmt.Sprintf("table %s has rows already", n), Hint: "a site joins empty: drop or TRUNCATE its tables, or make this site the seed"}
		}
	}
	return nil
}

// transaction is the one that holds everything.
func (t *target) transaction(ctx context.Context) error {
	// An xid at once: an empty database has to leave its progress too.
	_, err := pg.Rows(ctx, t.conn, fmt.Sprintf(`BEGIN ISOLATION LEVEL READ COMMITTED;
		SELECT pg_catalog.pg_replication_origin_xact_setup('%s', '%s');
		SELECT pg_catalog.pg_current_xact_id()`, t.header.At, t.header.Time))
	if err != nil {
		return wrap("begin the enrolment", err)
	}
	if err := t.grant(ctx); err != nil { // the role first: the script gives it privileges
		return err
	}
	create, err := t.plan(ctx)
	if err != nil {
		return err
	}
	if err := t.schema(ctx, create); err != nil {
		return err
	}
	if err := t.data(ctx); err != nil {
		return err
	}
	if err := t.after(ctx, create); err != nil {
		return err
	}
	if err := t.publish(ctx); err != nil {
		return err
	}
	t.result = Result{
		At: t.header.At, Time: t.header.Time, Rows: t.progress.Rows, Bytes: t.progress.Bytes, Tables: t.progress.Tables,
		SchemaMade: create, Unrefreshed: t.result.Unrefreshed, Applied: t.header.Applied,
	}
	if t.cfg.Within != nil {
		if err := t.cfg.Within(ctx, t.conn, t.result); err != nil {
			return err
		}
	}
	return t.commit(ctx)
}

// plan decides between creating the schema and copying into tables that are there, and locks the latter.
func (t *target) plan(ctx context.Context) (create bool, err error) {
	have, err := t.columns(ctx)
	if err != nil {
		return false, err
	}
	create, problem := decide(t.header.Tables, have)
	if problem != nil || create {
		return create, problem
	}
	var names []string
	for _, table := range t.header.Tables {
		names = append(names, "ONLY "+table.sql())
	}
	// Without this a client could write between our look and our commit.
	if len(names) > 0 {
		if _, err := pg.Rows(ctx, t.conn, "LOCK TABLE "+strings.Join(names, ", ")+" IN SHARE ROW EXCLUSIVE MODE"); err != nil {
			return false, wrap("lock the tables", err)
		}
	}
	return false, t.empty(ctx)
}

// columns reads the columns of the target's tables.
func (t *target) columns(ctx context.Context) (map[Name][]Column, error) {
	rows, err := pg.Rows(ctx, t.conn, `SELECT n.nspname, c.relname, a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attgenerated <> ''
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
		WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND `+inScope(t.header.Schemas)+" AND "+notOfExtension+" ORDER BY a.attnum")
	if err != nil {
		return nil, wrap("read the target's tables", err)
	}
	have := map[Name][]Column{}
	for _, r := range rows {
		n := Name{r[0], r[1]}
		if _, ok := have[n]; !ok {
			have[n] = nil
		}
		if r[2] != "" {
			have[n] = append(have[n], Column{r[2], r[3], r[4] == "t"})
		}
	}
	return have, nil
}

// decide compares the source's tables with the target's: none there means create, all there means copy into them.
// It is pure.
func decide(want []Table, have map[Name][]Column) (create bool, err error) {
	const op, again = "enrol into database", "drop the tables here, or create all of them with the source's definitions, and join again"
	var missing, found []Name
	for _, t := range want {
		if _, ok := have[t.Name]; ok {
			found = append(found, t.Name)
		} else {
			missing = append(missing, t.Name)
		}
	}
	if len(found) == 0 {
		return true, nil
	}
	if len(missing) > 0 {
		return false, &Error{Op: op, Text: fmt.Sprintf("table %s exists and table %s does not", found[0], missing[0]), Hint: again}
	}
	for _, t := range want {
		if diff := differ(t.Columns, have[t.Name]); diff != "" {
			return false, &Error{Op: op, Text: fmt.Sprintf("table %s differs from the source's: %s", t.Name, diff), Hint: again}
		}
	}
	return false, nil
}

// differ says how two lists of columns differ, whatever their order; empty when they do not. It is pure.
func differ(want, have []Column) string {
	byName := map[string]Column{}
	for _, c := range have {
		byName[c.Name] = c
	}
	for _, c := range want {
		h, ok := byName[c.Name]
		switch {
		case !ok:
			return fmt.Sprintf("column %s is missing", c.Name)
		case h.Type != c.Type:
			return fmt.Sprintf("column %s is %s, not %s", c.Name, h.Type, c.Type)
		case h.Generated != c.Generated:
			return fmt.Sprintf("column %s is generated at one of them only", c.Name)
		}
		delete(byName, c.Name)
	}
	for _, c := range have {
		if _, ok := byName[c.Name]; ok {
			return fmt.Sprintf("column %s exists here only", c.Name)
		}
	}
	return ""
}

// schema reads the pre-data SQL and, if asked, runs it.
func (t *target) schema(ctx context.Context, create bool) error {
	t.tell("schema", true)
	sql, err := t.in.text(framePreData)
	if err != nil {
		return err
	}
	if !create {
		return nil
	}
	return t.script(ctx, "create the schema", sql)
}

// script runs SQL of pg_dump and puts the session's settings right again.
func (t *target) script(ctx context.Context, op, sql string) error {
	sql = filter{known: func(parameter string) bool { return t.known[parameter] }, role: t.role()}.clean(sql)
	if _, err := t.conn.Exec(ctx, sql).ReadAll(); err != nil {
		if at := near(sql, err); at != "" {
			op += " (" + at + ")"
		}
		return wrap(op, err)
	}
	_, err := pg.Rows(ctx, t.conn, "SET search_path = pg_catalog; SET statement_timeout = 0; SET lock_timeout = '30s'; SET client_min_messages = notice; SET check_function_bodies = on")
	return wrap(op, err)
}

// data copies all tables.
func (t *target) data(ctx context.Context) error {
	p := &t.progress
	p.TablesAll = len(t.header.Tables)
	for _, table := range t.header.Tables {
		p.RowsAll += table.Rows
	}
	for i, table := range t.header.Tables {
		var index int
		if err := t.in.expect(frameTable, &index); err != nil {
			return err
		}
		if index != i {
			return fmt.Errorf("%w: table %d where table %d should be", errFormat, index, i)
		}
		p.Table = table.String()
		t.tell("data", true)
		if err := t.table(ctx, table); err != nil {
			return err
		}
		p.Tables++
	}
	p.Table = ""
	return nil
}

// table copies one table and compares what arrived with what was sent.
func (t *target) table(ctx context.Context, table Table) error {
	r := &tableReader{f: t.in, moved: func(bytes, rows int64) {
		t.progress.Bytes += bytes
		t.progress.Rows += rows
		t.tell("data", false)
	}}
	columns := table.copied()
	if columns != "" {
		columns = " (" + columns + ")"
	}
	tag, err := t.conn.CopyFrom(ctx, r, "COPY "+table.sql()+columns+" FROM STDIN")
	switch {
	case r.err != nil: // the server only repeats it
		return r.err
	case err != nil:
		return wrap("copy table "+table.String(), err)
	}
	var end tableEnd
	if err := t.in.expect(frameTableEnd, &end); err != nil {
		return err
	}
	if r.sum != end || tag.RowsAffected() != end.Rows {
		return fmt.Errorf("copy table %s: sent were %d rows and %d bytes, %d rows and %d bytes arrived, %d rows were stored (checksums %08x and %08x)",
			table, end.Rows, end.Bytes, r.sum.Rows, r.sum.Bytes, tag.RowsAffected(), end.CRC, r.sum.CRC)
	}
	return nil
}

// after reads and does what follows the data: sequences, then indexes, constraints, triggers.
func (t *target) after(ctx context.Context, create bool) error {
	var seqs []sequence
	if err := t.in.expect(frameSequences, &seqs); err != nil {
		return err
	}
	for _, q := range seqs {
		_, err := pg.Rows(ctx, t.conn, fmt.Sprintf("SELECT pg_catalog.setval(%s::regclass, %d, %t)", pg.QuoteLiteral(q.sql()), q.Last, q.Called))
		if err != nil {
			return wrap("set sequence "+q.String(), err)
		}
	}
	t.tell("indexes", true)
	post, err := t.in.text(framePostData)
	if err != nil {
		return err
	}
	var all totals
	if err := t.in.expect(frameEnd, &all); err != nil {
		return err
	}
	p := t.progress
	if got := (totals{p.Tables, p.Rows, p.Bytes}); got != all {
		return fmt.Errorf("%w: it ends with %+v, received were %+v", errFormat, all, got)
	}
	if !create {
		return nil
	}
	if err := t.script(ctx, "create indexes and constraints", post); err != nil {
		return err
	}
	return t.refresh(ctx)
}

// refresh fills the materialized views, those first that do not read another. A view that cannot be filled is no reason
// to refuse a site: it is named in the result.
func (t *target) refresh(ctx context.Context) error {
	todo := t.header.MatViews
	for len(todo) > 0 {
		var left []Name
		for _, v := range todo {
			if _, err := pg.Rows(ctx, t.conn, "SAVEPOINT v; REFRESH MATERIALIZED VIEW "+v.sql()+"; RELEASE v"); err != nil {
				if _, rerr := pg.Rows(ctx, t.conn, "ROLLBACK TO v; RELEASE v"); rerr != nil {
					return wrap("refresh materialized view "+v.String(), errors.Join(err, rerr))
				}
				left = append(left, v)
			}
		}
		if len(left) == len(todo) {
			for _, v := range left {
				t.result.Unrefreshed = append(t.result.Unrefreshed, v.String())
			}
			return nil
		}
		todo = left
	}
	return nil
}

// role is the run-time role.
func (t *target) role() string {
	if t.cfg.Role == "" {
		return grants.DefaultRole
	}
	return t.cfg.Role
}

// grant runs what `duri grants` prints, when the session may.
func (t *target) grant(ctx context.Context) error {
	if t.cfg.SetupDSN == "" {
		return nil
	}
	sql := block(grants.SQL(grants.Spec{Role: t.role(), Schemas: t.cfg.Schemas}))
	_, err := pg.Rows(ctx, t.conn, "SET LOCAL client_min_messages = error;"+sql+"SET LOCAL client_min_messages = notice")
	return wrap("run the grants", err)
}

// publish sees to it that the publication covers what was made, so that writes at this site are decoded from the first.
func (t *target) publish(ctx context.Context) error {
	if err := t.grant(ctx); err != nil {
		return err
	}
	var want []string
	for _, table := range t.header.Tables {
		want = append(want, "("+pg.QuoteLiteral(table.Schema)+","+pg.QuoteLiteral(table.Name.Name)+")")
	}
	if len(want) == 0 {
		return nil
	}
	rows, err := pg.Rows(ctx, t.conn, `SELECT w.s, w.t FROM (VALUES `+strings.Join(want, ",")+`) AS w(s, t)
		WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_publication_tables WHERE pubname = `+pg.QuoteLiteral(grants.Publication)+` AND schemaname = w.s AND tablename = w.t) LIMIT 1`)
	if err != nil {
		return wrap("look at the publication", err)
	}
	if len(rows) > 0 {
		return &Error{Op: "enrol into database", Text: fmt.Sprintf("publication duri does not cover table %s.%s", rows[0][0], rows[0][1]), Hint: "run the SQL that `duri grants` prints as superuser in this database, or set postgres.setup_dsn"}
	}
	return nil
}

// block takes the grants out of the transaction that they are as a script. It is pure.
func block(script string) string {
	var out strings.Builder
	for line := range strings.Lines(script) {
		if s := strings.TrimSpace(line); s != "BEGIN;" && s != "COMMIT;" {
			out.WriteString(line)
		}
	}
	return out.String()
}

// commit waits until the local clock has passed the rows' version, so that no client here can write a version below one
// that it saw (rule 1), and commits.
func (t *target) commit(ctx context.Context) error {
	t.tell("commit", true)
	for {
		ahead, err := t.ahead(ctx)
		if err != nil {
			return err
		}
		if ahead < 0 {
			break
		}
		if err := pause(ctx, ahead+time.Millisecond); err != nil {
			return err
		}
	}
	res, err := t.conn.Exec(ctx, "COMMIT").ReadAll()
	if err != nil {
		return wrap("commit the enrolment", err)
	}
	if tag := res[0].CommandTag.String(); tag != "COMMIT" {
		return fmt.Errorf("commit the enrolment: it ended as %s", tag)
	}
	return nil
}

// analyze gives the planner statistics. Tables that are not ours are left to autovacuum.
func (t *target) analyze(ctx context.Context) {
	// Without the origin: statistics are this site's own.
	_, err := pg.Rows(ctx, t.conn, "SELECT pg_catalog.pg_replication_origin_session_reset()")
	for _, table := range t.header.Tables {
		if err != nil || ctx.Err() != nil {
			return // the content is there; autovacuum will do it
		}
		_, err = pg.Rows(ctx, t.conn, "SET client_min_messages = error; ANALYZE "+table.sql())
	}
}

// tellInterval is the least time between two reports of progress inside a phase.
const tellInterval = 200 * time.Millisecond

// tell reports progress.
func (t *target) tell(phase string, always bool) {
	now := time.Now()
	if !always && now.Sub(t.told) < tellInterval {
		return
	}
	t.told = now
	t.progress.Phase, t.progress.Elapsed = phase, now.Sub(t.begun)
	t.report(t.progress)
}
