package main

import (
	"fmt"
	"io"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/server"
)

func newConflictCmd(a *app) *cobra.Command {
	cmd := noun(&cobra.Command{
		Use:   "conflict",
		Short: "Look at recorded conflicts",
		Example: `  duri conflict list --table public.payment
  duri conflict list --since 2026-11-25T00:00:00Z -o json`,
	})
	cmd.AddCommand(newConflictListCmd(a))
	return cmd
}

func newConflictListCmd(a *app) *cobra.Command {
	var database, table, kind, since string
	var limit int
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List conflicts recorded at this site, newest first",
		Example: `  duri conflict list --kind update_origin_differs
  duri conflict list --limit 1000 -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			if since != "" {
				if _, err := time.Parse(time.RFC3339, since); err != nil {
					return term.Usage(fmt.Sprintf("%q is not a time", since), "use RFC 3339, for example 2026-11-25T12:00:00Z")
				}
			}
			q := url.Values{"limit": {fmt.Sprint(limit)}}
			for name, v := range map[string]string{"database": database, "table": table, "kind": kind, "since": since} {
				if v != "" {
					q.Set(name, v)
				}
			}
			list, err := server.NewControl(cfg.DataDir).Conflicts(cmd.Context(), q)
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) error { return printConflicts(w, list, a.style()) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&database, "database", "", "`name` of the database, when several are replicated")
	f.StringVar(&table, "table", "", "only this `schema.table`")
	f.StringVar(&kind, "kind", "", "only this `kind`, for example update_origin_differs")
	f.StringVar(&since, "since", "", "only newer than this `time` (RFC 3339)")
	f.IntVar(&limit, "limit", 100, "at most this `number`")
	return cmd
}

func printConflicts(w io.Writer, list []catalog.Conflict, style term.Style) error {
	t := term.NewTable("ID", "AT", "KIND", "TABLE", "KEY", "WINNER", "LOSING ROW").Right(0)
	for _, c := range list {
		winner, loser := "remote", c.LocalRow
		if c.Code != "won" {
			winner, loser = "local", c.RemoteRow
		}
		t.Row(c.ID, c.At.UTC().Format(time.RFC3339), c.Kind, c.Schema+"."+c.Table, string(c.Key), winner, shorten(string(loser), 80))
	}
	return t.Write(w, style)
}

// shorten cuts a text for a table cell.
func shorten(s string, cells int) string {
	r := []rune(s)
	if len(r) <= cells {
		return s
	}
	return string(r[:cells-1]) + "…"
}
