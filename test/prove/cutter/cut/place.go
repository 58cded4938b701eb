package cut

import (
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/pgwire/scram"
)

// The clients' role.
const (
	appUser     = "app"
	appPassword = "app's"
	database    = "shop"
)

// schema is what scripts work on. ledger has no key, so that what happens twice is seen.
const schema = `
CREATE TABLE ledger (client bigint NOT NULL, seq int NOT NULL, note text);
CREATE INDEX ledger_client ON ledger (client);
CREATE TABLE account (client bigint PRIMARY KEY, amount bigint NOT NULL);
CREATE TABLE secret (owner text, v text);
CREATE INDEX secret_owner ON secret (owner);
ALTER TABLE secret ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON secret USING (owner = current_setting('app.user_id', true));
CREATE TABLE parent (id bigint PRIMARY KEY);
CREATE TABLE child (client bigint, parent bigint REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE audited (client bigint, seq int);
CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN INSERT INTO ledger VALUES (NEW.client, NEW.seq + 1000); RETURN NEW; END $$;
CREATE TRIGGER audit AFTER INSERT ON audited FOR EACH ROW EXECUTE FUNCTION audit();
CREATE FUNCTION put(c bigint, s int) RETURNS int LANGUAGE sql VOLATILE AS 'INSERT INTO public.ledger VALUES (c, s) RETURNING seq';
CREATE FUNCTION sets(n text, v text) RETURNS text LANGUAGE sql AS 'SELECT set_config($1, $2, false)';
CREATE PROCEDURE thrice(c bigint) LANGUAGE plpgsql AS $$
	BEGIN FOR i IN 1..3 LOOP INSERT INTO public.ledger VALUES (c, i); COMMIT; END LOOP; END $$;
CREATE PROCEDURE plain(c bigint) LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.ledger VALUES (c, 1); END $$;
CREATE VIEW writes AS SELECT put(client, 7) FROM account;
CREATE TABLE small (a int);
ALTER TABLE small OWNER TO app;
CREATE SCHEMA other;
CREATE TABLE other.here AS SELECT 'other'::text AS v;
GRANT USAGE, CREATE ON SCHEMA other TO app;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public, other TO app;
CREATE ROLE clerk; GRANT clerk TO app;
GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO clerk;`

// seed is what each client finds of its own.
const seed = `INSERT INTO account VALUES ($c, 100); INSERT INTO secret VALUES ('$c', 'mine'); INSERT INTO parent VALUES ($c)`

// place is one PostgreSQL with what scripts work on, and who may log in there.
type place struct {
	cluster  *pgcluster.Cluster
	verifier *scram.Verifier
	keys     *scram.Keys
	clients  atomic.Int64 // numbers given
	benches  atomic.Int64
}

// settings of a server for many short cases; nothing here is about durability.
var settings = map[string]string{
	"fsync": "off", "full_page_writes": "off", "shared_buffers": "32MB", "jit": "off", "max_connections": "200",
	"max_prepared_transactions": "50", "max_wal_size": "512MB", "autovacuum": "off",
}

// furnish prepares a running cluster.
func furnish(ctx context.Context, c *pgcluster.Cluster) (*place, error) {
	p := &place{cluster: c}
	p.clients.Store(1_000_000)
	p.verifier, p.keys = secrets()
	for _, s := range []struct{ db, sql string }{
		{"postgres", "CREATE ROLE " + appUser + " LOGIN"},
		{"postgres", "CREATE DATABASE " + database},
		{database, schema},
		{database, "CREATE SCHEMA duri"},
		{database, "CREATE PUBLICATION duri FOR ALL TABLES"},
	} {
		if err := c.Exec(ctx, s.db, s.sql); err != nil {
			return nil, err
		}
	}
	admin, err := p.admin(ctx)
	if err != nil {
		return nil, err
	}
	defer pg.Close(admin)
	return p, catalog.Migrate(ctx, admin)
}

