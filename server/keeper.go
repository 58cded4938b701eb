package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/duri-io/duri/durability"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/quorum"
	"github.com/duri-io/duri/wal"
)

// keeper follows the register for this site: it knows whether the site may acknowledge, whose receipts count, and asks
// for changes when durability.Decide says so. It is one per agent, for all databases. Without a register there is none,
// and its methods on nil say so.
type keeper struct {
	a     *Agent
	store quorum.Store
	log   *slog.Logger
	door  door          // nil: clients reach PostgreSQL some other way
	wake  chan struct{} // something changed that Decide should know
	// suspect: a connection to PostgreSQL here has broken.
	suspect chan struct{}

	filesMu sync.Mutex // held while files in data_dir are written or removed and what they say begins or ends; before mu

	mu       sync.Mutex // guards the rest; never held while a report is computed or waited for
	reg      quorum.Register
	memberAt uint64          // epoch since which the register counts this site in without a break, as far as is known
	doubt    bool            // a swap was sent and its answer is not known, or was sent in a former life of the agent
	leaving  bool            // this site has proposed to leave, or is about to
	began    time.Time       // when the register was first read without doubt; zero: nothing may be acknowledged yet
	ahead    quorum.Register // what the watch told before that: it tells each value once
	frozen   map[string]freeze
	owed     bool                         // the marker may be there although nothing is promised any more
	arming   map[string]map[*node]wal.LSN // what had been acknowledged without the site, by database
	owns     map[*node]wal.LSN            // with an unsettled register: what this site had acknowledged before its epoch is not beyond
	counts   map[*node]map[string]wal.LSN // and what counts of the sites that are left out; none: not all members have spoken
	losses   []time.Time                  // take-overs
	server   durability.Server            // health of PostgreSQL here
	serverUp time.Time                    // since when it can be connected to
	// Of the disk of data_dir: since when a small durable write to it is under way, and why the last one failed.
	diskBusy  time.Time
	diskFault string
	deciding  int // decisions on marked transactions that are under way
	last      durability.Action
	problem   fault
	fence     string // a person's reason to keep clients out; empty: none
}

// freeze is since when a site gets no receipts, and up to where it has some, by database.
type freeze struct {
	since time.Time
	at    map[*node]wal.LSN
}

// decideEvery is how often the keeper looks around when nothing wakes it.
const decideEvery = 50 * time.Millisecond

func newKeeper(a *Agent, store quorum.Store) *keeper {
	return &keeper{
		a: a, store: store, log: a.log, wake: make(chan struct{}, 1), suspect: make(chan struct{}, 1),
		frozen: map[string]freeze{}, arming: map[string]map[*node]wal.LSN{}, owns: map[*node]wal.LSN{}, counts: map[*node]map[string]wal.LSN{},
	}
}

// epoch is what receipts carry: 0 as long as the register is not known.
func (k *keeper) epoch() uint64 {
	if k == nil {
		return 0
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.began.IsZero() || !k.reg.Has(k.a.self.Name) && k.server.Down > 0 { // no receipts from a site that cannot come back yet
		return 0
	}
	for _, n := range k.a.nodes {
		if n.behindJournal() != "" { // nor from one whose database is behind
			return 0
		}
	}
	return k.reg.Epoch
}

// standing is this site's place for the report rule.
func (k *keeper) standing() durability.Standing {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.place()
}

// place is standing for callers that hold k.mu.
func (k *keeper) place() durability.Standing {
	s := durability.Standing{
		Epoch: k.reg.Epoch, Members: len(k.reg.Members),
		Member: k.began != (time.Time{}) && !k.leaving && k.reg.Has(k.a.self.Name),
	}
	for _, m := range k.reg.Members {
		if _, frozen := k.frozen[m]; m != k.a.self.Name && !frozen {
			s.Others = append(s.Others, m)
		}
	}
	s.Arming = slices.Sorted(maps.Keys(k.arming))
	return s
}

// resume notes a promise of the agent's former life.
func (k *keeper) resume() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.doubt = k.marked()
	k.owed = true // the marker is made now, while there is room for it
}

// run reads the register and works until ctx ends.
func (k *keeper) run(ctx context.Context) error {
	k.resume()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for r := range k.store.Watch(ctx) {
			k.watched(r)
		}
	})
	wg.Go(func() { k.watchServer(ctx) })
	go k.watchDisk(ctx) // not waited for: it may hang with the disk
	t := time.NewTicker(decideEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		case <-k.wake:
		}
		k.act(ctx, durability.Decide(k.view(time.Now())))
		k.tidy()
		k.guardDoor()
	}
}

