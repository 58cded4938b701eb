package verify

import (
	"slices"
	"time"
)

// paceSlack is what a pacer may catch up after a time in which nothing was compared (rows were settled, a site was
// away): so much work at once, and no more.
const paceSlack = 10 * time.Second

// passShare is the part of the period that a pass is spread over. The rest is for settling, so that what was corrupted
// just behind the comparison is found within the period.
const passShare = 0.85

// pacer spreads the comparison over its period. It is two token buckets that must both have something: one is filled
// with rows per second, so that a pass ends in its period; the other with the share of a core, so that PostgreSQL rests
// for what it has worked. Pure; the zero pacer never waits.
type pacer struct {
	rate  float64   // rows per second; 0: as fast as the share allows
	share float64   // of a core, at each site; 0: no bound
	rows  time.Time // when the first bucket has something again
	work  time.Time // when the second has

	costs []time.Duration // per row, of the last questions about many rows
}

// newPacer gives the pacer of a pass over rows that begins now.
func newPacer(rows int64, period time.Duration, share float64, now time.Time) pacer {
	return pacer{rate: float64(max(rows, 1)) / passTime(period).Seconds(), share: share, rows: now, work: now}
}

// passTime is the least time from the beginning of a pass to that of the next.
func passTime(period time.Duration) time.Duration { return time.Duration(passShare * float64(period)) }

// compared takes rows that the pass has come forward.
func (p *pacer) compared(now time.Time, rows int64) {
	if p.rate > 0 {
		p.rows = later(p.rows, now.Add(-paceSlack)).Add(time.Duration(float64(rows) / p.rate * float64(time.Second)))
	}
}

// worked takes a question about rows, with which the busier of the two servers was occupied for took; without rows that
// is CPU time.
func (p *pacer) worked(now time.Time, rows int64, took time.Duration) {
	if p.share > 0 {
		p.work = later(p.work, now.Add(-paceSlack)).Add(time.Duration(float64(p.cpu(rows, took)) / p.share))
	}
}

const (
	// manyRows tell what a row costs; costsKept questions are remembered.
	manyRows, costsKept = 1000, 16
)

// cpu estimates the CPU time of a question. What it took is an upper bound: on a busy machine it has also waited for a
// core. The least that a row has cost of late is what it costs; it is counted with a third more, as caches are cold.
func (p *pacer) cpu(rows int64, took time.Duration) time.Duration {
	if rows < manyRows {
		return took
	}
	if len(p.costs) == costsKept {
		p.costs = p.costs[1:]
	}
	p.costs = append(p.costs, took/time.Duration(rows))
	return min(took, slices.Min(p.costs)*time.Duration(rows)*4/3)
}

// wait is how long to rest before the next question.
func (p *pacer) wait(now time.Time) time.Duration {
	return max(0, later(p.rows, p.work).Sub(now))
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
