package server

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/enrol"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/verify"
	"github.com/duri-io/duri/wal"
)

// offered is what this site offers its peers for one database.
type offered struct{ n *node }

var _ link.Database = offered{}

func (o offered) Journal() (*journal.Journal, error) {
	if c := o.n.ready.Load(); c != nil {
		return c.journal, nil
	}
	return nil, errNotReady
}

// Uncaptured is that of link.Database.
func (o offered) Uncaptured() bool { return o.n.uncaptured() }

// CopyOf is this site's copy of a third one's journal, for a site that lacks some of it and does not reach that one.
func (o offered) CopyOf(site string) (*journal.Journal, error) {
	for _, p := range o.n.peers {
		if in := p.live.Load(); in != nil && p.site.Name == site {
			return in.copy.Journal()
		}
	}
	return nil, errNotReady
}

func (o offered) Stated(site string, s link.Statement) {
	for _, p := range o.n.peers {
		if p.site.Name == site {
			p.mu.Lock()
			p.stated = s
			p.mu.Unlock()
			o.n.keeper.stir()
		}
	}
}

func (o offered) Acknowledged(site string, a link.Ack) {
	for _, p := range o.n.peers {
		if p.site.Name == site {
			p.acknowledged(a)
		}
	}
}

// Copy sends the database's content. Only a database that takes part itself may be copied from.
func (o offered) Copy(ctx context.Context, w io.Writer) error {
	if o.n.ready.Load() == nil {
		return errNotReady
	}
	n := o.n
	return enrol.Send(ctx, enrol.SourceConfig{
		DSN: n.cfg.Postgres.DSN, Database: n.database.Name, Schemas: n.database.Schemas,
		BinDir: n.cfg.Postgres.BinDir, Publication: Publication,
	}, w)
}

func (o offered) Compare(ctx context.Context, request []byte) ([]byte, error) {
	if o.n.ready.Load() == nil {
		return nil, errNotReady
	}
	return verify.Serve(ctx, side{o.n.db, o.n}, request)
}

// FetchRow reads the present row with the key of row, in the order of rel's columns (rule 9).
func (o offered) FetchRow(ctx context.Context, rel *wal.Relation, key []string, row wal.Tuple) (out wal.Tuple, ok bool, err error) {
	sql, args, err := fetchSQL(rel, key, row)
	if err != nil {
		return nil, false, err
	}
	err = o.n.rows.do(ctx, func(c *pgconn.PgConn) error {
		params := make([][]byte, len(args))
		for i, a := range args {
			params[i] = []byte(a)
		}
		res := c.ExecParams(ctx, sql, params, nil, nil, nil).Read()
		if res.Err != nil || len(res.Rows) == 0 {
			return res.Err
		}
		ok = true
		out = make(wal.Tuple, len(rel.Columns))
		for i, v := range res.Rows[0] {
			out[i] = wal.Value{Kind: wal.Null}
			if v != nil {
				out[i] = wal.Value{Kind: wal.Text, Data: slices.Clone(v)}
			}
		}
		return nil
	})
	return out, ok, err
}

// fetchSQL selects one row by key. Parameters are untyped, so PostgreSQL reads each as the column's own type.
func fetchSQL(rel *wal.Relation, key []string, row wal.Tuple) (string, []string, error) {
	var sql strings.Builder
	sql.WriteString("SELECT ")
	for i, c := range rel.Columns {
		if i > 0 {
			sql.WriteString(", ")
		}
		sql.WriteString(pg.QuoteIdent(c.Name))
	}
	sql.WriteString(" FROM ONLY " + pg.QuoteName(rel.Namespace, rel.Name) + " WHERE ")
	var args []string
	for i, k := range key {
		at := slices.IndexFunc(rel.Columns, func(c wal.Column) bool { return c.Name == k })
		if at < 0 || at >= len(row) || row[at].Kind != wal.Text {
			return "", nil, fmt.Errorf("fetch a row of %s: key column %q is missing", rel, k)
		}
		if i > 0 {
			sql.WriteString(" AND ")
		}
		args = append(args, string(row[at].Data))
		fmt.Fprintf(&sql, "%s = $%d", pg.QuoteIdent(k), len(args))
	}
	return sql.String(), args, nil
}

func pgHint(err error) string { return pg.Hint(err) }
