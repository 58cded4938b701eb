package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// Column is what Check needs of a table's column.
type Column struct {
	Name      string `json:"name"`
	Type      string `json:"type"` // as PostgreSQL prints it
	Base      uint32 `json:"base"` // OID of the type, domains resolved
	Generated bool   `json:"generated"`
	Unique    string `json:"unique"`  // an index that keeps it unique, alone or with others, or excludes by it; empty: none
	Checked   string `json:"checked"` // a CHECK constraint that reads it; empty: none
}

// Facts are what Check needs of a table.
type Facts struct {
	Name        Name
	Missing     bool   // there is no such table
	PartitionOf Name   // the topmost partitioned table; zero when it is no partition
	Keyed       bool   // it has a primary key, or a replica identity index
	NotFull     []Name // of the table and its partitions those that hold rows and lack REPLICA IDENTITY FULL
	Columns     []Column
	ForeignKeys []string // names of its foreign key constraints
}

// Problem is one thing that keeps a policy from fitting its table. The texts are those of duri.set_policy.
type Problem struct {
	Code string // stable
	Text string // one sentence that follows the table's name
	Hint string // one sentence: what to do
}

// Codes of Problem.
const (
	CodeTable      = "policy_table"       // there is no such table
	CodePartition  = "policy_partition"   // it is a part of a table
	CodeKey        = "policy_key"         // it has no key
	CodeColumn     = "policy_column"      // no such column, or a computed one
	CodeType       = "policy_type"        // a delta column that cannot be added exactly
	CodeDeltaKey   = "policy_delta_key"   // a delta column that rows are told apart by
	CodeIdentity   = "policy_identity"    // the old row is not sent
	CodeForeignKey = "policy_foreign_key" // no such constraint
	CodeCheck      = "policy_check"       // a bound that sums may break
)

// Type OIDs of what can be added exactly, and of what cannot.
const (
	oidInt8, oidInt2, oidInt4, oidNumeric = 20, 21, 23, 1700
	oidFloat4, oidFloat8                  = 700, 701
)

// Check tells what keeps a policy from fitting its table; nothing when it fits.
func Check(t Table, f Facts) []Problem {
	switch {
	case f.Missing:
		return []Problem{{CodeTable, "there is no such table", "create it, or correct its name"}}
	case f.PartitionOf != Name{}:
		return []Problem{{
			CodePartition, "it is a partition of " + f.PartitionOf.String() + ", and rows move between partitions",
			"declare the policy for " + f.PartitionOf.String(),
		}}
	}
	var out []Problem
	if !f.Keyed {
		out = append(out, Problem{CodeKey, "it has no key by which the sites could tell its rows apart", "add a primary key"})
	}
	for _, name := range t.Delta {
		out = append(out, checkDelta(name, f)...)
	}
	if t.NeedsFull() && len(f.NotFull) > 0 {
		out = append(out, Problem{
			CodeIdentity, "column mode and delta columns need the old row, which is sent with REPLICA IDENTITY FULL only",
			alterFull(f.NotFull),
		})
	}
	for _, name := range slices.Sorted(maps.Keys(t.FK)) {
		if !slices.Contains(f.ForeignKeys, name) {
			out = append(out, Problem{CodeForeignKey, "it has no foreign key constraint " + quote(name), fkHint(f.ForeignKeys)})
		}
	}
	return out
}

// alterFull is the remedy for each table.
func alterFull(names []Name) string {
	var all []string
	for _, n := range names {
		all = append(all, "ALTER TABLE "+n.SQL()+" REPLICA IDENTITY FULL")
	}
	return strings.Join(all, "; ")
}

func fkHint(have []string) string {
	if len(have) == 0 {
		return "the table has none: a policy is declared for the table that refers, not for the one referred to"
	}
	return "its foreign keys: " + strings.Join(have, ", ")
}

// checkDelta checks one delta column.
func checkDelta(name string, f Facts) []Problem {
	i := slices.IndexFunc(f.Columns, func(c Column) bool { return c.Name == name })
	if i < 0 {
		return []Problem{{CodeColumn, "it has no column " + quote(name), "see its columns with \\d in psql"}}
	}
	c := f.Columns[i]
	switch {
	case c.Generated:
		return []Problem{{CodeColumn, "column " + quote(name) + " is generated: each site computes it", "name the columns that it is computed from"}}
	case c.Base == oidFloat4 || c.Base == oidFloat8:
		return []Problem{{
			CodeType, "delta column " + quote(name) + " is " + c.Type + ", whose addition is not associative: the sum would depend on the order in which changes arrive, and sites would differ",
			"ALTER TABLE " + f.Name.SQL() + " ALTER COLUMN " + quote(name) + " TYPE numeric, at every site",
		}}
	case !slices.Contains([]uint32{oidInt2, oidInt4, oidInt8, oidNumeric}, c.Base):
		return []Problem{{CodeType, "delta column " + quote(name) + " is " + c.Type + ", which has no differences to add", "a delta column is smallint, integer, bigint or numeric"}}
	case c.Unique != "":
		return []Problem{{
			CodeDeltaKey, "delta column " + quote(name) + " is part of " + quote(c.Unique) + ", by which rows are told apart, and a sum is known only after merging",
			"leave it out of delta, or out of that key",
		}}
	}
	return nil
}

// Warnings tells what may surprise although the policy fits: sums that a constraint of the table refuses. Apply does not
// fire foreign keys and triggers, but PostgreSQL checks CHECK constraints always.
func Warnings(t Table, f Facts) []Problem {
	var out []Problem
	for _, c := range f.Columns {
		if c.Checked != "" && slices.Contains(t.Delta, c.Name) {
			out = append(out, Problem{
				CodeCheck, "delta column " + quote(c.Name) + " is bounded by CHECK constraint " + quote(c.Checked) + ", which the sum of several sites' changes can break: apply then stops",
				"drop the constraint, or let one site write the column",
			})
		}
	}
	return out
}

// Parse reads a policy as duri.set_policy takes it, strictly: a key that is unknown, and a value that is, are errors.
func Parse(doc []byte) (Table, error) {
	d := json.NewDecoder(bytes.NewReader(doc))
	d.DisallowUnknownFields()
	var t Table
	if err := d.Decode(&t); err != nil {
		return Table{}, fmt.Errorf("read a table policy: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Table{}, errors.New("read a table policy: there is more behind it")
	}
	if t.Mode != "" && !slices.Contains(Modes, t.Mode) {
		return Table{}, fmt.Errorf("read a table policy: mode %q is unknown", t.Mode)
	}
	for name, o := range t.FK {
		if !slices.Contains(AllOrphans, o) {
			return Table{}, fmt.Errorf("read a table policy: foreign_keys: %s: %q is unknown", name, o)
		}
	}
	return t, nil
}
