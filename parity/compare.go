package parity

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Compare tells what differs between a database at two sites, the worst first. It gives the same for (a, b) as for (b, a) but for
// the order of the sites.
func Compare(a, b Facts) []Finding {
	c := &comparison{a: a, b: b}
	c.database()
	c.extensions()
	c.settings()
	c.roles()
	c.types()
	slices.SortStableFunc(c.found, func(x, y Finding) int {
		return cmp.Or(cmp.Compare(slices.Index(grades, x.Grade), slices.Index(grades, y.Grade)), cmp.Compare(x.Code, y.Code), cmp.Compare(x.Line, y.Line))
	})
	return c.found
}

type comparison struct {
	a, b  Facts
	found []Finding
}

func (c *comparison) add(g Grade, code, role, line, va, vb, hint string) {
	c.found = append(c.found, Finding{
		Code: code, Grade: g, Database: c.a.Database, Role: role, Sites: [2]string{c.a.Site, c.b.Site}, Line: line, Values: [2]string{va, vb}, Hint: hint,
	})
}

// differs adds a finding for the whole database if two values differ.
func (c *comparison) differs(g Grade, code, line, va, vb, hint string) {
	if va != vb {
		c.add(g, code, "", line, va, vb, hint)
	}
}

// read reports whether both sites could read a part; if not, it says so.
func (c *comparison) read(part string) bool {
	for _, f := range []Facts{c.a, c.b} {
		if why, bad := f.Unread[part]; bad {
			c.add(Warning, "unread", "", part, c.a.Unread[part], c.b.Unread[part], "it was not compared: "+why)
			return false
		}
	}
	return true
}

// union gives the keys of both.
func union[V any](a, b map[string]V) []string {
	keys := slices.AppendSeq(slices.Collect(maps.Keys(a)), maps.Keys(b))
	slices.Sort(keys)
	return slices.Compact(keys)
}

func (c *comparison) database() {
	a, b := c.a, c.b
	c.differs(BlocksAll, "major", "major version of PostgreSQL", strconv.Itoa(a.Major), strconv.Itoa(b.Major), "upgrade one of the sites; open sessions do not go on at another version")
	c.differs(BlocksAll, "encoding", "server_encoding", a.Encoding, b.Encoding, "make the database anew with the same ENCODING")
	const locale = "make the database anew with the same locale and provider"
	c.differs(BlocksAll, "locale_provider", "locale provider", a.Provider, b.Provider, locale)
	c.differs(BlocksAll, "collate", "LC_COLLATE", a.Collate, b.Collate, locale)
	c.differs(BlocksAll, "ctype", "LC_CTYPE", a.Ctype, b.Ctype, locale)
	c.differs(BlocksAll, "locale", "locale of the provider "+cmp.Or(a.Provider, b.Provider), a.Locale, b.Locale, locale)
	for _, name := range union(a.Collations, b.Collations) {
		va, inA := a.Collations[name]
		vb, inB := b.Collations[name]
		if inA && inB {
			c.differs(Warning, "collation_version", "version of collation "+name, va, vb,
				"texts may sort in another order, and pages that go on behind a text may miss rows: use the same operating system and ICU at both sites")
		}
	}
	yes := map[bool]string{true: "there", false: ""}
	c.differs(BlocksAll, "mark", "schema duri with the function duri.mark", yes[a.Mark], yes[b.Mark], "run the agent there once, so that it makes its schema; without marks nobody can say what became of a commit")
	c.differs(Warning, "login_ca", "gateway.login_ca, with which clients' certificates log in,", a.LoginCA, b.LoginCA,
		"give it to both agents, for the same roles (duri gateway login-ca): sessions by certificate that come to a site which does not log their role in end with 28000")
}

// lookers are extensions that no application's results depend on: they look into the server.
var lookers = strings.Fields(`pg_stat_statements pg_buffercache pgstattuple pg_prewarm amcheck pageinspect pg_freespacemap pg_visibility pgrowlocks
	pg_walinspect pg_surgery pg_wait_sampling pg_stat_kcache pg_qualstats hypopg pg_repack adminpack pgaudit pg_cron`)

func (c *comparison) extensions() {
	for _, name := range union(c.a.Extensions, c.b.Extensions) {
		va, inA := c.a.Extensions[name]
		vb, inB := c.b.Extensions[name]
		switch {
		case inA && inB:
			c.differs(Warning, "extension_version", "version of extension "+name, va, vb, "ALTER EXTENSION "+name+" UPDATE, with the same packages at both sites")
		case slices.Contains(lookers, name):
			c.add(Warning, "extension", "", "extension "+name, va, vb, "CREATE EXTENSION "+name+" where it is missing")
		default:
			c.add(BlocksAll, "extension", "", "extension "+name, va, vb, "CREATE EXTENSION "+name+" where it is missing")
		}
	}
}

// bounds are settings that change how long something may take, not what it gives.
var bounds = strings.Fields("statement_timeout lock_timeout idle_in_transaction_session_timeout idle_session_timeout transaction_timeout lc_messages client_min_messages")

// changesResults reports whether a setting may change what statements give, or may do.
func changesResults(name string) bool {
	return slices.ContainsFunc(results, func(r string) bool { return strings.EqualFold(r, name) })
}

// custom reports whether a setting is an application's own. One that a role has decides what the role may see, by row security; one
// that the whole database has is how people name a site.
func custom(name string) bool { return strings.Contains(name, ".") }

