package main

import (
	"fmt"
	"slices"
	"strings"
)

// report is the table of one round trip and which aims hold in it.
func report(rtt int, clients []int, fsync float64, results map[cell][]sample) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n### Round trip %d ms (fsync %.2f ms)\n\n", rtt, fsync)
	fmt.Fprintln(&b, "| system | clients | p50 ms | p99 ms | tx/s | p50 - local p50, ms | tx/s by native logical | tx/s by physical |")
	fmt.Fprintln(&b, "| --- | --- | --- | --- | --- | --- | --- | --- |")
	var aims []string
	for _, n := range clients {
		m := map[string]sample{}
		for _, name := range names {
			m[name] = median(results[cell{rtt, n, name}])
		}
		for _, name := range names {
			s, count := m[name], fmt.Sprint(n)
			if name == bothWays {
				count = fmt.Sprintf("%d + %d", n, n)
			}
			fmt.Fprintf(&b, "| %s | %s | %.2f | %.2f | %.0f | %+.2f | %.2fx | %.2fx |\n", name, count, s.p50, s.p99, s.tps,
				s.p50-m[local].p50, s.tps/m[native].tps, s.tps/m[physical].tps)
		}
		aims = append(aims, judge(rtt, n, fsync, m)...)
		aims = append(aims, unwaited(rtt, n, m)...)
	}
	fmt.Fprintf(&b, "\nAims, for %s:\n\n%s", oneWay, strings.Join(aims, ""))
	return b.String()
}

// manyClients is from how many on duri is to beat native replication's latency: its worker flushes one by one.
const manyClients = 8

// judge says which aims hold with n clients.
func judge(rtt, n int, fsync float64, m map[string]sample) []string {
	const beyond, ofNative, ofPhysical = 1.0, 1.0, 0.8
	var lines []string
	say := func(holds bool, format string, args ...any) {
		verdict := "**missed**"
		if holds {
			verdict = "holds"
		}
		lines = append(lines, fmt.Sprintf("* %s, %d clients: ", verdict, n)+fmt.Sprintf(format, args...)+"\n")
	}
	duri := m[oneWay]
	most := m[local].p50 + float64(rtt) + fsync + beyond
	say(duri.p50 <= most, "p50 %.2f ms, at most local %.2f + round trip %d + fsync %.2f + %.0f = %.2f ms", duri.p50, m[local].p50, rtt, fsync, beyond, most)
	if n >= manyClients {
		say(duri.p50 <= m[native].p50, "p50 %.2f ms, at most native logical's %.2f ms", duri.p50, m[native].p50)
	}
	say(duri.tps >= ofNative*m[native].tps, "%.2f times native logical's tx/s, at least %.1f", duri.tps/m[native].tps, ofNative)
	say(duri.tps >= ofPhysical*m[physical].tps, "%.2f times physical's tx/s, at least %.1f", duri.tps/m[physical].tps, ofPhysical)
	return lines
}

// unwaited names the systems in which a commit was faster than the round trip, which it cannot be when it waits for the
// second site.
func unwaited(rtt, n int, m map[string]sample) []string {
	var lines []string
	for _, name := range names {
		if name != local && m[name].least < float64(rtt) {
			lines = append(lines, fmt.Sprintf("* **%s, %d clients, did not wait for the second site**: the fastest commit took %.2f ms\n", name, n, m[name].least))
		}
	}
	return lines
}

// median is that of each figure by itself; of the fastest commits, the fastest.
func median(runs []sample) sample {
	of := func(q float64, f func(sample) float64) float64 {
		var v []float64
		for _, s := range runs {
			v = append(v, f(s))
		}
		slices.Sort(v)
		return quantile(v, q)
	}
	return sample{
		p50:   of(0.5, func(s sample) float64 { return s.p50 }),
		p99:   of(0.5, func(s sample) float64 { return s.p99 }),
		least: of(0, func(s sample) float64 { return s.least }),
		tps:   of(0.5, func(s sample) float64 { return s.tps }),
	}
}
