package apply

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "seed of the randomised tests; 0: a new one each time")
	roundsMax = flag.Int("rounds", 1, "how many seeds the randomised tests run, counting up from -seed")
	crashes   = flag.Int("crashes", 6, "how often the crash test kills")
)

// newSeed is the seed to use; it is printed, so that a failure can be repeated.
func newSeed(t testing.TB) uint64 {
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64() >> 32
	}
	t.Logf("seed %d (repeat with -args -seed %d)", seed, seed)
	return seed
}

// TestCrashesLoseAndRepeatNothing is S41: the receiving PostgreSQL is killed, and the worker cancelled, at random
// moments, while a table without a key and one with a key are filled at the origin.
func TestCrashesLoseAndRepeatNothing(t *testing.T) {
	seed := newSeed(t)
	rng := rand.New(rand.NewPCG(seed, 1))
	const schema = `CREATE TABLE log (id int, v text); CREATE TABLE acc (id int PRIMARY KEY, n int NOT NULL)`
	a, b := newRig(t, schema, rigOptions{
		asRole: true, clusters: 2, pgtest: []pgtest.Option{pgtest.WithFsync()},
		config: func(c *Config) { c.BatchTransactions = 50 },
	})
	b.faults = true
	ctx, cancel := context.WithCancel(t.Context())
	written := make(chan int, 1)
	writer := a.connect()
	go func() {
		n := 0
		for ctx.Err() == nil {
			n++
			sql := fmt.Sprintf(`BEGIN; INSERT INTO log VALUES (%[1]d, 'x'); INSERT INTO acc VALUES (%[2]d, 1) ON CONFLICT (id) DO UPDATE SET n = acc.n + 1;
				DELETE FROM acc WHERE id = %[3]d; COMMIT`, n, n%40, (n*7+3)%40)
			if _, err := pg.Rows(context.Background(), writer, sql); err != nil {
				a.failed(err)
				break
			}
		}
		written <- n
	}()
	stopped := false
	stop := func() int {
		cancel()
		stopped = true
		return <-written
	}
	defer func() {
		if !stopped {
			stop()
		}
	}()
	for i := range *crashes {
		before := b.worker.Status().Transactions
		more := int64(rng.IntN(400))
		eventually(t, "more is applied", func() bool { return b.worker.Status().Transactions > before+more })
		// Anywhere within a batch.
		_ = pause(ctx, time.Duration(rng.IntN(30000))*time.Microsecond)
		if i%3 == 0 {
			if err := b.cluster.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := b.cluster.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			continue
		}
		b.stopApply()
		b.startApply()
	}
	n := stop()
	settle(a, b)
	same(t, a, b, dump("log", "acc"))
	got := b.query("SELECT count(*), count(DISTINCT id), min(id), max(id) FROM log")[0]
	if want := fmt.Sprint([]string{fmt.Sprint(n), fmt.Sprint(n), "1", fmt.Sprint(n)}); fmt.Sprint(got) != want {
		t.Errorf("log holds %v, want %s", got, want)
	}
	for _, err := range b.errs {
		if s := pg.SQLState(err); s != "" && !strings.HasPrefix(s, "57P") && s != "55006" && s != "42704" {
			t.Errorf("not an error of a crash: %v", err)
		}
	}
	t.Logf("%d transactions, %d interruptions, %d errors on the way", n, *crashes, len(b.errs))
}
