package gateway

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// message is one that a server gets, for the model below. Kinds are those of expected; Sync inside a COPY and the like
// are what a client may do.
type message struct {
	expected
	fails bool // the server raises an error at it
	copy  bool // an Execute that reads CopyData
}

// simulate is a PostgreSQL backend's main loop (src/backend/tcop/postgres.c): it gives the types of its answers, each with
// how many messages it has read by then and with whether the client is to see it and as what, and the messages that were not
// carried out.
func simulate(sent []message) (answers []byte, read []int, toClient []byte, undone []string) {
	skip := false // until Sync, after an error
	for i := 0; i < len(sent); i++ {
		m := sent[i]
		say := func(typ, client byte) {
			answers = append(answers, typ)
			read = append(read, min(i+1, len(sent)))
			toClient = append(toClient, client)
		}
		if m.kind == 'S' {
			skip = false
			say('Z', 'Z')
			continue
		}
		if m.kind == 'd' || m.kind == 'x' {
			continue // not in a COPY: ignored
		}
		if skip {
			undone = append(undone, m.name)
			continue
		}
		if m.copy && !m.fails {
			say('G', 'G')
			failed := false
			for i++; i < len(sent) && sent[i].kind != 'x'; i++ {
				if sent[i].kind == 'd' && sent[i].fails {
					failed = true
					break
				}
			}
			if i < len(sent) && sent[i].kind == 'x' && sent[i].fails {
				failed = true // CopyFail
			}
			switch {
			case failed:
				say('E', 'E')
				if m.kind == 'E' {
					skip = true
					undone = append(undone, m.name)
				} else {
					say('Z', 'Z')
				}
			case m.kind == 'E':
				say('C', 'C')
			default:
				say('C', 'C')
				say('Z', 'Z')
			}
			continue
		}
		if m.fails {
			say('E', 'E')
			switch m.kind {
			case 'Q', 'F', 'z':
				say('Z', 'Z')
			case 'q', 'w':
				say('Z', 0)
			default:
				skip = true
				undone = append(undone, m.name)
			}
			continue
		}
		switch m.kind {
		case 'Q':
			say('T', 'T')
			say('C', 'C')
			say('Z', 'Z')
		case 'F':
			say('V', 'V')
			say('Z', 'Z')
		case 'P':
			say('1', '1')
		case 'p':
			say('1', 0)
		case 'C':
			say('3', '3')
		case 'c':
			say('3', 0)
		case 'B':
			say('2', '2')
		case 'T':
			say('t', 't')
			say('T', 'T')
		case 'D':
			say('t', 0)
			say('n', 0)
		case 'O':
			say('n', 'n')
		case 'E':
			say('C', 'C')
		case 'b':
			say('2', 0)
		case 'm':
			say('C', 0)
		case 'u':
			say('n', 0)
		case 'q':
			say('C', 0)
			say('Z', 0)
		case 'w':
			say('C', 'C')
			say('T', 'T')
			say('C', 'C')
			say('Z', 0)
		case 'z':
			say('C', 0)
			say('Z', 'Z')
		}
	}
	return answers, read, toClient, undone
}

// TestLineFollowsTheServer: whatever a client pipelines, whatever fails, and whatever the gateway sends in between, each
// answer finds its message, and nothing is left over.
func TestLineFollowsTheServer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var sent []message
		add := func(kind byte, fails, copy bool) {
			sent = append(sent, message{expected{kind: kind, name: string(rune(len(sent)))}, fails, copy})
		}
		fails := func() bool { return rapid.IntRange(0, 9).Draw(t, "fails") == 0 }
		data := func(syncFirst bool) {
			if syncFirst { // libpq sends it with the Execute, and the server ignores it.
				add('S', false, false)
			}
			for range rapid.IntRange(1, 3).Draw(t, "rows") {
				add('d', fails(), false)
			}
			add('x', fails(), false)
		}
		for range rapid.IntRange(1, 12).Draw(t, "segments") {
			switch rapid.IntRange(0, 6).Draw(t, "segment") {
			case 6:
				add('q', false, false)
				add('w', fails(), false)
				add('z', fails(), false)
			case 0:
				add('Q', fails(), false)
			case 1:
				add('F', fails(), false)
			case 2:
				failed := fails()
				add('Q', failed, true)
				data(!failed && rapid.Bool().Draw(t, "sync first"))
			case 3:
				failed := fails()
				add('B', false, false)
				add('E', failed, true)
				data(!failed && rapid.Bool().Draw(t, "sync first"))
				add('S', false, false)
			default:
				for range rapid.IntRange(0, 8).Draw(t, "messages") {
					add(rapid.SampledFrom([]byte("PpBTODECcbmu")).Draw(t, "kind"), fails(), false)
				}
				add('S', false, false)
			}
		}
		answers, read, want, undone := simulate(sent)
		var l line
		var got []byte
		var gotUndone []string
		answer := func() {
			a := answers[0]
			answers, read = answers[1:], read[1:]
			from := len(gotUndone)
			v := l.answer(a, func(e expected) {
				if e.kind != 'd' && e.kind != 'x' && e.kind != 'S' {
					gotUndone = append(gotUndone, e.name)
				}
			})
			slices.Reverse(gotUndone[from:]) // what was sent last is undone first
			switch v {
			case forward:
				got = append(got, a)
			case swallow:
				got = append(got, 0)
			case unexplained:
				t.Fatalf("answer %q is not explained; sent %+v, in the line %+v", a, sent, l.sent[l.first:])
			}
		}
		for i, m := range sent {
			l.push(m.expected)
			// The server may be behind with its answers, or not.
			for len(answers) > 0 && read[0] <= i+1 && rapid.Bool().Draw(t, "now") {
				answer()
			}
		}
		for len(answers) > 0 {
			answer()
		}
		if string(got) != string(want) || !slices.Equal(gotUndone, undone) || !l.empty() {
			t.Fatalf("got %q, want %q; undone %q, want %q; left %+v", got, want, gotUndone, undone, l.sent[l.first:])
		}
	})
}

func TestLineRefusesWhatNobodyAskedFor(t *testing.T) {
	for _, typ := range []byte("123Z") {
		var l line
		if l.answer(typ, nil) != unexplained {
			t.Errorf("%q was explained by nothing", typ)
		}
		l.push(expected{kind: 'E'})
		if l.answer(typ, nil) != unexplained {
			t.Errorf("%q was explained by an Execute", typ)
		}
	}
}

func TestLineDoesNotGrow(t *testing.T) {
	var l line
	l.push(expected{kind: 'S'})
	for range 10_000 {
		l.push(expected{kind: 'S'})
		l.answer('Z', nil)
	}
	if cap(l.sent) > 64 {
		t.Errorf("room for %d", cap(l.sent))
	}
}
