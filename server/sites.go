package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/pgwire"
	"github.com/duri-io/duri/pgwire/scram"
)

// sites is what a gateway knows of all sites, and asks them. It implements gateway.Router, gateway.Verifiers and gateway.Sites.
type sites struct {
	cfg    config.Gateway
	home   string // of sessions that no route fits; empty: none
	own    *host  // whose server is reached without a tunnel; nil: the gateway runs alone
	log    *slog.Logger
	links  []*siteLink // in the order of the configuration
	retire func(site string)
	leave  func(site string, leave bool)    // asks sessions that cannot be moved to leave it
	stay   func(site string) map[string]int // sessions that have a connection there
	id     string                           // of this gateway, among all

	turns atomic.Uint64 // transactions, for gateway.rehome_every

	like likeness

	mu   sync.Mutex // held while the picture is changed
	seen atomic.Pointer[picture]
	news broadcast
}

// siteLink is the gateway's way to one site.
type siteLink struct {
	asked  link.Asked
	dial   func(ctx context.Context) (net.Conn, error)
	dialAs func(ctx context.Context, role string) (net.Conn, error) // likewise, with a certificate of a role
	target gateway.Target

	compare chan struct{} // one value: what it has told of is to be asked again

	mu    sync.Mutex             // guards the rest
	conns map[*tunneled]struct{} // to be cut when the site is lost
}

// newSites makes it; home may be empty, own nil.
func newSites(cfg *config.Config, home string, own *host, clients map[string]*link.Client, log *slog.Logger) *sites {
	s := &sites{cfg: cfg.Gateway, home: home, own: own, log: log, retire: func(string) {}}
	s.leave, s.stay = func(string, bool) {}, func(string) map[string]int { return nil }
	s.id = fmt.Sprintf("%s %016x", cfg.Name(), rand.Uint64())
	p := &picture{}
	for _, site := range cfg.Sites {
		l := &siteLink{compare: make(chan struct{}, 1), conns: map[*tunneled]struct{}{}}
		if own != nil && site.Name == own.a.self.Name {
			l.asked, l.dial, l.dialAs = own.way()
			l.target = gateway.Target{Site: site.Name, Network: own.entry.network, Address: own.entry.address}
		} else {
			c := clients[site.Name]
			if c == nil {
				continue // tests have some
			}
			l.asked, l.dial, l.dialAs = c, c.Dial, c.DialAs
			l.target = gateway.Target{Site: site.Name, Network: "duri", Address: site.Address}
		}
		s.links = append(s.links, l)
		p.sites = append(p.sites, siteView{name: site.Name, fresh: true, born: time.Now()})
	}
	s.seen.Store(p)
	return s
}

// run follows all sites until ctx ends.
func (s *sites) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, l := range s.links {
		wg.Go(func() { s.follow(ctx, l) })
		wg.Go(func() { s.compareAll(ctx, l) })
		wg.Go(func() { s.tellStaying(ctx, l) })
	}
}

// firstMax is how long a gateway waits for a site before it takes clients all the same, who are then told that there is none.
const firstMax = 2 * time.Second

