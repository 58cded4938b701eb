package config

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/internal/pki"
)

func demoSpec(out string) InitSpec {
	return InitSpec{
		Name: "demo",
		Sites: []InitSite{
			{Name: "seoul", Address: "127.0.0.1:7401", DSN: `host=h password='it\'s "x" \\ #'`},
			{Name: "busan", Address: "busan.example:7402", Listen: "127.0.0.1:7402", SetupDSN: "host=h user=postgres"},
			{Name: "jeju", Address: "[fd00::5]:7400"},
		},
		Databases: []Database{{Name: "app"}, {Name: `we"ird: \name #한글`, Schemas: []string{"public", "Sales"}}},
		Out:       out,
	}
}

// tree lists the files below a folder.
func tree(t *testing.T, root string) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(root, path)
			files = append(files, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestInitMakesSitesThatTrustEachOther(t *testing.T) {
	clearEnv(t)
	spec := demoSpec(filepath.Join(t.TempDir(), "new", "demo"))
	if err := spec.Check(); err != nil {
		t.Fatal(err)
	}
	if err := InitCluster(spec); err != nil {
		t.Fatal(err)
	}
	want := slices.Sorted(slices.Values(spec.Files()))
	if diff := cmp.Diff(want, slices.Sorted(slices.Values(tree(t, spec.Out)))); diff != "" {
		t.Errorf("files (-announced +made):\n%s", diff)
	}
	if others, _ := os.ReadDir(filepath.Dir(spec.Out)); len(others) != 1 {
		t.Errorf("left beside the target: %v", others)
	}
	ids := map[string]bool{}
	for i, site := range spec.Sites {
		c, err := Load(filepath.Join(spec.Out, site.Name, FileName))
		if err != nil {
			t.Fatal(err)
		}
		ids[c.Cluster.ID] = true
		if _, _, err := pki.TLS(pki.Files(c.TLS), c.Cluster.ID, c.Site); err != nil {
			t.Errorf("%s: %v", site.Name, err)
		}
		if c.Site != site.Name || int(c.Self().ID) != i+1 || c.Self().Address != site.Address {
			t.Errorf("%s is %+v", site.Name, c.Self())
		}
		if (c.Bootstrap == BootstrapSeed) != (i == 0) {
			t.Errorf("%s: bootstrap %s", site.Name, c.Bootstrap)
		}
		if diff := cmp.Diff(spec.Databases, c.Databases); diff != "" {
			t.Errorf("%s: databases (-want +got):\n%s", site.Name, diff)
		}
		wantDSN := site.DSN
		if wantDSN == "" {
			wantDSN = DefaultDSN
		}
		if c.Postgres.DSN != wantDSN || c.Postgres.SetupDSN != site.SetupDSN {
			t.Errorf("%s: %+v", site.Name, c.Postgres)
		}
	}
	if len(ids) != 1 {
		t.Errorf("the sites have different clusters: %v", ids)
	}
}

// TestInitWithAWitness: all files name the same three voters, with addresses of their own, and the witness's
// certificate is of the cluster.
func TestInitWithAWitness(t *testing.T) {
	clearEnv(t)
	for given, want := range map[string]Voter{
		"10.9.0.1":      {Name: "witness", Peer: "10.9.0.1:7480", Client: "10.9.0.1:7481"},
		"127.0.0.1":     {Name: "witness", Peer: "127.0.0.1:7480", Client: "127.0.0.1:7481"}, // before seoul's
		"w.example:99":  {Name: "witness", Peer: "w.example:99", Client: "w.example:100"},
		"[fd00::9]:123": {Name: "witness", Peer: "[fd00::9]:123", Client: "[fd00::9]:124"},
		"fd00::9":       {Name: "witness", Peer: "[fd00::9]:7480", Client: "[fd00::9]:7481"},
	} {
		spec := demoSpec(filepath.Join(t.TempDir(), "demo"))
		spec.Witness, spec.Sites = given, spec.Sites[:2]
		if err := InitCluster(spec); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(slices.Sorted(slices.Values(spec.Files())), slices.Sorted(slices.Values(tree(t, spec.Out)))); diff != "" {
			t.Errorf("files (-announced +made):\n%s", diff)
		}
		w, err := Load(filepath.Join(spec.Out, WitnessFolder, FileName))
		if err != nil {
			t.Fatal(err)
		}
		if v, ok := w.Voter(); !ok || v != want || w.Witness != v.Name {
			t.Errorf("%s: the witness is %+v", given, v)
		}
		if _, _, err := pki.TLS(pki.Files(w.TLS), w.Cluster.ID, w.Witness); err != nil {
			t.Error(err)
		}
		for _, site := range spec.Sites {
			c, err := Load(filepath.Join(spec.Out, site.Name, FileName))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(w.Quorum, c.Quorum); diff != "" {
				t.Errorf("the quorum of %s (-witness +site):\n%s", site.Name, diff)
			}
			if c.Durability.Level != Sync || len(c.Quorum.Members) != 3 || c.WitnessName() != WitnessFolder {
				t.Errorf("%s: %+v, %+v", site.Name, c.Durability, c.Quorum)
			}
		}
	}
}

func TestInitKeepsSecretsPrivate(t *testing.T) {
	out := filepath.Join(t.TempDir(), "demo")
	if err := InitCluster(demoSpec(out)); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"ca/ca.key", "seoul/site.key", "seoul/duri.yaml"} {
		info, err := os.Stat(filepath.Join(out, f))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, info.Mode(), err)
		}
	}
	for _, f := range tree(t, out) {
		b, err := os.ReadFile(filepath.Join(out, f))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "PRIVATE KEY") != strings.HasSuffix(f, ".key") {
			t.Errorf("%s holds or lacks a private key", f)
		}
	}
}

