package gateway

import (
	"errors"
	"fmt"

	"github.com/duri-io/duri/pgwire"
)

// fatalError is an error after which the client's connection ends. Each code is a contract with
// clients: a change of one is a change of a major version.
func fatalError(code, message, detail, hint string) *pgwire.Error {
	return &pgwire.Error{Severity: "FATAL", Code: code, Message: message, Detail: detail, Hint: hint}
}

// Codes that the gateway gives itself.
const (
	codeLost        = "08006" // the server was lost, or its state
	codeShutdown    = "57P01" // the gateway ends, or a session that cannot be carried on
	codeNoSite      = "57P03" // no server may be used now
	codeTooMany     = "53300"
	codeRate        = "53400"
	codePassword    = "28P01"
	codeAuth        = "28000"
	codeProtocol    = "08P01" // the client broke the protocol; never a failure of the gateway
	codeUnsupported = "0A000"
	codeMissing     = "26000" // a prepared statement does not exist
	codeRolledBack  = "40001" // the transaction has certainly not taken effect; the session goes on
	codeInFailed    = "25P02"
	codeCrash       = "57P02" // a server's, that ends all its sessions
	codeUnknown     = "08007" // the fate of a commit is unknown
)

// serverError is an ErrorResponse that a server sent instead of a login. Clients get it unchanged.
type serverError struct {
	raw  []byte
	says *pgwire.Error
}

func (e *serverError) Error() string { return e.says.Error() }

// asWireError gives what a client is told of err, if it is more than that the connection broke.
func asWireError(err error) (*pgwire.Error, bool) {
	if e, ok := errors.AsType[*serverError](err); ok {
		return e.says, true
	}
	return errors.AsType[*pgwire.Error](err)
}

// hintOf is the advice that goes with an error.
func hintOf(err error) string {
	if h, ok := errors.AsType[interface {
		error
		HintText() string
	}](err); ok {
		return h.HintText()
	}
	return ""
}

// report is the message that tells a client err, which ends its session.
func report(err error) []byte {
	if e, ok := errors.AsType[*serverError](err); ok {
		return e.raw
	}
	e, ok := errors.AsType[*pgwire.Error](err)
	if !ok {
		e = fatalError(codeLost, err.Error(), "", hintOf(err))
		if _, ok := errors.AsType[*pgwire.ProtocolError](err); ok {
			e.Code = codeProtocol
		}
	}
	return pgwire.AppendError(nil, e)
}

// lost says that a session's server is gone while the session needed it.
func lost(t Target, why, cause string) *pgwire.Error {
	return fatalError(codeLost, fmt.Sprintf("the connection to the server of %s was lost", t.name()),
		fmt.Sprintf("The session could not go on elsewhere: %s. %s", why, cause),
		"connect again; whether a transaction that was being committed took effect must be looked up")
}

// name is how messages call a target.
func (t *Target) name() string {
	if t.Site != "" {
		return "site " + t.Site
	}
	return t.Address
}
