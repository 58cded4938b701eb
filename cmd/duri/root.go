package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/term"
)

// commands are all commands of duri, in the order of the help. A new noun is one function in a file of its own and
// one line here.
var commands = []entry{
	{"everyday", newDemoCmd},
	{"everyday", newAgentCmd},
	{"everyday", newWitnessCmd},
	{"everyday", newGatewayCmd},
	{"everyday", newStatusCmd},
	{"everyday", newCheckCmd},
	{"everyday", newVerifyCmd},
	{"everyday", newRepairCmd},
	{"sites", newRegisterCmd},
	{"sites", newSiteCmd},
	{"sites", newGatewayCmd},
	{"data", newConflictCmd},
	{"data", newTableCmd},
	{"data", newJournalCmd},
	{"setup", newInitCmd},
	{"setup", newGrantsCmd},
	{"setup", newConfigCmd},
	{"setup", newCompletionCmd},
	{"setup", newVersionCmd},
}

// entry is a command and the section of the help that it stands in.
type entry struct {
	group string
	add   func(*app) *cobra.Command
}

// groups are the sections of the help.
var groups = []*cobra.Group{
	{ID: "everyday", Title: "Everyday:"},
	{ID: "sites", Title: "Sites:"},
	{ID: "setup", Title: "Set-up:"},
	{ID: "data", Title: "Data:"},
}

// app is what commands share: where to print and the global flags.
type app struct {
	stdout, stderr io.Writer
	configFile     string // --config; see app.config
	output         string // --output
	noColour       bool
}

// outputs are the forms of --output.
var outputs = []string{"table", "json"}

// json reports whether the user wants one JSON document.
func (a *app) json() bool { return a.output == "json" }

// style is for what is printed to stdout.
func (a *app) style() term.Style { return term.StyleFor(a.stdout, a.noColour) }

// config finds and loads the configuration of a site.
func (a *app) config() (*config.Config, error) {
	c, err := a.anyConfig()
	if err == nil && c.Witness != "" {
		return nil, term.Usage(c.Path()+" is the configuration of a witness, not of a site", "run it with: duri witness")
	}
	if err == nil && c.Alone() {
		return nil, term.Usage(c.Path()+" is the configuration of a gateway, not of a site", "run it with: duri gateway")
	}
	return c, err
}

// anyConfig finds and loads the configuration of a site, a witness or a gateway.
func (a *app) anyConfig() (*config.Config, error) {
	path, err := config.Find(a.configFile)
	if err != nil {
		return nil, err
	}
	return config.Load(path)
}

// print writes v as JSON, or calls table, as --output asks.
func (a *app) print(v any, table func(io.Writer) error) error {
	if a.json() {
		return term.JSON(a.stdout, v)
	}
	return table(a.stdout)
}

// run is the command line: it never exits and gives the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	a := &app{stdout: stdout, stderr: stderr}
	root := newRootCmd(a)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err != nil {
		term.PrintError(stderr, err, term.StyleFor(stderr, a.noColour))
	}
	return term.ExitCode(err)
}

func newRootCmd(a *app) *cobra.Command {
	root := noun(&cobra.Command{
		Use:   "duri",
		Short: "PostgreSQL sites that are all active",
		Long:  "duri makes PostgreSQL sites active-active: all take reads and writes on the same tables at the same time.",
		Example: `  duri init --site seoul=10.1.0.5:7400 --site busan=10.2.0.5:7400 --database app --out demo
  duri config check -c demo/seoul/duri.yaml`,
	})
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SilenceErrors, root.SilenceUsage = true, true
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpTemplate(helpTemplate)
	root.SetFlagErrorFunc(flagError)
	root.PersistentPreRunE = func(*cobra.Command, []string) error { return a.checkOutput() }
	flags := root.PersistentFlags()
	flags.StringVarP(&a.configFile, "config", "c", "", "configuration `file` (default: DURI_CONFIG, ./duri.yaml, ...)")
	flags.StringVarP(&a.output, "output", "o", "table", "`form` of the output: table or json")
	flags.BoolVar(&a.noColour, "no-color", false, "no colour, also without NO_COLOR in the environment")
	mustComplete(root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(outputs, cobra.ShellCompDirectiveNoFileComp)))
	mustComplete(root.MarkPersistentFlagFilename("config", "yaml", "yml"))
	for _, g := range groups {
		if slices.ContainsFunc(commands, func(e entry) bool { return e.group == g.ID }) {
			root.AddGroup(g)
		}
	}
	for _, c := range commands {
		cmd := c.add(a)
		cmd.GroupID = c.group
		root.AddCommand(cmd)
	}
	help := newHelpCmd()
	help.GroupID = "setup"
	root.SetHelpCommand(help)
	return root
}

