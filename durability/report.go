// Package durability decides, purely, what a site may acknowledge and when it must ask for a change of the register
// (design: RPO 0 and partitions). It does no I/O: package server acts on what it decides and reports.
package durability

import (
	"slices"

	"github.com/duri-io/duri/wal"
)

// Progress says how far something has come with a site's own stream: received (at its own site: appended to the
// journal), fsynced in a journal, visible in tables.
type Progress struct {
	Received, Durable, Applied wal.LSN
}

// Receipt is what another site has acknowledged of this site's stream. Receipts are cumulative.
type Receipt struct {
	Site string
	// Epoch is that of the register under which the receipt was given.
	Epoch uint64
	Progress
}

// Standing is this site's place in the register.
type Standing struct {
	Epoch   uint64
	Member  bool     // this site may acknowledge
	Others  []string // the other members, without those whose receipts do not count just now (frozen)
	Members int      // their number in the register, this site included
	// Arming are sites that are about to become members again: what is reported waits for them already.
	Arming []string
}

// Report gives the positions that PostgreSQL may be told, for synchronous_commit = remote_write, on and remote_apply
// (write, flush, apply): required others have the position, and this site's own journal has it. required is the number of
// receipts that are asked for; a register with fewer members asks for all of them. ok is false when nothing may be
// reported: this site is no member, or receipts of too few members count.
//
// A position that was reported once is never taken back: the caller keeps the greatest.
func Report(own Progress, receipts []Receipt, s Standing, required int) (p Progress, ok bool) {
	if !s.Member {
		return Progress{}, false
	}
	p = Progress{own.Received, own.Durable, own.Durable} // visible here at the latest when it is released
	k := min(required, s.Members-1)
	var counted []Progress
	for _, r := range receipts {
		if r.Epoch != s.Epoch {
			continue
		}
		switch {
		case slices.Contains(s.Others, r.Site):
			counted = append(counted, r.Progress)
		case slices.Contains(s.Arming, r.Site):
			p = lesser(p, r.Progress)
		}
	}
	for _, a := range s.Arming {
		if !slices.ContainsFunc(receipts, func(r Receipt) bool { return r.Site == a && r.Epoch == s.Epoch }) {
			return Progress{}, false
		}
	}
	if len(counted) < k {
		return Progress{}, false
	}
	if k > 0 {
		p = lesser(p, Progress{
			nth(counted, k, func(p Progress) wal.LSN { return p.Received }),
			nth(counted, k, func(p Progress) wal.LSN { return p.Durable }),
			nth(counted, k, func(p Progress) wal.LSN { return p.Applied }),
		})
	}
	p.Applied = min(p.Applied, p.Durable)
	return p, true
}

func lesser(a, b Progress) Progress {
	return Progress{min(a.Received, b.Received), min(a.Durable, b.Durable), min(a.Applied, b.Applied)}
}

// nth is the position that k of them have reached.
func nth(all []Progress, k int, of func(Progress) wal.LSN) wal.LSN {
	lsns := make([]wal.LSN, len(all))
	for i, p := range all {
		lsns[i] = of(p)
	}
	slices.Sort(lsns)
	return lsns[len(lsns)-k]
}
