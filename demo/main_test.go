package demo

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
)

// program is the duri binary, built once for all tests that run it.
var program string

func TestMain(m *testing.M) { goleak.VerifyTestMain(withProgram{m}) }

// withProgram builds the binary, runs the tests, and removes it.
type withProgram struct{ m *testing.M }

func (w withProgram) Run() int {
	dir, err := os.MkdirTemp("", "duri-demo-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "duri")
	if out, err := exec.Command("go", "build", "-o", program, "../cmd/duri").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build duri: %v\n%s", err, out)
		return 1
	}
	return w.m.Run()
}
