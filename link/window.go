package link

import (
	"context"
	"sync"
)

// window is the sender's account of bytes under way: sent, and not yet taken by the receiver.
type window struct {
	limit int64

	mu          sync.Mutex // guards the rest
	sent, taken int64
	changed     chan struct{} // closed and replaced when taken grows
}

func newWindow(limit int64) *window { return &window{limit: limit, changed: make(chan struct{})} }

// fits decides whether n more bytes may be sent. A message larger than the whole window goes when nothing is under way.
func fits(underway, n, limit int64) bool { return underway == 0 || underway+n <= limit }

// chunkFor is how many journal bytes go into one message, so that a small window holds several.
func chunkFor(limit int64) int { return int(min(chunkBytes, max(limit/4, 4<<10))) }

// reserve waits until n bytes may be sent, and counts them.
func (w *window) reserve(ctx context.Context, n int64) error {
	for {
		w.mu.Lock()
		if fits(w.sent-w.taken, n, w.limit) {
			w.sent += n
			w.mu.Unlock()
			return nil
		}
		ch := w.changed
		w.mu.Unlock()
		select {
		case <-ch:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// take notes that the receiver has taken total bytes since the stream began; false when that cannot be.
func (w *window) take(total int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if total < w.taken || total > w.sent {
		return false
	}
	if total > w.taken {
		w.taken = total
		close(w.changed)
		w.changed = make(chan struct{})
	}
	return true
}

// underway is the number of bytes sent and not taken.
func (w *window) underway() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sent - w.taken
}
