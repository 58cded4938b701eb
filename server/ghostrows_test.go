package server

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/verify"
	"github.com/duri-io/duri/wal"
)

// tupleOf makes a row of texts; "-" is NULL, "?" unchanged, "!" omitted.
func tupleOf(values ...string) wal.Tuple {
	var row wal.Tuple
	for _, v := range values {
		switch v {
		case "-":
			row = append(row, wal.Value{Kind: wal.Null})
		case "?":
			row = append(row, wal.Value{Kind: wal.Unchanged})
		case "!":
			row = append(row, wal.Value{Kind: wal.Omitted})
		default:
			row = append(row, wal.Value{Kind: wal.Text, Data: []byte(v)})
		}
	}
	return row
}

func shown(c verify.Chosen) string {
	var all []string
	for _, k := range c.Keys {
		all = append(all, strings.Join(k, "/"))
	}
	for _, row := range c.Rows {
		var values []string
		for _, v := range row {
			if v == nil {
				values = append(values, "-")
			} else {
				values = append(values, *v)
			}
		}
		all = append(all, "("+strings.Join(values, ",")+")")
	}
	if c.All {
		all = append(all, "all")
	}
	return strings.Join(all, " ")
}

// TestWhichRowsWereWritten: each key that a transaction has touched, or the whole table where that cannot be told.
func TestWhichRowsWereWritten(t *testing.T) {
	columns := func(keys ...string) (all []wal.Column) { // a b c
		for _, name := range []string{"a", "b", "c"} {
			all = append(all, wal.Column{Name: name, Key: strings.Contains(strings.Join(keys, ""), name)})
		}
		return all
	}
	rel := func(keys ...string) *wal.Relation {
		return &wal.Relation{Namespace: "s", Name: "t", Columns: columns(keys...)}
	}
	insert := func(row ...string) wal.Change {
		return wal.Change{Op: wal.Insert, Relation: rel("a"), New: tupleOf(row...)}
	}
	text := func(v string) *string { return &v }
	for _, c := range []struct {
		name    string
		key     []string
		changes []wal.Change
		judged  []map[string]*string
		want    string
	}{
		{"nothing", []string{"a"}, nil, nil, ""},
		{"inserts, one twice", []string{"a"}, []wal.Change{insert("1", "x", "-"), insert("2", "x", "y"), insert("1", "z", "y")}, nil, "1 2"},
		{"a key of two columns, in its order", []string{"b", "a"}, []wal.Change{insert("1", "x", "-")}, nil, "x/1"},
		{"an update", []string{"a"}, []wal.Change{{Op: wal.Update, Relation: rel("a"), New: tupleOf("1", "?", "y")}}, nil, "1"},
		{"an update of the key", []string{"a"}, []wal.Change{{Op: wal.Update, Relation: rel("a"), OldKind: wal.OldKey, Old: tupleOf("1", "!", "!"), New: tupleOf("2", "x", "y")}}, nil, "1 2"},
		{"a delete", []string{"a"}, []wal.Change{{Op: wal.Delete, Relation: rel("a"), OldKind: wal.OldKey, Old: tupleOf("1", "!", "!")}}, nil, "1"},
		{"a delete by another replica identity", []string{"a"}, []wal.Change{{Op: wal.Delete, Relation: rel("b"), OldKind: wal.OldKey, Old: tupleOf("!", "x", "!")}}, nil, "all"},
		{"an update with another replica identity", []string{"a"}, []wal.Change{{Op: wal.Update, Relation: rel("b"), New: tupleOf("1", "x", "y")}}, nil, "all"},
		{"a full replica identity", []string{"a"}, []wal.Change{{Op: wal.Update, Relation: rel("a", "b", "c"), OldKind: wal.OldFull, Old: tupleOf("1", "x", "y"), New: tupleOf("3", "x", "y")}}, nil, "1 3"},
		{"a key that was not sent", []string{"a"}, []wal.Change{{Op: wal.Update, Relation: rel("a"), New: tupleOf("?", "x", "y")}}, nil, "all"},
		{"a key that the table did not have", []string{"d"}, []wal.Change{insert("1", "x", "y")}, nil, "all"},
		{"a truncation", []string{"a"}, []wal.Change{insert("1", "x", "y"), {Op: wal.Truncate, Relation: rel("a")}}, nil, "all"},
		{"rows that were judged", []string{"a"}, []wal.Change{insert("1", "x", "y")}, []map[string]*string{{"a": text("7")}, {"a": text("1")}}, "1 7"},
		{"a row that was judged by another key", []string{"a"}, nil, []map[string]*string{{"b": text("7")}}, "all"},
		{"without a key, inserts", nil, []wal.Change{insert("1", "-", "y")}, nil, "(1,-,y)"},
		{"without a key, an update", nil, []wal.Change{{Op: wal.Update, Relation: rel("a", "b", "c"), OldKind: wal.OldFull, Old: tupleOf("1", "x", "y"), New: tupleOf("3", "x", "y")}}, nil, "(1,x,y) (3,x,y)"},
		{"without a key, a delete", nil, []wal.Change{{Op: wal.Delete, Relation: rel("a", "b", "c"), OldKind: wal.OldFull, Old: tupleOf("1", "x", "y")}}, nil, "(1,x,y)"},
		{"without a key, an update without the old row", nil, []wal.Change{{Op: wal.Update, Relation: rel("a"), New: tupleOf("3", "x", "y")}}, nil, "all"},
		{"without a key, a value that was not sent", nil, []wal.Change{{Op: wal.Update, Relation: rel("a", "b", "c"), OldKind: wal.OldFull, Old: tupleOf("1", "x", "y"), New: tupleOf("3", "?", "y")}}, nil, "all"},
		{"without a key, a row that was judged", nil, []wal.Change{insert("1", "x", "y")}, []map[string]*string{nil}, "all"},
	} {
		w := writtenRows{}
		w.add(&wal.Txn{Changes: c.changes})
		for _, k := range c.judged {
			x := w.of("s", "t")
			x.keys = append(x.keys, k)
		}
		table := verify.Table{Schema: "s", Name: "t", Key: c.key, Columns: []verify.Column{{Name: "a"}, {Name: "b"}, {Name: "c"}}}
		if got := shown(w.choose(table)); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
		if got := shown(w.choose(verify.Table{Schema: "s", Name: "other", Key: c.key})); got != "" {
			t.Errorf("%s: of another table %q", c.name, got)
		}
	}
	if w := (writtenRows{{"s", "t"}: {}}); !w.within([]verify.Table{{Schema: "s", Name: "o"}, {Schema: "s", Name: "t"}}) || w.within([]verify.Table{{Schema: "t", Name: "s"}}) {
		t.Error("a table that is not there is not noticed")
	}
	if got := fmt.Sprint(writtenRows{{"s", "t"}: {all: true}}.choose(verify.Table{Schema: "s", Name: "t"}).All); got != "true" {
		t.Error("a table of which nothing is known is not compared as a whole")
	}
}

