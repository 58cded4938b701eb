package etcdstore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// roomBytes is what a voter's store of one small value stays below: etcd's log is reserved by itself, its store is not, and
// etcd ends the process when a write to that fails.
const roomBytes = 32 << 20

// reserve takes the disk space of a voter's store now, so that a disk that fills up later does not end it. Where the file
// system cannot, nothing is reserved.
func reserve(dataDir string) error {
	path := filepath.Join(dataDir, "member", "snap", "db")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("reserve disk space for a voter: %w", err)
	}
	err = unix.EINTR
	for errors.Is(err, unix.EINTR) {
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, roomBytes)
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		err = nil
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("reserve %d MiB for %s: %w", roomBytes>>20, path, err)
	}
	return nil
}
