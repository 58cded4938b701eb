package link

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/wal"
)

// allFrames reads a journal's frames in pieces of about max bytes.
func allFrames(t *testing.T, j *journal.Journal, max int) []journal.Frames {
	t.Helper()
	r, err := j.NewReader(j.Start())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var list []journal.Frames
	for at := j.Start(); at < j.End(); {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		f, err := r.NextFrames(ctx, max)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		list, at = append(list, f), f.To
	}
	return list
}

func expectHeld(t *testing.T, cp *CopyWriter, err, cause error, h journal.Header) {
	t.Helper()
	var hold *HoldError
	if !errors.Is(err, ErrHeld) || !errors.As(err, &hold) || cause != nil && !errors.Is(err, cause) {
		t.Fatalf("got %v, want the direction to be held for %v", err, cause)
	}
	if hold.HintText() == "" || Retry(err) {
		t.Errorf("hint %q, Retry %t", hold.HintText(), Retry(err))
	}
	if j, jerr := cp.Journal(); jerr == nil && hold.At != j.End() {
		t.Errorf("held after %s, the copy ends at %s", hold.At, j.End())
	}
	if err := cp.Welcome(h); !errors.Is(err, ErrHeld) {
		t.Errorf("the next attempt: %v, want it held too", err)
	}
	if !errors.Is(cp.Err(), ErrHeld) {
		t.Errorf("Err is %v", cp.Err())
	}
}

func TestCopyHoldsTheDirection(t *testing.T) {
	var upgrade *journal.UpgradeError
	var format *journal.FormatError
	cases := []struct {
		name string
		feed func(t *testing.T, cp *CopyWriter, f []journal.Frames) error
		is   func(error) bool
	}{
		{"damaged bytes", func(t *testing.T, cp *CopyWriter, f []journal.Frames) error {
			f[1].Data[len(f[1].Data)/2] ^= 1
			return cp.Frames(f[1].Data, f[1].From, f[1].To)
		}, func(err error) bool { return errors.As(err, &format) }},
		{"cut off", func(t *testing.T, cp *CopyWriter, f []journal.Frames) error {
			return cp.Frames(f[1].Data[:len(f[1].Data)-1], f[1].From, f[1].To)
		}, func(err error) bool { return errors.As(err, &format) }},
		{"a hole", func(t *testing.T, cp *CopyWriter, f []journal.Frames) error {
			return cp.Frames(f[2].Data, f[2].From, f[2].To)
		}, func(err error) bool { return errors.Is(err, journal.ErrGap) }},
		{"another history of the same name", func(t *testing.T, cp *CopyWriter, f []journal.Frames) error {
			other := newJournal(t, header(), journal.Options{SegmentBytes: 10 << 10}) // small files: seals
			newHistory(other, 99).fill(t, 400)
			for _, x := range allFrames(t, other, 1<<20) {
				if err := cp.Frames(x.Data, x.From, x.To); err != nil {
					return err
				}
			}
			return nil
		}, func(err error) bool { return errors.Is(err, journal.ErrChain) || errors.Is(err, journal.ErrGap) }},
		{"a record of the future", func(t *testing.T, cp *CopyWriter, f []journal.Frames) error {
			h := header()
			h.From = f[1].From
			b := h.Marshal()
			return cp.Frames(b, f[1].From, f[1].To) // a header has no place in a stream
		}, func(err error) bool { return errors.As(err, &format) || errors.As(err, &upgrade) }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			j := newJournal(t, header(), journal.Options{})
			newHistory(j, 1).fill(t, 60)
			f := allFrames(t, j, 1<<10)
			if len(f) < 3 {
				t.Fatalf("only %d pieces", len(f))
			}
			cp := openCopy(t, t.TempDir())
			if err := cp.Welcome(j.Header()); err != nil {
				t.Fatal(err)
			}
			if err := cp.Frames(f[0].Data, f[0].From, f[0].To); err != nil {
				t.Fatal(err)
			}
			err := c.feed(t, cp, f)
			if !c.is(err) {
				t.Errorf("cause of %v", err)
			}
			expectHeld(t, cp, err, nil, j.Header())
			waitFor(t, "what was good to be durable", func() bool { a := cp.Ack(); return a.Received >= f[0].To && a.Durable == a.Received })
			if err := cp.Frames(f[1].Data, f[1].From, f[1].To); !errors.Is(err, ErrHeld) {
				t.Errorf("good frames after that: %v, want them held", err)
			}
		})
	}
}

func TestCopyRefusesAnotherHistory(t *testing.T) {
	for name, change := range map[string]func(*journal.Header){
		"incarnation": func(h *journal.Header) { h.Timeline++ },
		"site":        func(h *journal.Header) { h.Site++ },
		"cluster":     func(h *journal.Header) { h.Cluster = "beef" },
	} {
		t.Run(name, func(t *testing.T) {
			cp := openCopy(t, t.TempDir())
			if err := cp.Welcome(header()); err != nil {
				t.Fatal(err)
			}
			if err := cp.Welcome(header()); err != nil {
				t.Errorf("the same history again: %v", err)
			}
			h := header()
			change(&h)
			expectHeld(t, cp, cp.Welcome(h), ErrIncarnation, header())
		})
	}
}

