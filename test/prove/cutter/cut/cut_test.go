package cut

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/pgwire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is a cluster as Run wants it.
func server(t *testing.T) *pgcluster.Cluster {
	t.Helper()
	var opts []pgtest.Option
	for _, name := range sorted(settings) {
		opts = append(opts, pgtest.WithSetting(name, settings[name]))
	}
	return pgtest.New(t, opts...)
}

// start runs cases, with everything that goes wrong in the test's log.
func start(t *testing.T, o Options) *Result {
	t.Helper()
	var out bytes.Buffer
	o.Cluster, o.Out = server(t), &out
	if o.Seed == 0 {
		o.Seed = rand.Uint64N(1 << 32)
	}
	res, err := Run(t.Context(), o)
	t.Log("\n" + out.String())
	if err != nil {
		t.Fatalf("seed %d: %v", o.Seed, err)
	}
	t.Log("\n" + res.Report())
	return res
}

// TestClientsOfASessionThatEndsLoseNothing is the short form of `make prove CASE=cutter` for a gateway that may not ask the
// sites: each loss may end the session, but not without a word, and the ledger is right.
func TestClientsOfASessionThatEndsLoseNothing(t *testing.T) {
	sound(t, start(t, Options{Cases: 100}))
}

// TestSessionsOutliveTheirServers is the short form of `make prove CASE=cutter`.
func TestSessionsOutliveTheirServers(t *testing.T) {
	sound(t, start(t, Options{Cases: 200, Sites: true}))
}

// TestLoginsAreCut is the short form of `make prove CASE=cutter ARGS=-logins`.
func TestLoginsAreCut(t *testing.T) {
	sound(t, start(t, Options{Cases: 120, Sites: true, Logins: true}))
}

// TestReadsAwayAreCut: reads at another site are as good as at home when theirs is lost.
func TestReadsAwayAreCut(t *testing.T) {
	res := start(t, Options{Cases: 100, Only: "read-extended", Sites: true, Reads: true})
	sound(t, &Result{Seed: res.Seed, Findings: res.Findings}) // How many messages there are depends on which reads go away.
	if res.Away < uint64(res.Cases)/4 {
		t.Errorf("%d reads went away in %d cases", res.Away, res.Cases)
	}
}

// TestErrorsOfLogins: what a client may be told that did not come in.
func TestErrorsOfLogins(t *testing.T) {
	fatal := func(code string) error { return &pgwire.Error{Severity: "FATAL", Code: code} }
	for _, c := range []struct {
		place   Place
		err     error
		ledger  []int
		outcome string
		wrong   int
	}{
		{LoginAtServer, fatal("57P03"), nil, "57P03", 0},
		{LoginAtServer, fatal("08006"), nil, "08006", 0},
		{LoginAtServer, fatal("57P03"), []int{1}, gone, 1},
		{LoginAtServer, fatal("08P01"), nil, gone, 1},
		{LoginAtServer, fatal("28P01"), nil, gone, 1},
		{LoginAtServer, &pgwire.Error{Severity: "ERROR", Code: "57P03"}, nil, gone, 1},
		{LoginAtServer, io.EOF, nil, gone, 1},
		{LoginAtClient, io.EOF, nil, gone, 0},
		{LoginByTLS, fatal("08P01"), nil, gone, 1},
	} {
		var v verdict
		v.refused(Case{Place: c.place}, fmt.Errorf("log in: %w", c.err), c.ledger)
		if v.outcome != c.outcome || len(v.wrong) != c.wrong {
			t.Errorf("%+v: %+v", c, v)
		}
	}
}

