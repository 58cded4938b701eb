package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/duri-io/duri/link"
)

// A site that is drained takes no new transactions of clients, if another one does: a planned switch. Gateways are told, and move
// sessions between two transactions.

// drainFile says that no new transactions are taken; it outlives the agent, as what it is for may be a restart.
func (h *host) drainFile() string { return filepath.Join(h.a.cfg.DataDir, "drained") }

// neverAsk stands in the file, in the place of a time, when sessions that cannot be moved are not asked to leave.
const neverAsk = "never"

func readDrain(path string) (link.DrainOrder, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return link.DrainOrder{}, nil
	}
	if err != nil {
		return link.DrainOrder{}, fmt.Errorf("read whether the site is drained: %w", err)
	}
	words := strings.Fields(string(b))
	o := link.DrainOrder{Drain: len(words) > 0}
	if len(words) > 1 && words[1] != neverAsk {
		if o.After, err = time.ParseDuration(words[1]); err != nil {
			return link.DrainOrder{}, &hinted{fmt.Sprintf("%s does not say how long sessions may stay: %v", path, err), "remove the file, and drain the site again"}
		}
		o.Ask = true
	}
	return o, nil
}

// readOrder takes the order that the agent's former life has left.
func (h *host) readOrder() error {
	o, err := readDrain(h.drainFile())
	h.drainMu.Lock()
	defer h.drainMu.Unlock()
	h.drains = draining{DrainOrder: o, since: time.Now(), told: map[string]stayings{}, gateways: h.drains.gateways}
	return err
}

func drainText(o link.DrainOrder) string {
	switch {
	case !o.Drain:
		return ""
	case !o.Ask:
		return "drained " + neverAsk + "\n"
	}
	return "drained " + o.After.String() + "\n"
}

// draining is what of a drain is in force.
type draining struct {
	link.DrainOrder
	since time.Time // of the order, or of the agent

	gateways int                 // that follow this site
	told     map[string]stayings // by gateway, since the order
}

// stayings are sessions of a gateway.
type stayings struct {
	at       time.Time
	sessions map[string]int
}

// toldFor is how long what a gateway has told counts. It tells every stayEvery.
const (
	toldFor   = 3 * time.Second
	stayEvery = 500 * time.Millisecond
)

// asks tells whether sessions that cannot be moved are to leave, and else in which time.
func (d *draining) asks(now time.Time) (leave bool, in time.Duration) {
	if !d.Drain || !d.Ask {
		return false, 0
	}
	in = max(0, d.since.Add(d.After).Sub(now))
	return in == 0, in
}

// left sums up what gateways have told.
func (d *draining) left(now time.Time) (sessions map[string]int, all bool) {
	sessions = map[string]int{}
	n := 0
	for _, s := range d.told {
		if now.Sub(s.at) > toldFor {
			continue
		}
		n++
		for why, k := range s.sessions {
			sessions[why] += k
		}
	}
	return sessions, n >= d.gateways
}

func (h *host) drained() (yes, leave bool) {
	h.drainMu.Lock()
	defer h.drainMu.Unlock()
	if h.leaves.Load() {
		return true, true
	}
	leave, _ = h.drains.asks(time.Now())
	return h.drains.Drain, leave
}

// order lets gateways begin no new transactions here, or lets them again. The same order once more changes nothing.
func (h *host) order(o link.DrainOrder) error {
	h.drainMu.Lock()
	defer h.drainMu.Unlock()
	if h.drains.DrainOrder == o {
		return nil
	}
	if err := writeDurably(h.drainFile(), []byte(drainText(o))); err != nil {
		return fmt.Errorf("write down whether the site is drained: %w", err)
	}
	if o.Drain != h.drains.Drain {
		h.drains.since, h.drains.told = time.Now(), map[string]stayings{}
	}
	h.drains.DrainOrder = o
	h.a.log.Warn("new transactions of clients", "taken", !o.Drain, "stay_asked_to_leave", o.Ask, "after", o.After)
	h.news.tell()
	return nil
}

// tellMax is how long it is waited for gateways to tell who stays.
const tellMax = time.Second

