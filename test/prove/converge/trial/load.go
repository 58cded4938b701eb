package trial

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// load is what the clients, the faults and the progress line share. Safe for concurrent use.
type load struct {
	began   time.Time
	ops     int64         // when so many changes are committed it is over
	done    chan struct{} // closed then
	changes atomic.Int64
	refused atomic.Int64
	held    atomic.Bool // the clients wait for apply

	mu     sync.Mutex // guards the rest
	bySite []int64
	faults map[string]int
	err    error
	ended  bool
}

func newLoad(ops, sites int) *load {
	return &load{began: time.Now(), ops: int64(ops), done: make(chan struct{}), bySite: make([]int64, sites), faults: map[string]int{}}
}

// committed counts the changes of a transaction.
func (l *load) committed(site, n int) {
	total := l.changes.Add(int64(n))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bySite[site] += int64(n)
	if total >= l.ops {
		l.end()
	}
}

// fail ends the load because the test itself is broken.
func (l *load) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = errors.Join(l.err, err)
	l.end()
}

// end is called with mu held.
func (l *load) end() {
	if !l.ended {
		l.ended = true
		close(l.done)
	}
}

// early reports that more was committed than a rate of changes a second allows.
func (l *load) early(rate int) bool {
	return rate > 0 && float64(l.changes.Load()) > time.Since(l.began).Seconds()*float64(rate)
}

func (l *load) over() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

func (l *load) fault(kind string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.faults[kind]++
}

// happened is how often which fault was made so far.
func (l *load) happened() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.faults)
}

// drive runs the load with its faults, and waits until the sites have applied everything.
func (r *run) drive(ctx context.Context) error {
	r.load = newLoad(r.s.Ops, r.s.Sites)
	for i, ms := range r.s.Clocks {
		if err := r.clocks[i].set(time.Duration(ms) * time.Millisecond); err != nil {
			return err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	lctx, stop := context.WithCancel(gctx) // ends with the load
	defer stop()
	g.Go(func() error {
		defer stop()
		select {
		case <-r.load.done:
		case <-gctx.Done():
		}
		return nil
	})
	for site := range r.s.Sites {
		for n := range r.s.Sessions {
			c := newClient(r, site, n)
			g.Go(func() error { c.run(lctx); return nil })
		}
	}
	g.Go(func() error { return r.disturb(lctx, gctx) })
	g.Go(func() error { return r.watch(lctx) })
	err := g.Wait()
	r.res.Load, r.res.Changes = time.Since(r.load.began), int(r.load.changes.Load())
	r.res.Refused, r.res.Faults = int(r.load.refused.Load()), r.load.happened()
	if err = errors.Join(err, r.load.err, ctx.Err()); err != nil {
		return err
	}
	fmt.Fprintf(r.o.Out, "load over: %d changes in %s, %s; waiting until all is applied\n", r.res.Changes, r.res.Load.Round(time.Millisecond), tally(r.res.Faults))
	began := time.Now()
	wait, cancel := context.WithTimeout(ctx, r.o.Wait)
	defer cancel()
	if err := r.p.WaitApplied(wait); err != nil {
		if ctx.Err() != nil {
			return err
		}
		r.differ("the sites have not applied everything %s after all faults ended: %v", r.o.Wait, err)
	}
	r.res.CaughtUp = time.Since(began)
	return nil
}

// tally is "3 kill-agent, 1 cut".
func tally(faults map[string]int) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(faults)) {
		parts = append(parts, fmt.Sprintf("%d %s", faults[k], k))
	}
	if len(parts) == 0 {
		return "no faults"
	}
	return strings.Join(parts, ", ")
}

// differ notes something that is wrong.
func (r *run) differ(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	r.res.Differences = append(r.res.Differences, text)
	if len(r.res.Differences) <= printedMax {
		fmt.Fprintln(r.o.Out, "DIFFERENCE:", text)
	}
}

// printedMax bounds how many differences are printed as they are found.
const printedMax = 20

const (
	watchEvery    = 500 * time.Millisecond
	progressEvery = 10 * time.Second
	// behindMax is how far, in bytes of WAL, apply may be behind before the clients wait for it.
	behindMax = 48 << 20
)

// watch prints progress, lets the clients wait while apply is far behind, and ends a load that stands still.
func (r *run) watch(ctx context.Context) error {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	printed, moved := time.Now(), time.Now()
	var last, lastPrinted int64
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		now := r.load.changes.Load()
		behind, worst := r.behind(ctx)
		r.load.held.Store(behind > behindMax)
		if now != last {
			last, moved = now, time.Now()
		}
		if time.Since(moved) > r.o.Stall {
			return fmt.Errorf("nothing was committed for %s, after %d changes; %s", r.o.Stall, now, worst)
		}
		if d := time.Since(printed); d >= progressEvery {
			fmt.Fprintf(r.o.Out, "%s: %d of %d changes, %.0f/s; %s; furthest behind: %s\n", time.Since(r.load.began).Round(time.Second), now, r.s.Ops,
				float64(now-lastPrinted)/d.Seconds(), tally(r.load.happened()), worst)
			printed, lastPrinted = time.Now(), now
		}
	}
}

// behind is how far the direction that is furthest behind is. An agent that does not answer is not behind: it is killed,
// or stopped.
func (r *run) behind(ctx context.Context) (int64, string) {
	most, worst := int64(0), "nobody"
	for _, s := range r.p.Sites {
		ask, cancel := context.WithTimeout(ctx, watchEvery)
		st, err := s.Status(ask)
		cancel()
		if err != nil {
			continue
		}
		for _, l := range st.Links {
			if l.LagBytes <= most {
				continue
			}
			most = l.LagBytes
			worst = fmt.Sprintf("%s from %s by %.1f MB", s.Name, l.From, float64(l.LagBytes)/(1<<20))
			if l.Apply.LastError != "" {
				worst += " (" + l.Apply.LastError + ")"
			}
		}
	}
	return most, worst
}
