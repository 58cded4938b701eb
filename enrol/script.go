package enrol

import (
	"regexp"
	"strings"

	"github.com/duri-io/duri/internal/pg"
)

// filter makes pg_dump's script, which is for psql, one that a server takes. It works on lines that begin outside of any
// string, quoted name or comment, so a function's body is never touched.
//
//   - Lines that begin with a backslash are psql's commands (\restrict, \connect): removed.
//   - CREATE SCHEMA becomes CREATE SCHEMA IF NOT EXISTS: schema public is in every database, and a script for chosen
//     schemas creates it.
//   - Privileges on system objects are each server's own, and their names differ between versions: removed. `duri grants`
//     gives those that duri needs.
type filter struct {
	// known tells the server's parameters: a SET of another one (a newer pg_dump sets newer ones, such as
	// transaction_timeout) is removed. nil: every SET stays.
	known func(parameter string) bool
	// role is the run-time role, whose default privileges come from `duri grants` as well and need a superuser. Empty:
	// they stay.
	role string
}

// clean gives the script without what the server cannot take.
func (f filter) clean(script string) string {
	var out strings.Builder
	out.Grow(len(script))
	var l lexer
	for line := range strings.Lines(script) {
		if l.top() {
			line = f.line(line)
		}
		l.feed(line)
		out.WriteString(line)
	}
	return out.String()
}

var (
	setLine    = regexp.MustCompile(`^SET ([a-z_]+) = `)
	systemLine = regexp.MustCompile(`^(GRANT|REVOKE) [^"]* ON [A-Z ]+ (pg_catalog|information_schema)\.[^"]* (TO|FROM) .*;\n?$`)
	schemaLine = regexp.MustCompile(`^(GRANT|REVOKE) [^"]* ON SCHEMA (pg_catalog|information_schema) (TO|FROM) .*;\n?$`)
)

// line treats one line that begins at top level.
func (f filter) line(line string) string {
	m := setLine.FindStringSubmatch(line)
	switch {
	case strings.HasPrefix(line, `\`),
		m != nil && f.known != nil && !f.known(m[1]),
		systemLine.MatchString(line), schemaLine.MatchString(line),
		f.role != "" && strings.HasPrefix(line, "ALTER DEFAULT PRIVILEGES ") && f.isRole(line):
		return ""
	}
	if rest, ok := strings.CutPrefix(line, "CREATE SCHEMA "); ok && !strings.HasPrefix(rest, "IF NOT EXISTS ") {
		return "CREATE SCHEMA IF NOT EXISTS " + rest
	}
	return line
}

// isRole reports whether a statement ends with "TO role".
func (f filter) isRole(line string) bool {
	line = strings.TrimSuffix(line, "\n")
	return strings.HasSuffix(line, " TO "+f.role+";") || strings.HasSuffix(line, " TO "+pg.QuoteIdent(f.role)+";")
}

// lexer follows PostgreSQL's lexical structure far enough to know whether a position is inside a string, a quoted name
// or a comment. Strings are standard-conforming (pg_dump sets that), E” strings have backslash escapes.
type lexer struct {
	state   lexState
	tag     string // of the dollar quote, with both dollars
	depth   int    // of nested comments
	escapes bool   // the string is an E'' one
	word    bool   // the last character can belong to an identifier
}

type lexState byte

const (
	lexTop lexState = iota
	lexString
	lexName
	lexDollar
	lexComment
)

func (l *lexer) top() bool { return l.state == lexTop }

// feed reads one whole line.
func (l *lexer) feed(s string) {
	for i := 0; i < len(s); {
		switch l.state {
		case lexTop:
			i += l.atTop(s[i:], i > 0 && isE(s, i-1))
		case lexString:
			i += l.inString(s[i:])
		case lexName:
			if s[i] == '"' {
				l.state = lexTop // a doubled quote opens the next one at once
			}
			i++
		case lexDollar:
			n := strings.Index(s[i:], l.tag)
			if n < 0 {
				return
			}
			l.state, l.word = lexTop, false
			i += n + len(l.tag)
		case lexComment:
			i += l.inComment(s[i:])
		}
	}
	l.word = false
}

// isE reports whether s[i] is the E of an E” string: not the end of a longer word.
func isE(s string, i int) bool {
	return (s[i] == 'E' || s[i] == 'e') && (i == 0 || !wordByte(s[i-1]))
}

func wordByte(c byte) bool {
	return c == '_' || c == '$' || c >= 0x80 || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// atTop looks at what begins at s outside of everything and gives its length. afterE says that an E stands before it.
func (l *lexer) atTop(s string, afterE bool) int {
	word := l.word
	l.word = wordByte(s[0])
	switch {
	case s[0] == '\'':
		l.state, l.escapes = lexString, afterE
	case s[0] == '"':
		l.state = lexName
	case strings.HasPrefix(s, "--"):
		return len(s)
	case strings.HasPrefix(s, "/*"):
		l.state, l.depth = lexComment, 1
		return 2
	case s[0] == '$' && !word:
		if tag := dollarTag(s); tag != "" {
			l.state, l.tag = lexDollar, tag
			return len(tag)
		}
	}
	return 1
}

// dollarTag gives the $tag$ that s begins with, or "": $1 is a parameter.
func dollarTag(s string) string {
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '$':
			return s[:i+1]
		case !wordByte(s[i]), i == 1 && '0' <= s[i] && s[i] <= '9':
			return ""
		}
	}
	return ""
}

func (l *lexer) inString(s string) int {
	switch {
	case l.escapes && s[0] == '\\':
		return min(2, len(s))
	case strings.HasPrefix(s, "''"):
		return 2
	case s[0] == '\'':
		l.state = lexTop
	}
	return 1
}

func (l *lexer) inComment(s string) int {
	switch {
	case strings.HasPrefix(s, "/*"):
		l.depth++
		return 2
	case strings.HasPrefix(s, "*/"):
		if l.depth--; l.depth == 0 {
			l.state = lexTop
		}
		return 2
	}
	return 1
}
