package pair

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestPgbenchLog(t *testing.T) {
	prefix := filepath.Join(t.TempDir(), "log")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(prefix+".1", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("0 0 90000 0 1700000000 500000\n1 0 3000 0 1700000002 500000\n")
	want := []Logged{{time.Unix(1700000000, 500000000), 90 * time.Millisecond}, {time.Unix(1700000002, 500000000), 3 * time.Millisecond}}
	if got, err := TakePgbenchLog(prefix); err != nil || !cmp.Equal(want, got) {
		t.Error(got, err)
	}
	if left, err := filepath.Glob(prefix + ".*"); err != nil || len(left) > 0 {
		t.Error("left:", left, err)
	}
	for _, text := range []string{"0 0 1\n", "0 0 failed 0 1700000000 1\n"} {
		write(text)
		if _, err := TakePgbenchLog(prefix); err == nil {
			t.Errorf("%q was read", text)
		}
	}
}
