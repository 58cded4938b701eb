package gateway

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/duri-io/duri/pgwire"
)

// clientMessage is one that a client sends, for limbo and for a server.
type clientMessage struct {
	typ  byte
	body []byte
	does deed
	name string // for people
}

func parseMessage(name, sql string) clientMessage {
	m := pgwire.AppendParse(nil, name, []byte(sql), []byte{0, 0})
	return clientMessage{pgwire.Parse, m[5:], readText([]byte(sql), false).does, "P " + name + " " + sql}
}

func queryMessage(sql string) clientMessage {
	return clientMessage{pgwire.Query, pgwire.AppendQuery(nil, sql)[5:], readText([]byte(sql), false).does, "Q " + sql}
}

func bindMessage(portal, statement string) clientMessage {
	body := append([]byte(portal), 0)
	body = append(append(body, statement...), 0, 0, 0, 0, 0, 0, 0)
	return clientMessage{pgwire.Bind, body, 0, "B " + portal + " " + statement}
}

func targetMessage(typ, kind byte, name string) clientMessage {
	return clientMessage{typ, pgwire.AppendTarget(nil, typ, kind, name)[5:], 0, fmt.Sprintf("%c%c %s", typ, kind, name)}
}

func executeMessage(portal string) clientMessage {
	return clientMessage{pgwire.Execute, append([]byte(portal), 0, 0, 0, 0, 0), 0, "E " + portal}
}

// answersIn gives the types of messages; of an error its code, of a ReadyForQuery the status, of a CommandComplete its tag.
func answersIn(t *rapid.T, r *pgwire.Reader, until func(got []string) bool) (got []string) {
	for !until(got) {
		typ, _, err := r.Next(pgwire.FromServer)
		if err != nil {
			t.Fatal(err)
		}
		body, err := r.Body(textMax)
		if err != nil {
			t.Fatal(err)
		}
		switch typ {
		case pgwire.ErrorResponse:
			e, err := pgwire.ParseError(body)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, "E "+e.Code)
		case pgwire.ReadyForQuery, pgwire.CommandComplete:
			got = append(got, fmt.Sprintf("%c %s", typ, strings.Trim(string(body), "\x00")))
		case pgwire.NoticeResponse, pgwire.ParameterStatus:
		default:
			got = append(got, string(typ))
		}
	}
	return got
}

// TestLimboAnswersAsPostgreSQL: in a failed transaction, whatever a client sends, it gets from limbo what a server answers.
func TestLimboAnswersAsPostgreSQL(t *testing.T) {
	c := site(t, "")
	rapid.Check(t, func(t *rapid.T) {
		conn, err := net.Dial("unix", fmt.Sprintf("%s/.s.PGSQL.%d", c.SocketDir(), c.Port())) // where nobody is asked for a password
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(pgwire.AppendStartup(nil, []pgwire.Param{{Name: "user", Value: appUser}, {Name: "database", Value: "shop"}})); err != nil {
			t.Fatal(err)
		}
		r := pgwire.NewReader(conn)
		answersIn(t, r, func(got []string) bool { return len(got) > 0 && strings.HasPrefix(got[len(got)-1], "Z") })
		send := func(m clientMessage) {
			if _, err := conn.Write(pgwire.AppendMessage(nil, m.typ, m.body)); err != nil {
				t.Fatal(err)
			}
		}
		ready := func(n int) func([]string) bool {
			return func(got []string) bool {
				for _, g := range got {
					if strings.HasPrefix(g, "Z") {
						n--
					}
				}
				return n <= 0
			}
		}
		before := []string{"known", "alsoknown"}
		for _, m := range []clientMessage{
			queryMessage("DEALLOCATE ALL"), parseMessage("known", "SELECT 1"), parseMessage("alsoknown", "ROLLBACK"),
			{typ: pgwire.Sync},
			queryMessage("BEGIN"), queryMessage("SELECT 1/0"),
		} {
			send(m)
		}
		answersIn(t, r, func(got []string) bool { return ready(4)(got) })

		l := newLimbo(nil, true, map[string]*statement{before[0]: {effects: text{does: reads}}, before[1]: {effects: text{does: rollsBack}}})
		texts := []string{"SELECT 1", "ROLLBACK", "COMMIT", "INSERT INTO nowhere VALUES (1)", "BEGIN", "SET work_mem = '1MB'"}
		names := []string{"", "known", "alsoknown", "new"}
		portals := []string{"", "p"}
		for over := false; !over; {
			var batch []clientMessage
			if rapid.IntRange(0, 2).Draw(t, "simple") == 0 {
				batch = []clientMessage{queryMessage(rapid.SampledFrom(texts).Draw(t, "text"))}
			} else {
				for range rapid.IntRange(0, 6).Draw(t, "messages") {
					name, portal := rapid.SampledFrom(names).Draw(t, "name"), rapid.SampledFrom(portals).Draw(t, "portal")
					switch rapid.IntRange(0, 6).Draw(t, "message") {
					case 0, 1:
						// A name that exists is refused with another code; who has it parsed it before, so that it has.
						if name != "known" && name != "alsoknown" && name != "new" {
							batch = append(batch, parseMessage(name, rapid.SampledFrom(texts).Draw(t, "text")))
						}
					case 2:
						batch = append(batch, bindMessage(portal, name))
					case 3:
						batch = append(batch, targetMessage(pgwire.Describe, 'S', name))
					case 4:
						batch = append(batch, targetMessage(pgwire.Describe, 'P', portal))
					case 5:
						batch = append(batch, executeMessage(portal), clientMessage{typ: pgwire.Sync, name: "S"})
					case 6:
						batch = append(batch, clientMessage{typ: pgwire.Flush, name: "H"})
					}
				}
				batch = append(batch, clientMessage{typ: pgwire.Sync, name: "S"})
			}
			if i := slices.IndexFunc(batch, func(m clientMessage) bool { return m.typ == pgwire.Sync }); i >= 0 {
				batch = batch[:i+1] // what is behind an Execute may be outside the transaction
			}
			var sent []string
			var out []byte
			for _, m := range batch {
				send(m)
				sent = append(sent, m.name)
				var o []byte
				o, over = l.answer(m.typ, m.body, m.does)
				out = append(out, o...)
			}
			want := answersIn(t, r, ready(1))
			got := answersIn(t, pgwire.NewReader(strings.NewReader(string(out))), ready(1))
			// What is not there is refused with another code by a server; both fail the same way.
			plain := strings.NewReplacer("26000", "25P02", "34000", "25P02", "42P03", "25P02").Replace
			if g, w := plain(strings.Join(got, ", ")), plain(strings.Join(want, ", ")); g != w {
				t.Fatalf("%s\n got %s\nwant %s", strings.Join(sent, "; "), g, w)
			}
			if over != (want[len(want)-1] == "Z I") {
				t.Fatalf("%s: over %t after %q", strings.Join(sent, "; "), over, want)
			}
		}
	})
}
