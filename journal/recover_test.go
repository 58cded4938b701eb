package journal

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/duri-io/duri/wal"
)

// TestTornEndIsCutAtEveryOffset cuts the last file, whose end was never synced, at every byte, in three ways: the file
// is shorter, the rest is zero, the rest is garbage.
func TestTornEndIsCutAtEveryOffset(t *testing.T) {
	fsys := newMemFS()
	o := Options{SegmentBytes: 4096}
	j := create(t, fsys, o)
	header := j.pos()
	type boundary struct {
		off int64
		end wal.LSN
	}
	ends := []boundary{{header, 0x100}}
	note := func() {
		must(t, j.Flush())
		ends = append(ends, boundary{j.pos(), j.End()})
	}
	appendAll(t, j, simpleTxn(0))
	note()
	appendAll(t, j, simpleTxn(1))
	note()
	must(t, j.AppendPosition(simpleTxn(2).EndLSN, nil, 9))
	note()
	j.appendSeal()
	note()
	appendAll(t, j, simpleTxn(3))
	note()
	name := filepath.Join("dir", segmentName(0x100))
	for cut := header; cut <= j.pos(); cut++ {
		want := ends[0]
		for _, e := range ends {
			if e.off <= cut {
				want = e
			}
		}
		for _, way := range []string{"shorter", "zero", "garbage"} {
			crashed := fsys.clone()
			crashed.damage(name, func(b []byte) []byte {
				switch way {
				case "shorter":
					return b[:cut]
				case "zero":
					clear(b[cut:])
				case "garbage":
					copy(b[cut:], bytes.Repeat([]byte{0xA5}, len(b)))
				}
				return b
			})
			checkCut(t, crashed, o, want.off, want.end, fmt.Sprintf("cut at %d, rest %s", cut, way))
		}
	}
}

func checkCut(t *testing.T, fsys *memFS, o Options, off int64, end wal.LSN, what string) {
	t.Helper()
	o.FS = fsys
	j, err := Open("dir", o)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if j.End() != end || j.Durable() != end || j.pos() != off {
		t.Fatalf("%s: end %s at %d, want %s at %d", what, j.End(), j.pos(), end, off)
	}
	must(t, j.AppendTxn(simpleTxn(5)))
	must(t, j.Close())
	s, err := Verify(context.Background(), "dir", o)
	if err != nil || s.End != simpleTxn(5).EndLSN {
		t.Fatalf("%s: after appending: %v %+v", what, err, s)
	}
}

// everyKind makes a journal of several files with every kind of record that version 1 writes, closed and durable.
func everyKind(t *testing.T) *memFS {
	t.Helper()
	fsys := newMemFS()
	j := create(t, fsys, Options{SegmentBytes: 1400})
	for i := range 3 {
		appendAll(t, j, simpleTxn(2*i))
		must(t, j.AppendPosition(simpleTxn(2*i+1).EndLSN, []wal.Seen{{Site: 3, LSN: 5}}, 7))
	}
	truncate := simpleTxn(6)
	truncate.Changes = []wal.Change{{Op: wal.Truncate, Relation: testRelations()[0], Options: wal.TruncateCascade}}
	appendAll(t, j, truncate)
	must(t, j.Close())
	if n := len(j.segments); n < 2 {
		t.Fatalf("%d files, want more than one", n)
	}
	return fsys
}

// TestEveryFlippedByteIsNamed damages one byte at a time, in two ways, and wants the file and the frame named.
func TestEveryFlippedByteIsNamed(t *testing.T) {
	pristine := everyKind(t)
	if _, err := Verify(context.Background(), "dir", Options{FS: pristine}); err != nil {
		t.Fatal(err)
	}
	m, _, err := loadMark(pristine, "dir")
	must(t, err)
	froms, err := listSegments(pristine, "dir")
	must(t, err)
	kinds := map[RecordType]bool{}
	for i, from := range froms {
		name := filepath.Join("dir", segmentName(from))
		data := pristine.names[name].data
		if i == len(froms)-1 {
			data = data[:m.offset]
		}
		for start := 0; start < len(data); {
			f, _, err := parseFrame(data[start:])
			must(t, err)
			kinds[f.typ] = true
			for at := start; at < start+len(f.raw); at++ {
				for _, bits := range []byte{0x01, 0xFF} {
					checkFlip(t, pristine, name, at, start, bits)
				}
			}
			start += len(f.raw)
		}
	}
	for _, k := range []RecordType{TypeHeader, TypeTxn, TypeChanges, TypeSchema, TypePosition, TypeSeal} {
		if !kinds[k] {
			t.Errorf("no record of type %d was damaged", k)
		}
	}
}

