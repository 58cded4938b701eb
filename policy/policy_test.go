package policy

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestNamesAreReadAndRefused(t *testing.T) {
	for text, want := range map[string]Name{
		"public.account":      {"public", "account"},
		`"a.b"."c""d"`:        {"a.b", `c"d`},
		`public."Weird.Name"`: {"public", "Weird.Name"},
		"Sales Q1.item":       {"Sales Q1", "item"},
	} {
		if got, err := ParseName(text); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, bad := range []string{"", ".", "account", "a.", ".b", "a.b.c", `"a.b`, `"a"b.c`, `a"b.c`, `"".b`, `a.""`, `"a".`} {
		if got, err := ParseName(bad); err == nil {
			t.Errorf("%q was read as %+v", bad, got)
		}
	}
	if got := (Name{"a.b", `c"d`}).SQL(); got != `"a.b"."c""d"` {
		t.Error(got)
	}
}

func TestNamesReadBackWhatTheyPrint(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		word := rapid.StringMatching(`[a-c."한 ]{1,5}`)
		n := Name{word.Draw(t, "schema"), word.Draw(t, "table")}
		if got, err := ParseName(n.String()); err != nil || got != n {
			t.Fatalf("%+v prints as %s, which reads as %+v (%v)", n, n, got, err)
		}
	})
}

var account = Name{"public", "account"}

func TestWhatIsNotDeclaredIsTheDefault(t *testing.T) {
	s := NewSet(map[Name]Table{account: {Delta: []string{"balance"}, FK: map[string]Orphans{"f": RemoveChild}}},
		map[Name]Name{{"public", "account_1"}: account})
	if got := s.Of("public", "other"); got.Mode != ModeRow || got.NeedsFull() || got.Orphans("f") != Report {
		t.Errorf("%+v", got)
	}
	for _, table := range []string{"account", "account_1"} {
		got := s.Of("public", table)
		if got.Mode != ModeRow || !slices.Equal(got.Delta, []string{"balance"}) || got.Orphans("f") != RemoveChild || got.Orphans("g") != Report {
			t.Errorf("%s: %+v", table, got)
		}
	}
	if got := (Set{}).Of("a", "b"); got.Mode != ModeRow {
		t.Errorf("zero Set: %+v", got)
	}
}

func TestTheFileWinsTableByTable(t *testing.T) {
	b, c := Name{"public", "b"}, Name{"public", "c"}
	file := NewSet(map[Name]Table{account: {Mode: ModeColumn}, c: {}}, nil)
	sql := NewSet(map[Name]Table{account: {Delta: []string{"balance"}}, b: {Mode: ModeColumn}, c: {Mode: ModeColumn}}, map[Name]Name{{"public", "b_1"}: b})
	got, both := Merge(file, sql)
	if d := cmp.Diff([]Name{account, c}, both); d != "" {
		t.Error(d)
	}
	if a := got.Of("public", "account"); a.Mode != ModeColumn || len(a.Delta) != 0 {
		t.Errorf("account is mixed: %+v", a)
	}
	if got.Of("public", "b_1").Mode != ModeColumn || got.Of("public", "c").Mode != ModeRow {
		t.Error("b_1 or c")
	}
	if sql.Of("public", "account").Mode != ModeRow {
		t.Error("the set of SQL was changed")
	}
	if got, both := Merge(Set{}, Set{}); len(got.Tables()) != 0 || len(both) != 0 {
		t.Error("nothing and nothing is something")
	}
}

func drawTable(t *rapid.T) Table {
	word := rapid.SampledFrom([]string{"a", "b", "c"})
	return Table{
		Mode:  rapid.SampledFrom([]Mode{"", ModeRow, ModeColumn}).Draw(t, "mode"),
		Delta: rapid.SliceOfN(word, 0, 3).Draw(t, "delta"),
		FK:    rapid.MapOfN(word, rapid.SampledFrom(AllOrphans), 0, 2).Draw(t, "fk"),
	}
}

func drawSet(t *rapid.T) Set {
	name := rapid.Custom(func(t *rapid.T) Name {
		word := rapid.SampledFrom([]string{"x", "y", `z."`})
		return Name{word.Draw(t, "schema"), word.Draw(t, "table")}
	})
	return NewSet(rapid.MapOfN(name, rapid.Custom(drawTable), 0, 3).Draw(t, "set"), nil)
}

// means spells out what a set does for each table that could be drawn.
func means(s Set) map[string]bool {
	out := map[string]bool{}
	for _, schema := range []string{"x", "y", `z."`} {
		for _, table := range []string{"x", "y", `z."`} {
			p := s.Of(schema, table)
			for _, col := range []string{"a", "b", "c"} {
				at := schema + "/" + table + "/" + col
				out[at+" delta"] = slices.Contains(p.Delta, col)
				out[at+" "+string(p.Orphans(col))] = true
			}
			out[schema+"/"+table+" column"] = p.Mode == ModeColumn
		}
	}
	return out
}

// TestFingerprintsAreEqualExactlyWhenTheMeaningIs is what agents rely on to hold a direction.
func TestFingerprintsAreEqualExactlyWhenTheMeaningIs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := drawSet(t), drawSet(t)
		same := cmp.Equal(means(a), means(b))
		if (Fingerprint(a) == Fingerprint(b)) != same {
			t.Fatalf("means the same: %t\n%v\n%v", same, a, b)
		}
		err := Difference("a", "b", a, b)
		if (err == nil) != same {
			t.Fatalf("means the same: %t, but difference %v", same, err)
		}
		doc, err := json.Marshal(a)
		var back Set
		if err != nil || json.Unmarshal(doc, &back) != nil || Fingerprint(back) != Fingerprint(a) {
			t.Fatalf("%s (%v) reads back as %+v", doc, err, back)
		}
	})
}

