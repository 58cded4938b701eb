package gateway

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// AdminDatabase is the name of a database that is no server's: who connects to it asks the gateway, in the language of
// PgBouncer's console.
const AdminDatabase = "duri"

// adminAlias is PgBouncer's name for it, which some tools have built in.
const adminAlias = "pgbouncer"

// adminsMore is how many connections beyond ClientsMax may be there for administrators.
const adminsMore = 5

// spoken is the version of PgBouncer whose console this one is like. Tools look for it.
const spoken = "1.18.0"

// runAdmin serves an administrator.
func (s *session) runAdmin(ctx context.Context) {
	if !slices.Contains(s.g.lim().Admins, s.who.User) {
		err := fatalError("42501", fmt.Sprintf("role %q may not use the gateway's own database %q", s.who.User, AdminDatabase), "", "name it in gateway.admins")
		s.refuse(err)
		return
	}
	params := []pgwire.Param{
		{Name: "server_version", Value: spoken + "/duri"},
		{Name: "client_encoding", Value: "UTF8"},
		{Name: "server_encoding", Value: "UTF8"},
		{Name: "DateStyle", Value: "ISO, MDY"},
		{Name: "TimeZone", Value: "UTC"},
		{Name: "integer_datetimes", Value: "on"},
		{Name: "standard_conforming_strings", Value: "on"},
		{Name: "is_superuser", Value: "off"},
	}
	if err := s.begin(params); err != nil {
		s.refuse(err)
		return
	}
	c := &console{s: s, statements: map[string]string{}, portals: map[string]*portal{}}
	if err := c.run(ctx); err != nil || s.g.ending.Load() {
		s.refuse(err)
	}
}

// console is the session of an administrator.
type console struct {
	s          *session
	statements map[string]string
	portals    map[string]*portal
	out        []byte
	skip       bool // up to the next Sync, after an error
	block      byte // status in ReadyForQuery
}

// portal is a command that was bound.
type portal struct {
	sql     string
	formats []uint16
}

// answer is what a command gives: columns, if it is a SHOW, or only a tag.
type answer struct {
	table  *table
	tag    string
	notice *pgwire.Error
	block  byte // the status afterwards; 0: as before
}

func (c *console) run(ctx context.Context) error {
	c.block = pgwire.Idle
	for {
		typ, err := c.s.nextAlone()
		if err != nil {
			return c.s.readError(err)
		}
		if typ == pgwire.Terminate {
			return nil
		}
		if c.skip && typ != pgwire.Sync {
			continue
		}
		body, err := c.s.r.Body(textMax)
		if err == nil {
			err = c.message(ctx, typ, body)
		}
		if err != nil {
			return c.s.readError(err)
		}
		if typ == pgwire.Query || typ == pgwire.Sync || typ == pgwire.Flush {
			if err := c.s.send(c.out); err != nil {
				return nil // The client has gone.
			}
			c.out = c.out[:0]
		}
	}
}

// message answers one message. An error ends the session; what is wrong with a command does not.
func (c *console) message(ctx context.Context, typ byte, body []byte) error {
	var bad error
	switch typ {
	case pgwire.Query:
		sql, err := pgwire.ParseQuery(body)
		if err != nil {
			return err
		}
		bad = c.query(ctx, string(sql))
		if bad != nil {
			c.fail(bad)
		}
		c.out = pgwire.AppendReadyForQuery(c.out, c.block)
		return nil
	case pgwire.Sync:
		c.skip = false
		c.out = pgwire.AppendReadyForQuery(c.out, c.block)
		return nil
	case pgwire.Flush:
		return nil
	case pgwire.Parse:
		p, err := pgwire.ParseParse(body)
		if err != nil {
			return err
		}
		bad = c.parse(p)
	case pgwire.Bind:
		bad = c.bind(body)
	case pgwire.Describe, pgwire.Close:
		kind, name, err := pgwire.ParseTarget(body)
		if err != nil {
			return err
		}
		bad = c.target(typ, kind, string(name))
	case pgwire.Execute:
		name, _, err := pgwire.ParseExecute(body)
		if err != nil {
			return err
		}
		bad = c.execute(ctx, string(name))
	default:
		bad = adminError(codeUnsupported, fmt.Sprintf("the gateway's own database takes no message of type %q", typ), "send a command as a query")
	}
	if bad != nil {
		c.fail(bad)
		c.skip = true
	}
	return nil
}

func (c *console) fail(err error) {
	e, ok := asWireError(err)
	if !ok {
		e = adminError("XX000", err.Error(), hintOf(err))
	}
	c.out = pgwire.AppendError(c.out, e)
}

