package gateway

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"maps"
	"net"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"time"
)

// show is a table of the database AdminDatabase. Names and types of columns are PgBouncer's, except those of duri's own.
type show struct {
	columns []column
	rows    func(*Server) [][]any // nil: a text
}

// help is what SHOW HELP says.
const help = `
	SHOW HELP|CONFIG|DATABASES|POOLS|CLIENTS|SERVERS|USERS|VERSION|STATE
	SHOW SOCKETS|ACTIVE_SOCKETS|LISTS|MEM
	SHOW STATS|STATS_TOTALS|STATS_AVERAGES|TOTALS
	SHOW duri.sessions|duri.pins|duri.routes|duri.counters
	RELOAD
	PAUSE [<db>]
	RESUME [<db>]
	DISABLE <db>
	ENABLE <db>
	RECONNECT [<db>]
	KILL <db>
	WAIT_CLOSE [<db>]`

// columnsOf reads names of columns: "n:" is int4, "b:" int8, "d:" numeric, else text.
func columnsOf(names string) (all []column) {
	for name := range strings.FieldsSeq(names) {
		c := column{name, oidText}
		if kind, rest, ok := strings.Cut(name, ":"); ok {
			c = column{rest, map[string]uint32{"n": oidInt4, "b": oidInt8, "d": oidNumeric}[kind]}
		}
		all = append(all, c)
	}
	return all
}

const socketColumns = `type user database state addr n:port local_addr n:local_port connect_time request_time n:wait n:wait_us n:close_needed ptr link
	n:remote_pid tls application_name`

const lowColumns = " n:recv_pos n:pkt_pos n:pkt_remain n:send_pos n:send_remain n:pkt_avail n:send_avail"

var shows map[string]show

func init() { // The functions refer to the map.
	helpText := show{}
	shows = map[string]show{
		"": helpText, "help": helpText,
		"version": {columnsOf("version"), func(g *Server) [][]any {
			return [][]any{{"PgBouncer " + spoken + " (duri " + cmp.Or(g.cfg.Version, "devel") + ")"}}
		}},
		"state":          {columnsOf("key value"), showState},
		"clients":        {columnsOf(socketColumns), func(g *Server) [][]any { return socketRows(g.clientSockets(), "") }},
		"servers":        {columnsOf(socketColumns), func(g *Server) [][]any { return socketRows(g.serverSockets(), "") }},
		"sockets":        {columnsOf(socketColumns + lowColumns), func(g *Server) [][]any { return showSockets(g, false) }},
		"active_sockets": {columnsOf(socketColumns + lowColumns), func(g *Server) [][]any { return showSockets(g, true) }},
		"pools": {columnsOf(`database user n:cl_active n:cl_waiting n:cl_active_cancel_req n:cl_waiting_cancel_req n:sv_active n:sv_active_cancel
			n:sv_being_canceled n:sv_idle n:sv_used n:sv_tested n:sv_login n:maxwait n:maxwait_us pool_mode`), showPools},
		"stats": {columnsOf(`database d:total_xact_count d:total_query_count d:total_received d:total_sent d:total_xact_time d:total_query_time
			d:total_wait_time d:avg_xact_count d:avg_query_count d:avg_recv d:avg_sent d:avg_xact_time d:avg_query_time d:avg_wait_time`), showStats},
		"stats_totals": {
			columnsOf(`database d:xact_count d:query_count d:bytes_received d:bytes_sent d:xact_time d:query_time d:wait_time`),
			func(g *Server) [][]any { return cutRows(showStats(g), 1, 8) },
		},
		"stats_averages": {
			columnsOf(`database d:xact_count d:query_count d:bytes_received d:bytes_sent d:xact_time d:query_time d:wait_time`),
			func(g *Server) [][]any { return cutRows(showStats(g), 8, 15) },
		},
		"totals": {columnsOf("name d:value"), showTotals},
		"lists":  {columnsOf("list n:items"), showLists},
		"users":  {columnsOf("name pool_mode"), showUsers},
		"databases": {columnsOf(`name host n:port database force_user n:pool_size n:min_pool_size n:reserve_pool pool_mode n:max_connections
			n:current_connections n:paused n:disabled`), showDatabases},
		"config":    {columnsOf("key value default changeable"), showConfig},
		"mem":       {columnsOf("name n:size n:used n:free n:memtotal"), showMem},
		"dns_hosts": {columnsOf("hostname b:ttl addrs"), func(*Server) [][]any { return nil }},
		"dns_zones": {columnsOf("zonename b:serial n:count"), func(*Server) [][]any { return nil }},

		"duri.sessions": {columnsOf(`n:pid user database state site waiting_for_s pinned n:settings n:statements client connect_time request_time
			application_name read_site login`), showSessions},
		"duri.pins":     {columnsOf("reason n:sessions"), showPins},
		"duri.routes":   {columnsOf("database user site address b:epoch problem reads b:backlog_bytes d:delay_ms"), showRoutes},
		"duri.counters": {columnsOf("name b:value"), showCounters},
	}
}

