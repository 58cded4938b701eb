package apply

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// uniqueClient runs random statements on a table with two unique columns besides the key.
type uniqueClient struct {
	s    *site
	name string
	rng  *rand.Rand
	conn *pgconn.PgConn
	n    int
}

func (c *uniqueClient) statement() string {
	c.n++
	id := func() int { return 1 + c.rng.IntN(6) }
	u := func() string { return []string{"NULL", "1", "2", "3", "4"}[c.rng.IntN(5)] }
	switch c.rng.IntN(10) {
	case 0, 1, 2, 3:
		return fmt.Sprintf("INSERT INTO t VALUES (%d, '%s%d', %s, %s) ON CONFLICT (id) DO UPDATE SET v = excluded.v, u = excluded.u", id(), c.name, c.n, u(), u())
	case 4, 5:
		return fmt.Sprintf("UPDATE t SET v = '%s%d', u = %s WHERE id = %d", c.name, c.n, u(), id())
	case 6:
		return fmt.Sprintf("UPDATE t SET v = '%s%d', w = %s WHERE id = %d", c.name, c.n, u(), id())
	case 7:
		return fmt.Sprintf("UPDATE t SET id = %d WHERE id = %d", id(), id())
	}
	return fmt.Sprintf("DELETE FROM t WHERE id = %d", id())
}

// transaction runs one or two statements; what PostgreSQL refuses is rolled back.
func (c *uniqueClient) transaction(ctx context.Context) error {
	sql := "BEGIN; " + c.statement() + "; COMMIT"
	if c.rng.IntN(3) == 0 {
		sql = "BEGIN; " + c.statement() + "; " + c.statement() + "; COMMIT"
	}
	_, err := pg.Rows(context.WithoutCancel(ctx), c.conn, sql)
	if pg.SQLState(err) != "" {
		_, err = pg.Rows(context.WithoutCancel(ctx), c.conn, "ROLLBACK")
	}
	return err
}

// row is a register's live row in the model.
type row struct {
	version wal.Version
	text    string // as text of the row
	unique  [2]string
}

// collides reports whether two rows share a unique value; NULLs never do.
func (r row) collides(o row) bool {
	return r.unique[0] != "" && r.unique[0] == o.unique[0] || r.unique[1] != "" && r.unique[1] == o.unique[1]
}

// registers replays the journals: the greatest version of each key wins.
func registers(txns []*wal.Txn) map[string]row {
	slices.SortFunc(txns, func(a, b *wal.Txn) int { return a.Version().Compare(b.Version()) })
	state := map[string]row{}
	for _, t := range txns {
		for _, c := range t.Changes {
			if c.Old != nil {
				delete(state, string(c.Old[0].Data))
			}
			if c.New == nil {
				continue
			}
			parts := []string{}
			for _, v := range c.New {
				parts = append(parts, string(v.Data))
			}
			state[parts[0]] = row{t.Version(), "(" + strings.Join(parts, ",") + ")", [2]string{parts[2], parts[3]}}
		}
	}
	return state
}

// visible is the rule of replication.md 11: from the greatest version down, a row is visible unless a visible one
// collides with it. Rows of one transaction do not collide.
func visible(state map[string]row) (shown, parked []string) {
	var rows, seen []row
	for _, r := range state {
		rows = append(rows, r)
	}
	slices.SortFunc(rows, func(a, b row) int { return cmp.Or(b.version.Compare(a.version), cmp.Compare(a.text, b.text)) })
	for _, r := range rows {
		if slices.ContainsFunc(seen, r.collides) {
			parked = append(parked, r.text)
			continue
		}
		seen, shown = append(seen, r), append(shown, r.text)
	}
	slices.Sort(shown)
	slices.Sort(parked)
	return shown, parked
}

// TestUniqueRowsConverge: random transactions on a table with two unique columns at all sites end, at all sites, in the
// rows that the rule makes visible, and the others parked.
func TestUniqueRowsConverge(t *testing.T) {
	seed := newSeed(t)
	for _, n := range []int{2, 3} {
		t.Run(fmt.Sprintf("%d sites", n), func(t *testing.T) {
			sites := newParkRig(t, n)
			for i := range *roundsMax {
				uniqueRound(t, sites, seed+uint64(i))
			}
		})
	}
}

func uniqueRound(t *testing.T, sites []*site, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 3))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var clients []*uniqueClient
	for i, s := range slices.Concat(sites, sites) {
		c := &uniqueClient{s: s, name: string(rune('p' + i)), rng: rand.New(rand.NewPCG(seed, uint64(20+i))), conn: s.connect()}
		clients = append(clients, c)
		run(t, c.conn, "SET deadlock_timeout = '20ms'")
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := c.transaction(ctx); err != nil {
					s.failed(err)
					return
				}
				_ = pause(ctx, time.Duration(c.rng.IntN(6000))*time.Microsecond)
			}
		})
	}
	meddle(ctx, rng, sites, 15, func(s *site) {
		for _, w := range s.workers {
			w.cfg.LockTimeout = time.Duration(20+rng.IntN(200)) * time.Millisecond
		}
	})

	cancel()
	wg.Wait()
	for _, c := range clients {
		pg.Close(c.conn)
	}
	var txns []*wal.Txn
	releaseAll(sites)
	settle(sites...)
	for _, s := range sites {
		txns = append(txns, s.feed.txns()...)
	}
	shown, parked := visible(registers(txns))
	want := strings.Join(shown, "\n") + "\nparked\n" + strings.Join(parked, "\n")
	for _, s := range sites {
		var got string
		eventually := time.Now().Add(20 * time.Second)
		for {
			got = s.lines("SELECT t::text FROM t") + "\nparked\n" +
				s.lines("SELECT '(' || concat_ws(',', row->>'id', row->>'v', coalesce(row->>'u', ''), coalesce(row->>'w', '')) || ')' FROM duri.parked")
			if got == want || time.Now().After(eventually) || pause(t.Context(), 20*time.Millisecond) != nil {
				break
			}
		}
		if got != want {
			t.Errorf("seed %d: site %s has\n%s\nwant\n%s\n%v", seed, s.name, got, want, s.problem())
		}
	}
	if t.Failed() {
		for _, s := range sites {
			for _, r := range s.query("SELECT id, kind, code, key, origin, origin_lsn, remote_time, remote_row, local_site, local_time, local_row FROM duri.conflict ORDER BY id DESC LIMIT 60") {
				t.Log("record at", s.name, r)
			}
			for _, r := range s.query("SELECT * FROM duri.parked") {
				t.Log("parked at", s.name, r)
			}
			for _, r := range s.query("SELECT t, xmin, pg_xact_commit_timestamp_origin(xmin) FROM t") {
				t.Log("row at", s.name, r)
			}
		}
		for _, x := range txns[max(0, len(txns)-80):] {
			for _, c := range x.Changes {
				t.Log(x.Version(), x.XID, x.EndLSN, "seen", x.Seen, c.Op, tupleText(c.Old), tupleText(c.New))
			}
		}
		t.FailNow()
	}
	t.Logf("seed %d: %d transactions so far, %d rows visible, %d parked", seed, len(txns), len(shown), len(parked))
}

func tupleText(t wal.Tuple) string {
	var parts []string
	for _, v := range t {
		parts = append(parts, strconv.Quote(string(v.Data)))
	}
	return strings.Join(parts, ",")
}

// lines is a query's single column, sorted.
func (s *site) lines(sql string) string {
	s.t.Helper()
	var out []string
	for _, r := range s.query(sql) {
		out = append(out, r[0])
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}
