package demo

import (
	"context"
	"slices"
	"strings"
	"time"
)

// displayEvery is how often the panel is drawn, or a line printed.
const displayEvery = time.Second

// display shows the load, once there is one, until ctx ends.
func (d *demo) display(ctx context.Context) error {
	t := time.NewTicker(displayEvery)
	defer t.Stop()
	var last glance
	at := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-t.C:
			if g, ok := d.glance(last, now.Sub(at)); ok {
				d.screen.show(g.panel(), g.line())
				last, at = g, now
			}
		}
	}
}

// glance looks at everything; rates are since the last look. Without a load there is nothing to see.
func (d *demo) glance(last glance, since time.Duration) (glance, bool) {
	d.mu.Lock()
	l, phase, killAt := d.load, d.phase, d.killAt
	d.mu.Unlock()
	if l == nil {
		return glance{}, false
	}
	g := glance{phase: phase, inDoubt: l.tally.inDoubt.Load()}
	if text := l.tally.latest.Load(); text != nil {
		g.latest = *text
	}
	for i, s := range d.sites {
		v := s.watcher.view()
		g.names[i], g.up[i] = s.label(), v.fresh()
		g.acknowledged[i] = l.tally.acknowledged[i].Load()
		g.rate[i] = float64(g.acknowledged[i]-last.acknowledged[i]) / since.Seconds()
		if link, ok := v.link(); ok {
			g.linked[i] = link.Connected
			g.lag[i], g.behind[i], g.conflicts[i] = link.LagS, link.LagBytes, link.Apply.Conflicts
		}
	}
	for i, w := range d.gateways {
		v := w.watcher.view()
		one := gatewayGlance{name: w.name, up: v.fresh(), waiting: v.waiting}
		for site, n := range v.sessions {
			if at := slices.Index(siteNames[:], site); at >= 0 {
				one.at[at] += n
			} else {
				one.elsewhere += n
			}
		}
		g.gateways[i] = one
	}
	g.clients = d.clientGlance(l, phase, killAt)
	return g, true
}

func (d *demo) clientGlance(l *load, phase string, killAt time.Time) clientGlance {
	now := time.Now()
	c := clientGlance{errors: l.tally.errors.Load(), retries: l.tally.retries.Load(), killed: !killAt.IsZero(), now: l.waitingNow(now)}
	if c.killed {
		c.stall = percentile(l.stalls(killAt, d.stallsUntil(now)), 1)
	}
	if phase == downPhase {
		c.dead = d.sites[0].label()
	}
	return c
}

// shellCommand writes a command so that a shell reads it back.
func shellCommand(words ...string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = w
		if w == "" || strings.ContainsFunc(w, func(r rune) bool { return !strings.ContainsRune(plain, r) }) {
			quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
	}
	return strings.Join(quoted, " ")
}

// plain are the characters that a shell leaves alone.
const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:=@%+,"
