package pair

import (
	"context"
	"testing"
	"time"
)

// ForTest builds the program and starts sites for a test, which ends them and shows the agents' logs when it fails. It returns
// when all sites stream.
func ForTest(t testing.TB, o Options) *Pair {
	t.Helper()
	var err error
	if o.Binary, err = Build(t.Context(), t.TempDir()); err != nil {
		t.Fatal(err)
	}
	p, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(p.logs())
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	if o.Held {
		return p
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := p.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return p
}
