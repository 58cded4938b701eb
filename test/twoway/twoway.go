// Package twoway is the test that last-writer-wins replication fails when it forgets deletes: clients upsert and delete
// the same few keys at both sites of a link with some delay, undisturbed and with the link cut for a while. Afterwards,
// when each site has all that the other committed, the keys that differ are counted by a judge that is no part of any
// system: the text of a dump. pgbench's TPC-B on the same keys is the second load; there, besides, every balance must be
// the sum of its history.
//
// duri runs beside PostgreSQL's own logical replication and pglogical, each in its own fresh clusters, through the same
// relays, under the same load. Package main in test/prove/twoway prints the tables; test/e2e runs a short form.
package twoway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/internal/pgcluster"
)

// Options of a run. The zero value of a field is no default unless its comment says so.
type Options struct {
	Binary  string        // the duri program; see pair.Build
	Length  time.Duration // length of the load
	Clients int           // of each site
	Keys    int           // of the upserts and deletes
	Scale   int           // of pgbench
	// RoundTrip is added to every link, half of it each way; 0: none.
	RoundTrip time.Duration
	// Rate bounds the transactions a second at each site; 0: as many as its clients can do, which leaves apply what they
	// leave of the processors.
	Rate float64
	// Cut is how long the link is cut; 0: not at all. It is cut in the middle of the load, which goes on afterwards, or
	// with Last at its end, so that what was written meanwhile is exchanged without further load.
	Cut  time.Duration
	Last bool
	// Delta declares the balances of TPC-B as delta columns, for duri.
	Delta bool
	// Reset makes the cut end all connections and refuse new ones, as the death of a router's other side would. Without
	// it nothing passes and nobody is told.
	Reset bool
	Wait  time.Duration // for catching up; afterwards the system counts as not caught up
	Fsync bool          // of the servers
	Seed  uint64
	// Clusters are the servers of duri's sites, which are left alone; nil: new ones.
	Clusters []*pgcluster.Cluster
	// Evidence is a folder for both agents' journals when duri's sites differ; empty: they are not kept.
	Evidence string
	Out      io.Writer // progress
}

// Result of one system under one load.
type Result struct {
	System string
	Load   string // see Loads
	Cut    time.Duration
	Last   bool
	Counts [2]Counts
	Length time.Duration // of the load
	// Healed is the time from the healing of the link until each site had what the other had committed by then (while the
	// load went on, unless Last); Ended the same from the end of the load. Zero with a reason in Stalled.
	Healed, Ended time.Duration
	// Stalled says why a site did not catch up; empty when both did.
	Stalled   string
	Differing map[string]int // keys (rows of a table without a key) that differ between the sites, by table
	Examples  []string       // some of them, with both sites' rows
	Of        int            // keys that there may be, 0 when that is not bounded
	Wrong     [2][]Wrong     // balances that are not the sum of their history, by site; TPC-B only
	Conflicts int64          // that the system reported at both sites; -1: it reports none
	Errors    int64          // of replication: messages of the servers' logs, retried batches of duri
	Verify    string         // what the system's own comparison says; empty: it has none
}

// Different is how many keys differ in all tables.
func (r Result) Different() int {
	n := 0
	for _, d := range r.Differing {
		n += d
	}
	return n
}

// Replicated is how many row changes a second each site took from the other and gave to it, until both had caught up;
// 0 when they did not.
func (r Result) Replicated() float64 {
	if r.Stalled != "" {
		return 0
	}
	return float64(r.Counts[0].Changes+r.Counts[1].Changes) / (r.Length + r.Ended).Seconds()
}

// Run runs one system under one load and removes everything. An error means that there is no result, not that the
// result is bad; ErrNotInstalled is one.
func Run(ctx context.Context, o Options, system, load string) (_ Result, err error) {
	w, err := newLoad(load, o)
	if err != nil {
		return Result{}, err
	}
	s, err := start(ctx, o, system, w)
	if err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	r := &run{o: o, system: s, load: w, res: Result{System: s.Name(), Load: load, Cut: o.Cut, Last: o.Last, Of: w.size()}}
	if err := r.measure(ctx); err != nil {
		return Result{}, fmt.Errorf("%s: %w", s.Name(), err)
	}
	return r.res, r.judge(ctx)
}

// run is a Run under way.
type run struct {
	o      Options
	system System
	load   load
	res    Result
	marks  int
	healed time.Time // when the last cut ended
}

