package cut

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// Direction is one of the two ways of messages through a relay.
type Direction int

// The directions.
const (
	ToServer Direction = iota
	ToClient
)

func (d Direction) String() string { return [2]string{"to-server", "to-client"}[d] }

// Kind is how a connection is cut at a message.
type Kind string

// The kinds. The two ends are the relay's: the near one towards who has connected, the far one towards the server.
const (
	ResetBefore  Kind = "reset-before"     // both ends are reset; the message is lost
	ResetAfter   Kind = "reset-after"      // the message comes through first
	FinBefore    Kind = "fin-before"       // both ends are closed in order; the message is lost
	FinAfter     Kind = "fin-after"        // the message comes through first
	Half         Kind = "half"             // half of the message comes through, then both ends are reset
	Silence      Kind = "silence"          // nothing comes through any more, nor the end of a connection
	Mute         Kind = "mute"             // nothing comes from the server any more, and all goes to it
	Lost         Kind = "lost"             // the near end is reset; the server does not hear of it
	Late         Kind = "late"             // the same, and the message, with those behind it, reaches the server when all is over
	Stall        Kind = "stall"            // silence that nobody resets: who waits must give up by himself
	Double       Kind = "double"           // not a cut: the message comes twice, which nothing may survive unnoticed
	None         Kind = "none"             // nothing happens
	SiteReset    Kind = "site-reset"       // reset-before, for all connections to the site, which then refuses new ones
	SiteResetEnd Kind = "site-reset-after" // reset-after, likewise
)

// Kinds of the form with two sites: the site's PostgreSQL and agent are killed (-9) at the message.
const (
	KillBefore Kind = "kill-before" // the message is lost
	KillAfter  Kind = "kill-after"  // the message comes through first
)

// kinds that there are for a message of a direction.
var kinds = [2][]Kind{
	ToServer: {ResetBefore, ResetAfter, FinAfter, Half, Silence, Late, SiteResetEnd},
	ToClient: {ResetBefore, FinBefore, Half, Mute, Lost, SiteReset},
}

// clientKinds are those for the connection of a client.
var clientKinds = [2][]Kind{
	ToServer: {ResetBefore, FinAfter, Half, Late},
	ToClient: {ResetBefore, FinAfter, Mute},
}

// loginKinds are those for messages of a login. Where the site is reset, it is the server's only.
var loginKinds = []Kind{ResetBefore, ResetAfter, FinBefore, FinAfter, Half, Stall, SiteReset, SiteResetEnd}

// plan is where to cut: at the k-th message of a direction, counted over all connections of a wire.
type plan struct {
	dir  Direction
	k    int
	kind Kind
}

// event is a message that came through, or not.
type event struct {
	at   time.Time
	link string
	dir  Direction
	n    int
	what string
}

func (e event) String() string {
	arrow := "->"
	if e.dir == ToClient {
		arrow = "<-"
	}
	number := "     "
	if e.n > 0 {
		number = fmt.Sprintf("%4d ", e.n)
	}
	return fmt.Sprintf("%s %-8s %s%s %s", e.at.Format("05.000000"), e.link, number, arrow, e.what)
}

// wire is what the relays of one worker have in common: the count of messages since begin, and the plan. Its methods may be
// called at the same time.
type wire struct {
	kill    func(site string) // kills a site
	silence time.Duration     // after which the near end of a silent connection is reset, as TCP_USER_TIMEOUT would

	mu       sync.Mutex // guards the rest
	counting bool
	counts   [2]int
	logins   [2][]int // which of them were a login's
	entries  bool     // those of logins count as well
	tls      bool     // a request for TLS is handed on, and each record counts as a message
	plan     plan
	struck   bool
	trace    []event
	links    map[*link]struct{}
	wounded  []*link // that were cut
	timers   []*time.Timer
	nextLink int
}

func newWire(silence time.Duration) *wire {
	return &wire{silence: silence, links: map[*link]struct{}{}}
}

