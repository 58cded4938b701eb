package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"strings"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/server"
)

// restoreFlags are the flags of duri conflict restore.
type restoreFlags struct {
	database           string
	dryRun, force, yes bool
}

func newConflictRestoreCmd(a *app) *cobra.Command {
	var f restoreFlags
	cmd := &cobra.Command{
		Use:   "restore ID",
		Short: "Bring the losing row of a conflict back, as a new change that wins everywhere",
		Long: `Writes the losing image as an ordinary transaction of this site: the row is updated, made again, or, where the losing
change was a delete, deleted. Triggers and foreign keys run as for any client, and the change goes to the other sites.
A row that was changed since the conflict is left alone (exit code 5) unless --force is given. Restoring twice changes
nothing. What is done is written into duri.event.

On a terminal the name of this site has to be typed; a script gives --yes.`,
		Example: `  duri conflict restore 4711 --dry-run
  duri conflict restore 4711 --yes -o json`,
		Args: oneRecord,
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := recordNumber(args[0])
			if err != nil {
				return err
			}
			return a.restore(cmd, id, f)
		},
	}
	databaseFlag(cmd, &f.database)
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "only print the SQL")
	cmd.Flags().BoolVar(&f.force, "force", false, "also when the row was changed since, or the losing image is not complete")
	cmd.Flags().BoolVar(&f.yes, "yes", false, "do not ask")
	return cmd
}

func (a *app) restore(cmd *cobra.Command, id int64, f restoreFlags) error {
	cfg, err := a.config()
	if err != nil {
		return err
	}
	in, control := cmd.InOrStdin(), server.NewControl(cfg.DataDir)
	if !f.dryRun && !f.yes && !interactive(in) {
		return term.Usage("duri conflict restore changes a row at every site and asks first, but there is no terminal",
			"add --yes, or --dry-run to see what it would do")
	}
	req := server.RestoreRequest{DryRun: f.dryRun || !f.yes, Force: f.force, By: whoami()}
	r, err := control.Restore(cmd.Context(), f.database, id, req)
	if err == nil && !f.dryRun && !f.yes && r.Action != catalog.ActionNone {
		if err = printRestoration(a.stderr, r); err == nil {
			err = confirm(in, a.stderr, cfg.Site)
		}
		if err == nil {
			req.DryRun = false
			r, err = control.Restore(cmd.Context(), f.database, id, req)
		}
	}
	if err != nil {
		return err
	}
	return a.print(r, func(w io.Writer) error { return printRestoration(w, r) })
}

// interactive reports whether somebody can be asked.
func interactive(in io.Reader) bool {
	f, ok := in.(*os.File)
	return ok && term.IsTerminal(f)
}

// confirm asks for the name of the site, which nobody types by accident.
func confirm(in io.Reader, out io.Writer, site string) error {
	fmt.Fprintf(out, "Type the name of this site (%s) to do so: ", site)
	line, err := bufio.NewReader(in).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the answer: %w", err)
	}
	if strings.TrimSpace(line) != site {
		return &term.Error{Msg: "not confirmed, so nothing was changed"}
	}
	return nil
}

// whoami names the person for duri.event: behind sudo, the one who called it.
func whoami() string {
	name := os.Getenv("USER")
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if person := os.Getenv("SUDO_USER"); person != "" && person != name {
		return person + " (as " + name + ")"
	}
	return name
}

func printRestoration(w io.Writer, r catalog.Restoration) error {
	row := fmt.Sprintf("%s.%s %s", r.Schema, r.Table, r.Key)
	var b strings.Builder
	switch {
	case r.Action == catalog.ActionNone && r.SQL == "":
		fmt.Fprintf(&b, "nothing to do: the row already is as the losing change of conflict %d had it: %s\n", r.ID, term.Clean(row))
	case r.DryRun:
		fmt.Fprintf(&b, "%s;\n", term.Clean(r.SQL)) // which changes names at most, as values come escaped
	default:
		done := map[catalog.Action]string{catalog.ActionUpdate: "updated", catalog.ActionInsert: "made again", catalog.ActionDelete: "deleted"}[r.Action]
		fmt.Fprintf(&b, "%s: %s", done, term.Clean(row))
		if r.Action == catalog.ActionUpdate {
			fmt.Fprintf(&b, " (%s)", term.Clean(strings.Join(r.Columns, ", ")))
		}
		b.WriteString("\n")
	}
	if len(r.Skipped) > 0 {
		fmt.Fprintf(&b, "left alone, as only PostgreSQL sets them: %s\n", term.Clean(strings.Join(r.Skipped, ", ")))
	}
	_, err := io.WriteString(w, b.String())
	return err
}
