// Package apply writes one origin's transactions into the local database: in the origin's order, exactly once, many
// merged into one local transaction, resolving conflicts by the rules of replication.md section 2. Whatever did not
// simply apply is recorded with both images in schema duri, in the same transaction.
//
// Progress is a row of duri.applied, written by the transaction that carries the data, so a crash at any moment neither
// loses nor repeats a transaction (rule 18). Apply sessions are ordinary clients with
// session_replication_role = replica; what they write carries the origin and is never sent again (rule 20).
package apply

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// Reader delivers an origin's journal from a position on. *journal.Reader is one.
type Reader interface {
	Next(ctx context.Context) (journal.Record, error)
	Close() error
}

// Config of a Worker.
type Config struct {
	Site wal.SiteID // this site
	// Origin is whose transactions are applied. When it is this site, they are given back to a database that lost them
	// (docs/adr/0008): one by one, because a row of this site is known by its transaction.
	Origin     wal.SiteID
	OriginName string // replication origin, see OriginName
	SiteOf     func(originName string) (wal.SiteID, bool)
	DSN        string
	Database   string
	// Check refuses a server that is not the one that the journal is of, on a connection to it; nil: none is refused.
	Check func(ctx context.Context, c *pgconn.PgConn) error
	// Open returns a reader of the origin's journal behind a position.
	Open func(from wal.LSN) (Reader, error)
	// Mesh is what the workers of this database share.
	Mesh *Mesh
	// Barrier waits until local decoding has passed a WAL position, hurrying it if need be (rule 8).
	Barrier func(ctx context.Context, lsn wal.LSN) error
	// Fetch asks the origin for the present row with row's key (rule 9). Nil: it cannot be asked.
	Fetch func(ctx context.Context, rel *wal.Relation, key []string, row wal.Tuple) (wal.Tuple, bool, error)
	// Policy is what is declared for a table, in force from a run's start to its end; nil: nothing for any. The histories
	// must know the same (Keys).
	Policy func(schema, table string) policy.Table
	// Applied is told after each commit which tables it wrote, each once, as wal.Relation.String has them. It must not
	// block. Nil: nobody asks.
	Applied func(tables []string)
	// Outcomes settles the fate of marked transactions; nil: marks mean nothing.
	Outcomes *Outcomes
	// Unacknowledged says of a marked transaction that it was never acknowledged and must not take effect any more: its site
	// had been left out when it committed it. It may wait until that is known. nil: none is.
	Unacknowledged func(ctx context.Context, t *wal.Txn) (bool, error)
	// Ghost is told of every transaction that does not take effect, before that is put down. It must not block. nil: nobody asks.
	Ghost func(t *wal.Txn)
	// Clock is the local PostgreSQL server's clock (rule 1).
	Clock func() wal.Time

	BatchTransactions int // default 2000
	BatchBytes        int // default 8 MiB
	// Pause is the least time between the starts of two batches. Each costs about as much whatever it merges, so that a
	// short pause leaves the machine to commits that wait for receipts.
	Pause          time.Duration
	LockTimeout    time.Duration // default 200 ms; below deadlock_timeout, so that a client is never the victim
	BarrierTimeout time.Duration // how long rows stay locked for the capture barrier; default 500 ms
	Logger         *slog.Logger
}

