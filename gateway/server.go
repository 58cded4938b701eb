package gateway

import (
	"container/list"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	rnd "math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/duri-io/duri/pgwire"
	"github.com/duri-io/duri/pgwire/scram"
)

// Mode is how long a client keeps a backend.
type Mode int

const (
	// SessionMode gives each client a backend of its own until it leaves; everything passes.
	SessionMode Mode = iota
	// TransactionMode lends a backend per transaction.
	TransactionMode
)

// Login is who wants what.
type Login struct {
	Database, User string
	// Params is the client's StartupMessage as servers get it, with user and database.
	Params []pgwire.Param

	key       string // Params as one string; those of logins by certificate differ from others
	certified bool   // by certificate, not with a password
}

// Replication reports whether the login is for a walsender.
func (l *Login) Replication() bool {
	for _, p := range l.Params {
		if p.Name == "replication" && p.Value != "false" && p.Value != "off" && p.Value != "no" && p.Value != "0" {
			return true
		}
	}
	return false
}

// Target is a server that may be used now.
type Target struct {
	Site             string
	Network, Address string // as net.Dial takes them
	// Epoch is the site's. Connections that were opened in an older one are not used again.
	Epoch uint64
	// History names what the server writes, so that a transaction's number means the same as long as it is equal. The gateway
	// only hands it on to Sites, with each Doubt.
	History string
}

// Wish is what a session wants of its next server.
type Wish struct {
	// Home is the site that the session has asked for by the parameter duri.home; empty: as the Router is configured.
	Home string
	// Last is the site of the session's latest transaction; empty: it has had none.
	Last string
	// Types are OIDs of user types that the session has seen, or named, until now.
	Types []uint32
}

// Router says which server the next session, or in TransactionMode the next transaction, goes to. It is called often and
// at the same time, and must not block. An error is told to the client, as 57P03, with its HintText if it has one.
type Router interface {
	Route(l *Login, w Wish) (Target, error)
}

// Verifiers gives the SCRAM verifiers of roles, as in pg_authid. A role that does not exist, may not log in or has no such
// verifier is nil without an error, and costs as much time as another.
type Verifiers interface {
	Verifier(ctx context.Context, user string) (*scram.Verifier, error)
}

// Config says how a Server works. What is zero has the default that its comment names.
type Config struct {
	Mode      Mode
	Router    Router
	Verifiers Verifiers
	// Sites lets the sessions of TransactionMode go on when a server is lost; nil: they end with it.
	Sites Sites
	// Reads, in TransactionMode with Sites, lets other sites than a session's home serve its reads; nil: none does.
	Reads Reads
	// Pace, in TransactionMode with Sites, delays transactions that write; nil: none is.
	Pace Pace
	// Standby, with Sites, gives the name under which a site's agent receives a database's WAL, as synchronous_standby_names
	// has it where commits wait for other sites; nil: transactions are marked in a way that takes longer.
	Standby func(database string) string
	// Dial connects to a target; nil: net.Dialer does. What it gives may be Secured.
	Dial func(ctx context.Context, t Target) (net.Conn, error)
	// Watch is told of each connection of a client, for as long as it is served here; it may end one whose client's host has vanished.
	// nil: nobody is.
	Watch func(client net.Conn) (stop func())
	// TLS is for clients; nil: none is offered. It must have exactly one certificate, to which channels are bound.
	TLS *tls.Config
	// ClientCAs sign the certificates with which clients may log in, without a password, as the user whose name is the common name;
	// nil: none is asked for. It needs TLS and DialAs, which connects to a target and logs in at the TLS of its server with a
	// certificate of a role. A LoginError says that this is not to be.
	ClientCAs *x509.CertPool
	DialAs    func(ctx context.Context, t Target, role string) (net.Conn, error)
	// ServerTLS is for servers; nil: none is asked for. An empty ServerName means the target's host.
	ServerTLS *tls.Config
	// Admit is asked before each login; an error refuses it, as 53400, with its HintText if it has one. It is where rates
	// are limited. nil admits everybody.
	Admit func(client net.Addr, user string) error
	// ClientsMax is how many clients there may be at once (1000), and how many connections that have not logged in yet: the oldest
	// of those is closed for a new one. CancelsMax is how many requests to cancel are under way at once (50); more are dropped.
	ClientsMax, CancelsMax int
	// LoginMax bounds a client's login, and the login at a server, each (1 minute).
	LoginMax time.Duration
	// In TransactionMode: PoolMax is how many connections there may be to one server for the same database, user and startup
	// parameters (20), HoldMax how long a session waits for one, or for a server that may be used, (15 s), IdleMax how long one is kept that nobody uses (10
	// minutes).
	PoolMax          int
	HoldMax, IdleMax time.Duration
	// Strict, in TransactionMode, takes every transaction to change the session: for databases with triggers, views or
	// operators that set parameters unseen. It costs a query to the server after each.
	Strict bool
	// LoginRate is how many logins per second an address may have in the long run (1000), ten times as many at once. Wrong
	// passwords are limited apart, per address and user.
	LoginRate int
	// Replay, with Sites, are the roles whose open transactions are run again at another site when theirs is lost, if all that
	// the client has seen of them comes out the same. Others get 40001.
	Replay []string
	// Admins are the roles that may use the database AdminDatabase, which is the gateway's own; Databases are those that its
	// commands know before a client has used them. Version says what runs.
	Admins, Databases []string
	Version           string
	// Reload, for the command RELOAD, reads the configuration again and calls SetLimits; nil: there is no such command.
	Reload func() error
	Log    *slog.Logger // slog.DiscardHandler's
}

