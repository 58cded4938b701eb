package server

import (
	"testing"
	"time"
)

func TestAnErrorIsPastWhenTheNextRunLasts(t *testing.T) {
	began := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name        string
		failed, now time.Duration // since the present run began
		want        bool
	}{
		{"the run before failed, this one is young", -time.Second, time.Second, false},
		{"the run before failed, this one lasts", -time.Second, pastAfter, true},
		{"this run is disturbed", 3 * time.Second, time.Minute, false},
	} {
		if got := past(began.Add(c.failed), began, began.Add(c.now)); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}
