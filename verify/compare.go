package verify

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// rangeBytesMax bounds what one statement reads where rows are wide.
	rangeBytesMax = 32 << 20
	// leafRows is the size of a range whose rows are compared one by one: a reply of some 200 kB.
	leafRows = 2000
	// splitInto is how many ranges a differing range is cut into.
	splitInto = 16
	// suspectsMax bounds the rows of one table that are followed at a time; further ranges wait their turn.
	suspectsMax = 10_000
	// partRows and groupRows are the sizes of a part, and of a group of parts that is hashed in one pass (16 bytes a
	// row in memory). batchRows of differing parts are read in one pass.
	partRows, groupRows, batchRows = 256, 4 << 20, 10_000
	// lookRows suspects at most are looked up by key in one statement.
	lookRows = 500
	// depthMax bounds the narrowing. 16^4 leaves of 2,000 rows are more than any range holds.
	depthMax = 8
)

// comparison is the comparison of one table.
type comparison struct {
	*runner
	match
	t         Table // match.common
	rangeRows int

	mu       sync.Mutex // guards what follows
	rep      TableReport
	pending  []Range    // ranges that differ and were not looked into yet
	suspects []*suspect // not decided yet
	real     []*suspect
	restless []*suspect // with a key, written too often to be decided about
}

func newComparison(r *runner, m match) *comparison {
	return &comparison{runner: r, match: m, t: m.common, rep: m.known, rangeRows: rangeRows(m, r.o.RangeRows)}
}

// rangeRows makes ranges smaller where rows are wide.
func rangeRows(m match, most int) int {
	bytes := max(m.a.Bytes, m.b.Bytes) / max(1, m.rows())
	return max(1, min(most, int(rangeBytesMax/max(1, bytes))))
}

// firstPass compares the whole table, or what Options.Only chooses.
func (c *comparison) firstPass(ctx context.Context) error {
	if c.o.Only != nil {
		if chosen := c.o.Only(c.t); !chosen.All {
			return c.passChosen(ctx, chosen)
		}
	}
	if c.method != ByKeyOrder {
		return c.passParts(ctx)
	}
	all := Range{By: c.by}
	var bounds [2][]Key
	err := c.withSlot(ctx, func() (err error) {
		bounds, err = each(ctx, c.sides, func(ctx context.Context, s Side) ([]Key, error) { return s.Bounds(ctx, c.t, all, c.rangeRows) })
		return err
	})
	if err != nil {
		return err
	}
	// The side with more rows tells the ranges. Where the other one has too many in one range, that is cut again.
	keys := bounds[0]
	if len(bounds[1]) > len(keys) {
		keys = bounds[1]
	}
	return c.forRanges(ctx, cut(all, keys), func(ctx context.Context, r Range) error { return c.compareRange(ctx, r, 0) })
}

// cut gives the ranges between keys.
func cut(r Range, keys []Key) []Range {
	out := make([]Range, 0, len(keys)+1)
	for _, k := range keys {
		piece := r
		piece.UpTo = k
		out = append(out, piece)
		r.After = k
	}
	return append(out, r)
}

