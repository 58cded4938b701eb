package apply

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// planRelation has a key, a value, and an out-of-line value.
var planRelation = (&wal.Relation{OID: 1, Namespace: "public", Name: "t", Identity: wal.IdentityDefault, Columns: []wal.Column{
	{Name: "id", TypeOID: 23, TypeMod: -1, Key: true}, {Name: "v", TypeOID: 25, TypeMod: -1}, {Name: "big", TypeOID: 25, TypeMod: -1},
}}).Seal()

func planResolver(rel *wal.Relation) (*target, error) {
	t := &table{schema: "public", name: "t", full: "public.t", key: []int{0}, deletable: true, columns: []column{
		{name: "id", typ: "integer", arrayType: "integer[]", norm: normExact},
		{name: "v", typ: "text", arrayType: "text[]"},
		{name: "big", typ: "text", arrayType: "text[]"},
	}}
	return bind(t, rel, policy.Table{})
}

func text(s string) wal.Value { return wal.Value{Kind: wal.Text, Data: []byte(s)} }

// planRow is a row as a map model holds it: v and big.
type planRow struct{ v, big string }

// originTable does what a table and its WAL do: it changes rows and writes down the change as pgoutput tells it.
type originTable struct {
	rows map[string]planRow
	n    int
}

func (o *originTable) change(t *rapid.T) (wal.Change, bool) {
	o.n++
	key := rapid.SampledFrom([]string{"1", "2", "3", "4"}).Draw(t, "key")
	row, live := o.rows[key]
	c := wal.Change{Relation: planRelation}
	fresh := planRow{"v" + strconv.Itoa(o.n), "big" + strconv.Itoa(o.n)}
	oldKey := wal.Tuple{text(key), {Kind: wal.Omitted}, {Kind: wal.Omitted}}
	switch op := rapid.IntRange(0, 9).Draw(t, "op"); {
	case !live:
		o.rows[key] = fresh
		c.Op, c.New = wal.Insert, wal.Tuple{text(key), text(fresh.v), text(fresh.big)}
	case op < 3:
		delete(o.rows, key)
		c.Op, c.OldKind, c.Old = wal.Delete, wal.OldKey, oldKey
	case op < 5:
		o.rows[key] = planRow{fresh.v, row.big}
		c.Op, c.New = wal.Update, wal.Tuple{text(key), text(fresh.v), {Kind: wal.Unchanged}}
	case op < 6:
		o.rows[key] = fresh
		c.Op, c.New = wal.Update, wal.Tuple{text(key), text(fresh.v), text(fresh.big)}
	case op < 7:
		clear(o.rows)
		c.Op = wal.Truncate
	default:
		to := rapid.SampledFrom([]string{"1", "2", "3", "4", "5"}).Draw(t, "to")
		if _, taken := o.rows[to]; taken {
			return c, false
		}
		delete(o.rows, key)
		c.Op, c.OldKind, c.Old = wal.Update, wal.OldKey, oldKey
		c.New = wal.Tuple{text(to), text(fresh.v), {Kind: wal.Unchanged}}
		o.rows[to] = planRow{fresh.v, row.big}
		if op == 9 {
			o.rows[to] = fresh
			c.New[2] = text(fresh.big)
		}
	}
	return c, true
}

// apply does to a map what the executor does to a table that nobody else writes.
func (w *wave) applyTo(t *rapid.T, rows map[string]planRow) {
	if w.truncate != nil {
		clear(rows)
		return
	}
	for _, m := range w.moved {
		r := &w.refs[m.ref-1]
		old, ok := rows[string(m.old[0].Data)]
		if !ok {
			t.Fatalf("no row under the old key %s", m.old[0].Data)
		}
		r.row = fill(r.row, wal.Tuple{{Kind: wal.Omitted}, {Kind: wal.Omitted}, text(old.big)})
		w.refold(m.e)
	}
	for _, tw := range w.tables {
		for _, e := range tw.entries {
			key := string(e.keyv[0].Data)
			was, live := rows[key]
			switch {
			case e.slow:
				t.Fatalf("key %s is still incomplete", key)
			case e.kind == netDelete:
				if !live && !e.maybe {
					t.Fatalf("delete of the missing key %s", key)
				}
				delete(rows, key)
			case (e.kind == netInsert) == live:
				t.Fatalf("key %s: kind %d, live %t", key, e.kind, live)
			default:
				row := planRow{string(e.row[1].Data), string(e.row[2].Data)}
				if e.row[2].Kind == wal.Unchanged {
					row.big = was.big
				}
				rows[key] = row
			}
		}
	}
}

