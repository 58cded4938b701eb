package term

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// redrawEvery bounds how often the line is redrawn: quicker than an eye can read only costs time.
const redrawEvery = 100 * time.Millisecond

// Progress is one line about long work: done, total, rate and remaining time. It redraws the line on a terminal and
// prints nothing elsewhere. It starts no goroutine: the line moves when Set is called. Safe for concurrent use.
type Progress struct {
	w      io.Writer
	label  string
	total  int64
	format func(int64) string
	width  int // cells; 0: not a terminal, print nothing

	mu     sync.Mutex // guards what follows
	start  time.Time
	drawn  time.Time
	done   int64
	closed bool
}

// NewProgress starts a progress line on w (normally stderr). total 0 means unknown. format prints an amount (Count,
// Size).
func NewProgress(w io.Writer, label string, total int64, format func(int64) string) *Progress {
	p := &Progress{w: w, label: Clean(label), total: total, format: format, start: time.Now()}
	p.width, _ = columns(w)
	return p
}

// Set says how much is done in all.
func (p *Progress) Set(done int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done = done
	if now := time.Now(); p.width > 0 && !p.closed && now.Sub(p.drawn) >= redrawEvery {
		p.drawn = now
		p.draw(now, "")
	}
}

// SetTotal says how much there is to do, when it becomes known only on the way.
func (p *Progress) SetTotal(total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.total = total
}

// Finish draws the last state and ends the line, so that what is printed next begins a new one. Further calls do
// nothing.
func (p *Progress) Finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.width > 0 && !p.closed {
		p.draw(time.Now(), "\n")
	}
	p.closed = true
}

// draw overwrites the line. Errors are of no interest: progress is a courtesy.
func (p *Progress) draw(now time.Time, end string) {
	line := progressLine(p.label, p.done, p.total, now.Sub(p.start), p.format)
	// The last cell stays free: a full line wraps on some terminals.
	_, _ = io.WriteString(p.w, "\r\x1b[K"+cut(line, p.width-1)+end)
}

// progressLine is the text: "copy app: 120 of 400 (30%), 24/s, 12 s remaining".
func progressLine(label string, done, total int64, elapsed time.Duration, format func(int64) string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s", label, format(done))
	if total > 0 {
		fmt.Fprintf(&b, " of %s (%.0f%%)", format(total), 100*float64(done)/float64(total))
	}
	if elapsed < time.Second/2 || done <= 0 { // too early for a rate
		return b.String()
	}
	rate := float64(done) / elapsed.Seconds()
	fmt.Fprintf(&b, ", %s/s", format(int64(rate)))
	if left := total - done; total > 0 && left > 0 {
		seconds := min(float64(left)/rate, 1e8) // three years is as good as any longer time, and cannot overflow
		fmt.Fprintf(&b, ", %s remaining", Duration(time.Duration(seconds*float64(time.Second)).Round(time.Second)))
	}
	return b.String()
}

// cut shortens s to at most n cells.
func cut(s string, n int) string {
	for i, r := range s {
		if n -= runeCells(r); n < 0 {
			return s[:i]
		}
	}
	return s
}
