package server

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
)

// administered is a way of clients that can be looked into, and whose limits can be changed.
type administered interface {
	Report() gateway.Report
	WriteMetrics(w io.Writer) error
	SetLimits(l gateway.Limits)
}

// setLimits takes the limits of a configuration, and what administrators see. role is the agent's at its server; empty: there is
// none.
func setLimits(g *gateway.Config, cfg *config.Config, role string) {
	l := limits(cfg.Gateway, role)
	g.ClientsMax, g.PoolMax, g.HoldMax, g.IdleMax = l.ClientsMax, l.PoolMax, l.HoldMax, l.IdleMax
	g.Strict, g.LoginRate, g.Admins, g.Replay = l.Strict, l.LoginRate, l.Admins, l.Replay
	for _, d := range cfg.Databases {
		g.Databases = append(g.Databases, d.Name)
	}
}

// administer lets the agent's configuration be read again.
func (a *Agent) administer(g *gateway.Config) {
	g.Version, g.Reload = a.version, a.Reload
}

// limits are those of a configuration.
func limits(c config.Gateway, role string) gateway.Limits {
	l := gateway.Limits{
		ClientsMax: c.ClientsMax, PoolMax: c.PoolSize, HoldMax: c.Hold.Std(), IdleMax: c.Idle.Std(), Strict: c.Strict, LoginRate: c.LoginRate,
		Admins: c.Admins, Replay: c.Replay,
	}
	if len(l.Admins) == 0 && role != "" {
		l.Admins = []string{role}
	}
	return l
}

// reloadable are the keys of the configuration that Reload takes.
var reloadable = []string{
	"gateway.admins", "gateway.replay", "gateway.clients_max", "gateway.pool_size", "gateway.hold", "gateway.idle", "gateway.strict", "gateway.login_rate",
}

// Reload reads the configuration file again and takes the gateway's limits from it; clients stay. A file with problems
// changes nothing. Of other keys that have changed the log tells that they need a restart. It may be called at any time.
func (a *Agent) Reload() error {
	d, _ := a.door.(administered)
	return a.reloading.reload(a.cfg, d, a.role, a.log)
}

// ReloadLogged is Reload for a signal, whose sender sees only the log.
func (a *Agent) ReloadLogged() { logReload(a.Reload(), a.log) }

// Reload is that of an Agent.
func (g *Gateway) Reload() error { return g.reloading.reload(g.cfg, g.server, "", g.log) }

// ReloadLogged is Reload for a signal, whose sender sees only the log.
func (g *Gateway) ReloadLogged() { logReload(g.Reload(), g.log) }

func logReload(err error, log *slog.Logger) {
	if err != nil {
		log.Error("the configuration was not taken: the old one stays in force", "error", err, "hint", hintOf(err))
	}
}

// reloading is what of a configuration is in force.
type reloading struct {
	mu      sync.Mutex     // guards inForce
	inForce *config.Config // nil: as it was when the process began
}

// reload reads a configuration again. d is whose limits are changed; nil: there is nobody.
func (r *reloading) reload(first *config.Config, d administered, role string, log *slog.Logger) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if first.Path() == "" {
		return &hinted{"the configuration did not come from a file", "restart the process to change it"}
	}
	c, err := config.Load(first.Path())
	if err != nil {
		return err
	}
	now := first
	if r.inForce != nil {
		now = r.inForce
	}
	taken, restart := changedKeys(now, c)
	if d == nil {
		taken, restart = nil, append(restart, taken...)
	} else {
		d.SetLimits(limits(c.Gateway, role))
		merged := *now
		g := &merged.Gateway
		g.Replay, g.Admins, g.ClientsMax, g.PoolSize, g.Hold = c.Gateway.Replay, c.Gateway.Admins, c.Gateway.ClientsMax, c.Gateway.PoolSize, c.Gateway.Hold
		g.Idle, g.Strict, g.LoginRate = c.Gateway.Idle, c.Gateway.Strict, c.Gateway.LoginRate
		r.inForce = &merged
	}
	log.Info("configuration was read again", "file", first.Path(), "changed", strings.Join(taken, ", "))
	if len(restart) > 0 {
		log.Warn("keys of the configuration have changed that need a restart", "keys", strings.Join(restart, ", "))
	}
	return nil
}

// changedKeys tells what differs between two configurations: of what can be taken, how, and the keys of what needs a restart.
func changedKeys(old, now *config.Config) (taken, restart []string) {
	was := map[string]string{}
	for _, v := range old.Values() {
		was[v.Key] = v.Value
	}
	for _, v := range now.Values() {
		switch before, ok := was[v.Key]; {
		case ok && before == v.Value:
		case slices.Contains(reloadable, v.Key):
			taken = append(taken, fmt.Sprintf("%s: %s -> %s", v.Key, before, v.Value))
		default:
			restart = append(restart, v.Key)
		}
		delete(was, v.Key)
	}
	for key := range was {
		restart = append(restart, key)
	}
	slices.Sort(restart)
	return taken, restart
}

func (a *Agent) getGateway(w http.ResponseWriter, _ *http.Request) {
	d, ok := a.door.(administered)
	if !ok {
		writeError(w, http.StatusNotFound, &hinted{"there are no sessions at this agent's gateway to be looked into", "set gateway.listen, and gateway.mode to session or transaction"})
		return
	}
	writeJSON(w, http.StatusOK, d.Report())
}

// getMetrics gives figures in Prometheus' text format.
func (a *Agent) getMetrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", gateway.MetricsType)
	name := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)
	_, _ = fmt.Fprintf(w, "# HELP duri_agent_info Which agent this is.\n# TYPE duri_agent_info gauge\nduri_agent_info{cluster=\"%s\",site=\"%s\",version=\"%s\"} 1\n",
		name.Replace(a.cfg.Cluster.Name), name.Replace(a.self.Name), name.Replace(a.version)) // the client is gone, then
	if d, ok := a.door.(administered); ok {
		_ = d.WriteMetrics(w)
	}
	if d, ok := a.door.(*served); ok {
		d.sites.like.writeMetrics(w)
		d.sites.writeMetrics(w)
	}
}

// Gateway asks the agent for its gateway.
func (c *Control) Gateway(ctx context.Context) (gateway.Report, error) {
	var r gateway.Report
	err := c.get(ctx, "/v1/gateway", nil, &r)
	return r, err
}

// StandaloneGateway asks a gateway that runs alone.
func (c *Control) StandaloneGateway(ctx context.Context) (GatewayReport, error) {
	var r GatewayReport
	err := c.get(ctx, "/v1/gateway", nil, &r)
	if err == nil && r.Name == "" {
		err = &hinted{"this is the control socket of an agent, not of a gateway that runs alone", "see `duri status` and `duri gateway show`, or name the file of a gateway with -c"}
	}
	return r, err
}
