// Package journal is the durable, checksummed, ordered file log of one origin's committed transactions in one
// database. The origin's agent writes it from what it decodes; every peer keeps a copy that it receives over the link.
// The same records serve as replication queue, RPO 0 spool, source for a third site, and change history.
//
// It does not talk to PostgreSQL or to the network, does not decide when a receipt is given, and knows nothing of
// conflicts. It does not compress or encrypt: the archive container is built around the same records elsewhere.
//
// It guarantees:
//   - What Durable reports survives the loss of power, or its damage is reported with file and offset; it is never
//     skipped silently.
//   - Positions are dense: a record that would leave a hole is refused (archive.md J2), one that lies below the end is
//     dropped, so that sending again is harmless.
//   - The chain value at a position is a function of the transactions up to there only (archive.md J1): two sites
//     compare copies by 32 bytes.
//   - After a failed write or fsync nothing becomes durable any more until the journal is opened again
//     (durability.md section 3).
//
// Concurrency: one goroutine appends, another may call Sync, any number read with a Reader each. The other methods
// may be called at any time. One mutex guards everything; it is not held during the fsync of Sync.
//
// The format is docs/reference/journal.md; DESIGN.md says why it is so.
package journal

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/duri-io/duri/wal"
)

const (
	defaultSegmentBytes = 64 << 20
	flushBytes          = 256 << 10 // the appender hands over to the file at the latest when it holds so much
	sealEvery           = time.Second
	markSyncEvery       = time.Second
)

// Options adjust a journal; the zero value is usable.
type Options struct {
	// SegmentBytes is the size at which a new file is begun; default 64 MiB. A single larger transaction makes its
	// file larger.
	SegmentBytes int64
	// Now is the clock for seals; default the system's.
	Now func() wal.Time
	// Logger takes what an operator should know, such as a cut tail; default none.
	Logger *slog.Logger
	// FS is the file system; default OSFS.
	FS FS
}

func (o Options) withDefaults() Options {
	if o.SegmentBytes <= 0 {
		o.SegmentBytes = defaultSegmentBytes
	}
	if o.Now == nil {
		o.Now = func() wal.Time { return wal.TimeOf(time.Now()) }
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.FS == nil {
		o.FS = OSFS{}
	}
	return o
}

// Journal is an open journal. See the package comment for concurrency.
type Journal struct {
	dir  string
	o    Options
	lock io.Closer
	mark *markFile

	mu       sync.Mutex // guards everything below
	in       intake     // in.at holds the running values at the end
	enc      encoder
	catalog  catalog
	buf      []byte // appended, not yet written: follows seg.off
	segments []*segment
	seg      *segment // the last one
	nextID   uint64

	durable  wal.LSN
	failed   error // sticky: a write or fsync failed
	closed   bool
	local    bool // the last transaction came by AppendTxn: seals are ours to write
	unsealed int  // transactions since the last seal
	sealedAt wal.Time

	syncing  bool // an fsync runs without mu
	syncDone sync.Cond
	markedAt wal.Time // when the mark was last fsynced

	notify  chan struct{} // closed and replaced when readers may go on
	waiting bool          // someone waits for notify

	// scratch of AppendFrames
	frames [][]byte
	used   []*relationState
}

func newJournal(dir string, o Options, lock io.Closer) *Journal {
	j := &Journal{dir: dir, o: o, lock: lock, notify: make(chan struct{})}
	j.syncDone.L = &j.mu
	j.enc.rels = &j.catalog
	j.sealedAt, j.markedAt = o.Now(), o.Now()
	return j
}

// Create makes a new, empty journal in dir, whose coverage begins at h.From with h's running values. It fails with
// fs.ErrExist when dir holds one already. The caller closes it.
func Create(dir string, h Header, o Options) (_ *Journal, err error) {
	o = o.withDefaults()
	if err := o.FS.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("create journal: %w", err)
	}
	lock, err := o.FS.Lock(filepath.Join(dir, lockName))
	if err != nil {
		return nil, fmt.Errorf("create journal in %s: %w", dir, err)
	}
	j := newJournal(dir, o, lock)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("create journal in %s: %w", dir, err), j.release())
		}
	}()
	froms, err := listSegments(o.FS, dir)
	if err != nil {
		return nil, err
	}
	if len(froms) > 0 {
		return nil, fmt.Errorf("it holds a journal from %s: %w", froms[0], fs.ErrExist)
	}
	if err := removeTemporary(o.FS, dir); err != nil {
		return nil, err
	}
	if err := j.createFirst(h.clone()); err != nil {
		return nil, err
	}
	return j, nil
}

