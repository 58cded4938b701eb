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
)

// TestVerifiersOfManyAtOnce: each login gets its own role's verifier, whatever the others' names are, also those that PostgreSQL
// does not take; and whoever waits is answered together.
func TestVerifiersOfManyAtOnce(t *testing.T) {
	c := pgtest.New(t)
	pgtest.DB(t, c, "app")
	pgtest.Exec(t, c, "app", grants.SQL(grants.Spec{Gateway: true}))
	names := []string{"plain", "NULL", `quo"te`, `back\slash`, `{curly},`, "with space", "", "한글", strings.Repeat("x", nameMax)}
	want := map[string]string{}
	for _, n := range names {
		if n == "" {
			continue
		}
		pgtest.Exec(t, c, "app", fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD 'of %d'", pg.QuoteIdent(n), len(want)))
		want[n] = pgtest.Query(t, c, "app", "SELECT rolpassword FROM pg_authid WHERE rolname = "+pg.QuoteLiteral(n))[0][0]
	}
	pgtest.Exec(t, c, "app", "CREATE ROLE nologin PASSWORD 'x'")
	cfg, err := pg.Config(c.DSN("", "duri"), "app", nil)
	if err != nil {
		t.Fatal(err)
	}
	v := &verifiers{config: cfg}
	defer v.close()
	const badEncoding, badCharacter = "\xff", "with\x00end"
	ask := func(name string) {
		got, err := v.read(t.Context(), name)
		if bad := name == badEncoding || name == badCharacter; (err != nil) != bad || got != want[name] {
			t.Errorf("%q: %q, %v; want %q", name, got, err, want[name])
		}
	}
	all := slices.Concat(names, []string{"nologin", "nobody", strings.Repeat("x", nameMax+1), badEncoding, badCharacter})
	for _, n := range all { // alone
		ask(n)
	}
	var wg sync.WaitGroup
	for i := range 50 * len(all) {
		wg.Go(func() { ask(all[i%len(all)]) })
	}
	wg.Wait()

	// Whoever comes while a question is under way is in the next one.
	v.mu.Lock()
	v.asking = true // by this test
	v.mu.Unlock()
	for i := range 100 {
		wg.Go(func() { ask(names[i%len(names)]) })
	}
	waiting(t, v, 100)
	ended, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() {
		_, err := v.read(ended, "plain")
		gone <- err
	}()
	waiting(t, v, 101)
	cancel()
	if err := <-gone; err == nil {
		t.Error("a login that has ended still waits")
	}
	v.answer()
	wg.Wait()
}

func waiting(t *testing.T, v *verifiers, n int) {
	t.Helper()
	for {
		v.mu.Lock()
		now := len(v.waiting)
		v.mu.Unlock()
		if now == n {
			return
		}
		if t.Context().Err() != nil {
			t.Fatal(t.Context().Err())
		}
	}
}
