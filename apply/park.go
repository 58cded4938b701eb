package apply

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// Unique keys (rule 11). The rows that a table shows are a function of the versions of all its rows: from the greatest
// version down, a row is visible unless a visible one collides with it. The others are parked in duri.parked, at every
// site alike, and reappear when the winner makes way. Here a worker places the rows of its origin; Parking brings parked
// rows back.
//
// It costs nothing until two rows collide: then, and as long as a table has parked rows, transactions that touch the
// table are applied one by one, change by change.

// parkedRow is a row of duri.parked.
type parkedRow struct {
	version wal.Version
	end     wal.LSN
	image   json.RawMessage
	rival   string // key of the newer row, in normal form
}

// Parking knows which tables have parked rows. Safe for concurrent use.
type Parking struct {
	mu     sync.Mutex
	tables map[policy.Name]int // how often rows were parked since it was last looked through
	wake   chan struct{}
}

func newParking() *Parking {
	return &Parking{tables: map[policy.Name]int{}, wake: make(chan struct{}, 1)}
}

func (t *table) id() policy.Name { return policy.Name{Schema: t.schema, Table: t.name} }

func nameOf(r *wal.Relation) policy.Name { return policy.Name{Schema: r.Namespace, Table: r.Name} }

// has reports whether a table may have parked rows.
func (p *Parking) has(table policy.Name) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.tables[table]
	return ok
}

// note says that a table has parked rows, or is about to.
func (p *Parking) note(table policy.Name) {
	p.mu.Lock()
	p.tables[table]++
	p.mu.Unlock()
	p.hurry()
}

func (p *Parking) hurry() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Touched says that a client of this site changed a table: a parked row may be able to reappear.
func (p *Parking) Touched(t *wal.Txn) {
	p.mu.Lock()
	none := len(p.tables) == 0
	p.mu.Unlock()
	if none {
		return
	}
	for i := range t.Changes {
		if p.has(nameOf(t.Changes[i].Relation)) {
			p.hurry()
			return
		}
	}
}

// touches reports whether a batch changes a table with parked rows.
func (p *Parking) touches(b *batch) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.tables) == 0 {
		return false
	}
	for _, wv := range b.waves {
		for _, tw := range wv.tables {
			if _, ok := p.tables[tw.id()]; ok {
				return true
			}
		}
	}
	return false
}

// errParked says that a row of a table was parked while transactions were applied to it that did not look for any; they
// are applied anew.
var errParked = errors.New("rows were parked meanwhile")

// purgeMax bounds the wait for a worker that has a parked row locked, and waits for decoding itself for a moment.
const purgeMax = 10 * time.Second

const purgeSQL = "DELETE FROM duri.parked WHERE table_schema = $1 AND table_name = $2 AND (time, site) < ($3::timestamptz, $4::int2)"

// Purge removes the parked rows that a transaction of this site truncates: its TRUNCATE is a tombstone for them as for
// every older row (rule 15). It comes before the transaction counts as decoded, so that whoever waits for that (the
// capture barrier) does not find them any more.
func (p *Parking) Purge(t *wal.Txn, session func(context.Context, func(*pgconn.PgConn) error) error) error {
	for i := range t.Changes {
		c := &t.Changes[i]
		if c.Op != wal.Truncate || !p.has(nameOf(c.Relation)) {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), purgeMax)
		defer cancel()
		err := session(ctx, func(conn *pgconn.PgConn) error {
			_, err := pg.Query(ctx, conn, purgeSQL, c.Relation.Namespace, c.Relation.Name, t.VersionTime.String(), fmt.Sprint(t.Origin))
			return err
		})
		if err != nil {
			return fmt.Errorf("remove the parked rows of %s: %w", c.Relation, err)
		}
	}
	return nil
}

const (
	// Two sessions must not decide at once about a key that has no row to lock.
	lockKeySQL = "SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended($1::text, 1685418601))"
	parkedSQL  = `SELECT site, (extract(epoch from time) * 1000000)::int8 - 946684800000000, row, rival, end_lsn FROM duri.parked
		WHERE table_schema = $1 AND table_name = $2 AND key_norm = $3::bytea`
	parkSQL = `INSERT INTO duri.parked (table_schema, table_name, key_norm, key, site, time, row, "constraint", rival, end_lsn)
		VALUES ($1, $2, $3::bytea, $4::jsonb, $5::int2, $6::timestamptz, $7::jsonb, $8, $9::bytea, $10::pg_lsn)
		ON CONFLICT (table_schema, table_name, key_norm) DO UPDATE
		SET key = excluded.key, site = excluded.site, time = excluded.time, row = excluded.row,
			end_lsn = excluded.end_lsn, "constraint" = excluded."constraint", rival = excluded.rival, at = now()`
	unparkSQL = "DELETE FROM duri.parked WHERE table_schema = $1 AND table_name = $2 AND key_norm = $3::bytea"
)

