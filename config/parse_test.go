package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/duri-io/duri/policy"
)

// minimal is the shortest valid file.
const minimal = `cluster: {id: 4f2c9a1e-7c1d-4b5e-9a55-0d7f6c1e2b3a, name: demo}
site: seoul
sites:
  - {id: 1, name: seoul, address: "127.0.0.1:7401"}
  - {id: 2, name: busan, address: "127.0.0.1:7402"}
bootstrap: seed
databases:
  - name: app
`

func mustParse(t *testing.T, text string) *Config {
	t.Helper()
	c, err := Parse("/etc/duri/duri.yaml", []byte(text))
	if err != nil {
		t.Fatalf("parse: %v\n%s", err, text)
	}
	return c
}

// problemsOf gives what Parse complains about, as printed.
func problemsOf(t *testing.T, text string) []string {
	t.Helper()
	_, err := Parse("duri.yaml", []byte(text))
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*Error](err); !ok {
		t.Fatalf("error is a %T, want *Error: %v", err, err)
	}
	return strings.Split(err.Error(), "\n")
}

func TestMinimalFileGetsDefaults(t *testing.T) {
	c := mustParse(t, minimal)
	if c.Listen != ":7401" || c.DataDir != "/etc/duri/data" || c.TLS.Key != "/etc/duri/site.key" {
		t.Errorf("derived: listen %q, data_dir %q, tls.key %q", c.Listen, c.DataDir, c.TLS.Key)
	}
	d := defaults()
	if c.Journal != d.Journal || c.Apply != d.Apply || c.Conflict != d.Conflict || c.Log != d.Log || c.Heartbeat != d.Heartbeat {
		t.Errorf("defaults are not applied: %+v", c)
	}
	if got := c.Self(); got.ID != 1 || got.Address != "127.0.0.1:7401" {
		t.Errorf("self is %+v", got)
	}
	if got := c.Peers(); len(got) != 1 || got[0].Name != "busan" {
		t.Errorf("peers are %+v", got)
	}
	if s, ok := c.SiteByID(2); !ok || s.Name != "busan" {
		t.Errorf("site 2 is %+v", s)
	}
	if _, ok := c.Database("app"); !ok {
		t.Error("database app is not found")
	}
	if got := c.Origin("journal.keep"); got.String() != "default" {
		t.Errorf("journal.keep comes from %s", got)
	}
	if got := c.Origin("sites[1].address"); got.String() != "/etc/duri/duri.yaml:5" {
		t.Errorf("sites[1].address comes from %s", got)
	}
}

func TestExampleIsValidAndHasEveryKey(t *testing.T) {
	c := mustParse(t, Example())
	for _, v := range c.Values() {
		if v.Origin.Kind != FromFile {
			t.Errorf("%s is not in the example", v.Key)
		}
	}
	if !strings.Contains(Example(), "#") {
		t.Error("the example has no comments")
	}
}

