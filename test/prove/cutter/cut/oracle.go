package cut

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/duri-io/duri/pgwire"
)

// expectation is what a script does at PostgreSQL itself, without gateway, segment by segment.
type expectation struct {
	answers []answer
	ledger  [][]int // what is committed after each segment
	params  map[string]string
}

// before is the transaction status before a segment.
func (e *expectation) before(i int) byte {
	if i == 0 {
		return pgwire.Idle
	}
	return e.answers[i-1].status
}

// committed is the ledger before a segment.
func (e *expectation) committed(i int) []int {
	if i == 0 {
		return nil
	}
	return e.ledger[i-1]
}

// failure says that a segment failed by 40001, and which transaction status ReadyForQuery gave after it.
type failure struct {
	segment int
	status  byte
}

// variant is how a script goes when some of its segments fail. What was prepared in such a segment is there afterwards, or not.
type variant struct {
	failures []failure
	keep     bool
}

func (v variant) String() string {
	if len(v.failures) == 0 {
		return ""
	}
	return fmt.Sprint(v.failures, v.keep)
}

// oracle asks PostgreSQL itself what a script would do there.
type oracle struct {
	p *place

	mu    sync.Mutex // guards known
	known map[string]*expectation
}

func newOracle(p *place) *oracle { return &oracle{p: p, known: map[string]*expectation{}} }

// expect gives what is to be expected of a script in a variant; it runs the script if that is not known yet.
func (o *oracle) expect(ctx context.Context, b *bench, s *script, v variant) (*expectation, error) {
	key := s.name + v.String()
	o.mu.Lock()
	e := o.known[key]
	o.mu.Unlock()
	if e != nil {
		return e, nil
	}
	e, err := o.play(ctx, b, s, v)
	if err != nil {
		return nil, fmt.Errorf("script %s at PostgreSQL itself, %s: %w", s.name, v, err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.known[key] = e
	return e, nil
}

func (o *oracle) play(ctx context.Context, b *bench, s *script, v variant) (*expectation, error) {
	number := o.p.number()
	if err := b.seed(ctx, number); err != nil {
		return nil, err
	}
	c, err := connect(ctx, fmt.Sprintf("127.0.0.1:%d", o.p.cluster.Port()), o.p.keys, b.name)
	if err != nil {
		return nil, err
	}
	defer c.close()
	e, t := &expectation{}, &transcript{}
	parts := split(s.all())
	for i, segment := range segments(s.all()) {
		// The bursts of the segment: the last one ends it, except for a COPY, whose Query has been answered only after its data.
		n := 1
		for ended := false; ; n++ {
			for _, m := range parts[n-1].send {
				ended = m.ends() || ended && m.copies()
			}
			if ended && (n == len(parts) || len(parts[n].send) == 0 || !parts[n].send[0].copies()) {
				break
			}
		}
		mine := parts[:n]
		parts = parts[n:]
		if f := slices.IndexFunc(v.failures, func(f failure) bool { return f.segment == i }); f >= 0 {
			if err := c.fail(t, segment, v.failures[f].status, v.keep, number); err != nil {
				return nil, err
			}
		} else if err := c.run(t, mine, number); err != nil {
			return nil, err
		}
		if !t.alive() || t.complete() != i+1 {
			return nil, fmt.Errorf("segment %d is not answered: %s %s", i, t.last(), t.broken)
		}
		now, err := b.ledger(ctx, number)
		if err != nil {
			return nil, err
		}
		e.ledger = append(e.ledger, now)
	}
	e.answers, e.params = t.answers, c.params
	if _, err := b.forget(ctx, number); err != nil {
		return nil, err
	}
	return e, nil
}

// fail lets the transaction fail in the place of a segment.
func (c *client) fail(t *transcript, segment []message, status byte, keep bool, number string) error {
	now := byte(pgwire.Idle)
	if n := len(t.answers); n > 0 {
		now = t.answers[n-1].status
	}
	var instead []burst
	if keep && now != pgwire.InFailed {
		var kept []message
		for _, m := range segment {
			if m.typ == pgwire.Parse && m.name != "" || m.typ == pgwire.Close && m.of == 'S' {
				kept = append(kept, m)
			}
		}
		instead = append(instead, one(append(kept, sync_)...))
	}
	// The transaction is gone with its server, and its savepoints with it.
	if now != pgwire.Idle {
		instead = append(instead, one(query("ROLLBACK")))
	}
	if status == pgwire.InFailed {
		instead = append(instead, queries("BEGIN", "DO $do$ BEGIN RAISE 'fails' USING ERRCODE = '40001'; END $do$")...)
	}
	aside := &transcript{}
	if err := c.run(aside, instead, number); err != nil {
		return err
	}
	t.answers = append(t.answers, answer{codes: []string{failed}, status: status})
	t.sent++
	t.broken = aside.broken
	return nil
}
