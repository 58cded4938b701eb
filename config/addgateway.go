package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/template"

	"github.com/duri-io/duri/internal/pki"
)

// GatewaySpec describes a gateway that is to run alone.
type GatewaySpec struct {
	Name   string
	Home   string // site that is nearest; may be empty
	Listen string // host:port for clients
	CA     string // folder of the cluster's authority
	Out    string // folder to make
}

// AddGateway makes the folder of a gateway of a cluster: its certificate and its duri.yaml, which has the sites of c. It changes
// nothing else. Errors of the spec are an *Error.
func AddGateway(c *Config, s GatewaySpec) error {
	file := s.render(c)
	if _, err := Parse(FileName, file); err != nil {
		if e, ok := errors.AsType[*Error](err); ok {
			var all Error
			all.add(e.Problems)
			return &all
		}
		return err
	}
	if err := checkTarget(s.Out); err != nil {
		return err
	}
	ca, err := pki.LoadCA(filepath.Join(s.CA, "ca.crt"), filepath.Join(s.CA, "ca.key"))
	if err != nil {
		return err
	}
	if ca.ClusterID() != c.Cluster.ID {
		return &Problem{Msg: fmt.Sprintf("%s holds the authority of cluster %s, not of %s", s.CA, ca.ClusterID(), c.Cluster.ID), Hint: "name the ca folder that duri init made for this cluster"}
	}
	pair, err := ca.IssueGateway(s.Name)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.Out, 0o700); err != nil {
		return fmt.Errorf("make the gateway's folder: %w", err)
	}
	return errors.Join(
		pair.Write(filepath.Join(s.Out, "gateway.crt"), filepath.Join(s.Out, "gateway.key")),
		ca.WriteCert(filepath.Join(s.Out, "ca.crt")),
		os.WriteFile(filepath.Join(s.Out, FileName), file, 0o600),
	)
}

func (s GatewaySpec) render(c *Config) []byte {
	var b strings.Builder
	err := gatewayTemplate.Execute(&b, struct {
		Spec   GatewaySpec
		Config *Config
	}{s, c})
	if err != nil {
		panic(err) // the template and its data are ours
	}
	return []byte(b.String())
}

var gatewayTemplate = template.Must(template.New(FileName).Funcs(template.FuncMap{"q": strconv.Quote}).Parse(`# {{.Spec.Name}}: configuration of a gateway that runs alone, with "duri gateway". Each key is described in docs/reference/config.md.

cluster:
  id: {{q .Config.Cluster.ID}}
  name: {{q .Config.Cluster.Name}}
{{- if .Spec.Home}}
site: {{q .Spec.Home}}   # the home of sessions that no route fits: the site that is nearest
{{- end}}

sites:   # all sites of the cluster
{{- range .Config.Sites}}
  - id: {{.ID}}
    name: {{q .Name}}
    address: {{q .Address}}   # of its agent
{{- end}}

gateway:
  name: {{q .Spec.Name}}   # as in the certificate
  listen: {{q .Spec.Listen}}   # clients connect here
  mode: transaction   # or session

tls:
  ca: ca.crt
  cert: gateway.crt
  key: gateway.key
`))
