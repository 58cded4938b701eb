// Package link carries journals between the agents of two sites, over mutual TLS.
//
// The receiver dials. Client.Follow asks a peer's Server for the peer's journal of one database from the end of the
// local copy on; the answer is a stream of journal frames and heartbeats, and acknowledgements flow back, on a connection of
// its own. The same port serves, by gRPC, what else agents ask each other: the contents of a database for a site that joins,
// one row, a comparison, the status document.
//
// It does not decide what a receipt is worth (durability.md section 2), does not apply anything, and does not retry:
// Follow is one attempt, the caller loops and asks Retry whether time alone can help. It moves journal frames without
// looking into them; the copy verifies them.
//
// It guarantees:
//   - Who the peer is comes from its certificate and from nowhere else.
//   - A peer of another cluster, or with no protocol version in common, is refused before anything else, and the
//     reason arrives at the other end as an Error with a sentence and a hint.
//   - What was sent and not yet taken by the receiver is bounded, in bytes (flow control beyond that of TCP).
//   - Silence of more than 3 s ends a stream at both ends, also when only one direction is cut.
//   - Acknowledgements of one site and database reach Database.Acknowledged in order, from one stream at a time. Those for
//     a copy of a third site's journal (Client.FollowCopy) reach nobody.
//
// CopyWriter is the receiving end for a copy kept as a journal. DESIGN.md tells why, link.proto the messages.
package link

import (
	"context"
	"io"
	"time"

	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/wal"
)

// Protocol versions that this package speaks.
const (
	versionMin = 1
	versionMax = 1
)

const (
	// DefaultWindow is how many bytes of frames may be under way to a receiver that has not taken them.
	DefaultWindow = 16 << 20
	// DefaultSilence is how long a stream may bring nothing before it counts as broken.
	DefaultSilence = 3 * time.Second
	// DefaultHeartbeat is the pause between heartbeats, and the longest one between acknowledgements
	// (durability.md section 5).
	DefaultHeartbeat = 200 * time.Millisecond

	chunkBytes   = 1 << 20  // journal bytes in one message, at the most
	messageBytes = 64 << 20 // largest message of the unary calls
	copyBytes    = 256 << 10
)

// Versions is a range of protocol versions. The zero value means those that this package speaks.
type Versions struct{ Min, Max uint32 }

func (v Versions) withDefaults() Versions {
	if v == (Versions{}) {
		return Versions{versionMin, versionMax}
	}
	return v
}

// common is the highest version in both ranges; ok is false when there is none.
func (v Versions) common(o Versions) (version uint32, ok bool) {
	version = min(v.Max, o.Max)
	return version, version >= max(v.Min, o.Min)
}

// Ack says how far a receiver has come with one origin's journal of one database (durability.md section 2): received,
// fsynced in its copy, and visible in its tables.
type Ack struct {
	Received wal.LSN `json:"received"`
	Durable  wal.LSN `json:"durable"`
	Applied  wal.LSN `json:"applied"`
	// Epoch is that of the cluster's register as the receiver knew it before it read the positions: a receipt counts in
	// its own epoch only (durability.md section 4). 0: it knows none.
	Epoch uint64 `json:"epoch,omitempty"`
}

// Statement is what a site says of itself in one epoch of the cluster's register, for one database (durability.md sections
// 5, 6 and 9). What it lists stays so until the site knows a greater epoch. It is not changed once it was said.
type Statement struct {
	Epoch  uint64
	Frozen []string // sites that get no receipts from it, and whose receipts it does not count
	// Armed are sites that are no members, without whom it acknowledges nothing any more; each holds what it had
	// acknowledged before.
	Armed   []string
	Secured bool               // what it acknowledged in former epochs has the receipts that this one asks for
	Copies  map[string]wal.LSN // by site: how far its copy of that one's journal is durable, as read in this epoch
}

// Heartbeat is the origin's sign of life.
type Heartbeat struct {
	Sent         wal.Time // by the origin's clock
	End, Durable wal.LSN  // of the origin's journal
	// Heard is how long ago, when it sent this, the origin had last heard from here. It grows when only the direction
	// to the origin is cut. Zero when nothing was heard yet.
	Heard time.Duration
	Clock Clock  // of the origin, as estimated here
	Unfit string // why it cannot do its part in durability, by its own word; empty: it can
	// Uncaptured: its database may have committed more than the journal has up to End (see Database.Uncaptured).
	Uncaptured bool
}

// Database is what a site offers to its peers for one database. Implementations are safe for concurrent use.
type Database interface {
	// Journal is the journal of what this site commits. The error says, as a sentence, why there is none yet.
	Journal() (*journal.Journal, error)
	// Uncaptured reports that the database may have committed what the journal does not have yet, other than in the moment
	// that decoding takes: its server has ended, or what it has recovered was not decoded yet.
	Uncaptured() bool
	// CopyOf is this site's copy of another site's journal, which a third one asks for. The error says why there is none.
	CopyOf(site string) (*journal.Journal, error)
	// Acknowledged tells how far site has come. It must not block. Calls for one site come one at a time, in order.
	Acknowledged(site string, a Ack)
	// Stated tells what site says of itself, whenever that has changed. It must not block. Calls for one site come one at
	// a time, in order, and a Statement comes after the acknowledgements that were given before it.
	Stated(site string, s Statement)
	// FetchRow reads the row that key (column names of rel) and their values in row identify, as it is now; false when
	// there is none.
	FetchRow(ctx context.Context, rel *wal.Relation, key []string, row wal.Tuple) (wal.Tuple, bool, error)
	// Copy writes the database's contents for a site that joins. An error from w ends it.
	Copy(ctx context.Context, w io.Writer) error
	// Compare answers a question of the comparison of sites.
	Compare(ctx context.Context, request []byte) ([]byte, error)
}

// Sink is the receiving end of Follow. Position is called first, then Welcome, then Frames and Heartbeat, which may
// overlap each other; Frames and Welcome never overlap. Ack may be called at any time after Welcome.
type Sink interface {
	// Position is what the copy holds. Without a copy have is false; end is then the position from which on the journal
	// is needed, zero for all that the origin keeps.
	Position() (inc journal.Incarnation, have bool, end wal.LSN)
	// Welcome tells the history that the frames will belong to. It creates the copy when there is none, and refuses
	// another history than the copy's. An error ends Follow.
	Welcome(h journal.Header) error
	// Frames takes whole journal records that cover (from, to]; data is the sink's until it returns. It may block: the
	// origin then stops to send. Ack is looked at as soon as it returns. An error ends Follow.
	Frames(data []byte, from, to wal.LSN) error
	// Ack is how far the copy has come. It must not block.
	Ack() Ack
	// Acks has a value whenever Ack may have changed otherwise. One goroutine receives from it.
	Acks() <-chan struct{}
	// Heartbeat must not block.
	Heartbeat(h Heartbeat)
}
