package link

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/link/linkpb"
	"github.com/duri-io/duri/wal"
)

const (
	// ackPause is the shortest pause between acknowledgements that only say "received" or "applied". A durable position
	// that moved is told at once: commits wait for it.
	ackPause = 20 * time.Millisecond
	// takenStep is how many bytes taken off the queue are told without waiting for ackPause.
	takenStep = 1 << 20
)

// Follow asks the peer for its journal of database from sink's position on and feeds sink until the stream breaks, sink
// fails or ctx is done; it never returns nil. It is one attempt: Retry tells whether another makes sense. All that it
// started has ended when it returns.
func (c *Client) Follow(ctx context.Context, database string, sink Sink) error {
	return c.follow(ctx, database, "", sink)
}

// FollowCopy is Follow of the peer's copy of origin's journal, which is the same, record by record, as far as it reaches.
// What sink acknowledges is no receipt for anybody, and the heartbeats are the peer's, not origin's: see
// CopyWriter.Relayed.
func (c *Client) FollowCopy(ctx context.Context, database, origin string, sink Sink) error {
	return c.follow(ctx, database, origin, sink)
}

func (c *Client) follow(ctx context.Context, database, origin string, sink Sink) error {
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	unpack, err := newUnpacker()
	if err != nil {
		return err
	}
	defer unpack.close()
	inc, have, end := sink.Position()
	start := &linkpb.Start{Hello: c.hello(), Database: database, Position: uint64(end), WindowBytes: uint64(c.c.Window), Origin: origin}
	if have {
		start.Incarnation = &linkpb.Incarnation{
			SystemId: inc.SystemID, Timeline: inc.Timeline, Database: inc.Database, Slot: inc.Slot, CreatedLsn: uint64(inc.CreatedLSN),
		}
	}
	w, err := c.dialFollow(ctx)
	if err != nil {
		return c.broken(ctx, err)
	}
	hangUp := func() { _ = w.conn.NetConn().Close() } // without TLS's last word: it might have to wait
	defer hangUp()
	defer context.AfterFunc(c.closed, hangUp)()
	f := &following{
		c: c, sink: sink, wire: w, unpack: unpack, have: have, end: end,
		queue: newQueue(c.c.Window), step: make(chan struct{}, 1), lastHeard: time.Now(), statement: noStatement, database: database,
	}
	if origin == "" {
		f.statement = c.c.Statement
	}
	// Should sending fail, receiving tells why.
	_ = w.send(&linkpb.FollowRequest{Message: &linkpb.FollowRequest_Start{Start: start}})
	return f.run(ctx, inner, cancel)
}

// following is a Follow under way: one goroutine receives, one feeds the sink, one acknowledges, and the caller's
// watches over the silence.
type following struct {
	c      *Client
	sink   Sink
	wire   *wire
	unpack *unpacker
	have   bool    // there was a copy
	end    wal.LSN // of it
	queue  *queue
	step   chan struct{} // has a value when much was taken off the queue

	database  string
	statement func(database string) *Statement // what to say with the acknowledgements

	telling sync.Mutex // held while it is acknowledged; guards told
	told    told

	mu        sync.Mutex // guards the rest
	lastHeard time.Time
	echo      echo
	taken     int64
}

// run ends with the first error of the parts.
func (f *following) run(ctx, inner context.Context, cancel context.CancelFunc) error {
	var wg sync.WaitGroup
	failed := make(chan error, 3)
	wg.Go(func() { failed <- f.receive(inner, &wg, failed) })
	err := f.watch(ctx, failed)
	cancel()
	_ = f.wire.conn.NetConn().Close() // what sends or receives ends
	wg.Wait()
	return err
}

// watch waits for the first error, and makes one of silence.
func (f *following) watch(ctx context.Context, failed <-chan error) error {
	tick := time.NewTicker(f.c.c.Silence / 8)
	defer tick.Stop()
	for {
		select {
		case err := <-failed:
			if mine, ok := errors.AsType[*ownError](err); ok {
				return mine.error
			}
			return f.c.broken(ctx, err)
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
			f.mu.Lock()
			quiet := time.Since(f.lastHeard)
			f.mu.Unlock()
			if quiet > f.c.c.Silence {
				return &Error{
					Kind: ErrSilent, Peer: f.c.c.Peer, Sentence: "link is silent for " + f.c.c.Silence.String(),
					Hint: "see whether the site and the network to it are up",
				}
			}
		}
	}
}