// watched takes a value that the register was changed to. What comes before the end of the first reading waits for it, which
// compares with what this site has seen in its former life.
func (k *keeper) watched(r quorum.Register) {
	k.mu.Lock()
	begun := !k.began.IsZero()
	if !begun {
		k.ahead = r
	}
	k.mu.Unlock()
	if begun {
		k.adopt(r)
	}
	k.stir()
}

func (k *keeper) stir() {
	if k != nil {
		wake(k.wake)
	}
}

// adopt takes a value of the register that is newer than the known one. It says nothing about a swap whose answer is
// missing, unless the epoch has moved: then that swap can no longer succeed, or is the one that is read.
func (k *keeper) adopt(r quorum.Register) {
	if !k.take(r) {
		return
	}
	if err := k.remember(r); err != nil {
		k.fail("write down what was seen of the register", err)
	}
	k.kickAll()
	k.stir()
}

func (k *keeper) take(r quorum.Register) (news bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if r.Epoch <= k.reg.Epoch {
		return false
	}
	if k.reg.Epoch > 0 && r.Epoch == k.reg.Epoch+1 {
		if err := quorum.Check(k.reg, r, k.a.cfg.Durability.Receipts); err != nil {
			k.note("the register was changed against its rules", err)
			return false
		}
	}
	was := k.reg
	k.doubt = k.doubt && was.Epoch == 0 // of a former life: what is read first proves nothing
	if !was.Has(k.a.self.Name) || r.Epoch != was.Epoch+1 {
		k.memberAt = r.Epoch // it may have been left out in between
	}
	k.reg, k.leaving = r, false
	for _, s := range k.a.cfg.Peers() { // in the new epoch, receipts of the old one count nowhere; and all hear of it
		k.thaw(s.Name)
	}
	clear(k.arming) // as a promise, until now; who still comes back is waited for anew
	clear(k.owns)
	clear(k.counts)
	k.log.Warn("the register has changed", "epoch", r.Epoch, "mode", string(r.Mode(k.siteNames())), "members", strings.Join(r.Members, " "), "by", r.By, "reason", r.Reason)
	if was.Epoch > 0 && len(r.Members) < len(was.Members) {
		k.losses = append(k.losses, time.Now())
	}
	if !r.Has(k.a.self.Name) && k.door != nil { // at once, not with the next look around
		k.door.Shut(k.fenceReason(r))
	}
	return true
}

func (k *keeper) siteNames() (names []string) {
	for _, s := range k.a.cfg.Sites {
		names = append(names, s.Name)
	}
	return names
}

func (k *keeper) note(what string, err error) {
	f := newFault(what, err)
	if k.problem.Text != f.Text {
		k.log.Error(f.Text, "hint", f.Hint)
	}
	k.problem = f
}

// thaw gives receipts to a site again. k.mu is held.
func (k *keeper) thaw(site string) {
	delete(k.frozen, site)
	for _, p := range k.peersOf(site) {
		if in := p.live.Load(); in != nil {
			in.copy.Thaw()
		}
	}
}

// peersOf are the links to a site, one for each database.
func (k *keeper) peersOf(site string) (all []*peer) {
	for _, n := range k.a.nodes {
		for _, p := range n.peers {
			if p.site.Name == site {
				all = append(all, p)
			}
		}
	}
	return all
}

// rearmAfter is how long a link must be stable before its site is taken back: twice as long with each further loss within
// ten minutes, so that a flapping link does not stop commits again and again.
func rearmAfter(base time.Duration, losses []time.Time, now time.Time) time.Duration {
	const window = 10 * time.Minute
	recent := 0
	for _, at := range losses {
		if now.Sub(at) < window {
			recent++
		}
	}
	return min(base<<min(max(recent-1, 0), 20), window)
}

