package archtest

import (
	"bytes"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

// tree is the module's source as the tests see it.
type tree struct {
	edges []edge
	pkgs  []pkg
}

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

// skipped reports whether the go command leaves a folder out as well, or it holds a module of its own.
func skipped(fsys fs.FS, folder string) bool {
	base := path.Base(folder)
	if folder == "." {
		return false
	}
	if strings.HasPrefix(base, ".") || strings.HasPrefix(base, "_") {
		return true
	}
	if base == "testdata" || base == "vendor" || base == "node_modules" {
		return true
	}
	_, err := fs.Stat(fsys, path.Join(folder, "go.mod"))
	return err == nil
}

// read parses the imports and package comments of all Go files, whatever their build constraints.
func read(fsys fs.FS) (tree, error) {
	var tr tree
	pkgs := map[string]*pkg{}
	err := fs.WalkDir(fsys, ".", func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if skipped(fsys, file) {
				return fs.SkipDir
			}
			return nil
		}
		if path.Ext(file) != ".go" {
			return nil
		}
		return tr.add(fsys, file, pkgs)
	})
	for _, p := range pkgs {
		tr.pkgs = append(tr.pkgs, *p)
	}
	slices.SortFunc(tr.pkgs, func(a, b pkg) int { return strings.Compare(a.folder, b.folder) })
	return tr, err
}

func (tr *tree) add(fsys fs.FS, file string, pkgs map[string]*pkg) error {
	src, err := fs.ReadFile(fsys, file)
	if err != nil {
		return err
	}
	f, err := parser.ParseFile(token.NewFileSet(), file, src, parser.ImportsOnly|parser.ParseComments)
	if err != nil {
		return err
	}
	folder, isTest := path.Dir(file), strings.HasSuffix(file, "_test.go")
	for _, spec := range f.Imports {
		imp, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return err
		}
		tr.edges = append(tr.edges, edge{from: folder, file: file, imp: imp, isTest: isTest})
	}
	name := f.Name.Name
	if isTest && strings.HasSuffix(name, "_test") {
		return nil // An external test package belongs to the package it tests.
	}
	if pkgs[folder] == nil {
		pkgs[folder] = &pkg{folder: folder, name: name}
	}
	if doc := strings.TrimSpace(f.Doc.Text()); doc != "" {
		pkgs[folder].docs = append(pkgs[folder].docs, doc)
	}
	return nil
}

func readModule(t *testing.T) tree {
	t.Helper()
	tr, err := read(os.DirFS(root(t)))
	if err != nil {
		t.Fatal(err)
	}
	if len(tr.pkgs) < 3 || len(tr.edges) < 10 {
		t.Fatalf("found %d packages with %d imports: the test does not see the module", len(tr.pkgs), len(tr.edges))
	}
	return tr
}

func TestImportsFollowTheRules(t *testing.T) {
	for _, problem := range check(readModule(t).edges, rules) {
		t.Error(problem)
	}
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	for _, p := range readModule(t).pkgs {
		if problem := commentProblem(p); problem != "" {
			t.Error(problem)
		}
	}
}

func TestModulePathIsThatOfGoMod(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(root(t), "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(b, []byte("module "+module+"\n")) {
		t.Errorf("go.mod does not begin with module %s", module)
	}
}

func TestEveryRuleBitesAndHasAReason(t *testing.T) {
	for i, r := range rules {
		if r.reason == "" {
			t.Errorf("rule %d has no reason", i)
		}
		imp := r.breach[1]
		if !strings.Contains(strings.SplitN(imp, "/", 2)[0], ".") && (imp != "C" && !standard(imp)) {
			imp = module + "/" + imp
		}
		e := edge{from: r.breach[0], file: "x.go", imp: imp}
		if len(check([]edge{e}, []rule{r})) != 1 {
			t.Errorf("rule %d (%s) does not find its breach %v", i, r.reason, r.breach)
		}
		e.isTest = true
		if found := len(check([]edge{e}, []rule{r})) == 1; found != r.tests {
			t.Errorf("rule %d (%s) in a test file: found = %v, want %v", i, r.reason, found, r.tests)
		}
	}
}

// standard tells the standard library's packages that the rules name from folders of this module.
func standard(imp string) bool { return imp == "os" || imp == "testing" }

// memory is the text of files by path.
type memory map[string]string

func TestCheckerOnASmallTree(t *testing.T) {
	table := []rule{
		{from: []string{"low"}, forbid: []string{"*"}, allow: []string{"std", "words"}, reason: "low is low"},
		{from: []string{"..."}, unless: []string{"top/..."}, forbid: []string{"top/..."}, tests: true, reason: "top is top"},
	}
	fsys := memory{
		"low/a.go":          "// Package low is low.\npackage low\n\nimport (\n\t\"fmt\"\n\t\"" + module + "/words\"\n\t\"" + module + "/mid\"\n)\n",
		"low/a_test.go":     "package low\n\nimport \"example.com/x\"\n",
		"mid/a.go":          "package mid\n\nimport \"os\"\n",
		"mid/x_test.go":     "// Not a package comment of mid.\npackage mid_test\n\nimport \"" + module + "/top/inner\"\n",
		"top/main.go":       "// Command top is top.\npackage main\n\nimport \"" + module + "/top/inner\"\n",
		"top/inner/a.go":    "// Wrong beginning.\npackage inner\n",
		"topper/a.go":       "// Package topper\n// is not top.\npackage topper\n",
		"topper/b.go":       "package topper\n\nimport \"" + module + "/topper\"\n",
		"testdata/a.go":     "not Go at all",
		"_old/a.go":         "not Go at all",
		"own/go.mod":        "module example.com/own\n",
		"own/a.go":          "package own\n\nimport \"" + module + "/top\"\n",
		"console/readme.md": "not Go",
	}.fs()
	tr, err := read(fsys)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"low/a.go: low must not import mid: low is low",
		"mid/x_test.go: mid must not import top/inner: top is top",
	}
	if diff := cmp.Diff(want, check(tr.edges, table)); diff != "" {
		t.Errorf("imports (-want +got):\n%s", diff)
	}
	var problems []string
	for _, p := range tr.pkgs {
		if problem := commentProblem(p); problem != "" {
			problems = append(problems, problem)
		}
	}
	want = []string{
		`mid: no file has a package comment (want "Package mid " ...)`,
		`top/inner: the package comment begins "Wrong beginning." (want "Package inner " ...)`,
	}
	if diff := cmp.Diff(want, problems); diff != "" {
		t.Errorf("comments (-want +got):\n%s", diff)
	}
}

func TestCheckerReportsAFileThatIsNotGo(t *testing.T) {
	if _, err := read(memory{"a/a.go": "nonsense"}.fs()); err == nil {
		t.Error("a file that cannot be parsed was passed over")
	}
}

// fs gives the files as a file system.
func (m memory) fs() fs.FS {
	fsys := fstest.MapFS{}
	for name, text := range m {
		fsys[name] = &fstest.MapFile{Data: []byte(text)}
	}
	return fsys
}
