package cut

import (
	"fmt"
	"slices"
	"strings"

	"github.com/duri-io/duri/pgwire"
)

// Outcomes: what a client may see of a loss. The codes are the contract of docs/reference/gateway.md.
const (
	uncut    = "as uncut"
	failed   = "40001" // the transaction has certainly not been committed; the session lives
	unknown  = "08007" // what became of the transaction is not known; the session ends
	pinned   = "08006" // the session needed the server that is lost
	inFailed = "25P02" // a statement in a transaction that has failed
	shutdown = "57P01" // the transaction was committed, but what it has done to the session is not known
	gone     = "gone"  // the client itself lost its connection
	other    = "other"
)

// outcomes in the order of the table.
var outcomes = []string{uncut, failed, unknown, pinned, shutdown, noSite, gone, other}

// contract is what is right for a client when a connection is cut.
type contract struct {
	// sites: the gateway may ask the sites. Then sessions outlive their servers: a segment outside a transaction goes as if
	// nothing had happened, one inside may fail by 40001, and what the script itself allows may happen. Without, each loss may
	// end the session by 08006.
	sites bool
}

// allows reports whether a segment may end in an outcome.
func (c contract) allows(s *script, base *expectation, segment int, outcome string) bool {
	if !c.sites {
		return outcome == pinned
	}
	if outcome == failed && base.before(segment) == pgwire.InBlock {
		return true
	}
	return slices.Contains(s.may, outcome)
}

// seen is what is known of a case when it is over.
type seen struct {
	*transcript
	deeds  []deed // of an app, in the place of a transcript
	ledger []int
}

// failures are the segments that failed by 40001 where they do not by themselves.
func (o seen) failures(base *expectation) (f []failure) {
	for i, a := range o.answers[:o.complete()] {
		switch {
		case i >= len(base.answers):
		case slices.Contains(a.codes, failed) && !slices.Contains(base.answers[i].codes, failed), base.stays(i, a) && (len(f) > 0 || !base.chains(i)):
			f = append(f, failure{i, a.status})
		}
	}
	return f
}

// stays reports that a says 25P02, and the transaction stays a failed one, where it would end and the next one begin with it (AND
// CHAIN), or go back to a savepoint from an error of its own: the gateway does not have what was lost with the server.
func (e *expectation) stays(i int, a answer) bool {
	return slices.Equal(a.codes, []string{inFailed}) && a.status == pgwire.InFailed && len(e.answers[i].codes) == 0 &&
		(e.chains(i) || e.before(i) == pgwire.InFailed)
}

// chains reports whether a segment ends a transaction and begins the next one.
func (e *expectation) chains(i int) bool {
	return e.before(i) == pgwire.InBlock && e.answers[i].status == pgwire.InBlock && slices.ContainsFunc(e.answers[i].says, func(m string) bool {
		return m == `C "COMMIT\x00"` || m == `C "ROLLBACK\x00"`
	})
}

// verdict is a case's outcome, and what is wrong with it.
type verdict struct {
	outcome string
	wrong   []string
}

func (v *verdict) violate(format string, args ...any) {
	v.wrong = append(v.wrong, fmt.Sprintf(format, args...))
}

// judge compares what was seen with what PostgreSQL does by itself: base when nothing fails, and exp when just those segments fail
// that did. It is pure.
func judge(c contract, s *script, base, exp *expectation, o seen) verdict {
	v := verdict{outcome: uncut}
	fails := o.failures(base)
	if len(fails) > 0 {
		v.outcome = failed
	}
	for i, a := range o.answers {
		for _, code := range a.codes {
			if code == "08P01" {
				v.violate("segment %d: 08P01, which is for clients that break the protocol", i)
			}
		}
		at := slices.IndexFunc(fails, func(f failure) bool { return f.segment == i })
		switch {
		case i >= len(exp.answers):
			v.violate("answers to nothing: %q", a.says)
		case at >= 0:
			v.failedSegment(c, s, base, exp, i, a)
		case a.status != 0:
			if !a.equal(exp.answers[i], !o.alive()) && (len(fails) == 0 || !a.lost(exp.answers[i])) {
				v.violate("segment %d: want %s\n        got  %s", i, exp.answers[i], a)
			}
		default:
			says := a.says
			if o.fatal != nil {
				says = says[:len(says)-1]
			}
			if !isPrefix(says, exp.answers[i].says) {
				v.violate("segment %d: want a beginning of %s\n        got  %s", i, exp.answers[i], a)
			}
		}
	}
	if o.spoke {
		v.violate("the server went on after FATAL %s", o.fatal.Code)
	}
	if o.alive() {
		v.survivor(exp, o)
	} else {
		v.dead(c, s, base, exp, o)
	}
	if len(v.wrong) > 0 {
		v.outcome = other
	}
	return v
}

// failedSegment looks at a segment that failed by 40001.
func (v *verdict) failedSegment(c contract, s *script, base, exp *expectation, i int, a answer) {
	if base.stays(i, a) {
		return
	}
	if !c.allows(s, base, i, failed) {
		v.violate("segment %d fails by 40001, which it may not: %s", i, a)
	}
	last := a.says[len(a.says)-1]
	if !strings.HasPrefix(last, "E ERROR "+failed) {
		v.violate("segment %d: 40001 is not an ERROR, or not the last word: %s", i, a)
	}
	if !isPrefix(a.says[:len(a.says)-1], base.answers[i].says) {
		v.violate("segment %d: before its 40001 came what does not belong there: %s; uncut: %s", i, a, base.answers[i])
	}
	before, after := exp.before(i), base.answers[i].status
	want := "E"
	switch {
	case after == pgwire.Idle:
		want = "I" // the transaction would have ended by then
	case before == pgwire.Idle, base.chains(i):
		want = "EI"
	}
	if !strings.ContainsRune(want, rune(a.status)) {
		v.violate("segment %d: status %c after 40001, want %s (%c before, %c uncut)", i, a.status, want, before, after)
	}
}

