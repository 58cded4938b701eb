package enrol

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"regexp"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

const (
	writers = 4
	hotKeys = 20
)

// write commits transactions until ctx ends: a new row, a change of a hot one, sometimes a rollback.
func write(ctx context.Context, dsn string, writer int, seed uint64) error {
	c, err := pg.Connect(context.WithoutCancel(ctx), dsn, "", nil)
	if err != nil {
		return err
	}
	defer pg.Close(c)
	rnd := rand.New(rand.NewPCG(seed, uint64(writer)))
	for i := 0; ctx.Err() == nil; i++ {
		end := "COMMIT"
		if rnd.IntN(10) == 0 {
			end = "ROLLBACK"
		}
		sql := fmt.Sprintf("BEGIN; INSERT INTO ins VALUES (%d); UPDATE hot SET n = n + 1, by = %d WHERE k = %d; %s",
			writer*1000000+i, writer*1000000+i, rnd.IntN(hotKeys), end)
		if _, err := pg.Rows(context.WithoutCancel(ctx), c, sql); err != nil {
			return err
		}
	}
	return nil
}

// TestContentIsExactlyWhatWasCommittedBeforeAt lets writers run at the source while it is copied, and compares the
// target with the source's WAL: each row is there if and only if its commit ended at or before At.
func TestContentIsExactlyWhatWasCommittedBeforeAt(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	p := newPair(t, fmt.Sprintf(`CREATE TABLE ins (id int PRIMARY KEY); CREATE TABLE hot (k int PRIMARY KEY, n int, by int);
		INSERT INTO hot SELECT i, 0, 0 FROM generate_series(0, %d) i;
		CREATE TABLE ballast (id int PRIMARY KEY, v text); INSERT INTO ballast SELECT i, repeat('x', 500) FROM generate_series(1, 20000) i`, hotKeys-1))
	do(t, p.a, "SELECT pg_create_logical_replication_slot('witness', 'test_decoding')")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var load errgroup.Group
	for w := range writers {
		load.Go(func() error { return write(ctx, p.a.DSN("shop", ""), w, seed) })
	}
	waitFor(t, p, "SELECT count(*) > 300 FROM ins")
	r, w := io.Pipe()
	var send errgroup.Group
	send.Go(func() error { return w.CloseWithError(Send(t.Context(), p.source(), w)) })
	res, err := Receive(t.Context(), p.setup(), r, nil)
	if err != nil {
		t.Fatal(explain(err))
	}
	if err := send.Wait(); err != nil {
		t.Fatal(err)
	}
	after := rows(t, p.a, "SELECT count(*) FROM ins")[0][0]
	waitFor(t, p, "SELECT count(*) > 300 + "+after+" FROM ins")
	stop()
	if err := load.Wait(); err != nil {
		t.Fatal(err)
	}
	want := replay(t, p, res.At)
	if len(want.before) < 300 || want.after < 300 {
		t.Fatalf("%d commits before At and %d after it: nothing was tested", len(want.before), want.after)
	}
	t.Logf("At %s: %d commits before, %d after, %d rows copied", res.At, len(want.before), want.after, res.Rows)
	compare(t, p, want)
}

// content is what the WAL says of the tables at a position.
type content struct {
	before map[string]bool   // ids of ins
	hot    map[string]string // k -> n and by
	after  int               // commits after the position
}

var (
	insertion = regexp.MustCompile(`^table public.ins: INSERT: id\[integer\]:(\d+)`)
	update    = regexp.MustCompile(`^table public.hot: UPDATE: k\[integer\]:(\d+) n\[integer\]:(\d+) by\[integer\]:(\d+)`)
)

// replay reads the source's WAL up to now. The position of test_decoding's COMMIT rows is the end of the commit record.
func replay(t *testing.T, p *pair, at wal.LSN) content {
	t.Helper()
	out := content{before: map[string]bool{}, hot: map[string]string{}}
	var changes [][]string
	for _, r := range rows(t, p.a, "SELECT lsn, data FROM pg_logical_slot_get_changes('witness', NULL, NULL)") {
		switch {
		case len(r[1]) > 5 && r[1][:5] == "BEGIN":
			changes = nil
			continue
		case len(r[1]) < 6 || r[1][:6] != "COMMIT":
			changes = append(changes, r)
			continue
		}
		end, err := wal.ParseLSN(r[0])
		if err != nil {
			t.Fatal(err)
		}
		if end > at {
			out.after++
			continue
		}
		for _, c := range changes {
			if m := insertion.FindStringSubmatch(c[1]); m != nil {
				out.before[m[1]] = true
			}
			if m := update.FindStringSubmatch(c[1]); m != nil {
				out.hot[m[1]] = m[2] + " " + m[3]
			}
		}
	}
	return out
}

func compare(t *testing.T, p *pair, want content) {
	t.Helper()
	got := rows(t, p.b, "SELECT id FROM ins")
	for _, r := range got {
		if !want.before[r[0]] {
			t.Errorf("row %s is there and was committed after At", r[0])
		}
		delete(want.before, r[0])
	}
	for id := range want.before {
		t.Errorf("row %s was committed before At and is missing", id)
	}
	for _, r := range rows(t, p.b, "SELECT k, n, by FROM hot") {
		if w, ok := want.hot[r[0]]; ok && w != r[1]+" "+r[2] {
			t.Errorf("hot row %s is %s %s, at At it was %s", r[0], r[1], r[2], w)
		}
	}
}
