package parity

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const agentRole = "duri"

// server is a site's database with everything that Read looks at.
func server(t *testing.T, verifier string) *pgcluster.Cluster {
	t.Helper()
	c := pgtest.New(t)
	pgtest.DB(t, c, "app")
	pgtest.Exec(t, c, "app", grants.SQL(grants.Spec{Gateway: true})+fmt.Sprintf(`
		CREATE ROLE auditor NOLOGIN; CREATE ROLE clerk LOGIN PASSWORD '%s'; CREATE ROLE till LOGIN; GRANT auditor TO clerk;
		CREATE TYPE mood AS ENUM ('glad', 'sad'); CREATE TYPE pair AS (a int, b int); CREATE DOMAIN code AS text CHECK (VALUE <> '');
		CREATE TABLE account(id int PRIMARY KEY, m mood);
		ALTER ROLE clerk SET work_mem = '8MB'; ALTER ROLE clerk SET app.tenant = 'a'; ALTER DATABASE app SET statement_timeout = '1min'`, verifier))
	return c
}

func facts(t *testing.T, c *pgcluster.Cluster, site string) Facts {
	t.Helper()
	conn, err := Connect(t.Context(), c.DSN("", agentRole), "app")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	f, err := Read(t.Context(), conn, Spec{Site: site, Role: agentRole})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// codes are the findings in short.
func codes(findings []Finding) []string {
	out := []string{}
	for _, f := range findings {
		out = append(out, string(f.Grade)+" "+f.Code+": "+f.Line)
	}
	return out
}

// TestEachFactIsSeen changes one fact after the other at one of two real servers.
func TestEachFactIsSeen(t *testing.T) {
	a := server(t, "secret")
	verifier := pgtest.Query(t, a, "postgres", "SELECT rolpassword FROM pg_authid WHERE rolname = 'clerk'")[0][0]
	b := server(t, verifier)
	first := facts(t, a, "a")
	if text, err := json.Marshal(first); err != nil || strings.Contains(string(text), "SCRAM") || strings.Contains(string(text), verifier[20:]) {
		t.Errorf("a verifier leaves its site: %v %s", err, text)
	}
	if first.Roles["clerk"].Verifier == "" || first.Roles["till"].Verifier != "" || len(first.Settings) < 15 || len(first.Types) < 6 || first.Major < 15 ||
		first.Collations["default"] == "" || first.Extensions["plpgsql"] == "" || len(first.Unread) > 0 || first.RoleDefaults["clerk"]["app.tenant"] != "a" {
		t.Errorf("%+v", first)
	}
	if diff := cmp.Diff([]string{}, codes(Compare(first, facts(t, b, "b")))); diff != "" {
		t.Fatalf("equal servers (-want +got):\n%s", diff)
	}
	for _, c := range []struct {
		name, do, undo string
		want           []string
	}{
		{"verifier", "ALTER ROLE clerk PASSWORD 'secret'", "ALTER ROLE clerk PASSWORD '" + verifier + "'", []string{"blocks_role verifier: SCRAM verifier of role clerk"}},
		{"no verifier", "ALTER ROLE clerk PASSWORD NULL", "ALTER ROLE clerk PASSWORD '" + verifier + "'", []string{"blocks_role verifier: SCRAM verifier of role clerk"}},
		{"role", "CREATE ROLE guest LOGIN", "DROP ROLE guest", []string{"blocks_role role: role guest, which may log in"}},
		{"no login", "ALTER ROLE till NOLOGIN", "ALTER ROLE till LOGIN", []string{"blocks_role role: role till, which may log in"}},
		{"row security", "ALTER ROLE till BYPASSRLS", "ALTER ROLE till NOBYPASSRLS", []string{"blocks_role role_attributes: attributes of role till"}},
		{"membership", "CREATE ROLE boss; GRANT boss TO auditor", "DROP ROLE boss", []string{"blocks_role memberships: memberships of role clerk"}},
		{"extension", "CREATE EXTENSION citext", "DROP EXTENSION citext", []string{"blocks_all extension: extension citext", "warning types: types public._citext, public.citext"}},
		{"looker", "CREATE EXTENSION pageinspect", "DROP EXTENSION pageinspect", []string{"warning extension: extension pageinspect"}},
		{"extension's version", "CREATE EXTENSION hstore VERSION '1.7'", "DROP EXTENSION hstore", []string{"blocks_all extension: extension hstore", "warning types: types public._ghstore, public._hstore, public.ghstore, public.hstore"}},
		{"isolation", "ALTER SYSTEM SET default_transaction_isolation = 'serializable'", "ALTER SYSTEM RESET default_transaction_isolation", []string{"blocks_all setting: setting default_transaction_isolation"}},
		{"date style", "ALTER SYSTEM SET datestyle = 'German'", "ALTER SYSTEM RESET datestyle", []string{"blocks_all setting: setting DateStyle"}},
		{"time zone", "ALTER SYSTEM SET timezone = 'Asia/Seoul'", "ALTER SYSTEM RESET timezone", []string{"blocks_all setting: setting TimeZone"}},
		{"search path", "ALTER SYSTEM SET search_path = 'other'", "ALTER SYSTEM RESET search_path", []string{"blocks_all setting: setting search_path"}},
		{"timeout", "ALTER SYSTEM SET lock_timeout = '7s'", "ALTER SYSTEM RESET lock_timeout", []string{"warning setting: setting lock_timeout"}},
		{"database's setting", "ALTER DATABASE app SET search_path = x", "ALTER DATABASE app RESET search_path", []string{"blocks_all database_setting: setting search_path of the database"}},
		{"database's timeout", "ALTER DATABASE app SET statement_timeout = '2min'", "ALTER DATABASE app SET statement_timeout = '1min'", []string{"warning database_setting: setting statement_timeout of the database"}},
		{"site's name", "ALTER DATABASE app SET app.site = 'b'", "ALTER DATABASE app RESET app.site", []string{"warning database_setting: setting app.site of the database"}},
		{"database's zone", "ALTER DATABASE app SET timezone = 'Asia/Seoul'", "ALTER DATABASE app RESET timezone", []string{"blocks_all database_setting: setting TimeZone of the database"}},
		{"role's setting", "ALTER ROLE clerk SET app.tenant = 'b'", "ALTER ROLE clerk SET app.tenant = 'a'", []string{"blocks_role role_setting: setting app.tenant of role clerk"}},
		{"role's setting here", "ALTER ROLE clerk IN DATABASE app SET app.tenant = 'b'", "ALTER ROLE clerk IN DATABASE app RESET app.tenant", []string{"blocks_role role_setting: setting app.tenant of role clerk"}},
		{"role's setting elsewhere", "ALTER ROLE clerk IN DATABASE postgres SET app.tenant = 'b'", "ALTER ROLE clerk IN DATABASE postgres RESET app.tenant", []string{}},
		{"role's memory", "ALTER ROLE clerk SET work_mem = '9MB'", "ALTER ROLE clerk SET work_mem = '8MB'", []string{"warning role_setting: setting work_mem of role clerk"}},
		{"agent's setting", "ALTER ROLE duri SET work_mem = '9MB'", "ALTER ROLE duri RESET work_mem", []string{}},
		{"new type", "CREATE TYPE other AS ENUM ('x')", "DROP TYPE other", []string{"warning types: types public._other, public.other"}},
		{"table", "CREATE TABLE other(a int)", "DROP TABLE other", []string{}},
		{"schema duri", "CREATE SCHEMA IF NOT EXISTS duri; CREATE FUNCTION duri.mark(bytea) RETURNS void LANGUAGE sql AS ''", "DROP FUNCTION duri.mark(bytea)", []string{"blocks_all mark: schema duri with the function duri.mark"}},
		// Last, as it cannot be taken back.
		{"type's OID", "DROP TYPE pair; CREATE TYPE pair AS (a int, b int)", "SELECT", []string{"blocks_types type_oids: OIDs of types public._pair, public.pair"}},
	} {
		run := func(sql string) {
			for s := range strings.SplitSeq(sql, "; ") { // ALTER SYSTEM stands alone
				pgtest.Exec(t, b, "app", s)
			}
			pgtest.Exec(t, b, "app", "SELECT pg_reload_conf()")
		}
		run(c.do)
		want := c.want
		reach(t, c.name, want, func() []string { return codes(Compare(facts(t, a, "a"), facts(t, b, "b"))) })
		run(c.undo)
		if c.undo != "SELECT" {
			reach(t, c.name+" undone", []string{}, func() []string { return codes(Compare(facts(t, a, "a"), facts(t, b, "b"))) })
		}
	}
	found := Compare(facts(t, a, "a"), facts(t, b, "b"))
	old := first.Types["public.pair"]
	if f := Blocks(found, Session{"app", "clerk", []uint32{first.Types["public.mood"], old}, false}, "a", "b"); f == nil || f.Code != "type_oids" {
		t.Errorf("a session that has seen the type may go: %v", f)
	}
	if f := Blocks(found, Session{"app", "clerk", []uint32{first.Types["public.mood"]}, false}, "a", "b"); f != nil {
		t.Errorf("one that has not may not: %v", f)
	}
	// As a role that may not read them.
	conn, err := Connect(t.Context(), b.DSN("", "till"), "app")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	blind, err := Read(t.Context(), conn, Spec{Site: "b", Role: agentRole})
	if got := codes(Compare(first, blind)); err != nil || !slices.Contains(got, "warning unread: verifiers") {
		t.Errorf("%q, %v", got, err)
	}
}

// reach waits: a reload takes a moment.
func reach(t *testing.T, what string, want []string, got func() []string) {
	t.Helper()
	var last []string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		if last = got(); slices.Equal(last, want) {
			return
		}
	}
	t.Errorf("%s (-want +got):\n%s", what, cmp.Diff(want, last))
}

