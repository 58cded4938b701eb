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
	block   [coalesceBlock]byte
	ready   []byte    // read from the connection, not yet given out
	small   int       // small reads in a row within busyWithin
	since   time.Time // of the first of them
	drained bool      // the last read emptied the socket
}

const (
	coalesceBlock = 128 << 10
	busyReads     = 64                     // so many small reads ...
	busyWithin    = 20 * time.Millisecond  // ... within this time make a stream busy
	pileUp        = 500 * time.Microsecond // how long pieces then pile up before each read
)

// Read is net.Conn's.
func (c *coalescer) Read(b []byte) (int, error) {
	if len(c.ready) == 0 {
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(b, c.ready)
	c.ready = c.ready[n:]
	return n, nil
}

func (c *coalescer) fill() error {
	if c.small >= busyReads && c.drained {
		time.Sleep(pileUp)
	}
	n, err := c.Conn.Read(c.block[:])
	if err != nil && n == 0 {
		return err
	}
	c.ready, c.drained = c.block[:n], n < coalesceBlock/2
	switch now := time.Now(); {
	case now.Sub(c.since) > busyWithin:
		c.small, c.since = 1, now
	case c.small < busyReads-1:
		c.small++
	default: // busy, and it stays so as long as reads follow each other
		c.small, c.since = busyReads, now
	}
	return nil
}