// socket is a connection of a client or to a server.
type socket struct {
	client              bool
	user, database      string
	state               string
	local, remote       net.Addr
	connected, asked    time.Time
	waiting             time.Duration
	closeNeeded         bool
	ptr, link           string
	pid                 uint32
	tls, application    string
	active              bool
	site, readSite      string
	pinned              string
	settings, statments int
	login               string
}

func pointer(v any) string { return fmt.Sprintf("%p", v) }

// application is what a session calls itself. s.mu is held.
func (s *session) application() string {
	params := s.told
	if params == nil {
		params = s.who.Params
	}
	for _, p := range params {
		if p.Name == "application_name" {
			return p.Value
		}
	}
	return ""
}

func tlsOf(c net.Conn) string {
	t, ok := c.(*tls.Conn)
	if !ok {
		return ""
	}
	st := t.ConnectionState()
	if !st.HandshakeComplete {
		return ""
	}
	return strings.ReplaceAll(tls.VersionName(st.Version), "TLS ", "TLSv") + "/" + tls.CipherSuiteName(st.CipherSuite)
}

// clientSockets are the clients that have logged in, by when they connected.
func (g *Server) clientSockets() (all []socket) {
	g.mu.Lock()
	sessions := slices.Collect(maps.Keys(g.clients))
	g.mu.Unlock()
	now := time.Now()
	for _, s := range sessions {
		k := socket{
			client: true, user: s.who.User, database: s.who.Database, state: "active", remote: s.conn.RemoteAddr(), local: s.conn.LocalAddr(),
			connected: s.since, ptr: pointer(s), tls: tlsOf(s.conn), login: map[bool]string{true: "certificate", false: "password"}[s.who.certified],
		}
		s.mu.Lock()
		k.pid, k.asked, k.site, k.readSite, k.application = s.pid, s.asked, s.site, s.readSite, s.application()
		k.pinned, k.settings, k.statments = s.pinned(), len(s.settings), len(s.statements)
		if !s.waitingAt.IsZero() {
			k.state, k.waiting = "waiting", now.Sub(s.waitingAt)
		}
		if s.b != nil {
			k.link, k.active = pointer(s.b), true
		}
		s.mu.Unlock()
		if k.asked.IsZero() {
			k.asked = k.connected
		}
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b socket) int { return cmp.Or(a.connected.Compare(b.connected), cmp.Compare(a.ptr, b.ptr)) })
	return all
}