func TestTheDifferenceNamesTheTable(t *testing.T) {
	mine := NewSet(map[Name]Table{account: {Delta: []string{"balance"}}, {"public", "z"}: {Mode: ModeColumn}}, nil)
	err := Difference("seoul", "busan", mine, NewSet(map[Name]Table{account: {FK: map[string]Orphans{"f": RemoveChild}}}, nil))
	var d *DifferenceError
	if !errors.As(err, &d) || d.Table != account || d.More != 1 || d.HintText() == "" {
		t.Fatalf("%v", err)
	}
	const want = "table public.account has another policy at busan (mode row, f remove_child) than at seoul (mode row, delta balance), and 1 more tables differ"
	if err.Error() != want {
		t.Errorf("%s", err)
	}
	err = Difference("seoul", "busan", Set{}, NewSet(map[Name]Table{account: {Mode: ModeColumn}}, nil))
	if err == nil || !strings.Contains(err.Error(), "busan (mode column) than at seoul (default)") {
		t.Errorf("%v", err)
	}
}

func TestBadSetsAreErrors(t *testing.T) {
	for _, doc := range []string{`{`, `[]`, `{"account": {}}`, `{"a.b": 1}`} {
		var s Set
		if err := json.Unmarshal([]byte(doc), &s); err == nil {
			t.Errorf("%s was read", doc)
		}
	}
}

func TestPoliciesOfSQLAreReadStrictly(t *testing.T) {
	got, err := Parse([]byte(`{"mode": "column", "delta": ["n"], "foreign_keys": {"f": "resurrect_parent"}}`))
	want := Table{ModeColumn, []string{"n"}, map[string]Orphans{"f": ResurrectParent}}
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Error(err, d)
	}
	for _, bad := range []string{``, `[]`, `{"mode": "rows"}`, `{"mod": "row"}`, `{"delta": "n"}`, `{"foreign_keys": {"f": "drop"}}`, `{} {}`} {
		if _, err := Parse([]byte(bad)); err == nil {
			t.Errorf("%s was read", bad)
		}
	}
}

// facts are those of a table that everything may be declared for.
func facts() Facts {
	return Facts{
		Name: account, Keyed: true, ForeignKeys: []string{"f", "g"},
		Columns: []Column{
			{Name: "id", Type: "integer", Base: oidInt4, Unique: "account_pkey"},
			{Name: "n", Type: "numeric(12,2)", Base: oidNumeric},
			{Name: "r", Type: "real", Base: oidFloat4},
			{Name: "t", Type: "text", Base: 25},
			{Name: "sum", Type: "bigint", Base: oidInt8, Generated: true},
		},
	}
}

func TestCheckFindsWhatDoesNotFit(t *testing.T) {
	all := Table{ModeColumn, []string{"n"}, map[string]Orphans{"f": RemoveChild}}
	for name, c := range map[string]struct {
		table  Table
		change func(*Facts)
		want   string // codes
	}{
		"fits":              {all, nil, ""},
		"no table":          {all, func(f *Facts) { f.Missing = true }, CodeTable},
		"partition":         {all, func(f *Facts) { f.PartitionOf = Name{"public", "p"} }, CodePartition},
		"no key":            {Table{}, func(f *Facts) { f.Keyed = false }, CodeKey},
		"no column":         {Table{Delta: []string{"x"}}, nil, CodeColumn},
		"generated":         {Table{Delta: []string{"sum"}}, nil, CodeColumn},
		"float":             {Table{Delta: []string{"r"}}, nil, CodeType},
		"text":              {Table{Delta: []string{"t"}}, nil, CodeType},
		"key column":        {Table{Delta: []string{"id"}}, nil, CodeDeltaKey},
		"delta not full":    {Table{Delta: []string{"n"}}, func(f *Facts) { f.NotFull = []Name{account} }, CodeIdentity},
		"column not full":   {Table{Mode: ModeColumn}, func(f *Facts) { f.NotFull = []Name{account} }, CodeIdentity},
		"row needs no full": {Table{FK: map[string]Orphans{"g": Report}}, func(f *Facts) { f.NotFull = []Name{account} }, ""},
		"no foreign key":    {Table{FK: map[string]Orphans{"h": Report}}, nil, CodeForeignKey},
		"several":           {Table{Delta: []string{"r", "x"}}, func(f *Facts) { f.Keyed = false }, CodeKey + " " + CodeType + " " + CodeColumn},
	} {
		f := facts()
		if c.change != nil {
			c.change(&f)
		}
		var codes []string
		for _, p := range Check(c.table, f) {
			codes = append(codes, p.Code)
			if p.Text == "" || p.Hint == "" {
				t.Errorf("%s: %+v", name, p)
			}
		}
		if got := strings.Join(codes, " "); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestTheRemedyForIdentityIsExact(t *testing.T) {
	f := facts()
	f.NotFull = []Name{{"public", "account_1"}, {"public", `a"2`}}
	got := Check(Table{Mode: ModeColumn}, f)
	const want = `ALTER TABLE "public"."account_1" REPLICA IDENTITY FULL; ALTER TABLE "public"."a""2" REPLICA IDENTITY FULL`
	if len(got) != 1 || got[0].Hint != want {
		t.Errorf("%+v", got)
	}
}

func TestBoundedSumsAreWarnedAbout(t *testing.T) {
	f := facts()
	f.Columns[1].Checked = "positive"
	if got := Warnings(Table{Delta: []string{"n"}}, f); len(got) != 1 || got[0].Code != CodeCheck || !strings.Contains(got[0].Text, "positive") {
		t.Errorf("%+v", got)
	}
	if got := Warnings(Table{Mode: ModeColumn}, f); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}
