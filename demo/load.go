package demo

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// loadSpec describes the ledger's clients.
type loadSpec struct {
	sites   [2]endpoint
	clients int    // per site
	rate    int    // payments per second and site
	dir     string // of the records
	seed    uint64
}

// load is all clients of the ledger, running.
type load struct {
	tally   tally
	clients []*client
	ready   [2]atomic.Bool // whether a site takes its clients back
	stopped chan struct{}
	group   *errgroup.Group
}

// startLoad starts the clients: ids from 1, those of site A first. The caller stops them.
func startLoad(ctx context.Context, s loadSpec) (*load, error) {
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return nil, err
	}
	l := &load{stopped: make(chan struct{})}
	l.ready[0].Store(true)
	l.ready[1].Store(true)
	places := governments()
	for id := 1; id <= 2*s.clients; id++ {
		record, err := newRecorder(s.dir, id)
		if err != nil {
			return nil, errors.Join(err, l.closeRecords())
		}
		home := (id - 1) / s.clients
		l.clients = append(l.clients, &client{
			id: id, home: home, at: home, sites: s.sites, record: record, tally: &l.tally, homeReady: l.ready[home].Load,
			interval: time.Duration(s.clients) * time.Second / time.Duration(s.rate),
			rng:      rand.New(rand.NewPCG(s.seed, uint64(id))), places: places,
		})
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
