package gateway

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// Takeover is a hand-over under way, in the new process.
type Takeover struct {
	// Listeners are those of the old process, in its order. They are paused until it accepts no more.
	Listeners []*Listener
	// Leave, for a process that has HandOver.Stay, is called when that one has handed over all that it will, or its time is over. When
	// it returns, the old process may end. Its context ends with the takeover. It is to be set before Run.
	Leave func(ctx context.Context)

	ch      *channel
	welcome welcome
	life    *os.File // is at its end when the old process has ended
	dead    bool     // it was seen there; of whoever calls Run and AwaitEnd

	telling sync.Mutex // held while the old process is told what is paused

	mu      sync.Mutex // guards the rest
	adopted map[uint64]chan bool
	left    progress
	ended   bool
	alone   bool          // the old process has ended, or will not go on
	broken  chan struct{} // closed when no msgYours will come any more
	taken   int
}

// TakeOver begins to take a gateway over from the process at the other end of c, which is closed with the Takeover.
func TakeOver(c *net.UnixConn) (*Takeover, error) {
	t := &Takeover{ch: &channel{c: c}, adopted: map[uint64]chan bool{}, broken: make(chan struct{})}
	if err := c.SetReadDeadline(time.Now().Add(sendMax)); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	kind, body, fds, err := t.ch.receive()
	if err == nil {
		err = t.begin(kind, body, fds)
	}
	if err == nil {
		err = c.SetReadDeadline(time.Time{})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("take the listeners over: %w", err), t.Close())
	}
	t.left.Left = t.welcome.Sessions
	return t, nil
}

// begin takes what came with the welcome.
func (t *Takeover) begin(kind byte, body []byte, fds []int) error {
	if kind != msgWelcome || len(fds) < 2 {
		closeAll(fds)
		return fmt.Errorf("a message of kind %q with %d descriptors came", kind, len(fds))
	}
	last := len(fds) - 1
	if err := syscall.SetNonblock(fds[last], true); err != nil {
		closeAll(fds)
		return err
	}
	t.life = os.NewFile(uintptr(fds[last]), "life of the old process")
	for i, fd := range fds[:last] {
		l, err := listenerOf(fd)
		if err != nil {
			closeAll(fds[i+1 : last])
			return err
		}
		t.Listeners = append(t.Listeners, l)
	}
	return json.Unmarshal(body, &t.welcome)
}

// PID is the old process's, as that one sees it; 0: it has not told.
func (t *Takeover) PID() int { return t.welcome.PID }

// Close gives up, unless Run has been called. The old process goes on.
func (t *Takeover) Close() error {
	err := t.ch.c.Close()
	for _, l := range t.Listeners {
		err = errors.Join(err, l.Close())
	}
	if t.life != nil {
		err = errors.Join(err, t.life.Close())
	}
	return err
}

// Prepare gives a Server that has served nobody yet what it has to know of the old one.
func (t *Takeover) Prepare(g *Server) {
	for _, name := range t.welcome.Paused {
		g.setPaused(name, true)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.nextPID = max(g.nextPID, t.welcome.NextPID)
	if len(t.welcome.Mock) > 0 {
		g.mock = t.welcome.Mock
	}
	for _, name := range t.welcome.Disabled {
		g.disabled[name] = true
	}
	g.taking.Store(t)
}

// errTakenBack means that the old process goes on in the place of this one.
var errTakenBack = errors.New("the old process has taken the gateway back")

// deadMax is how long the end of the old process is waited for when the conversation with it has ended.
const deadMax = 2 * time.Second

// Run takes over: from its call on Accept of Listeners gives clients, those that come and those of the old process. It returns when
// the old process has nothing more to give, and with Leave when that one is about to end, or has. After an error the old process goes on,
// and this one must end.
func (t *Takeover) Run(ctx context.Context, g *Server) error {
	stop := context.AfterFunc(ctx, func() { _ = t.ch.c.Close() })
	defer stop()
	defer t.end()
	var leaving sync.WaitGroup
	defer leaving.Wait()
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	accepts, done := false, false
	err := t.ch.send(msgReady, nil)
	for err == nil && !done {
		var kind byte
		var body []byte
		var fds []int
		if kind, body, fds, err = t.ch.receive(); err != nil {
			break
		}
		switch kind {
		case msgGo:
			accepts = true
			for _, l := range t.Listeners {
				l.Resume()
			}
			g.cfg.Log.Info("clients are taken over", "sessions", t.welcome.Sessions)
		case msgDone:
			if done = t.Leave == nil; !done {
				leaving.Go(func() {
					if t.Leave(running); running.Err() == nil {
						_ = t.ch.send(msgMayEnd, nil) // it has ended, then, which is seen here
					}
				})
			}
		case msgEnds:
			done = true
		default:
			err = t.hear(kind, body, fds)
			fds = nil
		}
		closeAll(fds)
	}
	switch {
	case ctx.Err() != nil && !done:
		return nil
	case done:
		t.setAlone()
		g.cfg.Log.Info("clients were taken over", "sessions", t.taken, "left to the old process", t.left.Left)
		return nil
	case !accepts:
		return fmt.Errorf("the old process has broken off: %w", err)
	case t.oldIsDead():
		t.setAlone()
		g.cfg.Log.Warn("the old process has ended early", "sessions", t.taken, "lost", t.left.Left)
		return nil
	}
	return fmt.Errorf("%w: %w", errTakenBack, err)
}

func (t *Takeover) setAlone() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.alone = true
}

// Alone reports whether this process is the only one now: the old one has ended, or will take nothing back.
func (t *Takeover) Alone() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.alone
}

// oldIsDead waits for the end of the old process.
func (t *Takeover) oldIsDead() bool {
	dead, _ := t.AwaitEnd(context.Background(), deadMax)
	return dead
}

