package journal

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/wal"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		appendForEver(dir)
	}
	goleak.VerifyTestMain(m)
}

// testHeader is the header of test journals; coverage begins at 0/100.
func testHeader() Header {
	return Header{
		Cluster: "shop", Site: 1, SiteName: "seoul",
		Incarnation:   Incarnation{SystemID: 7301234567890123456, Timeline: 1, Database: "orders", Slot: "duri_orders", CreatedLSN: 0x100},
		ServerVersion: 150020, Encoding: "UTF8", Settings: map[string]string{"DateStyle": "ISO, MDY", "TimeZone": "UTC"},
		From: 0x100,
	}
}

// testRelations are three tables of different shape.
var testRelations = sync.OnceValue(func() []*wal.Relation {
	return []*wal.Relation{
		(&wal.Relation{OID: 16384, Namespace: "public", Name: "account", Identity: wal.IdentityDefault, Columns: []wal.Column{
			{Name: "id", TypeOID: 20, TypeMod: -1, Key: true},
			{Name: "balance", TypeOID: 1700, TypeMod: 655366},
			{Name: "note", TypeOID: 25, TypeMod: -1},
		}}).Seal(),
		(&wal.Relation{OID: 16390, Namespace: "public", Name: "log", Identity: wal.IdentityFull, Columns: []wal.Column{
			{Name: "메모", TypeOID: 90001, TypeName: "public.mood", TypeMod: -1, Key: true},
		}}).Seal(),
		(&wal.Relation{OID: 16400, Namespace: "s", Name: "nothing", Identity: wal.IdentityNothing}).Seal(),
	}
})

func genTuple(t *rapid.T, columns int) wal.Tuple {
	out := make(wal.Tuple, columns)
	for i := range out {
		out[i].Kind = rapid.SampledFrom([]wal.ValueKind{wal.Null, wal.Unchanged, wal.Text, wal.Omitted}).Draw(t, "kind")
		if out[i].Kind == wal.Text {
			out[i].Data = genBytes(t)
		}
	}
	return out
}

// genBytes is mostly short, sometimes beyond a record's limit.
func genBytes(t *rapid.T) []byte {
	if rapid.IntRange(0, 60).Draw(t, "large") == 0 {
		return bytes.Repeat([]byte("x"), rapid.IntRange(1000, changesLimit+1000).Draw(t, "size"))
	}
	return rapid.SliceOfN(rapid.Byte(), 0, 200).Draw(t, "data")
}

func genChange(t *rapid.T, rels []*wal.Relation) wal.Change {
	c := wal.Change{
		Op:       rapid.SampledFrom([]wal.Op{wal.Insert, wal.Update, wal.Delete, wal.Truncate}).Draw(t, "op"),
		Relation: rapid.SampledFrom(rels).Draw(t, "relation"),
	}
	n := len(c.Relation.Columns)
	if hasNew(c.Op) {
		c.New = genTuple(t, n)
	}
	if c.Op == wal.Update || c.Op == wal.Delete {
		c.OldKind = rapid.SampledFrom([]wal.OldKind{wal.OldNone, wal.OldKey, wal.OldFull}).Draw(t, "old")
	}
	if c.OldKind != wal.OldNone {
		c.Old = genTuple(t, n)
	}
	if c.Op == wal.Truncate {
		c.Options = rapid.Uint8Range(0, 3).Draw(t, "options")
	}
	return c
}

// genTxn is a transaction that begins at or behind from.
func genTxn(t *rapid.T, from wal.LSN, rels []*wal.Relation) *wal.Txn {
	commit := from + wal.LSN(rapid.Uint64Range(2, 5000).Draw(t, "step"))
	txn := &wal.Txn{
		Origin: 1, XID: rapid.Uint32().Draw(t, "xid"), CommitLSN: commit, EndLSN: commit + wal.LSN(rapid.Uint64Range(0, 200).Draw(t, "len")),
		CommitTime: wal.Time(rapid.Int64().Draw(t, "time")), Received: wal.Time(rapid.Int64Range(0, 1<<50).Draw(t, "received")),
		Mark:    rapid.SampledFrom([]wal.Mark{{}, {LTXID: "0123456789abcdef", Level: wal.CommitOn}, {LTXID: strings.Repeat("\x00\xff", 20)}}).Draw(t, "mark"),
		Changes: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) wal.Change { return genChange(t, rels) }), 0, 12).Draw(t, "changes"),
		Seen:    genSeen(t),
	}
	txn.VersionTime = txn.CommitTime
	if rapid.Bool().Draw(t, "stepped") {
		txn.VersionTime++
	}
	return txn
}

func genSeen(t *rapid.T) []wal.Seen {
	var seen []wal.Seen
	for site := wal.SiteID(2); site < 5; site++ {
		if rapid.Bool().Draw(t, "sees") {
			seen = append(seen, wal.Seen{Site: site, LSN: wal.LSN(rapid.Uint64Range(0, 1<<40).Draw(t, "lsn"))})
		}
	}
	return seen
}

