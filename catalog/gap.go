package catalog

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// Gap is a row of duri.gap: what Origin wrote from From to To, Peer never received.
type Gap struct {
	ID           int64
	Origin, Peer wal.SiteID
	From, To     wal.LSN
	Reason       string
	Declared     time.Time
	Passes       int
	Written      int64 // rows that were made equal at the peer, and
	Removed      int64 // rows that were removed there
	Repaired     bool
	// Seen and Resume are set at the peer when it is repaired: its transactions beyond Resume, in its own WAL, have seen
	// Origin up to Seen.
	Seen, Resume wal.LSN
}

const gapColumns = `id, origin, peer, from_lsn, to_lsn, reason, (extract(epoch from declared_at) * 1000000)::int8, passes, written, removed,
	repaired_at IS NOT NULL, coalesce(seen_lsn, '0/0'), coalesce(resume_lsn, '0/0')`

// Gaps lists the gaps that are open, and the last repaired one of each origin and peer.
func Gaps(ctx context.Context, c *pgconn.PgConn) ([]Gap, error) {
	rows, err := pg.Rows(ctx, c, "SELECT "+gapColumns+` FROM duri.gap g WHERE repaired_at IS NULL
		OR id = (SELECT max(id) FROM duri.gap l WHERE l.origin = g.origin AND l.peer = g.peer AND l.repaired_at IS NOT NULL) ORDER BY id`)
	if err != nil {
		return nil, fmt.Errorf("read duri.gap: %w", err)
	}
	out := make([]Gap, len(rows))
	for i, r := range rows {
		if out[i], err = parseGap(r); err != nil {
			return nil, fmt.Errorf("read duri.gap: %w", err)
		}
	}
	return out, nil
}

func parseGap(r []string) (g Gap, err error) {
	var at int64
	if _, err = fmt.Sscan(strings.Join([]string{r[0], r[1], r[2], r[6], r[7], r[8], r[9]}, " "), &g.ID, &g.Origin, &g.Peer, &at, &g.Passes, &g.Written, &g.Removed); err != nil {
		return g, err
	}
	g.Reason, g.Declared, g.Repaired = r[5], time.UnixMicro(at), r[10] == "t" || r[10] == "true"
	for i, to := range map[int]*wal.LSN{3: &g.From, 4: &g.To, 11: &g.Seen, 12: &g.Resume} {
		if *to, err = wal.ParseLSN(r[i]); err != nil {
			return g, err
		}
	}
	return g, nil
}

// DeclareGap records a gap, or makes the open one between the same sites reach to to. It gives the row.
func DeclareGap(ctx context.Context, c *pgconn.PgConn, g Gap) (Gap, error) {
	rows, err := pg.Query(ctx, c, `INSERT INTO duri.gap AS g (origin, peer, from_lsn, to_lsn, reason) VALUES ($1::int2, $2::int2, $3::pg_lsn, $4::pg_lsn, $5)
		ON CONFLICT (origin, peer) WHERE repaired_at IS NULL DO UPDATE SET to_lsn = greatest(g.to_lsn, excluded.to_lsn) RETURNING `+gapColumns,
		fmt.Sprint(g.Origin), fmt.Sprint(g.Peer), g.From.String(), g.To.String(), g.Reason)
	if err != nil {
		return g, fmt.Errorf("record a gap: %w", err)
	}
	return parseGap(rows[0])
}

// BeginAnew lets a peer go on behind a gap: in one transaction, the gap reaches to g.To, the origin's transactions count as
// applied up to there, and what of them waited for locks is given up, as the rows are made equal anyway.
func BeginAnew(ctx context.Context, c *pgconn.PgConn, g Gap) error {
	// What the first transaction behind the gap had seen of this site is at least what the last one before it had.
	err := transact(ctx, c, fmt.Sprintf(`DELETE FROM duri.held WHERE origin = %[1]d;
		UPDATE duri.gap SET to_lsn = %[2]s WHERE id = %[3]d;
		INSERT INTO duri.applied (xid, origin, from_lsn, to_lsn, min_time, max_time, transactions, changes, records, seen, seen_others)
			SELECT pg_catalog.pg_current_xact_id(), %[1]d, %[2]s, %[2]s, '-infinity', coalesce(l.max_time, '2000-01-01 00:00:00+00'), 0, 0, 0,
				coalesce(l.seen, '0/0'), coalesce(l.seen_others, '{}')
			FROM (SELECT 1) AS one LEFT JOIN (SELECT * FROM duri.applied WHERE origin = %[1]d ORDER BY to_lsn DESC LIMIT 1) AS l ON true`,
		g.Origin, pg.QuoteLiteral(g.To.String()), g.ID))
	if err != nil {
		return fmt.Errorf("go on behind a gap: %w", err)
	}
	return nil
}

