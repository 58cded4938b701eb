package gateway

import (
	"bytes"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/pgwire"
	"github.com/duri-io/duri/pgwire/scram"
)

var passedOptions = cmp.AllowUnexported(passed{}, statement{}, shape{}, text{})

// drawPassed makes any session.
func drawPassed(t *rapid.T) *passed {
	str := rapid.String()
	some := func(name string) []byte {
		return append([]byte{}, rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, name)...)
	}
	params := func(name string) []pgwire.Param {
		return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) pgwire.Param {
			return pgwire.Param{Name: str.Draw(t, "name"), Value: str.Draw(t, "value")}
		}), 0, 5).Draw(t, name)
	}
	words := func(name string) []string { return rapid.SliceOfN(str, 0, 4).Draw(t, name) }
	flag := rapid.Bool()
	p := &passed{
		id: rapid.Uint64().Draw(t, "id"), database: "d" + str.Draw(t, "database"), user: "u" + str.Draw(t, "user"), params: params("params"),
		keys: scram.Keys{Salt: append(some("salt"), 1), Iterations: rapid.IntRange(1, 1<<31-1).Draw(t, "iterations")},
		pid:  uint32(rapid.IntRange(1, 1<<31-1).Draw(t, "pid")), told: params("told"), settings: params("settings"), customs: words("customs"),
		statements: map[string]*statement{}, home: str.Draw(t, "home"), last: str.Draw(t, "last"), seen: str.Draw(t, "seen"), site: str.Draw(t, "site"),
		types: rapid.SliceOfN(rapid.Uint32(), 0, 10).Draw(t, "types"), since: time.UnixMicro(rapid.Int64Range(0, 1<<60).Draw(t, "since")),
	}
	for _, to := range [][]byte{p.keys.ClientKey[:], p.keys.ServerKey[:], p.secret[:]} {
		copy(to, rapid.SliceOfN(rapid.Byte(), len(to), len(to)).Draw(t, "key"))
	}
	for range rapid.IntRange(0, 4).Draw(t, "statements") {
		p.statements[str.Draw(t, "called")] = &statement{
			name: str.Draw(t, "name"), key: str.Draw(t, "key"), sql: some("sql"), oids: some("oids"),
			shape: shape{rapid.Uint64().Draw(t, "parameters"), rapid.Uint64().Draw(t, "columns")},
			effects: text{
				probe: flag.Draw(t, "probe"), dirty: flag.Draw(t, "dirty"), unpin: flag.Draw(t, "unpin"), seq: flag.Draw(t, "seq"), local: flag.Draw(t, "local"),
				pin: str.Draw(t, "pin"), unprepared: flag.Draw(t, "unprepared"), customs: words("customs"), deallocate: str.Draw(t, "deallocate"),
				does: deed(rapid.IntRange(0, int(tangled)).Draw(t, "does")), wrote: flag.Draw(t, "wrote"), seems: flag.Draw(t, "seems"), escapes: flag.Draw(t, "escapes"), statements: rapid.IntRange(0, textMax).Draw(t, "statements"),
			},
		}
	}
	return p
}

func TestAPassedSessionIsWhatItWas(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawPassed(t)
		b := p.encode()
		got, err := decodePassed(b)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(p, got, passedOptions, cmp.Comparer(func(a, b []pgwire.Param) bool { return fmt.Sprint(a) == fmt.Sprint(b) }),
			cmp.Comparer(func(a, b []string) bool { return fmt.Sprintf("%q", a) == fmt.Sprintf("%q", b) }),
			cmp.Comparer(func(a, b []uint32) bool { return fmt.Sprint(a) == fmt.Sprint(b) })); d != "" {
			t.Fatal(d)
		}
		// Of less, or of more, nothing is taken.
		cut := rapid.IntRange(0, len(b)-1).Draw(t, "cut")
		if _, err := decodePassed(b[:cut]); err == nil {
			t.Fatalf("the first %d of %d bytes were taken for a session", cut, len(b))
		}
		if _, err := decodePassed(append(b, 0)); err == nil {
			t.Fatal("a byte too many was taken")
		}
	})
}

// TestNothingOfASessionIsForgotten: who adds a field to what is passed must add it to the encoding, and to the property above.
func TestNothingOfASessionIsForgotten(t *testing.T) {
	for typ, fields := range map[reflect.Type]int{
		reflect.TypeFor[passed](): 17, reflect.TypeFor[statement](): 8, reflect.TypeFor[shape](): 2, reflect.TypeFor[text](): 15,
		// Who has logged in by certificate has TLS, and is not handed over.
		reflect.TypeFor[scram.Keys](): 4, reflect.TypeFor[Login](): 5,
		// born and judged of a statement, and what of its effects follows from the latter, belong to a process: in a new one, nothing is older, and all is judged anew.
		// What of these a session without a backend, outside a transaction, has to lose is looked at in session.passed and adopt.
		reflect.TypeFor[session](): 19, reflect.TypeFor[borrowing](): 18, reflect.TypeFor[recovery](): 19, reflect.TypeFor[tallying](): 9,
		reflect.TypeFor[parting](): 4, reflect.TypeFor[roaming](): 12,
	} {
		if n := typ.NumField(); n != fields {
			t.Errorf("%v has %d fields, not %d: see whether they have to go along when a session is handed to another process, and correct the number", typ, n, fields)
		}
	}
}

// TestWhatWasSeenGoesAlong: a session whose latest transaction was a read elsewhere must not see less in the new process.
func TestWhatWasSeenGoesAlong(t *testing.T) {
	reads := Config{Reads: struct{ Reads }{}}
	for _, c := range []struct {
		old, now Config
		want     string
	}{{reads, reads, "elsewhere"}, {Config{}, reads, "home"}} {
		s := &session{g: &Server{cfg: c.old}, keys: &scram.Keys{}}
		s.last = "home"
		if c.old.Reads != nil {
			s.seen = sighting{"elsewhere", 1}
		}
		g := &Server{cfg: c.now, began: time.Now().Add(-time.Minute)}
		g.limits.Store(&Limits{})
		n := &session{g: g}
		before := g.tick()
		n.adopt(s.passed())
		if n.seen.site != c.want || n.seen.at < before || n.homeAt < before || n.actedAt < before {
			t.Errorf("%+v, %d, %d; want %s, no earlier than %d", n.seen, n.homeAt, n.actedAt, c.want, before)
		}
	}
}

func FuzzDecodePassed(f *testing.F) {
	st := newStatement(pgwire.Statement{Name: []byte("s"), SQL: []byte("SELECT 1"), OIDs: []byte{0, 0}}, "", text{does: reads})
	p := &passed{
		id: 1, database: "shop", user: "app", params: []pgwire.Param{{Name: "user", Value: "app"}}, keys: scram.Keys{Salt: []byte("salt"), Iterations: 4096}, pid: 7,
		statements: map[string]*statement{"s": st}, types: []uint32{20000}, since: time.UnixMicro(1),
	}
	f.Add(p.encode())
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{0xff}, 64))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := decodePassed(b)
		if err != nil {
			return
		}
		again, err := decodePassed(got.encode())
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(got, again, passedOptions); d != "" {
			t.Error(d)
		}
	})
}
