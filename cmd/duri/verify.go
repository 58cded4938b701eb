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

func newVerifyCmd(a *app) *cobra.Command {
	var database string
	req := server.VerifyRequest{}
	cmd := &cobra.Command{
		Use:   "verify [schema.table ...]",
		Short: "Compare the sites row by row",
		Long: `Compares all replicated tables, or those named, between this site and another one: hashes of key ranges, computed
in PostgreSQL, then the rows of ranges that differ. Rows in flight are looked at again and told apart from real
differences. Nothing is locked and no snapshot is held. Where there are three sites or more, --with names the other one; run it
once for each. Exit code 0: equal; 3: not equal.`,
		Example: `  duri verify
  duri verify --with daegu
  duri verify public.payment -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			req.Tables = args
			progress := term.NewProgress(a.stderr, "verify", 0, term.Count)
			rep, err := server.NewControl(cfg.DataDir).Verify(cmd.Context(), database, req, func(p verify.Progress) {
				progress.SetTotal(p.RowsTotal)
				progress.Set(p.Rows)
			})
			progress.Finish()
			if err != nil {
				return err
			}
			if err := a.print(rep, func(w io.Writer) error { return printReport(w, rep, a.style()) }); err != nil {
				return err
			}
			if !rep.Equal {
				return &term.Error{Msg: "the sites are not equal", Code: term.ExitPartial}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&database, "database", "", "`name` of the database, when several are replicated")
	cmd.Flags().StringVar(&req.With, "with", "", "`site` to compare with, when there are several others")
	cmd.Flags().IntVar(&req.Parallel, "parallel", 2, "`number` of ranges compared at the same time")
	return cmd
}

// shownDifferences bounds how many differing rows of a table are printed; -o json has all that were listed.
const shownDifferences = 10

func printReport(w io.Writer, r verify.Report, style term.Style) error {
	t := term.NewTable("TABLE", "RESULT", "ROWS "+strings.ToUpper(r.A), "ROWS "+strings.ToUpper(r.B), "DIFFER", "IN FLIGHT").Right(2, 3, 4, 5)
	var lines []string
	for _, x := range r.Tables {
		name, result := x.Schema+"."+x.Table, style.Good("equal")
		if !x.Equal {
			result = style.Bad("not equal")
		}
		t.Row(name, result, term.Count(x.RowsA), term.Count(x.RowsB), term.Count(int64(x.DifferenceCount)), term.Count(int64(x.InFlight)))
		lines = append(lines, details(name, x)...)
	}
	if err := t.Write(w, style); err != nil {
		return err
	}
	for _, x := range r.OnlyA {
		lines = append(lines, x+" exists only at "+r.A)
	}
	for _, x := range r.OnlyB {
		lines = append(lines, x+" exists only at "+r.B)
	}
	verdict := style.Good("the sites are equal")
	if !r.Equal {
		verdict = style.Bad("the sites are not equal")
	}
	lines = append(lines, fmt.Sprintf("%s: %s rows of %d tables compared in %s (%s rows/s)", verdict, term.Count(r.Rows), len(r.Tables),
		term.Duration(time.Duration(r.Seconds*float64(time.Second))), term.Count(int64(r.RowsPerSecond))))
	_, err := fmt.Fprintln(w, strings.Join(lines, "\n"))
	return err
}

// details are the lines below the table for what is not as it should be.
func details(name string, x verify.TableReport) []string {
	var out []string
	if x.Error != "" {
		out = append(out, problem(name, x.Error, x.Hint))
	}
	for _, c := range x.Columns {
		out = append(out, fmt.Sprintf("%s: column %s is %q at one site and %q at the other", name, c.Column, c.TypeA, c.TypeB))
	}
	for i, d := range x.Differences {
		if i == shownDifferences {
			out = append(out, fmt.Sprintf("%s: ... and %d more", name, x.DifferenceCount-i))
			break
		}
		line := fmt.Sprintf("%s: %s %s", name, strings.ReplaceAll(string(d.Kind), "_", " "), term.Clean(strings.Join(d.Key, ", ")))
		if len(d.Columns) > 0 {
			line += " in " + strings.Join(d.Columns, ", ")
		}
		out = append(out, line)
	}
	return out
}
