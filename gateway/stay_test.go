package gateway

import (
	"context"
	"errors"
	"net"
	"os"
	"testing"
	"time"
)

// stayed is a hand-over by a process with more than clients to something that speaks for the new process.
type stayed struct {
	ch     *channel
	stays  chan bool // what HandOver.Stay was told
	ended  chan error
	cancel context.CancelFunc
}

func (r *relayed) stay(t *testing.T, drain time.Duration) *stayed {
	t.Helper()
	a, b := unixPair(t)
	ctx, cancel := context.WithCancel(t.Context())
	s := &stayed{&channel{c: b}, make(chan bool, 2), make(chan error, 1), cancel}
	go func() {
		s.ended <- r.g.HandOver(ctx, a, HandOver{Listeners: []*Listener{r.l}, Drain: drain, Stay: func(stays bool) { s.stays <- stays }})
	}()
	t.Cleanup(cancel)
	greeted(t, s.ch)
	next(t, s.ch, msgGo)
	return s
}

// TestAProcessStaysUntilItMayEnd: what has more than clients ends only when the new process can do without; until then it serves those that
// it has left, and hands them over. When the new one dies, it goes on.
func TestAProcessStaysUntilItMayEnd(t *testing.T) {
	c := site(t, "")
	r := serveOn(t, clustered(c), listenable(t), func(*Server) {})
	busy := open1(t, dsn(r.l.Addr().String(), ""))
	for name, breaks := range map[string]func(s *stayed){
		"it is gone": func(s *stayed) { _ = s.ch.c.Close() },
		"nonsense":   func(s *stayed) { _ = s.ch.send('?', nil) },
	} {
		exec1(t, busy, "BEGIN")
		s := r.stay(t, 50*time.Millisecond)
		next(t, s.ch, msgDone)
		if !<-s.stays {
			t.Errorf("%s: it is not told that it stays", name)
		}
		goesOn(t, name+": a client in a transaction", busy)
		breaks(s)
		if err := <-s.ended; err == nil || <-s.stays {
			t.Errorf("%s: %v", name, err)
		}
		exec1(t, busy, "COMMIT")
		goesOn(t, name+": one that was left", busy)
		fresh := open1(t, dsn(r.l.Addr().String(), ""))
		goesOn(t, name+": a new one", fresh)
		_ = fresh.Close(t.Context())
		until(t, "it has left", func() bool { n, _ := r.g.here(); return n == 1 })
	}
	// When this process is told to end, it says so.
	exec1(t, busy, "BEGIN")
	s := r.stay(t, time.Minute)
	s.cancel()
	next(t, s.ch, msgDone)
	next(t, s.ch, msgEnds)
	if err := <-s.ended; err != nil {
		t.Error(err)
	}
	r.l.Resume() // it was to end
	// And at last it may end. The session goes along although the time was over.
	s = r.stay(t, 50*time.Millisecond)
	next(t, s.ch, msgDone)
	exec1(t, busy, "COMMIT")
	p, err := decodePassed(next(t, s.ch, msgClient))
	if err == nil {
		err = s.ch.sendNumber(msgAdopted, p.id)
	}
	if err != nil {
		t.Fatal(err)
	}
	next(t, s.ch, msgYours)
	select {
	case err := <-s.ended:
		t.Errorf("it has ended before it may: %v", err)
	default:
	}
	if err := s.ch.send(msgMayEnd, nil); err != nil {
		t.Fatal(err)
	}
	next(t, s.ch, msgEnds)
	if err := <-s.ended; err != nil {
		t.Error(err)
	}
	_ = busy.PgConn().Conn().Close()
}

// speaker speaks for the old process.
type speaker struct {
	ch   *channel
	life *os.File
}

// from takes over from something that speaks for the old process.
func from(t *testing.T, leave func(ctx context.Context)) (*speaker, *Takeover, *relayed, chan error) {
	t.Helper()
	a, b := unixPair(t)
	old := &speaker{ch: &channel{c: a}}
	pipe, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	old.life = w
	l := listenable(t)
	err = withFD(l.socket, func(fd int) error {
		return withFD(pipe, func(life int) error { return old.ch.send(msgWelcome, []byte(`{"pid": 4711}`), fd, life) })
	})
	if err != nil {
		t.Fatal(err)
	}
	_, _ = pipe.Close(), l.Close()
	tk, err := TakeOver(b)
	if err != nil {
		t.Fatal(err)
	}
	tk.Leave = leave
	n := serveOn(t, clustered(site(t, "")), tk.Listeners[0], tk.Prepare)
	ran := make(chan error, 1)
	go func() { ran <- tk.Run(t.Context(), n.g) }()
	next(t, old.ch, msgReady)
	if err := old.ch.send(msgGo, nil); err != nil {
		t.Fatal(err)
	}
	return old, tk, n, ran
}

