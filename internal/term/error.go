package term

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Exit codes of the duri command (style.md section 6). They are a contract: a number never changes its meaning, and
// a script treats one it does not know as failure.
const (
	ExitOK          = 0   // done, healthy
	ExitFailed      = 1   // failed
	ExitUsage       = 2   // wrong usage: nothing was attempted
	ExitPartial     = 3   // done in part, or a check found problems
	ExitUnreachable = 4   // duri or a site cannot be reached
	ExitRefused     = 5   // refused for safety
	ExitTimeout     = 6   // timed out, the outcome is unknown
	ExitInterrupted = 130 // interrupted by the user
)

// Error is an error as the command line shows it: what was attempted, what is wrong, and what to do.
// Any field may be empty.
type Error struct {
	Op   string // what was attempted: "cannot pause link seoul->busan"
	Msg  string // what is wrong: "slot is inactive"
	Hint string // one sentence for the user, shown on its own line
	Code int    // exit code; 0 means: that of Err, else ExitFailed
	Err  error  // the cause; its text follows Msg
}

// Error joins Op, Msg and the cause with ": ". The hint is not part of it.
func (e *Error) Error() string {
	var parts []string
	for _, s := range []string{e.Op, e.Msg} {
		if s != "" {
			parts = append(parts, s)
		}
	}
	if e.Err != nil {
		parts = append(parts, e.Err.Error())
	}
	if len(parts) == 0 {
		return "unknown error"
	}
	return strings.Join(parts, ": ")
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// HintText gives the error's own hint, or else that of its cause.
func (e *Error) HintText() string {
	if e.Hint != "" || e.Err == nil {
		return e.Hint
	}
	return hintOf(e.Err)
}

// ExitCode gives the error's own code, or else that of its cause.
func (e *Error) ExitCode() int {
	if e.Code != 0 {
		return e.Code
	}
	if e.Err != nil {
		return ExitCode(e.Err)
	}
	return ExitFailed
}

// Usage is a wrong use of the command line: exit code 2.
func Usage(msg, hint string) *Error { return &Error{Msg: msg, Hint: hint, Code: ExitUsage} }

// Usagef is Usage without a hint, with a formatted message.
func Usagef(format string, args ...any) *Error { return Usage(fmt.Sprintf(format, args...), "") }

// ExitCode is the exit code for err: the one that an error in its chain carries (a method ExitCode() int), 130 for an
// interruption, 6 for an exceeded deadline, 1 for everything else, 0 for nil.
func ExitCode(err error) int {
	var coded interface{ ExitCode() int }
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &coded):
		return coded.ExitCode()
	case errors.Is(err, context.Canceled):
		return ExitInterrupted
	case errors.Is(err, context.DeadlineExceeded):
		return ExitTimeout
	}
	return ExitFailed
}

// hintOf finds the hint that an error in the chain carries. Packages below the command line need not know this
// package: a method HintText() string is enough.
func hintOf(err error) string {
	var hinted interface{ HintText() string }
	if errors.As(err, &hinted) {
		return hinted.HintText()
	}
	return ""
}

// PrintError writes "duri: ..." and, when there is one, "hint: ..." on the next line. An error that holds several
// (Unwrap() []error) is written as that many pairs.
func PrintError(w io.Writer, err error, style Style) {
	if many, ok := err.(interface{ Unwrap() []error }); ok && len(many.Unwrap()) > 0 {
		for _, e := range many.Unwrap() {
			PrintError(w, e, style)
		}
		return
	}
	text := style.Bad("duri:") + " " + Clean(err.Error()) + "\n"
	if hint := hintOf(err); hint != "" {
		text += style.Dim("hint:") + " " + Clean(hint) + "\n"
	}
	_, _ = io.WriteString(w, text) // there is nowhere left to report to
}
