package server

import (
	"slices"
	"strings"
	"time"

	"github.com/duri-io/duri/link"
)

// Which site a session's next transaction goes to, decided from what the agents have told.

// siteView is a site as a gateway sees it.
type siteView struct {
	name  string
	heard bool // its agent tells its state just now
	state link.SiteState
	told  time.Time // when it told that

	settled bool        // it has served without a break for long enough to be gone back to
	since   time.Time   // it serves; zero: it does not, or did from the beginning
	fresh   bool        // it has not been seen to be away since the gateway began
	born    time.Time   // when that was
	planned bool        // it was drained, and did not fail
	losses  []time.Time // when it ceased to serve, unplanned
	away    uint64      // how often it was seen to go away
}

// settleAfter is how long a site that was away must serve before sessions go back home to it: twice as long with each further loss
// within ten minutes, so that a site that comes and goes does not move everybody each time.
const settleAfter = 2 * time.Second

// serves says why a site serves no clients; empty: it does. members are those of the register, nil without one.
func (v *siteView) serves(members []string) string {
	switch {
	case !v.heard:
		return "its agent does not answer"
	case v.state.Refuses != "":
		return v.state.Refuses
	case members != nil && !slices.Contains(members, v.name):
		return "the register leaves it out"
	}
	return ""
}

// good reports whether new transactions go to it.
func (v *siteView) good(members []string) bool { return v.serves(members) == "" && !v.state.Draining }

// look brings the parts that follow from a site's history up to date. was is whether it was good before.
func (v *siteView) look(was bool, members []string, now time.Time) {
	good := v.good(members)
	switch {
	case was && !good:
		v.planned = v.state.Draining && v.serves(members) == ""
		v.fresh, v.settled, v.since = false, false, time.Time{}
		if !v.planned {
			v.losses = append(slices.DeleteFunc(v.losses, func(at time.Time) bool { return now.Sub(at) > time.Hour }), now)
			v.away++
		}
	case !was && good:
		v.since = now
	case !good && !v.state.Draining:
		v.planned = false                                    // drained, and then it failed
		v.fresh = v.fresh && now.Sub(v.born) < 5*settleAfter // not all are heard at once
	}
	if good && !v.settled {
		v.settled = v.fresh || v.state.CaughtUp && (v.planned || now.Sub(v.since) >= rearmAfter(settleAfter, v.losses, now))
	}
}

// picture is all sites, in the order of the configuration.
type picture struct {
	sites   []siteView
	members []string // of the register in its latest epoch that anybody has told of; nil: there is none
	epoch   uint64
}

// epochOf is the epoch of connections to a site.
func (p *picture) epochOf(v *siteView) uint64 {
	if p.epoch > 0 {
		return p.epoch
	}
	return v.away + 1
}

// asked is what a choice depends on besides.
type asked struct {
	home string // the session's
	last string // where its last transaction was
	next bool   // another site than the last one, if there is one
	shut func(site string) bool
}

// choose says which site a transaction goes to: the session's home, if it serves and has for a while; else where the session is;
// else the one that knows the latest epoch. A site that is drained is taken if there is no other. nil: none.
func (p *picture) choose(a asked) *siteView {
	var last, home, best, drained *siteView
	var good []*siteView
	for i := range p.sites {
		v := &p.sites[i]
		if v.serves(p.members) != "" || a.shut != nil && a.shut(v.name) {
			continue
		}
		if v.state.Draining {
			if drained == nil || v.name == a.last {
				drained = v
			}
			continue
		}
		good = append(good, v)
		if v.name == a.last {
			last = v
		}
		if v.name == a.home {
			home = v
		}
		if best == nil || better(v, best) {
			best = v
		}
	}
	switch {
	case best == nil:
		return drained
	case a.next && last != nil:
		return good[(slices.Index(good, last)+1)%len(good)]
	case home != nil && (home.settled || home == last):
		return home
	case last != nil:
		return last
	case home != nil && !best.settled:
		return home
	}
	return best
}

// better orders sites that serve alike well.
func better(a, b *siteView) bool {
	if a.state.Epoch != b.state.Epoch {
		return a.state.Epoch > b.state.Epoch
	}
	return a.settled && !b.settled
}

// drains reports whether a site is drained, as far as it is heard.
func (p *picture) drains(site string) bool {
	for i := range p.sites {
		if v := &p.sites[i]; v.name == site {
			return v.heard && v.state.Draining
		}
	}
	return false
}

// asksToLeave reports whether sessions that cannot be moved are to leave a site: not while they would come back to it, because there
// is no other.
func (p *picture) asksToLeave(v *siteView) bool {
	return v.heard && v.state.Draining && v.state.Leave && slices.ContainsFunc(p.sites, func(o siteView) bool { return o.good(p.members) })
}

// none says why there is no site.
func (p *picture) none(shut func(site string) (why string)) error {
	var whys []string
	for i := range p.sites {
		v := &p.sites[i]
		why := v.serves(p.members)
		if shut != nil {
			if own := shut(v.name); own != "" && why == "" {
				why = own
			}
		}
		whys = append(whys, v.name+": "+why)
	}
	return &hinted{"no site takes clients now (" + strings.Join(whys, "; ") + ")", "`duri status` at a site tells more"}
}