// serverSockets are the connections to servers, by when they were opened.
func (g *Server) serverSockets() (all []socket) {
	type user struct {
		s         *session
		client    string
		name      string
		asked     time.Time
		cancelled bool
	}
	users := map[*backend]user{}
	alone := map[*backend]*session{}
	g.mu.Lock()
	sessions := slices.Collect(maps.Keys(g.clients))
	g.mu.Unlock()
	for _, s := range sessions {
		s.mu.Lock()
		if s.b != nil {
			users[s.b] = user{s, pointer(s), s.application(), s.asked, s.b.cancelling > 0}
			if s.b.pool == nil {
				alone[s.b] = s
			}
		}
		s.mu.Unlock()
	}
	socketOf := func(b *backend, database, name string, stale bool) socket {
		k := socket{
			user: name, database: database, state: "idle", remote: b.conn.RemoteAddr(), local: b.conn.LocalAddr(), connected: b.opened, asked: b.opened,
			closeNeeded: stale, ptr: pointer(b), pid: b.pid, tls: tlsOf(b.conn), site: b.target.Site,
		}
		if u, ok := users[b]; ok {
			k.state, k.link, k.application, k.asked, k.active = "active", u.client, u.name, u.asked, true
			if u.cancelled {
				k.state = "being_canceled"
			}
		}
		return k
	}
	for _, p := range g.allPools() {
		p.mu.Lock()
		for b := range p.all {
			k := socketOf(b, p.tally.database, p.tally.user, p.stale(b))
			if k.state == "idle" && !b.idleSince.IsZero() {
				k.asked = b.idleSince
			}
			all = append(all, k)
		}
		p.mu.Unlock()
	}
	for b, s := range alone {
		all = append(all, socketOf(b, s.who.Database, s.who.User, false))
	}
	slices.SortFunc(all, func(a, b socket) int { return cmp.Or(a.connected.Compare(b.connected), cmp.Compare(a.ptr, b.ptr)) })
	return all
}

// hostPort splits an address; that of a Unix-domain socket has no port.
func hostPort(a net.Addr) (string, int) {
	if a == nil {
		return "", 0
	}
	host, port, err := net.SplitHostPort(a.String())
	if err != nil {
		return "unix", 0
	}
	n, _ := strconv.Atoi(port)
	return host, n
}

func socketRows(all []socket, prefix string) (rows [][]any) {
	for _, k := range all {
		kind, before := "S", "sv_"
		if k.client {
			kind, before = "C", "cl_"
		}
		if prefix == "" {
			before = ""
		}
		addr, port := hostPort(k.remote)
		localAddr, localPort := hostPort(k.local)
		pid := 0 // of clients that are processes of this machine, which is not looked up
		if !k.client {
			pid = int(k.pid)
		}
		rows = append(rows, []any{
			kind, k.user, k.database, before + k.state, addr, port, localAddr, localPort, clock(k.connected), clock(k.asked),
			int(k.waiting / time.Second), int(k.waiting % time.Second / time.Microsecond), k.closeNeeded, k.ptr, k.link, pid, k.tls, k.application,
		})
	}
	return rows
}

// showSockets adds what PgBouncer knows of its buffers. Here they are of the goroutines that use them, and not looked into.
func showSockets(g *Server, active bool) (rows [][]any) {
	all := append(g.clientSockets(), g.serverSockets()...)
	if active {
		all = slices.DeleteFunc(all, func(k socket) bool { return !k.active && k.waiting == 0 })
	}
	for _, row := range socketRows(all, "state") {
		rows = append(rows, append(row, 0, 0, 0, 0, 0, 0, 0))
	}
	return rows
}

func showState(g *Server) [][]any {
	yes := map[bool]string{true: "yes", false: "no"}
	paused, _ := g.isPaused(everyDatabase)
	shut, _, _ := g.Status()
	return [][]any{{"active", yes[!paused && shut == ""]}, {"paused", yes[paused]}, {"suspended", "no"}}
}

// Pool is what a user has of connections in a database.
type Pool struct {
	Database string `json:"database"`
	User     string `json:"user"`
	Clients  int    `json:"clients"` // those included that wait
	Waiting  int    `json:"waiting"` // for a connection to a server
	// MaxWaitS is how long the client has waited that waits longest, in seconds.
	MaxWaitS float64       `json:"max_wait_s"`
	Servers  []PoolServers `json:"servers"`
}

// PoolServers are the connections of a Pool to one site.
type PoolServers struct {
	Site      string `json:"site"`
	Active    int    `json:"active"`
	Idle      int    `json:"idle"`
	Login     int    `json:"login"`
	Canceling int    `json:"canceling"` // kept back until a request to cancel is through
}

