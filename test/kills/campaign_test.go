package kills

import (
	"bytes"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/pair"
)

func TestMain(m *testing.M) { pair.Main(m) }

// TestTwentyRounds is the short form of `make prove CASE=kills`.
func TestTwentyRounds(t *testing.T) {
	binary := pair.Built(t)
	var out bytes.Buffer
	o := Options{Binary: binary, Rounds: 20, Seed: rand.Uint64N(1 << 32), Out: &out, Keep: os.Getenv("DURI_KEEP") != ""}
	t.Logf("seed %d", o.Seed)
	res, err := Run(t.Context(), o)
	t.Log("\n" + out.String() + "\n" + res.Report())
	if err != nil {
		t.Fatal(err)
	}
	if res.Failed() || res.Acked == 0 {
		t.Errorf("seed %d: violations, or nothing was acknowledged", o.Seed)
	}
}

func TestStallIsTheLongestTimeWithoutAnAnswer(t *testing.T) {
	t0 := time.Unix(1000, 0)
	at := func(ms int, o outcome) attempt {
		return attempt{ended: t0.Add(time.Duration(ms) * time.Millisecond), outcome: o}
	}
	for _, c := range []struct {
		name     string
		attempts []attempt
		want     time.Duration
	}{
		{"before the fault does not count", []attempt{at(-900, acked), at(-10, acked), at(20, acked), at(50, acked)}, 30 * time.Millisecond},
		{"from the fault on", []attempt{at(-10, acked), at(700, acked), at(710, acked)}, 700 * time.Millisecond},
		{"only what was acknowledged", []attempt{at(10, acked), at(100, refused), at(200, unknown), at(310, acked)}, 300 * time.Millisecond},
		{"any client's", []attempt{at(310, acked), at(10, acked), at(150, acked)}, 160 * time.Millisecond},
	} {
		if got := stall(c.attempts, t0); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}
