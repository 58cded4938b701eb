package verify

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/duri-io/duri/internal/pg"
)

// Chosen are the rows of a table that a comparison is restricted to. The zero value is none.
type Chosen struct {
	All  bool  // the whole table
	Keys []Key // of a table with a key
	// Rows are the values of all columns, in the order of Table.Columns, of rows of a table without key; nil is NULL.
	Rows [][]*string
}

// hasher is a Side that tells the hash of a row that it need not have.
type hasher interface {
	hashes(ctx context.Context, t Table, by Digest, rows [][]*string) ([]string, error)
}

// passChosen is the first pass when only some rows are compared.
func (c *comparison) passChosen(ctx context.Context, chosen Chosen) error {
	var ranges []Range
	if len(c.t.Key) > 0 {
		for some := range slices.Chunk(chosen.Keys, min(lookRows, c.rangeRows)) {
			ranges = append(ranges, Range{By: c.by, Keys: some})
		}
	} else if len(chosen.Rows) > 0 {
		hashes, err := c.hashesOf(ctx, chosen.Rows)
		if err != nil {
			return err
		}
		for some := range slices.Chunk(hashes, suspectsMax) {
			ranges = append(ranges, Range{By: c.by, Hashes: some})
		}
	}
	return c.forRanges(ctx, ranges, func(ctx context.Context, r Range) error {
		n := int64(len(r.Keys) + len(r.Hashes))
		c.count([2]Sum{{Rows: n}, {Rows: n}})
		if c.postpone(r) {
			return nil
		}
		_, err := c.suspect(ctx, r, int(n)+1)
		return err
	})
}

func (c *comparison) hashesOf(ctx context.Context, rows [][]*string) ([]string, error) {
	for _, s := range c.sides {
		if h, ok := s.(hasher); ok {
			all, err := h.hashes(ctx, c.t, c.by, rows)
			slices.Sort(all)
			return slices.Compact(all), err
		}
	}
	return nil, fmt.Errorf("compare some rows of %s, which has no key: neither side can tell their hashes", c.t)
}

// hashes is hasher.hashes: what rows with these values are hashed to here.
func (db *DB) hashes(ctx context.Context, t Table, by Digest, rows [][]*string) ([]string, error) {
	v, err := db.view(ctx, t)
	if err != nil {
		return nil, err
	}
	h, err := v.rowHash(by)
	if err != nil {
		return nil, err
	}
	var out []string
	for some := range slices.Chunk(rows, lookRows) {
		res, err := db.query(ctx, v, v.hashesSQL(h, some), false)
		if err != nil {
			return nil, err
		}
		for _, row := range res.Rows {
			out = append(out, string(row[0]))
		}
	}
	return out, nil
}

// hashesSQL hashes rows that are given by their values, as if they were in the table.
func (v *view) hashesSQL(hash string, rows [][]*string) *query {
	q := &query{}
	if len(v.asked) == 0 { // a table without columns
		q.printf("SELECT lpad(to_hex(%s), 16, '0') FROM generate_series(1, %d) AS t", hash, len(rows))
		return q
	}
	arrays, names, columns := make([]string, len(v.asked)), make([]string, len(v.asked)), make([]string, len(v.asked))
	for i, c := range v.asked {
		values := make([]string, len(rows))
		for j, row := range rows {
			values[j] = "NULL"
			if row[i] != nil {
				values[j] = arrayElement(*row[i])
			}
		}
		arrays[i] = q.param("{"+strings.Join(values, ",")+"}") + "::text[]"
		names[i] = fmt.Sprintf("c%d", i)
		columns[i] = fmt.Sprintf("u.c%d::%s AS %s", i, c.Type, pg.QuoteIdent(c.Name))
	}
	q.printf("SELECT lpad(to_hex(%s), 16, '0') FROM (SELECT %s FROM unnest(%s) AS u(%s)) AS t",
		hash, strings.Join(columns, ", "), strings.Join(arrays, ", "), strings.Join(names, ", "))
	return q
}
