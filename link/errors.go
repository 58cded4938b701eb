package link

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/link/linkpb"
	"github.com/duri-io/duri/wal"
)

// Sentinels for what a caller tells apart with errors.Is; an Error is the one of its kind.
var (
	// ErrNotReady: the peer has no journal of this database yet.
	ErrNotReady = errors.New("link: peer is not ready")
	// ErrUnknownDatabase: the peer does not replicate a database of this name.
	ErrUnknownDatabase = errors.New("link: peer does not replicate this database")
	// ErrCluster: the peer belongs to another cluster.
	ErrCluster = errors.New("link: peer belongs to another cluster")
	// ErrVersion: no protocol version in common.
	ErrVersion = errors.New("link: no protocol version in common")
	// ErrSite: the caller's certificate does not give it the right to call.
	ErrSite = errors.New("link: caller is not a peer")
	// ErrIncarnation: the copy belongs to another history than the origin's journal (durability.md section 3).
	ErrIncarnation = errors.New("link: journal is another incarnation")
	// ErrAhead: the copy reaches beyond the origin's journal, which lost its tail; it may decode it again.
	ErrAhead = errors.New("link: copy is ahead of the origin's journal")
	// ErrPruned: the origin no longer keeps what the copy needs next.
	ErrPruned = errors.New("link: origin no longer keeps the position")
	// ErrStopping: the peer's agent is stopping, as planned.
	ErrStopping = errors.New("link: peer is stopping")
	// ErrSuperseded: a newer stream of the same site and database took over.
	ErrSuperseded = errors.New("link: superseded by a newer stream")
	// ErrProtocol: the peer broke the protocol.
	ErrProtocol = errors.New("link: peer broke the protocol")
	// ErrJournal: the origin cannot read its own journal.
	ErrJournal = errors.New("link: origin cannot read its journal")
	// ErrFailed: the peer took the request and could not fulfil it.
	ErrFailed = errors.New("link: peer could not do it")
	// ErrLogin: the site does not log this role in at its PostgreSQL by certificate.
	ErrLogin = errors.New("link: no login by certificate")
	// ErrUnreachable: there is no connection to the peer.
	ErrUnreachable = errors.New("link: peer is unreachable")
	// ErrBroken: the connection broke.
	ErrBroken = errors.New("link: connection broke")
	// ErrSilent: nothing came from the other end for too long, as one of the two ends noticed.
	ErrSilent = errors.New("link: peer is silent")
	// ErrHeld: the copy refused what the origin sent; see HoldError.
	ErrHeld = errors.New("link: direction is held")
)

// kinds gives each sentinel that travels its code.
var kinds = map[linkpb.Code]error{
	linkpb.Code_CODE_NOT_READY:        ErrNotReady,
	linkpb.Code_CODE_UNKNOWN_DATABASE: ErrUnknownDatabase,
	linkpb.Code_CODE_WRONG_CLUSTER:    ErrCluster,
	linkpb.Code_CODE_WRONG_VERSION:    ErrVersion,
	linkpb.Code_CODE_WRONG_SITE:       ErrSite,
	linkpb.Code_CODE_INCARNATION:      ErrIncarnation,
	linkpb.Code_CODE_AHEAD:            ErrAhead,
	linkpb.Code_CODE_PRUNED:           ErrPruned,
	linkpb.Code_CODE_STOPPING:         ErrStopping,
	linkpb.Code_CODE_SUPERSEDED:       ErrSuperseded,
	linkpb.Code_CODE_PROTOCOL:         ErrProtocol,
	linkpb.Code_CODE_JOURNAL:          ErrJournal,
	linkpb.Code_CODE_FAILED:           ErrFailed,
	linkpb.Code_CODE_SILENT:           ErrSilent,
	linkpb.Code_CODE_LOGIN:            ErrLogin,
}

// Error is why a request failed or a stream ended: one sentence and, where a person can act, a hint. At the client,
// Peer is the site that was asked.
type Error struct {
	Kind     error // one of the sentinels
	Peer     string
	Sentence string
	Hint     string
	// Start and End are those of the origin's journal with ErrAhead and ErrPruned.
	Start, End wal.LSN
}

// Error gives peer and sentence.
func (e *Error) Error() string {
	if e.Peer == "" {
		return e.Sentence
	}
	return "site " + e.Peer + ": " + e.Sentence
}

