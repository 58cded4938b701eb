package fkey

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a store in memory: a row of the child is an orphan while it is in orphans.
type world struct {
	all      []*Constraint
	pages    int // of each child
	orphans  map[string]bool
	recorded map[string]bool
	log      []string
	pageTime time.Duration
	err      error // of page
	handled  error
}

func (w *world) store() store { return w }

func (w *world) constraints(context.Context) ([]*Constraint, error) { return w.all, nil }
func (w *world) close()                                             {}

func (w *world) known(_ context.Context, c *Constraint) (map[string]bool, error) {
	out := map[string]bool{}
	for id := range w.recorded {
		if w.orphans[id] {
			out[c.keyJSON(Orphan{Key: []string{id}})] = true
		}
	}
	return out, nil
}

func (w *world) page(_ context.Context, c *Constraint, after []string) (found []Orphan, end []string, err error) {
	time.Sleep(w.pageTime) // of the bubble
	n := 0
	if after != nil {
		_, _ = fmt.Sscan(after[0], &n)
	}
	w.log = append(w.log, fmt.Sprintf("%s page %d", c.Name, n))
	if w.err != nil {
		return nil, nil, w.err
	}
	if n+1 < w.pages && c.Name == "big" {
		return nil, []string{fmt.Sprint(n + 1)}, nil
	}
	for id := range w.orphans {
		found = append(found, Orphan{Key: []string{id}, Ref: []*string{&id}})
	}
	return found, nil, nil
}

func (w *world) among(_ context.Context, c *Constraint, keys [][]string) (out []Orphan, err error) {
	w.log = append(w.log, fmt.Sprintf("%s again %d", c.Name, len(keys)))
	for _, k := range keys {
		if w.orphans[k[0]] {
			out = append(out, Orphan{Key: k})
		}
	}
	return out, nil
}

func (w *world) handle(_ context.Context, _ *Constraint, o Orphan, p policy.Orphans) (Outcome, error) {
	if w.handled != nil {
		err := w.handled
		w.handled = nil
		return "", err
	}
	w.log = append(w.log, string(p)+" "+o.Key[0])
	if p == policy.Report {
		w.recorded[o.Key[0]] = true
		return Recorded, nil
	}
	delete(w.orphans, o.Key[0])
	return Removed, nil
}

// acts are the entries of the log that change something.
func (w *world) acts() []string {
	return slices.DeleteFunc(slices.Clone(w.log), func(s string) bool { return strings.Contains(s, " page ") || strings.Contains(s, " again ") })
}

type settlerFunc func(context.Context) (bool, error)

func (f settlerFunc) Settled(ctx context.Context) (bool, error) { return f(ctx) }

func constraint(name string) *Constraint {
	child, parent := policy.Name{Schema: "public", Table: "child_" + name}, policy.Name{Schema: "public", Table: "parent"}
	return &Constraint{
		Name: name, Child: child, Parent: parent, Key: []KeyColumn{{"id", "integer"}}, Columns: []Column{{Name: "pid", Referenced: "id"}},
		Replicated: true, ChildStores: []policy.Name{child}, ParentStores: []policy.Name{parent}, Pageable: true,
	}
}

// setting is a checker over a world, in a bubble whose clock runs when everybody waits.
type setting struct {
	*Checker
	w       *world
	settled bool
	elected bool
	policy  policy.Orphans
}

// inBubble runs a test with a running checker, after its first round.
func inBubble(t *testing.T, names []string, p policy.Orphans, test func(t *testing.T, s *setting)) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{pages: 1, orphans: map[string]bool{}, recorded: map[string]bool{}}
		for _, n := range names {
			w.all = append(w.all, constraint(n))
		}
		s := &setting{w: w, settled: true, elected: true, policy: p}
		s.Checker = New(Config{
			Policies: func(context.Context) (policy.Set, error) {
				tables := map[policy.Name]policy.Table{}
				for _, c := range w.all {
					tables[c.Child] = policy.Table{FK: map[string]policy.Orphans{c.Name: s.policy}}
				}
				return policy.NewSet(tables, nil), nil
			},
			Settler: settlerFunc(func(context.Context) (bool, error) { return s.settled, nil }),
			Elected: func() bool { return s.elected },
		})
		s.db = w.store()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		synctest.Wait()
		test(t, s)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run ended with %v", err)
		}
	})
}

// after lets time pass.
func after(d time.Duration) {
	time.Sleep(d) // of the bubble
	synctest.Wait()
}

