package demo

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/server"
)

// siteNames are the demo's two sites; the first is the one that dies.
var siteNames = [2]string{"seoul", "busan"}

// Shares of Options.Duration. What remains is written after A's return.
const (
	bothShare = 0.38
	downShare = 0.27
)

// Bounds of the waits. Each is far above what a busy machine with two cores needs.
const (
	joinMax     = 90 * time.Second
	failoverMax = 30 * time.Second
	catchupMax  = 60 * time.Second
	settleMax   = 60 * time.Second
	drainMax    = 3 * time.Second
	pollEvery   = 50 * time.Millisecond
)

// downPhase is the phase in which A is dead.
const downPhase = "A is down"

// demo is one run.
type demo struct {
	o       Options
	binDir  string
	dir     string
	ports   ports
	witness *process // with Options.RPO0
	sites   [2]*site
	// gateways are beside the applications of the sites, in their order.
	gateways [2]*gatewayProc
	state    state
	screen   *screen
	rep      Report
	tail     *tail
	records  string // folder of the clients' records

	mu     sync.Mutex // guards what the display goroutine reads
	phase  string
	load   *load
	killAt time.Time // zero: nothing was killed yet
	backAt time.Time // zero: what was killed is not back yet
}

// Run runs the demo and gives its report. A verdict against duri is no error: see Report.OK. Errors have hints. When ctx
// ends, everything is removed and its error returned.
func Run(ctx context.Context, o Options) (Report, error) {
	d, err := prepare(ctx, o)
	if err != nil {
		return Report{}, withHint(err)
	}
	begin := time.Now()
	err = d.run(ctx)
	d.rep.Seconds = time.Since(begin).Seconds()
	if err != nil && ctx.Err() == nil || err == nil && !d.rep.OK {
		d.sayLogs()
	}
	if err == nil && o.Keep {
		if err = d.keep(); err == nil {
			return d.rep, nil
		}
	}
	if rerr := d.remove(); rerr != nil {
		err = errors.Join(err, rerr)
	}
	return d.rep, withHint(err)
}

// prepare checks everything that can be checked before anything is made, and makes the directory.
func prepare(ctx context.Context, o Options) (*demo, error) {
	o.defaults()
	d := &demo{o: o, screen: newScreen(o.Out, o.NoColour), rep: Report{RPO0: o.RPO0, Killed: o.Kill, Seed: o.Seed, Problems: []string{}, FirstConflicts: []ConflictLine{}}}
	if err := o.check(); err != nil {
		return nil, err
	}
	var err error
	if o.Program == "" {
		if d.o.Program, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("find the duri program: %w", err)
		}
	}
	if d.binDir, d.rep.PostgreSQL, err = findPostgres(ctx, o.BinDir); err != nil {
		return nil, err
	}
	if d.ports, err = choosePorts(o.PortBase, o.portCount()); err != nil {
		return nil, err
	}
	if d.state.Demo, err = identify(os.Getpid()); err != nil {
		return nil, err
	}
	if d.dir, err = makeDir(o.Dir); err != nil {
		return nil, err
	}
	d.state.BinDir, d.records = d.binDir, filepath.Join(d.dir, "records")
	return d, nil
}

// run tells the story beside the goroutines that watch and show it.
func (d *demo) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.display(ctx) })
	g.Go(func() error {
		defer cancel()
		return d.story(ctx, g)
	})
	err := g.Wait()
	d.endPhase()
	d.screen.clear()
	return err
}

// story is what happens, in order.
func (d *demo) story(ctx context.Context, g *errgroup.Group) error {
	for _, step := range []func(context.Context, *errgroup.Group) error{
		d.startServers, d.fill, d.join, d.startGateways, d.bothWrite, d.killA, d.returnA, d.finish,
	} {
		if err := step(ctx, g); err != nil {
			return errors.Join(err, d.stopLoad())
		}
	}
	return nil
}

// stopLoad ends the clients after a failure; there may be none.
func (d *demo) stopLoad() error {
	d.mu.Lock()
	l := d.load
	d.load = nil
	d.mu.Unlock()
	if l == nil {
		return nil
	}
	return l.stop()
}

