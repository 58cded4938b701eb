package verify

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/duri-io/duri/wal"
)

// RepairOptions of Repair. The zero value is a dry run over all tables.
type RepairOptions struct {
	Tables []string // as Options.Tables
	Apply  bool     // write; else only tell what would be written
	From   string   // the site whose rows are right; empty: judge by version
	// Settle is Options.Settle. Repair needs it more than Run does, as it writes what it takes for different.
	Settle func(context.Context) error
	// Deleted tells what the journals know of the deletes of some rows. nil: nothing is known.
	Deleted func(ctx context.Context, t Table, keys []Key) ([]Deletion, error)
	// Sites are the numbers of both sides, SiteName the names of all.
	Sites    [2]wal.SiteID
	SiteName func(wal.SiteID) string
	Progress func(Progress)
	MaxRows  int // rows of a table that one run repairs; 0: 10,000
	// Only is Options.Only, Rounds Options.Rounds.
	Only   func(t Table) Chosen
	Rounds int
}

// RepairReport is what Repair found and did. Its JSON form is a contract: fields are only added.
type RepairReport struct {
	A      string        `json:"a"` // the sites' names
	B      string        `json:"b"`
	DryRun bool          `json:"dry_run"`
	Rows   []RepairedRow `json:"rows"`
	Done   int           `json:"done"` // rows that were mended
	Left   int           `json:"left"` // rows that still differ
	// Unsettled are rows that were written so often that they could not be compared.
	Unsettled int `json:"unsettled,omitempty"`
	// Problems are tables that could not be compared or mended, or not to the end.
	Problems []RepairProblem `json:"problems,omitempty"`
	Started  time.Time       `json:"started"`
	Seconds  float64         `json:"seconds"`
}

// Equal reports whether nothing is left to do.
func (r RepairReport) Equal() bool { return r.Left == 0 && len(r.Problems) == 0 }

// RepairProblem is a table that needs something else than Repair.
type RepairProblem struct {
	Table string `json:"table"`
	Error string `json:"error"`
	Hint  string `json:"hint,omitempty"`
	More  bool   `json:"more,omitempty"` // it only had too many rows for one run
}

// What becomes of a RepairedRow.
const (
	RepairPlanned = "planned" // a dry run: it would be mended
	RepairDone    = "done"
	RepairLeft    = "left" // see Reason
)

// RepairedRow is one row that differed.
type RepairedRow struct {
	Schema string   `json:"schema"`
	Table  string   `json:"table"`
	Kind   Kind     `json:"kind"`
	Key    []string `json:"key,omitempty"`
	State  string   `json:"state"`
	Reason string   `json:"reason,omitempty"` // why it is left
	Right  string   `json:"right,omitempty"`  // the site whose row is right; empty: undecided
	Why    string   `json:"why,omitempty"`    // it is
	// Columns that differ, for a row that exists at both sites. A and B are the images, as in a Difference.
	Columns  []string           `json:"columns,omitempty"`
	A        map[string]*string `json:"a,omitempty"`
	B        map[string]*string `json:"b,omitempty"`
	VersionA *RepairVersion     `json:"version_a,omitempty"` // nil: no row, or not known
	VersionB *RepairVersion     `json:"version_b,omitempty"`
	CopiesA  int64              `json:"copies_a"` // how often the row was there
	CopiesB  int64              `json:"copies_b"`
}

// Refused reports a row that PostgreSQL does not take as it shall be: because of a constraint, most often of a unique value that
// another row has still.
func (r RepairedRow) Refused() bool {
	return r.State == RepairLeft && r.Right != "" && r.Reason != whyChanged && r.Reason != whyLocked && r.Reason != whyNotReached
}

// whyNotReached is why a fix is left after an error.
const whyNotReached = "not reached"

// RepairVersion is a row's version: when and at which site it was written.
type RepairVersion struct {
	At   time.Time `json:"at"`
	Site string    `json:"site"`
}

// unknownTime is the version time that a row gets whose own is not known: older than any change, but known.
const unknownTime = wal.Time(time.Second / time.Microsecond) // 2000-01-01 00:00:01

// fromHint is the advice about rows that no rule decides.
const fromHint = "look at both images and decide: repeat with --from SITE, the site whose rows are right"

