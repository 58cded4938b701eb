package trial

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// client is one session of a site that runs random transactions. What it draws follows from the seed; what it meets does
// not.
type client struct {
	r     *run
	site  int
	n     int // number of the session at its site
	rng   *rand.Rand
	atoms []atom
	total int // of the atoms' weights
	conn  *pgconn.PgConn
	count int
	mine  []own // rows of bag_full that this client inserted
}

// own is a row without a key, of which the client knows the whole.
type own struct{ id, v string }

func newClient(r *run, site, n int) *client {
	c := &client{r: r, site: site, n: n, rng: rand.New(rand.NewPCG(r.s.Seed, uint64(100+site*100+n)))}
	for _, a := range allAtoms {
		if slices.Contains(r.s.Atoms, a.name) {
			c.atoms, c.total = append(c.atoms, a), c.total+a.weight
		}
	}
	return c
}

// value is unique in the whole run.
func (c *client) value() string {
	c.count++
	return fmt.Sprintf("%s%d.%d", names(maxSites)[c.site], c.n, c.count)
}

// run works until ctx ends or the load is over, over as many connections as it takes.
func (c *client) run(ctx context.Context) {
	defer func() { pg.Close(c.conn) }()
	for ctx.Err() == nil && !c.r.load.over() {
		if c.r.load.held.Load() || c.r.load.early(c.r.s.Rate) {
			pause(ctx, 5*time.Millisecond)
			continue
		}
		if c.conn == nil || c.conn.IsClosed() {
			if err := c.connect(ctx); err != nil {
				pg.Close(c.conn)
				c.conn = nil
				pause(ctx, 50*time.Millisecond)
				continue
			}
		}
		// A transaction is not broken off at the end of the load: that would only make its outcome unknown.
		if err := c.transaction(context.WithoutCancel(ctx)); err != nil {
			pg.Close(c.conn)
			c.conn = nil
		}
	}
}

// pause lets time pass in which the others go on.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// connect opens the session, with the replication origin by which it may set its commit times.
func (c *client) connect(ctx context.Context) (err error) {
	s := c.r.p.Sites[c.site]
	if c.conn, err = pg.Connect(ctx, s.Cluster.DSN(s.Database, ""), "", map[string]string{"application_name": "client"}); err != nil {
		return err
	}
	name := pg.QuoteLiteral(apply.ClockOriginName(s.Database, 1+c.n))
	_, err = pg.Rows(ctx, c.conn, fmt.Sprintf(`SELECT pg_replication_origin_create(%[1]s) WHERE pg_replication_origin_oid(%[1]s) IS NULL;
		SELECT pg_replication_origin_session_setup(%[1]s)`, name))
	return err
}

// statementMax bounds a transaction of a server that is stopped meanwhile.
const statementMax = time.Minute

// transaction runs one. An error means that the connection is of no use any more.
func (c *client) transaction(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, statementMax)
	defer cancel()
	b := c.draw()
	results, err := c.conn.Exec(ctx, b.text()).ReadAll()
	switch {
	case pg.SQLState(err) != "" && !pg.IsConnectionError(err):
		c.r.load.refused.Add(1)
		_, err = pg.Rows(ctx, c.conn, "ROLLBACK")
		return err
	case err != nil:
		return err
	}
	effects, xid, err := b.effects(results)
	if err != nil {
		c.r.load.fail(err)
		return err
	}
	if len(effects) == 0 || b.rollback {
		_, err = pg.Rows(ctx, c.conn, "ROLLBACK")
		return err
	}
	l := c.r.ledgers[c.site]
	e := l.begin(xid, effects)
	// All locks are held now: whoever waits for one of them takes a later commit time.
	_, err = pg.Rows(ctx, c.conn, fmt.Sprintf("SELECT pg_replication_origin_xact_setup('0/1', clock_timestamp() + interval '%d microseconds'); COMMIT",
		c.r.clocks[c.site].get().Microseconds()))
	switch {
	case err == nil:
		l.end(e, committed)
		c.r.load.committed(c.site, len(effects))
		c.keep(effects)
		return nil
	case pg.SQLState(err) != "" && !pg.IsConnectionError(err):
		l.end(e, aborted)
		c.r.load.refused.Add(1)
		_, err = pg.Rows(ctx, c.conn, "ROLLBACK")
		return err
	}
	c.forget(effects)
	return err
}

