package gateway

import (
	"bytes"
	"unicode/utf8"

	"github.com/duri-io/duri/pgwire"
)

// A name may be written in several ways. What is known by its name must be recognised in each of them, else a statement is taken for
// one that is harmless.

// hiddenName is why a session keeps its backend that has sent a name which cannot be read.
const hiddenName = "a name in Unicode escapes that cannot be read"

// clip cuts what is too long for a name, between two characters.
func clip(s []byte) []byte {
	if len(s) <= pgwire.NameMax {
		return s
	}
	n := pgwire.NameMax
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// unicodeName skips U&"name" and what follows it as a part of it. tokHidden: PostgreSQL refuses it, or reads it in a way that is not
// followed here. It does not call next, which calls it: what is recursive allocates.
func (l *lexer) unicodeName() byte {
	start := l.at
	l.at += 2
	l.quoted('"', false)
	after := *l
	if after.uescape() {
		l.at = after.at
	}
	if _, ok := after.unescaped(l.src[start:l.at]); !ok { // not by l, whose latest word may be in use
		return tokHidden
	}
	return tokName
}

// uescape skips UESCAPE 'x', if it is there.
func (l *lexer) uescape() bool {
	const word = "uescape"
	l.skipSpace()
	rest := l.src[l.at:]
	if len(rest) < len(word) || !bytes.EqualFold(rest[:len(word)], []byte(word)) || len(rest) > len(word) && isNamePart(rest[len(word)]) {
		return false
	}
	l.at += len(word)
	l.skipSpace()
	if l.peek(0) == '\'' {
		l.quoted('\'', false)
	}
	return true
}

// name is the content of a quoted name, as PostgreSQL keeps it.
func (l *lexer) name(s []byte) []byte {
	if s[0] != '"' {
		name, _ := l.unescaped(s)
		return name
	}
	inner := s[1:]
	if n := len(inner); n > 0 && inner[n-1] == '"' { // else it does not end
		inner = inner[:n-1]
	}
	if bytes.IndexByte(inner, '"') >= 0 {
		inner = bytes.ReplaceAll(inner, []byte(`""`), []byte(`"`))
	}
	return clip(inner)
}

// unescaped is the content of U&"name", maybe with UESCAPE behind it (src/backend/parser/parser.c, str_udeescape).
func (l *lexer) unescaped(s []byte) (name []byte, ok bool) {
	escape := byte('\\')
	in := lexer{src: s, at: 2}
	in.quoted('"', false)
	inner := s[2:in.at]
	if len(inner) < 3 || inner[len(inner)-1] != '"' { // empty, or without an end
		return nil, false
	}
	inner = bytes.ReplaceAll(inner[1:len(inner)-1], []byte(`""`), []byte(`"`))
	if in.uescape() {
		said := s[max(0, len(s)-3):] // the token ends with it
		if said[0] != '\'' || said[2] != '\'' || !mayEscape(said[1]) {
			return nil, false
		}
		escape = said[1]
	}
	name = l.lower[:0] // which grows if it must
	for high := rune(0); len(inner) > 0 || high > 0; {
		r, size := escaped(inner, escape)
		switch {
		case size < 0:
			return nil, false
		case high > 0:
			if r < 0xDC00 || r > 0xDFFF {
				return nil, false
			}
			r, high = 0x10000+(high-0xD800)<<10+(r-0xDC00), 0
			name = utf8.AppendRune(name, r)
		case size <= 1: // not escaped
			name = append(name, inner[0])
			size = 1
		case r >= 0xD800 && r <= 0xDBFF:
			high = r
		case r == 0 || r > utf8.MaxRune || r >= 0xDC00 && r <= 0xDFFF:
			return nil, false
		default:
			name = utf8.AppendRune(name, r)
		}
		inner = inner[size:]
	}
	return clip(name), true
}

// escaped reads an escape at the beginning of s. size is 0 if there is none, negative if it is wrong; for a doubled escape character
// it is 2.
func escaped(s []byte, escape byte) (r rune, size int) {
	if len(s) == 0 || s[0] != escape {
		return 0, 0
	}
	from, digits := 1, 4
	switch {
	case len(s) > 1 && s[1] == escape:
		return rune(escape), 2
	case len(s) > 1 && s[1] == '+':
		from, digits = 2, 6
	}
	if len(s) < from+digits {
		return 0, -1
	}
	for _, c := range s[from : from+digits] {
		d := hexDigit(c)
		if d < 0 {
			return 0, -1
		}
		r = r<<4 | rune(d)
	}
	return r, from + digits
}

func hexDigit(c byte) int {
	switch {
	case isDigit(c):
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// mayEscape reports that PostgreSQL takes a character after UESCAPE.
func mayEscape(c byte) bool {
	return hexDigit(c) < 0 && c != '+' && c != '\'' && c != '"' && !isSpace(c) && c < utf8.RuneSelf
}

// namesBeyondASCII reports that a text has names whose bytes differ between encodings. Those of the database are known in UTF8.
func namesBeyondASCII(sql []byte, escapes bool) bool {
	beyond := func(s []byte) bool { return bytes.ContainsFunc(s, func(r rune) bool { return r >= utf8.RuneSelf }) }
	if !beyond(sql) {
		return false
	}
	l := lexer{src: sql, escapes: escapes}
	for tok := l.next(); tok.kind != tokEnd; tok = l.next() {
		if (tok.kind == tokWord || tok.kind == tokName) && beyond(l.src[tok.start:tok.end]) {
			return true
		}
	}
	return false
}
