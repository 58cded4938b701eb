package twoway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"time"

	"github.com/duri-io/duri/internal/pgcluster"
)

// pglogical is the extension of that name, one subscription each way, the last update wins.
type pglogical struct{ *peer }

func startPglogical(ctx context.Context, o Options, w load) (_ System, err error) {
	extra, err := probePglogical(ctx)
	if err != nil {
		return nil, err
	}
	all := settings(o)
	maps.Copy(all, extra)
	p, err := newPeer(ctx, w, "", all)
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	if err != nil {
		return nil, err
	}
	if err = p.eachSite(ctx, func(i int) []string { return nodeSQL(p, w, i) }); err != nil {
		return nil, err
	}
	err = p.eachSite(ctx, func(i int) []string {
		return []string{fmt.Sprintf(`SELECT pglogical.create_subscription(subscription_name := 'from_%s', provider_dsn := '%s',
			synchronize_structure := false, synchronize_data := false, forward_origins := '{}')`, p.sites[1-i].Name, p.through(1-i))}
	})
	if err != nil {
		return nil, err
	}
	if err = awaitSubscriptions(ctx, p); err != nil {
		return nil, err
	}
	return &pglogical{p}, nil
}

// probePglogical asks a server of the installed PostgreSQL whether it has the extension, and gives the settings that the
// extension needs there. Since the minor releases of August 2026 a server names the output plugins that it allows.
func probePglogical(ctx context.Context) (_ map[string]string, err error) {
	c, err := pgcluster.Create(ctx, pgcluster.Options{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Destroy()) }()
	if err := c.Start(ctx); err != nil {
		return nil, err
	}
	rows, err := c.QueryText(ctx, "postgres", `SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'pglogical'),
		EXISTS (SELECT FROM pg_settings WHERE name = 'output_plugin_libraries')`)
	if err != nil {
		return nil, err
	}
	if rows[0][0] != "t" {
		return nil, fmt.Errorf("pglogical: %w", ErrNotInstalled)
	}
	s := map[string]string{"shared_preload_libraries": "pglogical", "pglogical.conflict_resolution": "last_update_wins", "max_worker_processes": "20"}
	if rows[0][1] == "t" {
		s["output_plugin_libraries"] = "pgoutput, pglogical_output"
	}
	return s, nil
}

// nodeSQL makes a site a node that publishes the load's tables.
func nodeSQL(p *peer, w load, i int) []string {
	c := p.sites[i].Cluster
	all := []string{
		"CREATE EXTENSION pglogical",
		fmt.Sprintf("SELECT pglogical.create_node(node_name := '%s', dsn := 'host=127.0.0.1 port=%d dbname=%s user=%s')",
			p.sites[i].Name, c.Port(), database, c.Superuser()),
	}
	for keyed, set := range map[bool]string{true: "default", false: "default_insert_only"} {
		for _, t := range tableNames(w, keyed) {
			all = append(all, fmt.Sprintf("SELECT pglogical.replication_set_add_table('%s', '%s')", set, t))
		}
	}
	return all
}

// awaitSubscriptions waits until both directions replicate.
func awaitSubscriptions(ctx context.Context, p *peer) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, s := range p.sites {
		for {
			rows, err := s.Cluster.QueryText(ctx, s.Database, "SELECT status FROM pglogical.show_subscription_status()")
			if err != nil {
				return err
			}
			if len(rows) == 1 && rows[0][0] == "replicating" {
				break
			}
			if !pause(ctx, 50*time.Millisecond) {
				return fmt.Errorf("wait for pglogical at site %s: %w, status %v", s.Name, ctx.Err(), rows)
			}
		}
	}
	return nil
}

func (*pglogical) Name() string { return Pglogical }

var (
	// A background worker's line has no user and database between its process number and the message.
	logsError    = regexp.MustCompile(`\[\d+\] ERROR: `)
	logsConflict = regexp.MustCompile(`CONFLICT: `)
)

func (p *pglogical) Errors(context.Context) (int64, error)    { return p.logged(logsError) }
func (p *pglogical) Conflicts(context.Context) (int64, error) { return p.logged(logsConflict) }
