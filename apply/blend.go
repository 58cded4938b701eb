package apply

import (
	"context"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"strings"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// Tables may be declared to blend concurrent changes of a row instead of taking the greater version's whole row: delta
// columns merge by adding differences (rule 13), and in column mode changes of different columns both stand (rule 14).
// An older change then still contributes to the row, whose version stays the greater one; duri.version keeps it. Such
// tables have REPLICA IDENTITY FULL, so that every update carries the old row. Inserts and deletes are whole rows in any
// case.

// blend is how a target's rows merge.
type blend struct {
	delta   []bool // by relation column: merges by adding differences
	columns bool   // changes of different columns both stand
}

func newBlend(t policy.Table, rel *wal.Relation) *blend {
	if !t.NeedsFull() {
		return nil
	}
	b := &blend{delta: make([]bool, len(rel.Columns)), columns: t.Mode == policy.ModeColumn}
	for i, c := range rel.Columns {
		b.delta[i] = slices.Contains(t.Delta, c.Name)
	}
	return b
}

// checkFull refuses an update of a blended table that does not carry the old row.
func checkFull(g *target, c *wal.Change) error {
	if g.blend == nil || c.Op != wal.Update || c.OldKind == wal.OldFull {
		return nil
	}
	return &TableError{
		g.String(), "an UPDATE arrives without the old row, which its delta columns or column mode need",
		"ALTER TABLE " + g.String() + " REPLICA IDENTITY FULL at the origin; what was written before that cannot be merged: take the declaration back until it has been applied",
	}
}

// blended is the row after an update that meets a live row: what is held, with what the change did to it. touched names
// the columns that a greater version has written since; nil when the change itself has the greatest version. lost
// reports that some column of the change does not stand.
func (b *blend) blended(r *ref, held wal.Tuple, wins bool, touched map[string]bool) (row wal.Tuple, changed, lost bool, err error) {
	row = slices.Clone(held)
	for i := range row {
		was, is := r.change.Old[i], r.row[i]
		if was.Kind == is.Kind && string(was.Data) == string(is.Data) {
			if wins && !b.columns && !b.delta[i] && is.Kind != wal.Unchanged {
				row[i] = is // the winner's whole row stands
			}
			continue
		}
		switch {
		case b.delta[i] && was.Kind == wal.Text && is.Kind == wal.Text && held[i].Kind == wal.Text:
			sum, err := addDifference(held[i].Data, was.Data, is.Data)
			if err != nil {
				return nil, false, false, err
			}
			row[i] = wal.Value{Kind: wal.Text, Data: sum}
			changed = true
		case wins, b.columns && !touched[r.change.Relation.Columns[i].Name]:
			row[i], changed = is, true
		default:
			lost = true
		}
	}
	return row, changed || wins, lost, nil
}

// addDifference is at + is - was, for integers and decimals as PostgreSQL prints them, with the most digits behind the
// point that any of them has.
func addDifference(at, was, is []byte) ([]byte, error) {
	var n [3]*big.Int
	var scales [3]int
	for i, text := range [][]byte{at, was, is} {
		digits, fraction, _ := strings.Cut(string(text), ".")
		v, ok := new(big.Int).SetString(digits+fraction, 10)
		if !ok {
			return nil, fmt.Errorf("a delta column holds %q, which cannot be added to", text)
		}
		n[i], scales[i] = v, len(fraction)
	}
	scale := max(scales[0], scales[1], scales[2])
	for i := range n {
		n[i].Mul(n[i], new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(scale-scales[i])), nil))
	}
	sum := n[0].Add(n[0], n[2].Sub(n[2], n[1]))
	if scale == 0 {
		return []byte(sum.String()), nil
	}
	sign := ""
	if sum.Sign() < 0 {
		sign = "-"
		sum.Neg(sum)
	}
	text := fmt.Sprintf("%0*s", scale+1, sum.String())
	return []byte(sign + text[:len(text)-scale] + "." + text[len(text)-scale:]), nil
}

// blendOne merges an update into a live row. touched finds the columns that greater versions have written.
func blendOne(b *blend, r *ref, h held, d conflict.Decision, touched func(*ref) map[string]bool) (held, conflict.Decision, bool, error) {
	var newer map[string]bool
	if b.columns && !d.Apply {
		newer = touched(r)
	}
	row, changed, lost, err := b.blended(r, h.image, d.Apply, newer)
	if err != nil {
		return h, d, false, err
	}
	next := h
	next.image = row
	if d.Apply {
		next = held{State: conflict.State{Existence: conflict.Live, Version: r.txn.Version()}, image: row}
	}
	switch {
	case d.Kind == conflict.None:
	case !lost && (b.columns || onlyDelta(b, r)): // both stand
		d.Kind, d.Code = conflict.None, conflict.AsSent
	case changed && !d.Apply:
		d.Code = conflict.Merged
	}
	return next, d, changed, nil
}

