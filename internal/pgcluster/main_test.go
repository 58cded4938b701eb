package pgcluster_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/duri-io/duri/internal/pgcluster"
)

// helperEnv makes the test binary a program that starts a server in the directory it names, says "ready" and waits
// until its standard input ends; see TestServerEndsWithItsProgram.
const (
	helperEnv       = "DURI_PGCLUSTER_HELPER_DIR"
	helperDetachEnv = "DURI_PGCLUSTER_HELPER_DETACH"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(helperEnv); dir != "" {
		os.Exit(serve(dir, os.Getenv(helperDetachEnv) != ""))
	}
	goleak.VerifyTestMain(withTemplate{m})
}

// withTemplate runs the tests and removes the template that they shared.
type withTemplate struct{ m *testing.M }

func (w withTemplate) Run() int {
	code := w.m.Run()
	if c := template.cluster; c != nil {
		if err := c.Destroy(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return code
}

// template saves most tests the second that initdb takes.
var template struct {
	sync.Once
	cluster *pgcluster.Cluster
	err     error
}

// templateDir makes the template at the first call.
func templateDir(t *testing.T) string {
	t.Helper()
	template.Do(func() { template.cluster, template.err = pgcluster.Create(testContext(t), pgcluster.Options{}) })
	if template.err != nil {
		t.Fatal(template.err)
	}
	return template.cluster.DataDir()
}

// serve is the helper program. It does not clean up: the tests are about what happens then.
func serve(dir string, detach bool) int {
	ctx := context.Background()
	c, err := pgcluster.Create(ctx, pgcluster.Options{Dir: dir, Detach: detach, Settings: quick()})
	if err == nil {
		err = c.Start(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}
