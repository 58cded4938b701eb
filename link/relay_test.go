package link

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/wal"
)

// TestCopyOfACopyIsTheJournal: seoul, which has more of daejeon's journal than busan, hands it on: the same records, no
// receipt for seoul's own journal, no sign of life of daejeon.
func TestCopyOfACopyIsTheJournal(t *testing.T) {
	w := newWorld(t, nil)
	h := header()
	h.Site, h.SiteName, h.SystemID = 3, "daejeon", 9
	theirs := newJournal(t, h, journal.Options{SegmentBytes: 100 << 10})
	past := newHistory(theirs, 4)
	past.fill(t, 200)
	cp := openCopy(t, t.TempDir())
	if err := cp.Welcome(h); err != nil {
		t.Fatal(err)
	}
	for _, f := range allFrames(t, theirs, 1<<20) {
		if err := cp.Frames(f.Data, f.From, f.To); err != nil {
			t.Fatal(err)
		}
	}
	past.fill(t, 300) // what busan has not heard of
	w.db.mu.Lock()
	w.db.copies = map[string]*journal.Journal{"daejeon": theirs}
	w.db.mu.Unlock()

	client := w.client(nil)
	take := func(origin string, site wal.SiteID) error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		return client.FollowCopy(ctx, database, origin, cp.Relayed(site, theirs.End()))
	}
	if err := take("jeju", 3); !errors.Is(err, ErrNotReady) {
		t.Errorf("of a site without a copy: %v", err)
	}
	if err := take("", 3); !errors.Is(err, ErrIncarnation) || errors.Is(err, ErrHeld) || cp.Err() != nil {
		t.Errorf("another journal than was asked for, as an older peer would send: %v, held %v", err, cp.Err())
	}
	if err := take("daejeon", 3); !errors.Is(err, ErrCaughtUp) {
		t.Fatalf("the copy: %v", err)
	}
	expectEqual(t, theirs, cp)
	if _, at := cp.Heard(); !at.IsZero() {
		t.Error("seoul's heartbeats count as daejeon's")
	}
	if a := w.db.last("busan"); a != (Ack{}) {
		t.Errorf("a receipt for daejeon's journal counts as one for seoul's: %+v", a)
	}
	if err := cp.Welcome(h); err != nil {
		t.Errorf("daejeon itself is refused afterwards: %v", err)
	}
}

func TestStatementsArriveWhenTheyChange(t *testing.T) {
	w := newWorld(t, nil)
	newHistory(w.db.j, 5).fill(t, 10)
	var says atomic.Pointer[Statement]
	client := w.client(func(c *ClientConfig) {
		c.Heartbeat = time.Hour // so that nothing goes by itself
		c.Statement = func(db string) *Statement {
			if db != database {
				t.Errorf("asked for database %s", db)
			}
			return says.Load()
		}
	})
	cp := openCopy(t, t.TempDir())
	follow(t, client, cp)
	end := w.db.j.End()
	waitFor(t, "the first acknowledgement", func() bool { return w.db.last("busan").Durable == end })
	for _, s := range []Statement{
		{Epoch: 2, Frozen: []string{"daejeon"}, Copies: map[string]wal.LSN{"daejeon": 7}},
		{Epoch: 3, Armed: []string{"daejeon", "jeju"}, Secured: true, Copies: map[string]wal.LSN{}},
	} {
		says.Store(&s)
		cp.Nudge()
		waitFor(t, "the statement", func() bool {
			w.db.mu.Lock()
			defer w.db.mu.Unlock()
			return cmp.Equal(s, w.db.stated["busan"])
		})
	}
}
