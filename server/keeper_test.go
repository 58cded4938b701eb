package server

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/durability"
	"github.com/duri-io/duri/internal/quorumtest"
	"github.com/duri-io/duri/quorum"
)

// testKeeper is that of a site without databases.
func testKeeper(t *testing.T, site string, store quorum.Store) *keeper {
	t.Helper()
	cfg := &config.Config{
		Site: site, DataDir: t.TempDir(), Sites: []config.Site{{ID: 1, Name: "a", Address: "127.0.0.1:1"}, {ID: 2, Name: "b", Address: "127.0.0.1:2"}},
		Databases:  []config.Database{{Name: "app"}},
		Durability: config.Durability{Level: config.Sync, Receipts: 1, Policy: config.DurabilityFirst, Detect: 2 * config.Second, Rearm: config.Second},
	}
	return newKeeper(&Agent{cfg: cfg, self: cfg.Self(), log: slog.New(slog.DiscardHandler)}, store)
}

func (k *keeper) promised(t *testing.T) bool {
	t.Helper()
	return k.marked()
}

// do acts on a decision of the present epoch.
func (k *keeper) do(t *testing.T, kind durability.Kind, site, why string) {
	t.Helper()
	k.act(t.Context(), durability.Action{Kind: kind, Sites: []string{site}, Why: why, Epoch: k.epoch()})
	k.tidy()
}

func TestFirstValueIsWrittenOnce(t *testing.T) {
	reg := quorumtest.New()
	a, b := testKeeper(t, "a", reg.Client()), testKeeper(t, "b", reg.Client())
	if a.epoch() != 0 || a.standing().Member {
		t.Error("something may be acknowledged before the register was read")
	}
	a.read(t.Context())
	b.read(t.Context())
	for _, k := range []*keeper{a, b} {
		if st := k.standing(); k.epoch() != 1 || !st.Member || st.Members != 2 || len(st.Others) != 1 {
			t.Errorf("site %s: epoch %d, %+v", k.a.self.Name, k.epoch(), st)
		}
	}
}

// TestTakeOver goes the way of durability.md section 5: freeze, swap; the frozen site's receipts do not count in between.
func TestTakeOver(t *testing.T) {
	reg := quorumtest.New()
	a, b := testKeeper(t, "a", reg.Client()), testKeeper(t, "b", reg.Client())
	a.read(t.Context())
	b.read(t.Context())
	a.do(t, durability.Freeze, "b", "b is silent")
	if st := a.standing(); len(st.Others) != 0 || st.Members != 2 || !a.promised(t) {
		t.Errorf("frozen: %+v, promised %t", st, a.promised(t))
	}
	a.do(t, durability.TakeOver, "b", "b is silent")
	if st := a.standing(); st.Epoch != 2 || st.Members != 1 || !st.Member || a.promised(t) {
		t.Errorf("taken over: %+v, promised %t", st, a.promised(t))
	}
	b.do(t, durability.Freeze, "a", "tested")
	b.do(t, durability.TakeOver, "a", "a is silent")
	if st := b.standing(); st.Epoch != 2 || st.Member || b.promised(t) {
		t.Errorf("the one that came second: %+v", st)
	}
	if s := b.status(); s.Mode != quorum.Solo || !strings.Contains(s.Guarantee, "b is left out") {
		t.Errorf("it says %q", s.Guarantee)
	}
	a.do(t, durability.Arm, "b", "tested")
	if st := a.standing(); len(st.Arming) != 1 || !a.promised(t) {
		t.Errorf("armed: %+v", st)
	}
	a.do(t, durability.Return, "b", "b has caught up")
	if st := a.standing(); st.Epoch != 3 || st.Members != 2 || len(st.Arming) != 0 || a.promised(t) {
		t.Errorf("returned: %+v", st)
	}
}

