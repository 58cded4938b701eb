package kills

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pg"
)

// With Options.Reads the gateways let reads go to all sites, and each client reads what it has written: a session must never see less
// than it was told, or has seen.

// readsEvery is how many transactions a client makes for each round of reads.
const readsEvery = 3

// lookback is what a client knows of its own rows in one session.
type lookback struct {
	told int // the latest transaction that was acknowledged in it
	saw  int // the latest acknowledged one that it has seen, whoever acknowledged it
	n    int // reads that were answered
}

// check compares a read with it: last is the latest transaction that it shows, and acked says which were acknowledged.
func (b *lookback) check(last int, acked func(seq int) bool) string {
	b.n++
	if last < b.told {
		return fmt.Sprintf("it was told of transaction %d, and sees %d", b.told, last)
	}
	if last < b.saw {
		return fmt.Sprintf("it has seen transaction %d, and sees %d", b.saw, last)
	}
	if acked(last) {
		b.saw = last
	}
	return ""
}

// acked reports that a transaction of the client was acknowledged.
func (c *client) acked(seq int) bool { return c.oks[seq] }

// readOwn reads at once after a write, which must show it, and again after a pause in which another site may have become good for it.
func (c *client) readOwn(ctx context.Context, conn *pgconn.PgConn) error {
	if !c.reads || c.n%readsEvery != 0 {
		return nil
	}
	sql := fmt.Sprintf("SELECT coalesce(max(seq), 0) FROM ledger WHERE site = '%s' AND client = '%s'", c.site, c.name)
	for i := range 4 {
		if i == 1 {
			sleep(ctx, 120*time.Millisecond)
		}
		one, cancel := context.WithTimeout(context.Background(), answerMax)
		rows, err := pg.Rows(one, conn, sql)
		cancel()
		if err != nil {
			c.notice("read", err)
			if conn.IsClosed() {
				return err
			}
			continue
		}
		last, err := strconv.Atoi(rows[0][0])
		if err != nil {
			return err
		}
		if wrong := c.look.check(last, c.acked); wrong != "" {
			c.seen.broken = append(c.seen.broken, fmt.Sprintf("client %s of site %s, read %d: %s", c.name, c.site, c.look.n, wrong))
		}
	}
	return nil
}

// addReads lets the gateways send reads to all sites alike, delay writers when a site does not keep up, and tell the clients' role how
// they do.
func addReads(p *pair.Pair) error {
	b, err := os.ReadFile(p.Gateway.ConfigFile)
	if err != nil {
		return err
	}
	var weights []string
	for _, s := range p.Sites {
		weights = append(weights, s.Name+": 1")
	}
	more := fmt.Sprintf("\ngateway:\n  admins: [%s]\n  reads: {weights: {%s}}\n  slow_down: {from: 1MiB, to: 8MiB, most: 50ms}\n", role, strings.Join(weights, ", "))
	text := strings.Replace(string(b), "\ngateway:\n", more, 1)
	if text == string(b) {
		return errors.New("the gateways' configuration has no section for them")
	}
	return os.WriteFile(p.Gateway.ConfigFile, []byte(text), 0o600)
}

// countReads asks the gateways how many reads went away, and how many transactions were delayed.
func countReads(ctx context.Context, gateways []*pair.Gateway) (away, slowed int, err error) {
	for _, g := range gateways {
		conn, err := pgconn.Connect(ctx, g.DSN("duri", role, secret))
		if err != nil {
			return 0, 0, err
		}
		rows, err := pg.Rows(ctx, conn, "SHOW duri.counters")
		pg.Close(conn)
		if err != nil {
			return 0, 0, err
		}
		for _, r := range rows {
			n, _ := strconv.Atoi(r[1])
			switch r[0] {
			case "reads_away":
				away += n
			case "slowed":
				slowed += n
			}
		}
	}
	return away, slowed, nil
}
