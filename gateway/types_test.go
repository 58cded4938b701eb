package gateway

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/duri-io/duri/internal/pgtest"
)

// heedful is a Router that remembers what it was told of types.
type heedful struct {
	Target
	mu   sync.Mutex
	seen []uint32
}

func (h *heedful) Route(_ *Login, w Wish) (Target, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seen = slices.Clone(w.Types)
	return h.Target, nil
}

func (h *heedful) types() []uint32 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.seen)
}

// noSites lets sessions keep what they need, and is never asked.
type noSites struct{}

func (noSites) Fate(context.Context, Doubt) (Fate, error) { return Unknown, nil }
func (noSites) End(context.Context, Doubt)                {}
func (noSites) CatchUp(context.Context, string, string, string) error {
	return nil
}

// TestTypesAreMet: a session's Router knows which user types it has had in results or has named, by whichever protocol.
func TestTypesAreMet(t *testing.T) {
	c := site(t, "")
	pgtest.Exec(t, c, "shop", "CREATE TYPE mood AS ENUM ('glad'); CREATE TYPE other AS ENUM ('x'); CREATE TABLE t(m mood); GRANT ALL ON t TO app")
	oid := func(name string) uint32 {
		n, err := strconv.ParseUint(pgtest.Query(t, c, "shop", "SELECT '"+name+"'::regtype::oid")[0][0], 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		return uint32(n)
	}
	mood, moods := oid("mood"), oid("mood[]")
	for _, step := range []struct {
		name string
		do   func(c *pgx.Conn) error
		want []uint32
	}{
		{"none", func(c *pgx.Conn) error {
			return c.QueryRow(t.Context(), "SELECT 1, 'x'::text").Scan(new(int), new(string))
		}, nil},
		{"simple", func(c *pgx.Conn) error {
			_, err := c.Exec(t.Context(), "SELECT 1, 'glad'::mood, 'glad'::mood", pgx.QueryExecModeSimpleProtocol)
			return err
		}, []uint32{mood}},
		{"described", func(c *pgx.Conn) error {
			_, err := c.Prepare(t.Context(), "s", "SELECT ARRAY['glad'::mood]")
			return err
		}, []uint32{moods}},
		{"parameter", func(c *pgx.Conn) error {
			_, err := c.Prepare(t.Context(), "s", "INSERT INTO t VALUES ($1)")
			return err
		}, []uint32{mood}},
		{"named", func(c *pgx.Conn) error {
			_, err := c.PgConn().ExecParams(t.Context(), "SELECT $1::text", [][]byte{[]byte("glad")}, []uint32{mood}, nil, nil).Close()
			return err
		}, []uint32{mood}},
	} {
		h := &heedful{Target: target(c, "a")}
		_, addr := serve(t, Config{Mode: TransactionMode, Router: h, Sites: noSites{}}, c)
		conn := open1(t, dsn(addr, ""))
		if err := step.do(conn); err != nil {
			t.Errorf("%s: %v", step.name, err)
		}
		exec1(t, conn, "SELECT 1") // The next transaction is routed.
		if got := h.types(); !slices.Equal(got, step.want) {
			t.Errorf("%s: %v, want %v", step.name, got, step.want)
		}
	}
}

// TestDescriptionsMayBeShort: a description that was cut anywhere is no harm.
func TestDescriptionsMayBeShort(t *testing.T) {
	tab := table{columns: []column{{"a", 20000}, {"b", 23}, {"c", 20001}}}
	body := tab.appendDescription(nil, nil)[5:]
	for n := range len(body) + 1 {
		got := addColumns(nil, body[:n])
		if n == len(body) && !slices.Equal(got, []uint32{20000, 20001}) || len(got) > 2 {
			t.Errorf("%d bytes: %v", n, got)
		}
		addOIDs(nil, body[:n])
	}
	many := []uint32{}
	for oid := range uint32(2 * typesMax) {
		many = addType(many, firstUserOID+oid)
	}
	if len(many) != typesMax {
		t.Errorf("%d types are kept", len(many))
	}
}