// TestMergedEqualsOneByOne is property 6 of style.md section 5, without conflicts: net changes give the rows that the
// changes give one by one, key changes and untouched out-of-line values included.
func TestMergedEqualsOneByOne(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := originTable{rows: map[string]planRow{}}
		here := map[string]planRow{}
		for range rapid.IntRange(1, 3).Draw(t, "batches") {
			var txns []*wal.Txn
			for range rapid.IntRange(1, 4).Draw(t, "transactions") {
				txn := &wal.Txn{Origin: 1}
				for range rapid.IntRange(1, 6).Draw(t, "changes") {
					if c, ok := o.change(t); ok {
						txn.Changes = append(txn.Changes, c)
					}
				}
				txns = append(txns, txn)
			}
			p, err := planTxns(txns, planResolver, abreast, rapid.Bool().Draw(t, "merged"))
			if err != nil {
				t.Fatal(err)
			}
			p.cut()
			for _, w := range p.batch.waves {
				w.applyTo(t, here)
			}
			if !maps.Equal(here, o.rows) {
				t.Fatalf("got %v, want %v", here, o.rows)
			}
		}
	})
}

// TestWavesAreBounded: a wave never grows beyond its limit by more than one change.
func TestWavesAreBounded(t *testing.T) {
	txn := &wal.Txn{Origin: 1}
	for i := range 2*waveChanges + 10 {
		txn.Changes = append(txn.Changes, wal.Change{Op: wal.Insert, Relation: planRelation, New: wal.Tuple{text(strconv.Itoa(i)), text(""), text("")}})
	}
	p, err := planTxns([]*wal.Txn{txn}, planResolver, abreast, true)
	if err != nil {
		t.Fatal(err)
	}
	p.cut()
	if n := len(p.batch.waves); n != 3 {
		t.Errorf("%d waves", n)
	}
	if !slices.IsSortedFunc(p.batch.waves[0].tables[0].entries, func(a, b *entry) int { return strings.Compare(a.key, b.key) }) {
		t.Error("keys are not sorted")
	}
}

func TestBindRefusesWhatItCannotKeep(t *testing.T) {
	rel := func(names ...string) *wal.Relation {
		r := &wal.Relation{Namespace: "public", Name: "t"}
		for _, n := range names {
			r.Columns = append(r.Columns, wal.Column{Name: n})
		}
		return r.Seal()
	}
	tab := &table{full: "public.t", key: []int{0}, columns: []column{{name: "id"}, {name: "v"}}}
	g, err := bind(tab, rel("v", "id"), policy.Table{})
	if err != nil || g.key[0].at != 1 || !slices.Equal(g.cols, []int{1, 0}) {
		t.Errorf("other order of columns: %+v, %v", g, err)
	}
	odd := &table{full: "public.t", key: []int{0}, columns: []column{{name: "id", norm: normUnsupported}}}
	for _, tc := range []struct {
		t    *table
		rel  *wal.Relation
		want string
	}{
		{tab, rel("id", "v", "w"), `column "w" does not exist`},
		{tab, rel("v"), `key column "id" is not sent`},
		{odd, rel("id"), "equality cannot be told"},
	} {
		var te *TableError
		if _, err := bind(tc.t, tc.rel, policy.Table{}); !errors.As(err, &te) || !strings.Contains(err.Error(), tc.want) || te.Hint == "" {
			t.Errorf("%v: %v, want %q", tc.rel.Columns, err, tc.want)
		}
	}
}