// Server is a listener for clients that takes part in the protocol: it authenticates clients itself, logs in at servers
// with their keys, and knows each one's session. As a Door it is shut until Open is called. Methods may be called at any
// time.
type Server struct {
	cfg     Config
	binding []byte // of the certificate that clients see
	mock    []byte // secret of verifiers for users that do not exist
	cancels chan struct{}

	mu       sync.Mutex // guards the rest
	shut     string     // why it is shut; empty: it is open
	total    int64      // connections that were let in
	sessions map[uint32]*session
	conns    map[net.Conn]*list.Element // in strangers, until they have logged in
	// strangers are connections that have not logged in, the oldest first.
	strangers list.List
	pools     map[poolKey]*pool
	nextPID   uint32
	ending    atomic.Bool // set under mu

	backends  sync.WaitGroup // goroutines of pooled backends
	lastID    atomic.Uint64  // of sessions
	clock     atomic.Uint64  // of preparing: counts what clients prepare
	taints    sync.Map       // by database: *tainted
	crossings sync.Map       // by crossingKey: *crossing
	paces     paces
	// life ends with Serve: of what is done for several sessions.
	life        context.Context
	endLife     context.CancelFunc
	incarnation uint64 // random; part of the marks of transactions

	limits   atomic.Pointer[Limits]
	logins   meter
	wrong    meter
	floods   floods
	refusals counter // by SQLSTATE
	fates    counter
	periods  periods
	began    time.Time
	ops
	departures

	// Guarded by mu.
	clients map[*session]struct{} // that have logged in
	kept    map[tallyKey]Counts   // of pools that are gone
	tallies map[tallyKey]*tally
}

