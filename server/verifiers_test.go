package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/pgwire"
)

// TestVerifiersOfManyAtOnce: each login gets its own role's verifier, whatever the others' names are, also those that PostgreSQL
// does not take; and nobody waits for another's who has ended.
func TestVerifiersOfManyAtOnce(t *testing.T) {
	c := pgtest.New(t)
	pgtest.DB(t, c, "app")
	pgtest.Exec(t, c, "app", grants.SQL(grants.Spec{Gateway: true}))
	names := []string{"plain", "NULL", `quo"te`, `back\slash`, `{curly},`, "with space", "", "한글", strings.Repeat("x", pgwire.NameMax)}
	want := map[string]string{}
	for _, n := range names {
		if n == "" {
			continue
		}
		pgtest.Exec(t, c, "app", fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD 'of %d'", pg.QuoteIdent(n), len(want)))
		want[n] = pgtest.Query(t, c, "app", "SELECT rolpassword FROM pg_authid WHERE rolname = "+pg.QuoteLiteral(n))[0][0]
	}
	pgtest.Exec(t, c, "app", "CREATE ROLE nologin PASSWORD 'x'")
	h := newTestHost(t, c)
	const badEncoding, badCharacter = "\xff", "with\x00end"
	ask := func(name string) {
		got, err := h.Verifier(t.Context(), name)
		if bad := name == badEncoding || name == badCharacter; (err != nil) != bad || got != want[name] {
			t.Errorf("%q: %q, %v; want %q", name, got, err, want[name])
		}
	}
	all := slices.Concat(names, []string{"nologin", "nobody", strings.Repeat("x", pgwire.NameMax+1), badEncoding, badCharacter})
	for _, n := range all { // alone
		ask(n)
	}
	var wg sync.WaitGroup
	for i := range 50 * len(all) {
		wg.Go(func() { ask(all[i%len(all)]) })
	}
	wg.Wait()

	// A login that has ended does not wait for its answer.
	h.verifiers.mu.Lock() // by this test
	ended, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() {
		_, err := h.Verifier(ended, "plain")
		gone <- err
	}()
	for i := range 100 {
		wg.Go(func() { ask(names[i%len(names)]) })
	}
	cancel()
	if err := <-gone; err == nil {
		t.Error("a login that has ended still waits")
	}
	h.verifiers.mu.Unlock()
	wg.Wait()
}
