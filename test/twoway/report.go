package twoway

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Table is the results of one load as Markdown, in the order given.
func Table(load string, results []Result) string {
	var b strings.Builder
	head := []string{"system", "link", "tx/s A + B", "changes/s replicated", "keys that differ", "caught up after healing", "after the load", "conflicts", "errors"}
	if load == TPCB {
		head = slices.Insert(head, 5, "wrong balances at A", "at B")
	}
	row(&b, head)
	row(&b, slices.Repeat([]string{"---"}, len(head)))
	for _, r := range results {
		if r.Load == load {
			row(&b, r.cells())
		}
	}
	return b.String()
}

func row(b *strings.Builder, cells []string) {
	fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
}

// Link says what happened to the link.
func (r Result) Link() string {
	switch {
	case r.Cut > 0 && r.Last:
		return fmt.Sprintf("cut for the last %s", r.Cut)
	case r.Cut > 0:
		return fmt.Sprintf("cut for %s in the middle", r.Cut)
	}
	return "undisturbed"
}

// cells are the row of a result.
func (r Result) cells() []string {
	perSecond := func(n int) float64 { return float64(n) / r.Length.Seconds() }
	replicated := fmt.Sprintf("%.0f", r.Replicated())
	if r.Stalled != "" {
		replicated = "stalled"
	}
	cells := []string{
		r.System, r.Link(), fmt.Sprintf("%.0f + %.0f", perSecond(r.Counts[0].Transactions), perSecond(r.Counts[1].Transactions)), replicated, r.differ(),
	}
	if r.Load == TPCB {
		cells = append(cells, wrongs(r.Wrong[0]), wrongs(r.Wrong[1]))
	}
	healed, ended := seconds(r.Healed), seconds(r.Ended)
	if r.Stalled != "" {
		ended = "never"
		if r.Cut > 0 && r.Healed == 0 {
			healed = "never"
		}
	}
	conflicts := "not reported"
	if r.Conflicts >= 0 {
		conflicts = fmt.Sprint(r.Conflicts)
	}
	return append(cells, healed, ended, conflicts, fmt.Sprint(r.Errors))
}

// differ says how many keys differ, of how many or in which tables.
func (r Result) differ() string {
	if r.Different() == 0 {
		return "**0**"
	}
	if r.Of > 0 {
		return fmt.Sprintf("%d of %d", r.Different(), r.Of)
	}
	var parts []string
	for _, t := range slices.Sorted(maps.Keys(r.Differing)) {
		if n := r.Differing[t]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, strings.TrimPrefix(t, "pgbench_")))
		}
	}
	return strings.Join(parts, ", ")
}

func seconds(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

// wrongs lists the tables with wrong balances.
func wrongs(all []Wrong) string {
	var parts []string
	for _, w := range all {
		parts = append(parts, fmt.Sprintf("%d/%d %s", w.Wrong, w.Of, w.Table))
	}
	return cmp.Or(strings.Join(parts, ", "), "not looked at")
}

// Judge says what a result of duri breaks of its promises: sites that differ, by the dump or by its own comparison, and
// catching up that takes longer than healMax after the link has healed, when there is no further load. Under a load that
// takes all the processors there is no such promise: the table shows how long it took.
func Judge(r Result, healMax time.Duration) error {
	var errs []error
	if r.Stalled != "" {
		errs = append(errs, fmt.Errorf("the sites did not catch up: %s", r.Stalled))
	}
	if n := r.Different(); n > 0 {
		errs = append(errs, fmt.Errorf("%d keys differ: %s", n, strings.Join(r.Examples, "; ")))
	}
	if r.Verify != "equal" {
		errs = append(errs, fmt.Errorf("duri verify says: %s", r.Verify))
	}
	if r.Last && r.Healed > healMax {
		errs = append(errs, fmt.Errorf("caught up %s after the link had healed, promised are %s", r.Healed.Round(time.Millisecond), healMax))
	}
	for i, c := range r.Counts {
		if c.Transactions == 0 {
			errs = append(errs, fmt.Errorf("the clients of site %d committed none of their transactions", i+1))
		}
	}
	return errors.Join(errs...)
}