func (r *run) say(format string, args ...any) {
	fmt.Fprintf(r.o.Out, "  %s: %s\n", r.system.Name(), fmt.Sprintf(format, args...))
}

// measure runs the load, and the cut in its middle, and waits until the sites have caught up.
func (r *run) measure(ctx context.Context) error {
	for _, l := range r.system.Relays() {
		l.Delay(r.o.RoundTrip / 2)
	}
	// The delay is in force before the first write, and the way there and back is warm.
	if _, err := r.catchUp(ctx, time.Now()); err != nil || r.res.Stalled != "" {
		return errors.Join(err, stalledError(r.res.Stalled))
	}
	errorsBefore, err := r.system.Errors(ctx)
	if err != nil {
		return err
	}
	begin := time.Now()
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		r.res.Counts, err = r.load.run(gctx, r.system.Sites(), r.say)
		r.res.Length = time.Since(begin)
		return err
	})
	if r.o.Cut > 0 {
		g.Go(func() (err error) { r.res.Healed, err = r.cut(gctx); return err })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	r.say("load ended: %d + %d transactions in %.1f s, %d + %d refused by the servers", r.res.Counts[0].Transactions,
		r.res.Counts[1].Transactions, r.res.Length.Seconds(), r.res.Counts[0].Refused, r.res.Counts[1].Refused)
	if r.res.Stalled == "" {
		if err := r.end(ctx, begin); err != nil {
			return err
		}
	}
	if r.res.Stalled != "" {
		r.say("STALLED: %s", r.res.Stalled)
	} else {
		r.say("caught up %.2f s after the load", r.res.Ended.Seconds())
	}
	errorsAfter, err := r.system.Errors(ctx)
	r.res.Errors = errorsAfter - errorsBefore
	return err
}

// stalledError makes an error of a reason.
func stalledError(reason string) error {
	if reason == "" {
		return nil
	}
	return fmt.Errorf("replication does not begin: %s", reason)
}

// end waits until both sites have everything.
func (r *run) end(ctx context.Context, begin time.Time) error {
	end := begin.Add(r.res.Length)
	d, err := r.catchUp(ctx, end)
	r.res.Ended = d
	if r.o.Last && r.o.Cut > 0 && d > 0 {
		r.res.Healed = d + end.Sub(r.healed)
	}
	return err
}

// cut cuts and heals the link. If that is in the middle of the load, it also measures how long both sites then take to
// have what was committed by then. At its end it does not wait for the clients: one may wait for a row that apply has
// locked, and apply for the rest of a transaction that the cut has kept from it.
func (r *run) cut(ctx context.Context) (time.Duration, error) {
	before := (r.o.Length - r.o.Cut) / 2
	if r.o.Last {
		before = r.o.Length - r.o.Cut
	}
	if !pause(ctx, before) {
		return 0, nil // the load ended with an error, which is the one to report
	}
	for _, l := range r.system.Relays() {
		if l.Cut(); r.o.Reset {
			l.Refuse()
			l.Reset()
		}
	}
	r.say("link cut")
	if !pause(ctx, r.o.Cut) {
		return 0, nil
	}
	for _, l := range r.system.Relays() {
		l.Heal()
	}
	r.healed = time.Now()
	r.say("link healed")
	if r.o.Last {
		return 0, nil
	}
	d, err := r.catchUp(ctx, r.healed)
	if err == nil && r.res.Stalled == "" {
		r.say("caught up %.2f s after healing, under load", d.Seconds())
	}
	return d, err
}

// pause waits; false when ctx ended before.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// judge compares the sites and asks the system what it has to say.
func (r *run) judge(ctx context.Context) error {
	if err := r.compare(ctx); err != nil {
		return err
	}
	for i, s := range r.system.Sites() {
		wrong, err := r.load.check(ctx, s)
		if err != nil {
			return err
		}
		r.res.Wrong[i] = wrong
	}
	var err error
	if r.res.Conflicts, err = r.system.Conflicts(ctx); err != nil {
		return err
	}
	if r.res.Verify, err = r.system.Verify(ctx); err != nil {
		return err
	}
	r.say("%d keys differ, %d conflicts, %d errors", r.res.Different(), r.res.Conflicts, r.res.Errors)
	if r.res.Different() > 0 && r.res.Stalled == "" {
		return r.system.Explain(ctx, r.res.Examples, r.o.Out)
	}
	return nil
}