// forRanges calls f for each range in a slot of its own.
func (c *comparison) forRanges(parent context.Context, ranges []Range, f func(context.Context, Range) error) error {
	g, ctx := errgroup.WithContext(parent)
	g.SetLimit(c.o.Parallel)
	for _, r := range ranges {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error { return c.withSlot(ctx, func() error { return f(ctx, r) }) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return context.Cause(parent) // ranges were left out when it ended
}

// hash asks both sides for the sum of a range.
func (c *comparison) hash(ctx context.Context, r Range) ([2]Sum, error) {
	sums, err := each(ctx, c.sides, func(ctx context.Context, s Side) (Sum, error) { return s.Hash(ctx, c.t, r, c.rangeRows*2) })
	c.meter.work(workOf(sums))
	return sums, err
}

// workOf is what a question has cost the busier server. When the CPU time is known it counts in full: without rows, of
// which it would only be an estimate.
func workOf(sums [2]Sum) (rows int64, took time.Duration) {
	seconds := max(sums[0].CPU, sums[1].CPU)
	if sums[0].CPU == 0 || sums[1].CPU == 0 {
		rows, seconds = max(sums[0].Rows, sums[1].Rows), max(sums[0].Seconds, sums[1].Seconds)
	}
	return rows, time.Duration(seconds * float64(time.Second))
}

// sameSums reports whether a range is equal at both sides.
func sameSums(s [2]Sum) bool {
	return !s[0].Truncated && !s[1].Truncated && s[0].Rows == s[1].Rows && s[0].Digest == s[1].Digest
}

// compareRange compares a range of the first pass and counts its rows.
func (c *comparison) compareRange(ctx context.Context, r Range, depth int) error {
	sums, err := c.hash(ctx, r)
	if err != nil {
		return err
	}
	if sums[0].Truncated || sums[1].Truncated {
		return c.compareLonger(ctx, r, sums, depth)
	}
	c.count(sums)
	if sameSums(sums) {
		return nil
	}
	return c.narrow(ctx, r, sums, 0)
}

// compareLonger cuts a range that holds more rows than expected and compares the pieces.
func (c *comparison) compareLonger(ctx context.Context, r Range, sums [2]Sum, depth int) error {
	side := c.sides[0]
	if sums[1].Truncated {
		side = c.sides[1]
	}
	if depth == depthMax {
		return c.tooFast(side)
	}
	keys, err := side.Bounds(ctx, c.t, r, c.rangeRows)
	if err != nil {
		return err
	}
	for _, piece := range cut(r, keys) {
		if err := c.compareRange(ctx, piece, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// tooFast is the error about a range that grows faster than it is cut.
func (c *comparison) tooFast(side Side) error {
	return &TableError{side.Name(), c.t.String(), "a range of its key grows faster than it can be compared", "compare it again when there is less load"}
}

// count adds the rows of a compared range or group.
func (c *comparison) count(sums [2]Sum) {
	c.mu.Lock()
	c.rep.RowsA += sums[0].Rows
	c.rep.RowsB += sums[1].Rows
	c.rep.Ranges++
	c.mu.Unlock()
	rows := max(sums[0].Rows, sums[1].Rows)
	if c.meter.compared != nil {
		c.meter.compared(rows)
	}
	c.report(c, func(p *Progress) { p.Rows += rows })
}

// narrow looks for the rows that differ in a range whose sums do.
func (c *comparison) narrow(ctx context.Context, r Range, sums [2]Sum, depth int) error {
	if c.postpone(r) {
		return nil
	}
	most, side := sums[0].Rows, c.sides[0]
	if sums[1].Rows > most {
		most, side = sums[1].Rows, c.sides[1]
	}
	truncated := sums[0].Truncated || sums[1].Truncated
	if most <= leafRows && !truncated {
		return c.leaf(ctx, r, int(most)+2*leafRows)
	}
	if depth == depthMax {
		return c.tooFast(side)
	}
	keys, err := side.Bounds(ctx, c.t, r, min(c.rangeRows, max(leafRows/2, int(most)/splitInto)))
	if err != nil {
		return err
	}
	differ := false
	for _, piece := range cut(r, keys) {
		sums, err := c.hash(ctx, piece)
		if err != nil {
			return err
		}
		if sameSums(sums) {
			continue
		}
		differ = true
		if err := c.narrow(ctx, piece, sums, depth+1); err != nil {
			return err
		}
	}
	if !differ {
		c.rangeInFlight()
	}
	return nil
}

// postpone keeps a range for later when enough rows are followed already.
func (c *comparison) postpone(r Range) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	full := len(c.suspects) >= suspectsMax
	if full {
		c.pending = append(c.pending, r)
	}
	return full
}

func (c *comparison) rangeInFlight() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rep.RangesInFlight++
}

// rowsOf asks both sides for rows.
func (c *comparison) rowsOf(ctx context.Context, r Range, limit int) ([2][]Row, error) {
	began := time.Now()
	defer func() { c.meter.work(0, time.Since(began)) }()
	return each(ctx, c.sides, func(ctx context.Context, s Side) ([]Row, error) {
		rows, err := s.Rows(ctx, c.t, r, limit)
		if err == nil && len(rows) >= limit {
			err = c.tooFast(s)
		}
		return rows, err
	})
}

// leaf compares a range, whose sums differed, row by row.
func (c *comparison) leaf(ctx context.Context, r Range, limit int) error {
	found, err := c.suspect(ctx, r, limit)
	if err == nil && found == 0 {
		c.rangeInFlight()
	}
	return err
}

// suspect compares the rows of a range, and says how many are not equal.
func (c *comparison) suspect(ctx context.Context, r Range, limit int) (int, error) {
	rows, err := c.rowsOf(ctx, r, limit)
	if err != nil {
		return 0, err
	}
	found := compareRows(rows[0], rows[1])
	if len(found) > 0 {
		c.mu.Lock()
		c.suspects = append(c.suspects, found...)
		c.mu.Unlock()
		c.report(c, func(p *Progress) { p.Suspects += len(found) })
	}
	return len(found), nil
}

// passParts compares a table without usable order.
func (c *comparison) passParts(ctx context.Context) error {
	var groups []Range
	for _, p := range partGroups(c.rows()) {
		groups = append(groups, Range{By: c.by, Parts: &p})
	}
	return c.forRanges(ctx, groups, c.compareGroup)
}

// partGroups cuts a table of about rows rows into parts, and these into groups.
func partGroups(rows int64) []Parts {
	bits := 0
	for bits < partBitsMax && rows>>bits > partRows {
		bits++
	}
	groups := min(1<<bits, int(rows/groupRows)+1)
	out := make([]Parts, groups)
	for i := range out {
		out[i].Bits = bits
		for p := i << bits / groups; p < (i+1)<<bits/groups; p++ {
			out[i].Index = append(out[i].Index, p)
		}
	}
	return out
}

// compareGroup compares a group of parts, and the rows of parts that differ.
func (c *comparison) compareGroup(ctx context.Context, r Range) error {
	sums, err := c.hash(ctx, r)
	if err != nil {
		return err
	}
	c.count(sums)
	differ := differingParts(sums[0].Parts, sums[1].Parts)
	for len(differ) > 0 {
		n := batch(differ)
		piece := Range{By: c.by, Parts: &Parts{Bits: r.Parts.Bits}}
		limit := 0
		for _, p := range differ[:n] {
			piece.Parts.Index = append(piece.Parts.Index, p.Index)
			limit += int(p.Rows)
		}
		differ = differ[n:]
		if c.postpone(piece) {
			continue
		}
		if err := c.leaf(ctx, piece, min(requestRowsMax, limit+batchRows)); err != nil {
			return err
		}
	}
	return nil
}

// differingParts gives the parts that are not the same, with the greater number of rows, ascending.
func differingParts(a, b []PartSum) []PartSum {
	atB := map[int]PartSum{}
	for _, p := range b {
		atB[p.Index] = p
	}
	var out []PartSum
	for _, p := range a {
		other := atB[p.Index]
		delete(atB, p.Index)
		if p != other {
			out = append(out, PartSum{Index: p.Index, Rows: max(p.Rows, other.Rows)})
		}
	}
	for _, p := range atB {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b PartSum) int { return a.Index - b.Index })
	return out
}

// batch gives how many parts are read in one pass, one at least.
func batch(parts []PartSum) int {
	rows := int64(0)
	for i, p := range parts {
		if rows += p.Rows; rows > batchRows && i > 0 {
			return i
		}
	}
	return len(parts)
}

// open reports whether there are suspects or ranges that wait.
func (c *comparison) open() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rep.Error == "" && (len(c.suspects) > 0 || len(c.pending) > 0)
}

// undecided gives the suspects to be looked at again; none when the table failed.
func (c *comparison) undecided() []*suspect {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rep.Error != "" {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(c.suspects), func(s *suspect) bool { return s.done })
}

// look observes the undecided suspects once more.
func (c *comparison) look(ctx context.Context) error {
	size := min(lookRows, c.rangeRows)
	if len(c.t.Key) == 0 {
		size = suspectsMax // Each look is a pass over the table.
	}
	for batch := range slices.Chunk(c.undecided(), size) {
		err := c.withSlot(ctx, func() error { return c.lookAt(ctx, batch) })
		if err != nil {
			return err
		}
	}
	return nil
}

// lookAt observes some suspects.
func (c *comparison) lookAt(ctx context.Context, some []*suspect) error {
	rows, err := c.rowsOf(ctx, c.rangeOf(some), len(some)+1)
	if err != nil {
		return err
	}
	now := observations(rows[0], rows[1])
	for _, s := range some {
		s.see(now[s.id()])
	}
	return nil
}

// rangeOf is the Range of these rows.
func (c *comparison) rangeOf(some []*suspect) Range {
	r := Range{By: c.by}
	for _, s := range some {
		if s.key != nil {
			r.Keys = append(r.Keys, s.key)
		} else {
			r.Hashes = append(r.Hashes, s.hash)
		}
	}
	return r
}

// conclude decides about all suspects.
func (c *comparison) conclude() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.suspects {
		s.conclude(c.o.Rounds)
		switch {
		case s.real:
			c.real = append(c.real, s)
		case !s.done:
			c.rep.Unsettled++
			c.rep.InFlight++
			if s.key != nil {
				c.restless = append(c.restless, s)
			}
		default:
			c.rep.InFlight++
		}
	}
	c.suspects = nil
}

