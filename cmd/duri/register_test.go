package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/quorum"
	"github.com/duri-io/duri/server"
)

func TestRegisterIsPrintedWithWhatItMeans(t *testing.T) {
	at := time.Date(2026, 11, 26, 3, 0, 0, 0, time.UTC)
	sync := server.DurabilityStatus{
		Mode: quorum.Sync, Guarantee: "RPO 0: an acknowledged commit is on the disk of one other site as well", Known: true, Member: true, Receipts: 1,
		Register: quorum.Register{Epoch: 4, Members: []string{"a", "b"}, Settled: true, By: "b", At: at, Reason: "a has caught up"}, Policy: "durability-first",
	}
	solo := sync
	solo.Mode, solo.Receipts, solo.Guarantee = quorum.Solo, 0, "SOLO since 03:00:00: acknowledged commits are on the disk of b only, because a is silent"
	solo.Register.Members = []string{"b"}
	out := sync
	out.Member, out.Mode, out.Guarantee = false, quorum.Solo, "a is left out"
	out.Door = &server.DoorStatus{Shut: "site a is left out"}
	for _, c := range []struct {
		name string
		s    server.DurabilityStatus
		well bool
		want []string
	}{
		{"all members", sync, true, []string{"RPO 0", "epoch      4", "members    a, b"}},
		{"alone", solo, false, []string{"SOLO", "members    b"}},
		{"left out", out, false, []string{"left out", "clients    shut out: site a is left out"}},
	} {
		var b bytes.Buffer
		if err := printRegister(&b, "a", c.s, term.Style{}); err != nil {
			t.Fatal(err)
		}
		for _, w := range c.want {
			if !strings.Contains(b.String(), w) {
				t.Errorf("%s: no %q in\n%s", c.name, w, b.String())
			}
		}
		cluster := server.ClusterStatus{Sites: []server.SiteStatus{{Site: "a", Durability: &c.s}}}
		if text, ok := summary(cluster); ok != c.well {
			t.Errorf("%s: summary %q, well %t", c.name, text, ok)
		}
	}
}

func TestLossIsPrinted(t *testing.T) {
	var b bytes.Buffer
	err := printLoss(&b, server.LossReport{
		Register: quorum.Register{Epoch: 2, Members: []string{"a"}},
		Lost:     []server.PossibleLoss{{Site: "a", Database: "app", Have: "0/10", End: "0/30", Bytes: 32, Heard: time.Now().Add(-time.Minute)}, {Site: "a", Database: "other", Have: "0/0"}},
	})
	if err != nil || !strings.Contains(b.String(), "app of a: this site has everything up to 0/10; it reached to 0/30 when last heard, 1m0s ago") ||
		!strings.Contains(b.String(), "never heard") {
		t.Errorf("%v\n%s", err, b.String())
	}
}

func TestDrainIsPrintedWithWhoStays(t *testing.T) {
	never, now, soon := (*float64)(nil), 0.0, 30.0
	two := map[string]int{"LISTEN": 2, "temporary objects": 1}
	for _, c := range []struct {
		r    server.DrainReport
		want string
	}{
		{server.DrainReport{Site: "a"}, "site a takes new transactions of clients again\n"},
		{server.DrainReport{Site: "a", Drain: true, All: true, LeaveInS: &soon}, "as long as another site does\nno session stays there\n"},
		{
			server.DrainReport{Site: "a", Drain: true, All: true, Staying: two, LeaveInS: &soon},
			"3 sessions stay there (2: LISTEN; 1: temporary objects); what cannot be moved is asked to leave in 30 s\n",
		},
		{
			server.DrainReport{Site: "a", Drain: true, All: true, Staying: map[string]int{"LISTEN": 1}, LeaveInS: &now},
			"1 session stays there (1: LISTEN); what cannot be moved is asked to leave at the end of its transaction\n",
		},
		{
			server.DrainReport{Site: "a", Drain: true, Staying: two, LeaveInS: never},
			"what cannot be moved stays until it ends\na gateway has not told yet who stays: run the command once more\n",
		},
	} {
		var b bytes.Buffer
		if err := printDrain(&b, c.r); err != nil || !strings.HasSuffix(b.String(), c.want) {
			t.Errorf("%q, want %q", b.String(), c.want)
		}
	}
	var out, errs bytes.Buffer
	for _, bad := range []string{"soon", "-1s"} {
		if code := run(t.Context(), []string{"site", "drain", "a", "--pinned-after", bad}, &out, &errs); code != term.ExitUsage || !strings.Contains(errs.String(), "never") {
			t.Errorf("%d: %s", code, errs.String())
		}
	}
}
