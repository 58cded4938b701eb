package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/quorum"
	"github.com/duri-io/duri/server"
)

func newRegisterCmd(a *app) *cobra.Command {
	cmd := noun(&cobra.Command{
		Use:   "register",
		Short: "Show which sites may acknowledge commits and why, or decide it yourself",
		Long: `The register is one value that all sites share: who may acknowledge commits that wait for other sites. It changes by itself
when a site is lost and when it has caught up again; a person can take a site back sooner, or force a take-over.`,
		Example: `  duri register show
  duri register rearm busan
  duri register force seoul --accept-loss --by "Kim, on call" --reason "busan has burnt down"`,
	})
	cmd.AddCommand(newRegisterShowCmd(a), newRegisterRearmCmd(a), newRegisterForceCmd(a))
	return cmd
}

func newRegisterShowCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "show",
		Short:   "Show the register, and what an acknowledged commit survives right now",
		Example: "  duri register show\n  duri register show -o json",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			s, err := server.NewControl(cfg.DataDir).Register(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(s, func(w io.Writer) error { return printRegister(w, cfg.Site, s, a.style()) })
		},
	}
}

// reassuring reports whether an acknowledged commit survives the loss of a site as configured, and nothing is going on.
func reassuring(s server.DurabilityStatus) bool {
	return s.Known && s.Member && s.Mode == quorum.Sync && len(s.Frozen)+len(s.Unheeded) == 0 && s.Blocked == ""
}

// registerProblems are the lines about what keeps a site from acknowledging, or clients out.
func registerProblems(site server.SiteStatus) (out []string) {
	d := site.Durability
	if d == nil {
		return nil
	}
	if len(d.Unheeded) > 0 {
		out = append(out, problem(site.Site, "commits do not wait in "+strings.Join(d.Unheeded, ", "),
			"when all agents run: ALTER SYSTEM SET synchronous_standby_names = 'N (duri_DATABASE, ...)', and reload (docs/concepts/durability.md)"))
	}
	if d.Blocked != "" {
		out = append(out, problem(site.Site, "a person must decide: "+d.Blocked, "see what may be lost with `duri register force`, at the site that is to go on"))
	}
	if d.Problem != nil {
		out = append(out, problem(site.Site, d.Problem.Text, d.Problem.Hint))
	}
	if d.Door != nil && !d.Door.Open {
		out = append(out, problem(site.Site, "clients are shut out: "+d.Door.Shut, ""))
	}
	return out
}

// printRegister writes the guarantee first, then the value that it follows from.
func printRegister(w io.Writer, site string, s server.DurabilityStatus, style term.Style) error {
	text := s.Guarantee
	if reassuring(s) {
		text = style.Good(text)
	} else {
		text = style.Bad(text)
	}
	lines := []string{text, ""}
	row := func(name, value string) {
		if value != "" {
			lines = append(lines, fmt.Sprintf("%-10s %s", name, term.Clean(value)))
		}
	}
	row("site", site)
	row("mode", string(s.Mode))
	row("epoch", fmt.Sprint(s.Register.Epoch))
	row("members", strings.Join(s.Register.Members, ", "))
	if !s.Register.Settled {
		row("settled", "no: another site cannot be left out before it is")
	}
	row("since", s.Register.At.Local().Format(time.DateTime))
	row("by", s.Register.By)
	row("reason", s.Register.Reason)
	if s.Register.Forced {
		row("forced", "by a person: transactions may have been lost")
	}
	for db, cuts := range s.Register.Cuts {
		for lost, lsn := range cuts {
			row("cut", fmt.Sprintf("%s of %s counts up to %s", db, lost, lsn))
		}
	}
	row("policy", s.Policy)
	row("waiting", strings.Join(s.Frozen, ", "))
	row("returning", strings.Join(s.Arming, ", "))
	row("blocked", s.Blocked)
	row("awaits", s.Awaits)
	if s.Problem != nil {
		lines = append(lines, problem("problem", s.Problem.Text, s.Problem.Hint))
	}
	if d := s.Door; d != nil {
		if d.Open {
			row("clients", fmt.Sprintf("let in, %d connected", d.Connections))
		} else {
			row("clients", "shut out: "+d.Shut)
		}
	}
	_, err := fmt.Fprintln(w, strings.Join(lines, "\n"))
	return err
}

func newRegisterRearmCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "rearm SITE",
		Short: "Take a site back that has caught up, without waiting for its link to be stable",
		Long: `A site that was left out comes back by itself when it has caught up and its link has been stable for durability.rearm.
This does not wait for the latter. It is safe at any time: the site is a member only when it holds everything. Run it at
a site that is a member.`,
		Example: "  duri register rearm busan\n  duri register rearm busan -o json",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			s, err := server.NewControl(cfg.DataDir).Rearm(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.print(s, func(w io.Writer) error { return printRegister(w, cfg.Site, s, a.style()) })
		},
	}
}

func newRegisterForceCmd(a *app) *cobra.Command {
	var req server.ForceRequest
	cmd := &cobra.Command{
		Use:   "force SITE...",
		Short: "Let the named sites go on without the others, whatever may be lost",
		Long: `The way of last resort, when the rules leave it to a person: both the witness and a site are gone, or the site that went on
alone. It prints what may be lost. With --accept-loss it asks for the name of this site, and does it; who and why stay in
the register and in duri.event.

Make sure first that the sites which are left out are off or cut off: one that still runs and had been alone goes on
acknowledging, and then there are two truths.`,
		Example: `  duri register force seoul
  duri register force seoul --accept-loss --by "Kim, on call" --reason "busan has burnt down"`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			req.Keep = args
			if req.By == "" {
				req.By = whoami()
			}
			control, accept := server.NewControl(cfg.DataDir), req.AcceptLoss
			if accept {
				if req.Reason == "" {
					return term.Usage("a forced take-over needs a reason, which stays on record", "add --reason")
				}
				if !interactive(cmd.InOrStdin()) {
					return term.Usage("duri register force asks for the name of this site, but there is no terminal", "run it on a terminal; without --accept-loss it only tells what may be lost")
				}
				req.AcceptLoss = false
			}
			r, err := control.Force(cmd.Context(), req)
			if err == nil && accept {
				if err = printLoss(a.stderr, r); err == nil {
					err = confirm(cmd.InOrStdin(), a.stderr, cfg.Site)
				}
				if err == nil {
					req.AcceptLoss = true
					r, err = control.Force(cmd.Context(), req)
				}
			}
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) error { return printLoss(w, r) })
		},
	}
	cmd.Flags().BoolVar(&req.AcceptLoss, "accept-loss", false, "do it, and lose what only the other sites have")
	cmd.Flags().StringVar(&req.By, "by", "", "`who` decides (default: the user of this shell)")
	cmd.Flags().StringVar(&req.Reason, "reason", "", "`why`")
	return cmd
}

func printLoss(w io.Writer, r server.LossReport) error {
	if r.Done {
		_, err := fmt.Fprintf(w, "done: epoch %d, members %s\n", r.Register.Epoch, strings.Join(r.Register.Members, ", "))
		return err
	}
	if _, err := fmt.Fprintf(w, "epoch %d, members %s; what may be lost:\n", r.Register.Epoch, strings.Join(r.Register.Members, ", ")); err != nil {
		return err
	}
	for _, l := range r.Lost {
		known := "it was never heard here"
		if !l.Heard.IsZero() {
			known = fmt.Sprintf("it reached to %s when last heard, %s ago: %s", l.End, time.Since(l.Heard).Round(time.Second), term.Size(l.Bytes))
		}
		if _, err := fmt.Fprintf(w, "  %s of %s: this site has everything up to %s; %s, and what it committed since\n", l.Database, l.Site, l.Have, known); err != nil {
			return err
		}
	}
	return nil
}

