package apply

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// Unparker brings parked rows back when what hid them has made way, with the version that they always had (rule 11).
// Every site does it by itself: which rows are visible follows from versions alone. Run it once at a time.
type Unparker struct {
	w      *Worker
	origin func(wal.SiteID) string
	taken  bool // the session has an origin

	disturbed bool // another session was in the way at this look
}

// NewUnparker returns an Unparker that is not running. Of the configuration it uses Site, SiteOf, DSN, Database, Mesh,
// Barrier, Clock, LockTimeout and Logger. origin names the replication origin under which a site's row is written here
// (RepairOriginName).
func NewUnparker(cfg Config, origin func(wal.SiteID) string) *Unparker {
	return &Unparker{w: New(cfg), origin: origin}
}

// lookEvery is how often the parked rows are looked through without a reason to.
const lookEvery = 10 * time.Second

// lookAgain is when they are looked through again after another session was in the way.
const lookAgain = 100 * time.Millisecond

// Run works until ctx ends (nil) or something stops it (the error). The caller runs it again after a pause.
func (u *Unparker) Run(ctx context.Context) error {
	err := u.run(ctx)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (u *Unparker) run(ctx context.Context) error {
	w := u.w
	if err := w.open(ctx, "duri_unpark"); err != nil {
		return err
	}
	defer w.close()
	if err := w.loadOrigins(ctx); err != nil {
		return err
	}
	w.aside = newAside()
	if err := w.cfg.Mesh.Parking.Load(ctx, w.session.conn); err != nil {
		return err
	}
	t := time.NewTimer(lookEvery)
	defer t.Stop()
	for {
		u.disturbed = false
		for table, seen := range w.cfg.Mesh.Parking.list() {
			if err := u.look(ctx, table, seen); err != nil {
				return fmt.Errorf("look through the parked rows of %s: %w", table, err)
			}
		}
		rest := lookEvery
		if u.disturbed {
			rest = lookAgain
		}
		t.Reset(rest)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-w.cfg.Mesh.Parking.wake:
		case <-t.C:
		}
	}
}

// list gives the tables that may have parked rows, with their counters.
func (p *Parking) list() map[policy.Name]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.tables)
}

// clear forgets a table that has no parked rows, unless some were parked since seen.
func (p *Parking) clear(table policy.Name, seen int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tables[table] == seen {
		delete(p.tables, table)
	}
}

// look tries every parked row of a table, the newest first, until none can come back any more.
func (u *Unparker) look(ctx context.Context, table policy.Name, seen int) error {
	for {
		rows, err := pg.Query(ctx, u.w.session.conn, "SELECT key_norm FROM duri.parked WHERE table_schema = $1 AND table_name = $2 ORDER BY time DESC, site DESC", table.Schema, table.Table)
		if err != nil {
			return err
		}
		if len(rows) == 0 {
			u.w.cfg.Mesh.Parking.clear(table, seen)
			return nil
		}
		tw, err := u.target(table.Schema, table.Table)
		if err != nil {
			return err
		}
		changed := false
		for _, r := range rows {
			key, err := unhex([]byte(r[0]))
			if err != nil {
				return err
			}
			did, err := u.try(ctx, tw, key)
			if err != nil {
				return err
			}
			changed = changed || did
		}
		if !changed {
			return nil
		}
	}
}

// target binds a table to itself.
func (u *Unparker) target(schema, name string) (*tableWave, error) {
	u.w.auxMu.Lock()
	t, err := u.w.table(schema, name)
	u.w.auxMu.Unlock()
	if err != nil {
		return nil, err
	}
	rel := &wal.Relation{Namespace: schema, Name: name}
	for _, c := range t.columns {
		rel.Columns = append(rel.Columns, wal.Column{Name: c.name})
	}
	g, err := bind(t, rel, u.w.policy(schema, name))
	if err != nil {
		return nil, err
	}
	return &tableWave{target: g}, nil
}

// try brings one parked row back if it can; what other sessions disturb is tried again at the next look.
func (u *Unparker) try(ctx context.Context, tw *tableWave, key string) (did bool, err error) {
	conn := u.w.session.conn
	if _, err := pg.Rows(ctx, conn, beginSQL); err != nil {
		return false, err
	}
	u.taken = false
	if did, err = u.decide(ctx, tw, key); err == nil && did {
		_, err = pg.Rows(ctx, conn, constraintsSQL+"; "+commitSQL)
	}
	if conn.IsClosed() {
		return false, err
	}
	if err != nil || !did {
		if _, rerr := pg.Rows(ctx, conn, rollbackSQL); rerr != nil {
			return false, rerr
		}
	}
	if u.taken {
		if _, rerr := pg.Rows(ctx, conn, "SELECT pg_catalog.pg_replication_origin_session_reset()"); rerr != nil {
			return false, rerr
		}
	}
	var behind *behindError
	if err != nil && (disturbed(err) || collided(err) || errors.As(err, &behind)) {
		u.disturbed = true
		return false, nil
	}
	return did && err == nil, err
}