// TestJudgeKeepsTheOriginsImage: an update whose out-of-line value did not arrive takes it from the origin's earlier
// change, even when that one lost; never from a rival.
func TestJudgeKeepsTheOriginsImage(t *testing.T) {
	txnAt := func(at wal.Time) *wal.Txn { return &wal.Txn{Origin: 1, EndLSN: 7, VersionTime: at} }
	whole := wal.Tuple{text("1"), text("a"), text("ours")}
	part := wal.Tuple{text("1"), text("b"), {Kind: wal.Unchanged}}
	chain := []*ref{{txn: txnAt(10), op: wal.Insert, row: whole}, {txn: txnAt(30), op: wal.Update, row: part}}
	rival := held{State: conflict.State{Existence: conflict.Live, Version: wal.Version{Time: 20, Site: 2}}, image: wal.Tuple{text("1"), text("x"), text("theirs")}, end: 5}
	asked := 0
	ask := func(*ref) (wal.Tuple, bool, error) {
		asked++
		return wal.Tuple{text("1"), text("z"), text("fetched")}, true, nil
	}
	v, err := judge(chain, rival, merging{fetch: ask})
	if err != nil || !v.live || !v.changed || string(v.row[1].Data) != "b" || string(v.row[2].Data) != "ours" || asked != 0 {
		t.Errorf("%+v, %v, asked %d times", v, err, asked)
	}
	if len(v.records) != 2 || v.records[0].decision.Code != conflict.Lost || v.records[1].decision.Code != conflict.Won {
		t.Errorf("records %+v", v.records)
	}
	if v, err = judge(chain[1:], rival, merging{fetch: ask}); err != nil || asked != 1 || string(v.row[2].Data) != "fetched" || string(v.row[1].Data) != "b" {
		t.Errorf("alone: %+v, %v, asked %d times", v, err, asked)
	}
	gone := func(*ref) (wal.Tuple, bool, error) { return nil, false, nil }
	if v, err = judge(chain[1:], rival, merging{fetch: gone}); err != nil || v.changed || v.records[0].decision.Code != conflict.Won {
		t.Errorf("gone at the origin: %+v, %v", v, err)
	}
	// Half of a key change: what stands under the new key is another row, even if the origin wrote it.
	own := held{State: conflict.State{Existence: conflict.Live, Version: wal.Version{Time: 5, Site: 1}}, image: rival.image}
	half := []*ref{{txn: txnAt(10), op: wal.Insert, row: part}}
	if v, err = judge(half, own, merging{fetch: ask}); err != nil || string(v.row[2].Data) != "fetched" || v.records[0].decision.Code != conflict.Filled {
		t.Errorf("key change onto another row: %+v, %v", v, err)
	}
	// The rival had been seen: what stands here is what the origin changed.
	chain[1].txn.Seen = []wal.Seen{{Site: 2, LSN: 5}}
	if v, err = judge(chain[1:], rival, merging{fetch: gone}); err != nil || string(v.row[2].Data) != "theirs" || len(v.records) != 0 {
		t.Errorf("seen: %+v, %v", v, err)
	}
}

// abreast: nothing is missing of third sites.
func abreast(*wal.Txn) bool { return false }

// newTestLocal is a history whose tables have the key of planRelation.
func newTestLocal() *History {
	l := NewHistory(2, 0, NewKeys("", ""))
	l.keys = func(*wal.Relation) ([]namedKey, error) { return []namedKey{{"id", normExact}}, nil }
	return l
}

func localTxnAt(n int, raw wal.Time, changes ...wal.Change) *wal.Txn {
	return &wal.Txn{Origin: 2, XID: uint32(n), EndLSN: wal.LSN(n * 10), CommitTime: raw, VersionTime: raw, Changes: changes}
}

func deleteOf(key string) wal.Change {
	return wal.Change{Op: wal.Delete, Relation: planRelation, OldKind: wal.OldKey, Old: wal.Tuple{text(key), {Kind: wal.Omitted}, {Kind: wal.Omitted}}}
}

