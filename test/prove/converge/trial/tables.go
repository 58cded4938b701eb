package trial

import (
	"bytes"
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/duri-io/duri/wal"
)

// column of a table under test.
type column struct {
	name    string
	numeric bool // equal values may be spelled differently
	big     bool // stored out of line; images hold its MD5
}

// table under test.
type table struct {
	name string
	cols []column
	// key are the columns that tell rows apart, by their place. A table without a primary key has one all the same: its
	// clients never write one value twice.
	key     []int
	keyless bool
	ddl     string
}

// The tables, by how they are keyed.
const (
	tableInt = iota
	tableText
	tableFull // composite key, REPLICA IDENTITY FULL
	tableNumeric
	tableBag     // no key, INSERT and TRUNCATE only
	tableFullBag // no key, REPLICA IDENTITY FULL
)

var tables = []table{
	tableInt: {
		name: "t_int", cols: []column{{name: "id"}, {name: "v"}, {name: "n"}, {name: "big", big: true}}, key: []int{0},
		ddl: "CREATE TABLE t_int (id int PRIMARY KEY, v text, n int, big text); ALTER TABLE t_int ALTER big SET STORAGE EXTERNAL",
	},
	tableText: {
		name: "t_text", cols: []column{{name: "v"}, {name: "id"}, {name: "n"}}, key: []int{1},
		ddl: "CREATE TABLE t_text (v text, id text PRIMARY KEY, n int)",
	},
	tableFull: {
		name: "t_full", cols: []column{{name: "a", numeric: true}, {name: "b"}, {name: "v"}, {name: "big", big: true}}, key: []int{1, 0},
		ddl: `CREATE TABLE t_full (a numeric, b text, v text, big text, PRIMARY KEY (b, a)); ALTER TABLE t_full REPLICA IDENTITY FULL;
			ALTER TABLE t_full ALTER big SET STORAGE EXTERNAL`,
	},
	tableNumeric: {
		name: "t_num", cols: []column{{name: "id", numeric: true}, {name: "v"}, {name: "n"}}, key: []int{0},
		ddl: "CREATE TABLE t_num (id numeric PRIMARY KEY, v text, n int)",
	},
	tableBag: {
		name: "bag", cols: []column{{name: "id"}}, key: []int{0}, keyless: true,
		ddl: "CREATE TABLE bag (id text)",
	},
	tableFullBag: {
		name: "bag_full", cols: []column{{name: "id"}, {name: "v"}}, key: []int{0}, keyless: true,
		ddl: "CREATE TABLE bag_full (id text, v text); ALTER TABLE bag_full REPLICA IDENTITY FULL",
	},
}

func schemaSQL() string {
	var all []string
	for _, t := range tables {
		all = append(all, t.ddl)
	}
	return strings.Join(all, ";\n")
}

// tableNamed gives a table's number.
func tableNamed(name string) (int, bool) {
	i := slices.IndexFunc(tables, func(t table) bool { return t.name == name })
	return i, i >= 0
}

const (
	separator = "\x1f" // between the values of an image and of a key
	null      = `\N`
)

// keySQL is the key of a row as SQL gives it, one text for each value.
func (t *table) keySQL(alias string) string {
	var parts []string
	for _, i := range t.key {
		c := alias + t.cols[i].name
		if t.cols[i].numeric {
			c = "trim_scale(" + c + ")"
		}
		parts = append(parts, c+"::text")
	}
	return strings.Join(parts, " || E'\\x1f' || ")
}

// imageSQL is the whole row.
func (t *table) imageSQL(alias string) string {
	var parts []string
	for _, c := range t.cols {
		v := alias + c.name + "::text"
		if c.big {
			v = "md5(" + v + ")"
		}
		parts = append(parts, "coalesce("+v+`, '\N')`)
	}
	return strings.Join(parts, " || E'\\x1f' || ")
}

// valueText is one value as images show it.
func (c column) valueText(v []byte) string {
	if !c.big {
		return string(v)
	}
	sum := md5.Sum(v)
	return hex.EncodeToString(sum[:])
}

// keyText is one key value in the form in which equal values are equal texts, as trim_scale writes it.
func (c column) keyText(v []byte) string {
	if c.numeric && bytes.IndexByte(v, '.') >= 0 {
		v = bytes.TrimRight(bytes.TrimRight(v, "0"), ".")
	}
	return string(v)
}

// keyOf is the key of a tuple whose columns stand as in the table.
func (t *table) keyOf(row wal.Tuple) (string, error) {
	var parts []string
	for _, i := range t.key {
		if i >= len(row) || row[i].Kind != wal.Text {
			return "", fmt.Errorf("a row of %s comes without its key", t.name)
		}
		parts = append(parts, t.cols[i].keyText(row[i].Data))
	}
	return strings.Join(parts, separator), nil
}

// sameKey reports whether two tuples spell the key alike: an update that does not is a delete and an insert.
func (t *table) sameKey(a, b wal.Tuple) bool {
	return t.keyless || !slices.ContainsFunc(t.key, func(i int) bool { return !bytes.Equal(a[i].Data, b[i].Data) })
}

// matches reports whether a tuple is the image, as far as its values were sent.
func (t *table) matches(image string, row wal.Tuple) bool {
	want := strings.Split(image, separator)
	if len(want) != len(t.cols) || len(row) != len(t.cols) {
		return false
	}
	for i, v := range row {
		got := null
		switch v.Kind {
		case wal.Unchanged, wal.Omitted:
			continue
		case wal.Text:
			got = t.cols[i].valueText(v.Data)
		}
		if got != want[i] {
			return false
		}
	}
	return true
}

// matchesJSON is matches for an image of a conflict record, in which values that were not sent are missing and big ones
// are hashed already. Of a partial image the big values do not count.
func (t *table) matchesJSON(image string, partial bool, row map[string]*string) bool {
	want := strings.Split(image, separator)
	if len(want) != len(t.cols) || len(row) == 0 {
		return false
	}
	for i, c := range t.cols {
		v, sent := row[c.name]
		if !sent || partial && c.big {
			continue
		}
		got := null
		if v != nil {
			got = *v
		}
		if got != want[i] {
			return false
		}
	}
	return true
}

// keyOfJSON is the key of a conflict record.
func (t *table) keyOfJSON(row map[string]*string) (string, bool) {
	var parts []string
	for _, i := range t.key {
		v := row[t.cols[i].name]
		if v == nil {
			return "", false
		}
		parts = append(parts, t.cols[i].keyText([]byte(*v)))
	}
	return strings.Join(parts, separator), true
}
