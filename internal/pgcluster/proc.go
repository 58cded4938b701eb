package pgcluster

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// serverProcesses lists the live processes of the server with this data directory: those that run a postgres program
// with the data directory as their current one. The postmaster goes there before it forks, and no child leaves. The
// process group tells less: each backend calls setsid and so leaves the postmaster's group. Zombies are not listed; they
// have given up memory and files already.
func serverProcesses(dataDir string) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err == nil && isServerProcess(pid, dataDir) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// isServerProcess reports whether a live process belongs to the server with this data directory.
func isServerProcess(pid int, dataDir string) bool {
	base := "/proc/" + strconv.Itoa(pid)
	// A process of another user, or one that ended meanwhile, gives an error: not ours.
	cwd, err := os.Readlink(base + "/cwd")
	if err != nil || strings.TrimSuffix(cwd, " (deleted)") != dataDir {
		return false
	}
	exe, err := os.Readlink(base + "/exe")
	if err != nil {
		// It is ending: the kernel takes the program away first, then the memory, then the current directory. In between
		// the server's shared memory is still in use, and PostgreSQL would refuse to start.
		return true
	}
	// An operator's shell or psql may stand in the data directory too; it is not ours to kill.
	return strings.HasPrefix(filepath.Base(exe), "postgres") || strings.HasPrefix(filepath.Base(exe), "postmaster")
}

// killAll sends SIGKILL to the server's processes until none is left. The postmaster (0 when unknown) is killed first,
// so that nothing new is forked after the list is made.
func killAll(ctx context.Context, dataDir string, postmaster int) error {
	if postmaster != 0 {
		if err := syscall.Kill(postmaster, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("kill postmaster %d: %w", postmaster, err)
		}
	}
	return waitGone(ctx, dataDir, func(pid int) { _ = syscall.Kill(pid, syscall.SIGKILL) })
}

// waitGone waits until the server has no process, calling each on every one it sees in each round. The error, after
// ctx ends, names those that remain.
func waitGone(ctx context.Context, dataDir string, each func(pid int)) error {
	for {
		pids := serverProcesses(dataDir)
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			each(pid)
		}
		if err := pause(ctx, pollInterval); err != nil {
			return fmt.Errorf("wait for the server's processes %v to end: %w", pids, err)
		}
	}
}

// pollInterval is how often /proc and the server are asked again while waiting.
const pollInterval = 5 * time.Millisecond

// pause waits for d or until ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// segment is a piece of shared memory that outlives a server killed by SIGKILL: a System V segment (shmID >= 0; its
// path is empty) or a file in /dev/shm. Nobody removes it unless the same data directory is started again.
type segment struct {
	path    string
	inode   uint64
	shmID   int
	creator int32 // the process that made the System V segment, which tells it from a later one with the same shmID
}

// segmentsOf lists the removable shared memory that a live process maps.
func segmentsOf(pid int) []segment {
	maps, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/maps")
	if err != nil {
		return nil // The process ended: what it mapped was noted at its start.
	}
	segments := parseSegments(string(maps))
	for i, s := range segments {
		var desc unix.SysvShmDesc
		if s.path == "" {
			if _, err := unix.SysvShmCtl(s.shmID, unix.IPC_STAT, &desc); err == nil {
				segments[i].creator = desc.Cpid
			}
		}
	}
	return segments
}

// parseSegments reads the form of /proc/PID/maps: address, permissions, offset, device, inode, path. A System V segment
// shows as /SYSV and its key, with its identifier as the inode.
func parseSegments(maps string) []segment {
	var segments []segment
	for line := range strings.Lines(maps) {
		f := strings.Fields(line)
		if len(f) < 6 {
			continue
		}
		inode, err := strconv.ParseUint(f[4], 10, 64)
		if err != nil {
			continue
		}
		s := segment{path: f[5], inode: inode, shmID: -1}
		switch {
		case strings.HasPrefix(f[5], "/SYSV"):
			s = segment{shmID: int(inode)}
		case strings.HasPrefix(f[5], dynamicPrefix):
		default:
			continue
		}
		if !slices.Contains(segments, s) {
			segments = append(segments, s)
		}
	}
	return segments
}

// dynamicSegments lists the files in /dev/shm that a dead server's control segment names. Backends make such segments at
// any time, so nobody has seen those of a server that was killed by somebody else.
func dynamicSegments(known []segment) []segment {
	paths, _ := filepath.Glob(dynamicPrefix + "*") // The pattern cannot be malformed.
	var found []segment
	for _, k := range known {
		if k.path == "" || !k.exists() {
			continue
		}
		control, err := os.ReadFile(k.path)
		if err != nil {
			continue
		}
		for _, path := range listedIn(control, paths) {
			st, err := os.Lstat(path)
			if err != nil {
				continue
			}
			if sys, ok := st.Sys().(*syscall.Stat_t); ok {
				found = append(found, segment{path: path, inode: sys.Ino, shmID: -1})
			}
		}
	}
	return found
}

// dynamicPrefix begins the path of a dynamic shared memory segment; its handle, a random 32-bit number, ends it.
const dynamicPrefix = "/dev/shm/PostgreSQL."

// listedIn picks the paths whose handle occurs in a control segment; none when the bytes are not one. It looks at all
// 32-bit words, because the layout of the entries is PostgreSQL's own affair; that the random handle of another server
// is among the few small numbers beside the handles is next to impossible.
func listedIn(control []byte, paths []string) []string {
	const magic = 0x9a503d32 // PG_DYNSHMEM_CONTROL_MAGIC
	if len(control) < 4 || binary.NativeEndian.Uint32(control) != magic {
		return nil
	}
	words := map[uint64]bool{}
	for rest := control[4:]; len(rest) >= 4; rest = rest[4:] {
		words[uint64(binary.NativeEndian.Uint32(rest))] = true
	}
	var listed []string
	for _, path := range paths {
		handle, err := strconv.ParseUint(strings.TrimPrefix(path, dynamicPrefix), 10, 32)
		if err == nil && words[handle] {
			listed = append(listed, path)
		}
	}
	return listed
}

// exists reports whether a file segment still is the one that was seen.
func (s segment) exists() bool {
	st, err := os.Lstat(s.path)
	if err != nil {
		return false
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	return ok && sys.Ino == s.inode
}

// remove removes the segment if it still is the one that was seen.
func (s segment) remove() error {
	if s.path != "" {
		if !s.exists() {
			return nil
		}
		return os.Remove(s.path)
	}
	var desc unix.SysvShmDesc
	if _, err := unix.SysvShmCtl(s.shmID, unix.IPC_STAT, &desc); err != nil || desc.Cpid != s.creator {
		return nil // It is gone, or its identifier names someone else's by now.
	}
	if _, err := unix.SysvShmCtl(s.shmID, unix.IPC_RMID, nil); err != nil {
		return fmt.Errorf("remove shared memory segment %d: %w", s.shmID, err)
	}
	return nil
}
