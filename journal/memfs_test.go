package journal

import (
	"errors"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"sync"
)

const sector = 512

// memFS is a file system in memory that knows what is durable. A crash keeps what was synced and a random part of the
// rest, sector by sector. The fail functions, if set, inject errors.
type memFS struct {
	mu     sync.Mutex
	names  map[string]*memFile // what a process sees
	synced map[string]*memFile // the directory entries that are durable
	locked map[string]bool

	failWrite    func(name string, off int64, n int) (written int, err error)
	failSync     func(name string) error
	failSyncDir  func(dir string) error
	failAllocate func(name string, size int64) error
	onSync       func(name string) // called without the lock, before a file is synced
}

// memFile is a file: data is the page cache, disk the device, dirty the sectors that differ for a reason the kernel
// knows. After a failed fsync a sector may differ without being dirty, as on Linux.
type memFile struct {
	data, disk []byte
	dirty      map[int]bool
}

func newMemFS() *memFS {
	return &memFS{names: map[string]*memFile{}, synced: map[string]*memFile{}, locked: map[string]bool{}}
}

func (f *memFile) clone() *memFile {
	return &memFile{data: append([]byte(nil), f.data...), disk: append([]byte(nil), f.disk...), dirty: maps.Clone(f.dirty)}
}

// resize sets the size of the cached file; new space is zero and dirty.
func (f *memFile) resize(size int) {
	old := len(f.data)
	if size <= old {
		f.data = f.data[:size:size]
		return
	}
	f.data = append(f.data, make([]byte, size-old)...)
	f.touch(old, size)
}

func (f *memFile) touch(from, to int) {
	for s := from / sector; s*sector < to; s++ {
		f.dirty[s] = true
	}
}

func span(b []byte, s int) []byte {
	return b[min(len(b), s*sector):min(len(b), (s+1)*sector)]
}

func (f *memFile) sync() {
	if len(f.disk) > len(f.data) {
		f.disk = f.disk[:len(f.data)]
	}
	f.disk = append(f.disk, make([]byte, len(f.data)-len(f.disk))...)
	for s := range f.dirty {
		copy(span(f.disk, s), span(f.data, s))
	}
	f.dirty = map[int]bool{}
}

// dropCache lets clean sectors come from the device again.
func (f *memFile) dropCache() {
	for s := 0; s*sector < len(f.data); s++ {
		if f.dirty[s] {
			continue
		}
		clear(span(f.data, s))
		copy(span(f.data, s), span(f.disk, s))
	}
}

// crashed is what a loss of power leaves: each dirty sector reached the device or not.
func (f *memFile) crashed(rng *rand.Rand) *memFile {
	size := len(f.disk)
	if rng.IntN(2) == 0 {
		size = len(f.data)
	}
	out := make([]byte, size)
	for s := 0; s*sector < size; s++ {
		src := f.disk
		if f.dirty[s] && rng.IntN(2) == 0 {
			src = f.data
		}
		copy(span(out, s), span(src, s))
	}
	return &memFile{data: out, disk: append([]byte(nil), out...), dirty: map[int]bool{}}
}

// crash returns the file system after a loss of power.
func (m *memFS) crash(rng *rand.Rand) *memFS {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := newMemFS()
	copied := map[*memFile]*memFile{}
	for name, f := range m.synced {
		keep := m.synced
		if rng.IntN(2) == 0 {
			keep = m.names
		}
		if keep[name] == nil { // removed, and the removal reached the device
			continue
		}
		f = keep[name]
		if copied[f] == nil {
			copied[f] = f.crashed(rng)
		}
		out.names[name] = copied[f]
	}
	for name, f := range m.names {
		if m.synced[name] == nil && copied[f] == nil && rng.IntN(2) == 0 {
			out.names[name] = f.crashed(rng)
		}
	}
	out.synced = maps.Clone(out.names)
	return out
}

// clone is what kill -9 leaves: everything, locks excepted.
func (m *memFS) clone() *memFS {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := newMemFS()
	for name, f := range m.names {
		out.names[name] = f.clone()
		if m.synced[name] != nil {
			out.synced[name] = out.names[name]
		}
	}
	return out
}

// damage changes a file on the device and in the page cache.
func (m *memFS) damage(name string, change func(b []byte) []byte) {
	f := m.names[name]
	b := change(append([]byte(nil), f.data...))
	m.names[name] = &memFile{data: b, disk: append([]byte(nil), b...), dirty: map[int]bool{}}
}

func (m *memFS) MkdirAll(string) error { return nil }

func (m *memFS) ReadDir(dir string) (names []string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n := range m.names {
		if filepath.Dir(n) == dir {
			names = append(names, filepath.Base(n))
		}
	}
	return names, nil
}

func (m *memFS) Open(name string, create bool) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.names[name]
	if f == nil {
		if !create {
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
		f = &memFile{dirty: map[int]bool{}}
		m.names[name] = f
	}
	return &memHandle{fs: m, file: f, name: name}, nil
}

func (m *memFS) Rename(from, to string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.names[to] = m.names[from]
	delete(m.names, from)
	return nil
}

func (m *memFS) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.names[name] == nil {
		return fs.ErrNotExist
	}
	delete(m.names, name)
	return nil
}

func (m *memFS) SyncDir(dir string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failSyncDir != nil {
		if err := m.failSyncDir(dir); err != nil {
			return err
		}
	}
	m.synced = maps.Clone(m.names)
	return nil
}

func (m *memFS) Lock(name string) (io.Closer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.locked[name] {
		return nil, ErrInUse
	}
	m.locked[name] = true
	return closerFunc(func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.locked, name)
		return nil
	}), nil
}

type closerFunc func() error

func (f closerFunc) Close() error { return f() }

type memHandle struct {
	fs   *memFS
	file *memFile
	name string
}

func (h *memHandle) ReadAt(b []byte, off int64) (int, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if off >= int64(len(h.file.data)) {
		return 0, io.EOF
	}
	n := copy(b, h.file.data[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (h *memHandle) WriteAt(b []byte, off int64) (n int, err error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	n = len(b)
	if h.fs.failWrite != nil {
		n, err = h.fs.failWrite(h.name, off, n)
	}
	end := int(off) + n
	if end > len(h.file.data) {
		h.file.resize(end)
	}
	copy(h.file.data[off:end], b)
	h.file.touch(int(off), end)
	return n, err
}

func (h *memHandle) Close() error { return nil }

func (h *memHandle) Size() (int64, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	return int64(len(h.file.data)), nil
}

func (h *memHandle) Truncate(size int64) error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	h.file.resize(int(size))
	return nil
}

func (h *memHandle) Allocate(size int64) error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if h.fs.failAllocate != nil {
		if err := h.fs.failAllocate(h.name, size); err != nil {
			return err
		}
	}
	if int(size) > len(h.file.data) {
		h.file.resize(int(size))
	}
	return nil
}

func (h *memHandle) Sync() error {
	if h.fs.onSync != nil {
		h.fs.onSync(h.name)
	}
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if h.fs.failSync != nil {
		if err := h.fs.failSync(h.name); err != nil {
			h.file.dirty = map[int]bool{} // the kernel gives up on the pages and calls them clean
			return err
		}
	}
	h.file.sync()
	return nil
}

func (h *memHandle) DropCache() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	h.file.dropCache()
	return nil
}

var errInjected = errors.New("injected I/O error")
