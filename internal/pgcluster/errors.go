package pgcluster

import "errors"

// ErrPortInUse says that another program listens on the cluster's port. Test for it with errors.Is.
var ErrPortInUse = errors.New("the port is in use")

// ErrRunning says that the operation wants a stopped server and this one runs.
var ErrRunning = errors.New("the server is running")

// Error is a failure that the user can do something about.
type Error struct {
	// Op says what was attempted and on what, such as "find PostgreSQL's programs".
	Op string
	// Cause is what went wrong; never nil.
	Cause error
	// Advice is one sentence, or empty.
	Advice string
}

// Error gives the message without the advice: a caller that prints for people shows Hint on a line of its own.
func (e *Error) Error() string { return e.Op + ": " + e.Cause.Error() }

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Cause }

// Hint is one sentence on what the user can do, or empty.
func (e *Error) Hint() string { return e.Advice }

// HintOf finds the hint in an error chain; it is empty when there is none.
func HintOf(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}
