package demo

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
)

// loadSpec describes the ledger's clients.
type loadSpec struct {
	names   [2]string // of the sites
	dsns    [2]string // at which each site's clients connect
	clients int       // per site
	rate    int       // payments per second and site
	dir     string    // of the records
	seed    uint64
}

// load is all clients of the ledger, running.
type load struct {
	tally   tally
	clients []*client
	stopped chan struct{}
	group   *errgroup.Group
}

// startLoad starts the clients: ids from 1, those of site A first. The caller stops them.
func startLoad(ctx context.Context, s loadSpec) (*load, error) {
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return nil, err
	}
	l := &load{stopped: make(chan struct{})}
	places := governments()
	for id := 1; id <= 2*s.clients; id++ {
		record, err := newRecorder(s.dir, id)
		if err != nil {
			return nil, errors.Join(err, l.closeRecords())
		}
		home := (id - 1) / s.clients
		c := &client{
			id: id, home: home, dsn: s.dsns[home], names: s.names, record: record, tally: &l.tally,
			interval: time.Duration(s.clients) * time.Second / time.Duration(s.rate),
			rng:      rand.New(rand.NewPCG(s.seed, uint64(id))), places: places,
		}
		c.current.Store(int32(home))
		l.clients = append(l.clients, c)
	}
	l.group, ctx = errgroup.WithContext(ctx)
	for _, c := range l.clients {
		l.group.Go(func() error { return c.run(ctx, l.stopped) })
	}
	return l, nil
}

// stop lets every client finish its payment, and closes the records. It must be called once.
func (l *load) stop() error {
	close(l.stopped)
	err := l.group.Wait()
	if cerr := l.closeRecords(); err == nil {
		err = cerr
	}
	return err
}

func (l *load) closeRecords() error {
	var first error
	for _, c := range l.clients {
		if err := c.record.close(); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// awayFrom tells when each client of a home site first got a payment acknowledged elsewhere, and whether all did.
func (l *load) awayFrom(home int) (times []time.Time, all bool) {
	all = true
	for _, c := range l.clients {
		if c.home != home {
			continue
		}
		if ns := c.away.Load(); ns != 0 {
			times = append(times, time.Unix(0, ns))
		} else {
			all = false
		}
	}
	return times, all
}

// allAt reports whether every client of a home site was last served there.
func (l *load) allAt(home int) bool {
	for _, c := range l.clients {
		if c.home == home && int(c.current.Load()) != home {
			return false
		}
	}
	return true
}

// stalls are, for each client, the longest time for which it was without an answer around a time of trouble; see stallOf.
func (l *load) stalls(from, to time.Time) (all []time.Duration) {
	for _, c := range l.clients {
		all = append(all, stallOf(c.waits.all(time.Now()), from, to))
	}
	return all
}

// waitingNow is for how long the client has waited that waits longest.
func (l *load) waitingNow(now time.Time) (longest time.Duration) {
	for _, c := range l.clients {
		c.waits.mu.Lock()
		if !c.waits.since.IsZero() {
			longest = max(longest, now.Sub(c.waits.since))
		}
		c.waits.mu.Unlock()
	}
	return longest
}
