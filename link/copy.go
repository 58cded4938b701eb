package link

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
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
	once    sync.Once // closes created
	acks    chan struct{}
	kick    chan struct{} // has a value when something is to be fsynced
	wg      sync.WaitGroup

	ackMu  sync.Mutex // held while positions are read, before mu
	frozen *wal.LSN   // guarded by ackMu: the greatest durable position that is acknowledged

	mu      sync.Mutex // guards the rest; never held during I/O
	j       *journal.Journal
	from    wal.LSN       // CopyConfig.From, or that of BeginAnew
	closing chan struct{} // closed to end syncLoop
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
	w := &CopyWriter{c: c, from: c.From, created: make(chan struct{}), acks: make(chan struct{}, 1), kick: make(chan struct{}, 1)}
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
	closing := make(chan struct{})
	w.mu.Lock()
	w.j, w.closing = j, closing
	w.mu.Unlock()
	w.once.Do(func() { close(w.created) })
	w.wg.Go(func() { w.syncLoop(j, closing) })
}

// BeginAnew removes the copy, because what the origin still has does not join on to it: the next Follow makes a new one, which
// begins at from. It must not be called while a Follow is under way; readers of the copy end with journal.ErrClosed.
func (w *CopyWriter) BeginAnew(from wal.LSN) error {
	if err := w.shut(); err != nil && !errors.Is(err, journal.ErrFailed) {
		return fmt.Errorf("begin a copy anew: %w", err)
	}
	if err := os.RemoveAll(w.c.Dir); err != nil {
		return fmt.Errorf("begin a copy anew: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.from, w.err, w.stuck = from, nil, nil
	return nil
}

// shut closes the journal, if there is one.
func (w *CopyWriter) shut() error {
	w.mu.Lock()
	j, closing := w.j, w.closing
	w.j = nil
	w.mu.Unlock()
	if j == nil {
		return nil
	}
	close(closing)
	w.wg.Wait()
	return j.Close()
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

// Created is closed as soon as there is a copy for the first time.
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
	w.mu.Lock()
	j, from := w.j, w.from
	w.mu.Unlock()
	if j == nil {
		return inc, false, from
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
func (w *CopyWriter) syncLoop(j *journal.Journal, closing <-chan struct{}) {
	for {
		select {
		case <-w.kick:
		case <-closing:
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

// Nudge lets what there is to say go with an acknowledgement at once.
func (w *CopyWriter) Nudge() { w.signal(w.acks) }

// ErrCaughtUp ends a Relayed Sink that has what it was made for.
var ErrCaughtUp = errors.New("link: the copy has what was asked for")

// Relayed is the Sink for taking the journal of site, up to a position at least, from a third site's copy of it
// (Client.FollowCopy): heartbeats are no signs of life of the origin, and another history is refused without holding the
// direction, as it may be the third site that is wrong. It must not be used while w itself is.
func (w *CopyWriter) Relayed(site wal.SiteID, until wal.LSN) Sink { return relayed{w, site, until} }

type relayed struct {
	*CopyWriter
	site  wal.SiteID
	until wal.LSN
}

// Welcome is that of Sink.
func (r relayed) Welcome(h journal.Header) error {
	ours := h
	if j, err := r.Journal(); err == nil {
		if ours = j.Current(); h.Site == r.site && h.Continues(ours) {
			if err := j.Follow(h); err == nil {
				return nil
			}
		}
	}
	if h.Site != r.site || ours.Cluster != h.Cluster || ours.Incarnation != h.Incarnation {
		return &Error{Kind: ErrIncarnation, Sentence: fmt.Sprintf("the copy is of %s, what a third site has is %s", ours, h)}
	}
	return r.CopyWriter.Welcome(h)
}

// Frames is that of Sink; ErrCaughtUp when nothing more is wanted.
func (r relayed) Frames(data []byte, from, to wal.LSN) error {
	err := r.CopyWriter.Frames(data, from, to)
	if err == nil && to >= r.until {
		return ErrCaughtUp
	}
	return err
}

// Heartbeat is that of Sink.
func (relayed) Heartbeat(Heartbeat) {}

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
	closing := w.closing
	w.closed = true
	w.mu.Unlock()
	if closed || j == nil {
		return nil
	}
	close(closing)
	w.wg.Wait()
	return j.Close()
}