// createFirst makes the mark and the first segment.
func (j *Journal) createFirst(h Header) error {
	h.Previous = 0
	var err error
	if j.mark, _, err = openMark(j.o.FS, j.dir); err != nil {
		return err
	}
	j.nextID = 1
	seg, err := createSegment(j.o.FS, j.dir, h, j.nextID, j.o.SegmentBytes)
	if err != nil {
		return err
	}
	j.in = newIntake(h)
	j.setCheck()
	j.segments, j.seg, j.durable = []*segment{seg}, seg, h.From
	if err := j.writeMark(); err != nil {
		return err
	}
	if err := j.mark.file.Sync(); err != nil {
		return err
	}
	return errors.Join(j.o.FS.SyncDir(j.dir), j.o.FS.SyncDir(filepath.Dir(j.dir)))
}

// setCheck makes the intake verify what AppendFrames receives, and collect the relations it uses.
func (j *Journal) setCheck() {
	j.in.check = true
	j.in.visit = func(rel *wal.Relation) {
		st := j.catalog.get(rel.ID) // appendFrames and open see to it that the catalog knows what the intake does
		if st.mark != j.enc.serial {
			st.mark = j.enc.serial
			j.used = append(j.used, st)
		}
	}
}

// removeTemporary removes the file of a segment whose creation was interrupted.
func removeTemporary(fsys FS, dir string) error {
	names, err := fsys.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if strings.HasSuffix(n, segmentExt+tempExt) {
			if err := fsys.Remove(filepath.Join(dir, n)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Header describes the journal as its oldest kept file does.
func (j *Journal) Header() Header {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.segments[0].head.clone()
}

// Current is the header of the newest file: its incarnation is the one that is written now, or was written last.
func (j *Journal) Current() Header {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.seg.head.clone()
}

// HeaderAt is the header of the newest file that still holds every record beyond from. A new copy that needs the
// journal from there is created from it; it then receives at most one file's length more than it asked for.
func (j *Journal) HeaderAt(from wal.LSN) (Header, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	i, err := j.segmentFor(from)
	if err != nil {
		return Header{}, err
	}
	return j.segments[i].head.clone(), nil
}

// Start is where the kept coverage begins, exclusive.
func (j *Journal) Start() wal.LSN {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.segments[0].head.From
}

// End is where the coverage ends: everything up to here was appended.
func (j *Journal) End() wal.LSN {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.in.at.to
}

// Durable is the position up to which everything survives the loss of power.
func (j *Journal) Durable() wal.LSN {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.durable
}

// State is a snapshot of a journal's running values.
type State struct {
	Start, End, Durable wal.LSN
	// Chain covers Txns transactions with Bytes canonical bytes, from the incarnation's beginning to End.
	Chain          Chain
	Txns, Bytes    uint64
	MaxVersionTime wal.Time   // the greatest version time up to End (replication.md rule 3)
	Seen           []wal.Seen // of other origins, up to End
	DiskBytes      int64      // size of the segment files, preallocation included
	Segments       int
}

// State returns the running values.
func (j *Journal) State() State {
	j.mu.Lock()
	defer j.mu.Unlock()
	s := stateOf(&j.in.at)
	s.Start, s.Durable, s.Segments = j.segments[0].head.From, j.durable, len(j.segments)
	s.DiskBytes = j.diskBytes()
	return s
}

// DiskBytes is that of State.
func (j *Journal) DiskBytes() int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.diskBytes()
}

func (j *Journal) diskBytes() (bytes int64) {
	for _, seg := range j.segments {
		bytes += max(seg.size, seg.off)
	}
	return bytes
}

func stateOf(t *tally) State {
	return State{
		End: t.to, Chain: t.chain, Txns: t.txns, Bytes: t.bytes,
		MaxVersionTime: t.maxVersion, Seen: slices.Clone(t.seen),
	}
}

// usable reports why nothing can be appended or synced, if so.
func (j *Journal) usable() error {
	if j.closed {
		return ErrClosed
	}
	return j.failed
}

// fail abandons the journal after a failed write or fsync. What the file holds beyond the last fsync is unknown from
// here on, and an fsync that is tried again may report success for data that the kernel has dropped.
func (j *Journal) fail(err error) error {
	if j.failed == nil {
		j.failed = fmt.Errorf("%w: close and open it again, then take what lies beyond %s once more: %w", ErrFailed, j.durable, err)
		j.o.Logger.Error("journal abandoned after a failed write", "file", j.seg.name, "lsn", j.durable.String(), "err", err)
		j.wake()
	}
	return j.failed
}

// AppendTxn appends a transaction of this journal's own origin; its coverage is (End, t.EndLSN]. A transaction at or
// below End is dropped: PostgreSQL sends it again after a restart. An error that is not ErrFailed leaves the journal
// as it was. t is not kept.
func (j *Journal) AppendTxn(t *wal.Txn) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.appendTxn(t); err != nil {
		return fmt.Errorf("append transaction %s to journal: %w", t.EndLSN, err)
	}
	return nil
}

func (j *Journal) appendTxn(t *wal.Txn) error {
	if err := j.usable(); err != nil {
		return err
	}
	if t.EndLSN <= j.in.at.to {
		return nil
	}
	e := &j.enc
	if err := e.measure(t, j.in.site); err != nil {
		return err
	}
	if err := j.makeRoom(e.size + len(e.core) + 1024); err != nil {
		return err
	}
	j.appendSchemas(e.used)
	size := e.size + len(e.core)
	j.in.chain.begin(j.in.at.chain, size)
	for i := 0; i < len(t.Changes); {
		n, bytes := e.run(i)
		var entries []byte
		j.buf, entries = e.appendChanges(j.buf, t, i, n, bytes)
		j.in.chain.h.Write(entries)
		if err := j.spill(); err != nil {
			return err
		}
		i += n
	}
	j.in.chain.h.Write(e.core)
	j.buf = e.appendTxn(j.buf, t, j.in.at.to)
	j.in.at.addTxn(t.EndLSN, j.in.chain.sum(), size, t.VersionTime, t.Seen)
	j.local = true
	j.unsealed++
	return j.grouped()
}

// AppendPosition records that the coverage reached to without a transaction: a keepalive. seen and at are informative.
// A position at or below End is dropped.
func (j *Journal) AppendPosition(to wal.LSN, seen []wal.Seen, at wal.Time) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.appendPosition(Position{From: j.in.at.to, To: to, Time: at, Seen: seen}); err != nil {
		return fmt.Errorf("append position %s to journal: %w", to, err)
	}
	return nil
}

