package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/link"
)

// An agent is restarted without its clients' noticing. Two cannot work on one data directory, so the new one is only a gateway at first:
// it gets the listening socket and the clients as a gateway that runs alone does, and reaches its own site through the old one. When it
// has them all, it begins nothing there any more, and the old one ends as ever. Meanwhile sessions go on at other sites, or wait. Not
// before the old process is dead does the new one open anything, and is an agent.

// TakeOver is Run in the place of the agent of the same data directory that runs, whose clients it takes over. Where none runs, it is Run.
// drain bounds how long the running one waits for sessions that cannot be handed over; 0: DefaultDrain.
func (a *Agent) TakeOver(ctx context.Context, drain time.Duration) error {
	ctx, a.finish = context.WithCancel(ctx)
	defer a.finish()
	if a.cfg.Gateway.Mode == config.GatewayDoor || a.cfg.Gateway.Listen == "" {
		return &hinted{"an agent that has no sessions of clients cannot be taken over", "it needs gateway.listen, and gateway.mode session or transaction; or start it without --takeover when the running one has ended"}
	}
	path := ControlSocket(a.cfg.DataDir)
	r := a.takeoverRequest(drain)
	t, pid, err := askTakeover(ctx, path, r, 1)
	if err != nil {
		return err
	}
	if t != nil {
		return a.succeed(ctx, t, pid, r.drain())
	}
	if err := a.nobodyListens(ctx, path); err != nil {
		return err
	}
	a.log.Info("there is no agent to be taken over: this is an ordinary start", "control", path)
	return a.run(ctx)
}

// nobodyListens refuses to take an agent for absent that has only another data directory.
func (a *Agent) nobodyListens(ctx context.Context, path string) error {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", a.cfg.Listen)
	if err != nil {
		return &hinted{
			fmt.Sprintf("there is no agent to be taken over at %s, and another process has its port: listen for other agents: %v", path, err),
			"take an agent over with its own data_dir, as the same user; or end what uses the port",
		}
	}
	return ln.Close()
}

func (a *Agent) takeoverRequest(drain time.Duration) takeoverRequest {
	r := newTakeoverRequest(a.cfg, kindAgent, a.version, drain)
	r.Link = a.cfg.Listen
	return r
}

// localAddress is where a process of this machine reaches one that listens on an address.
func localAddress(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if ip := net.ParseIP(host); err != nil || host != "" && (ip == nil || !ip.IsUnspecified()) {
		return listen
	}
	return net.JoinHostPort("localhost", port)
}

// succeed takes over, and is the agent then.
func (a *Agent) succeed(ctx context.Context, t *gateway.Takeover, pid int, drain time.Duration) (err error) {
	var old *mortal
	if pid > 0 {
		if old, err = mortalOf(pid); err != nil {
			a.log.Debug("the end of the running agent is seen by its port", "error", err)
		} else {
			defer old.close()
		}
	}
	a.former, err = link.NewClient(link.ClientConfig{
		Address: localAddress(a.cfg.Listen), Peer: a.self.Name, TLS: a.clientT, ClusterID: a.cfg.Cluster.ID, Site: a.self.Name, Now: now, Logger: a.log.With("peer", a.self.Name),
	})
	if err != nil {
		return errors.Join(err, t.Close())
	}
	defer func() { err = errors.Join(err, a.former.Close()) }()
	a.onClients = t.Listeners[0]
	if err := a.newDoor(); err != nil {
		return errors.Join(err, t.Close(), a.closeClients())
	}
	d := a.door.(*served) // TakeOver has looked at the configuration
	s := &succession{a: a, d: d, f: a.host.former, old: old, drain: drain}
	leave := d.sites.leave
	d.sites.leave = func(site string, yes bool) { leave(site, yes || site == a.self.Name && s.f.leaving()) }
	t.Leave = s.leave
	t.Prepare(d.Server)
	a.log.Info("the running agent is taken over", "pid", t.PID(), "clients", a.onClients.Addr().String(), "drain", drain)
	g, ctx := errgroup.WithContext(ctx)
	ready := make(chan struct{})
	g.Go(func() error {
		return serveGateway(ctx, d.Server, d.sites, a.onClients, func() { close(ready) })
	})
	g.Go(func() error {
		s.gate(ctx)
		return nil
	})
	g.Go(func() error {
		<-ready // serveGateway sees to it, also when ctx ends
		if err := s.follow(ctx, t); err != nil {
			return errors.Join(err, a.closeClients())
		}
		return a.run(ctx)
	})
	if err = g.Wait(); errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}

