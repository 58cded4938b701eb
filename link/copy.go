package link

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/wal"
)

// CopyConfig says where a copy of a peer's journal is kept. Dir is required.
type CopyConfig struct {
	Dir     string
	Journal journal.Options
	// From is the position from which on the journal is needed when there is no copy yet (a site that joined with the
	// contents as of From); zero: everything that the origin keeps.
	From wal.LSN
	// Prompt: commits wait for the receipts.
	Prompt bool
	Logger *slog.Logger // default none
}

// CopyWriter keeps a copy of a peer's journal: it is the Sink to Follow with. Records are handed to the file as they
// come. With CopyConfig.Prompt they are fsynced then, and what comes meanwhile goes with the next; else one goroutine
// fsyncs: as soon as one fsync has ended, the next takes all that came meanwhile.
//
// Methods may be called at any time, except that Close must come after Follow has returned.
type CopyWriter struct {
	c       CopyConfig
	created chan struct{}
	acks    chan struct{}
	kick    chan struct{} // has a value when something is to be fsynced
	closing chan struct{}
	wg      sync.WaitGroup

	ackMu  sync.Mutex // held while positions are read, before mu
	frozen *wal.LSN   // guarded by ackMu: the greatest durable position that is acknowledged

	mu      sync.Mutex // guards the rest; never held during I/O
	j       *journal.Journal
	applied wal.LSN
	err     error // sticky: held, or the journal failed
	stuck   error // what came last could not be written, and is tried again: a full disk
	beat    Heartbeat
	beatAt  time.Time
	deaf    time.Duration // as the latest heartbeat says, see Heartbeat.Heard
	closed  bool
}

var _ Sink = (*CopyWriter)(nil)

// OpenCopy opens the copy in c.Dir; when there is none, Welcome will create it. The caller closes it.
func OpenCopy(c CopyConfig) (*CopyWriter, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	w := &CopyWriter{
		c: c, created: make(chan struct{}), acks: make(chan struct{}, 1), kick: make(chan struct{}, 1), closing: make(chan struct{}),
	}
	j, err := journal.Open(c.Dir, c.Journal)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return w, nil
	case err != nil:
		return nil, err
	}
	w.adopt(j)
	return w, nil
}

// adopt takes the journal into use.
func (w *CopyWriter) adopt(j *journal.Journal) {
	w.mu.Lock()
	w.j = j
	w.mu.Unlock()
	close(w.created)
	w.wg.Go(func() { w.syncLoop(j) })
}

// Journal is the copy. The error says that there is none yet; Created tells when.
func (w *CopyWriter) Journal() (*journal.Journal, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.j == nil {
		return nil, &Error{Kind: ErrNotReady, Sentence: "there is no copy of the origin's journal yet: it begins with the first connection"}
	}
	return w.j, nil
}

// Created is closed as soon as there is a copy.
func (w *CopyWriter) Created() <-chan struct{} { return w.created }

// Err is why the copy takes nothing any more: a HoldError, or the journal's own failure; nil as long as it does.
func (w *CopyWriter) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Stuck is why what came last could not be written, though it is tried again: a full disk. nil: it was.
func (w *CopyWriter) Stuck() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stuck
}

// fail keeps the first error.
func (w *CopyWriter) fail(err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
		w.c.Logger.Error("copy of a journal takes nothing any more", "dir", w.c.Dir, "err", err, "hint", hintOf(err))
	}
	return w.err
}

// Position is that of Sink.
func (w *CopyWriter) Position() (inc journal.Incarnation, have bool, end wal.LSN) {
	j, err := w.Journal()
	if err != nil {
		return inc, false, w.c.From
	}
	return j.Current().Incarnation, true, j.End()
}

// Welcome is that of Sink: it creates the copy, lets it go on as the next incarnation, or refuses another history than the
// copy's.
func (w *CopyWriter) Welcome(h journal.Header) error {
	if err := w.Err(); err != nil {
		return err
	}
	if j, err := w.Journal(); err == nil {
		return w.checkHistory(j, h)
	}
	j, err := journal.Create(w.c.Dir, h, w.c.Journal)
	if err != nil {
		return fmt.Errorf("create a copy of the journal %s: %w", h, err)
	}
	w.adopt(j)
	return nil
}

func (w *CopyWriter) checkHistory(j *journal.Journal, h journal.Header) error {
	ours := j.Current()
	if ours.Cluster == h.Cluster && ours.Site == h.Site && ours.Incarnation == h.Incarnation {
		return nil
	}
	sentence := fmt.Sprintf("the copy is of %s, the journal offered of %s", ours, h)
	if h.Continues(ours) { // after a fail-over at the origin (docs/adr/0008)
		var refused *journal.TurnError
		err := j.Follow(h)
		if err == nil {
			w.c.Logger.Info("the origin's journal goes on as another incarnation", "incarnation", h.Incarnation.String(), "lsn", h.From.String())
			return nil
		}
		if !errors.As(err, &refused) {
			return err
		}
		sentence = refused.Error()
	}
	return w.fail(&HoldError{
		Dir: w.c.Dir, At: j.End(), Advice: "see that the address and the directory belong to the same site; a site with a new history must be re-joined",
		Err: &Error{Kind: ErrIncarnation, Sentence: sentence},
	})
}