func (j *Journal) appendPosition(p Position) error {
	if err := j.usable(); err != nil {
		return err
	}
	if p.To <= p.From {
		return nil
	}
	if err := checkSeen(p.Seen); err != nil {
		return err
	}
	if err := j.makeRoom(1024); err != nil {
		return err
	}
	j.buf = appendPosition(j.buf, p)
	j.in.at.to = p.To
	j.in.at.seen = mergeSeen(j.in.at.seen, p.Seen)
	return j.grouped()
}

// pos is the offset in the last segment where the next frame goes.
func (j *Journal) pos() int64 { return j.seg.off + int64(len(j.buf)) }

// appendSchemas appends the schema records of relations that the last segment lacks: each file is readable alone.
func (j *Journal) appendSchemas(used []*relationState) {
	for _, st := range used {
		if st.segID == j.seg.id {
			continue
		}
		off := j.pos()
		j.buf = append(j.buf, st.frame...)
		j.seg.schemas = append(j.seg.schemas, schemaAt{off, int(j.pos() - off)})
		st.segID = j.seg.id
	}
}

// grouped ends a group of records: a place where readers and recovery may stop.
func (j *Journal) grouped() error {
	j.seg.note(j.pos(), j.in.at)
	if len(j.buf) < flushBytes {
		return nil
	}
	return j.flush()
}

// spill writes the buffer in the middle of a large transaction. Readers do not see it yet.
func (j *Journal) spill() error {
	if len(j.buf) < flushBytes {
		return nil
	}
	return j.write()
}

