package server

import (
	"context"
	"errors"
	"path/filepath"
	"time"

	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/quorum/etcdstore"
)

// openRegister starts this site's voter, if it is to have one, and the keeper. The returned function ends the voter and
// the connections to the others. Without a register both are nothing.
func (a *Agent) openRegister(ctx context.Context) (func() error, error) {
	if !a.cfg.HasRegister() {
		return func() error { return nil }, nil
	}
	var member *etcdstore.Member
	if v, ok := a.cfg.Voter(); ok {
		var voters []etcdstore.Voter
		for _, m := range a.cfg.Quorum.Members {
			voters = append(voters, etcdstore.Voter{Name: m.Name, Peer: m.Peer, Client: m.Client})
		}
		var err error
		member, err = etcdstore.StartMember(ctx, etcdstore.MemberConfig{
			ClusterID: a.cfg.Cluster.ID, Name: v.Name, DataDir: filepath.Join(a.cfg.DataDir, "register"), Voters: voters, Prefer: a.cfg.WitnessName(),
			TLS: pki.Files{CA: a.cfg.TLS.CA, Cert: a.cfg.TLS.Cert, Key: a.cfg.TLS.Key}, Log: a.log,
		})
		if err != nil {
			return nil, err
		}
	}
	end := func() error {
		if member == nil {
			return nil
		}
		return member.Close()
	}
	tlsConfig := a.clientT
	if q := a.cfg.Quorum.TLS; q.CA != "" {
		var err error
		if tlsConfig, err = etcdstore.ClientTLS(pki.Files{CA: q.CA, Cert: q.Cert, Key: q.Key}); err != nil {
			return nil, errors.Join(err, end())
		}
	}
	store, err := etcdstore.Open(ctx, etcdstore.Config{ClusterID: a.cfg.Cluster.ID, Endpoints: a.cfg.RegisterEndpoints(), TLS: tlsConfig, Log: a.log})
	if err != nil {
		return nil, errors.Join(err, end())
	}
	a.keeper = newKeeper(a, store)
	for _, n := range a.nodes {
		n.keeper = a.keeper
	}
	return func() error { return errors.Join(store.Close(), end()) }, nil
}

// registerTimeout bounds one question to the register.
const registerTimeout = 2 * time.Second
