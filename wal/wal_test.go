package wal

import (
	"encoding/json"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestLSNText(t *testing.T) {
	for text, want := range map[string]LSN{"0/0": 0, "16/B374D848": 0x16B374D848, "FFFFFFFF/FFFFFFFF": 1<<64 - 1} {
		got, err := ParseLSN(text)
		if err != nil || got != want || got.String() != text {
			t.Errorf("ParseLSN(%q) = %v, %v", text, got, err)
		}
		b, err := json.Marshal(map[string]LSN{"at": want})
		var back map[string]LSN
		if err != nil || json.Unmarshal(b, &back) != nil || back["at"] != want {
			t.Errorf("%v does not survive JSON: %s", want, b)
		}
	}
	for _, text := range []string{"", "/", "1", "1/", "/1", "100000000/0", "0/100000000", "x/1", "1/2/3", "-1/0", " 1/1"} {
		if got, err := ParseLSN(text); err == nil {
			t.Errorf("ParseLSN(%q) = %v, want an error", text, got)
		}
	}
}

func TestTimeKeepsMicroseconds(t *testing.T) {
	std := time.Date(2026, 11, 25, 20, 50, 56, 123456000, time.UTC)
	at := TimeOf(std.Add(999)) // less than a microsecond is cut
	if !at.Std().Equal(std) || at.String() != "2026-11-25T20:50:56.123456Z" {
		t.Errorf("got %s", at)
	}
	if d := at.Add(time.Second).Sub(at); d != time.Second {
		t.Errorf("a second later is %v later", d)
	}
	if got := Time(0).String(); got != "2000-01-01T00:00:00.000000Z" {
		t.Errorf("the epoch is %s", got)
	}
}

func drawVersion(t *rapid.T, label string) Version {
	return Version{Time(rapid.IntRange(-2, 2).Draw(t, label+" time")), SiteID(rapid.IntRange(0, 2).Draw(t, label+" site"))}
}

// TestVersionsAreTotallyOrdered is rule 2.
func TestVersionsAreTotallyOrdered(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := drawVersion(t, "a"), drawVersion(t, "b"), drawVersion(t, "c")
		if (a.Compare(b) == 0) != (a == b) || a.Compare(b) != -b.Compare(a) {
			t.Fatalf("%v and %v compare as %d and %d", a, b, a.Compare(b), b.Compare(a))
		}
		if a.Less(b) && b.Less(c) && !a.Less(c) {
			t.Fatalf("%v < %v < %v, but not %v < %v", a, b, c, a, c)
		}
		if a.Time != b.Time && a.Less(b) != (a.Time < b.Time) {
			t.Fatalf("the time does not come first: %v, %v", a, b)
		}
	})
}

func drawRelation(t *rapid.T) *Relation {
	r := &Relation{
		OID: rapid.Uint32().Draw(t, "oid"), Namespace: rapid.String().Draw(t, "ns"), Name: rapid.String().Draw(t, "name"),
		Identity: Identity(rapid.Byte().Draw(t, "identity")),
	}
	for range rapid.IntRange(0, 5).Draw(t, "columns") {
		r.Columns = append(r.Columns, Column{
			rapid.String().Draw(t, "col"), rapid.Uint32().Draw(t, "type"), rapid.String().Draw(t, "typename"),
			rapid.Int32().Draw(t, "mod"), rapid.Bool().Draw(t, "key"),
		})
	}
	return r.Seal()
}

func TestRelationSurvivesItsCanonicalForm(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := drawRelation(t)
		b := r.AppendCanonical(nil)
		got, err := ParseRelation(b)
		if err != nil || got.ID != r.ID || got.String() != r.String() || len(got.Columns) != len(r.Columns) {
			t.Fatalf("got %+v, %v, want %+v", got, err, r)
		}
		if n := rapid.IntRange(0, len(b)-1).Draw(t, "cut"); n < len(b) {
			if _, err := ParseRelation(b[:n]); err == nil {
				t.Fatalf("%d of %d bytes are accepted", n, len(b))
			}
		}
	})
}

// TestRelationIDTellsDefinitionsApart: any change of the definition gives another ID.
func TestRelationIDTellsDefinitionsApart(t *testing.T) {
	base := func() *Relation {
		return &Relation{OID: 1, Namespace: "s", Name: "t", Identity: IdentityDefault, Columns: []Column{{"a", 23, "", -1, true}, {"b", 25, "x.y", 4, false}}}
	}
	seen := map[RelationID]int{base().Seal().ID: -1}
	for i, change := range []func(*Relation){
		func(r *Relation) { r.OID = 2 },
		func(r *Relation) { r.Namespace, r.Name = "st", "" },
		func(r *Relation) { r.Name = "u" },
		func(r *Relation) { r.Identity = IdentityFull },
		func(r *Relation) { r.Columns = r.Columns[:1] },
		func(r *Relation) { r.Columns[0].Name = "c" },
		func(r *Relation) { r.Columns[0].TypeOID = 20 },
		func(r *Relation) { r.Columns[1].TypeName = "x.z" },
		func(r *Relation) { r.Columns[1].TypeMod = 5 },
		func(r *Relation) { r.Columns[1].Key = true },
	} {
		r := base()
		change(r)
		if was, ok := seen[r.Seal().ID]; ok {
			t.Errorf("change %d has the ID of %d", i, was)
		}
		seen[r.ID] = i
	}
}

func FuzzParseRelation(f *testing.F) {
	f.Add((&Relation{OID: 1, Namespace: "public", Name: "t", Identity: IdentityDefault, Columns: []Column{{"id", 23, "", -1, true}}}).AppendCanonical(nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRelation(b)
		if err != nil {
			return
		}
		again, err := ParseRelation(r.AppendCanonical(nil))
		if err != nil || again.ID != r.ID {
			t.Fatalf("canonical form of %+v is not stable: %v", r, err)
		}
	})
}

func TestSeenOf(t *testing.T) {
	txn := Txn{Seen: []Seen{{2, 5}, {4, 9}}}
	for site, want := range map[SiteID]LSN{1: 0, 2: 5, 3: 0, 4: 9} {
		if got := txn.SeenOf(site); got != want {
			t.Errorf("site %d: %v, want %v", site, got, want)
		}
	}
}

func TestCompleteTuples(t *testing.T) {
	for kind, want := range map[ValueKind]bool{Null: true, Text: true, Unchanged: false, Omitted: false} {
		if got := (Tuple{{Kind: Text}, {Kind: kind}}).Complete(); got != want {
			t.Errorf("with %q: %v", kind, got)
		}
	}
}
