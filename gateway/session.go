package gateway

import (
	"context"
	"crypto/subtle"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/duri-io/duri/pgwire"
	"github.com/duri-io/duri/pgwire/scram"
)

var errShutdown = fatalError(codeShutdown, "the gateway is shutting down", "", "connect again")

// session is a client's. Its goroutine reads what the client sends; what a server answers is written to the client by the
// goroutine of the backend.
type session struct {
	g    *Server
	conn net.Conn
	r    *pgwire.Reader
	w    *pgwire.Writer // of the session's goroutine while there is no backend, else of the backend's
	who  Login
	keys *scram.Keys

	pid    uint32 // by which the client cancels
	secret [4]byte

	mu     sync.Mutex
	b      *backend    // which works for the session now; guarded by mu
	ending atomic.Bool // what the server does now is not told to the client any more

	borrowing
	recovery
	roaming
	tallying
	parting

	kill    func()                 // ends it
	killed  atomic.Bool            // by KILL
	command atomic.Pointer[func()] // ends the command of an administrator that is under way
}

func newSession(g *Server, conn net.Conn) *session {
	s := &session{g: g, conn: conn, r: pgwire.NewReader(conn), w: pgwire.NewWriter(conn)}
	s.since = time.Now()
	s.id, s.client = g.lastID.Add(1), s.r
	s.changed.L = &s.mu
	s.flight.status = pgwire.Idle
	return s
}

// close ends everything and forgets the keys.
func (s *session) close() {
	_ = s.w.Flush()
	if s.linger {
		hearOut(s.conn)
	}
	_ = s.conn.Close()
	s.r.Drop()
	s.client.Drop()
	if s.keys != nil {
		s.keys.Zero()
	}
}

// refuse tells the client what ends its session. No backend may be attached.
func (s *session) refuse(err error) {
	switch {
	case s.g.ending.Load():
		err = errShutdown
	case s.killed.Load():
		err = errKilled
	default:
		s.g.refused(s, err)
	}
	_ = s.conn.SetWriteDeadline(time.Now().Add(helloMax)) // it may not listen any more
	_ = s.send(report(err))
}

// knows compares the secret of a request to cancel.
func (s *session) knows(secret []byte) bool {
	return subtle.ConstantTimeCompare(secret, s.secret[:]) == 1
}

// busy gives the backend that works for the session, if one does. done must be called when the request to cancel is
// through.
func (s *session) busy() (b *backend, done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.b == nil || s.b.pool == nil {
		return s.b, func() {}
	}
	return s.busyBorrowed()
}

// run serves the client after its login.
func (s *session) run(ctx, loginCtx context.Context) {
	switch err := s.g.enabled(s.who.Database); {
	case err != nil:
		s.refuse(err)
		return
	case s.who.Database == AdminDatabase:
		s.runAdmin(ctx)
		return
	}
	if s.g.cfg.Mode == TransactionMode && !s.who.Replication() {
		s.runBorrowing(ctx)
	} else {
		s.runAlone(ctx, loginCtx)
	}
}

// runAlone serves the client with a backend of its own.
func (s *session) runAlone(ctx, loginCtx context.Context) {
	if err := s.holdAlone(loginCtx); err != nil {
		s.refuse(err)
		return
	}
	target, err := s.route()
	if err != nil {
		s.refuse(err)
		return
	}
	b, err := s.g.dial(loginCtx, target, &s.who, s.keys)
	if err != nil {
		s.refuse(err)
		return
	}
	defer b.close()
	if err := s.begin(b.initial); err != nil {
		s.refuse(err)
		return
	}
	s.mu.Lock()
	s.b, s.site, b.received = b, target.Site, b.r.Received()
	s.mu.Unlock()
	s.counting = s.g.alone(&s.who, target.Site)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.answerAll(b)
	}()
	stop := context.AfterFunc(ctx, func() { // This goroutine may wait for the server, or the server's for the client.
		s.ending.Store(true)
		_ = b.conn.Close()
	})
	defer stop()
	err = s.forwardAll(b)
	s.ending.Store(true)
	_ = s.conn.SetWriteDeadline(time.Now().Add(helloMax)) // A client that does not read holds nothing up any more.
	_ = b.conn.Close()
	<-ended
	if err != nil || s.g.ending.Load() || s.killed.Load() {
		s.refuse(err)
	}
}

