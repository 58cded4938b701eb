package trial

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// record is a row of duri.conflict.
type record struct {
	id         int64
	kind, code string
	table      int
	key        string
	origin     int // number of the site, from 0
	commit     wal.LSN
	xid        uint32
	change     int32
	remote     wal.Time
	remoteRow  map[string]*string
	localSite  int // -1: not known
	localTime  wal.Time
	localRow   map[string]*string
}

func (r record) String() string {
	image := func(m map[string]*string) string {
		b, _ := json.Marshal(m) // texts always marshal
		return string(b)
	}
	return fmt.Sprintf("#%d %s %s: site %d xid %d commit %s change %d at %s %s, met site %d at %s %s", r.id, r.kind, r.code, r.origin+1, r.xid, r.commit, r.change,
		r.remote, image(r.remoteRow), r.localSite+1, r.localTime, image(r.localRow))
}

// recordsSQL reads the records; values that images only hash come as their hash.
const recordsSQL = `COPY (SELECT id, kind, code, table_name, key, origin, origin_lsn, origin_xid, change,
	(extract(epoch from remote_time) * 1000000)::int8 - 946684800000000,
	CASE WHEN remote_row ->> 'big' IS NULL THEN remote_row ELSE jsonb_set(remote_row, '{big}', to_jsonb(md5(remote_row ->> 'big'))) END,
	local_site, (extract(epoch from local_time) * 1000000)::int8 - 946684800000000,
	CASE WHEN local_row ->> 'big' IS NULL THEN local_row ELSE jsonb_set(local_row, '{big}', to_jsonb(md5(local_row ->> 'big'))) END
	FROM duri.conflict ORDER BY id) TO STDOUT`

func readRecords(ctx context.Context, s *pair.Site) ([]record, error) {
	conn, err := pg.Connect(ctx, s.Cluster.DSN(s.Database, ""), "", nil)
	if err != nil {
		return nil, err
	}
	defer pg.Close(conn)
	var out bytes.Buffer
	if _, err := conn.CopyTo(ctx, &out, recordsSQL); err != nil {
		return nil, err
	}
	var all []record
	for line := range strings.Lines(out.String()) {
		rec, err := parseRecord(copyFields(line))
		if err != nil {
			return nil, fmt.Errorf("%w: %s", err, line)
		}
		all = append(all, rec)
	}
	return all, nil
}

func parseRecord(f []string) (r record, err error) {
	if len(f) != 14 {
		return r, fmt.Errorf("%d columns instead of 14", len(f))
	}
	number := func(s string) int64 {
		if s == null {
			return 0
		}
		n, e := strconv.ParseInt(s, 10, 64)
		err = errors.Join(err, e)
		return n
	}
	object := func(s string) (m map[string]*string) {
		if s != null {
			err = errors.Join(err, json.Unmarshal([]byte(s), &m))
		}
		return m
	}
	known := false
	if r.table, known = tableNamed(f[3]); !known {
		return r, fmt.Errorf("there is no table %s", f[3])
	}
	r.id, r.kind, r.code, r.origin, r.xid, r.change = number(f[0]), f[1], f[2], int(number(f[5]))-1, uint32(number(f[7])), int32(number(f[8]))
	commit, e := wal.ParseLSN(f[6])
	r.commit, err = commit, errors.Join(err, e)
	r.remote, r.remoteRow = wal.Time(number(f[9])), object(f[10])
	r.localSite, r.localTime, r.localRow = int(number(f[11]))-1, wal.Time(number(f[12])), object(f[13])
	from := object(f[4])
	if tables[r.table].keyless { // the record has no key
		if from = r.remoteRow; from == nil {
			from = r.localRow
		}
	}
	r.key, _ = tables[r.table].keyOfJSON(from)
	return r, err
}