// admin opens a connection of the superuser's.
func (p *place) admin(ctx context.Context) (*pgconn.PgConn, error) {
	return pg.Connect(ctx, fmt.Sprintf("host=%s port=%d user=%s application_name=cutter", p.cluster.SocketDir(), p.cluster.Port(), p.cluster.Superuser()), database, nil)
}

// number is a client's that nobody else has.
func (p *place) number() string { return strconv.FormatInt(p.clients.Add(1), 10) }

// secrets makes what the gateway and its clients know of the password. Few iterations: thousands of logins are not what is
// tested here.
func secrets() (*scram.Verifier, *scram.Keys) {
	const iterations = 64
	salt := []byte("cutter's salt...")
	keys := keysOf(salt, iterations)
	return &scram.Verifier{Salt: salt, Iterations: iterations, StoredKey: sha256.Sum256(keys.ClientKey[:]), ServerKey: keys.ServerKey}, keys
}

// keysOf are the keys that follow from the password.
func keysOf(salt []byte, iterations int) *scram.Keys {
	salted, err := pbkdf2.Key(sha256.New, appPassword, salt, iterations, sha256.Size)
	if err != nil {
		panic(err) // only for lengths that are not these
	}
	mac := func(text string) (k scram.Key) {
		h := hmac.New(sha256.New, salted)
		h.Write([]byte(text))
		copy(k[:], h.Sum(nil))
		return k
	}
	return &scram.Keys{ClientKey: mac("Client Key"), ServerKey: mac("Server Key"), Salt: salt, Iterations: iterations}
}

// Verifier is what the gateway asks.
func (p *place) Verifier(context.Context, string) (*scram.Verifier, error) { return p.verifier, nil }

// Routing is which site a transaction goes to.
type Routing string

// The routings.
const (
	Sticky    Routing = "sticky"    // the same as before
	Alternate Routing = "alternate" // each time the other one
)

// router names one of two sites, of which one may be down.
type router struct {
	mu      sync.Mutex
	sites   []*relay
	routing Routing
	calls   int
	epoch   uint64
	reads   bool // go to the other site
}

// next begins anew, with connections that nobody has used; but where reads go away, which they do only if there is an idle connection.
func (r *router) next(how Routing) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.routing, r.calls = how, 0
	if !r.reads {
		r.epoch++
	}
	for _, s := range r.sites {
		s.refuse.Store(false)
	}
}

func (r *router) Route(_ *gateway.Login, w gateway.Wish) (gateway.Target, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := 0
	if r.routing == Alternate {
		i = r.calls % len(r.sites)
	}
	for j, s := range r.sites {
		if r.routing == Sticky && s.name == w.Last {
			i = j
		}
	}
	r.calls++
	if r.sites[i].refuse.Load() {
		i = (i + 1) % len(r.sites)
	}
	s := r.sites[i]
	return gateway.Target{Site: s.name, Network: "tcp", Address: s.addr(), Epoch: r.epoch}, nil
}

// ReadAt is the site that a session has not been at last.
func (r *router) ReadAt(_ *gateway.Login, w gateway.Wish, _ uint64) (gateway.Target, time.Duration, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range slices.Backward(r.sites) { // of a new session, that will not be its home
		if s.name != w.Last && !s.refuse.Load() {
			return gateway.Target{Site: s.name, Network: "tcp", Address: s.addr(), Epoch: r.epoch}, 0, true
		}
	}
	return gateway.Target{}, 0, false
}

// ReadSites has nothing to tell.
func (*router) ReadSites(*gateway.Login) []gateway.ReadSite { return nil }

// sites answers what the gateway asks about transactions, as agents would: from the server itself.
type sites struct {
	p     *place
	note  func(who, what string)
	mu    sync.Mutex // guards admin
	admin *pgconn.PgConn
	lies  Lie
}