// AwaitEnd waits for the end of the old process, for no longer than a time; an error is that of ctx. With Leave it may be called after
// Run.
func (t *Takeover) AwaitEnd(ctx context.Context, most time.Duration) (ended bool, err error) {
	if t.dead {
		return true, nil
	}
	if err := t.life.SetReadDeadline(time.Now().Add(most)); err != nil {
		return false, err
	}
	stop := context.AfterFunc(ctx, func() { _ = t.life.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err = t.life.Read(make([]byte, 1)); errors.Is(err, io.EOF) {
		t.dead = true
		return true, t.life.Close()
	}
	return false, ctx.Err()
}

// end lets nobody wait any more.
func (t *Takeover) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended, t.left = true, progress{}
	close(t.broken)
	_ = t.ch.c.Close()
	if t.Leave == nil {
		_ = t.life.Close()
	}
}

func (t *Takeover) over() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.ended
}

// hear takes a message of the old process; the descriptors are its own from now on.
func (t *Takeover) hear(kind byte, body []byte, fds []int) error {
	if kind == msgClient {
		return t.client(body, fds)
	}
	closeAll(fds)
	switch kind {
	case msgYours:
		id, _, err := number(body)
		if err != nil {
			return err
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		t.taken++
		if yours := t.adopted[id]; yours != nil { // else it was ended here meanwhile
			delete(t.adopted, id)
			yours <- true
		}
	case msgProgress:
		var p progress
		if err := json.Unmarshal(body, &p); err != nil {
			return err
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		t.left = p
	default:
		return fmt.Errorf("a message of kind %q came", kind)
	}
	return nil
}

// client takes a client's connection with its session. What is wrong with one concerns that one only.
func (t *Takeover) client(body []byte, fds []int) error {
	if len(fds) != 1 {
		closeAll(fds)
		return fmt.Errorf("a client came with %d connections", len(fds))
	}
	f := os.NewFile(uintptr(fds[0]), "client")
	conn, err := net.FileConn(f)
	_ = f.Close() // FileConn has its own
	if err != nil {
		return err
	}
	p, err := decodePassed(body)
	clear(body)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	if !t.Listeners[0].push(&arrival{Conn: conn, p: p, t: t}) {
		return errors.Join(net.ErrClosed, conn.Close())
	}
	return nil
}

// arrival is a client's connection that came from the old process. It is that one's until the session was adopted.
type arrival struct {
	net.Conn
	p *passed
	t *Takeover
}

// adopt tells the old process that this one could go on with the client, and waits until it is its own.
func (a *arrival) adopt(ctx context.Context) bool {
	yours := make(chan bool, 1)
	a.t.mu.Lock()
	a.t.adopted[a.p.id] = yours
	a.t.mu.Unlock()
	if a.t.ch.sendNumber(msgAdopted, a.p.id) != nil {
		return false
	}
	select {
	case <-yours:
		return true
	case <-a.t.broken:
	case <-ctx.Done():
	}
	a.t.mu.Lock()
	defer a.t.mu.Unlock()
	delete(a.t.adopted, a.p.id)
	select {
	case <-yours: // It came in the last moment.
		return true
	default:
		return false
	}
}

// serveArrival is serve for a client that has logged in at another process.
func (g *Server) serveArrival(ctx context.Context, a *arrival) {
	s := newSession(g, a.Conn)
	defer s.close()
	s.adopt(a.p)
	ctx, s.kill = context.WithCancel(ctx)
	defer s.kill()
	var err error
	if g.cfg.Mode != TransactionMode {
		err = errors.New("the new process has another mode")
	}
	if err == nil {
		err = g.registerAs(s)
	}
	if err == nil {
		defer g.unregister(s)
		err = g.enter(s, a)
	}
	if err != nil {
		g.cfg.Log.Warn("a client was not taken over", "user", s.who.User, "database", s.who.Database, "error", err)
		_ = a.t.ch.sendNumber(msgRefused, a.p.id, []byte(err.Error())...) // the old process has it, or has ended
		return
	}
	defer g.leave(s)
	if a.adopt(ctx) {
		s.runBorrowing(ctx)
	}
}

// Entering is how many connections have not come so far yet that they wait when no site serves: they log in, or are about to begin.
func (g *Server) Entering() (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for s := range g.clients {
		if g.sessions[s.pid] != s {
			n++
		}
	}
	return n + g.strangers.Len()
}

// cancelElsewhere hands a request to cancel to the process that this one takes over from, which has the session if anybody has.
func (g *Server) cancelElsewhere(start *pgwire.Startup) {
	if t := g.taking.Load(); t != nil && !t.over() {
		_ = t.ch.send(msgCancel, append(binary.BigEndian.AppendUint32(nil, start.PID), start.Secret...)) // it has ended, then
	}
}

// tellPaused tells the old process which databases are paused: those of its sessions wait there too, and not longer than here.
func (t *Takeover) tellPaused(g *Server) {
	t.telling.Lock() // of two changes at once, the later one is told last
	defer t.telling.Unlock()
	g.mu.Lock()
	names := slices.Sorted(maps.Keys(g.paused))
	g.mu.Unlock()
	if body, err := json.Marshal(names); err == nil {
		_ = t.ch.send(msgPaused, body) // it has ended, then
	}
}

// Predecessor is what is left at the process that this one takes over from.
type Predecessor struct {
	Clients int            `json:"clients"`
	Why     map[string]int `json:"why"` // what for, as it last told
}

// predecessor is nil when there is none any more.
func (g *Server) predecessor() *Predecessor {
	t := g.taking.Load()
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return nil
	}
	return &Predecessor{t.left.Left, t.left.Why}
}