// TestRowsThatWereJudgedSince: what the other site's changes met is found by their position as well, as the clock may have been set
// back since; rows that are or were parked are, whenever that was; and what was judged long before is not.
func TestRowsThatWereJudgedSince(t *testing.T) {
	c := pgtest.New(t)
	pgtest.DB(t, c, "app")
	pgtest.Exec(t, c, "app", grants.SQL(grants.Spec{}))
	conn, err := pg.Connect(t.Context(), c.DSN("", "duri"), "app", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(conn)
	if err := catalog.Migrate(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	g, err := catalog.DeclareGap(t.Context(), conn, catalog.Gap{Origin: 2, Peer: 1, Reason: ghostsReason + "0/3000"})
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	for key, x := range map[string]struct {
		at     time.Duration
		origin int
		lsn    string
	}{
		"long before":                     {-24 * time.Hour, 2, "0/F00"},
		"before, of a third site":         {-24 * time.Hour, 3, "0/F000"},
		"since":                           {time.Second, 3, "0/1"},
		"since, by a clock that was back": {-24 * time.Hour, 2, "0/1000"},
	} {
		pgtest.Exec(t, c, "app", fmt.Sprintf(`INSERT INTO duri.conflict (at, kind, code, table_schema, table_name, key, origin, origin_lsn, origin_xid, change, remote_time)
			VALUES ('%s', 'x', 'lost', 's', 't', '{"id": "%s"}', %d, '%s', 1, 1, now())`, at.Add(x.at).Format(time.RFC3339), key, x.origin, x.lsn))
	}
	pgtest.Exec(t, c, "app", fmt.Sprintf(`INSERT INTO duri.parked (table_schema, table_name, key_norm, key, site, time, end_lsn, row, "constraint", rival, at)
		VALUES ('s', 'parked', 'x', '{"id": "parked"}', 2, '2020-01-01', '0/1', '{}', 'u', 'y', '2020-01-01');
		INSERT INTO duri.gap_row (gap, table_schema, table_name, key, done) VALUES (%d, 's', 't', '{"id": "was parked"}', true), (%[1]d, 's', 't', '["mended"]', true);
		INSERT INTO duri.conflict (at, kind, code, table_schema, table_name, origin, origin_lsn, origin_xid, change, remote_time)
		VALUES ('%[2]s', 'x', 'lost', 's', 'heap', 2, '0/1000', 1, 1, now())`, g.ID, at.Format(time.RFC3339)))
	rows := writtenRows{}
	if err := rows.addJudged(t.Context(), conn, moment{wal.TimeOf(at), 0x1000}, g); err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, k := range rows.of("s", "t").keys {
		keys = append(keys, *k["id"])
	}
	slices.Sort(keys)
	if got, want := strings.Join(keys, "; "), "since; since, by a clock that was back; was parked"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if x := rows.of("s", "parked"); len(x.keys) != 1 || x.all || !rows.of("s", "heap").all {
		t.Errorf("parked %+v, heap %+v", x, rows.of("s", "heap"))
	}
}
