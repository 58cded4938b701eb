package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/durability"
	"github.com/duri-io/duri/internal/pg"
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

	filesMu sync.Mutex // held while files in data_dir are written or removed and what they say begins or ends; before mu

	mu       sync.Mutex // guards the rest; never held while a report is computed or waited for
	reg      quorum.Register
	doubt    bool      // a swap was sent and its answer is not known, or was sent in a former life of the agent
	leaving  bool      // this site has proposed to leave, or is about to
	began    time.Time // when the register was first read without doubt; zero: nothing may be acknowledged yet
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
		a: a, store: store, log: a.log, wake: make(chan struct{}, 1),
		frozen: map[string]freeze{}, arming: map[string]map[*node]wal.LSN{}, owns: map[*node]wal.LSN{}, counts: map[*node]map[string]wal.LSN{},
	}
}

// marker is the file that says whether this site has promised something that holds until the epoch changes: to give some
// site no receipts, to wait for one that comes back, to acknowledge nothing because it leaves. After a restart, the
// proposal that the promise was made for may still be under way (docs/adr/0006). It is there from the beginning and is
// written in place, so that a full disk is no obstacle.
func (k *keeper) marker() string { return filepath.Join(k.a.cfg.DataDir, "promised") }

// noPromise is what the marker says then; anything else, a torn write too, is a promise.
const noPromise = "nothing"

// markBytes is the marker's length: what a disk writes at once.
const markBytes = 512

// mark writes the marker.
func (k *keeper) mark(what string) error {
	content := fmt.Appendf(nil, "%-*.*s\n", markBytes-1, markBytes-1, what)
	f, err := os.OpenFile(k.marker(), os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return writeDurably(k.marker(), content)
	}
	if err != nil {
		return err
	}
	_, err = f.WriteAt(content, 0)
	return errors.Join(err, f.Sync(), f.Close())
}

// marked reports whether the marker says that something is promised, or may.
func (k *keeper) marked() bool {
	b, err := os.ReadFile(k.marker())
	return err == nil && strings.TrimSpace(string(b)) != noPromise || err != nil && !errors.Is(err, fs.ErrNotExist)
}

// promise writes the marker before anything is promised. k.filesMu is held until it is, and k.mu is not: the disk may be what
// fails.
func (k *keeper) promise(what string) bool {
	k.mu.Lock()
	k.owed = true
	k.mu.Unlock()
	err := k.mark(what)
	if err != nil {
		k.fail("write down a promise", err)
	}
	return err == nil
}

// tidy takes the promise back when nothing is promised any more.
func (k *keeper) tidy() {
	k.filesMu.Lock()
	defer k.filesMu.Unlock()
	k.mu.Lock()
	due := k.owed && len(k.frozen)+len(k.arming) == 0 && !k.leaving && !k.doubt
	k.owed = k.owed && !due
	k.mu.Unlock()
	if !due {
		return
	}
	if err := k.mark(noPromise); err != nil {
		k.fail("take back the mark of a promise", err)
	}
}