// GapRow is a row that closing a gap is about to write: before and after, as images by column. A nil image: no such row.
type GapRow struct {
	Key           []string
	Before, After map[string]*string
	Copies, Want  int64
}

// NoteGapRows writes down rows of a table before they are written, and gives their numbers.
func NoteGapRows(ctx context.Context, c *pgconn.PgConn, gap int64, schema, table string, rows []GapRow) ([]int64, error) {
	doc, err := json.Marshal(rows)
	if err != nil {
		return nil, fmt.Errorf("write down what closing a gap writes: %w", err)
	}
	ids, err := pg.Query(ctx, c, `INSERT INTO duri.gap_row (gap, table_schema, table_name, key, before, after, copies, want)
		SELECT $1::int8, $2, $3, nullif(r -> 'Key', 'null'), nullif(r -> 'Before', 'null'), nullif(r -> 'After', 'null'), (r ->> 'Copies')::int8, (r ->> 'Want')::int8
		FROM pg_catalog.jsonb_array_elements($4::jsonb) WITH ORDINALITY AS e(r, n) ORDER BY n RETURNING id`,
		fmt.Sprint(gap), schema, table, strings.ReplaceAll(string(doc), `\u0000`, `\ufffd`))
	if err != nil {
		return nil, fmt.Errorf("write down what closing a gap writes: %w", err)
	}
	out := make([]int64, len(ids))
	for i, r := range ids {
		if _, err := fmt.Sscan(r[0], &out[i]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// GapRowsDone says which of the rows that were written down have been written, and counts them.
func GapRowsDone(ctx context.Context, c *pgconn.PgConn, gap int64, ids []int64) error {
	list := strings.Trim(strings.ReplaceAll(fmt.Sprint(ids), " ", ","), "[]")
	_, err := pg.Query(ctx, c, `WITH d AS (UPDATE duri.gap_row SET done = true WHERE id = ANY ($2::int8[]) AND NOT done RETURNING after IS NULL OR want < copies AS gone)
		UPDATE duri.gap SET written = written + (SELECT count(*) FROM d WHERE NOT gone), removed = removed + (SELECT count(*) FROM d WHERE gone) WHERE id = $1::int8`,
		fmt.Sprint(gap), "{"+list+"}")
	if err != nil {
		return fmt.Errorf("write down what closing a gap has written: %w", err)
	}
	return nil
}

// UnparkForGap forgets the rows that are parked here, and writes down what they were. While a gap is open they may be parked
// because of rows that are not there any more; what is rightly parked is so at the origin, too.
func UnparkForGap(ctx context.Context, c *pgconn.PgConn, gap int64) error {
	_, err := pg.Query(ctx, c, `WITH p AS (DELETE FROM duri.parked RETURNING table_schema, table_name, key, "row")
		INSERT INTO duri.gap_row (gap, table_schema, table_name, key, before, done)
		SELECT $1::int8, table_schema, table_name, key, p."row", true FROM p`, fmt.Sprint(gap))
	if err != nil {
		return fmt.Errorf("forget parked rows: %w", err)
	}
	return nil
}

// GapPassed counts a comparison of all tables.
func GapPassed(ctx context.Context, c *pgconn.PgConn, gap int64) error {
	_, err := pg.Query(ctx, c, "UPDATE duri.gap SET passes = passes + 1 WHERE id = $1::int8", fmt.Sprint(gap))
	return err
}

// GapRepaired ends a gap. At the peer, seen is up to where the origin is applied here; zero at the origin. It gives the row.
func GapRepaired(ctx context.Context, c *pgconn.PgConn, gap int64, seen wal.LSN) (Gap, error) {
	rows, err := pg.Query(ctx, c, `UPDATE duri.gap SET repaired_at = pg_catalog.now(), seen_lsn = nullif($2::pg_lsn, '0/0'),
		resume_lsn = CASE WHEN $2::pg_lsn <> '0/0' THEN pg_catalog.pg_current_wal_insert_lsn() END
		WHERE id = $1::int8 RETURNING `+gapColumns, fmt.Sprint(gap), seen.String())
	if err != nil {
		return Gap{}, fmt.Errorf("record that a gap is repaired: %w", err)
	}
	if len(rows) == 0 {
		return Gap{}, fmt.Errorf("record that a gap is repaired: it is not in duri.gap")
	}
	return parseGap(rows[0])
}

// DropGaps forgets the open gaps of a database that joins anew.
func DropGaps(ctx context.Context, c *pgconn.PgConn) error {
	_, err := pg.Rows(ctx, c, "DELETE FROM duri.gap WHERE repaired_at IS NULL")
	if err != nil {
		return fmt.Errorf("forget the gaps of an earlier life: %w", err)
	}
	return nil
}
