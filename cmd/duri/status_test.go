package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/duri-io/duri/fkey"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/server"
)

// TestStatusTellsOfRowsThatAreSetAside has a cluster that is well: such rows are no fault of it.
func TestStatusTellsOfRowsThatAreSetAside(t *testing.T) {
	d := server.DatabaseStatus{
		Name: "app", State: "ready", Health: server.HealthOK,
		ForeignKeys: fkey.Status{LastError: "read foreign keys: no luck", Constraints: []fkey.ConstraintStatus{
			{Name: "child_parent", Child: "public.child", Parent: "public.parent", Policy: policy.Report, Orphans: 2},
			{Name: "waits", Child: "public.other", Waiting: 1},
		}},
		ParkedTables: []server.ParkedTable{{Table: "public.tag", Rows: 1}},
	}
	s := server.ClusterStatus{Sites: []server.SiteStatus{{Site: "a", Databases: []server.DatabaseStatus{d}}}}
	var out bytes.Buffer
	if err := printStatus(&out, s, term.Style{}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"app at a: 2 rows of public.child without a parent in public.parent (constraint child_parent, policy report)\n  hint: ",
		"app at a: cannot look for rows without a parent: read foreign keys: no luck\n  hint: ",
		"app at a: 1 row of public.tag hidden at every site, as newer rows have unique values of theirs\n  hint: ",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "public.other") {
		t.Errorf("a row that may be none is told of:\n%s", out.String())
	}
	if _, ok := summary(s); !ok {
		t.Error("the cluster is not well")
	}
}

func TestTheStateOfALinkSaysWhatItDoes(t *testing.T) {
	d := server.DatabaseStatus{State: "ready"}
	for want, l := range map[string]server.LinkStatus{
		"streaming":    {Connected: true, Health: server.HealthOK},
		"held":         {Connected: true, Health: server.HealthDown},
		"degraded":     {Connected: true, Health: server.HealthDegraded},
		"disconnected": {Health: server.HealthDown},
	} {
		if got := linkState(d, l, term.Style{}); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
