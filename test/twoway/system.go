package twoway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"

	"github.com/duri-io/duri/internal/faultnet"
	"github.com/duri-io/duri/internal/pgcluster"
)

// ErrNotInstalled says that a system's software is not on this machine.
var ErrNotInstalled = errors.New("not installed")

// Systems lists what can be compared.
func Systems() []string { return []string{Duri, Native, Pglogical} }

// The systems.
const (
	Duri      = "duri"
	Native    = "native"
	Pglogical = "pglogical"
)

// System replicates one database of two sites both ways.
type System interface {
	// Name is for the table: with the version where that matters.
	Name() string
	Sites() []Site
	// Relays are what lies between the sites: all that one says to the other passes one of them.
	Relays() []*faultnet.Relay
	// Errors is how many failures of replication there were so far.
	Errors(ctx context.Context) (int64, error)
	// Stuck says why replication will not go on by itself, given how many errors there were while it did not go on for
	// ten seconds; empty while there is hope.
	Stuck(errors int64) string
	// Conflicts is how many conflicts the system has reported at both sites, -1 when it does not.
	Conflicts(ctx context.Context) (int64, error)
	// Verify is the verdict of the system's own comparison, "" when it has none.
	Verify(ctx context.Context) (string, error)
	// Explain writes what the system knows of keys that differ.
	Explain(ctx context.Context, examples []string, out io.Writer) error
	// Close ends and removes everything.
	Close() error
}

// Site is one side of a System.
type Site struct {
	Name     string
	Cluster  *pgcluster.Cluster
	Database string
}

// database is what everybody replicates.
const database = "app"

// start makes a system whose database has the load's tables at both sites.
func start(ctx context.Context, o Options, system string, w load) (System, error) {
	switch system {
	case Duri:
		return startDuri(ctx, o, w)
	case Native:
		return startNative(ctx, o, w)
	case Pglogical:
		return startPglogical(ctx, o, w)
	}
	return nil, fmt.Errorf("there is no system %q; there are %s", system, strings.Join(Systems(), ", "))
}

// settings are those of all servers of a run.
func settings(o Options) map[string]string {
	fsync := "off"
	if o.Fsync {
		fsync = "on"
	}
	return map[string]string{"fsync": fsync, "shared_buffers": "256MB", "max_wal_size": "4GB", "wal_retrieve_retry_interval": "100ms"}
}

// peer is what PostgreSQL's own replication and pglogical have in common: two servers and a relay before each.
type peer struct {
	sites  []Site
	relays []*faultnet.Relay // [i] is what the other site reaches sites[i] through
}

// newPeer makes both servers with the load's tables. The caller closes it, also after an error.
func newPeer(ctx context.Context, w load, binDir string, settings map[string]string) (*peer, error) {
	p := &peer{}
	for _, name := range []string{"a", "b"} {
		c, err := pgcluster.Create(ctx, pgcluster.Options{BinDir: binDir, Settings: settings})
		if err != nil {
			return p, err
		}
		p.sites = append(p.sites, Site{Name: name, Cluster: c, Database: database})
		if err := c.Start(ctx); err != nil {
			return p, err
		}
		if err := c.Exec(ctx, "postgres", "CREATE DATABASE "+database); err != nil {
			return p, err
		}
		if err := w.create(ctx, c, database); err != nil {
			return p, err
		}
		r, err := faultnet.New(fmt.Sprintf("127.0.0.1:%d", c.Port()))
		if err != nil {
			return p, err
		}
		p.relays = append(p.relays, r)
	}
	return p, nil
}

func (p *peer) Sites() []Site                          { return p.sites }
func (p *peer) Relays() []*faultnet.Relay              { return p.relays }
func (p *peer) Stuck(int64) string                     { return "" }
func (p *peer) Verify(context.Context) (string, error) { return "", nil }

func (p *peer) Explain(_ context.Context, examples []string, out io.Writer) error {
	_, err := fmt.Fprintf(out, "  for example %s\n", strings.Join(examples, "\n              "))
	return err
}

func (p *peer) Close() error {
	var errs []error
	for _, r := range p.relays {
		errs = append(errs, r.Close())
	}
	for _, s := range p.sites {
		errs = append(errs, s.Cluster.Destroy())
	}
	return errors.Join(errs...)
}

// through is the connection string by which the other site reaches site i.
func (p *peer) through(i int) string {
	_, port, _ := strings.Cut(p.relays[i].Addr(), ":")
	return fmt.Sprintf("host=127.0.0.1 port=%s dbname=%s user=%s", port, database, p.sites[i].Cluster.Superuser())
}

// eachSite runs SQL at both sites, each statement in a transaction of its own.
func (p *peer) eachSite(ctx context.Context, statements func(i int) []string) error {
	for i, s := range p.sites {
		for _, sql := range statements(i) {
			if err := s.Cluster.Exec(ctx, s.Database, sql); err != nil {
				return fmt.Errorf("site %s: %w", s.Name, err)
			}
		}
	}
	return nil
}

// logged counts the matches of a pattern in both servers' logs.
func (p *peer) logged(pattern *regexp.Regexp) (int64, error) {
	n := 0
	for _, s := range p.sites {
		b, err := os.ReadFile(s.Cluster.LogPath())
		if err != nil {
			return 0, err
		}
		for line := range bytes.Lines(b) {
			if pattern.Match(line) {
				n++
			}
		}
	}
	return int64(n), nil
}

// tableNames are the names of the tables to replicate, by whether they have a key; the marks are among them.
func tableNames(w load, keyed bool) []string {
	var names []string
	for _, t := range append(w.tables(), table{"mark", true}) {
		if t.keyed == keyed {
			names = append(names, t.name)
		}
	}
	return names
}
