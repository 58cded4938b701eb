package verify

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// WatchConfig says what is compared continuously, and how gently.
type WatchConfig struct {
	A, B   Side          // this site and its peer
	Period time.Duration // a pass over all tables is spread over it; 0: 5 minutes
	// CPU is the share of a core that the comparison may take of each site's server; 0: 0.02. Where the period cannot be
	// kept with it, passes take longer.
	CPU float64
	// Settle is Options.Settle. An error is shown and tried again.
	Settle func(context.Context) error
	// Calm tells why nothing should be compared just now, in a few words; empty: go on. nil: always go on.
	Calm func() string
	// News is told when a table is found to differ, and, with Rows 0, when it does no more. It may block for a moment.
	News func(Found)

	rangeRows int // smaller in tests; 0: watchRangeRows
}

func (c WatchConfig) withDefaults() WatchConfig {
	if c.Period <= 0 {
		c.Period = 5 * time.Minute
	}
	if c.CPU <= 0 {
		c.CPU = 0.02
	}
	if c.rangeRows == 0 {
		c.rangeRows = watchRangeRows
	}
	if c.Calm == nil {
		c.Calm = func() string { return "" }
	}
	if c.News == nil {
		c.News = func(Found) {}
	}
	return c
}

// States of a Watch.
const (
	WatchRunning = "running"
	WatchPaused  = "paused" // see Reason
)

// WatchStatus is what a Watch has found so far. Its JSON form is a contract: fields are only added.
type WatchStatus struct {
	Peer   string `json:"peer"`
	State  string `json:"state"`
	Reason string `json:"reason,omitempty"` // why it is paused
	// Passes that ended since the agent started, and when the last one did; zero: none has yet.
	Passes    int       `json:"passes"`
	LastPass  time.Time `json:"last_pass"`
	LastPassS float64   `json:"last_pass_s"` // how long it took
	Rows      int64     `json:"rows"`        // compared in the present pass
	RowsTotal int64     `json:"rows_total"`  // estimate of it
	Found     []Found   `json:"found"`       // tables that differ, by name
	Problem   string    `json:"problem,omitempty"`
	Hint      string    `json:"hint,omitempty"`
}

// Found is a table with rows that differ for certain: they were not in flight.
type Found struct {
	Schema string `json:"schema"`
	Table  string `json:"table"`
	Rows   int    `json:"rows"` // at least so many
	More   bool   `json:"more,omitempty"`
	// First is when the first of them was found, and Key its key.
	First time.Time `json:"first_found"`
	Key   []string  `json:"key,omitempty"`
}

// Watch compares two sites over and over, slowly: one short statement at a time. Run it once at a time; the other methods
// may be called from other goroutines.
//
//	pass: for each table, range by range:   wait for the pacer, and for calm
//	                                        compare the range; rows that differ are suspects
//	      now and then, and after a table:  settle and look again (as Run does); what stays different is found
//	      while it waits:                   look at the rows found earlier; equal ones are found no more
//	      at the end:                       what this pass has not found again is found no more
type Watch struct {
	cfg  WatchConfig
	poke chan struct{}

	mu     sync.Mutex // guards the rest
	status WatchStatus
	tables map[string]*watched // tables with rows found, by Table.String
	pace   pacer

	bounds map[string]bounds // used by Run alone
}

// bounds are where the ranges of a table end, from an earlier pass: to walk the index for them costs a tenth of a pass.
type bounds struct {
	keys []Key
	rows int // that a range had then
}

// watched is a table in which rows were found.
type watched struct {
	found Found
	rows  map[string]*suspect // by id; at most foundMax
	c     *comparison         // how they were found
}

const (
	// watchRangeRows is the size of a range: some 30 ms of PostgreSQL's time. Where rows are written, larger ranges differ
	// more often in flight; with smaller ones PostgreSQL wakes up too often with cold caches.
	watchRangeRows = 50_000
	// foundMax bounds the rows of a table that are remembered as different.
	foundMax = 1000
	// recheckMost is how often rows found earlier are looked at again, at the most; settleMost likewise for suspects.
	recheckMost, settleMost = 10 * time.Second, 10 * time.Second
	// restPause is how long a paused or failed Watch waits before it tries again.
	restPause = 2 * time.Second
)

// NewWatch gives a Watch that is not running.
func NewWatch(c WatchConfig) *Watch {
	c = c.withDefaults()
	return &Watch{
		cfg: c, poke: make(chan struct{}, 1), tables: map[string]*watched{}, bounds: map[string]bounds{},
		status: WatchStatus{Peer: c.B.Name(), State: WatchRunning},
	}
}