// Pools describes what there is at this moment, sorted by database and user.
func (g *Server) Pools() []Pool {
	type key struct{ database, user string }
	pools := map[key]*Pool{}
	of := func(database, user string) *Pool {
		p := pools[key{database, user}]
		if p == nil {
			p = &Pool{Database: database, User: user, Servers: []PoolServers{}}
			pools[key{database, user}] = p
		}
		return p
	}
	site := func(p *Pool, name string) *PoolServers {
		for i := range p.Servers {
			if p.Servers[i].Site == name {
				return &p.Servers[i]
			}
		}
		p.Servers = append(p.Servers, PoolServers{Site: name})
		return &p.Servers[len(p.Servers)-1]
	}
	for _, k := range g.clientSockets() {
		p := of(k.database, k.user)
		p.Clients++
		if k.state == "waiting" {
			p.Waiting++
			p.MaxWaitS = max(p.MaxWaitS, k.waiting.Seconds())
		}
	}
	for _, k := range g.serverSockets() {
		s := site(of(k.database, k.user), k.site)
		switch k.state {
		case "idle":
			s.Idle++
		case "being_canceled":
			s.Canceling++
			fallthrough
		default:
			s.Active++
		}
	}
	for _, p := range g.allPools() {
		p.mu.Lock()
		login := p.open - len(p.all)
		p.mu.Unlock()
		if login > 0 {
			site(of(p.tally.database, p.tally.user), p.tally.site).Login += login
		}
	}
	all := make([]Pool, 0, len(pools))
	for _, p := range pools {
		slices.SortFunc(p.Servers, func(a, b PoolServers) int { return cmp.Compare(a.Site, b.Site) })
		all = append(all, *p)
	}
	slices.SortFunc(all, func(a, b Pool) int { return cmp.Or(cmp.Compare(a.Database, b.Database), cmp.Compare(a.User, b.User)) })
	return all
}

// poolMode is how PgBouncer calls the mode for a database.
func (g *Server) poolMode(database string) string {
	switch {
	case database == AdminDatabase:
		return "statement"
	case g.cfg.Mode == TransactionMode:
		return "transaction"
	}
	return "session"
}

func showPools(g *Server) (rows [][]any) {
	for _, p := range g.Pools() {
		var sum PoolServers
		for _, s := range p.Servers {
			sum.Active += s.Active
			sum.Idle += s.Idle
			sum.Login += s.Login
			sum.Canceling += s.Canceling
		}
		wait := time.Duration(p.MaxWaitS * float64(time.Second))
		rows = append(rows, []any{
			p.Database, p.User, p.Clients - p.Waiting, p.Waiting, 0, 0, sum.Active, 0, sum.Canceling, sum.Idle, 0, 0, sum.Login,
			int(wait / time.Second), int(wait % time.Second / time.Microsecond), g.poolMode(p.Database),
		})
	}
	return rows
}

func micro(s float64) int64 { return int64(s * 1e6) }

// per is a sum divided by a count, 0 without any.
func per(sum, n float64) int64 {
	if n <= 0 {
		return 0
	}
	return int64(sum / n)
}

func showStats(g *Server) (rows [][]any) {
	sums := byDatabase(g.Tallies())
	g.mu.Lock()
	for _, name := range g.databases() {
		if _, ok := sums[name]; !ok {
			sums[name] = Counts{}
		}
	}
	g.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(sums)) {
		c := sums[name]
		last, s := g.periods.last(name)
		rows = append(rows, []any{
			name, c.Transactions, c.Queries, c.Received, c.Sent, micro(c.TransactionS), micro(c.QueryS), micro(c.WaitS),
			per(float64(last.Transactions), s), per(float64(last.Queries), s), per(float64(last.Received), s), per(float64(last.Sent), s),
			per(last.TransactionS*1e6, float64(last.Transactions)), per(last.QueryS*1e6, float64(last.Queries)), per(last.WaitS*1e6, s),
		})
	}
	return rows
}

