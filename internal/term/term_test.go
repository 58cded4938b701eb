package term

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

func TestTableAlignsKoreanText(t *testing.T) {
	table := NewTable("SITE", "상태", "LAG").Right(2)
	table.Row("seoul", "정상", 5)
	table.Row("부산", "broken", 12345)
	table.Row("x", "", "")
	var b bytes.Buffer
	if err := table.Write(&b, Style{}); err != nil {
		t.Fatal(err)
	}
	want := "SITE   상태      LAG\n" +
		"seoul  정상        5\n" +
		"부산   broken  12345\n" +
		"x\n"
	if b.String() != want {
		t.Errorf("got:\n%s\nwant:\n%s", b.String(), want)
	}
}

func TestTableRowsMayBeLongerThanTheHeader(t *testing.T) {
	table := NewTable("A")
	table.Row("1", "2", "3")
	var b bytes.Buffer
	if err := table.Write(&b, Style{}); err != nil || b.String() != "A\n1  2  3\n" {
		t.Errorf("got %q, %v", b.String(), err)
	}
}

func TestCellsCountsWhatATerminalDraws(t *testing.T) {
	for s, want := range map[string]int{
		"": 0, "seoul": 5, "둘이": 4,
		"\u1112\u1161\u11ab": 2, // 한 as a file system may give it, in three conjoining letters
		"e\u0301":            1, "Ａ": 2, "\u200b": 0, "✓": 1,
	} {
		if got := Cells(s); got != want {
			t.Errorf("Cells(%q) = %d, want %d", s, got, want)
		}
	}
}

func TestCleanLeavesNothingThatSteersATerminal(t *testing.T) {
	for in, want := range map[string]string{
		"plain 한글":        "plain 한글",
		"a\nb\x1b[31m":    `a\nb\x1b[31m`,
		"bad\xff":         `bad\xff`,
		"\u202etxt":       `\u202etxt`,
		"back\\slash\"'.": "back\\slash\"'.",
	} {
		if got := Clean(in); got != want {
			t.Errorf("Clean(%q) = %q, want %q", in, got, want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		got := Clean(string(rapid.SliceOf(rapid.Byte()).Draw(t, "bytes")))
		if strings.IndexFunc(got, steers) >= 0 || strings.ToValidUTF8(got, "") != got {
			t.Fatalf("%q is not clean", got)
		}
	})
}

func TestClosestSuggestsTypingErrorsOnly(t *testing.T) {
	keys := []string{"journal", "site", "sites", "log", "listen"}
	for word, want := range map[string]string{
		"jornal": "journal", "juornal": "journal", "JOURNAL": "journal", "ste": "site", "lisen": "listen",
		"banana": "", "": "", "x": "", "lgo": "log",
	} {
		if got := Closest(word, keys); got != want {
			t.Errorf("Closest(%q) = %q, want %q", word, got, want)
		}
	}
}

type hinted struct{}

func (hinted) Error() string    { return "cause" }
func (hinted) HintText() string { return "do this" }

func TestPrintErrorShowsHints(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{errors.New("plain"), "duri: plain\n"},
		{&Error{Op: "cannot pause link", Msg: "slot is inactive", Hint: "wait"}, "duri: cannot pause link: slot is inactive\nhint: wait\n"},
		{&Error{Op: "read", Err: hinted{}}, "duri: read: cause\nhint: do this\n"},
		{fmt.Errorf("outer: %w", hinted{}), "duri: outer: cause\nhint: do this\n"},
		{errors.Join(errors.New("one"), hinted{}), "duri: one\nduri: cause\nhint: do this\n"},
		{&Error{}, "duri: unknown error\n"},
		{errors.New("two\nlines"), "duri: two\\nlines\n"},
	} {
		var b bytes.Buffer
		PrintError(&b, c.err, Style{})
		if b.String() != c.want {
			t.Errorf("got %q, want %q", b.String(), c.want)
		}
	}
}

func TestExitCodeFollowsTheCause(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, ExitOK},
		{errors.New("x"), ExitFailed},
		{Usage("x", ""), ExitUsage},
		{Usagef("%d", 1), ExitUsage},
		{fmt.Errorf("wrapped: %w", &Error{Code: ExitRefused}), ExitRefused},
		{&Error{Err: &Error{Code: ExitUnreachable}}, ExitUnreachable},
		{&Error{Err: context.DeadlineExceeded}, ExitTimeout},
		{&Error{Op: "x"}, ExitFailed},
		{fmt.Errorf("wait: %w", context.Canceled), ExitInterrupted},
	} {
		if got := ExitCode(c.err); got != c.want {
			t.Errorf("ExitCode(%v) = %d, want %d", c.err, got, c.want)
		}
	}
}

