package gateway

import (
	"fmt"
	"slices"
	"strings"

	"github.com/duri-io/duri/pgwire"
)

// What a server is asked for after a transaction that may have changed the session's state. Its answer, and not the text
// of statements, is what the gateway believes: so it does not matter what was rolled back, or what a function did.
//
// Rows are (pin, reason, ”) and (set, parameter, value). Parameters with a dot that no extension has defined are not in
// pg_settings, so their names are given.
func probeSQL(user string, customs []string) string {
	var b strings.Builder
	b.WriteString(`/* duri: state of the session */
SELECT 'pin', 'temporary objects', '' WHERE pg_catalog.pg_my_temp_schema() <> 0 AND (
 EXISTS (SELECT FROM pg_catalog.pg_class WHERE relnamespace = pg_catalog.pg_my_temp_schema())
 OR EXISTS (SELECT FROM pg_catalog.pg_type WHERE typnamespace = pg_catalog.pg_my_temp_schema())
 OR EXISTS (SELECT FROM pg_catalog.pg_proc WHERE pronamespace = pg_catalog.pg_my_temp_schema()))
UNION ALL SELECT 'pin', 'a cursor WITH HOLD', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable)
UNION ALL SELECT 'pin', 'session advisory locks', '' WHERE EXISTS (
 SELECT FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid())
UNION ALL SELECT 'pin', 'LISTEN', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_listening_channels())
UNION ALL SELECT 'pin', 'SQL PREPARE', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE from_sql)
UNION ALL SELECT 'set', 'session_authorization', session_user::text WHERE session_user::text <> ` + quote(user) + `
UNION ALL SELECT 'set', 'role', pg_catalog.current_setting('role') WHERE pg_catalog.current_setting('role') <> 'none'
UNION ALL SELECT 'set', name, pg_catalog.current_setting(name) FROM pg_catalog.pg_settings
 WHERE source = 'session' AND name NOT LIKE 'transaction\_%'`)
	for _, name := range customs {
		q := quote(name)
		fmt.Fprintf(&b, "\nUNION ALL SELECT 'set', %s, pg_catalog.current_setting(%s, true) WHERE pg_catalog.current_setting(%s, true) IS NOT NULL", q, q, q)
	}
	return b.String()
}

// found is what a probe has found.
type found struct {
	pin      string // reasons; empty: none
	settings []pgwire.Param
}

// readProbe reads the rows of a probe.
func readProbe(rows [][]string) (f found) {
	var pins []string
	for _, r := range rows {
		switch {
		case len(r) != 3:
		case r[0] == "pin":
			pins = append(pins, r[1])
		default:
			f.settings = append(f.settings, pgwire.Param{Name: r[1], Value: r[2]})
			if r[1] == "search_path" && createsTemporary(r[2]) {
				pins = append(pins, "pg_temp is the first in search_path")
			}
		}
	}
	f.pin = strings.Join(pins, ", ")
	slices.SortFunc(f.settings, func(a, b pgwire.Param) int {
		if ra, rb := rank(a.Name), rank(b.Name); ra != rb {
			return ra - rb
		}
		return strings.Compare(a.Name, b.Name)
	})
	f.settings = slices.CompactFunc(f.settings, func(a, b pgwire.Param) bool { return a.Name == b.Name })
	return f
}

// createsTemporary reports that with a search_path what is created is temporary, which its text does not show.
func createsTemporary(path string) bool {
	path = strings.TrimLeft(strings.TrimPrefix(strings.TrimLeft(path, " "), `"$user",`), ` "`)
	return strings.HasPrefix(path, "pg_temp")
}

// rank is the order in which settings are made: who one is decides what one may set.
func rank(name string) int {
	switch name {
	case "session_authorization":
		return 0
	case "role":
		return 1
	case "search_path":
		return 2
	default:
		return 3
	}
}

// setupSQL gives a backend a session's settings, in place of those it has, and reads them back. Row security depends on
// them, so what was read is compared.
func setupSQL(settings []pgwire.Param, sequences bool) string {
	var b strings.Builder
	b.WriteString("/* duri: settings of the session */ RESET SESSION AUTHORIZATION; RESET ALL")
	if sequences {
		b.WriteString("; DISCARD SEQUENCES")
	}
	if len(settings) == 0 {
		return b.String()
	}
	b.WriteString("; SELECT pg_catalog.set_config(n, v, false) FROM (VALUES ")
	for i, p := range settings {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "(%s, %s)", quote(p.Name), quote(p.Value))
	}
	b.WriteString(") AS s(n, v); SELECT ")
	for i, p := range settings {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "pg_catalog.current_setting(%s)", quote(p.Name))
	}
	return b.String()
}

// notAsSet compares what was read back; it names the first setting that differs, never its value.
func notAsSet(settings []pgwire.Param, rows [][]string) string {
	if len(settings) == 0 {
		return ""
	}
	if len(rows) == 0 || len(rows[len(rows)-1]) != len(settings) {
		return settings[0].Name
	}
	back := rows[len(rows)-1]
	for i, p := range settings {
		if back[i] != p.Value {
			return p.Name
		}
	}
	return ""
}

// quote makes a literal that means the same whatever standard_conforming_strings is.
func quote(s string) string {
	return "E'" + strings.ReplaceAll(strings.ReplaceAll(s, `\`, `\\`), "'", "''") + "'"
}

// changed gives the reported parameters in which now differs from told.
func changed(told, now []pgwire.Param) (diff []pgwire.Param) {
	for _, p := range now {
		if !slices.Contains(told, p) {
			diff = append(diff, p)
		}
	}
	return diff
}

// apart names a parameter that must not change within a session but does from told to now: drivers read such once.
func apart(told, now []pgwire.Param) string {
	get := func(ps []pgwire.Param, name string) string {
		for _, p := range ps {
			if p.Name == name {
				return p.Value
			}
		}
		return ""
	}
	for _, name := range []string{"server_encoding", "integer_datetimes"} {
		if get(told, name) != get(now, name) {
			return name
		}
	}
	major := func(v string) string { v, _, _ = strings.Cut(v, "."); return v }
	if major(get(told, "server_version")) != major(get(now, "server_version")) {
		return "server_version"
	}
	return ""
}

// report notes the value of a reported parameter.
func reported(ps []pgwire.Param, p pgwire.Param) []pgwire.Param {
	for i := range ps {
		if ps[i].Name == p.Name {
			ps[i].Value = p.Value
			return ps
		}
	}
	return append(ps, p)
}
