package server

import (
	"context"
	"fmt"
	"net"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/internal/pg"
)

// openDoor listens for clients, if the agent is their way to PostgreSQL. Without a register the door is open from the
// beginning.
func (a *Agent) openDoor() (net.Listener, error) {
	if a.cfg.Gateway.Listen == "" {
		return nil, nil
	}
	c, err := pg.Config(a.cfg.Postgres.DSN, a.nodes[0].database.Name, nil)
	if err != nil {
		return nil, err
	}
	network, address := pgconn.NetworkAddress(c.Host, c.Port)
	ln, err := net.Listen("tcp", a.cfg.Gateway.Listen)
	if err != nil {
		return nil, &hinted{fmt.Sprintf("listen for clients: %v", err), "another process uses this port; change gateway.listen in duri.yaml, or end it"}
	}
	a.door = gateway.NewDoor(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, address)
	}, a.log)
	if a.keeper == nil {
		a.door.Open()
	} else {
		a.keeper.door = a.door
	}
	return ln, nil
}
