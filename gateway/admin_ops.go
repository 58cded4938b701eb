package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// ops is what administrators have ordered. Guarded by Server.mu.
type ops struct {
	paused   map[string]bool // databases; everyDatabase: all of them
	disabled map[string]bool
	resumed  chan struct{} // closed when something is resumed
}

func newOps() ops {
	return ops{paused: map[string]bool{}, disabled: map[string]bool{}, resumed: make(chan struct{})}
}

// everyDatabase stands for all databases, those included that nobody has used yet.
const everyDatabase = ""

// pausedNow reports whether a database is paused. g.mu is held.
func (g *Server) pausedNow(database string) bool {
	return g.paused[everyDatabase] || g.paused[database]
}

// isPaused reports whether a database is paused, and gives what is closed when that may have changed.
func (g *Server) isPaused(database string) (bool, <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.pausedNow(database), g.resumed
}

func (p *pool) isPaused() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.paused
}

// enabled says why a client that has logged in may not use its database.
func (g *Server) enabled(database string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.disabled[database] {
		return fatalError(codeNoSite, fmt.Sprintf("database %q is disabled at this gateway", database), "", "connect to another gateway, or ENABLE it in the database "+AdminDatabase)
	}
	return nil
}

func errPaused(database string, waited time.Duration) error {
	return fatalError(codeNoSite, fmt.Sprintf("database %q is paused", database), fmt.Sprintf("The session has waited for %v.", waited),
		"RESUME it in the database "+AdminDatabase+", or connect to another gateway")
}

// hold waits as long as the database is paused, no longer than HoldMax. No lock is held.
func (s *session) hold(ctx context.Context) error {
	limit := s.g.lim().HoldMax
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	waited := s.waits()
	defer waited(nil)
	for {
		paused, changed := s.g.isPaused(s.who.Database)
		if !paused {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errShutdown
		case <-timeout.C:
			return errPaused(s.who.Database, limit)
		}
	}
}

// holdPinned holds the next transaction of a session that keeps its backend while its database is paused. s.mu is held, and
// let go meanwhile.
func (s *session) holdPinned(ctx context.Context) error {
	for s.b != nil && s.b.atRest && !s.writing && s.b.pool.isPaused() {
		s.mu.Unlock()
		err := s.hold(ctx)
		s.mu.Lock()
		if err != nil {
			return err
		}
	}
	return nil
}

// holdAlone is the same for a session that is about to get a backend of its own.
func (s *session) holdAlone(ctx context.Context) error {
	if paused, _ := s.g.isPaused(s.who.Database); !paused {
		return nil
	}
	return s.hold(ctx)
}

// poolsOf gives the pools of a database, and sessionsOf the clients that have logged in to it.
func (g *Server) poolsOf(database string) []*pool {
	return slices.DeleteFunc(g.allPools(), func(p *pool) bool { return database != everyDatabase && p.tally.database != database })
}

func (g *Server) sessionsOf(database string) []*session {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.DeleteFunc(slices.Collect(maps.Keys(g.clients)), func(s *session) bool {
		return s.who.Database == AdminDatabase || database != everyDatabase && s.who.Database != database
	})
}

// known reports whether a database has been heard of.
func (g *Server) known(database string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Contains(g.databases(), database)
}