// Frames is that of Sink. An error that time may heal, such as a full disk, leaves the copy usable.
func (w *CopyWriter) Frames(data []byte, from, to wal.LSN) error {
	if err := w.Err(); err != nil {
		return err
	}
	j, err := w.Journal()
	if err != nil {
		return err
	}
	err = j.AppendFrames(data)
	// What came before a refused record is good, and is kept.
	if ferr := j.Flush(); err == nil {
		err = ferr
	}
	if err == nil && w.c.Prompt {
		if err := j.Sync(); err != nil {
			return w.fail(err)
		}
	} else {
		w.signal(w.kick)
		w.signal(w.acks)
	}
	w.mu.Lock()
	w.stuck = err
	w.mu.Unlock()
	if err != nil {
		return w.judge(j, err)
	}
	return nil
}

// judge decides which errors of an append hold the direction.
func (w *CopyWriter) judge(j *journal.Journal, err error) error {
	advice := ""
	var format *journal.FormatError
	var upgrade *journal.UpgradeError
	switch {
	case errors.Is(err, journal.ErrChain):
		advice = "the two copies hold different transactions: run `duri journal verify` at both sites, then re-join the one that is wrong"
	case errors.Is(err, journal.ErrGap):
		advice = "changes are missing between the copy and what was sent: re-join this site, or take the range from another peer"
	case errors.As(err, &upgrade):
		advice = "upgrade duri at this site, then start it again"
	case errors.As(err, &format):
		advice = "run `duri journal verify` at the origin; if its journal is sound, re-join this site"
	case errors.Is(err, journal.ErrFailed):
		return w.fail(err)
	default:
		return err
	}
	return w.fail(&HoldError{Dir: w.c.Dir, At: j.End(), Advice: advice, Err: err})
}

// syncLoop makes durable what came, for as long as the copy is open.
func (w *CopyWriter) syncLoop(j *journal.Journal) {
	for {
		select {
		case <-w.kick:
		case <-w.closing:
			return
		}
		if err := j.Sync(); err != nil {
			if !errors.Is(err, journal.ErrClosed) {
				_ = w.fail(err)
			}
			return
		}
		w.signal(w.acks)
	}
}

func (w *CopyWriter) signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// SetApplied tells how far the copy's transactions are visible in the tables here.
func (w *CopyWriter) SetApplied(lsn wal.LSN) {
	w.mu.Lock()
	w.applied = lsn
	w.mu.Unlock()
	w.signal(w.acks)
}

// Freeze keeps the durable position that is acknowledged from going further, and tells it: no receipt beyond it has been
// given, or will be (durability.md section 5). What comes is written as before. Freezing again changes nothing.
func (w *CopyWriter) Freeze() wal.LSN {
	w.ackMu.Lock()
	defer w.ackMu.Unlock()
	if w.frozen == nil {
		at := wal.LSN(0)
		if j, err := w.Journal(); err == nil {
			at = j.Durable()
		}
		w.frozen = &at
	}
	return *w.frozen
}

// Thaw ends Freeze.
func (w *CopyWriter) Thaw() {
	w.ackMu.Lock()
	w.frozen = nil
	w.ackMu.Unlock()
	w.signal(w.acks)
}

// Ack is that of Sink.
func (w *CopyWriter) Ack() Ack {
	w.ackMu.Lock()
	defer w.ackMu.Unlock()
	w.mu.Lock()
	j, a := w.j, Ack{Applied: w.applied}
	w.mu.Unlock()
	if j != nil {
		a.Durable = j.Durable() // first, so that it is not beyond Received
		a.Received = j.End()
	}
	if w.frozen != nil {
		a.Durable = min(a.Durable, *w.frozen)
	}
	return a
}

// Acks is that of Sink.
func (w *CopyWriter) Acks() <-chan struct{} { return w.acks }

// Heartbeat is that of Sink: it keeps the latest for Heard.
func (w *CopyWriter) Heartbeat(h Heartbeat) {
	w.mu.Lock()
	defer w.mu.Unlock()
	// By the origin's clock, which may step: what two heartbeats say is so.
	deaf := h.Heard
	h.Heard = min(h.Heard, w.deaf)
	w.beat, w.beatAt, w.deaf = h, time.Now(), deaf
}

// Heard is the origin's latest heartbeat and when it came, the zero time when none did.
func (w *CopyWriter) Heard() (Heartbeat, time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.beat, w.beatAt
}

// Close makes the copy durable and closes it. A second call does nothing.
func (w *CopyWriter) Close() error {
	w.mu.Lock()
	closed, j := w.closed, w.j
	w.closed = true
	w.mu.Unlock()
	if closed {
		return nil
	}
	close(w.closing)
	w.wg.Wait()
	if j == nil {
		return nil
	}
	return j.Close()
}
