package trial

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// atom is a kind of statement that the generator draws from, with its weight.
type atom struct {
	name   string
	weight int
	// draw makes a statement over so many rows; an empty one when there is nothing to do.
	draw func(c *client, many int) step
}

// atomSavepoint puts some statements between SAVEPOINT and RELEASE or ROLLBACK TO.
const atomSavepoint = "savepoint"

var allAtoms = []atom{
	{"upsert", 300, (*client).upsert},
	{"insert", 60, (*client).insert},
	{"update", 200, (*client).update},
	{"update-big", 60, (*client).updateBig},
	{"delete", 160, (*client).remove},
	{"key-change", 60, (*client).keyChange},
	{"spelling", 20, (*client).respell},
	{"bag", 60, (*client).bag},
	{"bag-full", 60, (*client).bagFull},
	{"truncate", 2, (*client).truncate},
	{"truncate-bag", 1, (*client).truncateBag},
	{atomSavepoint, 0, func(*client, int) step { return step{} }},
}

// Atoms are the names of all kinds of statements.
func Atoms() []string {
	var all []string
	for _, a := range allAtoms {
		all = append(all, a.name)
	}
	return all
}

// keyed draws a table with a key.
func (c *client) keyed() int {
	return []int{tableInt, tableInt, tableInt, tableText, tableFull, tableFull, tableNumeric}[c.rng.IntN(7)]
}

