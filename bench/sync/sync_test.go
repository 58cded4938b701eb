package main

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/internal/pair"
)

func TestLogIsReadWithoutTheWarmUp(t *testing.T) {
	at := func(s, us int64) time.Time { return time.Unix(s, us*1000) }
	log := []pair.Logged{
		{At: at(1700000000, 500000), Latency: 90 * time.Millisecond},
		{At: at(1700000001, 600000), Latency: time.Millisecond},
		{At: at(1700000002, 500000), Latency: 3 * time.Millisecond},
	}
	got, err := summarize([][]pair.Logged{log, log}) // two sites
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sample{p50: 1, p99: 3, least: 1, tps: 4}, got, cmp.AllowUnexported(sample{})); diff != "" {
		t.Error(diff)
	}
}

func TestWhatIsNoFigureIsAnError(t *testing.T) {
	for _, logs := range [][][]pair.Logged{{nil}, {{{At: time.Unix(1, 0)}}}} {
		if s, err := summarize(logs); err == nil {
			t.Errorf("%v out of nothing", s)
		}
	}
}

func TestQuantilesAreValues(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(i + 1)
	}
	for _, c := range []struct {
		of      []float64
		q, want float64
	}{{hundred, 0.5, 50}, {hundred, 0.99, 99}, {[]float64{1, 2, 3}, 0.5, 2}, {[]float64{7}, 0.99, 7}, {[]float64{7}, 0.5, 7}} {
		if got := quantile(c.of, c.q); got != c.want {
			t.Errorf("%v of %d values: %v, want %v", c.q, len(c.of), got, c.want)
		}
	}
}

func TestReportJudgesMediansOfOneWay(t *testing.T) {
	results := map[cell][]sample{
		{5, 8, local}:    {{1, 2, 0.5, 8000}, {1, 2, 0.5, 8000}, {9, 9, 9, 1}},
		{5, 8, native}:   {{8, 12, 6, 1000}},
		{5, 8, physical}: {{7, 9, 5, 1200}},
		{5, 8, oneWay}:   {{7.5, 10, 5.5, 900}},
		{5, 8, bothWays}: {{9, 20, 4.9, 1600}},
	}
	const want = `
### Round trip 5 ms (fsync 0.40 ms)

| system | clients | p50 ms | p99 ms | tx/s | p50 - local p50, ms | tx/s by native logical | tx/s by physical |
| --- | --- | --- | --- | --- | --- | --- | --- |
| local | 8 | 1.00 | 2.00 | 8000 | +0.00 | 8.00x | 6.67x |
| native logical | 8 | 8.00 | 12.00 | 1000 | +7.00 | 1.00x | 0.83x |
| physical | 8 | 7.00 | 9.00 | 1200 | +6.00 | 1.20x | 1.00x |
| duri, one way | 8 | 7.50 | 10.00 | 900 | +6.50 | 0.90x | 0.75x |
| duri, both ways | 8 + 8 | 9.00 | 20.00 | 1600 | +8.00 | 1.60x | 1.33x |

Aims, for duri, one way:

* **missed**, 8 clients: p50 7.50 ms, at most local 1.00 + round trip 5 + fsync 0.40 + 1 = 7.40 ms
* holds, 8 clients: p50 7.50 ms, at most native logical's 8.00 ms
* **missed**, 8 clients: 0.90 times native logical's tx/s, at least 1.0
* **missed**, 8 clients: 0.75 times physical's tx/s, at least 0.8
* **duri, both ways, 8 clients, did not wait for the second site**: the fastest commit took 4.90 ms
`
	if diff := cmp.Diff(want, report(5, []int{8}, 0.4, results)); diff != "" {
		t.Error(diff)
	}
}

func TestListsAreFlags(t *testing.T) {
	var l list
	if err := l.Set("0,5,20"); err != nil || l.String() != "0,5,20" {
		t.Errorf("%v is %q, %v", []int(l), l.String(), err)
	}
	for _, s := range []string{"", "1,", "x", "-1"} {
		if err := l.Set(s); err == nil {
			t.Errorf("%q is a list", s)
		}
	}
}