// incoming finds the change that a record is about.
func (h *history) incoming(r record) *change {
	if r.origin < 0 || r.origin >= h.sites {
		return nil
	}
	t := h.byXID[r.origin][r.xid]
	if t == nil || t.commit != r.commit {
		return nil
	}
	var found *change
	for _, c := range h.truncates[r.table][r.origin] {
		if c.txn == t && c.num == r.change {
			return c
		}
	}
	reg := h.registers[registerID{r.table, r.key}]
	if reg == nil {
		return nil
	}
	for _, c := range reg.bySite[r.origin] {
		if c.txn == t && c.num == r.change && (found == nil || (c.op == wal.Delete) == (r.remoteRow == nil)) {
			found = c
		}
	}
	return found
}

// met finds the changes of the register or TRUNCATEs of the table that a record may say its change met.
func (h *history) met(r record) []*change {
	if r.localSite < 0 || r.localSite >= h.sites {
		return nil
	}
	var all []*change
	if reg := h.registers[registerID{r.table, r.key}]; reg != nil {
		all = append(all, reg.bySite[r.localSite]...)
	}
	all = append(all, h.truncates[r.table][r.localSite]...)
	var out []*change
	for _, c := range all {
		if c.txn.version.Time == r.localTime {
			out = append(out, c)
		}
	}
	return out
}

// checkRecords compares one site's records with the history: none invented, and none missing.
//
// What a site records depends on what it held when a change arrived, which journals tell in part: a change that arrives
// at a site where a concurrent, newer one of that site's own stands, or has stood, must be recorded there: as lost, or as
// superseded when what stood there had seen it (lost); but a delete of a row that was inserted only then is none, nor is
// what such a delete, applied in one go with it, has removed again. A change that beats the newest own change which stood there, unless something else may have come between, must be recorded as won
// (beaten). And each conflict on record must be between the two changes that it names, truly concurrent, with their
// images, and with the right one winning (invented).
func (r *run) checkRecords(h *history, site int, records []record, together func(a, b *txn) bool) {
	s := r.p.Sites[site].Name
	recorded := map[told][]*record{}
	for i := range records {
		rec := &records[i]
		c := h.incoming(*rec)
		if c == nil {
			r.differ("site %s: a record of a change that was never made: %s", s, rec)
			continue
		}
		if wrong := h.invented(*rec, c, site); wrong != "" {
			r.differ("site %s: %s: %s\n  incoming: %s\n%s", s, wrong, rec, c, h.tell(rec.table, rec.key, c, records))
		}
		if rec.code == string(conflict.Filled) {
			continue // besides what became of it
		}
		id := told{c, rec.key}
		recorded[id] = append(recorded[id], rec)
		if len(recorded[id]) > 1 {
			r.differ("site %s: a change is recorded twice: %s and %s", s, recorded[id][0], rec)
		}
	}
	n := h.missing(site, recorded, together, func(lost *change, reg *register, why string) {
		r.differ("site %s: %s: %s\n  %s\n%s", s, why, reg, lost, h.tell(reg.table, reg.key, lost, records))
	})
	r.res.Concurrent += n.concurrent
	r.res.Overtaken += n.overtaken
}

// tell is a key's history around a change, and what one site has on record of the transactions in it.
func (h *history) tell(table int, key string, around *change, records []record) string {
	reg := h.registers[registerID{table, key}]
	if reg == nil {
		return "  the key was never written"
	}
	lines := h.lines(reg, around)
	from, to := around.txn.version.Time.Add(-tellAbout), around.txn.version.Time.Add(tellAbout)
	for _, rec := range records {
		if rec.table == table && rec.key == key && rec.remote >= from && rec.remote <= to {
			lines = append(lines, "  recorded: "+rec.String())
		}
	}
	return reg.String() + "\n" + strings.Join(lines, "\n")
}

// tellAbout is how far around a change its site's records are printed.
const tellAbout = 2 * time.Second

// told names a change as a site's records tell of it: a TRUNCATE once for each key.
type told struct {
	change *change
	key    string
}

