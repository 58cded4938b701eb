package trial

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// wanted is what the model says of one row.
type wanted struct {
	reg *register
	by  *change
}

// model is what every site must hold: by table and key.
func (h *history) model() []map[string]wanted {
	all := make([]map[string]wanted, len(tables))
	for i := range all {
		all[i] = map[string]wanted{}
	}
	for _, r := range h.registers {
		if w := h.winner(r); w != nil && w.image != "" {
			all[r.table][r.key] = wanted{r, w}
		}
	}
	return all
}

// stored is a row as a site has it.
type stored struct {
	image string
	whole string // as COPY writes it, values that images only hash included
	xmin  uint32
	time  wal.Time // commit time of xmin
	site  int      // whose change it is; -1: not known any more
}

// merged is an apply transaction: what it merged.
type merged struct {
	site     int
	from, to wal.LSN
}

// together reports whether two transactions of one origin were merged into one apply transaction.
func (v *view) together(a, b *txn) bool {
	for _, m := range v.merged {
		if m.site == a.site && m.from <= a.commit && a.end <= m.to && m.from <= b.commit && b.end <= m.to {
			return true
		}
	}
	return false
}

// view is what one site has in the end.
type view struct {
	name   string
	tables []map[string]stored
	twice  []string // keys that are there more than once
	merged map[uint32]merged
}

// readView reads a site's tables by COPY.
func (r *run) readView(ctx context.Context, site int) (*view, error) {
	s := r.p.Sites[site]
	conn, err := pg.Connect(ctx, s.Cluster.DSN(s.Database, ""), "", map[string]string{"application_name": "oracle"})
	if err != nil {
		return nil, err
	}
	defer pg.Close(conn)
	v := &view{name: s.Name, merged: map[uint32]merged{}}
	origins, err := pg.Rows(ctx, conn, "SELECT roident, roname FROM pg_replication_origin")
	if err != nil {
		return nil, err
	}
	siteOf := map[string]int{"0": site}
	for _, o := range origins {
		siteOf[o[0]] = r.originSite(site, o[1])
	}
	for i := range tables {
		t := &tables[i]
		var out bytes.Buffer
		_, err := conn.CopyTo(ctx, &out, fmt.Sprintf(`COPY (SELECT %s, %s, md5(t.whole::text), xmin, (extract(epoch from (o).timestamp) * 1000000)::int8 - 946684800000000, (o).roident
			FROM (SELECT t.xmin, t AS whole, t.*, pg_xact_commit_timestamp_origin(t.xmin) AS o FROM ONLY %s t) AS t) TO STDOUT`,
			t.keySQL("t."), t.imageSQL("t."), t.name))
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", t.name, err)
		}
		rows := map[string]stored{}
		for line := range strings.Lines(out.String()) {
			f := copyFields(line)
			row, err := storedRow(f, siteOf)
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", t.name, err)
			}
			if _, twice := rows[f[0]]; twice {
				v.twice = append(v.twice, fmt.Sprintf("%s %q", t.name, f[0]))
			}
			rows[f[0]] = row
		}
		v.tables = append(v.tables, rows)
	}
	return v, v.readMerged(ctx, s)
}

// originSite gives the site that a replication origin stands for.
func (r *run) originSite(self int, name string) int {
	for i, s := range r.p.Sites {
		if name == apply.OriginName(s.Database, s.Name) {
			return i
		}
	}
	if apply.IsClockOrigin(database, name) {
		return self
	}
	return -1
}

func storedRow(f []string, siteOf map[string]int) (stored, error) {
	if len(f) != 6 {
		return stored{}, fmt.Errorf("%d columns instead of 6", len(f))
	}
	row := stored{image: f[1], whole: f[2], site: -1}
	xmin, err := strconv.ParseUint(f[3], 10, 32)
	if err != nil {
		return row, err
	}
	row.xmin = uint32(xmin)
	if f[4] == null {
		return row, nil
	}
	us, err := strconv.ParseInt(f[4], 10, 64)
	if err != nil {
		return row, err
	}
	row.time = wal.Time(us)
	if site, ok := siteOf[f[5]]; ok {
		row.site = site
	}
	return row, nil
}

