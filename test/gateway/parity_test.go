package gateway

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/parity"
	"github.com/duri-io/duri/server"
)

// TestSessionsStayWhereTheyWouldNotice: a role whose settings differ between the sites keeps its site when that is drained, and is
// told why it cannot go on when the site is lost; other roles move, and a new login of the same role goes anywhere. When the
// difference is gone, so is what followed from it.
func TestSessionsStayWhereTheyWouldNotice(t *testing.T) {
	tr := start(t)
	tr.within(time.Minute, func(ctx context.Context) error { return tr.p.AddClient(ctx, "clerk", "secret") })
	tr.exec(tr.b, "ALTER ROLE clerk SET app.tenant = 'other'")
	// It compares the sites when it starts.
	if err := errors.Join(tr.p.Gateway.Signal(syscall.SIGTERM), tr.p.Gateway.Start()); err != nil {
		t.Fatal(err)
	}
	as := func(role string) *pgx.Conn {
		var c *pgx.Conn
		tr.within(time.Minute, func(ctx context.Context) error {
			return tr.p.Wait(ctx, "the gateway lets "+role+" in", func(ctx context.Context) (ok bool, err error) {
				c, err = pgx.Connect(ctx, tr.p.Gateway.DSN("app", role, "secret"))
				return err == nil, err
			})
		})
		t.Cleanup(func() { _ = c.Close(context.Background()) }) // it may have ended
		return c
	}
	at := func(c *pgx.Conn) (site string, err error) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err = c.QueryRow(ctx, "SELECT current_setting('app.site')").Scan(&site)
		return site, err
	}
	waitAt := func(c *pgx.Conn, want string) {
		t.Helper()
		tr.within(time.Minute, func(ctx context.Context) error {
			return tr.p.Wait(ctx, "the session is at "+want, func(context.Context) (bool, error) {
				site, err := at(c)
				return site == want, err
			})
		})
	}
	clerk, client := as("clerk"), as("client")
	if err := tr.p.Gateway.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	tr.within(time.Minute, func(ctx context.Context) error {
		return tr.p.Wait(ctx, "the gateway has read its configuration again", func(context.Context) (bool, error) {
			return strings.Contains(tr.p.Gateway.Log(), "configuration was read again"), nil
		})
	})
	waitAt(clerk, "a")
	waitAt(client, "a")

	var check server.Check
	tr.within(time.Minute, func(ctx context.Context) (err error) {
		check, err = tr.a.Control.Check(ctx)
		return err
	})
	var blocking []string
	for _, f := range check.Findings {
		if f.Grade != parity.Warning {
			blocking = append(blocking, f.String())
		}
	}
	if len(check.Sites) != 2 || len(blocking) != 1 || blocking[0] != "setting app.tenant of role clerk is not there at a and 'other' at b" {
		t.Fatalf("%+v", check)
	}

	tr.within(time.Minute, func(ctx context.Context) error {
		return drain(ctx, tr.b, server.DrainRequest{Site: "a", Drain: true})
	})
	waitAt(client, "b")
	if site, err := at(clerk); err != nil || site != "a" {
		t.Errorf("the clerk is at %q: %v", site, err)
	}
	if err := errors.Join(tr.a.SignalAgent(syscall.SIGKILL), tr.a.Cluster.Kill()); err != nil {
		t.Fatal(err)
	}
	_, err := at(clerk)
	if e, ok := errors.AsType[*pgconn.PgError](err); !ok || e.Code != "57P03" || !strings.Contains(e.Message, "setting app.tenant of role clerk") {
		t.Errorf("the clerk is told: %v", err)
	}
	if site, err := at(client); err != nil || site != "b" {
		t.Errorf("the client is at %q: %v", site, err)
	}
	waitAt(as("clerk"), "b")

	// Once the settings are equal, a session of the role moves.
	clerk = as("clerk")
	waitAt(clerk, "b")
	tr.exec(tr.b, "ALTER ROLE clerk RESET app.tenant")
	tr.within(time.Minute, func(ctx context.Context) error {
		return errors.Join(tr.a.Cluster.Start(ctx), tr.a.StartAgent())
	})
	tr.waitMembers()
	tr.within(time.Minute, func(ctx context.Context) error { return drain(ctx, tr.b, server.DrainRequest{Site: "a"}) })
	waitAt(clerk, "a")
}

func (t *trial) exec(s *pair.Site, sql string) {
	t.Helper()
	t.within(time.Minute, func(ctx context.Context) error { return s.Cluster.Exec(ctx, s.Database, sql) })
}