// kinds are the conflict kinds by what the change does and whether it met a row.
func kindFor(op wal.Op, metRow bool) conflict.Kind {
	switch {
	case (op == wal.Delete) && !metRow:
		return conflict.DeleteMissing
	case op == wal.Delete, op == wal.Truncate:
		return conflict.DeleteOriginDiffers
	case !metRow:
		return conflict.UpdateDeleted
	case op == wal.Insert:
		return conflict.InsertExists
	}
	return conflict.UpdateOriginDiffers
}

// invented says what is wrong with a record of a change; empty: nothing.
func (h *history) invented(rec record, c *change, site int) string {
	t := &tables[rec.table]
	if rec.remote != c.txn.version.Time {
		return "the record has another version than its change"
	}
	if c.image != "" && !t.matchesJSON(c.image, c.partial, rec.remoteRow) {
		return "the record has another image than its change"
	}
	if rec.kind == "" {
		if code := conflict.Code(rec.code); code != conflict.Filled && code != conflict.Superseded {
			return "a record that is neither a conflict nor an exception"
		}
		return ""
	}
	if t.keyless {
		return "" // rows without a key have no exact versions
	}
	if rec.localSite < 0 {
		return "a conflict with nothing"
	}
	why := "a conflict with a change that was never made"
	for _, rival := range h.met(rec) {
		if why = h.disputed(rec, c, rival); why == "" {
			return ""
		}
	}
	return why
}

// disputed says why a record is not of a conflict between two changes; empty: it is.
func (h *history) disputed(rec record, c, rival *change) string {
	switch {
	case !concurrent(c.txn, rival.txn):
		return "a conflict between changes of which one had seen the other"
	case !h.showed(rec, rival):
		return "the record has another image than what it says it met"
	case rec.code == string(conflict.Won) && !c.beats(rival), rec.code == string(conflict.Lost) && c.beats(rival):
		return "the wrong change won"
	case rec.code != string(conflict.Won) && rec.code != string(conflict.Lost):
		return "a conflict without an outcome"
	}
	if want := kindFor(c.op, rival.image != ""); rec.kind != string(want) && !keyChanged(c, rec) {
		return fmt.Sprintf("the kind should be %s", want)
	}
	return ""
}

// showed reports whether a record's local image is that of the change that it says it met. Where PostgreSQL did not send
// all of that one's image, and its site had removed the row meanwhile, the image before stays until the removal arrives.
func (h *history) showed(rec record, rival *change) bool {
	if rival.image == "" {
		return rec.localRow == nil
	}
	if !rival.partial {
		return tables[rec.table].matchesJSON(rival.image, false, rec.localRow)
	}
	return slices.ContainsFunc(h.registers[registerID{rec.table, rec.key}].bySite[rival.txn.site], func(c *change) bool {
		return c.image != "" && c.txn.end <= rival.txn.end && tables[rec.table].matchesJSON(c.image, true, rec.localRow)
	})
}

// keyChanged reports that a record may be of the half of a key change that inserts: it says so.
func keyChanged(c *change, rec record) bool {
	return c.op == wal.Update && rec.kind == string(conflict.InsertExists)
}

// missing looks for conflicts that a site had to record and did not.
func (h *history) missing(site int, recorded map[told][]*record, together func(a, b *txn) bool, report func(*change, *register, string)) (n losses) {
	for _, reg := range h.registers {
		own := reg.bySite[site]
		for origin := range h.sites {
			if origin == site {
				continue
			}
			for _, c := range reg.bySite[origin] {
				recs := recorded[told{c, reg.key}]
				if rival := h.lost(c, own, h.truncates[reg.table][site]); rival != nil {
					n.concurrent++
					switch {
					case tables[reg.table].keyless && c.op != wal.Insert: // matched by the whole row, without versions
					case len(recs) > 0 && recs[0].code != string(conflict.Lost) && recs[0].code != string(conflict.Superseded):
						n.overtaken++
					case len(recs) == 0 && rival.op == wal.Insert && h.leftNothing(reg, c, rival, together):
						n.overtaken++
					case len(recs) == 0:
						report(c, reg, "a change that lost against a concurrent one is not on record")
					}
					continue
				}
				if len(recs) == 0 && !tables[reg.table].keyless {
					if x := h.beaten(reg, c, site); x != nil {
						report(c, reg, "a change won against a concurrent one, and that is not on record: "+x.String())
					}
				}
			}
		}
	}
	return n
}

