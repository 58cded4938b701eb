// Package pgwire is the PostgreSQL frontend/backend protocol 3.0 as a gateway needs it: messages are recognized by their
// headers and handed on as bytes; only what a gateway acts on is taken apart.
//
// A Reader tells the type and length of each message and gives access to as much of the body as is needed; bodies of any
// size stream through in pieces. A Writer gathers messages for one write call. Neither allocates in steady state, and
// neither holds a buffer while nothing is under way. Startup packets and the few messages that a gateway makes or reads
// itself have functions of their own. The package does not keep track of a session's state, and TLS, authentication and
// meaning are its callers' concern.
//
// Lengths are bounded before anything is read (see Limits), so what the other side sends cannot make it hold more than
// one buffer unless the caller asks for a whole body. Errors in what came are *ProtocolError; others are the connection's.
package pgwire

import (
	"errors"
	"fmt"
)

// Types of messages from the client, where a gateway looks at them. Letters mean different things in each direction.
const (
	Bind            = 'B'
	Close           = 'C'
	CopyFail        = 'f'
	Describe        = 'D'
	Execute         = 'E'
	Flush           = 'H'
	FunctionCall    = 'F'
	Parse           = 'P'
	Query           = 'Q'
	SASLResponse    = 'p' // also the first SASL message
	Sync            = 'S'
	Terminate       = 'X'
	CopyData        = 'd' // both directions
	CopyDone        = 'c' // both directions
	frontendAllowed = "BCDEFHPQSXcdf"
)

// Types of messages from the server.
const (
	Authentication       = 'R'
	BackendKeyData       = 'K'
	BindComplete         = '2'
	CloseComplete        = '3'
	CommandComplete      = 'C'
	CopyBothResponse     = 'W'
	CopyInResponse       = 'G'
	CopyOutResponse      = 'H'
	DataRow              = 'D'
	EmptyQueryResponse   = 'I'
	ErrorResponse        = 'E'
	FunctionCallResponse = 'V'
	NegotiateProtocol    = 'v'
	NoData               = 'n'
	NoticeResponse       = 'N'
	NotificationResponse = 'A'
	ParameterDescription = 't'
	ParameterStatus      = 'S'
	ParseComplete        = '1'
	PortalSuspended      = 's'
	ReadyForQuery        = 'Z'
	RowDescription       = 'T'
	backendAllowed       = "123ACDEGHIKNRSTVWZcdnstv"
)

// Transaction status in ReadyForQuery.
const (
	Idle     = 'I'
	InBlock  = 'T'
	InFailed = 'E'
)

// ProtocolError says what came that the protocol does not allow here. After it the stream cannot be understood any more.
type ProtocolError struct{ What string }

func (e *ProtocolError) Error() string { return "protocol violation: " + e.What }

func violation(format string, args ...any) error {
	return &ProtocolError{fmt.Sprintf(format, args...)}
}

// Limits tells the longest body of each type of message, and -1 for a type that must not come.
type Limits *[256]int32

// Longest bodies as in PostgreSQL's own server (src/include/libpq/pqcomm.h): large for messages that carry data.
const (
	largeMax = 1<<30 - 2
	smallMax = 10_000
	saslMax  = 1024
)

// What may come, by who sends it and when.
var (
	// FromClient is for an authenticated client's messages.
	FromClient Limits = bodiless(limits(frontendAllowed, smallMax, "QFBPd"), "SHc")
	// FromClientLogin is for a client's messages during SASL authentication.
	FromClientLogin = limitsOf("p", saslMax)
	// FromServer is for all messages of a server.
	FromServer Limits = limits(backendAllowed, largeMax, "")
)

func limits(allowed string, most int32, large string) Limits {
	l := limitsOf(allowed, most)
	for i := range len(large) {
		l[large[i]] = largeMax
	}
	return l
}

// bodiless takes messages that have no body. A server refuses one that has, and in the case of Flush passes over everything up to
// the next Sync then.
func bodiless(l *[256]int32, types string) *[256]int32 {
	for i := range len(types) {
		l[types[i]] = 0
	}
	return l
}

func limitsOf(allowed string, most int32) Limits {
	var l [256]int32
	for i := range l {
		l[i] = -1
	}
	for i := range len(allowed) {
		l[allowed[i]] = most
	}
	return &l
}

// ErrTooLong is returned for a body that the caller does not want to hold.
var ErrTooLong = errors.New("the message is longer than may be held")
