package verify

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Side is one site's database. Its methods may be called from several goroutines. Each blocks for as long as a short
// statement takes, except where a Range has no key order: then a call is one pass over the table, in short statements.
//
// A *TableError says that this table cannot be compared; every other error ends the comparison.
type Side interface {
	// Name is the site's name, for reports.
	Name() string
	// Tables lists the published user tables, sorted by schema and name.
	Tables(ctx context.Context) ([]Table, error)
	// Bounds gives the keys that cut r (After and UpTo only) into ranges of rows rows: the key of every rows-th row,
	// ascending. The last range may be empty. Range.First asks for the first key only.
	Bounds(ctx context.Context, t Table, r Range, rows int) ([]Key, error)
	// Hash gives count and digest of the rows in r. A range in key order that has more than limit rows is not read
	// further, and its Sum is Truncated; limit does not apply to Parts.
	Hash(ctx context.Context, t Table, r Range, limit int) (Sum, error)
	// Rows gives the rows in r, at most limit; a result of limit rows may be incomplete.
	Rows(ctx context.Context, t Table, r Range, limit int) ([]Row, error)
}

// Column is a column of a table.
type Column struct {
	Name string `json:"name"`
	Type string `json:"type"` // as format_type prints it, with modifier; user types with their schema
}

// Table describes a table to compare. In a call of a Side, Columns and Key choose what is compared: they may be fewer
// than the table has.
type Table struct {
	Schema  string   `json:"schema"`
	Name    string   `json:"name"`
	Columns []Column `json:"columns"` // in order of their names, so that it does not matter how a table came about
	// Key is the primary key, else the replica identity index, in the index's order; empty without either.
	Key []string `json:"key,omitempty"`
	// Order names everything that the sort order of Key depends on: types, collations and their versions, enum labels.
	// Two tables with equal Order sort alike. Empty: the key cannot be walked in order.
	Order string `json:"order,omitempty"`
	// HashID names the result of PostgreSQL's own hash function and the encoding that it works on. Sides with equal
	// HashID can use it; others fall back to MD5.
	HashID string `json:"hash_id"`
	Rows   int64  `json:"rows"`  // estimate of the planner
	Bytes  int64  `json:"bytes"` // on disk with TOAST, without indexes
}

// String prints schema.table.
func (t Table) String() string { return t.Schema + "." + t.Name }

// Key is a row's key: the text of its key columns. nil is no key.
type Key []string

// MarshalJSON writes an array of strings. A value that is not valid UTF-8 (a database with encoding SQL_ASCII) is
// written as NUL, which PostgreSQL's text cannot contain, and hexadecimal digits: a key must survive the way.
func (k Key) MarshalJSON() ([]byte, error) {
	if k == nil {
		return []byte("null"), nil
	}
	out := make([]string, len(k))
	for i, v := range k {
		if out[i] = v; !utf8.ValidString(v) {
			out[i] = "\x00" + hex.EncodeToString([]byte(v))
		}
	}
	return json.Marshal(out)
}

// UnmarshalJSON reads what MarshalJSON writes.
func (k *Key) UnmarshalJSON(b []byte) error {
	var in []string
	if err := json.Unmarshal(b, &in); err != nil {
		return err
	}
	for i, v := range in {
		digits, ok := strings.CutPrefix(v, "\x00")
		if !ok {
			continue
		}
		raw, err := hex.DecodeString(digits)
		if err != nil {
			return fmt.Errorf("read key: %w", err)
		}
		in[i] = string(raw)
	}
	*k = in
	return nil
}

// id makes a key comparable. Values contain no NUL.
func (k Key) id() string { return strings.Join(k, "\x00") }

// Algorithm names for Digest.
const (
	AlgorithmFast   = "hash64"   // PostgreSQL's hashtextextended
	AlgorithmMD5    = "md5"      // the first 8 bytes of MD5 of the row in UTF-8
	AlgorithmRecord = "record64" // PostgreSQL's hash_record_extended, added up over a range: the continuous comparison
)