// Lie is a way in which the answers about transactions are wrong, to see whether that is noticed.
type Lie string

// The lies.
const (
	Truth        Lie = ""
	AllAborted   Lie = "all-aborted"   // what was committed is said not to be
	AllCommitted Lie = "all-committed" // and the other way round
	NoEnd        Lie = "no-end"        // the old backend lives on
	TooSoon      Lie = "too-soon"      // a transaction that runs yet is said to have aborted
	Patient      Lie = "patient"       // not of the sites: the gateway waits for ever
	Leaky        Lie = "leaky"         // nor this: a place of each pool cannot be had
)

func (s *sites) ask(ctx context.Context, sql string, args ...string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rows, err := pg.Query(ctx, s.admin, sql, args...)
	if err != nil || len(rows) == 0 {
		return "", err
	}
	return rows[0][0], nil
}

// Fate ends the transaction's backend, waits until it is gone, and looks.
func (s *sites) Fate(ctx context.Context, d gateway.Doubt) (f gateway.Fate, err error) {
	defer func() {
		s.note("sites", fmt.Sprintf("fate of xid %d, pid %d, mark %x: %d, %v", d.XID, d.PID, d.LTXID, f, err))
	}()
	switch s.lies {
	case AllAborted:
		s.End(ctx, d)
		return gateway.Aborted, nil
	case AllCommitted:
		s.End(ctx, d)
		return gateway.Committed, nil
	}
	if s.lies != TooSoon {
		if err := s.terminate(ctx, d.PID); err != nil {
			return gateway.Unknown, err
		}
	}
	if d.XID == 0 {
		return gateway.Aborted, nil
	}
	status, err := s.ask(ctx, "SELECT pg_catalog.pg_xact_status($1::text::xid8)", strconv.FormatUint(d.XID, 10))
	if err != nil {
		return gateway.Unknown, err
	}
	switch status {
	case "committed":
		return gateway.Committed, nil
	case "aborted":
		return gateway.Aborted, nil
	}
	if s.lies == TooSoon {
		return gateway.Aborted, nil
	}
	return gateway.Unknown, fmt.Errorf("transaction %d is %s", d.XID, status)
}

// End ends a backend.
func (s *sites) End(ctx context.Context, d gateway.Doubt) {
	if s.lies == NoEnd {
		return
	}
	err := s.terminate(ctx, d.PID)
	s.note("sites", fmt.Sprintf("end of pid %d: %v", d.PID, err))
}

// CatchUp is immediate: there is one server.
func (*sites) CatchUp(context.Context, string, string, string) error { return nil }

