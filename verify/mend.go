package verify

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// Mender is a Side whose rows can be judged and mended.
type Mender interface {
	Side
	// Versions gives the rows with the keys of r, uncut, each with its version. r has Keys only.
	Versions(ctx context.Context, t Table, r Range) ([]VersionedRow, error)
	// Mend makes rows what the other side has. A row that is not what it was when it was compared is left alone. It gives
	// an Outcome for each fix; an error says that the outcome of some is not known. Doing it again is harmless.
	Mend(ctx context.Context, t Table, by Digest, fixes []Fix) ([]Outcome, error)
}

// Fix is one row to be mended.
type Fix struct {
	Key Key `json:"key,omitempty"`
	// Hash is that of the row as it was compared, by the Digest of the call. Empty: there must be none. For a table without
	// a key it is what identifies the row.
	Hash string `json:"hash,omitempty"`
	// Image is what the row becomes, a value per Table.Columns; nil: it is removed.
	Image []*string `json:"image,omitempty"`
	// Time and Site are the version that the row gets.
	Time wal.Time   `json:"time"`
	Site wal.SiteID `json:"site"`
	// For a table without a key: how often the row was here, and how often it shall be.
	Copies int64 `json:"copies,omitempty"`
	Want   int64 `json:"want,omitempty"`
}

// Outcome says what became of a Fix.
type Outcome struct {
	Done bool   `json:"done"`
	Why  string `json:"why,omitempty"` // why it was left
}

const (
	// mendRows and mendBytes bound one transaction of Mend; mendMax one call.
	mendRows, mendBytes, mendMax = 200, 4 << 20, 10_000
	// whyChanged is why a fix is left most often.
	whyChanged = "the row has changed since it was compared"
	whyLocked  = "a client holds the row or its table: try again"
)

var errChanged = errors.New(whyChanged)

// Versions reads rows by key.
func (db *DB) Versions(ctx context.Context, t Table, r Range) ([]VersionedRow, error) {
	if r.Keys == nil || db.cfg.SiteOf == nil {
		return nil, &TableError{db.cfg.Name, t.String(), "versions are read by key", ""}
	}
	v, err := db.prepare(ctx, t, r)
	if err != nil {
		return nil, err
	}
	q, err := v.versionsSQL(r)
	if err != nil {
		return nil, err
	}
	res, err := db.query(ctx, v, q, false)
	if err != nil {
		return nil, err
	}
	rows := make([]VersionedRow, len(res.Rows))
	for i, values := range res.Rows {
		rows[i] = VersionedRow{Row: v.row(values[2:], -1)}
		if rows[i].Time, rows[i].Site, err = db.versionOf(values[0], values[1]); err != nil {
			return nil, fmt.Errorf("read versions of %s at %s: %w", t, db.cfg.Name, err)
		}
		if err := db.portable(t, []Row{rows[i].Row}); err != nil {
			return nil, err
		}
	}
	return rows, nil
}

// versionsSQL gives commit time (microseconds of wal.Time; NULL: not known any more) and the name of the origin (empty:
// written here; NULL: one that exists no more), then what rowsSQL gives.
func (v *view) versionsSQL(r Range) (*query, error) {
	list, err := v.selected(Range{By: r.By, ImageBytes: -1})
	if err != nil {
		return nil, err
	}
	const stamp = "pg_xact_commit_timestamp_origin(t.xmin)"
	q := &query{}
	q.printf(`SELECT (extract(epoch from (%[1]s).timestamp) * 1000000)::int8 - 946684800000000,
		CASE (%[1]s).roident WHEN 0 THEN '' ELSE (SELECT o.roname FROM pg_replication_origin o WHERE o.roident = (%[1]s).roident) END, %[2]s
		FROM %[3]s WHERE %[4]s`, stamp, list, v.from(), v.where())
	v.among(q, r.Keys)
	return q, nil
}