// TestSafeBeforeNeverCoversAnUnseenCommit: a local transaction that the peer has not seen never has a commit time below
// safeBefore, if it is decoded; whatever is pruned meanwhile, and also when the clock steps back. What is seen by
// everybody, and older, lies below it.
func TestSafeBeforeNeverCoversAnUnseenCommit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := newTestLocal()
		now := wal.Time(1e9)
		var all []*wal.Txn
		pruned := 0
		for n := 1; n <= rapid.IntRange(1, 30).Draw(t, "transactions"); n++ {
			now = now.Add(time.Duration(rapid.IntRange(0, 200).Draw(t, "pause")) * time.Millisecond)
			if rapid.IntRange(0, 9).Draw(t, "step") == 0 {
				now = now.Add(-time.Duration(rapid.IntRange(0, 5000).Draw(t, "back")) * time.Millisecond)
			}
			// Commit times regress a little in LSN order.
			all = append(all, localTxnAt(n, now.Add(-time.Duration(rapid.IntRange(0, 49).Draw(t, "regress"))*time.Millisecond)))
			if err := l.Add(all[n-1]); err != nil {
				t.Fatal(err)
			}
			if rapid.IntRange(0, 4).Draw(t, "prune") == 0 {
				pruned = rapid.IntRange(pruned, n).Draw(t, "seen by all")
				l.Prune(wal.LSN(pruned*10), now.Add(time.Duration(rapid.IntRange(0, 20).Draw(t, "later"))*time.Second))
			}
		}
		seen := rapid.IntRange(pruned, len(all)).Draw(t, "seen")
		safe := l.safeBefore(wal.LSN(seen * 10))
		want := wal.Time(math.MaxInt64)
		for _, txn := range all[seen:] {
			want = min(want, txn.CommitTime)
			if k, ok := l.lookup(txn.XID); !ok || k.made != txn.Version() || k.end != txn.EndLSN {
				t.Fatalf("transaction %d is unseen, and forgotten: %+v", txn.XID, k)
			}
		}
		if safe != want {
			t.Fatalf("safe before %s, want %s", safe, want)
		}
	})
}

// TestDecodedBelowNeverCoversAnUndecodedCommit: transactions begin, get xids and commit in any order; snapshots are taken,
// and decoding follows the commits some way behind.
func TestDecodedBelowNeverCoversAnUndecodedCommit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := newTestLocal()
		next, end, decoded := 100, 0, 0
		var running []int
		commits := map[int]int{} // xid -> LSN
		best := 0
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			switch rapid.IntRange(0, 3).Draw(t, "step") {
			case 0:
				running = append(running, next)
				next++
			case 1:
				if len(running) > 0 {
					i := rapid.IntRange(0, len(running)-1).Draw(t, "which")
					end++
					commits[running[i]] = end
					running = slices.Delete(running, i, i+1)
				}
			case 2:
				xmin := slices.Min(append(slices.Clone(running), next))
				if err := l.takeSnapshot([][]byte{fmt.Append(nil, xmin), []byte(wal.LSN(end).String())}); err != nil {
					t.Fatal(err)
				}
			case 3:
				decoded = rapid.IntRange(decoded, end).Draw(t, "decoded")
				l.Advance(wal.LSN(decoded))
			}
			below, ok := l.decodedBelow()
			if !ok {
				continue
			}
			if int(below) < best {
				t.Fatalf("it went back from %d to %d", best, below)
			}
			best = int(below)
			for xid, at := range commits {
				if xid < best && at > decoded {
					t.Fatalf("transaction %d has committed at %d, decoding is at %d, and it counts as decoded (below %d)", xid, at, decoded, best)
				}
			}
			if slices.ContainsFunc(running, func(xid int) bool { return xid < best }) {
				t.Fatalf("a running transaction of %v counts as decoded (below %d)", running, best)
			}
		}
	})
}