// succession is the way from one agent to the next, in the process of the next.
type succession struct {
	a     *Agent
	d     *served
	f     *former
	old   *mortal // nil: it cannot be watched
	drain time.Duration
}

const (
	// tellLeft is how often the log tells what is left at the former agent.
	tellLeft = 5 * time.Second
	// patience is how long the end of the former agent is waited for until the log says that it does not end, and patienceAgain until it
	// says so again.
	patience      = 10 * time.Second
	patienceAgain = time.Minute
	// enterMax bounds how long it is waited for clients that log in.
	enterMax = time.Second
	// letGoMax bounds how long a process that ends may need to close its files; letGoEvery is how often it is looked.
	letGoMax   = 5 * time.Second
	letGoEvery = 20 * time.Millisecond
	// catchUpMax bounds how long it is waited until the other sites have what was committed here.
	catchUpMax = 5 * time.Second
)

// follow returns when the former agent's process has ended.
func (s *succession) follow(ctx context.Context, t *gateway.Takeover) error {
	done := make(chan struct{})
	go s.tell(done)
	err := t.Run(ctx, s.d.Server)
	close(done)
	s.f.advance(formerGone)
	if err != nil {
		return err
	}
	for wait := patience; ; wait = patienceAgain {
		ended, err := t.AwaitEnd(ctx, wait)
		if err != nil {
			return err
		}
		if ended && s.letGo(ctx) {
			break
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s.a.log.Error("the former agent does not end, and nothing of this site is opened before it has: clients are served by the other sites only",
			"pid", t.PID(), "hint", "see what it waits for in its log; end it if it hangs")
	}
	s.a.log.Info("the former agent has ended", "pid", t.PID())
	return s.a.host.readOrder()
}

// letGo waits for a moment until all is closed that the former agent had open. That its pipe is closed says only that it is about to be.
func (s *succession) letGo(ctx context.Context) bool {
	for begun := time.Now(); time.Since(begun) < letGoMax && ctx.Err() == nil; {
		if s.old != nil {
			if s.old.dead(letGoEvery) {
				return true
			}
			continue
		}
		if s.a.nobodyListens(ctx, "") == nil {
			return true
		}
		select {
		case <-ctx.Done():
		case <-time.After(letGoEvery):
		}
	}
	return false
}

// tell tells how far it is until done is closed.
func (s *succession) tell(done <-chan struct{}) {
	t := time.NewTicker(tellLeft)
	defer t.Stop()
	for {
		select {
		case <-done:
			return
		case <-t.C:
		}
		if p := s.d.Report().Predecessor; p != nil && p.Clients > 0 {
			s.a.log.Info("the former agent has clients left", "clients", p.Clients, "why", fmt.Sprint(p.Why))
		}
	}
}

// leave returns when the former agent may end: no session of this process has a transaction there, and what was committed there is
// visible at the other sites, where sessions go on. It does not wait for ever.
func (s *succession) leave(ctx context.Context) {
	self := s.a.self.Name
	most := s.drain
	if !s.d.sites.seen.Load().servesBut(self) {
		most = min(most, s.a.cfg.Gateway.Hold.Std()/3) // all others wait
		s.closeEntrance(ctx)
	}
	s.f.advance(formerLeaves)
	s.d.AskToLeave(self, true)
	asked := time.Now()
	for empty := 0; empty < 3; { // one may have been about to begin
		left := s.d.Staying(self)
		if empty++; len(left) > 0 {
			empty = 0
		}
		if time.Since(asked) > most {
			s.a.log.Warn("the former agent ends although transactions are under way there", "sessions", fmt.Sprint(left), "waited", most)
			break
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
	s.catchUp(ctx)
	if ctx.Err() != nil {
		return
	}
	s.f.advance(formerGone)
	s.a.log.Info("the former agent may end", "after", time.Since(asked).Round(time.Millisecond))
}

// closeEntrance lets clients that come wait, and waits for those that are about to log in: unlike those that have, they would be refused
// when no site serves.
func (s *succession) closeEntrance(ctx context.Context) {
	s.a.onClients.Pause()
	begun := time.Now()
	for empty := 0; empty < 3 && time.Since(begun) < enterMax && ctx.Err() == nil; { // one may have been accepted just now
		if empty++; s.d.Entering() > 0 {
			empty = 0
		}
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// gate lets clients that come wait in the system's queue as long as no site would take them because of the restart, but for no longer
// than a request of one that is there.
func (s *succession) gate(ctx context.Context) {
	select {
	case <-s.f.left:
	case <-ctx.Done():
		return
	}
	defer s.a.onClients.Resume()
	deadline := time.NewTimer(s.a.cfg.Gateway.Hold.Std())
	defer deadline.Stop()
	for {
		news := s.d.sites.news.wait()
		none := s.d.sites.seen.Load().choose(asked{home: s.a.self.Name, shut: s.d.sites.shutHere}) == nil
		if !none && s.f.now() == begun {
			return
		}
		if none {
			s.a.onClients.Pause()
		} else {
			s.a.onClients.Resume()
		}
		select {
		case <-news:
		case <-deadline.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// catchUp waits until sessions find at the other sites what they have seen here: when the former agent has ended, nobody can tell.
func (s *succession) catchUp(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, catchUpMax)
	defer cancel()
	var g errgroup.Group
	p := s.d.sites.seen.Load()
	for i := range p.sites {
		v := &p.sites[i]
		if v.name == s.a.self.Name || !v.good(p.members) {
			continue
		}
		for _, db := range s.a.cfg.Databases {
			g.Go(func() error {
				if err := s.d.sites.CatchUp(ctx, db.Name, s.a.self.Name, v.name); err != nil {
					s.a.log.Warn("a site does not have yet what was committed here", "site", v.name, "database", db.Name, "error", err)
				}
				return nil
			})
		}
	}
	_ = g.Wait() // what went wrong is in the log
}

// servesBut reports whether a site other than one takes new transactions.
func (p *picture) servesBut(site string) bool {
	for i := range p.sites {
		if v := &p.sites[i]; v.name != site && v.good(p.members) {
			return true
		}
	}
	return false
}

// postTakeover hands the agent over to the caller.
func (a *Agent) postTakeover(w http.ResponseWriter, r *http.Request) {
	d, ok := a.door.(*served)
	if !ok || a.onClients == nil {
		writeError(w, http.StatusConflict, &hinted{"the running agent is not taken over: it has no sessions of clients", "end it and start the new one"})
		return
	}
	givesWay{
		own: a.takeoverRequest(0), server: d.Server, log: a.log, status: "the log of the new process",
		with:  gateway.HandOver{Listeners: []*gateway.Listener{a.onClients}, Stay: d.host.stay},
		taken: func() { a.finishFor(r.Context()) },
	}.post(w, r)
}

// stay is gateway.HandOver.Stay: gateways elsewhere begin nothing here any more, if they may go elsewhere.
func (h *host) stay(stays bool) {
	h.leaves.Store(stays)
	h.news.tell()
}

// emptyMax bounds how long an agent that was taken over waits for gateways to leave.
const emptyMax = 2 * time.Second

// finishFor ends the agent, which was taken over, when the gateways elsewhere have left.
func (a *Agent) finishFor(ctx context.Context) {
	defer a.finish()
	a.log.Info("this agent was taken over, and ends")
	deadline := time.NewTimer(emptyMax)
	defer deadline.Stop()
	for {
		if _, n, _ := a.host.entry.Status(); n == 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-deadline.C:
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}