// view collects what Decide takes into account.
func (k *keeper) view(now time.Time) durability.View {
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.a.cfg.Durability
	v := durability.View{
		Self: k.a.self.Name, Known: !k.began.IsZero() && !k.doubt, Open: true, Epoch: k.reg.Epoch, Members: k.reg.Members, Settled: k.reg.Settled, Required: d.Receipts,
		Policy: durability.Policy(d.Policy), Preferred: d.Preferred, Detect: d.Detect.Std(), Server: k.health(),
		Rearm: rearmAfter(d.Rearm.Std(), k.losses, now), Arming: slices.Sorted(maps.Keys(k.arming)),
	}
	for _, n := range k.a.nodes {
		v.Open = v.Open && (!n.waits() || n.ready.Load() != nil)
	}
	for s, f := range k.frozen {
		v.Frozen = append(v.Frozen, s)
		v.FrozenFor = max(v.FrozenFor, now.Sub(f.since))
	}
	slices.Sort(v.Frozen)
	for _, s := range k.a.cfg.Peers() {
		v.Peers = append(v.Peers, k.peerView(s.Name, now))
	}
	v.Exchanged = k.speak(v, now)
	return v
}

// peerView is one other site over all databases: the freshest sign of life, the least progress.
func (k *keeper) peerView(site string, now time.Time) durability.Peer {
	out := durability.Peer{Name: site, CaughtUp: true, Passed: true, Stable: time.Hour}
	var heard time.Time
	links := k.peersOf(site)
	for _, p := range links {
		s := p.seenBy(now)
		if s.heard.After(heard) {
			heard = s.heard
			out.Deaf, out.Unfit = s.deaf, s.unfit
		}
		out.Refused = out.Refused || s.refused
		out.Stable = min(out.Stable, s.stable)
		at, armed := k.arming[site]
		out.CaughtUp = out.CaughtUp && s.caughtUp(armed) && s.ack.Epoch == k.reg.Epoch && k.holdsOthers(p) && p.lacking.Load() == nil &&
			len(p.ghosts) == 0 && (armed || s.unjudged == 0 || len(p.n.peers) > 1) // with more sites there are no ghosts
		out.Ghosts += len(p.ghosts)
		said := p.says()
		if said.Epoch != k.reg.Epoch {
			said = link.Statement{}
		}
		out.Frozen, out.Armed = append(out.Frozen, said.Frozen...), append(out.Armed, said.Armed...)
		if armed {
			out.Passed = out.Passed && at != nil && s.ack.Epoch == k.reg.Epoch && s.ack.Durable >= at[p.n]
		}
	}
	if heard.Before(k.began) {
		heard = k.began // it had no chance before
	}
	out.Silent = now.Sub(heard)
	out.CaughtUp = out.CaughtUp && len(links) > 0
	if n := len(k.losses); n > 0 {
		out.Stable = min(out.Stable, now.Sub(k.losses[n-1]))
	}
	return out
}

// act does what was decided.
func (k *keeper) act(ctx context.Context, a durability.Action) {
	k.mu.Lock()
	news := a.Kind != k.last.Kind || !slices.Equal(a.Sites, k.last.Sites)
	k.last = a
	k.mu.Unlock()
	if news && a.Kind != durability.Nothing {
		k.log.Info("durability", "do", string(a.Kind), "sites", strings.Join(a.Sites, " "), "why", a.Why)
	}
	switch a.Kind {
	case durability.Read:
		k.read(ctx)
	case durability.Freeze:
		k.freeze(a.Sites, a.Epoch)
	case durability.Thaw:
		k.mu.Lock()
		for _, s := range a.Sites {
			k.thaw(s)
		}
		k.mu.Unlock()
		k.kickAll()
	case durability.Arm:
		k.arm(a.Sites, a.Epoch)
	case durability.Disarm:
		k.mu.Lock()
		for _, s := range a.Sites {
			delete(k.arming, s)
		}
		k.mu.Unlock()
		k.kickAll()
	case durability.TakeOver, durability.Leave, durability.Return, durability.Settle, durability.Renew:
		k.propose(ctx, a)
	case durability.Nothing, durability.Await, durability.Blocked:
	}
	if k.again(a.Kind) {
		k.stir()
	}
}

// again: after these there is at once something else to decide.
func (k *keeper) again(a durability.Kind) bool { return a == durability.Freeze || a == durability.Arm }

func (k *keeper) kickAll() {
	for _, n := range k.a.nodes {
		n.kickReport()
	}
}

// freeze stops receipts to sites; those of theirs count no more. It does nothing when the epoch is another one by now.
func (k *keeper) freeze(sites []string, epoch uint64) {
	k.filesMu.Lock()
	defer k.filesMu.Unlock()
	if !k.promise("frozen: " + strings.Join(sites, " ")) {
		return
	}
	defer k.afterReports()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.reg.Epoch != epoch {
		return
	}
	for _, s := range sites {
		f := freeze{time.Now(), map[*node]wal.LSN{}}
		for _, p := range k.peersOf(s) {
			if in := p.live.Load(); in != nil {
				f.at[p.n] = in.copy.Freeze()
			}
		}
		k.frozen[s] = f
	}
}

