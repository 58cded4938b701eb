package server

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/parity"
)

// Which site serves a session's reads, and how long its transactions that write are delayed.

// drawn is the site that a session reads at: each has as many of the sessions as its weight says, and a session always has the same
// one. Empty: none has a weight.
func drawn(sites []*siteLink, weights map[string]int, key uint64) string {
	total := uint64(0)
	for _, l := range sites {
		total += uint64(weights[l.target.Site])
	}
	if total == 0 {
		return ""
	}
	// Keys count connections: what comes and goes by turns must not get the same site each time.
	key += 0x9e3779b97f4a7c15
	key = (key ^ key>>30) * 0xbf58476d1ce4e5b9
	key = (key ^ key>>27) * 0x94d049bb133111eb
	at := (key ^ key>>31) % total
	for _, l := range sites {
		w := uint64(weights[l.target.Site])
		if at < w {
			return l.target.Site
		}
		at -= w
	}
	return "" // not reached
}

// lagOf is how far a site is behind the others in a database, as of now; false: it is not known, or the database is not replicated
// there. Sites that the register leaves out do not count.
func (v *siteView) lagOf(database string, members []string, now time.Time) (time.Duration, bool) {
	d, ok := v.state.Database(database)
	if !ok {
		return 0, false
	}
	lag := time.Duration(0)
	for _, l := range d.Lags {
		if members != nil && !slices.Contains(members, l.Site) {
			continue
		}
		if !l.Known {
			return 0, false
		}
		if l.Lag >= lagStep { // It has grown since then, or news would have come.
			l.Lag += max(0, now.Sub(v.told))
		}
		lag = max(lag, l.Lag)
	}
	return lag, true
}

// unfitForReads says why a site serves no reads of a database just now; empty: it may.
func (p *picture) unfitForReads(v *siteView, database string, lagMax time.Duration, now time.Time) string {
	switch why := v.serves(p.members); {
	case why != "":
		return why
	case v.state.Draining:
		return "it is drained"
	case !v.settled:
		return "it has only just come back"
	}
	switch lag, known := v.lagOf(database, p.members, now); {
	case !known:
		return "how far it is behind is not known"
	case lag > lagMax:
		return fmt.Sprintf("it is %v behind", lag.Round(time.Millisecond))
	}
	return ""
}

// view finds a site; nil: it is not there.
func (p *picture) view(site string) *siteView {
	for i := range p.sites {
		if p.sites[i].name == site {
			return &p.sites[i]
		}
	}
	return nil
}

// readsOf are the reads of a login, and its home.
func (s *sites) readsOf(l *gateway.Login, w gateway.Wish) (r config.Reads, home string) {
	application := application(l)
	if home = w.Home; home == "" {
		home = s.homeOf(l)
	}
	return s.cfg.ReadsOf(l.Database, l.User, application), home
}

// ReadAt is that of gateway.Reads.
func (s *sites) ReadAt(l *gateway.Login, w gateway.Wish, key uint64) (t gateway.Target, wait time.Duration, ok bool) {
	r, home := s.readsOf(l, w)
	site := drawn(s.links, r.Weights, key)
	if w.Last != "" {
		home = w.Last // where its transactions are, also while its home is away
	}
	if site == "" || site == home {
		return gateway.Target{}, 0, false
	}
	p := s.seen.Load()
	v := p.view(site)
	if v == nil || s.whyShut(site) != "" || p.unfitForReads(v, l.Database, r.LagMax.Std(), time.Now()) != "" || s.like.apart(l, home, site) != "" {
		return gateway.Target{}, 0, false
	}
	t = s.link(site).target
	t.Epoch, t.History = p.epochOf(v), v.state.Server
	return t, r.WaitMax.Std(), true
}

