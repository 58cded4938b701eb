package gateway

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// A gateway is restarted without its clients' noticing: a new process gets the listening sockets, and then one client's connection
// after the other, each with its session, when that is between two transactions.
//
// Each connection belongs to one process at a time. It is the old one's until it has sent msgYours, which it does when the new one
// has said that it could go on (msgAdopted); the new one does nothing with it before that has come. So whatever breaks, there are
// never two owners: when the new process dies, the old one keeps all that it has not given away; when the old one dies between the two, the
// client's connection ends.

// welcome is what the new process has to know before it begins.
type welcome struct {
	NextPID  uint32   `json:"next_pid"`
	Mock     []byte   `json:"mock"` // the secret of verifiers for users that do not exist: who asks twice gets the same answer
	Paused   []string `json:"paused"`
	Disabled []string `json:"disabled"`
	Sessions int      `json:"sessions"`
	PID      int      `json:"pid"` // of the old process
}

// progress is what is left at the old process.
type progress struct {
	Left int            `json:"left"`
	Why  map[string]int `json:"why"` // what they wait for
}

// pidsAhead is how far the pids of new sessions are from those that the old process may still give.
const pidsAhead = 1 << 20

// handing is a hand-over under way, in the old process.
type handing struct {
	g      *Server
	ch     *channel
	broken chan struct{} // closed with the channel

	mu      sync.Mutex // guards the rest
	waiting map[uint64]chan string
	cause   error // why it is broken
	moved   int
	mayEnd  chan struct{} // closed when the new process lets this one end; nil: this one does not ask
}

// HandOver are options of the old process.
type HandOver struct {
	// Listeners are paused while the new process accepts, and go on when it breaks off. The first one is for clients.
	Listeners []*Listener
	// Drain bounds how long it is waited for sessions that cannot be handed over now.
	Drain time.Duration
	// Ready bounds how long the new process may take to begin (30 s).
	Ready time.Duration
	// Stay, if there is more that ends with this process than its clients, lets HandOver return only when the new process says that
	// it can do without, whose Takeover must have Leave then. It is called when all is handed over, or the time is over, and with
	// false when the takeover breaks after that. It must not block.
	Stay func(stays bool)
}

const (
	readyMax = 30 * time.Second
	// adoptMax is how long the new process may take to take a client. It has its memory to look into only.
	adoptMax = 10 * time.Second
	// greetMax is how long it is waited for connections that have not logged in.
	greetMax = 5 * time.Second
	// leftEvery is how often it is looked who is left: nobody, if that is so three times, because a connection that was accepted in the last
	// moment may not be counted yet. progressEvery is how often it is told.
	leftEvery     = 20 * time.Millisecond
	progressEvery = 500 * time.Millisecond
)

// errHanding refuses a second one.
var errHanding = errors.New("another takeover is under way")

// HandOver hands listeners and sessions to the process at the other end of c, which it closes. With nil, all is done, or the time is
// over: who is still there is to be ended with this process. An error says why the takeover broke; then this process goes on with
// all that it still has. Sessions that cannot be handed over are asked to leave with 57P01 when they are outside a transaction.
func (g *Server) HandOver(ctx context.Context, c *net.UnixConn, o HandOver) error {
	h := &handing{g: g, ch: &channel{c: c}, broken: make(chan struct{}), waiting: map[uint64]chan string{}}
	if o.Stay != nil {
		h.mayEnd = make(chan struct{})
	}
	if err := g.beginHanding(h); err != nil {
		return errors.Join(err, c.Close())
	}
	defer g.endHanding(h)
	if o.Ready == 0 {
		o.Ready = readyMax
	}
	if err := h.greet(ctx, o); err != nil {
		return err
	}
	accept := func(yes bool) {
		for _, l := range o.Listeners {
			l.set(!yes)
		}
	}
	accept(false)
	err := h.run(ctx, o)
	if err != nil {
		accept(true)
	}
	return err
}

func (g *Server) beginHanding(h *handing) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	err := g.mayHandOver()
	if err == nil {
		g.preparing = h
	}
	return err
}

// MayHandOver says why HandOver would be refused now; nil: it would not.
func (g *Server) MayHandOver() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.mayHandOver()
}

// mayHandOver is MayHandOver. g.mu is held.
func (g *Server) mayHandOver() error {
	if t := g.taking.Load(); t != nil && !t.over() {
		return fmt.Errorf("%w: this gateway still takes clients over itself", errHanding)
	}
	if g.preparing != nil {
		return errHanding
	}
	return nil
}

func (g *Server) endHanding(h *handing) {
	g.handing.CompareAndSwap(h, nil)
	_ = h.ch.c.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.preparing = nil
}

