package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// ConflictDetail is one record as `duri conflict show` gives it: with both images side by side, who won, and names.
type ConflictDetail struct {
	catalog.Conflict
	OriginName string               `json:"origin_name"`
	LocalName  string               `json:"local_name,omitempty"` // empty: unknown
	Verdict    catalog.Verdict      `json:"verdict"`
	Columns    []catalog.ColumnPair `json:"columns"` // in the table's order
}

// RestoreRequest asks for a losing image to be brought back.
type RestoreRequest struct {
	DryRun bool   `json:"dry_run"`
	Force  bool   `json:"force"` // also over what came after the conflict, or with an incomplete image
	By     string `json:"by"`    // who asks, for duri.event
}

// withSession lends a session of its own to what a person asks for: a query over many records, or a wait for a row's
// lock, must not hold up the utility session, which apply's barrier needs.
func (n *node) withSession(ctx context.Context, f func(*pgconn.PgConn) error) error {
	conn, err := pg.Connect(ctx, n.cfg.Postgres.DSN, n.database.Name, map[string]string{
		"application_name": "duri_control", "statement_timeout": "30s",
	})
	if err != nil {
		return err
	}
	defer pg.Close(conn)
	return f(conn)
}

// siteName names a site of the cluster, or one that has left it.
func (n *node) siteName(id wal.SiteID) string {
	for _, s := range n.cfg.Sites {
		if s.ID == id {
			return s.Name
		}
	}
	return fmt.Sprintf("site %d", id)
}

// conflictFilter reads the query of a list or a count. site finds a site by its name. It is pure.
func conflictFilter(q url.Values, site func(string) (wal.SiteID, bool)) (catalog.ConflictFilter, error) {
	f := catalog.ConflictFilter{Table: q.Get("table"), Kind: q.Get("kind"), Code: q.Get("code"), Exceptions: q.Get("exceptions") == "true"}
	if name := q.Get("origin"); name != "" {
		id, ok := site(name)
		if !ok {
			return f, &hinted{fmt.Sprintf("site %q is none of the cluster's", name), "see sites in duri.yaml"}
		}
		f.Origin = id
	}
	for _, k := range q["key"] {
		column, value, ok := strings.Cut(k, "=")
		if !ok {
			column, value = "", k
		}
		f.Keys = append(f.Keys, catalog.KeyFilter{Column: column, Value: value})
	}
	for name, into := range map[string]*time.Time{"since": &f.Since, "until": &f.Until} {
		s := q.Get(name)
		if s == "" {
			continue
		}
		t, err := time.Parse(time.RFC3339, s)
		if err != nil {
			return f, &hinted{fmt.Sprintf("%q is not a time", s), "use RFC 3339, for example 2026-11-25T12:00:00Z"}
		}
		*into = t
	}
	if s := q.Get("before"); s != "" {
		id, err := conflictID(s)
		if err != nil {
			return f, err
		}
		f.Before = id
	}
	if n, err := strconv.Atoi(q.Get("limit")); err == nil {
		f.Limit = n
	}
	return f, nil
}

func conflictID(s string) (int64, error) {
	id, err := strconv.ParseInt(s, 10, 64)
	if err != nil || id <= 0 {
		return 0, &hinted{fmt.Sprintf("%q is not the number of a record", s), "`duri conflict list` shows the numbers"}
	}
	return id, nil
}

// consult answers a request about the records of a database: f reads the request, query works in a session.
func (a *Agent) consult(w http.ResponseWriter, r *http.Request, f func(*node) (query func(*pgconn.PgConn) (any, error), err error)) {
	n, err := a.pick(r)
	var query func(*pgconn.PgConn) (any, error)
	if err == nil {
		query, err = f(n)
	}
	if err != nil {
		writeError(w, http.StatusBadRequest, err)
		return
	}
	var out any
	err = n.withSession(r.Context(), func(c *pgconn.PgConn) (err error) {
		out, err = query(c)
		return err
	})
	if err != nil {
		writeError(w, conflictStatus(err), err)
		return
	}
	writeJSON(w, http.StatusOK, out)
}

// conflictStatus chooses the HTTP status of an error.
func conflictStatus(err error) int {
	var none *catalog.NoRecordError
	var refused *catalog.RefusedError
	switch {
	case errors.As(err, &none):
		return http.StatusNotFound
	case errors.As(err, &refused):
		return http.StatusConflict
	}
	return http.StatusServiceUnavailable
}

func (n *node) filter(r *http.Request) (catalog.ConflictFilter, error) {
	return conflictFilter(r.URL.Query(), func(name string) (wal.SiteID, bool) {
		s, ok := n.cfg.SiteByName(name)
		return s.ID, ok
	})
}

func (a *Agent) getConflicts(w http.ResponseWriter, r *http.Request) {
	a.consult(w, r, func(n *node) (func(*pgconn.PgConn) (any, error), error) {
		f, err := n.filter(r)
		return func(c *pgconn.PgConn) (any, error) { return catalog.Conflicts(r.Context(), c, f) }, err
	})
}

func (a *Agent) getConflictStats(w http.ResponseWriter, r *http.Request) {
	a.consult(w, r, func(n *node) (func(*pgconn.PgConn) (any, error), error) {
		f, err := n.filter(r)
		return func(c *pgconn.PgConn) (any, error) { return catalog.CountConflicts(r.Context(), c, f) }, err
	})
}

func (a *Agent) getConflict(w http.ResponseWriter, r *http.Request) {
	a.consult(w, r, func(n *node) (func(*pgconn.PgConn) (any, error), error) {
		id, err := conflictID(r.PathValue("id"))
		return func(c *pgconn.PgConn) (any, error) { return n.conflict(r.Context(), c, id) }, err
	})
}

func (n *node) conflict(ctx context.Context, c *pgconn.PgConn, id int64) (ConflictDetail, error) {
	record, err := catalog.ConflictByID(ctx, c, id)
	if err != nil {
		return ConflictDetail{}, err
	}
	order, err := catalog.TableColumns(ctx, c, record.Schema, record.Table)
	if err != nil {
		return ConflictDetail{}, err
	}
	out := ConflictDetail{Conflict: record, OriginName: n.siteName(record.Origin), Verdict: record.Explain(n.siteName)}
	if record.LocalSite != 0 {
		out.LocalName = n.siteName(record.LocalSite)
	}
	out.Columns, err = record.Columns(order)
	return out, err
}

func (a *Agent) postRestore(w http.ResponseWriter, r *http.Request) {
	a.consult(w, r, func(*node) (func(*pgconn.PgConn) (any, error), error) {
		var req RestoreRequest
		id, err := conflictID(r.PathValue("id"))
		if err == nil {
			if err = json.NewDecoder(r.Body).Decode(&req); err != nil {
				err = fmt.Errorf("read the request: %w", err)
			}
		}
		return func(c *pgconn.PgConn) (any, error) {
			return catalog.RestoreConflict(r.Context(), c, id, catalog.RestoreOptions{DryRun: req.DryRun, Force: req.Force, By: req.By})
		}, err
	})
}
