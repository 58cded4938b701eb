package pgwire

import (
	"bytes"
	"encoding/binary"
)

// message appends a message with the body that body appends.
func message(dst []byte, typ byte, body func([]byte) []byte) []byte {
	dst = append(dst, typ)
	at := len(dst)
	return finishAt(body(append(dst, 0, 0, 0, 0)), at)
}

// AppendMessage appends a message.
func AppendMessage(dst []byte, typ byte, body []byte) []byte {
	return append(AppendHeader(dst, typ, len(body)), body...)
}

// AppendHeader appends the header of a message whose body has length bytes.
func AppendHeader(dst []byte, typ byte, length int) []byte {
	return binary.BigEndian.AppendUint32(append(dst, typ), uint32(length+4))
}

// Error is the content of an ErrorResponse or NoticeResponse, as far as a gateway makes or reads it.
type Error struct {
	Severity string // ERROR, FATAL, PANIC, WARNING, ...; not localized
	Code     string // SQLSTATE
	Message  string
	Detail   string
	Hint     string
	Routine  string
}

func (e *Error) Error() string { return e.Severity + ": " + e.Message + " (SQLSTATE " + e.Code + ")" }

// HintText is the advice that goes with the error.
func (e *Error) HintText() string { return e.Hint }

// AppendError appends an ErrorResponse.
func AppendError(dst []byte, e *Error) []byte { return appendReport(dst, ErrorResponse, e) }

// AppendNotice appends a NoticeResponse.
func AppendNotice(dst []byte, e *Error) []byte { return appendReport(dst, NoticeResponse, e) }

func appendReport(dst []byte, typ byte, e *Error) []byte {
	return message(dst, typ, func(b []byte) []byte {
		for _, f := range []struct {
			kind byte
			text string
		}{
			{'S', e.Severity}, {'V', e.Severity}, {'C', e.Code}, {'M', e.Message}, {'D', e.Detail}, {'H', e.Hint}, {'R', e.Routine},
		} {
			if f.text != "" {
				// A zero byte would end the field early.
				b = append(b, f.kind)
				b = appendString(b, string(bytes.ReplaceAll([]byte(f.text), []byte{0}, nil)))
			}
		}
		return append(b, 0)
	})
}

// ParseError reads the body of an ErrorResponse or NoticeResponse. Unknown fields are passed over.
func ParseError(body []byte) (*Error, error) {
	e := &Error{}
	for {
		if len(body) == 0 {
			return nil, violation("an error report that does not end")
		}
		kind := body[0]
		if kind == 0 {
			return e, nil
		}
		text, rest, ok := cutString(body[1:])
		if !ok {
			return nil, violation("an error report with a field that does not end")
		}
		body = rest
		switch kind {
		case 'S':
			if e.Severity == "" {
				e.Severity = text
			}
		case 'V':
			e.Severity = text
		case 'C':
			e.Code = text
		case 'M':
			e.Message = text
		case 'D':
			e.Detail = text
		case 'H':
			e.Hint = text
		case 'R':
			e.Routine = text
		}
	}
}

// AppendParameterStatus appends a ParameterStatus.
func AppendParameterStatus(dst []byte, p Param) []byte {
	return message(dst, ParameterStatus, func(b []byte) []byte { return appendString(appendString(b, p.Name), p.Value) })
}

// ParseParameterStatus reads the body of a ParameterStatus.
func ParseParameterStatus(body []byte) (Param, error) {
	name, rest, ok := cutString(body)
	value, rest, ok2 := cutString(rest)
	if !ok || !ok2 || len(rest) > 0 {
		return Param{}, violation("a ParameterStatus that is not a name and a value")
	}
	return Param{name, value}, nil
}

// AppendBackendKeyData appends a BackendKeyData.
func AppendBackendKeyData(dst []byte, pid uint32, secret []byte) []byte {
	return message(dst, BackendKeyData, func(b []byte) []byte {
		return append(binary.BigEndian.AppendUint32(b, pid), secret...)
	})
}