// NewServer makes a Server that is ready, but serves nobody yet.
func NewServer(cfg Config) (*Server, error) {
	if cfg.Router == nil || cfg.Verifiers == nil {
		return nil, errors.New("gateway: no router or no verifiers")
	}
	if (cfg.Reads != nil || cfg.Pace != nil) && (cfg.Sites == nil || cfg.Mode != TransactionMode) {
		return nil, errors.New("gateway: reads elsewhere and a pace for writers need TransactionMode and Sites")
	}
	for _, d := range []struct {
		n     *int
		value int
	}{{&cfg.CancelsMax, 50}} {
		if *d.n == 0 {
			*d.n = d.value
		}
	}
	for _, d := range []struct {
		d     *time.Duration
		value time.Duration
	}{{&cfg.LoginMax, time.Minute}} {
		if *d.d == 0 {
			*d.d = d.value
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	g := &Server{
		cfg: cfg, shut: justStarted, mock: make([]byte, 32), cancels: make(chan struct{}, cfg.CancelsMax),
		sessions: map[uint32]*session{}, conns: map[net.Conn]*list.Element{}, pools: map[poolKey]*pool{},
		floods: floods{log: cfg.Log}, began: time.Now(),
		ops: newOps(), clients: map[*session]struct{}{}, kept: map[tallyKey]Counts{}, tallies: map[tallyKey]*tally{},
	}
	g.life, g.endLife = context.WithCancel(context.Background())
	g.limits.Store(limitsOf(&cfg).complete())
	if cfg.Sites != nil {
		g.cfg.Sites = counted{cfg.Sites, &g.fates}
	}
	_, _ = rand.Read(g.mock) // It does not fail (crypto/rand).
	g.incarnation = rnd.Uint64()
	if cfg.ClientCAs != nil && (cfg.TLS == nil || cfg.DialAs == nil) {
		return nil, errors.New("gateway: logins by certificate need TLS and DialAs")
	}
	if cfg.TLS != nil {
		if len(cfg.TLS.Certificates) != 1 {
			return nil, fmt.Errorf("gateway: TLS with %d certificates, where one is needed to bind channels to", len(cfg.TLS.Certificates))
		}
		leaf, err := x509.ParseCertificate(cfg.TLS.Certificates[0].Certificate[0])
		if err != nil {
			return nil, fmt.Errorf("gateway: certificate for clients: %w", err)
		}
		g.binding = scram.EndPoint(leaf)
		g.cfg.TLS = cfg.TLS.Clone()
		g.cfg.TLS.NextProtos = []string{alpn}
		if cfg.ClientCAs != nil {
			askForCertificates(g.cfg.TLS, cfg.ClientCAs)
		}
	}
	return g, nil
}

// Serve takes clients on l, which it closes, until ctx ends. Then it tells the clients that are there and ends their
// connections, and returns when all is done.
func (g *Server) Serve(ctx context.Context, l net.Listener) error {
	var wg sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	ended := make(chan struct{})
	wg.Go(func() { g.keepTidy(ended) })
	var err error
	for {
		var c net.Conn
		if c, err = l.Accept(); err != nil {
			break
		}
		if g.add(c) {
			wg.Go(func() {
				defer g.remove(c)
				defer g.watch(c)()
				g.serve(ctx, c)
			})
		}
	}
	close(ended)
	g.endLife()
	g.endAll()
	wg.Wait()
	g.tidy(time.Now().Add(time.Hour))
	g.backends.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return errors.Join(err, l.Close())
}

func (g *Server) add(c net.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ending.Load() {
		_ = c.Close()
		return false
	}
	// Whoever does not log in must not keep those out who do. A login takes a moment only, so the oldest stranger is the one that
	// is least likely to become a client.
	if g.strangers.Len() >= g.lim().ClientsMax {
		oldest := g.strangers.Remove(g.strangers.Front()).(net.Conn)
		g.conns[oldest] = nil
		_ = oldest.Close() // and its goroutine ends
	}
	g.conns[c] = g.strangers.PushBack(c)
	return true
}

func (g *Server) watch(c net.Conn) (stop func()) {
	if g.cfg.Watch == nil {
		return func() {}
	}
	if a, ok := c.(*arrival); ok {
		c = a.Conn
	}
	return g.cfg.Watch(c)
}

func (g *Server) remove(c net.Conn) {
	_ = c.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	if e := g.conns[c]; e != nil {
		g.strangers.Remove(e)
	}
	delete(g.conns, c)
}

// endAll wakes all clients' goroutines; they see ending.
func (g *Server) endAll() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ending.Store(true)
	for c := range g.conns {
		_ = c.SetReadDeadline(time.Unix(1, 0)) // the connection may have ended
	}
}

// register gives a session the key by which it can be cancelled.
func (g *Server) register(s *session) {
	_, _ = rand.Read(s.secret[:]) // It does not fail (crypto/rand).
	g.mu.Lock()
	defer g.mu.Unlock()
	for {
		g.nextPID = g.nextPID%(1<<31-1) + 1 // positive, as clients expect
		if g.sessions[g.nextPID] == nil {
			break
		}
	}
	s.pid = g.nextPID
	g.sessions[s.pid] = s
}

func (g *Server) unregister(s *session) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.sessions, s.pid)
}