// begin counts from now on, and cuts as planned.
func (w *wire) begin(p plan) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.counting, w.counts, w.plan, w.struck, w.trace, w.wounded = true, [2]int{}, p, false, nil, nil
	w.logins, w.entries, w.tls = [2][]int{}, false, false
}

// beginLogin is begin, with the messages of logins, or with the records of TLS.
func (w *wire) beginLogin(p plan, tls bool) {
	w.begin(p)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.entries, w.tls = true, tls
}

// ofLogins are the numbers of the messages that were a login's.
func (w *wire) ofLogins() [2][]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return [2][]int{slices.Clone(w.logins[0]), slices.Clone(w.logins[1])}
}

// weighs reports whether a message of a link counts, in the relay's present plan.
func (w *wire) weighs(l *link) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !l.other.Load() && (l.ready.Load() || w.entries)
}

// count is how many messages have come in each direction.
func (w *wire) count() [2]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.counts
}

// note adds a line to the trace.
func (w *wire) note(who, what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.counting {
		w.trace = append(w.trace, event{at: time.Now(), link: who, what: what})
	}
}

// history is the trace, a line each.
func (w *wire) history() []event {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.trace)
}

// hit reports whether the plan was carried out, and the pids of the servers' processes that were cut off.
func (w *wire) hit() (struck bool, pids []uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range w.wounded {
		if pid := l.pid.Load(); pid != 0 {
			pids = append(pids, pid)
		}
	}
	return w.struck, pids
}

// release delivers what was late and lets go of the far ends of what was cut; it returns when they have ended.
func (w *wire) release() {
	w.mu.Lock()
	wounded := w.wounded
	w.counting = false
	for _, t := range w.timers {
		t.Stop()
	}
	w.timers = nil
	w.mu.Unlock()
	for _, l := range wounded {
		l.release()
	}
}

// action is what becomes of a message.
type action int

const (
	pass action = iota
	drop
	hold
	strikeBefore
	strikeAfter
	strikeHalf
	twice
)

// weigh counts a message and decides.
func (w *wire) weigh(l *link, dir Direction, what string) action {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.counting {
		w.counts[dir]++
		if !l.ready.Load() {
			w.logins[dir] = append(w.logins[dir], w.counts[dir])
		}
		w.trace = append(w.trace, event{time.Now(), l.name, dir, w.counts[dir], what})
		if !w.struck && w.plan.kind != None && w.plan.dir == dir && w.plan.k == w.counts[dir] {
			w.struck = true
			return w.strike(l)
		}
	}
	return l.mode[dir]
}

// strike begins the planned cut of a link. Under mu.
func (w *wire) strike(l *link) action {
	w.trace = append(w.trace, event{at: time.Now(), link: l.name, dir: w.plan.dir, what: "==== " + string(w.plan.kind)})
	if w.plan.kind == Double {
		return twice
	}
	w.wounded = append(w.wounded, l)
	switch w.plan.kind {
	case ResetBefore, FinBefore:
		l.mode = [2]action{drop, drop}
		return strikeBefore
	case Lost:
		l.mode[ToClient] = drop
		return strikeBefore
	case SiteReset:
		l.mode = [2]action{drop, drop}
		w.down(l)
		return strikeBefore
	case KillBefore:
		l.mode = [2]action{drop, drop}
		return strikeBefore
	case KillAfter:
		l.mode = [2]action{drop, drop}
		return strikeAfter
	case SiteResetEnd:
		l.mode = [2]action{drop, drop}
		w.down(l)
		return strikeAfter
	case ResetAfter, FinAfter:
		l.mode = [2]action{drop, drop}
		return strikeAfter
	case Half:
		l.mode = [2]action{drop, drop}
		return strikeHalf
	case Silence:
		l.mode = [2]action{drop, drop}
		w.expire(l)
		return drop
	case Stall:
		l.mode = [2]action{drop, drop}
		return drop
	case Mute:
		l.mode[ToClient] = drop
		w.expire(l)
		return drop
	case Late:
		l.mode = [2]action{hold, drop}
		return hold
	}
	panic("cut: a kind of cut that does not exist: " + string(w.plan.kind))
}