// versionOf converts the first two columns of versionsSQL.
func (db *DB) versionOf(at, origin []byte) (wal.Time, wal.SiteID, error) {
	if at == nil || origin == nil {
		return 0, 0, nil
	}
	n, err := strconv.ParseInt(string(at), 10, 64)
	if err != nil {
		return 0, 0, err
	}
	site := db.cfg.Site
	if len(origin) > 0 {
		ok := false
		if site, ok = db.cfg.SiteOf(string(origin)); !ok {
			return 0, 0, nil // some other tool's: nothing to go by
		}
	}
	return wal.Time(n), site, nil
}

// mendGroup is the fixes of one transaction: they have one version, because a transaction gives all its rows the same.
type mendGroup struct {
	version wal.Version
	index   []int // into the fixes
	bytes   int
}

// groups orders fixes by version, in bounded groups.
func groups(fixes []Fix) []mendGroup {
	open := map[wal.Version]*mendGroup{}
	var out []mendGroup
	for i, f := range fixes {
		version := wal.Version{Time: f.Time, Site: f.Site}
		g := open[version]
		if g == nil {
			g = &mendGroup{version: version}
			open[version] = g
		}
		g.index = append(g.index, i)
		for _, v := range f.Image {
			if v != nil {
				g.bytes += len(*v)
			}
		}
		if len(g.index) >= mendRows || g.bytes >= mendBytes {
			out = append(out, *g)
			delete(open, version)
		}
	}
	for _, version := range slices.SortedFunc(maps.Keys(open), wal.Version.Compare) {
		out = append(out, *open[version])
	}
	return out
}

// Mend writes rows as the applier does: no triggers, under a replication origin that stands for the row's site, with the
// row's own commit time, so that the row has the version that it has at the other site and is sent to nobody.
func (db *DB) Mend(ctx context.Context, t Table, by Digest, fixes []Fix) ([]Outcome, error) {
	if db.cfg.RepairOrigin == nil || len(fixes) > mendMax {
		return nil, &TableError{db.cfg.Name, t.String(), fmt.Sprintf("mend %d rows", len(fixes)), ""}
	}
	v, err := db.view(ctx, t)
	if err != nil {
		return nil, err
	}
	m := &mender{db: db, v: v, by: by, fixes: fixes, out: make([]Outcome, len(fixes))}
	if m.rowHash, err = v.rowHash(by); err != nil {
		return nil, err
	}
	settings := db.settings()
	delete(settings, "default_transaction_read_only")
	settings["application_name"], settings["lock_timeout"] = "duri repair", "2s"
	settings["synchronous_commit"] = "local" // what it writes is of the other site, and waits for none
	if m.conn, err = pg.Connect(ctx, db.cfg.DSN, db.cfg.Database, settings); err != nil {
		return nil, withHint(fmt.Errorf("connect to PostgreSQL of %s: %w", db.cfg.Name, err), pg.Hint(err))
	}
	defer pg.Close(m.conn)
	if _, err := pg.Rows(ctx, m.conn, "SET session_replication_role = replica"); err != nil {
		return nil, withHint(fmt.Errorf("mend rows at %s: %w", db.cfg.Name, err), pg.Hint(err))
	}
	for _, g := range groups(fixes) {
		if err := m.group(ctx, g); err != nil {
			return m.out, withHint(fmt.Errorf("mend rows of %s at %s: %w", t, db.cfg.Name, err), cmp.Or(hintOf(err), pg.Hint(err)))
		}
	}
	return m.out, m.leaveOrigin(ctx)
}

// mender is one call of Mend.
type mender struct {
	db      *DB
	conn    *pgconn.PgConn
	v       *view
	by      Digest
	rowHash string
	fixes   []Fix
	out     []Outcome
	site    wal.SiteID // whose origin the session has; 0: none
}