// TestTheNewProcessLetsTheOldOneEnd: after it has done what it has to, and it knows when that one's process is dead.
func TestTheNewProcessLetsTheOldOneEnd(t *testing.T) {
	may := make(chan struct{})
	old, tk, n, ran := from(t, func(context.Context) { <-may })
	if tk.PID() != 4711 {
		t.Errorf("the old process is %d", tk.PID())
	}
	conn := open1(t, dsn(n.l.Addr().String(), ""))
	if err := old.ch.send(msgDone, nil); err != nil {
		t.Fatal(err)
	}
	goesOn(t, "at the new one", conn)
	close(may)
	next(t, old.ch, msgMayEnd)
	select {
	case err := <-ran:
		t.Errorf("the takeover is over before the old process says that it ends: %v", err)
	default:
	}
	if err := old.ch.send(msgEnds, nil); err != nil {
		t.Fatal(err)
	}
	if err := <-ran; err != nil || !tk.Alone() {
		t.Errorf("%v, alone: %t", err, tk.Alone())
	}
	if dead, err := tk.AwaitEnd(t.Context(), time.Millisecond); dead || err != nil {
		t.Errorf("the old process is taken for dead: %t, %v", dead, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if dead, err := tk.AwaitEnd(ctx, time.Hour); dead || !errors.Is(err, context.Canceled) {
		t.Errorf("%t, %v", dead, err)
	}
	_ = old.life.Close()
	for range 2 {
		if dead, err := tk.AwaitEnd(t.Context(), time.Minute); !dead || err != nil {
			t.Errorf("%t, %v", dead, err)
		}
	}
	goesOn(t, "at the new one", conn)
}

// TestTheOldProcessIsLostWhileTheNewOnePrepares: dead, it is followed at once; alive, it goes on, and the new one must end.
func TestTheOldProcessIsLostWhileTheNewOnePrepares(t *testing.T) {
	for _, dead := range []bool{true, false} {
		called := make(chan struct{})
		old, tk, _, ran := from(t, func(ctx context.Context) {
			close(called)
			<-ctx.Done()
		})
		if err := old.ch.send(msgDone, nil); err != nil {
			t.Fatal(err)
		}
		<-called
		if dead {
			_ = old.life.Close()
		}
		_ = old.ch.c.Close()
		err := <-ran
		if dead && err != nil || !dead && !errors.Is(err, errTakenBack) {
			t.Errorf("dead: %t: %v", dead, err)
		}
		if is, err := tk.AwaitEnd(t.Context(), time.Millisecond); is != dead || err != nil {
			t.Errorf("dead: %t, not %t, %v", is, dead, err)
		}
		_ = old.life.Close()
	}
}

// TestEntering: who has connected counts until the session has begun.
func TestEntering(t *testing.T) {
	c := site(t, "")
	r := serveOn(t, clustered(c), listenable(t), func(*Server) {})
	if n := r.g.Entering(); n != 0 {
		t.Errorf("%d, when nobody has come", n)
	}
	conn := open1(t, dsn(r.l.Addr().String(), ""))
	goesOn(t, "a client", conn)
	if n := r.g.Entering(); n != 0 {
		t.Errorf("%d, when the only client has begun", n)
	}
	stranger, err := net.Dial("tcp", r.l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the stranger counts", func() bool { return r.g.Entering() == 1 })
	_ = stranger.Close()
	until(t, "it counts no more", func() bool { return r.g.Entering() == 0 })
	// One that has logged in waits for a server.
	late := &session{g: r.g}
	r.g.mu.Lock()
	r.g.clients[late] = struct{}{}
	r.g.mu.Unlock()
	if n := r.g.Entering(); n != 1 {
		t.Errorf("%d, when one has logged in and not begun", n)
	}
	r.g.mu.Lock()
	delete(r.g.clients, late)
	r.g.mu.Unlock()
}
