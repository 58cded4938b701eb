package apply

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/wal"
)

func TestABatchNamesItsTablesOnce(t *testing.T) {
	of := func(name string) *tableWave { return &tableWave{target: &target{table: &table{full: name}}} }
	b := &batch{waves: []*wave{
		{tables: []*tableWave{of("public.a"), of("public.b")}},
		{truncate: &wal.Change{Op: wal.Truncate, Relation: &wal.Relation{Namespace: "public", Name: "c"}}},
		{tables: []*tableWave{of("public.b"), of("public.c"), of("s.a")}},
	}}
	if d := cmp.Diff([]string{"public.a", "public.b", "public.c", "s.a"}, b.tables()); d != "" {
		t.Error(d)
	}
}
