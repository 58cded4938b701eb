package link

import (
	"fmt"
	"testing"
	"time"

	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/wal"
)

// tpcb yields pgbench-like transactions: three updates and one insert. The transaction is reused between calls.
type tpcb struct{ txn wal.Txn }

func newTPCB() *tpcb {
	rel := func(name string, cols ...string) *wal.Relation {
		r := &wal.Relation{OID: 16384, Namespace: "public", Name: name, Identity: wal.IdentityDefault}
		for i, c := range cols {
			r.Columns = append(r.Columns, wal.Column{Name: c, TypeOID: 23, TypeMod: -1, Key: i == 0})
		}
		return r.Seal()
	}
	return &tpcb{wal.Txn{Origin: 1, Seen: []wal.Seen{{Site: 2, LSN: 0x16B374D848}}, Changes: []wal.Change{
		{Op: wal.Update, Relation: rel("pgbench_accounts", "aid", "bid", "abalance", "filler")},
		{Op: wal.Update, Relation: rel("pgbench_tellers", "tid", "bid", "tbalance", "filler")},
		{Op: wal.Update, Relation: rel("pgbench_branches", "bid", "bbalance", "filler")},
		{Op: wal.Insert, Relation: rel("pgbench_history", "tid", "bid", "aid", "delta", "mtime", "filler")},
	}}}
}

// at is the i-th transaction.
func (b *tpcb) at(i int) *wal.Txn {
	t := &b.txn
	t.XID, t.CommitLSN, t.EndLSN = uint32(i+1000), wal.LSN(0x1000000+i*600), wal.LSN(0x1000000+i*600+48)
	t.CommitTime = wal.Time(848000000000000 + i*50)
	t.VersionTime, t.Received = t.CommitTime, t.CommitTime+900
	text := func(format string, args ...any) wal.Value {
		return wal.Value{Kind: wal.Text, Data: fmt.Appendf(nil, format, args...)}
	}
	null := wal.Value{Kind: wal.Null}
	aid, tid := text("%d", i*7919%1000000), text("%d", i%10)
	t.Changes[0].New = wal.Tuple{aid, text("1"), text("%d", i*31%5000), text("%84s", "")}
	t.Changes[1].New = wal.Tuple{tid, text("1"), text("%d", i*37%5000), null}
	t.Changes[2].New = wal.Tuple{text("1"), text("%d", i*41%5000), null}
	t.Changes[3].New = wal.Tuple{tid, text("1"), aid, text("%d", i*43%5000-2500), text("2026-11-25 20:50:56.%06d", i*53%1000000), null}
	return t
}

// BenchmarkFollowTPCB brings a new copy up to a journal of TPC-B transactions over TLS on the loopback interface, until
// the last one is durable in the copy; one operation is one transaction of four changes.
func BenchmarkFollowTPCB(b *testing.B) {
	w := newWorld(b, func(c *ServerConfig) { c.Heartbeat, c.Silence = 0, 0 })
	w.db.j = newJournal(b, header(), journal.Options{})
	tpcb := newTPCB()
	for i := range b.N {
		if err := w.db.j.AppendTxn(tpcb.at(i)); err != nil {
			b.Fatal(err)
		}
	}
	if err := w.db.j.Flush(); err != nil {
		b.Fatal(err)
	}
	cp, err := OpenCopy(CopyConfig{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer cp.Close()
	cl := w.client(func(c *ClientConfig) { c.Address, c.Heartbeat, c.Silence = w.addr, 0, 0 })
	b.ReportAllocs()
	b.ResetTimer()
	f := follow(b, cl, cp)
	waitFor(b, "the copy to be complete", func() bool { return cp.Ack().Durable == w.db.j.End() })
	b.StopTimer()
	f.stop(b)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "txn/s")
	b.ReportMetric(float64(w.db.j.State().Bytes)/1e6/b.Elapsed().Seconds(), "MB/s")
}

// BenchmarkCommitRoundTrip is one transaction at a time: appended, flushed, shipped, fsynced in the copy, acknowledged.
func BenchmarkCommitRoundTrip(b *testing.B) {
	w := newWorld(b, func(c *ServerConfig) { c.Heartbeat, c.Silence = 0, 0 })
	w.db.j = newJournal(b, header(), journal.Options{})
	cp, err := OpenCopy(CopyConfig{Dir: b.TempDir(), Prompt: true})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = cp.Close() })
	follow(b, w.client(func(c *ClientConfig) { c.Address, c.Heartbeat, c.Silence = w.addr, 0, 0 }), cp)
	<-cp.Created()
	tpcb := newTPCB()
	b.ResetTimer()
	for i := range b.N {
		if err := w.db.j.AppendTxn(tpcb.at(i)); err != nil {
			b.Fatal(err)
		}
		if err := w.db.j.Flush(); err != nil {
			b.Fatal(err)
		}
		for end := w.db.j.End(); w.db.last("busan").Durable != end; {
			time.Sleep(20 * time.Microsecond) // a benchmark, not a test: polling less would measure the timer
		}
	}
}
