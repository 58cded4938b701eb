package twoway

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/internal/pg"
)

// markTable is where each site writes a row that the other waits for: every system here hands over what one site
// committed in the order in which it was committed, so what came before the row is there with it.
const markTable = "CREATE TABLE mark (id int PRIMARY KEY)"

const (
	// askEvery is how often a site is asked whether a mark is there.
	askEvery = 5 * time.Millisecond
	// stuckAfter is how long a system may fail before it is asked whether it will ever go on.
	stuckAfter = 10 * time.Second
)

// catchUp writes a mark at both sites and waits until each has the other's. The duration counts from since; when it
// takes too long, or the system says that it is stuck, Result.Stalled says why.
func (r *run) catchUp(ctx context.Context, since time.Time) (time.Duration, error) {
	r.marks++
	sites := r.system.Sites()
	for i, s := range sites {
		if err := s.Cluster.Exec(ctx, s.Database, fmt.Sprintf("INSERT INTO mark VALUES (%d)", 2*r.marks+i)); err != nil {
			return 0, err
		}
	}
	wait, cancel := context.WithTimeoutCause(ctx, r.o.Wait, fmt.Errorf("not caught up within %s", r.o.Wait))
	defer cancel()
	g, gctx := errgroup.WithContext(wait)
	for i, s := range sites {
		g.Go(func() error { return r.awaitMark(gctx, s, 2*r.marks+1-i) })
	}
	err := g.Wait()
	switch {
	case err == nil:
		return time.Since(since), nil
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case wait.Err() != nil:
		r.res.Stalled = context.Cause(wait).Error()
		return 0, nil
	}
	if stuck, ok := errors.AsType[stuckError](err); ok {
		r.res.Stalled = string(stuck)
		return 0, nil
	}
	return 0, err
}

// stuckError is a System's reason why it will not go on.
type stuckError string

func (e stuckError) Error() string { return string(e) }

// awaitMark waits until a mark is visible at a site. One session asks, and holds no snapshot between two questions.
func (r *run) awaitMark(ctx context.Context, s Site, mark int) error {
	c, err := pg.Connect(ctx, s.Cluster.DSN(s.Database, ""), "", nil)
	if err != nil {
		return err
	}
	defer pg.Close(c)
	errorsBefore, err := r.system.Errors(ctx)
	if err != nil {
		return err
	}
	ask, stuck := time.NewTicker(askEvery), time.NewTicker(stuckAfter)
	defer ask.Stop()
	defer stuck.Stop()
	for {
		rows, err := pg.Rows(ctx, c, fmt.Sprintf("SELECT 1 FROM mark WHERE id = %d", mark))
		if err != nil || len(rows) > 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ask.C:
		case <-stuck.C:
			now, err := r.system.Errors(ctx)
			if err != nil {
				return err
			}
			if reason := r.system.Stuck(now - errorsBefore); reason != "" {
				return stuckError(reason)
			}
			errorsBefore = now
		}
	}
}
