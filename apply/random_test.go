package apply

import (
	"context"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

const randomSchema = `
CREATE TABLE t (id int PRIMARY KEY, v text, n int, big text);
ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
CREATE TABLE f (a numeric, b text, v text, big text, PRIMARY KEY (b, a));
ALTER TABLE f REPLICA IDENTITY FULL;
ALTER TABLE f ALTER big SET STORAGE EXTERNAL;
CREATE TABLE bag (id text);
CREATE TABLE fullbag (id text);
ALTER TABLE fullbag REPLICA IDENTITY FULL;`

// event is one row change as the client saw it: what became of a key.
type event struct {
	table, key string
	row        string // the whole row; empty: the key is gone
	truncate   bool
}

// history collects committed transactions of both sites.
type history struct {
	mu   sync.Mutex
	txns map[wal.SiteID]map[uint32][]event // by xid
}

// client is one session that runs random transactions.
type client struct {
	s    *site
	name string
	rng  *rand.Rand
	h    *history
	conn *pgconn.PgConn
	n    int
	mine []string // rows of fullbag that this client inserted and did not delete
}

// keysMax keeps the number of keys so small that most transactions meet.
const keysMax = 5

func (c *client) key() string { return strconv.Itoa(1 + c.rng.IntN(keysMax)) }

// value is unique.
func (c *client) value() string {
	c.n++
	return fmt.Sprintf("%s%d", c.name, c.n)
}

// statement is a random statement and how its RETURNING rows (old key, new key, row) become events.
func (c *client) statement() (sql string, events func(rows [][]string) []event) {
	table, ret := "t", "RETURNING id::text, id::text, t::text"
	where := "id = " + c.key()
	set := []string{"v = '" + c.value() + "'", "n = n + 1", "big = repeat('" + c.value() + "', 900)", "id = " + c.key()}
	insert := fmt.Sprintf("INSERT INTO t VALUES (%s, '%s', 0, repeat('%s', 900)) ON CONFLICT (id) DO UPDATE SET v = excluded.v, n = t.n + 1", c.key(), c.value(), c.value())
	if c.rng.IntN(3) == 0 {
		table, ret = "f", "RETURNING b || a::float8, b || a::float8, f::text"
		spelled := []string{"%s", "%s.0", "%s.00"}[c.rng.IntN(3)]
		num := fmt.Sprintf(spelled, strconv.Itoa(1+c.rng.IntN(3)))
		where = "a = " + num + " AND b = 'k'"
		set = []string{"v = '" + c.value() + "'", "big = repeat('" + c.value() + "', 900)", "a = " + num, "a = " + fmt.Sprintf(spelled, strconv.Itoa(1+c.rng.IntN(3)))}
		insert = fmt.Sprintf("INSERT INTO f VALUES (%s, 'k', '%s', repeat('%s', 900)) ON CONFLICT (a, b) DO UPDATE SET v = excluded.v", num, c.value(), c.value())
	}
	live := func(rows [][]string) (out []event) {
		for _, r := range rows {
			if r[0] != r[1] {
				out = append(out, event{table: table, key: r[0]})
			}
			out = append(out, event{table: table, key: r[1], row: r[2]})
		}
		return out
	}
	switch p := c.rng.IntN(100); {
	case p < 40:
		return insert + " " + ret, live
	case p < 70: // old key by a subquery, because RETURNING shows the new one
		keyExpr, _, _ := strings.Cut(strings.TrimPrefix(ret, "RETURNING "), ",")
		old := fmt.Sprintf("(SELECT %s FROM %s WHERE %s)", keyExpr, table, where)
		parts := strings.SplitN(ret, ", ", 3)
		return fmt.Sprintf("UPDATE %s SET %s WHERE %s RETURNING %s, %s, %s", table, set[c.rng.IntN(len(set))], where, old, parts[1], parts[2]), live
	case p < 88:
		return fmt.Sprintf("DELETE FROM %s WHERE %s %s", table, where, ret), func(rows [][]string) (out []event) {
			for _, r := range rows {
				out = append(out, event{table: table, key: r[0]})
			}
			return out
		}
	case p < 89:
		return "TRUNCATE " + table, func([][]string) []event { return []event{{table: table, truncate: true}} }
	case p < 95:
		v := c.value()
		return "INSERT INTO bag VALUES ('" + v + "')", func([][]string) []event { return []event{{table: "bag", key: v, row: "(" + v + ")"}} }
	case len(c.mine) > 0 && p < 98:
		v := c.mine[0]
		return "DELETE FROM fullbag WHERE id = '" + v + "'", func([][]string) []event { return []event{{table: "fullbag", key: v}} }
	default:
		v := c.value()
		return "INSERT INTO fullbag VALUES ('" + v + "')", func([][]string) []event { return []event{{table: "fullbag", key: v, row: "(" + v + ")"}} }
	}
}

// transaction runs one random transaction; one that PostgreSQL refuses (a key that is taken, a deadlock) is rolled back.
func (c *client) transaction(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx) // a transaction whose outcome is unknown would spoil the model
	rows, err := pg.Rows(ctx, c.conn, "BEGIN; SELECT pg_current_xact_id()::xid")
	if err != nil {
		return err
	}
	xid, err := strconv.ParseUint(rows[0][0], 10, 32)
	if err != nil {
		return err
	}
	var events []event
	for range 1 + c.rng.IntN(4) {
		sql, eventsOf := c.statement()
		rows, err := pg.Rows(ctx, c.conn, sql)
		if pg.SQLState(err) != "" {
			_, err = pg.Rows(ctx, c.conn, "ROLLBACK")
			return err
		}
		if err != nil {
			return err
		}
		events = append(events, eventsOf(rows)...)
	}
	end := "COMMIT"
	if c.rng.IntN(10) == 0 {
		end = "ROLLBACK"
	}
	if _, err := pg.Rows(ctx, c.conn, end); err != nil || end == "ROLLBACK" {
		return err
	}
	for _, e := range events {
		if e.table == "fullbag" && e.row != "" {
			c.mine = append(c.mine, e.key)
		} else if e.table == "fullbag" {
			c.mine = slices.DeleteFunc(c.mine, func(v string) bool { return v == e.key })
		}
	}
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	c.h.txns[c.s.id][uint32(xid)] = events
	return nil
}