// awaitFirst waits until some site serves.
func (s *sites) awaitFirst(ctx context.Context) {
	deadline := time.NewTimer(firstMax)
	defer deadline.Stop()
	for {
		news := s.news.wait()
		if s.seen.Load().choose(asked{home: s.home, shut: s.shutHere}) != nil {
			return
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

// followAgain is the pause before a site that was lost is asked again.
const followAgain = 100 * time.Millisecond

// follow keeps the picture of one site.
func (s *sites) follow(ctx context.Context, l *siteLink) {
	var heard time.Time
	for {
		err := l.asked.Watch(ctx, func(st link.SiteState) error {
			heard = time.Now()
			s.learn(l, true, st, nil)
			return nil
		})
		if ctx.Err() != nil {
			l.cut()
			return
		}
		s.learn(l, false, link.SiteState{}, err)
		if time.Since(heard) >= link.StateSilence { // else it may be that only the stream has broken
			l.cut()
		}
		select {
		case <-ctx.Done():
		case <-time.After(followAgain):
		}
	}
}

// learn takes what a site has told, or that it does not tell anything any more.
func (s *sites) learn(l *siteLink, heard bool, st link.SiteState, lost error) {
	now := time.Now()
	s.mu.Lock()
	old := s.seen.Load()
	p := &picture{sites: slices.Clone(old.sites), members: old.members, epoch: old.epoch}
	if st.Epoch > p.epoch {
		p.epoch, p.members = st.Epoch, st.Members
	}
	changed := p.epoch != old.epoch
	for i := range p.sites {
		v := &p.sites[i]
		was := old.sites[i].good(old.members)
		if v.name == l.target.Site {
			changed = changed || v.heard != heard || heard && (v.state.Refuses != st.Refuses || v.state.Draining != st.Draining || v.state.Leave != st.Leave)
			if v.heard = heard; heard {
				v.state, v.told = st, now
			}
		}
		v.losses = slices.Clone(v.losses)
		v.look(was, p.members, now)
	}
	s.seen.Store(p)
	s.mu.Unlock()
	if changed {
		s.log.Info("a site's state", "site", l.target.Site, "heard", heard, "epoch", st.Epoch, "refuses", st.Refuses, "draining", st.Draining, "error", fmt.Sprint(lost))
		s.news.tell()
	}
	for i := range p.sites {
		v, l := &p.sites[i], s.links[i]
		if p.members != nil && !slices.Contains(p.members, v.name) {
			l.cut() // nothing that begins there ends well
		}
		if v.heard && v.state.Draining {
			s.retire(v.name)
		}
		s.leave(v.name, p.asksToLeave(v))
	}
}

// tellStaying tells a site who stays there, as long as it is drained.
func (s *sites) tellStaying(ctx context.Context, l *siteLink) {
	for {
		news, again := s.news.wait(), (<-chan time.Time)(nil)
		if p := s.seen.Load(); p.drains(l.target.Site) {
			one, cancel := context.WithTimeout(ctx, askPeer)
			err := l.asked.Staying(one, s.id, s.stay(l.target.Site))
			cancel()
			if err != nil && ctx.Err() == nil {
				s.log.Debug("tell a site who stays there", "site", l.target.Site, "error", err)
			}
			again = time.After(stayEvery)
		}
		select {
		case <-ctx.Done():
			return
		case <-news:
		case <-again:
		}
	}
}

// tunneled is a connection to a site's server that is cut when the site is lost.
type tunneled struct {
	net.Conn
	l *siteLink
}

// Secured marks it as gateway.Secured.
func (*tunneled) Secured() {}

func (t *tunneled) Close() error {
	t.l.mu.Lock()
	delete(t.l.conns, t)
	t.l.mu.Unlock()
	return t.hangUp()
}

// hangUp closes without TLS's last word, which might have to wait.
func (t *tunneled) hangUp() error {
	if c, ok := t.Conn.(interface{ NetConn() net.Conn }); ok {
		return c.NetConn().Close()
	}
	return t.Conn.Close()
}

// cut ends all connections through the site's agent.
func (l *siteLink) cut() {
	l.mu.Lock()
	conns := l.conns
	l.conns = map[*tunneled]struct{}{}
	l.mu.Unlock()
	for t := range conns {
		_ = t.hangUp() // it may have ended by itself
	}
}

// dial is gateway.Config.Dial.
func (s *sites) dial(ctx context.Context, t gateway.Target) (net.Conn, error) {
	return s.open(ctx, t, func(ctx context.Context, l *siteLink) (net.Conn, error) { return l.dial(ctx) })
}

// open connects to a target in one of the ways that its link has.
func (s *sites) open(ctx context.Context, t gateway.Target, dial func(context.Context, *siteLink) (net.Conn, error)) (net.Conn, error) {
	l := s.link(t.Site)
	if l == nil {
		return nil, fmt.Errorf("there is no site %q", t.Site)
	}
	conn, err := dial(ctx, l)
	if err != nil || s.isOwn(l) {
		return conn, err
	}
	c := &tunneled{conn, l}
	l.mu.Lock()
	l.conns[c] = struct{}{}
	l.mu.Unlock()
	return c, nil
}

func (s *sites) link(site string) *siteLink {
	for _, l := range s.links {
		if l.target.Site == site {
			return l
		}
	}
	return nil
}

func (s *sites) isOwn(l *siteLink) bool { return s.own != nil && l.target.Site == s.own.a.self.Name }

// shutHere reports whether the own site has been shut, which the picture learns a moment later.
func (s *sites) shutHere(site string) bool { return s.whyShut(site) != "" }

func (s *sites) whyShut(site string) string {
	if s.own == nil || site != s.own.a.self.Name {
		return ""
	}
	return s.own.shut()
}

// Route is that of gateway.Router.
func (s *sites) Route(l *gateway.Login, w gateway.Wish) (gateway.Target, error) {
	p := s.seen.Load()
	v := p.choose(s.asks(l, w, true))
	if v == nil {
		return gateway.Target{}, p.none(func(site string) string { return s.whyNot(l, w, site) })
	}
	t := s.link(v.name).target
	t.Epoch, t.History = p.epochOf(v), v.state.Server
	return t, nil
}

// whyNot says why a session does not go to a site that serves; empty: it may.
func (s *sites) whyNot(l *gateway.Login, w gateway.Wish, site string) string {
	return cmp.Or(s.whyShut(site), s.like.parts(l, w, site))
}

// asks is what the choice of a session's site depends on. Each transaction takes its turn.
func (s *sites) asks(l *gateway.Login, w gateway.Wish, turn bool) asked {
	a := asked{home: w.Home, last: w.Last, shut: func(site string) bool { return s.whyNot(l, w, site) != "" }}
	if a.home == "" {
		a.home = s.homeOf(l)
	}
	if n := s.cfg.RehomeEvery; n > 0 {
		a.next = turn && s.turns.Add(1)%uint64(n) == 0
		if w.Last != "" {
			a.home = w.Last
		}
	}
	return a
}

// application is what a session has called itself when it connected.
func application(l *gateway.Login) (name string) {
	for _, p := range l.Params {
		if p.Name == "application_name" {
			name = p.Value
		}
	}
	return name
}

// homeOf is a session's home as configured.
func (s *sites) homeOf(l *gateway.Login) string {
	if len(s.cfg.Routes) == 0 {
		return s.home
	}
	if home := s.cfg.Home(l.Database, l.User, application(l)); home != "" {
		return home
	}
	return s.home
}

// Verifier is that of gateway.Verifiers: any site may tell.
func (s *sites) Verifier(ctx context.Context, user string) (*scram.Verifier, error) {
	if len(user) > pgwire.NameMax {
		return nil, nil // PostgreSQL would cut it, and find somebody else.
	}
	var errs []error
	for _, l := range s.byNearness() {
		one, cancel := context.WithTimeout(ctx, verifierTimeoutMax)
		text, err := l.asked.Verifier(one, user)
		cancel()
		switch {
		case err != nil:
			errs = append(errs, err)
			continue
		case text == "":
			return nil, nil
		}
		return scram.ParseVerifier(text)
	}
	if len(errs) == 1 {
		return nil, errs[0]
	}
	return nil, errors.Join(errs...)
}

// byNearness are the sites that are worth asking, the own one first; all, if none is.
func (s *sites) byNearness() []*siteLink {
	var near, up, all []*siteLink
	for i, v := range s.seen.Load().sites {
		l := s.links[i]
		switch {
		case v.name == s.home && (v.heard && v.state.Postgres || s.isOwn(l)):
			near = append(near, l)
		case v.heard && v.state.Postgres:
			up = append(up, l)
		}
		all = append(all, l)
	}
	if len(near)+len(up) == 0 {
		return all
	}
	return append(near, up...)
}

const (
	// fateAskMax bounds one question for a fate; see fateMax.
	fateAskMax = 3 * time.Second
	// fateAskPause is the pause before it is asked again.
	fateAskPause = 20 * time.Millisecond
)

// Fate is that of gateway.Sites.
func (s *sites) Fate(ctx context.Context, d gateway.Doubt) (gateway.Fate, error) {
	if d.XID == 0 {
		return gateway.Aborted, nil // it has written nothing
	}
	for {
		fate, err := s.fateOnce(ctx, d)
		if fate != gateway.Unknown {
			return fate, nil
		}
		select {
		case <-ctx.Done():
			return gateway.Unknown, errors.Join(ctx.Err(), err)
		case <-time.After(fateAskPause):
		}
	}
}

// fateOnce asks the transaction's own site, if it is there, and the others if it cannot tell.
func (s *sites) fateOnce(ctx context.Context, d gateway.Doubt) (gateway.Fate, error) {
	q := link.FateQuestion{Database: d.Database, Site: d.Site, Server: d.History, Epoch: d.Epoch, PID: d.PID, Started: d.Started, XID: d.XID, LTXID: d.LTXID}
	var errs []error
	for _, l := range s.whoKnows(d.Site) {
		one, cancel := context.WithTimeout(ctx, fateAskMax)
		end := func() {}
		if p := s.seen.Load(); l.target.Site == d.Site && p.knowsItself(p.view(d.Site)) {
			one, end = s.whileThat(one, func(p *picture) (bool, time.Duration) { return p.knowsItself(p.view(d.Site)), 0 })
		}
		q.Age = time.Since(d.At)
		a, err := l.asked.Fate(one, q)
		end()
		cancel()
		if err == nil {
			if fate := verdict(d, a); fate != gateway.Unknown {
				return fate, nil
			}
			err = fmt.Errorf("site %s: %s", a.Site, a.Why)
		}
		errs = append(errs, err)
	}
	return gateway.Unknown, errors.Join(errs...)
}

// whoKnows are the sites to ask for a transaction of one, as far as they can be heard: that one first, unless the others have to
// decide, or its PostgreSQL does not answer.
func (s *sites) whoKnows(site string) (all []*siteLink) {
	p := s.seen.Load()
	var own *siteLink
	for i := range p.sites {
		switch v, l := &p.sites[i], s.links[i]; {
		case !v.heard && !s.isOwn(l):
		case v.name != site:
			all = append(all, l)
		default:
			own = l
		}
	}
	switch {
	case own == nil:
		return all
	case p.knowsItself(p.view(site)):
		return append([]*siteLink{own}, all...)
	}
	return append(all, own)
}

// knowsItself reports whether a site looks as if it could tell what became of its transactions.
func (p *picture) knowsItself(v *siteView) bool {
	return (!v.heard || v.state.Postgres) && (p.members == nil || slices.Contains(p.members, v.name))
}

// End is that of gateway.Sites.
func (s *sites) End(ctx context.Context, d gateway.Doubt) {
	l := s.link(d.Site)
	if l == nil {
		return
	}
	err := l.asked.End(ctx, link.FateQuestion{Database: d.Database, Site: d.Site, PID: d.PID, Started: d.Started, XID: d.XID})
	if err != nil {
		s.log.Debug("end a backend", "site", d.Site, "pid", d.PID, "error", err)
	}
}

// positionMax bounds a question to a site whose PostgreSQL does not answer.
const positionMax = time.Second

// errLost ends what is asked of a site that is lost meanwhile.
var errLost = errors.New("the site was lost")

// CatchUp is that of gateway.Sites. Either site may be lost in the middle of it, and is then waited for no more.
func (s *sites) CatchUp(ctx context.Context, database, from, to string) error {
	if from == to {
		return nil
	}
	there, here := s.link(from), s.link(to)
	if there == nil || here == nil {
		return fmt.Errorf("there is no site %q or %q", from, to)
	}
	ctx, end := s.whileThat(ctx, func(p *picture) (bool, time.Duration) { return p.view(to).serves(p.members) == "", 0 })
	defer end()
	positions, err := s.positions(ctx, there, database)
	gone := ""
	if err != nil {
		gone = from // What was received of it has to do.
	}
	if ctx.Err() == nil {
		err = here.asked.Reach(ctx, database, positions, gone)
	}
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("site %s: %w", to, context.Cause(ctx))
	}
	return err
}

// positions asks a site up to where it has what, for as long as it may tell.
func (s *sites) positions(ctx context.Context, l *siteLink, database string) ([]link.SitePosition, error) {
	ctx, end := s.whileThat(ctx, func(p *picture) (reachable bool, within time.Duration) {
		v := p.view(l.target.Site)
		if v.heard && !v.state.Postgres {
			within = positionMax // It may hang.
		}
		return (v.heard || s.isOwn(l)) && (p.members == nil || slices.Contains(p.members, v.name)), within
	})
	defer end()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return l.asked.Position(ctx, database)
}

// whileThat gives a context that ends with errLost when something holds of the picture no more, or a while after that limits it for
// the first time; 0: it does not. end must be called.
func (s *sites) whileThat(ctx context.Context, holds func(p *picture) (ok bool, within time.Duration)) (_ context.Context, end func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	var limit <-chan time.Time
	look := func() (news <-chan struct{}) {
		news = s.news.wait()
		ok, within := holds(s.seen.Load())
		if !ok {
			cancel(errLost)
		}
		if within > 0 && limit == nil {
			limit = time.After(within)
		}
		return news
	}
	news := look()
	go func() {
		for ctx.Err() == nil {
			select {
			case <-ctx.Done():
			case <-limit:
				cancel(errLost)
			case <-news:
				news = look()
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}