// receive takes everything off the network as it comes, so that heartbeats are never late because the sink is. After
// the welcome it starts the other two parts.
func (f *following) receive(ctx context.Context, wg *sync.WaitGroup, failed chan<- error) error {
	m, err := f.recv()
	if err != nil {
		return err
	}
	if r := m.GetRefusal(); r != nil {
		return fromRefusal(r, f.c.c.Peer)
	}
	w := m.GetWelcome()
	if w == nil {
		return f.c.broke("the stream does not begin with a welcome")
	}
	header, err := journal.ParseHeader(w.GetHeader())
	if err != nil {
		return f.c.broke("header of the journal: %v", err)
	}
	if v := w.GetVersion(); v < f.c.c.Versions.Min || v > f.c.c.Versions.Max {
		return f.c.broke("the peer chose protocol version %d, which was not offered", v)
	}
	from := wal.LSN(w.GetStart())
	if f.have && from != f.end || !f.have && from != header.From {
		return f.c.broke("the journal would come from %s, which was not asked for", from)
	}
	if err := f.sink.Welcome(header); err != nil {
		return own(err)
	}
	wg.Go(func() { failed <- f.feed(ctx, from) })
	wg.Go(func() { failed <- f.acknowledge(ctx) })
	for {
		if m, err = f.recv(); err != nil {
			return err
		}
		switch m := m.GetMessage().(type) {
		case *linkpb.FollowReply_Frames:
			if !f.queue.put(m.Frames) {
				return f.c.broke("more than %d bytes are under way", f.c.c.Window)
			}
		case *linkpb.FollowReply_Heartbeat:
			f.heartbeat(m.Heartbeat)
		case *linkpb.FollowReply_Refusal:
			return fromRefusal(m.Refusal, f.c.c.Peer)
		case nil: // of a newer peer; it counts as a sign of life
		default:
			return f.c.broke("a message that does not belong here")
		}
	}
}

func (f *following) recv() (*linkpb.FollowReply, error) {
	m := &linkpb.FollowReply{}
	if err := f.wire.recv(m); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.lastHeard = time.Now()
	f.mu.Unlock()
	return m, nil
}

func (f *following) heartbeat(m *linkpb.Heartbeat) {
	now := f.c.c.Now()
	f.mu.Lock()
	x, ok := f.echo.hear(m.GetClock(), now)
	f.mu.Unlock()
	if ok {
		f.c.clockSample(x)
	}
	h := Heartbeat{Sent: wal.Time(m.GetClock().GetSent()), End: wal.LSN(m.GetEnd()), Durable: wal.LSN(m.GetDurable()), Unfit: m.GetUnfit(), Uncaptured: m.GetUncaptured()}
	if at := wal.Time(m.GetClock().GetEchoReceived()); at != 0 {
		h.Heard = max(h.Sent.Sub(at), 0)
	}
	h.Clock, _ = f.c.Clock()
	f.sink.Heartbeat(h)
}

// feed gives the sink whole records, as many together as have come.
func (f *following) feed(ctx context.Context, from wal.LSN) error {
	var buf []byte
	to := from // end of what buf holds
	untold := 0
	for {
		m, err := f.queue.get(ctx)
		if err != nil {
			return err
		}
		if buf, err = f.unpack.unpack(buf, m.GetData(), m.GetZstd()); err != nil {
			return f.c.broke("frames after %s: %v", to, err)
		}
		if wal.LSN(m.GetFrom()) != to || m.GetTo() < m.GetFrom() {
			return f.c.broke("frames from %s to %s where those after %s belong", wal.LSN(m.GetFrom()), wal.LSN(m.GetTo()), to)
		}
		untold += len(m.GetData())
		if m.GetMore() { // the window may be smaller than the transaction: what is in buf counts as taken
			f.took(untold)
			untold = 0
			continue
		}
		to = wal.LSN(m.GetTo())
		if len(buf) < chunkBytes && f.queue.more() {
			continue
		}
		if err := f.sink.Frames(buf, from, to); err != nil {
			return own(err)
		}
		f.took(untold)
		if _, err := f.tell(); err != nil { // at once: a commit may wait for it
			<-ctx.Done() // receive is told why, see acknowledge
			return ctx.Err()
		}
		from, untold = to, 0
		if buf = buf[:0]; cap(buf) > 4*chunkBytes { // a large transaction is no reason to keep its memory
			buf = nil
		}
	}
}

// took counts n bytes as taken.
func (f *following) took(n int) {
	f.queue.done(int64(n))
	f.mu.Lock()
	before := f.taken
	f.taken += int64(n)
	crossed := before/takenStep != f.taken/takenStep
	f.mu.Unlock()
	if crossed {
		select {
		case f.step <- struct{}{}:
		default:
		}
	}
}