// onlyDelta reports whether an update changed delta columns only.
func onlyDelta(b *blend, r *ref) bool {
	for i := range r.row {
		was, is := r.change.Old[i], r.row[i]
		if !b.delta[i] && (was.Kind != is.Kind || string(was.Data) != string(is.Data)) {
			return false
		}
	}
	return true
}

// touched is what a change did to the columns of a key; names is nil for an insert or delete, which concern all.
type touched struct {
	past
	names []string
}

// changedColumns names the columns whose values a change of a table in column mode changed; nil: all.
func changedColumns(c *wal.Change) []string {
	if c.Op != wal.Update || c.OldKind != wal.OldFull {
		return nil
	}
	names := []string{}
	for i, v := range c.New {
		if o := c.Old[i]; v.Kind != wal.Unchanged && (v.Kind != o.Kind || string(v.Data) != string(o.Data)) {
			names = append(names, c.Relation.Columns[i].Name)
		}
	}
	return names
}

// touchedSince names the columns of a key that changes newer than v have touched, by all sites but origin, as far as some
// site has not seen them.
func (m *Mesh) touchedSince(rel *wal.Relation, table, key string, v wal.Version, origin wal.SiteID) map[string]bool {
	out := map[string]bool{}
	histories := []*History{m.Local}
	for site, h := range m.peers {
		if site != origin {
			histories = append(histories, h)
		}
	}
	for _, h := range histories {
		h.mu.Lock()
		for _, t := range h.touches[grave{table, key}] {
			if !v.Less(t.made) || !m.rival(t.past, origin) {
				continue
			}
			names := t.names
			if names == nil {
				for _, c := range rel.Columns {
					names = append(names, c.Name)
				}
			}
			for _, n := range names {
				out[n] = true
			}
		}
		h.mu.Unlock()
	}
	return out
}

const (
	versionsSQL = `SELECT key_norm, xid::xid, site, (extract(epoch from time) * 1000000)::int8 - 946684800000000, end_lsn
		FROM duri.version WHERE table_schema = $1 AND table_name = $2 AND key_norm = ANY ($3::bytea[])`
	versionSQL = `INSERT INTO duri.version (table_schema, table_name, key_norm, xid, site, time, end_lsn)
		VALUES ($1, $2, $3::bytea, pg_catalog.pg_current_xact_id(), $4::int2, $5::timestamptz, $6::pg_lsn)
		ON CONFLICT (table_schema, table_name, key_norm) DO UPDATE
		SET xid = excluded.xid, site = excluded.site, time = excluded.time, end_lsn = excluded.end_lsn`
)

// attributeBlended corrects the versions of rows that were last written for an older change.
func (x *execution) attributeBlended(ctx context.Context, tw *tableWave, rows map[int]held, key func(int) string) error {
	if tw.blend == nil {
		return nil
	}
	return x.versions(ctx, tw, rows, key)
}

// versions corrects versions by what duri.version has under the rows' keys.
func (x *execution) versions(ctx context.Context, tw *tableWave, rows map[int]held, key func(int) string) error {
	if len(rows) == 0 {
		return nil
	}
	keys, at := []byte{'{'}, map[string][]int{}
	for i := range rows {
		if len(keys) > 1 {
			keys = append(keys, ',')
		}
		keys = appendElement(keys, wal.Value{Kind: wal.Text, Data: bytea(key(i))})
		at[key(i)] = append(at[key(i)], i)
	}
	res, err := x.s.run(ctx, []call{{versionsSQL, [][]byte{[]byte(tw.schema), []byte(tw.name), append(keys, '}')}}})
	if err != nil {
		return err
	}
	for _, row := range res[0].Rows {
		k, err1 := unhex(row[0])
		xid, err2 := strconv.ParseUint(string(row[1]), 10, 32)
		site, err3 := strconv.ParseUint(string(row[2]), 10, 16)
		micros, err4 := strconv.ParseInt(string(row[3]), 10, 64)
		end, err5 := wal.ParseLSN(string(row[4]))
		if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
			return fmt.Errorf("read duri.version: %w", err)
		}
		for _, i := range at[k] {
			// A table without a key has versions by transaction, a subtransaction of xid.
			if h := rows[i]; h.xmin == uint32(xid) || len(tw.key) == 0 {
				h.Version = wal.Version{Time: wal.Time(micros), Site: wal.SiteID(site)}
				h.end, h.seen, h.third, h.Seen = end, nil, false, end == 0
				rows[i] = h
			}
		}
	}
	return nil
}

// keepVersion notes the version of a row that this transaction writes for an older change.
func (x *execution) keepVersion(ctx context.Context, tw *tableWave, key string, h held) error {
	_, err := x.s.run(ctx, []call{versionCall(tw, key, h)})
	return err
}

func versionCall(tw *tableWave, key string, h held) call {
	return call{versionSQL, [][]byte{
		[]byte(tw.schema), []byte(tw.name), bytea(key), fmt.Append(nil, h.Version.Site), []byte(h.Version.Time.String()), []byte(h.end.String()),
	}}
}
