package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

// A site that is drained takes no new transactions of clients, if another one does: a planned switch. Gateways are told, and move
// sessions between two transactions.

// drainFile says that no new transactions are taken; it outlives the agent, as what it is for may be a restart.
func (h *host) drainFile() string { return filepath.Join(h.a.cfg.DataDir, "drained") }

func readDrain(path string) (bool, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read whether the site is drained: %w", err)
	}
	return strings.TrimSpace(string(b)) != "", nil
}

func (h *host) drained() bool {
	h.drainMu.Lock()
	defer h.drainMu.Unlock()
	return h.draining
}

// drain lets gateways begin no new transactions here, or lets them again.
func (h *host) drain(yes bool) error {
	h.drainMu.Lock()
	defer h.drainMu.Unlock()
	if h.draining == yes {
		return nil
	}
	content := ""
	if yes {
		content = "drained\n"
	}
	if err := writeDurably(h.drainFile(), []byte(content)); err != nil {
		return fmt.Errorf("write down whether the site is drained: %w", err)
	}
	h.draining = yes
	h.a.log.Warn("new transactions of clients", "taken", !yes)
	h.news.tell()
	return nil
}

// GatewayStatus is about gateways' connections to a site's PostgreSQL.
type GatewayStatus struct {
	Draining    bool   `json:"draining"`          // no new transactions, if another site takes them
	Refuses     string `json:"refuses,omitempty"` // why it takes no clients
	Connections int    `json:"connections"`       // of gateways here and elsewhere
}

func (h *host) status() *GatewayStatus {
	if h == nil {
		return nil
	}
	st := h.state()
	_, now, _ := h.entry.Status()
	return &GatewayStatus{st.Draining, st.Refuses, now}
}

// DrainRequest asks that a site takes no new transactions of clients, or takes them again.
type DrainRequest struct {
	Site  string `json:"site"`
	Drain bool   `json:"drain"`
}

var errNoHost = &hinted{"the agent takes no connections of gateways", "set gateway.mode to session or transaction in duri.yaml"}

// drain asks the site itself, here or through its agent.
func (a *Agent) drain(ctx context.Context, req DrainRequest) error {
	if req.Site == a.self.Name {
		if a.host == nil {
			return errNoHost
		}
		return a.host.drain(req.Drain)
	}
	c := a.clients[req.Site]
	if c == nil {
		return &hinted{fmt.Sprintf("there is no site %q", req.Site), "sites are " + strings.Join(a.cfg.SiteNames(), ", ")}
	}
	ctx, cancel := context.WithTimeout(ctx, askPeer)
	defer cancel()
	return c.Drain(ctx, req.Drain)
}

func (a *Agent) postDrain(w http.ResponseWriter, r *http.Request) {
	var req DrainRequest
	err := json.NewDecoder(r.Body).Decode(&req)
	if err == nil {
		err = a.drain(r.Context(), req)
	}
	if err != nil {
		writeError(w, http.StatusConflict, err)
		return
	}
	writeJSON(w, http.StatusOK, struct{}{})
}
