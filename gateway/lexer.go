package gateway

import (
	"bytes"
	"slices"
	"strings"
)

// text is what must be known of an SQL text before it runs in TransactionMode. Whatever is not surely harmless is said to
// change something: then the server is asked after the transaction, and only its answer counts.
type text struct {
	probe bool // may change the session's state
	dirty bool // may change what the server cannot be asked for, such as a parameter whose name is nowhere seen
	unpin bool // may end what pins a session to its backend
	seq   bool // reads what the session left in sequences (currval, lastval)
	local bool // changes settings until the transaction ends

	pin        string   // pins the session, and the server cannot be asked whether it still does
	unprepared bool     // ends a prepared transaction
	customs    []string // parameters with a dot, which only those who know their names can read
	deallocate string   // the text is one DEALLOCATE of this name
	does       deed
	wrote      bool // one of its statements may write
	roams      bool // it may run at another site than the session's home (Config.Reads)
	statements int  // how many it has, if it was read

	seems   bool // it looks like a read; does says otherwise as far as the database's catalogs do (taint.go)
	escapes bool // a backslash in it quotes
}

// deed is what becomes of a text when its server is lost. Whatever is not surely something else is an opaque one.
type deed byte

const (
	reads     deed = iota // or changes no more than the session: it may run again
	begins                // BEGIN, maybe together with others that leave it open
	commits               // one COMMIT
	rollsBack             // one ROLLBACK of the whole transaction
	writes                // one statement that can be made to commit apart from its result
	batch                 // one or more that can be made to commit apart from their results, in a transaction block
	copies                // one COPY FROM, which can as well
	opaque                // commits with its result when no transaction is open
	tangled               // may end a transaction among others
)

// token is a piece of SQL. Its kind is one of these, or the character itself.
type token struct {
	kind       byte
	start, end int
}

const (
	tokEnd    = 0
	tokWord   = 'w' // keyword or name
	tokName   = 'q' // "name", U&"name", U&"name" UESCAPE 'x'
	tokHidden = 'h' // one of the latter that cannot be read
	tokString = 's' // 'text', $$text$$, E'text'
	tokNumber = 'n' // number or $1
)

// lexer cuts SQL into tokens as PostgreSQL does (src/backend/parser/scan.l), as far as it must to find where strings,
// comments and names begin and end. What does not end, ends with the text.
type lexer struct {
	src     []byte
	at      int
	escapes bool     // a backslash in '...' escapes: standard_conforming_strings is off
	lower   [64]byte // the word that was asked for last
}

func isSpace(c byte) bool {
	return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v'
}