// nextPass looks into the ranges that had to wait, unless enough differences are known.
func (c *comparison) nextPass(ctx context.Context) error {
	c.mu.Lock()
	pending := c.pending
	c.pending = nil
	if len(pending) > 0 && len(c.real) >= c.o.MaxDiffs {
		c.rep.More = true
		pending = nil
	}
	c.mu.Unlock()
	return c.forRanges(ctx, pending, func(ctx context.Context, r Range) error {
		if r.Parts != nil || r.Keys != nil || r.Hashes != nil {
			if c.postpone(r) {
				return nil
			}
			return c.leaf(ctx, r, requestRowsMax)
		}
		sums, err := c.hash(ctx, r)
		if err != nil {
			return err
		}
		if sameSums(sums) {
			c.rangeInFlight()
			return nil
		}
		return c.narrow(ctx, r, sums, 0)
	})
}

// addImages reads the images of the differences to be listed.
func (c *comparison) addImages(ctx context.Context) error {
	c.mu.Lock()
	sortSuspects(c.real)
	listed := c.real[:min(len(c.real), c.o.MaxDiffs)]
	c.mu.Unlock()
	for some := range slices.Chunk(listed, c.imageBatch()) {
		r := c.rangeOf(some)
		r.ImageBytes = c.o.ImageBytes
		var rows [2][]Row
		err := c.withSlot(ctx, func() (err error) {
			// Without a key, equal rows are one Row: the limit is that of ids in both cases.
			rows, err = c.rowsOf(ctx, r, len(some)+1)
			return err
		})
		if err != nil {
			return err
		}
		c.list(some, imagesOf(rows[0]), imagesOf(rows[1]))
	}
	return nil
}

