package server

import (
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/durability"
	"github.com/duri-io/duri/internal/quorumtest"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/verify"
	"github.com/duri-io/duri/wal"
)

// full is a peer whose backlog is to be freed.
var full = detaching{policy: config.FullDetach, sites: 2, used: 95, own: 60, budget: 100, away: true}

func TestABacklogIsFreedOnlyWhenNobodyNeedsIt(t *testing.T) {
	with := func(change func(*detaching)) detaching {
		d := full
		change(&d)
		return d
	}
	for _, c := range []struct {
		name string
		d    detaching
		yes  bool
		told bool // why not
	}{
		{"away, and 95 %", full, true, false},
		{"94 %", with(func(d *detaching) { d.used = 94 }), false, false},
		{"the copy is what is large", with(func(d *detaching) { d.own = 40 }), false, false},
		{"stop-writes", with(func(d *detaching) { d.policy = config.FullStopWrites }), false, true},
		{"three sites", with(func(d *detaching) { d.sites = 3 }), false, true},
		{"it is there", with(func(d *detaching) { d.away = false }), false, true},
		{"a member", with(func(d *detaching) { d.member = "b is a member" }), false, true},
		{"this site lacks something itself", with(func(d *detaching) { d.lacks = true }), false, true},
		{"detached, 64 %", with(func(d *detaching) { d.open, d.used = true, 64 }), false, false},
		{"detached, 65 %", with(func(d *detaching) { d.open, d.used = true, 65 }), true, false},
		{"detached, and it is there", with(func(d *detaching) { d.open, d.away = true, false }), true, false},
		{"it follows behind the gap", with(func(d *detaching) { d.open, d.attached, d.away = true, true, false }), false, true},
		{"it follows, and has that", with(func(d *detaching) { d.open, d.attached, d.has, d.away = true, true, true, false }), true, false},
		{"it followed, and is away again", with(func(d *detaching) { d.open, d.attached = true, true }), true, false},
		{"the past takes half of the budget", with(func(d *detaching) { d.open, d.past = true, 50 }), false, false},
	} {
		if yes, why := detach(c.d); yes != c.yes || (why != "") != c.told {
			t.Errorf("%s: %t, %q", c.name, yes, why)
		}
	}
}

// TestAGapBeginsOnlyWhenNothingForbidsIt whatever the figures are.
func TestAGapBeginsOnlyWhenNothingForbidsIt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := detaching{
			policy: rapid.SampledFrom([]config.Full{config.FullDetach, config.FullStopWrites}).Draw(t, "policy"), sites: rapid.IntRange(2, 4).Draw(t, "sites"),
			used: rapid.Int64Range(0, 300).Draw(t, "used"), own: rapid.Int64Range(0, 300).Draw(t, "own"), budget: 100, past: rapid.Int64Range(0, 100).Draw(t, "past"),
			away: rapid.Bool().Draw(t, "away"), lacks: rapid.Bool().Draw(t, "lacks"), member: rapid.SampledFrom([]string{"", "a member"}).Draw(t, "member"),
		}
		yes, why := detach(d)
		if yes && (d.policy != config.FullDetach || d.sites != 2 || !d.away || d.lacks || d.member != "" || d.used < 95 || d.past >= 50) {
			t.Fatalf("a gap would begin with %+v", d)
		}
		if yes && why != "" {
			t.Fatalf("yes, and why not: %s", why)
		}
	})
}

// withPeer gives a keeper a database without PostgreSQL, and its peer.
func withPeer(k *keeper) *peer {
	n := &node{cfg: k.a.cfg, self: k.a.self, database: k.a.cfg.Databases[0], keeper: k, log: k.log}
	p := &peer{n: n, site: k.a.cfg.Peers()[0], log: k.log}
	n.peers = []*peer{p}
	k.a.nodes = append(k.a.nodes, n)
	return p
}