// Digest says how rows are hashed. Both sides must be asked with the same.
type Digest struct {
	Algorithm string `json:"algorithm"`
	// Seed changes all hashes, so that two rows that collide in one run do not in the next.
	Seed int64 `json:"seed,string"`
}

// Parts chooses rows by the leading Bits bits of the hash of their key (of the row, without key).
type Parts struct {
	Bits  int   `json:"bits"`
	Index []int `json:"index"` // 0 .. 1<<Bits-1, ascending
}

// Range chooses rows of a table. Exactly one of these: After and UpTo (both nil: all rows), Keys, Parts, Hashes.
type Range struct {
	By    Digest `json:"by"`
	After Key    `json:"after,omitempty"` // exclusive; nil: from the first row
	UpTo  Key    `json:"up_to,omitempty"` // inclusive; nil: to the last row
	Keys  []Key  `json:"keys,omitempty"`  // the rows with these keys
	Parts *Parts `json:"parts,omitempty"`
	// Hashes chooses the rows with these hashes, for tables without a key.
	Hashes []string `json:"hashes,omitempty"`
	// ImageBytes asks Rows for images, with values longer than this cut; 0: no images, -1: uncut.
	ImageBytes int `json:"image_bytes,omitempty"`
	// First asks Bounds for the first key only, which spares a walk through the whole range.
	First bool `json:"first,omitempty"`
}

// Sum is what Hash found.
type Sum struct {
	Rows int64 `json:"rows"`
	// Digest is over the rows' hashes in key order, or in order of the hashes where the Range has Parts. Empty if
	// Truncated.
	Digest    string    `json:"digest,omitempty"`
	Truncated bool      `json:"truncated,omitempty"`
	Parts     []PartSum `json:"parts,omitempty"` // for a Range with Parts: those that hold rows, ascending
	// Seconds is how long PostgreSQL took for it, as its site saw it, and CPU how much of that its process worked; 0: not
	// known.
	Seconds float64 `json:"seconds,omitempty"`
	CPU     float64 `json:"cpu,omitempty"`
}

// PartSum is the Sum of one part.
type PartSum struct {
	Index  int    `json:"index"`
	Rows   int64  `json:"rows"`
	Digest string `json:"digest"`
}

// Row is one row, or in a table without key all rows with one text.
type Row struct {
	Key    Key    `json:"key,omitempty"`
	Hash   string `json:"hash"`
	Copies int64  `json:"copies"` // 1 with a key
	// Stamp changes with each write of a row with a key, also with one that writes the same values: the transaction that
	// wrote it.
	Stamp string    `json:"stamp,omitempty"`
	Image []*string `json:"image,omitempty"` // a value per Table.Columns; nil is NULL
}

// TableError says why one table cannot be compared. The comparison of others goes on.
type TableError struct {
	Side, Table, Reason, Hint string
}

// Error gives the sentence that is printed.
func (e *TableError) Error() string {
	return fmt.Sprintf("cannot compare table %s at %s: %s", e.Table, e.Side, e.Reason)
}

// HintText is the advice that goes with the error.
func (e *TableError) HintText() string { return e.Hint }

// hintError is an opaque error with an advice.
type hintError struct {
	err  error
	hint string
}

func (e *hintError) Error() string    { return e.err.Error() }
func (e *hintError) Unwrap() error    { return e.err }
func (e *hintError) HintText() string { return e.hint }

// withHint adds an advice to an error, when there is one.
func withHint(err error, hint string) error {
	if err == nil || hint == "" {
		return err
	}
	return &hintError{err, hint}
}

// hintOf finds the advice in an error's chain.
func hintOf(err error) string {
	var h interface{ HintText() string }
	if errors.As(err, &h) {
		return h.HintText()
	}
	return ""
}

// columnByName finds a column.
func columnByName(columns []Column, name string) (Column, bool) {
	i := slices.IndexFunc(columns, func(c Column) bool { return c.Name == name })
	if i < 0 {
		return Column{}, false
	}
	return columns[i], true
}
