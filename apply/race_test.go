package apply

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// atBarrier lets b's next capture barriers be noticed.
func atBarrier(b *site) <-chan struct{} {
	at := make(chan struct{}, 100)
	barrier := b.worker.cfg.Barrier
	b.worker.cfg.Barrier = func(ctx context.Context, lsn wal.LSN) error {
		at <- struct{}{}
		return barrier(ctx, lsn)
	}
	return at
}

func await(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(waitMax / 3):
		t.Fatalf("timed out: %s", what)
	}
}

// applyWaits waits until the site's apply session waits for a lock.
func (s *site) applyWaits() {
	s.t.Helper()
	eventually(s.t, "apply waits for a lock", func() bool {
		return s.query("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'duri_apply_%' AND wait_event_type = 'Lock'")[0][0] != "0"
	})
}

// closeGate keeps the local stream from being decoded until open is called or the test ends.
func (s *site) closeGate(t *testing.T) (open func()) {
	s.gate.Lock()
	open = sync.OnceFunc(s.gate.Unlock)
	t.Cleanup(open)
	return open
}

// start runs SQL in a client session beside the test.
func start(t *testing.T, c *pgconn.PgConn, sql string) (done <-chan error) {
	ch := make(chan error, 1)
	ctx := t.Context()
	go func() {
		_, err := pg.Rows(ctx, c, sql)
		ch <- err
	}()
	return ch
}

func (s *site) expect(what, want string) {
	s.t.Helper()
	got := s.rows("SELECT concat_ws(' ', 't', id, v) FROM t UNION ALL SELECT concat_ws(' ', 'bag', id, v) FROM bag ORDER BY 1")
	if d := cmp.Diff(want, got); d != "" {
		s.t.Errorf("%s: site %s (-want +got):\n%s", what, s.name, d)
	}
}

// TestWaitsForLocalChangesThatAreNotDecoded is the capture barrier (rule 8): B has committed something that its local stream has not delivered yet
// when A's older change arrives. A change that does not wait would bring back what B removed.
func TestWaitsForLocalChangesThatAreNotDecoded(t *testing.T) {
	for _, tc := range []struct{ name, seed, local, remote, want, records string }{
		{"insert of a deleted key", "", "INSERT INTO t VALUES (1); DELETE FROM t", "INSERT INTO t VALUES (1,'a')", "", "update_deleted lost\n"},
		{"update of a deleted row", "INSERT INTO t VALUES (1,'seed')", "DELETE FROM t", "UPDATE t SET v = 'a'", "", "update_deleted lost\n"},
		{"delete of a deleted row", "INSERT INTO t VALUES (1,'seed')", "DELETE FROM t", "DELETE FROM t", "", "delete_missing lost\n"},
		{"insert of a key that moved away", "", "INSERT INTO t VALUES (1,'b'); UPDATE t SET id = 2", "INSERT INTO t VALUES (1,'a')", "t 2 b\n", "update_deleted lost\n"},
		{"insert into a truncated table", "INSERT INTO t VALUES (7)", "TRUNCATE t", "INSERT INTO t VALUES (1,'a')", "", "update_deleted lost\n"},
		{"append to a truncated table", "INSERT INTO bag VALUES (7)", "TRUNCATE bag", "INSERT INTO bag VALUES (1,'a')", "", "update_deleted lost\n"},
		{"update of an updated row", "INSERT INTO t VALUES (1,'seed')", "UPDATE t SET v = 'b'", "UPDATE t SET v = 'a'", "t 1 b\n", "update_origin_differs lost\n"},
		{"one transaction in two waves", "", "INSERT INTO t VALUES (1); DELETE FROM t", "BEGIN; INSERT INTO t VALUES (1,'a'); TRUNCATE bag; UPDATE t SET v = 'a2'; COMMIT", "", "update_deleted lost\nupdate_deleted lost\n"},
		{"created and removed again in another wave", "", "INSERT INTO t VALUES (1); DELETE FROM t", "BEGIN; INSERT INTO t VALUES (1,'a'); TRUNCATE bag; DELETE FROM t; COMMIT", "", "delete_missing lost\nupdate_deleted lost\n"},
		{"one of two keys in one statement", "", "INSERT INTO t VALUES (1,'b'),(2,'b'); DELETE FROM t WHERE id = 1", "INSERT INTO t VALUES (1,'a'),(2,'a'),(3,'a')", "t 2 b\nt 3 a\n", "insert_exists lost\nupdate_deleted lost\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, b := newRig(t, scenarioSchema, rigOptions{asRole: true})
			if tc.seed != "" {
				a.exec(tc.seed)
				settle(a, b)
			}
			b.exec("INSERT INTO unrelated VALUES (1)") // decoded, so that times are known
			b.captured()
			b.stopApply() // the worker must see the new Barrier
			at := atBarrier(b)
			b.startApply()
			a.feed.hold(b.id)
			a.exec(tc.remote)
			a.captured()
			open := b.closeGate(t)
			for sql := range strings.SplitSeq(tc.local, "; ") {
				b.exec(sql)
			}
			a.feed.release(b.id)
			await(t, "the worker waits for local decoding", at)
			if n := b.worker.Status().Applied; n >= a.feed.txnEnd {
				t.Errorf("applied %s without waiting", n)
			}
			open()
			settle(a, b)
			a.expect("in the end", tc.want)
			b.expect("in the end", tc.want)
			if got := strings.ReplaceAll(b.rows("SELECT kind, code FROM duri.conflict ORDER BY 1, 2"), "|", " "); got != tc.records {
				t.Errorf("records at B:\n%swant:\n%s", got, tc.records)
			}
		})
	}
}

