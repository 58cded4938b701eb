package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/durability"
	"github.com/duri-io/duri/quorum"
)

// DurabilityStatus says what an acknowledged commit means at this site right now, and why.
type DurabilityStatus struct {
	Mode      quorum.Mode     `json:"mode"` // of the register, as last read
	Guarantee string          `json:"guarantee"`
	Known     bool            `json:"known"`  // the register was read since the agent began
	Member    bool            `json:"member"` // this site may acknowledge
	Register  quorum.Register `json:"register"`
	Receipts  int             `json:"receipts"` // that a commit waits for in this mode
	Policy    string          `json:"policy"`
	Frozen    []string        `json:"frozen,omitempty"` // sites whose receipts do not count just now
	Arming    []string        `json:"arming,omitempty"` // sites that come back
	Blocked   string          `json:"blocked,omitempty"`
	Awaits    string          `json:"awaits,omitempty"` // what other members must see likewise before it is done
	// Unheeded are databases whose commits do not wait, because synchronous_standby_names does not name their agent.
	Unheeded []string    `json:"unheeded,omitempty"`
	Problem  *fault      `json:"problem,omitempty"`
	Door     *DoorStatus `json:"door,omitempty"`
}

// DoorStatus is about the way of clients through the agent.
type DoorStatus struct {
	Open        bool   `json:"open"`
	Shut        string `json:"shut,omitempty"` // why it is shut
	Connections int    `json:"connections"`
	Total       int64  `json:"total"`
}

// status is what the keeper knows; nil without a register.
func (k *keeper) status() *DurabilityStatus {
	if k == nil {
		return nil
	}
	st := k.standing()
	k.mu.Lock()
	defer k.mu.Unlock()
	d := &DurabilityStatus{
		Mode: k.reg.Mode(k.siteNames()), Known: !k.began.IsZero() && !k.doubt, Member: st.Member, Register: k.reg.Clone(),
		Receipts: quorum.Receipts(k.a.cfg.Durability.Receipts, len(k.reg.Members)), Policy: string(k.a.cfg.Durability.Policy), Arming: st.Arming,
	}
	for s := range k.frozen {
		d.Frozen = append(d.Frozen, s)
	}
	slices.Sort(d.Frozen)
	switch k.last.Kind {
	case durability.Blocked:
		d.Blocked = k.last.Why
	case durability.Await:
		d.Awaits = k.last.Why
	}
	if k.problem.Text != "" {
		f := k.problem
		d.Problem = &f
	}
	for _, n := range k.a.nodes {
		if n.waits() && n.ready.Load() != nil && !n.counted.Load() {
			d.Unheeded = append(d.Unheeded, n.database.Name)
		}
	}
	stopped := ""
	for _, n := range k.a.nodes {
		if n.waits() {
			stopped = cmp.Or(stopped, n.unable(time.Time{}))
		}
	}
	waits := slices.ContainsFunc(k.a.cfg.Databases, func(db config.Database) bool { return k.a.cfg.Waits(db.Name) })
	if d.Guarantee = guarantee(d, k.a.self.Name, waits); waits && d.Member && stopped != "" {
		d.Guarantee = "commits wait: " + stopped
	}
	if k.door != nil {
		shut, now, total := k.door.Status()
		d.Door = &DoorStatus{shut == "", shut, now, total}
	}
	return d
}

// guarantee puts into a sentence what a commit that is acknowledged now survives.
func guarantee(d *DurabilityStatus, self string, waits bool) string {
	since := func() string { return d.Register.At.Local().Format(time.TimeOnly) }
	switch {
	case !waits:
		return "commits wait for no other site: what is not shipped yet is lost with the site"
	case !d.Known && !d.Member:
		return "the register is not known here: nothing is acknowledged"
	case !d.Known:
		return "what the register says now is not known here; commits that need its answer wait"
	case !d.Member:
		return fmt.Sprintf("%s is left out since %s and acknowledges nothing: %s", self, since(), d.Register.Reason)
	case len(d.Unheeded) > 0:
		return fmt.Sprintf("commits in %s do not wait: PostgreSQL does not name its agent in synchronous_standby_names", strings.Join(d.Unheeded, ", "))
	case len(d.Register.Members)-1-len(d.Frozen) < d.Receipts:
		return fmt.Sprintf("commits wait: %s does not answer, and the register has not decided yet", strings.Join(d.Frozen, " and "))
	case d.Receipts == 0:
		return fmt.Sprintf("%s since %s: acknowledged commits are on the disk of %s only, because %s", d.Mode, since(), self, d.Register.Reason)
	}
	disks := "disk of one other site"
	if d.Receipts > 1 {
		disks = fmt.Sprintf("disks of %d other sites", d.Receipts)
	}
	text := "RPO 0: an acknowledged commit is on the " + disks + " as well"
	if d.Mode == quorum.Reduced {
		text = fmt.Sprintf("%s since %s (%s), because %s; %s", d.Mode, since(), strings.Join(d.Register.Members, " and "), d.Register.Reason, text)
	}
	if !d.Register.Settled {
		text += "; what a lost site had acknowledged is being exchanged"
	}
	return text
}

