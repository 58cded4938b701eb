package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/parity"
	"github.com/duri-io/duri/server"
)

func newCheckCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Compare what must be the same at all sites for open sessions to go on elsewhere",
		Long: `Asks the agents of all sites for the version, locale, extensions, roles, verifiers of passwords (as hashes), settings and types of
each replicated database, and names each line that differs, with what follows for clients at a gateway and what to do.
Gateways do the same every minute, and do not let a session go on at a site where it would notice. Rows are compared by
duri verify. Exit code 0: all is alike; 3: something differs, or a site did not answer.`,
		Example: `  duri check -c seoul/duri.yaml
  duri check -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			c, err := server.NewControl(cfg.DataDir).Check(cmd.Context())
			if err != nil {
				return err
			}
			if err := a.print(c, func(w io.Writer) error { return printCheck(w, c, a.style()) }); err != nil {
				return err
			}
			if text, ok := checkSummary(c); !ok {
				return &term.Error{Msg: text, Code: term.ExitPartial}
			}
			return nil
		},
	}
}

// checkSummary is the result in one sentence; ok: nothing is to be done.
func checkSummary(c server.Check) (text string, ok bool) {
	blocking := 0
	for _, f := range c.Findings {
		if f.Grade != parity.Warning {
			blocking++
		}
	}
	switch {
	case len(c.Findings) == 0 && len(c.Unreachable) == 0:
		return fmt.Sprintf("%s compared: open sessions go on at each of them", count(len(c.Sites), "site")), true
	case blocking > 0:
		return fmt.Sprintf("%s between sites, of which %d keep open sessions from going on elsewhere", count(len(c.Findings), "difference"), blocking), false
	case len(c.Findings) > 0:
		return count(len(c.Findings), "difference") + " between sites, which sessions may notice", false
	}
	return fmt.Sprintf("%s could not be compared", count(len(c.Unreachable), "site")), false
}

// follows says what follows from a finding.
func follows(f parity.Finding) string {
	switch f.Grade {
	case parity.BlocksAll:
		return "no session goes on at the other site"
	case parity.BlocksRole:
		return "no session of " + f.Role + " goes on at the other site"
	case parity.BlocksTypes:
		return "no session that has met them goes on at the other site"
	case parity.Warning:
	}
	return "sessions go on, and may notice"
}

func printCheck(w io.Writer, c server.Check, style term.Style) error {
	var lines []string
	for _, f := range c.Findings {
		mark := style.Bad("✗")
		if f.Grade == parity.Warning {
			mark = style.Warn("!")
		}
		lines = append(lines, fmt.Sprintf("%s %s: %s: %s", mark, f.Database, term.Clean(f.String()), follows(f)), "  hint: "+term.Clean(f.Hint))
	}
	for _, m := range c.Unreachable {
		lines = append(lines, style.Bad("✗")+" "+m.Site+" could not be compared: "+term.Clean(m.Error))
	}
	if text, ok := checkSummary(c); ok {
		lines = append(lines, style.Good("✓")+" "+text)
	}
	_, err := io.WriteString(w, strings.Join(lines, "\n")+"\n")
	return err
}
