package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/duri-io/duri/internal/term"
)

var rewrite = flag.Bool("rewrite", false, "rewrite the expected output in testdata/script")

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"duri": main}) }

// TestScripts runs the command line as users do. "exits CODE duri ..." is exec with the exit code to expect.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		UpdateScripts:       *rewrite,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			// Nothing of the machine's own configuration, and no colour that depends on it.
			env.Setenv("XDG_CONFIG_HOME", env.WorkDir+"/xdg")
			env.Setenv("NO_COLOR", "")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
	})
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE program args...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// eachCommand visits all commands, help included.
func eachCommand(cmd *cobra.Command, visit func(*cobra.Command)) {
	visit(cmd)
	for _, c := range cmd.Commands() {
		eachCommand(c, visit)
	}
}

func testRoot(t *testing.T) *cobra.Command {
	t.Helper()
	root := newRootCmd(&app{stdout: os.Stdout, stderr: os.Stderr})
	root.InitDefaultHelpCmd()
	return root
}

// exampleCommands gives the arguments of duri in a command's examples: what comes before it (variables, "source <(")
// and behind it (pipes, redirections) is cut off.
func exampleCommands(cmd *cobra.Command) []string {
	var all []string
	for line := range strings.Lines(strings.ReplaceAll(cmd.Example, "\\\n", " ")) {
		words := strings.Fields(line)
		for len(words) > 0 && strings.Contains(words[0], "=") {
			words = words[1:]
		}
		line, _, _ = strings.Cut(strings.Join(words, " "), "|")
		line, _, _ = strings.Cut(line, " > ")
		line = strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(line), "source <("), ")")
		if args, ok := strings.CutPrefix(line, "duri"); ok {
			all = append(all, strings.TrimSpace(args))
		}
	}
	return all
}

func TestHelpOpensWithTwoExamples(t *testing.T) {
	eachCommand(testRoot(t), func(cmd *cobra.Command) {
		if n := len(exampleCommands(cmd)); n < 2 {
			t.Errorf("%s has %d examples, want two", cmd.CommandPath(), n)
		}
		var out bytes.Buffer
		cmd.SetOut(&out)
		if err := cmd.Help(); err != nil {
			t.Fatal(err)
		}
		if want := cmd.Short + "\n\nExamples:\n" + cmd.Example + "\n"; !strings.HasPrefix(out.String(), want) {
			t.Errorf("%s --help does not open with its examples:\n%s", cmd.CommandPath(), out.String())
		}
		if strings.HasSuffix(cmd.Short, ".") || cmd.Short == "" {
			t.Errorf("%s: short text %q", cmd.CommandPath(), cmd.Short)
		}
	})
}

// TestExamplesParse runs each example as far as its flags and arguments go: an example must not rot.
func TestExamplesParse(t *testing.T) {
	tried := 0
	eachCommand(testRoot(t), func(cmd *cobra.Command) {
		for _, example := range exampleCommands(cmd) {
			tried++
			root := testRoot(t)
			target, rest, err := root.Find(splitWords(example))
			if err == nil {
				err = target.ParseFlags(rest)
			}
			if err == nil {
				err = target.ValidateArgs(target.Flags().Args())
			}
			if err != nil {
				t.Errorf("%s: example %q: %v", cmd.CommandPath(), "duri "+example, err)
			}
		}
	})
	if tried < 10 {
		t.Errorf("only %d examples were tried", tried)
	}
}

// splitWords splits as a shell does, as far as examples need: blanks, and double quotes.
func splitWords(s string) []string {
	var words []string
	quoted := false
	for _, w := range strings.FieldsFunc(s, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return r == ' ' && !quoted
	}) {
		words = append(words, strings.ReplaceAll(w, `"`, ""))
	}
	return words
}

func TestEveryCommandIsInASectionOfTheHelp(t *testing.T) {
	known := map[string]bool{}
	for _, g := range groups {
		known[g.ID] = true
	}
	for _, e := range commands {
		if !known[e.group] {
			t.Errorf("section %q does not exist", e.group)
		}
	}
}

func TestRunReturnsTheExitCode(t *testing.T) {
	for _, c := range []struct {
		args []string
		want int
	}{
		{[]string{"version"}, term.ExitOK},
		{[]string{"nonsense"}, term.ExitUsage},
		{[]string{"version", "--nonsense"}, term.ExitUsage},
		{[]string{"version", "extra"}, term.ExitUsage},
		{[]string{"version", "-o", "xml"}, term.ExitUsage},
		{[]string{"config", "check", "-c", "/nonexistent/duri.yaml"}, term.ExitFailed},
	} {
		var stdout, stderr bytes.Buffer
		if got := run(context.Background(), c.args, &stdout, &stderr); got != c.want {
			t.Errorf("duri %v: exit code %d, want %d\n%s", c.args, got, c.want, stderr.String())
		}
		if c.want != term.ExitOK && (stdout.Len() > 0 || !strings.HasPrefix(stderr.String(), "duri: ")) {
			t.Errorf("duri %v: stdout %q, stderr %q", c.args, stdout.String(), stderr.String())
		}
	}
}
