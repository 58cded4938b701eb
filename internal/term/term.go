// Package term prints for the command line: tables, JSON, errors with hints, progress, and sizes and durations for
// people. It knows nothing of duri's domain and decides nothing.
//
// It guarantees that what it prints to a terminal holds no control characters from the data (Clean), that columns
// line up when text is Korean (two cells for a wide character), and that without a terminal, or with NO_COLOR set,
// there is no colour and no redrawing (style.md section 6).
package term

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	"golang.org/x/text/width"
)

// Style colours text, or leaves it alone: the zero Style is without colour.
type Style struct{ colour bool }

// StyleFor gives the style for what is written to w: coloured when w is a terminal, NO_COLOR is unset or empty
// (no-color.org) and TERM is not "dumb". off (--no-color) switches it off.
func StyleFor(w io.Writer, off bool) Style {
	return Style{colour: !off && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && IsTerminal(w)}
}

func (s Style) paint(code, text string) string {
	if !s.colour || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// Good is for what is well.
func (s Style) Good(text string) string { return s.paint("32", text) }

// Warn is for what needs attention.
func (s Style) Warn(text string) string { return s.paint("33", text) }

// Bad is for what is broken.
func (s Style) Bad(text string) string { return s.paint("31", text) }

// Bold is for titles.
func (s Style) Bold(text string) string { return s.paint("1", text) }

// Dim is for what matters less.
func (s Style) Dim(text string) string { return s.paint("2", text) }

// IsTerminal reports whether w is a terminal.
func IsTerminal(w io.Writer) bool {
	_, ok := columns(w)
	return ok
}

// columns is the width of the terminal w in cells, at least 1; false when w is none.
func columns(w io.Writer) (int, bool) {
	f, ok := w.(*os.File)
	if !ok {
		return 0, false
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, false
	}
	if size.Col == 0 { // a terminal that does not know its size, for example a bare pseudo-terminal
		return 80, true
	}
	return int(size.Col), true
}

// JSON writes v as one indented document with a final newline. <, > and & stay as they are.
func JSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// Clean makes text safe for a terminal: control characters, line breaks and invalid UTF-8 become escapes (\n, \x1b,
// \xff). Names come from databases, and a name may hold anything.
func Clean(s string) string {
	if utf8.ValidString(s) && strings.IndexFunc(s, steers) < 0 {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case steers(r):
			q := fmt.Sprintf("%q", r)
			b.WriteString(q[1 : len(q)-1])
		default:
			b.WriteRune(r)
		}
		i += n
	}
	return b.String()
}

// steers tells the characters that steer a terminal: controls, line separators, and the marks that reorder text.
func steers(r rune) bool {
	return unicode.IsControl(r) || r == '\u2028' || r == '\u2029' || unicode.Is(unicode.Bidi_Control, r)
}

// Cells is the number of terminal cells that s takes: two for East Asian wide characters, none for combining marks
// and for the vowels and final consonants that a terminal draws into the Korean syllable before them.
func Cells(s string) int {
	n := 0
	for _, r := range s {
		n += runeCells(r)
	}
	return n
}

func runeCells(r rune) int {
	switch {
	case r >= 0x1160 && r <= 0x11FF, unicode.In(r, unicode.Mn, unicode.Me, unicode.Cf):
		return 0
	}
	switch width.LookupRune(r).Kind() {
	case width.EastAsianWide, width.EastAsianFullwidth:
		return 2
	}
	return 1
}

// Table collects rows and prints them in aligned columns. The zero value is without a header. Not for concurrent use.
type Table struct {
	header []string
	rows   [][]string
	right  map[int]bool
}

// NewTable starts a table with a header.
func NewTable(header ...string) *Table { return &Table{header: header} }

// Right aligns these columns (from 0) to the right: for numbers.
func (t *Table) Right(columns ...int) *Table {
	if t.right == nil {
		t.right = map[int]bool{}
	}
	for _, c := range columns {
		t.right[c] = true
	}
	return t
}

// Row adds a row; cells are printed as by fmt.Sprint and cleaned.
func (t *Table) Row(cells ...any) {
	row := make([]string, len(cells))
	for i, c := range cells {
		row[i] = Clean(fmt.Sprint(c))
	}
	t.rows = append(t.rows, row)
}

// Len is the number of rows.
func (t *Table) Len() int { return len(t.rows) }

// Write prints the table, two spaces between columns, nothing after the last cell of a row. style paints the header.
func (t *Table) Write(w io.Writer, style Style) error {
	widths := t.widths()
	var b strings.Builder
	if len(t.header) > 0 {
		b.WriteString(style.Bold(t.line(t.header, widths)) + "\n")
	}
	for _, row := range t.rows {
		b.WriteString(t.line(row, widths) + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (t *Table) widths() []int {
	var widths []int
	for _, row := range append([][]string{t.header}, t.rows...) {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], Cells(cell))
		}
	}
	return widths
}

func (t *Table) line(row []string, widths []int) string {
	var b strings.Builder
	for i, cell := range row {
		pad := strings.Repeat(" ", widths[i]-Cells(cell))
		if t.right[i] {
			cell = pad + cell
		} else {
			cell += pad
		}
		if i > 0 {
			b.WriteString("  ")
		}
		b.WriteString(cell)
	}
	return strings.TrimRight(b.String(), " ")
}