// Unwrap gives the kind.
func (e *Error) Unwrap() error { return e.Kind }

// HintText is the advice that goes with the error.
func (e *Error) HintText() string { return e.Hint }

// Retry reports whether to try the same again after a pause is sensible: the cause may pass by itself. It is false
// where a person, or a re-synchronisation, has to act first.
func Retry(err error) bool {
	for _, held := range []error{
		ErrHeld, ErrCluster, ErrVersion, ErrSite, ErrIncarnation, ErrPruned, ErrProtocol, ErrJournal, journal.ErrFailed,
	} {
		if errors.Is(err, held) {
			return false
		}
	}
	return true
}

// refuse builds an Error that is to travel.
func refuse(kind error, hint, format string, args ...any) *Error {
	return &Error{Kind: kind, Sentence: fmt.Sprintf(format, args...), Hint: hint}
}

// failure turns an error of the site's own code into one that travels; what is an Error already stays.
func failure(kind error, err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Kind: kind, Sentence: err.Error(), Hint: hintOf(err)}
}

func hintOf(err error) string {
	var hinted interface{ HintText() string }
	if errors.As(err, &hinted) {
		return hinted.HintText()
	}
	return ""
}

// refusal is the form in which an Error travels.
func (e *Error) refusal() *linkpb.Refusal {
	r := &linkpb.Refusal{Sentence: e.Sentence, Hint: e.Hint, Start: uint64(e.Start), End: uint64(e.End)}
	for code, kind := range kinds {
		if errors.Is(kind, e.Kind) {
			r.Code = code
		}
	}
	return r
}

// GRPCStatus makes an Error the gRPC status that a handler returns; its detail is the Refusal.
func (e *Error) GRPCStatus() *status.Status {
	st := status.New(codes.FailedPrecondition, e.Sentence)
	if full, err := st.WithDetails(e.refusal()); err == nil {
		return full
	}
	return st
}

// unsaid stands for a reason that the peer did not give.
const unsaid = "no reason given"

// received turns the error of a gRPC call to peer at address into an Error. A done context is the caller's own doing
// and stays what it is.
func received(ctx context.Context, err error, peer, address string) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if _, ok := errors.AsType[*Error](err); ok {
		return err
	}
	st, _ := status.FromError(err)
	for _, d := range st.Details() {
		if r, ok := d.(*linkpb.Refusal); ok {
			return fromRefusal(r, peer)
		}
	}
	return fromStatus(st, peer, address)
}

func fromRefusal(r *linkpb.Refusal, peer string) *Error {
	e := &Error{
		Kind: kinds[r.GetCode()], Peer: peer, Sentence: r.GetSentence(), Hint: r.GetHint(),
		Start: wal.LSN(r.GetStart()), End: wal.LSN(r.GetEnd()),
	}
	if e.Kind == nil { // a newer peer's code
		e.Kind = ErrFailed
	}
	if e.Sentence == "" {
		e.Sentence = unsaid
	}
	return e
}

// fromStatus judges a status that the peer's duri did not make: the transport did.
func fromStatus(st *status.Status, peer, address string) *Error {
	text := st.Message()
	if text == "" {
		text = unsaid
	}
	e := &Error{Kind: ErrBroken, Peer: peer, Sentence: "link broke: " + text}
	switch {
	case st.Code() == codes.Unimplemented:
		return unreachable(peer, address, noProtocol)
	case strings.Contains(text, "certificate"), strings.Contains(text, "tls:"), strings.Contains(text, "connection error"), strings.Contains(text, "dial"):
		return unreachable(peer, address, text)
	}
	return e
}

// HoldError says that the copy refused what the origin sent: damaged, not fitting, or another history. Sending it
// again would not help, and skipping it would lose changes, so the direction is held until a person acts.
type HoldError struct {
	Dir    string  // of the copy
	At     wal.LSN // the copy is good up to here
	Advice string
	Err    error
}

// Error gives position and cause.
func (e *HoldError) Error() string {
	return fmt.Sprintf("direction held after %s: copy in %s refuses what the origin sent: %v", e.At, e.Dir, e.Err)
}

// Unwrap makes errors.Is(err, ErrHeld) true, and gives the cause.
func (e *HoldError) Unwrap() []error { return []error{ErrHeld, e.Err} }

// HintText is the advice that goes with the error.
func (e *HoldError) HintText() string { return e.Advice }
