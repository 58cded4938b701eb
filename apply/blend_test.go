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

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

func TestAddDifference(t *testing.T) {
	for _, tc := range [][4]string{
		{"5", "1", "3", "7"},
		{"0", "3", "1", "-2"},
		{"1.50", "1.5", "2", "2.00"},
		{"-1", "0", "0.05", "-0.95"},
		{"99999999999999999999", "0", "1", "100000000000000000000"},
		{"0.00", "0.01", "0", "-0.01"},
		{"10", "10", "10", "10"},
	} {
		got, err := addDifference([]byte(tc[0]), []byte(tc[1]), []byte(tc[2]))
		if err != nil || string(got) != tc[3] {
			t.Errorf("%s + %s - %s = %s, %v; want %s", tc[0], tc[2], tc[1], got, err, tc[3])
		}
	}
	for _, bad := range []string{"NaN", "Infinity", "", "1e5"} {
		if got, err := addDifference([]byte(bad), []byte("1"), []byte("2")); err == nil {
			t.Errorf("%s gives %s", bad, got)
		}
	}
}

const blendSchema = `
CREATE TABLE t (id int PRIMARY KEY, v text, w text, n int DEFAULT 0, m numeric(12,2) DEFAULT 0);
ALTER TABLE t REPLICA IDENTITY FULL;
INSERT INTO t SELECT i, 'seed', 'seed' FROM generate_series(1, 5) i;`

func blending(mode policy.Mode) policy.Set {
	return policy.NewSet(map[policy.Name]policy.Table{{Schema: "public", Table: "t"}: {Mode: mode, Delta: []string{"n", "m"}}}, nil)
}

// newBlendRig makes sites that hold the same rows before they stream: what stood there before is seen by everybody.
func newBlendRig(t *testing.T, n int, mode policy.Mode) []*site {
	return newMeshRig(t, n, blendSchema, rigOptions{asRole: true, policies: blending(mode)})
}

// TestConcurrentChangesBlend is S29 with delta columns, and S03 in column mode.
func TestConcurrentChangesBlend(t *testing.T) {
	for _, tc := range []struct {
		mode policy.Mode
		want string
	}{
		{policy.ModeRow, "1|seed|b|3|1.50\n2|b|seed|0|0.00\n"},
		{policy.ModeColumn, "1|a|b|3|1.50\n2|b|seed|0|0.00\n"},
	} {
		t.Run(string(tc.mode), func(t *testing.T) {
			sites := newBlendRig(t, 3, tc.mode)
			a, b, c := sites[0], sites[1], sites[2]
			holdAll(sites)
			a.exec("UPDATE t SET v = 'a', n = n + 1 WHERE id = 1")
			c.exec("UPDATE t SET m = m + 1.5 WHERE id = 1")
			b.exec("UPDATE t SET w = 'b', n = n + 2 WHERE id = 1")
			a.exec("UPDATE t SET v = 'a' WHERE id = 2")
			b.exec("UPDATE t SET v = 'b' WHERE id = 2")
			releaseAll(sites)
			settle(sites...)
			for _, s := range sites {
				if got := s.rows("SELECT * FROM t WHERE id < 3 ORDER BY id"); got != tc.want {
					t.Errorf("site %s:\n%swant\n%s", s.name, got, tc.want)
				}
			}
		})
	}
}

func holdAll(sites []*site) {
	for _, s := range sites {
		for _, to := range s.peers {
			s.feed.hold(to.id)
		}
	}
}

// TestBlendedRowsConverge: random concurrent updates; delta columns end as the sum of all differences, every other column
// as the greatest version that touched it (column mode) or as the greatest version's row has it (row mode).
func TestBlendedRowsConverge(t *testing.T) {
	seed := newSeed(t)
	for _, mode := range policy.Modes {
		for _, n := range []int{2, 3} {
			t.Run(fmt.Sprintf("%s mode, %d sites", mode, n), func(t *testing.T) {
				sites := newBlendRig(t, n, mode)
				for i := range *roundsMax {
					blendRound(t, sites, mode, seed+uint64(i))
				}
			})
		}
	}
}

func blendRound(t *testing.T, sites []*site, mode policy.Mode, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 4))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i, s := range slices.Concat(sites, sites) {
		conn, rng := s.connect(), rand.New(rand.NewPCG(seed, uint64(30+i)))
		run(t, conn, "SET deadlock_timeout = '20ms'")
		wg.Go(func() {
			defer pg.Close(conn)
			for n := 0; ctx.Err() == nil; n++ {
				set := []string{"n = n + " + strconv.Itoa(rng.IntN(9)-4), "m = m - 0.25, n = n + 1", fmt.Sprintf("v = 's%d-%d'", i, n), fmt.Sprintf("w = 's%d-%d', m = m + 1", i, n)}[rng.IntN(4)]
				_, err := pg.Rows(context.WithoutCancel(ctx), conn, fmt.Sprintf("UPDATE t SET %s WHERE id = %d", set, 1+rng.IntN(5)))
				if err != nil && pg.SQLState(err) == "" {
					s.failed(err)
					return
				}
				_ = pause(ctx, time.Duration(rng.IntN(4000))*time.Microsecond)
			}
		})
	}
	meddle(ctx, rng, sites, 12, func(s *site) {
		s.stopApply()
		s.startApply()
	}, (*site).prune)

	cancel()
	wg.Wait()
	releaseAll(sites)
	settle(sites...)
	var txns []*wal.Txn
	for _, s := range sites {
		txns = append(txns, s.feed.txns()...)
	}
	want := blendModel(t, txns, mode)
	for _, s := range sites {
		if got := s.rows("SELECT * FROM t ORDER BY id"); got != want {
			t.Errorf("seed %d: site %s has\n%swant\n%s", seed, s.name, got, want)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	t.Logf("seed %d: %d transactions so far", seed, len(txns))
}

// blendModel replays the journals in the order of versions.
func blendModel(t *testing.T, txns []*wal.Txn, mode policy.Mode) string {
	slices.SortFunc(txns, func(a, b *wal.Txn) int { return a.Version().Compare(b.Version()) })
	type model struct {
		v, w string
		n    int
		m    int64 // hundredths
	}
	rows := map[string]*model{}
	for i := 1; i <= 5; i++ {
		rows[strconv.Itoa(i)] = &model{v: "seed", w: "seed"}
	}
	cents := func(v wal.Value) int64 {
		n, err := strconv.ParseInt(strings.ReplaceAll(string(v.Data), ".", ""), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	number := func(v wal.Value) int {
		n, err := strconv.Atoi(string(v.Data))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, x := range txns {
		for _, c := range x.Changes {
			r := rows[string(c.New[0].Data)]
			r.n += number(c.New[3]) - number(c.Old[3])
			r.m += cents(c.New[4]) - cents(c.Old[4])
			for i, field := range []*string{1: &r.v, 2: &r.w} {
				if field != nil && (mode == policy.ModeRow || string(c.New[i].Data) != string(c.Old[i].Data)) {
					*field = string(c.New[i].Data)
				}
			}
		}
	}
	var out []string
	for id, r := range rows {
		sign, m := "", r.m
		if m < 0 {
			sign, m = "-", -m
		}
		out = append(out, fmt.Sprintf("%s|%s|%s|%d|%s%d.%02d\n", id, r.v, r.w, r.n, sign, m/100, m%100))
	}
	slices.SortFunc(out, cmp.Compare)
	return strings.Join(out, "")
}
