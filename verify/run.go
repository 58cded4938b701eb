package verify

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Options of Run. The zero value is ready to use.
type Options struct {
	// Tables are patterns, schema.table with * for any characters; none: all tables. One that fits no table is an error.
	Tables    []string
	RangeRows int // rows a range; 0: 20,000. Fewer where rows are wide.
	Parallel  int // ranges compared at a time; 0: 2. A DB needs as many connections.
	// Settle returns when both sites have applied what the other had committed when it was called. Without it, nothing
	// is waited for, which suits sites that are idle. An error ends Run.
	Settle     func(context.Context) error
	Rounds     int            // how often rows that differ are settled and looked at again; 0: 5
	Progress   func(Progress) // called by one goroutine at a time, and must not block
	MaxDiffs   int            // differences listed per table; 0: 100
	ImageBytes int            // values longer than this are cut in images; 0: 8 kB; -1: never
	Seed       int64          // of the hashes; 0: random
	// Only tells, of each table, which rows are compared; nil: all.
	Only func(t Table) Chosen
}

// withDefaults fills in what is not set.
func (o Options) withDefaults() Options {
	set := func(v *int, def int) {
		if *v == 0 {
			*v = def
		}
	}
	set(&o.RangeRows, 20_000)
	set(&o.Parallel, 2)
	set(&o.Rounds, 5)
	set(&o.MaxDiffs, 100)
	set(&o.ImageBytes, 8<<10)
	if o.Seed == 0 {
		o.Seed = rand.Int64()
	}
	return o
}

// check refuses numbers that mean nothing.
func (o Options) check() error {
	if o.RangeRows < 0 || o.RangeRows > requestRowsMax/4 || o.Parallel < 0 || o.Rounds < 0 || o.MaxDiffs < 0 {
		return fmt.Errorf("compare sites: range rows %d, parallel %d, rounds %d, differences %d are not all in bounds",
			o.RangeRows, o.Parallel, o.Rounds, o.MaxDiffs)
	}
	return nil
}

// Run compares the tables of a and b. It returns an error when the comparison could not be made or ended early (a site
// cannot be reached, Settle failed, ctx ended); the Report then says what was found until then, and is not Equal. A
// table that cannot be compared is no error; it has TableReport.Error.
func Run(ctx context.Context, a, b Side, o Options) (Report, error) {
	_, rep, err := run(ctx, a, b, o)
	return rep, err
}

// run is Run; it gives its runner as well, which knows how tables were compared.
func run(ctx context.Context, a, b Side, o Options) (*runner, Report, error) {
	if err := o.check(); err != nil {
		return nil, Report{}, err
	}
	r := newRunner(a, b, o)
	rep := Report{A: a.Name(), B: b.Name(), Started: r.started, Seed: r.o.Seed}
	err := r.run(ctx, &rep)
	if err == nil {
		err = context.Cause(ctx) // whatever a Side made of it
	}
	r.finish(&rep, err)
	return r, rep, err
}

func newRunner(a, b Side, o Options) *runner {
	o = o.withDefaults()
	return &runner{sides: [2]Side{a, b}, o: o, slots: make(chan struct{}, o.Parallel), started: time.Now().UTC()}
}

// RunAll compares the first side with every other one. As equality is transitive, that compares all with all.
func RunAll(ctx context.Context, sides []Side, o Options) ([]Report, error) {
	var reports []Report
	for i := 1; i < len(sides); i++ {
		rep, err := Run(ctx, sides[0], sides[i], o)
		reports = append(reports, rep)
		if err != nil {
			return reports, err
		}
	}
	return reports, nil
}

// runner is one Run.
type runner struct {
	sides   [2]Side
	o       Options
	slots   chan struct{} // bounds the ranges compared at a time
	started time.Time
	tables  []*comparison
	meter   meter

	mu       sync.Mutex // guards progress, and is held while it is reported
	progress Progress
}

