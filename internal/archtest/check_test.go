package archtest

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// edge is one import in one file.
type edge struct {
	from   string // the importing package's folder, "." for the module's root
	file   string
	imp    string // the import path
	isTest bool
}

// target names the imported package as rules do.
func (e edge) target() string {
	if e.imp == module {
		return "."
	}
	return strings.TrimPrefix(e.imp, module+"/")
}

// check lists the imports that the rules forbid, one line each.
func check(edges []edge, rules []rule) []string {
	var found []string
	for _, e := range edges {
		for _, r := range rules {
			if r.forbids(e) {
				found = append(found, fmt.Sprintf("%s: %s must not import %s: %s", e.file, e.from, e.target(), r.reason))
			}
		}
	}
	return found
}

func (r rule) forbids(e edge) bool {
	if e.isTest && !r.tests {
		return false
	}
	if !matchesAny(r.from, e.from) || matchesAny(r.unless, e.from) {
		return false
	}
	if slices.Contains(r.allow, "std") && isStandard(e.imp) {
		return false
	}
	return matchesAny(r.forbid, e.target()) && !matchesAny(r.allow, e.target())
}

// isStandard reports whether an import path is the standard library's: its first element has no dot. "C" is CGO.
func isStandard(imp string) bool {
	first, _, _ := strings.Cut(imp, "/")
	return imp != "C" && !strings.Contains(first, ".")
}

func matchesAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, name) })
}

// matches compares by path elements: "x/..." also matches x itself; a * inside stands for a part of one element.
func matches(pattern, name string) bool {
	if pattern == "*" || pattern == "..." {
		return true
	}
	if prefix, ok := strings.CutSuffix(pattern, "/..."); ok {
		return name == prefix || strings.HasPrefix(name, prefix+"/")
	}
	ok, err := path.Match(pattern, name)
	return ok && err == nil
}

// pkg is what the comment check needs of a folder's package.
type pkg struct {
	folder string
	name   string
	docs   []string // the package comments of its files
}

// commentProblem says what is wrong with a package's comment, or nothing. A comment begins as godoc wants it: "Package
// x ..." or, for a program, "Command x ...".
func commentProblem(p pkg) string {
	want := "Package " + p.name + " "
	if p.name == "main" {
		want = "Command " + path.Base(p.folder) + " "
	}
	if len(p.docs) == 0 {
		return fmt.Sprintf("%s: no file has a package comment (want %q ...)", p.folder, want)
	}
	for _, d := range p.docs {
		if !strings.HasPrefix(strings.ReplaceAll(d, "\n", " "), want) {
			first, _, _ := strings.Cut(d, "\n")
			return fmt.Sprintf("%s: the package comment begins %q (want %q ...)", p.folder, first, want)
		}
	}
	return ""
}