// greet sends the listeners, and waits until the new process could accept. Nothing has changed here yet.
func (h *handing) greet(ctx context.Context, o HandOver) error {
	g := h.g
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	g.mu.Lock()
	g.lives = append(g.lives, w) // It ends with this process.
	m := welcome{
		NextPID: (g.nextPID+pidsAhead)%(1<<31-1) + 1, Mock: g.mock, Paused: slices.Sorted(maps.Keys(g.paused)), Disabled: slices.Sorted(maps.Keys(g.disabled)),
		Sessions: len(g.clients), PID: os.Getpid(),
	}
	g.mu.Unlock()
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var send func(rest []*Listener, fds []int) error
	send = func(rest []*Listener, fds []int) error {
		if len(rest) > 0 {
			return withFD(rest[0].socket, func(fd int) error { return send(rest[1:], append(fds, fd)) })
		}
		return withFD(r, func(fd int) error { return h.ch.send(msgWelcome, body, append(fds, fd)...) })
	}
	if err := send(o.Listeners, nil); err != nil {
		return fmt.Errorf("hand the listeners over: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = h.ch.c.Close() })
	defer stop()
	if err := h.ch.c.SetReadDeadline(time.Now().Add(o.Ready)); err != nil {
		return err
	}
	kind, _, fds, err := h.ch.receive()
	closeAll(fds)
	if err == nil && kind != msgReady {
		err = fmt.Errorf("a message of kind %q came", kind)
	}
	if err != nil {
		return fmt.Errorf("wait until the new process is ready: %w", err)
	}
	return h.ch.c.SetReadDeadline(time.Time{})
}

// run hands sessions over until none is left.
func (h *handing) run(ctx context.Context, o HandOver) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() { _ = h.ch.c.Close() }()
	if err := h.ch.send(msgGo, nil); err != nil {
		return fmt.Errorf("tell the new process to accept: %w", err)
	}
	wg.Go(func() { h.listen(ctx) })
	h.g.handing.Store(h)
	h.g.beckonAll()
	begun := time.Now()
	told := begun
	tick := time.NewTicker(leftEvery)
	defer tick.Stop()
	for empty := 0; ; {
		clients, strangers := h.g.here()
		now := time.Now()
		if now.Sub(begun) > greetMax {
			strangers = 0
		}
		if empty++; clients+strangers > 0 {
			empty = 0
		}
		switch {
		case empty > 2, now.Sub(begun) >= o.Drain, ctx.Err() != nil:
			h.g.cfg.Log.Info("clients were handed over", "sessions", h.movedSoFar(), "left", clients, "after", now.Sub(begun).Round(time.Millisecond))
			err := h.tell(clients)
			if err == nil {
				err = h.ch.send(msgDone, nil)
			}
			if err != nil {
				return fmt.Errorf("tell the new process that all is done: %w", err)
			}
			return h.stay(ctx, o.Stay)
		case now.Sub(told) >= progressEvery:
			told = now
			h.g.tidy(now.Add(-progressEvery)) // The new process needs connections of its own.
			if err := h.tell(clients); err != nil {
				h.breakOff(err)
			}
		}
		select {
		case <-tick.C:
		case <-h.broken:
			return h.goOn(clients)
		}
	}
}

// goOn says why the takeover broke.
func (h *handing) goOn(left int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.g.cfg.Log.Warn("a takeover broke: this process goes on with the clients that it still has", "error", h.cause, "handed_over", h.moved, "left", left)
	return h.cause
}

// stay waits until the new process lets this one end, if it is to; sessions are handed over still.
func (h *handing) stay(ctx context.Context, tell func(stays bool)) error {
	if h.mayEnd == nil {
		return nil
	}
	tell(true)
	select {
	case <-h.mayEnd:
	case <-ctx.Done():
	case <-h.broken:
	}
	err := h.ch.send(msgEnds, nil)
	if err == nil {
		return nil
	}
	h.breakOff(fmt.Errorf("tell the new process that this one ends: %w", err))
	tell(false)
	clients, _ := h.g.here()
	return h.goOn(clients)
}

// tell tells the new process what is left.
func (h *handing) tell(clients int) error {
	body, err := json.Marshal(progress{clients, h.g.waitsFor()})
	if err != nil {
		return err
	}
	return h.ch.send(msgProgress, body)
}

// here tells how many clients there are, and connections that have not logged in.
func (g *Server) here() (clients, strangers int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.clients), g.strangers.Len()
}

// waitsFor tells what the sessions that are left do.
func (g *Server) waitsFor() map[string]int {
	why := map[string]int{}
	for _, s := range g.sessionsNow() {
		s.mu.Lock()
		w := s.keepsFor()
		if w == "" {
			w = "a transaction is under way"
		}
		s.mu.Unlock()
		why[w]++
	}
	return why
}

func (h *handing) movedSoFar() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.moved
}

