package trial

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/wal"
)

// book builds histories by hand.
type book struct {
	h   *history
	end wal.LSN
	// together: what one site committed was applied in one go.
	together bool
}

func newBook(sites int) *book { return &book{h: newHistory(sites)} }

// commit adds a transaction of a site at a time that had seen others up to given transactions.
func (b *book) commit(site int, at wal.Time, seen ...*txn) *txn {
	b.end += 10
	t := &txn{site: site, xid: uint32(b.end), commit: b.end - 1, end: b.end, version: wal.Version{Time: at, Site: siteID(site)}, raw: at, seen: make([]wal.LSN, b.h.sites)}
	for _, s := range seen {
		t.seen[s.site] = s.end
	}
	b.h.txns[site] = append(b.h.txns[site], t)
	b.h.byXID[site][t.xid] = t
	return t
}

func image(v string) string { return strings.Join([]string{"1", v, "0", null}, separator) }

func (b *book) put(t *txn, op wal.Op, v string) *change {
	c := &change{txn: t, op: op, image: image(v)}
	b.h.add(tableInt, "1", c)
	return c
}

func (b *book) remove(t *txn) *change {
	c := &change{txn: t, op: wal.Delete}
	b.h.add(tableInt, "1", c)
	return c
}

func (b *book) register() *register { return b.h.registers[registerID{tableInt, "1"}] }

func TestGreatestVersionWinsWhateverTheOrder(t *testing.T) {
	b := newBook(3)
	b.put(b.commit(0, 20), wal.Insert, "old")
	want := b.put(b.commit(2, 30), wal.Update, "third")
	b.put(b.commit(1, 30), wal.Update, "tie")
	if got := b.h.winner(b.register()); got != want {
		t.Errorf("winner %s, want %s: equal times are decided by the site's number", got, want)
	}
	b.h.add(tableInt, "", &change{txn: b.commit(1, 40), op: wal.Truncate})
	if m := b.h.model(); len(m[tableInt]) != 0 {
		t.Errorf("a row outlives a newer TRUNCATE: %v", m[tableInt])
	}
	b.put(b.commit(0, 50), wal.Insert, "again")
	if m := b.h.model(); m[tableInt]["1"].by.image != image("again") {
		t.Errorf("model %v", m[tableInt])
	}
}

func TestLaterChangeOfOneTransactionWins(t *testing.T) {
	b := newBook(2)
	tx := b.commit(0, 10)
	b.put(tx, wal.Insert, "a")
	last := b.put(tx, wal.Update, "b")
	last.num = 1
	if got := b.h.winner(b.register()); got != last {
		t.Errorf("winner %s", got)
	}
}

func TestDecreasingVersionsAreReported(t *testing.T) {
	b := newBook(2)
	b.put(b.commit(0, 20), wal.Insert, "a")
	b.put(b.commit(0, 20), wal.Update, "equal is allowed")
	b.put(b.commit(1, 10), wal.Update, "another site's do not count")
	found := 0
	differ := func(string, ...any) { found++ }
	if b.h.ordered(differ); found != 0 {
		t.Errorf("%d reports of a register in order", found)
	}
	b.put(b.commit(0, 19), wal.Update, "b")
	if b.h.ordered(differ); found != 1 {
		t.Errorf("%d reports of one decrease", found)
	}
}

func TestRivalsAreWhatNeitherHadSeen(t *testing.T) {
	b := newBook(2)
	seen := b.commit(0, 10)
	first := b.put(seen, wal.Insert, "seen")
	blind := b.put(b.commit(0, 20), wal.Update, "blind")
	incoming := b.commit(1, 15, seen)
	saw := b.put(b.commit(0, 30, incoming), wal.Update, "saw it")
	got := rivals([]*change{first, blind, saw}, incoming)
	if !slices.Equal(got, []*change{blind}) {
		t.Errorf("rivals %v", got)
	}
	if concurrent(seen, incoming) || !concurrent(blind.txn, incoming) || concurrent(saw.txn, incoming) || concurrent(seen, saw.txn) {
		t.Error("concurrency is told wrong")
	}
}