// expire lets the near end learn of a silence, after a while.
func (w *wire) expire(l *link) {
	w.timers = append(w.timers, time.AfterFunc(w.silence, func() { reset(l.near) }))
}

// down takes the whole site of a link away.
func (w *wire) down(l *link) {
	l.relay.refuse.Store(true)
	for other := range w.links {
		if other != l && other.relay == l.relay {
			other.mode = [2]action{drop, drop}
			w.wounded = append(w.wounded, other)
			reset(other.near)
			reset(other.far)
		}
	}
}

// relay is one way to a server.
type relay struct {
	wire     *wire
	name     string // of the site
	target   string
	listener net.Listener
	refuse   atomic.Bool // new connections end at once
	wg       sync.WaitGroup
}

// relayTo starts a relay to a server's TCP address.
func (w *wire) relayTo(name, target string) (*relay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start a relay to %s: %w", target, err)
	}
	r := &relay{wire: w, name: name, target: target, listener: l}
	r.wg.Go(r.accept)
	return r, nil
}

func (r *relay) addr() string { return r.listener.Addr().String() }

// close ends all connections and waits for it.
func (r *relay) close() error {
	err := r.listener.Close()
	r.wire.mu.Lock()
	for l := range r.wire.links {
		if l.relay == r {
			reset(l.near)
			reset(l.far)
		}
	}
	r.wire.mu.Unlock()
	r.wg.Wait()
	return err
}

func (r *relay) accept() {
	for {
		c, err := r.listener.Accept()
		if err != nil {
			return
		}
		r.wg.Go(func() { r.serve(c.(*net.TCPConn)) })
	}
}

// link is a connection through a relay.
type link struct {
	wire      *wire
	relay     *relay
	name      string
	near, far *net.TCPConn
	pid       atomic.Uint32 // of the server's process
	ready     atomic.Bool   // the login is over: messages count
	other     atomic.Bool   // it is not a client's: they do not
	done      chan struct{} // all has ended
	begun     chan struct{} // closed when records is known
	records   bool          // it is TLS

	mode [2]action // of messages; guarded by wire.mu
	held []byte    // what is to be late; of the goroutine to the server until it has ended
	sent chan struct{}
}

// reset closes with RST; should the option fail, the end is a normal one.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

func (r *relay) serve(near *net.TCPConn) {
	if r.refuse.Load() {
		reset(near)
		return
	}
	c, err := net.Dial("tcp", r.target)
	if err != nil {
		reset(near)
		return
	}
	l := &link{wire: r.wire, relay: r, near: near, far: c.(*net.TCPConn), done: make(chan struct{}), begun: make(chan struct{}), sent: make(chan struct{})}
	r.wire.mu.Lock()
	r.wire.nextLink++
	l.name = fmt.Sprintf("%s#%d", r.name, r.wire.nextLink)
	r.wire.links[l] = struct{}{}
	r.wire.mu.Unlock()
	defer func() {
		_ = l.near.Close()
		_ = l.far.Close()
		r.wire.mu.Lock()
		delete(r.wire.links, l)
		r.wire.mu.Unlock()
		close(l.done)
	}()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(l.sent)
		l.toServer()
	})
	wg.Go(l.toClient)
	wg.Wait()
}

