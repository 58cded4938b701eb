package demo

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/internal/term"
)

// Report is what a demo found; its JSON form is the output of `duri demo --json`. Fields are only added. Pairs are of
// site A and site B. Amounts are KRW.
type Report struct {
	OK       bool     `json:"ok"`       // the verdict: everything below is as it should be
	Problems []string `json:"problems"` // why not, in words

	Acknowledged int `json:"acknowledged"` // payments whose COMMIT was answered
	Lost         int `json:"lost"`         // of those: absent at a site in the end
	Doubled      int `json:"doubled"`      // payments that are there more than once, as a row or in the audit log
	Unexpected   int `json:"unexpected"`   // payments that are there although nobody committed them, or in part
	RolledBack   int `json:"rolled_back"`
	InDoubt      int `json:"in_doubt"`           // COMMIT was sent and the connection died: neither lost nor doubled
	InDoubtThere int `json:"in_doubt_committed"` // of those: there, at both sites
	InDoubtSplit int `json:"in_doubt_differs"`   // of those: there at one site only

	// What clients had of it: each has one connection, to a gateway, and makes a transaction again after SQLSTATE 40001 only.
	ClientErrors int `json:"client_errors"` // answers that are neither success nor 40001 nor 08007, and connections lost or refused
	Retries      int `json:"retries"`       // transactions made again after 40001
	// InDoubtUnknown are COMMITs answered by 08007: the gateway could not learn what became of them. The client looks the payment
	// up; what it does not find counts in in_doubt.
	InDoubtUnknown int `json:"in_doubt_unknown"`
	// The longest time that each client was without an answer around A's death, over all clients of both sites; see
	// docs/reference/json.md.
	StallMSP50      int64 `json:"stall_ms_p50"`
	StallMSP99      int64 `json:"stall_ms_p99"`
	StallMSMax      int64 `json:"stall_ms_max"`
	GatewayInDoubt  int   `json:"gateway_in_doubt"`  // COMMITs whose answer from PostgreSQL was lost, by the gateways' counters
	InDoubtResolved int   `json:"in_doubt_resolved"` // of those: the gateways learned what became of them
	Rehomed         int   `json:"rehomed"`           // transactions at another site than their session's one before

	Converged   bool         `json:"converged"`    // all applied, duri verify says equal, and tables_equal
	VerifyEqual bool         `json:"verify_equal"` // what duri verify says
	TablesEqual bool         `json:"tables_equal"` // what the demo's own comparison says
	Tables      []TableCheck `json:"tables"`

	PaymentsA int   `json:"payments_a"`
	PaymentsB int   `json:"payments_b"`
	SumClient int64 `json:"sum_client"` // by the clients' records
	SumA      int64 `json:"sum_a"`
	SumB      int64 `json:"sum_b"`

	Conflicts      int            `json:"conflicts"` // records at both sites: each site records its own view of a conflict
	ConflictsA     int            `json:"conflicts_a"`
	ConflictsB     int            `json:"conflicts_b"`
	ConflictKinds  map[string]int `json:"conflict_kinds"`
	FirstConflicts []ConflictLine `json:"first_conflicts"`
	BudgetDrift    int            `json:"budget_lines_with_lost_update"` // by last-writer-wins, see the package comment

	Killed     string    `json:"killed"` // what died at A: site, postgres or agent
	KillAt     time.Time `json:"kill_at"`
	BackAt     time.Time `json:"back_at"`     // A's PostgreSQL answered again and its agent was started, as far as they were killed
	FailoverMS int64     `json:"failover_ms"` // from kill_at until every client of A had a payment acknowledged at B
	CatchupMS  int64     `json:"catchup_ms"`  // from back_at until A had applied what B had, and B had A's last payments

	RPO0        bool  `json:"rpo0"`            // commits waited for the other site
	NotYetAtB   int   `json:"not_yet_at_b"`    // acknowledged by A, and not yet at B when A died
	NotYetAtBMS int64 `json:"not_yet_at_b_ms"` // for how long after kill_at

	Seed       uint64  `json:"seed"`
	Phases     []Phase `json:"phases"`
	Seconds    float64 `json:"seconds"`
	PostgreSQL string  `json:"postgresql"`
	Kept       *Kept   `json:"kept,omitempty"`
}

// Phase is a part of the demo.
type Phase struct {
	Name    string    `json:"name"`
	At      time.Time `json:"at"`
	Seconds float64   `json:"seconds"`
}

// ConflictLine is a recorded conflict in short.
type ConflictLine struct {
	Site   string    `json:"site"` // that recorded it
	At     time.Time `json:"at"`
	Kind   string    `json:"kind"`
	Table  string    `json:"table"`
	Key    string    `json:"key"`
	Winner string    `json:"winner"` // site whose change stands
}