// copyFields reads a line of COPY's text format; NULL is \N.
func copyFields(line string) []string {
	fields := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
	for i, f := range fields {
		if f == null || !strings.Contains(f, `\`) {
			continue
		}
		var b strings.Builder
		for j := 0; j < len(f); j++ {
			c := f[j]
			if c == '\\' && j+1 < len(f) {
				j++
				c = f[j]
				if at := strings.IndexByte("btnrvf", c); at >= 0 {
					c = "\b\t\n\r\v\f"[at]
				}
			}
			b.WriteByte(c)
		}
		fields[i] = b.String()
	}
	return fields
}

// readMerged reads which transactions each apply transaction merged.
func (v *view) readMerged(ctx context.Context, s *pair.Site) error {
	rows, err := s.Cluster.QueryText(ctx, s.Database, "SELECT xid::xid, origin, from_lsn, to_lsn FROM duri.applied WHERE transactions > 0")
	if err != nil {
		return fmt.Errorf("read duri.applied: %w", err)
	}
	for _, row := range rows {
		xid, err := strconv.ParseUint(row[0], 10, 32)
		if err != nil {
			return err
		}
		site, err := strconv.Atoi(row[1])
		if err != nil {
			return err
		}
		from, err := wal.ParseLSN(row[2])
		if err != nil {
			return err
		}
		to, err := wal.ParseLSN(row[3])
		if err != nil {
			return err
		}
		v.merged[uint32(xid)] = merged{site - 1, from, to}
	}
	return nil
}

// judge compares what the sites hold with what was committed.
func (r *run) judge(ctx context.Context) error {
	for _, s := range r.p.Sites {
		if err := s.SignalAgent(killSignal); err != nil {
			return err
		}
	}
	h, err := r.readHistory()
	if err != nil {
		return err
	}
	r.res.Registers = len(h.registers)
	h.ordered(r.differ)
	model := h.model()
	for _, rows := range model {
		r.res.Rows += len(rows)
	}
	var views []*view
	for i := range r.p.Sites {
		v, err := r.readView(ctx, i)
		if err != nil {
			return fmt.Errorf("read site %s: %w", r.p.Sites[i].Name, err)
		}
		views = append(views, v)
	}
	var records [][]record
	for _, s := range r.p.Sites {
		recs, err := readRecords(ctx, s)
		if err != nil {
			return fmt.Errorf("read the conflict records of site %s: %w", s.Name, err)
		}
		records = append(records, recs)
		for _, rec := range recs {
			if rec.kind != "" {
				r.res.Conflicts++
			}
		}
	}
	for i, v := range views { // first what matters most
		r.compare(h, model, i, v, views[0], records)
	}
	for i, recs := range records {
		if r.o.Aside {
			break
		}
		r.checkRecords(h, i, recs, views[i].together)
	}
	return nil
}

// compare checks one site's rows against the model, and byte by byte against the first site.
func (r *run) compare(h *history, model []map[string]wanted, site int, v, first *view, records [][]record) {
	for _, k := range v.twice {
		r.differ("site %s holds %s more than once", v.name, k)
	}
	for t := range tables {
		for _, key := range unequal(model[t], v.tables[t]) {
			r.res.Unequal++
			r.differ("site %s, %s %q: %s", v.name, tables[t].name, key, r.explain(h, registerID{t, key}, model, v, records))
		}
		for key, row := range v.tables[t] {
			w, ok := model[t][key]
			if !ok || w.by.image != row.image {
				continue // told above
			}
			if other, ok := first.tables[t][key]; ok && other.image == row.image && other.whole != row.whole {
				r.differ("site %s, %s %q: a value that is stored out of line differs from site %s", v.name, tables[t].name, key, first.name)
			}
			if wrong := v.misattributed(site, w.by, row, &tables[t]); wrong != "" {
				r.differ("site %s, %s %q: %s\n%s", v.name, tables[t].name, key, wrong, strings.Join(h.lines(w.reg, w.by), "\n"))
			}
		}
	}
}

// unequal lists the keys at which a site does not hold what the model says.
func unequal(model map[string]wanted, rows map[string]stored) []string {
	keys := map[string]bool{}
	for k, w := range model {
		if row, ok := rows[k]; !ok || row.image != w.by.image {
			keys[k] = true
		}
	}
	for k := range rows {
		if _, ok := model[k]; !ok {
			keys[k] = true
		}
	}
	return slices.Sorted(maps.Keys(keys))
}

// misattributed checks a row's version. At its own site it is the very transaction's; elsewhere it is of an apply
// transaction that merged it, whose stamp is not older. What a TRUNCATE left in a table without a key was written anew.
func (v *view) misattributed(site int, by *change, row stored, t *table) string {
	own := by.txn
	switch {
	case t.keyless:
		return ""
	case row.site != own.site:
		return fmt.Sprintf("the row counts as one of site %d (xid %d), and is of %s", row.site+1, row.xmin, own.version)
	case site == own.site && (row.xmin < own.xid || row.time != own.raw): // subtransactions have numbers of their own
		return fmt.Sprintf("the row is of transaction %d at %s, not of %d at %s", row.xmin, row.time, own.xid, own.raw)
	case site == own.site:
		return ""
	case row.time < own.version.Time:
		return fmt.Sprintf("the row carries the stamp %s, which is older than its version %s", row.time, own.version)
	}
	m, ok := v.merged[row.xmin]
	if !ok || m.site != own.site || own.commit < m.from || own.end > m.to {
		return fmt.Sprintf("the row was written by apply transaction %d, which merged %v, not %s of site %d", row.xmin, m, own.commit, own.site+1)
	}
	return ""
}

// explain tells what is known of a key that differs.
func (r *run) explain(h *history, id registerID, model []map[string]wanted, v *view, records [][]record) string {
	var b strings.Builder
	row, there := v.tables[id.table][id.key]
	switch w, ok := model[id.table][id.key]; {
	case !ok:
		fmt.Fprintf(&b, "there is a row, and the model has none: %q of xid %d, %s of site %d", row.image, row.xmin, row.time, row.site+1)
	case !there:
		fmt.Fprintf(&b, "the row is missing: %s", w.by)
	default:
		fmt.Fprintf(&b, "the row is %q of xid %d, %s of site %d; the model has %s", row.image, row.xmin, row.time, row.site+1, w.by)
	}
	if len(r.res.Differences) >= printedMax {
		return b.String()
	}
	if there {
		fmt.Fprintf(&b, "\n  xid %d merged %+v", row.xmin, v.merged[row.xmin])
	}
	if reg := h.registers[id]; reg != nil {
		b.WriteString("\n" + strings.Join(h.lines(reg, model[id.table][id.key].by), "\n"))
	}
	for i, recs := range records {
		for _, rec := range lastOf(recs, id) {
			fmt.Fprintf(&b, "\n  recorded at %s: %s", r.p.Sites[i].Name, rec)
		}
	}
	return b.String()
}

// lastOf are the last records of a key.
func lastOf(records []record, id registerID) []record {
	var out []record
	for _, rec := range records {
		if rec.table == id.table && rec.key == id.key {
			out = append(out, rec)
		}
	}
	return out[max(0, len(out)-historyMax):]
}
