package kills

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

// outcome is what a client was told of an attempt.
type outcome byte

const (
	open    outcome = iota // not answered yet
	acked                  // COMMIT succeeded
	refused                // it failed, and its transaction cannot have been committed
	unknown                // the connection broke while COMMIT was under way
)

// attempt is one transaction of one client. The ledger of them is kept outside the databases.
type attempt struct {
	site, client string
	seq          int
	begun, ended time.Time
	outcome      outcome
}

func (a attempt) key() string { return fmt.Sprintf("%s/%s/%d", a.site, a.client, a.seq) }

// ledger holds all attempts. Safe for concurrent use.
type ledger struct {
	mu       sync.Mutex
	attempts []attempt
}

func (l *ledger) begin(a attempt) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.attempts = append(l.attempts, a)
	return len(l.attempts) - 1
}

func (l *ledger) end(i int, o outcome) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.attempts[i].ended, l.attempts[i].outcome = time.Now(), o
}

// all is a copy.
func (l *ledger) all() []attempt {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.attempts)
}

// oldest is the attempt that has waited for its answer for the longest time; false: none waits.
func (l *ledger) oldest() (a attempt, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, one := range l.attempts {
		if one.outcome == open {
			return one, true
		}
	}
	return a, false
}

// schema is what the clients write: a row of the ledger by key, the same without a key, which shows what is applied
// twice, and rows that all clients of both sites update. The log has a replica identity so that what does not count can be
// deleted from it: PostgreSQL refuses that else.
const schema = `CREATE TABLE ledger (site text, client text, seq int, PRIMARY KEY (site, client, seq));
CREATE TABLE log (entry text, filler text);
ALTER TABLE log REPLICA IDENTITY FULL;
CREATE TABLE shared (id int PRIMARY KEY, by text);
INSERT INTO shared SELECT n, 'seed' FROM generate_series(1, 20) AS n`

// client writes at one site until ctx ends.
type client struct {
	site, name, dsn string
	l               *ledger
	pause           time.Duration
	filler          string // for log: more of it fills the journals sooner
	n               int
	warned          bool // the server has said that the transaction may not be where it should
	gateway         bool // it goes through one, and keeps its connection
	reads           bool // and reads what it has written, wherever the gateway lets it
	look            lookback
	oks             map[int]bool // its transactions that were acknowledged
	seen            notices
}

// answerMax bounds how long a client waits for one answer: longer than any fault lasts.
const answerMax = 40 * time.Second

func (c *client) run(ctx context.Context) {
	var conn *pgconn.PgConn
	defer func() { pg.Close(conn) }()
	for ctx.Err() == nil {
		if conn == nil || conn.IsClosed() {
			dial, cancel := context.WithTimeout(ctx, c.dialMax())
			next, err := c.connect(dial)
			cancel()
			if err != nil {
				if ctx.Err() == nil {
					c.notice("connect", err)
				}
				sleep(ctx, 20*time.Millisecond)
				continue
			}
			conn, c.look = next, lookback{n: c.look.n}
		}
		err := c.one(conn)
		if err == nil {
			err = c.readOwn(ctx, conn)
		}
		if err != nil {
			pg.Close(conn)
			conn = nil
		}
		sleep(ctx, c.pause)
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func (c *client) connect(ctx context.Context) (*pgconn.PgConn, error) {
	cfg, err := pgconn.ParseConfig(c.dsn)
	if err != nil {
		return nil, err
	}
	cfg.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { c.warned = c.warned || n.Severity == "WARNING" }
	return pgconn.ConnectConfig(ctx, cfg)
}

// one makes one attempt. Its statements and COMMIT go apart, so that a break before COMMIT is known to be one. It is not
// interrupted by the end of the load: each attempt is to have its answer.
func (c *client) one(conn *pgconn.PgConn) error {
	ctx, cancel := context.WithTimeout(context.Background(), answerMax)
	defer cancel()
	c.n++
	i := c.l.begin(attempt{site: c.site, client: c.name, seq: c.n, begun: time.Now()})
	sql := fmt.Sprintf(`BEGIN; INSERT INTO ledger VALUES ('%[1]s', '%[2]s', %[3]d); INSERT INTO log VALUES ('%[1]s/%[2]s/%[3]d', '%[5]s');
		UPDATE shared SET by = '%[1]s/%[2]s/%[3]d' WHERE id = %[4]d`, c.site, c.name, c.n, 1+c.n%20, c.filler)
	if _, err := conn.Exec(ctx, sql).ReadAll(); err != nil {
		c.l.end(i, refused)
		return c.stay(ctx, conn, "before COMMIT", err)
	}
	c.warned = false
	res, err := conn.Exec(ctx, "COMMIT").ReadAll()
	var told *pgconn.PgError
	switch {
	case err == nil && c.warned: // "the transaction has already committed locally, but might not have been replicated"
		c.l.end(i, unknown)
		return nil
	case err == nil && len(res) == 1 && res[0].CommandTag.String() == "COMMIT":
		c.l.end(i, acked)
		if c.reads {
			c.oks[c.n], c.look.told = true, c.n
		}
		return nil
	case err == nil: // ROLLBACK: an error before, of which we were told
		c.l.end(i, refused)
		return nil
	case errors.As(err, &told) && told.Severity == "ERROR": // the server said that it did not commit
		c.l.end(i, refused)
		c.notice("COMMIT", err)
		return nil
	}
	c.l.end(i, unknown)
	c.notice("COMMIT", err)
	return err
}