// begin starts a phase and ends the one before.
func (d *demo) begin(name, format string, args ...any) {
	d.endPhase()
	d.rep.Phases = append(d.rep.Phases, Phase{Name: name, At: time.Now().UTC()})
	d.mu.Lock()
	d.phase = name
	d.mu.Unlock()
	d.screen.say(format, args...)
}

func (d *demo) endPhase() {
	if n := len(d.rep.Phases); n > 0 && d.rep.Phases[n-1].Seconds == 0 {
		d.rep.Phases[n-1].Seconds = time.Since(d.rep.Phases[n-1].At).Seconds()
	}
}

// startServers makes both clusters, at the same time, each with its superuser's own random password.
func (d *demo) startServers(ctx context.Context, _ *errgroup.Group) error {
	d.begin("servers", "two PostgreSQL %s servers start on ports %d and %d, in %s", d.rep.PostgreSQL, d.ports.postgres[0], d.ports.postgres[1], d.dir)
	password := rand.Text()
	for i, name := range siteNames {
		dir := filepath.Join(d.dir, "pg-"+name)
		d.state.Clusters = append(d.state.Clusters, dir)
		d.sites[i] = &site{letter: string(rune('A' + i)), name: name, password: password}
	}
	if err := d.state.save(d.dir); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for i, s := range d.sites {
		g.Go(func() error {
			c, err := pgcluster.Create(ctx, pgcluster.Options{
				BinDir: d.binDir, Dir: d.state.Clusters[i], Port: d.ports.postgres[i], Password: rand.Text(), Detach: d.o.Keep,
				Settings: map[string]string{"shared_buffers": "64MB", "max_connections": "80"},
			})
			if err != nil {
				return err
			}
			s.cluster = c
			return c.Start(ctx)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if u := d.sites[0].serverUser(); u != "" {
		d.screen.say("running as root: PostgreSQL refuses root, so both servers run as user %s", u)
	}
	return nil
}

// fill makes the database: at A with its content, at B empty.
func (d *demo) fill(ctx context.Context, _ *errgroup.Group) error {
	d.begin("data", "database %s at A: %d local governments, their budget, %d payments; at B: empty", database, len(governments()), openingPayments)
	passwords := [2]string{d.sites[0].password, d.sites[0].password}
	for i, s := range d.sites {
		if err := s.cluster.Exec(ctx, "postgres", "CREATE DATABASE "+database); err != nil {
			return err
		}
		content := appSQL(s.name, passwords)
		if i == 0 {
			content += schemaSQL + seedSQL()
		}
		if err := s.cluster.Exec(ctx, database, content); err != nil {
			return err
		}
		// Gateways log in at both sites with what the client proves once, so the verifiers are the same, byte by byte.
		for n, role := range roles {
			rows, err := s.cluster.QueryText(ctx, database, "SELECT rolpassword FROM pg_authid WHERE rolname = "+pg.QuoteLiteral(role))
			if err != nil {
				return fmt.Errorf("read the verifier of role %s at %s: %w", role, s.label(), err)
			}
			passwords[n] = rows[0][0]
		}
	}
	return nil
}

// join makes the duri cluster: A, with its data, is the first site; B copies.
func (d *demo) join(ctx context.Context, g *errgroup.Group) error {
	d.begin("join", "duri: A joins as the first site, B copies from it")
	if err := d.makeCluster(ctx); err != nil {
		return err
	}
	if err := d.startWitness(); err != nil {
		return err
	}
	for _, s := range d.sites {
		if err := d.startAgent(s); err != nil {
			return err
		}
		g.Go(func() error { return s.watcher.run(ctx) })
		if err := s.await(ctx, "is ready", joinMax, view.ready); err != nil {
			return err
		}
	}
	for _, s := range d.sites {
		if err := s.await(ctx, "follows the other", joinMax, view.following); err != nil {
			return err
		}
	}
	return d.holdCommits(ctx)
}

// makeCluster runs what `duri grants --gateway` prints and makes what `duri init` makes.
func (d *demo) makeCluster(ctx context.Context) error {
	spec := config.InitSpec{Name: "demo", Out: filepath.Join(d.dir, "cluster"), Databases: []config.Database{{Name: database}}}
	for i, s := range d.sites {
		if err := s.cluster.Exec(ctx, database, grants.SQL(grants.Spec{Role: duriRole, Database: database, Gateway: true})); err != nil {
			return fmt.Errorf("run the grants at %s: %w", s.label(), err)
		}
		password := rand.Text()
		if err := s.cluster.Exec(ctx, database, "ALTER ROLE "+duriRole+" PASSWORD "+pg.QuoteLiteral(password)); err != nil {
			return fmt.Errorf("set the password of role %s at %s: %w", duriRole, s.label(), err)
		}
		address := "127.0.0.1:" + strconv.Itoa(d.ports.agent[i])
		spec.Sites = append(spec.Sites, config.InitSite{
			Name: s.name, Address: address, Listen: address,
			DSN:      fmt.Sprintf("host=127.0.0.1 port=%d user=%s password=%s sslmode=disable", s.cluster.Port(), duriRole, password),
			SetupDSN: s.superDSN(),
		})
		file := filepath.Join(spec.Out, s.name, config.FileName)
		s.spec = agentSpec{program: d.o.Program, command: "agent", config: file, log: filepath.Join(d.dir, "agent-"+s.name+".log"), binDir: d.binDir, detach: d.o.Keep}
		s.control = server.NewControl(dataDir(file))
		s.watcher = &watcher{site: s.name, control: s.control}
	}
	if d.o.RPO0 {
		spec.Witness = "127.0.0.1"
		for i, name := range append(siteNames[:], config.WitnessFolder) {
			spec.Voters = append(spec.Voters, config.Voter{Name: name, Peer: loopback(d.ports.voter[2*i]), Client: loopback(d.ports.voter[2*i+1])})
		}
	}
	if err := config.InitCluster(spec); err != nil {
		return err
	}
	for _, s := range d.sites {
		if err := inGatewaySection(s.spec.config, "  mode: transaction\n"); err != nil {
			return err
		}
	}
	return d.makeGateways(spec)
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// startWitness starts the third voter of the register and notes it for Stop.
func (d *demo) startWitness() error {
	if !d.o.RPO0 {
		return nil
	}
	file := filepath.Join(d.dir, "cluster", config.WitnessFolder, config.FileName)
	p, err := startAgent(agentSpec{program: d.o.Program, command: "witness", config: file, log: filepath.Join(d.dir, "witness.log"), binDir: d.binDir, detach: d.o.Keep})
	if err != nil {
		return fmt.Errorf("witness: %w", err)
	}
	d.witness = p
	return d.note(p)
}

// holdCommits lets commits wait for the other site, as a DBA sets it up, and waits until both sites may acknowledge.
func (d *demo) holdCommits(ctx context.Context) error {
	if !d.o.RPO0 {
		return nil
	}
	for _, s := range d.sites {
		for _, sql := range []string{"ALTER SYSTEM SET synchronous_standby_names = '1 (" + server.Slot(database) + ")'", "SELECT pg_reload_conf()"} {
			if err := s.cluster.Exec(ctx, "postgres", sql); err != nil {
				return err
			}
		}
	}
	d.screen.say("RPO 0: commits wait until the other site has them on disk; a witness decides when the sites lose each other")
	return d.admitted(ctx, d.sites[:])
}

// admitted waits until sites are members of the register and let clients in.
func (d *demo) admitted(ctx context.Context, sites []*site) error {
	for _, s := range sites {
		err := d.until(ctx, catchupMax, s.label()+" may serve clients", func() bool {
			ask, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			r, err := s.control.Register(ask)
			return err == nil && r.Member && r.Door != nil && r.Door.Open
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// startAgent starts a site's agent and notes it for Stop.
func (d *demo) startAgent(s *site) error {
	if err := s.startAgent(); err != nil {
		return err
	}
	return d.note(s.agent)
}

// note lets Stop find a process.
func (d *demo) note(p *process) error {
	id, err := identify(p.cmd.Process.Pid)
	if err != nil { // it ended at once: await says why
		return nil //nolint:nilerr // see above
	}
	d.state.Agents = append(slices.DeleteFunc(d.state.Agents, func(p procID) bool { return !p.running() }), id)
	return d.state.save(d.dir)
}

// bothWrite lets the clients write at both sites.
func (d *demo) bothWrite(ctx context.Context, _ *errgroup.Group) error {
	d.begin("both write", "%d clients per site write the ledger, a part of it the same rows (seed %d)", d.o.Clients, d.o.Seed)
	spec := loadSpec{names: siteNames, clients: d.o.Clients, rate: d.o.Rate, dir: d.records, seed: d.o.Seed}
	for i, g := range d.gateways {
		spec.dsns[i] = g.dsn(appRole)
	}
	l, err := startLoad(ctx, spec)
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.load = l
	d.mu.Unlock()
	return d.lasts(ctx, bothShare, d.sites[:])
}

// lasts waits for a share of the duration, and fails when a gateway or the agent of one of the sites ends meanwhile.
func (d *demo) lasts(ctx context.Context, share float64, sites []*site) error {
	deadline := time.NewTimer(time.Duration(share * float64(d.o.Duration)))
	defer deadline.Stop()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-deadline.C:
			return nil
		case <-tick.C:
		}
		for _, g := range d.gateways {
			if err := g.fault(); err != nil {
				return err
			}
		}
		for _, s := range sites {
			if !s.agent.alive() {
				return fmt.Errorf("the agent of site %s ended (%w): %s", s.label(), s.agent.err, lastLine(s.spec.log))
			}
		}
	}
}

// killA kills A and waits until its clients write at B.
func (d *demo) killA(ctx context.Context, g *errgroup.Group) error {
	a, b := d.sites[0], d.sites[1]
	what := map[string]string{KillSite: "PostgreSQL and agent", KillPostgres: "PostgreSQL", KillAgent: "the agent"}[d.o.Kill]
	d.begin(downPhase, "kill -9: %s of A; its clients keep their connections to the gateway", what)
	d.rep.KillAt = time.Now().UTC()
	d.mu.Lock()
	d.killAt = d.rep.KillAt
	d.mu.Unlock()
	if err := a.kill(d.o.Kill); err != nil {
		return err
	}
	if err := d.until(ctx, failoverMax, "A's clients write at B", func() bool { _, all := d.load.awayFrom(0); return all }); err != nil {
		return err
	}
	times, _ := d.load.awayFrom(0)
	d.rep.FailoverMS = slices.MaxFunc(times, time.Time.Compare).Sub(d.rep.KillAt).Milliseconds()
	d.screen.say("all %d clients of A write at B, %s after the kill; %s", d.o.Clients, ms(d.rep.FailoverMS), d.noticed())
	if err := d.startTail(ctx, g); err != nil {
		return err
	}
	return d.lasts(ctx, downShare, []*site{b})
}

// until waits for a condition.
func (d *demo) until(ctx context.Context, timeout time.Duration, what string, cond func() bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, errTooLong)
	defer cancel()
	for !cond() {
		err := pause(ctx, pollEvery)
		if errors.Is(err, errTooLong) {
			return fmt.Errorf("wait until %s: not within %v", what, timeout)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// returnA starts A again, waits until both sites have what the other wrote meanwhile, and sends A's clients home.
func (d *demo) returnA(ctx context.Context, _ *errgroup.Group) error {
	a, b := d.sites[0], d.sites[1]
	d.begin("A is back", "what was killed at A starts again: PostgreSQL with crash recovery, then the agent")
	if d.o.Kill != KillAgent {
		if err := a.cluster.Start(ctx); err != nil {
			return err
		}
	}
	if d.o.Kill != KillPostgres {
		if err := d.startAgent(a); err != nil {
			return err
		}
	}
	d.rep.BackAt = time.Now().UTC()
	d.mu.Lock()
	d.backAt = d.rep.BackAt
	d.mu.Unlock()
	b.watcher.ask(ctx)
	target := b.watcher.view().status.Journal.End
	err := a.await(ctx, "has applied what B wrote", catchupMax, func(v view) bool {
		l, ok := v.link()
		return ok && v.asked.After(d.rep.BackAt) && v.following() && l.Apply.Applied >= target
	})
	if err != nil {
		return err
	}
	if err := d.until(ctx, catchupMax, "B has A's last payments", d.tail.done); err != nil {
		return err
	}
	d.rep.CatchupMS = time.Since(d.rep.BackAt).Milliseconds()
	d.screen.say("caught up both ways %s after A's return", ms(d.rep.CatchupMS))
	if d.o.RPO0 {
		d.screen.say("the register takes A back when its link has been stable for a while")
		if err := d.admitted(ctx, d.sites[:1]); err != nil {
			return err
		}
	}
	d.screen.say("the gateway takes A's clients home, when A has been well for a while")
	if err := d.until(ctx, failoverMax, "A's clients write at A again", func() bool { return d.load.allAt(0) }); err != nil {
		return err
	}
	return d.lasts(ctx, 1-bothShare-downShare, d.sites[:])
}

// finish stops the clients, lets the sites settle, and compares them.
func (d *demo) finish(ctx context.Context, _ *errgroup.Group) error {
	d.begin("quiesce", "the clients stop; the sites apply what is under way")
	l := d.load
	if err := d.stopLoad(); err != nil {
		return err
	}
	if err := d.countClients(ctx, l); err != nil {
		return err
	}
	var conns [2]*pgconn.PgConn
	for i, s := range d.sites {
		c, err := s.connect(ctx)
		if err != nil {
			return err
		}
		defer pg.Close(c)
		conns[i] = c
	}
	settled, err := d.settle(ctx, conns)
	if err != nil {
		return err
	}
	d.begin("verify", "verify: duri verify, sorted COPY of every table, every single payment")
	return d.verify(ctx, conns, settled)
}

// countClients takes into the report what the clients, and the gateways, have counted.
func (d *demo) countClients(ctx context.Context, l *load) error {
	r, t := &d.rep, &l.tally
	r.ClientErrors, r.Retries, r.InDoubtUnknown = int(t.errors.Load()), int(t.retries.Load()), int(t.unknown.Load())
	r.Problems = append(r.Problems, t.failures()...)
	stalls := l.stalls(r.KillAt, r.BackAt)
	r.StallMSP50, r.StallMSP99, r.StallMSMax = percentile(stalls, 0.5).Milliseconds(), percentile(stalls, 0.99).Milliseconds(), percentile(stalls, 1).Milliseconds()
	for _, g := range d.gateways {
		n, err := g.counted(ctx)
		if err != nil {
			return err
		}
		r.Rehomed += n.moves
		r.GatewayInDoubt += n.committed + n.aborted + n.unknown
		r.InDoubtResolved += n.committed + n.aborted
	}
	return nil
}

// stallsUntil is when the time ends in which a client's wait counts as a stall: when what was killed is back.
func (d *demo) stallsUntil(now time.Time) time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.backAt.IsZero() {
		return now
	}
	return d.backAt
}

// noticed says what A's death was to the clients so far.
func (d *demo) noticed() string {
	t := &d.load.tally
	stall := percentile(d.load.stalls(d.rep.KillAt, time.Now()), 1)
	return fmt.Sprintf("client errors %d, transactions made again %d, longest wait %s", t.errors.Load(), t.retries.Load(), term.Duration(stall))
}

// settle waits until both sites say that they have applied everything and hold the same number of rows. It reports false
// when they do not come to that: the comparison then shows what is missing.
func (d *demo) settle(ctx context.Context, conns [2]*pgconn.PgConn) (bool, error) {
	stopped := time.Now()
	var fault error
	err := d.until(ctx, settleMax, "settled", func() bool {
		for _, s := range d.sites {
			if v := s.watcher.view(); !v.fresh() || v.asked.Before(stopped) || !v.caughtUp() {
				return false
			}
		}
		var counts [2]string
		for i, c := range conns {
			rows, err := pg.Rows(ctx, c, "SELECT (SELECT count(*) FROM finance.payment), (SELECT count(*) FROM finance.audit)")
			if err != nil {
				fault = fmt.Errorf("count rows at %s: %w", d.sites[i].label(), err)
				return true
			}
			counts[i] = fmt.Sprint(rows)
		}
		return counts[0] == counts[1]
	})
	switch {
	case fault != nil:
		return false, fault
	case ctx.Err() != nil:
		return false, ctx.Err()
	}
	return err == nil, nil
}

// verify makes the comparisons and the verdict.
func (d *demo) verify(ctx context.Context, conns [2]*pgconn.PgConn, settled bool) error {
	rep, err := d.sites[1].control.Verify(ctx, database, server.VerifyRequest{Parallel: 2}, nil)
	if err != nil {
		return fmt.Errorf("duri verify: %w", err)
	}
	d.rep.VerifyEqual = rep.Equal
	if d.rep.Tables, err = compareTables(ctx, conns); err != nil {
		return err
	}
	records, err := readRecords(d.records)
	if err != nil {
		return err
	}
	var held [2]facts
	for i, c := range conns {
		if held[i], err = readFacts(ctx, c); err != nil {
			return err
		}
	}
	d.rep.take(judge(records, siteNames, held))
	if d.rep.BudgetDrift, err = budgetDrift(ctx, conns[0]); err != nil {
		return err
	}
	if err := d.conflicts(ctx, conns); err != nil {
		return err
	}
	d.rep.NotYetAtB, d.rep.NotYetAtBMS = d.tail.result()
	d.rep.conclude(settled)
	return nil
}

// conflictsShown is how many conflicts of each site are listed.
const conflictsShown = 3

func (d *demo) conflicts(ctx context.Context, conns [2]*pgconn.PgConn) error {
	d.rep.ConflictKinds = map[string]int{}
	for i, s := range d.sites {
		kinds, err := conflictKinds(ctx, conns[i])
		if err != nil {
			return err
		}
		n := 0
		for kind, c := range kinds {
			n += c
			d.rep.ConflictKinds[kind] += c
		}
		d.rep.Conflicts += n
		*[2]*int{&d.rep.ConflictsA, &d.rep.ConflictsB}[i] = n
		var list []catalog.Conflict
		if list, err = s.control.Conflicts(ctx, url.Values{"limit": {strconv.Itoa(conflictsShown)}, "database": {database}}); err != nil {
			return fmt.Errorf("duri conflict list at %s: %w", s.label(), err)
		}
		for _, c := range list {
			d.rep.FirstConflicts = append(d.rep.FirstConflicts, conflictLine(s, d.sites[1-i], c))
		}
	}
	return nil
}

// sayLogs shows the end of the agents' and gateways' logs, which are about to be removed.
func (d *demo) sayLogs() {
	const lines = 10
	say := func(who, file string) {
		d.screen.say("%s said at last:", who)
		for _, l := range lastLines(file, lines) {
			d.screen.say("  %s", term.Clean(l))
		}
	}
	for _, s := range d.sites {
		if s != nil && s.agent != nil {
			say("the agent of "+s.label(), s.spec.log)
		}
	}
	for _, g := range d.gateways {
		if g != nil && g.process != nil {
			say("gateway "+g.name, g.spec.log)
		}
	}
}

// keep leaves everything running and says how to reach it.
func (d *demo) keep() error {
	d.state.Kept = true
	if err := d.state.save(d.dir); err != nil {
		return err
	}
	k := &Kept{Dir: d.dir, Stop: shellCommand(d.o.Program, "demo", "--stop", d.dir)}
	psql := filepath.Join(d.binDir, "psql")
	for _, s := range d.sites {
		k.Connect = append(k.Connect, shellCommand(psql, fmt.Sprintf("host=%s port=%d dbname=%s user=%s",
			s.cluster.SocketDir(), s.cluster.Port(), database, s.cluster.Superuser())))
		k.Status = append(k.Status, shellCommand(d.o.Program, "status", "-c", s.spec.config))
	}
	for _, g := range d.gateways {
		k.Gateways = append(k.Gateways, shellCommand(psql, g.dsn(appRole)+" dbname="+database), shellCommand(psql, g.dsn(opsRole)+" dbname=duri"))
	}
	d.rep.Kept = k
	return nil
}

// remove ends every process and removes every file.
func (d *demo) remove() error {
	var errs []error
	for _, g := range d.gateways {
		if g != nil {
			errs = append(errs, g.process.kill())
		}
	}
	for _, s := range d.sites {
		if s == nil {
			continue
		}
		errs = append(errs, s.agent.kill())
		if s.cluster != nil {
			errs = append(errs, s.cluster.Destroy())
		}
	}
	errs = append(errs, d.witness.kill(), os.RemoveAll(d.dir))
	if err := errors.Join(errs...); err != nil {
		return &Error{Msg: "remove the demo", Err: err, Hint: "end what is left with: duri demo --stop " + d.dir}
	}
	return nil
}