func TestTombstones(t *testing.T) {
	l := newTestLocal()
	move := wal.Change{
		Op: wal.Update, Relation: planRelation, OldKind: wal.OldKey, Old: wal.Tuple{text("3"), {Kind: wal.Omitted}, {Kind: wal.Omitted}},
		New: wal.Tuple{text("4"), text(""), {Kind: wal.Unchanged}},
	}
	touch := wal.Change{ // REPLICA IDENTITY FULL sends the old row with every update
		Op: wal.Update, Relation: planRelation, OldKind: wal.OldFull, Old: wal.Tuple{text("5"), text(""), text("")}, New: wal.Tuple{text("5"), text(""), text("")},
	}
	truncate := wal.Change{Op: wal.Truncate, Relation: planRelation}
	for n, changes := range [][]wal.Change{{deleteOf("1"), deleteOf("2")}, {move, touch}, {deleteOf("1")}, {truncate}, {deleteOf("2")}} {
		if err := l.Add(localTxnAt(n+1, wal.Time(n+1), changes...)); err != nil {
			t.Fatal(err)
		}
	}
	key := func(k string) string { return string(appendKey(nil, normExact, []byte(k))) }
	check := func(what string, want map[string]wal.Time) {
		t.Helper()
		for _, k := range []string{"1", "2", "3", "4", "5"} {
			s, ok := l.tombstone("public.t", key(k))
			if ok != (want[k] != 0) || s.made.Time != want[k] || ok && (s.made.Site != 2 || s.end != wal.LSN(want[k]*10)) {
				t.Errorf("%s: tombstone of %s: %+v, %t; want time %d", what, k, s, ok, want[k])
			}
		}
	}
	check("all", map[string]wal.Time{"1": 4, "2": 5, "3": 4, "4": 4, "5": 4})
	if _, ok := l.tombstone("public.other", key("1")); ok {
		t.Error("another table has a tombstone")
	}
	l.Prune(30, 100)
	check("three seen", map[string]wal.Time{"1": 4, "2": 5, "3": 4, "4": 4, "5": 4})
	l.Prune(40, 100)
	check("the truncate seen", map[string]wal.Time{"2": 5})
	l.Prune(50, 100)
	check("all seen", nil)
	if s := l.Stats(); s.Tombstones != 0 || s.Position != 50 {
		t.Errorf("stats %+v", s)
	}
	if _, ok := l.lookup(5); !ok {
		t.Error("a transaction is forgotten at once, although its rows may be met")
	}
	l.Prune(50, wal.Time(100).Add(time.Minute))
	if _, ok := l.lookup(5); ok {
		t.Error("a transaction is never forgotten")
	}
}

// TestAddIsOfferedAgain: a key that cannot be read leaves the transaction to be added again.
func TestAddIsOfferedAgain(t *testing.T) {
	l := newTestLocal()
	keys := l.keys
	l.keys = func(*wal.Relation) ([]namedKey, error) { return nil, errors.New("no connection") }
	txn := localTxnAt(1, 1, deleteOf("1"))
	if err := l.Add(txn); err == nil || l.Position() != 0 {
		t.Fatalf("%v, position %s", err, l.Position())
	}
	l.keys = keys
	if err := l.Add(txn); err != nil || l.Position() != 10 {
		t.Fatalf("%v, position %s", err, l.Position())
	}
	if _, ok := l.tombstone("public.t", string(appendKey(nil, normExact, []byte("1")))); !ok {
		t.Error("the tombstone is missing")
	}
	if err := l.WaitFor(t.Context(), 10); err != nil {
		t.Error(err)
	}
}

// equalTexts asks PostgreSQL for its output text of values and which pairs of them it holds equal.
func equalTexts(t *testing.T, c *pgconn.PgConn, typ string, values []string) (texts []string, equal map[[2]int]bool) {
	t.Helper()
	lit := make([]byte, 0, 1024)
	lit = append(lit, '{')
	for i, v := range values {
		if i > 0 {
			lit = append(lit, ',')
		}
		lit = appendElement(lit, text(v))
	}
	lit = append(lit, '}')
	res := c.ExecParams(t.Context(), "SELECT v FROM unnest($1::text[]) WITH ORDINALITY AS u(s, o), LATERAL (SELECT s::"+typ+") AS x(v) ORDER BY o", [][]byte{lit}, nil, nil, nil).Read()
	if res.Err != nil {
		t.Fatal(res.Err)
	}
	for _, r := range res.Rows {
		texts = append(texts, string(r[0]))
	}
	res = c.ExecParams(t.Context(), `SELECT a.o, b.o FROM unnest($1::text[]) WITH ORDINALITY AS a(s, o), unnest($1::text[]) WITH ORDINALITY AS b(s, o)
		WHERE a.s::`+typ+" = b.s::"+typ, [][]byte{lit}, nil, nil, nil).Read()
	if res.Err != nil {
		t.Fatal(res.Err)
	}
	equal = map[[2]int]bool{}
	for _, r := range res.Rows {
		i, _ := strconv.Atoi(string(r[0]))
		j, _ := strconv.Atoi(string(r[1]))
		equal[[2]int{i - 1, j - 1}] = true
	}
	return texts, equal
}

