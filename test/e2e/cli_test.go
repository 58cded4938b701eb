package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/server"
	"github.com/duri-io/duri/verify"
)

// document runs a command with -o json and reads its one document, strictly: fields are only added, and those that
// docs/reference/json.md describes are those of the types.
func document[T any](t *testing.T, want int, args ...string) T {
	t.Helper()
	var v T
	r := duri(t, append(args, "-o", "json")...)
	if r.code != want {
		t.Fatalf("duri %v: exit code %d, want %d\n%s%s", args, r.code, want, r.stdout, r.stderr)
	}
	d := json.NewDecoder(strings.NewReader(r.stdout))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("duri %v: %v in %s", args, err, r.stdout)
	}
	if d.More() {
		t.Errorf("duri %v: more than one document", args)
	}
	return v
}

func TestCommandsTellTheStateOfRunningAgents(t *testing.T) {
	t.Parallel()
	p := newPair(t, pair.Options{Relays: true, Seed: schema(`CREATE TABLE account (id int PRIMARY KEY, owner text, balance numeric);
		INSERT INTO account SELECT i, 'o' || i, 100 FROM generate_series(1, 50) i`)})
	a, b := p.Sites[0], p.Sites[1]

	r := duri(t, "status", "-c", a.ConfigFile)
	if r.code != 0 || r.stderr != "" || !strings.Contains(r.stdout, "2 sites, all writable") || strings.Count(r.stdout, "streaming") != 2 {
		t.Errorf("status: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	st := document[server.ClusterStatus](t, 0, "status", "-c", b.ConfigFile)
	if len(st.Sites) != 2 || len(st.Unreachable) != 0 || st.Sites[0].Site != "b" || st.Sites[0].Databases[0].State != "ready" ||
		st.Sites[1].Databases[0].Links[0].From != "b" || st.Sites[0].Databases[0].Links[0].Apply.Applied == 0 {
		t.Errorf("status: %+v", st)
	}
	rep := document[verify.Report](t, 0, "verify", "-c", a.ConfigFile)
	if !rep.Equal || rep.Rows != 50 || len(rep.Tables) != 1 || rep.A != "a" || rep.B != "b" {
		t.Errorf("verify: %+v", rep)
	}
	if r := duri(t, "conflict", "list", "-c", a.ConfigFile, "-o", "json"); r.code != 0 || strings.TrimSpace(r.stdout) != "[]" {
		t.Errorf("conflict list without conflicts: exit code %d, %q %s", r.code, r.stdout, r.stderr)
	}
	t.Run("watch", func(t *testing.T) { watch(t, a) })
	t.Run("conflict", func(t *testing.T) { conflict(t, p) })
	t.Run("corruption", func(t *testing.T) { corruption(t, p) })

	if err := b.SignalAgent(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	within(t, healMax, "status tells that b is gone", func(ctx context.Context) error {
		r, err := run(ctx, "status", "-c", a.ConfigFile)
		if err == nil && (r.code != 3 || !strings.Contains(r.stdout, "site b does not answer") || !strings.Contains(r.stdout, "disconnected") || !strings.Contains(r.stderr, "duri: needs attention")) {
			err = fmt.Errorf("exit code %d\n%s%s", r.code, r.stdout, r.stderr)
		}
		return err
	})
	if st := document[server.ClusterStatus](t, 3, "status", "-c", a.ConfigFile); len(st.Unreachable) != 1 || st.Unreachable[0].Site != "b" || st.Unreachable[0].Error == "" {
		t.Errorf("status without b: %+v", st)
	}
	for _, args := range [][]string{{"status"}, {"verify"}, {"conflict", "list"}} {
		r := duri(t, append(args, "-c", b.ConfigFile)...)
		if r.code != 4 || r.stdout != "" || !strings.Contains(r.stderr, "duri: no agent answers at ") || !strings.Contains(r.stderr, "hint: start it with") {
			t.Errorf("duri %v without an agent: exit code %d\n%s%s", args, r.code, r.stdout, r.stderr)
		}
	}
	t.Log("an agent that hangs is no agent")
	if err := a.SignalAgent(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if r := duri(t, "status", "-c", a.ConfigFile); r.code != 4 || !strings.Contains(r.stderr, "no agent answers at ") {
		t.Errorf("status of a stopped agent: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if err := a.SignalAgent(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if r := duri(t, "verify", "-c", a.ConfigFile); r.code == 0 || r.code == 3 || !strings.Contains(r.stderr, "site b") {
		t.Errorf("verify without b: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}

// watch runs status -w until it has printed twice, and interrupts it.
func watch(t *testing.T, s *pair.Site) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "status", "-w", "--interval", "100ms", "-c", s.ConfigFile)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var seen bytes.Buffer
	b := make([]byte, 4096)
	for strings.Count(seen.String(), "2 sites, all writable") < 2 {
		n, err := out.Read(b)
		seen.Write(b[:n])
		if err != nil {
			t.Fatalf("status -w ended: %v\n%s", err, seen.String())
		}
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 0 && code != 130 {
		t.Errorf("status -w after SIGINT: exit code %d", code)
	}
}

// conflict writes one row at both sites while they cannot hear each other.
func conflict(t *testing.T, p *pair.Pair) {
	a, b := p.Sites[0], p.Sites[1]
	for _, s := range p.Sites {
		s.Relay.Cut()
	}
	do(t, a, "UPDATE account SET balance = 111, owner = 'at a' WHERE id = 7")
	do(t, b, "UPDATE account SET balance = 222, owner = 'at b' WHERE id = 7")
	for _, s := range p.Sites {
		s.Relay.Heal()
	}
	settled(t, p, 30*time.Second)
	equal(t, p)
	if got := text(t, a, "SELECT balance::text || owner FROM account WHERE id = 7"); got != "222at b" {
		t.Errorf("the row is %s, want what was written last", got)
	}
	for i, s := range p.Sites {
		list := document[[]catalog.Conflict](t, 0, "conflict", "list", "-c", s.ConfigFile, "--table", "public.account")
		if len(list) != 1 {
			t.Fatalf("site %s: %d conflicts, want 1: %+v", s.Name, len(list), list)
		}
		c := list[0]
		var local, remote, key struct {
			ID      json.Number `json:"id"`
			Balance json.Number `json:"balance"`
			Owner   string      `json:"owner"`
		}
		for doc, v := range map[*json.RawMessage]any{&c.LocalRow: &local, &c.RemoteRow: &remote, &c.Key: &key} {
			if err := json.Unmarshal(*doc, v); err != nil {
				t.Fatalf("site %s: %v in %s", s.Name, err, *doc)
			}
		}
		own, other := "at "+s.Name, "at "+p.Sites[1-i].Name
		if c.Kind != "update_origin_differs" || local.Owner != own || remote.Owner != other || key.ID != "7" || c.LocalTime == nil ||
			(c.Code == "won") != (s == a) {
			t.Errorf("site %s: %+v (local %s, remote %s, key %s)", s.Name, c, c.LocalRow, c.RemoteRow, c.Key)
		}
		r := duri(t, "conflict", "list", "-c", s.ConfigFile)
		if r.code != 0 || !strings.Contains(r.stdout, "update_origin_differs") || !strings.Contains(r.stdout, "public.account") || !strings.Contains(r.stdout, "at a") {
			t.Errorf("site %s: exit code %d\n%s%s", s.Name, r.code, r.stdout, r.stderr)
		}
		if list := document[[]catalog.Conflict](t, 0, "conflict", "list", "-c", s.ConfigFile, "--kind", "delete_missing"); len(list) != 0 {
			t.Errorf("site %s: filtered list has %d", s.Name, len(list))
		}
	}
	r := duri(t, "conflict", "list", "-c", a.ConfigFile, "--since", "yesterday")
	if r.code != 2 || !strings.Contains(r.stderr, "is not a time") || !strings.Contains(r.stderr, "hint: use RFC 3339") {
		t.Errorf("a wrong time: exit code %d, %s", r.code, r.stderr)
	}
}

// corruption changes one row at a in a way that is not sent: under the replication origin of b's changes, which the
// agent's own session holds as long as it runs.
func corruption(t *testing.T, p *pair.Pair) {
	a := p.Sites[0]
	ends(t, a)
	within(t, noticeMax, "the agent's sessions have ended", func(ctx context.Context) error {
		if n := text(t, a, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'duri'"); n != "0" {
			return fmt.Errorf("%s of them", n)
		}
		return nil
	})
	do(t, a, `SELECT pg_replication_origin_session_setup('duri_app_b');
		UPDATE account SET balance = balance + 1 WHERE id = 33; DELETE FROM account WHERE id = 44`)
	start(t, a)
	streams(t, p)
	r := duri(t, "verify", "-c", a.ConfigFile)
	for _, want := range []string{"not equal", "public.account: ", "33", "44", "balance"} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("verify does not name %q:\n%s", want, r.stdout)
		}
	}
	if r.code != 3 || !strings.Contains(r.stderr, "duri: the sites are not equal") {
		t.Errorf("verify of corrupted sites: exit code %d, %s", r.code, r.stderr)
	}
	rep := document[verify.Report](t, 3, "verify", "-c", p.Sites[1].ConfigFile)
	if rep.Equal || len(rep.Tables) != 1 || rep.Tables[0].DifferenceCount != 2 || len(rep.Tables[0].Differences) != 2 {
		t.Fatalf("verify: %+v", rep)
	}
	for _, d := range rep.Tables[0].Differences {
		changed := d.Key[0] == "33" && len(d.Columns) == 1 && d.Columns[0] == "balance"
		gone := d.Key[0] == "44" && d.CopiesA == 1 && d.CopiesB == 0 // here A is b
		if !changed && !gone {
			t.Errorf("verify reports %+v", d)
		}
	}
}
