package journal

import (
	"io"
	"os"
)

// FS is what the journal needs of a file system. Tests replace it to inject short writes, a full disk, a failed fsync
// and the loss of what was not synced. Paths are the caller's, joined with filepath.
type FS interface {
	MkdirAll(dir string) error
	// ReadDir lists the names in dir, in no particular order.
	ReadDir(dir string) ([]string, error)
	// Open opens a file for reading and writing; create makes it when it is missing.
	Open(name string, create bool) (File, error)
	Rename(from, to string) error
	Remove(name string) error
	// SyncDir makes creations, renames and removals in dir durable.
	SyncDir(dir string) error
	// Lock takes an exclusive lock on the file until it is closed or the process ends; ErrInUse when it is taken.
	Lock(name string) (io.Closer, error)
}

// File is an open file of an FS. ReadAt and WriteAt may run at the same time.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Size() (int64, error)
	Truncate(size int64) error
	// Allocate reserves space up to size and extends the file with zeros. It succeeds without effect where the file
	// system cannot; a full disk is an error.
	Allocate(size int64) error
	// Sync makes the data, and the size needed to read it, durable.
	Sync() error
	// DropCache makes the next reads come from the device where the system allows it: after a failed fsync the page
	// cache may hold data that the device does not.
	DropCache() error
}

// OSFS is the operating system's file system.
type OSFS struct{}

// MkdirAll makes the directory and its parents, for the owner only: the journal holds the rows' contents.
func (OSFS) MkdirAll(dir string) error { return os.MkdirAll(dir, 0o700) }

// ReadDir lists the names in dir.
func (OSFS) ReadDir(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// Open opens a file for reading and writing.
func (OSFS) Open(name string, create bool) (File, error) {
	flag := os.O_RDWR
	if create {
		flag |= os.O_CREATE
	}
	f, err := os.OpenFile(name, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

// Rename replaces to by from.
func (OSFS) Rename(from, to string) error { return os.Rename(from, to) }

// Remove removes a file.
func (OSFS) Remove(name string) error { return os.Remove(name) }

// SyncDir fsyncs a directory.
func (OSFS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Lock locks a file with flock where there is one.
func (OSFS) Lock(name string) (io.Closer, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lockFile(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (f osFile) Allocate(size int64) error { return allocate(f.File, size) }
func (f osFile) Sync() error               { return datasync(f.File) }
func (f osFile) DropCache() error          { return dropCache(f.File) }
