package apply

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// How a batch is applied: again when others disturbed it, in halves and in other ways when it cannot be applied as it is.

// maxTries is how often a batch is tried again whole before it is split.
const maxTries = 3

// applyBatch applies a batch, trying again what other sessions disturbed and halving what fails, so that an error
// names one transaction (rule 17) and a unique swap finds its original order.
func (w *Worker) applyBatch(ctx context.Context, b *batch) error {
	for try := 1; ; try++ {
		if !b.careful && w.cfg.Mesh.Parking.touches(b) {
			return w.applyCarefully(ctx, b)
		}
		if w.aside.blocks(b) {
			if len(b.txns) > 1 {
				return w.applyHalves(ctx, b)
			}
			if err := w.drainAside(ctx, b); err != nil {
				return err
			}
		}
		if !b.filtered && w.aside.touches(b) {
			var err error
			if b, err = w.replan(b); err != nil {
				return err
			}
		}
		err := w.applyOnce(ctx, b)
		var behind *behindError
		switch {
		case err == nil:
			return nil
		case errors.As(err, &behind):
			w.stuck(err, "it goes on by itself as soon as decoding has caught up")
			if err := w.cfg.Barrier(ctx, behind.lsn); err != nil {
				return err
			}
			b.behind++
			try--
			continue
		case ctx.Err() != nil || w.session.conn.IsClosed() || pg.IsConnectionError(err):
			return err
		case pg.SQLState(err) == "55P03" && try >= asideAfter:
			next, aerr := w.setAside(ctx, b)
			if aerr != nil && !disturbed(aerr) {
				return aerr
			}
			if next != nil {
				b, try = next, 0
				continue
			}
			if len(b.txns) > 1 {
				return w.applyHalves(ctx, b)
			}
			if try%maxTries == 0 {
				w.stuck(fmt.Errorf("transaction %s waits for locks of this site's clients: %w", b.from(), err),
					"end or commit the sessions that hold the locks; apply goes on by itself")
			}
		case pg.SQLState(err) == "55P03":
			w.waitsForLocks()
		case len(b.txns) == 1 && disturbed(err):
			if try%maxTries == 0 {
				w.stuck(fmt.Errorf("transaction %s waits for locks of this site's clients: %w", b.from(), err),
					"end or commit the sessions that hold the locks; apply goes on by itself")
			}
		case disturbed(err) && try < maxTries:
		case len(b.txns) > 1:
			return w.applyHalves(ctx, b)
		case collided(err) && !b.careful:
			return w.applyCarefully(ctx, b)
		case collided(err) && try < maxTries: // with a row that a client has inserted meanwhile
		case b.merged:
			p, perr := planTxns(b.txns, w.resolve, w.cfg.Mesh.behind, false)
			if perr != nil {
				return &TransactionError{w.cfg.Origin, b.from(), b.txns[0].XID, perr}
			}
			p.cut()
			b = p.batch
		default:
			return &TransactionError{w.cfg.Origin, b.from(), b.txns[0].XID, err}
		}
		w.mu.Lock()
		w.status.Retries++
		w.mu.Unlock()
		if err := pause(ctx, time.Duration(1+rand.IntN(5*min(try, 20)))*time.Millisecond); err != nil {
			return err
		}
	}
}

// stuck shows in the status why nothing is applied just now.
func (w *Worker) stuck(err error, hint string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status.LastError, w.status.LastHint, w.status.LastErrorAt = err.Error(), hint, time.Now()
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// applyCarefully applies a batch in which rows may collide: one transaction at a time, change by change.
func (w *Worker) applyCarefully(ctx context.Context, b *batch) error {
	if len(b.txns) > 1 {
		return w.applyHalves(ctx, b)
	}
	p, err := planTxns(b.txns, w.resolve, w.cfg.Mesh.behind, false)
	if err != nil {
		return &TransactionError{w.cfg.Origin, b.from(), b.txns[0].XID, err}
	}
	p.cut()
	p.batch.careful = true
	return w.applyBatch(ctx, p.batch)
}

func (w *Worker) applyHalves(ctx context.Context, b *batch) error {
	half := len(b.txns) / 2
	for _, txns := range [][]*wal.Txn{b.txns[:half], b.txns[half:]} {
		p, err := planTxns(txns, w.resolve, w.cfg.Mesh.behind, true)
		if err != nil {
			return err
		}
		p.cut()
		if err := w.applyBatch(ctx, p.batch); err != nil {
			return err
		}
	}
	return nil
}

// disturbed reports an error that other sessions caused and that passes.
func disturbed(err error) bool {
	switch pg.SQLState(err) {
	case "40P01", "55P03", "40001": // deadlock, lock timeout, serialization
		return true
	}
	return errors.Is(err, errRestless) || errors.Is(err, errLocked) || errors.Is(err, errParked) || errors.Is(err, errInvisible) || errors.Is(err, errTruncated)
}

func (w *Worker) applyOnce(ctx context.Context, b *batch) error {
	if len(w.session.prepared) > maxPrepared {
		if err := w.session.reset(ctx); err != nil {
			return err
		}
	}
	w.forgetFilled(b.minTime)
	x := &execution{
		s: w.session, w: w, b: b, origin: w.roident,
		quiet: w.cfg.Mesh.quietFor(w.roident, min(w.cfg.Mesh.safeBefore(b.txns[0]), b.minTime)),
	}
	local, err := x.apply(ctx)
	if err != nil {
		return err
	}
	for _, table := range x.parking {
		w.cfg.Mesh.Parking.note(table)
	}
	if w.cfg.Applied != nil {
		w.cfg.Applied(b.tables())
	}
	if b.again == nil {
		w.arrived(b)
		w.aside.add(b)
		w.reached(b.to(), &mark{b.to(), local})
	}
	last := b.txns[len(b.txns)-1]
	conflicts := int64(0)
	for _, r := range x.records {
		if r.Kind != "" {
			conflicts++
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s := &w.status
	if b.again == nil {
		s.AppliedTime = b.maxTime
		w.takeSeen(last.Seen)
		s.Transactions += int64(len(b.txns))
	}
	s.Changes += int64(b.changes - len(b.held))
	s.Conflicts += conflicts
	s.LastError, s.LastHint = "", ""
	return nil
}
