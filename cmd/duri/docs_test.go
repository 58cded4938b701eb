package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// docPages are the documents whose commands must exist.
var docPages = []string{"README*.md", "CHANGELOG.md", "docs/concepts/*.md", "docs/guide/*.md", "docs/ko/*.md", "docs/adr/*.md", "docs/reference/*.md"}

var (
	fence    = regexp.MustCompile("(?ms)^[ ]*```[a-z]*\n(.*?)^[ ]*```")
	span     = regexp.MustCompile("`([^`\n]+)`")
	command  = regexp.MustCompile(`(?:^|[|;(&]) *(?:[A-Z_]+=\S+ +)*(?:bin/)?duri +([^|;)&<>#]*)`)
	ellipsis = regexp.MustCompile(`\.\.\.|…`)
)

// docCommands gives the arguments of each duri command in a page: in code blocks, and in code spans, where the brackets
// of an optional part are left out. What stands behind a pipe, a redirection or a comment is another matter.
func docCommands(page string) []string {
	var all []string
	add := func(line string) {
		for _, m := range command.FindAllStringSubmatch(line, -1) {
			if !ellipsis.MatchString(m[1]) {
				all = append(all, strings.TrimSpace(m[1]))
			}
		}
	}
	for _, block := range fence.FindAllStringSubmatch(page, -1) {
		for line := range strings.Lines(strings.ReplaceAll(block[1], "\\\n", " ")) {
			add(strings.TrimSpace(line))
		}
	}
	for _, s := range span.FindAllStringSubmatch(fence.ReplaceAllString(page, ""), -1) {
		if strings.HasPrefix(s[1], "duri ") || strings.HasPrefix(s[1], "bin/duri ") {
			add(strings.NewReplacer("[", "", "]", "").Replace(s[1]))
		}
	}
	return all
}

// parses reports why the command line would refuse a command, as far as its name, flags and arguments tell.
func parses(t *testing.T, args string) error {
	root := testRoot(t)
	target, rest, err := root.Find(splitWords(args))
	if err == nil {
		err = target.ParseFlags(rest)
	}
	if err == nil && !target.Flags().Changed("help") {
		err = target.ValidateArgs(target.Flags().Args())
	}
	return err
}

func TestCommandsInDocumentsExist(t *testing.T) {
	tried := map[string]int{}
	for _, pattern := range docPages {
		files, err := filepath.Glob(filepath.Join("..", "..", pattern))
		if err != nil || len(files) == 0 {
			t.Fatalf("no document %s: %v", pattern, err)
		}
		for _, file := range files {
			page, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, args := range docCommands(string(page)) {
				tried[filepath.Base(file)]++
				if args == "completion" { // the page speaks of it and leaves the shell open
					continue
				}
				if err := parses(t, args); err != nil {
					t.Errorf("%s: %q: %v", file, "duri "+args, err)
				}
			}
		}
	}
	for file, least := range map[string]int{"README.md": 8, "README.ko.md": 6, "adopt.md": 8, "runbook.md": 6, "CHANGELOG.md": 8} {
		if tried[file] < least {
			t.Errorf("only %d commands were found in %s, at least %d stand there", tried[file], file, least)
		}
	}
}

// TestDocCommandsAreFound: what a page's commands are, and that a wrong one is noticed.
func TestDocCommandsAreFound(t *testing.T) {
	page := "`duri status [-w]` and `duri.conflict`, `duri ...`\n```\nduri init --name app \\\n  --out x   # comment\npsql -f <(duri grants -c a/duri.yaml)\n" +
		"A=b duri agent -c x > log\n  # duri is not a command here\n```\n   ```sql\n   SELECT 'duri_app';\n   ```\n`bin/duri demo --keep`\n"
	want := []string{"init --name app    --out x", "grants -c a/duri.yaml", "agent -c x", "status -w", "demo --keep"}
	if d := cmp.Diff(want, docCommands(page)); d != "" {
		t.Errorf("commands (-want +got):\n%s", d)
	}
	for _, bad := range []string{"nonsense", "conflict lost", "status --wait", "status extra", "verify --parallel"} {
		if parses(t, bad) == nil {
			t.Errorf("duri %s was not refused", bad)
		}
	}
}
