package pair

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// built is the program that all tests of a package use, as linking it takes seconds.
var built struct {
	sync.Mutex
	dir, binary string
	err         error
}

// Built builds the program at the first call. Main removes it.
func Built(t testing.TB) (binary string) {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	if built.dir == "" && built.err == nil {
		if built.dir, built.err = os.MkdirTemp("", "duri-built-"); built.err == nil {
			built.binary, built.err = Build(context.Background(), built.dir)
		}
	}
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.binary
}

// Main is the TestMain of a package that calls Built or ForTest: it looks for goroutines that tests have left, and removes the program.
func Main(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		built.Lock()
		defer built.Unlock()
		if built.dir != "" {
			if err := os.RemoveAll(built.dir); err != nil {
				fmt.Fprintln(os.Stderr, err)
				code = max(code, 1)
			}
		}
		os.Exit(code)
	}))
}

// ForTest builds the program and starts sites for a test, which ends them and shows the agents' logs when it fails. It returns
// when all sites stream.
func ForTest(t testing.TB, o Options) *Pair {
	t.Helper()
	o.Binary = Built(t)
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
