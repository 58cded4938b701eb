package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/term"
)

func newGrantsCmd(a *app) *cobra.Command {
	var spec grants.Spec
	cmd := &cobra.Command{
		Use:   "grants",
		Short: "Print the SQL that a DBA runs once in each replicated database",
		Example: `  duri grants | psql -d app
  duri grants --database app --schemas public,sales > grants.sql`,
		Long: "The script makes the agent's run-time role, gives it what it needs, and makes the publication. It is plain SQL\n" +
			"for a superuser, explains each grant, and can be run again. Without --role, --database and --schemas the\n" +
			"values come from the configuration, if there is one.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := fillGrants(a, &spec); err != nil {
				return err
			}
			sql := grants.SQL(spec)
			return a.print(map[string]string{"sql": sql}, func(w io.Writer) error {
				_, err := io.WriteString(w, sql)
				return err
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&spec.Role, "role", "", "run-time `role` (default: that of postgres.dsn, else duri)")
	flags.StringVar(&spec.Database, "database", "", "`database` that the script is for (default: whichever it is run in)")
	flags.BoolVar(&spec.Gateway, "gateway", false, "let the agent check clients' passwords (default: if gateway.mode says so)")
	flags.StringSliceVar(&spec.Schemas, "schemas", nil, "`schemas` to replicate, with commas between (default: all user schemas)")
	return cmd
}

// fillGrants completes the spec from the configuration, when one is named or found, and checks the names.
func fillGrants(a *app, spec *grants.Spec) error {
	path, err := config.Find(a.configFile)
	if err == nil {
		c, err := config.Load(path)
		if err != nil {
			return err
		}
		if err := grantsFromConfig(c, spec); err != nil {
			return err
		}
	}
	for _, name := range append([]string{spec.Role, spec.Database}, spec.Schemas...) {
		if len(name) > 63 || strings.ContainsAny(name, "\x00\n\r") {
			return term.Usage(fmt.Sprintf("%q is not a PostgreSQL name", name), "a name has up to 63 bytes and no line breaks")
		}
	}
	return nil
}

func grantsFromConfig(c *config.Config, spec *grants.Spec) error {
	if spec.Role == "" {
		keys, err := config.DSNKeys(c.Postgres.DSN)
		if err != nil {
			return err
		}
		spec.Role = keys["user"]
	}
	spec.Gateway = spec.Gateway || c.Gateway.Authenticates()
	if spec.Schemas != nil {
		return nil
	}
	if spec.Database != "" {
		db, ok := c.Database(spec.Database)
		if !ok {
			return term.Usage(fmt.Sprintf("database %q is not in %s", spec.Database, c.Path()), "add it under databases first")
		}
		spec.Schemas = db.Schemas
		return nil
	}
	if !slices.ContainsFunc(c.Databases, func(d config.Database) bool { return len(d.Schemas) > 0 }) {
		return nil // the same script is right for all of them
	}
	if len(c.Databases) > 1 {
		return term.Usage("the databases have different schemas, so each has a script of its own", "name one with --database")
	}
	spec.Database, spec.Schemas = c.Databases[0].Name, c.Databases[0].Schemas
	return nil
}