// ForceRequest is a person's take-over.
type ForceRequest struct {
	Keep       []string `json:"keep"` // the sites that go on
	By         string   `json:"by"`
	Reason     string   `json:"reason"`
	AcceptLoss bool     `json:"accept_loss"`
}

// LossReport says what a forced take-over may lose: for each site that is left out, what is known to be only there.
type LossReport struct {
	Register quorum.Register `json:"register"` // as it is, or as it was made
	Done     bool            `json:"done"`
	Lost     []PossibleLoss  `json:"lost"`
}

// PossibleLoss is about one database of a site that is left out.
type PossibleLoss struct {
	Site     string    `json:"site"`
	Database string    `json:"database"`
	Have     string    `json:"have"`           // this site has its transactions up to here
	End      string    `json:"end,omitempty"`  // it said that they reach to here, when it was last heard
	Bytes    int64     `json:"bytes"`          // of WAL between the two, at least
	Heard    time.Time `json:"heard,omitzero"` // when that was
}

var errNoRegister = &hinted{"this cluster has no register, or does not use it", "with durability.policy availability-first all sites go on, and nobody asks it; else add quorum to duri.yaml, as docs/reference/config.md tells, or make the cluster with `duri init --witness`"}

func (a *Agent) getRegister(w http.ResponseWriter, _ *http.Request) {
	if a.keeper == nil {
		writeError(w, http.StatusConflict, errNoRegister)
		return
	}
	writeJSON(w, http.StatusOK, a.keeper.status())
}

func (a *Agent) postForce(w http.ResponseWriter, r *http.Request) {
	var req ForceRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		writeError(w, http.StatusBadRequest, err)
		return
	}
	if a.keeper == nil {
		writeError(w, http.StatusConflict, errNoRegister)
		return
	}
	report, err := a.keeper.force(r.Context(), req)
	if err != nil {
		writeError(w, http.StatusConflict, err)
		return
	}
	writeJSON(w, http.StatusOK, report)
}

// force tells what a forced take-over may lose and, when that is accepted, does it.
func (k *keeper) force(ctx context.Context, req ForceRequest) (LossReport, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*registerTimeout)
	defer cancel()
	for _, s := range req.Keep {
		if !slices.Contains(k.siteNames(), s) {
			return LossReport{}, &hinted{fmt.Sprintf("there is no site %q", s), "sites are " + strings.Join(k.siteNames(), ", ")}
		}
	}
	for _, s := range req.Keep {
		if slices.ContainsFunc(k.peersOf(s), func(p *peer) bool { return p.lacking.Load() != nil }) {
			return LossReport{}, &hinted{"a gap is open: " + s + " lacks what this site wrote", "keep " + k.a.self.Name + " alone; the other one comes back by itself when it has re-synchronised"}
		}
	}
	reg, err := k.store.Get(ctx)
	if err != nil {
		return LossReport{}, fmt.Errorf("read the register: %w", err)
	}
	k.adopt(reg)
	gone := slices.DeleteFunc(k.siteNames(), func(s string) bool { return slices.Contains(req.Keep, s) })
	if slices.Contains(gone, k.a.self.Name) {
		return LossReport{}, &hinted{"a forced take-over is made at a site that goes on", "run it where the data is that you keep"}
	}
	out := LossReport{Register: reg, Lost: k.losable(gone)}
	if !req.AcceptLoss {
		return out, nil
	}
	k.freeze(gone, reg.Epoch)
	// Without cuts: what the others have beyond what is here may have been acknowledged there alone, so that it counts.
	next, err := quorum.Force(reg, req.Keep, nil, quorum.Note{Reason: req.Reason, By: req.By, At: time.Now().UTC()})
	if err != nil {
		return out, err
	}
	if out.Register, err = k.swap(ctx, next); err != nil {
		return out, fmt.Errorf("change the register: %w", err)
	}
	out.Done = true
	for _, n := range k.a.nodes {
		n.event("register", fmt.Sprintf("forced by %s: members %s; %s", req.By, strings.Join(next.Members, " "), req.Reason))
	}
	return out, nil
}