// databases are those that have been heard of. g.mu is held.
func (g *Server) databases() []string {
	names := slices.Clone(g.cfg.Databases)
	for _, p := range g.pools {
		names = append(names, p.tally.database)
	}
	for s := range g.clients {
		if s.who.Database != AdminDatabase {
			names = append(names, s.who.Database)
		}
	}
	for _, set := range []map[string]bool{g.paused, g.disabled} {
		for name := range set {
			if name != everyDatabase {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// setPaused begins or ends a pause; changed is false if it was so before.
func (g *Server) setPaused(database string, paused bool) (changed bool) {
	g.mu.Lock()
	if g.paused[database] == paused {
		g.mu.Unlock()
		return false
	}
	if paused {
		g.paused[database] = true
	} else {
		delete(g.paused, database)
		close(g.resumed)
		g.resumed = make(chan struct{})
	}
	// Under g.mu, so that of two orders at once the later one counts; pools that are made afterwards see it.
	for _, p := range g.pools {
		p.mu.Lock()
		if p.paused = g.pausedNow(p.tally.database); p.paused {
			p.expire(time.Now().Add(time.Hour))
		}
		p.wake()
		p.mu.Unlock()
	}
	g.mu.Unlock()
	if t := g.taking.Load(); t != nil && !t.over() {
		t.tellPaused(g)
	}
	return true
}

// lookEvery is how often a command that waits looks whether it is through.
const lookEvery = 5 * time.Millisecond

// awaitDone waits until done says so.
func awaitDone(ctx context.Context, done func() bool) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

var errCanceled = errors.New("canceled")

// pause holds new transactions, and waits until those under way are through. One that is cancelled is taken back. It gives
// how many sessions keep a connection, idle, because of what they have in it.
func (g *Server) pause(ctx context.Context, database string) (pinned int, err error) {
	begun := g.setPaused(database, true)
	err = awaitDone(ctx, func() bool {
		var busy int
		busy, pinned = g.underWay(database)
		stillPaused, _ := g.isPaused(database)
		return busy == 0 || !stillPaused
	})
	if err != nil {
		if begun {
			g.setPaused(database, false)
		}
		return 0, errCanceled
	}
	return pinned, nil
}

// underWay counts the connections of a database that are in a transaction or being opened, and those that a pinned session
// has that does nothing.
func (g *Server) underWay(database string) (busy, pinned int) {
	for _, p := range g.poolsOf(database) {
		p.mu.Lock()
		busy += p.open
		p.mu.Unlock()
	}
	for _, s := range g.sessionsOf(database) {
		s.mu.Lock()
		switch {
		case s.b == nil:
		case s.b.pool == nil:
			if !s.who.Replication() {
				busy++ // A session with a backend of its own is through when it leaves.
			}
		case s.b.atRest && !s.writing && s.b.asking.Load() == nil:
			pinned++
		}
		s.mu.Unlock()
	}
	return max(0, busy-pinned), pinned
}

var errKilled = fatalError(codeShutdown, "the connection was ended by KILL", "", "connect again when the database was resumed")

// killAll ends the sessions of a database, and its connections, and pauses it.
func (g *Server) killAll(database string) (sessions int) {
	g.setPaused(database, true)
	for _, s := range g.sessionsOf(database) {
		s.killed.Store(true)
		_ = s.conn.SetReadDeadline(time.Unix(1, 0)) // it may have left
		s.kill()
		sessions++
	}
	return sessions
}

// reconnect lets no connection that is there now be used again.
func (g *Server) reconnect(database string) {
	now := time.Now()
	for _, p := range g.poolsOf(database) {
		p.mu.Lock()
		p.renew = now
		p.expire(time.Time{})
		p.mu.Unlock()
	}
}

// waitClose waits until the connections that are not to be used again are closed.
func (g *Server) waitClose(ctx context.Context, database string) error {
	err := awaitDone(ctx, func() bool {
		for _, p := range g.poolsOf(database) {
			p.mu.Lock()
			old := false
			for b := range p.all {
				old = old || p.stale(b)
			}
			p.mu.Unlock()
			if old {
				return false
			}
		}
		return true
	})
	if err != nil {
		return errCanceled
	}
	return nil
}

// order is what an administrator asks for. It answers with the command's tag, and what else is to be said.
func (g *Server) order(ctx context.Context, verb, database string) (notice string, err error) {
	all := database == everyDatabase
	switch verb {
	case "pause", "resume", "reconnect", "wait_close":
	case "kill", "disable", "enable":
		if all {
			return "", adminError("42601", "a database is required", verb+" DATABASE")
		}
	}
	switch {
	case database == AdminDatabase:
		return "", adminError(codeUnsupported, fmt.Sprintf("database %q is the gateway's own", database), "name a database of a server")
	case !all && !g.known(database):
		return "", adminError("3D000", fmt.Sprintf("no such database: %s", database), "see SHOW DATABASES")
	}
	switch verb {
	case "pause":
		pinned, err := g.pause(ctx, database)
		if err != nil {
			return "", adminError("57014", "canceling PAUSE: clients go on", "")
		}
		if pinned > 0 {
			notice = fmt.Sprintf("%d sessions keep their connections, idle: see SHOW duri.pins", pinned)
		}
		g.cfg.Log.Info("paused", "database", database)
	case "resume":
		if !g.setPaused(database, false) {
			what := "database " + database
			if all {
				what = "the gateway"
			}
			return "", adminError("55000", what+" is not paused", "see SHOW DATABASES")
		}
		g.cfg.Log.Info("resumed", "database", database)
	case "kill":
		g.cfg.Log.Warn("sessions were killed", "database", database, "sessions", g.killAll(database))
		notice = fmt.Sprintf("database %s is paused: RESUME lets clients in again", database)
	case "disable", "enable":
		g.mu.Lock()
		if verb == "disable" {
			g.disabled[database] = true
		} else {
			delete(g.disabled, database)
		}
		g.mu.Unlock()
		g.cfg.Log.Info(verb+"d", "database", database)
	case "reconnect":
		g.reconnect(database)
		g.cfg.Log.Info("connections are renewed", "database", database)
	case "wait_close":
		if g.waitClose(ctx, database) != nil {
			return "", adminError("57014", "canceling WAIT_CLOSE", "")
		}
	}
	return notice, nil
}

// adminError is an error in the database AdminDatabase, after which the session goes on.
func adminError(code, message, hint string) *pgwire.Error {
	return &pgwire.Error{Severity: "ERROR", Code: code, Message: message, Hint: hint}
}
