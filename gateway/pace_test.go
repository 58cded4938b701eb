package gateway

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/pgwire"
)

// slowly delays each transaction that writes.
type slowly struct {
	by atomic.Int64
	at atomic.Pointer[string] // of the latest that asked
}

func (s *slowly) Delay(_ *Login, _ Wish, at string) time.Duration {
	s.at.Store(&at)
	return time.Duration(s.by.Load())
}

func (s *slowly) Backlog(string, string) int64 { return 7 << 20 }

// TestWritersAreDelayedOnce: before their first statement that writes, and nobody else is.
func TestWritersAreDelayedOnce(t *testing.T) {
	c := markable(t)
	pace := &slowly{}
	g, addr := serve(t, Config{Mode: TransactionMode, Sites: &knowing{c: c}, Pace: pace, PoolMax: 1}, c)
	const by = 30 * time.Millisecond
	pace.by.Store(int64(by))
	slowed := uint64(0)
	delayed := func(what string, n uint64, at string) {
		t.Helper()
		asked := pace.at.Load()
		r := g.Report() // which asks as well
		if r.Slowed != slowed+n {
			t.Errorf("%s: delayed %d times, want %d", what, r.Slowed-slowed, n)
		}
		if n > 0 && *asked != at {
			t.Errorf("%s: asked for %q, want %q", what, *asked, at)
		}
		slowed = r.Slowed
	}
	for i, mode := range []string{"", "default_query_exec_mode=simple_protocol", "default_query_exec_mode=exec"} {
		conn := open1(t, dsn(addr, mode))
		exec1(t, conn, "SELECT 1")
		exec1(t, conn, "SELECT count(*) FROM ledger")
		exec1(t, conn, "SET application_name = 'x'")
		if slowed == 0 { // what is not known yet counts as a write
			slowed = g.Report().Slowed
		}
		delayed(mode+": reads and settings", 0, "")
		begun := time.Now()
		exec1(t, conn, "INSERT INTO ledger VALUES ($1, 1)", i)
		if took := time.Since(begun); took < by {
			t.Errorf("%s: a write took %v", mode, took)
		}
		at := "" // before it has a connection
		if mode != "default_query_exec_mode=simple_protocol" {
			at = "a" // its Parse has come before
		}
		if mode == "" {
			at = "" // which was an exchange of its own
		}
		delayed(mode+": a write", 1, at)
		err := pgx.BeginFunc(t.Context(), conn, func(tx pgx.Tx) error {
			for range 2 {
				if _, err := tx.Exec(t.Context(), "SELECT count(*) FROM ledger"); err != nil {
					return err
				}
			}
			delayed(mode+": reads in a block", 0, "")
			for seq := range 3 {
				if _, err := tx.Exec(t.Context(), "INSERT INTO ledger VALUES ($1, $2)", i, 10+seq); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		delayed(mode+": a block that writes", 1, "a")
	}
	// Who is delayed has no connection, of which there is one only, and is seen to wait.
	one, other := open1(t, dsn(addr, "default_query_exec_mode=simple_protocol")), open1(t, dsn(addr, "default_query_exec_mode=simple_protocol"))
	pace.by.Store(int64(time.Minute))
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, err := one.Exec(ctx, "INSERT INTO ledger VALUES (99, 1)")
		done <- err
	}()
	until(t, "it waits", func() bool { return waiting(g) == 1 })
	exec1(t, other, "SELECT count(*) FROM ledger")
	if r := g.Report(); r.Routes[0].DelayS != 60 || r.Routes[0].BacklogBytes != 7<<20 {
		t.Errorf("%+v", r.Routes)
	}
	cancel()
	if err := <-done; err == nil {
		t.Error("it was not delayed")
	}
	if n := count(t, c, "client = 99"); n != "0" {
		t.Error("what was delayed was written already")
	}
	g.killAll("shop") // nor does it hold up the end
}

// TestEachTransactionIsDelayedOnce: whatever a pipeline is made of, the first writing statement of each transaction is delayed.
func TestEachTransactionIsDelayedOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := &flight{status: pgwire.Idle}
		block, wrote := false, false // as the server will see it
		var statuses []byte          // that it answers
		for range rapid.IntRange(1, 12).Draw(t, "segments") {
			does := rapid.SampledFrom([]deed{reads, writes, begins, commits, rollsBack}).Draw(t, "does")
			f.record(pgwire.Query, []byte("x"), false)
			x := text{does: does, statements: 1, wrote: does == writes}
			if does == writes {
				first := !block || !wrote
				if got := f.firstWrite(); got != first {
					t.Fatalf("%+v: %t, want %t", f, got, first)
				}
				wrote = block
			}
			f.note(x)
			f.open().sent, f.open().closed = true, true
			switch does {
			case begins:
				if !block {
					block, wrote = true, false
				}
			case commits, rollsBack:
				block, wrote = false, false
			}
			status := byte(pgwire.Idle)
			if block {
				status = pgwire.InBlock
			}
			statuses = append(statuses, status)
			for n := rapid.IntRange(0, len(statuses)).Draw(t, "answered"); n > 0; n-- {
				f.ready(statuses[0], 0)
				statuses = statuses[1:]
			}
		}
	})
}
