package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/server"
	"github.com/duri-io/duri/verify"
)

func newRepairCmd(a *app) *cobra.Command {
	var database string
	var dryRun bool
	req := server.RepairRequest{}
	cmd := &cobra.Command{
		Use:   "repair {--dry-run | --apply}",
		Short: "Make rows equal that differ between the sites",
		Long: `Compares the sites as verify does, decides for each row that differs which site is right, and with --apply writes that
site's row at the other one, with the version that it has, so that it is sent to nobody and loses against every newer
change. Triggers and foreign keys do not run. A row that changes meanwhile is left alone.

Without --from, the site that wrote a row is right about it; of rows written by both sites, the newer one is right. A row
that one site lacks is right unless a later delete is still in the journals. What cannot be decided so is left and
listed: look at both images, and repeat with --from SITE and --table.

Exit code 0: equal; 3: rows still differ; 1: it ended early, and what was done until then is printed.`,
		Example: `  duri repair --dry-run
  duri repair --apply --table public.account --from seoul`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dryRun == req.Apply {
				return term.Usage("duri repair takes either --dry-run or --apply", "begin with --dry-run: it changes nothing")
			}
			cfg, err := a.config()
			if err != nil {
				return err
			}
			if _, ok := cfg.SiteByName(req.From); req.From != "" && !ok {
				var names []string
				for _, s := range cfg.Sites {
					names = append(names, s.Name)
				}
				return term.Usage(fmt.Sprintf("site %q is none of the cluster's%s", req.From, didYouMean(term.Closest(req.From, names))), "sites: "+strings.Join(names, ", "))
			}
			progress := term.NewProgress(a.stderr, "compare", 0, term.Count)
			rep, err := server.NewControl(cfg.DataDir).Repair(cmd.Context(), database, req, func(p verify.Progress) {
				progress.SetTotal(p.RowsTotal)
				progress.Set(p.Rows)
			})
			progress.Finish()
			if err != nil && len(rep.Pairs) == 0 {
				return err
			}
			if perr := a.print(rep, func(w io.Writer) error { return printRepair(w, rep, a.style()) }); err == nil {
				err = perr
			}
			if err != nil {
				return err
			}
			return stillDifferent(rep)
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only tell what would be written")
	cmd.Flags().BoolVar(&req.Apply, "apply", false, "write")
	cmd.Flags().StringArrayVar(&req.Tables, "table", nil, "only this `schema.table`, with * for any characters; may be repeated")
	cmd.Flags().StringVar(&req.From, "from", "", "the `site` whose rows are right, whatever their versions")
	cmd.Flags().StringVar(&database, "database", "", "`name` of the database, when several are replicated")
	return cmd
}

// stillDifferent is the error of a repair that leaves something; nil when all sites are equal.
func stillDifferent(rep server.RepairReport) error {
	left, problems, hint := 0, 0, ""
	for _, p := range rep.Pairs {
		left, problems = left+p.Left, problems+len(p.Problems)
		if hint == "" {
			hint = p.Hint()
		}
	}
	switch {
	case left == 0 && problems == 0:
		return nil
	case left == 0:
		return &term.Error{Msg: fmt.Sprintf("%d tables cannot be repaired", problems), Code: term.ExitPartial}
	}
	return &term.Error{Msg: fmt.Sprintf("%d rows differ", left), Hint: hint, Code: term.ExitPartial}
}

// shownRepairs bounds how many rows are printed; -o json has all.
const shownRepairs = 50

func printRepair(w io.Writer, rep server.RepairReport, style term.Style) error {
	var lines []string
	for _, p := range rep.Pairs {
		if err := printRepairPair(w, p, style); err != nil {
			return err
		}
		for _, x := range p.Problems {
			lines = append(lines, problem(x.Table, x.Error, x.Hint))
		}
		verdict := style.Good(fmt.Sprintf("%s = %s: equal", p.A, p.B))
		switch {
		case p.DryRun && p.Left > 0:
			verdict = style.Warn(fmt.Sprintf("%s = %s: %d rows differ; nothing was written", p.A, p.B, p.Left))
		case !p.Equal():
			verdict = style.Bad(fmt.Sprintf("%s = %s: not equal, %d rows differ", p.A, p.B, p.Left))
		}
		if p.Done > 0 {
			verdict += fmt.Sprintf(", %d rows were made equal", p.Done)
		}
		lines = append(lines, verdict)
	}
	_, err := fmt.Fprintln(w, strings.Join(lines, "\n"))
	return err
}

func printRepairPair(w io.Writer, p verify.RepairReport, style term.Style) error {
	if len(p.Rows) == 0 {
		return nil
	}
	t := term.NewTable("TABLE", "KEY", "DIFFERENCE", "RIGHT", "WHY", "STATE")
	for i, r := range p.Rows {
		if i == shownRepairs {
			break
		}
		state := r.State
		switch r.State {
		case verify.RepairDone:
			state = style.Good(state)
		case verify.RepairLeft:
			state = style.Bad(state) + ": " + term.Clean(r.Reason)
		}
		t.Row(r.Schema+"."+r.Table, shorten(term.Clean(strings.Join(r.Key, ", ")), 40), difference(p, r), orDash(r.Right), orDash(r.Why), state)
	}
	if err := t.Write(w, style); err != nil {
		return err
	}
	if n := len(p.Rows) - shownRepairs; n > 0 {
		if _, err := fmt.Fprintf(w, "... and %d more; -o json has all\n", n); err != nil {
			return err
		}
	}
	for i, r := range p.Rows {
		if i == shownRepairs {
			break
		}
		if err := printImages(w, p, r, style); err != nil {
			return err
		}
	}
	return nil
}

// difference says in few words how a row differs.
func difference(p verify.RepairReport, r verify.RepairedRow) string {
	switch r.Kind {
	case verify.MissingAtA:
		return "missing at " + p.A
	case verify.MissingAtB:
		return "missing at " + p.B
	}
	return strings.Join(r.Columns, ", ")
}

// printImages prints the differing columns of a row side by side, with both versions.
func printImages(w io.Writer, p verify.RepairReport, r verify.RepairedRow, style term.Style) error {
	if r.Kind != verify.Differs {
		return nil
	}
	const cells = 60
	t := term.NewTable("", p.A, p.B)
	t.Row("version", versionText(r.VersionA), versionText(r.VersionB))
	for _, c := range r.Columns {
		t.Row(c, shorten(valueText(r.A[c]), cells), shorten(valueText(r.B[c]), cells))
	}
	if _, err := fmt.Fprintf(w, "\n%s.%s (%s)\n", r.Schema, r.Table, term.Clean(strings.Join(r.Key, ", "))); err != nil {
		return err
	}
	return t.Write(w, style)
}

func versionText(v *verify.RepairVersion) string {
	if v == nil {
		return "not known"
	}
	return v.At.Format(time.RFC3339Nano) + " " + v.Site
}

func valueText(v *string) string {
	if v == nil {
		return "NULL"
	}
	return term.Clean(*v)
}