// write hands the buffer to the file.
func (j *Journal) write() error {
	if len(j.buf) == 0 {
		return nil
	}
	n, err := j.seg.file.WriteAt(j.buf, j.seg.off)
	if err == nil && n < len(j.buf) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return j.fail(fmt.Errorf("write %s: %w", j.seg.name, err))
	}
	j.seg.off += int64(n)
	j.buf = j.buf[:0]
	if cap(j.buf) > 16*flushBytes { // a large transaction is no reason to keep its memory
		j.buf = nil
	}
	return nil
}

// flush writes the buffer and lets readers see it.
func (j *Journal) flush() error {
	if err := j.write(); err != nil {
		return err
	}
	if j.seg.limit != j.seg.off {
		j.seg.limit = j.seg.off
		j.wake()
	}
	return nil
}

// wake lets waiting readers look again.
func (j *Journal) wake() {
	if j.waiting {
		close(j.notify)
		j.notify, j.waiting = make(chan struct{}), false
	}
}

// Flush hands what was appended to the file, without fsync, and wakes the readers.
func (j *Journal) Flush() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.usable(); err != nil {
		return fmt.Errorf("flush journal: %w", err)
	}
	if err := j.flush(); err != nil {
		return fmt.Errorf("flush journal: %w", err)
	}
	return nil
}

// Sync makes everything durable that was appended before the call. Appends go on meanwhile; calls that come together
// share an fsync. After a failure it returns ErrFailed for ever.
func (j *Journal) Sync() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.sync(); err != nil {
		return fmt.Errorf("sync journal: %w", err)
	}
	return nil
}

func (j *Journal) sync() error {
	seg, pos := j.seg, j.pos()
	for {
		if err := j.usable(); err != nil {
			return err
		}
		if seg != j.seg || seg.synced >= pos { // a rotation or another call did it
			return nil
		}
		if !j.syncing {
			break
		}
		j.syncDone.Wait()
	}
	if j.local && j.unsealed > 0 && j.o.Now().Sub(j.sealedAt) >= sealEvery {
		j.appendSeal()
	}
	if err := j.flush(); err != nil {
		return err
	}
	off, end := j.seg.off, j.in.at.to
	if err := j.unlocked(j.seg.file.Sync); err != nil {
		return j.fail(fmt.Errorf("fsync %s: %w", seg.name, err))
	}
	if err := j.advance(off, end); err != nil {
		return err
	}
	if now := j.o.Now(); now.Sub(j.markedAt) >= markSyncEvery {
		j.markedAt = now
		if err := j.unlocked(j.mark.file.Sync); err != nil {
			return j.fail(fmt.Errorf("fsync mark: %w", err))
		}
	}
	return nil
}

// unlocked runs an fsync without the mutex. syncing keeps it alone: the kernel reports a write error to one fsync
// only, so a second one at the same time could succeed wrongly.
func (j *Journal) unlocked(sync func() error) error {
	j.syncing = true
	j.mu.Unlock()
	err := sync()
	j.mu.Lock()
	j.syncing = false
	j.syncDone.Broadcast()
	return err
}

// advance records that the last segment is durable up to off, which is the position end.
func (j *Journal) advance(off int64, end wal.LSN) error {
	before, beforeLSN := j.seg.synced, j.durable
	j.seg.synced, j.durable = off, end
	if err := j.writeMark(); err != nil {
		j.seg.synced, j.durable = before, beforeLSN
		return j.fail(err)
	}
	return nil
}

// writeMark writes the mark for the present durable position.
func (j *Journal) writeMark() error {
	return j.mark.write(mark{segment: j.seg.head.From, offset: j.seg.synced, end: j.durable})
}

// appendSeal appends a seal record.
func (j *Journal) appendSeal() {
	j.sealedAt, j.unsealed = j.o.Now(), 0
	j.buf = appendSeal(j.buf, &j.in.at, j.sealedAt)
}

// makeRoom begins a new segment when the present one has no room for need more bytes.
func (j *Journal) makeRoom(need int) error {
	// A segment that does not advance yet stays: the next one would have its name.
	if j.in.at.to == j.seg.head.From || j.pos()+int64(need) <= j.o.SegmentBytes {
		return nil
	}
	for j.syncing {
		j.syncDone.Wait()
	}
	if err := j.usable(); err != nil {
		return err
	}
	return j.rotate(j.nextHeader())
}