// Kept says how to reach what Options.Keep left running.
type Kept struct {
	Dir     string   `json:"dir"`
	Connect []string `json:"connect"` // psql command lines, A then B
	Status  []string `json:"status"`
	// Gateways are psql command lines: of each gateway, the ledger and the gateway's own database.
	Gateways []string `json:"gateways"`
	Stop     string   `json:"stop"`
}

// conflictLine shortens a conflict. The winner is the incoming change's site if it won.
func conflictLine(s *site, peer *site, c catalog.Conflict) ConflictLine {
	winner := s.name
	if c.Code == "won" {
		winner = peer.name
	}
	return ConflictLine{Site: s.name, At: c.At, Kind: c.Kind, Table: c.Schema + "." + c.Table, Key: string(c.Key), Winner: winner}
}

// take writes a verdict into the report.
func (r *Report) take(v verdict) {
	r.Acknowledged, r.Lost, r.Doubled, r.Unexpected = v.acknowledged, v.lost, v.doubled, v.unexpected
	r.RolledBack, r.InDoubt, r.InDoubtThere, r.InDoubtSplit = v.rolledBack, v.inDoubt, v.inDoubtThere, v.inDoubtSplit
	r.SumClient, r.SumA, r.SumB = v.sumClient, v.sum[0], v.sum[1]
	r.PaymentsA, r.PaymentsB = v.payments[0], v.payments[1]
	r.Problems = append(r.Problems, v.examples...)
}

// conclude makes the verdict of all that was found. It is pure but for the report itself.
func (r *Report) conclude(settled bool) {
	r.TablesEqual = len(r.Tables) > 0
	for _, t := range r.Tables {
		if !t.Equal {
			r.TablesEqual = false
			r.problem("table %s.%s differs: %d rows at A, %d at B", schema, t.Name, t.Rows[0], t.Rows[1])
		}
	}
	r.Converged = settled && r.VerifyEqual && r.TablesEqual
	for _, c := range []struct {
		bad  bool
		text string
	}{
		{!settled, "the sites did not apply each other's changes in time"},
		{!r.VerifyEqual, "duri verify found the sites not equal"},
		{len(r.Tables) == 0, "no table was compared"},
		{r.Acknowledged == 0, "no payment was acknowledged"},
		{r.Lost > 0, fmt.Sprintf("%d acknowledged payments are lost", r.Lost)},
		{r.RPO0 && r.NotYetAtB > 0, fmt.Sprintf("%d acknowledged payments were not at B when A died, with RPO 0", r.NotYetAtB)},
		{r.ClientErrors > 0, fmt.Sprintf("clients noticed: %d errors that are not 40001", r.ClientErrors)},
		{r.RPO0 && r.InDoubtUnknown > 0, fmt.Sprintf("%d COMMITs were answered by \"unknown\", with RPO 0", r.InDoubtUnknown)},
		{r.Doubled > 0, fmt.Sprintf("%d payments are doubled", r.Doubled)},
		{r.Unexpected > 0, fmt.Sprintf("%d payments are there that nobody committed as they are", r.Unexpected)},
		{r.InDoubtSplit > 0, fmt.Sprintf("%d payments in doubt are at one site only", r.InDoubtSplit)},
		{r.SumA != r.SumClient, fmt.Sprintf("the sum of payments at A is %d, by the clients' records %d", r.SumA, r.SumClient)},
		{r.SumB != r.SumClient, fmt.Sprintf("the sum of payments at B is %d, by the clients' records %d", r.SumB, r.SumClient)},
	} {
		if c.bad {
			r.problem("%s", c.text)
		}
	}
	r.OK = len(r.Problems) == 0
}

func (r *Report) problem(format string, args ...any) {
	r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
}

