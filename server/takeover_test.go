package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/pki"
)

func TestWhoMayTakeOver(t *testing.T) {
	own := takeoverRequest{Format: 1, Version: "1", Cluster: "c", Name: "web1", Listen: ":6432", Mode: "transaction", DrainS: 60}
	if err := own.against(own); err != nil {
		t.Error(err)
	}
	newer := own
	newer.Version = "2"
	if err := newer.against(own); err != nil {
		t.Errorf("another version: %v", err)
	}
	for what, change := range map[string]func(*takeoverRequest){
		"kind is gateway": func(r *takeoverRequest) { r.Kind = kindAgent }, "its listen is": func(r *takeoverRequest) { r.Link = ":7400" },
		"format": func(r *takeoverRequest) { r.Format = 2 }, "cluster": func(r *takeoverRequest) { r.Cluster = "d" }, "name": func(r *takeoverRequest) { r.Name = "web2" },
		"gateway.listen": func(r *takeoverRequest) { r.Listen = ":1" }, "gateway.mode": func(r *takeoverRequest) { r.Mode = "session" },
		"waited for": func(r *takeoverRequest) { r.DrainS = 0 }, "for -1 s": func(r *takeoverRequest) { r.DrainS = -1 },
		"for NaN": func(r *takeoverRequest) { r.DrainS = math.NaN() },
	} {
		r := own
		change(&r)
		if err := r.against(own); err == nil || !strings.Contains(err.Error(), what) || hintOf(err) == "" {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// aloneGateway is one whose sites do not exist, in a folder of its own.
func aloneGateway(t *testing.T) *Gateway {
	t.Helper()
	dir, err := os.MkdirTemp("", "duri") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Mkdir(filepath.Join(dir, "ca"), 0o700); err != nil {
		t.Fatal(err)
	}
	site, err := config.Parse("duri.yaml", []byte(`cluster: {id: 4f2c9a1e-7c1d-4b5e-9a55-0d7f6c1e2b3a, name: demo}
site: a
sites:
  - {id: 1, name: a, address: "127.0.0.1:1"}
  - {id: 2, name: b, address: "127.0.0.1:2"}
bootstrap: seed
databases: [{name: app}]
postgres: {dsn: "host=127.0.0.1"}
`))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := pki.NewCA(site.Cluster.ID, site.Cluster.Name)
	var pair pki.Pair
	if err == nil {
		pair, err = ca.Pair()
	}
	if err == nil {
		err = pair.Write(filepath.Join(dir, "ca", "ca.crt"), filepath.Join(dir, "ca", "ca.key"))
	}
	free, lerr := net.Listen("tcp", "127.0.0.1:0")
	if lerr != nil {
		t.Fatal(lerr)
	}
	_ = free.Close()
	if err == nil {
		err = config.AddGateway(site, config.GatewaySpec{Name: "web1", Home: "a", Listen: free.Addr().String(), CA: filepath.Join(dir, "ca"), Out: filepath.Join(dir, "web1")})
	}
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(filepath.Join(dir, "web1", "duri.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return sameGateway(t, cfg)
}

func sameGateway(t *testing.T, cfg *config.Config) *Gateway {
	t.Helper()
	g, err := NewGateway(cfg, "", "9.9", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// running runs a gateway; end ends it, and ended gives what it has ended with.
func running(t *testing.T, g *Gateway, run GatewayRun) (end context.CancelFunc, ended chan error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended = make(chan error, 1)
	done := make(chan struct{})
	go func() {
		ended <- g.Run(ctx, run)
		close(done)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return cancel, ended
}

func awaitReport(t *testing.T, c *Control, what string, ok func(GatewayReport) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		r, err := c.StandaloneGateway(ctx)
		if err == nil && ok(r) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("waited in vain until %s: %+v, %v", what, r, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// TestTheControlSocketOfAGateway: who has it, who is refused, and what it answers.
func TestTheControlSocketOfAGateway(t *testing.T) {
	g := aloneGateway(t)
	c := NewGatewayControl(g.cfg, "")
	var unreachable *UnreachableError
	if _, err := c.StandaloneGateway(t.Context()); !errors.As(err, &unreachable) || !strings.Contains(err.Error(), "no gateway answers") {
		t.Errorf("nobody is there: %v", err)
	}
	end, ended := running(t, g, GatewayRun{Takeover: true}) // from nobody
	awaitReport(t, c, "it answers", func(r GatewayReport) bool {
		return r.Name == "web1" && r.PID == os.Getpid() && r.Version == "9.9" && r.Home == "a" && r.Mode == "transaction" && r.Shut == ""
	})
	path := GatewayControl(g.cfg)
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	second := sameGateway(t, g.cfg)
	if err := second.Run(t.Context(), GatewayRun{}); err == nil || !strings.Contains(err.Error(), "already runs") || !strings.Contains(hintOf(err), "--takeover") {
		t.Errorf("a second one: %v", err)
	}
	metrics, err := c.do(t.Context(), http.MethodGet, "/metrics", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(metrics.Body)
	if _ = metrics.Body.Close(); err != nil || !bytes.Contains(text, []byte("duri_gateway_open 1")) {
		t.Errorf("%s, %v", text, err)
	}
	// Another configuration is refused, and so is what is no upgrade; nothing has happened then.
	other := *g.cfg
	other.Gateway.Listen = "127.0.0.1:1"
	third := sameGateway(t, &other)
	var refused *remoteError
	if err := third.Run(t.Context(), GatewayRun{Takeover: true}); !errors.As(err, &refused) || !strings.Contains(err.Error(), "gateway.listen") || refused.ExitCode() != 5 {
		t.Errorf("another address: %v", err)
	}
	body, err := json.Marshal(g.takeoverRequest(0))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range []string{string(body), "{", "{}"} {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		req, err := http.NewRequest(http.MethodPost, "http://gateway/v1/takeover", strings.NewReader(b))
		if err == nil {
			err = req.Write(conn)
		}
		if err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, 100)
		if n, err := conn.Read(answer); err != nil || !strings.HasPrefix(string(answer[:n]), "HTTP/1.1 409") {
			t.Errorf("%s: %s, %v", b, answer[:n], err)
		}
		_ = conn.Close()
	}
	awaitReport(t, c, "it answers", func(r GatewayReport) bool { return r.Predecessor == nil })

	// And then it is taken over, and taken over again.
	for range 3 {
		next := sameGateway(t, g.cfg)
		nextEnd, nextEnded := running(t, next, GatewayRun{Takeover: true})
		if err := <-ended; err != nil {
			t.Errorf("a gateway that was taken over: %v", err)
		}
		awaitReport(t, c, "the new one answers", func(r GatewayReport) bool { return r.Shut == "" && r.Predecessor == nil })
		end, ended = nextEnd, nextEnded
	}
	end()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the control socket is left: %v", err)
	}
}
