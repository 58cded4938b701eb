// Package catalog keeps duri's own tables, which live in schema duri of every replicated database: it makes and
// upgrades them (Migrate), keeps their size bounded (Maintain), and reads and writes what the rest of duri asks for.
// The applier writes duri.applied and duri.conflict itself, in the transaction of the data.
//
// Everything works as the run-time role, which owns the schema (`duri grants`); no superuser is needed. The tables
// are local to the site and never replicated. A connection is used by one goroutine at a time, as pgconn demands, and
// writes commit with the connection's synchronous_commit.
package catalog

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

// Error says what could not be done with duri's own tables, and what the user can do.
type Error struct {
	Op   string // what was attempted
	Text string // what is wrong
	Hint string // one sentence
}

// Error gives the sentence that is printed.
func (e *Error) Error() string { return e.Op + ": " + e.Text }

// HintText is the advice that goes with the error.
func (e *Error) HintText() string { return e.Hint }

// Event adds a row to duri.event: what people must see, such as an enrolment, a held direction, a gap, a clock step.
// kind is a short lower-case word that programs select by, text a sentence for people, data nil or anything that
// encoding/json can write.
func Event(ctx context.Context, c *pgconn.PgConn, kind, text string, data any) error {
	doc := []byte(nil) // SQL NULL
	if data != nil {
		var err error
		if doc, err = json.Marshal(data); err != nil {
			return fmt.Errorf("record event %s: %w", kind, err)
		}
	}
	const sql = "INSERT INTO duri.event (kind, text, data) VALUES ($1, $2, $3::jsonb)"
	res := c.ExecParams(ctx, sql, [][]byte{[]byte(kind), []byte(text), doc}, nil, nil, nil).Read()
	if res.Err != nil {
		return fmt.Errorf("record event %s: %w", kind, res.Err)
	}
	return nil
}

// Meta reads one entry of duri.meta, the database's identity in its cluster (cluster, site, enrolled_at). ok is false
// when there is none.
func Meta(ctx context.Context, c *pgconn.PgConn, key string) (value string, ok bool, err error) {
	rows, err := pg.Query(ctx, c, "SELECT value FROM duri.meta WHERE key = $1", key)
	if err != nil {
		return "", false, fmt.Errorf("read duri.meta %s: %w", key, err)
	}
	if len(rows) == 0 {
		return "", false, nil
	}
	return rows[0][0], true, nil
}

// SetMeta writes one entry of duri.meta, over an old one if need be.
func SetMeta(ctx context.Context, c *pgconn.PgConn, key, value string) error {
	_, err := pg.Query(ctx, c, `INSERT INTO duri.meta (key, value) VALUES ($1, $2)
		ON CONFLICT (key) DO UPDATE SET value = excluded.value`, key, value)
	if err != nil {
		return fmt.Errorf("write duri.meta %s: %w", key, err)
	}
	return nil
}
