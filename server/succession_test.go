package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/link"
)

// siteAgent is an agent whose peers and server do not exist, in a folder of its own.
func siteAgent(t *testing.T, change func(*config.Config)) *Agent {
	t.Helper()
	dir, err := os.MkdirTemp("", "duri") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	out := filepath.Join(dir, "c")
	err = config.InitCluster(config.InitSpec{
		Name: "demo", Out: out, Databases: []config.Database{{Name: "app"}},
		Sites: []config.InitSite{
			{Name: "a", Address: "127.0.0.1:1", Listen: "127.0.0.1:4", DSN: "host=127.0.0.1 port=1 user=duri", Clients: "127.0.0.1:2"},
			{Name: "b", Address: "127.0.0.1:3", Listen: "127.0.0.1:4", DSN: "host=127.0.0.1 port=1 user=duri"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(filepath.Join(out, "a", config.FileName))
	if err != nil {
		t.Fatal(err)
	}
	cfg.Gateway.Mode = config.GatewayTransaction
	change(cfg)
	a, err := New(cfg, "9.9", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.closeClients(); err != nil {
			t.Error(err)
		}
	})
	return a
}

// TestWhatAnAgentIsNotTakenOverFrom: each refusal is one sentence with advice, and nothing was opened.
func TestWhatAnAgentIsNotTakenOverFrom(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for name, c := range map[string]struct {
		change func(*config.Config)
		answer http.HandlerFunc // of who has the control socket; nil: nobody
		want   string
		code   int
	}{
		"an agent without clients":   {func(c *config.Config) { c.Gateway.Listen = "" }, nil, "no sessions of clients cannot be taken over", 1},
		"an agent with a plain door": {func(c *config.Config) { c.Gateway.Mode = config.GatewayDoor }, nil, "no sessions of clients cannot be taken over", 1},
		"another data directory":     {func(c *config.Config) { c.Listen = busy.Addr().String() }, nil, "no agent to be taken over at", 1},
		"an older version":           {nil, http.NotFound, "the running agent answered 404", 1},
		"another one": {nil, func(w http.ResponseWriter, _ *http.Request) {
			own := takeoverRequest{Kind: kindAgent, Version: "1"}
			writeError(w, http.StatusConflict, takeoverRequest{Kind: kindAgent, Cluster: "x"}.against(own))
		}, "its cluster is", 5},
		"a gateway that runs alone": {nil, func(w http.ResponseWriter, _ *http.Request) {
			writeError(w, http.StatusConflict, takeoverRequest{Kind: kindAgent}.against(takeoverRequest{}))
		}, "its kind is gateway", 5},
	} {
		t.Run(name, func(t *testing.T) {
			a := siteAgent(t, func(cfg *config.Config) {
				if c.change != nil {
					c.change(cfg)
				}
			})
			if c.answer != nil {
				if err := os.MkdirAll(a.cfg.DataDir, 0o700); err != nil {
					t.Fatal(err)
				}
				l, err := net.Listen("unix", ControlSocket(a.cfg.DataDir))
				if err != nil {
					t.Fatal(err)
				}
				srv := &http.Server{Handler: c.answer}
				served := make(chan struct{})
				go func() {
					_ = srv.Serve(l)
					close(served)
				}()
				defer func() {
					_ = srv.Close()
					<-served
				}()
			}
			err := a.TakeOver(t.Context(), 0)
			if err == nil || !strings.Contains(err.Error(), c.want) || hintOf(err) == "" {
				t.Errorf("%v (hint: %s)", err, hintOf(err))
			}
			var coded interface{ ExitCode() int }
			if errors.As(err, &coded) != (c.code != 1) || c.code != 1 && coded.ExitCode() != c.code {
				t.Errorf("the exit code is not %d", c.code)
			}
			if files, _ := filepath.Glob(filepath.Join(a.cfg.DataDir, "*")); len(files) > 0 && (c.answer == nil || len(files) > 1) {
				t.Errorf("data_dir has %v", files)
			}
		})
	}
}

func TestLocalAddress(t *testing.T) {
	for listen, want := range map[string]string{
		"10.1.0.5:7432": "10.1.0.5:7432", "seoul.example:7432": "seoul.example:7432", ":7432": "localhost:7432", "0.0.0.0:7432": "localhost:7432",
		"[::]:7432": "localhost:7432", "[fe80::1]:7432": "[fe80::1]:7432",
	} {
		if got := localAddress(listen); got != want {
			t.Errorf("%s: %s, not %s", listen, got, want)
		}
	}
}

// TestTheWayToTheOwnSite: it leads to the former agent, then nowhere, and then to PostgreSQL; and not back.
func TestTheWayToTheOwnSite(t *testing.T) {
	a := siteAgent(t, func(*config.Config) {})
	h, err := newHost(a)
	if err != nil {
		t.Fatal(err)
	}
	client, err := link.NewClient(link.ClientConfig{Address: "127.0.0.1:1", Peer: "a", TLS: a.clientT, ClusterID: a.cfg.Cluster.ID, Site: "a", Now: now})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	f := newFormer(h, client)
	h.former = f
	h.entry.Shut("a test")
	s := newSites(a.cfg, "a", h, a.clients, a.log)
	watch := func(ctx context.Context) error {
		return f.Watch(ctx, func(link.SiteState) error { return errors.New("it was told") })
	}
	asks := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, verr := f.Verifier(ctx, "x")
		_, perr := f.Position(ctx, "app")
		_, derr := f.dial(ctx)
		for _, err := range []error{verr, perr, derr} {
			if errors.Is(err, errBetween) != errors.Is(verr, errBetween) {
				t.Errorf("not all are asked at the same place: %v, %v, %v", verr, perr, derr)
			}
		}
		return verr
	}
	for _, stage := range []struct {
		to           stage
		shut         string
		leaves, asks bool
	}{{formerServes, "", false, true}, {formerLeaves, "is restarted", true, true}, {formerGone, "is restarted", true, false}} {
		f.advance(stage.to)
		if why := s.whyShut("a"); !strings.Contains(why, stage.shut) || (why == "") != (stage.shut == "") || f.leaving() != stage.leaves {
			t.Errorf("stage %d: shut: %q, leaving: %t", stage.to, why, f.leaving())
		}
		if err := asks(); err == nil || errors.Is(err, errBetween) == stage.asks {
			t.Errorf("stage %d: %v", stage.to, err)
		}
	}
	f.advance(formerServes) // there is no way back
	if err := asks(); !errors.Is(err, errBetween) {
		t.Errorf("%v", err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := watch(over); !errors.Is(err, context.Canceled) {
		t.Errorf("somebody was watched between the two: %v", err)
	}
	told := make(chan error, 1)
	go func() { told <- watch(t.Context()) }()
	f.advance(begun)
	if err := <-told; err == nil || err.Error() != "it was told" {
		t.Errorf("the agent of this process: %v", err)
	}
	if why := s.whyShut("a"); why != "a test" {
		t.Errorf("shut: %q", why)
	}
	if _, err := f.dial(t.Context()); err == nil || !strings.Contains(err.Error(), "a test") {
		t.Errorf("the entry is passed by: %v", err)
	}
}