// writeDurably makes a file with a content that survives a loss of power.
func writeDurably(path string, content []byte) error {
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// seenFile holds the greatest value of the register that this site has seen: should the register be lost and begin anew,
// its first value would make members of all.
func (k *keeper) seenFile() string { return filepath.Join(k.a.cfg.DataDir, "register.json") }

// lostRegister reports that the register is older than what this site has seen.
func (k *keeper) lostRegister(epoch uint64) error {
	b, err := os.ReadFile(k.seenFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var seen quorum.Register
	if err == nil {
		err = json.Unmarshal(b, &seen)
	}
	if err != nil {
		return fmt.Errorf("read what this site has seen of the register: %w", err)
	}
	if epoch >= seen.Epoch {
		return nil
	}
	return &hinted{
		fmt.Sprintf("the register is at epoch %d, but this site has seen epoch %d (members %s): it was lost, or put back", epoch, seen.Epoch, strings.Join(seen.Members, " ")),
		"bring its voters' data back. If it is lost for good: stop all agents, remove " + k.seenFile() + " at the site that was a member last, start that one alone, and let the others join again",
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

// watched takes a value that the register was changed to. What comes before the first reading is left to that, which
// compares with what this site has seen in its former life.
func (k *keeper) watched(r quorum.Register) {
	k.mu.Lock()
	begun := !k.began.IsZero()
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

// remember writes down a value that was taken, unless another one has been taken since.
func (k *keeper) remember(r quorum.Register) error {
	k.filesMu.Lock()
	defer k.filesMu.Unlock()
	k.mu.Lock()
	latest := k.reg.Epoch == r.Epoch
	k.mu.Unlock()
	if !latest {
		return nil
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return writeDurably(k.seenFile(), b)
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

// health is that of the server, the disk and what decodes and receives here. k.mu is held.
func (k *keeper) health() durability.Server {
	h := k.server
	if !k.diskBusy.IsZero() {
		h.DiskStalled = time.Since(k.diskBusy)
	}
	h.Unable = k.diskFault
	overdue := time.Now().Add(-k.a.cfg.Durability.Detect.Std())
	if h.Down > 0 || k.serverUp.After(overdue) {
		overdue = time.Time{} // it had no chance
	}
	for _, n := range k.a.nodes {
		if n.waits() {
			h.Unable = cmp.Or(h.Unable, n.unable(overdue))
		}
	}
	return h
}

// unfitness says why this site cannot do its part; it goes out with every heartbeat, for what keeps the site from leaving by
// itself: a disk on which it cannot write that down.
func (k *keeper) unfitness() string {
	if k == nil {
		return ""
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.health().Unfit(k.a.cfg.Durability.Detect.Std())
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

// holdsOthers reports whether a site that comes back has what this one has of the other sites that are left out, in a
// database whose commits wait. k.mu is held.
func (k *keeper) holdsOthers(p *peer) bool {
	if !p.n.waits() {
		return true
	}
	said := p.says()
	for site, have := range p.n.copies() {
		if site == p.site.Name || k.reg.Has(site) {
			continue
		}
		cut, isCut := k.reg.Cut(p.n.database.Name, site)
		if need := durability.Needs(have, cut, isCut); need > 0 && (said.Epoch != k.reg.Epoch || said.Copies[site] < need) {
			return false
		}
	}
	return true
}

// sayEvery is how often the others are told how far this site's copies are, when that is all that has changed.
const sayEvery = 200 * time.Millisecond

// speak renews what this site says to the others, and reports whether what all members say lets an unsettled register be
// settled. k.mu is held.
func (k *keeper) speak(v durability.View, now time.Time) (exchanged bool) {
	if k.began.IsZero() {
		return false
	}
	var armed []string
	for _, p := range v.Peers {
		if p.Passed && slices.Contains(v.Arming, p.Name) {
			armed = append(armed, p.Name)
		}
	}
	exchanged = !k.reg.Settled && k.reg.Has(k.a.self.Name)
	for _, n := range k.a.nodes {
		if n.ready.Load() == nil { // what it has is not known yet, and must not be taken for nothing
			exchanged = exchanged && !n.waits()
			continue
		}
		s := &link.Statement{Epoch: k.reg.Epoch, Frozen: v.Frozen, Armed: armed, Secured: k.secured(n), Copies: n.copies()}
		n.say(s, now)
		exchanged = exchanged && (!n.waits() || k.exchanged(n, s))
	}
	return exchanged
}

// secured reports whether what this site acknowledged in former epochs has the receipts that the present one asks for, all
// of its journal, as it is when that is first looked at, counting as acknowledged. The database is open. k.mu is held.
func (k *keeper) secured(n *node) bool {
	if k.reg.Settled || !n.waits() {
		return true
	}
	if _, known := k.owns[n]; !known {
		k.owns[n] = n.ready.Load().journal.End()
	}
	return durability.Secured(k.owns[n], n.receipts(), k.place(), k.a.cfg.Durability.Receipts)
}

// exchanged reports whether all members say that they have what counts of a database. k.mu is held.
func (k *keeper) exchanged(n *node, own *link.Statement) bool {
	words := []durability.Word{{Secured: own.Secured, Copies: own.Copies}}
	var out []string
	for _, p := range n.peers {
		if !k.reg.Has(p.site.Name) {
			out = append(out, p.site.Name)
			continue
		}
		said := p.says()
		if said.Epoch != k.reg.Epoch {
			return false
		}
		words = append(words, durability.Word{Secured: said.Secured, Copies: said.Copies})
	}
	if k.counts[n] == nil {
		k.counts[n] = durability.Furthest(out, words)
	}
	return durability.Exchanged(k.counts[n], words)
}

// settledCuts are the positions up to which the sites that are left out count, where they go beyond those on record.
// k.mu is held.
func (k *keeper) settledCuts() quorum.Cuts {
	cuts := quorum.Cuts{}
	for n, counts := range k.counts {
		at := map[string]wal.LSN{}
		for site, lsn := range counts {
			if before, ok := k.reg.Cut(n.database.Name, site); !ok || lsn > before {
				at[site] = lsn
			}
		}
		cuts[n.database.Name] = at
	}
	return cuts
}

// copies are how far this site's copies of the others' journals are durable, as third sites want to know; with two sites
// there is none.
func (n *node) copies() map[string]wal.LSN {
	all := map[string]wal.LSN{}
	if len(n.peers) < 2 {
		return all
	}
	for _, p := range n.peers {
		if in := p.live.Load(); in != nil {
			if j, err := in.copy.Journal(); err == nil {
				all[p.site.Name] = j.Durable()
			}
		}
	}
	return all
}

// say replaces what is said to the others, if it is news; positions alone are some news now and then.
func (n *node) say(s *link.Statement, now time.Time) {
	old := n.statement.Load()
	moved := old == nil || !maps.Equal(old.Copies, s.Copies)
	news := old == nil || old.Epoch != s.Epoch || old.Secured != s.Secured || !slices.Equal(old.Frozen, s.Frozen) || !slices.Equal(old.Armed, s.Armed)
	if !news && (!moved || now.Sub(n.said) < sayEvery) {
		return
	}
	n.said = now
	n.statement.Store(s)
	for _, p := range n.peers {
		if in := p.live.Load(); in != nil {
			in.copy.Nudge()
		}
	}
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
	if !k.doubt {
		k.problem = fault{}
		if k.began.IsZero() {
			k.began = time.Now()
		}
	}
	k.mu.Unlock()
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

// probeEvery is how often a small durable write looks whether PostgreSQL here can still make one (design: durability,
// "gray failure").
const probeEvery = 250 * time.Millisecond

// watchServer keeps the health of this site's PostgreSQL.
func (k *keeper) watchServer(ctx context.Context) {
	s := &session{dsn: k.a.cfg.Postgres.DSN, database: k.a.nodes[0].database.Name, settings: map[string]string{
		"application_name": "duri_probe", "synchronous_commit": "local",
	}}
	defer s.close()
	var down time.Time
	for {
		begun := time.Now()
		ended := make(chan struct{})
		go k.watchStall(begun, ended)
		probeCtx, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := s.do(probeCtx, func(c *pgconn.PgConn) error {
			if _, err := pg.Rows(probeCtx, c, "SELECT pg_catalog.pg_logical_emit_message(true, 'duri.probe', '')"); err != nil {
				return err
			}
			return k.endWaiters(probeCtx, c)
		})
		cancel()
		close(ended)
		if ctx.Err() != nil {
			return
		}
		h := durability.Server{}
		if err != nil {
			if down.IsZero() {
				down = begun
			}
			h.Down = max(time.Since(down), time.Nanosecond)
			h.Restarting = pg.SQLState(err) == "57P03"
			h.Refused = errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT)
		} else {
			down = time.Time{}
		}
		k.mu.Lock()
		was := k.server
		if k.server = h; was.Down > 0 {
			k.serverUp = time.Now()
		}
		k.mu.Unlock()
		if (was.Down > 0) != (h.Down > 0) || was.Refused != h.Refused {
			k.log.Warn("health of PostgreSQL here", "down", h.Down.String(), "refused", h.Refused, "restarting", h.Restarting, "error", fmt.Sprint(err))
			k.stir()
		}
		every := probeEvery
		if err != nil {
			every /= 5
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(every):
		}
	}
}

// watchDisk looks whether the disk of data_dir still makes a small write durable.
func (k *keeper) watchDisk(ctx context.Context) {
	content := make([]byte, markBytes)
	path := filepath.Join(k.a.cfg.DataDir, "probe")
	t := time.NewTicker(probeEvery)
	defer t.Stop()
	for {
		k.mu.Lock()
		k.diskBusy = time.Now()
		k.mu.Unlock()
		err := probeDisk(path, content)
		k.mu.Lock()
		k.diskBusy, k.diskFault = time.Time{}, ""
		if err != nil {
			k.diskFault = err.Error()
		}
		k.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// probeDisk writes to a file in place: that it is full does not matter, and shows at the journals.
func probeDisk(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(content, 0)
	return errors.Join(err, f.Sync(), f.Close())
}

// waitersSQL ends the sessions of clients whose COMMIT waits for other sites.
const waitersSQL = `SELECT pid, pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
WHERE backend_type = 'client backend' AND wait_event = 'SyncRep' AND pid <> pg_catalog.pg_backend_pid()`

// endWaiters ends, at a site that was left out, the sessions whose COMMIT waits: it will not be acknowledged here, the door
// has ended their connections, which a waiting session does not notice, and the rows that they keep locked are needed to
// catch up. Their transactions are committed, and go to the other sites as the site's tail.
func (k *keeper) endWaiters(ctx context.Context, c *pgconn.PgConn) error {
	k.mu.Lock()
	out := !k.began.IsZero() && !k.doubt && !k.reg.Has(k.a.self.Name)
	k.mu.Unlock()
	if !out {
		return nil
	}
	rows, err := pg.Rows(ctx, c, waitersSQL)
	if pg.SQLState(err) == "42501" { // of a superuser, whom only a superuser may end
		k.fail("end sessions whose commits wait", err)
		return nil
	}
	if err == nil && len(rows) > 0 {
		k.log.Warn("sessions were ended whose commits waited for other sites", "sessions", len(rows))
	}
	return err
}

// watchStall counts for how long a probe has not ended.
func (k *keeper) watchStall(begun time.Time, ended <-chan struct{}) {
	t := time.NewTicker(probeEvery)
	defer t.Stop()
	for {
		select {
		case <-ended:
			k.mu.Lock()
			k.server.Stalled = 0
			k.mu.Unlock()
			return
		case <-t.C:
			k.mu.Lock()
			k.server.Stalled = time.Since(begun)
			k.mu.Unlock()
		}
	}
}
