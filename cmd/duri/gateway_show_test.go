package main

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/parity"
	"github.com/duri-io/duri/server"
)

func TestGatewayViews(t *testing.T) {
	r := gateway.Report{
		Sessions: []gateway.Session{{PID: 7, User: "app", Database: "shop", State: "waiting", Site: "seoul", WaitingS: 1.5, Pinned: "LISTEN", Client: "10.0.0.1:5"}},
		Pools: []gateway.Pool{
			{Database: "shop", User: "app", Clients: 3, Waiting: 1, Servers: []gateway.PoolServers{{Site: "busan", Active: 2}, {Site: "seoul", Idle: 4}}},
			{Database: "shop", User: "idle", Clients: 1},
		},
		Pins:   map[string]int{"LISTEN": 1},
		Routes: []gateway.Route{{Database: "shop", User: "app", Problem: "no site takes clients now"}},
		Stats:  []gateway.Tally{{Database: "shop", User: "app", Site: "seoul", Counts: gateway.Counts{Transactions: 12345, Received: 2048, Moves: 2, QueryS: 61}}},
	}
	for view, want := range map[string][]string{
		"sessions": {"7", "waiting", "seoul", "1.5", "LISTEN", "10.0.0.1:5"}, "pools": {"busan", "seoul", "idle"}, "pins": {"LISTEN"},
		"routes": {"no site takes clients now"}, "stats": {"12,345", "seoul", "1 min 1 s"},
	} {
		var b bytes.Buffer
		table := gatewayViews[view].table(r)
		if err := table.Write(&b, term.Style{}); err != nil {
			t.Fatal(err)
		}
		for _, w := range want {
			if !strings.Contains(b.String(), w) {
				t.Errorf("%s has no %q:\n%s", view, w, b.String())
			}
		}
		if gatewayViews[view].table(gateway.Report{}).Len() != 0 || gatewayViews[view].part(r) == nil {
			t.Errorf("%s of nothing", view)
		}
	}
	if len(gatewayViews) != 5 {
		t.Error("a view is not tested")
	}
	var out, errs bytes.Buffer
	if code := run(context.Background(), []string{"gateway", "show", "pool"}, &out, &errs); code != term.ExitUsage || !strings.Contains(errs.String(), `did you mean "pools"?`) {
		t.Errorf("%d: %s", code, errs.String())
	}
	if code := run(context.Background(), []string{"__complete", "gateway", "show", ""}, &out, &errs); code != 0 || !strings.Contains(out.String(), "sessions") {
		t.Errorf("%d: %s", code, out.String())
	}
}

func TestGatewayStatusIsPrinted(t *testing.T) {
	r := server.GatewayReport{Name: "web1", Version: "0.4.0", PID: 4711, Listen: ":6432", Home: "seoul"}
	r.Mode, r.Clients, r.Logins, r.UptimeS = "transaction", 12, 5, 61
	var b bytes.Buffer
	if err := printGateway(&b, r); err != nil || b.String() != "gateway web1 takes clients: process 4711, version 0.4.0, mode transaction, listens on :6432, home seoul, up for 1 min 1 s\n12 clients, 5 logins\n" {
		t.Errorf("%q, %v", b.String(), err)
	}
	r.Shut, r.Predecessor = "it starts", &gateway.Predecessor{Clients: 3, Why: map[string]int{"LISTEN": 2, "a transaction is under way": 1}}
	b.Reset()
	if err := printGateway(&b, r); err != nil || !strings.Contains(b.String(), "takes no clients: it starts") ||
		!strings.HasSuffix(b.String(), "it takes over from another process, which has 3 clients left: 2: LISTEN; 1: a transaction is under way\n") {
		t.Errorf("%q, %v", b.String(), err)
	}
	var out, errs bytes.Buffer
	if code := run(context.Background(), []string{"gateway", "--drain", "0s", "-c", "nowhere"}, &out, &errs); code == 0 {
		t.Errorf("%d: %s", code, errs.String())
	}
}

func TestCheckIsSaidInWords(t *testing.T) {
	ab := [2]string{"seoul", "busan"}
	for _, c := range []struct {
		check server.Check
		want  []string
		ok    bool
	}{
		{server.Check{Sites: make([]server.CheckedSite, 2)}, []string{"2 sites compared: open sessions go on at each of them"}, true},
		{server.Check{Findings: []parity.Finding{
			{Grade: parity.BlocksRole, Role: "clerk", Database: "app", Sites: ab, Line: "SCRAM verifier of role clerk", Values: [2]string{"sha256:1...", ""}, Hint: "copy it"},
			{Grade: parity.Warning, Database: "app", Sites: ab, Line: "setting lock_timeout", Values: [2]string{"'0'", "'7s'"}, Hint: "x"},
		}}, []string{
			"✗ app: SCRAM verifier of role clerk is sha256:1... at seoul and not there at busan: no session of clerk goes on at the other site\n  hint: copy it",
			"! app: setting lock_timeout is '0' at seoul and '7s' at busan: sessions go on, and may notice",
		}, false},
		{server.Check{Unreachable: []server.Missing{{Site: "busan", Error: "no answer"}}}, []string{"✗ busan could not be compared: no answer"}, false},
	} {
		var b bytes.Buffer
		if err := printCheck(&b, c.check, term.Style{}); err != nil {
			t.Fatal(err)
		}
		for _, w := range c.want {
			if !strings.Contains(b.String(), w) {
				t.Errorf("no %q in:\n%s", w, b.String())
			}
		}
		if text, ok := checkSummary(c.check); ok != c.ok || text == "" {
			t.Errorf("%q %v", text, ok)
		}
	}
}
