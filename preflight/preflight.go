// Package preflight checks one database before it joins a cluster, and again at every start of its agent: the server's
// settings, the run-time role's privileges, the publication, and every table, for what replication needs and for what it
// cannot carry (replication.md sections 3 and 7, rule 22), and whether the declared policies fit their tables (rules 12
// to 14). It changes nothing and names every object it complains of.
//
// Run reads a few catalogs and evaluates them; the evaluation is pure. An error of Run means that the check could not be
// made; what the check found is a Finding. It does not compare sites with each other, and does not look into rows,
// except, before a site joins by copying, for whether there are any.
package preflight

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/policy"
)

// Severity says what follows from a finding.
type Severity string

const (
	SeverityError   Severity = "error"   // the database cannot be replicated like this
	SeverityWarning Severity = "warning" // it can, but something will not be as one may expect
	SeverityInfo    Severity = "info"    // to know
)

// Finding is one problem, of one object or of several alike.
type Finding struct {
	Code     string   `json:"code"` // stable: scripts and translations go by it
	Severity Severity `json:"severity"`
	Object   string   `json:"object"`  // what it is about, for reading; several are shortened
	Objects  []string `json:"objects"` // all of them
	Text     string   `json:"text"`    // one sentence that follows the object
	Hint     string   `json:"hint"`    // one sentence: what to do
}

// String prints "object: text".
func (f Finding) String() string { return f.Object + ": " + f.Text }

// Spec says what the database is to be used for.
type Spec struct {
	Database  string           // that c must be connected to; empty: any
	Schemas   []string         // to be replicated; empty: all user schemas
	Role      string           // run-time role of the agent; empty: duri
	Bootstrap config.Bootstrap // how the site gets its first content
	Joined    bool             // it has its first content already: it may hold rows
	Sites     int              // of the cluster, this one included; below 2: 2
	Databases int              // replicated at this server, this one included; below 1: 1
	Policies  policy.Set       // that duri.yaml declares; those made by duri.set_policy are read here
}

func (s Spec) defaults() Spec {
	if s.Role == "" {
		s.Role = grants.DefaultRole
	}
	s.Sites, s.Databases = max(s.Sites, 2), max(s.Databases, 1)
	return s
}

// Run checks the database that c is connected to. c may be the run-time role's or a superuser's connection. Findings
// are sorted: errors first, then warnings, then what is only to know.
func Run(ctx context.Context, c *pgconn.PgConn, spec Spec) ([]Finding, error) {
	spec = spec.defaults()
	f, err := read(ctx, c, spec)
	if err != nil {
		return nil, fmt.Errorf("check the database: %w", err)
	}
	if spec.Database != "" && spec.Database != f.database && f.database != "" {
		return nil, fmt.Errorf("check database %s: the connection is to database %s", spec.Database, f.database)
	}
	return evaluate(f, spec), nil
}

// Error is a finding as an error.
type Error struct{ Finding Finding }

// Error gives the sentence that is printed.
func (e *Error) Error() string { return "check the database: " + e.Finding.String() }

// HintText is the advice that goes with the error.
func (e *Error) HintText() string { return e.Finding.Hint }

// Err gives the first finding that is an error as an *Error, or nil when there is none.
func Err(findings []Finding) error {
	for _, f := range findings {
		if f.Severity == SeverityError {
			return &Error{f}
		}
	}
	return nil
}

// report collects findings and groups those that say the same of several objects.
type report struct {
	findings []Finding
	alike    map[int]bool // findings whose objects need the same remedy, each under its own name
}

func (r *report) add(severity Severity, code, object, text, hint string) {
	for i := range r.findings {
		f := &r.findings[i]
		if f.Code == code && f.Severity == severity && f.Text == text {
			if !slices.Contains(f.Objects, object) {
				f.Objects = append(f.Objects, object)
			}
			if f.Hint != hint && !r.alike[i] {
				r.alike[i] = true
				f.Hint += ", and likewise for the others"
			}
			return
		}
	}
	r.findings = append(r.findings, Finding{code, severity, "", []string{object}, text, hint})
}

func (r *report) error(code, object, text, hint string) {
	r.add(SeverityError, code, object, text, hint)
}

func (r *report) warn(code, object, text, hint string) {
	r.add(SeverityWarning, code, object, text, hint)
}

func (r *report) info(code, object, text, hint string) { r.add(SeverityInfo, code, object, text, hint) }

// sorted gives the findings, errors first, each kind in the order it was found.
func (r *report) sorted() []Finding {
	rank := map[Severity]int{SeverityError: 0, SeverityWarning: 1, SeverityInfo: 2}
	slices.SortStableFunc(r.findings, func(a, b Finding) int { return rank[a.Severity] - rank[b.Severity] })
	for i := range r.findings {
		r.findings[i].Object = shorten(r.findings[i].Objects)
	}
	return r.findings
}

// shownMax is how many objects a finding spells out in Object.
const shownMax = 4

func shorten(objects []string) string {
	if len(objects) <= shownMax+1 {
		return strings.Join(objects, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(objects[:shownMax], ", "), len(objects)-shownMax)
}