func TestOnlyASiteThatIsNoMemberIsReleasedAndThenNotArmed(t *testing.T) {
	reg := quorumtest.New()
	k := testKeeper(t, "a", reg.Client())
	p := withPeer(k)
	if k.release(p) == "" {
		t.Error("released before the register is known")
	}
	k.read(t.Context())
	if k.release(p) == "" {
		t.Error("a member was released")
	}
	k.do(t, durability.Freeze, "b", "tested")
	if k.release(p) == "" {
		t.Error("released before the register was changed")
	}
	k.do(t, durability.TakeOver, "b", "tested")
	k.mu.Lock()
	k.arming["b"] = nil
	k.mu.Unlock()
	if k.release(p) == "" {
		t.Error("released while it is about to be a member")
	}
	k.do(t, durability.Disarm, "b", "tested")
	p.missing.Store(&catalog.Gap{ID: 1})
	if k.release(p) == "" {
		t.Error("released although this site itself lacks something")
	}
	p.missing.Store(nil)
	if why := k.release(p); why != "" || p.lacking.Load() == nil {
		t.Fatalf("not released: %s", why)
	}
	if p.claimMissing() {
		t.Error("both lack something of the other")
	}
	if k.peerView("b", now().Std()).CaughtUp {
		t.Error("it counts as caught up")
	}
	k.a.nodes[0].ready.Store(&captured{})
	k.arm([]string{"b"}, k.epoch())
	if st := k.standing(); len(st.Arming) != 0 {
		t.Errorf("it is armed: %+v", st)
	}
	p.unrelease()
	if p.lacking.Load() != nil {
		t.Error("a gap that was not declared stays")
	}
	p.lacking.Store(&catalog.Gap{ID: 3})
	if p.unrelease(); p.lacking.Load() == nil {
		t.Error("a gap that was declared went")
	}
}

