package link

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/link/linkpb"
	"github.com/duri-io/duri/wal"
)

// A Follow at the origin is four goroutines:
//
//	journal --pump--> network         reads, cuts, compresses, and waits for the window
//	heartbeats -----> network         one of both at a time
//	network --> acknowledged          judges each acknowledgement and passes it on
//	handler                           decides when the stream ends
//
// The handler does not send before the end, so it can end the stream while the sender hangs in a full connection: closing that
// ends it.

// followKey is who follows what; origin is empty for the own journal.
type followKey struct{ site, database, origin string }

// follower is one stream to a peer.
type follower struct {
	key    followKey
	since  wal.Time
	window *window
	// supersede is closed, once, to end the stream in favour of a newer one; gone when nothing of it is left.
	supersede chan struct{}
	once      sync.Once
	gone      chan struct{}

	welcomed chan struct{} // closed when the welcome was sent

	mu    sync.Mutex // guards the rest
	ack   Ack
	sent  wal.LSN
	heard time.Time
	echo  echo
}

func (f *follower) describe() Follower {
	f.mu.Lock()
	defer f.mu.Unlock()
	return Follower{
		Site: f.key.site, Database: f.key.database, Origin: f.key.origin, Since: f.since,
		Ack: f.ack, Sent: f.sent, Underway: f.window.underway(), Heard: f.heard,
	}
}

// follow serves one connection of Follow: it ships the journal of a database until one end ends the stream. It returns at once.
func (s *Server) follow(conn *tls.Conn) {
	s.wg.Go(func() {
		defer func() { _ = conn.NetConn().Close() }() // the last word was said
		_ = conn.SetDeadline(time.Time{})             // it was that of the handshake
		w := newWire(conn)
		ctx, cancel := s.untilStop(context.Background())
		defer cancel()
		w.refuse(s.serve(ctx, cancel, w))
		_, _ = io.Copy(io.Discard, conn) // see wire.refuse
	})
}

// serve is one Follow, until it ends; then nothing that it started uses w any more. The error is its reason.
func (s *Server) serve(ctx context.Context, cancel context.CancelFunc, w *wire) error {
	start, err := s.awaitStart(ctx, w)
	if err != nil {
		return err
	}
	site, unknown := pki.PeerSite(w.conn.ConnectionState())
	site, version, db, err := s.openFor(site, unknown, start.GetHello(), start.GetDatabase())
	if err != nil {
		return err
	}
	origin := start.GetOrigin()
	var j *journal.Journal
	if origin == "" {
		j, err = db.Journal()
	} else {
		j, err = db.CopyOf(origin)
	}
	if err != nil {
		return failure(ErrNotReady, err)
	}
	header, from, err := place(j, start)
	if err != nil {
		return err
	}
	f, err := s.enter(ctx, followKey{site, start.GetDatabase(), origin}, min(s.c.Window, int64(min(start.GetWindowBytes(), 1<<62))))
	if err != nil {
		return err
	}
	defer s.leave(f)
	log := s.c.Logger.With("site", site, "database", start.GetDatabase())
	if origin != "" {
		log = log.With("origin", origin)
	}
	log.Info("peer follows", "lsn", from.String())
	welcome := &linkpb.Welcome{Version: version, Header: header.Marshal(), Start: uint64(from)}
	err = s.ship(ctx, cancel, w, f, db, j, welcome)
	log.Info("peer no longer follows", "lsn", f.describe().Ack.Received.String(), "err", err)
	return err
}

// awaitStart waits for the first message.
func (s *Server) awaitStart(ctx context.Context, w *wire) (*linkpb.Start, error) {
	_ = w.conn.SetReadDeadline(time.Now().Add(s.c.Silence))
	stop := context.AfterFunc(ctx, func() { _ = w.conn.SetReadDeadline(time.Now()) })
	r := &linkpb.FollowRequest{}
	err := w.recv(r)
	if !stop() {
		return nil, s.stopped()
	}
	_ = w.conn.SetReadDeadline(time.Time{})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, s.silent()
	case err != nil:
		return nil, err
	case r.GetStart() == nil:
		return nil, refuse(ErrProtocol, "", "the first message of a stream does not say what to follow")
	}
	return r.GetStart(), nil
}

func (s *Server) silent() *Error {
	return refuse(ErrSilent, "", "nothing came from the caller for %s", s.c.Silence)
}

