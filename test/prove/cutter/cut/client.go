package cut

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/duri-io/duri/pgwire"
	"github.com/duri-io/duri/pgwire/scram"
)

// client speaks the protocol as it stands in scripts, and writes down what it hears.
type client struct {
	conn   net.Conn
	r      *pgwire.Reader
	params map[string]string
	plain  *strings.Replacer // takes what differs between clients out of what is heard
}

// plainName stands for application_name, by which the sessions of one worker are known; it is as long as those.
const plainName = "cutter-????"

// connect logs in.
func connect(ctx context.Context, addr string, keys *scram.Keys, application string) (*client, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return begin(ctx, conn, keys, application)
}

// begin logs in over a connection.
func begin(ctx context.Context, conn net.Conn, keys *scram.Keys, application string) (*client, error) {
	c := &client{conn: conn, r: pgwire.NewReader(conn), params: map[string]string{}, plain: strings.NewReplacer(application, plainName)}
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	if err := c.login(keys, application); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("log in: %w", err)
	}
	return c, nil
}

func (c *client) login(keys *scram.Keys, application string) error {
	start := pgwire.AppendStartup(nil, []pgwire.Param{{Name: "user", Value: appUser}, {Name: "database", Value: database}, {Name: "application_name", Value: application}})
	if _, err := c.conn.Write(start); err != nil {
		return err
	}
	proof := scram.NewClient(keys, nil)
	for {
		typ, _, err := c.r.Next(anything)
		if err != nil {
			return err
		}
		body, err := c.r.Body(1 << 16)
		if err != nil {
			return err
		}
		switch typ {
		case pgwire.Authentication:
			err = c.prove(proof, body)
		case pgwire.ParameterStatus:
			err = c.noteParam(body)
		case pgwire.ErrorResponse:
			e, perr := pgwire.ParseError(body)
			if perr != nil {
				return perr
			}
			return fmt.Errorf("%w: %s", e, e.Detail)
		case pgwire.ReadyForQuery:
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (c *client) prove(proof *scram.Client, body []byte) error {
	kind, data, err := pgwire.ParseAuth(body)
	if err != nil {
		return err
	}
	var reply []byte
	switch kind {
	case pgwire.AuthSASL:
		offered, err := pgwire.ParseMechanisms(data)
		if err != nil {
			return err
		}
		mechanism, first, err := proof.First(offered)
		if err != nil {
			return err
		}
		reply = pgwire.AppendSASLInitial(nil, mechanism, first)
	case pgwire.AuthSASLContinue:
		final, err := proof.Final(data)
		if err != nil {
			return err
		}
		reply = pgwire.AppendMessage(nil, pgwire.SASLResponse, final)
	case pgwire.AuthSASLFinal:
		return proof.Verify(data)
	default:
		return nil
	}
	_, err = c.conn.Write(reply)
	return err
}

func (c *client) noteParam(body []byte) error {
	p, err := pgwire.ParseParameterStatus(body)
	if err == nil {
		c.params[p.Name] = c.plain.Replace(p.Value)
	}
	return err
}

// answer is what came for a segment: each message as text, without what may differ between servers, and the status that
// ReadyForQuery gave, 0 if it has not come.
type answer struct {
	says   []string
	codes  []string // of errors
	status byte
}

// transcript is what a client has heard.
type transcript struct {
	answers []answer // the last one may be incomplete
	sent    int      // segments of which something was sent
	fatal   *pgwire.Error
	broken  string // how the connection ended otherwise; empty: it did not
	inside  bool   // it ended inside a message, where nothing can be told
	spoke   bool   // the server went on after a FATAL
	params  map[string]string
}

// alive reports whether the session lived on to its end.
func (t *transcript) alive() bool { return t.fatal == nil && t.broken == "" }

// last is what was heard last.
func (t *transcript) last() string {
	if len(t.answers) == 0 {
		return "nothing"
	}
	return t.answers[len(t.answers)-1].String()
}

// complete is how many segments were answered wholly.
func (t *transcript) complete() int {
	n := len(t.answers)
	if n > 0 && t.answers[n-1].status == 0 {
		n--
	}
	return n
}

// run does what bursts say, until the end of them or of the connection, and writes it down at the end of t.
func (c *client) run(t *transcript, b []burst, number string) error {
	t.params = c.params
	unended := false // what was sent last awaits a Sync
	for _, b := range b {
		if len(b.send) > 0 && b.send[0].copies() && t.complete() == t.sent {
			continue // There is no COPY: it has failed.
		}
		var out []byte
		for _, m := range b.send {
			out = m.append(out, number)
			if m.copies() {
				continue
			}
			if !unended {
				t.sent++
			}
			unended = !m.ends()
		}
		if _, err := c.conn.Write(out); err != nil && !hungUp(err) {
			return err
		}
		if err := c.hear(t, b.await, unended, number); err != nil {
			t.broken = err.Error()
		}
		if !t.alive() {
			return nil
		}
	}
	return nil
}

// hungUp reports whether writing has failed because the other side has ended the connection: what it has said is read yet.
func hungUp(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && !op.Timeout()
}

// hear reads until all that was ended is answered, or the awaited message has come, or what comes in its place. An error is the
// end of the connection; after a FATAL it is expected.
func (c *client) hear(t *transcript, await byte, unended bool, number string) error {
	for {
		if !unended && t.complete() == t.sent {
			return nil
		}
		if unended && await == 0 {
			return nil // nothing is awaited
		}
		typ, _, err := c.r.Next(anything)
		if err != nil {
			if t.fatal != nil {
				return nil
			}
			if errors.Is(err, io.EOF) {
				return errors.New("the connection ended without a word")
			}
			return err
		}
		body, err := c.r.Body(1 << 20)
		if err != nil {
			t.inside = true
			return fmt.Errorf("inside a message: %w", err)
		}
		if t.fatal != nil {
			t.spoke = true
			continue
		}
		if err := c.write(t, typ, body, number); err != nil {
			return err
		}
		if await != 0 && t.fatal == nil && (typ == await || typ == pgwire.ErrorResponse && unended) {
			return nil
		}
	}
}

// write writes a message down.
func (c *client) write(t *transcript, typ byte, body []byte, number string) error {
	if typ == pgwire.ParameterStatus {
		return c.noteParam(body)
	}
	if t.complete() == len(t.answers) {
		t.answers = append(t.answers, answer{})
	}
	a := &t.answers[len(t.answers)-1]
	if typ == pgwire.ReadyForQuery {
		status, err := pgwire.ParseReadyForQuery(body)
		a.status = status
		return err
	}
	if typ == pgwire.ErrorResponse {
		e, err := pgwire.ParseError(body)
		if err != nil {
			return err
		}
		a.codes = append(a.codes, e.Code)
		if e.Severity == "FATAL" || e.Severity == "PANIC" {
			t.fatal = e
		}
	}
	a.says = append(a.says, strings.ReplaceAll(c.plain.Replace(says(typ, body)), number, "$c"))
	return nil
}

// says is a message as text that is the same at every server and at every time.
func says(typ byte, body []byte) string {
	switch typ {
	case pgwire.ErrorResponse, pgwire.NoticeResponse:
		if e, err := pgwire.ParseError(body); err == nil {
			return fmt.Sprintf("%c %s %s %s", typ, e.Severity, e.Code, e.Message)
		}
	case pgwire.RowDescription:
		return columns(body)
	case pgwire.NotificationResponse:
		if len(body) > 4 {
			return fmt.Sprintf("%c %q", typ, body[4:])
		}
	}
	return fmt.Sprintf("%c %q", typ, body)
}

// columns are names and types of a RowDescription.
func columns(body []byte) string {
	var out []string
	rest := body[2:]
	for range binary.BigEndian.Uint16(body) {
		i := slices.Index(rest, 0)
		if i < 0 || len(rest) < i+19 {
			return fmt.Sprintf("T %q", body)
		}
		out = append(out, fmt.Sprintf("%s %d", rest[:i], binary.BigEndian.Uint32(rest[i+7:])))
		rest = rest[i+19:]
	}
	return "T " + strings.Join(out, ", ")
}

// close says goodbye.
func (c *client) close() {
	_ = c.conn.SetDeadline(time.Now().Add(time.Second))
	_, _ = c.conn.Write(pgwire.AppendHeader(nil, pgwire.Terminate, 0))
	_ = c.conn.Close()
	c.r.Drop()
}
