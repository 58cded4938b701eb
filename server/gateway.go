package server

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

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
	g.Strict, g.LoginRate, g.Admins = l.Strict, l.LoginRate, l.Admins
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
		Admins: c.Admins,
	}
	if len(l.Admins) == 0 && role != "" {
		l.Admins = []string{role}
	}
	return l
}

// reloadable are the keys of the configuration that Reload takes.
var reloadable = []string{
	"gateway.admins", "gateway.clients_max", "gateway.pool_size", "gateway.hold", "gateway.idle", "gateway.strict", "gateway.login_rate",
}

// Reload reads the configuration file again and takes the gateway's limits from it; clients stay. A file with problems
// changes nothing. Of other keys that have changed the log tells that they need a restart. It may be called at any time.
func (a *Agent) Reload() error {
	a.reloading.Lock()
	defer a.reloading.Unlock()
	if a.cfg.Path() == "" {
		return &hinted{"the configuration did not come from a file", "restart the agent to change it"}
	}
	c, err := config.Load(a.cfg.Path())
	if err != nil {
		return err
	}
	if a.inForce == nil {
		a.inForce = a.cfg
	}
	var taken, restart []string
	old := map[string]string{}
	for _, v := range a.inForce.Values() {
		old[v.Key] = v.Value
	}
	for _, v := range c.Values() {
		switch was, ok := old[v.Key]; {
		case ok && was == v.Value:
		case slices.Contains(reloadable, v.Key):
			taken = append(taken, fmt.Sprintf("%s: %s -> %s", v.Key, was, v.Value))
		default:
			restart = append(restart, v.Key)
		}
		delete(old, v.Key)
	}
	for key := range old {
		restart = append(restart, key)
	}
	slices.Sort(restart)
	if d, ok := a.door.(administered); ok {
		d.SetLimits(limits(c.Gateway, a.role))
		merged := *a.inForce
		merged.Gateway = c.Gateway
		merged.Gateway.Listen, merged.Gateway.Mode = a.cfg.Gateway.Listen, a.cfg.Gateway.Mode
		merged.Gateway.Cert, merged.Gateway.Key = a.cfg.Gateway.Cert, a.cfg.Gateway.Key
		a.inForce = &merged
	} else {
		restart, taken = append(restart, taken...), nil
	}
	a.log.Info("configuration was read again", "file", a.cfg.Path(), "changed", strings.Join(taken, ", "))
	if len(restart) > 0 {
		a.log.Warn("keys of the configuration have changed that need a restart of the agent", "keys", strings.Join(restart, ", "))
	}
	return nil
}

// ReloadLogged is Reload for a signal, whose sender sees only the log.
func (a *Agent) ReloadLogged() {
	if err := a.Reload(); err != nil {
		a.log.Error("the configuration was not taken: the old one stays in force", "error", err, "hint", hintOf(err))
	}
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
}

// Gateway asks the agent for its gateway.
func (c *Control) Gateway(ctx context.Context) (gateway.Report, error) {
	var r gateway.Report
	err := c.get(ctx, "/v1/gateway", nil, &r)
	return r, err
}
