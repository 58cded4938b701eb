package journal

import (
	"context"
	"fmt"
	"testing"

	"github.com/duri-io/duri/wal"
)

// tpcb yields pgbench-like transactions: three updates and one insert. The transaction is reused between calls.
type tpcb struct {
	txn  wal.Txn
	bufs [20][]byte
}

func newTPCB() *tpcb {
	rel := func(name string, cols ...string) *wal.Relation {
		r := &wal.Relation{OID: 16384, Namespace: "public", Name: name, Identity: wal.IdentityDefault}
		for i, c := range cols {
			r.Columns = append(r.Columns, wal.Column{Name: c, TypeOID: 23, TypeMod: -1, Key: i == 0})
		}
		return r.Seal()
	}
	b := &tpcb{}
	b.txn = wal.Txn{Origin: 1, Seen: []wal.Seen{{Site: 2, LSN: 0x16B374D848}}, Changes: []wal.Change{
		{Op: wal.Update, Relation: rel("pgbench_accounts", "aid", "bid", "abalance", "filler"), New: make(wal.Tuple, 4)},
		{Op: wal.Update, Relation: rel("pgbench_tellers", "tid", "bid", "tbalance", "filler"), New: make(wal.Tuple, 4)},
		{Op: wal.Update, Relation: rel("pgbench_branches", "bid", "bbalance", "filler"), New: make(wal.Tuple, 3)},
		{Op: wal.Insert, Relation: rel("pgbench_history", "tid", "bid", "aid", "delta", "mtime", "filler"), New: make(wal.Tuple, 6)},
	}}
	return b
}

// at is the i-th transaction.
func (b *tpcb) at(i int) *wal.Txn {
	t := &b.txn
	t.XID, t.CommitLSN, t.EndLSN = uint32(i+1000), wal.LSN(0x1000000+i*600), wal.LSN(0x1000000+i*600+48)
	t.CommitTime = wal.Time(848000000000000 + i*50)
	t.VersionTime, t.Received = t.CommitTime, t.CommitTime+900
	k := 0
	text := func(format string, args ...any) wal.Value {
		b.bufs[k] = fmt.Appendf(b.bufs[k][:0], format, args...)
		k++
		return wal.Value{Kind: wal.Text, Data: b.bufs[k-1]}
	}
	filler := text("%84s", "")
	c := t.Changes
	c[0].New[0], c[0].New[1], c[0].New[2], c[0].New[3] = text("%d", i*7919%1000000), text("1"), text("%d", i%5000), filler
	c[1].New[0], c[1].New[1], c[1].New[2], c[1].New[3] = text("%d", i%10), text("1"), text("%d", i%5000), wal.Value{Kind: wal.Null}
	c[2].New[0], c[2].New[1], c[2].New[2] = text("1"), text("%d", i%5000), wal.Value{Kind: wal.Null}
	c[3].New[0], c[3].New[1], c[3].New[2], c[3].New[3], c[3].New[4], c[3].New[5] = text("%d", i%10), text("1"),
		text("%d", i*7919%1000000), text("%d", i%5000-2500), text("2026-11-25 20:50:56.%06d", i%1000000), wal.Value{Kind: wal.Null}
	return t
}

func benchJournal(b *testing.B) *Journal {
	j, err := Create(b.TempDir(), Header{Cluster: "bench", Site: 1, From: 0x100000}, Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { j.Close() })
	return j
}

// prepared returns n distinct transactions that own their values.
func prepared(n int) []*wal.Txn {
	g := newTPCB()
	out := make([]*wal.Txn, n)
	for i := range out {
		t := *g.at(i)
		t.Changes = nil
		for _, c := range g.txn.Changes {
			c.New = append(wal.Tuple(nil), c.New...)
			for k := range c.New {
				c.New[k].Data = append([]byte(nil), c.New[k].Data...)
			}
			t.Changes = append(t.Changes, c)
		}
		out[i] = &t
	}
	return out
}

// BenchmarkAppend appends TPC-B transactions; one operation is one transaction of four changes.
func BenchmarkAppend(b *testing.B) {
	j := benchJournal(b)
	txns := prepared(1000)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		t := txns[i%len(txns)]
		t.CommitLSN, t.EndLSN = wal.LSN(0x1000000+i*600), wal.LSN(0x1000000+i*600+48)
		if err := j.AppendTxn(t); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	report(b, j)
}

func report(b *testing.B, j *Journal) {
	b.ReportMetric(float64(4*b.N)/b.Elapsed().Seconds(), "changes/s")
	b.ReportMetric(float64(j.State().Bytes)/float64(max(j.State().Txns, 1)), "chained-B/txn")
}

// BenchmarkRead reads them back as transactions.
func BenchmarkRead(b *testing.B) {
	j := benchJournal(b)
	fill(b, j, b.N)
	r, err := j.NewReader(j.Start())
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		if _, err := r.Next(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	report(b, j)
}

func fill(b *testing.B, j *Journal, n int) {
	g := newTPCB()
	for i := range n {
		if err := j.AppendTxn(g.at(i)); err != nil {
			b.Fatal(err)
		}
	}
	if err := j.Flush(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkCopy reads frames as the link does and appends them to a copy.
func BenchmarkCopy(b *testing.B) {
	j, to := benchJournal(b), benchJournal(b)
	fill(b, j, b.N)
	r, err := j.NewReader(j.Start())
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	b.ReportAllocs()
	b.ResetTimer()
	for to.End() < j.End() {
		f, err := r.NextFrames(context.Background(), 1<<20)
		if err != nil {
			b.Fatal(err)
		}
		if err := to.AppendFrames(f.Data); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	report(b, j)
}
