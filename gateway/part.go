package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// Between two transactions a session may be sent away: to another process that takes the gateway over, or with 57P01, because it
// keeps a connection to a site that is drained. It is never cut within a transaction, nor while its client sends.

// footing is where a session stands, as far as it decides whether it may be sent away.
type footing struct {
	busy  bool   // a transaction or a query is under way, or it is not known
	heard bool   // a part of the client's next message has come
	site  string // of the server that it keeps a connection to
	keeps string // why it does; empty: it keeps none
	fixed string // why its client's connection cannot be handed to another process; empty: it can
}

// orders are what sessions are to do as soon as they may.
type orders struct {
	handing bool            // go on in another process
	emptied map[string]bool // leave these sites
}

// errand is what a session does about that.
type errand byte

const (
	noErrand errand = iota
	handOver
	askedOut
)

// errand decides; why goes with askedOut.
func (f footing) errand(o orders) (e errand, why string) {
	switch {
	case f.busy || f.heard:
	case o.handing && f.keeps != "":
		return askedOut, f.keeps
	case o.handing && f.fixed != "":
		return askedOut, f.fixed
	case o.handing:
		return handOver, ""
	case f.keeps != "" && o.emptied[f.site]:
		return askedOut, f.keeps
	}
	return noErrand, ""
}

// Reasons to keep a connection that are not what a session has in it.
const (
	keepsAlone       = "it has a connection of its own (session mode)"
	keepsReplication = "it is a replication connection"
	keepsConsole     = "it is connected to the gateway's own database"
	keepsDiffers     = "the sites differ, and it would notice"
	fixedTLS         = "its connection is encrypted (TLS)"
	fixedKind        = "its connection is of a kind that cannot be handed over"
)

// parting is what a session has for that.
type parting struct {
	asked1 asked1 // guarded by mu
	linger bool   // its client is to hear why it was sent away; of the session's goroutine

	// Why its client was not taken over, and by whom; of the session's goroutine.
	fixed    string
	fixedFor *handing
}

// departures is what a Server has for it.
type departures struct {
	emptied atomic.Pointer[map[string]bool]
	handing atomic.Pointer[handing]
	taking  atomic.Pointer[Takeover] // in the new process

	// Guarded by the Server's mu.
	preparing *handing   // handing, also before it begins and while it ends
	lives     []*os.File // end with this process
}

func (g *Server) orders() orders {
	o := orders{handing: g.handing.Load() != nil}
	if m := g.emptied.Load(); m != nil {
		o.emptied = *m
	}
	return o
}

// AskToLeave lets sessions that keep a connection to a site's server end with 57P01 as soon as they are outside a transaction, or
// no longer. Those that can be moved are not concerned. It may be called at any time.
func (g *Server) AskToLeave(site string, leave bool) {
	g.mu.Lock()
	was := g.orders().emptied
	if was[site] == leave {
		g.mu.Unlock()
		return
	}
	now := maps.Clone(was)
	if now == nil {
		now = map[string]bool{}
	}
	if delete(now, site); leave {
		now[site] = true
	}
	g.emptied.Store(&now)
	g.mu.Unlock()
	if leave {
		g.beckonAll()
	}
}

// beckonAll wakes the sessions that may have something to do.
func (g *Server) beckonAll() {
	for _, s := range g.sessionsNow() {
		s.mu.Lock()
		s.beckon()
		s.mu.Unlock()
	}
}

// sessionsNow are those of clients that have logged in.
func (g *Server) sessionsNow() []*session {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Collect(maps.Keys(g.clients))
}

// Staying says how many sessions have a connection to a site's server at this moment, by what for, and how many without one would
// come back to it, because they may go nowhere else. It is for a site that is drained.
func (g *Server) Staying(site string) map[string]int {
	why := map[string]int{}
	for _, s := range g.sessionsNow() {
		s.mu.Lock()
		switch keeps := s.keepsFor(); {
		case s.b == nil && s.last == site && s.stuck():
			why[keepsDiffers]++
		case s.b == nil || s.b.target.Site != site:
		case keeps != "":
			why[keeps]++
		default:
			why["a transaction is under way"]++
		}
		s.mu.Unlock()
	}
	return why
}

// keepsFor says why the session keeps its backend; empty: it does for the transaction only. mu is held.
func (s *session) keepsFor() string {
	switch {
	case s.b == nil:
		return ""
	case s.b.pool != nil:
		return s.pinned()
	case s.who.Replication():
		return keepsReplication
	}
	return keepsAlone
}

// beckon wakes the session's goroutine from waiting for the client if there are orders. mu is held.
func (s *session) beckon() {
	if !s.parked || s.poked {
		return
	}
	if o := s.g.orders(); !o.handing && len(o.emptied) == 0 {
		return
	}
	s.poked = true
	_ = s.conn.SetReadDeadline(time.Unix(1, 0)) // it may have ended
}

// footing tells where the session stands while its goroutine, which calls it, waits for the client. mu is held.
func (s *session) footing() footing {
	f := footing{heard: s.r.Buffered() > 0 || s.r.Left() > 0, fixed: fixedIn(s.conn)}
	if s.fixed != "" && s.fixedFor == s.g.handing.Load() {
		f.fixed = s.fixed
	}
	if s.b != nil {
		f.site, f.keeps = s.b.target.Site, s.keepsFor()
	}
	switch {
	case s.who.Database == AdminDatabase:
		f.keeps = keepsConsole
	case s.b == nil:
		f.busy = s.lost || s.loss != nil || s.limbo != nil || s.rerun != nil || s.due.id != nil || s.writing || s.probe ||
			s.w.Buffered() > 0 || s.keeps() && (len(s.flight.segments) > 0 || s.flight.status != pgwire.Idle)
	case s.b.pool == nil:
		f.busy = !s.asked1.idle()
	default:
		b := s.b
		f.busy = f.keeps == "" || s.loss != nil || s.limbo != nil || s.rerun != nil || s.due.id != nil || s.writing || !b.atRest || !b.line.empty() || b.asking.Load() != nil || b.cancelling > 0
	}
	return f
}

