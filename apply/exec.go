package apply

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// session is one apply connection with its prepared statements. It belongs to one goroutine.
type session struct {
	conn     *pgconn.PgConn
	prepared map[string]string // SQL -> statement name
	// files are the relation files of tables without a key when local decoding was last known to have passed every
	// TRUNCATE of them, which gives a table a new file.
	files map[string]string
}

// maxPrepared bounds the prepared statements of a session; beyond it all are dropped and made again as needed.
const maxPrepared = 2000

func newSession(conn *pgconn.PgConn) *session {
	s := &session{conn: conn}
	s.forget()
	return s
}

// forget drops cached definitions, so that a change of schema is seen.
func (s *session) forget() {
	s.prepared, s.files = map[string]string{}, map[string]string{}
}

// reset forgets and tells the server to forget too.
func (s *session) reset(ctx context.Context) error {
	s.forget()
	_, err := pg.Rows(ctx, s.conn, "DEALLOCATE ALL")
	return err
}

func (s *session) prepare(ctx context.Context, sql string) (string, error) {
	if name, ok := s.prepared[sql]; ok {
		return name, nil
	}
	name := "duri_" + strconv.Itoa(len(s.prepared))
	if _, err := s.conn.Prepare(ctx, name, sql, nil); err != nil {
		return "", err
	}
	s.prepared[sql] = name
	return name, nil
}

// call is one prepared statement to run.
type call struct {
	sql    string
	params [][]byte
}

// run executes calls in one round trip and returns their results. Statements that are new are prepared first.
func (s *session) run(ctx context.Context, calls []call) ([]*pgconn.Result, error) {
	b := &pgconn.Batch{}
	for _, c := range calls {
		name, err := s.prepare(ctx, c.sql)
		if err != nil {
			return nil, fmt.Errorf("prepare: %w", err)
		}
		b.ExecPrepared(name, c.params, nil, nil)
	}
	return s.conn.ExecBatch(ctx, b).ReadAll()
}

// item is one row to write: the entry it belongs to and the image (nil for a delete). stored is the row that is there,
// when it was read.
type item struct {
	e           *entry
	row, stored wal.Tuple
}

// op is one set-based statement over items.
type op struct {
	kind  netKind
	tw    *tableWave
	items []item
	set   []int // relation columns written, for netInsert and netUpdate
}

// execution applies one batch in one transaction.
type execution struct {
	s       *session
	w       *Worker
	b       *batch
	origin  string // replication origin's oid, as text
	quiet   quiet  // which rows need no look
	xid     string // this transaction's xid, 32 bits, as xmin shows it
	records []record
	created []created
	kept    []keptOut
	bags    []*tableWave  // tables without a key that rows were added to
	parking []policy.Name // tables in which rows were parked or made way
	fresh   bool          // the barrier was passed since rows were last locked
	at      wal.LSN       // the WAL insert position after rows were last locked or created
	wrote   bool          // a row of a published table
}

// created is a row that this batch made where none was: its key must be checked against tombstones once more, when
// everything that was committed before is surely decoded (rule 8).
type created struct {
	tw *tableWave
	wv *wave
	e  *entry
}

const (
	beginSQL  = "BEGIN ISOLATION LEVEL READ COMMITTED"
	originSQL = "SELECT pg_catalog.pg_replication_origin_xact_setup($1::pg_lsn, $2::timestamptz)"
	// The snapshot is taken before the position is read.
	snapshotSQL = "SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot()), pg_catalog.pg_current_wal_insert_lsn()"
	xidSQL      = snapshotSQL + ", pg_catalog.pg_current_xact_id()::xid"
	positionSQL = "SELECT pg_catalog.pg_current_wal_insert_lsn()"
	// The commit's own end: the insert position may be that of another session's unfinished work, which nobody flushes.
	committedSQL = "SELECT local_lsn FROM pg_catalog.pg_show_replication_origin_status() WHERE local_id = $1::oid"
	// What is deferred to the commit is checked before it.
	constraintsSQL = "SET CONSTRAINTS ALL IMMEDIATE"
	commitSQL      = "COMMIT"
	// A transaction without a change of a published table is not decoded at all, and this site would not be known to have
	// seen what it applied.
	seenSQL     = "SELECT pg_catalog.pg_logical_emit_message(true, 'duri.seen', '')"
	rollbackSQL = "ROLLBACK"
)

