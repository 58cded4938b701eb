package demo

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/term"
)

// Bounds of a client's waits.
const (
	connectTimeout  = time.Second
	transactionMax  = 10 * time.Second
	reconnectPause  = 50 * time.Millisecond
	homewardPause   = 500 * time.Millisecond // between two attempts to go home
	crossShare      = 0.10                   // of payments: for a government of the other site
	fundShare       = 0.10                   // of payments: also update a shared fund
	settlementShare = 0.15                   // of payments: also update a settlement
)

// endpoint is a site as the ledger's clients know it.
type endpoint struct {
	name string
	dsn  string
}

// tally is what the clients of a load count while they run, for the progress display; the verdict does not use it.
// Safe for concurrent use.
type tally struct {
	acknowledged [2]atomic.Int64 // by the site that acknowledged
	inDoubt      atomic.Int64
	rolledBack   atomic.Int64
	latest       atomic.Pointer[string] // the last payment, in words
}

// client is one user of the ledger: a connection that fails over by itself, and a record of its own. It writes at its
// home site; when the connection breaks and home does not answer, at the other one; and it goes home when homeReady says
// so. A payment whose COMMIT got no answer is never tried again: it stays in doubt.
type client struct {
	id        int
	home      int // index in sites
	sites     [2]endpoint
	record    *recorder
	tally     *tally
	homeReady func() bool
	interval  time.Duration // between the beginnings of two payments
	rng       *rand.Rand
	places    []government

	conn    *pgconn.PgConn
	at      int // where conn leads
	seq     int64
	tried   time.Time    // the last attempt to go home
	current atomic.Int32 // index of the site of the last acknowledged payment
	away    atomic.Int64 // when the first payment was acknowledged away from home since it last left, Unix ns; 0: at home
}

// run pays until stop is closed or ctx ends. An error means that the record cannot be kept; trouble with the sites is
// none.
func (c *client) run(ctx context.Context, stop <-chan struct{}) error {
	defer func() { pg.Close(c.conn) }()
	next := time.Now().Add(time.Duration(c.rng.Int64N(int64(c.interval) + 1)))
	for {
		if !waitUntil(ctx, stop, next) {
			return nil
		}
		next = later(next.Add(c.interval), time.Now())
		if !c.connected(ctx) {
			next = time.Now().Add(reconnectPause)
			continue
		}
		if err := c.pay(ctx); err != nil {
			return fmt.Errorf("client %d: %w", c.id, err)
		}
	}
}

// later gives the later of two times: a client that was held up does not hurry afterwards.
func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// waitUntil reports false when stop or the end of ctx came first.
func waitUntil(ctx context.Context, stop <-chan struct{}, at time.Time) bool {
	t := time.NewTimer(time.Until(at))
	defer t.Stop()
	select {
	case <-stop:
		return false
	case <-ctx.Done():
		return false
	case <-t.C:
		select { // with both ready, select would choose either
		case <-stop:
			return false
		default:
			return ctx.Err() == nil
		}
	}
}

// connected makes sure of a connection: the present one, home when it is time to go there, else whichever site answers,
// home first.
func (c *client) connected(ctx context.Context) bool {
	if c.conn != nil && !c.conn.IsClosed() {
		if c.at != c.home && time.Since(c.tried) > homewardPause && c.homeReady() {
			c.tried = time.Now()
			c.connect(ctx, c.home)
		}
		return true
	}
	if c.connect(ctx, c.home) {
		return true
	}
	return c.connect(ctx, 1-c.home)
}

// connect replaces the connection by one to a site; on failure all stays as it is.
func (c *client) connect(ctx context.Context, site int) bool {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	conn, err := pg.Connect(ctx, c.sites[site].dsn, database, map[string]string{"application_name": fmt.Sprintf("ledger client %d", c.id)})
	if err != nil {
		return false
	}
	pg.Close(c.conn)
	c.conn, c.at = conn, site
	return true
}

// pay makes one payment at the site the client is connected to.
func (c *client) pay(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, transactionMax)
	defer cancel()
	c.seq++
	t := c.choose()
	if err := c.exec(ctx, t.sql()); err != nil {
		// COMMIT was not sent, so nothing is there: no attempt to record.
		c.tally.rolledBack.Add(1)
		c.rollback(ctx)
		return nil
	}
	if err := c.record.attempt(t.entry); err != nil {
		return err
	}
	tag, err := c.commit(ctx)
	o := commitOutcome(tag, err)
	if err := c.record.outcome(c.seq, o); err != nil {
		return err
	}
	c.count(o, t)
	if o != committed && !c.conn.IsClosed() {
		c.rollback(ctx)
	}
	return nil
}

func (c *client) exec(ctx context.Context, sql string) error {
	_, err := c.conn.Exec(ctx, sql).ReadAll()
	return err
}

func (c *client) commit(ctx context.Context) (tag string, err error) {
	results, err := c.conn.Exec(ctx, "COMMIT").ReadAll()
	if err != nil || len(results) == 0 {
		return "", err
	}
	return results[0].CommandTag.String(), nil
}

