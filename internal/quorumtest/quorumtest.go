// Package quorumtest is a register in memory for tests of what uses quorum.Store: several clients of one value, each of
// which can be cut off, lose an answer, or have a swap under way for as long as the test wants.
//
// It keeps the promises of quorum.Store; package quorum/etcdstore is tested to do so too.
package quorumtest

import (
	"context"
	"fmt"
	"sync"

	"github.com/duri-io/duri/quorum"
)

// Register is the value that clients share. It may be used from several goroutines, as may its clients.
type Register struct {
	mu      sync.Mutex
	value   quorum.Register // Epoch 0: absent
	changed chan struct{}   // closed and replaced with each change
}

// New makes a register that has not been written.
func New() *Register { return &Register{changed: make(chan struct{})} }

// swap writes next if it is next.
func (r *Register) swap(next quorum.Register) (quorum.Register, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.value.Epoch+1 != next.Epoch {
		if r.value.Equal(next) {
			return next.Clone(), nil
		}
		return r.value.Clone(), quorum.ErrChanged
	}
	r.value = next.Clone()
	close(r.changed)
	r.changed = make(chan struct{})
	return next.Clone(), nil
}

func (r *Register) get() (quorum.Register, chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.value.Clone(), r.changed
}

// Client is one site's quorum.Store.
type Client struct {
	r *Register

	mu         sync.Mutex
	cut        chan struct{} // closed by Heal; nil: not cut
	loseAnswer bool
	hold       bool
	held       []quorum.Register
}

var _ quorum.Store = (*Client)(nil)

// Client makes a client.
func (r *Register) Client() *Client { return &Client{r: r} }

// Cut lets nothing through until Heal: calls wait for it, or for the end of their context.
func (c *Client) Cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut == nil {
		c.cut = make(chan struct{})
	}
}

// Heal ends Cut.
func (c *Client) Heal() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut != nil {
		close(c.cut)
		c.cut = nil
	}
}

// LoseAnswer lets the next swap arrive, and its answer not.
func (c *Client) LoseAnswer() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.loseAnswer = true
}

// Hold keeps swaps under way until Release: the client hears that it is not known what becomes of them.
func (c *Client) Hold() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hold = true
}

// Release lets the held swaps arrive, in order.
func (c *Client) Release() {
	c.mu.Lock()
	held := c.held
	c.hold, c.held = false, nil
	c.mu.Unlock()
	for _, next := range held {
		_, _ = c.r.swap(next) // the client has its answer already: unknown
	}
}

// passes waits while the client is cut off.
func (c *Client) passes(ctx context.Context) error {
	for {
		c.mu.Lock()
		cut := c.cut
		c.mu.Unlock()
		if cut == nil {
			return ctx.Err()
		}
		select {
		case <-cut:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Get reads the value.
func (c *Client) Get(ctx context.Context) (quorum.Register, error) {
	if err := c.passes(ctx); err != nil {
		return quorum.Register{}, fmt.Errorf("read the register: %w", err)
	}
	value, _ := c.r.get()
	if value.Epoch == 0 {
		return quorum.Register{}, quorum.ErrAbsent
	}
	return value, nil
}

// Swap writes the next value. When the client is cut off, nothing was sent and nothing arrives later; ErrUnknown all the
// same, as a real client cannot tell.
func (c *Client) Swap(ctx context.Context, next quorum.Register) (quorum.Register, error) {
	if err := c.passes(ctx); err != nil {
		return quorum.Register{}, fmt.Errorf("change the register: %w: %w", quorum.ErrUnknown, err)
	}
	c.mu.Lock()
	hold, lose := c.hold, c.loseAnswer
	if hold {
		c.held = append(c.held, next.Clone())
	} else {
		c.loseAnswer = false
	}
	c.mu.Unlock()
	if hold {
		return quorum.Register{}, fmt.Errorf("change the register: %w", quorum.ErrUnknown)
	}
	value, err := c.r.swap(next)
	if lose {
		return quorum.Register{}, fmt.Errorf("change the register: %w", quorum.ErrUnknown)
	}
	return value, err
}

// Watch delivers the present value and each change, or the latest of several.
func (c *Client) Watch(ctx context.Context) <-chan quorum.Register {
	out := make(chan quorum.Register)
	go func() {
		defer close(out)
		var last uint64
		for c.passes(ctx) == nil {
			value, changed := c.r.get()
			if value.Epoch > last {
				last = value.Epoch
				select {
				case out <- value:
				case <-ctx.Done():
					return
				}
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}