// bytea writes a bytea parameter.
func bytea(s string) []byte { return fmt.Appendf(nil, `\x%x`, s) }

// collided reports an error of a unique index or an exclusion constraint.
func collided(err error) bool {
	state := pg.SQLState(err)
	return state == "23505" || state == "23P01"
}

// collider is a visible row that collides with an image.
type collider struct {
	constraint string
	entry      *entry // of its key
	held       held
}

// crowded reports whether the table has constraints besides its key and rows can be parked.
func (x *execution) crowded(ctx context.Context, tw *tableWave) (bool, error) {
	if !x.b.careful || len(tw.key) == 0 {
		return false, nil
	}
	_, uniques, err := x.uniquesOf(ctx, tw.target)
	return len(uniques) > 0, err
}

// uniquesOf reads a table's constraints besides the key, once per definition. It asks in its own session: another one could
// have to wait for a client that waits for this transaction, and PostgreSQL would not see the circle.
func (x *execution) uniquesOf(ctx context.Context, g *target) (string, []unique, error) {
	if g.uniques == nil {
		u, err := loadUniques(ctx, x.s.conn, g.schema, g.name)
		if err != nil {
			return "", nil, err
		}
		g.uniques = append([]unique{}, u...)
		g.colliders = collidersSQL(g.table, u)
	}
	return g.colliders, g.uniques, nil
}

// placeAll places the entries of a wave, deletes first: they make way.
func (x *execution) placeAll(ctx context.Context, wv *wave, tw *tableWave) error {
	for _, deletes := range []bool{true, false} {
		for _, e := range tw.entries {
			if (e.kind == netDelete) == deletes {
				if err := x.place(ctx, wv, tw, e); err != nil {
					return err
				}
			}
		}
	}
	tw.placed = true
	return nil
}

// place decides one key of a crowded table and makes its row visible, parked or absent.
func (x *execution) place(ctx context.Context, wv *wave, tw *tableWave, e *entry) error {
	for range maxResolve {
		done, err := x.tryPlace(ctx, wv, tw, e)
		if err != nil || done {
			return err
		}
	}
	return errRestless
}

func (x *execution) tryPlace(ctx context.Context, wv *wave, tw *tableWave, e *entry) (done bool, err error) {
	if err := x.lockKey(ctx, tw, e.key); err != nil {
		return false, err
	}
	rows, err := x.lock(ctx, tw, []*entry{e})
	if err == nil && len(rows) == 0 {
		err = x.lockMissing(ctx, tw, []*entry{e}, rows)
	}
	if err != nil {
		return false, err
	}
	// After the barrier: a TRUNCATE of this site removes parked rows when it is decoded.
	parked, isParked, err := x.parked(ctx, tw, e.key)
	if err != nil {
		return false, err
	}
	h, visible := rows[0]
	switch {
	case visible && isParked: // a client has inserted the key anew since, and that is newer
		if err := x.unpark(ctx, tw, e.key); err != nil {
			return false, err
		}
		isParked = false
	case isParked:
		h = held{State: conflict.State{Existence: conflict.Live, Version: parked.version, Seen: parked.end == 0}, end: parked.end}
		if h.image, err = imageOf(tw.rel, parked.image); err != nil {
			return false, err
		}
	case !visible:
		h = x.grave(tw, e, wv)
	}
	v, err := judge(wv.chain(e), h, x.merging(ctx, tw, e.key))
	if err != nil {
		return false, err
	}
	x.record(tw, e, v.records)
	if !v.changed {
		if !visible && !isParked {
			x.keepOut(tw, e.key, wv.chain(e))
		}
		return true, nil
	}
	if v.live && tw.blend != nil && v.state.Version.Site != x.w.cfg.Origin {
		if err := x.keepVersion(ctx, tw, e.key, v.state); err != nil {
			return false, err
		}
	}
	if isParked {
		if err := x.unpark(ctx, tw, e.key); err != nil {
			return false, err
		}
	}
	var ops []op
	del := op{kind: netDelete, tw: tw, items: []item{{e: e}}}
	if !v.live {
		x.makesWay(tw)
		if visible {
			ops = []op{del}
		}
		return x.writeAll(ctx, wv, ops)
	}
	image := rowJSON(tw.rel, v.row)
	colliders, err := x.colliders(ctx, tw, image)
	if err != nil {
		return false, err
	}
	r := wv.chain(e)
	last := r[len(r)-1]
	mine := v.state
	if mine.end == 0 && mine.Version == last.txn.Version() {
		mine.end = last.txn.EndLSN
	}
	if i := slices.IndexFunc(colliders, func(c collider) bool { return !beats(mine, last, c.held) }); i >= 0 {
		c := colliders[i]
		x.recordCollision(tw, e, last, conflict.Parked, colliders[i:i+1])
		if visible {
			ops = []op{del}
		}
		if err := x.park(ctx, tw, e.key, mine, c.constraint, c.entry.key); err != nil {
			return false, err
		}
		return x.writeAll(ctx, wv, ops)
	}
	x.recordCollision(tw, e, last, conflict.Displaced, colliders)
	for _, c := range colliders {
		if err := x.park(ctx, tw, c.entry.key, c.held, c.constraint, e.key); err != nil {
			return false, err
		}
		ops = append(ops, op{kind: netDelete, tw: tw, items: []item{{e: c.entry}}})
	}
	it := item{e, v.row, h.image}
	if visible {
		o := op{kind: netUpdate, tw: tw, items: []item{it}}
		o.set = updateSet(nil, tw, it)
		return x.writeAll(ctx, wv, append(ops, o))
	}
	return x.writeAll(ctx, wv, append(ops, op{kind: netInsert, tw: tw, items: []item{it}, set: allColumns(tw)}))
}

