package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/server"
)

func newConfigCmd(a *app) *cobra.Command {
	cmd := noun(&cobra.Command{
		Use:   "config",
		Short: "Check and show the configuration of a site",
		Example: `  duri config check -c duri.yaml
  duri config show --origin`,
	})
	cmd.AddCommand(newConfigCheckCmd(a), newConfigShowCmd(a), newConfigExampleCmd(a))
	return cmd
}

func newConfigCheckCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Check duri.yaml, its certificates and its connection strings",
		Example: `  duri config check
  duri config check -c /etc/duri/duri.yaml -o json`,
		Long: "Reads what the agent would read and reports all problems with file and line. It connects to no database;\n" +
			"where tables are declared, a running agent is asked which of them duri.set_policy declares as well.\n" +
			"The exit code is 0 when all is well and 3 when there are problems.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return configCheck(cmd.Context(), a) },
	}
}

// checkResult is the JSON of duri config check.
type checkResult struct {
	File     string            `json:"file"`
	OK       bool              `json:"ok"`
	Problems []*config.Problem `json:"problems"`
	Notes    []string          `json:"notes"` // what is well, but may surprise
}

func configCheck(ctx context.Context, a *app) error {
	path, err := config.Find(a.configFile)
	if err != nil {
		return err
	}
	c, err := config.Load(path)
	var bad *config.Error
	switch {
	case errors.As(err, &bad):
	case err != nil:
		return err
	default:
		bad = &config.Error{Problems: checkFiles(c)}
	}
	notes := declaredTwice(ctx, c)
	if a.json() {
		if err := term.JSON(a.stdout, checkResult{path, len(bad.Problems) == 0, append([]*config.Problem{}, bad.Problems...), notes}); err != nil {
			return err
		}
	}
	if len(bad.Problems) > 0 {
		return problems{bad, term.ExitPartial}
	}
	if a.json() {
		return nil
	}
	who := "site " + c.Site
	if c.Witness != "" {
		who = "witness " + c.Witness
	}
	if c.Alone() {
		who = "gateway " + c.Gateway.Name
	}
	_, err = fmt.Fprintf(a.stdout, "%s is valid: %s of cluster %s (%d sites, %d databases)\n",
		path, who, c.Cluster.Name, len(c.Sites), len(c.Databases))
	for _, n := range notes {
		if err == nil {
			_, err = fmt.Fprintln(a.stdout, "note: "+term.Clean(n))
		}
	}
	return err
}

// askAgent bounds how long a check waits for an agent that may not even run.
const askAgent = 3 * time.Second

// declaredTwice asks the agent which tables of duri.yaml duri.set_policy declares as well. Without an agent that answers
// nothing is known, which is no problem of the file.
func declaredTwice(ctx context.Context, c *config.Config) []string {
	notes := []string{}
	if c == nil {
		return notes
	}
	ctx, cancel := context.WithTimeout(ctx, askAgent)
	defer cancel()
	for _, d := range c.Databases {
		if len(d.Tables) == 0 {
			continue
		}
		tables, err := server.NewControl(c.DataDir).Tables(ctx, d.Name)
		if err != nil {
			continue
		}
		for _, t := range tables {
			// By this file, not by that of the running agent, which may be older.
			if t.PartitionOf == "" && d.Policies().Declares(t.FullName()) && (t.Overridden || t.PolicySource == "sql") {
				notes = append(notes, fmt.Sprintf("database %s: duri.set_policy declares %s too; duri.yaml wins", d.Name, t.FullName()))
			}
		}
	}
	return notes
}

// problems are what a check found, or what is wrong with what the user asked for; code is the exit code.
type problems struct {
	found *config.Error
	code  int
}

// Error prints one problem per line.
func (p problems) Error() string { return p.found.Error() }

// Unwrap gives the single problems.
func (p problems) Unwrap() []error { return p.found.Unwrap() }

// ExitCode is the exit code.
func (p problems) ExitCode() int { return p.code }

// expirySoon is how long before its end a certificate is reported.
const expirySoon = 30 * 24 * time.Hour

// checkFiles looks at what the configuration names and the agent will read at start.
func checkFiles(c *config.Config) []*config.Problem {
	var found []*config.Problem
	add := func(key string, err error) {
		p := &config.Problem{At: c.Origin(key), Key: key, Msg: key + ": " + err.Error()}
		if p.At.Kind == config.FromDefault {
			p.At = config.Origin{Kind: config.FromFile, File: c.Path()}
		}
		var hinted interface{ HintText() string }
		if errors.As(err, &hinted) {
			p.Hint = hinted.HintText()
		}
		found = append(found, p)
	}
	_, _, err := pki.TLS(pki.Files(c.TLS), c.Cluster.ID, c.Name())
	if c.Alone() {
		_, err = pki.GatewayTLS(pki.Files(c.TLS), c.Cluster.ID, c.Name())
	}
	if err != nil {
		add("tls", err)
	} else if end, err := pki.NotAfter(c.TLS.Cert); err == nil && time.Until(end) < expirySoon {
		add("tls", fmt.Errorf("the certificate ends on %s", end.UTC().Format(time.DateOnly)))
	}
	if file := c.Gateway.ClientCA; file != "" {
		if _, err := pki.Authorities(file); err != nil {
			add("gateway.client_ca", err)
		}
	}
	if l := c.Gateway.LoginCA; l.On() {
		if _, err := pki.LoadLoginCA(l.Cert, l.Key); err != nil {
			add("gateway.login_ca", err)
		}
	}
	for _, d := range []struct{ key, dsn string }{
		{"postgres.dsn", c.Postgres.DSN}, {"postgres.setup_dsn", c.Postgres.SetupDSN},
	} {
		// pgx also reads what the string refers to: service file, pgpass, certificates. Its error hides the password.
		if _, err := pgx.ParseConfig(d.dsn); err != nil {
			add(d.key, err)
		}
	}
	return found
}

func newConfigShowCmd(a *app) *cobra.Command {
	var origin bool
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Print the configuration with defaults and environment applied",
		Example: `  duri config show
  duri config show --origin`,
		Long: "Passwords are shown as ***. With --origin each value stands beside the file and line, the environment\n" +
			"variable or the default that it came from.",
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := a.anyConfig()
			if err != nil {
				return err
			}
			if origin {
				return a.print(c.Values(), func(w io.Writer) error { return printOrigins(w, c, a.style()) })
			}
			return a.print(c.Redacted(), func(w io.Writer) error { return printYAML(w, c) })
		},
	}
	cmd.Flags().BoolVar(&origin, "origin", false, "say where each value came from")
	return cmd
}

func printOrigins(w io.Writer, c *config.Config, style term.Style) error {
	table := term.NewTable("KEY", "VALUE", "ORIGIN")
	for _, v := range c.Values() {
		table.Row(v.Key, v.Value, v.Origin)
	}
	return table.Write(w, style)
}

func printYAML(w io.Writer, c *config.Config) error {
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(c.Redacted()); err != nil {
		return err
	}
	return enc.Close()
}

func newConfigExampleCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "example",
		Short: "Print a commented duri.yaml with every key",
		Example: `  duri config example
  duri config example > duri.yaml`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := io.WriteString(a.stdout, config.Example())
			return err
		},
	}
}