// apply runs the batch. On success it returns the local WAL position behind the commit. On any error the transaction
// is rolled back and nothing remains of it.
func (x *execution) apply(ctx context.Context) (wal.LSN, error) {
	lsn, err := x.tryApply(ctx)
	if err != nil && !x.s.conn.IsClosed() {
		if _, rerr := pg.Rows(ctx, x.s.conn, rollbackSQL); rerr != nil {
			return 0, errors.Join(err, fmt.Errorf("roll back: %w", rerr))
		}
	}
	return lsn, err
}

func (x *execution) tryApply(ctx context.Context) (wal.LSN, error) {
	head := []call{
		{beginSQL, nil},
		{xidSQL, nil},
	}
	if x.b.again != nil {
		head = append(head, call{"SET LOCAL lock_timeout = '" + heldWait + "'", nil})
	}
	for _, wv := range x.b.waves {
		if err := x.applyWave(ctx, wv, head); err != nil {
			return 0, err
		}
		head = nil
	}
	if head != nil { // nothing to write, but progress is
		if err := x.begin(ctx, head); err != nil {
			return 0, err
		}
	}
	if len(x.created) > 0 {
		if err := x.barrier(ctx); err != nil {
			return 0, err
		}
	}
	if err := x.recheckBags(ctx); err != nil {
		return 0, err
	}
	if len(x.created)+len(x.bags) > 0 { // see Mesh.commit
		x.w.cfg.Mesh.commit.Lock()
		defer x.w.cfg.Mesh.commit.Unlock()
	}
	if err := x.recheck(ctx); err != nil {
		return 0, err
	}
	if err := x.recheckRemoved(); err != nil {
		return 0, err
	}
	if !x.b.careful && x.w.cfg.Mesh.Parking.touches(x.b) {
		return 0, errParked
	}
	lsn, err := x.finish(ctx)
	if err == nil && len(x.kept) > 0 {
		x.w.cfg.Mesh.keepOut(x.kept)
	}
	return lsn, err
}

func (x *execution) begin(ctx context.Context, head []call) error {
	res, err := x.s.run(ctx, head)
	if err != nil {
		return err
	}
	return x.begun(res[1].Rows[0])
}

// begun reads the row of xidSQL.
func (x *execution) begun(row [][]byte) error {
	x.xid = string(row[2])
	return x.w.cfg.Mesh.Local.takeSnapshot(row)
}

// finish writes records and progress and commits. The origin's position comes last, behind everything that can fail:
// from 16 on PostgreSQL moves an origin's progress with an abort as well. Progress is therefore what duri.applied says,
// which an abort undoes (docs/adr/0002).
func (x *execution) finish(ctx context.Context) (wal.LSN, error) {
	tail, checked := x.outcomes()
	if checked >= 0 {
		res, err := x.s.run(ctx, tail)
		if err != nil {
			return 0, err
		}
		if string(res[checked].Rows[0][0]) != "0" {
			x.w.cfg.Outcomes.forget()
			return 0, errDecided
		}
		tail = nil
	}
	if len(x.records) > 0 {
		tail = append(tail, call{recordSQL, recordParams(x.records)})
	}
	if len(x.b.held) > 0 {
		tail = append(tail, call{holdSQL, heldParams(x.w.cfg.Origin, x.b.held)})
	}
	if x.b.again != nil {
		tail = append(tail, call{releaseSQL, releaseParams(x.w.cfg.Origin, x.b.again)})
	}
	if !x.wrote {
		tail = append(tail, call{seenSQL, nil})
	}
	if x.w.cfg.Origin == x.w.cfg.Site { // before others can see the rows
		xid, err := strconv.ParseUint(x.xid, 10, 32)
		if err != nil {
			return 0, fmt.Errorf("read a transaction id: %w", err)
		}
		x.w.cfg.Mesh.Local.Rename(uint32(xid), x.b.to())
	}
	tail = append(tail,
		call{appliedSQL, appliedParams(x.b, x.w.cfg.Origin, x.w.cfg.Site, len(x.records))},
		call{constraintsSQL, nil},
		call{originSQL, [][]byte{[]byte(x.seenTo().String()), []byte(x.b.maxTime.String())}},
		call{commitSQL, nil},
		call{committedSQL, [][]byte{[]byte(x.origin)}})
	res, err := x.s.run(ctx, tail)
	if err != nil {
		return 0, err
	}
	if tag := res[len(res)-2].CommandTag.String(); tag != "COMMIT" {
		return 0, fmt.Errorf("commit of apply transaction ended as %s", tag)
	}
	if len(res[len(res)-1].Rows) != 1 {
		return 0, fmt.Errorf("replication origin %s has no progress after a commit", x.w.cfg.OriginName)
	}
	return wal.ParseLSN(string(res[len(res)-1].Rows[0][0]))
}

