package catalog

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/wal"
)

func siteNames(id wal.SiteID) string {
	return map[wal.SiteID]string{1: "seoul", 2: "busan", 3: "jeju"}[id]
}

func doc(s string) json.RawMessage {
	if s == "" {
		return nil
	}
	return json.RawMessage(s)
}

// at makes a conflict between busan's change (remote, at second 10) and what was here.
func met(kind, code, remote string, localSite wal.SiteID, localAt time.Duration, local string) Conflict {
	base := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	c := Conflict{
		ID: 7, Kind: kind, Code: code, Schema: "public", Table: "t", Key: doc(`{"id":"1"}`), Origin: 2,
		RemoteTime: base.Add(10 * time.Second), RemoteRow: doc(remote), LocalRow: doc(local),
	}
	if localSite != 0 {
		t := base.Add(localAt)
		c.LocalSite, c.LocalTime = localSite, &t
	}
	return c
}

const row = `{"id":"1","v":"x"}`

func TestARecordTellsWhoWonAndWhy(t *testing.T) {
	for _, c := range []struct {
		record Conflict
		rule   Rule
		winner Side
		text   string
	}{
		{met("update_origin_differs", "won", row, 1, 8750*time.Millisecond, row), RuleLater, Remote, "busan's update won over seoul's row: it was committed 1.25 s later"},
		{met("update_origin_differs", "lost", row, 1, 10*time.Second+time.Microsecond, row), RuleLater, Local, "seoul's row won over busan's update: it was committed 0.000001 s later"},
		{met("insert_exists", "won", row, 1, 10*time.Second, row), RuleTie, Remote, "busan's insert won over seoul's row: both have the same commit time, and then the greater site number wins (2 over 1)"},
		{met("insert_exists", "lost", row, 3, 10*time.Second, row), RuleTie, Local, "jeju's row won over busan's insert: both have the same commit time, and then the greater site number wins (3 over 2)"},
		{met("update_deleted", "lost", row, 1, 12*time.Second, ""), RuleLater, Local, "seoul's delete won over busan's change: it was committed 2 s later"},
		{met("update_deleted", "won", row, 1, 0, ""), RuleLater, Remote, "busan's change won over seoul's delete: it was committed 10 s later"},
		{met("delete_origin_differs", "won", "", 1, 0, row), RuleLater, Remote, "busan's delete won over seoul's row: it was committed 10 s later"},
		{met("update_origin_differs", "won", row, 0, 0, row), RuleUnknownTime, Remote, "busan's update won over the row that was here: the commit time of what was here is not known any more, so it counts as older"},
		{met("update_missing", "won", row, 0, 0, ""), RuleMissing, Remote, "busan's update was written as a new row: none with this key was here; nobody lost"},
		{met("delete_missing", "", "", 0, 0, ""), RuleMissing, Nobody, "busan's delete found no row here; nobody lost"},
		{met("", "filled", row, 1, 0, row), RuleException, Nobody, "busan's change was completed with values from its origin; nobody lost"},
		{met("", "superseded", row, 1, 0, row), RuleException, Nobody, "busan's change was left alone: what is here is newer and had seen it, or the row is gone at its origin"},
		{met("update_origin_differs", "won", row, 1, 20*time.Second, row), RuleOther, Remote, "busan's update won over seoul's row; the commit times alone do not say why"},
		{met("update_origin_differs", "mixed", row, 1, 0, row), RuleOther, Nobody, `busan's update ended as "mixed"`},
	} {
		want := Verdict{c.winner, c.rule, c.text}
		if d := cmp.Diff(want, c.record.Explain(siteNames)); d != "" {
			t.Errorf("%s %s: %s", c.record.Kind, c.record.Code, d)
		}
	}
}

func TestBothImagesStandSideBySide(t *testing.T) {
	c := met("update_origin_differs", "won", `{"id":"1","v":null,"same":"é\"\\","new":"1"}`, 1, 0, `{"same":"é\"\\","id":"1","v":"","big":"x"}`)
	got, err := c.Columns([]string{"id", "v", "absent", "same"})
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, p := range got {
		line := p.Column + " " + string(p.Local) + " " + string(p.Remote)
		if p.Differs {
			line += " *"
		}
		lines = append(lines, line)
	}
	want := []string{`id "1" "1"`, `v "" null *`, `same "é\"\\" "é\"\\"`, `big "x" `, `new  "1"`}
	if d := cmp.Diff(want, lines); d != "" {
		t.Error(d)
	}
	if _, err := (Conflict{ID: 9, LocalRow: doc("[]")}).Columns(nil); err == nil || !strings.Contains(err.Error(), "conflict 9") {
		t.Errorf("an image that is none: %v", err)
	}
}