// TestKeyComesAndGoesWhileInsertWaits: the fast insert waits for a client that has inserted the same key, and gets
// through because that client deletes it again: the client's delete is newer.
func TestKeyComesAndGoesWhileInsertWaits(t *testing.T) {
	a, b := newRig(t, scenarioSchema, rigOptions{asRole: true, config: func(c *Config) { c.LockTimeout = waitMax }})
	c := b.connect()
	run(t, c, "BEGIN; INSERT INTO t VALUES (1,'b')")
	a.exec("INSERT INTO t VALUES (1,'a')")
	b.applyWaits()
	run(t, c, "DELETE FROM t; COMMIT")
	settle(a, b)
	a.expect("in the end", "")
	b.expect("in the end", "")
}

// TestDeleteWaitsForDeleteAndInsert: the statement that looks for the row sees only the delete of a client's
// transaction that replaces the row.
func TestDeleteWaitsForDeleteAndInsert(t *testing.T) {
	a, b := newRig(t, scenarioSchema, rigOptions{asRole: true, config: func(c *Config) { c.LockTimeout = waitMax }})
	a.exec("INSERT INTO t VALUES (1,'seed')")
	settle(a, b)
	b.feed.hold(a.id)
	b.exec("UPDATE t SET v = 'b1'") // so that the fast statement passes the row over, and the closer look waits
	c := b.connect()
	run(t, c, "BEGIN; DELETE FROM t; INSERT INTO t VALUES (1,'b')")
	a.exec("DELETE FROM t")
	b.applyWaits()
	run(t, c, "COMMIT")
	b.feed.release(a.id)
	settle(a, b)
	a.expect("in the end", "t 1 b\n")
	b.expect("in the end", "t 1 b\n")
	if got := b.rows("SELECT kind, code, local_row ->> 'v' FROM duri.conflict"); got != "delete_origin_differs|lost|b\n" {
		t.Errorf("records at B: %s", got)
	}
}

// TestClientIsNeverTheVictim: apply and a client lock two rows in opposite order; it is apply that gives way.
func TestClientIsNeverTheVictim(t *testing.T) {
	a, b := newRig(t, scenarioSchema, rigOptions{asRole: true})
	a.exec("INSERT INTO t VALUES (1,'seed'),(2,'seed')")
	settle(a, b)
	c := b.connect()
	run(t, c, "BEGIN; UPDATE t SET n = 7 WHERE id = 2")
	a.exec("UPDATE t SET v = 'a'")
	b.applyWaits()
	run(t, c, "UPDATE t SET n = 7 WHERE id = 1; COMMIT")
	settle(a, b)
	same(t, a, b, dump("t"))
	b.expect("the client's later change wins", "t 1 seed\nt 2 seed\n")
}

