package kills

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pair"
)

// What is different when clients go through gateways that run alone: each has one connection, and it lasts.

// secret is the clients' password.
const secret = "secret"

// codeAgain is what a gateway says of a transaction that was open when its server was lost.
const codeAgain = "40001"

// contract are the errors after which a gateway may end a session that nothing pins when more than one fault strikes: no site takes
// clients for longer than it holds them, and the fate of a commit is unknown.
var contract = []string{"57P03", "08007"}

// notices are the errors that one client saw.
type notices struct {
	again  int            // codeAgain
	codes  map[string]int // SQLSTATE, or none
	ended  []string       // errors of the contract that have ended a session
	broken []string       // errors that no client should see
}

// notice counts an error of a client that goes through a gateway.
func (c *client) notice(when string, err error) {
	if !c.gateway || err == nil {
		return
	}
	code, ends := "none", true
	if told, ok := errors.AsType[*pgconn.PgError](err); ok {
		code, ends = told.Code, told.Severity != "ERROR"
	}
	if c.seen.codes == nil {
		c.seen.codes = map[string]int{}
	}
	c.seen.codes[code]++
	if code == codeAgain {
		c.seen.again++
	}
	if !ends {
		return
	}
	what := fmt.Sprintf("client %s of site %s lost its connection, transaction %d, %s: %v", c.name, c.site, c.n, when, err)
	if slices.Contains(contract, code) {
		c.seen.ended = append(c.seen.ended, what)
	} else {
		c.seen.broken = append(c.seen.broken, what)
	}
}

// stay lets a client of a gateway keep its connection after an error that does not end it.
func (c *client) stay(ctx context.Context, conn *pgconn.PgConn, when string, err error) error {
	if !c.gateway {
		return err
	}
	c.notice(when, err)
	if conn.IsClosed() {
		return err
	}
	if _, err := conn.Exec(ctx, "ROLLBACK").ReadAll(); err != nil {
		c.notice("ROLLBACK", err)
		return err
	}
	return nil
}

// dialMax bounds a login: a gateway holds it while no site serves.
func (c *client) dialMax() time.Duration {
	if c.gateway {
		return answerMax
	}
	return 2 * time.Second
}

// unfit are the violations of what gateways promise their clients: faults is how many struck.
func unfit(clients []*client, faults int) (violations []string) {
	for _, c := range clients {
		violations = append(violations, c.seen.broken...)
		if faults == 1 { // There is a site that serves.
			violations = append(violations, c.seen.ended...)
		}
		if c.seen.again > faults {
			violations = append(violations, fmt.Sprintf("client %s of site %s had %d transactions rolled back by %d faults", c.name, c.site, c.seen.again, faults))
		}
	}
	return violations
}

// longestWaits are, for each client, the longest time from when it asked for a transaction until one was acknowledged, of those
// that ended after a fault.
func longestWaits(attempts []attempt, at time.Time) (all []time.Duration) {
	type who struct{ site, client string }
	since, longest := map[who]time.Time{}, map[who]time.Duration{}
	for _, a := range attempts { // those of each client are in order
		k := who{a.site, a.client}
		if since[k].IsZero() {
			since[k] = a.begun
		}
		if a.outcome != acked {
			continue
		}
		if !a.ended.Before(at) {
			longest[k] = max(longest[k], a.ended.Sub(since[k]))
		}
		delete(since, k)
	}
	for _, d := range longest {
		all = append(all, d)
	}
	slices.Sort(all)
	return all
}

// goal is how long a client may wait at most, by the gateway's acceptance numbers: 0.3 s beyond detection for what ends at once,
// which takes 0.1 s, and 3 s for silence; 0: there is none.
func goal(kind string) time.Duration {
	switch kind {
	case killServer, killBackend, killAgent, killSite, fastStop:
		return 400 * time.Millisecond
	case stopServer, stopAgent, stopSite, cutLink:
		return 3 * time.Second
	}
	return 0
}

// startGateways starts one beside each site's clients, and gives how these connect and the gateways, in the order of the sites.
func startGateways(ctx context.Context, p *pair.Pair) (dsns []string, all []*pair.Gateway, err error) {
	for i, s := range p.Sites {
		g := p.Gateway
		if i > 0 {
			if g, err = p.GatewayAt(s.Name); err != nil {
				return nil, nil, err
			}
		}
		if err := g.Start(); err != nil {
			return nil, nil, err
		}
		dsn := g.DSN(s.Database, role, secret)
		err := p.Wait(ctx, "the gateway of site "+s.Name+" serves", func(ctx context.Context) (bool, error) {
			conn, err := pgconn.Connect(ctx, dsn)
			if err != nil {
				return false, err
			}
			return true, conn.Close(ctx)
		})
		if err != nil {
			return nil, nil, err
		}
		dsns, all = append(dsns, dsn), append(all, g)
	}
	return dsns, all, nil
}
