package pgtest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// scratch is a temporary directory for one cluster, marked as in use by a lock in it that ends with the process.
type scratch struct {
	dir  string
	lock *os.File
}

const (
	scratchPrefix = "duri-pgtest-"
	scratchLock   = "lock"
	// scratchAgeMin spares directories that another process has just made and not locked yet.
	scratchAgeMin = time.Minute
)

var sweepOnce sync.Once

// newScratch makes a scratch directory; the first call of a process removes those of killed processes. A durable one is
// on a real file system.
func newScratch(durable bool) (*scratch, error) {
	sweepOnce.Do(func() {
		sweep(os.TempDir(), scratchAgeMin)
		sweep(memoryDir, scratchAgeMin)
	})
	parent := os.TempDir()
	if !durable && os.Getenv("TMPDIR") == "" && roomInMemory() {
		parent = memoryDir
	}
	dir, err := os.MkdirTemp(parent, scratchPrefix)
	if err != nil {
		return nil, err
	}
	s := &scratch{dir: dir}
	// When root runs the tests, the server's user must be able to pass through.
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, errors.Join(err, s.remove())
	}
	if s.lock, err = os.OpenFile(filepath.Join(dir, scratchLock), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, errors.Join(err, s.remove())
	}
	if err := tryLock(s.lock); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", s.lock.Name(), err), s.remove())
	}
	return s, nil
}

// memoryDir is a file system in memory. A cluster is some 960 files, and ext4 needs up to a second to make them when as
// many were removed in the last minutes, which tests do all the time; here it is 50 ms.
const memoryDir = "/dev/shm"

// roomInMemory reports whether several clusters, of 40 MB and their WAL each, surely fit. Containers often have 64 MB.
func roomInMemory() bool {
	const bytesMin = 4 << 30
	var fs unix.Statfs_t
	if err := unix.Statfs(memoryDir, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		return false
	}
	if fs.Bavail*uint64(fs.Bsize) < bytesMin || unix.Access(memoryDir, unix.W_OK) != nil {
		return false
	}
	meminfo, err := os.ReadFile("/proc/meminfo")
	return err == nil && memAvailable(string(meminfo)) >= bytesMin
}

// memAvailable reads the bytes in the line "MemAvailable: 123 kB" of /proc/meminfo; 0 when there is none.
func memAvailable(meminfo string) uint64 {
	for line := range strings.Lines(meminfo) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "MemAvailable:" {
			kb, err := strconv.ParseUint(f[1], 10, 64)
			if err == nil {
				return kb << 10
			}
		}
	}
	return 0
}

// clusterDir is where the cluster goes; it does not exist yet.
func (s *scratch) clusterDir() string { return filepath.Join(s.dir, "pg") }

// remove removes the directory and gives up the lock.
func (s *scratch) remove() error {
	err := os.RemoveAll(s.dir)
	if s.lock != nil {
		err = errors.Join(err, s.lock.Close())
	}
	return err
}

// sweep removes the scratch directories in tmp that nobody holds the lock of and that are older than ageMin. Failures
// are passed over: another user's directories are not ours to remove.
func sweep(tmp string, ageMin time.Duration) {
	dirs, _ := filepath.Glob(filepath.Join(tmp, scratchPrefix+"*")) // The pattern cannot be malformed but by tmp's name.
	for _, dir := range dirs {
		st, err := os.Lstat(dir)
		if err != nil || !st.IsDir() || time.Since(st.ModTime()) < ageMin {
			continue
		}
		lock, err := os.OpenFile(filepath.Join(dir, scratchLock), os.O_RDWR, 0)
		if err != nil {
			continue
		}
		if tryLock(lock) == nil {
			_ = os.RemoveAll(dir)
		}
		_ = lock.Close()
	}
}