// TestSeesCommitsThatWaitForTheirStandby: a local commit is in the WAL, and decoded, but not visible yet, as it waits for
// its synchronous standby. The remote delete is newer and must remove that row, which it cannot see.
func TestSeesCommitsThatWaitForTheirStandby(t *testing.T) {
	for _, tc := range []struct{ name, remote string }{
		{"delete", "BEGIN; INSERT INTO t VALUES (1,'a'); DELETE FROM t; COMMIT"},
		{"truncate", "TRUNCATE t"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, b := newRig(t, scenarioSchema, rigOptions{asRole: true, clusters: 2, config: func(c *Config) { c.LockTimeout = 50 * time.Millisecond }})
			b.exec("ALTER DATABASE b SET synchronous_commit = local")
			b.exec("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
			b.exec("SELECT pg_reload_conf()")
			b.sql = nil
			c := b.connect()
			run(t, c, "SET synchronous_commit = on")
			eventually(t, "the standby's name is known", func() bool { return run(t, c, "SHOW synchronous_standby_names")[0][0] == "nobody" })
			// Commits wait from the moment that the checkpointer has read the setting, which it does before a checkpoint.
			b.exec("CHECKPOINT")
			a.feed.hold(b.id)
			b.feed.hold(a.id)
			done := start(t, c, "INSERT INTO t VALUES (1,'b')")
			eventually(t, "the commit is decoded", func() bool { return len(b.feed.txns()) == 1 })
			a.exec(tc.remote)
			a.captured()
			a.feed.release(b.id)
			eventually(t, "apply waits for it", func() bool { return b.worker.Status().Retries > 1 })
			b.exec("ALTER SYSTEM RESET synchronous_standby_names")
			b.exec("SELECT pg_reload_conf()")
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			b.feed.release(a.id)
			settle(a, b)
			a.expect("in the end", "")
			b.expect("in the end", "")
		})
	}
}

// TestHoldsTransactionsFromTheFuture is rule 1: nothing is applied before the local clock has passed its time, also when
// the clock is set back meanwhile.
func TestHoldsTransactionsFromTheFuture(t *testing.T) {
	var behind time.Duration
	clock := make(chan time.Duration, 1)
	clock <- time.Hour
	a, b := newRig(t, scenarioSchema, rigOptions{config: func(c *Config) {
		if c.Site == 2 {
			c.Clock = func() wal.Time {
				behind = <-clock
				clock <- behind
				return wal.TimeOf(time.Now().Add(-behind))
			}
		}
	}})
	a.exec("INSERT INTO t VALUES (1,'a')")
	eventually(t, "the transaction is held", func() bool { return !b.worker.Status().HeldUntil.IsZero() })
	b.expect("while held", "")
	set := func(d time.Duration) { <-clock; clock <- d }
	set(10 * time.Millisecond)
	settle(a, b)
	b.expect("released", "t 1 a\n")
	if s := b.worker.Status(); !s.HeldUntil.IsZero() {
		t.Errorf("still held until %v", s.HeldUntil)
	}
}

// TestStopsAtWhatCannotBeApplied: nothing is skipped (rule 17); what was before is applied, and the error names the
// transaction. When the cause is gone, apply goes on.
func TestStopsAtWhatCannotBeApplied(t *testing.T) {
	a, b := newRig(t, scenarioSchema, rigOptions{asRole: true})
	b.faults = true
	a.exec("CREATE TABLE onlyhere (id int PRIMARY KEY)")
	a.feed.hold(b.id)
	a.exec("INSERT INTO t VALUES (1,'before')")
	a.exec("INSERT INTO onlyhere VALUES (1)")
	a.exec("INSERT INTO t VALUES (2,'behind')")
	a.captured()
	a.feed.release(b.id)
	want := "apply transaction " + a.feed.txns()[1].CommitLSN.String()
	eventually(t, "the error names transaction and table", func() bool {
		got := b.worker.Status().LastError
		return strings.HasPrefix(got, want) && strings.Contains(got, "public.onlyhere")
	})
	eventually(t, "what is before is applied", func() bool { return b.worker.Status().Applied >= a.feed.txns()[0].EndLSN })
	b.expect("while stopped", "t 1 before\n")
	b.exec("CREATE TABLE onlyhere (id int PRIMARY KEY)")
	settle(a, b)
	b.expect("in the end", "t 1 before\nt 2 behind\n")
	same(t, a, b, dump("onlyhere"))
}