func (s *sites) terminate(ctx context.Context, pid uint32) error {
	for {
		there, err := s.ask(ctx, "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity WHERE pid = $1::text::int4 AND usename = '"+appUser+"'", strconv.FormatUint(uint64(pid), 10))
		if err != nil || there == "" {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// bench is what one worker needs: two relays to the server, a gateway in front of them, and a connection to look at the server.
type bench struct {
	p       *place
	name    string // application_name of all its clients
	wire    *wire
	router  *router
	sites   *sites
	front   *relay // between clients and gateway, with a wire of its own
	gateway *gateway.Server
	addr    string
	admin   *pgconn.PgConn
	stop    func() error
	spoilt  bool // a case went wrong: something of it may be left
}

// logger puts what the gateway logs into the trace.
type logger struct {
	slog.Handler
	w *wire
}

func (l logger) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	b.WriteString(r.Message)
	r.Attrs(func(a slog.Attr) bool { fmt.Fprintf(&b, " %v", a); return true })
	l.w.note("gateway", b.String())
	return nil
}

func (l logger) Enabled(context.Context, slog.Level) bool { return true }
func (l logger) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l logger) WithGroup(string) slog.Handler            { return l }

// stopMax bounds the end of a gateway.
const stopMax = 20 * time.Second

// silenceMax is how long a silent connection lasts until its near end is reset.
const silenceMax = 40 * time.Millisecond

// newBench starts a worker's things.
func (p *place) newBench(ctx context.Context, o Options) (_ *bench, err error) {
	lies, withSites := o.Lie, o.Sites
	b := &bench{p: p, name: fmt.Sprintf("cutter-%04d", p.benches.Add(1)), wire: newWire(silenceMax)}
	var undo []func() error
	b.stop = func() error {
		var errs []error
		for _, f := range slices.Backward(undo) {
			errs = append(errs, f())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.stop())
		}
	}()
	b.router = &router{}
	for _, site := range []string{"a", "b"} {
		r, err := b.wire.relayTo(site, fmt.Sprintf("127.0.0.1:%d", p.cluster.Port()))
		if err != nil {
			return nil, err
		}
		undo = append(undo, r.close)
		b.router.sites = append(b.router.sites, r)
	}
	for _, to := range []**pgconn.PgConn{&b.admin, new(*pgconn.PgConn)} {
		if *to, err = p.admin(ctx); err != nil {
			return nil, err
		}
		conn := *to
		undo = append(undo, func() error { pg.Close(conn); return nil })
		b.sites = &sites{p: p, note: b.wire.note, admin: conn, lies: lies}
	}
	cfg := gateway.Config{
		Mode: gateway.TransactionMode, Router: b.router, Verifiers: p, Log: slog.New(logger{w: b.wire}), HoldMax: holdMax, LoginMax: loginMax,
		PoolMax: poolMax,
	}
	if cfg.TLS, err = selfSigned(); err != nil {
		return nil, err
	}
	if withSites {
		cfg.Sites = b.sites
		if b.router.reads = o.Reads; o.Reads {
			cfg.Reads = b.router
		}
	}
	switch lies {
	case Patient:
		cfg.HoldMax, cfg.LoginMax = caseMax, caseMax
	case Leaky:
		cfg.PoolMax--
	}
	if b.gateway, err = gateway.NewServer(cfg); err != nil {
		return nil, err
	}
	b.gateway.Open()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	b.addr = l.Addr().String()
	serveCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan error, 1)
	go func() { done <- b.gateway.Serve(serveCtx, l) }()
	undo = append(undo, func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(stopMax):
			return errors.New("the gateway does not end:\n" + hanging())
		}
	})
	if b.front, err = newWire(silenceMax).relayTo("client", b.addr); err != nil {
		return nil, err
	}
	undo = append(undo, b.front.close)
	return b, nil
}

// away is how many reads went to another site than their session's home.
func (b *bench) away() (n uint64) {
	for _, t := range b.gateway.Tallies() {
		n += t.ReadsAway
	}
	return n
}

// ledger is what a client's transactions have left, in order.
func (b *bench) ledger(ctx context.Context, number string) ([]int, error) {
	rows, err := pg.Query(ctx, b.admin, "SELECT seq FROM ledger WHERE client = $1::text::bigint ORDER BY seq", number)
	if err != nil {
		return nil, err
	}
	var seqs []int
	for _, r := range rows {
		n, err := strconv.Atoi(r[0])
		if err != nil {
			return nil, err
		}
		seqs = append(seqs, n)
	}
	return seqs, nil
}