// rollback leaves a failed transaction, or the connection if that fails too.
func (c *client) rollback(ctx context.Context) {
	if c.conn.IsClosed() {
		return
	}
	if err := c.exec(ctx, "ROLLBACK"); err != nil {
		pg.Close(c.conn)
	}
}

// count shows an outcome in the tally, and notes where this client is served.
func (c *client) count(o outcome, t transfer) {
	switch o {
	case unknown:
		c.tally.inDoubt.Add(1)
		return
	case rolledBack:
		c.tally.rolledBack.Add(1)
		return
	}
	c.tally.acknowledged[c.at].Add(1)
	text := fmt.Sprintf("%s · %s · %s KRW · at %s", t.place.title(), budgetLines[t.line-1], term.Count(t.amount), c.sites[c.at].name)
	c.tally.latest.Store(&text)
	c.current.Store(int32(c.at))
	if c.at == c.home {
		c.away.Store(0)
	} else {
		c.away.CompareAndSwap(0, time.Now().UnixNano())
	}
}

// commitOutcome decides what the answer to COMMIT, or its absence, means. PostgreSQL answers COMMIT in a failed
// transaction with ROLLBACK and no error. An error that the server sent before the connection's end means that nothing
// was committed, except for those that speak of the server's own end: they can come after the commit. It is pure.
func commitOutcome(tag string, err error) outcome {
	var pe *pgconn.PgError
	switch {
	case err == nil && tag == "COMMIT":
		return committed
	case err == nil && tag == "ROLLBACK":
		return rolledBack
	case errors.As(err, &pe) && pe.Severity == "ERROR" && !pg.IsConnectionError(err):
		return rolledBack
	}
	return unknown
}

// transfer is a payment and what goes with it.
type transfer struct {
	entry
	place      government
	line       int // of the budget, from 1
	fund       int // 0: none
	settlement int // quarter; 0: none
}

// choose makes up the next payment: mostly for a government of the client's own half, so that most rows are written at
// one site, but not all.
func (c *client) choose() transfer {
	half := c.home
	if c.rng.Float64() < crossShare {
		half = 1 - half
	}
	n := (len(c.places) - half + 1) / 2 // governments of that half: every second one
	t := transfer{
		entry: entry{
			client: c.id, seq: c.seq, id: newUUID(time.Now(), c.rng), site: c.sites[c.at].name,
			amount: 10_000 + c.rng.Int64N(999_000)*10, outcome: unknown,
		},
		place: c.places[2*c.rng.IntN(n)+half],
		line:  1 + c.rng.IntN(len(budgetLines)),
	}
	if c.rng.Float64() < fundShare {
		t.fund = 1 + c.rng.IntN(funds)
	}
	if c.rng.Float64() < settlementShare {
		t.settlement = 1 + c.rng.IntN(quarters)
	}
	return t
}

// newUUID makes a UUID of version 7: 48 bits of milliseconds, the rest random.
func newUUID(now time.Time, rng *rand.Rand) string {
	hi := uint64(now.UnixMilli())<<16 | 0x7000 | rng.Uint64()&0x0fff
	lo := rng.Uint64()&^(3<<62) | 2<<62
	return fmt.Sprintf("%08x-%04x-%04x-%04x-%012x", hi>>32, hi>>16&0xffff, hi&0xffff, lo>>48, lo&0xffffffffffff)
}

// sql is everything of the transaction up to COMMIT. All clients touch the tables in the same order, so that they do not
// deadlock with each other.
func (t transfer) sql() string {
	site := pg.QuoteLiteral(t.site)
	var b strings.Builder
	fmt.Fprintf(&b, "BEGIN;\nINSERT INTO finance.payment (id, gov_id, line, amount, payee, site, client, seq) VALUES ('%s', %d, %d, %d, %s, %s, %d, %d);\n",
		t.id, t.place.id, t.line, t.amount, pg.QuoteLiteral("채주 "+t.id[24:]), site, t.client, t.seq)
	fmt.Fprintf(&b, "INSERT INTO finance.audit (site, client, seq, payment, amount, note) VALUES (%s, %d, %d, '%s', %d, '지출');\n",
		site, t.client, t.seq, t.id, t.amount)
	fmt.Fprintf(&b, "UPDATE finance.budget SET executed = executed + %d, site = %s, at = clock_timestamp() WHERE (gov_id, line, year) = (%d, %d, %d);\n",
		t.amount, site, t.place.id, t.line, fiscalYear)
	if t.settlement > 0 {
		fmt.Fprintf(&b, "UPDATE finance.settlement SET settled = settled + %d, state = '정산', site = %s, at = clock_timestamp() WHERE (gov_id, quarter) = (%d, %d);\n",
			t.amount, site, t.place.id, t.settlement)
	}
	if t.fund > 0 {
		fmt.Fprintf(&b, "UPDATE finance.fund SET balance = balance - %d, notice = %s, site = %s, at = clock_timestamp() WHERE id = %d;\n",
			t.amount, pg.QuoteLiteral(t.place.title()), site, t.fund)
	}
	return b.String()
}