// Recheck looks at the rows found so far soon, because somebody may have mended them. It does not block.
func (w *Watch) Recheck() {
	select {
	case w.poke <- struct{}{}:
	default:
	}
}

// Status is a snapshot.
func (w *Watch) Status() WatchStatus {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.status
	s.Found = []Found{}
	for _, name := range slices.Sorted(maps.Keys(w.tables)) {
		s.Found = append(s.Found, w.tables[name].found)
	}
	return s
}

// Run compares until ctx ends. It returns ctx's error and no other: whatever fails is shown and tried again.
func (w *Watch) Run(ctx context.Context) error {
	for {
		if err := w.pass(ctx); err != nil {
			return err
		}
	}
}

// pass compares all tables once.
func (w *Watch) pass(ctx context.Context) error {
	began := time.Now()
	r, err := w.begin(ctx)
	if err != nil {
		return err
	}
	p := &pass{Watch: w, runner: r, lastLook: began, noted: map[*comparison]int{}}
	for _, c := range r.tables {
		if err := p.table(ctx, c); err != nil {
			return err
		}
	}
	p.end()
	w.change(func(s *WatchStatus) {
		s.Passes++
		s.LastPass, s.LastPassS = time.Now().UTC(), time.Since(began).Seconds()
	})
	// What is left of the period, also for an empty database.
	return p.rest(ctx, max(w.wait(), passTime(w.cfg.Period)-time.Since(began)))
}

// begin lists the tables of both sites, and tries until it can.
func (w *Watch) begin(ctx context.Context) (r *runner, err error) {
	err = w.insist(ctx, func() error {
		r = newRunner(w.cfg.A, w.cfg.B, Options{Parallel: 1, RangeRows: w.cfg.rangeRows, MaxDiffs: foundMax, Settle: w.cfg.Settle})
		lists, err := each(ctx, r.sides, func(ctx context.Context, s Side) ([]Table, error) { return s.Tables(ctx) })
		if err != nil {
			return err
		}
		matched, _, _, err := matchTables(lists[0], lists[1], nil, r.o.Seed)
		total := int64(0)
		for _, m := range matched {
			if m.by.Algorithm == AlgorithmFast {
				m.by.Algorithm = AlgorithmRecord
			}
			r.tables = append(r.tables, newComparison(r, m))
			total += m.rows()
		}
		w.mu.Lock()
		w.pace = newPacer(total, w.cfg.Period, w.cfg.CPU, time.Now())
		w.status.Rows, w.status.RowsTotal = 0, total
		w.mu.Unlock()
		r.meter = meter{compared: w.compared, worked: w.worked}
		return err
	})
	return r, err
}

func (w *Watch) compared(rows int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pace.compared(time.Now(), rows)
}

func (w *Watch) worked(rows int64, took time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pace.worked(time.Now(), rows, took)
}

func (w *Watch) wait() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pace.wait(time.Now())
}

func (w *Watch) change(f func(*WatchStatus)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(&w.status)
}

// calm waits until there is no reason against comparing.
func (w *Watch) calm(ctx context.Context) error {
	for {
		why := w.cfg.Calm()
		w.change(func(s *WatchStatus) {
			s.Reason, s.State = why, WatchRunning
			if why != "" {
				s.State = WatchPaused
			}
		})
		if why == "" {
			return ctx.Err()
		}
		if _, err := sleep(ctx, restPause, nil); err != nil {
			return err
		}
	}
}

// insist calls f when all is calm, until it succeeds. A TableError is a result.
func (w *Watch) insist(ctx context.Context, f func() error) error {
	for {
		if err := w.calm(ctx); err != nil {
			return err
		}
		err := f()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if _, table := isTableError(err); err == nil || table {
			w.change(func(s *WatchStatus) { s.Problem, s.Hint = "", "" })
			return err
		}
		w.change(func(s *WatchStatus) { s.Problem, s.Hint = err.Error(), hintOf(err) })
		if _, err := sleep(ctx, restPause, nil); err != nil {
			return err
		}
	}
}

// sleep waits for d, or until wake has something.
func sleep(ctx context.Context, d time.Duration, wake <-chan struct{}) (woken bool, err error) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false, ctx.Err()
	case <-t.C:
		return false, nil
	case <-wake:
		return true, nil
	}
}

// pass is one pass of a Watch.
type pass struct {
	*Watch
	*runner
	lastLook time.Time           // when suspects were settled last
	noted    map[*comparison]int // how many of comparison.real are remembered
}

// every is how often something is done that is worth doing at most every most: more often in short periods, as tests
// have them.
func (p *pass) every(most time.Duration) time.Duration { return min(most, p.cfg.Period/30) }

