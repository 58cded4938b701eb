package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/internal/pair"
)

// sample is what one load showed: latencies in ms, and transactions per second at all sites together.
type sample struct{ p50, p99, least, tps float64 }

// warmUp is the part of a load that does not count: connections, plans, the first extension of files.
const warmUp = time.Second

// load runs pgbench at each site that has clients, all at the same time.
func (b *bench) load(ctx context.Context, s *system, clients int) (sample, error) {
	b.loads++
	seconds := int((b.time + warmUp).Round(time.Second).Seconds())
	// A commit whose standby is gone waits for ever, and pgbench with it.
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds)*time.Second+waitMax)
	defer cancel()
	var g errgroup.Group
	logs := make([][]pair.Logged, len(s.writers))
	for i, c := range s.writers {
		prefix := filepath.Join(b.dir, fmt.Sprintf("log-%d-%d", b.loads, i))
		g.Go(func() error {
			_, err := pair.Pgbench(ctx, c, database, "-n", "-M", "prepared", "-f", b.script, "-D", "site="+strconv.Itoa(i),
				"-c", strconv.Itoa(clients), "-T", strconv.Itoa(seconds), "-l", "--log-prefix="+prefix)
			if err != nil {
				return err
			}
			logs[i], err = pair.TakePgbenchLog(prefix)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return sample{}, err
	}
	return summarize(logs)
}

// summarize leaves the warm-up out. The rates of the sites are added up, their latencies are put together.
func summarize(logs [][]pair.Logged) (sample, error) {
	var s sample
	var ms []float64
	for _, log := range logs {
		if len(log) == 0 {
			return s, errors.New("pgbench logged no transaction")
		}
		byEnd := func(a, b pair.Logged) int { return a.At.Compare(b.At) }
		from, to := slices.MinFunc(log, byEnd).At.Add(warmUp), slices.MaxFunc(log, byEnd).At
		before := len(ms)
		for _, c := range log {
			if c.At.After(from) {
				ms = append(ms, float64(c.Latency.Microseconds())/1000)
			}
		}
		if len(ms) == before {
			return s, errors.New("no transaction ended after the warm-up")
		}
		s.tps += float64(len(ms)-before) / to.Sub(from).Seconds()
	}
	slices.Sort(ms)
	s.p50, s.p99, s.least = quantile(ms, 0.50), quantile(ms, 0.99), ms[0]
	return s, nil
}

// quantile is the smallest value that at least the share q of the sorted values does not exceed.
func quantile(sorted []float64, q float64) float64 {
	i := int(q * float64(len(sorted)))
	if float64(i) == q*float64(len(sorted)) {
		i--
	}
	return sorted[min(max(i, 0), len(sorted)-1)]
}

// fsyncTime is the median time, in ms, of writing 8 kB over a part of a file and of fdatasync, as PostgreSQL does with
// its WAL. The folder is on the file system of the servers and journals.
func fsyncTime(dir string) (_ float64, err error) {
	const size, times = 8192, 200
	f, err := os.CreateTemp(dir, "fsync-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	if _, err := f.Write(make([]byte, size*times)); err != nil {
		return 0, err
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	block := []byte(strings.Repeat("duri", size/4))
	ms := make([]float64, times)
	for i := range ms {
		start := time.Now()
		if _, err := f.WriteAt(block, int64(i)*size); err != nil {
			return 0, err
		}
		if err := syscall.Fdatasync(int(f.Fd())); err != nil {
			return 0, err
		}
		ms[i] = float64(time.Since(start).Microseconds()) / 1000
	}
	slices.Sort(ms)
	return quantile(ms, 0.5), nil
}
