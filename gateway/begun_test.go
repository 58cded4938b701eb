package gateway

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

// A transaction that is begun together with its first statements, as many programs do to save round trips.

// beginAndWrite are ways to send BEGIN and a write at once. The client has the answer to both.
var beginAndWrite = map[string]func(ctx context.Context, c *pgconn.PgConn, insert string) error{
	"one Query": func(ctx context.Context, c *pgconn.PgConn, insert string) error {
		_, err := c.Exec(ctx, "BEGIN; "+insert).ReadAll()
		return err
	},
	"one Query, BEGIN last": func(ctx context.Context, c *pgconn.PgConn, insert string) error {
		_, err := c.Exec(ctx, insert+"; BEGIN").ReadAll()
		return err
	},
	"a pipeline with one Sync": func(ctx context.Context, c *pgconn.PgConn, insert string) error {
		p := c.StartPipeline(ctx)
		p.SendQueryParams("BEGIN", nil, nil, nil, nil)
		p.SendQueryParams(insert, nil, nil, nil, nil)
		err := p.Sync()
		for err == nil {
			var r any
			if r, err = p.GetResults(); err != nil {
				break
			}
			switch r := r.(type) {
			case *pgconn.ResultReader:
				_, err = r.Close()
			case *pgconn.PipelineSync:
				return p.Close()
			}
		}
		return errors.Join(err, p.Close())
	},
}

func openRaw(t *testing.T, addr string) *pgconn.PgConn {
	t.Helper()
	c, err := pgconn.Connect(t.Context(), dsn(addr, ""))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(context.Background()) }) // the test may have ended it
	return c
}

// TestWhatWasBegunWithAWriteIsNotRunAgain: the client has seen what the write returned, which may be something else the next time.
func TestWhatWasBegunWithAWriteIsNotRunAgain(t *testing.T) {
	k, relay, addr := cuttable(t)
	for name, begin := range beginAndWrite {
		c := openRaw(t, addr)
		if err := begin(t.Context(), c, "INSERT INTO ledger VALUES (1, 1) RETURNING seq"); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		relay.cut()
		_, err := c.Exec(t.Context(), "SELECT 1").ReadAll()
		wantCode(t, name+": the statement behind it", err, "40001", "site a")
		if _, err := c.Exec(t.Context(), "ROLLBACK").ReadAll(); err != nil {
			t.Errorf("%s: ROLLBACK: %v", name, err)
		}
		if n := count(t, k.c, "true"); n != "0" {
			t.Errorf("%s: %s rows are left", name, n)
		}
	}
}

// TestCommitOfWhatWasBegunWithAWriteIsAskedAfter: when the answer to its COMMIT is lost, somebody is asked, and what they say is
// what the client is told.
func TestCommitOfWhatWasBegunWithAWriteIsAskedAfter(t *testing.T) {
	k, relay, addr := cuttable(t)
	say := Aborted
	k.say = &say
	row := 0
	for name, begin := range beginAndWrite {
		before, lost := len(k.doubts()), 0
		for n := range 30 {
			row++
			c := openRaw(t, addr)
			if err := begin(t.Context(), c, fmt.Sprintf("INSERT INTO ledger VALUES (1, %d) RETURNING seq", row)); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			relay.after(int64(n) * 4)
			_, err := c.Exec(t.Context(), "COMMIT").ReadAll()
			uncut := relay.unspent()
			relay.after(-1)
			if err == nil && uncut {
				break
			}
			lost++
			wantCode(t, fmt.Sprintf("%s: COMMIT whose answer is lost after %d bytes", name, 4*n), err, "40001", "site a")
			_ = c.Close(t.Context()) // nothing more is asked of it
		}
		if asked := len(k.doubts()) - before; asked == 0 || lost == 0 {
			t.Errorf("%s: %d answers were lost, and %d were asked after", name, lost, asked)
		}
	}
}

// unspent reports that what passed was not enough for a cut.
func (r *cutter) unspent() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.left >= 0
}
