package demo

import (
	"slices"
	"sync"
	"time"
)

// waits are the times for which one client was without an answer. Safe for concurrent use.
type waits struct {
	mu    sync.Mutex // guards the rest
	since time.Time  // of the present one; zero: it waits for nothing
	past  []wait
}

// wait is one of them.
type wait struct{ from, to time.Time }

// begin notes that the client asks for something. What it asks again before it had an answer is the same wait.
func (w *waits) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.since.IsZero() {
		w.since = time.Now()
	}
}

// end notes that it has its answer.
func (w *waits) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.past = append(w.past, wait{w.since, time.Now()})
	w.since = time.Time{}
}

// all are the waits so far, the present one as it is at now.
func (w *waits) all(now time.Time) []wait {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.since.IsZero() {
		return slices.Clone(w.past)
	}
	return append(slices.Clone(w.past), wait{w.since, now})
}

// stallOf is the longest of a client's waits that a time of trouble has touched: that ended at or after from, and began before
// to. Each counts whole. It is pure.
func stallOf(all []wait, from, to time.Time) (longest time.Duration) {
	for _, w := range all {
		if !w.to.Before(from) && w.from.Before(to) {
			longest = max(longest, w.to.Sub(w.from))
		}
	}
	return longest
}

// percentile is the least of the values that a share of them does not exceed (nearest rank); 0 without any. It is pure.
func percentile(values []time.Duration, share float64) time.Duration {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	n := int(share * float64(len(sorted)))
	if float64(n) < share*float64(len(sorted)) {
		n++
	}
	return sorted[max(n, 1)-1]
}
