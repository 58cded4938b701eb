package demo

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/internal/pg"
)

// tail follows the payments that A acknowledged and that had not reached B when A died, until they are at B.
type tail struct {
	killAt time.Time

	mu      sync.Mutex // guards the rest
	found   int
	missing []string // ids that are not at B yet
	at      time.Time
}

// done reports that all are at B.
func (t *tail) done() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.missing) == 0
}

// result gives how many there were, and for how many milliseconds after the kill.
func (t *tail) result() (payments int, milliseconds int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.found == 0 || t.at.IsZero() {
		return t.found, 0
	}
	return t.found, t.at.Sub(t.killAt).Milliseconds()
}

// tailEvery is how often B is asked for them.
const tailEvery = 100 * time.Millisecond

// startTail finds the tail and starts the goroutine that follows it. All clients of A have gone on at B, so their records
// of A are complete. B may still hold received transactions that it has not applied: these did reach it.
func (d *demo) startTail(ctx context.Context, g *errgroup.Group) error {
	b := d.sites[1]
	b.watcher.ask(ctx)
	// A hold-up here is no failure: at worst the tail is counted longer than it was.
	_ = d.until(ctx, drainMax, "B has applied what it received", func() bool {
		l, ok := b.watcher.view().link()
		return ok && l.Apply.Applied >= l.Received.End
	})
	records, err := readRecords(d.records)
	if err != nil {
		return err
	}
	var ids []string
	for _, e := range records {
		if e.site == siteNames[0] && e.outcome == committed {
			ids = append(ids, e.id)
		}
	}
	d.tail = &tail{killAt: d.rep.KillAt, missing: ids}
	if err := d.tail.look(ctx, b); err != nil {
		return err
	}
	d.tail.mu.Lock()
	d.tail.found = len(d.tail.missing)
	d.tail.mu.Unlock()
	d.screen.say("%s acknowledged by A, %s of them not yet at B", count(len(ids), "payment"), fmt.Sprint(d.tail.found))
	g.Go(func() error { return d.tail.follow(ctx, b) })
	return nil
}

// look asks B once.
func (t *tail) look(ctx context.Context, b *site) error {
	c, err := b.connect(ctx)
	if err != nil {
		return err
	}
	defer pg.Close(c)
	t.mu.Lock()
	missing := t.missing
	t.mu.Unlock()
	there, err := present(ctx, c, missing)
	if err != nil {
		return fmt.Errorf("look for A's last payments at B: %w", err)
	}
	var left []string
	for _, id := range missing {
		if !there[id] {
			left = append(left, id)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.missing = left
	if len(left) == 0 {
		t.at = time.Now()
	}
	return nil
}

// follow asks B until all are there.
func (t *tail) follow(ctx context.Context, b *site) error {
	for !t.done() {
		if pause(ctx, tailEvery) != nil {
			return nil
		}
		if err := t.look(ctx, b); err != nil && ctx.Err() == nil {
			return err
		}
	}
	return nil
}