// keys draws so many different keys, as numbers in order: whoever locks rows in order meets fewer deadlocks.
func (c *client) keys(many int) []int {
	all := map[int]bool{}
	for range min(many, c.r.s.Keys/2) {
		all[1+c.rng.IntN(c.r.s.Keys)] = true
	}
	var out []int
	for k := range all {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// keyValues are a key's values in SQL, in the order of table.key. Numeric ones are spelled in three ways.
func (c *client) keyValues(t, k int) []string {
	spelled := strconv.Itoa(k) + []string{"", ".0", ".00"}[c.rng.IntN(3)]
	switch t {
	case tableInt:
		return []string{strconv.Itoa(k)}
	case tableText:
		return []string{fmt.Sprintf("'k%d'", k)}
	case tableFull:
		return []string{fmt.Sprintf("'%c'", 'x'+rune(k%3)), spelled}
	}
	return []string{spelled}
}

// keyText is the same key as effects show it.
func keyText(t, k int) string {
	switch t {
	case tableText:
		return "k" + strconv.Itoa(k)
	case tableFull:
		return string('x'+rune(k%3)) + separator + strconv.Itoa(k)
	}
	return strconv.Itoa(k)
}

// big is a value that is stored out of line.
func (c *client) big() string { return "repeat('" + c.value() + "_', 400)" }

// row is a whole row in SQL, in the order of the columns.
func (c *client) row(t, k int) string {
	key := c.keyValues(t, k)
	var out []string
	for i, col := range tables[t].cols {
		switch at := slices.Index(tables[t].key, i); {
		case at >= 0:
			out = append(out, key[at])
		case col.big && c.rng.IntN(4) > 0:
			out = append(out, "NULL")
		case col.big:
			out = append(out, c.big())
		case col.name == "n":
			out = append(out, strconv.Itoa(c.rng.IntN(10)))
		default:
			out = append(out, "'"+c.value()+"'")
		}
	}
	return "(" + strings.Join(out, ", ") + ")"
}

func (c *client) rows(t, many int) string {
	var rows []string
	for _, k := range c.keys(many) {
		rows = append(rows, c.row(t, k))
	}
	return strings.Join(rows, ", ")
}

func keyColumns(t int) string {
	var out []string
	for _, i := range tables[t].key {
		out = append(out, tables[t].cols[i].name)
	}
	return strings.Join(out, ", ")
}

// returning gives key and image of each row.
func returning(t int, alias string) string {
	return " RETURNING " + tables[t].keySQL(alias) + ", " + tables[t].imageSQL(alias)
}

// written makes the effects of a statement with returning.
func written(t int, op wal.Op, upsert bool) func([]string) effect {
	return func(row []string) effect {
		return effect{table: t, op: op, upsert: upsert, key: row[0], old: row[0], image: row[1]}
	}
}

func (c *client) upsert(many int) step {
	t := c.keyed()
	set := "v = excluded.v"
	if t != tableFull && c.rng.IntN(2) == 0 {
		set += ", n = " + tables[t].name + ".n + 1"
	}
	return step{"INSERT INTO " + tables[t].name + " VALUES " + c.rows(t, many) + " ON CONFLICT (" + keyColumns(t) + ") DO UPDATE SET " + set +
		returning(t, tables[t].name+"."), written(t, wal.Insert, true)}
}

func (c *client) insert(many int) step {
	t := c.keyed()
	return step{"INSERT INTO " + tables[t].name + " VALUES " + c.rows(t, many) + " ON CONFLICT DO NOTHING" + returning(t, ""), written(t, wal.Insert, false)}
}

// among is a condition on so many keys.
func (c *client) among(t, many int) string {
	var all []string
	for _, k := range c.keys(many) {
		all = append(all, "("+strings.Join(c.keyValues(t, k), ", ")+")")
	}
	return " WHERE (" + keyColumns(t) + ") IN (" + strings.Join(all, ", ") + ")"
}

func (c *client) update(many int) step {
	t := c.keyed()
	set := "v = '" + c.value() + "'"
	if t != tableFull && c.rng.IntN(2) == 0 {
		set = "n = n + 1"
	}
	return step{"UPDATE " + tables[t].name + " SET " + set + c.among(t, many) + returning(t, ""), written(t, wal.Update, false)}
}

func (c *client) updateBig(many int) step {
	t := []int{tableInt, tableFull}[c.rng.IntN(2)]
	set := "big = " + c.big()
	if c.rng.IntN(2) == 0 {
		set += ", v = '" + c.value() + "'"
	}
	return step{"UPDATE " + tables[t].name + " SET " + set + c.among(t, min(many, 4)) + returning(t, ""), written(t, wal.Update, false)}
}

func (c *client) remove(many int) step {
	t := c.keyed()
	return step{"DELETE FROM " + tables[t].name + c.among(t, many) + " RETURNING " + tables[t].keySQL(""), func(row []string) effect {
		return effect{table: t, op: wal.Delete, key: row[0], old: row[0]}
	}}
}

// assign sets a key's columns.
func (c *client) assign(t, k int) string {
	v := c.keyValues(t, k)
	var out []string
	for at, i := range tables[t].key {
		out = append(out, tables[t].cols[i].name+" = "+v[at])
	}
	return strings.Join(out, ", ")
}

// same is the condition that a row has a key.
func (c *client) same(t, k int) string {
	return "(" + keyColumns(t) + ") = (" + strings.Join(c.keyValues(t, k), ", ") + ")"
}

// keyChange moves a row to a key that is free, as far as the client can see.
func (c *client) keyChange(int) step {
	t := c.keyed()
	from, to := 1+c.rng.IntN(c.r.s.Keys), 1+c.rng.IntN(c.r.s.Keys)
	if from == to {
		to = 1 + to%c.r.s.Keys
	}
	set := c.assign(t, to)
	if c.rng.IntN(2) == 0 {
		set += ", v = '" + c.value() + "'"
	}
	name := tables[t].name
	return step{
		fmt.Sprintf("UPDATE %s SET %s WHERE %s AND NOT EXISTS (SELECT FROM %s WHERE %s)%s", name, set, c.same(t, from), name, c.same(t, to), returning(t, "")),
		func(row []string) effect {
			return effect{table: t, op: wal.Update, key: row[0], old: keyText(t, from), image: row[1]}
		},
	}
}

// respell writes a numeric key in another way: the value stays the same.
func (c *client) respell(int) step {
	t := []int{tableFull, tableNumeric}[c.rng.IntN(2)]
	k := 1 + c.rng.IntN(c.r.s.Keys)
	return step{"UPDATE " + tables[t].name + " SET " + c.assign(t, k) + " WHERE " + c.same(t, k) + returning(t, ""), written(t, wal.Update, false)}
}

func (c *client) bag(many int) step {
	var rows []string
	for range min(many, 12) {
		rows = append(rows, "('"+c.value()+"')")
	}
	return step{"INSERT INTO bag VALUES " + strings.Join(rows, ", ") + returning(tableBag, ""), written(tableBag, wal.Insert, false)}
}

// bagFull inserts, or changes a row of the client's own: two sites that update one row of a table without a key leave two.
func (c *client) bagFull(many int) step {
	if len(c.mine) == 0 || c.rng.IntN(2) == 0 {
		var rows []string
		for range min(many, 6) {
			rows = append(rows, "('"+c.value()+"', '"+c.value()+"')")
		}
		return step{"INSERT INTO bag_full VALUES " + strings.Join(rows, ", ") + returning(tableFullBag, ""), written(tableFullBag, wal.Insert, false)}
	}
	row := c.mine[c.rng.IntN(len(c.mine))]
	where := " WHERE id = " + pg.QuoteLiteral(row.id)
	if len(c.mine) < 20 && c.rng.IntN(2) == 0 {
		return step{"UPDATE bag_full SET v = '" + c.value() + "'" + where + returning(tableFullBag, ""), written(tableFullBag, wal.Update, false)}
	}
	return step{"DELETE FROM bag_full" + where + " RETURNING id", func(r []string) effect {
		return effect{table: tableFullBag, op: wal.Delete, key: r[0], old: r[0]}
	}}
}

func (c *client) truncate(int) step { return truncateOf(c.keyed()) }

func (c *client) truncateBag(int) step { return truncateOf(tableBag) }

func truncateOf(t int) step {
	return step{"TRUNCATE " + tables[t].name, func([]string) effect { return effect{table: t, op: wal.Truncate} }}
}