// ParseBackendKeyData reads the body of a BackendKeyData; secret is a part of body.
func ParseBackendKeyData(body []byte) (pid uint32, secret []byte, err error) {
	if len(body) < 8 || len(body) > 4+256 {
		return 0, nil, violation("a BackendKeyData of %d bytes", len(body))
	}
	return binary.BigEndian.Uint32(body), body[4:], nil
}

// AppendCommandComplete appends the end of a statement, with its tag.
func AppendCommandComplete(dst []byte, tag string) []byte {
	return AppendMessage(dst, CommandComplete, append([]byte(tag), 0))
}

// AppendReadyForQuery appends a ReadyForQuery with a transaction status.
func AppendReadyForQuery(dst []byte, status byte) []byte {
	return append(AppendHeader(dst, ReadyForQuery, 1), status)
}

// ParseReadyForQuery reads the body of a ReadyForQuery.
func ParseReadyForQuery(body []byte) (status byte, err error) {
	if len(body) != 1 || (body[0] != Idle && body[0] != InBlock && body[0] != InFailed) {
		return 0, violation("a ReadyForQuery with the status %q", body)
	}
	return body[0], nil
}

// AppendNegotiate appends a NegotiateProtocolVersion that offers protocol 3.0 and none of the options.
func AppendNegotiate(dst []byte, options []string) []byte {
	return message(dst, NegotiateProtocol, func(b []byte) []byte {
		b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, Version30), uint32(len(options)))
		for _, o := range options {
			b = appendString(b, o)
		}
		return b
	})
}

// Kinds of authentication messages.
const (
	AuthOK           = 0
	AuthCleartext    = 3
	AuthMD5          = 5
	AuthSASL         = 10
	AuthSASLContinue = 11
	AuthSASLFinal    = 12
)

// AppendAuth appends an authentication message of a kind with its data.
func AppendAuth(dst []byte, kind uint32, data []byte) []byte {
	return message(dst, Authentication, func(b []byte) []byte {
		return append(binary.BigEndian.AppendUint32(b, kind), data...)
	})
}

// ParseAuth reads the body of an authentication message.
func ParseAuth(body []byte) (kind uint32, data []byte, err error) {
	if len(body) < 4 {
		return 0, nil, violation("an authentication message of %d bytes", len(body))
	}
	return binary.BigEndian.Uint32(body), body[4:], nil
}

// AppendMechanisms appends the data of an AuthSASL message.
func AppendMechanisms(dst []byte, names ...string) []byte {
	for _, n := range names {
		dst = appendString(dst, n)
	}
	return append(dst, 0)
}

// ParseMechanisms reads the data of an AuthSASL message.
func ParseMechanisms(data []byte) (names []string, err error) {
	for {
		name, rest, ok := cutString(data)
		if !ok {
			return nil, violation("a list of SASL mechanisms that does not end")
		}
		if name == "" {
			return names, nil
		}
		names = append(names, name)
		data = rest
	}
}

// AppendSASLInitial appends a client's first SASL message.
func AppendSASLInitial(dst []byte, mechanism string, data []byte) []byte {
	return message(dst, SASLResponse, func(b []byte) []byte {
		return append(binary.BigEndian.AppendUint32(appendString(b, mechanism), uint32(len(data))), data...)
	})
}

// ParseSASLInitial reads the body of a client's first SASL message. A client that sends no data with it is told so by the
// protocol with a length of -1, which SCRAM does not know.
func ParseSASLInitial(body []byte) (mechanism string, data []byte, err error) {
	mechanism, rest, ok := cutString(body)
	if !ok || len(rest) < 4 || uint64(binary.BigEndian.Uint32(rest)) != uint64(len(rest)-4) {
		return "", nil, violation("a first SASL message that is not a mechanism and its data")
	}
	return mechanism, rest[4:], nil
}

// AppendQuery appends a Query.
func AppendQuery(dst []byte, sql string) []byte {
	return message(dst, Query, func(b []byte) []byte { return appendString(b, sql) })
}

