package server

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/durability"
	"github.com/duri-io/duri/internal/quorumtest"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/wal"
)

// threeKeepers are those of a, b and c, each with an open journal and copies of the others', without links: see hears.
func threeKeepers(t *testing.T) map[string]*keeper {
	t.Helper()
	reg, all := quorumtest.New(), map[string]*keeper{}
	for _, site := range []string{"a", "b", "c"} {
		cfg := &config.Config{
			Site: site, DataDir: t.TempDir(), Databases: []config.Database{{Name: "app"}},
			Durability: config.Durability{Level: config.Sync, Receipts: 1, Policy: config.DurabilityFirst, Detect: 2 * config.Second, Rearm: config.Second},
		}
		for i, name := range []string{"a", "b", "c"} {
			cfg.Sites = append(cfg.Sites, config.Site{ID: wal.SiteID(i + 1), Name: name, Address: fmt.Sprintf("127.0.0.1:%d", i+1)})
		}
		a := &Agent{cfg: cfg, self: cfg.Self(), log: slog.New(slog.DiscardHandler)}
		k := newKeeper(a, reg.Client())
		a.keeper = k
		n := &node{cfg: cfg, database: cfg.Databases[0], self: a.self, log: a.log, keeper: k, clock: &serverClock{}}
		a.nodes = []*node{n}
		for _, s := range cfg.Peers() {
			w, err := link.OpenCopy(link.CopyConfig{Dir: filepath.Join(cfg.DataDir, s.Name)})
			if err == nil {
				err = w.Welcome(headerOf(s))
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = w.Close() })
			p := &peer{n: n, site: s, log: a.log}
			p.live.Store(&incoming{copy: w})
			n.peers = append(n.peers, p)
		}
		j, err := journal.Create(filepath.Join(cfg.DataDir, site), headerOf(a.self), journal.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = j.Close() })
		n.ready.Store(&captured{journal: j, capture: &capture{n: n, j: j}})
		all[site] = k
		k.read(t.Context())
	}
	return all
}

func headerOf(s config.Site) journal.Header {
	return journal.Header{
		Cluster: "x", Site: s.ID, SiteName: s.Name, From: 0x100,
		Incarnation: journal.Incarnation{SystemID: uint64(s.ID), Timeline: 1, Database: "app", Slot: "duri_app", CreatedLSN: 0x100},
	}
}

func (k *keeper) peer(t *testing.T, site string) *peer {
	t.Helper()
	all := k.peersOf(site)
	if len(all) != 1 {
		t.Fatalf("no link to %s", site)
	}
	return all[0]
}

