package cut

import (
	"encoding/binary"
	"strings"

	"github.com/duri-io/duri/pgwire"
)

// message is one of a script's. In its texts, $c is the number of the client, by which its rows are told from others'.
type message struct {
	typ        byte
	name, text string // of statement or portal; SQL, data, or the statement that is bound
	args       []string
	rows       uint32 // Execute: the most
	of         byte   // Describe, Close: S or P
}

// The words of the script language.

func query(sql string) message { return message{typ: pgwire.Query, text: sql} }

func parse(name, sql string) message     { return message{typ: pgwire.Parse, name: name, text: sql} }
func describeStatement(n string) message { return message{typ: pgwire.Describe, of: 'S', name: n} }
func describePortal(n string) message    { return message{typ: pgwire.Describe, of: 'P', name: n} }
func closeStatement(n string) message    { return message{typ: pgwire.Close, of: 'S', name: n} }
func execute(portal string) message      { return message{typ: pgwire.Execute, name: portal} }
func fetch(portal string, n uint32) message {
	return message{typ: pgwire.Execute, name: portal, rows: n}
}
func copyData(text string) message { return message{typ: pgwire.CopyData, text: text} }
func copyFail(why string) message  { return message{typ: pgwire.CopyFail, text: why} }

// bind binds a portal to a statement with arguments as text.
func bind(portal, statement string, args ...string) message {
	return message{typ: pgwire.Bind, name: portal, text: statement, args: args}
}

var (
	sync_    = message{typ: pgwire.Sync}
	flush    = message{typ: pgwire.Flush}
	copyDone = message{typ: pgwire.CopyDone}
)

// append makes the message as it goes over the wire.
func (m message) append(dst []byte, c string) []byte {
	fill := func(s string) string { return strings.ReplaceAll(s, "$c", c) }
	text := fill(m.text)
	switch m.typ {
	case pgwire.Query:
		return pgwire.AppendQuery(dst, text)
	case pgwire.Parse:
		return pgwire.AppendParse(dst, m.name, []byte(text), []byte{0, 0})
	case pgwire.Bind:
		body := append(append([]byte(m.name), 0), text...)
		body = append(body, 0, 0, 0) // no formats: all text
		body = binary.BigEndian.AppendUint16(body, uint16(len(m.args)))
		for _, a := range m.args {
			a = fill(a)
			body = append(binary.BigEndian.AppendUint32(body, uint32(len(a))), a...)
		}
		return pgwire.AppendMessage(dst, m.typ, append(body, 0, 0))
	case pgwire.Describe, pgwire.Close:
		return pgwire.AppendTarget(dst, m.typ, m.of, m.name)
	case pgwire.Execute:
		body := append([]byte(m.name), 0)
		return pgwire.AppendMessage(dst, m.typ, binary.BigEndian.AppendUint32(body, m.rows))
	case pgwire.CopyData:
		return pgwire.AppendMessage(dst, m.typ, []byte(text))
	case pgwire.CopyFail:
		return pgwire.AppendMessage(dst, m.typ, append([]byte(text), 0))
	default:
		return pgwire.AppendHeader(dst, m.typ, 0)
	}
}

// ends reports whether the server answers the message with ReadyForQuery.
func (m message) ends() bool { return m.typ == pgwire.Query || m.typ == pgwire.Sync }

// copies reports whether the message belongs to a COPY that is under way.
func (m message) copies() bool {
	return m.typ == pgwire.CopyData || m.typ == pgwire.CopyDone || m.typ == pgwire.CopyFail
}

// burst is what the client sends at once. Then it waits until everything is answered; with await, until a message of that
// type has come.
type burst struct {
	send  []message
	await byte
}

// script is what a client does.
type script struct {
	name   string
	bursts []burst
	may    []string // outcomes that are right although the default says otherwise, see contract
	// parts: a segment may take effect in part, because it commits within.
	parts bool
	app   *app // in the place of bursts
	// most bounds how many places there are to cut at, each way; 0: all.
	most int
}

// one is a burst that waits for all answers.
func one(m ...message) burst { return burst{send: m} }

// until is a burst that waits for a message.
func until(typ byte, m ...message) burst { return burst{send: m, await: typ} }

// queries are bursts of one Query each.
func queries(sql ...string) (b []burst) {
	for _, q := range sql {
		b = append(b, one(query(q)))
	}
	return b
}

// extended is a statement in the extended protocol, with a Sync.
func extended(sql string, args ...string) burst {
	return one(parse("", sql), bind("", "", args...), describePortal(""), execute(""), sync_)
}

// bursts joins.
func bursts(parts ...[]burst) (all []burst) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// tail is what each script ends with: what the client has set, and whether the session works.
var tail = queries(
	`SELECT nullif(current_setting('app.user_id', true), ''), nullif(current_setting('app.more', true), ''), current_setting('work_mem'), current_setting('role'),
	current_setting('search_path'), current_setting('statement_timeout'), current_setting('application_name'),
	(SELECT string_agg(v, ',') FROM secret), (SELECT pg_catalog.count(*) FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid())`,
	"BEGIN", "INSERT INTO public.ledger VALUES ($c, 99)", "COMMIT",
)

// all is the script with its tail.
func (s *script) all() []burst { return bursts(s.bursts, tail) }

// segments are the messages up to each ReadyForQuery.
func segments(b []burst) (all [][]message) {
	var now []message
	for _, b := range b {
		for _, m := range b.send {
			if now = append(now, m); m.ends() {
				all, now = append(all, now), nil
			}
		}
	}
	return all
}

// split makes each segment bursts of its own, so that one can look in between.
func split(b []burst) (all []burst) {
	for _, b := range b {
		from := 0
		for i, m := range b.send {
			if m.ends() && i < len(b.send)-1 && !b.send[i+1].copies() {
				all = append(all, one(b.send[from:i+1]...))
				from = i + 1
			}
		}
		all = append(all, burst{b.send[from:], b.await})
	}
	return all
}