func checkFlip(t *testing.T, pristine *memFS, name string, at, frame int, bits byte) {
	t.Helper()
	fsys := pristine.clone()
	fsys.damage(name, func(b []byte) []byte { b[at] ^= bits; return b })
	var c *CorruptionError
	if _, err := Verify(context.Background(), "dir", small(Options{}, fsys)); !errors.As(err, &c) {
		t.Fatalf("%s: byte %d ^ %02x: verify: %v", name, at, bits, err)
	}
	if c.File != name || c.Offset != int64(frame) || c.Reason == "" || c.Hint == "" {
		t.Fatalf("%s: byte %d ^ %02x: named %s offset %d, frame is at %d: %v", name, at, bits, c.File, c.Offset, frame, c)
	}
	j, err := Open("dir", Options{FS: fsys, SegmentBytes: 1400})
	if err == nil {
		_, err = readAll(j, 0x100)
		must(t, j.Close())
	}
	if !errors.As(err, &c) || c.File != name || c.Offset != int64(frame) {
		t.Fatalf("%s: byte %d ^ %02x: open and read: %v", name, at, bits, err)
	}
}

func TestMissingFilesAreNoticed(t *testing.T) {
	pristine := everyKind(t)
	froms, err := listSegments(pristine, "dir")
	must(t, err)
	for len(froms) < 3 {
		t.Fatalf("%d files, want 3", len(froms))
	}
	for i, from := range froms[1:] {
		fsys := pristine.clone()
		delete(fsys.names, filepath.Join("dir", segmentName(from)))
		var c *CorruptionError
		if _, err := Open("dir", small(Options{}, fsys)); !errors.As(err, &c) || !strings.Contains(c.Error(), segmentName(from)) {
			t.Fatalf("file %d missing: %v", i+1, err)
		}
	}
	fsys := pristine.clone() // without the first: as if pruned
	delete(fsys.names, filepath.Join("dir", segmentName(froms[0])))
	j := open(t, fsys, Options{})
	defer j.Close()
	if j.Start() != froms[1] {
		t.Fatalf("start %s", j.Start())
	}
}

func TestFileOfAnotherHistoryIsRefused(t *testing.T) {
	fsys, other := everyKind(t), newMemFS()
	h := testHeader()
	h.Timeline, h.From = 2, 0x10000
	j, err := Create("dir", h, Options{FS: other})
	must(t, err)
	must(t, j.Close())
	name := filepath.Join("dir", segmentName(0x10000))
	fsys.names[name] = other.names[name]
	var c *CorruptionError
	if _, err := Open("dir", small(Options{}, fsys)); !errors.As(err, &c) || c.File != name {
		t.Fatalf("%v", err)
	}
}

func TestTruncationBelowTheMarkIsCorruption(t *testing.T) {
	pristine := everyKind(t)
	m, _, err := loadMark(pristine, "dir")
	must(t, err)
	name := filepath.Join("dir", segmentName(m.segment))
	header := int64(len(testHeader().Marshal()))
	for cut := header; cut < m.offset; cut++ {
		fsys := pristine.clone()
		fsys.damage(name, func(b []byte) []byte { clear(b[cut:]); return b })
		var c *CorruptionError
		if _, err := Open("dir", small(Options{}, fsys)); !errors.As(err, &c) || c.File != name {
			t.Fatalf("zero from %d: %v", cut, err)
		}
	}
}

func TestWithoutTheMarkNothingIsCut(t *testing.T) {
	fsys := everyKind(t)
	m, _, err := loadMark(fsys, "dir")
	must(t, err)
	delete(fsys.names, filepath.Join("dir", markName))
	whole := fsys.clone()
	j := open(t, whole, Options{}) // whole: opens, and has a mark again
	must(t, j.Close())
	if again, found, err := loadMark(whole, "dir"); err != nil || !found || again.end != m.end {
		t.Fatalf("mark after opening: %+v %v %v", again, found, err)
	}
	fsys.damage(filepath.Join("dir", segmentName(m.segment)), func(b []byte) []byte { b[m.offset] = 0xA5; return b })
	var c *CorruptionError
	if _, err := Open("dir", small(Options{}, fsys)); !errors.As(err, &c) || !strings.Contains(c.Hint, "mark") {
		t.Fatalf("torn end without a mark: %v", err)
	}
}

func TestMarkSurvivesATornWriteOfOneSlot(t *testing.T) {
	fsys := newMemFS()
	m, found, err := openMark(fsys, "dir")
	must(t, err)
	if found {
		t.Fatal("a new mark file has a mark")
	}
	must(t, m.write(mark{segment: 1, offset: 10, end: 100}))
	must(t, m.write(mark{segment: 1, offset: 20, end: 200}))
	data := fsys.names[filepath.Join("dir", markName)].data
	for i := range markSize {
		torn := slices.Clone(data)
		torn[i] ^= 0x10 // slot 0 holds the second
		fsys.names["dir/mark"].data = torn
		have, found, err := loadMark(fsys, "dir")
		if err != nil || !found || have.end != 100 {
			t.Fatalf("byte %d: %+v %v %v", i, have, found, err)
		}
	}
}