// TestProblems: each case changes one thing of the minimal file and must give exactly these problems.
func TestProblems(t *testing.T) {
	replace := func(old, new string) string {
		if !strings.Contains(minimal, old) {
			t.Fatalf("the minimal file has no %q", old)
		}
		return strings.Replace(minimal, old, new, 1)
	}
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", minimal + "jornal: {keep: 1h}\n", `duri.yaml:9: unknown key "jornal" (did you mean "journal"?)`},
		{"unknown nested key", minimal + "log:\n  levl: info\n", `duri.yaml:10: unknown key "levl" in log (did you mean "level"?)`},
		{"unknown key in a list", replace("- name: app", "- nme: app"), `duri.yaml:8: unknown key "nme" in databases[0] (did you mean "name"?)`},
		{"unknown key without a near one", minimal + "zzzzzz: 1\n", `duri.yaml:9: unknown key "zzzzzz"`},
		{"duplicate key", minimal + "site: busan\n", `duri.yaml:9: key "site" is given twice`},
		{"number for text", replace("name: app", "name: 2024"), `duri.yaml:8: databases[0].name is a number, want text`},
		{"list for text", replace("site: seoul", "site: [seoul]"), `duri.yaml:2: site is a list, want text`},
		{"text for group", minimal + "log: debug\n", `duri.yaml:9: log is a text, want keys and values`},
		{"group for list", replace("databases:\n  - name: app", "databases: {name: app}"), `duri.yaml:7: databases is a group of keys, want a list`},
		{"no value", minimal + "journal:\n", `duri.yaml:9: journal has no value`},
		{"duration without unit", minimal + "heartbeat: 1\n", `duri.yaml:9: heartbeat: "1" is not a duration (want a number with a unit, such as 200ms, 1h30m or 30d)`},
		{"size nonsense", minimal + "journal: {budget: lots}\n", `duri.yaml:9: journal.budget: "lots" is not a size (want a whole number with a unit, such as 64MiB or 8GiB)`},
		{"number nonsense", minimal + "apply: {batch_transactions: many}\n", `duri.yaml:9: apply.batch_transactions: "many" is not a whole number`},
		{"out of range", minimal + "apply:\n  batch_transactions: 0\n", `duri.yaml:10: apply.batch_transactions is 0, want 1 to 1000000`},
		{"budget below four segments", minimal + "journal: {segment: 64MiB, budget: 100MiB}\n", `duri.yaml:9: journal.budget is 100MiB, want 256MiB to 1048576TiB`},
		{"missing site", replace("site: seoul\n", ""), `duri.yaml: site is missing`},
		{"missing nested", replace(", name: demo", ""), `duri.yaml:1: cluster.name is missing`},
		{"missing bootstrap", replace("bootstrap: seed\n", ""), `duri.yaml: bootstrap is missing`},
		{"missing database name", replace("- name: app", "- schemas: [public]"), `duri.yaml:8: databases[0].name is missing`},
		{"bootstrap typo", replace("bootstrap: seed", "bootstrap: sed"), `duri.yaml:6: bootstrap "sed" is unknown (did you mean "seed"?)`},
		{"log level typo", minimal + "log: {level: inof}\n", `duri.yaml:9: log.level "inof" is unknown (did you mean "info"?)`},
		{"not a uuid", replace("4f2c9a1e-", "4F2C9A1E-"), `duri.yaml:1: cluster.id "4F2C9A1E-7c1d-4b5e-9a55-0d7f6c1e2b3a" is not a UUID in lower case`},
		{"one site", replace("  - {id: 2, name: busan, address: \"127.0.0.1:7402\"}\n", ""), `duri.yaml:3: sites has 1, want 2 to 8`},
		{"site id 0", replace("id: 2", "id: 0"), `duri.yaml:5: sites[1].id is 0, want 1 to 250`},
		{"site id 251", replace("id: 2", "id: 251"), `duri.yaml:5: sites[1].id is 251, want 1 to 250`},
		{"site id twice", replace("id: 2", "id: 1"), `duri.yaml:5: sites[1].id: 1 is given twice`},
		{"address twice", replace("7402", "7401"), `duri.yaml:5: sites[1].address: 127.0.0.1:7401 is given twice`},
		{"site name", replace("name: busan", "name: Busan"), `duri.yaml:5: sites[1].name "Busan" is not a name`},
		{"address without port", replace("127.0.0.1:7402", "127.0.0.1"), `duri.yaml:5: sites[1].address "127.0.0.1" is not host:port`},
		{"address without host", replace("127.0.0.1:7402", ":7402"), `duri.yaml:5: sites[1].address ":7402" has no host`},
		{"address port 0", replace("127.0.0.1:7402", "127.0.0.1:0"), `duri.yaml:5: sites[1].address "127.0.0.1:0" is not host:port`},
		{"own site not in list", replace("site: seoul", "site: jeju"), `duri.yaml:2: site "jeju" is not in sites`},
		{"system schema", minimal + "    schemas: [public, pg_toast]\n", `duri.yaml:9: databases[0].schemas[1]: schema pg_toast cannot be replicated`},
		{"schema twice", minimal + "    schemas: [a, a]\n", `duri.yaml:9: databases[0].schemas[1]: a is given twice`},
		{"template database", replace("name: app", "name: template1"), `duri.yaml:8: databases[0].name: database template1 cannot be replicated`},
		{"dsn with database", minimal + "postgres: {dsn: \"host=x dbname=app\"}\n", `duri.yaml:9: postgres.dsn names a database`},
		{"dsn url with database", minimal + "postgres: {setup_dsn: \"postgres://x/app\"}\n", `duri.yaml:9: postgres.setup_dsn names a database`},
		{"dsn unreadable", minimal + "postgres: {dsn: \"password='secret\"}\n", `duri.yaml:9: postgres.dsn: connection string cannot be read (want "host=... port=... user=..." or "postgresql://user@host:port")`},
		{"tables as a list", minimal + "    tables: [public.a]\n", `duri.yaml:9: databases[0].tables is a list, want names with values`},
		{"table without values", minimal + "    tables:\n      public.a:\n", `duri.yaml:10: databases[0].tables["public.a"] has no value`},
		{"table without schema", minimal + "    tables: {a: {}}\n", `duri.yaml:9: databases[0].tables: "a" is not the name of a table: want schema.table, each part as PostgreSQL keeps it (in double quotes if there is a dot in it)`},
		{"table twice", minimal + "    tables:\n      public.a: {}\n      public.a: {}\n", `duri.yaml:11: key "public.a" is given twice`},
		{"table under two spellings", minimal + "    tables:\n      public.a: {}\n      '\"public\".a': {}\n", "duri.yaml:10: databases[0].tables: \"public\".a and public.a name the same table"},
		{"table of another schema", minimal + "    schemas: [s]\n    tables: {public.a: {}}\n", `duri.yaml:10: databases[0].tables: schema public of public.a is not replicated`},
		{"table name is a number", minimal + "    tables: {1.5: {}}\n", `duri.yaml:9: a key of databases[0].tables is a number, want a name`},
		{"unknown key of a table", minimal + "    tables:\n      public.a:\n        dleta: [b]\n", `duri.yaml:11: unknown key "dleta" in databases[0].tables["public.a"] (did you mean "delta"?)`},
		{"mode typo", minimal + "    tables:\n      public.a:\n        mode: colum\n", `duri.yaml:11: databases[0].tables["public.a"].mode "colum" is unknown (did you mean "column"?)`},
		{"delta is a text", minimal + "    tables:\n      public.a:\n        delta: b\n", `duri.yaml:11: databases[0].tables["public.a"].delta is a text, want a list`},
		{"delta column twice", minimal + "    tables:\n      public.a:\n        delta: [b, b]\n", `duri.yaml:11: databases[0].tables["public.a"].delta[1]: b is given twice`},
		{"orphans typo", minimal + "    tables:\n      public.a:\n        foreign_keys:\n          a_fk: remove_chlid\n", `duri.yaml:12: databases[0].tables["public.a"].foreign_keys["a_fk"] "remove_chlid" is unknown (did you mean "remove_child"?)`},
		{"switch", minimal + "verify: {enabled: yes}\n", `duri.yaml:9: verify.enabled: "yes" is neither true nor false`},
		{"switch is a list", minimal + "verify: {enabled: [true]}\n", `duri.yaml:9: verify.enabled is a list, want true or false`},
		{"share", minimal + "verify: {cpu: 2%}\n", `duri.yaml:9: verify.cpu: "2%" is not a number`},
		{"share not a number", minimal + "verify: {cpu: .nan}\n", `duri.yaml:9: verify.cpu: ".nan" is not a number`},
		{"share is a list", minimal + "verify: {cpu: [1]}\n", `duri.yaml:9: verify.cpu is a list, want a number`},
		{"share too great", minimal + "verify: {cpu: 2}\n", `duri.yaml:9: verify.cpu is 2, want 0.001 to 1`},
		{"period too short", minimal + "verify: {period: 10ms}\n", `duri.yaml:9: verify.period is 10ms, want 1s to 87600h`},
		{"alias", replace("name: demo", "name: &x demo"), `duri.yaml:1: cluster.name uses a YAML anchor or alias`},
		{"not YAML", "site: [seoul\n", `duri.yaml:1: not valid YAML: did not find expected ',' or ']'`},
		{"tab", "sites:\n\t- x\n", `duri.yaml:2: not valid YAML: found character that cannot start any token`},
		{"second document", minimal + "---\nsite: x\n", `duri.yaml:9: a second document begins here`},
		{"a list", "- a\n", `duri.yaml:1: the file is a list, want keys and values`},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff([]string{c.want}, problemsOf(t, c.text)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

// voters is a valid quorum of the minimal file.
const voters = `quorum:
  members:
    - {name: seoul, peer: "127.0.0.1:7480", client: "127.0.0.1:7481"}
    - {name: busan, peer: "127.0.0.1:7482", client: "127.0.0.1:7483"}
    - {name: w, peer: "127.0.0.1:7484", client: "127.0.0.1:7485"}
`

func TestQuorumProblems(t *testing.T) {
	full := minimal + voters
	in := func(from, to string) string {
		if !strings.Contains(full, from) {
			t.Fatalf("there is no %q", from)
		}
		return strings.Replace(full, from, to, 1)
	}
	for _, c := range []struct{ name, text, want string }{
		{"sync without a quorum", minimal + "durability: {level: sync}\n", `duri.yaml:9: durability.level is sync, but there is no quorum`},
		{"one database sync", minimal + "    durability: sync\n", `duri.yaml:9: databases[0].durability is sync, but there is no quorum`},
		{"even voters", in("    - {name: w, peer: \"127.0.0.1:7484\", client: \"127.0.0.1:7485\"}\n", ""), `duri.yaml:10: quorum.members has 2, want an odd number from 3`},
		{"two that are no sites", in("name: busan, peer", "name: busn, peer"), `duri.yaml:10: quorum.members has 2 that are no sites: busn, w`},
		{"voter twice", in("name: w, peer", "name: busan, peer"), `duri.yaml:13: quorum.members[2].name: busan is given twice`},
		{"address twice", in("7485", "7480"), `duri.yaml:13: quorum.members[2].client: 127.0.0.1:7480 is given twice`},
		{"voter without address", in(", client: \"127.0.0.1:7485\"", ""), `duri.yaml:13: quorum.members[2].client is missing`},
		{"voter's name", in("name: w,", "name: W,"), `duri.yaml:13: quorum.members[2].name "W" is not a name`},
		{"both", minimal + voters + "  external: [\"https://e:2379\"]\n", `duri.yaml:14: quorum has both members and external`},
		{"external without TLS", minimal + "quorum: {external: [\"http://e:2379\"]}\n", `duri.yaml:9: quorum.external[0] "http://e:2379" is not https://host:port`},
		{"files for members", minimal + voters + "  tls: {ca: x, cert: x, key: x}\n", `duri.yaml:14: quorum.tls is for external only`},
		{"not all files", minimal + "quorum:\n  external: [\"https://e:2379\"]\n  tls: {ca: x, cert: y}\n", `duri.yaml:11: quorum.tls.key is missing`},
		{"gateway's mode", minimal + "gateway: {mode: sesion}\n", `duri.yaml:9: gateway.mode "sesion" is unknown (did you mean "session"?)`},
		{"gateway's limits", minimal + "gateway: {pool_size: 0}\n", `duri.yaml:9: gateway.pool_size is 0, want 1 to 10000`},
		{"gateway's patience", minimal + "gateway: {hold: 1ms}\n", `duri.yaml:9: gateway.hold is 1ms, want 10ms to 1h`},
		{"gateway's logins", minimal + "gateway: {login_rate: -1}\n", `duri.yaml:9: gateway.login_rate is -1, want 1 to 1000000`},
		{"an administrator twice", minimal + "gateway: {admins: [a, b, a]}\n", `duri.yaml:9: gateway.admins[2]: a is given twice`},
		{"certificate at a door", minimal + "gateway: {cert: x, key: y}\n", `duri.yaml:9: gateway.cert and gateway.key are not for the mode door`},
		{"certificate without key", minimal + "gateway: {mode: session, cert: x}\n", `duri.yaml:9: gateway.cert and gateway.key go together`},
		{"clients' authority at a door", minimal + "gateway: {client_ca: x}\n", `duri.yaml:9: gateway.client_ca is not for the mode door`},
		{"logins at a door", minimal + "gateway: {login_ca: {cert: x, key: y}}\n", `duri.yaml:9: gateway.login_ca is not for the mode door`},
		{"clients' authority without TLS", minimal + "gateway: {mode: session, client_ca: x}\n", `duri.yaml:9: gateway.client_ca is given without gateway.cert`},
		{"clients' authority without logins", minimal + "gateway: {mode: session, cert: x, key: y, client_ca: z}\n", `duri.yaml:9: gateway.client_ca is given without gateway.login_ca`},
		{"logins' authority without key", minimal + "gateway: {mode: session, login_ca: {cert: x}}\n", `duri.yaml:9: gateway.login_ca.cert and gateway.login_ca.key go together`},
		{"roles without an authority", minimal + "gateway: {mode: session, login_ca: {roles: [a]}}\n", `duri.yaml:9: gateway.login_ca.roles is given without gateway.login_ca.cert`},
		{"a role twice", minimal + "gateway: {mode: session, login_ca: {cert: x, key: y, roles: [a, a]}}\n", `duri.yaml:9: gateway.login_ca.roles[1]: a is given twice`},
		{"level typo", minimal + "durability: {level: snyc}\n", `duri.yaml:9: durability.level "snyc" is unknown (did you mean "sync"?)`},
		{"database's level typo", minimal + "    durability: snyc\n", `duri.yaml:9: databases[0].durability "snyc" is unknown (did you mean "sync"?)`},
		{"policy typo", minimal + "durability: {policy: durability}\n", `duri.yaml:9: durability.policy "durability" is unknown`},
		{"more receipts than others", minimal + "durability: {receipts: 2}\n", `duri.yaml:9: durability.receipts is 2, want 1 to 1`},
		{"detection", minimal + "durability: {detect: 100ms}\n", `duri.yaml:9: durability.detect is 100ms, want 500ms to 1m`},
		{"no preferred site", minimal + "durability: {policy: preferred-site}\n", `duri.yaml:9: durability.preferred is missing`},
		{"strange preferred site", minimal + "durability:\n  policy: preferred-site\n  preferred: jeju\n", `duri.yaml:11: durability.preferred "jeju" is not in sites`},
		{"preferred site of another policy", minimal + "durability: {preferred: seoul}\n", `duri.yaml:9: durability.preferred is for policy preferred-site only`},
		{"site and witness", minimal + "witness: w\n" + voters, `duri.yaml:9: site and witness are both given`},
		{"witness is a site", in("site: seoul", "witness: busan"), `duri.yaml:2: witness "busan" is one of the sites`},
		{"witness is no voter", in("site: seoul", "witness: x"), `duri.yaml:2: witness "x" is not in quorum.members`},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff([]string{c.want}, problemsOf(t, c.text)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

func TestQuorumIsRead(t *testing.T) {
	c := mustParse(t, minimal)
	if c.HasRegister() || c.DurabilityOf("app") != Async || len(c.RegisterEndpoints()) > 0 || c.WitnessName() != "" {
		t.Errorf("without a quorum: %+v, %+v", c.Quorum, c.Durability)
	}
	if _, ok := c.Voter(); ok {
		t.Error("there is a voter")
	}
	c = mustParse(t, minimal+"  - {name: log, durability: async}\n"+voters+"durability: {level: sync}\n")
	if !c.HasRegister() || c.DurabilityOf("app") != Sync || c.DurabilityOf("log") != Async || c.WitnessName() != "w" {
		t.Errorf("with a quorum: %+v, %+v", c.Quorum, c.Durability)
	}
	if v, ok := c.Voter(); !ok || v.Name != "seoul" {
		t.Errorf("the own voter is %+v", v)
	}
	if diff := cmp.Diff([]string{"127.0.0.1:7481", "127.0.0.1:7483", "127.0.0.1:7485"}, c.RegisterEndpoints()); diff != "" {
		t.Error(diff)
	}
	three := strings.Replace(minimal, "bootstrap", "  - {id: 3, name: daegu, address: \"127.0.0.1:7403\"}\nbootstrap", 1)
	for _, voters := range []string{voters, strings.Replace(voters, "name: w,", "name: daegu,", 1)} { // with a witness, and without
		if c = mustParse(t, three+voters+"durability: {level: sync, receipts: 2}\n"); !c.Waits("app") || len(c.Quorum.Members) != 3 {
			t.Errorf("three sites: %+v", c.Quorum)
		}
	}
	if c.WitnessName() != "" {
		t.Errorf("of three sites, %s is the witness", c.WitnessName())
	}
	c = mustParse(t, minimal+"quorum: {external: [\"https://e:2379\"], tls: {ca: c, cert: /d, key: e}}\ndurability: {level: sync}\n")
	if !c.HasRegister() || c.RegisterEndpoints()[0] != "https://e:2379" || c.Quorum.TLS != (TLS{CA: "/etc/duri/c", Cert: "/d", Key: "/etc/duri/e"}) {
		t.Errorf("external: %+v", c.Quorum)
	}
}

func TestAWitnessNeedsLittle(t *testing.T) {
	text, _, _ := strings.Cut(strings.Replace(minimal, "site: seoul", "witness: w", 1), "bootstrap")
	c := mustParse(t, text+voters)
	if v, ok := c.Voter(); !ok || v.Name != "w" || c.Site != "" || c.DataDir != "/etc/duri/data" {
		t.Errorf("%+v, %+v", v, c)
	}
}

func TestTablePoliciesAreRead(t *testing.T) {
	c := mustParse(t, minimal+`    tables:
      public.account: {mode: column, delta: [balance], foreign_keys: {fk_name: remove_child}}
      '"a.b".c': {}
`)
	p := c.Databases[0].Policies()
	want := policy.Table{Mode: policy.ModeColumn, Delta: []string{"balance"}, FK: map[string]policy.Orphans{"fk_name": policy.RemoveChild}}
	if diff := cmp.Diff(want, p.Of("public", "account")); diff != "" {
		t.Error(diff)
	}
	if !p.Declares(policy.Name{Schema: "a.b", Table: "c"}) || p.Of("a.b", "c").Mode != policy.ModeRow || len(p.Tables()) != 2 {
		t.Errorf("%v", p.Tables())
	}
	if got := c.Origin(`databases[0].tables["public.account"].mode`); got.Line != 10 {
		t.Errorf("the mode comes from %s", got)
	}
}

func TestAllProblemsAreReportedAtOnceInOrder(t *testing.T) {
	got := problemsOf(t, "jornal: {keep: 1}\nsite: 5\nsites: [{id: 1, name: A}]\nlog:\n  levl: x\n  format: jsn\nheartbeat: 1\nsite: x\n")
	want := []string{
		`duri.yaml: cluster.id is missing`,
		`duri.yaml: cluster.name is missing`,
		`duri.yaml: bootstrap is missing`,
		`duri.yaml: databases is missing`,
		`duri.yaml:1: unknown key "jornal" (did you mean "journal"?)`,
		`duri.yaml:2: site is a number, want text`,
		`duri.yaml:3: sites[0].name "A" is not a name`,
		`duri.yaml:3: sites[0].address is missing`,
		`duri.yaml:3: sites has 1, want 2 to 8`,
		`duri.yaml:5: unknown key "levl" in log (did you mean "level"?)`,
		`duri.yaml:6: log.format "jsn" is unknown (did you mean "json"?)`,
		`duri.yaml:7: heartbeat: "1" is not a duration (want a number with a unit, such as 200ms, 1h30m or 30d)`,
		`duri.yaml:8: key "site" is given twice`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
}

func TestEveryProblemHasAHintUnlessItsTextSaysWhatIsWanted(t *testing.T) {
	_, err := Parse("duri.yaml", []byte("site: 5\nnope: 1\nbootstrap: x\nlisten: x\n"))
	var e *Error
	if !errors.As(err, &e) {
		t.Fatal(err)
	}
	for _, p := range e.Problems {
		if p.HintText() == "" && !strings.Contains(p.Msg, "want") {
			t.Errorf("no hint: %s", p)
		}
	}
}

func TestEmptyFileNamesWhatIsMissing(t *testing.T) {
	for _, text := range []string{"", "# only a comment\n", "{}"} {
		if got := problemsOf(t, text); len(got) < 5 || !strings.HasPrefix(got[0], "duri.yaml: cluster.id is missing") {
			t.Errorf("%q: %q", text, got)
		}
	}
}

func TestTooLargeFileIsRefused(t *testing.T) {
	got := problemsOf(t, strings.Repeat("#\n", maxFileBytes/2+1))
	if len(got) != 1 || !strings.Contains(got[0], "greater than 1MiB") {
		t.Errorf("got %q", got)
	}
}

// clearEnv removes what a developer's shell may have set.
func clearEnv(t *testing.T) {
	t.Helper()
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		if strings.HasPrefix(name, "DURI_") {
			t.Setenv(name, "") // so that it is put back afterwards
			if err := os.Unsetenv(name); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestEnvironmentOverridesTheFile(t *testing.T) {
	clearEnv(t)
	path := write(t, filepath.Join(t.TempDir(), FileName), minimal+"log: {level: verbose}\nheartbeat: 2s\n")
	t.Setenv("DURI_LOG_LEVEL", "debug") // also heals the file's wrong value
	t.Setenv("DURI_APPLY_LOCK_TIMEOUT", "50ms")
	t.Setenv("DURI_POSTGRES_DSN", "host=elsewhere password=secret")
	t.Setenv("DURI_DATA_DIR", "elsewhere")
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if c.Log.Level != "debug" || c.Apply.LockTimeout != 50*Millisecond || c.DataDir != filepath.Join(filepath.Dir(path), "elsewhere") {
		t.Errorf("not overridden: %+v", c)
	}
	for key, want := range map[string]string{
		"log.level": "DURI_LOG_LEVEL", "apply.lock_timeout": "DURI_APPLY_LOCK_TIMEOUT",
		"heartbeat": path + ":10", "log.format": "default",
	} {
		if got := c.Origin(key).String(); got != want {
			t.Errorf("%s comes from %s, want %s", key, got, want)
		}
	}
	for _, v := range c.Values() {
		if strings.Contains(v.Value, "secret") {
			t.Errorf("%s shows the password: %s", v.Key, v.Value)
		}
	}
}

func TestWrongEnvironmentIsAProblemOfTheVariable(t *testing.T) {
	clearEnv(t)
	path := write(t, filepath.Join(t.TempDir(), FileName), minimal)
	t.Setenv("DURI_HEARTBEAT", "soon")
	t.Setenv("DURI_LOG_FORMAT", "xml")
	_, err := Load(path)
	want := `DURI_HEARTBEAT: "soon" is not a duration (want a number with a unit, such as 200ms, 1h30m or 30d)` + "\n" +
		`DURI_LOG_FORMAT: log.format "xml" is unknown`
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestLoadOfNoFileHasAHint(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "no.yaml"))
	var p *Problem
	if !errors.As(err, &p) || !errors.Is(err, os.ErrNotExist) || !strings.Contains(p.HintText(), "duri init") {
		t.Errorf("got %v", err)
	}
}

func TestFindLooksInOrder(t *testing.T) {
	clearEnv(t)
	home := t.TempDir()
	t.Chdir(t.TempDir())
	t.Setenv("XDG_CONFIG_HOME", home)
	if path, err := Find(""); err == nil && path != "/etc/duri/duri.yaml" {
		t.Errorf("found %s where there is none", path)
	}
	xdg := write(t, filepath.Join(home, "duri", FileName), minimal)
	expect := func(explicit, want string) {
		t.Helper()
		if got, err := Find(explicit); err != nil || got != want {
			t.Errorf("found %q, %v; want %s", got, err, want)
		}
	}
	expect("", xdg)
	write(t, FileName, minimal)
	expect("", FileName)
	t.Setenv("DURI_CONFIG", "from-env.yaml")
	expect("", "from-env.yaml")
	expect("named.yaml", "named.yaml")
}

func TestPrintedConfigReadsBackTheSame(t *testing.T) {
	for _, text := range []string{minimal, Example()} {
		c := mustParse(t, text)
		out, err := yaml.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		again := mustParse(t, string(out))
		if diff := cmp.Diff(c.Values(), again.Values(), cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".Origin" }, cmp.Ignore())); diff != "" {
			t.Errorf("differs (-first +again):\n%s", diff)
		}
	}
}

// TestReferenceDescribesEveryKey keeps docs/reference/config.md complete.
func TestReferenceDescribesEveryKey(t *testing.T) {
	page, err := os.ReadFile("../docs/reference/config.md")
	if err != nil {
		t.Fatal(err)
	}
	c := mustParse(t, Example())
	for _, l := range leaves(c) {
		key := strings.NewReplacer("[0]", "[]", "[1]", "[]", "[2]", "[]", `["public.account"]`, "[]", `["account_branch_fkey"]`, "[]").Replace(l.key)
		row := "| `" + key + "` |"
		if !strings.Contains(string(page), row) {
			t.Errorf("docs/reference/config.md has no row %q", row)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(minimal))
	f.Add([]byte(Example()))
	f.Add([]byte("a: &a [*a, *a]\n? [x]\n: y\n"))
	f.Add([]byte("sites: [{id: 99999999999999999999, name: !!binary x}]\n<<: {site: x}\n"))
	f.Add([]byte("journal: {budget: 99999999999TiB, keep: 999999d}\n---\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Parse("duri.yaml", b)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || len(e.Problems) == 0 {
				t.Fatalf("error without problems: %v", err)
			}
			for _, p := range e.Problems {
				if p.Msg == "" || p.At.Line < 0 {
					t.Fatalf("empty problem %+v", p)
				}
			}
			return
		}
		out, err := yaml.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse("duri.yaml", out); err != nil {
			t.Fatalf("a valid configuration does not read back: %v\n%s", err, out)
		}
	})
}
