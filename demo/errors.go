package demo

import (
	"errors"

	"github.com/duri-io/duri/internal/pgcluster"
)

// Error is a failure that the user can do something about.
type Error struct {
	Msg  string // what was attempted and what is wrong
	Hint string // one sentence
	Err  error  // the cause; may be nil
}

// Error gives the message and the cause, without the hint.
func (e *Error) Error() string {
	switch {
	case e.Err == nil:
		return e.Msg
	case e.Msg == "":
		return e.Err.Error()
	}
	return e.Msg + ": " + e.Err.Error()
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// HintText is the advice that goes with the error.
func (e *Error) HintText() string { return e.Hint }

// withHint makes the hint of an error of pgcluster one that the command line finds.
func withHint(err error) error {
	var known interface{ HintText() string }
	if err == nil || errors.As(err, &known) {
		return err
	}
	if hint := pgcluster.HintOf(err); hint != "" {
		return &Error{Err: err, Hint: hint}
	}
	return err
}
