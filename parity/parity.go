// Package parity tells whether a client's open session may go on at another site: it reads what must be the same there from a
// database (Read), compares what two sites have said (Compare), and decides for a session what follows (Blocks).
//
// Compare and Blocks are pure. Facts hold no secret: of a role's SCRAM verifier only a hash leaves its site, of which nothing can
// be learned but whether another one is the same, as a verifier has a random salt. The package changes nothing, and does not
// compare tables, columns or rows: package preflight and verify do.
package parity

import "slices"

// Facts are what of one site's database must be as it is at another site, so that a session does not notice which of the two it
// uses. A fact that could not be read is in Unread, and is not compared.
type Facts struct {
	Site     string `json:"site"`
	Database string `json:"database"`

	Major    int    `json:"major"` // of PostgreSQL
	Encoding string `json:"encoding"`
	// Provider is libc, icu or builtin; the locale's names are those of pg_database.
	Provider string `json:"provider"`
	Collate  string `json:"collate"`
	Ctype    string `json:"ctype"`
	Locale   string `json:"locale,omitempty"` // of the provider, if it is not libc
	// Collations are the versions that the operating system or ICU has now, of the database's collation (under "default") and
	// of those that columns use.
	Collations map[string]string `json:"collations"`
	Extensions map[string]string `json:"extensions"` // versions
	Roles      map[string]Role   `json:"roles"`      // that may log in
	// Settings are those of the server that change results, or how long something may take. Defaults are the settings made by ALTER
	// DATABASE for this database, and RoleDefaults those by ALTER ROLE, of the role alone or in this database.
	Settings     map[string]string            `json:"settings"`
	Defaults     map[string]string            `json:"defaults"`
	RoleDefaults map[string]map[string]string `json:"role_defaults"`
	Types        map[string]uint32            `json:"types"` // OIDs of user types
	Mark         bool                         `json:"mark"`  // duri.mark is there, and the schema duri
	// LoginCA says which roles the agent logs in by certificate; empty: none. Read does not know it.
	LoginCA string `json:"login_ca,omitempty"`

	Unread map[string]string `json:"unread,omitempty"` // why, by the name of a part
}

// Role is a role that may log in.
type Role struct {
	// Verifier is a hash of its SCRAM verifier; empty: it has none.
	Verifier string `json:"verifier,omitempty"`
	// Attributes are those that change what it may do or see, such as bypassrls; Member is what it belongs to, directly or not.
	Attributes []string `json:"attributes"`
	Member     []string `json:"member"`
}

// Grade says what follows from a finding.
type Grade string

// Grades, the worst first.
const (
	BlocksAll  Grade = "blocks_all"  // no session of the database goes on at the other site
	BlocksRole Grade = "blocks_role" // none of the role does
	// BlocksTypes: no session does that has seen one of the types.
	BlocksTypes Grade = "blocks_types"
	Warning     Grade = "warning" // sessions go on, and may notice
)

var grades = []Grade{BlocksAll, BlocksRole, BlocksTypes, Warning}

// CodeVerifier is the Code of a finding about a role's password, which those do not need who log in by certificate.
const CodeVerifier = "verifier"

// Finding is one line that differs between two sites.
type Finding struct {
	Code     string    `json:"code"` // stable: scripts go by it
	Grade    Grade     `json:"grade"`
	Database string    `json:"database"`
	Role     string    `json:"role,omitempty"` // of BlocksRole
	Sites    [2]string `json:"sites"`
	Line     string    `json:"line"`   // what differs
	Values   [2]string `json:"values"` // at each of Sites, for reading
	Hint     string    `json:"hint"`   // what to do

	// Types are those of BlocksTypes: OIDs at each of Sites.
	Types [2][]uint32 `json:"types,omitzero"`
}

// String prints the finding as one sentence.
func (f Finding) String() string {
	return f.Line + " is " + orNone(f.Values[0]) + " at " + f.Sites[0] + " and " + orNone(f.Values[1]) + " at " + f.Sites[1]
}

func orNone(s string) string {
	if s == "" {
		return "not there"
	}
	return s
}

// Session is what Blocks must know of a client's session.
type Session struct {
	Database, Role string
	Types          []uint32 // OIDs of user types that it has seen
	Certificate    bool     // it has logged in by certificate: verifiers do not matter
}

// Blocks gives the finding because of which a session that was at one site must not go on at another; nil: it may. Findings of other
// sites, databases and roles do not matter.
func Blocks(findings []Finding, s Session, from, to string) *Finding {
	if from == to {
		return nil
	}
	for i := range findings {
		f := &findings[i]
		if f.Database != s.Database || f.Sites != [2]string{from, to} && f.Sites != [2]string{to, from} {
			continue
		}
		switch f.Grade {
		case BlocksAll:
			return f
		case BlocksRole:
			if f.Role == s.Role && (!s.Certificate || f.Code != CodeVerifier) {
				return f
			}
		case BlocksTypes:
			at := f.Types[slices.Index(f.Sites[:], from)]
			if slices.ContainsFunc(s.Types, func(oid uint32) bool { return slices.Contains(at, oid) }) {
				return f
			}
		case Warning:
		}
	}
	return nil
}