func (c *comparison) settings() {
	for _, name := range union(c.a.Settings, c.b.Settings) {
		va, inA := c.a.Settings[name]
		vb, inB := c.b.Settings[name]
		if !inA || !inB {
			continue // Of a version that has it, or hidden by what the agent has set itself.
		}
		grade := BlocksAll
		if slices.Contains(bounds, name) {
			grade = Warning
		}
		c.differs(grade, "setting", "setting "+name, quoted(va), quoted(vb), fmt.Sprintf("ALTER SYSTEM SET %s = ... and reload, at one of them", name))
	}
	for _, name := range union(c.a.Defaults, c.b.Defaults) {
		grade := Warning
		if changesResults(name) {
			grade = BlocksAll
		}
		va, vb := setTo(c.a.Defaults, name), setTo(c.b.Defaults, name)
		c.differs(grade, "database_setting", "setting "+name+" of the database", va, vb, fmt.Sprintf("ALTER DATABASE %s SET %s = ..., at one of them", c.a.Database, name))
	}
}

func quoted(v string) string { return "'" + v + "'" }

// setTo prints what a setting was set to; empty: it was not.
func setTo(m map[string]string, name string) string {
	if v, ok := m[name]; ok {
		return quoted(v)
	}
	return ""
}

func (c *comparison) roles() {
	verifiers := c.read("verifiers")
	for _, name := range union(c.a.Roles, c.b.Roles) {
		a, inA := c.a.Roles[name]
		b, inB := c.b.Roles[name]
		if !inA || !inB {
			may := map[bool]string{true: "there"}
			c.add(BlocksRole, "role", name, "role "+name+", which may log in", may[inA], may[inB], "CREATE ROLE "+name+" LOGIN ..., with the verifier of the other site (pg_authid.rolpassword) as PASSWORD")
			continue
		}
		role := func(code, line, va, vb, hint string) {
			if va != vb {
				c.add(BlocksRole, code, name, line, va, vb, hint)
			}
		}
		if verifiers && a.Verifier != b.Verifier {
			role(CodeVerifier, "SCRAM verifier of role "+name, short(a.Verifier), short(b.Verifier),
				"copy it as text: ALTER ROLE "+name+" PASSWORD 'SCRAM-SHA-256$...' with what pg_authid.rolpassword has at the other site")
		}
		role("role_attributes", "attributes of role "+name, strings.Join(a.Attributes, ", "), strings.Join(b.Attributes, ", "), "ALTER ROLE "+name+" ..., at one of them")
		role("memberships", "memberships of role "+name, strings.Join(a.Member, ", "), strings.Join(b.Member, ", "), "GRANT or REVOKE at one of them")
		for _, key := range union(c.a.RoleDefaults[name], c.b.RoleDefaults[name]) {
			va, vb := setTo(c.a.RoleDefaults[name], key), setTo(c.b.RoleDefaults[name], key)
			hint := fmt.Sprintf("ALTER ROLE %s SET %s = ..., at one of them", name, key)
			switch {
			case va == vb:
			case changesResults(key), custom(key):
				role("role_setting", "setting "+key+" of role "+name, va, vb, hint)
			default:
				c.add(Warning, "role_setting", name, "setting "+key+" of role "+name, va, vb, hint)
			}
		}
	}
}

// short is what of a hash is enough to tell two apart.
func short(hash string) string {
	if hash == "" {
		return ""
	}
	return "sha256:" + hash[:min(8, len(hash))] + "..."
}

// namedMax is how many types a finding spells out.
const namedMax = 5

// types compares OIDs. An OID that means another type at the other site lets a driver read values as what they are not. One that only
// differs is looked up anew by most, but not by those that send it back.
func (c *comparison) types() {
	byOID := func(types map[string]uint32) map[uint32]string {
		m := map[uint32]string{}
		for name, oid := range types {
			m[oid] = name
		}
		return m
	}
	inA, inB := byOID(c.a.Types), byOID(c.b.Types)
	var differ, missing []string
	var oids [2][]uint32
	for _, name := range union(c.a.Types, c.b.Types) {
		a, b := c.a.Types[name], c.b.Types[name]
		switch {
		case a == 0 || b == 0:
			missing = append(missing, name)
			continue
		case a == b:
			continue
		}
		differ = append(differ, name)
		oids[0], oids[1] = append(oids[0], a), append(oids[1], b)
	}
	for _, oid := range slices.Sorted(maps.Keys(inA)) {
		if other, ok := inB[oid]; ok && other != inA[oid] && !slices.Contains(oids[0], oid) {
			oids[0], oids[1] = append(oids[0], oid), append(oids[1], oid)
			differ = append(differ, inA[oid])
		}
	}
	if len(differ) > 0 {
		c.add(BlocksTypes, "type_oids", "", "OIDs of "+listed(differ), oidsOf(differ, c.a.Types), oidsOf(differ, c.b.Types),
			"start the other site from a physical copy, where OIDs begin equal; until then a session that has seen these types ends instead of going on there")
		c.found[len(c.found)-1].Types = oids
	}
	if len(missing) > 0 {
		there := func(types map[string]uint32) string {
			n := 0
			for _, name := range missing {
				if types[name] != 0 {
					n++
				}
			}
			if n == 0 {
				return ""
			}
			return fmt.Sprintf("%d of %d there", n, len(missing))
		}
		c.add(Warning, "types", "", listed(missing), there(c.a.Types), there(c.b.Types), "make the schema equal at both sites")
	}
}

func listed(names []string) string {
	what := "type "
	if len(names) > 1 {
		what = "types "
	}
	if len(names) > namedMax {
		return what + strings.Join(names[:namedMax], ", ") + fmt.Sprintf(" and %d more", len(names)-namedMax)
	}
	return what + strings.Join(names, ", ")
}

func oidsOf(names []string, types map[string]uint32) string {
	var out []string
	for _, name := range names[:min(len(names), namedMax)] {
		out = append(out, strconv.FormatUint(uint64(types[name]), 10))
	}
	return strings.Join(out, ", ")
}