// lockKey keeps other sessions from deciding about a key, whether it has a row or not, and TRUNCATE from coming in between.
func (x *execution) lockKey(ctx context.Context, tw *tableWave, key string) error {
	_, err := x.s.run(ctx, []call{
		{"LOCK TABLE ONLY " + pg.QuoteName(tw.schema, tw.name) + " IN ROW EXCLUSIVE MODE", nil},
		{lockKeySQL, [][]byte{fmt.Appendf(nil, "%s %x", tw, key)}},
	})
	return err
}

// writeAll runs decided operations; done is false when an insert met a row after all.
func (x *execution) writeAll(ctx context.Context, wv *wave, ops []op) (done bool, err error) {
	again, err := x.write(ctx, wv, ops)
	return len(again) == 0, err
}

// beats reports whether a state that the change r led to is newer than a row. What r's transaction had seen is older than
// what it wrote, whatever its stamp says.
func beats(mine held, r *ref, h held) bool {
	s := h.toward(r)
	return s.Version.Less(mine.Version) || s.Seen && mine.Version == r.txn.Version()
}

// makesWay notes that a row of a table was parked or may have made way for one.
func (x *execution) makesWay(tw *tableWave) {
	x.parking = append(x.parking, tw.id())
}

// recordCollision writes down that rows collide: the older ones are parked.
func (x *execution) recordCollision(tw *tableWave, e *entry, r *ref, code conflict.Code, with []collider) {
	kind := conflict.InsertExists
	if r.op == wal.Update {
		kind = conflict.UpdateExists
	}
	if len(with) > 1 {
		kind = conflict.MultipleUniqueConflicts
	}
	for _, c := range with {
		if c.held.toward(r).Seen {
			continue
		}
		d := conflict.Decision{Apply: code == conflict.Displaced, Kind: kind, Code: code}
		x.record(tw, e, []outcome{{ref: r, decision: d, rival: c.held}})
	}
}

// parked reads the parked row of a key; lockKey keeps others from it.
func (x *execution) parked(ctx context.Context, tw *tableWave, key string) (p parkedRow, ok bool, err error) {
	res, err := x.s.run(ctx, []call{{parkedSQL, [][]byte{[]byte(tw.schema), []byte(tw.name), bytea(key)}}})
	if err != nil || len(res[0].Rows) == 0 {
		return p, false, err
	}
	p, err = parseParked(res[0].Rows[0])
	return p, true, err
}