// rotate seals and syncs the last segment and begins the next one, with header h, at its end. When the new file cannot be made - a
// full disk - the journal stays as it was and the append may be tried again.
func (j *Journal) rotate(h Header) error {
	if j.unsealed > 0 {
		j.appendSeal()
	}
	if err := j.flush(); err != nil {
		return err
	}
	old := j.seg
	if err := old.file.Sync(); err != nil {
		return j.fail(fmt.Errorf("fsync %s: %w", old.name, err))
	}
	if err := j.advance(old.off, j.in.at.to); err != nil {
		return err
	}
	j.nextID++
	seg, err := createSegment(j.o.FS, j.dir, h, j.nextID, j.o.SegmentBytes)
	if _, ok := errors.AsType[*halfCreatedError](err); ok {
		return j.fail(err)
	}
	if err != nil {
		return err
	}
	old.closed, old.to = true, seg.head.From
	j.segments, j.seg = append(j.segments, seg), seg
	j.wake()
	if err := j.writeMark(); err != nil {
		return j.fail(err)
	}
	j.finish(old)
	return nil
}

// nextHeader is the header of a segment that begins at the end.
func (j *Journal) nextHeader() Header {
	h, at := j.seg.head, &j.in.at
	h.Previous, h.From = h.From, at.to
	h.Chain, h.Txns, h.Bytes, h.MaxVersionTime, h.Seen = at.chain, at.txns, at.bytes, at.maxVersion, at.seen
	return h
}

// finish cuts a closed segment to its real length and closes it. It is durable already; should the cut be lost, the
// never written tail stays, which readers know.
func (j *Journal) finish(old *segment) {
	err := old.file.Truncate(old.off)
	old.size = old.off
	if cerr := old.file.Close(); err == nil {
		err = cerr
	}
	old.file = nil
	if err != nil {
		j.o.Logger.Warn("journal file was not cut to its length", "file", old.name, "err", err)
	}
}

// Prune removes the files whose whole coverage lies at or below upTo. The last file always stays. Readers that are
// within a removed file read on to its end; then they get a PrunedError unless the next one is still there.
func (j *Journal) Prune(upTo wal.LSN) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return fmt.Errorf("prune journal: %w", ErrClosed)
	}
	removed := false
	// Oldest first: an interruption leaves no hole.
	for len(j.segments) > 1 && j.segments[0].to <= upTo {
		if err := j.o.FS.Remove(j.segments[0].name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("prune journal: %w", err)
		}
		j.segments[0] = nil
		j.segments = j.segments[1:]
		removed = true
	}
	if !removed {
		return nil
	}
	if err := j.o.FS.SyncDir(j.dir); err != nil {
		return fmt.Errorf("prune journal: %w", err)
	}
	return nil
}

// Oldest is the coverage of the oldest file; ok is false when it is the only one, which Prune never removes.
func (j *Journal) Oldest() (from, to wal.LSN, ok bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.segments) < 2 {
		return 0, 0, false
	}
	return j.segments[0].head.From, j.segments[0].to, true
}

// Close syncs and closes the journal; readers that wait get ErrClosed. After a failure it only closes, and returns
// ErrFailed. A second call does nothing.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for j.syncing {
		j.syncDone.Wait()
	}
	if j.closed {
		return nil
	}
	err := j.failed
	if err == nil {
		err = j.closeClean()
	}
	j.closed = true
	j.wake()
	j.syncDone.Broadcast()
	if rerr := j.release(); err == nil {
		err = rerr
	}
	if err != nil {
		return fmt.Errorf("close journal: %w", err)
	}
	return nil
}

// closeClean makes everything durable, the mark included.
func (j *Journal) closeClean() error {
	if j.unsealed > 0 {
		j.appendSeal()
	}
	if err := j.flush(); err != nil {
		return err
	}
	if j.seg.synced < j.seg.off {
		if err := j.seg.file.Sync(); err != nil {
			return j.fail(fmt.Errorf("fsync %s: %w", j.seg.name, err))
		}
		if err := j.advance(j.seg.off, j.in.at.to); err != nil {
			return err
		}
	}
	if err := j.mark.file.Sync(); err != nil {
		return j.fail(fmt.Errorf("fsync mark: %w", err))
	}
	return nil
}

// release closes the files and gives the lock back.
func (j *Journal) release() (err error) {
	if j.seg != nil && j.seg.file != nil {
		err = j.seg.file.Close()
	}
	if j.mark != nil {
		err = errors.Join(err, j.mark.file.Close())
	}
	return errors.Join(err, j.lock.Close())
}
