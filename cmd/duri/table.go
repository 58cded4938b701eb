package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/server"
)

func newTableCmd(a *app) *cobra.Command {
	cmd := noun(&cobra.Command{
		Use:   "table",
		Short: "See how tables are replicated and what is declared for them",
		Example: `  duri table list
  duri table show public.account`,
	})
	cmd.AddCommand(newTableListCmd(a), newTableShowCmd(a))
	return cmd
}

func newTableListCmd(a *app) *cobra.Command {
	var database string
	var partitions bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the tables of a database",
		Example: `  duri table list
  duri table list --partitions -o json`,
		Long: "Each table with its key, its replica identity, its declared policy, foreign keys, unique constraints\n" +
			"besides the key, an estimate of its rows, and the conflicts that this site recorded in the last 24 hours.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := a.tables(cmd, database)
			if err != nil {
				return err
			}
			if !partitions {
				list = slices.DeleteFunc(list, func(t catalog.Table) bool { return t.PartitionOf != "" })
			}
			return a.print(list, func(w io.Writer) error { return printTables(w, list, a.style()) })
		},
	}
	cmd.Flags().StringVar(&database, "database", "", "`name` of the database, when several are replicated")
	cmd.Flags().BoolVar(&partitions, "partitions", false, "partitions too, each on its own")
	return cmd
}

func newTableShowCmd(a *app) *cobra.Command {
	var database string
	cmd := &cobra.Command{
		Use:   "show NAME",
		Short: "Show all about one table, with hints",
		Example: `  duri table show public.account
  duri table show account -o json`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return nil
			}
			return term.Usage(cmd.CommandPath()+" takes one argument, the name of a table", "see: duri table list")
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			list, err := a.tables(cmd, database)
			if err != nil {
				return err
			}
			t, err := pickTable(list, args[0])
			if err != nil {
				return err
			}
			return a.print(t, func(w io.Writer) error { return printTable(w, t, a.style()) })
		},
	}
	cmd.Flags().StringVar(&database, "database", "", "`name` of the database, when several are replicated")
	return cmd
}

// tables asks the agent.
func (a *app) tables(cmd *cobra.Command, database string) ([]catalog.Table, error) {
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	return server.NewControl(cfg.DataDir).Tables(cmd.Context(), database)
}

// pickTable finds a table by schema.table, or by its name alone where that is enough.
func pickTable(list []catalog.Table, name string) (catalog.Table, error) {
	var found, names []string
	var table catalog.Table
	for _, t := range list {
		full := t.FullName().String()
		names = append(names, full)
		if n, err := policy.ParseName(name); err == nil && n == t.FullName() {
			return t, nil
		}
		if t.Name == name {
			found, table = append(found, full), t
		}
	}
	switch len(found) {
	case 0:
		return table, &term.Error{
			Op: "show table " + name, Msg: "there is no such table" + didYouMean(cmp.Or(term.Closest(name, names), closestTable(list, name))),
			Hint: "see: duri table list",
		}
	case 1:
		return table, nil
	}
	return table, &term.Error{Op: "show table " + name, Msg: "there are several: " + strings.Join(found, ", "), Hint: "name one of them"}
}

// closestTable is for names without a schema.
func closestTable(list []catalog.Table, name string) string {
	var names []string
	for _, t := range list {
		names = append(names, t.Name)
	}
	return term.Closest(name, names)
}

func printTables(w io.Writer, list []catalog.Table, style term.Style) error {
	t := term.NewTable("TABLE", "REPLICATED", "KEY", "IDENTITY", "MODE", "DELTA", "FOREIGN KEYS", "UNIQUE", "ROWS", "CONFLICTS 24H").Right(8, 9)
	for _, x := range list {
		replicated := "yes"
		if !x.Replicated {
			replicated = "no: " + x.Why
		}
		key := "none"
		if len(x.Key) > 0 {
			key = strings.Join(x.Key, ", ")
		}
		t.Row(x.FullName(), replicated, key, x.Identity, x.Mode, strings.Join(x.Delta, ", "), foreignKeys(x), uniques(x), x.Rows, x.Conflicts)
	}
	return t.Write(w, style)
}

