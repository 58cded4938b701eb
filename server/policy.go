package server

import (
	"context"
	"net/http"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/catalog"
)

// getTables describes the database's tables: how they are replicated, and what is declared for them.
func (a *Agent) getTables(w http.ResponseWriter, r *http.Request) {
	n, err := a.pick(r)
	if err != nil {
		writeError(w, http.StatusBadRequest, err)
		return
	}
	tables, err := n.tables(r.Context())
	if err != nil {
		writeError(w, http.StatusServiceUnavailable, err)
		return
	}
	writeJSON(w, http.StatusOK, tables)
}

// tables reads the tables in a session of its own: with many of them it takes a while.
func (n *node) tables(ctx context.Context) (out []catalog.Table, err error) {
	if n.ready.Load() == nil {
		return nil, errNotReady // duri's own tables may not exist yet
	}
	err = n.withSession(ctx, func(c *pgconn.PgConn) error {
		out, err = catalog.Tables(ctx, c, n.database.Schemas, n.database.Policies())
		return err
	})
	return out, err
}

// Tables describes the tables of a database. An empty name means the only one.
func (c *Control) Tables(ctx context.Context, database string) ([]catalog.Table, error) {
	var out []catalog.Table
	err := c.get(ctx, "/v1/tables", databaseQuery(database), &out)
	return out, err
}
