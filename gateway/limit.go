package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// Limits are what may be changed while a Server works. What is zero has the default that Config names for it.
type Limits struct {
	ClientsMax, PoolMax int
	HoldMax, IdleMax    time.Duration
	Strict              bool
	LoginRate           int
	Admins              []string
	Replay              []string
}

// limitsOf takes the limits out of a configuration.
func limitsOf(cfg *Config) Limits {
	return Limits{cfg.ClientsMax, cfg.PoolMax, cfg.HoldMax, cfg.IdleMax, cfg.Strict, cfg.LoginRate, cfg.Admins, cfg.Replay}
}

// complete fills in the defaults.
func (l Limits) complete() *Limits {
	l.ClientsMax = cmp.Or(l.ClientsMax, 1000)
	l.PoolMax = cmp.Or(l.PoolMax, 20)
	l.HoldMax = cmp.Or(l.HoldMax, 15*time.Second)
	l.IdleMax = cmp.Or(l.IdleMax, 10*time.Minute)
	l.LoginRate = cmp.Or(l.LoginRate, 1000)
	l.Admins, l.Replay = slices.Clone(l.Admins), slices.Clone(l.Replay)
	return &l
}

// Limits gives those in force.
func (g *Server) Limits() Limits { return *g.limits.Load() }

// lim is Limits for the hot path; it is not changed.
func (g *Server) lim() *Limits { return g.limits.Load() }

// SetLimits changes the limits. Clients that are there stay: a pool that has more connections than it may closes them as
// they are given back, and one that may have more lets those that wait go on. Who waits already waits as long as it was to.
func (g *Server) SetLimits(l Limits) {
	g.limits.Store(l.complete())
	for _, p := range g.allPools() {
		p.mu.Lock()
		p.wake()
		p.mu.Unlock()
	}
}

// A wrong password counts against its user and address alone: wrongPerSecond may be tried in the long run, wrongAtOnce one
// after the other.
const (
	wrongPerSecond = 2
	wrongAtOnce    = 20
	// burstS is for how many seconds' worth of logins an address may come at once.
	burstS = 10
	// knownMax bounds how many addresses are remembered.
	knownMax = 20_000
)

// meter limits how often something happens per key, as a token bucket. Its methods may be called at any time.
type meter struct {
	mu   sync.Mutex // guards seen
	seen map[string]bucket
}

type bucket struct {
	left float64 // at the time at
	at   time.Time
}

// filled is what is in a bucket now. One that nothing was taken from is full.
func (m *meter) filled(key string, rate, burst float64, now time.Time) float64 {
	b, ok := m.seen[key]
	if !ok {
		return burst
	}
	return min(burst, b.left+rate*max(0, now.Sub(b.at).Seconds()))
}

// may reports whether something may happen now, without that it does.
func (m *meter) may(key string, rate, burst float64, now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.filled(key, rate, burst, now) >= 1
}

// take lets it happen, if it may.
func (m *meter) take(key string, rate, burst float64, now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	left := m.filled(key, rate, burst, now)
	if left < 1 {
		return false
	}
	if m.seen == nil {
		m.seen = map[string]bucket{}
	}
	if _, ok := m.seen[key]; !ok && len(m.seen) >= knownMax {
		m.forget(rate, burst, now)
	}
	m.seen[key] = bucket{left - 1, now}
	return true
}

// forget makes room: full buckets say nothing. When there are none, any half of them goes, so that nobody who comes from
// many addresses can make the table grow.
func (m *meter) forget(rate, burst float64, now time.Time) {
	for key := range m.seen {
		if m.filled(key, rate, burst, now) >= burst {
			delete(m.seen, key)
		}
	}
	for key := range m.seen {
		if len(m.seen) <= knownMax/2 {
			return
		}
		delete(m.seen, key)
	}
}

// place is what logins are counted by: an address, or the network of one of IPv6.
func place(a net.Addr) string {
	if a == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String() // a Unix-domain socket
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return host
	}
	if ip = ip.Unmap().WithZone(""); ip.Is6() {
		if p, err := ip.Prefix(64); err == nil {
			return p.String()
		}
	}
	return ip.String()
}

// admitLogin limits logins per address, and wrong passwords per address and user.
func (g *Server) admitLogin(s *session) error {
	now, from := time.Now(), place(s.conn.RemoteAddr())
	rate := float64(g.lim().LoginRate)
	if !g.wrong.may(from+" "+s.who.User, wrongPerSecond, wrongAtOnce, now) {
		return fatalError(codeRate, fmt.Sprintf("too many wrong passwords for user %q from %s", s.who.User, from), "", "correct the password, and try again in a moment")
	}
	if !g.logins.take(from, rate, burstS*rate, now) {
		return fatalError(codeRate, fmt.Sprintf("too many logins from %s", from), fmt.Sprintf("No more than %d per second are allowed.", g.lim().LoginRate),
			"keep connections open, or raise gateway.login_rate")
	}
	return nil
}

// wrongPassword counts one.
func (g *Server) wrongPassword(s *session) {
	g.wrong.take(place(s.conn.RemoteAddr())+" "+s.who.User, wrongPerSecond, wrongAtOnce, time.Now())
}

// quietFor is how long the same is not logged again.
const quietFor = time.Minute

// floods logs what may happen many times a second: the first of a kind at once, then how many there were in each minute.
type floods struct {
	log *slog.Logger

	mu    sync.Mutex // guards kinds
	kinds map[string]*flood
	lost  int // that were not even counted, as there were too many kinds
}

type flood struct {
	at    time.Time // when the last line was logged
	count int       // since then
	msg   string
	args  []any // of the last
}

// warn logs msg, unless one of the same kind was logged within quietFor.
func (f *floods) warn(kind, msg string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	k := f.kinds[kind]
	switch {
	case k != nil:
		k.count++
		k.msg, k.args = msg, args
		return
	case len(f.kinds) >= knownMax:
		f.lost++
		return
	case f.kinds == nil:
		f.kinds = map[string]*flood{}
	}
	f.kinds[kind] = &flood{at: time.Now()}
	f.log.Warn(msg, args...)
}

// sum logs how many more there were of the kinds that were logged last before a time, and forgets those that have stopped.
func (f *floods) sum(now, before time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for kind, k := range f.kinds {
		switch {
		case k.at.After(before):
		case k.count == 0:
			delete(f.kinds, kind)
		default:
			f.log.Warn(k.msg, append(slices.Clone(k.args), "times", k.count, "within", now.Sub(k.at).Round(time.Second))...)
			k.at, k.count = now, 0
		}
	}
	if f.lost > 0 {
		f.log.Warn("refusals from so many addresses that they are not counted apart", "times", f.lost)
		f.lost = 0
	}
}

// refused logs why a client was not let in, or was sent away. That its connection broke during the login is its own affair.
func (g *Server) refused(s *session, err error) {
	var code, msg string
	if e, ok := asWireError(err); ok {
		code, msg = e.Code, e.Message
	} else if e, ok := errors.AsType[*pgwire.ProtocolError](err); ok {
		code, msg = codeProtocol, e.Error()
	} else {
		return
	}
	from, what := place(s.conn.RemoteAddr()), "a client was refused"
	if s.pid == 0 {
		g.refusals.count(code)
	} else {
		what = "a session was ended"
	}
	g.floods.warn(code+" "+what+" "+from, what, "address", from, "user", s.who.User, "database", s.who.Database, "sqlstate", code, "why", msg)
}
