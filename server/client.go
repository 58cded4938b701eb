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
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/verify"
)

// Control talks to a running agent through its control socket. Safe for concurrent use.
type Control struct {
	socket  string
	gateway bool // it is that of a gateway that runs alone
	http    *http.Client
}

// NewControl makes a client for the agent of a data directory; it connects with each call.
func NewControl(dataDir string) *Control { return NewControlAt(ControlSocket(dataDir)) }

// NewGatewayControl makes a client for the gateway of a file: one that runs alone, or that of a site's agent. socket replaces the
// path of its control socket; empty: it does not.
func NewGatewayControl(cfg *config.Config, socket string) *Control {
	c := NewControlAt(cmp.Or(socket, ControlSocket(cfg.DataDir)))
	c.gateway = cfg.Alone() || socket != ""
	return c
}

// NewControlAt makes a client for the agent, or gateway, that has a control socket.
func NewControlAt(socket string) *Control {
	var d net.Dialer
	return &Control{socket: socket, http: &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) },
		DisableKeepAlives: true,
	}}}
}

// UnreachableError says that no agent answers.
type UnreachableError struct {
	Socket  string
	Err     error
	Gateway bool // it would be one of a gateway that runs alone
}

// Error gives the sentence that is printed.
func (e *UnreachableError) Error() string {
	if e.Gateway {
		return "no gateway answers at " + e.Socket
	}
	return "no agent answers at " + e.Socket
}

// HintText is the advice that goes with the error.
func (e *UnreachableError) HintText() string {
	if e.Gateway {
		return "start it with `duri gateway -c duri.yaml`, or name the right file with -c, or its --control"
	}
	return "start it with `duri agent -c duri.yaml`, or name the right file with -c"
}

// ExitCode is the command line's code for it.
func (e *UnreachableError) ExitCode() int { return 4 }

// Unwrap returns the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }

// remoteError is a problem that the agent reported.
type remoteError struct {
	p    Problem
	code int // the command line's exit code for it
}

func (e *remoteError) Error() string    { return e.p.Error }
func (e *remoteError) HintText() string { return e.p.Hint }
func (e *remoteError) ExitCode() int    { return e.code }

// exitCode is the command line's code for a problem: 5 for what is refused for safety, else 1.
func exitCode(status int) int {
	if status == http.StatusConflict {
		return 5
	}
	return 1
}

func (c *Control) do(ctx context.Context, method, path string, query url.Values, body any) (*http.Response, error) {
	var rd io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		rd = bytes.NewReader(b)
	}
	u := url.URL{Scheme: "http", Host: "agent", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), rd)
	if err != nil {
		return nil, err
	}
	res, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, &UnreachableError{c.socket, err, c.gateway}
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	defer func() { _ = res.Body.Close() }()
	var p Problem
	if err := json.NewDecoder(res.Body).Decode(&p); err != nil || p.Error == "" {
		return nil, fmt.Errorf("the agent answered %s", res.Status)
	}
	return nil, &remoteError{p, exitCode(res.StatusCode)}
}

func (c *Control) get(ctx context.Context, path string, query url.Values, v any) error {
	res, err := c.do(ctx, http.MethodGet, path, query, nil)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	return json.NewDecoder(res.Body).Decode(v)
}

// statusMax bounds how long an agent may take to tell its status; it waits no longer than askPeer for each other agent.
const statusMax = 5 * time.Second

// Status asks the agent for all sites as it sees them. An agent that does not answer in time is an UnreachableError too:
// it may be stopped, or its machine hang.
func (c *Control) Status(ctx context.Context) (ClusterStatus, error) {
	inner, cancel := context.WithTimeout(ctx, statusMax)
	defer cancel()
	var s ClusterStatus
	err := c.get(inner, "/v1/status", nil, &s)
	if err != nil && inner.Err() != nil && ctx.Err() == nil {
		err = &UnreachableError{c.socket, fmt.Errorf("no answer within %s", statusMax), c.gateway}
	}
	return s, err
}

// Conflicts lists recorded conflicts. The query's names are those of catalog.ConflictFilter: table, kind, code, origin
// (a site's name), key (VALUE or COLUMN=VALUE, any number), since and until (RFC 3339), before, limit, exceptions (true);
// and database, where several are replicated.
func (c *Control) Conflicts(ctx context.Context, filter url.Values) ([]catalog.Conflict, error) {
	var out []catalog.Conflict
	err := c.get(ctx, "/v1/conflicts", filter, &out)
	return out, err
}