func newSiteCmd(a *app) *cobra.Command {
	cmd := noun(&cobra.Command{
		Use:   "site",
		Short: "Move clients away from a site, keep them out of this one, or let them in again",
		Example: `  duri site drain busan
  duri site undrain busan
  duri site fence --reason "maintenance of the storage"
  duri site unfence`,
	})
	var reason string
	fence := &cobra.Command{
		Use:   "fence",
		Short: "End the clients' connections here and let nobody in",
		Long:  "Clients that come through the agent (gateway.listen) are told the reason and to use another site. Replication goes on.",
		Example: `  duri site fence --reason "maintenance of the storage"
  duri site fence --reason "the fire brigade is here" -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.fence(cmd, server.FenceRequest{Fence: true, Reason: reason})
		},
	}
	fence.Flags().StringVar(&reason, "reason", "", "`why`; clients are told")
	unfence := &cobra.Command{
		Use:     "unfence",
		Short:   "Let clients in again, as far as the register allows",
		Example: "  duri site unfence\n  duri site unfence -o json",
		Args:    noArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.fence(cmd, server.FenceRequest{}) },
	}
	var pinnedAfter string
	drain := &cobra.Command{
		Use:   "drain SITE",
		Short: "Let clients' next transactions go to other sites",
		Long: `A planned switch: gateways (gateway.mode session or transaction) begin no new transactions at the site as long as another site
takes them, and move sessions between two transactions, without an error. Sessions that keep a connection (LISTEN, temporary
objects, ...), those of the mode session, and those that would notice how the sites differ, stay for --pinned-after, and are then asked to leave: each ends with SQLSTATE 57P01
as soon as it is outside a transaction, never within one. It prints who stays there now, and why; so does "duri
status", and the same command once more. The drain holds until "duri site undrain", also when the agent restarts; the time of
--pinned-after then begins again.`,
		Example: `  duri site drain busan
  duri site drain busan --pinned-after 5m
  duri site drain busan --pinned-after never -o json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := server.DrainRequest{Site: args[0], Drain: true}
			if pinnedAfter != "never" {
				d, err := time.ParseDuration(pinnedAfter)
				if err != nil || d < 0 {
					return term.Usage(fmt.Sprintf("--pinned-after %q is not a time", pinnedAfter), "write one like 30s or 5m, 0s for at once, or never")
				}
				s := d.Seconds()
				req.LeaveAfterS = &s
			}
			return a.drain(cmd, req)
		},
	}
	drain.Flags().StringVar(&pinnedAfter, "pinned-after", "30s", "`time` after which sessions that cannot be moved are asked to leave; never: they are not")
	undrain := &cobra.Command{
		Use:     "undrain SITE",
		Short:   "Let clients' transactions come to a site again",
		Example: "  duri site undrain busan\n  duri site undrain busan -o json",
		Args:    cobra.ExactArgs(1),
		RunE:    func(cmd *cobra.Command, args []string) error { return a.drain(cmd, server.DrainRequest{Site: args[0]}) },
	}
	cmd.AddCommand(drain, undrain, fence, unfence)
	return cmd
}

func (a *app) drain(cmd *cobra.Command, req server.DrainRequest) error {
	cfg, err := a.config()
	if err != nil {
		return err
	}
	left, err := server.NewControl(cfg.DataDir).Drain(cmd.Context(), req)
	if err != nil {
		return err
	}
	return a.print(left, func(w io.Writer) error { return printDrain(w, left) })
}

func printDrain(w io.Writer, r server.DrainReport) error {
	if !r.Drain {
		_, err := fmt.Fprintf(w, "site %s takes new transactions of clients again\n", r.Site)
		return err
	}
	text := fmt.Sprintf("site %s takes no new transactions of clients, as long as another site does\n", r.Site)
	switch who := staying(r.Staying, r.LeaveInS); {
	case who != "":
		text += who + "\n"
	case r.All:
		text += "no session stays there\n"
	}
	if !r.All {
		text += "a gateway has not told yet who stays: run the command once more\n"
	}
	_, err := io.WriteString(w, text)
	return err
}

// staying says who stays at a site that is drained; empty: nobody. leaveIn is in which time those that cannot be moved are
// asked to leave; nil: they are not.
func staying(sessions map[string]int, leaveIn *float64) string {
	n := 0
	var whys []string
	for _, why := range slices.Sorted(maps.Keys(sessions)) {
		n += sessions[why]
		whys = append(whys, fmt.Sprintf("%d: %s", sessions[why], why))
	}
	if n == 0 {
		return ""
	}
	text := fmt.Sprintf("%d %s there (%s)", n, map[bool]string{true: "session stays", false: "sessions stay"}[n == 1], strings.Join(whys, "; "))
	switch {
	case leaveIn == nil:
		return text + "; what cannot be moved stays until it ends"
	case *leaveIn == 0:
		return text + "; what cannot be moved is asked to leave at the end of its transaction"
	}
	return text + "; what cannot be moved is asked to leave in " + lasting(*leaveIn)
}

func (a *app) fence(cmd *cobra.Command, req server.FenceRequest) error {
	cfg, err := a.config()
	if err != nil {
		return err
	}
	s, err := server.NewControl(cfg.DataDir).Fence(cmd.Context(), req)
	if err != nil {
		return err
	}
	return a.print(s, func(w io.Writer) error { return printRegister(w, cfg.Site, s, a.style()) })
}