// ownJournal makes a journal of n transactions, one a file or so.
func ownJournal(t *testing.T, dir string, n int) *journal.Journal {
	t.Helper()
	j, err := journal.Create(dir, journal.Header{
		Cluster: "c", Site: 1, SiteName: "a", From: 100, Incarnation: journal.Incarnation{SystemID: 7, Timeline: 1, Database: "app", Slot: "duri_app", CreatedLSN: 100},
	}, journal.Options{SegmentBytes: 4 << 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	rel := (&wal.Relation{Namespace: "public", Name: "t", Columns: []wal.Column{{Name: "v", TypeOID: 25}}}).Seal()
	for i := range n {
		err := j.AppendTxn(&wal.Txn{
			Origin: 1, XID: uint32(i + 1), CommitLSN: wal.LSN(200 + 10*i), EndLSN: wal.LSN(205 + 10*i), CommitTime: wal.Time(1000 + i), VersionTime: wal.Time(1000 + i),
			Changes: []wal.Change{{Op: wal.Insert, Relation: rel, New: wal.Tuple{{Kind: wal.Text, Data: make([]byte, 900)}}}},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Sync(); err != nil {
		t.Fatal(err)
	}
	return j
}

// TestThePastKeepsWhatTheHistoryNeedsOverARestart: the journal lets go of file after file; the history that is rebuilt is the
// same, and without the past it is known that something is not known.
func TestThePastKeepsWhatTheHistoryNeedsOverARestart(t *testing.T) {
	k := testKeeper(t, "a", nil)
	k.a.cfg.Journal.Segment = config.MiB
	p := withPeer(k)
	n := p.n
	n.log, n.clock = slog.New(slog.DiscardHandler), &serverClock{}
	p.lacking.Store(&catalog.Gap{ID: 1})
	keys := apply.NewKeys("", "")
	j := ownJournal(t, n.dir("a"), 40)
	c := &captured{journal: j, local: apply.NewHistory(1, 100, keys)}
	if err := rebuild(t.Context(), j, c.local, 100); err != nil {
		t.Fatal(err)
	}
	whole := c.local.Stats()
	for range 5 {
		_, to, ok := j.Oldest()
		if !ok {
			t.Fatal("there is one file left")
		}
		for range 2 { // as after a crash in between
			if err := n.remember(t.Context(), c, to); err != nil {
				t.Fatal(err)
			}
		}
		if err := j.Prune(to); err != nil {
			t.Fatal(err)
		}
	}
	if c.past.End() != j.Start() || c.past.State().DiskBytes > j.State().DiskBytes+2<<20 {
		t.Errorf("the past ends at %s, the journal begins at %s", c.past.End(), j.Start())
	}
	if err := c.past.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := n.openPast()
	if err != nil || again == nil {
		t.Fatal(again, err)
	}
	h := apply.NewHistory(1, 100, keys)
	if err := n.recall(t.Context(), again, j, h, 100); err != nil || n.forgotten != nil {
		t.Fatal(err, n.forgotten)
	}
	if d := cmp.Diff(whole, h.Stats()); d != "" {
		t.Errorf("rebuilt: %s", d)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if err := n.recall(t.Context(), nil, j, apply.NewHistory(1, 100, keys), 100); err != nil || n.forgotten == nil || hintOf(n.forgotten) == "" {
		t.Errorf("without the past: %v, %v", err, n.forgotten)
	}
	n.forgotten = nil
	p.lacking.Store(nil)
	if past, err := n.openPast(); past != nil || err != nil {
		t.Errorf("the gap is closed, and the past is there: %v", err)
	}
	if left, err := filepath.Glob(n.pastDir()); len(left) > 0 || err != nil {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestWhatIsMissingHasNotBeenSeen: while a gap is open, this site's transactions say they have seen the origin up to it; those
// that are committed after the repair say what they have.
func TestWhatIsMissingHasNotBeenSeen(t *testing.T) {
	p := &peer{site: config.Site{ID: 1, Name: "a"}}
	n := &node{self: config.Site{ID: 2, Name: "b"}, peers: []*peer{p}}
	c := &capture{n: n, local: apply.NewHistory(2, 0, apply.NewKeys("", ""))}
	seen := func(at wal.LSN) wal.LSN {
		if err := c.advance(at); err != nil {
			t.Fatal(err)
		}
		return wal.SeenOf(c.seen, 1)
	}
	c.see(1, 50)
	p.missing.Store(&catalog.Gap{ID: 1, From: 100, To: 200})
	c.bindOpen()
	c.see(1, 90)
	c.see(1, 210)
	c.see(3, 210)
	if got := seen(10); got != 100 || wal.SeenOf(c.seen, 3) != 210 {
		t.Errorf("seen %s", got)
	}
	c.freeSeen(1, 500, 230)
	c.see(1, 220)
	if got := seen(500); got != 100 {
		t.Errorf("before the repair was committed: %s", got)
	}
	if got := seen(501); got != 230 {
		t.Errorf("after it: %s", got)
	}
	if c.see(1, 240); wal.SeenOf(c.seen, 1) != 240 {
		t.Errorf("later: %s", wal.SeenOf(c.seen, 1))
	}
	// After a restart in between.
	p.missing.Store(nil)
	p.mended.Store(&catalog.Gap{ID: 1, From: 100, To: 200, Repaired: true, Seen: 230, Resume: 500})
	c.seen = []wal.Seen{{Site: 1, LSN: 100}}
	c.bindOpen()
	c.see(1, 240)
	if before, after := seen(499), seen(502); before != 100 || after != 230 {
		t.Errorf("after a restart: %s, then %s", before, after)
	}
	c.bindOpen() // nothing more is to be done
	if c.bound.Load() != nil {
		t.Error("it is bound for ever")
	}
}

func TestOnlyRowsThatNothingElseMovesAreRemovedFirst(t *testing.T) {
	row := func(key, reason string) verify.RepairedRow {
		return verify.RepairedRow{Schema: "public", Table: "t", Key: []string{key}, State: verify.RepairLeft, Right: "a", Reason: reason}
	}
	stuck := verify.RepairReport{Left: 2, Rows: []verify.RepairedRow{row("1", "duplicate key value"), row("2", "the row has changed since it was compared")}}
	one := refusedBy(stuck, nil)
	two := refusedBy(stuck, one)
	if d := cmp.Diff(map[string]int{rowText("public", "t", []string{"1"}): 2}, two); d != "" {
		t.Error(d)
	}
	stuck.Done = 1
	if again := refusedBy(stuck, two); len(again) != 0 {
		t.Errorf("others could be mended, which may make room: %v", again)
	}
}
