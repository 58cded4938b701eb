package gateway

import (
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pgtest"
)

// TestOnePreparingAnewIsEnough: drivers do so once when a statement's result has changed (asyncpg, PgJDBC), and then expect it
// to be good, wherever the session is then.
func TestOnePreparingAnewIsEnough(t *testing.T) {
	sites := twins(t)
	_, addr := serve(t, Config{Mode: TransactionMode}, sites...)
	for _, c := range sites {
		pgtest.Exec(t, c, "shop", "CREATE TABLE wide AS SELECT 1 AS a; GRANT SELECT ON wide TO app")
	}
	raw := open1(t, dsn(addr, "")).PgConn()
	prepare := func(name string) {
		if _, err := raw.Prepare(t.Context(), name, "SELECT * FROM wide", nil); err != nil {
			t.Fatal(name, err)
		}
	}
	use := func(name string) *pgconn.Result { return raw.ExecPrepared(t.Context(), name, nil, nil, nil).Read() }
	prepare("old")
	for range 4 { // Both have it.
		if res := use("old"); res.Err != nil {
			t.Fatal(res.Err)
		}
	}
	for _, c := range sites {
		pgtest.Exec(t, c, "shop", "ALTER TABLE wide ADD COLUMN b int DEFAULT 2")
	}
	wantCode(t, "old statement", use("old").Err, "0A000", "cached plan must not change result type")
	prepare("new")
	for range 4 {
		if res := use("new"); res.Err != nil || len(res.Rows[0]) != 2 {
			t.Errorf("prepared anew: %v, %q", res.Err, res.Rows)
		}
	}
}
