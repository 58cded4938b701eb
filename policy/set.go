package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Set is what is declared for the tables of a database. The zero Set declares nothing. Its JSON is canonical: an object
// of table names to policies, without what is the default.
type Set struct {
	tables map[Name]Table
	roots  map[Name]Name // partition -> partitioned table
}

// NewSet makes a Set of declarations. roots leads from partitions to the topmost table that they belong to: PostgreSQL
// names the partition in the changes that it decodes, while a policy is declared for the whole. Neither map is kept.
func NewSet(tables map[Name]Table, roots map[Name]Name) Set {
	return Set{maps.Clone(tables), maps.Clone(roots)}
}

// Of gives the policy of a table, or of the partitioned table that it is a partition of; the default, with its mode
// written out, when there is none. The caller must not change what the result refers to.
func (s Set) Of(schema, table string) Table {
	n := Name{schema, table}
	if root, ok := s.roots[n]; ok {
		n = root
	}
	t := s.tables[n]
	if t.Mode == "" {
		t.Mode = ModeRow
	}
	return t
}

// Declares reports whether there is a declaration for the table itself, if only of the default.
func (s Set) Declares(n Name) bool {
	_, ok := s.tables[n]
	return ok
}

// Tables lists the tables that are declared, sorted.
func (s Set) Tables() []Name { return slices.SortedFunc(maps.Keys(s.tables), Name.Compare) }

// Merge joins the declarations of duri.yaml and those made by duri.set_policy into the effective set. For a table named
// in both, that of duri.yaml counts as a whole; such tables are returned as overridden, sorted.
func Merge(file, sql Set) (effective Set, overridden []Name) {
	effective = NewSet(sql.tables, sql.roots)
	if effective.tables == nil {
		effective.tables = map[Name]Table{}
	}
	for n, t := range file.tables {
		if sql.Declares(n) {
			overridden = append(overridden, n)
		}
		effective.tables[n] = t
	}
	slices.SortFunc(overridden, Name.Compare)
	if effective.roots == nil {
		effective.roots = maps.Clone(file.roots)
	}
	return effective, overridden
}

// canonical keeps what is not the default, spelled in one way.
func (s Set) canonical() map[Name]Table {
	out := map[Name]Table{}
	for n, t := range s.tables {
		if c, ok := t.canonical(); ok {
			out[n] = c
		}
	}
	return out
}

// MarshalJSON writes the canonical form. Partitions are no part of it.
func (s Set) MarshalJSON() ([]byte, error) {
	doc := map[string]Table{}
	for n, t := range s.canonical() {
		doc[n.String()] = t
	}
	return json.Marshal(doc) // objects are written with sorted keys
}

// UnmarshalJSON reads what MarshalJSON wrote, perhaps at another site.
func (s *Set) UnmarshalJSON(b []byte) error {
	var doc map[string]Table
	if err := json.Unmarshal(b, &doc); err != nil {
		return fmt.Errorf("read table policies: %w", err)
	}
	tables := map[Name]Table{}
	for text, t := range doc {
		n, err := ParseName(text)
		if err != nil {
			return fmt.Errorf("read table policies: table %q: %w", text, err)
		}
		tables[n] = t
	}
	*s = Set{tables: tables}
	return nil
}

// Fingerprint is the same for two sets exactly when they mean the same for every table: the SHA-256 of the canonical
// form, in hexadecimal. Sites whose fingerprints differ must not apply each other's changes, because they would decide
// conflicts differently.
func Fingerprint(s Set) string {
	b, _ := s.MarshalJSON() // maps of strings always marshal
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// DifferenceError says for which table two sites declare different policies.
type DifferenceError struct {
	Mine, Theirs string // names of the sites
	Table        Name   // the first that differs
	More         int    // further tables that differ
	MinePolicy   Table
	TheirsPolicy Table
}

// Error gives the sentence that is printed.
func (e *DifferenceError) Error() string {
	more := ""
	if e.More > 0 {
		more = fmt.Sprintf(", and %d more tables differ", e.More)
	}
	return fmt.Sprintf("table %s has another policy at %s (%s) than at %s (%s)%s",
		e.Table, e.Theirs, e.TheirsPolicy, e.Mine, e.MinePolicy, more)
}

// HintText is the advice that goes with the error.
func (e *DifferenceError) HintText() string {
	return "declare the same for it at every site, in duri.yaml or by duri.set_policy; compare with `duri table show " + e.Table.String() + "`"
}

// Difference compares this site's effective set with a peer's. It returns nil when they mean the same, else a
// *DifferenceError that names the first table (in order of names) that differs.
func Difference(mineSite, theirsSite string, mine, theirs Set) error {
	a, b := mine.canonical(), theirs.canonical()
	names := slices.SortedFunc(maps.Keys(a), Name.Compare)
	for n := range b {
		if _, ok := a[n]; !ok {
			names = append(names, n)
		}
	}
	slices.SortFunc(names, Name.Compare)
	names = slices.DeleteFunc(names, func(n Name) bool { return a[n].equal(b[n]) })
	if len(names) == 0 {
		return nil
	}
	n := names[0]
	return &DifferenceError{mineSite, theirsSite, n, len(names) - 1, a[n], b[n]}
}

// equal compares canonical policies.
func (t Table) equal(o Table) bool {
	return t.Mode == o.Mode && slices.Equal(t.Delta, o.Delta) && maps.Equal(t.FK, o.FK)
}

// String prints a policy for people: "mode column, delta balance, fk_owner remove_child", or "default".
func (t Table) String() string {
	c, ok := t.canonical()
	if !ok {
		return "default"
	}
	parts := []string{"mode " + string(c.Mode)}
	if len(c.Delta) > 0 {
		parts = append(parts, "delta "+strings.Join(c.Delta, " "))
	}
	for _, name := range slices.Sorted(maps.Keys(c.FK)) {
		parts = append(parts, name+" "+string(c.FK[name]))
	}
	return strings.Join(parts, ", ")
}