// imageBatch is how many rows' images fit into one reply.
func (c *comparison) imageBatch() int {
	const replyBytes = 2 << 20
	bytes := max(1, c.o.ImageBytes) * max(1, len(c.t.Columns))
	if len(c.t.Key) == 0 {
		return c.o.MaxDiffs // Each batch is a pass over the table.
	}
	return max(1, replyBytes/bytes)
}

func imagesOf(rows []Row) map[string][]*string {
	out := map[string][]*string{}
	for _, r := range rows {
		out[idOf(r)] = r.Image
	}
	return out
}

// list adds differences with their images to the report.
func (c *comparison) list(some []*suspect, a, b map[string][]*string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range some {
		d := s.difference()
		d.A, d.B = named(c.t.Columns, a[s.id()]), named(c.t.Columns, b[s.id()])
		if d.Kind == Differs {
			d.Columns = differingColumns(c.t.Columns, d.A, d.B)
		}
		c.rep.Differences = append(c.rep.Differences, d)
	}
}

// named makes an image a map; an absent row is nil.
func named(columns []Column, image []*string) map[string]*string {
	if len(image) != len(columns) || len(image) == 0 {
		return nil
	}
	out := map[string]*string{}
	for i, c := range columns {
		out[c.Name] = image[i]
	}
	return out
}

// differingColumns names the columns whose values differ.
func differingColumns(columns []Column, a, b map[string]*string) []string {
	var out []string
	for _, c := range columns {
		x, y := a[c.Name], b[c.Name]
		if (x == nil) != (y == nil) || x != nil && *x != *y {
			out = append(out, c.Name)
		}
	}
	return out
}

// failed reports whether the table had an error.
func (c *comparison) failed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rep.Error != ""
}

// fail ends the comparison of this table.
func (c *comparison) fail(err *TableError) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rep.Error, c.rep.Hint = err.Error(), err.Hint
}

// result completes the table's report.
func (c *comparison) result() TableReport {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.rep
	t.DifferenceCount = len(c.real)
	t.More = t.More || t.Error == "" && len(c.suspects)+len(c.pending) > 0
	t.Equal = t.Error == "" && !t.More && t.DifferenceCount == 0 && len(t.Columns) == 0
	return t
}

// String names the comparison in errors.
func (c *comparison) String() string { return fmt.Sprintf("comparison of %s", c.t) }