// cutRows keeps the first column and those of [from, to).
func cutRows(rows [][]any, from, to int) (out [][]any) {
	for _, r := range rows {
		out = append(out, append([]any{r[0]}, r[from:to]...))
	}
	return out
}

func showTotals(g *Server) (rows [][]any) {
	names := strings.Fields(`total_xact_count total_query_count total_client_bytes total_server_bytes total_xact_time total_query_time total_wait_time
		avg_xact_count avg_query_count avg_client_bytes avg_server_bytes avg_xact_time avg_query_time avg_wait_time`)
	var sum Counts
	var last Counts
	var s float64
	for name, c := range byDatabase(g.Tallies()) {
		sum.add(c)
		var l Counts
		l, s = g.periods.last(name)
		last.add(l)
	}
	values := []any{
		sum.Transactions, sum.Queries, sum.Received, sum.Sent, micro(sum.TransactionS), micro(sum.QueryS), micro(sum.WaitS),
		per(float64(last.Transactions), s), per(float64(last.Queries), s), per(float64(last.Received), s), per(float64(last.Sent), s),
		per(last.TransactionS*1e6, float64(last.Transactions)), per(last.QueryS*1e6, float64(last.Queries)), per(last.WaitS*1e6, s),
	}
	for i, name := range names {
		rows = append(rows, []any{name, values[i]})
	}
	return rows
}

func showLists(g *Server) [][]any {
	g.mu.Lock()
	clients, conns, databases := len(g.clients), len(g.conns), len(g.databases())
	g.mu.Unlock()
	users, pools := map[string]bool{}, g.Pools()
	idle, used := 0, 0
	for _, p := range pools {
		users[p.User] = true
		for _, s := range p.Servers {
			idle += s.Idle
			used += s.Active
		}
	}
	return [][]any{
		{"databases", databases},
		{"users", len(users)},
		{"pools", len(pools)},
		{"free_clients", max(0, g.lim().ClientsMax-clients)},
		{"used_clients", clients},
		{"login_clients", max(0, conns-clients)},
		{"free_servers", idle},
		{"used_servers", used},
		{"dns_names", 0},
		{"dns_zones", 0},
		{"dns_queries", 0},
		{"dns_pending", 0},
	}
}

func showUsers(g *Server) (rows [][]any) {
	names := slices.Clone(g.lim().Admins)
	for _, t := range g.Tallies() {
		names = append(names, t.User)
	}
	for _, k := range g.clientSockets() {
		names = append(names, k.user)
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		rows = append(rows, []any{name, nil})
	}
	return rows
}

func showDatabases(g *Server) (rows [][]any) {
	connections := map[string]int{}
	for _, k := range g.serverSockets() {
		connections[k.database]++
	}
	g.mu.Lock()
	names := g.databases()
	paused, disabled := map[string]bool{}, maps.Clone(g.disabled)
	for _, name := range names {
		paused[name] = g.pausedNow(name)
	}
	g.mu.Unlock()
	for _, name := range names {
		var host, port any
		if t, err := g.cfg.Router.Route(&Login{Database: name}, Wish{}); err == nil {
			host, port = t.Address, 0
			if h, p, err := net.SplitHostPort(t.Address); err == nil && t.Network != "unix" {
				n, _ := strconv.Atoi(p)
				host, port = h, n
			}
		}
		rows = append(rows, []any{name, host, port, name, nil, g.lim().PoolMax, 0, 0, g.poolMode(name), 0, connections[name], paused[name], disabled[name]})
	}
	return append(rows, []any{AdminDatabase, nil, 0, AdminDatabase, nil, 0, 0, 0, g.poolMode(AdminDatabase), 0, 0, false, false})
}

