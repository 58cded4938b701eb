// Package tpcb proves convergence with input that nobody here wrote: pgbench. An existing pgbench database at site A
// joins as the first site, B joins empty, then pgbench runs TPC-B against both sites at once on the same keys, while
// the agents may be killed at random; at the end the sites must be equal and the history, a table without a key, must
// hold every transaction exactly once.
package tpcb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/server"
)

// Options of a run.
type Options struct {
	Binary  string
	BinDir  string
	Seconds int
	Clients int // of each site
	Scale   int
	Kills   int // how often both agents are killed (-9) at random moments
	Seed    uint64
	Out     io.Writer // progress
	Fsync   bool
}

// Result of a run.
type Result struct {
	Transactions [2]int // committed by pgbench at each site
	Failed       [2]int // transactions that pgbench gave up on
	History      [2]int // rows of pgbench_history at each site
	Conflicts    int64
	CaughtUp     time.Duration // from the end of the load until both sites had applied everything
	Verify       time.Duration
	Rows         int64
}

// Run makes everything, runs, checks and removes everything. An error means that the proof failed.
func Run(ctx context.Context, o Options) (res Result, err error) {
	fsync := "off"
	if o.Fsync {
		fsync = "on"
	}
	p, err := pair.Start(ctx, pair.Options{
		Binary: o.Binary, BinDir: o.BinDir, Settings: map[string]string{"fsync": fsync, "shared_buffers": "256MB"},
		Seed: func(ctx context.Context, a *pair.Site) error {
			_, err := pair.Pgbench(ctx, a.Cluster, a.Database, "-i", "-q", "-s", strconv.Itoa(o.Scale))
			return err
		},
	})
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	if err := within(ctx, 3*time.Minute, p.WaitReady); err != nil {
		return res, err
	}
	fmt.Fprintf(o.Out, "site a joined with an existing pgbench database (scale %d), site b copied it; writing at both for %d s, %d kills, seed %d\n", o.Scale, o.Seconds, o.Kills, o.Seed)
	if err := load(ctx, p, o, &res); err != nil {
		return res, err
	}
	end := time.Now()
	if err := within(ctx, 3*time.Minute, p.WaitApplied); err != nil {
		return res, err
	}
	res.CaughtUp = time.Since(end)
	return res, check(ctx, p, &res)
}

func within(ctx context.Context, d time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return f(ctx)
}

// load runs pgbench at both sites side by side, and the kills.
func load(ctx context.Context, p *pair.Pair, o Options, res *Result) error {
	g, ctx := errgroup.WithContext(ctx)
	for i, s := range p.Sites {
		g.Go(func() error {
			out, err := pair.Pgbench(ctx, s.Cluster, s.Database, "-n", "-c", strconv.Itoa(o.Clients), "-j", "1", "-T", strconv.Itoa(o.Seconds),
				"--max-tries=1000", "--random-seed="+strconv.FormatUint(o.Seed+uint64(i), 10))
			if err != nil {
				return fmt.Errorf("site %s: %w", s.Name, err)
			}
			res.Transactions[i], res.Failed[i] = pair.PgbenchCounts(out)
			fmt.Fprintf(o.Out, "site %s: %d transactions, %d failed\n", s.Name, res.Transactions[i], res.Failed[i])
			return nil
		})
	}
	g.Go(func() error { return kill(ctx, p, o) })
	return g.Wait()
}

// kill ends both agents with SIGKILL at random moments of the run and starts them again.
func kill(ctx context.Context, p *pair.Pair, o Options) error {
	rnd := rand.New(rand.NewPCG(o.Seed, 1))
	slot := time.Duration(o.Seconds) * time.Second / time.Duration(o.Kills+1)
	for i := range o.Kills {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(slot/2 + time.Duration(rnd.Int64N(int64(slot)))/2):
		}
		for _, j := range rnd.Perm(len(p.Sites)) {
			if err := p.Sites[j].SignalAgent(syscall.SIGKILL); err != nil {
				return err
			}
		}
		for _, s := range p.Sites {
			if err := s.StartAgent(); err != nil {
				return err
			}
		}
		fmt.Fprintf(o.Out, "killed both agents (%d of %d)\n", i+1, o.Kills)
	}
	return nil
}

// check asks duri's verify and, besides, counts the history against what pgbench says it committed.
func check(ctx context.Context, p *pair.Pair, res *Result) error {
	start := time.Now()
	rep, err := p.Sites[0].Control.Verify(ctx, "", server.VerifyRequest{}, nil)
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	res.Verify = time.Since(start)
	for _, t := range rep.Tables {
		res.Rows += t.RowsA
	}
	for i, s := range p.Sites {
		rows, err := s.Cluster.QueryText(ctx, p.Database, "SELECT (SELECT count(*) FROM pgbench_history), (SELECT count(*) FROM duri.conflict WHERE kind <> '')")
		if err != nil {
			return err
		}
		res.History[i], _ = strconv.Atoi(rows[0][0])
		n, _ := strconv.ParseInt(rows[0][1], 10, 64)
		res.Conflicts += n
	}
	want := res.Transactions[0] + res.Transactions[1]
	switch {
	case !rep.Equal:
		return fmt.Errorf("the sites are not equal: %+v", rep)
	case res.Transactions[0] == 0 || res.Transactions[1] == 0:
		return errors.New("pgbench committed nothing at one of the sites")
	case res.History[0] != want || res.History[1] != want:
		return fmt.Errorf("pgbench committed %d transactions, the history has %d rows at a and %d at b", want, res.History[0], res.History[1])
	}
	return nil
}
