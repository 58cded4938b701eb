package server

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/fkey"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/verify"
	"github.com/duri-io/duri/wal"
)

// Health of a part, worst last.
const (
	HealthOK       = "ok"
	HealthDegraded = "degraded" // works, but somebody should look
	HealthDown     = "down"     // does not work
)

// SiteStatus is what an agent says of itself: `duri status` prints it. Durations are seconds, sizes bytes. Fields are
// only added (docs/reference/json.md).
type SiteStatus struct {
	Cluster   string           `json:"cluster"`
	ClusterID string           `json:"cluster_id"`
	Site      string           `json:"site"`
	Version   string           `json:"version"`
	At        time.Time        `json:"at"`
	UptimeS   float64          `json:"uptime_s"`
	Databases []DatabaseStatus `json:"databases"`
	// Durability is about commits that wait for other sites; nil without a register.
	Durability *DurabilityStatus `json:"durability,omitempty"`
	// Gateway is about gateways' connections to PostgreSQL; nil where gateway.mode lets none in.
	Gateway *GatewayStatus `json:"gateway,omitempty"`
}

// DatabaseStatus is one database at a site.
type DatabaseStatus struct {
	Name       string        `json:"name"`
	State      string        `json:"state"`
	Health     string        `json:"health"`
	Problem    *fault        `json:"problem,omitempty"`
	Journal    JournalStatus `json:"journal"`
	Local      apply.Stats   `json:"local"`
	OverBudget bool          `json:"over_budget"`
	// Budget is how much of its share of journal.budget the journals use; nil while the database is not open. WALBudget is
	// the same for the WAL that the slot holds, where max_slot_wal_keep_size bounds it.
	Budget    *BudgetStatus `json:"budget,omitempty"`
	WALBudget *BudgetStatus `json:"wal_budget,omitempty"`
	// Gaps are open holes between this site and another one, at both.
	Gaps []GapStatus `json:"gaps,omitempty"`
	// Ghosts are transactions of other sites that do not count and that those have not reversed yet; Reversed is up to where
	// this site has reversed its own, as another one told of them.
	Ghosts   []Ghosts       `json:"ghosts,omitempty"`
	Reversed []ReversedUpTo `json:"reversed,omitempty"`

	Links []LinkStatus `json:"links"`
	// Policies are in force here; nil while the database is not open. The peers compare them with theirs.
	Policies *policy.Set `json:"policies,omitempty"`
	// ForeignKeys is about rows that lost their parent.
	ForeignKeys fkey.Status `json:"foreign_keys"`
	// Parked counts the rows that are set aside because of a unique value.
	Parked       int           `json:"parked"`
	ParkedTables []ParkedTable `json:"parked_tables,omitempty"`
	// ParkedAt is when they were last counted.
	ParkedAt time.Time `json:"parked_at,omitzero"`
	// Verify is about the comparison in the background with each peer, at the site that drives it.
	Verify []verify.WatchStatus `json:"verify,omitempty"`
}

// JournalStatus describes a journal at this site.
type JournalStatus struct {
	Start        wal.LSN `json:"start"`
	End          wal.LSN `json:"end"`
	Durable      wal.LSN `json:"durable"`
	Transactions uint64  `json:"transactions"`
	Bytes        int64   `json:"bytes"`
}

// LinkStatus is the direction from a peer to this site.
type LinkStatus struct {
	From      string        `json:"from"`
	Health    string        `json:"health"`
	Connected bool          `json:"connected"`
	Problem   *fault        `json:"problem,omitempty"`
	Origin    wal.LSN       `json:"origin"`   // where the peer's journal ends, as last heard
	Received  JournalStatus `json:"received"` // this site's copy of it
	Apply     apply.Status  `json:"apply"`
	LagS      float64       `json:"lag_s"`     // age of the oldest transaction that is not applied here
	LagBytes  int64         `json:"lag_bytes"` // of the peer's WAL
	SkewS     float64       `json:"skew_s"`    // the peer's clock minus this site's
	PeerHas   wal.LSN       `json:"peer_has"`  // durable at the peer, of this site's journal
}

// Status assembles the agent's view. It never waits for PostgreSQL or a peer.
func (a *Agent) Status() SiteStatus {
	s := SiteStatus{
		Cluster: a.cfg.Cluster.Name, ClusterID: a.cfg.Cluster.ID, Site: a.self.Name, Version: a.version,
		At: time.Now().UTC(), UptimeS: time.Since(a.started).Seconds(),
	}
	for _, n := range a.nodes {
		d := n.status()
		d.Verify = a.watchStatus(n)
		s.Databases = append(s.Databases, d)
	}
	s.Durability, s.Gateway = a.keeper.status(), a.host.status()
	return s
}

func (a *Agent) statusJSON(context.Context) ([]byte, error) { return json.Marshal(a.Status()) }