func isNameStart(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_' || c >= 0x80
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isNamePart(c byte) bool { return isNameStart(c) || isDigit(c) || c == '$' }

func (l *lexer) peek(ahead int) byte {
	if l.at+ahead < len(l.src) {
		return l.src[l.at+ahead]
	}
	return 0
}

// next gives the next token after space and comments.
func (l *lexer) next() token {
	l.skipSpace()
	start := l.at
	if start >= len(l.src) {
		return token{tokEnd, start, start}
	}
	c := l.src[start]
	kind := c
	switch {
	case (c == 'e' || c == 'E') && l.peek(1) == '\'':
		l.at++
		l.quoted('\'', true)
		kind = tokString
	case (c == 'u' || c == 'U') && l.peek(1) == '&' && l.peek(2) == '"':
		kind = l.unicodeName()
	case isNameStart(c):
		for l.at < len(l.src) && isNamePart(l.src[l.at]) {
			l.at++
		}
		kind = tokWord
	case c == '\'':
		l.quoted('\'', l.escapes)
		kind = tokString
	case c == '"':
		l.quoted('"', false)
		kind = tokName
	case c == '$' && l.dollar():
		kind = tokString
	case isDigit(c) || c == '$' && isDigit(l.peek(1)):
		for l.at++; l.at < len(l.src) && (isNamePart(l.src[l.at]) || l.src[l.at] == '.'); l.at++ {
		}
		kind = tokNumber
	default:
		l.at++
	}
	return token{kind, start, l.at}
}

func (l *lexer) skipSpace() {
	for l.at < len(l.src) {
		switch c := l.src[l.at]; {
		case isSpace(c):
			l.at++
		case c == '-' && l.peek(1) == '-':
			if i := bytes.IndexAny(l.src[l.at:], "\r\n"); i >= 0 {
				l.at += i
			} else {
				l.at = len(l.src)
			}
		case c == '/' && l.peek(1) == '*':
			l.comment()
		default:
			return
		}
	}
}

// comment skips a comment, which may hold others.
func (l *lexer) comment() {
	depth := 0
	for l.at < len(l.src) {
		switch {
		case l.src[l.at] == '/' && l.peek(1) == '*':
			depth++
			l.at += 2
		case l.src[l.at] == '*' && l.peek(1) == '/':
			depth--
			l.at += 2
			if depth == 0 {
				return
			}
		default:
			l.at++
		}
	}
	l.at = len(l.src)
}

// quoted skips what begins and ends with q; two of them are one inside.
func (l *lexer) quoted(q byte, escapes bool) {
	for l.at++; l.at < len(l.src); l.at++ {
		switch c := l.src[l.at]; {
		case c == '\\' && escapes:
			l.at++
		case c == q && l.peek(1) == q:
			l.at++
		case c == q:
			l.at++
			return
		}
	}
	l.at = len(l.src)
}

// dollar skips $tag$...$tag$, if there is one.
func (l *lexer) dollar() bool {
	i := l.at + 1
	for i < len(l.src) && isNamePart(l.src[i]) && l.src[i] != '$' {
		i++
	}
	if i >= len(l.src) || l.src[i] != '$' || isDigit(l.src[l.at+1]) {
		return false
	}
	tag := l.src[l.at : i+1]
	if end := bytes.Index(l.src[i+1:], tag); end >= 0 {
		l.at = i + 1 + end + len(tag)
	} else {
		l.at = len(l.src)
	}
	return true
}

// word is a word in lower case, or the content of a "name", up to PostgreSQL's longest name. It is valid until the next
// call; other tokens are empty.
func (l *lexer) word(t token) []byte {
	s := l.src[t.start:t.end]
	switch t.kind {
	case tokWord:
		n := copy(l.lower[:], clip(s))
		for i, c := range l.lower[:n] {
			if c >= 'A' && c <= 'Z' {
				l.lower[i] = c + 'a' - 'A'
			}
		}
		return l.lower[:n]
	case tokName:
		return l.name(s)
	default:
		return nil
	}
}

// keyword is word for what is not quoted.
func (l *lexer) keyword(t token) string {
	if t.kind != tokWord {
		return ""
	}
	return string(l.word(t))
}

// literal is the value of a plain string.
func (l *lexer) literal(t token) (value string, ok bool) {
	s := l.src[t.start:t.end]
	if t.kind != tokString || len(s) < 2 || s[0] != '\'' || bytes.IndexByte(s, '\\') >= 0 {
		return "", false
	}
	return strings.ReplaceAll(string(s[1:len(s)-1]), "''", "'"), true
}

// words makes a set of words.
func words(s string) map[string]bool {
	m := map[string]bool{}
	for w := range strings.FieldsSeq(s) {
		m[w] = true
	}
	return m
}

// harmless begin statements that leave nothing in the session; what may lie inside them is looked for apart.
var harmless = words(`select insert update delete merge values table with copy show fetch move explain begin start commit end
	rollback abort savepoint release create comment grant revoke truncate vacuum analyze lock notify refresh cluster reindex
	checkpoint security reassign import`)

// knownCalls are words before a parenthesis that leave nothing in the session: keywords that cannot be the name of a
// function, and functions of PostgreSQL. One that is missing here costs a question to the server, and no more.
var knownCalls = words(`
	select values in any some all exists not and or as on using from where when then else case row array cast coalesce nullif
	greatest least check unique primary references default limit offset union intersect except lateral distinct returning grouping
	with group having varchar char character nchar numeric decimal dec bit time timestamp interval float

	count sum avg min max array_agg string_agg json_agg jsonb_agg json_object_agg jsonb_object_agg bool_and bool_or every
	stddev variance percentile_cont percentile_disc row_number rank dense_rank lag lead first_value last_value nth_value ntile
	abs ceil ceiling floor round trunc mod power sqrt exp ln log sign random pi sin cos tan width_bucket
	lower upper initcap length char_length octet_length substring substr position strpos replace translate trim ltrim rtrim btrim
	lpad rpad left right repeat reverse split_part concat concat_ws format md5 sha256 encode decode ascii chr to_hex quote_ident
	quote_literal quote_nullable regexp_replace regexp_match regexp_matches regexp_split_to_array starts_with overlay
	now current_timestamp localtimestamp clock_timestamp statement_timestamp transaction_timestamp age extract date_part date_trunc
	date_bin make_date make_timestamp make_interval to_char to_date to_number to_timestamp justify_days justify_hours
	unnest array_length array_append array_cat array_position array_remove array_to_string string_to_array cardinality array_upper
	generate_series generate_subscripts to_json to_jsonb json_build_object jsonb_build_object json_build_array jsonb_build_array
	row_to_json json_array_elements jsonb_array_elements jsonb_set jsonb_extract_path json_extract_path jsonb_path_query
	jsonb_each json_each jsonb_object_keys jsonb_array_length jsonb_typeof json_populate_record jsonb_to_recordset
	nextval setval gen_random_uuid hashtext hashtextextended version current_setting current_database current_schema
	pg_sleep pg_backend_pid pg_typeof pg_size_pretty pg_relation_size pg_total_relation_size pg_database_size pg_is_in_recovery
	pg_notify obj_description col_description pg_get_expr pg_get_constraintdef pg_get_indexdef pg_get_viewdef pg_get_userbyid
	pg_table_is_visible pg_encoding_to_char format_type has_table_privilege txid_current pg_current_xact_id
	to_tsvector to_tsquery plainto_tsquery websearch_to_tsquery ts_rank setweight`)

// readText looks through an SQL text of any number of statements.
func readText(sql []byte, escapes bool) text {
	l := lexer{src: sql, escapes: escapes}
	var t text
	var last [4]token // the token before comes first
	start := true
	var whole deed // of the statements before
	count := 0     // of them
	next := func() {
		if last == [4]token{} {
			return
		}
		t.wrote = t.wrote || t.does >= writes
		if count++; count > 1 {
			t.does = together(whole, t.does)
		}
		t.statements = count
		whole, t.does = t.does, reads
	}
	for {
		tok := l.next()
		switch {
		case tok.kind == tokEnd:
			next()
			t.does = whole
			return t
		case tok.kind == ';':
			next()
			start = true
			last = [4]token{}
			continue
		case tok.kind == '(':
			t.call(&l, last)
		case tok.kind == tokWord && start:
			t.statement(&l, tok, last == [4]token{} && isBlank(sql[:tok.start]))
		case tok.kind == tokWord:
			switch sql[tok.start] | 0x20 { // the words that inside looks for
			case 't', 'p', 'e', 'i', 'u', 'd', 'm':
				t.inside(l.word(tok))
			}
		case tok.kind == tokName && bytes.HasPrefix(l.word(tok), []byte("pg_temp")):
			t.probe = true
		case tok.kind == tokHidden:
			t.unknownCall()
			t.pin = hiddenName
		}
		// A statement may begin with parentheses.
		start = start && tok.kind == '('
		last = [4]token{tok, last[0], last[1], last[2]}
	}
}

// together is what two statements in one text do, that commit together if no transaction is open.
func together(a, b deed) deed {
	switch {
	case a == reads && b == reads:
		return reads
	case a <= batch && b <= batch && isInner(a) && isInner(b):
		return batch
	case isInner(a) && isInner(b):
		return opaque
	case a == begins && isInner(b), isInner(a) && b == begins:
		return begins // which leaves it open
	default:
		return tangled
	}
}

// isInner reports that a statement neither begins nor ends a transaction.
func isInner(d deed) bool { return d == reads || d >= writes && d <= opaque }

// deedOf judges a statement by its first word; what lies inside it may make a writing one of it.
func deedOf(l *lexer, first []byte) deed {
	switch string(first) {
	case "select", "values", "table", "with", "show", "explain", "set", "reset", "discard", "deallocate", "declare", "fetch", "move", "close",
		"savepoint", "release", "listen", "unlisten", "notify", "lock":
		return reads
	case "insert", "update", "delete", "merge", "truncate":
		return writes
	case "copy":
		return copyOf(l)
	case "create", "alter", "drop", "comment", "grant", "revoke":
		return definitionOf(l, string(first))
	case "prepare":
		if l.keyword(l.next()) == "transaction" {
			return tangled
		}
		return reads
	case "begin", "start":
		return begins
	case "commit", "end", "rollback", "abort":
		return endOf(l, string(first) == "rollback" || string(first) == "abort")
	}
	return opaque
}

// inBlock are the words after CREATE, ALTER or DROP of what may be done in a transaction block.
var inBlock = words("table view materialized schema sequence function procedure trigger type domain policy rule aggregate index unique or extension")

// definitionOf judges a statement that changes definitions.
func definitionOf(l *lexer, first string) deed {
	switch first {
	case "comment", "grant", "revoke":
		return batch
	}
	if !inBlock[string(l.word(l.next()))] {
		return opaque
	}
	for tok := l.next(); tok.kind != tokEnd && tok.kind != ';'; tok = l.next() {
		if tok.kind == tokWord && string(l.word(tok)) == "concurrently" {
			return opaque
		}
	}
	return batch
}

// copyOf judges what follows COPY.
func copyOf(l *lexer) deed {
	for depth := 0; ; {
		tok := l.next()
		switch {
		case tok.kind == tokEnd || tok.kind == ';':
			return opaque
		case tok.kind == '(':
			depth++
		case tok.kind == ')':
			depth--
		case depth > 0 || tok.kind != tokWord:
		case string(l.word(tok)) == "from":
			return copies
		case string(l.word(tok)) == "to":
			return reads
		}
	}
}

// endOf judges what follows COMMIT or ROLLBACK.
func endOf(l *lexer, back bool) deed {
	tok := l.next()
	w := string(l.word(tok))
	if w == "work" || w == "transaction" {
		tok = l.next()
		w = string(l.word(tok))
	}
	if w == "and" { // [NO] CHAIN
		if string(l.word(l.next())) != "no" {
			return tangled
		}
		l.next()
		tok = l.next()
	}
	switch {
	case back && w == "to":
		return reads
	case tok.kind != tokEnd && tok.kind != ';':
		return tangled
	case back:
		return rollsBack
	}
	return commits
}

func isBlank(b []byte) bool {
	l := lexer{src: b}
	return l.next().kind == tokEnd
}

// statement judges a statement by its first word.
func (t *text) statement(l *lexer, first token, only bool) {
	ahead := *l // what follows is looked at and read again
	w := l.word(first)
	again := *l
	t.does = max(t.does, deedOf(&again, w))
	switch string(w) {
	case "set":
		t.set(&ahead)
	case "do":
		t.probe, t.dirty = true, true
		t.code(&ahead)
	case "call", "execute":
		t.probe, t.dirty = true, true
	case "reset", "discard", "listen", "unlisten", "declare", "close":
		t.probe = true
	case "deallocate":
		t.probe = true
		if only {
			t.deallocate = deallocated(&ahead)
		}
	case "prepare":
		if ahead.keyword(ahead.next()) == "transaction" {
			t.pin = "PREPARE TRANSACTION"
		} else {
			t.probe = true
		}
	case "load":
		t.pin = "LOAD"
	case "drop", "alter":
		t.unpin = true
	case "commit", "rollback":
		t.unprepared = t.unprepared || string(ahead.word(ahead.next())) == "prepared"
	default:
		if !harmless[string(w)] {
			t.probe, t.dirty = true, true
		}
	}
}

// inside judges a word that is not a statement's first.
func (t *text) inside(w []byte) {
	switch {
	case string(w) == "temp", string(w) == "temporary", bytes.HasPrefix(w, []byte("pg_temp")):
		t.probe = true
	case string(w) == "execute":
		t.probe, t.dirty = true, true
		t.does = max(t.does, opaque)
	case string(w) == "insert", string(w) == "update", string(w) == "delete", string(w) == "merge", string(w) == "into":
		t.write()
	}
}

// set judges what follows SET.
func (t *text) set(l *lexer) {
	tok, next := l.next(), l.next()
	if next.kind != '.' { // which makes these words the beginning of a parameter's name
		switch l.keyword(tok) {
		case "local", "transaction", "constraints":
			t.local = true
			return
		case "session":
			tok, next = next, l.next()
		}
	}
	t.probe = true
	parts := []string{string(l.word(tok))}
	for ; next.kind == '.'; next = l.next() {
		parts = append(parts, string(l.word(l.next())))
	}
	if name := strings.ToLower(strings.Join(parts, ".")); strings.Contains(name, ".") { // one "name" may hold it as well
		t.customs = append(t.customs, name)
	}
}

// code judges the code in the strings of a DO, as far as it names parameters.
func (t *text) code(l *lexer) {
	for tok := l.next(); tok.kind != tokEnd && tok.kind != ';'; tok = l.next() {
		if tok.kind != tokString {
			continue
		}
		body := l.src[tok.start:tok.end]
		if i := bytes.IndexByte(body[1:], '$'); body[0] == '$' && i >= 0 {
			body = body[i+2:]
		} else {
			body = bytes.ReplaceAll(bytes.TrimLeft(body, "eE'"), []byte("''"), []byte("'"))
		}
		inner := readText(body, l.escapes)
		for words := (lexer{src: body, escapes: l.escapes}); ; {
			w := words.next()
			if w.kind == tokEnd {
				break
			}
			if w.kind == tokWord && string(words.word(w)) == "set" {
				ahead := words
				inner.set(&ahead)
			}
		}
		for _, name := range inner.customs {
			if !slices.Contains(t.customs, name) {
				t.customs = append(t.customs, name)
			}
		}
		if t.pin == "" {
			t.pin = inner.pin
		}
	}
}

// deallocated gives the name in a DEALLOCATE that is the whole rest of the text.
func deallocated(l *lexer) string {
	tok := l.next()
	if l.keyword(tok) == "prepare" {
		tok = l.next()
	}
	if l.keyword(tok) == "all" {
		return ""
	}
	name := string(l.word(tok))
	if tok = l.next(); tok.kind == ';' {
		tok = l.next()
	}
	if tok.kind != tokEnd {
		return ""
	}
	return name
}

// call judges what is before a parenthesis: nothing, a keyword, or a function's name.
func (t *text) call(l *lexer, last [4]token) {
	if last[0].kind != tokWord && last[0].kind != tokName {
		return
	}
	before := last[1]
	qualified := last[1].kind == '.'
	builtin := !qualified || string(l.word(last[2])) == "pg_catalog"
	if qualified {
		before = last[3]
	}
	if w := string(l.word(before)); before.kind == tokWord && (w == "into" || w == "copy" || w == "table" || w == "exists" || w == "references") {
		return // INSERT INTO table (columns), COPY table (columns), CREATE TABLE IF NOT EXISTS table (...)
	}
	name := l.word(last[0])
	switch {
	case before == token{} && !qualified: // EXPLAIN (ANALYZE), COPY (SELECT ...): no statement begins with a call
	case !builtin:
		t.unknownCall()
	case !qualified && last[0].kind == tokWord && isClause(name, before, *l):
	case string(name) == "set_config":
		t.setConfig(*l)
	case string(name) == "currval", string(name) == "lastval":
		t.seq = true
	case bytes.HasPrefix(name, []byte("pg_advisory_")), bytes.HasPrefix(name, []byte("pg_try_advisory_")):
		t.probe = t.probe || !bytes.Contains(name, []byte("_xact_"))
	case bytes.HasPrefix(name, []byte("dblink_connect")):
		t.pin = "a connection of dblink"
	case string(name) == "setval":
		t.write()
	case last[0].kind != tokWord && !qualified, !knownCalls[string(name)]: // quoted, a keyword is any name
		t.unknownCall()
	}
}

// unknownCall notes a function of which nothing is known.
func (t *text) unknownCall() {
	t.probe, t.dirty = true, true
	t.write()
}

// write notes that a statement does more than read.
func (t *text) write() {
	if t.does == reads {
		t.does = writes
	}
}

// clauses are those keywords.
var clauses = words("over filter conflict join")

// isClause tells keywords before a parenthesis that could be a function's name, by what is before them. l is a copy: name
// lies in the other.
func isClause(name []byte, before token, l lexer) bool {
	switch string(name) {
	case "over", "filter":
		return before.kind == ')'
	case "conflict":
		return before.kind == tokWord && string(l.word(before)) == "on"
	case "join":
		return before.kind == ')' || before.kind == tokName || before.kind == tokWord && !knownCalls[string(l.word(before))]
	}
	return false
}

// setConfig judges the arguments of set_config(name, value, is_local), of which l stands at the first.
func (t *text) setConfig(l lexer) {
	first := l.next()
	name, plain := l.literal(first)
	depth, argument := 0, 0
	tok := first
	if plain { // It could still be the beginning of an expression.
		tok = l.next()
		plain = tok.kind == ','
	}
	var last token
	alone := 0 // tokens in the last argument
	for ; tok.kind != tokEnd && depth >= 0; tok = l.next() {
		switch {
		case tok.kind == '(':
			depth++
		case tok.kind == ')':
			depth--
		case tok.kind == ',' && depth == 0:
			argument++
			alone = 0
			continue
		}
		if depth >= 0 {
			last = tok
			alone++
		}
	}
	if argument == 2 && alone == 1 && last.kind == tokWord && string(l.word(last)) == "true" {
		t.local = true
		return
	}
	t.probe = true
	switch {
	case !plain:
		t.pin = "set_config with a name that cannot be seen"
	case strings.Contains(name, "."):
		t.customs = append(t.customs, strings.ToLower(name))
	}
}
