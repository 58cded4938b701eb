package verify

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// watching runs a Watch in a synctest bubble until the test ends.
func watching(t *testing.T, cfg WatchConfig) *Watch {
	t.Helper()
	w := NewWatch(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run ended with %v", err)
		}
	})
	return w
}

// costly makes a side's digests cost as much time as if its server had worked for it, and sums it up.
func costly(s *fakeSide, perRow time.Duration) (*fakeSide, func() time.Duration) {
	var mu sync.Mutex
	var sum time.Duration
	hash := s.hash
	s.hash = func(t Table, r Range, n int) (Sum, error) {
		out, err := hash(t, r, n)
		took := time.Duration(out.Rows) * perRow
		out.Seconds = took.Seconds()
		time.Sleep(took) // of the bubble
		mu.Lock()
		defer mu.Unlock()
		sum += took
		return out, err
	}
	return s, func() time.Duration { mu.Lock(); defer mu.Unlock(); return sum }
}

// elapse lets time of the bubble pass, and all that is due in it be done.
func elapse(d time.Duration) {
	time.Sleep(d) // of the bubble
	synctest.Wait()
}

func found(w *Watch) []string {
	out := []string{}
	for _, f := range w.Status().Found {
		out = append(out, fmt.Sprintf("%s.%s %d", f.Schema, f.Table, f.Rows))
	}
	return out
}

func TestWatchSpreadsAPassOverItsPeriodAndFindsWithinIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := memPairOf(12_000)
		const period = 5 * time.Minute
		side, worked := costly(newMem("b", b), 250*time.Microsecond) // 3 s a pass: 1 % of a core
		var news []string
		w := watching(t, WatchConfig{A: newMem("a", a), B: side, Period: period, CPU: 0.02, rangeRows: 5000, News: func(f Found) { news = append(news, f.String()) }})
		elapse(2 * period)
		s := w.Status()
		if s.Passes != 2 || s.LastPassS < 0.7*period.Seconds() || s.LastPassS > 0.9*period.Seconds() || len(s.Found) != 0 || s.RowsTotal != 12_000 {
			t.Errorf("%+v", s)
		}
		if share := worked().Seconds() / (2 * period).Seconds(); share > 0.02 || share < 0.005 {
			t.Errorf("it took %.4f of a core", share)
		}
		// Whenever a row is corrupted, it is found within the period.
		for i := range 3 {
			key := fmt.Sprintf("%07d", i*5_800)
			b.set(key, "corrupt")
			elapse(period)
			if got := found(w); !slices.Equal(got, []string{"m.t 1"}) {
				t.Fatalf("row %s was not found within the period: %v", key, got)
			}
			if f := w.Status().Found[0]; len(f.Key) != 1 || f.Key[0] != key || time.Since(f.First) > period {
				t.Errorf("%+v", f)
			}
			b.set(key, "v")
			w.Recheck()
			elapse(time.Second)
			if got := found(w); len(got) != 0 {
				t.Fatalf("row %s is still found after it was mended: %v", key, got)
			}
		}
		if len(news) != 6 || !strings.Contains(news[0], "table m.t: a row differs, the first with key (0000000)") || !strings.Contains(news[1], "no row differs any more") {
			t.Errorf("news: %q", news)
		}
	})
}

func TestWatchFollowsATableThatGrows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := memPairOf(6000)
		walks := 0
		side := newMem("a", a)
		walk := side.bounds
		side.bounds = func(t Table, r Range, n int) ([]Key, error) { walks++; return walk(t, r, n) }
		w := watching(t, WatchConfig{A: side, B: newMem("b", b), Period: time.Minute, rangeRows: 5000})
		elapse(4 * time.Minute)
		if s := w.Status(); walks != 2 || s.Passes < 4 || len(s.Found) != 0 {
			t.Errorf("the index was walked %d times in %d passes, want once with its 2 ranges", walks, s.Passes)
		}
		for i := range 10_000 { // more than the last range holds
			for _, m := range []*memTable{a, b} {
				m.set(fmt.Sprintf("9%07d", i), "v")
			}
		}
		b.set("90000000", "corrupt")
		elapse(4 * time.Minute)
		if got := found(w); !slices.Equal(got, []string{"m.t 1"}) || walks <= 2 {
			t.Errorf("found %v, the index was walked %d times", got, walks)
		}
	})
}

