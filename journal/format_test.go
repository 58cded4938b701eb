package journal

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/wal"
)

func TestHeaderSurvivesMarshalling(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := Header{
			Cluster: rapid.String().Draw(t, "cluster"), Site: wal.SiteID(rapid.Uint16().Draw(t, "site")), SiteName: rapid.String().Draw(t, "name"),
			Incarnation: Incarnation{
				SystemID: rapid.Uint64().Draw(t, "system"), Timeline: rapid.Uint32().Draw(t, "timeline"), Database: rapid.String().Draw(t, "db"),
				Slot: rapid.String().Draw(t, "slot"), CreatedLSN: wal.LSN(rapid.Uint64().Draw(t, "created")),
			},
			ServerVersion: int(rapid.Uint32().Draw(t, "version")), Encoding: rapid.String().Draw(t, "encoding"),
			From: wal.LSN(rapid.Uint64().Draw(t, "from")), Previous: wal.LSN(rapid.Uint64().Draw(t, "previous")),
			Txns: rapid.Uint64().Draw(t, "txns"), Bytes: rapid.Uint64().Draw(t, "bytes"),
			MaxVersionTime: wal.Time(rapid.Int64().Draw(t, "max")), Seen: genSeen(t),
		}
		if m := rapid.MapOf(rapid.String(), rapid.String()).Draw(t, "settings"); len(m) > 0 {
			h.Settings = m
		}
		for range rapid.IntRange(0, 3).Draw(t, "turns") {
			h.Turns = append(h.Turns, Turn{
				Incarnation: Incarnation{SystemID: rapid.Uint64().Draw(t, "s"), Timeline: rapid.Uint32().Draw(t, "t"), Database: rapid.String().Draw(t, "d"), Slot: rapid.String().Draw(t, "n"), CreatedLSN: wal.LSN(rapid.Uint64().Draw(t, "c"))},
				Back:        wal.LSN(rapid.Uint64().Draw(t, "back")), End: wal.LSN(rapid.Uint64().Draw(t, "end")),
			})
		}
		copy(h.Chain[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "chain"))
		have, err := ParseHeader(h.Marshal())
		must(t, err)
		if d := cmp.Diff(h, have); d != "" {
			t.Fatal(d)
		}
	})
}

func TestHeaderThatIsNotOneIsRefused(t *testing.T) {
	good := testHeader().Marshal()
	for name, b := range map[string][]byte{
		"empty": {}, "cut off": good[:len(good)-1], "more behind": append(append([]byte(nil), good...), 0),
		"other record": appendPosition(nil, Position{From: 1, To: 2}),
		"no version":   appendFrame(nil, TypeHeader, flagCritical, appendUint(nil, 3, critical, 1)),
	} {
		var f *FormatError
		if _, err := ParseHeader(b); !errors.As(err, &f) {
			t.Errorf("%s: %v", name, err)
		}
	}
	var up *UpgradeError
	if _, err := ParseHeader(appendFrame(nil, TypeHeader, flagCritical, appendUint(nil, 1, critical, FormatVersion+1))); !errors.As(err, &up) {
		t.Errorf("next version: %v", err)
	}
	one, same := Incarnation{1, 2, "db", "slot", 3}, Incarnation{1, 2, "db", "slot", 3}
	if one != same || (Incarnation{Timeline: 1}) == (Incarnation{Timeline: 2}) {
		t.Error("incarnations do not compare")
	}
}

// extended inserts a field in front of nothing: it appends a field with an unused tag to the body of a frame.
func extended(t *testing.T, raw []byte, crit uint64) []byte {
	t.Helper()
	f, rest, err := parseFrame(raw)
	must(t, err)
	body := appendBytes(append([]byte(nil), f.body...), 60, crit, []byte("new"))
	return append(appendFrame(nil, f.typ, f.flags, body), rest...)
}

// frameFor gives one frame of every kind, with those it needs before it, and what End is afterwards.
func frameFor(t *testing.T) map[string][2][]byte {
	t.Helper()
	j := create(t, newMemFS(), Options{})
	defer j.Close()
	appendAll(t, j, simpleTxn(0))
	all := j.buf
	var frames [][]byte
	for b := all; len(b) > 0; {
		f, rest, err := parseFrame(b)
		must(t, err)
		frames, b = append(frames, f.raw), rest
	}
	// schema, schema, changes, txn
	join := func(fs ...[]byte) (out []byte) {
		for _, f := range fs {
			out = append(out, f...)
		}
		return out
	}
	seal := appendSeal(nil, &tally{to: 0x100}, 7)
	return map[string][2][]byte{
		"schema":   {nil, join(frames[0], frames[1], frames[2], frames[3])},
		"changes":  {join(frames[0], frames[1]), join(frames[2], frames[3])},
		"txn":      {join(frames[:3]...), frames[3]},
		"position": {nil, appendPosition(nil, Position{From: 0x100, To: 0x200})},
		"seal":     {nil, seal},
	}
}