// ConflictStats counts recorded conflicts; the filter is that of Conflicts, of which limit does not matter.
func (c *Control) ConflictStats(ctx context.Context, filter url.Values) (catalog.ConflictStats, error) {
	var out catalog.ConflictStats
	err := c.get(ctx, "/v1/conflicts/stats", filter, &out)
	return out, err
}

// Conflict shows one record. An empty database name means the only one.
func (c *Control) Conflict(ctx context.Context, database string, id int64) (ConflictDetail, error) {
	var out ConflictDetail
	err := c.get(ctx, fmt.Sprintf("/v1/conflicts/%d", id), databaseQuery(database), &out)
	return out, err
}

// Restore brings the losing image of a record back as a new change of this site. An empty database name means the only
// one.
func (c *Control) Restore(ctx context.Context, database string, id int64, req RestoreRequest) (catalog.Restoration, error) {
	var out catalog.Restoration
	res, err := c.do(ctx, http.MethodPost, fmt.Sprintf("/v1/conflicts/%d/restore", id), databaseQuery(database), req)
	if err != nil {
		return out, err
	}
	defer func() { _ = res.Body.Close() }()
	return out, json.NewDecoder(res.Body).Decode(&out)
}

func databaseQuery(name string) url.Values {
	if name == "" {
		return nil
	}
	return url.Values{"database": {name}}
}

// Verify compares the sites and reports progress on the way. An empty database name means the only one.
func (c *Control) Verify(ctx context.Context, database string, req VerifyRequest, progress func(verify.Progress)) (verify.Report, error) {
	var rep verify.Report
	res, err := c.do(ctx, http.MethodPost, "/v1/verify", databaseQuery(database), req)
	if err != nil {
		return rep, err
	}
	defer func() { _ = res.Body.Close() }()
	err = readLines(res.Body, "the comparison", func(l VerifyLine) (last bool, err error) {
		switch {
		case l.Report != nil:
			rep = *l.Report
			return true, nil
		case l.Problem != nil:
			return true, &remoteError{*l.Problem, exitCode(http.StatusOK)}
		case l.Progress != nil && progress != nil:
			progress(*l.Progress)
		}
		return false, nil
	})
	return rep, err
}

// readLines hands each JSON line of an answer to take, until it says that this was the last one.
func readLines[L any](body io.Reader, what string, take func(L) (last bool, err error)) error {
	lines := bufio.NewReader(body)
	for {
		b, err := lines.ReadBytes('\n')
		if err != nil {
			return errors.Join(fmt.Errorf("the agent ended before %s was finished", what), err)
		}
		var l L
		if err := json.Unmarshal(b, &l); err != nil {
			return err
		}
		if last, err := take(l); last || err != nil {
			return err
		}
	}
}

// Register tells what the agent knows of the register and what a commit means at its site right now.
func (c *Control) Register(ctx context.Context) (DurabilityStatus, error) {
	var out DurabilityStatus
	err := c.get(ctx, "/v1/register", nil, &out)
	return out, err
}

// Force tells what a forced take-over may lose, and makes it when the request accepts that.
func (c *Control) Force(ctx context.Context, req ForceRequest) (LossReport, error) {
	var out LossReport
	return out, c.post(ctx, "/v1/register/force", req, &out)
}

// Rearm asks to take a site back as soon as it may be, without waiting for its link to be stable.
func (c *Control) Rearm(ctx context.Context, site string) (DurabilityStatus, error) {
	var out DurabilityStatus
	return out, c.post(ctx, "/v1/register/rearm", RearmRequest{site}, &out)
}

// Outcome settles the fate of a marked transaction whose site was left out of the register.
func (c *Control) Outcome(ctx context.Context, req OutcomeRequest) (out OutcomeReport, err error) {
	return out, c.post(ctx, "/v1/outcome", req, &out)
}

// Fence keeps clients out of the agent's site, or lets them in again.
func (c *Control) Fence(ctx context.Context, req FenceRequest) (DurabilityStatus, error) {
	var out DurabilityStatus
	return out, c.post(ctx, "/v1/fence", req, &out)
}

// Drain lets gateways begin no new transactions at a site, or lets them again, and tells what is left there.
func (c *Control) Drain(ctx context.Context, req DrainRequest) (out DrainReport, err error) {
	return out, c.post(ctx, "/v1/drain", req, &out)
}

func (c *Control) post(ctx context.Context, path string, body, v any) error {
	res, err := c.do(ctx, http.MethodPost, path, nil, body)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	return json.NewDecoder(res.Body).Decode(v)
}