// recordOf is a correct record at a site that has rival, of an incoming change.
func recordOf(c, rival *change, kind, code string) record {
	row := func(image string) map[string]*string {
		if image == "" {
			return nil
		}
		m := map[string]*string{}
		for i, v := range strings.Split(image, separator) {
			if v != null {
				m[tables[tableInt].cols[i].name] = &v
			} else {
				m[tables[tableInt].cols[i].name] = nil
			}
		}
		return m
	}
	return record{
		kind: kind, code: code, table: tableInt, key: "1", origin: c.txn.site, commit: c.txn.commit, xid: c.txn.xid, change: c.num, remote: c.txn.version.Time,
		remoteRow: row(c.image), localSite: rival.txn.site, localTime: rival.txn.version.Time, localRow: row(rival.image),
	}
}

// verdicts runs checkRecords of a site.
func verdicts(b *book, site int, records ...record) []string {
	var out strings.Builder
	r := &run{s: Script{Sites: b.h.sites}, o: Options{Out: &out}, p: sitesOf(b.h.sites), res: &Result{}}
	r.checkRecords(b.h, site, records, func(a, c *txn) bool { return b.together && a.site == c.site })
	return r.res.Differences
}

func TestRecordsOfATrueConflictAreRight(t *testing.T) {
	b := newBook(2)
	own := b.put(b.commit(0, 20), wal.Insert, "mine")
	loser := b.put(b.commit(1, 10), wal.Insert, "theirs")
	if got := verdicts(b, 0, recordOf(loser, own, "insert_exists", "lost")); len(got) != 0 {
		t.Errorf("at the winner's site: %q", got)
	}
	if got := verdicts(b, 1, recordOf(own, loser, "insert_exists", "won")); len(got) != 0 {
		t.Errorf("at the loser's site: %q", got)
	}
}

func TestWrongRecordsAreFound(t *testing.T) {
	b := newBook(2)
	own := b.put(b.commit(0, 20), wal.Insert, "mine")
	loser := b.put(b.commit(1, 10), wal.Insert, "theirs")
	right := recordOf(loser, own, "insert_exists", "lost")
	for want, spoil := range map[string]func(r *record){
		"never made: #":          func(r *record) { r.xid++ },
		"another version":        func(r *record) { r.remote++ },
		"image than its change":  func(r *record) { r.remoteRow = right.localRow },
		"with nothing":           func(r *record) { r.localSite = -1 },
		"change that was never":  func(r *record) { r.localTime++ },
		"what it says it met":    func(r *record) { r.localRow = right.remoteRow },
		"the wrong change won":   func(r *record) { r.code = "won" },
		"without an outcome":     func(r *record) { r.code = "filled?" },
		"kind should be":         func(r *record) { r.kind = "update_deleted" },
		"neither a conflict nor": func(r *record) { r.kind, r.code = "", "lost" },
	} {
		rec := right
		spoil(&rec)
		if got := verdicts(b, 0, rec); !slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, want) }) {
			t.Errorf("want %q among %q", want, got)
		}
	}
	if got := verdicts(b, 0, right, right); len(got) != 1 || !strings.Contains(got[0], "twice") {
		t.Errorf("recorded twice: %q", got)
	}
}

func TestConflictOfASuccessorIsInvented(t *testing.T) {
	b := newBook(2)
	first := b.commit(0, 10)
	own := b.put(first, wal.Insert, "mine")
	next := b.put(b.commit(1, 20, first), wal.Update, "theirs")
	if got := verdicts(b, 0); len(got) != 0 {
		t.Errorf("taking turns needs no record: %q", got)
	}
	if got := verdicts(b, 0, recordOf(next, own, "update_origin_differs", "won")); len(got) != 1 || !strings.Contains(got[0], "had seen the other") {
		t.Errorf("got %q", got)
	}
}

