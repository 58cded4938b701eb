package gateway

import (
	"context"
	"errors"
	"testing"

	"github.com/duri-io/duri/internal/pgtest"
)

// TestSiteIsLostBeforeASessionIsThere: a session is on its way to a site, which does not have yet what it has seen, when that site is lost.
// It goes on where it was, without an error.
func TestSiteIsLostBeforeASessionIsThere(t *testing.T) {
	a := markable(t)
	b := site(t, pgtest.Query(t, a, "postgres", "SELECT rolpassword FROM pg_authid WHERE rolname = 'app'")[0][0], pgtest.WithSetting("wal_level", "logical"))
	for name, reads := range map[string]Reads{"without reads elsewhere": nil, "with": &readsAt{}} {
		t.Run(name, func(t *testing.T) {
			r := &routes{targets: []Target{target(a, "a")}}
			lost, waits := make(chan struct{}), make(chan struct{}, 1)
			sites := &crossed{knowing: &knowing{c: a}, gate: func(ctx context.Context, _, to string) error {
				if to != "b" {
					return nil
				}
				select {
				case waits <- struct{}{}:
				default:
				}
				select {
				case <-lost:
					return errors.New("the site was lost")
				case <-ctx.Done():
					return ctx.Err()
				}
			}}
			_, addr := serve(t, Config{Mode: TransactionMode, Router: r, Sites: sites, Reads: reads}, a)
			c := open1(t, dsn(addr, ""))
			port := value[int](t, c, "SELECT inet_server_port()")
			if port != a.Port() {
				t.Fatalf("it begins at %d", port)
			}
			r.lead(target(b, "b"))
			answer := make(chan int, 1)
			go func() {
				var at int
				if err := c.QueryRow(t.Context(), "SELECT inet_server_port()").Scan(&at); err != nil {
					t.Error(err)
				}
				answer <- at
			}()
			<-waits
			r.lead(target(a, "a"))
			close(lost)
			if at := <-answer; at != a.Port() {
				t.Errorf("it goes on at %d, want %d", at, a.Port())
			}
		})
	}
}