func (c *Config) defaults() {
	if c.BatchTransactions == 0 {
		c.BatchTransactions = 2000
	}
	if c.Origin == c.Site {
		c.BatchTransactions = 1
	}
	if c.BatchBytes == 0 {
		c.BatchBytes = 8 << 20
	}
	if c.LockTimeout == 0 {
		c.LockTimeout = 200 * time.Millisecond
	}
	if c.BarrierTimeout == 0 {
		c.BarrierTimeout = 500 * time.Millisecond
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Status is what a Worker tells of itself.
type Status struct {
	Applied      wal.LSN    `json:"applied"`      // committed here
	Durable      wal.LSN    `json:"durable"`      // and flushed here
	Passed       wal.LSN    `json:"-"`            // Applied, but for what waits for locks
	AppliedTime  wal.Time   `json:"-"`            // version time of the last transaction applied
	Seen         wal.LSN    `json:"seen"`         // of this site, by the last transaction applied
	SeenOthers   []wal.Seen `json:"-"`            // of third sites, likewise
	Transactions int64      `json:"transactions"` // applied since start
	Changes      int64      `json:"changes"`      // applied since start
	Conflicts    int64      `json:"conflicts"`    // recorded since start
	Held         int        `json:"held"`         // keys whose changes wait for a client's lock
	Blocker      string     `json:"blocker"`      // the sessions that were last seen to hold such locks
	Retries      int64      `json:"retries"`      // batches tried again since start
	HeldUntil    time.Time  `json:"held_until"`   // clock rule: nothing is applied before this
	LastError    string     `json:"last_error"`   // why nothing is being applied
	LastHint     string     `json:"last_hint"`
	LastErrorAt  time.Time  `json:"last_error_at"`
}

// Worker applies one origin. Run it once at a time; it may be run again after it ended.
type Worker struct {
	cfg Config

	mu        sync.Mutex // guards the fields up to the next gap
	status    Status
	at        wal.LSN    // committed up to here, but for what waits
	flushedTo wal.LSN    // and flushed up to here
	floor     wal.LSN    // before the oldest change that waits
	floorSeen []wal.Seen // what its transaction had seen
	seen      []wal.Seen // what the last transaction or position had seen
	waiting   bool       // for locks
	done      int        // batches executed in this run
	marks     []mark     // commits whose local flush is not confirmed yet
	// position is the last one that was read; it counts when positionAfter batches are done.
	position      *journal.Position
	positionAfter int

	// Of the executing goroutine: when this run began, and when rows were completed with values from the origin.
	began  wal.Time
	filled map[string]wal.Time
	aside  *aside

	session *session
	aux     *pgconn.PgConn // catalog reads and flush polling
	auxMu   sync.Mutex     // guards aux and targets
	targets map[wal.RelationID]*target
	tables  map[string]*table
	origins atomic.Pointer[map[uint32]wal.SiteID]
	roident string

	takenMu sync.Mutex // guards the rest
	taken   map[string]int
	ghosts  map[*wal.Txn]string // transactions that are emptied, and why
}

type mark struct{ source, local wal.LSN }

// New returns a worker that is not running.
func New(cfg Config) *Worker {
	cfg.defaults()
	return &Worker{cfg: cfg, taken: map[string]int{}, ghosts: map[*wal.Txn]string{}}
}

// Status returns a snapshot.
func (w *Worker) Status() Status {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.status
}

// TransactionError says which transaction could not be applied, and why. Nothing of it was written, and nothing
// behind it will be until it can be.
type TransactionError struct {
	Origin wal.SiteID
	LSN    wal.LSN
	XID    uint32
	Err    error
}

// Error gives the sentence that is printed.
func (e *TransactionError) Error() string {
	return fmt.Sprintf("apply transaction %s (xid %d) of site %d: %v", e.LSN, e.XID, e.Origin, e.Err)
}

// Unwrap returns the cause.
func (e *TransactionError) Unwrap() error { return e.Err }

// HintText is the advice that goes with the error.
func (e *TransactionError) HintText() string {
	if t, ok := errors.AsType[*TableError](e.Err); ok {
		return t.Hint
	}
	if pg.SQLState(e.Err) == "23505" {
		return "two rows want one unique value; change one of them at the site that has it, apply then goes on by itself"
	}
	return "remove the cause at this site; apply then goes on by itself"
}

// Run applies until ctx ends (nil) or something stops it (the error). The caller runs it again after a pause.
func (w *Worker) Run(ctx context.Context) error {
	err := w.run(ctx)
	if ctx.Err() != nil {
		return nil
	}
	w.mu.Lock()
	w.status.LastError, w.status.LastHint, w.status.LastErrorAt = err.Error(), hintOf(err), time.Now()
	w.mu.Unlock()
	return err
}

// hintOf finds the advice in an error's chain.
func hintOf(err error) string {
	var h interface{ HintText() string }
	if errors.As(err, &h) {
		return h.HintText()
	}
	return pg.Hint(err)
}

func (w *Worker) run(ctx context.Context) error {
	if err := w.connect(ctx); err != nil {
		return err
	}
	defer w.close()
	defer w.giveUp()
	if w.cfg.Check != nil {
		if err := w.cfg.Check(ctx, w.session.conn); err != nil {
			return err
		}
	}
	from, err := w.progress(ctx)
	if err != nil {
		return fmt.Errorf("read progress of origin %s: %w", w.cfg.OriginName, err)
	}
	if err := w.loadAside(ctx); err != nil {
		return err
	}
	w.cfg.Mesh.RestartAt(w.cfg.Origin, from)
	w.reached(from, nil)
	r, err := w.cfg.Open(from)
	if err != nil {
		return fmt.Errorf("read the journal of site %d from %s: %w", w.cfg.Origin, from, err)
	}
	defer func() { _ = r.Close() }()
	g, ctx := errgroup.WithContext(ctx)
	records := make(chan []journal.Record, 16)
	batches := make(chan *planner)
	g.Go(func() error { return read(ctx, r, records) })
	g.Go(func() error { return w.gather(ctx, records, batches) })
	g.Go(func() error { return w.execute(ctx, batches) })
	g.Go(func() error { return w.pollFlush(ctx) })
	return g.Wait()
}

// connect opens both sessions and takes the replication origin.
func (w *Worker) connect(ctx context.Context) error {
	err := w.open(ctx, "duri_apply_"+strconv.Itoa(int(w.cfg.Origin)))
	if err != nil {
		return err
	}
	if err = w.takeOrigin(ctx); err != nil {
		w.close()
	}
	return err
}

// open makes the sessions of a worker.
func (w *Worker) open(ctx context.Context, name string) error {
	conn, err := pg.Connect(ctx, w.cfg.DSN, w.cfg.Database, w.settings(name))
	if err != nil {
		return fmt.Errorf("connect to apply: %w", err)
	}
	// The search path decides how type names are written; they must be read in the apply session.
	aux, err := pg.Connect(ctx, w.cfg.DSN, w.cfg.Database, map[string]string{"application_name": "duri_apply_aux", "search_path": "pg_catalog"})
	if err != nil {
		pg.Close(conn)
		return fmt.Errorf("connect to apply: %w", err)
	}
	w.session, w.aux = newSession(conn), aux
	w.auxMu.Lock()
	w.targets, w.tables = map[wal.RelationID]*target{}, map[string]*table{}
	w.auxMu.Unlock()
	w.began, w.filled = w.cfg.Clock(), map[string]wal.Time{}
	rows, err := pg.Rows(ctx, aux, snapshotSQL)
	if err == nil {
		err = w.cfg.Mesh.Local.takeSnapshot([][]byte{[]byte(rows[0][0]), []byte(rows[0][1])})
	}
	if err != nil {
		w.close()
	}
	return err
}

// close ends the sessions.
func (w *Worker) close() {
	pg.Close(w.session.conn)
	pg.Close(w.aux)
}

// settings of an apply session. It commits asynchronously: progress is in the same transaction, and what is reported
// as applied waits for the flush (peers.md section 5).
func (w *Worker) settings(name string) map[string]string {
	ms := func(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) + "ms" }
	return map[string]string{
		"application_name":                    name,
		"session_replication_role":            "replica",
		"synchronous_commit":                  "off",
		"search_path":                         "pg_catalog",
		"plan_cache_mode":                     "force_generic_plan",
		"lock_timeout":                        ms(w.cfg.LockTimeout),
		"deadlock_timeout":                    ms(min(w.cfg.LockTimeout/2, 100*time.Millisecond)),
		"jit":                                 "off",
		"row_security":                        "off",
		"idle_in_transaction_session_timeout": "60s",
	}
}

// originTimeout is how long a session that held the origin before is waited for.
const originTimeout = 5 * time.Second

func (w *Worker) takeOrigin(ctx context.Context) error {
	_, err := pg.Query(ctx, w.session.conn, `SELECT pg_catalog.pg_replication_origin_create($1)
		WHERE pg_catalog.pg_replication_origin_oid($1) IS NULL`, w.cfg.OriginName)
	for deadline := time.Now().Add(originTimeout); err == nil; {
		_, err = pg.Query(ctx, w.session.conn, "SELECT pg_catalog.pg_replication_origin_session_setup($1)", w.cfg.OriginName)
		if pg.SQLState(err) != "55006" || time.Now().After(deadline) {
			break
		}
		err = pause(ctx, 10*time.Millisecond) // PostgreSQL has not noticed yet that our last session is gone
	}
	if err != nil {
		return fmt.Errorf("take replication origin %s: %w", w.cfg.OriginName, err)
	}
	return w.loadOrigins(ctx)
}

// loadOrigins maps replication origins to sites.
func (w *Worker) loadOrigins(ctx context.Context) error {
	rows, err := pg.Rows(ctx, w.session.conn, "SELECT roident, roname FROM pg_catalog.pg_replication_origin")
	if err != nil {
		return fmt.Errorf("read replication origins: %w", err)
	}
	m := map[uint32]wal.SiteID{}
	for _, r := range rows {
		id, err := strconv.ParseUint(r[0], 10, 32)
		if err != nil {
			return fmt.Errorf("read replication origins: %w", err)
		}
		if site, ok := w.cfg.SiteOf(r[1]); ok {
			m[uint32(id)] = site
		}
		if r[1] == w.cfg.OriginName {
			w.roident = r[0]
		}
	}
	w.origins.Store(&m)
	return nil
}

func (w *Worker) siteOf(roident uint32) (wal.SiteID, bool) {
	site, ok := (*w.origins.Load())[roident]
	return site, ok
}

// progress reads how far this origin has been applied: what the transactions that applied it say. The replication
// origin's own progress is not asked, because an apply transaction that was undone may have moved it (PostgreSQL 16 and
// later). What is read is flushed before it counts as durable.
func (w *Worker) progress(ctx context.Context) (wal.LSN, error) {
	rows, err := pg.Query(ctx, w.session.conn, "SELECT coalesce(max(to_lsn), '0/0') FROM duri.applied WHERE origin = $1::int2", fmt.Sprint(w.cfg.Origin))
	if err != nil {
		return 0, err
	}
	from, err := wal.ParseLSN(rows[0][0])
	if err != nil {
		return 0, err
	}
	if _, err := pg.Rows(ctx, w.session.conn, "SELECT pg_catalog.pg_replication_origin_session_progress(true)"); err != nil {
		return 0, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at, w.flushedTo = from, from
	w.marks, w.done, w.position = nil, 0, nil
	return from, nil
}

// readAhead bounds how many records are handed over at a time: a channel operation for each would cost more than
// reading it.
const readAhead = 256

// read moves records from the journal into the channel, as many at a time as there are.
func read(ctx context.Context, r Reader, out chan<- []journal.Record) error {
	more, _ := r.(interface {
		TryNext() (journal.Record, bool, error)
	})
	for {
		rec, err := r.Next(ctx)
		if err != nil {
			return err
		}
		recs := append(make([]journal.Record, 0, 16), rec)
		for more != nil && len(recs) < readAhead {
			rec, ok, err := more.TryNext()
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			recs = append(recs, rec)
		}
		select {
		case out <- recs:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// gather builds batches from what is there and hands one over whenever the executor is free: it never waits to fill
// one, and a batch grows while the executor is busy. A transaction from the future is held (rule 1).
func (w *Worker) gather(ctx context.Context, in <-chan []journal.Record, out chan<- *planner) error {
	p := w.newPlanner()
	var queue []journal.Record // read, not yet looked at
	sent := 0
	var heldTxn *wal.Txn
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		if heldTxn != nil {
			if ahead := heldTxn.VersionTime.Sub(w.cfg.Clock()); ahead >= 0 {
				timer.Reset(min(ahead+time.Millisecond, clockEvery))
			} else {
				if err := w.add(ctx, &p, heldTxn, out); err != nil {
					return err
				}
				heldTxn = nil
				w.hold(time.Time{})
			}
		}
		source, sink := in, out
		take := heldTxn == nil && !p.full(w.cfg)
		if !take || len(queue) > 0 {
			source = nil
		}
		if len(p.batch.txns) == 0 {
			sink = nil
		}
		if take && len(queue) > 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case sink <- p:
				p = w.newPlanner()
				sent++
			default:
			}
			rec := queue[0]
			queue = queue[1:]
			switch {
			case rec.Txn == nil:
				w.passPosition(rec.Position, sent+min(1, len(p.batch.txns)))
			case rec.Txn.VersionTime >= w.cfg.Clock():
				heldTxn = rec.Txn
				w.hold(rec.Txn.VersionTime.Std())
			default:
				if err := w.add(ctx, &p, rec.Txn, out); err != nil {
					return err
				}
			}
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		case sink <- p:
			p = w.newPlanner()
			sent++
		case queue = <-source:
		}
	}
}

// clockEvery is how often the clock is looked at again while a transaction is held, as it may be set meanwhile.
const clockEvery = 500 * time.Millisecond

// add puts a transaction into the batch. One that cannot be planned stops the stream, but only after everything
// before it has been handed over.
func (w *Worker) add(ctx context.Context, p **planner, t *wal.Txn, out chan<- *planner) error {
	reason, err := w.ghostOf(ctx, t)
	if err != nil {
		return err
	}
	if reason != "" { // nothing of it takes effect, but it is passed, and put down
		empty := *t
		empty.Changes = nil
		t = &empty
		w.takenMu.Lock()
		w.ghosts[t] = reason
		w.takenMu.Unlock()
	}
	if err := w.cfg.Mesh.publish(t); err != nil {
		return err
	}
	err = (*p).addTxn(t)
	if err == nil {
		return nil
	}
	good := (*p).batch.txns
	if len(good) > 0 {
		prefix, perr := planTxns(good, w.resolve, w.cfg.Mesh.behind, true)
		if perr != nil {
			return perr
		}
		select {
		case out <- prefix:
		case <-ctx.Done():
			return ctx.Err()
		}
		select { // the executor takes the next one only when it has finished that
		case out <- w.newPlanner():
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return &TransactionError{w.cfg.Origin, t.CommitLSN, t.XID, err}
}

func (w *Worker) hold(until time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status.HeldUntil = until
}

// passPosition notes that the origin has nothing up to a position: when the given number of batches is done it counts as
// applied. With one under way it must not, because what that batch had not seen is still needed to judge it.
func (w *Worker) passPosition(pos *journal.Position, sent int) {
	if pos == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.position, w.positionAfter = pos, sent
	w.takePosition()
}

// takePosition lets the last position count when all before it is done. w.mu is held.
func (w *Worker) takePosition() {
	pos := w.position
	if pos == nil || w.positionAfter != w.done {
		return
	}
	w.position = nil
	w.at = max(w.at, pos.To)
	if n := len(w.marks); n > 0 { // as durable as the last commit before it
		w.marks = append(w.marks, mark{w.at, w.marks[n-1].local})
	} else {
		w.flushedTo = w.at
	}
	w.takeSeen(pos.Seen)
	w.show()
}

// reached notes a commit, and what the worker has set aside by now. mark is nil when there was none.
func (w *Worker) reached(to wal.LSN, m *mark) {
	floor, waits := w.aside.floor()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at = max(w.at, to)
	if m != nil {
		w.marks = append(w.marks, *m)
	}
	w.floor, w.status.Held = floor, len(w.aside.keys)
	if waits {
		w.floorSeen = w.aside.txns[floor].Seen
	} else {
		w.floor = math.MaxUint64
	}
	w.showSeen()
	w.waiting = waits
	if !waits {
		w.status.Blocker = ""
	}
	w.show()
}

// show puts the positions into the status: neither passes what waits. w.mu is held.
func (w *Worker) show() {
	w.status.Applied, w.status.Durable, w.status.Passed = min(w.at, w.floor), min(w.flushedTo, w.floor), w.at
	w.cfg.Mesh.setApplied(w.cfg.Origin, w.status.Applied)
}

// takeSeen notes what the origin had seen. w.mu is held.
func (w *Worker) takeSeen(seen []wal.Seen) {
	w.seen = seen
	w.showSeen()
}

// showSeen puts into the status what the origin had seen when it wrote the oldest change that is still to be applied: what
// that one had not seen must not be forgotten. w.mu is held.
func (w *Worker) showSeen() {
	seen := w.seen
	if w.floor != math.MaxUint64 {
		seen = w.floorSeen
	}
	var others []wal.Seen
	w.status.Seen = wal.SeenOf(seen, w.cfg.Site)
	for _, s := range seen {
		if s.Site != w.cfg.Site {
			others = append(others, s)
		}
	}
	w.status.SeenOthers = others
}

func (w *Worker) newPlanner() *planner { return newPlanner(w.resolve, w.cfg.Mesh.behind, true) }

// resolve finds the target of a relation, reading the catalog once per definition.
func (w *Worker) resolve(rel *wal.Relation) (*target, error) {
	w.auxMu.Lock()
	defer w.auxMu.Unlock()
	if g := w.targets[rel.ID]; g != nil {
		return g, nil
	}
	t, err := w.table(rel.Namespace, rel.Name)
	if err != nil {
		return nil, err
	}
	g, err := bind(t, rel, w.policy(rel.Namespace, rel.Name))
	if err == nil {
		w.targets[rel.ID] = g
	}
	return g, err
}

// policy is what is declared for a table.
func (w *Worker) policy(schema, name string) policy.Table {
	if w.cfg.Policy == nil {
		return policy.Table{}
	}
	return w.cfg.Policy(schema, name)
}

func (w *Worker) table(schema, name string) (*table, error) {
	if t := w.tables[schema+"."+name]; t != nil {
		return t, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	t, err := loadTable(ctx, w.aux, schema, name)
	if err == nil {
		w.tables[schema+"."+name] = t
	}
	return t, err
}

// execute applies batches as they come.
func (w *Worker) execute(ctx context.Context, in <-chan *planner) error {
	again := time.NewTicker(heldEvery)
	defer again.Stop()
	for {
		if len(w.aside.keys) > 0 && time.Since(w.aside.tried) >= heldEvery {
			if err := w.tryAside(ctx); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-again.C:
		case p := <-in:
			p.cut()
			if len(p.batch.txns) == 0 {
				continue
			}
			begun := time.Now()
			if err := w.applyBatch(ctx, p.batch); err != nil {
				return err
			}
			w.mu.Lock()
			w.done++
			w.takePosition()
			w.mu.Unlock()
			if rest := w.cfg.Pause - time.Since(begun); rest > 0 {
				if err := pause(ctx, rest); err != nil {
					return err
				}
			}
		}
	}
}

// flushInterval is how often the local flush position is asked for while commits wait for it.
const flushInterval = 50 * time.Millisecond

// pollFlush moves Durable: an apply commit counts as durable when the local flush has passed it.
func (w *Worker) pollFlush(ctx context.Context) error {
	for {
		if err := pause(ctx, flushInterval); err != nil {
			return err
		}
		w.mu.Lock()
		unflushed, waiting := len(w.marks) > 0, w.waiting
		w.mu.Unlock()
		if waiting {
			if err := w.findBlocker(ctx, w.session.conn.PID()); err != nil {
				return err
			}
		}
		if !unflushed {
			continue
		}
		w.auxMu.Lock()
		rows, err := pg.Rows(ctx, w.aux, "SELECT pg_catalog.pg_current_wal_flush_lsn()")
		w.auxMu.Unlock()
		if err != nil {
			return fmt.Errorf("read the flush position: %w", err)
		}
		lsn, err := wal.ParseLSN(rows[0][0])
		if err != nil {
			return err
		}
		w.flushed(lsn)
	}
}

func (w *Worker) flushed(local wal.LSN) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for n < len(w.marks) && w.marks[n].local <= local {
		w.flushedTo = w.marks[n].source
		n++
	}
	w.marks = w.marks[n:]
	w.show()
}