// toServer hands on what comes from the near end.
func (l *link) toServer() {
	begun := sync.OnceFunc(func() { close(l.begun) })
	defer begun()
	start, err := pgwire.ReadStartup(l.near)
	if err == nil && start.Kind == pgwire.StartupSSL && l.wire.passesTLS() {
		l.records = true
		begun()
		w := pgwire.NewWriter(l.far)
		if request := pgwire.AppendSSLRequest(nil); l.put(w, request, l.wire.weigh(l, ToServer, "a request for TLS")) && w.Flush() == nil {
			l.pumpRecords(ToServer, l.near, l.far)
		}
		return
	}
	for err == nil && (start.Kind == pgwire.StartupSSL || start.Kind == pgwire.StartupGSS) {
		if _, err = l.near.Write([]byte{'N'}); err == nil {
			start, err = pgwire.ReadStartup(l.near)
		}
	}
	if err != nil {
		_ = l.far.Close()
		return
	}
	l.other.Store(start.Get("user") != appUser)
	packet := pgwire.AppendStartup(nil, start.Params)
	if start.Kind == pgwire.StartupCancel {
		packet = pgwire.AppendCancel(nil, start.PID, start.Secret)
	}
	begun()
	act := pass
	if start.Kind != pgwire.StartupCancel && l.wire.weighs(l) {
		act = l.wire.weigh(l, ToServer, "the startup packet")
	}
	if w := pgwire.NewWriter(l.far); l.put(w, packet, act) && w.Flush() == nil {
		l.pump(ToServer, l.near, l.far)
	}
}

func (l *link) toClient() {
	<-l.begun // The server says nothing before.
	if l.records {
		l.pumpRecords(ToClient, l.far, l.near)
		return
	}
	l.pump(ToClient, l.far, l.near)
}

func (w *wire) passesTLS() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tls
}

// put does with bytes what was decided; false ends the direction.
func (l *link) put(w *pgwire.Writer, m []byte, act action) bool {
	switch act {
	case drop:
		return true
	case strikeBefore:
		return l.end(w)
	case strikeHalf:
		_ = w.Write(m[:len(m)/2])
		return l.end(w)
	case strikeAfter:
		_ = w.Write(m)
		return l.end(w)
	}
	_ = w.Write(m) // the flush tells
	return true
}

// pumpRecords hands on records of TLS, which it cannot read, after the byte by which a server accepts it.
func (l *link) pumpRecords(dir Direction, from, to *net.TCPConn) {
	r, w := bufio.NewReader(from), pgwire.NewWriter(to)
	for first := dir == ToClient; ; first = false {
		m := make([]byte, 1, 5)
		if !first {
			m = m[:5] // type, version, length
		}
		_, err := io.ReadFull(r, m)
		what := fmt.Sprintf("the answer %q", m)
		if err == nil && !first {
			n := len(m) + int(binary.BigEndian.Uint16(m[3:]))
			m = append(m, make([]byte, n-len(m))...)
			_, err = io.ReadFull(r, m[5:])
			what = fmt.Sprintf("a record of type %d, %d bytes", m[0], n)
		}
		if err != nil {
			l.ended(dir, to, err)
			return
		}
		if !l.put(w, m, l.wire.weigh(l, dir, what)) {
			return
		}
		if err := w.Flush(); err != nil {
			l.ended(dir, to, err)
			return
		}
	}
}

// anything is any message, of any length.
var anything = func() pgwire.Limits {
	var l [256]int32
	for i := range l {
		l[i] = 1<<30 - 2
	}
	return &l
}()

// pump hands on messages of one direction until it ends.
func (l *link) pump(dir Direction, from, to *net.TCPConn) {
	r, w := pgwire.NewReader(from), pgwire.NewWriter(to)
	defer r.Drop()
	for {
		typ, _, err := r.Next(anything)
		if err != nil {
			l.ended(dir, to, err)
			return
		}
		act := pass
		if l.wire.weighs(l) {
			head, err := r.Peek(min(r.Left(), 160))
			if err != nil {
				l.ended(dir, to, err)
				return
			}
			act = l.wire.weigh(l, dir, describe(dir, typ, head))
		}
		if dir == ToClient && !l.ready.Load() {
			if err := l.login(typ, r); err != nil {
				l.ended(dir, to, err)
				return
			}
		}
		if !l.move(r, w, typ, act) {
			return
		}
		if !r.Complete() && act != hold {
			if err := w.Flush(); err != nil {
				l.ended(dir, to, err)
				return
			}
		}
	}
}

