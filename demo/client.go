package demo

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/term"
)

// Bounds of a client's waits.
const (
	connectTimeout  = 5 * time.Second
	transactionMax  = 30 * time.Second // longer than a gateway holds anybody
	reconnectPause  = 50 * time.Millisecond
	crossShare      = 0.10 // of payments: for a government of the other site
	fundShare       = 0.10 // of payments: also update a shared fund
	settlementShare = 0.15 // of payments: also update a settlement
)

// codeAgain is the one error after which a client makes the same transaction again: it has certainly not taken effect.
const codeAgain = "40001"

// codeUnknown is a gateway's word that it cannot learn what became of a COMMIT.
const codeUnknown = "08007"

// tally is what the clients of a load count while they run. Safe for concurrent use.
type tally struct {
	acknowledged [2]atomic.Int64 // by the site that acknowledged
	inDoubt      atomic.Int64
	rolledBack   atomic.Int64
	retries      atomic.Int64           // transactions made again after codeAgain
	unknown      atomic.Int64           // COMMITs that were answered by codeUnknown
	errors       atomic.Int64           // all other errors, of the connection or of a statement
	latest       atomic.Pointer[string] // the last payment, in words

	mu     sync.Mutex // guards failed
	failed []string   // the first errors, in words
}

// fail counts an error that no client should see.
func (t *tally) fail(client int, what string, err error) {
	t.errors.Add(1)
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.failed) < exampleMax {
		t.failed = append(t.failed, fmt.Sprintf("client %d, at %s, %s: %v", client, time.Now().Local().Format("15:04:05.000"), what, err))
	}
}

// failures are the first of them, in words.
func (t *tally) failures() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]string(nil), t.failed...)
}

// client is one user of the ledger: one connection to a gateway, which it keeps, and a record of its own. It knows nothing of
// sites: it makes a transaction again when it is told that it was rolled back, and that is all. A payment whose COMMIT got no
// answer is never tried again: it stays in doubt.
type client struct {
	id       int
	home     int // index of the site whose governments it mostly pays for
	dsn      string
	names    [2]string // of the sites
	record   *recorder
	tally    *tally
	interval time.Duration // between the beginnings of two payments
	rng      *rand.Rand
	places   []government

	conn    *pgconn.PgConn
	seq     int64
	waits   waits
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
		if err := c.connected(ctx); err != nil {
			c.fail(ctx, "connect", err)
			next = time.Now().Add(reconnectPause)
			continue
		}
		if err := c.pay(ctx); err != nil {
			return fmt.Errorf("client %d: %w", c.id, err)
		}
	}
}

