package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/decode"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/wal"
)

// host is what gateways have of this site: its own one as those elsewhere. It implements link.Gateways.
type host struct {
	a         *Agent
	entry     *entry
	verifiers *verifiers
	news      broadcast
	fates     *life // asks for fates of transactions

	former *former                // its agent until this one begins; nil: there is none
	leaves atomic.Bool            // the agent is about to end for another process
	up     atomic.Bool            // PostgreSQL answers
	server atomic.Pointer[string] // which history it writes; nil: not known yet

	drainMu sync.Mutex // guards drains
	drains  draining

	proofs    flights // by database: that what is committed is as durable as commits are here
	positions flights // by database
	reading   flights // by role: its verifier

	base context.Context // ends with run: of questions that are asked for several at once
	end  context.CancelFunc
}

// newHost makes it; it does not connect yet.
func newHost(a *Agent) (*host, error) {
	database := a.nodes[0].database.Name
	c, err := pg.Config(a.cfg.Postgres.DSN, database, nil)
	if err != nil {
		return nil, err
	}
	h := &host{a: a, verifiers: &verifiers{config: c}, fates: newLife(a.cfg.Postgres.DSN, database, "duri_fate")}
	if h.entry, err = newEntry(a.cfg.Postgres.DSN, database, h.news.tell, a.log); err != nil {
		return nil, err
	}
	l, err := newLogins(a.cfg.Gateway.LoginCA)
	if err == nil {
		err = h.entry.setLogins(l)
	}
	if err != nil {
		return nil, err
	}
	h.base, h.end = context.WithCancel(context.Background())
	return h, h.readOrder()
}

// broadcast wakes all who wait for news.
type broadcast struct {
	mu sync.Mutex
	ch chan struct{}
}

// wait gives a channel that is closed with the next news.
func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *broadcast) tell() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}

// identitySQL is which history a server writes. A server that was put in the place of another one, or has taken over from it,
// writes another, in which the number of a transaction may mean another one.
const identitySQL = `SELECT system_identifier::text || '/' || pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8)
	FROM pg_catalog.pg_control_system()`

// run watches PostgreSQL until ctx ends: whether it is there, and who it is.
func (h *host) run(ctx context.Context) error {
	watch := newLife(h.a.cfg.Postgres.DSN, h.a.nodes[0].database.Name, "duri_gateway")
	defer watch.close()
	defer h.end()
	defer h.fates.close()
	defer h.verifiers.close()
	for {
		err := h.look(ctx, watch)
		if err == nil {
			err = h.fates.ping(ctx) // Its age tells that the server has not ended meanwhile.
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if was := h.up.Swap(err == nil); was != (err == nil) {
			h.a.log.Info("gateways are told of PostgreSQL here", "answers", err == nil, "error", fmt.Sprint(err))
			h.news.tell()
		}
		if err == nil {
			err = watch.idle(ctx, probeEvery) // ends at once when the server ends
		}
		if err != nil {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(probeEvery / 10):
			}
		}
	}
}

// look asks PostgreSQL who it is. That a new connection is needed is no sign yet that it has gone.
func (h *host) look(ctx context.Context, watch *life) error {
	rows, _, err := watch.query(ctx, identitySQL)
	if err != nil {
		return err
	}
	if was := h.server.Load(); was == nil || *was != rows[0][0] {
		h.server.Store(&rows[0][0])
		h.news.tell()
	}
	return nil
}

// state is what gateways are told.
func (h *host) state() link.SiteState {
	st := link.SiteState{Refuses: h.entry.reason(), Postgres: h.up.Load(), CaughtUp: h.a.caughtUp(time.Now())}
	st.Draining, st.Leave = h.drained()
	if id := h.server.Load(); id != nil {
		st.Server = *id
	}
	if k := h.a.keeper; k != nil {
		k.mu.Lock()
		if !k.began.IsZero() {
			st.Epoch, st.Members = k.reg.Epoch, slices.Clone(k.reg.Members)
		}
		k.mu.Unlock()
	}
	st.Databases = h.a.databaseStates(time.Now())
	if st.Refuses == "" && (!st.Postgres || st.Server == "") {
		st.Refuses = "PostgreSQL here does not answer"
	}
	return st
}

// caughtUp reports whether what the other sites have committed, as far as they are heard, is visible here but for a little.
func (a *Agent) caughtUp(now time.Time) bool {
	for _, n := range a.nodes {
		if n.ready.Load() == nil {
			return false
		}
		for _, p := range n.peers {
			in := p.live.Load()
			if in == nil || p.missing.Load() != nil {
				return false
			}
			beat, at := in.copy.Heard()
			if at.IsZero() && now.Sub(a.started) < 2*link.DefaultSilence { // it had no chance yet
				return false
			}
			if behind(in.worker.Status().Applied, beat.End) > nearlyAll {
				return false
			}
		}
	}
	return true
}

