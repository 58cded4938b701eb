package verify

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
)

// fakeSide is a Side of function fields; memSide fills them from memory.
type fakeSide struct {
	name   string
	tables func() ([]Table, error)
	bounds func(Table, Range, int) ([]Key, error)
	hash   func(Table, Range, int) (Sum, error)
	rows   func(Table, Range, int) ([]Row, error)
	hashed func(rows [][]*string) []string
}

func (f *fakeSide) hashes(_ context.Context, _ Table, _ Digest, rows [][]*string) ([]string, error) {
	return f.hashed(rows), nil
}

func (f *fakeSide) Name() string                            { return f.name }
func (f *fakeSide) Tables(context.Context) ([]Table, error) { return f.tables() }
func (f *fakeSide) Bounds(_ context.Context, t Table, r Range, n int) ([]Key, error) {
	return f.bounds(t, r, n)
}

func (f *fakeSide) Hash(_ context.Context, t Table, r Range, n int) (Sum, error) {
	return f.hash(t, r, n)
}

func (f *fakeSide) Rows(_ context.Context, t Table, r Range, n int) ([]Row, error) {
	return f.rows(t, r, n)
}

// memTable is one table in memory: key -> value, or without key just values.
type memTable struct {
	mu    sync.Mutex
	order string
	keyed bool
	data  map[string]string
	heap  []string
	// onRead is called before each read, with the table unlocked; it may write.
	onRead func()
}

// newMem gives a Side with the table m.t, whose contract it keeps as the comment of Side says.
func newMem(name string, m *memTable) *fakeSide {
	hashed := func(rows [][]*string) (all []string) {
		for _, r := range rows {
			all = append(all, memHash(*r[1]))
		}
		return all
	}
	return &fakeSide{name: name, tables: m.tables, bounds: m.bounds, hash: m.hash, rows: m.rows, hashed: hashed}
}

func (m *memTable) tables() ([]Table, error) {
	t := Table{Schema: "m", Name: "t", Columns: []Column{{"k", "text"}, {"v", "text"}}, HashID: "mem", Order: m.order}
	if m.keyed {
		t.Key = []string{"k"}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	t.Rows = int64(len(m.data) + len(m.heap))
	return []Table{t}, nil
}

// read gives the rows in r, sorted by key; in a table without key, all of them.
func (m *memTable) read(r Range) []Row {
	if m.onRead != nil {
		m.onRead()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var rows []Row
	for _, k := range m.chosen(r) {
		v := m.data[k]
		rows = append(rows, Row{Key: Key{k}, Hash: memHash(k, v), Copies: 1, Image: []*string{&k, &v}})
	}
	for _, v := range m.heap {
		rows = append(rows, Row{Hash: memHash(v), Copies: 1, Image: []*string{nil, &v}})
	}
	rows = slices.DeleteFunc(rows, func(row Row) bool { return !memWithin(r, row) })
	slices.SortFunc(rows, func(a, b Row) int { return strings.Compare(idOf(a), idOf(b)) })
	return rows
}

// chosen gives the keys that r may choose, so that not every row is hashed for every range.
func (m *memTable) chosen(r Range) (keys []string) {
	for _, k := range r.Keys {
		if _, ok := m.data[k[0]]; ok {
			keys = append(keys, k[0])
		}
	}
	if r.Keys != nil {
		return keys
	}
	for k := range m.data {
		if !ordered(r) || (r.After == nil || k > r.After[0]) && (r.UpTo == nil || k <= r.UpTo[0]) {
			keys = append(keys, k)
		}
	}
	return keys
}

func memHash(s ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(s, "\x00")))
	return hex.EncodeToString(sum[:8])
}

func memWithin(r Range, row Row) bool {
	switch {
	case r.Hashes != nil:
		return slices.Contains(r.Hashes, row.Hash)
	case r.Parts != nil:
		return slices.Contains(r.Parts.Index, partOf(memPair(row).key, r.Parts.Bits))
	}
	return true
}

func memPair(row Row) pair {
	number := func(h string) uint64 { b, _ := hex.DecodeString(h); return binary.BigEndian.Uint64(b) }
	if row.Key == nil {
		return pair{number(row.Hash), number(row.Hash)}
	}
	return pair{number(memHash(row.Key[0])), number(row.Hash)}
}

func (m *memTable) bounds(_ Table, r Range, n int) ([]Key, error) {
	var keys []Key
	for i, row := range m.read(r) {
		if (i+1)%n == 0 {
			keys = append(keys, row.Key)
		}
	}
	return keys, nil
}

func (m *memTable) hash(_ Table, r Range, limit int) (Sum, error) {
	rows := m.read(r)
	if r.Parts != nil {
		var pairs []pair
		for _, row := range rows {
			pairs = append(pairs, memPair(row))
		}
		return sumOf(pairs, r.Parts.Bits), nil
	}
	if len(rows) > limit {
		return Sum{Rows: int64(limit + 1), Truncated: true}, nil
	}
	var all []string
	for _, row := range rows {
		all = append(all, row.Hash)
	}
	return Sum{Rows: int64(len(rows)), Digest: memHash(all...)}, nil
}

func (m *memTable) rows(_ Table, r Range, limit int) ([]Row, error) {
	var out []Row
	for _, row := range m.read(r) {
		if n := len(out); !m.keyed && n > 0 && out[n-1].Hash == row.Hash {
			out[n-1].Copies++
			continue
		}
		if r.ImageBytes == 0 {
			row.Image = nil
		}
		out = append(out, row)
	}
	return out[:min(len(out), limit)], nil
}

// set writes a row; empty deletes it.
func (m *memTable) set(k, v string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if v == "" {
		delete(m.data, k)
	} else {
		m.data[k] = v
	}
}

// memPairOf gives two equal tables of n rows.
func memPairOf(n int) (a, b *memTable) {
	a = &memTable{keyed: true, order: "bytes", data: map[string]string{}}
	b = &memTable{keyed: true, order: "bytes", data: map[string]string{}}
	for i := range n {
		k := fmt.Sprintf("%07d", i)
		a.data[k], b.data[k] = "v", "v"
	}
	return a, b
}

// throughRemote puts a Side behind Serve, as the link does.
func throughRemote(s Side) Side {
	return NewRemote(s.Name(), func(ctx context.Context, req []byte) ([]byte, error) { return Serve(ctx, s, req) })
}

func mustRun(t testing.TB, a, b Side, o Options) Report {
	t.Helper()
	rep, err := Run(context.Background(), a, b, o)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}