func TestTouchedConstraintsAreLookedAtAfterTheDelay(t *testing.T) {
	inBubble(t, []string{"a", "b"}, policy.RemoveChild, func(t *testing.T, s *setting) {
		s.w.log = nil
		s.w.orphans["1"] = true
		s.Touched("public.child_a")
		s.Touched("public.other")
		after(DefaultDelay - time.Millisecond)
		if len(s.w.log) != 0 {
			t.Errorf("too early: %v", s.w.log)
		}
		after(2 * time.Millisecond)
		if want := []string{"a page 0", "a again 1", "remove_child 1"}; !slices.Equal(s.w.log, want) {
			t.Errorf("%v, want %v", s.w.log, want)
		}
		s.w.log = nil
		s.Touched("public.parent")
		after(DefaultDelay + time.Second)
		if want := []string{"a page 0", "b page 0"}; !slices.Equal(s.w.log, want) {
			t.Errorf("parent: %v, want %v", s.w.log, want)
		}
	})
}

func TestEverythingIsLookedAtNowAndThen(t *testing.T) {
	inBubble(t, []string{"a"}, policy.Report, func(t *testing.T, s *setting) {
		if got := s.Status(); got.Checked != 1 || got.CheckedAt.IsZero() {
			t.Errorf("at the start: %+v", got)
		}
		s.w.log = nil
		s.w.orphans["1"] = true
		after(DefaultEvery - time.Second)
		if len(s.w.log) != 0 {
			t.Errorf("too early: %v", s.w.log)
		}
		after(2 * time.Second)
		if got := s.w.acts(); !slices.Equal(got, []string{"report 1"}) {
			t.Error(s.w.log)
		}
		if got := s.Status(); got.Orphans != 1 || len(got.Constraints) != 1 || got.Constraints[0].Orphans != 1 {
			t.Errorf("%+v", got)
		}
		after(2 * DefaultEvery)
		if got := s.w.acts(); len(got) != 1 {
			t.Errorf("reported again: %v", got)
		}
		delete(s.w.orphans, "1")
		after(DefaultEvery)
		if got := s.Status(); got.Orphans != 0 || len(got.Constraints) != 0 {
			t.Errorf("gone, but %+v", got)
		}
	})
}

func TestNothingIsDoneBeforeEverythingKnownIsApplied(t *testing.T) {
	inBubble(t, []string{"a"}, policy.RemoveChild, func(t *testing.T, s *setting) {
		s.settled = false
		s.w.orphans["1"], s.w.orphans["2"] = true, true
		s.Touched("public.child_a")
		after(10 * DefaultDelay)
		if got := s.w.acts(); len(got) != 0 {
			t.Errorf("%v", got)
		}
		if got := s.Status(); got.Orphans != 0 || len(got.Constraints) != 1 || got.Constraints[0].Waiting != 2 {
			t.Errorf("%+v", got)
		}
		pages := strings.Count(strings.Join(s.w.log, ","), "page")
		if pages != 2 { // of the first round, and of the touch: then only the two rows
			t.Errorf("%d pages were read: %v", pages, s.w.log)
		}
		delete(s.w.orphans, "2") // its parent has come
		s.settled = true
		after(2 * DefaultDelay)
		if got := s.w.acts(); !slices.Equal(got, []string{"remove_child 1"}) {
			t.Errorf("%v", got)
		}
		if got := s.Status(); len(got.Constraints) != 0 {
			t.Errorf("%+v", got)
		}
	})
}

func TestTheParentMayComeBetweenTheTwoLooks(t *testing.T) {
	inBubble(t, []string{"a"}, policy.RemoveChild, func(t *testing.T, s *setting) {
		s.cfg.Settler = settlerFunc(func(context.Context) (bool, error) {
			clear(s.w.orphans)
			return true, nil
		})
		s.w.orphans["1"] = true
		s.Touched("public.child_a")
		after(2 * DefaultDelay)
		if got := s.w.acts(); len(got) != 0 {
			t.Errorf("%v", got)
		}
	})
}

func TestOnlyTheElectedSiteCompensates(t *testing.T) {
	inBubble(t, []string{"a"}, policy.ResurrectParent, func(t *testing.T, s *setting) {
		s.elected = false
		s.w.orphans["1"] = true
		s.Touched("public.child_a")
		after(DefaultEvery)
		if got := s.w.acts(); len(got) != 0 {
			t.Errorf("%v", got)
		}
		if got := s.Status(); len(got.Constraints) != 1 || got.Constraints[0].Waiting != 1 {
			t.Errorf("%+v", got)
		}
		looks := len(s.w.log)
		after(DefaultEvery / 2)
		if len(s.w.log) != looks {
			t.Errorf("it goes on looking: %v", s.w.log)
		}
		s.policy = policy.Report // every site reports
		after(DefaultEvery)
		if got := s.w.acts(); !slices.Equal(got, []string{"report 1"}) {
			t.Errorf("%v", got)
		}
	})
}

func TestTablesThatAreNotReplicatedAreOnlyReported(t *testing.T) {
	inBubble(t, []string{"a"}, policy.RemoveChild, func(t *testing.T, s *setting) {
		s.w.all[0].Replicated = false
		s.w.orphans["1"] = true
		s.Touched("public.child_a")
		after(2 * DefaultDelay)
		if got := s.w.acts(); !slices.Equal(got, []string{"report 1"}) {
			t.Errorf("%v", got)
		}
	})
}

