package server

import (
	"math/bits"
	"sync"
	"time"

	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/wal"
)

// How far a site is behind the others, and they behind it, as gateways are told. No clock of another site is read: what counts is
// when this one has heard of what it has not applied yet. (LinkStatus.LagS, for people, is the age of the last transaction that was
// applied, by its own time, and so is long for a moment after a time in which nothing was written.)

// lagMeter measures how old what a peer has written is at the most that is not visible here. Safe for concurrent use.
type lagMeter struct {
	mu      sync.Mutex // guards the rest
	heard   time.Time  // when the peer last told where its journal ends; zero: never
	end     wal.LSN    // that it told of
	pending []heardOf  // not applied, the oldest first
	behind  bool       // something of it is of unknown age: it was there when the agent began
}

// heardOf is an end of the peer's journal, and since when what lies before it may have been there.
type heardOf struct {
	end   wal.LSN
	since time.Time
}

const (
	// quietMax is how long a peer is silent at the most while all is well: it sends a heartbeat twice a second.
	quietMax = 800 * time.Millisecond
	// pendingMax bounds what a lagMeter remembers.
	pendingMax = 256
)

// note takes where the peer's journal ends, as last heard at some time, and how far it is applied.
func (m *lagMeter) note(now, heard time.Time, end, applied wal.LSN) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if heard.IsZero() {
		return
	}
	since := now
	if !m.heard.IsZero() && heard.Sub(m.heard) > quietMax {
		since = m.heard // It was written somewhen in the silence.
	}
	if m.heard.IsZero() {
		m.behind = end > applied
	}
	if end > m.end {
		m.end = end
		m.pending = append(m.pending, heardOf{end, since})
	}
	m.heard = heard
	done := 0
	for done < len(m.pending) && m.pending[done].end <= applied {
		done++
	}
	if done > 0 {
		m.behind = false // What was there first is applied.
	}
	m.pending = append(m.pending[:0], m.pending[done:]...)
	if len(m.pending) > pendingMax {
		m.thin()
	}
}

// thin forgets every second end: what lies before the next one then counts as old as what lies before it.
func (m *lagMeter) thin() {
	kept := m.pending[:0]
	for i := 0; i < len(m.pending); i += 2 {
		one := m.pending[i]
		if i+1 < len(m.pending) {
			one.end = m.pending[i+1].end
		}
		kept = append(kept, one)
	}
	m.pending = kept
}

// lag says it; false: it is not known.
func (m *lagMeter) lag(now time.Time) (time.Duration, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.heard.IsZero() || m.behind {
		return 0, false
	}
	lag := time.Duration(0)
	if len(m.pending) > 0 {
		lag = now.Sub(m.pending[0].since)
	}
	if quiet := now.Sub(m.heard); quiet > quietMax {
		lag = max(lag, quiet)
	}
	return lag, true
}

// measureLag notes how far this site is with the peer's journal.
func (p *peer) measureLag(in *incoming) {
	applied := in.worker.Status().Applied
	beat, heard := in.copy.Heard()
	p.lag.note(time.Now(), heard, max(beat.End, p.received()), applied)
}

// stuckAfter is how long a peer may make no progress with this site's journal before nobody waits for it: a row that a client there
// has locked, a direction that is held or a site that is gone are not mended by writing less here.
const stuckAfter = 10 * time.Second

// backlog is how many bytes of this site's WAL the peer has not applied; 0 if writing less here would not help.
func (p *peer) backlog(now time.Time, end wal.LSN, heard time.Time) int64 {
	p.mu.Lock()
	applied, moved := p.ack.Applied, p.movedAt
	p.mu.Unlock()
	switch {
	case now.Sub(heard) >= link.DefaultSilence, now.Sub(moved) >= stuckAfter, applied == 0: // not connected; stuck; nothing known yet
		return 0
	case p.lacking.Load() != nil, p.n.keeper.leftOut(p.site.Name): // it re-synchronises, or is not counted in
		return 0
	}
	return int64(behind(applied, end))
}

// databaseStates are what gateways are told of the databases.
func (a *Agent) databaseStates(now time.Time) (all []link.DatabaseState) {
	for _, n := range a.nodes {
		c := n.ready.Load()
		if c == nil {
			continue
		}
		d := link.DatabaseState{Database: n.database.Name}
		end := c.journal.End()
		for _, p := range n.peers {
			l := link.SiteLag{Site: p.site.Name}
			if in := p.live.Load(); in != nil {
				_, heard := in.copy.Heard()
				d.Backlog = max(d.Backlog, p.backlog(now, end, heard))
				if p.missing.Load() == nil { // else there is a hole, whatever was applied
					l.Lag, l.Known = p.lag.lag(now)
				}
			}
			d.Lags = append(d.Lags, l)
		}
		all = append(all, d)
	}
	return all
}

// lagStep is the least difference of a lag that gateways are told at once.
const lagStep = 50 * time.Millisecond

// alike reports whether gateways need not be told at once that one state has become the other: lags and backlogs change all the
// time.
func alike(a, b []link.DatabaseState) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Database != b[i].Database || bits.Len64(uint64(a[i].Backlog>>20)) != bits.Len64(uint64(b[i].Backlog>>20)) || len(a[i].Lags) != len(b[i].Lags) {
			return false
		}
		for j, x := range a[i].Lags {
			y := b[i].Lags[j]
			if x.Site != y.Site || x.Known != y.Known || bits.Len64(uint64(x.Lag/lagStep)) != bits.Len64(uint64(y.Lag/lagStep)) {
				return false
			}
		}
	}
	return true
}
