package twoway

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pgcluster"
)

// native is PostgreSQL's own logical replication, one subscription each way.
type native struct {
	*peer
	major int
}

// originMajor is the first major whose subscriptions leave out what another subscription brought.
const originMajor = 16

// startNative runs the newest PostgreSQL that can be had. Before 16 a subscription sends back what the other one brought:
// what two-way replication then does is what the table shows.
func startNative(ctx context.Context, o Options, w load) (_ System, err error) {
	binDir, major, err := pair.NewestPostgres(ctx)
	if err != nil {
		return nil, err
	}
	p, err := newPeer(ctx, w, binDir, settings(o))
	n := &native{peer: p, major: major}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	if err != nil {
		return nil, err
	}
	tables := strings.Join(slices.Concat(tableNames(w, true), tableNames(w, false)), ", ")
	if err := p.eachSite(ctx, func(int) []string { return []string{"CREATE PUBLICATION twoway FOR TABLE " + tables} }); err != nil {
		return nil, err
	}
	options := "copy_data = false"
	if major >= originMajor {
		options += ", origin = none"
	}
	err = p.eachSite(ctx, func(i int) []string {
		return []string{fmt.Sprintf("CREATE SUBSCRIPTION twoway_%s CONNECTION '%s' PUBLICATION twoway WITH (%s)", p.sites[i].Name, p.through(1-i), options)}
	})
	if err != nil {
		return nil, err
	}
	return n, nil
}

func (n *native) Name() string {
	if n.major < originMajor {
		return fmt.Sprintf("native %d (no origin filter)", n.major)
	}
	return fmt.Sprintf("native %d (origin = none)", n.major)
}

// Errors counts how often an apply worker ended with an error.
func (n *native) Errors(ctx context.Context) (int64, error) {
	return n.sum(ctx, "SELECT sum(apply_error_count) FROM pg_stat_subscription_stats")
}

// Stuck: a worker that fails starts again and meets the same change.
func (n *native) Stuck(failed int64) string {
	if failed < 5 {
		return ""
	}
	return fmt.Sprintf("the apply worker fails at the same change again and again (%d times in %s)", failed, stuckAfter)
}

// Conflicts come with PostgreSQL 18.
func (n *native) Conflicts(ctx context.Context) (int64, error) {
	if n.major < 18 {
		return -1, nil
	}
	return n.sum(ctx, "SELECT sum(value::bigint) FROM pg_stat_subscription_stats s, jsonb_each_text(to_jsonb(s)) WHERE key LIKE 'confl\\_%'")
}

// sum adds up a number of both sites.
func (n *native) sum(ctx context.Context, sql string) (int64, error) {
	var total int64
	for _, s := range n.sites {
		rows, err := s.Cluster.QueryText(ctx, s.Database, sql)
		if err != nil {
			return 0, err
		}
		if rows[0][0] == pgcluster.NullText {
			continue
		}
		v, err := strconv.ParseInt(rows[0][0], 10, 64)
		if err != nil {
			return 0, err
		}
		total += v
	}
	return total, nil
}
