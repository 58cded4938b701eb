package main

import (
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/server"
)

func newConflictCmd(a *app) *cobra.Command {
	cmd := noun(&cobra.Command{
		Use:   "conflict",
		Short: "Look at recorded conflicts, and bring losing rows back",
		Example: `  duri conflict list --table public.payment
  duri conflict show 4711`,
	})
	cmd.AddCommand(newConflictListCmd(a), newConflictShowCmd(a), newConflictStatsCmd(a), newConflictRestoreCmd(a))
	return cmd
}

// conflictFlags choose records, for list and stats.
type conflictFlags struct {
	database, table, kind, code, origin, since, until string
	keys                                              []string
	exceptions                                        bool
}

func (f *conflictFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	databaseFlag(cmd, &f.database)
	flags.StringVar(&f.table, "table", "", "only this `schema.table`")
	flags.StringVar(&f.kind, "kind", "", "only this `kind`, for example update_origin_differs")
	flags.StringVar(&f.code, "code", "", "only this `outcome` of the incoming change: won, lost, ...")
	flags.StringVar(&f.origin, "origin", "", "only changes that came from this `site`")
	flags.StringArrayVar(&f.keys, "key", nil, "only rows with this `value` in their key, or COLUMN=VALUE; may be repeated")
	flags.StringVar(&f.since, "since", "", "only those recorded at this `time` (RFC 3339) or later, or within a duration such as 24h or 7d")
	flags.StringVar(&f.until, "until", "", "only those recorded before this `time`, likewise")
	flags.BoolVar(&f.exceptions, "exceptions", false, "also what is no conflict: superseded and filled changes")
	mustComplete(cmd.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions([]string{
		string(conflict.InsertExists), string(conflict.UpdateOriginDiffers), string(conflict.UpdateMissing),
		string(conflict.UpdateDeleted), string(conflict.DeleteOriginDiffers), string(conflict.DeleteMissing),
	}, cobra.ShellCompDirectiveNoFileComp)))
	mustComplete(cmd.RegisterFlagCompletionFunc("code", cobra.FixedCompletions([]string{
		string(conflict.Won), string(conflict.Lost), string(conflict.Superseded), string(conflict.Filled),
	}, cobra.ShellCompDirectiveNoFileComp)))
}

func databaseFlag(cmd *cobra.Command, database *string) {
	cmd.Flags().StringVar(database, "database", "", "`name` of the database, when several are replicated")
}

// query gives the request of the flags. Durations count back from now.
func (f *conflictFlags) query(cfg *config.Config, now time.Time) (url.Values, error) {
	q := url.Values{"key": f.keys}
	for name, v := range map[string]string{"database": f.database, "table": f.table, "kind": f.kind, "code": f.code, "origin": f.origin} {
		if v != "" {
			q.Set(name, v)
		}
	}
	if f.origin != "" {
		if _, ok := cfg.SiteByName(f.origin); !ok {
			var names []string
			for _, s := range cfg.Sites {
				names = append(names, s.Name)
			}
			return nil, term.Usage(fmt.Sprintf("site %q is none of the cluster's%s", f.origin, didYouMean(term.Closest(f.origin, names))), "sites: "+strings.Join(names, ", "))
		}
	}
	for name, v := range map[string]string{"since": f.since, "until": f.until} {
		if v == "" {
			continue
		}
		t, err := moment(v, now)
		if err != nil {
			return nil, err
		}
		q.Set(name, t.Format(time.RFC3339Nano))
	}
	if f.exceptions {
		q.Set("exceptions", "true")
	}
	return q, nil
}

// moment reads a time, or a duration before now.
func moment(s string, now time.Time) (time.Time, error) {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	if d, err := config.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d.Std()).UTC(), nil
	}
	return time.Time{}, term.Usage(fmt.Sprintf("%q is not a time", s), "use RFC 3339, for example 2026-11-25T12:00:00Z, or a duration before now, for example 24h")
}