// keep follows the client's own rows.
func (c *client) keep(effects []effect) {
	c.forget(effects)
	for _, e := range effects {
		if e.table == tableFullBag && e.op != wal.Delete {
			c.mine = slices.DeleteFunc(c.mine, func(o own) bool { return o.id == e.key })
			_, v, _ := strings.Cut(e.image, separator)
			c.mine = append(c.mine, own{e.key, v})
		}
	}
}

// forget drops own rows that are gone, or of which it is not known whether they are.
func (c *client) forget(effects []effect) {
	for _, e := range effects {
		if e.table == tableFullBag && e.op != wal.Insert {
			c.mine = slices.DeleteFunc(c.mine, func(o own) bool { return o.id == e.key })
		}
	}
}

// bundle is a transaction that was drawn: what is sent in one go.
type bundle struct {
	steps    []step
	rollback bool // the client thinks better of it
}

// step is one statement and how the rows that it returns become effects; nil: they do not, or it was rolled back.
type step struct {
	sql     string
	effects func(row []string) effect
}

func (b *bundle) text() string {
	var t strings.Builder
	t.WriteString("BEGIN")
	for _, s := range b.steps {
		t.WriteString(";\n" + s.sql)
	}
	t.WriteString(";\nSELECT pg_current_xact_id_if_assigned()::xid::text")
	return t.String()
}

// effects reads the results of text.
func (b *bundle) effects(results []*pgconn.Result) (all []effect, xid uint32, err error) {
	if len(results) != len(b.steps)+2 {
		return nil, 0, fmt.Errorf("%d results of %d statements", len(results), len(b.steps)+2)
	}
	for i, s := range b.steps {
		if s.effects == nil {
			continue
		}
		for _, row := range results[i+1].Rows {
			texts := make([]string, len(row))
			for j, v := range row {
				texts[j] = string(v)
			}
			all = append(all, s.effects(texts))
		}
		if results[i+1].CommandTag.String() == "TRUNCATE TABLE" { // returns nothing
			all = append(all, s.effects(nil))
		}
	}
	last := results[len(results)-1].Rows
	if len(last) != 1 || len(all) > 0 && last[0][0] == nil {
		return nil, 0, errors.New("a transaction with changes has no number")
	}
	if last[0][0] != nil {
		n, err := strconv.ParseUint(string(last[0][0]), 10, 32)
		if err != nil {
			return nil, 0, err
		}
		xid = uint32(n)
	}
	return all, xid, nil
}

// draw makes the next transaction.
func (c *client) draw() *bundle {
	b := &bundle{rollback: c.rng.IntN(40) == 0}
	many := 1 // rows of each statement
	if c.rng.IntN(3) > 0 {
		many = 1 + c.rng.IntN(12)
	}
	if c.rng.IntN(400) == 0 {
		many = 200
	}
	for range 1 + c.rng.IntN(3) {
		a := c.pick()
		s := a.draw(c, many)
		if s.sql == "" {
			continue
		}
		if !slices.Contains(c.r.s.Atoms, atomSavepoint) || c.rng.IntN(8) > 0 {
			b.steps = append(b.steps, s)
			continue
		}
		end := step{sql: "RELEASE s"}
		if c.rng.IntN(2) == 0 {
			end.sql, s.effects = "ROLLBACK TO s", nil
		}
		b.steps = append(b.steps, step{sql: "SAVEPOINT s"}, s, end)
	}
	return b
}

func (c *client) pick() atom {
	n := c.rng.IntN(max(1, c.total))
	for _, a := range c.atoms {
		if n -= a.weight; n < 0 {
			return a
		}
	}
	return allAtoms[0] // only atoms without weight: the script has to write something
}