// ParseQuery reads the body of a Query; the text is a part of body.
func ParseQuery(body []byte) (sql []byte, err error) {
	sql, rest, ok := bytes.Cut(body, []byte{0})
	if !ok || len(rest) > 0 {
		return nil, violation("a Query that is not one string")
	}
	return sql, nil
}

// Statement is the content of a Parse, as parts of its body.
type Statement struct {
	Name, SQL []byte
	OIDs      []byte // number and OIDs of the types of parameters, as on the wire
}

// ParseParse reads the body of a Parse.
func ParseParse(body []byte) (Statement, error) {
	name, rest, ok := bytes.Cut(body, []byte{0})
	sql, oids, ok2 := bytes.Cut(rest, []byte{0})
	if !ok || !ok2 || len(oids) < 2 || len(oids) != 2+4*int(binary.BigEndian.Uint16(oids)) {
		return Statement{}, violation("a Parse that is not a name, a text and types")
	}
	return Statement{name, sql, oids}, nil
}

// AppendParse appends a Parse; oids are as in Statement.
func AppendParse(dst []byte, name string, sql, oids []byte) []byte {
	dst = AppendHeader(dst, Parse, len(name)+1+len(sql)+1+len(oids))
	dst = append(append(appendString(dst, name), sql...), 0)
	return append(dst, oids...)
}

// ParseBind reads the beginning of the body of a Bind: the names of portal and statement, as parts of it, and how long they
// are together with their zero bytes. ok is false if the names are not there completely.
func ParseBind(start []byte) (portal, statement []byte, length int, ok bool) {
	portal, rest, ok := bytes.Cut(start, []byte{0})
	if !ok {
		return nil, nil, 0, false
	}
	statement, _, ok = bytes.Cut(rest, []byte{0})
	return portal, statement, len(portal) + len(statement) + 2, ok
}

// ParseTarget reads the body of a Close or Describe: 'S' for a statement or 'P' for a portal, and the name.
func ParseTarget(body []byte) (kind byte, name []byte, err error) {
	if len(body) < 2 || (body[0] != 'S' && body[0] != 'P') {
		return 0, nil, violation("a Close or Describe that is neither of a statement nor of a portal")
	}
	name, rest, ok := bytes.Cut(body[1:], []byte{0})
	if !ok || len(rest) > 0 {
		return 0, nil, violation("a Close or Describe that is not one name")
	}
	return body[0], name, nil
}

// AppendTarget appends a Close or Describe.
func AppendTarget(dst []byte, typ, kind byte, name string) []byte {
	dst = append(AppendHeader(dst, typ, 1+len(name)+1), kind)
	return appendString(dst, name)
}

// ParseExecute reads the body of an Execute: the portal, as a part of it, and the most rows to send, 0 for all.
func ParseExecute(body []byte) (portal []byte, rowsMax uint32, err error) {
	portal, rest, ok := bytes.Cut(body, []byte{0})
	if !ok || len(rest) != 4 {
		return nil, 0, violation("an Execute that is not a name and a number of rows")
	}
	return portal, binary.BigEndian.Uint32(rest), nil
}

// ParseRow reads the body of a DataRow into columns, parts of it; NULL is nil.
func ParseRow(body []byte) (columns [][]byte, err error) {
	if len(body) < 2 {
		return nil, violation("a DataRow of %d bytes", len(body))
	}
	n, rest := int(binary.BigEndian.Uint16(body)), body[2:]
	for range n {
		if len(rest) < 4 {
			return nil, violation("a DataRow that ends early")
		}
		size := int32(binary.BigEndian.Uint32(rest))
		rest = rest[4:]
		if size < 0 {
			columns = append(columns, nil)
			continue
		}
		if int64(size) > int64(len(rest)) {
			return nil, violation("a DataRow that ends early")
		}
		columns = append(columns, rest[:size:size])
		rest = rest[size:]
	}
	if len(rest) > 0 {
		return nil, violation("a DataRow with content after its columns")
	}
	return columns, nil
}