// randomKeyValue draws values that are often equal in different spelling.
func randomKeyValue(rng *rand.Rand, typ string) string {
	pick := func(s ...string) string { return s[rng.IntN(len(s))] }
	switch typ {
	case "numeric":
		return pick("-", "") + pick("0", "1", "10", "100", "1.5", "0.001", "1e3", "1e-3", "12.340", "NaN", "Infinity")
	case "float8", "float4":
		return pick("0", "-0", "0.0", "1", "1.0", "1e0", "NaN", "Infinity", "-Infinity", "1e-30", "0.1", "100000000000000000000", "1e20")
	case "interval":
		var parts []string
		for _, unit := range []string{"years", "mons", "days", "hours", "seconds"} {
			if rng.IntN(2) == 0 {
				parts = append(parts, pick("-", "")+pick("0", "1", "2", "12", "24", "30", "720")+" "+unit)
			}
		}
		parts = append(parts, "0 minutes")
		return pick(strings.Join(parts, " "), "1 mon", "30 days", "720 hours", "1 day -24:00", "0", "12 mons", "360 days", "1 year", "-1 mon", "-30 days",
			"-00:00:00.000001", "178000000 years", "2562047788:00:54.775807", "1 year 2 mons -3 days +04:05:06.7")
	case "char(6)", "bpchar":
		return pick("", " ", "a", "a ", "a  ", " a", "A", "ab", "a\t")
	case "inet":
		return pick("10.0.0.1", "10.0.0.1/32", "10.0.0.1/24", "10.0.0.0/24", "::1", "::1/128", "::ffff:10.0.0.1")
	case "timestamptz":
		return pick("2026-01-01 00:00+00", "2026-01-01 09:00+09", "2025-12-31 19:00-05", "infinity", "2026-01-01 00:00:00.1+00", "2026-01-01 00:00:00.10+00")
	case "timetz":
		return pick("00:00+00", "09:00+09", "12:00+00", "12:00:00.0+00", "21:00+09")
	case "uuid":
		return pick("{00000000-0000-0000-0000-000000000001}", "00000000000000000000000000000001", "00000000-0000-0000-0000-000000000002")
	case "varbit":
		return pick("", "0", "00", "1", "01", "001")
	case "int4range":
		return pick("[1,3]", "[1,4)", "(0,4)", "empty", "[3,3)", "(,4)", "[,3]")
	case "tsrange":
		return pick("[2026-01-01,2026-01-02)", "[2026-01-01 00:00,2026-01-02)", "[2026-01-01,2026-01-02]", "empty")
	case "money":
		return pick("1", "1.00", "$1.00", "-1", "1,000", "1000")
	case "macaddr":
		return pick("08:00:2b:01:02:03", "08002b:010203", "08-00-2b-01-02-04")
	}
	return pick("", " ", "a", "A", "a ", "é", "e\u0301", "ß", "ss", "\\", "'") // text and its kin
}

