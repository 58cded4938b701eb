package apply

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// Outcomes settles the fate of other sites' marked transactions at this one: each takes effect here, or is decided never to
// (design: gateway, section 8, reference form). Whichever comes first counts, once and for all: a transaction on its way into a
// batch cannot be decided against any more, and one that was decided against becomes a ghost when it turns up. One per
// database; safe for concurrent use.
type Outcomes struct {
	mu      sync.Mutex // guards the rest; held while a decision is written
	loaded  bool
	aborted map[string]bool // LTXIDs that were decided against
	taken   map[string]int  // LTXIDs on their way into duri.outcome, with how many transactions carry each
	settled chan struct{}   // closed and replaced when one of those has arrived
}

// NewOutcomes knows of no decision yet: they are read with the first question.
func NewOutcomes() *Outcomes {
	return &Outcomes{aborted: map[string]bool{}, taken: map[string]int{}, settled: make(chan struct{})}
}

// Reasons of ghosts.
const (
	ghostAborted = "its client was told that it was aborted"
	ghostTail    = "it was never acknowledged, and its site had been left out"
)

// load reads the decisions of a former life of the agent. o.mu is held.
func (o *Outcomes) load(ctx context.Context, c *pgconn.PgConn) error {
	if o.loaded {
		return nil
	}
	rows, err := pg.Query(ctx, c, "SELECT ltxid FROM duri.outcome WHERE status = 'aborted'")
	if err != nil {
		return fmt.Errorf("read what was decided of marked transactions: %w", err)
	}
	for _, r := range rows {
		id, err := unhex([]byte(r[0]))
		if err != nil {
			return err
		}
		o.aborted[id] = true
	}
	o.loaded = true
	return nil
}

// take says whether a marked transaction may take effect here. If so it will, or the worker ends and takes it again.
func (o *Outcomes) take(ctx context.Context, c *pgconn.PgConn, id string) (bool, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := o.load(ctx, c); err != nil {
		return false, err
	}
	if o.aborted[id] {
		return false, nil
	}
	o.taken[id]++
	return true, nil
}

