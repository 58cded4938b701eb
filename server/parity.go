package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/parity"
)

// Whether an open session may go on at another site: the agents tell what must be the same, and each gateway compares.

// factsMax bounds the reading of a database's facts.
const factsMax = 10 * time.Second

// facts reads those of each replicated database here.
func (a *Agent) facts(ctx context.Context) ([]parity.Facts, error) {
	ctx, cancel := context.WithTimeout(ctx, factsMax)
	defer cancel()
	all := []parity.Facts{}
	for _, n := range a.nodes {
		c, err := parity.Connect(ctx, a.cfg.Postgres.DSN, n.database.Name)
		if err != nil {
			return nil, fmt.Errorf("read what must be the same at all sites of database %s: %w", n.database.Name, err)
		}
		role, err := pg.Config(a.cfg.Postgres.DSN, n.database.Name, nil)
		var f parity.Facts
		if err == nil {
			f, err = parity.Read(ctx, c, parity.Spec{Site: a.self.Name, Role: role.User})
		}
		pg.Close(c)
		if err != nil {
			return nil, fmt.Errorf("read what must be the same at all sites of database %s: %w", n.database.Name, err)
		}
		f.LoginCA = loginsText(a.cfg.Gateway.LoginCA)
		all = append(all, f)
	}
	return all, nil
}

// factsJSON is that of link.ServerConfig.
func (a *Agent) factsJSON(ctx context.Context) ([]byte, error) {
	f, err := a.facts(ctx)
	if err != nil {
		return nil, err
	}
	return json.Marshal(f)
}

// Facts is that of link.Asked.
func (h *host) Facts(ctx context.Context) ([]byte, error) { return h.a.factsJSON(ctx) }

const (
	// compareEvery is how often sites are compared: roles and settings change without a trace in the WAL.
	compareEvery = time.Minute
	// compareSoon is how often while something keeps sessions from going on elsewhere: somebody may be about to change that.
	compareSoon = 5 * time.Second
	// compareAgain is the pause after a site could not be asked.
	compareAgain = time.Second
)

// likeness is what a gateway knows of how alike the sites are.
type likeness struct {
	mu        sync.Mutex // guards facts, pairs and suspected; the others are stored under it
	facts     map[string]siteFacts
	pairs     map[[2]string]bool // of sites that were compared
	suspected []suspicion
	found     atomic.Pointer[[]parity.Finding]
	compared  atomic.Pointer[map[string]bool] // sites that were asked, whether or not they have answered
}

// blocks reports whether anything was found that keeps sessions from going on elsewhere.
func (k *likeness) blocks() bool {
	found := k.found.Load()
	return found != nil && slices.ContainsFunc(*found, func(f parity.Finding) bool { return f.Grade != parity.Warning })
}

// writeMetrics writes how many differences there are between sites.
func (k *likeness) writeMetrics(w io.Writer) {
	found := k.found.Load()
	if found == nil {
		return
	}
	type key struct {
		grade        parity.Grade
		database     string
		first, other string
	}
	n := map[key]int{}
	for _, f := range *found {
		n[key{f.Grade, f.Database, f.Sites[0], f.Sites[1]}]++
	}
	_, _ = io.WriteString(w, "# HELP duri_gateway_site_differences Lines that differ between two sites, by what follows for open sessions.\n# TYPE duri_gateway_site_differences gauge\n")
	for k, v := range n {
		_, _ = fmt.Fprintf(w, "duri_gateway_site_differences{database=%q,grade=%q,site=%q,other=%q} %d\n", k.database, k.grade, k.first, k.other, v) // the client is gone, then
	}
}

// siteFacts are a site's as it last told.
type siteFacts struct {
	known bool
	facts []parity.Facts
	at    time.Time // when it was asked for them
	err   error     // since then
}

