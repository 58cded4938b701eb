package demo

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRecordIsReadBack(t *testing.T) {
	dir := t.TempDir()
	r, err := newRecorder(dir, 7)
	if err != nil {
		t.Fatal(err)
	}
	want := []entry{
		{client: 7, seq: 1, id: "u1", site: "seoul", amount: 100, outcome: committed},
		{client: 7, seq: 2, id: "u2", site: "seoul", amount: 200, outcome: rolledBack},
		{client: 7, seq: 4, id: "u4", site: "busan", amount: 400, outcome: unknown},
		{client: 7, seq: 5, id: "u5", site: "busan", amount: 500, outcome: unknown},
	}
	for i, e := range want {
		if err := r.attempt(e); err != nil {
			t.Fatal(err)
		}
		if i == 3 {
			break // ended before the answer: in doubt without a line that says so
		}
		if err := r.outcome(e.seq, e.outcome); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "README"), []byte("not a record"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := readRecords(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(entry{})); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
	if _, err := newRecorder(dir, 7); err == nil {
		t.Error("a second recorder took over the file of the first")
	}
}

func TestTornLastLineDoesNotCount(t *testing.T) {
	for text, want := range map[string]int{
		"":                                      0,
		"a 1 u1 seoul 100":                      0,
		"a 1 u1 seoul 100\n":                    1,
		"a 1 u1 seoul 100\nc 1":                 1,
		"a 1 u1 seoul 100\nc 1\na 2 u2 seo":     1,
		"a 1 u1 seoul 100\nc 1\na 2 u2 busan 5": 1,
	} {
		got, err := parseRecord(1, text)
		if err != nil || len(got) != want {
			t.Errorf("%q: %d entries (%v), want %d", text, len(got), err, want)
		}
	}
	got, _ := parseRecord(1, "a 1 u1 seoul 100\nc 1")
	if got[0].outcome != unknown {
		t.Errorf("an outcome that was cut off counts: %c", got[0].outcome)
	}
}

func TestDamagedRecordIsAnError(t *testing.T) {
	for _, text := range []string{
		"a 1 u1 s 1\nc 1\na 1 u1 s 1\n", "a 1 u1 s 1\nr 1\na 1 u2 s 1\n", "a 1 u1 s 1\nr 1\na 1 u1 s 2\n",
		"c 1\n", "a 1 u1 seoul\n", "a x u1 seoul 1\n", "a 1 u1 seoul x\n", "a 1 u1 seoul 1\na 1 u1 seoul 1\n", "\n", "x 1\n", "a 1 u s 1\nz 1\n",
	} {
		if got, err := parseRecord(1, text); err == nil {
			t.Errorf("%q: %v, want an error", text, got)
		}
	}
}

func TestTheLastAttemptCounts(t *testing.T) {
	got, err := parseRecord(1, "a 1 u1 seoul 5\nr 1\na 1 u1 busan 5\nc 1\na 2 u2 seoul 6\nr 2\na 2 u2 busan 6\n")
	want := []entry{
		{client: 1, seq: 1, id: "u1", site: "busan", amount: 5, outcome: committed},
		{client: 1, seq: 2, id: "u2", site: "busan", amount: 6, outcome: unknown},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(entry{})); diff != "" || err != nil {
		t.Errorf("entries (-want +got):\n%s%v", diff, err)
	}
}
