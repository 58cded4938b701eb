package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/server"
)

func newConflictShowCmd(a *app) *cobra.Command {
	var database string
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show both images of a conflict side by side, who won, and why",
		Long: `Prints one line per column with the value that was here (local) and the one that arrived (remote); a star marks where
they differ. Long values are cut: -o json has them whole.`,
		Example: `  duri conflict show 4711
  duri conflict show 4711 -o json`,
		Args: oneRecord,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			id, err := recordNumber(args[0])
			if err != nil {
				return err
			}
			d, err := server.NewControl(cfg.DataDir).Conflict(cmd.Context(), database, id)
			if err != nil {
				return err
			}
			return a.print(d, func(w io.Writer) error { return printConflict(w, d, a.style()) })
		},
	}
	databaseFlag(cmd, &database)
	return cmd
}

func printConflict(w io.Writer, d server.ConflictDetail, style term.Style) error {
	title := fmt.Sprintf("conflict %d: %s in %s.%s %s, recorded %s", d.ID, d.Kind, d.Schema, d.Table, d.Key, instant(d.At))
	if d.Kind == "" {
		title = fmt.Sprintf("record %d (%s, no conflict) in %s.%s %s, recorded %s", d.ID, d.Code, d.Schema, d.Table, d.Key, instant(d.At))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%s\n\n", style.Bold(term.Clean(title)), term.Clean(d.Verdict.Text))
	b.WriteString(sideBySide(d, style))
	facts := term.NewTable()
	facts.Row("remote", d.OriginName, instant(d.RemoteTime), fmt.Sprintf("transaction %d at %s, change %d", d.OriginXID, d.OriginLSN, d.Change))
	if d.LocalTime != nil {
		facts.Row("local", orDash(d.LocalName), instant(*d.LocalTime))
	}
	b.WriteString("\n")
	if err := facts.Write(&b, style); err != nil {
		return err
	}
	if _, _, ok := d.Losing(); ok && d.Kind != "" {
		fmt.Fprintf(&b, "\n%s\n", style.Dim(fmt.Sprintf("to bring the losing row back: duri conflict restore %d --dry-run", d.ID)))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// instant prints a time with all of its microseconds, on which versions may depend.
func instant(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000000Z") }

// sideBySide is the table of the images; lines that differ are coloured as a whole.
func sideBySide(d server.ConflictDetail, style term.Style) string {
	head := func(side catalog.Side, name string, gone bool) string {
		h := strings.TrimSpace(strings.ToUpper(string(side)) + " " + name)
		if d.Verdict.Winner == side {
			h += ", won"
		}
		if gone {
			h += " (no row)"
		}
		return h
	}
	t := term.NewTable("", "COLUMN", head(catalog.Local, d.LocalName, d.LocalRow == nil), head(catalog.Remote, d.OriginName, d.RemoteRow == nil))
	for _, c := range d.Columns {
		local, remote := cells(c)
		mark := ""
		if c.Differs {
			mark = "*"
		}
		t.Row(mark, c.Column, local, remote)
	}
	var plain bytes.Buffer
	if err := t.Write(&plain, term.Style{}); err != nil { // a buffer takes everything
		return ""
	}
	lines := strings.Split(strings.TrimSuffix(plain.String(), "\n"), "\n")
	for i := range lines {
		switch {
		case i == 0:
			lines[i] = style.Bold(lines[i])
		case d.Columns[i-1].Differs:
			lines[i] = style.Warn(lines[i])
		}
	}
	return strings.Join(lines, "\n") + "\n"
}

// cellMax is how many characters of a value are shown.
const cellMax = 50

// cells gives both values of a column for the table. Of long values that differ, what is alike before the difference is
// left out.
func cells(c catalog.ColumnPair) (local, remote string) {
	local, remote = value(c.Local), value(c.Remote)
	l, r := []rune(local), []rune(remote)
	if c.Differs && max(len(l), len(r)) > cellMax {
		alike := 0
		for alike < min(len(l), len(r)) && l[alike] == r[alike] {
			alike++
		}
		const before = 10 // that stays, to recognise the place
		if cut := alike - before; cut > before {
			local, remote = "…"+string(l[cut:]), "…"+string(r[cut:])
		}
	}
	return shorten(local, cellMax), shorten(remote, cellMax)
}

// value prints a value of an image: NULL, and texts that look like one of its words in quotes.
func value(doc json.RawMessage) string {
	if len(doc) == 0 {
		return "-"
	}
	var s *string
	if err := json.Unmarshal(doc, &s); err != nil {
		return string(doc)
	}
	switch {
	case s == nil:
		return "NULL"
	case *s == "", *s == "NULL", *s == "-":
		return "'" + *s + "'"
	}
	return *s
}