// drain gives an order, and tells what is left when all gateways have told, or some have not within tellMax.
func (h *host) drain(ctx context.Context, o link.DrainOrder) (link.DrainState, error) {
	if err := h.order(o); err != nil || !o.Drain {
		return link.DrainState{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, tellMax)
	defer cancel()
	for {
		st := h.leftNow()
		if st.All {
			return st, nil
		}
		select {
		case <-ctx.Done():
			return st, nil
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (h *host) leftNow() (st link.DrainState) {
	_, st.Connections, _ = h.entry.Status()
	h.drainMu.Lock()
	defer h.drainMu.Unlock()
	st.Staying, st.All = h.drains.left(time.Now())
	_, st.In = h.drains.asks(time.Now())
	st.Asks = h.drains.Drain && h.drains.Ask
	return st
}

// Staying is that of link.Asked.
func (h *host) Staying(_ context.Context, gateway string, sessions map[string]int) error {
	h.drainMu.Lock()
	defer h.drainMu.Unlock()
	now := time.Now()
	maps.DeleteFunc(h.drains.told, func(_ string, s stayings) bool { return now.Sub(s.at) > toldFor })
	if h.drains.Drain && len(h.drains.told) < stayingMax {
		h.drains.told[gateway] = stayings{now, sessions}
	}
	return nil
}

// stayingMax bounds how many gateways are listened to.
const stayingMax = 1000

// followed counts the gateways that follow this site.
func (h *host) followed(by int) {
	h.drainMu.Lock()
	defer h.drainMu.Unlock()
	h.drains.gateways += by
}

// GatewayStatus is about gateways' connections to a site's PostgreSQL.
type GatewayStatus struct {
	Draining    bool   `json:"draining"`          // no new transactions, if another site takes them
	Refuses     string `json:"refuses,omitempty"` // why it takes no clients
	Connections int    `json:"connections"`       // of gateways here and elsewhere
	// While it is drained: sessions that stay, by what for, and in which time those that cannot be moved are asked to leave; 0:
	// they are, nil: they are not.
	Staying  map[string]int `json:"staying,omitempty"`
	LeaveInS *float64       `json:"leave_in_s,omitempty"`
}

func (h *host) status() *GatewayStatus {
	if h == nil {
		return nil
	}
	st, left := h.state(), h.leftNow()
	g := &GatewayStatus{Draining: st.Draining, Refuses: st.Refuses, Connections: left.Connections}
	if st.Draining {
		g.Staying, g.LeaveInS = left.Staying, leaveIn(left)
	}
	return g
}

func leaveIn(st link.DrainState) *float64 {
	if !st.Asks {
		return nil
	}
	s := st.In.Seconds()
	return &s
}

// DrainRequest asks that a site takes no new transactions of clients, or takes them again.
type DrainRequest struct {
	Site  string `json:"site"`
	Drain bool   `json:"drain"`
	// LeaveAfterS is after how many seconds sessions that cannot be moved are asked to leave; nil: they are not.
	LeaveAfterS *float64 `json:"leave_after_s,omitempty"`
}

// DrainReport is what was ordered, and what is left at a site that is drained.
type DrainReport struct {
	Site        string         `json:"site"`
	Drain       bool           `json:"drain"`
	Connections int            `json:"connections"`          // of gateways to PostgreSQL
	Staying     map[string]int `json:"staying,omitempty"`    // sessions that stay, by what for
	All         bool           `json:"all"`                  // all gateways that are known have told of theirs
	LeaveInS    *float64       `json:"leave_in_s,omitempty"` // in which time those that cannot be moved are asked to leave; 0: they are, nil: they are not
}

// leaveAfterMax bounds how long sessions may be let stay: longer is never.
const leaveAfterMax = 365 * 24 * time.Hour

func (r DrainRequest) order() (link.DrainOrder, error) {
	o := link.DrainOrder{Drain: r.Drain}
	if !r.Drain || r.LeaveAfterS == nil {
		return o, nil
	}
	if !(*r.LeaveAfterS >= 0 && *r.LeaveAfterS <= leaveAfterMax.Seconds()) {
		return o, &hinted{fmt.Sprintf("sessions cannot be asked to leave after %v s", *r.LeaveAfterS), "give a time of 0 s up to a year, or none"}
	}
	o.Ask, o.After = true, time.Duration(*r.LeaveAfterS*float64(time.Second)).Round(time.Millisecond)
	return o, nil
}

var errNoHost = &hinted{"the agent takes no connections of gateways", "set gateway.mode to session or transaction in duri.yaml"}

// drain asks the site itself, here or through its agent.
func (a *Agent) drain(ctx context.Context, req DrainRequest) (DrainReport, error) {
	o, err := req.order()
	if err != nil {
		return DrainReport{}, err
	}
	var st link.DrainState
	if req.Site == a.self.Name {
		if a.host == nil {
			return DrainReport{}, errNoHost
		}
		st, err = a.host.drain(ctx, o)
	} else {
		c := a.clients[req.Site]
		if c == nil {
			return DrainReport{}, &hinted{fmt.Sprintf("there is no site %q", req.Site), "sites are " + strings.Join(a.cfg.SiteNames(), ", ")}
		}
		asking, cancel := context.WithTimeout(ctx, tellMax+askPeer)
		defer cancel()
		st, err = c.Drain(asking, o)
	}
	return DrainReport{req.Site, req.Drain, st.Connections, st.Staying, st.All, leaveIn(st)}, err
}

func (a *Agent) postDrain(w http.ResponseWriter, r *http.Request) {
	var req DrainRequest
	var out DrainReport
	err := json.NewDecoder(r.Body).Decode(&req)
	if err == nil {
		out, err = a.drain(r.Context(), req)
	}
	if err != nil {
		writeError(w, http.StatusConflict, err)
		return
	}
	writeJSON(w, http.StatusOK, out)
}
