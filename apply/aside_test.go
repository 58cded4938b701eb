package apply

import (
	"fmt"
	"strings"
	"testing"
)

// TestAClientsLockStallsItsRowOnly is S40: the changes of a row that a client keeps locked wait, in their order, and
// everything else flows; who holds the lock is told, a restart of the worker forgets nothing, and what this site says to
// have seen stays before them.
func TestAClientsLockStallsItsRowOnly(t *testing.T) {
	a, b := newRig(t, "CREATE TABLE t (id int PRIMARY KEY, v text, n int)", rigOptions{asRole: true})
	a.exec("INSERT INTO t SELECT i, 'seed', 0 FROM generate_series(1, 20) i")
	settle(a, b)
	holder := b.connect()
	run(t, holder, "SET application_name = 'nightly'; BEGIN; SELECT FROM t WHERE id IN (1, 2) FOR UPDATE")
	a.exec("UPDATE t SET v = 'a1', n = n + 1 WHERE id = 1")
	a.exec("UPDATE t SET v = 'a2' WHERE id IN (2, 3)")
	a.exec("UPDATE t SET v = 'a3', n = n + 1 WHERE id = 1")
	a.exec("UPDATE t SET id = 102 WHERE id = 2")
	a.exec("UPDATE t SET v = 'moved' WHERE id = 102")
	for i := 4; i <= 20; i++ {
		a.exec(fmt.Sprintf("UPDATE t SET v = 'free' WHERE id = %d", i))
	}
	eventually(t, "everything else flows", func() bool {
		return b.rows("SELECT count(*) FROM t WHERE v = 'free'") == "17\n" && b.rows("SELECT v FROM t WHERE id = 3") == "a2\n"
	})
	if got := b.rows("SELECT id, v, n FROM t WHERE id IN (1, 2, 102) ORDER BY id"); got != "1|seed|0\n2|seed|0\n" {
		t.Errorf("locked rows were written:\n%s", got)
	}
	s := b.worker.Status()
	if s.Held != 3 || !strings.Contains(s.Blocker, "nightly") || s.Applied >= a.feed.txnEnd {
		t.Errorf("status %+v", s)
	}
	b.stopApply()
	b.startApply()
	a.exec("UPDATE t SET v = 'late' WHERE id = 1")
	a.exec("UPDATE t SET v = 'marker' WHERE id = 20")
	eventually(t, "the stream goes on after a restart", func() bool { return b.rows("SELECT v FROM t WHERE id = 20") == "marker\n" })
	if got := b.rows("SELECT v FROM t WHERE id = 1"); got != "seed\n" {
		t.Errorf("the locked row is %q", got)
	}
	b.exec("UPDATE t SET v = 'b' WHERE id = 5") // what b has seen of a lies before what waits
	b.captured()
	txns := b.feed.txns()
	if seen := txns[len(txns)-1].SeenOf(a.id); seen >= a.feed.txnEnd || seen == 0 {
		t.Errorf("b says to have seen %s, and %s is the end", seen, a.feed.txnEnd)
	}
	// What a has seen of b in the meantime is not what it had seen when it wrote what waits: tombstones must stay.
	a.applied()
	a.exec("UPDATE t SET v = 'has seen b' WHERE id = 6")
	a.captured()
	eventually(t, "a's change that has seen b is applied", func() bool { return b.rows("SELECT v FROM t WHERE id = 6") == "has seen b\n" })
	if seen := b.worker.Status().Seen; seen >= b.feed.txnEnd {
		t.Errorf("b may forget what lies before %s, and the change that waits had not seen %s", seen, b.feed.txnEnd)
	}
	run(t, holder, "COMMIT")
	settle(a, b)
	if got := same(t, a, b, "SELECT id, v, n FROM t WHERE id IN (1, 2, 3, 102) ORDER BY id"); got != "1|late|2\n3|a2|0\n102|moved|0\n" {
		t.Errorf("at last\n%s", got)
	}
	eventually(t, "nothing waits", func() bool { s := b.worker.Status(); return s.Held == 0 && s.Blocker == "" })
	if got := b.rows("SELECT count(*) FROM duri.held"); got != "0\n" {
		t.Errorf("%s rows of duri.held are left", got)
	}
}

// TestATruncateDoesNotOvertakeWhatWaits: an older change of the same origin waits for a lock, and the TRUNCATE with it.
func TestATruncateDoesNotOvertakeWhatWaits(t *testing.T) {
	a, b := newRig(t, "CREATE TABLE t (id int PRIMARY KEY, v text)", rigOptions{asRole: true})
	a.exec("INSERT INTO t VALUES (1, 'seed'), (2, 'seed')")
	settle(a, b)
	holder := b.connect()
	run(t, holder, "BEGIN; SELECT FROM t WHERE id = 1 FOR UPDATE")
	a.feed.hold(b.id)
	a.exec("UPDATE t SET v = 'a' WHERE id = 1")
	a.exec("UPDATE t SET v = 'a' WHERE id = 2")
	a.exec("TRUNCATE t")
	a.exec("INSERT INTO t VALUES (3, 'a')")
	a.captured()
	a.feed.release(b.id)
	eventually(t, "what is before the TRUNCATE flows", func() bool { return b.rows("SELECT v FROM t WHERE id = 2") == "a\n" })
	eventually(t, "the status says why", func() bool { return strings.Contains(b.worker.Status().LastError, "truncates a table") })
	run(t, holder, "COMMIT")
	settle(a, b)
	if got := same(t, a, b, "SELECT * FROM t"); got != "3|a\n" {
		t.Errorf("at last\n%s", got)
	}
}

// TestAClientsUncommittedInsertStallsItsKeyOnly: the client's row is not visible, and nothing can be locked.
func TestAClientsUncommittedInsertStallsItsKeyOnly(t *testing.T) {
	a, b := newRig(t, "CREATE TABLE t (id int PRIMARY KEY, v text)", rigOptions{asRole: true})
	holder := b.connect()
	run(t, holder, "BEGIN; INSERT INTO t VALUES (1, 'b')")
	a.exec("INSERT INTO t VALUES (1, 'a')")
	a.exec("INSERT INTO t VALUES (2, 'a')")
	eventually(t, "the other row flows", func() bool { return b.rows("SELECT v FROM t WHERE id = 2") == "a\n" })
	run(t, holder, "COMMIT")
	settle(a, b)
	if got := same(t, a, b, "SELECT * FROM t ORDER BY id"); got != "1|b\n2|a\n" {
		t.Errorf("at last\n%s", got)
	}
}