// breakOff ends the hand-over.
func (h *handing) breakOff(cause error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.cause == nil {
		h.cause = cause
		h.g.handing.CompareAndSwap(h, nil)
		_ = h.ch.c.Close()
		close(h.broken)
	}
}

// listen hears what the new process says until the channel ends.
func (h *handing) listen(ctx context.Context) {
	var cancels sync.WaitGroup
	defer cancels.Wait()
	for {
		kind, body, fds, err := h.ch.receive()
		closeAll(fds)
		if err == nil {
			err = h.hear(ctx, &cancels, kind, body)
		}
		if err != nil {
			h.breakOff(fmt.Errorf("the new process: %w", err))
			return
		}
	}
}

func (h *handing) hear(ctx context.Context, cancels *sync.WaitGroup, kind byte, body []byte) error {
	switch kind {
	case msgAdopted, msgRefused:
		id, why, err := number(body)
		if err != nil {
			return err
		}
		h.mu.Lock()
		answer := h.waiting[id]
		delete(h.waiting, id)
		h.mu.Unlock()
		if answer == nil {
			return fmt.Errorf("an answer for session %d, which was not handed over", id)
		}
		if kind == msgRefused && len(why) == 0 {
			why = []byte("it did not say why")
		}
		answer <- string(why)
	case msgMayEnd:
		return h.letEnd()
	case msgCancel:
		if len(body) < 4 {
			return errors.New("a request to cancel without a pid")
		}
		start := &pgwire.Startup{Kind: pgwire.StartupCancel, PID: binary.BigEndian.Uint32(body), Secret: body[4:]}
		cancels.Go(func() {
			ctx, stop := context.WithTimeout(ctx, h.g.cfg.LoginMax)
			defer stop()
			h.g.cancel(ctx, start)
		})
	case msgPaused:
		var names []string
		if err := json.Unmarshal(body, &names); err != nil {
			return err
		}
		h.g.setAllPaused(names)
	default:
		return fmt.Errorf("a message of kind %q came", kind)
	}
	return nil
}

// letEnd takes the new process's word that this one may end. It is called by listen only.
func (h *handing) letEnd() error {
	if h.mayEnd == nil {
		return errors.New("it lets this process end, which does not wait for that")
	}
	select {
	case <-h.mayEnd:
		return errors.New("it lets this process end a second time")
	default:
		close(h.mayEnd)
		return nil
	}
}

// setAllPaused pauses these databases, and no others.
func (g *Server) setAllPaused(names []string) {
	g.mu.Lock()
	now := slices.Collect(maps.Keys(g.paused))
	g.mu.Unlock()
	for _, name := range names {
		g.setPaused(name, true)
	}
	for _, name := range now {
		if !slices.Contains(names, name) {
			g.setPaused(name, false)
		}
	}
}

// pass hands a session and its client's connection over. moved: it is the other process's, and nothing more may be done with it here.
// Else it is as it was; why says what the other process has against it.
func (h *handing) pass(ctx context.Context, p *passed, c *net.TCPConn) (moved bool, why string) {
	body := p.encode()
	defer clear(body)
	if len(body) > passedMax {
		return false, "what it has prepared is too much to be handed over"
	}
	answer := make(chan string, 1)
	h.mu.Lock()
	h.waiting[p.id] = answer
	h.mu.Unlock()
	err := withFD(c, func(fd int) error { return h.ch.send(msgClient, body, fd) })
	if err != nil {
		h.breakOff(err)
		return false, ""
	}
	timeout := time.NewTimer(adoptMax)
	defer timeout.Stop()
	select {
	case why := <-answer:
		if why != "" {
			return false, "the new process cannot take it: " + why
		}
	case <-h.broken:
		return false, ""
	case <-ctx.Done(): // This process ends it. The new one does not learn that it is its own, and drops it.
		return false, ""
	case <-timeout.C:
		h.breakOff(fmt.Errorf("the new process did not take a client within %v", adoptMax))
		return false, ""
	}
	if err := h.ch.sendNumber(msgYours, p.id); err != nil {
		h.breakOff(err) // It has not got it, and never will.
		return false, ""
	}
	h.mu.Lock()
	h.moved++
	h.mu.Unlock()
	return true, ""
}

// moveOut hands the session to the process that takes the gateway over; errMoved: it has it.
func (s *session) moveOut(ctx context.Context) error {
	h := s.g.handing.Load()
	c, ok := s.conn.(*net.TCPConn)
	if h == nil || !ok {
		return nil
	}
	s.mu.Lock()
	p := s.passed()
	s.mu.Unlock()
	moved, why := h.pass(ctx, p, c)
	p.keys.Zero()
	if moved {
		return errMoved
	}
	s.fixed, s.fixedFor = why, h
	return nil
}