// TestNothingDurableIsLostWithThePower runs random operations, cuts the power at a random point and wants everything
// durable back, and nothing but a prefix of what was appended.
func TestNothingDurableIsLostWithThePower(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		rng := rand.New(rand.NewPCG(seed, 1))
		now := wal.Time(0)
		o := Options{SegmentBytes: int64(600 + rng.IntN(3000)), Now: func() wal.Time { now += 1e5; return now }}
		fsys := newMemFS()
		j := create(t, fsys, o)
		next, durable := 0, wal.LSN(0x100)
		for range 6 {
			for range rng.IntN(30) {
				switch rng.IntN(10) {
				case 0, 1:
					must(t, j.Sync())
					durable = j.Durable()
				case 2:
					must(t, j.Flush())
				case 3:
					must(t, j.AppendPosition(simpleTxn(next).EndLSN-wal.LSN(rng.IntN(60)+20), nil, now))
				default:
					must(t, j.AppendTxn(simpleTxn(next)))
					next++
				}
			}
			durable = max(durable, j.Durable()) // a rotation makes durable, too
			crashed := fsys.crash(rng)
			if rng.IntN(3) == 0 {
				crashed = fsys.clone() // or only the process died
			}
			j.Close()
			fsys = crashed
			j = open(t, fsys, o)
			end := j.End()
			if end < durable || end > simpleTxn(next).EndLSN {
				t.Fatalf("end %s after the crash, durable was %s", end, durable)
			}
			have, err := readAll(j, 0x100)
			must(t, err)
			next = len(have)
			for i, txn := range have {
				if d := diffTxn(simpleTxn(i), txn); d != "" {
					t.Fatalf("transaction %d: %s", i, d)
				}
			}
			if n := simpleTxn(next - 1).EndLSN; end < n || end >= n+100 {
				t.Fatalf("end %s with %d transactions", end, next)
			}
			durable = j.Durable()
		}
		must(t, j.Close())
	})
}

// childEnv makes the test binary append to the journal in the directory it names, until it is killed.
const childEnv = "DURI_JOURNAL_TEST_DIR"

// appendForEver appends simple transactions and prints each durable position. It never returns.
func appendForEver(dir string) {
	o := Options{SegmentBytes: 100000}
	j, err := Open(dir, o)
	if errors.Is(err, os.ErrNotExist) {
		j, err = Create(dir, testHeader(), o)
	}
	for i := 0; err == nil; i++ {
		if simpleTxn(i).EndLSN <= j.End() {
			continue
		}
		err = j.AppendTxn(simpleTxn(i))
		if err == nil && i%5 == 0 {
			err = j.Flush()
		}
		if err == nil && i%50 == 0 {
			if err = j.Sync(); err == nil {
				fmt.Println(j.Durable())
			}
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func TestKilledAppenderLosesNothingDurable(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	dir := filepath.Join(t.TempDir(), "journal")
	last := wal.LSN(0)
	for range 4 {
		durable := killAfter(t, dir, 1+rng.IntN(40))
		j, err := Open(dir, Options{SegmentBytes: 100000})
		must(t, err)
		if j.End() < durable || durable <= last {
			t.Fatalf("end %s, the child had %s durable, the one before %s", j.End(), durable, last)
		}
		last = durable
		have, err := readAll(j, 0x100)
		must(t, err)
		for i, txn := range have {
			if d := diffTxn(simpleTxn(i), txn); d != "" {
				t.Fatalf("transaction %d: %s", i, d)
			}
		}
		if len(have) == 0 || have[len(have)-1].EndLSN != j.End() {
			t.Fatalf("%d transactions up to %s", len(have), j.End())
		}
		must(t, j.Close())
	}
}

// killAfter starts a child and kills it with SIGKILL after it reported n durable positions; it returns the last one.
func killAfter(t *testing.T, dir string, n int) (durable wal.LSN) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill() })
	lines := bufio.NewScanner(out)
	for range n {
		if !lines.Scan() {
			cmd.Wait()
			t.Fatalf("child ended: %s", stderr.String())
		}
		durable, err = wal.ParseLSN(lines.Text())
		must(t, err)
	}
	must(t, cmd.Process.Kill())
	for lines.Scan() { // what it reported before it died counts
		if lsn, err := wal.ParseLSN(lines.Text()); err == nil && lsn > durable {
			durable = lsn
		}
	}
	cmd.Wait()
	return durable
}