// fixedIn says why a connection cannot be handed to another process.
func fixedIn(c net.Conn) string {
	switch c.(type) {
	case *tls.Conn:
		return fixedTLS
	case *net.TCPConn:
		return ""
	}
	return fixedKind
}

// summoned says what the session is to do now; err, with askedOut, is what its client is told. It is for its goroutine, which is
// about to wait for the client, or did. mu is held.
func (s *session) summoned() (e errand, err error) {
	o := s.g.orders()
	if !o.handing && len(o.emptied) == 0 {
		return noErrand, nil
	}
	f := s.footing()
	if !o.handing && f.keeps == "" && !f.busy && o.emptied[s.last] && s.stuck() {
		f.site, f.keeps = s.last, keepsDiffers
	}
	e, why := f.errand(o)
	switch {
	case e != askedOut:
		return e, nil
	case unread(s.conn):
		return noErrand, nil // The client has asked for something: that first.
	case o.handing:
		err = fatalError(codeShutdown, "terminating connection: the gateway is restarted", "The session could not be handed over: "+why+".", "connect again")
	default:
		err = fatalError(codeShutdown, fmt.Sprintf("terminating connection: site %s is drained", f.site), "The session could not be moved to another site: "+why+".", "connect again")
	}
	return e, err
}

// stuck reports that a session without a backend would have its next transaction at the site of the last one, which is drained, because
// it may go nowhere else. mu is held.
func (s *session) stuck() bool {
	t, err := s.route()
	return err == nil && t.Site == s.last
}

// unread reports that bytes of the client's are there that nobody has read.
func unread(c net.Conn) bool {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if p, ok := c.(*prefixed); ok {
		c = p.Conn
	}
	t, ok := c.(*net.TCPConn)
	if !ok {
		return false
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return false
	}
	there := false
	_ = raw.Control(func(fd uintptr) {
		var one [1]byte
		n, _, err := syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		there = err == nil && n > 0
	})
	return there
}

// see tells what the session's goroutine was woken for, or did not begin to wait for the client for. An error is what the client is
// told before its session ends.
func (s *session) see() (e errand, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, err = s.summoned()
	s.linger = e == askedOut
	return e, err
}

// wake sees to what the session's goroutine was woken for: the loss of its server, or orders. An error ends the session.
func (s *session) wake(ctx context.Context) error {
	s.mu.Lock()
	lost := s.loss != nil
	s.mu.Unlock()
	if lost {
		return s.recover(ctx)
	}
	e, err := s.see()
	if e == handOver {
		return s.moveOut(ctx)
	}
	return err
}

// lingerMax bounds how long it is waited for a client to take its last words.
const lingerMax = time.Second

// hearOut lets the client take the last words: what it has sent meanwhile would make the system throw them away.
func hearOut(c net.Conn) {
	w, ok := c.(interface{ CloseWrite() error })
	if !ok || w.CloseWrite() != nil || c.SetReadDeadline(time.Now().Add(lingerMax)) != nil {
		return
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(c, 1<<20))
}

// asked1 is what a client with a connection of its own has asked for and has no answer of.
type asked1 struct {
	open   int  // messages whose ReadyForQuery is to come
	syncs  int  // of them Syncs
	parts  bool // messages were sent that no Sync has followed
	unsure bool // it cannot be told any more
	status byte // of the last ReadyForQuery; 0: there was none, which is as Idle
}

func (a *asked1) idle() bool {
	return a.open == 0 && !a.parts && !a.unsure && (a.status == 0 || a.status == pgwire.Idle)
}

// send notes a message of the client.
func (a *asked1) send(typ byte) {
	switch typ {
	case pgwire.Query, pgwire.FunctionCall:
		a.open++
		a.parts = false
	case pgwire.Sync:
		a.open++
		a.syncs++
		a.parts = false
	case pgwire.CopyDone, pgwire.CopyFail:
		// The server has ignored a Sync that came before the end of the data (copyfromparse.c, CopyGetData). Another one follows.
		switch {
		case a.syncs == 0:
		case a.open == 1:
			a.open, a.syncs, a.parts = 0, 0, true
		default:
			a.unsure = true
		}
	case pgwire.Terminate, pgwire.CopyData:
	default:
		a.parts = true
	}
}

// ready notes a ReadyForQuery.
func (a *asked1) ready(status byte) {
	a.status = status
	a.open = max(0, a.open-1)
	a.syncs = min(a.syncs, a.open)
}

// sendsAlone notes a message of a client with a connection of its own, before it is forwarded.
func (s *session) sendsAlone(typ byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked1.send(typ)
}

// readyAlone notes a ReadyForQuery for it that is on its way to the client.
func (s *session) readyAlone(status byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked1.ready(status)
	s.beckon()
}

// nextAlone waits for the next message of a client with a connection of its own, or of an administrator. An error may also be what
// the client is to be told before its session ends.
func (s *session) nextAlone() (byte, error) {
	for {
		if !s.park() {
			if _, err := s.see(); err != nil {
				return 0, err
			}
			continue
		}
		typ, _, err := s.r.Next(pgwire.FromClient)
		if !s.unpark() || err == nil {
			return typ, err
		}
	}
}

// errMoved means that another process has the client now.
var errMoved = errors.New("the session was handed over")