// run does the first pass over all tables, then settles the rows that differed, together for all tables, until every
// range that differed was looked into, or enough differences of its table are known.
func (r *runner) run(ctx context.Context, rep *Report) error {
	lists, err := each(ctx, r.sides, func(ctx context.Context, s Side) ([]Table, error) { return s.Tables(ctx) })
	if err != nil {
		return err
	}
	var matched []match
	if matched, rep.OnlyA, rep.OnlyB, err = matchTables(lists[0], lists[1], r.o.Tables, r.o.Seed); err != nil {
		return err
	}
	for _, m := range matched {
		r.tables = append(r.tables, newComparison(r, m))
		r.progress.RowsTotal += m.rows()
	}
	r.progress.Tables = len(matched)
	err = r.forTables(ctx, func(c *comparison, ctx context.Context) error {
		err := c.firstPass(ctx)
		r.report(c, func(p *Progress) { p.TablesDone++ })
		return err
	})
	for err == nil && r.open() {
		if err = r.settleRounds(ctx); err == nil {
			err = r.forTables(ctx, (*comparison).nextPass)
		}
	}
	if err == nil {
		err = r.forTables(ctx, (*comparison).addImages)
	}
	return err
}

// finish fills in the totals.
func (r *runner) finish(rep *Report, err error) {
	rep.Seconds = time.Since(r.started).Seconds()
	rep.Equal = err == nil && len(rep.OnlyA) == 0 && len(rep.OnlyB) == 0
	rep.Tables = make([]TableReport, 0, len(r.tables))
	for _, c := range r.tables {
		t := c.result()
		t.Equal = t.Equal && err == nil
		rep.Equal = rep.Equal && t.Equal
		rep.Rows += max(t.RowsA, t.RowsB)
		rep.Tables = append(rep.Tables, t)
	}
	if rep.Seconds > 0 {
		rep.RowsPerSecond = float64(rep.Rows) / rep.Seconds
	}
}

// open reports whether any table has suspects or ranges that wait.
func (r *runner) open() bool { return slices.ContainsFunc(r.tables, (*comparison).open) }

// undecided reports whether any suspect must be looked at again.
func (r *runner) undecided() bool {
	return slices.ContainsFunc(r.tables, func(c *comparison) bool { return len(c.undecided()) > 0 })
}

// settleRounds looks at the suspects of all tables again and again, and decides about them.
func (r *runner) settleRounds(ctx context.Context) error {
	for round := 1; round <= r.o.Rounds && r.undecided(); round++ {
		r.report(nil, func(p *Progress) { p.Round = round })
		if r.o.Settle != nil {
			if err := r.o.Settle(ctx); err != nil {
				return fmt.Errorf("wait until %s and %s have applied each other's changes: %w", r.sides[0].Name(), r.sides[1].Name(), err)
			}
		}
		if err := r.forTables(ctx, (*comparison).look); err != nil {
			return err
		}
	}
	for _, c := range r.tables {
		c.conclude()
	}
	return nil
}

// forTables calls f for the tables that have no error yet. A TableError stays with its table.
func (r *runner) forTables(ctx context.Context, f func(*comparison, context.Context) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(r.o.Parallel)
	for _, c := range r.tables {
		if c.failed() {
			continue
		}
		g.Go(func() error {
			err := f(c, ctx)
			if te, ok := isTableError(err); ok {
				c.fail(te)
				return nil
			}
			return err
		})
	}
	return g.Wait()
}

// meter is told what a comparison costs. Either may be nil.
type meter struct {
	compared func(rows int64)                     // by the first pass
	worked   func(rows int64, took time.Duration) // on a question, at the side where it took longer
}

func (m meter) work(rows int64, took time.Duration) {
	if m.worked != nil {
		m.worked(rows, took)
	}
}

// report changes the progress and passes it on.
func (r *runner) report(c *comparison, change func(*Progress)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c != nil {
		r.progress.Table = c.t.String()
	}
	change(&r.progress)
	r.progress.Seconds = time.Since(r.started).Seconds()
	if r.o.Progress != nil {
		r.o.Progress(r.progress)
	}
}

// withSlot runs f when fewer than Options.Parallel others do.
func (r *runner) withSlot(ctx context.Context, f func() error) error {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
		return f()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// each asks both sides at the same time.
func each[T any](ctx context.Context, sides [2]Side, f func(context.Context, Side) (T, error)) (out [2]T, err error) {
	g, ctx := errgroup.WithContext(ctx)
	for i, s := range sides {
		g.Go(func() (err error) {
			out[i], err = f(ctx, s)
			return err
		})
	}
	err = g.Wait()
	return out, err
}

// isTableError finds a TableError.
func isTableError(err error) (*TableError, bool) {
	var te *TableError
	ok := errors.As(err, &te)
	return te, ok
}