// TestWhatTheCutterFound are cases in which the gateway once lied, hung or left something behind. The numbers of messages follow from
// what the gateway sends of its own, so that they may come to mean something else; they stay cases of their scripts.
func TestWhatTheCutterFound(t *testing.T) {
	sound(t, start(t, Options{Sites: true, Only: strings.Join([]string{
		"write-with/sticky/server/to-client/6/mute",               // 40001 for what was committed: the session's first transaction
		"block-read/sticky/server/to-client/9/half",               // half an answer to the gateway's own question: no word to the client
		"write-upsert/sticky/server/to-client/12/lost",            // a statement that runs again waited for the lock of its own orphan
		"advisory-block/sticky/server/to-client/15/reset-before",  // COMMIT answered twice
		"copy-in-block/sticky/server/to-server/8/late",            // a failed COMMIT left the client in a transaction
		"pipeline-queries/alternate/server/to-client/19/mute",     // what stood behind a resolved commit was waited for for ever
		"pipeline-five-syncs/alternate/client/to-server/17/half",  // run again for ever, for a client that had gone
		"write-fails/alternate/client/to-server/8/late",           // a mark behind an error, which no server answers
		"flush-fails/sticky/server/to-client/999/lost",            // likewise, and nothing was cut
		"write-deferred-fails/sticky/server/to-client/999/lost",   // a tag for what could not be committed
		"prepared/sticky/server/to-client/999/lost",               // a statement's name that is no client's
		"block-empty/sticky/server/to-server/11/late",             // a backend left in a transaction that had only read
		"settings-function/alternate/server/to-server/10/silence", // a backend left while it was prepared for a session
		"pgx-block/sticky/server/to-server/31/silence",            // as an application sees it
	}, ",")}))
}

// sound looks at a run that must have gone well.
func sound(t *testing.T, res *Result) {
	t.Helper()
	if res.Failed() {
		t.Errorf("seed %d: %d violations", res.Seed, len(res.Findings))
	}
	if res.Of > 0 && res.Missed > res.Cases/20 {
		t.Errorf("seed %d: in %d of %d cases the message did not come: the count is not reproducible", res.Seed, res.Missed, res.Cases)
	}
}

// TestMutantsAreNoticed: a check that cannot fail proves nothing.
func TestMutantsAreNoticed(t *testing.T) {
	for _, c := range []struct {
		name string
		o    Options
		says string // somewhere in what is found
	}{
		{"messages are repeated", Options{Double: true, Only: "write-simple"}, "the ledger has"},
		{"messages of a transaction are repeated", Options{Double: true, Sites: true, Only: "block-simple"}, "segment"},
		{"messages of a pipeline are repeated", Options{Double: true, Only: "pipeline-one-sync"}, "segment"},
		{"what was committed is said not to be", Options{Lie: AllAborted, Sites: true, Only: "write-simple"}, "the ledger has"},
		{"what was not committed is said to be", Options{Lie: AllCommitted, Sites: true, Only: "block-simple"}, "the ledger has"},
		{"what runs yet is said to have aborted", Options{Lie: TooSoon, Sites: true, Only: "write-simple"}, "the ledger has"},
		{"a login is waited for for ever", Options{Lie: Patient, Sites: true, Only: "read-simple/sticky/server-login/to-client/3/stall"}, "too long"},
		{"a place of a pool is lost", Options{Lie: Leaky, Sites: true, Only: "read-simple/sticky/server-login/to-client/3/reset-before"}, "afterwards"},
		{"backends are not ended", Options{Lie: NoEnd, Sites: true, Only: "block-read", Cases: 60}, "left at the server"},
	} {
		t.Run(c.name, func(t *testing.T) {
			noticed := false
			c.o.Report, c.o.Until = 1, func(f Finding) bool {
				noticed = noticed || strings.Contains(strings.Join(f.Wrong, "\n"), c.says)
				return noticed
			}
			if res := start(t, c.o); !noticed {
				t.Errorf("%d findings in %d cases, none with %q", len(res.Findings), res.Cases, c.says)
			}
		})
	}
}

