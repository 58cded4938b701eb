package doctest

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/fstest"
	"unicode"

	"github.com/google/go-cmp/cmp"
)

// root finds the folder of go.mod above the test's.
func root(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("no go.mod above the test's folder")
		}
	}
}

// pages reads all Markdown files by path.
func pages(fsys fs.FS) (map[string]string, error) {
	all := map[string]string{}
	err := fs.WalkDir(fsys, ".", func(file string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && file != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "node_modules"):
			return fs.SkipDir
		case d.IsDir() || path.Ext(file) != ".md":
			return nil
		}
		b, err := fs.ReadFile(fsys, file)
		all[file] = string(b)
		return err
	})
	return all, err
}

func readPages(t *testing.T) map[string]string {
	t.Helper()
	all, err := pages(os.DirFS(root(t)))
	if err != nil {
		t.Fatal(err)
	}
	for _, must := range []string{"README.md", "README.ko.md", "docs/guide/runbook.md", "docs/concepts/convergence.md"} {
		if all[must] == "" {
			t.Errorf("%s was not found", must)
		}
	}
	return all
}

// prose is a page without its fenced blocks and code spans, in which nothing is a link or a heading.
func prose(page string) string {
	var b strings.Builder
	fenced := false
	for line := range strings.Lines(page) {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			fenced = !fenced
			continue
		}
		if !fenced {
			b.WriteString(line)
		}
	}
	return b.String()
}

var (
	codeSpan = regexp.MustCompile("`[^`]*`")
	linkRE   = regexp.MustCompile(`\[[^\]]*\]\(([^)\s]+)\)`)
	heading  = regexp.MustCompile(`(?m)^#{1,6} +(.+?)\s*$`)
	scheme   = regexp.MustCompile(`^[a-z]+:`)
)

// anchor is the fragment that GitHub makes of a heading.
func anchor(title string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
			return unicode.ToLower(r)
		}
		return -1
	}, title)
}

// broken lists the links of a page that lead nowhere.
func broken(fsys fs.FS, all map[string]string, file string) (bad []string) {
	for _, m := range linkRE.FindAllStringSubmatch(codeSpan.ReplaceAllString(prose(all[file]), "`code`"), -1) {
		if scheme.MatchString(m[1]) {
			continue
		}
		target, fragment, _ := strings.Cut(m[1], "#")
		to := file
		if target != "" {
			to = path.Join(path.Dir(file), target)
		}
		if _, err := fs.Stat(fsys, to); err != nil {
			bad = append(bad, m[1])
			continue
		}
		if fragment != "" && !hasAnchor(all[to], fragment) {
			bad = append(bad, m[1])
		}
	}
	return bad
}

func hasAnchor(page, fragment string) bool {
	for _, h := range heading.FindAllStringSubmatch(prose(page), -1) {
		if anchor(h[1]) == fragment {
			return true
		}
	}
	return false
}

func TestRelativeLinksResolve(t *testing.T) {
	all, fsys := readPages(t), os.DirFS(root(t))
	for file := range all {
		for _, link := range broken(fsys, all, file) {
			t.Errorf("%s: link %q leads nowhere", file, link)
		}
	}
}

// machinePath finds folders that exist on one machine only.
var machinePath = regexp.MustCompile(`(?m)(^|[\s"'=(<` + "`" + `])/(work|tmp|root|home|mnt)(/|\b)`)

// private lists the lines of a page that name such a folder, as "line: text".
func private(page string) (bad []string) {
	for i, line := range strings.Split(page, "\n") {
		if machinePath.MatchString(line) {
			bad = append(bad, fmt.Sprintf("%d: %s", i+1, line))
		}
	}
	return bad
}

func TestPagesNameNoPathOfOneMachine(t *testing.T) {
	for file, page := range readPages(t) {
		for _, line := range private(page) {
			t.Errorf("%s:%s", file, line)
		}
	}
}

// readmeLinesMax is the length at which a README stops being read (style guide, section 8).
const readmeLinesMax = 120

func TestReadmesAreShort(t *testing.T) {
	all := readPages(t)
	for _, file := range []string{"README.md", "README.ko.md"} {
		if n := strings.Count(all[file], "\n"); n > readmeLinesMax {
			t.Errorf("%s has %d lines, at most %d are read", file, n, readmeLinesMax)
		}
	}
}

// TestTheChecksBite: each check finds what it is for.
func TestTheChecksBite(t *testing.T) {
	fsys := fstest.MapFS{
		"a.md": {Data: []byte("# A page\n[ok](docs/b.md#two-words-1) [ok](#a-page) [dir](docs) [web](https://x.y/z)\n" +
			"[no](c.md) [no](docs/b.md#three) [no](#b)\n`[code](nowhere.md)`\n```\n[block](nowhere.md)\n# Not a heading\n```\n[no](#not-a-heading)\n")},
		"docs/b.md":       {Data: []byte("## Two `words`, 1\n[up](../a.md) [no](a.md)\n")},
		".hidden/skip.md": {Data: []byte("[no](nowhere.md)")},
	}
	all, err := pages(fsys)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string][]string{}
	for file := range all {
		got[file] = broken(fsys, all, file)
	}
	want := map[string][]string{
		"a.md":      {"c.md", "docs/b.md#three", "#b", "#not-a-heading"},
		"docs/b.md": {"a.md"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("broken links (-want +got):\n%s", d)
	}
	page := "see /tmp/x\n`/work`\nnetwork/working and https://x.y/tmp/ are well\ncp a=/home/me\n/etc/duri and ~/.pgpass are well\n"
	if d := cmp.Diff([]string{"1: see /tmp/x", "2: `/work`", "4: cp a=/home/me"}, private(page)); d != "" {
		t.Errorf("private paths (-want +got):\n%s", d)
	}
}