// place decides from where on to ship, and which header describes that history.
func place(j *journal.Journal, r *linkpb.Start) (h journal.Header, from wal.LSN, err error) {
	pos, end := wal.LSN(r.GetPosition()), j.End()
	have := r.GetIncarnation() != nil
	if have {
		theirs, ours := incarnation(r.GetIncarnation()), j.Current()
		if i := slices.IndexFunc(ours.Turns, func(t journal.Turn) bool { return t.Incarnation == theirs }); i >= 0 {
			if ended := ours.Turns[i].End; pos > ended {
				return h, 0, refuse(ErrIncarnation, "the site that asks has transactions that this one lost: compare with `duri verify`, then re-join one of the two",
					"incarnation %s ended here at %s, the copy reaches to %s", theirs, ended, pos)
			}
		} else if theirs != ours.Incarnation {
			return h, 0, refuse(ErrIncarnation, "changes may be missing between the two: compare with `duri verify`, then re-join the site that asks",
				"the journal here is of incarnation %s, the copy of %s", ours.Incarnation, theirs)
		}
	}
	if pos > end {
		e := refuse(ErrAhead, "wait: what the origin has lost of its journal it decodes again; if it stays so, the origin was put back to an older state and must be re-joined",
			"the journal here ends at %s, the copy at %s", end, pos)
		e.Start, e.End = j.Start(), end
		return h, 0, e
	}
	if !have && pos == 0 {
		pos = j.Start()
	}
	if h, err = j.HeaderAt(pos); err != nil {
		return h, 0, readError(err)
	}
	if !have {
		pos = h.From // a copy begins where a file does
	}
	return h, pos, nil
}

// readError gives an error of reading the own journal the form that travels.
func readError(err error) *Error {
	var pruned *journal.PrunedError
	switch {
	case errors.As(err, &pruned):
		e := refuse(ErrPruned, "re-join the site that asks (docs/guide/runbook.md)",
			"the journal here begins at %s, position %s is no longer kept", pruned.Start, pruned.From)
		e.Start = pruned.Start
		return e
	case errors.Is(err, journal.ErrTurned):
		return refuse(ErrNotReady, "it goes on by itself", "the journal here goes on as another incarnation: ask again")
	case errors.Is(err, journal.ErrClosed), errors.Is(err, journal.ErrFailed):
		return refuse(ErrNotReady, "", "the journal here is closed at the moment: %v", err)
	}
	return refuse(ErrJournal, journalHint(err), "the journal here cannot be read: %v", err)
}

// journalHint is the advice in a journal's error.
func journalHint(err error) string {
	if corrupt, ok := errors.AsType[*journal.CorruptionError](err); ok {
		return corrupt.Hint
	}
	if _, ok := errors.AsType[*journal.UpgradeError](err); ok {
		return "upgrade duri at the site that cannot read it"
	}
	return hintOf(err)
}

func incarnation(i *linkpb.Incarnation) journal.Incarnation {
	return journal.Incarnation{
		SystemID: i.GetSystemId(), Timeline: i.GetTimeline(), Database: i.GetDatabase(), Slot: i.GetSlot(), CreatedLSN: wal.LSN(i.GetCreatedLsn()),
	}
}

