package trial

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sort"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/wal"
)

// txn is a committed transaction as its origin's journal has it.
type txn struct {
	site    int // number of the site, from 0
	xid     uint32
	commit  wal.LSN
	end     wal.LSN
	version wal.Version
	raw     wal.Time  // commit time, without correction
	seen    []wal.LSN // by site: how far that was applied at the origin before this transaction
}

// siteID is the id that `duri init` gives to the i-th site.
func siteID(i int) wal.SiteID { return wal.SiteID(i + 1) }

// sees reports whether a transaction was committed where another one had been applied, or is of the same site and later.
func (t *txn) sees(o *txn) bool {
	if t.site == o.site {
		return t.end >= o.end
	}
	return t.seen[o.site] >= o.end
}

// concurrent reports that neither of two transactions of different sites had seen the other.
func concurrent(a, b *txn) bool { return a.site != b.site && !a.sees(b) && !b.sees(a) }

// change is what a transaction did to one register. A key change is a delete and an insert with one number.
type change struct {
	txn   *txn
	num   int32 // of the change in its transaction, as journals and conflict records count
	op    wal.Op
	image string // the row after; empty for a delete and a TRUNCATE
	// partial: PostgreSQL did not send all of the image. What stands for it elsewhere, until a later change arrives, may be
	// completed with a value that the origin has by then (rule 9).
	partial bool
}

// beats orders two changes of one register: by version, and where a site's own are equal by its order.
func (c *change) beats(o *change) bool {
	if d := c.txn.version.Compare(o.txn.version); d != 0 {
		return d > 0
	}
	if c.txn.end != o.txn.end {
		return c.txn.end > o.txn.end
	}
	return c.num >= o.num
}

func (c *change) String() string {
	what := c.op.String()
	if c.image != "" {
		what += fmt.Sprintf(" %q", c.image)
	}
	return fmt.Sprintf("%s xid %d commit %s seen %v change %d: %s", c.txn.version, c.txn.xid, c.txn.commit, c.txn.seen, c.num, what)
}

// register is the history of one key.
type register struct {
	table  int
	key    string
	bySite [][]*change // of each site, in its order
}

// history is everything that was committed.
type history struct {
	sites     int
	txns      [][]*txn // by site, in its order
	byXID     []map[uint32]*txn
	registers map[registerID]*register
	truncates [][][]*change // by table and site
	changes   int
}

type registerID struct {
	table int
	key   string
}

func newHistory(sites int) *history {
	h := &history{sites: sites, txns: make([][]*txn, sites), byXID: make([]map[uint32]*txn, sites), registers: map[registerID]*register{}}
	for i := range sites {
		h.byXID[i] = map[uint32]*txn{}
	}
	for range tables {
		h.truncates = append(h.truncates, make([][]*change, sites))
	}
	return h
}

// add appends a change to the history of its key, or of its table.
func (h *history) add(table int, key string, c *change) {
	h.changes++
	if c.op == wal.Truncate {
		h.truncates[table][c.txn.site] = append(h.truncates[table][c.txn.site], c)
		return
	}
	id := registerID{table, key}
	r := h.registers[id]
	if r == nil {
		r = &register{table: table, key: key, bySite: make([][]*change, h.sites)}
		h.registers[id] = r
	}
	r.bySite[c.txn.site] = append(r.bySite[c.txn.site], c)
}

// take adds a journal's transaction with the effects that its client saw; the two must agree.
func (h *history) take(site int, t *wal.Txn, effects []effect) error {
	own := &txn{site: site, xid: t.XID, commit: t.CommitLSN, end: t.EndLSN, version: t.Version(), raw: t.CommitTime, seen: make([]wal.LSN, h.sites)}
	for i := range own.seen {
		own.seen[i] = t.SeenOf(siteID(i))
	}
	h.txns[site] = append(h.txns[site], own)
	h.byXID[site][t.XID] = own
	if len(t.Changes) != len(effects) {
		return fmt.Errorf("the journal has %d changes, the client saw %d", len(t.Changes), len(effects))
	}
	for i, e := range effects {
		c := &t.Changes[i]
		if err := agree(c, e); err != nil {
			return fmt.Errorf("change %d: %w", i, err)
		}
		next := &change{txn: own, num: int32(i), op: c.Op, image: e.image, partial: !complete(c)}
		if c.Op == wal.Update && c.Old != nil && !tables[e.table].sameKey(c.Old, c.New) {
			h.add(e.table, e.old, &change{txn: own, num: int32(i), op: wal.Delete})
		}
		h.add(e.table, e.key, next)
	}
	return nil
}

// complete reports whether a journal's change brings the whole row: in its new image, or in the old one of a table with
// REPLICA IDENTITY FULL.
func complete(c *wal.Change) bool {
	if c.New.Complete() {
		return true
	}
	return c.OldKind == wal.OldFull
}

