package verify

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

// Holder is a Side whose rows can be kept still for a moment: rows that clients write all the time cannot be compared otherwise.
type Holder interface {
	// Hold locks the rows with these keys against being changed, until release is called or HoldMax has passed. Rows that do
	// not exist are not kept from being made. It waits for a lock for a short time only.
	Hold(ctx context.Context, t Table, keys []Key) (release func(), err error)
}

// HoldMax bounds how long clients may have to wait for rows that are held.
const HoldMax = 2 * time.Second

// holdRows is how many rows are held at a time, and holdWait how long a lock is waited for: less than deadlock_timeout, so that
// no client is ended because of it.
const (
	holdRows = 20
	holdWait = 200 * time.Millisecond
)

var (
	_ Holder = (*DB)(nil)
	_ Holder = (*Remote)(nil)
)

// holds are the locks that are given away, by name.
type holds struct {
	mu  sync.Mutex
	all map[string]*time.Timer
}

// give notes a lock that end takes back, at the latest after HoldMax.
func (h *holds) give(end func()) (name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.all == nil {
		h.all = map[string]*time.Timer{}
	}
	name = rand.Text()
	h.all[name] = time.AfterFunc(HoldMax, func() {
		h.mu.Lock()
		delete(h.all, name)
		h.mu.Unlock()
		end()
	})
	return name
}

// release takes a lock back now; one that is not known has been taken back already.
func (h *holds) release(name string) {
	h.mu.Lock()
	t := h.all[name]
	delete(h.all, name)
	h.mu.Unlock()
	if t != nil {
		t.Reset(0)
	}
}

// Hold is Holder.Hold.
func (db *DB) Hold(ctx context.Context, t Table, keys []Key) (release func(), err error) {
	name, err := db.hold(ctx, t, keys)
	return func() { db.holds.release(name) }, err
}

func (db *DB) releaseHold(name string) { db.holds.release(name) }

func (db *DB) hold(ctx context.Context, t Table, keys []Key) (name string, err error) {
	if len(t.Key) == 0 || len(keys) > holdRows {
		return "", &TableError{db.cfg.Name, t.String(), fmt.Sprintf("hold %d rows", len(keys)), ""}
	}
	v, err := db.view(ctx, t)
	if err != nil {
		return "", err
	}
	if slices.ContainsFunc(keys, func(k Key) bool { return len(k) != len(v.key) }) {
		return "", &TableError{db.cfg.Name, t.String(), "the request does not fit the table", ""}
	}
	settings := db.settings()
	delete(settings, "default_transaction_read_only")
	settings["application_name"], settings["lock_timeout"] = "duri repair", fmt.Sprint(holdWait.Milliseconds())
	settings["idle_in_transaction_session_timeout"] = fmt.Sprint((2 * HoldMax).Milliseconds()) // should this process end
	conn, err := pg.Connect(ctx, db.cfg.DSN, db.cfg.Database, settings)
	if err != nil {
		return "", withHint(fmt.Errorf("connect to PostgreSQL of %s: %w", db.cfg.Name, err), pg.Hint(err))
	}
	q := &query{}
	q.printf("SELECT FROM %s WHERE %s", v.from(), v.where())
	v.among(q, keys)
	q.printf(" FOR SHARE OF t")
	if _, err = pg.Rows(ctx, conn, "BEGIN"); err == nil {
		err = lockRows(ctx, conn, q)
	}
	if err != nil {
		pg.Close(conn)
		return "", fmt.Errorf("hold rows of %s at %s: %w", t, db.cfg.Name, err)
	}
	return db.holds.give(func() { pg.Close(conn) }), nil
}

func lockRows(ctx context.Context, conn *pgconn.PgConn, q *query) error {
	return conn.ExecParams(ctx, q.String(), q.params, nil, nil, nil).Read().Err
}

// Hold is Holder.Hold, asked of the site's agent.
func (r *Remote) Hold(ctx context.Context, t Table, keys []Key) (release func(), err error) {
	rep, err := r.do(ctx, request{Op: "hold", Table: &t, Range: &Range{Keys: keys}, N: max(1, len(keys))})
	if err != nil {
		return func() {}, err
	}
	return func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), HoldMax)
		defer cancel()
		_, _ = r.do(ctx, request{Op: "release", Hold: rep.Hold}) // it ends by itself, too
	}, nil
}

// restless decides about rows of a table that are written all the time: it keeps them still at the side that is right, lets the
// other one catch up, and looks once more. Rows that cannot be held stay unsettled.
func (p *repairer) restless(ctx context.Context, c *comparison) error {
	if p.from < 0 || p.o.Settle == nil || !p.o.Apply {
		return nil
	}
	h, ok := p.sides[p.from].(Holder)
	if !ok {
		return nil
	}
	for some := range slices.Chunk(c.restless, holdRows) {
		decided, err := p.still(ctx, c, h, some)
		if err != nil {
			return err
		}
		p.rep.Unsettled -= decided
	}
	return nil
}

func (p *repairer) still(ctx context.Context, c *comparison, h Holder, some []*suspect) (decided int, err error) {
	outer := ctx
	ctx, cancel := context.WithTimeout(ctx, HoldMax)
	defer cancel()
	r := c.rangeOf(some)
	release, err := h.Hold(ctx, c.t, r.Keys)
	if err != nil {
		return 0, outer.Err() // not now
	}
	defer release()
	if p.o.Settle(ctx) != nil {
		return 0, outer.Err()
	}
	rows, err := c.rowsOf(ctx, r, len(some)+1)
	if err != nil {
		return 0, outer.Err()
	}
	now := observations(rows[0], rows[1])
	var differ []Difference
	for _, s := range some {
		if s.last = now[s.id()]; !s.last.equal() {
			differ = append(differ, s.difference())
		}
	}
	if len(differ) > 0 {
		err = p.keyed(ctx, c, differ, make([]Deletion, len(differ)))
	}
	return len(some), err
}
