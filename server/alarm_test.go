package server

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestLevelsHaveSlack(t *testing.T) {
	for _, c := range []struct {
		was  string
		used int64
		want string
	}{
		{LevelOK, 0, LevelOK},
		{LevelOK, 69, LevelOK},
		{LevelOK, 70, LevelWarning},
		{LevelOK, 85, LevelCritical},
		{LevelOK, 95, LevelFull},
		{LevelOK, 200, LevelFull},
		{LevelWarning, 66, LevelWarning},
		{LevelWarning, 64, LevelOK},
		{LevelWarning, 84, LevelWarning},
		{LevelCritical, 81, LevelCritical},
		{LevelCritical, 79, LevelWarning},
		{LevelCritical, 10, LevelOK},
		{LevelFull, 91, LevelFull},
		{LevelFull, 89, LevelCritical},
		{LevelFull, 66, LevelOK},
	} {
		if got := levelOf(c.was, c.used, 100); got != c.want {
			t.Errorf("%d %% after %s: %s, want %s", c.used, c.was, got, c.want)
		}
	}
}

// TestALevelChangesOnceForAMove: what hovers around a limit within the slack is told at most once, and more use is never a
// better level.
func TestALevelChangesOnceForAMove(t *testing.T) {
	rank := map[string]int{LevelOK: 0, LevelWarning: 1, LevelCritical: 2, LevelFull: 3}
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.SampledFrom([]int64{70, 85, 95}).Draw(t, "limit")
		changes, level := 0, LevelOK
		for _, d := range rapid.SliceOfN(rapid.Int64Range(-levelSlack, levelSlack-1), 1, 50).Draw(t, "moves") {
			next := levelOf(level, limit+d, 100)
			if next != level && level != LevelOK {
				changes++
			}
			level = next
		}
		if changes > 1 {
			t.Fatalf("hovering around %d %% changed the level %d times", limit, changes)
		}
		was := rapid.SampledFrom([]string{LevelOK, LevelWarning, LevelCritical, LevelFull}).Draw(t, "was")
		a, b := rapid.Int64Range(0, 150).Draw(t, "a"), rapid.Int64Range(0, 150).Draw(t, "b")
		if a <= b && rank[levelOf(was, a, 100)] > rank[levelOf(was, b, 100)] {
			t.Fatalf("after %s, %d %% is %s and %d %% is %s", was, a, levelOf(was, a, 100), b, levelOf(was, b, 100))
		}
	})
}

func TestFullIn(t *testing.T) {
	for _, c := range []struct {
		used, budget int64
		rate         float64
		want         time.Duration
	}{
		{50, 100, 10, 5 * time.Second}, {50, 100, 0, 0}, {50, 100, -3, 0}, {100, 100, 5, 0}, {0, math.MaxInt64, 1, 100 * 365 * 24 * time.Hour},
	} {
		if got := fullIn(c.used, c.budget, c.rate); got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

func TestUsageMeasuresTheLastMinuteAndTellsOfALevelOnce(t *testing.T) {
	var u usage
	at := time.Unix(1000, 0)
	told := 0
	var s BudgetStatus
	for i := range 200 {
		var news bool
		used := int64(i)
		if i >= 100 {
			used = 100 + int64(i-100)/10
		}
		s, news = u.see(at.Add(time.Duration(i)*time.Second), used, 130)
		if news {
			told++
		}
	}
	if told != 1 || s.Level != LevelWarning {
		t.Errorf("told %d times, %s", told, s.Level)
	}
	if s.Growth < 0.09 || s.Growth > 0.11 || s.FullIn < 150 || s.FullIn > 250 {
		t.Errorf("growth %.2f bytes a second, full in %.0f s", s.Growth, s.FullIn)
	}
	if len(u.samples) > 62 {
		t.Errorf("%d samples are kept", len(u.samples))
	}
	if text := s.Sentence(JournalsUsed); text != "journal.budget: 83 % of 130 B used, full in 3m30s at the present rate" {
		t.Error(text)
	}
}