// fail counts an error, unless it comes from the end of the demo.
func (c *client) fail(ctx context.Context, what string, err error) {
	if ctx.Err() == nil {
		c.tally.fail(c.id, what, err)
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

// connected makes sure of a connection: the first one, or another when that has broken.
func (c *client) connected(ctx context.Context) error {
	if c.conn != nil && !c.conn.IsClosed() {
		return nil
	}
	c.waits.begin() // until the next payment is answered
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	conn, err := pg.Connect(ctx, c.dsn, database, map[string]string{"application_name": "ledger"})
	if err != nil {
		return err
	}
	c.conn = conn
	return nil
}

// pay makes one payment, again as long as it is told that it was rolled back.
func (c *client) pay(ctx context.Context) error {
	c.seq++
	t := c.choose()
	c.waits.begin()
	for {
		again, err := c.try(ctx, t)
		if err != nil {
			return err
		}
		if !again || ctx.Err() != nil {
			return nil
		}
		c.tally.retries.Add(1)
	}
}

// try makes a payment's transaction once, and says whether to make it again.
func (c *client) try(ctx context.Context, t transfer) (again bool, err error) {
	all := ctx
	ctx, cancel := context.WithTimeout(ctx, transactionMax)
	defer cancel()
	if t.site, err = c.prepare(ctx, t); err != nil {
		// COMMIT was not sent, so nothing is there: no attempt to record.
		if again = pg.SQLState(err) == codeAgain; !again {
			c.fail(all, "before COMMIT", err)
		}
		c.tally.rolledBack.Add(1)
		c.rollback(all)
		return again, nil
	}
	if err := c.record.attempt(t.entry); err != nil {
		return false, err
	}
	tag, err := c.commit(ctx)
	o := commitOutcome(tag, err)
	switch code := pg.SQLState(err); {
	case o == committed:
	case code == codeAgain:
		again = true
	case code == codeUnknown:
		c.tally.unknown.Add(1)
		if c.lookUp(all, t.id) {
			o = committed
		}
	default:
		c.fail(all, "COMMIT", cause(tag, err))
	}
	if err := c.record.outcome(c.seq, o); err != nil {
		return false, err
	}
	c.count(o, t)
	c.rollback(all)
	return again, nil
}

// cause is what went wrong with a COMMIT.
func cause(tag string, err error) error {
	if err != nil {
		return err
	}
	return fmt.Errorf("it was answered by %q", tag)
}

// prepare makes everything of a payment's transaction up to COMMIT, and gives the site where it runs.
func (c *client) prepare(ctx context.Context, t transfer) (site string, err error) {
	results, err := c.conn.Exec(ctx, t.sql()).ReadAll()
	if err != nil {
		return "", err
	}
	for _, r := range results {
		if len(r.Rows) > 0 {
			return string(r.Rows[0][0]), nil
		}
	}
	return "", errors.New("the payment was not returned")
}

func (c *client) commit(ctx context.Context) (tag string, err error) {
	results, err := c.conn.Exec(ctx, "COMMIT").ReadAll()
	if err != nil || len(results) == 0 {
		return "", err
	}
	return results[0].CommandTag.String(), nil
}

// lookUp looks for a payment whose COMMIT was answered by "unknown", over a new connection: that answer has ended the old one.
// What is found is there. What is not may yet come from a site that is away: it stays in doubt.
func (c *client) lookUp(ctx context.Context, id string) (found bool) {
	pg.Close(c.conn)
	if err := c.connected(ctx); err != nil {
		c.fail(ctx, "connect to look up a payment", err)
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, transactionMax)
	defer cancel()
	rows, err := pg.Rows(ctx, c.conn, "SELECT 1 FROM finance.payment WHERE id = "+pg.QuoteLiteral(id))
	if err != nil {
		c.fail(ctx, "look up a payment", err)
	}
	return err == nil && len(rows) > 0
}

// rollback leaves a failed transaction, if there is one.
func (c *client) rollback(ctx context.Context) {
	const idle = 'I'
	if c.conn.IsClosed() || c.conn.TxStatus() == idle {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, transactionMax)
	defer cancel()
	if _, err := c.conn.Exec(ctx, "ROLLBACK").ReadAll(); err != nil {
		c.fail(ctx, "ROLLBACK", err)
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
	c.waits.end()
	at := 0
	if t.site == c.names[1] {
		at = 1
	}
	c.tally.acknowledged[at].Add(1)
	text := fmt.Sprintf("%s · %s · %s KRW · at %s", t.place.title(), budgetLines[t.line-1], term.Count(t.amount), t.site)
	c.tally.latest.Store(&text)
	c.current.Store(int32(at))
	if at == c.home {
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
			client: c.id, seq: c.seq, id: newUUID(time.Now(), c.rng),
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

// siteSetting is the parameter that tells a transaction at which site it runs.
const siteSetting = "app.site"

// sql is everything of the transaction up to COMMIT; it returns the site. All clients touch the tables in the same order, so that
// they do not deadlock with each other.
func (t transfer) sql() string {
	const site = "current_setting('" + siteSetting + "')"
	var b strings.Builder
	fmt.Fprintf(&b, "BEGIN;\nINSERT INTO finance.payment (id, gov_id, line, amount, payee, site, client, seq) VALUES ('%s', %d, %d, %d, %s, %s, %d, %d) RETURNING site;\n",
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
