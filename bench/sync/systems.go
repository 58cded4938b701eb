package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/duri-io/duri/internal/faultnet"
	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pgcluster"
)

// system is one way to have a second copy, with the clients in one place. It is closed also when its start failed.
type system struct {
	name    string
	writers []*pgcluster.Cluster // where the clients are
	sites   []*pgcluster.Cluster // what must become equal
	relays  []*faultnet.Relay
	closers []func() error
}

// The names of the systems.
const (
	local    = "local"
	native   = "native logical"
	physical = "physical"
	oneWay   = "duri, one way"
	bothWays = "duri, both ways"
)

// names are all of them, in the order of the tables.
var names = []string{local, native, physical, oneWay, bothWays}

const (
	database = "bench"
	// table has keys by site and sequence, so that clients never meet in a row, whatever the site.
	table = "CREATE TABLE payment (site int, id bigserial, account int NOT NULL, amount numeric(12,2) NOT NULL, note text, at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (site, id))"
	load  = `\set account random(1, 100000)
\set amount random(1, 10000)
INSERT INTO payment (site, account, amount, note) VALUES (:site, :account, :amount, 'invoice');
`
)

// delay makes every byte between the sites take d longer in each direction.
func (s *system) delay(d time.Duration) {
	for _, r := range s.relays {
		r.Delay(d)
	}
}

// close ends everything, the last one first.
func (s *system) close() error {
	var errs []error
	for _, end := range slices.Backward(s.closers) {
		errs = append(errs, end())
	}
	s.closers = nil
	return errors.Join(errs...)
}

// start starts all systems.
func (b *bench) start(ctx context.Context) error {
	b.script = filepath.Join(b.dir, "load.sql")
	if err := os.WriteFile(b.script, []byte(load), 0o600); err != nil {
		return err
	}
	for _, one := range []struct {
		name  string
		start func(context.Context, *system) error
	}{{local, b.startLocal}, {native, b.startNative}, {physical, b.startPhysical}, {oneWay, b.startDuri}} {
		s := &system{name: one.name}
		b.systems = append(b.systems, s)
		if err := one.start(ctx, s); err != nil {
			return fmt.Errorf("start %s: %w", one.name, err)
		}
		s.writers = s.sites[:1]
	}
	one := b.systems[len(b.systems)-1] // it closes what both use
	b.systems = append(b.systems, &system{name: bothWays, writers: one.sites, sites: one.sites, relays: one.relays})
	return nil
}

// fill makes the database and its table.
func fill(ctx context.Context, c *pgcluster.Cluster) error {
	if err := c.Exec(ctx, "postgres", "CREATE DATABASE "+database); err != nil {
		return err
	}
	return c.Exec(ctx, database, table)
}

func (b *bench) startLocal(ctx context.Context, s *system) error {
	c, err := b.server(ctx, s, "")
	if err != nil {
		return err
	}
	return fill(ctx, c)
}

// through starts a relay to a server and gives the connection string of a replica that names itself.
func (s *system) through(c *pgcluster.Cluster, name string) (string, error) {
	r, err := faultnet.New(fmt.Sprintf("127.0.0.1:%d", c.Port()))
	if err != nil {
		return "", err
	}
	s.relays = append(s.relays, r)
	s.closers = append(s.closers, r.Close)
	_, port, _ := strings.Cut(r.Addr(), ":")
	return fmt.Sprintf("host=127.0.0.1 port=%s user=%s application_name=%s", port, c.Superuser(), name), nil
}

// startNative makes a subscription the synchronous standby. With synchronous_commit = local its worker flushes each
// transaction before it confirms it; by default (off) a commit would wait for the subscriber's WAL writer.
func (b *bench) startNative(ctx context.Context, s *system) error {
	const name = "bench_native"
	for range 2 {
		c, err := b.server(ctx, s, "")
		if err == nil {
			err = fill(ctx, c)
		}
		if err != nil {
			return err
		}
	}
	src, dst := s.sites[0], s.sites[1]
	conn, err := s.through(src, name)
	if err != nil {
		return err
	}
	if err := src.Exec(ctx, database, "CREATE PUBLICATION bench FOR TABLE payment"); err != nil {
		return err
	}
	sql := fmt.Sprintf("CREATE SUBSCRIPTION %s CONNECTION '%s dbname=%s' PUBLICATION bench WITH (synchronous_commit = local, copy_data = false)", name, conn, database)
	if err := dst.Exec(ctx, database, sql); err != nil {
		return err
	}
	return waitFor(ctx, src, name)
}

// startPhysical makes a standby by pg_basebackup the synchronous one.
func (b *bench) startPhysical(ctx context.Context, s *system) error {
	const name = "bench_physical"
	primary, err := b.server(ctx, s, "")
	if err == nil {
		err = fill(ctx, primary)
	}
	if err != nil {
		return err
	}
	conn, err := s.through(primary, name)
	if err != nil {
		return err
	}
	if _, err := b.server(ctx, s, conn); err != nil {
		return err
	}
	return waitFor(ctx, primary, name)
}

// startDuri makes each site's own agent the synchronous standby of its server.
func (b *bench) startDuri(ctx context.Context, s *system) error {
	binary, err := pair.Build(ctx, b.dir)
	if err != nil {
		return err
	}
	p, err := pair.Start(ctx, pair.Options{
		Binary: binary, BinDir: b.binDir, Database: database, Settings: settings(), Relays: true,
		Sync: true,
		Seed: func(ctx context.Context, a *pair.Site) error { return a.Cluster.Exec(ctx, database, table) },
	})
	if err != nil {
		return err
	}
	s.closers = append(s.closers, p.Close)
	wait, cancel := context.WithTimeout(ctx, waitMax)
	defer cancel()
	if err := p.WaitReady(wait); err != nil {
		return err
	}
	for _, site := range p.Sites {
		s.sites = append(s.sites, site.Cluster)
		for _, r := range site.Relay {
			s.relays = append(s.relays, r)
		}
	}
	return p.HoldCommits(wait)
}

// waitFor makes commits wait for a standby and returns when PostgreSQL counts on it.
func waitFor(ctx context.Context, c *pgcluster.Cluster, standbys string) error {
	if err := c.Exec(ctx, "postgres", "ALTER SYSTEM SET synchronous_standby_names = '"+standbys+"'"); err != nil {
		return err
	}
	if err := c.Exec(ctx, "postgres", "SELECT pg_reload_conf()"); err != nil {
		return err
	}
	return poll(ctx, "the synchronous standby streams", func(ctx context.Context) (bool, error) {
		rows, err := c.QueryText(ctx, "postgres", "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync' AND state = 'streaming'")
		return err == nil && rows[0][0] == "1", err
	})
}
