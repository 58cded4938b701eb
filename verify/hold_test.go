package verify

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
)

func TestHeldRowsStandStillUntilReleased(t *testing.T) {
	s := mendable(t, "CREATE TABLE t (id int PRIMARY KEY, v int)")
	s.both(t, "INSERT INTO t SELECT i, 0 FROM generate_series(1, 5) AS i")
	tables, err := s.a.Tables(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	table := tables[0]
	conn := session(t, s, "a")
	update := func(id int) error {
		_, err := pg.Rows(t.Context(), conn, fmt.Sprintf("SET lock_timeout = '50ms'; UPDATE t SET v = v + 1 WHERE id = %d", id))
		return err
	}
	remote := NewRemote("a", func(ctx context.Context, b []byte) ([]byte, error) { return Serve(ctx, s.a, b) })
	for name, h := range map[string]Holder{"here": s.a, "through the agent": remote} {
		release, err := h.Hold(t.Context(), table, []Key{{"1"}, {"2"}, {"99"}})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := update(1); pg.SQLState(err) != "55P03" {
			t.Errorf("%s: a held row could be written: %v", name, err)
		}
		if err := update(3); err != nil {
			t.Errorf("%s: another row: %v", name, err)
		}
		release()
		release() // nothing is to be done
		until(t, "the row is free", func() error { return update(1) })
	}
	begun := time.Now()
	if _, err := s.a.Hold(t.Context(), table, []Key{{"1"}}); err != nil {
		t.Fatal(err)
	}
	until(t, "a row that nobody releases is free", func() error { return update(1) })
	if took := time.Since(begun); took < HoldMax-100*time.Millisecond {
		t.Errorf("it was free after %s", took)
	}
	if _, err := pg.Rows(t.Context(), conn, "BEGIN; UPDATE t SET v = 0 WHERE id = 1"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.a.Hold(t.Context(), table, []Key{{"1"}}); pg.SQLState(err) != "55P03" {
		t.Errorf("a client has the row: %v", err)
	}
	if _, err := s.a.Hold(t.Context(), table, []Key{{"1", "2"}}); err == nil {
		t.Error("a key of another form was taken")
	}
}

// TestRowsThatAreNeverAtRestAreDecided: a client writes a row at a all the time, and each write arrives at b; a column that it
// does not touch differs.
func TestRowsThatAreNeverAtRestAreDecided(t *testing.T) {
	s := mendable(t, "CREATE TABLE t (id int PRIMARY KEY, v int, w text)")
	s.both(t, "INSERT INTO t VALUES (1, 0, 'right'), (2, 0, 'right')")
	s.exec(t, "b", "UPDATE t SET w = 'stale' WHERE id = 1")
	a, b := session(t, s, "a"), session(t, s, "b")
	ctx, cancel := context.WithCancel(t.Context())
	var committed, arrived atomic.Int64
	ended := make(chan error, 1)
	link := time.NewTicker(2 * time.Millisecond) // brings one write at a time to the other site
	defer link.Stop()
	go func() {
		const update = "UPDATE t SET v = v + 1 WHERE id IN (1, 2)"
		for ctx.Err() == nil {
			_, err := pg.Rows(context.Background(), a, update)
			committed.Add(1)
			<-link.C
			_, berr := pg.Rows(context.Background(), b, update)
			arrived.Add(1)
			if err = errors.Join(err, berr); err != nil {
				ended <- err
				return
			}
		}
		ended <- nil
	}()
	settle := func(ctx context.Context) error {
		if _, err := sleep(ctx, 50*time.Millisecond, nil); err != nil { // several writes come meanwhile, unless the rows are held
			return err
		}
		for want := committed.Load(); arrived.Load() < want; {
			if _, err := sleep(ctx, time.Millisecond, nil); err != nil {
				return err
			}
		}
		return nil
	}
	var rep RepairReport
	until(t, "the rows are equal", func() error {
		rep = s.repair(t, s.b, RepairOptions{Apply: true, From: "a", Settle: settle})
		if len(rep.Rows) > 0 || rep.Unsettled > 0 {
			return fmt.Errorf("%d rows differed, %d are unsettled", len(rep.Rows), rep.Unsettled)
		}
		return nil
	})
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	for _, db := range []string{"a", "b"} {
		if got := pgtest.Query(t, s.c, db, "SELECT string_agg(w, ' ' ORDER BY id) FROM t")[0][0]; got != "right right" {
			t.Errorf("site %s: %s", db, got)
		}
	}
	if committed.Load() < 20 {
		t.Errorf("only %d writes meanwhile", committed.Load())
	}
}
