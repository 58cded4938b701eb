package gateway

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Report is what there is at a Server at one moment. Durations are in seconds.
type Report struct {
	Mode     string            `json:"mode"`           // session, transaction
	Shut     string            `json:"shut,omitempty"` // why clients are shut out
	UptimeS  float64           `json:"uptime_s"`
	Clients  int               `json:"clients"` // connections, those included that log in just now
	Logins   int64             `json:"logins"`  // that were let in
	Sessions []Session         `json:"sessions"`
	Pools    []Pool            `json:"pools"`
	Pins     map[string]int    `json:"pins"` // sessions that keep their connection, by reason
	Routes   []Route           `json:"routes"`
	Stats    []Tally           `json:"stats"`
	InDoubt  map[string]uint64 `json:"in_doubt"` // transactions whose answer was lost, by what became of them: committed, aborted, unknown
	Refused  map[string]uint64 `json:"refused"`  // clients, by SQLSTATE
	Slowed   uint64            `json:"slowed"`   // transactions that were delayed because other sites fell behind
	SlowedS  float64           `json:"slowed_s"` // by how much, all together
	Paused   []string          `json:"paused"`   // databases; "*": all
	Disabled []string          `json:"disabled"`
	Limits   LimitsReport      `json:"limits"`
	// Predecessor is the process that this one takes over from just now; nil: none.
	Predecessor *Predecessor `json:"predecessor,omitempty"`
}

// LimitsReport are the limits in force.
type LimitsReport struct {
	ClientsMax int     `json:"clients_max"`
	PoolSize   int     `json:"pool_size"`
	HoldS      float64 `json:"hold_s"`
	IdleS      float64 `json:"idle_s"`
	Strict     bool    `json:"strict"`
	LoginRate  int     `json:"login_rate"`
}

