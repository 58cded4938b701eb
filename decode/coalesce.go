package decode

import (
	"net"
	"time"
)

// coalescer lets small pieces pile up in the socket's buffer while a stream is busy. A walsender sends each change in a
// segment of its own; reading each as it comes costs both processes a wake-up per change, which is more than decoding
// it. A stream that is not busy is read at once, so a lone transaction waits for nothing.
type coalescer struct {
	net.Conn
	small int       // small reads in a row within busyWithin
	since time.Time // of the first of them
}

const (
	smallRead  = 4 << 10
	busyReads  = 64                     // so many small reads ...
	busyWithin = 20 * time.Millisecond  // ... within this time make a stream busy
	pileUp     = 500 * time.Microsecond // how long pieces then pile up before each read
)

// Read is net.Conn's.
func (c *coalescer) Read(b []byte) (int, error) {
	if c.small >= busyReads {
		time.Sleep(pileUp)
	}
	n, err := c.Conn.Read(b)
	switch now := time.Now(); {
	case n >= smallRead: // piled up: stay as it is
	case c.small == 0 || now.Sub(c.since) > busyWithin:
		c.small, c.since = 1, now
	default:
		c.small++
		if c.small >= busyReads {
			c.small, c.since = busyReads, now
		}
	}
	return n, err
}