func (n *node) status() DatabaseStatus {
	n.mu.Lock()
	d := DatabaseStatus{Name: n.database.Name, State: n.state, Health: HealthOK, OverBudget: n.over.Load()}
	if n.fault.Text != "" {
		f := n.fault
		d.Problem, d.Health = &f, HealthDown
	}
	d.ParkedTables, d.ParkedAt = n.parked, n.parkedAt
	n.mu.Unlock()
	for _, t := range d.ParkedTables {
		d.Parked += t.Rows
	}
	d.Policies, d.ForeignKeys = n.policies.Load(), n.checker.Status()
	if d.State != stateReady && d.Health == HealthOK {
		d.Health = HealthDegraded
	}
	d.Budget, d.WALBudget = n.room.Load(), n.walRoom.Load()
	for _, b := range []*BudgetStatus{d.Budget, d.WALBudget} {
		if b != nil && b.Level != LevelOK && d.Health == HealthOK {
			d.Health = HealthDegraded
		}
	}
	for _, p := range n.peers {
		g, reversed := p.toldGhosts()
		if g.Open > 0 {
			d.Ghosts = append(d.Ghosts, g)
		}
		if reversed > 0 {
			d.Reversed = append(d.Reversed, ReversedUpTo{p.site.Name, reversed})
		}
	}
	if d.Gaps = n.gaps(); len(d.Gaps) > 0 && d.Health == HealthOK {
		d.Health = HealthDegraded
	}
	if d.OverBudget {
		d.Health = HealthDown
	}
	if c := n.ready.Load(); c != nil {
		st := c.journal.State()
		d.Journal = JournalStatus{st.Start, st.End, st.Durable, st.Txns, st.DiskBytes}
		d.Local = c.local.Stats()
	}
	for _, p := range n.peers {
		d.Links = append(d.Links, p.status(n.cfg.MaxClockSkew.Std()))
	}
	return d
}

func (p *peer) status(maxSkew time.Duration) LinkStatus {
	l := LinkStatus{From: p.site.Name, Health: HealthOK}
	p.mu.Lock()
	l.PeerHas = p.ack.Durable
	last, idle, since, unasked := p.linkFault, p.applyFault, p.applySince, p.unasked
	if p.held.Text != "" {
		idle = p.held
	}
	p.mu.Unlock()
	in := p.live.Load()
	if in == nil {
		l.Health = HealthDegraded
		return l
	}
	l.Apply = in.worker.Status()
	if past(l.Apply.LastErrorAt, since, time.Now()) {
		l.Apply.LastError, l.Apply.LastHint = "", ""
	}
	if j, err := in.copy.Journal(); err == nil {
		st := j.State()
		l.Received = JournalStatus{st.Start, st.End, st.Durable, st.Txns, st.DiskBytes}
	}
	beat, at := in.copy.Heard()
	l.Connected = !at.IsZero() && time.Since(at) < link.DefaultSilence
	l.Origin, l.SkewS = max(beat.End, l.Received.End), beat.Clock.Offset.Seconds()
	if !l.Connected && last.Text != "" {
		l.Problem = &last
	}
	l.lag(time.Now())
	l.judge(maxSkew, idle)
	if unasked && l.Problem == nil {
		l.Health = HealthDegraded
		l.Problem = &fault{
			Text: "it is not known yet what policies " + l.From + " declares for its tables, and its changes wait for that",
			Hint: "it goes on by itself as soon as the agent of " + l.From + " has its database open",
		}
	}
	return l
}

// pastAfter is how long a run of the apply worker must last to prove that the error of the run before is gone. Most
// errors come back within a moment of the start.
const pastAfter = 10 * time.Second

// past tells that an error of the worker is of an earlier run, and that the present one goes well: without a transaction
// to apply, nothing else would ever take it back.
func past(failed, since, now time.Time) bool {
	return failed.Before(since) && now.Sub(since) >= pastAfter
}

// lag measures how far apply is behind. Without anything unapplied it is zero, however long ago the last was.
func (l *LinkStatus) lag(now time.Time) {
	if l.Origin <= l.Apply.Applied {
		return
	}
	l.LagBytes = int64(l.Origin - l.Apply.Applied)
	if l.Apply.AppliedTime != 0 {
		l.LagS = max(0, now.Sub(l.Apply.AppliedTime.Std()).Seconds())
	}
}

// judge sets health and the most telling problem; idle is why apply does not even run.
func (l *LinkStatus) judge(maxSkew time.Duration, idle fault) {
	switch {
	case idle.Text != "":
		l.Health, l.Problem = HealthDown, &idle
	case l.Apply.LastError != "":
		l.Health = HealthDown
		l.Problem = &fault{Text: l.Apply.LastError, Hint: l.Apply.LastHint, At: l.Apply.LastErrorAt}
	case !l.Connected:
		l.Health = HealthDown
		if l.Problem == nil {
			l.Problem = &fault{Text: "not connected to " + l.From}
		}
	case l.SkewS > maxSkew.Seconds() || l.SkewS < -maxSkew.Seconds():
		l.Health = HealthDegraded
		l.Problem = &fault{
			Text: fmt.Sprintf("the clock of %s differs by %.3f s (max_clock_skew %s); its changes are held until this site's clock has passed them", l.From, l.SkewS, maxSkew),
			Hint: "discipline both clocks by NTP",
		}
	case l.Apply.Held > 0:
		l.Health, l.Problem = HealthDegraded, heldProblem(l.Apply)
	}
}
