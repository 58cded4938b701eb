package server

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/wal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestOverTheBudgetSomebodyPausesAndSomebodyGoesOn(t *testing.T) {
	for _, c := range []struct {
		sizes  []int64
		over   bool
		paused []bool
	}{
		{[]int64{40, 60}, false, []bool{false, false}},
		{[]int64{90, 11}, true, []bool{true, false}},
		{[]int64{11, 90}, true, []bool{false, true}},
		{[]int64{51, 51}, true, []bool{true, true}},
		{[]int64{50, 51}, true, []bool{false, true}},
		{[]int64{101, 0}, true, []bool{true, false}},
		{[]int64{34, 34, 33}, true, []bool{true, true, false}},
	} {
		over, paused := overBudget(c.sizes, 100)
		if d := cmp.Diff(c.paused, paused); d != "" || over != c.over {
			t.Errorf("%v of 100: over %v, %s", c.sizes, over, d)
		}
	}
}

func TestShareOfABudgetHoldsTheLastSegments(t *testing.T) {
	if got := share(8<<30, 64<<20, 2); got != 4<<30 {
		t.Errorf("two databases share 8 GiB: %d each", got)
	}
	if got := share(256<<20, 64<<20, 100); got != 256<<20 {
		t.Errorf("a hundred databases get %d each, want four segments", got)
	}
}

func TestAShutGateEndsItsUserWithTheReason(t *testing.T) {
	var g gate
	ctx, leave, err := g.enter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	g.set(errBudget)
	if <-ctx.Done(); !errors.Is(context.Cause(ctx), errBudget) {
		t.Errorf("cause %v", context.Cause(ctx))
	}
	leave()
	if _, _, err := g.enter(t.Context()); !errors.Is(err, errBudget) {
		t.Errorf("a shut gate: %v", err)
	}
	g.set(nil)
	if ctx, leave, err = g.enter(t.Context()); err != nil {
		t.Fatal(err)
	}
	leave()
	if !errors.Is(context.Cause(ctx), context.Canceled) {
		t.Errorf("after leaving: %v", context.Cause(ctx))
	}
}

func TestSlotNamesOfDatabasesDiffer(t *testing.T) {
	long := "a_very_long_database_name_that_fills_all_of_the_63_bytes_of_it_"
	seen := map[string]string{}
	for _, db := range []string{"app", "my_app", "my-app", "my_2dapp", "MyApp", "myapp", "my app", `my"app`, "é", "è", "__", "_", long[:62] + "1", long[:62] + "2"} {
		slot := Slot(db)
		if other, ok := seen[slot]; ok {
			t.Errorf("databases %q and %q share slot %s", db, other, slot)
		}
		seen[slot] = db
		if len(slot+"_enrol") > 63 {
			t.Errorf("database %q: slot name %s is too long", db, slot)
		}
		for _, c := range slot {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' {
				t.Errorf("database %q: slot name %s has %q", db, slot, c)
			}
		}
	}
	if Slot("my_app") != "duri_my_app" {
		t.Errorf("an ordinary name: %s", Slot("my_app"))
	}
}

// TestDecodingWaitsForTheLookAtTheBudget: only when the own journal is beyond it, and not for ever.
func TestDecodingWaitsForTheLookAtTheBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := &config.Config{Databases: []config.Database{{Name: "app"}}, Journal: config.Journal{Budget: 1 << 20, Segment: 64 << 10}}
		j, err := journal.Create(t.TempDir(), headerOf(config.Site{ID: 1, Name: "a"}), journal.Options{SegmentBytes: 64 << 10})
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		n := &node{cfg: cfg}
		c := &capture{n: n, j: j, dirty: make(chan struct{}, 1)}
		took := func() time.Duration {
			begun := time.Now()
			if err := c.awaitLook(); err != nil {
				t.Fatal(err)
			}
			return time.Since(begun)
		}
		if d := took(); d != 0 {
			t.Errorf("within the budget it waited %v", d)
		}
		for at := wal.LSN(0x200); j.DiskBytes() <= n.share(); at += 0x100 {
			if err := j.AppendPosition(at, nil, 0); err != nil {
				t.Fatal(err)
			}
		}
		time.AfterFunc(100*time.Millisecond, n.looked.tell)
		if d := took(); d != 100*time.Millisecond {
			t.Errorf("the look came after 100ms, it waited %v", d)
		}
		if d := took(); d != lookMax {
			t.Errorf("without a look it waited %v", d)
		}
	})
}