func showConfig(g *Server) (rows [][]any) {
	l, d := g.lim(), Limits{}.complete()
	seconds := func(t time.Duration) string { return strconv.FormatFloat(t.Seconds(), 'f', -1, 64) }
	zero := map[bool]string{true: "1", false: "0"}
	secure := map[bool]string{true: "allow", false: "disable"}
	for _, v := range []struct{ key, value, normal, changeable string }{
		{"admin_users", strings.Join(l.Admins, ","), "", "yes"},
		{"client_login_timeout", seconds(g.cfg.LoginMax), "60", "no"},
		{"client_tls_sslmode", secure[g.cfg.TLS != nil], "disable", "no"},
		{"default_pool_size", strconv.Itoa(l.PoolMax), strconv.Itoa(d.PoolMax), "yes"},
		{"duri.login_rate", strconv.Itoa(l.LoginRate), strconv.Itoa(d.LoginRate), "yes"},
		{"duri.strict", zero[l.Strict], "0", "yes"},
		{"max_client_conn", strconv.Itoa(l.ClientsMax), strconv.Itoa(d.ClientsMax), "yes"},
		{"max_db_connections", "0", "0", "no"},
		{"max_user_connections", "0", "0", "no"},
		{"pool_mode", g.poolMode(""), "session", "no"},
		{"query_wait_timeout", seconds(l.HoldMax), seconds(d.HoldMax), "yes"},
		{"server_idle_timeout", seconds(l.IdleMax), seconds(d.IdleMax), "yes"},
		{"server_tls_sslmode", map[bool]string{true: "require", false: "disable"}[g.cfg.ServerTLS != nil], "disable", "no"},
		{"stats_period", strconv.Itoa(periodS), strconv.Itoa(periodS), "no"},
	} {
		rows = append(rows, []any{v.key, v.value, v.normal, v.changeable})
	}
	return rows
}

// showMem tells of the process's memory, in pieces of 1 kB.
func showMem(*Server) (rows [][]any) {
	kinds := []struct{ name, used, free string }{
		{"heap", "/memory/classes/heap/objects:bytes", "/memory/classes/heap/free:bytes"},
		{"stacks", "/memory/classes/heap/stacks:bytes", ""},
		{"all", "/memory/classes/total:bytes", "/memory/classes/heap/released:bytes"},
	}
	read := func(name string) int64 {
		if name == "" {
			return 0
		}
		s := []metrics.Sample{{Name: name}}
		metrics.Read(s)
		return int64(s[0].Value.Uint64())
	}
	for _, k := range kinds {
		used, free := read(k.used), read(k.free)
		if k.name == "all" {
			used -= free
		}
		rows = append(rows, []any{k.name, 1024, used / 1024, free / 1024, used + free})
	}
	return rows
}

// Session is a client that has logged in.
type Session struct {
	PID         uint32    `json:"pid"` // by which it is cancelled; of no process
	User        string    `json:"user"`
	Database    string    `json:"database"`
	State       string    `json:"state"`               // active: it has a connection; waiting: for one; idle
	Site        string    `json:"site"`                // of its latest transaction that was no read elsewhere; empty: it has had none
	ReadSite    string    `json:"read_site,omitempty"` // of its latest read elsewhere
	WaitingS    float64   `json:"waiting_s"`
	Pinned      string    `json:"pinned,omitempty"` // why it keeps its connection
	Settings    int       `json:"settings"`         // that it has made
	Statements  int       `json:"statements"`       // that it has prepared
	Client      string    `json:"client"`
	TLS         string    `json:"tls,omitempty"`
	Connected   time.Time `json:"connected"`
	Asked       time.Time `json:"asked"` // when it sent something last
	Application string    `json:"application_name,omitempty"`
	Login       string    `json:"login"` // password, certificate
}

// Sessions gives the clients that are there, by when they connected.
func (g *Server) Sessions() []Session {
	all := []Session{}
	for _, k := range g.clientSockets() {
		s := Session{
			k.pid, k.user, k.database, "idle", k.site, k.readSite, k.waiting.Seconds(), k.pinned, k.settings, k.statments, k.remote.String(), k.tls, k.connected.UTC(),
			k.asked.UTC(), k.application, k.login,
		}
		switch {
		case k.state == "waiting":
			s.State = k.state
		case k.active || k.database == AdminDatabase:
			s.State = "active"
		}
		all = append(all, s)
	}
	return all
}

