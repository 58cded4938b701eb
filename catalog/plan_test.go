package catalog

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func files(names ...string) fstest.MapFS {
	m := fstest.MapFS{}
	for _, n := range names {
		m["m/"+n] = &fstest.MapFile{Data: []byte("SELECT '" + n + "'")}
	}
	return m
}

func TestMigrationsAreNumberedFromOneWithoutGaps(t *testing.T) {
	good, err := readMigrations(files("0001_start.sql", "0002_more.sql"), "m")
	if err != nil || len(good) != 2 || good[1].version != 2 || good[1].name != "more" || good[0].checksum == good[1].checksum {
		t.Errorf("%+v, %v", good, err)
	}
	for _, bad := range [][]string{{"0002_x.sql"}, {"0001_a.sql", "0003_b.sql"}, {"0001_a.sql", "0001_b.sql"}, {"start.sql"}, {"0001.sql"}} {
		if _, err := readMigrations(files(bad...), "m"); err == nil {
			t.Errorf("%v was accepted", bad)
		}
	}
	if _, err := readMigrations(embedded, "migrations"); err != nil {
		t.Error(err)
	}
}

func TestPlanRunsWhatIsMissingAndRefusesWhatDiffers(t *testing.T) {
	known := []migration{{1, "a", "c1", ""}, {2, "b", "c2", ""}}
	for name, c := range map[string]struct {
		had  []applied
		want int // pending; -1: refused
	}{
		"new database":    {nil, 2},
		"one behind":      {[]applied{{1, "a", "c1"}}, 1},
		"up to date":      {[]applied{{1, "a", "c1"}, {2, "b", "c2"}}, 0},
		"renamed file":    {[]applied{{1, "old", "c1"}}, 1},
		"changed content": {[]applied{{1, "a", "other"}}, -1},
		"newer database":  {[]applied{{1, "a", "c1"}, {2, "b", "c2"}, {3, "c", "c3"}}, -1},
		"gap":             {[]applied{{2, "b", "c2"}}, -1},
	} {
		got, err := plan(known, c.had)
		if c.want < 0 {
			var e *Error
			if !errors.As(err, &e) || e.HintText() == "" {
				t.Errorf("%s: error %v", name, err)
			}
			continue
		}
		if err != nil || len(got) != c.want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestPartitionsOfTodayAndTomorrowExistAndOldOnesGo(t *testing.T) {
	// The last second of a day in UTC; the same instant is the next day in the time zone it is given in.
	now := time.Date(2026, 12, 31, 23, 59, 59, 0, time.UTC).In(time.FixedZone("KST", 9*3600))
	have := []string{"conflict_default", "conflict_20261230", "conflict_20261228", "conflict_20261229", "conflict_extra", "conflict_99999999"}
	add, drop := planPartitions(have, 48*time.Hour, now)
	var days []string
	for _, d := range add {
		days = append(days, d.Format(time.RFC3339))
	}
	if d := cmp.Diff([]string{"2026-12-31T00:00:00Z", "2027-01-01T00:00:00Z"}, days); d != "" {
		t.Error(d)
	}
	// 29 December ended 23:59:59 + 24 h before now, less than 48 h before it.
	if d := cmp.Diff([]string{"conflict_20261228"}, drop); d != "" {
		t.Error(d)
	}
	have = append(have, "conflict_20261231", "conflict_20270101")
	if add, _ := planPartitions(have, 48*time.Hour, now); len(add) != 0 {
		t.Errorf("again: %v", add)
	}
}

func TestFilterNumbersItsParameters(t *testing.T) {
	since := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	where, args := ConflictFilter{Table: "s.t", Kind: "update_missing", Since: since}.where()
	for _, part := range []string{"= $1::text OR table_name = $1::text", "kind = $2::text", "at >= $3::timestamptz"} {
		if !strings.Contains(where, part) {
			t.Errorf("%q lacks %q", where, part)
		}
	}
	if !slices.Equal(args, []string{"s.t", "update_missing", "2026-01-02T03:04:05.000006Z"}) {
		t.Errorf("%v", args)
	}
	if where, args := (ConflictFilter{}).where(); where != "true AND kind <> ''" || len(args) != 0 {
		t.Errorf("%q %v", where, args)
	}
	if where, _ := (ConflictFilter{Exceptions: true}).where(); where != "true" {
		t.Errorf("%q", where)
	}
}