// group mends a group in one transaction; when the server refuses it, each row in its own, so that one row that cannot
// be written does not keep the others from it.
func (m *mender) group(ctx context.Context, g mendGroup) error {
	if err := m.takeOrigin(ctx, g.version.Site); err != nil {
		return err
	}
	err := m.transaction(ctx, g.version, g.index)
	refused := errors.Is(err, errChanged) || pg.SQLState(err) != "" && !pg.IsConnectionError(err)
	if !refused || ctx.Err() != nil {
		return err
	}
	if len(g.index) == 1 {
		m.out[g.index[0]] = Outcome{Why: refusal(err)}
		return nil
	}
	for _, i := range g.index {
		if err := m.group(ctx, mendGroup{version: g.version, index: []int{i}}); err != nil {
			return err
		}
	}
	return nil
}

// refusal words why the server refuses a row.
func refusal(err error) string {
	if pg.SQLState(err) == "55P03" {
		return whyLocked
	}
	if pe, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pe.Message
	}
	return err.Error()
}

// takeOrigin makes the session write as a site's.
func (m *mender) takeOrigin(ctx context.Context, site wal.SiteID) error {
	if site == m.site {
		return nil
	}
	if err := m.leaveOrigin(ctx); err != nil {
		return err
	}
	name := m.db.cfg.RepairOrigin(site)
	if _, err := pg.Query(ctx, m.conn, "SELECT pg_replication_origin_create($1) WHERE pg_replication_origin_oid($1) IS NULL", name); err != nil {
		return fmt.Errorf("make replication origin %s: %w", name, err)
	}
	for end := time.Now().Add(originPatience); ; {
		_, err := pg.Query(ctx, m.conn, "SELECT pg_replication_origin_session_setup($1)", name)
		if err == nil {
			m.site = site
			return nil
		}
		if pg.SQLState(err) != "55006" || time.Now().After(end) { // object in use
			return withHint(fmt.Errorf("take replication origin %s: %w", name, err), originHint(err))
		}
		if _, err := sleep(ctx, originPatience/50, nil); err != nil {
			return err
		}
	}
}

// originPatience is how long Mend waits for an origin that another session has: the applier's, for a moment, or that of
// a repair that was interrupted, until the server has noticed.
const originPatience = 5 * time.Second

func originHint(err error) string {
	if pg.SQLState(err) == "55006" {
		return "another `duri repair` runs at this site: wait until it has ended"
	}
	return pg.Hint(err)
}

// leaveOrigin gives the origin back. The end of the session would do it too, but a moment later.
func (m *mender) leaveOrigin(ctx context.Context) error {
	if m.site == 0 || m.conn.IsClosed() {
		return nil
	}
	m.site = 0
	_, err := pg.Rows(ctx, m.conn, "SELECT pg_replication_origin_session_reset()")
	return err
}

// transaction mends some fixes. Outcomes count only when it has committed.
func (m *mender) transaction(ctx context.Context, version wal.Version, index []int) error {
	outcomes, err := m.write(ctx, version, index)
	if err != nil {
		if !m.conn.IsClosed() {
			_, rerr := pg.Rows(ctx, m.conn, "ROLLBACK")
			err = errors.Join(err, rerr)
		}
		return err
	}
	for n, i := range index {
		m.out[i] = outcomes[n]
	}
	return nil
}

func (m *mender) write(ctx context.Context, version wal.Version, index []int) ([]Outcome, error) {
	if _, err := pg.Rows(ctx, m.conn, "BEGIN ISOLATION LEVEL READ COMMITTED"); err != nil {
		return nil, err
	}
	var whys []string
	var err error
	if len(m.v.key) > 0 {
		whys, err = m.rows(ctx, index)
	} else {
		whys, err = m.heap(ctx, index)
	}
	if err != nil {
		return nil, err
	}
	outcomes := make([]Outcome, len(index))
	for n, why := range whys {
		outcomes[n] = Outcome{Done: why == "", Why: why}
	}
	_, err = pg.Query(ctx, m.conn, "SELECT pg_replication_origin_xact_setup('0/1', $1::timestamptz)", version.Time.String())
	if err != nil {
		return nil, err
	}
	rows, err := m.conn.Exec(ctx, "COMMIT").ReadAll()
	if err != nil {
		return nil, err
	}
	if tag := rows[0].CommandTag.String(); tag != "COMMIT" {
		return nil, fmt.Errorf("the transaction ended as %s", tag)
	}
	return outcomes, nil
}