// TestNormsAgreeWithPostgreSQL: two key values have one normal form exactly if PostgreSQL holds them equal.
func TestNormsAgreeWithPostgreSQL(t *testing.T) {
	seed := newSeed(t)
	rng := rand.New(rand.NewPCG(seed, 3))
	cluster := pgtest.New(t)
	c, err := pg.Connect(t.Context(), cluster.DSN("postgres", ""), "postgres", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(c)
	for _, typ := range []string{
		"numeric", "numeric(20,4)", "float8", "float4", "interval", "char(6)", "bpchar", "inet", "timestamptz", "timetz", "uuid",
		"varbit", "int4range", "tsrange", "money", "macaddr", "text", "varchar", "name", "bytea",
	} {
		base, _, _ := strings.Cut(typ, "(20")
		var values []string
		for range 60 {
			v := randomKeyValue(rng, base)
			if typ == "numeric(20,4)" && strings.HasSuffix(v, "Infinity") || v == "-NaN" || typ == "bytea" && strings.Contains(v, `\`) {
				v = "1"
			}
			values = append(values, v)
		}
		oid := run(t, c, "SELECT '"+base+"'::regtype::oid")[0][0]
		n, _ := strconv.ParseUint(oid, 10, 32)
		norm := normOf(uint32(n), "b", true)
		if norm == normUnsupported {
			t.Errorf("%s (%s) is not supported as a key", typ, oid)
			continue
		}
		texts, equal := equalTexts(t, c, typ, values)
		for i := range texts {
			for j := range texts {
				same := bytes.Equal(appendKey(nil, norm, []byte(texts[i])), appendKey(nil, norm, []byte(texts[j])))
				if same != equal[[2]int{i, j}] {
					t.Errorf("%s: %q and %q: equal in PostgreSQL: %t, by norm: %t", typ, texts[i], texts[j], !same, same)
				}
			}
		}
	}
}

// TestKeysAreSelfDelimiting: composite keys cannot run into one another.
func TestKeysAreSelfDelimiting(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		norms := []norm{normExact, normNumeric, normPadded}
		draw := func(label string) (vs []string, key []byte) {
			for _, n := range norms {
				v := rapid.StringMatching(`[ab0-9. ]{0,3}`).Draw(t, label)
				vs = append(vs, v)
				key = appendKey(key, n, []byte(v))
			}
			return vs, key
		}
		x, kx := draw("x")
		y, ky := draw("y")
		same := true
		for i, n := range norms {
			same = same && bytes.Equal(appendKey(nil, n, []byte(x[i])), appendKey(nil, n, []byte(y[i])))
		}
		if same != bytes.Equal(kx, ky) {
			t.Fatalf("%q and %q: keys equal %t, values equal %t", x, y, !same, same)
		}
	})
}

func TestUnsupportedKeys(t *testing.T) {
	for _, tc := range []struct {
		oid           uint32
		typtype       string
		deterministic bool
		want          norm
	}{
		{25, "b", true, normExact},
		{25, "b", false, normUnsupported},   // text under a nondeterministic collation
		{1042, "b", false, normUnsupported}, // the same for character(n)
		{3802, "b", true, normUnsupported},  // jsonb: 1.0 equals 1.00 inside
		{3906, "r", true, normUnsupported},  // numrange, likewise
		{1231, "b", true, normUnsupported},  // numeric[]
		{99999, "b", true, normUnsupported}, // an extension's type, such as citext
		{99999, "c", true, normUnsupported}, // a composite
		{99999, "e", true, normExact},       // an enum
		{1700, "b", true, normNumeric},
	} {
		if got := normOf(tc.oid, tc.typtype, tc.deterministic); got != tc.want {
			t.Errorf("%+v: got %d", tc, got)
		}
	}
}

// TestArrayLiteralsAreReadBack: what appendElement writes, PostgreSQL reads as the same values.
func TestArrayLiteralsAreReadBack(t *testing.T) {
	seed := newSeed(t)
	rng := rand.New(rand.NewPCG(seed, 4))
	cluster := pgtest.New(t)
	c, err := pg.Connect(t.Context(), cluster.DSN("postgres", ""), "postgres", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(c)
	alphabet := []rune("ab{},\"\\' \t\n\r\v\f;:=[]()NULLnull019.-+é한\U0001F600\u00a0\x01\x7f")
	want := []wal.Value{{Kind: wal.Null}, text(""), text("NULL"), text("null"), text("-"), text("."), text("1e5"), text("{}"), text(`"`)}
	for range 3000 {
		var b strings.Builder
		for range rng.IntN(8) {
			b.WriteRune(alphabet[rng.IntN(len(alphabet))])
		}
		if !utf8.ValidString(b.String()) {
			t.Fatalf("%q", b.String())
		}
		want = append(want, text(b.String()))
	}
	lit := []byte{'{'}
	for i, v := range want {
		if i > 0 {
			lit = append(lit, ',')
		}
		lit = appendElement(lit, v)
	}
	lit = append(lit, '}')
	res := c.ExecParams(t.Context(), "SELECT unnest($1::text[])", [][]byte{lit}, nil, nil, nil).Read()
	if res.Err != nil || len(res.Rows) != len(want) {
		t.Fatalf("%d of %d values: %v", len(res.Rows), len(want), res.Err)
	}
	for i, r := range res.Rows {
		if (r[0] == nil) != (want[i].Kind == wal.Null) || string(r[0]) != string(want[i].Data) {
			t.Fatalf("value %d: got %q, want %q", i, r[0], want[i].Data)
		}
	}
}

func TestRecordJSON(t *testing.T) {
	row := wal.Tuple{text("1"), {Kind: wal.Null}, {Kind: wal.Unchanged}}
	if got := string(rowJSON(planRelation, row)); got != `{"id":"1","v":null}` {
		t.Errorf("got %s", got)
	}
	row = wal.Tuple{text("1"), text("\"\\\n</é\u2028\x01"), {Kind: wal.Omitted}}
	if d := cmp.Diff(`{"id":"1","v":"\"\\\n\u003c/é\u2028\u0001"}`, string(rowJSON(planRelation, row))); d != "" {
		t.Error(d)
	}
	if rowJSON(planRelation, nil) != nil {
		t.Error("no row is not null")
	}
}

func BenchmarkPlan(b *testing.B) {
	var txns []*wal.Txn
	for i := range 1000 {
		txn := &wal.Txn{Origin: 1}
		for j := range 3 {
			txn.Changes = append(txn.Changes, wal.Change{Op: wal.Update, Relation: planRelation, New: wal.Tuple{text(strconv.Itoa((i*7 + j*31) % 500)), text("value"), text("big")}})
		}
		txns = append(txns, txn)
	}
	g, err := planResolver(planRelation)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		p, err := planTxns(txns, func(*wal.Relation) (*target, error) { return g, nil }, abreast, true)
		if err != nil {
			b.Fatal(err)
		}
		p.cut()
		for _, tw := range p.batch.waves[0].tables {
			for _, o := range fastOps(tw) {
				if len(o.call(everyRow("1")).params) == 0 {
					b.Fatal(fmt.Errorf("no parameters"))
				}
			}
		}
	}
}

// TestTracesLeaveTheSameHistory: what a history keeps of transactions judges as the transactions themselves do, and has no values
// of rows that still stand.
func TestTracesLeaveTheSameHistory(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		whole, traced := newTestLocal(), newTestLocal()
		columns := rapid.Bool().Draw(t, "column mode")
		for _, l := range []*History{whole, traced} {
			l.columnMode = func(*wal.Relation) bool { return columns }
		}
		key := func(name string) string { return fmt.Sprint(rapid.IntRange(1, 5).Draw(t, name)) }
		row := func(k string) wal.Tuple {
			return wal.Tuple{text(k), text(rapid.SampledFrom([]string{"x", "y"}).Draw(t, "v")), {Kind: wal.Null}}
		}
		for n := 1; n <= rapid.IntRange(1, 20).Draw(t, "transactions"); n++ {
			var changes []wal.Change
			for range rapid.IntRange(0, 4).Draw(t, "changes") {
				k := key("key")
				c := wal.Change{Op: wal.Insert, Relation: planRelation, New: row(k)}
				switch rapid.IntRange(0, 5).Draw(t, "op") {
				case 0:
					c = deleteOf(k)
				case 1:
					c = wal.Change{Op: wal.Update, Relation: planRelation, OldKind: wal.OldFull, Old: row(k), New: row(key("new key"))}
				case 2:
					c = wal.Change{Op: wal.Truncate, Relation: planRelation}
				case 3:
					c = wal.Change{Op: wal.Update, Relation: planRelation, OldKind: wal.OldFull, Old: row(k), New: row(k)}
				}
				changes = append(changes, c)
			}
			txn := localTxnAt(n, wal.Time(1000*n+rapid.IntRange(-1500, 1500).Draw(t, "time")), changes...)
			trace, err := whole.Trace(txn)
			if err == nil {
				err = errors.Join(whole.Add(txn), traced.Add(trace))
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range trace.Changes {
				if !columns && c.Op == wal.Insert || !columns && c.Op == wal.Update && string(c.Old[0].Data) == string(c.New[0].Data) {
					t.Fatalf("the trace keeps %s of a row that stands", c.Op)
				}
			}
		}
		same := func(what string, a, b any) {
			if d := cmp.Diff(a, b, cmp.AllowUnexported(past{}, minimum{}, deadKey{}, grave{}, touched{})); d != "" {
				t.Fatalf("%s: %s", what, d)
			}
		}
		same("graves", whole.graves, traced.graves)
		same("dead", whole.dead, traced.dead)
		same("truncated", whole.all, traced.all)
		same("transactions", whole.txns, traced.txns)
		same("by xid", whole.byXID, traced.byXID)
		same("minima", whole.minima, traced.minima)
		same("touches", whole.touches, traced.touches)
	})
}
