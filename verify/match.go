package verify

import (
	"fmt"
	"slices"
	"strings"
)

// match is a table of both sites with the decision how to compare it.
type match struct {
	a, b   Table
	common Table // columns and key of both; what the Sides are asked about
	method Method
	by     Digest
	known  TableReport // what is known before any row was read
}

// rows is the greater estimate.
func (m match) rows() int64 { return max(m.a.Rows, m.b.Rows) }

// matchTables pairs the tables that patterns choose, in order of their names.
func matchTables(a, b []Table, patterns []string, seed int64) (both []match, onlyA, onlyB []string, err error) {
	if a, b, err = selectTables(a, b, patterns); err != nil {
		return nil, nil, nil, err
	}
	atB := map[[2]string]Table{}
	for _, t := range b {
		atB[[2]string{t.Schema, t.Name}] = t
	}
	for _, t := range a {
		id := [2]string{t.Schema, t.Name}
		other, ok := atB[id]
		if !ok {
			onlyA = append(onlyA, t.String())
			continue
		}
		delete(atB, id)
		both = append(both, matchTable(t, other, seed))
	}
	for _, t := range atB {
		onlyB = append(onlyB, t.String())
	}
	slices.Sort(onlyB)
	return both, onlyA, onlyB, nil
}

// selectTables keeps the tables that match a pattern. A pattern without any table is a mistake worth an error.
func selectTables(a, b []Table, patterns []string) (keptA, keptB []Table, err error) {
	if len(patterns) == 0 {
		return a, b, nil
	}
	used := make([]bool, len(patterns))
	keep := func(tables []Table) (kept []Table) {
		for _, t := range tables {
			hit := false
			for i, p := range patterns {
				if matches(p, t) {
					hit, used[i] = true, true
				}
			}
			if hit {
				kept = append(kept, t)
			}
		}
		return kept
	}
	keptA, keptB = keep(a), keep(b)
	if i := slices.Index(used, false); i >= 0 {
		return nil, nil, withHint(fmt.Errorf("no published table matches %q", patterns[i]),
			"name tables as schema.table, where * stands for any characters")
	}
	return keptA, keptB, nil
}

// matches reports whether a pattern, schema.table or a table of any schema, fits. Names with a dot fit as well.
func matches(pattern string, t Table) bool {
	return wildcard(pattern, t.String()) || wildcard(pattern, t.Name)
}

// wildcard matches s with a pattern in which * stands for any characters.
func wildcard(pattern, s string) bool {
	first, rest, star := strings.Cut(pattern, "*")
	if !star {
		return pattern == s
	}
	if !strings.HasPrefix(s, first) {
		return false
	}
	for i := len(first); i <= len(s); i++ {
		if wildcard(rest, s[i:]) {
			return true
		}
	}
	return false
}

// matchTable decides how a table is compared.
func matchTable(a, b Table, seed int64) match {
	m := match{a: a, b: b, by: Digest{AlgorithmFast, seed}}
	m.common = Table{Schema: a.Schema, Name: a.Name}
	m.common.Columns, m.known.Columns = commonColumns(a.Columns, b.Columns)
	if a.HashID != b.HashID {
		m.by.Algorithm = AlgorithmMD5
		m.note("hashed by MD5, which is slower: encoding and hash function are %q and %q", a.HashID, b.HashID)
	}
	switch {
	case !slices.Equal(a.Key, b.Key):
		m.method = ByRowHash
		m.note("compared without key: it is (%s) and (%s)", strings.Join(a.Key, ", "), strings.Join(b.Key, ", "))
	case len(a.Key) == 0:
		m.method = ByRowHash
	case a.Order == "" || a.Order != b.Order:
		m.method, m.common.Key = ByKeyHash, a.Key
		m.note("compared by hash of the key, which may be sorted differently: %s", orders(a.Order, b.Order))
	default:
		m.method, m.common.Key = ByKeyOrder, a.Key
	}
	m.known.Schema, m.known.Table, m.known.Method, m.known.Key = a.Schema, a.Name, m.method, m.common.Key
	return m
}

func (m *match) note(format string, args ...any) {
	m.known.Notes = append(m.known.Notes, fmt.Sprintf(format, args...))
}

// orders prints why key order cannot be used.
func orders(a, b string) string {
	if a == b {
		return "its type or index has an order of its own"
	}
	return fmt.Sprintf("%s and %s", orNone(a), orNone(b))
}

func orNone(s string) string {
	if s == "" {
		return "no usable order"
	}
	return s
}

// commonColumns gives the columns that both have, in order of their names, and the differences. A column of two types
// is common, but of no named one: text is compared.
func commonColumns(a, b []Column) (common []Column, differences []ColumnDifference) {
	for _, c := range a {
		other, ok := columnByName(b, c.Name)
		if !ok || other.Type != c.Type {
			differences = append(differences, ColumnDifference{c.Name, c.Type, other.Type})
			c.Type = ""
		}
		if ok {
			common = append(common, c)
		}
	}
	for _, c := range b {
		if _, ok := columnByName(a, c.Name); !ok {
			differences = append(differences, ColumnDifference{Column: c.Name, TypeB: c.Type})
		}
	}
	return common, differences
}