// TestPromiseOutlivesARestart: a proposal of the agent's former life may still arrive, which only a greater epoch rules out.
func TestPromiseOutlivesARestart(t *testing.T) {
	reg := quorumtest.New()
	a := testKeeper(t, "a", reg.Client())
	a.read(t.Context())
	a.do(t, durability.Freeze, "b", "tested")
	again := newKeeper(a.a, reg.Client())
	again.resume()
	client := reg.Client()
	again.store = client
	client.LoseAnswer()
	again.read(t.Context()) // the renewal has no answer yet
	if again.epoch() != 0 || again.standing().Member {
		t.Errorf("before the doubt is over: epoch %d, %+v", again.epoch(), again.standing())
	}
	again.read(t.Context())
	again.tidy()
	if again.epoch() < 2 || again.promised(t) || len(again.standing().Others) != 1 {
		t.Errorf("epoch %d, promised %t, %+v", again.epoch(), again.promised(t), again.standing())
	}
}

// TestUnknownAnswerKeepsTheFreeze: the swap was sent, and what became of it is not known.
func TestUnknownAnswerKeepsTheFreeze(t *testing.T) {
	reg := quorumtest.New()
	client := reg.Client()
	a := testKeeper(t, "a", client)
	a.read(t.Context())
	a.do(t, durability.Freeze, "b", "tested")
	client.LoseAnswer()
	a.do(t, durability.TakeOver, "b", "b is silent")
	if v := a.view(time.Now()); v.Known || len(v.Frozen) != 1 || !a.promised(t) {
		t.Errorf("in doubt: %+v", v)
	}
	a.act(t.Context(), durability.Decide(a.view(time.Now())))
	a.tidy()
	if st := a.standing(); st.Members != 1 || !st.Member || a.promised(t) {
		t.Errorf("after the register was read: %+v", st)
	}
}

// TestStaleDecisionIsNotCarriedOut: the register has moved on between the decision and the deed.
func TestStaleDecisionIsNotCarriedOut(t *testing.T) {
	reg := quorumtest.New()
	a, b := testKeeper(t, "a", reg.Client()), testKeeper(t, "b", reg.Client())
	a.read(t.Context())
	b.read(t.Context())
	stale := a.epoch()
	b.do(t, durability.Freeze, "a", "a is silent")
	b.do(t, durability.TakeOver, "a", "a is silent")
	a.read(t.Context())
	for _, kind := range []durability.Kind{durability.Freeze, durability.TakeOver, durability.Leave, durability.Arm} {
		a.act(t.Context(), durability.Action{Kind: kind, Sites: []string{"b"}, Epoch: stale})
		a.tidy()
	}
	if v := a.view(time.Now()); len(v.Frozen)+len(v.Arming) > 0 || a.promised(t) || a.epoch() != 2 {
		t.Errorf("%+v, promised %t", v, a.promised(t))
	}
}

// TestLostRegisterIsNotBegunAnew: all sites would be members of a first value, also those that lack what was acknowledged.
func TestLostRegisterIsNotBegunAnew(t *testing.T) {
	reg := quorumtest.New()
	a, b := testKeeper(t, "a", reg.Client()), testKeeper(t, "b", reg.Client())
	a.read(t.Context())
	b.read(t.Context())
	a.do(t, durability.Freeze, "b", "b is silent")
	a.do(t, durability.TakeOver, "b", "b is silent")
	empty := quorumtest.New()
	again := newKeeper(a.a, empty.Client())
	again.watched(quorum.Initial([]string{"a", "b"}, "b", time.Now())) // some other site has begun anew
	again.read(t.Context())
	if _, err := empty.Client().Get(t.Context()); !errors.Is(err, quorum.ErrAbsent) || again.epoch() != 0 || !strings.Contains(again.problem.Text, "seen epoch 2") || again.problem.Hint == "" {
		t.Errorf("%v, epoch %d, %+v", err, again.epoch(), again.problem)
	}
}

// askedWhile is a store that does something while its first answer is under way.
type askedWhile struct {
	quorum.Store
	do func()
}

func (s *askedWhile) Get(ctx context.Context) (quorum.Register, error) {
	r, err := s.Store.Get(ctx)
	if do := s.do; do != nil {
		s.do = nil
		do()
	}
	return r, err
}