// decide looks at a parked row within the open transaction, and brings it back if it can; did is false when it stays as it
// is.
func (u *Unparker) decide(ctx context.Context, tw *tableWave, key string) (did bool, err error) {
	xid, err := pg.Rows(ctx, u.w.session.conn, xidSQL)
	if err != nil {
		return false, err
	}
	none := &wal.Txn{} // had seen nothing, so that every version is told exactly
	x := &execution{s: u.w.session, w: u.w, b: &batch{txns: []*wal.Txn{none}, careful: true}, xid: xid[0][2]}
	if err := x.lockKey(ctx, tw, key); err != nil {
		return false, err
	}
	p, ok, err := x.parked(ctx, tw, key)
	if err != nil || !ok {
		return false, err
	}
	image, err := imageOf(tw.rel, p.image)
	if err != nil {
		return false, err
	}
	e := &entry{key: key}
	for _, k := range tw.key {
		e.keyv = append(e.keyv, image[k.at])
	}
	rows, err := x.lock(ctx, tw, []*entry{e})
	if err != nil {
		return false, err
	}
	if len(rows) > 0 { // a client has inserted the key anew since, and that is newer
		return true, x.unpark(ctx, tw, key)
	}
	colliders, err := x.colliders(ctx, tw, p.image)
	if err != nil {
		return false, err
	}
	for _, c := range colliders {
		if c.entry.key == p.rival || p.version.Less(c.held.Version) {
			return false, nil
		}
	}
	// A TRUNCATE that came before has removed its parked rows when it is decoded.
	if err := x.barrierNow(ctx); err != nil {
		return false, err
	}
	if _, ok, err = x.parked(ctx, tw, key); err != nil || !ok {
		return false, err
	}
	return true, u.restore(ctx, x, tw, e, p, image, colliders)
}

// restore writes a parked row back and parks older ones that are in its way.
func (u *Unparker) restore(ctx context.Context, x *execution, tw *tableWave, e *entry, p parkedRow, image wal.Tuple, colliders []collider) error {
	if err := u.takeOrigin(ctx, p.version); err != nil {
		return err
	}
	for _, c := range colliders {
		if err := x.park(ctx, tw, c.entry.key, c.held, c.constraint, e.key); err != nil {
			return err
		}
		if _, err := x.s.run(ctx, []call{op{kind: netDelete, tw: tw, items: []item{{e: c.entry}}}.call(everyRow("0"))}); err != nil {
			return err
		}
	}
	if err := x.unpark(ctx, tw, e.key); err != nil {
		return err
	}
	o := op{kind: netInsert, tw: tw, items: []item{{e: e, row: image}}, set: allColumns(tw)}
	res, err := x.s.run(ctx, []call{o.call(everyRow("0"))})
	if err != nil {
		return err
	}
	if res[0].CommandTag.RowsAffected() != 1 {
		return errRestless
	}
	r := &ref{txn: &wal.Txn{Origin: p.version.Site, CommitLSN: p.end, VersionTime: p.version.Time}, change: &wal.Change{Relation: tw.rel}, op: wal.Insert, row: image}
	back := newRecord(tw.target, outcome{ref: r, decision: conflict.Decision{Apply: true, Code: conflict.Unparked}})
	_, err = x.s.run(ctx, []call{{recordSQL, recordParams([]record{back})}})
	return err
}

// takeOrigin makes the transaction carry a version.
func (u *Unparker) takeOrigin(ctx context.Context, v wal.Version) error {
	name := u.origin(v.Site)
	if name == "" {
		return fmt.Errorf("a parked row is of site %d, which is no site of this cluster", v.Site)
	}
	for _, sql := range []string{
		"SELECT pg_catalog.pg_replication_origin_create($1) WHERE pg_catalog.pg_replication_origin_oid($1) IS NULL",
		"SELECT pg_catalog.pg_replication_origin_session_setup($1)",
	} {
		if _, err := pg.Query(ctx, u.w.session.conn, sql, name); err != nil {
			return fmt.Errorf("take replication origin %s: %w", name, err)
		}
	}
	u.taken = true
	_, err := pg.Query(ctx, u.w.session.conn, "SELECT pg_catalog.pg_replication_origin_xact_setup('0/1', $1::timestamptz)", v.Time.String())
	return err
}
