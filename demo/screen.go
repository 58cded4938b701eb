package demo

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/duri-io/duri/internal/term"
)

// screen shows progress: lines that stay, and on a terminal below them a panel that is redrawn. Safe for concurrent use.
// Errors of the writer are not looked at: progress is a courtesy.
type screen struct {
	w     io.Writer
	tty   bool
	style term.Style
	begin time.Time

	mu    sync.Mutex // guards panel and w
	panel int        // lines drawn
}

func newScreen(w io.Writer, noColour bool) *screen {
	return &screen{w: w, tty: term.IsTerminal(w), style: term.StyleFor(w, noColour), begin: time.Now()}
}

// clock is the time since the demo began: "00:42".
func (s *screen) clock() string {
	d := time.Since(s.begin)
	return fmt.Sprintf("%02d:%02d", int(d.Minutes()), int(d.Seconds())%60)
}

// say prints a line that stays.
func (s *screen) say(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _ = io.WriteString(s.w, s.erase()+s.style.Dim(s.clock())+"  "+fmt.Sprintf(format, args...)+"\n")
}

// show draws the panel in place of the last one; without a terminal it prints line instead.
func (s *screen) show(panel []string, line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.tty {
		_, _ = io.WriteString(s.w, s.clock()+"  "+line+"\n")
		return
	}
	width := widthOf(s.w) - 1 // a full line wraps on some terminals
	var b strings.Builder
	b.WriteString(s.erase())
	for _, l := range panel {
		b.WriteString(clip(l, width) + "\n")
	}
	s.panel = len(panel)
	_, _ = io.WriteString(s.w, b.String())
}

// clear takes the panel away.
func (s *screen) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _ = io.WriteString(s.w, s.erase())
}

// erase gives what takes the panel away: up, and clear to the end of the screen.
func (s *screen) erase() string {
	if s.panel == 0 {
		return ""
	}
	n := s.panel
	s.panel = 0
	return fmt.Sprintf("\x1b[%dA\r\x1b[J", n)
}

// widthOf is the width of a terminal in cells.
func widthOf(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok {
		return 80
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 {
		return 80
	}
	return int(size.Col)
}

// clip shortens a line without colours to n cells: a Korean syllable takes two.
func clip(s string, n int) string {
	for i, r := range s {
		if n -= term.Cells(string(r)); n < 0 {
			return s[:i]
		}
	}
	return s
}

// glance is everything that the panel shows at one moment.
type glance struct {
	phase        string
	names        [2]string
	up           [2]bool    // the agent answers
	linked       [2]bool    // and follows the other site
	rate         [2]float64 // payments per second, since the last glance
	acknowledged [2]int64
	lag          [2]float64 // seconds, of the direction towards the site
	behind       [2]int64   // bytes, likewise
	conflicts    [2]int64
	inDoubt      int64
	latest       string
	gateways     [2]gatewayGlance
	clients      clientGlance
}

// gatewayGlance is a gateway at one moment.
type gatewayGlance struct {
	name      string
	up        bool   // it answers
	at        [2]int // sessions, by the site of their latest transaction
	elsewhere int    // sessions that have had none
	waiting   int    // sessions that wait for a site
}

// clientGlance is what the ledger's clients have had of it.
type clientGlance struct {
	dead            string // the site that is down; empty: none
	errors, retries int64
	killed          bool          // there was a fault
	stall           time.Duration // the longest wait of a client around it
	now             time.Duration // for how long a client waits that waits longest just now
}

// panel draws a glance for a terminal. It is pure.
func (g glance) panel() []string {
	t := term.NewTable("", "PAYMENTS/S", "ACKNOWLEDGED", "LAG", "CONFLICTS").Right(1, 2, 3, 4)
	for i, name := range g.names {
		if !g.up[i] {
			t.Row("  "+name, "down", term.Count(g.acknowledged[i]), "-", "-")
			continue
		}
		t.Row("  "+name, fmt.Sprintf("%.0f", g.rate[i]), term.Count(g.acknowledged[i]), g.lagText(i), term.Count(g.conflicts[i]))
	}
	var b strings.Builder
	_ = t.Write(&b, term.Style{}) // a strings.Builder does not fail
	lines := append([]string{"", "  " + strings.ToUpper(g.phase)}, strings.Split(strings.TrimRight(b.String(), "\n"), "\n")...)
	lines = append(lines, "")
	t = term.NewTable("", "SESSIONS", "AT A", "AT B", "WAITING").Right(1, 2, 3, 4)
	for _, w := range g.gateways {
		if !w.up {
			t.Row("  "+w.name, "down", "-", "-", "-")
			continue
		}
		t.Row("  "+w.name, w.at[0]+w.at[1]+w.elsewhere, w.at[0], w.at[1], w.waiting)
	}
	b.Reset()
	_ = t.Write(&b, term.Style{})
	lines = append(lines, strings.Split(strings.TrimRight(b.String(), "\n"), "\n")...)
	lines = append(lines, "  "+g.clients.text())
	if g.latest != "" {
		lines = append(lines, "  "+term.Clean(g.latest))
	}
	return lines
}

// line is a glance for a log.
func (g glance) line() string {
	site := func(i int) string {
		if !g.up[i] {
			return g.names[i] + " down"
		}
		return fmt.Sprintf("%s %.0f/s, lag %s", g.names[i], g.rate[i], g.lagText(i))
	}
	return fmt.Sprintf("%s: %s | %s | acknowledged %s, in doubt %d, conflicts %s + %s | %s", g.phase, site(0), site(1),
		term.Count(g.acknowledged[0]+g.acknowledged[1]), g.inDoubt, term.Count(g.conflicts[0]), term.Count(g.conflicts[1]), g.clients.text())
}

// text is what an operator wants to know first: is somebody without an answer, and did anybody notice?
func (c clientGlance) text() string {
	var b strings.Builder
	if c.dead != "" {
		b.WriteString(c.dead + " IS DOWN, ")
	}
	switch {
	case c.errors > 0:
		fmt.Fprintf(&b, "CLIENTS NOTICED: %s errors", term.Count(c.errors))
	case c.killed:
		b.WriteString("no client noticed: 0 errors")
	default:
		b.WriteString("client errors 0")
	}
	fmt.Fprintf(&b, ", %s made again", term.Count(c.retries))
	if c.killed {
		fmt.Fprintf(&b, ", longest wait %s", term.Duration(c.stall))
	}
	if c.now >= noteworthy {
		fmt.Fprintf(&b, ", waiting now: %s", term.Duration(c.now))
	}
	return b.String()
}

// noteworthy is a wait that a person would feel.
const noteworthy = 200 * time.Millisecond

func (g glance) lagText(i int) string {
	switch {
	case !g.linked[i]:
		return "no link"
	case g.behind[i] == 0:
		return "0 s"
	}
	return fmt.Sprintf("%.2f s", g.lag[i])
}