// agree compares a journal's change with what the client saw.
func agree(c *wal.Change, e effect) error {
	t := &tables[e.table]
	if c.Relation.Name != t.name {
		return fmt.Errorf("the journal has one of %s, the client saw one of %s", c.Relation.Name, t.name)
	}
	if c.Op != e.op && (!e.upsert || c.Op != wal.Update) {
		return fmt.Errorf("the journal has %s, the client saw %s", c.Op, e.op)
	}
	if c.Op == wal.Truncate {
		return nil
	}
	row := c.New
	if c.Op == wal.Delete {
		row = c.Old
	}
	key, err := t.keyOf(row)
	switch {
	case err != nil:
		return err
	case key != e.key:
		return fmt.Errorf("the journal has key %q, the client saw %q", key, e.key)
	case c.Op != wal.Delete && !t.matches(e.image, c.New):
		return fmt.Errorf("the journal has another row than the client saw: %q", e.image)
	}
	if c.Old == nil {
		return nil
	}
	old, err := t.keyOf(c.Old)
	if err == nil && old != e.old {
		err = fmt.Errorf("the journal has old key %q, the client saw %q", old, e.old)
	}
	return err
}

// readHistory reads the journals of all sites, whose agents must have ended, against the ledgers.
func (r *run) readHistory() (*history, error) {
	h := newHistory(r.s.Sites)
	for i, s := range r.p.Sites {
		if err := r.readJournal(h, i, s); err != nil {
			return nil, fmt.Errorf("read the journal of site %s: %w", s.Name, err)
		}
		l := r.ledgers[i]
		for xid, e := range l.txns {
			if e.fate == committed && h.byXID[i][xid] == nil {
				r.differ("site %s: transaction %d was acknowledged to its client and is not in the journal", s.Name, xid)
			}
		}
	}
	return h, nil
}

func (r *run) readJournal(h *history, site int, s *pair.Site) (err error) {
	j, err := journal.Open(filepath.Join(s.DataDir, "journal", s.Database, s.Name), journal.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, j.Close()) }()
	reader, err := j.NewReader(j.Start())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reader.Close()) }()
	for {
		rec, ok, err := reader.TryNext()
		if err != nil || !ok {
			return err
		}
		if rec.Txn == nil {
			continue
		}
		e := r.ledgers[site].txns[rec.Txn.XID]
		if e == nil || e.fate == aborted {
			r.differ("site %s: transaction %d is in the journal, and no client committed it", s.Name, rec.Txn.XID)
			continue
		}
		if e.fate == doubtful {
			r.res.InDoubt++
		}
		r.res.Commits++
		if err := h.take(site, rec.Txn, e.effects); err != nil {
			r.differ("site %s: transaction %d: %v", s.Name, rec.Txn.XID, err)
		}
	}
}

// ordered checks rule 3: the versions of one row, or one table's TRUNCATEs, never decrease in their origin's order.
func (h *history) ordered(differ func(string, ...any)) {
	check := func(what string, changes []*change) {
		for i := 1; i < len(changes); i++ {
			if changes[i].txn.version.Less(changes[i-1].txn.version) {
				differ("rule 3: the versions of %s decrease at site %s:\n  %s\n  %s", what, names(maxSites)[changes[i].txn.site], changes[i-1], changes[i])
			}
		}
	}
	for _, r := range h.registers {
		for _, changes := range r.bySite {
			check(r.String(), changes)
		}
	}
	for t, sites := range h.truncates {
		for _, changes := range sites {
			check("TRUNCATE "+tables[t].name, changes)
		}
	}
}

func (r *register) String() string { return fmt.Sprintf("%s %q", tables[r.table].name, r.key) }

// winner is the last word on a register, nil when it was never written: the greatest version, TRUNCATEs included.
func (h *history) winner(r *register) *change {
	var best *change
	for site := range h.sites {
		for _, changes := range [][]*change{r.bySite[site], h.truncates[r.table][site]} {
			for _, c := range changes {
				if best == nil || c.beats(best) {
					best = c
				}
			}
		}
	}
	return best
}

// lines are a register's history around a change, for a person; nil: its end.
func (h *history) lines(r *register, around *change) []string {
	var all []*change
	for site := range h.sites {
		all = append(all, r.bySite[site]...)
		all = append(all, h.truncates[r.table][site]...)
	}
	slices.SortStableFunc(all, func(a, b *change) int { return a.txn.version.Compare(b.txn.version) })
	last := len(all)
	if at := slices.Index(all, around); at >= 0 {
		last = min(last, at+1+historyMax/2)
	}
	var out []string
	for _, c := range all[max(0, last-historyMax):last] {
		mark := "  "
		if c == around {
			mark = "* "
		}
		out = append(out, mark+c.String())
	}
	return out
}

// historyMax bounds the changes of a register that are printed.
const historyMax = 16

// unseenBy gives those of one site's changes, in its order, that another transaction had not seen.
func unseenBy(changes []*change, t *txn) []*change {
	return changes[sort.Search(len(changes), func(i int) bool { return !t.sees(changes[i].txn) }):]
}

// blindTo gives those of one site's changes, in its order, that had not seen a transaction of another site.
func blindTo(changes []*change, t *txn) []*change {
	return changes[:sort.Search(len(changes), func(i int) bool { return changes[i].txn.sees(t) })]
}

// rivals are the changes of one site that are truly concurrent with a transaction of another one.
func rivals(changes []*change, t *txn) []*change { return blindTo(unseenBy(changes, t), t) }
