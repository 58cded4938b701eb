package server

import (
	"context"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/quorum/etcdstore"
)

// openRegister starts this site's voter, if it is to have one, and the keeper. The returned function ends the voter and
// the connections to the others. Without a register both are nothing, and a policy that lets all sites go on has a voter at
// the most: nobody asks who may acknowledge.
func (a *Agent) openRegister(ctx context.Context) (end func() error, err error) {
	if !a.cfg.HasRegister() {
		return func() error { return nil }, nil
	}
	endVoter := func() {}
	if mc, ok := etcdstore.MemberOf(a.cfg, a.log); ok {
		member, err := etcdstore.StartMember(ctx, mc)
		if etcdstore.IsLost(err) {
			return nil, &hinted{err.Error(), "if its data is lost for good, tell the other voters at another site: duri witness --replace does so for a witness, docs/guide/runbook.md tells how for a site"}
		}
		if err != nil {
			return nil, err
		}
		endVoter = member.Close
	}
	if a.cfg.Durability.Policy == config.AvailabilityFirst {
		return func() error { endVoter(); return nil }, nil
	}
	cc, err := etcdstore.ClientOf(a.cfg, a.log)
	if err != nil {
		endVoter()
		return nil, err
	}
	store, err := etcdstore.Open(ctx, cc)
	if err != nil {
		endVoter()
		return nil, err
	}
	a.keeper = newKeeper(a, store)
	for _, n := range a.nodes {
		n.keeper = a.keeper
	}
	return func() error {
		err := store.Close()
		endVoter()
		return err
	}, nil
}

// registerTimeout bounds one question to the register.
const registerTimeout = 2 * time.Second