// reach lets a journal reach a position durably: the own one, or the copy of another site's.
func (k *keeper) reach(t *testing.T, site string, to wal.LSN) {
	t.Helper()
	j := k.a.nodes[0].ready.Load().journal
	if site != k.a.self.Name {
		var err error
		if j, err = k.peer(t, site).live.Load().copy.Journal(); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.AppendPosition(to, nil, 0); err != nil {
		t.Fatal(err)
	}
	if err := j.Sync(); err != nil {
		t.Fatal(err)
	}
}

// hears brings what another site says and acknowledges.
func (k *keeper) hears(t *testing.T, from *keeper) {
	t.Helper()
	from.a.nodes[0].said = time.Time{} // so that it speaks of positions alone, too
	from.view(time.Now())
	db := offered{k.a.nodes[0]}
	w := from.peer(t, k.a.self.Name).live.Load().copy
	ack := w.Ack()
	ack.Epoch = from.epoch()
	db.Acknowledged(from.a.self.Name, ack)
	if s := from.a.statement("app"); s != nil {
		db.Stated(from.a.self.Name, *s)
	}
}

// TestSettle goes the way of durability.md section 9: a is lost, and b has more of it than c.
func TestSettle(t *testing.T) {
	all := threeKeepers(t)
	b, c := all["b"], all["c"]
	b.reach(t, "b", 0x900)
	c.reach(t, "c", 0x700)
	b.reach(t, "a", 0x500)
	c.reach(t, "a", 0x300)
	c.reach(t, "b", 0x800)
	b.reach(t, "c", 0x700)
	agrees := func() bool {
		b.hears(t, c)
		v := b.view(time.Now())
		for i := range v.Peers {
			if v.Peers[i].Name == "a" {
				v.Peers[i].Refused = true
			}
		}
		return durability.Decide(v).Kind == durability.TakeOver
	}
	b.do(t, durability.Freeze, "a", "a is gone")
	if agrees() {
		t.Error("a is left out although c has not frozen it")
	}
	c.do(t, durability.Freeze, "a", "a is gone")
	if !agrees() {
		t.Error("a is not left out although c has frozen it")
	}
	b.do(t, durability.TakeOver, "a", "a is gone")
	if r := b.reg; r.Epoch != 2 || len(r.Members) != 2 || r.Settled || len(r.Cuts) > 0 {
		t.Fatalf("taken over: %+v", r)
	}
	exchanged := func() (both bool) {
		for range 2 { // what one says follows from what it has heard
			b.hears(t, c)
			c.hears(t, b)
			x, y := b.view(time.Now()).Exchanged, c.view(time.Now()).Exchanged
			both = x && y
		}
		return both
	}
	if exchanged() {
		t.Error("settled although c has not read the register")
	}
	c.read(t.Context())
	if exchanged() {
		t.Error("settled although c lacks some of a and of b")
	}
	c.reach(t, "b", 0x900)
	c.reach(t, "a", 0x400)
	if exchanged() {
		t.Error("settled although c lacks some of a")
	}
	b.reach(t, "a", 0x600) // what a itself, still alive, sends to one of them later does not count
	c.reach(t, "a", 0x500)
	if !exchanged() {
		t.Fatalf("not settled: %+v, %+v", b.a.statement("app"), c.a.statement("app"))
	}
	c.do(t, durability.Settle, "", "exchanged")
	if cut, ok := c.reg.Cut("app", "a"); !c.reg.Settled || c.reg.Epoch != 3 || !ok || cut != 0x500 {
		t.Errorf("settled: %+v", c.reg)
	}
}

// TestSiteThatIsNotOpenSaysNothing: c has not opened its journals yet, so that its copy of a's, which reaches furthest, is
// not known; it must not be taken for none.
func TestSiteThatIsNotOpenSaysNothing(t *testing.T) {
	all := threeKeepers(t)
	b, c := all["b"], all["c"]
	b.do(t, durability.Freeze, "a", "a is gone")
	b.do(t, durability.TakeOver, "a", "a is gone")
	again := newKeeper(c.a, c.store)
	ready := c.a.nodes[0].ready.Swap(nil)
	c.a.nodes[0].statement.Store(nil)
	c.a.nodes[0].keeper, c.a.keeper = again, again
	again.read(t.Context())
	again.view(time.Now())
	if s := c.a.statement("app"); s != nil {
		t.Errorf("it says %+v", s)
	}
	b.hears(t, again)
	if b.view(time.Now()).Exchanged {
		t.Error("settled without c's word")
	}
	c.a.nodes[0].ready.Store(ready)
	again.reach(t, "a", 0x500)
	b.hears(t, again)
	again.hears(t, b)
	b.hears(t, again)
	if b.view(time.Now()).Exchanged {
		t.Error("settled although b lacks what c has of a")
	}
	b.reach(t, "a", 0x500)
	if !b.view(time.Now()).Exchanged {
		t.Errorf("not settled: %+v", c.a.statement("app"))
	}
}

// TestReturnNeedsEveryMember: b and c are members and a comes back: both must wait for it, and it must have what each
// acknowledged before it did.
func TestReturnNeedsEveryMember(t *testing.T) {
	all := threeKeepers(t)
	a, b, c := all["a"], all["b"], all["c"]
	for _, k := range all {
		for _, site := range []string{"a", "b", "c"} {
			k.reach(t, site, 0x500)
		}
	}
	b.do(t, durability.Freeze, "a", "a is gone")
	b.do(t, durability.TakeOver, "a", "a is gone")
	c.read(t.Context())
	a.read(t.Context())
	for range 2 {
		b.hears(t, c)
		c.hears(t, b)
	}
	b.do(t, durability.Settle, "", "exchanged")
	c.read(t.Context())
	a.read(t.Context())
	c.reach(t, "c", 0x600)
	returns := func() bool {
		for range 2 { // what one says follows from what it has heard
			for _, k := range all {
				for _, from := range all {
					if k != from {
						k.hears(t, from)
					}
				}
			}
		}
		v := b.view(time.Now())
		for i := range v.Peers {
			v.Peers[i].CaughtUp, v.Peers[i].Silent = true, 0 // there are no heartbeats here
		}
		return durability.Decide(v).Kind == durability.Return
	}
	b.do(t, durability.Arm, "a", "a has caught up")
	if returns() {
		t.Error("it returns although c does not wait for it")
	}
	c.do(t, durability.Arm, "a", "a has caught up")
	if returns() {
		t.Error("it returns although it lacks what c had acknowledged")
	}
	a.reach(t, "c", 0x600)
	if !returns() {
		t.Errorf("it does not return: %+v", c.a.statement("app"))
	}
	b.do(t, durability.Return, "a", "a has caught up")
	c.read(t.Context())
	if len(b.reg.Members) != 3 || len(c.standing().Arming) > 0 {
		t.Errorf("returned: %+v, %+v", b.reg, c.standing())
	}
}

// TestReturnNeedsWhatOtherLostSitesHad: b is alone; a comes back, and c does not. What c had acknowledged counts at a too
// from then on.
func TestReturnNeedsWhatOtherLostSitesHad(t *testing.T) {
	all := threeKeepers(t)
	a, b := all["a"], all["b"]
	b.reach(t, "c", 0x500)
	for _, lost := range []string{"a", "c"} {
		b.do(t, durability.Freeze, lost, "it is gone")
		b.do(t, durability.TakeOver, lost, "it is gone")
		if lost == "a" { // c, still a member, has nothing of it
			all["c"].read(t.Context())
			for range 2 {
				b.hears(t, all["c"])
				all["c"].hears(t, b)
			}
			b.do(t, durability.Settle, "", "exchanged")
		}
	}
	if cut, ok := b.reg.Cut("app", "c"); len(b.reg.Members) != 1 || !ok || cut != 0x500 {
		t.Fatalf("alone: %+v", b.reg)
	}
	a.read(t.Context())
	holds := func() bool {
		b.hears(t, a)
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.holdsOthers(b.peer(t, "a"))
	}
	a.reach(t, "c", 0x400)
	if holds() {
		t.Error("a comes back although it lacks some of c")
	}
	a.reach(t, "c", 0x500)
	b.reach(t, "c", 0x600) // beyond the cut
	if !holds() {
		t.Error("a does not come back although it has what counts of c")
	}
}
