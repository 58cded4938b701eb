package server

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
)

// A gateway that runs alone has a control socket as an agent has. A new process of the same configuration that connects to it takes
// the gateway over: its listeners and, as far as that goes, its clients. An agent is taken over in the same way (succession.go).

// GatewayRun says how a Gateway runs.
type GatewayRun struct {
	// Control is the path of its control socket; empty: GatewayControl.
	Control string
	// Takeover takes over from the gateway that has the control socket, if there is one, instead of being refused.
	Takeover bool
	// Drain bounds how long that one waits for sessions that cannot be handed over; 0: DefaultDrain.
	Drain time.Duration
}

// DefaultDrain is how long a gateway that is taken over waits for sessions that cannot be handed over.
const DefaultDrain = time.Minute

// GatewayControl is the control socket of a gateway that runs alone: that of its data directory, or, with a site's file, one beside
// that of the site's agent.
func GatewayControl(cfg *config.Config) string {
	if cfg.Alone() {
		return ControlSocket(cfg.DataDir)
	}
	return filepath.Join(cfg.DataDir, "gateway.sock")
}

// takeoverProtocol is the HTTP upgrade by which the conversation begins.
const takeoverProtocol = "duri-takeover"

// takeoverRequest is what the new process says of itself. The two must agree.
type takeoverRequest struct {
	Kind    string  `json:"kind,omitempty"` // kindAgent; empty: a gateway that runs alone
	Format  int     `json:"format"`
	Version string  `json:"version"`
	Cluster string  `json:"cluster"`
	Name    string  `json:"name"`
	Listen  string  `json:"listen"`
	Mode    string  `json:"mode"`
	DrainS  float64 `json:"drain_s"`
	Link    string  `json:"link,omitempty"` // where an agent listens for other agents
}

// kindAgent is the agent of a site.
const kindAgent = "agent"

func (r takeoverRequest) noun() string { return cmp.Or(r.Kind, "gateway") }

// newTakeoverRequest is that of a process with a configuration.
func newTakeoverRequest(cfg *config.Config, kind, version string, drain time.Duration) takeoverRequest {
	return takeoverRequest{
		Kind: kind, Format: gateway.HandOverFormat, Version: version, Cluster: cfg.Cluster.ID, Name: cfg.Name(), Listen: cfg.Gateway.Listen, Mode: string(cfg.Gateway.Mode),
		DrainS: cmp.Or(drain, DefaultDrain).Seconds(),
	}
}

func (r takeoverRequest) drain() time.Duration { return time.Duration(r.DrainS * float64(time.Second)) }

func (g *Gateway) takeoverRequest(drain time.Duration) takeoverRequest {
	return newTakeoverRequest(g.cfg, "", g.version, drain)
}

// against says what keeps a process like r from taking over from one like own; nil: nothing.
func (r takeoverRequest) against(own takeoverRequest) error {
	for _, c := range []struct {
		what       string
		mine, hers any
	}{
		{"kind", own.noun(), r.noun()},
		{"format of the hand-over", own.Format, r.Format},
		{"cluster", own.Cluster, r.Cluster},
		{"name", own.Name, r.Name},
		{"gateway.listen", own.Listen, r.Listen},
		{"gateway.mode", own.Mode, r.Mode},
		{"listen", own.Link, r.Link},
	} {
		if c.mine != c.hers {
			return &hinted{
				fmt.Sprintf("the running %s (version %s) is not taken over: its %s is %v, and that of the new process %v", own.noun(), own.Version, c.what, c.mine, c.hers),
				"end it and start the new one; clients connect again",
			}
		}
	}
	if !(r.DrainS > 0 && r.DrainS <= leaveAfterMax.Seconds()) {
		return &hinted{fmt.Sprintf("sessions cannot be waited for for %v s", r.DrainS), "give a time above 0 s, up to a year"}
	}
	return nil
}