func TestALargeTableDoesNotHoldUpASmallOneAndCostsLittle(t *testing.T) {
	inBubble(t, []string{"big", "small"}, policy.Report, func(t *testing.T, s *setting) {
		s.w.pages, s.w.pageTime, s.w.log = 100, 10*time.Millisecond, nil
		s.w.orphans["1"] = true
		s.Touched("public.parent")
		after(DefaultDelay + 3*time.Second)
		if !slices.Contains(s.w.log, "small again 1") || slices.Contains(s.w.log, "big page 9") {
			t.Errorf("%v", s.w.log)
		}
		after(time.Minute)
		if !slices.Contains(s.w.log, "big page 99") {
			t.Errorf("the large table was not finished: %v", s.w.log[len(s.w.log)-1])
		}
		// 100 pages of 10 ms at 2 % take 50 s.
		if n := len(s.w.log); n > 105 {
			t.Errorf("%d looks", n)
		}
	})
}

func TestErrorsAreShownAndTriedAgain(t *testing.T) {
	inBubble(t, []string{"a", "b"}, policy.RemoveChild, func(t *testing.T, s *setting) {
		s.w.err = errors.New("relation is gone")
		s.w.log = nil
		s.w.orphans["1"] = true
		s.Touched("public.child_a")
		after(10 * DefaultDelay)
		if got := s.Status(); !strings.Contains(got.LastError, "check a of public.child_a: relation is gone") {
			t.Errorf("%+v", got)
		}
		if n := len(s.w.log); n < 2 || n > 10 {
			t.Errorf("%d attempts in 10 delays", n)
		}
		s.w.err = nil
		s.w.handled = errors.New("lock timeout") // once
		after(5 * DefaultDelay)
		if got := s.w.acts(); !slices.Equal(got, []string{"remove_child 1"}) || s.Status().LastError != "" {
			t.Errorf("%v, %+v", got, s.Status())
		}
	})
}

func TestTouchedNeverBlocks(t *testing.T) {
	k := New(Config{}) // does not run
	for i := range 1000 {
		k.Touched(fmt.Sprintf("public.t%d", i%3))
	}
	if got := k.takeTouched(); len(got) != 3 {
		t.Errorf("%v", got)
	}
	k.learn([]*Constraint{constraint("a")})
	k.Touched("public.t1")
	k.Touched("public.parent")
	if got := k.takeTouched(); !slices.Equal(got, []string{"public.parent"}) {
		t.Errorf("%v", got)
	}
}

// TestNobodyActsOnWhatMayNotBeAnOrphan is the rule of the two looks, over all that can be.
func TestNobodyActsOnWhatMayNotBeAnOrphan(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := rapid.SampledFrom(policy.AllOrphans).Draw(t, "policy")
		again, settled, elected := rapid.Bool().Draw(t, "again"), rapid.Bool().Draw(t, "settled"), rapid.Bool().Draw(t, "elected")
		got := decide(p, again, settled, elected)
		switch {
		case got == actOnIt && (!again || !settled):
			t.Fatal("acted too early")
		case got == actOnIt && p != policy.Report && !elected:
			t.Fatal("two sites compensate")
		case again && settled && (elected || p == policy.Report) && got != actOnIt:
			t.Fatal("nobody acts")
		}
	})
}

// TestWhatIsDueIsLookedAt: whatever is touched and when, each constraint is looked at again after its last touch.
func TestWhatIsDueIsLookedAt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := &agenda{due: map[string]due{}}
		now := time.Unix(0, 0)
		a.replace([]*Constraint{constraint("a"), constraint("b"), constraint("c")}, now)
		touched := map[string]time.Time{} // last touch, by constraint
		tick := func() {
			now = now.Add(time.Second)
			a.start(now)
			if len(a.jobs) > 0 {
				j := a.jobs[0]
				a.jobs = a.jobs[1:]
				if last, ok := touched[j.c.Name]; ok && !last.After(now) && j.keys == nil && !j.begun {
					delete(touched, j.c.Name)
				}
				if j.begun = true; rapid.Bool().Draw(t, "more pages") {
					a.jobs = append(a.jobs, j)
				}
			}
		}
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0:
				name := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "table")
				a.touch("public.child_"+name, now.Add(2*time.Second))
				touched[name] = now
			case 1:
				c := rapid.SampledFrom(a.all).Draw(t, "constraint")
				a.again(c, now.Add(time.Second), [][]string{{"1"}})
			default:
				tick()
			}
		}
		for range 1000 {
			if len(touched) == 0 && len(a.jobs) == 0 && len(a.due) == 0 {
				return
			}
			tick()
		}
		t.Fatalf("never looked at: %v; jobs %d, due %d", touched, len(a.jobs), len(a.due))
	})
}
