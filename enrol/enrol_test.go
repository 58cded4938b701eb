package enrol

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCopiesIntoAnEmptyDatabase(t *testing.T) {
	p := newPair(t, `
		CREATE SCHEMA "Büro x";
		CREATE TABLE a (id int PRIMARY KEY, v text);
		CREATE TABLE "Büro x"."T ""q""" (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, a_id int REFERENCES public.a, "s p" text);
		INSERT INTO a SELECT i, 'v' || i FROM generate_series(1, 1000) i;
		INSERT INTO "Büro x"."T ""q""" (a_id, "s p") SELECT i, NULL FROM generate_series(1, 10) i`)
	stream := p.stream(p.source())
	res := p.receive(p.setup(), stream)
	if res.Rows != 1010 || res.Tables != 2 || !res.SchemaMade {
		t.Errorf("result %+v", res)
	}
	for _, sql := range []string{`SELECT * FROM a ORDER BY 1`, `SELECT * FROM "Büro x"."T ""q""" ORDER BY 1`} {
		if d := cmp.Diff(rows(t, p.a, sql), rows(t, p.b, sql)); d != "" {
			t.Errorf("%s: %s", sql, d)
		}
	}
	got := rows(t, p.b, `SELECT roname, remote_lsn FROM pg_replication_origin JOIN pg_replication_origin_status ON local_id = roident`)
	if d := cmp.Diff([][]string{{origin, res.At.String()}}, got); d != "" {
		t.Errorf("progress: %s", d)
	}
	got = rows(t, p.b, `SELECT DISTINCT (pg_xact_commit_timestamp_origin(a.xmin)).timestamp = '`+res.Time.String()+`', roname
		FROM a JOIN pg_replication_origin ON roident = (pg_xact_commit_timestamp_origin(a.xmin)).roident`)
	if d := cmp.Diff([][]string{{"t", origin}}, got); d != "" {
		t.Errorf("versions: %s", d)
	}
}