// compareAll asks one site again and again, and compares it with the others, until ctx ends.
func (s *sites) compareAll(ctx context.Context, l *siteLink) {
	for {
		news := s.news.wait()
		pause := compareEvery
		if !s.heard(l.target.Site) {
			pause = compareAgain // news come first
		} else if err := s.compareSite(ctx, l); err != nil {
			pause = compareAgain
			news = nil
		} else if s.like.blocks() {
			pause = compareSoon
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-news:
		case <-l.compare:
		case <-t.C:
		}
		t.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

func (s *sites) heard(site string) bool {
	for i, v := range s.seen.Load().sites {
		if v.name == site {
			return v.heard || s.isOwn(s.links[i])
		}
	}
	return false
}

// compareSite asks a site, compares, and has those sites asked again whose answers are too old for that.
func (s *sites) compareSite(ctx context.Context, l *siteLink) error {
	asked := time.Now()
	one, cancel := context.WithTimeout(ctx, factsMax)
	defer cancel()
	b, err := l.asked.Facts(one)
	var f []parity.Facts
	if err == nil {
		err = json.Unmarshal(b, &f)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	stale := s.like.learn(l.target.Site, asked, f, err, s)
	if err != nil {
		return err // asking the others would not help
	}
	for _, o := range s.links {
		if slices.Contains(stale, o.target.Site) {
			select {
			case o.compare <- struct{}{}:
			default: // it will be asked already
			}
		}
	}
	return nil
}

// learn takes what a site has told when it was asked at some time, or that it could not be asked, which leaves what it told before
// in force. It returns the sites whose answers are too old to say whether something newly differs: what was made at both sites since
// they were asked is no difference.
func (k *likeness) learn(site string, at time.Time, f []parity.Facts, err error, s *sites) (stale []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.facts == nil {
		k.facts, k.pairs = map[string]siteFacts{}, map[[2]string]bool{}
	}
	now := k.facts[site]
	failed := err != nil && now.err == nil
	if now.err = err; err == nil {
		now.known, now.facts, now.at = true, f, at
	}
	k.facts[site] = now
	if failed {
		s.log.Warn("a site could not be compared with the others", "site", site, "error", err, "hint", hintOf(err))
	}
	found := []parity.Finding{}
	names := slices.Sorted(maps.Keys(k.facts))
	compared := map[string]bool{}
	var old []parity.Finding
	if p := k.found.Load(); p != nil {
		old = *p
	}
	var suspected []suspicion
	for i, a := range names {
		compared[a] = true
		for _, b := range names[i+1:] {
			pair, doubtful, again := findings(k.facts[a], k.facts[b], k.pairs[[2]string{a, b}], old, k.suspected)
			k.pairs[[2]string{a, b}] = k.facts[a].known && k.facts[b].known
			suspected = append(suspected, doubtful...)
			if found = append(found, pair...); again < 0 {
				stale = append(stale, a)
			} else if again > 0 {
				stale = append(stale, b)
			}
		}
	}
	k.found.Store(&found)
	k.suspected = suspected
	k.compared.Store(&compared)
	for _, f := range found {
		if f.Grade != parity.Warning && !slices.ContainsFunc(old, func(o parity.Finding) bool { return same(o, f) }) {
			s.log.Warn("open sessions do not go on at another site", "sites", f.Sites[0]+", "+f.Sites[1], "database", f.Database, "role", f.Role, "why", f.String(), "hint", f.Hint)
		}
	}
	for _, o := range old {
		if o.Grade != parity.Warning && !slices.ContainsFunc(found, func(f parity.Finding) bool { return same(o, f) }) {
			s.log.Info("what kept open sessions from going on at another site is gone", "sites", o.Sites[0]+", "+o.Sites[1], "line", o.Line)
		}
	}
	return stale
}

// suspicion is a difference that was not there before, and when the later of the two sites was asked for what shows it.
type suspicion struct {
	found parity.Finding
	since time.Time
}

// findings compares two sites. What keeps sessions from going on counts once both were asked at or after the time when it was first
// seen, or if it counted before; else it is doubtful, and the one that was asked earlier, the first (-1) or the second (1), is to be
// asked again. With sites that were never compared, what is doubtful counts meanwhile: nothing better is known.
func findings(a, b siteFacts, compared bool, before []parity.Finding, suspected []suspicion) (found []parity.Finding, doubtful []suspicion, again int) {
	earlier, later := a.at, b.at
	if earlier.After(later) {
		earlier, later = later, earlier
	}
	for _, f := range compareFacts(a.facts, b.facts) {
		if f.Grade == parity.Warning || slices.ContainsFunc(before, func(o parity.Finding) bool { return same(o, f) }) {
			found = append(found, f)
			continue
		}
		since := later
		if i := slices.IndexFunc(suspected, func(o suspicion) bool { return same(o.found, f) }); i >= 0 {
			since = suspected[i].since
		}
		if !earlier.Before(since) {
			found = append(found, f)
			continue
		}
		if doubtful = append(doubtful, suspicion{f, since}); !compared {
			found = append(found, f)
		}
		again = a.at.Compare(b.at)
	}
	return found, doubtful, again
}

// same reports whether two findings say the same.
func same(a, b parity.Finding) bool {
	return a.Code == b.Code && a.Database == b.Database && a.Role == b.Role && a.Line == b.Line && a.Sites == b.Sites && a.Values == b.Values
}

// compareFacts compares the databases that two sites have told of.
func compareFacts(a, b []parity.Facts) (found []parity.Finding) {
	for _, x := range a {
		for _, y := range b {
			if x.Database == y.Database {
				found = append(found, parity.Compare(x, y)...)
			}
		}
	}
	return found
}

// parts says why a session that was at another site may not go on at this one; empty: it may. A site that has not been asked yet
// must wait; one that cannot be asked is taken as it was, or as equal.
func (k *likeness) parts(l *gateway.Login, w gateway.Wish, site string) string {
	if w.Last == "" || w.Last == site {
		return ""
	}
	if compared := k.compared.Load(); compared == nil || !(*compared)[site] {
		return "it has not been compared with the other sites yet"
	}
	f := parity.Blocks(*k.found.Load(), parity.Session{Database: l.Database, Role: l.User, Types: w.Types, Certificate: l.ByCertificate()}, w.Last, site)
	if f == nil {
		return ""
	}
	return "this session cannot go on there: " + f.String()
}

// Check is what `duri check` prints.
type Check struct {
	Sites       []CheckedSite    `json:"sites"`
	Unreachable []Missing        `json:"unreachable"`
	Findings    []parity.Finding `json:"findings"`
}

// CheckedSite is a site that was compared with the others.
type CheckedSite struct {
	Site      string         `json:"site"`
	Databases []parity.Facts `json:"databases"`
}

// check reads the facts of all sites now, and compares.
func (a *Agent) check(ctx context.Context) Check {
	out := Check{Sites: []CheckedSite{}, Unreachable: []Missing{}, Findings: []parity.Finding{}}
	var mu sync.Mutex
	var wg sync.WaitGroup
	add := func(site string, f []parity.Facts, err error) {
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			out.Unreachable = append(out.Unreachable, Missing{site, err.Error()})
			return
		}
		out.Sites = append(out.Sites, CheckedSite{site, f})
	}
	wg.Go(func() {
		f, err := a.facts(ctx)
		add(a.self.Name, f, err)
	})
	for name, c := range a.clients {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, factsMax)
			defer cancel()
			b, err := c.Facts(ctx)
			var f []parity.Facts
			if err == nil {
				err = json.Unmarshal(b, &f)
			}
			add(name, f, err)
		})
	}
	wg.Wait()
	order := func(site string) int {
		return slices.IndexFunc(a.cfg.Sites, func(s config.Site) bool { return s.Name == site })
	}
	slices.SortFunc(out.Sites, func(x, y CheckedSite) int { return order(x.Site) - order(y.Site) })
	slices.SortFunc(out.Unreachable, func(x, y Missing) int { return order(x.Site) - order(y.Site) })
	for i, x := range out.Sites {
		for _, y := range out.Sites[i+1:] {
			out.Findings = append(out.Findings, compareFacts(x.Databases, y.Databases)...)
		}
	}
	return out
}

func (a *Agent) getCheck(w http.ResponseWriter, r *http.Request) {
	writeJSON(w, http.StatusOK, a.check(r.Context()))
}

// Check asks the agent to compare all sites now.
func (c *Control) Check(ctx context.Context) (Check, error) {
	var out Check
	err := c.get(ctx, "/v1/check", nil, &out)
	return out, err
}
