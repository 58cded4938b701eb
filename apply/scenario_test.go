package apply

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// scenarioSchema is what the tests of single rules use.
const scenarioSchema = `
CREATE TABLE t (id int PRIMARY KEY, v text, n int DEFAULT 0, u int UNIQUE, big text);
ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
CREATE TABLE bag (id int, v text);
CREATE TABLE unrelated (id int);`

// TestRecordsHoldBothImages checks the columns of one conflict record.
func TestRecordsHoldBothImages(t *testing.T) {
	a, b := newRig(t, scenarioSchema, rigOptions{asRole: true})
	a.exec("INSERT INTO t VALUES (1, 'seed', 1, NULL, NULL)")
	settle(a, b)
	a.feed.hold(b.id)
	b.feed.hold(a.id)
	a.exec("BEGIN; INSERT INTO bag VALUES (1); UPDATE t SET v = 'say \"hi\" \\ <tab>\t'; COMMIT")
	b.exec("UPDATE t SET v = '', n = NULL")
	a.captured()
	b.captured()
	a.feed.release(b.id)
	b.feed.release(a.id)
	settle(a, b)
	ours := a.feed.txns()[1]
	theirs := b.feed.txns()[0]
	want := fmt.Sprintf(`update_origin_differs|lost|public|t|{"id": "1"}|1|%s|%d|1|t|{"n": "1", "u": null, "v": "say \"hi\" \\ <tab>\t", "id": "1", "big": null}|2|t|{"n": null, "u": null, "v": "", "id": "1", "big": null}`+"\n",
		ours.CommitLSN, ours.XID)
	got := b.rows(fmt.Sprintf(`SELECT kind, code, table_schema, table_name, key, origin, origin_lsn, origin_xid, change, remote_time = '%s', remote_row, local_site, local_time = '%s', local_row FROM duri.conflict`,
		ours.VersionTime, theirs.VersionTime))
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if n := b.worker.Status().Conflicts; n != 1 {
		t.Errorf("status tells of %d conflicts", n)
	}
}