func (g *Server) session(pid uint32) *session {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.sessions[pid]
}

// Open lets clients in.
func (g *Server) Open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut != "" {
		g.cfg.Log.Info("clients are let in")
	}
	g.shut = ""
}

// Shut refuses clients, with the reason, and ends the connections of those that are in. When it returns, nothing that a
// server sends reaches a client any more.
func (g *Server) Shut(why string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut == "" {
		g.cfg.Log.Warn("clients are shut out", "why", why, "connections", len(g.conns))
	}
	g.shut = why
	for c := range g.conns {
		_ = c.Close() // the client may have closed it already
	}
}

// Status says whether it is open, why not, how many connections there are, and how many were let in.
func (g *Server) Status() (shut string, now int, total int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.shut, len(g.conns), g.total
}

// admit lets a connection in, or says why not. Who was let in before it was shut was disconnected by that.
func (g *Server) admit(database string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.ending.Load():
		return errShutdown
	case database == AdminDatabase && len(g.clients) < g.lim().ClientsMax+adminsMore:
		return nil // Who looks after it is let in when it is shut or full.
	case g.shut != "":
		return fatalError(codeNoSite, shutOut+g.shut, "", shutHint)
	case len(g.clients) >= g.lim().ClientsMax:
		return errTooMany
	}
	g.total++
	return nil
}

var errTooMany = fatalError(codeTooMany, "the gateway has as many clients as it may", "", "try again, or raise the limit of clients")

// serve is a client's connection from its first byte to its last.
func (g *Server) serve(ctx context.Context, raw net.Conn) {
	if a, ok := raw.(*arrival); ok {
		g.serveArrival(ctx, a)
		return
	}
	_ = raw.SetDeadline(time.Now().Add(g.cfg.LoginMax)) // a connection that has ended shows at the first read
	loginCtx, cancel := context.WithTimeout(ctx, g.cfg.LoginMax)
	defer cancel()
	conn, start, err := g.greet(loginCtx, raw)
	if err != nil {
		return // before it said who it is; there is nobody to tell
	}
	if start.Kind == pgwire.StartupCancel {
		g.cancel(loginCtx, start)
		return
	}
	s := newSession(g, conn)
	defer s.close()
	if err := s.login(loginCtx, start); err != nil {
		s.refuse(err)
		return
	}
	ctx, s.kill = context.WithCancel(ctx)
	defer s.kill()
	if err := g.enter(s, raw); err != nil {
		s.refuse(err)
		return
	}
	defer g.leave(s)
	s.run(ctx, loginCtx)
}

// enter notes that a client has logged in, and leave that it has left. While it did, others may have taken the last places.
func (g *Server) enter(s *session, c net.Conn) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	most := g.lim().ClientsMax
	if s.who.Database == AdminDatabase {
		most += adminsMore
	}
	if len(g.clients) >= most {
		return errTooMany
	}
	if e := g.conns[c]; e != nil {
		g.strangers.Remove(e)
		g.conns[c] = nil
	}
	g.clients[s] = struct{}{}
	return nil
}

func (g *Server) leave(s *session) {
	g.unregister(s)
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.clients, s)
}

// keepTidy does what is to be done now and then, until ended is closed.
func (g *Server) keepTidy(ended <-chan struct{}) {
	g.periods.turn(time.Now(), func() map[string]Counts { return byDatabase(g.Tallies()) })
	tick := time.NewTimer(0)
	defer tick.Stop()
	tidied := time.Now()
	for {
		tick.Reset(min(time.Second, g.lim().IdleMax/10))
		select {
		case now := <-tick.C:
			g.periods.turn(now, func() map[string]Counts { return byDatabase(g.Tallies()) })
			g.floods.sum(now, now.Add(-quietFor))
			if idle := g.lim().IdleMax; now.Sub(tidied) >= idle/10 {
				g.tidy(now.Add(-idle))
				tidied = now
			}
		case <-ended:
			return
		}
	}
}
