package demo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

// readFacts reads what a site holds of the clients' payments.
func readFacts(ctx context.Context, c *pgconn.PgConn) (facts, error) {
	rows, err := pg.Rows(ctx, c, "SELECT id, client, seq, amount FROM finance.payment WHERE client > 0")
	if err != nil {
		return facts{}, fmt.Errorf("read payments: %w", err)
	}
	f := facts{payments: make([]payment, len(rows)), audit: map[string]int{}}
	for i, r := range rows {
		if f.payments[i], err = parsePayment(r); err != nil {
			return facts{}, fmt.Errorf("read payments: %w", err)
		}
	}
	rows, err = pg.Rows(ctx, c, "SELECT payment, count(*) FROM finance.audit WHERE client > 0 GROUP BY 1")
	if err != nil {
		return facts{}, fmt.Errorf("read the audit log: %w", err)
	}
	for _, r := range rows {
		if f.audit[r[0]], err = strconv.Atoi(r[1]); err != nil {
			return facts{}, fmt.Errorf("read the audit log: %w", err)
		}
	}
	return f, nil
}

func parsePayment(r []string) (p payment, err error) {
	p.id = r[0]
	if p.client, err = strconv.Atoi(r[1]); err != nil {
		return p, err
	}
	if p.seq, err = strconv.ParseInt(r[2], 10, 64); err != nil {
		return p, err
	}
	p.amount, err = strconv.ParseInt(r[3], 10, 64)
	return p, err
}

// TableCheck is the demo's own comparison of one table.
type TableCheck struct {
	Name  string   `json:"name"`
	Rows  [2]int64 `json:"rows"` // at A, at B
	Equal bool     `json:"equal"`
	// SHA256 of all rows in COPY's text form, ordered by their text; of A, and of B where it differs.
	SHA256 []string `json:"sha256"`
}

// digest is what compareTables knows of a table at one site.
type digest struct {
	rows int64
	hash string
}

// compareTables compares all tables of the ledger by what COPY sends of them, sorted. It shares nothing with package
// verify.
func compareTables(ctx context.Context, conns [2]*pgconn.PgConn) ([]TableCheck, error) {
	var digests [2]map[string]digest
	for i, c := range conns {
		var err error
		if digests[i], err = digestTables(ctx, c); err != nil {
			return nil, err
		}
	}
	return mergeDigests(digests), nil
}

// mergeDigests is pure. A table that is missing at a site is not equal, and has -1 rows there.
func mergeDigests(digests [2]map[string]digest) []TableCheck {
	var names []string
	for _, d := range digests {
		for name := range d {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	var all []TableCheck
	for _, name := range names {
		t := TableCheck{Name: name, Equal: digests[0][name] == digests[1][name]}
		for i := range digests {
			d, ok := digests[i][name]
			if !ok {
				d.rows = -1
			}
			t.Rows[i] = d.rows
			if i == 0 || !t.Equal {
				t.SHA256 = append(t.SHA256, d.hash)
			}
		}
		all = append(all, t)
	}
	return all
}

func digestTables(ctx context.Context, c *pgconn.PgConn) (map[string]digest, error) {
	names, err := pg.Rows(ctx, c, "SELECT relname FROM pg_catalog.pg_class WHERE relnamespace = '"+schema+"'::regnamespace AND relkind IN ('r', 'p')")
	if err != nil {
		return nil, fmt.Errorf("list the ledger's tables: %w", err)
	}
	all := map[string]digest{}
	for _, n := range names {
		if all[n[0]], err = digestTable(ctx, c, n[0]); err != nil {
			return nil, fmt.Errorf("copy table %s: %w", n[0], err)
		}
	}
	return all, nil
}

// digestTable orders by the rows' text, which works without a key as well.
func digestTable(ctx context.Context, c *pgconn.PgConn, name string) (digest, error) {
	w := &lineHash{hash: sha256.New()}
	sql := fmt.Sprintf(`COPY (SELECT x.* FROM %s x ORDER BY x::text COLLATE "C") TO STDOUT`, pg.QuoteName(schema, name))
	if _, err := c.CopyTo(ctx, w, sql); err != nil {
		return digest{}, err
	}
	return digest{w.lines, hex.EncodeToString(w.hash.Sum(nil))}, nil
}

// lineHash hashes what is written and counts lines; COPY escapes line breaks inside values.
type lineHash struct {
	hash  hash.Hash
	lines int64
}

func (l *lineHash) Write(p []byte) (int, error) {
	l.lines += int64(bytes.Count(p, []byte{'\n'}))
	return l.hash.Write(p)
}

// budgetDrift counts the budget lines whose running total is not the sum of their payments: those that lost an update to
// a concurrent one of the other site.
func budgetDrift(ctx context.Context, c *pgconn.PgConn) (int, error) {
	rows, err := pg.Rows(ctx, c, `SELECT count(*) FROM finance.budget b
		LEFT JOIN (SELECT gov_id, line, sum(amount) AS total FROM finance.payment GROUP BY 1, 2) p USING (gov_id, line)
		WHERE b.executed <> coalesce(p.total, 0)`)
	if err != nil {
		return 0, fmt.Errorf("compare budgets with payments: %w", err)
	}
	return strconv.Atoi(rows[0][0])
}

// conflictKinds counts the conflicts that a site recorded.
func conflictKinds(ctx context.Context, c *pgconn.PgConn) (map[string]int, error) {
	rows, err := pg.Rows(ctx, c, "SELECT kind, count(*) FROM duri.conflict WHERE kind <> '' GROUP BY 1")
	if err != nil {
		return nil, fmt.Errorf("count conflicts: %w", err)
	}
	kinds := map[string]int{}
	for _, r := range rows {
		if kinds[r[0]], err = strconv.Atoi(r[1]); err != nil {
			return nil, fmt.Errorf("count conflicts: %w", err)
		}
	}
	return kinds, nil
}

// present tells which of some payments a site holds.
func present(ctx context.Context, c *pgconn.PgConn, ids []string) (map[string]bool, error) {
	rows, err := pg.Query(ctx, c, "SELECT id FROM finance.payment WHERE id = ANY ($1::uuid[])", "{"+strings.Join(ids, ",")+"}")
	if err != nil {
		return nil, fmt.Errorf("look for payments: %w", err)
	}
	there := map[string]bool{}
	for _, r := range rows {
		there[r[0]] = true
	}
	return there, nil
}
