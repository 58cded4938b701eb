package main

import (
	"io"

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
		Long: `Compares all replicated tables, or those named, between this site and its peer: hashes of key ranges, computed in
PostgreSQL, then the rows of ranges that differ. Rows in flight are looked at again and told apart from real
differences. Nothing is locked and no snapshot is held. Exit code 0: equal; 3: not equal.`,
		Example: `  duri verify
  duri verify public.payment -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			req.Tables = args
			progress := term.NewProgress(a.stderr, "verify", 0, term.Count)
			rep, err := server.NewControl(cfg.DataDir).Verify(cmd.Context(), database, req, func(p verify.Progress) {
				progress.SetTotal(p.Total)
				progress.Set(p.Done)
			})
			progress.Finish()
			if err != nil {
				return err
			}
			if err := a.print(rep, func(w io.Writer) error { return verify.Print(w, rep, a.style()) }); err != nil {
				return err
			}
			if !rep.Equal {
				return &term.Error{Msg: "the sites are not equal", Code: term.ExitPartial}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&database, "database", "", "`name` of the database, when several are replicated")
	cmd.Flags().IntVar(&req.Parallel, "parallel", 2, "ranges compared at the same `time`")
	return cmd
}