// sessions waits until no session is left at the gateway; what is left after a while is told, with where it hangs.
func (b *bench) sessions(ctx context.Context) ([]string, error) {
	deadline := time.Now().Add(leftMax)
	for {
		_, n, _ := b.gateway.Status()
		if n == 0 {
			return nil, nil
		}
		if time.Now().After(deadline) {
			return []string{fmt.Sprintf("%d sessions are left at the gateway without clients:\n%s", n, hanging())}, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// hanging are the stacks of gateways' sessions that wait for something else than their clients.
func hanging() string {
	all := make([]byte, 4<<20)
	all = all[:runtime.Stack(all, true)]
	var found []string
	for stack := range strings.SplitSeq(string(all), "\n\n") {
		if strings.Contains(stack, "gateway.(*session)") && !strings.Contains(stack, "gateway.(*session).next(") {
			found = append(found, stack)
		}
	}
	return strings.Join(found, "\n\n")
}

// seed makes what a client finds of its own.
func (b *bench) seed(ctx context.Context, number string) error {
	_, err := pg.Rows(ctx, b.admin, strings.ReplaceAll(seed, "$c", number))
	return err
}

// left waits until the servers' processes have nothing of the worker's sessions any more: no transaction, and of those that
// were cut off no lock. What is left after a while is told.
func (b *bench) left(ctx context.Context, cut []uint32, gone bool) (string, error) {
	list := make([]string, len(cut))
	for i, pid := range cut {
		list[i] = strconv.FormatUint(uint64(pid), 10)
	}
	pids := "{" + strings.Join(list, ",") + "}"
	deadline := time.Now().Add(leftMax)
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		rows, err := pg.Query(ctx, b.admin, `SELECT pid, state, query FROM pg_stat_activity a WHERE application_name = $1 AND (xact_start IS NOT NULL
			OR pid = ANY ($2::text::int[]) AND ($3::text::bool OR EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid)))`, b.name, pids, strconv.FormatBool(gone))
		if err != nil || len(rows) == 0 {
			return "", err
		}
		if time.Now().After(deadline) {
			return fmt.Sprint(rows), nil
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(wait):
		}
	}
}

// leftMax bounds how long something may be left at a server.
const leftMax = 3 * time.Second

// forget takes prepared transactions of a client away, which outlive everything, and tells their names.
func (b *bench) forget(ctx context.Context, number string) ([]string, error) {
	rows, err := pg.Query(ctx, b.admin, "SELECT gid FROM pg_prepared_xacts WHERE gid LIKE '%' || $1", number)
	var names []string
	for _, r := range rows {
		names = append(names, r[0])
		if _, err := pg.Rows(ctx, b.admin, "ROLLBACK PREPARED "+pg.QuoteLiteral(r[0])); err != nil {
			return names, err
		}
	}
	return names, err
}

// sorted are a map's keys.
func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// bystander is a client in a transaction while another one's connection is cut.
type bystander struct {
	c      *client
	t      *transcript
	number string
}

func (b *bench) newBystander(ctx context.Context) (*bystander, error) {
	by := &bystander{t: &transcript{}, number: b.p.number()}
	if err := b.seed(ctx, by.number); err != nil {
		return nil, err
	}
	var err error
	if by.c, err = connect(ctx, b.addr, b.p.keys, b.name); err != nil {
		return nil, err
	}
	err = by.c.run(by.t, queries("SET app.user_id = '$c'", "BEGIN", insert(1)), by.number)
	if err != nil || !by.t.alive() {
		by.c.close()
		return nil, errors.Join(err, fmt.Errorf("the bystander cannot begin: %s", by.t.last()))
	}
	return by, nil
}

// works ends its transaction, and tells what is not as it must be.
func (by *bystander) works(ctx context.Context, b *bench) (wrong []string, err error) {
	if err := by.c.run(by.t, queries("COMMIT", "SELECT v FROM secret", insert(2)), by.number); err != nil {
		return nil, err
	}
	if !by.t.alive() || by.t.complete() != 6 || !slices.Contains(by.t.answers[4].says, `D "\x00\x01\x00\x00\x00\x04mine"`) {
		wrong = append(wrong, "the bystander was touched: "+fmt.Sprint(by.t.answers))
	}
	by.c.close()
	ledger, err := b.ledger(ctx, by.number)
	if err == nil && !slices.Equal(ledger, []int{1, 2}) {
		wrong = append(wrong, fmt.Sprintf("the bystander's ledger has %v", ledger))
	}
	return wrong, err
}