// TestRelayCutsAsItSays: without a gateway, each kind of cut has the effect at the server that it stands for.
func TestRelayCutsAsItSays(t *testing.T) {
	p, err := furnish(t.Context(), server(t))
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.newBench(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := b.stop(); err != nil {
			t.Error(err)
		}
	}()
	for _, c := range []struct {
		plan       plan
		now, later int // rows when the client knows, and when all is over
		hears      int // messages
	}{
		{plan{ToServer, 1, None}, 1, 1, 1},
		{plan{ToServer, 1, ResetBefore}, 0, 0, 0},
		{plan{ToServer, 1, Half}, 0, 0, 0},
		{plan{ToServer, 1, Silence}, 0, 0, 0},
		{plan{ToServer, 1, Late}, 0, 1, 0},
		{plan{ToServer, 1, SiteResetEnd}, -1, -1, 0}, // the server may be too late to see that its client is gone, or not
		{plan{ToServer, 1, FinAfter}, -1, 1, 0},
		{plan{ToServer, 1, Double}, -1, 2, 1},
		{plan{ToClient, 1, ResetBefore}, 1, 1, 0},
		{plan{ToClient, 1, FinBefore}, 1, 1, 0},
		{plan{ToClient, 1, Half}, 1, 1, 0},
		{plan{ToClient, 1, Lost}, 1, 1, 0},
		{plan{ToClient, 1, Mute}, 1, 1, 0},
		{plan{ToClient, 2, ResetBefore}, 1, 1, 1},
		{plan{ToClient, 2, Lost}, 1, 1, 1},
	} {
		t.Run(fmt.Sprintf("%s %d %s", c.plan.dir, c.plan.k, c.plan.kind), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			b.router.next(Sticky)
			number := p.number()
			cl, err := connect(ctx, b.router.sites[0].addr(), p.keys, b.name)
			if err != nil {
				t.Fatal(err)
			}
			b.wire.begin(c.plan)
			seen := &transcript{}
			if err := cl.run(seen, queries(insert(1)), number); err != nil {
				t.Fatal(err)
			}
			struck, pids := b.wire.hit()
			cl.close()
			now, err := b.ledger(ctx, number)
			if err != nil {
				t.Fatal(err)
			}
			b.wire.release()
			if left, err := b.left(ctx, pids, true); err != nil || left != "" {
				t.Errorf("left: %s, %v", left, err)
			}
			later, err := b.ledger(ctx, number)
			for err == nil && len(later) < c.later { // the second of two messages, which nobody waits for
				later, err = b.ledger(ctx, number)
			}
			if err != nil {
				t.Fatal(err)
			}
			hears := 0
			for _, a := range seen.answers {
				hears += len(a.says)
			}
			if c.now >= 0 && len(now) != c.now || c.later >= 0 && len(later) != c.later || hears != c.hears || struck != (c.plan.kind != None) {
				t.Errorf("struck %t; rows %v, then %v; heard %v", struck, now, later, seen.answers)
			}
			if cut := c.plan.kind != None && c.plan.kind != Double; seen.alive() == cut {
				t.Errorf("alive: %t, %s", seen.alive(), seen.broken)
			}
		})
	}
}

func TestCasesHaveNames(t *testing.T) {
	for _, c := range []Case{
		{"write-simple", Sticky, AtServer, ToServer, 3, Lost},
		{"copy-in", Alternate, AtClient, ToClient, 12, ResetBefore},
	} {
		got, err := ParseCase(c.String())
		if err != nil || got != c {
			t.Errorf("%s: %+v, %v", c, got, err)
		}
	}
	for _, bad := range []string{"", "write-simple", "a/b/c/d/e/f", "a/sticky/server/sideways/1/lost", "a/sticky/server/to-client/x/lost"} {
		if c, err := ParseCase(bad); err == nil {
			t.Errorf("%q: %+v", bad, c)
		}
	}
}

