package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/decode"
	"github.com/duri-io/duri/fkey"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/verify"
	"github.com/duri-io/duri/wal"
)

// Publication is the publication that `duri grants` makes in every replicated database.
const Publication = "duri"

// node is one database at this site: its capture, its journals, and one peer per other site.
type node struct {
	cfg      *config.Config
	database config.Database
	self     config.Site
	log      *slog.Logger
	clock    *serverClock
	hooks    Hooks
	keeper   *keeper // nil without a register
	peers    []*peer
	ready    atomic.Pointer[captured]     // set once journal and index are open
	looked   broadcast                    // the budget was looked at
	over     atomic.Bool                  // the journal budget is used up
	room     atomic.Pointer[BudgetStatus] // of the journals
	walRoom  atomic.Pointer[BudgetStatus] // of the WAL that the slot holds; nil: max_slot_wal_keep_size does not bound it
	gate     gate                         // of decoding

	back    atomic.Pointer[givingBack] // what the database lacks of its journal; nil: nothing
	stopped atomic.Bool                // the server is not the one that the journal is of, and decoding has stopped
	known   atomic.Bool                // the server was compared with the journal since decoding began or ended
	fitted  atomic.Bool                // it was in this life of the agent
	turned  chan struct{}              // has a value when the journal has turned

	sql  *session // for clock, heartbeat, barrier, maintenance
	rows *session // for rows that peers fetch
	keys *apply.Keys
	db   *verify.DB

	checker  *fkey.Checker
	policyMu sync.Mutex                 // held while policies and the workers' permits change
	policies atomic.Pointer[policy.Set] // in force; nil until the database is open

	mu       sync.Mutex // guards the fields up to the next gap
	state    string
	fault    fault
	stepped  time.Time // last backward clock step seen
	parked   []ParkedTable
	parkedAt time.Time // when they were counted

	emitted  time.Time                 // last heartbeat message; used by the heartbeat loop alone
	counted  atomic.Bool               // PostgreSQL lets commits wait for this agent
	mute     atomic.Pointer[time.Time] // when the stream of decoding ended; nil: it runs, or has not begun yet
	outcomes *apply.Outcomes           // of the other sites' marked transactions
	marks    marks                     // of this site's own
	recover  atomic.Uint64             // what the server had flushed when the stream was last opened
	commits  commits                   // of this site
	ages     []age                     // used by the maintenance loop alone
	told     map[string]bool           // findings that are in the log; used by open alone
	// statement is what this site says of itself to the others; nil without a register. Replaced by the keeper.
	statement atomic.Pointer[link.Statement]
	said      time.Time // when that was; the keeper's
	used      usage     // used by the maintenance loop alone
	walUsed   usage     // used by the heartbeat loop alone

	forgotten error // see recall; set by open alone
}

// captured is what exists once a database has been opened.
type captured struct {
	journal *journal.Journal
	local   *apply.History
	mesh    *apply.Mesh
	capture *capture
	opened  time.Time
	past    *journal.Journal // see openPast; used by the maintenance loop alone once it runs
}

// ownBytes is the disk that this site's own journal takes, with what it remembers of what it let go of.
func (c *captured) ownBytes() int64 {
	bytes := c.journal.DiskBytes()
	if c.past != nil {
		bytes += c.past.DiskBytes()
	}
	return bytes
}

// fault is why a part does not work just now.
type fault struct {
	Text string    `json:"text"`
	Hint string    `json:"hint,omitempty"`
	At   time.Time `json:"at"`
}

// newFault says what was attempted, why it failed, and what to do.
func newFault(what string, err error) fault {
	f := fault{Text: what + ": " + err.Error(), Hint: hintOf(err), At: time.Now()}
	f.Text = strings.TrimSuffix(f.Text, ": "+f.Hint) // some errors end with their hint
	return f
}

// age pairs a moment with the journal's end at that moment.
type age struct {
	at  time.Time
	end wal.LSN
}

// Slot is the name of a database's replication slot.
func Slot(database string) string { return "duri_" + slotPart(database) }

// slotPart makes a database name fit a slot's name: lower-case letters, digits and underscores. A name that does not fit
// is told apart from others that look like it then by a part of its hash.
func slotPart(s string) string {
	const most = 40
	out := []byte{}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			c = '_'
		}
		out = append(out, c)
	}
	if string(out) == s && len(s) <= most {
		return s
	}
	sum := sha256.Sum256([]byte(s))
	return fmt.Sprintf("%s_%x", out[:min(len(out), most)], sum[:4])
}

