package pair

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// Disk is a small file system of its own, ext4 in a file, so that a test can let it fill up or hang. It takes the rights of
// root, and Linux.
type Disk struct {
	path string // where it is mounted
}

// DisksWork reports whether this process may mount a Disk; the error says why not.
func DisksWork() error {
	dir, err := os.MkdirTemp("", "duri-disk-")
	if err != nil {
		return err
	}
	d, err := newDisk(filepath.Join(dir, "disk"), 8<<20)
	if err == nil {
		err = d.close()
	}
	return errors.Join(err, os.RemoveAll(dir))
}

// newDisk makes a file system of so many bytes at path, which must not exist.
func newDisk(path string, bytes int64) (*Disk, error) {
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, err
	}
	image := path + ".img"
	f, err := os.Create(image)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(bytes), f.Close()); err != nil {
		return nil, err
	}
	// Without blocks that are reserved for root: the agent of a test is often root's.
	if err := run("mkfs.ext4", "-q", "-m", "0", image); err != nil {
		return nil, err
	}
	if err := run("mount", "-o", "loop", image, path); err != nil {
		return nil, err
	}
	return &Disk{path}, nil
}

func run(name string, args ...string) error {
	cmd := exec.CommandContext(context.Background(), name, args...)
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, b)
	}
	return nil
}

// filler is what Fill leaves no room with.
const filler = "filler"

// Fill leaves no room on it.
func (d *Disk) Fill() (err error) {
	f, err := os.Create(filepath.Join(d.path, filler))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for size := int64(64 << 20); size >= 4096; {
		st, err := f.Stat()
		if err != nil {
			return err
		}
		switch err := syscall.Fallocate(int(f.Fd()), 0, st.Size(), size); {
		case errors.Is(err, syscall.ENOSPC):
			size /= 2
		case err != nil && !errors.Is(err, syscall.EINTR):
			return fmt.Errorf("fill %s: %w", d.path, err)
		}
	}
	return nil
}

// Free takes back what Fill took.
func (d *Disk) Free() error {
	err := os.Remove(filepath.Join(d.path, filler))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Hang lets every write to it wait until Thaw; a process that does so cannot be killed meanwhile.
func (d *Disk) Hang() error { return run("fsfreeze", "-f", d.path) }

// Thaw ends Hang.
func (d *Disk) Thaw() error { return run("fsfreeze", "-u", d.path) }

// close unmounts it; nobody may use it any more.
func (d *Disk) close() error {
	if d == nil {
		return nil
	}
	_ = d.Thaw() // it fails when nothing hangs
	return run("umount", d.path)
}
