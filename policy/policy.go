// Package policy is the vocabulary of what may be declared for a table: how its rows merge (mode), which columns merge by
// adding differences (delta), and what becomes of rows that lost their parent (orphans); replication.md rules 12 to 14.
// It also decides, purely: whether a declaration fits a table (Check), which declaration counts where there are several
// (Merge), and whether two sites declare the same (Fingerprint, Difference).
//
// It does no I/O: package config reads declarations of duri.yaml, package catalog those made by duri.set_policy. Values
// are not changed after they were made and may be shared between goroutines.
package policy

import (
	"cmp"
	"errors"
	"slices"
	"strings"
)

// Mode says what of a row a concurrent change replaces.
type Mode string

const (
	ModeRow    Mode = "row"    // the winner's whole row stands (the default)
	ModeColumn Mode = "column" // concurrent changes of different columns both stand (rule 14)
)

// Modes are all modes, the default first.
var Modes = []Mode{ModeRow, ModeColumn}

// Orphans says what becomes of a row whose parent is gone: apply does not fire foreign keys (rule 12).
type Orphans string

const (
	Report          Orphans = "report"           // it is reported and stays (the default)
	RemoveChild     Orphans = "remove_child"     // it is deleted
	ResurrectParent Orphans = "resurrect_parent" // its parent is inserted again
)

// AllOrphans are all policies for orphans, the default first.
var AllOrphans = []Orphans{Report, RemoveChild, ResurrectParent}

// Table is what is declared for one table. The zero value is the default: row mode, no delta columns, orphans reported.
type Table struct {
	Mode Mode `yaml:"mode" json:"mode"` // empty: ModeRow
	// Delta names numeric columns that merge by adding differences (rule 13).
	Delta []string `yaml:"delta" json:"delta"`
	// FK holds, by the name of a foreign key constraint of this table (the child), what becomes of orphans; a constraint
	// that is not named here has Report.
	FK map[string]Orphans `yaml:"foreign_keys" json:"foreign_keys"`
}

// Orphans gives the policy of a foreign key constraint.
func (t Table) Orphans(constraint string) Orphans { return cmp.Or(t.FK[constraint], Report) }

// NeedsFull reports whether the table's changes must carry the old row: REPLICA IDENTITY FULL.
func (t Table) NeedsFull() bool { return t.Mode == ModeColumn || len(t.Delta) > 0 }

// canonical spells the policy in the one way that equal policies share: the mode written out, columns sorted, and
// without what is the default anyway. ok is false when the whole is the default.
func (t Table) canonical() (out Table, ok bool) {
	out.Mode = cmp.Or(t.Mode, ModeRow)
	out.Delta = append([]string{}, t.Delta...)
	slices.Sort(out.Delta)
	out.Delta = slices.Compact(out.Delta)
	out.FK = map[string]Orphans{}
	for name, o := range t.FK {
		if cmp.Or(o, Report) != Report {
			out.FK[name] = o
		}
	}
	return out, out.Mode != ModeRow || len(out.Delta) > 0 || len(out.FK) > 0
}

// Name names a table.
type Name struct {
	Schema string `json:"schema"`
	Table  string `json:"table"`
}

// String prints schema.table. A part that holds a dot or a double quote is quoted as in SQL; ParseName reads it back.
func (n Name) String() string { return part(n.Schema) + "." + part(n.Table) }

// SQL is the name for statements, quoted.
func (n Name) SQL() string { return quote(n.Schema) + "." + quote(n.Table) }

// Compare orders names by schema, then table.
func (n Name) Compare(o Name) int {
	return cmp.Or(strings.Compare(n.Schema, o.Schema), strings.Compare(n.Table, o.Table))
}

func part(s string) string {
	if s == "" || strings.ContainsAny(s, `."`) {
		return quote(s)
	}
	return s
}

func quote(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }

var errName = errors.New(`want schema.table, each part as PostgreSQL keeps it (in double quotes if there is a dot in it)`)

// ParseName reads schema.table. Letters keep their case, as in "schemas" of duri.yaml.
func ParseName(text string) (Name, error) {
	schema, rest, err := cutPart(text)
	if err != nil {
		return Name{}, err
	}
	rest, ok := strings.CutPrefix(rest, ".")
	if !ok {
		return Name{}, errName
	}
	table, rest, err := cutPart(rest)
	if err != nil || rest != "" {
		return Name{}, errName
	}
	return Name{schema, table}, nil
}

// cutPart takes one part off the front of a name.
func cutPart(text string) (name, rest string, err error) {
	quoted, ok := strings.CutPrefix(text, `"`)
	if !ok {
		i := strings.IndexByte(text, '.')
		if i < 0 {
			i = len(text)
		}
		if i == 0 || strings.Contains(text[:i], `"`) {
			return "", "", errName
		}
		return text[:i], text[i:], nil
	}
	var b strings.Builder
	for {
		before, after, ok := strings.Cut(quoted, `"`)
		if !ok {
			return "", "", errName
		}
		b.WriteString(before)
		if quoted, ok = strings.CutPrefix(after, `"`); !ok {
			if b.Len() == 0 {
				return "", "", errName
			}
			return b.String(), after, nil
		}
		b.WriteByte('"')
	}
}