// TestChangeDuringTheFirstReading: the watch delivers each value once, so what it tells before this site has read the register
// must not be forgotten; this site would be left out and not know, for ever.
func TestChangeDuringTheFirstReading(t *testing.T) {
	reg := quorumtest.New()
	a := testKeeper(t, "a", reg.Client())
	a.read(t.Context())
	store := &askedWhile{Store: reg.Client()}
	b := testKeeper(t, "b", store)
	store.do = func() {
		a.do(t, durability.Freeze, "b", "b refuses connections")
		a.do(t, durability.TakeOver, "b", "b refuses connections")
		b.watched(a.reg)
	}
	b.read(t.Context())
	if st := b.standing(); a.epoch() != 2 || st.Epoch != 2 || st.Member {
		t.Errorf("epoch %d there, here %+v", a.epoch(), st)
	}
}

func TestForceTellsFirst(t *testing.T) {
	reg := quorumtest.New()
	a := testKeeper(t, "a", reg.Client())
	a.read(t.Context())
	req := ForceRequest{Keep: []string{"a"}, By: "Kim", Reason: "b has burnt down"}
	r, err := a.force(t.Context(), req)
	if err != nil || r.Done || r.Register.Epoch != 1 {
		t.Errorf("told: %+v, %v", r, err)
	}
	for _, bad := range []ForceRequest{{Keep: []string{"c"}}, {Keep: []string{"b"}}, {Keep: []string{"a"}, AcceptLoss: true}} {
		if _, err := a.force(t.Context(), bad); err == nil || hintOf(err) == "" {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	req.AcceptLoss = true
	if r, err = a.force(t.Context(), req); err != nil || !r.Done || !r.Register.Forced || r.Register.By != "Kim" || a.standing().Members != 1 {
		t.Errorf("done: %+v, %v", r, err)
	}
}

func TestRearmWaitsLongerAfterEachLoss(t *testing.T) {
	now := time.Now()
	ago := func(d ...time.Duration) (at []time.Time) {
		for _, x := range d {
			at = append(at, now.Add(-x))
		}
		return at
	}
	for _, c := range []struct {
		losses []time.Time
		want   time.Duration
	}{
		{nil, 10 * time.Second},
		{ago(time.Minute), 10 * time.Second},
		{ago(2*time.Minute, time.Minute), 20 * time.Second},
		{ago(time.Hour, 2*time.Minute, time.Minute), 20 * time.Second},
		{ago(5, 4, 3, 2, 1, 1, 1, 1, 1, 1), 10 * time.Minute},
	} {
		if got := rearmAfter(10*time.Second, c.losses, now); got != c.want {
			t.Errorf("%d losses: %s, want %s", len(c.losses), got, c.want)
		}
	}
}

// TestMarkOfAPromise: whatever is found instead of the plain word that nothing is promised is a promise; and to write one
// needs no room on the disk.
func TestMarkOfAPromise(t *testing.T) {
	k := testKeeper(t, "a", quorumtest.New().Client())
	if k.marked() {
		t.Error("a promise before the first one")
	}
	inode := func() uint64 {
		st, err := os.Stat(k.marker())
		if err != nil || st.Size() != markBytes {
			t.Fatal(st, err)
		}
		return st.Sys().(*syscall.Stat_t).Ino
	}
	var first uint64
	for _, c := range []struct {
		what string
		want bool
	}{{noPromise, false}, {"frozen: b", true}, {strings.Repeat("leaving ", 200), true}, {noPromise, false}} {
		if err := k.mark(c.what); err != nil || k.marked() != c.want {
			t.Errorf("%.20q: marked %t, %v", c.what, k.marked(), err)
		}
		if first == 0 {
			first = inode()
		}
		if inode() != first {
			t.Errorf("%.20q: another file", c.what)
		}
	}
	for _, torn := range []string{"", "not", "nothingrozen: b"} {
		if err := os.WriteFile(k.marker(), []byte(torn), 0o600); err != nil || !k.marked() {
			t.Errorf("%q is no promise, %v", torn, err)
		}
	}
}
