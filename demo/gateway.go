package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/pg"
)

// gatewayProc is a gateway beside the application of one site: a process of its own, outside the sites, at which that
// application's clients connect.
type gatewayProc struct {
	name     string
	home     string // site
	address  string
	password string // of the clients' and the operator's role
	spec     agentSpec
	process  *process
	watcher  *gatewayWatcher
}

// holdAsync bounds how long a client waits in doubt where there is no register: nobody but the site itself can tell what became of
// its last COMMITs, and it is dead.
const holdAsync = "3s"

// makeGateways makes what `duri gateway new` makes.
func (d *demo) makeGateways(spec config.InitSpec) error {
	file, err := os.ReadFile(d.sites[0].spec.config)
	if err != nil {
		return err
	}
	c, err := config.Parse(d.sites[0].spec.config, file)
	if err != nil {
		return err
	}
	c.Sites = slices.Clone(c.Sites)
	for i := range c.Sites {
		c.Sites[i].Address = spec.Sites[i].Address
	}
	for i, s := range d.sites {
		g := &gatewayProc{name: "gw-" + s.name, home: s.name, address: loopback(d.ports.gateway[i]), password: s.password}
		out := filepath.Join(spec.Out, g.name)
		err := config.AddGateway(c, config.GatewaySpec{Name: g.name, Home: s.name, Listen: g.address, CA: filepath.Join(spec.Out, "ca"), Out: out})
		if err != nil {
			return fmt.Errorf("make gateway %s: %w", g.name, err)
		}
		more := "  admins: [" + opsRole + "]\n"
		if !d.o.RPO0 {
			more += "  hold: " + holdAsync + "\n"
		}
		g.spec = agentSpec{
			program: d.o.Program, command: "gateway", config: filepath.Join(out, config.FileName), log: filepath.Join(d.dir, g.name+".log"),
			binDir: d.binDir, detach: d.o.Keep,
		}
		if err := inGatewaySection(g.spec.config, more); err != nil {
			return err
		}
		g.watcher = &gatewayWatcher{g: g}
		d.gateways[i] = g
	}
	return nil
}

// inGatewaySection adds lines to the section gateway of a configuration, which it makes if there is none.
func inGatewaySection(file, lines string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	const section = "\ngateway:\n"
	text := string(b)
	if !strings.Contains(text, section) {
		text += section
	}
	return os.WriteFile(file, []byte(strings.Replace(text, section, section+lines, 1)), 0o600)
}

// startGateways starts them and waits until they let clients in.
func (d *demo) startGateways(ctx context.Context, g *errgroup.Group) error {
	for _, gw := range d.gateways {
		p, err := startAgent(gw.spec)
		if err != nil {
			return fmt.Errorf("gateway %s: %w", gw.name, err)
		}
		gw.process = p
		if err := d.note(p); err != nil {
			return err
		}
		err = d.until(ctx, joinMax, "gateway "+gw.name+" lets clients in", func() bool {
			if !gw.process.alive() {
				return true
			}
			c, err := pg.Connect(ctx, gw.dsn(appRole), database, nil)
			if err != nil {
				return false
			}
			defer pg.Close(c)
			_, err = pg.Rows(ctx, c, "SELECT 1")
			return err == nil
		})
		if err == nil {
			err = gw.fault()
		}
		if err != nil {
			return err
		}
		g.Go(func() error { return gw.watcher.run(ctx) })
	}
	d.screen.say("two gateways beside the sites, %s and %s: clients connect there, once", d.gateways[0].name, d.gateways[1].name)
	return nil
}

// fault says that the gateway has ended.
func (g *gatewayProc) fault() error {
	if g.process.alive() {
		return nil
	}
	return fmt.Errorf("gateway %s ended (%w): %s", g.name, g.process.err, lastLine(g.spec.log))
}

// dsn is how a role connects.
func (g *gatewayProc) dsn(role string) string {
	host, port, _ := strings.Cut(g.address, ":")
	return fmt.Sprintf("host=%s port=%s user=%s password=%s sslmode=disable", host, port, role, g.password)
}

// gatewayWatcher keeps what one gateway last said of itself, in the language of its own database. view may be called at any time.
type gatewayWatcher struct {
	g    *gatewayProc
	conn *pgconn.PgConn // of run

	mu   sync.Mutex // guards last
	last gatewayView
}

// gatewayView is what a gateway said.
type gatewayView struct {
	asked    time.Time
	sessions map[string]int // of the ledger's clients, by the site of the latest transaction
	waiting  int            // of them: for a connection
	counters counters
}

// counters are what a gateway has counted since it began.
type counters struct{ moves, committed, aborted, unknown int }

func (v gatewayView) fresh() bool { return !v.asked.IsZero() && time.Since(v.asked) < 10*watchEvery }

// run asks until ctx ends.
func (w *gatewayWatcher) run(ctx context.Context) error {
	defer func() { pg.Close(w.conn) }()
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	for {
		if v, err := w.ask(ctx); err == nil {
			w.mu.Lock()
			w.last = v
			w.mu.Unlock()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (w *gatewayWatcher) view() gatewayView {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

// ask asks once, over one connection as long as it lasts.
func (w *gatewayWatcher) ask(ctx context.Context) (v gatewayView, err error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	v.asked = time.Now()
	if w.conn == nil || w.conn.IsClosed() {
		if w.conn, err = pg.Connect(ctx, w.g.dsn(opsRole), "duri", nil); err != nil {
			w.conn = nil
			return v, err
		}
	}
	if v.sessions, v.waiting, err = askSessions(ctx, w.conn); err == nil {
		v.counters, err = askCounters(ctx, w.conn)
	}
	return v, err
}

// counted asks for the counters over a connection of its own.
func (g *gatewayProc) counted(ctx context.Context) (counters, error) {
	c, err := pg.Connect(ctx, g.dsn(opsRole), "duri", nil)
	if err != nil {
		return counters{}, fmt.Errorf("ask gateway %s what it has counted: %w", g.name, err)
	}
	defer pg.Close(c)
	return askCounters(ctx, c)
}

func askSessions(ctx context.Context, c *pgconn.PgConn) (at map[string]int, waiting int, err error) {
	const user, state, site = 1, 3, 4 // columns
	rows, err := pg.Rows(ctx, c, "SHOW duri.sessions")
	if err != nil {
		return nil, 0, err
	}
	at = map[string]int{}
	for _, r := range rows {
		if len(r) <= site || r[user] != appRole {
			continue
		}
		at[r[site]]++
		if r[state] == "waiting" {
			waiting++
		}
	}
	return at, waiting, nil
}

func askCounters(ctx context.Context, c *pgconn.PgConn) (n counters, err error) {
	rows, err := pg.Rows(ctx, c, "SHOW duri.counters")
	if err != nil {
		return n, err
	}
	into := map[string]*int{"moves": &n.moves, "in_doubt_committed": &n.committed, "in_doubt_aborted": &n.aborted, "in_doubt_unknown": &n.unknown}
	for _, r := range rows {
		if p := into[r[0]]; p != nil {
			if *p, err = strconv.Atoi(r[1]); err != nil {
				return n, fmt.Errorf("SHOW duri.counters: %s: %w", r[0], err)
			}
			delete(into, r[0])
		}
	}
	if len(into) > 0 {
		return n, errors.New("SHOW duri.counters lacks some")
	}
	return n, nil
}
