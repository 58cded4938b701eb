package link

import (
	"time"

	"github.com/duri-io/duri/link/linkpb"
	"github.com/duri-io/duri/wal"
)

// Clock is an estimate of a peer's clock, from the exchange of heartbeats and acknowledgements (replication.md rule 1).
// The true offset lies within RTT/2 of Offset, as far as the clocks did not step meanwhile.
type Clock struct {
	Offset  time.Duration `json:"offset"` // positive: the peer's clock is ahead of the local one
	RTT     time.Duration `json:"rtt"`    // round trip of the sample that Offset comes from
	At      wal.Time      `json:"at"`     // local time of that sample
	Samples int           `json:"-"`      // how many it was chosen from; zero: nothing is known
}

// exchange is one round trip: sent and back by the local clock, there and returned by the peer's.
type exchange struct{ sent, there, returned, back wal.Time }

// sample turns an exchange into an estimate; ok is false when a clock was set in the middle of it.
func (x exchange) sample() (c Clock, ok bool) {
	c = Clock{
		Offset: (x.there.Sub(x.sent) + x.returned.Sub(x.back)) / 2,
		RTT:    x.back.Sub(x.sent) - x.returned.Sub(x.there),
		At:     x.back, Samples: 1,
	}
	return c, c.RTT >= 0 && x.returned >= x.there && x.sent != 0 && x.there != 0
}

const (
	clockSamples = 8
	// driftMax is what two clocks may drift apart while a sample is kept, generously.
	driftMax = 2 * time.Millisecond
)

// estimator chooses the sample with the shortest round trip among the latest: queueing only ever lengthens it.
type estimator struct{ recent []Clock }

// add takes a sample. When it cannot be true together with the present estimate, a clock was set: the old samples are
// dropped. A step smaller than the two round trips together may look like delay; the old samples leave with time.
func (e *estimator) add(c Clock) {
	if best, ok := e.best(); ok && (c.Offset-best.Offset).Abs() > (c.RTT+best.RTT)/2+driftMax {
		e.recent = e.recent[:0]
	}
	if len(e.recent) == clockSamples {
		e.recent = append(e.recent[:0], e.recent[1:]...)
	}
	e.recent = append(e.recent, c)
}

// best is the estimate; ok is false when there is none.
func (e *estimator) best() (c Clock, ok bool) {
	for i, s := range e.recent {
		if i == 0 || s.RTT <= c.RTT {
			c = s
		}
	}
	c.Samples = len(e.recent)
	return c, c.Samples > 0
}

// echo keeps what a stream needs to answer the peer's clock and to read the answer to its own. Not for concurrent use.
type echo struct {
	peerSent, cameAt wal.Time // the latest message from the peer
	used             wal.Time // the own sent that gave a sample already
}

// hear takes the clock of a message that came at now, and returns the exchange that it completes, once for each sent.
func (e *echo) hear(c *linkpb.Clock, now wal.Time) (x exchange, ok bool) {
	e.peerSent, e.cameAt = wal.Time(c.GetSent()), now
	sent := wal.Time(c.GetEchoSent())
	if sent == 0 || sent == e.used {
		return exchange{}, false
	}
	e.used = sent
	return exchange{sent: sent, there: wal.Time(c.GetEchoReceived()), returned: e.peerSent, back: now}, true
}

// say is the clock of a message that is sent at now.
func (e *echo) say(now wal.Time) *linkpb.Clock {
	return &linkpb.Clock{Sent: int64(now), EchoSent: int64(e.peerSent), EchoReceived: int64(e.cameAt)}
}
