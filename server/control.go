package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/duri-io/duri/verify"
)

// ControlSocket is the Unix socket in data_dir through which the command line talks to the agent. Who may open the
// file may give orders.
func ControlSocket(dataDir string) string { return filepath.Join(dataDir, "control.sock") }

// socketPathMax is the longest path of a Unix-domain socket on Linux (sun_path without the final zero).
const socketPathMax = 107

// listenControl takes the socket, and with it the data directory: a second agent is refused.
func (a *Agent) listenControl() (net.Listener, error) {
	return listenUnix(ControlSocket(a.cfg.DataDir), "an agent already runs on "+a.cfg.DataDir, "end it first, or give this one another data_dir")
}

// listenUnix listens on a control socket; what is there of a process that has ended is removed. taken and hint are said when one
// listens already.
func listenUnix(path, taken, hint string) (net.Listener, error) {
	if len(path) > socketPathMax {
		return nil, &hinted{
			fmt.Sprintf("listen for the command line: the path %s has %d bytes, and the system allows %d for a socket", path, len(path), socketPathMax),
			"choose a shorter data_dir",
		}
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = c.Close()
		return nil, &hinted{taken, hint}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove a stale control socket: %w", err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for the command line: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return ln, nil
}

func (a *Agent) serveControl(ctx context.Context, ln net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", a.getStatus)
	mux.HandleFunc("GET /v1/conflicts", a.getConflicts)
	mux.HandleFunc("GET /v1/conflicts/stats", a.getConflictStats)
	mux.HandleFunc("GET /v1/conflicts/{id}", a.getConflict)
	mux.HandleFunc("POST /v1/conflicts/{id}/restore", a.postRestore)
	mux.HandleFunc("GET /v1/tables", a.getTables)
	mux.HandleFunc("POST /v1/verify", a.postVerify)
	mux.HandleFunc("POST /v1/repair", a.postRepair)
	mux.HandleFunc("GET /v1/register", a.getRegister)
	mux.HandleFunc("POST /v1/register/force", a.postForce)
	mux.HandleFunc("POST /v1/register/rearm", a.postRearm)
	mux.HandleFunc("POST /v1/outcome", a.postOutcome)
	mux.HandleFunc("POST /v1/fence", a.postFence)
	mux.HandleFunc("GET /v1/gateway", a.getGateway)
	mux.HandleFunc("GET /v1/check", a.getCheck)
	mux.HandleFunc("GET /metrics", a.getMetrics)
	mux.HandleFunc("POST /v1/drain", a.postDrain)
	mux.HandleFunc("POST /v1/takeover", a.postTakeover)
	return serveHTTP(ctx, mux, ln)
}

// serveHTTP answers until ctx ends.
func serveHTTP(ctx context.Context, mux http.Handler, ln net.Listener) error {
	srv := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() {
		shut, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if srv.Shutdown(shut) != nil {
			_ = srv.Close()
		}
	})
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// ClusterStatus is all sites as one of them sees them.
type ClusterStatus struct {
	Sites       []SiteStatus `json:"sites"`
	Unreachable []Missing    `json:"unreachable"`
}

// Missing is a site whose agent did not answer.
type Missing struct {
	Site  string `json:"site"`
	Error string `json:"error"`
}

// askPeer bounds how long a status waits for another agent.
const askPeer = 2 * time.Second

func (a *Agent) getStatus(w http.ResponseWriter, r *http.Request) {
	out := ClusterStatus{Sites: []SiteStatus{a.Status()}, Unreachable: []Missing{}}
	for name, c := range a.clients {
		ctx, cancel := context.WithTimeout(r.Context(), askPeer)
		b, err := c.Status(ctx)
		cancel()
		var s SiteStatus
		if err == nil {
			err = json.Unmarshal(b, &s)
		}
		if err != nil {
			out.Unreachable = append(out.Unreachable, Missing{name, err.Error()})
			continue
		}
		out.Sites = append(out.Sites, s)
	}
	writeJSON(w, http.StatusOK, out)
}

// Problem is how the control API reports an error.
type Problem struct {
	Error string `json:"error"`
	Hint  string `json:"hint,omitempty"`
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // the client is gone, then
}

func writeError(w http.ResponseWriter, code int, err error) {
	writeJSON(w, code, Problem{err.Error(), hintOf(err)})
}

// pick finds the database a request names; without a name there must be just one.
func (a *Agent) pick(r *http.Request) (*node, error) {
	name := r.URL.Query().Get("database")
	if name == "" && len(a.nodes) == 1 {
		return a.nodes[0], nil
	}
	if n, ok := a.node(name); ok {
		return n, nil
	}
	if name == "" {
		return nil, &hinted{"several databases are replicated", "name one with --database"}
	}
	return nil, &hinted{fmt.Sprintf("database %q is not replicated", name), "see databases in duri.yaml"}
}

// VerifyLine is one line of the verify stream: progress, then the report or a problem.
type VerifyLine struct {
	Progress *verify.Progress `json:"progress,omitempty"`
	Report   *verify.Report   `json:"report,omitempty"`
	Problem  *Problem         `json:"problem,omitempty"`
}

// VerifyRequest asks for a comparison of this site with another one; With names it where there are several.
type VerifyRequest struct {
	With     string   `json:"with,omitempty"`
	Tables   []string `json:"tables"`
	Parallel int      `json:"parallel"`
}

func (a *Agent) postVerify(w http.ResponseWriter, r *http.Request) {
	n, err := a.pick(r)
	var req VerifyRequest
	if err == nil {
		err = json.NewDecoder(r.Body).Decode(&req)
	}
	if err != nil {
		writeError(w, http.StatusBadRequest, err)
		return
	}
	send := stream[VerifyLine](w)
	rep, err := n.verify(r.Context(), req, func(p verify.Progress) { send(VerifyLine{Progress: &p}) })
	if err != nil {
		send(VerifyLine{Problem: &Problem{err.Error(), hintOf(err)}})
		return
	}
	send(VerifyLine{Report: &rep})
}

// stream begins an answer of JSON lines, each sent at once. That the client is gone is seen by the request's context.
func stream[L any](w http.ResponseWriter) (send func(L)) {
	w.Header().Set("Content-Type", "application/jsonl")
	enc := json.NewEncoder(w)
	flush := http.NewResponseController(w)
	return func(l L) {
		_ = enc.Encode(l)
		_ = flush.Flush()
	}
}

// verify compares this site's database with another site's.
func (n *node) verify(ctx context.Context, req VerifyRequest, progress func(verify.Progress)) (verify.Report, error) {
	if n.ready.Load() == nil {
		return verify.Report{}, errNotReady
	}
	p, err := n.comparedWith(req.With)
	if err != nil {
		return verify.Report{}, err
	}
	return verify.Run(ctx, side{n.db, n}, p.remote(), verify.Options{
		Tables: req.Tables, Parallel: req.Parallel, Progress: progress, Settle: p.settle,
	})
}

// comparedWith is the peer that a comparison means. No name means the only one: one of several is never chosen silently.
func (n *node) comparedWith(name string) (*peer, error) {
	var names []string
	for _, p := range n.peers {
		if p.site.Name == name || name == "" && len(n.peers) == 1 {
			return p, nil
		}
		names = append(names, p.site.Name)
	}
	if name == "" {
		return nil, &hinted{"there are several other sites", "name one with --with: " + strings.Join(names, ", ")}
	}
	return nil, &hinted{fmt.Sprintf("%q is no other site of the cluster", name), "name one with --with: " + strings.Join(names, ", ")}
}