// query answers a Query, which may hold several commands.
func (c *console) query(ctx context.Context, sql string) error {
	commands := split(sql)
	if len(commands) == 0 {
		c.out = pgwire.AppendMessage(c.out, pgwire.EmptyQueryResponse, nil)
	}
	for _, words := range commands {
		a, err := c.command(ctx, words)
		if err != nil {
			return err
		}
		if a.table != nil {
			c.out = a.table.appendDescription(c.out, nil)
		}
		if err := c.give(a, nil); err != nil {
			return err
		}
	}
	return nil
}

// give appends what a command answers, without the description of columns.
func (c *console) give(a *answer, formats []uint16) error {
	if a.notice != nil {
		c.out = pgwire.AppendNotice(c.out, a.notice)
	}
	if a.table != nil {
		for _, row := range a.table.rows {
			var err error
			if c.out, err = a.table.appendRow(c.out, row, formats); err != nil {
				return err
			}
		}
	}
	if a.block != 0 {
		c.block = a.block
	}
	c.out = pgwire.AppendMessage(c.out, pgwire.CommandComplete, append([]byte(a.tag), 0))
	return nil
}

// parse keeps a command. Whether it is one is seen here, as a server would.
func (c *console) parse(p pgwire.Statement) error {
	sql := string(p.SQL)
	commands := split(sql)
	if len(commands) > 1 {
		return adminError("42601", "cannot insert multiple commands into a prepared statement", "")
	}
	if binary.BigEndian.Uint16(p.OIDs) > 0 {
		return adminError(codeUnsupported, "commands of the gateway have no parameters", "write the command out")
	}
	if len(commands) == 1 {
		if err := c.possible(commands[0]); err != nil {
			return err
		}
	}
	c.statements[string(p.Name)] = sql
	c.out = pgwire.AppendMessage(c.out, pgwire.ParseComplete, nil)
	return nil
}

func (c *console) bind(body []byte) error {
	name, statement, n, ok := pgwire.ParseBind(body)
	if !ok {
		return &pgwire.ProtocolError{What: "a Bind without names"}
	}
	sql, ok := c.statements[string(statement)]
	if !ok {
		return adminError("26000", fmt.Sprintf("prepared statement %q does not exist", statement), "")
	}
	_, rest, ok := shorts(body[n:]) // formats of parameters
	if !ok || len(rest) < 2 {
		return adminError(codeProtocol, "a Bind that ends early", "")
	}
	if binary.BigEndian.Uint16(rest) > 0 {
		return adminError(codeUnsupported, "commands of the gateway have no parameters", "write the command out")
	}
	formats, _, ok := shorts(rest[2:])
	if !ok {
		return adminError(codeProtocol, "a Bind that ends early", "")
	}
	c.portals[string(name)] = &portal{sql, formats}
	c.out = pgwire.AppendMessage(c.out, pgwire.BindComplete, nil)
	return nil
}

// shorts reads a number of 16-bit values.
func shorts(b []byte) (values []uint16, rest []byte, ok bool) {
	if len(b) < 2 {
		return nil, nil, false
	}
	n, b := int(binary.BigEndian.Uint16(b)), b[2:]
	if len(b) < 2*n {
		return nil, nil, false
	}
	for i := range n {
		values = append(values, binary.BigEndian.Uint16(b[2*i:]))
	}
	return values, b[2*n:], true
}

// target answers a Describe or Close.
func (c *console) target(typ, kind byte, name string) error {
	if typ == pgwire.Close {
		if kind == 'S' {
			delete(c.statements, name)
		} else {
			delete(c.portals, name)
		}
		c.out = pgwire.AppendMessage(c.out, pgwire.CloseComplete, nil)
		return nil
	}
	var sql string
	var formats []uint16
	if kind == 'S' {
		var ok bool
		if sql, ok = c.statements[name]; !ok {
			return adminError("26000", fmt.Sprintf("prepared statement %q does not exist", name), "")
		}
		c.out = pgwire.AppendMessage(c.out, pgwire.ParameterDescription, []byte{0, 0})
	} else {
		p := c.portals[name]
		if p == nil {
			return adminError("34000", fmt.Sprintf("portal %q does not exist", name), "")
		}
		sql, formats = p.sql, p.formats
	}
	if t := described(split(sql)); t != nil {
		c.out = t.appendDescription(c.out, formats)
	} else {
		c.out = pgwire.AppendMessage(c.out, pgwire.NoData, nil)
	}
	return nil
}

