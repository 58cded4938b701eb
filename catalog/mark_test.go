package catalog

import (
	"fmt"
	"strings"
	"testing"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
)

// TestMarkClaimsNoMoreThanCommitWaitsFor: a level that another site's receipt belongs to is written down only while this
// database's walsender is synchronous: the name alone may be that of another database's agent, or of one among several. Any role
// may mark.
func TestMarkClaimsNoMoreThanCommitWaitsFor(t *testing.T) {
	c, _ := migrated(t)
	pgtest.Exec(t, c, "shop", "CREATE ROLE joe LOGIN; CREATE TABLE t (id int); GRANT INSERT ON t TO joe")
	pgtest.Exec(t, c, "shop", "SELECT pg_create_logical_replication_slot('peek', 'pgoutput')")
	pgtest.Exec(t, c, "postgres", "ALTER SYSTEM SET synchronous_standby_names = '1 (duri_other, duri_shop)'")
	pgtest.Exec(t, c, "postgres", "SELECT pg_reload_conf()")
	joe, err := pg.Connect(t.Context(), c.DSN("shop", "joe"), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(joe)
	for level, want := range map[string]string{"off": "01", "local": "02", "remote_write": "02", "on": "02", "remote_apply": "02"} {
		sql := fmt.Sprintf("BEGIN; SET LOCAL synchronous_commit = %s; INSERT INTO t VALUES (1); SELECT duri.mark('0123456789abcdef'); SET LOCAL synchronous_commit = local; COMMIT", level)
		if _, err := pg.Rows(t.Context(), joe, sql); err != nil {
			t.Fatal(err)
		}
		// The message's prefix, the length of its content (17), and the content's first byte.
		const head = "647572692e6d61726b0000000011"
		found := ""
		for _, r := range pgtest.Query(t, c, "shop", `SELECT encode(data, 'hex') FROM pg_logical_slot_get_binary_changes('peek', NULL, NULL,
			'proto_version', '1', 'publication_names', 'duri', 'messages', 'true')`) {
			if _, behind, ok := strings.Cut(r[0], head); ok {
				found = behind[:2]
			}
		}
		if found != want {
			t.Errorf("%s is written down as %q, want %q", level, found, want)
		}
	}
}
