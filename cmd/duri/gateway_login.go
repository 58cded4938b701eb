package main

import (
	"fmt"
	"io"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/internal/term"
)

// Files of the authority for logins, within a site's folder.
const (
	loginCACert = "login-ca.crt"
	loginCAKey  = "login-ca.key"
)

func newGatewayLoginCACmd(a *app) *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "login-ca",
		Short: "Make the authority with which a site's agent logs clients with certificates in at PostgreSQL",
		Long: `Clients that log in at a gateway by certificate (gateway.client_ca) leave no password with which they could be logged in at PostgreSQL.
The agent does that with certificates of its own making, each of one role and good for ten minutes. They are signed by the authority
that this makes, one for each site: its certificate is for this site's PostgreSQL, its key stays beside the agent. It is not the
cluster's, and neither agents nor gateways trust it. It is run at each site, with its file; nothing is overwritten.`,
		Example: `  duri gateway login-ca -c /etc/duri/duri.yaml
  duri gateway login-ca -c seoul/duri.yaml --out seoul`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			cfg, err := a.anyConfig()
			if err != nil {
				return err
			}
			if cfg.Alone() || cfg.Site == "" {
				return term.Usage(cfg.Path()+" is not the file of a site", "run it at each site, with -c and the file of its agent; gateways that run alone need nothing")
			}
			if out == "" {
				out = filepath.Dir(cfg.Path())
			}
			pair, err := pki.NewLoginCA(cfg.Cluster.Name, cfg.Site)
			if err != nil {
				return err
			}
			files := struct {
				Cert string `json:"cert"`
				Key  string `json:"key"`
			}{filepath.Join(out, loginCACert), filepath.Join(out, loginCAKey)}
			if err := pair.Write(files.Cert, files.Key); err != nil {
				return err
			}
			return a.print(files, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, loginCASteps, cfg.Site, files.Cert, files.Key)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "`folder` for the two files (default: that of duri.yaml)")
	return cmd
}

const loginCASteps = `made the authority for logins at site %[1]s: %[2]s and %[3]s

Next steps:
  1. PostgreSQL of this site: append %[2]s to the file that ssl_ca_file names (ssl = on). The key stays with the agent.
  2. pg_hba.conf there, before the lines that ask these roles for passwords; ADDRESS is the agent's, as PostgreSQL sees it:
       hostssl  all  ROLE  ADDRESS/32  cert
     Then reload PostgreSQL.
  3. duri.yaml of this site, whose postgres.dsn must demand TLS (sslmode=require, or better verify-full):
       gateway:
         login_ca: {cert: login-ca.crt, key: login-ca.key}
     Then restart the agent. gateway.client_ca, where clients connect, names the authority that signs their certificates.
`