// Repair makes the rows that differ equal: it compares as Run does, decides for each row which side is right (judge),
// and writes that side's row at the other one, with its version, so that it is replicated to nobody and loses against
// everything newer. A row that changed meanwhile is left alone. Errors are as Run's; the report then tells what was
// done until then.
func Repair(ctx context.Context, a, b Mender, o RepairOptions) (RepairReport, error) {
	if o.MaxRows <= 0 {
		o.MaxRows = 10_000
	}
	p := &repairer{o: o, sides: [2]Mender{a, b}, from: slices.Index([]string{a.Name(), b.Name()}, o.From)}
	p.rep = RepairReport{A: a.Name(), B: b.Name(), DryRun: !o.Apply, Rows: []RepairedRow{}, Started: time.Now().UTC()}
	if o.From != "" && p.from < 0 {
		return p.rep, withHint(fmt.Errorf("repair: site %q is none of %s and %s", o.From, a.Name(), b.Name()), "name one of the two with --from")
	}
	err := p.run(ctx)
	p.rep.Seconds = time.Since(p.rep.Started).Seconds()
	return p.rep, err
}

// repairer is one Repair.
type repairer struct {
	o     RepairOptions
	sides [2]Mender
	from  int // index of the side that was declared right, -1: none
	rep   RepairReport
}

