package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/wal"
)

func newJournalCmd(a *app) *cobra.Command {
	cmd := noun(&cobra.Command{
		Use:   "journal",
		Short: "Look at the journals of this site",
		Example: `  duri journal verify -c seoul/duri.yaml
  duri journal verify -o json`,
	})
	cmd.AddCommand(newJournalVerifyCmd(a))
	return cmd
}

// journalReport is the JSON of one journal.
type journalReport struct {
	Dir          string  `json:"dir"`
	Site         string  `json:"site"`
	Start        wal.LSN `json:"start"`
	End          wal.LSN `json:"end"`
	Transactions uint64  `json:"transactions"`
	Bytes        int64   `json:"bytes"`
	Chain        string  `json:"chain"` // equal at two sites for equal ends: the copies hold the same transactions
	Error        string  `json:"error,omitempty"`
	Hint         string  `json:"hint,omitempty"`
}

func newJournalVerifyCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "verify",
		Short: "Read every journal of this site and check every byte",
		Long: `Reads all journals in data_dir, the own ones and the copies of the peers', and checks checksums, continuity and the
chain of hashes. It may run beside a live agent. Exit code 0: all are sound; 3: one is damaged.`,
		Example: `  duri journal verify -c seoul/duri.yaml
  duri journal verify -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			dirs, err := journalDirs(cfg)
			if err != nil {
				return err
			}
			reports, bad := []journalReport{}, 0
			for _, dir := range dirs {
				r := journalReport{Dir: dir, Site: filepath.Base(dir)}
				st, err := journal.Verify(cmd.Context(), dir, journal.Options{})
				if cmd.Context().Err() != nil {
					return cmd.Context().Err()
				}
				if err != nil {
					r.Error, r.Hint = err.Error(), (&term.Error{Err: err}).HintText()
					bad++
				}
				r.Start, r.End, r.Transactions, r.Bytes, r.Chain = st.Start, st.End, st.Txns, st.DiskBytes, fmt.Sprintf("%x", st.Chain)
				reports = append(reports, r)
			}
			if err := a.print(reports, func(w io.Writer) error { return printJournals(w, reports, a.style()) }); err != nil {
				return err
			}
			if bad > 0 {
				return &term.Error{Msg: fmt.Sprintf("%d of %d journals are damaged", bad, len(reports)), Code: term.ExitPartial}
			}
			return nil
		},
	}
}

// journalDirs lists the directories that hold a journal: data_dir/journal/<database>/<site>.
func journalDirs(cfg *config.Config) ([]string, error) {
	root := filepath.Join(cfg.DataDir, "journal")
	if _, err := os.Stat(root); err != nil {
		return nil, &term.Error{Op: "look for journals", Err: err, Hint: "the agent of this site has not run yet, or -c names another site's file"}
	}
	var dirs []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Ext(path) == ".j" && (len(dirs) == 0 || dirs[len(dirs)-1] != filepath.Dir(path)) {
			dirs = append(dirs, filepath.Dir(path))
		}
		return err
	})
	return dirs, err
}

func printJournals(w io.Writer, reports []journalReport, style term.Style) error {
	t := term.NewTable("ORIGIN", "RESULT", "FROM", "TO", "TRANSACTIONS", "SIZE", "CHAIN").Right(4, 5)
	var lines []string
	for _, r := range reports {
		result, chain := style.Good("sound"), r.Chain[:min(16, len(r.Chain))]
		if r.Error != "" {
			result = style.Bad("damaged")
			lines = append(lines, problem(r.Dir, r.Error, r.Hint))
		}
		t.Row(r.Site, result, r.Start, r.End, term.Count(int64(r.Transactions)), term.Size(r.Bytes), chain)
	}
	if err := t.Write(w, style); err != nil {
		return err
	}
	for _, l := range lines {
		if _, err := fmt.Fprintln(w, l); err != nil {
			return err
		}
	}
	return nil
}