func TestLocalesOfRealServersDiffer(t *testing.T) {
	c := pgtest.New(t)
	pgtest.Exec(t, c, "postgres", "CREATE DATABASE app ENCODING 'UTF8' LOCALE 'C.UTF-8' TEMPLATE template0")
	pgtest.Exec(t, c, "postgres", "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
	pgtest.Exec(t, c, "postgres", "CREATE DATABASE icu ENCODING 'UTF8' LOCALE 'C' LOCALE_PROVIDER icu ICU_LOCALE 'de-DE' TEMPLATE template0")
	of := func(database string) Facts {
		conn, err := Connect(t.Context(), c.DSN("", "postgres"), database)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		f, err := Read(t.Context(), conn, Spec{Site: database})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	if got := codes(Compare(of("app"), of("latin"))); !slices.Contains(got, "blocks_all encoding: server_encoding") || !slices.Contains(got, "blocks_all collate: LC_COLLATE") {
		t.Errorf("%q", got)
	}
	if got := codes(Compare(of("app"), of("icu"))); !slices.Contains(got, "blocks_all locale_provider: locale provider") || !slices.Contains(got, "blocks_all locale: locale of the provider libc") {
		t.Errorf("%q", got)
	}
}

// TestNothingIsOverlooked: whichever field of Facts differs, Compare says so, and that of two equal ones is empty.
func TestNothingIsOverlooked(t *testing.T) {
	base := func() Facts {
		return Facts{
			Site: "a", Database: "app", Major: 15, Encoding: "UTF8", Provider: "libc", Collate: "C", Ctype: "C", Locale: "x",
			Collations: map[string]string{"default": "1"}, Extensions: map[string]string{"plpgsql": "1.0"},
			Roles:    map[string]Role{"clerk": {Verifier: "00", Attributes: []string{"createdb"}, Member: []string{"auditor"}}},
			Settings: map[string]string{"DateStyle": "ISO"}, Defaults: map[string]string{"search_path": "x"},
			RoleDefaults: map[string]map[string]string{"clerk": {"app.x": "1"}}, Types: map[string]uint32{"public.mood": 20000}, Mark: true, LoginCA: "all roles",
		}
	}
	change := map[string]func(*Facts){
		"Major": func(f *Facts) { f.Major++ }, "Encoding": func(f *Facts) { f.Encoding = "LATIN1" }, "Provider": func(f *Facts) { f.Provider = "icu" },
		"Collate": func(f *Facts) { f.Collate = "x" }, "Ctype": func(f *Facts) { f.Ctype = "x" }, "Locale": func(f *Facts) { f.Locale = "y" },
		"Collations": func(f *Facts) { f.Collations["default"] = "2" }, "Extensions": func(f *Facts) { f.Extensions["plpgsql"] = "1.1" },
		"Roles": func(f *Facts) { delete(f.Roles, "clerk") }, "Settings": func(f *Facts) { f.Settings["DateStyle"] = "SQL" },
		"Defaults": func(f *Facts) { delete(f.Defaults, "search_path") }, "RoleDefaults": func(f *Facts) { f.RoleDefaults["clerk"]["app.x"] = "2" },
		"Types": func(f *Facts) { f.Types["public.mood"]++ }, "Mark": func(f *Facts) { f.Mark = false },
		"LoginCA": func(f *Facts) { f.LoginCA = "" },
		"Unread":  func(f *Facts) { f.Unread = map[string]string{"verifiers": "x"} },
	}
	ft := reflect.TypeFor[Facts]()
	for field := range ft.Fields() {
		name := field.Name
		if name != "Site" && name != "Database" && change[name] == nil {
			t.Errorf("nothing tests field %s", name)
		}
	}
	for name, do := range change {
		a, b := base(), base()
		b.Site = "b"
		if got := Compare(a, b); len(got) != 0 {
			t.Fatalf("equal: %v", got)
		}
		do(&b)
		got, mirrored := Compare(a, b), Compare(b, a)
		if len(got) != 1 || got[0].Hint == "" || got[0].Values[0] == got[0].Values[1] || got[0].Sites != [2]string{"a", "b"} {
			t.Errorf("%s: %+v", name, got)
			continue
		}
		if diff := cmp.Diff(codes(got), codes(mirrored)); diff != "" && name != "Provider" { // whose line names one
			t.Errorf("%s, from the other side:\n%s", name, diff)
		}
	}
}

// TestCollisionBlocks: an OID that means another type at the other site.
func TestCollisionBlocks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		names := []string{"a", "b", "c", "d"}
		types := func(label string) map[string]uint32 {
			m, used := map[string]uint32{}, map[uint32]bool{}
			for _, n := range names {
				oid := uint32(rapid.IntRange(20000, 20005).Draw(t, label+n))
				if rapid.Bool().Draw(t, "has "+n) && !used[oid] {
					m[n], used[oid] = oid, true
				}
			}
			return m
		}
		a, b := Facts{Site: "a", Database: "app", Types: types("a")}, Facts{Site: "b", Database: "app", Types: types("b")}
		found := Compare(a, b)
		atB := map[uint32]string{}
		for n, oid := range b.Types {
			atB[oid] = n
		}
		for n, oid := range a.Types {
			other, taken := atB[oid]
			want := taken && other != n || b.Types[n] != 0 && b.Types[n] != oid
			if got := Blocks(found, Session{Database: "app", Types: []uint32{oid}}, "a", "b") != nil; got != want {
				t.Fatalf("type %s with OID %d: blocked %v, want %v", n, oid, got, want)
			}
		}
		if Blocks(found, Session{Database: "app"}, "a", "b") != nil {
			t.Fatal("a session that has seen no type is blocked")
		}
	})
}

