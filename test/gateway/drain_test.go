package gateway

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/server"
)

// drain asks a site's agent.
func drain(ctx context.Context, s *pair.Site, req server.DrainRequest) error {
	_, err := s.Control.Drain(ctx, req)
	return err
}

// one connects a client.
func (t *trial) one() *pgx.Conn {
	t.Helper()
	var conn *pgx.Conn
	t.within(time.Minute, func(ctx context.Context) (err error) {
		conn, err = t.connect(ctx)
		return err
	})
	t.Cleanup(func() { _ = conn.Close(context.Background()) }) // it may have ended
	return conn
}

func (t *trial) run(c *pgx.Conn, sql string) {
	t.Helper()
	t.within(time.Minute, func(ctx context.Context) error {
		_, err := c.Exec(ctx, sql)
		return err
	})
}

// askedToLeave waits until a client is told, and checks what.
func (t *trial) askedToLeave(c *pgx.Conn, why, reason string) {
	t.Helper()
	t.within(time.Minute, func(ctx context.Context) error {
		err := c.PgConn().WaitForNotification(ctx)
		var e *pgconn.PgError
		if !errors.As(err, &e) || e.Severity != "FATAL" || e.Code != "57P01" || !strings.Contains(e.Message, why) || !strings.Contains(e.Detail, reason) || e.Hint != "connect again" {
			return fmt.Errorf("the client was told %w, not that %s: %s", err, why, reason)
		}
		return nil
	})
}

// TestDrainAsksSessionsToLeave: what can be moved moves, without an error; what cannot is asked to leave when its time is over, outside
// a transaction only, and the agent tells who is left and why.
func TestDrainAsksSessionsToLeave(t *testing.T) {
	tr := startWith(t, pair.Options{})
	all := tr.clients(4)
	tr.waitAt("a", all)
	listens, temps, busy := tr.one(), tr.one(), tr.one()
	tr.run(listens, "LISTEN x")
	tr.run(temps, "CREATE TEMPORARY TABLE mine AS SELECT 1")
	tr.run(busy, "LISTEN x")
	tr.run(busy, "BEGIN")
	tr.run(busy, "INSERT INTO t VALUES (99, 1)")
	left := func(req server.DrainRequest) (r server.DrainReport) {
		t.Helper()
		tr.within(time.Minute, func(ctx context.Context) error {
			return tr.p.Wait(ctx, "the gateways tell who stays", func(ctx context.Context) (ok bool, err error) {
				r, err = tr.b.Control.Drain(ctx, req) // through the other site's agent, as an operator may
				return r.All && r.Staying["LISTEN"] > 0, errors.Join(err, fmt.Errorf("%+v", r))
			})
		})
		return r
	}
	again, _ := tr.writeDuring(all, func(run *run) {
		left(server.DrainRequest{Site: "a", Drain: true})
		run.waitAt("b")
		r := left(server.DrainRequest{Site: "a", Drain: true})
		if r.LeaveInS != nil || r.Staying["LISTEN"] != 2 || r.Staying["temporary objects"] != 1 {
			t.Errorf("nobody is asked to leave: %+v", r)
		}
		tr.run(listens, "SELECT 1")
		minute := 60.0
		if r = left(server.DrainRequest{Site: "a", Drain: true, LeaveAfterS: &minute}); r.LeaveInS == nil || *r.LeaveInS > 60 || *r.LeaveInS < 1 {
			t.Errorf("in a minute: %+v", r)
		}
		tr.run(listens, "SELECT 1")
		tr.run(temps, "SELECT * FROM mine")
		now := 0.0
		left(server.DrainRequest{Site: "a", Drain: true, LeaveAfterS: &now})
		tr.askedToLeave(listens, "site a is drained", "LISTEN")
		tr.askedToLeave(temps, "site a is drained", "temporary objects")
		tr.within(time.Minute, func(ctx context.Context) error {
			return tr.p.Wait(ctx, "the one in a transaction is left", func(ctx context.Context) (bool, error) {
				st, err := tr.a.Control.Status(ctx)
				if err != nil {
					return false, err
				}
				g := st.Sites[0].Gateway
				return len(g.Staying) == 1 && g.Staying["LISTEN"] == 1 && g.LeaveInS != nil && *g.LeaveInS == 0, fmt.Errorf("%+v", *g)
			})
		})
		tr.run(busy, "INSERT INTO t VALUES (99, 2)")
		tr.run(busy, "COMMIT")
		tr.askedToLeave(busy, "site a is drained", "LISTEN")
		// Who connects again is at the other site, and may keep a connection there.
		back := tr.one()
		tr.run(back, "LISTEN x")
		tr.within(time.Minute, func(ctx context.Context) error { return drain(ctx, tr.a, server.DrainRequest{Site: "a"}) })
		run.waitAt("a")
		tr.run(back, "SELECT 1")
	})
	if again != 0 {
		t.Errorf("%d transactions were rolled back", again)
	}
	rows, err := tr.a.Cluster.QueryText(t.Context(), "app", "SELECT count(*) FROM t WHERE client = 99")
	if err != nil || rows[0][0] != "2" {
		t.Errorf("%v of 2 rows of the transaction that was open, %v", rows, err)
	}
	tr.audit(all)
}