func (p *repairer) run(ctx context.Context) error {
	r, rep, err := run(ctx, p.sides[0], p.sides[1], Options{
		Tables: p.o.Tables, Settle: p.o.Settle, Progress: p.o.Progress, MaxDiffs: p.o.MaxRows, Only: p.o.Only, Rounds: p.o.Rounds,
	})
	if err != nil {
		return err
	}
	p.problems(rep)
	for i, t := range rep.Tables {
		if len(t.Columns) > 0 { // what is in them would be lost
			continue
		}
		err := p.table(ctx, r.tables[i], t.Differences)
		if err == nil {
			err = p.restless(ctx, r.tables[i])
		}
		if te, ok := isTableError(err); ok {
			p.problem(te.Table, te.Error(), te.Hint)
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *repairer) problem(table, text, hint string) {
	p.rep.Problems = append(p.rep.Problems, RepairProblem{Table: table, Error: text, Hint: hint})
}

// problems notes what comparing tells that rows cannot mend.
func (p *repairer) problems(rep Report) {
	for i, only := range [][]string{rep.OnlyA, rep.OnlyB} {
		for _, t := range only {
			p.problem(t, "it is published only at "+p.sides[i].Name(), "make the table at the other site, or leave it out at both")
		}
	}
	for _, t := range rep.Tables {
		name := t.Schema + "." + t.Table
		p.rep.Unsettled += t.Unsettled
		switch {
		case t.Error != "":
			p.problem(name, t.Error, t.Hint)
		case len(t.Columns) > 0:
			p.problem(name, fmt.Sprintf("column %s is not the same at both sites", t.Columns[0].Column), "make the tables' definitions equal first")
		case t.More:
			p.problem(name, fmt.Sprintf("more than %d rows differ", len(t.Differences)), "repeat when these are repaired")
			p.rep.Problems[len(p.rep.Problems)-1].More = true
		}
	}
}

// table repairs a table in portions that fit into one exchange.
func (p *repairer) table(ctx context.Context, c *comparison, all []Difference) error {
	if len(all) == 0 {
		return nil
	}
	const portionBytes, portionRows = 2 << 20, 2000
	bytes := max(c.a.Bytes, c.b.Bytes) / max(1, c.rows())
	size := int(max(1, min(portionRows, portionBytes/max(1, bytes))))
	if len(c.t.Key) == 0 {
		for some := range slices.Chunk(all, size) {
			if err := p.keyless(ctx, c, some); err != nil {
				return err
			}
		}
		return nil
	}
	deleted, err := p.deletions(ctx, c.t, all) // once for all: it may mean to read journals
	if err != nil {
		return err
	}
	for i := 0; i < len(all); i += size {
		end := min(i+size, len(all))
		if err := p.keyed(ctx, c, all[i:end], deleted[i:end]); err != nil {
			return err
		}
	}
	return nil
}

// plan is a row with what to do about it.
type plan struct {
	row   RepairedRow
	wrong int // index of the side to be mended
	fix   *Fix
}

// keyed repairs rows of a table with a key.
func (p *repairer) keyed(ctx context.Context, c *comparison, some []Difference, deleted []Deletion) error {
	r := Range{By: c.by}
	for _, d := range some {
		r.Keys = append(r.Keys, d.Key)
	}
	lists, err := each(ctx, c.sides, func(ctx context.Context, s Side) ([]VersionedRow, error) {
		return s.(Mender).Versions(ctx, c.t, r) // Repair was given Menders
	})
	if err != nil {
		return err
	}
	now := [2]map[string]*VersionedRow{byID(lists[0]), byID(lists[1])}
	plans := make([]plan, len(some))
	for i, d := range some {
		e := evidence{rows: [2]*VersionedRow{now[0][d.id()], now[1][d.id()]}, sites: p.o.Sites, from: p.from, deleted: deleted[i]}
		plans[i] = p.plan(c, d, e)
	}
	return p.carryOut(ctx, c, plans)
}

func byID(rows []VersionedRow) map[string]*VersionedRow {
	out := map[string]*VersionedRow{}
	for i := range rows {
		out[rows[i].Key.id()] = &rows[i]
	}
	return out
}

// id is what identifies a differing row with a key.
func (d Difference) id() string { return Key(d.Key).id() }

// deletions asks for the deletes of the rows that one side lacks; a zero Deletion for the others.
func (p *repairer) deletions(ctx context.Context, t Table, some []Difference) ([]Deletion, error) {
	out := make([]Deletion, len(some))
	var keys []Key
	var at []int
	for i, d := range some {
		out[i].Since = neverTime
		if d.Kind != Differs {
			keys, at = append(keys, d.Key), append(at, i)
		}
	}
	if len(keys) == 0 || p.o.Deleted == nil || p.from >= 0 {
		return out, nil
	}
	found, err := p.o.Deleted(ctx, t, keys)
	if err != nil {
		return nil, fmt.Errorf("look for deletes of %s: %w", t, err)
	}
	for n, i := range at {
		out[i] = found[n]
	}
	return out, nil
}

// neverTime is later than every version.
const neverTime = wal.Time(1<<63 - 1)

// plan decides about a row. Rows that are not what was compared are left alone.
func (p *repairer) plan(c *comparison, d Difference, e evidence) plan {
	out := plan{row: p.describe(c, d, e)}
	if seenAs(e.rows[0]) != d.seen.a || seenAs(e.rows[1]) != d.seen.b {
		out.row.State, out.row.Reason = RepairLeft, whyChanged
		return out
	}
	v := judge(e, func(i int) string { return p.sides[i].Name() })
	if v.right == undecided {
		out.row.State, out.row.Reason = RepairLeft, v.why
		return out
	}
	out.row.Right, out.row.Why = p.sides[v.right].Name(), v.why
	out.wrong = 1 - v.right
	version := p.versionFor(v.right, e)
	out.fix = &Fix{Key: d.Key, Hash: hashOf(e.rows[out.wrong]), Time: version.Time, Site: version.Site}
	if right := e.rows[v.right]; right != nil {
		out.fix.Image = right.Image
	}
	return out
}

// versionFor is the version that the wrong side's row gets: the right one's. Where that is not known, one that loses
// against every change.
func (p *repairer) versionFor(right int, e evidence) wal.Version {
	row := e.rows[right]
	switch {
	case row != nil && row.Site != 0:
		return row.version()
	case row == nil && e.deleted.Version != (wal.Version{}):
		return e.deleted.Version
	}
	return wal.Version{Time: unknownTime, Site: p.o.Sites[right]}
}

// seenAs is the row as an observation has it.
func seenAs(r *VersionedRow) cell {
	if r == nil {
		return cell{}
	}
	return cellOf(r.Row)
}

func hashOf(r *VersionedRow) string {
	if r == nil {
		return ""
	}
	return r.Hash
}

// describe reports a row before anything is decided.
func (p *repairer) describe(c *comparison, d Difference, e evidence) RepairedRow {
	return RepairedRow{
		Schema: c.t.Schema, Table: c.t.Name, Kind: d.Kind, Key: d.Key, Columns: d.Columns, A: d.A, B: d.B,
		CopiesA: d.CopiesA, CopiesB: d.CopiesB, VersionA: p.versionOf(e.rows[0]), VersionB: p.versionOf(e.rows[1]),
	}
}

func (p *repairer) versionOf(r *VersionedRow) *RepairVersion {
	if r == nil || r.Site == 0 {
		return nil
	}
	name := fmt.Sprint(r.Site)
	if p.o.SiteName != nil {
		name = p.o.SiteName(r.Site)
	}
	return &RepairVersion{r.Time.Std(), name}
}

// keyless repairs a table without a key: its rows have no version, so only a declared side decides how often each is.
func (p *repairer) keyless(ctx context.Context, c *comparison, some []Difference) error {
	plans := make([]plan, len(some))
	for i, d := range some {
		plans[i].row = p.describe(c, d, evidence{})
		if p.from < 0 {
			plans[i].row.State, plans[i].row.Reason = RepairLeft, "a row without a key has no version"
			continue
		}
		plans[i].row.Right, plans[i].row.Why = p.sides[p.from].Name(), "declared"
		plans[i].wrong = 1 - p.from
		copies := [2]int64{d.CopiesA, d.CopiesB}
		plans[i].fix = &Fix{
			Hash: d.hash, Copies: copies[1-p.from], Want: copies[p.from], Time: unknownTime, Site: p.o.Sites[p.from],
		}
	}
	if p.from >= 0 {
		if err := p.images(ctx, c, plans); err != nil {
			return err
		}
	}
	return p.carryOut(ctx, c, plans)
}

// images reads the rows to be added, uncut.
func (p *repairer) images(ctx context.Context, c *comparison, plans []plan) error {
	r := Range{By: c.by, ImageBytes: -1}
	for _, x := range plans {
		r.Hashes = append(r.Hashes, x.fix.Hash)
	}
	rows, err := p.sides[p.from].Rows(ctx, c.t, r, len(plans)+1)
	if err != nil {
		return err
	}
	images := imagesOf(rows)
	for i := range plans {
		x := &plans[i]
		there := false
		if x.fix.Image, there = images[x.fix.Hash]; !there && x.fix.Want > x.fix.Copies {
			x.row.State, x.row.Reason, x.fix = RepairLeft, whyChanged, nil
		}
	}
	return nil
}

// carryOut mends what is to be mended, side by side, and reports every row.
func (p *repairer) carryOut(ctx context.Context, c *comparison, plans []plan) error {
	var err error
	for side, s := range p.sides {
		var fixes []Fix
		var of []*plan
		for i := range plans {
			if x := &plans[i]; x.fix != nil && x.wrong == side {
				x.row.State = RepairPlanned
				fixes, of = append(fixes, *x.fix), append(of, x)
			}
		}
		if !p.o.Apply || len(fixes) == 0 {
			continue
		}
		var out []Outcome
		if err == nil {
			out, err = s.Mend(ctx, c.t, c.by, fixes)
		}
		for i, x := range of {
			x.row.State, x.row.Reason = RepairLeft, whyNotReached
			if err != nil {
				x.row.Reason = "it is not known whether it was written: " + err.Error()
			}
			if i < len(out) && out[i] != (Outcome{}) {
				x.row.Reason = out[i].Why
				if out[i].Done {
					x.row.State = RepairDone
				}
			}
		}
	}
	for _, x := range plans {
		p.rep.Rows = append(p.rep.Rows, x.row)
		if x.row.State == RepairDone {
			p.rep.Done++
		} else {
			p.rep.Left++
		}
	}
	return err
}

// Hint is the advice about what is left.
func (r RepairReport) Hint() string {
	for _, x := range r.Rows {
		switch {
		case x.State == RepairPlanned:
			return "write it with `duri repair --apply`"
		case x.State == RepairLeft && x.Right == "" && x.Reason != whyChanged:
			return fromHint
		}
	}
	if r.Left > 0 {
		return "compare again with `duri verify`"
	}
	return ""
}