func showSessions(g *Server) (rows [][]any) {
	for _, s := range g.Sessions() {
		var waiting, pinned, readSite any
		if s.ReadSite != "" {
			readSite = s.ReadSite
		}
		if s.WaitingS > 0 {
			waiting = strconv.FormatFloat(s.WaitingS, 'f', 3, 64)
		}
		if s.Pinned != "" {
			pinned = s.Pinned
		}
		rows = append(rows, []any{
			int(s.PID), s.User, s.Database, s.State, s.Site, waiting, pinned, s.Settings, s.Statements, s.Client, clock(s.Connected), clock(s.Asked), s.Application, readSite, s.Login,
		})
	}
	return rows
}

func showPins(g *Server) (rows [][]any) {
	pins := g.Pins()
	for _, why := range slices.Sorted(maps.Keys(pins)) {
		rows = append(rows, []any{why, pins[why]})
	}
	return rows
}

// Route is where the next transaction of a user goes.
type Route struct {
	Database string `json:"database"`
	User     string `json:"user"`
	Site     string `json:"site,omitempty"`
	Address  string `json:"address,omitempty"`
	Epoch    uint64 `json:"epoch,omitempty"`
	Problem  string `json:"problem,omitempty"` // why there is none
	// Reads are the sites where reads go; none: they stay at Site.
	Reads []ReadSite `json:"reads,omitempty"`
	// BacklogBytes are what of the WAL of Site others have not applied, and DelayS is how long a transaction that writes is delayed
	// for that, in seconds; with gateway.slow_down.
	BacklogBytes int64   `json:"backlog_bytes,omitempty"`
	DelayS       float64 `json:"delay_s,omitempty"`
}

// ReadsText prints where reads go, for people.
func (r Route) ReadsText() string {
	var all []string
	for _, x := range r.Reads {
		what := fmt.Sprintf("%s %d", x.Site, x.Weight)
		switch {
		case x.Problem != "":
			what += " (not now: " + x.Problem + ")"
		case x.LagS != nil:
			what += fmt.Sprintf(" (lag %.3f s)", *x.LagS)
		}
		all = append(all, what)
	}
	return strings.Join(all, ", ")
}

// Routes asks the router for the users that are there, or have been.
func (g *Server) Routes() []Route {
	type key struct{ database, user string }
	users := map[key]bool{}
	for _, t := range g.Tallies() {
		users[key{t.Database, t.User}] = true
	}
	for _, k := range g.clientSockets() {
		if k.database != AdminDatabase {
			users[key{k.database, k.user}] = true
		}
	}
	all := []Route{}
	for u := range users {
		r, who := Route{Database: u.database, User: u.user}, &Login{Database: u.database, User: u.user}
		if t, err := g.cfg.Router.Route(who, Wish{}); err != nil {
			r.Problem = err.Error()
		} else {
			r.Site, r.Address, r.Epoch = t.Site, t.Address, t.Epoch
		}
		if g.cfg.Reads != nil {
			r.Reads = g.cfg.Reads.ReadSites(who)
		}
		if g.cfg.Pace != nil && r.Site != "" {
			r.BacklogBytes, r.DelayS = g.cfg.Pace.Backlog(r.Site, u.database), g.cfg.Pace.Delay(who, Wish{}, r.Site).Seconds()
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b Route) int { return cmp.Or(cmp.Compare(a.Database, b.Database), cmp.Compare(a.User, b.User)) })
	return all
}

func showRoutes(g *Server) (rows [][]any) {
	for _, r := range g.Routes() {
		var problem, reads any
		if r.Problem != "" {
			problem = r.Problem
		}
		if len(r.Reads) > 0 {
			reads = r.ReadsText()
		}
		rows = append(rows, []any{r.Database, r.User, r.Site, r.Address, r.Epoch, problem, reads, r.BacklogBytes, int64(r.DelayS * 1e3)})
	}
	return rows
}