// genTxns is a stream of n transactions in order.
func genTxns(t *rapid.T, from wal.LSN, n int) []*wal.Txn {
	rels, out := testRelations(), make([]*wal.Txn, n)
	for i := range out {
		out[i] = genTxn(t, from, rels)
		from = out[i].EndLSN
	}
	return out
}

// simpleTxn is the i-th transaction, from 0, of a fixed stream that begins at 0/100 and in which each covers 100 bytes.
func simpleTxn(i int) *wal.Txn {
	rels := testRelations()
	end := wal.LSN(0x100 + 100*(i+1))
	text := func(s string) wal.Value { return wal.Value{Kind: wal.Text, Data: []byte(s)} }
	return &wal.Txn{
		Origin: 1, XID: uint32(700 + i), CommitLSN: end - 40, EndLSN: end,
		CommitTime: wal.Time(848000000000000 + i), VersionTime: wal.Time(848000000000000 + i), Received: 1,
		Seen: []wal.Seen{{Site: 2, LSN: wal.LSN(50 + i)}},
		Changes: []wal.Change{
			{Op: wal.Insert, Relation: rels[0], New: wal.Tuple{text(fmt.Sprint(i)), text("12.50"), {Kind: wal.Null}}},
			{Op: wal.Update, Relation: rels[0], OldKind: wal.OldKey, New: wal.Tuple{text(fmt.Sprint(i)), text("13"), {Kind: wal.Unchanged}}, Old: wal.Tuple{text("7"), {Kind: wal.Omitted}, {Kind: wal.Omitted}}},
			{Op: wal.Delete, Relation: rels[1], OldKind: wal.OldFull, Old: wal.Tuple{text("happy")}},
		},
	}
}

// diffTxns compares transactions; nil and empty slices are the same. cmp is slow on long values: it only explains.
func diffTxns(want, have []*wal.Txn) string {
	if slices.EqualFunc(want, have, equalTxn) {
		return ""
	}
	return "transactions differ: " + cmp.Diff(want, have, cmpopts.EquateEmpty())
}

func diffTxn(want, have *wal.Txn) string { return diffTxns([]*wal.Txn{want}, []*wal.Txn{have}) }

func equalTxn(a, b *wal.Txn) bool {
	if a == nil || b == nil {
		return a == b
	}
	x, y := *a, *b
	x.Changes, y.Changes, x.Seen, y.Seen = nil, nil, nil, nil
	return reflect.DeepEqual(x, y) && slices.Equal(a.Seen, b.Seen) && slices.EqualFunc(a.Changes, b.Changes, equalChange)
}

func equalChange(a, b wal.Change) bool {
	value := func(x, y wal.Value) bool { return x.Kind == y.Kind && bytes.Equal(x.Data, y.Data) }
	return a.Op == b.Op && a.OldKind == b.OldKind && a.Options == b.Options &&
		(a.Relation == b.Relation || reflect.DeepEqual(a.Relation, b.Relation)) &&
		slices.EqualFunc(a.Old, b.Old, value) && slices.EqualFunc(a.New, b.New, value)
}

// failer is the part of testing.TB that rapid.T has as well.
type failer interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

func must(t failer, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// small keeps preallocation in memory cheap.
func small(o Options, fsys *memFS) Options {
	if o.SegmentBytes == 0 {
		o.SegmentBytes = 64 << 10
	}
	o.FS = fsys
	return o
}

func create(t failer, fsys *memFS, o Options) *Journal {
	t.Helper()
	o = small(o, fsys)
	j, err := Create("dir", testHeader(), o)
	must(t, err)
	return j
}

func open(t failer, fsys *memFS, o Options) *Journal {
	t.Helper()
	o = small(o, fsys)
	j, err := Open("dir", o)
	must(t, err)
	return j
}

func appendAll(t failer, j *Journal, txns ...*wal.Txn) {
	t.Helper()
	for _, txn := range txns {
		must(t, j.AppendTxn(txn))
	}
}

// readAll returns what a reader from the given position sees at present.
func readAll(j *Journal, from wal.LSN) ([]*wal.Txn, error) {
	r, err := j.NewReader(from)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var out []*wal.Txn
	for {
		rec, ok, err := r.TryNext()
		if err != nil || !ok {
			return out, err
		}
		if rec.Txn != nil {
			out = append(out, rec.Txn)
		}
	}
}

// copyFrames moves everything beyond to.End from one journal to another.
func copyFrames(t failer, from, to *Journal, maxBytes int) {
	t.Helper()
	must(t, from.Flush())
	r, err := from.NewReader(to.End())
	must(t, err)
	defer r.Close()
	for to.End() < from.End() {
		f, err := r.NextFrames(context.Background(), maxBytes)
		must(t, err)
		must(t, to.AppendFrames(f.Data))
	}
}
