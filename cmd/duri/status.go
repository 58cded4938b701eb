package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/server"
	"github.com/duri-io/duri/verify"
)

func newStatusCmd(a *app) *cobra.Command {
	var watch bool
	var interval time.Duration
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Tell in one sentence and a table how the cluster is",
		Long: `Asks the agent of this site, and through it the other sites' agents. The exit code tells health: 0 all is well,
3 something needs attention, 4 the agent of this site does not answer.`,
		Example: `  duri status -c seoul/duri.yaml
  duri status -w`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			control := server.NewControl(cfg.DataDir)
			if watch {
				return a.watchStatus(cmd.Context(), control, interval)
			}
			s, err := control.Status(cmd.Context())
			if err != nil {
				return err
			}
			if err := a.print(s, func(w io.Writer) error { return printStatus(w, s, a.style()) }); err != nil {
				return err
			}
			if text, ok := summary(s); !ok {
				return &term.Error{Msg: text, Code: term.ExitPartial}
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "print again and again until interrupted")
	cmd.Flags().DurationVar(&interval, "interval", 2*time.Second, "`time` between two prints with --watch")
	return cmd
}

// watchStatus prints until ctx ends. An agent that does not answer is shown and asked again.
func (a *app) watchStatus(ctx context.Context, c *server.Control, interval time.Duration) error {
	t := time.NewTicker(max(interval, 100*time.Millisecond))
	defer t.Stop()
	for {
		s, err := c.Status(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			term.PrintError(a.stderr, err, term.StyleFor(a.stderr, a.noColour))
		default:
			if term.IsTerminal(a.stdout) && !a.json() {
				fmt.Fprint(a.stdout, "\x1b[H\x1b[2J")
			}
			if err := a.print(s, func(w io.Writer) error { return printStatus(w, s, a.style()) }); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// summary is the one sentence, and whether all is well.
func summary(s server.ClusterStatus) (string, bool) {
	var bad []string
	for _, m := range s.Unreachable {
		bad = append(bad, fmt.Sprintf("site %s does not answer", m.Site))
	}
	conflicts := int64(0)
	worst := 0.0
	for _, site := range s.Sites {
		if d := site.Durability; d != nil && !reassuring(*d) {
			bad = append(bad, fmt.Sprintf("%s: %s", site.Site, d.Guarantee))
		}
		for _, d := range site.Databases {
			if d.Health != server.HealthOK {
				why := d.State
				switch {
				case d.Problem != nil:
					why = "has a problem"
				case len(d.Gaps) > 0 && d.Gaps[0].Peer == site.Site:
					why = "is re-synchronising from " + d.Gaps[0].Origin
				case len(d.Gaps) > 0:
					why = "has a gap towards " + d.Gaps[0].Peer
				case tight(d.Budget):
					why = "uses up its journal.budget"
				case tight(d.WALBudget):
					why = "holds too much WAL"
				}
				bad = append(bad, fmt.Sprintf("database %s at %s %s", d.Name, site.Site, why))
			}
			for _, v := range d.Verify {
				if n, more := differing(v); n > 0 {
					bad = append(bad, fmt.Sprintf("%s%d rows differ between %s and %s", more, n, site.Site, v.Peer))
				}
			}
			for _, l := range d.Links {
				conflicts += l.Apply.Conflicts
				worst = max(worst, l.LagS)
				if l.Health != server.HealthOK {
					bad = append(bad, fmt.Sprintf("%s -> %s %s", l.From, site.Site, l.Health))
				}
			}
		}
	}
	if len(bad) > 0 {
		return "needs attention: " + strings.Join(bad, "; "), false
	}
	return fmt.Sprintf("%d sites, all writable, connected both ways, lag %.1f s, %d conflicts recorded since the agents started", len(s.Sites), worst, conflicts), true
}

func printStatus(w io.Writer, s server.ClusterStatus, style term.Style) error {
	text, ok := summary(s)
	if ok {
		text = style.Good(text)
	} else {
		text = style.Bad(text)
	}
	if _, err := fmt.Fprintln(w, text); err != nil {
		return err
	}
	for _, site := range s.Sites {
		if d := site.Durability; d != nil {
			if _, err := fmt.Fprintf(w, "%s: %s (epoch %d, %s)\n", site.Site, d.Guarantee, d.Register.Epoch, d.Mode); err != nil {
				return err
			}
		}
		if g := site.Gateway; g != nil && g.Draining {
			if _, err := fmt.Fprintf(w, "%s: drained: no new transactions of clients, as long as another site takes them; %d connections left\n", site.Site, g.Connections); err != nil {
				return err
			}
			if who := staying(g.Staying, g.LeaveInS); who != "" {
				if _, err := fmt.Fprintf(w, "%s: %s\n", site.Site, who); err != nil {
					return err
				}
			}
		}
	}
	t := term.NewTable("DATABASE", "FROM", "TO", "STATE", "LAG", "BEHIND", "APPLIED", "CONFLICTS", "JOURNAL").Right(4, 5, 6, 7, 8)
	var problems []string
	for _, site := range s.Sites {
		problems = append(problems, registerProblems(site)...)
		for _, d := range site.Databases {
			if d.Problem != nil {
				problems = append(problems, problem(d.Name+" at "+site.Site, d.Problem.Text, d.Problem.Hint))
			}
			for _, g := range d.Gaps {
				problems = append(problems, gap(d.Name+" at "+site.Site, site.Site, g))
			}
			problems = append(problems, room(d.Name+" at "+site.Site, d)...)
			for _, v := range d.Verify {
				problems = append(problems, differences(site.Site, v)...)
			}
			problems = append(problems, setAside(site.Site, d)...)
			for _, l := range d.Links {
				t.Row(d.Name, l.From, site.Site, linkState(d, l, style), fmt.Sprintf("%.1f s", l.LagS), term.Size(l.LagBytes),
					term.Count(l.Apply.Transactions), term.Count(l.Apply.Conflicts), term.Size(l.Received.Bytes))
				if l.Problem != nil {
					problems = append(problems, problem(l.From+" -> "+site.Site, l.Problem.Text, l.Problem.Hint))
				}
			}
		}
	}
	if err := t.Write(w, style); err != nil {
		return err
	}
	for _, m := range s.Unreachable {
		problems = append(problems, problem(m.Site, m.Error, ""))
	}
	for _, p := range problems {
		if _, err := fmt.Fprintln(w, p); err != nil {
			return err
		}
	}
	return nil
}

// differing counts the rows that the comparison in the background has found; more says that there may be others.
func differing(v verify.WatchStatus) (rows int, more string) {
	for _, f := range v.Found {
		rows += f.Rows
		if f.More {
			more = "more than "
		}
	}
	return rows, more
}

// differences are the lines about what the comparison in the background has found. Why it is paused or fails is told by
// the links; here it is worth a line only when nothing has been compared for long.
func differences(site string, v verify.WatchStatus) []string {
	var out []string
	for _, f := range v.Found {
		out = append(out, problem(site+" = "+v.Peer, fmt.Sprintf("%s, found at %s", f, f.First.Format(time.RFC3339)), "see what would be done with `duri repair --dry-run`"))
	}
	if v.Problem != "" {
		out = append(out, problem(site+" = "+v.Peer, "cannot compare in the background: "+v.Problem, v.Hint))
	}
	return out
}

// setAside are the lines about rows that are well kept and still want somebody to look: those that lost their parent, and
// those that a unique value hides.
func setAside(site string, d server.DatabaseStatus) []string {
	var out []string
	subject := d.Name + " at " + site
	for _, c := range d.ForeignKeys.Constraints {
		if c.Orphans > 0 {
			out = append(out, problem(subject, fmt.Sprintf("%s of %s without a parent in %s (constraint %s, policy %s)", count(c.Orphans, "row"), c.Child, c.Parent, c.Name, c.Policy),
				"they are in duri.orphan; delete them or insert their parents, or declare what becomes of such rows with duri.set_policy"))
		}
	}
	if d.ForeignKeys.LastError != "" {
		out = append(out, problem(subject, "cannot look for rows without a parent: "+d.ForeignKeys.LastError, "it is tried again by itself"))
	}
	for _, t := range d.ParkedTables {
		out = append(out, problem(subject, fmt.Sprintf("%s of %s hidden at every site, as newer rows have unique values of theirs", count(t.Rows, "row"), t.Table),
			"they are in duri.parked, and come back when the newer rows are deleted or get other values"))
	}
	return out
}

// tight reports that a budget needs attention.
func tight(b *server.BudgetStatus) bool { return b != nil && b.Level != server.LevelOK }

// gap is the line about a hole between two sites.
func gap(subject, site string, g server.GapStatus) string {
	text, hint := g.Sentence(site), "nothing is to be done: it re-synchronises by itself when it is back"
	if site == g.Peer {
		hint = "wait: it comes back by itself when all rows are equal"
	}
	if g.Problem != nil {
		text, hint = text+"; "+g.Problem.Text, g.Problem.Hint
	}
	return problem(subject, text, hint)
}

// room are the lines about budgets that are nearly used up.
func room(subject string, d server.DatabaseStatus) (out []string) {
	if tight(d.Budget) {
		out = append(out, problem(subject, d.Budget.Level+": "+d.Budget.Sentence(server.JournalsUsed), "bring back what is named, or raise journal.budget; at 95 % journal.full decides"))
	}
	if tight(d.WALBudget) {
		out = append(out, problem(subject, d.WALBudget.Level+": "+d.WALBudget.Sentence(server.WALUsed),
			"beyond the bound PostgreSQL drops WAL that the other sites need: let decoding go on, or raise max_slot_wal_keep_size"))
	}
	return out
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func problem(subject, text, hint string) string {
	s := subject + ": " + term.Clean(text)
	if hint != "" {
		s += "\n  hint: " + hint
	}
	return s
}

func linkState(d server.DatabaseStatus, l server.LinkStatus, style term.Style) string {
	switch {
	case d.State != "ready":
		return style.Warn(d.State)
	case l.Apply.LastError != "":
		return style.Bad("held")
	case !l.Connected:
		return style.Bad("disconnected")
	case l.Health == server.HealthDown:
		return style.Bad("held")
	case l.Health != server.HealthOK:
		return style.Warn(l.Health)
	}
	return style.Good("streaming")
}