func TestUnknownFieldsAreSkippedUnlessCritical(t *testing.T) {
	for name, f := range frameFor(t) {
		plain := receiveInto(t, f[0], f[1])
		if plain != nil {
			t.Errorf("%s: plain: %v", name, plain)
		}
		if err := receiveInto(t, f[0], extended(t, f[1], 0)); err != nil {
			t.Errorf("%s: non-critical field: %v", name, err)
		}
		var up *UpgradeError
		if err := receiveInto(t, f[0], extended(t, f[1], critical)); !errors.As(err, &up) || !strings.Contains(err.Error(), "upgrade") {
			t.Errorf("%s: critical field: %v", name, err)
		}
	}
}

// receiveInto appends frames to a fresh journal and reads them all back.
func receiveInto(t *testing.T, parts ...[]byte) error {
	t.Helper()
	j := create(t, newMemFS(), Options{})
	defer j.Close()
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	if err := j.AppendFrames(b); err != nil {
		return err
	}
	must(t, j.Flush())
	_, err := readAll(j, 0x100)
	return err
}

func TestUnknownRecordsTravelUnlessCritical(t *testing.T) {
	position := appendPosition(nil, Position{From: 0x100, To: 0x200})
	unknown := appendFrame(nil, 99, 0, []byte("future"))
	fsys := newMemFS()
	j := create(t, fsys, Options{})
	must(t, j.AppendFrames(append(append([]byte(nil), unknown...), position...)))
	must(t, j.Close())
	j = open(t, fsys, Options{})
	defer j.Close()
	to := create(t, newMemFS(), Options{})
	defer to.Close()
	copyFrames(t, j, to, 1000)
	if to.State().Chain != j.State().Chain || to.pos() != j.pos() {
		t.Fatal("the unknown record did not travel")
	}
	must(t, to.AppendFrames(append(append([]byte(nil), unknown...), position...)))
	if to.pos() != j.pos() {
		t.Fatal("a repeated unknown record was appended again")
	}
	var up *UpgradeError
	for name, raw := range map[string][]byte{
		"critical type": appendFrame(nil, 99, flagCritical, []byte("future")),
		"unknown flag":  appendFrame(nil, TypePosition, 2, position[frameHead:]),
		"interleaved":   appendFrame(nil, TypeChanges, flagCritical, appendUint(nil, 1, critical, 7)),
	} {
		if err := to.AppendFrames(raw); !errors.As(err, &up) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The same in a file: neither torn nor corrupt, but not readable here.
	fsys.damage("dir/"+segmentName(0x100), func(b []byte) []byte { return append(b[:j.pos()], appendFrame(nil, 99, flagCritical, nil)...) })
	if _, err := Open("dir", small(Options{}, fsys.clone())); !errors.As(err, &up) || up.File == "" || up.Offset != j.pos() {
		t.Fatalf("critical type in a file: %v", err)
	}
}

func TestReservedChangesAskForAnUpgrade(t *testing.T) {
	rel := testRelations()[1]
	schema := appendSchema(nil, rel)
	changes := func(op, form byte, fields []byte) []byte {
		entry := append([]byte{op, form}, rel.ID[:]...)
		entry = append(entry, fields...)
		run := append([]byte{byte(len(entry))}, entry...)
		return appendFrame(nil, TypeChanges, flagCritical, appendBytes(nil, 2, critical, run))
	}
	core := appendUint(appendUint(appendUint(nil, 1, critical, 1), 4, critical, 0x200), 7, critical, 1)
	txn := appendFrame(nil, TypeTxn, flagCritical, appendUint(appendBytes(nil, 1, critical, core), 2, critical, 0x100))
	tuple := func(b ...byte) []byte { return appendBytes(nil, 1, critical, b) }
	cases := map[string]struct {
		frames  []byte
		upgrade bool
	}{
		"binary value":         {changes('I', 0, tuple(1, 'b', 1, 0)), true},
		"sealed value":         {changes('I', 0, tuple(1, 's', 1, 0)), true},
		"unknown op":           {changes('X', 0, nil), true},
		"unknown form":         {changes('D', 0x10, nil), true},
		"unknown old kind":     {changes('D', 3, nil), true},
		"critical field":       {changes('I', 0, appendUint(tuple(1, 'n'), 9, critical, 1)), true},
		"unknown value":        {changes('I', 0, tuple(1, 'x')), false},
		"no new tuple":         {changes('I', 0, nil), false},
		"too many columns":     {changes('I', 0, tuple(2, 'n', 'n')), false},
		"cut tuple":            {changes('I', 0, tuple(1)), false},
		"value past the tuple": {changes('I', 0, tuple(1, 't', 9)), false},
		"bytes after tuple":    {changes('I', 0, tuple(1, 'n', 'n')), false},
		"insert with options":  {changes('I', 4, tuple(1, 'n')), false},
		"truncate with old":    {changes('T', 1, nil), false},
		"delete with options":  {changes('D', 4, nil), false},
		"old kind, no tuple":   {changes('D', 1, nil), false},
		"count too low":        {append(changes('T', 0, nil), changes('T', 0, nil)...), false},
		"no change":            {nil, false},
	}
	for name, c := range cases {
		err := receiveInto(t, schema, c.frames, txn)
		var up *UpgradeError
		var form *FormatError
		if c.upgrade && !errors.As(err, &up) || !c.upgrade && !errors.As(err, &form) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := receiveInto(t, schema, changes('I', 0, appendUint(tuple(1, 'n'), 9, 0, 1)), txn); err != nil {
		t.Errorf("non-critical field of a change: %v", err)
	}
	var form *FormatError
	if err := receiveInto(t, changes('T', 0, nil), txn); !errors.As(err, &form) || !strings.Contains(err.Error(), "schema") {
		t.Errorf("change without its schema: %v", err)
	}
}

func TestFieldsHaveOneSpelling(t *testing.T) {
	for name, body := range map[string][]byte{
		"falling tags":  appendUint(appendUint(nil, 2, critical, 0x200), 1, critical, 0x100),
		"repeated tag":  appendUint(appendUint(appendUint(nil, 1, critical, 0x100), 2, critical, 0x200), 2, critical, 0x300),
		"tag zero":      appendUint(nil, 0, critical, 1),
		"bytes for int": appendBytes(appendUint(nil, 1, critical, 0x100), 2, critical, []byte{1}),
		"int for bytes": appendUint(appendUint(appendUint(nil, 1, critical, 0x100), 2, critical, 0x200), 4, 0, 1),
		"cut value":     append(appendUint(nil, 1, critical, 0x100), 2<<2|1, 200),
		"backwards":     appendUint(appendUint(nil, 1, critical, 0x300), 2, critical, 0x200),
	} {
		var form *FormatError
		if err := receiveInto(t, appendFrame(nil, TypePosition, flagCritical, body)); !errors.As(err, &form) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// seedFrames is a run of sound frames of every kind, for the fuzzers.
func seedFrames(t failer) []byte {
	b := testHeader().Marshal()
	j := create(t, newMemFS(), Options{})
	defer j.Close()
	appendAll(t, j, simpleTxn(0))
	j.appendSeal()
	b = append(b, j.buf...)
	b = appendPosition(b, Position{From: 0x164, To: 0x200, Time: 3, Seen: []wal.Seen{{Site: 2, LSN: 9}}})
	return appendFrame(b, 99, 0, []byte("future"))
}

// resum gives the frames in b right checksums and lengths as far as possible, so that a fuzzer reaches what lies behind.
func resum(b []byte) []byte {
	out := append([]byte(nil), b...)
	for rest := out; len(rest) >= frameHead; {
		n, err := frameLength(rest)
		if err != nil || n > len(rest) {
			n = len(rest)
			copy(rest, openFrame(nil, RecordType(rest[4]), rest[5]&flagCritical, n-frameHead))
		}
		closeFrame(rest[:n], 0)
		rest = rest[n:]
	}
	return out
}

// FuzzFrames feeds frames to the intake: whatever comes, it must not panic, and a transaction that passes the check
// must decode.
func FuzzFrames(f *testing.F) {
	f.Add(seedFrames(f))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, data := range [][]byte{b, resum(b)} {
			in := newIntake(testHeader())
			in.check = true
			for len(data) > 0 {
				fr, rest, err := parseFrame(data)
				if err != nil {
					break
				}
				data = rest
				if fr.typ == TypeHeader {
					if h, err := parseHeader(fr); err == nil {
						if again, err := ParseHeader(h.Marshal()); err != nil || cmp.Diff(h, again) != "" {
							t.Fatalf("header does not survive: %v", err)
						}
					}
					continue
				}
				if done, err := in.add(fr); err != nil || !done || in.kind != TypeTxn || !in.fresh {
					continue
				}
				if _, err := in.decode(); err != nil {
					t.Fatalf("checked transaction does not decode: %v", err)
				}
			}
		}
	})
}

// FuzzRelation: a relation that ParseRelation accepts has one canonical form, which gives its ID.
func FuzzRelation(f *testing.F) {
	for _, r := range testRelations() {
		f.Add(r.AppendCanonical(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		rel, err := wal.ParseRelation(b)
		if err != nil {
			return
		}
		again, err := wal.ParseRelation(rel.AppendCanonical(nil))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(rel, again); d != "" {
			t.Fatal(d)
		}
	})
}
