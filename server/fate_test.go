package server

import (
	"testing"
	"time"

	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/link"
)

// TestVerdict: whose word counts, and when.
func TestVerdict(t *testing.T) {
	doubt := gateway.Doubt{Target: gateway.Target{Site: "a", Epoch: 5, History: "1/1"}, XID: 7, LTXID: []byte("x")}
	unsure := doubt
	unsure.History = ""
	const none, yes, no = link.OutcomeUnknown, link.OutcomeCommitted, link.OutcomeAborted
	for _, c := range []struct {
		name string
		d    gateway.Doubt
		a    link.FateAnswer
		want gateway.Fate
	}{
		{"its site does not know", doubt, link.FateAnswer{Site: "a", Server: "1/1"}, gateway.Unknown},
		{"committed, nobody waits, no register", doubt, link.FateAnswer{Site: "a", Server: "1/1", Outcome: yes}, gateway.Committed},
		{"committed by another server", doubt, link.FateAnswer{Site: "a", Server: "1/2", Outcome: yes}, gateway.Unknown},
		{"aborted by another server", doubt, link.FateAnswer{Site: "a", Server: "2/1", Outcome: no}, gateway.Unknown},
		{"which server it was is not known", unsure, link.FateAnswer{Site: "a", Server: "1/1", Outcome: yes}, gateway.Unknown},
		{"and none is named", unsure, link.FateAnswer{Site: "a", Outcome: no}, gateway.Unknown},
		{"aborted", doubt, link.FateAnswer{Site: "a", Server: "1/1", Outcome: no}, gateway.Aborted},
		{"aborted at a site that is left out", doubt, link.FateAnswer{Site: "a", Server: "1/1", Outcome: no, HasRegister: true}, gateway.Aborted},
		{"committed at a member", doubt, link.FateAnswer{Site: "a", Server: "1/1", Outcome: yes, HasRegister: true, Member: true, MemberSince: 5}, gateway.Committed},
		{"committed at a site that is left out", doubt, link.FateAnswer{Site: "a", Server: "1/1", Outcome: yes, HasRegister: true, MemberSince: 3}, gateway.Unknown},
		{"committed, left out, and taken back since", doubt, link.FateAnswer{Site: "a", Server: "1/1", Outcome: yes, HasRegister: true, Member: true, MemberSince: 6}, gateway.Unknown},
		{"committed, and not known to be elsewhere", doubt, link.FateAnswer{Site: "a", Server: "1/1", Outcome: yes, HasRegister: true, Member: true, MemberSince: 2, Waits: true}, gateway.Unknown},
		{"committed, and elsewhere", doubt, link.FateAnswer{Site: "a", Server: "1/1", Outcome: yes, HasRegister: true, Member: true, MemberSince: 2, Waits: true, Proven: true}, gateway.Committed},
		{"elsewhere and left out", doubt, link.FateAnswer{Site: "a", Server: "1/1", Outcome: yes, HasRegister: true, Waits: true, Proven: true}, gateway.Unknown},
		{"on record at another site", doubt, link.FateAnswer{Site: "b", Outcome: yes}, gateway.Committed},
		{"on record against it", doubt, link.FateAnswer{Site: "b", Outcome: no}, gateway.Aborted},
		{"not on record", doubt, link.FateAnswer{Site: "b", Outcome: none, Why: "ask there"}, gateway.Unknown},
		{"handed on to its own site, where it waits", doubt, link.FateAnswer{Site: "a", Server: "1/1", Outcome: yes, Waits: true}, gateway.Unknown},
	} {
		if got := verdict(c.d, c.a); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

// TestMarksAreKeptForLongEnough: a mark is known for marksKeep at least, and what is not known is told of no earlier time than it
// would be known from.
func TestMarksAreKeptForLongEnough(t *testing.T) {
	var m marks
	begun := time.Now()
	if found, since := m.has("x"); found || since.Before(begun) {
		t.Errorf("before anything is noted: %t, since %v", found, since)
	}
	m.note("", begun)
	for i := range 200 {
		now := begun.Add(time.Duration(i) * time.Second)
		m.note(string(rune('A'+i)), now)
		for j := range i + 1 {
			found, since := m.has(string(rune('A' + j)))
			at := begun.Add(time.Duration(j) * time.Second)
			if !found && !at.Before(since) {
				t.Fatalf("after %d s: the mark of second %d is forgotten, and was noted after %v", i, j, since.Sub(begun))
			}
			if !found && i-j <= int(marksKeep.Seconds()) {
				t.Fatalf("after %d s the mark of second %d is forgotten", i, j)
			}
		}
	}
	if len(m.now)+len(m.before) > 2*(int(marksKeep.Seconds())+1)+1 {
		t.Errorf("%d marks are kept", len(m.now)+len(m.before))
	}
}