func TestHumanForms(t *testing.T) {
	for in, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 1024*1024 - 1: "1 MiB", 8 << 30: "8 GiB",
		150 << 20: "150 MiB", -2048: "-2 KiB", math.MaxInt64: "8 EiB", math.MinInt64: "-8 EiB",
	} {
		if got := Size(in); got != want {
			t.Errorf("Size(%d) = %q, want %q", in, got, want)
		}
	}
	for in, want := range map[time.Duration]string{
		0: "0 s", 40 * time.Microsecond: "40 us", 340 * time.Millisecond: "340 ms", 2500 * time.Millisecond: "2.5 s",
		9999 * time.Millisecond: "9.9 s", 59 * time.Second: "59 s", 125 * time.Second: "2 min 5 s", time.Hour: "1 h",
		200 * time.Minute: "3 h 20 min", 292 * time.Hour: "12 d 4 h", -time.Second: "-1 s",
		math.MinInt64: "-106751 d 23 h",
	} {
		if got := Duration(in); got != want {
			t.Errorf("Duration(%v) = %q, want %q", in, got, want)
		}
	}
	for in, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -1234: "-1,234", math.MinInt64: "-9,223,372,036,854,775,808"} {
		if got := Count(in); got != want {
			t.Errorf("Count(%d) = %q, want %q", in, got, want)
		}
	}
}

func TestProgressTellsRateAndRemaining(t *testing.T) {
	for _, c := range []struct {
		done, total int64
		elapsed     time.Duration
		want        string
	}{
		{0, 400, 0, "copy: 0 of 400 (0%)"},
		{120, 400, 5 * time.Second, "copy: 120 of 400 (30%), 24/s, 12 s remaining"},
		{400, 400, 10 * time.Second, "copy: 400 of 400 (100%), 40/s"},
		{50, 0, 10 * time.Second, "copy: 50, 5/s"},
		{1, math.MaxInt64, time.Hour, "copy: 1 of 9,223,372,036,854,775,807 (0%), 0/s, 1157 d 9 h remaining"},
	} {
		if got := progressLine("copy", c.done, c.total, c.elapsed, Count); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestProgressRedrawsOnATerminalOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		p := NewProgress(&b, "copy", 100, Count)
		p.Set(1)
		p.Finish()
		if b.Len() > 0 {
			t.Errorf("printed %q without a terminal", b.String())
		}
		p = NewProgress(&b, "copy", 100, Count)
		p.width = 20
		for i := range int64(50) {
			p.Set(i) // the clock of the bubble stands still, so only the first is drawn
		}
		time.Sleep(time.Second) // of the bubble's clock: takes no time
		p.Set(50)
		p.Finish()
		p.Finish()
		p.Set(60)
		want := "\r\x1b[Kcopy: 0 of 100 (0%)" + "\r\x1b[Kcopy: 50 of 100 (50" + "\r\x1b[Kcopy: 50 of 100 (50\n"
		if b.String() != want {
			t.Errorf("got %q, want %q", b.String(), want)
		}
	})
}

func TestColourNeedsATerminalAndNoNOCOLOR(t *testing.T) {
	t.Setenv("NO_COLOR", "")
	t.Setenv("TERM", "xterm")
	if s := StyleFor(&bytes.Buffer{}, false); s.Bad("x") != "x" {
		t.Error("colour without a terminal")
	}
	tty, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatalf("this test needs a pseudo-terminal: %v", err)
	}
	defer tty.Close()
	if got := StyleFor(tty, false).Bad("x"); got != "\x1b[31mx\x1b[0m" {
		t.Errorf("on a terminal: %q", got)
	}
	if got := StyleFor(tty, true).Bad("x"); got != "x" {
		t.Errorf("with --no-color: %q", got)
	}
	t.Setenv("NO_COLOR", "1")
	if got := StyleFor(tty, false).Bad("x"); got != "x" {
		t.Errorf("with NO_COLOR: %q", got)
	}
}

func TestJSONIsOneIndentedDocument(t *testing.T) {
	var b bytes.Buffer
	if err := JSON(&b, map[string]string{"link": "seoul->busan"}); err != nil {
		t.Fatal(err)
	}
	if want := "{\n  \"link\": \"seoul->busan\"\n}\n"; b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}