func TestWatchGoesSlowerWhereTheShareIsNotEnough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := memPairOf(4_000)
		side, worked := costly(newMem("b", b), 7500*time.Microsecond) // 30 s a pass: 10 % of a core
		w := watching(t, WatchConfig{A: newMem("a", a), B: side, Period: 5 * time.Minute, CPU: 0.02})
		elapse(5 * time.Hour)
		if share := worked().Seconds() / (5 * 3600); share > 0.022 || share < 0.018 {
			t.Errorf("it took %.4f of a core for %d passes", share, w.Status().Passes)
		}
	})
}

func TestWatchTellsRowsInFlightFromDifferences(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := memPairOf(10_000)
		settles := 0
		w := watching(t, WatchConfig{A: newMem("a", a), B: newMem("b", b), Period: time.Minute, Settle: func(context.Context) error {
			settles++
			b.set("0000007", fmt.Sprint("written ", settles)) // a client never rests
			b.set("0000100", "late")                          // arrives
			return nil
		}})
		a.set("0000100", "late")
		a.set("0000007", "written")
		a.set("0005000", "real")
		elapse(time.Minute)
		if f := w.Status().Found; len(f) != 1 || f[0].Rows != 1 || f[0].Key[0] != "0005000" || settles < 2 {
			t.Errorf("%+v after %d settlings", f, settles)
		}
	})
}

func TestWatchPausesAndSurvivesErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := memPairOf(1000)
		var mu sync.Mutex
		why, broken := "not connected to b", false
		side := newMem("b", b)
		hash := side.hash
		side.hash = func(t Table, r Range, n int) (Sum, error) {
			mu.Lock()
			defer mu.Unlock()
			if why != "" {
				return Sum{}, errors.New("it was asked although there is no calm")
			}
			if broken {
				return Sum{}, withHint(errors.New("link broke"), "wait")
			}
			return hash(t, r, n)
		}
		w := watching(t, WatchConfig{A: newMem("a", a), B: side, Period: time.Minute, Calm: func() string { mu.Lock(); defer mu.Unlock(); return why }})
		set := func(reason string, b bool) { mu.Lock(); defer mu.Unlock(); why, broken = reason, b }
		b.set("0000001", "corrupt")
		elapse(10 * time.Minute)
		if s := w.Status(); s.State != WatchPaused || s.Reason != "not connected to b" || s.Passes != 0 || s.Problem != "" {
			t.Errorf("%+v", s)
		}
		set("", true)
		elapse(time.Minute)
		if s := w.Status(); s.State != WatchRunning || s.Problem != "link broke" || s.Hint != "wait" {
			t.Errorf("%+v", s)
		}
		set("", false)
		elapse(time.Minute)
		if s := w.Status(); s.Problem != "" || !slices.Equal(found(w), []string{"m.t 1"}) {
			t.Errorf("%+v", s)
		}
	})
}

func TestWatchBoundsWhatItRemembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := memPairOf(20_000)
		for i := range 5000 {
			b.set(fmt.Sprintf("%07d", i), "")
		}
		w := watching(t, WatchConfig{A: newMem("a", a), B: newMem("b", b), Period: time.Minute})
		elapse(2 * time.Minute)
		if f := w.Status().Found; len(f) != 1 || f[0].Rows != foundMax || !f[0].More {
			t.Errorf("%+v", f)
		}
		for i := range 5000 {
			b.set(fmt.Sprintf("%07d", i), "v")
		}
		elapse(2 * time.Minute)
		if f := w.Status().Found; len(f) != 0 {
			t.Errorf("%+v", f)
		}
	})
}

func TestWatchComparesTablesWithoutOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, keyed := range []bool{true, false} {
			a, b := memPairOf(3000)
			a.order, b.order = "", ""
			if !keyed {
				for _, m := range []*memTable{a, b} {
					m.keyed, m.data, m.heap = false, nil, []string{"x", "x", "y"}
				}
				b.heap = b.heap[1:]
			} else {
				a.set("0000007", "")
			}
			w := watching(t, WatchConfig{A: newMem("a", a), B: newMem("b", b), Period: time.Minute})
			elapse(time.Minute)
			if got := found(w); !slices.Equal(got, []string{"m.t 1"}) {
				t.Errorf("keyed %t: %v", keyed, got)
			}
		}
	})
}