func TestBlocks(t *testing.T) {
	found := []Finding{
		{Code: "w", Grade: Warning, Database: "app", Sites: [2]string{"a", "b"}},
		{Code: "r", Grade: BlocksRole, Role: "clerk", Database: "app", Sites: [2]string{"a", "b"}},
		{Code: CodeVerifier, Grade: BlocksRole, Role: "robot", Database: "app", Sites: [2]string{"a", "b"}},
		{Code: "all", Grade: BlocksAll, Database: "app", Sites: [2]string{"a", "c"}},
	}
	for _, c := range []struct {
		s        Session
		from, to string
		want     string
	}{
		{Session{"app", "clerk", nil, false}, "a", "b", "r"},
		{Session{"app", "clerk", nil, false}, "b", "a", "r"},
		{Session{"app", "till", nil, false}, "a", "b", ""},
		{Session{"app", "till", nil, false}, "a", "c", "all"},
		{Session{"app", "till", nil, false}, "c", "a", "all"},
		{Session{"app", "till", nil, false}, "b", "c", ""},
		{Session{"other", "clerk", nil, false}, "a", "b", ""},
		{Session{"app", "clerk", nil, false}, "a", "a", ""},
		{Session{"app", "robot", nil, false}, "a", "b", CodeVerifier},
		{Session{"app", "robot", nil, true}, "a", "b", ""},
		{Session{"app", "clerk", nil, true}, "a", "b", "r"},
		{Session{"app", "robot", nil, true}, "a", "c", "all"},
	} {
		got := ""
		if f := Blocks(found, c.s, c.from, c.to); f != nil {
			got = f.Code
		}
		if got != c.want {
			t.Errorf("%+v from %s to %s: %q, want %q", c.s, c.from, c.to, got, c.want)
		}
	}
}