// model replays what was committed in the order of versions: with whole images, the greater version of each key wins.
func (h *history) model(t testing.TB, txns []*wal.Txn) string {
	t.Helper()
	slices.SortFunc(txns, func(a, b *wal.Txn) int { return a.Version().Compare(b.Version()) })
	state := map[string]string{}
	for _, txn := range txns {
		events, ok := h.txns[txn.Origin][txn.XID]
		if !ok {
			t.Fatalf("transaction %d of site %d is in the stream, but no client committed it", txn.XID, txn.Origin)
		}
		for _, e := range events {
			at := e.table + "|" + e.key
			switch {
			case e.truncate:
				maps.DeleteFunc(state, func(k, _ string) bool { return strings.HasPrefix(k, e.table+"|") })
			case e.row == "":
				delete(state, at)
			default:
				state[at] = e.table + "|" + e.row
			}
		}
	}
	rows := slices.Sorted(maps.Values(state))
	if len(rows) == 0 {
		return ""
	}
	return strings.Join(rows, "\n") + "\n"
}

// TestConvergesToTheGreatestVersions is the oracle of scenarios.md, for two sites and for three: random transactions on few keys at
// all, links held and released at random, batches of random sizes, workers restarted, local decoding held back. At the
// end all sites and the model hold the same rows.
func TestConvergesToTheGreatestVersions(t *testing.T) {
	seed := newSeed(t)
	for _, n := range []int{2, 3} {
		t.Run(fmt.Sprintf("%d sites", n), func(t *testing.T) {
			sites := newMeshRig(t, n, randomSchema, rigOptions{asRole: true})
			for i := range *roundsMax {
				round(t, sites, seed+uint64(i))
			}
		})
	}
}

