package etcdstore

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestVoterHasItsRoom: a full disk must find the space of a voter's store taken already.
func TestVoterHasItsRoom(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "member", "snap", "db")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("store"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := reserve(dir); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Size() != 5 {
		t.Fatal(st, err)
	}
	if have := st.Sys().(*syscall.Stat_t).Blocks * 512; have < roomBytes {
		t.Errorf("%d bytes are reserved", have)
	}
}