// done notes that transactions that were taken have arrived, or that their worker has ended.
func (o *Outcomes) done(ids []string) {
	if len(ids) == 0 {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, id := range ids {
		if o.taken[id]--; o.taken[id] <= 0 {
			delete(o.taken, id)
		}
	}
	close(o.settled)
	o.settled = make(chan struct{})
}

// Decide gives the fate of a transaction of another site: true, it has taken effect here; false, it never will, which is on
// record before this returns. origin is that site. The caller has seen to it that everything of the origin that may have been
// acknowledged has been read here, and that nothing more can be: else a transaction that was acknowledged could be decided
// against. c is the caller's for the time of the call.
func (o *Outcomes) Decide(ctx context.Context, c *pgconn.PgConn, id string, origin wal.SiteID) (committed bool, err error) {
	for {
		o.mu.Lock()
		if o.taken[id] == 0 {
			break
		}
		settled := o.settled
		o.mu.Unlock()
		select {
		case <-settled:
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
	defer o.mu.Unlock()
	if err := o.load(ctx, c); err != nil {
		return false, err
	}
	if o.aborted[id] {
		return false, nil
	}
	if err := inGap(ctx, c, id, origin); err != nil {
		return false, err
	}
	rows, err := pg.Query(ctx, c, `WITH decided AS (
			INSERT INTO duri.outcome (ltxid, status, origin) VALUES ($1::bytea, 'aborted', $2::int2) ON CONFLICT DO NOTHING RETURNING status)
		SELECT status FROM decided UNION ALL SELECT status FROM duri.outcome WHERE ltxid = $1::bytea`, string(bytea(id)), fmt.Sprint(origin))
	if err != nil {
		// It may have been written all the same: what is known is read again.
		o.loaded = false
		return false, fmt.Errorf("decide on a transaction of site %d: %w", origin, err)
	}
	switch {
	case len(rows) == 0: // written by somebody else between the two snapshots
		o.loaded = false
		return false, errors.New("decide on a transaction: another session has decided on it just now; ask again")
	case rows[0][0] == "committed":
		return true, nil
	}
	o.aborted[id] = true
	return false, nil
}

// inGap makes sure that a transaction of which nothing is known here is not one that never came here: a part of what its site
// wrote was made up for by comparing rows (docs/adr/0007). An empty gap, which stands for ghosts that are reversed here, hides nothing. Nobody asks for longer than a day.
func inGap(ctx context.Context, c *pgconn.PgConn, id string, origin wal.SiteID) error {
	rows, err := pg.Query(ctx, c, `SELECT from_lsn, to_lsn FROM duri.gap WHERE origin = $2::int2
		AND from_lsn < to_lsn AND (repaired_at IS NULL OR repaired_at > pg_catalog.now() - interval '1 day') AND NOT EXISTS (SELECT FROM duri.outcome WHERE ltxid = $1::bytea)
		LIMIT 1`, string(bytea(id)), fmt.Sprint(origin))
	if err != nil {
		return fmt.Errorf("decide on a transaction of site %d: %w", origin, err)
	}
	if len(rows) > 0 {
		return fmt.Errorf("decide on a transaction of site %d: what that site wrote from %s to %s never came here, so that only it knows", origin, rows[0][0], rows[0][1])
	}
	return nil
}

// forget lets what was decided be read again.
func (o *Outcomes) forget() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.loaded = false
}

// ghostOf says why a transaction must not take effect; empty: it may.
func (w *Worker) ghostOf(ctx context.Context, t *wal.Txn) (string, error) {
	if t.Mark.LTXID == "" || w.cfg.Outcomes == nil {
		return "", nil
	}
	if w.cfg.Unacknowledged != nil {
		switch yes, err := w.cfg.Unacknowledged(ctx, t); {
		case err != nil:
			return "", err
		case yes:
			return w.ghost(t, ghostTail), nil
		}
	}
	w.auxMu.Lock()
	defer w.auxMu.Unlock()
	ok, err := w.cfg.Outcomes.take(ctx, w.aux, t.Mark.LTXID)
	if err != nil {
		return "", err
	}
	if !ok {
		return w.ghost(t, ghostAborted), nil
	}
	w.takenMu.Lock()
	w.taken[t.Mark.LTXID]++
	w.takenMu.Unlock()
	return "", nil
}

// ghost tells of a transaction that does not take effect.
func (w *Worker) ghost(t *wal.Txn, reason string) string {
	if w.cfg.Ghost != nil {
		w.cfg.Ghost(t)
	}
	return reason
}

// arrived notes that the marked transactions of a batch are in duri.outcome.
func (w *Worker) arrived(b *batch) {
	var ids []string
	w.takenMu.Lock()
	for _, t := range b.txns {
		if id := t.Mark.LTXID; w.taken[id] > 0 {
			w.taken[id]--
			ids = append(ids, id)
		}
		delete(w.ghosts, t)
	}
	w.takenMu.Unlock()
	if len(ids) > 0 {
		w.cfg.Outcomes.done(ids)
	}
}

// giveUp lets go of what this run has taken and not brought in: it is taken again when it is read again.
func (w *Worker) giveUp() {
	var ids []string
	w.takenMu.Lock()
	for id, n := range w.taken {
		for range n {
			ids = append(ids, id)
		}
	}
	w.taken, w.ghosts = map[string]int{}, map[*wal.Txn]string{}
	w.takenMu.Unlock()
	if len(ids) > 0 {
		w.cfg.Outcomes.done(ids)
	}
}

// errDecided: a transaction was decided against by another session than this agent's.
var errDecided = errors.New("a transaction that was to be applied has been decided against meanwhile; it is looked at again")

const (
	outcomeSQL = `INSERT INTO duri.outcome (ltxid, status, origin) SELECT DISTINCT id, 'committed', $2::int2 FROM unnest($1::bytea[]) AS id
		ON CONFLICT DO NOTHING`
	// decidedSQL sees, as a statement of its own, what outcomeSQL has waited for.
	decidedSQL = "SELECT count(*) FROM duri.outcome WHERE ltxid = ANY ($1::bytea[]) AND status = 'aborted'"
	ghostSQL   = `WITH told AS (
		INSERT INTO duri.outcome (ltxid, status, origin) VALUES ($5::bytea, 'aborted', $1::int2) ON CONFLICT DO NOTHING)
	INSERT INTO duri.ghost (origin, commit_lsn, end_lsn, xid, ltxid, reason)
	VALUES ($1::int2, $2::pg_lsn, $3::pg_lsn, $4::int8, $5::bytea, $6) ON CONFLICT DO NOTHING`
)

// outcomes are the statements that put down the fate of a batch's marked transactions; checked is which of them counts those
// that were decided against, -1 for none.
func (x *execution) outcomes() (calls []call, checked int) {
	checked = -1
	if x.b.again != nil { // what was set aside has been put down before
		return nil, -1
	}
	ids := []byte{'{'}
	x.w.takenMu.Lock()
	defer x.w.takenMu.Unlock()
	for _, t := range x.b.txns {
		if t.Mark.LTXID == "" || x.w.cfg.Outcomes == nil {
			continue
		}
		if reason, ghost := x.w.ghosts[t]; ghost {
			calls = append(calls, call{ghostSQL, [][]byte{
				fmt.Append(nil, t.Origin), []byte(t.CommitLSN.String()), []byte(t.EndLSN.String()), fmt.Append(nil, t.XID), bytea(t.Mark.LTXID), []byte(reason),
			}})
			continue
		}
		if len(ids) > 1 {
			ids = append(ids, ',')
		}
		ids = fmt.Appendf(ids, `"\\x%x"`, t.Mark.LTXID)
	}
	if len(ids) > 1 {
		ids = append(ids, '}')
		calls = append(calls, call{outcomeSQL, [][]byte{ids, fmt.Append(nil, x.w.cfg.Origin)}}, call{decidedSQL, [][]byte{ids}})
		checked = len(calls) - 1
	}
	return calls, checked
}