// exec runs a statement and gives how many rows it touched.
func (m *mender) exec(ctx context.Context, q *query) (*pgconn.Result, error) {
	res := m.conn.ExecParams(ctx, q.String(), q.params, nil, nil, nil).Read()
	return res, res.Err
}

// heap mends rows of a table without a key; it tells of each why it does not.
func (m *mender) heap(ctx context.Context, index []int) (whys []string, err error) {
	whys = make([]string, len(index))
	for n, i := range index {
		if whys[n], err = m.copies(ctx, m.fixes[i]); err != nil {
			return nil, err
		}
	}
	return whys, nil
}

// rows mends rows of a table with a key; it tells of each why it does not. They are locked together, and those that are to go go
// together: ghosts may be many.
func (m *mender) rows(ctx context.Context, index []int) (whys []string, err error) {
	whys = make([]string, len(index))
	fits := func(f Fix) bool {
		return len(f.Key) == len(m.v.key) && (f.Image == nil || len(f.Image) == len(m.v.columns))
	}
	var keys []Key
	for _, i := range index {
		if f := m.fixes[i]; fits(f) {
			keys = append(keys, f.Key)
		}
	}
	here, err := m.lock(ctx, keys)
	if err != nil {
		return nil, err
	}
	var gone []Key
	var puts []int // of index
	for n, i := range index {
		f := m.fixes[i]
		switch {
		case !fits(f):
			whys[n] = "the request does not fit the table"
		case here[f.Key.id()] != f.Hash:
			whys[n] = whyChanged
		case f.Image == nil:
			gone = append(gone, f.Key)
		default:
			puts = append(puts, n)
		}
	}
	if len(gone) > 0 { // first, as others may need their unique values
		q := &query{}
		q.printf("DELETE FROM %s WHERE %s", m.v.from(), m.v.where())
		m.v.among(q, gone)
		res, err := m.exec(ctx, q)
		if err == nil && res.CommandTag.RowsAffected() != int64(len(gone)) {
			err = errChanged // they are looked at one by one then
		}
		if err != nil {
			return nil, err
		}
	}
	for _, n := range puts {
		if whys[n], err = m.put(ctx, m.fixes[index[n]]); err != nil {
			return nil, err
		}
	}
	return whys, nil
}

// lock locks the rows with these keys, and gives their hashes by key.
func (m *mender) lock(ctx context.Context, keys []Key) (map[string]string, error) {
	q := &query{}
	q.printf("SELECT %s, lpad(to_hex(%s), 16, '0') FROM %s WHERE %s", m.v.keyList(), m.rowHash, m.v.from(), m.v.where())
	m.v.among(q, keys)
	q.printf(" FOR UPDATE OF t")
	res, err := m.exec(ctx, q)
	if err != nil {
		return nil, err
	}
	here := map[string]string{}
	for _, r := range res.Rows {
		n := len(m.v.key)
		id := keyOf(r[:n]).id()
		if _, twice := here[id]; twice {
			return nil, errChanged // a key that is not unique here
		}
		here[id] = string(r[n])
	}
	return here, nil
}

// put writes a row that is locked, or absent; it tells why it does not.
func (m *mender) put(ctx context.Context, f Fix) (why string, err error) {
	q := m.v.mendSQL(f)
	if q == nil {
		return "only generated columns differ: make their definitions equal", nil
	}
	res, err := m.exec(ctx, q)
	if err == nil && res.CommandTag.RowsAffected() != 1 {
		return whyChanged, nil
	}
	return "", err
}

