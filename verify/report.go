package verify

import "time"

// Report is what Run found. Its JSON form is a contract: fields are only added.
type Report struct {
	A string `json:"a"` // the sites' names
	B string `json:"b"`
	// Equal: both sites have the same tables and columns, every table could be compared, and no row differs. Rows in
	// flight do not count.
	Equal         bool          `json:"equal"`
	Tables        []TableReport `json:"tables"`
	OnlyA         []string      `json:"only_a,omitempty"` // tables published at one site only
	OnlyB         []string      `json:"only_b,omitempty"`
	Started       time.Time     `json:"started"`
	Seconds       float64       `json:"seconds"`
	Rows          int64         `json:"rows"` // compared: the greater number of both sites, over all tables
	RowsPerSecond float64       `json:"rows_per_second"`
	Seed          int64         `json:"seed,string"` // of the hashes
}

// Differences counts the differing rows of all tables, at least: see TableReport.More.
func (r Report) Differences() int {
	n := 0
	for _, t := range r.Tables {
		n += t.DifferenceCount
	}
	return n
}

// Method says how a table was compared.
type Method string

const (
	ByKeyOrder Method = "key_order" // ranges of the key
	ByKeyHash  Method = "key_hash"  // parts of the key's hash: the sites sort the key differently
	ByRowHash  Method = "row_hash"  // parts of the row's hash, with multiplicities: no common key
)

// TableReport is about one table.
type TableReport struct {
	Schema string   `json:"schema"`
	Table  string   `json:"table"`
	Equal  bool     `json:"equal"` // no row differs, columns are equal, and no Error
	Method Method   `json:"method"`
	Key    []string `json:"key,omitempty"` // names of the key's columns
	RowsA  int64    `json:"rows_a"`
	RowsB  int64    `json:"rows_b"`
	Ranges int      `json:"ranges"` // ranges or parts compared
	// Differences are real, sorted by key, at most Options.MaxDiffs; DifferenceCount of them were found. More: the
	// search was ended, so there may be others.
	Differences     []Difference `json:"differences,omitempty"`
	DifferenceCount int          `json:"difference_count"`
	More            bool         `json:"more,omitempty"`
	// InFlight rows differed at first and are none of the differences: they were equal when looked at again, or
	// (Unsettled of them) were different each time because clients kept writing them.
	InFlight  int `json:"in_flight"`
	Unsettled int `json:"unsettled"`
	// RangesInFlight differed at first, and no row of them did when they were looked at closer.
	RangesInFlight int                `json:"ranges_in_flight"`
	Columns        []ColumnDifference `json:"column_differences,omitempty"` // the other columns were compared
	Notes          []string           `json:"notes,omitempty"`
	Error          string             `json:"error,omitempty"` // why the table could not be compared (to the end)
	Hint           string             `json:"hint,omitempty"`
}

// ColumnDifference is a column that is not the same at both sites. A missing one has no type.
type ColumnDifference struct {
	Column string `json:"column"`
	TypeA  string `json:"type_a,omitempty"`
	TypeB  string `json:"type_b,omitempty"`
}

// Kind says how a row differs.
type Kind string

const (
	MissingAtA Kind = "missing_at_a"
	MissingAtB Kind = "missing_at_b"
	Differs    Kind = "differs"
)

// Difference is a row that differs. The images are read after the decision, so a row that is written just now may show
// newer values.
type Difference struct {
	Kind Kind     `json:"kind"`
	Key  []string `json:"key,omitempty"` // the key's values as text; none in a table without key
	// Columns that differ, for a row that exists at both sites.
	Columns []string `json:"columns,omitempty"`
	// A and B are the images: column to text; nil is NULL. An absent row has no image.
	A map[string]*string `json:"a,omitempty"`
	B map[string]*string `json:"b,omitempty"`
	// CopiesA and CopiesB say how often the row exists.
	CopiesA int64 `json:"copies_a"`
	CopiesB int64 `json:"copies_b"`

	seen observation // as it was compared; Repair touches nothing else
	hash string      // of the row, without a key
}

// Progress is passed to Options.Progress.
type Progress struct {
	Table      string  `json:"table,omitempty"` // the one that was last worked on
	TablesDone int     `json:"tables_done"`
	Tables     int     `json:"tables"`
	Rows       int64   `json:"rows"`       // compared
	RowsTotal  int64   `json:"rows_total"` // estimate
	Suspects   int     `json:"suspects"`   // rows that differed so far, in flight or not
	Round      int     `json:"round"`      // 0: first pass; then how often suspects were looked at again
	Seconds    float64 `json:"seconds"`    // since the start
}
