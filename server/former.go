package server

import (
	"context"
	"net"
	"sync"

	"github.com/duri-io/duri/link"
)

// former is the way of an agent's own gateway to its own site in a process that takes another agent over: through that one, as from
// a gateway elsewhere, until it ends, and then, when the agent of this process has begun, as ever. It implements link.Asked.
type former struct {
	h       *host
	client  *link.Client
	tunnels *siteLink       // whose connections are those through the former agent
	alive   context.Context // until formerGone: of what asks the former agent
	end     context.CancelFunc
	left    chan struct{} // closed with formerLeaves, and what comes behind it
	begun   chan struct{} // closed with that stage

	mu    sync.Mutex // guards stage
	stage stage
}

// stage is how far the one agent has followed the other. There is no way back.
type stage int

const (
	formerServes stage = iota
	formerLeaves       // no transaction begins there any more
	formerGone         // nobody serves at this site
	begun
)

func newFormer(h *host, client *link.Client) *former {
	f := &former{h: h, client: client, tunnels: &siteLink{conns: map[*tunneled]struct{}{}}, left: make(chan struct{}), begun: make(chan struct{})}
	f.alive, f.end = context.WithCancel(context.Background())
	return f
}

// advance goes on to a stage, if that is not behind.
func (f *former) advance(to stage) {
	f.mu.Lock()
	was := f.stage
	f.stage = max(was, to)
	f.mu.Unlock()
	if was < formerLeaves && to >= formerLeaves {
		close(f.left)
	}
	if was < begun && to == begun {
		close(f.begun)
	}
	if to >= formerGone {
		f.end()
		f.tunnels.cut()
	}
}

func (f *former) now() stage {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stage
}

// leaving reports whether sessions are to leave the site because its agent is about to end.
func (f *former) leaving() bool {
	now := f.now()
	return now == formerLeaves || now == formerGone
}

var errBetween = &hinted{"the agent of this site is restarted", "it is back in a moment; its log tells"}

// to is who is asked now.
func (f *former) to() (link.Asked, error) {
	switch f.now() {
	case begun:
		return f.h, nil
	case formerGone:
		return nil, errBetween
	default:
		return f.client, nil
	}
}

// way is how the agent's own gateway reaches its own site.
func (h *host) way() (asked link.Asked, dial func(ctx context.Context) (net.Conn, error), dialAs func(ctx context.Context, role string) (net.Conn, error)) {
	if h.former != nil {
		return h.former, h.former.dial, h.former.dialAs
	}
	return h, h.entry.dialOwn, h.entry.dialOwnAs
}

// shut is why the agent's own gateway may not use its own site, which it learns here at once; empty: it may.
func (h *host) shut() string {
	if h.former == nil {
		return h.entry.reason()
	}
	switch h.former.now() {
	case begun:
		return h.entry.reason()
	case formerServes:
		return ""
	}
	return errBetween.text
}

func (f *former) dial(ctx context.Context) (net.Conn, error) {
	if f.now() == begun {
		return f.h.entry.dialOwn(ctx)
	}
	return f.tunnel(func() (net.Conn, error) { return f.client.Dial(ctx) })
}

func (f *former) dialAs(ctx context.Context, role string) (net.Conn, error) {
	if f.now() == begun {
		return f.h.entry.dialOwnAs(ctx, role)
	}
	return f.tunnel(func() (net.Conn, error) { return f.client.DialAs(ctx, role) })
}

// tunnel connects through the former agent.
func (f *former) tunnel(dial func() (net.Conn, error)) (net.Conn, error) {
	if f.now() >= formerGone {
		return nil, errBetween
	}
	conn, err := dial()
	if err != nil {
		return nil, err
	}
	c := &tunneled{conn, f.tunnels}
	f.tunnels.mu.Lock()
	f.tunnels.conns[c] = struct{}{}
	f.tunnels.mu.Unlock()
	if f.now() >= formerGone { // it may have come too late to be cut
		_ = c.Close()
		return nil, errBetween
	}
	return c, nil
}

// Watch is that of link.Asked. It ends with the former agent, and waits between the two.
func (f *former) Watch(ctx context.Context, tell func(link.SiteState) error) error {
	switch f.now() {
	case formerServes, formerLeaves:
		watching, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(f.alive, cancel)()
		err := f.client.Watch(watching, tell)
		if f.alive.Err() != nil {
			return errBetween
		}
		return err
	}
	select {
	case <-f.begun:
		return f.h.Watch(ctx, tell)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Verifier is that of link.Asked.
func (f *former) Verifier(ctx context.Context, role string) (string, error) {
	to, err := f.to()
	if err != nil {
		return "", err
	}
	return to.Verifier(ctx, role)
}

// Fate is that of link.Asked.
func (f *former) Fate(ctx context.Context, q link.FateQuestion) (link.FateAnswer, error) {
	to, err := f.to()
	if err != nil {
		return link.FateAnswer{}, err
	}
	return to.Fate(ctx, q)
}

// End is that of link.Asked.
func (f *former) End(ctx context.Context, q link.FateQuestion) error {
	to, err := f.to()
	if err != nil {
		return err
	}
	return to.End(ctx, q)
}

// Position is that of link.Asked.
func (f *former) Position(ctx context.Context, database string) ([]link.SitePosition, error) {
	to, err := f.to()
	if err != nil {
		return nil, err
	}
	return to.Position(ctx, database)
}

// Facts is that of link.Asked.
func (f *former) Facts(ctx context.Context) ([]byte, error) {
	to, err := f.to()
	if err != nil {
		return nil, err
	}
	return to.Facts(ctx)
}

// Staying is that of link.Asked.
func (f *former) Staying(ctx context.Context, gateway string, sessions map[string]int) error {
	to, err := f.to()
	if err != nil {
		return err
	}
	return to.Staying(ctx, gateway, sessions)
}

// Reach is that of link.Asked.
func (f *former) Reach(ctx context.Context, database string, positions []link.SitePosition, gone string) error {
	to, err := f.to()
	if err != nil {
		return err
	}
	return to.Reach(ctx, database, positions, gone)
}