func (c *console) execute(ctx context.Context, name string) error {
	p := c.portals[name]
	if p == nil {
		return adminError("34000", fmt.Sprintf("portal %q does not exist", name), "")
	}
	commands := split(p.sql)
	if len(commands) == 0 {
		c.out = pgwire.AppendMessage(c.out, pgwire.EmptyQueryResponse, nil)
		return nil
	}
	a, err := c.command(ctx, commands[0])
	if err != nil {
		return err
	}
	return c.give(a, p.formats)
}

// split cuts a text into commands, and these into words: the first in lower case, names and strings without their quotes.
func split(sql string) (commands [][]string) {
	l := lexer{src: []byte(sql)}
	var words []string
	for {
		t := l.next()
		switch t.kind {
		case tokEnd, ';':
			if len(words) > 0 {
				commands = append(commands, words)
			}
			if t.kind == tokEnd {
				return commands
			}
			words = nil
		case tokName:
			words = append(words, strings.ReplaceAll(sql[t.start+1:max(t.start+1, t.end-1)], `""`, `"`))
		case tokString:
			v, ok := l.literal(t)
			if !ok {
				v = sql[t.start:t.end]
			}
			words = append(words, v)
		default:
			words = append(words, sql[t.start:t.end])
			if len(words) == 1 {
				words[0] = strings.ToLower(words[0])
			}
		}
	}
}

// shown is what a SHOW asks for.
func shown(words []string) (show, bool) {
	s, ok := shows[strings.ToLower(strings.Join(words[1:], ""))]
	return s, ok
}

// possible says what is wrong with a command before it is carried out.
func (c *console) possible(words []string) error {
	name := func(most int) error {
		if len(words) > most {
			return unknownCommand(words)
		}
		return nil
	}
	switch words[0] {
	case "show":
		if _, ok := shown(words); !ok {
			return unknownCommand(words)
		}
		return nil
	case "pause", "resume", "reconnect", "wait_close", "kill", "disable", "enable":
		return name(2)
	case "reload":
		return name(1)
	case "begin", "start", "commit", "end", "rollback", "abort", "discard", "set", "reset", "deallocate":
		return nil
	case "shutdown", "suspend":
		return adminError(codeUnsupported, fmt.Sprintf("%s is not for the gateway's own database", strings.ToUpper(words[0])), "PAUSE holds clients; SIGTERM to the process ends the gateway")
	}
	return unknownCommand(words)
}

func unknownCommand(words []string) error {
	return adminError("42601", fmt.Sprintf("invalid command '%s', use SHOW HELP;", strings.ToUpper(strings.Join(words, " "))), "")
}

// clientSettings are parameters that drivers set after their login. They mean nothing here.
var clientSettings = words(`application_name extra_float_digits client_encoding datestyle intervalstyle timezone time names
	standard_conforming_strings client_min_messages search_path statement_timeout lock_timeout idle_in_transaction_session_timeout
	transaction bytea_output`)

// forClient reports whether what stands behind SET is something that drivers set.
func forClient(words []string) bool {
	for i, w := range words {
		w = strings.ToLower(w)
		if w != "local" && (w != "session" || i+1 == len(words)) {
			return clientSettings[w] || w == "characteristics"
		}
	}
	return false
}

// command carries a command out.
func (c *console) command(ctx context.Context, words []string) (*answer, error) {
	if err := c.possible(words); err != nil {
		return nil, err
	}
	g, verb := c.s.g, words[0]
	a := &answer{tag: strings.ToUpper(verb)}
	switch verb {
	case "show":
		s, _ := shown(words)
		if s.rows == nil {
			a.notice = &pgwire.Error{Severity: "NOTICE", Code: "00000", Message: "Console usage", Detail: help}
			return a, nil
		}
		a.table = &table{columns: s.columns, rows: s.rows(g)}
	case "begin", "start":
		a.tag, a.block = "BEGIN", pgwire.InBlock
	case "commit", "end":
		a.tag, a.block = "COMMIT", pgwire.Idle
	case "rollback", "abort":
		a.tag, a.block = "ROLLBACK", pgwire.Idle
	case "set":
		if !forClient(words[1:]) {
			return nil, adminError(codeUnsupported, "SET changes nothing here", "change duri.yaml, and RELOAD")
		}
	case "discard", "reset", "deallocate":
		if verb != "reset" && strings.EqualFold(words[len(words)-1], "all") {
			clear(c.statements)
			a.tag += " ALL"
		}
	case "reload":
		if g.cfg.Reload == nil {
			return nil, adminError(codeUnsupported, "this gateway has no configuration to read again", "")
		}
		if err := g.cfg.Reload(); err != nil {
			return nil, adminError("F0000", "the configuration was not taken: "+err.Error(), hintOf(err))
		}
	default:
		database := everyDatabase
		if len(words) > 1 {
			database = words[1]
		}
		ctx, stop := context.WithCancel(ctx)
		defer stop()
		end := func() { stop() }
		c.s.command.Store(&end)
		defer c.s.command.Store(nil)
		note, err := g.order(ctx, verb, database)
		if err != nil {
			return nil, err
		}
		if note != "" {
			a.notice = &pgwire.Error{Severity: "NOTICE", Code: "00000", Message: note}
		}
	}
	return a, nil
}