// Print writes the report for people.
func (r Report) Print(w io.Writer, style term.Style) error {
	var b strings.Builder
	b.WriteString("\n" + style.Bold("duri demo: two sites, one ledger, one of them killed") + "\n\n")
	t := &term.Table{}
	r.rows(t)
	if err := t.Write(&b, style); err != nil {
		return err
	}
	if err := r.printConflicts(&b, style); err != nil {
		return err
	}
	b.WriteString("\n" + r.verdictLine(style) + "\n")
	for _, p := range r.Problems {
		b.WriteString("  " + style.Bad("✗") + " " + term.Clean(p) + "\n")
	}
	if r.Kept != nil {
		r.Kept.print(&b)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (r Report) rows(t *term.Table) {
	const clock = "15:04:05.000"
	t.Row("  A killed (-9)", fmt.Sprintf("%s   %s, in the middle of the writing", r.KillAt.Local().Format(clock), killedText(r.Killed)))
	t.Row("  A's clients wrote again", fmt.Sprintf("%s later, at B, over the same connections", ms(r.FailoverMS)))
	t.Row("  longest wait of a client", fmt.Sprintf("%s   half of the clients: at most %s", ms(r.StallMSMax), ms(r.StallMSP50)))
	t.Row("  errors that clients saw", fmt.Sprintf("%d   transactions made again (40001): %d", r.ClientErrors, r.Retries))
	t.Row("  answers lost on the way", fmt.Sprintf("%d   found out by the gateways: %d", r.GatewayInDoubt, r.InDoubtResolved))
	t.Row("  A back", fmt.Sprintf("%s   after %s", r.BackAt.Local().Format(clock), term.Duration(r.BackAt.Sub(r.KillAt))))
	t.Row("  caught up, both ways", fmt.Sprintf("%s later", ms(r.CatchupMS)))
	t.Row("", "")
	t.Row("  payments acknowledged", term.Count(int64(r.Acknowledged)))
	t.Row("  lost", term.Count(int64(r.Lost)))
	t.Row("  doubled", term.Count(int64(r.Doubled)))
	t.Row("  in doubt", fmt.Sprintf("%d   COMMIT without a clear answer; %d turned out committed, the same at both sites: %s", r.InDoubt, r.InDoubtThere, yes(r.InDoubtSplit == 0)))
	t.Row("  not yet at B when A died", r.tail())
	t.Row("", "")
	t.Row("  sum by the clients", won(r.SumClient))
	t.Row("  sum at A", won(r.SumA))
	t.Row("  sum at B", won(r.SumB))
	t.Row("  tables equal, row by row", fmt.Sprintf("%s   duri verify: %s   sorted COPY: %s", yes(r.Converged), yes(r.VerifyEqual), yes(r.TablesEqual)))
	t.Row("  budget totals that lost an update", fmt.Sprintf("%d   last writer wins by row; sums above count payments", r.BudgetDrift))
}

func killedText(what string) string {
	switch what {
	case KillPostgres:
		return "PostgreSQL alone"
	case KillAgent:
		return "the agent alone"
	}
	return "PostgreSQL and agent"
}

func (r Report) tail() string {
	if r.NotYetAtB == 0 {
		return "none"
	}
	return fmt.Sprintf("%s, for %s: replication is asynchronous in this version", count(r.NotYetAtB, "payment"), ms(r.NotYetAtBMS))
}

func (r Report) printConflicts(b *strings.Builder, style term.Style) error {
	fmt.Fprintf(b, "\n  conflicts: %s recorded at A, %s at B", term.Count(int64(r.ConflictsA)), term.Count(int64(r.ConflictsB)))
	for _, kind := range slices.Sorted(maps.Keys(r.ConflictKinds)) {
		fmt.Fprintf(b, "; %s %s", kind, term.Count(int64(r.ConflictKinds[kind])))
	}
	b.WriteString("\n")
	if len(r.FirstConflicts) == 0 {
		return nil
	}
	t := term.NewTable("  AT", "RECORDED AT", "KIND", "TABLE", "KEY", "WINNER")
	for _, c := range r.FirstConflicts {
		t.Row("  "+c.At.Local().Format("15:04:05.000"), c.Site, c.Kind, c.Table, c.Key, c.Winner)
	}
	return t.Write(b, style)
}

// verdictLine is the last line of a screenshot.
func (r Report) verdictLine(style term.Style) string {
	if r.OK {
		return style.Good(fmt.Sprintf("✓ PASSED  A died and came back: %s payments acknowledged, 0 lost, 0 doubled, 0 client errors, both sites equal",
			term.Count(int64(r.Acknowledged)))) + style.Dim(fmt.Sprintf("  (%.0f s, PostgreSQL %s, seed %d)", r.Seconds, r.PostgreSQL, r.Seed))
	}
	return style.Bad("✗ FAILED") + style.Dim(fmt.Sprintf("  (%.0f s, PostgreSQL %s, seed %d)", r.Seconds, r.PostgreSQL, r.Seed))
}

func (k Kept) print(b *strings.Builder) {
	b.WriteString("\nEverything still runs:\n")
	for _, line := range slices.Concat(k.Connect, k.Status, k.Gateways) {
		b.WriteString("  " + line + "\n")
	}
	b.WriteString("End it and remove " + k.Dir + ":\n  " + k.Stop + "\n")
}

func ms(n int64) string { return term.Duration(time.Duration(n) * time.Millisecond) }

func won(n int64) string { return term.Count(n) + " KRW" }

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "NO"
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return term.Count(int64(n)) + " " + what + "s"
}