// table compares one table.
func (p *pass) table(ctx context.Context, c *comparison) error {
	err := p.ranges(ctx, c)
	if err == nil {
		err = p.settle(ctx)
	}
	if te, ok := isTableError(err); ok {
		c.fail(te)
		return nil
	}
	return err
}

// ranges compares range after range, as the pacer allows.
func (p *pass) ranges(ctx context.Context, c *comparison) error {
	if c.method != ByKeyOrder {
		for _, parts := range partGroups(c.rows()) {
			if err := p.one(ctx, c, Range{By: c.by, Parts: &parts}); err != nil {
				return err
			}
		}
		return nil
	}
	name, all := c.t.String(), Range{By: c.by}
	if b, ok := p.bounds[name]; ok && b.rows == c.rangeRows && len(b.keys) > 0 && len(b.keys[0]) == len(c.t.Key) {
		delete(p.bounds, name) // unless they have served well
		good := true
		for _, r := range cut(all, b.keys) {
			rows, err := p.counting(func() error { return p.one(ctx, c, r) })
			if err != nil || p.enough(c) {
				return err
			}
			good = good && rows < 2*int64(b.rows) && (rows > int64(b.rows)/4 || r.UpTo == nil)
		}
		if good {
			p.bounds[name] = b
		}
		return nil
	}
	var keys []Key
	for r := all; ; r.After = r.UpTo {
		var err error
		if r.UpTo, err = p.bound(ctx, c, r); err != nil {
			return err
		}
		if err := p.one(ctx, c, r); err != nil || p.enough(c) {
			return err
		}
		if r.UpTo == nil {
			break
		}
		keys = append(keys, r.UpTo)
	}
	p.bounds[name] = bounds{keys, c.rangeRows}
	return nil
}

// counting gives how many rows f has compared.
func (p *pass) counting(f func() error) (rows int64, err error) {
	before := p.comparedRows()
	err = f()
	return p.comparedRows() - before, err
}

func (p *pass) comparedRows() int64 {
	p.runner.mu.Lock()
	defer p.runner.mu.Unlock()
	return p.progress.Rows
}

// bound finds where the next range ends, by this site's rows; nil: it is the last. What the peer has more in it is cut
// when it is compared.
func (p *pass) bound(ctx context.Context, c *comparison, r Range) (key Key, err error) {
	r.UpTo, r.First = nil, true
	err = p.insist(ctx, func() error {
		began := time.Now()
		keys, err := p.cfg.A.Bounds(ctx, c.t, r, c.rangeRows)
		p.worked(0, time.Since(began))
		if err == nil && len(keys) > 0 {
			key = keys[0]
		}
		return err
	})
	return key, err
}

// enough reports that more differences of a table would not be remembered anyway.
func (p *pass) enough(c *comparison) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.real) >= foundMax {
		c.rep.More = true
	}
	return c.rep.More
}

// one compares one range, and looks again at what is due.
func (p *pass) one(ctx context.Context, c *comparison, r Range) error {
	if err := p.rest(ctx, p.wait()); err != nil {
		return err
	}
	err := p.insist(ctx, func() error {
		if c.method == ByKeyOrder {
			return c.compareRange(ctx, r, 0)
		}
		return c.compareGroup(ctx, r)
	})
	if err != nil {
		return err
	}
	p.counted()
	if due := p.every(settleMost); p.wait() >= due || time.Since(p.lastLook) >= due {
		return p.settle(ctx)
	}
	return nil
}

// counted takes the rows compared over into the status.
func (p *pass) counted() {
	rows := p.comparedRows()
	p.change(func(s *WatchStatus) { s.Rows = rows })
}

// settle tells the suspects that there are from real differences.
func (p *pass) settle(ctx context.Context) error {
	for p.open() {
		err := p.insist(ctx, func() error {
			if err := p.settleRounds(ctx); err != nil {
				return err
			}
			return p.forTables(ctx, (*comparison).nextPass)
		})
		if err != nil {
			return err
		}
		p.lastLook = time.Now()
	}
	p.note()
	return nil
}

// note remembers what was found since the last note: what is forgotten meanwhile must not come back.
func (p *pass) note() {
	for _, c := range p.runner.tables {
		c.mu.Lock()
		found, more := slices.Clone(c.real[p.noted[c]:]), c.rep.More || len(c.real) > foundMax
		p.noted[c] = len(c.real)
		c.mu.Unlock()
		if len(found) > 0 {
			p.remember(c, found, more)
		}
	}
}

