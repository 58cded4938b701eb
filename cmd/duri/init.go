package main

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/term"
)

// initFlags are the flags of duri init as given.
type initFlags struct {
	name, out, seed      string
	witness              string
	sites, dsns, schemas []string
	databases            []string
	dryRun               bool
}

const initExample = "duri init --site seoul=10.1.0.5:7400 --site busan=10.2.0.5:7400 --database app --out demo"

func newInitCmd(a *app) *cobra.Command {
	var f initFlags
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make the configuration and certificates of a new cluster",
		Example: `  duri init --site seoul=10.1.0.5:7400 --site busan=10.2.0.5:7400 --database app --out demo
  duri init --name demo --site seoul=10.1.0.5:7400 --site busan=10.2.0.5:7400 --database app \
      --dsn seoul="host=/var/run/postgresql user=duri" --seed busan --out demo --dry-run
  duri init --site seoul=10.1.0.5:7400 --site busan=10.2.0.5:7400 --database app --witness 10.3.0.5 --out demo`,
		Long: "Makes a folder with the cluster's certificate authority and one folder per site (duri.yaml, certificate, key)\n" +
			"that is copied to the site. The databases of the seed site keep their content; those of the other sites start\n" +
			"empty and are copied from it. Nothing is overwritten, and nothing is contacted.\n\n" +
			"With --witness there is one more folder, for a machine in a third place: it, and the agents of the first two sites,\n" +
			"vote on who goes on when sites lose each other. Commits then wait until another site holds them.",
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error { return runInit(a, f) },
	}
	flags := cmd.Flags()
	flags.StringVar(&f.name, "name", "duri", "`name` of the cluster")
	flags.StringArrayVar(&f.sites, "site", nil, "a site, `NAME=HOST:PORT`, the address that the other sites reach; at least two")
	flags.StringArrayVar(&f.databases, "database", nil, "a `database` to replicate; at least one")
	flags.StringSliceVar(&f.schemas, "schemas", nil, "`schemas` to replicate in each database (default: all user schemas)")
	flags.StringArrayVar(&f.dsns, "dsn", nil, "a site's connection to its own PostgreSQL, `NAME=STRING`, without database and password (default: \""+config.DefaultDSN+"\")")
	flags.StringVar(&f.seed, "seed", "", "`site` whose content all begin with (default: the first)")
	flags.StringVar(&f.witness, "witness", "", "`HOST[:PORT]` of a witness; it uses PORT (default 7480) and the next one, the sites the ports 80 above theirs")
	flags.StringVar(&f.out, "out", "", "`folder` to make (default: the cluster's name)")
	flags.BoolVar(&f.dryRun, "dry-run", false, "only say what would be made")
	return cmd
}

func runInit(a *app, f initFlags) error {
	spec, err := f.spec()
	if err != nil {
		return err
	}
	var bad *config.Error
	if err := spec.Check(); errors.As(err, &bad) {
		return problems{bad, term.ExitUsage}
	} else if err != nil {
		return err
	}
	if !f.dryRun {
		if err := config.InitCluster(spec); err != nil {
			return err
		}
	}
	return a.print(newInitResult(spec, f.dryRun), func(w io.Writer) error { return printInit(w, spec, f.dryRun) })
}

// spec reads the flags; all its errors are usage errors.
func (f initFlags) spec() (config.InitSpec, error) {
	spec := config.InitSpec{Name: f.name, Seed: f.seed, Out: f.out, Witness: f.witness}
	if spec.Out == "" {
		spec.Out = f.name
	}
	if len(f.sites) < 2 {
		return spec, term.Usage("name at least two sites with --site NAME=HOST:PORT", "for example: "+initExample)
	}
	if len(f.databases) == 0 {
		return spec, term.Usage("name at least one database to replicate with --database", "for example: "+initExample)
	}
	for _, s := range f.sites {
		name, address, ok := strings.Cut(s, "=")
		if !ok {
			return spec, term.Usage(fmt.Sprintf("--site %q is not NAME=HOST:PORT", s), "for example: --site seoul=10.1.0.5:7400")
		}
		spec.Sites = append(spec.Sites, config.InitSite{Name: name, Address: address})
	}
	for _, d := range f.databases {
		spec.Databases = append(spec.Databases, config.Database{Name: d, Schemas: f.schemas})
	}
	return spec, f.applyDSNs(&spec)
}

func (f initFlags) applyDSNs(spec *config.InitSpec) error {
	var names []string
	for _, s := range spec.Sites {
		names = append(names, s.Name)
	}
next:
	for _, given := range f.dsns {
		name, dsn, ok := strings.Cut(given, "=")
		if !ok {
			return term.Usage("--dsn wants NAME=STRING", `for example: --dsn seoul="host=/var/run/postgresql user=duri"`)
		}
		// Everybody on the machine can read the arguments of a process.
		if keys, err := config.DSNKeys(dsn); err == nil && keys["password"] != "" {
			return term.Usage("--dsn of site "+name+" holds a password", "leave it out here; put it into ~/.pgpass of the agent's user, or into the site's duri.yaml afterwards")
		}
		for i := range spec.Sites {
			if spec.Sites[i].Name == name {
				spec.Sites[i].DSN = dsn
				continue next
			}
		}
		return term.Usage(fmt.Sprintf("--dsn is for site %q, which is not among the sites%s", name, didYouMean(term.Closest(name, names))), "sites: "+strings.Join(names, ", "))
	}
	return nil
}

// initResult is the JSON of duri init.
type initResult struct {
	Folder string   `json:"folder"`
	Seed   string   `json:"seed"`
	Files  []string `json:"files"` // relative to the folder
	DryRun bool     `json:"dry_run"`
}

func newInitResult(spec config.InitSpec, dryRun bool) initResult {
	return initResult{Folder: spec.Out, Seed: spec.SeedSite(), Files: spec.Files(), DryRun: dryRun}
}

func printInit(w io.Writer, spec config.InitSpec, dryRun bool) error {
	var b strings.Builder
	verb := "made"
	if dryRun {
		verb = "would make"
	}
	fmt.Fprintf(&b, "%s in %s:\n", verb, spec.Out)
	for _, f := range spec.Files() {
		fmt.Fprintf(&b, "  %s\n", f)
	}
	if !dryRun {
		fmt.Fprintf(&b, nextSteps, spec.SeedSite(), filepath.Join(spec.Out, "ca"))
	}
	if !dryRun && spec.Witness != "" {
		b.WriteString(witnessSteps)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

const nextSteps = `
Next steps:
  1. Copy each site's folder to its site as a whole, readable by the agent's user only.
  2. At each site but the seed (%[1]s), create the databases, empty.
  3. At every site, as superuser in each replicated database:  duri grants -c duri.yaml | psql -d DATABASE
  4. Start the agents, the seed's first:  duri agent -c duri.yaml
  5. Keep %[2]s offline: it is needed only to add sites, and who has it can join the cluster.
`

const witnessSteps = `
The witness: copy its folder to a machine in a third place, which needs no PostgreSQL, and start it there:
  duri witness -c duri.yaml
`
