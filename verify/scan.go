package verify

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// partBitsMax bounds the parts of a table, and so the size of a Sum.
const partBitsMax = 15

// pair is one row of a table that is compared by parts: the hashes of key and row.
type pair struct{ key, row uint64 }

// chunks cuts all leaves of a table.
func (db *DB) chunks(ctx context.Context, v *view) ([]chunk, error) {
	var out []chunk
	for _, leaf := range v.Leaves {
		res, err := db.query(ctx, v, sizeQuery(leaf), false)
		if err != nil {
			return nil, err
		}
		var n [3]int64
		for i := range n {
			if n[i], err = strconv.ParseInt(string(res.Rows[0][i]), 10, 64); err != nil {
				return nil, fmt.Errorf("read size of %s: %w", leaf, err)
			}
		}
		out = append(out, chunksOf(leaf, n[0], n[1], n[2])...)
	}
	return out, nil
}

func sizeQuery(leaf string) *query {
	q := &query{params: [][]byte{[]byte(leaf)}}
	q.WriteString(leafSizeSQL)
	return q
}

// hashParts reads the hashes of the rows chunk by chunk and puts them in order here: one statement over the whole
// table would hold its snapshot for the whole time. A row that moves meanwhile may be seen twice or not at all; it is
// a row in flight then.
func (db *DB) hashParts(ctx context.Context, v *view, r Range) (Sum, error) {
	chunks, err := db.chunks(ctx, v)
	if err != nil {
		return Sum{}, err
	}
	var pairs []pair
	for _, c := range chunks {
		q, err := v.chunkHashSQL(r, c)
		if err != nil {
			return Sum{}, err
		}
		res, err := db.query(ctx, v, q, true)
		if err != nil {
			return Sum{}, err
		}
		for b := res.Rows[0][0]; len(b) >= 16; b = b[16:] {
			pairs = append(pairs, pair{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])})
		}
	}
	return sumOf(pairs, r.Parts.Bits), nil
}

// sumOf makes the digests of parts. It sorts pairs.
func sumOf(pairs []pair, bits int) Sum {
	slices.SortFunc(pairs, func(a, b pair) int { return cmp.Or(cmp.Compare(a.key, b.key), cmp.Compare(a.row, b.row)) })
	sum := Sum{Rows: int64(len(pairs))}
	all := sha256.New()
	for len(pairs) > 0 {
		index := partOf(pairs[0].key, bits)
		n := 1
		for n < len(pairs) && partOf(pairs[n].key, bits) == index {
			n++
		}
		h := sha256.New()
		for _, p := range pairs[:n] {
			var b [16]byte
			binary.BigEndian.PutUint64(b[:], p.key)
			binary.BigEndian.PutUint64(b[8:], p.row)
			h.Write(b[:])
		}
		part := PartSum{Index: index, Rows: int64(n), Digest: hex.EncodeToString(h.Sum(nil)[:16])}
		fmt.Fprintln(all, part.Index, part.Rows, part.Digest)
		sum.Parts = append(sum.Parts, part)
		pairs = pairs[n:]
	}
	sum.Digest = hex.EncodeToString(all.Sum(nil)[:16])
	return sum
}

// partOf gives the leading bits of a hash. (A shift by 64 is 0 in Go.)
func partOf(hash uint64, bits int) int { return int(hash >> (64 - bits)) }

// scanRows reads rows by Parts or Hashes chunk by chunk. Without a key, equal rows are one, and counted unless r asks for
// images.
func (db *DB) scanRows(ctx context.Context, v *view, r Range, limit int) ([]Row, error) {
	chunks, err := db.chunks(ctx, v)
	if err != nil {
		return nil, err
	}
	var rows []Row
	seen := map[string]int{} // hash -> index into rows
	for _, c := range chunks {
		q, err := v.chunkRowsSQL(r, c, limit+1) // some may be in rows already
		if len(v.key) == 0 && r.ImageBytes == 0 {
			q, err = v.chunkCopiesSQL(r, c)
		}
		if err != nil {
			return nil, err
		}
		res, err := db.query(ctx, v, q, false)
		if err != nil {
			return nil, err
		}
		for _, values := range res.Rows {
			rows = v.collect(rows, seen, values, r)
		}
		if len(rows) >= limit {
			return rows[:limit], nil
		}
	}
	return rows, nil
}

// collect adds a row of a chunk.
func (v *view) collect(rows []Row, seen map[string]int, values [][]byte, r Range) []Row {
	if len(v.key) > 0 {
		return append(rows, v.row(values, r.ImageBytes))
	}
	hash, copies := string(values[0]), int64(1)
	if r.ImageBytes == 0 {
		if n, err := strconv.ParseInt(string(values[1]), 10, 64); err == nil { // it is a count(*)
			copies = n
		}
		values = values[:1]
	}
	if i, ok := seen[hash]; ok {
		rows[i].Copies += copies
		return rows
	}
	seen[hash] = len(rows)
	row := v.row(values, r.ImageBytes)
	row.Copies = copies
	return append(rows, row)
}

// cutImage converts a value; NULL is nil. A value longer than most bytes (unless that is negative) is cut, and then
// ends in its length and digest, so that values that differ behind the cut still differ.
func cutImage(value []byte, most int) *string {
	if value == nil {
		return nil
	}
	s := string(value)
	if most >= 0 && len(s) > most {
		s = fmt.Sprintf("%s... (%d bytes, sha256 %x)", strings.ToValidUTF8(s[:most], ""), len(s), sha256.Sum256(value))
	}
	return &s
}