// enter makes f the only stream of its site and database: an older one, whose end this site has perhaps not noticed
// yet, is ended first.
func (s *Server) enter(ctx context.Context, key followKey, limit int64) (*follower, error) {
	f := &follower{
		key: key, since: s.c.Now(), window: newWindow(limit), heard: time.Now(),
		supersede: make(chan struct{}), gone: make(chan struct{}), welcomed: make(chan struct{}),
	}
	for {
		s.mu.Lock()
		old := s.followers[key]
		if old == nil {
			s.followers[key] = f
			s.mu.Unlock()
			return f, nil
		}
		s.mu.Unlock()
		old.once.Do(func() { close(old.supersede) })
		select {
		case <-old.gone:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *Server) leave(f *follower) {
	s.mu.Lock()
	delete(s.followers, f.key)
	s.mu.Unlock()
	close(f.gone)
}

// ship runs the stream after it was granted, as the handler. cancel ends ctx.
func (s *Server) ship(ctx context.Context, cancel context.CancelFunc, w *wire, f *follower, db Database, j *journal.Journal, welcome *linkpb.Welcome) error {
	reader, err := j.NewReader(wal.LSN(welcome.GetStart()))
	if err != nil {
		return readError(err)
	}
	reader.TrustChain() // the receiver verifies it
	pack, err := newPacker()
	if err != nil {
		return errors.Join(failure(ErrFailed, err), reader.Close())
	}
	var parts sync.WaitGroup
	failed := make(chan error, 3)
	parts.Go(func() { failed <- pump(ctx, reader, pack, f, w, welcome) })
	parts.Go(func() { failed <- s.beat(ctx, w, f, db, j) })
	parts.Go(func() { failed <- s.listen(w, f, db, j) })
	err = s.watchOver(ctx, f, failed)
	cancel()
	_ = w.conn.SetReadDeadline(time.Now()) // what hangs in the connection ends; a write that is cut short would be the last one
	_ = w.conn.SetWriteDeadline(time.Now().Add(lastWordMax))
	parts.Wait()
	return err
}

// watchOver waits for the reason to end a stream.
func (s *Server) watchOver(ctx context.Context, f *follower, failed <-chan error) error {
	tick := time.NewTicker(s.c.Silence / 8)
	defer tick.Stop()
	for {
		select {
		case err := <-failed:
			if ctx.Err() != nil {
				return s.stopped()
			}
			return err
		case <-f.supersede:
			return refuse(ErrSuperseded, "", "a newer stream of site %s took over", f.key.site)
		case <-ctx.Done():
			return s.stopped()
		case <-tick.C:
			f.mu.Lock()
			quiet := time.Since(f.heard)
			f.mu.Unlock()
			if quiet > s.c.Silence {
				return s.silent()
			}
		}
	}
}

// listen takes the acknowledgements.
func (s *Server) listen(w *wire, f *follower, db Database, j *journal.Journal) error {
	for {
		r := &linkpb.FollowRequest{}
		if err := w.recv(r); err != nil {
			return err
		}
		if err := s.acknowledged(f, db, j, r.GetAck()); err != nil {
			return err
		}
	}
}

// acknowledged takes an acknowledgement, after judging it: an acknowledgement of what does not exist would make this
// site release commits that nobody holds.
func (s *Server) acknowledged(f *follower, db Database, j *journal.Journal, a *linkpb.Ack) error {
	if a == nil {
		return refuse(ErrProtocol, "", "a message of the stream is not an acknowledgement")
	}
	ack := Ack{wal.LSN(a.GetReceived()), wal.LSN(a.GetDurable()), wal.LSN(a.GetApplied()), a.GetEpoch()}
	if end := j.End(); ack.Received > end || ack.Durable > ack.Received {
		return refuse(ErrProtocol, "", "site %s acknowledges received %s and durable %s, the journal ends at %s", f.key.site, ack.Received, ack.Durable, end)
	}
	if !f.window.take(int64(min(a.GetTakenBytes(), 1<<62))) {
		return refuse(ErrProtocol, "", "site %s acknowledges %d bytes of frames, which does not fit what it was sent", f.key.site, a.GetTakenBytes())
	}
	now := s.c.Now()
	f.mu.Lock()
	news := ack != f.ack
	f.ack, f.heard = ack, time.Now()
	x, ok := f.echo.hear(a.GetClock(), now)
	f.mu.Unlock()
	if ok {
		s.clockSample(f.key.site, x)
	}
	if f.key.origin != "" { // of a copy: no receipt for anybody
		return nil
	}
	if news {
		db.Acknowledged(f.key.site, ack)
	}
	if st := a.GetStatement(); st != nil {
		db.Stated(f.key.site, statement(st))
	}
	return nil
}

func statement(m *linkpb.Statement) Statement {
	s := Statement{Epoch: m.GetEpoch(), Frozen: m.GetFrozen(), Armed: m.GetArmed(), Secured: m.GetSecured(), Copies: map[string]wal.LSN{}}
	for _, c := range m.GetCopies() {
		s.Copies[c.GetSite()] = wal.LSN(c.GetDurable())
	}
	return s
}

func (s *Server) clockSample(site string, x exchange) {
	c, ok := x.sample()
	if !ok {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clocks[site] == nil {
		s.clocks[site] = &estimator{}
	}
	s.clocks[site].add(c)
}

// pump sends the welcome, then reads the journal into messages and sends them. It owns the reader.
func pump(ctx context.Context, reader *journal.Reader, pack *packer, f *follower, w *wire, welcome *linkpb.Welcome) error {
	defer func() { _ = reader.Close() }() // what it read is all that matters
	if err := w.send(&linkpb.FollowReply{Message: &linkpb.FollowReply_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	close(f.welcomed)
	size := chunkFor(f.window.limit)
	for {
		fr, err := reader.NextFrames(ctx, size)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return readError(err)
		}
		for data := fr.Data; len(data) > 0; {
			chunk := data[:min(len(data), size)]
			data = data[len(chunk):]
			m := &linkpb.Frames{From: uint64(fr.From), To: uint64(fr.To), More: len(data) > 0}
			m.Data, m.Zstd = pack.pack(chunk)
			if err := f.window.reserve(ctx, int64(len(m.Data))); err != nil {
				return err
			}
			if err := w.send(&linkpb.FollowReply{Message: &linkpb.FollowReply_Frames{Frames: m}}); err != nil {
				return err
			}
			if !m.GetMore() {
				f.mu.Lock()
				f.sent = wal.LSN(m.GetTo())
				f.mu.Unlock()
			}
		}
	}
}

// beat sends the heartbeats, after the welcome.
func (s *Server) beat(ctx context.Context, w *wire, f *follower, db Database, j *journal.Journal) error {
	select {
	case <-f.welcomed:
	case <-ctx.Done():
		return ctx.Err()
	}
	beat := time.NewTicker(s.c.Heartbeat)
	defer beat.Stop()
	for {
		select {
		case <-beat.C:
			h := &linkpb.Heartbeat{Unfit: s.c.Unfit(), Uncaptured: db.Uncaptured()}
			h.End, h.Durable = uint64(j.End()), uint64(j.Durable()) // after that: they hold what is captured
			f.mu.Lock()
			h.Clock = f.echo.say(s.c.Now())
			f.mu.Unlock()
			if err := w.send(&linkpb.FollowReply{Message: &linkpb.FollowReply_Heartbeat{Heartbeat: h}}); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
