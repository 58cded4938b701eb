package trial

import (
	"fmt"
	"strings"
	"time"
)

// Report is the result in words.
func (r *Result) Report() string {
	verdict := "PASSED"
	if r.Failed() {
		verdict = fmt.Sprintf("FAILED with %d differences, %d of them rows", len(r.Differences), r.Unequal)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %s\n", r.Script.Seed, verdict)
	fmt.Fprintf(&b, "  %d row changes in %d transactions at %d sites in %s (%.0f/s); %d of them in doubt, %d refused by PostgreSQL\n", r.Changes, r.Commits,
		r.Script.Sites, r.Load.Round(time.Second), float64(r.Changes)/max(r.Load.Seconds(), 0.001), r.InDoubt, r.Refused)
	fmt.Fprintf(&b, "  faults: %s\n", tally(r.Faults))
	fmt.Fprintf(&b, "  %d keys written, %d rows in the end; caught up after %s\n", r.Registers, r.Rows, r.CaughtUp.Round(100*time.Millisecond))
	fmt.Fprintf(&b, "  %d times a change lost against a concurrent one of the site where it arrived (overtaken at commit: %d); %d conflict records\n",
		r.Concurrent, r.Overtaken, r.Conflicts)
	return b.String()
}

// TableHead heads the rows of Row.
const TableHead = "| seed | sites | row changes | transactions | faults | time | caught up | lost to concurrent changes | conflict records | differences |\n" +
	"|---|---|---|---|---|---|---|---|---|---|\n"

// Row is the result as a row of the table in docs/reliability.md.
func (r *Result) Row() string {
	faults := 0
	for _, n := range r.Faults {
		faults += n
	}
	return fmt.Sprintf("| %d | %d | %d | %d | %d | %s | %s | %d | %d | %d |\n", r.Script.Seed, r.Script.Sites, r.Changes, r.Commits, faults,
		r.Load.Round(time.Second), r.CaughtUp.Round(100*time.Millisecond), r.Concurrent, r.Conflicts, len(r.Differences))
}
