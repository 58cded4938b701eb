package verify

import (
	"context"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/wal"
)

// Settler is a site that knows how far it is in each site's stream of changes.
type Settler interface {
	// Mark gives, after everything that was committed here before the call is in this site's own stream, the end of that
	// stream, and for each other site up to where its stream is applied here.
	Mark(ctx context.Context) ([]wal.Seen, error)
	// Reach returns when every other site's stream is applied here up to its mark.
	Reach(ctx context.Context, marks []wal.Seen) error
}

// Settle returns when each of two sites has applied whatever the other showed when it was called: what the other had
// committed itself, and what it had applied of third sites. A row that differs before and after, in the same way, is
// not in flight then.
func Settle(ctx context.Context, a, b Settler) error {
	var marks [2][]wal.Seen
	err := both(ctx, a, b, func(ctx context.Context, i int, s Settler) (err error) {
		marks[i], err = s.Mark(ctx)
		return err
	})
	if err != nil {
		return err
	}
	all := mergeMarks(marks[0], marks[1])
	return both(ctx, a, b, func(ctx context.Context, _ int, s Settler) error { return s.Reach(ctx, all) })
}

func both(ctx context.Context, a, b Settler, f func(context.Context, int, Settler) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for i, s := range []Settler{a, b} {
		g.Go(func() error { return f(ctx, i, s) })
	}
	return g.Wait()
}

// mergeMarks takes the further mark of each site.
func mergeMarks(a, b []wal.Seen) []wal.Seen {
	out := slices.Clone(a)
	for _, m := range b {
		i := slices.IndexFunc(out, func(s wal.Seen) bool { return s.Site == m.Site })
		if i < 0 {
			out = append(out, m)
			continue
		}
		out[i].LSN = max(out[i].LSN, m.LSN)
	}
	return out
}

// Mark is Settler.Mark, asked of the site's agent.
func (r *Remote) Mark(ctx context.Context) ([]wal.Seen, error) {
	rep, err := r.do(ctx, request{Op: "mark"})
	return rep.Marks, err
}

// Reach is Settler.Reach, asked of the site's agent.
func (r *Remote) Reach(ctx context.Context, marks []wal.Seen) error {
	_, err := r.do(ctx, request{Op: "reach", Marks: marks})
	return err
}

// Parker is a site that knows how many of its rows are hidden (duri.parked), and so not compared.
type Parker interface {
	Parked(ctx context.Context) (int, error)
}

// Parked is Parker.Parked, asked of the site's agent.
func (r *Remote) Parked(ctx context.Context) (int, error) {
	rep, err := r.do(ctx, request{Op: "parked"})
	return rep.Parked, err
}

// Versions is Mender.Versions, asked of the site's agent.
func (r *Remote) Versions(ctx context.Context, t Table, rg Range) ([]VersionedRow, error) {
	rep, err := r.do(ctx, request{Op: "versions", Table: &t, Range: &rg, N: max(1, len(rg.Keys))})
	return rep.Versions, err
}

// Mend is Mender.Mend, asked of the site's agent.
func (r *Remote) Mend(ctx context.Context, t Table, by Digest, fixes []Fix) ([]Outcome, error) {
	rep, err := r.do(ctx, request{Op: "mend", Table: &t, Range: &Range{By: by}, Fixes: fixes, N: max(1, len(fixes))})
	if err == nil && len(rep.Outcomes) != len(fixes) {
		err = fmt.Errorf("reply of %s tells of %d of %d rows", r.name, len(rep.Outcomes), len(fixes))
	}
	return rep.Outcomes, err
}

// serveMore answers what only some Sides can.
func serveMore(ctx context.Context, s Side, req request) (rep reply, err error) {
	if settler, ok := s.(Settler); ok {
		switch req.Op {
		case "mark":
			rep.Marks, err = settler.Mark(ctx)
			return rep, err
		case "reach":
			return rep, settler.Reach(ctx, req.Marks)
		}
	}
	if p, ok := s.(Parker); ok && req.Op == "parked" {
		rep.Parked, err = p.Parked(ctx)
		return rep, err
	}
	if lender, ok := s.(interface {
		hold(ctx context.Context, t Table, keys []Key) (string, error)
		releaseHold(name string)
	}); ok {
		switch {
		case req.Op == "release":
			lender.releaseHold(req.Hold)
			return rep, nil
		case req.Op == "hold" && req.Table != nil && req.Range != nil:
			rep.Hold, err = lender.hold(ctx, *req.Table, req.Range.Keys)
			return rep, err
		}
	}
	m, ok := s.(Mender)
	switch {
	case !ok || req.Table == nil || req.Range == nil:
	case req.Op == "versions":
		rep.Versions, err = m.Versions(ctx, *req.Table, *req.Range)
		return rep, err
	case req.Op == "mend":
		rep.Outcomes, err = m.Mend(ctx, *req.Table, req.Range.By, req.Fixes)
		return rep, err
	}
	return rep, withHint(fmt.Errorf("read comparison request: %q is not known here", req.Op), "run the same version of duri at both sites")
}
