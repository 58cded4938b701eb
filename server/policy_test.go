package server

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/policy"
)

func TestTheAgentDescribesTables(t *testing.T) {
	c := pgtest.New(t, pgtest.WithSetting("wal_level", "logical"), pgtest.WithSetting("track_commit_timestamp", "on"))
	pgtest.DB(t, c, "shop")
	pgtest.Exec(t, c, "shop", "CREATE TABLE account (id int PRIMARY KEY, balance numeric); ALTER TABLE account REPLICA IDENTITY FULL; CREATE SCHEMA hidden; CREATE TABLE hidden.t (id int)")
	pgtest.Exec(t, c, "shop", grants.SQL(grants.Spec{Schemas: []string{"public"}}))
	db := config.Database{Name: "shop", Schemas: []string{"public"}, Tables: map[string]policy.Table{"public.account": {Delta: []string{"balance"}}}}
	n := &node{cfg: &config.Config{Postgres: config.Postgres{DSN: c.DSN("shop", "duri")}}, database: db}
	a := &Agent{nodes: []*node{n}}
	get := func(query string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		a.getTables(w, httptest.NewRequest(http.MethodGet, "/v1/tables"+query, nil).WithContext(t.Context()))
		return w
	}
	if w := get(""); w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), "error") {
		t.Errorf("before it is ready: %d %s", w.Code, w.Body)
	}
	if w := get("?database=other"); w.Code != http.StatusBadRequest {
		t.Errorf("another database: %d %s", w.Code, w.Body)
	}
	conn, err := pg.Connect(t.Context(), c.DSN("shop", "duri"), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(conn)
	if err := catalog.Migrate(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	n.ready.Store(&captured{})
	w := get("?database=shop")
	var got []catalog.Table
	if err := json.Unmarshal(w.Body.Bytes(), &got); w.Code != http.StatusOK || err != nil {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	if len(got) != 2 || got[1].Name != "account" || got[1].PolicySource != "duri.yaml" || len(got[1].Delta) != 1 || !got[1].Replicated || got[0].Replicated {
		t.Errorf("%+v", got)
	}
}