// parseParked reads site, time, row, rival and end.
func parseParked(row [][]byte) (parkedRow, error) {
	site, err1 := strconv.ParseUint(string(row[0]), 10, 16)
	micros, err2 := strconv.ParseInt(string(row[1]), 10, 64)
	rival, err3 := unhex(row[3])
	end, err4 := wal.ParseLSN(string(row[4]))
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return parkedRow{}, fmt.Errorf("read duri.parked: %w", err)
	}
	return parkedRow{wal.Version{Time: wal.Time(micros), Site: wal.SiteID(site)}, end, bytes.Clone(row[2]), rival}, nil
}

// unhex reads PostgreSQL's text of a bytea.
func unhex(b []byte) (string, error) {
	text, ok := strings.CutPrefix(string(b), `\x`)
	out := make([]byte, 0, len(text)/2)
	if _, err := fmt.Sscanf(text, "%x", &out); (err != nil && text != "") || !ok {
		return "", fmt.Errorf("%q is no bytea", b)
	}
	return string(out), nil
}

// park keeps a row that is hidden by the one with the key rival.
func (x *execution) park(ctx context.Context, tw *tableWave, key string, h held, constraint, rival string) error {
	x.makesWay(tw)
	x.w.cfg.Mesh.Parking.note(tw.id()) // before the commit too: see errParked
	_, err := x.s.run(ctx, []call{{parkSQL, [][]byte{
		[]byte(tw.schema), []byte(tw.name), bytea(key), keyJSON(tw.target, h.image), fmt.Append(nil, h.Version.Site), []byte(h.Version.Time.String()),
		rowJSON(tw.rel, h.image), []byte(constraint), bytea(rival), []byte(h.end.String()),
	}}})
	return err
}

func (x *execution) unpark(ctx context.Context, tw *tableWave, key string) error {
	x.makesWay(tw)
	_, err := x.s.run(ctx, []call{{unparkSQL, [][]byte{[]byte(tw.schema), []byte(tw.name), bytea(key)}}})
	return err
}

// colliders finds and locks the visible rows that collide with an image.
func (x *execution) colliders(ctx context.Context, tw *tableWave, image json.RawMessage) ([]collider, error) {
	sql, _, err := x.uniquesOf(ctx, tw.target)
	if err != nil {
		return nil, err
	}
	res, err := x.s.run(ctx, []call{{sql, [][]byte{image}}})
	if err != nil {
		return nil, err
	}
	found, order := map[string]*collider{}, []string{}
	for _, row := range res[0].Rows {
		values := make(wal.Tuple, len(tw.key))
		for i := range tw.key {
			values[i] = wal.Value{Kind: wal.Text, Data: bytes.Clone(row[1+i])}
		}
		key := tw.normal(values)
		if found[key] == nil {
			found[key] = &collider{constraint: string(row[0]), entry: &entry{key: key, keyv: values}}
			order = append(order, key)
		}
	}
	if len(order) == 0 {
		return nil, nil
	}
	slices.Sort(order)
	var entries []*entry
	for _, k := range order {
		entries = append(entries, found[k].entry)
	}
	rows, err := x.lock(ctx, tw, entries)
	if err != nil {
		return nil, err
	}
	var out []collider
	for i, k := range order {
		h, ok := rows[i]
		if !ok {
			return nil, errRestless // gone meanwhile
		}
		if h.end == ownRow { // of this transaction: what it makes of the two in the end, its origin has allowed
			continue
		}
		found[k].held = h
		out = append(out, *found[k])
	}
	return out, nil
}

// imageOf reads a row image from its JSON form.
func imageOf(rel *wal.Relation, image json.RawMessage) (wal.Tuple, error) {
	var m map[string]*string
	if err := json.Unmarshal(image, &m); err != nil {
		return nil, fmt.Errorf("read a parked row: %w", err)
	}
	out := make(wal.Tuple, len(rel.Columns))
	for i, c := range rel.Columns {
		out[i] = wal.Value{Kind: wal.Null}
		if s := m[c.Name]; s != nil {
			out[i] = wal.Value{Kind: wal.Text, Data: []byte(*s)}
		}
	}
	return out, nil
}

// Load finds the tables that have parked rows.
func (p *Parking) Load(ctx context.Context, c *pgconn.PgConn) error {
	rows, err := pg.Rows(ctx, c, "SELECT DISTINCT table_schema, table_name FROM duri.parked")
	if err != nil {
		return fmt.Errorf("read duri.parked: %w", err)
	}
	for _, r := range rows {
		p.note(policy.Name{Schema: r[0], Table: r[1]})
	}
	return nil
}