func (n *node) dir(parts ...string) string {
	return filepath.Join(append([]string{n.cfg.DataDir, "journal", slotPart(n.database.Name)}, parts...)...)
}

func (n *node) setState(s string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.state != s {
		n.log.Info("database "+s, "database", n.database.Name)
	}
	n.state = s
	if s == stateReady {
		n.fault = fault{}
	}
}

// States of a database at a site.
const (
	stateStarting = "starting"
	stateWaiting  = "waiting" // for its server, a peer, or a person
	stateJoining  = "joining"
	stateReady    = "ready"
	stateBehind   = "behind its journal" // it was set back, and is given back what it lost
)

// failed notes why something does not work and logs it when it is news.
func (n *node) failed(what string, err error) {
	f := newFault(what, err)
	n.mu.Lock()
	news := n.fault.Text != f.Text
	n.fault = f
	n.mu.Unlock()
	if news {
		n.log.Warn(f.Text, "database", n.database.Name, "hint", f.Hint)
	}
	var gap *decode.GapError
	if news && errors.As(err, &gap) {
		n.event("gap", f.Text)
	}
}

// event keeps what people must see in duri.event as well as in the log. It does not insist: the server may be what
// fails.
func (n *node) event(kind, text string) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	err := n.withSQL(ctx, func(c *pgconn.PgConn) error { return catalog.Event(ctx, c, kind, text, nil) })
	if err != nil {
		n.log.Debug("record an event", "database", n.database.Name, "kind", kind, "error", err)
	}
}

// siteOf maps a replication origin's name to a site.
func (n *node) siteOf(origin string) (wal.SiteID, bool) {
	for _, s := range n.cfg.Sites {
		if origin == apply.OriginName(n.database.Name, s.Name) || origin == apply.RepairOriginName(n.database.Name, s.Name) {
			return s.ID, true
		}
	}
	return n.self.ID, n.ownOrigin(origin)
}

// ownOrigin reports whether a transaction under an origin is one of this site's own: only tests make such.
func (n *node) ownOrigin(origin string) bool {
	return n.hooks.Clock != nil && apply.IsClockOrigin(n.database.Name, origin)
}

// repairOrigin reports whether a transaction under an origin says nothing of a site's progress.
func (n *node) repairOrigin(origin string) bool {
	return slices.ContainsFunc(n.cfg.Sites, func(s config.Site) bool {
		return origin == apply.RepairOriginName(n.database.Name, s.Name)
	})
}

// Run opens the database, joining the cluster first if need be, and works until ctx ends. Whatever fails is tried
// again and shown in the status meanwhile; only a damaged journal ends it.
func (n *node) Run(ctx context.Context) error {
	err := retry(ctx, n.failed, "open database "+n.database.Name, longestPause, func() error { return n.open(ctx) })
	if err != nil {
		return err
	}
	c := n.ready.Load()
	defer func() {
		err := c.journal.Close()
		if c.past != nil {
			err = errors.Join(err, c.past.Close())
		}
		if err != nil {
			n.log.Error("close journal", "database", n.database.Name, "error", err)
		}
	}()
	if n.back.Load() == nil {
		n.setState(stateReady)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.captureLoop(ctx, c) })
	g.Go(func() error { return c.capture.flushLoop(ctx) })
	g.Go(func() error { return c.capture.syncLoop(ctx) })
	g.Go(func() error { return n.giveBackLoop(ctx, c) })
	g.Go(func() error { return n.heartbeatLoop(ctx, c) })
	g.Go(func() error { return n.maintainLoop(ctx, c) })
	g.Go(func() error { return n.unparkLoop(ctx, c) })
	g.Go(func() error { return n.surveyLoop(ctx) })
	g.Go(func() error { return n.checker.Run(ctx) })
	for _, p := range n.peers {
		g.Go(func() error { return p.run(ctx) })
	}
	err = g.Wait()
	n.sql.close()
	n.rows.close()
	n.keys.Close()
	n.db.Close()
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil
	}
	return err
}

