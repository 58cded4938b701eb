package kills

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/duri-io/duri/internal/pair"
)

// content is what one site holds in the end.
type content struct {
	ledger map[string]bool
	log    map[string]int
	dump   string // everything, sorted
}

func read(ctx context.Context, s *pair.Site) (content, error) {
	c := content{ledger: map[string]bool{}, log: map[string]int{}}
	rows, err := s.Cluster.QueryText(ctx, s.Database, "SELECT site || '/' || client || '/' || seq FROM ledger ORDER BY 1")
	if err != nil {
		return c, err
	}
	var dump strings.Builder
	for _, r := range rows {
		c.ledger[r[0]] = true
		fmt.Fprintln(&dump, "ledger", r[0])
	}
	if rows, err = s.Cluster.QueryText(ctx, s.Database, "SELECT entry FROM log ORDER BY 1"); err != nil {
		return c, err
	}
	for _, r := range rows {
		c.log[r[0]]++
		fmt.Fprintln(&dump, "log", r[0])
	}
	if rows, err = s.Cluster.QueryText(ctx, s.Database, "SELECT id, by FROM shared ORDER BY id"); err != nil {
		return c, err
	}
	for _, r := range rows {
		fmt.Fprintln(&dump, "shared", r[0], r[1])
	}
	c.dump = dump.String()
	return c, nil
}

// judge compares what clients were told with what the sites hold. Each violation is one sentence.
func judge(attempts []attempt, names []string, sites []content) (violations []string) {
	known := map[string]outcome{}
	for _, a := range attempts {
		known[a.key()] = a.outcome
		for i, s := range sites {
			row, entries := s.ledger[a.key()], s.log[a.key()]
			switch {
			case entries > 1:
				violations = append(violations, fmt.Sprintf("site %s: %s was applied %d times", names[i], a.key(), entries))
			case row != (entries == 1):
				violations = append(violations, fmt.Sprintf("site %s: half of the transaction %s is there", names[i], a.key()))
			case a.outcome == acked && !row:
				violations = append(violations, fmt.Sprintf("site %s: %s was acknowledged at %s and is lost", names[i], a.key(), a.ended.Format("15:04:05.000000")))
			case a.outcome == refused && row:
				violations = append(violations, fmt.Sprintf("site %s: %s was refused and is there", names[i], a.key()))
			}
		}
	}
	for i, s := range sites {
		for key := range s.ledger {
			if _, ok := known[key]; !ok {
				violations = append(violations, fmt.Sprintf("site %s: %s was never written", names[i], key))
			}
		}
		if s.dump != sites[0].dump {
			violations = append(violations, fmt.Sprintf("site %s differs from site %s: %s", names[i], names[0], firstDifference(sites[0].dump, s.dump)))
		}
	}
	slices.Sort(violations)
	return violations
}

func firstDifference(a, b string) string {
	x, y := strings.Split(a, "\n"), strings.Split(b, "\n")
	for i := range min(len(x), len(y)) {
		if x[i] != y[i] {
			return fmt.Sprintf("%q and %q", x[i], y[i])
		}
	}
	return fmt.Sprintf("%d and %d rows", len(x), len(y))
}
