package gateway

import (
	"fmt"
	"strings"
	"testing"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
)

func TestWaitsFor(t *testing.T) {
	for _, c := range []struct {
		setting string
		waits   bool
	}{
		{"", false},
		{"duri_shop", true},
		{` "duri_shop" `, true},
		{"1 (duri_shop)", true},
		{"1(DURI_SHOP)", true},
		{"FIRST 1 (duri_shop)", true},
		{`any  1 ("duri_shop")`, true},
		{"2 (duri_other, duri_shop)", true},
		{"ANY 2 (duri_shop,duri_other)", true},
		{"1 (duri_shop, duri_shop)", true},
		{"*", false},
		{"1 (*)", false},
		{"duri_other", false},
		{"duri_shop, duri_other", false}, // FIRST 1
		{"1 (duri_shop, duri_other)", false},
		{"ANY 1 (duri_other, duri_shop)", false},
		{"2 (duri_shop)", false}, // nobody can be the second
		{"2 (duri_shop, duri_shop)", false},
		{"1 (duri_shop", false},
		{"1 2 (duri_shop)", false},
		{"FIRST (duri_shop)", false},
		{"1 (duri_shop,)", false},
		{"1 (\"duri_shop, duri_other\")", false},
	} {
		if got := waitsFor(c.setting, "duri_shop"); got != c.waits {
			t.Errorf("%q: %v", c.setting, got)
		}
	}
	if waitsFor("", "") || waitsFor("1 ()", "") {
		t.Error("nobody's name is waited for")
	}
}

// TestMarkIsThatOfTheFunction: what the gateway's own statement writes is what duri.mark writes, but for a level that needs no walsender
// where all commits wait for its name. A setting that has changed since it was looked at is duri.mark's.
func TestMarkIsThatOfTheFunction(t *testing.T) {
	c := markable(t)
	pgtest.Exec(t, c, "shop", "CREATE PUBLICATION none")
	pgtest.Exec(t, c, "shop", "SELECT pg_create_logical_replication_slot('peek', 'pgoutput')")
	conn, err := pg.Connect(t.Context(), dsn(fmt.Sprintf("127.0.0.1:%d", c.Port()), ""), "", map[string]string{"search_path": "own", "standard_conforming_strings": "off"})
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Close(conn)
	rows := func(sql string, args ...string) [][]string {
		t.Helper()
		out, err := pg.Query(t.Context(), conn, sql, args...)
		if err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
		return out
	}
	// marked gives what one way of marking writes: the messages of the transactions since, in hex.
	marked := func(level, sql string, args ...string) (said [][]string, wrote string) {
		t.Helper()
		rows("BEGIN")
		rows("SET LOCAL synchronous_commit = " + level)
		rows("INSERT INTO public.ledger SELECT 1, coalesce(max(seq), 0) + 1 FROM public.ledger")
		said = rows(sql, args...)
		rows("SET LOCAL synchronous_commit = local") // there is nobody to wait for
		rows("COMMIT")
		for _, r := range pgtest.Query(t, c, "shop", `SELECT encode(data, 'hex') FROM pg_logical_slot_get_binary_changes('peek', NULL, NULL,
			'proto_version', '1', 'publication_names', 'none', 'messages', 'true')`) {
			if _, behind, ok := strings.Cut(r[0], fmt.Sprintf("%x", "duri.mark\x00")); ok {
				wrote += behind
			}
		}
		return said, wrote
	}
	const id = `\x30313233343536373839616263646566`
	for _, x := range []struct{ setting, looked string }{
		{"", ""}, {"", "1 (duri_shop)"}, {"1 (duri_shop)", "1 (duri_shop)"}, {"1 (duri_shop)", ""}, {"1 (duri_other, duri_shop)", ""}, {"ANY 1 (duri_other, duri_shop)", "1 (duri_shop)"},
	} {
		pgtest.Exec(t, c, "postgres", fmt.Sprintf("ALTER SYSTEM SET synchronous_standby_names = '%s'", x.setting))
		pgtest.Exec(t, c, "postgres", "SELECT pg_reload_conf()")
		until(t, "the setting", func() bool { return rows("SHOW synchronous_standby_names")[0][0] == x.setting })
		for i, level := range []string{"off", "local", "remote_write", "on", "remote_apply"} {
			_, want := marked(level, "SELECT duri.mark($1)", id)
			said, got := marked(level, markSQL, id, x.looked)
			if x.setting != "" && x.setting == x.looked {
				want = want[:8] + fmt.Sprintf("%02x", i+1) + want[10:] // behind the length is the level
			}
			if got != want || want == "" {
				t.Errorf("%q, looked at %q, %s: wrote %q, want %q", x.setting, x.looked, level, got, want)
			}
			if said[0][0] == "" {
				t.Errorf("%q, %s: told %q of its id", x.setting, level, said)
			}
		}
	}
	// A transaction that has not written stays without an id.
	rows("BEGIN")
	if said := rows(markSQL, id, ""); said[0][0] != "" || rows("SELECT pg_current_xact_id_if_assigned()")[0][0] != "" {
		t.Errorf("without a change: %q", said)
	}
	rows("COMMIT")
}
