package server

import (
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/verify"
	"github.com/duri-io/duri/wal"
)

// journalOf makes a journal of a site that begins at a greatest version time and holds transactions with given version
// times, of one change each.
func journalOf(t *testing.T, site wal.SiteID, begins wal.Time, txns map[wal.Time]wal.Change, order ...wal.Time) *journal.Journal {
	t.Helper()
	j, err := journal.Create(filepath.Join(t.TempDir(), "j"), journal.Header{
		Cluster: "00000000-0000-4000-8000-000000000000", Site: site, SiteName: "s", ServerVersion: 150000, Encoding: "UTF8",
		Incarnation: journal.Incarnation{SystemID: 1, Timeline: 1, Database: "app", Slot: "duri_app", CreatedLSN: 100},
		Settings:    pg.WireSettings(), From: 100, MaxVersionTime: begins,
	}, journal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	for i, at := range order {
		lsn := wal.LSN(1000 + 100*i)
		txn := &wal.Txn{Origin: site, XID: uint32(700 + i), CommitLSN: lsn, EndLSN: lsn + 50, CommitTime: at, VersionTime: at, Changes: []wal.Change{txns[at]}}
		if err := j.AppendTxn(txn); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Sync(); err != nil {
		t.Fatal(err)
	}
	return j
}

func TestDeletesAreFoundInTheJournals(t *testing.T) {
	relation := func(table string) *wal.Relation {
		return (&wal.Relation{
			OID: 16384, Namespace: "public", Name: table, Identity: wal.IdentityDefault,
			Columns: []wal.Column{{Name: "v", TypeOID: 25, TypeMod: -1}, {Name: "a", TypeOID: 23, TypeMod: -1, Key: true}, {Name: "b", TypeOID: 25, TypeMod: -1, Key: true}},
		}).Seal()
	}
	text := func(s string) wal.Value { return wal.Value{Kind: wal.Text, Data: []byte(s)} }
	key := func(a, b string) wal.Tuple { return wal.Tuple{{Kind: wal.Omitted}, text(a), text(b)} }
	row := func(a, b string) wal.Tuple { return wal.Tuple{text("v"), text(a), text(b)} }
	del := func(table, a, b string) wal.Change {
		return wal.Change{Op: wal.Delete, Relation: relation(table), OldKind: wal.OldKey, Old: key(a, b)}
	}
	mine := journalOf(t, 1, 50, map[wal.Time]wal.Change{
		100: del("t", "1", "x"),
		110: del("other", "2", "x"),
		120: {Op: wal.Update, Relation: relation("t"), OldKind: wal.OldKey, Old: key("3", "x"), New: row("33", "x")}, // rule 10
		130: {Op: wal.Update, Relation: relation("t"), OldKind: wal.OldKey, Old: key("4", "x"), New: row("4", "x")},
		140: {Op: wal.Insert, Relation: relation("t"), New: row("1", "x")},
	}, 100, 110, 120, 130, 140)
	theirs := journalOf(t, 2, 70, map[wal.Time]wal.Change{
		90:  del("t", "1", "x"),
		101: del("t", "5", `y","z`),
		102: {Op: wal.Truncate, Relation: relation("u")},
	}, 90, 101, 102)

	search := func(table string, keys ...verify.Key) []verify.Deletion {
		s := newGraveSearch(verify.Table{Schema: "public", Name: table, Key: []string{"a", "b"}}, keys)
		for _, j := range []*journal.Journal{mine, theirs} {
			if err := s.read(t.Context(), j); err != nil {
				t.Fatal(err)
			}
		}
		return s.found
	}
	const since = 71 // what both journals hold
	want := []verify.Deletion{
		{Version: wal.Version{Time: 100, Site: 1}, Since: since},
		{Since: since},
		{Version: wal.Version{Time: 120, Site: 1}, Since: since},
		{Since: since},
		{Version: wal.Version{Time: 101, Site: 2}, Since: since},
		{Since: since},
	}
	got := search("t", verify.Key{"1", "x"}, verify.Key{"2", "x"}, verify.Key{"3", "x"}, verify.Key{"4", "x"}, verify.Key{"5", `y","z`}, verify.Key{"33", "x"})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := search("u", verify.Key{"9", "x"}); got[0].Version != (wal.Version{Time: 102, Site: 2}) {
		t.Errorf("a truncated table: %+v", got)
	}
}