// unparkLoop brings parked rows back when what hid them makes way (rule 11).
func (n *node) unparkLoop(ctx context.Context, c *captured) error {
	u := apply.NewUnparker(apply.Config{
		Site: n.self.ID, SiteOf: n.siteOf, DSN: n.cfg.Postgres.DSN, Database: n.database.Name, Mesh: c.mesh, Policy: n.policyOf,
		Barrier: func(ctx context.Context, lsn wal.LSN) error { return n.barrier(ctx, c, lsn) },
		Clock:   n.clock.Now, LockTimeout: n.cfg.Apply.LockTimeout.Std(), Logger: n.log,
	}, n.repairOriginOf)
	told := ""
	failed := func(what string, err error) {
		if f := newFault(what, err); f.Text != told {
			told = f.Text
			n.log.Warn(f.Text, "database", n.database.Name, "hint", f.Hint)
		}
	}
	for {
		run := func() error {
			if why := n.behindJournal(); why != "" {
				return errors.New(why)
			}
			return u.Run(ctx)
		}
		if err := retry(ctx, failed, "bring parked rows back", longestPause, run); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// repairOriginOf names the origin under which a site's rows are written here by other means than applying; empty for an
// unknown site.
func (n *node) repairOriginOf(site wal.SiteID) string {
	for _, s := range n.cfg.Sites {
		if s.ID == site {
			return apply.RepairOriginName(n.database.Name, s.Name)
		}
	}
	return ""
}

// longestPause is the longest time between two attempts at what may mend itself.
const longestPause = 2 * time.Second

// retry runs f until it succeeds or ctx ends, pausing longer each time, up to longest.
func retry(ctx context.Context, failed func(string, error), what string, longest time.Duration, f func() error) error {
	const first, settled = 100 * time.Millisecond, 5 * time.Second
	pause := first
	for {
		began := time.Now()
		err := f()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		failed(what, err)
		if time.Since(began) > settled { // it had worked meanwhile
			pause = first
		}
		wait := pause
		if permanent(err) {
			wait = 5 * longestPause
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		pause = min(2*pause, longest)
	}
}

// permanent reports an error that only a person can mend; it is looked at again less often.
func permanent(err error) bool {
	var gap *decode.GapError
	return errors.As(err, &gap) || !link.Retry(err)
}

// captureLoop keeps the decode stream running.
func (n *node) captureLoop(ctx context.Context, c *captured) error {
	for {
		err := retry(ctx, n.failed, "decode", longestPause, func() error {
			err := n.stream(ctx, c)
			now := time.Now()
			n.mute.CompareAndSwap(nil, &now)
			n.recover.Store(0) // what the server has committed until the next stream begins is not known
			if pg.IsConnectionError(err) {
				n.keeper.suspectServer()
				n.known.Store(false) // it may be another server that comes back
			}
			n.keeper.stir()
			return err
		})
		if err != nil {
			return err
		}
	}
}

// hinted is an error sentence with advice.
type hinted struct{ text, hint string }

func (e *hinted) Error() string    { return e.text }
func (e *hinted) HintText() string { return e.hint }

// stream opens the replication connection, checks that the slot continues the journal, and streams until something
// breaks.
func (n *node) stream(ctx context.Context, c *captured) error {
	ctx, leave, err := n.gate.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	slot := Slot(n.database.Name)
	connect := decode.Connect
	if n.waits() {
		connect = decode.ConnectPrompt
	}
	conn, err := connect(ctx, n.cfg.Postgres.DSN, n.database.Name, slot)
	if err != nil {
		return err
	}
	ok := false
	defer func() {
		if !ok {
			pg.Close(conn)
		}
	}()
	if err := n.reconcile(ctx, c, conn); err != nil {
		return err
	}
	if err := n.measureClock(ctx, conn); err != nil {
		return err
	}
	if err := n.noteRecovered(ctx, conn); err != nil {
		return err
	}
	st, err := decode.Open(ctx, conn, decode.Config{
		DSN: n.cfg.Postgres.DSN, Database: n.database.Name, Slot: slot, Publication: Publication,
		Report: c.capture.Positions, Name: slot, Own: n.ownOrigin,
	}, c.journal.End())
	if err != nil {
		return err
	}
	ok = true
	n.mute.Store(nil)
	c.capture.setReport(st.Report)
	if n.back.Load() == nil {
		n.setState(stateReady)
	}
	err = st.Run(ctx, c.capture)
	if err == nil {
		return context.Cause(ctx)
	}
	return err
}

func (n *node) measureClock(ctx context.Context, conn *pgconn.PgConn) error {
	rows, err := pg.Rows(ctx, conn, "SELECT (extract(epoch from clock_timestamp()) * 1000000)::int8 - 946684800000000")
	if err != nil {
		return fmt.Errorf("read the server's clock: %w", err)
	}
	var t int64
	if _, err := fmt.Sscan(rows[0][0], &t); err != nil {
		return err
	}
	if n.hooks.Clock != nil {
		t = int64(wal.Time(t).Add(n.hooks.Clock()))
	}
	n.clock.set(wal.Time(t), time.Now())
	return nil
}

// newSessions makes the node's own sessions.
func (n *node) newSessions() {
	with := func(settings map[string]string) *session {
		return &session{dsn: n.cfg.Postgres.DSN, database: n.database.Name, settings: settings}
	}
	n.sql = with(map[string]string{
		"application_name":   "duri_agent",
		"synchronous_commit": "local", // its commits exist to flush the WAL, and wait for nobody else
		"statement_timeout":  "30s",
	})
	// The peer holds rows locked while it asks for one of ours, and so may we at the same moment: two such waits behind
	// clients' locks could wait for each other across sites, which no server would notice.
	n.rows = with(map[string]string{"application_name": "duri_fetch", "lock_timeout": "200ms", "statement_timeout": "5s"})
}

// withSQL lends the utility session.
func (n *node) withSQL(ctx context.Context, f func(*pgconn.PgConn) error) error {
	return n.sql.do(ctx, f)
}

// emit writes a message into the WAL and flushes it: the walsender then delivers everything before it.
func (n *node) emit(ctx context.Context, what string) error {
	return n.withSQL(ctx, func(c *pgconn.PgConn) error {
		_, err := pg.Query(ctx, c, "SELECT pg_catalog.pg_logical_emit_message(true, $1, '')", decode.MessagePrefix+"."+what)
		return err
	})
}

// barrierPatience is how long a barrier waits for what others commit before it writes something itself.
const barrierPatience = time.Millisecond

// barrier is the capture barrier of rule 8.
func (n *node) barrier(ctx context.Context, c *captured, lsn wal.LSN) error {
	if c.capture.busy() { // clients' commits will do: a message costs a round trip and a flush
		soon, cancel := context.WithTimeout(ctx, barrierPatience)
		err := c.local.WaitFor(soon, lsn)
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
	if c.local.Position() >= lsn {
		return nil
	}
	if err := n.emit(ctx, "barrier"); err != nil {
		return err
	}
	return c.local.WaitFor(ctx, lsn)
}

// heartbeatEvery is how often an idle database gets a message of its own.
const heartbeatEvery = 10 * time.Second

// heartbeatLoop follows the server's clock, and moves the stream on in a database that is idle while others write, so
// that its slot does not hold their WAL.
func (n *node) heartbeatLoop(ctx context.Context, c *captured) error {
	t := time.NewTicker(n.cfg.Heartbeat.Std())
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		if err := n.beat(ctx, c); err != nil && ctx.Err() == nil {
			n.log.Debug("heartbeat", "database", n.database.Name, "error", err)
		}
	}
}

func (n *node) beat(ctx context.Context, c *captured) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var flush wal.LSN
	held := false
	err := n.withSQL(ctx, func(conn *pgconn.PgConn) error {
		if err := n.measureClock(ctx, conn); err != nil {
			return err
		}
		rows, err := pg.Query(ctx, conn, `SELECT pg_catalog.pg_current_wal_flush_lsn(),
			(SELECT bool_or(sync_state IN ('sync', 'quorum'))::text FROM pg_catalog.pg_stat_replication WHERE application_name = $1)`, Slot(n.database.Name))
		if err == nil {
			n.counted.Store(rows[0][1] == "true")
			flush, err = wal.ParseLSN(rows[0][0])
		}
		if err == nil {
			held, err = n.measureWAL(ctx, conn)
		}
		return err
	})
	if err != nil {
		return err
	}
	if held {
		n.alarm("wal_budget", *n.walRoom.Load(), WALUsed)
	}
	behind := flush > c.local.Position()
	if time.Since(n.emitted) < heartbeatEvery && (!behind || time.Since(n.emitted) <= time.Second) {
		return nil
	}
	n.emitted = time.Now()
	return n.emit(ctx, "heartbeat")
}

// maintainEvery is how often retention and the budget are looked at. Who fills the own journal beyond it waits for that (capture.awaitLook).
const maintainEvery = 250 * time.Millisecond

// progressEvery is how often it is asked for retention how far the peers have been applied.
const progressEvery = time.Second

func (n *node) maintainLoop(ctx context.Context, c *captured) error {
	t := time.NewTicker(maintainEvery)
	defer t.Stop()
	var tables, asked time.Time
	var applied []wal.Seen
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		if time.Since(asked) >= progressEvery {
			if now, err := n.progress(ctx); err == nil {
				applied = now
			}
			asked = time.Now()
		}
		n.settleGaps(ctx, c)
		if err := n.retain(ctx, c, applied); err != nil {
			return err
		}
		if time.Since(tables) < time.Hour {
			continue
		}
		err := n.withSQL(ctx, func(conn *pgconn.PgConn) error {
			return catalog.Maintain(ctx, conn, n.cfg.Conflict.Keep.Std(), time.Now())
		})
		if err != nil {
			n.log.Debug("maintain schema duri", "database", n.database.Name, "error", err)
			continue
		}
		tables = time.Now()
	}
}

// retain prunes journals by watermark and age, forgets local history that everybody has seen, and watches the budget.
// applied is how far the peers have been applied here durably.
func (n *node) retain(ctx context.Context, c *captured, applied []wal.Seen) error {
	now := time.Now()
	n.ages = append(n.ages, age{now, c.journal.End()})
	keep := n.cfg.Journal.Keep.Std()
	if r := n.room.Load(); r != nil && r.Level != LevelOK {
		keep = 0 // what is only kept for convenience goes first
	}
	old := wal.LSN(0)
	for len(n.ages) > 1 && now.Sub(n.ages[1].at) >= keep {
		n.ages = n.ages[1:]
	}
	if now.Sub(n.ages[0].at) >= keep {
		old = n.ages[0].end
	}
	sizes := []int64{0}
	needed, seen := c.journal.Durable(), c.journal.End()
	for _, p := range n.peers {
		needed = min(needed, p.acked().Durable, p.seen())
		seen = min(seen, p.seen())
		seenOfPeer := n.seenByOthers(p)
		// What is known and not applied yet has its use as well.
		c.mesh.Prune(p.site.ID, min(seenOfPeer, p.applied()), n.clock.Now())
		size, err := p.retain(now, keep, min(seenOfPeer, positionOf(applied, p.site.ID)))
		if err != nil {
			return err
		}
		sizes = append(sizes, size)
	}
	c.local.Prune(seen, n.clock.Now())
	if n.back.Load() != nil {
		needed = 0 // it is given back
	}
	if err := c.journal.Prune(min(needed, old)); err != nil {
		return fmt.Errorf("prune journal: %w", err)
	}
	sizes[0] = c.ownBytes()
	n.makeRoom(ctx, now, c, sizes)
	n.measure(now, c, sizes)
	n.pause(sizes)
	n.looked.tell()
	return nil
}

// seenByOthers is how far every third site's applied transactions had seen a peer: what came later is needed to judge what
// is still to come. With two sites there is no third one.
func (n *node) seenByOthers(p *peer) wal.LSN {
	lowest := wal.LSN(math.MaxUint64)
	for _, third := range n.peers {
		if third == p {
			continue
		}
		seen := wal.LSN(0)
		if in := third.live.Load(); in != nil {
			seen = wal.SeenOf(in.worker.Status().SeenOthers, p.site.ID)
		}
		lowest = min(lowest, seen)
	}
	return lowest
}

// positionOf finds a site's position; zero when there is none.
func positionOf(all []wal.Seen, site wal.SiteID) wal.LSN {
	for _, s := range all {
		if s.Site == site {
			return s.LSN
		}
	}
	return 0
}

// share is this database's part of the budget.
func (n *node) share() int64 {
	return share(n.cfg.Journal.Budget.Bytes(), n.cfg.Journal.Segment.Bytes(), len(n.cfg.Databases))
}

// pause ends and lets go on what fills the journals, as their sizes, the own one's first, ask for.
func (n *node) pause(sizes []int64) {
	over, paused := overBudget(sizes, n.share())
	n.over.Store(over)
	n.gate.set(reason(paused[0], errBudget))
	for i, p := range n.peers {
		p.gate.set(reason(paused[i+1], errCopyBudget))
	}
}

func reason(paused bool, why error) error {
	if !paused {
		return nil
	}
	return why
}

// forgetJournals removes what an interrupted enrolment left. Only a database that was never enrolled may do so.
func (n *node) forgetJournals() error {
	if err := os.RemoveAll(n.dir()); err != nil {
		return fmt.Errorf("remove the journal of an interrupted enrolment: %w", err)
	}
	return nil
}