// login looks at what the server says before it is ready.
func (l *link) login(typ byte, r *pgwire.Reader) error {
	switch typ {
	case pgwire.BackendKeyData:
		body, err := r.Peek(r.Left())
		if err != nil {
			return err
		}
		pid, _, err := pgwire.ParseBackendKeyData(body)
		if err != nil {
			return err
		}
		l.pid.Store(pid)
	case pgwire.ReadyForQuery:
		l.ready.Store(true) // before who waits for it can send
	}
	return nil
}

// move does with a message what was decided; false ends the direction.
func (l *link) move(r *pgwire.Reader, w *pgwire.Writer, typ byte, act action) bool {
	switch act {
	case pass:
		_ = r.Forward(w) // the flush tells
	case drop: // Next passes over it.
	case hold, twice, strikeHalf:
		body, err := r.Body(1 << 20)
		if err != nil {
			return false
		}
		m := pgwire.AppendMessage(nil, typ, body)
		switch act {
		case hold:
			l.held = append(l.held, m...)
			if !r.Complete() {
				_ = w.Flush()
				reset(l.near)
			}
		case twice:
			_ = w.Write(append(m, m...))
		default:
			_ = w.Write(m[:len(m)/2])
			return l.end(w)
		}
	case strikeBefore:
		return l.end(w)
	case strikeAfter:
		_ = r.Forward(w)
		return l.end(w)
	}
	return true
}

// end ends a link that was struck in the way that was planned, after what came before.
func (l *link) end(w *pgwire.Writer) bool {
	_ = w.Flush()
	l.wire.mu.Lock()
	kind := l.wire.plan.kind
	l.wire.mu.Unlock()
	switch kind {
	case FinBefore, FinAfter:
		_ = l.near.CloseWrite()
		_ = l.far.CloseWrite()
		return true // and what comes is dropped
	case Lost:
		reset(l.near)
		return true
	case KillBefore, KillAfter:
		l.wire.kill(l.relay.name)
	}
	reset(l.near)
	reset(l.far)
	return false
}

// ended hands on that a side has ended, unless the link was cut: then its other side is not told.
func (l *link) ended(dir Direction, to *net.TCPConn, err error) {
	l.wire.mu.Lock()
	cut := l.mode != [2]action{}
	l.wire.mu.Unlock()
	if cut {
		if dir == ToClient { // The server's own end: nothing is left to be told.
			_ = l.far.Close()
		}
		return
	}
	if errors.Is(err, io.EOF) {
		_ = to.CloseWrite() // It fails when the other direction has ended.
		return
	}
	reset(l.near)
	reset(l.far)
}

// release delivers what is late, ends what is left and waits for it.
func (l *link) release() {
	reset(l.near)
	<-l.sent
	if len(l.held) > 0 {
		_, _ = l.far.Write(l.held) // The server may have ended it.
	}
	_ = l.far.CloseWrite()
	select {
	case <-l.done:
	case <-time.After(releaseMax): // The server does not end it: what it is about may wait for a lock.
		reset(l.far)
		<-l.done
	}
}

// releaseMax bounds how long a server may take to carry out what came late, and to end the connection.
const releaseMax = 2 * time.Second

// describe is a message as the trace shows it.
func describe(dir Direction, typ byte, head []byte) string {
	text := string(head)
	switch {
	case typ == pgwire.ErrorResponse && dir == ToClient, typ == pgwire.NoticeResponse && dir == ToClient:
		var fields []string
		for f := range strings.SplitSeq(text, "\x00") {
			if f != "" && strings.ContainsRune("VCM", rune(f[0])) {
				fields = append(fields, f[1:])
			}
		}
		text = strings.Join(fields, " ")
	case typ == pgwire.RowDescription && dir == ToClient:
		text = ""
	}
	clean := strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '.'
		}
		return r
	}, text)
	if len(clean) > 110 {
		clean = clean[:110] + "..."
	}
	return fmt.Sprintf("%c %s", typ, clean)
}
