package server

import (
	"fmt"
	"strings"
	"testing"

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
