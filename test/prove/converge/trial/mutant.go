package trial

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Mutant is an agent with one rule broken on purpose: the test must notice. The product has no switch for it; the source
// files are changed on the way into the compiler (go build -overlay).
type Mutant struct {
	Name  string
	Rule  string // what is broken
	Edits []edit
}

// edit replaces a text that a source file must hold exactly once.
type edit struct{ file, old, new string }

// Mutants are the broken agents.
func Mutants() []Mutant { return mutants }

var mutants = []Mutant{
	{"tombstones", "tombstones are forgotten (rule 7)", []edit{{
		"apply/mesh.go",
		"func (m *Mesh) tombstone(table, key string, origin wal.SiteID) (past, bool) {\n",
		"func (m *Mesh) tombstone(table, key string, origin wal.SiteID) (past, bool) {\n\tif m != nil {\n\t\treturn past{}, false\n\t}\n",
	}}},
	{"clock-rule", "changes from the future are applied at once (rule 1), and versions do not make up for it (rule 3)", []edit{
		{"apply/worker.go", "case rec.Txn.VersionTime >= w.cfg.Clock():", "case rec.Txn.VersionTime < 0:"},
		{"server/capture.go", "c.foreign = max(c.foreign, t.CommitTime)", "c.foreign = 0"},
	}},
	{"unexact", "a row that was applied counts with the stamp of its batch (rule 4)", []edit{{
		"apply/resolve.go", "h.Version, h.end, h.seen = p.made, p.end, p.seen\n\t\trows[i] = h", "h.end, h.seen = p.end, p.seen\n\t\trows[i] = h",
	}}},
	{"ties", "equal versions are decided by arrival (rule 2)", []edit{
		{"wal/wal.go", "return cmp.Or(cmp.Compare(v.Time, o.Time), cmp.Compare(v.Site, o.Site))", "return cmp.Compare(v.Time/100000, o.Time/100000)"},
	}},
	{"capture-barrier", "rows are created without waiting for deletes that are not decoded yet (rule 8)", []edit{{
		"apply/resolve.go", "func (x *execution) barrier(ctx context.Context) error {\n",
		"func (x *execution) barrier(ctx context.Context) error {\n\tif ctx != nil {\n\t\treturn nil\n\t}\n",
	}}},
	{"full-images", "values that PostgreSQL did not send are taken from whatever row is there (rule 9)", []edit{{
		"apply/judge.go", "if r.op == wal.Update && !r.blind && d.Kind == conflict.None && h.image != nil {", "if h.image != nil {",
	}}},
	{"behind", "values that depend on a third site's change which is not here yet are not asked for (rule 9)", []edit{{
		"apply/mesh.go", "func (m *Mesh) behind(t *wal.Txn) bool {\n\tif len(m.peers) == 0 {", "func (m *Mesh) behind(t *wal.Txn) bool {\n\tif m != nil {",
	}}},
	{"truncate", "TRUNCATE removes newer rows too (rule 15)", []edit{{
		"apply/special.go", "case r.txn.Version().Less(h.Version):\n\t\t\tkept", "case false:\n\t\t\tkept",
	}}},
	{"records", "a lost change is not recorded (rule 16)", []edit{{
		"apply/judge.go", "if d.Kind != conflict.None || d.Code != conflict.AsSent {", "if d.Apply && (d.Kind != conflict.None || d.Code != conflict.AsSent) {",
	}}},
	{"once", "a restarted agent applies the last transactions again (rule 18)", []edit{{
		"apply/worker.go", "SELECT coalesce(max(to_lsn), '0/0') FROM duri.applied WHERE origin = $1::int2", "SELECT coalesce(max(CASE WHEN transactions > 0 THEN from_lsn ELSE to_lsn END), '0/0') FROM duri.applied WHERE origin = $1::int2",
	}}},
}

// MutantNamed finds a mutant.
func MutantNamed(name string) (*Mutant, error) {
	var all []string
	for i := range mutants {
		if mutants[i].Name == name {
			return &mutants[i], nil
		}
		all = append(all, mutants[i].Name)
	}
	return nil, fmt.Errorf("there is no mutant %q; there are %s", name, strings.Join(all, ", "))
}

// apply gives the changed text of each file that the mutant changes, by its path below root.
func (m *Mutant) apply(root string) (map[string]string, error) {
	texts := map[string]string{}
	for _, e := range m.Edits {
		text, ok := texts[e.file]
		if !ok {
			b, err := os.ReadFile(filepath.Join(root, e.file))
			if err != nil {
				return nil, fmt.Errorf("mutant %s: %w", m.Name, err)
			}
			text = string(b)
		}
		if n := strings.Count(text, e.old); n != 1 {
			return nil, fmt.Errorf("mutant %s: %s holds %q %d times instead of once; adapt the mutant to the source", m.Name, e.file, e.old, n)
		}
		texts[e.file] = strings.Replace(text, e.old, e.new, 1)
	}
	return texts, nil
}

// overlay writes the changed files and the list of them for go build, and returns the list's path.
func (m *Mutant) overlay(root, dir string) (string, error) {
	texts, err := m.apply(root)
	if err != nil {
		return "", err
	}
	replace := map[string]string{}
	for file, text := range texts {
		path := filepath.Join(dir, m.Name+"-"+strings.ReplaceAll(file, "/", "-"))
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return "", fmt.Errorf("mutant %s: %w", m.Name, err)
		}
		replace[filepath.Join(root, file)] = path
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, m.Name+"-overlay.json")
	return path, os.WriteFile(path, b, 0o600)
}