// is writes the condition that the key is key.
func (v *view) is(q *query, key Key) {
	for i, k := range v.key {
		q.printf(" AND t.%s %s %s", pg.QuoteIdent(k.Name), k.Equal, k.cast(q.param(key[i])))
	}
}

// mendSQL writes the statement that makes a row what a fix with an image says; nil: there is nothing to write. Parameters have no type,
// so that PostgreSQL reads each as its column's. The key's columns keep their values where the row exists.
func (v *view) mendSQL(f Fix) *query {
	q := &query{}
	if f.Hash == "" {
		v.insert(q, f.Image)
		return q
	}
	var set []string
	for i, c := range v.asked {
		inKey := slices.ContainsFunc(v.key, func(k keyColumn) bool { return k.Name == c.Name })
		if !inKey && !slices.Contains(v.Computed, c.Name) {
			set = append(set, pg.QuoteIdent(c.Name)+" = "+q.value(f.Image[i]))
		}
	}
	if len(set) == 0 {
		return nil
	}
	q.printf("UPDATE %s SET %s WHERE %s", v.from(), strings.Join(set, ", "), v.where())
	v.is(q, f.Key)
	return q
}

// insert writes an INSERT of an image.
func (v *view) insert(q *query, image []*string) {
	var names, values []string
	for i, c := range v.asked {
		if !slices.Contains(v.Computed, c.Name) {
			names, values = append(names, pg.QuoteIdent(c.Name)), append(values, q.value(image[i]))
		}
	}
	if len(names) == 0 {
		q.printf("INSERT INTO %s DEFAULT VALUES", pg.QuoteName(v.Schema, v.Name))
		return
	}
	q.printf("INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE VALUES (%s)", pg.QuoteName(v.Schema, v.Name), strings.Join(names, ", "), strings.Join(values, ", "))
}

// value adds a parameter that may be NULL.
func (q *query) value(v *string) string {
	if v == nil {
		return "NULL"
	}
	return q.param(*v)
}

// copies makes the number of equal rows in a table without a key what it shall be.
func (m *mender) copies(ctx context.Context, f Fix) (why string, err error) {
	q := &query{}
	q.printf("SELECT count(*) FROM %s WHERE %s AND %s = %s::int8", m.v.from(), m.v.where(), m.rowHash, q.param(hashText(f.Hash)))
	res, err := m.exec(ctx, q)
	if err != nil {
		return "", err
	}
	if here := string(res.Rows[0][0]); here != strconv.FormatInt(f.Copies, 10) {
		return whyChanged, nil
	}
	for range max(0, f.Want-f.Copies) {
		if len(f.Image) != len(m.v.columns) {
			return "the request does not fit the table", nil
		}
		add := &query{}
		m.v.insert(add, f.Image)
		if _, err := m.exec(ctx, add); err != nil {
			return "", err
		}
	}
	if f.Want >= f.Copies {
		return "", nil
	}
	remove := &query{}
	remove.printf(`DELETE FROM %[1]s USING (SELECT t.tableoid AS o, t.ctid AS c FROM %[1]s WHERE %[2]s AND %[3]s = %[4]s::int8 LIMIT %[5]d FOR UPDATE OF t) d
		WHERE t.tableoid = d.o AND t.ctid = d.c`, m.v.from(), m.v.where(), m.rowHash, remove.param(hashText(f.Hash)), f.Copies-f.Want)
	if res, err = m.exec(ctx, remove); err == nil && res.CommandTag.RowsAffected() != f.Copies-f.Want {
		return "", errChanged // some went while it was counting: undo the others
	}
	return "", err
}

// hashText is a hash as the text of an int8; what is no hash is that of no row.
func hashText(hash string) string {
	if n := hashInts([]string{hash}); len(n) == 1 {
		return strconv.FormatInt(n[0], 10)
	}
	return "0"
}
