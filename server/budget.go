package server

import (
	"context"
	"sync"
)

// errBudget is why a journal takes nothing more for the time being.
var errBudget = &hinted{
	"the journal's disk budget is used up, so decoding is paused; PostgreSQL keeps its WAL meanwhile",
	"bring the site that is behind back, or raise journal.budget",
}

// errCopyBudget is the same for the copy of a peer's journal: the peer keeps it meanwhile.
var errCopyBudget = &hinted{
	"the journal's disk budget is used up by what could not be applied here, so nothing more is taken; the peer keeps it meanwhile",
	"see in `duri status` why this site does not apply, or raise journal.budget",
}

// segmentsMin is how many segments a database's journals may take, whatever the budget: the last one of each always
// stays.
const segmentsMin = 4

// share is the budget of one of several databases.
func share(budget, segment int64, databases int) int64 {
	return max(budget/int64(max(databases, 1)), segmentsMin*segment)
}

// overBudget decides which journals of a database take nothing more: while all together exceed the budget, those that
// hold more than an even share of it. At least one does, so all together stay below twice the budget. The others go on,
// because stopping all would be for ever: the own journal shrinks only by what is heard from the peers, and a copy
// only by applying it, which needs the own decoding (rule 8).
func overBudget(sizes []int64, budget int64) (over bool, paused []bool) {
	total := int64(0)
	for _, n := range sizes {
		total += n
	}
	over, paused = total > budget, make([]bool, len(sizes))
	for i, n := range sizes {
		paused[i] = over && n > budget/int64(len(sizes))
	}
	return over, paused
}

// gate lets one user at a time through, and ends it while it is shut.
type gate struct {
	mu   sync.Mutex // guards the rest
	why  error      // nil: open
	stop context.CancelCauseFunc
}

// enter gives a context that ends with ctx, when the gate is shut, or by the function that is returned. Its cause tells
// which.
func (g *gate) enter(ctx context.Context) (context.Context, context.CancelFunc, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.why != nil {
		return nil, nil, g.why
	}
	inner, stop := context.WithCancelCause(ctx)
	g.stop = stop
	return inner, func() { stop(context.Canceled) }, nil
}

// reason is why the gate is shut; nil: it is not.
func (g *gate) reason() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.why
}

// set shuts the gate for a reason, or opens it with nil.
func (g *gate) set(why error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.why = why
	if why != nil && g.stop != nil {
		g.stop(why)
	}
}