// sameUser refuses a peer that runs as somebody else, but for root.
func sameUser(c *net.UnixConn) error {
	uid, _, err := peerOf(c)
	if err != nil {
		return err
	}
	if own := os.Geteuid(); uid != own && uid != 0 {
		return &hinted{fmt.Sprintf("the process at the other end runs as user %d, this one as %d", uid, own), "run both as the same user"}
	}
	return nil
}

// sockets are what a Gateway listens on.
type sockets struct {
	clients, control *gateway.Listener
	path             string // of control
}

func (s *sockets) close() error { return errors.Join(s.clients.Close(), s.control.Close()) }

// open gets the sockets: its own, or those of the gateway that it takes over from.
func (g *Gateway) open(ctx context.Context, run GatewayRun) (*sockets, *gateway.Takeover, error) {
	path := cmp.Or(run.Control, GatewayControl(g.cfg))
	if run.Takeover {
		t, _, err := askTakeover(ctx, path, g.takeoverRequest(run.Drain), 2)
		if err != nil {
			return nil, nil, err
		}
		if t != nil {
			return &sockets{t.Listeners[0], t.Listeners[1], path}, t, nil
		}
		g.log.Info("there is no gateway to be taken over", "control", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, nil, fmt.Errorf("create the folder of the control socket: %w", err)
	}
	control, err := listenUnix(path, "a gateway already runs on "+path, "take it over with --takeover, end it, or give this one another --control")
	if err != nil {
		return nil, nil, err
	}
	clients, err := listenForClients(g.cfg.Gateway.Listen)
	if err != nil {
		return nil, nil, errors.Join(err, control.Close())
	}
	s := &sockets{path: path}
	var cerr error
	s.clients, err = gateway.NewListener(clients)
	s.control, cerr = gateway.NewListener(control)
	if err = errors.Join(err, cerr); err != nil {
		return nil, nil, errors.Join(err, clients.Close(), control.Close())
	}
	return s, nil, nil
}

// askTakeover connects to the running process, which has a number of listeners to hand over; nil: there is none.
// pid is its process, 0 if that cannot be told.
func askTakeover(ctx context.Context, path string, r takeoverRequest, listeners int) (t *gateway.Takeover, pid int, err error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("connect to the running %s: %w", r.noun(), err)
	}
	c := conn.(*net.UnixConn)
	fail := func(err error) (*gateway.Takeover, int, error) { return nil, 0, errors.Join(err, c.Close()) }
	if err := sameUser(c); err != nil {
		return fail(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	if err := c.SetDeadline(time.Now().Add(askTakeoverMax)); err != nil {
		return fail(err)
	}
	if err := upgrade(c, r); err != nil {
		return fail(err)
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return fail(err)
	}
	_, pid, err = peerOf(c)
	if err != nil {
		return fail(err)
	}
	t, err = gateway.TakeOver(c)
	if err == nil && len(t.Listeners) != listeners {
		err = errors.Join(fmt.Errorf("the running %s has handed %d listeners over, not %d", r.noun(), len(t.Listeners), listeners), t.Close())
	}
	if err != nil {
		return nil, 0, err
	}
	return t, pid, nil
}

// askTakeoverMax bounds how long the running process may take to answer.
const askTakeoverMax = 10 * time.Second

// upgrade begins the conversation, reading no byte of it.
func upgrade(c net.Conn, r takeoverRequest) error {
	body, err := json.Marshal(r)
	if err != nil {
		return err
	}
	req, err := http.NewRequest(http.MethodPost, "http://gateway/v1/takeover", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", takeoverProtocol)
	if err := req.Write(c); err != nil {
		return fmt.Errorf("ask the running %s: %w", r.noun(), err)
	}
	// Byte by byte, because descriptors come with what follows.
	res, err := http.ReadResponse(bufio.NewReaderSize(oneByOne{c}, 16), req)
	if err != nil {
		return fmt.Errorf("the running %s did not answer: %w", r.noun(), err)
	}
	if res.StatusCode == http.StatusSwitchingProtocols {
		return nil
	}
	defer func() { _ = res.Body.Close() }()
	var p Problem
	if err := json.NewDecoder(res.Body).Decode(&p); err != nil || p.Error == "" {
		return &hinted{"the running " + r.noun() + " answered " + res.Status, "it may be of a version that cannot be taken over: end it and start the new one"}
	}
	return &remoteError{p, exitCode(res.StatusCode)}
}

// oneByOne reads single bytes, so that a buffer holds no more than was asked for.
type oneByOne struct{ r io.Reader }

func (o oneByOne) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return o.r.Read(p[:1])
}

// givesWay is a running process that another one may take over.
type givesWay struct {
	own    takeoverRequest
	server *gateway.Server
	with   gateway.HandOver // but for Drain
	log    *slog.Logger
	taken  func() // it was handed over, and is to end
	status string // the command that tells how far a takeover is
}

// post hands the process over to the caller. Its connection is used for that.
func (g givesWay) post(w http.ResponseWriter, r *http.Request) {
	var req takeoverRequest
	err := json.NewDecoder(io.LimitReader(r.Body, 1<<16)).Decode(&req)
	if err == nil && r.Header.Get("Upgrade") != takeoverProtocol {
		err = errors.New("a takeover begins with an upgrade")
	}
	if err == nil {
		err = req.against(g.own)
	}
	if err == nil {
		if busy := g.server.MayHandOver(); busy != nil {
			err = &hinted{"the running " + g.own.noun() + " is not taken over: " + busy.Error(), "wait until that is through: " + g.status + " tells"}
		}
	}
	if err != nil {
		writeError(w, http.StatusConflict, err)
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		writeError(w, http.StatusInternalServerError, err)
		return
	}
	c, ok := conn.(*net.UnixConn)
	if err = conn.SetDeadline(time.Time{}); err == nil && (!ok || buffered.Reader.Buffered() > 0) {
		err = errors.New("the new process has said too much")
	}
	if err == nil {
		err = sameUser(c)
	}
	if err != nil {
		refuseUpgrade(conn, err)
		return
	}
	g.log.Info("another process takes this "+g.own.noun()+" over", "version", req.Version, "drain", req.DrainS)
	if _, err := io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+takeoverProtocol+"\r\n\r\n"); err != nil {
		_ = conn.Close()
		return
	}
	g.with.Drain = req.drain()
	if err := g.server.HandOver(r.Context(), c, g.with); err != nil {
		g.log.Error("the "+g.own.noun()+" was not taken over, and goes on", "error", err)
		return
	}
	g.taken()
}

// refuseUpgrade answers on a connection that is no longer the HTTP server's.
func refuseUpgrade(conn net.Conn, err error) {
	defer func() { _ = conn.Close() }()
	body, merr := json.Marshal(Problem{err.Error(), hintOf(err)})
	if merr != nil {
		return
	}
	_, _ = fmt.Fprintf(conn, "HTTP/1.1 409 Conflict\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
}

// serveControl answers the command line until ctx ends.
func (g *Gateway) serveControl(ctx context.Context, s *sockets, taken context.CancelFunc) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/gateway", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, g.Report()) })
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", gateway.MetricsType)
		_ = g.server.WriteMetrics(w) // the client is gone, then
		g.sites.like.writeMetrics(w)
	})
	gives := givesWay{
		own: g.takeoverRequest(0), server: g.server, with: gateway.HandOver{Listeners: []*gateway.Listener{s.clients, s.control}}, log: g.log, taken: taken,
		status: "`duri gateway status`",
	}
	mux.HandleFunc("POST /v1/takeover", gives.post)
	return serveHTTP(ctx, mux, s.control)
}

// GatewayReport is what a gateway that runs alone tells of itself.
type GatewayReport struct {
	gateway.Report
	Name    string `json:"name"`
	Version string `json:"version"`
	PID     int    `json:"pid"`
	Listen  string `json:"listen"`
	Home    string `json:"home"`
}

// Report describes it.
func (g *Gateway) Report() GatewayReport {
	return GatewayReport{g.server.Report(), g.cfg.Name(), g.version, os.Getpid(), g.cfg.Gateway.Listen, g.sites.home}
}