// leftNothing reports whether a change left no row that rival, an insert, could meet: it is a delete, or its site deleted the
// row again and both were applied in one go, before rival.
func (h *history) leftNothing(reg *register, c, rival *change, together func(a, b *txn) bool) bool {
	if c.op == wal.Delete {
		return true
	}
	for _, changes := range [][]*change{reg.bySite[c.txn.site], h.truncates[reg.table][c.txn.site]} {
		for _, d := range changes {
			later := d.txn.end > c.txn.end || d.txn == c.txn && d.num > c.num
			if d.image == "" && later && d.txn.version.Less(rival.txn.version) && !rival.txn.sees(d.txn) && together(c.txn, d.txn) {
				return true
			}
		}
	}
	return false
}

// losses counts what lost at one site against a concurrent change of the site's own.
type losses struct {
	concurrent int
	// overtaken: the client's change came between the decision and the commit, so that the record is of what stood there
	// before. The image is on record all the same.
	overtaken int
}

// lost gives the first of a site's own changes that are concurrent with one of another site and newer; nil: there is none.
func (h *history) lost(c *change, own, truncates []*change) *change {
	for _, changes := range [][]*change{own, truncates} {
		for _, rival := range rivals(changes, c.txn) {
			if c.txn.version.Less(rival.txn.version) {
				return rival
			}
		}
	}
	return nil
}

// beaten finds the site's own change that stood there when a change of another site arrived and won against it; nil when
// there is none, when it was seen, or when something else may have come between.
func (h *history) beaten(reg *register, c *change, site int) *change {
	before := blindTo(reg.bySite[site], c.txn)
	if len(before) == 0 {
		return nil
	}
	x := before[len(before)-1]
	if c.txn.sees(x.txn) || !x.txn.version.Less(c.txn.version) {
		return nil
	}
	until := h.firstSeeing(site, c.txn) // the site's first transaction that had seen c
	for other := range h.sites {
		for _, changes := range [][]*change{reg.bySite[other], h.truncates[reg.table][other]} {
			for _, y := range changes {
				if y != c && y != x && between(y, x, c, until) {
					return nil
				}
			}
		}
	}
	return x
}

// firstSeeing is a site's first transaction that had seen one of another site; nil when there is none.
func (h *history) firstSeeing(site int, t *txn) *txn {
	own := h.txns[site]
	i := sort.Search(len(own), func(i int) bool { return own[i].sees(t) })
	if i == len(own) {
		return nil
	}
	return own[i]
}

// between reports whether y may have stood over x when c arrived.
func between(y, x, c *change, until *txn) bool {
	switch {
	case y.txn == x.txn || !x.txn.version.Less(y.txn.version):
		return false // older: it would have lost against x
	case y.txn == c.txn:
		return y.num < c.num || y.num == c.num && y.op == wal.Delete // the other half of a key change
	case y.txn.site == x.txn.site:
		return y.txn.end > x.txn.end && !y.txn.sees(c.txn) // only a TRUNCATE can be
	case y.txn.site == c.txn.site:
		return y.txn.end <= c.txn.end && !x.txn.sees(y.txn)
	}
	// A third site's; its removals count from when they are known, before they are applied.
	return !x.txn.sees(y.txn) && (y.image == "" || until == nil || until.sees(y.txn))
}