func TestMissingRecordsAreFound(t *testing.T) {
	b := newBook(2)
	b.put(b.commit(0, 20), wal.Insert, "mine")
	b.put(b.commit(1, 10), wal.Insert, "theirs")
	if got := verdicts(b, 0); len(got) != 1 || !strings.Contains(got[0], "lost against a concurrent one is not on record") {
		t.Errorf("at the winner's site: %q", got)
	}
	if got := verdicts(b, 1); len(got) != 1 || !strings.Contains(got[0], "won against a concurrent one, and that is not on record") {
		t.Errorf("at the loser's site: %q", got)
	}
}

func TestWonIsNotAskedForWhereSomethingMayHaveComeBetween(t *testing.T) {
	b := newBook(3)
	b.put(b.commit(0, 10), wal.Insert, "mine")
	b.put(b.commit(2, 15), wal.Insert, "a third site's, which may have come first")
	b.put(b.commit(1, 20), wal.Insert, "theirs")
	for _, d := range verdicts(b, 0) {
		if strings.Contains(d, "theirs") {
			t.Errorf("asked for: %s", d)
		}
	}
}

func TestDeleteThatMetNoRowNeedsNoRecord(t *testing.T) {
	b := newBook(2)
	b.remove(b.commit(1, 10))
	b.put(b.commit(0, 20), wal.Insert, "only then")
	if got := verdicts(b, 0); len(got) != 0 {
		t.Errorf("got %q", got)
	}
}

func TestRowThatCameAndWentNeedsNoRecord(t *testing.T) {
	for _, together := range []bool{true, false} {
		b := newBook(2)
		b.together = together
		b.put(b.commit(1, 10), wal.Insert, "theirs")
		b.remove(b.commit(1, 15))
		b.put(b.commit(0, 20), wal.Insert, "only then")
		if got := verdicts(b, 0); (len(got) == 0) != together {
			t.Errorf("applied together %t: %q", together, got)
		}
	}
}

func TestConcurrentTruncateBeatsAChange(t *testing.T) {
	b := newBook(2)
	loser := b.put(b.commit(1, 10), wal.Insert, "theirs")
	truncate := &change{txn: b.commit(0, 20), op: wal.Truncate}
	b.h.add(tableInt, "", truncate)
	if got := verdicts(b, 0); len(got) != 1 {
		t.Errorf("without a record: %q", got)
	}
	if got := verdicts(b, 0, recordOf(loser, truncate, "update_deleted", "lost")); len(got) != 0 {
		t.Errorf("with the record: %q", got)
	}
	if got := verdicts(b, 1, recordOf(truncate, loser, "delete_origin_differs", "won")); len(got) != 0 {
		t.Errorf("at the other site: %q", got)
	}
}

// relationOf is a table's definition as a journal has it.
func relationOf(t int) *wal.Relation {
	rel := &wal.Relation{Namespace: "public", Name: tables[t].name}
	for _, c := range tables[t].cols {
		rel.Columns = append(rel.Columns, wal.Column{Name: c.name})
	}
	return rel
}

func tuple(values ...string) wal.Tuple {
	var out wal.Tuple
	for _, v := range values {
		switch v {
		case null:
			out = append(out, wal.Value{Kind: wal.Null})
		case "unchanged":
			out = append(out, wal.Value{Kind: wal.Unchanged})
		default:
			out = append(out, wal.Value{Kind: wal.Text, Data: []byte(v)})
		}
	}
	return out
}

