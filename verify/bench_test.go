package verify

import (
	"fmt"
	"testing"

	"github.com/duri-io/duri/internal/pgtest"
)

// BenchmarkRun compares a table of 1,000,000 rows of 6 columns at two databases of one server, so both sites share this
// machine. 10 million rows take ten times as long: the work is per range.
//
//	go test -run '^$' -bench Run -benchtime 3x ./verify
func BenchmarkRun(b *testing.B) {
	for _, c := range []struct{ name, ddl string }{
		{"int", "CREATE TABLE t (id int8 PRIMARY KEY, a int, b text, c numeric(12,2), d timestamptz, e jsonb)"},
		{"uuid", "CREATE TABLE t (id int8, a int, b text PRIMARY KEY, c numeric(12,2), d timestamptz, e jsonb)"},
		{"keyless", "CREATE TABLE t (id int8, a int, b text, c numeric(12,2), d timestamptz, e jsonb)"},
	} {
		b.Run(c.name, func(b *testing.B) { benchmarkRun(b, c.ddl) })
	}
}

func benchmarkRun(b *testing.B, ddl string) {
	const rows = 1_000_000
	s := newSites(b, ddl)
	s.both(b, fmt.Sprintf(`INSERT INTO t SELECT g, g %% 1000, md5(g::text), g * 1.01, '2026-01-01'::timestamptz + g * interval '1s',
		jsonb_build_object('k', g) FROM generate_series(1, %d) g`, rows))
	for _, db := range []string{"a", "b"} {
		pgtest.Exec(b, s.c, db, "VACUUM ANALYZE t")
	}
	for b.Loop() {
		if rep := s.run(b, Options{}); !rep.Equal || rep.Rows != rows {
			b.Fatalf("%+v", rep)
		}
	}
	b.ReportMetric(rows*float64(b.N)/b.Elapsed().Seconds(), "rows/s")
}
