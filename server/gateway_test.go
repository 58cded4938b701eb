package server

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pgtest"
)

// lines is a log that a test reads.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

// gatewayOf runs the way of clients of an agent whose duri.yaml has what is given under gateway.
func gatewayOf(t *testing.T, dsn, more string) (a *Agent, log *lines, file func(more string), addr string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "duri.yaml")
	file = func(more string) {
		text := fmt.Sprintf(`cluster: {id: 4f2c9a1e-7c1d-4b5e-9a55-0d7f6c1e2b3a, name: demo}
site: a
sites:
  - {id: 1, name: a, address: "127.0.0.1:7400"}
  - {id: 2, name: b, address: "127.0.0.1:7401"}
bootstrap: seed
databases: [{name: app}]
postgres: {dsn: %q}
gateway:
  listen: 127.0.0.1:1
  mode: transaction
%s`, dsn, more)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	file(more)
	cfg, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Gateway.Listen = "127.0.0.1:0"
	log = &lines{}
	a = &Agent{cfg: cfg, self: cfg.Self(), log: slog.New(slog.NewTextHandler(log, nil)), nodes: []*node{{database: config.Database{Name: "app"}}}, version: "9.9"}
	l, err := a.openDoor()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	go func() { done <- a.host.run(ctx) }()
	go func() { done <- a.door.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
	})
	return a, log, file, l.Addr().String()
}

func login(t *testing.T, addr, database, user, password string) (*pgconn.PgConn, error) {
	host, port, _ := strings.Cut(addr, ":")
	c, err := pgconn.Connect(t.Context(), fmt.Sprintf("host=%s port=%s dbname=%s user=%s password=%s sslmode=disable", host, port, database, user, password))
	if err == nil {
		t.Cleanup(func() { _ = c.Close(context.Background()) })
	}
	return c, err
}

func texts(t *testing.T, c *pgconn.PgConn, sql string) string {
	t.Helper()
	rs, err := c.Exec(t.Context(), sql).ReadAll()
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	var b strings.Builder
	for _, r := range rs {
		for _, row := range r.Rows {
			b.Write(bytes.Join(row, []byte("|")))
			b.WriteByte('\n')
		}
	}
	return b.String()
}

var metricLine = regexp.MustCompile(`^[a-z_]+(\{[a-z_]+="([^"\\]|\\.)*"(,[a-z_]+="([^"\\]|\\.)*")*\})? [0-9.e+-]+$`)

