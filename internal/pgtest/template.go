package pgtest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/duri-io/duri/internal/pgcluster"
)

// templates are the results of initdb that this process has looked up already, by directory of programs.
var templates struct {
	sync.Mutex
	dirs map[string]string
}

// template gives a data directory that initdb made with these programs and that was never started. It comes from the
// cache, which all test processes of the user share, or is made and kept there. It is empty when there is no place for a
// cache; then each cluster needs its own initdb.
func template(ctx context.Context, binDir string) (string, error) {
	templates.Lock()
	defer templates.Unlock()
	if dir, ok := templates.dirs[binDir]; ok && isTemplate(dir) {
		return dir, nil
	}
	cache, ok := cacheDir()
	if !ok {
		return "", nil
	}
	dir, err := cachedTemplate(ctx, cache, binDir)
	if err != nil {
		return "", fmt.Errorf("make a template cluster: %w", err)
	}
	if templates.dirs == nil {
		templates.dirs = map[string]string{}
	}
	templates.dirs[binDir] = dir
	return dir, nil
}

// cachedTemplate looks into the cache and fills it under a lock, so that packages tested side by side run initdb once.
func cachedTemplate(ctx context.Context, cache, binDir string) (string, error) {
	key, err := templateKey(binDir)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "template-"+key)
	lock, err := lockFile(ctx, filepath.Join(cache, "lock"))
	if err != nil {
		return "", err
	}
	defer lock.Close() // Releases the lock.
	if isTemplate(dir) {
		return dir, nil
	}
	// Half a template may be there from a process that was killed: the renaming below is the last step.
	return dir, makeTemplate(ctx, binDir, dir)
}

// makeTemplate runs initdb where the server's user may write, and moves the result into the cache, where it may not.
func makeTemplate(ctx context.Context, binDir, dir string) (err error) {
	s, err := newScratch(false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.remove()) }()
	c, err := pgcluster.Create(ctx, pgcluster.Options{BinDir: binDir, Dir: s.clusterDir()})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Destroy()) }()
	partial := dir + ".partial"
	if err := os.RemoveAll(partial); err != nil {
		return err
	}
	if err := os.CopyFS(partial, os.DirFS(c.DataDir())); err != nil {
		return err
	}
	return os.Rename(partial, dir)
}

// isTemplate reports whether dir is a complete one. Programs that clean up temporary files may take it at any time.
func isTemplate(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "global", "pg_control"))
	return err == nil
}

// templateKey names everything that a template depends on: the programs, and how pgcluster calls initdb (the number at
// the start of the text is raised when that changes).
func templateKey(binDir string) (string, error) {
	st, err := os.Stat(filepath.Join(binDir, "initdb"))
	if err != nil {
		return "", err
	}
	pg, err := os.Stat(filepath.Join(binDir, "postgres"))
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "1 %s %d %d %d %d", binDir,
		st.Size(), st.ModTime().UnixNano(), pg.Size(), pg.ModTime().UnixNano()))
	return hex.EncodeToString(sum[:8]), nil
}

// cacheDir is duri/pgtest in the user's cache directory; ok is false where there is none that can be written, as for
// system users without a home.
func cacheDir() (dir string, ok bool) {
	user, err := os.UserCacheDir()
	if err != nil {
		return "", false
	}
	dir = filepath.Join(user, "duri", "pgtest")
	const write = 2 // W_OK
	return dir, os.MkdirAll(dir, 0o700) == nil && syscall.Access(dir, write) == nil
}

// lockFile locks a file until it is closed or the process ends, however that comes about.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	const pollInterval = 20 * time.Millisecond
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := tryLock(f)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errors.Join(err, f.Close())
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("wait for the lock on %s: %w", path, context.Cause(ctx)), f.Close())
		}
	}
}

func tryLock(f *os.File) error { return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) }