// newHelpCmd is duri help, which unlike cobra's own treats an unknown command as wrong usage.
func newHelpCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Print the help of a command",
		Example: `  duri help init
  duri help config show`,
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			target, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return subcommands(target), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			target, rest, err := cmd.Root().Find(args)
			if err == nil && len(rest) > 0 {
				err = target.ValidateArgs(rest)
			}
			if err != nil {
				return err
			}
			return target.Help()
		},
	}
}

// mustComplete is for errors that only a misspelled flag name in this program makes.
func mustComplete(err error) {
	if err != nil {
		panic(err)
	}
}

func (a *app) checkOutput() error {
	if slices.Contains(outputs, a.output) {
		return nil
	}
	return term.Usage(fmt.Sprintf("unknown output form %q%s", a.output, didYouMean(term.Closest(a.output, outputs))),
		"one of: "+strings.Join(outputs, ", "))
}

// noun makes a command that only has subcommands: alone it shows its help, with an unknown word it suggests.
func noun(cmd *cobra.Command) *cobra.Command {
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		return term.Usage(fmt.Sprintf("unknown command %q for %q%s", args[0], cmd.CommandPath(), didYouMean(term.Closest(args[0], subcommands(cmd)))),
			"see: "+cmd.CommandPath()+" --help")
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	return cmd
}

func subcommands(cmd *cobra.Command) []string {
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	return names
}

// noArgs is the Args of a command without arguments.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return term.Usage(fmt.Sprintf("%s takes no arguments, but %q is one", cmd.CommandPath(), args[0]), "see: "+cmd.CommandPath()+" --help")
}

// oneOf is the Args of a command with exactly one argument out of few.
func oneOf(what string, allowed ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		hint := "one of: " + strings.Join(allowed, ", ")
		if len(args) != 1 {
			return term.Usage(fmt.Sprintf("%s takes one argument, the %s", cmd.CommandPath(), what), hint)
		}
		if slices.Contains(allowed, args[0]) {
			return nil
		}
		return term.Usage(fmt.Sprintf("unknown %s %q%s", what, args[0], didYouMean(term.Closest(args[0], allowed))), hint)
	}
}

func didYouMean(near string) string {
	if near == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %q?)", near)
}

// flagError makes errors of flags usage errors, with a suggestion for an unknown one.
func flagError(cmd *cobra.Command, err error) error {
	if errors.Is(err, pflag.ErrHelp) {
		return err
	}
	msg := err.Error()
	if unknown, ok := errors.AsType[*pflag.NotExistError](err); ok {
		var names []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
		if near := term.Closest(unknown.GetSpecifiedName(), names); near != "" && len(unknown.GetSpecifiedName()) > 1 {
			msg += didYouMean("--" + near)
		}
	}
	return term.Usage(msg, "see: "+cmd.CommandPath()+" --help")
}

// helpTemplate opens with what the command is and its examples (style.md section 6).
const helpTemplate = `{{.Short}}
{{if .HasExample}}
Examples:
{{.Example}}
{{end}}{{with .Long}}
{{. | trimTrailingWhitespaces}}
{{end}}
Usage:{{if not .HasAvailableSubCommands}}
  {{.UseLine}}{{end}}{{if .HasAvailableSubCommands}}
  {{.CommandPath}} [command]{{$cmds := .Commands}}{{if eq (len .Groups) 0}}

Commands:{{range $cmds}}{{if .IsAvailableCommand}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}{{else}}{{range $group := .Groups}}

{{.Title}}{{range $cmds}}{{if and (eq .GroupID $group.ID) (or .IsAvailableCommand (eq .Name "help"))}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}{{end}}{{end}}{{end}}{{if .HasAvailableLocalFlags}}

Flags:
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}{{end}}{{if .HasAvailableInheritedFlags}}

Global flags:
{{.InheritedFlags.FlagUsages | trimTrailingWhitespaces}}{{end}}
`