// TestGatewayIsAdministered: limits come from duri.yaml and again with RELOAD, clients stay, and what the agent tells of
// them is true.
func TestGatewayIsAdministered(t *testing.T) {
	c := pgtest.New(t)
	pgtest.DB(t, c, "app")
	pgtest.Exec(t, c, "app", grants.SQL(grants.Spec{Gateway: true})+"CREATE ROLE client LOGIN PASSWORD 'secret'; GRANT duri TO client; ALTER ROLE duri PASSWORD 'agent'")
	a, log, file, addr := gatewayOf(t, c.DSN("", "duri"), "  pool_size: 1\n  hold: 100ms\n")
	admin, err := login(t, addr, "duri", "duri", "agent") // the agent's role, without being named
	if err != nil {
		t.Fatal(err)
	}
	one, err := login(t, addr, "app", "client", "secret")
	if err != nil {
		t.Fatal(err)
	}
	texts(t, one, "BEGIN; SELECT 1")
	if _, err := login(t, addr, "app", "client", "secret"); err == nil || !strings.Contains(err.Error(), "53300") {
		t.Errorf("a second connection to the server was opened: %v", err)
	}

	file("  pool_size: 0\n")
	if _, err := admin.Exec(t.Context(), "RELOAD").ReadAll(); err == nil || !strings.Contains(err.Error(), "pool_size") {
		t.Errorf("a file with a problem was taken: %v", err)
	}
	file("  pool_size: 2\n  hold: 20s\n  admins: [duri, client]\n  replay: [client]\njournal: {keep: 2h}\n")
	texts(t, admin, "RELOAD")
	if log.count("journal.keep") != 1 || log.count("gateway.pool_size: 1 -> 2") != 1 {
		t.Error("the log does not tell what was taken and what was not")
	}
	if got := texts(t, admin, "SHOW CONFIG"); !strings.Contains(got, "default_pool_size|2|20|yes") || !strings.Contains(got, "query_wait_timeout|20|") {
		t.Errorf("%s", got)
	}
	two, err := login(t, addr, "app", "client", "secret")
	if err != nil {
		t.Fatal(err)
	}
	texts(t, two, "BEGIN; SELECT 1")
	texts(t, one, "SELECT 1; COMMIT") // It has lived through all that.
	if _, err := login(t, addr, "duri", "client", "secret"); err != nil {
		t.Errorf("the new administrator: %v", err)
	}
	a.ReloadLogged()
	if n := log.count("gateway.replay"); n != 1 {
		t.Errorf("the log tells %d times that gateway.replay has changed", n)
	}

	// What the control socket tells.
	ask := func(h http.HandlerFunc) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		h(w, httptest.NewRequest(http.MethodGet, "/", nil))
		return w
	}
	var r gateway.Report
	if err := json.Unmarshal(ask(a.getGateway).Body.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	if r.Mode != "transaction" || r.Limits.PoolSize != 2 || len(r.Sessions) != 4 || len(r.Stats) != 1 || r.Stats[0].Transactions != 1 || r.Stats[0].Site != "a" ||
		r.Refused["53300"] != 1 || len(r.Routes) != 1 || r.Routes[0].Site != "a" {
		t.Errorf("%+v", r)
	}
	w := ask(a.getMetrics)
	values := map[string]string{}
	families := map[string]bool{}
	for s := bufio.NewScanner(w.Body); s.Scan(); {
		switch line := s.Text(); {
		case strings.HasPrefix(line, "# TYPE "):
			name := strings.Fields(line)[2]
			if families[name] {
				t.Errorf("family %s is there twice", name)
			}
			families[name] = true
		case strings.HasPrefix(line, "# HELP "):
		case metricLine.MatchString(line):
			name, value, _ := strings.Cut(line, " ")
			if i := strings.LastIndexByte(line, ' '); i > 0 {
				name, value = line[:i], line[i+1:]
			}
			values[name] = value
		default:
			t.Errorf("not a sample: %q", line)
		}
	}
	for name, want := range map[string]string{
		`duri_agent_info{cluster="demo",site="a",version="9.9"}`: "1",
		`duri_gateway_open`: "1", `duri_gateway_connections`: "4",
		`duri_gateway_transactions_total{database="app",user="client",site="a"}`:                "1",
		`duri_gateway_server_connections{database="app",user="client",site="a",state="active"}`: "1",
		`duri_gateway_clients{database="app",user="client"}`:                                    "2",
		`duri_gateway_in_doubt_total{fate="committed"}`:                                         "0",
		`duri_gateway_moves_total{database="app",user="client",site="a"}`:                       "0",
	} {
		if values[name] != want {
			t.Errorf("%s is %q, want %s", name, values[name], want)
		}
	}
	if w.Header().Get("Content-Type") != gateway.MetricsType {
		t.Errorf("%v", w.Header())
	}
}

// TestWrongPasswordsAreSlowedDown: at speed they get 53400, other users of the same address do not, and the log does not
// grow with them.
func TestWrongPasswordsAreSlowedDown(t *testing.T) {
	c := pgtest.New(t)
	pgtest.DB(t, c, "app")
	pgtest.Exec(t, c, "app", grants.SQL(grants.Spec{Gateway: true})+"CREATE ROLE client LOGIN PASSWORD 'secret'; CREATE ROLE other LOGIN PASSWORD 'secret'; GRANT duri TO client, other")
	a, log, _, addr := gatewayOf(t, c.DSN("", "duri"), "")
	codes := map[string]int{}
	began := time.Now()
	const tries = 60
	for range tries {
		_, err := login(t, addr, "app", "client", "wrong")
		if e := (*pgconn.PgError)(nil); err != nil {
			if errors.As(err, &e) {
				codes[e.Code]++
			} else {
				t.Fatal(err)
			}
		}
	}
	refilled := int(2*time.Since(began).Seconds()) + 1
	if codes["28P01"] < 20 || codes["28P01"] > 20+refilled || codes["28P01"]+codes["53400"] != tries {
		t.Errorf("%v within %v", codes, time.Since(began))
	}
	if _, err := login(t, addr, "app", "client", "secret"); err == nil || !strings.Contains(err.Error(), "53400") {
		// A moment may have passed in which one more was allowed.
		if time.Since(began) < 400*time.Millisecond {
			t.Errorf("who tries at speed is let in: %v", err)
		}
	}
	if _, err := login(t, addr, "app", "other", "secret"); err != nil {
		t.Errorf("another user: %v", err)
	}
	if n := log.count("a client was refused"); n != 2 { // one of each code
		t.Errorf("%d lines were logged", n)
	}
	r := a.door.(administered).Report()
	if int(r.Refused["28P01"]) != codes["28P01"] || int(r.Refused["53400"]) < codes["53400"] {
		t.Errorf("%v were counted, %v seen", r.Refused, codes)
	}
}
