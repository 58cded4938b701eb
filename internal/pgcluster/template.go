package pgcluster

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"
)

// copyTemplate copies a data directory that was never started, and gives the copy a system identifier of its own: two
// sites with equal identifiers would look like one instance and its physical standby.
func (c *Cluster) copyTemplate(template string) error {
	if err := c.copyTree(template, c.DataDir()); err != nil {
		return fmt.Errorf("copy template %s: %w", template, err)
	}
	if err := renewSystemID(c.DataDir(), newSystemID(time.Now(), rand.Uint64())); err != nil {
		return fmt.Errorf("copy template %s: %w", template, err)
	}
	return nil
}

// copyTree copies directories and regular files, all that a fresh data directory has, for the cluster's user.
func (c *Cluster) copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			err = os.Mkdir(target, 0o700)
		case d.Type().IsRegular():
			err = copyFile(path, target)
		default:
			err = fmt.Errorf("%s is neither a file nor a directory", path)
		}
		return errors.Join(err, c.as.own(target))
	})
}

// copyFile copies by copy_file_range, which shares the blocks on file systems that can.
func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// newSystemID makes a system identifier as PostgreSQL does: seconds in the upper half, the rest below. PostgreSQL's own
// rest is microseconds and process ID; random bits serve as well, and two in one microsecond differ.
func newSystemID(now time.Time, random uint64) uint64 {
	return uint64(now.Unix())<<32 | random&0xFFFFFFFF
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// renewSystemID writes a system identifier into the two places of a never started data directory that hold it: the
// control file and the header of the only WAL segment.
func renewSystemID(dataDir string, id uint64) error {
	control := filepath.Join(dataDir, "global", "pg_control")
	b, err := os.ReadFile(control)
	if err != nil {
		return err
	}
	old, err := patchControl(b, id)
	if err != nil {
		return fmt.Errorf("%s: %w", control, err)
	}
	if err := os.WriteFile(control, b, 0o600); err != nil {
		return err
	}
	segments, err := filepath.Glob(filepath.Join(dataDir, "pg_wal", "????????????????????????"))
	if err != nil || len(segments) != 1 {
		return fmt.Errorf("%s has %d WAL segments, want the one of a server that was never started", dataDir, len(segments))
	}
	return patchSegment(segments[0], old, id)
}

// patchControl replaces the identifier, which is the first field of ControlFileData, and the CRC-32C over all fields,
// which is the last. The offset of the last differs among the majors, so it is where the stored value is right.
func patchControl(b []byte, id uint64) (old uint64, err error) {
	const shortest, longest = 128, 512 // ControlFileData fits one disk sector by design; 15 has 288 bytes before it.
	for n := shortest; n+4 <= min(longest, len(b)); n += 4 {
		if crc32.Checksum(b[:n], castagnoli) != binary.NativeEndian.Uint32(b[n:]) {
			continue
		}
		old = binary.NativeEndian.Uint64(b)
		binary.NativeEndian.PutUint64(b, id)
		binary.NativeEndian.PutUint32(b[n:], crc32.Checksum(b[:n], castagnoli))
		return old, nil
	}
	return 0, errors.New("no checksum found: damaged, or the layout of a new PostgreSQL")
}

// patchSegment replaces the identifier in a WAL segment's first page. It is the first field after the short page header
// (XLogLongPageHeaderData), and no checksum covers it.
func patchSegment(path string, old, id uint64) error {
	const offset = 24
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var b [8]byte
	if _, err := f.ReadAt(b[:], offset); err != nil {
		return err
	}
	if got := binary.NativeEndian.Uint64(b[:]); got != old {
		return fmt.Errorf("%s holds system identifier %d, the control file %d", path, got, old)
	}
	binary.NativeEndian.PutUint64(b[:], id)
	_, err = f.WriteAt(b[:], offset)
	return err
}