// foreignKeys shortens the foreign keys of a table for a cell: names, and policies that are not the default.
func foreignKeys(t catalog.Table) string {
	var out []string
	for _, k := range t.ForeignKeys {
		text := k.Name
		if k.Orphans != policy.Report {
			text += " (" + string(k.Orphans) + ")"
		}
		if k.Open > 0 {
			text += fmt.Sprintf(" %d orphans", k.Open)
		}
		out = append(out, text)
	}
	return shorten(strings.Join(out, ", "), 60)
}

func uniques(t catalog.Table) string {
	var out []string
	for _, u := range t.Uniques {
		text := u.Name
		if !u.Parkable {
			text += " (stops)"
		}
		out = append(out, text)
	}
	return shorten(strings.Join(out, ", "), 60)
}

// printTable prints all about a table.
func printTable(w io.Writer, t catalog.Table, style term.Style) error {
	if _, err := fmt.Fprintln(w, style.Bold(term.Clean(t.FullName().String()))); err != nil {
		return err
	}
	facts := term.NewTable()
	for _, f := range tableFacts(t) {
		facts.Row("", f[0], f[1])
	}
	if err := facts.Write(w, style); err != nil {
		return err
	}
	fks := term.NewTable("", "FOREIGN KEY", "COLUMNS", "REFERENCES", "MATCH", "ORPHANS", "OPEN").Right(6)
	for _, k := range t.ForeignKeys {
		orphans := string(k.Orphans)
		if !k.Checked {
			orphans = "not checked: the constraint is not valid"
		}
		fks.Row("", k.Name, strings.Join(k.Columns, ", "), fmt.Sprintf("%s (%s)", k.References, strings.Join(k.Referenced, ", ")), k.Match, orphans, k.Open)
	}
	uniques := term.NewTable("", "UNIQUE", "DEFINITION", "ON COLLISION")
	for _, u := range t.Uniques {
		collision := "the lesser version is parked"
		if !u.Parkable {
			collision = "apply stops: " + u.Why
		}
		uniques.Row("", u.Name, u.Definition, collision)
	}
	for _, section := range []*term.Table{fks, uniques} {
		if section.Len() == 0 {
			continue
		}
		if _, err := fmt.Fprintln(w); err != nil {
			return err
		}
		if err := section.Write(w, style); err != nil {
			return err
		}
	}
	return printNotes(w, t.Notes, style)
}

// tableFacts are the lines of a table's description.
func tableFacts(t catalog.Table) [][2]string {
	replicated := "yes"
	if !t.Replicated {
		replicated = "no: " + t.Why
	}
	key := t.KeySource
	if len(t.Key) > 0 {
		key = strings.Join(t.Key, ", ") + " (" + t.KeySource + ")"
	}
	declared := map[string]string{"default": "nowhere: the default", "sql": "duri.set_policy", "duri.yaml": "duri.yaml"}[t.PolicySource]
	if t.Overridden {
		declared += "; what duri.set_policy declares does not count"
	}
	out := [][2]string{{"replicated", replicated}}
	if t.PartitionOf != "" {
		out = append(out, [2]string{"partition of", t.PartitionOf})
	}
	return append(out, [][2]string{
		{"key", key},
		{"replica identity", t.Identity},
		{"mode", string(t.Mode)},
		{"delta columns", cmp.Or(strings.Join(t.Delta, ", "), "none")},
		{"declared by", declared},
		{"rows", fmt.Sprintf("about %d", t.Rows)},
		{"conflicts", fmt.Sprintf("%d in the last 24 hours at this site", t.Conflicts)},
	}...)
}

func printNotes(w io.Writer, notes []catalog.Note, style term.Style) error {
	for _, n := range notes {
		text := "\n" + style.Warn("note:") + " " + term.Clean(n.Text) + "\n"
		if n.Hint != "" {
			text += style.Dim("hint:") + " " + term.Clean(n.Hint) + "\n"
		}
		if _, err := io.WriteString(w, text); err != nil {
			return err
		}
	}
	return nil
}
