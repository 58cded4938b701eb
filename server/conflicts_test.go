package server

import (
	"context"
	"errors"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/wal"
)

func TestConflictFilterReadsTheQuery(t *testing.T) {
	site := func(name string) (wal.SiteID, bool) { return 2, name == "busan" }
	q, err := url.ParseQuery("table=public.t&kind=k&code=lost&origin=busan&key=7&key=id%3Da%3Db&since=2026-11-25T12:00:00.5Z&until=2026-11-26T12:00:00%2B09:00&before=9&limit=3&exceptions=true")
	if err != nil {
		t.Fatal(err)
	}
	got, err := conflictFilter(q, site)
	if err != nil {
		t.Fatal(err)
	}
	want := catalog.ConflictFilter{
		Table: "public.t", Kind: "k", Code: "lost", Origin: 2, Keys: []catalog.KeyFilter{{Value: "7"}, {Column: "id", Value: "a=b"}},
		Since: time.Date(2026, 11, 25, 12, 0, 0, 5e8, time.UTC), Until: time.Date(2026, 11, 26, 3, 0, 0, 0, time.UTC),
		Before: 9, Limit: 3, Exceptions: true,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if got, err := conflictFilter(url.Values{}, site); err != nil || cmp.Diff(catalog.ConflictFilter{}, got) != "" {
		t.Errorf("without a query: %+v %v", got, err)
	}
	for bad, says := range map[string]string{"origin=jeju": `"jeju"`, "since=yesterday": "is not a time", "until=7": "is not a time", "before=x": "number of a record", "before=-1": "number of a record"} {
		q, err := url.ParseQuery(bad)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conflictFilter(q, site); err == nil || !strings.Contains(err.Error(), says) || hintOf(err) == "" {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// controlled serves the control socket of an agent with one database that has duri's tables, and nothing else.
func controlled(t *testing.T) (*pgcluster.Cluster, *Control) {
	t.Helper()
	c := pgtest.New(t)
	pgtest.DB(t, c, "shop")
	pgtest.Exec(t, c, "shop", grants.SQL(grants.Spec{}))
	conn, err := pg.Connect(t.Context(), c.DSN("shop", "duri"), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(conn)
	if err := catalog.Migrate(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "duri") // not of the test's name: a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg := &config.Config{
		DataDir: dir, Site: "seoul", Sites: []config.Site{{ID: 1, Name: "seoul"}, {ID: 2, Name: "busan"}},
		Postgres: config.Postgres{DSN: c.DSN("shop", "duri")},
	}
	a := &Agent{cfg: cfg, nodes: []*node{{cfg: cfg, database: config.Database{Name: "shop"}}}}
	ln, err := net.Listen("unix", filepath.Join(dir, "control.sock"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.serveControl(ctx, ln) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return c, NewControl(dir)
}

const lostUpdate = `CREATE TABLE account (id int PRIMARY KEY, owner text, note text); INSERT INTO account VALUES (7, 'at b', NULL);
INSERT INTO duri.conflict (kind, code, table_schema, table_name, key, origin, origin_lsn, origin_xid, change, remote_time, remote_row, local_site, local_time, local_row)
VALUES ('update_origin_differs', 'won', 'public', 'account', '{"id": "7"}', 2, '0/16B3748', 700, 3, '2026-11-25 12:00:02Z',
	'{"id": "7", "owner": "at b", "note": null}', 1, '2026-11-25 12:00:00Z', '{"id": "7", "owner": "at a", "note": ""}')`

func TestControlShowsCountsAndRestoresConflicts(t *testing.T) {
	c, control := controlled(t)
	pgtest.Exec(t, c, "shop", lostUpdate)
	ctx := t.Context()

	list, err := control.Conflicts(ctx, url.Values{"origin": {"busan"}, "key": {"id=7"}})
	if err != nil || len(list) != 1 {
		t.Fatalf("%v, %+v", err, list)
	}
	id := list[0].ID
	if list, err = control.Conflicts(ctx, url.Values{"key": {"id=8"}}); err != nil || len(list) != 0 || list == nil {
		t.Errorf("another key: %v, %+v", err, list)
	}
	stats, err := control.ConflictStats(ctx, nil)
	if err != nil || stats.Total != 1 || len(stats.Counts) != 1 || stats.Counts[0].Table != "account" {
		t.Errorf("%v, %+v", err, stats)
	}
	got, err := control.Conflict(ctx, "shop", id)
	if err != nil {
		t.Fatal(err)
	}
	if got.OriginName != "busan" || got.LocalName != "seoul" || got.ID != id ||
		got.Verdict.Text != "busan's update won over seoul's row: it was committed 2 s later" {
		t.Errorf("%+v", got)
	}
	columns := []catalog.ColumnPair{
		{Column: "id", Local: []byte(`"7"`), Remote: []byte(`"7"`)},
		{Column: "owner", Local: []byte(`"at a"`), Remote: []byte(`"at b"`), Differs: true},
		{Column: "note", Local: []byte(`""`), Remote: []byte(`null`), Differs: true},
	}
	if d := cmp.Diff(columns, got.Columns); d != "" {
		t.Error(d)
	}

	if r, err := control.Restore(ctx, "", id, RestoreRequest{DryRun: true}); err != nil || !r.DryRun || r.SQL == "" {
		t.Errorf("dry run: %v, %+v", err, r)
	}
	owner := func() string { return pgtest.Query(t, c, "shop", "SELECT owner FROM account")[0][0] }
	if owner() != "at b" {
		t.Errorf("after the dry run %s", owner())
	}
	pgtest.Exec(t, c, "shop", "UPDATE account SET owner = 'later'")
	problem(t, 5, "changed again", func() error { _, err := control.Restore(ctx, "", id, RestoreRequest{}); return err })
	if r, err := control.Restore(ctx, "", id, RestoreRequest{Force: true, By: "kim"}); err != nil || r.Action != catalog.ActionUpdate || owner() != "at a" {
		t.Errorf("forced: %v, %+v, %s", err, r, owner())
	}
	if by := pgtest.Query(t, c, "shop", "SELECT data ->> 'by' FROM duri.event")[0][0]; by != "kim" {
		t.Errorf("restored by %q", by)
	}
	problem(t, 1, "no such record", func() error { _, err := control.Conflict(ctx, "", 4711); return err })
	problem(t, 1, "no such record", func() error { _, err := control.Restore(ctx, "", 4711, RestoreRequest{}); return err })
	problem(t, 1, "number of a record", func() error { _, err := control.Conflict(ctx, "", -1); return err })
	problem(t, 1, "is not replicated", func() error { _, err := control.Conflict(ctx, "other", id); return err })
	problem(t, 1, "is not a time", func() error { _, err := control.ConflictStats(ctx, url.Values{"since": {"x"}}); return err })
	if n := pgtest.Query(t, c, "shop", "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'duri_control' AND state <> 'idle'")[0][0]; n != "0" {
		t.Errorf("%s sessions are still at work", n)
	}
}

// problem checks an error of the agent: the exit code, what it says, and that there is advice.
func problem(t *testing.T, code int, says string, call func() error) {
	t.Helper()
	err := call()
	var e *remoteError
	if !errors.As(err, &e) || e.ExitCode() != code || !strings.Contains(e.Error(), says) || e.HintText() == "" {
		t.Errorf("error %v, want one that says %q, with exit code %d and a hint", err, says, code)
	}
}
