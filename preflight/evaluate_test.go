package preflight

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/policy"
)

// healthy are the facts of a database with nothing to complain of.
func healthy() facts {
	return facts{
		database: "shop", version: 150018, encoding: "UTF8",
		settings:    map[string]string{"wal_level": "logical", "track_commit_timestamp": "on", "max_replication_slots": "10", "max_wal_senders": "10"},
		role:        &role{login: true, replication: true, bypassRLS: true},
		schemaOwner: "duri",
		publication: &publication{},
		tables: []table{{
			schema: "public", name: "t", kind: 'r', method: "heap", identity: 'd', published: true, primary: true,
			key: []keyColumn{{name: "id", typ: "integer", base: 23, typtype: "b", deterministic: true}},
		}},
	}
}

func TestHealthyDatabaseHasNoFindings(t *testing.T) {
	if got := evaluate(healthy(), Spec{}.defaults()); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}

// TestEachProblemIsFound changes one fact at a time and expects the finding "severity code object" to be the only one.
func TestEachProblemIsFound(t *testing.T) {
	one := func(change func(*table)) func(*facts) {
		return func(f *facts) { change(&f.tables[0]) }
	}
	key := func(k keyColumn) func(*facts) {
		return one(func(t *table) { k.name = "k"; t.key = append(t.key, k) })
	}
	fire := func(g trigger) func(*facts) {
		return func(f *facts) {
			g.table, g.sql, g.name = "public.t", `"public"."t"`, "tr"
			f.triggers = []trigger{g}
		}
	}
	for name, c := range map[string]struct {
		change func(*facts)
		want   string
	}{
		"old server":     {func(f *facts) { f.version = 140022 }, "error server_version server"},
		"new server":     {func(f *facts) { f.version = 190000 }, "warning server_version server"},
		"standby":        {func(f *facts) { f.standby = true }, "error in_recovery server"},
		"wal_level":      {func(f *facts) { f.settings["wal_level"] = "replica" }, "error wal_level wal_level"},
		"timestamps":     {func(f *facts) { f.settings["track_commit_timestamp"] = "off" }, "error track_commit_timestamp track_commit_timestamp"},
		"plugins":        {func(f *facts) { f.settings["output_plugin_libraries"] = "test_decoding" }, "error output_plugin_libraries output_plugin_libraries"},
		"idle slots":     {func(f *facts) { f.settings["idle_replication_slot_timeout"] = "3600" }, "warning idle_replication_slot_timeout idle_replication_slot_timeout"},
		"latin":          {func(f *facts) { f.encoding = "LATIN1" }, "error encoding database shop"},
		"sql_ascii":      {func(f *facts) { f.encoding = "SQL_ASCII" }, "error encoding database shop"},
		"slots":          {func(f *facts) { f.slots = strings.Split("a b c d e f g h i duri_x", " ") }, "error max_replication_slots max_replication_slots"},
		"senders":        {func(f *facts) { f.senders = 9 }, "error max_wal_senders max_wal_senders"},
		"origins":        {func(f *facts) { f.settings["max_active_replication_origins"] = "0" }, "error max_active_replication_origins max_active_replication_origins"},
		"no role":        {func(f *facts) { f.role = nil }, "error role role duri"},
		"no login":       {func(f *facts) { f.role.login = false }, "error privilege_login role duri"},
		"no replication": {func(f *facts) { f.role.replication = false }, "error privilege_replication role duri"},
		"no bypassrls":   {func(f *facts) { f.role.bypassRLS = false }, "error privilege_bypassrls role duri"},
		"superuser":      {func(f *facts) { *f.role = role{super: true, login: true} }, "info superuser role duri"},
		"grant":          {func(f *facts) { f.role.lacks = []privilege{{"pg_monitor", "no", "GRANT"}} }, "error privilege_pg_monitor role duri"},
		"no schema":      {func(f *facts) { f.schemaOwner = "" }, "error schema_duri schema duri"},
		"foreign schema": {func(f *facts) { f.schemaOwner = "bob" }, "error schema_duri schema duri"},
		"no publication": {func(f *facts) { f.publication = nil }, "error publication publication duri"},
		"all tables":     {func(f *facts) { f.publication.allTables = true }, "error publication_all_tables publication duri"},
		"via root":       {func(f *facts) { f.publication.viaRoot = true }, "error publication_via_root publication duri"},
		"publish":        {func(f *facts) { f.publication.lacks = []string{"truncate"} }, "error publication_publish publication duri"},
		"large objects":  {func(f *facts) { f.largeObject = 3 }, "warning large_objects database shop"},
		"subscription": {func(f *facts) {
			f.subscribers, f.origins = []string{"s"}, []string{"pg_16400"}
		}, "warning subscription subscription s"},
		"origin":   {func(f *facts) { f.origins = []string{"duri_shop_b", "bdr"} }, "warning origin replication origin bdr"},
		"prepared": {func(f *facts) { f.prepared = []string{"x"} }, "warning prepared_transaction prepared transaction x"},

		"materialized view": {one(func(t *table) { t.kind = 'm' }), "info materialized_view public.t"},
		"foreign table":     {one(func(t *table) { t.kind = 'f' }), "warning foreign_table public.t"},
		"unlogged":          {one(func(t *table) { t.unlogged, t.published = true, false }), "warning unlogged_table public.t"},
		"extension":         {one(func(t *table) { t.extension = "postgis" }), "warning extension_table public.t"},
		"not published":     {one(func(t *table) { t.published = false }), "error not_published public.t"},
		"filter":            {one(func(t *table) { t.filtered = true }), "error publication_filter public.t"},
		"access method":     {one(func(t *table) { t.method = "columnar" }), "error access_method public.t"},
		"no key":            {one(func(t *table) { t.primary, t.key = false, nil }), "warning no_key public.t"},
		"no key, full":      {one(func(t *table) { t.primary, t.key, t.identity = false, nil, 'f' }), "info no_key public.t"},
		"nothing":           {one(func(t *table) { t.identity = 'n' }), "error replica_identity public.t"},
		"deferrable":        {one(func(t *table) { t.deferrable = true }), "warning deferrable_key public.t"},
		"index gone":        {one(func(t *table) { t.identity = 'i' }), "error replica_identity public.t"},
		"index lacks":       {one(func(t *table) { t.identity, t.keyIndex, t.uncovered = 'i', true, []string{"id"} }), "error replica_identity public.t"},

		"jsonb key":        {key(keyColumn{typ: "jsonb", base: 3802, typtype: "b", deterministic: true}), "error key_type public.t.k"},
		"numrange key":     {key(keyColumn{typ: "numrange", base: 3906, typtype: "r", deterministic: true}), "error key_type public.t.k"},
		"array key":        {key(keyColumn{typ: "integer[]", base: 1007, typtype: "b", deterministic: true}), "error key_type public.t.k"},
		"citext key":       {key(keyColumn{typ: "citext", base: 16400, typtype: "b", deterministic: true}), "error key_type public.t.k"},
		"nondeterministic": {key(keyColumn{typ: "text", base: 25, typtype: "b"}), "error key_type public.t.k"},
		"trigger always":   {fire(trigger{enabled: 'A'}), "error trigger_always public.t.tr"},
		"trigger replica":  {fire(trigger{enabled: 'R'}), "error trigger_replica public.t.tr"},
		"policy does not fit": {func(f *facts) {
			f.policies = []declared{{policy.Table{Mode: policy.ModeColumn}, policy.Facts{Name: policy.Name{Schema: "public", Table: "t"}, Keyed: true, NotFull: []policy.Name{{Schema: "public", Table: "t"}}}, true}}
		}, "error policy_identity public.t"},
		"policy of no table": {func(f *facts) {
			f.policies = []declared{{policy.Table{}, policy.Facts{Name: policy.Name{Schema: "public", Table: "gone"}, Missing: true}, false}}
		}, "warning policy_table public.gone"},
		"policy with a bound": {func(f *facts) {
			f.policies = []declared{{policy.Table{Delta: []string{"n"}}, policy.Facts{
				Name: policy.Name{Schema: "public", Table: "t"}, Keyed: true, Columns: []policy.Column{{Name: "n", Base: 23, Checked: "positive"}},
			}, true}}
		}, "warning policy_check public.t"},
		"rule always": {fire(trigger{enabled: 'A', rule: true}), "error rule_always public.t.tr"},
	} {
		t.Run(name, func(t *testing.T) {
			f := healthy()
			c.change(&f)
			var got []string
			for _, x := range evaluate(f, Spec{}.defaults()) {
				got = append(got, string(x.Severity)+" "+x.Code+" "+x.Object)
				if x.Text == "" || x.Hint == "" {
					t.Errorf("finding without text or hint: %+v", x)
				}
			}
			if d := cmp.Diff([]string{c.want}, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestWhatIsAllowedIsNoFinding(t *testing.T) {
	for name, change := range map[string]func(*facts){
		"numeric, padded and enum keys": func(f *facts) {
			f.tables[0].key = []keyColumn{
				{typ: "numeric", base: 1700, typtype: "b", deterministic: true},
				{typ: "character(3)", base: oidBpchar, typtype: "b", deterministic: true},
				{typ: "mood", base: 16500, typtype: "e", deterministic: true},
			}
		},
		"identity full with a key":            func(f *facts) { f.tables[0].identity = 'f' },
		"identity index without primary key":  func(f *facts) { t := &f.tables[0]; t.identity, t.keyIndex, t.primary = 'i', true, false },
		"trigger on a table not replicated":   func(f *facts) { f.triggers = []trigger{{table: "public.u", name: "x", enabled: 'A'}} },
		"idle slots never":                    func(f *facts) { f.settings["idle_replication_slot_timeout"] = "0" },
		"own slots and origins do not count":  func(f *facts) { f.slots, f.origins = []string{"duri_a", "duri_b"}, []string{"duri_shop_a"} },
		"rows where the site is the seed":     func(f *facts) { f.tables[0].rows = true },
		"plugins with pgoutput among several": func(f *facts) { f.settings["output_plugin_libraries"] = "pgoutput, test_decoding" },
	} {
		f := healthy()
		change(&f)
		if got := evaluate(f, Spec{Bootstrap: config.BootstrapSeed}.defaults()); len(got) != 0 {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestRowsRefuseASiteThatCopiesUntilItHasJoined(t *testing.T) {
	f := healthy()
	f.tables[0].rows = true
	spec := Spec{Bootstrap: config.BootstrapCopy}.defaults()
	if got := evaluate(f, spec); len(got) != 1 || got[0].Code != "not_empty" {
		t.Errorf("before: %+v", got)
	}
	spec.Joined = true
	if got := evaluate(f, spec); len(got) != 0 {
		t.Errorf("joined: %+v", got)
	}
}

func TestTablesThatAreStillToBeCopiedMayBeDeclared(t *testing.T) {
	f := healthy()
	f.policies = []declared{{policy.Table{}, policy.Facts{Missing: true}, true}}
	spec := Spec{Bootstrap: config.BootstrapCopy}.defaults()
	if got := evaluate(f, spec); len(got) != 0 {
		t.Errorf("before: %+v", got)
	}
	spec.Joined = true
	if got := evaluate(f, spec); len(got) != 1 || got[0].Severity != SeverityWarning {
		t.Errorf("joined: %+v", got)
	}
}

func TestCapacityGrowsWithSitesAndDatabases(t *testing.T) {
	f := healthy() // 10 slots
	for _, c := range []struct {
		sites, databases int
		ok               bool
	}{{8, 1, true}, {3, 5, true}, {3, 6, false}, {2, 10, false}} {
		got := evaluate(f, Spec{Sites: c.sites, Databases: c.databases}.defaults())
		if ok := Err(got) == nil; ok != c.ok {
			t.Errorf("%d sites, %d databases: %+v", c.sites, c.databases, got)
		}
	}
}

func TestAlikeFindingsAreOneAndErrorsComeFirst(t *testing.T) {
	f := healthy()
	f.tables = nil
	for name := range strings.SplitSeq("a b c d e f g", " ") {
		f.tables = append(f.tables, table{schema: "s", name: name, kind: 'r', identity: 'd', published: true})
	}
	f.tables = append(f.tables, table{schema: "s", name: "z", kind: 'r', identity: 'n', published: true})
	got := evaluate(f, Spec{}.defaults())
	if len(got) != 2 || got[0].Code != "replica_identity" || got[1].Object != "s.a, s.b, s.c, s.d and 3 more" || len(got[1].Objects) != 7 {
		t.Errorf("%+v", got)
	}
	err := Err(got)
	var e *Error
	if !errors.As(err, &e) || !strings.HasPrefix(err.Error(), "check the database: s.z: ") || e.HintText() == "" {
		t.Errorf("error %v", err)
	}
	if err := Err(got[1:]); err != nil {
		t.Errorf("a warning is an error: %v", err)
	}
}