// cuts are the positions up to which this site has given receipts to the frozen sites. k.mu is held.
func (k *keeper) cuts(sites []string) quorum.Cuts {
	cuts := quorum.Cuts{}
	for _, n := range k.a.nodes {
		cuts[n.database.Name] = map[string]wal.LSN{}
		for _, s := range sites {
			cuts[n.database.Name][s] = k.frozen[s].at[n]
		}
	}
	return cuts
}

// arm lets reports wait for sites that are about to be members again.
func (k *keeper) arm(sites []string, epoch uint64) {
	k.filesMu.Lock()
	defer k.filesMu.Unlock()
	if slices.ContainsFunc(k.a.nodes, func(n *node) bool { return n.ready.Load() == nil }) || !k.promise("arming: "+strings.Join(sites, " ")) {
		return
	}
	k.mu.Lock()
	if k.reg.Epoch != epoch {
		k.mu.Unlock()
		return
	}
	for _, s := range sites {
		if slices.ContainsFunc(k.peersOf(s), func(p *peer) bool { return p.lacking.Load() != nil }) { // since that was decided
			k.mu.Unlock()
			return
		}
		k.arming[s] = nil // from now on nothing is acknowledged without it
	}
	k.mu.Unlock()
	alone := map[*node]wal.LSN{} // so that what was reported up to here, in this life of the agent or before, is all
	for _, n := range k.a.nodes {
		alone[n] = max(n.reported().Flush, n.ready.Load().journal.End())
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range sites {
		if _, still := k.arming[s]; still {
			k.arming[s] = alone
		}
	}
}

// afterReports returns when no report is under way that began before.
func (k *keeper) afterReports() {
	for _, n := range k.a.nodes {
		n.reported()
	}
}

// read learns the register, writes the first value when there is none, and renews the epoch when a swap is in doubt: until
// that is answered, nothing that the doubt concerns may be relied on.
func (k *keeper) read(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	r, err := k.store.Get(ctx)
	if errors.Is(err, quorum.ErrAbsent) {
		if err = k.lostRegister(0); err == nil {
			r, err = k.store.Swap(ctx, quorum.Initial(k.siteNames(), k.a.self.Name, time.Now().UTC()))
		}
		if errors.Is(err, quorum.ErrChanged) {
			err = nil
		}
	}
	if err == nil {
		err = k.lostRegister(r.Epoch)
	}
	if err != nil {
		k.fail("read the register", err)
		return
	}
	k.adopt(r)
	k.mu.Lock()
	doubt, reg := k.doubt, k.reg
	k.mu.Unlock()
	if doubt {
		next, err := quorum.Renew(reg, quorum.Note{Reason: "what became of a proposal is not known", By: k.a.self.Name, At: time.Now().UTC()})
		if err == nil {
			_, _ = k.swap(ctx, next) // it is told, and tried again
		}
	}
	k.mu.Lock()
	ahead := k.ahead
	if !k.doubt {
		k.problem = fault{}
		if k.began.IsZero() {
			k.began = time.Now()
		}
	}
	begun := !k.began.IsZero()
	k.mu.Unlock()
	if begun {
		k.adopt(ahead)
	}
	k.kickAll()
}

func (k *keeper) fail(what string, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.note(what, err)
}

// propose makes the next value and asks for it, in the epoch in which that was decided.
func (k *keeper) propose(ctx context.Context, a durability.Action) {
	self := k.a.self.Name
	note := quorum.Note{Reason: a.Why, By: self, At: time.Now().UTC()}
	if a.Kind == durability.Leave && !k.stepBack(a.Epoch) {
		return
	}
	own := k.ownCuts()
	k.mu.Lock()
	if k.reg.Epoch != a.Epoch {
		k.mu.Unlock()
		return
	}
	reg, receipts := k.reg, k.a.cfg.Durability.Receipts
	var next quorum.Register
	var err error
	switch a.Kind {
	case durability.TakeOver:
		keep := slices.DeleteFunc(slices.Clone(reg.Members), func(s string) bool { return slices.Contains(a.Sites, s) })
		next, err = quorum.TakeOver(reg, keep, receipts, lastCuts(keep, k.cuts(a.Sites)), note)
	case durability.Leave:
		next, err = quorum.Leave(reg, self, receipts, lastCuts(reg.Members[1:], own), note)
	case durability.Return:
		if k.deciding > 0 || slices.ContainsFunc(k.peersOf(a.Sites[0]), func(p *peer) bool { return len(p.ghosts) > 0 }) {
			k.mu.Unlock() // what is committed there from then on counts
			return
		}
		next, err = quorum.Rearm(reg, a.Sites[0], note)
	case durability.Settle:
		next, err = quorum.Settle(reg, k.settledCuts(), note)
	case durability.Renew:
		next, err = quorum.Renew(reg, note)
	}
	if err != nil { // nothing was asked for, so nothing is promised
		k.leaving = false
		k.note("change the register", err)
	}
	k.doubt = k.doubt || err == nil // from now on, in step with what was looked at: see swap
	k.mu.Unlock()
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	_, _ = k.swap(ctx, next) // it is told, and decided anew
}

// lastCuts are cuts when one member remains, which has nothing to exchange with anybody; else settling finds them.
func lastCuts(remain []string, cuts quorum.Cuts) quorum.Cuts {
	if len(remain) > 1 {
		return nil
	}
	return cuts
}

// stepBack promises to acknowledge nothing any more.
func (k *keeper) stepBack(epoch uint64) bool {
	k.filesMu.Lock()
	defer k.filesMu.Unlock()
	if !k.promise("leaving") {
		return false
	}
	k.mu.Lock()
	k.leaving = k.reg.Epoch == epoch
	k.mu.Unlock()
	k.afterReports()
	return true
}

// ownCuts are where this site's journals end.
func (k *keeper) ownCuts() quorum.Cuts {
	cuts := quorum.Cuts{}
	for _, n := range k.a.nodes {
		if c := n.ready.Load(); c != nil {
			cuts[n.database.Name] = map[string]wal.LSN{k.a.self.Name: c.journal.End()}
		}
	}
	return cuts
}

// swap asks for a value and gives the one that stands, with an error when that is another one or is not known.
func (k *keeper) swap(ctx context.Context, next quorum.Register) (quorum.Register, error) {
	k.mu.Lock()
	k.doubt = true // until the answer is here
	k.mu.Unlock()
	begun := time.Now()
	stands, err := k.store.Swap(ctx, next)
	if err != nil && !errors.Is(err, quorum.ErrChanged) {
		k.fail("change the register", err)
		return stands, err
	}
	k.log.Info("the register was asked", "epoch", stands.Epoch, "by", stands.By, "took", time.Since(begun).Round(time.Microsecond).String())
	k.adopt(stands)
	k.mu.Lock()
	if stands.Epoch >= next.Epoch && k.reg.Epoch >= stands.Epoch { // adopted, now or before
		k.doubt, k.problem = false, fault{}
	}
	k.mu.Unlock()
	return stands, err
}

// fenceReason says why clients are kept out by a register without this site.
func (k *keeper) fenceReason(r quorum.Register) string {
	return fmt.Sprintf("site %s is left out of the register since %s (epoch %d, members %s): %s", k.a.self.Name, r.At.Format(time.TimeOnly), r.Epoch, strings.Join(r.Members, " "), r.Reason)
}

// guardDoor lets clients in when this site may serve them, and shuts them out when not.
func (k *keeper) guardDoor() {
	if k.door == nil {
		return
	}
	if why := k.shutOut(); why != "" {
		k.door.Shut(why)
		return
	}
	k.mu.Lock() // under which take shuts it
	defer k.mu.Unlock()
	if k.unfit() == "" {
		k.door.Open()
	}
}

// shutOut says why clients must stay out; empty: they need not.
func (k *keeper) shutOut() string {
	k.mu.Lock()
	why := k.unfit()
	k.mu.Unlock()
	if why != "" {
		return why
	}
	for _, n := range k.a.nodes { // without k.mu: a report holds its own lock while it asks for the standing
		if why := n.unreceipted(); why != "" {
			return why
		}
	}
	return ""
}

// unfit says why this site may not serve clients, as far as the register and the server tell. k.mu is held.
func (k *keeper) unfit() string {
	switch {
	case k.fence != "":
		return k.fence
	case k.began.IsZero():
		return "the register has not been read yet"
	case !k.reg.Has(k.a.self.Name):
		return k.fenceReason(k.reg)
	case k.leaving:
		return "this site leaves the register: " + k.last.Why
	case k.server.Down > 0:
		return "PostgreSQL here is down"
	}
	return ""
}
