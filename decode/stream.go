// Package decode reads one database's committed changes from PostgreSQL's logical decoding (one slot per database,
// pgoutput) and delivers them as wal.Txn in commit order, with the positions that nothing lies before. It checks that
// the slot still is the one the journal was written from; a gap is an error, never a silent restart. It does not
// store anything: the caller journals what it gets and says how far it is durable.
package decode

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// MessagePrefix begins the prefix of every logical message that is duri's own.
const MessagePrefix = "duri"

func isOurs(prefix string) bool {
	return prefix == MessagePrefix || strings.HasPrefix(prefix, MessagePrefix+".")
}

// Positions are what is reported to PostgreSQL: they release commits that wait at remote_write, on and remote_apply,
// and Flush lets PostgreSQL forget WAL (durability.md section 2). They must never go back.
type Positions struct{ Write, Flush, Apply wal.LSN }

// Handler receives the stream. Calls come from one goroutine, in order; a slow handler holds the stream back, but
// never the keepalives.
type Handler interface {
	// Commit delivers a transaction. The handler owns it.
	Commit(*Commit) error
	// Advance says that every transaction with EndLSN <= to has been delivered.
	Advance(to wal.LSN) error
	// Idle is called whenever nothing more is waiting to be delivered just now.
	Idle() error
}

// Config of a Stream.
type Config struct {
	DSN, Database     string
	Slot, Publication string
	// Report is asked for the positions to report, about every Interval and when PostgreSQL asks. It must not block.
	Report   func() Positions
	Interval time.Duration // default 100 ms
	// Name is the application_name of the walsender, which synchronous_standby_names refers to.
	Name string
	// Own reports whether transactions under a replication origin are this site's own all the same. Nil: none is. It is
	// the hook by which tests set commit times.
	Own func(origin string) bool
}

// Stream is a replication connection that is streaming. Use Open, then Run once.
type Stream struct {
	cfg  Config
	conn *pgconn.PgConn
	kick chan struct{}

	sendMu sync.Mutex // held while a report is written
}

// Connect opens a replication connection to the database, for one whose commits nobody waits for: while it is busy, what
// comes is read a little later and more at once.
func Connect(ctx context.Context, dsn, database, name string) (*pgconn.PgConn, error) {
	return connect(ctx, dsn, database, name, func(c net.Conn) net.Conn { return &coalescer{Conn: c} })
}

// ConnectPrompt is Connect for commits that wait for what follows: everything is read as it comes.
func ConnectPrompt(ctx context.Context, dsn, database, name string) (*pgconn.PgConn, error) {
	return connect(ctx, dsn, database, name, func(c net.Conn) net.Conn { return c })
}

func connect(ctx context.Context, dsn, database, name string, wrap func(net.Conn) net.Conn) (*pgconn.PgConn, error) {
	// The text of regclass and its kin depends on the search path; apply sessions have the same one.
	c, err := pg.Config(dsn, database, map[string]string{
		"replication": "database", "application_name": name, "search_path": "pg_catalog",
	})
	if err != nil {
		return nil, err
	}
	dial := c.DialFunc
	c.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return wrap(conn), nil
	}
	return pgconn.ConnectConfig(ctx, c)
}

// Open starts streaming from a position on a connection made by Connect, which it takes over. The slot must have been
// checked (Recognise).
func Open(ctx context.Context, conn *pgconn.PgConn, cfg Config, from wal.LSN) (*Stream, error) {
	if cfg.Interval == 0 {
		cfg.Interval = 100 * time.Millisecond
	}
	sql := fmt.Sprintf("START_REPLICATION SLOT %s LOGICAL %s (proto_version '1', publication_names %s, messages 'true')",
		pg.QuoteIdent(cfg.Slot), from, pg.QuoteLiteral(pg.QuoteIdent(cfg.Publication)))
	conn.Frontend().SendQuery(&pgproto3.Query{String: sql})
	if err := conn.Frontend().Flush(); err != nil {
		return nil, fmt.Errorf("start replication from slot %s: %w", cfg.Slot, err)
	}
	for {
		msg, err := conn.ReceiveMessage(ctx)
		if err != nil {
			return nil, fmt.Errorf("start replication from slot %s: %w", cfg.Slot, err)
		}
		switch m := msg.(type) {
		case *pgproto3.CopyBothResponse:
			return &Stream{cfg: cfg, conn: conn, kick: make(chan struct{}, 1)}, nil
		case *pgproto3.ErrorResponse:
			return nil, fmt.Errorf("start replication from slot %s: %w", cfg.Slot, pgconn.ErrorResponseToPgError(m))
		}
	}
}

// queued bounds how many decoded transactions wait for the handler.
const queued = 1024

