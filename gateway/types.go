package gateway

import (
	"bytes"
	"encoding/binary"
	"slices"

	"github.com/duri-io/duri/pgwire"
)

// OIDs of types that are not PostgreSQL's own may differ between sites, and drivers keep what they have learnt of one. So a session
// notes which it has met, for the Router to say whether it may go on elsewhere.

const (
	// firstUserOID is PostgreSQL's FirstNormalObjectId (src/include/access/transam.h).
	firstUserOID = 16384
	// typesMax is how many a session may meet; who has met more is taken to have met these.
	typesMax = 1000
)

// seeTypes notes the types of a description that is at hand. s.mu is held.
func (s *session) seeTypes(b *backend, typ byte) {
	if !s.keeps() {
		return
	}
	body, err := b.r.Peek(min(b.r.Left(), pgwire.BufferSize)) // of a longer one, what is at its beginning
	if err != nil {
		return
	}
	switch typ {
	case pgwire.ParameterDescription:
		s.types = addOIDs(s.types, body)
	case pgwire.RowDescription:
		s.types = addColumns(s.types, body)
	}
}

// nameTypes notes the types that a Parse gives its parameters; oids is as in pgwire.Statement.
func (s *session) nameTypes(oids []byte) {
	if !s.keeps() || len(oids) <= 2 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.types = addOIDs(s.types, oids)
}

// addOIDs adds the OIDs behind a number of them.
func addOIDs(seen []uint32, b []byte) []uint32 {
	for b = b[min(2, len(b)):]; len(b) >= 4; b = b[4:] {
		seen = addType(seen, binary.BigEndian.Uint32(b))
	}
	return seen
}

// addColumns adds the types of the columns of a RowDescription.
func addColumns(seen []uint32, b []byte) []uint32 {
	const behindName, typeAt = 18, 6
	for b = b[min(2, len(b)):]; ; {
		end := bytes.IndexByte(b, 0)
		if end < 0 || len(b) < end+1+behindName {
			return seen
		}
		b = b[end+1:]
		seen = addType(seen, binary.BigEndian.Uint32(b[typeAt:]))
		b = b[behindName:]
	}
}

func addType(seen []uint32, oid uint32) []uint32 {
	if oid < firstUserOID || len(seen) >= typesMax || slices.Contains(seen, oid) {
		return seen
	}
	return append(seen, oid)
}