// Watch is that of link.Asked.
func (h *host) Watch(ctx context.Context, tell func(link.SiteState) error) error {
	h.followed(1)
	defer h.followed(-1)
	t := time.NewTicker(decideEvery)
	defer t.Stop()
	var last link.SiteState
	var told time.Time
	for {
		news := h.news.wait()
		if st := h.state(); told.IsZero() || !sameState(st, last) || time.Since(told) >= link.StateEvery-decideEvery {
			if err := tell(st); err != nil {
				return err
			}
			last, told = st, time.Now()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-news:
		case <-t.C:
		}
	}
}

func sameState(a, b link.SiteState) bool {
	same := slices.Equal(a.Members, b.Members) && alike(a.Databases, b.Databases)
	a.Members, b.Members, a.Databases, b.Databases = nil, nil, nil, nil
	return same && fmt.Sprint(a) == fmt.Sprint(b)
}

// Verifier is that of link.Asked. Logins of a role that come together share a question.
func (h *host) Verifier(ctx context.Context, role string) (string, error) {
	v, err := h.reading.do(ctx, h.base, role, func(ctx context.Context) (any, error) { return h.verifiers.read(ctx, role) })
	if err != nil {
		return "", err
	}
	return v.(string), nil
}

// Open is that of link.Gateways.
func (h *host) Open(ctx context.Context, gateway, role string, cut func()) (net.Conn, func(), error) {
	if role == "" {
		return h.entry.dial(ctx, true, cut)
	}
	conn, release, err := h.entry.dialAs(ctx, role, cut)
	if errors.Is(err, link.ErrLogin) {
		h.a.log.Warn("a gateway was refused a login by certificate", "gateway", gateway, "role", role, "error", err)
	}
	return conn, release, err
}

// Position is that of link.Asked. What can be seen before it is asked lies before a message that is written afterwards.
func (h *host) Position(ctx context.Context, database string) ([]link.SitePosition, error) {
	n, ok := h.a.node(database)
	if !ok {
		return nil, nil // nothing of it goes anywhere
	}
	at, err := h.positions.do(ctx, h.base, database, func(ctx context.Context) (any, error) {
		seen := map[wal.SiteID]wal.LSN{}
		err := n.withSQL(ctx, func(c *pgconn.PgConn) (err error) {
			rows, err := pg.Query(ctx, c, "SELECT pg_catalog.pg_logical_emit_message(true, $1, '')", decode.MessagePrefix+".position")
			if err == nil {
				seen[n.self.ID], err = wal.ParseLSN(rows[0][0])
			}
			for _, p := range n.peers {
				if err != nil {
					return err
				}
				// Not what the worker says, which learns of its own commit a moment later than those who see it.
				if rows, err = pg.Query(ctx, c, "SELECT coalesce(max(to_lsn), '0/0') FROM duri.applied WHERE origin = $1::int2", fmt.Sprint(p.site.ID)); err == nil {
					seen[p.site.ID], err = wal.ParseLSN(rows[0][0])
				}
			}
			return err
		})
		return seen, err
	})
	if err != nil {
		return nil, fmt.Errorf("find the position of database %s: %w", database, err)
	}
	seen := at.(map[wal.SiteID]wal.LSN)
	all := []link.SitePosition{{Site: h.a.self.Name, LSN: seen[n.self.ID]}}
	for _, p := range n.peers {
		all = append(all, link.SitePosition{Site: p.site.Name, LSN: max(seen[p.site.ID], p.applied())})
	}
	return all, nil
}

// Reach is that of link.Asked.
func (h *host) Reach(ctx context.Context, database string, positions []link.SitePosition, gone string) error {
	n, ok := h.a.node(database)
	if !ok {
		return nil
	}
	pending, err := n.committing(ctx)
	if err != nil {
		return err
	}
	for _, p := range n.peers {
		to := wal.LSN(0)
		for _, at := range positions {
			if at.Site == p.site.Name {
				to = at.LSN
			}
		}
		if gone == p.site.Name {
			to = p.received()
		}
		if err := p.reach(ctx, to); err != nil {
			return err
		}
	}
	return n.shown(ctx, pending)
}

// committingSQL are backends with a transaction, which may have written its commit.
const committingSQL = `SELECT backend_xid, pid FROM pg_catalog.pg_stat_activity WHERE backend_xid IS NOT NULL AND state = 'active'`