// event is a Commit or, when nil, an Advance to LSN.
type event struct {
	commit *Commit
	lsn    wal.LSN
}

// Run delivers the stream until ctx ends or the connection breaks, then closes the connection. Decoding, handling
// and reporting run side by side. It returns nil only when ctx ended.
func (s *Stream) Run(ctx context.Context, h Handler) error {
	defer pg.Close(s.conn)
	g, gctx := errgroup.WithContext(ctx)
	events := make(chan event, queued)
	g.Go(func() error {
		defer close(events)
		return s.receive(gctx, events)
	})
	g.Go(func() error {
		for e := range events {
			err := deliver(h, e)
			if err == nil && len(events) == 0 {
				err = h.Idle()
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	g.Go(func() error { return s.reportLoop(gctx) })
	err := g.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func deliver(h Handler, e event) error {
	if e.commit != nil {
		return h.Commit(e.commit)
	}
	return h.Advance(e.lsn)
}

func (s *Stream) receive(ctx context.Context, events chan<- event) error {
	// The deadline ends a blocked read when ctx does; watching ctx in every ReceiveMessage would cost more than parsing.
	stop := context.AfterFunc(ctx, func() { _ = s.conn.Conn().SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	p := newParser(s.cfg.Own)
	for {
		msg, err := s.conn.ReceiveMessage(context.Background())
		if err != nil {
			return fmt.Errorf("replication stream: %w", err)
		}
		var e event
		switch m := msg.(type) {
		case *pgproto3.CopyData:
			if e, err = s.copyData(p, m.Data); err != nil {
				return err
			}
		case *pgproto3.ErrorResponse:
			return fmt.Errorf("replication stream: %w", pgconn.ErrorResponseToPgError(m))
		case *pgproto3.CopyDone:
			return errors.New("replication stream: the server ended it")
		}
		if e == (event{}) {
			continue
		}
		select {
		case events <- e:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// copyData handles XLogData ('w': start, end, time, payload) and keepalives ('k': end, time, reply requested).
func (s *Stream) copyData(p *parser, data []byte) (event, error) {
	switch {
	case len(data) >= 25 && data[0] == 'w':
		c, err := p.message(data[25:])
		if err != nil {
			return event{}, fmt.Errorf("decode at %s: %w", wal.LSN(binary.BigEndian.Uint64(data[1:])), err)
		}
		return event{commit: c}, nil
	case len(data) == 18 && data[0] == 'k':
		if data[17] != 0 {
			select {
			case s.kick <- struct{}{}:
			default:
			}
		}
		if p.cur != nil { // inside a transaction nothing is complete
			return event{}, nil
		}
		return event{lsn: wal.LSN(binary.BigEndian.Uint64(data[1:]))}, nil
	}
	return event{}, fmt.Errorf("replication stream: unknown message of %d bytes", len(data))
}

// reportLoop sends standby status updates: on a timer and when asked, so that a handler that waits for a disk does not
// look like a dead standby (pglogical's users know that failure, peers.md pain 15).
func (s *Stream) reportLoop(ctx context.Context) error {
	t := time.NewTicker(s.cfg.Interval)
	defer t.Stop()
	var last Positions
	var sent time.Time
	for {
		asked := false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.kick:
			asked = true
		case <-t.C:
		}
		s.sendMu.Lock()
		pos, err := s.cfg.Report(), error(nil)
		if asked || pos != last || time.Since(sent) >= time.Second {
			last, sent = pos, time.Now()
			err = s.write(pos)
		}
		s.sendMu.Unlock()
		if err != nil {
			return fmt.Errorf("report to PostgreSQL: %w", err)
		}
	}
}

// Report sends the positions at once, without waiting for the timer. While one is being written, another is left to the
// timer's goroutine.
func (s *Stream) Report() {
	if s.sendMu.TryLock() {
		err := s.write(s.cfg.Report())
		s.sendMu.Unlock()
		if err == nil {
			return
		}
	}
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// write writes a standby status update as a raw CopyData message. It writes to the socket directly because the
// receiving goroutine owns the pgconn; reading and writing a net.Conn side by side is allowed. s.sendMu is held.
func (s *Stream) write(p Positions) error {
	b := make([]byte, 0, 39)
	b = append(b, 'd')
	b = binary.BigEndian.AppendUint32(b, 38)
	b = append(b, 'r')
	b = binary.BigEndian.AppendUint64(b, uint64(p.Write))
	b = binary.BigEndian.AppendUint64(b, uint64(p.Flush))
	b = binary.BigEndian.AppendUint64(b, uint64(p.Apply))
	b = binary.BigEndian.AppendUint64(b, uint64(wal.TimeOf(time.Now())))
	b = append(b, 0)
	if err := s.conn.Conn().SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	_, err := s.conn.Conn().Write(b)
	return err
}