func (k *keeper) losable(gone []string) (all []PossibleLoss) {
	for _, s := range gone {
		for _, p := range k.peersOf(s) {
			in := p.live.Load()
			if in == nil {
				continue
			}
			loss := PossibleLoss{Site: s, Database: p.n.database.Name}
			beat, at := in.copy.Heard()
			j, err := in.copy.Journal()
			if err == nil {
				loss.Have = j.Durable().String()
			}
			if !at.IsZero() {
				loss.Heard, loss.End = at, beat.End.String()
			}
			if err == nil && beat.End > j.Durable() {
				loss.Bytes = int64(beat.End - j.Durable())
			}
			if g := p.missing.Load(); g != nil && g.ID != 0 { // what came behind a gap does not make up for it
				loss.Have = g.From.String()
				loss.Bytes = int64(max(beat.End, g.To) - g.From)
			}
			all = append(all, loss)
		}
	}
	return all
}

// RearmRequest asks to take a site back at once, without waiting for its link to be stable.
type RearmRequest struct {
	Site string `json:"site"`
}

func (a *Agent) postRearm(w http.ResponseWriter, r *http.Request) {
	var req RearmRequest
	err := json.NewDecoder(r.Body).Decode(&req)
	switch {
	case err != nil:
	case a.keeper == nil:
		err = errNoRegister
	default:
		err = a.keeper.rearm(req.Site)
	}
	if err != nil {
		writeError(w, http.StatusConflict, err)
		return
	}
	writeJSON(w, http.StatusOK, a.keeper.status())
}

// rearm begins to arm a site that has caught up.
func (k *keeper) rearm(site string) error {
	v := k.view(time.Now())
	i := slices.IndexFunc(v.Peers, func(p durability.Peer) bool { return p.Name == site })
	switch {
	case i < 0:
		return &hinted{fmt.Sprintf("there is no other site %q", site), "run this at a site that is a member, and name the one that comes back"}
	case slices.Contains(v.Members, site):
		return &hinted{site + " is a member already", "nothing is to be done"}
	case !slices.Contains(v.Members, v.Self):
		return &hinted{v.Self + " is no member itself", "run this at a member: " + strings.Join(v.Members, ", ")}
	case !v.Peers[i].CaughtUp:
		return &hinted{site + " has not caught up", "see with `duri status` how far it is; it comes back by itself"}
	}
	k.arm([]string{site}, v.Epoch)
	k.stir()
	return nil
}

// FenceRequest keeps clients out of this site, or lets them in again.
type FenceRequest struct {
	Fence  bool   `json:"fence"`
	Reason string `json:"reason"`
}

func (a *Agent) postFence(w http.ResponseWriter, r *http.Request) {
	var req FenceRequest
	err := json.NewDecoder(r.Body).Decode(&req)
	switch {
	case err != nil:
	case a.keeper == nil:
		err = errNoRegister
	case a.keeper.door == nil:
		err = &hinted{"clients do not come through this agent, so that it cannot keep them out", "set gateway.listen in duri.yaml, and let PostgreSQL listen where only the agent reaches it"}
	case req.Fence && strings.TrimSpace(req.Reason) == "":
		err = errors.New("a fence needs a reason: clients are told")
	default:
		a.keeper.setFence(req)
	}
	if err != nil {
		writeError(w, http.StatusConflict, err)
		return
	}
	writeJSON(w, http.StatusOK, a.keeper.status())
}

func (k *keeper) setFence(req FenceRequest) {
	k.mu.Lock()
	k.fence = ""
	if req.Fence {
		k.fence = "fenced: " + req.Reason
	}
	k.mu.Unlock()
	k.guardDoor()
}
