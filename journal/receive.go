package journal

import (
	"fmt"
)

// AppendFrames appends frames as a Reader of another copy returned them, unchanged. It verifies checksums, structure
// and continuity of each transaction and the chain at each seal. What lies at or below End is dropped; what would
// leave a hole is refused with a GapError. On an error everything before the refused record is appended. b is not kept.
func (j *Journal) AppendFrames(b []byte) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.appendFrames(b); err != nil {
		return fmt.Errorf("append received frames after %s to journal: %w", j.in.at.to, err)
	}
	return nil
}

func (j *Journal) appendFrames(b []byte) error {
	if err := j.usable(); err != nil {
		return err
	}
	j.beginGroup()
	defer j.in.reset()
	before := j.in.at
	for len(b) > 0 {
		f, rest, err := parseFrame(b)
		if err != nil {
			return err
		}
		b = rest
		done, err := j.in.add(f)
		if err != nil {
			return err
		}
		if f.typ == TypeSchema { // written where this copy's files need it
			j.catalog.learn(j.in.schema, f.raw)
		} else {
			j.frames = append(j.frames, f.raw)
		}
		if !done {
			continue
		}
		if j.in.fresh {
			if err := j.appendGroup(before); err != nil {
				return err
			}
		}
		before = j.in.at
		j.beginGroup()
	}
	if len(j.frames) > 0 {
		return malformed("frames end inside a transaction")
	}
	return nil
}

// beginGroup clears what is collected per group.
func (j *Journal) beginGroup() {
	j.frames, j.used = j.frames[:0], j.used[:0]
	j.enc.serial++
}

// appendGroup writes the frames of the group that the intake has just accepted. before holds the running values in
// front of it: a new segment begins there.
func (j *Journal) appendGroup(before tally) error {
	after, size := j.in.at, 1024
	for _, f := range j.frames {
		size += len(f)
	}
	j.in.at = before
	if err := j.makeRoom(size); err != nil {
		return err
	}
	j.appendSchemas(j.used)
	for _, f := range j.frames {
		j.buf = append(j.buf, f...)
		if err := j.spill(); err != nil {
			return err
		}
	}
	j.in.at = after
	switch j.in.kind {
	case TypeTxn:
		j.local = false
		j.unsealed++
	case TypeSeal:
		j.unsealed, j.sealedAt = 0, j.o.Now()
	}
	return j.grouped()
}