// told is what the last acknowledgement said.
type told struct {
	ack       Ack
	statement *Statement
	taken     int64
	at        time.Time
}

// due decides how long an acknowledgement of the present state has to wait: 0 is now, and never longer than beat after
// the last one.
func (t told) due(now told, beat time.Duration) time.Duration {
	since := now.at.Sub(t.at)
	switch {
	case t.at.IsZero(), now.ack.Durable != t.ack.Durable, now.ack.Epoch != t.ack.Epoch, now.statement != t.statement, now.taken-t.taken >= takenStep:
		return 0
	case now.ack != t.ack, now.taken != t.taken:
		return max(ackPause-since, 0)
	}
	return max(beat-since, 0)
}

// acknowledge tells what is not told as soon as the sink has taken frames.
func (f *following) acknowledge(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		wait, err := f.tell()
		if err != nil {
			// The connection has ended, and receive is told why: its error must be the first.
			<-ctx.Done()
			return ctx.Err()
		}
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-f.sink.Acks():
		case <-f.step:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// tell acknowledges the present state if that is due, and says after what time it is to be looked at again.
func (f *following) tell() (wait time.Duration, err error) {
	f.telling.Lock()
	defer f.telling.Unlock()
	now := told{at: time.Now(), statement: f.statement(f.database)}
	for { // a receipt belongs to one epoch
		epoch := f.c.c.Epoch() // before the positions: a change in between makes them count less
		now.ack = f.sink.Ack()
		now.ack.Epoch = epoch
		if f.c.c.Epoch() == epoch {
			break
		}
	}
	f.mu.Lock()
	now.taken = f.taken
	wait = f.told.due(now, f.c.c.Heartbeat)
	clock := f.echo.say(f.c.c.Now())
	f.mu.Unlock()
	if wait > 0 {
		return wait, nil
	}
	news := now.statement != f.told.statement
	f.told = now
	a := &linkpb.Ack{
		Received: uint64(now.ack.Received), Durable: uint64(now.ack.Durable), Applied: uint64(now.ack.Applied),
		TakenBytes: uint64(now.taken), Epoch: now.ack.Epoch, Clock: clock,
	}
	if s := now.statement; news && s != nil {
		a.Statement = &linkpb.Statement{Epoch: s.Epoch, Frozen: s.Frozen, Armed: s.Armed, Secured: s.Secured}
		for site, lsn := range s.Copies {
			a.Statement.Copies = append(a.Statement.Copies, &linkpb.CopyPosition{Site: site, Durable: uint64(lsn)})
		}
	}
	return f.c.c.Heartbeat, f.wire.send(&linkpb.FollowRequest{Message: &linkpb.FollowRequest_Ack{Ack: a}})
}

// own marks an error as this site's, which must not be taken for one of the connection.
func own(err error) error { return &ownError{err} }

type ownError struct{ error }

func (e *ownError) Unwrap() error { return e.error }

// queue holds the frames between network and sink.
type queue struct {
	limit int64

	mu    sync.Mutex // guards the rest
	bytes int64      // in the queue, or taken off and not yet done
	list  []*linkpb.Frames
	ready chan struct{} // has a value when list may not be empty
}

func newQueue(limit int64) *queue { return &queue{limit: limit, ready: make(chan struct{}, 1)} }

// put appends; false when the peer sent more than it may.
func (q *queue) put(m *linkpb.Frames) bool {
	q.mu.Lock()
	ok := fits(q.bytes, int64(len(m.GetData())), q.limit)
	if ok {
		q.bytes += int64(len(m.GetData()))
		q.list = append(q.list, m)
	}
	q.mu.Unlock()
	select {
	case q.ready <- struct{}{}:
	default:
	}
	return ok
}

// get waits for the first.
func (q *queue) get(ctx context.Context) (*linkpb.Frames, error) {
	for {
		q.mu.Lock()
		if len(q.list) > 0 {
			m := q.list[0]
			q.list[0] = nil
			q.list = q.list[1:]
			q.mu.Unlock()
			return m, nil
		}
		q.mu.Unlock()
		select {
		case <-q.ready:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// more reports whether get would not wait.
func (q *queue) more() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.list) > 0
}

// done frees the place of n bytes.
func (q *queue) done(n int64) {
	q.mu.Lock()
	q.bytes -= n
	q.mu.Unlock()
}
