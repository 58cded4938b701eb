package gateway

import (
	"slices"

	"github.com/duri-io/duri/pgwire"
)

// expected is a message that was sent to a server and whose answer is to come. Kinds:
//
//	Q query, F function call            until ReadyForQuery
//	S sync                              ReadyForQuery
//	P parse, p parse of our own         ParseComplete, which the client does not see of our own
//	B bind                              BindComplete
//	T describe statement, O portal      RowDescription or NoData
//	D describe statement of our own     the same, which the client does not see
//	u describe portal of a Query that   RowDescription; NoData, which the client does not see
//	  is sent as extended messages
//	E execute                           CommandComplete, EmptyQueryResponse or PortalSuspended
//	b bind of our own                   BindComplete, which the client does not see
//	m execute of our own                DataRow and CommandComplete, which the client does not see
//	q query of our own, before w        until ReadyForQuery, which the client does not see
//	y sync of our own                   ReadyForQuery, which the client does not see
//	w query of the client in a block    until ReadyForQuery, which alone the client does not see
//	  of our own
//	z query of our own, after w         CommandComplete, which the client does not see, and ReadyForQuery
//	C close, c close of our own         CloseComplete, which the client does not see of our own
//	d copy data, x end of copy data     none
type expected struct {
	kind byte
	st   *statement   // P, p, C, T, O, D
	name string       // P, C, and B, T of one that is missing: what the client calls it; c: what the server does
	gone *preparation // c: what is closed

	changed bool // B, T: made to fail, because the statement is not what it was
	missing bool // B, T: fails, because the client has no such statement
	commits bool // Q, T, O, E: it is a COMMIT
	done    bool // Q: its CommandComplete has come
}

// verdict is what becomes of an answer.
type verdict int

const (
	forward     verdict = iota
	swallow             // the client did not ask
	unexplained         // nothing was sent that this answers
)

// line is what was sent to a server and is not answered, in order. It is a pure model of how a server answers; it needs to
// know whose answer is whose because the gateway sends messages of its own between the client's.
type line struct {
	sent   []expected
	first  int  // sent[first:] is the line
	copyIn bool // the first is an Execute or a Query that reads CopyData
	data   bool // the server waits for data of a COPY
	skips  bool // after an error, the server passes over everything up to a Sync that was not sent yet
	passes bool // up to one that was
}

func (l *line) empty() bool { return l.first == len(l.sent) }

func (l *line) push(e expected) {
	if e.kind == 'd' || e.kind == 'x' {
		// Where data of a COPY stand matters only behind what reads them, and once.
		if l.empty() || (e.kind == 'd' && l.sent[len(l.sent)-1].kind == 'd') {
			return
		}
	}
	if l.first > 0 && len(l.sent) == cap(l.sent) {
		n := copy(l.sent, l.sent[l.first:])
		clear(l.sent[n:])
		l.sent, l.first = l.sent[:n], 0
	}
	l.sent = append(l.sent, e)
	if l.skips && (e.kind == 'S' || e.kind == 'y') {
		l.skips, l.passes = false, true
	}
}

func (l *line) head() byte {
	if l.empty() {
		return 0
	}
	return l.sent[l.first].kind
}

// next is what the next answer is of.
func (l *line) next() expected {
	if l.empty() {
		return expected{}
	}
	return l.sent[l.first]
}

func (l *line) pop() expected {
	e := l.sent[l.first]
	l.sent[l.first] = expected{}
	l.first++
	l.copyIn = false
	if l.empty() {
		l.sent, l.first = l.sent[:0], 0
	}
	return e
}

// popAll pops the head and the marks of COPY data that follow it.
func (l *line) popAll() {
	l.pop()
	for l.head() == 'd' || l.head() == 'x' {
		l.pop()
	}
}

// answer takes the type of a message from the server. It calls undo for each message that the server did not carry out
// because of an error, the last one first.
func (l *line) answer(typ byte, undo func(expected)) verdict {
	head := l.head()
	l.data = false // it sends nothing while it waits, but notices
	switch typ {
	case pgwire.ParseComplete:
		return l.take(head == 'P' || head == 'p', head == 'p')
	case pgwire.BindComplete:
		return l.take(head == 'B' || head == 'b', head == 'b')
	case pgwire.CloseComplete:
		return l.take(head == 'C' || head == 'c', head == 'c')
	case pgwire.ParameterDescription:
		if head == 'D' {
			return swallow
		}
	case pgwire.RowDescription, pgwire.NoData:
		switch head {
		case 'T', 'O', 'D':
			return l.take(true, head == 'D')
		case 'u':
			return l.take(true, typ == pgwire.NoData)
		}
	case pgwire.CopyInResponse, pgwire.CopyBothResponse:
		l.copyIn, l.data = head == 'E' || head == 'Q' || head == 'w', true
	case pgwire.CommandComplete, pgwire.EmptyQueryResponse, pgwire.PortalSuspended:
		switch head {
		case 'E':
			l.execute()
		case 'Q', 'w':
			l.sent[l.first].done = head == 'Q'
			if l.copyIn {
				l.ignore('x')
				l.copyIn = false
			}
		case 'm':
			return l.take(true, true)
		case 'q', 'z':
			return swallow
		}
	case pgwire.ErrorResponse:
		l.fail(head, undo)
	case pgwire.ReadyForQuery:
		if l.skips || l.passes {
			l.skips, l.passes = false, false
			l.drop(undo)
			head = l.head()
		}
		own := head == 'q' || head == 'w' || head == 'y'
		return l.take(own || head == 'Q' || head == 'F' || head == 'S' || head == 'z', own)
	}
	return forward
}

func (l *line) take(fits, own bool) verdict {
	if !fits {
		return unexplained
	}
	l.popAll()
	if own {
		return swallow
	}
	return forward
}

// execute pops an Execute that is done. One that read CopyData has read the Syncs that came before the end of the data as
// well, and ignored them (src/backend/commands/copyfromparse.c, CopyGetData).
func (l *line) execute() {
	if !l.copyIn {
		l.popAll()
		return
	}
	for l.pop(); !l.empty(); {
		if l.pop().kind == 'x' {
			return
		}
	}
}

// fail pops what an error takes with it: in the extended protocol all up to the next Sync, which may be still to come.
func (l *line) fail(head byte, undo func(expected)) {
	if l.copyIn && l.marked() {
		l.ignore('d', 'x') // It had read up to some of the data.
	}
	switch head {
	case 0, 'Q', 'F', 'S', 'q', 'w', 'y', 'z':
		l.copyIn = false
		return
	}
	l.drop(undo)
	l.skips = l.empty()
}

// ignore notes that the server has ignored the Syncs before the first of some kinds, as it does in a COPY.
func (l *line) ignore(upTo ...byte) {
	for i := l.first + 1; i < len(l.sent) && !slices.Contains(upTo, l.sent[i].kind); i++ {
		if l.sent[i].kind == 'S' {
			l.sent[i].kind = 'd'
		}
	}
}

// drop pops all up to the next Sync, the client's or our own.
func (l *line) drop(undo func(expected)) {
	end := l.first
	for end < len(l.sent) && l.sent[end].kind != 'S' && l.sent[end].kind != 'y' {
		end++
	}
	for i := end - 1; i >= l.first; i-- {
		undo(l.sent[i])
	}
	for range end - l.first {
		l.pop()
	}
}

// marked reports whether data of a COPY, or their end, were sent.
func (l *line) marked() bool {
	for _, e := range l.sent[l.first:] {
		if e.kind == 'd' || e.kind == 'x' {
			return true
		}
	}
	return false
}