// described gives the columns of a command's answer; nil: it has none.
func described(commands [][]string) *table {
	if len(commands) == 0 || commands[0][0] != "show" {
		return nil
	}
	s, ok := shown(commands[0])
	if !ok || s.rows == nil {
		return nil
	}
	return &table{columns: s.columns}
}

// OIDs of types (src/include/catalog/pg_type.dat).
const (
	oidInt8    = 20
	oidInt4    = 23
	oidText    = 25
	oidNumeric = 1700
)

type column struct {
	name string
	oid  uint32
}

// table is what a SHOW gives. Values are nil, string, bool (as PgBouncer's 0 and 1) or an integer.
type table struct {
	columns []column
	rows    [][]any
}

func formatOf(formats []uint16, i int) uint16 {
	switch {
	case len(formats) == 1:
		return formats[0]
	case i < len(formats):
		return formats[i]
	}
	return 0
}

func (t *table) appendDescription(dst []byte, formats []uint16) []byte {
	var b []byte
	b = binary.BigEndian.AppendUint16(b, uint16(len(t.columns)))
	for i, c := range t.columns {
		size := int16(-1)
		switch c.oid {
		case oidInt4:
			size = 4
		case oidInt8:
			size = 8
		}
		b = append(append(b, c.name...), 0)
		b = append(b, 0, 0, 0, 0, 0, 0) // of no table
		b = binary.BigEndian.AppendUint32(b, c.oid)
		b = binary.BigEndian.AppendUint16(b, uint16(size))
		b = append(b, 0xff, 0xff, 0xff, 0xff)
		b = binary.BigEndian.AppendUint16(b, formatOf(formats, i))
	}
	return pgwire.AppendMessage(dst, pgwire.RowDescription, b)
}

func (t *table) appendRow(dst []byte, row []any, formats []uint16) ([]byte, error) {
	var b []byte
	b = binary.BigEndian.AppendUint16(b, uint16(len(row)))
	for i, v := range row {
		if v == nil {
			b = append(b, 0xff, 0xff, 0xff, 0xff)
			continue
		}
		value, err := encode(v, t.columns[i].oid, formatOf(formats, i))
		if err != nil {
			return dst, err
		}
		b = binary.BigEndian.AppendUint32(b, uint32(len(value)))
		b = append(b, value...)
	}
	return pgwire.AppendMessage(dst, pgwire.DataRow, b), nil
}

// encode writes a value as its column's type wants it.
func encode(v any, oid uint32, format uint16) ([]byte, error) {
	if s, ok := v.(string); ok {
		return []byte(s), nil // the same in both formats
	}
	var n int64
	switch v := v.(type) {
	case bool:
		if v {
			n = 1
		}
	case int:
		n = int64(v)
	case int64:
		n = v
	case uint64:
		n = int64(min(v, 1<<63-1))
	default:
		return nil, fmt.Errorf("a value of type %T", v)
	}
	if oid == oidInt4 {
		n = min(max(n, -1<<31), 1<<31-1)
	}
	if format == 0 {
		return strconv.AppendInt(nil, n, 10), nil
	}
	switch oid {
	case oidInt4:
		return binary.BigEndian.AppendUint32(nil, uint32(n)), nil
	case oidInt8:
		return binary.BigEndian.AppendUint64(nil, uint64(n)), nil
	case oidNumeric:
		return binaryNumeric(n), nil
	}
	return strconv.AppendInt(nil, n, 10), nil
}

// binaryNumeric is a whole number that is not negative as numeric_send writes it: digits to the base 10000.
func binaryNumeric(n int64) []byte {
	n = max(n, 0)
	var digits []uint16
	for rest := n; rest > 0; rest /= 10_000 {
		digits = append(digits, uint16(rest%10_000))
	}
	slices.Reverse(digits)
	b := binary.BigEndian.AppendUint16(nil, uint16(len(digits)))
	b = binary.BigEndian.AppendUint16(b, uint16(max(0, len(digits)-1))) // weight of the first
	b = append(b, 0, 0, 0, 0)                                           // sign, scale
	for _, d := range digits {
		b = binary.BigEndian.AppendUint16(b, d)
	}
	return b
}

// clock is how points in time are shown, as PgBouncer does, in UTC.
func clock(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }
