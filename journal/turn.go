package journal

import (
	"fmt"

	"github.com/duri-io/duri/wal"
)

// Turn lets the journal go on as another incarnation: what is appended from now on comes from a database that has this
// origin's transactions up to back only. It makes everything durable that was appended. Positions go on: the caller sees to
// it that the next ones lie beyond End.
func (j *Journal) Turn(next Incarnation, back wal.LSN) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.turn(next, back); err != nil {
		return fmt.Errorf("turn journal to incarnation %s: %w", next, err)
	}
	return nil
}

func (j *Journal) turn(next Incarnation, back wal.LSN) error {
	if err := j.settle(); err != nil {
		return err
	}
	if j.in.at.to == j.seg.head.From { // a file of its own needs a name of its own
		if err := j.appendPosition(Position{From: j.in.at.to, To: j.in.at.to + 1, Seen: j.in.at.seen}); err != nil {
			return err
		}
	}
	h := j.nextHeader().clone()
	h.Turns = append(h.Turns, Turn{h.Incarnation, back, j.in.at.to})
	h.Incarnation = next
	return j.rotate(h)
}

// Follow lets a copy go on as the incarnation of h, which its origin offers. It is refused unless h continues just what the
// copy holds: the same incarnation before, ended at the same position, with the same chain.
func (j *Journal) Follow(h Header) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.follow(h.clone()); err != nil {
		return fmt.Errorf("follow journal to incarnation %s: %w", h.Incarnation, err)
	}
	return nil
}

func (j *Journal) follow(h Header) error {
	if err := j.settle(); err != nil {
		return err
	}
	at := &j.in.at
	switch {
	case !h.Continues(j.seg.head):
		return &TurnError{j.seg.head, h, "it does not continue the incarnation that this copy is of"}
	case h.From != at.to:
		return &TurnError{j.seg.head, h, fmt.Sprintf("that ended at %s, this copy ends at %s", h.From, at.to)}
	case h.Chain != at.chain || h.Txns != at.txns || h.Bytes != at.bytes:
		return &TurnError{j.seg.head, h, fmt.Sprintf("up to %s it has other transactions than this copy", h.From)}
	}
	h.Previous, h.MaxVersionTime, h.Seen = j.seg.head.From, at.maxVersion, at.seen
	return j.rotate(h)
}

// settle waits for an fsync that runs.
func (j *Journal) settle() error {
	for j.syncing {
		j.syncDone.Wait()
	}
	return j.usable()
}