func TestHeldDirectionEndsFollowEachTime(t *testing.T) {
	w := newWorld(t, nil)
	newHistory(w.db.j, 1).fill(t, 50)
	cp, cl := openCopy(t, t.TempDir()), w.client(nil)
	h := header()
	h.Site = 9 // the directory was used for another site before
	if err := cp.Welcome(h); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		err := follow(t, cl, cp).wait(t)
		if !errors.Is(err, ErrHeld) || Retry(err) || !strings.Contains(err.Error(), "direction held after 0/1000") {
			t.Errorf("got %v", err)
		}
	}
}

func TestCopyLivesOnAfterReopening(t *testing.T) {
	dir := t.TempDir()
	cp, err := OpenCopy(CopyConfig{Dir: dir, From: 77})
	if err != nil {
		t.Fatal(err)
	}
	if _, have, end := cp.Position(); have || end != 77 {
		t.Errorf("without a copy: %t, %s; want the position that is needed", have, end)
	}
	if _, err := cp.Journal(); !errors.Is(err, ErrNotReady) {
		t.Errorf("Journal: %v", err)
	}
	if a := cp.Ack(); a != (Ack{}) {
		t.Errorf("Ack: %+v", a)
	}
	if err := cp.Frames(nil, 0, 1); !errors.Is(err, ErrNotReady) {
		t.Errorf("Frames before Welcome: %v", err)
	}
	j := newJournal(t, header(), journal.Options{})
	newHistory(j, 1).fill(t, 60)
	if err := cp.Welcome(j.Header()); err != nil {
		t.Fatal(err)
	}
	for _, f := range allFrames(t, j, 4<<10) {
		if err := cp.Frames(f.Data, f.From, f.To); err != nil {
			t.Fatal(err)
		}
	}
	<-cp.Acks()
	cp.SetApplied(wal.LSN(5))
	if err := errors.Join(cp.Close(), cp.Close()); err != nil {
		t.Fatal(err)
	}
	if cp, err = OpenCopy(CopyConfig{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	defer cp.Close()
	<-cp.Created()
	inc, have, end := cp.Position()
	if !have || inc != header().Incarnation || end != j.End() || cp.Ack().Durable != end {
		t.Errorf("after reopening: %t, %s, %s, %+v", have, inc, end, cp.Ack())
	}
	if _, err := OpenCopy(CopyConfig{Dir: dir}); !errors.Is(err, journal.ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	expectEqual(t, j, cp)
}

// badDisk fails fsyncs on demand.
type badDisk struct {
	journal.OSFS
	bad  chan struct{} // closed: fsync fails
	full atomic.Bool   // a new file finds no room
}

type badFile struct {
	journal.File
	d *badDisk
}

func (d *badDisk) Open(name string, create bool) (journal.File, error) {
	f, err := d.OSFS.Open(name, create)
	if err != nil {
		return nil, err
	}
	return badFile{f, d}, nil
}

func (f badFile) Allocate(size int64) error {
	if f.d.full.Load() {
		return syscall.ENOSPC
	}
	return f.File.Allocate(size)
}

var errDisk = errors.New("input/output error")

func (f badFile) Sync() error {
	select {
	case <-f.d.bad:
		return errDisk
	default:
		return f.File.Sync()
	}
}

func TestFailedFsyncGivesNoReceipt(t *testing.T) {
	w := newWorld(t, nil)
	h := newHistory(w.db.j, 1)
	h.fill(t, 10)
	disk := &badDisk{bad: make(chan struct{})}
	cp, err := OpenCopy(CopyConfig{Dir: t.TempDir(), Journal: journal.Options{FS: disk}})
	if err != nil {
		t.Fatal(err)
	}
	defer cp.Close()
	f := follow(t, w.client(nil), cp)
	good := w.db.j.End()
	waitFor(t, "the good part to be acknowledged", func() bool { return w.db.last("busan").Durable == good })
	close(disk.bad)
	h.fill(t, 5)
	waitFor(t, "the failure", func() bool { return cp.Err() != nil })
	h.fill(t, 5)
	if err := f.wait(t); !errors.Is(err, journal.ErrFailed) || !errors.Is(err, errDisk) || Retry(err) {
		t.Errorf("Follow ended with %v, want the failed journal", err)
	}
	if a := w.db.last("busan"); a.Durable != good {
		t.Errorf("acknowledged %+v, want durable to stay at %s", a, good)
	}
}

// TestFullDiskIsTold: what came last is not taken and not acknowledged, the copy says why for as long as that lasts, and it
// comes again.
func TestFullDiskIsTold(t *testing.T) {
	w := newWorld(t, nil)
	h := newHistory(w.db.j, 1)
	disk := &badDisk{bad: make(chan struct{})}
	cp, err := OpenCopy(CopyConfig{Dir: t.TempDir(), Journal: journal.Options{FS: disk, SegmentBytes: 4 << 10}})
	if err != nil {
		t.Fatal(err)
	}
	defer cp.Close()
	f := follow(t, w.client(nil), cp)
	h.fill(t, 10)
	waitFor(t, "the good part to be acknowledged", func() bool { return w.db.last("busan").Durable == w.db.j.End() })
	disk.full.Store(true)
	h.fill(t, 50)
	waitFor(t, "the full disk to be told", func() bool { return errors.Is(cp.Stuck(), syscall.ENOSPC) })
	if err := f.wait(t); !errors.Is(err, syscall.ENOSPC) || !Retry(err) || cp.Err() != nil {
		t.Errorf("Follow ended with %v, Err is %v", err, cp.Err())
	}
	if d := w.db.last("busan").Durable; d == w.db.j.End() {
		t.Errorf("%s is acknowledged", d)
	}
	disk.full.Store(false)
	f = follow(t, w.client(nil), cp)
	waitFor(t, "the rest to be acknowledged", func() bool { return w.db.last("busan").Durable == w.db.j.End() && cp.Stuck() == nil })
	f.cancel()
	expectEqual(t, w.db.j, cp)
}

// TestFrozenCopyGivesNoFurtherReceipt: what comes is kept, and its receipt is given only after the thaw; receipts carry the
// epoch.
func TestFrozenCopyGivesNoFurtherReceipt(t *testing.T) {
	w := newWorld(t, nil)
	h := newHistory(w.db.j, 1)
	h.fill(t, 10)
	cp, err := OpenCopy(CopyConfig{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer cp.Close()
	var epoch atomic.Uint64
	epoch.Store(7)
	follow(t, w.client(func(c *ClientConfig) { c.Epoch = epoch.Load }), cp)
	waitFor(t, "a receipt", func() bool { a := w.db.last("busan"); return a.Durable == w.db.j.End() && a.Epoch == 7 })
	at := cp.Freeze()
	if at != w.db.j.End() {
		t.Errorf("frozen at %s, the journal ends at %s", at, w.db.j.End())
	}
	h.fill(t, 10)
	waitFor(t, "what came after the freeze", func() bool { return w.db.last("busan").Received == w.db.j.End() })
	if j, err := cp.Journal(); err != nil || j.Sync() != nil {
		t.Fatal("the copy cannot be fsynced", err)
	}
	epoch.Store(8)
	waitFor(t, "the new epoch", func() bool { return w.db.last("busan").Epoch == 8 })
	if a := w.db.last("busan"); a.Durable != at || cp.Freeze() != at {
		t.Errorf("acknowledged %+v while frozen at %s", a, at)
	}
	cp.Thaw()
	waitFor(t, "the receipt after the thaw", func() bool { return w.db.last("busan").Durable == w.db.j.End() })
}

// TestCopyFollowsTheOriginToItsNextIncarnation: the stream ends where the journal turns, and the next one goes on; a copy that
// has more than the origin had is refused.
func TestCopyFollowsTheOriginToItsNextIncarnation(t *testing.T) {
	w := newWorld(t, nil)
	h := newHistory(w.db.j, 1)
	h.fill(t, 100)
	cp, cl := openCopy(t, t.TempDir()), w.client(nil)
	f := follow(t, cl, cp)
	ended := w.db.j.End()
	waitFor(t, "the copy to have it", func() bool { return w.db.last("busan").Durable == ended })
	next := header().Incarnation
	next.Timeline, next.CreatedLSN = 2, ended+100
	if err := w.db.j.Turn(next, ended-50); err != nil {
		t.Fatal(err)
	}
	h.at += 1000
	h.fill(t, 50)
	if err := f.wait(t); !Retry(err) || !errors.Is(err, ErrNotReady) {
		t.Errorf("the stream ended with %v", err)
	}
	f = follow(t, cl, cp)
	end := w.db.j.End()
	waitFor(t, "the copy to go on", func() bool { return w.db.last("busan").Durable == end })
	if inc, _, _ := cp.Position(); inc != next {
		t.Errorf("the copy is of %s, want %s", inc, next)
	}
	_ = f.stop(t)
	expectEqual(t, w.db.j, cp)

	ahead := fakeSink{inc: header().Incarnation, have: true, end: ended + 8}
	if err := follow(t, cl, &ahead).wait(t); !errors.Is(err, ErrIncarnation) || Retry(err) || !strings.Contains(err.Error(), "ended here at") {
		t.Errorf("a copy with more than was there: %v", err)
	}
}
