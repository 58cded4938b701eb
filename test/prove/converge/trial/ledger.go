package trial

import (
	"sync"

	"github.com/duri-io/duri/wal"
)

// effect is one row change as the client that made it saw it.
type effect struct {
	table int
	op    wal.Op
	// upsert: it may have been an update instead of the insert that op says.
	upsert bool
	key    string // of the row; for a key change, the new one
	old    string // the key before
	image  string // the whole row after; empty when it is gone
}

// fate is what a client knows of its transaction.
type fate byte

const (
	doubtful fate = iota // the connection broke during COMMIT
	committed
	aborted
)

// entry is a transaction that a client sent COMMIT for.
type entry struct {
	effects []effect
	fate    fate
}

// ledger is what one site's clients know of their transactions. Safe for concurrent use.
type ledger struct {
	mu   sync.Mutex
	txns map[uint32]*entry // by xid
}

func newLedger() *ledger { return &ledger{txns: map[uint32]*entry{}} }

// begin notes a transaction before its COMMIT is sent. A number that a killed server gives a second time was not
// committed the first time.
func (l *ledger) begin(xid uint32, effects []effect) *entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := &entry{effects: effects}
	l.txns[xid] = e
	return e
}

// end notes what became of it.
func (l *ledger) end(e *entry, f fate) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.fate = f
}