func round(t *testing.T, sites []*site, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 2))
	h := &history{txns: map[wal.SiteID]map[uint32][]event{}}
	first := map[*site]int{}
	for _, s := range sites {
		s.exec("TRUNCATE t, f, bag, fullbag")
		settle(sites...)
		h.txns[s.id] = map[uint32][]event{}
	}
	for _, s := range sites {
		first[s] = len(s.feed.txns())
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var clients []*client
	for i, s := range slices.Concat(sites, sites) {
		clients = append(clients, &client{s: s, name: string(rune('p' + i)), rng: rand.New(rand.NewPCG(seed, uint64(10+i))), h: h, conn: s.connect()})
		run(t, clients[i].conn, "SET deadlock_timeout = '20ms'")
	}
	for _, c := range clients {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := c.transaction(ctx); err != nil {
					c.s.failed(err)
					return
				}
				_ = pause(ctx, time.Duration(c.rng.IntN(3000))*time.Microsecond)
			}
		})
	}
	holder := sites[rng.IntN(len(sites))].connect() // a client that keeps a row locked for longer than is waited for
	wg.Go(func() {
		key := 1 + int(seed%keysMax)
		if _, err := pg.Rows(context.WithoutCancel(ctx), holder, fmt.Sprintf("SET deadlock_timeout = '20ms'; BEGIN; SELECT FROM t WHERE id = %d FOR UPDATE", key)); err != nil {
			return // a victim of a deadlock
		}
		_ = pause(ctx, 900*time.Millisecond)
		_, _ = pg.Rows(context.WithoutCancel(ctx), holder, "COMMIT")
	})
	meddle(ctx, rng, sites, 25, func(s *site) { // restart, with another batch size
		s.stopApply()
		for _, w := range s.workers {
			w.cfg.BatchTransactions = []int{1, 2, 5, 2000}[rng.IntN(4)]
		}
		s.startApply()
	}, func(s *site) { // local decoding stands still for a while
		s.gate.Lock()
		_ = pause(ctx, time.Duration(rng.IntN(60))*time.Millisecond)
		s.gate.Unlock()
	}, (*site).prune)

	cancel()
	wg.Wait()
	pg.Close(holder)
	for _, c := range clients {
		pg.Close(c.conn)
	}
	releaseAll(sites)
	settle(sites...)
	sorted := func(s *site) string {
		lines := slices.Collect(strings.Lines(s.rows(dump("t", "f", "bag", "fullbag"))))
		slices.Sort(lines)
		return strings.Join(lines, "")
	}
	var txns []*wal.Txn
	for _, s := range sites {
		txns = append(txns, s.feed.txns()[first[s]:]...)
	}
	want := h.model(t, txns)
	for _, s := range sites {
		if got := sorted(s); got != want {
			t.Errorf("seed %d: site %s is not the model (-model +site):\n%s", seed, s.name, cmp.Diff(strings.Split(shorten(want), "\n"), strings.Split(shorten(got), "\n")))
		}
	}
	if t.Failed() {
		for _, s := range sites {
			for _, r := range s.query(`SELECT id, kind, code, table_name, key, origin, origin_lsn, remote_time, left(remote_row::text, 60), local_site, local_time,
				left(local_row::text, 60) FROM duri.conflict WHERE at > now() - interval '10 s' ORDER BY id`) {
				t.Log("record at", s.name, r)
			}
			for _, r := range s.query("SELECT xid, origin, from_lsn, to_lsn, min_time, max_time, transactions, changes, seen FROM duri.applied WHERE at > now() - interval '10 s' ORDER BY xid") {
				t.Log("applied at", s.name, r)
			}
		}
		for _, txn := range txns {
			t.Log(txn.Version(), txn.XID, txn.EndLSN, "seen", txn.Seen)
			for _, e := range h.txns[txn.Origin][txn.XID] {
				t.Log("   ", shorten(fmt.Sprint(e)))
			}
		}
		t.FailNow()
	}
	var conflicts, retries int64
	for _, s := range sites {
		for _, w := range s.workers {
			conflicts += w.Status().Conflicts
			retries += w.Status().Retries
		}
	}
	t.Logf("seed %d: %d transactions, %d rows at the end; %d conflicts, %d retries so far", seed, len(txns), strings.Count(want, "\n"), conflicts, retries)
}

// prune forgets what every other site has seen, as the server does now and then.
func (s *site) prune() {
	now := wal.TimeOf(time.Now().Add(time.Hour))
	lowest := wal.LSN(math.MaxInt64)
	for _, w := range s.workers {
		lowest = min(lowest, w.Status().Seen)
	}
	s.local.Prune(lowest, now)
	for i, p := range s.peers {
		lowest := wal.LSN(math.MaxInt64)
		for j, w := range s.workers {
			if j != i {
				lowest = min(lowest, wal.SeenOf(w.Status().SeenOthers, p.id))
			}
		}
		lowest = min(lowest, s.workers[i].Status().Applied)
		s.mesh.Prune(p.id, lowest, now)
	}
}

// shorten cuts the long values.
func shorten(s string) string {
	var out []string
	for line := range strings.Lines(s) {
		line = strings.TrimRight(line, "\n")
		if len(line) > 200 {
			line = line[:80] + " ... " + line[len(line)-40:]
		}
		out = append(out, line)
	}
	return clip(strings.Join(out, "\n"))
}
