package twoway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/duri-io/duri/internal/faultnet"
	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/server"
)

// duri is ours.
type duri struct {
	o Options
	p *pair.Pair
}

// readyMax bounds the joining of both sites on a busy machine.
const readyMax = 2 * time.Minute

func startDuri(ctx context.Context, o Options, w load) (_ System, err error) {
	var config func(site, text string) string
	if _, ok := w.(tpcb); ok && o.Delta {
		config = func(_, text string) string { return deltas(text) }
	}
	p, err := pair.Start(ctx, pair.Options{
		Config: config,
		Binary: o.Binary, Database: database, Settings: settings(o), Relays: true, Clusters: o.Clusters,
		Seed: func(ctx context.Context, a *pair.Site) error { return w.create(ctx, a.Cluster, a.Database) },
	})
	if err != nil {
		return nil, err
	}
	wait, cancel := context.WithTimeout(ctx, readyMax)
	defer cancel()
	if err := p.WaitReady(wait); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return &duri{o, p}, nil
}

func (*duri) Name() string { return Duri }

func (d *duri) Sites() []Site {
	var all []Site
	for _, s := range d.p.Sites {
		all = append(all, Site{Name: s.Name, Cluster: s.Cluster, Database: s.Database})
	}
	return all
}

func (d *duri) Relays() []*faultnet.Relay {
	return []*faultnet.Relay{d.p.Link("a", "b"), d.p.Link("b", "a")}
}

// Errors counts the batches that were tried again.
func (d *duri) Errors(ctx context.Context) (int64, error) {
	var n int64
	for _, s := range d.p.Sites {
		st, err := s.Status(ctx)
		if err != nil {
			return 0, err
		}
		for _, l := range st.Links {
			n += l.Apply.Retries
		}
	}
	return n, nil
}

func (*duri) Stuck(int64) string { return "" }

func (d *duri) Conflicts(ctx context.Context) (int64, error) {
	var total int64
	for _, s := range d.p.Sites {
		rows, err := s.Cluster.QueryText(ctx, s.Database, "SELECT count(*) FROM duri.conflict WHERE kind <> ''")
		if err != nil {
			return 0, err
		}
		n, err := strconv.ParseInt(rows[0][0], 10, 64)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}

func (d *duri) Verify(ctx context.Context) (string, error) {
	rep, err := d.p.Sites[0].Control.Verify(ctx, "", server.VerifyRequest{}, nil)
	switch {
	case err != nil:
		return "", fmt.Errorf("verify: %w", err)
	case rep.Equal:
		return "equal", nil
	}
	return fmt.Sprintf("%d rows differ", rep.Differences()), nil
}

// Explain writes the conflict records of keys that differ, and keeps both agents' journals where the options say.
func (d *duri) Explain(ctx context.Context, examples []string, out io.Writer) error {
	for _, e := range examples {
		fmt.Fprintf(out, "  differs: %s\n", e)
		key, _, _ := strings.Cut(e, ": ")
		for _, s := range d.p.Sites {
			rows, err := s.Cluster.QueryText(ctx, s.Database, "SELECT row_to_json(c) FROM duri.conflict c WHERE EXISTS (SELECT FROM jsonb_each_text(key) WHERE value = "+
				pg.QuoteLiteral(key)+") ORDER BY id DESC LIMIT 5")
			if err != nil {
				return err
			}
			for _, r := range rows {
				fmt.Fprintf(out, "    recorded at %s: %s\n", s.Name, r[0])
			}
		}
	}
	if d.o.Evidence == "" {
		return nil
	}
	for _, s := range d.p.Sites {
		dir := filepath.Join(d.o.Evidence, s.Name)
		if err := os.CopyFS(dir, os.DirFS(filepath.Join(s.DataDir, "journal"))); err != nil {
			return fmt.Errorf("keep the journals of site %s: %w", s.Name, err)
		}
		fmt.Fprintf(out, "  journals of site %s: %s\n", s.Name, dir)
	}
	return nil
}

func (d *duri) Close() error { return d.p.Close() }
