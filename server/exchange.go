package server

import (
	"maps"
	"slices"
	"time"

	"github.com/duri-io/duri/durability"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/quorum"
	"github.com/duri-io/duri/wal"
)

// What members tell each other, and how a lost site's tail is exchanged until the register can be settled (durability.md
// section 9).

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