// ReadSites is that of gateway.Reads.
func (s *sites) ReadSites(l *gateway.Login) (all []gateway.ReadSite) {
	r, home := s.readsOf(l, gateway.Wish{})
	p := s.seen.Load()
	now := time.Now()
	for _, site := range slices.Sorted(maps.Keys(r.Weights)) {
		one := gateway.ReadSite{Site: site, Weight: r.Weights[site]}
		if v := p.view(site); v != nil && site != home {
			if lag, known := v.lagOf(l.Database, p.members, now); known {
				one.LagS = new(lag.Seconds())
			}
			if one.Problem = s.whyShut(site); one.Problem == "" {
				one.Problem = p.unfitForReads(v, l.Database, r.LagMax.Std(), now)
			}
			if one.Problem == "" {
				one.Problem = s.like.apart(l, home, site)
			}
		}
		all = append(all, one)
	}
	return all
}

// apart says why reads of a session of one site must not go to another; empty: they may. A session goes to and fro, and what it
// meets there it must not take for something else here: so types count that it has not met yet.
func (k *likeness) apart(l *gateway.Login, home, site string) string {
	compared := k.compared.Load()
	if compared == nil || !(*compared)[site] || !(*compared)[home] {
		return "it has not been compared with the other sites yet"
	}
	for _, f := range *k.found.Load() {
		if f.Database != l.Database || f.Sites != [2]string{home, site} && f.Sites != [2]string{site, home} {
			continue
		}
		if f.Code == parity.CodeVerifier && l.ByCertificate() {
			continue
		}
		if f.Grade == parity.BlocksAll || f.Grade == parity.BlocksTypes || f.Grade == parity.BlocksRole && f.Role == l.User {
			return f.String()
		}
	}
	return ""
}

// Delay is that of gateway.Pace.
func (s *sites) Delay(l *gateway.Login, w gateway.Wish, at string) time.Duration {
	p := s.seen.Load()
	if at == "" {
		if !slices.ContainsFunc(p.sites, func(v siteView) bool { return s.cfg.SlowDown.Delay(v.backlog(l.Database)) > 0 }) {
			return 0
		}
		if v := p.choose(s.asks(l, w, false)); v != nil {
			at = v.name
		}
	}
	if v := p.view(at); v != nil {
		return s.cfg.SlowDown.Delay(v.backlog(l.Database))
	}
	return 0
}

// Backlog is that of gateway.Pace.
func (s *sites) Backlog(site, database string) int64 {
	if v := s.seen.Load().view(site); v != nil {
		return v.backlog(database)
	}
	return 0
}

// backlog is how many bytes of a site's WAL the slowest other one has not applied, as long as the site is heard.
func (v *siteView) backlog(database string) int64 {
	if !v.heard {
		return 0
	}
	d, _ := v.state.Database(database)
	return d.Backlog
}

// writeMetrics writes what sites tell of lag and backlog.
func (s *sites) writeMetrics(w io.Writer) {
	p := s.seen.Load()
	now := time.Now()
	var lags, backlogs strings.Builder
	for i := range p.sites {
		v := &p.sites[i]
		if !v.heard {
			continue
		}
		for _, d := range v.state.Databases {
			if lag, known := v.lagOf(d.Database, p.members, now); known {
				fmt.Fprintf(&lags, "duri_gateway_site_lag_seconds{database=%q,site=%q} %g\n", d.Database, v.name, lag.Seconds())
			}
			fmt.Fprintf(&backlogs, "duri_gateway_site_backlog_bytes{database=%q,site=%q} %d\n", d.Database, v.name, d.Backlog)
		}
	}
	_, _ = io.WriteString(w, "# HELP duri_gateway_site_lag_seconds How far a site is behind the others.\n# TYPE duri_gateway_site_lag_seconds gauge\n"+lags.String()+
		"# HELP duri_gateway_site_backlog_bytes WAL of a site that the slowest other one has not applied.\n# TYPE duri_gateway_site_backlog_bytes gauge\n"+backlogs.String()) // the client is gone, then
}