func TestInitSeedMayBeAnySite(t *testing.T) {
	clearEnv(t)
	spec := demoSpec(filepath.Join(t.TempDir(), "demo"))
	spec.Seed, spec.ClusterID = "jeju", "4f2c9a1e-7c1d-4b5e-9a55-0d7f6c1e2b3a"
	if err := InitCluster(spec); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]Bootstrap{"seoul": BootstrapCopy, "jeju": BootstrapSeed} {
		c, err := Load(filepath.Join(spec.Out, name, FileName))
		if err != nil || c.Bootstrap != want || c.Cluster.ID != spec.ClusterID {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
}

func TestInitFillsAnEmptyFolder(t *testing.T) {
	out := t.TempDir()
	t.Chdir(out) // the shell's current folder, for example
	spec := demoSpec(".")
	if err := InitCluster(spec); err != nil {
		t.Fatal(err)
	}
	if got := len(tree(t, out)); got != len(spec.Files()) {
		t.Errorf("%d files, want %d", got, len(spec.Files()))
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(out), ".duri-init-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestInitRefusesAndLeavesNothing(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*InitSpec)
		want   string
	}{
		{"no sites", func(s *InitSpec) { s.Sites = nil }, "a cluster needs at least two sites"},
		{"one site", func(s *InitSpec) { s.Sites = s.Sites[:1] }, "sites has 1, want 2 to 8"},
		{"site name twice", func(s *InitSpec) { s.Sites[1].Name = "seoul" }, "sites[1].name: seoul is given twice"},
		{"site called ca", func(s *InitSpec) { s.Sites[1].Name = "ca" }, `a site cannot be called "ca"`},
		{"site called as the witness", func(s *InitSpec) { s.Sites[1].Name, s.Witness = "witness", "h" }, `a site cannot be called "witness" beside a witness`},
		{"witness without host", func(s *InitSpec) { s.Witness, s.Sites = ":7480", s.Sites[:2] }, "quorum.members[2].peer \":7480\" has no host\nquorum.members[2].client \":7481\" has no host"},
		{"path as name", func(s *InitSpec) { s.Sites[1].Name = "../x" }, `sites[1].name "../x" is not a name`},
		{"address", func(s *InitSpec) { s.Sites[0].Address = "x" }, `sites[0].address "x" is not host:port`},
		{"cluster name", func(s *InitSpec) { s.Name = "Demo" }, `cluster.name "Demo" is not a name`},
		{"no database", func(s *InitSpec) { s.Databases = nil }, "databases is missing"},
		{"unknown seed", func(s *InitSpec) { s.Seed = "daegu" }, `seed "daegu" is not a site of the cluster`},
		{"dsn", func(s *InitSpec) { s.Sites[0].DSN = "dbname=app" }, "postgres.dsn names a database"},
		{"no target", func(s *InitSpec) { s.Out = "" }, "no folder is named for the new cluster"},
	} {
		t.Run(c.name, func(t *testing.T) {
			parent := t.TempDir()
			spec := demoSpec(filepath.Join(parent, "demo"))
			c.change(&spec)
			for what, err := range map[string]error{"check": spec.Check(), "init": InitCluster(spec)} {
				var hinted interface{ HintText() string }
				if err == nil || err.Error() != c.want || !errors.As(err, &hinted) || hinted.HintText() == "" {
					t.Errorf("%s: got %v, want %q with a hint", what, err, c.want)
				}
			}
			if left := tree(t, parent); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestInitNeverTouchesAUsedFolder(t *testing.T) {
	out := t.TempDir()
	file := write(t, filepath.Join(out, "precious"), "x")
	if err := InitCluster(demoSpec(out)); err == nil || !strings.Contains(err.Error(), "is not empty") {
		t.Errorf("got %v", err)
	}
	if err := InitCluster(demoSpec(file)); err == nil {
		t.Error("a file was taken as target")
	}
	if got := tree(t, out); len(got) != 1 {
		t.Errorf("the folder now holds %v", got)
	}
}

func TestUUIDsDiffer(t *testing.T) {
	a, b := newUUID(), newUUID()
	if a == b || !uuidPattern.MatchString(a) || a[14] != '4' || !slices.Contains([]byte("89ab"), a[19]) {
		t.Errorf("%s, %s", a, b)
	}
}