// route asks where to go now.
func (s *session) route() (Target, error) {
	target, err := s.g.cfg.Router.Route(&s.who, Wish{Home: s.home, Last: s.last, Types: s.types})
	if err != nil {
		return Target{}, fatalError(codeNoSite, err.Error(), "", hintOf(err))
	}
	return target, nil
}

// begin tells the client that it may begin.
func (s *session) begin(params []pgwire.Param) error {
	s.g.register(s)
	var m []byte
	for _, p := range params {
		m = pgwire.AppendParameterStatus(m, p)
	}
	m = pgwire.AppendBackendKeyData(m, s.pid, s.secret[:])
	if err := s.send(pgwire.AppendReadyForQuery(m, pgwire.Idle)); err != nil {
		return err
	}
	if err := s.conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	if s.g.ending.Load() { // The deadline that was to wake us may be the one that we have just taken away.
		return errShutdown
	}
	return nil
}

// forwardAll hands everything on that the client sends, until it leaves; an error is for the client.
func (s *session) forwardAll(b *backend) error {
	for {
		typ, err := s.nextAlone()
		if err != nil {
			return s.readError(err)
		}
		s.sendsAlone(typ)
		if s.r.Forward(b.w) != nil {
			return nil // The client has gone, or the server, which the backend's goroutine tells it.
		}
		if typ == pgwire.Terminate || !s.r.Complete() {
			s.aloneAsked()
			if b.w.Flush() != nil || typ == pgwire.Terminate {
				return nil
			}
		}
	}
}

// readError is what a client is told about the end of what it sends; nil when it has gone.
func (s *session) readError(err error) error {
	switch {
	case s.g.ending.Load():
		return errShutdown
	case s.killed.Load():
		return errKilled
	}
	if v, ok := errors.AsType[*pgwire.ProtocolError](err); ok {
		return fatalError(codeProtocol, v.Error(), "", "")
	}
	var ours *pgwire.Error
	var theirs *serverError
	if errors.As(err, &ours) || errors.As(err, &theirs) {
		return err
	}
	return nil
}

// answerAll hands everything on that the server sends. When the server is lost it tells the client, and ends its
// connection.
func (s *session) answerAll(b *backend) {
	toldWhy := false
	for {
		typ, _, err := b.r.Next(pgwire.FromServer)
		if err != nil {
			if !s.ending.Load() && !toldWhy {
				_ = s.w.Write(report(lost(b.target, "it has a backend of its own (session mode)", err.Error())))
			}
			break
		}
		toldWhy = typ == pgwire.ErrorResponse && isFatal(b.r)
		var status []byte
		if typ == pgwire.ReadyForQuery {
			s.aloneAnswered(b, s.counting)
			status, _ = b.r.Peek(1)
			status = slices.Clone(status)
		}
		if err := b.r.Forward(s.w); err != nil {
			break // inside a message nothing can be told
		}
		if !b.r.Complete() {
			if err := s.w.Flush(); err != nil {
				break
			}
		}
		if len(status) > 0 {
			s.readyAlone(status[0])
		}
	}
	if !s.ending.Load() {
		_ = s.w.Flush()
		_ = s.conn.Close()
	}
}

// isFatal looks whether an ErrorResponse says that the server ends the connection.
func isFatal(r *pgwire.Reader) bool {
	e := errorOf(r)
	return e.Severity == "FATAL" || e.Severity == "PANIC"
}

// errorOf looks into an ErrorResponse without consuming it. One that is too long to be looked into is empty.
func errorOf(r *pgwire.Reader) *pgwire.Error {
	body, err := r.Peek(min(r.Left(), pgwire.BufferSize))
	if err != nil {
		return &pgwire.Error{}
	}
	e, err := pgwire.ParseError(body)
	if err != nil {
		return &pgwire.Error{}
	}
	return e
}
