// Package gateway is the way of clients to PostgreSQL through the agent.
//
// A Door hands connections on, byte by byte, and can be shut. With PostgreSQL listening on
// nothing that clients reach, a site that may not serve anybody does not, whatever state its server is in (design:
// durability, "Fence"). It does not look into what passes, so TLS and authentication are between client and server.
//
// A Server takes part in the protocol: it authenticates clients itself, logs in at servers with their keys, and owns their
// sessions. It is told by a Router where to go, and knows nothing of sites but that.
package gateway

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

// Door is the listener for clients. It is shut until Open is called. Methods may be called at any time.
type Door struct {
	dial func(ctx context.Context) (net.Conn, error)
	log  *slog.Logger

	mu    sync.Mutex // guards the rest
	shut  string     // why it is shut; empty: it is open
	conns map[*passage]struct{}
	total int64
}

// passage is one client's connection.
type passage struct{ client, server net.Conn }

func (p *passage) close() {
	_ = p.client.Close() // the other end may have closed it already
	_ = p.server.Close()
}

// What clients are told.
const (
	justStarted = "the agent has just started"
	shutOut     = "this site takes no clients: "
	shutHint    = "connect to another site; `duri status` tells when this one is back"
)

// NewDoor makes a door to the server that dial reaches.
func NewDoor(dial func(ctx context.Context) (net.Conn, error), log *slog.Logger) *Door {
	return &Door{dial: dial, log: log, shut: justStarted, conns: map[*passage]struct{}{}}
}

// Open lets clients in.
func (d *Door) Open() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shut != "" {
		d.log.Info("clients are let in")
	}
	d.shut = ""
}

// Shut refuses clients, with the reason, and ends the connections of those that are in. When it returns, nothing that the
// server sends reaches a client any more.
func (d *Door) Shut(why string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shut == "" {
		d.log.Warn("clients are shut out", "why", why, "connections", len(d.conns))
	}
	d.shut = why
	for p := range d.conns {
		p.close()
	}
}

// Status says whether the door is open, why not, how many connections there are, and how many there were.
func (d *Door) Status() (shut string, now int, total int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.shut, len(d.conns), d.total
}

// Serve takes clients on l, which it closes, until ctx ends.
func (d *Door) Serve(ctx context.Context, l net.Listener) error {
	var wg sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var err error
	for {
		var c net.Conn
		if c, err = l.Accept(); err != nil {
			break
		}
		wg.Go(func() { d.pass(ctx, c) })
	}
	d.Shut("the agent ends")
	wg.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return errors.Join(err, l.Close())
}

// helloMax bounds how long a client that is refused may take to say what it wants.
const helloMax = 5 * time.Second

func (d *Door) pass(ctx context.Context, client net.Conn) {
	shut, _, _ := d.Status()
	if shut != "" {
		refuse(client, shut)
		return
	}
	dialCtx, cancel := context.WithTimeout(ctx, helloMax)
	defer cancel()
	server, err := d.dial(dialCtx)
	if err != nil {
		refuse(client, "PostgreSQL cannot be reached: "+err.Error())
		return
	}
	p := &passage{client, server}
	defer p.close()
	d.mu.Lock()
	if shut = d.shut; shut == "" {
		d.conns[p] = struct{}{}
		d.total++
	}
	d.mu.Unlock()
	if shut != "" {
		return
	}
	defer func() {
		d.mu.Lock()
		delete(d.conns, p)
		d.mu.Unlock()
	}()
	end := context.AfterFunc(ctx, p.close)
	defer end()
	ended := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
		go func() {
			_, _ = io.Copy(way[1], way[0]) // whichever end it was, both connections end
			p.close()
			ended <- struct{}{}
		}()
	}
	<-ended
	<-ended
}

// The first packets of a client (PostgreSQL manual, "Message Formats").
const (
	cancelRequest = 80877102
	firstMax      = 10_000
)

// refuse answers a client's first packet with an error, as a server does that cannot take it, and closes.
func refuse(c net.Conn, why string) {
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(helloMax)); err != nil {
		return
	}
	var head [8]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return
	}
	length, code := binary.BigEndian.Uint32(head[:]), binary.BigEndian.Uint32(head[4:])
	if length < 8 || length > firstMax || code == cancelRequest {
		return
	}
	if _, err := io.CopyN(io.Discard, c, int64(length)-8); err != nil {
		return
	}
	_, _ = c.Write(fatal("57P03", shutOut+why, shutHint))
}

// fatal is an ErrorResponse. It is understood as the answer to a request for TLS as well.
func fatal(sqlstate, message, hint string) []byte {
	var fields []byte
	for _, f := range []struct {
		kind byte
		text string
	}{{'S', "FATAL"}, {'V', "FATAL"}, {'C', sqlstate}, {'M', message}, {'H', hint}} {
		fields = append(append(append(fields, f.kind), f.text...), 0)
	}
	fields = append(fields, 0)
	b := binary.BigEndian.AppendUint32([]byte{'E'}, uint32(len(fields)+4))
	return append(b, fields...)
}