// committing are the transactions of this site that are committed and not visible yet: their backends wait for a receipt, or have
// not been run since then. A site that follows this one may have applied them already.
func (n *node) committing(ctx context.Context) (map[string]bool, error) {
	all := map[string]bool{}
	err := n.withSQL(ctx, func(c *pgconn.PgConn) error {
		rows, err := pg.Query(ctx, c, committingSQL)
		for _, r := range rows {
			if xid, err := strconv.ParseUint(r[0], 10, 32); err == nil && n.commits.has(uint32(xid)) {
				all[r[0]+" "+r[1]] = true
			}
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("see whether what site %s has written is visible there: %w", n.self.Name, err)
	}
	return all, nil
}

// shown waits until transactions are visible that were committing.
func (n *node) shown(ctx context.Context, pending map[string]bool) error {
	for pause := time.Millisecond; len(pending) > 0; pause = min(2*pause, 16*time.Millisecond) {
		now, err := n.committing(ctx)
		if err != nil {
			return err
		}
		if maps.DeleteFunc(pending, func(one string, _ bool) bool { return !now[one] }); len(pending) == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d commits of site %s are not visible there yet: %w", len(pending), n.self.Name, ctx.Err())
		case <-time.After(pause):
		}
	}
	return nil
}

// commits remembers the latest transactions of this site that were decoded: more than there can be backends that have not gone on
// since. Safe for concurrent use.
type commits struct {
	mu   sync.Mutex // guards the rest
	xids [8192]uint32
	at   int
}

func (c *commits) note(xid uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.xids[c.at%len(c.xids)] = xid
	c.at++
}

func (c *commits) has(xid uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Contains(c.xids[:], xid)
}

// received is where this site's copy of the peer's journal ends.
func (p *peer) received() wal.LSN {
	in := p.live.Load()
	if in == nil {
		return 0
	}
	if j, err := in.copy.Journal(); err == nil {
		return j.End()
	}
	return 0
}

// reach waits until a position of the peer is visible here, or all that is left of one that the register has left out.
func (p *peer) reach(ctx context.Context, to wal.LSN) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 16*time.Millisecond) {
		at := p.applied()
		if at >= to || p.n.keeper.leftOut(p.site.Name) && at >= p.received() {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("what site %s has written up to %s is not visible at %s yet (%s): %w", p.site.Name, to, p.n.self.Name, at, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// leftOut reports whether the register is known to leave a site out.
func (k *keeper) leftOut(site string) bool {
	if k == nil {
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.began.IsZero() && !k.reg.Has(site)
}

// life is a connection to PostgreSQL that is kept open: as long as it lives, the server has not ended. Safe for concurrent use.
type life struct {
	dsn, database, name string

	mu    sync.Mutex // held while it is used
	conn  *pgconn.PgConn
	since time.Time // it was opened
}

func newLife(dsn, database, name string) *life {
	return &life{dsn: dsn, database: database, name: name}
}

// query asks, over a connection that is opened if need be; since is when it was opened. A caller that gives up does not end the
// connection, as others rely on its age.
func (l *life) query(caller context.Context, sql string, args ...string) (rows [][]string, since time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := caller.Err(); err != nil {
		return nil, time.Time{}, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(caller), verifierTimeoutMax)
	defer cancel()
	for {
		fresh := l.conn == nil || l.conn.IsClosed()
		if fresh {
			conn, err := pg.Connect(ctx, l.dsn, l.database, map[string]string{"application_name": l.name, "statement_timeout": "4s"})
			if err != nil {
				return nil, time.Time{}, err
			}
			l.conn, l.since = conn, time.Now()
		}
		rows, err = pg.Query(ctx, l.conn, sql, args...)
		if err != nil && pg.IsConnectionError(err) {
			pg.Close(l.conn)
			l.conn = nil
			if !fresh && ctx.Err() == nil { // It had ended since it was used last.
				continue
			}
		}
		return rows, l.since, err
	}
}

func (l *life) ping(ctx context.Context) error {
	_, _, err := l.query(ctx, "SELECT 1")
	return err
}

// idle waits, and ends early, with an error, when the connection ends.
func (l *life) idle(ctx context.Context, d time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	for ctx.Err() == nil {
		if err := l.conn.WaitForNotification(ctx); err != nil && ctx.Err() == nil {
			pg.Close(l.conn)
			l.conn = nil
			return err
		}
	}
	return nil
}

func (l *life) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	pg.Close(l.conn)
	l.conn = nil
}

// flights let many who want the same answer share one question that was put after they came.
type flights struct {
	mu  sync.Mutex
	all map[string]*flight // that will begin
	now map[string]bool    // that are under way
}

type flight struct {
	done  chan struct{}
	value any
	err   error
}

// flightMax bounds one question.
const flightMax = 15 * time.Second

// do gives the answer of a call of ask that begins after this call, and ends with base.
func (f *flights) do(ctx, base context.Context, key string, ask func(ctx context.Context) (any, error)) (any, error) {
	f.mu.Lock()
	if f.all == nil {
		f.all, f.now = map[string]*flight{}, map[string]bool{}
	}
	next := f.all[key]
	if next == nil {
		next = &flight{done: make(chan struct{})}
		f.all[key] = next
		if !f.now[key] {
			f.now[key] = true
			go f.fly(base, key, ask)
		}
	}
	f.mu.Unlock()
	select {
	case <-next.done:
		return next.value, next.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// fly puts questions as long as somebody waits.
func (f *flights) fly(base context.Context, key string, ask func(ctx context.Context) (any, error)) {
	for {
		f.mu.Lock()
		next := f.all[key]
		delete(f.all, key)
		if next == nil {
			delete(f.now, key)
			f.mu.Unlock()
			return
		}
		f.mu.Unlock()
		ctx, cancel := context.WithTimeout(base, flightMax)
		next.value, next.err = ask(ctx)
		cancel()
		close(next.done)
	}
}