// survivor looks at a session that lived to its end.
func (v *verdict) survivor(exp *expectation, o seen) {
	if o.complete() != len(exp.answers) {
		v.violate("%d segments were answered of %d", o.complete(), len(exp.answers))
	}
	if want := exp.ledger[len(exp.ledger)-1]; !slices.Equal(o.ledger, want) {
		v.violate("the ledger has %v, want %v", o.ledger, want)
	}
	for name, want := range exp.params {
		if got := o.params[name]; got != want {
			v.violate("the client believes that %s is %q, want %q", name, got, want)
		}
	}
}

// dead looks at a session that has ended.
func (v *verdict) dead(c contract, s *script, base, exp *expectation, o seen) {
	first := o.complete() // the first segment without a whole answer
	code, says := pinned, o.broken
	switch {
	case o.fatal != nil:
		code, says = o.fatal.Code, o.fatal.Message+": "+o.fatal.Detail
	case !o.inside:
		v.violate("segment %d: %s", first, o.broken)
		return
	}
	v.outcome = code
	segment := min(first, len(base.answers)-1)
	unread := o.fatal != nil && (code == pinned && strings.Contains(o.fatal.Detail, "was not read yet") || code == shutdown && strings.Contains(o.fatal.Message, "was committed"))
	if !unread && !c.allows(s, base, segment, code) {
		v.violate("segment %d: the session ends by %s, which may not be: %s", first, code, says)
	}
	if low := exp.committed(min(first, len(exp.answers))); c.sites && code != unknown && code != shutdown && !s.parts && !slices.Equal(o.ledger, low) {
		v.violate("the ledger has %v after %s, want %v: only 08007 says that something may have been committed", o.ledger, code, low)
		return
	}
	v.between(s, exp, o, first)
}

// between compares the ledger with all that may be committed when answers are known up to a segment.
func (v *verdict) between(s *script, exp *expectation, o seen, first int) {
	first = min(first, len(exp.answers)) // all was answered, and then the session ended
	last := min(o.sent, len(exp.answers))
	if s.parts {
		if !contains(o.ledger, exp.committed(first)) || !contains(exp.committed(last), o.ledger) {
			v.violate("the ledger has %v, which is not between %v and %v", o.ledger, exp.committed(first), exp.committed(last))
		}
		return
	}
	var may [][]int
	for i := first; i <= last; i++ {
		may = append(may, exp.committed(i))
	}
	if !slices.ContainsFunc(may, func(l []int) bool { return slices.Equal(l, o.ledger) }) {
		v.violate("the ledger has %v, want one of %v", o.ledger, may)
	}
}

// judgeGone looks at a client whose own connection was cut: what it was told has happened, and of the rest nothing twice. It is
// pure.
func judgeGone(s *script, base *expectation, o seen) verdict {
	v := verdict{outcome: gone}
	if o.alive() {
		v.outcome = uncut
		v.survivor(base, o)
	}
	for i, a := range o.answers {
		switch {
		case i >= len(base.answers):
			v.violate("answers to nothing: %s", a)
		case a.status != 0 && !a.equal(base.answers[i], true), !isPrefix(a.says, base.answers[i].says):
			v.violate("segment %d: want %s\n        got  %s", i, base.answers[i], a)
		}
	}
	v.between(s, base, o, o.complete())
	if len(v.wrong) > 0 {
		v.outcome = other
	}
	return v
}

// judgeGoneApp is judgeGone for an app.
func judgeGoneApp(s *script, o seen) verdict {
	v := judgeApp(contract{}, s, o.deeds, o.ledger)
	if n := len(o.deeds); n > 0 && o.deeds[n-1].err != nil {
		v.outcome = gone
	}
	return v
}

// equal compares without notices that come twice: they are told at once, and again when a statement runs again. A session that
// ends may miss notifications.
func (a answer) equal(b answer, ends bool) bool {
	heard, want := slices.CompactFunc(slices.Clone(a.says), sameNotice), slices.Clone(b.says)
	if ends {
		notified := func(m string) bool { return strings.HasPrefix(m, "A ") }
		heard, want = slices.DeleteFunc(heard, notified), slices.DeleteFunc(want, notified)
	}
	return a.status == b.status && slices.Equal(heard, want)
}

func sameNotice(a, b string) bool { return a == b && strings.HasPrefix(a, "N ") }

// lost reports that a says 25P02 where PostgreSQL, in a failed transaction that never had the savepoint or portal, says that it
// does not exist: the gateway cannot know better.
func (a answer) lost(b answer) bool {
	return a.status == b.status && slices.Equal(a.codes, []string{inFailed}) && (slices.Equal(b.codes, []string{"3B001"}) || slices.Equal(b.codes, []string{"34000"}))
}

func (a answer) String() string {
	status := "-"
	if a.status != 0 {
		status = string(a.status)
	}
	text := fmt.Sprintf("%s [%s]", strings.Join(a.says, " | "), status)
	if len(text) > 600 {
		text = text[:600] + "..."
	}
	return text
}

func isPrefix(a, of []string) bool { return len(a) <= len(of) && slices.Equal(a, of[:len(a)]) }

// contains reports whether all of small, with repetitions, is in big. Both are sorted.
func contains(big, small []int) bool {
	for _, n := range small {
		i := slices.Index(big, n)
		if i < 0 {
			return false
		}
		big = big[i+1:]
	}
	return true
}