// TestClockStepsBackBeforeDecoding: B's clock is set back, and a client commits there what is not decoded yet when A's
// older, concurrent change arrives. The commit time alone looks older than everything concurrent; its version is not,
// because decode gives it the greatest time so far plus a microsecond (rule 3).
func TestClockStepsBackBeforeDecoding(t *testing.T) {
	for _, tc := range []struct{ name, local, remote, want, records string }{
		{"update", "UPDATE t SET v = 'b' WHERE id = 1", "UPDATE t SET v = 'a' WHERE id = 1", "t 1 b\nt 2 seed\n", "update_origin_differs lost\n"},
		{"delete", "UPDATE t SET v = 'b' WHERE id = 1", "DELETE FROM t WHERE id = 1", "t 1 b\nt 2 seed\n", "delete_origin_differs lost\n"},
		{"truncate", "UPDATE t SET v = 'b' WHERE id = 1", "TRUNCATE t", "t 1 b\n", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, b := newRig(t, scenarioSchema, rigOptions{})
			greatest := wal.Time(0)
			b.stamp = func(t *wal.Txn) { t.VersionTime = stamp(t.CommitTime, &greatest, b.foreign) }
			a.exec("INSERT INTO t VALUES (1,'seed'),(2,'seed')")
			settle(a, b)
			b.exec("INSERT INTO unrelated VALUES (1)") // decoded, so that times are known
			settle(a, b)
			a.feed.hold(b.id)
			b.feed.hold(a.id)
			a.exec(tc.remote)
			b.exec("INSERT INTO unrelated VALUES (2)")
			a.captured()
			b.captured()
			open := b.closeGate(t)
			c := b.connect()
			origin := pg.QuoteLiteral(ClockOriginName(b.db, 1))
			run(t, c, "SELECT pg_replication_origin_create("+origin+"); SELECT pg_replication_origin_session_setup("+origin+")")
			run(t, c, "BEGIN; SELECT pg_replication_origin_xact_setup('0/1', clock_timestamp() - interval '3 s'); "+tc.local+"; COMMIT")
			at := atBarrier(b)
			a.feed.release(b.id)
			await(t, "the worker waits for local decoding", at)
			open()
			b.feed.release(a.id)
			settle(a, b)
			a.expect("in the end", tc.want)
			b.expect("in the end", tc.want)
			if got := strings.ReplaceAll(b.rows("SELECT kind, code FROM duri.conflict ORDER BY 1, 2"), "|", " "); got != tc.records {
				t.Errorf("records at B:\n%swant:\n%s", got, tc.records)
			}
		})
	}
}

// TestMeetsWhatALaterDeleteKeepsOut: C inserts a key and deletes it later, A inserts the same key in between. B knows of the
// delete before it has applied C's insert, so that A's row is not left standing there; C's insert has lost against it all
// the same.
func TestMeetsWhatALaterDeleteKeepsOut(t *testing.T) {
	sites := newMeshRig(t, 3, scenarioSchema, rigOptions{config: func(c *Config) { c.LockTimeout = waitMax }})
	a, b, c := sites[0], sites[1], sites[2]
	a.exec("INSERT INTO t VALUES (1,'seed')")
	settle(sites...)
	for _, f := range []*feed{a.feed, c.feed} {
		f.hold(a.id)
		f.hold(b.id)
		f.hold(c.id)
	}
	client := b.connect()
	run(t, client, "BEGIN; SELECT FROM t WHERE id = 1 FOR UPDATE")
	c.exec("UPDATE t SET v = 'c' WHERE id = 1") // waits at B, and what follows with it
	c.exec("INSERT INTO t VALUES (2,'c')")
	a.exec("INSERT INTO t VALUES (2,'a')")
	c.exec("DELETE FROM t WHERE id = 2")
	a.captured()
	c.captured()
	c.feed.stepTxn(b.id)
	b.applyWaits()
	c.feed.release(b.id)
	eventually(t, "B knows of the delete", func() bool { return b.mesh.Position(c.id) >= c.feed.txnEnd })
	a.feed.release(b.id)
	eventually(t, "A's row is judged", func() bool { return b.rows("SELECT count(*) FROM duri.conflict") == "1\n" })
	run(t, client, "COMMIT")
	for _, f := range []*feed{a.feed, c.feed} {
		f.release(a.id)
		f.release(c.id)
	}
	settle(sites...)
	for _, s := range sites {
		s.expect("in the end", "t 1 c\n")
	}
	got := b.rows("SELECT kind, code, origin, remote_row ->> 'v', local_site, local_row ->> 'v' FROM duri.conflict WHERE key ->> 'id' = '2' ORDER BY id")
	want := "update_deleted|lost|1|a|3|\\N\ninsert_exists|lost|3|c|1|a\ndelete_origin_differs|won|3|\\N|1|a\n"
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("records at B (-want +got):\n%s", d)
	}
}
