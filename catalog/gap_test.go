package catalog

import (
	"slices"
	"testing"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/wal"
)

func TestAGapGrowsIsRepairedAndCounted(t *testing.T) {
	c, conn := migrated(t)
	ctx := t.Context()
	declare := func(to wal.LSN) Gap {
		t.Helper()
		g, err := DeclareGap(ctx, conn, Gap{Origin: 1, Peer: 2, From: 100, To: to, Reason: "tested"})
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	first := declare(200)
	if g := declare(150); g.ID != first.ID || g.To != 200 || g.From != 100 || g.Reason != "tested" || g.Declared.IsZero() {
		t.Errorf("declared again, shorter: %+v", g)
	}
	if g := declare(300); g.ID != first.ID || g.To != 300 {
		t.Errorf("declared again, longer: %+v", g)
	}
	x, gone := "x\x00", "gone"
	ids, err := NoteGapRows(ctx, conn, first.ID, "public", "t", []GapRow{
		{Key: []string{"1"}, Before: map[string]*string{"v": &x}, After: map[string]*string{"v": nil}},
		{Key: []string{"2"}, Before: map[string]*string{"v": &gone}},
		{Key: []string{"3"}, After: map[string]*string{"v": &x}},
		{After: map[string]*string{"v": &x}, Copies: 3, Want: 1},
	})
	if err != nil || len(ids) != 4 {
		t.Fatal(ids, err)
	}
	for range 2 { // counted once
		if err := GapRowsDone(ctx, conn, first.ID, []int64{ids[0], ids[1], ids[3]}); err != nil {
			t.Fatal(err)
		}
	}
	if err := GapPassed(ctx, conn, first.ID); err != nil {
		t.Fatal(err)
	}
	open, err := Gaps(ctx, conn)
	if err != nil || len(open) != 1 || open[0].Written != 1 || open[0].Removed != 2 || open[0].Passes != 1 || open[0].Repaired {
		t.Errorf("open: %+v, %v", open, err)
	}
	rows := pgtest.Query(t, c, "shop", "SELECT key, before, after, want, done FROM duri.gap_row ORDER BY id")
	want := [][]string{
		{`["1"]`, `{"v": "x�"}`, `{"v": null}`, "0", "t"},
		{`["2"]`, `{"v": "gone"}`, `\N`, "0", "t"},
		{`["3"]`, `\N`, `{"v": "x�"}`, "0", "f"},
		{`\N`, `\N`, `{"v": "x�"}`, "1", "t"},
	}
	if !slices.EqualFunc(rows, want, slices.Equal) {
		t.Errorf("%q, want %q", rows, want)
	}
	done, err := GapRepaired(ctx, conn, first.ID, 350)
	if err != nil || !done.Repaired || done.Seen != 350 || done.Resume == 0 {
		t.Errorf("repaired: %+v, %v", done, err)
	}
	next := declare(900)
	if next.ID == first.ID || next.To != 900 {
		t.Errorf("the next one: %+v", next)
	}
	if all, err := Gaps(ctx, conn); err != nil || len(all) != 2 || all[0].ID != first.ID || all[1].ID != next.ID {
		t.Errorf("listed: %+v, %v", all, err)
	}
	if g, err := GapRepaired(ctx, conn, next.ID, 0); err != nil || !g.Repaired || g.Seen != 0 || g.Resume != 0 {
		t.Errorf("closed at the origin: %+v, %v", g, err)
	}
	declare(1000)
	if err := DropGaps(ctx, conn); err != nil {
		t.Fatal(err)
	}
	if all, err := Gaps(ctx, conn); err != nil || len(all) != 1 || all[0].ID != next.ID {
		t.Errorf("after joining anew: %+v, %v", all, err)
	}
}

// TestBeginningAnewMovesTheProgressOnce: what is applied counts up to the end of the gap, with what the origin had seen by then.
func TestBeginningAnewMovesTheProgressOnce(t *testing.T) {
	c, conn := migrated(t)
	g, err := DeclareGap(t.Context(), conn, Gap{Origin: 1, Peer: 2, From: 100, To: 200, Reason: "tested"})
	if err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, c, "shop", `INSERT INTO duri.held (origin, lsn, change, table_schema, table_name, key_norm) VALUES (1, '0/50', 0, 'public', 't', ''), (3, '0/50', 0, 'public', 't', '');
		INSERT INTO duri.applied (xid, origin, from_lsn, to_lsn, min_time, max_time, transactions, changes, records, seen) VALUES
			('7', 1, '0/10', '0/20', now(), '2026-01-01 00:00+00', 1, 1, 0, '0/5'), ('8', 1, '0/20', '0/60', now(), '2026-01-02 00:00+00', 1, 1, 0, '0/9'), ('9', 3, '0/10', '0/20', now(), now(), 1, 1, 0, '0/99')`)
	g.To = 0x250
	for range 2 {
		if err := BeginAnew(t.Context(), conn, g); err != nil {
			t.Fatal(err)
		}
	}
	rows, err := pg.Rows(t.Context(), conn, `SELECT a.to_lsn, seen, max_time = '2026-01-02 00:00+00', min_time = '-infinity', (SELECT g.to_lsn FROM duri.gap g), (SELECT string_agg(origin::text, ',') FROM duri.held)
		FROM duri.applied a WHERE origin = 1 ORDER BY 1 DESC LIMIT 1`)
	if err != nil || !slices.Equal(rows[0], []string{"0/250", "0/9", "t", "t", "0/250", "3"}) {
		t.Errorf("%v, %v", rows, err)
	}
}

func TestWhatIsParkedDuringAGapIsForgottenOnRecord(t *testing.T) {
	c, conn := migrated(t)
	g, err := DeclareGap(t.Context(), conn, Gap{Origin: 1, Peer: 2, From: 100, To: 200, Reason: "tested"})
	if err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, c, "shop", `INSERT INTO duri.parked (table_schema, table_name, key_norm, key, site, time, end_lsn, row, "constraint", rival)
		VALUES ('public', 't', 'x', '["7"]', 1, now(), '0/0', '{"id": "7"}', 'u', 'y')`)
	if err := UnparkForGap(t.Context(), conn, g.ID); err != nil {
		t.Fatal(err)
	}
	rows := pgtest.Query(t, c, "shop", "SELECT key, before, after, done, (SELECT count(*) FROM duri.parked) FROM duri.gap_row")
	if len(rows) != 1 || !slices.Equal(rows[0], []string{`["7"]`, `{"id": "7"}`, `\N`, "t", "0"}) {
		t.Errorf("%q", rows)
	}
}