func newConflictListCmd(a *app) *cobra.Command {
	var flags conflictFlags
	var limit int
	var before string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List conflicts recorded at this site, newest first",
		Example: `  duri conflict list --kind update_origin_differs --since 24h
  duri conflict list --table public.payment --key id=7 -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			q, err := flags.query(cfg, time.Now())
			if err == nil && before != "" {
				_, err = recordNumber(before)
				q.Set("before", before)
			}
			if err == nil && limit < 1 {
				err = term.Usagef("--limit %d is less than 1", limit)
			}
			if err != nil {
				return err
			}
			q.Set("limit", strconv.Itoa(limit))
			list, err := server.NewControl(cfg.DataDir).Conflicts(cmd.Context(), q)
			if err != nil {
				return err
			}
			if err := a.print(list, func(w io.Writer) error { return printConflicts(w, list, a.style()) }); err != nil {
				return err
			}
			if len(list) == limit && !a.json() {
				a.hint(fmt.Sprintf("older ones: the same with --before %d", list[limit-1].ID))
			}
			return nil
		},
	}
	flags.register(cmd)
	cmd.Flags().IntVar(&limit, "limit", 100, "at most this `number`")
	cmd.Flags().StringVar(&before, "before", "", "the next page: those that follow the record of this `number`")
	return cmd
}

// hint writes advice that goes with what was printed.
func (a *app) hint(text string) {
	fmt.Fprintln(a.stderr, term.StyleFor(a.stderr, a.noColour).Dim("hint:")+" "+text)
}

// recordNumber reads the number of a record.
func recordNumber(s string) (int64, error) {
	id, err := strconv.ParseInt(s, 10, 64)
	if err != nil || id < 1 {
		return 0, term.Usage(fmt.Sprintf("%q is not the number of a record", s), "`duri conflict list` shows the numbers")
	}
	return id, nil
}

// oneRecord is the Args of a command about one record.
func oneRecord(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return term.Usage(cmd.CommandPath()+" takes one argument, the number of a record", "`duri conflict list` shows the numbers")
	}
	_, err := recordNumber(args[0])
	return err
}

func printConflicts(w io.Writer, list []catalog.Conflict, style term.Style) error {
	t := term.NewTable("ID", "AT", "KIND", "TABLE", "KEY", "WINNER", "LOSING ROW").Right(0)
	for _, c := range list {
		loser, deleted, _ := c.Losing()
		text := string(loser)
		if deleted {
			text = "(delete)"
		}
		t.Row(c.ID, c.At.UTC().Format(time.RFC3339), orDash(c.Kind), c.Schema+"."+c.Table, string(c.Key), orDash(string(c.Winner())), shorten(text, 80))
	}
	return t.Write(w, style)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// shorten cuts a text for a table cell.
func shorten(s string, cells int) string {
	r := []rune(s)
	if len(r) <= cells {
		return s
	}
	return string(r[:cells-1]) + "…"
}

func newConflictStatsCmd(a *app) *cobra.Command {
	var flags conflictFlags
	cmd := &cobra.Command{
		Use:   "stats",
		Short: "Count the conflicts recorded at this site by table, kind and outcome",
		Example: `  duri conflict stats --since 24h
  duri conflict stats --table public.payment -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			q, err := flags.query(cfg, time.Now())
			if err != nil {
				return err
			}
			s, err := server.NewControl(cfg.DataDir).ConflictStats(cmd.Context(), q)
			if err != nil {
				return err
			}
			return a.print(s, func(w io.Writer) error { return printConflictStats(w, s, a.style(), term.IsTerminal(a.stdout)) })
		},
	}
	flags.register(cmd)
	return cmd
}

// printConflictStats prints the counts and their sum; with bars, each row has one.
func printConflictStats(w io.Writer, s catalog.ConflictStats, style term.Style, bars bool) error {
	t := term.NewTable("TABLE", "KIND", "OUTCOME", "COUNT", "FIRST", "LAST").Right(3)
	var first, last time.Time
	for _, c := range s.Counts {
		row := []any{c.Schema + "." + c.Table, orDash(c.Kind), orDash(c.Code), term.Count(c.Count), second(c.First), second(c.Last)}
		if bars {
			row = append(row, bar(c.Count, s.Counts[0].Count))
		}
		t.Row(row...)
		if first.IsZero() || c.First.Before(first) {
			first = c.First
		}
		if c.Last.After(last) {
			last = c.Last
		}
	}
	if s.Total > 0 {
		t.Row("total", "", "", term.Count(s.Total), second(first), second(last))
	} else {
		t.Row("total", "", "", term.Count(s.Total))
	}
	return t.Write(w, style)
}

func second(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// barMax is the length of the longest bar in cells.
const barMax = 20

// bar draws n of most in eighths of a cell, at least one of them.
func bar(n, most int64) string {
	if n <= 0 || most <= 0 {
		return ""
	}
	eighths := max(1, int(float64(n)/float64(most)*barMax*8+0.5))
	s := strings.Repeat("█", eighths/8)
	if rest := eighths % 8; rest > 0 {
		s += string([]rune("▏▎▍▌▋▊▉")[rest-1])
	}
	return s
}