func TestScriptsAreWellFormed(t *testing.T) {
	names := map[string]bool{}
	for _, s := range corpus() {
		if names[s.name] {
			t.Errorf("two scripts are called %s", s.name)
		}
		names[s.name] = true
		if s.app != nil {
			continue
		}
		whole, apart := segments(s.all()), segments(split(s.all()))
		if len(whole) != len(apart) {
			t.Errorf("%s: %d segments, split %d", s.name, len(whole), len(apart))
		}
		sent := 0
		for _, b := range s.all() {
			sent += len(b.send)
		}
		for _, m := range whole {
			sent -= len(m)
		}
		if sent != 0 {
			t.Errorf("%s: %d messages are in no segment", s.name, sent)
		}
	}
}

func TestPlacesCoverBothEnds(t *testing.T) {
	for _, c := range []struct{ n, most int }{{0, 0}, {1, 0}, {7, 0}, {7, 8}, {100, 8}, {1000, 10}} {
		ks := places(c.n, c.most)
		if c.n == 0 {
			if len(ks) != 0 {
				t.Errorf("%v: %v", c, ks)
			}
			continue
		}
		if !slices.IsSorted(ks) || ks[0] != 1 || ks[len(ks)-1] != c.n || c.most > 0 && len(ks) > 2*c.most {
			t.Errorf("%v: %v", c, ks)
		}
	}
}

// block is a script of four segments with its expectation, and what is expected when its second one fails.
func block() (s *script, base, failing *expectation) {
	says := func(status byte, m ...string) answer { return answer{says: m, status: status} }
	s = &script{name: "block"}
	base = &expectation{
		answers: []answer{says('T', "C BEGIN"), says('T', "C INSERT"), says('I', "C COMMIT"), says('I', "C INSERT 2")},
		ledger:  [][]int{nil, nil, {1}, {1, 2}}, params: map[string]string{"TimeZone": "UTC"},
	}
	failing = &expectation{
		answers: []answer{base.answers[0], {codes: []string{failed}, status: 'E'}, says('I', "C ROLLBACK"), base.answers[3]},
		ledger:  [][]int{nil, nil, nil, {2}}, params: base.params,
	}
	return s, base, failing
}