// Report describes the Server.
func (g *Server) Report() Report {
	shut, now, total := g.Status()
	l := g.lim()
	r := Report{
		Mode: g.poolMode(""), Shut: shut, UptimeS: time.Since(g.began).Seconds(), Clients: now, Logins: total, Sessions: g.Sessions(), Pools: g.Pools(),
		Pins: g.Pins(), Routes: g.Routes(), Stats: g.Tallies(), InDoubt: g.fates.all(), Refused: g.refusals.all(),
		Slowed: g.paces.delayed.Load(), SlowedS: time.Duration(g.paces.total.Load()).Seconds(),
		Limits: LimitsReport{l.ClientsMax, l.PoolMax, l.HoldMax.Seconds(), l.IdleMax.Seconds(), l.Strict, l.LoginRate}, Predecessor: g.predecessor(),
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	r.Paused, r.Disabled = []string{}, slices.AppendSeq([]string{}, maps.Keys(g.disabled))
	for name := range g.paused {
		r.Paused = append(r.Paused, cmp.Or(name, "*"))
	}
	slices.Sort(r.Paused)
	slices.Sort(r.Disabled)
	return r
}

// MetricsType is the media type of WriteMetrics (Prometheus text format).
const MetricsType = "text/plain; version=0.0.4; charset=utf-8"

// metricsWriter writes families of metrics, each after its help and type.
type metricsWriter struct{ w *bufio.Writer }

func (m metricsWriter) family(name, kind, help string) {
	fmt.Fprintf(m.w, "# HELP duri_gateway_%s %s\n# TYPE duri_gateway_%s %s\n", name, help, name, kind)
}

var escapeLabel = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// sample writes a value; labels are names and values in turn.
func (m metricsWriter) sample(name string, value float64, labels ...string) {
	b := append(m.w.AvailableBuffer(), "duri_gateway_"+name...)
	for i := 0; i < len(labels); i += 2 {
		b = append(b, "{,"[min(i, 1)])
		b = append(b, labels[i]+`="`+escapeLabel.Replace(strings.ToValidUTF8(labels[i+1], "\uFFFD"))+`"`...)
	}
	if len(labels) > 0 {
		b = append(b, '}')
	}
	b = strconv.AppendFloat(append(b, ' '), value, 'g', -1, 64)
	_, _ = m.w.Write(append(b, '\n')) // Flush tells what went wrong.
}

// WriteMetrics writes gauges and counters in Prometheus' text format.
func (g *Server) WriteMetrics(w io.Writer) error {
	m := metricsWriter{bufio.NewWriter(w)}
	r := g.Report()
	one := func(name, kind, help string, v float64) {
		m.family(name, kind, help)
		m.sample(name, v)
	}
	one("open", "gauge", "1: clients are let in; 0: they are shut out.", map[bool]float64{true: 1}[r.Shut == ""])
	one("connections", "gauge", "Connections of clients, those included that log in just now.", float64(r.Clients))
	one("connections_max", "gauge", "How many there may be.", float64(r.Limits.ClientsMax))
	one("logins_total", "counter", "Logins that were let in.", float64(r.Logins))

	pools := func(name, help string, value func(Pool) float64) {
		m.family(name, "gauge", help)
		for _, p := range r.Pools {
			m.sample(name, value(p), "database", p.Database, "user", p.User)
		}
	}
	pools("clients", "Clients that have logged in.", func(p Pool) float64 { return float64(p.Clients) })
	pools("clients_waiting", "Clients that wait for a connection to a server.", func(p Pool) float64 { return float64(p.Waiting) })
	pools("wait_max_seconds", "How long the client has waited that waits longest.", func(p Pool) float64 { return p.MaxWaitS })
	m.family("server_connections", "gauge", "Connections to servers.")
	for _, p := range r.Pools {
		for _, s := range p.Servers {
			for _, v := range []struct {
				state string
				n     int
			}{{"active", s.Active}, {"idle", s.Idle}, {"login", s.Login}} {
				m.sample("server_connections", float64(v.n), "database", p.Database, "user", p.User, "site", s.Site, "state", v.state)
			}
		}
	}
	tallies := func(name, help string, value func(Counts) float64) {
		m.family(name, "counter", help)
		for _, t := range r.Stats {
			m.sample(name, value(t.Counts), "database", t.Database, "user", t.User, "site", t.Site)
		}
	}
	tallies("transactions_total", "Transactions that have ended.", func(c Counts) float64 { return float64(c.Transactions) })
	tallies("queries_total", "Queries, and pipelines up to their Sync.", func(c Counts) float64 { return float64(c.Queries) })
	tallies("received_bytes_total", "Bytes from clients.", func(c Counts) float64 { return float64(c.Received) })
	tallies("sent_bytes_total", "Bytes to clients.", func(c Counts) float64 { return float64(c.Sent) })
	tallies("transaction_seconds_total", "Time in transactions.", func(c Counts) float64 { return c.TransactionS })
	tallies("query_seconds_total", "Time in queries.", func(c Counts) float64 { return c.QueryS })
	tallies("wait_seconds_total", "Time that clients waited for a connection to a server.", func(c Counts) float64 { return c.WaitS })
	tallies("moves_total", "Transactions that ran at another site than the session's one before.", func(c Counts) float64 { return float64(c.Moves) })
	tallies("reads_away_total", "Reads that ran at another site than the session's home.", func(c Counts) float64 { return float64(c.ReadsAway) })
	one("slowed_total", "counter", "Transactions that were delayed because other sites fell behind.", float64(r.Slowed))
	one("slowed_seconds_total", "counter", "How long they were delayed, all together.", r.SlowedS)
	m.family("delay_seconds", "gauge", "How long a transaction that writes is delayed now.")
	for _, x := range r.Routes {
		if g.cfg.Pace != nil && x.Site != "" {
			m.sample("delay_seconds", x.DelayS, "database", x.Database, "user", x.User, "site", x.Site)
		}
	}

	m.family("in_doubt_total", "counter", "Transactions whose answer was lost, by what became of them.")
	for _, fate := range []string{"committed", "aborted", "unknown"} {
		m.sample("in_doubt_total", float64(r.InDoubt[fate]), "fate", fate)
	}
	m.family("refused_total", "counter", "Clients that were not let in, by SQLSTATE.")
	for _, code := range slices.Sorted(maps.Keys(r.Refused)) {
		m.sample("refused_total", float64(r.Refused[code]), "sqlstate", code)
	}
	m.family("pinned_sessions", "gauge", "Sessions that keep their connection, by reason.")
	for _, why := range slices.Sorted(maps.Keys(r.Pins)) {
		m.sample("pinned_sessions", float64(r.Pins[why]), "reason", why)
	}
	m.family("paused", "gauge", "1: the database is paused.")
	for _, name := range r.Paused {
		m.sample("paused", 1, "database", name)
	}
	return m.w.Flush()
}
