package gateway

import (
	"context"
	"time"
)

// Sites is what the gateway asks the sites' agents, who know what it cannot see. Methods may be called at the same time, and
// end with their ctx.
type Sites interface {
	// Fate says what became of a transaction whose answer was lost (design: gateway, section 8, RESOLVE). It asks until somebody
	// who may tell does so: the transaction's own site, or another one once the register has left that site out. Committed and
	// Aborted are final, whoever asks again, and Committed is told only when the transaction is as durable as its COMMIT would
	// have been. An error means Unknown.
	Fate(ctx context.Context, d Doubt) (Fate, error)
	// End ends the backend that has a transaction, if its server lives: nobody will commit it, and it may hold locks. The backend
	// is d.PID if it was started at d.Started.
	End(ctx context.Context, d Doubt)
	// CatchUp waits until all that a session can have seen at a site is visible at another. When that site is gone for good,
	// all that is left of it is.
	CatchUp(ctx context.Context, database, from, to string) error
}

// Doubt is a transaction of which the gateway does not know what became.
type Doubt struct {
	Target
	Database string
	PID      uint32    // of its backend
	Started  string    // its backend_start in pg_stat_activity, in seconds since 1970; empty: not known
	XID      uint64    // with epoch, as pg_current_xact_id gives it; 0: it was not asked for, or there was none
	LTXID    []byte    // of its mark; none: it was never told to commit
	At       time.Time // when the loss was noticed: within a few seconds, as connections to a site that is silent are cut
}

// Fate is what became of a transaction.
type Fate int

const (
	Unknown Fate = iota
	Committed
	Aborted
)