func TestJudge(t *testing.T) {
	s, base, failing := block()
	params := base.params
	no := answer{says: []string{"E ERROR 40001 rolled back"}, codes: []string{failed}, status: 'E'}
	whole := func(a ...answer) *transcript { return &transcript{answers: a, sent: len(a), params: params} }
	with := func(t *transcript, change func(t *transcript)) *transcript { change(t); return t }
	dies := func(code string, sent int, a ...answer) *transcript {
		t := whole(append(a, answer{says: []string{"E FATAL " + code}, codes: []string{code}})...)
		t.sent, t.fatal = sent, &pgwire.Error{Severity: "FATAL", Code: code}
		return t
	}
	all := base.answers
	after := []answer{all[0], no, failing.answers[2], all[3]}
	for _, c := range []struct {
		name    string
		seen    seen
		outcome string
		wrong   string // a part of what is found; empty: nothing
		may     []string
	}{
		{"as uncut", seen{transcript: whole(all...), ledger: []int{1, 2}}, uncut, "", nil},
		{"an acknowledged row is lost", seen{transcript: whole(all...), ledger: []int{2}}, other, "the ledger has [2]", nil},
		{"a row is there twice", seen{transcript: whole(all...), ledger: []int{1, 2, 2}}, other, "the ledger has", nil},
		{"another answer", seen{transcript: whole(all[0], all[1], all[2], all[1]), ledger: []int{1, 2}}, other, "segment 3: want", nil},
		{"an answer too few", seen{transcript: whole(all[:3]...), ledger: []int{1}}, other, "3 segments were answered of 4", nil},
		{"an answer too many", seen{transcript: whole(append(slices.Clone(all), all[3])...), ledger: []int{1, 2}}, other, "answers to nothing", nil},
		{"other parameters", seen{transcript: with(whole(all...), func(t *transcript) { t.params = map[string]string{"TimeZone": "KST"} }), ledger: []int{1, 2}}, other, `TimeZone is "KST"`, nil},

		{"fails", seen{transcript: whole(after...), ledger: []int{2}}, failed, "", nil},
		{"fails, and was committed", seen{transcript: whole(after...), ledger: []int{1, 2}}, other, "the ledger has [1 2], want [2]", nil},
		{"fails with the wrong status", seen{transcript: whole(all[0], answer{no.says, no.codes, 'I'}, failing.answers[2], all[3]), ledger: []int{2}}, other, "status I after 40001", nil},
		{"fails as FATAL", seen{transcript: whole(all[0], answer{[]string{"E FATAL 40001"}, no.codes, 'E'}, failing.answers[2], all[3]), ledger: []int{2}}, other, "not an ERROR", nil},
		{"fails outside a transaction", seen{transcript: whole(all[0], all[1], all[2], answer{no.says, no.codes, 'I'}), ledger: []int{1}}, other, "which it may not", nil},
		{"fails after a strange answer", seen{transcript: whole(all[0], answer{append([]string{"C DELETE"}, no.says...), no.codes, 'E'}, failing.answers[2], all[3]), ledger: []int{2}}, other, "does not belong there", nil},

		{"ends pinned", seen{transcript: dies(pinned, 2, all[0])}, pinned, "", []string{pinned}},
		{"ends pinned, which it is not", seen{transcript: dies(pinned, 2, all[0])}, other, "may not be", nil},
		{"ends pinned, and was committed", seen{transcript: dies(pinned, 3, all[0], all[1]), ledger: []int{1}}, other, "only 08007", []string{pinned}},
		{"ends unknown, and was committed", seen{transcript: dies(unknown, 3, all[0], all[1]), ledger: []int{1}}, unknown, "", []string{unknown}},
		{"ends unknown, and was not committed", seen{transcript: dies(unknown, 3, all[0], all[1])}, unknown, "", []string{unknown}},
		{"ends unknown, and what was not sent is there", seen{transcript: dies(unknown, 3, all[0], all[1]), ledger: []int{1, 2}}, other, "want one of", []string{unknown}},
		{"ends by 08P01", seen{transcript: dies("08P01", 2, all[0])}, other, "08P01", []string{"08P01"}},
		{"speaks after FATAL", seen{transcript: with(dies(pinned, 2, all[0]), func(t *transcript) { t.spoke = true })}, other, "went on after FATAL", []string{pinned}},
		{"ends without a word", seen{transcript: with(whole(all[0]), func(t *transcript) { t.broken = "EOF" })}, other, "EOF", []string{pinned}},
	} {
		s.may = c.may
		exp := base
		if len(c.seen.failures(base)) > 0 {
			exp = failing
		}
		v := judge(contract{sites: true}, s, base, exp, c.seen)
		found := strings.Join(v.wrong, "\n")
		if v.outcome != c.outcome || !strings.Contains(found, c.wrong) || c.wrong == "" && found != "" {
			t.Errorf("%s: %s, %q", c.name, v.outcome, found)
		}
	}
	// Without sites, nothing but the end is right.
	s.may = nil
	if v := judge(contract{}, s, base, base, seen{transcript: dies(pinned, 3, all[0], all[1]), ledger: []int{1}}); v.outcome != pinned || len(v.wrong) > 0 {
		t.Errorf("%+v", v)
	}
	if v := judge(contract{}, s, base, failing, seen{transcript: whole(after...), ledger: []int{2}}); v.outcome != other {
		t.Errorf("%+v", v)
	}
}

func TestContainsCountsRepetitions(t *testing.T) {
	for _, c := range []struct {
		big, small []int
		want       bool
	}{
		{nil, nil, true}, {[]int{1, 2, 3}, []int{1, 3}, true}, {[]int{1, 2}, []int{2, 2}, false}, {[]int{1}, []int{2}, false}, {[]int{2, 2}, []int{2, 2}, true},
	} {
		if diff := cmp.Diff(c.want, contains(c.big, c.small)); diff != "" {
			t.Errorf("%v in %v: %s", c.small, c.big, diff)
		}
	}
}