// remember adds rows to what is known of a table, and tells of a table that was not known.
func (w *Watch) remember(c *comparison, rows []*suspect, more bool) {
	sortSuspects(rows)
	name := c.t.String()
	w.mu.Lock()
	t := w.tables[name]
	news := t == nil
	if news {
		first := Found{Schema: c.t.Schema, Table: c.t.Name, First: time.Now().UTC(), Key: rows[0].key}
		t = &watched{found: first, rows: map[string]*suspect{}}
		w.tables[name] = t
	}
	t.c = c
	for _, s := range rows {
		if len(t.rows) < foundMax {
			t.rows[s.id()] = s
		}
	}
	t.found.Rows, t.found.More = len(t.rows), more
	found := t.found
	w.mu.Unlock()
	if news {
		w.cfg.News(found)
	}
}

// forget keeps only the rows of a table that keep says, and tells when none is left.
func (w *Watch) forget(name string, keep func(id string) bool) {
	w.mu.Lock()
	t := w.tables[name]
	if t == nil {
		w.mu.Unlock()
		return
	}
	maps.DeleteFunc(t.rows, func(id string, _ *suspect) bool { return !keep(id) })
	t.found.Rows = len(t.rows)
	if t.found.More = t.found.More && t.found.Rows > 0; t.found.Rows == 0 {
		delete(w.tables, name)
	}
	found := t.found
	w.mu.Unlock()
	if found.Rows == 0 {
		w.cfg.News(found)
	}
}

// end forgets what the pass has not found again. A table that could not be compared (to its end) keeps what was known.
func (p *pass) end() {
	compared := map[string]*comparison{}
	var problem *TableReport
	for _, c := range p.runner.tables {
		compared[c.t.String()] = c
		if rep := c.result(); rep.Error != "" && problem == nil {
			problem = &rep
		}
	}
	for _, name := range p.known() {
		c := compared[name]
		if c != nil && (c.failed() || c.result().More) {
			continue
		}
		again := map[string]bool{}
		if c != nil { // else the table is no more
			for _, s := range c.real {
				again[s.id()] = true
			}
		}
		p.forget(name, func(id string) bool { return again[id] })
	}
	if problem != nil {
		p.change(func(s *WatchStatus) { s.Problem, s.Hint = problem.Error, problem.Hint })
	}
}

// known names the tables with rows found.
func (w *Watch) known() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(maps.Keys(w.tables))
}

// rest waits for d, and meanwhile looks at the rows found so far, again and again.
func (p *pass) rest(ctx context.Context, d time.Duration) error {
	end := time.Now().Add(d)
	for {
		left := time.Until(end)
		if left <= 0 {
			return ctx.Err()
		}
		if len(p.known()) > 0 {
			left = min(left, p.every(recheckMost))
		}
		if _, err := sleep(ctx, left, p.poke); err != nil {
			return err
		}
		p.recheck(ctx)
	}
}

// recheck looks at the rows found so far and forgets those that are equal now. What it cannot look at stays found.
func (w *Watch) recheck(ctx context.Context) {
	for _, name := range w.known() {
		w.mu.Lock()
		t := w.tables[name]
		var rows []*suspect
		if t != nil && len(t.c.t.Key) > 0 { // without a key a look is a pass over the table: the next one will tell
			rows = slices.Collect(maps.Values(t.rows))
		}
		w.mu.Unlock()
		for some := range slices.Chunk(rows, lookRows) {
			equal, err := w.equalNow(ctx, t.c, some)
			if err != nil {
				return
			}
			w.forget(name, func(id string) bool { return !equal[id] })
		}
	}
}

// equalNow gives those of some rows, by id, that are equal at both sites, or absent from both.
func (w *Watch) equalNow(ctx context.Context, c *comparison, some []*suspect) (map[string]bool, error) {
	rows, err := c.rowsOf(ctx, c.rangeOf(some), len(some)+1)
	if err != nil {
		return nil, err
	}
	now, equal := observations(rows[0], rows[1]), map[string]bool{}
	for _, s := range some {
		equal[s.id()] = now[s.id()].equal()
	}
	return equal, nil
}

// String prints what was found, for the log and duri.event.
func (f Found) String() string {
	if f.Rows == 0 {
		return fmt.Sprintf("table %s.%s: no row differs any more", f.Schema, f.Table)
	}
	what := fmt.Sprintf("table %s.%s: %d rows differ", f.Schema, f.Table, f.Rows)
	if f.Rows == 1 {
		what = fmt.Sprintf("table %s.%s: a row differs", f.Schema, f.Table)
	}
	if len(f.Key) > 0 {
		what += fmt.Sprintf(", the first with key (%s)", strings.Join(f.Key, ", "))
	}
	return what
}
