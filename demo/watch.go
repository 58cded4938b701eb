package demo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/duri-io/duri/server"
)

// watchEvery is how often an agent is asked for its status.
const watchEvery = 200 * time.Millisecond

// watcher keeps the last status of one agent. view may be called at any time.
type watcher struct {
	site    string
	control *server.Control

	mu   sync.Mutex // guards last
	last view
}

// view is what one agent last said of itself and of the direction towards it.
type view struct {
	asked  time.Time // when the answer was asked for
	err    error     // it did not answer
	status server.DatabaseStatus
}

// fresh reports that the agent answers.
func (v view) fresh() bool {
	return v.err == nil && !v.asked.IsZero() && time.Since(v.asked) < 10*watchEvery
}

// link is the direction towards the site; false as long as there is none.
func (v view) link() (server.LinkStatus, bool) {
	if len(v.status.Links) == 0 {
		return server.LinkStatus{}, false
	}
	return v.status.Links[0], true
}

// ready reports that the database takes part.
func (v view) ready() bool { return v.status.State == "ready" }

// following reports that the site is ready and the link from its peer stands.
func (v view) following() bool {
	l, ok := v.link()
	return v.ready() && ok && l.Connected && l.Apply.LastError == ""
}

// caughtUp reports that the site follows and has applied all that its peer is known to have.
func (v view) caughtUp() bool {
	l, ok := v.link()
	return ok && v.following() && l.LagBytes == 0 && l.Origin > 0
}

// trouble says what the agent itself gives as the reason for not being where it should.
func (v view) trouble() string {
	switch {
	case v.err != nil:
		return v.err.Error()
	case v.asked.IsZero():
		return "it was never asked"
	case v.status.Problem != nil:
		return v.status.Problem.Text
	}
	if l, ok := v.link(); ok && l.Problem != nil {
		return l.Problem.Text
	} else if ok && v.ready() {
		return fmt.Sprintf("%d bytes of WAL behind", l.LagBytes)
	}
	return "its database is " + v.status.State
}

// run asks until ctx ends.
func (w *watcher) run(ctx context.Context) error {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	for {
		w.ask(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// ask asks once. An agent asks its peer in turn, and waits for it up to two seconds.
func (w *watcher) ask(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	v := view{asked: time.Now()}
	s, err := w.control.Status(ctx)
	if v.err = err; err == nil {
		v.status, v.err = pick(s, w.site)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last = v
}

// pick finds the demo's database of a site in a status.
func pick(s server.ClusterStatus, site string) (server.DatabaseStatus, error) {
	i := slices.IndexFunc(s.Sites, func(s server.SiteStatus) bool { return s.Site == site })
	if i < 0 {
		return server.DatabaseStatus{}, errors.New("the status does not hold the site itself")
	}
	for _, d := range s.Sites[i].Databases {
		if d.Name == database {
			return d, nil
		}
	}
	return server.DatabaseStatus{}, fmt.Errorf("the status does not hold database %s", database)
}

func (w *watcher) view() view {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}
