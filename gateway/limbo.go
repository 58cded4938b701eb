package gateway

import (
	"fmt"

	"github.com/duri-io/duri/pgwire"
)

// limbo answers a client whose transaction has no server any more, as PostgreSQL answers in a transaction that has failed. It is
// pure: it only knows what the client sends.
type limbo struct {
	owed  *pgwire.Error // the client is to be told why; nil: it knows
	block bool          // of BEGIN: it lasts until the client ends it. Else it ends with the segment.
	skip  bool          // until Sync

	statements map[string]deed // that were parsed here, or before
	portals    map[string]deed
}

func newLimbo(owed *pgwire.Error, block bool, statements map[string]*statement) *limbo {
	l := &limbo{owed: owed, block: block, statements: map[string]deed{}, portals: map[string]deed{}}
	for name, st := range statements {
		l.statements[name] = st.effects.does
	}
	return l
}

// errInFailed is PostgreSQL's own (src/backend/tcop/postgres.c).
var errInFailed = &pgwire.Error{
	Severity: "ERROR", Code: codeInFailed, Message: "current transaction is aborted, commands ignored until end of transaction block",
}

// errBehind is for what a client has sent behind the end of a transaction without a Sync in between.
var errBehind = &pgwire.Error{
	Severity: "ERROR", Code: codeRolledBack, Message: "the server was lost", Detail: "What was sent behind the end of the transaction was not run.",
	Hint: "run it again",
}

// answer gives what the client gets for a message; does is what a Query's or Parse's text does. over: the client has got
// ReadyForQuery outside a transaction, and may begin anew.
func (l *limbo) answer(typ byte, body []byte, does deed) (out []byte, over bool) {
	switch typ {
	case pgwire.Query:
		delete(l.statements, "")
		out, ended := l.run(does)
		return l.ready(out), ended
	case pgwire.FunctionCall:
		return l.ready(l.refuse()), !l.block
	case pgwire.Sync:
		l.skip = false
		return l.ready(nil), !l.block
	}
	if l.skip {
		return nil, false
	}
	out = l.extended(typ, body, does)
	return out, false
}

// run answers a statement.
func (l *limbo) run(does deed) (out []byte, ended bool) {
	switch {
	case l.block && does == rollsBack, l.block && does == commits && l.owed == nil:
		l.block = false
		return pgwire.AppendCommandComplete(nil, "ROLLBACK"), true
	case does == commits:
		l.block = false
	}
	return l.refuse(), !l.block
}

// refuse gives the error that a statement gets.
func (l *limbo) refuse() []byte {
	e := errInFailed
	switch {
	case l.owed != nil:
		e, l.owed = l.owed, nil
	case !l.block:
		e = errBehind
	}
	return pgwire.AppendError(nil, e)
}

func (l *limbo) ready(out []byte) []byte {
	status := byte(pgwire.Idle)
	if l.block {
		status = pgwire.InFailed
	}
	return pgwire.AppendReadyForQuery(out, status)
}

// extended answers a message of the extended protocol. Until the client knows what has happened, it is told with the first.
func (l *limbo) extended(typ byte, body []byte, does deed) []byte {
	fail := func() []byte {
		l.skip = true
		return l.refuse()
	}
	ends := func(d deed) bool { return l.block && (d == rollsBack || d == commits) }
	switch typ {
	case pgwire.Parse:
		p, err := pgwire.ParseParse(body)
		if len(p.Name) == 0 {
			delete(l.statements, "")
		}
		if err != nil || !ends(does) {
			return fail()
		}
		l.statements[string(p.Name)] = does
		return pgwire.AppendMessage(nil, pgwire.ParseComplete, nil)
	case pgwire.Bind:
		portal, name, _, ok := pgwire.ParseBind(body)
		_, there := l.portals[string(portal)]
		if d, known := l.statements[string(name)]; ok && known && ends(d) && (!there || len(portal) == 0) {
			l.portals[string(portal)] = d
			return pgwire.AppendMessage(nil, pgwire.BindComplete, nil)
		}
		return fail()
	case pgwire.Describe:
		kind, name, err := pgwire.ParseTarget(body)
		set := l.portals
		if kind == 'S' {
			set = l.statements
		}
		if d, known := set[string(name)]; err != nil || !known || !ends(d) {
			return fail()
		}
		var out []byte
		if kind == 'S' {
			out = pgwire.AppendMessage(out, pgwire.ParameterDescription, []byte{0, 0})
		}
		return pgwire.AppendMessage(out, pgwire.NoData, nil)
	case pgwire.Execute:
		portal, _, err := pgwire.ParseExecute(body)
		d, known := l.portals[string(portal)]
		if err != nil || !known {
			return fail()
		}
		out, _ := l.run(d)
		l.skip = out[0] == pgwire.ErrorResponse
		return out
	case pgwire.Close:
		return pgwire.AppendMessage(nil, pgwire.CloseComplete, nil)
	}
	return nil // Flush, and data of a COPY that has failed
}

// settle gives the rest of a transaction's answer, of which the server was lost after it had committed: what was sent and is not
// answered, up to ReadyForQuery. ok is false when a part of the answer is known to nobody any more.
func settle(sent []expected) (out []byte, ok bool) {
	for _, e := range sent {
		switch e.kind {
		case 'P':
			out = pgwire.AppendMessage(out, pgwire.ParseComplete, nil)
		case 'B':
			out = pgwire.AppendMessage(out, pgwire.BindComplete, nil)
		case 'C':
			out = pgwire.AppendMessage(out, pgwire.CloseComplete, nil)
		case 'T', 'O':
			if !e.commits {
				return nil, false
			}
			if e.kind == 'T' {
				out = pgwire.AppendMessage(out, pgwire.ParameterDescription, []byte{0, 0})
			}
			out = pgwire.AppendMessage(out, pgwire.NoData, nil)
		case 'E', 'Q', 'F', 'q', 'w':
			if !e.commits {
				return nil, false
			}
			if !e.done {
				out = pgwire.AppendCommandComplete(out, "COMMIT")
			}
		}
		if e.kind == 'Q' || e.kind == 'S' || e.kind == 'z' {
			return pgwire.AppendReadyForQuery(out, pgwire.Idle), true
		}
	}
	return nil, false
}

// Errors of a loss that the session survives, or of a commit whose fate nobody knows.

func errRolledBack(t Target, cause string) *pgwire.Error {
	return &pgwire.Error{
		Severity: "ERROR", Code: codeRolledBack, Message: "the transaction was rolled back because the server of " + t.name() + " was lost",
		Detail: "Nothing of it has taken effect. " + cause, Hint: "run the transaction again",
	}
}

func errUnknown(t Target, ltxid []byte, cause string) *pgwire.Error {
	id := "The transaction carries no mark."
	if len(ltxid) > 0 {
		id = fmt.Sprintf("Its mark (LTXID) is %x.", ltxid)
	}
	return fatalError(codeUnknown, "the server of "+t.name()+" was lost, and nobody can say now whether the transaction was committed",
		id+" "+cause, "look it up before you run it again")
}