// seenTo is how far this site has seen the origin once the batch is committed: not beyond what waits.
func (x *execution) seenTo() wal.LSN {
	to := x.b.to()
	if floor, ok := x.w.aside.floor(); ok {
		to = min(to, floor)
	}
	for _, h := range x.b.held {
		to = min(to, h.lsn)
	}
	return to
}

// applyWave writes a wave: first every net change in few set-based statements that touch quiet rows only, then, one
// look closer, what those left.
func (x *execution) applyWave(ctx context.Context, wv *wave, head []call) error {
	if wv.truncate != nil {
		if head != nil {
			if err := x.begin(ctx, head); err != nil {
				return err
			}
		}
		return x.truncate(ctx, wv)
	}
	if len(wv.moved) > 0 || x.b.careful {
		if head != nil {
			if err := x.begin(ctx, head); err != nil {
				return err
			}
			head = nil
		}
		if err := x.complete(ctx, wv); err != nil {
			return err
		}
	}
	var ops []op
	var calls []call
	for _, tw := range wv.tables {
		if crowded, err := x.crowded(ctx, tw); err != nil {
			return err
		} else if crowded {
			if err := x.placeAll(ctx, wv, tw); err != nil {
				return err
			}
			continue
		}
		if err := x.leaveBuried(ctx, wv, tw); err != nil {
			return err
		}
		for _, o := range fastOps(tw) {
			ops = append(ops, o)
			calls = append(calls, o.call(x.quiet))
		}
		if rows := x.appends(wv, tw); len(rows) > 0 {
			ops = append(ops, op{kind: netInsert, tw: tw})
			calls = append(calls, appendCall(tw.target, rows))
		}
		if len(tw.appends)+len(tw.inOrder) > 0 {
			x.bags = append(x.bags, tw)
		}
	}
	res, err := x.runAt(ctx, append(head, calls...))
	if err != nil {
		return err
	}
	if head != nil {
		if err := x.begun(res[1].Rows[0]); err != nil {
			return err
		}
		res = res[len(head):]
	}
	return x.settle(ctx, wv, ops, res)
}

// settle looks at what the fast statements did and resolves the rest.
func (x *execution) settle(ctx context.Context, wv *wave, ops []op, res []*pgconn.Result) error {
	pending := map[*tableWave][]*entry{}
	for i, o := range ops {
		x.wrote = x.wrote || res[i].CommandTag.RowsAffected() > 0
		switch {
		case len(o.items) == 0: // appends
		case o.kind == netDelete:
			pending[o.tw] = append(pending[o.tw], left(o, res[i])...)
		case res[i].CommandTag.RowsAffected() == int64(len(o.items)):
			if o.kind == netInsert {
				x.noteCreated(wv, o)
			}
		default:
			for _, it := range o.items {
				pending[o.tw] = append(pending[o.tw], it.e)
			}
		}
	}
	for _, tw := range wv.tables {
		if tw.placed {
			continue
		}
		more := slices.Concat(pending[tw], slowOnes(tw))
		if err := x.resolve(ctx, wv, tw, more); err != nil {
			return err
		}
		if err := x.keyless(ctx, wv, tw); err != nil {
			return err
		}
	}
	return nil
}

// runAt runs calls that lock or create rows, and notes the WAL insert position after them for the barrier.
func (x *execution) runAt(ctx context.Context, calls []call) ([]*pgconn.Result, error) {
	res, err := x.s.run(ctx, append(calls, call{positionSQL, nil}))
	if err != nil {
		return nil, err
	}
	last := len(res) - 1
	x.at, err = wal.ParseLSN(string(res[last].Rows[0][0]))
	return res[:last], err
}

func (x *execution) noteCreated(wv *wave, o op) {
	for _, it := range o.items {
		x.created = append(x.created, created{o.tw, wv, it.e})
	}
}
