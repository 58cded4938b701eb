package etcdstore

import (
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/pki"
)

// MemberOf describes the voter that the configuration's site, or witness, runs; false when it runs none.
func MemberOf(c *config.Config, log *slog.Logger) (MemberConfig, bool) {
	own, ok := c.Voter()
	m := MemberConfig{
		ClusterID: c.Cluster.ID, Name: own.Name, DataDir: filepath.Join(c.DataDir, "register"),
		TLS: pki.Files(c.TLS), Prefer: c.WitnessName(), Log: log,
	}
	for _, v := range c.Quorum.Members {
		m.Voters = append(m.Voters, Voter(v))
	}
	return m, ok
}

// ClientOf describes the client that the configuration asks for. An error is one of the TLS files.
func ClientOf(c *config.Config, log *slog.Logger) (Config, error) {
	client := Config{ClusterID: c.Cluster.ID, Endpoints: c.RegisterEndpoints(), Log: log}
	var err error
	if c.Quorum.TLS != (config.TLS{}) {
		client.TLS, err = ClientTLS(pki.Files(c.Quorum.TLS))
	} else {
		_, client.TLS, err = pki.TLS(pki.Files(c.TLS), c.Cluster.ID, c.Name())
	}
	if err != nil {
		return Config{}, fmt.Errorf("open the register: %w", err)
	}
	return client, nil
}
