package link

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/link/linkpb"
	"github.com/duri-io/duri/wal"
)

// A Follow at the origin is four goroutines:
//
//	journal --pump--> network                        reads, cuts, compresses, and waits for the window
//	heartbeats -----> network                        one of both at a time
//	network --receiver--> requests --handler         the handler alone judges and decides when the stream ends
//
// The handler never sends, so it can end the stream while the sender hangs in a full connection: gRPC ends a Send or
// Recv that is under way when the handler returns.

type followStream = grpc.BidiStreamingServer[linkpb.FollowRequest, linkpb.FollowReply]

type followKey struct{ site, database string }

// follower is one stream to a peer.
type follower struct {
	key    followKey
	since  wal.Time
	window *window
	// supersede is closed, once, to end the stream in favour of a newer one; gone when the handler returns.
	supersede chan struct{}
	once      sync.Once
	gone      chan struct{}

	sending  sync.Mutex    // held while a message is sent
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
		Site: f.key.site, Database: f.key.database, Since: f.since,
		Ack: f.ack, Sent: f.sent, Underway: f.window.underway(), Heard: f.heard,
	}
}

// Follow serves the call of this name: it ships the journal of a database until one end ends the stream.
func (s *Server) Follow(stream followStream) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	in := &inbox{requests: make(chan *linkpb.FollowRequest), ended: make(chan error, 1)}
	s.wg.Go(func() { in.run(ctx, stream) })
	start, err := s.awaitStart(ctx, in)
	if err != nil {
		return err
	}
	site, version, db, err := s.open(ctx, start.GetHello(), start.GetDatabase())
	if err != nil {
		return err
	}
	j, err := db.Journal()
	if err != nil {
		return failure(ErrNotReady, err)
	}
	header, from, err := place(j, start)
	if err != nil {
		return err
	}
	f, err := s.enter(ctx, followKey{site, start.GetDatabase()}, min(s.c.Window, int64(min(start.GetWindowBytes(), 1<<62))))
	if err != nil {
		return err
	}
	defer s.leave(f)
	log := s.c.Logger.With("site", site, "database", start.GetDatabase())
	log.Info("peer follows", "lsn", from.String())
	welcome := &linkpb.Welcome{Version: version, Header: header.Marshal(), Start: uint64(from)}
	err = s.ship(ctx, stream, in, f, db, j, welcome)
	log.Info("peer no longer follows", "lsn", f.describe().Ack.Received.String(), "err", err)
	return err
}

// inbox receives from a stream for the handler.
type inbox struct {
	requests chan *linkpb.FollowRequest
	ended    chan error
}

func (in *inbox) run(ctx context.Context, stream followStream) {
	for {
		r, err := stream.Recv()
		if err != nil {
			in.ended <- err
			return
		}
		select {
		case in.requests <- r:
		case <-ctx.Done():
			return
		}
	}
}

// awaitStart waits for the first message.
func (s *Server) awaitStart(ctx context.Context, in *inbox) (*linkpb.Start, error) {
	timer := time.NewTimer(s.c.Silence)
	defer timer.Stop()
	select {
	case r := <-in.requests:
		if r.GetStart() == nil {
			return nil, refuse(ErrProtocol, "", "the first message of a stream does not say what to follow")
		}
		return r.GetStart(), nil
	case err := <-in.ended:
		return nil, err
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-s.stopping:
		return nil, s.stopped()
	case <-timer.C:
		return nil, s.silent()
	}
}

func (s *Server) silent() *Error {
	return refuse(ErrSilent, "", "nothing came from the caller for %s", s.c.Silence)
}

// place decides from where on to ship, and which header describes that history.
func place(j *journal.Journal, r *linkpb.Start) (h journal.Header, from wal.LSN, err error) {
	pos, end := wal.LSN(r.GetPosition()), j.End()
	have := r.GetIncarnation() != nil
	if ours := j.Header(); have && incarnation(r.GetIncarnation()) != ours.Incarnation {
		return h, 0, refuse(ErrIncarnation, "changes may be missing between the two: compare with `duri verify`, then re-join the site that asks",
			"the journal here is of incarnation %s, the copy of %s", ours.Incarnation, incarnation(r.GetIncarnation()))
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

// ship runs the stream after it was granted, as the handler.
func (s *Server) ship(ctx context.Context, stream followStream, in *inbox, f *follower, db Database, j *journal.Journal, w *linkpb.Welcome) error {
	reader, err := j.NewReader(wal.LSN(w.GetStart()))
	if err != nil {
		return readError(err)
	}
	reader.TrustChain() // the receiver verifies it
	pack, err := newPacker()
	if err != nil {
		return errors.Join(failure(ErrFailed, err), reader.Close())
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, 2)
	s.wg.Go(func() { failed <- pump(ctx, reader, pack, f, stream, w) })
	s.wg.Go(func() { failed <- s.beat(ctx, stream, f, j) })

	tick := time.NewTicker(s.c.Silence / 8)
	defer tick.Stop()
	last := time.Now()
	for {
		select {
		case r := <-in.requests:
			last = time.Now()
			if err := s.acknowledged(f, db, j, r.GetAck()); err != nil {
				return err
			}
		case err := <-in.ended:
			return err
		case err := <-failed:
			return err
		case <-f.supersede:
			return refuse(ErrSuperseded, "", "a newer stream of site %s took over", f.key.site)
		case <-s.stopping:
			return s.stopped()
		case <-tick.C:
			if time.Since(last) > s.c.Silence {
				return s.silent()
			}
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
	if news {
		db.Acknowledged(f.key.site, ack)
	}
	return nil
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
func pump(ctx context.Context, reader *journal.Reader, pack *packer, f *follower, stream followStream, w *linkpb.Welcome) error {
	defer func() { _ = reader.Close() }() // what it read is all that matters
	if err := f.send(stream, &linkpb.FollowReply{Message: &linkpb.FollowReply_Welcome{Welcome: w}}); err != nil {
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
			if err := f.send(stream, &linkpb.FollowReply{Message: &linkpb.FollowReply_Frames{Frames: m}}); err != nil {
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

// send is for one goroutine at a time, as gRPC wants it.
func (f *follower) send(stream followStream, m *linkpb.FollowReply) error {
	f.sending.Lock()
	defer f.sending.Unlock()
	return stream.Send(m)
}

// beat sends the heartbeats, after the welcome.
func (s *Server) beat(ctx context.Context, stream followStream, f *follower, j *journal.Journal) error {
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
			h := &linkpb.Heartbeat{End: uint64(j.End()), Durable: uint64(j.Durable()), Unfit: s.c.Unfit()}
			f.mu.Lock()
			h.Clock = f.echo.say(s.c.Now())
			f.mu.Unlock()
			if err := f.send(stream, &linkpb.FollowReply{Message: &linkpb.FollowReply_Heartbeat{Heartbeat: h}}); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
