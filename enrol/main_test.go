package enrol

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"

	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pgtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const origin = "duri_shop_seoul"

// pair is a source and a target database, each in a cluster of its own, both prepared with the grants.
type pair struct {
	t    *testing.T
	a, b *pgcluster.Cluster
}

// newPair makes a source that holds what sql makes, and an empty target.
func newPair(t *testing.T, sql string) *pair {
	t.Helper()
	p := &pair{t, pgtest.New(t), pgtest.New(t)}
	for _, c := range []*pgcluster.Cluster{p.a, p.b} {
		pgtest.DB(t, c, "shop")
	}
	if sql != "" {
		pgtest.Exec(t, p.a, "shop", sql)
	}
	for _, c := range []*pgcluster.Cluster{p.a, p.b} {
		pgtest.Exec(t, c, "shop", grants.SQL(grants.Spec{Database: "shop"}))
	}
	return p
}

// source is Send's configuration: always as the run-time role.
func (p *pair) source() SourceConfig {
	return SourceConfig{DSN: p.a.DSN("shop", "duri"), Database: "shop"}
}

// setup is Receive's configuration with a superuser.
func (p *pair) setup() TargetConfig {
	return TargetConfig{DSN: p.b.DSN("shop", "duri"), SetupDSN: p.b.DSN("shop", ""), Database: "shop", Origin: origin}
}

// runtime is Receive's configuration with the run-time role only.
func (p *pair) runtime() TargetConfig {
	c := p.setup()
	c.SetupDSN = ""
	return c
}

// stream is what Send writes.
func (p *pair) stream(cfg SourceConfig) []byte {
	p.t.Helper()
	var b bytes.Buffer
	if err := Send(p.t.Context(), cfg, &b); err != nil {
		p.t.Fatal(explain(err))
	}
	return b.Bytes()
}

// explain adds the hint to an error.
func explain(err error) string {
	if h, ok := err.(interface{ HintText() string }); ok {
		return fmt.Sprintf("%v (hint: %s)", err, h.HintText())
	}
	return err.Error()
}

func (p *pair) receive(cfg TargetConfig, stream []byte) Result {
	p.t.Helper()
	r, err := Receive(p.t.Context(), cfg, bytes.NewReader(stream), nil)
	if err != nil {
		p.t.Fatal(explain(err))
	}
	return r
}

func connect(t *testing.T, dsn string) *pgconn.PgConn {
	t.Helper()
	c, err := pg.Connect(t.Context(), dsn, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

// rows reads a query of the database shop with the wire settings; NULL is "<null>".
func rows(t *testing.T, c *pgcluster.Cluster, sql string) [][]string {
	t.Helper()
	conn := connect(t, c.DSN("shop", ""))
	res, err := conn.Exec(t.Context(), sql).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	var out [][]string
	for _, r := range res[len(res)-1].Rows {
		var row []string
		for _, v := range r {
			if v == nil {
				row = append(row, "<null>")
				continue
			}
			row = append(row, string(v))
		}
		out = append(out, row)
	}
	return out
}