func TestJournalAndClientMustAgree(t *testing.T) {
	big := tables[tableInt].cols[3].valueText([]byte("large"))
	seen := effect{table: tableInt, op: wal.Insert, upsert: true, key: "1", old: "1", image: strings.Join([]string{"1", "a", "0", big}, separator)}
	for name, c := range map[string]struct {
		change wal.Change
		ok     bool
	}{
		"insert":          {wal.Change{Op: wal.Insert, New: tuple("1", "a", "0", "large")}, true},
		"upsert":          {wal.Change{Op: wal.Update, New: tuple("1", "a", "0", "large")}, true},
		"not sent":        {wal.Change{Op: wal.Update, New: tuple("1", "a", "0", "unchanged")}, true},
		"other operation": {wal.Change{Op: wal.Delete, Old: tuple("1", null, null, null)}, false},
		"other key":       {wal.Change{Op: wal.Insert, New: tuple("2", "a", "0", "large")}, false},
		"other value":     {wal.Change{Op: wal.Insert, New: tuple("1", "b", "0", "large")}, false},
		"other large one": {wal.Change{Op: wal.Insert, New: tuple("1", "a", "0", "larger")}, false},
		"other old key":   {wal.Change{Op: wal.Update, OldKind: wal.OldKey, Old: tuple("3", null, null, null), New: tuple("1", "a", "0", "large")}, false},
		"NULL":            {wal.Change{Op: wal.Insert, New: tuple("1", "a", "0", null)}, false},
	} {
		c.change.Relation = relationOf(tableInt)
		if err := agree(&c.change, seen); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := wal.Change{Op: wal.Insert, Relation: relationOf(tableText), New: tuple("a", "1", "0")}
	if err := agree(&other, seen); err == nil {
		t.Error("another table passes")
	}
}

func TestKeyChangeIsADeleteAndAnInsert(t *testing.T) {
	h := newHistory(2)
	tx := &wal.Txn{Origin: 1, XID: 7, CommitLSN: 1, EndLSN: 2, VersionTime: 10, Changes: []wal.Change{{
		Op: wal.Update, Relation: relationOf(tableNumeric), OldKind: wal.OldKey, Old: tuple("1.0", null, null), New: tuple("2", "v", "3"),
	}}}
	moved := effect{table: tableNumeric, op: wal.Update, key: "2", old: "1", image: "2\x1fv\x1f3"}
	if err := h.take(0, tx, []effect{moved}); err != nil {
		t.Fatal(err)
	}
	m := h.model()[tableNumeric]
	if len(m) != 1 || m["2"].by == nil || h.registers[registerID{tableNumeric, "1"}] == nil {
		t.Errorf("model %v", m)
	}
	tx.Changes = nil
	if err := h.take(0, tx, []effect{moved}); err == nil {
		t.Error("a change that only the client saw passes")
	}
}

func TestUnequalRowsAreFound(t *testing.T) {
	b := newBook(2)
	by := b.put(b.commit(0, 10), wal.Insert, "a")
	model := map[string]wanted{"1": {b.register(), by}, "2": {b.register(), by}, "3": {b.register(), by}}
	rows := map[string]stored{"1": {image: by.image}, "2": {image: "other"}, "4": {image: by.image}}
	if d := cmp.Diff([]string{"2", "3", "4"}, unequal(model, rows)); d != "" {
		t.Error(d)
	}
}

func TestRowsMustBeOfTheirTransaction(t *testing.T) {
	b := newBook(2)
	by := b.put(b.commit(0, 100), wal.Insert, "a")
	own := by.txn
	v := &view{merged: map[uint32]merged{5: {0, own.commit, own.end}, 6: {0, own.end, own.end + 10}, 7: {1, own.commit, own.end}}}
	for name, c := range map[string]struct {
		site  int
		row   stored
		right bool
	}{
		"at its site":            {0, stored{xmin: own.xid, time: 100, site: 0}, true},
		"of a subtransaction":    {0, stored{xmin: own.xid + 1, time: 100, site: 0}, true},
		"another's at its site":  {0, stored{xmin: own.xid - 1, time: 100, site: 0}, false},
		"at another time":        {0, stored{xmin: own.xid, time: 101, site: 0}, false},
		"applied":                {1, stored{xmin: 5, time: 100, site: 0}, true},
		"applied in a batch":     {1, stored{xmin: 5, time: 120, site: 0}, true},
		"with an older stamp":    {1, stored{xmin: 5, time: 99, site: 0}, false},
		"of another batch":       {1, stored{xmin: 6, time: 100, site: 0}, false},
		"of another site":        {1, stored{xmin: 7, time: 100, site: 0}, false},
		"counted as the other's": {1, stored{xmin: 5, time: 100, site: 1}, false},
		"of nobody":              {1, stored{xmin: 9, time: 100, site: 0}, false},
	} {
		if wrong := v.misattributed(c.site, by, c.row, &tables[tableInt]); (wrong == "") != c.right {
			t.Errorf("%s: %q", name, wrong)
		}
	}
	if wrong := v.misattributed(1, by, stored{}, &tables[tableBag]); wrong != "" {
		t.Errorf("a row without a key has no version: %s", wrong)
	}
}

func TestCopyFieldsUndoesTheEscapes(t *testing.T) {
	got := copyFields(`a\tb` + "\t" + `\N` + "\t" + `{"k":"\\"q\\""}` + "\t" + "x\x1fy" + "\t" + `\\N` + "\n")
	want := []string{"a\tb", `\N`, `{"k":"\"q\""}`, "x\x1fy", `\N`}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestRecordsAreRead(t *testing.T) {
	r, err := parseRecord(copyFields("4\tinsert_exists\tlost\tt_text\t" + `{"id":"k1"}` + "\t2\t0/10\t77\t3\t1000\t" + `{"id":"k1","v":null}` + "\t1\t2000\t\\N\n"))
	if err != nil {
		t.Fatal(err)
	}
	if r.id != 4 || r.table != tableText || r.key != "k1" || r.origin != 1 || r.commit != 0x10 || r.xid != 77 || r.change != 3 || r.remote != 1000 ||
		r.localSite != 0 || r.localTime != 2000 || r.localRow != nil || r.remoteRow["v"] != nil {
		t.Errorf("read %+v", r)
	}
	for _, bad := range []string{"4", strings.Repeat("x\t", 13) + "x", "4\tk\tc\tt_int\t{\t2\t0/10\t77\t3\t1\t\\N\t1\t2\t\\N"} {
		if _, err := parseRecord(copyFields(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestNumbersThatAreEqualAreOneKey(t *testing.T) {
	c := column{numeric: true}
	for in, want := range map[string]string{"1": "1", "1.00": "1", "10": "10", "1.50": "1.5"} {
		if got := c.keyText([]byte(in)); got != want {
			t.Errorf("%s is %s, want %s", in, got, want)
		}
	}
	if got := keyText(tableFull, 7); got != "y"+separator+"7" {
		t.Errorf("composite key %q", got)
	}
}

func TestRolledBackNumberIsTakenAgain(t *testing.T) {
	l := newLedger()
	l.begin(5, []effect{{key: "lost"}})
	e := l.begin(5, []effect{{key: "kept"}})
	l.end(e, committed)
	if got := l.txns[5]; got.fate != committed || got.effects[0].key != "kept" {
		t.Errorf("ledger has %+v", got)
	}
}

func TestHalfSentImageMayBeCompletedLater(t *testing.T) {
	b := newBook(2)
	own := b.put(b.commit(0, 20), wal.Update, "mine")
	own.partial = true
	loser := b.put(b.commit(1, 10), wal.Update, "theirs")
	rec := recordOf(loser, own, "update_origin_differs", "lost")
	late := "a value of later"
	rec.localRow["big"] = &late
	if got := verdicts(b, 0, rec); len(got) != 0 {
		t.Errorf("got %q", got)
	}
	own.partial = false
	if got := verdicts(b, 0, rec); len(got) != 1 {
		t.Errorf("of a whole image: %q", got)
	}
}

// sitesOf are sites of which only the names count.
func sitesOf(n int) *pair.Pair {
	p := &pair.Pair{}
	for _, name := range names(n) {
		p.Sites = append(p.Sites, &pair.Site{Name: name})
	}
	return p
}
