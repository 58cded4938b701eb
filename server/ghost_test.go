package server

import (
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/durability"
	"github.com/duri-io/duri/internal/quorumtest"
	"github.com/duri-io/duri/wal"
)

// TestWhichTailsAreGhosts: a transaction of a site that was left out does not count only if nobody can have been told of it.
func TestWhichTailsAreGhosts(t *testing.T) {
	for _, c := range []struct {
		name  string
		level wal.Level
		tail  config.Tail
		lost  func(t *testing.T, b *keeper)
		ghost bool
	}{
		{"left out by the rules", wal.CommitOn, config.Reverse, takenOver, true},
		{"visible at the other site first", wal.CommitRemoteApply, config.Reverse, takenOver, true},
		{"it waited for its own disk only", wal.CommitLocal, config.Reverse, takenOver, false},
		{"of a level that is not known", 0, config.Reverse, takenOver, false},
		{"the configuration merges it", wal.CommitOn, config.Merge, takenOver, false},
		{"its site is a member", wal.CommitOn, config.Reverse, func(*testing.T, *keeper) {}, false},
		{"left out by a person: it may have acknowledged alone", wal.CommitOn, config.Reverse, func(t *testing.T, b *keeper) {
			a := testKeeper(t, "a", b.store)
			a.a.nodes = ofOneDatabase(a)
			a.read(t.Context())
			a.do(t, durability.Freeze, "b", "b is silent")
			a.do(t, durability.TakeOver, "b", "b is silent") // and acknowledges alone
			if _, err := b.force(t.Context(), ForceRequest{Keep: []string{"b"}, By: "Kim", Reason: "a has burnt", AcceptLoss: true}); err != nil {
				t.Fatal(err)
			}
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := testKeeper(t, "b", quorumtest.New().Client())
			b.a.cfg.Durability.ReturningTail = c.tail
			b.a.nodes = ofOneDatabase(b)
			b.read(t.Context())
			c.lost(t, b)
			b.read(t.Context())
			p := b.a.nodes[0].peers[0]
			txn := &wal.Txn{CommitLSN: 0x2000, EndLSN: 0x2100, Mark: wal.Mark{LTXID: "0123456789abcdef", Level: c.level}}
			ghost, err := p.unacknowledged(t.Context(), txn)
			if err != nil || ghost != c.ghost || (len(p.ghosts) == 1) != c.ghost {
				t.Errorf("ghost %t, noted %d, %v", ghost, len(p.ghosts), err)
			}
		})
	}
}

func takenOver(t *testing.T, b *keeper) {
	b.do(t, durability.Freeze, "a", "a is silent")
	b.do(t, durability.TakeOver, "a", "a is silent")
}

// ofOneDatabase is a keeper's node with a link to the other site, over which nothing has come.
func ofOneDatabase(k *keeper) []*node {
	n := &node{
		cfg: k.a.cfg, self: k.a.self, database: k.a.cfg.Databases[0], keeper: k, log: slog.New(slog.DiscardHandler),
		sql: &session{dsn: "host=127.0.0.1 port=1", database: "app"},
	}
	for _, s := range k.a.cfg.Peers() {
		n.peers = append(n.peers, &peer{n: n, site: s, log: n.log, ghosts: map[wal.LSN]wal.LSN{}, upSince: time.Now()})
	}
	return []*node{n}
}

// TestGhostsAreNotGivenBack: what was reversed in a database that is set back must not come back from the journal.
func TestGhostsAreNotGivenBack(t *testing.T) {
	n := ofOneDatabase(testKeeper(t, "a", quorumtest.New().Client()))[0]
	if err := n.noGhosts(0); err != nil {
		t.Errorf("there never was one: %v", err)
	}
	if err := os.MkdirAll(n.dir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeDurably(n.ghostFile(), []byte(wal.LSN(0x2000).String())); err != nil {
		t.Fatal(err)
	}
	if err := n.noGhosts(0x2000); err != nil {
		t.Errorf("the database has been beyond it: %v", err)
	}
	if err := n.noGhosts(0x1fff); err == nil || hintOf(err) == "" {
		t.Errorf("it would be given back: %v", err)
	}
	if err := os.WriteFile(n.ghostFile(), []byte("torn"), 0o600); err != nil || n.noGhosts(0) == nil {
		t.Errorf("what cannot be read counts as nothing, %v", err)
	}
}
